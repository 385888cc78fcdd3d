"""Folders of transformers: ``save_pretrained`` and ``from_pretrained`` of factorized models.

    {"quantization_config": {"quant_method": "frobdecay", "version": 1, "weights": …}, …}

``save_pretrained`` writes the records into config.json, and ``from_pretrained`` asks its registry
of quantizers for who reads them: us, once frobdecay was imported, before or after transformers.
Without, it stops at the name of the file of weights, which says what to import. A loaded model is
no quantized one, and its configuration has no records: what is saved is what the weights are.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from torch import nn

from frobdecay.models.checkpoints.configs import FILE, METHOD, config_entries, hint, is_ours
from frobdecay.models.checkpoints.factorized import fit, placed
from frobdecay.models.checkpoints.records import (
    HEADER,
    check_structure,
    record_of,
    weight_of,
)
from frobdecay.models.fitness import unwrapped
from frobdecay.models.select import Walk
from frobdecay.models.surgery import ordinary
from frobdecay.models.unroll.chains import UNROLLED
from frobdecay.product.holding import factorized
from frobdecay.weights.product_tensor import ProductTensor

# --- register -----------------------------------------------------------------------------------


def when_imported(name: str, act: Callable[[], None]) -> None:
    """Do something once a module was imported: now, if it is there already; it is not imported.

    What fails is warned of: nobody's import fails for us.
    """
    if name in sys.modules:
        _act(name, act)
    else:
        sys.meta_path.insert(0, _Waiting(name, act))


def _act(name: str, act: Callable[[], None]) -> None:
    try:
        act()
    except Exception as error:
        warnings.warn(
            f"frobdecay and this version of {name} do not fit: {error!r}; factorized models are "
            "saved by save_factorized, or merged",
            stacklevel=3,
        )


class _Waiting(MetaPathFinder):
    """Finds one module, as the others would, and acts when it was executed."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The module's own, once; nothing for others."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _act(fullname, self.act)

            loader.exec_module = exec_module
        return spec


def register() -> None:
    """Have transformers read and write factorized folders, which importing frobdecay does."""
    auto: Any = importlib.import_module("transformers.quantizers.auto")
    if HEADER in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return

    class Factorization(auto.QuantizationConfigMixin):  # type: ignore[misc]
        """The records, as transformers hands them on."""

        def __init__(self, /, **structure: Any) -> None:
            self.__dict__.update(structure)

    class Quantizer(auto.HfQuantizer):  # type: ignore[misc]
        """Puts factors without numbers into the model before transformers loads its files."""

        is_trainable = True

        def is_serializable(self) -> bool:
            return True

        def update_attn_implementation(self, config: Any) -> Any:
            vars(config).pop(FILE, None)  # this is where a configuration is seen before its files
            return config

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
            structure_(model, vars(self.quantization_config))

        def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
            return _settled(model)

    auto.register_quantization_config(HEADER)(Factorization)
    auto.register_quantizer(HEADER)(Quantizer)
    # transformers' `init` functions leave alone what says this: a product has its numbers already.
    ProductTensor._is_hf_initialized = True  # type: ignore[attr-defined]


def register_saving() -> None:
    """Have ``save_pretrained`` say in config.json how the weights are factorized.

    And ``from_pretrained`` refuse factors that config.json does not know, also of a folder whose
    config.json has no records, where the registry is not asked.
    """
    # The registry is asked there only for a quantizer that the model has, whose answer takes the
    # place of the state_dict that the caller gave.
    model: Any = importlib.import_module("transformers.modeling_utils").PreTrainedModel
    config: Any = importlib.import_module("transformers.configuration_utils").PreTrainedConfig
    save, content = model.save_pretrained, config.to_diff_dict
    parameters = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(self, *args, **kwargs).arguments
        with _recorded(self, given.get("state_dict")):
            return save(self, *args, **kwargs)

    @functools.wraps(content)
    def to_diff_dict(self: Any) -> Any:
        made = content(self)
        return made | hint(made.get(METHOD))

    model.save_pretrained, config.to_diff_dict = save_pretrained, to_diff_dict
    adjust = model._adjust_missing_and_unexpected_keys  # which sees what no weight was found for

    @functools.wraps(adjust)
    def checked(self: Any, loading_info: Any) -> None:
        _check_known(self, loading_info)
        adjust(self, loading_info)

    model._adjust_missing_and_unexpected_keys = checked


# --- save ---------------------------------------------------------------------------------------


@contextmanager
def _recorded(model: Any, state_dict: Mapping[str, Any] | None) -> Iterator[None]:
    """A configuration that says what the weights are while they are saved.

    Raises:
        ValueError: weights that a folder cannot tell: unrolled, or quantized by others, too.
    """
    where = f"cannot save {type(model).__name__}"
    if chains := [name for name, module in model.named_modules() if UNROLLED in vars(module)]:
        raise ValueError(
            f"{where}: {chains[:4]} are unrolled, which from_pretrained would not know; save the "
            "factorized model, or torch.save this one, which needs no frobdecay to run"
        )
    adapters = getattr(model, "_hf_peft_config_loaded", False)  # which are saved alone
    found = [] if adapters else Walk(model).factorized
    records = {w.name: record_of(w) for w in found if w.name not in (state_dict or ())}
    held = vars(model.config)
    before = held.get(METHOD)
    if records and before is not None and not is_ours(before):
        raise ValueError(
            f"{where}: {next(iter(records))} is factorized, but the model is quantized, too, and "
            "its configuration can say one of both; frobdecay.merge it first, or delete "
            "config.quantization_config if it says what is no more"
        )
    if is_ours(before):  # of the folder that it was read from
        del held[METHOD]
    held.update(config_entries(records))
    try:
        yield
    finally:
        for name in (METHOD, FILE) if records else ():
            held.pop(name, None)
        if before is not None:
            held[METHOD] = before


# --- load ---------------------------------------------------------------------------------------


@ordinary("load")
def structure_(model: nn.Module, structure: Any) -> None:
    """Put factors without numbers in the place of the weights that a folder has factorized.

    Args:
        model: of transformers, as its configuration makes it; may be on the meta device.
        structure: the entry of config.json.

    Raises:
        ValueError: no such entry, or one that does not fit the model; nothing was changed then.
    """
    config: Any = model.config
    try:
        records, _ = check_structure(structure)
        walk = unwrapped(model, "load")
        fresh = fit(walk, _here(walk, records, config.architectures or []))
    except ValueError as error:
        raise ValueError(f"cannot load {config.name_or_path}: {error}") from error
    with placed(walk, fresh):
        for weight, _ in fresh:
            weight.module._is_hf_initialized = True  # type: ignore[assignment]


def _here(
    walk: Walk, records: Mapping[str, Mapping[str, Any]], architectures: list[str]
) -> dict[str, Mapping[str, Any]]:
    """Records by this model's names: with or without a head it has others, and fewer weights."""
    known = {name for weight in walk.weights for name in weight.names}
    found = {}
    for name, record in records.items():
        here = _spelled(name, walk.model, known)
        if here in known or type(walk.model).__name__ in architectures:
            found[here] = record
    return found


def _spelled(name: str, model: Any, known: Collection[str]) -> str:
    """A weight's name with or without the body's prefix, as it is known."""
    prefix = f"{model.base_model_prefix}."
    names = (name, prefix + name, name.removeprefix(prefix))
    return next((each for each in names if each in known), name)


def _check_known(model: Any, info: Any) -> None:
    """Refuse factors of weights that the model has dense, and would draw or tie anew.

    Raises:
        ValueError: names the weights.
    """
    factors = filter(None, map(weight_of, info.unexpected_keys))
    known = dict(model.named_parameters(remove_duplicate=False))
    if lost := sorted({_spelled(name, model, known) for name in factors} & known.keys()):
        raise ValueError(
            f"cannot load {model.config.name_or_path}: its files hold factors of {lost[:8]}, of "
            "which its config.json has no record, as config.save_pretrained alone writes it; save "
            "the model again by its own save_pretrained, after import frobdecay"
        )


def _settled(model: nn.Module) -> nn.Module:
    """A loaded model, of which nothing says that it is quantized.

    Raises:
        ValueError: it has parameters that were in no file, and are no numbers.
    """
    missing = [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if factorized(module)
        for name, parameter in module.named_parameters()
        if not parameter.is_meta and not hasattr(parameter, "_is_hf_initialized")
    ]
    config: Any = model.config
    if missing:
        raise ValueError(
            f"cannot load {config.name_or_path}: its files lack {missing[:8]}, or have them of "
            "other shapes than its config.json says; save the model again"
        )
    for held in (model, *(m.config for m in model.modules() if hasattr(m, "config"))):
        for name in (
            "hf_quantizer",
            "quantization_method",
            "is_quantized",
            METHOD,
            "_is_quantized",
        ):
            vars(held).pop(name, None)
    return model
