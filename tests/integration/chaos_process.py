"""A process of a run that kills itself, as by kill -9, at a given moment of a given window.

Each `Kill` happens once in a run: a mark in the folder says that it is done. The phases of a window
are those of the server and of a client.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from integration.faults_process import obey

# Imported before processes are forked off: each is up at once.
import fedbert_ds.aggregator.process
import fedbert_ds.client.session
import fedbert_ds.client.trainer
import fedbert_ds.server.serve  # noqa: F401
from fedbert_ds.server.control_line import ControlLine
from fedbert_ds.wire import fedbert_pb2 as pb

PHASES = ("manifest", "activations", "waiting", "gradient", "averaging", "commit", "checkpoint")


class Kill(NamedTuple):
    """One process's death, or, in the phase `line`, a rank's loss of its line to the aggregator."""

    who: str
    """A client's name, or `rank 0`, `rank 1`, ..., or `aggregator`."""
    phase: str
    window: int


def run_process(who: str, arguments: list[str], variables: dict[str, str], log: Path, kills: Sequence[Kill]) -> None:
    """Become the process `who`: its program's command line with these arguments."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.setsid()
    os.environ.update(variables)
    obey()
    for kill in kills:
        if kill.who == who and not _mark(log.parent, kill).exists():
            arm = _arm_aggregator if who == "aggregator" else _arm_rank if who.startswith("rank") else _arm_client
            arm(kill, log.parent)
    if who.startswith("rank"):
        from fedbert_ds.server.pretrain import main

        sys.argv = ["pretrain.py", *arguments]
        main()
    else:
        from fedbert_ds.cli import main as client_main

        client_main(arguments)


def is_done(folder: Path, kill: Kill) -> bool:
    """Whether the process has died this way."""
    return _mark(folder, kill).exists()


def _mark(folder: Path, kill: Kill) -> Path:
    return folder / f"killed {kill.who}, {kill.phase} of {kill.window}"


def _die(kill: Kill, folder: Path) -> None:
    if is_done(folder, kill):
        return
    _mark(folder, kill).touch()
    print(f"--- {kill}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _hang_up(kill: Kill, folder: Path) -> None:
    """Lose the line to the aggregator of another party, and live on."""
    if is_done(folder, kill):
        return
    _mark(folder, kill).touch()
    print(f"--- {kill}", flush=True)
    for line in [thing for thing in gc.get_objects() if isinstance(thing, ControlLine)]:
        line.stop()


def _before(
    owner: Any,
    name: str,
    is_due: Callable[..., bool],
    kill: Kill,
    folder: Path,
    after: bool = False,
    then: Callable[[Kill, Path], None] = _die,
) -> None:
    """Die when `owner.name` is called with arguments for which `is_due` holds."""
    original = getattr(owner, name)

    def called(*arguments: Any, **keywords: Any) -> Any:
        due = is_due(*arguments, **keywords)
        if due and not after:
            then(kill, folder)
        result = original(*arguments, **keywords)
        if due:
            then(kill, folder)
        return result

    setattr(owner, name, called)


def _arm_client(kill: Kill, folder: Path) -> None:
    from fedbert_ds.client.trainer import ClientTrainer
    from fedbert_ds.wire.stream import ServerStream

    def receives(*fields: str) -> Callable[..., bool]:
        def is_due(_: ClientTrainer, message: pb.ServerMessage) -> bool:
            field = message.WhichOneof("body")
            return field in fields and getattr(message, field).window == kill.window

        return is_due

    def sends(*fields: str) -> Callable[..., bool]:
        def is_due(_: ServerStream, message: pb.ClientMessage) -> bool:
            field = message.WhichOneof("body")
            return field in fields and getattr(message, field).window == kill.window

        return is_due

    # A client of the whole model is told to begin (open) and reports (trained).
    match kill.phase:
        case "manifest":
            _before(ServerStream, "send", sends("manifest"), kill, folder)
        case "activations":
            _before(ServerStream, "send", sends("activations", "trained"), kill, folder, after=True)
        case "waiting":
            _before(ClientTrainer, "handle", receives("hidden", "open"), kill, folder, after=True)
        case "gradient":
            _before(ServerStream, "send", sends("gradient", "trained"), kill, folder)
        case "evaluation":
            _before(ServerStream, "send", sends("evaluated"), kill, folder)
        case "averaging":
            _before(ServerStream, "send", sends("update"), kill, folder, after=True)
        case "commit":
            _before(ClientTrainer, "handle", receives("update"), kill, folder)
        case "checkpoint":
            _before(ClientTrainer, "handle", receives("save"), kill, folder)


def _arm_aggregator(kill: Kill, folder: Path) -> None:
    from fedbert_ds.aggregator.folder import AggregatorFolder
    from fedbert_ds.aggregator.guests import Guests
    from fedbert_ds.aggregator.run import AggregatedRun
    from fedbert_ds.federation.aggregator import Aggregator

    def of_window(_: Any, window: int, *__: Any) -> bool:
        return window == kill.window

    match kill.phase:
        case "manifest":
            _before(AggregatedRun, "order", lambda _, __, order: order.expect.window == kill.window, kill, folder)
        case "gradient":
            _before(AggregatedRun, "receive", lambda _, __, m: m.update.window == kill.window, kill, folder)
        case "averaging":
            _before(Guests, "tell_combined", of_window, kill, folder)
        case "commit":
            _before(Aggregator, "apply", of_window, kill, folder, after=True)
        case "checkpoint":
            _before(AggregatorFolder, "save", of_window, kill, folder, after=True)


def _arm_rank(kill: Kill, folder: Path) -> None:
    from fedbert_ds.server import checkpoint
    from fedbert_ds.server.body.engine import BodyEngine
    from fedbert_ds.server.body.no_body import NoBody
    from fedbert_ds.server.client_service import ClientService
    from fedbert_ds.server.inbox import Inbox
    from fedbert_ds.server.micro_batches import MicroBatches
    from fedbert_ds.server.queue.decisions import Plan
    from fedbert_ds.server.rooms import Rooms

    running: list[int] = []
    """Windows that have begun and not stepped."""
    begin = MicroBatches.begin

    def begin_noted(self: MicroBatches, window: int, *arguments: Any) -> None:
        running[:] = [window]
        begin(self, window, *arguments)

    MicroBatches.begin = begin_noted  # type: ignore[method-assign]

    def in_window(*_: Any, **__: Any) -> bool:
        return running == [kill.window]

    def plans(_: ClientService, decision: Any) -> bool:
        return isinstance(decision, Plan) and decision.window == kill.window

    def of_window(_: Any, window: int, *__: Any) -> bool:
        return window == kill.window

    def of_window_elsewhere(rooms: Rooms, window: int, _: float) -> bool:
        return window == kill.window and rooms.remote is not None

    # Without a body the ranks wait for reports.
    match kill.phase:
        case "manifest":
            _before(ClientService, "carry_out", plans, kill, folder)
        case "activations":
            _before(MicroBatches, "forward", in_window, kill, folder)
            _before(ClientService, "start_alone", of_window, kill, folder, after=True)
        case "waiting":
            _before(ClientService, "wait", in_window, kill, folder)
        case "gradient":
            _before(MicroBatches, "backward", in_window, kill, folder, after=True)
            _before(
                Inbox, "receive", lambda _, __, message, *___: message.HasField("trained") and in_window(), kill, folder
            )
        case "averaging":
            _before(ClientService, "send_combined", of_window, kill, folder)
            _before(Rooms, "commit_elsewhere", of_window_elsewhere, kill, folder)
        case "commit":
            for engine in (BodyEngine, NoBody):
                _before(engine, "step", in_window, kill, folder, after=True)
        case "checkpoint":
            _before(checkpoint, "complete", lambda _, __, window, *___: window == kill.window, kill, folder)
        case "evaluation":
            _before(MicroBatches, "evaluate", of_window, kill, folder)
        case "line":
            _before(ClientService, "wait", in_window, kill, folder, then=_hang_up)
