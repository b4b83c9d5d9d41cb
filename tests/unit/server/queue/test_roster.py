"""Clients of a rank and their manifests: who is waited for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from fedbert_ds.errors import WireError
from fedbert_ds.server.queue.roster import Roster, next_window_of
from fedbert_ds.wire.messages import Manifest


def manifest(client: str, window: int = 0) -> Manifest:
    return Manifest(client, window, (4,), (2,))


def roster_of(*clients: str, **options: Any) -> Roster:
    roster = Roster(**options)
    for client in clients:
        roster.add(client)
    return roster


def test_a_window_is_complete_once_every_active_client_announced() -> None:
    roster = roster_of("ada", "bo")
    assert roster.clients == roster.active == {"ada", "bo"}
    assert not roster.is_complete and roster.owes_manifest("ada")
    assert roster.announce(manifest("bo"))
    assert not roster.is_complete
    assert roster.announce(manifest("ada"))
    assert roster.is_complete and not roster.owes_manifest("ada")
    assert roster.close() == ((manifest("bo"), manifest("ada")), frozenset())
    assert roster.next_window == 1 and not roster.is_complete and roster.owes_manifest("ada")


def test_nobody_is_waited_for_who_is_gone_or_suspended() -> None:
    roster = roster_of("ada", "bo", "cy")
    roster.announce(manifest("ada"))
    roster.remove("bo")
    assert not roster.is_connected("bo") and not roster.is_complete
    roster.suspend("cy")
    assert roster.active == {"ada"} and roster.clients == {"ada", "cy"}
    for window in range(3):
        if window > 0:
            roster.announce(manifest("ada", window))
        assert roster.is_complete, f"window {window} waits for somebody"
        assert roster.close() == ((manifest("ada", window),), frozenset())


def test_a_suspended_client_that_announced_is_left_out_and_named() -> None:
    roster = roster_of("ada", "bo")
    for client in ("ada", "bo"):
        roster.announce(manifest(client))
    roster.suspend("bo")
    assert roster.close() == ((manifest("ada"),), {"bo"})


def test_a_client_that_is_heard_from_is_waited_for_again() -> None:
    roster = roster_of("ada", "bo")
    roster.announce(manifest("ada"))
    roster.suspend("bo")
    assert roster.reactivate("bo") and not roster.reactivate("bo")
    assert not roster.is_complete and roster.active == {"ada", "bo"}
    roster.announce(manifest("bo"))
    roster.suspend("bo")
    assert roster.reactivate("bo")
    assert roster.is_complete, "its manifest is still here"


def test_a_manifest_of_a_window_that_left_its_client_out_is_not_taken() -> None:
    roster = roster_of("ada", "bo")
    roster.announce(manifest("ada"))
    roster.suspend("bo")
    roster.close()
    roster.reactivate("bo")
    assert roster.announce(manifest("bo", window=0)) is False
    assert roster.announce(manifest("bo", window=1)) is True
    roster.announce(manifest("ada", window=1))
    roster.close()
    with pytest.raises(WireError, match="manifest of window 1 instead of 2"):
        roster.announce(manifest("bo", window=1))


def test_what_is_refused() -> None:
    roster = roster_of("ada", first_window=3)
    with pytest.raises(WireError, match="already connected"):
        roster.add("ada")
    for call in (roster.require, lambda client: roster.announce(manifest(client, 3))):
        with pytest.raises(WireError, match="nobody is not connected"):
            call("nobody")
    with pytest.raises(WireError, match="manifest of window 2 instead of 3"):
        roster.announce(manifest("ada", 2))
    roster.announce(manifest("ada", 3))
    with pytest.raises(WireError, match="second manifest of window 3"):
        roster.announce(manifest("ada", 3))


def test_a_name_that_comes_back_has_announced_nothing() -> None:
    roster = roster_of("ada")
    roster.announce(manifest("ada"))
    roster.suspend("ada")
    roster.remove("ada")
    roster.add("ada")
    assert roster.active == {"ada"} and not roster.is_complete


def test_a_rank_is_deserted_when_all_its_clients_are_suspended() -> None:
    roster = roster_of("ada", "bo")
    assert not Roster().is_deserted and not roster.is_deserted
    roster.suspend("ada")
    assert not roster.is_deserted
    roster.suspend("bo")
    assert roster.is_deserted and roster.is_complete


def test_after_the_last_window_no_manifest_is_wanted() -> None:
    roster = roster_of("ada", num_windows=1)
    roster.announce(manifest("ada"))
    roster.close()
    assert roster.is_over and not roster.is_complete and not roster.owes_manifest("ada")


# -- where not all take part in every window -------------------------------------------------------


def by_turns(client: str, window: int) -> bool:
    """ada, bo and cy, one window each; nobody else."""
    return client == ("ada", "bo", "cy")[window % 3]


def test_a_window_waits_for_its_participants_alone() -> None:
    roster = roster_of("ada", "bo", takes_part=by_turns)
    assert roster.owes_manifest("ada") and not roster.owes_manifest("bo") and roster.awaited == ["ada"]
    assert [roster.next_window_of(client) for client in ("ada", "bo", "cy")] == [0, 1, 2]
    roster.announce(manifest("bo", 1))
    assert not roster.is_complete, "bo's manifest is of a later window"
    roster.announce(manifest("ada", 0))
    assert roster.is_complete and roster.close() == ((manifest("ada", 0),), frozenset())
    assert roster.is_complete and roster.awaited == [], "bo announced ahead"
    assert roster.next_window_of("ada") == 3
    assert roster.close() == ((manifest("bo", 1),), frozenset())
    assert roster.is_complete and roster.close() == ((), frozenset()), "cy is not here: its window is empty"


def test_only_the_next_window_of_its_own_may_be_announced() -> None:
    roster = roster_of("ada", "bo", takes_part=by_turns)
    for window in (0, 2, 4):
        with pytest.raises(WireError, match=f"client bo: manifest of window {window} instead of 1"):
            roster.announce(manifest("bo", window))
    roster.announce(manifest("bo", 1))
    with pytest.raises(WireError, match="second manifest of window 1"):
        roster.announce(manifest("bo", 1))


def test_a_window_without_a_suspended_client_leaves_it_out_only_if_it_is_its_own() -> None:
    roster = roster_of("ada", "bo", takes_part=by_turns)
    roster.suspend("bo")
    roster.announce(manifest("ada", 0))
    roster.close()
    assert roster.awaited == ["bo"] and roster.is_complete and roster.is_deserted
    with pytest.raises(WireError, match="manifest of window 0 instead of 1"):
        roster.announce(manifest("bo", 0))
    roster.close()
    assert roster.announce(manifest("bo", 1)) is False, "its own window, planned without it"
    assert roster.next_window_of("bo") == 4


def test_a_suspended_participant_is_awaited_though_it_announced() -> None:
    """Only a sign of life brings it back."""
    roster = roster_of("ada", "bo", takes_part=by_turns)
    roster.announce(manifest("bo", 1))
    roster.announce(manifest("ada", 0))
    roster.suspend("bo")
    roster.close()
    assert roster.awaited == ["bo"] and not roster.owes_manifest("bo")


def test_a_window_would_be_empty_when_its_participants_everywhere_are_suspended() -> None:
    roster = roster_of("ada", takes_part=lambda client, window: client in ("ada", "bo"))
    assert not roster.would_be_empty(frozenset())
    roster.suspend("ada")
    assert roster.would_be_empty(frozenset())
    assert roster.would_be_empty(frozenset({"cy"})), "cy, at another rank, has no part in it"
    assert not roster.would_be_empty(frozenset({"bo", "cy"}))
    assert not roster.would_be_empty(None)


def test_without_participants_here_a_window_is_not_deserted() -> None:
    """Other ranks have them, and this one runs with dummies."""
    roster = roster_of("bo", takes_part=by_turns)
    roster.suspend("bo")
    assert roster.is_complete and not roster.is_deserted and not roster.would_be_empty(frozenset())


def test_the_next_window_of_a_client_that_has_none_left_is_the_end() -> None:
    assert next_window_of("ada", by_turns, 4, 6) == 6
    assert next_window_of("cy", by_turns, 4, 6) == 5
    assert next_window_of("di", by_turns, 0, 6) == 6
    assert roster_of("ada", num_windows=3, first_window=1, takes_part=by_turns).next_window_of("ada") == 3


def test_who_is_not_awaited_stops_no_window_until_it_announces() -> None:
    roster = roster_of("ada")
    roster.add("bo", is_awaited=False)
    assert roster.clients == {"ada", "bo"} and roster.active == {"ada"} and roster.owes_manifest("bo")
    roster.announce(manifest("ada"))
    assert roster.is_complete
    assert roster.close() == ((manifest("ada"),), frozenset())
    roster.reactivate("bo")
    assert roster.announce(manifest("bo", 0)) is False, "window 0 was planned without it"
    roster.announce(manifest("ada", 1))
    assert not roster.is_complete, "from now on it is waited for"
    roster.announce(manifest("bo", 1))
    assert roster.close() == ((manifest("ada", 1), manifest("bo", 1)), frozenset())


def test_while_it_is_held_no_window_is_complete() -> None:
    roster = roster_of("ada")
    roster.is_held = True
    roster.announce(manifest("ada"))
    assert not roster.is_complete
    roster.is_held = False
    assert roster.is_complete


def test_after_a_roll_back_everybody_announces_anew() -> None:
    roster = roster_of("ada", "bo", "cy", num_windows=2)
    for window in range(2):
        roster.announce(manifest("ada", window))
        roster.suspend("bo")
        if window == 0:
            roster.suspend("cy")
            roster.close()
            roster.reactivate("cy")
    roster.announce(manifest("cy", 1))
    roster.close()
    assert roster.is_over
    roster.roll_back(0)
    assert not roster.is_over and roster.next_window == 0
    assert roster.active == roster.clients == {"ada", "bo", "cy"}
    with pytest.raises(WireError, match="manifest of window 1 instead of 0"):
        roster.announce(manifest("ada", 1))
    for client in ("ada", "bo", "cy"):
        assert not roster.is_complete and roster.owes_manifest(client)
        assert roster.announce(manifest(client)) is True
    assert roster.is_complete
    roster.roll_back(0)
    roster.announce(manifest("ada"))
    assert roster.owes_manifest("bo"), "a manifest from before does not count"
    roster.roll_back(1)
    with pytest.raises(WireError, match="manifest of window 0 instead of 1"):
        roster.announce(manifest("bo"))  # nothing was planned without it
