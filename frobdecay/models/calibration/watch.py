"""Watching a model: hooks that take the moments of what its weights see, while it runs.

Note [shared inputs]. Queries, keys and values multiply one tensor, gate and up projections another:
its moment is taken once, by the weight that meets it first, and the others note that they met it,
too. A tensor is the same if it has the same memory, which is still alive, the same shape and
strides, was not written to since, and the same of its rows count. A weight that meets it a second
time is in another call, whose tensor may have been filled anew where nobody counts it, as by numpy:
all is summed again. Each weight counts how many calls of another's moment it shares; sharing all of
them, the moment is its own. (Under ``inference_mode`` tensors do not count who writes to them, and
every weight takes its own.)
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing import reductions

from frobdecay.models.calibration.forward import eagerly, version_of
from frobdecay.models.calibration.inside import Inside
from frobdecay.models.calibration.masks import Mask as Mask
from frobdecay.models.calibration.masks import fitting, hides, rows
from frobdecay.models.calibration.probes import Probe
from frobdecay.models.calibration.sums import Key, Sums
from frobdecay.product.names import naming

_weakly: Any = reductions.StorageWeakRef


@dataclass
class _Seen:
    """A tensor that was met: as it was then, who met it, and which moment its inputs went into."""

    version: int
    mask: Tensor | None  # kept alive, for the place is told by its id
    names: set[str]
    key: Key | None = None


def _again() -> bool:
    """Whether a backward pass runs, where checkpointing repeats some of what was counted."""
    return torch._C._current_graph_task_id() != -1


class Watch:
    """Hooks on the modules of some probes; take them off with ``remove``.

    Args:
        probes: whose moments are taken.
        sums: where to.
        modules: all of the model: encoders among them make no nested tensors until ``remove``.

    Attributes:
        sums: where to.
        mask: which rows count, of the tensors whose shape begins so.
        unfit: whether a mask leaves rows out, and what was met did not have its shape, all of it.
    """

    def __init__(
        self, probes: Iterable[Probe], sums: Sums, modules: Iterable[nn.Module] = ()
    ) -> None:
        self.sums = sums
        self.mask: Mask = None
        self.unfit = self._fits = self._hides = False
        self._live: dict[int, tuple[Any, dict[Any, _Seen]]] = {}
        by_module: defaultdict[nn.Module, list[Probe]] = defaultdict(list)
        for probe in probes:
            by_module[probe.module].append(probe)
        self._undo = ExitStack()
        self._undo.enter_context(eagerly())
        for module in modules:
            if isinstance(module, nn.TransformerEncoder):
                self._set(module, "use_nested_tensor", False)
        for module, some in by_module.items():
            # Before other hooks, which may return something else than the module.
            register = functools.partial(module.register_forward_hook, prepend=True)
            if stacks := [probe for probe in some if probe.attribute]:
                # One expert after the other, as transformers' own code does.
                self._set(getattr(module, "config", None), "_experts_implementation", "eager")
                inside = Inside(module, stacks, self._meet)
                self._undo.enter_context(module.register_forward_pre_hook(inside.open))
                self._undo.enter_context(register(inside.close, always_call=True))
            else:
                self._undo.enter_context(register(self._hook(some), with_kwargs=True))

    def _set(self, holder: Any, name: str, value: object) -> None:
        """Set what holds something, until ``remove``."""
        if (was := getattr(holder, name, None)) is not None:
            setattr(holder, name, value)
            self._undo.callback(setattr, holder, name, was)

    def count(self, mask: Mask) -> None:
        """Say which rows count from now on; what was met until now was in another batch."""
        self._hides, self.mask = hides(mask) and isinstance(mask, Tensor), mask
        self._live.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        self._undo.close()

    def _hook(self, probes: list[Probe]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, named: Mapping[str, Any], made: Any) -> None:
            with torch.no_grad(), naming(probes[0].name):
                for probe in () if _again() else probes:
                    self._see(probe, (args, named, made))

        return hook

    def _see(self, probe: Probe, call: Any) -> None:
        """Take what one probe meets in one call."""
        inputs = None if probe.inputs is None else probe.inputs(call)
        if not self._shared(probe, inputs):
            assert probe.outputs is not None
            made = probe.outputs(call)
            made = rows(made, self._mask(probe, made))
            if probe.batch:
                made = made.reshape(len(made), *probe.batch, -1).movedim(0, -2)
            self.sums.add(probe, made)

    @torch.no_grad()
    def _meet(self, probe: Probe, inputs: Tensor, outputs: Tensor, at: int | None) -> None:
        """Take what one matrix of a stack multiplies, or all of them."""
        if _again():
            return
        with naming(probe.name):
            kept = inputs if probe.of == "inputs" else outputs
            each = kept if at is None else kept.reshape(-1, kept.shape[-1])
            self.sums.add(probe, each, at)

    def _shared(self, probe: Probe, inputs: Tensor | None) -> bool:
        """Sum the inputs, or note that they were; whether either was done."""
        if inputs is None:
            return False
        mask = self._mask(probe, inputs)
        seen, place = self._seen(inputs, mask)
        known, version = seen.get(place), version_of(inputs)
        if known is None or known.version != version or probe.name in known.names:
            known = seen[place] = _Seen(version, mask, set())
        known.names.add(probe.name)
        if known.key is not None:
            self.sums.shared[probe.name][known.key] += 1
        elif probe.of == "inputs":
            known.key = self.sums.add(probe, rows(inputs, mask))
        return known.key is not None

    def _mask(self, probe: Probe, tensor: Tensor) -> Tensor | None:
        """Which rows of a tensor that a probe meets count."""
        found = fitting(self.mask, probe.name, tensor)
        self._fits |= found is not None
        self.unfit = not self._fits and (self.unfit or (self._hides and tensor.ndim > 2))
        return found

    def _seen(self, tensor: Tensor, mask: Tensor | None) -> tuple[dict[Any, _Seen], Any]:
        """What was met in this memory, and where in it the tensor lies, with which mask."""
        if tensor.is_inference():
            return {}, None
        storage: Any = _weakly(tensor.untyped_storage())
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        _, seen = self._live.setdefault(storage.cdata, (storage, {}))
        masked = None if mask is None else (id(mask), version_of(mask))
        return seen, (tensor.storage_offset(), tensor.shape, tensor.stride(), masked)
