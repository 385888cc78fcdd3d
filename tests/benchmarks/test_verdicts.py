"""The paper's claims, judged: the rule, and what it is given."""

from dataclasses import replace
from pathlib import Path
from shutil import copy

import pytest
from matplotlib.figure import Figure

from benchmarks.experiments import __main__ as command
from benchmarks.experiments.catalogue import EXPERIMENTS, jobs
from benchmarks.experiments.experiment import Claim
from benchmarks.experiments.tables import figure
from benchmarks.experiments.transfer import best, differences
from benchmarks.experiments.verdicts import Judged, judge, markdown

pytestmark = pytest.mark.slow

BETTER = Claim("it is better", "new", "old")


def records(new, old, variants=("v",), norms=None):
    """Trials of two arms, by seed."""
    return [
        {"seed": seed, "arm": arm, "variants": list(variants), "score": score, "norms": norms or {}}
        for arm, scores in (("new", new), ("old", old))
        for seed, score in enumerate(scores)
    ]


def experiment(*claims, larger_is_better=True):
    """One with these claims."""
    arms = dict.fromkeys(("new", "old"), EXPERIMENTS["compression"].arms["lowrank"])
    return replace(
        EXPERIMENTS["compression"], arms=arms, claims=claims, larger_is_better=larger_is_better
    )


@pytest.mark.covers("C25")
@pytest.mark.parametrize(
    ("new", "margin", "word"),
    [
        ((53.0, 62.0, 73.5), 0.0, "holds"),
        ((47.0, 58.0, 66.5), 0.0, "fails"),
        ((53.0, 58.0, 71.0), 0.0, "undecided"),
        ((49.5, 59.6, 69.4), 1.0, "holds"),
        ((49.5, 59.6, 69.4), 0.1, "fails"),
    ],
)
def test_a_claim_is_judged_by_the_interval(new, margin, word):
    """All above what is needed, all below, or neither."""
    claim = replace(BETTER, margin=margin)
    (verdict,) = judge(records(new, (50.0, 60.0, 70.0)), experiment(claim))
    assert verdict.word == word


def test_the_interval_is_students():
    """Of 1, 2, 3: the mean 2, a standard error of 1/√3, and 4.303 of these for two degrees."""
    (verdict,) = judge(records((51.0, 62.0, 73.0), (50.0, 60.0, 70.0)), experiment(BETTER))
    assert verdict.difference == pytest.approx(2.0)
    assert verdict.interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_less_of_a_loss_is_better():
    """The difference is turned round."""
    losses = records((1.0, 1.1), (2.0, 2.2))
    (verdict,) = judge(losses, experiment(BETTER, larger_is_better=False))
    assert verdict.difference == pytest.approx(1.05)


def test_seeds_are_what_is_counted():
    """Variants of one seed are no further evidence: their mean counts once."""
    both = records((51.0, 53.0), (50.0, 50.0)) + records((55.0, 57.0), (50.0, 50.0), ("w",))
    (verdict,) = judge(both, experiment(BETTER))
    assert verdict.seeds == 2
    assert verdict.difference == pytest.approx(4.0)


def test_shared_trials_count_in_each_variant():
    """The arm that is the same in both is compared with either."""
    shared = [r for r in records((), (50.0, 50.0), ("v", "w")) if r["arm"] == "old"]
    own = records((51.0, 53.0), ()) + records((55.0, 57.0), (), ("w",))
    (verdict,) = judge(shared + own, experiment(BETTER))
    assert verdict.difference == pytest.approx(4.0)


def test_a_bound_is_met_where_it_is_the_nuclear_norm():
    """At the end of training."""
    norms = {"bound": [9.0, 2.01], "nuclear": [1.0, 2.0]}
    claim = Claim("the bound is met", "new", None, 0.01)
    (verdict,) = judge(records((1.0, 1.0), (), norms=norms), experiment(claim))
    assert verdict.difference == pytest.approx(-0.005)
    assert verdict.word == "holds"


def test_one_seed_says_nothing():
    """There is no interval."""
    assert judge(records((51.0,), (50.0,)), experiment(BETTER)) == []


def test_the_page_has_a_row_for_each_claim():
    """With a link to the table, the numbers and the verdict."""
    made = experiment(BETTER)
    found = judge(records((51.0, 62.0, 73.0), (50.0, 60.0, 70.0)), made)
    (row,) = [
        line for line in markdown([Judged("stem", made, found)]).splitlines() if "stem" in line
    ]
    for part in ("it is better", "+2 |", "-0.484 … +4.48", "undecided", "[stem](stem.md)"):
        assert part in row


@pytest.mark.parametrize(
    ("name", "preset"), [(n, p) for n in EXPERIMENTS for p in EXPERIMENTS[n].presets]
)
def test_claims_can_be_judged_in_every_preset(name, preset):
    """There is a variant that has both arms."""
    places = {
        (job.about["arm"], variant)
        for job in jobs(name, preset, 1)
        for variant in job.about["variants"]
    }
    variants = EXPERIMENTS[name].presets[preset]
    for claim in EXPERIMENTS[name].claims:
        arms = [arm for arm in (claim.arm, claim.against) if arm]
        assert any(all((arm, variant) in places for arm in arms) for variant in variants)


def test_a_directory_is_reported_as_a_whole(tmp_path):
    """Tables, pictures and the page of claims, from the JSON alone."""
    size = ["--data", "digits", "--limit", "32", "--epochs", "1", "--seeds", "2"]
    command.main(["distillation", "--arms", "dense,deepfd", *size, "--out", str(tmp_path)])
    for file in tmp_path.glob("*.[mp][dn]*"):
        file.unlink()
    found = command.main(["report", str(tmp_path)])
    assert list(found) == ["distillation-cpu"]
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {
        "claims.md",
        *(f"distillation-cpu.{ending}" for ending in ("json", "md", "png")),
    }
    assert "deep with FD, collapsed, is better than plain" in (tmp_path / "claims.md").read_text()


def test_committed_tables_are_those_of_the_committed_json(tmp_path, monkeypatch):
    """Made anew, word for word, and so is the page of claims; a picture beside each."""
    monkeypatch.setattr(command.tables, "figure", lambda *_: Figure())  # drawn elsewhere
    committed = Path(command.__file__).parents[1] / "results" / "paper"
    for file in committed.glob("*.json"):
        copy(file, tmp_path)
    found = command.main(["report", str(tmp_path)])
    assert found
    for name in ("claims", *found):
        text = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
        assert text == (committed / f"{name}.md").read_text(encoding="utf-8")
    assert all((committed / f"{name}.png").exists() for name in found)


@pytest.mark.parametrize("held", ['{"version": 1}', "[1]", "{", None])
def test_other_files_are_refused(held, tmp_path, capsys):
    """With their name, before anything is written."""
    if held is not None:
        (tmp_path / "other.json").write_text(held)
    before = list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        command.main(["report", str(tmp_path)])
    assert ("other.json" if held is not None else str(tmp_path)) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == before


def swept(scores, validations=None):
    """Trials of arms over λ: arm -> λ -> the scores of its seeds."""
    return [
        {
            "seed": seed,
            "arm": arm,
            "variants": [f"λ {decay:g}"],
            "score": score,
            "validation": [0.0, (validations or scores)[arm][decay][seed]],
            "norms": {},
        }
        for arm, over in scores.items()
        for decay, seeds in over.items()
        for seed, score in enumerate(seeds)
    ]


SWEPT = swept(
    {
        "dense": {5e-4: (60, 61), 1e-3: (64, 65), 2e-3: (66, 67)},
        "si": {5e-4: (57.0, 58.5), 1e-3: (56, 57), 2e-3: (53, 54)},
        "sifd": {5e-4: (55, 56), 1e-3: (58, 59.5), 2e-3: (57.9, 59.0)},
    }
)


@pytest.mark.parametrize(
    ("tuned", "arm", "against", "expected"),
    [
        ("reference", "sifd", "si", [57.9 - 53, 59.0 - 54]),
        ("own", "sifd", "si", [58 - 57.0, 59.5 - 58.5]),
        ("regret", "sifd", None, [57.9 - 58, 59.0 - 59.5]),
        ("regret", "sifd", "si", [-0.1 + 4.0, -0.5 + 4.5]),
    ],
)
def test_arms_are_compared_at_the_best_decay(tuned, arm, against, expected):
    """The reference's, each its own, and what the one costs against the other."""
    claim = Claim("", arm, against, tuned=tuned)
    assert differences(SWEPT, claim, EXPERIMENTS["transfer"]) == pytest.approx(expected)
    (verdict,) = judge(SWEPT, replace(EXPERIMENTS["transfer"], claims=[claim]))
    assert verdict.seeds == 2


def test_the_best_decay_is_chosen_on_validation():
    """By means over all seeds; not on test scores, and not where seeds are missing."""
    scores = {"dense": {1e-3: (60, 61), 2e-3: (50, 51)}}
    other = {"dense": {1e-3: (10, 11), 2e-3: (20, 21)}}
    assert best(swept(scores, other), "dense") == "λ 0.002"
    assert best(swept(scores, other), "dense", larger_is_better=False) == "λ 0.001"
    assert best(swept(scores, other)[:-1], "dense") == "λ 0.001"
    assert best(SWEPT, "fd") is None


def test_a_sweep_is_drawn_against_what_varies():
    """One line an arm, its best marked, on both panels."""
    drawn = figure(SWEPT, EXPERIMENTS["transfer"])
    assert isinstance(drawn, Figure)
    for panel in drawn.axes:
        assert panel.get_xscale() == "log"
        stars = [line for line in panel.lines if line.get_marker() == "*"]
        assert [list(line.get_xdata()) for line in stars] == [[2e-3], [5e-4], [1e-3]]
