"""What only a CUDA device has: streams, graphs, several devices, memory, and more than 2^31 elements."""

import pytest
import torch
from conftest import needs_cuda
from reference import DTYPES, Layer, peak_bytes, random_arguments
from torch import nn

import model_new
from bench.bindings import dtype_number, launch, scratch_bytes
from model_new import ModelNew, linear_sigmoid_residual

pytestmark = [needs_cuda, pytest.mark.usefixtures("float32_sums")]

LONG_WAIT = 50_000_000  # clock cycles: 25 ms and more


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_capture_and_replay(dtype):
    """A replay sees the weights and inputs as they are then."""
    x, weight, bias, scale = random_arguments((64, 128), 96, dtype, "cuda")
    linear_sigmoid_residual(x, weight, bias, scale)  # cuBLAS makes its handle outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_sigmoid_residual(x, weight, bias, scale)
    for _ in range(3):
        for tensor in (x, weight, bias):
            tensor.normal_()
        out.fill_(float("nan"))
        graph.replay()
        Layer(x, weight, bias, scale).check(out)


def test_graph_capture_of_a_training_step():
    model = ModelNew(128, 96, 2.0).cuda()
    x = torch.randn(64, 128, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().sum().backward()
    with torch.no_grad():
        x.normal_()
        model.gemm.weight.normal_()
    for parameter in model.parameters():
        parameter.grad.zero_()
    graph.replay()
    replayed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for a, parameter in zip(replayed, model.parameters()):
        torch.testing.assert_close(a, parameter.grad)


def test_runs_on_the_current_stream():
    """x is written late on a side stream: work on any other stream would read it, or be overwritten, too early."""
    x, weight, bias, scale = random_arguments((64, 128), 96, torch.float32, "cuda")
    late = torch.zeros_like(x)
    weight.requires_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_WAIT)
        late.copy_(x)
        out = linear_sigmoid_residual(late, weight.detach(), bias, scale)
        trained = linear_sigmoid_residual(late, weight, bias, scale)
        (gradient,) = torch.autograd.grad(trained, weight, torch.ones_like(trained))
    stream.synchronize()
    layer = Layer(x, weight, bias, scale)
    layer.check(out)
    layer.check(trained)
    expected, bound = layer.gradients(torch.ones_like(trained))[1]
    assert (abs(gradient.double().cpu().numpy() - expected) <= bound).all()


def test_several_streams_at_once():
    cases = [random_arguments((256, 512), 384, torch.float32, "cuda") for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(3):
        outputs = []
        for stream, arguments in zip(streams, cases):
            with torch.cuda.stream(stream):
                outputs.append(linear_sigmoid_residual(*arguments))
    torch.cuda.synchronize()
    for out, arguments in zip(outputs, cases):
        Layer(*arguments).check(out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_runs_on_the_tensors_device(requires_grad):
    """Whichever device is current; and it is current still afterwards."""
    arguments = random_arguments((64, 128), 96, torch.float32, "cuda:1")
    tensors = [t.requires_grad_(requires_grad) for t in arguments[:3]]
    assert torch.cuda.current_device() == 0
    out = linear_sigmoid_residual(*tensors, arguments[3])
    if requires_grad:
        out.sum().backward()
        assert all(t.grad.device == t.device for t in tensors)
    assert out.device == tensors[0].device and torch.cuda.current_device() == 0
    Layer(*arguments).check(out)


@pytest.mark.parametrize("shape", [(1024, 2048), (8, 128, 2048)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inference_takes_the_memory_of_the_linear(dtype, shape):
    """The epilogue works in place: what nn.functional.linear takes (its output, and cuBLAS' workspace), and no more but
    the scratch of a fused kernel, where one is used.
    """
    x, weight, bias, scale = random_arguments(shape, 4096, dtype, "cuda")
    allowed = peak_bytes(lambda: nn.functional.linear(x, weight, bias))
    kernel = model_new.select_kernel(x, weight, bias)
    if kernel != "library":
        allowed += scratch_bytes(kernel, x.numel() // x.shape[-1], *weight.shape) + 1024  # rounded up
    assert peak_bytes(lambda: linear_sigmoid_residual(x, weight, bias, scale)) <= allowed
    with torch.no_grad():
        weight.requires_grad_()
        assert peak_bytes(lambda: linear_sigmoid_residual(x, weight, bias, scale)) <= allowed


@pytest.mark.parametrize("kernel, allowed", [("fp16x3", 40e6), ("fp16x1", 20e6), ("fp16x1_staged", 155e6)])
def test_scratch_is_small_on_the_reference_shape(kernel, allowed):
    """x in fp16, once or twice, and W with "fp16x1_staged"."""
    shape = model_new.batch_size, model_new.hidden_size, model_new.input_size
    assert 0 < scratch_bytes(kernel, *shape) <= allowed
    assert scratch_bytes("wgmma16", *shape) == 0


def test_more_than_2_to_the_31_elements():
    """Forward and backward; the first rows, the last, and those about element 2^31, where a 32-bit index turns over."""
    m, n, k = 2**20 + 1, 2**11, 8
    if torch.cuda.mem_get_info()[0] < 34 * 2**30:
        pytest.skip("needs 34 GiB of free GPU memory")
    x, weight, bias, scale = random_arguments((m, k), n, torch.float16, "cuda")
    rows = torch.tensor([0, 1, 2**19, 2**20 - 1, 2**20])
    with torch.no_grad():
        out = linear_sigmoid_residual(x, weight, bias, scale)
    layer = Layer(x[rows], weight, bias, scale)
    layer.check(out[rows])
    del out
    x.requires_grad_()
    out = linear_sigmoid_residual(x, weight, bias, scale)
    layer.check(out[rows])
    grad = torch.ones((), dtype=torch.float16, device="cuda").expand(m, n)
    (dx,) = torch.autograd.grad(out, x, grad)
    expected, bound = layer.gradients(torch.ones(len(rows), n))[0]
    assert (abs(dx[rows].double().cpu().numpy() - expected) <= bound).all()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("rows, cols", [(1, 1), (7, 3), (7, 4), (65, 31), (130, 132), (9, 1025)])
def test_nothing_outside_the_outputs_is_written(rows, cols, offset):
    """The kernels on the middle of larger blocks, whose ends are looked at afterwards."""
    guard, numel, strips = 64, rows * cols, 2

    def block(size, value):
        whole = torch.full((size + 2 * guard,), value, device="cuda")
        return whole, whole[guard + offset :][:size]

    def untouched(whole, value):
        return (whole[: guard + offset] == value).all() and (whole[offset - guard :] == value).all()

    z, grad = block(numel, 0.5)[1], block(numel, 1.0)[1]
    sizes = {"out": numel, "dz": numel, "partial sums": strips * cols, "dbias": cols}
    blocks = {name: block(size, -7.0) for name, size in sizes.items()}
    out, dz, partial_sums, dbias = (inside for _, inside in blocks.values())
    launch("epilogue_forward", z, out, numel, 2.0, dtype_number(z.dtype))
    launch("epilogue_backward", grad, z, dz, partial_sums, dbias, rows, cols, strips, 2.0, dtype_number(z.dtype))
    for name, (whole, inside) in blocks.items():
        assert untouched(whole, -7.0), f"written outside of {name}"
        assert (inside != -7.0).all(), f"not all of {name} was written"
