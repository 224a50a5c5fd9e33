"""The backward's products: the fused kernel behind the operator `matmul`, which takes W along n, in every tile.

Everything is compared with float64 on the GPU. How the operator chooses among kernels is in test_host.py.
"""

import pytest
import torch
from fuzz import ResultGuard
from reference import Arithmetic, assert_within
from tiles import needs_hopper, tiles
from torch import nn

import model_new
from bench import bindings
from model_new import ModelNew

pytestmark = [needs_hopper]

matmul = getattr(torch.ops, model_new._namespace).matmul
NAN, INF = float("nan"), float("inf")


def random_operands(m, n, k):
    return torch.randn(m, k, device="cuda"), torch.randn(k, n, device="cuda")


def by_all_tiles(a, b, splits=range(1, 5)):
    """a·b by the kernel, in one tile after the other."""
    for kernel, *tile in tiles("fp16x3", len(b), splits):
        with bindings.forced(kernel, *tile):
            out = matmul(a, b)
        yield out


def fused_products(function):
    """How often the fused kernel runs in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "linear_kernel" in event.key)


def assert_is_product(out, a, b):
    a, b = a.double(), b.double().t()
    assert_within(out, a @ b.t(), Arithmetic(torch.float32, "fp16x3", "highest").product_bound(a, b), "a·b")


@pytest.mark.parametrize("m", [1, 15, 17, 64, 127, 129, 256, 257, 300])
def test_edges(m):
    """n in multiples of 16 bytes, as TMA wants b's rows; any k and any row stride of a."""
    for i, n in enumerate((4, 60, 124, 128, 132, 256, 260, 520)):
        k = (1, 7, 63, 64, 65, 128, 515, 1000)[(i + m) % 8]
        a, b = random_operands(m, n, k + i % 3)
        a, b = a[:, :k], b[:k]
        for out in by_all_tiles(a, b):
            assert_is_product(out, a, b)


@pytest.mark.parametrize("m, n, k", [(1025, 4100, 68), (2049, 2100, 200), (8192, 260, 1024)])
def test_more_tiles_than_run_at_once(m, n, k):
    a, b = random_operands(m, n, k)
    for out in by_all_tiles(a, b, splits=(1, 2)):
        assert_is_product(out, a, b)


def test_nothing_outside_is_read_or_written():
    """1e15 stands around a and b: finite, or what is computed again would hide that it was read. out and scratch
    lie in memory that was NaN, between bytes that are looked at afterwards.
    """
    m, n, k, guarded = 130, 132, 70, 0
    wide_a, wide_b = torch.full((m, k + 6), 1e15, device="cuda"), torch.full((k + 2, n + 8), 1e15, device="cuda")
    a, b = wide_a[:, 3 : 3 + k], wide_b[1:-1, 4 : 4 + n]
    a.normal_(), b.normal_()
    for _, *tile in tiles("fp16x3", k):
        guard = ResultGuard([4 * m * n, bindings.scratch_bytes("fp16x3", m, n, k)], "cuda")
        with bindings.forced("fp16x3", *tile):
            out = matmul(a, b)
        guarded += guard.check([out])
        assert_is_product(out, a, b)
    assert guarded


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_special_values(value):
    a, b = random_operands(140, 300, 520)
    a[3, 5], b[7, 9], b[519, 299] = value, value, value
    expected = a @ b
    for out in by_all_tiles(a, b, splits=(1, 4)):
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        assert torch.equal(out[out.isinf()], expected[expected.isinf()])


def test_outliers_of_a_do_no_harm():
    """Entries 1e8 times the others, on rows of b that are zero."""
    a, b = random_operands(200, 256, 1000)
    a[:, [5, 77, 900]], b[[5, 77, 900]] = 1e8, 0
    exact = a.double() @ b.double()
    for out in by_all_tiles(a, b, splits=(1, 2)):
        assert (out.double() - exact).norm() / exact.norm() < 5e-7


def test_bit_identical_from_run_to_run():
    dz, x = torch.randn(1024, 4096, device="cuda"), torch.randn(1024, 2048, device="cuda")
    first = matmul(dz.t(), x)
    assert all(torch.equal(first, matmul(dz.t(), x)) for _ in range(20))


def test_serves_the_backward_of_the_reference_shape():
    """Both products, which are as accurate as SGEMM's or better; none at 'high'."""
    layer = ModelNew(8192, 8192, 2.0).cuda()
    x, grad = torch.rand(1024, 8192, device="cuda", requires_grad=True), torch.randn(1024, 8192, device="cuda")
    gradients = torch.autograd.grad(layer(x), (x, layer.gemm.weight), grad)
    with torch.no_grad():
        p = torch.sigmoid(nn.functional.linear(x.double(), layer.gemm.weight.double(), layer.gemm.bias.double()))
        dz = grad * (1 + 2 * p * (1 - p))
        for ours, exact, sgemm in zip(
            gradients,
            (dz @ layer.gemm.weight.double(), dz.t() @ x.double()),
            (dz.float() @ layer.gemm.weight, dz.float().t() @ x),
        ):
            assert (ours - exact).norm() <= 1.05 * (sgemm - exact).norm()
    out = layer(x)
    assert fused_products(lambda: out.backward(grad, retain_graph=True)) == 2
    torch.set_float32_matmul_precision("high")
    assert fused_products(lambda: out.backward(grad)) == 0
