"""The operator as the dispatcher, torch.compile and autocast see it; and shapes of every kind."""

import concurrent.futures
import gc
import pathlib

import pytest
import torch
from conftest import Operators, is_fused, needs_cuda
from reference import DTYPES, Expected, random_arguments
from torch import nn
from torch._dynamo.compiled_autograd import _enable
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import model_new
from model_new import ModelNew, linear_sigmoid_residual, select_kernel

pytestmark = pytest.mark.usefixtures("float32_sums")

operators = torch.ops.linear_sigmoid_residual


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# dispatcher


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (5,), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(shape, dtype, device):
    *tensors, scale = random_arguments(shape, 4, dtype, device)
    torch.library.opcheck(operators.forward.default, (*tensors, scale))
    torch.library.opcheck(operators.forward.default, (*tensors[:2], None, scale))
    torch.library.opcheck(operators.forward.default, (*(t.requires_grad_() for t in tensors), scale))
    if device == "cuda":  # what the backward is made of has no other implementation
        tensors = [t.detach() for t in tensors]
        z = operators.forward_with_z(*tensors, scale)[1]
        torch.library.opcheck(operators.forward_with_z.default, (*tensors, scale))
        torch.library.opcheck(operators.backward_z.default, (torch.randn_like(z), z, scale))


def test_meta_tensors_give_shape_and_dtype():
    out = ModelNew(5, 4, 2.0).to("meta", torch.float16)(torch.empty(2, 3, 5, device="meta", dtype=torch.float16))
    assert out.shape == (2, 3, 4) and out.dtype == torch.float16 and out.is_meta


def test_kernel_selected(device):
    x, weight, bias, _ = random_arguments((6, 5), 4, torch.float32, device)
    assert (select_kernel(x, weight, bias) == "cpu") == (device == "cpu")


# torch.compile


@pytest.mark.parametrize("rows_are", ["static", "dynamic", "unbacked"])
def test_compiles_to_one_graph(rows_are, device, fresh_compiler):
    backend = CompileCounterWithBackend("aot_eager")
    model = ModelNew(40, 24, 2.0).to(device)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=rows_are == "dynamic")
    graphs = []
    for rows in (3, 8, 17):
        x = torch.randn(rows, 40, device=device)
        gradients = []
        for function in (model, compiled):
            leaf = x.clone().requires_grad_()
            if rows_are == "unbacked":
                mark_unbacked(leaf, 0)
                mark_unbacked(x, 0)
            out = function(leaf)
            out.square().sum().backward()
            gradients.append([out, leaf.grad, *(p.grad for p in model.parameters())])
            model.zero_grad()
        for a, b in zip(*gradients):
            assert torch.equal(a, b)
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
        graphs.append(backend.frame_count)
    if rows_are != "static":
        assert len(set(graphs)) == 1  # the first batch size's graphs serve the others


@pytest.mark.parametrize("recorded", ["eagerly", "compiled"])
def test_compiled_autograd_without_a_break(recorded, model_pair, device, fresh_compiler):
    reference, new = model_pair(40, 24, device=device)
    x = torch.randn(6, 40, device=device)
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


# autocast


AUTOCAST = [
    ("cpu", torch.bfloat16),
    ("cpu", torch.float16),
    pytest.param("cuda", torch.float16, marks=needs_cuda),
    pytest.param("cuda", torch.bfloat16, marks=needs_cuda),
]


@pytest.mark.parametrize("where, dtype", AUTOCAST)
def test_autocast_is_the_16_bit_layer(where, dtype, model_pair):
    reference, new = model_pair(40, 24, device=where)
    x = torch.randn(6, 40, device=where, requires_grad=True)
    with torch.autocast(where, dtype):
        out = new(x)
        assert out.dtype == reference(x).dtype == dtype
    assert torch.equal(out, new.to(dtype)(x.to(dtype)))


@pytest.mark.parametrize("where, dtype", AUTOCAST)
def test_autocast_gives_float32_gradients(where, dtype, model_pair):
    reference, new = model_pair(40, 24, device=where)
    x = torch.randn(6, 40, device=where)
    for model in (reference, new):
        with torch.autocast(where, dtype):
            model(x).float().square().sum().backward()
    for a, b in zip(reference.parameters(), new.parameters()):
        assert b.grad.dtype == b.dtype == torch.float32
        torch.testing.assert_close(
            b.grad, a.grad, rtol=0.02, atol=8 * torch.finfo(dtype).eps * a.grad.abs().max().item()
        )


@pytest.mark.parametrize("where, dtype", AUTOCAST)
def test_autocast_leaves_float64_alone(where, dtype, model_pair):
    reference, new = model_pair(40, 24, device=where, dtype=torch.float64)
    x = torch.randn(6, 40, device=where, dtype=torch.float64)
    expected = new(x)
    with torch.autocast(where, dtype):
        out = new(x)
        assert out.dtype == reference(x).dtype == torch.float64
    assert torch.equal(out, expected)


# shapes


@pytest.mark.parametrize("shape", [(40,), (6, 40), (2, 3, 40)])
def test_the_result_is_no_view(shape, device):
    """A view made without gradients could not be changed in place by something with gradients."""
    x, weight, bias, scale = random_arguments(shape, 56, torch.float32, device)
    with torch.no_grad():
        out = linear_sigmoid_residual(x, weight, bias, scale)
    assert not out._is_view()
    out.add_(torch.ones(56, device=device, requires_grad=True))
    assert out.requires_grad


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 31, 33, 127, 129, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_about_the_vector_width(n, dtype, device):
    """Heads, tails and column strips of the epilogue kernels, forward and backward."""
    *tensors, scale = random_arguments((9, 4), n, dtype, device)
    leaves = [t.requires_grad_() for t in tensors]
    out = linear_sigmoid_residual(*leaves, scale)
    expected = Expected(*tensors, scale)
    expected.check(out)
    grad = torch.randn_like(out)
    (bias_gradient,) = torch.autograd.grad(out, leaves[2:], grad)
    expected.check_gradients(grad, (None, None, bias_gradient))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "shape, n", [((0, 5), 3), ((2, 0, 5), 3), ((0, 0, 5), 3), ((4, 0), 3), ((0,), 3), ((4, 5), 0), ((0, 0), 0)], ids=str
)
def test_empty_shapes_are_eagers(shape, n, model_pair, device):
    reference, new = model_pair(shape[-1], n, device=device)
    results = []
    for model in (reference, new):
        x = torch.randn(shape, device=device, requires_grad=True)
        out = model(x)
        out.sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(b, a)


def test_linear_is_what_it_says(device):
    """The reference of the tests is itself right: nn.Linear is within the bounds of its z."""
    x, weight, bias, _ = random_arguments((24, 40), 56, torch.float32, device)
    Expected(x, weight, bias, 0.0).check(nn.functional.linear(x, weight, bias))


# how the operator is seen


@pytest.mark.parametrize("requires_grad", [False, True])
def test_modes_and_profilers_see_the_operator(requires_grad, device):
    layer, x = ModelNew(6, 5, 2.0).to(device), torch.randn(3, 6, device=device)
    layer.requires_grad_(requires_grad)
    assert is_fused(layer, x)
    if device == "cuda":
        with Operators() as seen:
            layer(x)
        assert seen.names == ["forward_with_z" if requires_grad else "forward"]


def test_flops_are_counted_forwards_and_backwards(device):
    """2·M·N·K for each of the three products."""
    x, weight, bias, scale = random_arguments((6, 40), 24, torch.float32, device)
    with FlopCounterMode(display=False) as counter:
        linear_sigmoid_residual(x.requires_grad_(), weight.requires_grad_(), bias, scale).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 40 * 24


def test_flop_formulas():
    with FlopCounterMode(display=False) as counter, FakeTensorMode():
        x, weight, bias = (torch.empty(shape, device="meta") for shape in ((2, 3, 40), (24, 40), (24,)))
        operators.forward_with_z(x, weight, bias, 2.0)
        operators.matmul(weight.t(), weight)
    assert counter.get_total_flops() == 2 * 6 * 40 * 24 + 2 * 40 * 24 * 40


# each execution of the text runs its own code

TEXT = (pathlib.Path(model_new.__file__)).read_text(encoding="utf-8")
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
    """Compiles kernels.cu once more, with another activation."""
    monkeypatch.chdir(pathlib.Path(model_new.__file__).parent)
    kernels = pathlib.Path("kernels.cu").read_text(encoding="utf-8")
    other_kernels = kernels.replace("return z + s * sigmoid<kFast>(z);", "return z + s * sigmoid<kFast>(z) + 1;")
    assert other_kernels != kernels
    other = executed(TEXT.replace("KERNELS_SOURCE = None", f"KERNELS_SOURCE = {other_kernels!r}", 1))
    for shape, n in (((6, 40), 24), ((64, 1024), 512)):  # by the library and, on Hopper, by the fused kernel
        arguments = random_arguments(shape, n, torch.float32, "cuda")
        expected = linear_sigmoid_residual(*arguments)
        torch.testing.assert_close(other["linear_sigmoid_residual"](*arguments), expected + 1)
        assert torch.equal(linear_sigmoid_residual(*arguments), expected)


def test_texts_executed_by_several_threads_at_once(monkeypatch):
    monkeypatch.chdir(pathlib.Path(model_new.__file__).parent)
    arguments = random_arguments((6, 5), 4, torch.float32, "cpu")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        contexts = list(pool.map(executed, [TEXT] * 16))
    assert len({context["_namespace"] for context in contexts}) == 16
    for context in contexts:
        assert torch.equal(context["linear_sigmoid_residual"](*arguments), linear_sigmoid_residual(*arguments))
