"""Compares the machine code of two versions of kernels.cu, kernel by kernel: a change to its text need not change that.

    python bench/sass.py HEAD                    the working tree beside a commit
    python bench/sass.py HEAD~3 HEAD --all       two commits, and a line for every kernel

A kernel is compared with the one of the same name, or, where a name or template argument changed, with one of the same
instructions. Offsets into the constant bank, where a kernel's parameters lie, do not count: adding a parameter moves
them. Needs nvcc, and cuobjdump and nvdisasm, which the toolkit or the triton package has. Exit status 1: code differs.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.tables import ROOT
from model_new import find_cuda_home, nvcc_flags


def disassemble(binary, toolkit):
    """{mangled kernel name: SASS} of an object file. Raises FileNotFoundError where there is no cuobjdump.

    It, and nvdisasm, which it runs, are the toolkit's, those of triton, which is installed beside torch, or on PATH.
    """
    folders = [f"{toolkit}/bin", f"{torch.__path__[0]}/../triton/backends/nvidia/bin", os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(folders)}
    command = ["cuobjdump", "-sass", binary]
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return dict(part.split("\n", 1) for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:])


def machine_code(source, arch):
    """{demangled kernel name: [instruction]} of a kernels.cu's text."""
    toolkit = find_cuda_home()
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        text.write_text(source, encoding="utf-8")
        flags = [*nvcc_flags([arch]), "-std=c++17", "-cubin"]
        subprocess.run([f"{toolkit}/bin/nvcc", *flags, text, "-o", cubin], check=True)
        functions = disassemble(cubin, toolkit)
    demangle = [shutil.which("c++filt") or "cat"]
    names = subprocess.run(demangle, input="\n".join(functions), check=True, capture_output=True, text=True).stdout
    kernels = {}
    for name, body in zip(names.splitlines(), functions.values(), strict=True):
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", body, re.MULTILINE)
        kernels[name] = [re.sub(r"c\[0x0\]\[0x[0-9a-f]+\]", "c[0x0][]", text) for text in instructions]
    return kernels


def source_of(revision):
    """kernels.cu at a commit, or of the working tree where revision is None."""
    if revision is None:
        return (ROOT / "kernels.cu").read_text(encoding="utf-8")
    show = ["git", "-C", ROOT, "show", f"{revision}:kernels.cu"]
    return subprocess.run(show, check=True, capture_output=True, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", nargs="?", help="a commit; default: the working tree")
    parser.add_argument("--arch", default="90a", help="default %(default)s")
    parser.add_argument("--all", action="store_true", help="list the identical kernels, too")
    arguments = parser.parse_args()
    before, after = (machine_code(source_of(r), arguments.arch) for r in (arguments.before, arguments.after))

    pairs, gone = {name: name for name in after if name in before}, before.keys() - after.keys()
    for name in sorted(after.keys() - pairs.keys()):  # renamed
        same = next((other for other in sorted(gone) if before[other] == after[name]), None)
        if same:
            pairs[name] = same
            gone.discard(same)
    new, changed = after.keys() - pairs.keys(), 0
    for name, other in sorted(pairs.items()):
        was, now = len(before[other]), len(after[name])
        if before[other] != after[name]:
            changed += 1
            print(f"{was:6} -> {now:6} instructions ({100 * (now / was - 1):+.1f} %)  {name}")
        elif arguments.all:
            print(f"{now:6} instructions, the same  {name}")
    for what, names, kernels in (("gone", gone, before), ("new", new, after)):
        for name in sorted(names):
            print(f"{len(kernels[name]):6} instructions {what}  {name}")
    total = [sum(map(len, kernels.values())) for kernels in (before, after)]
    print(
        f"{len(before)} -> {len(after)} kernels: {len(pairs) - changed} the same, {changed} changed, "
        f"{len(gone)} gone, {len(new)} new; {total[0]} -> {total[1]} instructions"
    )
    return 1 if changed or gone or new else 0


if __name__ == "__main__":
    sys.exit(main())
