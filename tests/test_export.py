"""The script as a harness sees it: text that is exec'd, in one file or beside kernels.cu, and keeps its rules.

The rules and the run are those of KernelBench (src/kernelbench/kernel_static_checker.py and eval.py).
"""

import pathlib
import re
import subprocess
import sys

import pytest
import torch
from conftest import needs_cuda

import model_new

ROOT = pathlib.Path(model_new.__file__).parent


@pytest.fixture
def exported(tmp_path, capsys):
    path = tmp_path / "one file.py"
    assert model_new.main(["--export", str(path)]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    return path


EXEC_AND_COMPARE = """
import sys, torch
source, kernels = (open(path, encoding="utf-8").read() for path in sys.argv[1:])
for _ in range(2):
    context = {}
    exec(compile(source, "<string>", "exec"), context)
    assert "__file__" not in context and context["KERNELS_SOURCE"] == kernels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(42)
    reference = context["Model"](48, 40, 2.0).to(device)
    torch.manual_seed(42)
    new = context["ModelNew"](48, 40, 2.0).to(device)
    x = torch.rand(32, 48, device=device)
    assert torch.allclose(reference(x), new(x), 1e-4, 1e-4)
    new(x).sum().backward()
"""


def test_exported_file_needs_nothing_else(exported, tmp_path):
    """It is exec'd twice in one process and exports itself. (test_operator.py exec's the text beside kernels.cu.)"""
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in (["-c", EXEC_AND_COMPARE, exported, ROOT / "kernels.cu"], [exported, "--export", "../again.py"]):
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    assert list(empty.iterdir()) == []
    assert (tmp_path / "again.py").read_bytes() == exported.read_bytes()


def test_without_kernels_cu_the_error_says_what_to_do(monkeypatch, tmp_path):
    source = pathlib.Path(model_new.__file__).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    context = {}
    with pytest.raises(FileNotFoundError) as error:
        exec(compile(source, "<string>", "exec"), context)  # on a GPU, it builds
        context["_kernels_source"]()
    assert str(tmp_path) in str(error.value) and "--export" in str(error.value)
    if not torch.cuda.is_available():
        assert context["ModelNew"](3, 4, 2.0)(torch.ones(2, 3)).shape == (2, 4)


def test_harness_rules(exported):
    """They hold for all of it, model_new.py's text and kernels.cu's."""
    lines = exported.read_text(encoding="utf-8").split("\n")
    code = "\n".join(line.split("#")[0].split("//")[0] for line in lines)
    for pattern in (r"\btry\s*:", r"\bexcept\s*:", r"\bexcept\s+\w+", r"\bpass\b", "threading"):
        found = re.search(f".*{pattern}.*", code)
        assert not found, f"{pattern}: {found.group(0)}"
    assert "load_inline" in code and "__global__" in code


@needs_cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 1e-2)])
def test_kernelbench_style_run(dtype, tolerance, exported, monkeypatch, tmp_path):
    """The reference problem, with the seeds, conversions and comparison of KernelBench's eval.py."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    context = {}
    exec(compile(exported.read_text(encoding="utf-8"), "<string>", "exec"), context)
    models = []
    for kind in ("Model", "ModelNew"):
        torch.manual_seed(42)
        models.append(context[kind](*context["get_init_inputs"]()).to("cuda", dtype))
    for seed in range(5):
        torch.manual_seed(seed)
        inputs = [x.to("cuda", dtype) for x in context["get_inputs"]()]
        with torch.no_grad():
            expected, out = (model(*inputs) for model in models)
        assert out.shape == expected.shape and out.dtype == expected.dtype
        assert torch.allclose(expected, out, atol=tolerance, rtol=tolerance)
