"""The fused float32 kernel for Hopper: shapes, strides, accuracy, special values, repeatability, and when it is chosen.

`fused` calls it whatever the size. Everything is compared on the GPU with the layer in float64, whose own errors, 2^-53
relative, do not matter here.
"""

import pytest
import torch
from conftest import needs_cuda
from reference import poison
from torch import nn

import model_new
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


def fused(x, weight, bias, scale=2.0):
    return model_new._fp16x3_cuda(x, weight, bias, scale)


def eager(x, weight, bias, scale=2.0):
    z = nn.functional.linear(x, weight, bias)
    return torch.sigmoid(z) * scale + z


def random_case(m, n, k):
    """x [m, k], weight [n, k] and bias [n] on the GPU; normal, weight by 1/√k."""
    x, weight, bias = (torch.randn(shape, device="cuda") for shape in ((m, k), (n, k), (n,)))
    return x, weight / k**0.5, bias


def check(out, x, weight, bias, scale=2.0):
    """Asserts that `out` is the layer, every element within the scheme's rounding errors.

    z, relative to |x|·|W|ᵀ + |b|, with B = ⌈K/64⌉ blocks of k:
        3·2^-22            x and w as hi + lo, each to 2^-22, and lo·lo dropped
        12·2^-23           a block's twelve wgmmas, whose sums are truncated
        min(B, 4√B)·u + u  adding the blocks' sums (as reference.sum_error), and the bias
    and 2^-39 of the row's largest |x| or |w| for each number: where lo is denormal in fp16, its rounding is 2^-25 when
    the largest is in [2^14, 2^15). out: as in reference.Layer.
    """
    assert out.dtype == torch.float32 and out.shape == (*x.shape[:-1], len(weight)) and out.is_contiguous()
    out, x = out.double().reshape(-1, len(weight)), x.double().reshape(-1, x.shape[-1])
    weight, bias = weight.double(), bias.double()
    blocks = -(-x.shape[1] // 64)
    z = x @ weight.T + bias
    relative = 3 * 2.0**-22 + 12 * 2.0**-23 + (min(blocks, 4 * blocks**0.5) + 1) * U
    x, weight = x.abs(), weight.abs()
    bound = relative * (x @ weight.T + bias.abs()) + 4 * DENORMAL
    bound += 2.0**-39 * (x.amax(1)[:, None] * weight.sum(1) + x.sum(1)[:, None] * weight.amax(1))
    sigmoid = torch.sigmoid(z)
    expected = z + scale * sigmoid
    bound = (1 + abs(scale) / 4) * bound + 10 * U * abs(scale) * sigmoid + U * expected.abs()
    error = (out - expected).abs()
    good = error <= bound  # false for NaN
    if not good.all():
        m, n = (error / bound).nan_to_num(nan=torch.inf).argmax().item() // len(weight), 0
        n = (error / bound).nan_to_num(nan=torch.inf)[m].argmax().item()
        raise AssertionError(
            f"{(~good).sum().item()} of {good.numel()} elements are outside their bound; worst at ({m}, {n}): "
            f"{out[m, n].item()!r}, expected {expected[m, n].item()!r} to {bound[m, n].item():.3g}"
        )


# shapes and memory

# Every M with every N, every N with every K, and almost every M with every K.
EDGES_M, EDGES_N, EDGES_K = (1, 7, 127, 128, 129, 257, 300), (1, 9, 127, 128, 130, 520), (4, 12, 60, 64, 68, 132, 1000)
SHAPES = [(m, n, EDGES_K[(i + j) % 7]) for i, m in enumerate(EDGES_M) for j, n in enumerate(EDGES_N)]
SHAPES += [
    (1024, 640, 8196),  # rows that the splitting kernel does not hold in registers
    (300, 5000, 68),  # more tiles of one panel than run at once
]
# More tiles than run at once, so many that the kernel takes them of two panels (of 128 rows of x). The last panel, the
# last tile of a pair and the last group of tiles are full, partly full or missing.
TWO_PANELS = [
    (1024, 2300, 8196),
    (1025, 2100, 68),
    (1153, 2100, 132),
    (1300, 1700, 4),
    (2049, 1100, 200),
    (900, 2300, 60),
]
SHAPES += TWO_PANELS


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_shapes(m, n, k):
    """The memory that the output and the scratch will get is NaN before."""
    case = random_case(m, n, k)
    scratch = torch.full((model_new._cuda.linear_fp16x3_scratch(m, k),), 255, dtype=torch.uint8, device="cuda")
    poison(m * n * 4, "cuda")
    del scratch
    check(fused(*case), *case)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 0, 64), (2, 3, 50, 64), (1, 1, 64)], ids=str)
def test_x_of_any_dimension(shape):
    """An x without rows is select_kernel's business."""
    _, weight, bias = random_case(1, 130, 64)
    x = torch.randn(shape, device="cuda")
    if x.numel() == 0:
        assert select_kernel(x, weight, bias) == "library"
        assert linear_sigmoid_residual(x, weight, bias, 2.0).shape == (*shape[:-1], 130)
        return
    check(fused(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e3])
def test_scale(scale):
    case = random_case(130, 260, 200)
    check(fused(*case, scale), *case, scale)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 1, 4),
        (7, 9, 12),
        (300, 1, 64),
        (129, 130, 68),
        (257, 127, 132),
        (128, 520, 1000),
        (130, 200, 8196),
        (1153, 2100, 68),
    ],
)
def test_nothing_outside_is_read_or_written(m, n, k, offset):
    """x, W and bias lie in NaN, between their rows too; output and scratch in the middle of blocks whose ends are
    looked at afterwards. The output need not be aligned (offset 1).
    """
    guard, stride = 64, k + 8
    case = random_case(m, n, k)

    def surrounded(t, stride):
        whole = torch.full((guard + len(t) * stride + guard,), torch.nan, device="cuda")
        inside = whole[guard:].as_strided(t.shape, (stride, 1)[: t.dim()], guard)
        return inside.copy_(t)

    x, weight, bias = surrounded(case[0], stride), surrounded(case[1], stride), surrounded(case[2], 1)
    out_block = torch.full((m * n + 2 * guard + offset,), -7.0, device="cuda")
    out = out_block[guard + offset :][: m * n].view(m, n).fill_(torch.nan)
    scratch_bytes = model_new._cuda.linear_fp16x3_scratch(m, k)
    scratch = torch.full((1024 + scratch_bytes + 1024,), 255, dtype=torch.uint8, device="cuda")  # NaN, in any type
    pointers = [t.data_ptr() for t in (x, weight, bias, out)] + [scratch.data_ptr() + 1024]
    model_new._launch(model_new._cuda.linear_fp16x3, x.device, *pointers, stride, stride, m, n, k, 2.0)
    check(out, *case)
    assert (out_block[: guard + offset] == -7).all() and (out_block[-guard:] == -7).all()
    assert (scratch[:1024] == 255).all() and (scratch[-1024:] == 255).all()


def _in_wider_rows(t, extra):
    wide = torch.full((len(t), t.shape[1] + extra), torch.nan, device="cuda")
    return wide[:, : t.shape[1]].copy_(t)


def _misaligned(t):
    return torch.full((t.numel() + 1,), torch.nan, device="cuda")[1:].view(t.shape).copy_(t)


STRIDES = {
    "x in wider rows": lambda x, w, b: (_in_wider_rows(x, 12), w, b),
    "x in wider rows of odd length": lambda x, w, b: (_in_wider_rows(x, 3), w, b),
    "x transposed": lambda x, w, b: (x.t().contiguous().t(), w, b),
    "x misaligned": lambda x, w, b: (_misaligned(x), w, b),
    "x every other row": lambda x, w, b: (x.repeat_interleave(2, 0)[::2], w, b),
    "x every other column": lambda x, w, b: (x.repeat_interleave(2, 1)[:, ::2], w, b),
    "x of three dimensions, permuted": lambda x, w, b: (x.view(13, 10, -1).transpose(0, 1).contiguous(), w, b),
    "W in wider rows": lambda x, w, b: (x, _in_wider_rows(w, 8), b),
    "bias every other": lambda x, w, b: (x, w, b.repeat_interleave(2)[::2]),
    "bias misaligned": lambda x, w, b: (x, w, _misaligned(b)),
}


@pytest.mark.parametrize("how", STRIDES)
def test_strides(how):
    """Bit for bit as from contiguous tensors."""
    x, weight, bias = random_case(130, 260, 200)
    case = STRIDES[how](x, weight, bias)
    if how.endswith("permuted"):
        case = case[0].transpose(0, 1), *case[1:]
    assert torch.equal(fused(*case).reshape(130, 260), fused(x, weight, bias))


@pytest.mark.parametrize("which", range(3))
def test_a_lazily_negated_tensor(which):
    """Its memory holds the opposite sign."""
    case = list(random_case(512, 2048, 1024))
    negated = list(case)
    negated[which] = torch._neg_view(case[which])
    assert select_kernel(*negated) == "fp16x3"
    case[which] = -case[which]
    assert torch.equal(linear_sigmoid_residual(*negated, 2.0), fused(*case))


def test_x_of_equal_rows():
    """Stride 0 between the rows."""
    x, weight, bias = random_case(1, 260, 200)
    out = fused(x.expand(130, 200), weight, bias)
    assert torch.equal(out, out[:1].expand_as(out))
    check(out, x.expand(130, 200), weight, bias)


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
    "one nonzero in each row of x": lambda m, n, k: _few_nonzero(m, n, k, 1),
    "eight nonzeros in each row of x": lambda m, n, k: _few_nonzero(m, n, k, 8),
}


def _is_as_accurate_as_sgemm(x, weight):
    """‖out − ref‖ / ‖ref‖ and max |out − ref| / (|x|·|W|ᵀ), of the products alone (b = 0, s = 0): ours ≤ cuBLAS'."""
    reference = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T

    def errors(z):
        difference = z.double() - reference
        return (difference.norm() / reference.norm()).item(), (
            difference.abs() / magnitude.clamp_min(1e-300)
        ).max().item()

    ours = errors(fused(x, weight, weight.new_zeros(len(weight)), 0.0))
    assert torch.get_float32_matmul_precision() == "highest"
    sgemm = errors(nn.functional.linear(x, weight))
    text = "Frobenius {:.2e}, componentwise {:.2e}; SGEMM {:.2e}, {:.2e}".format(*ours, *sgemm)
    print(text)
    assert ours[0] <= sgemm[0] and ours[1] <= sgemm[1], text


@pytest.mark.parametrize("data", DATA)
def test_accuracy_is_sgemms_or_better(data):
    """On the reference shape, which is large enough for cuBLAS not to split K."""
    _is_as_accurate_as_sgemm(*DATA[data](1024, 8192, 8192))


@pytest.mark.parametrize("count", [7, 8, 9])
@pytest.mark.parametrize("k", [1000, 16384])
def test_outliers(k, count):
    """Up to eight entries of a row are multiplied apart, at no loss. Nine are not, but at 2^17 times the others
    they stay within the scheme's bound. K beyond 8192: the row is read several times.
    """
    x, weight = _outliers(260, 300, k, count, 2.0**17, None)
    check(fused(x, weight, weight.new_zeros(300)), x, weight, weight.new_zeros(300))
    if count <= 8:
        _is_as_accurate_as_sgemm(x, weight)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x, beside an outlier", "W, where x has an outlier"])
def test_special_values_and_outliers(where, value):
    x, weight, bias = random_case(130, 140, 8200)
    x[:, 5] = 1e8
    clean = fused(x, weight, bias)
    tensor = x if where.startswith("x") else weight
    tensor[3, 8196 if where.startswith("x") else 5] = value
    out = is_as_eager(x, weight, bias)
    changed = torch.zeros_like(out, dtype=torch.bool)
    (changed if where.startswith("x") else changed.T)[3] = True
    assert torch.equal(out[~changed], clean[~changed]) and not out[changed].isfinite().any()


def test_accuracy_on_a_smaller_shape():
    _is_as_accurate_as_sgemm(*_uniform_and_init(512, 1024, 8192))


# special values


def is_as_eager(x, weight, bias):
    """NaN and ±Inf where eager has them, and its finite values. The three are not the same as float64's: overflow."""
    out, expected = fused(x, weight, bias), eager(x, weight, bias)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out == INF, expected == INF)
    assert torch.equal(out == -INF, expected == -INF)
    magnitude = x.double().abs() @ weight.double().abs().T + bias.double().abs() + 2
    finite = expected.isfinite()
    error = (out.double() - expected.double()).abs()
    assert (error <= 1e-5 * magnitude)[finite].all()
    return out


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("m, n, k", [(130, 140, 200), (300, 520, 1000), (1153, 2100, 132)])
@pytest.mark.parametrize("where", ["x", "W", "b"])
def test_one_special_value(where, m, n, k, value):
    """It stays in its row, or in its column: the others are, bit for bit, what they were."""
    x, weight, bias = random_case(m, n, k)
    clean = fused(x, weight, bias)
    tensor = {"x": x, "W": weight, "b": bias}[where]
    at = tensor.shape[0] - 2, *([k - 3] if tensor.dim() == 2 else [])
    tensor[at] = value
    out = is_as_eager(x, weight, bias)
    same = torch.ones_like(out, dtype=torch.bool)
    (same if where == "x" else same.T)[at[0]] = False
    assert torch.equal(out[same], clean[same])
    assert not out[~same].isfinite().any()


ALL = slice(None)


def _set(tensor, value, *places):
    for at in places:
        tensor[at] = value


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
    # One overflow in a sum: whichever the order of the terms, the sum is Inf.
    "a product overflows": lambda x, w, b: (_set(x, 1e30, (3, 5)), _set(x, -1e30, (4, 5)), _set(w, 1e30, (ALL, 5))),
    "the sum overflows": lambda x, w, b: (_set(x, 1e37, 3), w.abs_().add_(1)),
    "the bias overflows": lambda x, w, b: (_set(x[3, :8], 4e37, ALL), _set(w[:, :8], 1.0, ALL), b.fill_(3e38)),
    "the largest float32": lambda x, w, b: (_set(x, torch.finfo().max, (3, 5)), _set(w, 0.5, (ALL, 5))),
    # Finite for eager, but not where x is scaled up to 2^14.
    "large x": lambda x, w, b: x.mul_(1e37).clamp_(-1e37, 1e37),
    "large W": lambda x, w, b: (w.mul_(1e37), x.mul_(0.1)),
    "one large row of W": lambda x, w, b: (w[3].mul_(1e38), x.mul_(0.1)),
    "rows of zeros": lambda x, w, b: (_set(x, 0.0, 3, 129), _set(w, 0.0, 7)),
    "x is zero": lambda x, w, b: x.zero_(),
    "W is zero": lambda x, w, b: w.zero_(),
    "minus zero": lambda x, w, b: (_set(x, -0.0, 3), _set(w, -0.0, 7), _set(b[:9], -0.0, ALL)),
}


@pytest.mark.parametrize("m, n", [(130, 140), (1153, 2100)])  # tiles of one and of two panels
@pytest.mark.parametrize("what", SPECIALS)
def test_special_values_are_eagers(what, m, n):
    x, weight, bias = random_case(m, n, 200)
    SPECIALS[what](x, weight, bias)
    out = is_as_eager(x, weight, bias)
    zeros = (x == 0).all(1)[:, None] | (weight == 0).all(1)
    # Where there is nothing to add, out is the bias' own.
    alone = (bias + 2 * torch.sigmoid(bias)).expand_as(out)
    assert torch.allclose(out[zeros], alone[zeros], rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("which", ["x", "W", "some of x", "some of W"])
def test_denormal_inputs(which):
    """Not flushed to zero: within 4 denormal ulps, and a float32's relative error, of float64."""
    x, weight, bias = random_case(130, 140, 128)
    tensor, rows = (x if which.endswith("x") else weight), slice(0, 64 if which.startswith("some") else None)
    tensor[rows] *= 1e-40
    assert ((tensor != 0) & (tensor.abs() < torch.finfo().tiny)).any()
    out = fused(x, weight, torch.zeros_like(bias), 0.0).double()
    expected = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    assert ((out - expected).abs() <= 4 * DENORMAL + 2e-6 * magnitude).all()
    assert (out[expected.abs() > 1e-42] != 0).all()


# repeatability, state, streams


@pytest.mark.parametrize("data", ["normal", "outliers"])
@pytest.mark.parametrize("m", [384, 1024])
def test_bit_identical_from_run_to_run(m, data):
    """Alone, and beside other work on the GPU. In tiles of one and of two panels."""
    case = random_case(m, 4096, 1024)
    if data == "outliers":
        case[0].scatter_(1, _places(m, 1024, 8), 1e6)
    first = fused(*case)
    if data == "normal":
        check(first, *case)
    assert all(torch.equal(fused(*case), first) for _ in range(20))
    other, load = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    outputs = []
    for _ in range(20):
        with torch.cuda.stream(other):
            load @ load
            load + load
        outputs.append(fused(*case))
    torch.cuda.synchronize()
    assert all(torch.equal(out, first) for out in outputs)


def test_calls_right_after_another():
    """A call begins while the one before ends, and gets its scratch; each input is overwritten right after its call."""
    cases = [random_case(256, 512, 512) for _ in range(8)]
    x, weight, bias = (torch.empty_like(t) for t in cases[0])
    outputs = []
    for case in cases:
        for to, value in zip((x, weight, bias), case):
            to.copy_(value)
        outputs.append(fused(x, weight, bias))
    for out, case in zip(outputs, cases):
        check(out, *case)


def _module(k, n):
    model = ModelNew(k, n, 2.0).cuda()
    x = torch.randn(512, k, device="cuda")
    assert select_kernel(x, model.gemm.weight, model.gemm.bias) == "fp16x3"
    return model, x


@torch.no_grad()
def test_changed_weights_are_seen():
    model, x = _module(1024, 2048)
    weight, bias = model.gemm.weight, model.gemm.bias
    edits = {
        "data, in place": lambda: weight.data.mul_(-2),
        "data, copied": lambda: weight.data.copy_(torch.randn_like(weight) / 32),
        "data, one element": lambda: weight.data[5].fill_(0.25),
        "data, replaced": lambda: setattr(weight, "data", torch.randn_like(weight) / 32),
        "bias": lambda: bias.data.add_(1),
        "load_state_dict": lambda: model.load_state_dict(ModelNew(1024, 2048, 2.0).state_dict()),
    }
    before = model(x)
    for what, edit in edits.items():
        edit()
        out = model(x)
        assert not torch.equal(out, before), what
        check(out, x, weight, bias)
        before = out


def test_an_optimizer_step_is_seen():
    model, x = _module(1024, 2048)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        out = model(x)
        check(out.detach(), x, model.gemm.weight.detach(), model.gemm.bias.detach())
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()


@torch.no_grad()
def test_two_modules_share_a_weight():
    one, x = _module(1024, 2048)
    two, _ = _module(1024, 2048)
    two.gemm.weight = one.gemm.weight
    for edit in (lambda: None, lambda: one.gemm.weight.mul_(3), lambda: two.gemm.weight.data.sub_(0.01)):
        edit()
        for model in (one, two):
            check(model(x), x, one.gemm.weight, model.gemm.bias)


@pytest.mark.parametrize("how", ["as it is", "x cloned"])
def test_graph_capture_and_replay(how):
    """Captured once; each replay sees inputs and weights as they are then."""
    x, weight, bias = random_case(256, 512, 1024)
    if how == "x cloned":
        x = x.t().contiguous().t()
    fused(x, weight, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(x, weight, bias)
        again = fused(x, weight, bias, 0.0)
    for _ in range(3):
        x.normal_()
        weight.normal_().mul_(1 / 32)
        bias.normal_()
        out.fill_(torch.nan)
        again.fill_(torch.nan)
        graph.replay()
        check(out, x, weight, bias)
        check(again, x, weight, bias, 0.0)


def test_several_streams_at_once():
    """Each call has its own scratch."""
    cases = [random_case(m, 1024, 1024) for m in (256, 384, 130, 1)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outputs = []
    for _ in range(10):
        for stream, case in zip(streams, cases):
            with torch.cuda.stream(stream):
                outputs.append(fused(*case))
    torch.cuda.synchronize()
    for i, out in enumerate(outputs):
        check(out, *cases[i % len(cases)])


def test_runs_on_the_current_stream():
    """x is written late on a side stream: work on any other would read it too early."""
    case = random_case(256, 512, 1024)
    late = torch.zeros_like(case[0])
    fused(late, *case[1:])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(case[0])
        out = fused(late, *case[1:])
    stream.synchronize()
    check(out, *case)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_tensors_device():
    case = [t.to("cuda:1") for t in random_case(512, 2048, 1024)]
    assert select_kernel(*case) == "fp16x3"
    out = linear_sigmoid_residual(*case, 2.0)
    assert out.device == case[0].device and torch.cuda.current_device() == 0
    check(out, *case)


# selection


def _empty(*shape, **options):
    return torch.empty(shape, device="cuda", **options)


def _reference_arguments(k=8192, dtype=torch.float32):
    return _empty(1024, k, dtype=dtype), _empty(8192, k, dtype=dtype), _empty(8192, dtype=dtype)


def test_selected_for_the_reference_shape():
    x, weight, bias = _reference_arguments()
    assert select_kernel(x, weight, bias) == "fp16x3"
    assert select_kernel(x.view(4, 256, 8192), weight, bias) == "fp16x3"
    assert select_kernel(_empty(8192, 1024).t(), weight, bias) == "fp16x3"  # x's strides do not matter
    assert select_kernel(x, _empty(8192, 8200)[:, :8192], bias) == "fp16x3"


def test_not_selected_where_it_does_not_serve():
    x, weight, bias = _reference_arguments()
    others = {
        "float16": _reference_arguments(dtype=torch.float16),
        "bfloat16": _reference_arguments(dtype=torch.bfloat16),
        "K = 8191": _reference_arguments(8191),
        "W transposed": (x, _empty(8192, 8192).t(), bias),
        "W's rows odd": (x, _empty(8192, 8193)[:, :8192], bias),
        "W's rows equal": (x, _empty(1, 8192).expand(8192, 8192), bias),
        "W misaligned": (x, _empty(8192 * 8192 + 1)[1:].view(8192, 8192), bias),
        "tiny": (_empty(4, 64), _empty(32, 64), _empty(32)),
        "M = 0": (x[:0], weight, bias),
        "N = 0": (x, weight[:0], bias[:0]),
        "K = 0": (x[:, :0], weight[:, :0], bias),
    }
    for what, arguments in others.items():
        assert select_kernel(*arguments) == "library", what
    assert select_kernel(x.double(), weight.double(), bias.double()) == "library"
    assert select_kernel(torch.empty(512, 1024), torch.empty(2048, 1024), torch.empty(2048)) == "cpu"


def test_selected_only_at_highest_precision():
    arguments = _reference_arguments()
    for precision, expected in {"high": "library", "medium": "library", "highest": "fp16x3"}.items():
        torch.set_float32_matmul_precision(precision)
        assert select_kernel(*arguments) == expected, precision


@pytest.mark.parametrize("setting", ["allow_tf32", "fp32_precision"])
def test_selected_by_pytorchs_other_names_for_the_precision(setting):
    arguments, matmul = _reference_arguments(), torch.backends.cuda.matmul
    values = {"allow_tf32": (True, False), "fp32_precision": ("tf32", "ieee")}[setting]
    try:
        for value, expected in zip(values, ("library", "fp16x3")):
            setattr(matmul, setting, value)
            assert select_kernel(*arguments) == expected
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
    assert select_kernel(*arguments) == "fp16x3"


def test_what_is_selected_is_called():
    case = random_case(512, 2048, 1024)
    assert select_kernel(*case) == "fp16x3"
    assert torch.equal(linear_sigmoid_residual(*case, 2.0), fused(*case))
    torch.set_float32_matmul_precision("high")
    assert not torch.equal(linear_sigmoid_residual(*case, 2.0), fused(*case))


# gradients


@pytest.mark.parametrize("scale", [2.0, -3.0])
def test_gradients(scale):
    """Of x, W and b against float64's: 1e-5, Frobenius. out is bit for bit what it is where no gradient is wanted."""
    model = ModelNew(1024, 2048, scale).cuda()
    x = torch.randn(512, 1024, device="cuda", requires_grad=True)
    weight, bias = model.gemm.weight, model.gemm.bias
    assert select_kernel(x, weight, bias) == "fp16x3"
    out = model(x)
    check(out.detach(), x.detach(), weight.detach(), bias.detach(), scale)
    with torch.no_grad():
        assert torch.equal(out, model(x))
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (x, weight, bias), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(eager(*wide, scale), wide, grad.double())
    for name, actual, correct in zip(("x", "W", "b"), gradients, expected):
        error = ((actual.double() - correct).norm() / correct.norm()).item()
        assert error < 1e-5, f"gradient of {name}: {error:.2e}"
