"""Weights that all clients have in common, as of the last average: what is told of them is what changed since.

A difference is small and rounds well where whole weights would not. What rounding takes from it is kept and added to
the next one (error feedback, Seide et al. 2014; Karimireddy et al. 2019), so over time nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import UpdateAssembler, update_chunks


class SharedWeights:
    """The last common weights and what rounding owes them, fp32 on the CPU; `shapes` are those that are averaged."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], codec: str, *, compressed: bool = False) -> None:
        self._shapes = dict(shapes)
        self._codec, self._compressed = codec, compressed
        self._common: dict[str, Tensor] = {}
        self._owed: dict[str, Tensor] = {}

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Everybody begins with these."""
        self._common = {name: weights[name].detach().cpu().clone() for name in self._shapes}
        self._owed = {}

    def changes(self, window: int, weights: Mapping[str, Tensor], weight: float) -> Sequence[pb.UpdateChunk]:
        """What changed since the last average, as chunks."""
        wanted = {name: weights[name].detach().cpu() - self._common[name] for name in self._shapes}
        for name, owed in self._owed.items():
            wanted[name] += owed
        chunks = list(update_chunks(window, wanted.items(), weight, self._codec, compressed=self._compressed))
        # What the server will make of it, by the server's own code.
        server = UpdateAssembler(self._shapes, "this client's half", self._codec)
        for chunk in chunks:
            complete = server.add(chunk)
        assert complete is not None
        self._owed = {name: wanted[name] - came for name, came in complete[0].items()}
        return chunks

    def apply(self, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new common weights, after the average of everybody's changes."""
        self._common = {name: common + average[name] for name, common in self._common.items()}
        return dict(self._common)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"common": self._common, "owed": self._owed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        self._common, self._owed = dict(state["common"]), dict(state["owed"])
