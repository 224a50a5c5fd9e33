"""A single kernel of kernels.cu, for tests and benchmarks on a GPU, whatever would be selected."""

import contextlib
import ctypes

import torch

import model_new

KERNELS = ("wgmma16", "fp16x3", "fp16x1", "fp16x1_staged", "library")  # as Kernel in kernels.cu counts them
_POINTER, _INT64, _DOUBLE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
SIGNATURES = {  # of functions of kernels.cu: result, arguments
    "epilogue_forward": (_INT, [_POINTER, _POINTER, _INT64, _DOUBLE, _INT, _INT, _POINTER]),
    "linear_hopper_scratch": (_INT64, [_INT64, _INT64, _INT64, _INT]),
}


def _function(name):
    function = getattr(model_new._library, name)
    function.restype, function.argtypes = SIGNATURES[name]
    return function


def scratch_bytes(kernel, m, n, k):
    """The memory in bytes that a kernel needs for one call."""
    return _function("linear_hopper_scratch")(m, n, k, KERNELS.index(kernel))


@contextlib.contextmanager
def forced(kernel, rows=1, splits=0):
    """Every product that the fused kernel can compute is served by this kernel and tile; or by "library"."""
    model_new._library.force_kernel(KERNELS.index(kernel), rows, splits)
    try:
        yield
    finally:
        model_new._library.force_kernel(0, 0, 0)


@torch.no_grad()
def fused(tile, x, weight, bias, scale, with_z=False):
    """(out, z or None) of the layer by a tile (kernel, rows, splits) of the fused kernel, whatever the size."""
    operators = getattr(torch.ops, model_new._namespace)
    with forced(*tile):
        if with_z:
            return operators.forward_with_z(x, weight, bias, scale)
        return operators.forward(x, weight, bias, scale), None


def library_layer(x, weight, bias, scale):
    """The layer by cuBLAS and the epilogue kernel."""
    with forced("library"):
        return getattr(torch.ops, model_new._namespace).forward(x, weight, bias, scale)


def epilogue(z, out, scale):
    """out = z + scale·sigmoid(z) elementwise on contiguous tensors; out may be z."""
    numbers = z.numel(), scale, model_new._DTYPES.index(z.dtype)
    where = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
    error = _function("epilogue_forward")(z.data_ptr(), out.data_ptr(), *numbers, *where)
    if error:
        raise RuntimeError(f"epilogue_forward failed: CUDA error {error}")
