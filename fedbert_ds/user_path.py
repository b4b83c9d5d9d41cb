"""Paths as users write them: `~` and `$NAME` stand for what a shell would put there."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(text: str) -> str:
    """A path or a name of the hub; names without these signs stay."""
    return os.path.expanduser(os.path.expandvars(text))


def user_path(text: str) -> Path:
    """A path. No shell may have seen it: `--state=~/runs`, a service's or a container's command."""
    return Path(expanded(text))
