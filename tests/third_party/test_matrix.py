"""The table that ``matrix.py`` prints."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import pytest

@pytest.mark.integration(column="merge")
@pytest.mark.parametrize("ok", [
    pytest.param(True, marks=pytest.mark.integration(row="A")),
    pytest.param(False, marks=pytest.mark.integration(row="B")),
])
def test_one(ok):
    assert ok

@pytest.mark.integration(row="A", column="unroll", refused=True)
def test_two():
    pass

@pytest.mark.integration(row="B", column="unroll")
@pytest.mark.xfail(strict=True)
def test_three():
    assert False
"""


@pytest.fixture
def report(tmp_path):
    """The JUnit file of a run under the hooks that these tests run under."""
    (tmp_path / "test_program.py").write_text(PROGRAM, encoding="utf-8")
    hooks = (Path(__file__).parent.parent / "conftest.py").read_text(encoding="utf-8")
    (tmp_path / "conftest.py").write_text(hooks, encoding="utf-8")
    file = tmp_path / "report.xml"
    run = [sys.executable, "-m", "pytest", "-q", "--strict-markers", f"--junitxml={file}"]
    done = subprocess.run([*run, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert "1 failed, 2 passed, 1 xfailed" in done.stdout, done.stdout + done.stderr
    return file


def test_the_table_has_every_outcome(report):
    """Rows and columns from the marks, outcomes from the run."""
    script = Path(__file__).parent / "matrix.py"
    done = subprocess.run(
        [sys.executable, str(script), str(report)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "|  | merge | unroll |",
        "| --- | --- | --- |",
        "| A | passed | refused |",
        "| B | failed | not supported |",
    ]
