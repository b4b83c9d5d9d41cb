"""What a run would have a client send, to whom, and what that gives away: told to its owner."""

from __future__ import annotations

from typing import get_args

from fedbert_ds.client.welcome import Asked
from fedbert_ds.config import LayersCut
from fedbert_ds.federation.strategy import Exchange, Scope
from fedbert_ds.wire.codecs import frame_bytes

ROWS = 1000
"""Rows that bytes per row are counted over."""

READS = {
    "embeddings": (
        "Each token's vector is a row of the word table plus its position. Who has the table finds the word as the "
        "nearest row, in a second for hundreds of tokens, whatever the codec."
    ),
    "rows": (
        "Each distinct word's row comes once, with the places where it stands: a cipher of one sign a word. Who has "
        "the word table reads it at once, others by counting words."
    ),
    "layers": (
        "Vectors have passed through encoder layers of this client. What can be read from them depends on the layers "
        "and has not been measured here: take the text as readable."
    ),
    "whole": (
        "No activations are sent. Changes of weights show which words occurred; small batches can be rebuilt from "
        "gradients in part (Zhu et al. 2019)."
    ),
}
"""What the server learns of the text, by cut."""
TABLE = {
    True: "The server has no part of the word table, unless the run continues a public checkpoint.",
    False: "This server has the word table: it began the run with it and adds up its gradients.",
}
"""Who has the table; True with an aggregator of another party."""


def description(asked: Asked, server: str, aggregator: str, has_tls: bool, held_out: float) -> str:
    """Lines for the owner of a client. `server` and `aggregator` are addresses; `aggregator` is
    empty where the ranks are the aggregator. `held_out` is the share of the text kept apart.
    """
    settings, strategy = asked.settings, asked.strategy
    cut = f"layers: {asked.cut.layers}" if isinstance(asked.cut, LayersCut) else asked.cut
    link = "TLS, certificates on both sides" if has_tls else "plain text, which anybody on the way can read"
    task = "masked words" if asked.outline.task is None else asked.outline.task.name
    lines = [
        ("run", f"{settings.windows:,} windows of {settings.tokens:,} tokens, all clients together; {task}"),
        ("mode", f"{settings.federation.mode}, cut: {cut}"),
        ("server", f"{server}; {link}"),
        ("it gets", "of each sequence: its length, and where the tokens to predict stand"),
    ]
    if not strategy.trains_alone:
        widths, wire = asked.outline.widths, settings.wire
        lines += [
            ("", f"of each token: a vector of {widths.activations} numbers as {wire.activations}, "
                 f"{_row_bytes(widths.activations, wire.activations):,.0f} bytes"),
            ("", f"of each token to predict: a gradient of {widths.hidden} numbers as {wire.gradients}, "
                 f"{_row_bytes(widths.hidden, wire.gradients):,.0f} bytes"),
        ]  # fmt: skip
    lines.append(("", "of each message: the sum of its tokens' losses"))
    if aggregator:
        lines.append(("aggregator", f"{aggregator}, another party; {link}"))
    lines += [("it gets" if aggregator else "", sentence) for sentence in _updates(asked)]
    lines.append(("stays here", "text, token ids, labels and which word is masked by what; no message has a field"))
    kept = [scope for scope in get_args(Scope) if not (strategy.takes_part(scope) or strategy.is_handed_over(scope))]
    if kept and not strategy.result_is_reference:
        lines.append(("", f"this client's own {' and '.join(kept)}"))
    if held_out:
        lines.append(("held out", f"{100 * held_out:.0f} % of the articles; of {asked.evaluate_tokens:,} tokens of "
                                  "them at most the server gets vectors and losses"))  # fmt: skip
    lines.append(("inferred", READS["layers" if isinstance(asked.cut, LayersCut) else asked.cut]))
    if not strategy.trains_alone and not isinstance(asked.cut, LayersCut):
        lines.append(("", TABLE[bool(aggregator)]))
    if "gradients" in _exchanges(asked):
        lines.append(("", "In a window of few tokens the gradient of the head's bias is negative for exactly the "
                          "words that were masked."))  # fmt: skip
    lines.append(("memory", f"{asked.least_memory / 1e9:.2f} GB at the least, and your text"))
    return "\n".join(f"{name:<11} {sentence}".rstrip() for name, sentence in lines)


def _row_bytes(width: int, codec: str) -> float:
    return sum(frame_bytes(ROWS, width, codec)) / ROWS


def _exchanges(asked: Asked) -> set[Exchange]:
    return {asked.strategy.exchange_after(window) for window in range(min(asked.settings.windows, 10_000))}


def _updates(asked: Asked) -> list[str]:
    """What is sent of the client half, a sentence each."""
    strategy, half = asked.strategy, asked.outline
    shared = sum(p.numel() for name, p in half.named_parameters() if strategy.takes_part(half.parameter_scope(name)))
    what = "change of weights" if strategy.sends_changes else "weights"
    kinds = {"gradients": "gradients", "weights": what}
    sent = [kinds[kind] for kind in sorted(_exchanges(asked) - {"nothing"})]
    every = round(1 / strategy.exchanges_per_window)
    when = "every window" if every == 1 else f"every {every} windows"
    sentences = [f"{when}: the {kind} of {shared:,} parameters as {strategy.update_codec}" for kind in sent]
    owned = [scope for scope in get_args(Scope) if strategy.is_handed_over(scope) and not strategy.takes_part(scope)]
    if owned:
        sentences.append(f"at the end, and whenever a model is written: this client's own {' and '.join(owned)}")
    return sentences
