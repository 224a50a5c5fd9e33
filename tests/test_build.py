"""Compiling kernels.cu, which needs no GPU: without a warning or a spill, and with every kind of toolkit."""

import ctypes
import importlib.util
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from tiles import KINDS, tiles
from torch.utils import cpp_extension

import model_new

ROOT = pathlib.Path(model_new.__file__).parent
TINY = 'extern "C" int answer() { return 42; }\n__global__ void nothing() {}\n'


def _toolkit():
    try:
        return model_new.find_cuda_home()
    except RuntimeError:
        return None


TOOLKIT = _toolkit()


@pytest.fixture
def toolkit():
    if TOOLKIT is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs nvcc: install with the extra [nvcc]")
    return TOOLKIT


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bare_environment(monkeypatch):
    """No CUDA_HOME, and no nvcc on PATH or in the usual place."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not os.path.exists(os.path.join(f, "nvcc"))]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    access = os.access
    monkeypatch.setattr(
        model_new.os, "access", lambda path, mode: not str(path).startswith("/usr/local/cuda") and access(path, mode)
    )


# kernels.cu itself


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """arch -> what nvcc says about kernels.cu, with torch's flags and ours, and the object file. Compiles each once."""
    known = {}

    def compile(toolkit, arch):
        if arch not in known:
            target = tmp_path_factory.mktemp(f"sm_{arch}") / "kernels.o"
            command = [f"{toolkit}/bin/nvcc", *cpp_extension.COMMON_NVCC_FLAGS, *model_new.nvcc_flags([arch])]
            command += ["-std=c++17", "-Xptxas=-v,-warn-spills", "-Xcompiler=-Wall,-Wextra"]
            command += ["-c", "kernels.cu", "-o", target]
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            known[arch] = result.returncode, result.stdout + result.stderr, target
        returncode, output, target = known[arch]
        assert returncode == 0, output
        return output, target

    return compile


@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
def test_compiles_without_a_warning_or_a_spill(arch, toolkit, compiled):
    """ptxas' advisories count: C7508 (setmaxnreg ignored), C7510 (wgmma serialized)."""
    output, _ = compiled(toolkit, arch)
    remarks = [line for line in output.splitlines() if re.search(r"warning|advisory|remark|C75\d\d", line, re.I)]
    assert not remarks, "\n".join(remarks)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
    assert len(spills) >= 3 and set(spills) == {("0", "0")}  # a line for each kernel, or -v was not heard


def _disassembler(toolkit):
    """cuobjdump: the toolkit's own, the one that triton brings along, or one on PATH; None without."""
    folders = [os.path.join(toolkit, "bin")]
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        folders.append(os.path.join(folder, "backends", "nvidia", "bin"))
    found = (shutil.which("cuobjdump", path=folder) for folder in folders)
    return next(filter(None, found), None) or shutil.which("cuobjdump")


@pytest.fixture
def machine_code(toolkit, compiled):
    """arch -> {mangled name: SASS} of the variants of linear_kernel."""
    cuobjdump = _disassembler(toolkit)
    if cuobjdump is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs cuobjdump: install triton or the CUDA toolkit")

    def disassemble(arch):
        command = [cuobjdump, "-sass", compiled(toolkit, arch)[1]]
        # cuobjdump runs nvdisasm, which lies beside it.
        path = os.path.dirname(cuobjdump) + os.pathsep + os.environ["PATH"]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert result.returncode == 0, result.stderr
        functions = (text.split("\n", 1) for text in re.split(r"^\s*Function : ", result.stdout, flags=re.M)[1:])
        return {name: code for name, code in functions if "linear_kernel" in name}

    return disassemble


# Kernel, element, rows, whether blocks share K, whether W is transposed: as Tile's arguments are mangled.
MANGLED_TILE = r"6Kernel(\d)E(f|6__half|13__nv_bfloat16)Li(\d+)ELb([01])ELb([01])E"
KERNELS = {"0": "wgmma16", "1": "fp16x3", "2": "fp16x1", "3": "fp16x1_staged"}
ELEMENTS = {"f": torch.float32, "6__half": torch.float16, "13__nv_bfloat16": torch.bfloat16}


def test_linear_kernel_is_compiled_for_every_tile(machine_code):
    """And for no other; "fp16x3" for a transposed W, too."""
    names = machine_code("90a")
    variants = [
        (KERNELS[kernel], ELEMENTS[element], int(rows), *(flag == "1" for flag in flags))
        for kernel, element, rows, *flags in re.findall(MANGLED_TILE, " ".join(names))
    ]
    expected = [
        (kernel, dtype, rows, splits > 0, transposed)
        for kernel, dtype in KINDS
        for _, rows, splits in tiles(kernel, 64)
        for transposed in (False, True)
        if not transposed or kernel == "fp16x3"
    ]
    assert len(names) == len(variants) and sorted(variants, key=str) == sorted(expected, key=str)


def test_linear_kernel_multiplies_on_hoppers_tensor_cores(machine_code):
    """HGMMA, which is wgmma: four steps of 16 k for a block of 64, in "fp16x3" for three products; and none of it, for
    other architectures, where the kernel has no body.
    """
    variants = machine_code("90a")
    assert variants
    for name, code in variants.items():
        assert code.count("HGMMA") >= (12 if "6Kernel1E" in name else 4), name
    assert not any("HGMMA" in code for code in machine_code("80").values())


def test_linear_kernel_keeps_its_numbers_in_registers(machine_code):
    """Neither spilled nor in arrays that are indexed by what the compiler does not know."""
    for name, code in machine_code("90a").items():
        assert not re.search(r"\b(LDL|STL)\b", code), name


C_TYPES = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
    "cudaStream_t": ctypes.c_void_p,
}


def test_every_binding_is_called_with_the_arguments_it_has():
    """ctypes believes what `_load` says: the types of arguments and results are compared here."""
    source = (ROOT / "kernels.cu").read_text(encoding="utf-8")
    bindings = source[source.index('extern "C" {') :]

    def c_type(argument):
        return ctypes.c_void_p if "*" in argument else C_TYPES[argument.split()[-2]]

    declared = {
        name: ([c_type(argument) for argument in arguments.split(",")], C_TYPES[result])
        for result, name, arguments in re.findall(r"^(int|int64_t) (\w+)\(([^)]*)\)", bindings, re.M)
    }
    names = {"epilogue_forward", "epilogue_backward", "linear_hopper", "linear_hopper_scratch", "pad_rows"}
    assert set(declared) == names

    class Function:
        argtypes, restype = None, ctypes.c_int  # ctypes' own

    class Library:
        def __getattr__(self, name):
            self.__dict__[name] = Function()
            return self.__dict__[name]

    library = Library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_new.ctypes, "CDLL", lambda path: library)
        model_new._load("unused")
    called = {
        name: (function.argtypes, function.restype)
        for name, function in vars(library).items()
        if function.argtypes is not None
    }
    assert called == declared


# build()

WARM = """
import sys, model_new
library = model_new._load(model_new.build(["90a"]))
print(library.error_string(0).decode())
"""


def test_cold_and_warm_build(toolkit, cache, capfd):
    """The library loads without a GPU. A second process finds it compiled, and says nothing about it."""
    path = pathlib.Path(model_new.build(["90a"]))
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "sm_90a" in said and str(path.parent) in said
    assert path.is_relative_to(cache)
    assert model_new._load(str(path)).error_string(0) == b"no error"
    built = path.stat().st_mtime_ns
    warm = subprocess.run([sys.executable, "-c", WARM], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert warm.stdout == "no error\n", warm.stderr
    assert "compiling" not in warm.stderr
    assert path.stat().st_mtime_ns == built


def test_several_architectures_in_one_library(toolkit, cache):
    path = model_new.build(["80", "90a"], TINY)
    assert "sm80_90a" in path
    flags = " ".join(model_new.nvcc_flags(["80", "90a"]))
    assert "code=sm_80" in flags and "code=sm_90a" in flags
    assert model_new.ctypes.CDLL(path).answer() == 42


def test_a_changed_source_is_another_library(toolkit, cache):
    paths = [model_new.build(["90a"], TINY.replace("42", number)) for number in ("1", "2")]
    assert os.path.dirname(paths[0]) != os.path.dirname(paths[1])  # one does not evict the other
    assert [model_new.ctypes.CDLL(path).answer() for path in paths] == [1, 2]


@pytest.mark.parametrize("how", ["wrapper script", "link", "CUDA_HOME", "wheel"])
def test_toolkit_found_and_used(how, toolkit, cache, bare_environment, monkeypatch, tmp_path):
    """nvcc by each way in which a machine may have it; torch itself would take a wrapper's folder for the toolkit."""
    nvcc = os.path.join(toolkit, "bin", "nvcc")
    if how == "wheel":
        nvidia = importlib.util.find_spec("nvidia")
        folders = [
            p for f in (nvidia.submodule_search_locations if nvidia else ()) for p in pathlib.Path(f).glob("cu*")
        ]
        homes = [str(folder) for folder in folders if (folder / "bin" / "nvcc").exists()]
        if not homes:
            pytest.skip("needs the nvidia-cuda-nvcc package")
        expected = homes[0]
    else:
        monkeypatch.undo()  # the toolkit itself may be in the usual place
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.delenv("CUDA_HOME", raising=False)
        expected = toolkit
        (tmp_path / "bin").mkdir()
        if how == "wrapper script":
            script = tmp_path / "bin" / "nvcc"
            script.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
            monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        elif how == "link":
            (tmp_path / "bin" / "nvcc").symlink_to(nvcc)
            monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        else:
            monkeypatch.setenv("CUDA_HOME", toolkit)
    assert os.path.realpath(model_new.find_cuda_home()) == os.path.realpath(expected)
    assert model_new.ctypes.CDLL(model_new.build(["90a"], TINY)).answer() == 42


def test_no_toolkit_says_what_to_do(bare_environment, cache, monkeypatch):
    monkeypatch.setattr(model_new.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError) as error:
        model_new.build(["90a"], TINY)
    for word in ("nvcc", "pip install 'cuda-toolkit[nvcc,cccl]'", "CUDA_HOME"):
        assert word in str(error.value)
    assert not cache.exists()


def test_compile_error_begins_with_the_compilers_first(toolkit, cache):
    with pytest.raises(RuntimeError) as error:
        model_new.build(["90a"], "// a comment\n__global__ void broken() { undeclared = 1; }\n")
    first, *rest = str(error.value).splitlines()
    assert first.startswith("building kernels.cu failed:") and "error" in first and "undeclared" in first
    assert toolkit in rest[0] and str(cache) in rest[0] and "CUDA_HOME" in "".join(rest)


def test_unknown_architecture_is_an_error_that_names_it(toolkit, cache):
    with pytest.raises(RuntimeError, match=r"building kernels.cu failed: .*compute_999"):
        model_new.build(["999"], TINY)


@pytest.mark.parametrize("before", [None, "/elsewhere"])
@pytest.mark.parametrize("source", [TINY, "broken"], ids=["success", "failure"])
def test_environment_is_restored_after_a_build(source, before, toolkit, cache, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", before)
    if before is None:
        monkeypatch.delenv("CUDA_HOME", raising=False)
    else:
        monkeypatch.setenv("CUDA_HOME", before)
    monkeypatch.setattr(model_new, "find_cuda_home", lambda: toolkit)
    environment = dict(os.environ)
    if source == TINY:
        model_new.build(["90a"], source)
    else:
        with pytest.raises(RuntimeError):
            model_new.build(["90a"], source)
    assert dict(os.environ) == environment
    assert vars(cpp_extension)["CUDA_HOME"] == before


def test_finds_ninja_where_the_environment_is_not_activated(toolkit, monkeypatch):
    """ninja is in the environment's bin folder, which is on PATH only where the environment is activated."""
    which = shutil.which
    monkeypatch.setattr(model_new.shutil, "which", lambda name: None if name == "ninja" else which(name))
    with model_new._BuildEnvironment(toolkit, "unused"):
        assert os.path.exists(os.path.join(os.environ["PATH"].split(os.pathsep)[0], "ninja"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_architectures_are_those_of_the_devices():
    major, minor = torch.cuda.get_device_capability()
    assert f"{major}{minor}" + ("a" if major >= 9 else "") in model_new.architectures()
