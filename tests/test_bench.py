"""bench/reference.py without a GPU: rows are those that tables and figures read, and no rival takes others along."""

import contextlib
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model_new

pytest.importorskip("triton")  # without it bench/reference.py ends
from bench import bindings, reference

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results/nvidia-h200.json"
SHAPE = 16, 48, 32


def layer(x, weight, bias, scale):
    z = torch.nn.functional.linear(x, weight, bias)
    return z + scale * torch.sigmoid(z)


@pytest.fixture
def on_cpu(monkeypatch):
    """The sections compute on the CPU, where cuBLAS, Triton and torch.compile are plain PyTorch; no JAX.

    Returns the modes that torch.compile was asked for.
    """
    modes = []
    monkeypatch.setattr(reference, "DEVICE", "cpu")
    monkeypatch.setattr(reference, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(reference, "scratch_megabytes", lambda function: 1.5)
    monkeypatch.setattr(reference, "triton_layer", lambda x, weight, bias, scale, _: layer(x, weight, bias, scale))
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.setattr(bindings, "library_layer", layer)
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: modes.append(mode) or model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    return modes


def rows_of(section, precision="highest"):
    options = ["--shape", ",".join(map(str, SHAPE)), "--repeats", "3", "--precision", precision]
    with torch.no_grad():
        rows, good = reference.SECTIONS[section](reference.parse_arguments(options))
    assert good
    return rows


def recorded(section):
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    return [row for row in rows if row["section"] == section]


MORE_KEYS = {
    "time": ["error_of", "scratch_megabytes"],
    "time-16bit": ["ratio_to_gemm", "error_of"],
    "training": ["error_of"],
}


@pytest.mark.parametrize("section", MORE_KEYS)
def test_rows_are_as_recorded(section, on_cpu):
    """The keys and their order; the names, but for those that only a GPU or JAX has."""
    keys = ["section", "name", "precision", "dtype", "shape", "kernel", "ms", "p10", "p90", "speedup", "ratio_to_fp16"]
    keys += ["error_frobenius", "error_componentwise", *MORE_KEYS[section], "torch", "gpu"]
    rows, old = rows_of(section), recorded(section)
    for row in rows + old:
        assert [key for key in row if key != "timing"] == keys
    error_of = {(row["dtype"], row["name"]): row["error_of"] for row in rows}
    for row in old:
        if row["name"] != reference.YARDSTICK and not row["name"].startswith("JAX"):
            assert error_of[row["dtype"], row["name"]] == row["error_of"]
    for row in rows:
        assert row["shape"] == list(SHAPE) and row["gpu"] == "Some GPU" and row["precision"] == "highest"
        assert 0 < row["p10"] <= row["ms"] <= row["p90"] and row["error_frobenius"] < 1e-2
        assert row["kernel"] == ("cpu" if row["name"] == "ModelNew" else None)


def test_ratios(on_cpu):
    rows = {(row["dtype"], row["name"]): row for row in rows_of("time-16bit")}
    for (dtype, _), row in rows.items():
        assert row["speedup"] == pytest.approx(rows[dtype, "eager"]["ms"] / row["ms"])
        assert row["ratio_to_gemm"] == pytest.approx(row["ms"] / rows[dtype, "cuBLAS GEMM"]["ms"])
    assert on_cpu == [None, "max-autotune-no-cudagraphs"] * 2
    assert rows["float16", "torch.compile, max-autotune"]["error_of"] == "out"


def test_a_rival_that_fails_is_named_and_left_out(on_cpu, monkeypatch, capsys):
    def triton_layer(x, weight, bias, scale, kind):
        if kind == "bf16x3":
            raise RuntimeError("out of\n\tluck")
        return layer(x, weight, bias, scale)

    monkeypatch.setattr(reference, "triton_layer", triton_layer)
    names = [row["name"] for row in rows_of("time")]
    assert "Triton tf32x3, fused epilogue" in names and not [name for name in names if "bf16x3" in name]
    printed = capsys.readouterr().out
    assert "Triton bf16x3, fused epilogue: not run, RuntimeError('out of\\n\\tluck')" in printed
    assert f"{reference.YARDSTICK}: not run" in printed and "cuBLAS SGEMM *" in printed
    monkeypatch.setattr(reference.ModelNew, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rows_of("time")


@pytest.mark.parametrize("precision, dtypes", [("highest", ["float32", "bfloat16"]), ("high", ["float32"])])
@pytest.mark.parametrize("has_nvidia_smi", [True, False])
def test_energy(has_nvidia_smi, precision, dtypes, on_cpu, monkeypatch, capsys):
    """Of the second half of the time: what was sampled before does not count."""
    samples = []

    @contextlib.contextmanager
    def sampled():
        samples.clear()
        yield samples

    def synchronize():  # after every block of calls: a lower clock each time
        if has_nvidia_smi:
            samples.append((1000.0 / (1 + len(samples)), 500.0, 40.0))

    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype=None: multiply(a, b).to(out_dtype or a.dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(reference, "sampled_conditions", sampled)
    monkeypatch.setattr(reference, "STEADY_SECONDS", 1e-4)  # a block of calls in each half
    rows = rows_of("energy", precision)
    assert [row["name"] for row in rows[:3]] == ["eager", "ModelNew", reference.YARDSTICK]
    assert [row["dtype"] for row in rows[::3]] == dtypes and len(rows) == 3 * len(dtypes)
    for i, row in enumerate(rows):
        of_gemm = rows[i // 3 * 3 + 2]["millijoules"]
        assert row["ms"] > 0 and row["speedup"] == pytest.approx(rows[i // 3 * 3]["ms"] / row["ms"])
        assert row["sm_clock_mhz"] == (500.0 if has_nvidia_smi else None)
        assert row["millijoules"] == (pytest.approx(500 * row["ms"]) if has_nvidia_smi else None)
        assert row["energy_ratio"] == (pytest.approx(row["millijoules"] / of_gemm) if has_nvidia_smi else None)
    printed = capsys.readouterr().out
    assert f"{reference.YARDSTICK} *" in printed and (" mJ" in printed) == has_nvidia_smi


def test_each_section_is_written_with_its_conditions(on_cpu, monkeypatch, tmp_path, capsys):
    """Also where a section fails, which the exit status says."""

    def time_section(arguments):
        return [reference.row(arguments, "time", "eager", arguments.shape, ms=1.0)], True

    def host_section(arguments):
        raise RuntimeError("of the host section")

    @contextlib.contextmanager
    def sampled():
        yield [(1980.0, 700.0, 60.0), (1500.0, 100.0, 40.0)]

    time_section.__doc__ = host_section.__doc__ = "A section."
    monkeypatch.setattr(reference, "SECTIONS", {"time": time_section, "host": host_section})
    monkeypatch.setattr(reference, "sampled_conditions", sampled)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(model_new, "_environment", lambda: "here")
    output = tmp_path / "results.json"
    assert reference.main(["--output", str(output)]) == 1
    rows = json.loads(output.read_text(encoding="utf-8"))
    assert [(row["section"], row["name"]) for row in rows] == [
        *(("time", "eager"), ("conditions", "time"), ("conditions", "host"))
    ]
    assert rows[1]["sm_clock_mhz"] == {"median": 1740, "min": 1500, "max": 1980}
    assert rows[1]["precision"] == "highest" and rows[1]["dtype"] is None
    printed = capsys.readouterr()
    assert "1740 MHz (1500 to 1980)" in printed.out and "of the host section" in printed.err


def test_progress_on_a_terminal(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    rows_of("training")
    err = capsys.readouterr().err
    assert err.count("\r") == 4 and err.count("\n") == 1 and err.endswith("\n")
    assert " 1/3 training, float32: ModelNew " in err and f"[{'#' * 40}] 3/3 training" in err


class Array(torch.Tensor):
    """In place of jax.Array; counts how often one is waited for."""

    waits = 0

    def block_until_ready(self):
        Array.waits += 1
        return self


@pytest.fixture
def jax(on_cpu, monkeypatch):
    """In place of JAX; it knows two of the presets, and notes in `calls` which one each product was computed with."""

    def dot(x, y, precision):
        module.calls.append(precision)
        return x @ y

    module = types.ModuleType("jax")
    module.calls, module.__spec__ = [], importlib.machinery.ModuleSpec("jax", None)
    module.lax = types.SimpleNamespace(DotAlgorithmPreset={"F32_F32_F32": "f32", "TF32_TF32_F32": "tf32"})
    module.dlpack = types.SimpleNamespace(from_dlpack=lambda tensor: torch.from_dlpack(tensor).as_subclass(Array))
    module.numpy, module.nn = types.SimpleNamespace(dot=dot), types.SimpleNamespace(sigmoid=torch.sigmoid)
    module.jit = lambda function: function
    monkeypatch.setitem(sys.modules, "jax", module)
    monkeypatch.setattr(Array, "waits", 0)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    return module


def test_jax_is_timed_in_blocks(jax, capsys):
    rows = {row["name"]: row for row in rows_of("time")}
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    names = list(rows)
    assert [name for name in names if "JAX" in name] == ["JAX F32"]
    assert names.index("JAX F32") < names.index("ModelNew")  # beside the other rivals, though timed after all
    assert [name for name, row in rows.items() if "timing" in row] == ["JAX F32"]
    assert rows["JAX F32"]["timing"] == "wall clock, calls back to back"
    assert rows["JAX F32"]["scratch_megabytes"] is None and rows["JAX F32"]["error_frobenius"] < 1e-6
    blocks = 1 + 2  # one warms up
    assert jax.calls == ["f32"] * (1 + 10 * blocks) and Array.waits == 1 + blocks
    printed = capsys.readouterr().out
    assert "JAX BF16x9: not run, KeyError('BF16_BF16_F32_X9')" in printed
    assert "JAX F32 †" in printed and "† wall clock, calls back to back (10), L2 not flushed" in printed


def test_jax_times_are_of_one_call(jax, monkeypatch):
    """The wall clock's, whatever else there is to time with, over the calls of a block."""
    asked = []

    def times_in_turns(functions, repeats, warm_up_seconds, wall_clock=False):
        asked.append((list(functions), repeats, wall_clock))
        return {name: [5.0] * repeats for name in functions}

    monkeypatch.setattr(reference, "times_in_turns", times_in_turns)
    function = reference.JaxLayer("F32_F32_F32", torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))
    times = reference.timed({"JAX F32": function, "other": lambda: None}, repeats=60)
    assert times == {"JAX F32": (0.5, 0.5, 0.5), "other": (5.0, 5.0, 5.0)} and list(times) == ["JAX F32", "other"]
    assert asked == [(["other"], 60, False), (["JAX F32"], 20, True)]


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_jax_where_tf32_is_allowed(precision, jax):
    assert [row["name"] for row in rows_of("time", precision) if "JAX" in row["name"]] == ["JAX TF32"]


def test_jax_itself(monkeypatch):
    """On the CPU, where JAX knows these two of the presets."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    pytest.importorskip("jax")
    x, weight, bias = torch.randn(16, 48), torch.nn.Parameter(torch.randn(32, 48)), torch.randn(32)
    layers = reference.jax_layers("highest", x, weight, bias)
    assert list(layers) == ["JAX F32", "JAX TF32x3", "JAX BF16x6", "JAX BF16x9"]
    for name in ("JAX F32", "JAX BF16x6"):
        out = layers[name]()
        assert out.shape == (16, 32) and out.dtype == torch.float32
        found = reference.errors_of(name, out, x, weight, bias)
        assert found["error_frobenius"] < 1e-6 and found["error_of"] == "out"
        layers[name].block()


def test_the_library_fuses_the_bias():
    """What pytorch_layers says of cuBLASLt rests on this: one addmm, with the bias as a vector."""
    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append((str(function), [tuple(arg.shape) for arg in args]))
            return function(*args, **(kwargs or {}))

    x, weight, bias = torch.randn(16, 48), torch.randn(32, 48), torch.randn(32)
    with torch.no_grad(), Watch():
        torch.nn.functional.linear(x, weight, bias)
    assert calls[-1] == ("aten.addmm.default", [(32,), (16, 48), (48, 32)])
    assert not [name for name, _ in calls[:-1] if not name.startswith(("aten.t.", "aten.view."))]


class Clock:
    """Stands in for CUDA events: each record reads a clock that only the timed functions move."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.parametrize("wall_clock", [False, True])
def test_times_in_turns(wall_clock, monkeypatch):
    """All repeats but the warm-up's; unless the clock is asked, by events, with the cache flushed before each call, and
    more work for the GPU before the first, so that it does not wait for the host.
    """
    log = []

    def function(name, ms):
        def call():
            log.append(name)
            Clock.now += ms

        return call

    monkeypatch.setattr(Clock, "now", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(model_new, "l2_flush", lambda: lambda: log.append("flush"))
    monkeypatch.setattr(model_new.time, "perf_counter", lambda: Clock.now / 1e3)
    functions = {"a": function("a", 2.0), "b": function("b", 3.0)}
    monkeypatch.setattr(model_new.random, "sample", lambda names, count: sorted(names, reverse=True)[:count])
    turn = ["b", "a"] if wall_clock else [*["flush"] * 4, "flush", "b", "flush", "a", "wait"]
    times = model_new.times_in_turns(functions, 4, wall_clock=wall_clock)
    assert times == {"a": pytest.approx([2.0] * 4), "b": pytest.approx([3.0] * 4)}
    assert log == turn * 5
    log.clear()
    times = model_new.times_in_turns(functions, 1, warm_up_seconds=0.012, wall_clock=wall_clock)
    assert list(map(len, times.values())) == [1, 1] and log == turn * 4  # three of 5 ms pass 12
