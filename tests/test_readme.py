"""The README does what it says."""

import sys

import pytest
from readme import BLOCKS, extras, run, torchrun


def test_the_readme_has_examples():
    """The search for blocks finds them; most need nothing but the core."""
    plain = [block for block in BLOCKS if not extras(block)]
    assert len(BLOCKS) > len(plain) >= 5


def _where(block):
    """Marks for a block: what was on the meta device comes to the CPU, and is compared there."""
    return [pytest.mark.cpu("loads to it")] if "load_factorized" in block else []


@pytest.mark.parametrize(
    "k",
    [pytest.param(k, marks=_where(block)) for k, block in enumerate(BLOCKS) if not extras(block)],
)
def test_readme_examples_run(k):
    """Every Python block that needs the core alone runs by itself."""
    run(k)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names the network interface as Linux does")
def test_the_script_for_several_processes_runs(tmp_path):
    """As it is printed, with torchrun and two processes; factors stay alike."""
    out = torchrun(2, tmp_path)
    assert "2 on a mesh of 2: 3,392 numbers in one all-reduce" in out
    assert out.rstrip().endswith("done")
