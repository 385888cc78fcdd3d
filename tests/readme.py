"""The README's Python blocks, and what they need."""

import ast
import os
import pathlib
import re
import subprocess
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


def torchrun(processes: int, folder: pathlib.Path) -> str:
    """Run the script that the README starts with torchrun; what it printed.

    The exit code is not looked at: gloo sometimes aborts after the work is done.
    """
    (script,) = re.findall(r"```py\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    file = folder / "train.py"
    file.write_text(script, encoding="utf-8")
    options = ["--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(file)]
    path = os.pathsep.join(filter(None, (str(README.parent), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path
    }  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout
