"""``frobdecay factorize``: what it writes is what ``factorize`` makes."""

import json
import os
import re
import weakref
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import frobdecay
from frobdecay import factorize, load_factorized, merge, plan_ranks, save_factorized
from frobdecay.cli.main import main
from frobdecay.cli.read import read
from frobdecay.cli.skeleton import skeleton
from frobdecay.models.checkpoints.streams import Part, write_stream


def _net(**options):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 24), nn.Linear(24, 24)
    ).to(**options)


def _run(*arguments):
    return main([str(argument) for argument in arguments])


def _refused(capsys, *arguments):
    assert _run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def _folder(path, tensors, config=None):
    """Two files with their index, a tokenizer, and weights in a format that is not copied."""
    path.mkdir()
    names, table = [*tensors], {}
    for k in range(2):
        file = f"model-{k + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[k::2]}, path / file)
        table |= dict.fromkeys(names[k::2], file)
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "tokenizer.json").write_text("{}")
    (path / "tf_model.h5").write_text("dense")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("[]")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))


# Arguments -> those of ``factorize``.
RULES = {
    "rank": (["--rank", "3"], {"rank": 3}),
    "share": (["--rank", "0.5"], {"rank": 0.5}),
    "include": (["--rank", "4", "--include", "3", "4.weight"], {"rank": 4, "include": ["3", "4"]}),
    "ratio": (["--ratio", "0.6", "--include", "3", "4"], {"ratio": 0.6, "include": ["3", "4"]}),
    "allocate": (
        ["--ratio", "0.6", "--allocate", "energy", "--include", "3", "4"],
        {"ratio": 0.6, "allocate": "energy", "include": ["3", "4"]},
    ),
    "exclude": (["--rank", "4", "--exclude", "[04]*"], {"rank": 4, "exclude": ["0", "4"]}),
}


PREFIXES = ["_orig_mod.", "net._checkpoint_wrapped_module.", "net.."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_of_wrapped_models_are_those_of_the_file(tmp_path, capsys, prefix):
    """What torch.compile and its kin put into names is no obstacle, to either command."""
    dense, small, back = (tmp_path / name for name in ("in.pt", "out.safetensors", "back.pt"))
    state = {f"{prefix}{name}": tensor for name, tensor in _net().state_dict().items()}
    torch.save(state, dense)
    assert _run("inspect", dense, "--ratio", 0.5) == 0
    capsys.readouterr()
    wanted = [f"{prefix}3", f"{prefix}4.weight"] if "_" in prefix else ["*3", "*4.weight"]
    assert _run("factorize", dense, small, "--rank", 2, "--include", *wanted) == 0
    out, names = capsys.readouterr().out, [f"{prefix}3.weight", f"{prefix}4.weight"]
    assert all(f"{name} " in out for name in names)
    assert [*read(str(small)).records] == names
    assert _run("merge", small, back) == 0
    assert sorted(torch.load(back)) == sorted(state)


def test_two_names_of_one_weight_are_refused(tmp_path, capsys):
    """With a wrapper's segment and without: one of them would be lost. So in the loader."""
    dense, small, state = tmp_path / "in.pt", tmp_path / "out.safetensors", _net().state_dict()
    torch.save(state | {f"_orig_mod.{name}": value for name, value in state.items()}, dense)
    told = _refused(capsys, "factorize", dense, small, "--rank", 2)
    assert "expected either 0.weight or _orig_mod.0.weight, got both" in told
    assert not small.exists()
    torch.save(state, dense)
    assert _run("factorize", dense, small, "--rank", 2) == 0
    with safe_open(small, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"_orig_mod.0.bias": tensors["0.bias"] + 1}, small, metadata)
    with pytest.raises(ValueError, match=r"either 0\.bias or _orig_mod\.0\.bias, got both"):
        load_factorized(_net(), small)


def test_a_file_of_a_compiled_model_is_loaded(tmp_path):
    """Into the dense class, compiled or not."""
    dense, small = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save(torch.compile(_net()).state_dict(), dense)
    assert _run("factorize", dense, small, "--rank", 2) == 0
    one, other = load_factorized(_net(), small), load_factorized(torch.compile(_net()), small)
    torch.testing.assert_close(one.state_dict(), other._orig_mod.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [".pt", ".safetensors", "a folder"])
@pytest.mark.parametrize("case", RULES)
def test_it_writes_what_factorize_makes(tmp_path, capsys, given, case, dtype):
    """Loaded by ``load_factorized``; merged by the command, it is what ``merge`` makes."""
    arguments, options = RULES[case]
    model = _net(dtype=dtype)
    path, out, dense = tmp_path / f"in{given}", tmp_path / "out", tmp_path / "dense"
    if given == "a folder":
        _folder(path, model.state_dict())
    elif given == ".pt":
        torch.save({"epoch": 3, "model": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    if given != "a folder":
        out, dense = out.with_suffix(".safetensors"), dense.with_suffix(".safetensors")
    assert _run("factorize", path, out, *arguments) == 0
    printed = capsys.readouterr().out
    plan = factorize(model, **options)
    for row in plan.rows:
        if row.rank is not None:
            (line,) = [line for line in printed.splitlines() if line.startswith(row.name)]
            assert f"{row.error:.3f}" in line
    loaded = load_factorized(_net(dtype=dtype), out)
    assert {p.name for p in frobdecay.products(loaded)} == set(plan.ranks)
    for name in plan.ranks:
        ours, theirs = (m.get_submodule(name[0]).weight.materialize() for m in (loaded, model))
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(loaded[1].running_var, model[1].running_var)
    assert _run("merge", out, dense) == 0
    capsys.readouterr()
    found = merge(loaded).state_dict()
    files = [dense] if dense.is_file() else sorted(dense.glob("*.safetensors"))
    merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert merged.keys() == found.keys()
    torch.testing.assert_close(merged, dict(found))


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_the_first_and_the_last_layer_are_those_of_the_model(tmp_path, capsys, ending):
    """Also where a file has its names in the order of the alphabet; averages are no parameters."""
    model = nn.Module()
    model.conv1, model.bn = nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16)
    model.layers = nn.ModuleList(nn.Conv2d(k, 64, 3) for k in (16, *[64] * 10))
    model.fc = nn.Linear(64, 10)
    save, out = torch.save if ending == ".pt" else save_file, tmp_path / "out.safetensors"
    save(model.state_dict(), tmp_path / f"in{ending}")
    assert _run("factorize", tmp_path / f"in{ending}", out, "--ratio", "0.2") == 0
    plan = plan_ranks(model, ratio=0.2)
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("fc.weight")).endswith("the last layer")
    assert next(line for line in lines if line.startswith("conv1")).endswith("the first layer")
    assert f"{plan.before:,} → {plan.after:,}" in lines[-1] + lines[-2]


def test_what_begins_with_an_axis_of_one_is_no_layer(tmp_path, capsys):
    """Embeddings of positions and class tokens, which are no convolutions of one channel."""
    tensors = {"pos_embed": (1, 65, 64), "cls_token": (1, 1, 64), "fc1.weight": (256, 64)}
    given = {name: torch.randn(*shape) for name, shape in tensors.items()}
    save_file(given, tmp_path / "in.safetensors")
    assert (
        _run("factorize", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--rank=4")
        == 0
    )
    found = load_file(tmp_path / "out.safetensors")
    assert {name for name in given if name in found} == {"pos_embed", "cls_token"}
    torch.testing.assert_close(found["pos_embed"], given["pos_embed"])
    assert "pos_embed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names",
    [
        ["conv1", "layers.0", "layers.2", "layers.10", "fc"],
        ["embed_tokens", "norm", "layers.0.mlp", "layers.2.mlp", "lm_head"],
        ["features.0", "features.3", "features.12", "classifier.0", "classifier.6"],
        ["embeddings.word", "encoder.layer.0.output", "encoder.layer.11.output", "pooler.dense"],
        ["0", "2", "10"],
        ["stem", "blocks.1.multihead", "blocks.9.multihead", "head"],
    ],
)
def test_names_in_the_order_of_the_alphabet_are_put_in_that_of_layers(tmp_path, names):
    """As they were registered, so far as names say it; any other order is kept."""
    names = [f"{name}.weight" for name in names]
    for given, want in ((sorted(names), names), (names[::-1], names[::-1])):
        torch.save({name: torch.ones(3, 3) for name in given}, tmp_path / "in.pt")
        assert [*skeleton(read(str(tmp_path / "in.pt")), numbers=True).names.values()] == want


@pytest.mark.parametrize("case", ["factors", "ties", "several files"])
def test_the_order_of_the_alphabet_is_that_of_the_keys_in_each_file(tmp_path, capsys, case):
    """Not of the weights that they are of: the layer that is called head is the last one."""
    model = nn.ModuleDict(
        {name: nn.Linear(16, 16, bias=False) for name in ("a", "stem", "mid", "head")}
    )
    model["mha"] = nn.MultiheadAttention(16, 2)
    path = tmp_path / "in.safetensors"
    if case == "factors":  # mha.in_proj_weight behind mha.out_proj.weight
        factorize(model, rank=2, include="mha.in_proj_weight")
    elif case == "ties":
        model["a"].weight = model["mid"].weight
    if case == "several files":
        path = tmp_path / "in"
        _folder(path, model.state_dict(), {"architectures": ["None"]})
    else:
        save_factorized(model, path)
    assert _run("inspect", path, "--json", "--ratio", "0.8") == 0
    found = json.loads(capsys.readouterr().out)["weights"]
    planned = {row["name"]: row["planned_rank"] for row in found}
    assert planned["head.weight"] is None
    assert planned["stem.weight"] is not None


def test_a_folder_is_copied_without_other_weights(tmp_path, capsys):
    """Configuration with the records, tokenizer, subfolders; an index that is right."""
    model = _net()
    config = {"architectures": ["None"], "hidden_size": 3}
    _folder(tmp_path / "in", model.state_dict(), config)
    assert _run("factorize", tmp_path / "in", tmp_path / "out", "--ratio", "0.7") == 0
    assert "layers are told apart by the shapes" in capsys.readouterr().err
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in (tmp_path / "in").iterdir()} - {"tf_model.h5"}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    structure = written.pop("quantization_config")
    assert structure["quant_method"] == "frobdecay"
    assert "frobdecay" in written.pop("transformers_weights")
    assert written == config
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = [*(tmp_path / "out").glob("*.safetensors")]
    assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
    size = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert index["metadata"]["total_size"] == size
    assert _run("merge", tmp_path / "out", tmp_path / "dense") == 0
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == config
    assert {file.name for file in (tmp_path / "dense").iterdir()} == names


def test_a_folder_of_save_pretrained_is_merged_by_its_configuration(tmp_path, capsys):
    """Its files have no structure of their own; factors of one weight may be in two of them."""
    model = _net()
    factorize(model, rank=2)
    records = {p.name: model.get_submodule(p.name[0]).parametrizations.weight[0].record()
               for p in frobdecay.products(model)}  # fmt: skip
    structure = {"quant_method": "frobdecay", "version": 1, "weights": records}
    _folder(tmp_path / "in", model.state_dict(), {"quantization_config": structure})
    assert _run("inspect", tmp_path / "in", "--json") == 0
    weights = json.loads(capsys.readouterr().out)["weights"]
    assert {row["name"]: row["rank"] for row in weights} == dict.fromkeys(records, 2)
    assert _run("merge", tmp_path / "in", tmp_path / "out.safetensors") == 0
    expected = merge(model).state_dict()
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(found, dict(expected))


def test_weights_that_are_one_stay_one(tmp_path, capsys):
    """Tied ones stay dense, as ``factorize`` leaves them."""
    model = _net()
    model[4].weight = nn.Parameter(model[3].weight[:, :24])
    state = model.state_dict() | {"head.weight": model[3].weight.detach()}
    torch.save(state, tmp_path / "in.pt")
    assert _run("factorize", tmp_path / "in.pt", tmp_path / "out.safetensors", "--rank", "2") == 0
    assert "; Python's on_tied='untie' gives it a copy" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_are_one_count_once(tmp_path, capsys, suffix):
    """In a budget and in the shares of the table, dense ones as well as factors."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    model[1].weight, model[3] = model[0].weight, model[2]
    factorize(model, rank=2, include="2")
    path, numbers = tmp_path / f"in{suffix}", sum(p.numel() for p in model.parameters())
    if suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        save_factorized(model, path)
    assert _run("inspect", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == numbers
    assert sum(row["parameters"] for row in found["weights"]) == 16 * 16 + 2 * 16 * 2
    assert {row["name"]: row["remark"] for row in found["weights"]} == {
        "0.weight": "",
        "1.weight": "tied to 0.weight",
        "2.weight": "",
        "3.weight": "tied to 2.weight",
    }
    checkpoint = read(str(path))
    made = skeleton(checkpoint, numbers=True)
    assert sum(p.numel() for p in made.model.parameters()) == numbers


REFUSED = {
    "no rule": ([], None, "one of the arguments --ratio --rank --energy is required"),
    "two": (["--rank", "2", "--ratio", "0.5"], None, "not allowed with"),
    "a rank of 0": (["--rank", "0"], None, "above 0"),
    "nothing of that name": (
        ["--rank", "2", "--include", "nope"],
        "out.safetensors",
        "rank=4/in.safetensors: --include 'nope' matches nothing",
    ),
    "a vector": (["--rank", "2", "--include", "1"], "out.safetensors", "'1'"),
    "to divide no budget": (
        ["--rank", "2", "--allocate", "uniform"],
        "out.safetensors",
        "--allocate divides a budget: give --ratio or Python's tolerance=, not --rank",
    ),
    "another way": (["--ratio", "0.5", "--allocate", "sensitivity"], None, "invalid choice"),
    "too small": (
        ["--ratio", "0.001"],
        "out.safetensors",
        r"--ratio 0\.001 cannot be attained.*\(with --include, it",
    ),
    "another suffix": (["--rank", "2"], "out.pt", "ends with .safetensors"),
    "no folder from a file": (["--rank", "2"], "out", "ends with .safetensors"),
    "there already": (["--rank", "2"], "in.safetensors", "exists already; --force"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, case):
    """And nothing is written; in the words of the command line."""
    arguments, out, message = REFUSED[case]
    tmp_path = tmp_path / "rank=4"
    tmp_path.mkdir()
    save_file(_net().state_dict(), tmp_path / "in.safetensors")
    if out is None:
        with pytest.raises(SystemExit):
            _run("factorize", tmp_path / "in.safetensors", tmp_path / "out", *arguments)
        err = capsys.readouterr().err
    else:
        given = tmp_path / "in.safetensors"
        err = _refused(capsys, "factorize", given, tmp_path / out, *arguments)
    assert re.search(message, err)
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_folder_is_written_as_files_are(tmp_path, capsys, monkeypatch):
    """In a locked folder of its own, synchronized; what a killed run left there is gone."""
    _folder(tmp_path / "dense", _net().state_dict())
    killed = tmp_path / ".frobdecay-killed"
    killed.mkdir()
    (killed / ".frobdecay-lock").touch()
    seen, synced, replace = [], [], os.replace

    def replacing(old, new):
        if Path(old).is_dir():
            seen.extend(tmp_path.glob(".frobdecay-*/.frobdecay-lock"))
        replace(old, new)

    monkeypatch.setattr("frobdecay.cli.write.sync", lambda path: synced.append(path.name))
    monkeypatch.setattr("os.replace", replacing)
    assert _run("factorize", tmp_path / "dense", tmp_path / "small", "--ratio", "0.5") == 0
    assert len(seen) == 1
    assert not [*tmp_path.glob(".frobdecay-*")]
    assert {"model.safetensors.index.json", "tokenizer.json", "small"} < {*synced}
    assert synced[-1] == tmp_path.name


def test_a_folder_that_is_there_stays(tmp_path, capsys):
    """Unless it is empty."""
    _folder(tmp_path / "in", _net().state_dict())
    (tmp_path / "out").mkdir()
    assert _run("factorize", tmp_path / "in", tmp_path / "out", "--rank", "2") == 0
    capsys.readouterr()
    error = _refused(capsys, "factorize", tmp_path / "in", tmp_path / "out", "--rank", "2")
    assert "expected the name of a new folder" in error


def test_what_is_not_finite_is_named_and_nothing_is_written(tmp_path, capsys):
    """No half of a file."""
    state = _net().state_dict()
    state["4.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "in.safetensors")
    given, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    assert "4.weight holds NaN" in _refused(capsys, "factorize", given, out, "--rank", "2")
    assert not out.exists()


def test_factors_without_a_record_are_named(tmp_path, capsys):
    """They could be of anything."""
    save_file({"a.parametrizations.weight.original0": torch.eye(3), "b.weight": torch.eye(4)},
              tmp_path / "in.safetensors")  # fmt: skip
    given, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    error = _refused(capsys, "factorize", given, out, "--rank", "2")
    assert re.search(r"in\.safetensors: it has factors of \['a.weight'\].*save_factorized", error)


def test_factors_are_carried_along(tmp_path, capsys):
    """A second run factorizes the rest."""
    save_file(_net().state_dict(), tmp_path / "in.safetensors")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    given = tmp_path / "in.safetensors"
    assert _run("factorize", given, one, "--rank", "2", "--include", "3") == 0
    capsys.readouterr()
    assert _run("factorize", one, two, "--rank", "3", "--include", "[34]") == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"3\.weight +24×32 +2 +112 +112 .*(?s:.)*already factorized, and left", printed
    )
    model = _net()
    factorize(model, rank=2, include="3")
    counts = plan_ranks(model, rank=3, include="[34]")
    assert f"{counts.before:,} → {counts.after:,}" in printed
    found = {p.name: p.rank for p in frobdecay.products(load_factorized(_net(), two))}
    assert found == {"3.weight": 2, "4.weight": 3}


# --- the writer ---------------------------------------------------------------------------------


def test_a_stream_is_a_file_of_safetensors(tmp_path):
    """Every dtype, empty tensors, scalars, views; read by the library itself."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
             torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn,
             torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)  # fmt: skip
    tensors = {str(kind): torch.arange(3).to(kind) for kind in reversed(kinds)}
    tensors |= {"none": torch.ones(0, 3), "scalar": torch.tensor(2.5), "view": torch.eye(4)[:, 1]}
    tensors["turned"] = torch.arange(6.0).view(2, 3).T
    tensors["conjugated"] = torch.tensor([1 + 2j, 3j]).conj()
    tensors["negated"] = torch.tensor([1 + 2j]).conj().imag
    write_stream(tmp_path / "x", [Part.of(n, t) for n, t in tensors.items()], {"a": "b"})
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        real = tensor if tensor.is_complex() else tensor.float()
        assert torch.equal(found[name].to(real.dtype), real)


class Elsewhere(torch.Tensor):
    """Its numbers are not in its own memory, as those of quantized tensors."""

    __torch_dispatch__ = torch._C._disabled_torch_function_impl


def test_what_has_no_name_in_the_format_is_refused(tmp_path):
    """Before anything is written."""
    wide = torch.ones(2, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"x is of torch\.complex128"):
        write_stream(tmp_path / "x", [Part.of("x", wide)], {})
    with pytest.raises(ValueError, match=r"x is no whole dense tensor.*sparse"):
        Part.of("x", torch.eye(2).to_sparse())
    wrapped = torch.Tensor._make_wrapper_subclass(Elsewhere, (2, 2))
    with pytest.raises(ValueError, match=r"x is no whole dense tensor \(Elsewhere"):
        Part.of("x", wrapped)
    assert not (tmp_path / "x").exists()


def test_a_stream_makes_each_part_when_its_turn_comes(tmp_path):
    """No two of them are alive at once."""
    alive, most = [], []

    def make():
        alive[:] = [one for one in alive if one() is not None]
        most.append(len(alive))
        made = torch.ones(1000)
        alive.append(weakref.ref(made))
        return [made]

    parts = [Part((str(i),), ((1000,),), torch.float32, make) for i in range(5)]
    write_stream(tmp_path / "x", parts, {})
    assert max(most) <= 1
