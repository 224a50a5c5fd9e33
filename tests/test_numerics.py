"""Values of the layer: against extended precision, in 16 bits against float32, and special values against eager."""

import pytest
import torch
from reference import DTYPES, Layer, assert_within, compute_roundoff, poison, random_arguments
from torch import nn

from model_new import linear_sigmoid_residual, select_kernel

pytestmark = pytest.mark.usefixtures("float32_sums")

operators = torch.ops.linear_sigmoid_residual

SHAPES = [(1, 1, 1), (3, 5, 7), (64, 128, 96), (257, 130, 67)]  # M, K, N
SIXTEEN_BIT = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("scale", [2.0, 0.0, -3.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k, n", SHAPES)
def test_is_the_layer(m, k, n, dtype, scale, device):
    """Every element within the rounding errors of its own GEMM, bias and epilogue; see reference.Layer."""
    arguments = random_arguments((m, k), n, dtype, device, scale)
    poison(m * n * arguments[0].element_size(), device)
    Layer(*arguments).check(linear_sigmoid_residual(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_and_without_gradient_are_bit_identical(dtype, device):
    x, weight, bias, scale = random_arguments((33, 40), 50, dtype, device)
    out = linear_sigmoid_residual(x, weight, bias, scale)
    assert torch.equal(out, linear_sigmoid_residual(x.clone().requires_grad_(), weight, bias, scale))
    if device == "cuda":
        out_with_z, z = operators.forward_with_z(x, weight, bias, scale)
        layer = Layer(x, weight, bias, scale)
        assert torch.equal(out, out_with_z)
        assert_within(z, layer.z, layer.z_bound, "z")


@pytest.mark.parametrize("scale", [2.0, -3.0, 0.3])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_16_bit_epilogue_is_computed_in_float32_and_rounded_once(dtype, scale, device):
    """From z as the linear gives it. Bit for bit on the CPU; 1 ulp on CUDA, plus float32's own errors where z and
    s·sigmoid(z) cancel. Eager rounds sigmoid, product and sum, and so gives other values. K is odd, so that no kernel
    serves that does not round z before; test_hopper.py has those.
    """
    x, weight, bias, _ = random_arguments((64, 95), 80, dtype, device)
    assert select_kernel(x, weight, bias) in ("cpu", "library")
    if device == "cpu":
        out, z = linear_sigmoid_residual(x, weight, bias, scale), nn.functional.linear(x, weight, bias)
    else:
        out, z = operators.forward_with_z(x, weight, bias, scale)
    z32 = z.float()
    expected = (torch.sigmoid(z32) * scale + z32).to(dtype)
    assert not torch.equal(torch.sigmoid(z) * scale + z, expected)
    if device == "cpu":
        assert torch.equal(out, expected)
        return
    ulp = expected.abs().float() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert ((out.float() - expected.float()).abs() <= ulp + 16 * 2.0**-24 * abs(scale)).all()


SPECIAL = [
    *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0),
    *(15.9, -15.9, 16.7, -17.5, 37.0, -37.0, 88.0, -87.0, -89.0, 104.0, -104.0, 745.0, -746.0),  # sigmoid saturates
    *(3e4, -3e4, 6e4, -6e4, 1e30, -1e30, 3.4e38, -3.4e38),
    *(1e-5, 3e-6, -3e-6, 6e-8, 1e-39, -1e-39, 1e-44, 5e-324, -1e-310),  # denormal in one of the dtypes
]


@pytest.mark.parametrize("scale", [2.0, 0.0, -1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_eagers(dtype, scale, device):
    """K = 1, W = 1, b = 0: z is x itself. NaN and Inf where eager has them, and its finite values to a few roundings:
    with s = 0 exactly, so that a denormal flushed to zero shows.
    """
    x = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype).to(device).reshape(-1, 1)
    weight, bias = x.new_ones(1, 1), x.new_zeros(1)
    eager = nn.functional.linear(x, weight, bias)
    eager = torch.sigmoid(eager) * scale + eager
    out = linear_sigmoid_residual(x, weight, bias, scale)
    assert torch.equal(out.isnan(), eager.isnan())
    assert torch.equal(out.isinf(), eager.isinf())
    assert torch.equal(out[out.isinf()], eager[eager.isinf()])
    finite = eager.isfinite()
    out, eager = out[finite], eager[finite]
    if scale == 0:
        assert torch.equal(out, eager)
        return
    # Eager's sigmoid, product and sum are each rounded to the dtype; ours once, or in float32.
    roundoff = max(compute_roundoff(dtype), torch.finfo(dtype).eps / 2)
    bound = roundoff * (12 * abs(scale) * torch.sigmoid(x[finite].double()) + 2 * eager.double().abs())
    assert ((out.double() - eager.double()).abs() <= bound).all()


def test_one_special_value_in_x_stays_in_its_row(device):
    x, weight, bias, scale = random_arguments((6, 40), 30, torch.float32, device)
    clean = linear_sigmoid_residual(x, weight, bias, scale)
    x[2, 7], x[4, 11] = float("inf"), float("nan")
    out = linear_sigmoid_residual(x, weight, bias, scale)
    eager = torch.nn.functional.linear(x, weight, bias)
    eager = torch.sigmoid(eager) * scale + eager
    assert torch.equal(out[2], eager[2])  # ±Inf, all of it
    assert out[4].isnan().all()
    others = [0, 1, 3, 5]
    assert torch.equal(out[others], clean[others])
