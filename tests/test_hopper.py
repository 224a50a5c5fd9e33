"""The fused kernels for Hopper, every tile of each: shapes at the tiles' edges, strides, memory, accuracy, special
values, repeatability; and that what is selected is called.

`fused` calls a tile whatever the size. Everything is compared on the GPU with the layer in float64, whose own errors,
2^-53 relative, do not matter here.
"""

import itertools

import pytest
import torch
from conftest import needs_cuda
from reference import storage_roundoff
from tiles import FLOAT32_KINDS, KINDS, PRECISIONS, a_shape_of, name_of, tiles
from torch import nn

from bench import bindings
from bench.bindings import scratch_bytes
from model_new import ModelNew, linear_sigmoid_residual, select_kernel

pytestmark = [
    needs_cuda,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]

U = 2.0**-24  # float32's unit roundoff
DENORMAL = 2.0**-149  # the smallest float32
NAN, INF = float("nan"), float("inf")

each_kind = pytest.mark.parametrize("kernel, dtype", KINDS, ids=map(name_of, KINDS))
each_float32_kernel = pytest.mark.parametrize("kernel", [kernel for kernel, _ in FLOAT32_KINDS])


def fused(tile, x, weight, bias, scale=2.0):
    return bindings.fused(tile, x, weight, bias, scale)[0]


def fused_with_z(tile, x, weight, bias, scale=2.0):
    """(out, z); out must be what it is without z."""
    out, z = bindings.fused(tile, x, weight, bias, scale, with_z=True)
    alone = fused(tile, x, weight, bias, scale)
    assert ((out == alone) | (out.isnan() & alone.isnan())).all(), f"{tile}: out is another where z is wanted"
    return out, z


def random_case(m, n, k, dtype=torch.float32):
    """x [m, k], weight [n, k] and bias [n] on the GPU; normal, weight by 1/√k."""
    x, weight, bias = (torch.randn(shape, device="cuda") for shape in ((m, k), (n, k), (n,)))
    return x.to(dtype), (weight / k**0.5).to(dtype), bias.to(dtype)


def served_by(kernel, dtype):
    """(the tile that is selected, an x, weight and bias) for a kernel, at the precision at which it serves."""
    shape, tile = a_shape_of(kernel)
    torch.set_float32_matmul_precision(PRECISIONS[kernel][1])
    case = random_case(*shape, dtype)
    assert select_kernel(*case) == kernel
    return tile, case


def leave_nan(kernel, m, n, k, dtype):
    """In the memory that out, z and the scratch are likely to get."""
    scratch = scratch_bytes(kernel, m, n, k)
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in (m * n * dtype.itemsize,) * 2]
    blocks.append(torch.full((scratch,), 255, dtype=torch.uint8, device="cuda"))
    del blocks


class Expected:
    """z and out of the layer in float64, and how far from them a kernel's may be.

    z, relative to |x|·|W|ᵀ + |b|, with B = ⌈K/64⌉ blocks of k:
        "fp16x3"     3·2^-22          x and w as hi + lo, each to 2^-22, and lo·lo dropped
                     12·2^-23         a block's twelve wgmmas, whose sums are truncated
                     min(B, 4√B)·u    adding the blocks' sums (as reference.sum_error)
                     (splits + 1)·u   adding what the blocks of a cluster have, and the bias
        "wgmma16"    (K/16 + 8)·2^-23 a wgmma for every 16 k, whose sums are truncated; the additions behind them
        "fp16x1..."  the same and 2·2^-11 + 2^-22: x and w rounded to 11 bits
    and, for each number in fp16, 2^-39 of its row's largest: a denormal one's rounding is 2^-25, and the largest is in
    [2^14, 2^15). "fp16x1" has the largest |w| in [2^12, 2^15): 2^-37.
    out: as in reference.Layer. 16-bit: from z before it is rounded; exp(-z) is off by up to |z|·2u more.
    """

    def __init__(self, x, weight, bias, scale=2.0):
        self.scale, self.dtype, self.k, self.shape = scale, x.dtype, x.shape[-1], (*x.shape[:-1], len(weight))
        x, weight, bias = x.double().reshape(-1, self.k), weight.double(), bias.double()
        self.z = x @ weight.T + bias
        self.sigmoid = torch.sigmoid(self.z)
        self.out = self.z + scale * self.sigmoid
        x, weight = x.abs(), weight.abs()
        self.magnitude = x @ weight.T + bias.abs()
        self.x_floor = 2.0**-39 * x.amax(1)[:, None] * weight.sum(1)
        self.w_floor = 2.0**-39 * x.sum(1)[:, None] * weight.amax(1)

    def _z_bound(self, kernel, splits):
        """Before any rounding to 16 bits."""
        relative, floor = (self.k / 16 + 8) * 2.0**-23, 4 * DENORMAL
        if kernel == "fp16x3":
            blocks = -(-self.k // 64)
            relative = 3 * 2.0**-22 + 12 * 2.0**-23 + (min(blocks, 4 * blocks**0.5) + splits + 1) * U
            floor = floor + self.x_floor + self.w_floor
        elif kernel != "wgmma16":
            relative += 2 * 2.0**-11 + 2.0**-22
            floor = floor + self.x_floor + 4 * self.w_floor
        return relative * self.magnitude + floor

    def check(self, tile, out, z=None):
        """Asserts that a tile's results are within their bounds."""
        kernel, _, splits = tile
        z_bound, of_sigmoid = self._z_bound(kernel, splits), 10.0
        if kernel == "wgmma16":
            of_sigmoid = of_sigmoid + 2 * self.z.abs() * (1 - self.sigmoid)
        bound = (1 + abs(self.scale) / 4) * z_bound
        bound += of_sigmoid * U * abs(self.scale) * self.sigmoid + U * self.out.abs()
        self._assert_within(f"out of {tile}", out, self.out, bound)
        if z is not None:
            self._assert_within(f"z of {tile}", z, self.z, z_bound)

    def _assert_within(self, what, actual, exact, bound):
        what = f"{what}, M, N, K = {len(exact)}, {self.shape[-1]}, {self.k}"
        assert actual.dtype == self.dtype and actual.shape == self.shape and actual.is_contiguous(), what
        rounding = storage_roundoff(self.dtype)
        if rounding:
            smallest = torch.finfo(self.dtype).tiny * torch.finfo(self.dtype).eps
            bound = bound + rounding * (exact.abs() + bound) + smallest
        actual = actual.double().reshape(exact.shape)
        error = (actual - exact).abs()
        good = error <= bound  # false for NaN
        if not good.all():
            at = (error / bound).nan_to_num(nan=torch.inf).argmax().item()
            m, n = divmod(at, exact.shape[1])
            raise AssertionError(
                f"{what}: {(~good).sum().item()} of {good.numel()} elements are outside their bound; worst at "
                f"({m}, {n}): {actual[m, n].item()!r}, expected {exact[m, n].item()!r} to {bound[m, n].item():.3g}"
            )


def check_all_tiles(m, n, k, kernel, dtype, **splits):
    """splits: as of `tiles`. The memory that out, z and the scratch are likely to get is NaN before."""
    case = random_case(m, n, k, dtype)
    expected = Expected(*case)
    for tile in tiles(kernel, k, **splits):
        leave_nan(kernel, m, n, k, dtype)
        expected.check(tile, *fused_with_z(tile, *case))


# shapes and memory

# Every M with every N and every K, and every N with every K.
EDGES_M = (1, 15, 16, 17, 127, 128, 129, 130, 255, 256, 257, 300)
EDGES_N = (1, 7, 127, 128, 129, 130, 255, 256, 257, 300)
EDGES_K = (1, 3, 7, 8, 60, 64, 68, 515, 1000)


@pytest.mark.parametrize("m", EDGES_M)
@each_kind
def test_edges(kernel, dtype, m):
    """All tiles: rows, columns and blocks of k are full, partly full or missing; blocks of a cluster have unequal parts
    of K, or no rows to add up.
    """
    for j, n in enumerate(EDGES_N):
        check_all_tiles(m, n, EDGES_K[(EDGES_M.index(m) + j) % len(EDGES_K)], kernel, dtype)


# M, N, K with more tiles than run at once: 132 blocks, in pairs that have 256 columns or 512 rows. The last tile of a
# pair and the last group of tiles (of 1024 rows) are full, partly full or missing.
MANY_TILES = [
    (1024, 4400, 8196),  # rows that the converting kernel does not hold in registers
    (1025, 4101, 68),
    (1153, 4600, 515),
    (1300, 4000, 4),
    (2049, 2100, 200),
    (2304, 4608, 64),
    (300, 17000, 72),
]


@pytest.mark.parametrize("m, n, k", MANY_TILES)
@each_kind
def test_more_tiles_than_run_at_once(kernel, dtype, m, n, k):
    check_all_tiles(m, n, k, kernel, dtype, splits=(1, 4))


@pytest.mark.parametrize("m, n, k", [(5, 7, 8192), (300, 257, 8199), (17, 130, 16500)])
@each_kind
def test_long_sums(kernel, dtype, m, n, k):
    """Of rows about and beyond what the converting and the padding kernel take at once."""
    check_all_tiles(m, n, k, kernel, dtype, splits=(1, 3))


@pytest.mark.parametrize("k", [64, 130, 600])
@each_kind
def test_tiles_that_there_are_not(kernel, dtype, k):
    """Are refused, and there are all those that `tiles` names."""
    case = random_case(33, 40, k, dtype)
    expected = Expected(*case)
    for tile in itertools.product([kernel], (0, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512), range(-1, 10)):
        if tile in tiles(kernel, k):
            expected.check(tile, fused(tile, *case))
        else:
            with pytest.raises(RuntimeError, match="linear_hopper failed: CUDA error 1"):
                launch_with_guarded_scratch(tile, *case, *(torch.empty(33, 40, dtype=dtype, device="cuda"),) * 2)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 0, 64), (2, 3, 50, 64), (1, 1, 64)], ids=str)
@each_kind
def test_x_of_any_dimension(kernel, dtype, shape):
    """An x without rows is select_kernel's business."""
    _, weight, bias = random_case(1, 130, 64, dtype)
    x = torch.randn(shape, device="cuda").to(dtype)
    if x.numel() == 0:
        assert select_kernel(x, weight, bias) == "library"
        assert linear_sigmoid_residual(x, weight, bias, 2.0).shape == (*shape[:-1], 130)
        return
    for tile in tiles(kernel, 64):
        Expected(x, weight, bias).check(tile, *fused_with_z(tile, x, weight, bias))


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e3])
@each_kind
def test_scale(kernel, dtype, scale):
    case = random_case(130, 260, 200, dtype)
    for tile in tiles(kernel, 200, splits=(2,)):
        Expected(*case, scale).check(tile, *fused_with_z(tile, *case, scale))


GUARD = 64  # elements before and behind


def surrounded(t, stride, offset, value):
    """A copy of a matrix or vector t, `stride` from row to row, in the middle of memory that holds `value`."""
    whole = torch.full((GUARD + offset + len(t) * stride + GUARD,), value, dtype=t.dtype, device="cuda")
    return whole.as_strided(t.shape, (stride, 1)[-t.dim() :], GUARD + offset).copy_(t)


def launch_with_guarded_scratch(tile, x, weight, bias, out, z):
    """A tile's launch on these tensors as they are; its scratch is NaN, between bytes that are looked at afterwards."""
    kernel, *shape = tile
    sizes = len(x), *weight.shape
    between = scratch_bytes(kernel, *sizes)
    scratch = torch.full((1024 + between + 1024,), 255, dtype=torch.uint8, device="cuda")  # NaN, in any type
    tensors = x, weight, bias, out, z, scratch[1024:]
    numbers = x.stride(0), weight.stride(0), *sizes, 2.0, bindings.dtype_number(x.dtype)
    bindings.launch("linear_hopper", *tensors, *numbers, bindings.KERNELS.index(kernel), False, *shape)
    assert (scratch[:1024] == 255).all() and (scratch[-1024:] == 255).all(), tile


class Guarded:
    """Memory for a matrix, NaN, in the middle of a block whose ends are looked at afterwards."""

    def __init__(self, rows, cols, dtype, offset):
        self.block = torch.full((GUARD + offset + rows * cols + GUARD,), -7.0, dtype=dtype, device="cuda")
        self.before, inside, self.behind = self.block.split((GUARD + offset, rows * cols, GUARD))
        self.inside = inside.view(rows, cols).fill_(NAN)

    def is_untouched_outside(self):
        return bool((self.before == -7).all() and (self.behind == -7).all())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 1, 8),
        (7, 9, 64),
        (300, 1, 72),
        (129, 130, 200),
        (257, 127, 136),
        (128, 520, 1000),
        (130, 200, 8200),
        (1300, 3001, 72),
    ],
)
@each_kind
def test_nothing_outside_is_read_or_written(kernel, dtype, m, n, k, offset):
    """x, W and bias lie in other numbers, between their rows too; out, z and the scratch in the middle of blocks whose
    ends are looked at afterwards. out and z need no more than 4 bytes of alignment (offset 1).

    The other numbers are NaN in 16 bits. In float32 an element that is NaN would be computed again, and be right then:
    they are 1e15, whose products are finite, and which in a row's scale leaves nothing of the row's own numbers.
    """
    case = random_case(m, n, k, dtype)
    expected = Expected(*case)
    value, stride = 1e15 if dtype == torch.float32 else NAN, k + 8
    x, weight = (surrounded(t, stride, 0, value) for t in case[:2])
    bias = surrounded(case[2], 1, offset, value)
    for tile in tiles(kernel, k, splits=(1, 3)):
        out, z = (Guarded(m, n, dtype, offset * 4 // dtype.itemsize) for _ in range(2))
        launch_with_guarded_scratch(tile, x, weight, bias, out.inside, z.inside)
        expected.check(tile, out.inside, z.inside)
        assert out.is_untouched_outside() and z.is_untouched_outside(), tile


@pytest.mark.parametrize("m", [200, 600])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_boxes_hold_what_is_stored_in_pairs(dtype, m):
    """By TMA, where rows of out and z begin at multiples of 16 bytes. In tiles that are whole, and not."""
    x, weight, _ = random_case(m, 520, 200, dtype)
    case = x, weight, torch.linspace(-120, 120, 520, device="cuda").to(dtype)
    tile, stored = ("wgmma16", 256, 0), []
    for offset in (0, 2):
        out, z = (Guarded(m, 520, dtype, offset) for _ in range(2))
        assert (out.inside.data_ptr() % 16 == 0) == (offset == 0)
        launch_with_guarded_scratch(tile, *case, out.inside, z.inside)
        Expected(*case).check(tile, out.inside, z.inside)
        assert out.is_untouched_outside() and z.is_untouched_outside()
        stored.append((out.inside, z.inside))
    assert all(torch.equal(*both) for both in zip(*stored))


@each_kind
def test_a_row_does_not_depend_on_the_others(kernel, dtype):
    """Bit for bit, whether the last tile is whole, begins within the one before, or has copies of the last row."""
    x, weight, bias = random_case(700, 520, 200, dtype)
    for tile in tiles(kernel, 200, splits=(1, 3)):
        out = fused(tile, x, weight, bias)
        for m in (1, 129, 255, 257, 300, 513, 699):
            assert torch.equal(fused(tile, x[:m], weight, bias), out[:m]), (tile, m)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_are_padded_with_zeros(dtype, extra, offset):
    """Rows that begin anywhere and are followed by NaN. More of them, and longer ones, than a block takes."""
    multiple = 16 // dtype.itemsize
    for rows, k in [(1, 1), (3, 7), (2, 8), (300, 60), (5, 2047), (4, 4097), (2, 8199)]:
        contents = torch.randn(rows, k, device="cuda").to(dtype)
        t = surrounded(contents, k + extra, offset, NAN)
        padded = -(-k // multiple) * multiple
        to = Guarded(rows, padded, dtype, 16 // dtype.itemsize)
        numbers = t.stride(0), rows, k, padded, dtype.itemsize
        bindings.launch("pad_rows", t, to.inside, *numbers)
        expected = nn.functional.pad(contents, (0, padded - k))
        assert torch.equal(to.inside, expected), (rows, k)
        assert to.is_untouched_outside(), (rows, k)


def _in_wider_rows(t, extra):
    wide = torch.full((len(t), t.shape[1] + extra), NAN, dtype=t.dtype, device="cuda")
    return wide[:, : t.shape[1]].copy_(t)


def _misaligned(t):
    return torch.full((t.numel() + 1,), NAN, dtype=t.dtype, device="cuda")[1:].view(t.shape).copy_(t)


def _permuted(x):
    """x of three dimensions, the first two not in the order of its memory."""
    return x.view(13, 10, -1).transpose(0, 1).contiguous().transpose(0, 1)


STRIDES = {
    "x in wider rows": lambda x, w, b: (_in_wider_rows(x, 16), w, b),
    "x in wider rows of odd length": lambda x, w, b: (_in_wider_rows(x, 3), w, b),
    "x transposed": lambda x, w, b: (x.t().contiguous().t(), w, b),
    "x misaligned": lambda x, w, b: (_misaligned(x), w, b),
    "x every other row": lambda x, w, b: (x.repeat_interleave(2, 0)[::2], w, b),
    "x every other column": lambda x, w, b: (x.repeat_interleave(2, 1)[:, ::2], w, b),
    "x of three dimensions, permuted": lambda x, w, b: (_permuted(x), w, b),
    "W in wider rows": lambda x, w, b: (x, _in_wider_rows(w, 8), b),
    "W in wider rows of odd length": lambda x, w, b: (x, _in_wider_rows(w, 1), b),
    "W misaligned": lambda x, w, b: (x, _misaligned(w), b),
    "W every other row": lambda x, w, b: (x, w.repeat_interleave(2, 0)[::2], b),
    "x and W misaligned": lambda x, w, b: (_misaligned(x), _misaligned(w), b),
    "bias every other": lambda x, w, b: (x, w, b.repeat_interleave(2)[::2]),
    "bias misaligned": lambda x, w, b: (x, w, _misaligned(b)),
}


@pytest.mark.parametrize("how", STRIDES)
@each_kind
def test_strides(kernel, dtype, how):
    """Bit for bit as from contiguous tensors, which are right. With rows in multiples of 16 bytes, and not."""
    for k in (200, 203):
        case = random_case(130, 260, k, dtype)
        expected, other = Expected(*case), STRIDES[how](*case)
        for tile in tiles(kernel, k, splits=(2,)):
            out = fused(tile, *case)
            expected.check(tile, out)
            assert torch.equal(fused(tile, *other).reshape(130, 260), out), (tile, k)


@pytest.mark.parametrize("which", range(3))
@each_kind
def test_a_lazily_negated_tensor(kernel, dtype, which):
    """Its memory holds the opposite sign."""
    tile, case = served_by(kernel, dtype)
    negated, case = list(case), list(case)
    negated[which] = torch._neg_view(case[which])
    assert select_kernel(*negated) == kernel
    case[which] = -case[which]
    assert torch.equal(linear_sigmoid_residual(*negated, 2.0), fused(tile, *case))


@each_kind
def test_equal_rows(kernel, dtype):
    """Stride 0 between the rows of x, or of W."""
    x, weight, bias = random_case(1, 260, 200, dtype)
    for case in ((x.expand(130, 200), weight, bias), (weight, x.expand(130, 200), bias[:1].expand(130))):
        expected = Expected(*case)
        for tile in tiles(kernel, 200, splits=(2,)):
            out = fused(tile, *case)
            expected.check(tile, out)
            if case[0].stride(0) == 0:
                assert torch.equal(out, out[:1].expand_as(out)), tile
            else:
                assert torch.equal(out, out[:, :1].expand_as(out)), tile


# accuracy


def _normal(*shape):
    return torch.randn(shape, device="cuda")


def _uniform(*shape):
    return torch.rand(shape, device="cuda")


def _wide_range(*shape):
    return _normal(*shape) * 10 ** (12 * _uniform(*shape) - 6)


def _uniform_and_init(m, n, k):
    return _uniform(m, k), (2 * _uniform(n, k) - 1) / k**0.5


def _large_columns(m, n, k):
    x = _normal(m, k)
    x[:, torch.randperm(k, device="cuda")[:8]] *= 1000
    return x, _normal(n, k)


def _cancelling_halves(m, n, k):
    x, weight = _normal(m, k // 2), _normal(n, k // 2)
    return torch.cat([x, x], 1), torch.cat([weight, -weight * (1 + 1e-4 * _normal(n, k // 2))], 1)


def _large_where_w_is_tiny(m, n, k):
    x, weight = _normal(m, k), _normal(n, k)
    weight[:, :32] = 1e-7
    x[:, :32] = 0
    x[torch.arange(m, device="cuda"), torch.arange(m, device="cuda") % 32] = 3e4
    return x, weight


def _places(m, k, count):
    """`count` different columns for each of m rows."""
    return torch.stack([torch.randperm(k, device="cuda")[:count] for _ in range(m)])


def _outliers(m, n, k, count, large, w_there):
    """`count` entries ±large in each row of x, in columns where w is `w_there` (None: as elsewhere)."""
    x, weight = _normal(m, k), _normal(n, k)
    places = _places(m, 64, count)  # within the first 64 columns, so that most columns of W stay as they are
    x.scatter_(1, places, large * torch.randn(places.shape, device="cuda").sign())
    if w_there is not None:
        weight[:, :64] = w_there
    return x, weight


def _graded(m, n, k, powers, size_of_w=1.0):
    """Columns of x by powers of two, of W by their inverses."""
    grade = 2.0 ** powers(torch.arange(k, device="cuda"))
    return _normal(m, k) * grade, size_of_w * (_normal(n, k) / grade)


def _large_w_where_x_is_0(m, n, k, large):
    x, weight = _normal(m, k), _normal(n, k)
    x[:, ::64] = 0
    weight[:, ::64] *= large
    return x, weight


def _few_nonzero(m, n, k, count):
    places = _places(m, k, count)
    x = torch.zeros(m, k, device="cuda").scatter_(1, places, torch.randn(places.shape, device="cuda"))
    return x, _normal(n, k)


DATA = {
    "uniform, Linear's init": _uniform_and_init,
    "normal": lambda m, n, k: (_normal(m, k), _normal(n, k)),
    "positive": lambda m, n, k: (_uniform(m, k), _uniform(n, k)),
    "8 columns of x times 1000": _large_columns,
    "12 orders of magnitude": lambda m, n, k: (_wide_range(m, k), _wide_range(n, k)),
    "cancelling halves": _cancelling_halves,
    "1e-18": lambda m, n, k: (_normal(m, k) * 1e-18, _normal(n, k) * 1e-18),
    "1e15": lambda m, n, k: (_normal(m, k) * 1e15, _normal(n, k) * 1e15),
    "3e4 in x where w is 1e-7": _large_where_w_is_tiny,
    "one 1e8 in each row of x where w is 0": lambda m, n, k: _outliers(m, n, k, 1, 1e8, 0.0),
    "eight 1e20 in each row of x where w is 1e-20": lambda m, n, k: _outliers(m, n, k, 8, 1e20, 1e-20),
    "one 1e8 in each row of x, w as elsewhere": lambda m, n, k: _outliers(m, n, k, 1, 1e8, None),
    "nine 1e6 in each row of x where w is 0": lambda m, n, k: _outliers(m, n, k, 9, 1e6, 0.0),
    "nine 1e20 in each row of x where w is 0": lambda m, n, k: _outliers(m, n, k, 9, 1e20, 0.0),
    "columns 2^0 to 2^-40, W inverse": lambda m, n, k: _graded(m, n, k, lambda i: -40 * i / k),
    "columns 2^-(k mod 32), W inverse": lambda m, n, k: _graded(m, n, k, lambda i: -(i % 32.0)),
    "the same, W small": lambda m, n, k: _graded(m, n, k, lambda i: -(i % 32.0), 1e-9),
    "every 64th w times 1e6 where x is 0": lambda m, n, k: _large_w_where_x_is_0(m, n, k, 1e6),
    "every 64th w times 1e9 where x is 0": lambda m, n, k: _large_w_where_x_is_0(m, n, k, 1e9),
    "one nonzero in each row of x": lambda m, n, k: _few_nonzero(m, n, k, 1),
    "eight nonzeros in each row of x": lambda m, n, k: _few_nonzero(m, n, k, 8),
}


def product_of(tile):
    """x·Wᵀ by a tile: b = 0, s = 0."""
    return lambda x, weight: fused(tile, x, weight, weight.new_zeros(len(weight)), 0.0)


def _errors(product, x, weight):
    """‖out − ref‖ / ‖ref‖ and max |out − ref| / (|x|·|W|ᵀ) of each of the functions of a dict."""
    reference = x.double() @ weight.double().T
    magnitude = (x.double().abs() @ weight.double().abs().T).clamp_min_(1e-300)
    errors = {}
    for name, function in product.items():
        difference = function(x, weight).double().sub_(reference)
        frobenius = (difference.norm() / reference.norm()).item()
        errors[name] = frobenius, (difference.abs_() / magnitude).max().item()
    return errors


def is_as_accurate_as_librarys(shapes_of_tiles, kernel, x, weight):
    """The products alone. "fp16x3": both errors are SGEMM's or less. "fp16x1": as cuBLAS' with TF32, which rounds to 11
    bits too: to 1.02 in the Frobenius norm, to 1.25 in the one worst element.
    """
    torch.set_float32_matmul_precision(PRECISIONS[kernel][1])
    products = {(kernel, *shape): product_of((kernel, *shape)) for shape in shapes_of_tiles}
    errors = _errors({"library": nn.functional.linear, **products}, x, weight)
    frobenius, componentwise = errors.pop("library")
    text = [f"library: Frobenius {frobenius:.2e}, componentwise {componentwise:.2e}"]
    text = "; ".join(text + [f"{tile}: {a:.2e}, {b:.2e}" for tile, (a, b) in errors.items()])
    print(text)
    allowed = (1.0, 1.0) if kernel == "fp16x3" else (1.02, 1.25)
    good = [a <= allowed[0] * frobenius and b <= allowed[1] * componentwise for a, b in errors.values()]
    assert all(good), text


TILES_COMPARED = {
    "fp16x3": [(256, 0), (128, 0), (128, 1), (64, 2), (32, 3), (16, 4)],
    "fp16x1": [(256, 0), (128, 1), (64, 2), (32, 3), (16, 4)],
    "fp16x1_staged": [(256, 0)],
}


@pytest.mark.parametrize("data", DATA)
@each_float32_kernel
def test_accuracy_is_the_librarys_or_better(kernel, data):
    """On the reference shape, which is large enough for cuBLAS not to split K."""
    is_as_accurate_as_librarys(TILES_COMPARED[kernel], kernel, *DATA[data](1024, 8192, 8192))


@pytest.mark.parametrize("large_x", [1e6, 1e20])
@pytest.mark.parametrize("large_w", [1.0, 1e9])
@each_float32_kernel
def test_lost_sums_in_some_rows_and_columns(kernel, large_x, large_w):
    """In every other row of x, in every third group of 16 rows of W: sums that have lost their bits beside others."""
    x, weight, bias = random_case(260, 300, 1000)
    x[:, ::50], weight[:, ::50], weight[:, 7::64] = 0, 0, 0
    x[::2, ::50] = large_x
    some = (torch.arange(300, device="cuda") // 16 % 3 == 0)[:, None]
    x[:, 7::64] = 0
    weight[:, 7::64] = large_w * some
    reference, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    for tile in tiles(kernel, 1000, splits=(1, 3, 4)):
        _, z = fused_with_z(tile, x, weight, bias)
        relative = 1e-6 if kernel == "fp16x3" else 2.0**-10
        error = (z.double() - reference - bias.double()).abs() - U * (magnitude + bias.double().abs())
        assert (error <= relative * magnitude).all(), (tile, (error / magnitude).max().item())


@each_float32_kernel
def test_sums_that_are_0_stay_0(kernel):
    """x and W share no columns, or W or x is 0: nothing is lost there, whatever else is large or small."""
    x, weight, bias = random_case(260, 300, 1000)
    x[:, ::2], weight[:, 1::2] = 0, 0
    x[3], weight[5] = 0, 0
    x[::4, 1] = 1e30
    for tile in tiles(kernel, 1000, splits=(1, 3, 4)):
        _, z = fused_with_z(tile, x, weight, bias)
        assert torch.equal(z, bias.expand_as(z)), tile


def test_accuracy_on_a_smaller_shape():
    is_as_accurate_as_librarys(TILES_COMPARED["fp16x3"], "fp16x3", *_uniform_and_init(512, 1024, 8192))


@pytest.mark.parametrize("count", [7, 8, 9])
@pytest.mark.parametrize("k", [1000, 16384])
@each_float32_kernel
def test_outliers(kernel, k, count):
    """Up to eight entries of a row are multiplied apart, at no loss. Nine are not, but at 2^17 times the others
    they stay within the scheme's bound. K beyond 8192: the row is read several times.
    """
    x, weight = _outliers(260, 300, k, count, 2.0**17, None)
    case = x, weight, weight.new_zeros(300)
    expected = Expected(*case)
    for tile in tiles(kernel, k, splits=(1, 3)):
        expected.check(tile, *fused_with_z(tile, *case))
    if kernel == "fp16x3" and count <= 8:
        is_as_accurate_as_librarys([(256, 0), (128, 0)], kernel, x, weight)


ROWS_OF_W = {  # what a block of 64 k is multiplied by
    "growing": lambda block: 2.0**block,
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
    x, weight, bias = random_case(130, 260, 1000)
    factors = torch.tensor([ROWS_OF_W[how](k // 64) for k in range(1000)], dtype=torch.float32, device="cuda")
    weight[:100] *= factors
    weight[150] *= factors.flip(0)
    case = x, weight, bias
    expected = Expected(*case)
    for tile in tiles(kernel, 1000, splits=(1, 3, 4)):
        expected.check(tile, *fused_with_z(tile, *case))


# special values


class Eager:
    """NaN and ±Inf where eager has them, and its finite values. The three are not the same as float64's: overflow."""

    def __init__(self, x, weight, bias):
        self.case, self.z = (x, weight, bias), nn.functional.linear(x, weight, bias)
        self.out = torch.sigmoid(self.z) * 2.0 + self.z
        self.magnitude = x.double().abs() @ weight.double().abs().T + bias.double().abs() + 2

    def check(self, tile):
        """Asserts that a tile has them, in z too, and returns its out."""
        out, z = fused_with_z(tile, *self.case)
        relative = {"fp16x3": 1e-5, "wgmma16": 4 * torch.finfo(out.dtype).eps}.get(tile[0], 1.2e-3)
        for name, actual, expected in (("out", out, self.out), ("z", z, self.z)):
            what = f"{name} of {tile}"
            assert torch.equal(actual.isnan(), expected.isnan()), f"NaN in {what}"
            for value in (INF, -INF):
                assert torch.equal(actual == value, expected == value), f"{value} in {what}"
            error = (actual.double() - expected.double()).abs()
            assert (error <= relative * self.magnitude)[expected.isfinite()].all(), what
        return out


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "W", "b"])
@each_kind
def test_one_special_value(kernel, dtype, where, value):
    """It stays in its row, or in its column: the others are, bit for bit, what they were."""
    for m, n, k in [(130, 140, 200), (300, 520, 1000), (600, 700, 131)]:
        case = x, weight, bias = random_case(m, n, k, dtype)
        some = tiles(kernel, k, splits=(1, 3))
        clean = [fused(tile, *case) for tile in some]
        tensor = {"x": x, "W": weight, "b": bias}[where]
        at = tensor.shape[0] - 2, *([k - 3] if tensor.dim() == 2 else [])
        tensor[at] = value
        expected = Eager(*case)
        same = torch.ones(m, n, dtype=torch.bool, device="cuda")
        (same if where == "x" else same.T)[at[0]] = False
        for tile, before in zip(some, clean):
            out = expected.check(tile)
            assert torch.equal(out[same], before[same]), tile
            assert not out[~same].isfinite().any(), tile


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x, beside an outlier", "W, where x has an outlier"])
@each_float32_kernel
def test_special_values_and_outliers(kernel, where, value):
    case = x, weight, _ = random_case(130, 140, 8200)
    x[:, 5] = 1e8
    some = tiles(kernel, 8200, splits=(1, 3))
    clean = [fused(tile, *case) for tile in some]
    tensor = x if where.startswith("x") else weight
    tensor[3, 8196 if where.startswith("x") else 5] = value
    expected = Eager(*case)
    changed = torch.zeros(130, 140, dtype=torch.bool, device="cuda")
    (changed if where.startswith("x") else changed.T)[3] = True
    for tile, before in zip(some, clean):
        out = expected.check(tile)
        assert torch.equal(out[~changed], before[~changed]) and not out[changed].isfinite().any(), tile


@each_kind
def test_special_values_in_many_tiles(kernel, dtype):
    """Elements are computed again, and the next tile after them."""
    case = x, weight, _ = random_case(1300, 4000, 68, dtype)
    x[::7, 3], x[5, 60], weight[::50, 2], weight[3999, 67] = NAN, -INF, INF, NAN
    expected = Eager(*case)
    for tile in tiles(kernel, 68, splits=(1,)):
        expected.check(tile)


ALL = slice(None)


def _set(tensor, value, *places):
    for at in places:
        tensor[at] = value


# In any type.
SPECIALS = {
    "Inf times 0": lambda x, w, b: (_set(x, INF, (3, 5)), _set(w[:9], 0.0, (ALL, 5))),
    "0 times Inf": lambda x, w, b: (_set(x[:9], 0.0, (ALL, 5)), _set(w, -INF, (3, 5))),
    "0 times NaN": lambda x, w, b: (_set(x[:9], 0.0, (ALL, 5)), _set(w, NAN, (3, 5))),
    "Inf - Inf in x": lambda x, w, b: (
        _set(x, INF, (3, 5), (3, 150), (4, 5)),
        _set(x, -INF, (4, 150)),
        _set(w, 1.0, (ALL, 5)),
        _set(w, -1.0, (ALL, 150)),
    ),
    "Inf in x and in W": lambda x, w, b: (_set(x, INF, (3, 5)), _set(w, INF, (7, 9)), _set(w, -INF, (8, 5))),
    "Inf - Inf with b": lambda x, w, b: (_set(x, INF, (3, 5)), _set(b[::2], -INF, ALL)),
    "a row of Inf": lambda x, w, b: _set(x, INF, 3),
    "many rows with Inf": lambda x, w, b: (_set(x[:60], INF, (ALL, 5)), _set(x[60:120], -INF, (ALL, 5))),
    "many rows of W with Inf": lambda x, w, b: _set(w[3:131], -INF, (ALL, 5)),
    "a NaN in every row": lambda x, w, b: _set(x, NAN, (ALL, 7)),
    "x is NaN": lambda x, w, b: x.fill_(NAN),
    "W is NaN": lambda x, w, b: w.fill_(NAN),
    "x is Inf": lambda x, w, b: (x.fill_(INF), w.abs_()),
    "rows of zeros": lambda x, w, b: (_set(x, 0.0, 3, 129), _set(w, 0.0, 7)),
    "x is zero": lambda x, w, b: x.zero_(),
    "W is zero": lambda x, w, b: w.zero_(),
    "minus zero": lambda x, w, b: (_set(x, -0.0, 3), _set(w, -0.0, 7), _set(b[:9], -0.0, ALL)),
}

# In float32.
OVERFLOWS = {
    # One overflow in a sum: whichever the order of the terms, the sum is Inf.
    "a product overflows": lambda x, w, b: (_set(x, 1e30, (3, 5)), _set(x, -1e30, (4, 5)), _set(w, 1e30, (ALL, 5))),
    "the sum overflows": lambda x, w, b: (_set(x, 1e37, 3), w.abs_().add_(1)),
    "the bias overflows": lambda x, w, b: (_set(x[3, :8], 4e37, ALL), _set(w[:, :8], 1.0, ALL), b.fill_(3e38)),
    "the largest float32": lambda x, w, b: (_set(x, torch.finfo().max, (3, 5)), _set(w, 0.5, (ALL, 5))),
    # Finite for eager, but not where x is scaled up to 2^14.
    "large x": lambda x, w, b: x.mul_(1e37).clamp_(-1e37, 1e37),
    "large W": lambda x, w, b: (w.mul_(1e37), x.mul_(0.1)),
    "one large row of W": lambda x, w, b: (w[3].mul_(1e38), x.mul_(0.1)),
}


def check_specials(specials, what, kernel, dtype):
    for m, n, k in [(130, 140, 200), (300, 260, 203)]:
        case = x, weight, bias = random_case(m, n, k, dtype)
        specials[what](*case)
        expected = Eager(*case)
        zeros = (x == 0).all(1)[:, None] | (weight == 0).all(1)
        # Where there is nothing to add, out is the bias' own.
        alone = (bias.float() + 2 * torch.sigmoid(bias.float())).expand(m, n)[zeros]
        rtol, atol = (1e-6, 3e-7) if dtype == torch.float32 else (1.1 * storage_roundoff(dtype), 1e-6)
        for tile in tiles(kernel, k, splits=(1, 3)):
            out = expected.check(tile)
            assert torch.allclose(out[zeros].float(), alone, rtol, atol, equal_nan=True), tile


@pytest.mark.parametrize("what", SPECIALS)
@each_kind
def test_special_values_are_eagers(kernel, dtype, what):
    check_specials(SPECIALS, what, kernel, dtype)


@pytest.mark.parametrize("what", OVERFLOWS)
@each_float32_kernel
def test_overflows_are_eagers(kernel, what):
    check_specials(OVERFLOWS, what, kernel, torch.float32)


@each_float32_kernel
def test_products_that_overflow_both_ways(kernel):
    """Eager has NaN or Inf, which of them depends on the order of the terms. A number would be one made of some."""
    for m, n, k in [(130, 140, 200), (300, 260, 515)]:
        case = x, weight, _ = random_case(m, n, k)
        x *= 1e25
        weight *= 1e20
        x, weight = x.double(), weight.double()
        not_finite = (x @ weight.T).abs() > 0.01 * (x.abs() @ weight.abs().T)  # by far
        assert not nn.functional.linear(*case)[not_finite].isfinite().any()
        for tile in tiles(kernel, k, splits=(1, 3, 4)):
            for result in fused_with_z(tile, *case):
                assert not result[not_finite].isfinite().any(), tile


@pytest.mark.parametrize("which", ["x", "W", "some of x", "some of W"])
@each_float32_kernel
def test_denormal_inputs(kernel, which):
    """Not flushed to zero: within 4 denormal ulps, and the kernel's relative error, of float64."""
    x, weight, _ = random_case(130, 140, 128)
    tensor, rows = (x if which.endswith("x") else weight), slice(0, 64 if which.startswith("some") else None)
    tensor[rows] *= 1e-40
    assert ((tensor != 0) & (tensor.abs() < torch.finfo().tiny)).any()
    expected = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    for tile in tiles(kernel, 128, splits=(1, 2)):
        out = product_of(tile)(x, weight).double()
        bound = 4 * DENORMAL + (2e-6 if kernel == "fp16x3" else 1.1e-3) * magnitude
        assert ((out - expected).abs() <= bound).all(), tile
        assert (out[expected.abs() > 1e-41] != 0).all(), tile


def test_denormal_float16_inputs():
    """The tensor cores multiply them as they are. The products alone: a bias would hide them."""
    x, weight, bias = random_case(130, 140, 200, torch.float16)
    x[:64] *= 2.0**-16
    weight[70:] *= 2.0**-14
    assert ((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).any()
    case = x, weight, torch.zeros_like(bias), 0.0
    expected = Expected(*case)
    for tile in tiles("wgmma16", 200, splits=(1, 3)):
        expected.check(tile, *fused_with_z(tile, *case))


# repeatability, state, streams


@each_kind
def test_bit_identical_from_run_to_run(kernel, dtype):
    """Alone, and beside other work on the GPU; in float32 half of the rows have outliers."""
    case = random_case(384, 2048, 1024, dtype)
    if dtype == torch.float32:
        case[0][::2].scatter_(1, _places(192, 1024, 8), 1e6)
    expected = Expected(*case)
    other, load = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for tile in tiles(kernel, 1024, splits=(1, 2, 3, 4)):
        first = fused(tile, *case)
        expected.check(tile, first)
        assert all(torch.equal(fused(tile, *case), first) for _ in range(10)), tile
        outputs = []
        for _ in range(10):
            with torch.cuda.stream(other):
                load @ load
                load + load
            outputs.append(fused(tile, *case))
        torch.cuda.synchronize()
        assert all(torch.equal(out, first) for out in outputs), tile


@pytest.mark.parametrize(
    "tile", [("fp16x1", 128, 2), ("fp16x1", 256, 0), ("fp16x3", 128, 2), ("fp16x3", 256, 0)], ids=str
)
def test_no_stage_of_w_is_given_back_too_early(tile):
    """W is loaded from a stage into registers, behind wgmmas that are still queued. Where the stage was given back
    before those loads had returned, some of 50 calls of this size were wrong.
    """
    case = random_case(1024, 8192, 8192)
    first = fused(tile, *case)
    assert all(torch.equal(fused(tile, *case), first) for _ in range(50))
    Expected(*case).check(tile, first)


@each_kind
def test_calls_right_after_another(kernel, dtype):
    """A call begins while the one before ends, and gets its scratch; each input is overwritten right after its call.
    Of rows that are copied first, too.
    """
    for k in (512, 509):
        cases = [random_case(256, 512, k, dtype) for _ in range(4)]
        expected = [Expected(*case) for case in cases]
        for tile in tiles(kernel, k, splits=(1, 2)):
            x, weight, bias = (torch.empty_like(t) for t in cases[0])
            outputs = []
            for case in cases:
                for to, value in zip((x, weight, bias), case):
                    to.copy_(value)
                outputs.append(fused(tile, x, weight, bias))
            for out, right in zip(outputs, expected):
                right.check(tile, out)


def _module(kernel, dtype):
    """(the tile that is selected, a ModelNew, an x)"""
    tile, (x, weight, _) = served_by(kernel, dtype)
    with torch.device("cuda"):
        model = ModelNew(x.shape[1], len(weight), 2.0).to(dtype)
    assert select_kernel(x, model.gemm.weight) == tile[0]
    return tile, model, x


@each_kind
@torch.no_grad()
def test_changed_weights_are_seen(kernel, dtype):
    tile, model, x = _module(kernel, dtype)
    weight, bias = model.gemm.weight, model.gemm.bias
    other = {name: torch.randn_like(t) / 32 for name, t in model.state_dict().items()}
    edits = {
        "data, in place": lambda: weight.data.mul_(-2),
        "data, copied": lambda: weight.data.copy_(torch.randn_like(weight) / 32),
        "data, one row": lambda: weight.data[5].fill_(0.25),
        "data, replaced": lambda: setattr(weight, "data", torch.randn_like(weight) / 32),
        "bias": lambda: bias.data.add_(1),
        "load_state_dict": lambda: model.load_state_dict(other),
    }
    before = model(x)
    for what, edit in edits.items():
        edit()
        out = model(x)
        assert not torch.equal(out, before), what
        Expected(x, weight, bias).check(tile, out)
        before = out


@each_kind
def test_an_optimizer_step_is_seen(kernel, dtype):
    tile, model, x = _module(kernel, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        out = model(x)
        Expected(x, model.gemm.weight.detach(), model.gemm.bias.detach()).check(tile, out.detach())
        optimizer.zero_grad()
        out.float().square().mean().backward()
        optimizer.step()


@torch.no_grad()
def test_two_modules_share_a_weight():
    (tile, one, x), (_, two, _) = (_module("fp16x3", torch.float32) for _ in range(2))
    two.gemm.weight = one.gemm.weight
    for edit in (lambda: None, lambda: one.gemm.weight.mul_(3), lambda: two.gemm.weight.data.sub_(0.01)):
        edit()
        for model in (one, two):
            Expected(x, one.gemm.weight, model.gemm.bias).check(tile, model(x))


@pytest.mark.parametrize("how", ["as it is", "x cloned", "rows padded"])
@each_kind
def test_graph_capture_and_replay(kernel, dtype, how):
    """Captured once, all tiles; each replay sees inputs and weights as they are then."""
    x, weight, bias = random_case(256, 512, 1021 if how == "rows padded" else 1024, dtype)
    if how == "x cloned":
        x = x.t().contiguous().t()
    some = tiles(kernel, 1021, splits=(2,))
    for tile in some:
        fused(tile, x, weight, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [bindings.fused(tile, x, weight, bias, 2.0, with_z=True) for tile in some]
    for _ in range(3):
        x.normal_()
        weight.normal_().mul_(1 / 32)
        bias.normal_()
        for t in itertools.chain(*results):
            t.fill_(NAN)
        graph.replay()
        expected = Expected(x, weight, bias)
        for tile, (out, z) in zip(some, results):
            expected.check(tile, out, z)


@each_kind
def test_several_streams_at_once(kernel, dtype):
    """Each call has its own scratch."""
    cases = [random_case(m, 1024, 1024, dtype) for m in (256, 384, 130, 1)]
    expected = [Expected(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outputs = []
    for tile in tiles(kernel, 1024, splits=(2,)) * 2:
        for stream, case, right in zip(streams, cases, expected):
            with torch.cuda.stream(stream):
                outputs.append((right, tile, fused(tile, *case)))
    torch.cuda.synchronize()
    for right, tile, out in outputs:
        right.check(tile, out)


@each_kind
def test_runs_on_the_current_stream(kernel, dtype):
    """x is written late on a side stream: work on any other would read it too early. Of rows that are copied first."""
    case = random_case(256, 512, 1021, dtype)
    expected, some = Expected(*case), tiles(kernel, 1021, splits=(2,))
    late = torch.zeros_like(case[0])
    for tile in some:
        fused(tile, late, *case[1:])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(case[0])
        outputs = [fused(tile, late, *case[1:]) for tile in some]
    stream.synchronize()
    for tile, out in zip(some, outputs):
        expected.check(tile, out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_kind
def test_runs_on_the_tensors_device(kernel, dtype):
    tile, case = served_by(kernel, dtype)
    case = [t.to("cuda:1") for t in case]
    assert select_kernel(*case) == kernel
    out = linear_sigmoid_residual(*case, 2.0)
    assert out.device == case[0].device and torch.cuda.current_device() == 0
    Expected(*case).check(tile, out)


# what is selected is called


@each_kind
def test_what_is_selected_is_called(kernel, dtype):
    """The fused kernel, with and without a gradient, and with the bits of the tile that select_tile names."""
    tile, case = served_by(kernel, dtype)
    out, z = fused_with_z(tile, *case)
    wants_gradient = case[0].clone().requires_grad_()
    for call, fused_kernel in (
        (lambda: linear_sigmoid_residual(*case, 2.0), True),
        (lambda: linear_sigmoid_residual(wants_gradient, *case[1:], 2.0), True),
        (lambda: linear_sigmoid_residual(case[0], case[1].t().contiguous().t(), case[2], 2.0), False),  # W transposed
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            result = call()
        assert any("linear_kernel" in event.key for event in profile.key_averages()) == fused_kernel
        assert torch.equal(result, out) or not fused_kernel
    assert all(map(torch.equal, torch.ops.linear_sigmoid_residual.forward_with_z(*case, 2.0), (out, z)))


def test_the_precision_is_that_of_the_moment():
    """Of one case, at each precision, the kernel that serves it then."""
    case = random_case(1024, 8192, 8192)
    expected = Expected(*case)
    for precision, kernel in (("highest", "fp16x3"), ("high", "fp16x1"), ("medium", "fp16x1"), ("highest", "fp16x3")):
        torch.set_float32_matmul_precision(precision)
        assert select_kernel(*case) == kernel
        out = linear_sigmoid_residual(*case, 2.0)
        tile = kernel, 256, 0
        assert torch.equal(out, fused(tile, *case))
        expected.check(tile, out)


# gradients


@pytest.mark.parametrize("scale", [2.0, -3.0])
@each_kind
def test_gradients(kernel, dtype, scale):
    """Of x, W and b against float64's, in the Frobenius norm: to 1e-5, or what TF32 or 16 bits leave. out is, bit for
    bit, what it is where no gradient is wanted.
    """
    tile, model, x = _module(kernel, dtype)
    model.scaling_factor = scale
    x.requires_grad_()
    leaves = x, model.gemm.weight, model.gemm.bias
    out = model(x)
    Expected(*(t.detach() for t in leaves), scale).check(tile, out.detach())
    with torch.no_grad():
        assert torch.equal(out, model(x))
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    z = nn.functional.linear(*wide)
    correct = torch.autograd.grad(z + scale * torch.sigmoid(z), wide, grad.double())
    tolerance = 1e-5 if kernel == "fp16x3" else max(2e-3, 4 * storage_roundoff(dtype))
    for name, actual, expected in zip(("x", "W", "b"), gradients, correct):
        error = ((actual.double() - expected).norm() / expected.norm()).item()
        assert error < tolerance, f"gradient of {name}: {error:.2e}"
