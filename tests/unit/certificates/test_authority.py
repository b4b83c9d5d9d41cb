"""The authority: what it makes holds before others' eyes, and gRPC lets in whom it should."""

from __future__ import annotations

import datetime as dt
import ipaddress
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedbert_ds.certificates.authority import Authority, make_request
from fedbert_ds.errors import ConfigError
from fedbert_ds.wire.channel import TlsFiles, connect, server_credentials
from fedbert_ds.wire.identity import RevocationList, fingerprint, fingerprint_of_peer, name_of_peer

NOW = dt.datetime.now(dt.timezone.utc)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "certs")
    made.create("a test", days=100)
    return made


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def policy(authority: Authority) -> PolicyBuilder:
    return PolicyBuilder().store(Store([load(authority.folder / "ca.pem")]))


def test_another_verifier_agrees_with_what_is_made(authority: Authority) -> None:
    server = load(authority.issue("body.example", 90, hosts=["10.0.0.7"]))
    client = load(authority.issue("hospital-a", 90))
    for name in ("body.example", "localhost"):
        policy(authority).build_server_verifier(x509.DNSName(name)).verify(server, [])
    for address in ("10.0.0.7", "127.0.0.1", "::1"):
        policy(authority).build_server_verifier(x509.IPAddress(ipaddress.ip_address(address))).verify(server, [])
    verified = policy(authority).build_client_verifier().verify(client, [])
    assert verified.subjects == [x509.DNSName("hospital-a")]
    with pytest.raises(VerificationError):
        policy(authority).build_server_verifier(x509.DNSName("elsewhere.example")).verify(server, [])
    with pytest.raises(VerificationError):
        policy(authority).build_server_verifier(x509.DNSName("hospital-a")).verify(client, []), "a client is no server"


def test_days_are_days_and_none_outlives_its_authority(authority: Authority) -> None:
    assert abs(load(authority.issue("ada", 90)).not_valid_after_utc - NOW - dt.timedelta(days=90)) < dt.timedelta(
        hours=1
    )
    authority_ends = load(authority.folder / "ca.pem").not_valid_after_utc
    assert load(authority.issue("bo", 1000)).not_valid_after_utc == authority_ends


def test_keys_are_their_owners_alone(authority: Authority, tmp_path: Path) -> None:
    authority.issue("ada", 90)
    make_request(tmp_path / "own", "bo")
    for folder in (authority.folder, tmp_path / "own"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        keys = list(folder.glob("*.key"))
        assert keys and all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in keys)
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_requested_certificate_needs_no_key_at_the_authority(authority: Authority, tmp_path: Path) -> None:
    request = make_request(tmp_path / "own", "hospital-b")
    signed = load(authority.sign_request(request, 90))
    assert not (authority.folder / "hospital-b.key").exists()
    key = serialization.load_pem_private_key((tmp_path / "own" / "hospital-b.key").read_bytes(), None)
    assert signed.public_key() == key.public_key()
    policy(authority).build_client_verifier().verify(signed, [])


def test_a_request_cannot_ask_for_more_than_a_client(authority: Authority, tmp_path: Path) -> None:
    """Its name alone counts, and it must be its signer's key."""
    request = make_request(tmp_path / "own", "hospital-b")
    text = request.read_text()
    request.write_text(text.replace(text[120], "A" if text[120] != "A" else "B", 1))
    with pytest.raises(ConfigError, match=r"hospital-b\.csr: "):
        authority.sign_request(request, 90)
    assert not (authority.folder / "hospital-b.pem").exists()


def test_renewing_keeps_the_key_and_the_names(authority: Authority) -> None:
    for name, hosts in (("hospital-a", None), ("body.example", ["10.0.0.7"])):
        before = load(authority.issue(name, 10, hosts=hosts))
        after = load(authority.renew(name, 90))
        assert after.public_key() == before.public_key() and after.not_valid_after_utc > before.not_valid_after_utc
        for kind in (x509.SubjectAlternativeName, x509.ExtendedKeyUsage):
            old, new = (one.extensions.get_extension_for_class(kind).value for one in (before, after))
            assert old == new


def test_an_authority_that_is_renewed_still_vouches_for_everybody(authority: Authority) -> None:
    client = load(authority.issue("hospital-a", 90))
    authority.renew("ca", 4000)
    policy(authority).build_client_verifier().verify(client, [])


def test_revoking_a_name_reaches_every_certificate_it_had(authority: Authority) -> None:
    """Also the one that was renewed: it still holds before TLS."""
    first = fingerprint(authority.issue("hospital-a", 90).read_text())
    second = fingerprint(authority.renew("hospital-a", 90).read_text())
    other = fingerprint(authority.issue("hospital-b", 90).read_text())
    assert authority.revoke("hospital-a") == 2
    revoked = RevocationList(authority.revocation_list)
    assert [revoked.holds(one) for one in (first, second, other)] == [True, True, False]
    with pytest.raises(ConfigError, match="hospital-a: revoked already"):
        authority.revoke("hospital-a")
    with pytest.raises(ConfigError, match="hospital-a: is revoked; issue it a new certificate"):
        authority.renew("hospital-a", 90)
    third = fingerprint(authority.issue("hospital-a", 90).read_text())
    assert not revoked.holds(third)


def test_the_list_tells_how_it_stands(authority: Authority) -> None:
    authority.issue("body.example", 90, hosts=[])
    authority.issue("hospital-a", 90)
    authority.renew("hospital-a", 95)
    authority.issue("hospital-b", 90)
    authority.revoke("hospital-b")
    Authority(authority.folder, NOW - dt.timedelta(days=50)).issue("hospital-c", 20)
    told = [(one.name, one.kind, authority.standing(one)) for one in authority.issued()]
    assert told == [
        ("a test", "authority", "99 days left"),
        ("body.example", "server", "89 days left"),
        ("hospital-a", "client", "89 days left, replaced"),
        ("hospital-a", "client", "94 days left"),
        ("hospital-b", "client", "revoked"),
        ("hospital-c", "client", "expired"),
    ]


def test_who_has_expired_is_issued_a_new_one(authority: Authority) -> None:
    Authority(authority.folder, NOW - dt.timedelta(days=50)).issue("hospital-c", 20)
    policy(authority).build_client_verifier().verify(load(authority.issue("hospital-c", 20)), [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a: a.create("again", 10), "has an authority already; renew it, or set another --dir"),
        (lambda a: a.issue("ca", 10), "ca: a name is up to 64 letters, digits"),
        (lambda a: a.issue("../up", 10), "../up: a name is up to 64 letters, digits"),
        (lambda a: a.issue("a" * 65, 10), "a name is up to 64 letters, digits"),
        (lambda a: a.issue("\x1b[2J", 10), "a name is up to 64 letters, digits"),
        (lambda a: a.issue("body", 10, hosts=["no host"]), "no host: no host name and no IP address"),
        (lambda a: a.renew("eve", 10), "eve: no certificate|no certificate of this name here; there are: none yet"),
        (lambda a: a.revoke("eve"), "eve: no certificate of this name here; there are: none yet"),
        (lambda a: Authority(a.folder / "x").issue("ada", 10), "no authority; make one with certs ca"),
        (lambda a: Authority(a.folder, NOW + dt.timedelta(days=200)).issue("ada", 9), "the authority has expired"),
    ],
)
def test_mistakes_are_one_line_and_make_nothing(
    authority: Authority, wrong: Callable[[Authority], object], message: str
) -> None:
    before = sorted(path.name for path in authority.folder.rglob("*"))
    with pytest.raises(ConfigError, match=message) as caught:
        wrong(authority)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert sorted(path.name for path in authority.folder.rglob("*.pem")) == [n for n in before if n.endswith(".pem")]


def test_a_name_has_one_certificate_that_counts(authority: Authority) -> None:
    authority.issue("hospital-a", 90)
    with pytest.raises(ConfigError, match="hospital-a: has a certificate; renew it, or revoke it first"):
        authority.issue("hospital-a", 90)
    with pytest.raises(ConfigError, match="hospital-a: has a certificate"):
        authority.sign_request(make_request(authority.folder / "own", "hospital-a"), 90)


class Echo(grpc.GenericRpcHandler):
    """Answers every call with the name and fingerprint in the caller's certificate."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            facts = context.auth_context()
            return f"{name_of_peer(facts)} {fingerprint_of_peer(facts)}".encode()

        return grpc.unary_unary_rpc_method_handler(answer)


def test_grpc_takes_what_is_made_and_tells_the_name_in_it(authority: Authority, tmp_path: Path) -> None:
    def files(certificate: Path, key: Path | None = None) -> TlsFiles:
        return TlsFiles(authority.folder / "ca.pem", certificate, key or certificate.with_suffix(".key"))

    server = grpc.server(ThreadPoolExecutor(1), handlers=(Echo(),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(files(authority.issue("body", 90, hosts=[]))))
    server.start()
    try:
        request = make_request(tmp_path / "own", "hospital-b")
        for name, own in {
            "hospital-a": files(authority.issue("hospital-a", 90)),
            "hospital-b": files(authority.sign_request(request, 90), request.with_suffix(".key")),
        }.items():
            for host in ("127.0.0.1", "localhost"):
                with connect(f"{host}:{port}", own) as channel:
                    told = channel.unary_unary("/echo/name")(b"", timeout=20, wait_for_ready=True)
                assert told.decode().split() == [name, fingerprint(own.certificate.read_text())]
    finally:
        server.stop(None)
