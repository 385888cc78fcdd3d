"""The README's recipes with other people's packages do what they say."""

import pytest
from readme import BLOCKS, extras, run


@pytest.mark.parametrize("k", [k for k, block in enumerate(BLOCKS) if extras(block)])
def test_readme_recipes_run(k, tmp_path, monkeypatch):
    """Every Python block that imports another package runs by itself."""
    for package in sorted(extras(BLOCKS[k])):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run(k)
