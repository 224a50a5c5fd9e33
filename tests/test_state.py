"""Nothing is cached: whatever is done to a module or around a call, ModelNew gives what Model gives after the same."""

import copy
import pickle

import pytest
import torch
from reference import model_pair
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from model_new import select_tile

SHAPES = {"small": (6, 40, 24), "large": (128, 512, 1024)}  # M, K, N; on Hopper the second is a fused kernel's


@pytest.fixture(params=SHAPES)
def setting(request, device):
    """(Model, ModelNew with the same weights, an x)"""
    m, k, n = SHAPES[request.param]
    assert request.param == "small" or select_tile("float32", m, n, k)
    return *model_pair(k, n, device=device), torch.randn(m, k, device=device)


def assert_close(new, reference, dtype=None):
    """To a few roundings of the largest element; eager rounds more often in 16 bits."""
    for a, b in zip(new, reference, strict=True):
        of = dtype or b.dtype
        tolerance = (8 if of.itemsize == 2 else 64) * torch.finfo(of).eps * b.abs().max().item()
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad and a.is_inference() == b.is_inference()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def gradients(function, x, parameters):
    """[out, dx, the gradients of those parameters that want one]"""
    x = x.clone().requires_grad_()
    out = function(x)
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, *(p for p in parameters if p.requires_grad)])]


def assert_same(reference, new, x):
    """The same parameters, and close outputs and gradients, with and without gradient."""
    for a, b in zip(reference.parameters(), new.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    with torch.no_grad():
        assert_close([new(x)], [reference(x)])
    assert_close([new(x)], [reference(x)])
    assert_close(*(gradients(model, x, model.parameters()) for model in (new, reference)))


# edits of the module: each is done to both, from the same random numbers


def optimize(optimizer, **options):
    """Three steps along random gradients, not the module's own, so that both modules end with the same bits."""

    def edit(model):
        steps = optimizer(model.parameters(), lr=0.1, **options)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape).to(p)
            steps.step()
            steps.zero_grad()

    return edit


def another_weight(model):
    return torch.randn(model.gemm.weight.shape).to(model.gemm.weight)


def another_state(model):
    return {name: torch.randn(t.shape).to(t) for name, t in model.state_dict().items()}


def plain_tensors(model):
    """As a network that computes another's weights has them, and nn.DataParallel's replicas."""
    weight, bias = (2 * t.detach() for t in (model.gemm.weight, model.gemm.bias))
    del model.gemm.weight, model.gemm.bias
    model.gemm.weight, model.gemm.bias = weight, bias


EDITS = {
    "weight.data +=": lambda m: m.gemm.weight.data.add_(0.5),
    "weight.data =": lambda m: setattr(m.gemm.weight, "data", another_weight(m)),
    "bytes": lambda m: m.gemm.weight.untyped_storage().copy_(another_weight(m).untyped_storage()),
    "swap_tensors": lambda m: torch.utils.swap_tensors(m.gemm.weight, nn.Parameter(another_weight(m))),
    "another parameter": lambda m: setattr(m.gemm, "weight", nn.Parameter(another_weight(m))),
    "bias": lambda m: nn.init.normal_(m.gemm.bias),
    "scale": lambda m: setattr(m, "scaling_factor", -1.0),
    "Adam": optimize(torch.optim.Adam),
    "fused AdamW": optimize(torch.optim.AdamW, fused=True),
    "load_state_dict": lambda m: m.load_state_dict(another_state(m), strict=True),
    "load_state_dict, assign": lambda m: m.load_state_dict(another_state(m), assign=True),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16 and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "plain tensors": plain_tensors,
}


def edit_both(edit, reference, new):
    for model in (reference, new):
        torch.manual_seed(1)
        edit(model)


@pytest.mark.parametrize("edit", EDITS)
def test_after_an_edit(edit, setting):
    reference, new, x = setting
    before = gradients(new, x, new.parameters())[0]
    edit_both(EDITS[edit], reference, new)
    x = x.to(new.gemm.weight.dtype)
    assert not torch.equal(new(x).double(), before.double())  # the edit can be told
    assert_same(reference, new, x)


def test_after_an_edit_that_a_hook_of_gemm_carries_out(setting):
    """Pruning remakes `weight` before each call, from another parameter."""
    reference, new, x = setting
    for model in (reference, new):
        torch.manual_seed(1)
        prune.random_unstructured(model.gemm, "weight", 0.5)
        model.gemm.weight_orig.data.mul_(3)
    with torch.no_grad():
        assert_close([new(x)], [reference(x)])


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_used_module_changes_alone(how, setting):
    reference, new, x = setting
    before = new(x)
    before.sum().backward()
    other = COPIES[how](new)
    assert_same(reference, other, x)
    edit_both(EDITS["Adam"], reference, other)
    assert_same(reference, other, x)
    assert torch.equal(new(x), before)


# around a call

CONTEXTS = {
    "inference_mode": lambda device: torch.inference_mode(),
    "no_grad": lambda device: torch.no_grad(),
    "enable_grad": lambda device: torch.enable_grad(),
    "autocast": lambda device: torch.autocast(device, torch.bfloat16),
    "autocast switched off": lambda device: torch.autocast(device, torch.bfloat16, enabled=False),
    "saved tensors on the CPU": lambda device: torch.autograd.graph.save_on_cpu(),
}


@pytest.mark.parametrize("outer", ["no_grad", "enable_grad"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_under_a_context(context, outer, setting, device):
    """Inside another that sets the opposite, or the same; and nothing of it stays."""
    *models, x = setting
    before = gradients(models[1], x, models[1].parameters())
    results = []
    for model in models:
        with CONTEXTS[outer](device), CONTEXTS[context](device):
            out = model(x)
        wanted = out.requires_grad
        results.append([out, *(torch.autograd.grad(out.float().sum(), model.parameters()) if wanted else ())])
    assert_close(*reversed(results), dtype=results[0][0].dtype)
    for a, b in zip(gradients(models[1], x, models[1].parameters()), before):
        assert torch.equal(a, b)


def hooked(model, x):
    """Hooks of the module itself change what goes in, what comes out, and the gradient."""
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, out: out + args[0].sum())
    model.register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))
    return model(x)


NETWORKS = {
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "hooks": hooked,
    "functional_call": lambda model, x: torch.func.functional_call(
        model, {name: p.sin() for name, p in model.named_parameters()}, (x,)
    ),
    "its weight in the next layer too": lambda model, x: model(x) @ model.gemm.weight,
    "replicas": lambda model, x: nn.DataParallel(model, [0, 1])(x),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_in_a_network(network, setting, device):
    if network == "replicas" and (device == "cpu" or torch.cuda.device_count() < 2):
        pytest.skip("needs two CUDA devices")
    *models, x = setting
    function = NETWORKS[network]
    reference, new = (gradients(lambda x, m=model: function(m, x), x, model.parameters()) for model in models)
    assert_close(new, reference)


def test_exported_program(setting):
    """For any number of rows; its own weights may be changed afterwards."""
    reference, new, x = setting
    exported = torch.export.export(new, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=4096)},))
    module, longer = exported.module(), torch.cat([x, x[:3]])
    assert_close([module(x), module(longer)], [reference(x), reference(longer)])
    for model in (module, reference):
        model.gemm.weight.data.mul_(-2)
    assert_close([module(x), module(longer)], [reference(x), reference(longer)])
