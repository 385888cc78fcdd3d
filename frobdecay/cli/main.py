"""Arguments, exit codes (0 and 2), and errors in one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from math import inf
from textwrap import TextWrapper
from typing import Any

from frobdecay.cli import factorize as factorizing
from frobdecay.cli import inspect as inspecting
from frobdecay.cli import merge as merging
from frobdecay.cli.write import TORCH
from frobdecay.models.budget.allocation import ALLOCATORS
from frobdecay.models.tables.table import printable, screen


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text}")
    return value


def _rank(text: str) -> int | float:
    value = float(text) if "." in text else int(text)
    if not 0 < value < inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


_ALL = "a row for every weight, none folded"
_FILE = "a safetensors file, one of torch.save, or a folder of transformers"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="frobdecay",
        description="Look into checkpoints, and merge the factors in them. Files are read without "
        "running anything that is in them; those of torch.save as torch.load(weights_only=True).",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"frobdecay {importlib.import_module('frobdecay').__version__}",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_inspect, _factorize, _merge):
        command = add(commands)
        command.add_argument("--key", help="where in the file the weights are, such as 'ema/model'")
    return parser


def _inspect(commands: Any) -> Any:
    inspect = commands.add_parser(
        "inspect",
        help="spectra of the weights in a checkpoint, and the ranks they need",
        description="Spectra of the weights in a checkpoint, and the ranks they need. Weights of "
        "three to five dimensions are read as convolutions without groups.",
    )
    inspect.add_argument("checkpoint", help=_FILE)
    inspect.add_argument("--ratio", type=_share, help="plan ranks that keep this share of all")
    inspect.add_argument(
        "--energy", type=_share, default=0.9, help="share of the squared norm for 'rank @' (0.9)"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.add_argument("--plot", metavar="FILE", help="draw the singular values (matplotlib)")
    inspect.set_defaults(run=inspecting.run)
    inspect.add_argument("--all", action="store_true", help=_ALL)
    return inspect


def _factorize(commands: Any) -> Any:
    factorize = commands.add_parser(
        "factorize",
        help="a dense checkpoint -> a factorized one, by the spectra of its weights",
        description="Replace weights by spectral factors, one after the other: no more memory than "
        "one weight takes. OUT is a file for load_factorized, or of a folder of transformers a new "
        "folder, which from_pretrained reads once frobdecay is imported.",
    )
    factorize.add_argument("checkpoint", metavar="IN", help=_FILE)
    factorize.add_argument("out", metavar="OUT", help="*.safetensors, or a new folder")
    rule = factorize.add_mutually_exclusive_group(required=True)
    rule.add_argument("--ratio", type=_share, help="keep this share of all parameters")
    rule.add_argument("--rank", type=_rank, help="one for all: a number, or a share such as 0.25")
    rule.add_argument("--energy", type=_share, help="keep this share of each weight's squared norm")
    factorize.add_argument(
        "--allocate",
        choices=[name for name, one in ALLOCATORS.items() if not one.measures],
        help="how the parameters of --ratio are divided among the weights",
    )
    for name, what in (("include", "what to factorize"), ("exclude", "what not to")):
        factorize.add_argument(
            f"--{name}",
            nargs="+",
            metavar="NAME",
            help=f"{what}: names of layers or weights, or globs such as 'encoder.*'",
        )
    factorize.add_argument("--force", action="store_true", help="replace OUT if it is a file")
    factorize.set_defaults(run=factorizing.run)
    factorize.add_argument("--all", action="store_true", help=_ALL)
    return factorize


def _merge(commands: Any) -> Any:
    merge = commands.add_parser(
        "merge",
        help="a factorized checkpoint -> a dense one, with the keys of the original model",
        description="Multiply the factors in a checkpoint out: OUT has the keys of the original "
        "model, which loads it without frobdecay.",
    )
    merge.add_argument("checkpoint", metavar="IN", help=_FILE)
    merge.add_argument(
        "out", metavar="OUT", help=f"*.safetensors, *{', *'.join(TORCH)}, or a new folder"
    )
    merge.add_argument("--force", action="store_true", help="replace OUT if it is a file")
    merge.set_defaults(run=merging.run)
    return merge


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the command line by default.

    Returns:
        0, or 2 after an error, which is one line on stderr where that is no terminal.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        else:
            text = str(error) or type(error).__name__
        print(_shown(f"frobdecay: error: {text}", screen(errors=True)), file=sys.stderr)
        return 2
    return 0


def _shown(text: str, width: int | None) -> str:
    """In one line, or on a terminal in its own lines, none longer than that is wide."""
    lines = [" ".join(text.split())] if width is None else text.splitlines()
    whole: Any = {"break_long_words": False, "break_on_hyphens": False}
    fill = TextWrapper(width or sys.maxsize, subsequent_indent="  ", **whole).fill
    return "\n".join(fill(printable(line)) for line in lines)
