"""Names that users type, and what each system makes of a run file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.compare.systems import (
    ALONE,
    CENTRALIZED,
    NAMES,
    PLAIN,
    System,
    launched,
    overrides_of,
    parse_systems,
    plain,
)
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import ConfigError
from fedbert_ds.run_file import load_config, parse_config

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"


def base(**sections: Any) -> RunConfig:
    return parse_config({"run": {"windows": 40}, **sections}, "test")


def applied(name: str, run_file: str, *users: str) -> RunConfig:
    path = CONFIGS / run_file
    own = load_config(path, users)
    (system,) = parse_systems([name], own)
    return load_config(path, (*users, *overrides_of(system, own)))


def test_names_with_and_without_numbers() -> None:
    parsed = parse_systems(["centralized", "alone", "synchronous", "parallel", "fedavg:5", "diloco"], base())
    assert parsed == [
        CENTRALIZED, ALONE, System("synchronous"), System("parallel", 10), System("fedavg", 5), System("diloco", 20),
    ]  # fmt: skip
    assert [system.typed for system in parsed][3:] == ["parallel:10", "fedavg:5", "diloco:20"]
    (tuned,) = parse_systems(["diloco:2:0.1"], base())
    assert (
        tuned == System("diloco", 2, server_lr=0.1)
        and tuned.typed == "diloco:2:0.1"
        and tuned.slug == "diloco-2-lr-0.1"
    )
    assert tuned.label == "diloco, average every 2, server_lr 0.1"
    assert applied("muloco:4:0.25", "wikitext.yaml").federation.server_lr == 0.25
    assert (
        applied("diloco:4:0.25", "diloco.yaml", "federation.server_lr=0.5", "run.windows=480").federation.server_lr
        == 0.25
    )
    assert [system.is_federated for system in parsed] == [False, False, True, True, True, True]
    assert len({system.slug for system in parse_systems(NAMES, base())}) == len(NAMES)


@pytest.mark.parametrize(
    ("run_file", "name", "number"),
    [("sequential.yaml", "sequential", 10), ("diloco.yaml", "diloco", 20), ("muloco.yaml", "muloco", 20)],
)
def test_a_run_files_own_period_is_its_systems_default(run_file: str, name: str, number: int) -> None:
    own = load_config(CONFIGS / run_file, ["federation.average_every=4", "run.windows=480"])
    assert parse_systems([name], own) == [System(name, 4)] and number != 4
    others = {"diloco", "muloco", "fedavg", "parallel", "sequential"} - {name}
    assert all(system.average_every in (10, 20) for system in parse_systems(sorted(others), own))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["fedsgd"], "--systems fedsgd: choose centralized, alone, alone-share"),
        (["run.seed=2"], "--systems run.seed=2: section.key=value goes right behind RUN_FILE"),
        (["synchronous:5"], "--systems synchronous:5: synchronous takes no number; drop :5"),
        (["fedavg:"], "--systems fedavg:: give fedavg a number of windows, fedavg:20 say"),
        (["diloco:0"], "--systems diloco:0: give diloco a number"),
        (["parallel:-1"], "--systems parallel:-1: give parallel a number"),
        (["parallel:x"], "--systems parallel:x: give parallel a number"),
        (["fedavg:2:0.1"], "--systems fedavg:2:0.1: fedavg has no server optimizer; drop :0.1"),
        (["diloco:2:0"], "--systems diloco:2:0: a server_lr is a number above 0"),
        (["diloco:2:x"], "--systems diloco:2:x: a server_lr is a number above 0"),
        (["diloco:2:inf"], "--systems diloco:2:inf: a server_lr is a number above 0"),
        (["fedavg", "fedavg:20"], "--systems fedavg:20: name each once"),
    ],
)
def test_what_is_refused(names: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_systems(names, base())
    assert str(raised.value).startswith(words)


def test_every_system_from_a_run_file_with_a_body() -> None:
    run_file = "wikitext.yaml"
    assert applied("synchronous", run_file).federation.mode == "synchronous"
    assert applied("parallel:5", run_file).federation.average_every == 5
    assert applied("sequential:8", run_file).federation.mode == "sequential"
    for name, optimizer in (("fedavg", "none"), ("diloco", "nesterov"), ("muloco", "nesterov")):
        config = applied(name, run_file, "body.precision=bf16", "body.zero_stage=3", "federation.staleness=1")
        assert config.cut == "whole" and config.federation.mode == "parallel"
        assert config.federation.server_optimizer == optimizer and config.federation.average_every == 20
        assert config.body.precision == "fp32" and config.federation.staleness == 0
        assert (config.optimizer.name == "muon") == (name == "muloco")
        assert config.wire.updates == ("int2_hadamard" if name == "muloco" else "fp32")


def test_every_system_from_a_run_file_of_whole_models() -> None:
    for name in NAMES:
        config = applied(name, "diloco.yaml", "run.windows=480", "federation.server_lr=0.5")
        if name in ("fedavg", "diloco", "muloco"):
            assert config.cut == "whole"
        elif name not in PLAIN:
            assert config.cut == "embeddings" and config.federation.server_optimizer == "none"
        is_outer = name in ("diloco", "muloco")
        assert config.federation.server_lr == (0.5 if is_outer else None)


def test_what_means_nothing_to_a_system_is_left_out() -> None:
    users = ("federation.mode=parallel", "federation.proximal=0.1", "federation.participants=4")
    assert applied("parallel:5", "wikitext.yaml", *users).federation.proximal == 0.1
    assert applied("fedavg:5", "wikitext.yaml", *users).federation.participants == 4
    assert applied("synchronous", "wikitext.yaml", *users).federation.proximal == 0
    assert applied("synchronous", "wikitext.yaml", *users).federation.participants == 4
    assert applied("sequential:5", "wikitext.yaml", *users).federation.participants == "all"


def test_whole_models_are_compared_where_parts_are_personal() -> None:
    run = base(federation={"mode": "parallel", "average_scope": "head"})
    (system,) = parse_systems(["parallel:2"], run)
    (section,) = [text for text in overrides_of(system, run) if text.startswith("federation=")]
    assert json.loads(section.removeprefix("federation="))["personal_parts"] == "averaged"


def test_commands() -> None:
    federated = launched(Path("run.yaml"), ["a.b=1"], ranks=2)
    assert federated[:3] == [sys.executable, "-m", "torch.distributed.run"] and "--nproc-per-node=2" in federated
    assert federated[-5:] == ["--module", "fedbert_ds.server.pretrain", "--config", "run.yaml", "a.b=1"]
    assert plain("alone", Path("run.yaml"), ["a.b=1"], "--client", "x")[1:] == [
        "-m", "fedbert_ds.compare.alone", "--config", "run.yaml", "--client", "x", "a.b=1",
    ]  # fmt: skip
