"""What would stop a client at its owner's machine: what is light first, then what the run asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedbert_ds.doctor.certificates import certificate_findings
from fedbert_ds.doctor.finding import Finding, fault, of_error, ok
from fedbert_ds.doctor.machine import folder_finding
from fedbert_ds.doctor.network import name_finding, proxy_finding, reach_finding
from fedbert_ds.doctor.text import sampled, unknown_findings
from fedbert_ds.doctor.versions import version_findings
from fedbert_ds.errors import UserError
from fedbert_ds.wire.address_file import look_up
from fedbert_ds.wire.host_port import parted
from fedbert_ds.wire.tls import TlsFiles, tls_fault

if TYPE_CHECKING:
    from fedbert_ds.client.session import ClientOptions
    from fedbert_ds.data.corpus import Article

MASKED_LM = "masked_lm"


@dataclass(frozen=True)
class Owner:
    """What is checked, as the client's options say."""

    server: str
    data: tuple[str, ...]
    tls: TlsFiles | None
    state_folder: Path
    task: str = MASKED_LM
    text_column: str | None = None
    encoding: str | None = None


def examine_owner(owner: Owner, options: Callable[[], ClientOptions]) -> Iterator[Finding]:
    """Findings about a client. `options` makes those of the client itself; it imports torch, and is
    called only if a server answers.
    """
    yield from version_findings()
    own = list(certificate_findings(owner.tls)) if owner.tls is not None else []
    yield from own
    yield folder_finding("state folder", owner.state_folder, "--state")
    articles: list[Article] = []
    if owner.data and owner.task == MASKED_LM:
        findings, articles = _text(owner)
        yield from findings
    way = list(_way(owner.server))
    yield from way
    if any(finding.is_in_the_way for finding in own + way):
        return
    link = _link(look_up(owner.server), owner.tls)
    yield from link
    if not any(finding.is_in_the_way for finding in link):
        yield from _asked(options, articles)


def _text(owner: Owner) -> tuple[list[Finding], list[Article]]:
    from fedbert_ds.data.corpus import Reading
    from fedbert_ds.data.text_files import Encodings

    return sampled(owner.data, Reading(owner.text_column, Encodings(owner.encoding)))


def _way(server: str) -> Iterator[Finding]:
    """From here to the server; ends with the first fault."""
    try:
        address = look_up(server)
        host, _ = parted(address)
    except UserError as error:
        yield of_error("server", error)
        return
    except ValueError as error:
        yield fault("server", f"{server}: {error}", "give --server HOST:PORT")
        return
    proxy = proxy_finding(address)
    yield proxy
    if proxy.level == "ok":
        # A proxy looks names up itself.
        name = name_finding(host, "--server", for_others=False)
        yield name
        if name.is_in_the_way:
            return
    yield reach_finding(address)


def _link(address: str, tls: TlsFiles | None) -> list[Finding]:
    """Whether the two sides take each other's certificates, and what that tells of the clocks."""
    wrong = tls_fault(address, tls)
    if wrong is not None:
        says, _, remedy = wrong.partition("; ")
        return [fault("TLS", f"{address}: {says}", remedy)]
    if tls is None:
        return [ok("clock", "cannot be told without TLS")]
    return [
        ok("TLS", f"{address} and this side take each other's certificates"),
        ok("clock", "the server's certificate counts by it; more cannot be told"),
    ]


def _asked(options: Callable[[], ClientOptions], articles: list[Article]) -> Iterator[Finding]:
    """What the run asks for, and whether its tokenizer reads the text."""
    try:
        client = options()
        from fedbert_ds.client.session import look_at_run
        from fedbert_ds.data.tokenizer import tokenizer_from_bytes

        welcome, asked = look_at_run(client)
        tokenizer = tokenizer_from_bytes(welcome.tokenizer)
    except UserError as error:
        yield of_error("run", error)
        return
    yield ok("run", f"it would take {client.name}, for {asked.settings.windows:,} windows")
    yield ok(
        "memory",
        f"{asked.least_memory / 1e9:.2f} GB at the least and your text, of {client.limits.max_memory / 1e9:.1f} GB",
    )
    if articles:
        yield from unknown_findings(articles, tokenizer)
