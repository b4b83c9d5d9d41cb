"""The messages of a reference: whole, with its version, and as it was when it was asked for."""

from __future__ import annotations

import pytest
import torch

from fedbert_ds.aggregator.reference_messages import ReferenceMessages
from fedbert_ds.federation import reference as reference_module
from fedbert_ds.federation.reference import Reference, ReferenceAssembler

SHAPES = {"table": (3, 2)}


def reference(version: int, value: float = 1.0) -> Reference:
    moments = {"table": {"exp_avg": torch.full((3, 2), value)}}
    return Reference(version, {"table": torch.full((3, 2), value)}, moments)


@pytest.mark.parametrize("shares_moments", [False, True])
def test_messages_join_to_the_reference(shares_moments: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "CHUNK_BYTES", 50)
    chunks = [message.reference for message in ReferenceMessages(shares_moments).of(reference(5))()]
    assert len(chunks) > 1
    assembler = ReferenceAssembler(SHAPES)
    *_, whole = [assembler.add(chunk) for chunk in chunks]
    assert whole is not None and whole.version == 5 and torch.equal(whole.weights["table"], torch.ones(3, 2))
    assert bool(whole.optimizer) == shares_moments


def test_a_later_move_is_another_reference() -> None:
    made = ReferenceMessages(shares_moments=False)
    moving = reference(1)
    first = made.of(moving)
    moving.weights["table"].fill_(7.0)
    second = made.of(Reference(2, moving.weights))
    values = []
    for messages in (first, second):
        assembler = ReferenceAssembler(SHAPES)
        *_, whole = [assembler.add(message.reference) for message in messages()]
        assert whole is not None
        values.append((whole.version, float(whole.weights["table"][0, 0])))
    assert values == [(1, 1.0), (2, 7.0)]
