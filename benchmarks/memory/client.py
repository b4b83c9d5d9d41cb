"""One client of a run, the program of `fedbert-ds client`, which notes its most memory by phase.

    python -m benchmarks.memory.client --server - --data FILE --state FOLDER --out FILE.json

Linux keeps the most memory that a process has held resident. It is read and set back wherever a
phase begins or ends, so a phase's figure misses nothing between two samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedbert_ds.atomic_write import write_text
from fedbert_ds.bench.process import address_of
from fedbert_ds.client.footprint import leave_out_unused, return_large_blocks
from fedbert_ds.errors import RunError, one_line_errors

PHASE_OF = {
    "begin": "start",
    "reference": "reference",
    "plan": "plan",
    "open": "embed",
    "hidden": "head",
    "input_gradient": "backward, update sent",
    "update": "update received",
    "save": "save",
    "update_request": "weights sent",
    "finish": "end",
}
"""Phases by the server's message that begins them."""
PHASES = ("imports", *PHASE_OF.values(), "optimizer step", "between")
"""In the order of a table. `start` is text, joining and the half; `between` waits for messages."""
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Phases:
    """Most resident bytes of each phase; an inner phase does not count for the outer one."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._current = "imports"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in this block counts for `name`."""
        outer = self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def enter(self, name: str) -> str:
        """From here on memory counts for `name`; returns the phase that ends."""
        left, self._current = self._current, name
        self.peaks[left] = max(self.peaks.get(left, 0), resident_bytes("VmHWM"))
        RESET.write_text("5")
        return left


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the most since it was set back) of this process, bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RunError(f"{STATUS} has no {field}; this benchmark needs Linux")


@one_line_errors
def main() -> None:
    """Take part in a run, then write the peaks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True, help="- to read it from standard input, once it is known")
    parser.add_argument("--data", required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    phases = Phases()
    # As `fedbert-ds client` begins.
    leave_out_unused()
    return_large_blocks()
    from fedbert_ds.client import session, trainer
    from fedbert_ds.federation.half_optimizer import HalfOptimizer

    def counted(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with phases.phase(name(*arguments)):
                return function(*arguments)

        return call

    handle = trainer.ClientTrainer.handle

    def handled(client: trainer.ClientTrainer, message: Any) -> None:
        kind = message.WhichOneof("body")
        with phases.phase(PHASE_OF.get(kind, "other")):
            handle(client, message)
        if kind == "begin":
            phases.enter("between")

    trainer.ClientTrainer.handle = handled  # type: ignore[assignment, method-assign]
    HalfOptimizer.step = counted(HalfOptimizer.step, lambda *_: "optimizer step")  # type: ignore[method-assign]
    server = address_of(options.server)
    phases.enter("start")
    exit_code = session.run_client(
        session.ClientOptions(
            server=server,
            data=(options.data,),
            name="measured",
            state_folder=options.state,
            cache=options.state / "tokens",
            device="cpu",
        )
    )
    phases.enter("end")
    write_text(options.out, json.dumps(phases.peaks))
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
