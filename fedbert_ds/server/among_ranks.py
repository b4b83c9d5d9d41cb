"""The client updates of all ranks, for a combiner on each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fedbert_ds.federation.averaging import combine
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.federation.combining import Shapes
from fedbert_ds.federation.influence import Vote
from fedbert_ds.server.rank_group import RankGroup


class AmongRanks:
    """Sources of `fedbert_ds.federation.combining` where each rank has its own clients' updates.

    All ranks make the same calls, from the thread beside the body.
    """

    def __init__(self, rank_group: RankGroup) -> None:
        self._ranks = rank_group
        self._clients: list[list[str]] = [[]]
        """Of each rank, in the window that is being combined."""

    def votes(self, mine: Mapping[str, Vote]) -> dict[str, Vote]:
        """The votes of all ranks' clients."""
        everybody = self._ranks.gather_beside(dict(mine), dict[str, Vote])
        self._clients = [sorted(votes) for votes in everybody]
        return {client: vote for votes in everybody for client, vote in votes.items()}

    def mean(self, mine: Mapping[str, ClientUpdate], shapes: Shapes, average: bool) -> dict[str, Tensor]:
        """As `combine`."""
        return combine(list(mine.values()), shapes, average=average, group=self._ranks.update_group)

    def stacked(self, mine: Mapping[str, Tensor], clients: Sequence[str]) -> Tensor:
        """[N, n] fp32 of one piece [n] of these clients' updates; `votes` has said whose they are.

        Every rank sends as many rows as the one with the most clients.
        """
        if self._ranks.world_size == 1:
            return torch.stack([mine[client] for client in clients])
        wanted = set(clients)
        of_rank = [[client for client in here if client in wanted] for here in self._clients]
        rows, size = max(map(len, of_rank)), torch.zeros(1, dtype=torch.int64)
        # A rank without clients does not know how long a piece is.
        size[0] = max((len(piece) for piece in mine.values()), default=0)
        dist.all_reduce(size, op=dist.ReduceOp.MAX, group=self._ranks.update_group)
        sent = torch.zeros(rows, int(size))
        for row, client in enumerate(of_rank[self._ranks.rank]):
            sent[row] = mine[client]
        received = [torch.empty_like(sent) for _ in of_rank]
        dist.all_gather(received, sent, group=self._ranks.update_group)
        row_of = {
            client: stack[row] for stack, here in zip(received, of_rank, strict=True) for row, client in enumerate(here)
        }
        return torch.stack([row_of[client] for client in clients])
