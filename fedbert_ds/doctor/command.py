"""`fedbert-ds doctor`: prints findings as they come; exit code 1 if one is in the way."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fedbert_ds.errors import ConfigError, UserError

if TYPE_CHECKING:
    from fedbert_ds.client.session import ClientOptions
    from fedbert_ds.doctor.finding import Finding


def run_doctor(options: argparse.Namespace, client: Callable[[argparse.Namespace], ClientOptions]) -> None:
    """Examine the run file, or the client, that the options name; SystemExit(1) for a fault.

    `client` makes a client's options of the parsed ones. Raises ConfigError for options of neither.
    """
    if (options.run_file is None) == (options.server is None):
        raise ConfigError("doctor looks at one side; give a run file at the server, or --server HOST:PORT at a client")
    findings = _run(options) if options.server is None else _owner(options, client)
    raise SystemExit(1 if told(findings) else 0)


def told(findings: Iterable[Finding]) -> int:
    """Print each finding at once, and a last line; returns how many are in the way."""
    faults = 0
    for finding in findings:
        print(finding.line, flush=True)
        faults += finding.is_in_the_way
    print(f"{faults} of these would stop the run" if faults else "nothing here would stop the run", flush=True)
    return faults


def _run(options: argparse.Namespace) -> Iterable[Finding]:
    from fedbert_ds.doctor.finding import of_error
    from fedbert_ds.doctor.run import examine_run
    from fedbert_ds.run_file import load_config

    if options.ranks is not None and options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks}: at least 1")
    try:
        config = load_config(options.run_file, options.overrides)
    except UserError as error:
        return [of_error("run file", error)]
    return examine_run(config, options.ranks)


def _owner(options: argparse.Namespace, client: Callable[[argparse.Namespace], ClientOptions]) -> Iterable[Finding]:
    from fedbert_ds.doctor.owner import Owner, examine_owner
    from fedbert_ds.wire.tls import TlsFiles

    files = (options.ca, options.certificate, options.key)
    if any(files) and not all(files):
        raise ConfigError("mutual TLS needs three files; give all of --ca, --certificate and --key")
    owner = Owner(
        server=options.server,
        data=tuple(options.data),
        tls=TlsFiles(*files) if all(files) else None,
        state_folder=options.state or Path.cwd(),
        task=options.task,
        text_column=options.text_columns[0] if options.text_columns else None,
        encoding=options.encoding,
    )
    return examine_owner(owner, lambda: client(options))
