"""Wrong calls raise what eager raises, say what came, change nothing, and leave the module usable."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import needs_cuda
from reference import DTYPES
from torch import nn

from model_new import Model, ModelNew, linear_sigmoid_residual


def eager(x, weight, bias, scale):
    z = nn.functional.linear(x, weight, bias)
    return torch.sigmoid(z) * scale + z


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape).to(device=device, dtype=dtype)


def state(t):
    """What a call must leave alone: the object, its bytes, gradient, flags, and autograd's count of its changes."""
    dense = t.detach() if t.layout == torch.strided else t.detach().to_dense()
    data = None if t.is_meta else dense.contiguous().reshape(-1).view(torch.uint8).tolist()
    return id(t), data, id(t.grad), t.shape, t.dtype, t.device, t.layout, t.requires_grad, t._version


def assert_refused(reference, function, args, kwargs, words, expected, tensors):
    """A call raises the type that `reference` raises (or `expected`, where given), in these words; with or without
    gradients; and the tensors stay as they are."""
    tensors = [*tensors, *(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))]
    before = [state(t) for t in tensors]
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(Exception) as error:
            function(*args, **kwargs)
        if expected is None:
            with mode(), pytest.raises(Exception) as eagers:
                reference(*args, **kwargs)
        assert error.type is (expected or eagers.type), error.value
        for word in words:
            assert word in str(error.value)
    assert [state(t) for t in tensors] == before


def assert_module_refuses(device, args, kwargs, words, expected=None, dtype=torch.float32, scale=2.0):
    """That; and the module still gives the bits it gave before."""
    reference, new = (kind(3, 4, 2.0).to(device, dtype) for kind in (Model, ModelNew))
    x = torch.randn(2, 3).to(device, dtype)
    new(x).sum().backward()
    before, attributes = new(x), {**vars(new)}
    reference.scaling_factor = new.scaling_factor = scale
    tensors = [*new.parameters(), *(p.grad for p in new.parameters())]
    assert_refused(reference, new, args, kwargs, words, expected, tensors)
    new.scaling_factor = 2.0
    assert vars(new) == attributes and list(new.state_dict()) == ["gemm.weight", "gemm.bias"]
    assert torch.equal(new(x), before)


# the module's input

NOT_TENSORS = [None, [1.0, 2.0, 3.0], (1.0, 2.0, 3.0), "x", b"x", 3, 2.5, {}, np.ones((2, 3), np.float32), nn.ReLU()]
WRONG_SHAPES = [(2,), (4,), (1,), (0,), (2, 2), (3, 2), (2, 0), (2, 3, 5), (0, 5), (2, 3, 2, 4), (1, 1, 1, 1, 1)]
WRONG_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool]
WRONG_DTYPES += [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("x", NOT_TENSORS, ids=lambda x: type(x).__name__)
def test_not_a_tensor(x, device):
    assert_module_refuses(device, (x,), {}, [f"argument 'x' must be Tensor, not {type(x).__name__}"])


@pytest.mark.parametrize("shape", WRONG_SHAPES, ids=str)
def test_features(shape, device):
    words = [f"({math.prod(shape[:-1])}x{shape[-1]} and 3x4)", f"x {list(shape)} torch.float32", "weight [4, 3]"]
    assert_module_refuses(device, (ones(*shape, device=device),), {}, words)


def test_no_dimension(device):
    assert_module_refuses(device, (ones(device=device),), {}, ["expected x [..., K]", "x [] torch.float32"])


@pytest.mark.parametrize(
    "dtype, of_x", [*itertools.permutations(DTYPES, 2), *((torch.float32, wrong) for wrong in WRONG_DTYPES)], ids=str
)
def test_another_dtype_than_the_modules(dtype, of_x, device):
    words = ["must have the same dtype", f"x [2, 3] {of_x}", f"weight [4, 3] {dtype}", f"bias [4] {dtype}"]
    assert_module_refuses(device, (ones(2, 3, dtype=of_x, device=device),), {}, words, dtype=dtype)


@pytest.mark.parametrize(
    "of_x, of_module",
    [("meta", "cpu"), *(pytest.param(*pair, marks=needs_cuda) for pair in itertools.permutations(["cpu", "cuda"], 2))],
)
def test_another_device_than_the_modules(of_x, of_module):
    words = ["on the same device", f"x [2, 3] torch.float32 on {of_x}", f"weight [4, 3] torch.float32 on {of_module}"]
    assert_module_refuses(of_module, (ones(2, 3, device=of_x),), {}, words, RuntimeError)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("features", [3, 5])
@pytest.mark.parametrize("layout, name", [(torch.sparse_coo, "Sparse"), (torch.sparse_csr, "SparseCsr")], ids=str)
def test_sparse(layout, name, features, device):
    """Eager multiplies such an x, if the shapes fit."""
    x = ones(2, features, device=device).to_sparse(layout=layout)
    words = ["linear_sigmoid_residual", f"'{name}{device.upper()}'"]
    assert_module_refuses(device, (x,), {}, words, NotImplementedError)


CALLS = [
    ((), {}, "missing 1 required positional argument: 'x'"),
    ((ones(2, 3), 2.0), {}, "takes 2 positional arguments but 3 were given"),
    ((), {"input": ones(2, 3)}, "unexpected keyword argument 'input'"),
    ((ones(2, 3),), {"scaling_factor": 2.0}, "unexpected keyword argument 'scaling_factor'"),
    ((ones(2, 3),), {"x": ones(2, 3)}, "multiple values for argument 'x'"),
]


@pytest.mark.parametrize("args, kwargs, word", CALLS, ids=[word for *_, word in CALLS])
def test_arguments_of_the_call(args, kwargs, word):
    assert_module_refuses("cpu", args, kwargs, [word])


# the scale: the dispatcher refuses what is no number, with RuntimeError; eager multiplies, or raises this or that

SCALES = ["2", b"2", None, [2.0], (2.0,), {}, 2j, 10**400, np.ones(4), ones(4), ones(2, 4), ones(2), ones() * 1j]


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"{type(s).__name__}{list(getattr(s, 'shape', []))}")
def test_scale(scale, device):
    words = ["'scale'", "type 'float'", f"found type '{type(scale).__name__}'"]
    assert_module_refuses(device, (ones(2, 3, device=device),), {}, words, RuntimeError, scale=scale)


def test_a_scale_that_wants_a_gradient(device):
    """Eager computes it; to take the scale for a number and leave it without one would be silent."""
    tensors = ones(2, 3, device=device), ones(4, 3, device=device), ones(4, device=device)
    with pytest.raises(TypeError, match="argument 'scale' requires a gradient"):
        linear_sigmoid_residual(*tensors, torch.tensor(2.0, device=device, requires_grad=True))


# the operator: what test_operator.py's WRONG does not have. (weight, bias, words, the type if it is not eager's)

SHAPES = "expected x [..., K], weight [N, K] and bias [N]"
WIDE = {"dtype": torch.float64}
WRONG = {
    "weight 0-d": (ones(), ones(4), [SHAPES, "weight []"], None),
    "weight 1-d": (ones(3), ones(1), [SHAPES, "weight [3]"], None),
    "weight 4-d": (ones(1, 1, 4, 3), ones(4), [SHAPES, "weight [1, 1, 4, 3]"], None),
    "weight transposed": (ones(3, 4), ones(3), ["(2x3 and 4x3)", "weight [3, 4]"], None),
    "weight of no feature": (ones(4, 0), ones(4), ["(2x3 and 0x4)", "weight [4, 0]"], None),
    "weight of no row": (ones(0, 3), ones(4), [SHAPES, "weight [0, 3]"], None),
    "bias too short": (ones(4, 3), ones(3), [SHAPES, "bias [3]"], None),
    "bias too long": (ones(4, 3), ones(5), [SHAPES, "bias [5]"], None),
    "bias empty": (ones(4, 3), ones(0), [SHAPES, "bias [0]"], None),
    "bias 0-d: eager expands": (ones(4, 3), ones(), [SHAPES, "bias []"], RuntimeError),
    "bias [M, N]: eager adds": (ones(4, 3), ones(2, 4), [SHAPES, "bias [2, 4]"], RuntimeError),
    "bias [4, 1]": (ones(4, 3), ones(4, 1), [SHAPES, "bias [4, 1]"], None),
    "weight float64": (ones(4, 3, **WIDE), ones(4), ["same dtype", "weight [4, 3] torch.float64"], None),
    "both float64": (ones(4, 3, **WIDE), ones(4, **WIDE), ["same dtype", "bias [4] torch.float64"], None),
    "bias int64": (ones(4, 3), ones(4).long(), ["same dtype", "bias [4] torch.int64"], None),
    "bias meta": (ones(4, 3), ones(4, device="meta"), ["same device", "bias [4] torch.float32 on meta"], RuntimeError),
    "weight sparse": (ones(4, 3).to_sparse(), ones(4), ["Sparse"], NotImplementedError),
    "bias sparse": (ones(4, 3), ones(4).to_sparse(), ["Sparse"], NotImplementedError),
    "bias missing: eager has none": (ones(4, 3), None, ["'bias' must be Tensor, not NoneType"], TypeError),
    "weight ndarray": (np.ones((4, 3)), ones(4), ["'weight' must be Tensor, not ndarray"], None),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_of_the_operator(case, device):
    *others, words, expected = WRONG[case]
    args = [t.to(device) if isinstance(t, torch.Tensor) and not t.is_meta else t for t in (ones(2, 3), *others)]
    assert_refused(eager, linear_sigmoid_residual, (*args, 2.0), {}, words, expected, ())


@pytest.mark.parametrize("dtype", WRONG_DTYPES, ids=str)
def test_a_dtype_that_all_share(dtype, device):
    """RuntimeError, where eager computes (int64), or has NotImplementedError (bool)."""
    tensors = (ones(2, 3, dtype=dtype), ones(4, 3, dtype=dtype), ones(4, dtype=dtype))
    words = [f"not implemented for {dtype}", f"x [2, 3] {dtype}", f"bias [4] {dtype}"]
    args = (*(t.to(device) for t in tensors), 2.0)
    assert_refused(eager, linear_sigmoid_residual, args, {}, words, RuntimeError, ())


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_number_of_arguments_of_the_operator(count):
    args = (ones(2, 3), ones(4, 3), ones(4), 2.0, 2.0)[:count]
    assert_refused(eager, linear_sigmoid_residual, args, {}, ["linear_sigmoid_residual()"], None, ())


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
