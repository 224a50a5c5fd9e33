"""Values of the layer: against float64, with and without gradient, and in 16 bits against float32."""

import pytest
import torch
from reference import DTYPES, SIXTEEN_BIT, Expected, poison, random_arguments

from model_new import linear_sigmoid_residual, select_kernel

pytestmark = pytest.mark.usefixtures("float32_sums")


@pytest.mark.parametrize("scale", [2.0, 0.0, -3.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (3, 5, 7), (64, 128, 96), (257, 130, 67)])
def test_is_the_layer(m, k, n, dtype, scale, device):
    """Every element within the rounding errors of its own GEMM, bias and epilogue; the same bits with a gradient."""
    x, weight, bias, scale = arguments = random_arguments((m, k), n, dtype, device, scale)
    poison(m * n * dtype.itemsize, device)
    out = linear_sigmoid_residual(*arguments)
    Expected(*arguments).check(out)
    assert torch.equal(out, linear_sigmoid_residual(x.clone().requires_grad_(), weight, bias, scale))


@pytest.mark.parametrize("scale", [2.0, -3.0, 0.3])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_16_bit_epilogue_is_computed_in_float32_and_rounded_once(dtype, scale, device):
    """From z as the linear gives it, which s = 0 shows. Bit for bit on the CPU; on CUDA 1 ulp, plus float32's errors
    where z and s·sigmoid(z) cancel. Eager rounds sigmoid, product and sum, and so gives other values. The size is the
    library's: "wgmma16" does not round z.
    """
    x, weight, bias, _ = random_arguments((64, 95), 80, dtype, device)
    assert select_kernel(x, weight, bias) in ("cpu", "library")
    out, z = (linear_sigmoid_residual(x, weight, bias, s) for s in (scale, 0.0))
    z32 = z.float()
    expected = (torch.sigmoid(z32) * scale + z32).to(dtype)
    assert not torch.equal(torch.sigmoid(z) * scale + z, expected)
    if device == "cpu":
        assert torch.equal(out, expected)
        return
    ulp = expected.abs().float() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert ((out.float() - expected.float()).abs() <= ulp + 16 * 2.0**-24 * abs(scale)).all()
