"""Which HTTP proxy leads to a server, by the environment, and what is wrong with it.

gRPC by itself reads `grpc_proxy`, `https_proxy` and `http_proxy` in small letters only, uses them
for the machine's own addresses too, and tells nothing of a proxy that fails. So it is told here
which one to use.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from fedbert_ds.errors import one_line
from fedbert_ds.wire.host_port import host_port, is_this_machine, parted

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
"""The first that is set counts; an empty one means no proxy. Capitals count, too."""
EXCEPTIONS = ("no_grpc_proxy", "no_proxy")

LONGEST_ANSWER = 1 << 16
"""Bytes of a proxy's answer that are read."""
UNAVAILABLE = range(500, 600)
"""A proxy's answers that another try may change: it did not reach the server."""


@dataclass(frozen=True)
class Proxy:
    """A proxy that passes connections on by HTTP's CONNECT."""

    variable: str
    """Of the environment, which names it."""
    host: str
    port: int
    user: str = field(default="", repr=False)
    """`name:password` as in the variable, percent-encoded; empty without."""

    @property
    def url(self) -> str:
        """As gRPC reads it."""
        return f"http://{self.user}{'@' if self.user else ''}{host_port(self.host, self.port)}"

    def __str__(self) -> str:
        """For messages: without the password."""
        return f"the proxy {host_port(self.host, self.port)} ({self.variable})"


class ProxyRefused(OSError):
    """The proxy does not connect to the server, and another try will not change it."""


def proxy_of(address: str, environment: Mapping[str, str] | None = None) -> Proxy | None:
    """The proxy between this machine and the server at host:port.

    None for an address of this machine, for one that `no_proxy` names, and where the variable
    names a proxy of a kind that gRPC does not speak to.
    """
    environment = os.environ if environment is None else environment
    variable, value = _first(VARIABLES, environment)
    if not value or address.startswith("unix:"):
        return None
    parts = urlsplit(value if "://" in value else f"http://{value}")
    try:
        port = parts.port or 80
        host, _ = parted(address)
    except ValueError:
        return None
    if parts.scheme != "http" or not parts.hostname or is_this_machine(address) or _is_excepted(host, environment):
        return None
    return Proxy(variable, parts.hostname, port, parts.netloc.rpartition("@")[0])


def proxy_options(address: str) -> list[tuple[str, Any]]:
    """Options of a channel to host:port: the proxy, or none."""
    proxy = proxy_of(address)
    return [("grpc.enable_http_proxy", 0)] if proxy is None else [("grpc.http_proxy", proxy.url)]


def dial(address: str, seconds: float) -> socket.socket:
    """A connection to host:port, through the proxy if there is one. OSError says what failed, in a
    sentence where it is the proxy; ProxyRefused where it will not. ValueError for no address.
    """
    host, port = parted(address)
    proxy = proxy_of(address)
    if proxy is None:
        return socket.create_connection((host, port), timeout=seconds)
    try:
        line = socket.create_connection((proxy.host, proxy.port), timeout=seconds)
    except OSError as error:
        raise OSError(f"{proxy} cannot be reached: {error.strerror or error}; mend or unset {proxy.variable}") from None
    try:
        _ask_through(line, proxy, address)
    except BaseException:
        line.close()
        raise
    return line


def proxy_note(address: str, seconds: float = 5.0) -> str:
    """What to add to the news that nobody answers at host:port: the proxy on the way and what it
    does wrong; empty without one.
    """
    proxy = proxy_of(address)
    if proxy is None:
        return _note_of_another_kind(address)
    try:
        dial(address, seconds).close()
    except OSError as error:
        return f"; {error}"
    return f"; {proxy} is on the way"


def _note_of_another_kind(address: str) -> str:
    variable, value = _first(VARIABLES, os.environ)
    if not value or value.startswith("http://") or "://" not in value or is_this_machine(address):
        return ""
    return f"; {variable} names a proxy of another kind than http://, and none is used"


def _ask_through(line: socket.socket, proxy: Proxy, address: str) -> None:
    shown = ""
    if proxy.user:
        shown = f"Proxy-Authorization: Basic {base64.b64encode(unquote(proxy.user).encode()).decode()}\r\n"
    line.sendall(f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{shown}\r\n".encode())
    answer = b""
    try:
        while b"\r\n\r\n" not in answer and len(answer) < LONGEST_ANSWER and (more := line.recv(4096)):
            answer += more
    except OSError as error:
        raise OSError(f"{proxy} does not answer: {error.strerror or error}; mend or unset {proxy.variable}") from None
    status = answer.partition(b"\r\n")[0].decode(errors="replace")
    version, _, result = status.partition(" ")
    code = result[:3]
    if not version.startswith("HTTP/") or not code.isdecimal():
        raise OSError(f"{proxy} does not speak HTTP; mend or unset {proxy.variable}")
    if code.startswith("2"):
        return
    sentence = f"{proxy} answers {one_line(result)[:80]!r}"
    host, _ = parted(address)
    if int(code) in UNAVAILABLE:
        raise OSError(f"{sentence}: it does not reach the server; if it need not be asked, add {host} to no_proxy")
    raise ProxyRefused(
        f"{sentence}; have it let this machine through to {address}, or add {host} to no_proxy if it need not be asked"
    )


def _first(names: tuple[str, ...], environment: Mapping[str, str]) -> tuple[str, str]:
    """The first of these variables that is set, in small letters or capitals."""
    for name in names:
        for spelt in (name, name.upper()):
            if spelt in environment:
                return spelt, environment[spelt].strip()
    return "", ""


def _is_excepted(host: str, environment: Mapping[str, str]) -> bool:
    """As gRPC reads the list: ends of names, and networks; and `*`, which is every host."""
    for entry in _first(EXCEPTIONS, environment)[1].split(","):
        entry = entry.strip()
        if entry and (entry == "*" or host.lower().endswith(entry.lower().lstrip("*")) or _is_in(host, entry)):
            return True
    return False


def _is_in(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
