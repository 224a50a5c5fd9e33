"""Times the layer beside its rivals, checks its accuracy beside SGEMM's, and measures its epilogue and its host cost.

    python bench/reference.py                         everything, on the reference shape
    python bench/reference.py --sections time,host    some of it
    python bench/reference.py --help

Needs a CUDA device. JAX is a rival where it is installed. What is compared is timed in one run, in turns. Writes
bench/results/<gpu>.json: a list of rows, and for each section one of section 'conditions'.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:
    sys.exit("bench/reference.py needs triton, a rival here; PyTorch's CUDA builds for Linux bring it")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model_new
from bench import bindings
from bench.tables import some_of
from model_new import Model, ModelNew, errors_against_float64, linear_sigmoid_residual, select_kernel, times_in_turns

SCALE = model_new.scaling_factor
DEVICE = "cuda"
WARM_UP_SECONDS = 1.0  # of the timed work itself, so that clocks and power have settled
HOST_SHAPE = 8, 32, 16  # M, K, N: kernels shorter than their launches
CONDITIONS = {"sm_clock_mhz": "MHz", "power_w": "W", "temperature_c": "°C"}  # as sampled: name, unit
STEADY_SECONDS = 3.0  # of a load whose power is measured: nvidia-smi's is a mean over the last second
HOST_BLOCK = 50  # calls between two synchronizations: with backward under 1000 launches, which the queue holds


# ---------------------------------------------------------------- the rival: Triton, TF32 or several 16-bit products


def _config(tile_m, tile_n, tile_k, warps, stages):
    tiles = {"tile_m": tile_m, "tile_n": tile_n, "tile_k": tile_k, "group_m": 8}
    return triton.Config(tiles, num_warps=warps, num_stages=stages)


@triton.autotune(
    [
        _config(128, 128, 32, warps=8, stages=4),
        _config(128, 128, 64, warps=8, stages=3),
        _config(64, 128, 32, warps=4, stages=3),
        _config(128, 256, 32, warps=8, stages=3),  # spills some registers; as wide as the accumulators allow
    ],
    key=["rows", "k", "n", "input_precision"],
)
@triton.jit
def triton_layer_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, rows, k, n, scale, input_precision: tl.constexpr,
    tile_m: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr, group_m: tl.constexpr,
):  # fmt: skip
    # Tiles run in groups of group_m rows of tiles, column by column: neighbours in time share x and W in L2.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(rows, tile_m)
    tiles_per_group = group_m * tl.cdiv(n, tile_n)
    first_m = pid // tiles_per_group * group_m
    group_size = min(tiles_m - first_m, group_m)
    m = (first_m + pid % tiles_per_group % group_size) * tile_m + tl.arange(0, tile_m)
    col = (pid % tiles_per_group // group_size) * tile_n + tl.arange(0, tile_n)
    at_k = tl.arange(0, tile_k)
    # Rows past the edge wrap around instead of being masked: what they compute is never stored.
    x_tile = x_ptr + (m % rows).to(tl.int64)[:, None] * k + at_k[None, :]
    w_tile = w_ptr + (col % n).to(tl.int64)[None, :] * k + at_k[:, None]
    z = tl.zeros((tile_m, tile_n), dtype=tl.float32)
    for start in range(0, k, tile_k):
        a = tl.load(x_tile, mask=at_k[None, :] < k - start, other=0.0)
        b = tl.load(w_tile, mask=at_k[:, None] < k - start, other=0.0)
        z = tl.dot(a, b, z, input_precision=input_precision)
        x_tile += tile_k
        w_tile += tile_k
    z += tl.load(bias_ptr + col, mask=col < n, other=0.0)[None, :]
    out = z + scale * tl.sigmoid(z)
    inside = (m[:, None] < rows) & (col[None, :] < n)
    tl.store(out_ptr + m.to(tl.int64)[:, None] * n + col[None, :], out, mask=inside)


def triton_layer(x, weight, bias, scale, input_precision):
    """The layer for contiguous float32 x [M, K], weight [N, K], bias [N]; input_precision: as of triton's dot."""
    (rows, k), n = x.shape, weight.shape[0]
    out = x.new_empty(rows, n)
    triton_layer_kernel[lambda tile: (triton.cdiv(rows, tile["tile_m"]) * triton.cdiv(n, tile["tile_n"]),)](
        x, weight, bias, out, rows, k, n, scale, input_precision
    )
    return out


TRITON_PRECISIONS = {"highest": ("tf32x3", "bf16x3", "bf16x6"), "high": ("tf32",), "medium": ("tf32",)}


# ------------------------------------------------------------------------------------------ the rival: JAX, XLA

# {torch.set_float32_matmul_precision: {name: a jax.lax.DotAlgorithmPreset}}
JAX_PRESETS = {
    "highest": {
        "F32": "F32_F32_F32",
        "TF32x3": "TF32_TF32_F32_X3",
        "BF16x6": "BF16_BF16_F32_X6",
        "BF16x9": "BF16_BF16_F32_X9",
    },
    "high": {"TF32": "TF32_TF32_F32"},
    "medium": {"TF32": "TF32_TF32_F32"},
}
JAX_BLOCK = 10  # calls between two waits, so that a wait costs each call little


class JaxLayer:
    """The layer on PyTorch's tensors, compiled by XLA at the first call; preset: of jax.lax.DotAlgorithmPreset.

    JAX runs on a stream of its own, which neither PyTorch's events nor its flushes of the L2 cache wait for. So it is
    timed by the wall clock, `JAX_BLOCK` calls back to back. The cache is not flushed, which matters little on the
    reference shape: W is 268 MB, the cache 50 MB.
    """

    TIMING = "wall clock, calls back to back"

    def __init__(self, preset, x, weight, bias):
        self.preset, self.tensors = preset, (x, weight, bias)

    @functools.cached_property
    def call(self):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or JAX takes three quarters of the GPU's memory
        import jax

        algorithm = jax.lax.DotAlgorithmPreset[self.preset]

        @jax.jit
        def layer(x, weight, bias):
            z = jax.numpy.dot(x, weight.T, precision=algorithm) + bias
            return z + SCALE * jax.nn.sigmoid(z)

        return functools.partial(layer, *(jax.dlpack.from_dlpack(t.detach()) for t in self.tensors))

    def __call__(self):
        return torch.from_dlpack(self.call().block_until_ready())

    def block(self):
        for _ in range(JAX_BLOCK):
            out = self.call()
        out.block_until_ready()


def jax_layers(precision, x, weight, bias):
    """{name: JaxLayer} for each preset of this precision; none where JAX is not installed."""
    if importlib.util.find_spec("jax") is None:
        return {}
    presets = JAX_PRESETS[precision]
    return {f"JAX {name}": JaxLayer(preset, x, weight, bias) for name, preset in presets.items()}


# ------------------------------------------------------------------------------------------------- measuring


def timed(functions, repeats):
    """{name: (median, p10, p90) in ms} of a dict of functions, in turns; JAX's after the others, in blocks."""
    blocks = {name: function.block for name, function in functions.items() if isinstance(function, JaxLayer)}
    others = {name: function for name, function in functions.items() if name not in blocks}
    times = times_in_turns(others, repeats, WARM_UP_SECONDS)
    if blocks:
        of_blocks = times_in_turns(blocks, max(2, repeats // 3), WARM_UP_SECONDS, wall_clock=True)
        times |= {name: [ms / JAX_BLOCK for ms in samples] for name, samples in of_blocks.items()}
    return {name: spread(times[name]) for name in functions}


def spread(values):
    """(median, p10, p90)"""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), deciles[0], deciles[8]


def scratch_megabytes(function):
    """What a call holds at its peak, in PyTorch's allocator, beyond the tensor it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function()
    return max(0, torch.cuda.max_memory_allocated() - before - out.nbytes) / 1e6


def row(arguments, section, name, shape, **values):
    """One object of the JSON file. Every row has these keys; what does not apply is null."""
    keys = ["kernel", "ms", "p10", "p90", "speedup", "ratio_to_fp16", "error_frobenius", "error_componentwise"]
    return {
        "section": section,
        "name": name,
        "precision": arguments.precision,
        "dtype": "float32",
        "shape": list(shape),
        **dict.fromkeys(keys),
        **values,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
    }


@contextlib.contextmanager
def sampled_conditions():
    """A list that nvidia-smi fills, five times a second, with (SM clock in MHz, power in W, temperature in °C).

    Empty where nvidia-smi is missing or does not know these: the times stand without it.
    """
    samples = []
    device = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    query = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", device, query, "--format=csv,noheader,nounits", "-lms", "200"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield samples
        return

    def read():
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # a heading, or [N/A]
                sm_clock, power, temperature = map(float, line.split(","))
                samples.append((sm_clock, power, temperature))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield samples
    finally:
        process.kill()
        reader.join(timeout=5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def conditions_row(samples, name, precision=None, **values):
    """A row of section 'conditions': {median, min, max} of what was sampled while the section of that name was
    measured, or null, and what else is given.
    """
    for key, column in zip(CONDITIONS, zip(*samples)):
        values[key] = {"median": statistics.median(column), "min": min(column), "max": max(column)}
    values = dict.fromkeys(CONDITIONS) | values
    return row(argparse.Namespace(precision=precision), "conditions", name, (), dtype=None, **values)


def described_conditions(conditions):
    """One line of a row of section 'conditions'."""
    sampled = [(unit, conditions[key]) for key, unit in CONDITIONS.items() if conditions[key]]
    texts = [f"{of['median']:g} {unit} ({of['min']:g} to {of['max']:g})" for unit, of in sampled]
    return "median (min to max): " + ", ".join(texts) if texts else "conditions not sampled"


def draw_bar(done, total, text):
    """A bar and what it stands at: a line on stderr, redrawn, where that is a terminal. Returns whether it is."""
    if sys.stderr.isatty():
        line = f"[{'#' * (40 * done // total):.<40}] {done}/{total} {text}"
        print(f"\r{line[:110]:110}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    return sys.stderr.isatty()


COLUMNS = {  # a row's key: heading, width and format
    "ms": ("ms", 8, "{:.4f}"),
    "p10": ("p10", 8, "{:.4f}"),
    "p90": ("p90", 8, "{:.4f}"),
    "speedup": ("speedup", 9, "{:.2f}x"),
    "ratio_to_fp16": ("/fp16", 7, "{:.2f}"),
    "ratio_to_gemm": ("/GEMM", 7, "{:.2f}"),
    "error_frobenius": ("error", 9, "{:.1e}"),
    "error_componentwise": ("compon.", 9, "{:.1e}"),
    "scratch_megabytes": ("scratch", 10, "{:.1f} MB"),
    "sm_clock_mhz": ("MHz", 7, "{:.0f}"),
    "power_w": ("W", 6, "{:.0f}"),
    "millijoules": ("mJ", 8, "{:.1f}"),
    "energy_ratio": ("/GEMM", 7, "{:.2f}"),
}


def print_table(rows):
    """The rows' columns that are not null in all of them."""
    columns = {key: how for key, how in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    title = "" if rows[0]["dtype"] == "float32" else rows[0]["dtype"]
    print(f"{title:34}" + "".join(f"{heading:>{width}}" for heading, width, _ in columns.values()))
    for row in rows:
        label = row["name"] + (f" ({row['kernel']})" if row["kernel"] else "")
        label += " *" * (row["error_of"] == "product") + " †" * ("timing" in row)
        cells = (
            f"{'–' if row.get(key) is None else text.format(row[key]):>{width}}"
            for key, (_, width, text) in columns.items()
        )
        print(f"{label:34}" + "".join(cells))


def compare(arguments, section, candidates, check, kernel, yardstick=None, repeats=None, dtype="float32"):
    """The rows of the candidates, {name: function}, which are checked, then timed in turns, and printed.

    check(name, function): what a row says besides the times, from calling the function. kernel: that serves ModelNew.
    yardstick: (key of a row, name of the candidate) for the ratio to that candidate's time.
    """
    total = len(candidates) + 1
    functions, values, failures = {}, {}, []
    for done, (name, function) in enumerate(candidates.items()):
        draw_bar(done, total, f"{section}, {dtype}: {name}")
        try:
            values[name] = check(name, function)
        except Exception as error:  # a rival that fails here must not take the other rows with it
            if name in ("eager", "ModelNew"):
                raise
            failures.append(f"{name}: not run, {' '.join(repr(error).split())[:200]}")
        else:
            functions[name] = function
    draw_bar(total - 1, total, f"{section}, {dtype}: timing")
    times = timed(functions, repeats or arguments.repeats)
    draw_bar(total, total, f"{section}, {dtype}")
    for name, (ms, p10, p90) in times.items():
        found = {"ms": ms, "p10": p10, "p90": p90}
        if yardstick:
            key, other = yardstick
            found[key] = ms / times[other][0] if other in times else None
        values[name] = found | values[name]
    print(*failures, sep="\n", end="\n" * bool(failures))
    return report(arguments, section, values, kernel, dtype)


def report(arguments, section, values, kernel, dtype):
    """The rows of candidates, from {name: what a row says}, which are printed. kernel: that serves ModelNew."""
    rows = []
    for name, found in values.items():
        found |= {"dtype": dtype, "speedup": values["eager"]["ms"] / found["ms"]}
        found["kernel"] = kernel if name == "ModelNew" else None
        rows.append(row(arguments, section, name, arguments.shape, **found))
    print_table(rows)
    return rows


# ------------------------------------------------------------------------------------------------------- time

YARDSTICK = "cuBLAS fp16, float32 output"
BARE_GEMMS = {"cuBLAS SGEMM", "cuBLAS GEMM", YARDSTICK}


def problem(shape, dtype=torch.float32):
    """Model, ModelNew with the same parameters, and x."""
    rows, k, n = shape
    models = []
    for kind in (Model, ModelNew):
        torch.manual_seed(0)
        models.append(kind(k, n, SCALE).to(DEVICE, dtype))
    return *models, torch.rand(rows, k, device=DEVICE).to(dtype)


def pytorch_layers(eager, x):
    """{name: function}: the layer as PyTorch has it, compiled, and as a GEMM and the epilogue kernel.

    "library + epilogue" is also cuBLASLt with its fused bias. nn.functional.linear is torch.addmm(bias, x, Wᵀ), which
    calls cublasLtMatmul with the bias as its epilogue, in all four dtypes, where bias has one dimension, out is
    contiguous and no size is 1 (PyTorch's aten/src/ATen/native/cuda/Blas.cpp: isInputCompliesAddmmCudaLt and
    addmm_out_cuda_impl). torch.backends.cuda.preferred_blas_library("cublaslt") changes nothing there. Its
    documentation lets one expect it to ("will be used wherever possible"), but only GEMMs without a fused bias ask for
    it: in libtorch_cuda.so of 2.11.0+cu130, addmm_out_cuda_impl and gemm_and_bias do not call blasPreferredBackend,
    gemm_internal and bgemm_internal do. A change to that (pytorch#172340) was backed out (pytorch#180702).
    """
    weight, bias = eager.gemm.weight, eager.gemm.bias
    torch.compiler.reset()  # eight compilations of one function, and torch.compile leaves it to eager from then on
    compiled = torch.compile(eager)
    autotuned = torch.compile(eager, mode="max-autotune-no-cudagraphs")  # without graphs: to be timed like the others
    return {
        "eager": lambda: eager(x),
        "torch.compile": lambda: compiled(x),
        "torch.compile, max-autotune": lambda: autotuned(x),
        "library + epilogue": lambda: bindings.library_layer(x, weight, bias, SCALE),  # whatever kernel is selected
    }


def bare_gemm(x, weight):
    """{name: function}: the GEMM alone; for float32 the yardstick."""
    if x.dtype != torch.float32:
        return {"cuBLAS GEMM": lambda: torch.mm(x, weight.t())}
    x_half, weight_half = x.half(), weight.half()
    return {YARDSTICK: lambda: torch.mm(x_half, weight_half.t(), out_dtype=torch.float32)}


def errors_of(name, out, x, weight, bias):
    """What a row says of a candidate's errors."""
    bare = name in BARE_GEMMS
    layer = (torch.zeros_like(bias), 0.0) if bare else (bias, SCALE)
    frobenius, componentwise = errors_against_float64({name: out}, x, weight, *layer)[name]
    found = {"error_frobenius": frobenius, "error_componentwise": componentwise}
    return found | {"error_of": "product" if bare else "out"}


def time_section(arguments):
    """The layer and its rivals; * marks bare GEMMs, whose error is that of x·Wᵀ alone."""
    eager, new, x = problem(arguments.shape)
    weight, bias = new.gemm.weight, new.gemm.bias
    product = x.new_empty(len(x), len(weight))
    candidates = {
        **pytorch_layers(eager, x),
        **{
            f"Triton {kind}, fused epilogue": lambda kind=kind: triton_layer(x, weight, bias, SCALE, kind)
            for kind in TRITON_PRECISIONS[arguments.precision]
        },
        **jax_layers(arguments.precision, x, weight, bias),
        "ModelNew": lambda: new(x),
        "cuBLAS SGEMM": lambda: torch.mm(x, weight.t(), out=product),
        **bare_gemm(x, weight),
    }

    def check(name, function):
        found = errors_of(name, function(), x, weight, bias)
        if isinstance(function, JaxLayer):  # its memory is not PyTorch's
            return found | {"scratch_megabytes": None, "timing": function.TIMING}
        return found | {"scratch_megabytes": scratch_megabytes(function)}

    kernel = select_kernel(x, weight, bias)
    rows = compare(arguments, "time", candidates, check, kernel, yardstick=("ratio_to_fp16", YARDSTICK))
    print("error: Frobenius; compon.: max |err|/(|x|·|W|ᵀ+|b|+s); both against float64")
    if any("timing" in row for row in rows):
        print(
            f"† {JaxLayer.TIMING} ({JAX_BLOCK}), L2 not flushed: W alone is {weight.nbytes / 1e6:.0f} MB; such a load "
            "can hold the GPU at its power limit, where it is slower"
        )
    return rows, True


def time_16bit_section(arguments):
    """float16 and bfloat16: the layer and its rivals; * marks the bare GEMM, whose error is that of x·Wᵀ alone."""
    return [row for dtype in ("float16", "bfloat16") for row in time_16bit(arguments, dtype)], True


def time_16bit(arguments, dtype):
    eager, new, x = problem(arguments.shape, getattr(torch, dtype))
    weight, bias = new.gemm.weight, new.gemm.bias
    candidates = {
        **pytorch_layers(eager, x),
        "ModelNew": lambda: new(x),
        **bare_gemm(x, weight),
    }

    def check(name, function):
        return errors_of(name, function(), x, weight, bias)

    kernel, yardstick = select_kernel(x, weight, bias), ("ratio_to_gemm", "cuBLAS GEMM")
    return compare(arguments, "time-16bit", candidates, check, kernel, yardstick, dtype=dtype)


# --------------------------------------------------------------------------------------------------- training


@torch.enable_grad()
def training_section(arguments):
    """Forward and backward, gradients of x, W and b; error: Frobenius, of W's gradient against float64."""
    eager, new, x = problem(arguments.shape)
    weight, bias = (parameter.detach().double() for parameter in new.parameters())
    p = torch.sigmoid(nn.functional.linear(x.double(), weight, bias))
    grad = torch.randn(p.shape, device=DEVICE)
    exact = (grad * (1 + SCALE * p * (1 - p))).t() @ x.double()
    x.requires_grad_()

    def step(layer):
        return torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)

    def check(name, function):
        error = ((function()[1] - exact).norm() / exact.norm()).item()
        return {"error_frobenius": error, "error_of": "gradient of W"}

    candidates = {"eager": lambda: step(eager), "ModelNew": lambda: step(new)}
    kernel, repeats = select_kernel(x, *new.parameters()), max(2, arguments.repeats // 3)
    return compare(arguments, "training", candidates, check, kernel, repeats=repeats), True


# --------------------------------------------------------------------------------------------------- accuracy


def data_sets(rows, k, n, device):
    """Yields (name, x [rows, k], w [n, k]): ordinary data, then data made to break a scaled 16-bit splitting.

    Every product and sum is finite in float32, and |x|·|w|ᵀ > 0 except where a row has few nonzeros.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape, low=0.0, high=1.0):
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    def columns(count):
        return torch.randperm(k, generator=generator, device=device)[:count]

    def one_of(choices, height):
        """[height, 1]: one of the given columns for each row."""
        return choices[torch.randint(len(choices), (height, 1), generator=generator, device=device)]

    def linear_init():
        return uniform(n, k, low=-(k**-0.5), high=k**-0.5)

    def outlier_in_x(value, weight_there):
        x, w, special = uniform(rows, k), linear_init(), columns(8)
        x.scatter_(1, one_of(special, rows), value)
        w[:, special] = weight_there
        return x, w

    def cancelling(difference):
        a, b = normal(rows, k // 2), normal(n, k // 2)
        x = torch.cat([a, a + difference * normal(*a.shape)], 1)
        w = torch.cat([b, -b - difference * normal(*b.shape)], 1)
        return nn.functional.pad(x, (0, k % 2)), nn.functional.pad(w, (0, k % 2))

    yield "uniform x, Linear's init", uniform(rows, k), linear_init()
    yield "normal, normal", normal(rows, k), normal(n, k)
    x = normal(rows, k)
    x[:, columns(8)] *= 1000
    yield "normal, 8 columns of x ×1000", x, normal(n, k)
    wide = [normal(*shape) * 10 ** uniform(*shape, low=-6, high=6) for shape in ((rows, k), (n, k))]
    yield "normal·10^U(-6,6), both", *wide
    yield "cancelling halves (1e-4)", *cancelling(1e-4)
    yield "cancelling halves (1e-6)", *cancelling(1e-6)
    yield "normal·1e-18, both", normal(rows, k) * 1e-18, normal(n, k) * 1e-18
    yield "normal·1e15, both", normal(rows, k) * 1e15, normal(n, k) * 1e15
    yield "normal·1e-18, normal·1e15", normal(rows, k) * 1e-18, normal(n, k) * 1e15
    yield "one 3e4 per x row, w 1e-7 there", *outlier_in_x(3e4, 1e-7)

    yield "one 1e8 per x row, w 0 there", *outlier_in_x(1e8, 0.0)
    yield "one 1e8 per x row, w 1e-10 there", *outlier_in_x(1e8, 1e-10)
    yield "one 1e20 per x row, w 0 there", *outlier_in_x(1e20, 0.0)
    for factor in ("1e6", "1e20"):
        x, w, special = normal(rows, k), normal(n, k), columns(9)
        x[:, special] *= float(factor)
        w[:, special] = 0
        yield f"9 columns of x ×{factor}, w 0 there", x, w
    x, w, special = normal(rows, k), normal(n, k), columns(8)
    w.scatter_(1, one_of(special, n), 1e6)
    x[:, special] = 0
    yield "one 1e6 per w row, x 0 there", x, w
    x, w = normal(rows, k), normal(n, k)
    w[:, ::64] *= 1e9
    x[:, ::64] = 0
    yield "every 64th w ×1e9, x 0 there", x, w
    heavy = [normal(*shape) * (3 * normal(*shape)).exp() for shape in ((rows, k), (n, k))]
    yield "log-normal, σ = 3, both", *heavy
    scales = 10 ** uniform(rows, 1, low=-15, high=15), 10 ** uniform(n, 1, low=-15, high=15)
    yield "rows ·10^U(-15,15), both", normal(rows, k) * scales[0], normal(n, k) * scales[1]
    grade = torch.exp2(-40 * torch.arange(k, device=device) / k)
    yield "columns 2^0..2^-40, w inverse", normal(rows, k) * grade, normal(n, k) / grade
    grade = torch.exp2(-(torch.arange(k, device=device) % 32).float())
    yield "columns 2^-(k mod 32), w inverse", normal(rows, k) * grade, normal(n, k) / grade
    one = torch.zeros(rows, k, device=device).scatter_(1, one_of(columns(k), rows), 1.0)
    yield "one nonzero per x row", one * normal(rows, 1), normal(n, k)
    for count in (8, 100):
        x = torch.zeros(rows, k, device=device)
        special = columns(count)
        x[:, special] = normal(rows, len(special))
        yield f"{count} nonzero columns of x", x, normal(n, k)
    yield "all positive", uniform(rows, k), uniform(n, k)
    # fp16 rounds 1 + 2^-11 - ε down to 1: every low part is as large as can be, and positive.
    low_parts = [1 + 2**-11 * (1 - 0.01 * uniform(*shape)) for shape in ((rows, k), (n, k))]
    yield "largest low parts", *low_parts
    yield "denormal x (1e-40), w ·1e3", normal(rows, k) * 1e-40, normal(n, k) * 1e3


def repeats_exactly(function):
    """Whether two calls agree in every bit, the second one with NaN in the memory it is likely to be given."""
    first = function()
    poison = [torch.full_like(first, float("nan")) for _ in range(4)]
    del poison
    return torch.equal(first.view(torch.int32), function().view(torch.int32))


def accuracy_section(arguments):
    """z of ModelNew's operator and of the library, against float64, and their times; !! where ours is worse."""
    rows, k, n = arguments.accuracy_shape
    no_bias = torch.zeros(n, device="cuda")
    print(
        f"{'':34}{'Frobenius':>10}{'library':>10}{'ratio':>7}{'':4}{'compon.':>9}{'library':>10}{'ratio':>7}"
        f"{'':4}{'ms':>7}{'library':>9}"
    )
    results, kernels, all_exact = [], set(), True
    for name, x, w in data_sets(rows, k, n, "cuda"):

        def ours(x=x, w=w):
            return linear_sigmoid_residual(x, w, no_bias, 0.0)

        def library(x=x, w=w):
            return nn.functional.linear(x, w, no_bias)

        functions = {"ours": ours, "library": library}
        outputs = {key: function() for key, function in functions.items()}
        errors = errors_against_float64(outputs, x, w, no_bias, 0.0)
        exact = repeats_exactly(ours)
        columns = ""
        for mine, theirs in zip(errors["ours"], errors["library"], strict=True):
            ratio = mine / theirs if theirs else float("inf") if mine else 1.0
            mark = "  " if mine <= theirs else "!!"  # NaN is worse
            columns += f"{mine:10.2e}{theirs:10.2e}{ratio:7.2f} {mark} "
        ms = {key: statistics.median(times) for key, times in times_in_turns(functions, 5, 0.05).items()}
        columns += f"{ms['ours']:8.3f}{ms['library']:9.3f} {'' if exact else 'DIFFERS FROM RUN TO RUN'}"
        print(f"{name:34}{columns}".rstrip())
        kernel = select_kernel(x, w, no_bias)
        kernels.add(kernel)
        all_exact &= exact
        speedup = ms["library"] / ms["ours"]
        values = {"kernel": kernel, "bit_identical": exact, "ms": ms["ours"], "speedup": speedup}
        for prefix, key in (("", "ours"), ("library_", "library")):
            values[prefix + "error_frobenius"], values[prefix + "error_componentwise"] = errors[key]
        results.append(row(arguments, "accuracy", name, arguments.accuracy_shape, **values))
    repeated = "bit-identical" if all_exact else "NOT IDENTICAL"
    print(f"ours: {', '.join(sorted(kernels))}; every call repeated: {repeated}")
    return results, all_exact


# --------------------------------------------------------------------------------------------------- epilogue


def epilogue_section(arguments):
    """The epilogue kernels of kernels.cu as bandwidth, beside plain device copies."""
    rows, _, n = arguments.shape
    big_rows = 2**31 // (4 * n)
    z, big = torch.randn(rows, n, device="cuda"), torch.randn(big_rows, n, device="cuda")
    out, big_out, grad = torch.empty_like(z), torch.empty_like(big), torch.randn_like(z)

    def forward(source, target):
        bindings.epilogue(source, target, SCALE)

    small_copy, big_copy = f"copy, {z.nbytes / 1e6:.1f} MB", f"copy, {big.nbytes / 1e9:.2f} GB"
    functions = {  # name: (bytes read and written, function)
        big_copy: (2 * big.nbytes, lambda: big_out.copy_(big)),
        "forward, in place, as large": (2 * big.nbytes, lambda: forward(big, big)),
        small_copy: (2 * z.nbytes, lambda: out.copy_(z)),
        "forward, in place": (2 * z.nbytes, lambda: forward(z, z)),
        "forward, keeping z": (2 * z.nbytes, lambda: forward(z, out)),
        "backward (dz, bias gradient)": (
            3 * z.nbytes,
            lambda: torch.ops.linear_sigmoid_residual.backward_z(grad, z, SCALE),
        ),
    }
    times = timed({name: function for name, (_, function) in functions.items()}, arguments.repeats)
    rates = {name: functions[name][0] / ms / 1e6 for name, (ms, _, _) in times.items()}
    print(f"{'':31}{'ms':>8}{'p10':>8}{'p90':>8}{'GB/s':>8}{'of copy':>9}{'of big copy':>13}")
    results = []
    for name, (ms, p10, p90) in times.items():
        same_size = big_copy if functions[name][0] == 2 * big.nbytes else small_copy
        of_copy, of_big_copy = rates[name] / rates[same_size], rates[name] / rates[big_copy]
        print(f"{name:31}{ms:8.4f}{p10:8.4f}{p90:8.4f}{rates[name]:8.0f}{of_copy:9.1%}{of_big_copy:13.1%}")
        shape = big.shape if same_size == big_copy else z.shape
        values = {"gb_per_s": rates[name], "of_copy": of_copy, "of_big_copy": of_big_copy}
        results.append(row(arguments, "epilogue", name, shape, ms=ms, p10=p10, p90=p90, **values))
    return results, True


# ----------------------------------------------------------------------------------------------------- energy


def steady(function):
    """{ms, sm_clock_mhz, power_w, millijoules} of a call, calls back to back; null what nvidia-smi does not say.

    The first half of the time warms up: clock and power are medians of the second.
    """
    with sampled_conditions() as samples:
        for _ in range(2):
            first, calls, start = len(samples), 0, time.perf_counter()
            while time.perf_counter() - start < STEADY_SECONDS / 2:
                for _ in range(HOST_BLOCK):
                    function()
                torch.cuda.synchronize()
                calls += HOST_BLOCK
            ms = (time.perf_counter() - start) / calls * 1e3
        clock, power, _ = [statistics.median(column) for column in zip(*samples[first:])] or [None] * 3
    return {"ms": ms, "sm_clock_mhz": clock, "power_w": power, "millijoules": power and ms * power}


def energy_section(arguments):
    """What a call takes of energy: calls back to back, the cache not flushed; power times time. * marks bare GEMMs."""
    dtypes = ("float32", "bfloat16") if arguments.precision == "highest" else ("float32",)
    return [row for dtype in dtypes for row in energy(arguments, dtype)], True


def energy(arguments, dtype):
    eager, new, x = problem(arguments.shape, getattr(torch, dtype))
    weight, bias = new.gemm.weight, new.gemm.bias
    functions = {"eager": lambda: eager(x), "ModelNew": lambda: new(x), **bare_gemm(x, weight)}
    values = {name: steady(function) for name, function in functions.items()}
    (of_gemm,) = (found["millijoules"] for name, found in values.items() if name in BARE_GEMMS)
    for name, found in values.items():
        found["energy_ratio"] = of_gemm and found["millijoules"] / of_gemm
        found["error_of"] = "product" if name in BARE_GEMMS else "out"
    return report(arguments, "energy", values, select_kernel(x, weight, bias), dtype)


# ------------------------------------------------------------------------------------------------------- host


def host_microseconds(functions, calls=2000):
    """{name: (median, p10, p90)} of the host's microseconds per call, blocks of calls in turns."""
    for function in functions.values():
        for _ in range(calls // 10):
            function()
    samples = {name: [] for name in functions}
    for _ in range(calls // HOST_BLOCK):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_BLOCK):
                function()
            samples[name].append((time.perf_counter() - start) / HOST_BLOCK * 1e6)
    torch.cuda.synchronize()
    return {name: spread(values) for name, values in samples.items()}


def host_section(arguments):
    """What a call costs the host, on tensors so small that the GPU is always waiting."""
    rows, k, n = HOST_SHAPE
    x, grad = torch.rand(rows, k, device="cuda"), torch.rand(rows, n, device="cuda")
    eager, new = Model(k, n, SCALE).cuda(), ModelNew(k, n, SCALE).cuda()
    models = {"eager": eager, "ModelNew": new}

    def forward(model):
        return lambda: model(x)

    def forward_backward(model):
        parameters = tuple(model.parameters())
        return lambda: torch.autograd.grad(model(x), parameters, grad)

    kernel = select_kernel(x, new.gemm.weight, new.gemm.bias)
    print(f"x {[rows, k]}, W {[n, k]}, kernel: {kernel}")
    print(f"{'host µs per call':31}{'eager':>9}{'ModelNew':>9}{'ratio':>7}")
    results = []
    for what, with_grad, make in (
        ("forward, grad off", False, forward),
        ("forward, grad on", True, forward),
        ("forward + backward", True, forward_backward),
    ):
        with torch.set_grad_enabled(with_grad):
            costs = host_microseconds({name: make(model) for name, model in models.items()})
        for name, (median, p10, p90) in costs.items():
            values = {"ms": median / 1e3, "p10": p10 / 1e3, "p90": p90 / 1e3, "speedup": costs["eager"][0] / median}
            values["kernel"] = kernel if name == "ModelNew" else None
            results.append(row(arguments, "host", f"{name}, {what}", HOST_SHAPE, **values))
        old, new_cost = costs["eager"][0], costs["ModelNew"][0]
        print(f"{what:31}{old:9.1f}{new_cost:9.1f}{new_cost / old:7.2f}")
    return results, True


# ----------------------------------------------------------------------------------------- the command line

SECTIONS = {
    "time": time_section,
    "time-16bit": time_16bit_section,
    "training": training_section,
    "accuracy": accuracy_section,
    "epilogue": epilogue_section,
    "energy": energy_section,
    "host": host_section,
}


def _shape(text):
    if not re.fullmatch(r"0*[1-9]\d*(,0*[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"expected three positive numbers M,K,N, got {text!r}")
    return tuple(map(int, text.split(",")))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="bench/reference.py", description=__doc__.splitlines()[0])
    shape = f"{model_new.batch_size},{model_new.input_size},{model_new.hidden_size}"
    option = parser.add_argument
    option("--shape", type=_shape, default=shape, metavar="M,K,N", help="default %(default)s")
    option("--accuracy-shape", type=_shape, metavar="M,K,N", help="of the accuracy section; default: --shape")
    option("--precision", choices=("highest", "high", "medium"), default="highest", help="default %(default)s")
    option(
        "--sections", type=functools.partial(some_of, SECTIONS), default=",".join(SECTIONS), help="default %(default)s"
    )
    option("--repeats", type=int, default=60, help="timed calls of each row, at least 2 (default %(default)s)")
    option("--output", type=Path, help="default bench/results/<gpu>.json, with -high or -medium where asked")
    arguments = parser.parse_args(argv)
    arguments.accuracy_shape = arguments.accuracy_shape or arguments.shape
    return arguments


@torch.no_grad()
def main(argv=None):
    """Exit status 0, or 1 where a section failed or was not bit-identical from run to run."""
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        sys.exit("bench/reference.py measures GPU kernels, and PyTorch sees no CUDA device here")
    torch.set_float32_matmul_precision(arguments.precision)
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    suffix = "" if arguments.precision == "highest" else f"-{arguments.precision}"
    output = arguments.output or Path(__file__).resolve().parent / "results" / f"{gpu}{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{model_new._environment()}, triton {triton.__version__}")
    print(f"M,K,N {arguments.shape}, float32, '{arguments.precision}', medians of {arguments.repeats}, L2 flushed")
    results, status = [], 0
    for name in arguments.sections:
        start = time.perf_counter()
        print(f"\n[{name}] {SECTIONS[name].__doc__}", flush=True)
        with sampled_conditions() as samples:
            try:
                section_results, good = SECTIONS[name](arguments)
            except Exception:  # the other sections still stand, and so does the file
                traceback.print_exc(limit=-4)
                section_results, good = [], False
        conditions = conditions_row(samples, name, arguments.precision)
        results += [*section_results, conditions]
        status = status if good else 1
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"({time.perf_counter() - start:.1f} s; {described_conditions(conditions)})", flush=True)
        torch.cuda.empty_cache()
    print(f"\nwrote {output.name}: {len(results)} rows")
    return status


if __name__ == "__main__":
    sys.exit(main())
