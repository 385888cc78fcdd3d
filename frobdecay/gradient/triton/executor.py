"""The grouped executor: all pairs of a model in two launches on a GPU, nothing copied.

Planning builds the kernels' tables (``tables``) and buffers once. A call then does this only:

    compare     targets and coefficients with the last call's; where new gradients got the old
                memory, nothing is left
    upload      what differs, in one asynchronous copy of a few kilobytes from pinned memory
    launch A    all Grams
    launch B    all updates; once more for a second dtype of targets, or where targets overlap

Coefficients reach the kernel through addresses, too: a tensor is read where it is, by the GPU,
so that its value is never waited for. A call that is captured in a CUDA graph has a table of its
own, which the graph uploads at every replay: gradients of the graph stay where they were at the
capture, numbers keep their values, tensors are followed.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version

from frobdecay.algebra.precision import Coefficient
from frobdecay.gradient.bucketed import Coefs, Grams, Job, Targets
from frobdecay.gradient.graphs import is_capturing
from frobdecay.gradient.overlaps import overlapping
from frobdecay.gradient.triton.refusals import load_kernels
from frobdecay.gradient.triton.tables import MAX_STRIDE, Slot, gram_table, sheets, update_table
from frobdecay.gradient.triton.tiles import Tile, capability_of, programs_for, tile_for

if TYPE_CHECKING:
    from frobdecay.gradient.triton.launches import Launch


Form = tuple[torch.dtype, tuple[int, ...]]
"""Of a target: dtype, strides."""

_COLD = (
    "expected a call with targets of the same dtypes, strides and alignment before each capture in "
    "a CUDA graph, got none: warm up with the step that is captured"
)


class _Part(NamedTuple):
    """The slots of one dtype: their share of launch A."""

    dtype: torch.dtype
    slots: list[Slot]
    table: Tensor
    layouts: int


class _Update(NamedTuple):
    """One launch B: a part's slots into targets of one dtype."""

    part: _Part
    target_dtype: torch.dtype
    table: Tensor
    layouts: int
    row: int  # of the addresses, in the uploaded table
    in_place: bool


class Grouped:
    """A plan for pairs on one device; see ``Runner``.

    Args:
        jobs: pairs that ``refusals`` lets pass.
        tile: how to cut matrices up; by default the one for the largest rank.
        programs: how many are wanted of a launch; by default from the device.
    """

    def __init__(
        self, jobs: Sequence[Job], tile: Tile | None = None, programs: int | None = None
    ) -> None:
        kernels = load_kernels()
        assert kernels is not None
        self._kernels: Any = kernels
        self.device = jobs[0].views[0].device
        largest = max(job.views[0].shape[-1] for job in jobs)
        self.tile = tile_for(largest, capability_of(self.device)) if tile is None else tile
        self._rank = largest
        self._programs = programs_for(self.device, self.tile) if programs is None else programs
        self._chosen = [k for job in jobs for k in range(job.row.start, job.row.stop)]
        self._slots = self._make_slots(jobs)
        self._overlapping = overlapping([slot.view for slot in self._slots])
        self._parts = self._plan_grams()
        self._updates: list[_Update] = []
        self._addresses: list[list[int]] = []
        self._tables: dict[tuple[torch.dtype, torch.dtype, bool], tuple[Tensor, int]] = {}
        self._launches: dict[tuple[object, ...], Launch] = {}  # with these tables and the memory
        # Of the last call:
        self._form: object = None
        self._forms: Sequence[Form | None] = []
        self._places: list[int] = []  # of targets; these are not kept, to die with their step
        self._aligned: list[int] = []
        self._coefs: Coefs | None = None  # None where some had to be converted
        self._kept: list[Tensor | None] = []
        self._numbers: list[float] = []
        self._pointers: list[int] = []
        self._coef_rows: tuple[int, Tensor] | None = None
        self._sent: list[Any] = []  # what was uploaded
        self._memory = torch.empty(0, dtype=torch.int64, device=self.device)
        self._spare: Tensor | None = None
        # What graphs read, for as long as the plan lives; its other buffers are never replaced.
        self._captured: list[tuple[list[Any], object, Tensor, Tensor]] = []
        self._streams: set[Any] = set()

    def _make_slots(self, jobs: Sequence[Job]) -> list[Slot]:
        slots: list[Slot] = []
        place, block = 0, self.tile.block
        for job in jobs:
            leading = -(-job.views[0].shape[-1] // block) * block
            for view in job.views:
                slots.append(Slot(len(slots), view.detach(), job.batch, place, leading))
                place += slots[-1].length
        self._grams = torch.zeros(place, dtype=torch.float32, device=self.device)
        return slots

    def _plan_grams(self) -> list[_Part]:
        by_dtype: dict[torch.dtype, list[Slot]] = defaultdict(list)
        for slot in self._slots:
            by_dtype[slot.view.dtype].append(slot)
        parts, partials, counters = [], 0, 0
        for dtype, slots in by_dtype.items():
            block, step = self.tile.block, self.tile.gram_rows
            plan = gram_table(slots, block, step, self._programs, partials, counters)
            partials, counters = plan.partials, plan.counters
            parts.append(_Part(dtype, slots, self._int64(plan.rows), plan.layouts))
        self._partials = torch.empty(max(partials, 1), dtype=torch.float32, device=self.device)
        self._counters = torch.zeros(max(counters, 1), dtype=torch.int32, device=self.device)
        return parts

    def _int64(self, rows: list[list[int]]) -> Tensor:
        pin = self.device.type == "cuda"  # else the copy is waited for
        host = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=pin)
        return host.to(self.device, non_blocking=True)

    @_disable_dynamo
    def __call__(
        self, targets: Targets, coefs: Coefs, form: object = None, grams: Grams | None = None
    ) -> None:
        """Add coef · ∇½‖W‖² to the target of every factor; see ``Runner``."""
        if len(targets) > len(self._chosen):
            targets, coefs = [targets[k] for k in self._chosen], [coefs[k] for k in self._chosen]
        if all(target is None for target in targets):
            return
        with self.on_device():
            table = self._bind(targets, coefs, form)
            self._keep_for_stream()
            self.launch_grams()
            for update in self._updates:
                self._launch_of_updates(update, table)()
        if grams is not None:
            found = [slot.gram_in(self._grams) for slot in self._slots]
            grams.update(zip(self._chosen, found, strict=True))
        written: Any = targets if all(self._places) else [t for t in targets if t is not None]
        increment_version(written)  # as an operator of torch would: autograd checks it

    def launch_grams(self) -> None:
        """Compute all Grams of the factors as they are now."""
        for part in self._parts:
            if part.table.numel():
                self._launch_of_grams(part)()

    def _launch_of_grams(self, part: _Part) -> Launch:
        key = part.dtype, self._kernels.precision_of(part.dtype)
        if key not in self._launches:
            options = self._kernels.gram_options(part.dtype, part.layouts, self._rank, self.tile)
            tensors = part.table, self._grams, self._partials, self._counters
            self._launches[key] = self._kernels.gram_launch(tensors, options)
        return self._launches[key]

    def _launch_of_updates(self, update: _Update, table: Tensor) -> Launch:
        about = update.part.dtype, update.target_dtype, update.layouts, self._rank, update.in_place
        key = *about, update.row, self._kernels.precision_of(update.part.dtype)
        known = self._launches if table is self._memory else {}  # a graph's is launched once
        if key not in known:
            options = self._kernels.update_options(*about, self.tile)
            tensors = update.table, self._grams, table[update.row], table[-2]
            known[key] = self._kernels.update_launch(tensors, options)
        return known[key]

    def _bind(self, targets: Targets, coefs: Coefs, form: object) -> Tensor:
        """The table of this call on the device, see ``_upload``."""
        capturing = is_capturing([self.device.type])
        moved = self._is_moved(targets, form)
        known = self._coefs is not None and (
            coefs is self._coefs or all(map(operator.is_, coefs, self._coefs))
        )
        if known and not moved and not capturing:
            return self._memory
        bound, tensors, self._coefs = self._coefs, self._kept, None  # until they are uploaded
        if not known:
            tensors = [_on(self.device, coef) for coef in coefs]
            pairs = list(zip(coefs, tensors, strict=True))
            self._numbers = [0.0 if t is not None else float(c) for c, t in pairs]
            self._pointers = [0 if t is None else t.data_ptr() for t in tensors]
            self._coef_rows = None
            bound = coefs if all(t is None or t is c for c, t in pairs) else None
        table = self._upload(capturing)
        if not capturing:
            self._coefs = bound
            self._kept = tensors  # so that temporaries stay where the table says
        return table

    def _is_moved(self, targets: Targets, form: object) -> bool:
        """Plan the launches for these targets, unless the last ones lay and were as they are."""
        try:
            places = list(map(Tensor.data_ptr, targets))  # type: ignore[arg-type]
        except TypeError:  # one is None
            places = [0 if target is None else target.data_ptr() for target in targets]
        forms = self._forms
        if form is None or form is not self._form:
            forms = [
                None if target is None else (target.dtype, target.stride()) for target in targets
            ]
        if places == self._places and forms == self._forms:
            self._form = form
            return False
        # What a table of launch B depends on, besides its dtypes: strides, and alignment.
        aligned = [place % 16 for place in places]
        if forms != self._forms or aligned != self._aligned:
            self._check_strides(forms)
            self._tables, self._launches, self._forms, self._aligned = {}, {}, forms, aligned
        self._form, self._places = None, []  # until all is planned
        self._plan_updates(places)
        self._form, self._places = form, places
        return True

    def _upload(self, capturing: bool) -> Tensor:
        """Bring addresses and coefficients to the device, unless they are there.

        Returns:
            int64: a row of target addresses for each launch B, one with the addresses of the
            coefficients, and one with those coefficients that are numbers, in float32.
        """
        send = [self._addresses, self._numbers, self._pointers]
        shape = (len(self._addresses) + 2, len(self._slots))
        if capturing:
            host, table = self._buffers_of_graph(send, shape)
        else:
            if self._spare is None or self._spare.shape != shape:
                self._spare = self._host(shape)
            if send == self._sent:
                return self._memory
            host = self._host(shape)  # a new one: the last may not have been copied yet
            if self._memory.shape != shape:
                self._memory = torch.empty(shape, dtype=torch.int64, device=self.device)
                self._launches = {}  # they have rows of the old one
            table, self._sent = self._memory, send
        host[:-2] = torch.tensor(self._addresses, dtype=torch.int64, device="cpu")
        host[-2:] = self._rows_of_coefs(table[-1].data_ptr())
        table.copy_(host, non_blocking=True)
        return table

    def _rows_of_coefs(self, first: int) -> Tensor:
        """The last two rows of the table, of which the last one lies at ``first``."""
        if self._coef_rows is None or self._coef_rows[0] != first:
            places = [p if p else first + 4 * k for k, p in enumerate(self._pointers)]
            rows = torch.tensor([places, [0] * len(places)], dtype=torch.int64, device="cpu")
            rows[1].view(torch.float32)[: len(places)] = torch.tensor(
                self._numbers, dtype=torch.float32, device="cpu"
            )
            self._coef_rows = first, rows
        return self._coef_rows[1]

    def _buffers_of_graph(self, send: list[Any], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What a graph uploads from and to: its own, and never written again with other values.

        Memory cannot be pinned during a capture, so there is always some in reserve.
        """
        for known, tables, host, table in self._captured:
            if known == send and tables is self._tables:
                return host, table
        reserve, self._spare = self._spare, None
        if reserve is None or reserve.shape != shape:
            raise RuntimeError(_COLD)
        table = torch.empty(shape, dtype=torch.int64, device=self.device)
        self._captured.append((send, self._tables, reserve, table))
        return reserve, table

    def _host(self, shape: tuple[int, int]) -> Tensor:
        return torch.empty(
            shape, dtype=torch.int64, device="cpu", pin_memory=self.device.type == "cuda"
        )

    def _check_strides(self, forms: Sequence[Form | None]) -> None:
        for slot, form in zip(self._slots, forms, strict=True):
            if form is not None and max(form[1][slot.batch :]) >= MAX_STRIDE:
                raise ValueError(
                    f"expected targets with strides below {MAX_STRIDE}, got {form[1]} for factor "
                    f"{slot.number % 2} of pair {slot.number // 2}: make it contiguous, or plan "
                    "with backend='bucketed'"
                )

    def _plan_updates(self, places: Sequence[int]) -> None:
        """Which launches B targets in these places need, and a row of addresses for each."""
        dtypes = [torch.float32 if form is None else form[0] for form in self._forms]
        self._addresses, self._updates = [], []
        for row, (dtype, addresses) in enumerate(sheets(places, dtypes, self._overlapping)):
            self._addresses.append(addresses)
            for part in self._parts:
                if any(addresses[slot.number] for slot in part.slots):
                    in_place = any(addresses[slot.number] == slot.address for slot in part.slots)
                    table, layouts = self._update_table(part, dtype, in_place)
                    self._updates.append(_Update(part, dtype, table, layouts, row, in_place))

    def _update_table(self, part: _Part, dtype: torch.dtype, in_place: bool) -> tuple[Tensor, int]:
        key = part.dtype, dtype, in_place
        if key not in self._tables:
            if is_capturing([self.device.type]):
                raise RuntimeError(_COLD)  # nothing new can be sent there
            held = self._kernels.held_columns(part.dtype, self._rank, self.tile)
            programs = self._programs
            if held and not in_place:  # and several of them for the columns
                programs = programs * held.waves * held.columns // (self.tile.waves * self._rank)
            forms = [self._forms[slot.number] for slot in part.slots]
            rows, layouts = update_table(
                part.slots,
                [
                    (slot.view.stride(), 0)
                    if form is None
                    else (form[1], self._aligned[slot.number])
                    for slot, form in zip(part.slots, forms, strict=True)
                ],
                dtype.itemsize,
                self.tile.update_rows,
                max(programs, 1),
            )
            self._tables[key] = self._int64(rows), layouts
        return self._tables[key]

    def on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device: make it that of the plan."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _keep_for_stream(self) -> None:
        """Tell the allocator of all streams, if there are several: it reuses memory by stream."""
        if self.device.type != "cuda" or is_capturing([self.device.type]):
            return
        stream = torch.cuda.current_stream(self.device)
        self._streams.add(stream)
        if len(self._streams) > 1:
            tables = [*(part.table for part in self._parts), *(u.table for u in self._updates)]
            for tensor in (self._grams, self._partials, self._counters, self._memory, *tables):
                tensor.record_stream(stream)


def _on(device: torch.device, coef: Coefficient) -> Tensor | None:
    """A coefficient that the kernels read where it is; None for a number known to the host."""
    if not isinstance(coef, Tensor) or (coef.device.type == "cpu" != device.type):
        return None
    return coef.to(device, torch.float32)
