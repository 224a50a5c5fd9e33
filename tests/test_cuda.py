"""What only a CUDA device has: graphs, streams, several devices, memory, more than 2^31 elements; by each kernel."""

import contextlib
import gc
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import needs_cuda
from fuzz import SETTINGS, settings
from reference import DTYPES, Expected, eager, peak_bytes, random_arguments
from torch import nn

import model_new
from model_new import linear_sigmoid_residual

pytestmark = [needs_cuda, pytest.mark.usefixtures("float32_sums")]

LONG_WAIT = 50_000_000  # clock cycles: 25 ms and more
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

# Each dtype and precision; M, K, N for the library, for the kernels for few rows and for many, and with rows of x and W
# that are copied first.
SHAPES = [(64, 128, 96), (16, 1024, 1024), (512, 1024, 2048), (2560, 1024, 1024), (1000, 1021, 3072)]
each_setting = pytest.mark.parametrize("dtype, precision", SETTINGS, ids=str)


@pytest.fixture
def cases(dtype, precision):
    """[(x, weight, bias, scale)]"""
    with settings(precision):
        yield [random_arguments((m, k), n, dtype, "cuda") for m, k, n in SHAPES]


def results(x, weight, bias, scale):
    """[out, out where gradients are wanted, the gradients of x, W and b for a gradient of ones]"""
    out = linear_sigmoid_residual(x, weight, bias, scale)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    trained = linear_sigmoid_residual(*leaves, scale)
    return [out, trained.detach(), *torch.autograd.grad(trained, leaves, torch.ones_like(trained))]


def check_results(of, arguments):
    out, trained, *gradients = of
    expected = Expected(*arguments)
    expected.check(out)
    expected.check(trained)
    expected.check_gradients(torch.ones_like(out), gradients)


@each_setting
def test_graph_capture_and_replay(cases, dtype):
    """A replay, forwards and backwards, sees the weights and inputs as they are then."""
    for arguments in cases:
        results(*arguments)  # cuBLAS makes its handles outside of the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(*arguments)
        *tensors, _ = arguments
        for _ in range(3):
            for tensor in tensors:
                tensor.normal_()
            tensors[1].mul_(tensors[1].shape[1] ** -0.5)
            for result in captured:
                result.fill_(float("nan"))
            graph.replay()
            check_results(captured, arguments)


@each_setting
def test_runs_on_the_current_stream(cases, dtype):
    """x is written late on a side stream: work on any other stream would read it, or be overwritten, too early."""
    late = [torch.zeros_like(x) for x, *_ in cases]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_WAIT)
        of = [results(to.copy_(x), *others) for to, (x, *others) in zip(late, cases)]
    stream.synchronize()
    for arguments, of_case in zip(cases, of):
        check_results(of_case, arguments)


@each_setting
def test_streams_and_host_threads_at_once(cases, dtype):
    """Each call gives the bits that it gives alone: it has its own scratch."""
    alone = [linear_sigmoid_residual(*case) for case in cases]
    torch.cuda.synchronize()
    start = threading.Barrier(2)

    def wrong(streams):
        start.wait()
        found = []
        for i in range(10 * len(cases)):
            with torch.cuda.stream(streams[i % len(streams)]):
                out = linear_sigmoid_residual(*cases[i % len(cases)])
                found.append((out != alone[i % len(cases)]).any())
        return found

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(wrong, ([torch.cuda.Stream() for _ in range(4)] for _ in range(2))))
    torch.cuda.synchronize()
    assert not any(map(any, found))


@two_gpus
@each_setting
def test_runs_on_the_tensors_device(cases, dtype):
    """The call runs where its tensors are, whichever device is current, and which is current still afterwards."""
    assert torch.cuda.current_device() == 0
    for *tensors, scale in cases:
        arguments = *(t.to("cuda:1") for t in tensors), scale
        of = results(*arguments)
        assert torch.cuda.current_device() == 0 and all(t.device == arguments[0].device for t in of)
        check_results(of, arguments)


# memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_librarys_epilogue_works_in_place(dtype):
    """Inference takes what nn.functional.linear takes, its output and cuBLAS' workspace, and no more."""
    x, weight, bias, scale = random_arguments((64, 200), 300, dtype, "cuda")
    allowed = peak_bytes(lambda: nn.functional.linear(x, weight, bias))
    assert model_new.select_kernel(x, weight, bias) == "library"
    assert peak_bytes(lambda: linear_sigmoid_residual(x, weight, bias, scale)) <= allowed


@pytest.mark.parametrize("dtype, precision", SETTINGS[:4], ids=str)
def test_peak_memory_is_at_most_eagers(dtype, precision):
    """On the reference shape, without and with the backward. Scratch, which float32 needs, is at most 55 MB."""
    m, k, n, scale = model_new.batch_size, model_new.input_size, model_new.hidden_size, model_new.scaling_factor
    shapes, peaks = ((m, k), (n, k), (n,)), []
    leaves = [torch.rand(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    grad = torch.rand(m, n, device="cuda", dtype=dtype)
    with settings(precision):
        for layer in (eager, linear_sigmoid_residual):
            with torch.no_grad():
                forward = peak_bytes(lambda layer=layer: layer(*leaves, scale))
            backward = peak_bytes(lambda layer=layer: torch.autograd.grad(layer(*leaves, scale), leaves, grad))
            peaks.append((forward, backward))
    assert all(new <= old for new, old in zip(peaks[1], peaks[0])), peaks
    assert peaks[1][0] <= grad.nbytes + (55e6 if dtype == torch.float32 else 1024)


@pytest.mark.long
def test_small_calls_leave_nothing_behind(record_property):
    """Neither in PyTorch's allocator nor in the process, with and without the backward."""
    cases = [
        random_arguments((m, k), n, dtype, "cuda") for m, k, n in ((8, 32, 16), (32, 1024, 1024)) for dtype in DTYPES
    ]

    def calls(count):
        for i in range(count):
            results(*cases[i % len(cases)])
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
        small = random_arguments((64, 1024), 1024, dtype, "cuda")
        x, parameters, scale = small[0].repeat(1024, 1), [t.requires_grad_() for t in small[1:3]], small[3]
        grad, before = torch.ones_like(x), results(*small)

        def call():
            out = linear_sigmoid_residual(x, *parameters, scale)
            Expected(*small).check(out[:64])
            assert left >= out.nbytes, "no error, with less memory than the result takes"
            torch.autograd.grad(out, parameters, grad)

        torch.autograd.grad(linear_sigmoid_residual(x, *parameters, scale), parameters, grad)  # what is made once
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
        assert all(map(torch.equal, results(*small), before))


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
