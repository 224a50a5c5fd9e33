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
SLOWER = 1.02  # times eager's time: a cell of the grid to be marked
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


def table(header, rows):
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


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


def both(row, eager):
    """Burst and sustained, each in ms and against eager's; a dash where a rival was not measured so."""
    cells = []
    for key in ("ms", "sustained"):
        ms = row.get(key)
        cells += [f"{ms:.3f}", f"{eager[key] / ms:.2f}×"] if ms and eager.get(key) else ["–", "–"]
    return cells


BOTH = ["burst, ms", "against eager", "sustained, ms", "against eager"]
HOW = "Burst: in turns, the L2 cache flushed; sustained: back to back for seconds; medians."


def times(rows):
    """At one precision; 16 bits: of one dtype after the other."""
    body, several = [], len({row["dtype"] for row in rows}) > 1
    for row in rows:
        if row.get("timing"):  # JAX has been timed back to back only
            row = row | {"ms": None, "sustained": row["ms"]}
        eager = next(other for other in rows if (other["name"], other["dtype"]) == ("eager", row["dtype"]))
        cells = [*([row["dtype"]] if several else []), label(row), *both(row, eager)]
        body.append(marked(row, [*cells, error(row["error_frobenius"])]))
    note = f"{WHERE.format(**rows[0])}. {HOW} Errors against float64, Frobenius norm."
    return f"{table([*[''] * several, '', *BOTH, 'error'], body)}\n\n{note} * A bare GEMM: its product's error."


def summary(results):
    """Six rows: what there was before, the best rival that is as accurate, and this layer."""
    rows = [row for row in results if row["section"].startswith("time")]
    eager = {kind(row): row for row in rows if row["name"] == "eager"}
    full = [row for row in rows if kind(row) == "float32, 'highest'"]
    triton = [
        row for row in full if row["name"].startswith("Triton") and row["error_frobenius"] <= full[0]["error_frobenius"]
    ]
    chosen = [row for row in full if row["name"] in ("eager", "torch.compile")]
    chosen += sorted(triton, key=lambda row: row["ms"])[:1]
    ours = {kind(row): row for row in rows if row["name"] == "ModelNew"}
    chosen += [ours[name] for name in ("float32, 'highest'", "float32, 'high'", "bfloat16") if name in ours]
    body = [
        marked(row, [label(row), kind(row), *both(row, eager[kind(row)]), error(row["error_frobenius"])])
        for row in chosen
    ]
    note = f"{WHERE.format(**full[0])}. {HOW} Against eager of the same precision. "
    note += "Error: of out, relative, in the Frobenius norm; x is uniform in [0, 1)."
    return f"{table(['', '', *BOTH, 'error'], body)}\n\n{note}"


def ladder(rows):
    def cells(row):
        return [str(row["step"]), row["what"], f"{row['predicted']:g}" if row["predicted"] else "", f"{row['ms']:.3f}"]

    return table(["step", "what changed", "predicted, ms", "ms"], map(cells, rows))


def accuracy(rows):
    """Of slow-data, at the largest M."""
    body, most = [], max(row["shape"][0] for row in rows)
    rows = [row for row in rows if row["shape"][0] == most]
    for row in rows:
        cells = [row["name"]]
        for key in ("error_frobenius", "error_componentwise"):
            ours, library = row[key], row["library_" + key]
            worse = not ours <= library and not (math.isnan(ours) and math.isnan(library))  # both: 0 / 0 somewhere
            cells += [f"**{error(ours)}**" if worse else error(ours), error(library)]
        body.append([*cells, f"{row['ms']:.2f}", f"{row['speedup']:.2g}×"])
    kernel, library = rows[0]["kernel"], "SGEMM" if rows[0]["precision"] == "highest" else "TF32"
    header = ["data", f"{kernel}, Frobenius", library, f"{kernel}, componentwise", library, "ms", "against eager"]
    note = f"{WHERE.format(**rows[0])}, {kind(rows[0])}. Errors of z. Bold: worse than {library}."
    note += " Times: medians of seven calls in turns with eager's."
    note += " Every call, repeated, gave the same bits." if all(row["bit_identical"] for row in rows) else ""
    note += "" if all(row["kernel"] == kernel for row in rows) else f" NOT all were computed by {kernel}."
    return f"{table(header, body)}\n\n{note}"


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
    """Of slow-data, at the largest M."""
    found = {row["name"]: row for row in rows if row["shape"][0] == max(row["shape"][0] for row in rows)}
    body = []
    for name in filter(found.get, GUARANTEE):
        row = found[name]
        errors = [error(row[key + "error_frobenius"]) for key in ("", "library_")]
        body.append([name, *errors, f"{row['ms']:.2f}", f"{row['library_ms']:.2f}"])
    return table(["data", "error, ours", "SGEMM", "burst, ms", "eager, ms"], body)


def slow_data(rows):
    """Times for each M."""
    ms = sorted({row["shape"][0] for row in rows}, reverse=True)
    found = {(row["name"], row["shape"][0]): row for row in rows}
    body = []
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [found[name, m] for m in ms]
        body.append([name, *(f"{row['ms']:.3f} / {row['library_ms']:.3f} ({row['speedup']:.2f}×)" for row in cells)])
    header = ["ms, ours / eager", *(f"M = {m}" for m in ms)]
    note = (
        "{gpu}, torch {torch}, K, N = {shape[1]}, {shape[2]}, {dtype}, '{precision}'; medians of seven calls in turns,"
    )
    return f"{table(header, body)}\n\n{note.format(**rows[0])} the cache flushed."


def accuracy_grid(rows):
    """A row for each kind of data, of z and of the gradients."""
    body = []
    for what, of in (("z", "z"), ("gradients", "gradient")):
        chosen = [row for row in rows if row["name"].startswith(of)]
        cells = [(kind, row["shape"], *pair) for row in chosen for kind, pair in row["errors"].items()]
        for kind in [*dict.fromkeys(kind for kind, *_ in cells), None]:
            some = [cell for cell in cells if kind in (None, cell[0])]
            good = sum(ours <= AS_GOOD * theirs for *_, ours, theirs in some)
            bad = sum(not ours <= max(AS_GOOD * theirs, ROUNDOFF) for *_, ours, theirs in some)
            _, shape, ours, theirs = max(some, key=lambda cell: cell[2] / max(cell[3], 1e-300) if cell[2] else 0)
            worst = f"{error(ours)}, {error(theirs)} at {', '.join(map(str, shape))}"
            body.append([f"{what}, {kind or 'all'}", str(len(some)), f"{good / len(some):.0%}", str(bad), worst])
    header = ["relative Frobenius error", "cells", f"≤ {AS_GOOD} × eager's", f"above that and {ROUNDOFF:g}"]
    note = (
        "{gpu}, torch {torch}, {dtype}, '{precision}'; shapes that fp16x3 serves. Against float64; eager's on the same"
    )
    return f"{table([*header, 'ours, eager at the worst (M, K, N)'], body)}\n\n{note.format(**rows[0])} data."


def harness(rows):
    body = []
    for row in rows:
        cells = [row["dtype"], label(row), "ahead" if row["host_ahead"] else "waits"]
        body.append(marked(row, [*cells, f"{row['mean']:.3f}", f"{row['ms']:.3f}", f"{row['speedup']:.2f}×"]))
    note = WHERE + "; 100 calls, before each of which the host waits for the GPU and"
    note += (
        " overwrites 256 MB. Ahead: the GPU has a millisecond to do before the first event, the host does not count."
    )
    header = ["", "", "host", "mean, ms", "median, ms", "eager's mean / this"]
    return f"{table(header, body)}\n\n{note.format(**rows[0])}"


def epilogue(rows):
    formats = {"name": "{}", "ms": "{:.4f}", "gb_per_s": "{:.0f}", "of_copy": "{:.0%}", "of_big_copy": "{:.0%}"}
    body = [[text.format(row[key]) for key, text in formats.items()] for row in rows]
    return table(["", "ms", "GB/s", "of a copy of this size", "of the large copy"], body)


def energy(rows):
    body = []
    formats = {"ms": 3, "sm_clock_mhz": 0, "power_w": 0, "millijoules": 0, "energy_ratio": 2}  # decimals
    for row in rows:
        cells = [label(row), kind(row)]
        cells += ["–" if row[key] is None else f"{row[key]:.{decimals}f}" for key, decimals in formats.items()]
        body.append(marked(row, cells))
    header = ["", "", "ms", "SM clock, MHz", "power, W", "mJ a call", "/ GEMM"]
    note = WHERE + "; calls back to back, the cache not flushed; medians of what"
    note += " nvidia-smi says of clock and power. * A bare GEMM, whose energy is that of the last column."
    return f"{table(header, body)}\n\n{note.format(**rows[0])}"


def host(rows):
    """Of section host, or of networks, which has several widths."""
    cost = {(*row["name"].split(", ", 1), row["shape"][1]): row["ms"] * 1e3 for row in rows}  # who, what, K: µs
    widths = {width for *_, width in cost}
    body = []
    for who, what, width in cost:
        if who == "eager":
            eager, new = cost[who, what, width], cost["ModelNew", what, width]
            name = f"{what}, width {width}" if len(widths) > 1 else what
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


def grid_cell(row):
    if row is None:
        return "–"
    text = f"{row['speedup']:.2f} {row['kernel']}"
    return text if row["speedup"] >= 1 / SLOWER else f"**{text}**"


def grid(rows):
    parts = []
    for name, (ms, sizes, found) in grid_panels(rows).items():
        body = [[str(m), *(grid_cell(found.get((m, *size))) for size in sizes)] for m in ms]
        parts.append(f"{name}:\n\n" + table(["M", *(f"{k}×{n}" for k, n in sizes)], body))
    note = "{gpu}, torch {torch}; columns: K×N. Eager's time over ModelNew's, and the kernel; medians of CUDA graphs"
    note += f" with the L2 cache flushed, timed in turns. Bold: more than {SLOWER - 1:.0%} slower than eager."
    return "\n\n".join([*parts, note.format(**rows[0])])


def grid_summary(rows):
    body = []
    for name, (_, _, found) in grid_panels(rows).items():
        worst = min(found.values(), key=lambda row: row["speedup"])
        speedups = [row["speedup"] for row in found.values()]
        plain = [1 / row["ratio_to_eager_host"] for row in found.values()]
        cells = [f"{of(values):.2f}×" for values in (speedups, plain) for of in (min, statistics.median, max)]
        body.append([name, *cells[:3], f"{', '.join(map(str, worst['shape']))} ({worst['kernel']})", *cells[3:]])
    header = ["against eager", "min", "median", "max", "at its worst (M, K, N)", "plain calls: min", "median", "max"]
    ms, sizes, _ = next(iter(grid_panels(rows).values()))
    note = f"{{gpu}}, torch {{torch}}; M from {ms[0]} to {ms[-1]}, K×N: {', '.join(f'{k}×{n}' for k, n in sizes)}."
    note += " On the left the device's time (CUDA graphs, L2 flushed), on the right calls back to back, the host's cost"
    return f"{table(header, body)}\n\n{note.format(**rows[0])} included."


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
