"""A run's metrics: one JSON line per window, read back for reports and resumed runs.

Knows nothing of how the figures are measured; whoever runs the window fills in a WindowMetrics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import RunError


@dataclass(frozen=True)
class WindowMetrics:
    """One optimizer step, over all ranks and clients."""

    window: int
    """0-based number of the window."""
    loss: float
    """Cross-entropy in nats per masked token."""
    tokens: int
    """Real tokens that went through the body; nothing is padded."""
    masked_tokens: int
    """Tokens whose prediction made the loss."""
    lost_masked_tokens: int
    """Masked tokens that were promised and left out because their client was late or gone."""
    seconds: float
    """Wall time since the end of the window before; mean over ranks, as are its parts."""
    busy_seconds: float
    """Part of `seconds` the body computed: forwards, backwards, the step."""
    wait_seconds: float
    """Part of `seconds` the rank waited for clients."""
    forwards: int
    """Forward passes, over all ranks."""
    backwards: int
    """Backward passes, over all ranks."""
    dummy_micro_batches: int
    """Micro-batches without weight, which keep ranks in lockstep."""
    fill: float
    """Tokens divided by the capacity of the micro-batches that are not dummies."""
    bytes_up: int
    """Bytes from clients: activations, gradients, manifests."""
    bytes_down: int
    """Bytes to clients: hidden states, gradients."""
    update_bytes_up: int
    """Bytes from clients as client updates; whole halves at the end of a run are left out."""
    update_bytes_down: int
    """Bytes to clients as combined updates; the reference they begin with is left out."""
    clients: int
    """Clients that were connected, whether they took part or not."""
    learning_rate: float
    """Learning rate of the step."""
    # Those below are missing from files of earlier versions.
    rank_wait_seconds: float = 0.0
    """Part of `seconds` the rank waited for other ranks; within forwards and backwards, where ranks
    meet at ZeRO stage 3, it counts as computing."""
    saving_seconds: float = 0.0
    """Part of `seconds` that saves took, without waits for clients."""
    host_seconds: float = 0.0
    """The rest of `seconds`: the host packs, decodes, launches, keeps books."""
    evaluation_seconds: float = 0.0
    """Part of `seconds` that an evaluation before the window took, with its waits."""
    evaluation_bytes: int = 0
    """Bytes of that evaluation, both ways; not among the others."""
    flops: float = 0.0
    """Floating-point operations of the body's matrix products, over all ranks; what is computed
    again, for want of memory, is not counted."""
    recompiles: int = 0
    """Graphs that torch.compile made on all ranks while they should have computed; 0 is right."""
    bounded: int = 0
    """What clients sent that `federation.bound` scaled down: pieces and updates; 0 is right."""
    outlying_losses: int = 0
    """Clients whose reported loss is far from the others'; it is left out of `loss`."""

    @property
    def wire_bytes(self) -> int:
        """All bytes of the window, both ways, averaging included."""
        return self.bytes_up + self.bytes_down + self.update_bytes_up + self.update_bytes_down


@dataclass(frozen=True)
class Summary:
    """Figures of consecutive windows. Shares lie between 0 and 1; without windows all are zero."""

    windows: int
    tokens: int
    seconds: float
    loss: float
    """Mean over the stretch, weighted by masked tokens; not a number when nothing was masked."""
    tokens_per_second: float
    busy_share: float
    """Of the time: the body computed. With the next five shares it makes one."""
    wait_share: float
    """Of the time: ranks waited for clients."""
    rank_wait_share: float
    saving_share: float
    evaluation_share: float
    host_share: float
    flops_per_second: float
    """Of all ranks together."""
    fill: float
    dummy_share: float
    lost_share: float
    """Masked tokens left out, of those promised."""
    bytes_per_token_up: float
    bytes_per_token_down: float
    update_bytes_per_token: float

    @property
    def bytes_per_token(self) -> float:
        """All bytes per token, both ways, averaging included."""
        return self.bytes_per_token_up + self.bytes_per_token_down + self.update_bytes_per_token


def summary(rows: Sequence[WindowMetrics]) -> Summary:
    """Sum windows up, each weighted by what it held."""
    tokens = sum(row.tokens for row in rows)
    masked = sum(row.masked_tokens for row in rows)
    lost = sum(row.lost_masked_tokens for row in rows)
    seconds = sum(row.seconds for row in rows)
    forwards = sum(row.forwards for row in rows)
    averaging = sum(row.update_bytes_up + row.update_bytes_down for row in rows)
    capacity = sum(row.tokens / row.fill for row in rows if row.fill > 0)
    told = [row for row in rows if row.masked_tokens and math.isfinite(row.loss)]
    loss = sum(row.loss * row.masked_tokens for row in told)
    return Summary(
        windows=len(rows),
        tokens=tokens,
        seconds=seconds,
        loss=_share(loss, sum(row.masked_tokens for row in told), math.nan),
        tokens_per_second=_share(tokens, seconds),
        busy_share=_share(sum(row.busy_seconds for row in rows), seconds),
        wait_share=_share(sum(row.wait_seconds for row in rows), seconds),
        rank_wait_share=_share(sum(row.rank_wait_seconds for row in rows), seconds),
        saving_share=_share(sum(row.saving_seconds for row in rows), seconds),
        evaluation_share=_share(sum(row.evaluation_seconds for row in rows), seconds),
        host_share=_share(sum(row.host_seconds for row in rows), seconds),
        flops_per_second=_share(sum(row.flops for row in rows), seconds),
        fill=_share(tokens, capacity),
        dummy_share=_share(sum(row.dummy_micro_batches for row in rows), forwards),
        lost_share=_share(lost, masked + lost),
        bytes_per_token_up=_share(sum(row.bytes_up for row in rows), tokens),
        bytes_per_token_down=_share(sum(row.bytes_down for row in rows), tokens),
        update_bytes_per_token=_share(averaging, tokens),
    )


class MetricsLog:
    """Appends windows to a file, one JSON line each, on disk before `append` returns.

    It drops lines from `first_window` on: those windows run again.
    """

    def __init__(self, path: Path, first_window: int = 0) -> None:
        self._path = path
        self._file = self._open(first_window)

    def roll_back(self, window: int) -> None:
        """Drop lines from `window` on, too."""
        self.close()
        self._file = self._open(window)

    def _open(self, first_window: int) -> TextIO:
        path = self._path
        kept = [row for row in read_metrics(path) if row.window < first_window] if path.is_file() else []
        write_text(path, "".join(map(_line, kept)))
        return path.open("a", encoding="utf-8")

    def append(self, metrics: WindowMetrics) -> None:
        """Write one window."""
        self._file.write(_line(metrics))
        self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[WindowMetrics]:
    """Read MetricsLog's file, less a last line cut short by a crash; RunError for other damage."""
    if not path.is_file():
        raise RunError(f"{path}: no such metrics file; name one that a run wrote")
    lines = path.read_text(encoding="utf-8").split("\n")
    complete, rest = lines[:-1], lines[-1]
    rows = [_parse(line, f"{path}:{number}") for number, line in enumerate(complete, 1)]
    if rest:
        try:
            rows.append(_parse(rest, str(path)))
        except RunError:
            return rows
    return rows


def _line(metrics: WindowMetrics) -> str:
    # NaN is no JSON: other readers of the file would stop there.
    values = {name: value if math.isfinite(value) else None for name, value in asdict(metrics).items()}
    return json.dumps(values, allow_nan=False) + "\n"


def _parse(line: str, place: str) -> WindowMetrics:
    try:
        values: dict[str, Any] = json.loads(line)
        if not _REQUIRED <= set(values) <= _NAMES:
            raise ValueError("fields differ")
        return WindowMetrics(**(values | {name: math.nan for name, value in values.items() if value is None}))
    except (ValueError, TypeError) as error:
        raise RunError(f"{place}: not a line of metrics; remove it or start another run directory") from error


def _share(part: float, whole: float, otherwise: float = 0.0) -> float:
    return part / whole if whole else otherwise


_NAMES = {field.name for field in fields(WindowMetrics)}
_REQUIRED = {field.name for field in fields(WindowMetrics) if field.default is MISSING}
