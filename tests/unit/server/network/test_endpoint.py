"""A rank's endpoint over real gRPC on loopback: joins, streams, refusals, floods, TLS; and a rank that serves on it."""

from __future__ import annotations

import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from unit.server.fake_client import HALF, FakeClient
from unit.server.fakes import FakeEngine, FakeRankGroup, run_config, seats, shapes
from unit.server.test_rank import BAD

from fedbert_ds.bench.network.link import DelayProxy
from fedbert_ds.client.stream import ServerStream
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import WireError
from fedbert_ds.server.network import endpoint_process
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.endpoint_process import EndpointProcess
from fedbert_ds.server.network.events import Connected, Disconnected, Event, JoinAbandoned, JoinAsked, Received
from fedbert_ds.server.network.socket_channel import SocketChannel
from fedbert_ds.server.rank import RankServer
from fedbert_ds.telemetry.trace import Trace
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire import fedbert_pb2_grpc as rpc
from fedbert_ds.wire.channel import TRAIN, TlsFiles, connect, server_credentials
from fedbert_ds.wire.conversation import UNREAD_BYTES

TIMEOUT = 20.0


class Listening:
    """A started endpoint and its address."""

    def __init__(self, tls: TlsFiles | None = None, kind: type[Endpoint | EndpointProcess] = Endpoint) -> None:
        self.real = kind("127.0.0.1", 0, tls)
        self.port = self.real.start()
        self.address = f"127.0.0.1:{self.port}"

    def event(self) -> Event:
        event = self.real.next_event(TIMEOUT)
        assert event is not None, "no event came"
        return event

    def no_event(self) -> None:
        assert self.real.next_event(0.2) is None


@pytest.fixture(params=[Endpoint, EndpointProcess])
def endpoint(request: pytest.FixtureRequest) -> Iterator[Listening]:
    """Both kinds keep the same contract."""
    started = Listening(kind=request.param)
    yield started
    started.real.stop(grace=0.1)


class Stream(ServerStream):
    """A client's training stream, driven by a test."""

    def __init__(self, address: str, client: str, session: str, tls: TlsFiles | None = None) -> None:
        # Not through memory: what these tests break is the socket.
        super().__init__(address, tls, client, session, reconnect_timeout=TIMEOUT, shares_memory=False)
        self.__enter__()

    def refusal(self) -> str:
        with pytest.raises(WireError) as caught:
            self.receive()
        return str(caught.value).removeprefix("the server refused this client: ")

    def end(self) -> None:
        """The client is done."""
        self.__exit__()

    def die(self) -> None:
        """The client's process is gone, without a word."""
        self._hang_up()


@pytest.fixture
def streams(endpoint: Listening) -> Iterator[Callable[..., Stream]]:
    opened: list[Stream] = []

    def open_stream(client: str, session: str | None = None) -> Stream:
        opened.append(Stream(endpoint.address, client, f"session of {client}" if session is None else session))
        return opened[-1]

    endpoint.real.admit({name: f"session of {name}" for name in ("ada", "bo")})
    yield open_stream
    for stream in opened:
        stream.end()


def manifest(window: int) -> pb.ClientMessage:
    return pb.ClientMessage(manifest=pb.Manifest(window=window))


def save(window: int) -> pb.ServerMessage:
    return pb.ServerMessage(save=pb.Save(window=window))


# -- joining --------------------------------------------------------------------------------------------------------


def test_joins_wait_for_their_answers_and_each_gets_its_own(endpoint: Listening) -> None:
    with connect(endpoint.address, None) as channel:
        stub = rpc.FederationStub(channel)
        calls = {name: stub.Join.future(pb.Hello(client=name), timeout=TIMEOUT) for name in ("ada", "bo")}
        asked = [endpoint.event(), endpoint.event()]
        assert not any(call.done() for call in calls.values())
        for event in asked:
            assert isinstance(event, JoinAsked)
            if event.hello.client == "ada":
                event.answer.set_result(pb.Welcome(endpoint="here", window=3))
            else:
                event.answer.set_exception(WireError("client bo has no text; check its --data"))
        assert calls["ada"].result(timeout=TIMEOUT) == pb.Welcome(endpoint="here", window=3)
        error = calls["bo"].exception(timeout=TIMEOUT)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert error.details() == "client bo has no text; check its --data"


def test_a_join_that_is_given_up_is_told(endpoint: Listening) -> None:
    with connect(endpoint.address, None) as channel:
        call = rpc.FederationStub(channel).Join.future(pb.Hello(client="ada"), timeout=TIMEOUT)
        asked = endpoint.event()
        assert isinstance(asked, JoinAsked)
        call.cancel()
        abandoned = endpoint.event()
        assert isinstance(abandoned, JoinAbandoned) and abandoned.hello is asked.hello
        assert asked.answer.cancelled()


# -- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "session"), [("ada", "session of bo"), ("ada", ""), ("cy", "session of cy"), ("", ""), ("cy", "")]
)
def test_a_stream_needs_its_own_session(streams, endpoint: Listening, client: str, session: str) -> None:
    reason = streams(client, session).refusal()
    assert reason == f"client {client}: no such session at this endpoint; join the coordinator first"
    endpoint.no_event()


def test_nobody_may_open_a_stream_before_the_run_has_begun() -> None:
    endpoint = Listening()
    stream = Stream(endpoint.address, "ada", "")
    assert "no such session" in stream.refusal()
    stream.end()
    endpoint.real.stop(grace=0.1)


@pytest.mark.parametrize("messages", [[], [pb.ClientMessage()], [manifest(0)]], ids=["nothing", "empty", "manifest"])
def test_a_stream_that_does_not_begin_with_attach_is_refused(endpoint: Listening, messages: list[Any]) -> None:
    endpoint.real.admit({"": "", "ada": "session of ada"})
    with connect(endpoint.address, None) as channel:
        call = rpc.FederationStub(channel).Train(iter(messages), timeout=TIMEOUT)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    endpoint.no_event()


def test_messages_go_both_ways_in_order(streams, endpoint: Listening) -> None:
    ada, bo = streams("ada"), streams("bo")
    assert {endpoint.event(), endpoint.event()} == {Connected("ada"), Connected("bo")}
    up = down = 0
    for window in range(20):
        for name, stream in (("ada", ada), ("bo", bo)):
            message = manifest(window + 100 * (name == "bo"))
            stream.send(message)
            up += message.ByteSize()
            endpoint.real.send(name, save(window))
            down += save(window).ByteSize()
    got: dict[str, list[int]] = {"ada": [], "bo": []}
    for _ in range(40):
        event = endpoint.event()
        assert isinstance(event, Received)
        got[event.client].append(event.message.manifest.window)
    assert got == {"ada": list(range(20)), "bo": list(range(100, 120))}
    for stream in (ada, bo):
        assert [stream.receive().save.window for _ in range(20)] == list(range(20))
    assert endpoint.real.take_bytes() == (up, down)
    assert endpoint.real.take_bytes() == (0, 0)


def test_one_client_has_one_stream(streams, endpoint: Listening) -> None:
    """The newer connection has it; a stranger with the same name is refused long before, at Join."""
    first = streams("ada")
    assert endpoint.event() == Connected("ada")
    endpoint.real.send("ada", save(1))
    assert first.receive() == save(1)
    with connect(endpoint.address, None) as channel:
        attach = pb.ClientMessage(attach=pb.Attach(client="ada", session="session of ada", received=1))
        # Open until the test ends: a client that has nothing more to say ends its connection.
        said: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
        said.put(attach)
        call = rpc.FederationStub(channel).Train(iter(said.get, None), timeout=TIMEOUT)
        assert next(call) == pb.ServerMessage(attached=pb.Attached(), delivery=pb.Delivery())
        endpoint.real.send("ada", save(2))
        assert next(call).save.window == 2
        call.cancel()
        said.put(None)
    endpoint.no_event()


def test_a_stream_that_ends_is_told_once_and_may_be_opened_again(streams, endpoint: Listening) -> None:
    first = streams("ada")
    assert endpoint.event() == Connected("ada")
    first.end()
    assert endpoint.event() == Disconnected("ada")
    endpoint.real.send("ada", save(1))  # to nobody
    second = streams("ada")
    assert endpoint.event() == Connected("ada")
    endpoint.real.send("ada", save(2))
    assert second.receive() == save(2)
    second.end()
    assert endpoint.event() == Disconnected("ada")
    endpoint.real.revoke("ada")
    assert "no such session" in streams("ada").refusal()
    endpoint.real.revoke("ada")


def test_close_says_a_last_word_and_leaves_no_stale_event(streams, endpoint: Listening) -> None:
    """The rank knows already; a Disconnected after the client is back would end the new stream."""
    first = streams("ada")
    assert endpoint.event() == Connected("ada")
    endpoint.real.send("ada", save(1))
    endpoint.real.close("ada", pb.ServerMessage(refused=pb.Refused(reason="so")))
    endpoint.real.send("ada", save(2))
    assert [first.receive().WhichOneof("body") for _ in range(2)] == ["save", "refused"]
    assert "the server ended the stream" in first.refusal()
    second = streams("ada")
    assert endpoint.event() == Connected("ada")
    first.end()
    endpoint.no_event()
    endpoint.real.send("ada", save(3))
    assert second.receive() == save(3)
    endpoint.real.close("nobody", save(0))


def test_a_client_that_floods_is_slowed_down_and_others_are_served(
    streams, endpoint: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads: what waits is bounded by UNREAD_BYTES and gRPC's own window, not by what the client sends."""
    flood, taken = 600, 0
    chunk = pb.UpdateChunk(payload=bytes(256 << 10))
    unread = UNREAD_BYTES // len(chunk.payload)
    in_process = isinstance(endpoint.real, EndpointProcess)
    monkeypatch.setattr(endpoint_process, "UNREAD_BYTES", UNREAD_BYTES)

    def requests() -> Iterator[pb.ClientMessage]:
        nonlocal taken
        yield pb.ClientMessage(attach=pb.Attach(client="ada", session="session of ada"))
        while taken < flood:
            taken += 1
            yield pb.ClientMessage(update=chunk, delivery=pb.Delivery(sequence=taken))

    with connect(endpoint.address, None) as channel:
        call = rpc.FederationStub(channel).Train(requests(), timeout=60)
        assert endpoint.event() == Connected("ada")
        before, still = -1, 0
        deadline = time.monotonic() + TIMEOUT
        while still < 5 and time.monotonic() < deadline:  # until the client has stood still for half a second
            still = still + 1 if taken == before else 0
            before = taken
            time.sleep(0.1)
        waits = unread + (endpoint_process.UNREAD_BYTES // len(chunk.payload) if in_process else 0)
        assert waits < taken < waits + 150 < flood, taken
        assert endpoint.real.num_waiting <= waits + 1
        streams("bo").send(manifest(7))
        events = [endpoint.event() for _ in range(flood + 2)]
        assert sum(isinstance(event, Received) and event.client == "ada" for event in events) == flood
        assert Received("bo", manifest(7)) in events
        call.cancel()


def test_bytes_that_are_no_message_end_that_stream_alone(
    streams, endpoint: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    bo = streams("bo")
    assert endpoint.event() == Connected("bo")
    attach = pb.ClientMessage(attach=pb.Attach(client="ada", session="session of ada")).SerializeToString()
    with connect(endpoint.address, None) as channel:
        raw = channel.stream_stream(TRAIN)
        with pytest.raises(grpc.RpcError, match="no such session"):
            list(raw(iter([b"\xff\xff\xff"]), timeout=TIMEOUT))
        assert len(list(raw(iter([attach, b"\xff\xff\xff"]), timeout=TIMEOUT))) == 1
    assert [endpoint.event(), endpoint.event()] == [Connected("ada"), Disconnected("ada")]
    assert not caplog.records, "no traceback of ours for what somebody else sent"
    endpoint.real.send("bo", save(1))
    assert bo.receive() == save(1)
    bo.send(manifest(2))
    assert endpoint.event() == Received("bo", manifest(2))


def test_a_port_in_use_is_one_line(endpoint: Listening) -> None:
    kind = type(endpoint.real)
    other = kind("127.0.0.1", endpoint.port, None)
    with pytest.raises(WireError, match=rf"^127\.0\.0\.1:{endpoint.port}: the port is in use .*change server\.port"):
        other.start()
    other.stop(grace=0.1)
    foreign = kind("192.0.2.1", 0, None)
    with pytest.raises(WireError, match=r"or server\.host"):
        foreign.start()
    foreign.stop(grace=0.1)


# -- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TlsFiles]:
    """Makes TLS files with the openssl command: `sign("server")` by one authority, `sign("stranger")` by another."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command: mutual TLS is not tested")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=30)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def sign(name: str) -> TlsFiles:
        ca = "other-ca" if name == "stranger" else "ca"
        if not (folder / f"{ca}.pem").exists():
            openssl(
                "req", "-x509", *key, "-days", "2", "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem"
            )
        if not (folder / f"{name}.pem").exists():
            openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
            (folder / "extensions").write_text("subjectAltName = IP:127.0.0.1, DNS:localhost\n")
            openssl(
                "x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial",
                "-days", "2", "-extfile", "extensions", "-out", f"{name}.pem",
            )  # fmt: skip
        return TlsFiles(folder / f"{ca}.pem", folder / f"{name}.pem", folder / f"{name}.key")

    return sign


@pytest.fixture
def secure(authority: Callable[[str], TlsFiles]) -> Iterator[Listening]:
    started = Listening(authority("server"))
    started.real.admit({"ada": "session of ada"})
    yield started
    started.real.stop(grace=0.1)


def test_mutual_tls_lets_a_signed_client_in(secure: Listening, authority: Callable[[str], TlsFiles]) -> None:
    stream = Stream(secure.address, "ada", "session of ada", authority("client"))
    assert secure.event() == Connected("ada")
    secure.real.send("ada", save(1))
    assert stream.receive() == save(1)
    stream.end()


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
            rpc.FederationStub(channel).Join(pb.Hello(client="eve"), timeout=5)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    secure.no_event()


def test_a_client_does_not_trust_a_server_of_another_authority(authority: Callable[[str], TlsFiles]) -> None:
    stranger = Listening(authority("stranger"))
    with connect(stranger.address, authority("client")) as channel, pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=2)
    stranger.real.stop(grace=0.1)


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
    """Text that is no PEM, and the key of another certificate: the server says so, and so does the client."""
    good, text = authority("server"), tmp_path / "text.pem"
    text.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    wrong = [text] if field == "ca" else [text, getattr(authority("client"), field)]
    for path in wrong:
        files = TlsFiles(**({"ca": good.ca, "certificate": good.certificate, "key": good.key} | {field: path}))
        with pytest.raises(WireError, match=r"not PEM files .*; check the TLS files"):
            connect("127.0.0.1:1", files)
        refused = Endpoint("127.0.0.1", 0, files)
        with pytest.raises(WireError, match=r"not PEM files .*; check the TLS files"):
            refused.start()
        refused.stop(grace=0.1)


# -- a rank that serves on it ---------------------------------------------------------------------------------------


class RemoteClient(threading.Thread):
    """A FakeClient at the other end of a real stream."""

    def __init__(self, address: str, client: FakeClient) -> None:
        super().__init__(daemon=True, name=client.name)
        self.client = client
        self.error: BaseException | None = None
        self._address = address

    def run(self) -> None:
        stream = Stream(self._address, self.client.name, f"session of {self.client.name}")
        try:
            while self.client.finish is None and self.client.refusal is None:
                for answer in self.client.handle(stream.receive()):
                    stream.send(answer)
        except BaseException as error:
            self.error = error
        finally:
            stream.end()


def serve_fakes(
    endpoint: Listening, address: str, config: RunConfig, clients: list[FakeClient]
) -> tuple[list[str], list[RemoteClient]]:
    """Train a whole run with clients that dial `address`: the problems reported, and the clients, at their end."""
    problems: list[str] = []
    engine = FakeEngine()
    places = seats(clients)
    stop = threading.Event()
    stop.requested = False  # type: ignore[attr-defined]
    rank = RankServer(config, shapes(config), engine, endpoint.real, FakeRankGroup(), places, 0, stop, Trace(None, 0))  # type: ignore[arg-type]
    endpoint.real.admit({name: seat.session for name, seat in places.items()})
    remote = [RemoteClient(address, client) for client in clients]
    for thread in remote:
        thread.start()
    rank.connect({name: torch.zeros(shape) for name, shape in HALF.items()}, lambda: None)
    assert (
        rank.train(lambda window, reports, seconds: problems.extend(reports[0].new_problems), Path("x"))
        == config.run.windows
    )
    rank.finish("done", complete=True)
    for thread in remote:
        thread.join(timeout=TIMEOUT)
        assert not thread.is_alive()
    return problems, remote


def test_a_body_s_process_that_was_killed_is_the_end_of_what_is_asked() -> None:
    """What the child had told it, and it had not read, makes the system report a reset."""
    ours, theirs = socket.socketpair()
    child = SocketChannel(theirs)
    child.send(["connected", "ada"])
    ours.close()
    assert child.receive() is None
    child.close()


def test_a_rank_and_its_clients_do_not_notice_links_that_break(endpoint: Listening) -> None:
    config = run_config(run={"windows": 6})
    clients = [
        FakeClient("ada", config),
        FakeClient("bo", config, (4, 3, 3, 2)),
        FakeClient("cy", config, (2, 2, 8, 1)),
    ]
    proxy = DelayProxy(endpoint.address, cut_bytes=(1_500, 4_000), cuts=20, outage_ms=50, seed=5)
    with proxy as through:
        problems, remote = serve_fakes(endpoint, through, config, clients)
        assert proxy.counts()["cuts"] >= 3
    assert problems == []
    for thread in remote:
        assert thread.error is None, thread.error
    for client in clients:
        assert client.windows_stepped == list(range(6))
        assert client.finish == pb.Finish(reason="done", complete=True)


@pytest.mark.parametrize("fault", [None, "activations out of all measure", "gradient of another shape", "attach again"])
def test_a_rank_serves_on_after_a_client_failed(endpoint: Listening, fault: str | None) -> None:
    config = run_config(clients={"minimum": 2}, run={"windows": 3})
    clients = [
        FakeClient("ada", config),
        FakeClient("bo", config, (4, 3, 3, 2)),
        FakeClient("cy", config, (2, 2, 8, 1)),
    ]
    if fault:
        clients[1] = FakeClient("bo", config, (4, 3, 3, 2), BAD[fault][0]())
    problems, remote = serve_fakes(endpoint, endpoint.address, config, clients)
    for thread in remote:
        assert thread.error is None, thread.error
    for client in clients:
        if fault and client.name == "bo":
            assert client.refusal is not None and BAD[fault][1] in client.refusal
            assert problems == [client.refusal]
        else:
            assert client.windows_stepped == [0, 1, 2]
            assert client.hidden_states == 3 * sum(length // 2 for length in client.lengths)
            assert client.finish == pb.Finish(reason="done", complete=True)
