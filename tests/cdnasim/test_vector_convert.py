"""Conversions between formats, in both fp8 flavours, with and without saturation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cdnasim import formats
from tests.cdnasim.machine import Case, bits16, execute, f32, f64, half, i32, run_case, split, words

BOTH = ("gfx942", "gfx950")
MODE_SATURATE = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1\n"


def to_int(x, low, high, kind):
    clipped = np.clip(
        np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=2**40, neginf=-(2**40)), low, high
    )
    return np.trunc(clipped).astype(np.int64).astype(kind)


def rtz(x):
    nearest = x.astype(np.float16)
    away = np.abs(nearest.astype(np.float32)) > np.abs(x)
    return np.where(away & np.isfinite(x), np.nextafter(nearest, np.float16(0)), nearest).astype(
        np.float16
    )


def unorm(x, scale, low):
    return (
        np.rint(np.clip(np.nan_to_num(x.astype(np.float64)), low, 1) * scale).astype(np.int64)
        & 0xFFFF
    )


CASES = {
    "v_cvt_f32_i32": Case("v_cvt_f32_i32 v20, v10", lambda a, *_: i32(a).astype(np.float32)),
    "v_cvt_f32_u32": Case("v_cvt_f32_u32 v20, v10", lambda a, *_: a.astype(np.float32)),
    "v_cvt_u32_f32": Case(
        "v_cvt_u32_f32 v20, v10", lambda a, *_: to_int(f32(a), 0, 2**32 - 1, np.uint32), "f32"
    ),
    "v_cvt_i32_f32": Case(
        "v_cvt_i32_f32 v20, v10",
        lambda a, *_: to_int(f32(a), -(2**31), 2**31 - 1, np.int32).view(np.uint32),
        "f32",
    ),
    "v_cvt_flr_i32_f32": Case(
        "v_cvt_flr_i32_f32 v20, v10",
        lambda a, *_: to_int(np.floor(f32(a)), -(2**31), 2**31 - 1, np.int32).view(np.uint32),
        "f32",
    ),
    "v_cvt_rpi_i32_f32": Case(
        "v_cvt_rpi_i32_f32 v20, v10",
        lambda a, *_: to_int(
            np.floor(f32(a) + np.float32(0.5)), -(2**31), 2**31 - 1, np.int32
        ).view(np.uint32),
        "f32",
    ),
    **{
        f"v_cvt_f32_ubyte{i}": Case(
            f"v_cvt_f32_ubyte{i} v20, v10", lambda a, *_, i=i: (a >> 8 * i & 255).astype(np.float32)
        )
        for i in range(4)
    },
    "v_cvt_off_f32_i4": Case(
        "v_cvt_off_f32_i4 v20, v10",
        lambda a, *_: ((((a & 15).astype(np.int64) ^ 8) - 8) / 16).astype(np.float32),
    ),
    "v_cvt_f16_f32": Case("v_cvt_f16_f32 v20, v10", lambda a, *_: bits16(f32(a)), "finite"),
    "v_cvt_f32_f16": Case(
        "v_cvt_f32_f16 v20, v10", lambda a, *_: half(a).astype(np.float32), "f16"
    ),
    "v_cvt_f32_bf16": Case(
        "v_cvt_f32_bf16 v20, v10", lambda a, *_: formats.from_bf16(a & 0xFFFF), "f32"
    ),
    "v_cvt_f16_u16": Case(
        "v_cvt_f16_u16 v20, v10", lambda a, *_: bits16((a & 0xFFFF).astype(np.float32))
    ),
    "v_cvt_f16_i16": Case(
        "v_cvt_f16_i16 v20, v10",
        lambda a, *_: bits16((a & 0xFFFF).astype(np.uint16).view(np.int16).astype(np.float32)),
    ),
    "v_cvt_u16_f16": Case(
        "v_cvt_u16_f16 v20, v10", lambda a, *_: to_int(half(a), 0, 65535, np.uint32), "f16"
    ),
    "v_cvt_i16_f16": Case(
        "v_cvt_i16_f16 v20, v10",
        lambda a, *_: to_int(half(a), -32768, 32767, np.int32).view(np.uint32) & 0xFFFF,
        "f16",
    ),
    "v_cvt_pk_bf16_f32": Case(
        "v_cvt_pk_bf16_f32 v20, v10, v11",
        lambda a, b, *_: formats.bf16(f32(a)) | formats.bf16(f32(b)) << 16,
        "f32",
    ),
    "v_cvt_pk_f16_f32": Case(
        "v_cvt_pk_f16_f32 v20, v10, v11",
        lambda a, b, *_: bits16(f32(a)) | bits16(f32(b)) << 16,
        "finite",
    ),
    "v_cvt_pkrtz_f16_f32": Case(
        "v_cvt_pkrtz_f16_f32 v20, v10, v11",
        lambda a, b, *_: bits16(rtz(f32(a))) | bits16(rtz(f32(b))) << 16,
        "finite",
    ),
    "v_cvt_pk_i16_i32": Case(
        "v_cvt_pk_i16_i32 v20, v10, v11",
        lambda a, b, *_: (
            (np.clip(i32(a), -32768, 32767) & 0xFFFF).astype(np.uint32)
            | (np.clip(i32(b), -32768, 32767) & 0xFFFF).astype(np.uint32) << 16
        ),
    ),
    "v_cvt_pk_u16_u32": Case(
        "v_cvt_pk_u16_u32 v20, v10, v11",
        lambda a, b, *_: np.minimum(a, 65535) | np.minimum(b, 65535) << 16,
    ),
    "v_cvt_pknorm_i16_f32": Case(
        "v_cvt_pknorm_i16_f32 v20, v10, v11",
        lambda a, b, *_: unorm(f32(a), 32767, -1) | unorm(f32(b), 32767, -1) << 16,
        "finite",
    ),
    "v_cvt_pknorm_u16_f32": Case(
        "v_cvt_pknorm_u16_f32 v20, v10, v11",
        lambda a, b, *_: unorm(f32(a), 65535, 0) | unorm(f32(b), 65535, 0) << 16,
        "finite",
    ),
    "v_cvt_pk_u8_f32": Case(
        "v_cvt_pk_u8_f32 v20, v10, 2, v12",
        lambda a, b, c, *_: c & 0xFF00FFFF | to_int(f32(a), 0, 255, np.uint32) << 16,
        "finite",
    ),
    "v_cvt_f32_f64": Case(
        "v_cvt_f32_f64 v20, v[10:11]", lambda a, b, *_: f64(a, b).astype(np.float32), "f64"
    ),
    "v_cvt_i32_f64": Case(
        "v_cvt_i32_f64 v20, v[10:11]",
        lambda a, b, *_: to_int(f64(a, b), -(2**31), 2**31 - 1, np.int32).view(np.uint32),
        "f64",
    ),
    "v_cvt_u32_f64": Case(
        "v_cvt_u32_f64 v20, v[10:11]",
        lambda a, b, *_: to_int(f64(a, b), 0, 2**32 - 1, np.uint32),
        "f64",
    ),
    "v_cvt_f64_f32": Case(
        "v_cvt_f64_f32 v[20:21], v10", lambda a, *_: split(f32(a).astype(np.float64)), "finite", 2
    ),
    "v_cvt_f64_i32": Case(
        "v_cvt_f64_i32 v[20:21], v10", lambda a, *_: split(i32(a).astype(np.float64)), outputs=2
    ),
    "v_cvt_f64_u32": Case(
        "v_cvt_f64_u32 v[20:21], v10", lambda a, *_: split(a.astype(np.float64)), outputs=2
    ),
}

SMALL = {"fp8": formats.E4M3FN, "bf8": formats.E5M2, "fp4": formats.E2M1}
SCALE = np.float32(4.0)
FROM_F32 = [f"v_cvt_scalef32_pk_{s}_f32" for s in SMALL]
FROM_HALVES = [f"v_cvt_scalef32_pk_{s}_{h}" for s in SMALL for h in ("bf16", "f16")]
TO_WIDE = [f"v_cvt_scalef32_pk_{t}_{s}" for s in SMALL for t in ("f32", "bf16", "f16")]
SINGLE = ["v_cvt_scalef32_f32_fp8", "v_cvt_scalef32_f32_bf8"]
FP8 = [
    "v_cvt_pk_fp8_f32",
    "v_cvt_pk_bf8_f32",
    "v_cvt_f32_fp8",
    "v_cvt_f32_bf8",
    "v_cvt_pk_f32_fp8",
    "v_cvt_pk_f32_bf8",
    "v_cvt_sr_fp8_f32",
    "v_cvt_sr_bf8_f32",
]
COVERED = {*CASES, *FROM_F32, *FROM_HALVES, *TO_WIDE, *SINGLE, *FP8}


@pytest.mark.parametrize("name", CASES)
def test_semantics(name):
    run_case(CASES[name], "gfx950")


def flavour(name, arch):
    return (formats.BF8 if "bf8" in name else formats.FP8)[arch]


def spread_inputs():
    """Values over the whole range of the small formats, ties and overflows among them."""
    rng = np.random.default_rng(1)
    inputs = words("f32")
    magnitudes = 2.0 ** rng.uniform(-20, 18, (4, 64)) * rng.choice([-1, 1], (4, 64))
    inputs[1:5] = magnitudes.astype(np.float32).view(np.uint32)
    inputs[1, :8] = np.array([240, 248, 256, 448, 464, 480, 57344, 61440], np.float32).view(
        np.uint32
    )
    return inputs


@pytest.mark.parametrize("arch", BOTH)
@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("name", ["v_cvt_pk_fp8_f32", "v_cvt_pk_bf8_f32"])
def test_to_fp8(name, high, saturate, arch):
    inputs = spread_inputs()
    select = " op_sel:[0,0,1]" if high else ""
    body = f"{MODE_SATURATE if saturate else ''}v_mov_b32 v20, v15\n{name} v20, v10, v11{select}"
    got = execute(body, inputs, arch=arch)[0]
    small = flavour(name, arch)
    pair = small.encode(f32(inputs[0]), saturate) | small.encode(f32(inputs[1]), saturate) << 8
    kept = inputs[5]
    want = kept & 0xFFFF | pair << 16 if high else kept & 0xFFFF0000 | pair
    shift, rest = (16, 0xFFFF) if high else (0, 0xFFFF0000)
    np.testing.assert_array_equal(got & rest, want & rest)
    for byte in (shift, shift + 8):  # compared as values: the sign of a NaN is not specified
        np.testing.assert_array_equal(
            small.decode(got >> byte & 255), small.decode(want >> byte & 255)
        )


@pytest.mark.parametrize("arch", BOTH)
@pytest.mark.parametrize("name", ["v_cvt_f32_fp8", "v_cvt_f32_bf8"])
def test_from_fp8(name, arch):
    codes = np.zeros((8, 64), np.uint32)
    codes[:4] = np.arange(256, dtype=np.uint32).reshape(4, 64)
    small = flavour(name, arch)
    for row in range(4):
        got = execute(f"{name}_e32 v20, v{10 + row}", codes, arch=arch)[0]
        np.testing.assert_array_equal(f32(got), small.decode(codes[row]))
    spread = codes.copy()
    spread[0] = codes[1] << 16
    got = execute(f"{name}_sdwa v20, v10 src0_sel:BYTE_2", spread, arch=arch)[0]
    np.testing.assert_array_equal(f32(got), small.decode(codes[1]))


@pytest.mark.parametrize("arch", BOTH)
@pytest.mark.parametrize("name", ["v_cvt_pk_f32_fp8", "v_cvt_pk_f32_bf8"])
@pytest.mark.parametrize("form", ["_e32 v[20:21], v10", "_sdwa v[20:21], v10 src0_sel:WORD_1"])
def test_pair_from_fp8(name, form, arch):
    inputs = words("u32")
    got = execute(name + form, inputs, 2, arch=arch)
    small, shift = flavour(name, arch), 16 if "WORD_1" in form else 0
    for i in range(2):
        np.testing.assert_array_equal(f32(got[i]), small.decode(inputs[0] >> (shift + 8 * i) & 255))


@pytest.mark.parametrize("arch", BOTH)
@pytest.mark.parametrize("name", ["v_cvt_sr_fp8_f32", "v_cvt_sr_bf8_f32"])
def test_stochastic_rounding_is_between_neighbours(name, arch):
    inputs = words("finite")
    inputs[1] = words("u32")[1]
    got = execute(f"v_mov_b32 v20, v15\n{name} v20, v10, v11 op_sel:[0,0,1,0]", inputs, arch=arch)[
        0
    ]
    small = flavour(name, arch)
    value, x = small.decode(got >> 8 & 255), f32(inputs[0])
    np.testing.assert_array_equal(got & 0xFFFF00FF, inputs[5] & 0xFFFF00FF)
    spacing = 2.0 ** (np.floor(np.log2(np.abs(x))) - small.mantissa_bits)
    assert (
        np.abs(value - x) <= np.maximum(spacing, 2.0 ** (1 - small.bias - small.mantissa_bits))
    ).all()
    zero = inputs.copy()
    zero[1] = 0
    got = execute(f"v_mov_b32 v20, 0\n{name} v20, v10, v11", zero, arch=arch)[0]
    assert (np.abs(small.decode(got & 255)) <= np.abs(x)).all()


def packed_pair(small, x, y):
    width = 4 if small is formats.E2M1 else 8
    if width == 8:
        return small.encode(x, True) | small.encode(y, True) << 8
    codes = [small.encode(np.clip(v, -6, 6), True) for v in (x, y)]
    codes = [c & 7 | (c >> 4 & 8) for c in codes]
    return codes[0] | codes[1] << 4


@pytest.mark.parametrize("name", FROM_F32 + FROM_HALVES)
def test_scaled_to_small(name):
    small = SMALL[name.split("_")[4]]
    inputs = words("f16" if name.endswith("_f16") else "finite")
    inputs[2] = np.full(64, SCALE).view(np.uint32)
    if name in FROM_F32:
        x, y, sources = f32(inputs[0]), f32(inputs[1]), "v10, v11"
    else:
        decode = (
            formats.from_bf16
            if "bf16" in name
            else lambda w: w.astype(np.uint16).view(np.float16).astype(np.float32)
        )
        x, y, sources = decode(inputs[0] & 0xFFFF), decode(inputs[0] >> 16), "v10"
    body = f"{MODE_SATURATE}v_mov_b32 v20, 0\n{name} v20, {sources}, v12"
    np.testing.assert_array_equal(
        execute(body, inputs)[0], packed_pair(small, x / SCALE, y / SCALE)
    )


@pytest.mark.parametrize("name", TO_WIDE + SINGLE)
def test_scaled_from_small(name):
    parts = name.split("_")
    small, target = SMALL[parts[-1]], parts[-2]
    inputs = words("u32")
    inputs[1] = np.full(64, SCALE).view(np.uint32)
    width = 4 if small is formats.E2M1 else 8
    x, y = (small.decode(inputs[0] >> width * i & ((1 << width) - 1)) * SCALE for i in range(2))
    wide = name in TO_WIDE and target == "f32"
    got = execute(f"{name} {'v[20:21]' if wide else 'v20'}, v10, v11", inputs, 2 if wide else 1)
    if target == "f32":
        np.testing.assert_array_equal(f32(got[0]), x)
        if wide:
            np.testing.assert_array_equal(f32(got[1]), y)
        return
    decode = (
        formats.from_bf16
        if target == "bf16"
        else lambda w: w.astype(np.uint16).view(np.float16).astype(np.float32)
    )
    with np.errstate(over="ignore"):
        expected = [
            v if target == "bf16" else v.astype(np.float16).astype(np.float32) for v in (x, y)
        ]
    np.testing.assert_array_equal(decode(got[0] & 0xFFFF), expected[0])
    np.testing.assert_array_equal(decode(got[0] >> 16), expected[1])
