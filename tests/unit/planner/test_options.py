"""Options of `fedbert-ds plan`: what is typed reaches the plan, and machines have defaults."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.cli import main
from fedbert_ds.planner import command
from fedbert_ds.planner.command import machines_of
from fedbert_ds.planner.derive import Machines
from fedbert_ds.planner.options import add_machines


def test_what_is_typed_reaches_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(command, "run_plan", given.append)
    main(["plan", "--config", "a.yaml", "--gpus", "8", "--clients", "64", "--rtt", "5", "window.tokens=9"])
    (options,) = given
    assert (options.config, options.gpus, options.clients, options.rtt) == (Path("a.yaml"), 8, 64, 5.0)
    assert options.overrides == ["window.tokens=9"]


def test_defaults_are_those_of_the_planner() -> None:
    parser = argparse.ArgumentParser()
    add_machines(parser)
    options = parser.parse_args([])
    assert machines_of(argparse.Namespace(gpus=1, clients=16, **vars(options))) == Machines()
