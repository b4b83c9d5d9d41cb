"""Markdown tables, as benchmarks print them and pages of reading show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table of these rows; the first `words` columns align left, the others right."""
    rules = ["---"] * words + ["--:"] * (len(heads) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows))
