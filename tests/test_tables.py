"""bench/tables.py: the tables of README.md and docs/OPTIMIZATIONS.md are those of the results file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "bench/results/nvidia-h200.json"


def run(root, *options):
    command = [sys.executable, str(root / "bench/tables.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(not (ROOT / RESULTS).exists(), reason=f"{RESULTS} has not been measured")
def test_the_files_hold_the_measured_tables():
    result = run(ROOT, "--check")
    assert result.returncode == 0, f"{result.stdout}{result.stderr}run python bench/tables.py"
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/OPTIMIZATIONS.md"))
    assert "not measured yet" not in text


@pytest.fixture
def copy(tmp_path):
    for name in ("README.md", "docs/OPTIMIZATIONS.md", "bench/tables.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def row(section, name, **values):
    common = {"precision": "highest", "dtype": "float32", "shape": [1, 2, 3], "torch": "2", "gpu": "a GPU"}
    times = {"ms": 0.0123, "p10": 0.5, "p90": 2.0, "speedup": 77.7, "ratio_to_fp16": 1.5, "kernel": None}
    errors = {"error_frobenius": 1.25e-7, "error_componentwise": float("nan")}
    return {"section": section, "name": name} | common | times | errors | values


def grid_rows():
    """A grid of M = 1, 16 and K, N = (8, 24), (24, 8) at 'high' and in bfloat16; one cell was not measured."""
    cells = {  # (dtype, M, K, N): (speedup, with the host's cost, kernel)
        ("float32", 1, 8, 24): (0.97, 0.5, "library"),
        ("float32", 16, 8, 24): (2.0, 1.0, "fp16x1"),
        ("float32", 1, 24, 8): (0.99, 1.25, "library"),
        ("float32", 16, 24, 8): (3.0, 2.0, "fp16x1"),
        ("bfloat16", 1, 8, 24): (1.5, 1.0, "wgmma16"),
        ("bfloat16", 16, 8, 24): (1.25, 1.0, "wgmma16"),
        ("bfloat16", 1, 24, 8): (1.0, 1.0, "library"),
    }
    rows = []
    for (dtype, *shape), (speedup, plain, kernel) in cells.items():
        common = {"dtype": dtype, "shape": shape, "precision": "high" if dtype == "float32" else "highest"}
        rows.append(row("grid", "eager", **common, ratio_to_eager_host=1.0) | {"speedup": 1.0})
        ours = {"speedup": speedup, "ratio_to_eager_host": 1 / plain, "kernel": kernel}
        rows.append(row("grid", "ModelNew", **common) | ours)
    return [*rows, conditions("grid", None)]


def conditions(section, precision):
    clock, power = {"median": 1800, "min": 1500, "max": 1980}, {"median": 650, "min": 100, "max": 700}
    values = {"sm_clock_mhz": clock, "power_w": power, "temperature_c": None}
    return row("conditions", section, precision=precision, dtype=None, shape=[], **values)


def test_tables_of_the_grid(copy):
    """Written from the file beside the results', where that is there, and checked with them."""
    marked = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("grid", "grid-summary", "times-high"))
    (copy / "README.md").write_text(marked)
    results, options = copy / "results.json", ["--results", str(copy / "results.json")]
    results.write_text("[]")
    assert run(copy, "--check", *options).returncode == 0  # nothing was measured, nothing is stale
    (copy / "results-grid.json").write_text(json.dumps(grid_rows()))
    high = row("time", "library + epilogue", error_of="out", precision="high")
    (copy / "results-high.json").write_text(json.dumps([high]))
    assert run(copy, "--check", *options).returncode == 1
    assert run(copy, *options).returncode == 0
    assert run(copy, "--check", *options).returncode == 0
    text = (copy / "README.md").read_text(encoding="utf-8")
    assert "float32, 'high':\n\n| M | 8×24 | 24×8 |\n| --- | ---: | ---: |\n" in text
    assert "\n| 1 | **0.97 library** | 0.99 library |\n| 16 | 2.00 fp16x1 | 3.00 fp16x1 |\n" in text
    assert "\n| 1 | 1.50 wgmma16 | 1.00 library |\n| 16 | 1.25 wgmma16 | – |\n" in text
    assert "| float32, 'high' | 0.97× | 1.50× | 3.00× | 1, 8, 24 (library) | 0.50× | 1.12× | 2.00× |" in text
    assert "| bfloat16 | 1.00× | 1.25× | 1.50× | 1, 24, 8 (library) | 1.00× | 1.00× | 1.00× |" in text
    assert "a GPU, torch 2; M from 1 to 16, K×N: 8×24, 24×8." in text
    assert text.count("SM clock 1800 MHz (1500 to 1980), power 650 W.\n<!--") == 2
    assert "| cuBLAS TF32 GEMM + fused epilogue | 0.012 |" in text


def test_writes_what_it_checks_and_nothing_else(copy):
    accuracy = {"kernel": "fp16x3", "bit_identical": True, "library_error_frobenius": 1e-7}
    accuracy["library_error_componentwise"] = float("nan")
    results = [
        row("time", "eager", error_of="out"),
        row("time", "ModelNew", error_of="out", kernel="fp16x3"),
        conditions("time", "highest"),
        conditions("epilogue", "highest"),
        conditions("accuracy", "highest") | {"sm_clock_mhz": None},  # there was no nvidia-smi
        row("accuracy", "some data", **accuracy),
        row("epilogue", "forward, in place", gb_per_s=3456.7, of_copy=0.5, of_big_copy=0.25),
        row(
            "energy",
            "ModelNew",
            kernel="fp16x3",
            sm_clock_mhz=1470.4,
            power_w=700,
            millijoules=464.3,
            energy_ratio=3.05,
        ),
        row(
            "energy",
            "cuBLAS GEMM",
            dtype="bfloat16",
            sm_clock_mhz=None,
            power_w=None,
            millijoules=None,
            energy_ratio=None,
        ),
        row("host", "eager, forward"),
        row("host", "ModelNew, forward"),
    ]
    (copy / "results.json").write_text(json.dumps(results))
    options = ["--results", str(copy / "results.json")]
    files = copy / "README.md", copy / "docs/OPTIMIZATIONS.md"
    before = [file.read_text(encoding="utf-8") for file in files]
    assert run(copy, "--check", *options).returncode == 1
    assert [file.read_text(encoding="utf-8") for file in files] == before
    assert run(copy, *options).returncode == 0
    assert run(copy, "--check", *options).returncode == 0
    readme, docs = (file.read_text(encoding="utf-8") for file in files)
    assert "**ModelNew (fp16x3)** | **0.012** | **77.70×**" in readme
    assert readme.count("SM clock 1800 MHz (1500 to 1980), power 650 W.\n<!--") == 1  # of "results"
    assert docs.count("SM clock 1800 MHz (1500 to 1980), power 650 W.\n<!--") == 1  # "times"; not the epilogue's
    assert "| some data | **1.2e-7** | 1.0e-7 | – | – | 0.01 | 78× |" in docs  # ours is worse, and 0 / 0 is not
    assert "| forward, in place | 0.0123 | 3457 | 50% | 25% |" in docs
    assert (
        "| **ModelNew (fp16x3)** | **float32, 'highest'** | **0.012** | **1470** | **700** | **464** | **3.05** |"
        in docs
    )
    assert "| cuBLAS GEMM alone * | bfloat16 | 0.012 | – | – | – | – |" in docs
    assert "| forward | 12 | 12 | 1.00 |" in docs
    for old, new in zip(before, (readme, docs)):  # outside the markers
        assert old.partition("<!--")[0] == new.partition("<!--")[0]
        assert old.rpartition("-->")[2] == new.rpartition("-->")[2]


def test_rivals_timed_by_the_wall_clock_are_marked(copy):
    """Where there are any: results recorded before there were have no such key."""
    (copy / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    results = [row("time", "torch.compile, max-autotune"), row("time", "ModelNew", kernel="fp16x3", timing=None)]
    jax = row("time", "JAX TF32x3", timing="wall clock, calls back to back")
    texts = []
    for rows in (results, [jax, *results]):
        (copy / "results.json").write_text(json.dumps(rows))
        assert run(copy, "--results", str(copy / "results.json")).returncode == 0
        texts.append((copy / "README.md").read_text(encoding="utf-8"))
        assert "| torch.compile (max-autotune) | 0.012 |" in texts[-1] and "| **ModelNew (fp16x3)** |" in texts[-1]
    assert "†" not in texts[0] and texts[1].count("†") == 2
    assert "| JAX TF32x3 † | 0.012 | 77.70× |" in texts[1]
    assert " † By the wall clock, calls back to back, the cache not flushed: a steady load" in texts[1]


def test_says_so_where_nothing_was_measured(copy):
    result = run(copy)
    assert result.returncode == 2 and "bench/reference.py" in result.stderr
