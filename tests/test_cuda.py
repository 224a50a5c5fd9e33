"""What only a CUDA device has: graphs, streams, several devices, memory, more than 2^31 elements; by each kernel."""

import contextlib
import gc
import resource
import threading
from pathlib import Path

import pytest
import torch
from conftest import needs_cuda
from fuzz import SETTINGS, settings
from reference import DTYPES, Expected, peak_bytes, random_arguments
from torch import nn

import model_new
from model_new import Model, ModelNew, linear_sigmoid_residual

pytestmark = [needs_cuda, pytest.mark.usefixtures("float32_sums")]

LONG_WAIT = 50_000_000  # clock cycles: 25 ms and more
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

# Each dtype and precision; M, K, N for the library, for the kernels for few rows and for many, and with rows of x and W
# that are copied first.
SHAPES = [(64, 128, 96), (40, 1024, 2048), (512, 1024, 2048), (2560, 3072, 2048), (257, 1021, 1023)]
each_setting = pytest.mark.parametrize("dtype, precision", SETTINGS, ids=str)


@pytest.fixture
def cases(dtype, precision):
    """[(x, weight, bias, scale)]"""
    with settings(precision):
        yield [random_arguments((m, k), n, dtype, "cuda") for m, k, n in SHAPES]


@each_setting
def test_graph_capture_and_replay(cases, dtype):
    """A replay sees the weights and inputs as they are then."""
    for x, weight, bias, scale in cases:
        linear_sigmoid_residual(x, weight, bias, scale)  # cuBLAS makes its handle outside of the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear_sigmoid_residual(x, weight, bias, scale)
        for _ in range(3):
            for tensor in (x, weight, bias):
                tensor.normal_()
            weight.mul_(weight.shape[1] ** -0.5)
            out.fill_(float("nan"))
            graph.replay()
            Expected(x, weight, bias, scale).check(out)


@pytest.mark.parametrize("width", [96, 1024])
def test_graph_capture_of_a_training_step(width):
    model, x = ModelNew(width, width, 2.0).cuda(), torch.randn(64, width, device="cuda")
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


@each_setting
def test_runs_on_the_current_stream(cases, dtype):
    """x is written late on a side stream: work on any other stream would read it, or be overwritten, too early."""
    late = [torch.zeros_like(x) for x, *_ in cases]
    leaves = [weight.clone().requires_grad_() for _, weight, *_ in cases]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_WAIT)
        results = []
        for (x, weight, bias, scale), to, leaf in zip(cases, late, leaves):
            to.copy_(x)
            out, trained = (linear_sigmoid_residual(to, w, bias, scale) for w in (weight, leaf))
            results.append((out, trained, *torch.autograd.grad(trained, leaf, torch.ones_like(trained))))
    stream.synchronize()
    for arguments, (out, trained, gradient) in zip(cases, results):
        expected = Expected(*arguments)
        expected.check(out)
        expected.check(trained)
        expected.check_gradients(torch.ones_like(out), (None, gradient, None))


@each_setting
def test_streams_and_host_threads_at_once(cases, dtype, precision):
    """Each call gives the bits that it gives alone: it has its own scratch."""
    alone = [linear_sigmoid_residual(*case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(8)]
    wrong, errors, start = [], [], threading.Barrier(2)

    def work(streams):
        try:
            start.wait()
            for i in range(10 * len(cases)):
                with torch.cuda.stream(streams[i % len(streams)]):
                    out = linear_sigmoid_residual(*cases[i % len(cases)])
                    wrong.append((out != alone[i % len(cases)]).any())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(streams[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not errors and len(wrong) == 20 * len(cases) and not any(wrong)


@two_gpus
@each_setting
def test_runs_on_the_tensors_device(cases, dtype):
    """Whichever device is current; and it is current still afterwards."""
    assert torch.cuda.current_device() == 0
    for *tensors, scale in cases:
        tensors = [t.to("cuda:1").requires_grad_() for t in tensors]
        out = linear_sigmoid_residual(*tensors, scale)
        out.sum().backward()
        assert all(t.grad.device == t.device for t in tensors)
        assert out.device == tensors[0].device and torch.cuda.current_device() == 0
        Expected(*tensors, scale).check(out)
        Expected(*tensors, scale).check_gradients(torch.ones_like(out), [t.grad for t in tensors])


# memory


@pytest.mark.parametrize("shape", [(64, 200), (8, 16, 200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_librarys_epilogue_works_in_place(dtype, shape):
    """Inference takes what nn.functional.linear takes, its output and cuBLAS' workspace, and no more."""
    x, weight, bias, scale = random_arguments(shape, 300, dtype, "cuda")
    allowed = peak_bytes(lambda: nn.functional.linear(x, weight, bias))
    assert model_new.select_kernel(x, weight, bias) == "library"
    assert peak_bytes(lambda: linear_sigmoid_residual(x, weight, bias, scale)) <= allowed
    with torch.no_grad():
        weight.requires_grad_()
        assert peak_bytes(lambda: linear_sigmoid_residual(x, weight, bias, scale)) <= allowed


@pytest.mark.parametrize("dtype, precision", SETTINGS[:4], ids=str)
def test_peak_memory_is_at_most_eagers(dtype, precision):
    """On the reference shape, without and with the backward. Scratch, which float32 needs, is at most 55 MB."""
    m, k, n, scale = model_new.batch_size, model_new.input_size, model_new.hidden_size, model_new.scaling_factor
    x = torch.rand(m, k, device="cuda", dtype=dtype, requires_grad=True)
    grad, peaks = torch.rand(m, n, device="cuda", dtype=dtype), []
    with settings(precision):
        for kind in (Model, ModelNew):
            with torch.device("cuda"):
                model = kind(k, n, scale).to(dtype)
            with torch.no_grad():
                forward = peak_bytes(lambda model=model: model(x))
            wanted = [x, *model.parameters()]
            backward = peak_bytes(lambda model=model, w=wanted: torch.autograd.grad(model(x), w, grad))
            peaks.append((forward, backward))
            del model, wanted
    assert all(new <= old for new, old in zip(peaks[1], peaks[0])), peaks
    assert peaks[1][0] <= grad.nbytes + (55e6 if dtype == torch.float32 else 1024)


def test_training_takes_no_more_memory_than_eager():
    """Three layers of the reference shape."""

    def step(network, x):
        network.zero_grad(set_to_none=True)
        network(x).sum().backward()

    peaks, x = [], torch.rand(1024, 8192, device="cuda")
    for kind in (Model, ModelNew):
        network = nn.Sequential(*(kind(8192, 8192, 2.0) for _ in range(3))).cuda()
        peaks.append(peak_bytes(lambda network=network: step(network, x)))
        del network
    bias_gradient = 8192 * 4  # is there before the weight's; eager computes it behind that
    assert peaks[1] <= peaks[0] + bias_gradient


@pytest.mark.long
def test_small_calls_leave_nothing_behind(record_property):
    """Neither in PyTorch's allocator nor in the process, with and without the backward."""
    cases = [
        random_arguments((m, k), n, dtype, "cuda") for m, k, n in ((8, 32, 16), (32, 1024, 1024)) for dtype in DTYPES
    ]
    leaves = [[*(t.clone().requires_grad_() for t in tensors), scale] for *tensors, scale in cases]

    def calls(count):
        for i in range(count):
            linear_sigmoid_residual(*cases[i % len(cases)])
            if i % 4 == 0:
                linear_sigmoid_residual(*leaves[i % len(cases)]).sum().backward()
        torch.cuda.synchronize()
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), resident

    *before, resident_before = calls(200)
    *after, resident = calls(10_000)
    record_property("tried", 10_000)
    assert after == before and resident - resident_before < 32


@pytest.mark.long
@pytest.mark.parametrize("megabytes", [100, 300, 700])
@pytest.mark.parametrize("dtype, precision", SETTINGS[:4], ids=str)
def test_out_of_memory(dtype, precision, megabytes):
    """With too little left for out, for scratch or for the backward: an error, or what is right; it works again."""
    with settings(precision):
        module = ModelNew(1024, 1024, 2.0).to("cuda", dtype)
        parameters, x = list(module.parameters()), torch.randn(65536, 1024, device="cuda", dtype=dtype)
        small, grad = x[:64].clone(), torch.ones_like(x)

        def results():
            return [module(small).detach(), *torch.autograd.grad(module(small).sum(), parameters)]

        def call():
            out = module(x)
            Expected(small, *parameters, 2.0).check(out[:64])
            assert left >= out.nbytes, "no error, with less memory than the result takes"
            torch.autograd.grad(out, parameters, grad)

        before = results()
        torch.autograd.grad(module(x), parameters, grad)  # whatever is made once, is made
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        allocated, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        left = megabytes * dtype.itemsize / 4 * 1e6
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + left) / total))
        try:
            with contextlib.suppress(torch.OutOfMemoryError):
                call()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == allocated, "memory was not given back"
        assert all(map(torch.equal, results(), before))


def test_more_than_2_to_the_31_elements():
    """Forward and backward; the first rows, the last, and those about element 2^31, where a 32-bit index turns over."""
    m, n, k = 2**20 + 1, 2**11, 8
    if torch.cuda.mem_get_info()[0] < 34 * 2**30:
        pytest.skip("needs 34 GiB of free GPU memory")
    x, weight, bias, scale = random_arguments((m, k), n, torch.float16, "cuda")
    rows = torch.tensor([0, 1, 2**19, 2**20 - 1, 2**20])
    expected = Expected(x[rows], weight, bias, scale)
    with torch.no_grad():
        expected.check(linear_sigmoid_residual(x, weight, bias, scale)[rows])
    x.requires_grad_()
    out = linear_sigmoid_residual(x, weight, bias, scale)
    expected.check(out[rows])
    grad = torch.ones((), dtype=torch.float16, device="cuda").expand(m, n)
    (dx,) = torch.autograd.grad(out, x, grad)
    expected.check_gradients(grad[rows], (dx[rows], None, None))
    del out, dx
    torch.cuda.empty_cache()
