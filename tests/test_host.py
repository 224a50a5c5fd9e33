"""What kernels.cu's part for g++ hands to the kernels: tensors of every layout, in front of each kind of tile, on the
CPU. What it is to autograd and to PyTorch's compiler is in test_autograd.py and test_operator.py.
"""

import itertools

import pytest
import torch
from conftest import Operators
from fuzz import LAYOUTS, place
from layers import Host, host
from reference import eager, random_arguments

TILES = [("library",), ("fp16x3", 256, 0), ("fp16x3", 128, 0), ("fp16x3", 32, 2), ("fp16x1", 16, 4)]
TILES += [("fp16x1_staged", 256, 0)]
KINDS = [*((tile, torch.float32) for tile in TILES)]
KINDS += [(("wgmma16", 64, 1), dtype) for dtype in (torch.float16, torch.bfloat16)]

each_layout = pytest.mark.parametrize("layout", [*LAYOUTS, "longer rows"])
each_k = pytest.mark.parametrize("k", [40, 37])


def lie(t, layout):
    """t in memory as `layout` says. "longer rows": multiples of 16 bytes, with NaN where a kernel wants zeros."""
    if layout != "longer rows":
        return place(t, layout)[0]
    n = t.shape[-1]
    return torch.nn.functional.pad(t, (0, 8 + -n % 8), value=float("nan"))[..., :n]


def assert_gradients_are_eagers(tile, x, weight, bias):
    arguments = [x, weight] if bias is None else [x, weight, bias]
    leaves = [t.detach().requires_grad_() for t in arguments]
    x, weight, bias = (*leaves, None)[:3]
    with host.served_by(*tile):
        out = host.function(x, weight, bias, 2.0)
        grad = torch.randn_like(out)
        gradients = torch.autograd.grad(out, leaves, grad)
    expected = eager(x, weight, bias, 2.0)
    torch.testing.assert_close((out, *gradients), (expected, *torch.autograd.grad(expected, leaves, grad)))


@each_k
@each_layout
@pytest.mark.parametrize("tile, dtype", KINDS, ids=str)
def test_any_layout(tile, dtype, layout, k):
    """Of x, of several dimensions, W and b, one after the other."""
    for leading, which in itertools.product([(24,), (), (2, 3, 4)], range(3)):
        tensors = random_arguments((*leading, k), 56, dtype, "cpu")[:3]
        arguments = [lie(t, layout) if i == which else t for i, t in enumerate(tensors)]
        with host.served_by(*tile), host.launches() as launches:
            out = host.function(*arguments, 2.0)
        assert launches == ([0, 0, 1] if tile[0] != "library" and arguments[1].stride(1) == 1 else [1, 0, 0])
        assert not out._is_view()  # without gradients; it could not be changed in place by something with gradients
        tolerance = {} if dtype == torch.float32 else dict.fromkeys(("rtol", "atol"), torch.finfo(dtype).eps)
        torch.testing.assert_close(out.float(), eager(*(t.float() for t in arguments), 2.0), **tolerance)
        if dtype == torch.float32:
            assert_gradients_are_eagers(tile, *arguments)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_without_a_bias(tile):
    x, weight, *_ = random_arguments((24, 40), 56, torch.float32, "cpu")
    assert_gradients_are_eagers(tile, x, weight, None)


@each_k
@each_layout
def test_matmul_of_any_layout(layout, k):
    """Of a, of several dimensions, and b. The kernel reads b as it is, or not at all."""
    served = {"contiguous", "wider rows", "longer rows", "every other row", "negative view"}
    for leading, which in itertools.product([(24,), (2, 3, 4)], range(2)):
        tensors = torch.randn(*leading, k), torch.randn(k, 56)
        a, b = (lie(t, layout) if i == which else t for i, t in enumerate(tensors))
        with host.served_by("fp16x3", 64, 1), host.launches() as launches:
            out = host.operators.matmul(a, b)
        assert launches == [0, 0, int(which == 0 or layout in served)]
        torch.testing.assert_close(out, torch.matmul(a, b))


def test_two_namespaces_of_one_library():
    """Each has its own operators, as two executions of one text have them."""
    other = Host()
    x, weight, bias, scale = random_arguments((6, 40), 24, torch.float32, "cpu")
    weight.requires_grad_()
    with Operators() as seen:
        for layer in (host, other):
            (gradient,) = torch.autograd.grad(layer.function(x, weight, bias, scale).sum(), weight)
            torch.testing.assert_close(gradient, torch.autograd.grad(eager(x, weight, bias, scale).sum(), weight)[0])
    assert other.module._namespace != host.module._namespace
    assert seen.names == ["forward_with_z", "backward_z", "matmul"] * 2
