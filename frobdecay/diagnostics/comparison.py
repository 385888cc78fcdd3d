"""How near a factorized model's outputs are to the original's: layer by layer, and at the end.

Each layer is asked twice: alone, on the original's inputs, and in place, on what the layers before
it make of them. The first says which layer loses, the second where it shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from frobdecay.models.calibration.forward import (
    check_batches,
    default_forward,
    eagerly,
    evaluating,
)
from frobdecay.models.calibration.masks import DEFAULT, Mask, MaskOf, fitting, hides, mask_of, rows
from frobdecay.models.checkpoints.files import FilePath, new_figure, write_figure
from frobdecay.models.select import Walk
from frobdecay.models.tables.table import Column, figure, screen, table
from frobdecay.product.names import naming
from frobdecay.weights.layouts import layouts

_REPEATS = 3
Forward = Callable[[nn.Module, Any], object]


@dataclass
class _Sum:
    """Of outputs y and y′: Σ‖y − y′‖², Σ‖y‖², Σ cos(y, y′) over rows, and their number."""

    lost: float = 0.0
    total: float = 0.0
    cosines: float = 0.0
    rows: int = 0

    def add(self, there: Tensor, here: Tensor, name: str, mask: Mask) -> None:
        """Outputs (…, m) of the original and of the other model, of which a mask hides some."""
        if there.shape != here.shape:
            raise ValueError(f"expected outputs like {[*there.shape]}, got {[*here.shape]}")
        y, other = (x.detach() if x.ndim else x.detach()[None] for x in (there, here))
        y, other = (torch.view_as_real(x).flatten(-2) if x.is_complex() else x for x in (y, other))
        y, other = (rows(x, fitting(mask, f"{name}.", x)).double() for x in (y, other))
        self.lost += float((y - other.to(y)).square().sum())
        self.total += float(y.square().sum())
        self.cosines += float(torch.cosine_similarity(y, other.to(y), dim=-1).sum())
        self.rows += len(y)

    @property
    def error(self) -> float:
        """√(Σ‖y − y′‖² / Σ‖y‖²)."""
        return (self.lost / self.total) ** 0.5 if self.total else float(self.lost > 0)

    @property
    def cosine(self) -> float:
        """Mean over the rows."""
        return self.cosines / max(self.rows, 1)


@dataclass(frozen=True)
class LayerComparison:
    """One layer's outputs, next to the original's.

    Attributes:
        name: of the module.
        alone: ‖y − y′‖ / ‖y‖ on the original's inputs.
        error: the same where it is, behind the layers before it.
        cosine: there, the mean over rows.
    """

    name: str
    alone: float
    error: float
    cosine: float


_COLUMNS = (
    Column[LayerComparison]("alone", lambda row: row.alone, figure),
    Column[LayerComparison]("error", lambda row: row.error, figure),
    Column[LayerComparison]("cosine", lambda row: row.cosine, "{:.4f}".format),
)


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; prints as a table.

    Attributes:
        layers: those whose outputs changed, in the original's order.
        error, cosine: of the model's own output.
        seconds: of one forward pass of the original and of the model, the median of a few.
        nbytes: of the parameters of both.
    """

    layers: tuple[LayerComparison, ...]
    error: float
    cosine: float
    seconds: tuple[float, float]
    nbytes: tuple[int, int]

    def __str__(self) -> str:
        name = Column[LayerComparison]("layer", lambda row: row.name)
        last = LayerComparison("the model", self.error, self.error, self.cosine)
        shown = table([*self.layers, last], name, _COLUMNS, lambda row: None, width=screen())
        times = " → ".join(f"{1e3 * s:.3g} ms" for s in self.seconds)
        sizes = " → ".join(f"{n / 1e6:,.4g} MB" for n in self.nbytes)
        return f"{shown}\none forward pass {times}, parameters {sizes}"

    def plot(self, path: FilePath | None = None) -> Any:
        """Draw the error of each layer, alone and in place.

        Args:
            path: file to write; its ending decides the format.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        drawn = new_figure("Comparison.plot", 8, 1.5 + 0.2 * len(self.layers))
        axes, places = drawn.subplots(), range(len(self.layers))
        axes.barh(places, [row.error for row in self.layers], color="0.8", label="in place")
        axes.plot([row.alone for row in self.layers], places, "k|", ms=9, mew=2, label="alone")
        axes.set_yticks(places, [row.name for row in self.layers], fontsize="small")
        axes.invert_yaxis()
        axes.set(xlabel="‖y − y′‖ / ‖y‖", title=f"the model: {self.error:.3g}")
        axes.legend(fontsize="small")
        if path is not None:
            write_figure(path, drawn)
        return drawn


def compare(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    mask: MaskOf = DEFAULT,
) -> Comparison:
    """Compare a factorized, merged or unrolled model's outputs with those of the original.

    Examples:
        >>> import copy, torch, frobdecay
        >>> original = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> model = copy.deepcopy(original)
        >>> _ = frobdecay.factorize(model, rank={"0": 8})
        >>> found = frobdecay.compare(model, original, [torch.randn(10, 64)])
        >>> [layer.name for layer in found.layers]  # print(found): with errors and cosines
        ['0', '1']

    Runs both on each batch, in evaluation mode and without gradients; as ``calibrate``, it leaves
    them as they were. Both have to be there at the same time, as a deep copy is that was made
    before ``factorize``.

    Args:
        model: the factorized one.
        original: with modules of the same names.
        batches: as for ``calibrate``.
        forward: as for ``calibrate``; the first tensor of what it returns is compared.
        mask: as for ``calibrate``: rows of padding are not compared.

    Raises:
        TypeError, ValueError: no batches, an original that is the model itself, modules in common
            that did not run alike, no tensor returned, or a model that writes to its parameters.
    """
    check_batches(batches)
    _check_apart(model, original)
    run, final, seconds = forward or default_forward, _Sum(), None
    there, here = Walk(original).modules, Walk(model).modules
    both = _Both({n: here[n] for n, m in there.items() if here.get(n, m) is not m and layouts(m)})
    with evaluating(original), evaluating(model):
        for batch in batches:
            hides(hidden := mask_of(original, batch, mask))  # refuses what is none
            both.mask = hidden
            with _hooked({name: there[name] for name in both.modules}, both.ask):
                expected = _first(run(original, batch))
            with _hooked(both.modules, both.meet):
                made = _first(run(model, batch))
            final.add(expected, made, "decoder", hidden)  # where there are two
            both.check()
            seconds = seconds or _times(run, original, model, batch)
    if not seconds:
        raise ValueError("found no batch to compare on: the loader is empty or exhausted")
    sizes = [sum(p.nbytes for p in one.parameters()) for one in (original, model)]
    return Comparison(both.layers(), final.error, final.cosine, seconds, (sizes[0], sizes[1]))


def _check_apart(model: nn.Module, original: nn.Module) -> None:
    """Refuse an original that was changed with the model."""
    mine, theirs = ({*map(id, one.parameters())} for one in (model, original))
    if model is original or (mine and mine <= theirs):
        raise ValueError(
            "expected an original of its own, but all parameters of the model are the original's, "
            "too: factorize changes a model in place; before it, original = copy.deepcopy(model)"
        )


class _Both:
    """Runs the model's layers beside those of the original, and sums how far outputs are apart."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self._alone, self._inside = ({name: _Sum() for name in modules} for _ in range(2))
        self._seen: dict[str, list[Tensor]] = {name: [] for name in modules}
        self.mask: Mask = None

    def ask(self, name: str, _: nn.Module, args: Any, named: Any, made: Any) -> None:
        """Run the model's layer on the inputs that the original's just had."""
        # A copy, since what comes next may write to it, as nn.ReLU(inplace=True) does.
        self._seen[name].append(_first(made).clone())
        with naming(name):
            found = _first(self.modules[name](*args, **named))
            self._alone[name].add(_first(made), found, name, self.mask)

    def meet(self, name: str, _: nn.Module, args: Any, named: Any, made: Any) -> None:
        """Compare a layer's outputs in place with those of the original's in the same call."""
        if not self._seen[name]:
            raise ValueError(f"{name} ran more often than in the original")
        self._inside[name].add(self._seen[name].pop(0), _first(made), name, self.mask)

    def check(self) -> None:
        """Refuse a layer that ran less often than in the original."""
        if missing := [name for name, left in self._seen.items() if left]:
            raise ValueError(f"{missing[0]} ran in the original and not in the model")

    def layers(self) -> tuple[LayerComparison, ...]:
        """Those whose outputs are others."""
        return tuple(
            LayerComparison(name, self._alone[name].error, found.error, found.cosine)
            for name, found in self._inside.items()
            if found.lost
        )


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], act: Callable[..., None]) -> Iterator[None]:
    """Call ``act(name, module, args, named, made)`` after the forward passes of some modules."""
    hooks = [
        module.register_forward_hook(partial(act, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with eagerly():
            yield
    finally:
        for one in hooks:
            one.remove()


def _first(made: Any) -> Tensor:
    """The first tensor of what a module returned; the logits if it has some."""
    logits = getattr(made, "logits", None)
    made = made if logits is None else logits
    held = dict(made) if isinstance(made, Mapping) else vars(made) if is_dataclass(made) else made
    found = next((x for x in tree_leaves(held) if isinstance(x, Tensor)), None)
    if found is None:
        raise ValueError(f"expected a tensor to compare, got a {type(made).__name__}")
    return found


def _times(run: Forward, *models_and_batch: Any) -> tuple[float, float]:
    """Of one forward pass of each of two models, the medians of a few in turns."""
    *models, batch = models_and_batch
    found: list[list[float]] = [[], []]
    for _ in range(_REPEATS):
        for model, times in zip(models, found, strict=True):
            start = time.perf_counter()
            made = _first(run(model, batch))
            if made.is_cuda:
                torch.cuda.synchronize(made.device)
            times.append(time.perf_counter() - start)
    return median(found[0]), median(found[1])
