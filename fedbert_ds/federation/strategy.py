"""What the client halves exchange in each federated mode, and when; the same rule on both sides of the wire."""

from __future__ import annotations

from typing import Literal

from fedbert_ds.config import Codec, FederationSection, WireSection

Exchange = Literal["nothing", "gradients", "weights"]


def exchange_after(federation: FederationSection, window: int) -> Exchange:
    """What every client sends after window `window` (0-based), and gets back combined.

    `synchronous`: gradients, summed, every window. `parallel`: weights, averaged, every `average_every` windows.
    """
    if federation.mode == "synchronous":
        return "gradients"
    return "weights" if (window + 1) % federation.average_every == 0 else "nothing"


def exchange_codec(federation: FederationSection, wire: WireSection) -> Codec:
    """How what is exchanged is coded: gradients as they are; of weights, unless fp32, what changed in them."""
    return wire.updates


def is_exchanged(federation: FederationSection, scope: Literal["embeddings", "head"]) -> bool:
    """Whether parameters of this scope take part in the exchange; `synchronous` has one model, so all do."""
    return federation.mode == "synchronous" or scope in federation.average_scope.split("+")
