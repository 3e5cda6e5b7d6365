"""Parse AMDGCN assembly text into instructions with labels and source lines.

Understands what compilers print (Triton's `asm["amdgcn"]`, clang -S, llvm-objdump without
addresses) and hand-written text without macros; `.set` symbols may stand in register indices and
immediates. Text with `.macro` or `.rept` is flattened by
`python -m ziglang clang -cc1as -triple amdgcn-amd-amdhsa -target-cpu gfx950 -filetype asm`.
"""

from __future__ import annotations

import ast
import operator
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

INSTRUCTION = re.compile(r"^(s|v|ds|global|buffer|flat|scratch)_\w+")
LABEL = re.compile(r"^([.\w$@]+):\s*")
ENCODING = re.compile(r"_(e64_dpp|e32|e64|sdwa|dpp)$")
MATRIX_ALIAS = re.compile(r"^(v_mfma_[fi]32_\d+x\d+x\d+)(bf16_1k|f32|f16|i8)$")
MODIFIER = re.compile(r"(?<=[\s,])([a-z]\w*):(\[[^\]]*\]|swizzle\([^)]*\)|[^\s,]+)")
FLAGS = (
    "offen", "idxen", "lds", "sc0", "sc1", "nt", "glc", "slc", "clamp", "row_mirror",
    "row_half_mirror", "gds", "tfe",
)  # fmt: skip
FLAG = re.compile(rf"(?<![\w.])({'|'.join(FLAGS)})(?![\w:\[.])")
UNSUPPORTED_DIRECTIVES = (".macro", ".rept", ".irp", ".include", ".if")

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.floordiv, ast.Mod: operator.mod,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip


class AssemblyError(ValueError):
    """Assembly text that cannot be executed; the message starts with the line number."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of the text.

    Attributes:
        mnemonic: without encoding suffix (`v_add_f32` for `v_add_f32_e32`).
        encoding: that suffix (`e32`, `sdwa`, `dpp`, …) or "".
        operands: operand texts in order.
        modifiers: `offset:16` as {"offset": "16"}, a bare flag as {"offen": "1"}.
        line: 1-based line number in the assembly text.
        text: the line without its comment.
        source: `file:line` of the last `.loc`, or None.
    """

    mnemonic: str
    encoding: str
    operands: tuple[str, ...]
    modifiers: Mapping[str, str]
    line: int
    text: str
    source: str | None


@dataclass(frozen=True)
class Assembly:
    """A parsed text: instructions in order, label → instruction number, symbol → value."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)


def evaluate(expression: str, symbols: Mapping[str, int]) -> int:
    """The value of an integer expression over `symbols`.

    Raises:
        ValueError: a name without a value, or anything but integer arithmetic.
    """

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name) and node.id in symbols:
            return symbols[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return int(OPERATORS[type(node.op)](value(node.left), value(node.right)))
        raise ValueError(f"{expression!r} is not an integer expression of known symbols")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is not an integer expression") from error


def split_operands(text: str) -> list[str]:
    """Split at commas that are not inside brackets or parentheses."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part.strip() for part in [*parts, current] if part.strip()]


def canonical_mnemonic(word: str) -> tuple[str, str]:
    """Mnemonic without its encoding suffix and the suffix; old matrix names become new ones."""
    encoding = ""
    if match := ENCODING.search(word):
        encoding = match[1]
        word = word[: match.start()]
    if match := MATRIX_ALIAS.match(word):
        word = f"{match[1]}_{match[2].removesuffix('_1k')}"
    return word, encoding


def first_word(text: str) -> tuple[str, str]:
    """The first word and the rest, separated by blanks or tabs."""
    word, *rest = text.split(None, 1)
    return word, rest[0] if rest else ""


def parse_instruction(text: str, line: int, source: str | None) -> Instruction:
    """Split one instruction into mnemonic, operands and modifiers."""
    word, rest = first_word(text)
    mnemonic, encoding = canonical_mnemonic(word)
    modifiers: dict[str, str] = {}

    def take(match: re.Match[str]) -> str:
        modifiers[match[1]] = match[2]
        return " "

    def take_flag(match: re.Match[str]) -> str:
        modifiers[match[1]] = "1"
        return " "

    if not mnemonic.startswith(
        ("s_waitcnt", "s_setreg", "s_getreg", "s_sendmsg", "s_cbranch", "s_branch")
    ):
        rest = FLAG.sub(take_flag, MODIFIER.sub(take, rest))
    operands = tuple(split_operands(rest))
    return Instruction(mnemonic, encoding, operands, modifiers, line, text, source)


class _Parser:
    def __init__(self) -> None:
        self.result = Assembly()
        self.files: dict[str, str] = {}
        self.source: str | None = None

    def directive(self, statement: str, line: int) -> None:
        name, rest = first_word(statement)
        if name in UNSUPPORTED_DIRECTIVES:
            raise AssemblyError(
                f"line {line}: {name} is not expanded here; flatten the text first (README)"
            )
        if name == ".set":
            symbol, _, expression = rest.partition(",")
            self.define(symbol.strip(), expression)
        elif name == ".file" and (match := re.match(r"\s*(\d+)\s+(.*)", rest)):
            names = re.findall(r'"([^"]*)"', match[2])
            self.files[match[1]] = posixpath.join(*names[:2]) if names else match[1]
        elif name == ".loc" and (match := re.match(r"\s*(\d+)\s+(\d+)", rest)):
            self.source = f"{self.files.get(match[1], match[1])}:{match[2]}"

    def define(self, symbol: str, expression: str) -> None:
        # Compilers also set symbols to functions of other kernels' resources; nothing reads those.
        try:
            self.result.symbols[symbol] = evaluate(expression, self.result.symbols)
        except ValueError:
            self.result.symbols.pop(symbol, None)

    def statement(self, raw: str, line: int) -> None:
        text = re.sub(r"(;|//).*", "", raw).strip()
        while match := LABEL.match(text):
            self.result.labels[match[1]] = len(self.result.instructions)
            text = text[match.end() :]
        if INSTRUCTION.match(text):
            self.result.instructions.append(parse_instruction(text, line, self.source))
        elif text.startswith("."):
            self.directive(text, line)
        elif match := re.match(r"^(\w+)\s*=\s*(.+)$", text):
            self.define(match[1], match[2])


def parse(text: str) -> Assembly:
    """Parse assembly text.

    Raises:
        AssemblyError: the text holds macros.
    """
    parser = _Parser()
    in_metadata = False
    for number, raw in enumerate(text.split("\n"), start=1):
        if ".amdgpu_metadata" in raw:
            in_metadata = True
        elif ".end_amdgpu_metadata" in raw:
            in_metadata = False
        elif not in_metadata:
            parser.statement(raw, number)
    return parser.result
