"""Fills the tables of README.md and docs/*.md from what bench/measure.py and bench/grid.py measured, and ladder.json.

    python bench/tables.py             from bench/results/nvidia-h200.json, and beside it -high.json and -grid.json
    python bench/tables.py --check     writes nothing; exit status 1 where a file is not what would be written

A table stands between `<!-- name -->` and `<!-- /name -->`. One whose rows the results lack is left as it is.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LADDER = ROOT / "bench/results/ladder.json"
FILES = ("README.md", "docs/OPTIMIZATIONS.md", "docs/ACCURACY.md", "docs/NOTEBOOK.md")
AS_GOOD, ROUNDOFF = 1.02, 1.5e-7  # an error is as good as another up to so many times it, and up to this one
WHERE = "{gpu}, torch {torch}, M, K, N = {shape}"
LABELS = {
    "torch.compile, max-autotune": "torch.compile (max-autotune)",
    "library + epilogue": "cuBLAS SGEMM + fused epilogue",
    "cuBLAS SGEMM": "cuBLAS SGEMM alone *",
    "cuBLAS fp16, float32 output": "yardstick: cuBLAS fp16 GEMM, float32 output *",
    "cuBLAS GEMM": "cuBLAS GEMM alone *",
}


def results_path(gpu="NVIDIA H200", suffix=""):
    """Where what was measured on a GPU of this name is kept; suffix: "" or "high" (bench/measure.py), "grid"."""
    return companion(ROOT / "bench/results" / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"), suffix)


def companion(path, suffix):
    """The file beside a results file that holds the same GPU's results of another kind."""
    return path.with_stem(f"{path.stem}-{suffix}") if suffix else path


def some_of(choices, text):
    """The names in `text`, separated by commas; argparse.ArgumentTypeError where one is none of the choices."""
    names = text.split(",")
    if not set(names) <= set(choices):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(choices)}, got {text!r}")
    return names


def error(value):
    return "–" if math.isnan(value) else f"{value:.1e}".replace("e-0", "e-").replace("e+00", "")


def table(header, rows, note=""):
    """Cells are strings or numbers; note: a paragraph below."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, rule, *rows)]
    return "\n".join([*lines, "", note] if note else lines)


def label(row):
    text = LABELS.get(row["name"], row["name"]) + (f" ({row['kernel']})" if row["kernel"] else "")
    if row["dtype"] != "float32":
        return text.replace("SGEMM", "GEMM")
    return text if row["precision"] == "highest" else text.replace("SGEMM", "TF32 GEMM")


def kind(row):
    """The dtype, and for float32 the precision."""
    return f"float32, '{row['precision']}'" if row["dtype"] == "float32" else row["dtype"]


def marked(row, cells):
    """A row's cells; ours bold."""
    return [f"**{cell}**" for cell in cells] if row["name"] == "ModelNew" else cells


def times_of(rows, eager, labels):
    """A table's body: what labels(row) says, burst and sustained, each in ms and against eager(row)'s, and the error.
    A dash stands where a rival was not measured so.
    """
    body = []
    for row in rows:
        cells = labels(row)
        for key in ("ms", "sustained"):
            ms, of_eager = row.get(key), eager(row).get(key)
            cells += [f"{ms:.3f}", f"{of_eager / ms:.2f}×"] if ms and of_eager else ["–", "–"]
        body.append(marked(row, [*cells, error(row["error_frobenius"])]))
    return body


TIMES = ["burst, ms", "against eager", "sustained, ms", "against eager", "error"]
HOW = "Burst: in turns, the L2 cache flushed; sustained: back to back for seconds; medians."


def times(rows):
    """At one precision; 16 bits: of one dtype after the other."""
    # JAX has been timed back to back only.
    rows = [row | {"ms": None, "sustained": row["ms"]} if row.get("timing") else row for row in rows]
    eager = {row["dtype"]: row for row in rows if row["name"] == "eager"}
    several = len(eager) > 1
    body = times_of(rows, lambda row: eager[row["dtype"]], lambda row: [row["dtype"]] * several + [label(row)])
    note = f"{WHERE.format(**rows[0])}. {HOW} Errors against float64, Frobenius norm."
    return table([*[""] * several, "", *TIMES], body, f"{note} * A bare GEMM: its product's error.")


def summary(results):
    """Six rows: what there was before, the best rival that is as accurate, and this layer."""
    rows = [row for row in results if row["section"].startswith("time")]
    eager = {kind(row): row for row in rows if row["name"] == "eager"}
    ours = {kind(row): row for row in rows if row["name"] == "ModelNew"}
    full = [row for row in rows if kind(row) == "float32, 'highest'"]
    as_accurate = [row for row in full if row["error_frobenius"] <= full[0]["error_frobenius"]]
    triton = [row for row in as_accurate if row["name"].startswith("Triton")]
    chosen = [row for row in full if row["name"] in ("eager", "torch.compile")]
    chosen += sorted(triton, key=lambda row: row["ms"])[:1]
    chosen += [ours[name] for name in ("float32, 'highest'", "float32, 'high'", "bfloat16") if name in ours]
    body = times_of(chosen, lambda row: eager[kind(row)], lambda row: [label(row), kind(row)])
    note = f"{WHERE.format(**full[0])}. {HOW} Against eager of the same precision. "
    return table(
        ["", "", *TIMES], body, f"{note}Error: of out, relative, in the Frobenius norm; x is uniform in [0, 1)."
    )


def ladder(rows):
    body = []
    for row in rows:
        predicted = f"{row['predicted']:g}" if row["predicted"] else ""
        body.append([row["step"], row["what"], predicted, f"{row['ms']:.3f}"])
    return table(["step", "what changed", "predicted, ms", "ms"], body)


def of_most_rows(rows):
    """Of slow-data, the rows at the largest M."""
    most = max(row["shape"][0] for row in rows)
    return [row for row in rows if row["shape"][0] == most]


def accuracy(rows):
    body, rows = [], of_most_rows(rows)
    for row in rows:
        cells = [row["name"]]
        for key in ("error_frobenius", "error_componentwise"):
            ours, library = row[key], row["library_" + key]
            worse = not ours <= library and not (math.isnan(ours) and math.isnan(library))  # both: 0 / 0 somewhere
            cells += [f"**{error(ours)}**" if worse else error(ours), error(library)]
        body.append([*cells, f"{row['ms']:.2f}", f"{row['speedup']:.2f}×"])
    kernel, library = rows[0]["kernel"], "SGEMM" if rows[0]["precision"] == "highest" else "TF32"
    header = ["data", f"{kernel}, Frobenius", library, f"{kernel}, componentwise", library, "ms", "against eager"]
    note = f"{WHERE.format(**rows[0])}, {kind(rows[0])}. Errors of z. Bold: worse than {library}."
    note += " Times: medians of seven calls in turns with eager's."
    note += " Every call, repeated, gave the same bits." if all(row["bit_identical"] for row in rows) else ""
    note += "" if all(row["kernel"] == kernel for row in rows) else f" NOT all were computed by {kernel}."
    return table(header, body, note)


GUARANTEE = (  # ten rows
    "uniform x, Linear's init",
    "normal·10^U(-6,6), both",
    "rows ·10^U(-15,15), both",
    "all positive",
    "one 1e8 per x row, w 0 there",
    "columns 2^0..2^-40, w inverse",
    "cancelling halves (1e-6)",
    "softmax(8·normal)",
    "one-hot x",
    "64 timestamp columns, w 0 there",
)


def guarantee(rows):
    found = {row["name"]: row for row in of_most_rows(rows)}
    body = []
    for row in filter(None, map(found.get, GUARANTEE)):
        errors = error(row["error_frobenius"]), error(row["library_error_frobenius"])
        body.append([row["name"], *errors, f"{row['ms']:.2f}", f"{row['library_ms']:.2f}"])
    return table(["data", "error, ours", "SGEMM", "burst, ms", "eager, ms"], body)


def slow_data(rows):
    """Times for each M."""
    found = {}
    for row in rows:
        text = f"{row['ms']:.3f} / {row['library_ms']:.3f} ({row['speedup']:.2f}×)"
        found.setdefault(row["name"], {})[row["shape"][0]] = text
    ms = sorted({row["shape"][0] for row in rows}, reverse=True)
    body = [[name, *(texts[m] for m in ms)] for name, texts in found.items()]
    note = (
        "{gpu}, torch {torch}, K, N = {shape[1]}, {shape[2]}, {dtype}, '{precision}'; medians of seven calls in turns,"
    )
    return table(["ms, ours / eager", *(f"M = {m}" for m in ms)], body, f"{note} the cache flushed.".format(**rows[0]))


def good_and_bad(cells):
    """Of cells that end in our error and the library's: where ours is as good, and where it is not, nor roundoff."""
    good = [cell for cell in cells if cell[-2] <= AS_GOOD * cell[-1]]
    return good, [cell for cell in cells if not cell[-2] <= max(AS_GOOD * cell[-1], ROUNDOFF)]


def accuracy_grid(rows):
    """A row for each kind of data, of z and of the gradients."""
    body = []
    for what, of in (("z", "z"), ("gradients", "gradient")):
        chosen = [row for row in rows if row["name"].startswith(of)]
        cells = [(kind, row["shape"], *pair) for row in chosen for kind, pair in row["errors"].items()]
        for kind in [*dict.fromkeys(kind for kind, *_ in cells), None]:
            some = [cell for cell in cells if kind in (None, cell[0])]
            good, bad = good_and_bad(some)
            _, shape, ours, theirs = max(some, key=lambda cell: cell[2] / max(AS_GOOD * cell[3], ROUNDOFF))
            worst = f"{error(ours)}, {error(theirs)} at {', '.join(map(str, shape))}"
            name = f"{what}, {kind or 'all'}".replace("|", r"\|")  # |normal|
            body.append([name, len(some), f"{len(good) / len(some):.0%}", len(bad), worst])
    header = ["relative Frobenius error", "cells", f"≤ {AS_GOOD} × eager's", f"above that and {ROUNDOFF:g}"]
    note = (
        "{gpu}, torch {torch}, {dtype}, '{precision}'; shapes that fp16x3 serves. Against float64; eager's on the same"
    )
    return table([*header, "ours, eager at the worst (M, K, N)"], body, f"{note} data.".format(**rows[0]))


def harness(rows):
    body = []
    for row in rows:
        cells = [row["dtype"], label(row), "ahead" if row["host_ahead"] else "waits"]
        body.append(marked(row, [*cells, f"{row['mean']:.3f}", f"{row['ms']:.3f}", f"{row['speedup']:.2f}×"]))
    note = WHERE + "; 100 calls, before each of which the host waits for the GPU and overwrites 256 MB. Ahead: the GPU"
    note += " has a millisecond to do before the first event, the host does not count."
    return table(["", "", "host", "mean, ms", "median, ms", "eager's mean / this"], body, note.format(**rows[0]))


def epilogue(rows):
    formats = {"name": "{}", "ms": "{:.4f}", "gb_per_s": "{:.0f}", "of_copy": "{:.0%}", "of_big_copy": "{:.0%}"}
    body = [[text.format(row[key]) for key, text in formats.items()] for row in rows]
    return table(["", "ms", "GB/s", "of a copy of this size", "of the large copy"], body)


def energy(rows):
    body = []
    decimals = {"ms": 3, "sm_clock_mhz": 0, "power_w": 0, "millijoules": 0, "energy_ratio": 2}
    for row in rows:
        cells = ["–" if row[key] is None else f"{row[key]:.{count}f}" for key, count in decimals.items()]
        body.append(marked(row, [label(row), kind(row), *cells]))
    note = WHERE + "; calls back to back, the cache not flushed; medians of what"
    note += " nvidia-smi says of clock and power. * A bare GEMM, whose energy is that of the last column."
    return table(["", "", "ms", "SM clock, MHz", "power, W", "mJ a call", "/ GEMM"], body, note.format(**rows[0]))


def host(rows):
    """Of section host, or of networks, which has several widths."""
    cost = {(*row["name"].split(", ", 1), row["shape"][1]): row["ms"] * 1e3 for row in rows}  # who, what, K: µs
    several = len({width for *_, width in cost}) > 1
    body = []
    for (who, what, width), eager in cost.items():
        if who == "eager":
            new, name = cost["ModelNew", what, width], f"{what}, width {width}" if several else what
            body.append([name, f"{eager:.0f}", f"{new:.0f}", f"{new / eager:.2f}"])
    return table(["host's µs per call", "eager", "ModelNew", "ratio"], body)


def grid_panels(rows):
    """{precision's name: ([M], [(K, N)], {(M, K, N): row})} of ModelNew's rows of the grid."""
    panels = {}
    for row in rows:
        if row["name"] == "ModelNew":
            panels.setdefault(kind(row), {})[tuple(row["shape"])] = row
    return {
        name: (sorted({m for m, _, _ in found}), list(dict.fromkeys((k, n) for _, k, n in found)), found)
        for name, found in panels.items()
    }


def grid_summary(rows):
    body, panels = [], grid_panels(rows)
    for name, (_, _, found) in panels.items():
        worst = min(found.values(), key=lambda row: row["speedup"])
        speedups = [row["speedup"] for row in found.values()]
        plain = [1 / row["ratio_to_eager_host"] for row in found.values()]
        cells = [f"{of(values):.2f}×" for values in (speedups, plain) for of in (min, statistics.median, max)]
        body.append([name, *cells[:3], f"{', '.join(map(str, worst['shape']))} ({worst['kernel']})", *cells[3:]])
    header = ["against eager", "min", "median", "max", "at its worst (M, K, N)", "plain calls: min", "median", "max"]
    ms, sizes, _ = next(iter(panels.values()))
    note = f"{{gpu}}, torch {{torch}}; M from {ms[0]} to {ms[-1]}, K×N: {', '.join(f'{k}×{n}' for k, n in sizes)}."
    note += " On the left the device's time (CUDA graphs, L2 flushed), on the right calls back to back, the host's cost"
    return table(header, body, f"{note} included.".format(**rows[0]))


TABLES = {  # marker: (section of the results and precision, None for all; their rows -> text)
    "summary": (None, None, summary),
    "times": ("time", "highest", times),
    "times-high": ("time", "high", times),
    "times-16bit": ("time-16bit", "highest", times),
    "ladder": ("ladder", None, ladder),
    "accuracy": ("slow-data", "highest", accuracy),
    "accuracy-high": ("slow-data", "high", accuracy),
    "guarantee": ("slow-data", "highest", guarantee),
    "slow-data": ("slow-data", "highest", slow_data),
    "slow-data-high": ("slow-data", "high", slow_data),
    "accuracy-grid": ("accuracy-grid", "highest", accuracy_grid),
    "harness": ("harness", "highest", harness),
    "epilogue": ("epilogue", "highest", epilogue),
    "energy": ("energy", None, energy),
    "host": ("host", "highest", host),
    "networks": ("networks", "highest", host),
    "grid-summary": ("grid", None, grid_summary),
}


def fill(text, results):
    steady = {(row["name"], kind(row)): row["ms"] for row in results if row["section"] == "energy"}
    for row in results:
        if row["section"].startswith("time"):
            row["sustained"] = steady.get((row["name"], kind(row)))
    for marker, (section, precision, make) in TABLES.items():
        pattern = re.compile(rf"(?<=<!-- {marker} -->\n).*?(?=<!-- /{marker} -->)", re.DOTALL)
        rows = [row for row in results if section in (None, row["section"]) and precision in (None, row["precision"])]
        if rows and pattern.search(text):
            made = make(rows) + "\n"
            text = pattern.sub(lambda _, made=made: made, text)
    return text


def read(*paths):
    """The rows of those results files that are there."""
    return [row for path in paths if path.is_file() for row in json.loads(path.read_text(encoding="utf-8"))]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench/tables.py", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=results_path(), metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a file would change")
    arguments = parser.parse_args(argv)
    if not arguments.results.is_file():
        parser.error(f"there is no {arguments.results}; bench/measure.py writes one")
    results = read(*(companion(arguments.results, suffix) for suffix in ("", "high", "grid")), LADDER)
    old = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
    new = {name: fill(text, results) for name, text in old.items()}
    stale = [name for name in FILES if new[name] != old[name]]
    if arguments.check and stale:
        sys.exit(f"not what the results say: {', '.join(stale)}")
    for name in stale:
        (ROOT / name).write_text(new[name], encoding="utf-8")


if __name__ == "__main__":
    main()
