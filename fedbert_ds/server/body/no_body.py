"""In place of a body where clients hold the whole model: nothing to step, to save or to merge."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.queue.in_flight import MOST_IN_FLIGHT


class NoBody(BodyEngine):
    """Answers what a rank asks of an engine beside micro-batches, of which there are none."""

    def __init__(self) -> None:
        """No DeepSpeed engine behind it."""
        self.num_parameters = 0

    @property
    def zero_stage(self) -> int:
        """Nothing is partitioned."""
        return 0

    @property
    def lockstep_forwards(self) -> bool:
        """There are no forwards."""
        return False

    def step(self, learning_rate: float, client_norm: float = 0.0) -> float:
        """No gradient, so none is shrunk."""
        return 1.0

    def full_state(self) -> dict[str, Tensor]:
        """No tensors."""
        return {}

    def save(self, folder: Path, window: int) -> None:
        """Make the checkpoint's folder alone, for the client model. All ranks may call it."""
        (folder / f"window-{window}").mkdir(parents=True, exist_ok=True)

    def load(self, folder: Path, window: int, ranks: int = 0, stage: int = 0) -> None:
        """Nothing was saved."""

    def affordable_in_flight(self) -> int:
        """There are no micro-batches."""
        return MOST_IN_FLIGHT

    def take_recompiles(self) -> int:
        """Nothing is compiled."""
        return 0
