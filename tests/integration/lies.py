"""Messages that are malformed, and well-formed ones that lie, beside an honest run.

    python tests/integration/lies.py --malformed 1000000 --lies 100000     counts by kind, the seed
    python tests/integration/lies.py --seed 7 --malformed 1000 --lies 100  the same messages again

Two clients train with a rank's real rooms: queue, inbox, membership, window loop, aggregator. Two
others have seats. One sends what it likes whenever a message comes, and joins again when it is
refused; the other takes part honestly up to one lie. The honest clients must end with the bits that
they have when the one only comes and goes and the other only breaks its connection in that moment.
Nothing may raise, and memory may not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from unit.server.fake_client import GONE, HALF, WIDTH, FakeClient
from unit.server.fakes import Rank, run_config

from fedbert_ds.server.network.client_stream import ClientStream
from fedbert_ds.server.network.decoding import decoded
from fedbert_ds.server.network.events import Connected, Event, Received
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import encode

HONEST = ("ada", "cy")
BYSTANDER, PARTICIPANT = "eve", "mallory"
WINDOWS = 3
FAR = 1_000_000
"""A window that never comes."""
PER_RUN = 200
"""Messages of the bystander in one run."""
Make = Callable[[random.Random], pb.ClientMessage]
Said = tuple[str, list[pb.ClientMessage], bool]
"""Its kind, the messages that reach the rank, and whether the client's stream has ended."""


def _tensor(rng: random.Random, rows: int, width: int) -> pb.TensorFrame:
    frame = encode(torch.full((rows, width), rng.choice([0.0, 1.0, 1e6, -3.0])), "fp32")
    match rng.randrange(6):
        case 0:
            frame.shape[0] = rng.choice([0, 1, rows + 1, 2**31, 2**32 - 1])
        case 1:
            frame.payload = frame.payload[: rng.randrange(len(frame.payload) + 1)]
        case 2:
            frame.codec = rng.choice(["", "int8", "fp64", "x" * 1000])
        case 3:
            frame.compressed = True
        case 4:
            frame.scales = rng.randbytes(rng.randrange(64))
    return frame


def _manifest(rng: random.Random) -> pb.ClientMessage:
    lengths = [rng.choice([0, 1, 5, 9, 2**31]) for _ in range(rng.randrange(6))]
    masked = [rng.choice([0, 1, 2**31]) for _ in range(rng.randrange(6))]
    window = rng.choice([FAR, 2**32 - 1])
    cursor = pb.Cursor(epoch=rng.choice([0, 2**63]), position=rng.choice([0, 2**63]), sequences=rng.choice([0, 7]))
    return pb.ClientMessage(manifest=pb.Manifest(window=window, lengths=lengths, masked=masked, cursor=cursor))


def _activations(rng: random.Random) -> pb.ClientMessage:
    message = pb.Activations(
        window=rng.randrange(WINDOWS), micro_batch=rng.randrange(12), values=_tensor(rng, rng.randint(1, 8), WIDTH)
    )
    message.masked_positions = rng.randbytes(rng.randrange(4))
    message.row_index = rng.randbytes(rng.randrange(4))
    return pb.ClientMessage(activations=message)


def _held_out(rng: random.Random) -> pb.ClientMessage:
    message = _activations(rng)
    message.activations.held_out_lengths.extend(rng.choice([0, 1, 2**31]) for _ in range(rng.randint(1, 5)))
    return message


def _gradient(rng: random.Random) -> pb.ClientMessage:
    loss = rng.choice([0.0, -1.0, 1e308, math.inf, math.nan])
    message = pb.Gradient(window=rng.randrange(WINDOWS), micro_batch=rng.randrange(12), loss_sum=loss)
    message.hidden.CopyFrom(_tensor(rng, rng.randint(1, 4), WIDTH))
    return pb.ClientMessage(gradient=message)


def _update(rng: random.Random) -> pb.ClientMessage:
    name = rng.choice([*HALF, "", "another", "x" * 500])
    shape = rng.choice([HALF.get(name, ()), (0,), (2**31, 2**31), (3, WIDTH, 1)])
    chunk = pb.UpdateChunk(window=rng.choice([0, 1, 2, FAR]), name=name, shape=shape)
    chunk.offset = rng.choice([0, 4, 2**63])
    chunk.payload, chunk.rows = rng.randbytes(rng.choice([0, 4, 48, 4000])), rng.randbytes(rng.choice([0, 1, 9]))
    chunk.last, chunk.compressed = rng.random() < 0.3, rng.random() < 0.3
    return pb.ClientMessage(update=chunk)


def _saved(rng: random.Random) -> pb.ClientMessage:
    saved = pb.Saved(
        window=rng.choice([0, 1, FAR]), peak_memory_bytes=2**63, flops_per_token=rng.choice([1.0, math.nan])
    )
    return pb.ClientMessage(saved=saved)


def _trained(rng: random.Random) -> pb.ClientMessage:
    trained = pb.Trained(window=rng.randrange(WINDOWS), loss_sum=rng.choice([1.0, math.inf]), masked_tokens=2**63)
    return pb.ClientMessage(trained=trained)


def _evaluated(rng: random.Random) -> pb.ClientMessage:
    evaluated = pb.Evaluated(window=rng.randrange(WINDOWS), loss_sum=math.nan, masked_tokens=2**63, counts=[1.0] * 9)
    return pb.ClientMessage(evaluated=evaluated)


def _begun(rng: random.Random) -> pb.ClientMessage:
    return pb.ClientMessage(begun=pb.Begun(attempt=rng.choice([1, 2, 2**32 - 1])))


LIES: dict[str, Make] = {
    "manifest": _manifest,
    "activations": _activations,
    "held-out activations": _held_out,
    "gradient": _gradient,
    "update": _update,
    "saved": _saved,
    "trained": _trained,
    "evaluated": _evaluated,
    "begun": _begun,
    "nothing": lambda rng: pb.ClientMessage(),
}
"""Well-formed messages that say what is not so, by what they are about."""


def _numbered(rng: random.Random, make: Make, sequence: int = 1, **delivery: int) -> bytes:
    message = make(rng)
    message.delivery.CopyFrom(pb.Delivery(sequence=sequence, **delivery))
    body: bytes = message.SerializeToString()
    return body


def _any(rng: random.Random) -> Make:
    return rng.choice(list(LIES.values()))


def _flipped(rng: random.Random) -> bytes:
    frame = bytearray(_numbered(rng, _any(rng)))
    for _ in range(rng.choice([1, 1, 2, 8])):
        frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
    return bytes(frame)


def _cut(rng: random.Random) -> bytes:
    frame = _numbered(rng, _any(rng))
    return frame[: rng.randrange(len(frame))]


MALFORMED: dict[str, Callable[[random.Random], bytes]] = {
    "random bytes": lambda rng: rng.randbytes(rng.randrange(200)),
    "flipped bits": _flipped,
    "cut short": _cut,
    "one after another": lambda rng: _numbered(rng, _any(rng)) + _numbered(rng, _any(rng)),
    "a number that is not next": lambda rng: _numbered(rng, _any(rng), rng.choice([2, 9, 2**63])),
    "an acknowledgement of nothing": lambda rng: _numbered(rng, _any(rng), received=rng.choice([1, 2**63])),
    "memory that is not shared": lambda rng: _numbered(rng, _any(rng), shared_start=8, shared_bytes=2**40),
    "a length beyond the end": lambda rng: b"\x12" + b"\xff" * 4 + b"\x0f" + rng.randbytes(20),
}
"""Frames that no client sends, by what is wrong with them."""


class Bystander(FakeClient):
    """Has a seat, hears and answers nothing; what it says is drawn elsewhere."""

    def handle(self, message: pb.ServerMessage) -> list[pb.ClientMessage]:
        return []


@dataclass
class Told:
    """What honest clients end with."""

    clients: list[Any]
    reference: dict[str, Any]
    steps: list[float]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Told)
        return repr(self) == repr(other)

    @classmethod
    def of(cls, rank: Rank) -> Told:
        torch.set_printoptions(precision=9)
        honest = [client for client in rank.clients if client.name in HONEST]
        return cls(
            [
                (one.windows_stepped, one.missed, one.skipped, [_bits(update) for update in one.updates], one.refusal)
                for one in honest
            ],
            _bits(rank.served.aggregator.reference().weights),
            rank.engine.steps,
        )


def _bits(tensors: Any) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in sorted(tensors.items())}


@dataclass
class Counts:
    """Messages by kind, and what became of them."""

    refused: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    different: list[int] = field(default_factory=list)
    """Seeds of runs in which the honest clients ended otherwise."""

    def total(self, kinds: Any) -> int:
        return sum(self.refused[kind] + self.ignored[kind] for kind in kinds)


class Play:
    """One run, with lies or without: then they are losses of a connection in the same moment."""

    def __init__(self, seed: int, counts: Counts | None, num_malformed: int, num_lies: int) -> None:
        self._rng = random.Random(seed)
        self._counts = counts
        kinds = [*[self._malformed] * num_malformed, *[self._lie] * num_lies]
        self._rng.shuffle(kinds)
        self._messages = kinds
        self._lies_at = self._rng.randrange(40)
        self._loop = asyncio.new_event_loop()

    def run(self) -> Told:
        with pytest.MonkeyPatch.context() as patch:
            config = run_config(
                clients={"expected": 3, "minimum": 1}, window={"order": "fixed"}, run={"windows": WINDOWS},
            )  # fmt: skip
            clients = [FakeClient(name, config) for name in HONEST]
            clients.append(FakeClient(PARTICIPANT, config, alter=self._altered))
            self._rank = rank = Rank(patch, config, clients)
            rank.endpoint.clients[BYSTANDER] = Bystander(BYSTANDER, config)
            rank.served.members.tokens[BYSTANDER] = 14
            rank.served.connect()
            rank.served.rooms.service.awaits_newcomers = False
            take = rank.endpoint.next_event
            patch.setattr(rank.endpoint, "next_event", lambda timeout: self._beside(take(timeout)))
            rank.server.train(lambda window, told: None, rank.served.checkpoints, lambda window: None)
            while self._counts is not None and self._messages:
                self._say()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        return Told.of(rank)

    def _beside(self, event: Event | None) -> Event | None:
        """Before an event of anybody else the bystander speaks, a few times."""
        for _ in range(4):
            if self._counts is not None and self._messages:
                self._say()
        return event

    def _altered(self, number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        if number != self._lies_at:
            return [message]
        if self._counts is None:
            return [GONE]
        kind = self._rng.choice([kind for kind in LIES if kind not in ("nothing", "begun")])
        self._counts.refused[kind] += 1
        lie = LIES[kind](random.Random(self._rng.random()))
        if kind in ("activations", "gradient"):
            getattr(lie, kind).window = FAR
        if kind == "update":
            lie.update.window = FAR
        return [lie]

    def _say(self) -> None:
        service, queue = self._rank.served.rooms.service, self._rank.served.rooms.queue
        if not queue.is_connected(BYSTANDER):
            service.dispatch(Connected(BYSTANDER))
        kind, messages, has_ended = self._messages.pop()()
        for message in messages:
            service.dispatch(decoded(Received(BYSTANDER, message), self._rank.served.rooms.contract))
        assert self._counts is not None
        is_refused = has_ended or not queue.is_connected(BYSTANDER)
        (self._counts.refused if is_refused else self._counts.ignored)[kind] += 1

    def _lie(self) -> Said:
        kind = self._rng.choice(list(LIES))
        return kind, [LIES[kind](self._rng)], False

    def _malformed(self) -> Said:
        """A frame, and what a stream makes of it."""
        kind = self._rng.choice(list(MALFORMED))
        return kind, *self._loop.run_until_complete(_through_a_stream(MALFORMED[kind](self._rng)))


async def _through_a_stream(frame: bytes) -> tuple[list[pb.ClientMessage], bool]:
    """The messages that a stream passes on, and whether it ended."""
    messages: list[pb.ClientMessage] = []

    def keep(stream: ClientStream, message: pb.ClientMessage, frame: bytes, num_bytes: int) -> None:
        messages.append(message)

    stream = ClientStream(BYSTANDER, "session", 60.0, False, keep, lambda stream: None, lambda stream, is_there: None)

    async def frames() -> AsyncIterator[bytes]:
        yield frame

    await stream.read(stream.attach(pb.Attach(client=BYSTANDER, session="session")), frames())
    has_ended = stream.is_over
    stream.finish()
    return messages, has_ended


def resident_mb() -> float:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def play(first_seed: int, num_malformed: int, num_lies: int, tell: Callable[[Counts], None] = lambda c: None) -> Counts:
    """Runs with so many messages altogether, each beside the same run without a lie."""
    counts, seed = Counts(), first_seed
    while (rest := num_malformed + num_lies) > 0:
        some = min(PER_RUN, rest)
        malformed = min(num_malformed, round(some * num_malformed / rest))
        lies = some - malformed
        undisturbed = Play(seed, None, malformed, lies).run()
        if Play(seed, counts, malformed, lies).run() != undisturbed:
            counts.different.append(seed)
        num_malformed, num_lies = num_malformed - malformed, num_lies - lies
        counts.runs, seed = counts.runs + 1, seed + 1
        tell(counts)
    return counts


def rows(counts: Counts) -> list[dict[str, Any]]:
    """What became of the messages of each kind."""
    named = [("malformed", kind) for kind in MALFORMED] + [("a lie", kind) for kind in LIES]
    return [
        {"what": what, "kind": kind, "refused": counts.refused[kind], "ignored": counts.ignored[kind]}
        for what, kind in named
    ]


def table(of: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| message | kind | its client ended | nothing came of it |", "| --- | --- | ---: | ---: |"]
    return "\n".join([*lines, *(f"| {r['what']} | {r['kind']} | {r['refused']:,} | {r['ignored']:,} |" for r in of)])


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--malformed", type=int, default=10_000, metavar="N", help="malformed messages")
    parser.add_argument("--lies", type=int, default=1_000, metavar="N", help="well-formed messages that lie")
    parser.add_argument("--seed", type=int, metavar="S", help="of the first run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as a record")
    return parser


def main() -> int:
    """Play as the command line says; returns the exit code."""
    options = build_parser().parse_args()
    seed = options.seed if options.seed is not None else random.randrange(10**9)
    print(f"seed {seed}", flush=True)
    commit, started, memory = source_commit(), time.monotonic(), []

    def tell(counts: Counts) -> None:
        if counts.runs % 50 == 0:
            memory.append(resident_mb())
            print(f"{counts.runs} runs, {len(counts.different)} different, {memory[-1]:.0f} MB", flush=True)

    counts = play(seed, options.malformed, options.lies, tell)
    print(table(rows(counts)))
    seconds = time.monotonic() - started
    print(f"{counts.runs} runs in {seconds:.0f} s; honest clients differ in {counts.different or 'none'}")
    if options.out is not None:
        write_record(
            options.out,
            command=f"python tests/integration/lies.py --malformed {options.malformed} --lies {options.lies} "
            f"--seed {seed} --out {options.out}",
            commit=commit,
            rows=rows(counts),
            runs=counts.runs,
            different=counts.different,
            memory_mb=[round(number, 1) for number in (memory[:1] + memory[-1:])],
        )
    return 1 if counts.different else 0


if __name__ == "__main__":
    sys.exit(main())
