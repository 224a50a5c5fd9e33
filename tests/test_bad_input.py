"""Wrong calls raise what eager raises, say what came, change nothing, and leave the module usable."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import needs_cuda
from layers import cpu, cuda, each_layer, each_layer_with_kernels
from reference import DTYPES, eager
from torch import nn

from model_new import Model, ModelNew


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape).to(device=device, dtype=dtype)


def state(t):
    """What a call must leave alone: the object, its bytes, gradient, flags, and autograd's count of its changes."""
    dense = t.detach() if t.layout == torch.strided else t.detach().to_dense()
    data = None if t.is_meta else dense.contiguous().reshape(-1).view(torch.uint8).tolist()
    return id(t), data, id(t.grad), t.shape, t.dtype, t.device, t.layout, t.requires_grad, t._version


def outcome(function, args, kwargs):
    """What a call returns or raises, as (value or None, type of the error or None, message)."""
    try:
        return function(*args, **kwargs), None, ""
    except Exception as error:
        return None, type(error), str(error)


def assert_as(reference, function, args, kwargs, words, tensors):
    """A call does what `reference` does: it returns the same, or raises the same type in the same words, or in `words`,
    which name what came. With or without gradients; and the tensors stay as they are.
    """
    tensors = [*tensors, *(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))]
    before = [state(t) for t in tensors]
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            value, kind, message = outcome(function, args, kwargs)
            expected, eagers, of_eager = outcome(reference, args, kwargs)
        assert kind is eagers, message or of_eager
        if kind is None:
            torch.testing.assert_close(value, expected, equal_nan=True)
        elif words:
            assert all(word in message for word in words), message
        else:
            assert message.replace("ModelNew", "Model") == of_eager
    assert [state(t) for t in tensors] == before


def assert_module_as_model(layer, args, kwargs, words=(), dtype=torch.float32, scale=2.0):
    """That, in `words` where kernels.cu has the operator; and the module still gives the bits it gave before."""
    reference, new = layer.pair(3, 4, dtype=dtype)
    x = torch.randn(2, 3).to(layer.device, dtype)
    new(x).sum().backward()
    before, attributes = new(x), {**vars(new)}
    reference.scaling_factor = new.scaling_factor = scale
    tensors = [*new.parameters(), *(p.grad for p in new.parameters())]
    assert_as(reference, new, args, kwargs, words if layer.has_kernels else (), tensors)
    new.scaling_factor = 2.0
    assert vars(new) == attributes and list(new.state_dict()) == ["gemm.weight", "gemm.bias"]
    assert torch.equal(new(x), before)


# the module's input

NOT_TENSORS = [None, [1.0, 2.0, 3.0], (1.0, 2.0, 3.0), "x", b"x", 3, 2.5, {}, np.ones((2, 3), np.float32), nn.ReLU()]
WRONG_SHAPES = [(2,), (4,), (1,), (0,), (2, 2), (3, 2), (2, 0), (2, 3, 5), (0, 5), (2, 3, 2, 4), (1, 1, 1, 1, 1)]
WRONG_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool]
WRONG_DTYPES += [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("x", NOT_TENSORS, ids=lambda x: type(x).__name__)
@each_layer
def test_not_a_tensor(x, layer):
    assert_module_as_model(layer, (x,), {})


@pytest.mark.parametrize("shape", WRONG_SHAPES, ids=str)
@each_layer
def test_features(shape, layer):
    words = [f"({math.prod(shape[:-1])}x{shape[-1]} and 3x4)", f"x {list(shape)} torch.float32", "weight [4, 3]"]
    assert_module_as_model(layer, (ones(*shape, device=layer.device),), {}, words)


@each_layer
def test_no_dimension(layer):
    assert_module_as_model(layer, (ones(device=layer.device),), {}, ["expected x [..., K]", "x [] torch.float32"])


@pytest.mark.parametrize(
    "dtype, of_x", [*itertools.permutations(DTYPES, 2), *((torch.float32, wrong) for wrong in WRONG_DTYPES)], ids=str
)
@each_layer
def test_another_dtype_than_the_modules(dtype, of_x, layer):
    words = ["must have the same dtype", f"x [2, 3] {of_x}", f"weight [4, 3] {dtype}", f"bias [4] {dtype}"]
    assert_module_as_model(layer, (ones(2, 3, dtype=of_x, device=layer.device),), {}, words, dtype=dtype)


@pytest.mark.parametrize("layer, of_x", [(cpu, "meta"), pytest.param(cuda, "cpu", marks=needs_cuda)])
def test_another_device_than_the_modules(layer, of_x):
    words = ["on the same device", f"x [2, 3] torch.float32 on {of_x}", "weight [4, 3] torch.float32 on cuda"]
    assert_module_as_model(layer, (ones(2, 3, device=of_x),), {}, words)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("features", [3, 5])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@each_layer
def test_sparse(layout, features, layer):
    """Eager multiplies such an x, if the shapes fit."""
    assert_module_as_model(layer, (ones(2, features, device=layer.device).to_sparse(layout=layout),), {})


CALLS = [
    ((), {}),
    ((ones(2, 3), 2.0), {}),
    ((), {"input": ones(2, 3)}),
    ((ones(2, 3),), {"scaling_factor": 2.0}),
    ((ones(2, 3),), {"x": ones(2, 3)}),
]


@pytest.mark.parametrize("args, kwargs", CALLS, ids=range(len(CALLS)))
def test_arguments_of_the_call(args, kwargs):
    assert_module_as_model(cpu, args, kwargs)


SCALES = ["2", b"2", None, [2.0], (2.0,), {}, 2j, 10**400, 2**60, True, np.float64(2), np.float32(2), np.int64(2)]
SCALES += [ones(), ones(4), ones(2, 4), ones(2), ones() * 1j]


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"{type(s).__name__}{list(getattr(s, 'shape', []))}")
@each_layer
def test_scale(scale, layer):
    """Whatever it is, as Model has it: a result, or its error."""
    assert_module_as_model(layer, (ones(2, 3, device=layer.device),), {}, scale=scale)


# the operator: weight, bias, words

SHAPES = "expected x [..., K], weight [N, K] and bias [N]"
WIDE = {"dtype": torch.float64}
WRONG = {
    "weight 0-d": (ones(), ones(4), [SHAPES, "weight []"]),
    "weight 1-d": (ones(3), ones(3), [SHAPES, "weight [3]"]),
    "weight 4-d": (ones(1, 1, 4, 3), ones(4), [SHAPES, "weight [1, 1, 4, 3]"]),
    "weight transposed": (ones(3, 4), ones(3), ["(2x3 and 4x3)", "weight [3, 4]"]),
    "weight of no feature": (ones(4, 0), ones(4), ["(2x3 and 0x4)", "weight [4, 0]"]),
    "weight of no row": (ones(0, 3), ones(4), [SHAPES, "weight [0, 3]"]),
    "bias too short": (ones(4, 3), ones(3), [SHAPES, "bias [3]"]),
    "bias too long": (ones(4, 3), ones(5), [SHAPES, "bias [5]"]),
    "bias empty": (ones(4, 3), ones(0), [SHAPES, "bias [0]"]),
    "bias [4, 1]": (ones(4, 3), ones(4, 1), [SHAPES, "bias [4, 1]"]),
    "weight float64": (ones(4, 3, **WIDE), ones(4), ["same dtype", "weight [4, 3] torch.float64"]),
    "both float64": (ones(4, 3, **WIDE), ones(4, **WIDE), ["same dtype", "bias [4] torch.float64"]),
    "bias int64": (ones(4, 3), ones(4).long(), ["same dtype", "bias [4] torch.int64"]),
    "bias missing": (ones(4, 3), None, []),
    "weight None": (None, ones(4), []),
    "weight ndarray": (np.ones((4, 3)), ones(4), []),
}


@pytest.mark.parametrize("case", WRONG)
@each_layer
def test_tensors_of_the_operator(case, layer):
    *others, words = WRONG[case]
    args = [t.to(layer.device) if isinstance(t, torch.Tensor) else t for t in (ones(2, 3), *others)]
    assert_as(eager, layer.function, (*args, 2.0), {}, words if layer.has_kernels else (), ())


@pytest.mark.parametrize("bias", [ones(), ones(1, 4), ones(2, 4)], ids=lambda bias: str(list(bias.shape)))
@each_layer_with_kernels
def test_a_bias_that_only_eager_takes(bias, layer):
    x, weight, bias = (t.to(layer.device) for t in (ones(2, 3), ones(4, 3), bias))
    with pytest.raises(RuntimeError, match=r"expected x .* and bias \[N\]"):
        layer.function(x, weight, bias, 2.0)


@pytest.mark.parametrize("dtype", WRONG_DTYPES, ids=str)
@each_layer_with_kernels
def test_a_dtype_that_no_kernel_has(dtype, layer):
    args = (ones(*shape, dtype=dtype, device=layer.device) for shape in ((2, 3), (4, 3), (4,)))
    with pytest.raises(RuntimeError, match=f"not implemented for .*{dtype}"):
        layer.function(*args, 2.0)


# the constructor

CONSTRUCTORS = [(), (3,), (3, 4), (3, 4, 2.0, True), (-3, 4, 2.0), (3, -4, 2.0), ("3", 4, 2.0), (3, "4", 2.0)]
CONSTRUCTORS += [(3.0, 4, 2.0), (3, 4.5, 2.0), (None, 4, 2.0), (3, None, 2.0), ([3], 4, 2.0), (3j, 4, 2.0)]
CONSTRUCTORS += [(2**62, 4, 2.0), (2**64, 4, 2.0)]
KEYWORDS = [{"in_features": 3}, {"bias": False}, {"device": "cpu"}, {"scale": 2.0}]


@pytest.mark.parametrize(
    "args, kwargs", [*((args, {}) for args in CONSTRUCTORS), *(((3, 4, 2.0), k) for k in KEYWORDS)]
)
def test_constructor(args, kwargs):
    """The very message of Model's."""
    errors = []
    for kind in (Model, ModelNew):
        with pytest.raises((TypeError, RuntimeError)) as error:
            kind(*args, **kwargs)
        errors.append((error.type, str(error.value).replace("ModelNew", "Model")))
    assert errors[0] == errors[1]
