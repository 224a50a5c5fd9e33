"""The operator as the dispatcher, torch.compile and autocast see it; and shapes of every kind."""

import concurrent.futures
import contextlib
import gc
import pathlib

import pytest
import torch
from conftest import Operators, needs_cuda
from layers import TEXT, each_layer, each_layer_with_kernels
from reference import DTYPES, SIXTEEN_BIT, Expected, eager, random_arguments
from torch._dynamo.compiled_autograd import _enable
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import model_new
from model_new import ModelNew, linear_sigmoid_residual

pytestmark = pytest.mark.usefixtures("float32_sums")


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# dispatcher


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (5,), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each_layer
def test_opcheck(shape, dtype, layer):
    *tensors, scale = random_arguments(shape, 4, dtype, layer.device)
    operators = layer.operators
    opcheck(operators.forward.default, (*tensors, scale))
    opcheck(operators.forward.default, (*tensors[:2], None, scale))
    opcheck(operators.forward.default, (*(t.clone().requires_grad_() for t in tensors), scale))
    if layer.has_kernels:  # what the backward is made of has no other implementation
        z = operators.forward_with_z(*tensors, scale)[1]
        opcheck(operators.forward_with_z.default, (*tensors, scale))
        opcheck(operators.backward_z.default, (torch.randn_like(z), z, scale))


@each_layer_with_kernels
def test_opcheck_of_matmul(layer):
    a, b = torch.randn(7, 5, device=layer.device), torch.randn(5, 9, device=layer.device)
    for arguments in ((a, b), (a.t().contiguous().t(), b), (a[:0], b)):
        opcheck(layer.operators.matmul.default, arguments)


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("requires_grad", [False, True])
@each_layer_with_kernels
def test_z_is_made_only_for_a_backward(context, requires_grad, layer):
    """A mode sees which operators run; and nothing is recorded that is not wanted."""
    _, new = layer.pair(40, 24)
    new.requires_grad_(requires_grad)
    with Operators() as seen:
        with context():
            out = new(torch.randn(6, 40, device=layer.device))
        if out.requires_grad:
            out.sum().backward()
    assert out.requires_grad == (requires_grad and context is contextlib.nullcontext)
    assert out.is_inference() == (context is torch.inference_mode)
    assert seen.names == (["forward_with_z", "backward_z", "matmul"] if out.requires_grad else ["forward"])


@each_layer
def test_flops_are_counted_forwards_and_backwards(layer):
    """2·M·N·K for each of the three products; M are all of x's dimensions before K."""
    *tensors, scale = random_arguments((2, 3, 40), 24, torch.float32, layer.device)
    for products in (1, 3):
        with FlopCounterMode(display=False) as counter:
            out = layer.function(*tensors, scale)
            if products == 3:
                out.sum().backward()
        assert counter.get_total_flops() == products * 2 * 6 * 40 * 24
        tensors = [t.requires_grad_() for t in tensors]


# torch.compile


@pytest.mark.parametrize("rows_are", ["static", "dynamic", "unbacked"])
@each_layer
def test_compiles_to_one_graph(rows_are, layer, fresh_compiler):
    backend = CompileCounterWithBackend("aot_eager")
    _, model = layer.pair(40, 24)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=rows_are == "dynamic")
    graphs = []
    for rows in (3, 8, 17):
        x = torch.randn(rows, 40, device=layer.device)
        gradients = []
        for function in (model, compiled):
            leaf = x.clone().requires_grad_()
            if rows_are == "unbacked":
                mark_unbacked(leaf, 0)
                mark_unbacked(x, 0)
            out = function(leaf)
            gradients.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])])
        assert all(map(torch.equal, *gradients))
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
        graphs.append(backend.frame_count)
    if rows_are != "static":
        assert len(set(graphs)) == 1  # the first batch size's graphs serve the others


@pytest.mark.parametrize("recorded", ["eagerly", "compiled"])
@each_layer
def test_compiled_autograd_without_a_break(recorded, layer, fresh_compiler):
    reference, new = layer.pair(40, 24)
    x = torch.randn(6, 40, device=layer.device)
    forward = torch.compile(new, backend="aot_eager", fullgraph=True) if recorded == "compiled" else new
    with _enable(torch.compile(backend="aot_eager", fullgraph=True)):
        forward(x).square().sum().backward()
    reference(x).square().sum().backward()
    for a, b in zip(new.parameters(), reference.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@needs_cuda
def test_inductor_keeps_the_operator_whole(fresh_compiler):
    """Inductor compiles what surrounds it, and the values stay those of the operator. On the CPU it would compile only
    what PyTorch has, in twenty seconds.
    """
    model = ModelNew(40, 24, 2.0).cuda()

    def network(x):
        return torch.relu(model(x * 2)) + 1

    x = torch.randn(6, 40, device="cuda", requires_grad=True)
    expected = network(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    out = torch.compile(network, fullgraph=True)(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], expected_gradient)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@each_layer
def test_autocast(dtype, layer):
    """It is the 16-bit layer, gives float32 parameters float32 gradients, and leaves float64 alone."""
    reference, new = layer.pair(40, 24)
    x = torch.randn(6, 40, device=layer.device)
    gradients = []
    for model in (reference, new):
        with torch.autocast(layer.device, dtype):
            out = model(x)
        assert out.dtype == dtype
        gradients.append(torch.autograd.grad(out.float().square().sum(), list(model.parameters())))
    for a, b in zip(*gradients):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=0.02, atol=8 * torch.finfo(dtype).eps * a.abs().max().item())
    assert torch.equal(out, new.to(dtype)(x.to(dtype)))
    expected = new.double()(x.double())
    with torch.autocast(layer.device, dtype):
        assert torch.equal(new(x.double()), expected)


# shapes


@needs_cuda
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 31, 33, 127, 129, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_about_the_vector_width(n, dtype):
    """Heads, tails and column strips of the epilogue kernels, forward and backward."""
    x, weight, bias, scale = random_arguments((9, 4), n, dtype, "cuda")
    out = linear_sigmoid_residual(x, weight, bias.requires_grad_(), scale)
    expected = Expected(x, weight, bias, scale)
    expected.check(out)
    grad = torch.randn_like(out)
    expected.check_gradients(grad, (None, None, *torch.autograd.grad(out, bias, grad)))


@pytest.mark.parametrize(
    "shape, n", [((0, 5), 3), ((2, 0, 5), 3), ((0, 0, 5), 3), ((4, 0), 3), ((0,), 3), ((4, 5), 0), ((0, 0), 0)], ids=str
)
@each_layer
def test_empty_shapes_are_eagers(shape, n, layer):
    *tensors, scale = random_arguments(shape, n, torch.float32, layer.device)
    leaves = [t.requires_grad_() for t in tensors]
    results = []
    for function in (layer.function, eager):
        out = function(*leaves, scale)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    torch.testing.assert_close(*results)


# each execution of the text runs its own code

OTHER = TEXT.replace("return torch.sigmoid(z) * scale + z", "return torch.sigmoid(z) * scale + z + 1")


def executed(text):
    context = {"__name__": "executed"}
    exec(compile(text, "<string>", "exec"), context)
    return context


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, kernels.cu and not this text computes")
def test_a_changed_text_runs_its_own_code(monkeypatch):
    """And goes on doing so after the globals of another have been cleared, as harnesses do between candidates."""
    monkeypatch.chdir(pathlib.Path(model_new.__file__).parent)
    assert OTHER != TEXT
    arguments = random_arguments((6, 5), 4, torch.float32, "cpu")
    expected = linear_sigmoid_residual(*arguments)
    first, other = executed(TEXT), executed(OTHER)
    assert torch.equal(other["linear_sigmoid_residual"](*arguments), expected + 1)
    assert torch.equal(first["linear_sigmoid_residual"](*arguments), expected)
    first.clear()
    gc.collect()
    again = executed(OTHER)
    for context in (other, again):
        assert torch.equal(context["linear_sigmoid_residual"](*arguments), expected + 1)
    assert torch.equal(linear_sigmoid_residual(*arguments), expected)


@needs_cuda
def test_changed_device_code_runs_beside_the_first(monkeypatch):
    """kernels.cu is compiled once more, with an activation that is not z where s = 0: the products have none."""
    monkeypatch.chdir(pathlib.Path(model_new.__file__).parent)
    kernels = pathlib.Path("kernels.cu").read_text(encoding="utf-8")
    other_kernels = kernels.replace("return z + s * sigmoid<kFast>(z);", "return z + s * sigmoid<kFast>(z) + 1;")
    assert other_kernels != kernels
    other = executed(TEXT.replace("KERNELS_SOURCE = None", f"KERNELS_SOURCE = {other_kernels!r}", 1))
    for shape, n in (((6, 40), 24), ((512, 1024), 512)):  # by the library and, on Hopper, by the fused kernel
        *tensors, scale = random_arguments(shape, n, torch.float32, "cuda")
        leaves = [t.requires_grad_() for t in tensors]
        expected, result = (f(*leaves, scale) for f in (linear_sigmoid_residual, other["linear_sigmoid_residual"]))
        torch.testing.assert_close(result, expected + 1)
        grad = torch.randn_like(expected)
        gradients = [torch.autograd.grad(out, leaves, grad) for out in (expected, result)]
        assert all(map(torch.equal, *gradients))


def test_texts_executed_by_several_threads_at_once(monkeypatch):
    monkeypatch.chdir(pathlib.Path(model_new.__file__).parent)
    arguments = random_arguments((6, 5), 4, torch.float32, "cpu")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        contexts = list(pool.map(executed, [TEXT] * 16))
    assert len({context["_namespace"] for context in contexts}) == 16
    for context in contexts:
        assert torch.equal(context["linear_sigmoid_residual"](*arguments), linear_sigmoid_residual(*arguments))
