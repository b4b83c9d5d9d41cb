"""Cursors: what counts is what is trained; what is only announced is announced again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.server.cursors import Cursor, Cursors


def at(position: int) -> Cursor:
    return {"epoch": 0, "position": position, "sequences": 99}


def test_a_window_counts_once_it_is_trained() -> None:
    cursors = Cursors({"ada": at(1)})
    cursors.announce("ada", 3, at(4))
    cursors.announce("bo", 3, at(5))
    assert cursors.committed == {"ada": at(1)}
    cursors.commit(2)
    assert cursors.committed == {"ada": at(1)}
    cursors.commit(3)
    assert cursors.committed == {"ada": at(4), "bo": at(5)}


def test_windows_that_were_announced_ahead_wait_for_their_turn() -> None:
    cursors = Cursors({})
    for window in range(3):
        cursors.announce("ada", window, at(10 + window))
    cursors.commit(1)
    assert cursors.committed == {"ada": at(11)}
    cursors.commit(2)
    assert cursors.committed == {"ada": at(12)}


def test_whoever_is_gone_announces_again_what_nobody_trained() -> None:
    cursors = Cursors({"ada": at(1)})
    cursors.announce("ada", 0, at(2))
    cursors.announce("bo", 0, at(3))
    cursors.forget("ada")
    cursors.forget("nobody")
    cursors.commit(0)
    assert cursors.committed == {"ada": at(1), "bo": at(3)}


def test_what_is_trained_of_a_lost_client_is_not_announced_again() -> None:
    cursors = Cursors({"ada": at(1)})
    cursors.announce("ada", 4, at(2))
    cursors.announce("ada", 5, at(3))
    cursors.forget("ada", counts=4)
    cursors.commit(5)
    assert cursors.committed == {"ada": at(2)}
    cursors.forget("ada", counts=6)
    cursors.commit(6)
    assert cursors.committed == {"ada": at(2)}


def test_a_roll_back_forgets_what_was_announced() -> None:
    cursors = Cursors({"ada": at(1)})
    cursors.announce("ada", 0, at(2))
    cursors.roll_back()
    cursors.commit(0)
    assert cursors.committed == {"ada": at(1)}
    cursors.announce("ada", 0, at(2))
    cursors.roll_back({"bo": at(9)})
    cursors.commit(5)
    assert cursors.committed == {"bo": at(9)}, "those of the checkpoint, and no others"


def test_what_is_read_is_a_copy() -> None:
    given_to_it = {"ada": at(1)}
    cursors = Cursors(given_to_it)
    cursors.committed["ada"] = at(7)
    given_to_it["ada"] = at(8)
    assert cursors.committed == {"ada": at(1)}


@given(data=st.data())
def test_any_course_of_windows(data: st.DataObject) -> None:
    """Compared with the plain definition: the cursor after a client's last trained window."""
    cursors = Cursors({})
    expected: dict[str, Cursor] = {}
    announced: list[tuple[str, int, Cursor]] = []
    trained = 0
    for step in range(data.draw(st.integers(1, 30))):
        client, window = data.draw(st.sampled_from(["ada", "bo"])), trained + data.draw(st.integers(0, 2))
        match data.draw(st.sampled_from(["announce", "announce", "commit", "forget", "roll back"])):
            case "announce":
                announced = [entry for entry in announced if entry[:2] != (client, window)]
                announced.append((client, window, at(step)))
                cursors.announce(client, window, at(step))
            case "commit":
                for name, _, cursor in sorted((e for e in announced if e[1] <= window), key=lambda entry: entry[1]):
                    expected[name] = cursor
                announced = [entry for entry in announced if entry[1] > window]
                cursors.commit(window)
                trained = window + 1
            case "forget":
                announced = [entry for entry in announced if entry[0] != client]
                cursors.forget(client)
            case _:
                announced = []
                cursors.roll_back()
        assert cursors.committed == expected
