"""Every script that times something runs, in miniature, and writes what it says."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import defaults, forward, init, layers, measure, penalty, step, tensors
from benchmarks.cases import CASES, stack, suites
from benchmarks.measure import Report, Target, interleave, memory

CPU = torch.device("cpu")
QUICK = ["--seconds", "0.01"]
BY_ROUNDS = ("layers", "defaults")
LAYERS = ["--layers", "1024→1024", "--rows", "1", "--ranks", "0.01,0.02"]
CONVOLUTIONS = ["--convs", "ResNet-32 stage 3", "--conv-ranks", "0.05"]
SCRIPTS = {
    "penalty": (penalty, ["--case", "tiny"]),
    "scaling": (penalty, ["--scaling", "--points", "2"]),
    "forward": (forward, [*LAYERS, *CONVOLUTIONS, "--no-compile"]),
    "init": (init, ["--case", "tiny,calibration,peak", "--rounds", "1", "--width", "64"]),
    "step": (step, ["--case", "resnet", "--depth", "8", "--batch", "2", "--rounds", "1"]),
    "layers": (layers, ["--sizes", "2,4", "--rounds", "1"]),
    "defaults": (defaults, ["--families", "mlp", "--seeds", "1", "--ratios", "0.25"]),
    "tensors": (tensors, ["--case", "tiny", "--convs", "ResNet-32 stage 3"]),
}
PLOTS = ["scaling", "forward"]


@pytest.fixture
def tiny_scales(monkeypatch):
    """Sizes of which all points take no time."""
    scales = {what: ([8, 16], penalty.SCALES[what][1]) for what in ("layers", "rank")}
    monkeypatch.setattr(penalty, "SCALES", scales)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs_and_writes_json(name, tmp_path, tiny_scales, capsys):
    """Claim first, verdict last; the JSON has versions, machine, tables and targets."""
    module, arguments = SCRIPTS[name]
    where = tmp_path / "out.json"
    plot = ["--plot", str(tmp_path / "out.png")] if name in PLOTS else []
    quick = [] if name in BY_ROUNDS else QUICK
    returned = module.main([*arguments, *plot, *quick, "--json", str(where)])
    record = json.loads(where.read_text())
    assert record == json.loads(json.dumps(returned))
    assert {"torch", "commit", "date", "device", "threads", "load"} <= set(record)
    assert record["tables"]
    assert (tmp_path / "out.png").exists() == bool(plot)
    lines = " ".join(capsys.readouterr().out.split())
    assert lines.startswith(record["claim"])
    assert record["verdict"] in lines


@pytest.mark.parametrize("module", [penalty, init, step, forward, tensors, defaults, layers])
def test_unknown_cases_are_refused(module, capsys):
    """The message lists those there are."""
    option = {forward: "--layers", defaults: "--families", layers: "--only"}.get(module, "--case")
    with pytest.raises(SystemExit):
        module.main([option, "no such"])
    assert "got no such" in capsys.readouterr().err


def test_the_loop_baseline_is_the_gradient():
    """All that penalty.py compares computes the same: the released formulas and autograd, too."""
    suite = penalty.Suite(CASES["tiny"], CPU)
    suite.backend("reference")()
    U, VT = suite.pairs[0][0], suite.pairs[0][1].T
    by_hand = penalty.COEF * penalty._ordered([U, VT, VT.T])
    assert torch.allclose(suite.grads[0][0], by_hand, rtol=1e-5)
    leaf = [t.clone().requires_grad_() for t in suite.pairs[0]]
    (0.5 * penalty.COEF * (leaf[0] @ leaf[1].T).square().sum()).backward()
    assert torch.allclose(suite.grads[0][1], leaf[1].grad, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(40, 3, 50, 40), (3, 50, 3, 50)])
def test_products_of_three_go_in_the_cheaper_order(sizes):
    """As torch.linalg.multi_dot orders them, without its overhead."""
    m, k, n, p = sizes
    matrices = [torch.randn(m, k), torch.randn(k, n), torch.randn(n, p)]
    expected = torch.linalg.multi_dot(matrices)
    assert torch.allclose(penalty._ordered(matrices), expected, atol=1e-4)


def test_variants_take_turns():
    """Each is called as often as the others, in both orders."""
    calls = []
    timings = interleave(
        {name: lambda name=name: calls.append(name) for name in "ab"}, CPU, seconds=0.01, rounds=4
    )
    assert timings["a"].samples == timings["b"].samples >= 4
    assert timings["a"].low <= timings["a"].ms <= timings["a"].high


def test_memory_sees_the_largest_allocation():
    """Two tensors at once: the peak is their sum, the largest the larger."""

    def run():
        small, large = torch.empty(1 << 10), torch.empty(1 << 14)
        return small, large

    peak, largest = memory(run, CPU)
    assert largest == 4 << 14
    assert peak == (4 << 14) + (4 << 10)


@pytest.mark.parametrize(
    ("value", "above", "met"), [(1.0, False, True), (3.0, False, False), (3.0, True, True)]
)
def test_targets_are_judged(value, above, met):
    """At most the limit, or at least."""
    assert Target("x", value, 2.0, above=above).met is met


def test_what_was_not_measured_is_not_judged(capsys):
    """A target without a value is neither met nor missed."""
    report = Report("a claim", CPU, targets=[Target("x", None, 1.0)])
    options = measure.parser("penalty", "a claim").parse_args([])
    assert report.close(options)["verdict"] == "0 of 0 targets met."
    assert "not measured" in capsys.readouterr().out


def test_cases_are_the_models_they_are_named_after():
    """Numbers of products and shapes of the published models."""
    assert [len(CASES[name].pairs) for name in ("resnet32", "resnet110", "bert")] == [30, 108, 72]
    assert CASES["resnet32"].pairs[-1] == (192, 192, 21)
    assert len(CASES["lora7b"].pairs) == 224
    assert "lora7b" not in suites(CPU)
    assert stack(3, 8, 2).flops == 3 * 4 * 2**2 * 16


def test_functions_out_of_proportion_are_timed_once():
    """A baseline that takes minutes does not take the run with it."""
    slow = interleave({"slow": lambda: time.sleep(0.02), "fast": int}, CPU, seconds=0.01, rounds=2)
    assert slow["slow"].samples == 1
    assert slow["fast"].samples >= 2


@pytest.mark.parametrize("name", defaults.FAMILIES)
def test_every_family_of_the_defaults_learns_from_what_is_there(name, tmp_path, monkeypatch):
    """One step of each, dense and by the default budget; texts are files of the user's."""
    (tmp_path / "multi30k").mkdir()
    words = ["dog", "cat", "bird", "tree", "house", "river", "man", "woman", "child", "street"]
    lines = [f"a {words[k % 10]} near the {words[k // 10 % 10]} in {k}" for k in range(1100)]
    (tmp_path / "multi30k/train.en").write_text("\n".join(lines))
    (tmp_path / "tinyshakespeare.txt").write_text(" ".join(lines))
    monkeypatch.setenv("FROBDECAY_DATA", str(tmp_path))
    for cached in (defaults._captions, defaults._characters):
        cached.cache_clear()
    family = replace(defaults.FAMILIES[name], steps=1)
    dense, kept = defaults._run(family, 0)
    assert kept == 1
    assert 0 <= dense <= 100
    _, kept = defaults._run(family, 0, ratio=0.5)
    assert kept < 0.51
    for cached in (defaults._captions, defaults._characters):
        cached.cache_clear()


def test_the_default_is_judged_by_the_larger_spread():
    """One run has none: there any difference decides."""
    assert defaults._better([10.0, 20.0], [18.0, 20.0]) == "undecided"
    assert defaults._better([10.0, 12.0], [18.0, 20.0]) == "default"
    assert defaults._better([19.0], [18.0]) == "all"


def test_the_page_shows_what_was_measured():
    """The table of the default budget is that of its committed result."""
    root = Path(__file__).parents[2]
    (rows,) = json.loads((root / "benchmarks/results/defaults.json").read_text())["tables"].values()
    page = (root / "docs/choosing.md").read_text(encoding="utf-8").replace("**", "")
    for row in rows:
        shown = [value for key, value in row.items() if "better" not in key]
        assert f"| {' | '.join(shown)} |" in page
