"""`python model_new.py`: what it prints and writes, and its exit status."""

import json
import pathlib
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
    """The whole program in a process of its own, started from another folder, torch.compile included."""
    command = [sys.executable, model_new.__file__, *SMALL, "--json", "results.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\nok ") == 3 and "FAIL" not in result.stdout
    names = [entry["name"] for entry in json.loads((tmp_path / "results.json").read_text())]
    assert names == ["Model, eager", "Model, torch.compile", "ModelNew"]
    for name in names:
        assert f"\n{name}" in result.stdout


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_each_dtype(dtype, without_compile, capsys, tmp_path):
    path = tmp_path / "results.json"
    assert main([*SMALL, "--dtype", dtype, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert [entry["name"] for entry in results] == ["Model, eager", "ModelNew"]
    limit = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2, "float64": 1e-15}[dtype]
    for entry in results:
        assert entry["shape"] == [64, 128, 96] and entry["dtype"] == dtype and entry["precision"] == "highest"
        assert entry["ms"] > 0
        assert 0 <= entry["error_frobenius"] < limit and 0 <= entry["error_componentwise"] < limit
        assert entry["torch"] == torch.__version__
        assert entry["gpu"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    assert results[1]["speedup"] == pytest.approx(results[0]["ms"] / results[1]["ms"])
    printed = capsys.readouterr().out
    assert f"{dtype}," in printed and "torch.compile: not timed, left out here" in printed


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision(precision, without_compile, capsys):
    assert main([*SMALL, "--precision", precision]) == 0
    assert torch.get_float32_matmul_precision() == precision
    assert f"precision '{precision}'" in capsys.readouterr().out


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--shape M,K,N", "--dtype", "--precision", "--json FILE", "--export FILE", "1024,8192,8192"):
        assert option in printed


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--shape", shape] for shape in ("1,2", "1,2,3,4", "0,1,1", "00,1,1", "1,-2,3", "a,b,c", "1.5,2,3", "")),
        ["--dtype", "int8"],
        ["--precision", "low"],
        ["--json"],
        ["--unknown"],
        ["extra"],
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
def test_a_wrong_operator_is_noticed(wrong, without_compile, monkeypatch, capsys):
    right = model_new.ModelNew.forward
    monkeypatch.setattr(model_new.ModelNew, "forward", lambda self, x: wrong(right(self, x)))
    assert main(SMALL) == 1
    assert "FAIL ModelNew is Model" in capsys.readouterr().out


def test_other_weights_are_noticed(without_compile, monkeypatch, capsys):
    def init(self, *arguments):
        torch.rand(1)
        right(self, *arguments)

    right = model_new.ModelNew.__init__
    monkeypatch.setattr(model_new.ModelNew, "__init__", init)
    assert main(SMALL) == 1
    assert "FAIL ModelNew and Model draw the same weights" in capsys.readouterr().out


def test_export_writes_a_file_and_stops(tmp_path, capsys):
    path = tmp_path / "one file.py"
    assert main(["--export", str(path)]) == 0
    assert path.read_text(encoding="utf-8").startswith(
        pathlib.Path(model_new.__file__).read_text(encoding="utf-8")[:500]
    )
    assert capsys.readouterr().out == f"wrote {path}\n"
