"""Tries to break the layer, and writes down what happened: docs/TRUST.md and bench/results/trust-<gpu>.json.

    python bench/trust.py                             10 000 random calls and all else, in about 4 minutes
    python bench/trust.py --seed 0 --case 17          one of the random calls again
    python bench/trust.py --sections fuzz,memory      some of it
    python bench/trust.py --help

Needs pytest, and a CUDA device; `--device cpu --output FILE` runs what does not need one. A failure is written down and
does not end the run; the exit status is 1 where there was one.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import itertools
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # before bench/: both have a reference.py

import fuzz
from fuzz import Arithmetic, Expected, GuardError, settings
from reference import peak_bytes

import model_new
from bench.tables import some_of
from model_new import Model, ModelNew, select_kernel

ROOT = Path(__file__).resolve().parent.parent
FLOAT32 = [(torch.float32, "highest"), (torch.float32, "high")]
SETTINGS = [*FLOAT32, (torch.float16, "highest"), (torch.bfloat16, "highest"), (torch.float64, "highest")]
SHAPES = {  # M, K, N. On a GPU: for the library, and each of the kernels of its own, by select_tile
    "cuda": [
        *((5, 40, 24), (130, 200, 140), (40, 1024, 2048), (512, 1024, 2048)),
        *((16, 8192, 8192), (512, 4096, 6400), (2560, 3072, 2048)),
    ],
    "cpu": [(5, 40, 24), (130, 200, 140), (33, 512, 48)],
}
# And with tiles of all kinds, see fuzz.any_tile; the second shape with rows of W that are read as they begin, anywhere.
TILE_SHAPE, TILES = (130, 520, 140), (0, 1, 3, 6, 8, 11, 13, 17)
UNALIGNED_SHAPE, UNALIGNED_TILES = (20, 521, 332), (0, 3, 6, 11, 15)
LISTED, MOST_FAILURES = 10, 200  # of a row: failures that the table lists, failures that end it

# --------------------------------------------------------------------------------------------------- the record


class DeviceLostError(Exception):
    """The CUDA device answers every call with an error; only a new process can use it."""


class Row:
    """A line of the table: what was tried, how often, and what failed. As a context it takes the time, and an exception
    is one more failure."""

    def __init__(self, run, section, what):
        self.run, self.section, self.what = run, section, what
        self.tried, self.failures, self.notes, self.seconds = 0, [], [], 0.0

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, kind, error, trace):
        self.seconds = time.perf_counter() - self.start
        if isinstance(error, Exception):
            if not isinstance(error, DeviceLostError):
                traceback.print_exception(error, limit=-4)
            self.fail(self.what, error)
        line = f"{self.what}: {self.tried} tried, {len(self.failures)} failed, {self.seconds:.1f} s"
        print("; ".join([line, *self.notes]), flush=True)
        return isinstance(error, Exception)

    def fail(self, what, error):
        text = " ".join(str(error).split())
        self.failures.append(f"{what}: {type(error).__name__}: {text[:400]}")
        if len(self.failures) <= LISTED:
            print(f"FAILED {self.failures[-1]}", flush=True)

    def attempt(self, what, function, *arguments):
        """Calls `function`, which returns how many tries it was (nothing: one) or raises. Returns whether it raised."""
        try:
            count = function(*arguments)
            self.tried += 1 if count is None else count
            return False
        except Exception as error:
            self.tried += 1
            self.fail(what, error)
            if len(self.failures) >= MOST_FAILURES:
                raise RuntimeError(f"stopped after {MOST_FAILURES} failures") from error
        if self.run.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as error:
                self.run.lost = True
                raise DeviceLostError("the CUDA device is lost; nothing after this was run") from error
        return True

    def out_of_time(self):
        """Whether the section's time is over; then says so in the table."""
        over = time.perf_counter() > self.run.deadline
        if over and "stopped by the clock" not in self.notes:
            self.notes.append("stopped by the clock")
        return over


class Run:
    """The whole: its options, its rows, and how many random calls went to each kernel."""

    def __init__(self, arguments):
        self.arguments, self.device = arguments, arguments.device
        self.calls, self.seed = arguments.calls, arguments.seed
        self.rows, self.kernels, self.deadline, self.lost = [], Counter(), 0.0, False

    def row(self, section, what):
        self.rows.append(Row(self, section, what))
        return self.rows[-1]

    def for_each_kernel(self, row, body, shapes=None, only=SETTINGS):
        """body(x, weight, bias, scale) as an attempt, for each of `kernels`."""
        for shape, dtype, precision, tile in kernels(self.device, shapes, only):
            if row.out_of_time():
                return
            with settings(precision), fuzz.any_tile(tile, dtype, shape[1]):
                x, weight, bias, scale = inputs(shape, dtype, self.device)
                what = describe(x, weight, bias) + (f", tile {tile}" if tile is not None else "")
                row.attempt(what, body, x, weight, bias, scale)


def kernels(device, shapes=None, only=SETTINGS):
    """(shape, dtype, precision, tile) of calls that enter every kernel, on SHAPES; or of calls on these shapes."""
    for shape in shapes or SHAPES[device]:
        for dtype, precision in only:
            yield shape, dtype, precision, None
    if shapes is None and device == "cuda":
        for shape, tiles in ((TILE_SHAPE, TILES), (UNALIGNED_SHAPE, UNALIGNED_TILES)):
            for tile, (dtype, precision) in itertools.product(tiles, only):
                if dtype != torch.float64:
                    yield shape, dtype, precision, tile


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def describe(x, weight, bias):
    precision, shape = torch.get_float32_matmul_precision(), f"{len(x)}, {weight.shape[1]}, {len(weight)}"
    return f"{select_kernel(x, weight, bias)}, {_name(x.dtype)} at '{precision}', M, K, N = {shape}"


# --------------------------------------------------------------------------------------------------- what is common


def inputs(shape, dtype, device):
    """x, weight and bias, normal, weight by 1/√K; and a scale. shape: M, K, N."""
    m, k, n = shape
    generator = torch.Generator(device).manual_seed(torch.initial_seed())
    x, weight, bias = (fuzz.values("normal", size, dtype, device, generator) for size in ((m, k), (n, k), (n,)))
    return x, weight / k**0.5, bias, 2.0


def layer(x, weight, bias, scale):
    return model_new.linear_sigmoid_residual(x, weight, bias, scale)


def eager(x, weight, bias, scale):
    z = torch.nn.functional.linear(x, weight, bias)
    return torch.sigmoid(z) * scale + z


def expected(x, weight, bias, scale, with_gradient=False):
    """fuzz.Expected for a call at the current settings."""
    arithmetic = Arithmetic(x.dtype, select_kernel(x, weight, bias), torch.get_float32_matmul_precision())
    return Expected(x, weight, bias, scale, arithmetic, with_gradient)


def different(a, b):
    """On the device: whether two tensors differ in any bit."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (a.view(bits) != b.view(bits)).any()


def assert_same_bits(a, b, what):
    assert not different(a.detach(), b.detach()), f"{what}: not the same bits"


def module_with(weight, bias, scale):
    with torch.device("meta"):
        module = ModelNew(weight.shape[1], weight.shape[0], scale)
    module.gemm.weight, module.gemm.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    return module


def gradients(x, weight, bias, scale):
    """[out, dx, dW, db] of the sum of out's squares."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = layer(*leaves, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


# ----------------------------------------------------------------------------------------------- random calls


def fuzz_section(run):
    """Random calls against float64, x, W, b and results amid guard bytes; every kernel of the device is entered."""
    limits = fuzz.ON_CPU if run.device == "cpu" else fuzz.ON_GPU
    guarded, overwritten = Counter(), []

    def one(number):
        case = fuzz.draw(random.Random(f"{run.seed}-{number}"), limits)
        try:
            outcome = fuzz.run(case, run.device)
        except GuardError as error:
            overwritten.append(f"{repeat(number)}, {case}: {error}")
            return
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        run.kernels[outcome.kernel, case.dtype, case.precision] += 1
        guarded.update(inputs=outcome.inputs_guarded, results=outcome.results_guarded)

    def repeat(number):
        return f"`python bench/trust.py --seed {run.seed} --case {number}`"

    single = run.arguments.case is not None
    numbers = [run.arguments.case] if single else range(run.calls)
    with run.row("fuzz", "random calls against float64") as row:
        for number in numbers:
            if row.out_of_time():
                break
            row.attempt(repeat(number), one, number)
            if (number + 1) % 1000 == 0:
                print(f"  {row.tried} calls, {time.perf_counter() - row.start:.1f} s", flush=True)
            if run.device == "cuda" and number % 500 == 0:
                torch.cuda.empty_cache()  # blocks of every size pile up
        if single:
            print(fuzz.draw(random.Random(f"{run.seed}-{numbers[0]}"), limits))
        elif run.calls >= 1000:
            row.attempt("kernels", every_kernel_was_entered, run)
    with run.row(
        "fuzz", "guard bytes around, and between rows of, their x, W and b, and around results: intact"
    ) as row:
        row.tried, row.failures = sum(guarded.values()) + len(overwritten), overwritten
        row.notes.append("{inputs} of inputs, {results} of results; time: above".format_map(Counter(guarded)))


def kernel_names():
    """All that select_kernel's docstring names."""
    return set(re.findall(r'^ +"(\w+)"', select_kernel.__doc__, re.MULTILINE))


def every_kernel_was_entered(run):
    """Every name that select_kernel returns on this device, and every dtype and precision, had random calls."""
    names = kernel_names()
    if run.device == "cpu":
        names = {"cpu"}
    elif torch.cuda.get_device_capability() == (9, 0):
        names -= {"cpu"}
    else:
        names = {"library"}
    missing = names - {kernel for kernel, *_ in run.kernels}
    assert not missing, f"never entered: {', '.join(sorted(missing))}"
    seen = {(dtype, precision) for _, dtype, precision in run.kernels}
    missing = {(_name(dtype), precision) for dtype in fuzz.DTYPES for precision in fuzz.PRECISIONS} - seen
    assert not missing, f"never tried: {sorted(missing)}"
    return 0


# ---------------------------------------------------------------------------------------------- special values

NAN, INF = float("nan"), float("inf")
ALL = slice(None)


def _largest(t):
    return torch.finfo(t.dtype).max


def _denormal(t):
    """Denormal numbers of t's type, of both signs, in its shape."""
    return ((2 * torch.rand_like(t, dtype=torch.float64) - 1) * torch.finfo(t.dtype).tiny).to(t.dtype)


def _put(value, *places):
    """In x, W and b: `value` at each of (which tensor, *index); value: a number, or a function of that tensor."""

    def edit(*tensors):
        for which, *index in places:
            t = tensors[which]
            t[tuple(index)] = value(t) if callable(value) else value

    return edit


def _both(*edits):
    def edit(*tensors):
        for part in edits:
            part(*tensors)

    return edit


SPECIALS = {  # edits in place of x, W and b, of normal numbers
    **{
        f"{value} in {'xWb'[which]}": _put(value, (which, 2) if which == 2 else (which, 2, 7))
        for value in (NAN, INF, -INF)
        for which in range(3)
    },
    "NaN and Inf in a row of x": _both(_put(NAN, (0, 2, 7)), _put(INF, (0, 2, 9), (0, 3, 9))),
    "Inf times 0": _both(_put(INF, (0, 2, 7)), _put(0.0, (1, slice(0, 9), 7))),
    "0 times NaN": _both(_put(0.0, (0, slice(0, 2), 7)), _put(NAN, (1, 3, 7))),
    "Inf and -Inf in a row": _both(_put(INF, (0, 2, 7)), _put(-INF, (0, 2, 9)), _put(1.0, (1, ALL, 7), (1, ALL, 9))),
    "Inf in z, -Inf in b": _both(_put(INF, (0, 2, 7)), _put(-INF, (2, slice(0, None, 2)))),
    "x is NaN": _put(NAN, (0, ALL)),
    "W is Inf": _put(INF, (1, ALL)),
    "everything is Inf": _put(INF, (0, ALL), (1, ALL), (2, ALL)),
    "largest number in x": _both(_put(_largest, (0, 2, 7)), _put(0.5, (1, ALL, 7))),
    "largest number in W": _both(_put(_largest, (1, 2, 7)), _put(0.5, (0, ALL, 7))),
    "largest number in b": _put(_largest, (2, 3)),
    "a product overflows": _both(_put(_largest, (0, 2, 7)), _put(-2.0, (1, ALL, 7))),
    "a sum overflows": _both(_put(_largest, (0, 2)), _put(0.5, (1, ALL))),
    "large numbers of both signs": _both(
        _put(lambda t: _largest(t) / 64, (0, 2, slice(0, 20))), _put(lambda t: -_largest(t) / 64, (0, 2, 9))
    ),
    "rows of zeros": _put(0.0, (0, 2), (1, 3)),
    "everything is zero": _put(0.0, (0, ALL), (1, ALL), (2, ALL)),
    "everything is -0": _put(-0.0, (0, ALL), (1, ALL), (2, ALL)),
    "rows of -0": _put(-0.0, (0, 2), (1, 3), (2, slice(0, 9))),
    "denormal x, b = 0": _both(_put(_denormal, (0, ALL)), _put(0.0, (2, ALL))),
    "denormal W, b = 0": _both(_put(_denormal, (1, ALL)), _put(0.0, (2, ALL))),
    "denormal x and W, b = 0": _both(_put(_denormal, (0, ALL), (1, ALL)), _put(0.0, (2, ALL))),
    "denormal b, x = 0": _both(_put(_denormal, (2, ALL)), _put(0.0, (0, ALL))),
}


def assert_as_eager(out, x, weight, bias, scale, with_gradient):
    """NaN where eager has it and Inf with eager's sign; everywhere else within the bound of float64's.

    A finite number within that bound is right where eager overflowed on the way, and so is eager's very number. At a
    lower float32 precision eager's overflows differ (TF32 rounds the largest numbers up to Inf): there an element is
    judged only if eager is finite, or NaN, or Inf, alike at 'highest' and at the current precision. Where the bound
    itself overflows, as it can for float64: eager's number to a few roundings.
    """

    def alike(a, b):
        return torch.where(a.isfinite(), b.isfinite(), (a == b) | (a.isnan() & b.isnan()))

    out, x, weight, bias = (t.detach() for t in (out, x, weight, bias))
    here = eager(x, weight, bias, scale)
    with settings("highest"):
        at_highest = eager(x, weight, bias, scale)
    finite_inputs = x.isfinite().all(1)[:, None] & weight.isfinite().all(1) & bias.isfinite()
    float64 = expected(*(t.nan_to_num(0.0, 0.0, 0.0) for t in (x, weight, bias)), scale, with_gradient)
    close = (out - here).abs() <= 32 * torch.finfo(out.dtype).eps * here.abs()
    right = torch.where(float64.out_bound.isfinite(), float64.good(out), close) & finite_inputs
    as_eager = torch.where(out.isfinite(), out == here, alike(out, here))
    bad = ~right & ~as_eager & alike(here, at_highest)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{bad.sum().item()} of {bad.numel()} elements; first at {at}: {out[at].item()!r}, eager "
            f"{here[at].item()!r}, at 'highest' {at_highest[at].item()!r}, float64 {float64.out[at].item()!r}"
        )


def check_special(with_gradient, x, weight, bias, scale):
    out = layer(x.requires_grad_(with_gradient), weight, bias, scale)
    assert_as_eager(out, x, weight, bias, scale, with_gradient)


def specials_section(run):
    """NaN, Inf, -0, denormals, the largest numbers and zeros, in x, W and b: elementwise as eager."""
    with run.row("specials", "special values in x, W and b: as eager") as row:

        def all_of_them(x, weight, bias, scale):
            case = describe(x, weight, bias)
            for what, edit in SPECIALS.items():
                # Scale 0 for the denormals: beside s/2 they do not show.
                for s, with_gradient in ((scale, False), (0.0, False), (-1.5, True)):
                    tensors = [t.clone() for t in (x, weight, bias)]
                    edit(*tensors)
                    where = f"{what}, {case}, scale {s}{', with gradient' if with_gradient else ''}"
                    row.attempt(where, check_special, with_gradient, *tensors, s)
            return 0

        run.for_each_kernel(row, all_of_them)


# ------------------------------------------------------------------------------------- repeatability, concurrency


def determinism_section(run):
    """Every kernel again and again, half of the time beside a load on another stream: the same bits."""
    repeats = max(4, run.calls // 10)
    on_gpu = run.device == "cuda"
    if on_gpu:
        other, load = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=torch.float16)

    def again(call, repeats):
        first, changed = call(), torch.zeros((), dtype=torch.int64, device=run.device)
        for i in range(repeats):
            if on_gpu and i >= repeats // 2:
                with torch.cuda.stream(other):
                    torch.mm(load, load)
                    torch.add(load, load)
            for a, b in zip(call(), first):
                changed += different(a, b)
        assert changed == 0, f"{changed.item()} results of {repeats} repetitions differ"
        return repeats

    with run.row("determinism", "repeated calls, half beside a load on another stream: bit-identical") as row:
        run.for_each_kernel(row, lambda *case: again(lambda: [layer(*case)], repeats))
    with run.row("determinism", "the same with the gradients of x, W and b") as row:
        fewer = max(2, repeats // 10)
        run.for_each_kernel(row, lambda *case: again(lambda: gradients(*case), fewer))


def concurrency_section(run):
    """Streams, host threads and CUDA graphs at once: each call gives what it gives alone."""
    for what, body in (
        ("calls on 8 streams at once: the bits of calls one by one", on_streams),
        ("calls from two host threads, each on its own stream: those bits", in_threads),
    ):
        with run.row("concurrency", what) as row:
            for precision in ("highest", "high"):
                with settings(precision):
                    cases = [
                        inputs(shape, dtype, "cuda")
                        for shape in SHAPES["cuda"]
                        for dtype in (torch.float32, torch.float16, torch.bfloat16)
                    ]
                    row.attempt(f"{what}, '{precision}'", body, cases, max(1, run.calls // 400))
    with run.row("concurrency", "replays of one captured CUDA graph after changes of x, W and b: as float64") as row:
        run.for_each_kernel(row, replay)


def on_streams(cases, rounds):
    alone = [layer(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in range(8)]
    torch.cuda.synchronize()
    outputs = []
    for i in range(rounds * len(streams)):
        with torch.cuda.stream(streams[i % len(streams)]):
            which = i % len(cases)
            outputs.append(different(layer(*cases[which]), alone[which]))
    torch.cuda.synchronize()
    wrong = sum(flag.item() for flag in outputs)
    assert wrong == 0, f"{wrong} of {len(outputs)} differ"
    return len(outputs)


def in_threads(cases, rounds):
    """Each thread has every other case."""
    alone = [layer(*case) for case in cases]
    torch.cuda.synchronize()
    wrong, errors = [0, 0], []
    start = threading.Barrier(2)

    def work(index):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                start.wait()
                changed = torch.zeros((), dtype=torch.int64, device="cuda")
                for _ in range(4 * rounds):
                    for which in range(index, len(cases), 2):
                        changed += different(layer(*cases[which]), alone[which])
                wrong[index] = changed.item()
        except Exception as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert wrong == [0, 0], f"{wrong} differ"
    return 4 * rounds * len(cases)


@torch.no_grad()
def replay(x, weight, bias, scale, replays=5):
    layer(x, weight, bias, scale)  # cuBLAS makes its handle outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x, weight, bias, scale)
    for _ in range(replays):
        x.normal_()
        weight.normal_().mul_(weight.shape[1] ** -0.5)
        bias.normal_()
        out.fill_(NAN)
        graph.replay()
        expected(x, weight, bias, scale).check(out)
    return replays


# --------------------------------------------------------------------------------------------------------- memory


def memory_section(run):
    """Peaks against eager's, no growth, and running out of memory."""
    with run.row("memory", "peak of a call on the reference shape, without and with backward: at most eager's") as row:
        for dtype, precision in SETTINGS[:4]:
            with settings(precision):
                row.attempt(f"{_name(dtype)} at '{precision}'", compare_peaks, row, dtype)
    torch.cuda.empty_cache()
    with run.row("memory", "small calls, with and without backward: the allocator and the process do not grow") as row:
        row.attempt("growth", small_calls, run.calls)
    with run.row("memory", "out of memory: torch.OutOfMemoryError, and the module works as before") as row:
        for dtype, precision in SETTINGS[:4]:
            for megabytes, what in ((100, "out"), (300, "scratch"), (700, "backward")):
                row.attempt(f"{what}, {_name(dtype)}, '{precision}'", run_out, precision, dtype, megabytes)
    torch.cuda.empty_cache()


def compare_peaks(row, dtype):
    m, k, n, scale = model_new.batch_size, model_new.input_size, model_new.hidden_size, model_new.scaling_factor
    x = torch.rand(m, k, device="cuda", dtype=dtype, requires_grad=True)
    grad, peaks = torch.rand(m, n, device="cuda", dtype=dtype), []
    for kind in (Model, ModelNew):
        with torch.device("cuda"):
            model = kind(k, n, scale).to(dtype)
        wanted = [x, *model.parameters()]
        with torch.no_grad():
            forward = peak_bytes(lambda model=model: model(x))
        backward = peak_bytes(lambda model=model, wanted=wanted: torch.autograd.grad(model(x), wanted, grad))
        peaks.append((forward, backward))
        del model, wanted
    text = "{:.1f} and {:.1f} MB, eager {:.1f} and {:.1f}".format(*(v / 1e6 for v in (*peaks[1], *peaks[0])))
    row.notes.append(f"{_name(dtype)} at '{torch.get_float32_matmul_precision()}': {text}")
    assert all(new <= old for new, old in zip(peaks[1], peaks[0])), text
    return 2


def small_calls(calls):
    cases = [inputs(shape, dtype, "cuda") for shape in ((8, 32, 16), (32, 1024, 1024)) for dtype in fuzz.DTYPES]

    def call(i):
        case = cases[i % len(cases)]
        gradients(*case) if i // len(cases) % 4 == 0 else layer(*case)

    def state():
        torch.cuda.synchronize()
        gc.collect()
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        device = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        return device, resident_pages * resource.getpagesize() / 2**20

    for i in range(20 * len(cases)):
        call(i)
    before, host_before = state()
    for i in range(calls):
        call(i)
    after, host_after = state()
    assert after == before, f"bytes: {before}, then {after}"
    assert host_after - host_before < 32, f"the process grew by {host_after - host_before:.0f} MiB"
    return calls


def run_out(precision, dtype, megabytes):
    """A call with x and out [65536, 1024] while so few MB (half for 16 bits) are left: it raises, or is right."""
    with settings(precision):
        module = ModelNew(1024, 1024, 2.0).to("cuda", dtype)
        parameters = list(module.parameters())
        x = torch.randn(65536, 1024, device="cuda", dtype=dtype)
        small, grad = x[:64].clone(), torch.ones(65536, 1024, device="cuda", dtype=dtype)
        with_backward, megabytes = megabytes > 500, megabytes * dtype.itemsize // 4
        arithmetic = Arithmetic(dtype, select_kernel(x, *parameters), precision)

        def call(x, grad):
            """Whether there was memory for it."""
            try:
                if not with_backward:
                    with torch.no_grad():
                        out = module(x)
                    Expected(small, *parameters, 2.0, arithmetic, False).check(out[:64])
                else:
                    torch.autograd.grad(module(x), parameters, grad)
                return True
            except torch.OutOfMemoryError:
                return False

        def results():
            return [module(small).detach(), *torch.autograd.grad(module(small).sum(), parameters)]

        before = results()
        torch.autograd.grad(module(x), parameters, grad)  # whatever is made once, is made
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        allocated, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + megabytes * 1e6) / total))
        try:
            enough = call(x, grad)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert not enough or megabytes >= 150, "no error, with less memory than the result takes"
        gc.collect()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == allocated, "memory was not given back"
        for a, b in zip(results(), before):
            assert_same_bits(a, b, "afterwards")


# ---------------------------------------------------------------------------------------------------------- state


def state_section(run):
    """Whatever is done to a module's weights, the next call sees it."""
    from test_state import COPIES, EDITS  # what the tests do on the CPU and in float32

    shapes = SHAPES[run.device][1:4] + SHAPES[run.device][5:]
    for what, changes, body in (
        ("edits of a module's weights: the next call sees them", EDITS, after_edit),
        ("copies of a used module: the same bits, and an edit of one leaves the other alone", COPIES, after_copy),
    ):
        with run.row("state", what) as row:

            def all_of_them(x, weight, bias, scale, row=row, changes=changes, body=body):
                for name, change in changes.items():
                    module = module_with(weight.clone(), bias.clone(), scale)
                    row.attempt(f"{name}, {describe(x, weight, bias)}", body, module, x, change)
                return 0

            run.for_each_kernel(row, all_of_them, shapes, SETTINGS[:4])
    with run.row("state", "training with Adam: every forward is that of the weights as they are then") as row:
        run.for_each_kernel(row, train, shapes, FLOAT32)


def check_module(module, x):
    for with_gradient in (False, True):
        with torch.set_grad_enabled(with_gradient):
            out = module(x)
        # As eager: Adam in float16 divides by zero, with either.
        assert_as_eager(out, x, module.gemm.weight, module.gemm.bias, module.scaling_factor, with_gradient)


def after_edit(module, x, edit):
    check_module(module, x)
    with torch.device(x.device):  # where the edit draws its numbers
        edit(module)
    check_module(module, x.to(module.gemm.weight.dtype))


def after_copy(module, x, make):
    before = module(x)
    before.sum().backward()
    other = make(module)
    assert_same_bits(other(x), before, "the copy")
    other.gemm.weight.data.mul_(-2)
    check_module(other, x)
    assert_same_bits(module(x), before, "the original")


def train(x, weight, bias, scale, steps=20):
    module = module_with(weight, bias, scale)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(steps):
        weight, bias = module.gemm.weight.detach(), module.gemm.bias.detach()
        out = module(x)
        expected(x, weight, bias, scale, True).check(out.detach())
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
    return steps


# ---------------------------------------------------------------------------- wrong calls, another device, sanitizer


def bad_input_section(run):
    """The tests of wrong calls, and those with guards around what the kernels themselves write."""
    selections = [
        ("wrong calls raise and leave the module usable: tests/test_bad_input.py", ["tests/test_bad_input.py"])
    ]
    if run.device == "cuda":
        files = [
            str(path) for path in (ROOT / "tests").glob("test_*.py") if "def test_nothing_outside" in path.read_text()
        ]
        what = "kernels on the middle of larger blocks write nothing outside: tests test_nothing_outside..."
        selections.append((what, [*files, "-k", "test_nothing_outside"]))
    for what, selection in selections:
        with run.row("bad input", what) as row:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
            seconds = max(20.0, run.deadline - time.perf_counter())
            try:
                result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
            except subprocess.TimeoutExpired:
                row.notes.append(f"stopped by the clock after {seconds:.0f} s: not counted")
                continue
            text = result.stdout.strip()
            counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error)", text.rpartition("\n")[2])}
            row.tried = sum(counts.values())
            for line in re.findall(r"^(?:FAILED|ERROR) .+$", text, re.MULTILINE):
                row.fail("pytest", AssertionError(line))
            if result.returncode and not row.failures:
                row.fail("pytest", RuntimeError((text + result.stderr)[-300:]))


def second_device_section(run):
    """Tensors on a device that is not the current one."""
    with run.row(
        "second GPU", "tensors on one GPU while the other is current: as float64, and it stays current"
    ) as row:
        if run.device == "cpu" or torch.cuda.device_count() < 2:
            row.notes.append("skipped: needs two CUDA devices")
            return

        def on_the_other(x, weight, bias, scale):
            for device, current in (("cuda:1", 0), ("cuda:0", 1)):
                moved = [t.to(device) for t in (x, weight, bias)]
                with torch.cuda.device(current):
                    results = gradients(*moved, scale)
                    expected(*moved, scale, True).check(results[0])
                    expected(*moved, scale).check(layer(*moved, scale))
                    assert torch.cuda.current_device() == current
                    assert all(t.device == moved[0].device for t in results)
            return 4

        run.for_each_kernel(row, on_the_other)


SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_SECONDS = 120  # racecheck took 2.7 a case on an H200


def child_shapes():
    """What a sanitizer watches: every kernel, with gradients, on small shapes, for at most two minutes."""
    start, done = time.perf_counter(), 0
    with_tiles = [case for case in kernels("cuda") if case[3] is not None]
    for shape, dtype, precision, tile in (*kernels("cuda", [TILE_SHAPE]), *with_tiles):
        if time.perf_counter() - start > SANITIZER_SECONDS:
            break
        with settings(precision), fuzz.any_tile(tile, dtype, shape[1]):
            x, weight, bias, scale = case = inputs(shape, dtype, "cuda")
            gradients(*case)
            if dtype == torch.float32:  # with sums that have lost their bits, which are computed again
                x[..., ::8], weight[:, ::8] = 1e20, 0
            expected(x, weight, bias, scale).check(layer(x, weight, bias, scale))
            done += 1
            print(f"{describe(*case[:3])}, tile {tile}", flush=True)
    print(f"shapes: {done}")
    return 0


def find_sanitizer():
    """compute-sanitizer on PATH, or in the CUDA toolkit; None where there is none."""
    if shutil.which("compute-sanitizer"):
        return shutil.which("compute-sanitizer")
    with contextlib.suppress(RuntimeError):
        beside_nvcc = os.path.join(model_new.find_cuda_home(), "bin", "compute-sanitizer")
        return beside_nvcc if os.access(beside_nvcc, os.X_OK) else None
    return None


def sanitizer_section(run):
    """compute-sanitizer's four tools over a process that enters every kernel."""
    sanitizer = find_sanitizer()
    for tool in SANITIZER_TOOLS:
        with run.row("sanitizer", f"compute-sanitizer --tool {tool}: every kernel on small shapes") as row:
            if run.device == "cpu" or sanitizer is None:
                row.notes.append("skipped: needs a CUDA device and compute-sanitizer")
                continue
            command = [sanitizer, "--tool", tool, sys.executable, __file__, "--child-shapes"]
            try:
                result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
            except subprocess.TimeoutExpired:
                row.notes.append("not finished in 300 s")
                continue
            text = result.stdout + result.stderr
            shapes = re.search(r"^shapes: (\d+)$", text, re.MULTILINE)
            summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
            row.tried = int(shapes.group(1)) if shapes else 0
            if not (shapes and summary):
                row.fail(tool, RuntimeError("did not finish: " + text[-300:]))
            elif int(summary.group(1)):
                first = next(
                    (line for line in text.splitlines() if re.match("=+ (Error|Invalid|Uninit|Warn)", line)), ""
                )
                row.fail(tool, AssertionError(f"{summary.group(0)}; first: {first}"))


# ------------------------------------------------------------------------------------------------ the command line

SECTIONS = {  # name: (function, its share of the time, whether it needs a CUDA device)
    "fuzz": (fuzz_section, 0.4, False),
    "specials": (specials_section, 0.13, False),
    "determinism": (determinism_section, 0.08, False),
    "concurrency": (concurrency_section, 0.07, True),
    "memory": (memory_section, 0.1, True),
    "state": (state_section, 0.08, False),
    "bad-input": (bad_input_section, 0.12, False),
    "second-gpu": (second_device_section, 0.02, False),
    "sanitizer": (sanitizer_section, 0.0, False),  # has its own limits
}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(prog="bench/trust.py", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--calls", type=int, default=10000, help="random calls, and repetitions elsewhere (default %(default)s)")
    option("--seed", type=int, default=0, help="of the random calls and all data (default %(default)s)")
    option("--minutes", type=float, default=4.0, help="time for all, less for each section (default %(default)s)")
    option("--sections", type=functools.partial(some_of, SECTIONS), metavar="NAMES", help="default: all but sanitizer")
    option("--case", type=int, metavar="N", help="only the random call of that number")
    option("--sanitizer", action="store_true", help="the section sanitizer, too; minutes more")
    option("--device", choices=("cuda", "cpu"), default="cuda", help="default %(default)s")
    option("--output", type=Path, metavar="FILE", help="default docs/TRUST.md")
    option(
        "--results", type=Path, metavar="FILE", help="default bench/results/trust-<gpu>.json; FILE.json with --output"
    )
    option("--commit", help="what was tried, where git cannot tell")
    option("--child-shapes", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.sections:
        arguments.sections = [name for name in SECTIONS if name != "sanitizer"]
    if arguments.sanitizer:
        arguments.sections.append("sanitizer")
    if arguments.case is not None:
        arguments.sections = ["fuzz"]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; --device cpu --output FILE tries what needs none")
    if arguments.device == "cpu" and not arguments.output and arguments.case is None:
        parser.error("--device cpu needs --output FILE: docs/TRUST.md is that of a GPU")
    return arguments


def git_commit():
    def git(*words):
        result = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return "unknown"
    return (commit + (" with changes" if changed else "")) if commit else "unknown"


def table(header, rows):
    """In Markdown; a | in a cell would end it."""
    cells = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def as_markdown(record):
    rows = record["rows"]
    failed = sum(len(row["failures"]) for row in rows)
    tried = sum(row["tried"] for row in rows)
    lines = [
        "# What was done to break it",
        "",
        f"{tried} tries, {failed} failures. Written by",
        "",
        "```sh",
        record["command"],
        "```",
        "",
        "on {date}, {device}, torch {torch}, commit {commit}, seed {seed}.".format_map(record),
        "What counts as right is derived in `tests/fuzz.py`, class Arithmetic.",
        "",
        table(
            ["section", "what was tried", "tried", "failures", "seconds", "notes"],
            [
                (
                    *(row[key] for key in ("section", "what", "tried")),
                    len(row["failures"]),
                    f"{row['seconds']:.1f}",
                    "; ".join(row["notes"]),
                )
                for row in rows
            ],
        ),
        "",
        "## Random calls by kernel",
        "",
    ]
    kernels = sorted({call["kernel"] for call in record["calls"]})
    counts = Counter()
    for call in record["calls"]:
        where = f", '{call['precision']}'" if call["dtype"] == "float32" else ""
        counts[call["dtype"] + where, call["kernel"]] += call["count"]
    body = [[name, *(counts[name, kernel] for kernel in kernels)] for name in sorted({name for name, _ in counts})]
    lines += [table(["", *kernels], body), "", "## Failures", ""]
    for row in rows:
        lines += [f"- {row['section']}: {failure}" for failure in row["failures"][:LISTED]]
        if len(row["failures"]) > LISTED:
            lines.append(f'- {row["section"]}: {len(row["failures"]) - LISTED} more of "{row["what"]}"')
    lines += [] if failed else ["None."]
    return "\n".join(lines) + "\n"


def main(argv=None):
    """Exit status 0, or 1 where something failed."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    warnings.filterwarnings("ignore", "Initializing zero-element tensors")
    if arguments.child_shapes:
        return child_shapes()
    run = Run(arguments)
    gpu = torch.cuda.get_device_name() if run.device == "cuda" else "CPU"
    print(f"{model_new._environment()}; {arguments.calls} calls, {arguments.minutes:g} minutes", flush=True)
    for name in arguments.sections:
        function, share, needs_cuda = SECTIONS[name]
        torch.manual_seed(run.seed)
        run.deadline = time.perf_counter() + 60 * arguments.minutes * share
        print(f"\n[{name}] {function.__doc__.splitlines()[0]}", flush=True)
        if run.lost or (needs_cuda and run.device == "cpu"):
            with run.row(name, function.__doc__.splitlines()[0].rstrip(".")) as row:
                row.notes.append("not run: the CUDA device was lost" if run.lost else "skipped: needs a CUDA device")
            continue
        try:
            with settings("highest"):
                function(run)
        except Exception as error:  # outside of any row; the others still stand
            with run.row(name, "the section itself"):
                raise error
        if run.device == "cuda" and not run.lost:
            torch.cuda.empty_cache()
    record = {
        "date": datetime.date.today().isoformat(),
        "device": gpu,
        "torch": torch.__version__,
        "commit": arguments.commit or git_commit(),
        "seed": run.seed,
        "command": " ".join(["python bench/trust.py", *argv]),
        "calls": [
            {"kernel": kernel, "dtype": dtype, "precision": precision, "count": count}
            for (kernel, dtype, precision), count in sorted(run.kernels.items())
        ],
        "rows": [
            {key: getattr(row, key) for key in ("section", "what", "tried", "failures", "seconds", "notes")}
            for row in run.rows
        ],
    }
    if arguments.case is None:
        write(record, arguments)
    failed = sum(len(row.failures) for row in run.rows)
    print(f"\n{sum(row.tried for row in run.rows)} tries, {failed} failures")
    return 1 if failed else 0


def write(record, arguments):
    name = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    output = arguments.output or ROOT / "docs/TRUST.md"
    results = ROOT / f"bench/results/trust-{name}.json"
    results = arguments.results or (arguments.output.with_suffix(".json") if arguments.output else results)
    for path, text in ((output, as_markdown(record)), (results, json.dumps(record, indent=1) + "\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"\nwrote {output.name} and {results.name}")


if __name__ == "__main__":
    sys.exit(main())
