"""How a config.json of transformers says which weights of its folder are factorized.

{"quantization_config": {"quant_method": "frobdecay", "version": 1, "weights": …}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frobdecay.models.checkpoints.records import HEADER, RECORDS_VERSION, check_structure

METHOD, FILE = "quantization_config", "transformers_weights"
HINT = "the weights are factorized: pip install frobdecay, and import frobdecay before loading"


def config_entries(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a folder's config.json has to say beside the model's own, for ``from_pretrained``.

    Args:
        records: weight name, as in the model's ``state_dict`` -> its record. The factors lie in the
            files under the names of ``records.factor_key``, without the dense weight.

    Returns:
        Entries of config.json; empty without records.
    """
    if not records:
        return {}
    structure = {"quant_method": HEADER, "version": RECORDS_VERSION, "weights": dict(records)}
    return {METHOD: structure, **hint(structure)}


def config_records(config: Any) -> dict[str, Mapping[str, Any]]:
    """The records in a config.json, by ``config_entries``; none in one of a dense model.

    Raises:
        ValueError: records that are none, or of a later version.
    """
    structure = config.get(METHOD) if isinstance(config, Mapping) else None
    return dict(check_structure(structure)[0]) if is_ours(structure) else {}


def without_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what ``config_entries`` adds."""
    ours = (METHOD, FILE) if is_ours(config.get(METHOD)) else ()
    return {name: value for name, value in config.items() if name not in ours}


def hint(structure: Any) -> dict[str, str]:
    """The name of a file that cannot be, where who does not know us would draw weights anew."""
    return {FILE: HINT} if is_ours(structure) else {}


def is_ours(structure: Any) -> bool:
    """Whether the entry says how weights are factorized; others say how they are quantized."""
    return isinstance(structure, Mapping) and structure.get("quant_method") == HEADER
