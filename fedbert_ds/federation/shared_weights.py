"""The weights all clients had in common after the last average; a client sends the change since.

A change is small and survives a coarse codec where whole weights would not. The rounding error of
each change is added to the next one (error feedback, Seide et al. 2014; Karimireddy et al. 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.shelf import Shelf
from fedbert_ds.wire import fedbert_pb2 as pb


class SharedWeights:
    """The last common weights and the rounding error still to be sent, fp32.

    `shapes` are those of the averaged parameters. Between averages nothing needs these tensors:
    they wait in a temporary file in `folder`, or in the system's folder for such files.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], codec: str, *, compressed: bool = False, folder: Path | None = None
    ) -> None:
        self._shapes = dict(shapes)
        self._codec, self._compressed = codec, compressed
        self._common, self._error = Shelf(shapes, folder), Shelf(shapes, folder)

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Start from the weights that every client received."""
        self._common.put_all({name: weights[name] for name in self._shapes})
        self._error.put_all({})

    def changes(self, window: int, weights: Mapping[str, Tensor]) -> Iterator[pb.UpdateChunk]:
        """The change since the last average, as chunks, all of which must be taken."""
        wanted = {}
        for name in self._shapes:
            wanted[name] = weights[name].detach().cpu() - self._common.get(name)
            if not self._error.is_empty:
                wanted[name] += self._error.get(name)
        if self._codec == "fp32":  # nothing is rounded, and a whole model of zeros is not kept
            yield from update_chunks(window, wanted.items(), self._codec, compressed=self._compressed)
            return
        # The server's own code decodes, so that the error is exactly what the server misses.
        server = UpdateAssembler(self._shapes, "this client's update", self._codec)
        for chunk in update_chunks(window, wanted.items(), self._codec, compressed=self._compressed):
            decoded = server.add(chunk)
            if decoded is not None:
                self._error.put_all({name: wanted[name].sub_(sent) for name, sent in decoded.items()})
            yield chunk

    def apply(self, average: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The new common weights: the old ones plus the average of all clients' changes.

        One tensor at a time, by name; all must be taken.
        """
        for name in self._shapes:
            common = self._common.get(name).add_(average[name])
            self._common.put(name, common)
            yield name, common

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"common": self._common.get_all(), "owed": self._error.get_all()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s content."""
        self._common.put_all(state["common"])
        self._error.put_all(state["owed"])
