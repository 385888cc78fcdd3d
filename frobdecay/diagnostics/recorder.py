"""Norms, bounds and effective step sizes of products, measured once or over a training run.

    print(measure(products(model), optimizer))      # a table
    recorder = Recorder(products(model))
    recorder.step(optimizer)                        # every epoch, or every step
    recorder.plot("norms.png")

    recorder = Recorder(products(model), quantities=["norm"])
    recorder.step(); ...; recorder.save("norms.json")    # one run
    recorder.load("norms.json"); recorder.replay_(k)     # another one: step k has those norms

The quantities are defined in ``measurement.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch

from frobdecay.algebra.network import Network
from frobdecay.diagnostics.measurement import QUANTITIES, LearningRate, Measurement, measure, total
from frobdecay.models.checkpoints.files import FilePath, new_figure, replacing, write_figure
from frobdecay.product.balance import check_writable
from frobdecay.product.product import Product, as_products, product_norm
from frobdecay.product.toward import itself


class Recorder:
    """Keep the numbers of products over training: a history, its plot, its file.

    Examples:
        >>> import torch
        >>> U, V = torch.ones(2, 1), torch.ones(8, 1)
        >>> recorder = Recorder(Product.of(U, V, name="fc"))
        >>> for _ in range(2):
        ...     _ = recorder.step(lr=0.1)
        ...     _ = U.mul_(0.5)
        >>> recorder.steps, [round(norm, 6) for norm in recorder.history["fc"]["norm"]]
        ([0, 1], [4.0, 2.0])

    Only the quantities' floats are kept, not the spectra.

    Args:
        products: whose numbers to record.
        every: measure at one step out of this many.
        quantities: what to keep: some of ``QUANTITIES``, and "departure" of products that decay
            toward a weight; all of these by default. Only ["norm"] is cheap enough for every step:
            it needs no decomposition.

    Attributes:
        steps: the steps that were measured, counted from 0.
        history: product name -> quantity -> one value for each of ``steps``. An effective step
            that is not known is NaN.

    Raises:
        ValueError: as ``measure``; ``every`` below 1; an unknown quantity, or none.
    """

    def __init__(
        self,
        products: Product | Iterable[Product],
        *,
        every: int = 1,
        quantities: Sequence[str] | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"expected every to be an int of at least 1, got {every!r}")
        self.products = as_products(products)
        departs = any(itself(product) is not product for product in self.products)
        known = (*QUANTITIES, "departure") if departs else QUANTITIES
        quantities = known if quantities is None else quantities
        if not quantities or isinstance(quantities, str) or set(quantities) - set(known):
            raise ValueError(f"expected quantities to be some of {known}, got {quantities!r}")
        self.every, self.quantities = every, tuple(quantities)
        self.steps: list[int] = []
        self.history: dict[str, dict[str, list[float]]] = {
            p.name: {quantity: [] for quantity in self.quantities}
            for p in measure(self.products).products
        }
        self._next = 0

    def step(self, lr: LearningRate | None = None) -> Measurement | None:
        """Count one step; measure and record where it is due.

        Args:
            lr: as in ``measure``.

        Returns:
            The measurement; None at a step between two recorded ones, and where only norms are.
        """
        measured = None
        if self._next % self.every == 0:
            if self.quantities == ("norm",):
                found = [{"norm": norm} for norm in _norms(self.products)]
            else:
                measured = measure(self.products, lr)
                found = [product.as_dict() for product in measured.products]
            self.steps.append(self._next)
            for product, numbers in zip(self.products, found, strict=True):
                for quantity, values in self.history[product.name].items():
                    values.append(numbers.get(quantity, nan))
        self._next += 1
        return measured

    @torch.no_grad()
    def replay_(self, step: int) -> None:
        """Scale the factors so that every product has the norm that was recorded at a step.

        All k factors of a product are multiplied by (recorded ÷ present norm)^(1/k). After every
        step of an optimizer without decay this separates what decay does to the norm, and so to
        the effective step size, from whatever else it does (the normalized run of Khodak et al.,
        ICLR 2021, arXiv:2105.01029). The recorder itself is left as it is.

        Args:
            step: one of ``steps``.

        Raises:
            ValueError: a step that was not recorded, norms that were not, a recorded or present
                norm of zero or NaN, or factors that cannot be scaled alone (frozen, computed or
                sharded ones, one parameter twice) or beside a W₀; nothing was changed then.

        Examples:
            >>> import torch
            >>> U, V = torch.ones(2, 1), torch.ones(8, 1)
            >>> recorder = Recorder(Product.of(U, V, name="fc"), quantities=["norm"])
            >>> _ = recorder.step()
            >>> _ = U.mul_(9)
            >>> recorder.replay_(0)
            >>> round(product_norm(recorder.products[0]).item(), 5), U[0].item(), V[0, 0].item()
            (4.0, 3.0, 0.3333333432674408)
        """
        if "norm" not in self.quantities or step not in self.steps:
            raise ValueError(
                f"expected a step whose norms were recorded, got {step} with {len(self.steps)} "
                f"steps of {self.quantities} recorded; record with every=1"
            )
        products = [itself(product) for product in self.products]
        check_writable([(product, product.factors) for product in products], "replaying")
        row = self.steps.index(step)
        factors: list[float] = []
        for product, present in zip(products, _norms(products), strict=True):
            if not isinstance(product.structure, Network):
                raise ValueError(
                    f"{product.name}: expected a product of factors alone, got a "
                    f"{product.structure.name} one, whose constant part is not scaled with them"
                )
            recorded = self.history[product.name]["norm"][row]
            if not (0.0 not in (present, recorded) and isfinite(present) and isfinite(recorded)):
                raise ValueError(
                    f"{product.name}: expected norms above 0, got {recorded} recorded at step "
                    f"{step} and {present} now"
                )
            factors.append((recorded / present) ** (1 / len(product.factors)))
        for product, factor in zip(products, factors, strict=True):
            for view in product.views():
                view.mul_(factor)

    def total(self, quantity: str) -> list[float]:
        """Return one quantity of the whole model over the recorded steps.

        Args:
            quantity: one that is recorded.

        Raises:
            ValueError: there is no such quantity, or it was not recorded.
        """
        if quantity not in self.quantities:
            raise ValueError(f"expected a quantity of {self.quantities}, got {quantity!r}")
        tables = [
            table[quantity]
            for product, table in zip(self.products, self.history.values(), strict=True)
            if quantity != "departure" or itself(product) is not product
        ]
        return [total(quantity, column) for column in zip(*tables, strict=True)]

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
            state: from ``state_dict``, or from a file that ``save`` wrote.

        Raises:
            ValueError: another version, or a history of other products, quantities or lengths;
                nothing was changed then.
        """
        known = state if isinstance(state, dict) else {}
        if known.get("version") != 1 or not {"next", "steps", "history"} <= known.keys():
            raise ValueError(
                f"expected a recorder's state, version 1, got version {known.get('version')} with "
                f"{list(known)[:8]}"
            )
        names, steps = {product.name for product in self.products}, list(state["steps"])
        if set(state["history"]) != names:
            differ = sorted(names ^ set(state["history"]))
            raise ValueError(f"expected a history of the same products; these differ: {differ}")
        for name, table in state["history"].items():
            if set(table) != set(self.quantities):
                raise ValueError(
                    f"expected a history of {self.quantities}, got {tuple(sorted(table))} of "
                    f"{name}; make the recorder with these quantities"
                )
            if any(len(values) != len(steps) for values in table.values()):
                raise ValueError(f"expected {len(steps)} numbers of {name}, one for each step")
        history = {
            p.name: {q: [*map(float, state["history"][p.name][q])] for q in self.quantities}
            for p in self.products
        }
        self.history, self.steps, self._next = history, steps, int(state["next"])

    def save(self, path: FilePath) -> None:
        """Write the history as JSON; what is not finite is written as a string.

        Args:
            path: of the file.
        """
        state = self.state_dict()
        for table in state["history"].values():
            for quantity, values in table.items():  # JSON has no word for NaN and the infinities
                table[quantity] = [value if isfinite(value) else str(value) for value in values]
        with replacing(path) as file:
            file.write((json.dumps(state) + "\n").encode())

    def load(self, path: FilePath) -> None:
        """Continue the history of a file that ``save`` wrote.

        Args:
            path: of the file.

        Raises:
            ValueError: as ``load_state_dict``.
        """
        self.load_state_dict(json.loads(Path(path).read_text()))

    def plot(self, path: FilePath | None = None) -> Any:
        """Draw product norm, nuclear norm with its bound, effective step and stable rank.

        The norm's panel has the departure too, dashed, where it was recorded.

        Args:
            path: file to write; its ending decides the format.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: a quantity that it draws was not recorded.
        """
        if missing := set(_TITLES) - set(self.quantities):
            raise ValueError(f"expected {sorted(missing)} to be recorded, too; see quantities")
        figure = new_figure("Recorder.plot", 10, 6.5)
        for axes, quantity in zip(figure.subplots(2, 2).flat, _TITLES, strict=True):
            self._panel(axes, quantity)
        if path is not None:
            write_figure(path, figure)
        return figure

    def _panel(self, axes: Any, quantity: str) -> None:
        few = len(self.history) <= _LEGEND
        for name, table in self.history.items():
            label = name if few else None
            (line,) = axes.plot(self.steps, table[quantity], lw=1, alpha=0.8, label=label)
            if quantity == "norm" and "departure" in table:
                style = {"lw": 1, "ls": "--", "color": line.get_color()}
                axes.plot(self.steps, table["departure"], label=label and f"{name}, moved", **style)
        if quantity == "nuclear":
            axes.plot(self.steps, self.total("bound"), "k:", label="half-sum of squares, all")
        if quantity in ("nuclear", "norm") and len(self.history) > 1:
            axes.plot(self.steps, self.total(quantity), "k", label="all")
        axes.set(title=_TITLES[quantity], xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 2.5
        if quantity == "effective_step":
            axes.set_yscale("log")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")


def _norms(products: Sequence[Product]) -> list[float]:
    """‖W‖_F of all products, with one transfer from each device."""
    norms = [product_norm(itself(product)).detach() for product in products]
    found = {
        device: iter(torch.stack([n.double() for n in norms if n.device == device]).tolist())
        for device in {norm.device for norm in norms}
    }
    return [next(found[norm.device]) for norm in norms]


_LEGEND = 8  # as many products as a legend can name without hiding the lines

_TITLES = {
    "norm": "product norm ‖W‖_F",
    "nuclear": "nuclear norm ‖W‖_*",
    "effective_step": "effective step size lr / ‖W‖_F²",
    "stable_rank": "stable rank",
}
