"""What is printed for people: folded names, and tables that fit a terminal."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from frobdecay.models.plan import PlanRow, RankPlan
from frobdecay.models.ranks import plan_ranks
from frobdecay.models.tables import table as tables
from frobdecay.models.tables.fold import fold
from frobdecay.models.tables.table import Column, figure, table

LAYERS = [
    f"encoder.layer.{i}.{part}.weight"
    for i in range(6)
    for part in ("attention.self.query", "attention.self.key", "attention.self.value", "output")
]

# Names -> what they fold to, where all have one key.
FOLDED = {
    "a transformer": (LAYERS, ["encoder.layer.{0..5}.attention.self.{query,key,value}.weight",
                               "encoder.layer.{0..5}.output.weight"]),
    "a ResNet": ([f"layer{k}.{i}.conv{j}" for k in (1, 2) for i in (0, 1) for j in (1, 2)],
                 ["layer{1,2}.{0,1}.conv{1,2}"]),
    "gaps": ([f"{i}.w" for i in (0, 1, 2, 3, 5, 6, 9)], ["{0..3,5,6,9}.w"]),
    "parts of words": (["l.gate_proj", "l.up_proj", "l.down"], ["l.{gate,up}_proj", "l.down"]),
    "zeros in front": (["w00", "w01"], ["w{00,01}"]),
    "one missing": (["a.0.0", "a.0.1", "a.1.0"], ["a.{0,1}.0", "a.0.1"]),
    "long words": (["x" * 40 + ".w", "y" * 40 + ".w"], ["x" * 40 + ".w", "y" * 40 + ".w"]),
    "nothing": ([], []),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_repeated_layers_are_one_name(case):
    """Numbers first, then words; in the order of the first."""
    names, expected = FOLDED[case]
    assert [group.name for group in fold(names, [""] * len(names))] == expected


def _expanded(name):
    """All names that a folded one stands for, as a shell would say."""
    parts = []
    for plain, braces in re.findall(r"([^{}]+)|\{([^}]*)\}", name):
        runs = [one.partition("..") for one in braces.split(",")]
        each = [[a] if not dots else map(str, range(int(a), int(b) + 1)) for a, dots, b in runs]
        parts.append([plain] if plain else [text for one in each for text in one])
    return ["".join(each) for each in itertools.product(*parts)]


@given(
    st.lists(st.text("ab01.", min_size=1, max_size=6), unique=True, max_size=12),
    st.lists(st.sampled_from("xy"), min_size=12, max_size=12),
)
def test_a_folded_name_stands_for_its_members_and_no_others(names, keys):
    """Every name once, and only together with those of its key."""
    groups = fold(names, keys[: len(names)])
    assert sorted(i for group in groups for i in group.members) == list(range(len(names)))
    for group in groups:
        assert sorted(_expanded(group.name)) == sorted(names[i] for i in group.members)
        assert {keys[i] for i in group.members} == {group.key}


ROWS = [(name, 1000 + i, 0.1 * i, "dense") for i, name in enumerate(LAYERS)]
NAME = Column("weight", lambda row: row[0])
COLUMNS = (
    Column("shape", lambda row: "64×64"),
    Column("numbers", lambda row: row[1], "{:,}".format, adds=True),
    Column("norm", lambda row: row[2], figure),
    Column("empty", lambda row: None),
)


def _print(**options):
    remark = options.pop("remark", lambda row: None)
    return table(options.pop("rows", ROWS), NAME, COLUMNS, remark, **options)


@pytest.mark.parametrize("width", [None, 160, 100, 80, 40])
def test_names_are_whole_and_numbers_never_cut(width):
    """A name too long for its column has a line of its own; nothing else is wider than asked."""
    lines = _print(width=width).splitlines()
    name = "encoder.layer.{0..5}.attention.self.{query,key,value}.weight"
    found = next(i for i, line in enumerate(lines) if line.startswith(name))
    cells = lines[found][len(name) :] or lines[found + 1]
    assert cells.split() == ["×18", "64×64", "18,198", "0–2.2"]
    assert "empty" not in lines[0]
    if width is not None:
        assert all(len(line) <= width or line == name for line in lines)


@pytest.mark.parametrize("width", range(24, 90, 7))
def test_columns_that_do_not_fit_are_below(width):
    """Every number once, no line beyond the screen, and remarks once at the end."""
    rows = [(f"layer.{k}", [float(1000 * k + c) for c in range(100, 900, 100)]) for k in (1, 2)]
    columns = [Column(f"col{c}", lambda row, c=c: row[1][c], "{:.1f}".format) for c in range(8)]
    name = Column("weight", lambda row: row[0])
    text = table(rows, name, columns, lambda row: "one of a kind", width=width)
    assert max(map(len, text.splitlines())) <= width
    for row in rows:
        assert all(text.count(f" {number:.1f}") == 1 for number in row[1])
    assert text.count("one of a") <= 2


def test_rows_are_folded_only_where_they_are_many():
    """A dozen are read at a glance; and never, where that is asked for."""
    for found in (_print(rows=ROWS[:12]), _print(folds=False)):
        assert "{" not in found
        assert "×2" not in found
    assert len(_print(folds=False).splitlines()) == 25


def test_what_differs_in_a_text_or_a_remark_is_not_folded():
    """Only figures are."""
    lines = _print(remark=lambda row: "excluded" if "key" in row[0] else None).splitlines()
    assert len(lines) == 4
    excluded = next(line for line in lines if line.endswith("excluded"))
    assert excluded.startswith("encoder.layer.{0..5}.attention.self.key.weight")


def test_remarks_that_differ_in_numbers_are_folded():
    """With the range of each, as figures are; thousands are not two numbers."""
    costs = {name: f"costs {500 * i:,} at 3.25" for i, (name, *_) in enumerate(ROWS)}
    lines = _print(remark=lambda row: costs[row[0]]).splitlines()
    assert [line.partition("costs")[2] for line in lines[1:]] == [
        " 0–11,000 at 3.25", " 1,500–11,500 at 3.25"]  # fmt: skip


@pytest.mark.parametrize(("remark", "width", "mark"), [
    ("short", None, None), ("short", 80, "[1]"), ("quite long " * 9, None, "[1]"),
    ("quite long " * 9, 80, "[1]")])  # fmt: skip
def test_remarks_that_do_not_fit_are_numbered_below(remark, width, mark):
    """Whole words, each remark once."""
    found = _print(remark=lambda row: remark, width=width)
    table_, _, below = found.partition("\n[1] ")
    assert " ".join(below.split()) == (remark.strip() if mark else "")
    assert sum(line.endswith(mark or remark) for line in table_.splitlines()) == 2


def test_characters_that_a_terminal_would_obey_are_spelled():
    """In names and in remarks."""
    found = table(["a\x1b[31m"], Column("weight", str), (), lambda row: "\x07")
    assert found == "weight     remarks\na\\x1b[31m  \\x07"


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (0.98765, "0.988"), (12.345, "12.3"), (1234.5, "1234"), (2e9, "2e+09"),
    (0.00012345, "0.000123"), (1.5e-7, "1.5e-07")])  # fmt: skip
def test_figures_have_three_digits(value, text):
    """And an exponent where nobody would count the zeros."""
    assert figure(value) == text


def test_a_plan_is_as_wide_as_the_terminal(monkeypatch):
    """And no narrower for other programs; unfolded on demand."""
    names = ("query", "key", "value")
    blocks = (nn.ModuleDict({name: nn.Linear(64, 64) for name in names}) for _ in range(6))
    plan = plan_ranks(nn.Sequential(*blocks), rank=16)
    row = "{0..5}.{query,key,value}.weight  ×18  64×64    16  73,728  36,864"
    assert row in str(plan).splitlines()
    assert len(plan.table(folds=False).splitlines()) == 20
    assert repr(plan) == str(plan)
    monkeypatch.setattr(tables.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, str(plan).splitlines())) <= 50


def test_a_plan_tells_the_reading_only_where_it_is_another():
    """As blocks of matrices, and as modes."""
    rows = (PlanRow("a", (6, 4), (6, 4), 1), PlanRow("b", (6, 4), (3, 2, 4), 1),
            PlanRow("c", (6, 4), (2, 3, 4), (1, 2), tensor=True))  # fmt: skip
    lines = str(RankPlan(rows, 1, 1)).splitlines()
    assert [re.split(r"  +", line)[:4][1:] for line in lines[1:4]] == [
        ["6×4", "1", "0"], ["6×4", "3 of 2×4", "1"], ["6×4", "2×3×4", "1×2"]]  # fmt: skip
