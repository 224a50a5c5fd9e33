"""The script as a harness sees it: text that is exec'd, alone or beside kernels.cu, once or twice, and keeps its rules.

The rules and the run are those of KernelBench (src/kernelbench/kernel_static_checker.py and eval.py).
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from conftest import needs_cuda

import model_new

ROOT = pathlib.Path(model_new.__file__).parent


def run_python(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


EXEC_AND_COMPARE = """
import torch
source = open({path!r}, encoding="utf-8").read()
for _ in range({times}):
    context = {{}}
    exec(compile(source, "<string>", "exec"), context)
    assert "__file__" not in context
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(42)
    reference = context["Model"](48, 40, 2.0).to(device)
    torch.manual_seed(42)
    new = context["ModelNew"](48, 40, 2.0).to(device)
    x = torch.rand(32, 48, device=device)
    assert torch.allclose(reference(x), new(x), 1e-4, 1e-4)
    new(x).sum().backward()
print("done")
"""


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "exported.py"
    model_new.export(path)
    return path


def test_source_execs_without_file_twice_in_one_process():
    """From the folder of kernels.cu; each time with operators of its own (test_operator.py has texts that differ)."""
    result = run_python(EXEC_AND_COMPARE.format(path="model_new.py", times=2), ROOT)
    assert result.stdout.strip() == "done", result.stderr


def test_exported_file_needs_nothing_else(exported, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run_python(EXEC_AND_COMPARE.format(path=str(exported), times=2), empty)
    assert result.stdout.strip() == "done", result.stderr
    assert list(empty.iterdir()) == []


def test_without_kernels_cu_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    context = {}
    source = pathlib.Path(model_new.__file__).read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError) as error:
        exec(compile(source, "<string>", "exec"), context)  # on a GPU, it builds
        context["_kernels_source"]()
    assert str(tmp_path) in str(error.value) and "--export" in str(error.value)
    if not torch.cuda.is_available():
        assert context["ModelNew"](3, 4, 2.0)(torch.ones(2, 3)).shape == (2, 4)


def test_exported_text_is_kernels_cu(exported):
    (value,) = (
        node.value.value
        for node in ast.parse(exported.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KERNELS_SOURCE"
    )
    assert value == (ROOT / "kernels.cu").read_text(encoding="utf-8")


def test_export_of_an_export_is_itself(exported, tmp_path):
    result = subprocess.run(
        [sys.executable, exported, "--export", tmp_path / "again.py"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again.py").read_bytes() == exported.read_bytes()


@pytest.mark.parametrize("file", ["exported", "model_new.py"])
def test_harness_rules(file, exported):
    path = exported if file == "exported" else ROOT / "model_new.py"
    lines = path.read_text(encoding="utf-8").split("\n")
    code = "\n".join(line.split("#")[0].split("//")[0] for line in lines)
    for pattern in (r"\btry\s*:", r"\bexcept\s*:", r"\bexcept\s+\w+", r"\bpass\b", "threading"):
        found = re.search(f".*{pattern}.*", code)
        assert not found, f"{pattern}: {found.group(0)}"
    assert "load_inline" in code
    if file == "exported":
        assert "__global__" in code


@needs_cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 1e-2)])
def test_kernelbench_style_run(dtype, tolerance, exported, monkeypatch, tmp_path):
    """The reference problem, with the weights, seeds, conversions and comparison of KernelBench's eval.py."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    context = {}
    exec(compile(exported.read_text(encoding="utf-8"), "<string>", "exec"), context)

    def set_seed(seed):
        torch.manual_seed(seed)
        torch.cuda.manual_seed(seed)

    def process(value):
        return value.to(dtype=dtype).to(device="cuda") if isinstance(value, torch.Tensor) else value

    with torch.no_grad():
        models = []
        for kind in ("Model", "ModelNew"):
            set_seed(42)
            init_inputs = [process(value) for value in context["get_init_inputs"]()]
            set_seed(42)
            models.append(context[kind](*init_inputs).to(device="cuda", dtype=dtype))
        reference, new = models
        torch.manual_seed(42)
        for seed in [torch.randint(0, 2**32 - 1, (1,)).item() for _ in range(5)]:
            set_seed(seed)
            inputs = [process(value) for value in context["get_inputs"]()]
            expected, out = reference(*inputs), new(*inputs)
            torch.cuda.synchronize()
            assert out.shape == expected.shape and out.dtype == expected.dtype
            assert torch.allclose(expected, out, atol=tolerance, rtol=tolerance)
