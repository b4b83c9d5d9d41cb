"""Keys that the run files of two parties must have alike, where another party is the aggregator."""

from __future__ import annotations

import json
from typing import Any

from fedbert_ds.config import RunConfig


def agreement(config: RunConfig) -> str:
    """The keys and values of a run file that move the client model, as JSON."""
    tree = config.model_dump(mode="json")
    facts = {f"model.{key}": value for key, value in tree["model"].items() if key != "checkpoint"}
    # A folder may have another name at the other party; the model's shape is compared apart.
    facts["model.checkpoint"] = tree["model"]["checkpoint"] is not None
    facts |= {
        f"{section}.{key}": value for section in ("optimizer", "federation") for key, value in tree[section].items()
    }
    facts |= {
        "cut": tree["cut"],
        "run.windows": config.run.windows,
        "wire.updates": config.wire.updates,
        "wire.compression": config.wire.compression,
    }
    return json.dumps(facts, sort_keys=True)


def disagreement(mine: str, theirs: str) -> str | None:
    """The first key that differs, in a sentence; None if all agree. `theirs` is not trusted."""
    if mine == theirs:
        return None
    try:
        other: Any = json.loads(theirs)
    except (ValueError, RecursionError):
        other = None
    if not isinstance(other, dict):
        return "the other side's keys are not understood; install the same fedbert-ds on both"
    own = json.loads(mine)
    for key in sorted(own.keys() | other.keys()):
        if own.get(key) != other.get(key):
            here, there = (json.dumps(facts.get(key))[:80] for facts in (own, other))
            return f"{key[:80]} is {here} at the aggregator and {there} at the server; make the run files alike"
    return None
