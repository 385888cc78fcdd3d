"""The kernels of the grouped backend: every Gram in one launch, every update in a second one.

For pairs W_k = U_k V_kᵀ (heads are pairs of their own), of any number and any shapes:

    launch A    G_s = X_sᵀ X_s                     one Gram for each side s, X = U or V
    launch B    target_s += coef_s · X_s G_s'      s' the other side of the same pair

**Memory traffic.** A reads the factors once, B reads them once more and reads and writes the
targets once: 2(m+n)r + 2(m+n)r numbers a pair, the least that is possible where the factors do
not stay in a cache between the launches. Nothing of a factor's size is ever written elsewhere.
(Ranks above one tile read a panel of rows once for each tile of columns that needs it; these
repetitions are neighbours in the grid, for the cache to serve. So that B does not read the Gram as
often as that, warp groups hold a tile of its columns in shared memory, terms and all, and let many
rows pass. B takes factors from the last to the first: those that A read last are in the cache.)

**Records.** What a program has to do is a row of int64 numbers in a table on the device: address,
strides, sizes, place of the Gram (``triton/tables.py`` has the columns). So one launch serves
all shapes, and a new address, coefficient or learning rate neither recompiles nor synchronizes.
A table's pointers carry no promise of alignment; its ``layout`` column does: 1, columns adjacent
and rows at 16 bytes; 2, the transpose of that; 0, any strides. Each kernel holds one body for
each layout that occurs, with wide loads in the bodies for 1 and 2.

**Launch A is split along the rows** until all multiprocessors have work. Where several programs
share a tile of a Gram, each writes its partial sum, then takes a ticket; the last one adds the
partial sums in the order of the rows. So the result does not depend on which was last: it is
bitwise the same in every run, with or without ``torch.use_deterministic_algorithms``, for the
price of one atomic a program. The waiting-free pattern (barrier, ticket with acquire-release,
read past the first cache) is that of inductor's cooperative reductions. Only tiles on and below
the diagonal are computed, the others are mirrored.

**Precision.** All sums are float32. Float32 factors are multiplied as
``torch.backends.cuda.matmul`` says, IEEE or TF32; for TF32 large Grams are three products of bf16
terms instead, which are more precise. Products of bf16 or fp16 numbers are exact in float32, so A
multiplies them as they are; B must not round the Gram to half precision, so it is split into
terms that sum to it: bf16, or TF32 for fp16, whose range is too small for Grams. Two terms where
the target is half precision as well (to 2⁻¹⁷), else three (to 2⁻²⁴). Half-precision
targets are rounded to nearest: stochastic rounding stays with the optimizer, whose generator
travels in its checkpoints, and which passes float32 increments.

**Aliasing.** All Grams are complete before B starts. In B a program reads all columns of its rows
before it writes any of them, where a target is the factor itself.

In Triton's interpreter (no GPU; slow, for tests) operands are converted to float32 first, because
its product of bf16 operands is wrong. Whether kernels are interpreted is decided when triton
defines them, by ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether the kernels of this module run in the interpreter, on tensors of the CPU."""

# Columns of the tables, see tables.py; a kernel reads globals only as constexpr.
_GRAM_WIDTH = tl.constexpr(14)
_UPDATE_WIDTH = tl.constexpr(12)


@triton.jit
def _pointers(base, rows, columns, row_stride, column_stride, LAYOUT: tl.constexpr):
    """Addresses of a tile, without the multiplication by a stride known to be one."""
    if LAYOUT == 1:
        found = base + (rows[:, None] * row_stride + columns[None, :])
    elif LAYOUT == 2:
        found = base + (rows[:, None] + columns[None, :] * column_stride)
    else:
        found = base + (rows[:, None] * row_stride + columns[None, :] * column_stride)
    return found


@triton.jit
def _multiple(number, LAYOUT: tl.constexpr, WANTED: tl.constexpr, VECTOR: tl.constexpr):
    """A number from a table, with the promise that a layout makes about it."""
    return number.to(tl.int32) // VECTOR * VECTOR if LAYOUT == WANTED else number.to(tl.int32)


@triton.jit
def _terms(x, TERMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """TERMS matrices that sum to a float32 one, or that as it is for TERMS 0.

    They are bf16, two of which sum to 2⁻¹⁷ of it, or TF32 where PRECISION says so: a factor has
    no more digits than they have.
    """
    terms = ()
    if TERMS == 0:
        terms = terms + (x,)
    for _ in tl.static_range(TERMS):
        if PRECISION == "tf32":  # cut off, not rounded: a NaN stays one
            term = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            x = x - term
        else:
            term = x.to(tl.bfloat16)
            x = x - term.to(tl.float32)
            if UPCAST:
                term = term.to(tl.float32)
        terms = terms + (term,)
    return terms


@triton.jit
def _step(row_stride, LAYOUT: tl.constexpr, ROWS: tl.constexpr):
    """From one block of rows to the next, in elements."""
    return row_stride.to(tl.int64) * ROWS if LAYOUT != 2 else tl.full((), ROWS, tl.int64)


@triton.jit
def _panel(x, rows, columns, inside, rank, row_stride, column_stride, LAYOUT: tl.constexpr):
    """Some columns of the rows of a factor that are inside; zero beyond."""
    at = _pointers(x, rows, columns, row_stride, column_stride, LAYOUT)
    return tl.load(at, mask=inside & (columns < rank)[None, :], other=0.0)


@triton.jit
def _panels(
    x, rows, left, right, inside, rank, row_stride, column_stride,
    LAYOUT: tl.constexpr, SINGLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of the columns on the left and on the right of a Gram's tile."""
    a = _panel(x, rows, left, inside, rank, row_stride, column_stride, LAYOUT)
    b = a
    if not SINGLE:
        b = _panel(x, rows, right, inside, rank, row_stride, column_stride, LAYOUT)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return a, b


@triton.jit
def _gram_tile(
    record,
    TYPE: tl.constexpr, VECTOR: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """X[:, i:i+BLOCK]ᵀ X[:, j:j+BLOCK] over the rows of one record."""
    x = tl.load(record).to(tl.pointer_type(TYPE))
    if LAYOUT != 0:
        x = tl.multiple_of(x, 16)
    row_count = _multiple(tl.load(record + 1), LAYOUT, 2, VECTOR)
    row_stride = _multiple(tl.load(record + 2), LAYOUT, 1, VECTOR)
    column_stride = _multiple(tl.load(record + 3), LAYOUT, 2, VECTOR)
    rank = _multiple(tl.load(record + 4), LAYOUT, 1, VECTOR)
    left = tl.load(record + 5).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    right = tl.load(record + 6).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    rows = tl.arange(0, STEP)
    step = _step(row_stride, LAYOUT, STEP)
    if PRECISION == "bf16x3":
        # As Triton's precision of that name, which waits for each product. The next rows are on
        # their way to registers meanwhile: from there, halved, they get to shared memory, as
        # warp-group products want them to be for Xᵀ, once only.
        inside = (rows < row_count)[:, None]
        a, b = _panels(
            x, rows, left, right, inside, rank, row_stride, column_stride, LAYOUT, SINGLE, UPCAST
        )
        a_high, a_low = _terms(a, 2, PRECISION, UPCAST)
        b_high, b_low = _terms(b, 2, PRECISION, UPCAST)
        for start in range(STEP, row_count + STEP, STEP):
            x += step
            inside = (start + rows < row_count)[:, None]
            a, b = _panels(
                x, rows, left, right, inside, rank, row_stride, column_stride,
                LAYOUT, SINGLE, UPCAST,
            )  # fmt: skip
            gram = tl.dot(tl.trans(a_high), b_high, gram)
            gram = tl.dot(tl.trans(a_high), b_low, gram)
            gram = tl.dot(tl.trans(a_low), b_high, gram)
            a_high, a_low = _terms(a, 2, PRECISION, UPCAST)
            b_high, b_low = _terms(b, 2, PRECISION, UPCAST)
    else:
        for start in range(0, row_count, STEP):
            inside = (start + rows < row_count)[:, None]
            a, b = _panels(
                x, rows, left, right, inside, rank, row_stride, column_stride,
                LAYOUT, SINGLE, UPCAST,
            )  # fmt: skip
            gram = tl.dot(tl.trans(a), b, gram, input_precision=PRECISION)
            x += step
    return gram


@triton.jit
def _store_gram(record, grams, gram, BLOCK: tl.constexpr):
    """Write a tile of a Gram, and its mirror image."""
    across = tl.arange(0, BLOCK)
    i, j = tl.load(record + 5).to(tl.int32), tl.load(record + 6).to(tl.int32)
    leading = tl.load(record + 8).to(tl.int32) // 16 * 16
    base = tl.multiple_of(grams + tl.load(record + 7), 16)
    left, right = (i * BLOCK + across)[:, None], (j * BLOCK + across)[None, :]
    tl.store(base + left * leading + right, gram)
    if i != j:
        tl.store(base + right * leading + left, gram)


@triton.jit
def gram_kernel(
    records, grams, partials, counters,
    TYPE: tl.constexpr, VECTOR: tl.constexpr, LAYOUTS: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of one Gram over one range of rows; the last of several sums them up."""
    record = records + tl.program_id(0) * _GRAM_WIDTH
    layout = tl.load(record + 13)
    gram = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for LAYOUT in tl.static_range(3):
        if (LAYOUTS >> LAYOUT) & 1:
            if layout == LAYOUT:
                gram = _gram_tile(
                    record, TYPE, VECTOR, LAYOUT, BLOCK, STEP, SINGLE, PRECISION, UPCAST
                )
    chunks = tl.load(record + 10).to(tl.int32)
    if chunks == 1:
        _store_gram(record, grams, gram, BLOCK)
    else:
        across = tl.arange(0, BLOCK)
        local = across[:, None] * BLOCK + across[None, :]
        first = tl.multiple_of(partials + tl.load(record + 11), 16)
        counter = counters + tl.load(record + 12)
        tl.store(first + tl.load(record + 9) * (BLOCK * BLOCK) + local, gram)
        tl.debug_barrier()  # all threads' stores come before the ticket
        ticket = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if ticket == chunks - 1:
            tl.debug_barrier()
            total = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
            for _ in tl.range(chunks, loop_unroll_factor=4):  # several on their way at a time
                total += tl.load(first + local, cache_modifier=".cg")
                first += BLOCK * BLOCK
            _store_gram(record, grams, total, BLOCK)
            tl.store(counter, 0)  # for the next launch


@triton.jit
def _block(
    gram, k, columns, leading, HELD: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr
):
    """These columns of BLOCK rows of a Gram, from row k on."""
    # A Gram is symmetric: read so that its inner axis is adjacent, where tensor cores want that.
    down, across = (1, leading) if TURNED else (leading, 1)
    inner = k + tl.arange(0, BLOCK)
    at = gram + inner[:, None] * down + columns[None, :] * across
    if HELD == 1:
        found = tl.load(at)
    else:
        known = (columns < leading)[None, :]
        if HELD:  # by the largest rank, which may not be this one
            known = known & (inner < leading)[:, None]
        found = tl.load(at, mask=known, other=0.0)
    return found


@triton.jit
def _held(
    gram, columns, leading, HELD: tl.constexpr, BLOCK: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Terms of HELD blocks, of all rows of a Gram, which stay while rows of the factor pass."""
    terms = ()
    for k in tl.static_range(HELD):
        block = _block(gram, k * BLOCK, columns, leading, HELD, BLOCK, TURNED)
        terms = terms + _terms(block, TERMS, PRECISION, UPCAST)
    return terms


@triton.jit
def _times(x, terms, total, FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr):
    """``total + x · (the sum of these terms)``."""
    for k in tl.static_range(FIRST, LAST):
        x = x.to(terms[k].dtype)
        total = tl.dot(x, terms[k], total, input_precision=PRECISION)
    return total


@triton.jit
def _update_rows(
    record, grams, address, coef, first,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, VECTOR: tl.constexpr, LAYOUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr,
    IN_PLACE: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add to the target: += coef · X G over a record's rows; the held columns, or all in turn."""
    x = tl.load(record).to(tl.pointer_type(SOURCE))
    target = address.to(tl.pointer_type(TARGET))
    if LAYOUT != 0:
        x = tl.multiple_of(x, 16)
        target = tl.multiple_of(target, 16)
    row_count = _multiple(tl.load(record + 1), LAYOUT, 2, VECTOR)
    row_stride = _multiple(tl.load(record + 2), LAYOUT, 1, VECTOR)
    column_stride = _multiple(tl.load(record + 3), LAYOUT, 2, VECTOR)
    rank = _multiple(tl.load(record + 4), LAYOUT, 1, VECTOR)
    gram = tl.multiple_of(grams + tl.load(record + 5), 16)
    leading = tl.load(record + 6).to(tl.int32) // 16 * 16
    target_row_stride = _multiple(tl.load(record + 9), LAYOUT, 1, VECTOR)
    target_column_stride = _multiple(tl.load(record + 10), LAYOUT, 2, VECTOR)
    rows, inner, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    step = _step(row_stride, LAYOUT, ROWS)
    target_step = _step(target_row_stride, LAYOUT, ROWS)
    EACH: tl.constexpr = max(TERMS, 1)
    now = first + columns
    terms = _held(gram, now, leading, HELD, BLOCK, TERMS, PRECISION, TURNED, UPCAST)
    for start in range(0, row_count, ROWS):
        inside = (start + rows < row_count)[:, None]
        for column in range(0, 1 if HELD else rank, COLUMNS):
            now = first + column + columns
            into = _pointers(target, rows, now, target_row_stride, target_column_stride, LAYOUT)
            mask = inside & (now < rank)[None, :]
            if HELD > 1:  # on its way during the products
                before = tl.load(into, mask=mask, other=0.0)
            total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
            panels = ()
            for k in tl.static_range(HELD):
                held = k * BLOCK + inner
                a = _panel(x, rows, held, inside, rank, row_stride, column_stride, LAYOUT)
                panels = panels + (a,)
            for k in tl.static_range(HELD):
                total = _times(panels[k], terms, total, k * EACH, (k + 1) * EACH, PRECISION)
            if HELD == 0:
                for k in range(0, rank, BLOCK):
                    a = _panel(x, rows, k + inner, inside, rank, row_stride, column_stride, LAYOUT)
                    g = _block(gram, k, now, leading, HELD, BLOCK, TURNED)
                    parts = _terms(g, TERMS, PRECISION, UPCAST)
                    total = _times(a, parts, total, 0, EACH, PRECISION)
            if HELD <= 1:
                before = tl.load(into, mask=mask, other=0.0)
            total = before.to(tl.float32) + coef * total
            if IN_PLACE:
                tl.debug_barrier()  # no warp writes what another still has to read
            tl.store(into, total.to(TARGET), mask=mask)
        x += step
        target += target_step


@triton.jit
def update_kernel(
    records, grams, targets, coefs,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, VECTOR: tl.constexpr, LAYOUTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr,
    IN_PLACE: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr, TURNED: tl.constexpr,
    UPCAST: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """A range of rows of one factor, or the columns of one of ACROSS programs of them.

    A target without an address is none.
    """
    record = records + tl.program_id(0) // ACROSS * _UPDATE_WIDTH
    first = tl.program_id(0) % ACROSS * COLUMNS
    slot = tl.load(record + 7)
    address = tl.load(targets + slot)
    if (address != 0) & (first < tl.load(record + 4)):
        coef = tl.load(tl.load(coefs + slot).to(tl.pointer_type(tl.float32)))
        address += tl.load(record + 8) * (TARGET.primitive_bitwidth // 8)
        layout = tl.load(record + 11)
        for LAYOUT in tl.static_range(3):
            if (LAYOUTS >> LAYOUT) & 1:
                if layout == LAYOUT:
                    _update_rows(
                        record, grams, address, coef, first, SOURCE, TARGET, VECTOR, LAYOUT, ROWS,
                        BLOCK, COLUMNS, HELD, IN_PLACE, TERMS, PRECISION, TURNED, UPCAST,
                    )  # fmt: skip
