"""A weight of one byte an element, between rows and the tiles of 16 x 16 that CDNA kernels read."""

from __future__ import annotations

from torch import Tensor

TILE = 16


def in_tiles(weight: Tensor) -> Tensor:
    """A weight [N, K] as [N / 16, 16 K]: bands of 16 rows, in each 16 x 16 elements at a time."""
    tiles: Tensor = weight.unflatten(0, (-1, TILE)).unflatten(-1, (-1, TILE)).transpose(1, 2)
    return tiles.flatten(1)


def in_rows(tiles: Tensor) -> Tensor:
    """The weight [N, K] that `in_tiles` laid out."""
    split: Tensor = tiles.unflatten(1, (-1, TILE, TILE)).transpose(1, 2)
    return split.flatten(2).flatten(0, 1)
