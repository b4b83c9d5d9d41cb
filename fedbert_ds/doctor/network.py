"""Names, ports, proxies and what answers at an address."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping

from fedbert_ds.doctor.finding import Finding, fault, ok, warning
from fedbert_ds.wire.channel import is_loopback
from fedbert_ds.wire.host_port import host_port
from fedbert_ds.wire.http_proxy import VARIABLES, dial, proxy_of

SECONDS = 10.0
"""For a connection to be made."""


def name_finding(host: str, key: str, for_others: bool) -> Finding:
    """Whether a host's name leads somewhere; to another machine's owner, not to this machine alone.

    `key` names another host.
    """
    try:
        found = {
            str(where[0]) for _, _, _, _, where in socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
        }
    except (OSError, UnicodeError):
        return fault(
            "name", f"{host} cannot be looked up on this machine", f"mend {key}, the name server, or /etc/hosts"
        )
    says = f"{host} is {', '.join(sorted(found))}"
    if for_others and all(map(is_loopback, found)):
        remedy = f"see that it is this machine's address at the owners, or change {key}"
        return warning("name", f"{says} on this machine, which nobody else reaches", remedy)
    return ok("name", says)


def port_finding(host: str, port: int) -> Finding:
    """Whether a server could listen there, now."""
    if port == 0:
        return ok("port", "any free one: for clients of this machine")
    where = host_port(host, port)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listening:
            # What a run that has just ended leaves behind is no hindrance.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(1)
    except (socket.gaierror, UnicodeError):
        return fault(
            "port", f"{where}: there is no such address", "mend server.host; 0.0.0.0 is every one of this machine"
        )
    except OSError as error:
        remedy = {
            errno.EADDRINUSE: "end what listens there, or set another server.port",
            errno.EADDRNOTAVAIL: "set server.host to an address of this machine, or 0.0.0.0",
            errno.EACCES: "set a server.port above 1023",
        }.get(error.errno or 0, "set another server.host or server.port")
        return fault("port", f"{where} cannot be listened on: {(error.strerror or str(error)).lower()}", remedy)
    return ok("port", f"{where} is free")


def proxy_finding(address: str | None, environment: Mapping[str, str] | None = None) -> Finding:
    """Which proxy variables there are, and whether one counts for the server at `address`. What a
    variable holds is not told: it may be a password.
    """
    environment = os.environ if environment is None else environment
    told = [name for small in VARIABLES for name in (small, small.upper()) if environment.get(name)]
    if not told:
        return ok("proxy", "no variable names one")
    names = ", ".join(told)
    proxy = proxy_of(address, environment) if address is not None else None
    if proxy is None:
        return ok("proxy", f"{names} {'is' if len(told) == 1 else 'are'} set; this connection goes without")
    host = (address or "").rpartition(":")[0]
    return warning("proxy", f"the way to {address} is {proxy}", f"if it need not be, add {host} to no_proxy")


def reach_finding(address: str) -> Finding:
    """Whether something takes a connection at host:port, through the proxy if there is one."""
    try:
        dial(address, SECONDS).close()
    except TimeoutError:
        return fault("server", f"{address} does not answer", "check the address, and firewalls between here and there")
    except ConnectionRefusedError:
        return fault("server", f"nobody listens at {address}", "check the port, and that the server has started")
    except (OSError, ValueError) as error:
        says, _, remedy = (getattr(error, "strerror", None) or str(error)).partition("; ")
        return fault("server", f"{address} is not reached: {says}", remedy or "check the address")
    return ok("server", f"{address} takes connections")
