"""README and docs do what they say."""

import collections
import inspect
import pydoc
import re
import shlex
import sys

import pytest
import torch
from pages import BLOCKS, PAGES, ROOT, extras, fenced, run, torchrun

import frobdecay
from frobdecay.cli.main import main

PUBLIC = [getattr(frobdecay, name) for name in frobdecay.__all__ if name != "diagnostics"]
PUBLIC += [getattr(frobdecay.diagnostics, name) for name in ("measure", "Recorder")]


def test_the_pages_have_examples():
    """The search for blocks finds them; most need nothing but the core."""
    plain = [name for name, block in BLOCKS.items() if not extras(block)]
    assert {"README-1", "from-scratch-1"} <= set(plain)
    assert len(BLOCKS) > len(plain) >= 10


def _where(block):
    """Marks for a block: what was on the meta device comes to the CPU, and is compared there."""
    return [pytest.mark.cpu("loads to it")] if "load_factorized" in block else []


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=_where(block))
        for name, block in BLOCKS.items()
        if not extras(block)
    ],
)
def test_examples_run(name, tmp_path, monkeypatch):
    """Every Python block that needs the core alone runs by itself."""
    monkeypatch.chdir(tmp_path)
    run(name)


def test_the_readme_prints_this_plan(capsys):
    """But for errors, which are those of random weights."""
    run("README-1")
    printed = [
        re.sub(r" 0\.\d{3}$", "", line.rstrip()) for line in capsys.readouterr().out.splitlines()
    ]
    shown = fenced("text")["README-1"].splitlines()
    assert printed == [re.sub(r" 0\.\d{3}$", "", line) for line in shown]


@pytest.mark.cpu("files")
def test_commands_run(tmp_path, monkeypatch):
    """Those of the command line, one after the other, as they are printed."""
    monkeypatch.chdir(tmp_path)
    layers = {name: torch.nn.Linear(64, 64) for name in ("up", "down", "head")}
    model = torch.nn.Sequential(collections.OrderedDict(layers))
    torch.save(model.state_dict(), "model.pt")
    frobdecay.save_factorized(model, "model.safetensors")
    lines = "".join(fenced("sh").values()).splitlines()
    commands = [line for line in lines if line.startswith("frobdecay ")]
    assert len(commands) >= 3
    for command in commands:
        assert main(shlex.split(command, comments=True)[1:]) == 0, command


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Between pages, to files of this repository, and to headings."""
    path = PAGES[page]
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, heading = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if heading:
            assert heading in headings(target), link


def headings(path):
    """The anchors of a page's headings, as GitHub and MkDocs both make them."""
    lines = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_page_is_in_the_index():
    """Whoever adds a page names it there."""
    linked = set(re.findall(r"\]\(([\w-]+)\.md\)", PAGES["index"].read_text(encoding="utf-8")))
    assert linked == set(PAGES) - {"README", "index"}


def test_help_names_what_is_public_before_the_modules():
    """Whoever types ``help(frobdecay)`` wants to know what there is to call."""
    said, contents, _ = pydoc.render_doc(frobdecay, renderer=pydoc.plaintext).partition(
        "PACKAGE CONTENTS"
    )
    assert contents
    assert {name for name in frobdecay.__all__ if not re.search(rf"\b{name}\b", said)} == set()


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_docstrings_begin_with_an_example(public):
    """After one sentence that says what it does; doctests run it."""
    _, second, *_ = inspect.getdoc(public).split("\n\n", 2)
    assert second.startswith("Examples:\n    >>> ")


def test_the_reference_has_every_public_name():
    """And names nothing that is not there."""
    names = re.findall(r"^::: frobdecay\.(\S+)$", PAGES["reference"].read_text("utf-8"), re.M)
    assert set(frobdecay.__all__) - {"diagnostics"} <= set(names)
    for name in names:
        assert pydoc.locate(f"frobdecay.{name}") is not None, name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names the network interface as Linux does")
def test_the_script_for_several_processes_runs(tmp_path):
    """As it is printed, with torchrun and two processes; factors stay alike."""
    out = torchrun(2, tmp_path)
    assert "2 on a mesh of 2: 3,392 numbers in one all-reduce" in out
    assert out.rstrip().endswith("done")
