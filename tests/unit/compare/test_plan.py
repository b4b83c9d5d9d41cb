"""Every run of a comparison is known and checked before the first begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from unit.tasks.glue_files import write_glue

from fedbert_ds.compare.plan import CompareOptions, Plan
from fedbert_ds.compare.systems import ALONE, ALONE_SHARE, CENTRALIZED, System
from fedbert_ds.errors import ConfigError, DataError
from fedbert_ds.run_file import load_config

TREE = {
    "run": {
        "windows": 40,
        "directory": "elsewhere",
        "evaluate_every": 5,
        "early_stopping_patience": 2,
        "keep_best": True,
    },
    "data": {"source": ["ward.jsonl", "lab.jsonl"], "shards": "source", "client_held_out": 0.2},
    "clients": {"expected": 2, "local": 2},
    "body": {"deepspeed": "zero.json"},
}


@pytest.fixture
def options(tmp_path: Path) -> CompareOptions:
    (tmp_path / "zero.json").write_text("{}")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TREE))
    return CompareOptions(run_file=tmp_path / "run.yaml", out=tmp_path / "out", command="fedbert-ds compare")


def test_all_systems_by_default_and_the_run_files_seed(options: CompareOptions) -> None:
    plan = Plan.of(options)
    assert [system.name for system in plan.systems] == [
        "centralized", "alone", "alone-share", "synchronous", "parallel", "sequential", "fedavg", "diloco", "muloco",
    ]  # fmt: skip
    assert plan.seeds == (1,) and plan.tasks is None
    folders = [job.folder.path for system in plan.systems for job in plan.jobs(system, 1).values()]
    assert len(set(folders)) == len(folders) == 7 + 2 * 2


def test_every_run_trains_all_windows_on_one_text(options: CompareOptions) -> None:
    plan = Plan.of(replace(options, seeds=(1, 2)))
    for seed in (1, 2):
        for system in plan.systems:
            for job in plan.jobs(system, seed).values():
                run = job.config.run
                assert (run.windows, run.seed, run.evaluate_every, run.early_stopping_patience) == (
                    40,
                    seed,
                    None,
                    None,
                )
                assert not run.keep_best and job.config.server.port == 0
                assert job.config.tokenizer.path == str(options.out / f"seed-{seed}" / "text" / "tokenizer")
                # What the command says is what is recorded.
                given = [part for part in job.command if "=" in part and not part.startswith("--")]
                assert load_config(options.run_file, given) == job.config
    assert plan.text_config(2).tokenizer.path is None, "it is trained there"


def test_a_checkpoints_vocabulary_is_kept(options: CompareOptions) -> None:
    plan = Plan.of(replace(options, overrides=("model.checkpoint=bert-base-uncased",)))
    (job,) = plan.jobs(System("synchronous"), 1).values()
    assert job.config.tokenizer.path is None and job.config.model.checkpoint == "bert-base-uncased"


def test_clients_alone_are_runs_of_their_own(options: CompareOptions) -> None:
    plan = Plan.of(replace(options, evaluations=8, patience=3))
    jobs = plan.jobs(ALONE, 1)
    assert list(jobs) == ["client-00", "client-01"]
    assert [job.folder.path.name for job in jobs.values()] == ["ward", "lab"]
    command = jobs["client-01"].command
    assert "fedbert_ds.compare.alone" in command
    for option, value in (("--client", "client-01"), ("--every", "5"), ("--patience", "3")):
        assert command[command.index(option) + 1] == value
    assert "--share" not in command and "--share" in plan.jobs(ALONE_SHARE, 1)["client-01"].command
    unhurried = Plan.of(replace(options, evaluations=8)).jobs(ALONE, 1)["client-01"]
    assert unhurried.fingerprint != jobs["client-01"].fingerprint, "patience decides the result"


def test_ranks_decide_a_federated_run_alone(options: CompareOptions) -> None:
    one, two = Plan.of(options), Plan.of(replace(options, ranks=2))
    for system, differs in ((System("synchronous"), True), (CENTRALIZED, False)):
        prints = [plan.jobs(system, 1)[""].fingerprint for plan in (one, two)]
        assert (prints[0] != prints[1]) == differs


def test_on_a_gpu_every_run_says_so(options: CompareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--device cuda: this machine has no GPU"):
        Plan.of(replace(options, device="cuda"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    cpu, gpu = Plan.of(options), Plan.of(replace(options, device="cuda"))
    for system in cpu.systems:
        for client, job in gpu.jobs(system, 1).items():
            other = cpu.jobs(system, 1)[client]
            assert (job.device, other.device) == ("cuda", "cpu") and job.fingerprint != other.fingerprint
            assert ("--device" in job.command) == (not system.is_federated) and "--device" not in other.command
    assert gpu.settings == cpu.settings | {"device": "cuda"}


def test_owners_have_their_sources_names_where_each_has_one(options: CompareOptions) -> None:
    assert Plan.of(options).owners == {"client-00": "ward", "client-01": "lab"}
    by_size = Plan.of(replace(options, overrides=("data.shards=size",)))
    assert by_size.owners == {"client-00": "client-00", "client-01": "client-01"}
    twins = Plan.of(replace(options, overrides=('data.source=["a/notes.txt", "b/notes.txt"]',)))
    assert twins.owners == {"client-00": "client-00", "client-01": "client-01"}


def test_quick_is_two_clients_and_what_the_user_sets_goes_before(options: CompareOptions) -> None:
    three = ('data.source=["a.txt", "b.txt", "c.txt"]', "clients.expected=3", "clients.local=3")
    with pytest.raises(ConfigError, match="3 clients for 2 sources"):
        Plan.of(replace(options, quick=True, overrides=three))
    tree = TREE | {
        "data": TREE["data"] | {"source": ["a.txt", "b.txt", "c.txt"]},
        "clients": {"expected": 3, "local": 3},
    }
    options.run_file.write_text(yaml.safe_dump(tree))
    plan = Plan.of(replace(options, quick=True, overrides=("run.windows=4",)))
    assert plan.base.data.source == ("a.txt", "b.txt") and plan.base.run.windows == 4
    assert plan.systems == (CENTRALIZED, ALONE, System("synchronous"), System("diloco", 4))


def test_settings_name_no_place_and_do_not_depend_on_seeds(options: CompareOptions, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "ward.jsonl").touch()
    files = ("data.shards=size", f'data.source=["{tmp_path / "ward.jsonl"}"]', f"tokenizer.path={tmp_path / 'words'}")
    settings = Plan.of(replace(options, overrides=files)).settings
    assert str(tmp_path) not in str(settings)
    assert settings["data"]["source"] == ["ward.jsonl"] and settings["tokenizer"]["path"] == "words"
    assert settings == Plan.of(replace(options, overrides=files, seeds=(5,), systems=("alone",))).settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"overrides": ("clients.local=0", "data.shards=size")}, "clients.local is 0; compare starts all clients here"),
        ({"overrides": ("clients.expected=3",)}, "clients.local 2 is not clients.expected 3"),
        ({"overrides": ("run.evaluate_every=null", "run.keep_best=false", "run.early_stopping_patience=null",
                        "data.client_held_out=0")}, "data.client_held_out is 0, which leaves no text"),
        (
            {"overrides": ("task={name: sequence_regression}",)},
            "task.name sequence_regression: compare trains masked words; remove the section task",
        ),
        ({"overrides": ("run.keep_best=false", "aggregator={address: h:1, secret: s}")}, "starts no aggregator"),
        ({"systems": ("fedavg:30",)}, "--systems fedavg:30: .*run.windows 40 is no multiple"),
        ({"systems": ("sequential:7",)}, "--systems sequential:7: .*in the middle of a turn"),
        ({"systems": ("all",)}, "--systems all: choose centralized"),
        ({"seeds": (1, 1)}, "--seeds 1 1: name each once"),
        ({"ranks": 0}, "--ranks 0: must be 1 or more"),
        ({"evaluations": 0}, "--evaluations 0: must be 1 or more"),
        ({"patience": 0}, "--patience 0: must be 1 or more"),
        ({"tasks": ("RTE",)}, "--tasks needs --glue DIR"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_is_refused(options: CompareOptions, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        Plan.of(replace(options, **changes))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_missing_task_files_are_an_error_before_any_work(options: CompareOptions, tmp_path: Path) -> None:
    write_glue(tmp_path / "glue", "RTE")
    with_tasks = replace(options, glue=tmp_path / "glue", tasks=("rte",))
    plan = Plan.of(with_tasks)
    assert plan.tasks is not None and plan.tasks.tasks == ("RTE",)
    with pytest.raises(DataError, match="STS-B"):
        Plan.of(replace(with_tasks, tasks=("RTE", "STS-B")))
