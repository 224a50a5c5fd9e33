"""README.md and docs/*.md: links lead somewhere, examples run, and excerpts of kernels.cu are in it."""

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from urllib.parse import unquote

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```\s*$", re.MULTILINE | re.DOTALL)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(language):
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    return [dedent(code) for text in texts for kind, code in FENCED.findall(text) if kind == language]


def prose(document):
    """The text without its blocks of code, fenced or indented."""
    return re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", FENCED.sub("", document.read_text(encoding="utf-8")))


def anchors(document):
    """The document's headings as GitHub writes them after a #."""
    headings = re.findall(r"^#+ +(.+?)[ #]*$", prose(document), re.MULTILINE)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@each_document
def test_links_and_images_lead_somewhere(document):
    """In [text](link), ![text](image), [name]: link and HTML; an #anchor into Markdown is one of its headings."""
    text = re.sub(r"`[^`]+`", "", prose(document))
    patterns = r"\]\(<?([^)\s>]+)", r"^ *\[[^\]]+\]: *(\S+)", r'\b(?:src|srcset|href)="([^"\s]+)'
    broken = []
    for link in (link for pattern in patterns for link in re.findall(pattern, text, re.MULTILINE)):
        name, _, anchor = unquote(link).partition("#")
        path = document.parent / name if name else document
        found = path.exists() and (not anchor or path.suffix != ".md" or anchor in anchors(path))
        broken += [] if found or re.match(r"[a-z]+:", link) else [link]
    assert not broken


@pytest.mark.parametrize("code", blocks("python"), ids="example".format)
def test_python_examples_run(code):
    """Each in a process of its own, in the repository's root. Where the GPU it needs is missing: that it is Python."""
    compile(code, "example", "exec")
    if "cuda" in code and "is_available" not in code and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def stripped(text):
    """The lines without indentation, each between two newlines, and without empty ones."""
    return "\n" + "".join(f"{line.strip()}\n" for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("excerpt", blocks("cuda"), ids="excerpt".format)
def test_excerpts_are_in_kernels_cu(excerpt):
    """An excerpt's parts, between lines `...`, are there in this order."""
    rest = stripped((ROOT / "kernels.cu").read_text(encoding="utf-8"))
    for part in re.split(r"^ *(?://)? *\.\.\. *$", excerpt, flags=re.MULTILINE):
        _, found, behind = rest.partition(stripped(part))
        assert found, part
        rest = "\n" + behind
