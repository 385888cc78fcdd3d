"""The Python blocks of README and docs, and what they need."""

import ast
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
CORE = {"torch", "frobdecay", "einops"}


def fenced(language: str) -> dict[str, str]:
    """``page-number`` -> each block of code in a language, in order."""
    return {
        f"{page}-{k}": block
        for page, path in PAGES.items()
        for k, block in enumerate(
            re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S), 1
        )
    }


BLOCKS = fenced("python")


def extras(block: str) -> set[str]:
    """The packages beyond the core that a block imports."""
    names = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    return names - CORE - sys.stdlib_module_names


def run(name: str) -> None:
    """Run one block by itself, as printed."""
    exec(compile(BLOCKS[name], f"block {name}", "exec"), {"__name__": name})


def torchrun(processes: int, folder: pathlib.Path) -> str:
    """Run the script that the page on sharding starts with torchrun; what it printed.

    The exit code is not looked at: gloo sometimes aborts after the work is done.
    """
    (script,) = fenced("py").values()
    file = folder / "train.py"
    file.write_text(script, encoding="utf-8")
    options = ["--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(file)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path
    }  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout
