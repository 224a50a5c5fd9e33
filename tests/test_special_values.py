"""Special values in x, W and b, by every implementation: NaN and Inf where eager has them, numbers as float64's."""

import pytest
import torch
from fuzz import SETTINGS, settings
from reference import DTYPES, Expected, compute_roundoff, eager, random_arguments, ways_of
from tiles import PRECISIONS, by_tile, each_float32_kernel, each_kind, needs_hopper, tiles

from model_new import linear_sigmoid_residual, select_kernel

NAN, INF, ALL = float("nan"), float("inf"), slice(None)


def largest(t):
    return torch.finfo(t.dtype).max


def denormal(t):
    """Denormal numbers of t's type, of both signs, in its shape."""
    return ((2 * torch.rand_like(t, dtype=torch.float64) - 1) * torch.finfo(t.dtype).tiny).to(t.dtype)


def put(*places):
    """An edit: a value at each (value, which of x, W and b, *index). Values: numbers, or functions of the tensor."""

    def edit(*tensors):
        for value, which, *index in places:
            t = tensors["xWb".index(which)]
            t[tuple(index) or ALL] = value(t) if callable(value) else value

    return edit


SPECIALS = {  # edits of normal numbers
    **{f"{value} in {t}": put((value, t, 2, *([7] if t != "b" else []))) for value in (NAN, INF, -INF) for t in "xWb"},
    "NaN and Inf in a row of x": put((NAN, "x", 2, 7), (INF, "x", 2, 9), (INF, "x", 3, 9)),
    "Inf times 0": put((INF, "x", 2, 7), (0.0, "W", slice(0, 9), 7)),
    "0 times NaN": put((0.0, "x", slice(0, 2), 7), (NAN, "W", 3, 7)),
    "Inf - Inf in x": put((INF, "x", 2, 7), (-INF, "x", 2, 9), (1.0, "W", ALL, 7), (1.0, "W", ALL, 9)),
    "Inf in x and in W": put((INF, "x", 2, 7), (INF, "W", 7, 9), (-INF, "W", 8, 7)),
    "Inf in z, -Inf in b": put((INF, "x", 2, 7), (-INF, "b", slice(0, None, 2))),
    "Inf in all rows of x": put((INF, "x", ALL, 5)),
    "-Inf in many rows of W": put((-INF, "W", slice(3, 131), 5)),
    "x is NaN": put((NAN, "x")),
    "everything is Inf": put((INF, "x"), (INF, "W"), (INF, "b")),
    "largest number in x": put((largest, "x", 2, 7), (0.5, "W", ALL, 7)),
    "largest number in W": put((largest, "W", 2, 7), (0.5, "x", ALL, 7)),
    "largest number in b": put((largest, "b", 3)),
    "a product overflows": put((largest, "x", 2, 7), (-2.0, "W", ALL, 7)),
    "a sum overflows": put((largest, "x", 2), (0.5, "W")),
    "large numbers of both signs": put(
        (lambda t: largest(t) / 64, "x", 2, slice(0, 20)), (lambda t: -largest(t) / 64, "x", 2, 9)
    ),
    "large x": put((lambda t: t.sign() * largest(t) / 32, "x")),
    "one large row of W": put((lambda t: t[3] * (largest(t) / 8), "W", 3), (lambda t: t * 0.01, "x")),
    "rows of zeros": put((0.0, "x", 2), (0.0, "W", 3)),
    "everything is zero": put((0.0, "x"), (0.0, "W"), (0.0, "b")),
    "everything is -0": put((-0.0, "x"), (-0.0, "W"), (-0.0, "b")),
    "denormal x, b = 0": put((denormal, "x"), (0.0, "b")),
    "denormal W, b = 0": put((denormal, "W"), (0.0, "b")),
    "some rows denormal, b = 0": put((lambda t: denormal(t[:2]), "x", slice(0, 2)), (0.0, "b")),
    "denormal x and W, b = 0": put((denormal, "x"), (denormal, "W"), (0.0, "b")),
    "denormal b, x = 0": put((denormal, "b"), (0.0, "x")),
}


def assert_as_eager(out, x, weight, bias, scale, kernel, with_z, what):
    """NaN where eager has it and Inf with eager's sign; everywhere else within the bound of float64's.

    A finite number within that bound is right where eager overflowed on the way, and so is eager's very number. At a
    lower float32 precision eager's overflows differ (TF32 rounds the largest numbers up to Inf): there an element is
    judged only if eager is finite, or NaN, or Inf, alike at 'highest' and at the current precision. Where the bound
    itself overflows, as it can for float64: eager's number to a few roundings.
    """

    def alike(a, b):
        return torch.where(a.isfinite(), b.isfinite(), (a == b) | (a.isnan() & b.isnan()))

    out, x, weight, bias = (t.detach() for t in (out, x, weight, bias))
    here = eager(x, weight, bias, scale)
    with settings("highest"):
        at_highest = eager(x, weight, bias, scale)
    finite_inputs = x.isfinite().all(1)[:, None] & weight.isfinite().all(1) & bias.isfinite()
    finite = (t.nan_to_num(0.0, 0.0, 0.0) for t in (x, weight, bias))
    float64 = Expected(*finite, scale, ways_of(x, kernel), with_z)
    close = (out - here).abs() <= 32 * torch.finfo(out.dtype).eps * here.abs()
    right = torch.where(float64.out_bound.isfinite(), float64.good(out), close) & finite_inputs
    as_eager = torch.where(out.isfinite(), out == here, alike(out, here))
    bad = ~right & ~as_eager & alike(here, at_highest)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {bad.sum().item()} of {bad.numel()} elements; first at {at}: {out[at].item()!r}, eager "
            f"{here[at].item()!r}, at 'highest' {at_highest[at].item()!r}, float64 {float64.out[at].item()!r}"
        )


@pytest.mark.parametrize("m, k, n", [(5, 40, 24), (130, 200, 140), (512, 1024, 2048)])
@pytest.mark.parametrize("dtype, precision", SETTINGS, ids=str)
def test_the_operator(dtype, precision, m, k, n, device):
    """Scale 0 for the denormals, which do not show beside s/2."""
    if device == "cpu" and m > 100:
        pytest.skip("a size for GPUs")
    with settings(precision):
        for what, edit in SPECIALS.items():
            x, weight, bias, _ = random_arguments((m, k), n, dtype, device)
            edit(x, weight, bias)
            kernel = select_kernel(x, weight, bias)
            for scale, with_gradient in ((2.0, False), (0.0, False), (-1.5, True)):
                out = linear_sigmoid_residual(x.clone().requires_grad_(with_gradient), weight, bias, scale)
                assert_as_eager(out, x, weight, bias, scale, kernel, with_gradient, f"{what}, scale {scale}")


@needs_hopper
@each_kind
def test_every_tile(kernel, dtype):
    """Each tile has special values where eager has them, in out and in z. In 16 bits TMA stores the 264 columns."""
    with settings(PRECISIONS[kernel][1]):
        for m, n, k in [(130, 140, 200), (300, 264, 203)]:
            for what, edit in SPECIALS.items():
                x, weight, bias, _ = random_arguments((m, k), n, dtype, "cuda")
                edit(x, weight, bias)
                for tile in tiles(kernel, k, splits=(1, 3)):
                    out, z = by_tile(tile, x, weight, bias, with_z=True)
                    case = x, weight, bias
                    assert_as_eager(out, *case, 2.0, kernel, False, f"{what}, out of {tile}, K = {k}")
                    assert_as_eager(z, *case, 0.0, kernel, True, f"{what}, z of {tile}, K = {k}")


SATURATED = [
    *(NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0),
    *(15.9, -15.9, 16.7, -17.5, 37.0, -37.0, 88.0, -87.0, -89.0, 104.0, -104.0, 745.0, -746.0),  # sigmoid saturates
    *(3e4, -3e4, 6e4, -6e4, 1e30, -1e30, 3.4e38, -3.4e38),
    *(1e-5, 3e-6, -3e-6, 6e-8, 1e-39, -1e-39, 1e-44, 5e-324, -1e-310),  # denormal in one of the dtypes
]


@pytest.mark.parametrize("scale", [2.0, 0.0, -1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_epilogue(dtype, scale, device):
    """K = 1, W = 1, b = 0: z is x itself. Eager's finite values to a few roundings: with s = 0 exactly, so that a
    denormal flushed to zero shows.
    """
    x = torch.tensor(SATURATED, dtype=torch.float64).to(dtype).to(device).reshape(-1, 1)
    weight, bias = x.new_ones(1, 1), x.new_zeros(1)
    right, out = eager(x, weight, bias, scale), linear_sigmoid_residual(x, weight, bias, scale)
    assert torch.equal(out.isnan(), right.isnan())
    finite = right.isfinite()
    assert torch.equal(out[~finite].nan_to_num(0, 1, -1), right[~finite].nan_to_num(0, 1, -1))
    out, right = out[finite], right[finite]
    if scale == 0:
        assert torch.equal(out, right)
        return
    # Eager's sigmoid, product and sum are each rounded to the dtype; ours once, or in float32.
    roundoff = max(compute_roundoff(dtype), torch.finfo(dtype).eps / 2)
    bound = roundoff * (12 * abs(scale) * torch.sigmoid(x[finite].double()) + 2 * right.double().abs())
    assert ((out.double() - right.double()).abs() <= bound).all()


@needs_hopper
@pytest.mark.parametrize("which", range(3), ids=["x", "W", "b"])
@each_kind
def test_in_a_tile_it_stays_in_its_rows_or_columns(kernel, dtype, which):
    """The other rows or columns keep their bits, in several tiles one after the other, too."""
    for m, n, k in [(130, 140, 200), (300, 520, 1000), (1300, 4000, 68)]:
        case = random_arguments((m, k), n, dtype, "cuda")
        some = tiles(kernel, k, splits=(1, 3))
        clean = [by_tile(tile, *case) for tile in some]
        tensor, same = case[which], torch.ones(m, n, dtype=torch.bool, device="cuda")
        for row, value in ((3, NAN), (70, INF), (-2, -INF)):
            tensor[(row, k - 3) if tensor.dim() == 2 else row] = value
            (same if which == 0 else same.T)[row] = False
        right = eager(*case)
        for tile, before in zip(some, clean):
            out = by_tile(tile, *case)
            assert torch.equal(out[same], before[same]), tile
            assert torch.equal(out[~same].nan_to_num(0, 1, -1), right[~same].nan_to_num(0, 1, -1)), tile


@needs_hopper
@each_float32_kernel
def test_products_that_overflow_both_ways(kernel):
    """Eager has NaN or Inf, which of them depends on the order of the terms. A number would be one made of some."""
    for m, n, k in [(130, 140, 200), (300, 260, 515)]:
        x, weight, bias, _ = random_arguments((m, k), n, torch.float32, "cuda")
        x *= 1e25
        weight *= 1e20
        wide_x, wide_w = x.double(), weight.double()
        not_finite = (wide_x @ wide_w.T).abs() > 0.01 * (wide_x.abs() @ wide_w.abs().T)  # by far
        assert not eager(x, weight, bias, 2.0)[not_finite].isfinite().any()
        for tile in tiles(kernel, k, splits=(1, 3, 4)):
            for result in by_tile(tile, x, weight, bias, with_z=True):
                assert not result[not_finite].isfinite().any(), tile
