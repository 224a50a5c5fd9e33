"""First and second derivatives, and how autograd, forward-mode and torch.func see the operator."""

import itertools

import pytest
import torch
from conftest import needs_cuda
from layers import each_layer, each_layer_with_kernels
from reference import DTYPES, Expected, eager, poison, random_arguments
from torch.autograd import forward_ad

from model_new import linear_sigmoid_residual, select_tile

pytestmark = pytest.mark.usefixtures("float32_sums")


def leaves(arguments, which=(True, True, True)):
    *tensors, scale = arguments
    return *(t.clone().requires_grad_(wanted) for t, wanted in zip(tensors, which)), scale


def small_leaves(layer, which=(True, True, True)):
    return leaves(random_arguments((24, 40), 56, torch.float32, layer.device), which)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
@pytest.mark.parametrize("scale", [2.0, -0.7])
@each_layer
def test_first_and_second_derivatives_against_finite_differences(shape, scale, layer):
    arguments = leaves(random_arguments(shape, 3, torch.float64, layer.device, scale))
    assert torch.autograd.gradcheck(layer.function, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer.function, arguments)


@each_layer_with_kernels
def test_second_derivatives_of_a_layer_that_a_kernel_serves(layer):
    """The kernel's own products cannot be differentiated, and so do not serve a gradient that must be."""
    x = torch.randn(4, 2048, device=layer.device, requires_grad=True)
    assert select_tile("float32", 4, 2048, 1024)  # of dz and W
    second = []
    for model in layer.pair(2048, 1024):
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), (x, *model.parameters())))
    for eagers, ours in zip(*second):
        torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-4 * eagers.abs().max().item())


@each_layer
def test_a_batch_of_gradients_at_once(layer):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them: tensors that have no memory of their own."""
    *tensors, scale = small_leaves(layer)
    grads = torch.randn(7, 24, 56, device=layer.device)
    ours, eagers = (
        torch.autograd.grad(function(*tensors, scale), tensors, grads, is_grads_batched=True)
        for function in (layer.function, eager)
    )
    torch.testing.assert_close(ours, eagers)


@each_layer
def test_a_gradient_with_a_tangent(layer):
    """Forward mode through the backward alone: the gradient that comes in is a dual number."""
    *tensors, scale = small_leaves(layer)
    grad, tangent = torch.randn(2, 24, 56, device=layer.device)
    tangents = []
    for function in (layer.function, eager):
        out = function(*tensors, scale)
        with forward_ad.dual_level():
            gradients = torch.autograd.grad(out, tensors, forward_ad.make_dual(grad, tangent))
            tangents.append([forward_ad.unpack_dual(gradient).tangent for gradient in gradients])
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, n", [((1, 1), 1), ((3, 5), 7), ((64, 128), 96), ((257, 130), 67), ((3, 4, 24), 32)])
def test_gradients_are_the_layers(shape, n, dtype, device):
    """Within the rounding errors of their own GEMMs and sums; see reference.Expected.gradients."""
    arguments = leaves(random_arguments(shape, n, dtype, device))
    out = linear_sigmoid_residual(*arguments)
    grad = torch.randn_like(out)
    poison(out.numel() * out.element_size(), device)
    gradients = torch.autograd.grad(out, arguments[:3], grad)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in arguments[:3]]
    Expected(*arguments).check_gradients(grad, gradients)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_bias_gradient_is_summed_in_float32(dtype):
    """Of dz before its own rounding, and rounded once: all but a few columns, where float32 itself is undecided."""
    z, grad = torch.randn(2, 3, 1000, dtype=torch.float64).to(dtype).cuda()
    p = torch.sigmoid(z.float())
    dz = grad.float() * (1 + 2 * p * (1 - p))
    result, bias_gradient = torch.ops.linear_sigmoid_residual.backward_z(grad, z, 2.0)
    assert (result == dz.to(dtype)).float().mean() > 0.98
    assert (bias_gradient == dz.sum(0).to(dtype)).float().mean() > 0.98
    assert (bias_gradient == dz.to(dtype).sum(0)).float().mean() < 0.9  # columns do tell the two apart


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_deterministic(dtype):
    arguments = leaves(random_arguments((1000, 136), 264, dtype, "cuda"))
    grad = torch.randn(1000, 264, device="cuda").to(dtype)
    first, *others = (torch.autograd.grad(linear_sigmoid_residual(*arguments), arguments[:3], grad) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
@each_layer_with_kernels
def test_backward_z_of_any_layout(layout, layer):
    """z, and a gradient, which out.sum() gives with strides of 0, need not be contiguous."""
    change = {
        "transposed": lambda t: t.t(),
        "expanded": lambda t: t[:1].expand(24, 16),
        "sliced": lambda t: t[:, 3:13],
    }[layout]
    z, grad = (change(torch.randn(24, 16, dtype=torch.float64, device=layer.device)) for _ in range(2))
    results = layer.operators.backward_z(grad, z, 2.0)
    assert results[0].is_contiguous()
    torch.testing.assert_close(results, layer.operators.backward_z(grad.contiguous(), z.contiguous(), 2.0))


# what is saved


def saved_bytes(function):
    """Of the storages that a call keeps for its backward; and its result."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    return sum(storages.values()), out


@pytest.mark.parametrize("wanted", [some for some in itertools.product([False, True], repeat=3) if any(some)], ids=str)
@each_layer
def test_no_more_is_saved_than_by_eager(wanted, layer):
    """x only for W's gradient, W only for x's: a frozen one may change before the backward, as by an optimizer's step
    with this batch in flight.
    """
    arguments = small_leaves(layer, wanted)
    (ours, out), (eagers, expected) = (saved_bytes(lambda f=f: f(*arguments)) for f in (layer.function, eager))
    assert ours <= eagers
    with torch.no_grad():
        for t, factor in zip(arguments[:2], arguments[1::-1]):
            if not factor.requires_grad:
                t.add_(1)
    of = [t for t in arguments[:3] if t.requires_grad]
    for a, b in zip(*(torch.autograd.grad(t.sum(), of) for t in (out, expected))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("changed", ["x", "weight"])
@each_layer
def test_changing_an_argument_before_the_backward_raises_as_eager_does(changed, layer):
    x, weight, bias, scale = small_leaves(layer)
    out = layer.function(x, weight, bias, scale)
    with torch.no_grad():
        (x if changed == "x" else weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_layer
def test_changing_the_output_does_not_change_the_gradient(layer):
    """The backward is computed from z, not from out, which is the caller's to change."""
    arguments = small_leaves(layer)
    plain = torch.autograd.grad(layer.function(*arguments).sum(), arguments[:3])
    changed = torch.autograd.grad(layer.function(*arguments).mul_(1).add_(5).sum(), arguments[:3])
    assert all(map(torch.equal, plain, changed))


@pytest.mark.parametrize("retain", [False, True])
@each_layer_with_kernels
def test_a_second_backward(retain, layer):
    """It gives the same where the graph is kept, and else PyTorch's error. (The products then have z's memory, which
    test_training_takes_no_more_memory_than_eager sees on a GPU.)
    """
    arguments = small_leaves(layer)
    out = layer.function(*arguments).sum()
    first = torch.autograd.grad(out, arguments[:3], retain_graph=retain)
    if retain:
        assert all(map(torch.equal, first, torch.autograd.grad(out, arguments[:3])))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, arguments[:3])


@each_layer_with_kernels
def test_hooks_that_keep_what_is_saved_keep_it_unchanged(layer):
    arguments, kept = small_leaves(layer), []

    def pack(t):
        kept.append((t, t.clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer.function(*arguments)
    torch.autograd.grad(out.sum(), arguments[:3])
    assert len(kept) == 3 and all(torch.equal(t, before) for t, before in kept)


# transforms


TRANSFORMS = {
    "grad": lambda f, x, w, b: torch.func.grad(lambda w: f(x, w, b, 2.0).square().sum())(w),
    "jvp": lambda f, x, w, b: torch.func.jvp(lambda x: f(x, w, b, 2.0), (x,), (x,)),
    "jacrev": lambda f, x, w, b: torch.func.jacrev(lambda x: f(x, w, b, 2.0))(x[:2]),
    "hessian": lambda f, x, w, b: torch.func.hessian(lambda b: f(x, w, b, 2.0).sum())(b),
    "vmap": lambda f, x, w, b: torch.func.vmap(lambda x: f(x, w, b, 2.0))(x),
    "gradients of each sample": lambda f, x, w, b: torch.func.vmap(
        torch.func.grad(lambda w, x: f(x, w, b, 2.0).square().sum()), (None, 0)
    )(w, x),
    "grad of what comes behind": lambda f, x, w, b: torch.func.grad(lambda y: (f(x, w, b, 2.0) * y).sum())(b),
    "vmap of what comes behind": lambda f, x, w, b: torch.func.vmap(lambda y: f(x, w, b, 2.0) * y)(torch.stack([b, b])),
    "compiled grad": lambda f, x, w, b: torch.compile(
        torch.func.grad(lambda w: f(x, w, b, 2.0).square().sum()), backend="aot_eager", fullgraph=True
    )(w),
    "forward mode": lambda f, x, w, b: forward_mode(f, x, w, b),
}


def forward_mode(function, x, weight, bias):
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(x, torch.ones_like(x)), weight, bias, 2.0)
        return forward_ad.unpack_dual(out).tangent


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@each_layer
def test_transforms(transform, requires_grad, layer):
    """Of the layer's function, with parameters that are constants of the transform where they are not what it is of."""
    torch._dynamo.reset()
    x, weight, bias, _ = random_arguments((6, 40), 24, torch.float32, layer.device)
    weight.requires_grad_(requires_grad)
    torch.testing.assert_close(*(TRANSFORMS[transform](f, x, weight, bias) for f in (layer.function, eager)))
