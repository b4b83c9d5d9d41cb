"""The server's side: a run that fits, and set-ups that are damaged in one place each."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedbert_ds.certificates.authority import Authority
from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.doctor.finding import Finding
from fedbert_ds.doctor.run import examine_run
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.run_folder import RunFolder

TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates, a tokenizer and a text."""
    folder = tmp_path_factory.mktemp("doctor")
    authority = Authority(folder / "certs")
    authority.create("an authority", 3000)
    authority.issue("localhost", 300, hosts=["localhost", "127.0.0.1"])
    train_wordpiece([Article("one", TEXT * 9)], 100).save_pretrained(folder / "tokenizer")
    (folder / "notes.txt").write_text(TEXT)
    return folder


def config_in(folder: Path, **sections: Any) -> RunConfig:
    """A run with remote clients that fits, with these sections changed."""
    certs = folder / "certs"
    tree: dict[str, Any] = {
        "run": {"directory": str(folder / "run")},
        "body": {"deepspeed": None, "zero_stage": 0},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "clients": {"expected": 2, "local": 0},
        "server": {
            "port": 0,
            "tls": {
                "ca": str(certs / "ca.pem"),
                "certificate": str(certs / "localhost.pem"),
                "key": str(certs / "localhost.key"),
            },
        },
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return parse_config(tree, "test")


def faults(config: RunConfig, ranks: int | None = None) -> list[str]:
    findings: list[Finding] = list(examine_run(config, ranks))
    return [finding.line for finding in findings if finding.is_in_the_way]


def test_a_run_that_fits_is_let_through_and_nothing_is_left_behind(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    findings = list(examine_run(config_in(folder)))
    assert not [finding.line for finding in findings if finding.is_in_the_way]
    about = {finding.about for finding in findings}
    assert {"Python", "packages", "run folder", "port", "name", "proxy", "descriptors"} <= about
    assert {"certificate", "authority", "clock", "GPU", "model", "disk", "memory", "tokenizer"} <= about
    assert sorted(folder.rglob("*")) == before


def test_text_of_local_clients_is_read(folder: Path) -> None:
    local = {"clients": {"local": 2}, "data": {"source": [str(folder / "notes.txt")]}}
    findings = {finding.about: finding for finding in examine_run(config_in(folder, **local))}
    assert findings["text"].level == "ok" and findings["[UNK]"].says.startswith("0.0 % of")
    (folder / "picture.txt").write_bytes(bytes(range(256)) * 40)
    (line,) = faults(config_in(folder, clients={"local": 2}, data={"source": [str(folder / "picture.txt")]}))
    assert line.startswith("fail  text: ") and "picture.txt" in line


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"run": {"directory": "/dev/null/run"}}, "run folder: /dev/null/run: /dev/null cannot be written"),
        ({"body": {"deepspeed": "nowhere.json"}}, "DeepSpeed: body.deepspeed: nowhere.json"),
        ({"server": {"host": "0.0.0.0", "advertise": "no..host"}}, "name: no..host cannot be looked up"),
        ({"server": {"advertise": "192.0.2.7"}}, "is not for 192.0.2.7, which clients dial"),
        ({"server": {"tls": None, "host": "0.0.0.0", "advertise": "127.0.0.1"}}, "in plain text"),
        ({"tokenizer": {"path": "./nowhere"}}, "tokenizer: ./nowhere: no such folder"),
        ({"tokenizer": {"path": None}}, "tokenizer: none is named"),
        ({"run": {"trackers": ["abacus"]}}, "trackers: run.trackers: abacus"),
        ({"model": {"checkpoint": "./nowhere"}}, "model: "),
        ({"clients": {"local_device": "cuda"}}, "device: clients.local_device: cuda"),
        ({"clients": {"expected": 10**6}}, "descriptors: "),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_damaged_is_named(folder: Path, sections: dict[str, Any], says: str,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    lines = faults(config_in(folder, **sections))
    assert any(line.startswith("fail  ") and says in line and "; " in line for line in lines), lines


def test_without_a_body_nothing_is_missing(folder: Path) -> None:
    config = config_in(folder, federation={"mode": "parallel"}).model_copy(update={"cut": "whole"})
    assert faults(config) == []


def test_a_vast_model_is_counted_and_never_made(folder: Path) -> None:
    """Its 300 billion weights would fit no memory."""
    lines = faults(config_in(folder, model={"hidden_size": 32768, "num_hidden_layers": 24}))
    assert any(line.startswith("fail  disk: ") for line in lines), lines


def test_checkpoints_need_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    (line,) = faults(config_in(folder))
    assert line.startswith("fail  disk: 0.0 GB free at ") and "checkpoints take" in line


def test_every_rank_needs_its_port(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = [line for line in faults(config_in(folder, server={"port": port - 1}), ranks=2) if str(port) in line]
    assert f"127.0.0.1:{port} cannot be listened on" in line


def test_a_folder_with_a_run_is_gone_on_with_or_not(folder: Path, tmp_path: Path) -> None:
    config = config_in(folder, run={"directory": str(tmp_path / "run")})
    RunFolder(tmp_path / "run").write_config(config)
    told = [finding for finding in examine_run(config) if finding.about == "run folder"]
    assert told[1].level == "ok" and "--resume goes on with it" in told[1].says
    (line,) = faults(config_in(folder, run={"directory": str(tmp_path / "run"), "seed": 7}))
    assert "run.seed is 7 now and was 1" in line
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    (line,) = faults(config_in(folder, run={"directory": str(tmp_path / "other")}))
    assert "holds a run already" in line or "mine.txt" in line
