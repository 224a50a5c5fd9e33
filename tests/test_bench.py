"""bench/: the documents' tables are those of the recorded results, figures can be drawn, sections make their tables."""

import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from fuzz import one_thread

ROOT = Path(__file__).resolve().parent.parent


def run(script, *options):
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=300)


def test_the_documents_hold_the_recorded_tables():
    result = run(ROOT / "bench/tables.py", "--check")
    assert result.returncode == 0, f"{result.stdout}{result.stderr}run python bench/tables.py"


def test_one_command_writes_tables_and_figures_from_what_was_recorded(tmp_path):
    """Tables that were changed by hand are those of the results again; figures name what they show."""
    pytest.importorskip("matplotlib")
    for folder in ("bench", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("figures", "__pycache__"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme.replace("| eager |", "| eagle |"), encoding="utf-8")
    assert run(tmp_path / "bench/tables.py", "--check").returncode == 1
    done = run(tmp_path / "bench/all.py", "--from-recorded")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme
    texts = {
        path.stem: " ".join(ElementTree.parse(path).getroot().itertext())
        for path in tmp_path.glob("docs/figures/*.svg")
    }
    assert set(texts) == {"error-against-time", "grid", "ladder", "time-against-m", "where-time-goes"}
    for name in ("eager", "torch.compile", "Triton tf32x3", "Triton bf16x6", "ModelNew (fp16x3)", "ModelNew float16"):
        assert name in texts["error-against-time"]
    assert "8192" in texts["grid"] and "three fp16 products" in texts["ladder"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("script", ["all.py", "measure.py", "grid.py"])
def test_without_a_gpu_it_says_so(script):
    done = run(ROOT / "bench" / script)
    assert done.returncode and "CUDA device" in done.stderr and "Traceback" not in done.stderr


# Sections, small and on the CPU: what they compute is right, and their rows are those that their tables read.


@pytest.fixture
def measure(monkeypatch):
    pytest.importorskip("triton")
    from bench import measure

    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "fp16x3_serves", lambda m, k, n: m > 1)
    for name, value in {
        "GRID_ROWS": (1, 2, 5),
        "GRID_SIZES": ((64, 32), (32, 64)),
        "GRADIENT_SHAPES": ((8, 16, 24),),
        "SLOW_ROWS": (9, 3),
        "HOST_BLOCK": 2,
        "HOST_CALLS": 4,
        "NETWORK_WIDTHS": (8, 16),
    }.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with one_thread():
        yield measure


def rows_and_table(measure, section):
    from bench import tables

    arguments = measure.parse_arguments(["--shape", "9,256,130"])
    with torch.no_grad():
        rows, good = measure.SECTIONS[section](arguments)
    assert good
    return rows, tables.fill(f"<!-- {section} -->\n<!-- /{section} -->\n", rows)


def test_accuracy_grid(measure, monkeypatch):
    """The table counts the errors that are worse than the library's: all of them, once ours are off by 2e-6."""
    rows, text = rows_and_table(measure, "accuracy-grid")
    assert [r["shape"] for r in rows if r["name"] == "z"] == [[m, *kn] for kn in ((64, 32), (32, 64)) for m in (2, 5)]
    assert {r["name"] for r in rows} == {"z", "gradient of x", "gradient of W", "gradient of b"}
    errors = [error for row in rows for pair in row["errors"].values() for error in pair]
    assert len(errors) == 2 * 8 * len(rows) and all(0 <= error < 1e-6 for error in errors)
    assert "| z, positive | 4 |" in text and "| gradients, all | 24 |" in text and "some GPU" in text
    right = measure.linear_sigmoid_residual
    monkeypatch.setattr(measure, "linear_sigmoid_residual", lambda *layer: right(*layer) * (1 + 2e-6))
    _, text = rows_and_table(measure, "accuracy-grid")
    assert "| z, all | 32 | 0% | 32 |" in text and "| gradients, all | 24 | 0% | 24 |" in text


def test_slow_data(measure):
    rows, text = rows_and_table(measure, "slow-data")
    names = {r["name"] for r in rows}
    assert len(rows) == 2 * len(names) and {"one-hot x", "softmax(30·normal)", "all positive"} < names
    for row in rows:
        assert row["bit_identical"] and row["speedup"] == pytest.approx(row["library_ms"] / row["ms"])
        assert row["error_frobenius"] == row["library_error_frobenius"]  # on the CPU
    assert "| one-hot x |" in text and "M = 9 | M = 3" in text and "some GPU" in text


@pytest.mark.parametrize("section", ["host", "networks"])
def test_what_a_caller_waits_for(section, measure):
    rows, text = rows_and_table(measure, section)
    assert {r["name"].partition(", ")[0] for r in rows} == {"eager", "ModelNew"} and all(r["ms"] > 0 for r in rows)
    assert "| forward + backward" in text and ("width 16" in text) == (section == "networks")
