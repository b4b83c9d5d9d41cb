"""What is wrong with a run is said before anything is written, and before torch is imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import ConfigError, RunError
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.before_start import check_before_start


def config_in(folder: Path, text: str = "{}") -> RunConfig:
    path = folder / "deepspeed.json"
    path.write_text(text)
    return parse_config({"run": {"directory": str(folder / "run")}, "body": {"deepspeed": str(path)}}, "test")


def test_a_run_that_fits_is_let_through_and_nothing_is_written(tmp_path: Path) -> None:
    check_before_start(config_in(tmp_path), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["deepspeed.json"]


def test_a_folder_and_a_deepspeed_file_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume here"):
        check_before_start(config_in(tmp_path), resume=True)
    with pytest.raises(ConfigError, match="gradient_clipping belongs to the run file"):
        check_before_start(config_in(tmp_path, '{"gradient_clipping": 1.0}'), resume=False)


@pytest.mark.parametrize("below", ["", "sub"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_s_folder_that_is_a_file_is_told(tmp_path: Path, below: str, resume: bool) -> None:
    (tmp_path / "run").write_text("notes")
    config = config_in(tmp_path)
    run = config.run.model_copy(update={"directory": tmp_path / "run" / below})
    with pytest.raises(RunError, match=r"is a file and no folder; set another run\.directory"):
        check_before_start(config.model_copy(update={"run": run}), resume)
    assert (tmp_path / "run").read_text() == "notes"


def test_a_mistake_does_not_wait_for_torch() -> None:
    program = "import sys, fedbert_ds.server.before_start as it; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_without_a_body_no_deepspeed_file_is_read(tmp_path: Path) -> None:
    body = {"deepspeed": str(tmp_path / "nowhere.json")}
    tree = {"run": {"directory": str(tmp_path / "run")}, "body": body, "federation": {"mode": "parallel"}}
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        check_before_start(parse_config(tree, "test"), resume=False)
    check_before_start(parse_config(tree | {"cut": "whole"}, "test"), resume=False)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_clients_that_are_to_have_gpus_need_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    clients = config_in(tmp_path).clients.model_copy(update={"local_device": "cuda"})
    config = config_in(tmp_path).model_copy(update={"clients": clients})
    if has_gpu:
        return check_before_start(config, resume=False)
    with pytest.raises(ConfigError, match=r"clients\.local_device: cuda, and this machine has no GPU"):
        check_before_start(config, resume=False)


def test_layers_that_are_to_be_compiled_need_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = config_in(tmp_path).body.model_copy(update={"compile": True})
    config = config_in(tmp_path).model_copy(update={"body": body})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"body\.compile: true needs a C\+\+ compiler"):
        check_before_start(config, resume=False)
