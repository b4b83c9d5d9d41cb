"""A run file as text, in which a comment explains every value: what the key is, and why this value.

What a key is, `config.py` says; nothing is written twice.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from fedbert_ds.config import RunConfig

COLUMNS = 100


def run_file(tree: Mapping[str, Any], reasons: Mapping[str, str], heading: Sequence[str]) -> str:
    """The text of a run file with these values.

    `reasons` are by `section.key`; `heading` are sentences about the whole.
    """
    lines = [comment for sentence in heading for comment in _comment(sentence, "")]
    in_order = {key: tree[key] for key in RunConfig.model_fields if key in tree}
    lines += _section(RunConfig, in_order, reasons, "", "")
    return "\n".join(lines) + "\n"


def _section(
    kind: type[BaseModel], values: Mapping[str, Any], reasons: Mapping[str, str], path: str, indent: str
) -> Iterator[str]:
    for key, value in values.items():
        name = f"{path}{key}"
        below = _section_of(kind, key)
        if below is not None and isinstance(value, Mapping):
            if not indent:
                yield ""
            yield from _comment(_said_of(below), indent)
            yield f"{indent}{key}:"
            yield from _section(below, value, reasons, f"{name}.", f"{indent}  ")
            continue
        if not indent:
            yield ""
        yield from _comment(kind.model_fields[key].description or "", indent)
        if name in reasons:
            yield from _comment(f"{reasons[name]}.", indent)
        yield textwrap.indent(_yaml(key, value), indent)


def _section_of(kind: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The type of a key that is a section, may it be null or not. A cut is one value."""
    annotation = kind.model_fields[key].annotation
    kinds = [one for one in get_args(annotation) or (annotation,) if one is not type(None)]
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel) else None


def _said_of(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").partition("\n\n")[0]


def _comment(text: str, indent: str) -> list[str]:
    width = COLUMNS - len(indent) - 2
    return [f"{indent}# {line}" for line in textwrap.wrap(" ".join(text.split()), width, break_long_words=False)]


def _yaml(key: str, value: Any) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"{key}: {written.removesuffix('...' + chr(10)).strip()}"
