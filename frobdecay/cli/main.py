"""Arguments, exit codes (0 and 2), and errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from frobdecay.cli import inspect as inspecting
from frobdecay.cli import merge as merging
from frobdecay.models.tables.table import printable


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m frobdecay",
        description="Look into checkpoints, and merge the factors in them. Files are read without "
        "running anything that is in them; those of torch.save as torch.load(weights_only=True).",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="spectra of the weights in a checkpoint, and the ranks they need",
        description="Spectra of the weights in a checkpoint, and the ranks they need. Weights of "
        "three to five dimensions are read as convolutions without groups.",
    )
    inspect.add_argument("checkpoint", help="a safetensors file, or one of torch.save")
    inspect.add_argument("--ratio", type=_share, help="plan ranks that keep this share of all")
    inspect.add_argument(
        "--energy", type=_share, default=0.9, help="share of the squared norm for 'rank @' (0.9)"
    )
    inspect.add_argument("--all", action="store_true", help="a row for every weight, none folded")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.add_argument("--plot", metavar="FILE", help="draw the singular values (matplotlib)")
    inspect.set_defaults(run=inspecting.run)
    merge = commands.add_parser(
        "merge",
        help="a factorized checkpoint -> a dense one, with the keys of the original model",
        description="Multiply the factors in a checkpoint out: OUT has the keys of the original "
        "model, which loads it without frobdecay.",
    )
    merge.add_argument("checkpoint", metavar="IN", help="from save_factorized or torch.save")
    merge.add_argument("out", metavar="OUT", help="*.safetensors, or *.pt, *.pth, *.bin, *.ckpt")
    merge.add_argument("--force", action="store_true", help="replace OUT if it exists")
    merge.set_defaults(run=merging.run)
    for command in (inspect, merge):
        command.add_argument("--key", help="where in the file the weights are, such as 'ema/model'")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the command line by default.

    Returns:
        0, or 2 after an error, which is one line on stderr.
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
        print(f"frobdecay: error: {printable(' '.join(text.split()))}", file=sys.stderr)
        return 2
    return 0
