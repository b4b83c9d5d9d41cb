"""The ranks among themselves, apart from the body's collectives: values, barriers, CPU sums."""

from __future__ import annotations

import hmac
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fedbert_ds.server.body.distributed import PATIENCE
from fedbert_ds.server.rank_messages import RankMessages, RankSecret

T = TypeVar("T")

FIRST_BYTES = 4096
"""Of each rank's message, with its length: what crosses at once. Nearly all are shorter."""
LENGTH_BYTES = 8
MOST_BYTES = 1 << 30
"""Of a message: a rank that says more is none of this run's."""


class RankGroup:
    """A gloo group of all ranks, apart from the body's backend. Values are signed.

    Raises ConfigError where `secret` cannot be read.
    """

    def __init__(self, secret: RankSecret) -> None:
        if dist.get_rank() == 0:
            secret.offer()
        # No rank has a group before rank 0 joins it.
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.update_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        """A second group, for a thread beside the body: within one group, all ranks must run their
        operations in the same order."""
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        key = secret.read()
        self._messages = RankMessages(key)
        # The groups count their exchanges apart; what is said in one is no word in the other.
        self._messages_beside = RankMessages(hmac.digest(key, b"beside the body", "sha256"))
        self.barrier()
        if self.rank == 0:
            secret.remove()

    def gather(self, mine: T, kind: Any) -> list[T]:
        """The values of all ranks, in order. All ranks call it, with the same type.

        WireError for a message that is no rank's of this run.
        """
        return self._gather(self._messages, self.group, mine, kind)

    def gather_beside(self, mine: T, kind: Any) -> list[T]:
        """As `gather`, in the thread beside the body."""
        return self._gather(self._messages_beside, self.update_group, mine, kind)

    def broadcast(self, from_rank_0: T | None, kind: Any) -> T:
        """Rank 0's value. The other ranks pass None. As `gather`."""
        self._messages.begin()
        texts = self._exchange(self._messages.pack(from_rank_0, kind, 0) if self.rank == 0 else b"", self.group)
        value: T = self._messages.unpack(texts[0], kind, 0)
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.group)

    def _gather(self, messages: RankMessages, group: Any, mine: T, kind: Any) -> list[T]:
        messages.begin()
        texts = self._exchange(messages.pack(mine, kind, self.rank), group)
        return [messages.unpack(text, kind, sender) for sender, text in enumerate(texts)]

    def _exchange(self, mine: bytes, group: Any) -> list[bytes]:
        """The bytes of all ranks, in order."""
        size = len(mine).to_bytes(LENGTH_BYTES, "big")
        heads = self._gathered(size + mine, FIRST_BYTES, group)
        sizes = [int.from_bytes(head[:LENGTH_BYTES], "big") for head in heads]
        longest = max(sizes)
        if longest > MOST_BYTES:
            sizes = [0] * len(sizes)  # then no signature is right
        elif longest > FIRST_BYTES - LENGTH_BYTES:
            heads = self._gathered(size + mine, LENGTH_BYTES + longest, group)
        return [head[LENGTH_BYTES : LENGTH_BYTES + size] for head, size in zip(heads, sizes, strict=True)]

    def _gathered(self, mine: bytes, width: int, group: Any) -> list[bytes]:
        """The first `width` bytes of every rank's."""
        sent = torch.zeros(width, dtype=torch.uint8)
        part = mine[:width]
        sent[: len(part)] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
        received: list[Tensor] = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(received, sent, group=group)
        return [tensor.numpy().tobytes() for tensor in received]
