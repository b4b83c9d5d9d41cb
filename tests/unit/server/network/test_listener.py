"""Who gets past a rank's endpoint: by certificate, by token, by list; and files that do not fit."""

from __future__ import annotations

import datetime as dt
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from unit.server.network.loopback import KINDS, TIMEOUT, Listening, Stream, listening, save, session_of

from fedbert_ds.certificates.authority import Authority
from fedbert_ds.errors import WireError
from fedbert_ds.server.network import door
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.network.events import Connected, Disconnected
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire import introduction
from fedbert_ds.wire.channel import TlsFiles, await_ready, connect, server_credentials
from fedbert_ds.wire.identity import fingerprint


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TlsFiles]:
    """Makes TLS files: `sign("stranger")` by another authority than all others."""
    ours, another = (Authority(tmp_path_factory.mktemp("tls")) for _ in range(2))
    for one in (ours, another):
        one.create("an authority", 100)

    def sign(name: str) -> TlsFiles:
        signs = another if name == "stranger" else ours
        certificate = signs.folder / f"{name}.pem"
        if not certificate.exists():
            signs.issue(name, 90, hosts=None if name in ("ada", "bo", "eve") else [])
        return TlsFiles(signs.folder / "ca.pem", certificate, certificate.with_suffix(".key"))

    return sign


@pytest.fixture(scope="module")
def secure(authority: Callable[[str], TlsFiles]) -> Iterator[Listening]:
    with listening(tls=authority("server")) as started:
        yield started


def test_mutual_tls_lets_a_signed_client_in(secure: Listening, authority: Callable[[str], TlsFiles]) -> None:
    stream = Stream(secure.address, "ada", tls=authority("ada"))
    assert secure.event() == Connected("ada", session_of("ada"))
    secure.real.send("ada", save(1))
    assert stream.receive() == save(1)
    stream.end()
    assert secure.event() == Disconnected("ada", session=session_of("ada"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_ipv6_with_and_without_tls(authority: Callable[[str], TlsFiles], kind: type, host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    for tls, own in ((None, None), (authority("server"), authority("ada"))):
        endpoint = kind(host, 0, tls)
        address = f"[::1]:{endpoint.start()}"
        try:
            with connect(address, own) as channel:
                await_ready(channel, address, own, TIMEOUT)
        finally:
            endpoint.stop(grace=0.1)


@pytest.mark.parametrize("who", ["plaintext", "no certificate", "a certificate of another authority"])
def test_mutual_tls_keeps_everybody_else_out(secure: Listening, authority: Callable[[str], TlsFiles], who: str) -> None:
    ca = authority("server").ca.read_bytes()
    if who == "plaintext":
        channel = grpc.insecure_channel(secure.address)
    elif who == "no certificate":
        channel = grpc.secure_channel(secure.address, grpc.ssl_channel_credentials(ca))
    else:
        _, certificate, key = authority("stranger").read()
        channel = grpc.secure_channel(secure.address, grpc.ssl_channel_credentials(ca, key, certificate))
    with channel:
        with pytest.raises(grpc.RpcError) as caught:
            introduction.join(channel, pb.Hello(client="eve"), 5).result()
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    secure.no_event()


def test_a_client_does_not_trust_a_server_of_another_authority(authority: Callable[[str], TlsFiles]) -> None:
    with listening(tls=authority("stranger")) as stranger:
        with connect(stranger.address, authority("ada")) as channel, pytest.raises(grpc.RpcError) as caught:
            introduction.join(channel, pb.Hello(client="ada"), TIMEOUT).result()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        stranger.no_event()


def test_tls_files_that_cannot_be_read_are_one_line(authority: Callable[[str], TlsFiles], tmp_path: Path) -> None:
    good = authority("server")
    for field in ("ca", "certificate", "key"):
        files = TlsFiles(
            **({"ca": good.ca, "certificate": good.certificate, "key": good.key} | {field: tmp_path / "x"})
        )
        for use in (server_credentials, lambda files: connect("127.0.0.1:1", files)):
            with pytest.raises(WireError, match=r"x: cannot be read: No such file or directory; check the TLS files"):
                use(files)


@pytest.mark.parametrize("field", ["ca", "certificate", "key"])
def test_tls_files_that_do_not_fit_are_one_line(
    authority: Callable[[str], TlsFiles], tmp_path: Path, field: str
) -> None:
    """Text that is no PEM, and the key of another certificate: both ends say so."""
    good, text = authority("server"), tmp_path / "text.pem"
    text.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    wrong = [text] if field == "ca" else [text, getattr(authority("ada"), field)]
    for path in wrong:
        files = TlsFiles(**({"ca": good.ca, "certificate": good.certificate, "key": good.key} | {field: path}))
        with pytest.raises(WireError, match=r"not PEM files .*; check the TLS files"):
            connect("127.0.0.1:1", files)
        refused = Endpoint("127.0.0.1", 0, files)
        with pytest.raises(WireError, match=r"not PEM files .*; check the TLS files"):
            refused.start()
        refused.stop(grace=0.1)


# -- identity --------------------------------------------------------------------------------------


def join(address: str, files: TlsFiles | None, **hello: str) -> str:
    """Ask to join; returns the reason of the refusal."""
    with connect(address, files) as channel, pytest.raises(grpc.RpcError) as caught:
        introduction.join(channel, pb.Hello(**hello), TIMEOUT).result()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    return str(caught.value.details())


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_cannot_take_another_s_name(
    kind: type[Endpoint | EndpointProcess], authority: Callable[[str], TlsFiles]
) -> None:
    """Neither to join, nor with the session of another's stream; the owner still can."""
    with listening(kind, authority("server")) as started:
        bo = authority("bo")
        assert join(started.address, bo, client="ada").startswith("client ada shows the certificate of bo; drop --id")
        thief = Stream(started.address, "ada", tls=bo)
        assert "client ada shows the certificate of bo" in thief.refusal()
        thief.end()
        started.no_event()
        owner = Stream(started.address, "ada", tls=authority("ada"))
        assert started.event() == Connected("ada", session_of("ada"))
        # Nor can it break into the stream that is open.
        thief = Stream(started.address, "ada", tls=bo)
        assert "client ada shows the certificate of bo" in thief.refusal()
        thief.end()
        started.real.send("ada", save(1))
        assert owner.receive() == save(1)
        owner.end()


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_takes_a_local_client_s_name(kind: type[Endpoint | EndpointProcess]) -> None:
    """In plain text on loopback: who comes first without the launcher's token has nothing of it."""
    with listening(kind, rules=DoorRules(tokens={"ada": "secret"})) as started:
        assert "client ada is a process of this run's launcher" in join(started.address, None, client="ada")
        squatter = Stream(started.address, "ada")
        assert "client ada is a process of this run's launcher" in squatter.refusal()
        squatter.end()
        started.no_event()
        local = Stream(started.address, "ada", token="secret")
        assert started.event() == Connected("ada", session_of("ada"))
        local.end()


def test_a_local_client_shows_its_server_s_certificate(authority: Callable[[str], TlsFiles]) -> None:
    with listening(tls=authority("server"), rules=DoorRules(tokens={"ada": "secret"})) as started:
        local = Stream(started.address, "ada", tls=authority("server"), token="secret")
        assert started.event() == Connected("ada", session_of("ada"))
        local.end()


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_not_on_the_list_is_told_so(
    kind: type[Endpoint | EndpointProcess], authority: Callable[[str], TlsFiles], capfd: pytest.CaptureFixture[str]
) -> None:
    """And the server's log says so, once for many."""
    with listening(kind, authority("server"), DoorRules(allowed=("ada", "bo"))) as started:
        for _ in range(20):
            assert "client eve is not on the run's list" in join(started.address, authority("eve"), client="eve")
        started.no_event()
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("refused: ")]
    assert len(lines) == door.TOLD_AT_ONCE + 1
    assert "client eve is not on the run's list" in lines[0] and lines[-1] == "refused: 15 others"


def test_a_revoked_certificate_is_out_in_the_middle_of_a_run(
    authority: Callable[[str], TlsFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "REVOCATIONS_SECONDS", 0.05)
    listed = tmp_path / "revoked.txt"
    listed.write_text("")
    ada = authority("ada")
    with listening(tls=authority("server"), rules=DoorRules(revoked=listed)) as started:
        stream, other = Stream(started.address, "ada", tls=ada), Stream(started.address, "bo", tls=authority("bo"))
        assert {started.event(), started.event()} == {
            Connected("ada", session_of("ada")),
            Connected("bo", session_of("bo")),
        }
        listed.write_text(f"{fingerprint(ada.certificate.read_text())} ada\n")
        assert started.event() == Disconnected("ada", session=session_of("ada"))
        with pytest.raises(WireError):
            stream.receive()
        assert "the certificate of ada is revoked" in join(started.address, ada, client="ada")
        started.real.send("bo", save(1))
        assert other.receive() == save(1)
        other.end()


def test_a_revocation_list_that_cannot_be_read_lets_no_server_start(tmp_path: Path) -> None:
    for kind in KINDS:
        refused = kind("127.0.0.1", 0, None, rules=DoorRules(revoked=tmp_path / "gone.txt"))
        with pytest.raises(WireError, match=r"gone\.txt: the revocation list cannot be read"):
            refused.start()
        refused.stop(grace=0.1)


def test_an_expired_certificate_lets_no_server_start(tmp_path: Path) -> None:
    past = Authority(tmp_path, dt.datetime.now(dt.timezone.utc) - dt.timedelta(days=50))
    past.create("an authority", 300)
    certificate = past.issue("server", 20, hosts=[])
    refused = Endpoint("127.0.0.1", 0, TlsFiles(tmp_path / "ca.pem", certificate, certificate.with_suffix(".key")))
    with pytest.raises(WireError, match=r"server\.pem: has expired on .*; renew it"):
        refused.start()
    refused.stop(grace=0.1)


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "a\nb", ""])
def test_a_hello_with_a_bad_name_reaches_nobody(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with listening() as started:
        assert "a client's name is up to 64 letters" in join(started.address, None, client=name)
        started.no_event()
    assert all(line.isprintable() for line in capfd.readouterr().out.splitlines())
