"""ModelNew in place of Model: parameters, seeds, state, and the functions a harness calls."""

import inspect

import numpy as np
import pytest
import torch
from conftest import is_fused
from reference import model_pair
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


def test_same_seed_same_weights_and_same_random_state_afterwards():
    states = []
    for kind in (Model, ModelNew):
        torch.manual_seed(42)
        states.append((kind(7, 5, 2.0).state_dict(), torch.get_rng_state()))
    (reference, random_state), (new, new_random_state) = states
    assert list(reference) == list(new) == ["gemm.weight", "gemm.bias"]
    assert all(torch.equal(reference[name], new[name]) for name in reference)
    assert torch.equal(random_state, new_random_state)


def test_same_constructor_and_forward():
    for name in ("__init__", "forward"):
        assert inspect.signature(getattr(Model, name)) == inspect.signature(getattr(ModelNew, name))
    assert ModelNew(input_size=3, hidden_size=4, scaling_factor=5.0).scaling_factor == 5.0


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
def alike(device):
    """(Model, ModelNew with the same weights, x [3, 6])"""
    return *model_pair(6, 5, device=device), torch.randn(3, 6, device=device)


def assert_fused(reference, new, x):
    torch.testing.assert_close(new(x), reference(x))
    assert is_fused(new, x)


def out_and_gradients(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


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
    z = x @ models[1].gemm.weight.t() + models[1].gemm.bias + 1.0
    torch.testing.assert_close(models[1](x), z + 2.0 * torch.sigmoid(z))
    assert not is_fused(models[1], x)


def changes_the_output(module, args, out):
    return out + 1 if isinstance(module, nn.Linear) else None


def changes_the_input(module, args):
    return (args[0] + 1,) if isinstance(module, nn.Linear) else None


def changes_the_gradient(module, grads, *_):
    return (3 * grads[0],) if isinstance(module, nn.Linear) else None


HOOKS = {  # of gemm, and of every module
    "forward": (nn.Module.register_forward_hook, register_module_forward_hook, changes_the_output),
    "forward pre": (nn.Module.register_forward_pre_hook, register_module_forward_pre_hook, changes_the_input),
    "backward": (nn.Module.register_full_backward_hook, register_module_full_backward_hook, changes_the_gradient),
    "backward pre": (
        nn.Module.register_full_backward_pre_hook,
        register_module_full_backward_pre_hook,
        changes_the_gradient,
    ),
}


@pytest.mark.parametrize("whose", ["gemm's", "global"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called(kind, whose, alike):
    *models, x = alike
    of_gemm, of_every_module, hook = HOOKS[kind]
    plain = out_and_gradients(models[1], x)
    handles = [of_gemm(model.gemm, hook) for model in models] if whose == "gemm's" else [of_every_module(hook)]
    try:
        expected, hooked = (out_and_gradients(model, x) for model in models)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(hooked, expected)
    assert not all(map(torch.equal, hooked, plain))  # the hook can be told
    assert_fused(*alike)


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is nn.functional.linear else out


def test_a_function_mode_sees_the_linear(alike):
    reference, new, x = alike
    with Doubling():
        assert torch.equal(new(x), reference(x)) and not is_fused(new, x)
    assert_fused(*alike)


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
    *models, x = alike
    for model in models:
        if how == "None":
            model.gemm.bias = None
        else:
            weight, model.gemm = model.gemm.weight, nn.Linear(6, 5, bias=False)
            model.gemm.weight = weight
    torch.testing.assert_close(*(out_and_gradients(model, x) for model in models))
    assert_fused(*alike)


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
    reference, new, x = alike
    x = torch.nested.nested_tensor([x[:2], x], layout=torch.jagged)
    out, expected = new(x), reference(x)
    assert out.is_nested and torch.equal(out.values(), expected.values())


SCALES = [2, np.float64(2), np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)]
SCALES += [nn.Parameter(torch.tensor(2.0))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: type(scale).__name__)
def test_a_scale_of_any_kind(scale, compiled, alike):
    """A parameter, too, which gets a gradient."""
    *models, x = alike
    torch._dynamo.reset()
    results = []
    for model in models:
        model.scaling_factor = nn.Parameter(scale.detach().to(x.device)) if isinstance(scale, nn.Parameter) else scale
        out = (torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model)(x)
        results.append([out, *torch.autograd.grad(out.sum(), list(model.parameters()))])
    torch.testing.assert_close(*results)


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
