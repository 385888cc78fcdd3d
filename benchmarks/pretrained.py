"""What is left of a pretrained model when its linear layers keep a share of their parameters?

Asked, in this order, of one folder of transformers and two texts:

    compress    spectral factors, and calibrated ones on either text, at each share, untrained:
                is calibration better, on its own text and on the other?
    cost        bytes on disk, milliseconds and memory: dense, factorized, unrolled
    recover     the calibrated model is trained for a little: without decay, with plain decay of the
                factors, with Frobenius decay to zero, toward the first factors, toward the weight;
                and, without decay, from spectral factors and from some that are drawn at random

    python -m benchmarks.pretrained encoder FOLDER --text multi30k=DIR --text shakespeare=FILE
    python -m benchmarks.pretrained language FOLDER --gguf FILE --text …

The rule: an arm is better than another if its mean over the seeds on the test text is better by
more than the larger of their two standard deviations. λ is chosen for each arm on held-out lines
by the mean over the seeds; D = Σ lr·λ is said beside it. The test lines choose nothing.

Results go to ``--out`` after each cell, and what is there is not run again: start small, go on.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

import frobdecay
from benchmarks.measure import (
    add_names,
    count,
    described,
    environment,
    interleave,
    markdown,
    memory,
    numbers,
    setup,
    words,
)
from benchmarks.tasks import TASKS, Text
from frobdecay.models.budget.allocation import ALLOCATORS

__all__ = ["main"]

PARTS = ("compress", "cost", "recover")
ARMS = {
    "none": "no decay",
    "plain": "plain decay of the factors",
    "fd": "Frobenius decay",
    "initial": "Frobenius decay toward the first factors",
    "weight": "Frobenius decay toward the dense weight",
    "spectral": "no decay, from spectral factors",
    "random": "no decay, from factors drawn at random",
}
STARTS = {"spectral": "spectral", "random": "kaiming"}
"""Where an arm begins, if not from calibrated factors."""
UNDECAYED = ("none", *STARTS)
_SIZES = {
    "encoder": {"calibration": 512, "test": 400, "held": 400, "train": 1024},
    "language": {"calibration": 40, "test": 12, "held": 12, "train": 256},
}
_UNJUDGED = {"targets": [], "verdict": "Nothing was promised beforehand."}
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#999999", "#E69F00", "#56B4E9", "#CC79A7")


def _parser() -> Any:
    made = described("pretrained", __doc__ or "")
    add = made.add_argument
    add("--threads", type=count, help="for torch; as it chooses unless given")
    add("task", choices=TASKS)
    add("folder", help="of transformers: config.json, weights, tokenizer")
    add("--gguf", help="a file in it, in place of config.json and weights")
    add("--text", action="append", required=True, metavar="NAME=PATH", help="twice for the other")
    add_names(made, "--parts", PARTS, "compress,cost")
    add_names(made, "--allocations", ALLOCATORS, "uniform,fraction")
    add("--inits", type=words, help="of spectral, calibrated:NAME; of all")
    add_names(made, "--arms", ARMS, "none,plain,fd,initial")
    add("--shares", type=numbers, default=[0.8, 0.6, 0.5, 0.35], help="default: %(default)s")
    add("--share", type=float, default=0.35, help="of cost and recover; default: %(default)s")
    add("--seeds", type=count, default=3, help="of recover; default: %(default)s")
    add("--epochs", type=count, default=1, help="of recover; default: %(default)s")
    add("--batch", type=count, default=32, help="of recover; default: %(default)s")
    add("--lr", type=float, default=1e-3, help="of AdamW, falling to 0; default: %(default)s")
    add("--decays", type=numbers, default=[3.0, 30.0], help="λ to choose of; default: %(default)s")
    add("--size", action="append", default=[], metavar="PART=N", help="calibration, test, …")
    add("--name", help="of the results; by default the task's")
    add("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    return made


# --- cells ----------------------------------------------------------------------------------------


class Cells:
    """Results by key, in a file that is written after each of them."""

    def __init__(self, path: Path, about: Mapping[str, Any], protocol: Mapping[str, Any]) -> None:
        self.path = path
        self.record: dict[str, Any] = {**about, "protocol": dict(protocol), "cells": {}}
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["protocol"] != self.record["protocol"]:
                raise SystemExit(f"{path} has results of another protocol: {before['protocol']}")
            self.record["cells"] = before["cells"]

    def __getitem__(self, key: str) -> Any:
        return self.record["cells"][key]

    def starting(self, word: str) -> dict[str, Any]:
        """Those whose keys begin with a word."""
        return {k: v for k, v in self.record["cells"].items() if k.split(" ")[0] == word}

    def run(self, key: str, make: Callable[[], dict[str, Any]]) -> None:
        """Fill a cell, if it is empty."""
        if key in self.record["cells"]:
            return
        start = time.perf_counter()
        found = make()
        about = {"seconds": round(time.perf_counter() - start, 1), "commit": self.record["commit"]}
        self.record["cells"][key] = {**found, **about}
        self.write()
        print(key, self.record["cells"][key], flush=True)

    def write(self) -> None:
        """As JSON."""
        self.path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, which are numbered."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    }


def compressed(task: Any, share: float, allocation: Any, init: Any) -> tuple[nn.Module, Any]:
    """A factorized copy of the model, whose linear layers keep a share together, and its plan."""
    model = copy.deepcopy(task.model)
    options: dict[str, Any] = {"ratio": share, "allocate": allocation, "init": init}
    if allocation == "sensitivity":
        sign = 1 if task.better is min else -1
        first, score = next(iter(task.texts)), task.scores[0]
        options["evaluate"] = lambda model: sign * task.quality(model, first, "held")[score]
    chosen = [f"{name}.weight" for name in linears(model)]
    return model, frobdecay.factorize(model, include=chosen, progress=False, **options)


def _kept(model: nn.Module, dense: nn.Module) -> float:
    """The share of the parameters of the linear layers that there are."""
    every, before = (sum(p.numel() for p in each.parameters()) for each in (model, dense))
    chosen = sum(layer.weight.numel() for layer in linears(dense).values())
    return round(1 - (before - every) / chosen, 4)


def _compress(task: Any, cells: Cells, options: Any, moments: Callable[[str], Any]) -> None:
    for name in task.texts:

        def dense(name=name) -> dict[str, Any]:
            return task.quality(task.model, name)

        cells.run(f"dense {name}", dense)
    inits = ["spectral", *(f"calibrated:{name}" for name in task.texts)]
    if unknown := set(options.inits or ()) - set(inits):
        raise SystemExit(f"expected inits among {inits}, got {sorted(unknown)}")
    measured: dict[str, Any] = {}  # plans by sensitivity, whose prices are those of every share
    for share in options.shares:
        for allocation in options.allocations:
            for init in options.inits or inits:

                def cell(share=share, allocation=allocation, init=init) -> dict[str, Any]:
                    given = init if init == "spectral" else moments(init.partition(":")[2])
                    start, sensitive = time.perf_counter(), allocation == "sensitivity"
                    divide = measured.get(init, allocation) if sensitive else allocation
                    model, plan = compressed(task, share, divide, given)
                    if sensitive:
                        measured[init] = plan
                    made = round(time.perf_counter() - start, 2)
                    quality = {name: task.quality(model, name) for name in task.texts}
                    return {"kept": _kept(model, task.model), "factorize_s": made, **quality}

                cells.run(f"compress {share:g} {allocation} {init}", cell)


def _cost(task: Any, cells: Cells, options: Any, moments: Callable[[str], Any]) -> None:
    def cell() -> dict[str, Any]:
        device = torch.device("cpu")
        model, _ = compressed(task, options.share, "uniform", moments(next(iter(task.texts))))
        plain = frobdecay.unroll(copy.deepcopy(model)).eval()
        forms = {"dense": task.model, "factorized": model.eval(), "unrolled": plain}
        batch = task.example()

        def forward(model: nn.Module) -> Callable[[], object]:
            return torch.no_grad()(lambda: model(**batch))

        times = interleave({k: forward(m) for k, m in forms.items()}, device, seconds=20)
        out: dict[str, Any] = {"tokens": batch["input_ids"].numel()}
        for kind, form in forms.items():
            with tempfile.TemporaryDirectory() as folder:
                if kind == "unrolled":
                    torch.save(form.state_dict(), Path(folder) / "model.pt")
                else:
                    form.save_pretrained(folder)
                size = sum(file.stat().st_size for file in Path(folder).iterdir())
            peak, _ = memory(forward(form), device)
            out[kind] = {
                "parameters": sum(p.numel() for p in form.parameters()),
                "megabytes": round(size / 1e6, 1),
                "ms": round(times[kind].ms, 2),
                "of_dense": round(times[kind].ms / times["dense"].ms, 3),
                "peak_mb": round(peak / 1e6, 1),
            }
        return out

    cells.run(f"cost {options.share:g}", cell)


def trained(task: Any, model: nn.Module, arm: str, decay: float, seed: int, options: Any) -> float:
    """Train a compressed model; the sum of lr·λ."""
    name, generator = next(iter(task.texts)), torch.Generator().manual_seed(seed)
    base = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    chosen: Any = frobdecay.products(
        model, include=[f"{each}.weight" for each in linears(task.model)]
    )
    if arm in ("initial", "weight"):
        aim: Any = "initial" if arm == "initial" else task.model
        chosen = frobdecay.products(model, include=[product.name for product in chosen], toward=aim)
    if arm == "plain":
        factors = {id(p) for product in chosen for p in product.params}
        ours = [p for p in model.parameters() if id(p) in factors]
        others = [p for p in model.parameters() if id(p) not in factors]
        groups = [{"params": ours, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        base = torch.optim.AdamW(groups, lr=options.lr)
    optimizer: Any = base
    if arm not in (*UNDECAYED, "plain"):
        optimizer = frobdecay.FrobeniusDecay(base, chosen, decay=decay)
    lessons = [
        lesson
        for _ in range(options.epochs)
        for lesson in task.lessons(name, generator, options.batch)
    ]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(lessons))
    model.eval()  # no dropout: what is asked is small
    total = 0.0
    for lesson in lessons:
        total += optimizer.param_groups[0]["lr"] * decay
        optimizer.zero_grad()
        task.loss(model, lesson).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return total


def _recover(task: Any, cells: Cells, options: Any, moments: Callable[[str], Any]) -> None:
    first = next(iter(task.texts))
    starts: dict[Any, nn.Module] = {}
    for seed in range(options.seeds):
        for arm in options.arms:
            for decay in [0.0] if arm in UNDECAYED else options.decays:

                def cell(seed=seed, arm=arm, decay=decay) -> dict[str, Any]:
                    start = STARTS.get(arm), seed if arm == "random" else None
                    if start not in starts:
                        torch.manual_seed(seed)
                        init = STARTS[arm] if arm in STARTS else moments(first)
                        starts[start], _ = compressed(task, options.share, "uniform", init)
                    model = copy.deepcopy(starts[start])
                    total = trained(task, model, arm, decay, seed, options)
                    parts = {part: task.quality(model, first, part) for part in ("held", "test")}
                    return {"arm": arm, "decay": decay, "D": round(total, 3), **parts}

                cells.run(f"recover {arm} {decay:g} {seed}", cell)


# --- what is shown --------------------------------------------------------------------------------


def _place(key: str) -> tuple[float, int, bool]:
    """Large shares first, then by allocation; cells come in any order."""
    _, share, allocation, init = key.split(" ")
    return -float(share), list(ALLOCATORS).index(allocation), init != "spectral"


def tables(task: Any, cells: Cells) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows, of the cells that there are."""
    found: dict[str, list[dict[str, Any]]] = {}
    dense = cells.starting("dense")
    some = sorted(cells.starting("compress").items(), key=lambda cell: _place(cell[0]))
    rows = [
        {
            "kept": cell["kept"],
            "allocation": key.split(" ")[2],
            "factors": key.split(" ")[3],
            **{f"{name}: {s}": cell[name][s] for name in task.texts for s in task.scores},
        }
        for key, cell in some
    ]
    if rows:
        whole = {f"{n}: {s}": dense[f"dense {n}"][s] for n in task.texts for s in task.scores}
        found["Untrained"] = [{"kept": 1.0, "allocation": "", "factors": "dense", **whole}, *rows]
    for key, cell in cells.starting("cost").items():
        found[f"Cost at {key.split(' ')[1]}, {cell['tokens']} tokens"] = [
            {"model": kind, **cell[kind]} for kind in ("dense", "factorized", "unrolled")
        ]
    if rows := _recovered(task, cells):
        found["After a little training"] = rows
    return found


def _recovered(task: Any, cells: Cells) -> list[dict[str, Any]]:
    """A row for each arm, with the λ that was best on held-out lines, and one for each λ."""
    by: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in cells.starting("recover").values():
        by.setdefault((cell["arm"], cell["decay"]), []).append(cell)
    score, rows = task.scores[0], []
    for arm, label in ARMS.items():
        mine = {decay: runs for (each, decay), runs in by.items() if each == arm}
        if not mine:
            continue
        best = task.better(mine, key=lambda d, mine=mine: fmean(r["held"][score] for r in mine[d]))
        for decay, runs in mine.items():
            row: dict[str, Any] = {"arm": label, "λ": decay, "D": fmean(r["D"] for r in runs)}
            for each in task.scores:
                values = [run["test"][each] for run in runs]
                spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
                row[each] = f"{fmean(values):.4f}{spread}"
            rows.append({**row, "seeds": len(runs), "chosen": "×" if decay == best else ""})
    return rows


def figure(task: Any, cells: Cells, title: str) -> Any:
    """Quality against parameters: a line for each way, a panel for each text."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.2 * len(task.texts) + 2.2, 3.7), layout="constrained")
    score = task.scores[0]
    lines: dict[tuple[str, str], list[Any]] = {}
    for key, cell in cells.starting("compress").items():
        _, _, allocation, init = key.split(" ")
        lines.setdefault((init, allocation), []).append(cell)
    inits = list(dict.fromkeys(init for init, _ in lines))
    styles = dict(zip(dict.fromkeys(a for _, a in lines), ("-o", "--s", ":^", "-.D"), strict=False))
    panels = drawn.subplots(1, len(task.texts), squeeze=False)[0]
    for axes, name in zip(panels, task.texts, strict=True):
        whole = cells[f"dense {name}"][score]
        for (init, allocation), found in lines.items():
            points = sorted((cell["kept"], cell[name][score]) for cell in found)
            label = f"{init.replace(':', ' on ')}, {allocation}"
            colour = _COLOURS[inits.index(init) % len(_COLOURS)]
            style = styles.get(allocation, "-o")
            axes.plot(*zip(*points, strict=True), style, ms=3, color=colour, label=label)
        axes.axhline(whole, color="black", lw=0.8, label="dense")
        axes.set(
            xlabel="share of the linear layers' parameters", ylabel=score, title=f"tested on {name}"
        )
        if task.better is min:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right center", fontsize="x-small", handlelength=4)
    drawn.suptitle(title, fontsize="medium")
    return drawn


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is asked and not there yet; write JSON, Markdown and a picture."""
    made = _parser()
    options = made.parse_args(arguments)
    device = setup(options)
    sizes = {**_SIZES[options.task], **{k: int(v) for k, v in (s.split("=") for s in options.size)}}
    texts = [Text.read(name, Path(path)) for name, path in (t.split("=", 1) for t in options.text)]
    task: Any = TASKS[options.task](options.folder, options.gguf, texts, sizes)
    name = options.name or options.task
    model = f"{type(task.model).__name__}, {sum(p.numel() for p in task.model.parameters()):,}"
    asked = ("share", "epochs", "batch", "lr")
    protocol = {
        "task": options.task, "model": f"{model} parameters", "sizes": sizes,
        "texts": [text.name for text in texts], **{key: getattr(options, key) for key in asked},
    }  # fmt: skip
    claim = (__doc__ or "").partition("\n")[0]
    options.out.mkdir(parents=True, exist_ok=True)
    about = {**environment(device), "claim": claim, **_UNJUDGED}
    places = (text.split("=", 1)[1] for text in options.text)
    for word in (options.folder, str(options.out), *places):
        about["command"] = about["command"].replace(word, Path(word).name)
    cells = Cells(options.out / f"pretrained-{name}.json", about, protocol)
    held: dict[str, Any] = {}

    def moments(text: str) -> Any:
        if text not in held:
            layers = list(linears(task.model))
            held[text] = frobdecay.calibrate(
                task.model, task.calibration(text), include=layers, progress=False
            )
        return held[text]

    for part, act in zip(PARTS, (_compress, _cost, _recover), strict=True):
        if part in options.parts:
            act(task, cells, options, moments)
    record = cells.record
    record["tables"] = tables(task, cells)
    commits = ", ".join(dict.fromkeys(str(cell["commit"]) for cell in record["cells"].values()))
    record["notes"] = {"command": [f"`{record['command']}`", f"{protocol}", f"run at {commits}"]}
    cells.write()
    cells.path.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    if cells.starting("compress"):
        figure(task, cells, protocol["model"]).savefig(cells.path.with_suffix(".png"), dpi=130)
    return record


if __name__ == "__main__":
    main()
