"""The options of every `fedbert-ds certs NAME`, and what each does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedbert_ds.errors import ConfigError
from fedbert_ds.user_path import user_path

if TYPE_CHECKING:
    from fedbert_ds.certificates.authority import Authority

Subcommands = argparse._SubParsersAction

DAYS = 365
AUTHORITY_DAYS = 3650
MOST_DAYS = 36500


def add_certs(subcommands: Subcommands[argparse.ArgumentParser]) -> None:
    """Add `certs` and its steps to the command line."""
    parser = subcommands.add_parser("certs", help="an authority and the certificates of mutual TLS")
    steps = parser.add_subparsers(dest="certs", required=True, metavar="STEP")

    authority = _step(steps, "ca", "make the authority that signs all others", _authority, AUTHORITY_DAYS)
    authority.add_argument("--name", default="FedBERT-DS authority", metavar="NAME", help="in its certificate")

    for kind, run in (("server", _server), ("aggregator", _aggregator)):
        step = _step(steps, kind, f"make the key and certificate of the {kind}", run, DAYS)
        step.add_argument("name", metavar="HOST", help="the host name that others dial; its files have that name")
        step.add_argument("hosts", nargs="*", metavar="HOST", help="more names and addresses, of every node")

    client = _step(steps, "client", "make the key and certificate of a client", _client, DAYS)
    client.add_argument("name", metavar="NAME", help="its name in every run")

    request = _step(steps, "request", "at a client: make a key that stays there, and a request to sign", _request)
    request.add_argument("name", metavar="NAME", help="its name in every run")

    sign = _step(steps, "sign", "at the authority: sign a client's request", _sign, DAYS)
    sign.add_argument("request", type=user_path, metavar="FILE.csr", help="of certs request")

    renew = _step(steps, "renew", "sign the same key for more days", _renew, DAYS)
    renew.add_argument("names", nargs="+", metavar="NAME", help="as certs list has them; ca is the authority")

    revoke = _step(steps, "revoke", "let every certificate of a name count no longer", _revoke)
    revoke.add_argument("names", nargs="+", metavar="NAME", help="as certs list has them")

    _step(steps, "list", "who has a certificate, and until when", _list)


def _step(
    steps: Subcommands[argparse.ArgumentParser],
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], None],
    days: int | None = None,
) -> argparse.ArgumentParser:
    step = steps.add_parser(name, help=summary)
    step.add_argument("--dir", type=user_path, default=Path("certs"), metavar="DIR", help="the folder (default: certs)")
    if days is not None:
        step.add_argument("--days", type=int, default=days, metavar="N", help=f"how long it counts (default: {days})")
    step.set_defaults(run=run)
    return step


def _authority(options: argparse.Namespace) -> None:
    _tell(_open(options).create(options.name, options.days), "the authority: every party needs this file, no other")


def _server(options: argparse.Namespace) -> None:
    file = _open(options).issue(options.name, options.days, options.hosts)
    _tell(file, f"with {file.with_suffix('.key').name} beside it: server.tls of the run file")


def _aggregator(options: argparse.Namespace) -> None:
    file = _open(options).issue(options.name, options.days, options.hosts)
    _tell(file, f"with {file.with_suffix('.key').name} beside it: aggregator.tls of that party's run file")


def _client(options: argparse.Namespace) -> None:
    file = _open(options).issue(options.name, options.days)
    _tell(file, f"with {file.with_suffix('.key').name} beside it: give both to {options.name} alone, over a safe way")


def _request(options: argparse.Namespace) -> None:
    _authority_module()
    from fedbert_ds.certificates.authority import make_request

    _tell(make_request(options.dir, options.name), "to be signed by the authority (certs sign); the key stays here")


def _sign(options: argparse.Namespace) -> None:
    file = _open(options).sign_request(options.request, options.days)
    _tell(file, f"for the owner of {options.request.name}, with the authority's certificate")


def _renew(options: argparse.Namespace) -> None:
    authority = _open(options)
    for name in options.names:
        _tell(authority.renew(name, options.days), "the same key for longer: give this file to its owner")


def _revoke(options: argparse.Namespace) -> None:
    authority = _open(options)
    for name in options.names:
        count = authority.revoke(name)
        print(f"revoked {count} certificate{'s' if count > 1 else ''} of {name}")
    print(f"{authority.revocation_list}   give servers and aggregators this file: tls.revoked of their run files")


def _list(options: argparse.Namespace) -> None:
    from fedbert_ds.telemetry.tables import markdown

    authority = _open(options)
    rows = [
        [one.name, one.kind, f"{one.expires:%Y-%m-%d}", authority.standing(one), " ".join(one.hosts)]
        for one in authority.issued()
    ]
    print(markdown(["name", "kind", "until", "standing", "hosts"], rows, words=5))


def _tell(file: Path, what: str) -> None:
    print(f"{file}   {what}")


def _open(options: argparse.Namespace) -> Authority:
    if not 0 < getattr(options, "days", DAYS) <= MOST_DAYS:
        raise ConfigError(f"--days {options.days}: a number from 1 to {MOST_DAYS}")
    _authority_module()
    from fedbert_ds.certificates.authority import Authority

    return Authority(options.dir)


def _authority_module() -> None:
    """ConfigError without the package that this command alone needs."""
    try:
        import cryptography.x509  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "fedbert-ds certs needs the package cryptography; install fedbert-ds[certs], or that package"
        ) from error
