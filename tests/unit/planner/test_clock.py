"""The planner's clock: events in order, pipes that serve one job after another."""

from __future__ import annotations

from fedbert_ds.planner.clock import Clock, Cores, Pipe


def test_events_happen_in_the_order_of_their_times_and_then_of_setting() -> None:
    clock, happened = Clock(), []
    for when, name in ((2.0, "late"), (1.0, "first"), (1.0, "second")):
        clock.at(when, lambda name=name: happened.append((clock.now, name)))
    while clock.advance():
        pass
    assert happened == [(1.0, "first"), (1.0, "second"), (2.0, "late")]
    assert clock.events == 3 and clock.now == 2.0


def test_an_event_may_set_another() -> None:
    clock, happened = Clock(), []
    clock.at(1.0, lambda: clock.at(clock.now + 0.5, lambda: happened.append(clock.now)))
    assert clock.advance() and happened == []
    assert clock.advance() and happened == [1.5]
    assert not clock.advance()


def test_a_pipe_serves_one_job_after_another() -> None:
    pipe = Pipe()
    assert [pipe.take(0.0, 2.0), pipe.take(1.0, 2.0), pipe.take(9.0, 1.0)] == [2.0, 4.0, 10.0]
    assert pipe.busy == 5.0


def test_cores_serve_as_many_jobs_at_once() -> None:
    cores = Cores(2)
    assert [cores.take(0.0, 2.0) for _ in range(4)] == [2.0, 2.0, 4.0, 4.0]
