"""The operator as the dispatcher, torch.compile and autocast see it; arguments of every layout; and wrong arguments."""

import concurrent.futures
import gc
import pathlib

import pytest
import torch
from conftest import Operators, is_fused, needs_cuda
from reference import DTYPES, Layer, random_arguments
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


def test_inductor_keeps_the_operator_whole(device, fresh_compiler):
    """Inductor compiles what surrounds it; the values stay those of the operator."""
    model = ModelNew(40, 24, 2.0).to(device)

    def network(x):
        return torch.relu(model(x * 2)) + 1

    x = torch.randn(6, 40, device=device, requires_grad=True)
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


# layouts


def _unaligned(t):
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return storage[1:].view(t.shape).copy_(t)


LAYOUTS = {
    "x transposed": lambda x, w, b: (x.t().contiguous().t(), w, b),
    "x expanded": lambda x, w, b: (x[:1].expand(24, -1), w, b),
    "x of every second column": lambda x, w, b: (x.repeat_interleave(2, 1)[:, ::2], w, b),
    "x of every second row": lambda x, w, b: (x.repeat_interleave(2, 0)[::2], w, b),
    "x unaligned": lambda x, w, b: (_unaligned(x), w, b),
    "weight transposed": lambda x, w, b: (x, w.t().contiguous().t(), b),
    "weight of every second row": lambda x, w, b: (x, w.repeat_interleave(2, 0)[::2], b),
    "weight unaligned": lambda x, w, b: (x, _unaligned(w), b),
    "bias of every second element": lambda x, w, b: (x, w, b.repeat_interleave(2)[::2]),
    "bias expanded": lambda x, w, b: (x, w, b[:1].expand(len(b))),
    "bias unaligned": lambda x, w, b: (x, w, _unaligned(b)),
    "x 1-d": lambda x, w, b: (x[0], w, b),
    "x 3-d transposed": lambda x, w, b: (x.view(4, 6, -1).transpose(0, 1), w, b),
    "x 4-d": lambda x, w, b: (x.view(2, 3, 4, -1), w, b),
    "one row": lambda x, w, b: (x[:1], w, b),
    "negative view": lambda x, w, b: (torch._neg_view(x), w, b),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, dtype, device):
    x, weight, bias, scale = random_arguments((24, 40), 56, dtype, device)
    arguments = (*LAYOUTS[layout](x, weight, bias), scale)
    before = [t.clone() for t in arguments[:3]]
    out = linear_sigmoid_residual(*arguments)
    Layer(*arguments).check(out)
    assert out.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(arguments[:3], before))


@pytest.mark.parametrize("shape", [(40,), (6, 40), (2, 3, 40)])
def test_the_result_is_no_view(shape, device):
    """A view made without gradients could not be changed in place by something with gradients."""
    x, weight, bias, scale = random_arguments(shape, 56, torch.float32, device)
    with torch.no_grad():
        out = linear_sigmoid_residual(x, weight, bias, scale)
    assert not out._is_view()
    out.add_(torch.ones(56, device=device, requires_grad=True))
    assert out.requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(layout, device):
    arguments = LAYOUTS[layout](*random_arguments((24, 40), 56, torch.float32, device)[:3])
    leaves = [t.detach().requires_grad_() for t in arguments]
    out = linear_sigmoid_residual(*leaves, 2.0)
    plain = [t.detach().contiguous().requires_grad_() for t in arguments]
    expected = linear_sigmoid_residual(*plain, 2.0)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, plain, grad)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 31, 33, 127, 129, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_about_the_vector_width(n, dtype, device):
    """Heads, tails and column strips of the epilogue kernels, forward and backward."""
    *tensors, scale = random_arguments((9, 4), n, dtype, device)
    leaves = [t.requires_grad_() for t in tensors]
    out = linear_sigmoid_residual(*leaves, scale)
    layer = Layer(*tensors, scale)
    layer.check(out)
    grad = torch.randn_like(out)
    (bias_gradient,) = torch.autograd.grad(out, leaves[2:], grad)
    expected, bound = layer.gradients(grad)[2]
    assert (abs(bias_gradient.double().cpu().numpy() - expected) <= bound).all()


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


# wrong arguments


def _x(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


WRONG = {
    "features": (
        lambda: (_x(2, 5), _x(4, 3), _x(4)),
        ["mat1 and mat2 shapes cannot be multiplied (2x5 and 3x4)", "[2, 5]"],
    ),
    "features, 3-d": (lambda: (_x(2, 6, 5), _x(4, 3), _x(4)), ["(12x5 and 3x4)", "[2, 6, 5]"]),
    "dtype of x": (
        lambda: (_x(2, 3, dtype=torch.float64), _x(4, 3), _x(4)),
        ["must have the same dtype", "float64", "float32"],
    ),
    "dtype of bias": (
        lambda: (_x(2, 3), _x(4, 3), _x(4, dtype=torch.float16)),
        ["must have the same dtype", "bias [4] torch.float16"],
    ),
    "integers": (lambda: tuple(t.long() for t in (_x(2, 3), _x(4, 3), _x(4))), ["not implemented", "torch.int64"]),
    "complex": (lambda: tuple(t + 0j for t in (_x(2, 3), _x(4, 3), _x(4))), ["not implemented", "torch.complex64"]),
    "weight 1-d": (lambda: (_x(2, 3), _x(3), _x(3)), ["weight [N, K]", "weight [3]"]),
    "weight 3-d": (lambda: (_x(2, 3), _x(1, 4, 3), _x(4)), ["weight [N, K]", "weight [1, 4, 3]"]),
    "bias too short": (lambda: (_x(2, 3), _x(4, 3), _x(1)), ["bias [N]", "bias [1]", "weight [4, 3]"]),
    "bias 2-d": (lambda: (_x(2, 3), _x(4, 3), _x(1, 4)), ["bias [N]", "bias [1, 4]"]),
    "x 0-d": (lambda: (_x(), _x(4, 3), _x(4)), ["x [..., K]", "x []"]),
}


@needs_cuda
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors(case, requires_grad):
    """Checked before anything is launched. (On the CPU the errors are nn.Linear's own.)"""
    make, words = WRONG[case]
    arguments = [t.cuda() for t in make()]
    if requires_grad:
        arguments = [t.requires_grad_() if t.is_floating_point() else t for t in arguments]
    with pytest.raises(RuntimeError) as error:
        linear_sigmoid_residual(*arguments, 2.0)
    for word in ["linear_sigmoid_residual()", *words]:
        assert word in str(error.value)
    torch.cuda.synchronize()  # nothing was launched that could fail
    assert all((t == 1).all() for t in arguments)


@needs_cuda
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_tensor_on_the_other_device(which):
    arguments = [_x(2, 3, device="cuda"), _x(4, 3, device="cuda"), _x(4, device="cuda")]
    arguments[which] = arguments[which].cpu()
    with pytest.raises(RuntimeError, match=r"same device.*cpu") as error:
        linear_sigmoid_residual(*arguments, 2.0)
    assert "cuda:0" in str(error.value)


def test_the_message_is_eagers_for_a_wrong_feature_count(model_pair):
    reference, new = model_pair(3, 4)
    messages = []
    for model in (reference, new):
        with pytest.raises(RuntimeError) as error:
            model(torch.ones(2, 5))
        messages.append(str(error.value))
    words = "mat1 and mat2 shapes cannot be multiplied (2x5 and 3x4)"  # newer PyTorch puts the operator's name before
    assert words in messages[0] and words in messages[1]


def test_linear_is_what_it_says(device):
    """The reference of the tests is itself right: nn.Linear is within the bounds of its z."""
    x, weight, bias, _ = random_arguments((24, 40), 56, torch.float32, device)
    layer = Layer(x, weight, bias, 0.0)
    layer.check(nn.functional.linear(x, weight, bias))


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


def test_autocast_is_obeyed(device):
    layer, x = ModelNew(6, 5, 2.0).to(device), torch.randn(3, 6, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


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
