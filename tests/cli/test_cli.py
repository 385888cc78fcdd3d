"""``python -m frobdecay``: reports, merged files, and what hostile files do (nothing)."""

import gzip
import importlib.util
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from torch import nn

import frobdecay
from frobdecay import CP, TensorTrain, Tucker
from frobdecay.algebra.spectral import spectral_init
from frobdecay.cli import read as reading
from frobdecay.cli import show, spectra
from frobdecay.cli.main import main
from frobdecay.models import progress
from frobdecay.models.checkpoints.factorized import load_factorized, save_factorized
from frobdecay.models.factorize import factorize
from frobdecay.models.ranks import plan_ranks

pytest.importorskip("rich")
needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)
SUFFIXES = [".pt", pytest.param(".safetensors", marks=needs_safetensors)]


def _net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 10), nn.Embedding(9, 6)
    )


def _saved(path, model=None):
    """Write a model's state dict in the format of the suffix."""
    model = _net() if model is None else model
    if path.suffix == ".safetensors":
        save_factorized(model, path)
    else:
        torch.save(model.state_dict(), path)
    return model


def _run(*arguments):
    return main([str(argument) for argument in arguments])


def _report(capsys, *arguments):
    assert _run("inspect", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def _refused(capsys, *arguments):
    """The one line of an error."""
    assert _run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("frobdecay: error: ")
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()
    return err


def test_errors_are_one_line_for_programs_and_fit_a_terminal(tmp_path, capsys, monkeypatch):
    """There they keep the lines that they have, too."""
    _saved(tmp_path / "model.pt")
    arguments = ["factorize", tmp_path / "model.pt", tmp_path / "out.safetensors"]
    everything = [*arguments, "--rank", "2", "--exclude", "*"]
    line = _refused(capsys, *everything)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert _run(*everything) == 2
    err = capsys.readouterr().err
    assert err.split() == line.split()
    assert "\n  0.weight: excluded\n  3.weight: excluded\n" in err
    assert _run(*arguments, "--ratio", "0.001") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert all(len(line) <= 60 or " " not in line.strip() for line in lines)


def test_other_tensors_are_no_weight_to_choose(tmp_path, capsys):
    """They count with the model's parameters, under a name that no weight has."""
    _saved(tmp_path / "model.pt")
    arguments = ["factorize", tmp_path / "model.pt", tmp_path / "out.safetensors"]
    assert "'rest' matches nothing" in _refused(
        capsys, *arguments, "--rank", "2", "--include", "rest"
    )


# --- inspect ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_spectra_are_those_of_the_weights(tmp_path, capsys, suffix):
    """Against the singular values of each matricized weight, in float64."""
    model = _saved(tmp_path / f"model{suffix}")
    report = _report(capsys, tmp_path / f"model{suffix}", "--energy", "0.8")
    matrices = {
        "0.weight": model[0].weight.detach().permute(0, 2, 1, 3).reshape(24, 9),
        "3.weight": model[3].weight.detach(),
        "4.weight": model[4].weight.detach(),
    }
    rows = {row["name"]: row for row in report["weights"]}
    assert list(rows) == list(matrices)
    for name, matrix in matrices.items():
        sigma = torch.linalg.svdvals(matrix.double())
        share = sigma.square().cumsum(0) / sigma.square().sum()
        row = rows[name]
        assert row["matrix"] == list(matrix.shape)
        assert row["norm"] == pytest.approx(float(matrix.norm()), rel=1e-5)
        assert row["stable_rank"] == pytest.approx(float((sigma / sigma[0]).square().sum()))
        assert row["energy_rank"] == 1 + int((share < 0.8).sum())
        assert row["singular_values"] == pytest.approx(sigma.tolist(), abs=1e-6)


def test_planned_ranks_are_those_of_the_model(tmp_path, capsys):
    """``plan_ranks`` on the model; a normalization's averages are no parameters."""
    model = _saved(tmp_path / "model.pt")
    report = _report(capsys, tmp_path / "model.pt", "--ratio", "0.5")
    plan = plan_ranks(model, ratio=0.5)
    rows = {row["name"]: row for row in report["weights"]}
    assert {name: row["planned_rank"] for name, row in rows.items() if row["planned_rank"]} == (
        plan.ranks
    )
    assert report["planned"] == {"before": plan.before, "after": plan.after}
    weight = model[3].weight.detach().double()
    U, V = spectral_init(weight, rows["3.weight"]["planned_rank"])
    kept = float((U @ V.T).norm().square() / weight.norm().square())
    assert rows["3.weight"]["planned_energy"] == pytest.approx(kept)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_factors_are_read_as_their_product(tmp_path, capsys, suffix):
    """Norms and ranks of the product, under the dense weight's name and shape."""
    model = _net()
    factorize(model, rank=2)
    _saved(tmp_path / f"model{suffix}", model)
    report = _report(capsys, tmp_path / f"model{suffix}")
    rows = {row["name"]: row for row in report["weights"]}
    assert set(rows) == {"0.weight", "3.weight", "4.weight"}
    for name, row in rows.items():
        weight = model[int(name[0])].weight.materialize().detach()
        assert (row["kind"], row["rank"], row["shape"]) == ("LowRank", 2, list(weight.shape))
        assert row["norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
        assert len(row["singular_values"]) == 2
    error = _refused(capsys, "inspect", tmp_path / f"model{suffix}", "--ratio", "0.9")
    assert "0.weight: already factorized, and left as it is; merge it first" in error


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_factorized_counts_as_it_is(tmp_path, capsys, suffix):
    """A plan is for the weights that are dense, and the last of them is the last in the model."""
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(4)))
    factorize(model, rank=3, include="[13]")
    _saved(tmp_path / f"model{suffix}", model)
    report = _report(capsys, tmp_path / f"model{suffix}", "--ratio", "0.6")
    plan = plan_ranks(model, ratio=0.6)
    planned = {row["name"]: row["planned_rank"] for row in report["weights"]}
    assert planned == {f"{k}.weight": plan.ranks.get(f"{k}.weight") for k in range(4)}
    assert report["planned"] == {"before": plan.before, "after": plan.after}
    assert plan.before == report["parameters"] == 2 * 40 * 40 + 2 * 3 * 80
    assert _run("inspect", tmp_path / f"model{suffix}", "--ratio", "0.6", "--all") == 0
    assert capsys.readouterr().out.count("as is") == 2


@pytest.mark.parametrize("kind", [Tucker, TensorTrain, CP])
def test_tensors_are_read_as_the_dense_weight_is(tmp_path, capsys, kind):
    """Their own ranks beside the spectrum of the weight that they multiply to."""
    model = _net()
    factorize(model, rank=2, include=["0", "3"], parametrization=kind)
    _saved(tmp_path / "factors.pt", model)
    assert _run("merge", tmp_path / "factors.pt", tmp_path / "dense.pt") == 0
    capsys.readouterr()
    ours, dense = (
        _report(capsys, tmp_path / f"{name}.pt")["weights"] for name in ("factors", "dense")
    )
    rows = {row["name"]: row for row in dense}
    assert {row["kind"] for row in ours} == {kind.__name__, "dense"}
    for row in ours:
        same = ("shape", "matrix", "norm", "energy_rank")
        assert {key: row[key] for key in same} == {key: rows[row["name"]][key] for key in same}


def test_threads_are_given_back_where_a_weight_fails(monkeypatch):
    """Those who call this from Python go on with as many as before."""
    said = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    monkeypatch.setattr(spectra, "_measure", lambda *_: [][0])
    with pytest.raises(IndexError):
        spectra.measure_all([show.Row("fc.weight", (3, 2), "dense", 6)], None, 0.9)
    assert said[-1] == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_has_a_line_for_every_weight(tmp_path, capsys, monkeypatch, terminal):
    """With shapes, numbers and remarks; on a terminal and elsewhere."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "200")
    model = _net()
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
        model[4].weight.zero_()
    _saved(tmp_path / "model.pt", model)
    assert _run("inspect", tmp_path / "model.pt", "--ratio", "0.5") == 0
    out = capsys.readouterr().out
    lines = {name: line for line in out.splitlines() for name in ("0", "3", "4")
             if f"{name}.weight" in line}  # fmt: skip
    assert "8×3×3×3" in lines["0"]
    assert "24×9" in lines["0"]
    assert "has NaN or infinity" in lines["3"]
    assert "zero" in lines["4"]
    assert "313 of 624, ratio 0.502" in out


def test_what_is_no_matrix_of_numbers_is_listed(tmp_path, capsys):
    """Integers, complex, sparse, empty, six dimensions, eight bits, factors without a record."""
    tensors = {
        "int.weight": torch.ones(3, 3, dtype=torch.int8),
        "complex.weight": torch.ones(3, 3) + 0j,
        "sparse.weight": torch.eye(3).to_sparse(),
        "deep.weight": torch.ones(1, 2, 1, 2, 1, 2),
        "none.weight": torch.ones(0, 3),
        "eight.weight": torch.eye(4).to(torch.float8_e4m3fn),
        "fc.parametrizations.weight.original0": torch.ones(4, 2),
    }
    torch.save(tensors, tmp_path / "model.pt")
    report = _report(capsys, tmp_path / "model.pt")
    remarks = {row["name"]: row["remark"] for row in report["weights"]}
    assert {name for name, remark in remarks.items() if remark} == set(tensors) - {"eight.weight"}
    norms = {row["name"]: row["norm"] for row in report["weights"]}
    assert norms["eight.weight"] == pytest.approx(2.0)


def test_the_plot_is_a_picture(tmp_path, capsys):
    """Of the kind that the suffix says."""
    pytest.importorskip("matplotlib")
    _saved(tmp_path / "model.pt")
    assert _run("inspect", tmp_path / "model.pt", "--plot", tmp_path / "spectra.png") == 0
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert "'nonsense'" in _refused(
        capsys, "inspect", tmp_path / "model.pt", "--plot", tmp_path / "spectra.nonsense"
    )


def test_the_plot_has_a_panel_for_each_role(tmp_path, capsys, monkeypatch):
    """Layers in the order of their depth, 2 before 10; those that are alone share one."""
    pytest.importorskip("matplotlib")
    tensors = {f"h.{i}.{name}.weight": torch.randn(6, 4) for i in (0, 1, 10, 2) for name in "ab"}
    torch.save({**tensors, "embed.weight": torch.eye(5), "$x$": torch.eye(3)}, tmp_path / "m.pt")
    drawn = []
    monkeypatch.setattr(show, "write_figure", lambda path, figure: drawn.append(figure))
    assert _run("inspect", tmp_path / "m.pt", "--ratio", "0.8", "--plot", "x.png") == 0
    capsys.readouterr()
    (figure,) = drawn
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == ["h.*.a", "h.*.b", "single weights"]
    first = [line.get_ydata()[1] for line in panels["h.*.a"].lines if len(line.get_xdata()) == 5]
    sigmas = [torch.linalg.svdvals(tensors[f"h.{i}.a.weight"].double()) for i in (0, 1, 2, 10)]
    assert first == pytest.approx([float(s[0] ** 2 / s.square().sum()) for s in sigmas])
    marked = [line for line in panels["h.*.a"].lines if line.get_marker() == "o"]
    assert marked
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["0.9 of ‖W‖²", "planned rank"]


# Contents of a file -> (the key that is found, a part of the error, if it is one).
NESTED = {
    "flat": (lambda s: s, "", None),
    "model": (lambda s: {"epoch": 3, "loss": torch.tensor(0.1), "model": s}, "model", None),
    "deep": (lambda s: {"a": {"state_dict": s}}, "a/state_dict", None),
    "optimizer": (
        lambda s: {"model": s, "optimizer": {"state": {0: {"m": torch.eye(2)}}}}, "model", None),
    "named optimizer": (
        lambda s: {"model": s, "optim": {"state": {"w": {"m": torch.ones(2, 2)}}}}, "model", None),
    "two": (lambda s: {"model": s, "ema": s}, None, "'model', 'ema'; choose with --key"),
    "none": (lambda s: {"args": {"lr": 0.1}, "v": torch.ones(3)}, None, r"no weights.*'args', 'v'"),
    "no names": (lambda s: {0: torch.ones(2, 2)}, None, "no weights"),
    "a list": (lambda s: [torch.ones(2, 2)], None, "a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", NESTED)
def test_weights_are_found_in_nested_dictionaries(tmp_path, capsys, case):
    """Or the keys that there are are listed."""
    wrap, key, message = NESTED[case]
    path = tmp_path / "model.pt"
    torch.save(wrap(_net().state_dict()), path)
    if message is None:
        report = _report(capsys, path)
        assert report["key"] == key
        assert len(report["weights"]) == 3
    else:
        assert re.search(message, _refused(capsys, "inspect", path))


def test_the_key_chooses(tmp_path, capsys):
    """Among several, by the path that the error lists."""
    torch.save({"model": _net().state_dict(), "ema": {"x": torch.eye(3)}}, tmp_path / "model.pt")
    assert len(_report(capsys, tmp_path / "model.pt", "--key", "ema")["weights"]) == 1
    error = _refused(capsys, "inspect", tmp_path / "model.pt", "--key", "nope")
    assert "'nope'; there are some under 'model', 'ema'" in error


def _folder(path, tensors, count=2, metadata=None):
    """As transformers writes it: several files and their index, or one."""
    from safetensors.torch import save_file

    path.mkdir()
    names = [[*tensors][k::count] for k in range(count)]
    files = [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    if count == 1:
        files = ["model.safetensors"]
    for file, some in zip(files, names, strict=True):
        save_file({name: tensors[name] for name in some}, path / file, metadata or {"format": "pt"})
    table = {name: file for file, some in zip(files, names, strict=True) for name in some}
    if count > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": table}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


@needs_safetensors
@pytest.mark.parametrize("count", [1, 2])
def test_folders_of_transformers_are_read(tmp_path, capsys, count):
    """One file, or several with an index; also by the index itself."""
    torch.save(_net().state_dict(), tmp_path / "model.pt")
    tensors = torch.load(tmp_path / "model.pt")
    _folder(tmp_path / "folder", tensors, count)
    expected = {row["name"]: row for row in _report(capsys, tmp_path / "model.pt")["weights"]}
    paths = [tmp_path / "folder", tmp_path / "folder" / "model.safetensors.index.json"]
    for path in paths[:count]:
        report = _report(capsys, path)
        assert report["file"] == str(path)
        assert {row["name"]: row for row in report["weights"]} == expected


# What is done to the folder -> a part of the error.
FOLDERS = {
    "a file missing": (
        lambda path: (path / "model-00002-of-00002.safetensors").unlink(), "00002.*is missing"),
    "no index": (lambda path: _index(path, "[1]"), "index.json: not an index"),
    "not JSON": (lambda path: _index(path, "{"), "index.json: not an index"),
    "elsewhere": (lambda path: _index(path, {"weight_map": {"a": "../x"}}), "beside it.*'../x'"),
    "a number": (lambda path: _index(path, {"weight_map": {"a": 3}}), "beside it.*3"),
    "empty": (lambda path: _index(path, {"weight_map": {}}), "lists no files"),
    "twice": (
        lambda path: shutil.copy(path / "model-00001-of-00002.safetensors",
                                 path / "model-00002-of-00002.safetensors"), "more than one"),
}  # fmt: skip


def _index(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (path / "model.safetensors.index.json").write_text(text)


@needs_safetensors
@pytest.mark.parametrize("case", FOLDERS)
def test_damaged_folders_are_one_line(tmp_path, capsys, case):
    """They name what is wrong."""
    damage, message = FOLDERS[case]
    _folder(tmp_path / "folder", {"a.weight": torch.eye(3), "b.weight": torch.eye(2)})
    damage(tmp_path / "folder")
    assert re.search(message, _refused(capsys, "inspect", tmp_path / "folder"))


# --- merge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", SUFFIXES)
@pytest.mark.parametrize("given", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_writes_what_the_original_class_loads(tmp_path, capsys, given, out, dtype):
    """From either format to either: its keys, its dtype, the merged weights."""
    model = _net().to(dtype)
    factorize(model, rank=2)
    _saved(tmp_path / f"in{given}", model)
    assert _run("merge", tmp_path / f"in{given}", tmp_path / f"out{out}") == 0
    assert "3 weights merged" in capsys.readouterr().out
    if out == ".safetensors":
        from safetensors.torch import load_file

        found = load_file(tmp_path / f"out{out}")
    else:
        found = torch.load(tmp_path / f"out{out}", weights_only=True)
    dense = _net().to(dtype)
    dense.load_state_dict(found)
    dense, model = dense.cpu(), model.cpu()  # where it was merged
    for k in (0, 3, 4):
        assert torch.equal(dense[k].weight, model[k].weight.materialize())
    assert torch.equal(dense[1].running_var, model[1].running_var)


@needs_safetensors
def test_merge_expands_ties(tmp_path, capsys):
    """The original class expects both names."""

    def make():
        model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False))
        model[2].weight = model[0].weight
        return model

    model = make()
    factorize(model, rank=2)
    save_factorized(model, tmp_path / "in.safetensors")
    for name in ("out.safetensors", "out.pt"):
        assert _run("merge", tmp_path / "in.safetensors", tmp_path / name) == 0
        assert set(reading.read(str(tmp_path / name)).tensors) == set(make().state_dict())
    capsys.readouterr()


@pytest.mark.parametrize("given", SUFFIXES)
def test_merge_keeps_both_names_of_a_shared_module(tmp_path, capsys, given):
    """The original class expects them; they are one in a safetensors file."""

    def make():
        model = nn.Sequential(nn.Linear(6, 8))
        model.twin = model[0]
        return model

    model = make()
    factorize(model, rank=2)
    _saved(tmp_path / f"in{given}", model)
    assert _run("merge", tmp_path / f"in{given}", tmp_path / "out.pt") == 0
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    make().load_state_dict(found)
    assert torch.equal(found["0.weight"], found["twin.weight"])
    capsys.readouterr()


def test_merge_keeps_what_lies_beside_the_tensors(tmp_path, capsys):
    """Extra state stays, where the format can hold it."""
    model = _net()
    factorize(model, rank=2)
    state = model.state_dict()
    state["extra"] = {"answer": 42}
    torch.save(state, tmp_path / "in.pt")
    assert _run("merge", tmp_path / "in.pt", tmp_path / "out.pt") == 0
    assert torch.load(tmp_path / "out.pt", weights_only=True)["extra"] == {"answer": 42}
    capsys.readouterr()
    error = _refused(capsys, "merge", tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert "more than tensors" in error


def _factorized_file(path):
    model = _net()
    factorize(model, rank=2)
    return _saved(path, model)


def test_merge_does_not_overwrite(tmp_path, capsys):
    """Unless it is told to."""
    _factorized_file(tmp_path / "in.pt")
    (tmp_path / "out.pt").write_text("precious")
    error = _refused(capsys, "merge", tmp_path / "in.pt", tmp_path / "out.pt")
    assert "exists already; --force" in error
    assert (tmp_path / "out.pt").read_text() == "precious"
    assert _run("merge", tmp_path / "in.pt", tmp_path / "out.pt", "--force") == 0
    assert _run("merge", tmp_path / "in.pt", tmp_path / "in.pt", "--force") == 0
    assert "0.weight" in torch.load(tmp_path / "in.pt", weights_only=True)


@pytest.mark.parametrize("out", SUFFIXES)
def test_a_disk_that_is_full_is_one_line(tmp_path, capsys, out):
    """The old file stays, and no half of a new one."""
    model = nn.Sequential(nn.Linear(200, 200))
    factorize(model, rank=2)
    _saved(tmp_path / "in.pt", model)
    (tmp_path / f"out{out}").write_text("precious")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        error = _refused(capsys, "merge", tmp_path / "in.pt", tmp_path / f"out{out}", "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"out{out}: File too large" in error
    assert (tmp_path / f"out{out}").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", f"out{out}"]


def _state(edit):
    model = _net()
    factorize(model, rank=2)
    state = model.state_dict()
    edit(state)
    return state


def _record(state):
    return state._metadata["3.parametrizations.weight.0"]["frobdecay"]


FIRST = "3.parametrizations.weight.original0"

# What cannot be merged -> (what is done to a factorized state dict, a part of the error).
UNMERGED = {
    "no record": (
        lambda s: s._metadata.clear(), "0.weight', '3.weight', '4.weight'.*how they are to be"),
    "a factor missing": (lambda s: s.pop("3.parametrizations.weight.original1"), "3.weight.*None"),
    "the first missing": (lambda s: s.pop(FIRST), "3.weight.*missing"),
    "another shape": (lambda s: s.update({FIRST: torch.ones(10, 3)}), r"3.weight.*\(10, 3\)"),
    "unknown kind": (lambda s: _record(s).update(kind="eval"), "3.weight.*'eval'.*LowRank"),
    "no config": (lambda s: _record(s).update(config=7), "3.weight.*config"),
    "no shape": (lambda s: _record(s).update(shape=None), "3.weight.*shape"),
    "no memory has it": (lambda s: _record(s).update(shape=[2**40, 2**40]), "3.weight.*shape"),
    "pattern": (lambda s: _record(s)["config"].update(pattern=[]), "3.weight.*expected a pattern"),
    "two dtypes": (
        lambda s: s.update({FIRST: s[FIRST].double()}), "3.weight.*one floating.*float64.*float32"),
    "integers": (
        lambda s: s.update({key: s[key].int() for key in s if key.startswith(FIRST[:-1])}),
        "3.weight.*int32"),
    "sparse": (lambda s: s.update({FIRST: s[FIRST].to_sparse()}), "3.weight.*sparse_coo"),
    "without numbers": (
        lambda s: s.update({key: s[key].to("meta") for key in s if key.startswith(FIRST[:-1])}),
        "3.weight.*meta"),
    "endless": (lambda s: _record(s)["config"].update(depth=10**12), "3.weight.*config"),
    "dense, too": (lambda s: s.update({"3.weight": torch.ones(10, 32)}), "both the factors.*3.w"),
    "huge": (
        lambda s: (_record(s).update(shape=[2**20, 2**20]),
                   s.update({FIRST: torch.ones(2**20, 1).bfloat16(),
                             FIRST[:-1] + "1": torch.ones(2**20, 1).bfloat16()}),
                   _record(s)["config"].update(rank=1)), "more than there is memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNMERGED)
def test_what_cannot_be_merged_is_named(tmp_path, capsys, case):
    """And nothing is written."""
    edit, message = UNMERGED[case]
    torch.save(_state(edit), tmp_path / "in.pt")
    error = _refused(capsys, "merge", tmp_path / "in.pt", tmp_path / "out.pt")
    assert re.search(f"in.pt: .*(?:{message})", error)
    assert not (tmp_path / "out.pt").exists()


def test_nothing_to_merge(tmp_path, capsys):
    """A dense file, and a name that says no format."""
    _saved(tmp_path / "in.pt")
    assert "nothing to merge" in _refused(capsys, "merge", tmp_path / "in.pt", tmp_path / "out.pt")
    assert "ends with" in _refused(capsys, "merge", tmp_path / "in.pt", tmp_path / "out.txt")


# --- hostile files ------------------------------------------------------------------------------


class _Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def _legacy(content):
    def write(path):
        torch.save(content(path), path, _use_new_zipfile_serialization=False)

    return write


def _zip(compression=zipfile.ZIP_STORED, **entries):
    def write(path):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in entries.items():
                archive.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), content)

    return write


def _compressed(path):
    """A real checkpoint, packed again: a small file that could unpack to anything."""
    torch.save({"w": torch.zeros(1000, 1000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _torchscript(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)), path)


def _bytes(content):
    return lambda path: path.write_bytes(content)


def _truncated(path):
    torch.save(_net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])


def _header(header, data=b""):
    def write(path):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return write


def _entry(shape, end, dtype="F32"):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


# Files from nowhere -> (how they are written, a part of the error).
HOSTILE = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "model.safetensors or pytorch_model.bin is expected"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "a pipe": (os.mkfifo, "expected a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "expected a regular file"),
    "text": (lambda path: path.write_text("hello, wörld, this is text"), "neither.*but text"),
    "random": (_bytes(os.urandom(7) + bytes(range(1, 100))), "neither.*something unknown"),
    "TorchScript": (_torchscript, r"TorchScript.*state_dict\(\) by torch.save"),
    "a program": (_zip(x__archive_format="pt2", x__version="0"), r"torch\.export"),
    "arrays": (_zip(**{"a.npy": b"\x93NUMPY"}), r"arrays of NumPy \(.npz\)"),
    "an array": (_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'}"), r"NumPy \(.npy\)"),
    "ONNX": (_bytes(b'\x08\x0e:7\n\x10\n\x01x\x12\x01y"\x08Identity'), "ONNX"),
    "ONNX of torch": (_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0"), "ONNX"),
    "HDF5": (_bytes(b"\x89HDF\r\n\x1a\n" + bytes(9)), "HDF5"),
    "GGUF": (_bytes(b"GGUF\x03" + bytes(30)), "GGUF"),
    "gzip": (_bytes(gzip.compress(b"hello")), "gzip; unpack"),
    "tar": (_bytes(bytes(257) + b"ustar\x0000" + bytes(300)), "tar archive; unpack"),
    "LFS": (_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4"), "git lfs pull"),
    "a web page": (_bytes(b"<!DOCTYPE html><html>"), "HTML.*download"),
    "JSON": (_bytes(b'{"hidden_size": 3}'), "but JSON"),
    "an index": (
        _bytes(b'{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}'),
        "in 2 files; give its folder, or.*m-1.safetensors"),
    "a pickle of no tensors": (_bytes(pickle.dumps({"w": 1}, 4)), "a pickle of another kind"),
    "zip": (_zip(readme="hello"), "something else than torch.save's"),
    "zip with a pickle": (_zip(archive__data_pkl=b"cos\nsystem\n(S'x'\ntR."), "x.pt: "),
    "bomb": (_compressed, "compressed archive"),
    "truncated zip": (_truncated, "damaged or truncated"),
    "empty zip": (lambda path: zipfile.ZipFile(path, "w").close(), "something else"),
    "truncated pickle": (
        lambda path: path.write_bytes(pickle.dumps({"w": [1] * 99}, 2)[:40]), "damaged"),
    "evil": (lambda path: torch.save({"w": _Evil(path.with_name("pwned"))}, path), "refused"),
    "evil, old format": (_legacy(lambda path: _Evil(path.with_name("pwned"))), "refused"),
    "evil, bare": (
        lambda path: path.write_bytes(pickle.dumps(_Evil(path.with_name("pwned")), 2)), "x.pt: "),
    "a whole model": (lambda path: torch.save(_net(), path), "such as a whole model.*state_dict"),
    "expanded": (
        lambda path: torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path),
        r"w says.*1000000, 1000000.*the file has 4"),
    "header that lies in length": (
        lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b'{"w": {}}'), "not a whole"),
    "header that is no JSON": (
        lambda path: path.write_bytes(struct.pack("<Q", 5) + b"{nope"), "not a whole"),
    "header that lies in shape": (_header(_entry([10**6, 10**6], 16), bytes(16)), "not a whole"),
    "header past the end": (_header(_entry([2, 2], 16), bytes(4)), "not a whole"),
    "no tensors": (_header({}), "no tensors|not a whole"),
    "only vectors": (lambda path: torch.save({"a": {"b": torch.ones(3)}}, path), "no weights"),
    "broken structure": (
        _header({"__metadata__": {"frobdecay": "["}, **_entry([2, 2], 16)}, bytes(16)), "not JSON"),
    "nested structure": (
        _header({"__metadata__": {"frobdecay": "[" * 10**5}, **_entry([2, 2], 16)}, bytes(16)),
        "not JSON"),
    "tie to nowhere": (
        _header({"__metadata__": {"frobdecay": json.dumps(
            {"version": 1, "weights": {}, "tied": {"a": "b"}})}, **_entry([2, 2], 16)},
            bytes(16)), "a is said to be b"),
}  # fmt: skip
SAFETENSORS = ("header", "no tensors", "broken", "nested", "tie")


@pytest.mark.parametrize("command", ["inspect", "merge", "factorize"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_one_line(tmp_path, capsys, case, command):
    """No traceback, nothing run, nothing written."""
    if case.startswith(SAFETENSORS):
        pytest.importorskip("safetensors")
    write, message = HOSTILE[case]
    path = tmp_path / "x.pt"
    write(path)
    rest = {"merge": ["out.pt"], "factorize": ["out.safetensors", "--rank", "2"]}.get(command, [])
    error = _refused(capsys, command, path, *(tmp_path / r if "." in r else r for r in rest))
    assert re.search(message, error)
    assert {file.name for file in tmp_path.iterdir()} <= {"x.pt"}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "\x1b[31m\n", "ж" * 100])
def test_files_of_any_name_are_read_and_written(tmp_path, capsys, name, suffix):
    """What cannot be printed is spelled."""
    model = _net()
    factorize(model, rank=2)
    _saved(tmp_path / f"x{suffix}", model)
    path = (tmp_path / f"x{suffix}").rename(tmp_path / f"{name}{suffix}")
    assert _run("inspect", path) == 0
    assert _run("merge", path, path, "--force") == 0
    out, err = capsys.readouterr()
    assert "3 weights merged" in out
    assert "\x1b" not in out
    assert err == ""
    if suffix == ".safetensors":
        save_factorized(model, path)
        assert len(load_factorized(_net(), path)) == 5


def test_names_cannot_write_to_the_terminal(tmp_path, capsys):
    """Escape sequences and markup in names are shown, not obeyed."""
    torch.save({"a\x1b[31m\n[bold].weight": torch.eye(3)}, tmp_path / "model.pt")
    assert _run("inspect", tmp_path / "model.pt") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"a\x1b[31m\n[bold].weight" in out


# --- the command itself -------------------------------------------------------------------------


def test_wrong_arguments_end_with_2(capsys):
    """As argparse ends, with the usage."""
    for arguments in ([], ["inspect"], ["nope"], ["inspect", "x", "--energy", "2"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage: frobdecay" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    """That of the package."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"frobdecay {frobdecay.__version__}\n"


def test_an_unattainable_ratio_is_one_line(tmp_path, capsys):
    """It says what can be attained."""
    _saved(tmp_path / "model.pt")
    assert "attainable" in _refused(capsys, "inspect", tmp_path / "model.pt", "--ratio", "0.001")


def test_it_runs_as_a_module(tmp_path):
    """In an interpreter of its own."""
    _saved(tmp_path / "model.pt")
    command = [sys.executable, "-m", "frobdecay", "inspect", str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "3.weight" in done.stdout
    assert done.stderr == ""


def test_the_reader_may_leave_early(tmp_path, capsys, monkeypatch):
    """As ``head`` does, which is no error."""
    _saved(tmp_path / "model.pt")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert _run("inspect", tmp_path / "model.pt") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("package", ["rich", "safetensors"])
def test_missing_packages_are_named_where_they_are_needed(tmp_path, capsys, monkeypatch, package):
    """By the extra that has them; without rich there is only no bar."""
    path = tmp_path / "model.safetensors"
    _header(_entry([2, 2], 16), bytes(16))(path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.torch", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "500")
    if package == "rich":
        assert _run("inspect", path) == 0
        assert "2×2" in capsys.readouterr().out
    else:
        assert re.search(r"need safetensors.*frobdecay\[cli\]", _refused(capsys, "inspect", path))


def test_long_work_shows_a_bar_on_stderr(tmp_path, capsys, monkeypatch):
    """On a terminal, after a second; JSON on stdout stays JSON."""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _saved(tmp_path / "model.pt")
    assert _run("inspect", tmp_path / "model.pt", "--json") == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["weights"]) == 3
    assert "decomposing" in err
    assert re.search(r"\d+ s left", err)
