"""What PEFT expects of a parametrized module; the package is never imported.

It finds its way in a model by the names of parameters, and puts the update of a single parameter
(``target_parameters``, the experts of a mixture) on it as a parametrization; both expect that the
parameter is its module's own. Its search for such parameters asks modules nothing that ours could
answer, so that the search itself is wrapped: the one place where code of another package changes.
"""

from __future__ import annotations

import re
import sys
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList


def adaptable(module: nn.Module, attribute: str) -> None:
    """Have a module that was just parametrized meet PEFT's expectations."""
    lists: Any = module._modules["parametrizations"]
    lists.__class__ = Parametrizations
    lists.__dict__["module"] = module
    lists[attribute].__class__ = FactorList
    _search_factorized()


class Parametrizations(nn.ModuleDict):
    """``module.parametrizations``, on the way from a factor's name to the module that has it.

    For that, tools leave ".weight" out of a parameter's name, and arrive at
    ``embedding.parametrizations.original0``: here it is the embedding. (PEFT's prompt methods look
    so for the parameter with as many rows as there are words.)
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("original") and "module" in self.__dict__:
            return self.__dict__["module"]
        return super().__getattr__(name)


class FactorList(ParametrizationList):
    """``module.parametrizations.weight``, on which PEFT puts adapters of parameters.

    ``ParamWrapper`` registers a parametrization around every forward and removes it. It counts on
    a single ``original``, and of the two kinds that it has it finds only one again.
    """

    @property
    def original(self) -> Any:  # type: ignore[override]
        """What PEFT freezes again, while it has its parametrization here."""
        if any(_is_of_peft(one) for one in self):
            return self.original0
        raise AttributeError("a product has no original, but original0, original1, …")

    def append(self, module: nn.Module) -> FactorList:
        """Add a parametrization on top.

        Raises:
            ValueError: it cannot be applied to the weight (it wants factors of its own, as torch's
                weight_norm and orthogonal do).
        """
        if not _is_of_peft(module):
            try:
                with torch.no_grad():
                    module(self())
            except Exception as error:
                raise ValueError(
                    f"{type(module).__name__} cannot be put on a factorized weight ({error}); "
                    "merge or unroll the model first: frobdecay.merge(model)"
                ) from error
        elif hasattr(module, "rhs"):
            whole = sys.modules[type(module).__module__]._LoraParameterProxy
            module = whole(module.scaling * (module.lhs @ module.rhs))  # type: ignore[operator]
        parametrize._cache.clear()  # of a weight that was read in an outer ``cached()``
        return super().append(module)

    def __delitem__(self, index: int | slice) -> None:
        parametrize._cache.clear()
        super().__delitem__(index)


def _is_of_peft(parametrization: nn.Module) -> bool:
    return type(parametrization).__module__.startswith("peft.")


def _search_factorized() -> None:
    """Have PEFT find a factorized parameter by the end of its name, as it finds any other.

    It compares parametrized ones with whole names only; so it is given those, too.
    """
    tuner: Any = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTuner", None)
    search = getattr(tuner, "_inject_parameters", None)
    if search is None or hasattr(search, "__wrapped__"):
        return

    @wraps(search)
    def _inject_parameters(self: Any, peft_config: Any, model: nn.Module, **options: Any) -> Any:
        asked = peft_config.target_parameters
        peft_config.target_parameters = [*asked, *_meant(model, asked)]
        try:
            return search(self, peft_config=peft_config, model=model, **options)
        finally:
            peft_config.target_parameters = asked

    tuner._inject_parameters = _inject_parameters


def _meant(model: nn.Module, ends: list[str]) -> list[str]:
    """Names of factorized parameters that end so, where adapters may be on them already."""
    found = [path for path, one in model.named_modules() if isinstance(one, FactorList)]
    names = [path.replace(".parametrizations.", ".") for path in found]
    dotted = tuple(f".{end}" for end in ends)
    return [name for name in names if re.sub(r"\.base_layer\b", "", name).endswith(dotted)]
