"""Global, flat, buffer, scratch and scalar memory instructions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cdnasim import formats
from tests.cdnasim.machine import execute, f32, words

LANE = np.arange(64)
LOADS = {  # suffix: (bytes, signed, half)
    "dword": (4, False, None),
    "dwordx2": (8, False, None),
    "dwordx3": (12, False, None),
    "dwordx4": (16, False, None),
    "ubyte": (1, False, None),
    "sbyte": (1, True, None),
    "ushort": (2, False, None),
    "sshort": (2, True, None),
    "ubyte_d16": (1, False, 0),
    "ubyte_d16_hi": (1, False, 1),
    "sbyte_d16": (1, True, 0),
    "sbyte_d16_hi": (1, True, 1),
    "short_d16": (2, False, 0),
    "short_d16_hi": (2, False, 1),
}
STORES = {
    "dword": (4, 0),
    "dwordx2": (8, 0),
    "dwordx3": (12, 0),
    "dwordx4": (16, 0),
    "byte": (1, 0),
    "byte_d16_hi": (1, 16),
    "short": (2, 0),
    "short_d16_hi": (2, 16),
}
DIRECT = ("dword", "dwordx3", "dwordx4", "ubyte", "sbyte", "ushort", "sshort")
SPACES = ("global", "flat", "buffer", "scratch")
ATOMICS = {
    "add": lambda m, x: m + x,
    "sub": lambda m, x: m - x,
    "and": lambda m, x: m & x,
    "or": lambda m, x: m | x,
    "xor": lambda m, x: m ^ x,
    "swap": lambda m, x: x,
    "umin": min,
    "umax": max,
    "smin": min,
    "smax": max,  # on the positive numbers of this test; the next one has negatives
    "inc": lambda m, x: 0 if m >= x else m + 1,
    "dec": lambda m, x: x if m == 0 or m > x else m - 1,
}
WIDE_ATOMICS = ("add", "sub", "and", "or", "xor", "swap", "umin", "umax", "smin", "smax")
FLOAT_ATOMICS = ("add_f32", "pk_add_f16", "pk_add_bf16", "add_f64", "min_f64", "max_f64")
SCALAR = {"dword": 1, "dwordx2": 2, "dwordx4": 4, "dwordx8": 8, "dwordx16": 16}
ATOMIC_NAMES = [
    *ATOMICS,
    *(f"{a}_x2" for a in WIDE_ATOMICS),
    *FLOAT_ATOMICS,
    "cmpswap",
    "cmpswap_x2",
]
COVERED = {
    *(f"{space}_load_{s}" for space in SPACES for s in LOADS),
    *(f"{space}_store_{s}" for space in SPACES for s in STORES),
    *(f"global_load_lds_{s}" for s in DIRECT),
    *(f"{space}_atomic_{a}" for space in ("global", "flat", "buffer") for a in ATOMIC_NAMES),
    *(f"s_load_{s}" for s in SCALAR),
    *(f"s_buffer_load_{s}" for s in SCALAR),
    "s_memtime",
    "s_memrealtime",
}
# s[12:15]: a buffer resource over the 16 KiB of memory, of which 8 KiB are in range.
RESOURCE = (
    "s_mov_b32 s12, s8\ns_and_b32 s13, s9, 0xffff\ns_mov_b32 s14, 0x2000\ns_mov_b32 s15, 0x27000\n"
)
FULL = "v_mov_b32 v6, s8\nv_mov_b32 v7, s9\nv_lshl_add_u64 v[6:7], v[4:5], 0, v[6:7]\n"
OFFSETS = "v_lshlrev_b32 v4, 2, v0\nv_mov_b32 v5, 0\n"  # v4 is 16 * lane


def register(first, count):
    return f"v[{first}:{first + count - 1}]" if count > 1 else f"v{first}"


def access(space, name, data, load):
    """An access to 16 * lane + 4 of the memory in each address space."""
    if space == "global":
        return (
            f"{name} {data}, v4, s[8:9] offset:4" if load else f"{name} v4, {data}, s[8:9] offset:4"
        )
    if space == "flat":
        return (
            f"{FULL}{name} {data}, v[6:7] offset:4"
            if load
            else f"{FULL}{name} v[6:7], {data} offset:4"
        )
    if space == "buffer":
        return f"{RESOURCE}{name} {data}, v4, s[12:15], 0 offen offset:4"
    return f"{name} {data}, off, off offset:4" if load else f"{name} off, {data}, off offset:4"


@pytest.mark.parametrize("suffix", LOADS)
@pytest.mark.parametrize("space", SPACES[:3])
def test_load(space, suffix):
    size, signed, half = LOADS[suffix]
    count = max(1, size // 4)
    memory, inputs = words("u32").repeat(8).astype(np.uint32), words("u32", 1)
    old = "\n".join(f"v_mov_b32 v{20 + i}, v10" for i in range(count))
    body = (
        f"{OFFSETS}{old}\n"
        f"{access(space, f'{space}_load_{suffix}', register(20, count), True)}\n"
        "s_waitcnt vmcnt(0) lgkmcnt(0)"
    )
    got = execute(body, inputs, count, memory=memory)
    for lane in range(64):
        raw = memory.tobytes()[16 * lane + 4 : 16 * lane + 4 + size]
        if size >= 4:
            assert got[:, lane].tobytes() == raw
            continue
        value = int.from_bytes(raw, "little", signed=signed)
        old_word = int(inputs[0][lane])
        want = value & 0xFFFFFFFF
        if half is not None:
            want = (
                old_word & 0xFFFF0000 | value & 0xFFFF
                if half == 0
                else old_word & 0xFFFF | (value & 0xFFFF) << 16
            )
        assert got[0, lane] == want


@pytest.mark.parametrize("suffix", STORES)
@pytest.mark.parametrize("space", SPACES[:3])
def test_store(space, suffix):
    size, shift = STORES[suffix]
    count = max(1, size // 4)
    memory, inputs = np.full(4096, 0xEEEEEEEE, np.uint32), words("u32", 1)
    execute(
        OFFSETS
        + access(space, f"{space}_store_{suffix}", register(10, count), False)
        + "\nv_mov_b32 v20, 0",
        inputs,
        memory=memory,
    )
    want = bytearray(b"\xee" * memory.nbytes)
    for lane in range(64):
        data = (inputs[:count, lane] >> shift if size < 4 else inputs[:count, lane]).tobytes()
        want[16 * lane + 4 : 16 * lane + 4 + size] = data[:size]
    assert memory.tobytes() == bytes(want)


@pytest.mark.parametrize("suffix", LOADS)
def test_scratch(suffix):
    """Each lane has scratch of its own: store two registers, load with every width."""
    size, signed, half = LOADS[suffix]
    count = max(1, size // 4)
    inputs = words("u32", 1)
    old = "\n".join(f"v_mov_b32 v{20 + i}, v15" for i in range(count))
    body = (
        f"scratch_store_dwordx4 off, v[10:13], off offset:4\n{old}\n"
        f"scratch_load_{suffix} {register(20, count)}, off, off "
        "offset:4\ns_waitcnt vmcnt(0)"
    )
    got = execute(body, inputs, count, scratch=64)
    for lane in range(64):
        raw = inputs[:4, lane].tobytes()[:size]
        value = int.from_bytes(raw, "little", signed=signed and size < 4)
        if half is not None:
            old_word = int(inputs[5][lane])
            value = (
                old_word & 0xFFFF0000 | value & 0xFFFF
                if half == 0
                else old_word & 0xFFFF | (value & 0xFFFF) << 16
            )
        assert int.from_bytes(got[:, lane].tobytes(), "little") == value & ((1 << 32 * count) - 1)


@pytest.mark.parametrize("suffix", STORES)
def test_scratch_store(suffix):
    size, shift = STORES[suffix]
    count = max(1, size // 4)
    inputs = words("u32", 1)
    body = (
        "v_mov_b32 v2, 0\nv_mov_b32 v3, 0\nv_mov_b32 v4, 0\n"
        "v_mov_b32 v5, 0\nscratch_store_dwordx4 off, v[2:5], off\n"
        f"scratch_store_{suffix} off, {register(10, count)}, off\n"
        "scratch_load_dwordx4 v[20:23], off, off\ns_waitcnt vmcnt(0)"
    )
    got = execute(body, inputs, 4, scratch=64)
    for lane in range(64):
        data = (inputs[:count, lane] >> shift if size < 4 else inputs[:count, lane]).tobytes()[
            :size
        ]
        assert got[:, lane].tobytes() == data.ljust(16, b"\0")


def test_buffer_accesses_out_of_range_read_zero_and_store_nothing():
    memory = words("u32").repeat(8).astype(np.uint32)
    before = memory.copy()
    body = (
        f"{RESOURCE}s_mov_b32 s14, 512\nbuffer_load_dword v20, v0, s[12:15], 0 offen offset:384\n"
        "s_waitcnt vmcnt(0)\nbuffer_store_dword v10, v0, s[12:15], 0 offen offset:512"
    )
    got = execute(body, words("u32", 1), memory=memory)[0]
    np.testing.assert_array_equal(got, np.where(LANE < 32, before[96 + LANE], 0))
    np.testing.assert_array_equal(memory, before)


@pytest.mark.parametrize("suffix", DIRECT)
def test_direct_to_lds(suffix):
    """Lanes land one element after another from m0; sub-dword elements take a dword each."""
    size, signed, _ = LOADS[suffix]
    memory = words("u32").repeat(8).astype(np.uint32)
    unit = max(size, 4)
    body = (
        f"{OFFSETS}s_mov_b32 m0, 256\ns_nop 1\n"
        f"global_load_lds_{suffix} v4, s[8:9]\ns_waitcnt vmcnt(0)\n"
        f"v_mul_u32_u24 v1, {unit // 4}, v0\nds_read_b32 v20, v1 offset:256\ns_waitcnt lgkmcnt(0)"
    )
    got = execute(body, words("u32"), memory=memory)[0]
    first = memory[4 * LANE]
    want = first & (0xFFFFFFFF if size >= 4 else (1 << 8 * size) - 1)
    del signed  # the load does not extend on its way to LDS
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("space", ["global", "flat", "buffer"])
@pytest.mark.parametrize("name", [*ATOMICS, *(f"{a}_x2" for a in WIDE_ATOMICS)])
def test_atomic_returns_the_old_value(space, name):
    wide = name.endswith("_x2")
    count = 2 if wide else 1
    memory, inputs = words("small").repeat(8).astype(np.uint32), words("small", 1)
    before = memory.copy()
    data = register(10, count)
    if space == "buffer":
        body = (
            "v_mov_b32 v20, v10\nv_mov_b32 v21, v11\n"
            f"{RESOURCE}buffer_atomic_{name} {register(20, count)}, "
            "v4, s[12:15], 0 offen offset:8 sc0"
        )
    elif space == "flat":
        body = f"{FULL}flat_atomic_{name} {register(20, count)}, v[6:7], {data} offset:8 sc0"
    else:
        body = f"global_atomic_{name} {register(20, count)}, v4, {data}, s[8:9] offset:8 sc0"
    got = execute(f"{OFFSETS}{body}\ns_waitcnt vmcnt(0) lgkmcnt(0)", inputs, count, memory=memory)
    f = ATOMICS[name.removesuffix("_x2")]
    for lane in range(64):
        at = 4 * lane + 2
        old = int.from_bytes(before[at : at + count].tobytes(), "little")
        x = int.from_bytes(inputs[:count, lane].tobytes(), "little")
        new = f(old, x) & ((1 << 32 * count) - 1)
        assert int.from_bytes(got[:, lane].tobytes(), "little") == old
        assert int.from_bytes(memory[at : at + count].tobytes(), "little") == new


@pytest.mark.parametrize(("name", "want"), [("smin", -5), ("smax", 3), ("umin", 3), ("umax", -5)])
def test_signed_and_unsigned_extremes_differ(name, want):
    memory = np.full(4096, 3, np.uint32)
    execute(
        f"{OFFSETS}v_mov_b32 v10, -5\nglobal_atomic_{name} v4, v10, s[8:9]\nv_mov_b32 v20, 0",
        words("u32"),
        memory=memory,
    )
    assert (memory[4 * LANE] == want & 0xFFFFFFFF).all()


@pytest.mark.parametrize("space", ["global", "flat", "buffer"])
@pytest.mark.parametrize("wide", [False, True])
def test_compare_and_swap(space, wide):
    """Data is the new value, then the value to compare with."""
    name, count = ("cmpswap_x2", 2) if wide else ("cmpswap", 1)
    memory, inputs = words("small").repeat(8).astype(np.uint32), words("small", 1)
    before = memory.copy()
    even = LANE % 2 == 0
    for i in range(count):
        inputs[count + i] = np.where(even, before[4 * LANE + 2 + i], 99)
    data = register(10, 2 * count)
    where = {
        "global": f"global_atomic_{name} v4, {data}, s[8:9] offset:8",
        "flat": f"{FULL}flat_atomic_{name} v[6:7], {data} offset:8",
        "buffer": f"{RESOURCE}buffer_atomic_{name} {data}, v4, s[12:15], 0 offen offset:8",
    }[space]
    execute(f"{OFFSETS}{where}\nv_mov_b32 v20, 0", inputs, memory=memory)
    for i in range(count):
        np.testing.assert_array_equal(
            memory[4 * LANE + 2 + i], np.where(even, inputs[i], before[4 * LANE + 2 + i])
        )


@pytest.mark.parametrize("space", ["global", "flat", "buffer"])
@pytest.mark.parametrize("name", FLOAT_ATOMICS)
def test_float_atomics_accumulate_over_lanes(space, name):
    """All lanes of a row of 16 update one address."""
    wide = name.endswith("f64")
    inputs = words("finite")
    memory = np.zeros(4096, np.uint32)
    if wide:
        values = np.arange(64, dtype=np.float64) - 20
        inputs[0], inputs[1] = values.view(np.uint64) & 0xFFFFFFFF, values.view(np.uint64) >> 32
    elif name == "add_f32":
        inputs[0] = np.arange(64, dtype=np.float32).view(np.uint32)
    elif name == "pk_add_f16":
        inputs[0] = np.full(64, 0x3C004000, np.uint32)  # high 1.0, low 2.0
    else:
        inputs[0] = np.full(64, 0x3F804000, np.uint32)
    data = register(10, 2 if wide else 1)
    where = {
        "global": f"global_atomic_{name} v4, {data}, s[8:9]",
        "flat": f"{FULL}flat_atomic_{name} v[6:7], {data}",
        "buffer": f"{RESOURCE}buffer_atomic_{name} {data}, v4, s[12:15], 0 offen",
    }[space]
    body = (
        "v_lshrrev_b32 v4, 6, v0\nv_lshlrev_b32 v4, 3, v4\n"
        f"v_mov_b32 v5, 0\n{where}\nv_mov_b32 v20, 0"
    )
    execute(body, inputs, memory=memory)
    rows = np.arange(64).reshape(4, 16)
    if wide:
        groups = rows - 20.0
        reduce = {
            "add_f64": groups.sum(1),
            "min_f64": np.minimum(groups.min(1), 0),
            "max_f64": np.maximum(groups.max(1), 0),
        }
        np.testing.assert_array_equal(memory[:8].view(np.float64), reduce[name])
    elif name == "add_f32":
        np.testing.assert_array_equal(f32(memory[:8:2]), rows.sum(1))
    elif name == "pk_add_f16":
        np.testing.assert_array_equal(memory[:2].view(np.float16)[:2], [32, 16])
    else:
        np.testing.assert_array_equal(
            formats.from_bf16(np.array([memory[0] & 0xFFFF, memory[0] >> 16])), [32, 16]
        )


@pytest.mark.parametrize("suffix", SCALAR)
@pytest.mark.parametrize("buffer", [False, True])
def test_scalar_load(suffix, buffer):
    count = SCALAR[suffix]
    memory = words("u32").repeat(8).astype(np.uint32)
    target = f"s[32:{31 + count}]" if count > 1 else "s32"
    load = (
        f"{RESOURCE}s_buffer_load_{suffix} {target}, s[12:15], 0x40"
        if buffer
        else f"s_load_{suffix} {target}, s[8:9], 0x40"
    )
    moves = "\n".join(f"v_mov_b32 v{20 + i}, s{32 + count - 1 - i}" for i in range(min(count, 8)))
    got = execute(
        f"{load}\ns_waitcnt lgkmcnt(0)\n{moves}", words("u32"), min(count, 8), memory=memory
    )
    want = memory[16 : 16 + count][::-1][: min(count, 8)]
    np.testing.assert_array_equal(got[:, 0], want)


@pytest.mark.parametrize("name", ["s_memtime", "s_memrealtime"])
def test_clock_advances(name):
    body = f"{name} s[20:21]\ns_waitcnt lgkmcnt(0)\ns_nop 0\n" + "s_nop 0\n" * 40
    body += f"{name} s[22:23]\ns_waitcnt lgkmcnt(0)\ns_sub_u32 s20, s22, s20\nv_mov_b32 v20, s20"
    assert 0 < execute(body, words("u32"))[0][0] < 10_000
