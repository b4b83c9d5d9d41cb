"""The end of a run: whose half is taken, what is saved, evaluated and reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
from unit.server.fake_client import HALF, FakeClient
from unit.server.fakes import Rank, run_config

from fedbert_ds.config import FederationSection, RunConfig, WireSection
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.shards import write_rows, write_shard
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.errors import RunError
from fedbert_ds.evaluation.labelled import evaluate_task
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.run_file import parse_config
from fedbert_ds.server import hand_over as room
from fedbert_ds.server.hand_over import beyond_frequency, collect_client_model, hand_over
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.tasks.registry import task_of_section
from fedbert_ds.telemetry.metrics import MetricsLog, WindowMetrics
from fedbert_ds.wire import fedbert_pb2 as pb

METRICS = WindowMetrics(
    window=0, loss=5.0, tokens=100, masked_tokens=15, lost_masked_tokens=0, seconds=1.0, busy_seconds=0.5,
    wait_seconds=0.5, forwards=1, backwards=1, dummy_micro_batches=0, fill=1.0, bytes_up=100, bytes_down=100,
    update_bytes_up=10, update_bytes_down=10, clients=1, learning_rate=0.1,
)  # fmt: skip
FACTS = {"version": "1"}


def test_when_everybody_is_gone_the_run_says_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(clients={"minimum": 1}, federation={"mode": "parallel"})
    rank = Rank(monkeypatch, config, [FakeClient(name, config) for name in ("ada", "bo", "cy")])
    window = rank.run()
    clients = rank.server.clients
    for client in clients:
        rank.served.rooms.membership.disconnect(client)
    with pytest.raises(RunError, match=r"no client was left to hand over its half; window 2 is saved"):
        collect_client_model(rank.served.rooms, window)


def test_where_halves_are_alike_the_reference_is_handed_over_and_no_client_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_config(clients={"minimum": 1})
    rank = Rank(monkeypatch, config, [FakeClient(name, config) for name in ("ada", "bo", "cy")])
    window = rank.run()
    for client in rank.server.clients:
        rank.served.rooms.membership.disconnect(client)
    reference = rank.served.aggregator.reference()
    assert reference.version == window and all(weights.all() for weights in reference.weights.values())
    model = rank.collect(window)
    assert all(torch.equal(model[name], reference.weights[name]) for name in HALF)
    assert not any(message.HasField("update_request") for _, message in rank.endpoint.sent)


def test_a_client_that_stays_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(clients={"minimum": 1}, federation={"mode": "parallel"})

    def silent(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        return [] if message.WhichOneof("body") == "update" and message.update.window == 2 else [message]

    clients = [FakeClient("ada", config), FakeClient("bo", config, alter=silent), FakeClient("cyd", config)]
    rank = Rank(monkeypatch, config, clients)
    model = rank.collect(rank.run())
    torch.testing.assert_close(model["head"], torch.full(HALF["head"], 3.0))  # ada's and cyd's; bo's would be 2
    assert clients[1].refusal == "client bo was silent for 300 s (clients.silence_timeout)"


def test_halves_that_are_handed_over_count_by_the_masked_tokens_the_server_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_config(federation={"mode": "parallel"})
    lengths = {"ada": (3, 5), "bo": (8, 6), "cyd": (2, 2)}
    rank = Rank(monkeypatch, config, [FakeClient(name, config, own) for name, own in lengths.items()])
    model = rank.collect(rank.run())
    # Half of a sequence is masked, in two windows alike; a half is made of its name's length.
    expected = (3.0 * 6 + 2.0 * 14 + 3.0 * 4) / 24
    torch.testing.assert_close(model["head"], torch.full(HALF["head"], expected))


class Ended:
    """A run of a small model whose clients and engine hand over known weights."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, windows: int = 1, task: dict[str, Any] | None = None
    ) -> None:
        words = ["ward", "patient", "dose", "fever", "nurse", "chart"]
        articles = [Article(f"note {n}", " ".join(words[n % 3 :] * (n + 2))) for n in range(9)]
        self.tokenizer = train_wordpiece(articles, 70)
        self.config: RunConfig = parse_config(
            {
                "run": {"directory": str(folder), "windows": windows},
                "model": {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
                          "max_position_embeddings": 16},
                "data": {"sequence_length": 16},
                "task": task or {},
            },
            "test",
        )  # fmt: skip
        self.folder = RunFolder(folder)
        write_shard(self.folder.shard("client-00"), articles[:6])
        write_shard(self.folder.held_out, articles[6:])
        with MetricsLog(self.folder.metrics) as log:
            log.append(METRICS)
        learned = task_of_section(self.config.task)
        if learned is not None:
            write_rows(self.folder.held_out, [{"text": one.text, "label": n % 2} for n, one in enumerate(articles[6:])])
        model = build_model(self.config.model, len(self.tokenizer), self.tokenizer.pad_token_id, 3, learned)
        self.model_config = model.config
        self.patch = monkeypatch
        self.expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        half, body = split(model, self.config.cut)
        weights = {name: p.detach().clone() for name, p in half.named_parameters()}
        self.finished: list[tuple[str, bool]] = []
        self.rooms: Any = Rank(monkeypatch, run_config(), []).served.rooms
        monkeypatch.setattr(room, "collect_client_model", lambda rooms, window: weights)
        state = {name: p.detach().clone() for name, p in body.named_parameters()}
        monkeypatch.setattr(self.rooms.engine, "full_state", lambda: state, raising=False)
        monkeypatch.setattr(
            self.rooms.service, "finish", lambda reason, complete: self.finished.append((reason, complete))
        )

    def hand_over(self, window: int, figures: Sequence[pb.Saved] | None = None) -> None:
        if figures is None:
            figures = [pb.Saved(peak_memory_bytes=600_000_000, flops_per_token=2e6), pb.Saved(peak_memory_bytes=1)]
        hand_over(
            self.rooms,
            self.config,
            window,
            window == self.config.run.windows,
            figures,
            self.model_config,
            self.tokenizer,
            FACTS,
        )


def test_a_complete_run_is_merged_evaluated_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = Ended(tmp_path, monkeypatch)
    ended.hand_over(window=1)
    merged = AutoModelForMaskedLM.from_pretrained(ended.folder.model).state_dict()
    assert merged.keys() == ended.expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in ended.expected.items())
    assert ended.finished == [("the run is complete", True)]
    out = capsys.readouterr().out
    assert "held-out loss" in out and "nats worse than it" in out
    assert "clients 600.0 MB peak memory, 2.00 M FLOP per token" in out
    assert f"report  {ended.folder.report}   complete" in out
    page = ended.folder.report.read_text()
    assert "word frequency alone" in page and "client peak memory" in page


def held_out_of_one_word(ended: Ended) -> None:
    write_shard(ended.folder.held_out, [Article("note", "ward")])


def a_tokenizer_of_short_texts(ended: Ended) -> None:
    ended.tokenizer.model_max_length = 8


def no_held_out_text(ended: Ended) -> None:
    ended.folder.held_out.write_text("no JSON\n")


def memory_that_is_short(ended: Ended) -> None:
    def evaluate(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ended.patch.setattr(room, "_evaluate", evaluate)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (held_out_of_one_word, "no token of it was masked"),
        (a_tokenizer_of_short_texts, "sequences of 16 tokens do not fit; use at most 8"),
        (no_held_out_text, "held_out.jsonl"),
        (memory_that_is_short, "CUDA out of memory"),
    ],
)
def test_a_complete_run_is_reported_though_its_held_out_text_cannot_be_evaluated(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Ended], None],
    reason: str,
) -> None:
    ended = Ended(tmp_path, monkeypatch)
    spoil(ended)
    ended.hand_over(window=1)
    out = capsys.readouterr().out
    (warning,) = (line for line in out.splitlines() if line.startswith("warning"))
    assert warning.startswith("warning no held-out loss: ") and reason in warning
    assert f"report  {ended.folder.report}   complete" in out
    assert "missing: " in ended.folder.report.read_text()
    AutoModelForMaskedLM.from_pretrained(ended.folder.model)


def test_a_loss_above_word_frequency_alone_is_not_called_learned() -> None:
    assert beyond_frequency(1.116) == "1.12 nats learned beyond it"
    assert beyond_frequency(-1.771).startswith("1.77 nats worse than it; train for more windows")
    assert "learned" not in beyond_frequency(-0.001)


def test_a_run_that_was_complete_before_has_no_figures_of_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed, it trains no window, so no client says what it took."""
    ended = Ended(tmp_path, monkeypatch)
    ended.hand_over(window=1, figures=[])
    out = capsys.readouterr().out
    assert "peak memory" not in out and "complete" in out
    assert "peak memory" not in ended.folder.report.read_text()


def test_a_model_without_its_clients_own_parts_is_not_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = Ended(tmp_path, monkeypatch)
    kept = strategy_of(FederationSection(mode="parallel", average_scope="embeddings"), WireSection())
    ended.rooms = replace(ended.rooms, strategy=kept)
    ended.hand_over(window=1)
    out = capsys.readouterr().out
    assert "each client keeps its own (federation.personal_parts: kept)" in out and "held-out loss" not in out
    assert "a model without its clients&#x27; own parts" in ended.folder.report.read_text()


def test_a_complete_run_of_labels_is_measured_on_the_examples_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"name": "sequence_classification", "labels": ["mild", "severe"]}
    ended = Ended(tmp_path, monkeypatch, task=task)
    ended.hand_over(window=1)
    merged = AutoModelForSequenceClassification.from_pretrained(ended.folder.model)
    assert all(torch.equal(merged.state_dict()[name], tensor) for name, tensor in ended.expected.items())
    assert merged.config.id2label == {0: "mild", 1: "severe"}
    result = evaluate_task(ended.folder.model, [str(ended.folder.held_out)])
    out = capsys.readouterr().out
    assert f"held-out loss {result.loss:.3f}, accuracy {result.measures['accuracy']:.3f}" in out
    assert f'AutoModelForSequenceClassification.from_pretrained("{ended.folder.model}")' in out
    page = ended.folder.report.read_text()
    assert "held-out measures" in page and "word frequency alone" not in page


def test_a_stopped_run_is_merged_and_not_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = Ended(tmp_path, monkeypatch, windows=5)
    ended.hand_over(window=1)
    assert ended.finished == [("the run was stopped and saved at window 1", False)]
    assert ended.folder.model.is_dir()
    out = capsys.readouterr().out
    assert "held-out loss" not in out and "stopped and saved at window 1; continue with --resume" in out
