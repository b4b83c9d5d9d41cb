"""Rows as `bench pipeline` records them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def row() -> Callable[..., dict[str, Any]]:
    """Makes a row of a system that reached this speed over a link."""

    def make(system: str, speed: float, rtt: float = 50.0, **more: Any) -> dict[str, Any]:
        return {
            "system": system,
            "variant": "",
            "rtt_ms": rtt,
            "mbit": 100.0,
            "utilization": 0.9,
            "utilization_bound": 0.95,
            "tokens_per_second": speed,
            "bytes_per_token_up": 100.0,
            "bytes_per_token_down": 120.0,
            "dummy_share": 0.0,
        } | more

    return make
