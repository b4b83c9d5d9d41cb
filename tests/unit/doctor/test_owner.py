"""The client's side, from light checks to what a real server asks for."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit.client.test_session import TIMEOUT, Served, served
from unit.wire.test_tls import Made, ours, serve, theirs

from fedbert_ds.client.limits import Limits
from fedbert_ds.client.session import ClientOptions
from fedbert_ds.doctor.finding import Finding
from fedbert_ds.doctor.owner import Owner, examine_owner
from fedbert_ds.errors import ConfigError, WireError
from fedbert_ds.server.network.events import JoinAsked
from fedbert_ds.wire.tls import TlsFiles

__all__ = ["ours", "serve", "served", "theirs"]
"""Fixtures."""


ENGLISH = "the quick brown fox jumps over the lazy dog"


def never() -> ClientOptions:
    raise AssertionError("no server is asked")


def owner_of(folder: Path, server: str, tls: TlsFiles | None = None, text: str = ENGLISH) -> Owner:
    (folder / "notes.txt").write_text(text, encoding="utf-8")
    return Owner(server, (str(folder / "notes.txt"),), tls, folder / "state")


def faults(findings: list[Finding]) -> list[str]:
    return [finding.line for finding in findings if finding.is_in_the_way]


def examined(served: Served, limits: Limits | None = None, text: str = ENGLISH) -> list[Finding]:
    """Findings of a client that a server answers."""
    owner = owner_of(served.folder, f"127.0.0.1:{served.port}", text=text)
    options = ClientOptions(
        owner.server, owner.data, "ada", owner.state_folder, connect_timeout=TIMEOUT, join_timeout=TIMEOUT
    )
    options = replace(options, limits=limits or options.limits)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: list(examine_owner(owner, lambda: options)))
        asked = served.event(JoinAsked)
        assert asked.hello.inspect
        asked.answer.set_result(served.welcome(session=""))
        return found.result(TIMEOUT)


def test_a_client_that_fits_is_told_what_the_run_asks_for(served: Served) -> None:
    findings = examined(served)
    assert not faults(findings)
    told = {finding.about: finding for finding in findings}
    assert told["run"].says == "it would take ada, for 2 windows"
    assert told["[UNK]"].level == "ok" and told["memory"].level == "ok" and told["text"].level == "ok"
    assert "cannot be told" in told["clock"].says
    assert not (served.folder / "state").exists()


def test_a_run_that_asks_for_more_than_the_owner_allows(served: Served) -> None:
    (line,) = faults(examined(served, Limits(max_tokens=5)))
    assert line.startswith("fail  run: ") and "--max-tokens" in line


def test_a_tokenizer_that_reads_nothing_of_the_text(served: Served) -> None:
    (line,) = faults(examined(served, text="これ は 犬 です"))
    assert line.startswith("fail  [UNK]: 100.0 %")


def test_a_server_that_refuses(served: Served) -> None:
    owner = owner_of(served.folder, f"127.0.0.1:{served.port}")
    options = ClientOptions(
        owner.server, owner.data, "ada", owner.state_folder, connect_timeout=TIMEOUT, join_timeout=TIMEOUT
    )
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: list(examine_owner(owner, lambda: options)))
        served.event(JoinAsked).answer.set_exception(WireError("ada is not among clients.allowed"))
        (line,) = faults(found.result(TIMEOUT))
    assert "the server refused this client: ada is not among clients.allowed" in line


@pytest.mark.parametrize(
    ("server", "says"),
    [
        ("no..host:29600", "name: no..host cannot be looked up"),
        ("body.example", "server: body.example: is no HOST:PORT"),
        ("http://body.example:29600", "server: http://body.example:29600: leave out what stands before"),
        ("run/server.address", "server: run/server.address: no such file"),
    ],
)
def test_a_server_that_cannot_be_found(tmp_path: Path, server: str, says: str) -> None:
    (line,) = faults(list(examine_owner(owner_of(tmp_path, server), never)))
    assert says in line


def test_tls_that_fits_tells_that_the_clock_does(tmp_path: Path, ours: Made, serve: Any) -> None:
    def options() -> ClientOptions:
        raise ConfigError("that will do; stop here")

    port = serve(ours.server)
    findings = list(examine_owner(owner_of(tmp_path, f"127.0.0.1:{port}", ours.client), options))
    told = {finding.about: finding for finding in findings}
    assert told["TLS"].level == "ok" and "counts by it" in told["clock"].says
    assert told["run"].line == "fail  run: that will do; stop here"


@pytest.mark.parametrize(
    ("shown", "says"),
    [
        ("expired_client", "certificate: "),
        ("foreign", "authority: "),
        ("none", "TLS: 127.0.0.1:"),
        ("wrong name", "its certificate is not for 127.0.0.2"),
    ],
)
def test_certificates_that_keep_the_two_apart(
    tmp_path: Path, ours: Made, theirs: Made, serve: Any, shown: str, says: str
) -> None:
    port = serve(ours.server)
    files = {
        "expired_client": ours.expired_client,
        "foreign": TlsFiles(ours.client.ca, theirs.client.certificate, theirs.client.key),
        "none": None,
        "wrong name": ours.client,
    }[shown]
    host = "127.0.0.2" if shown == "wrong name" else "127.0.0.1"
    lines = faults(list(examine_owner(owner_of(tmp_path, f"{host}:{port}", files), never)))
    assert len(lines) == 1 and says in lines[0], lines


def test_text_that_is_none_is_told_before_any_server_answers(tmp_path: Path) -> None:
    (tmp_path / "scan.txt").write_bytes(bytes(range(256)) * 40)
    owner = Owner("no..host:1", (str(tmp_path / "scan.txt"),), None, tmp_path / "state")
    assert [line[:11] for line in faults(list(examine_owner(owner, never)))] == ["fail  text:", "fail  name:"]


def test_torch_is_not_imported_before_a_server_answers(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom fedbert_ds.cli import main\n"
        f"sys.argv = ['fedbert-ds']\ntry:\n    main(['doctor', '--server', 'no..host:1', '--state', {str(tmp_path)!r},"
        f" '--data', {str(tmp_path / 'notes.txt')!r}])\n"
        "except SystemExit as exit_:\n    sys.exit(9 if 'torch' in sys.modules else exit_.code)\n"
    )
    (tmp_path / "notes.txt").write_text("the quick brown fox")
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "ok    text: 1 articles, 19 characters" in found.stdout
