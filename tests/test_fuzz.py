"""Random calls of the layer against float64, and that mistakes would be seen. See fuzz.py for the bounds."""

import dataclasses
import random

import pytest
import torch
from fuzz import DATA, EDGES, LARGE, LAYOUTS, ON_CPU, ON_GPU, Case, GuardError, draw, one_thread, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import DTYPES

import model_new


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(source=st.randoms(use_true_random=False))
def test_random_calls(source, device):
    """As drawn by hypothesis, which makes a case that fails as simple as it can; the same cases on every run."""
    run(draw(source, ON_CPU if device == "cpu" else ON_GPU), device)


def test_the_cases_reach_everything():
    """3000 draws have every choice of each field, and each draw is within the limits."""
    cases = [draw(random.Random(i), ON_CPU) for i in range(3000)]
    seen = {field.name: {getattr(case, field.name) for case in cases} for field in dataclasses.fields(Case)}
    assert seen["dtype"] == {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    assert seen["precision"] == {"highest", "high", "medium"}
    assert seen["gradient"] == {"", "xwb", "wb", "x", "w", "b"} and {0.0, 1e3, -1e3} < seen["scale"]
    assert {len(leading) for leading in seen["leading"]} == {0, 1, 2, 3}
    assert set(EDGES) - {3001} <= seen["n"] & seen["k"]
    assert all({case.layout[which] for case in cases} == set(LAYOUTS) for which in range(3))
    assert all({case.data[which] for case in cases} == set(DATA) for which in range(2))
    rows = [torch.Size(case.leading).numel() for case in cases]
    assert 0 in rows and max(rows) > 1000
    assert all(m * case.n * case.k <= ON_CPU.work for m, case in zip(rows, cases))


def test_the_large_cases_enter_the_kernels_that_need_them():
    for precision, kernels in (("tf32", {"fp16x1", "fp16x1_staged"}), ("16 bit", {"wgmma16"})):
        served_by = [model_new.select_tile(precision, m, n, k) for m, n, k in LARGE]
        assert {tile[0] for tile in served_by if tile} == kernels


# mistakes that must be seen

PLAIN = Case(leading=(33,), n=48, k=64, layout=("wider rows", "contiguous", "contiguous"))
operator = model_new.linear_sigmoid_residual  # the right one


def out_becomes(change):
    return lambda x, w, b, s: change(operator(x, w, b, s))


def one_element(value):
    def change(out):
        out = out.clone()
        out[0, 0] = value
        return out

    return out_becomes(change)


def written(where):
    """A 1 at where(x, W, b) of the inputs, or beside them."""

    def call(*arguments):
        where(*arguments[:3]).fill_(1.0)
        return operator(*arguments)

    return call


def behind(tensor, by):
    """The element that lies `by` elements after the end of a tensor's last row."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + (len(tensor) - 1) * tensor.stride(0) + by)


def gradient_off(which):
    """1e-3 off in one element of one gradient."""

    def call(*arguments):
        mask = torch.ones_like(arguments[which])
        mask.view(-1)[-1] = 1 + 1e-3
        arguments[which].register_hook(lambda gradient: gradient * mask)
        return operator(*arguments)

    return call


MISTAKES = {  # what is wrong, in a case that differs from PLAIN in this, and what is said of it
    "1e-5 relative": (out_becomes(lambda out: out * (1 + 1e-5)), {}, "outside their bound"),
    "NaN": (one_element(float("nan")), {}, "1 of 1584 elements"),
    "Inf": (one_element(float("inf")), {}, "1 of 1584 elements"),
    "no bias": (lambda x, w, b, s: operator(x, w, b * 0, s), {}, "outside"),
    "no scale": (lambda x, w, b, s: operator(x, w, b, 1.0), {}, "outside"),
    "TF32's precision": (lambda x, w, b, s: operator((x * 4097) - (x * 4097 - x), w, b, s), {}, "outside"),
    "transposed in memory": (out_becomes(lambda out: out.t().contiguous().t()), {}, "contiguous"),
    "a view": (out_becomes(lambda out: out.view(-1).view(33, 48)), {}, "view"),
    "wrong shape": (out_becomes(lambda out: out[None]), {}, "shape"),
    "wrong dtype": (out_becomes(torch.Tensor.double), {}, "float64"),
    "rounded twice": (out_becomes(lambda out: out * (1 + 2.0**-6)), {"dtype": "bfloat16"}, "outside"),
    "float64 in float32": (out_becomes(lambda out: out.float().double()), {"dtype": "float64"}, "outside"),
    "16 bits at 'high'": (out_becomes(lambda out: out.bfloat16().float()), {"precision": "high"}, "outside"),
    "between x's rows read": (lambda x, w, b, s: operator(x + 0 * behind(x[:3], 66), w, b, s), {}, "outside"),
    "x written": (written(lambda x, w, b: x[5, 7]), {}, "was written"),
    "between x's rows written": (written(lambda x, w, b: behind(x[:3], 66)), {}, "was written"),
    "before W written": (written(lambda x, w, b: behind(w[:1], -1)), {}, "was written"),
    "behind b written": (written(lambda x, w, b: behind(b[:, None], 1)), {}, "was written"),
    "gradient of x": (gradient_off(0), {"gradient": "xwb"}, "dx: 1 of"),
    "gradient of W": (gradient_off(1), {"gradient": "xwb"}, "dW: 1 of"),
    "gradient of b": (gradient_off(2), {"gradient": "xwb"}, "db: 1 of"),
    "no gradient": (out_becomes(torch.Tensor.detach), {"gradient": "xwb"}, "requires_grad is False"),
    "a gradient that none wanted": (out_becomes(lambda out: out.requires_grad_()), {}, "requires_grad is True"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake, monkeypatch):
    wrong, changes, words = MISTAKES[mistake]
    case = dataclasses.replace(PLAIN, **changes)
    run(case, "cpu")
    monkeypatch.setattr(model_new, "linear_sigmoid_residual", wrong)
    with pytest.raises(GuardError if "written" in words else AssertionError, match=words):
        run(case, "cpu")
