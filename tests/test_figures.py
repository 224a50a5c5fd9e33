"""bench/figures.py and docs/figures: drawn from the results, well-formed, and there where the documents show them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_tables import grid_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results/nvidia-h200.json"
LADDER = ROOT / "bench/results/ladder.json"
needs_results = pytest.mark.skipif(not RESULTS.exists(), reason=f"{RESULTS.name} has not been measured")


def text_of(path):
    return " ".join("".join(element.itertext()) for element in ElementTree.parse(path).iter() if "text" in element.tag)


def run(script, *options):
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=300)


def draw(folder, results=RESULTS):
    result = run(ROOT / "bench/figures.py", "--output", folder, "--results", results)
    assert result.returncode == 0, result.stderr
    drawn = {path.name: path for path in folder.iterdir()}
    assert ("grid.svg not drawn" in result.stderr) == ("grid.svg" not in drawn)
    return drawn


@pytest.fixture
def results(tmp_path):
    """The recorded results, copied, with a made-up grid beside them."""
    path = tmp_path / "results.json"
    shutil.copy(RESULTS, path)
    path.with_name("results-grid.json").write_text(json.dumps(grid_rows()), encoding="utf-8")
    return path


@needs_results
def test_the_figures_name_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    drawn, again = draw(tmp_path / "once"), draw(tmp_path / "again")
    assert set(drawn) - {"grid.svg"} == {"error-against-time.svg", "ladder.svg"}
    assert all(drawn[name].read_bytes() == again[name].read_bytes() for name in drawn)
    points, bars = text_of(drawn["error-against-time.svg"]), text_of(drawn["ladder.svg"])
    for name in ("eager", "torch.compile", "cuBLAS SGEMM + fused epilogue", "Triton", "ModelNew", "fp16 GEMM"):
        assert name in points
    for step in json.loads(LADDER.read_text(encoding="utf-8")):
        assert step["what"] in bars and f"{step['ms']:.3g}" in bars


@needs_results
def test_no_rival_is_left_out(tmp_path, results):
    """However close together they are, and however slow."""
    pytest.importorskip("matplotlib")
    rows = json.loads(results.read_text(encoding="utf-8"))
    rows = [row for row in rows if not row["name"].startswith("JAX") and "max-autotune" not in row["name"]]
    timed = {row["name"]: row for row in rows if row["section"] == "time"}
    sixteen = [row for row in rows if row["section"] == "time-16bit" and row["name"] == "torch.compile"]
    rows = [*timed.values(), *sixteen]
    rows += [row | {"name": "torch.compile, max-autotune"} for row in (timed["torch.compile"], *sixteen)]
    eager, triton = timed["eager"], timed["Triton tf32x3, fused epilogue"]
    for name, row, slower in (
        ("F32", eager, 1.01),
        ("TF32x3", triton, 1.2),
        ("BF16x6", triton, 0.85),
        ("BF16x9", triton, 2.5),
        ("of the future", triton, 8.0),
    ):
        rows.append(row | {"name": f"JAX {name}", "ms": slower * row["ms"]})
    results.write_text(json.dumps(rows), encoding="utf-8")
    high = [row | {"precision": "high"} for row in rows if row["name"] in ("eager", "JAX BF16x9", "library + epilogue")]
    results.with_name("results-high.json").write_text(json.dumps(high), encoding="utf-8")
    text = text_of(draw(tmp_path / "drawn", results)["error-against-time.svg"])
    assert "torch.compile (with max-autotune, too), bfloat16" in text
    assert text.count("torch.compile (with max-autotune, too)") >= 3 and "cuBLAS SGEMM + fused epilogue" in text
    assert "JAX F32" in text
    for name in ("TF32x3", "BF16x6", "BF16x9", "of the future"):
        assert f"JAX {name}" in text
    for name in ("Triton tf32x3", "Triton bf16x3", "Triton bf16x6", "ModelNew (fp16x3)", "cuBLAS SGEMM alone"):
        assert name in text
    assert "eager, 'high'" in text and "JAX BF16x9, 'high'" in text and "fused epilogue, 'high'" not in text


@needs_results
def test_the_grid_shows_each_cell(tmp_path, results):
    pytest.importorskip("matplotlib")
    drawn, again = draw(tmp_path / "once", results), draw(tmp_path / "again", results)
    assert drawn["grid.svg"].read_bytes() == again["grid.svg"].read_bytes()
    text = text_of(drawn["grid.svg"])
    for part in ("float32, 'high'   (◥ fp16x1, else library)", "bfloat16   (◥ wgmma16", "a GPU", "–"):
        assert part in text
    for row in grid_rows():
        assert row["name"] != "ModelNew" or f"{row['speedup']:.2f}" in text
    results.with_name("results-grid.json").unlink()
    assert "grid.svg" not in draw(tmp_path / "without", results)


@needs_results
def test_one_command_writes_all_from_what_was_recorded(tmp_path, results):
    pytest.importorskip("matplotlib")
    for folder in ("bench", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("figures", "__pycache__"))
    (tmp_path / "README.md").write_text("<!-- grid-summary -->\n<!-- /grid-summary -->\n")
    done = run(tmp_path / "bench/all.py", "--from-recorded", "--results", results)
    assert done.returncode == 0, done.stderr
    assert "| bfloat16 | 1.00×" in (tmp_path / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in (tmp_path / "docs/figures").iterdir()}
    assert names == {"error-against-time.svg", "ladder.svg", "grid.svg"}
    results.unlink()
    done = run(tmp_path / "bench/all.py", "--from-recorded", "--results", results)
    assert done.returncode == 1 and "failed: tables.py, figures.py" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_the_one_command_says_so_without_a_gpu():
    done = run(ROOT / "bench/all.py")
    assert done.returncode == 2 and "--from-recorded" in done.stderr


@needs_results
def test_the_ladder_ends_at_the_measured_time():
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    (ms,) = (row["ms"] for row in rows if row["section"] == "time" and row["name"] == "ModelNew")
    assert json.loads(LADDER.read_text(encoding="utf-8"))[-1]["ms"] == pytest.approx(ms, rel=0.01)


def test_the_documents_show_figures_that_are_there():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"[(\"]([^()\"\s]+\.svg)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).is_file(), f"{document.name}: {link}"
    for figure in (ROOT / "docs/figures").glob("*.svg"):
        assert text_of(figure)
