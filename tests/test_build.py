"""Compiling kernels.cu, which needs no GPU: without a warning or a spill, once, by whichever toolkit there is."""

import contextlib
import ctypes
import errno
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import pytest
import torch
from tiles import KINDS, tiles
from torch.utils import cpp_extension

import model_new
from bench import bindings, sass

ROOT = pathlib.Path(model_new.__file__).parent
TINY = """
#ifdef __CUDACC__
extern "C" int answer() { return 42; }
__global__ void nothing() {}
#endif
"""


def missing(what):
    """Skips the test; in .ci/run, where everything is there, it fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {what}")


@pytest.fixture(scope="module")
def toolkit():
    try:
        return model_new.find_cuda_home()
    except RuntimeError:
        missing("nvcc: install with the extra [nvcc]")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_script(path, text):
    """Writes a shell script that can be called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# kernels.cu itself


@pytest.fixture(scope="module")
def compiled(toolkit, tmp_path_factory):
    """arch -> what nvcc says about kernels.cu, with torch's flags and ours, and the object file. Compiles each once."""

    @functools.cache
    def compile(arch):
        target = tmp_path_factory.mktemp(f"sm_{arch}") / "kernels.o"
        command = [f"{toolkit}/bin/nvcc", *cpp_extension.COMMON_NVCC_FLAGS, *model_new.nvcc_flags([arch])]
        command += ["-std=c++17", "-Xptxas=-v,-warn-spills", "-Xcompiler=-Wall,-Wextra"]
        command += ["-c", "kernels.cu", "-o", target]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr, target

    return compile


@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
def test_compiles_without_a_warning_or_a_spill(arch, compiled):
    """ptxas' advisories count, C75xx: C7508 (setmaxnreg ignored), C7510 and those after it (wgmma serialized)."""
    output, _ = compiled(arch)
    remarks = [line for line in output.splitlines() if re.search(r"warning|advisory|remark|C75\d\d", line, re.I)]
    assert not remarks, "\n".join(remarks)
    # A stack frame without spills is an array that is indexed by what the compiler does not know.
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
    assert len(memory) >= 3 and set(memory) == {("0", "0", "0")}  # a line for each kernel, or -v was not heard


@pytest.fixture
def machine_code(toolkit, compiled):
    """arch -> {mangled name: SASS} of the variants of linear_kernel."""

    def disassemble(arch):
        try:
            functions = sass.disassemble(compiled(arch)[1], toolkit)
        except FileNotFoundError:
            missing("cuobjdump: install triton or the CUDA toolkit")
        return {name: code for name, code in functions.items() if "linear_kernel" in name}

    return disassemble


# Kernel, element, rows, whether blocks share K, whether W is transposed: as Tile's arguments are mangled.
MANGLED_TILE = r"6Kernel(\d)E(f|6__half|13__nv_bfloat16)Li(\d+)ELb([01])ELb([01])E"
ELEMENTS = {"f": torch.float32, "6__half": torch.float16, "13__nv_bfloat16": torch.bfloat16}


def test_linear_kernel_is_compiled_for_every_tile(machine_code):
    """And for no other; "fp16x3" for a transposed W, too. Each multiplies by HGMMA, which is wgmma: four steps of 16 k
    for a block of 64, in "fp16x3" for three products. For other architectures the kernel has no body.
    """
    variants = []
    for name, code in machine_code("90a").items():
        kernel, element, rows, *flags = re.search(MANGLED_TILE, name).groups()
        kernel = bindings.KERNELS[int(kernel)]
        variants.append((kernel, ELEMENTS[element], int(rows), *(flag == "1" for flag in flags)))
        assert code.count("HGMMA") >= (12 if kernel == "fp16x3" else 4), name
    expected = [
        (kernel, dtype, rows, splits > 0, transposed)
        for kernel, dtype in KINDS
        for _, rows, splits in tiles(kernel, 64)
        for transposed in (False, True)
        if not transposed or kernel == "fp16x3"
    ]
    assert sorted(variants, key=str) == sorted(expected, key=str)
    assert not any("HGMMA" in code for code in machine_code("80").values())


C_TYPES = {
    "void": None,
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
    "char*": ctypes.c_char_p,
    "int*": ctypes.POINTER(ctypes.c_int),
    "void*": ctypes.c_void_p,
    "cudaStream_t": ctypes.c_void_p,
}


def c_functions(source):
    """{name: (result, [arguments]), as ctypes has them} of the functions that begin a line of C++."""

    def c_type(text):
        return C_TYPES[text.removeprefix("const ")]

    return {
        name: (c_type(result), [c_type(argument.strip().rsplit(maxsplit=1)[0]) for argument in arguments.split(",")])
        for result, name, arguments in re.findall(r"^((?:const )?\w+\*?) (\w+)\(([^)]*)\)(?: \{|;)", source, re.M)
    }


def test_ctypes_knows_the_c_functions_types():
    """It believes what it is told. (The compilers compare the declarations with the definitions.)"""
    text = (ROOT / "kernels.cu").read_text(encoding="utf-8")
    interface = re.search(r'^extern "C" {\n.*?^}', text, re.M | re.S)[0]
    assert bindings.SIGNATURES.items() <= c_functions(interface).items()
    select = model_new._library.select_kernel
    (its_text,) = re.findall(r"^const char\* select_kernel\([^)]*\) \{", text, re.M)
    assert c_functions(its_text)["select_kernel"] == (select.restype, select.argtypes)


# Compiling, once

NVML = """
static const int gpus[][2] = {GPUS};
int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = DRIVER; return 0; }
int nvmlDeviceGetCount_v2(int* count) { *count = sizeof gpus / sizeof *gpus; return 0; }
int nvmlDeviceGetHandleByIndex_v2(int index, const void** device) { *device = gpus[index]; return 0; }
int nvmlDeviceGetCudaComputeCapability(const int* device, int* major, int* minor) {
  *major = device[0], *minor = device[1];
  return 0;
}
"""


def fake_nvml(folder, gpus, driver=99000):
    """Compiles an NVML that tells of these GPUs, "{major, minor}, ...", and of a driver for this CUDA; its path."""
    command = ["gcc", "-x", "c", "-", "-shared", "-fPIC", f"-DGPUS={gpus}", f"-DDRIVER={driver}"]
    subprocess.run([*command, "-o", folder / "libnvidia-ml.so.1"], input=NVML, text=True, check=True)
    return folder / "libnvidia-ml.so.1"


IMPORT = """
import os, torch, model_new
is_there = torch._C._dispatch_has_kernel_for_dispatch_key("linear_sigmoid_residual::forward", "CUDA")
print(model_new._library._name, is_there)
assert not torch.cuda.is_initialized()
if not os.fork():
    assert not torch.cuda._is_in_bad_fork()
    print("forked", flush=True)
"""


def test_kernels_cu_built_without_a_gpu_is_what_a_machine_with_one_imports(toolkit, cache, tmp_path):
    """The command prints the path of the library. Where NVML tells of an A100, the import loads it, compiles nothing,
    and does not initialize CUDA. (An H100's library would take six times as long to compile.)
    """
    command = [sys.executable, model_new.__file__, "--build", "80"]
    built = subprocess.run(command, capture_output=True, text=True)
    path = built.stdout.strip()
    assert built.returncode == 0 and pathlib.Path(path).is_relative_to(cache), built.stderr
    assert built.stderr.count("\n") == 1 and "sm_80" in built.stderr and os.path.dirname(path) in built.stderr
    fake_nvml(tmp_path, "{8, 0}")
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "CUDA_HOME": "/nowhere"}
    command = [sys.executable, "-c", IMPORT]
    imported = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert imported.stdout == f"{path} True\nforked\n" and imported.stderr == ""
    # What needs no library builds none.
    environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "empty")
    helped = subprocess.run([sys.executable, model_new.__file__, "--help"], env=environ, capture_output=True, text=True)
    assert helped.returncode == 0 and helped.stdout.startswith("usage") and helped.stderr == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_process_forked_after_the_import_can_use_the_gpu():
    code = "import os, model_new, torch; pid = os.fork(); print(torch.ones(1).cuda().item()) if pid == 0 else os.wait()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "1.0\n", result.stderr


@pytest.mark.parametrize(
    "gpus, driver, visible, expected",
    [
        ("{10, 0}, {8, 0}, {12, 1}, {8, 0}", 14010, 1, ["80", "100a", "121a"]),
        ("{9, 0}", 13000, 0, []),
        ("{9, 0}", 11080, 1, []),
    ],
    ids=["several kinds", "hidden", "an old driver"],
)
def test_architectures(gpus, driver, visible, expected, monkeypatch, tmp_path):
    """What NVML says, of GPUs that are hidden, too; but nothing where PyTorch has no GPU to use."""
    nvml = ctypes.CDLL(fake_nvml(tmp_path, gpus, driver))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert model_new.architectures() == expected


@pytest.fixture
def touched(monkeypatch):
    """Instead of compiling: an empty file. The libraries that would have been compiled."""
    libraries = []

    def touch(archs, source, library):
        pathlib.Path(library).touch()
        libraries.append(library)

    monkeypatch.setattr(model_new, "_compile", touch)
    return libraries


def test_everything_that_the_library_depends_on_makes_another(touched, cache, monkeypatch):
    for archs, source in ((["90a"], TINY), (["80", "90a"], TINY), (["90a"], TINY + "//")):
        model_new.build(archs, source)
    for module, name, value in (
        (torch, "__version__", "another"),
        (torch.version, "cuda", "another"),
        (sysconfig, "get_config_var", lambda _: "another"),
        (model_new, "nvcc_flags", lambda _: ["another"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            model_new.build(["90a"], TINY)
    assert len({os.path.dirname(library) for library in touched}) == len(touched) == 7


def test_a_finished_library_is_only_looked_up(touched, cache, monkeypatch, capfd):
    """It is found on a file system without flock, where it was built, and which is read-only now; without a toolkit;
    and beside the file "lock" that a killed build with PyTorch 2.11 leaves.
    """

    def refuse(*arguments, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(model_new.fcntl, "flock", refuse)
    path = model_new.build(["90a"], TINY)
    pathlib.Path(path).with_name("lock").touch()
    for module, name in ((os, "makedirs"), (model_new.subprocess, "run")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert model_new.build(["90a"], TINY) == path
    assert len(touched) == 1 and capfd.readouterr().err == ""


def test_a_killed_build_is_waited_for_while_it_runs_and_then_done_again(toolkit, cache, tmp_path):
    """Those who wait for it are told its process. One of them compiles, and neither the remains of the killed build nor
    its compiler, which runs on, are in the way; the other finds the library.
    """
    hangs = f'case "$*" in *cuda.cu*) exec sleep 300;; *--dryrun*) exit;; esac\nexec {toolkit}/bin/nvcc "$@"'
    write_script(tmp_path / "hangs/bin/nvcc", hangs)
    command = [sys.executable, "-c", "import model_new, sys; print(model_new.build(['90a'], sys.argv[1]))", TINY]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes, hidden = [], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # or the import would compile for the GPU

    def start(**environ):
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env={**hidden, **environ}, **pipes, start_new_session=True)
        )
        return processes[-1]

    try:
        first = start(CUDA_HOME=str(tmp_path / "hangs"))
        assert "compiling" in first.stderr.readline()
        while first.poll() is None and not list(cache.glob("*/build-*/cuda.cu")):
            time.sleep(0.1)
        others = [start(), start()]
        for other in others:
            said = other.stderr.readline()
            assert f"waiting for process {first.pid} on " in said and "TORCH_EXTENSIONS_DIR" in said
        first.kill()
        paths, said = zip(*(other.communicate() for other in others))
        assert paths[0] == paths[1] and ctypes.CDLL(paths[0].strip()).answer() == 42, said
        assert "".join(said).count("compiling") == 1
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_relative_cache_and_paths_with_spaces(toolkit, monkeypatch, tmp_path, capfd):
    """And a toolkit without a libcudart.so to link with, an environment that is not activated, and one GPU of two that
    nvcc knows; neither the environment nor the working folder is changed.
    """
    home = tmp_path / "tool kit"
    shutil.copytree(os.path.join(toolkit, "bin"), home / "bin", copy_function=os.symlink)
    (home / "bin" / "nvcc").unlink()  # it finds the toolkit from where it is, links followed
    shutil.copy(os.path.join(toolkit, "bin", "nvcc"), home / "bin")
    for name in ("include", "nvvm"):
        (home / name).symlink_to(os.path.join(toolkit, name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "some cache")
    monkeypatch.setenv("CUDA_HOME", "tool kit")
    folders = os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(f for f in folders if f != os.path.dirname(sys.executable)))
    environ = dict(os.environ)
    path = model_new.build(["90a", "999"], TINY)
    assert ctypes.CDLL(path).answer() == 42
    assert path.startswith(str(tmp_path / "some cache")) and "sm90a_999" in path
    assert "sm_999, which is left out" in capfd.readouterr().err
    assert dict(os.environ) == environ and os.getcwd() == str(tmp_path)


# Errors


def error_of_build(*words, source=TINY):
    """The error, whose first line names what is wrong. Harnesses would take the words that must not be in it for a race
    between processes.
    """
    with pytest.raises(RuntimeError) as error:
        model_new.build(["90a"], source)
    text = str(error.value)
    first = text.splitlines()[0]
    assert all(word in first for word in words) and len(first) < 300, first
    assert "lock" not in text and "No such file or directory" not in text
    return text


@pytest.mark.parametrize(
    "source, said",
    [
        ("// a comment\n__global__ void broken() { undeclared_block = 1; }\n", "undeclared_bLOCK"),
        ('#include "not_there.h"\n', "not_there.h: is missing"),
        ('extern "C" int missing(); int answer() { return missing(); }\n', "undefined symbol: missing"),
    ],
    ids=["compiler", "preprocessor", "loader"],
)
def test_a_failed_build_says_first_what_failed(source, said, toolkit, cache):
    environ = dict(os.environ)
    text = error_of_build("building kernels.cu failed:", said, source=f"#ifdef __CUDACC__\n{source}#endif\n")
    assert toolkit in text and str(cache) in text and "CUDA_HOME" in text
    assert dict(os.environ) == environ
    assert not list(cache.glob("*/*.so")) and not list(cache.glob("*/build-*"))


def test_a_missing_module_is_named(toolkit, cache, monkeypatch, tmp_path):
    (tmp_path / "ninja.py").write_text("raise ModuleNotFoundError('No module named ninja')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ninja", raising=False)
    monkeypatch.setenv("CUDA_HOME", toolkit)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "pip install ninja setuptools" in error_of_build("Ninja")


@pytest.mark.parametrize(
    "line",
    ["nvcc fatal   : Unknown option '--x'", "/usr/bin/ld: cannot find -lcudart", "/bin/sh: 1: c++: not found"],
)
def test_first_error(line):
    assert model_new._first_error(f"c++ main.o -o x.so\n{line}\ncollect2: error: ld returned 1") == line
    assert model_new._first_error("") == "it said nothing"


def test_a_cache_that_cannot_be_written_names_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert "TORCH_EXTENSIONS_DIR" in error_of_build(str(tmp_path))


def test_a_pytorch_without_cuda_is_an_error_that_says_so(cache, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert model_new.architectures() == []
    error_of_build(torch.__version__, "CUDA")


# Which nvcc


@pytest.fixture
def fake_nvcc(tmp_path):
    """(folder, release, codes) -> the path of an nvcc there that says so, and nothing else."""

    def make(folder, release, codes="sm_80 sm_90"):
        nvcc = tmp_path / folder / "bin" / "nvcc"
        write_script(nvcc, f'case "$*" in --version) echo release {release}, V1;; --list-gpu-code) echo {codes};; esac')
        return str(nvcc)

    return make


@pytest.mark.parametrize(
    "nvccs, chosen",
    [
        ([("13.0",), ("13.1",), ("13.2", "sm_90")], 1),
        ([("13.3",), ("13.0",)], 1),
        ([("13.3",), ("13.4",)], 1),
        ([("12.9",), ("13.1", "sm_80"), ("13.3",)], 2),
        ([("13.0",), ("13.0",)], 0),
        ([("13.1", "sm_80")], 0),
    ],
)
def test_the_newest_nvcc_that_fits_pytorchs_cuda_and_knows_the_gpus(nvccs, chosen, fake_nvcc, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    paths = [fake_nvcc(str(i), *nvcc) for i, nvcc in enumerate(nvccs)]
    monkeypatch.setattr(model_new, "_nvccs", lambda: paths)
    assert model_new.find_cuda_home(["90a", "80"]) == os.path.dirname(os.path.dirname(paths[chosen]))


def test_nvccs_that_do_not_fit_are_named_with_the_reason(fake_nvcc, cache, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    paths = [fake_nvcc("old", "12.9"), fake_nvcc("small", "13.1", "sm_80"), "/nowhere/bin/nvcc"]
    monkeypatch.setattr(model_new, "_nvccs", lambda: paths)
    text = error_of_build(paths[0], "12.9", "13.1")
    for words in (f"{paths[1]}: CUDA 13.1", "sm_90a", f"{paths[2]}: is missing", "pip install 'cuda-toolkit["):
        assert words in text


@pytest.fixture
def unnamed(monkeypatch):
    """No variable names a toolkit."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_only_the_toolkit_that_is_named_counts(name, unnamed, fake_nvcc, cache, monkeypatch, tmp_path):
    home = os.path.dirname(os.path.dirname(fake_nvcc("home", torch.version.cuda)))
    monkeypatch.setenv(name, home)
    assert model_new.find_cuda_home() == home
    monkeypatch.setenv(name, str(tmp_path / "gone"))
    error_of_build(str(tmp_path / "gone"))


def test_nvcc_is_found_on_path_and_in_wheels(unnamed, fake_nvcc, monkeypatch, tmp_path):
    on_path, in_wheel = fake_nvcc("any", "1.0"), fake_nvcc("site/nvidia/cu13", "1.0")
    monkeypatch.setenv("PATH", os.path.dirname(on_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    nvccs = model_new._nvccs()
    assert nvccs[0] == on_path and in_wheel in nvccs


def test_the_toolkit_of_an_nvcc_that_is_a_script(toolkit, tmp_path):
    write_script(tmp_path / "nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    assert model_new._toolkit_of(str(tmp_path / "nvcc")) == os.path.realpath(toolkit)
