"""bench/trust.py on the CPU: it writes down what it tried, and what is broken on purpose is found and written down."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import needs_cuda
from fuzz import one_thread

import model_new

SPEC = importlib.util.spec_from_file_location("trust", Path(__file__).resolve().parent.parent / "bench/trust.py")
trust = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(trust)

operator = model_new.linear_sigmoid_residual  # the right one


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture
def record_of(tmp_path):
    """(sections, *options) -> exit status, the JSON file's record, and the text of the Markdown file."""

    def run(sections, *options, calls=20):
        output = tmp_path / "TRUST.md"
        output.unlink(missing_ok=True)
        command = ["--device", "cpu", "--calls", str(calls), "--minutes", "2", "--output", str(output)]
        status = trust.main([*command, "--sections", sections, *options])
        record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
        return status, record, output.read_text(encoding="utf-8")

    return run


def test_writes_down_what_it_tried(record_of):
    sections = [name for name in trust.SECTIONS if name != "bad-input"]
    status, record, text = record_of(",".join(sections), "--commit", "abc1234", "--seed", "3")
    assert status == 0 and not any(row["failures"] for row in record["rows"])
    tried = {(row["section"], row["what"]): row["tried"] for row in record["rows"]}
    assert tried["fuzz", "random calls against float64"] == 20
    guarded = next(row for row in record["rows"] if row["what"].startswith("guard bytes"))
    assert guarded["tried"] >= 60  # x, W and b of each
    for section in ("specials", "determinism", "state"):
        assert sum(count for (of, _), count in tried.items() if of == section) > 20
    for row in record["rows"]:
        assert row["tried"] or "skipped" in row["notes"][0]
        assert f"| {row['what']} | {row['tried']} | 0 | " in text
    assert sum(call["count"] for call in record["calls"]) == 20 and {call["kernel"] for call in record["calls"]} == {
        "cpu"
    }
    assert record["seed"] == 3 and "commit abc1234, seed 3" in text and torch.__version__ in text
    assert text.rstrip().endswith("## Failures\n\nNone.")
    assert "python bench/trust.py --device cpu --calls 20" in text


def test_the_shapes_for_a_gpu_enter_every_kernel():
    seen = set()
    for (m, k, n), dtype, precision, _ in trust.kernels("cuda", trust.SHAPES["cuda"]):
        kind = {torch.float32: "tf32" if precision == "high" else "float32", torch.float64: None}.get(dtype, "16 bit")
        tile = model_new.select_tile(kind, m, n, k) if kind else None
        seen.add((kind, tile[0] if tile else "library"))
    assert seen == {
        *((kind, "library") for kind in ("float32", "tf32", "16 bit", None)),
        *(("float32", "fp16x3"), ("tf32", "fp16x1"), ("tf32", "fp16x1_staged"), ("16 bit", "wgmma16")),
    }
    assert trust.kernel_names() == {"cpu"} | {kernel for _, kernel in seen}


def test_runs_the_tests_of_wrong_calls(record_of):
    status, record, _ = record_of("bad-input")
    assert status == 0 and record["rows"][0]["tried"] > 50


def plant(monkeypatch, change):
    """The operator's result, changed."""
    monkeypatch.setattr(model_new, "linear_sigmoid_residual", lambda *args: change(operator(*args), *args))


def put_nan(out, *_):
    with torch.no_grad():
        out.view(-1)[-1:] = float("nan")
    return out


def write_x(out, x, *_):
    with torch.no_grad():
        x.view(-1)[-1:] = 1.25
    return out


def noise(out, *_):
    return out * (1 + torch.finfo(out.dtype).eps * torch.randint(2, out.shape))


def of_first_weights():
    """A cache of weights, by address."""
    seen = {}

    def change(out, x, weight, bias, scale):
        return operator(
            x, seen.setdefault((weight.data_ptr(), weight.shape, weight.dtype), weight.clone()), bias, scale
        )

    return change


PLANTED = {  # what is wrong: the change of the result, the section that finds it, and what is written of it
    "1e-3 relative": (lambda out, *_: out * (1 + 1e-3), "fuzz", "outside their bound"),
    "NaN": (put_nan, "fuzz", "outside their bound"),
    "an exception": (lambda out, *_: 1 / 0, "fuzz", "ZeroDivisionError"),
    "x is written": (write_x, "fuzz", "was written"),
    "NaN becomes 0": (lambda out, *_: out.nan_to_num(0.0), "specials", "NaN and Inf in a row of x"),
    "Inf becomes the largest number": (lambda out, *_: out.clamp(torch.finfo(out.dtype).min), "specials", "-inf in x"),
    "denormals become zero": (
        lambda out, *_: torch.where(out.abs() < torch.finfo(out.dtype).tiny, 0 * out, out),
        "specials",
        "denormal x, b = 0, cpu, float32",
    ),
    "other bits on every run": (noise, "determinism", "repetitions differ"),
    "stale weights": (of_first_weights(), "state", "elements; first at"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_error_is_written_down(what, record_of, monkeypatch):
    change, section, words = PLANTED[what]
    plant(monkeypatch, change)
    status, record, text = record_of(section)
    failures = [failure for row in record["rows"] for failure in row["failures"]]
    assert status == 1 and any(words in failure for failure in failures)
    assert f"{len(failures)} failures" in text and failures[0] in text.partition("## Failures")[2]


def test_a_failure_says_how_to_repeat_it(record_of, monkeypatch, capsys):
    """One wrong call in twenty, alone: it is wrong again, and right without the planted error."""
    plant(monkeypatch, lambda out, *_: out * 1.01)
    _, record, _ = record_of("fuzz", "--seed", "5")
    command = re.search(r"`python bench/trust.py (.+?)`", record["rows"][0]["failures"][0]).group(1)
    options = ["--device", "cpu", *command.split()]
    assert trust.main(options) == 1
    monkeypatch.undo()
    assert trust.main(options) == 0
    assert "Case(leading=" in capsys.readouterr().out


def test_a_section_that_breaks_does_not_end_the_run(record_of, monkeypatch):
    def broken(run):
        """Breaks."""
        raise KeyError("the section")

    monkeypatch.setitem(trust.SECTIONS, "specials", (broken, 0.1, False))
    status, record, _ = record_of("specials,determinism")
    assert status == 1
    assert [row["section"] for row in record["rows"]] == ["specials", "determinism", "determinism"]
    assert "KeyError" in record["rows"][0]["failures"][0] and not record["rows"][1]["failures"]


def test_without_time_little_is_tried_and_it_says_so(record_of):
    status, record, text = record_of("fuzz,specials", "--minutes", "0")
    assert status == 0 and record["rows"][0]["tried"] == 0
    assert text.count("stopped by the clock") == 2


def test_settings_stay_as_they_were(record_of):
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        record_of("fuzz,determinism")
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize(
    "options, words",
    [
        (["--device", "cpu"], "--output FILE"),
        (["--sections", "fuzz,sleep"], "expected some of fuzz,"),
        (["--calls", "x"], "int"),
    ],
)
def test_wrong_options(options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        trust.main(options)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_a_bar_in_a_message_does_not_end_the_cell():
    assert trust.table(["a", "b"], [["|x|·|w|", 1]]).endswith("| \\|x\\|·\\|w\\| | 1 |")


@needs_cuda
def test_on_a_gpu(tmp_path):
    output = tmp_path / "TRUST.md"
    sections = "fuzz,specials,determinism,concurrency,state,second-gpu"
    assert trust.main(["--calls", "100", "--minutes", "1", "--sections", sections, "--output", str(output)]) == 0
    assert "## Failures\n\nNone." in output.read_text(encoding="utf-8")
