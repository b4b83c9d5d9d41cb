"""What clients report of a window that they train by themselves, held against their manifests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import Manifest, check_loss


@dataclass
class Trained:
    """Sums over the clients of a rank that have trained a window."""

    loss_sum: float = 0.0
    """Cross-entropies of all masked tokens, nats."""
    tokens: int = 0
    masked_tokens: int = 0
    losses: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Cross-entropies and masked tokens by client."""
    lost_masked_tokens: int = 0
    """Of clients that are gone before they had trained theirs."""


class Reports:
    """Collects the reports of one window at a time; with a body there are none.

    A client reports part by part, so that a long window does not look like silence.
    """

    def __init__(self) -> None:
        self._window = -1
        self._awaited: dict[str, Manifest] = {}
        self._so_far: dict[str, tuple[float, int, int]] = {}
        """Loss sum and masked tokens of the parts that each awaited client has reported, and how
        many parts.
        """
        self._trained = Trained()

    def begin(self, window: int, manifests: Iterable[Manifest]) -> None:
        """Await the reports of these clients on `window`."""
        self._window, self._trained = window, Trained()
        self._awaited = {manifest.client: manifest for manifest in manifests}
        self._so_far = dict.fromkeys(self._awaited, (0.0, 0, 0))

    @property
    def awaited(self) -> frozenset[str]:
        """Clients that have not trained the window yet."""
        return frozenset(self._awaited)

    def receive(self, client: str, report: pb.Trained) -> bool:
        """Take a report in; True for a client's last one.

        Raises WireError for one that is not awaited or does not fit the manifest.
        """
        who = f"client {client}: report of window {report.window}"
        manifest = self._awaited.get(client)
        if manifest is None or report.window != self._window:
            raise WireError(f"{who}, which was not asked for")
        check_loss(report.loss_sum, report.masked_tokens, who)
        loss_sum, masked, parts = self._so_far[client]
        loss_sum, masked, parts = loss_sum + report.loss_sum, masked + report.masked_tokens, parts + 1
        if parts > len(manifest.lengths):
            raise WireError(f"{who}: {parts} parts of {len(manifest.lengths)} sequences")
        announced = sum(manifest.masked)
        if masked > announced or (report.last and masked != announced):
            raise WireError(f"{who}: {masked} masked tokens instead of {announced}")
        self._so_far[client] = loss_sum, masked, parts
        if report.last:
            del self._awaited[client]
            self._trained.loss_sum += loss_sum
            self._trained.masked_tokens += masked
            self._trained.losses[client] = loss_sum, masked
            self._trained.tokens += sum(manifest.lengths)
        return report.last

    def drop(self, client: str) -> None:
        """A client is gone; what it had not trained to the end is lost."""
        if (manifest := self._awaited.pop(client, None)) is not None:
            self._trained.lost_masked_tokens += sum(manifest.masked)

    def take(self) -> Trained:
        """The sums of the window, once; later calls give zeros."""
        trained, self._trained = self._trained, Trained()
        return trained
