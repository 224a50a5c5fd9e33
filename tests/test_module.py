"""ModelNew in place of Model: parameters, seeds, state, and the functions a harness calls."""

import inspect

import numpy as np
import pytest
import torch
from conftest import is_fused, needs_cuda
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.overrides import TorchFunctionMode

import model_new
from model_new import Model, ModelNew


@pytest.mark.parametrize("k, n", [(7, 5), (64, 128)])
def test_same_seed_same_weights_and_same_random_state_afterwards(k, n):
    states = []
    for kind in (Model, ModelNew):
        torch.manual_seed(42)
        states.append((kind(k, n, 2.0).state_dict(), torch.get_rng_state()))
    (reference, random_state), (new, new_random_state) = states
    assert list(reference) == list(new) == ["gemm.weight", "gemm.bias"]
    assert all(torch.equal(reference[name], new[name]) for name in reference)
    assert torch.equal(random_state, new_random_state)


def test_same_constructor_and_forward():
    for name in ("__init__", "forward"):
        assert inspect.signature(getattr(Model, name)) == inspect.signature(getattr(ModelNew, name))
    assert ModelNew(input_size=3, hidden_size=4, scaling_factor=5.0).scaling_factor == 5.0


@pytest.mark.parametrize("source, target", [(Model, ModelNew), (ModelNew, Model)])
def test_state_dicts_interchange(source, target, device):
    a, b = source(40, 24, 2.0).to(device), target(40, 24, 2.0).to(device)
    assert b.load_state_dict(a.state_dict(), strict=True)
    x = torch.randn(6, 40, device=device)
    torch.testing.assert_close(b(x), a(x))


def test_inputs_are_the_reference_problems():
    (x,) = model_new.get_inputs()
    assert x.shape == (1024, 8192) and x.dtype == torch.float32
    assert x.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert x.min() >= 0 and x.max() < 1 and x.std() > 0.28
    assert model_new.get_init_inputs() == [8192, 8192, 2.0]


def test_repr_names_the_scale():
    assert "scaling_factor=2.5" in repr(ModelNew(3, 4, 2.5))


# `gemm` is bypassed only where it is an ordinary nn.Linear with nothing attached


@pytest.fixture
def alike(model_pair, device):
    """(Model, ModelNew with the same weights, x [3, 6])"""
    return *model_pair(6, 5, device=device), torch.randn(3, 6, device=device)


def assert_fused(reference, new, x):
    torch.testing.assert_close(new(x), reference(x))
    assert is_fused(new, x)


def assert_as_model(reference, new, x):
    """Not by the fused operator, and what is attached tells on the result."""
    z = x @ reference.gemm.weight.t() + reference.gemm.bias
    assert torch.equal(new(x), reference(x)) and not is_fused(new, x)
    assert not torch.allclose(new(x), z + 2.0 * torch.sigmoid(z))


class Adapted(nn.Linear):
    """A layer whose result is not its weight's alone, as LoRA's."""

    def forward(self, x):
        return super().forward(x) + 1.0


@pytest.mark.parametrize("how", ["subclass", "on the instance", "on nn.Linear", "nn.functional.linear"])
def test_another_linear_is_called(how, alike, monkeypatch):
    *models, x = alike
    linear, forward = nn.functional.linear, nn.Linear.forward
    if how == "on nn.Linear":
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) + 1.0)
    elif how == "nn.functional.linear":
        monkeypatch.setattr(nn.functional, "linear", lambda *arguments: linear(*arguments) + 1.0)
    for model in models:
        if how == "subclass":
            plain, model.gemm = model.gemm, Adapted(6, 5).to(x.device)
            model.gemm.load_state_dict(plain.state_dict())
        elif how == "on the instance":
            model.gemm.forward = lambda x, gemm=model.gemm: forward(gemm, x) + 1.0
    torch.testing.assert_close(models[1](x), models[0](x))
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", linear)
        z = linear(x, models[1].gemm.weight, models[1].gemm.bias) + 1.0
    torch.testing.assert_close(models[1](x), z + 2.0 * torch.sigmoid(z))
    assert not is_fused(models[1], x)


GLOBAL_HOOKS = {
    "forward hook": lambda: register_module_forward_hook(
        lambda module, args, out: out + 1 if isinstance(module, nn.Linear) else None
    ),
    "forward pre-hook": lambda: register_module_forward_pre_hook(
        lambda module, args: (args[0] + 1,) if isinstance(module, nn.Linear) else None
    ),
}


@pytest.mark.parametrize("hook", GLOBAL_HOOKS)
def test_global_hooks_are_called(hook, alike):
    handle = GLOBAL_HOOKS[hook]()
    try:
        assert_as_model(*alike)
    finally:
        handle.remove()
    assert_fused(*alike)


@pytest.mark.parametrize("hook", [register_module_full_backward_hook, register_module_full_backward_pre_hook])
def test_global_backward_hooks_are_called(hook, alike):
    _, new, x = alike
    seen = []
    handle = hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        new(x.requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert sorted(seen) == ["Linear", "ModelNew"]


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is nn.functional.linear else out


def test_a_function_mode_sees_the_linear(alike):
    with Doubling():
        assert_as_model(*alike)


def test_a_default_device_changes_nothing(alike):
    with torch.device(alike[2].device):
        assert_fused(*alike)


def test_a_process_group_changes_nothing(alike):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert_fused(*alike)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["None", "bias=False"])
def test_without_a_bias(how, alike):
    reference, new, x = alike
    weight = reference.gemm.weight
    for model in (reference, new):
        if how == "None":
            model.gemm.bias = None
        else:
            model.gemm = nn.Linear(6, 5, bias=False).to(x.device)
            model.gemm.load_state_dict({"weight": weight})
    assert_fused(reference, new, x)
    gradients = (torch.autograd.grad(model(x).square().sum(), model.gemm.weight) for model in (new, reference))
    torch.testing.assert_close(*gradients)


class Halved(torch.Tensor):
    """A weight whose linear is not that of its numbers, as a quantized one's."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 0.5 * out if function is nn.functional.linear else out


@pytest.mark.parametrize("which", ["weight", "bias", "x"])
def test_a_tensor_subclass_is_asked(which, alike):
    reference, new, x = alike
    if which == "x":
        x = x.as_subclass(Halved)
    else:
        for model in (reference, new):
            setattr(model.gemm, which, nn.Parameter(getattr(model.gemm, which).detach().as_subclass(Halved)))
    expected, out = reference(x), new(x)
    z = 0.5 * nn.functional.linear(*(t.as_subclass(torch.Tensor) for t in (x, new.gemm.weight, new.gemm.bias)))
    torch.testing.assert_close(out.as_subclass(torch.Tensor), z + 2.0 * torch.sigmoid(z))
    assert type(out) is type(expected)


def test_a_jagged_nested_tensor(alike):
    reference, new, _ = alike
    device = new.gemm.weight.device
    x = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged, device=device)
    out, expected = new(x), reference(x)
    assert out.is_nested and torch.equal(out.values(), expected.values())


@needs_cuda
def test_a_semi_structured_sparse_weight(model_pair):
    reference, new = model_pair(128, 128, device="cuda", dtype=torch.float16)
    weight = reference.gemm.weight.detach().clone()
    weight.view(-1, 4)[:, :2] = 0
    for model in (reference, new):
        model.gemm.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    assert torch.equal(new(x), reference(x))


SCALES = {
    "int": 2,
    "numpy.float64": np.float64(2),
    "numpy.float32": np.float32(2),
    "numpy.int64": np.int64(2),
    "0-d tensor": torch.tensor(2.0),
    "0-d float64 tensor": torch.tensor(2.0, dtype=torch.float64),
    "parameter": nn.Parameter(torch.tensor(2.0)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_of_any_kind(scale, compiled, alike):
    *models, x = alike
    torch._dynamo.reset()
    outs = []
    for model in models:
        model.scaling_factor = SCALES[scale]
        if scale == "parameter":
            model.scaling_factor = nn.Parameter(SCALES[scale].detach().to(x.device))
        function = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        out = function(x)
        outs.append([out, *torch.autograd.grad(out.sum(), list(model.parameters()))])
    torch.testing.assert_close(*outs)


def test_script(alike):
    """Compiles `Model` on the same parameters."""
    reference, new, x = alike
    scripted = torch.jit.script(new)
    torch.testing.assert_close(scripted(x), reference(x))
    assert dict(scripted.named_parameters()).keys() == dict(new.named_parameters()).keys() and type(new) is ModelNew


def test_symbolic_trace_shows_models_parts(alike):
    _, new, x = alike
    traced = torch.fx.symbolic_trace(new)
    assert {"gemm", "sigmoid", "mul", "add"} < {node.name for node in traced.graph.nodes}
    torch.testing.assert_close(traced(x), new(x))
