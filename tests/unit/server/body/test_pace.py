"""How long a device computes: work with gaps is bounded by work that had none."""

from __future__ import annotations

from fedbert_ds.server.body.pace import SETTLING, TRIES, Load, Pace

FORWARD, BACKWARD = Load("forward", 100), Load("backward", 50)


def test_work_with_gaps_takes_no_longer_than_the_tokens_of_work_without() -> None:
    pace = Pace()
    assert pace.computed(FORWARD, 3.0, may_have_gaps=True) == 3.0, "nothing is known yet"
    assert pace.computed(FORWARD, 1.0, may_have_gaps=False) == 1.0
    assert pace.computed(Load("forward", 200), 9.0, may_have_gaps=True) == 2.0
    assert pace.computed(Load("forward", 200), 1.5, may_have_gaps=True) == 1.5
    assert pace.computed(BACKWARD, 9.0, may_have_gaps=True) == 9.0, "a backward is another kind"


def test_a_dummys_few_tokens_tell_nothing() -> None:
    pace = Pace()
    pace.computed(Load("forward", 2), 1.0, may_have_gaps=False)
    assert pace.computed(FORWARD, 3.0, may_have_gaps=True) == 3.0


def test_the_device_is_held_up_only_where_every_work_had_gaps_and_not_for_ever() -> None:
    pace = Pace()
    pace.computed(BACKWARD, 1.0, may_have_gaps=False)
    asked = [(pace.wants_sample(FORWARD), pace.wants_sample(BACKWARD)) for _ in range(SETTLING + 2 * TRIES)]
    assert asked == [(SETTLING <= work < SETTLING + TRIES, False) for work in range(SETTLING + 2 * TRIES)]
