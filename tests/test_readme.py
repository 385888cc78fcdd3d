"""The README does what it says."""

import pytest
from readme import BLOCKS, extras, run


def test_the_readme_has_examples():
    """The search for blocks finds them; most need nothing but the core."""
    plain = [block for block in BLOCKS if not extras(block)]
    assert len(BLOCKS) > len(plain) >= 5


@pytest.mark.parametrize("k", [k for k, block in enumerate(BLOCKS) if not extras(block)])
def test_readme_examples_run(k):
    """Every Python block that needs the core alone runs by itself."""
    run(k)
