"""ModelNew in place of Model: parameters, seeds, state, and the functions a harness calls."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

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


def test_copies_are_independent(device):
    model = ModelNew(5, 4, 2.0).to(device)
    x = torch.randn(3, 5, device=device)
    before = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), before)
        with torch.no_grad():
            other.gemm.weight.add_(1)
        assert not torch.equal(other(x), before)
        assert torch.equal(model(x), before)


def test_every_change_of_the_weights_is_seen(device):
    """Nothing about the weights is kept from call to call, not even when a change goes past autograd's counters."""
    model = ModelNew(40, 24, 2.0).to(device)
    x = torch.randn(6, 40, device=device)

    def check(what):
        z = torch.nn.functional.linear(x, model.gemm.weight, model.gemm.bias)
        torch.testing.assert_close(model(x), z + model.scaling_factor * torch.sigmoid(z), msg=lambda m: f"{what}: {m}")

    check("as made")
    model.gemm.weight.data.mul_(-3)
    check("weight.data")
    model.gemm.bias.data.copy_(torch.randn(24))
    check("bias.data")
    model.load_state_dict(ModelNew(40, 24, 2.0).state_dict())
    check("load_state_dict")
    model.gemm.weight = torch.nn.Parameter(torch.randn(24, 40, device=device))
    check("another parameter")
    model.scaling_factor = -1.0
    check("scaling_factor")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    check("optimizer")
    other = ModelNew(40, 24, 2.0).to(device)
    other.gemm.weight = model.gemm.weight
    other.gemm.weight.data.add_(1)
    check("through another module")


def test_trains_as_model_does(model_pair, device):
    losses = []
    for model in model_pair(20, 10, device=device, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        for _ in range(20):
            x = torch.randn(16, 20, generator=generator, dtype=torch.float64).to(device)
            loss = (model(x) - x[:, :10]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)


def test_inputs_are_the_reference_problems():
    (x,) = model_new.get_inputs()
    assert x.shape == (1024, 8192) and x.dtype == torch.float32
    assert x.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert x.min() >= 0 and x.max() < 1 and x.std() > 0.28
    assert model_new.get_init_inputs() == [8192, 8192, 2.0]


def test_repr_names_the_scale():
    assert "scaling_factor=2.5" in repr(ModelNew(3, 4, 2.5))


class Adapted(nn.Linear):
    """A layer whose result is not its weight's alone, as LoRA's."""

    def forward(self, x):
        return super().forward(x) + 1.0


@pytest.mark.parametrize("how", ["subclass", "on the instance"])
def test_a_gemm_with_a_forward_of_its_own_is_called(how, device):
    model = ModelNew(6, 5, 2.0).to(device)
    x = torch.randn(3, 6, device=device)
    z = nn.functional.linear(x, model.gemm.weight, model.gemm.bias) + 1.0
    if how == "subclass":
        adapted = Adapted(6, 5).to(device)
        adapted.load_state_dict(model.gemm.state_dict())
        model.gemm = adapted
    else:
        plain = model.gemm.forward
        model.gemm.forward = lambda x: plain(x) + 1.0
    torch.testing.assert_close(model(x), z + 2.0 * torch.sigmoid(z))


def test_symbolic_trace_keeps_the_operator(device):
    model, x = ModelNew(6, 5, 2.0).to(device), torch.randn(3, 6, device=device)
    traced = torch.fx.symbolic_trace(model)
    assert any("linear_sigmoid_residual" in str(node.target) for node in traced.graph.nodes)
    assert torch.equal(traced(x), model(x))
