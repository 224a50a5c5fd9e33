"""Fixtures, and a report. `device` runs a test on the CPU and, where there is one, on the CUDA device."""

import ctypes
import datetime
import os
import shlex
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from fuzz import settings
from torch.utils._python_dispatch import TorchDispatchMode

import model_new

# Before the first product: with AMX, oneDNN's bfloat16 product (PyTorch 2.14.1) reads past a row of x, and NaN there or
# in the next row counts. Eager's is wrong in the same way, so that it is not for this layer to mend.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

ROOT = Path(model_new.__file__).parent


def compile_for_cpu(library, *arguments):
    """Compiles kernels.cu's part for g++, whose other part, nvcc's, is not needed to choose among kernels."""
    options = ["-std=c++20", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", library, "-x", "c++"]
    command = ["g++", *options, ROOT / "kernels.cu", "-x", "none", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "kernels.cu" not in result.stderr, result.stderr
    return ctypes.CDLL(str(library))


if model_new._library is None:  # without a CUDA device nothing is built, and there is a choice all the same
    with tempfile.TemporaryDirectory() as folder:
        selection = compile_for_cpu(Path(folder) / "selection.so", "-D", "SELECTION_ONLY")
    model_new._library = model_new._declare(selection)
    model_new._library.is_hopper = lambda index: index == 0

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pytest_report_header():
    cuda = torch.cuda.is_available()
    return f"device: {torch.cuda.get_device_name()}" if cuda else "device: none; tests that need one are skipped"


def pytest_addoption(parser):
    parser.addoption("--report", metavar="FILE", help="write a table in Markdown of what was tried, with all failures")


def pytest_terminal_summary(terminalreporter, config):
    """Writes the report: a row for each test function. One that tries much in one go records how much as "tried"."""
    if not config.getoption("--report"):
        return
    tried, seconds, failures = Counter(), Counter(), []
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            name = report.nodeid.partition("[")[0].removeprefix("tests/")
            tried[name] += dict(report.user_properties).get("tried", 1)
            seconds[name] += report.duration
            if outcome != "passed":
                failures.append(f"- {report.nodeid}: {' '.join(report.longreprtext.split())[-300:]}")
    command = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])
    rows = [f"| {name} | {tried[name]} | {seconds[name]:.1f} |" for name in seconds]
    text = f"""# What was tried to break it

{tried.total()} tries, {len(failures)} failures. Written by `{command}` on {datetime.date.today()}, torch
{torch.__version__}, {pytest_report_header()}.

| test | tried | seconds |
| --- | ---: | ---: |
"""
    text += "\n".join([*rows, "", "## Failures", "", *(failures or ["None."])]) + "\n"
    Path(config.getoption("--report")).write_text(text, encoding="utf-8")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _same_numbers_and_settings():
    """Each test draws the same numbers, alone or after others, and sees and leaves PyTorch's default settings."""
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def float32_sums():
    """By default cuBLAS may add the partial sums of a 16-bit GEMM in 16 bits; the bounds here are for float32 sums."""
    with settings("highest"):
        yield


class Operators(TorchDispatchMode):
    """Names of our operators that kernels.cu implements; others consist of PyTorch's before a mode sees them."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("linear_sigmoid_residual"):
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def is_fused(model, x):
    """Whether a call of ModelNew is a call of our operator, on any device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        model(x)
    names = {event.key for event in profile.key_averages()}
    return f"{model_new._namespace}::forward" in names
