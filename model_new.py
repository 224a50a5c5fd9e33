"""A linear layer with a scaled sigmoid residual, as one PyTorch operator over hand-written CUDA.

    z   = x·Wᵀ + b                    x [..., K]   W [N, K]   b [N]
    out = z + s·sigmoid(z)            out [..., N]

This is problem 70 of KernelBench's level 2 (reference: x [1024, 8192], K = N = 8192, s = 2, float32).
`Model` is the reference in plain PyTorch, `ModelNew` replaces it: same constructor, same parameters, same
random numbers drawn, same answers. kernels.cu has the device code and the operator's implementation for it,
and is built when this file is imported on a machine with a CUDA device. Elsewhere the same operator consists
of PyTorch's own.

    python model_new.py                  check, then time, against Model on the reference shape
    python model_new.py --help           other shapes, dtypes, precisions; JSON; single-file export; building
"""

import argparse
import copy
import ctypes
import fcntl
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack, _len_torch_function_stack
from torch.utils.flop_counter import register_flop_formula

# The text of kernels.cu. None: read the file. `--export` writes a copy of this script with the text in here.
KERNELS_SOURCE = None

# ------------------------------------------------------------------------------------------- the reference


class Model(nn.Module):
    """The reference: linear, sigmoid, scaling and residual as separate PyTorch operators.

    Args: input_size (K), hidden_size (N), scaling_factor (s). Input [..., K], output [..., N].
    """

    def __init__(self, input_size, hidden_size, scaling_factor):
        super().__init__()
        self.gemm = nn.Linear(input_size, hidden_size)
        self.scaling_factor = scaling_factor

    def forward(self, x):
        z = self.gemm(x)
        return torch.sigmoid(z) * self.scaling_factor + z


class _Caught:
    """`with _Caught(OSError) as caught: ...` goes on behind the block; `caught.error` is what was raised, or None.

    Python has a statement for this, but KernelBench's checker refuses it.
    """

    def __init__(self, *kinds):
        self.kinds, self.error = kinds, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.error = error if isinstance(error, self.kinds) else None
        return self.error is not None


# ------------------------------------------------------------------------------------------------ the operator
#
# linear_sigmoid_residual::forward and what its backward is made of. Who implements them, by what the dispatcher sees:
#
#                                        forward            forward_with_z, backward_z, matmul
#   CUDA tensors                         kernels.cu         kernels.cu
#   autograd on CUDA tensors             kernels.cu         -
#   autocast on CUDA tensors             kernels.cu         -
#   every other device                   _decomposition     -
#   torch.func, vmap, forward-mode AD    _decomposition (on CUDA tensors kernels.cu has the same)
#   fake tensors, torch.compile          _forward_fake      _forward_with_z_fake, _backward_z_fake, _matmul_fake
#
# The first three exist where kernels.cu has been built. The decomposition consists of PyTorch's operators: derivatives,
# autocast and compilation are then PyTorch's, and so are the errors.

_NAMESPACE = "linear_sigmoid_residual"
_SCHEMAS = (
    "forward(Tensor x, Tensor weight, Tensor? bias, float scale) -> Tensor",
    "forward_with_z(Tensor x, Tensor weight, Tensor? bias, float scale) -> (Tensor out, Tensor z)",
    "backward_z(Tensor grad, Tensor z, float scale) -> (Tensor dz, Tensor dbias)",
    "matmul(Tensor a, Tensor b) -> Tensor",
)


def _decomposition(x, weight, bias, scale):
    """The layer in PyTorch's operators. 16-bit: the epilogue is computed in float32, and rounded once."""
    z = nn.functional.linear(x, weight, bias)
    if z.dtype not in (torch.float16, torch.bfloat16):
        return torch.sigmoid(z) * scale + z
    wide = z.float()
    return (torch.sigmoid(wide) * scale + wide).to(z.dtype)


def _forward_fake(x, weight, bias, scale):
    torch._check(x.dim() > 0 and weight.dim() == 2, lambda: f"x {list(x.shape)}, weight {list(weight.shape)}")
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"x {list(x.shape)} does not fit weight {list(weight.shape)}")
    for t in (weight,) if bias is None else (weight, bias):
        torch._check(t.dtype == x.dtype, lambda t=t: f"x is {x.dtype}, weight or bias {t.dtype}")
        torch._check(t.shape[0] == weight.shape[0], lambda t=t: f"bias {list(t.shape)}, weight {list(weight.shape)}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _forward_with_z_fake(x, weight, bias, scale):
    out = _forward_fake(x, weight, bias, scale)
    return out, torch.empty_like(out)


def _backward_z_fake(grad, z, scale):
    return z.new_empty(z.shape), z.new_empty(z.shape[-1])


def _matmul_fake(a, b):
    torch._check(a.shape[-1] == b.shape[0], lambda: f"a {list(a.shape)} does not fit b {list(b.shape)}")
    return a.new_empty((*a.shape[:-1], b.shape[1]))


def _forward_flops(x_shape, weight_shape, *_, **__):
    return 2 * math.prod(x_shape) * weight_shape[0]


def _matmul_flops(a_shape, b_shape, **_):
    return 2 * math.prod(a_shape) * b_shape[1]


def _define_operators():
    """Defines the operators in a namespace of their own for each execution of this file, so that several texts of it in
    one process each run their own code: torch.ops.linear_sigmoid_residual, then ..._2, ..._3. Returns its name.
    """
    for number in itertools.count(1):
        name = _NAMESPACE if number == 1 else f"{_NAMESPACE}_{number}"
        with _Caught(RuntimeError) as taken:  # by the dispatcher, which gives a namespace to one of several threads
            library = torch.library.Library(name, "DEF")
            break
        if "Only a single TORCH_LIBRARY" not in str(taken.error):
            raise taken.error
    for schema in _SCHEMAS:
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CompositeExplicitAutograd", "Autograd", "FuncTorchBatchedDecomposition"):
        library.impl("forward", _decomposition, key)
    operators = getattr(torch.ops, name)
    for operator, fake, flops in (
        ("forward", _forward_fake, _forward_flops),
        ("forward_with_z", _forward_with_z_fake, _forward_flops),
        ("backward_z", _backward_z_fake, None),
        ("matmul", _matmul_fake, _matmul_flops),
    ):
        torch.library.register_fake(f"{name}::{operator}", fake, lib=library)
        if flops:
            register_flop_formula(getattr(operators, operator))(flops)
    operators.library = library  # its end would undo the definitions: they last as long as the process
    return name


_namespace = _define_operators()
_forward = getattr(torch.ops, _namespace).forward.default  # the overload itself: a name costs every call a microsecond


def _are_plain(x, weight, bias, scale):
    """Whether the operator may take these arguments: tensors without a type of their own, and a number.

    The fake tensors of torch.compile and torch.export count as what they stand for.
    """
    for t in (x, weight) if bias is None else (x, weight, bias):
        kind = type(t)
        if not (kind is torch.Tensor or kind is nn.Parameter or kind.__module__.startswith("torch._subclasses.")):
            return False
    return type(scale) is float or (type(scale) is int and abs(scale) < 2**53)


def linear_sigmoid_residual(x, weight, bias, scale):
    """z + scale·sigmoid(z) with z = x·weightᵀ + bias.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64; any strides.
        weight: [N, K], bias: [N] or None; dtype and device of x.
        scale: a number.
    Returns: [..., N], contiguous, dtype and device of x. 16-bit: the fused kernel rounds once; elsewhere z is rounded,
        and then the result. `select_kernel` tells which implementation serves a call.
    Differentiable in x, weight and bias, to any order, in forward mode and under torch.func, too.
    Raises: what nn.functional.linear raises for tensors that do not fit together, before any launch; on a GPU also for
        complex numbers and a bias that would be broadcast.
    Tensor subclasses, and a scale that is a tensor or a NumPy number: PyTorch's operators compute it.
    """
    if _are_plain(x, weight, bias, scale):
        return _forward(x, weight, bias, scale)
    return _decomposition(x, weight, bias, scale)


# ------------------------------------------------------------------------------------------------- the module

_functional, _Linear = nn.functional, nn.Linear
_linear, _linear_forward = _functional.linear, _Linear.forward  # as they are when this file is loaded


def _is_ordinary(gemm):
    """Whether calling `gemm` would be nn.functional.linear on its parameters, and nothing else."""
    return not (
        type(gemm) is not _Linear
        or _Linear.forward is not _linear_forward
        or _functional.linear is not _linear
        or "forward" in gemm.__dict__
        or gemm._forward_pre_hooks
        or gemm._forward_hooks
        or gemm._backward_pre_hooks
        or gemm._backward_hooks
        or _has_any_global_hook()
        # Those of PyTorch itself, of `with torch.device(...)` and torch.export, leave the result as it is.
        or (
            _len_torch_function_stack()
            and not all(type(mode).__module__.startswith("torch.") for mode in _get_current_function_mode_stack())
        )
    )


class ModelNew(nn.Module):
    """Drop-in for `Model`: same constructor, parameters (`gemm.weight` [N, K], `gemm.bias` [N]) and random draws.

    Args: input_size (K), hidden_size (N), scaling_factor (s). Input [..., K], output [..., N].

    The fused operator stands in for an ordinary `gemm`: an nn.Linear with nothing attached. The layer is computed as
    `Model` does it, by PyTorch's operators and through `gemm` itself, where
      - `gemm` is another module (a parametrized, quantized or sharded one) or has hooks or a forward of its own, there
        are global module hooks, or nn.Linear.forward or nn.functional.linear has been replaced since this file was
        loaded (LoRA);
      - a torch function mode is active other than PyTorch's own;
      - x or a parameter is of a tensor subclass (DTensor, quantized, nested, an fx proxy), or s is no int or float.
    Nothing is cached between calls.
    """

    def __init__(self, input_size, hidden_size, scaling_factor):
        super().__init__()
        self.gemm = nn.Linear(input_size, hidden_size)
        self.scaling_factor = scaling_factor

    def forward(self, x):
        gemm, scale = self._modules.get("gemm"), self.scaling_factor  # a quarter of the time of self.gemm
        if _is_ordinary(gemm):
            of_gemm = gemm._parameters
            if "weight" in of_gemm and "bias" in of_gemm:
                weight, bias = of_gemm["weight"], of_gemm["bias"]
            else:  # they are plain tensors, as in replicas of nn.DataParallel
                weight, bias = gemm.weight, gemm.bias
            if _are_plain(x, weight, bias, scale):
                return _forward(x, weight, bias, scale)
        return Model.forward(self, x)

    def extra_repr(self):
        return f"scaling_factor={self.scaling_factor}"

    def __prepare_scriptable__(self):
        """What torch.jit.script compiles: `Model` on the same parameters."""
        model = copy.copy(self)
        model.__class__ = Model
        return model


batch_size, input_size, hidden_size, scaling_factor = 1024, 8192, 8192, 2.0


def get_inputs():
    """[x] with x [1024, 8192] uniform in [0, 1), float32, on the GPU where there is one."""
    return [torch.rand(batch_size, input_size, device="cuda" if torch.cuda.is_available() else "cpu")]


def get_init_inputs():
    """[input_size, hidden_size, scaling_factor]"""
    return [input_size, hidden_size, scaling_factor]


# ---------------------------------------------------------------------------------------- building kernels.cu


def _folder():
    """Where kernels.cu is: beside this file, or (exec'd without `__file__`) in the working folder."""
    return os.path.dirname(os.path.abspath(__file__)) if "__file__" in globals() else os.getcwd()


def _kernels_source():
    """The text of kernels.cu, embedded or read."""
    if KERNELS_SOURCE is not None:
        return KERNELS_SOURCE
    path = os.path.join(_folder(), "kernels.cu")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"kernels.cu is not in {_folder()}. Keep it beside model_new.py, or make one self-contained file with "
            "`python model_new.py --export FILE`."
        )
    with open(path, encoding="utf-8") as file:
        return file.read()


def _architecture(major, minor):
    """9, 0 -> "90a": with the architecture's own instructions (wgmma and setmaxnreg exist for 90a only)."""
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def architectures():
    """The compute capabilities of the machine's GPUs as nvcc writes them (['90a'] for H100s), one per kind, or [] where
    PyTorch has no GPU to use.

    NVML is asked, since CUDA, once initialized in this process, cannot be used in processes forked from it. GPUs that
    CUDA_VISIBLE_DEVICES hides count, too: one library serves, whichever it shows.
    """
    if torch.version.cuda is None or torch.cuda.device_count() == 0:
        return []
    kinds, device = set(), ctypes.c_void_p()
    count, driver, major, minor = (ctypes.c_int() for _ in range(4))
    with _Caught(OSError, AttributeError):
        nvml, ref = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.byref
        nvml.nvmlInit_v2()
        nvml.nvmlSystemGetCudaDriverVersion_v2(ref(driver))
        nvml.nvmlDeviceGetCount_v2(ref(count))
        for index in range(count.value):
            failed = nvml.nvmlDeviceGetHandleByIndex_v2(index, ref(device))
            if not failed and not nvml.nvmlDeviceGetCudaComputeCapability(device, ref(major), ref(minor)):
                kinds.add((major.value, minor.value))
    if 0 < driver.value // 1000 < int(torch.version.cuda.split(".")[0]):
        return []  # a driver too old for this PyTorch: torch.cuda.is_available() is False
    if not kinds:  # no NVML
        kinds = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [_architecture(*kind) for kind in sorted(kinds)]


GXX_FLAGS = ["-O2"]  # g++'s, for the operators


def nvcc_flags(archs):
    """nvcc's flags for kernels.cu; `archs` as from `architectures()`.

    Kernels are compiled in parallel: in eight threads even where there are fewer CPUs, since with a single one nvcc
    compiles otherwise, and some of split_rows_kernel comes out as other instructions.
    """
    targets = (f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
    return ["-O3", "--threads=0", "--split-compile=8", *targets]


def _first_error(output):
    """The line of a compiler's, linker's or Python's output that says what went wrong.

    Harnesses take "lock" or "No such file or directory" in an error for a race between processes, and try again.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    wrong = re.compile(r"\berror\s*:|\bfatal\s*:|cannot find -l|not found|undefined symbol")
    line = next(filter(wrong.search, lines), lines[-1])
    return line.replace("No such file or directory", "is missing").replace("lock", "LOCK")


def _ask(nvcc, *arguments):
    """What nvcc prints, or why it does not run."""
    with _Caught(OSError) as caught:
        result = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        return result.stdout + result.stderr
    return caught.error.strerror


def _toolkit_of(nvcc):
    """The toolkit folder an `nvcc` belongs to. Asks nvcc itself: the one on PATH may be a link or a wrapper script."""
    top = re.search(r"^#\$ TOP=(.+)$", _ask(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    return os.path.realpath(top.group(1).strip()) if top else os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))


def _known(nvcc, archs):
    """Those of `archs` that this nvcc compiles for. (It lists sm_90 for sm_90a, too.)"""
    codes = _ask(nvcc, "--list-gpu-code").split()
    return [arch for arch in archs if f"sm_{arch.rstrip('a')}" in codes]


def _nvccs():
    """Where nvcc may be: in CUDA_HOME or CUDA_PATH, and only there, if one is set; else on PATH, in NVIDIA's wheels, in
    /usr/local.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return [os.path.join(os.path.abspath(home), "bin", "nvcc")]
    wheels = importlib.util.find_spec("nvidia")  # a namespace package
    homes = [os.path.join(glob.escape(folder), "cu*") for folder in wheels.submodule_search_locations] if wheels else []
    found = [nvcc for home in [*homes, "/usr/local/cuda*"] for nvcc in glob.glob(os.path.join(home, "bin", "nvcc"))]
    on_path = shutil.which("nvcc")
    return list(dict.fromkeys(([on_path] if on_path else []) + [os.path.realpath(nvcc) for nvcc in found]))


def find_cuda_home(archs=()):
    """Folder of the CUDA toolkit to compile with: CUDA_HOME (or CUDA_PATH) if set, else the best of those on PATH, in
    NVIDIA's wheels and in /usr/local/cuda*. It has the major version of PyTorch's CUDA. Best is to know most of
    `archs`, then not to be newer than PyTorch's CUDA, then to be the newest.

    Raises RuntimeError, with what is wrong with each and what to install, where none fits.
    """
    if torch.version.cuda is None:
        raise RuntimeError(f"kernels.cu needs a PyTorch with CUDA, which torch {torch.__version__} is not")
    torch_cuda = tuple(map(int, torch.version.cuda.split(".")[:2]))
    fitting, rejected = {}, []
    for nvcc in _nvccs():
        said = _ask(nvcc, "--version")
        release = re.search(r"release (\d+)\.(\d+)", said)
        cuda = tuple(map(int, release.groups())) if release else (0, 0)
        known = _known(nvcc, archs)
        if not release:
            rejected.append(f"{nvcc}: {_first_error(said)}")
        elif cuda[0] != torch_cuda[0]:
            rejected.append(f"{nvcc}: CUDA {cuda[0]}.{cuda[1]}, PyTorch has {torch.version.cuda}")
        elif archs and not known:
            rejected.append(f"{nvcc}: CUDA {cuda[0]}.{cuda[1]}, which does not know sm_{', sm_'.join(archs)}")
        else:
            # A newer nvcc may call functions that PyTorch's libcudart does not have yet.
            fitting.setdefault((len(known), cuda <= torch_cuda, cuda), nvcc)
    if not fitting:
        reasons = rejected or ["it is not on PATH, in a wheel or in /usr/local/cuda"]
        advice = (
            "Either `pip install 'cuda-toolkit[nvcc,cccl]'` (pip picks the version that matches torch's), or install "
            "the CUDA toolkit and set CUDA_HOME to its folder. (Where CUDA_HOME or CUDA_PATH is set, no other counts.)"
        )
        raise RuntimeError("no CUDA compiler (nvcc) fits kernels.cu: " + "\n  ".join([*reasons, advice]))
    return _toolkit_of(fitting[max(fitting)])


def build(archs, source=None):
    """The path of the library of kernels.cu for `archs` (as from `architectures()`), which is compiled if it is not in
    the cache.

    The cache is $TORCH_EXTENSIONS_DIR (default ~/.cache/torch_extensions). A library has a folder there, named after
    all that it depends on: text, architectures, flags, and the versions of PyTorch, its CUDA and Python's ABI. One that
    is there is neither waited for nor compiled again. One process compiles, others wait for it and say so.
    Raises RuntimeError where the cache cannot be written, no compiler fits or the compiler fails.
    """
    source = _kernels_source() if source is None else source
    flags, abi = [GXX_FLAGS, nvcc_flags(archs)], sysconfig.get_config_var("SOABI")
    depends_on = [source, flags, torch.__version__, torch.version.cuda, abi]
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]
    name = f"linear_sigmoid_residual_sm{'_'.join(archs)}_{digest}"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(cache, "torch_extensions")
    folder = os.path.abspath(os.path.join(cache, name))
    library = os.path.join(folder, f"{name}.so")
    if os.path.exists(library):
        return library
    with _Caught(OSError) as caught:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "builder"), "a+", encoding="utf-8") as builder:
            _take_turn(builder, folder)
            if not os.path.exists(library):
                _compile(archs, source, library)
    if caught.error:
        raise RuntimeError(
            f"cannot build kernels.cu in {folder}: {_first_error(str(caught.error))}\n"
            "  TORCH_EXTENSIONS_DIR chooses another folder for the cache."
        ) from caught.error
    return library


def _take_turn(builder, folder):
    """Waits until no other process holds the file `builder`, and holds it until it is closed. A process that dies gives
    it back, however it dies. Where the file system cannot do this, several may compile at a time.
    """
    with _Caught(OSError) as refused:
        fcntl.flock(builder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if isinstance(refused.error, BlockingIOError):
        time.sleep(1)  # by now the other has written who it is
        builder.seek(0)
        print(
            f"waiting for {builder.read()}, which compiles kernels.cu in {folder}; if it is stuck, end it, or set "
            "TORCH_EXTENSIONS_DIR to another folder",
            file=sys.stderr,
        )
        fcntl.flock(builder, fcntl.LOCK_EX)
    elif refused.error:
        return
    builder.truncate(0)
    builder.write(f"process {os.getpid()} on {platform.node()}")
    builder.flush()


def _compile(archs, source, library):
    """Compiles `source` in a folder of its own, and puts the library in its place when it is whole.

    load_inline runs in another process, since it loads what it has built, and this one may have loaded another.
    """
    home, (folder, file) = find_cuda_home(archs), os.path.split(library)
    known = _known(os.path.join(home, "bin", "nvcc"), archs)
    left_out = "".join(f"; it does not know sm_{arch}, which is left out" for arch in archs if arch not in known)
    print(
        f"compiling kernels.cu for sm_{', sm_'.join(known)} with {home}/bin/nvcc{left_out}; done once, then cached in "
        f"{folder}",
        file=sys.stderr,
    )
    load_inline = "import json, sys; from torch.utils.cpp_extension import load_inline as f; f(**json.load(sys.stdin))"
    arguments = {
        "name": os.path.splitext(file)[0],
        "cpp_sources": source,
        "cuda_sources": source,
        "extra_cflags": GXX_FLAGS,
        "extra_cuda_cflags": nvcc_flags(known),
        "extra_ldflags": ["-L."],
        "build_directory": ".",
        "is_python_module": False,  # no Python bindings, whose headers take most of a minute
        "no_implicit_headers": True,
    }
    environ = {**os.environ, "CUDA_HOME": "cuda", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    with _Caught(ImportError):
        import ninja  # it is on PATH only where the virtual environment is activated

        environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), ninja.BIN_DIR])
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as build_folder:
        # cpp_extension links with -lcudart, which a wheel's toolkit has under another name only. The functions come
        # from the libcudart that PyTorch has loaded, so a linker script that names the C library does.
        with open(os.path.join(build_folder, "libcudart.so"), "w", encoding="utf-8") as script:
            script.write("INPUT(-lc)\n")
        # Nor does it quote the toolkit's path, which may have spaces.
        os.symlink(home, os.path.join(build_folder, "cuda"))
        command, stdin = [sys.executable, "-c", load_inline], json.dumps(arguments)
        result = subprocess.run(
            command, input=stdin, cwd=build_folder, env=environ, capture_output=True, errors="replace"
        )
        if result.returncode == 0:
            os.replace(os.path.join(build_folder, file), library)
            return
    output = result.stdout + result.stderr
    print(output, file=sys.stderr)
    raise RuntimeError(
        f"building kernels.cu failed: {_first_error(output)}\n"
        f"  toolkit {home}, folder {folder}\n"
        "  Needed are g++, ninja and setuptools (`pip install ninja setuptools`) and a CUDA toolkit that fits g++; "
        "CUDA_HOME chooses another. The compiler's whole output is above."
    )


# ------------------------------------------------------------------------------------------------ loading it


def _load(path):
    """The library, with the argument types of what is called through ctypes, for the operators of this file."""
    library = ctypes.CDLL(path)
    library.register_operators.argtypes = [ctypes.c_char_p] * 2
    library.register_operators.restype = None
    library.register_operators(_namespace.encode(), b"CUDA")
    return _declare(library)


def _declare(library):
    """Sets the argument types of the functions that say which kernel serves a call, and returns the library."""
    of_ints, pointer = [ctypes.c_int] * 3, ctypes.POINTER(ctypes.c_int)
    library.select_kernel.argtypes = [*of_ints, *[ctypes.c_int64] * 4, ctypes.c_int, pointer, pointer]
    library.select_kernel.restype = ctypes.c_char_p
    return library


# A command that only prints, writes a file or compiles for other machines needs no library here.
_options = {argument.partition("=")[0] for argument in sys.argv[1:]} if __name__ == "__main__" else set()
_archs = [] if _options & {"-h", "--help", "--export", "--build"} else architectures()
_library = _load(build(_archs)) if _archs else None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # as DType in kernels.cu counts them


def _select(dtype, allows_tf32, is_hopper, m, n, k, w_stride=1, transposed=False):
    """(kernel, rows, splits), from kernels.cu's select_kernel."""
    if _library is None:
        raise RuntimeError("kernels.cu, which chooses among its kernels, is built on machines with a CUDA device only")
    rows, splits, number = ctypes.c_int(), ctypes.c_int(), _DTYPES.index(dtype) if dtype in _DTYPES else -1
    name = _library.select_kernel(number, allows_tf32, is_hopper, m, n, k, w_stride, transposed, rows, splits)
    return name.decode(), rows.value, splits.value


def select_kernel(x, weight, bias=None):
    """The name of the implementation that serves a call with these tensors, which kernels.cu chooses.

    "cpu"            PyTorch's operators, on tensors that are not on a GPU.
    On a GPU of compute capability 9.0 (H100, H200), kernels.cu's fused kernel, where it is expected to be faster than
    the library (see `select_tile`) and W's entries are contiguous along k:
    "fp16x3"         float32 from three fp16 tensor-core products, more accurate than SGEMM on ordinary data (README.md,
                     Accuracy, says where not), while PyTorch asks for full float32 products
                     (torch.set_float32_matmul_precision("highest"), the default).
    "fp16x1"         float32 from one fp16 product, as accurate as TF32, where PyTorch allows that ("high", "medium").
    "fp16x1_staged"  the same, from a copy of W in fp16 that lives for the call: for many rows.
    "wgmma16"        float16 and bfloat16.
    "library"        cuBLAS, then kernels.cu's fused epilogue: everything else on a GPU.
    """
    if not x.is_cuda:
        return "cpu"
    (n, k), tf32 = weight.shape, torch.backends.cuda.matmul.fp32_precision == "tf32"
    rows = math.prod(x.shape[:-1])
    return _select(x.dtype, tf32, _library and _library.is_hopper(x.device.index), rows, n, k, weight.stride(1))[0]


def select_tile(precision, m, n, k, transposed=False):
    """How kernels.cu serves x [m, k], W [n, k] on Hopper: (kernel, rows, splits), or None where the library does.

    precision: "float32", "tf32" or "16 bit". kernel: a name that `select_kernel` returns. rows: of out that a block
    computes, by 128 columns. splits: blocks that share a tile, each with a part of K; 0 where pairs of blocks share an
    operand. transposed: W comes as [k, n], and its rows in multiples of 16 bytes.
    """
    dtype = torch.float16 if precision == "16 bit" else torch.float32
    tile = _select(dtype, precision == "tf32", True, m, n, k, transposed=transposed)
    return None if tile[0] == "library" else tile


# ------------------------------------------------------------------------------------------- the command line

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}


def allclose_tolerance(dtype, precision="highest"):
    """KernelBench's tolerance, absolute and relative: 1e-4 for float32 and float64, 1e-2 for 16-bit and for float32
    whose matrix products may be less precise ("high", "medium").
    """
    lower = dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and precision != "highest")
    return 1e-2 if lower else 1e-4


def errors_against_float64(outputs, x, weight, bias, scale):
    """{name: (Frobenius, componentwise)} of each of a dict of outputs against the layer in float64 on the same inputs.

    Frobenius: ‖out − ref‖ / ‖ref‖. Componentwise: max |out − ref| / (|x|·|W|ᵀ + |b| + |s|). Non-finite where out is.
    """
    x, weight, bias = x.double(), weight.double(), bias.double()
    z = nn.functional.linear(x, weight, bias)
    reference = z + scale * torch.sigmoid(z)
    magnitude = nn.functional.linear(x.abs(), weight.abs(), bias.abs()).add_(abs(scale))
    errors = {}
    for name, out in outputs.items():
        difference = out.double().sub_(reference)
        frobenius = (difference.norm() / reference.norm()).item()
        errors[name] = frobenius, (difference.abs_() / magnitude).max().item()
    return errors


def l2_flush():
    """A function that empties the current GPU's L2 cache: it overwrites four times as much memory, then reads it.

    The reading is so that what was overwritten is written back before what is timed next, not by it: that costs a
    kernel bound by memory 3 to 8 microseconds on an H200. It also keeps the GPU busy while the host prepares the next.
    """
    buffer = torch.empty(torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int32, device="cuda")
    return lambda: buffer.zero_().amax()


def times_in_turns(functions, repeats, warm_up_seconds=0.0, wall_clock=False):
    """{name: [milliseconds of each call]} of a dict of functions, called in turns, each turn in a random order, so
    that all see the same clocks.

    On a GPU: CUDA events, with the L2 cache flushed before each call, which keeps the GPU busy while the host prepares
    it: host time does not count. On the CPU, or where asked for: the wall clock. Turns before the `repeats` that count
    warm up: one, and more until warm_up_seconds have passed.
    """
    events = torch.cuda.is_available() and not wall_clock
    flush = l2_flush() if events else None

    def turn():
        times = {}
        names = random.sample(list(functions), len(functions))  # in no order: each leaves the GPU warm for the next
        if events:
            for _ in range(4):  # the host has waited for the GPU: let it get ahead again, before the first call too
                flush()
        for name in names:
            if events:
                flush()
                times[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                times[name][0].record()
                functions[name]()
                times[name][1].record()
            else:
                start = time.perf_counter()
                functions[name]()
                times[name] = (time.perf_counter() - start) * 1e3
        if events:
            torch.cuda.synchronize()
            times = {name: start.elapsed_time(end) for name, (start, end) in times.items()}
        return times

    deadline = time.perf_counter() + warm_up_seconds
    turn()
    while time.perf_counter() < deadline:
        turn()
    turns = [turn() for _ in range(repeats)]
    return {name: [times[name] for times in turns] for name in functions}


def _environment():
    if torch.cuda.is_available():
        arch = _architecture(*torch.cuda.get_device_capability())
        where = f"{torch.cuda.get_device_name()} (sm_{arch}), CUDA {torch.version.cuda}"
    else:
        arch = None
        where = f"CPU ({torch.get_num_threads()} threads), no CUDA device: the operator's CPU implementation"
    hint = "" if arch == "90a" else "\nLarge gains need a GPU of compute capability 9.0 (H100, H200)."
    return f"{where}, torch {torch.__version__}, Python {platform.python_version()}{hint}"


def _compiled(model, x):
    """torch.compile(model), or None and why not: whatever goes wrong in this rival, the other rows still stand."""
    # It tells those who have no GPU which toolkit it found.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with _Caught(Exception) as caught:
        compiled = torch.compile(model)
        compiled(x)
        return compiled, None
    message, *_ = str(caught.error).partition("Set TORCHDYNAMO_VERBOSE")
    return None, f"{type(caught.error).__name__}: {_first_error(message)}"


def _free_memory():
    """Bytes, of the GPU or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="utf-8") as file:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", file.read()).group(1))


def _parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="model_new.py",
        description="Checks ModelNew against Model and against float64, then times both and torch.compile(Model).",
        epilog="Exit status: 0, 1 where a check failed, 2 where it could not be made.",
    )
    parser.add_argument(
        "--shape", default=f"{batch_size},{input_size},{hidden_size}", metavar="M,K,N", help="default %(default)s"
    )
    parser.add_argument("--dtype", choices=_DTYPE_NAMES, default="float32", help="default %(default)s")
    parser.add_argument(
        "--precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="torch.set_float32_matmul_precision: how precise float32 products must be (default %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to FILE as a list of objects")
    parser.add_argument(
        "--export", metavar="FILE", help="write one self-contained file with kernels.cu inside, and stop"
    )
    parser.add_argument(
        "--build",
        metavar="ARCH,...",
        help="compile kernels.cu for machines whose GPUs have these compute capabilities (90 for H100 and H200), which "
        "need not be here, print the libraries' paths, and stop",
    )
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"\d+,\d+,\d+", arguments.shape) or 0 in map(int, arguments.shape.split(",")):
        parser.error(f"--shape: expected three positive numbers M,K,N, got {arguments.shape!r}")
    arguments.shape = tuple(map(int, arguments.shape.split(",")))
    if arguments.build is not None:
        if not re.fullmatch(r"\d{2,3}a?(,\d{2,3}a?)*", arguments.build):
            parser.error(f"--build: expected compute capabilities such as 80,90a, got {arguments.build!r}")
        numbers = [arch.rstrip("a") for arch in arguments.build.split(",")]
        arguments.build = [_architecture(int(number[:-1]), int(number[-1])) for number in numbers]
    sources = [os.path.join(_folder(), "kernels.cu"), os.path.abspath(globals().get("__file__", "model_new.py"))]
    for option in ("json", "export"):
        path = getattr(arguments, option)
        if path is None:
            continue
        folder = os.path.dirname(os.path.abspath(path))
        if not path or os.path.isdir(path):
            parser.error(f"--{option}: expected a file, got {path!r}")
        if not os.path.isdir(folder):
            parser.error(f"--{option}: there is no folder {folder}")
        if not os.access(path if os.path.exists(path) else folder, os.W_OK):
            parser.error(f"--{option}: {path} cannot be written")
        if os.path.realpath(path) in map(os.path.realpath, sources):
            parser.error(f"--{option}: {path} is what this script is made of")
    return arguments


def export(path):
    """Writes this script with the text of kernels.cu inside to `path`: one file that needs no other."""
    with open(os.path.abspath(__file__), encoding="utf-8") as file:
        script = file.read()
    embedded = f"KERNELS_SOURCE = r'''{_kernels_source()}'''\n"
    with open(path, "w", encoding="utf-8") as file:
        file.write(script.replace("KERNELS_SOURCE = None\n", embedded, 1))  # nothing to replace in an exported file


@torch.no_grad()
def main(argv=None):
    """The built-in check and timing. Returns the exit status: 0, 1 when a check failed, 2 when it could not be made."""
    arguments = _parse_arguments(argv)
    if arguments.export:
        export(arguments.export)
        print(f"wrote {arguments.export}")
        return 0
    if arguments.build:
        for arch in arguments.build:
            print(build([arch]))
        return 0
    torch.set_float32_matmul_precision(arguments.precision)
    (rows, k, n), dtype = arguments.shape, _DTYPE_NAMES[arguments.dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(_environment())

    # Two layers and their outputs, and in float64 W, x, their magnitudes, and what is computed from them.
    size = dtype.itemsize
    needed = (2 * size + 16) * n * k + (size + 16) * rows * k + (3 * size + 32) * rows * n
    if needed > (free := _free_memory()):
        print(f"this shape needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free", file=sys.stderr)
        return 2

    models = {}
    for kind in (Model, ModelNew):
        torch.manual_seed(0)
        models[kind] = kind(k, n, scaling_factor).to(device=device, dtype=dtype)
    reference, new = models[Model], models[ModelNew]
    weight, bias = new.gemm.weight, new.gemm.bias
    x = torch.rand(rows, k, device=device, dtype=dtype)
    print(
        f"x [{rows}, {k}], W [{n}, {k}], {arguments.dtype}, float32 matmul precision '{arguments.precision}', "
        f"kernel: {select_kernel(x, weight, bias)}"
    )

    tolerance = allclose_tolerance(dtype, arguments.precision)
    out_reference, out_new = reference(x), new(x)
    same_weights = all(torch.equal(a, b) for a, b in zip(reference.state_dict().values(), new.state_dict().values()))
    functions = {"Model, eager": lambda: reference(x)}
    compiled, why_not = _compiled(reference, x)
    outputs = {"Model, eager": out_reference, "ModelNew": out_new}
    if compiled is not None:
        functions["Model, torch.compile"] = lambda: compiled(x)
        outputs["Model, torch.compile"] = compiled(x)
    functions["ModelNew"] = lambda: new(x)
    errors = errors_against_float64(outputs, x, weight, bias, scaling_factor)
    checks = {
        "ModelNew and Model draw the same weights from one seed": same_weights,
        f"ModelNew is Model to {tolerance:g} (allclose)": torch.allclose(out_new, out_reference, tolerance, tolerance),
        f"ModelNew is float64 to {tolerance:g} (Frobenius)": errors["ModelNew"][0] < tolerance,
    }
    for name, good in checks.items():
        print(f"{'ok  ' if good else 'FAIL'} {name}")
    times = times_in_turns(functions, repeats=50 if device == "cuda" else 3)
    times = {name: statistics.median(values) for name, values in times.items()}

    print(f"\n{'':22}{'ms':>10}{'speedup':>10}{'error vs float64':>19}{'componentwise':>16}")
    results = []
    for name, ms in times.items():
        frobenius, componentwise = errors[name]
        speedup = times["Model, eager"] / ms
        print(f"{name:22}{ms:10.4f}{speedup:9.2f}x{frobenius:19.2e}{componentwise:16.2e}")
        results.append(
            {
                "name": name,
                "precision": arguments.precision,
                "dtype": arguments.dtype,
                "shape": [rows, k, n],
                "ms": ms,
                "speedup": speedup,
                "error_frobenius": frobenius,
                "error_componentwise": componentwise,
                "torch": torch.__version__,
                "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            }
        )
    if why_not:
        print(f"Model, torch.compile: not timed, because {why_not}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    with _Caught(BrokenPipeError) as reader_gone:  # as with `| head`
        status = main()
        sys.stdout.flush()
    if reader_gone.error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
    sys.exit(1 if reader_gone.error else status)
