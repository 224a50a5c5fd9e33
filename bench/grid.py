"""Times ModelNew beside eager over a grid of shapes and precisions, with and without the host's cost, and checks it.

    python bench/grid.py                                            all 264 cells
    python bench/grid.py --precisions bfloat16 --rows 1,16 --sizes 8192x8192
    python bench/grid.py --help

A cell is a precision and M, K, N. Each is timed in two ways, Model (eager) and ModelNew in turns in the same run:
  ms       one call as a CUDA graph, the L2 cache flushed before it, CUDA events: what the device takes
  ms_host  calls back to back, the wall clock: the longer of what the device takes and what the host takes
and set against its roofline: the longer of the arithmetic at the rate that the tensor cores sustain, and of reading W
and x and writing out once at the rate of a device copy, measured in the same run.

Needs a CUDA device. Writes bench/results/<gpu>-grid.json: a list of rows, and one of section 'conditions'.
"""

import argparse
import functools
import itertools
import math
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.records import conditions_row, described_conditions, row, sampled_conditions, save
from bench.tables import grid_summary, results_path, some_of
from bench.timing import block_milliseconds, in_turns, spread
from model_new import Model, ModelNew, _environment, errors_against_float64, l2_flush, scaling_factor, select_kernel


class Precision(NamedTuple):
    dtype: torch.dtype  # of x, W, b and out
    setting: str  # of torch.set_float32_matmul_precision
    products: int  # on the tensor cores, for one of the layer
    rate: float  # FLOP/s that they sustain, at the power limit of an H200
    limit: float  # of both errors of a right answer


PRECISIONS = {
    "highest": Precision(torch.float32, "highest", products=3, rate=814e12, limit=1e-5),
    "high": Precision(torch.float32, "high", products=1, rate=814e12, limit=2e-3),
    "bfloat16": Precision(torch.bfloat16, "highest", products=1, rate=851e12, limit=1e-2),
    "float16": Precision(torch.float16, "highest", products=1, rate=814e12, limit=2e-3),
}
ROWS = 1, 3, 16, 64, 128, 257, 512, 1024, 2048, 4096, 8192  # M
SIZES = (8192, 8192), (1024, 512), (768, 3072), (4096, 11008), (11008, 4096), (8191, 8193)  # K, N

DEVICE = "cuda"
BUDGET_MS = 25  # of timed work for each contender and way of timing, within these numbers of repeats:
FEWEST, MOST = 5, 40
BLOCK_MS = 2.5  # of plain calls between two synchronizations, so that these cost nothing next to them
SHORTEST_MS = 0.05  # a plain call, to choose how many make a block: about what it costs the host
HIDDEN_MS = 0.3  # a call this long on the device hides the host's cost, and is repeated FEWEST times
COPY_BYTES = 2**31
COPIES = 250  # of about a millisecond; as many before them, so that the clocks have risen
CHECKED_WORK = 2**31  # multiply-adds in float64 for the errors of a cell: of a sample of its rows where it has more
LAUNCH_MS = 0.005  # cells with a shorter roofline are bound by their launches
SLOWER = 1.02  # times eager's time: a cell that wants attention

clock = time.perf_counter


# -------------------------------------------------------------------------------------------------- arithmetic


def roofline_ms(precision, m, k, n, copy_rate):
    """The least time of a cell in ms; copy_rate: of a device copy, in bytes per second, read and written."""
    dtype, _, products, rate, _ = PRECISIONS[precision]
    compute = products * 2 * m * n * k / rate
    memory = (n * k + m * k + m * n) * dtype.itemsize / copy_rate
    return max(compute, memory) * 1e3


def checked_rows(m, k, n):
    """Indices of the rows of x whose results are checked: all, or as many as CHECKED_WORK allows, spread evenly."""
    count = max(1, min(m, CHECKED_WORK // (k * n)))
    return torch.linspace(0, m - 1, count).round().long()


# --------------------------------------------------------------------------------------------------- measuring


cached_flush = functools.cache(l2_flush)
capture_stream = functools.cache(torch.cuda.Stream)


def device_milliseconds(function):
    """What one call of `function` takes on the device, with a cold L2 cache."""
    cached_flush()()  # also hides the launches that follow
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def captured(function):
    """(replay, out): a call of `function` as a CUDA graph, and the tensor that each replay writes."""
    stream, graph = capture_stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # cuBLAS makes its workspace for a stream at the first call there
        function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        out = function()
    graph.replay()
    return graph.replay, out


def samples_in_turns(samplers, budget_ms=BUDGET_MS):
    """in_turns of samplers that return ms: FEWEST to MOST turns, between these as many as budget_ms for each allows."""
    first = in_turns(samplers, 1)
    repeats = round(budget_ms * len(samplers) / max(sum(ms for (ms,) in first.values()), 1e-6))
    rest = in_turns(samplers, min(MOST, max(FEWEST, repeats)) - 1, warm_up=0)
    return {name: first[name] + rest[name] for name in samplers}


def device_times(replays):
    """{name: spread} of a dict of graphs' replays."""
    samplers = {name: functools.partial(device_milliseconds, replay) for name, replay in replays.items()}
    return {name: spread(samples) for name, samples in samples_in_turns(samplers).items()}


def host_times(functions, device_ms):
    """{name: median ms per call} of plain calls; device_ms: {name: ms on the device}, which sizes the blocks."""
    calls = {name: math.ceil(BLOCK_MS / max(device_ms[name], SHORTEST_MS)) for name in functions}
    samplers = {name: functools.partial(block_milliseconds, f, calls[name]) for name, f in functions.items()}
    samples = samples_in_turns(samplers, 0 if min(device_ms.values()) >= HIDDEN_MS else BUDGET_MS)
    return {name: statistics.median(samples[name]) / calls[name] for name in functions}


def copy_bytes_per_second():
    """The rate of a device copy of COPY_BYTES of random numbers, bytes read and written."""
    source = torch.randn(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    copy = {"copy": functools.partial(device_milliseconds, lambda: target.copy_(source))}
    return 2 * source.nbytes / statistics.median(in_turns(copy, COPIES, warm_up=COPIES)["copy"]) * 1e3


# -------------------------------------------------------------------------------------------------------- grid


def layer_pair(k, n, dtype):
    """{name: module} with the same parameters, drawn on the device."""
    with torch.device(DEVICE):
        eager, new = Model(k, n, scaling_factor).to(dtype), ModelNew(k, n, scaling_factor)
    new.gemm = eager.gemm
    return {"eager": eager, "ModelNew": new}


def measure(precision, x, layers, copy_rate):
    """The two rows of a cell: x [M, K], layers as from `layer_pair`."""
    (m, k), gemm = x.shape, layers["ModelNew"].gemm
    n = gemm.out_features
    functions = {name: functools.partial(layer, x) for name, layer in layers.items()}
    graphs = {name: captured(function) for name, function in functions.items()}
    index = checked_rows(m, k, n).to(x.device)
    outputs = {name: out[index] for name, (_, out) in graphs.items()}
    errors = errors_against_float64(outputs, x[index], gemm.weight, gemm.bias, scaling_factor)
    times = device_times({name: replay for name, (replay, _) in graphs.items()})
    del graphs, outputs  # their memory is the plain calls' now
    plain = host_times(functions, {name: found["ms"] for name, found in times.items()})
    least, setting, rows = roofline_ms(precision, m, k, n, copy_rate), PRECISIONS[precision].setting, []
    for name, found in times.items():
        ms, eager_ms = found["ms"], times["eager"]["ms"]
        values = found | {"ms_host": plain[name], "speedup": eager_ms / ms}
        values |= {"ratio_to_eager": ms / eager_ms, "ratio_to_eager_host": plain[name] / plain["eager"]}
        values |= {"roofline_ms": least, "of_roofline": least / ms, "rows_checked": len(index)}
        values |= {"error_frobenius": errors[name][0], "error_componentwise": errors[name][1]}
        values |= {"kernel": select_kernel(x, gemm.weight, gemm.bias) if name == "ModelNew" else None}
        rows.append(row("grid", name, (m, k, n), setting, str(x.dtype).removeprefix("torch."), **values))
    return rows


def wrong(precision, r):
    """Whether a row's errors exceed what the precision allows, or are NaN."""
    return not all(r[key] <= PRECISIONS[precision].limit for key in ("error_frobenius", "error_componentwise"))


def measure_grid(todo, seconds, copy_rate, output):
    """(rows, failed, missing): the cells of `todo` measured one after the other, until `seconds` have passed.

    failed: cells that raised or are wrong; missing: those for which no time was left. Rows are saved after each K, N.
    """
    start, results, failed = clock(), [], []
    most_rows = max(m for _, m, _, _ in todo)
    size, layers, xs = None, {}, {}
    for done, cell in enumerate(todo):
        precision, m, k, n = cell
        if clock() - start > seconds:
            return results, failed, todo[done:]
        if size != (k, n):
            save(output, results)
            print(f"{done} of {len(todo)} cells, {clock() - start:.0f} s; K, N = {k}, {n}", file=sys.stderr, flush=True)
            size, layers, xs = (k, n), {}, {}
        dtype, setting, *_ = PRECISIONS[precision]
        torch.set_float32_matmul_precision(setting)
        try:
            if dtype not in layers:
                layers[dtype] = layer_pair(k, n, dtype)
                xs[dtype] = torch.randn(most_rows, k, device=DEVICE).to(dtype)
            measured = measure(precision, xs[dtype][:m], layers[dtype], copy_rate)
        except Exception:  # the other cells still stand, and so does the file
            traceback.print_exc(limit=-4)
            failed.append(cell)
            torch.cuda.synchronize()  # raises where the device is lost: nothing more could be measured
            continue
        results += measured
        ours = measured[-1]
        print(describe(ours), flush=True)
        if wrong(precision, ours):
            failed.append(cell)
            errors = ours["error_frobenius"], ours["error_componentwise"]
            print(f"\n!!! WRONG: {describe(ours)}, errors {errors}", file=sys.stderr, flush=True)
    return results, failed, []


# ------------------------------------------------------------------------------------------------------ report


def describe(r):
    """A row of ModelNew in one line."""
    where = f"{r['dtype']} '{r['precision']}'" if r["dtype"] == "float32" else r["dtype"]
    return (
        f"{where:18}{r['shape']!s:20} {r['kernel']:13} {r['ms']:.4f} ms, roofline {r['roofline_ms']:.4f}, "
        f"of eager {r['ratio_to_eager']:.3f}, plain {r['ratio_to_eager_host']:.3f}"
    )


def report(results, failed, missing):
    """The text printed last: a summary, then the cells that want attention."""
    ours = [r for r in results if r["name"] == "ModelNew"]
    slow = [r for r in ours if not max(r["ratio_to_eager"], r["ratio_to_eager_host"]) <= SLOWER]
    long = sorted((r for r in ours if r["roofline_ms"] >= LAUNCH_MS), key=lambda r: r["of_roofline"])
    lines = [grid_summary(ours), "", f"more than {SLOWER - 1:.0%} slower than eager: {len(slow)} of {len(ours)} cells"]
    lines += map(describe, slow)
    lines += ["", f"furthest from the roofline, of the cells where that is at least {LAUNCH_MS * 1e3:g} µs"]
    lines += [f"{r['of_roofline']:4.0%} {describe(r)}" for r in long[:10]]
    if missing:
        lines += ["", f"NOT MEASURED, the time was up: {len(missing)} cells, from this one on", str(missing[0])]
    lines += ["", f"!!! FAILED OR WRONG: {len(failed)} cells", *map(str, failed)] if failed else []
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- the command line


def _rows(text):
    return [int(m) for m in text.split(",")]


def _sizes(text):
    return [tuple(map(int, size.split("x"))) for size in text.split(",")]


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="bench/grid.py", description=__doc__.splitlines()[0])
    option, names = parser.add_argument, ",".join(PRECISIONS)
    option("--precisions", type=functools.partial(some_of, PRECISIONS), default=names, help="default %(default)s")
    option("--rows", type=_rows, default=",".join(map(str, ROWS)), metavar="M,M,...", help="default %(default)s")
    sizes = ",".join(f"{k}x{n}" for k, n in SIZES)
    option("--sizes", type=_sizes, default=sizes, metavar="KxN,KxN,...", help="default %(default)s")
    option("--seconds", type=float, default=150.0, help="then the cells left are not measured (default %(default)s)")
    option("--output", type=Path, help="default bench/results/<gpu>-grid.json")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv=None):
    """Exit status 0, or 1 where a cell failed or is wrong."""
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        sys.exit("bench/grid.py measures GPU kernels, and PyTorch sees no CUDA device here")
    output = arguments.output or results_path(torch.cuda.get_device_name(), "grid")
    asked = arguments.sizes, arguments.precisions, arguments.rows
    todo = [(precision, m, k, n) for (k, n), precision, m in itertools.product(*asked)]  # all of a K, N together
    print(f"{_environment()}; {len(todo)} cells", flush=True)
    start = clock()
    with sampled_conditions() as samples:
        copy_rate = copy_bytes_per_second()
        results, failed, missing = measure_grid(todo, arguments.seconds, copy_rate, output)
    values = {"copy_gb_per_s": copy_rate / 1e9, "seconds": clock() - start, "not_measured": missing, "failed": failed}
    conditions = conditions_row(samples, "grid", **values)
    save(output, [*results, conditions])
    print(report(results, failed, missing))
    print(f"\ncopy {copy_rate / 1e9:.0f} GB/s; {clock() - start:.0f} s; {described_conditions(conditions)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
