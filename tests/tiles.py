"""The kernels for Hopper, the tiles that kernels.cu has of each, and shapes for which they are chosen."""

import itertools

import torch

import model_new

# kernel, dtype
FLOAT32_KINDS = [(kernel, torch.float32) for kernel in ("fp16x3", "fp16x1", "fp16x1_staged")]
KINDS = [*FLOAT32_KINDS, ("wgmma16", torch.float16), ("wgmma16", torch.bfloat16)]

# kernel -> select_tile's `precision`, and PyTorch's where it serves
PRECISIONS = {
    "fp16x3": ("float32", "highest"),
    "fp16x1": ("tf32", "high"),
    "fp16x1_staged": ("tf32", "medium"),
    "wgmma16": ("16 bit", "highest"),
}


def name_of(kind):
    """Of one of KINDS, for a test's id."""
    return f"{kind[0]}-{str(kind[1]).removeprefix('torch.')}"


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
