"""Every experiment: what the paper says, its arms, and its presets.

``paper`` has the published hyperparameters. ``cpu`` is a protocol for two cores and about an hour,
``gpu`` one for a few minutes on a large GPU; what they change is said in ``changes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from benchmarks.experiments.engine import Job
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.vision import VISION
from benchmarks.experiments.writing import TEXT

__all__ = ["EXPERIMENTS", "jobs"]

EXPERIMENTS: Mapping[str, Experiment] = {**VISION, **TEXT}


def jobs(name: str, preset: str, seeds: int, arms: list[str] | None, **changes: Any) -> list[Job]:
    """The trials of an experiment, seed by seed.

    Args:
        name: key in ``EXPERIMENTS``.
        preset: of its protocols.
        seeds: how many, from 0.
        arms: some of its arms; all unless given.
        changes: fields of the protocol to replace.

    Raises:
        ValueError: unknown arms; one that comes after another that is not among them.
    """
    experiment = EXPERIMENTS[name]
    chosen = arms or list(experiment.arms)
    if unknown := set(chosen) - set(experiment.arms):
        raise ValueError(f"expected arms among {list(experiment.arms)}, got {sorted(unknown)}")
    for arm in chosen:
        if (before := experiment.arms[arm].after) and before not in chosen:
            raise ValueError(f"the arm {arm} needs {before}; got {chosen}")
    found: list[Job] = []
    for seed in range(seeds):
        for variant, protocol in experiment.presets[preset].items():
            protocol = replace(protocol, **changes)
            found += [_job(experiment, key, variant, seed, protocol) for key in chosen]
    return found


def _job(experiment: Experiment, key: str, variant: str, seed: int, protocol: Any) -> Job:
    def name(arm_key: str) -> str:
        return f"{variant}-{arm_key}-{seed}"

    arm = experiment.arms[key]
    after = arm.after and name(arm.after)
    options = {"arm": arm, "seed": seed, "protocol": protocol, "key": name(key), "after": after}
    about = {
        "arm": key,
        "label": arm.label,
        "variant": variant,
        "seed": seed,
        "settings": {**asdict(arm), **asdict(protocol)},
    }
    make = partial(experiment.trial, **options)
    return Job(name(key), make, (after,) if after else (), about)
