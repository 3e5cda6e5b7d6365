"""How latent attention on Hopper divides rows and caches among clusters of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

ROWS, KEYS = 64, 64
START_TILES = 2  # to begin with a sequence takes a cluster as long as so many tiles
MAX_CLUSTERS = 160  # whose parts of a sequence mla_reduce adds
_MANY = 256
_TILE_US, _REDUCE_US, _PARTS_PER_US = 1.4, 2.5, 2000  # of rows: written, read back, added


@dataclass(frozen=True)
class MlaPlan:
    """How rows and caches are cut; mla_schedule.h says what is done with it.

    Attributes:
        blocks: of 64 rows that share the tiles of keys in one cluster, 1 or 2.
        clusters: that work on the same rows of all sequences.
        least: places that each takes if there are so many.
    """

    blocks: int
    clusters: int
    least: int = 1


def share_of_cluster(sequences: int, tiles: int, plan: MlaPlan) -> int:
    """Places that a cluster takes of sequences that all have so many tiles."""
    return max(math.ceil(sequences * (START_TILES + tiles) / plan.clusters), plan.least)


@lru_cache(maxsize=4096)
def parts_of_sequences(sequences: int, tiles: int, plan: MlaPlan) -> int:
    """How many clusters have parts of one sequence, at most, where all have so many tiles.

    Of more than `_MANY` sequences it may be one less, unless it is 1.
    """
    places, share = START_TILES + tiles, share_of_cluster(sequences, tiles, plan)
    if share % places == 0:
        return 1
    if sequences > _MANY:
        return (tiles - 1) // share + 2
    first = (i * places + START_TILES for i in range(sequences))
    return max((tile + tiles - 1) // share - tile // share + 1 for tile in first)


@lru_cache(maxsize=4096)
def best_plan(sequences: int, rows: int, tiles: int, processors: int) -> MlaPlan:
    """The plan that is estimated to finish first, of sequences of the same length.

    Args:
        sequences: some.
        rows: heads times new tokens, of each sequence.
        tiles: of 64 keys, of each sequence.
        processors: that hold one block each.
    """
    row_blocks = math.ceil(rows / ROWS)
    blocks = 2 - row_blocks % 2
    most = min(max(processors // row_blocks, 1), MAX_CLUSTERS)

    def estimate_us(plan: MlaPlan) -> float:
        share = share_of_cluster(sequences, tiles, plan)
        parts = parts_of_sequences(sequences, tiles, plan)
        if parts == 1:
            return share * _TILE_US
        row_parts = rows * min(plan.clusters + sequences, sequences * parts)
        return share * _TILE_US + _REDUCE_US + row_parts / _PARTS_PER_US

    return min((MlaPlan(blocks, clusters) for clusters in range(1, most + 1)), key=estimate_us)


@lru_cache
def processors(device: torch.device) -> int:
    """How many blocks run side by side."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
