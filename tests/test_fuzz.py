"""Random calls of the layer against float64, and that mistakes would be seen. See fuzz.py for the bounds."""

import dataclasses
import random

import pytest
import torch
from fuzz import (
    DATA,
    EDGES,
    GUARD,
    LARGE,
    LAYOUTS,
    ON_CPU,
    ON_GPU,
    PRECISIONS,
    Case,
    GuardError,
    any_tile,
    draw,
    memory_at,
    one_thread,
    place,
    run,
)
from fuzz import settings as fuzz_settings
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
    """Of 3000 draws; and each is within the limits."""
    cases = [draw(random.Random(i), ON_CPU) for i in range(3000)]
    seen = {field.name: {getattr(case, field.name) for case in cases} for field in dataclasses.fields(Case)}
    assert seen["dtype"] == {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    assert seen["precision"] == set(PRECISIONS) and seen["module"] == {False, True}
    assert seen["gradient"] == {"", "xwb", "wb", "x", "w", "b"}
    assert {len(leading) for leading in seen["leading"]} == {0, 1, 2, 3}
    assert {0.0, 1e3, -1e3} < seen["scale"] and all(abs(scale) <= 1e3 for scale in seen["scale"])
    for size in ("n", "k"):
        assert set(EDGES) - {3001} <= seen[size] and max(seen[size]) > 2000
    for which in range(3):
        assert {case.layout[which] for case in cases} == set(LAYOUTS)
    for which in range(2):
        assert {case.data[which] for case in cases} == set(DATA)
    rows = [random_rows(case) for case in cases]
    assert 0 in rows and max(rows) > 1000
    assert all(m * case.n * case.k <= ON_CPU.work for m, case in zip(rows, cases))


def random_rows(case):
    return torch.Size(case.leading).numel()


@pytest.mark.parametrize("shape", [(5,), (1,), (0,), (3, 4), (1, 4), (3, 0), (2, 3, 4), (2, 1, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_their_contents_amid_nan(layout, shape):
    contents = torch.randn(shape)
    if layout == "expanded" and shape[0]:
        contents = contents[:1].expand(shape)
    inside, buffer = place(contents, layout)
    assert torch.equal(inside, contents)
    numbers = buffer.view(torch.float32)
    assert numbers[:GUARD].isnan().all() and numbers[-GUARD:].isnan().all()
    held = contents[:1].numel() if layout == "expanded" else contents.numel()
    assert (~numbers.isnan()).sum() == held
    if layout not in ("contiguous", "flipped") and shape == (2, 3, 4):
        assert not inside.is_contiguous() or inside.data_ptr() % 16 or inside.is_neg()


def test_the_large_cases_enter_the_kernels_that_need_them():
    precisions = ("float32", "tf32", "16 bit")
    tiles = {precision: [model_new.select_tile(precision, m, n, k) for m, n, k in LARGE] for precision in precisions}
    entered = {precision: {tile[0] for tile in of if tile} for precision, of in tiles.items()}
    assert entered == {"float32": {"fp16x3"}, "tf32": {"fp16x1", "fp16x1_staged"}, "16 bit": {"wgmma16"}}


def test_any_tile_lasts_as_long_as_its_context():
    """Each of them is what select_tile says inside, and nothing is outside."""
    shape = 5, 7, 520
    for precision, dtype, count in (("highest", "float32", 18), ("high", "float32", 18), ("highest", "float16", 17)):
        kind = "16 bit" if dtype == "float16" else "tf32" if precision == "high" else "float32"
        seen = set()
        for index in range(count):
            with fuzz_settings(precision), any_tile(index, getattr(torch, dtype), 520):
                seen.add(model_new.select_tile(kind, *shape))
                assert model_new.select_tile(kind, 0, 7, 520) is None
        assert len(seen) == count and model_new.select_tile(kind, *shape) is None


def test_memory_at_an_address():
    whole = torch.arange(100, dtype=torch.uint8)
    view = memory_at(whole.data_ptr() + 10, 20, "cpu")
    whole[10] = 77
    assert torch.equal(view, whole[10:30])


# mistakes that must be seen

PLAIN = Case(
    leading=(33,),
    n=48,
    k=64,
    dtype="float32",
    precision="highest",
    scale=2.0,
    data=("normal", "normal", "normal"),
    layout=("wider rows", "contiguous", "contiguous"),
    gradient="",
    module=False,
    seed=0,
)
with_gradient = dataclasses.replace(PLAIN, gradient="xwb")

operator = model_new._forward  # the right one


def changed_out(change):
    return lambda x, weight, bias, scale: change(operator(x, weight, bias, scale))


def first_element(value):
    def change(out):
        out.view(-1)[0] = value
        return out

    return change


def behind(tensor, by):
    """The element that lies `by` elements after the end of a tensor's last row."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + (len(tensor) - 1) * tensor.stride(0) + by)


def write_first(where):
    def call(x, weight, bias, scale):
        out = operator(x, weight, bias, scale)
        where(x, weight, bias).fill_(1.0)
        return out

    return call


def wrong_gradient(which):
    """1e-3 off in one element of one gradient."""

    def call(*arguments):
        arguments = list(arguments)
        mask = torch.ones_like(arguments[which])
        mask.view(-1)[-1] = 1 + 1e-3
        arguments[which].register_hook(lambda gradient: gradient * mask)
        return operator(*arguments)

    return call


class HalfOfTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


MISTAKES = {
    "1e-5 relative": (PLAIN, changed_out(lambda out: out * (1 + 1e-5)), "outside their bound"),
    "one element 1e-4 off": (
        PLAIN,
        lambda *args: first_element(operator(*args)[0, 0] + 1e-4)(operator(*args)),
        "outside",
    ),
    "NaN": (PLAIN, changed_out(first_element(float("nan"))), "1 of 1584 elements"),
    "Inf": (PLAIN, changed_out(first_element(float("inf"))), "1 of 1584 elements"),
    "never written": (PLAIN, changed_out(torch.empty_like), "outside"),
    "no bias": (PLAIN, lambda x, w, b, s: operator(x, w, b * 0, s), "outside"),
    "no scale": (PLAIN, lambda x, w, b, s: operator(x, w, b, 1.0), "outside"),
    "TF32's precision": (PLAIN, lambda x, w, b, s: operator((x * 4097) - (x * 4097 - x), w, b, s), "outside"),
    "transposed in memory": (PLAIN, changed_out(lambda out: out.t().contiguous().t()), "contiguous"),
    "a view": (PLAIN, changed_out(lambda out: out.view(-1).view(33, 48)), "view"),
    "wrong shape": (PLAIN, changed_out(lambda out: out[None]), "shape"),
    "wrong dtype": (PLAIN, changed_out(torch.Tensor.double), "float64"),
    "z rounded twice": (
        dataclasses.replace(PLAIN, dtype="bfloat16"),
        changed_out(lambda out: out * (1 + 2.0**-6)),
        "outside",
    ),
    "float64 in float32": (
        dataclasses.replace(PLAIN, dtype="float64"),
        changed_out(lambda out: out.float().double()),
        "outside",
    ),
    "half precision at 'high'": (
        dataclasses.replace(PLAIN, precision="high"),
        changed_out(lambda out: out.bfloat16().float()),
        "outside",
    ),
    "x written": (PLAIN, write_first(lambda x, w, b: x[5, 7]), "was written"),
    "behind x written": (PLAIN, write_first(lambda x, w, b: behind(x, 70)), "was written"),
    "between x's rows written": (PLAIN, write_first(lambda x, w, b: behind(x[:3], 66)), "was written"),
    "before W written": (PLAIN, write_first(lambda x, w, b: behind(w[:1], -1)), "was written"),
    "behind b written": (PLAIN, write_first(lambda x, w, b: behind(b[:, None], 1)), "was written"),
    "gradient of x": (with_gradient, wrong_gradient(0), "dx: 1 of"),
    "gradient of W": (with_gradient, wrong_gradient(1), "dW: 1 of"),
    "gradient of b": (with_gradient, wrong_gradient(2), "db: 1 of"),
    "half of the gradient": (with_gradient, changed_out(HalfOfTheGradient.apply), "dx: "),
    "no gradient": (with_gradient, changed_out(torch.Tensor.detach), "requires_grad is False"),
    "a gradient that none wanted": (PLAIN, changed_out(lambda out: out.requires_grad_()), "requires_grad is True"),
}


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake, module, monkeypatch):
    case, wrong, words = MISTAKES[mistake]
    case = dataclasses.replace(case, module=module)
    run(case, "cpu")
    for name in ("linear_sigmoid_residual", "_forward"):  # the module calls the latter
        monkeypatch.setattr(model_new, name, wrong)
    with pytest.raises(GuardError if "written" in words else AssertionError, match=words):
        run(case, "cpu")
