"""What the attention kernels share: heads cut in two tiles, visible keys, capped scores.

A tile's width is a power of two, and no head of 192, 96 or 80 is one. Its columns are two tiles
then, 128 and 64 for 192, which multiply nothing that is not there; `REST` is 0 for one tile.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from the annotations.
import triton
import triton.language as tl

from aiter_inductor.kernels.triton.launch import single

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)


@triton.jit
def load_columns(
    at,  # row 0 of the tile, column 0 of the head
    row,  # [ROWS], counted from `at`
    row_stride,
    live,  # [ROWS], bool
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ALL_ROWS: tl.constexpr = False,
):
    """Columns `START` to `START + WIDTH` of rows; zeros beyond column D and where not `live`."""
    column = START + tl.arange(0, WIDTH)
    pointers = at + row[:, None] * row_stride + column[None, :]
    if START + WIDTH <= D:
        if ALL_ROWS:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=live[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=live[:, None] & (column < D)[None, :], other=0.0)
    return tile


@triton.jit
def store_columns(
    at, row, row_stride, live, tile, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr
):
    """The counterpart of `load_columns`; rounds to the target's dtype."""
    column = START + tl.arange(0, WIDTH)
    pointers = at + row[:, None] * row_stride + column[None, :]
    inside = live[:, None] & (column < D)[None, :]
    tl.store(pointers, tile.to(at.dtype.element_ty), mask=inside)


@triton.jit
def load_head(at, row, row_stride, live, D: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    """Both tiles of a head's rows; the first one twice where one holds all columns."""
    tile = load_columns(at, row, row_stride, live, D, 0, BLOCK)
    rest = tile
    if REST > 0:
        rest = load_columns(at, row, row_stride, live, D, BLOCK, REST)
    return tile, rest


@triton.jit
def store_head(
    at,
    row,
    row_stride,
    live,
    tile,
    rest,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """The counterpart of `load_head`."""
    store_columns(at, row, row_stride, live, tile, D, 0, BLOCK)
    if REST > 0:
        store_columns(at, row, row_stride, live, rest, D, BLOCK, REST)


@triton.jit
def tanh(x):
    """By one exponential; right at both ends, where it overflows or vanishes."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def in_log2_units(additive):
    """An additive mask times log2(e).

    The lowest number of a dtype stays a number: a row in which every key has it is a mean over all
    of them, and no row of zeros, as eager code has it.
    """
    scaled = tl.maximum(additive.to(tl.float32) * LOG2E, LOWEST)
    return tl.where(additive == -float("inf"), -float("inf"), scaled)


@triton.jit
def capped(scores, scale, softcap, SCALED: tl.constexpr):
    """Scores scaled, capped and in units of log2(e); raw ones where nothing asks for more."""
    if softcap is not None:
        limit = single(softcap)
        scores = (limit * LOG2E) * tanh(scores * (scale / limit))
    elif SCALED:
        scores = scores * (scale * LOG2E)
    return scores


@triton.jit
def masked(scores, pointers, exists):
    """Scores, in units of log2(e), with a tensor's mask.

    Args:
        scores: a tile of pairs of query and key.
        pointers: the tile of the mask: uint8, not 0 where a key is seen, or float, added.
        exists: which pairs there are.
    """
    if pointers.dtype.scalar.element_ty == tl.uint8:
        seen = tl.load(pointers, mask=exists, other=0) != 0
        scores = tl.where(seen, scores, -float("inf"))
    else:
        scores += in_log2_units(tl.load(pointers, mask=exists, other=0.0))
    return scores


@triton.jit
def visible(position, key, num_keys, window, CAUSAL: tl.constexpr):
    """Which keys exist and lie neither ahead of a query nor behind its window.

    Args:
        position: the key that a query stands at, [M, 1] or [1, M].
        key: [1, N] or [N, 1].
    """
    seen = key < num_keys
    if CAUSAL:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (key > position - window)
    return seen


@triton.jit
def keys_of(first, last, num_keys, window, first_keys, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that queries at positions `first` to `last` see.

    Args:
        first_keys: pointer to what `attention` calls so, at the first of these queries, or None.

    Returns:
        begin, end: none of them sees a key outside.
        all_begin, all_end: multiples of BLOCK_N between which all of them see every key.
        `begin` is a multiple of BLOCK_N too.
    """
    begin, end, all_begin, all_end = 0, num_keys, 0, num_keys
    if CAUSAL:
        end = tl.minimum(tl.maximum(last + 1, 0), num_keys)
        all_end = tl.minimum(tl.maximum(first + 1, 0), num_keys)
    if window is not None:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        all_begin = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N
    if first_keys is not None:
        begin = tl.maximum(begin, tl.load(first_keys) // BLOCK_N * BLOCK_N)
        most = tl.load(first_keys + (last - first))
        all_begin = tl.maximum(all_begin, tl.cdiv(most, BLOCK_N) * BLOCK_N)
    all_end = tl.maximum(all_end // BLOCK_N * BLOCK_N, begin)
    all_begin = tl.minimum(all_begin, all_end)
    return begin, end, all_begin, all_end


@triton.jit
def rows_seeing(first_keys, key, num_queries):
    """How many queries, from the first on, have none later than `key` for their first key."""
    count, few = 0, tl.arange(0, 512)
    for start in range(0, num_queries, 512):
        live = start + few < num_queries
        found = tl.load(first_keys + start + few, mask=live, other=0)
        count += tl.sum((live & (found <= key)).to(tl.int32))
    return count


@triton.jit
def queries_of(
    first,
    last,
    num_queries,
    shift,
    window,
    first_keys,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rows of queries that see keys of `first` to `last`; the counterpart of `keys_of`.

    Args:
        shift: the position of row 0.
        first_keys: pointer to what `attention` calls so, at row 0, or None.
    """
    begin, end, all_begin, all_end = 0, num_queries, 0, num_queries
    if CAUSAL:
        begin = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
        all_begin = tl.cdiv(tl.maximum(last - shift, 0), BLOCK_M) * BLOCK_M
    if window is not None:
        end = tl.minimum(tl.maximum(last + window - shift, 0), num_queries)
        all_end = tl.minimum(tl.maximum(first + window - shift, 0) // BLOCK_M * BLOCK_M, end)
    if first_keys is not None:
        end = tl.minimum(end, rows_seeing(first_keys, last, num_queries))
        rows = rows_seeing(first_keys, first, num_queries) // BLOCK_M * BLOCK_M
        all_end = tl.minimum(tl.minimum(all_end, rows), end)
    all_end = tl.maximum(all_end, begin)
    all_begin = tl.minimum(tl.maximum(all_begin, begin), all_end)
    return begin, end, all_begin, all_end


@triton.jit
def sequence(starts, at):
    """The first row of a packed sequence, int64, and how many it has."""
    first = tl.load(starts + at)
    return first.to(tl.int64), tl.load(starts + at + 1) - first


@triton.jit
def blocks_of(rows, starts, num_sequences, BLOCK: tl.constexpr):
    """Blocks of `rows` rows, or those of `in_sequence` if they are of packed sequences."""
    num_blocks = tl.cdiv(rows, BLOCK)
    if starts is not None:
        num_blocks = rows // BLOCK + num_sequences
    return num_blocks


@triton.jit
def in_sequence(
    block, S, T, q_starts, k_starts, num_sequences, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr
):
    """Where a block of queries or keys lies in its sequence, and the sequence in its batch.

    Of packed sequences, number i has the blocks from `starts[i] // BLOCK + i` on, at least as many
    as it needs: no count of blocks is made before.

    Returns:
        row: the block's first row in the sequence; beyond its end where the block is empty.
        q_first, S, k_first, T: as `sequence` gives them of queries and of keys.
    """
    row, q_first, k_first = block * BLOCK, 0, 0
    if q_starts is not None:
        starts = k_starts if OF_KEYS else q_starts
        found, few = 0, tl.arange(0, 64)
        for first in range(0, num_sequences, 64):
            number = first + few
            live = number < num_sequences
            begins = tl.load(starts + number, mask=live, other=0) // BLOCK + number
            found += tl.sum((live & (begins <= block)).to(tl.int32))
        number = found - 1
        row = (block - tl.load(starts + number) // BLOCK - number) * BLOCK
        q_first, S = sequence(q_starts, number)
        k_first, T = sequence(k_starts, number)
    return row, q_first, S, k_first, T
