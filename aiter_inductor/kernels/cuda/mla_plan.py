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
# On an H200 eight sequences of 512 keys and 128 heads take mla_few.cu 15.5 us, mla.cu 12.7; one of
# 8400 keys and 16 heads, in 66 clusters, 14.4 and 12.9.
_FEW_SEQUENCES, _FEW_ROW_BLOCKS, _FEW_CLUSTERS = 4, 8, 33
_TILES_TO_SHARE = 32  # from which two blocks of rows share them: 7.7 us for 8.4; with 8 7.7 for 7.5
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


@dataclass(frozen=True)
class FewPlan:
    """How mla_few.cu cuts sequences that all have so few tiles that each block has one.

    Attributes:
        blocks: of 64 rows in a cluster, 1 or 2.
        key_blocks: tiles of keys of a cluster, whose weights its blocks exchange.
        groups: of so many blocks of rows.
        clusters: of a sequence and such a group.
    """

    blocks: int
    key_blocks: int
    groups: int
    clusters: int

    @property
    def cluster_blocks(self) -> int:
        """Blocks of a cluster."""
        return self.blocks * self.key_blocks


@lru_cache(maxsize=4096)
def few_plan(sequences: int, rows: int, tiles: int, processors: int) -> FewPlan | None:
    """The plan of few keys; None where `best_plan` is faster or not all clusters run at once.

    Args:
        sequences: some.
        rows: heads times new tokens, of each sequence.
        tiles: of 64 keys, of each sequence.
        processors: that hold one block each.
    """
    row_blocks = math.ceil(rows / ROWS)
    if sequences > _FEW_SEQUENCES or sequences * row_blocks > _FEW_ROW_BLOCKS:
        return None
    for key_blocks in (2, 4):
        for blocks in (2, 1) if tiles >= _TILES_TO_SHARE else (1, 2):
            groups, clusters = row_blocks // blocks, math.ceil(tiles / key_blocks)
            plan = FewPlan(blocks, key_blocks, groups, clusters)
            room = _side_by_side(plan.cluster_blocks, processors)
            fits = clusters <= _FEW_CLUSTERS and sequences * groups * clusters <= room
            if row_blocks % blocks == 0 and fits:
                return plan
    return None


def _side_by_side(cluster_blocks: int, processors: int) -> int:
    """Clusters that run at once, a block on each processor; pairs of these go together."""
    room = processors if cluster_blocks == 2 else processors * 10 // 11  # of 132 on an H200: 120
    return room // cluster_blocks


@lru_cache
def processors(device: torch.device) -> int:
    """How many blocks run side by side."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
