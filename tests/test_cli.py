"""`python model_new.py`: what it prints and writes, and its exit status."""

import json
import subprocess
import sys

import pytest
import torch

import model_new
from model_new import main

SMALL = ["--shape", "64,128,96"]


@pytest.fixture
def without_compile(monkeypatch):
    """torch.compile takes ten seconds; one test runs it."""
    monkeypatch.setattr(model_new, "_compiled", lambda model, x: (None, "left out here"))


def test_as_a_command(tmp_path):
    """The whole program in a process of its own, started from another folder, torch.compile included. On a machine
    without a Hopper GPU it says what such a GPU is for, and PyTorch does not speak of a CUDA toolkit.
    """
    command = [sys.executable, model_new.__file__, *SMALL, "--json", "results.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\nok ") == 3 and "FAIL" not in result.stdout
    assert ("capability 9.0" in result.stdout) == ("(sm_90a)" not in result.stdout)
    assert "CUDA_HOME" not in result.stderr
    names = [entry["name"] for entry in json.loads((tmp_path / "results.json").read_text())]
    assert names == ["Model, eager", "Model, torch.compile", "ModelNew"]
    for name in names:
        assert f"\n{name}" in result.stdout


@pytest.mark.parametrize(
    "dtype, precision, limit",
    [
        ("float32", "highest", 1e-6),
        ("float32", "high", 1e-2),
        ("float32", "medium", 1e-2),
        ("float16", "highest", 1e-3),
        ("bfloat16", "highest", 1e-2),
        ("float64", "highest", 1e-15),
    ],
)
def test_each_dtype_and_precision(dtype, precision, limit, without_compile, capsys, tmp_path):
    path = tmp_path / "results.json"
    assert main([*SMALL, "--dtype", dtype, "--precision", precision, "--json", str(path)]) == 0
    assert torch.get_float32_matmul_precision() == precision
    results = json.loads(path.read_text())
    assert [entry["name"] for entry in results] == ["Model, eager", "ModelNew"]
    for entry in results:
        assert entry["shape"] == [64, 128, 96] and entry["dtype"] == dtype and entry["precision"] == precision
        assert entry["ms"] > 0
        assert 0 <= entry["error_frobenius"] < limit and 0 <= entry["error_componentwise"] < limit
        assert entry["torch"] == torch.__version__
        assert entry["gpu"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    assert results[1]["speedup"] == pytest.approx(results[0]["ms"] / results[1]["ms"])
    printed = capsys.readouterr().out
    assert f"{dtype}," in printed and f"precision '{precision}'" in printed
    assert "torch.compile: not timed, because left out here" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--shape", shape] for shape in ("1,2", "1,2,3,4", "0,1,1", "00,1,1", "1,-2,3", "a,b,c", "1.5,2,3", "")),
        *(["--build", archs] for archs in ("", "hopper", "90,", "9.0")),
        *([option, path] for option in ("--json", "--export") for path in ("", ".", "no folder/file")),
        ["--dtype", "int8"],
        ["--precision", "low"],
    ],
    ids=str,
)
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: model_new.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [lambda out: out + 1e-2, lambda out: out * float("nan"), lambda out: out.where(out < out.max(), torch.inf)],
    ids=["off by 0.01", "NaN", "one Inf"],
)
@pytest.mark.parametrize("kinds", [["ModelNew"], ["Model", "ModelNew"]], ids=" and ".join)
def test_a_wrong_operator_is_noticed(wrong, kinds, without_compile, monkeypatch, capsys):
    """By Model, and where Model itself is as wrong, by float64."""
    for kind in kinds:
        right = getattr(model_new, kind).forward
        monkeypatch.setattr(getattr(model_new, kind), "forward", lambda self, x, right=right: wrong(right(self, x)))
    assert main(SMALL) == 1
    printed = capsys.readouterr().out
    assert "FAIL ModelNew is float64" in printed and ("FAIL ModelNew is Model" in printed or len(kinds) == 2)


def test_other_weights_are_noticed(without_compile, monkeypatch, capsys):
    """Without a seed the two models draw different ones."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    assert main(SMALL) == 1
    assert "FAIL ModelNew and Model draw the same weights" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--json", "--export"])
@pytest.mark.parametrize("name", ["model_new.py", "kernels.cu"])
def test_the_sources_are_not_overwritten(name, option, monkeypatch, tmp_path, capsys):
    """Nor through a link. (A copy stands for them, should they be overwritten after all.)"""
    source = tmp_path / name
    source.write_text("the source")
    monkeypatch.setattr(model_new, "__file__", str(tmp_path / "model_new.py"))
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, option, str(tmp_path / "link")])
    assert stop.value.code == 2 and str(tmp_path / "link") in capsys.readouterr().err
    assert source.read_text() == "the source"


@pytest.mark.parametrize("shape", ["1000000,1000000,1", "1,1000000,1000000", f"1,{10**20},1"])
def test_a_shape_that_does_not_fit_in_memory_is_no_failed_check(shape, capsys):
    assert main(["--shape", shape]) == 2
    assert "GB" in capsys.readouterr().err


def test_torch_compile_may_fail(monkeypatch, capsys):
    """Its first call does without the headers of Python; the other rows still stand."""

    def fail(*_):
        raise ImportError("C++ compile error\n\ng++ -Wall x.cpp\nx.cpp:5:10: fatal error: Python.h is missing\nNote: x")

    monkeypatch.setattr(torch, "compile", lambda model: fail)
    assert main(SMALL) == 0
    printed = capsys.readouterr().out
    assert "torch.compile: not timed, because ImportError: x.cpp:5:10: fatal error: Python.h is missing\n" in printed
    assert printed.count("\nok ") == 3 and "\nModelNew " in printed


def test_a_reader_may_go_early():
    """As `head -1` does."""
    command = [sys.executable, "-u", model_new.__file__, *SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read() and process.wait(timeout=60) == 1


def test_build_compiles_for_each_architecture_and_stops(monkeypatch, capsys):
    """An architecture is compiled with its own instructions: 90 is sm_90a."""
    monkeypatch.setattr(model_new, "build", lambda archs: f"the library for {archs}")
    assert main(["--build", "80,90,120a"]) == 0
    assert capsys.readouterr().out == "".join(f"the library for ['{arch}']\n" for arch in ("80", "90a", "120a"))
