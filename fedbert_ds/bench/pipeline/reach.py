"""How clients reach their server: directly, through a proxy, or out of a network namespace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedbert_ds.bench.network.link import DelayProxy, through
from fedbert_ds.bench.network.namespace import Namespace
from fedbert_ds.bench.pipeline.settings import Link, PipelineOptions

HERE = "127.0.0.1"


@dataclass(frozen=True)
class Reach:
    """What server and clients must be given so that the link lies between them."""

    host: str = HERE
    """Where the server listens."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of the clients' process."""
    enter: tuple[str, ...] = ()
    """Before the clients' command."""


@contextmanager
def reach(link: Link, options: PipelineOptions) -> Iterator[Reach]:
    """Lay a link, as long as the block lasts."""
    if link == Link():
        yield Reach()
    elif options.links == "netem":
        # One link for the process that all clients are in, as wide as all of theirs.
        with Namespace(link.rtt_ms / 2, link.mbit and link.mbit * options.clients) as there:
            yield Reach(there.host, enter=there.enter)
    else:
        with DelayProxy(delay_ms=link.rtt_ms / 2, mbit=link.mbit) as address:
            yield Reach(environment=through(address))
