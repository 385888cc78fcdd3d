"""Every experiment: what the paper says, its arms, and its presets.

``paper`` has the published hyperparameters. ``cpu`` is a protocol for two cores and half an hour,
``small`` and ``fashion`` are for small models that are trained to the end, hours on two cores,
``gpu`` one for a few minutes on a large GPU; what they change is said in ``changes``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from benchmarks.experiments.engine import Job
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.pretraining import PRETRAINING
from benchmarks.experiments.vision import VISION
from benchmarks.experiments.writing import TEXT

__all__ = ["EXPERIMENTS", "jobs"]

EXPERIMENTS: Mapping[str, Experiment] = {**VISION, **TEXT, **PRETRAINING}


def jobs(
    name: str,
    preset: str,
    seeds: int,
    arms: list[str] | None = None,
    variants: list[str] | None = None,
    **changes: Any,
) -> list[Job]:
    """The trials of an experiment, seed by seed, each once.

    Args:
        name: key in ``EXPERIMENTS``.
        preset: of its protocols.
        seeds: how many, from 0.
        arms: some of its arms; all unless given.
        variants: some of the preset's; all unless given.
        changes: fields of the protocol to replace.

    Raises:
        ValueError: unknown arms or variants; an arm that comes after another that is not among
            them; a preset that the experiment does not have.
    """
    experiment = EXPERIMENTS[name]
    if preset not in experiment.presets:
        raise ValueError(f"{name} has the presets {', '.join(experiment.presets)}, not {preset}")
    known = experiment.presets[preset]
    if unknown := set(variants or ()) - set(known):
        raise ValueError(f"expected variants among {list(known)}, got {sorted(unknown)}")
    chosen = arms or list(experiment.arms)
    if unknown := set(chosen) - set(experiment.arms):
        raise ValueError(f"expected arms among {list(experiment.arms)}, got {sorted(unknown)}")
    for arm in chosen:
        if (before := experiment.arms[arm].after) and before not in chosen:
            raise ValueError(f"the arm {arm} needs {before}; got {chosen}")
    found: dict[str, Job] = {}
    for seed in range(seeds):
        for variant in variants or known:
            protocol = replace(known[variant], **changes)
            here: dict[str, str] = {}  # arm -> key of its job
            for key, arm in experiment.arms.items():
                if key in chosen and key in experiment.some.get((preset, variant), chosen):
                    settings = {**asdict(arm), **asdict(protocol)}
                    read = {name: settings[name] for name in settings.keys() - {*arm.blind}}
                    same = json.dumps([key, seed, read], sort_keys=True)
                    if same not in found:
                        found[same] = _job(experiment, key, variant, seed, protocol, here)
                    found[same].about["variants"].append(variant)
                    here[key] = found[same].key
    return list(found.values())


def _job(
    experiment: Experiment,
    key: str,
    variant: str,
    seed: int,
    protocol: Any,
    here: Mapping[str, str],
) -> Job:
    arm = experiment.arms[key]
    name, after = f"{variant}-{key}-{seed}", arm.after and here[arm.after]
    options = {"arm": arm, "seed": seed, "protocol": protocol, "key": name, "after": after}
    about = {
        "arm": key,
        "label": arm.label,
        "variants": [],
        "seed": seed,
        "settings": {**asdict(arm), **asdict(protocol)},
    }
    make = partial(experiment.trial, **options)
    return Job(name, make, (after,) if after else (), about)
