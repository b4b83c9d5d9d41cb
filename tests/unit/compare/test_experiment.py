"""A whole comparison with runs that are faked: made once, gone on with, refused, recorded."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from unit.compare.small import CLIENTS, run_file
from unit.tasks.glue_files import write_glue

from fedbert_ds.compare import runs
from fedbert_ds.compare.alone import EVALUATIONS
from fedbert_ds.compare.alone import main as train_alone
from fedbert_ds.compare.centralized import main as train_centralized
from fedbert_ds.compare.experiment import COMPARISON, compare
from fedbert_ds.compare.plan import CompareOptions, Plan
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.errors import ConfigError, DataError, RunError
from fedbert_ds.evaluation.word_table import mean_cosine
from fedbert_ds.folder_lock import locked
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.run_file import load_config
from fedbert_ds.server.prepare import prepare_text
from fedbert_ds.server.run_folder import RunFolder

WORDS = "bert.embeddings.word_embeddings.weight"
SYSTEMS = ("centralized", "alone", "synchronous", "fedavg:3")


@pytest.fixture
def options(tmp_path: Path) -> CompareOptions:
    return CompareOptions(run_file(tmp_path), tmp_path / "out", "fedbert-ds compare run.yaml", SYSTEMS, evaluations=3)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Plain training in this process; a federated run leaves what one leaves, untrained."""
    folders: list[str] = []

    def run(command: Sequence[str], log: Path, device: str) -> int:
        at = command.index("--config")
        given = [part for part in command[at + 2 :] if "=" in part and not part.startswith("--")]
        config = load_config(Path(command[at + 1]), given)
        folders.append("/".join(config.run.directory.parts[-2:]))
        log.write_text("")
        if "--module" in command:
            _federated(config.run.directory, Path(command[at + 1]), given)
            return 0
        module = command[command.index("-m") + 1]
        capsys.readouterr()
        (train_alone if module.endswith("alone") else train_centralized)(command[at:])
        log.write_text(capsys.readouterr().out)
        return 0

    monkeypatch.setattr(runs, "run_to_end", run)
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield folders
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


def _federated(path: Path, file: Path, given: Sequence[str]) -> None:
    config, folder = load_config(file, given), RunFolder(path)
    path.mkdir(parents=True)
    prepare_text(config, folder)
    tokenizer = load_tokenizer(str(folder.tokenizer))
    model = build_model(config.model, len(tokenizer), tokenizer.pad_token_id, config.run.seed)
    model.save_pretrained(folder.model)
    tokenizer.save_pretrained(folder.model)
    line = json.loads((path.with_name("centralized") / "metrics.jsonl").read_text().splitlines()[0])
    lines = [line | {"window": number, "update_bytes_up": 800} for number in range(config.run.windows)]
    folder.metrics.write_text("".join(json.dumps(one) + "\n" for one in lines))
    for client in CLIENTS:
        folder.log(client).write_text("the run is complete; peak memory 300 MB, 0.25 MFLOP per token\n")


ALL = ["seed-3/centralized", "alone/ward", "alone/lab", "seed-3/synchronous", "seed-3/fedavg-3"]


def test_record_table_and_picture(options: CompareOptions, started: list[str], capsys: pytest.CaptureFixture) -> None:
    compare(options)
    assert started == ALL
    record = json.loads((options.out / "table.json").read_text())
    assert {"command", "commit", "machine", "versions", "settings", "text", "rows"} <= set(record)
    assert str(options.out.parent) not in (options.out / "table.json").read_text(), "no path of this machine"
    assert record["text"]["3"]["articles"] == 20 and record["settings"]["data"]["source"] == ["ward.jsonl", "lab.jsonl"]
    rows = {row["system"]: row for row in record["rows"]}
    assert list(rows) == ["word frequency", "centralized", "alone", "synchronous", "fedavg"]
    for row in rows.values():
        losses, masked = row["held_out"], row["masked_tokens"]
        assert list(losses) == ["ward", "lab"] and masked == rows["centralized"]["masked_tokens"]
        mean = sum(losses[owner] * masked[owner] for owner in losses) / sum(masked.values())
        assert row["held_out_loss"] == pytest.approx(mean, rel=1e-9)
        assert losses[row["worst_client"]] == max(losses.values())
    assert rows["synchronous"]["held_out"] == pytest.approx(rows["fedavg"]["held_out"]), "untrained, both"
    assert rows["centralized"]["held_out_loss"] < rows["synchronous"]["held_out_loss"]
    tokens = rows["synchronous"]["tokens"] / 6
    assert rows["synchronous"]["bytes_per_token"] == pytest.approx(800 / tokens)
    assert rows["synchronous"]["client_flops_per_token"] == 0.25e6
    assert rows["synchronous"]["client_peak_memory_mb"] == 300
    assert rows["centralized"]["client_flops_per_token"] > 0 == rows["centralized"]["bytes_per_token"]
    for name in ("centralized", "synchronous"):
        words = load_file(options.out / "seed-3" / name / "hf" / "model.safetensors")[WORDS]
        assert rows[name]["word_cosine"] == pytest.approx(mean_cosine(words), rel=1e-12)
    assert not {"word frequency", "alone"} & {name for name, row in rows.items() if "word_cosine" in row}
    text = (options.out / "table.md").read_text()
    assert text in capsys.readouterr().out and "Better than alone for every owner" in text
    assert (options.out / "table.png").is_file()


def test_of_a_client_alone_the_lowest_loss_counts_and_the_record_has_both(
    options: CompareOptions, started: list[str]
) -> None:
    compare(replace(options, systems=("alone",)))
    row = json.loads((options.out / "table.json").read_text())["rows"][1]
    for owner in ("ward", "lab"):
        own = [one["loss"] for one in row["own_evaluations"][owner]]
        assert row["held_out"][owner] == pytest.approx(min(own), rel=1e-6)
        assert row["held_out_at_the_end"][owner] == own[-1]
        assert json.loads((options.out / "seed-3" / "alone" / owner / EVALUATIONS).read_text())[-1]["loss"] == own[-1]


def test_the_same_command_goes_on_and_repeats_nothing(options: CompareOptions, started: list[str]) -> None:
    compare(options)
    record = json.loads((options.out / "table.json").read_text())
    started.clear()
    compare(options)
    assert not started
    again = json.loads((options.out / "table.json").read_text())
    assert again["rows"] == record["rows"]
    (options.out / "seed-3" / "alone" / "lab" / runs.RESULT).unlink()  # as if it had been interrupted
    compare(options)
    assert started == ["alone/lab"]


def test_what_is_finished_is_in_the_table_before_the_last_run(options: CompareOptions, started: list[str]) -> None:
    (options.out / "seed-3" / "synchronous").mkdir(parents=True)  # somebody else's: that run is refused
    (options.out / COMPARISON).write_text(json.dumps(Plan.of(options).settings))
    with pytest.raises(RunError, match="synchronous: not a run of this comparison"):
        compare(options)
    rows = json.loads((options.out / "table.json").read_text())["rows"]
    assert [row["system"] for row in rows] == ["word frequency", "centralized", "alone"]


def test_systems_and_seeds_are_added(options: CompareOptions, started: list[str]) -> None:
    compare(replace(options, systems=("centralized",)))
    compare(replace(options, systems=("centralized", "synchronous"), seeds=(3, 4)))
    assert started == ["seed-3/centralized", "seed-3/synchronous", "seed-4/centralized", "seed-4/synchronous"]
    rows = json.loads((options.out / "table.json").read_text())["rows"]
    assert [(row["system"], row["seed"]) for row in rows] == [
        (system, seed) for seed in (3, 4) for system in ("word frequency", "centralized", "synchronous")
    ]
    losses = [row["held_out_loss"] for row in rows if row["system"] == "centralized"]
    assert losses[0] != losses[1]
    assert "±" in (options.out / "table.md").read_text()


def test_a_folder_of_another_comparison_is_refused(options: CompareOptions, started: list[str]) -> None:
    compare(replace(options, systems=("centralized",)))
    with pytest.raises(
        RunError, match=r"holds a comparison with run\.windows 6, now 9; change that back, or name anot"
    ):
        compare(replace(options, overrides=("run.windows=9",)))
    with pytest.raises(RunError, match="with patience None, now 2"):
        compare(replace(options, patience=2))
    assert started == ["seed-3/centralized"]


def test_a_folder_of_a_version_with_fewer_keys_goes_on(options: CompareOptions, started: list[str]) -> None:
    compare(replace(options, systems=("centralized",)))
    path = options.out / COMPARISON
    settings = json.loads(path.read_text())
    del settings["window"]["order"], settings["data"]["streaming"]
    settings["window"]["gone"] = 1
    path.write_text(json.dumps(settings))
    with pytest.raises(RunError, match=r"with window\.order arrival, now fixed"):
        compare(replace(options, systems=("centralized",)))
    path.write_text(json.dumps(settings | {"window": settings["window"] | {"order": "fixed"}}))
    compare(replace(options, systems=("centralized",)))
    assert started == ["seed-3/centralized"]


def test_a_finished_run_is_never_removed_for_other_settings(options: CompareOptions, started: list[str]) -> None:
    compare(replace(options, systems=("centralized",)))
    result = options.out / "seed-3" / "centralized" / runs.RESULT
    result.write_text(json.dumps(json.loads(result.read_text()) | {"settings": "other"}))
    with pytest.raises(RunError, match=r"centralized: is complete, made with other settings; name another --out, or"):
        compare(replace(options, systems=("centralized",)))
    assert result.is_file() and started == ["seed-3/centralized"]


def test_a_folder_of_somebody_else_is_left_alone(options: CompareOptions, started: list[str]) -> None:
    options.out.mkdir()
    (options.out / "thesis.txt").touch()
    with pytest.raises(RunError, match="is no folder of a comparison; name a new one with --out"):
        compare(options)
    assert [path.name for path in options.out.iterdir()] == ["thesis.txt"] and not started


def test_two_commands_do_not_share_a_folder(options: CompareOptions, started: list[str]) -> None:
    with locked(options.out, "--out"), pytest.raises(RunError, match=r"in use by process .*; end that first, or set"):
        compare(options)
    assert not started


def test_other_text_under_the_same_names_is_noticed(options: CompareOptions, started: list[str]) -> None:
    compare(replace(options, systems=("centralized",)))
    with (options.run_file.parent / "lab.jsonl").open("a") as file:
        file.write('{"text": "one more sample"}\n')
    with pytest.raises(RunError, match=r"synchronous: its text is not that of .*text; remove both"):
        compare(replace(options, systems=("centralized", "synchronous")))


def test_too_little_text_is_an_error_before_any_run(options: CompareOptions, started: list[str]) -> None:
    with pytest.raises(DataError, match=r"ward\.jsonl: 1 article"):
        compare(replace(options, overrides=("data.max_articles=1",)))
    with pytest.raises(ConfigError, match="choose centralized"):
        compare(replace(options, systems=("fedsgd",)))
    assert not started


def test_a_failed_run_says_what_its_log_says(options: CompareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], log: Path, device: str) -> int:
        log.write_text("window 1/6\nfedbert-ds: no port is free; set server.port\n  torch.distributed: failed\n")
        return 1

    monkeypatch.setattr(runs, "run_to_end", run)
    with pytest.raises(RunError, match=r"synchronous: no port is free; set server\.port \(see .*synchronous\.log\)"):
        compare(replace(options, systems=("synchronous",)))


def test_tasks_of_every_model_but_those_of_clients_alone(options: CompareOptions, started: list[str]) -> None:
    glue = write_glue(options.out.parent / "glue", "RTE", "STS-B")
    with_tasks = replace(
        options, systems=("centralized", "alone"), glue=glue, tasks=("RTE", "STS-B"), glue_seeds=(0, 1), glue_epochs=1
    )
    compare(with_tasks)
    rows = {row["system"]: row for row in json.loads((options.out / "table.json").read_text())["rows"]}
    assert list(rows) == ["word frequency", "not pre-trained", "centralized", "alone"]
    for name in ("not pre-trained", "centralized"):
        assert list(rows[name]["glue"]) == ["RTE", "STS-B"]
        assert all(len(scores) == 2 for scores in rows[name]["glue"].values())
    assert "glue" not in rows["alone"] and "glue" not in rows["word frequency"]
    assert (
        "| RTE | STS-B | mean of tasks | cosine of words | bytes per token |" in (options.out / "table.md").read_text()
    )
