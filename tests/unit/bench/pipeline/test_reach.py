"""How clients reach a server with and without a link."""

from __future__ import annotations

from pathlib import Path

from fedbert_ds.bench.pipeline.reach import reach
from fedbert_ds.bench.pipeline.settings import Link, PipelineOptions

OPTIONS = PipelineOptions(Path("out.json"), "", links="proxy")


def test_without_a_link_they_connect_directly() -> None:
    with reach(Link(), OPTIONS) as way:
        assert way.host == "127.0.0.1" and not way.environment and not way.enter


def test_a_proxy_is_told_by_the_environment() -> None:
    with reach(Link(10.0), OPTIONS) as way:
        assert way.host == "127.0.0.1" and way.environment["http_proxy"].startswith("http://127.0.0.1:")
