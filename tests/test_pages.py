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


@pytest.mark.cpu("compares accuracies, and what was loaded")
def test_the_path_of_the_readme_on_a_network_of_ones_own(tmp_path):
    """Compress by the defaults, train, save, load, deploy: within two points of the dense one."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = (torch.tensor(array) for array in datasets.load_digits(return_X_y=True))
    images, order = images.float().reshape(-1, 1, 8, 8) / 16, torch.randperm(len(labels))
    train, test = order[:1200], order[1200:]

    def make():
        torch.manual_seed(0)
        layers = []
        for i, o, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
            conv = torch.nn.Conv2d(i, o, 3, stride, padding=1, bias=False)
            layers += [conv, torch.nn.BatchNorm2d(o), torch.nn.ReLU()]
        pool = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10)
        return torch.nn.Sequential(*layers, *pool)

    def trained(model, wrap):
        optimizer = wrap(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        for _ in range(4):
            for batch in torch.randperm(len(train)).split(64):
                given = model(images[train[batch]])
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(given, labels[train[batch]]).backward()
                optimizer.step()
            schedule.step()
        return model.eval()

    def accuracy(model):
        return 100 * (model(images[test]).argmax(1) == labels[test]).float().mean().item()

    dense = accuracy(trained(make(), lambda base: base))
    model = make()
    plan = frobdecay.factorize(model, ratio=0.25)
    assert 0.24 < plan.ratio < 0.26
    trained(model, lambda base: frobdecay.FrobeniusDecay(base, model))
    assert accuracy(model) > dense - 2

    frobdecay.save_factorized(model, tmp_path / "model.safetensors")
    loaded = frobdecay.load_factorized(make(), tmp_path / "model.safetensors").eval()
    torch.save(frobdecay.unroll(loaded), tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=False)
    assert sum(p.numel() for p in plain.parameters()) == plan.after
    torch.testing.assert_close(plain(images[test]), model(images[test]), rtol=1e-3, atol=1e-3)


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
