"""A warning where decay does not shrink but overshoots.

A step of decay multiplies a factor by I − lr·λ·G, with G the Gram of the others: of a pair, U by
I − lr·λ·VᵀV. Where an eigenvalue of lr·λ·G is 2 or more, the factor grows from step to step with
its sign turning. In a balanced pair the largest one is lr·λ·σ₁, with σ₁ that of W. So it is with
decoupled decay and with SGD; what other optimizers make of a coupled gradient has another scale.

Looking costs little and waits for no accelerator: the product of the other factors' squared norms
is above every eigenvalue, and is looked at rarely, where it has arrived on the host. Only where it
says 2 or more are the Grams themselves formed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from frobdecay.algebra.network import Network
from frobdecay.algebra.precision import Coefficient, common_dtype, full_precision
from frobdecay.algebra.sharpness import sharpness as sharpness_of
from frobdecay.gradient.graphs import is_capturing
from frobdecay.product.factor import is_sharded
from frobdecay.product.product import Product

_Known = tuple[Product, Coefficient]
_Sent = tuple[list[_Known], list[Tensor], list[Any]]

_LIMIT = 2.0
_EVERY = 64


class Watch:
    """Looks at the size of decay steps, at the first ones and now and then, and warns once."""

    def __init__(self) -> None:
        self._steps, self._warned = 0, False
        self._sent: _Sent | None = None

    @torch.no_grad()
    def look(
        self, products: Sequence[Product], sizes: Callable[[], Sequence[Coefficient | None]]
    ) -> None:
        """Look at the factors before a step.

        Args:
            products: all.
            sizes: gives lr·λ of each, None where it does not decay or the step has another scale.
        """
        if self._warned:
            return
        self._steps += 1
        due = self._steps % _EVERY == 0 or self._steps & (self._steps - 1) == 0
        if self._sent is None and not due:
            return
        if is_capturing({param.device.type for one in products for param in one.params}):
            return  # where not even an event can be asked
        sent = self._send(products, sizes()) if self._sent is None else self._sent
        known, norms, events = sent
        self._sent = None if all(event.query() for event in events) else sent
        if self._sent is None:
            self._judge(known, [float(norm) for norm in norms])

    def _send(self, products: Sequence[Product], sizes: Sequence[Coefficient | None]) -> _Sent:
        """Have the norms of all factors, and the sizes, brought to the host."""
        known = [
            (product, size)
            for product, size in zip(products, sizes, strict=True)
            if size is not None
            and isinstance(product.structure, Network)
            and not any(is_sharded(param) for param in product.params)
        ]
        found = [
            torch.linalg.vector_norm(view, dtype=common_dtype([view]))
            for product, _ in known
            for view in product.views()
        ]
        found += [size for _, size in known if isinstance(size, Tensor)]
        events: list[Any] = []
        for device in {norm.device for norm in found if norm.device.type == "cuda"}:
            places = [k for k, norm in enumerate(found) if norm.device == device]
            for k, norm in zip(places, _on_host([found[k] for k in places]), strict=True):
                found[k] = norm
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        return known, found, events

    def _judge(self, known: Sequence[_Known], numbers: list[float]) -> None:
        tensors = sum(isinstance(size, Tensor) for _, size in known)
        norms, given = iter(numbers), iter(numbers[len(numbers) - tensors :])
        for product, size in known:
            squares = [next(norms) ** 2 for _ in product.factors]
            multiple = (next(given) if isinstance(size, Tensor) else size) * product.scale**2
            bounds = [prod(squares[:k] + squares[k + 1 :]) for k in range(len(squares))]
            if not isfinite(multiple * max(bounds)) or multiple * max(bounds) < _LIMIT:
                continue
            views = product.views()
            with full_precision(views[0].device.type):
                assert isinstance(product.structure, Network)
                sharpness = float(sharpness_of(product.structure, views, product.batch))
            if multiple * sharpness >= _LIMIT:
                self._warned = True
                warnings.warn(
                    f"{product.name}: a step of decay is {multiple * sharpness:.3g} times the "
                    "factor (lr·λ·σ₁, for balanced factors), and from 2 it makes the factor grow: "
                    "lower λ or the learning rate; frobdecay.diagnostics.measure(products, "
                    "optimizer) shows it for all products as decay_step",
                    stacklevel=2,
                )
                return


def _on_host(numbers: Sequence[Tensor]) -> Tensor:
    """Numbers on their way to pinned memory, together."""
    sent = torch.stack([number.reshape(()).double() for number in numbers])
    host = torch.empty(sent.shape, dtype=sent.dtype, device="cpu", pin_memory=True)
    return host.copy_(sent, non_blocking=True)
