"""The README's Python blocks, and what they need."""

import ast
import pathlib
import re
import sys

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
CORE = {"torch", "frobdecay", "einops"}


def extras(block: str) -> set[str]:
    """The packages beyond the core that a block imports."""
    names = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    return names - CORE - sys.stdlib_module_names


def run(k: int) -> None:
    """Run one block by itself, as printed."""
    exec(compile(BLOCKS[k], f"README block {k}", "exec"), {"__name__": f"readme{k}"})
