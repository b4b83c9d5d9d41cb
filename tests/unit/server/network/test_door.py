"""The rules of the door, without a network: who is who, who is turned away, what a log holds."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
from pathlib import Path

import pytest

from fedbert_ds.errors import WireError
from fedbert_ds.server.network import door
from fedbert_ds.server.network.door import PERIOD_SECONDS, TOLD_AT_ONCE, Caller, Door, DoorRules, Refusals

TOKENS = {"client-00": "a secret"}


def caller(name: str, *others: str) -> Caller:
    """A caller with a certificate of these names."""
    names = [name.encode(), *(other.encode() for other in others)]
    return {"x509_common_name": names[:1], "x509_subject_alternative_name": names}


def test_a_name_is_the_certificate_s() -> None:
    secure = Door(DoorRules(), has_tls=True)
    secure.check(caller("hospital-a"), "hospital-a", "")
    with pytest.raises(WireError, match="client hospital-a shows the certificate of hospital-b; drop --id"):
        secure.check(caller("hospital-b"), "hospital-a", "")


def test_one_certificate_has_one_seat() -> None:
    """Whatever other names its authority wrote into it."""
    secure = Door(DoorRules(), has_tls=True)
    secure.check(caller("ada", "bo", "cy"), "ada", "")
    for name in ("bo", "cy"):
        with pytest.raises(WireError, match=f"client {name} shows the certificate of ada"):
            secure.check(caller("ada", "bo", "cy"), name, "")


def test_in_plain_text_a_name_is_what_is_said() -> None:
    Door(DoorRules(), has_tls=False).check({}, "ada", "")


@pytest.mark.parametrize("has_tls", [True, False])
def test_a_local_client_is_who_has_its_token(has_tls: bool) -> None:
    """It shows its server's certificate, if any; nobody else's helps."""
    rules = Door(DoorRules(allowed=(), tokens=TOKENS), has_tls)
    rules.check(caller("body.example"), "client-00", "a secret")
    for token in ("", "another", "a secret "):
        with pytest.raises(WireError, match="client client-00 is a process of this run's launcher; give this one"):
            rules.check(caller("client-00"), "client-00", token)


@pytest.mark.parametrize("has_tls", [True, False])
def test_who_is_not_on_the_list_stays_out(has_tls: bool) -> None:
    rules = Door(DoorRules(allowed=("hospital-a",)), has_tls)
    rules.check(caller("hospital-a"), "hospital-a", "")
    with pytest.raises(WireError, match=r"client hospital-b is not on the run's list .*\(clients.allowed\)"):
        rules.check(caller("hospital-b"), "hospital-b", "")


@pytest.mark.parametrize("name", ["", "a b", "\x1b[2J", "\trank 0", "x" * 65])
def test_a_name_that_could_steer_a_terminal_goes_no_further(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WireError, match="a client's name is up to 64 letters"):
        Door(DoorRules(), has_tls=False).let_in({}, name, "")
    assert capsys.readouterr().out.strip().isprintable()


def certificate(number: int) -> tuple[Caller, str]:
    """A certificate as gRPC tells it, and its fingerprint."""
    der = b"certificate %d" % number
    pem = ssl.DER_cert_to_PEM_cert(der)
    return {**caller("ada"), "x509_pem_cert": [pem.encode()]}, hashlib.sha256(der).hexdigest()


def test_a_revoked_certificate_stays_out_from_then_on(tmp_path: Path) -> None:
    (old, fingerprint), (new, _) = certificate(1), certificate(2)
    listed = tmp_path / "revoked.txt"
    listed.write_text("# nobody\n")
    rules = Door(DoorRules(revoked=listed), has_tls=True)
    rules.check(old, "ada", "")
    listed.write_text(f"{fingerprint} ada 2026-01-01\n")
    for refused in (lambda: rules.check(old, "ada", ""), lambda: rules.let_in_a_rank(old)):
        with pytest.raises(WireError, match="the certificate of ada is revoked"):
            refused()
    rules.check(new, "ada", "")
    rules.let_in_a_rank(new)
    listed.unlink()
    with pytest.raises(WireError, match="the revocation list cannot be read"):
        rules.check(new, "ada", "")


def test_a_list_that_is_missing_at_the_start_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(WireError, match=r"gone\.txt: the revocation list cannot be read; check tls\.revoked"):
        Door(DoorRules(revoked=tmp_path / "gone.txt"), has_tls=True)


def test_a_revocation_ends_streams_that_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "REVOCATIONS_SECONDS", 0.01)
    listed = tmp_path / "revoked.txt"
    listed.write_text("")
    rules = Door(DoorRules(revoked=listed), has_tls=True)
    (ada, fingerprint), (other, _) = certificate(1), certificate(2)
    rules.let_in(ada, "ada", "")
    rules.let_in({**other, **caller("bo"), "x509_pem_cert": other["x509_pem_cert"]}, "bo", "")

    class Stream:
        def __init__(self) -> None:
            self.ended = asyncio.Event()

        def finish(self) -> None:
            self.ended.set()

    async def run() -> bool:
        streams = {"ada": Stream(), "bo": Stream()}
        watch = asyncio.create_task(rules.watch(streams))
        listed.write_text("half a li")  # while it is being copied
        await asyncio.sleep(0.05)
        listed.write_text(f"{fingerprint}\n")
        await asyncio.wait_for(streams["ada"].ended.wait(), 20)
        watch.cancel()
        return streams["bo"].ended.is_set()

    assert not asyncio.run(run()), "the other's certificate counts"


def test_rules_reach_a_process_of_their_own(tmp_path: Path) -> None:
    for rules in (DoorRules(), DoorRules(("ada",), tmp_path / "revoked.txt", TOKENS)):
        assert DoorRules.from_json(json.loads(json.dumps(rules.to_json()))) == rules


def test_a_flood_of_refusals_fills_no_log() -> None:
    lines: list[str] = []
    now = 0.0
    refusals = Refusals(lines.append, lambda: now)
    for number in range(100_000):
        refusals.add(f"number {number} \x1b[2J")
    assert len(lines) == TOLD_AT_ONCE and lines[0] == r"refused: number 0 \x1b[2J"
    now += PERIOD_SECONDS + 1
    refusals.add("later")
    assert lines[-1] == f"refused: later (and {100_000 - TOLD_AT_ONCE:,} others before)"
    refusals.close()
    assert len(lines) == TOLD_AT_ONCE + 1
    for number in range(TOLD_AT_ONCE):
        refusals.add(str(number))
    refusals.close()
    assert lines[-1] == "refused: 1 others"
