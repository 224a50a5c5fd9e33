"""First and second derivatives, and how autograd, forward-mode and torch.func see the operator."""

import contextlib
import itertools

import pytest
import torch
from conftest import Operators, needs_cuda
from reference import DTYPES, Expected, eager, poison, random_arguments
from torch.autograd import forward_ad

from model_new import linear_sigmoid_residual

pytestmark = pytest.mark.usefixtures("float32_sums")


def leaves(arguments, which=(True, True, True)):
    *tensors, scale = arguments
    return *(t.clone().requires_grad_(wanted) for t, wanted in zip(tensors, which)), scale


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
@pytest.mark.parametrize("scale", [2.0, -0.7])
def test_first_and_second_derivatives_against_finite_differences(shape, scale, device):
    arguments = leaves(random_arguments(shape, 3, torch.float64, device, scale))
    assert torch.autograd.gradcheck(linear_sigmoid_residual, arguments)
    assert torch.autograd.gradgradcheck(linear_sigmoid_residual, arguments)


def test_a_batch_of_gradients_at_once(device):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them: tensors that have no memory of their own."""
    arguments = leaves(random_arguments((4, 5), 3, torch.float32, device))
    out = linear_sigmoid_residual(*arguments)
    grads = torch.randn(7, *out.shape, device=device)
    at_once = torch.autograd.grad(out, arguments[:3], grads, retain_graph=True, is_grads_batched=True)
    singly = [torch.autograd.grad(out, arguments[:3], grad, retain_graph=True) for grad in grads]
    for batch, gradients in zip(at_once, zip(*singly)):
        torch.testing.assert_close(batch, torch.stack(gradients))


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


@pytest.mark.parametrize("which", [w for w in itertools.product([True, False], repeat=3) if any(w)])
def test_only_the_gradients_asked_for(which, device):
    arguments = random_arguments((6, 5), 4, torch.float32, device)
    everything = leaves(arguments)
    linear_sigmoid_residual(*everything).square().sum().backward()
    some = leaves(arguments, which)
    linear_sigmoid_residual(*some).square().sum().backward()
    for wanted, tensor, reference in zip(which, some[:3], everything[:3]):
        if wanted:
            assert torch.equal(tensor.grad, reference.grad)
        else:
            assert tensor.grad is None


@needs_cuda
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_z_is_made_only_for_a_backward(context, wanted):
    """Which runs the fused operator once. (On the CPU: test_host.py.)"""
    arguments = leaves(random_arguments((6, 5), 4, torch.float32, "cuda"), [wanted] * 3)
    with Operators() as operators:
        with context():
            out = linear_sigmoid_residual(*arguments)
        if out.requires_grad:
            out.sum().backward()
    assert out.requires_grad == (wanted and context is contextlib.nullcontext)
    assert operators.names[:2] == (["forward_with_z", "backward_z"] if out.requires_grad else ["forward"])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient_nothing_is_recorded(context, device):
    with context():
        out = linear_sigmoid_residual(*leaves(random_arguments((6, 5), 4, torch.float32, device)))
    assert not out.requires_grad and out.is_inference() == (context is torch.inference_mode)
    assert linear_sigmoid_residual(*random_arguments((6, 5), 4, torch.float32, device)).grad_fn is None


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_changing_an_argument_before_the_backward_raises_as_eager_does(changed, device):
    x, weight, bias, scale = leaves(random_arguments((6, 5), 4, torch.float32, device))
    out = linear_sigmoid_residual(x, weight, bias, scale)
    with torch.no_grad():
        (x if changed == "x" else weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_changing_the_output_does_not_change_the_gradient(device):
    """The backward is computed from z, not from out, which is the caller's to change."""
    arguments = leaves(random_arguments((6, 5), 4, torch.float32, device))
    plain = torch.autograd.grad(linear_sigmoid_residual(*arguments).sum(), arguments[:3])
    changed = torch.autograd.grad(linear_sigmoid_residual(*arguments).mul_(1).add_(5).sum(), arguments[:3])
    for a, b in zip(plain, changed):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_a_gradient_of_any_layout(layout, device):
    """Expanded it comes from out.sum(), with strides of 0."""
    arguments = leaves(random_arguments((6, 5), 4, torch.float32, device))
    grad = torch.randn(4, 6, device=device).t() if layout == "transposed" else torch.ones((), device=device)
    grad, out = grad.expand(6, 4), linear_sigmoid_residual(*arguments)
    gradients = torch.autograd.grad(out, arguments[:3], grad, retain_graph=True)
    for a, b in zip(gradients, torch.autograd.grad(out, arguments[:3], grad.contiguous())):
        torch.testing.assert_close(a, b)


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


TRANSFORMS = {
    "grad": lambda f, x, w, b: torch.func.grad(lambda w: f(x, w, b, 2.0).square().sum())(w),
    "vjp": lambda f, x, w, b: torch.func.vjp(lambda w, b: f(x, w, b, 2.0), w, b)[1](x.new_ones(6, 24)),
    "jvp": lambda f, x, w, b: torch.func.jvp(lambda x: f(x, w, b, 2.0), (x,), (x,)),
    "jacrev": lambda f, x, w, b: torch.func.jacrev(lambda x: f(x, w, b, 2.0))(x[:2]),
    "jacfwd": lambda f, x, w, b: torch.func.jacfwd(lambda b: f(x, w, b, 2.0))(b),
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


def assert_transform_is_eagers(transform, function, requires_grad, device):
    """Of a layer function, with parameters that are constants of the transform where they are not what it is of."""
    torch._dynamo.reset()
    x, weight, bias, _ = random_arguments((6, 40), 24, torch.float32, device)
    weight.requires_grad_(requires_grad)
    torch.testing.assert_close(*(TRANSFORMS[transform](f, x, weight, bias) for f in (function, eager)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, requires_grad, device):
    assert_transform_is_eagers(transform, linear_sigmoid_residual, requires_grad, device)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_deterministic(dtype):
    arguments = leaves(random_arguments((1000, 136), 264, dtype, "cuda"))
    grad = torch.randn(1000, 264, device="cuda").to(dtype)
    first, *others = (torch.autograd.grad(linear_sigmoid_residual(*arguments), arguments[:3], grad) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


@needs_cuda
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_backward_z_of_any_layout(layout):
    """The operator called directly on a z and a gradient that are not contiguous: contiguous, the same as on copies."""
    z, grad = (torch.randn(24, 16, dtype=torch.float64, device="cuda") for _ in range(2))
    change = {
        "transposed": lambda t: t.t(),
        "expanded": lambda t: t[:1].expand(24, 16),
        "sliced": lambda t: t[:, 3:13],
    }[layout]
    z, grad = change(z), change(grad)
    dz, dbias = torch.ops.linear_sigmoid_residual.backward_z(grad, z, 2.0)
    copied = torch.ops.linear_sigmoid_residual.backward_z(grad.clone().contiguous(), z.clone().contiguous(), 2.0)
    assert dz.is_contiguous()
    torch.testing.assert_close((dz, dbias), copied)


def saved_bytes(function):
    """Of the storages that a call keeps for its backward; and its result."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    return sum(storages.values()), out


WANTED = [wanted for wanted in itertools.product([False, True], repeat=3) if any(wanted)]


def assert_saves_no_more_than_eager(function, wanted, device):
    """x only for W's gradient, W only for x's: a frozen one may change before the backward, as by an optimizer's step
    with this batch in flight.
    """
    arguments = leaves(random_arguments((24, 40), 56, torch.float32, device), wanted)
    (ours, out), (eagers, expected) = (saved_bytes(lambda f=f: f(*arguments)) for f in (function, eager))
    assert ours <= eagers
    with torch.no_grad():
        for t, factor in zip(arguments[:2], arguments[1::-1]):
            if not factor.requires_grad:
                t.add_(1)
    of = [t for t in arguments[:3] if t.requires_grad]
    for a, b in zip(*(torch.autograd.grad(t.sum(), of) for t in (out, expected))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_no_more_is_saved_than_by_eager(wanted, device):
    assert_saves_no_more_than_eager(linear_sigmoid_residual, wanted, device)
