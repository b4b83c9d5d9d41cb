"""Parameters whose elements lie in flat tensors of several ranks, as ZeRO leaves them: whose are
which, sums over whole parameters, and whole matrices brought together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Consecutive elements of a parameter, and where one rank's flat tensor has them."""

    parameter: int
    """Its number among those of the flat tensor, the same on every rank."""
    start: int
    """First element, of the flattened parameter."""
    offset: int
    """Where they begin in the flat tensor."""
    length: int


@dataclass(frozen=True)
class Partition:
    """The parameters of one flat tensor of this rank, and of the other ranks' like it.

    Every rank has the same `shapes` and `slices`. The rest of a flat tensor is padding.
    """

    shapes: Sequence[Shape]
    """By parameter."""
    slices: Sequence[Sequence[Slice]]
    """By rank."""
    rank: int
    device: torch.device
    """Where tensors must be to cross ranks."""

    @property
    def own(self) -> Sequence[Slice]:
        """This rank's slices."""
        return self.slices[self.rank]

    def views(self, flat: Tensor) -> list[Tensor]:
        """`own` of a flat tensor, each one-dimensional; they share its memory."""
        return [flat[part.offset : part.offset + part.length] for part in self.own]

    def sums(self, of_slices: Tensor) -> Tensor:
        """Each number of `own` becomes the sum over all slices of its parameter, on every rank.

        `of_slices` is [n, slices]. One all-reduce: every rank calls it.
        """
        parameters = torch.tensor([part.parameter for part in self.own], dtype=torch.int64).to(of_slices.device)
        sums = of_slices.new_zeros(len(of_slices), len(self.shapes)).index_add_(1, parameters, of_slices)
        crossing = sums.to(self.device)
        torch.distributed.all_reduce(crossing)
        return crossing.to(sums.device)[:, parameters]


class WholeMatrices:
    """Deals the matrices of a partition out to ranks, to work on whole ones, and takes them back.

    Two exchanges, in each of which a rank sends its share of the matrices and gets others': as
    Liu et al. 2025, "Muon is Scalable for LLM Training", gather momentum, but to one rank each.
    """

    def __init__(self, partition: Partition) -> None:
        ranks = len(partition.slices)
        self._partition = partition
        self._owners = deal(partition.shapes, ranks)
        # What goes to each rank, and comes from each, in the order of the sender's slices.
        self._given = [
            [part for part in partition.own if self._owners[part.parameter] == other] for other in range(ranks)
        ]
        self._got = [
            [part for part in slices if self._owners[part.parameter] == partition.rank] for slices in partition.slices
        ]

    def gather(self, flat: Tensor) -> dict[int, Tensor]:
        """This rank's matrices by number, each [R, C], of a flat tensor; every rank calls it."""
        shapes, rank = self._partition.shapes, self._partition.rank
        numbers = [number for number, owner in enumerate(self._owners) if owner == rank]
        sizes = [math.prod(shapes[number]) for number in numbers]
        mine = dict(zip(numbers, flat.new_empty(sum(sizes)).split(sizes), strict=True))
        self._exchange(_of_flat(flat, self._given), self._given, _of_whole(mine, self._got), self._got, flat)
        return {number: matrix.view(shapes[number]) for number, matrix in mine.items()}

    def scatter(self, matrices: Mapping[int, Tensor], flat: Tensor) -> None:
        """The reverse of `gather`, into a flat tensor, whose padding stays; every rank calls it."""
        flattened = {number: matrix.reshape(-1) for number, matrix in matrices.items()}
        self._exchange(_of_whole(flattened, self._got), self._got, _of_flat(flat, self._given), self._given, flat)

    def _exchange(
        self,
        sent: Sequence[Tensor],
        given: Sequence[Sequence[Slice]],
        received: Sequence[Tensor],
        got: Sequence[Sequence[Slice]],
        like: Tensor,
    ) -> None:
        """Send pieces to ranks, and fill others with theirs; in the order of slices, by rank."""
        going = torch.cat([*sent, like.new_empty(0)]).to(self._partition.device)
        come = going.new_empty(sum(map(len, received)))
        torch.distributed.all_to_all_single(come, going, [_length(to) for to in got], [_length(to) for to in given])
        if received:
            torch._foreach_copy_(list(received), list(come.to(like.device).split([len(piece) for piece in received])))


def _of_flat(flat: Tensor, by_rank: Sequence[Sequence[Slice]]) -> list[Tensor]:
    return [flat[part.offset : part.offset + part.length] for slices in by_rank for part in slices]


def _of_whole(matrices: Mapping[int, Tensor], by_rank: Sequence[Sequence[Slice]]) -> list[Tensor]:
    """Of flattened matrices, by number."""
    return [matrices[part.parameter][part.start : part.start + part.length] for slices in by_rank for part in slices]


def deal(shapes: Sequence[Shape], ranks: int) -> list[int]:
    """A rank for each matrix, so that all have about as much to orthogonalize.

    The costliest first, each to whoever has least; a matrix costs its elements times its smaller
    side.
    """
    costs = [math.prod(shape) * min(shape) for shape in shapes]
    owners, loads = [0] * len(shapes), [0] * ranks
    for number in sorted(range(len(shapes)), key=lambda n: (-costs[n], n)):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


def _length(slices: Sequence[Slice]) -> int:
    return sum(part.length for part in slices)
