"""Prose of an HTML page, by the standard library's parser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_SKIPPED = frozenset({"script", "style", "head", "nav", "svg"})
_BREAKS = frozenset({"p", "div", "li", "dt", "dd", "tr", "pre", "br", "h1", "h2", "h3", "h4", "h5", "h6", "table"})
_SPACES, _LINES = re.compile(r"[ \t\r\f\v]+"), re.compile(r"\s*\n\s*")


def text_of_html(page: str) -> str:
    """The page's text, a line for each block; scripts, styles and navigation are left out."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return _LINES.sub("\n", _SPACES.sub(" ", "".join(parser.parts))).strip()


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipped += tag in _SKIPPED
        if tag in _BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipped = max(0, self._skipped - (tag in _SKIPPED))
        if tag in _BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data)
