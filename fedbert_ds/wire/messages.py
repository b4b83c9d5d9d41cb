"""Settings, cut and manifest as typed, checked data, shared by both sides of the wire."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from fedbert_ds.config import (
    Cut,
    FederationSection,
    OptimizerSection,
    RunSection,
    Section,
    SequenceSection,
    WindowSection,
    WireSection,
)
from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb

PROTOCOL = 9
"""Raised when a message changes its meaning; client and server must agree."""


class ClientSettings(Section):
    """The run as a client needs to know it, in `Welcome.settings`."""

    seed: int
    windows: int
    tokens: int
    """Tokens this client brings to a window that it takes part in."""
    tokens_per_micro_batch: int
    """Most tokens that it computes at once with `cut: whole`, unless one sequence is longer."""
    sequences: SequenceSection
    optimizer: OptimizerSection
    federation: FederationSection
    wire: WireSection


def client_settings(
    run: RunSection,
    sequences: SequenceSection,
    optimizer: OptimizerSection,
    federation: FederationSection,
    wire: WireSection,
    tokens: int,
    tokens_per_micro_batch: int = WindowSection().tokens_per_micro_batch,
) -> ClientSettings:
    """The settings of a client with `tokens` tokens a window.

    `sequences` may be the run file's `data`; nothing else of it travels.
    """
    return ClientSettings(
        seed=run.seed,
        windows=run.windows,
        tokens=tokens,
        tokens_per_micro_batch=tokens_per_micro_batch,
        sequences=SequenceSection(**sequences.model_dump(include=set(SequenceSection.model_fields))),
        optimizer=optimizer,
        federation=federation,
        wire=wire,
    )


def parse_settings(text: str) -> ClientSettings:
    """Settings from a Welcome; WireError if this version does not know them."""
    try:
        return ClientSettings.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise WireError(
            f"the server's settings are not understood ({reason}); install the same fedbert-ds on both"
        ) from error


def cut_to_json(cut: Cut) -> str:
    """The run file's `cut` as JSON, for a Welcome or a Hello."""
    return TypeAdapter(Cut).dump_json(cut).decode()


def parse_cut(text: str) -> Cut:
    """The `cut` of a Welcome; WireError if this version does not know it."""
    try:
        return TypeAdapter(Cut).validate_json(text)
    except ValidationError as error:
        raise WireError(f"the server's cut {text} is not understood; install the same fedbert-ds on both") from error


@dataclass(frozen=True)
class Manifest:
    """A client's sequences in one window: tokens and masked tokens of each."""

    client: str
    window: int
    lengths: tuple[int, ...]
    masked: tuple[int, ...]


def cursor_numbers(cursor: pb.Cursor) -> dict[str, int]:
    """A place in a client's text, as `BatchStream.state_dict` has it."""
    return {"epoch": cursor.epoch, "position": cursor.position, "sequences": cursor.sequences}


LARGEST_LOSS = 1e4
"""Nats of a masked token. Guessing among all words costs some ten."""
SLACK_MASKED = 64
"""Masked tokens of a window that chance may add."""


def check_masked(manifest: Manifest, mask_probability: float) -> None:
    """WireError for more masked tokens than chance gives: they are a client's weight.

    Twice as many as are due, and some: whole words are masked together.
    """
    masked, tokens = sum(manifest.masked), sum(manifest.lengths)
    if masked > 2 * mask_probability * tokens + SLACK_MASKED:
        raise WireError(
            f"client {manifest.client}: manifest of window {manifest.window}: {masked} of {tokens} tokens masked; "
            f"data.mask_probability is {mask_probability:g}"
        )


def check_loss(loss_sum: float, masked: int, who: str) -> None:
    """WireError for a sum of cross-entropies that so many masked tokens cannot have."""
    if not 0 <= loss_sum <= LARGEST_LOSS * masked:
        raise WireError(
            f"{who}: a loss of {loss_sum:.3g} for {masked} masked tokens; lower optimizer.lr or raise "
            "optimizer.warmup_windows, unless only this client reports such"
        )


def checked_manifest(client: str, message: pb.Manifest, max_sequence: int, max_tokens: int) -> Manifest:
    """The manifest in a message; WireError for impossible sizes.

    `max_sequence` is the run's `data.sequence_length`, `max_tokens` this client's share of a
    window, both in tokens.
    """
    who = f"client {client}: manifest of window {message.window}"
    # A client always brings at least one sequence, which may be longer than its share.
    limit = max(max_tokens, max_sequence)
    count = len(message.lengths)
    if not 0 < count <= limit or count != len(message.masked):
        raise WireError(f"{who}: {count} lengths and {len(message.masked)} masked counts for {limit} tokens")
    lengths, masked = tuple(message.lengths), tuple(message.masked)
    if min(lengths) < 1:
        raise WireError(f"{who}: a sequence without tokens")
    if max(lengths) > max_sequence:
        raise WireError(f"{who}: a sequence of {max(lengths)} tokens; data.sequence_length is {max_sequence}")
    if any(wanted > length for wanted, length in zip(masked, lengths, strict=True)):
        raise WireError(f"{who}: more masked tokens than tokens")
    if sum(lengths) > limit:
        raise WireError(f"{who}: {sum(lengths)} tokens instead of at most {limit}")
    cursor = message.cursor
    if not 0 <= cursor.position <= cursor.sequences:
        raise WireError(f"{who}: a cursor at sequence {cursor.position} of {cursor.sequences}")
    return Manifest(client, message.window, lengths, masked)
