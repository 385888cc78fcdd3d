"""The README's recipe with timm does what it says."""

import pytest

pytest.importorskip("timm")

from readme import BLOCKS, extras, run

RECIPES = [k for k, block in enumerate(BLOCKS) if "timm" in extras(block)]


@pytest.mark.parametrize("k", RECIPES)
def test_readme_recipes_run(k, tmp_path, monkeypatch):
    """Every Python block that imports timm runs by itself."""
    for package in sorted(extras(BLOCKS[k])):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run(k)


def test_there_is_a_recipe():
    """The search for blocks finds one."""
    assert RECIPES
