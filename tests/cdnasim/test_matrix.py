"""Each matrix instruction against a matrix product in numpy, operands laid out independently."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cdnasim import formats
from tests.cdnasim.machine import SETTLE, build, execute, f32

LANES = 64
PRODUCTS = {  # shape with blocks: (M, K, blocks), by operand type; gfx942 and gfx950
    "f32": [(32, 2, 1), (16, 4, 1), (32, 1, 2), (16, 1, 4), (4, 1, 16)],
    "f16": [(16, 16, 1), (32, 8, 1), (32, 4, 2), (16, 4, 4), (4, 4, 16)],
    "bf16": [(16, 16, 1), (32, 8, 1), (32, 4, 2), (16, 4, 4), (4, 4, 16)],
    "fp8_fp8": [(16, 32, 1), (32, 16, 1)],
    "fp8_bf8": [(16, 32, 1), (32, 16, 1)],
    "bf8_fp8": [(16, 32, 1), (32, 16, 1)],
    "bf8_bf8": [(16, 32, 1), (32, 16, 1)],
    "i8": [(16, 32, 1), (32, 16, 1)],
}
ONLY = {
    "gfx942": {"xf32": [(16, 8, 1), (32, 4, 1)]},
    "gfx950": {
        "f16": [(16, 32, 1), (32, 16, 1)],
        "bf16": [(16, 32, 1), (32, 16, 1)],
        "i8": [(16, 64, 1), (32, 32, 1)],
    },
}


def mnemonic(kind, shape):
    m, k, blocks = shape
    many = f"_{blocks}b" if blocks > 1 else ""
    return f"v_mfma_{'i32' if kind == 'i8' else 'f32'}_{m}x{m}x{k}{many}_{kind}"


CASES = [
    (arch, kind, shape)
    for arch in ("gfx942", "gfx950")
    for kind, shapes in PRODUCTS.items()
    for shape in shapes
]
CASES += [
    (arch, kind, shape)
    for arch, table in ONLY.items()
    for kind, shapes in table.items()
    for shape in shapes
]
SCALED_SHAPES = [(16, 128), (32, 64)]
COVERED = {mnemonic(kind, shape) for _, kind, shape in CASES} | {
    f"v_mfma_{scale}f32_{m}x{m}x{k}_f8f6f4" for scale in ("", "scale_") for m, k in SCALED_SHAPES
}


def element_bits(kind):
    return {"f32": 32, "xf32": 32, "f16": 16, "bf16": 16}.get(kind, 8)


def decode(kind, position, arch, codes):
    if kind in ("f32", "xf32"):
        return f32(codes.astype(np.uint32))
    if kind == "f16":
        return codes.astype(np.uint16).view(np.float16).astype(np.float32)
    if kind == "bf16":
        return formats.from_bf16(codes)
    if kind == "i8":
        return codes.astype(np.uint8).view(np.int8).astype(np.float32)
    flavour = formats.FP8 if kind.split("_")[position] == "fp8" else formats.BF8
    return flavour[arch].decode(codes)


def random_codes(kind, position, arch, shape, rng):
    """Random operand codes, finite and of moderate size."""
    values = rng.standard_normal(shape).astype(np.float32)
    if kind == "f32":
        return values.view(np.uint32)
    if kind == "xf32":
        return values.view(np.uint32) & 0xFFFFE000
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    if kind == "bf16":
        return formats.bf16(values)
    if kind == "i8":
        return rng.integers(0, 256, shape).astype(np.uint32)
    flavour = formats.FP8 if kind.split("_")[position] == "fp8" else formats.BF8
    return flavour[arch].encode(values, True)


def pack(codes, bits):
    """[lanes, elements] codes → [registers, lanes] words, element 0 in the lowest bits."""
    lanes, elements = codes.shape
    registers = elements * bits // 32
    wide = np.zeros(lanes, object)
    for e in range(elements):
        wide = wide + (codes[:, e].astype(object) << (bits * e))
    return np.array(
        [[int(w) >> 32 * r & 0xFFFFFFFF for w in wide] for r in range(registers)], np.uint32
    )


def operand_registers(codes, m, k, blocks, bits):
    """codes [blocks, m, k]: lane = row + m * (k group or block)."""
    per_lane = m * k * blocks // LANES
    lanes = np.zeros((LANES, per_lane), np.uint64)
    for lane in range(LANES):
        group, row = divmod(lane, m)
        lanes[lane] = (
            codes[group, row]
            if blocks > 1
            else codes[0, row, group * per_lane : (group + 1) * per_lane]
        )
    return pack(lanes, bits)


def result_matrix(registers, m, blocks):
    """[registers, lanes] → [blocks, m, m]."""
    out = np.zeros((blocks, m, m), registers.dtype)
    per_block = 4 if m == 4 else m * m // LANES
    for r, row in enumerate(registers):
        for lane in range(LANES):
            if m == 4:
                out[lane // 4, r, lane % 4] = row[lane]
            else:
                i = (
                    4 * (lane // 16) + r % per_block
                    if m == 16
                    else 8 * (r % per_block // 4) + 4 * (lane // 32) + r % 4
                )
                out[r // per_block, i, lane % m] = row[lane]
    return out


def run_product(name, a, b, c, count, arch, extra="", tail=""):
    """Load a, b, c from memory, multiply into a[0:count), return the registers."""
    data = np.concatenate([a, b, c]).astype(np.uint32)
    lines = [
        "s_load_dwordx4 s[4:7], s[0:1], 0x0",
        "v_lshlrev_b32 v0, 2, v0",
        "s_waitcnt lgkmcnt(0)",
    ]
    first = 10
    for i in range(len(data)):
        lines += [f"global_load_dword v{first + i}, v0, s[4:5]", "v_add_u32 v0, 256, v0"]
    lines.append("s_waitcnt vmcnt(0)")
    at_b, at_c = first + len(a), first + len(a) + len(b)
    at_b_range = f"v[{at_b}:{at_b + len(b) - 1}]" if len(b) > 1 else f"v{at_b}"
    a_range = f"v[{first}:{first + len(a) - 1}]" if len(a) > 1 else f"v{first}"
    lines += [f"v_accvgpr_write_b32 a{i}, v{at_c + i}" for i in range(count)]
    scales = "".join(f", v{at_c + count + i}" for i in range(len(c) - count))
    lines += [
        "s_nop 4",
        f"{name} a[0:{count - 1}], {a_range}, {at_b_range}, a[0:{count - 1}]{scales}{extra}",
    ]
    lines += [SETTLE, f"v_add_u32 v0, {-256 * len(data)}, v0"]
    for i in range(count):
        lines += [
            f"v_accvgpr_read_b32 v5, a{i}",
            "global_store_dword v0, v5, s[6:7]",
            "v_add_u32 v0, 256, v0",
        ]
    out = np.zeros((count, LANES), np.uint32)
    build("\n".join(lines), arch).launch((1,), (LANES,), [data, out, None])
    return out


@pytest.mark.parametrize(
    ("arch", "kind", "shape"),
    CASES,
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else v,
)
def test_product(arch, kind, shape):
    m, k, blocks = shape
    rng = np.random.default_rng(m * k)
    a = random_codes(kind, 0, arch, (blocks, m, k), rng)
    b = random_codes(kind, 1, arch, (blocks, m, k), rng)
    bits = element_bits(kind)
    count = 4 if m == 4 else m * m * blocks // LANES
    c = (
        rng.integers(0, 1000, (count, LANES))
        if kind == "i8"
        else rng.standard_normal((count, LANES)).astype(np.float32)
    )
    words = c.astype(np.uint32) if kind == "i8" else c.view(np.uint32)
    registers = operand_registers(a, m, k, blocks, bits), operand_registers(b, m, k, blocks, bits)
    got = run_product(mnemonic(kind, shape), *registers, words, count, arch)
    x, y = (decode(kind, i, arch, codes).astype(np.float64) for i, codes in enumerate((a, b)))
    want = np.einsum("bik,bjk->bij", x, y) + result_matrix(c, m, blocks)
    actual = result_matrix(got, m, blocks)
    if kind == "i8":
        np.testing.assert_array_equal(actual.view(np.int32), want)
    else:
        np.testing.assert_allclose(f32(actual), want, rtol=1e-5, atol=1e-4)


def halves_and_sums(seed):
    """[8, 64]: A and B in fp16, two registers each, and C in fp32, four."""
    rng = np.random.default_rng(seed)
    operands = rng.standard_normal((4, LANES, 2)).astype(np.float16).view(np.uint32)[..., 0]
    return np.concatenate(
        [operands, rng.standard_normal((4, LANES)).astype(np.float32).view(np.uint32)]
    )


def product(out, c):
    return f"v_mfma_f32_16x16x16_f16 v[{out}:{out + 3}], v[10:11], v[12:13], v[{c}:{c + 3}]"


@pytest.mark.parametrize("out", [20, 22, 24], ids=["below", "in place", "above"])
def test_result_may_overlap_the_accumulator(out):
    inputs = halves_and_sums(0)
    apart = execute(product(20, 14), inputs, 4)
    moves = "\n".join(f"v_mov_b32 v{22 + i}, v{14 + i}" for i in range(4))
    down = "\n".join(f"v_mov_b32 v{20 + i}, v{out + i}" for i in range(4))
    body = f"{moves}\n{SETTLE}\n{product(out, 22)}\n{SETTLE}\n{down}"
    np.testing.assert_array_equal(execute(body, inputs, 4), apart)


def test_an_operand_that_changed_is_read_anew():
    """Products keep operands unpacked; what they kept is not what the register holds now."""
    inputs = halves_and_sums(1)
    swap = f"v_swap_b32 v10, v12\n{SETTLE}"
    once = execute(f"{swap}\n{product(20, 14)}", inputs, 4)
    again = execute(f"{product(20, 14)}\n{SETTLE}\n{swap}\n{product(20, 14)}", inputs, 4)
    np.testing.assert_array_equal(again, once)
    assert (execute(product(20, 14), inputs, 4) != once).any()


SMALL = {
    0: (formats.E4M3FN, 8),
    1: (formats.E5M2, 8),
    2: (formats.E2M3, 6),
    3: (formats.E3M2, 6),
    4: (formats.E2M1, 4),
}


def scaled_operand(form, m, k, rng):
    """Registers, decoded [m, k] matrix, e8m0 scale codes [m, k / 32]."""
    flavour, bits = SMALL[form]
    codes = rng.integers(0, 1 << bits, (m, k))
    if bits == 8:
        codes = flavour.encode(rng.standard_normal((m, k)).astype(np.float32), True)
    groups = LANES // m
    lanes = np.zeros((LANES, 32), np.uint64)
    for lane in range(LANES):
        group, row = divmod(lane, m)
        for j in range(32):
            at = j // 16 * 16 * groups + group * 16 + j % 16 if bits == 8 else group * 32 + j
            lanes[lane, j] = codes[row, at]
    scales = rng.integers(124, 130, (m, k // 32))
    return pack(lanes, bits), flavour.decode(codes).astype(np.float64), scales


@pytest.mark.parametrize("shape", SCALED_SHAPES)
@pytest.mark.parametrize("forms", [(0, 0), (0, 1), (4, 4), (2, 3), (0, 4)])
@pytest.mark.parametrize("scaled", [False, True])
def test_small_formats(shape, forms, scaled):
    m, k = shape
    rng = np.random.default_rng(7)
    (a, x, sa), (b, y, sb) = (scaled_operand(form, m, k, rng) for form in forms)
    count = m * m // LANES
    c = rng.standard_normal((count, LANES)).astype(np.float32)
    words = c.view(np.uint32)
    if scaled:
        lanes = [(lane % m, lane // m) for lane in range(LANES)]
        rows = [np.array([int(s[i, g]) << 16 for i, g in lanes], np.uint32) for s in (sa, sb)]
        words = np.concatenate([words, rows])  # the scale is byte 2: op_sel 0, op_sel_hi 1
        x, y = x * np.repeat(2.0 ** (sa - 127), 32, 1), y * np.repeat(2.0 ** (sb - 127), 32, 1)
    name = f"v_mfma_{'scale_' if scaled else ''}f32_{m}x{m}x{k}_f8f6f4"
    extra = " op_sel:[0,0,0] op_sel_hi:[1,1,0]" if scaled else ""
    extra += f" cbsz:{forms[0]} blgp:{forms[1]}"
    got = run_product(name, a, b, words, count, "gfx950", extra)
    want = x @ y.T + result_matrix(c, m, 1)[0]
    np.testing.assert_allclose(f32(result_matrix(got, m, 1)[0]), want, rtol=1e-4, atol=1e-3)
