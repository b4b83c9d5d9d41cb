"""What a run says while it goes on: opening lines, one line of metrics a window, warnings once,
facts.
"""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.config import RunConfig
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.run_file import load_config
from fedbert_ds.server.body.peak import Peak
from fedbert_ds.server.contract import RankStatus, Tally
from fedbert_ds.server.prepare import TextFacts
from fedbert_ds.server.queue.in_flight import Demand
from fedbert_ds.server.run_reporter import RunReporter, rate_sentence, time_parts, window_metrics
from fedbert_ds.telemetry.evaluations import HeldOutLoss, evaluation_of
from fedbert_ds.telemetry.metrics import read_metrics

ROOT = Path(__file__).parents[3]
TEXT = TextFacts(("a.txt",), 10, 2, (6, 2), (750, 250))


def status(problems: tuple[str, ...] = (), clients: frozenset[str] = frozenset(), **tally: Any) -> RankStatus:
    return RankStatus(1, 1, Demand(0.0, 0.0, 0.0, 1), clients, False, problems, problems, tally=Tally(**tally))


def reporter_of(config: RunConfig, text: TextFacts | None = TEXT, has_body: bool = True) -> RunReporter:
    model = SimpleNamespace(model_type="bert", num_hidden_layers=2, hidden_size=128, vocab_size=4000)
    half: Any = SimpleNamespace(num_parameters=530_000, config=model)
    body: Any = SimpleNamespace(
        num_parameters=1_340_000_000, work=SimpleNamespace(flops_per_token=lambda mask_share, length: 0.0)
    )
    return RunReporter(config, 2, text, half, body if has_body else None)


def config_in(folder: Path, *overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "default.yaml", [f"run.directory={folder}", *overrides])


def flops_per_token(mask_share: float, length: float) -> float:
    return 100.0 + 10.0 * mask_share + length


def test_a_window_of_two_ranks_is_summed_or_averaged() -> None:
    one = status(
        clients=frozenset({"ada"}), loss_sum=30.0, tokens=90, masked_tokens=10, lost_masked_tokens=1, busy_seconds=2.5,
        step_seconds=1.5, wait_seconds=1.0, rank_wait_seconds=0.25, saving_seconds=0.5, seconds=6.0, forwards=2,
        backwards=2, bytes_up=7, update_bytes_down=5, squared_lengths=90 * 30, recompiles=2,
    )  # fmt: skip
    other = status(
        clients=frozenset({"bo", "cy"}), loss_sum=10.0, tokens=30, masked_tokens=10, busy_seconds=1.5, step_seconds=0.5,
        seconds=6.0, forwards=2, backwards=2, dummy_micro_batches=1, bytes_up=3, squared_lengths=30 * 10, recompiles=1,
    )  # fmt: skip
    metrics = window_metrics(7, [one, other], 50, 0.5, flops_per_token)
    assert (metrics.window, metrics.seconds, metrics.learning_rate) == (7, 6.0, 0.5)
    assert metrics.loss == 2.0, "a mean over masked tokens, not over ranks"
    assert (metrics.tokens, metrics.masked_tokens, metrics.lost_masked_tokens) == (120, 20, 1)
    assert (metrics.busy_seconds, metrics.wait_seconds) == (2.5, 0.5), "means over ranks"
    assert metrics.rank_wait_seconds == (0.25 + 1.0 + 0.0) / 2, "one came to the step a second before the other"
    assert (metrics.saving_seconds, metrics.host_seconds) == (0.25, (0.25 + 4.0 - 0.0) / 2)
    assert metrics.flops == 120 * (100.0 + 10.0 * 20 / 120) + 90 * 30 + 30 * 10
    assert metrics.fill == 120 / (3 * 50), "dummies hold no place"
    assert (metrics.bytes_up, metrics.update_bytes_down, metrics.clients) == (10, 5, 3)
    assert metrics.recompiles == 3


def test_a_window_of_dummies_alone_has_no_loss_and_no_fill() -> None:
    metrics = window_metrics(0, [status(forwards=1, dummy_micro_batches=1)], 50, 0.1, flops_per_token)
    assert math.isnan(metrics.loss) and metrics.fill == metrics.flops == 0.0


@given(st.lists(st.floats(0.0, 10.0), min_size=6, max_size=6), st.floats(0.0, 1.0))
def test_the_parts_of_the_time_are_the_wall_time(times: list[float], share: float) -> None:
    """Whatever a device says of itself, and whoever came last to the step."""
    busy, step, clients, ranks, saving, work = times
    # The account's parts are the wall time; the step and all else that the rank does are in `work`.
    tally = Tally(
        busy_seconds=busy, step_seconds=step, wait_seconds=clients, rank_wait_seconds=ranks, saving_seconds=saving,
        seconds=clients + ranks + saving + step + work,
    )  # fmt: skip
    parts = time_parts(tally, share * step)
    assert sum(astuple(parts)) == pytest.approx(tally.seconds, abs=1e-9)
    assert min(astuple(parts)) >= -1e-9 and parts.busy <= busy + step + 1e-9


def test_flops_are_counted_though_stage_3_takes_the_weights_apart(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    half, body = split(build_model(config.model, 100, 0, 1), "embeddings")
    expected = body.flops_per_token(0.15, 77.0)
    reporter = RunReporter(config, 1, None, half, body)
    for parameter in body.parameters():
        parameter.data = torch.empty(0)
    with reporter.following(first_window=0):
        reporter.window(0, [status(tokens=100, masked_tokens=15, squared_lengths=7700)])
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row.flops == pytest.approx(100 * expected) and body.flops_per_token(0.15, 77.0) != expected


def test_a_rate_is_told_beside_what_could_be_reached() -> None:
    assert rate_sentence(4.0e14, Peak(8.0e14, 9.89e14)) == (
        "400 TFLOP/s, 50 % of a dense product's 800 TFLOP/s, 40 % of the data sheet's"
    )
    assert rate_sentence(3.0e10, Peak(1.2e11, None)) == "30.0 GFLOP/s, 25 % of a dense product's 120 GFLOP/s"


def test_windows_go_to_the_metrics_file_and_warnings_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = reporter_of(config_in(tmp_path))
    reporter.window(0, [status()])
    assert not list(tmp_path.iterdir()), "not followed"
    with reporter.following(first_window=0):
        reporter.window(0, [status(("client bo disconnected",), loss_sum=8.0, masked_tokens=2)])
        reporter.window(1, [status(loss_sum=6.0, masked_tokens=2)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["window"], row["loss"]) for row in rows] == [(0, 4.0), (1, 3.0)]
    assert capsys.readouterr().out.count("warning client bo disconnected") == 1


def test_the_cores_of_a_bound_rank_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config_in(tmp_path))
    reporter.announce("here:1", frozenset({0, 1, 2, 8, 10, 11}))
    assert "cores   6 for rank 0, near its GPU: 0-2,8,10-11; " in capsys.readouterr().out
    reporter.announce("here:1")
    assert "cores   " not in capsys.readouterr().out


def test_for_whom_a_run_waits_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config_in(tmp_path, "clients.join_timeout=60"))
    here = status(clients=frozenset({"ada"}))
    with reporter.following(first_window=0):
        reporter.waits([here, status(clients=frozenset({"bo"}))])
        reporter.waits([here, replace(status(), absent=frozenset({"cy", "bo"}))])
        reporter.waits([replace(here, absent=frozenset({"bo"})), replace(here, lost_elsewhere="it is lost: no answer")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "waiting" in line]
    assert lines == [
        "waiting for clients, 60 s at most: 2 are here, 4 are needed (clients.minimum)",
        "waiting for bo, cy, 60 s at most",
        "it is lost: no answer; waiting for it, 60 s at most",
    ]


def test_a_problem_of_a_window_after_which_the_run_waits_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = reporter_of(config_in(tmp_path))
    lost = replace(status(clients=frozenset({"ada"})), new_problems=("client bo disconnected",))
    with reporter.following(first_window=0):
        statuses = [lost, lost]  # of two ranks: it concerns the body
        reporter.window(0, statuses)
        reporter.waits(statuses)
        reporter.waits([lost])
    assert capsys.readouterr().out.count("warning client bo disconnected") == 2


def test_the_opening_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter_of(config_in(tmp_path)).announce("127.0.0.1:29600")
    lines = capsys.readouterr().out.splitlines()
    assert "2 ranks" in lines[0] and "ZeRO 2" in lines[0] and "4 clients, synchronous" in lines[0]
    assert lines[1] == "text    a.txt: 10 articles, 8 for 2 clients (75, 25 %), 2 held out"
    assert lines[2] == (
        "model   bert 2 x 128, 4,000 word pieces; cut: embeddings; body 1.34 B parameters, client half 0.5 M"
    )
    assert len(lines) == 3, "all clients are local, and nothing leaves the machine"


def test_remote_clients_are_told_how_to_join_and_plain_text_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("clients.local=1", "server.host=0.0.0.0", "server.plaintext=true", "cut={layers: 1}")
    reporter_of(config_in(tmp_path, *overrides), text=None).announce("gpu-1:29600")
    out = capsys.readouterr().out
    assert "clients waiting for 3: fedbert-ds client --server gpu-1:29600 --data PATH --id NAME --plaintext" in out
    assert "warning server.tls is not set: activations cross the network in the clear" in out
    assert "cut: layers: 1" in out and "text " not in out


def test_with_tls_a_certificate_says_who_joins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tls = "server.tls={ca: ca.pem, certificate: body.pem, key: body.key}"
    reporter_of(config_in(tmp_path, "clients.local=1", "server.host=0.0.0.0", tls)).announce("gpu-1:29600")
    out = capsys.readouterr().out
    assert "--data PATH --ca ca.pem --certificate NAME.pem --key NAME.key" in out and "in the clear" not in out


def test_facts_name_what_ran(tmp_path: Path) -> None:
    facts = reporter_of(config_in(tmp_path), text=None).facts()
    assert facts["machine"].startswith("2 ranks, ") and facts["body"] == "1.34 B parameters, ZeRO 2, fp32"
    assert facts["clients"] == "4, synchronous" and facts["text"] == "with the clients"
    assert list(facts)[-1] == "training time"


@pytest.mark.parametrize(("precision", "has_gpu"), [("fp32", True), ("bf16", True), ("fp32", False)])
def test_a_gpu_that_computes_in_fp32_is_worth_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, precision: str, has_gpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    reporter_of(config_in(tmp_path, f"body.precision={precision}")).announce("127.0.0.1:1")
    assert ("in bf16" in capsys.readouterr().out) == (has_gpu and precision == "fp32")


def test_a_run_without_a_body_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(ROOT / "configs" / "diloco.yaml", [f"run.directory={tmp_path}", "server.host=0.0.0.0"])
    reporter = reporter_of(config, has_body=False)
    reporter.announce("127.0.0.1:29600")
    out = capsys.readouterr().out
    assert "no body   4 clients, parallel, server nesterov" in out and "ZeRO" not in out
    assert "cut: whole; 0.5 M parameters at each client" in out
    assert "warning server.tls is not set: changes of weights cross the network in the clear" in out
    assert reporter.facts()["body"] == "none: clients hold the whole model"


def test_trackers_hear_every_window_and_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedbert_ds.server import run_reporter

    heard: list[Any] = []

    class Heard:
        @classmethod
        def open(cls, names: Any, folder: Path, settings: Any, tell: Any) -> Heard:
            heard.append((tuple(names), folder.name, settings["run"]["seed"]))
            return cls()

        def log(self, values: dict[str, float], step: int) -> None:
            heard.append((step, sorted(values)[:1]))

        def close(self) -> None:
            heard.append("closed")

    reporter = reporter_of(config_in(tmp_path, "run.trackers=[tensorboard]"))
    monkeypatch.setattr(run_reporter, "Trackers", Heard)
    with reporter.following(3):
        reporter.window(3, [status(loss_sum=1.0, tokens=4, masked_tokens=1, seconds=1.0)])
        reporter.evaluated([evaluation_of(4, {"ada": HeldOutLoss(2.0, 1)}, ["ada"])])
    assert heard == [(("tensorboard",), "trackers", 1), (3, ["busy_share"]), (4, ["held_out/clients/ada"]), "closed"]
