"""What a run asks of a client: its Welcome as typed data, held to the owner's limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedbert_ds.client.limits import (
    LARGEST_TOKENIZER,
    Limits,
    check_memory,
    check_model,
    check_settings,
    least_memory,
)
from fedbert_ds.config import Cut
from fedbert_ds.errors import WireError
from fedbert_ds.federation.strategy import Strategy, strategy_of
from fedbert_ds.model.checkpoint import config_from_json
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import client_outline
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import ClientSettings, parse_cut, parse_settings


@dataclass(frozen=True)
class Asked:
    """A run as its server describes it."""

    settings: ClientSettings
    model_config: Any
    """Hugging Face's."""
    cut: Cut
    held_out: float
    """Share of the text that the client keeps out of training, unless it says so itself."""
    evaluate_tokens: int
    """Most tokens of that text in an evaluation; 0 where the run has none."""
    outline: ClientHalf
    """The client half on the meta device."""
    least_memory: int
    """Bytes, without the client's text."""

    @property
    def strategy(self) -> Strategy:
        """Who sends what after which window."""
        return strategy_of(self.settings.federation, self.settings.wire, self.cut)


def read_welcome(welcome: pb.Welcome, limits: Limits) -> Asked:
    """What the server asks for. WireError if it is not understood, of no sane run, or more than the
    owner allows; ModelError for a model that this version cannot build.
    """
    if len(welcome.tokenizer) > LARGEST_TOKENIZER:
        raise WireError(f"the run's tokenizer has {len(welcome.tokenizer):,} bytes; a client takes 64 MiB at most")
    if not 0.0 <= welcome.held_out < 1.0:
        raise WireError(f"the run keeps {welcome.held_out} of the text out of training; it must be less than 1")
    settings, cut = parse_settings(welcome.settings), parse_cut(welcome.cut)
    check_settings(settings, welcome.evaluate_tokens, limits)
    model_config = config_from_json(welcome.model_config)
    check_model(model_config)
    outline = client_outline(model_config, cut)
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    least = least_memory(parameters, model_config, cut, settings)
    check_memory(least, limits)
    return Asked(settings, model_config, cut, welcome.held_out, welcome.evaluate_tokens, outline, least)
