"""A linear layer with a scaled sigmoid residual, as one PyTorch operator over hand-written CUDA.

    z   = x·Wᵀ + b                    x [..., K]   W [N, K]   b [N]
    out = z + s·sigmoid(z)            out [..., N]

This is problem 70 of KernelBench's level 2 (reference: x [1024, 8192], K = N = 8192, s = 2, float32).
`Model` is the reference in plain PyTorch, `ModelNew` replaces it: same constructor, same parameters, same
random numbers drawn, same answers. Device code is in kernels.cu, which is built when this file is imported
on a machine with a CUDA device. Without one, the same operator runs its CPU implementation.

    python model_new.py                  check, then time, against Model on the reference shape
    python model_new.py --help           other shapes, dtypes, precisions; JSON; single-file export; building
"""

import argparse
import ctypes
import fcntl
import functools
import glob
import hashlib
import importlib.util
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
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad

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


# ---------------------------------------------------------------------------------------- building kernels.cu


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
    depends_on = [source, nvcc_flags(archs), torch.__version__, torch.version.cuda, sysconfig.get_config_var("SOABI")]
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


_POINTER, _INT64, _DOUBLE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int


def _load(path):
    """The library's functions with their argument types; see the bindings at the end of kernels.cu."""
    library = ctypes.CDLL(path)
    library.error_string.restype = ctypes.c_char_p
    library.epilogue_forward.argtypes = [_POINTER] * 2 + [_INT64, _DOUBLE, _INT, _INT, _POINTER]
    library.epilogue_backward.argtypes = [_POINTER] * 5 + [_INT64] * 3 + [_DOUBLE, _INT, _INT, _POINTER]
    library.linear_hopper_scratch.argtypes = [_INT64] * 3 + [_INT]
    library.linear_hopper_scratch.restype = _INT64
    library.linear_hopper.argtypes = [_POINTER] * 6 + [_INT64] * 5 + [_DOUBLE] + [_INT] * 5 + [_POINTER]
    library.pad_rows.argtypes = [_POINTER] * 2 + [_INT64] * 4 + [_INT] * 2 + [_POINTER]
    return library


_archs = architectures()
_cuda = _load(build(_archs)) if _archs else None
_hopper_devices = {  # asks CUDA, which is initialized by that, only where there are several kinds of GPU
    i
    for i in range(torch.cuda.device_count() if "90a" in _archs else 0)
    if len(_archs) == 1 or torch.cuda.get_device_capability(i) == (9, 0)
}

# ------------------------------------------------------------------------------------------------ the operator

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}  # DType in kernels.cu


def _describe(**tensors):
    return ", ".join(f"{name} {list(t.shape)} {t.dtype} on {t.device}" for name, t in tensors.items())


def _check(x, weight, bias):
    """Raises RuntimeError, in nn.Linear's words, unless x [..., K], weight [N, K] and bias [N] fit together."""
    if weight.dim() != 2 or bias.dim() != 1 or x.dim() == 0 or bias.numel() != weight.size(0):
        raise RuntimeError(
            "linear_sigmoid_residual(): expected x [..., K], weight [N, K] and bias [N], got "
            + _describe(x=x, weight=weight, bias=bias)
        )
    if x.size(-1) != weight.size(1):
        rows = math.prod(x.shape[:-1])
        raise RuntimeError(
            f"linear_sigmoid_residual(): mat1 and mat2 shapes cannot be multiplied ({rows}x{x.shape[-1]} and "
            f"{weight.shape[1]}x{weight.shape[0]}): expected x [..., {weight.shape[1]}], got "
            + _describe(x=x, weight=weight)
        )
    if not x.dtype == weight.dtype == bias.dtype:
        raise RuntimeError(
            "linear_sigmoid_residual(): mat1 and mat2 must have the same dtype, but got "
            + _describe(x=x, weight=weight, bias=bias)
        )
    if not x.device == weight.device == bias.device:
        raise RuntimeError(
            "linear_sigmoid_residual(): Expected all tensors to be on the same device, but got "
            + _describe(x=x, weight=weight, bias=bias)
        )
    if x.dtype not in _DTYPES:
        raise RuntimeError(
            f"linear_sigmoid_residual(): not implemented for {x.dtype}: expected float32, float16, bfloat16 or "
            "float64, got " + _describe(x=x, weight=weight, bias=bias)
        )


def select_kernel(x, weight, bias):
    """The name of the implementation that serves a call with these arguments; on Hopper, `select_tile` decides.

    "cpu"            PyTorch's operators, on tensors that are not on a GPU.
    On a GPU of compute capability 9.0 (H100, H200), kernels.cu's fused kernel, where `select_tile` expects it to be
    faster than the library and W's entries are contiguous along k:
    "fp16x3"         float32 from three fp16 tensor-core products, more accurate than SGEMM on ordinary data (README.md,
                     Accuracy, says where not), while PyTorch asks for full float32 products
                     (torch.set_float32_matmul_precision("highest"), the default).
    "fp16x1"         float32 from one fp16 product, as accurate as TF32, where PyTorch allows that ("high", "medium").
    "fp16x1_staged"  the same, from a copy of W in fp16 that lives for the call: for many rows.
    "wgmma16"        float16 and bfloat16.
    "library"        cuBLAS, then kernels.cu's fused epilogue: everything else on a GPU.
    """
    _check(x, weight, bias)
    if not x.is_cuda:
        return "cpu"
    tile = _tile_of(x, weight)
    return tile[0] if tile else "library"


def _tile_of(x, weight):
    """What select_tile says of the product of two tensors on a GPU."""
    n, k = weight.shape
    # The size, as select_tile asks too, comes first: for small layers what follows is a part of a call's cost.
    if n * k < _SMALLEST_W or x.device.index not in _hopper_devices or x.dtype == torch.float64:
        return None
    if weight.stride(1) != 1:
        return None
    precision = "16 bit" if x.dtype != torch.float32 else "tf32" if _allows_tf32() else "float32"
    return select_tile(precision, x.numel() // k, n, k)


def _allows_tf32():
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


_SMALLEST_W = 2**19  # entries; smaller ones were not measured: their time is their launches


@functools.lru_cache(maxsize=4096)
def select_tile(precision, m, n, k, transposed=False):
    """How kernels.cu serves x [m, k], W [n, k] on Hopper: (kernel, rows, splits), or None where the library does.

    precision: "float32", "tf32" or "16 bit". kernel: a name that `select_kernel` returns. rows: of out that a block
    computes, by 128 columns. splits: blocks that share a tile, each with a part of K; 0 where pairs of blocks share an
    operand. transposed: W comes as [k, n], and its rows in multiples of 16 bytes.

    Each rule is from times on an H200 of every tile beside the library's GEMM and fused epilogue, in CUDA graphs: M
    from 1 to 1024 with fifteen (K, N) from (1024, 512) to (16384, 4096), and larger M before. Those of half a wave are
    from an H100 and ten (K, N).
    """
    if m == 0 or n < 512 or n * k < _SMALLEST_W or max(m, n, k) > 2**31 - 2048:
        return None  # fewer columns were not measured: a long K would leave most SMs without work
    # Where rows are not in multiples of 16 bytes W is copied, and cuBLAS drops to a quarter of its rate.
    aligned = transposed or k % (8 if precision == "16 bit" else 4) == 0
    work = m * n * k

    if not aligned and m <= 64:
        return None  # as fast as the copy of W and the kernel, or faster
    tile = min(_tiles(precision, m, n, k), key=lambda tile: _microseconds(m, n, k, *tile))
    kernel, rows, _ = tile
    # Whether enough SMs have work to stream W at full rate.
    is_full = _blocks(m, n, *tile) >= 120
    if precision == "float32":
        # SGEMM is behind everywhere, but its GEMV, which serves one row, only where W is large and all SMs read it.
        # Below K = 256 it is more accurate, and up to 512 its error is about the kernel's.
        least = 1 if is_full and n * k >= 2**24 else 2
        serves = k >= 512 and m >= least
    elif precision == "tf32":
        if not aligned:
            if m > 640:
                tile = "fp16x1_staged", 256, 0
            # Above 640 rows a rounded copy pays; from 257 on short sums leave the library ahead.
            many = work >= 2**30 if m > 640 else m <= 256 or k >= 1000
            serves = many and k >= 512
        elif m <= 64 or (m <= 128 and k >= 2 * n):
            # For a row cuBLAS has its GEMV; for more than 32 it streams W as fast, unless N gives it few tiles.
            if m == 1:
                serves = n * k >= 2**24 and is_full
            else:
                serves = m <= 32 or n * k >= 2**26 or (k >= 2 * n and (m > 64 or n * k < 2**25))
        else:
            # Ahead once tiles of 256 rows keep the SMs busy, and long enough. In a single wave half of the SMs are
            # enough, if both blocks of a cluster have rows and cuBLAS' tiles of 128 x 128 need two waves.
            # What the L2 cache delivers binds the kernel: at 4096 rows it pays to copy W in fp16, at 2048 not yet.
            tile = ("fp16x1_staged" if m > 2048 else kernel), 256, 0
            is_one_wave = m > 256 and _waves(m, n, *tile) == 1 < _waves(m, n, kernel, 128, 1)
            least = 0.485 if is_one_wave else 0.6
            serves = _occupied(m, n, tile[0]) >= least and work >= (2**33 if k >= 2048 else 1.2e10)
    elif not aligned:
        serves = True
    elif m <= 64:  # one launch instead of two where W is small; equal where it is large and all SMs read it
        serves = n * k <= 2**24 or is_full
    else:
        # Where N is small one launch still counts; where out is large, that the fused epilogue saves a pass over it, 1
        # to 20 % of the time. But where tiles leave SMs idle cuBLAS has some that fit better, up to 1.7 times as fast,
        # and where they are not full of rows: of 8192 x 8192, 900 take 9 % longer than the library, 1000 3 % less.
        fills = rows == 256 and m >= 0.96 * 256 * math.ceil(m / 256) and _occupied(m, n, kernel) >= 0.86
        serves = (m <= 192 and n <= 1024) or (m * n >= 2**22 and fills)
    return tile if serves else None


def _weight_bytes(kernel, n, k):
    return (2 if kernel == "wgmma16" else 4) * n * k


_KERNELS = {"float32": "fp16x3", "tf32": "fp16x1", "16 bit": "wgmma16"}  # that split K


def _tiles(precision, m, n, k):
    """The tiles that may be the best, of all but "fp16x1_staged"."""
    kernel = _KERNELS[precision]
    for rows in (16, 32, 64, 128):
        # Tiles of more than twice M's rows, or of less than a sixth, are never the best; 128 rows may be, for any M.
        if rows == 128 or (rows <= max(16, 2 * m - 1) and m <= 6 * rows):
            yield from ((kernel, rows, splits) for splits in (1, 2, 3, 4) if splits <= -(-k // 64))
    yield kernel, 256, 0
    if kernel == "fp16x3":
        yield kernel, 128, 0


def _blocks(m, n, kernel, rows, splits):
    """The blocks of a launch in such tiles."""
    if splits:
        return math.ceil(m / rows) * math.ceil(n / 128) * splits
    if rows == 256 and kernel in ("fp16x3", "fp16x1"):  # pairs of blocks share W
        return math.ceil(m / (2 * rows)) * 2 * math.ceil(n / 128)
    return math.ceil(m / rows) * math.ceil(n / 256) * 2  # they share x


def _waves(m, n, kernel, rows, splits):
    """How often the SMs must be filled with such blocks."""
    return math.ceil(_blocks(m, n, kernel, rows, splits) / _RESIDENT[splits])


def _occupied(m, n, kernel):
    """What a launch in tiles of 256 rows does, of what all SMs could do in as many waves."""
    return m * n / (256 * 128 * _RESIDENT[0] * _waves(m, n, kernel, 256, 0))


class _Costs(NamedTuple):
    """Microseconds on an H200, fitted to the times that `select_tile` is made from: with them the tile that it chooses
    takes 1 % more than the best, on average.

    split_k, shared: for a block of 64 k, by the tile's rows. tile: to begin and to end one. row, split: more for each
    row of out and each block that shares it, where blocks add up. stream: to start and to end reading W. megabyte: of
    W.
    """

    split_k: dict
    shared: dict
    tile: float
    row: float
    stream: float
    megabyte: float
    split: float = 0.09


_COSTS = {
    "fp16x3": _Costs(
        {16: 0.643, 32: 0.69, 64: 0.808, 128: 1.294}, {128: 1.248, 256: 2.325}, 3.49, 0.023, 4.1, 0.294, 0.156
    ),
    "fp16x1": _Costs({16: 0.56, 32: 0.65, 64: 0.68, 128: 0.85}, {256: 1.05}, 2.9, 0.029, 3.4, 0.264),
    "wgmma16": _Costs({16: 0.264, 32: 0.313, 64: 0.34, 128: 0.48}, {256: 0.708}, 3.0, 0.021, 3.4, 0.251),
}
# A single cluster's time with 1, 2 or 3 of its four panels of 128 rows: those that x does not fill are left out.
_OF_A_CLUSTER = {1: 0.56, 2: 0.8, 3: 0.89}
_RESIDENT = {0: 132, 1: 132, 2: 132, 3: 117, 4: 120}  # blocks that run at once, by splits: clusters must fit the GPCs


def _microseconds(m, n, k, kernel, rows, splits):
    """A tile's estimated time but for what all have in common. As `select_tile`."""
    costs = _COSTS[kernel]
    blocks_of_k = math.ceil(math.ceil(k / 64) / max(splits, 1))
    per_block = (costs.split_k if splits else costs.shared)[rows]
    if kernel == "fp16x3" and rows == 256:
        per_block *= _OF_A_CLUSTER.get(math.ceil(m / 128), 1.0)
    per_tile = costs.tile + (costs.split * splits + costs.row * rows if splits else 0)
    megabytes = _weight_bytes(kernel, n, k) / 1e6
    compute = _waves(m, n, kernel, rows, splits) * (blocks_of_k * per_block + per_tile)
    return max(compute, costs.stream + costs.megabyte * megabytes)


def _rows(t):
    """t as [M, its last size]. (-1 would be ambiguous for an empty t.)"""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _linear(x, weight, bias):
    """nn.functional.linear, contiguous, as one GEMM that adds the bias before it rounds: for a non-contiguous x of more
    than two dimensions PyTorch's own is two kernels and rounds twice.
    """
    z = nn.functional.linear(_rows(x), weight, bias)
    # Not a view, as nn.functional.linear's own result is none: autograd watches views made without gradients.
    return z if x.dim() == 2 else torch.ops.aten._unsafe_view(z, (*x.shape[:-1], weight.shape[0]))


def _compute_dtype(dtype):
    """The type in which the epilogue is computed: float32 for 16-bit storage. compute_t in kernels.cu."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward_cpu(x, weight, bias, scale):
    return _forward_with_z_cpu(x, weight, bias, scale)[0]


def _forward_with_z_cpu(x, weight, bias, scale):
    _check(x, weight, bias)
    z = _linear(x, weight, bias)
    wide = z.to(_compute_dtype(z.dtype))
    return torch.sigmoid(wide).mul_(scale).add_(wide).to(z.dtype), z


def _backward_z_cpu(grad, z, scale):
    p = torch.sigmoid(z.to(_compute_dtype(z.dtype)))
    dz = torch.addcmul(torch.ones_like(p), p, 1 - p, value=scale).mul_(grad)
    return dz.to(z.dtype).contiguous(), _rows(dz).sum(0).to(z.dtype)


def _launch(function, device, *arguments):
    """Calls a function of kernels.cu on a device and that device's current stream; raises RuntimeError on its error."""
    error = function(*arguments, device.index, torch._C._cuda_getCurrentRawStream(device.index))
    if error:
        raise RuntimeError(f"{function.__name__} failed: CUDA error {error}, {_cuda.error_string(error).decode()}")


def _epilogue_cuda(z, out, scale):
    """out = z + scale·sigmoid(z) elementwise on contiguous tensors; out may be z."""
    arguments = z.data_ptr(), out.data_ptr(), z.numel(), scale, _DTYPES[z.dtype]
    _launch(_cuda.epilogue_forward, z.device, *arguments)
    return out


def _in_rows(t):
    """Whether the rows of a matrix t are contiguous, do not overlap, and eight rows are less than TMA's 2^40 bytes."""
    return t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) * t.element_size() < 2**37


def _in_16_bytes(t):
    """Whether the rows of a matrix t can be read by TMA: as `_in_rows`, beginning at multiples of 16 bytes."""
    return _in_rows(t) and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def _padded(t):
    """A copy of a matrix t, with zeros behind its rows up to a multiple of 16 bytes."""
    t = t if t.stride(1) == 1 else t.contiguous()
    (rows, k), multiple = t.shape, 16 // t.element_size()
    copy = t.new_empty(rows, -(-k // multiple) * multiple)
    arguments = t.data_ptr(), copy.data_ptr(), t.stride(0), rows, k, copy.shape[1], t.element_size()
    _launch(_cuda.pad_rows, t.device, *arguments)
    return copy


_CONVERSIONS = {"wgmma16": 0, "fp16x3": 1, "fp16x1": 2, "fp16x1_staged": 3}  # Conversion in kernels.cu
_SPLIT_TRANSPOSED = 4


def _hopper_cuda(tile, x, weight, bias, scale, with_z=False):
    """(out, z or None) by kernels.cu's fused kernel; tile: as from `select_tile`."""
    (n, k), (kernel, *shape) = weight.shape, tile
    m, conversion = x.numel() // k, _CONVERSIONS[kernel]
    out = x.new_empty((*x.shape[:-1], n))
    z = torch.empty_like(out) if with_z else None
    x, bias = _rows(x), bias.contiguous()
    in_16_bytes = _in_16_bytes(weight)
    if not in_16_bytes and not _in_rows(weight):
        weight = weight.contiguous()
        in_16_bytes = _in_16_bytes(weight)
    if in_16_bytes and (kernel == "wgmma16" or k % 4 == 0):
        x = x if _in_16_bytes(x) else _padded(x)
    else:
        x, weight = _padded(x), _padded(weight)
        k = x.shape[1]
    _launch_hopper(conversion, shape, x, weight, bias, out, z, (m, n, k), scale)
    return out, z


def _launch_hopper(conversion, shape, x, weight, bias, out, z, sizes, scale):
    """linear_hopper of kernels.cu, with its scratch memory; shape: (rows, splits) of the tile, sizes: (m, n, k)."""
    dtype, strides, scratch = _DTYPES[x.dtype], (x.stride(0), weight.stride(0)), None
    if conversion:
        scratch_bytes = _cuda.linear_hopper_scratch(*sizes, conversion)
        scratch = x.new_empty(scratch_bytes // x.element_size())
    pointers = [0 if t is None else t.data_ptr() for t in (x, weight, bias, out, z, scratch)]
    _launch(_cuda.linear_hopper, x.device, *pointers, *strides, *sizes, scale, dtype, conversion, *shape)


def _matmul_cuda(a, b):
    """a·b, for a [m, k] and b [k, n]: the backward's products, in float32 by the kernel that serves the forward."""
    (m, k), n = a.shape, b.shape[1]
    may_serve = a.device.index in _hopper_devices and a.dtype == torch.float32 and not _allows_tf32()
    tile = select_tile("float32", m, n, k, transposed=True) if may_serve and _in_16_bytes(b) else None
    if tile is None:
        return a.mm(b)
    a = a if _in_rows(a) else a.contiguous()
    a = a if _in_16_bytes(a) and k % 4 == 0 else _padded(a)
    out = a.new_empty(m, n)
    _launch_hopper(_SPLIT_TRANSPOSED, tile[1:], a, b, None, out, None, (m, n, k), 0.0)
    return out


def _library_cuda(x, weight, bias, scale):
    z = _linear(x, weight, bias)
    return _epilogue_cuda(z, z, scale)  # in place: no one else needs z


def _forward_cuda(x, weight, bias, scale):
    _check(x, weight, bias)
    tile = _tile_of(x, weight)
    return _hopper_cuda(tile, x, weight, bias, scale)[0] if tile else _library_cuda(x, weight, bias, scale)


def _forward_with_z_cuda(x, weight, bias, scale):
    _check(x, weight, bias)
    tile = _tile_of(x, weight)
    if tile:
        return _hopper_cuda(tile, x, weight, bias, scale, with_z=True)
    z = _linear(x, weight, bias)
    return _epilogue_cuda(z, torch.empty_like(z), scale), z


def _backward_z_cuda(grad, z, scale):
    grad, z, cols = grad.contiguous(), z.contiguous(), z.shape[-1]
    dz, dbias, rows = torch.empty_like(z), z.new_empty(cols), z.numel() // cols if cols else 0
    if rows == 0:
        return dz, dbias.zero_()
    strips = min(128, (rows + 63) // 64)  # of rows: enough blocks to fill the GPU, few enough partial sums
    partial_sums = z.new_empty((strips, cols), dtype=_compute_dtype(z.dtype))
    pointers = grad.data_ptr(), z.data_ptr(), dz.data_ptr(), partial_sums.data_ptr(), dbias.data_ptr()
    _launch(_cuda.epilogue_backward, z.device, *pointers, rows, cols, strips, scale, _DTYPES[z.dtype])
    return dz, dbias


def _forward_fake(x, weight, bias, scale):
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _forward_with_z_fake(x, weight, bias, scale):
    return _forward_fake(x, weight, bias, scale), _forward_fake(x, weight, bias, scale)


def _backward_z_fake(grad, z, scale):
    return z.new_empty(z.shape), z.new_empty(z.shape[-1])


def _matmul_fake(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


def _dispatch_keys(*names):
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys


# What PyTorch knows of an ordinary CUDA tensor, and nothing else: not batched, not lazily negated, no subclass.
_PLAIN_TYPES = {torch.Tensor, nn.Parameter}
_PLAIN_KEYS = _dispatch_keys("CUDA", "ADInplaceOrView", "AutogradCUDA", "AutocastCUDA")


def _is_plain(*tensors):
    """Whether below autograd the dispatcher would do nothing for these tensors but call their CUDA implementation.

    True for plain CUDA tensors, with no mode, transform or profiler that wants to see every operator. They are then
    served directly: a round through the dispatcher, back into Python, costs the host some microseconds.
    """
    if torch.compiler.is_compiling():  # first: it cannot trace what follows
        return False
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    ):
        return False
    plain = True
    for t in tensors:  # all() of a generator takes twice the time
        plain = plain and type(t) in _PLAIN_TYPES and torch._C._dispatch_keys(t) == _PLAIN_KEYS
    return plain


def _is_watched():
    """Whether something above autograd would notice that the operator was not called through the dispatcher."""
    return (
        torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cuda")
        or torch._C._get_tracing_state() is not None
    )


def _below_autograd(operator, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _without_autograd(operator, cuda_kernel, tensors, *scale):
    """What the dispatcher makes of `operator` below autograd."""
    if _is_plain(*tensors):
        return cuda_kernel(*tensors, *scale)
    return _below_autograd(operator, *tensors, *scale)


def _matmul(a, b):
    """a·b for the backward; by PyTorch's own where the gradient must be differentiable, and where ours never serves."""
    if a.is_cuda and a.dtype == torch.float32 and b.numel() >= _SMALLEST_W and not torch.is_grad_enabled():
        return _without_autograd(_matmul_op, _matmul_cuda, (a, b))
    return a.mm(b)


class _LinearSigmoidResidual(torch.autograd.Function):
    """Keeps z for the backward (eager keeps sigmoid(z): the same memory)."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, is_plain):
        if is_plain:
            out, z = _forward_with_z_cuda(x, weight, bias, scale)
        else:
            out, z = _below_autograd(_forward_with_z_op, x, weight, bias, scale)
        ctx.save_for_backward(x, weight, bias, z)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, z = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: the gradient must be differentiable itself, so it is written in PyTorch's operators,
            # from a z that depends on x, weight and bias. Costs a GEMM; any order of derivative works.
            with torch.autocast(x.device.type, enabled=False):
                p = torch.sigmoid(nn.functional.linear(x, weight, bias))
            dz = grad * (1 + ctx.scale * p * (1 - p))
            dbias = _rows(dz).sum(0)
        else:
            dz, dbias = _without_autograd(_backward_z_op, _backward_z_cuda, (grad, z), ctx.scale)
            ctx.maybe_clear_saved_tensors()  # z is done with, unless the graph is retained
        del z
        needs_dx, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
        dz_rows = _rows(dz)
        dweight = _matmul(dz_rows.t(), _rows(x)) if needs_dweight else None  # first: it takes more memory
        dx = _matmul(dz_rows, weight) if needs_dx else None
        if needs_dx and x.dim() != 2:
            dx = dx.view(x.shape)
        return dx, dweight, dbias if needs_dbias else None, None, None


def _wants_gradient(x, weight, bias):
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)


def _forward_plain(x, weight, bias, scale):
    """What the dispatcher makes of the operator for tensors that `_is_plain` calls so, from autograd on."""
    if _wants_gradient(x, weight, bias):
        return _LinearSigmoidResidual.apply(x, weight, bias, scale, True)
    return _forward_cuda(x, weight, bias, scale)


def _forward_autograd(x, weight, bias, scale):
    if forward_ad._current_level >= 0:  # forward-mode: PyTorch's operators, which know their tangents
        _check(x, weight, bias)
        z = nn.functional.linear(x, weight, bias)
        return torch.sigmoid(z) * scale + z
    if _is_plain(x, weight, bias):
        return _forward_plain(x, weight, bias, scale)
    if _wants_gradient(x, weight, bias):
        return _LinearSigmoidResidual.apply(x, weight, bias, scale, False)
    return _below_autograd(_forward_op, x, weight, bias, scale)


def _forward_autocast(device_type):
    def forward(x, weight, bias, scale):
        dtype = torch.get_autocast_dtype(device_type)
        # As autocast does for linear: float64 is left alone.
        x, weight, bias = (
            t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, weight, bias)
        )
        with torch.autocast(device_type, enabled=False):
            return _forward_op(x, weight, bias, scale)

    return forward


def _register(source_digest):
    """Defines torch.ops.linear_sigmoid_residual.{forward, forward_with_z, backward_z, matmul}, once per process.

    A script exec'd a second time finds them defined and uses them. They last as long as the process: where they were
    defined with another kernels.cu, RuntimeError says so (a change to this file alone is not noticed).
    """
    namespace = torch.ops.linear_sigmoid_residual
    if hasattr(namespace, "forward"):
        if namespace.source_digest != source_digest:
            raise RuntimeError(
                "another version of model_new.py has defined torch.ops.linear_sigmoid_residual in this process; "
                "restart Python to load this one"
            )
        return
    library = torch.library.Library("linear_sigmoid_residual", "DEF")
    tags = torch.Tag.pt2_compliant_tag
    forward_arguments = "(Tensor x, Tensor weight, Tensor bias, float scale)"
    library.define("forward" + forward_arguments + " -> Tensor", tags=tags)
    library.define("forward_with_z" + forward_arguments + " -> (Tensor, Tensor)", tags=tags)
    library.define("backward_z(Tensor grad, Tensor z, float scale) -> (Tensor, Tensor)", tags=tags)
    library.define("matmul(Tensor a, Tensor b) -> Tensor", tags=tags)
    for name, cpu, cuda, fake in (
        ("forward", _forward_cpu, _forward_cuda, _forward_fake),
        ("forward_with_z", _forward_with_z_cpu, _forward_with_z_cuda, _forward_with_z_fake),
        ("backward_z", _backward_z_cpu, _backward_z_cuda, _backward_z_fake),
        ("matmul", torch.mm, _matmul_cuda, _matmul_fake),
    ):
        library.impl(name, cpu, "CPU")
        library.impl(name, cuda, "CUDA")
        torch.library.register_fake(f"linear_sigmoid_residual::{name}", fake, lib=library)
    library.impl("forward", _forward_autograd, "Autograd")
    library.impl("forward", _forward_autocast("cuda"), "AutocastCUDA")
    library.impl("forward", _forward_autocast("cpu"), "AutocastCPU")
    namespace.source_digest = source_digest
    namespace.library = library  # its end would undo the definitions: tie it to the process, not to these globals


_register(hashlib.sha256((_kernels_source() if _cuda else "cpu").encode()).hexdigest())
# The overloads themselves: finding them by name costs every call a microsecond.
_forward_op = torch.ops.linear_sigmoid_residual.forward.default
_forward_with_z_op = torch.ops.linear_sigmoid_residual.forward_with_z.default
_backward_z_op = torch.ops.linear_sigmoid_residual.backward_z.default
_matmul_op = torch.ops.linear_sigmoid_residual.matmul.default


def linear_sigmoid_residual(x, weight, bias, scale):
    """z + scale·sigmoid(z) with z = x·weightᵀ + bias, as one operator of PyTorch's dispatcher.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64; any strides.
        weight: [N, K], bias: [N]; dtype and device of x.
        scale: a number; no gradient is computed for it.
    Returns: [..., N], contiguous, dtype and device of x. 16-bit: the GEMM's result z is rounded once, the rest is
        computed in float32 and rounded once. `select_kernel` tells which implementation serves a call.
    Differentiable in x, weight and bias, to any order.
    Raises: TypeError for a non-tensor or for a scale that requires a gradient, RuntimeError for shapes, dtypes or
        devices that do not fit and for a scale that is no number, before any launch.
    """
    if type(scale) is int and abs(scale) < 2**53:
        scale = float(scale)
    if type(scale) is float and _is_plain(x, weight, bias) and not _is_watched():
        return _forward_plain(x, weight, bias, scale)
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not (isinstance(value, torch.Tensor) or hasattr(type(value), "__torch_function__")):  # as fx's proxies
            raise TypeError(f"linear_sigmoid_residual(): argument '{name}' must be Tensor, not {type(value).__name__}")
    if isinstance(scale, torch.Tensor) and scale.requires_grad:
        raise TypeError("linear_sigmoid_residual(): argument 'scale' requires a gradient, and none is computed for it")
    return _forward_op(x, weight, bias, scale)


# ------------------------------------------------------------------------------------------------- the module


class ModelNew(nn.Module):
    """Drop-in for `Model`: same constructor, parameters (`gemm.weight` [N, K], `gemm.bias` [N]) and random draws.

    Args: input_size (K), hidden_size (N), scaling_factor (s). Input [..., K], output [..., N].
    `gemm` holds the parameters and draws them; its own forward is not called. Except where it is not nn.Linear's, or
    has hooks, as pruning, spectral_norm, fully_shard, ColwiseParallel, LoRA and quantization give it: those must see
    its input and what it returns, so the layer is then computed as `Model` does it, with PyTorch's operators. Nothing
    is cached between calls.
    """

    def __init__(self, input_size, hidden_size, scaling_factor):
        super().__init__()
        self.gemm = nn.Linear(input_size, hidden_size)
        self.scaling_factor = scaling_factor

    def forward(self, x):
        gemm = self._modules["gemm"]  # finding it as an attribute costs every call half a microsecond, parameters too
        if (
            gemm._forward_pre_hooks
            or gemm._forward_hooks
            or gemm._backward_hooks
            or gemm._backward_pre_hooks
            or "forward" in gemm.__dict__
            or type(gemm).forward is not nn.Linear.forward
        ):
            return Model.forward(self, x)
        weight, bias = gemm._parameters.get("weight"), gemm._parameters.get("bias")
        if weight is None or bias is None:  # as with parametrizations, which compute it
            weight, bias = gemm.weight, gemm.bias
        return linear_sigmoid_residual(x, weight, bias, self.scaling_factor)

    def extra_repr(self):
        return f"scaling_factor={self.scaling_factor}"


batch_size, input_size, hidden_size, scaling_factor = 1024, 8192, 8192, 2.0


def get_inputs():
    """[x] with x [1024, 8192] uniform in [0, 1), float32, on the GPU where there is one."""
    return [torch.rand(batch_size, input_size, device="cuda" if torch.cuda.is_available() else "cpu")]


def get_init_inputs():
    """[input_size, hidden_size, scaling_factor]"""
    return [input_size, hidden_size, scaling_factor]


# ------------------------------------------------------------------------------------------- the command line

_DTYPE_NAMES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


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
    script = script if KERNELS_SOURCE is not None else script.replace("KERNELS_SOURCE = None\n", embedded, 1)
    with open(path, "w", encoding="utf-8") as file:
        file.write(script)


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
