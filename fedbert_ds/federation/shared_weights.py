"""The weights all clients had in common after the last average; a client sends the change since.

A change is small and survives a coarse codec where whole weights would not. The rounding error of
each change is added to the next one (error feedback, Seide et al. 2014; Karimireddy et al. 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.wire import fedbert_pb2 as pb


class SharedWeights:
    """The last common weights and the rounding error still to be sent, fp32 on the CPU.

    `shapes` are those of the averaged parameters.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], codec: str, *, compressed: bool = False) -> None:
        self._shapes = dict(shapes)
        self._codec, self._compressed = codec, compressed
        self._common: dict[str, Tensor] = {}
        self._error: dict[str, Tensor] = {}

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Start from the weights that every client received."""
        self._common = {name: weights[name].detach().cpu().clone() for name in self._shapes}
        self._error = {}

    def changes(self, window: int, weights: Mapping[str, Tensor], weight: float) -> Iterator[pb.UpdateChunk]:
        """The change since the last average, as chunks, all of which must be taken."""
        wanted = {}
        for name, common in self._common.items():
            wanted[name] = weights[name].detach().cpu() - common
            # The old error goes as the new change comes: each is as large as the weights.
            if (error := self._error.pop(name, None)) is not None:
                wanted[name] += error
        if self._codec == "fp32":  # nothing is rounded, and a whole model of zeros is not kept
            yield from update_chunks(window, wanted.items(), weight, self._codec, compressed=self._compressed)
            return
        # The server's own code decodes, so that the error is exactly what the server misses.
        server = UpdateAssembler(self._shapes, "this client's update", self._codec)
        for chunk in update_chunks(window, wanted.items(), weight, self._codec, compressed=self._compressed):
            decoded = server.add(chunk)
            if decoded is not None:
                self._error = {name: wanted[name].sub_(sent) for name, sent in decoded.tensors.items()}
            yield chunk

    def apply(self, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new common weights: the old ones plus the average of all clients' changes.

        They are these weights' own tensors, which the next call changes.
        """
        for name, common in self._common.items():
            common.add_(average[name])
        return dict(self._common)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"common": self._common, "owed": self._error}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s content."""
        self._common, self._error = dict(state["common"]), dict(state["owed"])
