"""The backward's products: the operator `matmul`, the fused kernel behind it that takes W along n, and its gradients.

On Hopper everything is compared with float64 on the GPU.
"""

import pytest
import torch
from conftest import needs_cuda
from fuzz import ResultGuard
from reference import Arithmetic, assert_within
from tiles import needs_hopper, tiles
from torch import nn

import model_new
from bench import bindings
from model_new import ModelNew

matmul = getattr(torch.ops, model_new._namespace).matmul
NAN, INF = float("nan"), float("inf")


@needs_cuda
def test_opcheck():
    a, b = torch.randn(7, 5, device="cuda"), torch.randn(5, 9, device="cuda")
    for arguments in ((a, b), (a.t().contiguous().t(), b), (a[:0], b)):
        torch.library.opcheck(matmul.default, arguments)


@needs_cuda
def test_is_the_product():
    a, b = torch.randn(70, 130, device="cuda"), torch.randn(130, 90, device="cuda")
    torch.testing.assert_close(matmul(a, b), a @ b)


def by_tile(tile, a, b):
    """a·b by the kernel; tile: (rows, splits)."""
    with bindings.forced("fp16x3", *tile):
        return matmul(a, b)


def fused_products(function):
    """How often the fused kernel runs in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "linear_kernel" in event.key)


def assert_is_product(out, a, b):
    a, b = a.double(), b.double().t()
    assert_within(out, a @ b.t(), Arithmetic(torch.float32, "fp16x3", "highest").product_bound(a, b), "a·b")


@needs_hopper
class TestKernel:
    @pytest.mark.parametrize("m", [1, 15, 17, 64, 127, 129, 256, 257, 300])
    def test_edges(self, m):
        """n in multiples of 16 bytes, as TMA wants b's rows; any k and any row stride of a."""
        for i, n in enumerate((4, 60, 124, 128, 132, 256, 260, 520)):
            k = (1, 7, 63, 64, 65, 128, 515, 1000)[(i + m) % 8]
            a, b = torch.randn(m, k + i % 3, device="cuda")[:, :k], torch.randn(k, n, device="cuda")
            for _, *tile in tiles("fp16x3", k):
                assert_is_product(by_tile(tile, a, b), a, b)

    @pytest.mark.parametrize("m, n, k", [(1025, 4100, 68), (2049, 2100, 200), (8192, 260, 1024)])
    def test_more_tiles_than_run_at_once(self, m, n, k):
        a, b = torch.randn(m, k, device="cuda"), torch.randn(k, n, device="cuda")
        for _, *tile in tiles("fp16x3", k, splits=(1, 2)):
            assert_is_product(by_tile(tile, a, b), a, b)

    def test_nothing_outside_is_read_or_written(self):
        """1e15 stands around a and b: finite, or what is computed again would hide that it was read. out and scratch
        lie in memory that was NaN, between bytes that are looked at afterwards.
        """
        m, n, k, guarded = 130, 132, 70, 0
        wide_a, wide_b = torch.full((m, k + 6), 1e15, device="cuda"), torch.full((k + 2, n + 8), 1e15, device="cuda")
        a, b = wide_a[:, 3 : 3 + k], wide_b[1:-1, 4 : 4 + n]
        a.normal_(), b.normal_()
        for _, *tile in tiles("fp16x3", k):
            guard = ResultGuard([4 * m * n, bindings.scratch_bytes("fp16x3", m, n, k)], "cuda")
            out = by_tile(tile, a, b)
            guarded += guard.check([out])
            assert_is_product(out, a, b)
        assert guarded

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_special_values(self, value):
        a, b = torch.randn(140, 520, device="cuda"), torch.randn(520, 300, device="cuda")
        a[3, 5], b[7, 9], b[519, 299] = value, value, value
        expected = a @ b
        for _, *tile in tiles("fp16x3", 520, splits=(1, 4)):
            out = by_tile(tile, a, b)
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(out.isinf(), expected.isinf())
            assert torch.equal(out[out.isinf()], expected[expected.isinf()])

    def test_outliers_of_a_do_no_harm(self):
        """Entries 1e8 times the others, on rows of b that are zero."""
        a, b = torch.randn(200, 1000, device="cuda"), torch.randn(1000, 256, device="cuda")
        a[:, [5, 77, 900]], b[[5, 77, 900]] = 1e8, 0
        for _, *tile in tiles("fp16x3", 1000, splits=(1, 2)):
            exact = a.double() @ b.double()
            assert (by_tile(tile, a, b).double() - exact).norm() / exact.norm() < 5e-7

    def test_bit_identical_from_run_to_run(self):
        dz, x = torch.randn(1024, 4096, device="cuda"), torch.randn(1024, 2048, device="cuda")
        first = matmul(dz.t(), x)
        assert all(torch.equal(first, matmul(dz.t(), x)) for _ in range(20))

    def test_a_gradient_that_must_be_differentiable(self):
        """create_graph=True on a layer that is large enough for the kernel: second derivatives as eager's."""
        torch.manual_seed(0)
        layers = [kind(2048, 1024, 2.0).cuda() for kind in (ModelNew, model_new.Model)]
        layers[1].load_state_dict(layers[0].state_dict())
        x = torch.randn(4, 2048, device="cuda", requires_grad=True)
        assert model_new.select_tile("float32", 4, 2048, 1024)  # of dz and W
        second = []
        for layer in layers:
            (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            second.append(torch.autograd.grad(first.square().sum(), (x, *layer.parameters())))
        for ours, eagers in zip(*second):
            torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-4 * eagers.abs().max().item())

    @pytest.mark.parametrize("k, n, served", [(2048, 512, True), (512, 512, True), (256, 512, False)])
    def test_serves_large_layers(self, k, n, served):
        layer, x = ModelNew(k, n, 2.0).cuda(), torch.randn(700, k, device="cuda", requires_grad=True)
        out = layer(x).sum()
        assert fused_products(out.backward) == (2 if served else 0)

    def test_serves_the_backward_of_the_reference_shape(self):
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


@pytest.mark.parametrize("retain", [False, True])
def test_backward_twice_needs_the_graph_retained(retain, device):
    layer, x = ModelNew(6, 4, 2.0).to(device), torch.randn(3, 6, device=device, requires_grad=True)
    out = layer(x).sum()
    (first,) = torch.autograd.grad(out, x, retain_graph=retain)
    if retain:
        assert torch.equal(first, torch.autograd.grad(out, x)[0])
    else:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, x)
