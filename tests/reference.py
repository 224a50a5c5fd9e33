"""The layer in float64, and how far a right implementation may be from it: the only place for error bounds.

u is the unit roundoff of the arithmetic: 2^-24 (float32, which 16-bit storage is computed in, too) or 2^-53.
"""

from dataclasses import dataclass

import torch
from torch import nn

import model_new

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIXTEEN_BIT = (torch.float16, torch.bfloat16)

_UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def compute_roundoff(dtype):
    return _UNIT_ROUNDOFF[dtype if dtype == torch.float64 else torch.float32]


def storage_roundoff(dtype):
    """Relative error of the one rounding to 16-bit storage; 0 where storage and arithmetic have one type."""
    return _UNIT_ROUNDOFF[dtype] if dtype in SIXTEEN_BIT else 0.0


@dataclass(frozen=True)
class Arithmetic:
    """How a matrix product A·Bᵀ + c (A [M, K], B [N, K], c [N]) is computed, and so how far it may be off.

    kernel: a name from select_kernel. correlated: whether the numbers may round alike, as equal ones do.

    Relative to |A|·|B|ᵀ:

    - The numbers that are multiplied. As they are: no error. "fp16x3": as hi + lo, each to 2^-23, and lo·lo, at most
      2^-22, left out: 2^-21. "fp16x1" and "fp16x1_staged": rounded to 11 bits, 2^-11 each. TF32 (the library at 'high'
      and 'medium'): 11 bits, rounded or cut off, which is not documented: 2^-10 each. bfloat16 (the CPU at 'medium'): 8
      bits, 2^-8 each. Products of two such errors are small beside them: a hundredth more.
    - The additions of t terms, relative to |A|·|B|ᵀ + |c|. In float32 and float64: min(t, 8√t)·u, where t·u is certain
      and λ√t·u, λ = 8, fails for one element in 10^13 if roundings are independent (Higham and Mary, 2019); t·u where
      they are not. cuBLAS on tensor cores, which cut off: 2u a term. Our kernels: 2u for every wgmma of 16 k, and what
      is added behind them. "fp16x3": of a block of 64 k four wgmmas meet a large accumulator, the eight small ones
      before them and the factor 1 + 2^-23 make less than a fifth; then the blocks' sums, those of up to 4 parts of K,
      and c, rounded. The float64 reference's own sum comes on top.

    and in absolute terms:

    - "fp16x3", where lo is denormal: 2^-25 when the largest is in [2^14, 2^15), so 2^-39 of the largest number of the
      row of A, or of the row and block of 64 k of B, for each number of the other; and totals are kept in the unit of
      A's row, whose smallest is 2^-149·2^-14 of the largest number. "fp16x1": the largest of a row of A is in
      [2^14, 2^15), of a row of B at least 2^12: 2^-39 and 2^-37 of them.
    - Denormals. float32 at 'highest', float64 and float16: rounded to them, half the smallest a term. The rest (TF32,
      bfloat16; CPU instructions for both do so) may take any of size below 2^-126 for zero.
    """

    dtype: torch.dtype
    kernel: str
    precision: str
    correlated: bool = False

    def _rounded(self, terms, u):
        return u * (terms if self.correlated else min(terms, 8 * terms**0.5))

    def _of_operands(self):
        if self.kernel == "fp16x3":
            bits = 2.0**-22
        elif self.kernel.startswith("fp16x1"):
            bits = 2.0**-11
        elif self.dtype != torch.float32 or self.precision == "highest":
            return 0.0
        else:
            bits = 2.0**-8 if self.kernel == "cpu" and self.precision == "medium" else 2.0**-10
        return 2 * bits * 1.01

    def _of_sum(self, k, with_c):
        u, terms = compute_roundoff(self.dtype), k + with_c
        reference = self._rounded(terms, 2.0**-53)
        if self.kernel == "fp16x3":
            return 5 * 2 * u + self._rounded(-(-k // 64) + 8 + with_c, u) + reference
        if self.kernel == "wgmma16" or self.kernel.startswith("fp16x1"):
            return (-(-k // 16) + 8) * 2 * u + reference
        if self.dtype in SIXTEEN_BIT or (self.dtype == torch.float32 and self.precision != "highest"):
            return 2 * terms * u + reference
        return self._rounded(terms, u) + reference

    def _floor(self, a, b):
        """[M, N], or something that broadcasts to it; of absolute values a [M, K] and b [N, K]."""
        k = a.shape[1]
        if k == 0:
            return 0.0
        rows, columns = a.sum(1)[:, None], b.sum(1)
        largest = a.amax(1)[:, None]
        if self.kernel == "fp16x3":
            padding = (0, -k % 64)
            blocks_a, blocks_b = (nn.functional.pad(t, padding).unflatten(1, (-1, 64)) for t in (a, b))
            floor = 2.0**-39 * (largest * columns + blocks_a.sum(2) @ blocks_b.amax(2).T)
            return floor + (k // 64 + 10) * (2.0**-149 + 2.0**-163 * largest)
        if self.dtype == torch.float16 or (self.dtype != torch.bfloat16 and self._of_operands() == 0):
            return k * SMALLEST[torch.float64 if self.dtype == torch.float64 else torch.float32]
        floor = 2.0**-126 * (rows + columns + 2 * k)
        if self.kernel.startswith("fp16x1"):
            floor = floor + 2.0**-39 * largest * columns + 2.0**-37 * rows * b.amax(1)
        return floor

    def product_bound(self, a, b, c=None, a_bound=None):
        """For A·Bᵀ + c, float64 [M, N], where A itself is known to `a_bound`; before any rounding to 16 bits."""
        magnitude, bound = a.abs() @ b.abs().T, self._floor(a.abs(), b.abs())
        if a_bound is not None:
            moved = a_bound @ b.abs().T
            magnitude, bound = magnitude + moved, bound + moved
        bound = bound + self._of_operands() * magnitude
        magnitude = magnitude if c is None else magnitude + c.abs()
        return bound + self._of_sum(a.shape[1], c is not None) * magnitude

    def stored(self, exact, bound):
        """The bound after one rounding to the storage type."""
        return bound + storage_roundoff(self.dtype) * (exact.abs() + bound) + SMALLEST[self.dtype]


OURS = {  # the kernels of kernels.cu that may serve, by dtype and precision
    (torch.float32, "highest"): ("fp16x3",),
    **{(torch.float32, precision): ("fp16x1", "fp16x1_staged") for precision in ("high", "medium")},
    **{(dtype, precision): ("wgmma16",) for dtype in SIXTEEN_BIT for precision in ("highest", "high", "medium")},
}


def ways_of(x, kernel=None, correlated=False):
    """[Arithmetic] by which a product with x may be computed at PyTorch's present precision: by one kernel, or by
    whichever may serve.
    """
    precision = torch.get_float32_matmul_precision()
    names = [kernel] if kernel else ["library", *OURS.get((x.dtype, precision), ())] if x.is_cuda else ["cpu"]
    return [Arithmetic(x.dtype, name, precision, correlated) for name in names]


def _most(bounds):
    return torch.stack(list(bounds)).amax(0)


class Expected:
    """z and out of the layer in float64 on the tensors' device, with bounds, and gradients for a gradient of out.

    x [..., K], weight [N, K], bias [N], finite; `ways`: [Arithmetic], one of which computes x·Wᵀ + b; default: any.
    z      Arithmetic's bound. In 16 bits z is rounded, and before it, where the library adds the bias in a step of its
           own, the product; "wgmma16" keeps z in float32 unless it is wanted, by the caller or for a gradient.
    out    what z's error becomes, (1 + |s|/4)·z_bound, as σ' ≤ 1/4; σ to 8u relative (exp 2 ulp, add, reciprocal
           1 ulp), times s, added: 10u·|s|·σ + u·|out|; in 16 bits exp(-z) is off by |z|·2u more; one rounding.
    """

    def __init__(self, x, weight, bias, scale, ways=None, with_z=True):
        self.ways = ways or ways_of(x)
        self.scale, self.shape, self.dtype = scale, (*x.shape[:-1], len(weight)), x.dtype
        self.x = x.detach().double().reshape(x.shape[:-1].numel(), x.shape[-1])
        self.weight, bias = weight.detach().double(), bias.detach().double()
        product, u = self.x @ self.weight.T, compute_roundoff(x.dtype)
        self.z = product + bias
        stored, before_out = [], []  # bounds of z as it is stored, and as out is computed from it
        for way in self.ways:
            bound, in_float32 = way.product_bound(self.x, self.weight, bias), way.kernel == "wgmma16"
            stored.append(way.stored(self.z, bound if in_float32 else way.stored(product, bound)))
            before_out.append(bound if in_float32 and not with_z else stored[-1])
        self.z_bound = _most(stored)
        self.reach = self.z.abs() + self.z_bound
        self.sigmoid = torch.sigmoid(self.z)
        self.out = self.z + scale * self.sigmoid
        of_sigmoid = 10 + (2 * self.z.abs() * (1 - self.sigmoid) if x.dtype in SIXTEEN_BIT else 0)
        epilogue = of_sigmoid * u * abs(scale) * self.sigmoid + u * self.out.abs()
        self.out_bound = self.ways[0].stored(self.out, (1 + abs(scale) / 4) * _most(before_out) + epilogue)

    def good(self, out):
        """For each element of a tensor [M, N], whether it is this layer's: bool [M, N]."""
        return within(out, self.out, self.out_bound, self.reach)

    def check(self, out, z=None, what=""):
        """Asserts that a tensor is this layer's output, and another its z."""
        for name, actual, exact, bound in (("out", out, self.out, self.out_bound), ("z", z, self.z, self.z_bound)):
            if actual is not None:
                assert actual.shape == self.shape, f"{name}: shape {list(actual.shape)}, expected {list(self.shape)}"
                assert actual.dtype == self.dtype, f"{name}: {actual.dtype}"
                assert_within(actual.reshape(exact.shape), exact, bound, f"{name} {what}".strip(), self.reach)

    def check_gradients(self, grad, gradients):
        """Asserts that `gradients` (dx, dW, db; None where one was not wanted) are those for a gradient `grad` of out.

        dz = grad·(1 + sσ(1 − σ)): |d²out/dz²| ≤ |s|/10 turns z_bound into an error of dz, the rest is a few roundings.
        dx = dz·W and dW = dzᵀ·x, over N and over the M rows, are the library's, or in float32 at 'highest' those of
        "fp16x3": either. db is a sum over the rows.
        """
        way = self.ways[0]
        grad = grad.detach().double().reshape(self.z.shape)
        dz = grad * (1 + self.scale * self.sigmoid * (1 - self.sigmoid))
        roundings = 20 * compute_roundoff(self.dtype) * (1 + abs(self.scale) / 4)
        dz_bound = way.stored(dz, grad.abs() * (abs(self.scale) / 10 * self.z_bound + roundings))
        kernels = ["cpu" if way.kernel == "cpu" else "library"]
        if kernels == ["library"] and self.dtype == torch.float32 and way.precision == "highest":
            kernels.append("fp16x3")
        products = [Arithmetic(self.dtype, kernel, way.precision, way.correlated) for kernel in kernels]
        a_sum = [Arithmetic(self.dtype, "cpu", "highest", way.correlated)]  # no product: its terms are what they are
        for name, actual, left, left_bound, right, ways in (
            ("dx", gradients[0], dz, dz_bound, self.weight.T, products),
            ("dW", gradients[1], dz.T, dz_bound.T, self.x.T, products),
            ("db", gradients[2], dz.T, dz_bound.T, dz.new_ones(1, len(dz)), a_sum),
        ):
            if actual is not None:
                exact = left @ right.T
                bound = way.stored(exact, _most(w.product_bound(left, right, a_bound=left_bound) for w in ways))
                assert actual.dtype == self.dtype, f"{name}: {actual.dtype}"
                assert_within(actual.reshape(exact.shape), exact, bound, name)


def within(actual, exact, bound, reach=0.0):
    """|actual − exact| ≤ bound, elementwise; false for NaN.

    Inf of the right sign is good where the exact value, or what comes before it (`reach`, absolute), may be beyond the
    type's largest number.
    """
    largest = torch.finfo(actual.dtype).max
    error = (actual.double() - exact).abs()
    overflowed = actual.isinf() & (actual.sign() == exact.sign())
    return (error <= bound) | (overflowed & ((exact.abs() + bound).clamp_min(reach) >= largest))


def assert_within(actual, exact, bound, what, reach=0.0):
    """Asserts that all elements are good in the sense of `within`."""
    actual = actual.detach()
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    good = within(actual, exact, bound, reach)
    if not good.all():
        badness = torch.where(good, -1.0, ((actual.double() - exact).abs() / bound).nan_to_num(nan=torch.inf))
        at = tuple(int(i) for i in torch.unravel_index(badness.argmax(), exact.shape))
        raise AssertionError(
            f"{what}: {(~good).sum().item()} of {good.numel()} elements are outside their bound; worst at {at}: "
            f"{actual[at].item()!r}, expected {exact[at].item()!r} to {bound[at].item():.3g}"
        )


def random_arguments(shape, n, dtype, device, scale=2.0):
    """x of `shape`, weight [n, K], bias [n], all normal (weight by 1/√K, as layers have it), and the scale."""
    k = shape[-1]
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(n, k, dtype=torch.float64) / max(k, 1) ** 0.5
    bias = torch.randn(n, dtype=torch.float64)
    return *(t.to(device=device, dtype=dtype) for t in (x, weight, bias)), scale


def model_pair(k, n, scale=2.0, module=model_new, **to):
    """(Model, ModelNew with the same weights), the latter of an execution of model_new.py; to: as of nn.Module.to."""
    reference, new = model_new.Model(k, n, scale), module.ModelNew(k, n, scale)
    new.load_state_dict(reference.state_dict())
    return reference.to(**to), new.to(**to)


def eager(x, weight, bias, scale):
    z = nn.functional.linear(x, weight, bias)
    return torch.sigmoid(z) * scale + z


def peak_bytes(function):
    """Bytes asked for at the worst moment of a call, beyond what was before it; the second call, without its set-up.

    Asked for, not allocated: the allocator gives a free block that is up to 1 MiB larger as it is.
    """
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = function()
    torch.cuda.synchronize()
    del out
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def poison(t_bytes, device):
    """Leaves NaN in the memory that the next allocation of this size on a GPU is likely to get."""
    if device != "cpu":
        block = torch.full((max(1, t_bytes // 4),), float("nan"), device=device)
        del block
