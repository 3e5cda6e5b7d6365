"""Integer tensors that are affine in their indices, and conditions on them.

A mask that a model builds from `arange`s holds at `[b, h, i, j]` a comparison such as
`j <= i + 5`. Kept as coefficients, such a tensor can be read without being computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import fx

from aiter_inductor.core.graph import size
from aiter_inductor.core.problem import Dim


@dataclass(frozen=True)
class Affine:
    """An integer tensor: `constant + sum(coefficients[d] * index[d])`.

    Dimensions of size 1 have the coefficient 0.
    """

    coefficients: tuple[int, ...]
    constant: Dim

    def __add__(self, other: Affine) -> Affine:
        left, right = aligned(self.coefficients, other.coefficients)
        summed = tuple(a + b for a, b in zip(left, right, strict=True))
        return Affine(summed, self.constant + other.constant)

    def __mul__(self, factor: int) -> Affine:
        return Affine(tuple(factor * c for c in self.coefficients), factor * self.constant)

    def __neg__(self) -> Affine:
        return self * -1

    def __sub__(self, other: Affine) -> Affine:
        return self + -other

    def plus(self, number: int) -> Affine:
        """The tensor with `number` added everywhere."""
        return Affine(self.coefficients, self.constant + number)

    @property
    def is_constant(self) -> bool:
        """Whether every element is equal."""
        return not any(self.coefficients)

    def least(self, shape: tuple[Dim, ...]) -> Dim:
        """The smallest element of a tensor of this shape."""
        sizes = shape[len(shape) - len(self.coefficients) :]
        pairs = zip(self.coefficients, sizes, strict=True)
        return self.constant + sum(c * (n - 1) for c, n in pairs if c < 0)


@dataclass(frozen=True)
class Numbers:
    """An integer tensor: at each index, `offset` more than what `of` [B, S] holds at [row, token].

    What that is only the run knows.
    """

    of: fx.Node
    row: Affine
    token: Affine
    offset: Dim = 0

    def plus(self, number: Dim) -> Numbers:
        """The tensor with `number` added everywhere."""
        return replace(self, offset=self.offset + number)

    def is_beside(self, other: Numbers) -> bool:
        """Whether two tensors over [B, H, S, S] read one row of `of` each batch, and the same."""
        batch = size(self.of, 0)
        row = Affine((0 if batch == 1 else 1, 0, 0, 0), 0)
        return self.of is other.of and self.row == other.row == row


@dataclass(frozen=True)
class Condition:
    """A bool tensor: True where every atom is at least 0; without atoms True everywhere.

    Attributes:
        documents: nodes [B, S]; it is True at [b, h, i, j] only where tokens i and j of row b have
            one number in each.
        stepping: nodes [B, S]; the atoms hold where each rises by one a token in every document.
    """

    atoms: frozenset[Affine] = frozenset()
    documents: frozenset[fx.Node] = frozenset()
    stepping: frozenset[fx.Node] = frozenset()

    def __and__(self, other: Condition) -> Condition:
        return Condition(
            self.atoms | other.atoms,
            self.documents | other.documents,
            self.stepping | other.stepping,
        )

    @property
    def reads_numbers(self) -> bool:
        """Whether something that only the run knows decides it."""
        return bool(self.documents or self.stepping)

    def inverted(self) -> Condition | None:
        """True where this is False, if that is one comparison too."""
        if len(self.atoms) > 1 or self.reads_numbers:
            return None
        return Condition(frozenset(-atom.plus(1) for atom in self.atoms)) if self.atoms else FALSE

    @property
    def is_false(self) -> bool:
        """Whether no element is True, as some atom is a negative constant."""
        return any(a.is_constant and negative(a.constant) for a in self.atoms)


@dataclass(frozen=True)
class Additive:
    """A float tensor: 0 where `seen`, elsewhere the lowest number or minus infinity."""

    seen: Condition


Value = Affine | Numbers | Condition | Additive
TRUE = Condition()
FALSE = Condition(frozenset({Affine((), -1)}))


def at_least_zero(*atoms: Affine) -> Condition:
    """The condition that all of `atoms` are at least 0, without those that always are."""
    return Condition(frozenset(a for a in atoms if not (a.is_constant and positive(a.constant))))


def positive(number: Dim) -> bool:
    """Whether `number` is provably at least 0."""
    return number >= 0 if isinstance(number, int) else bool(number.is_nonnegative)


def negative(number: Dim) -> bool:
    """Whether `number` is provably below 0."""
    return number < 0 if isinstance(number, int) else bool(number.is_negative)


def aligned(left: Iterable[int], right: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Coefficients of two tensors that broadcast, as of tensors with equally many dimensions."""
    a, b = tuple(left), tuple(right)
    ndim = max(len(a), len(b))
    return (0,) * (ndim - len(a)) + a, (0,) * (ndim - len(b)) + b
