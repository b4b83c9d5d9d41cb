"""Whether a body still makes finite results of what clients send, once one of them was not."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedbert_ds.errors import NotFinite
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.packed_input import BodyInput
from fedbert_kernels.encoded import Encoded

TOKENS = 8


class BodyHealth:
    """Asks a body with random activations [8, width], `with_rows` for cut: rows.

    At ZeRO stage 3 all ranks have to ask together: there a rank doubts until they meet.
    """

    def __init__(self, engine: BodyEngine, width: int, with_rows: bool) -> None:
        self._engine = engine
        self._width = width
        self._with_rows = with_rows
        self.unsound: set[str] = set()
        """Clients whose numbers made results that are not finite."""
        self.doubt = ""
        """What this rank has seen since the ranks met."""

    def look_into(self, seen: NotFinite) -> None:
        """A result was not finite. Raises it if the body makes none that are."""
        if self._engine.lockstep_forwards:
            self.doubt = self.doubt or str(seen)
        elif not self._is_sound():
            raise seen

    def settle(self, doubts: Iterable[str]) -> None:
        """All ranks together, with what each doubts: raises NotFinite, on all, as `look_into`."""
        self.doubt = ""
        seen = next(filter(None, doubts), "")
        if seen and not self._is_sound():
            raise NotFinite(seen)

    def _is_sound(self) -> bool:
        values = torch.randn(TOKENS, self._width, generator=torch.Generator().manual_seed(1))
        everywhere = torch.arange(TOKENS)
        bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
        rows = everywhere if self._with_rows else None
        plain = BodyInput([Encoded.of(values, "fp32")], everywhere, bounds, rows, 0)
        hidden, _ = self._engine.evaluate(plain).result()
        return hidden.is_finite
