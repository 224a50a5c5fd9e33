"""The fused kernels for Hopper, every tile of each: shapes at the tiles' edges, memory, accuracy, repeatability; and
that what is selected is called. Special values are in test_special_values.py.
"""

import pytest
import torch
from fuzz import LAYOUTS, ResultGuard, place
from reference import Expected, random_arguments, ways_of
from tiles import PRECISIONS, a_shape_of, by_tile, each_float32_kernel, each_kind, needs_hopper, tiles
from torch import nn

from bench.bindings import scratch_bytes
from bench.data import data_sets
from model_new import linear_sigmoid_residual, select_kernel

pytestmark = [needs_hopper]

U = 2.0**-24  # float32's unit roundoff


def random_case(m, n, k, dtype=torch.float32):
    return random_arguments((m, k), n, dtype, "cuda")[:3]


def expected_of(kernel, x, weight, bias, scale=2.0, with_z=False):
    return Expected(x, weight, bias, scale, ways_of(x, kernel), with_z)


def with_z(tile, x, weight, bias, scale=2.0):
    """(out, z); out must be what it is where z is not wanted."""
    out, z = by_tile(tile, x, weight, bias, scale, with_z=True)
    alone = by_tile(tile, x, weight, bias, scale)
    assert ((out == alone) | (out.isnan() & alone.isnan())).all(), f"{tile}: out is another where z is wanted"
    return out, z


def check_all_tiles(kernel, case, scale=2.0, **splits):
    """Checks out and z of each tile. In the memory that they and scratch are likely to get stands NaN."""
    x, weight, _ = case
    (m, k), n = x.shape, len(weight)
    expected = expected_of(kernel, *case, scale)
    for tile in tiles(kernel, k, **splits):
        sizes = m * n * x.element_size(), m * n * x.element_size(), scratch_bytes(kernel, m, n, k)
        blocks = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in sizes]
        del blocks
        expected.check(*with_z(tile, *case, scale), f"of {tile}, M, N, K = {m}, {n}, {k}")


# shapes

EDGES_M = (1, 15, 16, 17, 127, 128, 129, 130, 255, 256, 257, 300)
EDGES_N = (1, 7, 127, 128, 129, 130, 255, 256, 257, 296)  # in 16 bits multiples of 8 are stored by TMA
EDGES_K = (1, 3, 7, 8, 60, 64, 68, 515, 1000)


@pytest.mark.parametrize("m", EDGES_M)
@each_kind
def test_edges(kernel, dtype, m):
    """Rows, columns and blocks of k are full, partly full or missing; blocks of a cluster have unequal parts of K, or
    no rows to add up. Every M meets every N and every K, and every N every K, at one of a few scales.
    """
    for j, n in enumerate(EDGES_N):
        case = random_case(m, n, EDGES_K[(EDGES_M.index(m) + j) % len(EDGES_K)], dtype)
        check_all_tiles(kernel, case, (0.0, 2.0, -3.0, 1e3)[j % 4])


# M, N, K with more tiles than run at once: 132 blocks, in pairs that have 256 columns or 512 rows. The last tile of a
# pair and the last group of tiles (of 1024 rows) are full, partly full or missing. And sums about and beyond the 8192 k
# that the converting kernel holds in registers.
LARGE = [
    *((1024, 4400, 8196), (1025, 4101, 68), (1153, 4600, 515), (1300, 4000, 4), (2049, 2100, 200), (2304, 4608, 64)),
    *((300, 17000, 72), (5, 7, 8192), (300, 257, 8199), (17, 130, 16500)),
]


@pytest.mark.parametrize("m, n, k", LARGE)
@each_kind
def test_more_tiles_than_run_at_once_and_long_sums(kernel, dtype, m, n, k):
    check_all_tiles(kernel, random_case(m, n, k, dtype), splits=(1, 3, 4))


@each_kind
def test_a_row_does_not_depend_on_the_others(kernel, dtype):
    """Bit for bit, whether the last tile is whole, begins within the one before, or has copies of the last row."""
    x, weight, bias = random_case(700, 520, 200, dtype)
    for tile in tiles(kernel, 200, splits=(1, 3)):
        out = by_tile(tile, x, weight, bias)
        for m in (1, 129, 255, 257, 300, 513, 699):
            assert torch.equal(by_tile(tile, x[:m], weight, bias), out[:m]), (tile, m)


# memory


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "negative view"])
@each_kind
def test_layouts(kernel, dtype, layout):
    """Bit for bit as from contiguous tensors, which are right. x, W and bias lie in other numbers, which are NaN in 16
    bits. In float32 an element that is NaN would be computed again, and be right then: there they are 1e15, whose
    products are finite, and which in a row's scale leaves nothing of the row's own numbers.
    """
    filler = 1e15 if dtype == torch.float32 else None
    for m, n, k in ((130, 260, 200), (257, 127, 203)):
        case = random_case(m, n, k, dtype)
        if layout == "expanded":
            case = [t[:1].expand(t.shape).clone() for t in case]
        placed, buffers = zip(*(place(t, layout, filler) for t in case))
        if placed[1].stride(1) != 1:  # the library serves such a W
            placed = placed[0], case[1], placed[2]
        before = [buffer.clone() for buffer in buffers]
        expected = expected_of(kernel, *case)
        for tile in tiles(kernel, k, splits=(2,)):
            out = by_tile(tile, *case)
            expected.check(out, what=f"of {tile}")
            assert torch.equal(by_tile(tile, *placed), out), (tile, k)
        assert all(map(torch.equal, buffers, before))


@each_kind
def test_nothing_beside_the_results_is_written(kernel, dtype):
    """out and z, scratch, and copies of x and W with longer rows lie in memory that was NaN, between bytes that are
    looked at afterwards.
    """
    guarded = 0
    for m, n, k in ((1, 700, 8), (7, 390, 64), (129, 130, 203), (128, 520, 1000), (1300, 3001, 72)):
        case = random_case(m, n, k, dtype)
        expected = expected_of(kernel, *case)
        copies = [rows * (k * dtype.itemsize // 16 + 1) * 16 for rows in (m, n)] if k == 203 else []
        for tile in tiles(kernel, k, splits=(1, 3)):
            guard = ResultGuard([*[m * n * dtype.itemsize] * 2, scratch_bytes(kernel, m, n, k), *copies], "cuda")
            out, z = by_tile(tile, *case, with_z=True)
            guarded += guard.check([out, z])
            expected.check(out, z, f"of {tile}")
    assert guarded


# accuracy

TILES_COMPARED = {
    "fp16x3": [(256, 0), (128, 0), (128, 1), (64, 2), (32, 3), (16, 4)],
    "fp16x1": [(256, 0), (128, 1), (64, 2), (32, 3), (16, 4)],
    "fp16x1_staged": [(256, 0)],
}


def product_by(tile, x, weight):
    return by_tile(tile, x, weight, weight.new_zeros(len(weight)), 0.0)


@each_float32_kernel
def test_accuracy_is_the_librarys_or_better(kernel):
    """On the benchmark's data at the reference shape, which is large enough for cuBLAS not to split K. "fp16x3": a
    relative Frobenius error of 1.1 times SGEMM's or 1.5e-7, whichever is larger (above 1.02 only where few of the
    numbers are not 0, for which the factor that corrects truncation is too large); no element further off than SGEMM's
    worst, or than two fp16 numbers per operand and that factor are, beside the largest of their row or block of 64 k.
    "fp16x1": as cuBLAS' with TF32, which rounds to 11 bits too: to 1.02 in the Frobenius norm, to 1.25 in the one worst
    element.
    """
    torch.set_float32_matmul_precision(PRECISIONS[kernel][1])
    allowed, floors = ((1.1, 1.02), (1.5e-7, 2.0**-21 + 2.0**-23)) if kernel == "fp16x3" else ((1.02, 1.25), (0, 0))
    worse = []
    for data, x, weight in data_sets(1024, 8192, 8192, "cuda"):
        exact = x.double() @ weight.double().T
        size_x, size_w = x.double().abs(), weight.double().abs()
        magnitude = (size_x @ size_w.T).clamp_min_(1e-300)
        # What fp16's range costs; see the third term of the guarantee in docs/OPTIMIZATIONS.md.
        blocks_x, blocks_w = (size.unflatten(1, (-1, 64)) for size in (size_x, size_w))
        lost = blocks_x.sum(2) @ blocks_w.amax(2).T + size_x.amax(1, keepdim=True) * size_w.sum(1)

        def errors(out, lost, exact=exact, magnitude=magnitude):
            difference = out.double().sub_(exact)
            frobenius = (difference.norm() / exact.norm()).item()
            return frobenius, ((difference.abs_() - lost).clamp_min_(0) / magnitude).max().item()

        theirs = errors(nn.functional.linear(x, weight), 0)
        limits = [max(factor * error, floor) for factor, error, floor in zip(allowed, theirs, floors)]
        for shape in TILES_COMPARED[kernel]:
            ours = errors(product_by((kernel, *shape), x, weight), 2.0**-39 * lost)
            if not all(error <= limit for error, limit in zip(ours, limits)):
                worse.append(f"{data}, {shape}: {ours[0]:.2e}, {ours[1]:.2e}; library {theirs[0]:.2e}, {theirs[1]:.2e}")
    assert not worse, "\n".join(worse)


@pytest.mark.parametrize("tile", tiles("fp16x3", 8192), ids=str)
def test_three_products_are_this_accurate(tile):
    """The relative Frobenius error for normal data; for positive data, how much too small a product is in the mean.

    The tensor core truncates. Without the factor 1 + 2^-23 a product of positive numbers is too small by 1.8e-7, 0.8e-7
    or 0.4e-7, with 1, 2 or 4 accumulators; the factor gives back 1.2e-7, 0.6e-7 or 0.3e-7. Large products before small
    ones take 1e-7 away again in the first case. The limit lies between; the mean's own noise is 1e-9.
    """

    def product_and_exact(draw):
        x, weight = draw(512, 8192, device="cuda"), draw(512, 8192, device="cuda")
        return product_by(tile, x, weight), x.double() @ weight.double().T

    product, exact = product_and_exact(torch.randn)
    rows = tile[1]
    error = ((product - exact).norm() / exact.norm()).item()
    assert error <= (2.5e-7 if rows > 64 else 1.7e-7), error
    product, exact = product_and_exact(torch.rand)
    bias = (product / exact - 1).mean().item()
    assert (-0.25e-7 if rows <= 32 else -0.5e-7 if rows == 64 else -1.2e-7) < bias < 0.3e-7, bias


@pytest.mark.parametrize("large_x", [1e6, 1e20])
@pytest.mark.parametrize("large_w", [1.0, 1e9])
@each_float32_kernel
def test_lost_sums_in_some_rows_and_columns(kernel, large_x, large_w):
    """In every other row of x, in every third group of 16 rows of W: sums that have lost their bits beside others. Few
    of them in a tile, and many.
    """
    for m, n, k in ((260, 300, 1000), (3, 40, 1000)):
        x, weight, bias = random_case(m, n, k)
        x[:, ::50], weight[:, ::50], weight[:, 7::64] = 0, 0, 0
        x[::2, ::50] = large_x
        some = (torch.arange(n, device="cuda") // 16 % 3 == 0)[:, None]
        x[:, 7::64] = 0
        weight[:, 7::64] = large_w * some
        exact, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        for tile in tiles(kernel, k, splits=(1, 3, 4)):
            _, z = with_z(tile, x, weight, bias)
            relative = 1e-6 if kernel == "fp16x3" else 2.0**-10
            error = (z.double() - exact - bias.double()).abs() - U * (magnitude + bias.double().abs())
            assert (error <= relative * magnitude).all(), (tile, (error / magnitude).max().item())


@each_float32_kernel
def test_sums_that_are_0_stay_0(kernel):
    """x and W share no columns, or W or x is 0: nothing is lost there, whatever else is large or small."""
    x, weight, bias = random_case(260, 300, 1000)
    x[:, ::2], weight[:, 1::2] = 0, 0
    x[3], weight[5] = 0, 0
    x[::4, 1] = 1e30
    for tile in tiles(kernel, 1000, splits=(1, 3, 4)):
        _, z = with_z(tile, x, weight, bias)
        assert torch.equal(z, bias.expand_as(z)), tile


ROWS_OF_W = {  # what a block of 64 k is multiplied by
    "growing fast": lambda block: 2.0 ** (8 * block),
    "shrinking": lambda block: 2.0**-block,
    "up and down": lambda block: 2.0 ** (10 * (block % 3)),
    "zero, then large": lambda block: 1e25 * (block > 2),
    "tiny, then large": lambda block: 1e25 if block > 2 else 1e-37,
    "large, then tiny": lambda block: 1e25 if block < 2 else 1e-37,
}


@pytest.mark.parametrize("how", ROWS_OF_W)
@each_float32_kernel
def test_w_changes_its_size_along_k(kernel, how):
    """Where a block of k brings larger entries than any before, "fp16x1" in tiles of 256 rows scales down what it has;
    by so much that nothing is left, even. In some rows of W, beside others that stay as they are.
    """
    case = _, weight, _ = random_case(130, 260, 1000)
    factors = torch.tensor([ROWS_OF_W[how](k // 64) for k in range(1000)], dtype=torch.float32, device="cuda")
    weight[:100] *= factors
    weight[150] *= factors.flip(0)
    check_all_tiles(kernel, case, splits=(1, 3, 4))


# repeatability


@pytest.mark.parametrize("m, n, k, splits", [(384, 2048, 1024, (1, 2, 3, 4)), (1024, 8192, 8192, (2,))])
@each_kind
def test_bit_identical_from_run_to_run(kernel, dtype, m, n, k, splits):
    """Calls have the same bits, alone and beside other work on the GPU. In float32 half of the first case's rows have
    lost sums.

    W is loaded from a stage into registers, behind wgmmas that are still queued. Where the stage was given back before
    those loads had returned, some of 50 calls of the second case were wrong.
    """
    case = x, weight, _ = random_case(m, n, k, dtype)
    if dtype == torch.float32 and k == 1024:
        x[::2, ::8], weight[:, ::8] = 1e20, 0
    expected = expected_of(kernel, *case)
    other, load = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for tile in tiles(kernel, k, splits):
        first = by_tile(tile, *case)
        expected.check(first, what=f"of {tile}")
        for beside in [False] * 5 + [True] * 5:
            if beside:
                with torch.cuda.stream(other):
                    for _ in range(10):
                        load @ load
            outputs = [by_tile(tile, *case) for _ in range(10)]
            assert all(torch.equal(out, first) for out in outputs), tile


@each_kind
def test_calls_right_after_another(kernel, dtype):
    """A call begins while the one before ends, and gets its scratch; each input is overwritten right after its call.
    Of rows that are copied first, too.
    """
    for k in (512, 509):
        cases = [random_case(256, 512, k, dtype) for _ in range(4)]
        expected = [expected_of(kernel, *case) for case in cases]
        for tile in tiles(kernel, k, splits=(1, 2)):
            inputs, outputs = [torch.empty_like(t) for t in cases[0]], []
            for case in cases:
                for to, value in zip(inputs, case):
                    to.copy_(value)
                outputs.append(by_tile(tile, *inputs))
            for out, right in zip(outputs, expected):
                right.check(out, what=f"of {tile}")


# what is selected is called


@each_kind
def test_what_is_selected_is_called(kernel, dtype):
    """The operator gives the bits of the tile that select_tile names, also with a gradient, and right gradients."""
    shape, tile = a_shape_of(kernel)
    torch.set_float32_matmul_precision(PRECISIONS[kernel][1])
    x, weight, bias = case = random_case(*shape, dtype)
    assert select_kernel(*case) == kernel
    out, _ = with_z(tile, *case, -3.0)
    assert torch.equal(linear_sigmoid_residual(*case, -3.0), out)
    leaves = [t.clone().requires_grad_() for t in case]
    trained, grad = linear_sigmoid_residual(*leaves, -3.0), torch.randn_like(out)
    assert torch.equal(trained, out)
    gradients = torch.autograd.grad(trained, leaves, grad)
    expected_of(kernel, *case, -3.0, with_z=True).check_gradients(grad, gradients)
    for which in range(3):  # lazily negated: memory holds the opposite sign
        negated = [torch._neg_view(-t) if i == which else t for i, t in enumerate(case)]
        assert torch.equal(linear_sigmoid_residual(*negated, -3.0), out)
    assert select_kernel(x, weight.t().contiguous().t(), bias) == "library"
