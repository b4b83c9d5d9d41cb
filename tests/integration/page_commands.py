"""The commands of a page, for tests that run them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Page:
    """A page's blocks of code.

    `replaced` is what a test has otherwise than the page, by the page's words. A word that the page
    does not have is an AssertionError: the page and its test would differ unseen.
    """

    def __init__(self, page: str, replaced: Mapping[str, str]) -> None:
        text = (ROOT / page).read_text(encoding="utf-8")
        for there, here in replaced.items():
            assert there in text, f"{page} does not say {there!r}"
            text = text.replace(there, here)
        self._blocks: dict[str, list[str]] = {}
        for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
            blocks = re.findall(r"^```\w*\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
            self._blocks[section.partition("\n")[0]] = blocks

    def block(self, section: str, number: int = 0) -> str:
        """A block of the section with this heading."""
        return self._blocks[section][number]

    def sections_with_blocks(self) -> dict[str, int]:
        """How many blocks each section has, by heading; those without are left out."""
        return {section: len(blocks) for section, blocks in self._blocks.items() if blocks}
