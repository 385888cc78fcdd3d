"""The numbers that say what decay does to a product, from r×r matrices.

For a product W = U M Vᵀ with singular values σ:

    norm            ‖W‖_F  = (Σσ²)^½     what Frobenius decay acts on
    departure       ‖W − W₀‖_F           what it acts on if it decays toward W₀
    nuclear         ‖W‖_*  = Σσ          what weight decay on each of two factors acts on
    bound           (‖U‖² + ‖V‖²) / 2    ≥ nuclear, equal exactly where the factors are balanced
    imbalance       ‖UᵀU − VᵀV‖_F relative to ‖UᵀU‖_F + ‖VᵀV‖_F, from 0 to 1
    stable_rank     ‖W‖_F² / σ₁²         directions in use
    rank            directions above rounding
    effective_step  lr / ‖W‖_F²          the step on W/‖W‖_F, if a normalization follows the layer
    decay_step      lr·λ·max‖G‖₂         of the factors' Grams G; lr·λ·σ₁ where they are balanced

(Khodak et al., ICLR 2021, arXiv:2105.01029, section 3.) W itself is never formed, see
``spectrum.py``. Whatever a product decays toward, its other numbers are those of W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log, nan
from statistics import fmean

import torch
from torch import Tensor
from torch.optim import Optimizer

from frobdecay.algebra.network import Network, chain
from frobdecay.algebra.precision import full_precision
from frobdecay.algebra.scaling import work_dtype
from frobdecay.algebra.sharpness import sharpness as sharpness_of
from frobdecay.diagnostics.spectrum import imbalance_of, rank_of, spectrum_of, triangles
from frobdecay.models.tables.table import Column, figure, screen, table, times
from frobdecay.optim.rates import DECAY
from frobdecay.product.product import Product, as_products, product_norm
from frobdecay.product.toward import itself

LearningRate = float | Tensor | Optimizer


def _largest(values: Sequence[float]) -> float:
    """The largest; NaN if there is one, wherever it stands."""
    return nan if any(value != value for value in values) else max(values)


def _geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of numbers of at least 0, infinity included."""
    logs = (log(v) if v > 0 else -inf if v == 0 else nan for v in values)
    return exp(sum(logs) / len(values))


# Name of each quantity, in the order of tables, and what it is over a whole model.
_TOTALS: dict[str, Callable[[Sequence[float]], float]] = {
    "norm": lambda values: sum(value**2 for value in values) ** 0.5,
    "departure": lambda values: sum(value**2 for value in values) ** 0.5,
    "nuclear": sum,
    "bound": sum,
    "imbalance": _largest,
    "stable_rank": fmean,
    "rank": fmean,
    "effective_step": _geometric_mean,  # the products' differ by orders of magnitude
}

QUANTITIES = tuple(quantity for quantity in _TOTALS if quantity != "departure")
_TOTALS["decay_step"] = _largest  # of an optimizer that decays products only


@dataclass(frozen=True, eq=False)
class ProductMeasurement:
    """The numbers of one product.

    A batch of products (attention heads) reads as one block-diagonal matrix: squared norms,
    nuclear norms and ranks add up, and σ₁ is the largest over the batch.

    Attributes:
        name: the product's name.
        shape: of the dense product.
        spectrum: singular values (*batch, min(m, n, r)), descending, float64 on the CPU; empty
            where the structure is no chain (Tucker, CP): what needs them is NaN then.
        norm: ‖W‖_F.
        nuclear: the nuclear norm, Σσ.
        bound: half the sum of the factors' squared norms; of two factors ``nuclear`` at least.
        imbalance: ‖UᵀU − VᵀV‖_F ÷ (‖UᵀU‖_F + ‖VᵀV‖_F), the largest over neighbours in a chain.
        stable_rank: ‖W‖_F² / σ₁².
        rank: how many singular values are above rounding; of no chain the smallest inner size.
        effective_step: lr / ‖W‖_F², None where no lr was given; 0 where lr is, as it is of an
            optimizer after the last step of a schedule.
        decay_step: what a step of decay multiplies a factor by, at most; from 2 it grows (with
            decoupled decay, or SGD). None unless the optimizer that was given has a λ.
        departure: ‖W − W₀‖_F, None where the product decays to zero.
    """

    name: str
    shape: tuple[int, ...]
    spectrum: Tensor
    norm: float
    nuclear: float
    bound: float
    imbalance: float
    stable_rank: float
    rank: int
    effective_step: float | None
    decay_step: float | None = None
    departure: float | None = None

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Return the numbers as ``{prefix + quantity: value}``, those that are known.

        Args:
            prefix: put before every key as it is.
        """
        found = {quantity: getattr(self, quantity) for quantity in _TOTALS}
        return {prefix + key: float(value) for key, value in found.items() if value is not None}


_Row = tuple[str, str, Mapping[str, float]]
_NAME = Column[_Row]("product", lambda row: row[0])
_COLUMNS = (
    Column[_Row]("shape", lambda row: row[1]),
    *(
        Column[_Row](
            quantity,
            lambda row, quantity=quantity: row[2].get(quantity),  # type: ignore[misc]
            lambda value: "-" if value != value else figure(value),
        )
        for quantity in _TOTALS
    ),
)


@dataclass(frozen=True, eq=False)
class Measurement:
    """The numbers of all products and of the model. Prints as a table.

    Attributes:
        products: one record a product, in the order given; also by iteration and by name.
    """

    products: tuple[ProductMeasurement, ...]

    def __len__(self) -> int:
        return len(self.products)

    def __iter__(self) -> Iterator[ProductMeasurement]:
        return iter(self.products)

    def __getitem__(self, name: str) -> ProductMeasurement:
        return {product.name: product for product in self.products}[name]

    def total(self, quantity: str) -> float:
        """Return one quantity over the model.

        The norm is (Σ‖W‖_F²)^½, and the departure likewise; nuclear norm and bound are sums, the
        imbalance and the decay step are the largest, stable rank and rank are means, the effective
        step is the geometric mean.

        Args:
            quantity: one of ``QUANTITIES``, "departure" or "decay_step".

        Returns:
            The number, of the products that have it; NaN if none has (no lr was given).

        Raises:
            ValueError: there is no such quantity.
        """
        every = [product.as_dict() for product in self]
        return total(quantity, [numbers[quantity] for numbers in every if quantity in numbers])

    def as_dict(self, prefix: str = "frobdecay") -> dict[str, float]:
        """Return plain floats for a logger: ``{"prefix/norm": …, "prefix/fc.weight/norm": …}``.

        Args:
            prefix: first part of every key.

        Examples:
            >>> import torch
            >>> product = Product.of(torch.ones(2, 1), torch.ones(8, 1), name="fc")
            >>> numbers = measure(product, lr=0.1).as_dict("train")
            >>> round(numbers["train/norm"], 6), round(numbers["train/fc/effective_step"], 6)
            (4.0, 0.00625)
        """
        out = {f"{prefix}/{quantity}": self.total(quantity) for quantity in self._known()}
        for product in self:
            out.update(product.as_dict(f"{prefix}/{product.name}/"))
        return out

    def __str__(self) -> str:
        rows: list[_Row] = [(p.name, times(p.shape), p.as_dict()) for p in self]
        rows.append((f"all {len(self)}", "", {name: self.total(name) for name in self._known()}))
        return table(rows, _NAME, _COLUMNS, lambda row: None, width=screen())

    def _known(self) -> dict[str, None]:
        """The quantities that some product has."""
        return dict.fromkeys(quantity for product in self for quantity in product.as_dict())


def measure(products: Product | Iterable[Product], lr: LearningRate | None = None) -> Measurement:
    """Measure norms, spectrum, balance and effective step size of products.

    Examples:
        >>> import torch
        >>> U = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> V = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> print(measure(Product.of(U, V, name="fc.weight"), lr=0.13))
        product    shape  norm  nuclear  bound  imbalance  stable_rank  rank  effective_step
        fc.weight  3×2    3.61        5    7.5      0.759         1.44     2            0.01
        all 1             3.61        5    7.5      0.759         1.44     2            0.01

    Args:
        products: one product or several, with names that differ.
        lr: learning rate for the effective step, or the optimizer to read it from: the mean
            over the param groups that hold a product's factors.

    Returns:
        A record that prints as a table. Numbers are computed in float64 (those of sums
        W₀ + s·BA, and departures, in float32 at least) and are NaN where a factor has a NaN or an
        infinity.

    Raises:
        ValueError: no products, two of one name, or factors that the optimizer does not hold.
        TypeError: ``lr`` is neither a number nor an optimizer.
    """
    found = as_products(products)
    names = [product.name for product in found]
    if not found:
        raise ValueError("expected at least one product, got none: factorize the model first")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"expected products with names that differ, got {twice} more than once")
    steps = _steps(found, lr)
    with torch.no_grad():
        return Measurement(tuple(map(_measure, found, steps)))


def total(quantity: str, values: Sequence[float]) -> float:
    """Combine one quantity of several products, as ``Measurement.total`` says."""
    if quantity not in _TOTALS:
        raise ValueError(f"expected a quantity of {tuple(_TOTALS)}, got {quantity!r}")
    return _TOTALS[quantity](values) if values else nan


# --- one product --------------------------------------------------------------------------------


Step = tuple[float | None, float | None]
"""A learning rate, and the largest lr·λ; None where there is none."""


def _steps(products: Sequence[Product], lr: LearningRate | None) -> list[Step]:
    """What an optimizer's groups say of each product's factors."""
    if not isinstance(lr, Optimizer):
        if isinstance(lr, bool) or not isinstance(lr, int | float | Tensor | None):
            raise TypeError(f"expected lr to be a number or an optimizer, got {type(lr).__name__}")
        return [(None if lr is None else float(lr), None)] * len(products)
    held = {id(p): group for group in lr.param_groups for p in group["params"]}
    steps: list[Step] = []
    for product in products:
        found = [held[id(p)] for p in product.params if id(p) in held]
        if not found and any(param.requires_grad for param in product.params):
            raise ValueError(
                f"{product.name}: expected an optimizer that holds its factors, got one that "
                "holds none of them; build the optimizer after factorizing the model"
            )
        known = [group for group in found if group.get("lr") is not None]
        rates = [float(group["lr"]) for group in known]  # none of what is frozen
        decays = [float(group["lr"]) * float(group[DECAY]) for group in known if DECAY in group]
        steps.append((fmean(rates) if rates else None, max(decays, default=None)))
    return steps


def _measure(product: Product, step: Step) -> ProductMeasurement:
    """Norm, bound and steps of every structure, and of a chain what its spectrum says."""
    own, (rate, decay) = itself(product), step
    batch, scale, network = own.batch, abs(own.scale), own.structure
    spectrum = torch.empty(0, dtype=torch.float64, device="cpu")
    nuclear = imbalance = stable_rank = sharpness = nan
    views: Sequence[Tensor]
    if network.is_chain:
        views = triangles(own)
        network = chain(tuple(view.ndim - batch for view in views))
        spectrum = scale * spectrum_of(views, batch)
        square, top = float(spectrum.square().sum()), float(spectrum.max())
        nuclear, imbalance = float(spectrum.sum()), imbalance_of(views, batch)
        stable_rank = square / top**2 if top else 0.0
        rank = rank_of(own, spectrum)
    else:
        views, rank = own.views(), own.rank
        if isinstance(network, Network):  # else W₀ is one of them, which is read where it is
            views = tuple(view.to(work_dtype(view)) for view in views)
        with full_precision(views[0].device.type):
            square = scale**2 * float(network.squared_norm(views, batch).clamp_min(0))
    if decay is not None and isinstance(network, Network) and isfinite(square):
        sharpness = scale**2 * float(sharpness_of(network, views, batch))
    sizes = [torch.linalg.vector_norm(v, dtype=work_dtype(v)) for v in views]
    return ProductMeasurement(
        name=product.name,
        shape=own.shape,
        spectrum=spectrum,
        norm=square**0.5,
        nuclear=nuclear,
        bound=scale * 0.5 * float(sum(size.square() for size in sizes)),
        imbalance=imbalance,
        stable_rank=stable_rank,
        rank=rank,
        effective_step=rate and (rate / square if square else inf),
        decay_step=None if decay is None else decay * sharpness,
        departure=None if own is product else float(product_norm(product)),
    )
