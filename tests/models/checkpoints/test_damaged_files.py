"""Files that are damaged, or made to harm, end in the errors that are documented, and in no other.

Valid files are changed at random: their bytes, the JSON of the header and of the structure in it,
what is pickled. The loader and the command line then read them.
"""

import copy
import functools
import io
import json
import struct
import warnings
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from frobdecay import CP, LowRank, Tucker
from frobdecay.cli.main import main
from frobdecay.models.checkpoints import factorized
from frobdecay.models.checkpoints.factorized import load_factorized, save_factorized
from frobdecay.models.factorize import factorize
from frobdecay.models.merge import merge

load_file = pytest.importorskip("safetensors.torch").load_file
pytest.importorskip("rich")


def _dense():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Conv2d(2, 4, 3), nn.Embedding(9, 6), nn.Linear(6, 8), nn.BatchNorm1d(3)
    )
    model.tied, model.shared = nn.Linear(6, 8), model[0]
    model.tied.weight = model[3].weight
    return model


@functools.cache
def _factorized():
    model = _dense()
    factorize(model, rank=2, include="0", parametrization=functools.partial(LowRank, depth=1))
    factorize(model, rank=2, include="1", parametrization=Tucker)
    factorize(model, rank=2, include="2", parametrization=CP)
    return model


# --- damage -------------------------------------------------------------------------------------


class Whole(list):
    """A list that is neither copied nor looked into here: that would recurse too deeply."""

    def __deepcopy__(self, memo):
        """Itself: nothing changes it."""
        return self


NESTED = Whole(functools.reduce(lambda inner, _: [inner], range(900), 0))
NUMBERS = [0, 1, -1, 3, 65, 2**40, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")]
NAMES = ["", "\ud800", "a.b", "x" * 3000, "0.weight", "tied.weight", "shared.weight", "4.weight"]
WORDS = ["o i -> i o", "(a o) i -> a o i", "flat", "CP", "LowRank", "kaiming", "frobdecay"]
TYPES = ["F64", "I8", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "F8_E8M0", "C64", "__metadata__"]
LISTS = [[], {}, NESTED, [1] * 100, [2, 2], [0, 16], [16, 0], [-8, 8], {"g": 2}, {"o": -1}]
TEXTS = [*NAMES, *WORDS, *TYPES]
VALUES = [None, True, *NUMBERS, *TEXTS, *LISTS]
ODD = st.sampled_from(VALUES)


def _paths(value, path=()):
    """The way to everything in a value of JSON."""
    if path:
        yield path
    listed = enumerate(value) if type(value) is list else ()
    for key, one in value.items() if isinstance(value, dict) else listed:
        yield from _paths(one, (*path, key))


def _at(value, path):
    return functools.reduce(lambda inner, key: inner[key], path, value)


@st.composite
def changed(draw, value):
    """A value of JSON with a few things in it replaced, removed, added, or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(_paths(value))
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        parent, key = _at(value, path[:-1]), path[-1]
        act = draw(st.sampled_from(["replace", "replace", "remove", "add", "copy"]))
        if act == "remove":
            del parent[key]
        elif act == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(TEXTS))] = copy.deepcopy(parent[key])
        else:
            other = _at(value, draw(st.sampled_from(paths))) if act == "copy" else draw(ODD)
            parent[key] = copy.deepcopy(other)
    return value


@st.composite
def torn(draw, content, near=None):
    """Bytes of which some are others, missing or there twice, or the end is missing."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, min(len(content), near or len(content))))
        end = start + draw(st.sampled_from([1, 1, 2, 8, 100]))
        act = draw(st.sampled_from(["change", "remove", "insert", "repeat", "end"]))
        if act == "end":
            del content[start:]
        elif act == "repeat":
            content[start:start] = content[start:end]
        else:
            new = b"" if act == "remove" else draw(st.binary(min_size=1, max_size=8))
            content[start : start if act == "insert" else end] = new
    return bytes(content)


# --- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all examples are written."""
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def whole(folder):
    """A valid safetensors file: its header and the rest."""
    save_factorized(_factorized(), folder / "whole.safetensors")
    content = (folder / "whole.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def _packed(header, data):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _damaged_safetensors(data, whole):
    header, rest = copy.deepcopy(whole)
    where = data.draw(st.sampled_from(["structure", "structure", "header", "bytes"]))
    if where == "bytes":
        return data.draw(torn(_packed(header, rest), near=2000))
    if where == "structure":
        structure = data.draw(changed(json.loads(header["__metadata__"]["frobdecay"])))
        header["__metadata__"]["frobdecay"] = json.dumps(structure)
    else:
        header = data.draw(changed(header))
    return _packed(header, rest)


# What a tensor in a pickled table may be instead.
OTHERS = {
    "half": lambda t: t.half(),
    "double": lambda t: t.double(),
    "integers": lambda t: t.to(torch.int8),
    "complex": lambda t: t.to(torch.complex64),
    "eight bits": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t.float(), t.float()]),
    "without numbers": lambda t: t.to("meta"),
    "empty": lambda t: t.new_empty(0, *t.shape),
    "scalar": lambda t: t.sum(),
    "deeper": lambda t: t[None, None, None, None, None],
    "endless": lambda t: t.reshape(-1)[:1].expand(10**7, 10**7),
    "transposed": lambda t: t.mT if t.ndim > 1 else t,
    "no number": lambda t: t.float() * float("nan"),
    "no tensor": lambda t: 3,
    "a table": lambda t: {"w": t},
}


def _damaged_torch(data):
    state = _factorized().state_dict()
    where = data.draw(st.sampled_from(["record", "record", "tensor", "bytes", "pickle"]))
    if where == "record":
        place = data.draw(st.sampled_from([k for k, v in state._metadata.items() if len(v) > 1]))
        state._metadata[place] = data.draw(changed(state._metadata[place]))
    if where == "tensor":
        name = data.draw(st.sampled_from(sorted(state)))
        made = OTHERS[data.draw(st.sampled_from(sorted(OTHERS)))]
        with warnings.catch_warnings():  # of nested and quantized tensors
            warnings.simplefilter("ignore")
            state[name] = made(state[name])
    file = io.BytesIO()
    try:
        torch.save(state, file, _use_new_zipfile_serialization=data.draw(st.booleans()))
    except RecursionError:  # what pickle cannot write is in no file
        return b""
    content = file.getvalue()
    if where == "bytes":
        return data.draw(torn(content))
    if where == "pickle" and content.startswith(b"PK"):  # with the right checksum
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                inner = old.read(name)
                new.writestr(name, data.draw(torn(inner)) if name.endswith("data.pkl") else inner)
        return file.getvalue()
    return data.draw(torn(content, near=4000)) if where == "pickle" else content


# --- who reads them -----------------------------------------------------------------------------


def _check_command_line(capsys, path):
    """Either it works, or there is one line and exit code 2."""
    for arguments in (["inspect", "--ratio", "0.5"], ["merge", "--force"]):
        rest = [str(path.with_name("merged.pt"))] if arguments[0] == "merge" else []
        code = main([arguments[0], str(path), *rest, *arguments[1:]])
        out, err = capsys.readouterr()
        assert (code, out == "", err.count("\n")) in ((0, False, 0), (2, True, 1)), err


def _check_loader(path):
    """Either it works, or the model is as it was."""
    model = _dense()
    before = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    try:
        load_factorized(model, path)
    except (OSError, ValueError):
        assert {id(tensor) for tensor in model.state_dict(keep_vars=True).values()} == before
        assert type(model[0]) is nn.Linear


def test_every_field_of_a_structure_may_be_anything(folder, whole, monkeypatch):
    """Whatever stands in its place, alone; the files are left out, for speed."""
    header, _ = whole
    structure = json.loads(header["__metadata__"]["frobdecay"])
    tensors = load_file(folder / "whole.safetensors")
    model, refused = _dense(), 0
    for path in _paths(structure):
        for value in VALUES:
            changed = copy.deepcopy(structure)
            _at(changed, path[:-1])[path[-1]] = value
            metadata = {"frobdecay": json.dumps(changed)}
            monkeypatch.setattr(factorized, "read_safetensors", lambda _, m=metadata: (tensors, m))
            try:
                load_factorized(model, folder / "whole.safetensors")
            except ValueError:
                refused += 1
            else:
                merge(model)
    assert refused > 0.9 * len(list(_paths(structure))) * len(VALUES)


MANY = settings(
    max_examples=4 * settings().max_examples,
    suppress_health_check=list(HealthCheck),  # one capsys for all examples is what is meant
)


@MANY
@given(data=st.data())
def test_damaged_safetensors_files(folder, whole, capsys, data):
    """For the loader and for the command line."""
    path = folder / "damaged.safetensors"
    path.write_bytes(_damaged_safetensors(data, whole))
    _check_loader(path)
    _check_command_line(capsys, path)


@MANY
@given(data=st.data())
def test_damaged_files_of_torch(folder, capsys, data):
    """For the command line, in both formats that torch has had."""
    path = folder / "damaged.pt"
    path.write_bytes(_damaged_torch(data))
    _check_command_line(capsys, path)
