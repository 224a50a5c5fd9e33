"""README.md and docs/*.md: links lead somewhere, examples run, and the files, options and names they mention exist."""

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from urllib.parse import unquote

import pytest
import torch

import model_new

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text(encoding="utf-8")
FENCED = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```\s*$", re.MULTILINE | re.DOTALL)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(document, language):
    return [dedent(text) for kind, text in FENCED.findall(document.read_text(encoding="utf-8")) if kind == language]


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


EXAMPLES = [code for document in DOCUMENTS for code in blocks(document, "python")]


@pytest.mark.parametrize("code", EXAMPLES, ids="example".format)
def test_python_examples_run(code):
    """Each in a process of its own, in the repository's root. Where the GPU it needs is missing: that it is Python."""
    compile(code, "example", "exec")
    if "cuda" in code and "is_available" not in code and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@each_document
def test_commands_name_scripts_and_options_that_exist(document):
    """In sh blocks and in `script.py --option`: each script, and each --option that follows one (not a shell's $x)."""
    code = [part.replace("\n", " ") for part in re.findall(r"`([^`]+\.py\s--[^`]+)`", prose(document))]
    shell = "\n".join([*blocks(document, "sh"), *code]).replace("\\\n", " ")
    unknown = []
    for command in re.split(r"[\n;&|]+", shell):
        source, previous = None, ""
        for word in re.findall(r"[^\s'\"()]+", command.partition(" #")[0]):
            if word.endswith(".py") and "$" not in word and previous != "--export":  # which names a file to write
                path = next((path for path in (ROOT / word, ROOT / "bench" / word) if path.is_file()), None)
                source = path and path.read_text(encoding="utf-8")
                unknown += [] if path else [word]
            elif source and re.match("--(?!help$)", word) and f'"{word.partition("=")[0]}"' not in source:
                unknown.append(f"{command.strip()}: {word}")
            previous = word
    assert not unknown


def test_names_of_model_new_exist():
    """Imports in examples, `Model...` and `some_call(...)` in the text; the table of kernels is select_kernel's."""
    names = set(re.findall(r"`(Model\w*|[a-z]\w*_\w+(?=\([^`]*\)`))", prose(DOCUMENTS[0])))
    for line in re.findall(r"^from model_new import (.+)$", README, re.MULTILINE):
        names |= set(re.findall(r"\w+", line.partition("#")[0]))
    assert names and not [name for name in names if not hasattr(model_new, name)]
    kernels = set(re.findall(r'^ *"(\w+)" ', model_new.select_kernel.__doc__, re.MULTILINE))
    assert kernels in [set(re.findall(r"^\| *`(\w+)` *\|", part, re.MULTILINE)) for part in README.split("\n\n")]


def test_layout_lists_what_exists():
    """The first word of each line, and after a folder/ the files in it that the line names."""
    listing = README.partition("\n## Layout\n")[2].partition("\n## ")[0]
    paths = []
    for name, text in re.findall(r"^ {4}(\S+)(.*)$", listing, re.MULTILINE):
        paths += [name, *(name + file for file in re.findall(r"\w+\.[a-z]+\b", text) if name.endswith("/"))]
    assert paths and not [path for path in paths if not (ROOT / path).exists()]
