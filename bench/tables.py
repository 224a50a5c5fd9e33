"""Fills the tables of README.md and docs/OPTIMIZATIONS.md from a results file of bench/reference.py.

    python bench/tables.py             from bench/results/nvidia-h200.json
    python bench/tables.py --check     writes nothing; exit status 1 where a file is not what would be written

A table stands between `<!-- name -->` and `<!-- /name -->`. One whose rows the results lack is left as it is.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("README.md", "docs/OPTIMIZATIONS.md")
WHERE = "{gpu}, torch {torch}, M, K, N = {shape}, {dtype}, '{precision}'"
LABELS = {
    "library + epilogue": "cuBLAS SGEMM + fused epilogue",
    "Triton tf32x3, fused epilogue": "Triton, tf32x3, fused epilogue",
    "cuBLAS SGEMM": "cuBLAS SGEMM alone *",
    "cuBLAS fp16, float32 output": "yardstick: cuBLAS fp16 GEMM, float32 output *",
}


def error(value):
    return "–" if math.isnan(value) else f"{value:.1e}".replace("e-0", "e-").replace("e+00", "")


def table(header, rows):
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def label(row):
    return LABELS.get(row["name"], row["name"]) + (f" ({row['kernel']})" if row["kernel"] else "")


def times(rows, full):
    body = []
    for row in rows:
        cells = [label(row)]
        cells += [f"{row[key]:.3f}" for key in (("ms", "p10", "p90") if full else ("ms",))] + [f"{row['speedup']:.2f}×"]
        cells += [f"{row['ratio_to_fp16']:.2f}"] if full else []
        cells += [error(row["error_frobenius"]), error(row["error_componentwise"])]
        if full or row["name"] != "cuBLAS SGEMM":
            body.append([f"**{cell}**" for cell in cells] if row["name"] == "ModelNew" else cells)
    header = ["", "ms", *(["p10", "p90"] if full else []), "against eager", *(["/ fp16"] if full else [])]
    header += ["error, Frobenius", "componentwise"]
    note = f"{WHERE.format(**rows[0])}; medians with the L2 cache flushed, timed in turns. Errors against float64: "
    note += "Frobenius norm, and max error / (abs(x)·abs(W)ᵀ + abs(b) + s). * A bare GEMM: its product's error."
    return f"{table(header, body)}\n\n{note}"


def accuracy(rows):
    body = []
    for row in rows:
        cells = [row["name"]]
        for key in ("error_frobenius", "error_componentwise"):
            ours, library = row[key], row["library_" + key]
            worse = not ours <= library and not (math.isnan(ours) and math.isnan(library))  # both: 0 / 0 somewhere
            cells += [f"**{error(ours)}**" if worse else error(ours), error(library)]
        body.append(cells)
    header = ["data", "fp16x3, Frobenius", "SGEMM", "fp16x3, componentwise", "SGEMM"]
    note = f"{WHERE.format(**rows[0])}. Bold: worse than SGEMM."
    note += " Every call, repeated, gave the same bits." if all(row["bit_identical"] for row in rows) else ""
    note += "" if all(row["kernel"] == "fp16x3" for row in rows) else " NOT all were computed by fp16x3."
    return f"{table(header, body)}\n\n{note}"


def epilogue(rows):
    formats = {"name": "{}", "ms": "{:.4f}", "gb_per_s": "{:.0f}", "of_copy": "{:.0%}", "of_big_copy": "{:.0%}"}
    body = [[text.format(row[key]) for key, text in formats.items()] for row in rows]
    return table(["", "ms", "GB/s", "of a copy of this size", "of the large copy"], body)


def host(rows):
    cost = {tuple(row["name"].split(", ", 1)): row["ms"] * 1e3 for row in rows}  # (who, what): microseconds
    pairs = [(what, cost["eager", what], cost["ModelNew", what]) for who, what in cost if who == "eager"]
    body = [[what, f"{eager:.0f}", f"{new:.0f}", f"{new / eager:.2f}"] for what, eager, new in pairs]
    return table(["host's µs per call", "eager", "ModelNew", "ratio"], body)


TABLES = {  # marker: (section of the results, its rows -> text)
    "results": ("time", lambda rows: times(rows, full=False)),
    "times": ("time", lambda rows: times(rows, full=True)),
    "accuracy": ("accuracy", accuracy),
    "epilogue": ("epilogue", epilogue),
    "host": ("host", host),
}


def fill(text, results):
    for marker, (section, make) in TABLES.items():
        pattern = re.compile(rf"(?<=<!-- {marker} -->\n).*?(?=<!-- /{marker} -->)", re.DOTALL)
        rows = [row for row in results if row["section"] == section]
        if rows and pattern.search(text):
            made = make(rows) + "\n"
            text = pattern.sub(lambda _, made=made: made, text)
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench/tables.py", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/nvidia-h200.json", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a file would change")
    arguments = parser.parse_args(argv)
    if not arguments.results.is_file():
        parser.error(f"there is no {arguments.results}; bench/reference.py writes one")
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    old = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
    new = {name: fill(text, results) for name, text in old.items()}
    stale = [name for name in FILES if new[name] != old[name]]
    if arguments.check and stale:
        sys.exit(f"not what the results say: {', '.join(stale)}")
    for name in stale:
        (ROOT / name).write_text(new[name], encoding="utf-8")


if __name__ == "__main__":
    main()
