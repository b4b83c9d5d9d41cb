"""The benchmark without a run: commands, settings, what is complete, what is refused, what a
failure says."""

import json
import signal
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.modes import runs as modes_runs
from benchmarks.modes import systems
from benchmarks.modes.benchmark import bench_modes
from benchmarks.modes.systems import ModesOptions
from fedbert_ds.compare import runs
from fedbert_ds.compare.systems import CENTRALIZED, System
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.shards import write_shard
from fedbert_ds.errors import RunError
from fedbert_ds.run_file import dump_config, load_config
from fedbert_ds.telemetry.metrics import MetricsLog, WindowMetrics

PARALLEL = System("parallel", 5)


def metrics(window):
    return WindowMetrics(
        window=window,
        loss=7.0 - window / 10,
        tokens=900,
        masked_tokens=140,
        lost_masked_tokens=0,
        seconds=0.5,
        busy_seconds=0.4,
        wait_seconds=0.1,
        forwards=2,
        backwards=2,
        dummy_micro_batches=0,
        fill=0.9,
        bytes_up=900,
        bytes_down=900,
        update_bytes_up=0,
        update_bytes_down=0,
        clients=2,
        learning_rate=1e-3,
    )


@pytest.fixture
def options(tmp_path):
    return ModesOptions(
        data="wiki.tokens",
        out=tmp_path / "results" / "modes.json",
        command="python -m benchmarks.modes --quick",
        work=tmp_path / "work",
        quick=True,
        overrides=("run.windows=4",),
    )


@pytest.fixture
def runner(monkeypatch):
    """Stands for the processes: leaves what a run leaves, and remembers which ran."""
    started = []

    def run(command, log, device):
        given = [part for part in command[command.index("--config") + 2 :] if part != "--resume"]
        config = load_config(systems.RUN_FILE, given)
        folder = config.run.directory
        started.append(folder.name)
        if "--resume" in command:
            return 0
        folder.mkdir(parents=True)
        log.write_text("window 4/4\n")
        with MetricsLog(folder / "metrics.jsonl") as file:
            for window in range(config.run.windows):
                file.append(metrics(window))
        write_shard(folder / "held_out.jsonl", [Article("held", "out")])
        write_shard(folder / "clients" / "client-00" / "shard.jsonl", [Article("a", "text")])
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        facts = {"articles": 2, "held_out": 1, "shard_articles": [1], "shard_characters": [4], "sources": ["/x/y"]}
        (folder / "text.json").write_text(json.dumps(facts))
        weights = {"dense.weight": torch.tensor([1.0, 2.0]), "key.bias": torch.tensor([float(len(started))])}
        (folder / "hf").mkdir()
        save_file(weights, folder / "hf" / "model.safetensors")
        (folder / "config.yaml").write_text(dump_config(config))
        return 0

    monkeypatch.setattr(runs, "run_to_end", run)
    monkeypatch.setattr(modes_runs, "evaluate", lambda folder, config: (6.25, 6.75))
    handler = signal.getsignal(signal.SIGTERM)
    yield started
    signal.signal(signal.SIGTERM, handler)


def test_shipped_run_file_and_every_system(options):
    for system in (*systems.SYSTEMS, *systems.QUICK_SYSTEMS):
        config = load_config(systems.RUN_FILE, systems.run_file_overrides(system, options))
        assert config.run.directory == options.work / system.slug
        assert config.data.source == ("wiki.tokens",)
        assert config.run.windows == 4
        assert config.window.order == "fixed"
        assert config.model.dropout == 0
        if system != CENTRALIZED:
            assert config.federation.mode == system.name
            assert config.federation.average_every == (system.average_every or 1)


def test_methods_of_whole_models_are_settings_of_one_run_file(options):
    options = replace(options, quick=False, whole=True, overrides=())
    assert options.systems == systems.WHOLE_SYSTEMS and options.systems[0] == CENTRALIZED
    configs = {
        system.slug: load_config(systems.RUN_FILE, systems.run_file_overrides(system, options))
        for system in options.systems
    }
    whole = {name: config for name, config in configs.items() if config.cut == "whole"}
    assert list(whole) == ["fedavg-20", "diloco-20", "muloco-20"]
    assert {name: config.federation.server_optimizer for name, config in whole.items()} == {
        "fedavg-20": "none", "diloco-20": "nesterov", "muloco-20": "nesterov",
    }  # fmt: skip
    assert configs["sequential-10"].federation.mode == "sequential"
    muloco = whole["muloco-20"]
    assert muloco.optimizer.name == "muon" and muloco.wire.updates == "int2_hadamard"


def test_quick_whole_models_end_on_a_round(options):
    options = replace(options, whole=True, overrides=())
    for system in options.systems:
        assert load_config(systems.RUN_FILE, systems.run_file_overrides(system, options)).run.windows == systems.ROUND


def test_full_size_has_ten_clients(options):
    config = load_config(systems.RUN_FILE)
    assert config.clients.expected == config.clients.local == 10
    assert [system.average_every for system in systems.SYSTEMS if system.name == "parallel"] == [1, 5, 50]
    assert config.run.windows % 50 == 0, "every system ends on an average"


def test_federated_runs_go_through_the_launcher(options):
    command = systems.command_of(PARALLEL, ["a.b=1"])
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in command
    assert command[-5:] == ["--module", "fedbert_ds.server.pretrain", "--config", str(systems.RUN_FILE), "a.b=1"]
    assert systems.command_of(CENTRALIZED, [])[1:3] == ["-m", "fedbert_ds.compare.centralized"]


def test_record_picture_and_table(options, runner, capsys):
    bench_modes(options)
    assert runner == ["centralized", "synchronous", "parallel-5"]
    record = json.loads(options.out.read_text())
    assert record["command"] == options.command
    assert {"commit", "machine", "versions", "settings", "ranks", "text", "final", "rows"} < set(record)
    assert len(record["rows"]) == 3 * 4
    assert {row["system"] for row in record["final"]} == {"centralized", "synchronous", "parallel"}
    assert record["final"][0]["held_out_loss"] == 6.25 and record["final"][0]["unigram_loss"] == 6.75
    assert record["text"]["articles"] == 2
    assert record["final"][1]["largest_weight_difference"] == 0, "key biases are noise"
    assert str(options.work) not in options.out.read_text(), "no path of this machine"
    assert options.out.with_suffix(".png").is_file()
    assert "| synchronous | 6.700 | 6.250 | 0.000 |" in capsys.readouterr().out


def test_complete_runs_are_not_repeated(options, runner):
    bench_modes(options)
    (options.work / "synchronous" / runs.RESULT).unlink()  # As if it had been interrupted.
    runner.clear()
    bench_modes(options)
    assert runner == ["synchronous"]


def test_other_settings_run_anew(options, runner):
    bench_modes(options)
    runner.clear()
    bench_modes(replace(options, overrides=("run.windows=5",)))
    assert runner == ["centralized", "synchronous", "parallel-5"]
    assert len(json.loads(options.out.read_text())["rows"]) == 3 * 5


def test_a_folder_of_somebody_else_is_left_alone(options, runner):
    stranger = options.work / "centralized" / "thesis.txt"
    stranger.parent.mkdir(parents=True)
    stranger.touch()
    with pytest.raises(RunError, match="name another folder"):
        bench_modes(options)
    assert stranger.exists() and not runner


def test_runs_on_other_text_are_refused(options, runner):
    bench_modes(options)
    write_shard(options.work / "synchronous" / "held_out.jsonl", [Article("other", "text")])
    with pytest.raises(RunError, match="synchronous: not the shards"):
        bench_modes(options)


def test_a_failed_run_says_what_its_log_says(options, monkeypatch, runner):
    def run(command, log, device):
        log.write_text("window 1/4\nfedbert-ds: wiki.tokens: no such file; name one\n  torch.distributed: failed\n")
        return 1

    monkeypatch.setattr(runs, "run_to_end", run)
    with pytest.raises(RunError, match=r"centralized: wiki\.tokens: no such file; name one \(see .*centralized\.log\)"):
        bench_modes(options)
    assert not options.out.exists()


def test_each_system_trains_at_its_own_best_rate(options, runner, monkeypatch, capsys):
    def evaluate(folder, config):
        # Centralized training is best at the higher rate, averaging at the lower.
        wish = {"centralized": 2e-3}.get(folder.name, 1e-3)
        return 6.0 + abs(config.optimizer.lr - wish), 6.75

    monkeypatch.setattr(modes_runs, "evaluate", evaluate)
    bench_modes(replace(options, learning_rates=(1e-3, 2e-3)))
    assert runner == [
        "centralized",
        "centralized",
        "parallel-5",
        "parallel-5",
        "centralized",
        "synchronous",
        "parallel-5",
    ]
    record = json.loads(options.out.read_text())
    rates = {name: load_config(options.work / name / "config.yaml").optimizer.lr for name in runner}
    assert rates == {"centralized": 2e-3, "synchronous": 2e-3, "parallel-5": 1e-3}
    assert [(row["system"], row["learning_rate"], row["held_out_loss"]) for row in record["tuning"]] == [
        ("centralized", 1e-3, 6.001), ("centralized", 2e-3, 6.0), ("parallel", 1e-3, 6.0), ("parallel", 2e-3, 6.001),
    ]  # fmt: skip
    assert str(options.work) not in options.out.read_text(), "no path of this machine"
