"""Norms, bounds and effective step sizes of products, measured once or over a training run.

    print(measure(products(model), optimizer))      # a table
    recorder = Recorder(products(model))
    recorder.step(optimizer)                        # every epoch, or every step
    recorder.plot("norms.png")

The quantities are defined in ``measurement.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from math import isfinite, nan
from os import PathLike
from pathlib import Path
from typing import Any

from frobdecay.measurement import (
    QUANTITIES,
    LearningRate,
    Measurement,
    ProductMeasurement,
    measure,
    total,
)
from frobdecay.product import Product, as_products

__all__ = ["QUANTITIES", "Measurement", "ProductMeasurement", "Recorder", "measure"]


class Recorder:
    """Keep the numbers of products over training: a history, its plot, its file.

    Only the quantities' floats are kept, not the spectra.

    Args:
        products: whose numbers to record.
        every: measure at one step out of this many.

    Attributes:
        steps: the steps that were measured, counted from 0.
        history: product name -> quantity -> one value for each of ``steps``. An effective step
            that is not known is NaN.

    Raises:
        ValueError: as ``measure``; ``every`` below 1.

    Example:
        >>> import torch
        >>> U, V = torch.ones(2, 1), torch.ones(8, 1)
        >>> recorder = Recorder(Product.of(U, V, name="fc"))
        >>> for _ in range(2):
        ...     _ = recorder.step(lr=0.1)
        ...     _ = U.mul_(0.5)
        >>> recorder.steps, [round(norm, 6) for norm in recorder.history["fc"]["norm"]]
        ([0, 1], [4.0, 2.0])
    """

    def __init__(self, products: Product | Iterable[Product], *, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"expected every to be an int of at least 1, got {every!r}")
        self.products = as_products(products)
        self.every = every
        self.steps: list[int] = []
        self.history: dict[str, dict[str, list[float]]] = {
            p.name: {quantity: [] for quantity in QUANTITIES}
            for p in measure(self.products).products
        }
        self._next = 0

    def step(self, lr: LearningRate | None = None) -> Measurement | None:
        """Count one step; measure and record where it is due.

        Args:
            lr: as in ``measure``.

        Returns:
            The measurement, or None at a step between two recorded ones.
        """
        due = self._next % self.every == 0
        measured = measure(self.products, lr) if due else None
        if measured is not None:
            self.steps.append(self._next)
            for product in measured.products:
                for quantity, values in self.history[product.name].items():
                    values.append(product.as_dict().get(quantity, nan))
        self._next += 1
        return measured

    def total(self, quantity: str) -> list[float]:
        """Return one quantity of the whole model over the recorded steps.

        Args:
            quantity: one of ``QUANTITIES``.

        Raises:
            ValueError: there is no such quantity.
        """
        if quantity not in QUANTITIES:
            raise ValueError(f"expected a quantity of {QUANTITIES}, got {quantity!r}")
        columns = zip(*(table[quantity] for table in self.history.values()), strict=True)
        return [total(quantity, column) for column in columns]

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain numbers, for a checkpoint."""
        history = {
            name: {quantity: list(values) for quantity, values in table.items()}
            for name, table in self.history.items()
        }
        return {"version": 1, "next": self._next, "steps": list(self.steps), "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the history of a checkpoint.

        Args:
            state: from ``state_dict``.

        Raises:
            ValueError: another version, or a history of other products.
        """
        if state.get("version") != 1:
            raise ValueError(f"expected a recorder's state, version 1, got {state.get('version')}")
        names = {product.name for product in self.products}
        if set(state["history"]) != names:
            differ = sorted(names ^ set(state["history"]))
            raise ValueError(f"expected a history of the same products; these differ: {differ}")
        self.steps, self._next = list(state["steps"]), int(state["next"])
        self.history = {
            name: {quantity: list(table[quantity]) for quantity in QUANTITIES}
            for name, table in state["history"].items()
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the history as JSON; what is not finite is written as a string.

        Args:
            path: of the file.
        """
        Path(path).write_text(json.dumps(_map_numbers(self.state_dict(), _spell)) + "\n")

    def load(self, path: str | PathLike[str]) -> None:
        """Continue the history of a file that ``save`` wrote.

        Args:
            path: of the file.

        Raises:
            ValueError: as ``load_state_dict``.
        """
        self.load_state_dict(_map_numbers(json.loads(Path(path).read_text()), _unspell))

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw product norm, nuclear norm with its bound, effective step and stable rank.

        Args:
            path: file to write; its ending decides the format.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Recorder.plot needs matplotlib: pip install matplotlib, or frobdecay[plot]"
            ) from error
        figure = Figure(figsize=(10, 6.5), layout="constrained")
        panels = ("norm", "nuclear", "effective_step", "stable_rank")
        for axes, quantity in zip(figure.subplots(2, 2).flat, panels, strict=True):
            self._panel(axes, quantity)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _panel(self, axes: Any, quantity: str) -> None:
        few = len(self.history) <= _LEGEND
        for name, table in self.history.items():
            axes.plot(self.steps, table[quantity], lw=1, alpha=0.8, label=name if few else None)
        if quantity == "nuclear":
            axes.plot(self.steps, self.total("bound"), "k:", label="half-sum of squares, all")
        if quantity in ("nuclear", "norm") and len(self.history) > 1:
            axes.plot(self.steps, self.total(quantity), "k", label="all")
        axes.set(title=_TITLES[quantity], xlabel="step")
        if quantity == "effective_step":
            axes.set_yscale("log")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")


_LEGEND = 8  # as many products as a legend can name without hiding the lines

_TITLES = {
    "norm": "product norm ‖W‖_F",
    "nuclear": "nuclear norm ‖W‖_*",
    "effective_step": "effective step size lr / ‖W‖_F²",
    "stable_rank": "stable rank",
}


def _map_numbers(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Change the leaves of nested dicts and lists."""
    if isinstance(tree, dict):
        return {key: _map_numbers(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_numbers(value, change) for value in tree]
    return change(tree)


def _spell(value: Any) -> Any:
    """JSON has no word for NaN and the infinities."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _unspell(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
