"""Draws the figures of docs/figures/ that show results, from bench/results/. Needs matplotlib.

    python bench/figures.py                    from bench/results/nvidia-h200.json, nvidia-h200-grid.json, ladder.json
    python bench/figures.py --output FOLDER    elsewhere than in docs/figures

The other figures there are written by hand.
"""

import argparse
import io
import itertools
import math
import sys
import textwrap
from pathlib import Path

from tables import LADDER, ROOT, companion, grid_panels, kind, read, results_path

try:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
except ImportError:
    sys.exit("bench/figures.py needs matplotlib: pip install -e '.[bench]'")

# Of an H200, as docs/OPTIMIZATIONS.md, "Roofline", says: FLOP/s of the tensor cores, bytes/s of a copy.
CEILING, BANDWIDTH = 814e12, 4.26e12
PRODUCTS_MS = 3 * 2 * 1024 * 8192 * 8192 / CEILING * 1e3
# On white, which is drawn: no colour has a contrast of 4.5 on both white and a dark page.
TEXT, GRID, BLUE, ORANGE, GREEN = "#57606a", "#d0d7de", "#0550ae", "#953800", "#116329"
INK = "#0d1117"  # on the grid's cells: its contrast is at least 4.5 on each of their colours
SPEEDUPS = 4.0  # the colours of the grid end at this speedup and its inverse; they are 33, so that 1 is within one
COLORS = LinearSegmentedColormap.from_list("speedup", ("#d4651a", "#dfe3e8", "#2f81f7"), N=33)
CORNERS = ("◥", 1, -1), ("◤", -1, -1), ("◢", 1, 1), ("◣", -1, 1)  # of a cell: what tells its kernel; x and y's signs
BURST = "time in a burst, ms"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "linear-sigmoid-residual",  # the default is random
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.axisbelow": True,
}


def beside(axes, text, x, y, color, left=False, gap=9, dy=0, **style):
    position = {"xytext": (-gap if left else gap, dy), "textcoords": "offset points", "ha": "right" if left else "left"}
    axes.annotate(text, (x, y), va="center", color=color, **position, **style)


def log_log(height, across, title):
    """A figure and its axes; height: in inches."""
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", title=title)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID)
    axes.set_xlabel(f"{across} (log scale)")
    return figure, axes


LABELS = {  # name, precision or dtype: (label, whether it is to the left, points above)
    ("eager", "float32, 'highest'"): ("eager, torch.compile", True, 0),
    ("Triton tf32x3, fused epilogue", "float32, 'highest'"): ("Triton tf32x3", True, 0),
    ("Triton bf16x3, fused epilogue", "float32, 'highest'"): ("Triton bf16x3", True, 0),
    ("Triton bf16x6, fused epilogue", "float32, 'highest'"): ("Triton bf16x6", False, 0),
    ("eager", "float32, 'high'"): ("eager 'high'", False, 0),
    ("eager", "float16"): ("eager float16", False, 6),
    ("eager", "bfloat16"): ("eager bfloat16", False, 6),
    ("ModelNew", "float32, 'highest'"): ("ModelNew (fp16x3)", True, 0),
    ("ModelNew", "float32, 'high'"): ("ModelNew 'high'", True, -7),
    ("ModelNew", "float16"): ("ModelNew float16", True, 0),
    ("ModelNew", "bfloat16"): ("ModelNew bfloat16", True, 0),
}


def error_against_time(rows):
    title = "{gpu}, M, K, N = {shape}; float32 'highest' if not said".format(**rows[0])
    figure, axes = log_log(4.6, BURST, title)
    for row in rows:
        ours, (text, *place) = row["name"] == "ModelNew", LABELS[row["name"], kind(row)]
        color, point = BLUE if ours else TEXT, (row["ms"], row["error_frobenius"])
        axes.plot(*point, "D" if ours else "o", ms=9 if ours else 6.5, color=color)
        beside(axes, text, *point, color, place[0], dy=place[1], weight="bold" if ours else "normal")
    axes.set_xlim(0.075, 3.5)
    axes.set_ylim(3e-8, 1e-2)
    axes.xaxis.set_major_locator(FixedLocator((0.1, 0.2, 0.3, 0.5, 1, 2, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"1e{round(math.log10(value))}")
    axes.set_ylabel("relative error against float64,\nFrobenius norm (log scale)")
    return figure


def time_against_m(cells):
    """Of 8192 × 8192, float32, with the roofline."""
    title = "{gpu}, K = N = 8192, float32 'highest'; dashed: the roofline".format(**cells[0])
    figure, axes = log_log(4.2, "M, rows of x", title)
    ms = sorted({row["shape"][0] for row in cells})
    for name, color, mark, left, dy in (("eager", TEXT, "o", True, 4), ("ModelNew", BLUE, "D", False, -6)):
        times = [next(row["ms"] for row in cells if (row["name"], row["shape"][0]) == (name, m)) for m in ms]
        axes.plot(ms, times, color=color, marker=mark, ms=5)
        beside(axes, name, ms[-3], times[-3], color, left, dy=dy, weight="bold")
    products = [PRODUCTS_MS * m / 1024 for m in ms]
    reading = 4 * 8192 * 8192 / BANDWIDTH * 1e3
    turn = 1024 * reading / PRODUCTS_MS
    axes.plot([ms[0], turn, ms[-1]], [reading, reading, products[-1]], color=GREEN, ls="--")
    beside(axes, "reading W", ms[0], reading, GREEN, gap=2, dy=-9)
    beside(axes, "three fp16 products", 400, PRODUCTS_MS * 400 / 1024, GREEN, dy=-6)
    axes.set_xticks(ms, ms)
    axes.set_ylim(0.03)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel(f"{BURST} (log scale)")
    return figure


def where_time_goes(ms):
    """The call's parts one after the other; what the others leave is the rest."""
    parts = {  # name: (ms, where its label is, in points)
        "split\nof x": (0.017, 0, 34),
        "three products at the sustained rate": (PRODUCTS_MS, 0, 0),
        "last\nwave": (0.015, -14, 34),
        "epilogues": (0.008, 0, -32),
    }
    parts["rest"] = ms - sum(part for part, _, _ in parts.values()), 12, 28
    figure = Figure(figsize=(8.4, 2.1), layout="constrained")
    axes = figure.add_subplot()
    at = 0
    for color, (name, (part, *place)) in zip(itertools.cycle((GREEN, BLUE, ORANGE)), parts.items()):
        axes.barh(0, part, left=at, color=color, edgecolor="white")
        style = {"ha": "center", "va": "center", "color": TEXT if any(place) else "white"}
        axes.annotate(f"{name}\n{part:.3f}", (at + part / 2, 0), place, textcoords="offset points", **style)
        at += part
    axes.set_ylim(-1.3, 1.3)
    axes.set_xlim(-0.012, at + 0.012)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"ms of a call of {ms:.3f}, in a burst")
    return figure


def ladder(steps):
    figure = Figure(figsize=(8.4, 2.6), layout="constrained")
    axes = figure.add_subplot()
    longest = max(step["ms"] for step in steps[1:])
    cut, end = 1.06 * longest, 1.13 * longest  # where a bar too long for the axis is broken, and where it ends
    for y, step in enumerate(steps):
        broken = step["ms"] > end
        style = {"height": 0.64, "color": BLUE if y else TEXT, "alpha": 0.6}  # alpha: the line shows on the bars
        axes.barh(y, cut if broken else step["ms"], **style)
        if broken:
            axes.barh(y, end - cut - 0.01, left=cut + 0.01, **style)
        text = f"{step['ms']:.3f}" + (" (bar cut)" if broken else "")
        beside(axes, text, min(step["ms"], end), y, style["color"], gap=4)
    axes.plot([PRODUCTS_MS] * 2, [-1.2, len(steps) - 0.5], color=GREEN, lw=1.6, ls="--")
    beside(axes, f"three fp16 products at the power limit, {PRODUCTS_MS:.3f}", PRODUCTS_MS, -0.85, GREEN, True, gap=4)
    axes.set_yticks(range(len(steps)), [textwrap.fill(f"{step['step']}. {step['what']}", 42) for step in steps])
    axes.spines["left"].set_bounds(-0.5, len(steps) - 0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.25 * end)
    axes.set_ylim(len(steps) - 0.5, -1.3)
    axes.set_xlabel(BURST)
    return figure


def grid_panel(axes, name, ms, sizes, found):
    """One precision: a cell for each M (rows) and K×N (columns), of opaque colour, so that its text needs no more."""
    fused = sorted({row["kernel"] for row in found.values()} - {"library"})
    corners = dict(zip(fused, CORNERS, strict=False))
    for (x, size), (y, m) in itertools.product(enumerate(sizes), enumerate(ms)):
        row = found.get((m, *size))
        if row is None:
            axes.text(x, y, "–", ha="center", va="center")
            continue
        color = COLORS(LogNorm(1 / SPEEDUPS, SPEEDUPS, clip=True)(row["speedup"]))
        left, right, top, bottom = x - 0.48, x + 0.48, y - 0.46, y + 0.46
        axes.fill([left, right, right, left], [top, top, bottom, bottom], color=color, lw=0)
        axes.text(x, y, f"{row['speedup']:.2f}", ha="center", va="center_baseline", color=INK, fontsize=8)
        if row["kernel"] in corners:
            _, right, down = corners[row["kernel"]]
            xs, ys = (x + 0.48 * right, x + 0.34 * right), (y + 0.46 * down, y + 0.16 * down)
            axes.fill([xs[0], xs[1], xs[0]], [ys[0], ys[0], ys[1]], color=INK, lw=0)
    served = [f"{symbol} {kernel}" for kernel, (symbol, _, _) in corners.items()] + ["else library"]
    axes.set_title(f"{name}   ({', '.join(served)})")
    axes.set_xticks(range(len(sizes)), [f"{k}\n×{n}" for k, n in sizes], fontsize=8)
    axes.set_yticks(range(len(ms)), ms)
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.set_ylim(len(ms) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("M")


def grid(rows):
    """Eager's time over ModelNew's: a panel for each precision."""
    panels = grid_panels(rows)
    lines = math.ceil(len(panels) / 2)
    height = 0.25 * max(len(ms) for ms, _, _ in panels.values()) + 0.7
    figure = Figure(figsize=(8.4, lines * height + 0.9), layout="constrained")
    all_axes = figure.subplots(lines, 2, squeeze=False)
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, panel) in zip(all_axes.flat, panels.items()):
        grid_panel(axes, name, *panel)
    ticks = {1 / 4: "¼ or less", 1 / 2: "½", 1: "1", 2: "2", 4: "4 or more"}
    scale = ScalarMappable(LogNorm(1 / SPEEDUPS, SPEEDUPS), COLORS)
    bar = figure.colorbar(scale, ax=all_axes, orientation="horizontal", aspect=50, fraction=0.03, pad=0.02)
    bar.set_ticks(list(ticks), labels=list(ticks.values()), minor=False)
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(f"{rows[0]['gpu']}; columns: K×N. Eager's time / ModelNew's, on the device, cold L2 (log scale)")
    return figure


def write(figure, path):
    text = io.StringIO()
    figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench/figures.py", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=results_path(), metavar="FILE")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/figures", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    if not arguments.results.is_file():
        parser.error(f"there is no {arguments.results}")
    measured = read(arguments.results, companion(arguments.results, "high"))
    rows = [row for row in measured if row["section"].startswith("time") and (row["name"], kind(row)) in LABELS]
    cells = [row for row in read(companion(arguments.results, "grid")) if row["section"] == "grid"]
    full = [row for row in cells if kind(row) == "float32, 'highest'" and row["shape"][1:] == [8192, 8192]]
    (ours,) = (row["ms"] for row in rows if (row["name"], kind(row)) == ("ModelNew", "float32, 'highest'"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        write(error_against_time(rows), arguments.output / "error-against-time.svg")
        write(where_time_goes(ours), arguments.output / "where-time-goes.svg")
        write(ladder(read(LADDER)), arguments.output / "ladder.svg")
        if cells:
            write(grid(cells), arguments.output / "grid.svg")
        if full:
            write(time_against_m(full), arguments.output / "time-against-m.svg")


if __name__ == "__main__":
    main()
