"""How deep the pipeline is, by hand: Little's law, the worst of the ranks, and memory above all."""

from __future__ import annotations

from fedbert_ds.server.queue.in_flight import DEEPEST, FARTHEST_AHEAD, FIRST_DEPTH, Demand, Depth, depth_for


def demand(activations: float = 0.0, gradient: float = 0.0, service: float = 0.0, affordable: int = DEEPEST) -> Demand:
    return Demand(activations, gradient, service, affordable)


def test_before_anything_is_measured() -> None:
    assert depth_for([demand(), demand()]) == Depth(FIRST_DEPTH, FIRST_DEPTH)
    assert depth_for([demand(gradient=1.0)]).in_flight == FIRST_DEPTH
    assert depth_for([demand(service=1.0)]).in_flight == FIRST_DEPTH


def test_as_many_as_are_away_and_half_as_many_again() -> None:
    assert depth_for([demand(activations=1.0, gradient=1.0, service=0.1)]) == Depth(
        17, 17
    )  # 2 + 1.5 x 10; no less ahead
    assert depth_for([demand(activations=4.0, gradient=1.0, service=0.1)]) == Depth(17, 42)  # 2 + 40
    assert depth_for([demand(activations=0.01, gradient=0.01, service=1.0)]) == Depth(3, 3)


def test_ranks_agree_on_the_deepest_that_all_can_afford() -> None:
    near, far = demand(0.1, 0.1, 0.1), demand(2.0, 2.0, 0.1, affordable=20)
    assert depth_for([near]).in_flight == 4
    assert depth_for([near, far]).in_flight == depth_for([far, near]).in_flight == 20
    assert depth_for([near, demand(affordable=1)]).in_flight == 1


def test_memory_and_buffers_have_an_end() -> None:
    depth = depth_for([demand(activations=1000.0, gradient=1000.0, service=0.001)])
    assert depth == Depth(DEEPEST, FARTHEST_AHEAD)
    assert depth_for([demand(affordable=0)]).in_flight == 1
