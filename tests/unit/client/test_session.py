"""A client's connection, against a real endpoint: how each way to end is told, in one line or by
exit code.
"""

from __future__ import annotations

import json
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.bench.network.link import DelayProxy
from fedbert_ds.certificates.authority import Authority
from fedbert_ds.client import own_data, session
from fedbert_ds.client.limits import Limits
from fedbert_ds.client.session import STOPPED, ClientOptions, inspect_run, run_client
from fedbert_ds.client.state import save_state, saved_windows
from fedbert_ds.config import LayersCut, ModelSection, RunConfig
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.shards import write_shard
from fedbert_ds.data.tokenizer import tokenizer_to_bytes, train_wordpiece, vocabulary_hash
from fedbert_ds.errors import ConfigError, DataError, ServerAway, UserError, WireError
from fedbert_ds.federation.reference import Reference, reference_chunks, to_bytes
from fedbert_ds.folder_lock import locked
from fedbert_ds.model.checkpoint import build_model, config_to_json
from fedbert_ds.model.cut import split
from fedbert_ds.server.admission import new_session
from fedbert_ds.server.network.door import DoorRules
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.events import (
    Attached,
    Connected,
    Detached,
    Disconnected,
    JoinAbandoned,
    JoinAsked,
    Received,
)
from fedbert_ds.wire import address_file, stream
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import PROTOCOL, client_settings, cut_to_json
from fedbert_ds.wire.tls import TlsFiles

TIMEOUT = 30.0
ARTICLES = [Article(f"number {n}", "the quick brown fox jumps over the lazy dog " * 3) for n in range(3)]


class Served:
    """An endpoint, what it tells clients of the run, and a client under test in a thread of its
    own.
    """

    def __init__(self, folder: Path) -> None:
        self.listen()
        self.folder = folder
        self.allow = Limits()
        self.tokenizer = train_wordpiece(ARTICLES, 64)
        section = ModelSection(hidden_size=8, num_attention_heads=2, max_position_embeddings=16, dropout=0.0)
        model = build_model(section, len(self.tokenizer), self.tokenizer.pad_token_id, seed=1)
        self.model_config = config_to_json(model.config)
        self.half = {name: parameter.detach() for name, parameter in split(model, "embeddings")[0].named_parameters()}
        self.outcome: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        write_shard(folder / "shard.jsonl", ARTICLES)

    def listen(self) -> None:
        """Start an endpoint, at a port of its own."""
        self.endpoint = Endpoint("127.0.0.1", 0, None)
        self.port = self.endpoint.start()

    def restart(self, grace: float = 0.0) -> None:
        """The server dies, or ends with so many seconds for its last words, and another one takes
        its place at another port.
        """
        self.endpoint.stop(grace)
        self.listen()

    def welcome(self, **changes: Any) -> pb.Welcome:
        config = RunConfig(run={"windows": 2}, data={"sequence_length": 16, "mask_probability": 0.3})
        settings = client_settings(config.run, config.data, config.optimizer, config.federation, config.wire, tokens=32)
        fields: dict[str, Any] = {
            "endpoint": f"127.0.0.1:{self.port}",
            "session": "session of ada",
            "model_config": self.model_config,
            "cut": cut_to_json("embeddings"),
            "settings": settings.model_dump_json(),
            "tokenizer": tokenizer_to_bytes(self.tokenizer),
            "reconnect_timeout": 60.0,
        }
        return pb.Welcome(**(fields | changes))

    def client(self, **changes: Any) -> None:
        """Start a client; its exit code or error comes out of `ended`."""
        options: dict[str, Any] = {
            "server": f"127.0.0.1:{self.port}",
            "data": (str(self.folder / "shard.jsonl"),),
            "name": "ada",
            "state_folder": self.folder / "state",
            "device": "cpu",
            "join_timeout": TIMEOUT,
            "connect_timeout": TIMEOUT,
        }
        arguments = ClientOptions(**(options | changes))

        def run() -> None:
            try:
                self.outcome.put(run_client(arguments))
            except BaseException as error:
                self.outcome.put(error)

        threading.Thread(target=run, daemon=True).start()

    def ended(self) -> int | BaseException:
        return self.outcome.get(timeout=TIMEOUT)

    def failed(self) -> str:
        error = self.ended()
        assert isinstance(error, UserError), error
        assert "\n" not in str(error)
        return str(error)

    def event(self, kind: type, timeout: float = TIMEOUT) -> Any:
        """The next event but for a Begun, which must be of this kind."""
        event = self.endpoint.next_event(timeout)
        if isinstance(event, Received) and event.message.HasField("begun"):
            event = self.endpoint.next_event(TIMEOUT)
        assert isinstance(event, kind), event
        return event

    def let_in(self, **changes: Any) -> pb.Hello:
        """Answer the client's Join and wait for its stream."""
        asked = self.event(JoinAsked)
        session = new_session()
        self.endpoint.admit({"ada": session})
        asked.answer.set_result(self.welcome(**{"session": session} | changes))
        self.event(Connected)
        return asked.hello

    def give_half(self) -> None:
        self.endpoint.send("ada", pb.ServerMessage(begin=pb.Begin(reference=True)))
        for message in reference_chunks(to_bytes(Reference(0, self.half))):
            self.endpoint.send("ada", message)

    def train(self) -> None:
        """Let the client in and get its first manifest."""
        self.let_in()
        self.give_half()
        assert self.event(Received).message.manifest.window == 0

    def finish(self, *, complete: bool) -> None:
        reason = "the run is over" if complete else "it was stopped"
        self.endpoint.close("ada", pb.ServerMessage(finish=pb.Finish(reason=reason, complete=complete)))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    started = Served(tmp_path)
    yield started
    started.endpoint.stop(grace=0.1)


def test_hello_says_what_its_user_insists_on_and_no_more(served: Served) -> None:
    served.tokenizer.save_pretrained(served.folder / "tokenizer")
    (served.folder / "state").mkdir()
    for window in (4, 6):
        (served.folder / "state" / f"state-{window}.pt").touch()
    (served.folder / "state" / "run.txt").write_text("this run\n")
    served.client()
    served.client(tokenizer=str(served.folder / "tokenizer"), cut=LayersCut(layers=2), name="bo")
    hellos = {}
    for _ in range(2):
        asked = served.event(JoinAsked)
        hellos[asked.hello.client] = asked.hello
        asked.answer.set_exception(WireError("that will do"))
    assert [served.failed(), served.failed()] == ["the server refused this client: that will do"] * 2
    characters = sum(len(article.text) for article in ARTICLES)
    common = {"protocol": PROTOCOL, "shard_characters": characters, "saved_windows": [4, 6], "run": "this run"}
    common["task"] = "masked_lm"
    assert hellos["ada"] == pb.Hello(client="ada", **common)
    assert hellos["bo"] == pb.Hello(
        client="bo", vocabulary_hash=vocabulary_hash(served.tokenizer), cut=cut_to_json(LayersCut(layers=2)), **common
    )


@pytest.mark.parametrize("server", ["gpu01", "http://gpu01:29600", "::1:29600", "runs/mine", "gpu01:http"])
@pytest.mark.parametrize("start", [run_client, inspect_run])
def test_what_is_no_server_is_told_before_text_is_read(
    tmp_path: Path, server: str, start: Callable[[ClientOptions], object]
) -> None:
    options = ClientOptions(server, (str(tmp_path / "nowhere.txt"),), "ada", tmp_path)
    with pytest.raises(
        ConfigError, match=rf"--server {re.escape(server)}: .*; or name the file server\.address of a run"
    ):
        start(options)


@pytest.mark.parametrize(("complete", "code"), [(True, 0), (False, STOPPED)])
def test_the_end_of_a_run_is_an_exit_code(
    served: Served, capfd: pytest.CaptureFixture[str], complete: bool, code: int
) -> None:
    served.client()
    served.let_in()
    served.give_half()
    received = served.event(Received)
    assert received.message.manifest.window == 0 and sum(received.message.manifest.lengths) <= 32
    served.finish(complete=complete)
    assert served.ended() == code
    printed = capfd.readouterr().out.splitlines()
    characters = sum(len(article.text) for article in ARTICLES)
    assert printed[0] == f"client ada: 1 file, {len(ARTICLES)} articles, {characters} characters, longest word 5"
    assert re.fullmatch(r"client ada: [\d,]+ tokens in \d+ sequences to train on, 0.00 % \[UNK\]", printed[2])
    assert printed[1] == f"client ada: joined; serving rank at 127.0.0.1:{served.port}"
    assert printed[3].startswith(f"client ada: {'the run is over' if complete else 'it was stopped'}; peak memory ")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (pb.ServerMessage(refused=pb.Refused(reason="it sent NaN")), "the server refused this client: it sent NaN"),
        (pb.ServerMessage(save=pb.Save()), "the server ended the stream; look at its output"),
        (pb.ServerMessage(open=pb.Open(micro_batch=9)), "the server asks for micro-batch 9"),
    ],
)
def test_a_server_that_goes_wrong_is_one_line(served: Served, last: pb.ServerMessage, message: str) -> None:
    served.client()
    served.let_in()
    served.give_half()
    served.event(Received)
    served.endpoint.close("ada", last)
    assert message in served.failed()


def test_a_server_that_dies_is_one_line(served: Served) -> None:
    served.client()
    served.let_in(reconnect_timeout=0.3)
    served.endpoint.stop(grace=0.0)
    assert f"127.0.0.1:{served.port}: connection lost (" in served.failed()


def test_a_client_that_fails_leaves_its_stream(served: Served) -> None:
    served.client()
    served.let_in()
    served.endpoint.send("ada", pb.ServerMessage(begin=pb.Begin(reference=True)))
    served.endpoint.send("ada", pb.ServerMessage(reference=pb.ReferenceChunk(payload=b"unknown", last=True)))
    assert "the server's reference client model: no reference" in served.failed()
    assert served.event(Disconnected).client == "ada"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": "{}"}, "the server's settings are not understood"),
        ({"cut": '"heads"'}, "is not understood; install the same fedbert-ds on both"),
    ],
)
def test_a_server_of_another_version_is_one_line(served: Served, changes: dict[str, str], message: str) -> None:
    served.client()
    served.event(JoinAsked).answer.set_result(served.welcome(**changes))
    assert message in served.failed()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens": 10**10},
            r"asks for 10,000,000,000 tokens of this client in a window; this client allows 1,048,576",
        ),
        ({"sequences": {"sequence_length": 16, "mask_probability": 0.999}}, "predicts 100 % of all tokens"),
    ],
)
def test_a_server_that_asks_for_too_much_gets_nothing(served: Served, changes: dict[str, Any], message: str) -> None:
    """The client opens no stream: what the server would have it send is not sent."""
    settings = json.loads(served.welcome().settings) | changes
    served.client()
    served.event(JoinAsked).answer.set_result(served.welcome(settings=json.dumps(settings)))
    assert message in served.failed()
    assert served.endpoint.next_event(0.2) is None


def test_a_client_leaves_when_it_has_held_more_memory_than_its_owner_allows(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "peak_memory_bytes", lambda: 5_000_000_000)
    served.client(limits=Limits(max_memory=4_000_000_000))
    served.let_in()
    served.give_half()
    assert "has held 5.0 GB of memory, over 4.0 GB (--max-memory); it leaves the run" in served.failed()


def test_who_inspects_a_run_is_told_and_takes_no_seat(served: Served) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    options = ClientOptions(f"127.0.0.1:{served.port}", (), "ada", served.folder / "state", connect_timeout=TIMEOUT)
    threading.Thread(target=lambda: told.put(inspect_run(options)), daemon=True).start()
    asked = served.event(JoinAsked)
    assert asked.hello == pb.Hello(protocol=PROTOCOL, client="ada", inspect=True)
    asked.answer.set_result(served.welcome(session=""))
    lines = told.get(timeout=TIMEOUT)
    assert f"server      127.0.0.1:{served.port}; plain text" in lines and "inferred" in lines
    assert served.endpoint.next_event(0.2) is None
    assert not (served.folder / "state").exists()


def test_much_text_is_tokenized_before_a_seat_waits_for_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks what the run is like, makes its tokens, and joins only then; once they are there it
    joins at once.
    """
    monkeypatch.setattr(own_data, "MUCH_TEXT", 100)
    cache = served.folder / "tokens"
    served.client(cache=cache, limits=Limits(max_tokens=64))
    visit = served.event(JoinAsked)
    assert visit.hello == pb.Hello(protocol=PROTOCOL, client="ada", inspect=True) and not cache.exists()
    config = RunConfig(run={"windows": 2}, data={"sequence_length": 16, "mask_probability": 0.3})
    sections = (config.run, config.data, config.optimizer, config.federation, config.wire)
    of_all_clients = client_settings(*sections, tokens=10**6).model_dump_json()
    visit.answer.set_result(served.welcome(session="", settings=of_all_clients))
    join = served.event(JoinAsked)
    (entry,) = cache.iterdir()
    assert not join.hello.inspect and join.hello.shard_characters == sum(len(article.text) for article in ARTICLES)
    join.answer.set_exception(WireError("there is no room"))
    served.failed()
    served.client(cache=cache)
    assert not served.event(JoinAsked).hello.inspect
    assert list(cache.iterdir()) == [entry]


def test_a_client_goes_on_where_the_server_says(served: Served) -> None:
    """Without a state folder; a text that is not the one the cursor counts is one line."""
    served.client()
    served.let_in()
    cursor = pb.Cursor(epoch=0, position=1, sequences=10**6)
    served.endpoint.send("ada", pb.ServerMessage(begin=pb.Begin(window=1, next_window=1, cursor=cursor)))
    assert f"sequences, but had {10**6} before in this run" in served.failed()


def test_a_state_folder_has_one_client(served: Served) -> None:
    """Where halves are personal; in synchronous mode a client has no state."""
    config = RunConfig(run={"windows": 2}, federation={"mode": "parallel", "average_every": 2})
    settings = client_settings(config.run, config.data, config.optimizer, config.federation, config.wire, tokens=32)
    with locked(served.folder / "state", "--state"):
        served.client()
        welcome = served.welcome(settings=settings.model_dump_json(), run="this run")
        served.event(JoinAsked).answer.set_result(welcome)
        assert "state: in use by process" in (message := served.failed())
        assert message.endswith("; end that first, or set another --state")
        served.client()
        served.train()
        served.finish(complete=True)
        assert served.ended() == 0


def text_without_a_token(served: Served) -> dict[str, Any]:
    write_shard(served.folder / "shard.jsonl", [Article("empty", "\u200b" * 40), Article("too", "\u200b")])
    return {}


def more_than_its_owner_allows(served: Served) -> dict[str, Any]:
    served.allow = Limits(max_tokens=8)
    return {}


def a_tokenizer_that_cannot_be_read(served: Served) -> dict[str, Any]:
    return {"tokenizer": b"no archive"}


def a_state_folder_of_another_run(served: Served) -> dict[str, Any]:
    config = RunConfig(run={"windows": 2}, federation={"mode": "parallel", "average_every": 2})
    settings = client_settings(config.run, config.data, config.optimizer, config.federation, config.wire, tokens=32)
    save_state(served.folder / "state", 3, {})
    return {"settings": settings.model_dump_json(), "run": "this run"}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (text_without_a_token, "oken"),
        (more_than_its_owner_allows, "--max-tokens"),
        (a_tokenizer_that_cannot_be_read, "tokenizer"),
        (a_state_folder_of_another_run, "holds states of another run"),
    ],
)
def test_who_cannot_go_on_after_it_was_let_in_leaves_at_once(
    served: Served, spoil: Callable[[Served], dict[str, Any]], reason: str
) -> None:
    """So nobody waits for it."""
    changes = spoil(served)
    served.client(limits=served.allow)
    served.let_in(**changes)
    assert served.event(Disconnected).client == "ada"
    assert reason in served.failed()


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta", ""])
def test_a_device_that_cannot_compute_is_told_before_anybody_counts_on_the_client(served: Served, device: str) -> None:
    served.client(device=device)
    assert re.match(rf"--device {device}: cannot be used here \(.+\); try --device cpu$", served.failed())
    assert served.endpoint.next_event(0.0) is None


def test_others_that_do_not_come_are_one_line(served: Served) -> None:
    served.client(join_timeout=0.5)
    served.event(JoinAsked)
    assert served.failed().endswith("the other clients did not come in time; raise --join-timeout or start them")
    served.event(JoinAbandoned)


def test_a_server_that_is_not_there_is_one_line(served: Served) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        port = taken.getsockname()[1]
        served.client(server=f"127.0.0.1:{port}", connect_timeout=0.5)
        assert served.failed() == (
            f"127.0.0.1:{port}: no server answers; check --server, that it runs, and TLS on both sides"
        )


# -- a server that goes and comes ------------------------------------------------------------------


@pytest.fixture
def dials_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "BACKOFF_SECONDS", (0.01, 0.1))


@pytest.fixture
def address(served: Served) -> Path:
    """The file that says where the server is."""
    file = served.folder / "server.address"
    address_file.reveal(file, f"127.0.0.1:{served.port}")
    return file


@pytest.mark.usefixtures("dials_at_once")
@pytest.mark.parametrize("is_saved", [False, True], ids=["lost", "stopped"])
def test_a_client_joins_again_where_the_server_comes_back(
    served: Served, address: Path, capfd: pytest.CaptureFixture[str], is_saved: bool
) -> None:
    served.client(server=str(address), rejoin_timeout=TIMEOUT)
    served.let_in(reconnect_timeout=0.2)
    served.give_half()
    served.event(Received)
    if is_saved:
        address.unlink()
        served.finish(complete=False)
    served.restart(grace=TIMEOUT if is_saved else 0.0)
    address_file.reveal(address, f"127.0.0.1:{served.port}")
    served.train()
    served.finish(complete=True)
    assert served.ended() == 0
    reason = "it was stopped" if is_saved else r".*: connection lost\b.*"
    assert re.search(rf"^client ada: {reason}; joins again, for 30 s at most$", capfd.readouterr().out, re.MULTILINE)


@pytest.fixture
def dials_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that nothing cuts short lasts longer than a test."""
    monkeypatch.setattr(stream, "BACKOFF_SECONDS", (3600.0, 3600.0))
    monkeypatch.setattr(session, "BACKOFF_SECONDS", (3600.0, 3600.0))
    monkeypatch.setattr(session, "LONGEST_DIAL_SECONDS", 3600.0)


@pytest.mark.usefixtures("dials_once")
def test_a_client_learns_from_the_file_that_the_server_has_started_again(
    served: Served, address: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """However long it would dial the old one."""
    served.client(server=str(address), rejoin_timeout=TIMEOUT)
    served.let_in(reconnect_timeout=3600.0)
    old = served.port
    served.restart()
    address_file.reveal(address, f"127.0.0.1:{served.port}")
    served.train()
    served.finish(complete=True)
    assert served.ended() == 0
    assert (
        f"client ada: 127.0.0.1:{old}: connection lost, and the run has ended or started again since; start this "
        "client again; joins again, for 30 s at most\n" in capfd.readouterr().out
    )


@pytest.mark.usefixtures("dials_once")
def test_a_server_that_starts_again_at_its_old_port_may_have_its_ranks_elsewhere(served: Served, address: Path) -> None:
    """The file says the same as before."""
    rank = Endpoint("127.0.0.1", 0, None)
    endpoint = f"127.0.0.1:{rank.start()}"
    rank.admit({"ada": "session of ada"})
    served.client(server=str(address), rejoin_timeout=TIMEOUT)
    served.event(JoinAsked).answer.set_result(served.welcome(endpoint=endpoint, reconnect_timeout=3600.0))
    assert isinstance(rank.next_event(TIMEOUT), Connected)
    rank.stop(grace=0.0)
    address_file.reveal(address, f"127.0.0.1:{served.port}")
    served.train()
    served.finish(complete=True)
    assert served.ended() == 0


@pytest.mark.usefixtures("dials_once")
def test_a_client_that_is_not_to_join_again_ends_with_a_server_that_started_again(
    served: Served, address: Path
) -> None:
    served.client(server=str(address))
    served.let_in(reconnect_timeout=3600.0)
    old = served.port
    served.restart()
    address_file.reveal(address, f"127.0.0.1:{served.port}")
    assert served.failed() == (
        f"127.0.0.1:{old}: connection lost, and the run has ended or started again since; start this client again"
    )


def test_a_cut_while_the_server_hands_over_is_no_end(served: Served, address: Path) -> None:
    """The file is gone by then, and the server still needs the client."""
    served.client(server=str(address))
    proxy = DelayProxy(f"127.0.0.1:{served.port}")
    with proxy as through:
        served.let_in(endpoint=through, reconnect_timeout=TIMEOUT)
        served.give_half()
        assert served.event(Received).message.manifest.window == 0
        address_file.hide(address)
        proxy.drop(outage_ms=1000)
        served.event(Detached)
        served.event(Attached)
        served.finish(complete=True)
        assert served.ended() == 0


@pytest.mark.usefixtures("dials_once")
def test_a_client_that_dials_the_server_before_learns_of_the_new_one(served: Served, address: Path) -> None:
    """A server that was killed has left its file."""
    with socket.create_server(("127.0.0.1", 0)) as old:
        address_file.reveal(address, f"127.0.0.1:{old.getsockname()[1]}")
        served.client(server=str(address), connect_timeout=3600.0)
        line, _ = old.accept()
        line.close()
    address_file.reveal(address, f"127.0.0.1:{served.port}")
    served.train()
    served.finish(complete=True)
    assert served.ended() == 0


@pytest.mark.usefixtures("dials_at_once")
def test_whom_the_server_went_on_without_joins_again(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    served.client(rejoin_timeout=TIMEOUT)
    served.train()
    refused = pb.Refused(reason="it was silent", may_return=True)
    served.endpoint.close("ada", pb.ServerMessage(refused=refused))
    served.train()
    served.finish(complete=True)
    assert served.ended() == 0
    assert "client ada: the server went on without this client: it was silent; joins again" in capfd.readouterr().out


@pytest.mark.usefixtures("dials_at_once")
def test_a_session_that_is_over_is_no_end(served: Served) -> None:
    """The server gave its place up while its connection was down, and refuses the old session."""
    served.client(rejoin_timeout=TIMEOUT)
    asked = served.event(JoinAsked)
    asked.answer.set_result(served.welcome(session="of the server before"))
    served.train()
    served.finish(complete=True)
    assert served.ended() == 0


@pytest.mark.usefixtures("dials_at_once")
@pytest.mark.parametrize("at_join", [False, True])
def test_who_is_refused_for_good_does_not_come_back(served: Served, at_join: bool) -> None:
    served.client(rejoin_timeout=TIMEOUT)
    if at_join:
        served.event(JoinAsked).answer.set_exception(WireError("it sent NaN"))
    else:
        served.train()
        served.endpoint.close("ada", pb.ServerMessage(refused=pb.Refused(reason="it sent NaN")))
    assert served.failed() == "the server refused this client: it sent NaN"


@pytest.mark.usefixtures("dials_at_once")
@pytest.mark.parametrize("is_saved", [False, True], ids=["lost", "stopped"])
def test_a_server_that_does_not_come_back_ends_the_client(served: Served, is_saved: bool) -> None:
    """By an error, unless the run is saved: then it can be resumed."""
    served.client(rejoin_timeout=0.5)
    served.let_in(reconnect_timeout=0.2)
    served.give_half()
    served.event(Received)
    if is_saved:
        served.finish(complete=False)
    served.endpoint.stop(grace=5.0 if is_saved else 0.0)
    outcome = served.ended()
    if is_saved:
        assert outcome == STOPPED
    else:
        assert isinstance(outcome, ServerAway) and "no server answers; check --server" in str(outcome)


@pytest.mark.usefixtures("dials_at_once")
@pytest.mark.parametrize("before", [None, "", "127.0.0.1"], ids=["no file", "an empty one", "half an address"])
def test_a_client_waits_for_the_address_of_a_server_that_starts(
    served: Served, address: Path, before: str | None
) -> None:
    address.unlink() if before is None else address.write_text(before)
    served.client(server=str(address))
    assert served.endpoint.next_event(0.5) is None
    address_file.reveal(address, f"127.0.0.1:{served.port}")
    served.train()
    served.finish(complete=True)
    assert served.ended() == 0


@pytest.mark.usefixtures("dials_at_once")
def test_a_client_that_was_away_when_its_run_became_complete_ends_well(
    served: Served, address: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It need not wait as long as for a server that is gone."""
    served.client(server=str(address), rejoin_timeout=3600, connect_timeout=0.2)
    served.let_in(reconnect_timeout=0.2)
    address_file.close(address)
    served.endpoint.stop(grace=0.0)
    assert served.ended() == 0
    assert capfd.readouterr().out.endswith("client ada: the run is complete\n")


@pytest.mark.usefixtures("dials_at_once")
def test_a_client_waits_for_the_server_that_extends_a_complete_run(served: Served, address: Path) -> None:
    address_file.close(address)
    served.client(server=str(address))
    assert served.endpoint.next_event(0.5) is None
    address_file.reveal(address, f"127.0.0.1:{served.port}")
    served.train()
    served.finish(complete=True)
    assert served.ended() == 0


def test_a_file_that_does_not_come_is_one_line(served: Served) -> None:
    file = served.folder / "server.address"
    served.client(server=str(file), connect_timeout=0.2)
    assert served.failed() == f"{file}: no such file; is the server running, and is this its run folder?"


# -- TLS and plain text ----------------------------------------------------------------------------


@pytest.fixture
def certificates(tmp_path: Path) -> Callable[[str], TlsFiles]:
    """Makes ada's files or those of a server `body`."""
    authority = Authority(tmp_path / "certs")
    authority.create("an authority", 100)

    def issue(name: str) -> TlsFiles:
        certificate = authority.issue(name, 90, hosts=[] if name == "body" else None)
        return TlsFiles(authority.folder / "ca.pem", certificate, certificate.with_suffix(".key"))

    return issue


def test_a_plaintext_server_is_named_at_once(served: Served, certificates: Callable[[str], TlsFiles]) -> None:
    """However long the client would wait for a server that is away."""
    served.client(tls=certificates("ada"), connect_timeout=3600.0, rejoin_timeout=3600.0)
    assert "speaks plain text, and this side TLS" in served.failed()


def test_a_rank_that_its_client_cannot_trust_is_named_at_once(
    served: Served, certificates: Callable[[str], TlsFiles]
) -> None:
    """The coordinator is fine; the rank that it names has no TLS, say."""
    plain = served.endpoint
    served.endpoint = Endpoint("127.0.0.1", 0, certificates("body"))
    secure, served.port = served.endpoint, served.endpoint.start()
    try:
        served.client(tls=certificates("ada"), rejoin_timeout=3600.0)
        other = Endpoint("127.0.0.1", 0, None)
        served.event(JoinAsked).answer.set_result(
            served.welcome(endpoint=f"127.0.0.1:{other.start()}", reconnect_timeout=3600.0)
        )
        assert "speaks plain text, and this side TLS" in served.failed()
        other.stop(grace=0.1)
    finally:
        secure.stop(grace=0.1)
        served.endpoint = plain


@pytest.mark.parametrize("changes", [{"endpoint": "gpu01.example:1"}, {"aggregator": "sums.example:1"}])
def test_nobody_leads_a_plaintext_client_beyond_its_machine(served: Served, changes: dict[str, str]) -> None:
    served.client()
    served.endpoint.admit({"ada": "session of ada"})
    served.event(JoinAsked).answer.set_result(served.welcome(**changes))
    (address,) = changes.values()
    assert f"{address} is beyond this machine, and without TLS" in served.failed()


def test_a_local_client_shows_its_token(served: Served) -> None:
    served.endpoint.stop(grace=0.1)
    served.endpoint = Endpoint("127.0.0.1", 0, None, rules=DoorRules(tokens={"ada": "secret"}))
    served.port = served.endpoint.start()
    served.client(token="")
    assert "client ada is a process of this run's launcher" in served.failed()
    served.client(token="secret")
    served.train()
    served.finish(complete=True)
    assert served.ended() == 0


def test_a_server_s_last_words_steer_no_terminal(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    served.client()
    served.train()
    served.endpoint.close("ada", pb.ServerMessage(finish=pb.Finish(reason="over \x1b[2J", complete=True)))
    assert served.ended() == 0
    assert r"client ada: over \x1b[2J; peak memory" in capfd.readouterr().out


# -- a client's own mistakes -----------------------------------------------------------------------


def test_no_text_is_one_line_before_anything_is_sent(served: Served) -> None:
    write_shard(served.folder / "empty.jsonl", [])
    served.client(data=(str(served.folder / "empty.jsonl"),))
    error = served.ended()
    assert isinstance(error, DataError) and "empty.jsonl" in str(error)
    assert served.endpoint.next_event(0.1) is None


OTHER_SYSTEM = Path(__file__).with_name("other_system.py")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("system", ["windows", "macos"])
def test_a_client_on_another_system_takes_part_and_keeps_its_state(served: Served, system: str) -> None:
    """The whole command, from its options to its exit code, without what the system lacks."""
    config = RunConfig(run={"windows": 2}, federation={"mode": "parallel", "average_every": 2})
    settings = client_settings(config.run, config.data, config.optimizer, config.federation, config.wire, tokens=32)
    command = [sys.executable, str(OTHER_SYSTEM), system, "client", "--server", f"127.0.0.1:{served.port}"]
    command += ["--id", "ada", "--data", str(served.folder / "shard.jsonl"), "--device", "cpu"]
    client = subprocess.Popen(command, cwd=served.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        asked = served.event(JoinAsked, timeout=200.0)  # it imports torch first
        served.endpoint.admit({"ada": "session of ada"})
        asked.answer.set_result(served.welcome(settings=settings.model_dump_json(), run="this run"))
        served.event(Connected)
        served.give_half()
        assert served.event(Received).message.manifest.window == 0
        served.endpoint.send("ada", pb.ServerMessage(save=pb.Save(window=0)))
        assert served.event(Received).message.HasField("saved")
        served.finish(complete=True)
        printed, _ = client.communicate(timeout=TIMEOUT)
    finally:
        client.kill()
        client.wait()
    assert client.returncode == 0, printed
    assert "client ada: the run is over; peak memory " in printed
    assert saved_windows(served.folder / "fedbert-ada") == (0,), "in the folder that its name gives"
