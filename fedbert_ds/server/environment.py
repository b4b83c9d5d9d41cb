"""Environment variables that a launcher or a user sets for a rank, checked before any is used."""

from __future__ import annotations

from collections.abc import Mapping

from fedbert_ds.errors import ConfigError

NUMBERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "TORCHELASTIC_RESTART_COUNT",
)


def check_numbers(environment: Mapping[str, str]) -> None:
    """ConfigError for a variable that should hold a whole number and does not."""
    for name in NUMBERS:
        text = environment.get(name)
        # OpenMP takes a list, a number for each level of nesting.
        first = text.partition(",")[0] if text is not None and name == "OMP_NUM_THREADS" else text
        if first is not None and not (first.strip().isascii() and first.strip().isdecimal()):
            raise ConfigError(f"environment variable {name}={text}: a whole number is needed; set one, or unset it")
