"""The recipes of README and docs with other people's packages do what they say."""

import pytest
from pages import BLOCKS, extras, run


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if extras(block)])
def test_recipes_run(name, tmp_path, monkeypatch):
    """Every Python block that imports another package runs by itself."""
    for package in sorted(extras(BLOCKS[name])):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run(name)
