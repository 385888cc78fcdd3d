"""The benchmark of the README: its loaders, its models, and the whole of it in miniature."""

import io
import itertools
import json
import os
import pathlib
import pickle
import re
import struct
import sys
import tarfile

import numpy as np
import pytest
import torch
from torch import nn

import frobdecay
from benchmarks import quickstart, report, training
from benchmarks.data import load
from benchmarks.models import resnet
from benchmarks.training import ARMS, Protocol, Run, train

pytestmark = pytest.mark.cpu("loads there; trains on the device that its options name")
ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)


def images(count, *shape):
    """Random pixels."""
    return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count, classes=3):
    """All classes in turn."""
    return np.arange(count) % classes


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the published archives."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, text):
        self.write(pickle.BINSTRING + struct.pack("<i", len(text)) + text)

    dispatch[bytes] = save_string


def pickled(content):
    """What Python 2 would have written."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def batch(count, label=b"labels", classes=3):
    """What a CIFAR archive pickles."""
    return {
        b"data": images(count, 3072),
        label: labels(count, classes).tolist(),
        b"batch_label": b"",
    }


def cifar10(root, change=lambda name, content: content):
    """A directory laid out as CIFAR-10's."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(change(name, pickled(batch(4))))
    return folder


def tar_of(folder, path):
    """The same as an archive."""
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


def jpegs(count, size=8):
    """Packed JPEGs at quality 75 and their offsets."""
    from PIL import Image

    files = []
    for pixels in images(count, size, size, 3):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=75)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    return np.concatenate(files), np.cumsum([0, *map(len, files)])


def write_plain(root):
    """Grey images of uint8."""
    np.savez(
        root / "set.npz",
        x_train=images(20, 8, 8), y_train=labels(20), x_test=images(6, 8, 8), y_test=labels(6),
    )  # fmt: skip
    return root / "set.npz", (1, 8, 8)


def write_colour(root):
    """Colour last, floating point, labels in a column."""
    x, x_test = images(20, 8, 6, 3).astype(np.float64), images(6, 8, 6, 3).astype(np.float64)
    y, y_test = labels(20)[:, None], labels(6)[:, None]
    np.savez(root / "set.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return root / "set.npz", (3, 8, 6)


def write_packed(root):
    """Packed JPEGs."""
    jpeg_train, off_train = jpegs(20)
    jpeg_test, off_test = jpegs(6)
    np.savez(
        root / "set.npz",
        jpeg_train=jpeg_train, off_train=off_train, y_train=labels(20),
        jpeg_test=jpeg_test, off_test=off_test, y_test=labels(6), names=np.array(["a", "b", "c"]),
    )  # fmt: skip
    return root / "set.npz", (3, 8, 8)


def write_cifar10_directory(root):
    """The unpacked archive."""
    return cifar10(root), (3, 32, 32)


def write_cifar10_parent(root):
    """The directory that the archive was unpacked in."""
    return cifar10(root).parent, (3, 32, 32)


def write_cifar10_tar(root):
    """CIFAR-10 as downloaded."""
    return tar_of(cifar10(root), root / "cifar-10-python.tar.gz"), (3, 32, 32)


def write_cifar100_tar(root):
    """CIFAR-100 as downloaded."""
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 20), ("test", 6)):
        (folder / name).write_bytes(pickled(batch(count, b"fine_labels")))
    return tar_of(folder, root / "cifar-100-python.tar.gz"), (3, 32, 32)


FORMATS = {
    name.removeprefix("write_"): function
    for name, function in dict(globals()).items()
    if name.startswith("write_")
}


@pytest.mark.covers("D28")
@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_gives_three_disjoint_parts(tmp_path, format_):
    """Images arrive as (N, C, H, W), a quarter of a tiny training set held out."""
    path, shape = FORMATS[format_](tmp_path)
    data = load(str(path))
    assert [len(part[0]) for part in (data.train, data.val)] == [15, 5]
    assert data.train[0].shape[1:] == data.test[0].shape[1:] == shape
    assert data.classes == 3
    assert data.natural == (shape[0] == 3)
    both = torch.cat([data.train[0], data.val[0]]).flatten(1)
    assert len(both.unique(dim=0)) == 20


@pytest.mark.parametrize("format_", FORMATS)
def test_training_images_are_normalized(tmp_path, format_):
    """Mean 0 and variance 1 by channel, in float32."""
    data = load(str(FORMATS[format_](tmp_path)[0]))
    pixels = data.normalize(data.train[0])
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(
        pixels.mean((0, 2, 3)), torch.zeros(pixels.shape[1]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        pixels.std((0, 2, 3)), torch.ones(pixels.shape[1]), atol=1e-5, rtol=0
    )


def test_packed_jpegs_say_so(tmp_path):
    """Whoever shows a figure of them learns that these are not the original pixels."""
    assert load(str(write_packed(tmp_path)[0])).note == (
        "images are JPEG quality 75, not the original pixels"
    )


def test_cifar_pixels_arrive_in_order(tmp_path):
    """3072 bytes are the red, the green and the blue plane, row by row."""
    folder = cifar10(tmp_path)
    first = pickle.loads((folder / "test_batch").read_bytes(), encoding="bytes")[b"data"][0]
    assert np.array_equal(load(str(folder)).test[0][0].numpy().ravel(), first)


def test_relative_names_are_found_below_the_environments_root(tmp_path, monkeypatch):
    """FROBDECAY_DATA=… --data set.npz."""
    write_plain(tmp_path)
    monkeypatch.setenv("FROBDECAY_DATA", str(tmp_path))
    assert load("set.npz").name == "set"


@pytest.mark.parametrize(("limit", "want"), [(None, (997, 300)), (100, (100, 300)), (5, (5, 300))])
def test_limit_bounds_the_training_images(limit, want):
    """The digits: 500 for test, 300 for validation, the rest or fewer to train on (D28)."""
    data = load("digits", limit=limit)
    assert (len(data.train[0]), len(data.val[0]), len(data.test[0])) == (*want, 500)


class _Hostile:
    """Unpickled without care, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("packed", [False, True], ids=["directory", "tar.gz"])
def test_hostile_archive_is_refused_and_not_run(tmp_path, packed):
    """A pickle may call numpy's constructors only; the error names what it asked for."""
    prey = tmp_path / "prey"
    hostile = pickled({b"data": _Hostile(prey), b"labels": []})
    path = cifar10(tmp_path, lambda name, good: hostile if name == "data_batch_3" else good)
    path = tar_of(path, tmp_path / "cifar.tar.gz") if packed else path
    with pytest.raises(ValueError, match=r"data_batch_3 .* nothing in it was run.*mkdir"):
        load(str(path))
    assert not prey.exists()


def test_object_arrays_are_refused(tmp_path):
    """An .npz can hold pickles, too."""
    np.savez(
        tmp_path / "set.npz",
        x_train=np.array([_Hostile(tmp_path / "prey")]), y_train=labels(1),
        x_test=images(1, 8, 8), y_test=labels(1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="Object arrays"):
        load(str(tmp_path / "set.npz"))
    assert not (tmp_path / "prey").exists()


def save(root, **arrays):
    """A wrong .npz."""
    np.savez(root / "set.npz", **arrays)
    return root / "set.npz"


def text(root, name, content="hello"):
    """A wrong file."""
    (root / name).write_text(content)
    return root / name


def good(**changes):
    """The four arrays, some replaced."""
    arrays = {"x_train": images(8, 4, 4), "y_train": labels(8)}
    return {**arrays, "x_test": images(2, 4, 4), "y_test": labels(2), **changes}


FOREIGN = {
    "other arrays": (lambda root: save(root, weights=images(3)), "got .'weights'."),
    "flat images": (lambda root: save(root, **good(x_train=images(8, 16))), r"got uint8 \(8, 16\)"),
    "five channels": (
        lambda root: save(root, **good(x_train=images(8, 4, 4, 5))),
        "1 or 3 channels",
    ),
    "too few labels": (lambda root: save(root, **good(y_train=labels(7))), "as many labels"),
    "float labels": (lambda root: save(root, **good(y_train=labels(8) * 1.0)), "got float64"),
    "other test size": (lambda root: save(root, **good(x_test=images(2, 4, 5))), "one image size"),
    "too small": (
        lambda root: save(root, **good(x_train=images(1, 4, 4), y_train=labels(1))),
        "4 im",
    ),
    "text": (lambda root: text(root, "cifar.npz"), "expected an .npz file"),
    "empty directory": (lambda root: root, "got none of them"),
    "no pickle": (
        lambda root: cifar10(root, lambda name, batch: b"hello"),
        "data_batch_1 is not a CIFAR batch",
    ),
    "another pickle": (
        lambda root: cifar10(root, lambda name, batch: pickled([1, 2])),
        "data_batch_1 to hold 'data'",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_content_is_refused(tmp_path, case):
    """The error names the file and what was found in it."""
    make, message = FOREIGN[case]
    with pytest.raises(ValueError, match=message) as caught:
        load(str(make(tmp_path)))
    assert str(tmp_path) in str(caught.value) or "data_batch" in str(caught.value)


def test_missing_file_is_named(monkeypatch):
    """With the hint at FROBDECAY_DATA where it is not set."""
    monkeypatch.delenv("FROBDECAY_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"no data set at nowhere\.npz; FROBDECAY_DATA"):
        load("nowhere.npz")


def test_missing_torchvision_is_named(monkeypatch):
    """Imported only for torchvision:NAME, and the error says what to install."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        load("torchvision:CIFAR10")


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)]
)
def test_resnets_have_the_published_sizes(depth, parameters):
    """He et al.: 0.27, 0.46, 0.85 and 1.7 million."""
    assert sum(p.numel() for p in resnet(depth).parameters()) == parameters


@pytest.mark.parametrize("depth", [2, 9, 18])
def test_other_depths_are_refused(depth):
    """Depths are 6k + 2 from 8."""
    with pytest.raises(ValueError, match="6k"):
        resnet(depth)


def test_resnet_takes_other_images():
    """Channels, classes, width and odd sizes are arguments of the data."""
    model = resnet(8, width=4, channels=1, classes=7)
    assert model(torch.randn(2, 1, 28, 27)).shape == (2, 7)


def test_augmentation_keeps_what_it_does_not_shift_out():
    """Without shift an image stays itself or is mirrored."""
    pixels = torch.randn(16, 3, 5, 5)
    places = training._places(
        len(pixels), pixels.shape[2:], torch.Generator().manual_seed(0), shift=0
    )
    out = training._cut(pixels, *places, shift=0)
    kept = [torch.equal(a, b) for a, b in zip(out, pixels, strict=True)]
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(out, pixels, strict=True)]
    assert all(a != b for a, b in zip(kept, flipped, strict=True))
    assert 0 < sum(kept) < 16


TINY = Protocol(depth=8, width=4, ratio=0.5, epochs=1, batch=32, lr=0.1, decay=1e-3)


def test_a_run_is_its_seeds():
    """The same arm and seed give the same run to the last bit."""
    data = load("digits", limit=64)
    one, two = (train("sifd", 1, data, TINY) for _ in range(2))
    assert (one.loss, one.test_accuracy, one.norms) == (two.loss, two.test_accuracy, two.norms)


def test_arms_of_one_seed_are_paired():
    """SI starts from the dense arm's own weights, and the arms with and without FD start alike."""
    data = load("digits", limit=64)
    runs = {key: train(key, 0, data, TINY) for key in ARMS}
    assert runs["si"].norms["norm"][0] == runs["sifd"].norms["norm"][0]
    assert runs["si"].norms["norm"][0] < runs["dense"].norms["norm"][0]
    assert runs["lowrank"].norms["norm"][0] == runs["fd"].norms["norm"][0]
    assert len({run.parameters for key, run in runs.items() if key != "dense"}) == 1


def test_without_decay_frobenius_decay_changes_nothing():
    """λ = 0: the arms with FD are the arms without, which share every other line."""
    data, protocol = load("digits", limit=64), Protocol(8, 4, 0.5, 1, 32, 0.1, 0.0)
    with_, without = (train(key, 0, data, protocol) for key in ("sifd", "si"))
    assert with_.loss == without.loss


RESULTS = sorted((ROOT / "benchmarks/results").glob("quickstart-*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_one_line_is_what_the_tables_measured(path):
    """``factorize(model, ratio=...)`` as the README calls it, and the runs that it shows."""
    calls = re.findall(r"\bfactorize\((.*?)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert "model, ratio=0.25" in calls
    assert not [call for call in calls if "ratio" in call and "clude" in call]
    result = json.loads(path.read_text())
    protocol, data = Protocol(**result["protocol"]), load("digits", limit=64)
    channels = 1 if data.name in path.stem else 3
    model = resnet(protocol.depth, width=protocol.width, channels=channels)
    plan = frobdecay.factorize(model, ratio=protocol.ratio)
    counts = {run["parameters"] for run in result["runs"] if run["arm"] != "dense"}
    assert counts == {plan.after}
    if channels == 1:
        made, _ = training.make(ARMS["si"], 0, data, protocol)
        assert sum(p.numel() for p in made.parameters()) == plan.after


@pytest.mark.slow
def test_a_network_of_ones_own_by_the_defaults(tmp_path):
    """A quarter of its parameters, within two points of dense; saved, loaded and deployed."""
    data = load("digits")

    def network():
        torch.manual_seed(0)
        layers, widths = [], (1, 32, 32, 64, 64, 128, 128)
        for k, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if k in (1, 3) else []
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

    def accuracy(model, optimizer):
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for x, y in training.batches(data, 32, generator):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        return training.evaluate(model, data, data.test)

    def adamw(model):
        return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)

    dense, model = network(), network()
    full = accuracy(dense, adamw(dense))
    plan = frobdecay.factorize(model, ratio=0.25)
    found = accuracy(model, frobdecay.FrobeniusDecay(adamw(model), model))
    assert plan.ratio == pytest.approx(0.25, abs=0.01)
    assert found > full - 0.02
    frobdecay.save_factorized(model, tmp_path / "model.safetensors")
    fresh = network()
    frobdecay.load_factorized(fresh, tmp_path / "model.safetensors")
    frobdecay.unroll(fresh)
    assert training.evaluate(fresh, data, data.test) == pytest.approx(found, abs=0.01)


def test_summary_pairs_the_seeds():
    """Mean ± sample deviation of the accuracy and of the gain over the same seed's plain run."""
    runs = [Run("lowrank", s, 10, test_accuracy=a) for s, a in enumerate((0.5, 0.7))]
    runs += [Run("sifd", s, 10, test_accuracy=a) for s, a in enumerate((0.6, 0.8))]
    plain, both = report.summarize(runs)
    assert plain.accuracy == pytest.approx((60, 200**0.5))
    assert both.gain == pytest.approx((10, 0), abs=1e-9)
    assert plain.gain is None


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The whole benchmark: five arms, two seeds, one epoch of 64 digits."""
    out = tmp_path_factory.mktemp("quickstart")
    options = "--epochs 1 --seeds 2 --limit 64 --depth 8 --width 4 --ratio 0.5 --threads 1"
    runs = quickstart.main([*options.split(), "--out", str(out)])
    return out, runs


def test_benchmark_runs_every_arm_and_seed(miniature):
    """Seed by seed, arm by arm."""
    assert [(run.seed, run.arm) for run in miniature[1]] == [(s, k) for s in (0, 1) for k in ARMS]


def test_benchmark_draws_a_png(miniature):
    """Readable at the width of a README."""
    from PIL import Image

    with Image.open(miniature[0] / "quickstart-digits.png") as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1200


def test_benchmark_keeps_everything_in_json(miniature):
    """Environment, data, protocol, summary and all curves, in JSON that any parser reads."""
    text = (miniature[0] / "quickstart-digits.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert {"date", "command", "torch", "device", "threads", "data", "protocol"} < set(record)
    assert record["protocol"]["ratio"] == 0.5
    assert len(record["runs"]) == 10
    assert {len(run["norms"]["norm"]) for run in record["runs"]} == {2}
    assert [each["seeds"] for each in record["summary"]] == [2] * 5


def test_benchmark_writes_a_markdown_table(miniature):
    """A row for each arm, and a caption that says what was run."""
    lines = (miniature[0] / "quickstart-digits.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:7]] == [
        f"| {arm.label}" for arm in ARMS.values()
    ]
    assert "997" not in lines[-1]
    assert "64 training and 500 test images" in lines[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--arms dense,magic", "expected some of dense, lowrank"),
        ("--data nowhere.npz", "no data set at nowhere.npz"),
        ("--seeds 0", "expected at least 1"),
        ("--depth 9", "6k"),
        ("--device toaster", "toaster"),
    ],
)
def test_wrong_options_end_with_a_sentence(options, message, capsys, tmp_path):
    """No traceback, nothing written."""
    with pytest.raises(SystemExit) as stopped:
        quickstart.main([*options.split(), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
