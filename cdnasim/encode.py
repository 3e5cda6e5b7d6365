"""Encode parsed instructions into the records that the native core executes.

`RECORD` mirrors `struct Record` of native/state.hpp field by field; native.py compares the sizes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cdnasim.asm_parse import Assembly, AssemblyError, Instruction, evaluate

ARG_FIELDS = ("kind", "index", "flags", "count", "value", "high")
MODIFIER_FIELDS = (
    "offset", "offset1", "op_sel", "op_sel_hi", "neg_lo", "neg_hi", "clamp", "omod",
    "dpp", "row_mask", "bank_mask", "bound_ctrl",
    "sdwa", "dst_sel", "dst_unused", "src0_sel", "src1_sel",
    "cbsz", "abid", "blgp", "offen", "idxen", "lds", "returns", "target", "truth_table",
)  # fmt: skip
MAX_ARGS = 6
RECORD = np.dtype(
    [
        ("op", "i4"),
        ("nargs", "i4"),
        ("args", [(name, "i4") for name in ARG_FIELDS], MAX_ARGS),
        *((name, "i4") for name in MODIFIER_FIELDS),
    ]
)
VGPR, SGPR, LITERAL, OFF = 1, 2, 3, 4
NEG, ABS, SEXT = 1, 2, 4
FIRST_AGPR = 256

SPECIAL_REGISTERS = {
    "flat_scratch": (102, 2), "flat_scratch_lo": (102, 1), "flat_scratch_hi": (103, 1),
    "vcc": (106, 2), "vcc_lo": (106, 1), "vcc_hi": (107, 1),
    "m0": (124, 1), "scc": (125, 1), "src_scc": (125, 1),
    "exec": (126, 2), "exec_lo": (126, 1), "exec_hi": (127, 1),
}  # fmt: skip
PARTS = {"BYTE_0": 0, "BYTE_1": 1, "BYTE_2": 2, "BYTE_3": 3, "WORD_0": 4, "WORD_1": 5, "DWORD": 6}
UNUSED = {"UNUSED_PAD": 0, "UNUSED_SEXT": 1, "UNUSED_PRESERVE": 2}
DPP_WITH_COUNT = {"row_shl": 0x100, "row_shr": 0x110, "row_ror": 0x120, "row_newbcast": 0x150}
DPP_WAVE = {"wave_shl": 0x130, "wave_rol": 0x134, "wave_shr": 0x138, "wave_ror": 0x13C}
IGNORED = {"sc1", "nt", "slc", "gds", "byte_sel"}
NUMBER = re.compile(r"^-?(0x[0-9a-fA-F]+|\d+)$")
FLOAT = re.compile(r"^-?\d*\.\d+(e[-+]?\d+)?$")
REGISTER = re.compile(r"^([vsa])(\d+)$")
REGISTER_RANGE = re.compile(r"^([vsa])\[([^\]:]+)(?::([^\]]+))?\]$")
RELATIVE = re.compile(r"^([\w.$]+)@rel32@(lo|hi)([+-]\d+)?$")

Arg = tuple[int, int, int, int, int, int]  # ARG_FIELDS
SymbolOffset = Callable[[str], int]


def signed(word: int) -> int:
    """The 32-bit word as a signed integer."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def float_words(value: float, mnemonic: str) -> tuple[int, int]:
    """Low and high word of a float constant in the operand type of `mnemonic`."""
    if mnemonic.endswith("f64"):
        low, high = struct.unpack("<ii", struct.pack("<d", value))
        return low, high
    if mnemonic.endswith("f16") and not mnemonic.endswith("bf16"):
        return int(np.float16(value).view(np.uint16)), 0
    (word,) = struct.unpack("<i", struct.pack("<f", value))
    return word, word


def integer_words(value: int, mnemonic: str) -> tuple[int, int]:
    """Low and high word of an integer constant. A literal of an f64 operand is its high word."""
    if mnemonic.endswith("f64") and not -16 <= value <= 64:
        return 0, signed(value)
    return signed(value), signed(value >> 32)


class Encoder:
    """Encodes the instructions of one assembly text.

    Args:
        assembly: the parsed text.
        operations: mnemonic → number of the operation in the native core.
        symbol_offset: symbol → address relative to what s_getpc_b64 returns, bytes.
    """

    def __init__(
        self, assembly: Assembly, operations: Mapping[str, int], symbol_offset: SymbolOffset
    ) -> None:
        self.assembly, self.operations, self.symbol_offset = assembly, operations, symbol_offset

    def encode(self) -> np.ndarray[Any, Any]:
        """Records of all instructions, [num_instructions] of RECORD.

        An instruction that the core does not know gets operation -1: text of other kernels in the
        same file may hold it. Kernel.launch refuses if the kernel itself does.

        Raises:
            AssemblyError: an operand or modifier that cannot be read.
        """
        records = np.zeros(len(self.assembly.instructions), RECORD)
        for record, instruction in zip(records, self.assembly.instructions, strict=True):
            try:
                self.encode_one(record, instruction)
            except (ValueError, KeyError) as error:
                raise AssemblyError(
                    f"line {instruction.line}: {instruction.text}: {error}"
                ) from error
        return records

    def encode_one(self, record: Any, instruction: Instruction) -> None:
        """Fill the record of one instruction."""
        name = instruction.mnemonic
        record["op"] = self.operations.get(name, -1)
        if record["op"] < 0:
            return
        record["dpp"], record["row_mask"], record["bank_mask"] = -1, 15, 15
        record["dst_sel"] = record["src0_sel"] = record["src1_sel"] = PARTS["DWORD"]
        if name == "s_waitcnt":
            record["offset"], record["offset1"] = wait_counts(instruction.operands)
        elif name in ("s_nop", "s_sleep", "s_trap"):
            record["offset"] = evaluate(instruction.operands[0], self.assembly.symbols)
        elif name.startswith(("s_branch", "s_cbranch")):
            record["target"] = self.assembly.labels[instruction.operands[0]]
        elif name.startswith(("s_setreg", "s_getreg")):
            self.encode_mode_register(record, instruction)
        elif not name.startswith(("s_sendmsg", "s_setprio")):
            self.encode_operands(record, instruction.operands, name)
            self.encode_modifiers(record, instruction)

    def encode_operands(self, record: Any, operands: Sequence[str], mnemonic: str) -> None:
        """Fill the arguments."""
        if len(operands) > MAX_ARGS:
            raise ValueError(f"{len(operands)} operands, at most {MAX_ARGS} are expected")
        record["nargs"] = len(operands)
        for k, text in enumerate(operands):
            record["args"][k] = self.operand(text, mnemonic)

    def encode_mode_register(self, record: Any, instruction: Instruction) -> None:
        """hwreg(NAME, offset, width): the register as a literal 1 (MODE) or 0 (others)."""
        k = 1 if instruction.mnemonic.startswith("s_getreg") else 0
        fields = re.match(
            r"hwreg\(\s*(\w+)\s*(?:,\s*(\d+)\s*,\s*(\d+))?\s*\)", instruction.operands[k]
        )
        if not fields:
            raise ValueError(f"{instruction.operands[k]!r} is not hwreg(NAME[, offset, width])")
        record["offset"], record["offset1"] = int(fields[2] or 0), int(fields[3] or 32)
        record["nargs"] = 2
        number = int("MODE" in fields[1] or fields[1] == "1")
        record["args"][k] = (LITERAL, 0, 0, 1, number, 0)
        record["args"][1 - k] = self.operand(instruction.operands[1 - k], instruction.mnemonic)

    # ---- operands

    def operand(self, text: str, mnemonic: str) -> Arg:
        """One operand with its neg, abs and sext flags."""
        flags = 0
        if text.startswith("sext("):
            text, flags = text[5:-1], SEXT
        if re.match(r"^-[|vsa(]", text):
            text, flags = text[1:], flags | NEG
        if text.startswith("neg("):
            text, flags = text[4:-1], flags | NEG
        if text.startswith("|"):
            text, flags = text.strip("|"), flags | ABS
        if text.startswith("abs("):
            text, flags = text[4:-1], flags | ABS
        kind, index, count, value, high = self.plain_operand(text.strip(), mnemonic)
        return (kind, index, flags, count, value, high)

    def plain_operand(self, text: str, mnemonic: str) -> tuple[int, int, int, int, int]:
        """Kind, index, count, value and high word of an operand without flags."""
        if match := REGISTER.match(text):
            return self.register(match[1], int(match[2]), 1)
        if match := REGISTER_RANGE.match(text):
            first = evaluate(match[2], self.assembly.symbols)
            last = evaluate(match[3], self.assembly.symbols) if match[3] else first
            return self.register(match[1], first, last - first + 1)
        if text in SPECIAL_REGISTERS:
            index, count = SPECIAL_REGISTERS[text]
            return (SGPR, index, count, 0, 0)
        if match := re.match(r"^ttmp(\d+)$", text):
            return (SGPR, 108 + int(match[1]), 1, 0, 0)
        if text in ("off", "null"):
            return (OFF, 0, 0, 0, 0)
        if text.startswith("lit("):
            text = text[4:-1]
        if NUMBER.match(text):
            return (LITERAL, 0, 1, *integer_words(int(text, 0), mnemonic))
        if FLOAT.match(text):
            return (LITERAL, 0, 1, *float_words(float(text), mnemonic))
        if match := RELATIVE.match(text):
            return (LITERAL, 0, 1, self.relative(match), 0)
        return (LITERAL, 0, 1, *integer_words(evaluate(text, self.assembly.symbols), mnemonic))

    def register(self, file: str, index: int, count: int) -> tuple[int, int, int, int, int]:
        """A register range; accumulation registers follow the vector registers."""
        if file == "s":
            return (SGPR, index, count, 0, 0)
        return (VGPR, index + (FIRST_AGPR if file == "a" else 0), count, 0, 0)

    def relative(self, match: re.Match[str]) -> int:
        """symbol@rel32@lo+4 or @hi+12 after s_getpc_b64: the distance from the returned address."""
        symbol, half, addend = match[1], match[2], int(match[3] or 0)
        distance = self.symbol_offset(symbol) + addend - (4 if half == "lo" else 12)
        return signed(distance if half == "lo" else distance >> 32)

    # ---- modifiers

    def encode_modifiers(self, record: Any, instruction: Instruction) -> None:
        """Fill the modifiers."""
        name, modifiers = instruction.mnemonic, instruction.modifiers
        packed = name.startswith(("v_pk_", "v_dot"))
        record["op_sel_hi"] = 7 if packed else 0
        record["sdwa"] = instruction.encoding == "sdwa"
        for key, text in modifiers.items():
            self.encode_modifier(record, key, text)
        if "op_sel" in modifiers and not packed and "mfma" not in name and "_mix" not in name:
            record["op_sel"] = self.destination_select(record, modifiers["op_sel"])
        if "_mix" in name:
            self.encode_mixed_signs(record)

    def encode_mixed_signs(self, record: Any) -> None:
        """Write -x and |x| as neg_lo and neg_hi: the sign's place depends on the width."""
        for k in range(1, int(record["nargs"])):
            flags = int(record["args"][k]["flags"])
            record["neg_lo"] |= bool(flags & NEG) << (k - 1)
            record["neg_hi"] |= bool(flags & ABS) << (k - 1)
            record["args"][k]["flags"] = flags & ~(NEG | ABS)

    def destination_select(self, record: Any, text: str) -> int:
        """With one entry more than sources, the last one is the destination's: bit 3."""
        bits = bit_list(text)
        sources = int(record["nargs"]) - 1
        if len(bits) == sources + 1:
            return pack_bits(bits[:-1]) | bits[-1] << 3
        return pack_bits(bits)

    def encode_modifier(self, record: Any, key: str, text: str) -> None:
        """Fill the field of one modifier."""
        if key in ("op_sel", "op_sel_hi", "neg_lo", "neg_hi"):
            record[key] = pack_bits(bit_list(text))
        elif key in ("offset", "offset0"):
            record["offset"] = swizzle(text) if text.startswith("swizzle") else self.number(text)
        elif key in ("mul", "div"):
            record["omod"] = 3 if key == "div" else {"2": 1, "4": 2}[text]
        elif key in ("dst_sel", "src0_sel", "src1_sel"):
            record[key] = PARTS[text]
        elif key == "dst_unused":
            record[key] = UNUSED[text]
        elif key == "bound_ctrl":
            record[key] = 1
        elif key == "bitop3":
            record["truth_table"] = self.number(text)
        elif key in ("sc0", "glc"):
            record["returns"] = 1
        elif (control := dpp_control(key, text)) is not None:
            record["dpp"] = control
        elif key in MODIFIER_FIELDS:
            record[key] = self.number(text)
        elif key not in IGNORED:
            raise ValueError(f"modifier {key}:{text} is not modelled")

    def number(self, text: str) -> int:
        """An immediate of a modifier."""
        return evaluate(text, self.assembly.symbols)


def wait_counts(operands: Sequence[str]) -> tuple[int, int]:
    """vmcnt and lgkmcnt of an s_waitcnt; -1 where the counter is not waited for."""
    text = " ".join(operands)
    if NUMBER.match(text.strip()):
        bits = int(text, 0)
        vm, lgkm = (bits & 15) | (bits >> 14 & 3) << 4, bits >> 8 & 15
        return (-1 if vm == 63 else vm), (-1 if lgkm == 15 else lgkm)
    counts = {name: int(value, 0) for name, value in re.findall(r"(\w+)\((\w+)\)", text)}
    return counts.get("vmcnt", -1), counts.get("lgkmcnt", -1)


def bit_list(text: str) -> list[int]:
    """The numbers of `[0,1,1]`."""
    return [int(bit) for bit in text.strip("[]").split(",")]


def pack_bits(bits: Sequence[int]) -> int:
    """Bit i of the result is bits[i]."""
    return sum(bit << i for i, bit in enumerate(bits))


def dpp_control(key: str, text: str) -> int | None:
    """The DPP control field of a modifier, or None when it is none."""
    if key == "quad_perm":
        return sum(lane << 2 * i for i, lane in enumerate(bit_list(text)))
    if key in DPP_WITH_COUNT:
        return DPP_WITH_COUNT[key] + int(text)
    if key in DPP_WAVE:
        return DPP_WAVE[key]
    if key == "row_bcast":
        return {"15": 0x142, "31": 0x143}[text]
    return {"row_mirror": 0x140, "row_half_mirror": 0x141}.get(key)


def swizzle(text: str) -> int:
    """The offset field of ds_swizzle_b32 for an expression such as `swizzle(SWAP,16)`."""
    mode, *values = [part.strip() for part in text[len("swizzle(") : -1].split(",")]
    if mode == "QUAD_PERM":
        return 0x8000 | sum(int(lane) << 2 * i for i, lane in enumerate(values))
    if mode == "BITMASK_PERM":
        pattern = values[0].strip('"')
        fields = {"0": (0, 0, 0), "1": (0, 1, 0), "p": (1, 0, 0), "i": (1, 0, 1)}
        masks = [0, 0, 0]
        for character in pattern:
            masks = [mask << 1 | bit for mask, bit in zip(masks, fields[character], strict=True)]
        return masks[0] | masks[1] << 5 | masks[2] << 10
    size = int(values[0])
    if mode == "BROADCAST":
        return (32 - size) | int(values[1]) << 5
    return 31 | (size if mode == "SWAP" else size - 1) << 10  # REVERSE
