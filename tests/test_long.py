"""Minutes of tries on a GPU, which `python -m pytest -m long` makes; `--report FILE` writes down what was tried."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import needs_cuda
from fuzz import ON_CPU, ON_GPU, draw, run
from tiles import KINDS, is_hopper

import model_new

pytestmark = pytest.mark.long

CALLS = 1000


@pytest.mark.parametrize("seed", range(10))
def test_random_calls(seed, device, record_property):
    """Each is remade by `fuzz.run(fuzz.draw(random.Random("seed-number"), limits), device)`."""
    kernels, failures, limits = Counter(), [], ON_CPU if device == "cpu" else ON_GPU
    for number in range(CALLS):
        case = draw(random.Random(f"{seed}-{number}"), limits)
        try:
            kernels[run(case, device)] += 1
        except Exception as error:
            failures.append(f"{seed}-{number}, {case}: {type(error).__name__}: {error}")
            if device == "cuda":
                torch.cuda.synchronize()  # raises if the device is lost: no later call would tell anything
        if number % 500 == 0:
            torch.cuda.empty_cache()  # blocks of every size pile up
    record_property("tried", CALLS)
    assert not failures, "\n".join(failures[:20])
    if device == "cpu":
        assert set(kernels) == {"cpu"}
    elif is_hopper:
        assert set(kernels) == {"library", *(kernel for kernel, _ in KINDS)}, kernels


@needs_cuda
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_sanitizer(tool, record_property):
    """compute-sanitizer finds nothing in a process that enters every kernel on small shapes."""
    toolkit = ""
    with contextlib.suppress(RuntimeError):  # there is none
        toolkit = os.path.join(model_new.find_cuda_home(), "bin")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    command = [sanitizer, "--tool", tool, sys.executable, str(Path(__file__).with_name("sanitized.py"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    text = result.stdout + result.stderr
    calls = re.search(r"^calls: (\d+)$", text, re.MULTILINE)
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    assert calls and summary, text[-2000:]
    record_property("tried", int(calls.group(1)))
    assert summary.group(1) == "0", "\n".join(line for line in text.splitlines() if line.startswith("==="))[:2000]
