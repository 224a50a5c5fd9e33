"""Draws error-against-time.svg, ladder.svg and grid.svg in docs/figures/ from bench/results/. Needs matplotlib.

    python bench/figures.py                    from bench/results/nvidia-h200.json, nvidia-h200-grid.json, ladder.json
    python bench/figures.py --output FOLDER    elsewhere than in docs/figures

The other figures there are written by hand.
"""

import argparse
import io
import itertools
import math
import sys
from pathlib import Path

from tables import ROOT, companion, grid_panels, label, read, results_path

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
    from matplotlib.transforms import Bbox
except ImportError:
    sys.exit("bench/figures.py needs matplotlib: pip install -e '.[bench]'")

YARDSTICK = "cuBLAS fp16, float32 output"
LONG_LABEL = 60  # characters
POWER_LIMIT_MS = 0.491  # three fp16 products of the reference shape: docs/OPTIMIZATIONS.md, section 3
# Each to be read on white and on GitHub's dark background: no background is drawn.
TEXT, GRID, BLUE, ORANGE, GREEN = "#7d8590", "#7d859040", "#2f81f7", "#d4651a", "#269642"
INK = "#0d1117"  # on the grid's cells, which are opaque: its contrast is at least 4.5 on each of their colours
SPEEDUPS = 4.0  # the colours of the grid end at this speedup and its inverse; they are 33, so that 1 is within one
COLORS = LinearSegmentedColormap.from_list("speedup", (ORANGE, "#dfe3e8", BLUE), N=33)
CORNERS = ("◥", 1, -1), ("◤", -1, -1), ("◢", 1, 1), ("◣", -1, 1)  # of a cell: what tells its kernel; x and y's signs
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "linear-sigmoid-residual",  # the default is random
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def name_of(row):
    text = label(row).removesuffix(" *").replace(", float32 output", "")
    return text.removesuffix(", fused epilogue") + (" (bare GEMM)" if row["error_of"] == "product" else "")


def name_of_group(rows):
    """The names, those of one precision together, in two lines where one would be too long."""
    names = {}
    both = {"torch.compile", "torch.compile, max-autotune"} <= {row["name"] for row in rows}
    for row in rows:
        if both and row["name"] == "torch.compile, max-autotune":
            continue
        precision = f"'{row['precision']}'" if row["dtype"] == "float32" else row["dtype"]
        name = name_of(row) + (" (with max-autotune, too)" if both and row["name"] == "torch.compile" else "")
        names.setdefault("" if precision == "'highest'" else f", {precision}", []).append(name)
    for suffix, of in names.items():
        of[-1] += suffix
    names = [name for of in names.values() for name in of]
    half = (len(names) + 1) // 2 if sum(map(len, names)) > LONG_LABEL else len(names)
    return ",\n".join(", ".join(part) for part in (names[:half], names[half:]) if part)


def beside(axes, text, x, y, color, left=False, gap=9, **style):
    position = {"xytext": (-gap if left else gap, 0), "textcoords": "offset points", "ha": "right" if left else "left"}
    axes.annotate(text, (x, y), va="center", color=color, **position, **style)


def place_labels(axes, labels, points):
    """labels: [(text, x, y, style)], each written near its point (x, y), to its left or right and as far above or below
    as it takes to overlap neither another nor any of points, [(x, y)].
    """
    figure = axes.figure
    FigureCanvasAgg(figure).draw()  # the axes have their place from here on
    taken = [Bbox.from_bounds(*(axes.transData.transform(point) - 5), 10, 10) for point in points]
    heights = [0, *(sign * 11 * step for step in range(1, 14) for sign in (1, -1))]  # in points
    pixels = figure.dpi / 72
    for text, x, y, style in labels:
        place = {"xytext": (0, 0), "textcoords": "offset points", "va": "center", "in_layout": False}
        written = axes.annotate(text, (x, y), **place, **style)
        width, height = written.get_window_extent().size
        at_x, at_y = axes.transData.transform((x, y))
        best = None
        for dy, is_left in itertools.product(heights, (True, False)):
            x0 = at_x + 9 * pixels if is_left else at_x - 9 * pixels - width
            box = Bbox.from_bounds(x0, at_y + dy * pixels - height / 2, width, height).padded(1)
            outside = not (axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= axes.bbox.y1)
            badness = outside, sum(map(box.overlaps, taken)), abs(dy)
            if best is None or badness < best[0]:
                best = badness, box, (9 if is_left else -9, dy), "left" if is_left else "right"
        _, box, position, side = best
        taken.append(box)
        written.set(position=position, ha=side)
        if abs(position[1]) > 11:
            line = {"arrowstyle": "-", "color": TEXT, "lw": 0.5, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", (x, y), position, textcoords="offset points", arrowprops=line)


def groups(rows):
    """Rows whose points would lie on one another; ModelNew's alone."""
    found = []
    for row in rows:
        for group in found:
            if "ModelNew" in (row["name"], group[0]["name"]):
                continue
            if all(abs(math.log(row[key] / group[0][key])) < 0.1 for key in ("ms", "error_frobenius")):
                group.append(row)
                break
        else:
            found.append([row])
    return found


def compared(results):
    """The rows of the error-against-time figure: everything at 'highest', of the rest the layer as it can be had."""
    rows = [row for row in results if row["section"] in ("time", "time-16bit")]
    return [
        row
        for row in rows
        if (row["section"], row["precision"]) == ("time", "highest")
        or row["name"].startswith(("eager", "torch.compile", "ModelNew", "Triton", "JAX"))
    ]


def error_against_time(rows):
    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    labels = []
    for group in sorted(groups(rows), key=lambda group: group[0]["name"] != "ModelNew"):
        ours, bare = group[0]["name"] == "ModelNew", group[0]["error_of"] == "product"
        color = BLUE if ours else TEXT
        points = [row["ms"] for row in group], [row["error_frobenius"] for row in group]
        axes.plot(*points, "D" if ours else "o", ms=9 if ours else 6.5, color=color, mfc="none" if bare else color)
        ms, error = (min(values) for values in points)
        style = {"color": color, "weight": "bold" if ours else "normal"}
        labels.append((name_of_group(group), ms, error, style))
    axes.set_xlim(0.08, max(3.5, 1.2 * max(row["ms"] for row in rows)))
    axes.set_ylim(3e-8, 1e-2)
    ticks = (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"1e{round(math.log10(value))}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID)
    axes.set_xlabel("time, ms (log scale)")
    axes.set_ylabel("relative error against float64,\nFrobenius norm (log scale)")
    title = "{gpu}, M, K, N = {shape}; float32 'highest' if not said; hollow: a bare GEMM's product"
    axes.set_title(title.format(**rows[0]), fontsize=9, loc="left")
    place_labels(axes, labels, [(row["ms"], row["error_frobenius"]) for row in rows])
    return figure


def ladder(steps, yardstick):
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    axes = figure.add_subplot()
    longest = max(step["ms"] for step in steps[1:])
    cut, end = 1.06 * longest, 1.13 * longest  # where a bar too long for the axis is broken, and where it ends
    for y, step in enumerate(steps):
        last, broken = y == len(steps) - 1, step["ms"] > end
        style = {"height": 0.64, "color": BLUE if last else TEXT, "alpha": 0.6}  # so that the lines show on the bars
        axes.barh(y, cut if broken else step["ms"], **style)
        if broken:
            axes.barh(y, end - cut - 0.01, left=cut + 0.01, **style)
        text = f"{step['ms']:.3g}" + (" (bar cut)" if broken else "")
        beside(axes, text, min(step["ms"], end), y, style["color"], gap=4, weight="bold" if last else "normal")
    marks = (
        (POWER_LIMIT_MS, True, GREEN, f"three fp16 products at the power limit, {POWER_LIMIT_MS}"),
        (3 * yardstick, False, ORANGE, f"3 × the fp16 yardstick ({yardstick:.3f}), {3 * yardstick:.3f}"),
    )
    for ms, left, color, text in marks:
        axes.plot([ms, ms], [-1.2, len(steps) - 0.5], color=color, lw=1.6, ls="--")
        beside(axes, text, ms, -0.85, color, left=left, gap=4)
    axes.set_yticks(range(len(steps)), [f"{step['step']}. {step['what']}" for step in steps])
    axes.spines["left"].set_bounds(-0.5, len(steps) - 0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.15 * end)
    axes.set_ylim(len(steps) - 0.5, -1.3)
    axes.set_xlabel("time, ms")
    note = "Steps were measured on several occasions and compare to 2 %. Step 5 changed no time."
    figure.supxlabel(note, x=0.995, ha="right", fontsize=7.5)
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
    axes.set_title(f"{name}   ({', '.join(served)})", fontsize=9, loc="left")
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
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench/figures.py", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=results_path(), metavar="FILE")
    parser.add_argument("--ladder", type=Path, default=ROOT / "bench/results/ladder.json", metavar="FILE")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/figures", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    for path in (arguments.results, arguments.ladder):
        if not path.is_file():
            parser.error(f"there is no {path}")
    steps = read(arguments.ladder)
    rows = compared(read(arguments.results, companion(arguments.results, "high")))
    cells = [row for row in read(companion(arguments.results, "grid")) if row["section"] == "grid"]
    yardstick = next(row["ms"] for row in rows if row["name"] == YARDSTICK)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        write(error_against_time(rows), arguments.output / "error-against-time.svg")
        write(ladder(steps, yardstick), arguments.output / "ladder.svg")
        if cells:
            write(grid(cells), arguments.output / "grid.svg")
        else:
            print(f"grid.svg not drawn: {companion(arguments.results, 'grid').name} holds no cells", file=sys.stderr)


if __name__ == "__main__":
    main()
