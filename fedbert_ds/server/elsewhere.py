"""An aggregator of another party, from its opening to its return after a loss."""

from __future__ import annotations

import threading

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError, UserError
from fedbert_ds.server.addresses import tls_of
from fedbert_ds.server.control_line import ControlLine, open_run
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.wire import fedbert_pb2 as pb


class Elsewhere:
    """The line of this rank to the aggregator, and rank 0's search for one that is lost.

    `vocabulary` and `shape_hash` are those of the run's model. The first `open` and `stop` embrace
    all other calls.
    """

    def __init__(
        self, config: RunConfig, rank_group: RankGroup, vocabulary: int, pad_token: int, shape_hash: str
    ) -> None:
        assert config.aggregator is not None
        self._config, self._address = config, config.aggregator.address
        self._rank_group = rank_group
        self._model = vocabulary, pad_token, shape_hash
        self._line: ControlLine | None = None
        self._search: threading.Thread | None = None
        self._found: bytes | UserError = b""
        """What the search came to."""

    def open(self, resume: bool) -> frozenset[int]:
        """Name the run to the aggregator, and dial it; windows that it has saved. All ranks call
        it.

        Waits `clients.join_timeout` s to reach it. Raises WireError if it refuses, or does not
        answer.
        """
        opened = self._open(resume) if self._rank_group.rank == 0 else None
        return self._dial(self._rank_group.broadcast(opened, bytes))

    def send(self, order: pb.Order) -> None:
        """Queue an order."""
        self._dialled.send(order)

    def take(self, timeout: float = 0.0) -> pb.Report | None:
        """The oldest report, waiting up to `timeout` s. Raises AggregatorLost when no more come."""
        return self._dialled.take(timeout)

    def opened_again(self) -> bytes:
        """Look for the aggregator that is lost, in a thread: what it answers once it is back, for
        every rank's `reopen`, and nothing until then. Rank 0 calls it. Raises as `open`.
        """
        if self._search is None:
            self._found = b""
            self._search = threading.Thread(target=self._look, name="search for the aggregator", daemon=True)
            self._search.start()
        if isinstance(self._found, UserError):
            raise RunError(f"the aggregator did not come back: {self._found}")
        return self._found

    def reopen(self, opened: bytes, window: int) -> None:
        """Dial the aggregator that is back, for a run that goes on before `window`.

        Raises RunError if it has not saved that.
        """
        self._search = None
        saved = self._dial(opened)
        if window and window not in saved:
            has = ", ".join(map(str, sorted(saved))) or "none"
            raise RunError(
                f"the aggregator at {self._address} came back without the client model of window {window} (it has "
                f"{has}); give it its folder back, then start both with --resume"
            )

    def stop(self) -> None:
        """Hang up after what was sent."""
        if self._line is not None:
            self._line.stop()

    @property
    def _dialled(self) -> ControlLine:
        assert self._line is not None
        return self._line

    def _open(self, resume: bool) -> bytes:
        opened = open_run(self._config, self._rank_group.world_size, *self._model, resume)
        return opened.SerializeToString()

    def _dial(self, opened: bytes) -> frozenset[int]:
        self.stop()
        answer = pb.Opened.FromString(opened)
        rank, timeout = self._rank_group.rank, self._config.clients.reconnect_timeout
        self._line = ControlLine(self._address, tls_of(self._config.server.tls), rank, answer.sessions[rank], timeout)
        self._line.start()
        return frozenset(answer.saved_windows)

    def _look(self) -> None:
        try:
            self._found = self._open(resume=True)
        except UserError as error:
            self._found = error
