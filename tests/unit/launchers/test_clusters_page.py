"""The commands on the page on clusters are those that tests run, but for sizes."""

from __future__ import annotations

import pytest
from integration.page_commands import Page

RUN_BY_TEST_CLUSTERS = {"Before the first run": 2, "DeepSpeed": 2, "torchrun": 1, "The clients": 1}
RUN_BY_SLURM_CLUSTER = {"Before the first run": 2, "SLURM": 1}


def test_every_block_of_the_page_is_run() -> None:
    """A new block needs a test that runs it, then a number here."""
    page = Page("docs/clusters.md", {})
    assert page.sections_with_blocks() == RUN_BY_TEST_CLUSTERS | RUN_BY_SLURM_CLUSTER


def test_a_test_replaces_only_what_the_page_says() -> None:
    assert Page("docs/clusters.md", {"slots=8": "slots=1"}).block("DeepSpeed").splitlines() == [
        "gpu01 slots=1",
        "gpu02 slots=1",
    ]
    with pytest.raises(AssertionError, match="does not say 'slots=9'"):
        Page("docs/clusters.md", {"slots=9": "slots=1"})
