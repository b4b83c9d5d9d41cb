"""HOST:PORT: brackets around IPv6, mistakes named, own addresses known."""

from __future__ import annotations

import pytest

from fedbert_ds.wire.host_port import host_port, is_every_interface, is_this_machine, parted


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("gpu01", "gpu01:5"),
        ("10.0.0.7", "10.0.0.7:5"),
        ("::1", "[::1]:5"),
        ("[::1]", "[::1]:5"),
        ("fe80::1%eth0", "[fe80::1%eth0]:5"),
    ],
)
def test_an_address_comes_apart_as_it_was_put_together(host: str, address: str) -> None:
    assert host_port(host, 5) == address
    assert parted(address) == (host.strip("[]"), 5)


@pytest.mark.parametrize(
    ("address", "what_to_change"),
    [
        ("http://gpu01:29600", "leave out what stands before the host"),
        ("https://gpu01", "leave out what stands before the host"),
        ("gpu01", "add the port"),
        ("gpu01:", "add the port"),
        (":29600", "add the port"),
        ("[]:29600", "add the port"),
        ("", "add the port"),
        ("::1", "in brackets"),
        ("2001:db8::1:29600", "in brackets"),
        ("[::1]", "in brackets"),
        ("gpu01:http", "the port is a number from 1 to 65535, not http"),
        ("gpu01:0", "from 1 to 65535, not 0"),
        ("gpu01:65536", "from 1 to 65535"),
        ("gpu01:²", "from 1 to 65535"),
    ],
)
def test_what_is_no_address_says_what_to_change(address: str, what_to_change: str) -> None:
    with pytest.raises(ValueError, match=what_to_change):
        parted(address)


def test_every_interface_of_either_family() -> None:
    assert all(map(is_every_interface, ("0.0.0.0", "::", "[::]", "0:0:0:0:0:0:0:0")))
    assert not any(map(is_every_interface, ("127.0.0.1", "::1", "gpu01", "")))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("192.0.2.1:1", False),
        ("no.such.:1", False),
        ("a" * 70 + ":1", False),
    ],
)
def test_own_addresses(address: str, expected: bool) -> None:
    assert is_this_machine(address) is expected
