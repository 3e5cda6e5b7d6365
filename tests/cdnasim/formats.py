"""Small float formats in numpy, written from their definitions, independent of the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Minifloat:
    """exponent_bits, mantissa_bits, bias; `fnuz` has one NaN at 0x80, `ieee` has infinities."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    fnuz: bool = False
    ieee: bool = False

    def value(self, code: int) -> float:
        width = self.exponent_bits + self.mantissa_bits
        sign = -1.0 if code >> width & 1 else 1.0
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        exponent = code >> self.mantissa_bits & ((1 << self.exponent_bits) - 1)
        if self.fnuz and code == 1 << width:
            return float("nan")
        if width == 7 and not self.fnuz:
            top = (1 << self.exponent_bits) - 1
            if self.ieee and exponent == top:
                return float("nan") if mantissa else sign * float("inf")
            if not self.ieee and code & 0x7F == 0x7F:
                return float("nan")
        fraction = mantissa / (1 << self.mantissa_bits)
        if exponent == 0:
            return sign * fraction * 2.0 ** (1 - self.bias)
        return sign * (1 + fraction) * 2.0 ** (exponent - self.bias)

    @cache  # noqa: B019 - five module constants
    def table(self) -> np.ndarray[Any, Any]:
        codes = 1 << (1 + self.exponent_bits + self.mantissa_bits)
        return np.array([self.value(code) for code in range(codes)], np.float32)

    def decode(self, codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self.table()[np.asarray(codes).astype(np.int64)]

    def encode(self, values: np.ndarray[Any, Any], saturate: bool) -> np.ndarray[Any, Any]:
        """Nearest code, ties to even; beyond the largest, saturate or overflow."""
        positive = self.table()[: len(self.table()) // 2].astype(np.float64)
        finite = np.isfinite(positive)
        grid = positive[finite]
        sign = np.signbit(values)
        magnitude = np.abs(values.astype(np.float64))
        upper = np.clip(np.searchsorted(grid, magnitude), 1, len(grid) - 1)
        lower = upper - 1
        up, down = grid[upper] - magnitude, magnitude - grid[lower]
        code = np.where((up < down) | ((up == down) & (upper % 2 == 0)), upper, lower)
        step = grid[-1] - grid[-2]
        overflow = magnitude >= grid[-1] + step / 2
        # A tie beyond the largest rounds to the larger neighbour when the largest is odd.
        if (len(grid) - 1) % 2 == 0:
            overflow &= magnitude > grid[-1] + step / 2
        nan = 0x80 if self.fnuz else 0x7F
        beyond = len(grid) - 1 if saturate else (0x7C if self.ieee else nan)
        code = np.where(overflow, beyond, code)
        code = np.where(np.isnan(values), nan, code)
        signed = sign & ~(self.fnuz & ((code == 0) | (code == 0x80)))
        return (code | signed.astype(np.int64) << 7).astype(np.uint32)


E4M3FN = Minifloat(4, 3, 7)
E5M2 = Minifloat(5, 2, 15, ieee=True)
E4M3FNUZ = Minifloat(4, 3, 8, fnuz=True)
E5M2FNUZ = Minifloat(5, 2, 16, fnuz=True)
E2M1 = Minifloat(2, 1, 1)
E2M3 = Minifloat(2, 3, 1)
E3M2 = Minifloat(3, 2, 3)
FP8 = {"gfx942": E4M3FNUZ, "gfx950": E4M3FN}
BF8 = {"gfx942": E5M2FNUZ, "gfx950": E5M2}


def bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Round f32 to bf16 bits, nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint32)


def from_bf16(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)
