"""How ranks and an aggregator of another party know each other: names, and a secret in a file."""

from __future__ import annotations

import hmac
from pathlib import Path

from fedbert_ds.errors import ConfigError

SHORTEST_SECRET = 16
"""Characters; `openssl rand -hex 16` prints twice as many."""


def rank_name(rank: int) -> str:
    """A rank's name at the aggregator's endpoint. No client has it: their names are printable."""
    return f"\trank {rank}"


def read_secret(path: Path) -> str:
    """The secret that coordinator and aggregator share. Raises ConfigError for a file without."""
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"aggregator.secret: {path} cannot be read; write a secret that both parties share"
        ) from error
    if len(secret) < SHORTEST_SECRET:
        raise ConfigError(
            f"aggregator.secret: {path} holds {len(secret)} characters; at least {SHORTEST_SECRET} are needed, "
            "as by openssl rand -hex 16"
        )
    return secret


def is_secret(shown: str, secret: str) -> bool:
    """Whether the other side knows the secret. Takes as long for every wrong one."""
    return hmac.compare_digest(shown.encode(), secret.encode())
