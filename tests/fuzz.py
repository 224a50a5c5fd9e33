"""Random calls of the layer, and where their tensors lie in memory.

`draw` makes a `Case`, all of one call, from a random.Random; `run` makes that call and raises AssertionError where a
result is outside its bound (reference.Expected), or GuardError where memory was touched that is none of the call's. A
case prints as what remakes it. Everything works on the CPU and on a GPU.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from reference import DTYPES, OURS, Expected, ways_of
from tiles import by_tile, is_hopper, tiles

import model_new

SETTINGS = [(torch.float32, "highest"), (torch.float32, "high"), *((dtype, "highest") for dtype in DTYPES[1:])]


@contextmanager
def settings(precision):
    """PyTorch's float32 precision, and 16-bit GEMMs that add their partial sums in float32, as the bounds want it."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before, before_precision = [getattr(matmul, name) for name in names], torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        torch.set_float32_matmul_precision(before_precision)
        for name, value in zip(names, before):
            setattr(matmul, name, value)


@contextmanager
def one_thread():
    """On a busy machine, threads that wait for each other make small products on the CPU many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------- data, and where it lies

DATA = (
    *("normal", "uniform", "wide range", "rows of other scales", "zero rows", "zero", "nine in ten zero", "outliers"),
    *("small", "large", "equal"),
)


def values(kind, shape, dtype, device, generator):
    """Finite numbers of that kind of DATA; tensor of `shape`, at least one dimension."""
    on = {"dtype": torch.float64, "device": device, "generator": generator}
    column = shape[0], *[1] * (len(shape) - 1)
    wide = dtype != torch.float16  # whose numbers end at 65504

    def normal():
        return torch.randn(shape, **on)

    def uniform(shape=shape):
        return torch.rand(shape, **on)

    drawn = {
        "normal": normal,
        "uniform": uniform,
        "wide range": lambda: normal() * 10 ** ((6 if wide else 2) * (2 * uniform() - 1)),
        "rows of other scales": lambda: normal() * 10 ** ((10 if wide else 2) * (2 * uniform(column) - 1)),
        "zero rows": lambda: normal() * (uniform(column) < 0.75),
        "zero": lambda: 0 * uniform(),
        "nine in ten zero": lambda: normal() * (uniform() < 0.1),
        "outliers": lambda: normal() * (1 + 10 ** (6 if wide else 2) * (uniform() < 0.01)),
        "small": lambda: normal() * (1e-18 if wide else 1e-5),
        "large": lambda: normal() * (1e15 if wide else 1e2),
        "equal": lambda: 0 * uniform() + (2 - 2.0**-9),  # fits every type but bfloat16, with the last of its bits set
    }[kind]()
    largest = torch.finfo(dtype).max
    return drawn.clamp_(-largest, largest).to(dtype)


LAYOUTS = (
    *("contiguous", "unaligned", "wider rows", "wider rows of odd length", "every other row", "every other column"),
    *("transposed", "dimensions reversed", "expanded", "negative view"),
)
GUARD = 64  # elements before and after


def place(contents, layout, filler=None):
    """(a tensor with these contents, whose elements lie in memory as `layout` says; the buffer [bytes] it lies in).

    All else in the buffer, before, behind and between, is `filler`, or NaN in any type. "expanded": contents are the
    first row's.
    """
    if layout == "negative view":
        inside, buffer = place(-contents, "contiguous", filler)
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
    if filler is not None:
        buffer.view(contents.dtype).fill_(filler)
    inside = buffer.view(contents.dtype).as_strided(contents.shape, strides, before)
    written = slice(1 if layout == "expanded" else None)
    inside[written].copy_(contents[written])
    return inside, buffer


class GuardError(AssertionError):
    """Memory was changed that is none of the call's."""


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
            if t.is_cuda and tail:
                storage = torch._C._construct_storage_from_data_pointer(t.data_ptr() + t.nbytes, t.device, tail)
                if not (torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage) == 255).all():
                    raise GuardError("memory just behind a result was written")
        return len(guarded)


# ------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One call of the operator.

    leading: x's dimensions before K. gradient: of which of "x", "w" and "b" it is wanted, as a string. tile: on Hopper,
    and without gradients, the fused kernel in one of its tiles, whatever the size; the number counts them around.
    """

    leading: tuple
    n: int
    k: int
    dtype: str = "float32"
    precision: str = "highest"
    scale: float = 2.0
    data: tuple = ("normal", "normal", "normal")  # of x, weight and bias
    layout: tuple = ("contiguous", "contiguous", "contiguous")
    gradient: str = ""
    seed: int = 0
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

    sizes = [random.choice(some) for some in ((SERVED_M, SERVED_N, SERVED_K) if one_in(2) else (EDGES,) * 3)]
    while not limits.hold(*sizes):
        which = random.choice([i for i in range(3) if sizes[i] > 32])
        sizes[which] = max(edge for edge in EDGES if edge <= sizes[which] // 2)
    m, n, k = random.choice(LARGE) if limits.large and one_in(limits.large) else sizes
    dim = random.choice((2, 1, 3, 4))
    outer = [random.choice((1, 2, 3, 5)) for _ in range(dim - 2)]
    layouts = ("contiguous",) if one_in(2) else LAYOUTS
    bias_data = "normal", "zero", "rows of other scales", "equal"
    return Case(
        leading=(*outer, m // math.prod(outer)) if dim > 1 else (),
        n=n,
        k=k,
        dtype=str(random.choice((torch.float32, *DTYPES))).removeprefix("torch."),
        precision=random.choice(("highest", "high", "medium")),
        scale=random.choice((*SCALES, *(random.randrange(-1000, 1000) + 0.37 for _ in range(3)))),
        data=tuple(random.choice(kinds) for kinds in (DATA, DATA, bias_data)),
        layout=tuple(random.choice(layouts) for _ in range(3)),
        gradient=random.choice(("", "", "", "xwb", "wb", "x", "w", "b")),
        seed=random.randrange(2**31),
        tile=random.randrange(18) if one_in(2) else None,
    )


def tensors_of(case, device):
    """((x, weight, bias), their buffers), without gradients. W is of size 1/√K, as layers have it."""
    dtype, generator = getattr(torch, case.dtype), torch.Generator(device).manual_seed(case.seed)
    placed = []
    for which, shape in enumerate(((*case.leading, case.k), (case.n, case.k), (case.n,))):
        contents = values(case.data[which], shape, dtype, device, generator)
        if which == 1:
            contents = contents / max(case.k, 1) ** 0.5
        if case.layout[which] == "expanded" and shape[0]:
            contents = contents[:1].expand(shape)
        placed.append(place(contents, case.layout[which]))
        assert torch.equal(placed[-1][0], contents)
    return zip(*placed)


def tile_of(case, x, weight):
    """The tile that a case asks for, or None, as where W's rows are not contiguous and only the library serves."""
    kernels = OURS.get((x.dtype, case.precision), ()) if x.is_cuda and is_hopper and weight.stride(1) == 1 else ()
    if case.tile is None or case.gradient or not (kernels and x.numel() and weight.numel()):
        return None
    all_tiles = [tile for kernel in kernels for tile in tiles(kernel, case.k)]
    return all_tiles[case.tile % len(all_tiles)]


def run(case, device):
    """Makes the call and returns the name of the kernel that served it.

    AssertionError: a result is not the layer's. GuardError: a byte of the buffers in which x, W and b lie, or of what
    lies beside the results, is not what it was.
    """
    with settings(case.precision):
        return _run(case, device)


def _run(case, device):
    (x, weight, bias), buffers = tensors_of(case, device)
    before = [buffer.clone() for buffer in buffers]
    leaves = [t.detach().requires_grad_(name in case.gradient) for name, t in zip("xwb", (x, weight, bias))]
    tile = tile_of(case, x, weight)
    kernel = tile[0] if tile else model_new.select_kernel(*leaves)
    grad = values("normal", (*x.shape[:-1], case.n), x.dtype, device, torch.Generator(device).manual_seed(case.seed))

    of_x = [4 * x.numel()] if x.is_cuda else []
    guard = ResultGuard([grad.nbytes] * (2 if case.gradient else 1) + of_x, device)
    if tile:
        out = by_tile(tile, *(t.resolve_neg() for t in (x, weight, bias)), case.scale)
    else:
        out = model_new.linear_sigmoid_residual(*leaves, case.scale)
    assert out.requires_grad == bool(case.gradient), f"out.requires_grad is {out.requires_grad}"
    gradients = [None] * 3
    if case.gradient:
        wanted = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], grad))
        gradients = [next(wanted) if leaf.requires_grad else None for leaf in leaves]

    if not all(torch.equal(buffer, copy) for buffer, copy in zip(buffers, before)):
        raise GuardError("x, W or b, or memory beside or between their rows, was written")
    assert out.is_contiguous(), f"out is not contiguous: strides {out.stride()}"
    ways = ways_of(x, kernel, "equal" in case.data[:2])
    expected = Expected(x, weight, bias, case.scale, ways, with_z=bool(case.gradient))
    expected.check(out)
    assert not out._is_view(), "out is a view"
    expected.check_gradients(grad, gradients)
    guard.check([] if case.gradient else [out])  # with a gradient, out comes after z, for which x may have been copied
    return kernel
