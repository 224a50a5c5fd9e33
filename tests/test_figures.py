"""bench/figures.py and docs/figures: drawn from the results, well-formed, and there where the documents show them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results/nvidia-h200.json"
LADDER = ROOT / "bench/results/ladder.json"
needs_results = pytest.mark.skipif(not RESULTS.exists(), reason=f"{RESULTS.name} has not been measured")


def text_of(path):
    return " ".join("".join(element.itertext()) for element in ElementTree.parse(path).iter() if "text" in element.tag)


def draw(folder):
    command = [sys.executable, str(ROOT / "bench/figures.py"), "--output", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return {path.name: path for path in folder.iterdir()}


@needs_results
def test_the_figures_name_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    drawn, again = draw(tmp_path / "once"), draw(tmp_path / "again")
    assert set(drawn) == {"error-against-time.svg", "ladder.svg"}
    assert all(drawn[name].read_bytes() == again[name].read_bytes() for name in drawn)
    points, bars = text_of(drawn["error-against-time.svg"]), text_of(drawn["ladder.svg"])
    for name in ("eager", "torch.compile", "cuBLAS SGEMM + fused epilogue", "Triton", "ModelNew", "fp16 GEMM"):
        assert name in points
    for step in json.loads(LADDER.read_text(encoding="utf-8")):
        assert step["what"] in bars and f"{step['ms']:.3g}" in bars


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
