"""Links by the kernel: what is asked of `ip` and `tc`, that nothing stays behind, and where it can
be, a round trip."""

from __future__ import annotations

import subprocess

import pytest

from fedbert_ds.bench.network import namespace
from fedbert_ds.bench.network.namespace import Namespace, links_available


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    monkeypatch.setattr(namespace, "run_tool", lambda *command: made.append(" ".join(command)))
    return made


def test_both_ends_are_delayed_and_limited(commands: list[str]) -> None:
    with Namespace(delay_ms=25, mbit=800) as there:
        assert there.enter[:3] == ("ip", "netns", "exec") and there.host.startswith("10.233.")
        links = [command for command in commands if "netem" in command]
        assert len(links) == 2 and sum(command.startswith("ip netns exec") for command in links) == 1
        assert all("delay 25ms" in command and "rate 800mbit" in command for command in links)
    assert commands[-1] == f"ip netns delete {there.enter[3]}"


def test_no_rate_is_no_limit(commands: list[str]) -> None:
    with Namespace(delay_ms=100, mbit=None):
        assert not any("rate" in command for command in commands)


def test_a_link_that_cannot_be_made_leaves_no_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fails(*command: str) -> None:
        made.append(" ".join(command))
        if "netem" in command:
            raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(namespace, "run_tool", fails)
    with pytest.raises(subprocess.CalledProcessError), Namespace(delay_ms=1, mbit=1):
        pass
    assert made[-1].startswith("ip netns delete")


@pytest.mark.skipif(links_available() != "netem", reason="needs root and a kernel with netem")
def test_a_round_trip_takes_twice_the_delay() -> None:
    with Namespace(delay_ms=20, mbit=None) as there:
        ping = subprocess.run([*there.enter, "ping", "-c", "3", there.host], capture_output=True, text=True, check=True)
    assert 40.0 <= float(ping.stdout.rsplit("= ", 1)[1].split("/")[0]) < 60.0


def test_it_says_which_links_there_are() -> None:
    assert links_available() in ("netem", "proxy")
