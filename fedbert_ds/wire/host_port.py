"""Addresses as HOST:PORT, IPv6 in brackets, and whether they are this machine's."""

from __future__ import annotations

import ipaddress
import socket


def host_port(host: str, port: int) -> str:
    """The address of a host's port, with brackets around IPv6."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def parted(address: str) -> tuple[str, int]:
    """Host, without brackets, and port. ValueError with what the user should change."""
    if "://" in address:
        raise ValueError("leave out what stands before the host: HOST:PORT alone")
    host, _, port = address.rpartition(":")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("an IPv6 address stands in brackets before its port: [::1]:29600")
    if not host.strip("[]") or not port:
        raise ValueError("is no HOST:PORT; add the port: HOST:29600")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"the port is a number from 1 to 65535, not {port}")
    return host.strip("[]"), int(port)


def is_every_interface(host: str) -> bool:
    """Whether a server on this host listens at all addresses of its machine: 0.0.0.0 or ::."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def is_this_machine(address: str) -> bool:
    """Whether host:port is an address of this machine. A name is looked up."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    return any(_is_own(family, where) for family, _, _, _, where in found)


def _is_own(family: int, where: tuple[object, ...]) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(where)  # fails for an address of another machine
            return True
    except OSError:
        return False
