"""The rivals of the layer: PyTorch and torch.compile, cuBLAS with the epilogue kernel, Triton, JAX, bare GEMMs."""

import functools
import importlib.util
import os
import sys

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    sys.exit("the benchmark needs triton, a rival in it; PyTorch's CUDA builds for Linux bring it")

import model_new
from bench.bindings import library_layer

SCALE = model_new.scaling_factor

# ---------------------------------------------------------------- PyTorch and cuBLAS

SGEMM, YARDSTICK = "cuBLAS SGEMM", "cuBLAS fp16, float32 output"
BARE_GEMMS = {SGEMM, "cuBLAS GEMM", YARDSTICK}


def pytorch_layers(eager, x):
    """{name: function}: the layer as PyTorch has it, compiled, and as a GEMM and the epilogue kernel.

    "library + epilogue" is also cuBLASLt with its fused bias: nn.functional.linear is torch.addmm(bias, x, Wᵀ), which
    calls cublasLtMatmul with the bias as its epilogue where bias has one dimension, out is contiguous and no size is 1
    (PyTorch's aten/src/ATen/native/cuda/Blas.cpp: isInputCompliesAddmmCudaLt and addmm_out_cuda_impl). In torch 2.11
    torch.backends.cuda.preferred_blas_library("cublaslt") changes nothing there, whatever its documentation says: only
    GEMMs without a fused bias ask for it. A change to that (pytorch#172340) was backed out (pytorch#180702).
    """
    weight, bias = eager.gemm.weight, eager.gemm.bias
    torch.compiler.reset()  # eight compilations of one function, and torch.compile leaves it to eager from then on
    compiled = torch.compile(eager)
    autotuned = torch.compile(eager, mode="max-autotune-no-cudagraphs")  # without graphs: to be timed like the others
    return {
        "eager": lambda: eager(x),
        "torch.compile": lambda: compiled(x),
        "torch.compile, max-autotune": lambda: autotuned(x),
        "library + epilogue": lambda: library_layer(x, weight, bias, SCALE),
    }


def bare_gemms(x, weight):
    """{name: function}: the GEMM alone, for float32 also the yardstick."""
    if x.dtype != torch.float32:
        return {"cuBLAS GEMM": lambda: torch.mm(x, weight.t())}
    product, x_half, weight_half = x.new_empty(len(x), len(weight)), x.half(), weight.half()
    return {
        SGEMM: lambda: torch.mm(x, weight.t(), out=product),
        YARDSTICK: lambda: torch.mm(x_half, weight_half.t(), out_dtype=torch.float32),
    }


# ---------------------------------------------------------------- Triton: TF32, or several 16-bit products


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


def triton_layers(precision, x, weight, bias):
    """{name: function} for what this precision allows."""
    names = ("tf32x3", "bf16x3", "bf16x6") if precision == "highest" else ("tf32",)
    layer = functools.partial(triton_layer, x, weight, bias, SCALE)
    return {f"Triton {name}, fused epilogue": functools.partial(layer, name) for name in names}


# ---------------------------------------------------------------- JAX: XLA

# {torch.set_float32_matmul_precision: {name: a jax.lax.DotAlgorithmPreset}}
JAX_PRESETS = {
    "highest": {"F32": "F32_F32_F32", "TF32x3": "TF32_TF32_F32_X3"}
    | {f"BF16x{products}": f"BF16_BF16_F32_X{products}" for products in (6, 9)},
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


# ---------------------------------------------------------------- all of them


def contenders(precision, eager, new, x):
    """{name: function}: the layer, in eager and in new, as its rivals have it, and bare GEMMs."""
    layer = x, new.gemm.weight, new.gemm.bias
    functions, ours = pytorch_layers(eager, x), {"ModelNew": functools.partial(new, x)}
    if x.dtype == torch.float32:
        functions |= triton_layers(precision, *layer) | jax_layers(precision, *layer)
    return functions | ours | bare_gemms(*layer[:2])
