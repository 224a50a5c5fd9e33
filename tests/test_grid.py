"""bench/grid.py without a GPU: what is measured, the arithmetic, the budget, the rows and the report."""

import itertools
import json
import os
import sys
import time
import types

import pytest
import torch

import model_new

pytest.importorskip("triton")  # bench/reference.py, whose helpers grid.py uses, ends without it
from bench import grid


def test_the_default_grid():
    arguments = grid.parse_arguments([])
    todo = grid.cells(arguments.precisions, arguments.rows, arguments.sizes)
    assert len(todo) == len(set(todo)) == 4 * 11 * 6 and arguments.seconds == 150
    assert todo[0] == ("highest", 1, 8192, 8192) and todo[-1] == ("float16", 8192, 8191, 8193)
    assert len(list(itertools.groupby(todo, lambda cell: cell[2:]))) == 6  # all of a K, N together


def test_options(capsys):
    arguments = grid.parse_arguments(["--precisions", "float16,high", "--rows", "7,7", "--sizes", "4x5,1x2"])
    assert (arguments.precisions, arguments.rows) == (["float16", "high"], [7])
    assert arguments.sizes == [(4, 5), (1, 2)]
    for bad in (["--precisions", "low"], ["--rows", "0"], ["--rows", "1,"], ["--sizes", "4x"], ["--sizes", "4"]):
        with pytest.raises(SystemExit):
            grid.parse_arguments(bad)
    capsys.readouterr()


@pytest.mark.parametrize(
    "precision, shape, copy_rate, expected",
    [
        ("highest", (1024, 8192, 8192), 4e12, 0.49084),  # 3 · 2 · 2^36 / 840e12
        ("high", (1024, 8192, 8192), 4e12, 0.16361),
        ("bfloat16", (1024, 8192, 8192), 4e12, 0.15834),
        ("float16", (1024, 8192, 8192), 4e12, 0.16361),
        ("highest", (1, 8192, 8192), 4e12, 0.067125),  # 4 · (2^26 + 2^14) / 4e12
        ("bfloat16", (1, 8192, 8192), 2e12, 0.067125),
        ("high", (8, 10, 100), 1e9, 0.00752),  # 4 · (1000 + 80 + 800) / 1e9
    ],
)
def test_roofline(precision, shape, copy_rate, expected):
    assert grid.roofline_ms(precision, *shape, copy_rate) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "m, k, n, count", [(8192, 8192, 8192, 32), (8192, 1024, 512, 4096), (3, 8, 8, 3), (1, 8, 8, 1)]
)
def test_checked_rows(m, k, n, count):
    rows = grid.checked_rows(m, k, n)
    assert len(rows.unique()) == count and rows[0] == 0 and rows[-1] == m - 1
    assert count * k * n <= 2**31


@pytest.mark.parametrize(
    "costs, options, turns",
    [
        ((25.0, 0.5), {}, 5),
        ((30.0, 30.0), {}, 5),
        ((2.0, 0.5), {}, 20),
        ((0.001, 0.001), {}, 40),
        ((2.0, 0.5), {"budget_ms": 0}, 5),
        ((1.0, 1.0), {"budget_ms": 500, "most": 300}, 300),
    ],
)
def test_repeats_follow_the_budget(costs, options, turns):
    calls = []
    samplers = {i: lambda i=i, ms=ms: calls.append(i) or ms for i, ms in enumerate(costs)}
    assert grid.samples_in_turns(samplers, **options) == {i: [ms] * turns for i, ms in enumerate(costs)}
    assert calls == [0, 1] * (turns + 1)  # in turns, one of which warms up


def test_plain_calls_are_timed_in_blocks(monkeypatch):
    blocks = []
    monkeypatch.setattr(grid, "block_milliseconds", lambda function, calls: blocks.append(calls) or calls * function())
    functions = {"eager": lambda: 0.125, "ModelNew": lambda: 0.0625}
    assert grid.host_times(functions, {"eager": 0.125, "ModelNew": 0.001}) == {"eager": 0.125, "ModelNew": 0.0625}
    assert blocks == [20, 50] * 10  # 2.5 and 3.125 ms a block: nine times for 50 ms, after one that warms up
    blocks.clear()
    grid.host_times(functions, {"eager": 5.0, "ModelNew": 0.5})
    assert blocks == [1, 5] * 6


class FakeDevice:
    """A clock that only the layers and the start of a cell move, in place of CUDA's events and the wall clock."""

    def __init__(self, monkeypatch, milliseconds):
        self.now = 0.0
        for name, ms in milliseconds.items():
            kind = {"eager": model_new.Model, "ModelNew": model_new.ModelNew}[name]
            monkeypatch.setattr(grid, kind.__name__, self.slow(kind, ms))
        monkeypatch.setattr(grid, "DEVICE", "cpu")
        monkeypatch.setattr(grid, "clock", lambda: self.now)
        monkeypatch.setattr(grid, "device_milliseconds", lambda function: grid.block_milliseconds(function, 1))
        monkeypatch.setattr(grid, "captured", lambda function: (function, function()))
        monkeypatch.setattr(grid, "copy_bytes_per_second", lambda: 4e12)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(uuid="1-2"))
        monkeypatch.setattr(grid, "_environment", lambda: "Some GPU")

    def slow(device, kind, ms):
        class Slow(kind):
            def forward(self, x):
                device.now += ms / 1e3
                return super().forward(x)

        return Slow


SMALL = ["--rows", "1,5", "--sizes", "64x48,32x16"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """(options, ms of eager's and of ModelNew's calls) -> exit status and rows, on a FakeDevice."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi

    def run(*options, eager=1.0, new=0.5):
        FakeDevice(monkeypatch, {"eager": eager, "ModelNew": new})
        output = tmp_path / "some-grid.json"
        status = grid.main([*options, "--output", str(output)])
        return status, json.loads(output.read_text(encoding="utf-8"))

    return run


def test_rows(run, capsys):
    status, rows = run(*SMALL)
    assert status == 0
    *rows, conditions = rows
    assert len(rows) == 2 * 4 * 2 * 2
    assert {(row["precision"], row["dtype"]) for row in rows} == {
        ("highest", "float32"),
        ("high", "float32"),
        ("highest", "bfloat16"),
        ("highest", "float16"),
    }
    for eager, new in zip(rows[::2], rows[1::2]):
        assert (eager["name"], new["name"]) == ("eager", "ModelNew") and eager["shape"] == new["shape"]
        assert [eager["ms"], eager["ms_host"]] == pytest.approx([1.0] * 2) and eager["kernel"] is None
        assert [new[key] for key in ("ms", "p10", "p90", "ms_host")] == pytest.approx([0.5] * 4)
        assert [new["ratio_to_eager"], new["ratio_to_eager_host"]] == pytest.approx([0.5] * 2)
        assert new["speedup"] == pytest.approx(2.0) and eager["ratio_to_eager"] == 1 and new["kernel"] == "cpu"
        assert new["of_roofline"] == pytest.approx(new["roofline_ms"] / 0.5)
        assert new["section"] == "grid" and new["gpu"] == "Some GPU" and new["torch"] == torch.__version__
        assert 0 <= new["error_frobenius"] < 1e-2 and 0 <= new["error_componentwise"] < 1e-2
        assert new["rows_checked"] == new["shape"][0]
    assert rows[1]["roofline_ms"] == pytest.approx(4 * (64 * 48 + 64 + 48) / 4e9)
    assert conditions["section"] == "conditions" and conditions["copy_gb_per_s"] == 4000
    assert conditions["power_w"] is None and conditions["not_measured"] == conditions["failed"] == []
    printed = capsys.readouterr()
    assert "0.50/0.50 cpu" in printed.out and "0 of 16 cells" in printed.out and "not sampled" in printed.out
    assert "K, N = 32, 16: 16/16 cells" in printed.err
    assert torch.get_float32_matmul_precision() == "highest"


def test_slow_cells_are_listed(run, capsys):
    status, _ = run(*SMALL, "--precisions", "high", new=1.03)
    out = capsys.readouterr().out
    assert status == 0 and "more than 2% slower than eager: 4 of 4 cells" in out
    assert (
        "float32 'high'    [5, 32, 16]          cpu           1.0300 ms" in out and "of eager 1.030, plain 1.030" in out
    )
    run(*SMALL, "--precisions", "high", new=1.01)
    assert "0 of 4 cells" in capsys.readouterr().out


def test_the_budget_ends_the_run(run, capsys):
    status, rows = run(*SMALL, "--seconds", "0.2")  # a cell takes about 0.1 seconds of the fake clock
    *rows, conditions = rows
    assert status == 0 and 0 < len(rows) < 32
    assert len(rows) / 2 + len(conditions["not_measured"]) == 16
    first = conditions["not_measured"][0]
    out = capsys.readouterr().out
    assert f"NOT MEASURED, the time was up or the device failed: {16 - len(rows) // 2} cells" in out
    assert ", ".join(map(str, first)) in out


def test_wrong_cells_fail_the_run(run, capsys, monkeypatch):
    def spoiled(outputs, x, *layer):
        outputs["ModelNew"][-1, -1] += 0.01 if x.dtype == torch.float32 else float("nan")
        return model_new.errors_against_float64(outputs, x, *layer)

    monkeypatch.setattr(grid, "errors_against_float64", spoiled)
    status, rows = run(*SMALL, "--precisions", "highest,float16")
    printed = capsys.readouterr()
    assert status == 1 and len(rows[-1]["failed"]) == 8
    assert printed.err.count("!!! WRONG") == 8 and "!!! FAILED OR WRONG: 8 cells" in printed.out


def test_a_cell_that_raises_leaves_the_others(run, capsys, monkeypatch):
    def select_kernel(x, weight, bias):
        if x.shape[0] == 5 and x.dtype == torch.bfloat16:
            raise RuntimeError("out of luck")
        return "fp16x3"

    monkeypatch.setattr(grid, "select_kernel", select_kernel)
    status, rows = run(*SMALL)
    printed = capsys.readouterr()
    assert status == 1 and len(rows) - 1 == 2 * 14 and "out of luck" in printed.err
    assert rows[-1]["failed"] == [["bfloat16", 5, 64, 48], ["bfloat16", 5, 32, 16]]


def test_a_device_that_failed_ends_the_run(run, capsys, monkeypatch):
    monkeypatch.setattr(grid, "select_kernel", lambda *tensors: 1 / 0)
    monkeypatch.setattr(grid, "device_works", lambda: False)
    status, rows = run(*SMALL)
    assert status == 1 and len(rows) == 1
    assert len(rows[0]["failed"]) == 1 and len(rows[0]["not_measured"]) == 15
    capsys.readouterr()


def test_progress_on_a_terminal_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(*SMALL)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.count("\r") == 16 and "16/16 cells" in err


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for nvidia-smi")
def test_conditions_are_sampled(monkeypatch, tmp_path):
    FakeDevice(monkeypatch, {})
    program = tmp_path / "nvidia-smi"
    lines = "1980, 690.5, 60", "x, [N/A], 3", "1500, 100, 40"
    program.write_text('#!/bin/sh\necho "$@" > "$0.log"\n' + "".join(f'echo "{line}"\n' for line in lines))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with grid.sampled_conditions() as samples:
        for _ in range(500):  # until both lines are there
            if len(samples) == 2:
                break
            time.sleep(0.01)
    assert samples == [(1980, 690.5, 60), (1500, 100, 40)]
    assert "--id=GPU-1-2" in (tmp_path / "nvidia-smi.log").read_text()
    row = grid.conditions_row(samples, "grid", seconds=3)
    assert row["sm_clock_mhz"] == {"median": 1740, "min": 1500, "max": 1980} and row["seconds"] == 3
    assert row["power_w"]["max"] == 690.5 and row["dtype"] is None
    assert "1740 MHz (1500 to 1980), 395.25 W (100 to 690.5)" in grid.described_conditions(row)
    assert grid.described_conditions(grid.conditions_row([], "grid")) == "conditions not sampled"


def test_says_so_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        grid.main([])
