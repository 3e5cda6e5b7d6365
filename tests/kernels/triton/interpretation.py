"""What Triton's interpreter lacks: rounding conversions, and reductions that are not element-wise.

The interpreter of Triton 3.6 and 3.7 truncates float32 to bfloat16, loses the carry when an fp8
mantissa overflows (127.5 becomes 64), does not know the fnuz formats, multiplies the bits of
bfloat16 matrices as integers, and reduces with a function of ours one element at a time (a tile of
4096 takes a second).
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
}


def install() -> None:
    """Replace the interpreter's conversions and reductions; for the life of the process."""
    patch_language = interpreter._patch_lang_core

    def patch_with_fnuz(lang, scope):
        patch_language(lang, scope)
        known = tl.dtype.to_ir

        def to_ir(self, builder):
            return tl.float8e4b8 if self.name == "fp8e4b8" else known(self, builder)

        scope.set_attr(tl.dtype, "to_ir", to_ir)

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *others):
        return multiply(self, widened(a), widened(b), *others)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert
    interpreter._patch_lang_core = patch_with_fnuz
    interpreter.ReduceOps.generic_reduce = reduce_by_halves


def widened(operand):
    """A bfloat16 operand of a product as float32; others as they are."""
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    wide = convert(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def convert(array, from_dtype, to_dtype, rounding_mode):
    """The interpreter's hook: `array` holds `from_dtype`; the result's bits hold `to_dtype`."""
    bits = np.ascontiguousarray(array).reshape(-1)
    bits = bits.view(f"int{8 * bits.itemsize}")
    values = torch.from_numpy(bits.copy()).view(TORCH[from_dtype]).to(TORCH[to_dtype])
    found = values.view(getattr(torch, f"int{8 * values.itemsize}")).numpy()
    return found.view(f"uint{8 * values.itemsize}").reshape(array.shape)


def reduce_by_halves(self, inputs):
    """The interpreter's hook: combine the halves of one tensor along the axis until one is left."""
    (given,) = inputs
    axis = self.axis
    data = given.handle.data
    while data.shape[axis] > 1:
        halves = (self.to_tensor(half, given.dtype) for half in np.split(data, 2, axis))
        data = self.combine_fn.fn(*halves).handle.data
    return [self.to_tensor(data if self.keep_dims else data.squeeze(axis), given.dtype)]
