"""What a run tells its user: opening lines, progress, metrics, and at the end the model, its loss and the report."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedbert_ds import __version__
from fedbert_ds.config import LayersCut, RunConfig, dump_config
from fedbert_ds.model.body import Body
from fedbert_ds.model.checkpoint import save_merged
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.server.body.engine import BodyEngine, zero_stage
from fedbert_ds.server.contract import RankStatus
from fedbert_ds.server.prepare import HELD_OUT, TextFacts
from fedbert_ds.server.rank import RankServer
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.telemetry.metrics import MetricsLog, WindowMetrics, read_metrics, summary
from fedbert_ds.telemetry.progress import Progress, duration, short_bytes
from fedbert_ds.telemetry.report import write_report

METRICS = "metrics.jsonl"
MODEL = "hf"


class RunReporter:
    """Speaks on rank 0; the other ranks take part in `hand_over` alone, since gathering weights takes all."""

    def __init__(
        self, config: RunConfig, rank_group: RankGroup, text: TextFacts | None, half: ClientHalf, body: Body
    ) -> None:
        self._config = config
        self._rank_group = rank_group
        self._text = text
        self._half_parameters, self._body_parameters = half.num_parameters, body.num_parameters
        self._hf_config = half.config
        self._log: MetricsLog | None = None
        self._progress: Progress | None = None
        self._started = time.monotonic()

    def announce(self, address: str) -> None:
        """The opening lines: what is about to run."""
        config, hf_config = self._config, self._hf_config
        backend = "cuda, nccl" if torch.cuda.is_available() else "cpu, gloo"
        print(
            f"FedBERT-DS {__version__}   {config.run.directory}   {self._rank_group.world_size} ranks ({backend})   "
            f"ZeRO {zero_stage(config)}   {config.clients.expected} clients, {config.federation.mode}"
        )
        if self._text is not None:
            print(f"text    {self._text.sentence}")
        print(
            f"model   {hf_config.model_type} {hf_config.num_hidden_layers} x {hf_config.hidden_size}, "
            f"{hf_config.vocab_size:,} word pieces; cut: {_cut_name(config)}; "
            f"body {_millions(self._body_parameters)} parameters, client half {_millions(self._half_parameters)}"
        )
        remote = config.clients.expected - config.clients.local
        if remote:
            print(f"clients waiting for {remote}: fedbert-ds client --server {address} --data PATH --id NAME")
        if config.server.tls is None and config.server.host not in ("127.0.0.1", "localhost", "::1"):
            print("warning server.tls is not set: activations cross the network in the clear")
        sys.stdout.flush()

    @contextmanager
    def following(self, first_window: int) -> Iterator[None]:
        """While this lasts, `window` writes metrics and shows progress."""
        if self._rank_group.rank != 0:
            yield
            return
        self._started = time.monotonic()
        config = self._config
        with (
            MetricsLog(config.run.directory / METRICS, first_window) as self._log,
            Progress(config.run.windows, config.clients.expected, sys.stdout) as self._progress,
        ):
            yield

    def window(self, window: int, statuses: Sequence[RankStatus], seconds: float) -> None:
        """Take in all ranks' statuses of a finished window."""
        if self._log is None or self._progress is None:
            return
        metrics = self._metrics(window, statuses, seconds)
        self._log.append(metrics)
        for status in statuses:
            for problem in status.new_problems:
                self._progress.note(f"warning {problem}")
        self._progress.update(metrics)

    def hand_over(self, window: int, rank: RankServer, engine: BodyEngine, hf_config: Any, tokenizer: Any) -> None:
        """Merge and save the model; evaluate it and write the report when the run is complete. All ranks call it."""
        seconds = time.monotonic() - self._started
        half = rank.collect_half(window)
        body = engine.full_state()
        complete = window == self._config.run.windows
        reason = "the run is complete" if complete else f"the run was stopped and saved at window {window}"
        rank.finish(reason, complete)
        figures = [saved for rank_figures in self._rank_group.gather(_figures(rank)) for saved in rank_figures]
        if self._rank_group.rank != 0:
            return
        folder = self._config.run.directory
        save_merged(folder / MODEL, hf_config, half, body, tokenizer)
        facts = self._facts(figures, seconds)
        baselines: dict[str, float] = {}
        if complete and (folder / HELD_OUT).is_file():
            held_out, unigram = self._held_out(folder, tokenizer, hf_config.vocab_size)
            facts["held-out loss"] = f"{held_out:.3f} nats a masked token"
            facts["word frequency alone"] = f"{unigram:.3f} nats"
            baselines = {"word frequency alone": unigram, "held out, at the end": held_out}
            print(
                f"held-out loss {held_out:.2f}, word frequency alone {unigram:.2f}: "
                f"{unigram - held_out:.2f} nats learned beyond it"
            )
        rows = read_metrics(folder / METRICS)
        write_report(folder, dump_config(self._config), rows, facts, baselines)
        print(f"clients {facts['client peak memory']} peak memory, {facts['client FLOP per token']} FLOP per token")
        print(
            f"model   {folder / MODEL}   a transformers checkpoint: "
            f'AutoModelForMaskedLM.from_pretrained("{folder / MODEL}")'
        )
        state = "complete" if complete else f"stopped and saved at window {window}; continue with --resume"
        print(f"report  {folder / 'report.html'}   {state}", flush=True)

    def _metrics(self, window: int, statuses: Sequence[RankStatus], seconds: float) -> WindowMetrics:
        tallies = [status.tally for status in statuses]

        def total(name: str) -> Any:
            return sum(getattr(tally, name) for tally in tallies)

        real = total("forwards") - total("dummy_micro_batches")
        capacity = real * self._config.window.tokens_per_micro_batch
        masked = total("masked_tokens")
        return WindowMetrics(
            window=window,
            loss=total("loss_sum") / masked if masked else float("nan"),
            tokens=total("tokens"),
            masked_tokens=masked,
            lost_masked_tokens=total("lost_masked_tokens"),
            seconds=seconds,
            busy_seconds=total("busy_seconds") / len(tallies),
            wait_seconds=total("wait_seconds") / len(tallies),
            forwards=total("forwards"),
            backwards=total("backwards"),
            dummy_micro_batches=total("dummy_micro_batches"),
            fill=total("tokens") / capacity if capacity else 0.0,
            bytes_up=total("bytes_up"),
            bytes_down=total("bytes_down"),
            averaging_bytes_up=total("averaging_bytes_up"),
            averaging_bytes_down=total("averaging_bytes_down"),
            clients=sum(len(status.clients) for status in statuses),
            learning_rate=self._config.optimizer.learning_rate(window, self._config.run.windows),
        )

    def _facts(self, figures: Sequence[tuple[int, float]], seconds: float) -> dict[str, str]:
        config = self._config
        totals = summary(read_metrics(config.run.directory / METRICS))
        memory = max((memory for memory, _ in figures), default=0)
        flops = max((flops for _, flops in figures), default=0.0)
        return {
            "version": f"FedBERT-DS {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            "machine": f"{self._rank_group.world_size} ranks, {_device_name()}",
            "body": f"{_millions(self._body_parameters)} parameters, ZeRO {zero_stage(config)}, "
            f"{config.body.precision}",
            "client half": f"{_millions(self._half_parameters)} parameters, cut: {_cut_name(config)}",
            "clients": f"{config.clients.expected}, {config.federation.mode}",
            "text": self._text.sentence if self._text else "with the clients",
            "training time": f"{duration(seconds)} (this session)",
            "bytes per token": (
                f"{short_bytes(totals.bytes_per_token_up)} up, {short_bytes(totals.bytes_per_token_down)} down, "
                f"{short_bytes(totals.averaging_bytes_per_token)} to keep the halves together"
            ),
            "client peak memory": short_bytes(memory),
            "client FLOP per token": f"{flops / 1e6:.2f} M",
        }

    def _held_out(self, folder: Path, tokenizer: Any, vocab_size: int) -> tuple[float, float]:
        """(loss of the merged model, loss of word frequency alone) on the held-out articles, in nats."""
        from fedbert_ds.data.corpus import read_articles
        from fedbert_ds.data.masking import encode
        from fedbert_ds.evaluation.masked_lm import evaluate_masked_lm

        length = self._config.data.sequence_length
        shards = sorted(str(path) for path in (folder / "clients").glob("*/shard.jsonl"))
        counts = encode(read_articles(shards), tokenizer, length).token_counts(vocab_size)
        result = evaluate_masked_lm(
            folder / MODEL,
            [str(folder / HELD_OUT)],
            seed=self._config.run.seed,
            mask_probability=self._config.data.mask_probability,
            sequence_length=length,
            train_counts=counts,
        )
        assert result.unigram_loss is not None
        return result.loss, result.unigram_loss


def _figures(rank: RankServer) -> list[tuple[int, float]]:
    return [(saved.peak_memory_bytes, saved.flops_per_token) for saved in rank.client_figures.values()]


def _cut_name(config: RunConfig) -> str:
    return f"layers: {config.cut.layers}" if isinstance(config.cut, LayersCut) else config.cut


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"
