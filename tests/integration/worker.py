"""A rank or client process of the integration tests: the real program, many runs, one process.

A job is {"config": run file as a mapping, "resume": bool, "mutation": name or null, "data":
{client: path}}; with "forget": true a client begins without the state folder it had. Every client
writes what the tests compare into its state folder: `input_gradients.pt`, and `sent.bin`, all bytes
it sent. With "record": true every process writes what it received, or sent as a client, into
`record-NAME.txt` of the run's folder: a line a message, its kind and its bytes in hexadecimal.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch


def run_rank(jobs: list[dict]) -> None:
    from integration import mutations

    from fedbert_ds.run_file import parse_config
    from fedbert_ds.server.before_start import check_before_start
    from fedbert_ds.server.body.distributed import initialize, shut_down
    from fedbert_ds.server.serve import serve
    from fedbert_ds.telemetry import report

    # A third of a short run's time. test_launcher.py has it drawn.
    report.draw_loss = lambda path, *_: path.write_bytes(b"")
    initialize()
    for number, job in enumerate(jobs):
        config = parse_config(job["config"], f"job {number}")
        received = _recorded_messages(job)
        with mutations.applied(job.get("mutation")):
            check_before_start(config, job["resume"]) if torch.distributed.get_rank() == 0 else None
            serve(config, job["resume"])
        _write_record(job, f"rank-{torch.distributed.get_rank()}", received)
    shut_down()


def run_aggregator(jobs: list[dict]) -> None:
    from fedbert_ds.aggregator import process
    from fedbert_ds.run_file import parse_config

    torch.set_num_threads(1)
    for number, job in enumerate(jobs):
        if "aggregator" in job["config"]:
            received = _recorded_messages(job)
            process.run_aggregator(parse_config(job["config"], f"job {number}"), job["resume"])
            _write_record(job, "aggregator", received)


def _recorded_messages(job: dict) -> list[tuple[str, bytes]]:
    """A list that will hold every message that this process receives at its endpoint, or as a rank
    from the aggregator, if the job says so.
    """
    from fedbert_ds.server import control_line
    from fedbert_ds.server.network import client_stream, listener
    from fedbert_ds.wire import fedbert_pb2 as pb
    from fedbert_ds.wire import stream

    received: list[tuple[str, bytes]] = []

    class RecordedStream(client_stream.ClientStream):
        def __init__(self, client, session, reconnect_timeout, shares_memory, on_message, *others) -> None:
            def recorded(of, message, frame, num_bytes) -> None:
                kind = message.WhichOneof("body") or "order " + str(pb.Order.FromString(frame).WhichOneof("body"))
                received.append((kind, frame))
                on_message(of, message, frame, num_bytes)

            super().__init__(client, session, reconnect_timeout, shares_memory, recorded, *others)

    class RecordedControl(stream.ControlStream):
        def receive(self):
            report = super().receive()
            received.append((f"report {report.WhichOneof('body')}", report.SerializeToString()))
            return report

    does = job.get("record", False)
    listener.ClientStream = RecordedStream if does else client_stream.ClientStream
    control_line.ControlStream = RecordedControl if does else stream.ControlStream
    return received


def _write_record(job: dict, name: str, record: list[tuple[str, bytes]]) -> None:
    if job.get("record"):
        lines = "".join(f"{kind}\t{content.hex()}\n" for kind, content in record)
        (Path(job["config"]["run"]["directory"]) / f"record-{name}.txt").write_text(lines)


def run_client(jobs: list[dict], name: str) -> None:
    from fedbert_ds.client import session

    torch.set_num_threads(1)
    for job in jobs:
        folder = Path(job["config"]["run"]["directory"])
        state = folder / "clients" / name
        if job.get("forget"):
            shutil.rmtree(state)
        recorder = _Recorder()
        session.ClientTrainer = recorder.trainer
        options = session.ClientOptions(
            server=_address(folder), data=(job["data"][name],), name=name, state_folder=state, device="cpu",
            cache=state / "tokens", task=job["config"].get("task", {}).get("name", "masked_lm"),
        )  # fmt: skip
        session.run_client(options)
        recorder.write(state)
        _write_record(job, name, recorder.sent)


class _Recorder:
    """Keeps every byte that a client sends and every input gradient that it receives.

    Gradients are kept by (window, first sequence). It sees only the messages that `ClientTrainer`
    sends and handles.
    """

    def __init__(self) -> None:
        self._sent: list[bytes] = []
        self.sent: list[tuple[str, bytes]] = []
        """The tensors among it, as (kind of message, payload)."""
        self._lengths: dict[int, list[int]] = {}
        self._sequences: dict[tuple[int, int], tuple[int, int]] = {}
        """First sequence, and one after the last, of each (window, micro-batch)."""
        self._row_index: dict[tuple[int, int], torch.Tensor] = {}
        self._input_gradients: dict[tuple[int, int], dict] = {}

    def trainer(self, *arguments):
        """A recorded ClientTrainer with these arguments, held-out text last."""
        from fedbert_ds.client.trainer import ClientTrainer

        recorder = self
        *others, send, held_out = arguments

        class RecordedTrainer(ClientTrainer):
            def handle(self, message) -> None:
                recorder.record_handled(message)
                super().handle(message)

        def recorded_send(message) -> None:
            self._record_sent(message)
            send(message)

        return RecordedTrainer(*others, recorded_send, held_out)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self._input_gradients, folder / "input_gradients.pt")
        (folder / "sent.bin").write_bytes(b"".join(self._sent))

    def _record_sent(self, message) -> None:
        from fedbert_ds.wire.codecs import decode_row_index

        self._sent.append(message.SerializeToString())
        match message.WhichOneof("body"):
            case "update":
                self.sent.append(("update", message.update.payload))
            case "activations":
                self.sent.append(("activations", message.activations.values.payload))
            case "gradient":
                self.sent.append(("gradient", message.gradient.hidden.payload))
        if message.WhichOneof("body") == "manifest":
            self._lengths[message.manifest.window] = list(message.manifest.lengths)
        elif message.WhichOneof("body") == "activations":
            answer = message.activations
            if answer.held_out_lengths:
                return
            place, num_rows = (answer.window, answer.micro_batch), answer.values.shape[0]
            tokens = sum(self._lengths[answer.window][slice(*self._sequences[place])])
            if answer.row_index or num_rows < tokens:
                self._row_index[place] = decode_row_index(answer.row_index, tokens, num_rows, "recorded")

    def record_handled(self, message) -> None:
        from fedbert_ds.wire.codecs import decode

        if message.WhichOneof("body") == "plan":
            for piece in message.plan.pieces:
                span = piece.first_sequence, piece.first_sequence + piece.num_sequences
                self._sequences[message.plan.window, piece.micro_batch] = span
        elif message.WhichOneof("body") == "input_gradient":
            answer = message.input_gradient
            frame, span = answer.values, self._sequences[answer.window, answer.micro_batch]
            self._input_gradients[answer.window, span[0]] = {
                "sequences": span,
                "gradient": decode(frame, tuple(frame.shape), frame.codec, "recorded"),
                "row_index": self._row_index.get((answer.window, answer.micro_batch)),
            }


def _address(folder: Path) -> str:
    """The coordinator's address. It removes the file before clients hear that the run is over."""
    from fedbert_ds.errors import ServerAway
    from fedbert_ds.wire.address_file import look_up

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(ServerAway):
            return look_up(str(folder / "server.address"))
        time.sleep(0.05)
    raise SystemExit(f"{folder}: no server came up")
