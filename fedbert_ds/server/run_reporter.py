"""A run's messages to its user: opening lines, progress, metrics, facts for the report."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fedbert_ds import __version__
from fedbert_ds.config import LayersCut, RunConfig
from fedbert_ds.model.body import Body
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.server.body.peak import Peak
from fedbert_ds.server.body.settings import zero_stage
from fedbert_ds.server.contract import RankStatus, Tally
from fedbert_ds.server.prepare import TextFacts
from fedbert_ds.server.run_folder import TRACKERS, RunFolder
from fedbert_ds.telemetry.evaluations import Evaluation, read_evaluations, write_evaluations
from fedbert_ds.telemetry.loss_comparison import LossComparison
from fedbert_ds.telemetry.metrics import MetricsLog, WindowMetrics, read_metrics, summary
from fedbert_ds.telemetry.progress import Progress, duration, short_number
from fedbert_ds.telemetry.trackers import Trackers, of_evaluation, of_window
from fedbert_ds.wire.channel import is_loopback


class RunReporter:
    """Prints and logs for the run, on rank 0 only."""

    def __init__(
        self, config: RunConfig, world_size: int, text: TextFacts | None, half: ClientHalf, body: Body | None
    ) -> None:
        self._config = config
        self._world_size = world_size
        self._text = text
        self._half_parameters = half.num_parameters
        self._body_parameters = None if body is None else body.num_parameters
        self._flops_per_token = (lambda mask_share, length: 0.0) if body is None else body.work.flops_per_token
        self._model_config = half.config
        self.peak: Peak | None = None
        """FLOP/s that all ranks together can reach, once they have measured it."""
        self.evaluations: tuple[Evaluation, ...] = ()
        """All that count."""
        self._log: MetricsLog | None = None
        self._progress: Progress | None = None
        self._told: Sequence[RankStatus] = ()
        """Whose problems were told last."""
        self._trackers = Trackers({}, print)
        self._losses = LossComparison()
        self._started = time.monotonic()

    def announce(self, address: str, cores: Collection[int] = ()) -> None:
        """Print the opening lines. Remote clients join at `address` (HOST:PORT). `cores` are those
        that this rank is bound to.
        """
        config, model = self._config, self._model_config
        backend = "cuda, nccl" if torch.cuda.is_available() else "cpu, gloo"
        print(
            f"FedBERT-DS {__version__}   {config.run.directory}   {self._world_size} ranks ({backend})   "
            f"{self._sharding()}   {config.clients.expected} clients, {_mode_name(config)}"
        )
        if self._text is not None:
            print(f"text    {self._text.sentence}")
        print(
            f"model   {model.model_type} {model.num_hidden_layers} x {model.hidden_size}, "
            f"{model.vocab_size:,} word pieces; cut: {_cut_name(config)}; "
            f"{self._sizes()}"
        )
        if cores:
            print(f"cores   {len(cores)} for rank 0, near its GPU: {_ranges(cores)}; {torch.get_num_threads()} threads")
        remote = config.clients.expected - config.clients.local
        if remote:
            shown = "--ca ca.pem --certificate NAME.pem --key NAME.key" if config.server.tls else "--id NAME"
            if config.server.plaintext and config.server.tls is None:
                shown += " --plaintext"
            print(f"clients waiting for {remote}: fedbert-ds client --server {address} --data PATH {shown}")
        if config.server.tls is None and not is_loopback(config.server.host):
            what = "activations" if self._body_parameters is not None else "changes of weights"
            print(f"warning server.tls is not set: {what} cross the network in the clear")
        if torch.cuda.is_available() and self._body_parameters is not None and config.body.precision == "fp32":
            print("warning body.precision is fp32: a GPU computes many times faster in bf16")
        sys.stdout.flush()

    @contextmanager
    def following(self, first_window: int) -> Iterator[None]:
        """Inside this block `window` writes metrics and shows progress."""
        self._started = time.monotonic()
        run, clients = self._config.run, self._config.clients
        measured = self.peak.measured if self.peak is not None else None
        folder, settings = RunFolder(run.directory), self._config.model_dump(mode="json")
        with (
            MetricsLog(folder.metrics, first_window) as self._log,
            Progress(run.windows, clients.expected, sys.stdout, peak_flops=measured) as self._progress,
            closing(
                Trackers.open(run.trackers, folder.path / TRACKERS, settings, self._progress.note)
            ) as self._trackers,
        ):
            yield

    def window(self, window: int, statuses: Sequence[RankStatus]) -> None:
        """Log and show a finished window, of all ranks. Does nothing outside `following`."""
        if self._log is None or self._progress is None:
            return
        config = self._config
        capacity = config.window.tokens_per_micro_batch
        rate = config.optimizer.learning_rate(window, config.run.windows)
        for sentence in self._losses.add(_losses(statuses)):
            self._progress.note(f"warning {sentence}")
        metrics = window_metrics(window, statuses, capacity, rate, self._flops_per_token, self._losses.outlying)
        self._log.append(metrics)
        self._tell_problems(statuses)
        self._progress.update(metrics)
        self._trackers.log(of_window(metrics), window)

    def waits(self, statuses: Sequence[RankStatus]) -> None:
        """Say for whom the run waits. Does nothing outside `following`."""
        if self._progress is None:
            return
        self._tell_problems(statuses)
        clients = self._config.clients
        absent = sorted(client for status in statuses for client in status.absent)
        lost_elsewhere = next((status.lost_elsewhere for status in statuses if status.lost_elsewhere), "")
        if lost_elsewhere:
            self._progress.note(f"{lost_elsewhere}; waiting for it, {clients.join_timeout:.0f} s at most")
        elif absent:
            self._progress.note(f"waiting for {', '.join(absent)}, {clients.join_timeout:.0f} s at most")
        else:
            here = sum(len(status.clients) for status in statuses)
            self._progress.note(
                f"waiting for clients, {clients.join_timeout:.0f} s at most: {here} are here, {clients.required} are "
                "needed (clients.minimum)"
            )

    def begin_at(self, window: int) -> tuple[Evaluation, ...]:
        """The evaluations of earlier sessions, of a run that goes on at `window`."""
        path = RunFolder(self._config.run.directory).evaluations
        self.evaluations = tuple(read_evaluations(path))
        self._forget_evaluations(window)
        return self.evaluations

    def evaluated(self, evaluations: Sequence[Evaluation]) -> None:
        """Log all evaluations, and show the last. Does nothing outside `following`."""
        if self._progress is None:
            return
        self.evaluations = tuple(evaluations)
        write_evaluations(RunFolder(self._config.run.directory).evaluations, self.evaluations)
        last = self.evaluations[-1]
        self._progress.evaluated(last.window, last.sentence)
        self._trackers.log(of_evaluation(last), last.window)
        if last.missing:
            self._progress.note(f"warning held-out loss before window {last.window} without {', '.join(last.missing)}")

    def _forget_evaluations(self, window: int) -> None:
        kept = tuple(evaluation for evaluation in self.evaluations if evaluation.window <= window)
        if kept != self.evaluations:
            self.evaluations = kept
            write_evaluations(RunFolder(self._config.run.directory).evaluations, kept)

    def _tell_problems(self, statuses: Sequence[RankStatus]) -> None:
        # A run that waits after a window gets the same statuses for both.
        if self._progress is not None and statuses is not self._told:
            self._told = statuses
            # What concerns the body is each rank's problem.
            for problem in dict.fromkeys(problem for status in statuses for problem in status.new_problems):
                self._progress.note(f"warning {problem}")

    def roll_back(self, window: int) -> None:
        """Forget the windows from `window` on: they run again. Does nothing outside `following`."""
        if self._log is not None:
            self._log.roll_back(window)
            self._forget_evaluations(window)

    def facts(self) -> dict[str, str]:
        """Versions, machine, model and duration: the first rows of the report's table."""
        config = self._config
        return {
            "version": f"FedBERT-DS {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            "machine": f"{self._world_size} ranks, {_device_name()}",
            "body": "none: clients hold the whole model"
            if self._body_parameters is None
            else f"{_millions(self._body_parameters)} parameters, {self._sharding()}, {config.body.precision}",
            "client half": f"{_millions(self._half_parameters)} parameters, cut: {_cut_name(config)}",
            "clients": f"{config.clients.expected}, {_mode_name(config)}",
            "text": self._text.sentence if self._text else "with the clients",
            "training time": f"{duration(time.monotonic() - self._started)} (this session)",
        } | ({} if self.peak is None else {"rate of the body": self._rate(self.peak)})

    def _rate(self, peak: Peak) -> str:
        totals = summary(read_metrics(RunFolder(self._config.run.directory).metrics))
        return rate_sentence(totals.flops_per_second, peak)

    def _sharding(self) -> str:
        return "no body" if self._body_parameters is None else f"ZeRO {zero_stage(self._config.body)}"

    def _sizes(self) -> str:
        if self._body_parameters is None:
            return f"{_millions(self._half_parameters)} parameters at each client"
        return f"body {_millions(self._body_parameters)} parameters, client half {_millions(self._half_parameters)}"


def window_metrics(
    window: int,
    statuses: Sequence[RankStatus],
    capacity: int,
    learning_rate: float,
    flops_per_token: Callable[[float, float], float],
    outlying: Collection[str] = (),
) -> WindowMetrics:
    """The metrics of one window, all ranks together. `capacity` is tokens per micro-batch,
    `flops_per_token` as `Body.flops_per_token`. The losses of `outlying` clients are left out.
    """
    tallies = [status.tally for status in statuses]

    def total(name: str) -> Any:
        return sum(getattr(tally, name) for tally in tallies)

    places = (total("forwards") - total("dummy_micro_batches")) * capacity
    tokens, masked = total("tokens"), total("masked_tokens")
    left_out = [loss for client, loss in _losses(statuses).items() if client in outlying]
    loss_sum = total("loss_sum") - sum(loss for loss, _ in left_out)
    believed = masked - sum(count for _, count in left_out)
    times = [time_parts(tally, min(each.step_seconds for each in tallies)) for tally in tallies]

    def mean(part: Callable[[TimeParts], float]) -> float:
        return sum(map(part, times)) / len(times)

    return WindowMetrics(
        window=window,
        loss=loss_sum / believed if believed else float("nan"),
        tokens=tokens,
        masked_tokens=masked,
        lost_masked_tokens=total("lost_masked_tokens"),
        seconds=total("seconds") / len(tallies),
        busy_seconds=mean(lambda parts: parts.busy),
        wait_seconds=mean(lambda parts: parts.clients),
        forwards=total("forwards"),
        backwards=total("backwards"),
        dummy_micro_batches=total("dummy_micro_batches"),
        fill=tokens / places if places else 0.0,
        bytes_up=total("bytes_up"),
        bytes_down=total("bytes_down"),
        update_bytes_up=total("update_bytes_up"),
        update_bytes_down=total("update_bytes_down"),
        clients=sum(len(status.clients) for status in statuses),
        learning_rate=learning_rate,
        rank_wait_seconds=mean(lambda parts: parts.ranks),
        saving_seconds=mean(lambda parts: parts.saving),
        evaluation_seconds=mean(lambda parts: parts.evaluating),
        host_seconds=mean(lambda parts: parts.host),
        evaluation_bytes=total("evaluation_bytes"),
        flops=flops_per_token(masked / tokens, total("squared_lengths") / tokens) * tokens if tokens else 0.0,
        recompiles=total("recompiles"),
        bounded=total("bounded"),
        outlying_losses=len(outlying),
    )


def _losses(statuses: Sequence[RankStatus]) -> dict[str, tuple[float, int]]:
    """What the clients of all ranks report: (sum of cross-entropies in nats, masked tokens)."""
    return {
        client: (observed.loss_sum, observed.loss_tokens)
        for status in statuses
        for client, observed in status.observed.items()
        if observed.loss_tokens
    }


def rate_sentence(flops_per_second: float, peak: Peak) -> str:
    """What the body reaches, beside what could be reached."""
    nominal = "" if peak.nominal is None else f", {100 * flops_per_second / peak.nominal:.0f} % of the data sheet's"
    return (
        f"{_in_units(flops_per_second)}, {100 * flops_per_second / peak.measured:.0f} % of a dense product's "
        f"{_in_units(peak.measured)}{nominal}"
    )


def _in_units(flops_per_second: float) -> str:
    number = short_number(flops_per_second)
    digits = number.rstrip("kMGT")
    return f"{digits} {number[len(digits) :]}FLOP/s"


@dataclass(frozen=True)
class TimeParts:
    """What one rank spent its time on, in seconds. Together they are the wall time."""

    busy: float
    clients: float
    ranks: float
    saving: float
    evaluating: float
    host: float


def time_parts(tally: Tally, shortest_step: float) -> TimeParts:
    """A rank's time in a window. All ranks end a step together, so what it takes longer than
    `shortest_step`, that of the last to come, is a wait for other ranks.
    """
    ranks = tally.rank_wait_seconds + tally.step_seconds - shortest_step
    left = tally.seconds - tally.wait_seconds - ranks - tally.saving_seconds - tally.evaluation_seconds
    # A device may compute while the host waits for clients; that time is no one else's either.
    busy = max(0.0, min(tally.busy_seconds + shortest_step, left))
    return TimeParts(busy, tally.wait_seconds, ranks, tally.saving_seconds, tally.evaluation_seconds, left - busy)


def _ranges(numbers: Collection[int]) -> str:
    """0-3,8 for 0, 1, 2, 3 and 8."""
    ordered = sorted(numbers)
    begins = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in zip(begins, ends, strict=True))


def _mode_name(config: RunConfig) -> str:
    """The mode; of clients that step alone, by which rule their average moves the model."""
    federation = config.federation
    rule = "" if federation.server_optimizer == "none" else f", server {federation.server_optimizer}"
    return f"{federation.mode}{rule}"


def _cut_name(config: RunConfig) -> str:
    return f"layers: {config.cut.layers}" if isinstance(config.cut, LayersCut) else config.cut


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
