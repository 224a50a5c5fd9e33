"""kernels.cu's C interface, for tests and benchmarks of a single kernel on a GPU; see the end of its device code."""

import contextlib
import ctypes

import torch

import model_new

KERNELS = ("wgmma16", "fp16x3", "fp16x1", "fp16x1_staged", "library")  # as Kernel in kernels.cu counts them
_POINTER, _INT64, _DOUBLE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
ARGUMENTS = {  # of the functions that take a device and a stream, which come last
    "epilogue_forward": [_POINTER] * 2 + [_INT64, _DOUBLE, _INT],
    "epilogue_backward": [_POINTER] * 5 + [_INT64] * 3 + [_DOUBLE, _INT],
    "linear_hopper": [_POINTER] * 6 + [_INT64] * 5 + [_DOUBLE] + [_INT] * 5,
    "pad_rows": [_POINTER] * 2 + [_INT64] * 4 + [_INT],
}


def launch(name, *arguments):
    """Calls a function on the current device and stream. Tensors stand for their memory, None for no memory."""
    function = getattr(model_new._library, name)
    function.argtypes = [*ARGUMENTS[name], _INT, _POINTER]
    pointers = (t.data_ptr() if isinstance(t, torch.Tensor) else t for t in arguments)
    error = function(*pointers, torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"{name} failed: CUDA error {error}")


def dtype_number(dtype):
    return model_new._DTYPES.index(dtype)


def scratch_bytes(kernel, m, n, k):
    """Of memory that a kernel needs for one call."""
    function = model_new._library.linear_hopper_scratch
    function.argtypes, function.restype = [_INT64] * 3 + [_INT], _INT64
    return function(m, n, k, KERNELS.index(kernel))


@contextlib.contextmanager
def forced(kernel, rows=1, splits=0):
    """Every product that the fused kernel can compute is served by this kernel and tile; or by "library"."""
    model_new._library.force_kernel(KERNELS.index(kernel), rows, splits)
    try:
        yield
    finally:
        model_new._library.force_kernel(0, 0, 0)


def fused(tile, x, weight, bias, scale, with_z=False):
    """(out, z or None) of the layer by a tile (kernel, rows, splits) of the fused kernel, whatever the size."""
    operators = getattr(torch.ops, model_new._namespace)
    with forced(*tile), torch.no_grad():
        if with_z:
            return operators.forward_with_z(x, weight, bias, scale)
        return operators.forward(x, weight, bias, scale), None


def library_layer(x, weight, bias, scale):
    """The layer by cuBLAS and the epilogue kernel, whatever kernel is selected."""
    with forced("library"):
        return getattr(torch.ops, model_new._namespace).forward(x, weight, bias, scale)


def epilogue(z, out, scale):
    """out = z + scale·sigmoid(z) elementwise on contiguous tensors; out may be z."""
    launch("epilogue_forward", z, out, z.numel(), scale, dtype_number(z.dtype))
    return out
