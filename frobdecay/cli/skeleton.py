"""A model for a checkpoint, of which only the tensors are known: what ranks are planned for.

A folder of transformers says which model it is, and where transformers is installed it is made of
that class. Of any other checkpoint there is a layer for every weight, under the weight's name and
of the type that has weights of such a shape. Weights that are factorized in the file are so in the
model. So ``plan_ranks`` and its selectors treat it as any model. Its layers hold the dense tensors
of the file themselves, and factors without numbers: nothing is copied.
"""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frobdecay.cli.read import Checkpoint, count
from frobdecay.models.checkpoints.folders import CONFIG, folder_of
from frobdecay.models.checkpoints.tensors import identity, without_wrappers
from frobdecay.models.plan import RankPlan
from frobdecay.models.ranks import plan_ranks
from frobdecay.models.tables.fold import numbers, pattern
from frobdecay.product.names import strip_wrappers
from frobdecay.weights.registration import put_factors

_LAYERS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True)
class Skeleton:
    """The model of a checkpoint.

    Attributes:
        model: with the tensors of the file for parameters.
        names: of its parameters -> in the file.
        absent: parameters of the model that the file does not have, and so no numbers.
    """

    model: nn.Module
    names: dict[str, str]
    absent: list[str]

    def plan(self, **options: Any) -> RankPlan:
        """As ``plan_ranks``, by the names in the file, for a command with these options.

        Raises:
            ValueError: as ``plan_ranks``.
        """
        left = [*(options.get("exclude") or ()), *self.absent] or None
        try:
            plan = plan_ranks(self.model, **{**options, "exclude": left})
        except ValueError as error:
            raise ValueError(_spelled(str(error), options)) from error
        rows = []
        for row in plan.rows:
            reason = row.reason and _spelled(row.reason, options)
            rows.append(replace(row, name=self.names.get(row.name, row.name), reason=reason))
        return replace(plan, rows=tuple(rows))


_SETTINGS = "|".join(name for name in signature(plan_ranks).parameters if name != "model")


def _spelled(text: str, options: Collection[str]) -> str:
    """What is said to who calls Python, for who gives these options to a command."""

    def spell(met: re.Match[str]) -> str:
        name, value = met.groups()
        return f"--{name}{value and ' '}{value}" if name in options else f"Python's {met[0]}"

    return re.sub(rf"\b({_SETTINGS})=([^\s,;.)]?)", spell, text)


def skeleton(checkpoint: Checkpoint, numbers: bool) -> Skeleton:
    """The model of a checkpoint.

    Args:
        checkpoint: with the tensors; those that are no weights count in the model, too.
        numbers: whether its dense weights have theirs, and not shapes alone.

    Raises:
        ValueError: factors that do not fit their records.
    """
    factorized, folder = checkpoint.factorized, folder_of(checkpoint.path)
    held: dict[Hashable, Any] = {}  # what is tied is one layer, or one parameter, here too
    weights: dict[str, nn.Parameter] = {}
    for name, tensor in checkpoint.weights.items():
        parameter = nn.Parameter(tensor if numbers else _empty(tensor.shape), requires_grad=False)
        weights[name] = held.setdefault(identity(tensor), parameter)
    if folder is not None and (folder / CONFIG).exists():
        if (known := _architecture(folder)) is not None:
            return _filled(*known, weights, factorized)
        print(
            f"frobdecay: {folder}: not a model of the transformers that is installed, if one is; "
            "layers are told apart by the shapes of their weights",
            file=sys.stderr,
        )
    without_wrappers(checkpoint.tensors)  # refuses what would be one
    model, names = nn.Module(), {}
    for name in _in_order(checkpoint):
        if name in factorized:
            made, factors = factorized[name]
            layer = held.setdefault(identity(factors[0]), nn.Module())
            if not layer._modules:
                _factorize(layer, "weight", made)
        elif name not in weights:
            continue
        else:
            parameter = weights[name]
            if parameter.ndim > 2 and len(parameter) == 1:  # no layer: such as of positions
                _put(model, name.split("."), parameter)
                continue
            layer = _layer(parameter)
        path = name.removesuffix(".weight") or name
        names[strip_wrappers(f"{path}.weight").lstrip(".")] = name
        _put(model, path.split("."), layer)
    factors = [factor for _, each in factorized.values() for factor in each]
    others = checkpoint.total - count([*checkpoint.weights.values(), *factors])
    model.register_parameter("(all other tensors)", nn.Parameter(_empty([others])))
    return Skeleton(model, names, [])


def _in_order(checkpoint: Checkpoint) -> list[str]:
    """Names as their layers are registered, so far as files or names say it.

    A file of safetensors has its keys in the order of the alphabet: then those that are called like
    outputs are last, numbered ones before them as they are counted, and others first.
    """
    names = [weight or key for key, weight in checkpoint.entries(checkpoint.tensors)]
    saved = ([k for k in keys if k not in checkpoint.tied] for keys in checkpoint.files.values())
    return sorted(names, key=_place) if all(keys == sorted(keys) for keys in saved) else names


def _place(name: str) -> tuple[int, str, list[int]]:
    above = itertools.takewhile(lambda part: not part.isdecimal(), name.split("."))
    output = any(re.search(_OUTPUTS, part) for part in above)  # not what is in a layer
    return 2 if output else 1 if numbers(name) else 0, pattern(name), numbers(name)


_OUTPUTS = r"^(fc\d*|cls|score|logits|proj_out|output|pooler)$|head|classifier|unembed"


def _put(model: nn.Module, path: Iterable[str], what: nn.Module | nn.Parameter) -> None:
    """Past the checks of names: a file may have any."""
    *around, last = path
    for part in around:
        model = model._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    held: Any = model._parameters if isinstance(what, nn.Parameter) else model._modules
    held[last] = what


def _layer(weight: nn.Parameter) -> nn.Module:
    """A module with nothing but this weight."""
    kind: Any = _LAYERS[weight.ndim]
    layer: nn.Module = kind(*[1] * min(weight.ndim, 3), bias=False, device="meta")
    layer.weight = weight
    return layer


def _factorize(module: nn.Module, attribute: str, made: Any) -> None:
    """Factors without numbers in the place of a weight."""
    module.register_parameter(attribute, nn.Parameter(_empty(made.shape), requires_grad=False))
    put_factors(module, attribute, made, [*map(_empty, made.factor_shapes(made.shape))])


def _empty(shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device="meta")


def _architecture(folder: Path) -> tuple[Any, Callable[[str], str]] | None:
    """The model that a folder's configuration describes, without numbers; None if it is unknown.

    And how transformers calls on loading what files call otherwise.
    """
    try:
        transformers = importlib.import_module("transformers")
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = getattr(transformers, config.architectures[0])
        with torch.device("meta"):
            model = kind(config)
        return model, _renaming(model)
    except Exception:  # no transformers, or whatever a class does with a configuration
        return None


def _filled(
    model: Any,
    renamed: Callable[[str], str],
    weights: Mapping[str, nn.Parameter],
    factorized: Mapping[str, tuple[Any, Any]],
) -> Skeleton:
    """The model with the file's tensors, tied ones in all their places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, attribute))
    known = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."  # some files have the names of the body alone
    names, filled = {}, set()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    shapes |= {name: tuple(made.shape) for name, (made, _) in factorized.items()}
    for name, shape in shapes.items():
        for here in (name, renamed(name), prefix + name, name.removeprefix(prefix)):
            if here in known and tuple(known[here].shape) == shape:
                names[here] = name
                if name in factorized:  # after the dense ones: what was tied is untied
                    path, _, attribute = here.rpartition(".")
                    _factorize(model.get_submodule(path), attribute, factorized[name][0])
                else:
                    filled.add(id(known[here]))
                    for module, attribute in places[id(known[here])]:
                        module._parameters[attribute] = weights[name]
                break
    absent = [
        name
        for name, parameter in known.items()
        if parameter.ndim > 1 and name not in names and id(parameter) not in filled
    ]
    return Skeleton(model, names, absent)


def _renaming(model: Any) -> Callable[[str], str]:
    loading: Any = importlib.import_module("transformers.core_model_loading")
    conversions: Any = importlib.import_module("transformers.conversion_mapping")
    mapping = conversions.get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, loading.WeightRenaming)]
    return lambda name: str(loading.rename_source_key(name, renamings, [])[0])
