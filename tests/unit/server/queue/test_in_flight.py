"""How deep the pipeline is, by hand: Little's law, the worst of the ranks, and memory above all."""

from __future__ import annotations

from fedbert_ds.server.queue.in_flight import (
    INITIAL_IN_FLIGHT,
    MOST_AHEAD,
    MOST_IN_FLIGHT,
    Demand,
    InFlightLimits,
    in_flight_limits,
)


def demand(
    activations: float = 0.0, gradient: float = 0.0, service: float = 0.0, affordable: int = MOST_IN_FLIGHT
) -> Demand:
    return Demand(activations, gradient, service, affordable)


def test_before_anything_is_measured() -> None:
    assert in_flight_limits([demand(), demand()]) == InFlightLimits(INITIAL_IN_FLIGHT, INITIAL_IN_FLIGHT)
    assert in_flight_limits([demand(gradient=1.0)]).in_flight == INITIAL_IN_FLIGHT
    assert in_flight_limits([demand(service=1.0)]).in_flight == INITIAL_IN_FLIGHT


def test_as_many_as_are_away_and_half_as_many_again() -> None:
    assert in_flight_limits([demand(activations=1.0, gradient=1.0, service=0.1)]) == InFlightLimits(
        17, 17
    )  # 2 + 1.5 x 10; no less ahead
    assert in_flight_limits([demand(activations=4.0, gradient=1.0, service=0.1)]) == InFlightLimits(17, 42)  # 2 + 40
    assert in_flight_limits([demand(activations=0.01, gradient=0.01, service=1.0)]) == InFlightLimits(3, 3)


def test_ranks_agree_on_the_deepest_that_all_can_afford() -> None:
    near, far = demand(0.1, 0.1, 0.1), demand(2.0, 2.0, 0.1, affordable=20)
    assert in_flight_limits([near]).in_flight == 4
    assert in_flight_limits([near, far]).in_flight == in_flight_limits([far, near]).in_flight == 20
    assert in_flight_limits([near, demand(affordable=1)]).in_flight == 1


def test_memory_and_buffers_have_an_end() -> None:
    limits = in_flight_limits([demand(activations=1000.0, gradient=1000.0, service=0.001)])
    assert limits == InFlightLimits(MOST_IN_FLIGHT, MOST_AHEAD)
    assert in_flight_limits([demand(affordable=0)]).in_flight == 1
