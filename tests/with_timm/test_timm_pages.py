"""The recipes of the docs with timm do what they say."""

import pytest

pytest.importorskip("timm")

from pages import BLOCKS, extras, run

RECIPES = [name for name, block in BLOCKS.items() if "timm" in extras(block)]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(name, tmp_path, monkeypatch):
    """Every Python block that imports timm runs by itself."""
    for package in sorted(extras(BLOCKS[name])):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run(name)


def test_there_is_a_recipe():
    """The search for blocks finds one."""
    assert RECIPES
