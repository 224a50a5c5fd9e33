"""Times the layer beside its rivals, checks its accuracy beside SGEMM's, and measures its epilogue and its host cost.

    python bench/measure.py                                  everything
    python bench/measure.py --sections harness,networks      some of it; the other rows of the file stay
    python bench/measure.py --help

Needs a CUDA device. JAX is a rival where it is installed. What is compared is timed in one run, in turns. Writes
bench/results/<gpu>.json: a list of rows, and for each section one of section 'conditions'.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model_new
from bench import bindings
from bench.data import data_sets, everyday_sets, kinds
from bench.records import conditions_row, described_conditions, row, sampled_conditions, save
from bench.rivals import BARE_GEMMS, JAX_BLOCK, SCALE, SGEMM, YARDSTICK, JaxLayer, contenders
from bench.tables import AS_GOOD, ROUNDOFF, good_and_bad, read, results_path, some_of
from bench.timing import block_milliseconds, in_turns, spread, steady
from model_new import Model, ModelNew, errors_against_float64, linear_sigmoid_residual, select_kernel, times_in_turns

DEVICE = "cuda"
DTYPES = "float32", "float16", "bfloat16"
WARM_UP_SECONDS = 1.0  # of the timed work itself, so that clocks and power have settled
HOST_CALLS = 1000
HOST_BLOCK = 50  # calls between two synchronizations: with backward under 1000 launches, which the queue holds


# ------------------------------------------------------------------------------------------------- measuring


def problem(shape, dtype=torch.float32):
    """Model, ModelNew with the same parameters, and x."""
    rows, k, n = shape
    models = []
    for kind in (Model, ModelNew):
        torch.manual_seed(0)
        models.append(kind(k, n, SCALE).to(DEVICE, dtype))
    return *models, torch.rand(rows, k, device=DEVICE).to(dtype)


def timed(functions, repeats):
    """{name: spread} of a dict of functions, in turns; JAX's after the others, in blocks."""
    blocks = {name: function.block for name, function in functions.items() if isinstance(function, JaxLayer)}
    others = {name: function for name, function in functions.items() if name not in blocks}
    times = times_in_turns(others, repeats, WARM_UP_SECONDS)
    if blocks:
        of_blocks = times_in_turns(blocks, max(2, repeats // 3), WARM_UP_SECONDS, wall_clock=True)
        times |= {name: [ms / JAX_BLOCK for ms in samples] for name, samples in of_blocks.items()}
    return {name: spread(times[name]) for name in functions}


def scratch_megabytes(function):
    """What a call holds at its peak, in PyTorch's allocator, beyond the tensor it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function()
    return max(0, torch.cuda.max_memory_allocated() - before - out.nbytes) / 1e6


def host_times(functions):
    """{name: spread} of a call by the wall clock, blocks of calls in turns: the host's cost, where the GPU waits."""
    samplers = {name: functools.partial(block_milliseconds, f, HOST_BLOCK) for name, f in functions.items()}
    samples = in_turns(samplers, HOST_CALLS // HOST_BLOCK, warm_up=4)
    return {name: spread([ms / HOST_BLOCK for ms in values]) for name, values in samples.items()}


COLUMNS = {  # a row's key: heading, width and format
    "mean": ("mean", 8, "{:.4f}"),
    "ms": ("ms", 8, "{:.4f}"),
    "p10": ("p10", 8, "{:.4f}"),
    "p90": ("p90", 8, "{:.4f}"),
    "speedup": ("speedup", 9, "{:.2f}x"),
    "ratio_to_fp16": ("/fp16", 7, "{:.2f}"),
    "ratio_to_gemm": ("/GEMM", 7, "{:.2f}"),
    "library_ms": ("eager", 8, "{:.4f}"),
    "error_frobenius": ("error", 9, "{:.1e}"),
    "library_error_frobenius": ("library", 9, "{:.1e}"),
    "error_componentwise": ("compon.", 9, "{:.1e}"),
    "library_error_componentwise": ("library", 9, "{:.1e}"),
    "scratch_megabytes": ("scratch", 10, "{:.1f} MB"),
    "sm_clock_mhz": ("MHz", 7, "{:.0f}"),
    "power_w": ("W", 6, "{:.0f}"),
    "millijoules": ("mJ", 8, "{:.1f}"),
    "energy_ratio": ("/GEMM", 7, "{:.2f}"),
    "gb_per_s": ("GB/s", 8, "{:.0f}"),
    "of_copy": ("of copy", 9, "{:.1%}"),
    "of_big_copy": ("of big copy", 13, "{:.1%}"),
}


def print_table(rows, title=""):
    """The rows' columns that are not null in all of them."""
    columns = {key: how for key, how in COLUMNS.items() if any(r.get(key) is not None for r in rows)}
    print(f"{title:42}" + "".join(f"{heading:>{width}}" for heading, width, _ in columns.values()))
    for r in rows:
        label = r["name"] + (f" ({r['kernel']})" if r["kernel"] else "")
        label += " *" * (r.get("error_of") == "product") + " †" * ("timing" in r)
        cells = (
            f"{'–' if r.get(key) is None else text.format(r[key]):>{width}}"
            for key, (_, width, text) in columns.items()
        )
        print(f"{label:42}" + "".join(cells), flush=True)


def compare(arguments, section, candidates, check, kernel, yardstick=None, repeats=None, dtype="float32"):
    """The rows of the candidates, {name: function}, which are checked, then timed in turns, and printed.

    check(name, function): what a row says besides the times, from calling the function. kernel: that serves ModelNew.
    yardstick: (key of a row, name of the candidate) for the ratio to that candidate's time.
    """
    functions, values = {}, {}
    for name, function in candidates.items():
        try:
            values[name] = check(name, function)
        except Exception as error:  # a rival that fails here must not take the other rows with it
            if name in ("eager", "ModelNew"):
                raise
            print(f"{name}: not run, {' '.join(repr(error).split())[:200]}")
        else:
            functions[name] = function
    times = timed(functions, repeats or arguments.repeats)
    for name, found in times.items():
        if yardstick:
            key, other = yardstick
            found[key] = found["ms"] / times[other]["ms"] if other in times else None
        values[name] = found | values[name]
    return report(arguments, section, values, kernel, dtype)


def report(arguments, section, values, kernel, dtype="float32", key="ms", title=""):
    """The rows of candidates, from {name: what a row says}, which are printed. kernel: that serves ModelNew. key: of
    what a speedup is the ratio of eager's to.
    """
    rows = []
    for name, found in values.items():
        found |= {"speedup": values["eager"][key] / found[key], "kernel": kernel if name == "ModelNew" else None}
        rows.append(row(section, name, arguments.shape, arguments.precision, dtype, **found))
    print_table(rows, title or ("" if dtype == "float32" else dtype))
    return rows


# ------------------------------------------------------------------------------------------------------- time


def time_rows(arguments, section, dtype, yardstick):
    """The rows of one dtype; yardstick: as of `compare`."""
    eager, new, x = problem(arguments.shape, getattr(torch, dtype))
    candidates, layer = contenders(arguments.precision, eager, new, x), (x, *new.parameters())

    def check(name, function):
        bare, (x, weight, bias) = name in BARE_GEMMS, layer
        terms = (torch.zeros_like(bias), 0.0) if bare else (bias, SCALE)
        frobenius, componentwise = errors_against_float64({name: function()}, x, weight, *terms)[name]
        found = {"error_frobenius": frobenius, "error_componentwise": componentwise}
        found["error_of"] = "product" if bare else "out"
        if isinstance(function, JaxLayer):  # its memory is not PyTorch's
            found |= {"scratch_megabytes": None, "timing": function.TIMING}
        elif dtype == "float32":
            found["scratch_megabytes"] = scratch_megabytes(function)
        return found

    return compare(arguments, section, candidates, check, select_kernel(*layer), yardstick, dtype=dtype)


def time_section(arguments):
    """The layer and its rivals in turns, L2 flushed; * marks bare GEMMs, whose error is that of x·Wᵀ alone."""
    rows = time_rows(arguments, "time", "float32", ("ratio_to_fp16", YARDSTICK))
    print("error: Frobenius; compon.: max |err|/(|x|·|W|ᵀ+|b|+s); both against float64")
    if any("timing" in r for r in rows):
        print(f"† {JaxLayer.TIMING} ({JAX_BLOCK}), L2 not flushed: such a load can hold the GPU at its power limit")
    return rows, True


def time_16bit_section(arguments):
    """float16 and bfloat16: the layer and its rivals; * marks the bare GEMM, whose error is that of x·Wᵀ alone."""
    yardstick = "ratio_to_gemm", "cuBLAS GEMM"
    return [r for dtype in DTYPES[1:] for r in time_rows(arguments, "time-16bit", dtype, yardstick)], True


# --------------------------------------------------------------------------------------------------- training


@torch.enable_grad()
def training_section(arguments):
    """Forward and backward, gradients of x, W and b; error: Frobenius, of W's gradient against float64."""
    eager, new, x = problem(arguments.shape)
    grad = torch.randn(*x.shape[:1], new.gemm.out_features, device=DEVICE)
    exact = exact_gradients(x, *new.parameters(), grad)[1]
    x.requires_grad_()

    def step(layer):
        return torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)

    def check(name, function):
        error = ((function()[1] - exact).norm() / exact.norm()).item()
        return {"error_frobenius": error, "error_of": "gradient of W"}

    candidates = {"eager": lambda: step(eager), "ModelNew": lambda: step(new)}
    kernel, repeats = select_kernel(x, *new.parameters()), max(2, arguments.repeats // 3)
    return compare(arguments, "training", candidates, check, kernel, repeats=repeats), True


def exact_gradients(x, weight, bias, grad):
    """Of x, W and b, in float64."""
    x, weight, bias, grad = (t.detach().double() for t in (x, weight, bias, grad))
    p = torch.sigmoid(nn.functional.linear(x, weight, bias))
    dz = grad * (1 + SCALE * p * (1 - p))
    return dz @ weight, dz.t() @ x, dz.sum(0)


# --------------------------------------------------------------------------------------------------- accuracy

GRID_ROWS = 1, 2, 16, 33, 64, 128, 200, 333, 512, 1024  # M
GRID_SIZES = (  # K, N
    *((512, 1024), (768, 3072), (1024, 512), (1024, 1024), (2048, 2048), (3072, 768)),
    *((4096, 4096), (4100, 517), (8192, 1024), (16384, 512), (16384, 4096)),
)
GRADIENT_SHAPES = (512, 1024, 1024), (1024, 2048, 1024), (128, 4096, 2048), (4096, 1024, 1024), (256, 8192, 4096)


def relative_error(actual, exact):
    """Frobenius; 0 where both are 0."""
    error = (actual.double() - exact).norm().item()
    return error / exact.norm().item() if error else 0.0


def accuracy_grid_section(arguments):
    """Errors of z = x·Wᵀ on ordinary data, SGEMM's beside them, in shapes that fp16x3 serves; and of gradients."""
    rows = []
    for k, n in GRID_SIZES:
        found = {m: {} for m in GRID_ROWS if fp16x3_serves(m, k, n)}
        for kind, x, weight, _ in kinds(max(GRID_ROWS), k, n, DEVICE):
            exact, no_bias = x.double() @ weight.double().t(), weight.new_zeros(n)
            for m, errors in found.items():
                outputs = [layer(x[:m], weight, no_bias, 0.0) for layer in (linear_sigmoid_residual, eager_layer)]
                errors[kind] = [relative_error(out, exact[:m]) for out in outputs]
        rows += [row("accuracy-grid", "z", (m, k, n), kernel="fp16x3", errors=errors) for m, errors in found.items()]
    print_grid("z of fp16x3, SGEMM's", rows)
    gradients = []
    for m, k, n in GRADIENT_SHAPES:
        found = {name: {} for name in ("gradient of x", "gradient of W", "gradient of b")}
        for kind, x, weight, grad in kinds(m, k, n, DEVICE):
            leaves = [t.requires_grad_() for t in (x, weight, torch.zeros(n, device=DEVICE))]
            with torch.enable_grad():
                outputs = [layer(*leaves, SCALE) for layer in (linear_sigmoid_residual, eager_layer)]
            both = [torch.autograd.grad(out, leaves, grad) for out in outputs]
            for name, exact, *pair in zip(found, exact_gradients(*leaves, grad), *both):
                found[name][kind] = [relative_error(t, exact) for t in pair]
        gradients += [row("accuracy-grid", name, (m, k, n), errors=errors) for name, errors in found.items()]
    print_grid("gradients, eager's", gradients)
    return rows + gradients, True


def fp16x3_serves(m, k, n):
    x, weight = (torch.empty(rows, k, device=DEVICE) for rows in (m, n))
    return select_kernel(x, weight, weight.new_empty(n)) == "fp16x3"


def print_grid(title, rows):
    cells = [(r["shape"], kind, *pair) for r in rows for kind, pair in r["errors"].items()]
    good, bad = good_and_bad(cells)
    print(f"{title}: {len(good)} of {len(cells)} cells at most {AS_GOOD} times, {len(bad)} above {ROUNDOFF:g} and that")
    for shape, kind, ours, theirs in sorted(bad, key=lambda cell: cell[3] / cell[2])[:10]:
        print(f"  {shape!s:22} {kind:14} {ours:.2e}, {theirs:.2e}")


SLOW_ROWS = 1024, 256, 64  # M


def slow_data_section(arguments):
    """Errors of z and times of the layer beside eager's, on data that is hard for it, or was made to be."""
    _, k, n = arguments.shape
    size, no_bias, rows = (max(SLOW_ROWS), k, n, DEVICE), torch.zeros(n, device=DEVICE), []
    for name, all_x, w in itertools.chain(everyday_sets(*size), data_sets(*size)):
        for m in SLOW_ROWS:
            layer = all_x[:m], w, no_bias
            both = {"": linear_sigmoid_residual, "library_": eager_layer}  # by the prefix of a row's keys
            both = {prefix: functools.partial(function, *layer) for prefix, function in both.items()}
            outputs = {prefix: function(0.0) for prefix, function in both.items()}
            errors = errors_against_float64(outputs, *layer, 0.0)
            times = times_in_turns({prefix: functools.partial(f, SCALE) for prefix, f in both.items()}, 7, 0.02)
            values = {
                "kernel": select_kernel(*layer),
                "bit_identical": repeats_exactly(functools.partial(both[""], 0.0)),
            }
            for prefix, (frobenius, componentwise) in errors.items():
                values[prefix + "ms"] = statistics.median(times[prefix])
                values[prefix + "error_frobenius"] = frobenius
                values[prefix + "error_componentwise"] = componentwise
            values["speedup"] = values["library_ms"] / values["ms"]
            rows.append(row("slow-data", name, (m, k, n), arguments.precision, **values))
    for m in SLOW_ROWS:
        print_table([r for r in rows if r["shape"][0] == m], f"M = {m}")
    all_exact = all(r["bit_identical"] for r in rows)
    print("every call repeated: " + ("bit-identical" if all_exact else "NOT IDENTICAL"))
    return rows, all_exact


def eager_layer(x, weight, bias, scale):
    z = nn.functional.linear(x, weight, bias)
    return torch.sigmoid(z) * scale + z if scale else z


def repeats_exactly(function):
    """Whether two calls agree in every bit, the second one with NaN in the memory it is likely to be given."""
    first = function()
    poison = [torch.full_like(first, float("nan")) for _ in range(4)]
    del poison
    return torch.equal(first.view(torch.int32), function().view(torch.int32))


# --------------------------------------------------------------------------------------------------- epilogue


def epilogue_section(arguments):
    """The epilogue kernels of kernels.cu as bandwidth, beside plain device copies."""
    m, _, n = arguments.shape
    z, big = torch.randn(m, n, device=DEVICE), torch.randn(2**31 // (4 * n), n, device=DEVICE)
    out, big_out, grad = torch.empty_like(z), torch.empty_like(big), torch.randn_like(z)
    forward, backward = bindings.epilogue, getattr(torch.ops, model_new._namespace).backward_z
    small_copy, big_copy = f"copy, {z.nbytes / 1e6:.1f} MB", f"copy, {big.nbytes / 1e9:.2f} GB"
    cases = {  # name: (tensor of its size, how many of them are read or written, function)
        big_copy: (big, 2, lambda: big_out.copy_(big)),
        "forward, in place, as large": (big, 2, lambda: forward(big, big, SCALE)),
        small_copy: (z, 2, lambda: out.copy_(z)),
        "forward, in place": (z, 2, lambda: forward(z, z, SCALE)),
        "forward, keeping z": (z, 2, lambda: forward(z, out, SCALE)),
        "backward (dz, bias gradient)": (z, 3, lambda: backward(grad, z, SCALE)),
    }
    times = timed({name: function for name, (_, _, function) in cases.items()}, arguments.repeats)
    rates = {name: count * like.nbytes / times[name]["ms"] / 1e6 for name, (like, count, _) in cases.items()}
    rows = []
    for name, (like, _, _) in cases.items():
        copy = rates[big_copy if like is big else small_copy]
        values = {"gb_per_s": rates[name], "of_copy": rates[name] / copy, "of_big_copy": rates[name] / rates[big_copy]}
        rows.append(row("epilogue", name, like.shape, **times[name], **values))
    print_table(rows)
    return rows, True


# ----------------------------------------------------------------------------------------------------- energy


def energy_section(arguments):
    """Sustained: calls back to back for seconds, the cache not flushed; energy is power times time. * bare GEMMs."""
    rows = []
    for dtype in DTYPES if arguments.precision == "highest" else DTYPES[:1]:
        eager, new, x = problem(arguments.shape, getattr(torch, dtype))
        candidates = contenders(arguments.precision, eager, new, x).items()
        functions = {name: f for name, f in candidates if name != SGEMM and not isinstance(f, JaxLayer)}
        values = {name: steady(function) for name, function in functions.items()}
        (of_gemm,) = (found["millijoules"] for name, found in values.items() if name in BARE_GEMMS)
        for name, found in values.items():
            found["energy_ratio"] = of_gemm and found["millijoules"] / of_gemm
            found["error_of"] = "product" if name in BARE_GEMMS else "out"
        rows += report(arguments, "energy", values, select_kernel(x, *new.parameters()), dtype)
    return rows, True


# ------------------------------------------------------------------------------------- what a caller waits for

HARNESS_CALLS, HARNESS_ROUNDS = 20, 5
HARNESS_BYTES = 256 * 2**20
AHEAD_CYCLES = 2_000_000  # about a millisecond, in which the host issues a call


def harness_samples(function, buffer, ahead):
    """[ms]: before each call the host waits for the GPU and overwrites a buffer larger than the L2 cache. ahead: the
    GPU then has something to do until the host has issued the call.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(HARNESS_CALLS)]
    for start, end in events:
        torch.cuda.synchronize()
        buffer.zero_()
        if ahead:
            torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def harness_section(arguments):
    """As harnesses time a call: the host waits for the GPU before it, so what the host does first counts."""
    rows, buffer = [], torch.empty(HARNESS_BYTES, dtype=torch.uint8, device=DEVICE)
    for dtype in DTYPES:
        eager, new, x = problem(arguments.shape, getattr(torch, dtype))
        torch.compiler.reset()
        layers = {"eager": eager, "torch.compile": torch.compile(eager), "ModelNew": new}
        calls = {name: functools.partial(layer, x) for name, layer in layers.items()}
        for ahead in (False, True):
            samplers = {name: functools.partial(harness_samples, call, buffer, ahead) for name, call in calls.items()}
            values = {}
            for name, rounds in in_turns(samplers, HARNESS_ROUNDS).items():
                ms = list(itertools.chain(*rounds))
                values[name] = {"mean": statistics.mean(ms), **spread(ms), "host_ahead": ahead}
            kernel, title = select_kernel(x, *new.parameters()), dtype + (", host ahead" if ahead else "")
            rows += report(arguments, "harness", values, kernel, dtype, key="mean", title=title)
    return rows, True


HOST_SHAPE = 8, 32, 16  # M, K, N: kernels shorter than their launches


def compare_on_host(section, shape, cases, models, x):
    """Rows of what a call costs the host; cases: {what: (whether gradients are recorded, model -> function)}."""
    rows, kernel = [], select_kernel(x, x.new_empty(shape[2], shape[1]), x.new_empty(shape[2]))
    for what, (with_grad, make) in cases.items():
        with torch.set_grad_enabled(with_grad):
            costs = host_times({name: make(model) for name, model in models.items()})
        for name, found in costs.items():
            found |= {"speedup": costs["eager"]["ms"] / found["ms"], "kernel": kernel if name == "ModelNew" else None}
            rows.append(row(section, f"{name}, {what}", shape, **found))
    print_table(rows, f"M, K, N = {shape}, kernel: {kernel}")
    return rows


def host_section(arguments):
    """What a call costs the host, on tensors so small that the GPU is always waiting."""
    eager, new, x = problem(HOST_SHAPE)
    grad = torch.rand(len(x), HOST_SHAPE[2], device=DEVICE)

    def forward(model):
        return functools.partial(model, x)

    def forward_backward(model):
        parameters = tuple(model.parameters())
        return lambda: torch.autograd.grad(model(x), parameters, grad)

    cases = {
        "forward, grad off": (False, forward),
        "forward, grad on": (True, forward),
        "forward + backward": (True, forward_backward),
    }
    return compare_on_host("host", HOST_SHAPE, cases, {"eager": eager, "ModelNew": new}, x), True


NETWORK_ROWS, NETWORK_LAYERS, NETWORK_WIDTHS = 64, 6, (128, 256, 512, 1024)


def networks_section(arguments):
    """Six layers of LayerNorm and this one, 64 rows: forward, and training steps without and with SGD's update."""
    return [r for width in NETWORK_WIDTHS for r in network_rows(width)], True


def network_rows(width):
    x, models = torch.randn(NETWORK_ROWS, width, device=DEVICE), {}
    for name, kind in (("eager", Model), ("ModelNew", ModelNew)):
        torch.manual_seed(0)
        layers = [m for _ in range(NETWORK_LAYERS) for m in (nn.LayerNorm(width), kind(width, width, SCALE))]
        models[name] = nn.Sequential(*layers).to(DEVICE)

    def forward_backward(model):
        def call():
            model.zero_grad()
            model(x).square().mean().backward()

        return call

    def training_step(model):
        backward, optimizer = forward_backward(model), torch.optim.SGD(model.parameters(), lr=1e-4)

        def call():
            backward()
            optimizer.step()

        return call

    cases = {
        "forward": (False, lambda model: functools.partial(model, x)),
        "forward + backward": (True, forward_backward),
        "training step": (True, training_step),
    }
    return compare_on_host("networks", (NETWORK_ROWS, width, width), cases, models, x)


# ----------------------------------------------------------------------------------------- the command line

SECTIONS = {
    "time": time_section,
    "time-16bit": time_16bit_section,
    "training": training_section,
    "accuracy-grid": accuracy_grid_section,
    "slow-data": slow_data_section,
    "epilogue": epilogue_section,
    "energy": energy_section,
    "harness": harness_section,
    "host": host_section,
    "networks": networks_section,
}


def _shape(text):
    shape = tuple(map(int, text.split(",")))
    if len(shape) != 3 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected three positive numbers M,K,N, got {text!r}")
    return shape


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="bench/measure.py",
        description=__doc__.splitlines()[0],
        epilog="\n".join(f"{name:15} {section.__doc__}" for name, section in SECTIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shape = f"{model_new.batch_size},{model_new.input_size},{model_new.hidden_size}"
    option = parser.add_argument
    option("--shape", type=_shape, default=shape, metavar="M,K,N", help="default %(default)s")
    option("--precision", choices=("highest", "high", "medium"), default="highest", help="default %(default)s")
    option("--sections", type=functools.partial(some_of, SECTIONS), metavar="NAMES", help="default: all, see below")
    option("--repeats", type=int, default=60, help="timed calls of each row, at least 2 (default %(default)s)")
    option("--output", type=Path, help="default bench/results/<gpu>.json, with -high or -medium where asked")
    arguments = parser.parse_args(argv)
    arguments.sections = arguments.sections or list(SECTIONS)
    return arguments


@torch.no_grad()
def main(argv=None):
    """Exit status 0, or 1 where a section failed or was not bit-identical from run to run."""
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        sys.exit("bench/measure.py measures GPU kernels, and PyTorch sees no CUDA device here")
    torch.set_float32_matmul_precision(arguments.precision)
    suffix = "" if arguments.precision == "highest" else arguments.precision
    output = arguments.output or results_path(torch.cuda.get_device_name(), suffix)
    print(f"{model_new._environment()}\nM,K,N {arguments.shape}, '{arguments.precision}'")
    results, status = [], 0
    for r in read(output):  # of the sections that are not measured now
        section = r["name"] if r["section"] == "conditions" else r["section"]
        results += [r] if section in SECTIONS and section not in arguments.sections else []
    for name in arguments.sections:
        start = time.perf_counter()
        print(f"\n[{name}] {SECTIONS[name].__doc__}", flush=True)
        with sampled_conditions() as samples:
            try:
                rows, good = SECTIONS[name](arguments)
            except Exception:  # the other sections still stand, and so does the file
                traceback.print_exc(limit=-4)
                rows, good = [], False
        conditions = conditions_row(samples, name, arguments.precision)
        results += [*rows, conditions]
        status = status if good else 1
        save(output, results)
        print(f"({time.perf_counter() - start:.1f} s; {described_conditions(conditions)})", flush=True)
        torch.cuda.empty_cache()
    print(f"\nwrote {output.name}: {len(results)} rows")
    return status


if __name__ == "__main__":
    sys.exit(main())
