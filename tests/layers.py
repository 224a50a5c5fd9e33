"""The layer in each of the ways that it runs: "cpu", as PyTorch's operators; "host", kernels.cu's part for g++ on the
CPU, in front of cpu_kernels.cpp instead of the device code, which refuses what a kernel must not be handed; "cuda".
"""

import contextlib
import ctypes
import functools
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, compile_for_cpu, needs_cuda
from reference import model_pair
from torch.utils.cpp_extension import include_paths, library_paths

import model_new
from bench.bindings import KERNELS

TEXT = Path(model_new.__file__).read_text(encoding="utf-8")


class Layer:
    """An execution of model_new.py, and the device of its tensors."""

    module = model_new

    def __init__(self, name, device):
        self.name, self.device, self.has_kernels = name, device, name != "cpu"

    def __str__(self):
        return self.name

    @property
    def function(self):
        return self.module.linear_sigmoid_residual

    @property
    def operators(self):
        return getattr(torch.ops, self.module._namespace)

    def pair(self, k, n, scale=2.0, **to):
        """(Model, ModelNew with the same weights)"""
        return model_pair(k, n, scale, self.module, device=self.device, **to)


@functools.cache
def _host_library():
    folders = [f"-isystem{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    # With a libstdc++ of its own beside PyTorch's, as some compilers link it always: streams do not work then.
    libraries = ["-lc10", "-ltorch_cpu", "-ltorch", "-static-libstdc++"]
    stand_ins = ["-x", "c++", ROOT / "tests/cpu_kernels.cpp", "-x", "none"]
    with tempfile.TemporaryDirectory() as folder:
        return compile_for_cpu(Path(folder) / "host.so", *stand_ins, *folders, *libraries)


class Host(Layer):
    """An execution on the CPU whose operators are kernels.cu's, as on a GPU; compiled when it is first used."""

    def __init__(self):
        super().__init__("host", "cpu")

    @functools.cached_property
    def module(self):
        module = types.ModuleType("host")
        module.__file__ = model_new.__file__
        exec(compile(TEXT, "host", "exec"), vars(module))
        sys.modules["host"] = module  # where torch.compile looks for globals
        _host_library().register_operators(module._namespace.encode(), b"CPU")
        return module

    @contextlib.contextmanager
    def served_by(self, kernel, rows=1, splits=0):
        """Every product that the fused kernel can compute is served by this kernel."""
        _host_library().force_kernel(KERNELS.index(kernel), rows, splits)
        yield
        _host_library().force_kernel(0, 0, 0)

    @contextlib.contextmanager
    def launches(self):
        """The launches of the block: [epilogue_forward, epilogue_backward, linear_hopper]."""
        counts = (ctypes.c_int * 3).in_dll(_host_library(), "launches")
        counts[:] = 0, 0, 0
        seen = []
        yield seen
        seen += counts


cpu, host, cuda = Layer("cpu", "cpu"), Host(), Layer("cuda", "cuda")
each_layer_with_kernels = pytest.mark.parametrize("layer", [host, pytest.param(cuda, marks=needs_cuda)], ids=str)
each_layer = pytest.mark.parametrize("layer", [cpu, host, pytest.param(cuda, marks=needs_cuda)], ids=str)
