"""The kernels for Hopper, the tiles that kernels.cu has of each, shapes for which they serve, and calls of a tile."""

import itertools

import pytest
import torch

import model_new
from bench import bindings

is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not is_hopper, reason="needs a GPU of compute capability 9.0")

# kernel, dtype
FLOAT32_KINDS = [(kernel, torch.float32) for kernel in ("fp16x3", "fp16x1", "fp16x1_staged")]
KINDS = [*FLOAT32_KINDS, ("wgmma16", torch.float16), ("wgmma16", torch.bfloat16)]

each_kind = pytest.mark.parametrize("kernel, dtype", KINDS, ids=lambda value: str(value).removeprefix("torch."))
each_float32_kernel = pytest.mark.parametrize("kernel", [kernel for kernel, _ in FLOAT32_KINDS])

# kernel -> select_tile's `precision`, and PyTorch's where it serves
PRECISIONS = {
    "fp16x3": ("float32", "highest"),
    "fp16x1": ("tf32", "high"),
    "fp16x1_staged": ("tf32", "medium"),
    "wgmma16": ("16 bit", "highest"),
}


def tiles(kernel, k, splits=range(1, 5)):
    """All tiles (kernel, rows, splits) that there are for K = k; of those that share K, with so many blocks."""
    paired = [(kernel, 256, 0), *([(kernel, 128, 0)] if kernel == "fp16x3" else [])]
    if kernel == "fp16x1_staged":
        return paired
    return paired + [(kernel, rows, s) for rows in (16, 32, 64, 128) for s in splits if s <= -(-k // 64)]


def a_shape_of(kernel):
    """(m, n, k) and the tile that select_tile gives it, which is one of `kernel`."""
    for m, (n, k) in itertools.product((16, 64, 512, 1024, 4096), ((2048, 1024), (4096, 4096), (8192, 8192))):
        tile = model_new.select_tile(PRECISIONS[kernel][0], m, n, k)
        if tile and tile[0] == kernel:
            return (m, n, k), tile
    raise AssertionError(f"none of the shapes tried is served by {kernel}")


def by_tile(tile, x, weight, bias, scale=2.0, with_z=False):
    """out, or (out, z), of the fused kernel in this tile, whatever the size and whatever would be selected.

    Tests reach a tile only through this function. x and bias may have any layout, and rows are prepared as for a call;
    of other W than those whose rows are contiguous no tile serves. RuntimeError for a tile that does not exist.
    """
    assert weight.stride(1) == 1, f"no tile serves W with strides {weight.stride()}"
    out, z = bindings.fused(tile, x, weight, bias, scale, with_z)
    return (out, z) if with_z else out
