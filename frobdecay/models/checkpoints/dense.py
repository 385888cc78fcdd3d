"""Dense weights into a factorized model, and the error that its ranks make."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frobdecay.models.checkpoints.records import factor_key, weight_of
from frobdecay.models.checkpoints.restoring import dense_to_factors
from frobdecay.models.checkpoints.tensors import check_same, unsaved_buffers
from frobdecay.models.fitness import relative_error
from frobdecay.models.plan import PlanRow, RankPlan
from frobdecay.models.select import Walk
from frobdecay.models.surgery import ordinary
from frobdecay.product.holding import factorized
from frobdecay.product.names import naming


@ordinary("load")
def load_dense_(
    model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True
) -> RankPlan:
    """Load a dense ``state_dict`` into a factorized model, and say how well the ranks hold it.

    Examples:
        >>> import torch, frobdecay
        >>> dense, model = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)
        >>> _ = frobdecay.factorize(model, rank=6)
        >>> plan = load_dense_(model, dense.state_dict())
        >>> plan.rows[0].error < 1e-6, torch.allclose(model.weight, dense.weight, atol=1e-6)
        (True, True)

    Each factorized weight gets the spectral factors of the dense one at the rank it has, whatever
    its initialization; everything else is loaded as it is. Parameters stay the same objects, so an
    optimizer goes on. ``model.load_state_dict(state_dict)`` does the same without the report; with
    ``assign=True`` also on the meta device.

    Args:
        model: with factorized weights.
        state_dict: of the dense model: its shapes exactly, and its keys. What more is in it and no
            weight is left out: integers and truth values (``position_ids``, masks), buffers that
            the model does not save, and what a transformers model says it ignores.
        strict: False to leave out every key that the model lacks, and to leave what the
            ``state_dict`` lacks as it is.

    Returns:
        A plan with the relative error ‖W − UVᵀ‖_F / ‖W‖_F of every factorized weight, and a row
        for every key that was left out, or not found; prints as a table.

    Raises:
        TypeError, ValueError: keys or shapes that differ; weights that cannot be factorized; a
            model that is dense, sharded, on the meta device or made under ``inference_mode``.
            Nothing was changed then.
    """
    _check_loadable(model, state_dict)
    converted: OrderedDict[str, Any] = OrderedDict(state_dict)
    done: dict[int, tuple[str, Any, Tensor, tuple[Tensor, ...]]] = {}
    absent: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, held in factorized(module).items():
            name = f"{path}.{attribute}".lstrip(".")
            if name not in converted:
                _check_dense(name, held, state_dict)
                absent.add(name)
                continue
            dense = converted.pop(name)
            if id(held) not in done:
                with naming(name):
                    done[id(held)] = name, held, dense, dense_to_factors(held, dense)
            *_, factors = done[id(held)]
            converted.update({factor_key(name, i): f for i, f in enumerate(factors)})
    rest = _left_out(model, converted, absent, strict)
    # Modules read there which version of themselves was saved.
    converted._metadata = getattr(state_dict, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(converted, strict=strict)
    rows = [_row(name, held, dense) for name, held, dense, _ in done.values()]
    after = sum(parameter.numel() for parameter in model.parameters())
    saved = sum(row.before - row.after for row in rows)
    return RankPlan((*rows, *rest), after + saved, after)


def _check_loadable(model: nn.Module, state_dict: Any) -> None:
    """Refuse what is no ``state_dict``, and a model that has nothing to factorize it for."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"expected a state_dict, got a {type(state_dict).__name__}; torch.load a file first"
        )
    if not Walk(model).factorized:
        inside = [key for key in state_dict if ".parametrizations." in f".{key}"]
        raise ValueError(
            f"expected a model with factorized weights, got a dense {type(model).__name__}; "
            + ("the state_dict is factorized, too: save it with save_factorized, and "
               "load_factorized rebuilds the structure" if inside
               else "load it with model.load_state_dict")
        )  # fmt: skip


def _check_dense(name: str, held: Any, state_dict: Mapping[str, Any]) -> None:
    if any(factor_key(name, i) in state_dict for i in range(held.ntensors)):
        raise ValueError(
            f"{name} is factorized in the state_dict already; load it with model.load_state_dict"
        )


def _left_out(
    model: nn.Module, converted: dict[str, Any], absent: set[str], strict: bool
) -> list[PlanRow]:
    """Take out what the model lacks, if it may lack it; a row for that and for what it misses.

    Raises:
        ValueError: keys or shapes that differ, or tensors that cannot be written to.
    """
    state = model.state_dict(keep_vars=True)
    fixed = [k for k, value in state.items() if isinstance(value, Tensor) and value.is_inference()]
    if fixed:
        raise ValueError(
            f"{fixed[:8]} were made under torch.inference_mode, and cannot be written to; make "
            "the model outside of it"
        )
    expected = {key: what for key, what in _shapes(state).items() if weight_of(key) not in absent}
    expected.update(dict.fromkeys(absent, "a dense weight"))
    more, buffer = [key for key in converted if key not in expected], unsaved_buffers(model)
    more = [key for key in more if not strict or buffer(key, converted[key])]
    left = [_unused(key, converted.pop(key), "not in the model; left out") for key in more]
    found = _shapes(converted)
    if not strict:
        gone = [key for key in expected if key not in found]
        left += [_unused(key, state.get(key), "not in the state_dict; as it was") for key in gone]
        expected = {key: what for key, what in expected.items() if key in found}
    try:
        check_same(expected, found, "the state_dict", "the model")
    except ValueError as error:
        if strict and expected.keys() != found.keys():
            advice = _elsewhere(expected, converted) or "strict=False passes over such names"
            raise ValueError(f"{error}; {advice}") from None
        raise
    return left


def _elsewhere(expected: Mapping[str, str], given: Mapping[str, Any]) -> str | None:
    """What to do where the weights have another prefix, or lie further down."""
    lacking, more = [k for k in expected if k not in given], [k for k in given if k not in expected]
    if prefix := _prefix(lacking, more):
        return (
            f"its names begin with {prefix!r}: load "
            f"{{name.removeprefix({prefix!r}): value for name, value in state_dict.items()}}"
        )
    prefix = _prefix(more, lacking)
    if prefix and all(name.startswith(prefix) for name in lacking):
        path = prefix.removesuffix(".")
        return f"the model's names begin with {prefix!r}: load into model.{path}"
    inside = [key for key in more if isinstance(given[key], Mapping)]
    return f"the weights may be in state_dict[{inside[0]!r}]" if inside else None


def _prefix(names: Sequence[str], longer: Sequence[str]) -> str | None:
    """What has to be put before most of some names to have the others."""
    if not names:
        return None
    there = set(longer)
    ends = (name[: -len(names[0])] for name in longer if name.endswith(f".{names[0]}"))
    return next((p for p in ends if sum(p + n in there for n in names) * 2 > len(names)), None)


def _unused(name: str, value: Any, reason: str) -> PlanRow:
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    return PlanRow(name, shape, reason=reason)


@torch.no_grad()
def _row(name: str, held: Any, dense: Tensor) -> PlanRow:
    error = relative_error(dense.to(held.original0.device), held())
    return PlanRow.of(name, tuple(dense.shape), held[0], error)


def _shapes(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """What has to agree to be copied; anything else that modules keep, by key alone."""
    return {
        key: f"shape {tuple(value.shape)}"
        + f", {value.layout}" * (value.layout != torch.strided)
        + f", on {value.device}" * value.is_meta
        + ", complex" * value.is_complex()
        if isinstance(value, Tensor)
        else "extra state"
        for key, value in state_dict.items()
    }
