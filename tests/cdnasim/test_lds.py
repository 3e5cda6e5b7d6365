"""LDS reads, writes, atomics, permutations and the transposing reads of gfx950."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cdnasim.machine import Case, execute, f32, run_case, words

LANE = np.arange(64)
READS = {
    "b32": (4, False, None),
    "b64": (8, False, None),
    "b96": (12, False, None),
    "b128": (16, False, None),
    "u8": (1, False, None),
    "i8": (1, True, None),
    "u16": (2, False, None),
    "i16": (2, True, None),
    "u8_d16": (1, False, 0),
    "u8_d16_hi": (1, False, 1),
    "i8_d16": (1, True, 0),
    "i8_d16_hi": (1, True, 1),
    "u16_d16": (2, False, 0),
    "u16_d16_hi": (2, False, 1),
}
WRITES = {
    "b32": (4, 0),
    "b64": (8, 0),
    "b96": (12, 0),
    "b128": (16, 0),
    "b8": (1, 0),
    "b8_d16_hi": (1, 16),
    "b16": (2, 0),
    "b16_d16_hi": (2, 16),
}
ATOMICS = {
    "add_u32": lambda m, x: m + x,
    "sub_u32": lambda m, x: m - x,
    "min_u32": min,
    "max_u32": max,
    "min_i32": lambda m, x: min((m, x), key=lambda v: v - (v >> 31 << 32)),
    "max_i32": lambda m, x: max((m, x), key=lambda v: v - (v >> 31 << 32)),
    "and_b32": lambda m, x: m & x,
    "or_b32": lambda m, x: m | x,
    "xor_b32": lambda m, x: m ^ x,
}
FLOAT_ATOMICS = {"add_f32": np.add, "min_f32": np.minimum, "max_f32": np.maximum}
PAIRS = ("2_b32", "2_b64", "2st64_b32", "2st64_b64")
TRANSPOSED = {"b16": 16, "b8": 8, "b4": 4}


def returning(name):
    operation, kind = name.split("_")
    return f"ds_{operation}_rtn_{kind}"


COVERED = {
    *(f"ds_read_{s}" for s in READS),
    *(f"ds_write_{s}" for s in WRITES),
    *(f"ds_{verb}{pair}" for verb in ("read", "write") for pair in PAIRS),
    *(f"ds_{a}" for a in [*ATOMICS, *FLOAT_ATOMICS]),
    *(returning(a) for a in [*ATOMICS, *FLOAT_ATOMICS, "wrxchg_b32"]),
    *(f"ds_read_b64_tr_{s}" for s in TRANSPOSED),
    "ds_bpermute_b32",
    "ds_permute_b32",
    "ds_swizzle_b32",
}
OFFSETS = "v_lshlrev_b32 v4, 2, v0\n"  # 16 * lane
FILL = OFFSETS + "ds_write_b128 v4, v[10:13]\ns_waitcnt lgkmcnt(0)\n"


def register(first, count):
    return f"v[{first}:{first + count - 1}]" if count > 1 else f"v{first}"


@pytest.mark.parametrize("suffix", READS)
def test_read(suffix):
    size, signed, half = READS[suffix]
    count = max(1, size // 4)
    inputs = words("u32")
    old = "\n".join(f"v_mov_b32 v{20 + i}, v15" for i in range(count))
    got = execute(
        f"{FILL}{old}\nds_read_{suffix} {register(20, count)}, v4\ns_waitcnt lgkmcnt(0)",
        inputs,
        count,
    )
    for lane in range(64):
        value = int.from_bytes(inputs[:4, lane].tobytes()[:size], "little", signed=signed)
        old_word = int(inputs[5][lane])
        if half is not None:
            value = (
                old_word & 0xFFFF0000 | value & 0xFFFF
                if half == 0
                else old_word & 0xFFFF | (value & 0xFFFF) << 16
            )
        assert int.from_bytes(got[:, lane].tobytes(), "little") == value & ((1 << 32 * count) - 1)


@pytest.mark.parametrize("suffix", WRITES)
def test_write(suffix):
    size, shift = WRITES[suffix]
    count = max(1, size // 4)
    inputs = words("u32")
    body = (
        f"{FILL}ds_write_{suffix} v4, {register(14, count)}\n"
        "ds_read_b128 v[20:23], v4\ns_waitcnt lgkmcnt(0)"
    )
    got = execute(body, inputs, 4)
    for lane in range(64):
        data = (
            inputs[4 : 4 + count, lane] >> shift if size < 4 else inputs[4 : 4 + count, lane]
        ).tobytes()[:size]
        assert got[:, lane].tobytes() == data + inputs[:4, lane].tobytes()[size:]


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs(pair):
    """Write two elements at two offsets, read them back crosswise."""
    count = 2 if pair.endswith("b64") else 1
    inputs = words("u32")
    # Lanes are four elements apart, so that element offsets 1 and 3 do not meet; with offsets in
    # units of 64 elements, lanes are neighbours.
    shift, second = (0, 2) if "st64" in pair else (2, 3)
    low, high = register(10, count), register(12, count)
    body = (
        f"v_lshlrev_b32 v4, {shift + count - 1}, v0\n"
        f"ds_write{pair} v4, {low}, {high} offset0:1 offset1:{second}\n"
        "s_waitcnt lgkmcnt(0)\n"
        f"ds_read{pair} {register(20, 2 * count)}, v4 offset0:{second} offset1:1\n"
        "s_waitcnt lgkmcnt(0)"
    )
    got = execute(body, inputs, 2 * count)
    np.testing.assert_array_equal(got[:count], inputs[2 : 2 + count])
    np.testing.assert_array_equal(got[count:], inputs[:count])


@pytest.mark.parametrize("name", ATOMICS)
@pytest.mark.parametrize("returns", [False, True])
def test_atomic(name, returns):
    inputs = words("u32")
    operation = (
        f"{returning(name)} v21, v0, v11" if returns else f"ds_{name} v0, v11\nv_mov_b32 v21, v10"
    )
    body = (
        f"ds_write_b32 v0, v10\ns_waitcnt lgkmcnt(0)\n{operation}\n"
        "s_waitcnt lgkmcnt(0)\nds_read_b32 v20, v0\ns_waitcnt lgkmcnt(0)"
    )
    got = execute(body, inputs, 2)
    want = [
        ATOMICS[name](int(m), int(x)) & 0xFFFFFFFF
        for m, x in zip(inputs[0], inputs[1], strict=True)
    ]
    np.testing.assert_array_equal(got[0], want)
    np.testing.assert_array_equal(got[1], inputs[0])


@pytest.mark.parametrize("name", FLOAT_ATOMICS)
@pytest.mark.parametrize("returns", [False, True])
def test_float_atomic(name, returns):
    inputs = words("finite")
    operation = (
        f"{returning(name)} v21, v0, v11" if returns else f"ds_{name} v0, v11\nv_mov_b32 v21, v10"
    )
    body = (
        f"ds_write_b32 v0, v10\ns_waitcnt lgkmcnt(0)\n{operation}\n"
        "s_waitcnt lgkmcnt(0)\nds_read_b32 v20, v0\ns_waitcnt lgkmcnt(0)"
    )
    got = execute(body, inputs, 2)
    np.testing.assert_array_equal(f32(got[0]), FLOAT_ATOMICS[name](f32(inputs[0]), f32(inputs[1])))
    np.testing.assert_array_equal(got[1], inputs[0])


def test_exchange():
    body = (
        "ds_write_b32 v0, v10\ns_waitcnt lgkmcnt(0)\nds_wrxchg_rtn_b32 v20, v0, v11\n"
        "s_waitcnt lgkmcnt(0)\nds_read_b32 v21, v0\ns_waitcnt lgkmcnt(0)"
    )
    run_case(Case(body, lambda a, b, *_: (a, b), outputs=2), "gfx950")


def test_bpermute_pulls_and_permute_pushes():
    where = "v_xor_b32 v4, 20, v0\n"  # lane ^ 5
    pull = (
        f"{where}ds_bpermute_b32 v20, v4, v10\nv_add_u32 v4, 4, v0\n"
        "ds_permute_b32 v21, v4, v10\ns_waitcnt lgkmcnt(0)"
    )
    run_case(Case(pull, lambda a, *_: (a[LANE ^ 5], a[(LANE - 1) % 64]), outputs=2), "gfx950")


@pytest.mark.parametrize(
    ("pattern", "source"),
    [
        ("swizzle(SWAP,4)", LANE ^ 4),
        ("swizzle(REVERSE,8)", LANE ^ 7),
        ("swizzle(BROADCAST,16,3)", LANE & ~15 | 3),
        ('swizzle(BITMASK_PERM,"01pip")', LANE & 32 | (LANE & 0b111 | 0b01000) ^ 0b00010),
        ("swizzle(QUAD_PERM,3,1,0,2)", (LANE & ~3) + np.array([3, 1, 0, 2])[LANE & 3]),
        ("0x401f", LANE ^ 16),
    ],
)
def test_swizzle(pattern, source):
    run_case(
        Case(
            f"ds_swizzle_b32 v20, v10 offset:{pattern}\ns_waitcnt lgkmcnt(0)",
            lambda a, *_: a[source],
        ),
        "gfx950",
    )


@pytest.mark.parametrize("suffix", TRANSPOSED)
def test_transposing_read(suffix):
    """Sixteen lanes address a tile, row by row; each lane receives one column of it.

    A row of the tile is 16 elements, in 64-bit pieces that consecutive lanes address.
    """
    bits = TRANSPOSED[suffix]
    inputs = words("u32")
    body = (
        "v_lshlrev_b32 v4, 1, v0\nds_write_b64 v4, v[10:11]\ns_waitcnt lgkmcnt(0)\n"
        f"ds_read_b64_tr_{suffix} v[20:21], v4\ns_waitcnt lgkmcnt(0)"
    )
    got = execute(body, inputs, 2)
    data = [int(inputs[0][lane]) | int(inputs[1][lane]) << 32 for lane in range(64)]
    per_lane = 64 // bits
    for base in range(0, 64, 16):
        flat = [
            data[base + i // per_lane] >> bits * (i % per_lane) & ((1 << bits) - 1)
            for i in range(16 * per_lane)
        ]
        tile = np.array(flat, object).reshape(per_lane, 16)  # [row, column]
        for q in range(16):
            want = sum(int(tile[e, q]) << bits * e for e in range(per_lane))
            assert int(got[0][base + q]) | int(got[1][base + q]) << 32 == want
