"""kernels.cu's part for g++ on the CPU: the operators, their autograd and autocast, in front of cpu_kernels.cpp instead
of the device code, which refuses what a kernel must not be handed.
"""

import contextlib
import ctypes
import itertools
import pathlib
import sys
import types

import pytest
import torch
from conftest import ROOT, compile_for_cpu
from fuzz import LAYOUTS, place
from reference import eager, random_arguments
from test_autograd import TRANSFORMS, WANTED, assert_saves_no_more_than_eager, assert_transform_is_eagers
from test_bad_input import WRONG, ones
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import include_paths, library_paths

import model_new
from bench.bindings import KERNELS
from model_new import Model

TEXT = pathlib.Path(model_new.__file__).read_text(encoding="utf-8")


class Host:
    """An execution of model_new.py on the CPU whose operators are kernels.cu's, as on a GPU."""

    def __init__(self, library):
        module = types.ModuleType("host")
        context = vars(module)
        context["__file__"] = model_new.__file__
        exec(compile(TEXT, "host", "exec"), context)
        sys.modules["host"] = module  # where the compiler looks for globals
        self.namespace, self.ModelNew = context["_namespace"], context["ModelNew"]
        self.layer, self.operators = context["linear_sigmoid_residual"], getattr(torch.ops, self.namespace)
        library.register_operators(self.namespace.encode(), b"CPU")
        self.library, self.counts = library, (ctypes.c_int * 3).in_dll(library, "launches")

    @contextlib.contextmanager
    def served_by(self, kernel, rows=1, splits=0):
        """Every product that the fused kernel can compute is served by this kernel."""
        self.library.force_kernel(KERNELS.index(kernel), rows, splits)
        yield
        self.library.force_kernel(0, 0, 0)

    @contextlib.contextmanager
    def launches(self):
        """The launches of the block: [epilogue_forward, epilogue_backward, linear_hopper]."""
        self.counts[:] = 0, 0, 0
        counts = []
        yield counts
        counts += self.counts

    def pair(self, k, n, scale=2.0):
        reference, new = Model(k, n, scale), self.ModelNew(k, n, scale)
        new.load_state_dict(reference.state_dict())
        return reference, new


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    path = tmp_path_factory.mktemp("host") / "host.so"
    folders = [f"-isystem{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    # With a libstdc++ of its own beside PyTorch's, as some compilers link it always: streams do not work then.
    libraries = ["-lc10", "-ltorch_cpu", "-ltorch", "-static-libstdc++"]
    return Host(compile_for_cpu(path, "-x", "c++", ROOT / "tests/cpu_kernels.cpp", "-x", "none", *folders, *libraries))


TILES = [("library",), ("fp16x3", 256, 0), ("fp16x3", 128, 0), ("fp16x3", 32, 2), ("fp16x1", 16, 4)]
TILES += [("fp16x1_staged", 256, 0)]
each_tile = pytest.mark.parametrize("tile", TILES, ids=str)


def placed(layout, k, dtype):
    """[x, weight, bias] of several dimensions, in which one tensor after the other lies in memory as `layout` says."""
    for leading, which in itertools.product([(24,), (), (2, 3, 4)], range(3)):
        tensors = random_arguments((*leading, k), 56, dtype, "cpu")[:3]
        yield [place(t, layout)[0] if i == which else t for i, t in enumerate(tensors)]


@pytest.mark.parametrize("k", [40, 37])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_tile
def test_any_layout(tile, layout, k, host):
    for arguments in placed(layout, k, torch.float32):
        leaves = [t.detach().requires_grad_() for t in arguments]
        expected = eager(*leaves, 2.0)
        grad = torch.randn_like(expected)
        with host.served_by(*tile), host.launches() as launches, torch.no_grad():
            out = host.layer(*arguments, 2.0)
        assert launches == ([0, 0, 1] if tile[0] != "library" and arguments[1].stride(1) == 1 else [1, 0, 0])
        torch.testing.assert_close(out, expected.detach())
        with host.served_by(*tile):
            gradients = torch.autograd.grad(host.layer(*leaves, 2.0), leaves, grad)
        for a, b in zip(gradients, torch.autograd.grad(expected, leaves, grad)):
            torch.testing.assert_close(a, b)


@each_tile
def test_aligned_rows_with_numbers_behind_them(tile, host):
    """Where a kernel wants zeros, up to a multiple of 16 bytes."""
    x, weight, bias, scale = random_arguments((24, 40), 56, torch.float32, "cpu")
    x, weight = x[:, :37], weight[:, :37]
    with host.served_by(*tile):
        torch.testing.assert_close(host.layer(x, weight, bias, scale), eager(x, weight, bias, scale))


@each_tile
def test_without_a_bias(tile, host):
    x, weight, _, scale = random_arguments((24, 40), 56, torch.float32, "cpu")
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with host.served_by(*tile):
        out = host.layer(x, weight, None, scale)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
    expected = eager(x, weight, None, scale)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), leaves))


@pytest.mark.parametrize("k", [40, 37])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_16_bits(layout, dtype, k, host):
    for arguments in placed(layout, k, dtype):
        with host.served_by("wgmma16", 64, 1), host.launches() as launches:
            out = host.layer(*arguments, 2.0)
        assert launches[2] == (arguments[1].stride(1) == 1)
        expected = eager(*(t.float() for t in arguments), 2.0)
        torch.testing.assert_close(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("b_layout", ["rows", "wider", "transposed", "unaligned"])
@pytest.mark.parametrize("a_layout", ["rows", "wider", "wider, aligned", "transposed", "3-d"])
@pytest.mark.parametrize("k", [64, 37])
def test_matmul_of_any_layout(a_layout, b_layout, k, host):
    a, b = torch.randn(24, k), torch.randn(k, 56)
    a = {
        "rows": a,
        "wider": torch.randn(24, k + 3)[:, 1 : 1 + k],
        "wider, aligned": torch.randn(24, k // 4 * 4 + 4)[:, :k],  # with numbers where a kernel wants zeros
        "transposed": a.t().contiguous().t(),
        "3-d": a[None],
    }[a_layout]
    served = b_layout in ("rows", "wider")
    b = {
        "rows": b,
        "wider": torch.randn(k, 64)[:, :56],
        "transposed": b.t().contiguous().t(),
        "unaligned": torch.randn(k, 57)[:, 1:],
    }[b_layout]
    with host.served_by("fp16x3", 64, 1), host.launches() as launches:
        out = host.operators.matmul(a, b)
    assert launches == [0, 0, int(served)]
    torch.testing.assert_close(out, torch.matmul(a, b))


@pytest.mark.parametrize("shape, n", [((0, 5), 3), ((2, 0, 5), 3), ((4, 0), 3), ((0,), 3), ((4, 5), 0), ((0, 0), 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_tensors(shape, n, host):
    leaves = [t.requires_grad_() for t in random_arguments(shape, n, torch.float32, "cpu")[:3]]
    out, expected = host.layer(*leaves, 2.0), eager(*leaves, 2.0)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), leaves) for t in (out, expected)))


@pytest.mark.parametrize("case", [name for name, (*_, words) in WRONG.items() if words])
def test_wrong_tensors_are_refused_before_any_launch(case, host):
    weight, bias, words = WRONG[case]
    with host.launches() as launches, pytest.raises(RuntimeError) as error:
        host.layer(ones(2, 3), weight, bias, 2.0)
    assert all(word in str(error.value) for word in ["linear_sigmoid_residual()", *words]), error.value
    assert launches == [0, 0, 0]


# autograd


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_no_more_is_saved_than_by_eager(wanted, host):
    assert_saves_no_more_than_eager(host.layer, wanted, "cpu")


@pytest.mark.parametrize("retain", [False, True])
def test_a_second_backward(retain, host):
    """Gives the same where the graph is kept, and else is PyTorch's error. (The products then have z's memory, which
    test_training_takes_no_more_memory_than_eager sees on a GPU.)
    """
    leaves = [t.requires_grad_() for t in random_arguments((24, 40), 56, torch.float32, "cpu")[:3]]
    out = host.layer(*leaves, 2.0).sum()
    first = torch.autograd.grad(out, leaves, retain_graph=retain)
    if retain:
        assert all(map(torch.equal, first, torch.autograd.grad(out, leaves)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves)


def test_hooks_that_keep_what_is_saved_keep_it_unchanged(host):
    leaves = [t.requires_grad_() for t in random_arguments((24, 40), 56, torch.float32, "cpu")[:3]]
    kept = []

    def pack(t):
        kept.append((t, t.clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = host.layer(*leaves, 2.0)
    torch.autograd.grad(out.sum(), leaves)
    assert len(kept) == 3 and all(torch.equal(t, before) for t, before in kept)


@each_tile
def test_derivatives_against_finite_differences(tile, host):
    arguments = [t.requires_grad_() for t in random_arguments((2, 3, 5), 4, torch.float64, "cpu")[:3]]
    with host.served_by(*tile):
        assert torch.autograd.gradcheck(lambda *a: host.layer(*a, 2.0), arguments, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda *a: host.layer(*a, 2.0), arguments)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, requires_grad, host):
    assert_transform_is_eagers(transform, host.layer, requires_grad, "cpu")


def test_a_batch_of_gradients_at_once(host):
    leaves = [t.requires_grad_() for t in random_arguments((6, 40), 24, torch.float32, "cpu")[:3]]
    grads = torch.randn(7, 6, 24)
    torch.testing.assert_close(
        *(torch.autograd.grad(f(*leaves, 2.0), leaves, grads, is_grads_batched=True) for f in (host.layer, eager))
    )


# how the operators are seen


def test_opcheck(host):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias, scale = random_arguments((6, 40), 24, dtype, "cpu")
        for requires_grad in (False, True):
            arguments = [t.clone().requires_grad_(requires_grad) for t in (x, weight, bias)]
            torch.library.opcheck(host.operators.forward.default, (*arguments, scale))
        torch.library.opcheck(host.operators.forward.default, (x, weight, None, scale))
        torch.library.opcheck(host.operators.forward_with_z.default, (x, weight, bias, scale))
        torch.library.opcheck(host.operators.backward_z.default, (torch.randn_like(x), x, scale))
    for a, b in ((torch.randn(7, 5), torch.randn(5, 8)), (torch.randn(5, 7).t(), torch.randn(5, 8))):
        torch.library.opcheck(host.operators.matmul.default, (a, b))


class Names(TorchDispatchMode):
    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("linear_sigmoid_residual"):
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_a_mode_sees(requires_grad, host):
    _, new = host.pair(40, 24)
    new.requires_grad_(requires_grad)
    with Names() as seen:
        out = new(torch.randn(6, 40))
        if requires_grad:
            out.sum().backward()
    assert seen.names == (["forward_with_z", "backward_z", "matmul"] if requires_grad else ["forward"])


@pytest.mark.parametrize("dynamic", [False, True, "unbacked"])
def test_compiles_to_one_graph(dynamic, host):
    torch._dynamo.reset()
    reference, new = host.pair(40, 24)
    compiled = torch.compile(new, fullgraph=True, dynamic=dynamic is True, backend="aot_eager")
    for rows in (6, 9):
        x = torch.randn(rows, 40)
        if dynamic == "unbacked":
            torch._dynamo.decorators.mark_unbacked(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), reference(x))
        gradients = (torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (compiled, reference))
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b)


def test_compiled_autograd(host):
    torch._dynamo.reset()
    reference, new = host.pair(40, 24)
    x = torch.randn(6, 40)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        new(x).square().sum().backward()
    reference(x).square().sum().backward()
    for a, b in zip(new.parameters(), reference.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast(host):
    reference, new = host.pair(40, 24)
    x = torch.randn(6, 40)
    gradients = []
    for model in (new, reference):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(out.float().square().sum(), list(model.parameters())))
    for a, b in zip(*gradients):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert new.double()(x.double()).dtype == torch.float64


def test_two_namespaces_of_one_library(host):
    """Each with its own operators, as two executions of one text have them."""
    other = Host(host.library)
    assert other.namespace != host.namespace
    x, weight, bias, scale = random_arguments((6, 40), 24, torch.float32, "cpu")
    weight.requires_grad_()
    with Names() as seen:
        for which in (host, other):
            (gradient,) = torch.autograd.grad(which.layer(x, weight, bias, scale).sum(), weight)
            torch.testing.assert_close(gradient, torch.autograd.grad(eager(x, weight, bias, scale).sum(), weight)[0])
    assert seen.names == ["forward_with_z", "backward_z", "matmul"] * 2
