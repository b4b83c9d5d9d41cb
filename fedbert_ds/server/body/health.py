"""Whether a body still makes finite results of what clients send, once one of them was not."""

from __future__ import annotations

import torch

from fedbert_ds.server.body.engine import BodyEngine, BodyInput
from fedbert_kernels.encoded import Encoded

TOKENS = 8


def is_healthy(engine: BodyEngine, width: int, with_rows: bool) -> bool:
    """Whether results are finite for random activations [8, width], `with_rows` for cut: rows.

    Unknown, so False, at ZeRO stage 3, where all ranks would have to ask.
    """
    if engine.lockstep_forwards:
        return False
    values = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(1))
    everywhere = torch.arange(TOKENS)
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    plain = BodyInput([Encoded.of(values, "fp32")], everywhere, bounds, everywhere if with_rows else None, 0)
    hidden, _ = engine.evaluate(plain).result()
    return hidden.is_finite
