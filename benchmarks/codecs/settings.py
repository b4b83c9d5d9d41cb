"""What is compared, in which order: codecs of activations, hidden states and gradients."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedbert_ds.config import Codec, WireSection
from fedbert_ds.telemetry.record import SOURCE

RUN_FILE = SOURCE / "configs" / "default.yaml"
TRAINED = ("run.windows=300", "optimizer.warmup_windows=30")
"""Over the default run file: long enough to leave the plateau of word frequencies well behind."""
QUICK = ("run.windows=4", "tokenizer.vocab_size=500", "window.tokens=1024", "optimizer.warmup_windows=2")


@dataclass(frozen=True)
class Setting:
    """One way to code what crosses."""

    model: Literal["full", "factorized"] = "full"
    cut: Literal["rows", "embeddings"] = "rows"
    activations: Codec = "fp32"
    hidden: Codec = "fp32"
    gradients: Codec = "fp32"
    extra: Literal["", "stochastic", "row feedback", "centred", "int8 halves", "unit projection", "kept in int8"] = ""
    """Gradients rounded at random; errors of table rows fed back; the mean of a message's hidden
    states sent apart; gradients of the client half summed in int8; a factorized model's E -> H
    drawn with unit gain; what GELU takes kept in int8 by the body."""

    @property
    def wire(self) -> WireSection:
        """As in a run file, without compression, which changes no value."""
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


def key_of(setting: Setting) -> str:
    """As runs name it."""
    return json.dumps(asdict(setting))


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
    all_in("fp32", extra="kept in int8"),
)
"""The most telling first, for `--minutes` may leave the last ones out."""

CHOICES: dict[str, Setting] = {one.activations: one for one in (*MAIN, *FURTHER) if one == all_in(one.activations)}
"""Settings that can be asked for by name: with all in one codec, and the last."""
CHOICES["kept-int8"] = FURTHER[-1]


def only(group: tuple[Setting, ...], names: Sequence[str]) -> tuple[Setting, ...]:
    """Of a group the settings of these names in `CHOICES`, and fp32; without names all."""
    wanted = {BASELINE, *(CHOICES[name] for name in names)}
    return tuple(setting for setting in group if not names or setting in wanted)


@dataclass(frozen=True)
class CodecsOptions:
    """What a user gives the benchmark."""

    out: Path
    """The record; its picture lies beside it as .png."""
    command: str
    """What the user typed, for the record."""
    data: str = "python-docs"
    """Source of the articles; see data.source of the run file."""
    work: Path = Path("runs/bench-codecs")
    """Keeps the finished runs."""
    seeds: int = 3
    minutes: float | None = None
    """No run is begun after so many minutes; the record holds what is finished."""
    vocabulary: str | None = None
    """Tokenizer to count bytes with, as tokenizer.path; None learns one of BERT's size."""
    count: tuple[str, ...] = ()
    """Further texts whose bytes are counted, as `data`."""
    codecs: tuple[str, ...] = ()
    """Names in `CHOICES`: train these settings alone."""
    quick: bool = False
    overrides: tuple[str, ...] = ()
    """`section.key=value`, for every run alike."""


def overrides_of(options: CodecsOptions) -> tuple[str, ...]:
    """The run file's overrides; the user's come last but for the text."""
    quick = QUICK if options.quick else ()
    return (*TRAINED, *quick, *options.overrides, f"data.source={json.dumps([options.data])}")
