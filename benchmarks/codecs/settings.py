"""The ways to code what crosses that `bench codecs` compares, and the order in which it tries them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedbert_ds.config import Codec, WireSection


@dataclass(frozen=True)
class Setting:
    """One way to code what crosses."""

    model: Literal["full", "factorized"] = "full"
    cut: Literal["rows", "embeddings"] = "rows"
    activations: Codec = "fp32"
    hidden: Codec = "fp32"
    gradients: Codec = "fp32"
    extra: Literal["", "stochastic", "row feedback", "centred", "int8 halves", "unit projection"] = ""
    """Gradients rounded at random; errors of table rows fed back; the mean of a message's hidden states sent apart;
    gradients of the client half summed in int8; a factorized model's E -> H drawn with unit gain."""

    @property
    def wire(self) -> WireSection:
        """As a run file says it; lossless compression costs no loss, so what is trained goes without."""
        codecs = {"activations": self.activations, "hidden": self.hidden, "gradients": self.gradients}
        return WireSection(**codecs, compression="none")

    @property
    def label(self) -> str:
        """For a reader."""
        return ", ".join(part for part in (self.model, self.cut, *self.codecs, self.extra) if part)

    @property
    def codecs(self) -> tuple[str, ...]:
        """Its three codecs, or the one that is all of them."""
        codecs = (self.activations, self.hidden, self.gradients)
        return codecs[:1] if len(set(codecs)) == 1 else codecs


def all_in(codec: Codec, **more: Any) -> Setting:
    """Everything in one codec."""
    return Setting(activations=codec, hidden=codec, gradients=codec, **more)


BASELINE = Setting()
MAIN = (
    BASELINE,
    all_in("int4_hadamard"),
    all_in("int8"),
    all_in("fp32", model="factorized"),
    all_in("int4_hadamard", model="factorized"),
)
"""Run first, with every seed."""
FURTHER = (
    all_in("int4_hadamard", extra="stochastic"),
    all_in("int4_hadamard", extra="centred"),
    all_in("fp32", model="factorized", extra="unit projection"),
    all_in("int4_hadamard", extra="row feedback"),
    all_in("fp32", extra="int8 halves"),
    all_in("int4_hadamard", cut="embeddings"),
    Setting(activations="int4_hadamard", hidden="int4_hadamard", gradients="int8"),
    all_in("fp8_e4m3"),
    Setting(activations="fp8_e4m3", hidden="fp8_e4m3", gradients="fp8_e5m2"),
    Setting(activations="int8", hidden="int8", gradients="int4_hadamard"),
    all_in("int8", model="factorized"),
    all_in("int8", cut="embeddings"),
    all_in("int8_group"),
    all_in("bf16"),
)
"""The most telling first, for `--minutes` may leave the last ones out."""
