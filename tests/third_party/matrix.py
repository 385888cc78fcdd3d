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

Cells = dict[tuple[str, str, str], set[str]]
OUTCOMES = ("failed", "passed", "refused", "not supported")


def cells(files: Iterable[str]) -> Cells:
    """(test file, row, column) -> outcomes of its tests."""
    found: Cells = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            said = {p.get("name"): p.get("value", "") for p in case.iter("property")}
            if "row" in said and "column" in said:
                outcome = _outcome(case, said.get("refused") == "True")
                where = str(case.get("classname")).rpartition(".")[2].removeprefix("test_")
                found.setdefault((where, said["row"], said["column"]), set()).add(outcome)
    return found


def _outcome(case: ElementTree.Element, refused: bool) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    if case.find("skipped") is not None:
        return "not supported"
    return "refused" if refused else "passed"


def table(found: Cells) -> str:
    """One table for each test file; rows and columns in the order of their first test.

    Rows ``package.Name`` of one package with equal outcomes are one row, with their number.
    """
    files = dict.fromkeys(file for file, _, _ in found)
    parts = ({key[1:]: found[key] for key in found if key[0] == file} for file in files)
    return "\n\n".join(map(_table, parts))


def _table(found: dict[tuple[str, str], set[str]]) -> str:
    columns = list(dict.fromkeys(column for _, column in found))
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in dict.fromkeys(row for row, _ in found):
        outcomes = (found.get((row, column), set()) for column in columns)
        cells = tuple(", ".join(sorted(each, key=OUTCOMES.index)) for each in outcomes)
        package = row.partition(".")[0] if "." in row else row
        alike.setdefault((package, *cells), []).append(row)
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for (package, *cells), rows in alike.items():
        lines.append([rows[0] if len(rows) == 1 else f"{package} ({len(rows)})", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(cells(sys.argv[1:])))
