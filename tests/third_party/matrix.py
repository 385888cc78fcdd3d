"""Print which integrations were tested, from pytest's JUnit files, as a table in Markdown.

    pytest tests/third_party --junitxml=a.xml
    python tests/third_party/matrix.py a.xml [b.xml …]

A test names its cell with ``@pytest.mark.integration(row=…, column=…)``; ``refused=True`` says that
it proves a refusal. Row and column may come from different marks of the test.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from xml.etree import ElementTree

__all__ = ["cells", "table"]

OUTCOMES = ("failed", "passed", "refused", "not supported")


def cells(files: Iterable[str]) -> dict[tuple[str, str], set[str]]:
    """(row, column) -> outcomes of its tests."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            said = {p.get("name"): p.get("value", "") for p in case.iter("property")}
            if "row" in said and "column" in said:
                outcome = _outcome(case, said.get("refused") == "True")
                found.setdefault((said["row"], said["column"]), set()).add(outcome)
    return found


def _outcome(case: ElementTree.Element, refused: bool) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    if case.find("skipped") is not None:
        return "not supported"
    return "refused" if refused else "passed"


def table(found: dict[tuple[str, str], set[str]]) -> str:
    """Rows and columns in the order of their first test."""
    rows = list(dict.fromkeys(row for row, _ in found))
    columns = list(dict.fromkeys(column for _, column in found))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for row in rows:
        outcomes = (found.get((row, column), set()) for column in columns)
        lines.append([row, *(", ".join(sorted(o, key=OUTCOMES.index)) for o in outcomes)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(cells(sys.argv[1:])))
