"""Random calls of the layer, and how far each result may be from float64's.

`draw` makes a `Case`, all of one call, from a random.Random; `run` makes that call and raises AssertionError where a
result is outside its bound, or GuardError where memory was touched that is none of the call's. A case prints as what
remakes it. Everything works on the CPU and on a GPU; the reference is computed there, in float64.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from reference import DTYPES, compute_roundoff, storage_roundoff
from tiles import tiles

import model_new
from bench import bindings

PRECISIONS = ("highest", "high", "medium")
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


# ------------------------------------------------------------------------------------------------- the bounds


@dataclass(frozen=True)
class Arithmetic:
    """How a matrix product A·Bᵀ + c (A [M, K], B [N, K], c [N]) is computed, and so how far it may be off.

    kernel: a name from select_kernel. correlated: whether the numbers may round alike, as equal ones do.

    With u the unit roundoff of the arithmetic (2^-24, or 2^-53 for float64), and relative to |A|·|B|ᵀ:

    - The numbers that are multiplied. As they are: no error. "fp16x3": as hi + lo, each to 2^-23, and lo·lo, at most
      2^-22, left out: 2^-21. "fp16x1" and "fp16x1_staged": rounded to 11 bits, 2^-11 each. TF32 (the library at 'high'
      and 'medium'): 11 bits, rounded or cut off, which is not documented: 2^-10 each. bfloat16 (the CPU at 'medium'): 8
      bits, 2^-8 each. Products of two such errors are small beside them: a hundredth more.
    - The additions of t terms, relative to |A|·|B|ᵀ + |c|. In float32 and float64: min(t, 8√t)·u, where t·u is certain
      and λ√t·u, λ = 8, fails for one element in 10^13 if roundings are independent (Higham and Mary, 2019); t·u where
      they are not. On tensor cores, which cut off: 2u a term. "fp16x3": 12 wgmmas a block of 64 k at 2u, then the
      blocks' sums, those of up to 8 parts of K, up to 8 outliers of the row and c, rounded. The float64 reference's own
      sum comes on top.

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
            return 12 * 2 * u + self._rounded(-(-k // 64) + 16 + with_c, u) + reference
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
            blocks_a, blocks_b = (torch.nn.functional.pad(t, padding).unflatten(1, (-1, 64)) for t in (a, b))
            floor = 2.0**-39 * (largest * columns + blocks_a.sum(2) @ blocks_b.amax(2).T)
            return floor + (k // 64 + 18) * (2.0**-149 + 2.0**-163 * largest)
        if self.dtype == torch.float16 or (self.dtype != torch.bfloat16 and self._of_operands() == 0):
            return k * SMALLEST[torch.float64 if self.dtype == torch.float64 else torch.float32]
        floor = 2.0**-126 * (rows + columns + 2 * k)
        if self.kernel.startswith("fp16x1"):
            floor = floor + 2.0**-39 * largest * columns + 2.0**-37 * rows * b.amax(1)
        return floor

    def product(self, a, b, c=None, a_bound=None):
        """(A·Bᵀ + c, its bound), both float64 [M, N], where A itself is known to `a_bound`; before any rounding to 16
        bits."""
        exact, magnitude = a @ b.T, a.abs() @ b.abs().T
        bound = self._floor(a.abs(), b.abs())
        if a_bound is not None:
            moved = a_bound @ b.abs().T
            magnitude, bound = magnitude + moved, bound + moved
        bound = bound + self._of_operands() * magnitude
        if c is not None:
            exact, magnitude = exact + c, magnitude + c.abs()
        return exact, bound + self._of_sum(a.shape[1], c is not None) * magnitude

    def stored(self, exact, bound):
        """The bound after one rounding to the storage type."""
        return bound + storage_roundoff(self.dtype) * (exact.abs() + bound) + SMALLEST[self.dtype]


class Expected:
    """z and out of the layer in float64 on the tensors' device, with bounds, and gradients for a gradient of out.

    x [..., K], weight [N, K], bias [N], finite; `arithmetic` says how x·Wᵀ + b is computed.
    z      Arithmetic's bound. In 16 bits z is rounded, and before it, where the library adds the bias in a step of its
           own, the product; "wgmma16" keeps z in float32 unless a gradient is wanted.
    out    what z's error becomes, (1 + |s|/4)·z_bound, as σ' ≤ 1/4; σ to 8u relative (exp 2 ulp, add, reciprocal
           1 ulp), times s, added: 10u·|s|·σ + u·|out|; one rounding to 16 bits.
    """

    def __init__(self, x, weight, bias, scale, arithmetic, with_gradient):
        self.arithmetic, self.scale, self.shape = arithmetic, scale, (*x.shape[:-1], len(weight))
        self.x, self.weight, bias = (
            t.detach().double() for t in (x.flatten(0, -2) if x.dim() > 1 else x[None], weight, bias)
        )
        u = compute_roundoff(arithmetic.dtype)
        self.z, bound = arithmetic.product(self.x, self.weight, bias)
        if arithmetic.kernel != "wgmma16" or with_gradient:
            if arithmetic.kernel != "wgmma16":
                bound = arithmetic.stored(self.z - bias, bound)
            bound = arithmetic.stored(self.z, bound)
        self.z_bound, self.sigmoid = bound, torch.sigmoid(self.z)
        self.out = self.z + scale * self.sigmoid
        epilogue = 10 * u * abs(scale) * self.sigmoid + u * self.out.abs()
        self.out_bound = arithmetic.stored(self.out, (1 + abs(scale) / 4) * self.z_bound + epilogue)

    def good(self, out):
        """For each element of a tensor [..., N], whether it is this layer's: bool [M, N]."""
        return within(out.detach().reshape(self.out.shape), self.out, self.out_bound, self.z.abs() + self.z_bound)

    def check(self, out):
        assert out.shape == self.shape, f"out: shape {list(out.shape)}, expected {list(self.shape)}"
        assert out.dtype == self.arithmetic.dtype, f"out: {out.dtype}"
        assert out.is_contiguous(), f"out is not contiguous: strides {out.stride()}"
        assert_good(self.good(out), out, self.out, self.out_bound, "out")

    def check_gradients(self, grad, gradients):
        """`gradients`: (dx, dW, db) for a gradient `grad` of out, None where one was not wanted.

        dz = grad·(1 + sσ(1 − σ)): |d²out/dz²| ≤ |s|/10 turns z_bound into an error of dz, the rest is a few roundings.
        dx = dz·W and dW = dzᵀ·x, over N and over the M rows, are the library's, or in float32 at 'highest' those of
        "fp16x3": either. db is a sum over the rows.
        """
        a = self.arithmetic
        grad = grad.double().reshape(self.z.shape)
        dz = grad * (1 + self.scale * self.sigmoid * (1 - self.sigmoid))
        roundings = 20 * compute_roundoff(a.dtype) * (1 + abs(self.scale) / 4)
        dz_bound = a.stored(dz, grad.abs() * (abs(self.scale) / 10 * self.z_bound + roundings))
        kernels = ["cpu" if a.kernel == "cpu" else "library"]
        if kernels == ["library"] and a.dtype == torch.float32 and a.precision == "highest":
            kernels.append("fp16x3")
        products = [Arithmetic(a.dtype, kernel, a.precision, a.correlated) for kernel in kernels]
        a_sum = [Arithmetic(a.dtype, "cpu", "highest", a.correlated)]  # no matrix product: its terms are what they are
        for name, gradient, left, left_bound, right, ways in (
            ("dx", gradients[0], dz, dz_bound, self.weight.T, products),
            ("dW", gradients[1], dz.T, dz_bound.T, self.x.T, products),
            ("db", gradients[2], dz.T, dz_bound.T, dz.new_ones(1, len(dz)), a_sum),
        ):
            if gradient is not None:
                exact = left @ right.T
                bounds = [way.product(left, right, a_bound=left_bound)[1] for way in ways]
                bound = a.stored(exact, torch.stack(bounds).amax(0))
                assert gradient.dtype == a.dtype, f"{name}: {gradient.dtype}"
                gradient = gradient.reshape(exact.shape)
                assert_good(within(gradient, exact, bound), gradient, exact, bound, name)


def within(actual, exact, bound, reach=0.0):
    """|actual − exact| ≤ bound, elementwise; false for NaN.

    Inf of the right sign is good where the exact value, or what comes before it (`reach`, absolute), may be beyond the
    type's largest number.
    """
    largest = torch.finfo(actual.dtype).max
    error = (actual.double() - exact).abs()
    overflowed = actual.isinf() & (actual.sign() == exact.sign())
    return (error <= bound) | (overflowed & ((exact.abs() + bound).clamp_min(reach) >= largest))


def assert_good(good, actual, exact, bound, what):
    if not good.all():
        error = (actual.detach().reshape(exact.shape).double() - exact).abs()
        badness = torch.where(good, -1.0, (error / bound).nan_to_num(nan=torch.inf))
        at = tuple(divmod(badness.argmax().item(), exact.shape[1]))
        raise AssertionError(
            f"{what}: {(~good).sum().item()} of {good.numel()} elements are outside their bound; worst at {at}: "
            f"{actual.reshape(exact.shape)[at].item()!r}, expected {exact[at].item()!r} to {bound[at].item():.3g}"
        )


@contextmanager
def settings(precision):
    """PyTorch's float32 precision, and 16-bit GEMMs that add their partial sums in float32, as the bounds want it."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before, before_precision = {name: getattr(matmul, name) for name in names}, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        torch.set_float32_matmul_precision(before_precision)
        for name, value in before.items():
            setattr(matmul, name, value)


@contextmanager
def any_tile(index, dtype, k):
    """On Hopper, kernels.cu's fused kernel whatever the size, with one of its tiles for x of this dtype and K: `index`
    counts them around. None: what is selected.
    """
    if index is None or dtype == torch.float64:
        yield
        return
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    kernels = ("wgmma16",) if dtype.itemsize == 2 else ("fp16x1", "fp16x1_staged") if tf32 else ("fp16x3",)
    all_tiles = [tile for kernel in kernels for tile in tiles(kernel, k)]
    with bindings.forced(*all_tiles[index % len(all_tiles)]):
        yield


@contextmanager
def one_thread():
    """On a busy machine, threads that wait for each other make small products on the CPU many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------- data, and where it lies

# Powers of ten for float16 (whose numbers end at 65504), and for the others.
_WIDE, _ROWS, _TINY, _HUGE, _OUTLIER = (2, 6), (2, 10), (-5, -18), (2, 15), (2, 6)
_EQUAL = 2 - 2.0**-9  # fits every type but bfloat16, with the last of its bits set


def _normal(shape, power, **on):
    return torch.randn(shape, **on)


def _graded(shape, **on):
    return 2 * torch.rand(shape, **on) - 1


def _zero_rows(shape, power, **on):
    return torch.randn(shape, **on) * (torch.rand(shape[0], *(1 for _ in shape[1:]), **on) < 0.75)


DATA = {  # name: function of a shape [rows, ...], of which of two powers of ten, and of where to draw
    "normal": _normal,
    "uniform": lambda shape, power, **on: torch.rand(shape, **on),
    "wide range": lambda shape, power, **on: torch.randn(shape, **on) * 10 ** (power(_WIDE) * _graded(shape, **on)),
    "rows of other scales": lambda shape, power, **on: (
        torch.randn(shape, **on) * 10 ** (power(_ROWS) * _graded((shape[0], *(1 for _ in shape[1:])), **on))
    ),
    "zero rows": _zero_rows,
    "zero": lambda shape, power, **on: torch.zeros(shape, dtype=torch.float64, device=on["device"]),
    "nine in ten zero": lambda shape, power, **on: torch.randn(shape, **on) * (torch.rand(shape, **on) < 0.1),
    "outliers": lambda shape, power, **on: (
        torch.randn(shape, **on) * (1 + 10 ** power(_OUTLIER) * (torch.rand(shape, **on) < 0.01))
    ),
    "small": lambda shape, power, **on: torch.randn(shape, **on) * 10.0 ** power(_TINY),
    "large": lambda shape, power, **on: torch.randn(shape, **on) * 10.0 ** power(_HUGE),
    "equal": lambda shape, power, **on: torch.full(shape, _EQUAL, dtype=torch.float64, device=on["device"]),
}


def values(kind, shape, dtype, device, generator):
    """Finite numbers of that kind; tensor of `shape`, at least one dimension."""
    on = {"dtype": torch.float64, "device": device, "generator": generator}
    drawn = DATA[kind](shape, lambda powers: powers[dtype != torch.float16], **on)
    largest = torch.finfo(dtype).max
    return drawn.clamp_(-largest, largest).to(dtype)


LAYOUTS = (
    *("contiguous", "unaligned", "wider rows", "wider rows of odd length", "every other row", "every other column"),
    *("transposed", "dimensions reversed", "expanded", "flipped", "negative view"),
)
GUARD = 64  # elements before and after


def place(contents, layout):
    """(a tensor with these contents, whose elements lie in memory as `layout` says; the buffer [bytes] it lies in).

    All else in the buffer is NaN, in any type: before, behind and between. "expanded": contents are the first row's.
    "flipped": as torch.flip leaves it, which is a tensor of its own.
    """
    if layout == "flipped":
        inside, buffer = place(contents.flip(0), "transposed")
        return inside.flip(0), buffer
    if layout == "negative view":
        inside, buffer = place(-contents, "contiguous")
        return torch._neg_view(inside), buffer
    dim, order = contents.dim(), list(range(contents.dim()))
    if layout == "transposed":
        order[-2:] = reversed(order[-2:])
    elif layout == "dimensions reversed":
        order.reverse()
    steps, span, strides = {"every other row": dim - 2, "every other column": dim - 1}, 1, [0] * dim
    for d in reversed(order):
        strides[d] = span * (2 if steps.get(layout) == d else 1)
        span = strides[d] * max(1, contents.shape[d])
        if d == order[-1]:
            span += {"wider rows": 8, "wider rows of odd length": 3}.get(layout, 0)
    if layout == "expanded":
        strides[0] = 0
    before, itemsize = GUARD + (layout == "unaligned"), contents.element_size()
    buffer = torch.full(((before + span + GUARD) * itemsize,), 255, dtype=torch.uint8, device=contents.device)
    inside = buffer.view(contents.dtype).as_strided(contents.shape, strides, before)
    if layout == "expanded":
        inside[:1].copy_(contents[:1])
    else:
        inside.copy_(contents)
    return inside, buffer


class GuardError(AssertionError):
    """Memory was changed that is none of the call's."""


def memory_at(pointer, size, device):
    """`size` bytes from an address on, as a tensor that does not own them."""
    storage = torch._C._construct_storage_from_data_pointer(pointer, torch.device(device), size)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class ResultGuard:
    """Free memory, NaN in any type, where a call is likely to put results of these sizes (bytes): each between two
    blocks that stay allocated, and are looked at afterwards. On a GPU PyTorch's allocator gives the block that fits
    best, in multiples of 512 bytes: so there what follows a result within its own block is looked at, too.
    """

    def __init__(self, sizes, device):
        sizes = [512 * max(1, -(-size // 512)) for size in sizes]
        blocks = [[torch.full((size,), 255, dtype=torch.uint8, device=device) for _ in range(3)] for size in sizes]
        self.held = [block for before, _, after in blocks for block in (before, after)]
        self.freed = {middle.data_ptr(): len(middle) for _, middle, _ in blocks}

    def check(self, results):
        """Raises GuardError; returns how many of the results lie in the guarded memory.

        results: such that nothing which was allocated before them, since this guard was made, was freed before them.
        """
        if not all((block == 255).all() for block in self.held):
            raise GuardError("memory beside the results was written")
        guarded = [t for t in results if t.nbytes <= self.freed.get(t.data_ptr(), -1)]
        for t in guarded:
            tail = -t.nbytes % 512
            if t.is_cuda and tail and not (memory_at(t.data_ptr() + t.nbytes, tail, t.device) == 255).all():
                raise GuardError("memory just behind a result was written")
        return len(guarded)


# ------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One call. leading: x's dimensions before K. gradient: of which of "x", "w" and "b" it is wanted, as a string.
    module: by a ModelNew, not by the operator. tile: for any_tile.
    """

    leading: tuple
    n: int
    k: int
    dtype: str
    precision: str
    scale: float
    data: tuple  # of x, weight and bias
    layout: tuple
    gradient: str
    module: bool
    seed: int
    tile: int | None = None


EDGES = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 130, 191, 192, 251, 255, 256)
EDGES += (257, 509, 511, 512, 513, 520, 1000, 1021, 1024, 1025, 2048, 2053, 3001)  # many of them primes
# Where kernels of the GPU's own serve: enough rows, K of some size and often in multiples of 16 bytes.
SERVED_M = (1, 2, 16, 17, 32, 48, 64, 100, 128, 129, 255, 257, 384, 512, 1000, 1025, 1153, 2049)
SERVED_N = (8, 64, 127, 128, 130, 256, 520, 1000, 1024, 2048, 2100, 2304)
SERVED_K = (512, 516, 520, 576, 640, 768, 1000, 1024, 1028, 1536, 2048, 2056, 4096, 8196)
LARGE = (  # M, N, K for which select_tile says "fp16x1", "fp16x1_staged" and "wgmma16"; and the reference shape
    *((16, 8192, 8192), (63, 8200, 8192), (512, 6400, 4096), (1000, 5000, 2560)),
    *((2048, 2048, 3072), (2049, 2300, 2564), (2500, 2100, 2563), (201, 6007, 7117), (1024, 8192, 8192)),
)
SCALES = (2.0, 2.0, 0.0, -0.0, 1.0, -1.0, 0.3, -3.0, 1e3, -1e3)


@dataclass(frozen=True)
class Limits:
    """How large a case may be: M·N·K, and elements of a tensor. `large`: one in so many is of LARGE all the same; 0:
    none.
    """

    work: int
    elements: int
    large: int = 0

    def hold(self, m, n, k):
        return m * n * k <= self.work and max(m * n, m * k, n * k) <= self.elements


ON_CPU = Limits(work=2**21, elements=2**18)
ON_GPU = Limits(work=2**32, elements=2**24, large=25)


def draw(random, limits):
    """A Case, from a random.Random or from hypothesis' own, for which the first of each choice is the simplest."""

    def one_in(count):
        return random.randrange(count) == count - 1

    choices = (SERVED_M, SERVED_N, SERVED_K) if one_in(2) else (EDGES, EDGES, EDGES)
    sizes = [random.choice(some) for some in choices]
    while not limits.hold(*sizes):
        which = random.choice([i for i in range(3) if sizes[i] > 32])
        sizes[which] = EDGES[_edge_below(sizes[which]) - 6]  # about half of it, or a quarter
    m, n, k = random.choice(LARGE) if limits.large and one_in(limits.large) else sizes
    dim = random.choice((2, 1, 3, 4))
    outer = [random.choice((1, 2, 3, 5)) for _ in range(dim - 2)]
    leading = (*outer, m // math.prod(outer)) if dim > 1 else ()
    plain = one_in(2)  # as nn.Linear's are
    layouts = ("contiguous",) if plain else LAYOUTS
    data = tuple(DATA)
    return Case(
        leading=leading,
        n=n,
        k=k,
        dtype=str(random.choice((torch.float32, *DTYPES))).removeprefix("torch."),
        precision=random.choice(PRECISIONS),
        scale=random.choice((*SCALES, *(random.randrange(-1000, 1000) + 0.37 for _ in range(3)))),
        data=(
            random.choice(data),
            random.choice(data),
            random.choice(("normal", "zero", "rows of other scales", "equal")),
        ),
        layout=tuple(random.choice(layouts) for _ in range(3)),
        gradient=random.choice(("", "", "", "xwb", "wb", "x", "w", "b")),
        module=one_in(2),
        seed=random.randrange(2**31),
        tile=random.randrange(18) if one_in(2) else None,
    )


def _edge_below(size):
    """The index of the largest edge that is no larger."""
    return max(i for i, edge in enumerate(EDGES) if edge <= size)


def tensors_of(case, device):
    """((x, weight, bias), their buffers), without gradients. W is of size 1/√K, as layers have it."""
    dtype, generator = getattr(torch, case.dtype), torch.Generator(device).manual_seed(case.seed)
    shapes = ((*case.leading, case.k), (case.n, case.k), (case.n,))
    tensors, buffers = [], []
    for which, shape in enumerate(shapes):
        contents = values(case.data[which], shape, dtype, device, generator)
        if which == 1:
            contents = contents / max(case.k, 1) ** 0.5
        if case.layout[which] == "expanded" and shape[0]:
            contents = contents[:1].expand(shape)
        tensor, buffer = place(contents, case.layout[which])
        assert torch.equal(tensor, contents)
        tensors.append(tensor)
        buffers.append(buffer)
    return tensors, buffers


@dataclass(frozen=True)
class Outcome:
    kernel: str
    inputs_guarded: int
    results_guarded: int


def run(case, device):
    """Makes the call and returns an Outcome.

    AssertionError: a result is not the layer's. GuardError: a byte of the buffers in which x, W and b lie, or of what
    lies beside the results, is not what it was.
    """
    with settings(case.precision), any_tile(case.tile, getattr(torch, case.dtype), case.k):
        return _run(case, device)


def _run(case, device):
    (x, weight, bias), buffers = tensors_of(case, device)
    before = [buffer.clone() for buffer in buffers]
    leaves = []
    for name, tensor in zip("xwb", (x, weight, bias)):
        # The module's are parameters, the operator's plain tensors.
        wanted = name in case.gradient
        parameter = case.module and name != "x"
        leaves.append(torch.nn.Parameter(tensor, wanted) if parameter else tensor.detach().requires_grad_(wanted))
    arithmetic = Arithmetic(x.dtype, model_new.select_kernel(*leaves), case.precision, "equal" in case.data[:2])
    grad = values("normal", (*x.shape[:-1], case.n), x.dtype, device, torch.Generator(device).manual_seed(case.seed))
    if case.module:
        with torch.device("meta"):
            module = model_new.ModelNew(case.k, case.n, case.scale)
        module.gemm.weight, module.gemm.bias = leaves[1:]

    size = math.prod(grad.shape) * grad.element_size()
    guard = ResultGuard([size, *([size] if case.gradient else []), *([4 * x.numel()] if x.is_cuda else [])], device)
    out = module(leaves[0]) if case.module else model_new.linear_sigmoid_residual(*leaves, case.scale)
    assert out.requires_grad == bool(case.gradient), f"out.requires_grad is {out.requires_grad}"
    gradients = [None] * 3
    if case.gradient:
        wanted = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], grad))
        gradients = [next(wanted) if leaf.requires_grad else None for leaf in leaves]

    if not all(torch.equal(buffer, copy) for buffer, copy in zip(buffers, before)):
        raise GuardError("x, W or b, or memory beside or between their rows, was written")
    expected = Expected(x, weight, bias, case.scale, arithmetic, bool(case.gradient))
    expected.check(out.detach())
    assert not out._is_view(), "out is a view"
    expected.check_gradients(grad, gradients)
    # With a gradient, out comes after z, for which x may have been copied.
    return Outcome(arithmetic.kernel, len(buffers), guard.check([] if case.gradient else [out]))
