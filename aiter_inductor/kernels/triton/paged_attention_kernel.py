"""Split-KV attention over pages: one pass over part of a sequence, and the reduction of parts.

A program serves the query heads that share one head of keys and values, and so reads these once.
Lengths lie on the device; a program whose part begins beyond its sequence returns at once.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from the annotations.
import triton
import triton.language as tl

from aiter_inductor.kernels.triton.launch import single

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _parts(length, splits, WINDOW: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first token that is seen, where the first part begins, and the tokens of a part.

    These are PART, or more where the sequence is longer than `splits` of these.
    """
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else length * 0
    origin = first // BLOCK_N * BLOCK_N
    least = tl.cdiv(tl.cdiv(length - origin, splits), BLOCK_N) * BLOCK_N
    return first, origin, tl.maximum(least, PART)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))


@triton.jit
def _finite(peak):
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _sunk(sink, peak):
    """The weight of a sink."""
    return tl.exp2(sink.to(tl.float32) * LOG2_E - _finite(peak))


@triton.jit
def _widened(x, dtype: tl.constexpr):
    """fp8 or int8 in a wider type, exactly; Triton's interpreter makes bits of integers in bf16."""
    return x.to(tl.float32).to(dtype) if x.dtype == tl.int8 else x.to(dtype)


@triton.jit
def _element(d, chunk, PACK: tl.constexpr):
    """Where the elements of a key lie; `chunk` is the stride of packs of them."""
    return d // PACK * chunk + d % PACK if PACK > 0 else d


@triton.jit
def _packed_values(
    at_page,  # of each token, the head's values of its page
    token,
    first,
    end,
    v,
    element,  # stride of elements
    chunk,  # stride of packs
    V: tl.constexpr,
    PAGE: tl.constexpr,
    PACK: tl.constexpr,
):
    """Values [BLOCK_V, BLOCK_N]; PACK tokens lie side by side, 16 bytes that are read at once.

    Of a pack that holds a token from `first` to `end` all tokens are read.
    """
    pack = token // PACK
    near = (pack * PACK + PACK > first) & (pack * PACK < end)
    place = pack % (PAGE // PACK) * chunk + token % PACK
    at = (at_page + place)[None, :] + v[:, None] * element
    at = tl.max_contiguous(tl.multiple_of(at, (1, 16)), (1, PACK))
    mask = tl.max_constancy((v < V)[:, None] & near[None, :], (1, PACK))
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def paged_split_kernel(
    q,  # [num_seqs, num_heads, D]
    keys,  # pages
    values,  # pages
    tables,  # [num_seqs, max_pages], int32
    lengths,  # [num_seqs], int32
    key_scale,  # [1] or, PER_TOKEN, [num_pages, kv_heads, PAGE], fp32, or None
    value_scale,  # the same
    sinks,  # [num_heads] or None
    out,  # [num_seqs, num_heads, V], where there is one split
    partial,  # [splits, num_seqs * num_heads, V], fp32
    lse,  # [splits, num_seqs * num_heads], fp32, base 2
    scale,
    softcap,
    num_seqs,
    q_seq,
    q_head,
    tables_seq,
    key_page,
    key_token,
    key_head,
    key_chunk,
    value_page,
    value_token,
    value_head,
    value_chunk,
    scales_page,
    scales_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    PAGE: tl.constexpr,
    PACK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_M query heads of one kv head and sequence over one part of its tokens."""
    tl.static_assert(PART % BLOCK_N == 0, "parts begin at multiples of BLOCK_N")
    BLOCKS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    split, seq = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + seq)
    first, origin, part = _parts(length, tl.num_programs(1), WINDOW, PART, BLOCK_N)
    start = tl.multiple_of(origin + split * part, BLOCK_N)
    if (start < length) | (split == 0):
        in_group = block * BLOCK_M + tl.arange(0, BLOCK_M)
        head = kv_head * GROUP + in_group
        heads = in_group < GROUP
        d, v, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
        at = q + seq * q_seq + head[:, None].to(tl.int64) * q_head + d[None, :]
        query = tl.load(at, mask=heads[:, None] & (d < D)[None, :], other=0.0)
        factor = single(scale)
        if key_scale is not None and not PER_TOKEN:
            factor *= tl.load(key_scale)
        peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        end = tl.minimum(start + part, length)
        for begin in range(start, end, BLOCK_N):
            token = begin + n
            inside = (token >= first) & (token < end)
            page = tl.load(tables + seq * tables_seq + token // PAGE, mask=inside, other=0)
            page, place = page.to(tl.int64), token % PAGE
            of_k = keys + page * key_page + place * key_token + kv_head * key_head
            of_k = of_k[:, None] + _element(d, key_chunk, PACK)[None, :]
            k = tl.load(of_k, mask=inside[:, None] & (d < D)[None, :], other=0.0)
            at_page = values + page * value_page + kv_head * value_head
            if PACK > 0:
                x = _packed_values(
                    at_page, token, first, end, v, value_token, value_chunk, V, PAGE, PACK
                )
                x = tl.trans(tl.where(inside[None, :], _widened(x, query.dtype), 0.0))
            else:
                of_x = (at_page + place * value_token)[:, None] + v[None, :]
                x = tl.load(of_x, mask=inside[:, None] & (v < V)[None, :], other=0.0)
            k, x = _widened(k, query.dtype), _widened(x, query.dtype)
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * factor
            scaled = page * scales_page + kv_head * scales_head + place
            if PER_TOKEN:
                scores *= tl.load(key_scale + scaled, mask=inside, other=0.0)[None, :]
            if SOFTCAP:
                scores = single(softcap) * _tanh(scores / single(softcap))
            scores = tl.where(inside[None, :], scores * LOG2_E, -float("inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            p = tl.exp2(scores - _finite(higher)[:, None])
            decay = tl.exp2(peak - _finite(higher))
            total = total * decay + tl.sum(p, 1)
            if PER_TOKEN:
                p *= tl.load(value_scale + scaled, mask=inside, other=0.0)[None, :]
            acc = tl.dot(p.to(x.dtype), x, acc * decay[:, None], input_precision="ieee")
            peak = higher
        row = seq * NUM_HEADS + head
        if value_scale is not None and not PER_TOKEN:
            acc *= tl.load(value_scale)
        stored = heads[:, None] & (v < V)[None, :]
        if ONE_SPLIT:
            if sinks is not None:
                total += _sunk(tl.load(sinks + head, mask=heads, other=0.0), peak)
            value = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            at = out + row[:, None] * V + v[None, :]
            tl.store(at, value.to(out.dtype.element_ty), mask=stored)
        else:
            divisor = tl.where(total == 0.0, 1.0, total)
            found = tl.where(total == 0.0, -float("inf"), peak + tl.log2(divisor))
            at = split.to(tl.int64) * num_seqs * NUM_HEADS + row
            tl.store(partial + at[:, None] * V + v[None, :], acc / divisor[:, None], mask=stored)
            tl.store(lse + at, found, mask=heads)


@triton.jit
def paged_reduce_kernel(
    partial,  # [splits, num_seqs * NUM_HEADS, V], fp32
    lse,  # [splits, num_seqs * NUM_HEADS], fp32, base 2
    lengths,  # [num_seqs], int32
    sinks,  # [NUM_HEADS] or None
    out,  # [num_seqs * NUM_HEADS, V]
    num_rows,
    splits,
    NUM_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    V: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One head of one sequence over the parts that exist; zeros where no token is seen."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row // NUM_HEADS)
    _, origin, part = _parts(length, splits, WINDOW, PART, BLOCK_N)
    parts = tl.cdiv(tl.maximum(length - origin, 0), part)
    v, every = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_SPLITS)
    known = tl.load(lse + every * num_rows + row, mask=every < parts, other=-float("inf"))
    peak = tl.max(known)
    base = _finite(peak)
    total = tl.sum(tl.exp2(known - base))
    if sinks is not None:
        total += _sunk(tl.load(sinks + row % NUM_HEADS), peak)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for split in range(parts):
        at = split * tl.cast(num_rows, tl.int64) + row
        weight = tl.exp2(tl.load(lse + at) - base)
        acc += weight * tl.load(partial + at * V + v, mask=v < V, other=0.0)
    value = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * V + v, value.to(out.dtype.element_ty), mask=v < V)
