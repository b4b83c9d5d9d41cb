"""A rank or client process of the integration tests: the real program, many runs in turn, imports paid once.

    python worker.py rank  JOBS.json     (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)
    python worker.py client JOBS.json NAME

A job is {"config": run file as a mapping, "resume": bool, "mutation": name or null, "data": {client: path}}. Every
client writes what the tests compare into its state folder: `input_gradients.pt`, and `sent.bin`, all bytes it sent.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch


def run_rank(jobs: list[dict]) -> None:
    from integration import mutations

    from fedbert_ds.config import parse_config
    from fedbert_ds.server.body.distributed import initialize, shut_down
    from fedbert_ds.server.serve import check_before_start, serve

    initialize()
    for number, job in enumerate(jobs):
        config = parse_config(job["config"], f"job {number}")
        with mutations.applied(job.get("mutation")):
            check_before_start(config, job["resume"]) if torch.distributed.get_rank() == 0 else None
            serve(config, job["resume"])
    shut_down()


def run_client(jobs: list[dict], name: str) -> None:
    from fedbert_ds.client import session, trainer

    torch.set_num_threads(1)
    for job in jobs:
        folder = Path(job["config"]["run"]["directory"])
        state = folder / "clients" / name
        recorder = _Recorder(trainer.ClientTrainer)
        session.ClientTrainer = recorder.trainer_class
        options = session.ClientOptions(
            server=_address(folder), data=(job["data"][name],), name=name, state_folder=state, device="cpu"
        )
        session.run_client(options)
        recorder.write(state)


class _Recorder:
    """Keeps every byte a client sends and every input gradient it gets, by (window, first sequence)."""

    def __init__(self, base: type) -> None:
        self.sent: list[bytes] = []
        self.input_gradients: dict[tuple[int, int], dict] = {}
        recorder = self

        class RecordedTrainer(base):  # type: ignore[misc, valid-type]
            def __init__(self, *arguments, **keywords) -> None:
                *others, send = arguments

                def recording_send(message) -> None:
                    recorder.sent.append(message.SerializeToString())
                    send(message)

                super().__init__(*others, recording_send, **keywords)

            def _backward(self, message) -> None:
                from fedbert_ds.wire.codecs import decode

                window, piece = self._piece(message)
                recorder.input_gradients[window.number, piece.sequences.start] = {
                    "sequences": (piece.sequences.start, piece.sequences.stop),
                    "gradient": decode(
                        message.values, piece.activations.values.shape, message.values.codec, "recorded"
                    ),
                    "row_index": piece.activations.row_index,
                }
                super()._backward(message)

        self.trainer_class = RecordedTrainer

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.input_gradients, folder / "input_gradients.pt")
        (folder / "sent.bin").write_bytes(b"".join(self.sent))


def _address(folder: Path) -> str:
    """Where the coordinator listens; it takes the file away before clients are told that its run is over."""
    path = folder / "server.address"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.is_file():
            return path.read_text().strip()
        time.sleep(0.05)
    raise SystemExit(f"{folder}: no server came up")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    kind, path, *name = sys.argv[1:]
    work = json.loads(Path(path).read_text())
    run_rank(work) if kind == "rank" else run_client(work, *name)
