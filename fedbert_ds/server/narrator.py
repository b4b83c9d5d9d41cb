"""What a run tells its user: the opening lines, progress, metrics, and at the end the model, its loss and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from fedbert_ds import __version__
from fedbert_ds.config import RunConfig
from fedbert_ds.model.body import Body
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.server.control import Control
from fedbert_ds.server.engine import BodyEngine, zero_stage
from fedbert_ds.server.prepare import TextFacts
from fedbert_ds.server.rank import RankServer, Report


class Narrator:
    """Speaks on rank 0; on other ranks only `hand_over` does anything, since gathering weights takes all ranks."""

    def __init__(
        self, config: RunConfig, control: Control, facts: TextFacts | None, half: ClientHalf, body: Body
    ) -> None:
        self._config = config
        self._control = control
        self._facts = facts
        self._sizes = half.num_parameters, body.num_parameters

    def announce(self, address: str) -> None:
        print(address, self._sizes, flush=True)

    @contextmanager
    def following(self, first_window: int) -> Iterator[None]:
        yield

    def window(self, window: int, reports: Sequence[Report], seconds: float) -> None:
        if self._control.rank == 0:
            m = sum(r.tally.masked_tokens for r in reports); l = sum(r.tally.loss_sum for r in reports)
            print(window, l / max(1, m), seconds, reports[0].tally, flush=True)

    def hand_over(self, window: int, rank: RankServer, engine: BodyEngine, hf_config: Any, tokenizer: Any) -> None:
        half = rank.collect_half(window)
        body = engine.full_state()
        rank.finish("done")
        if self._control.rank == 0:
            from fedbert_ds.model.checkpoint import save_merged
            save_merged(self._config.run.directory / "hf", hf_config, half, body, tokenizer)
