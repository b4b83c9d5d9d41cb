"""A run file read: YAML, the file that it is based on, overrides; what is wrong in one line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import ConfigError

RENAMED = {"window.staleness": "federation.staleness", "wire.halves": "wire.updates"}
"""Keys of older run files."""


class _Yaml(yaml.SafeLoader):
    """YAML without dates, and with whole numbers only as they are counted: run.directory=2024-01-01
    names a folder, and so do 007 and 12:30. A key that stands twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's, which takes the last of equal keys and says nothing."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_INT = "tag:yaml.org,2002:int"
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(_INT, re.compile(r"-?(?:0|[1-9][0-9]*)$"), list("-0123456789"))


def _is_ipv6(text: str) -> bool:
    """Whether it looks like an IPv6 address: YAML would make a mapping or a list of some."""
    return re.fullmatch(r"\[?[0-9a-fA-F.]*:[0-9a-fA-F:.]*\]?", text) is not None


def load_config(path: Path, overrides: Sequence[str] = (), needs_body: bool = True) -> RunConfig:
    """Read a YAML run file and apply `section.key=value` overrides (values are YAML).

    A file with `base: OTHER.yaml`, relative to it, has that file's keys where it has none. A
    relative body.deepspeed is looked up in the run file's folder first, then in the working
    folder; it must exist unless `needs_body` is False. Raises ConfigError, one line, for
    a missing file, bad YAML, an unknown key or a bad value.
    """
    tree = _read(path, ())
    for override in overrides:
        _apply(tree, override)
    config = parse_config(tree, origin=str(path))
    deepspeed = config.body.deepspeed
    if deepspeed is not None and not deepspeed.is_absolute() and (path.parent / deepspeed).is_file():
        body = config.body.model_copy(update={"deepspeed": (path.parent / deepspeed).resolve()})
        config = config.model_copy(update={"body": body})
    deepspeed = config.body.deepspeed
    if needs_body and config.cut != "whole" and deepspeed is not None and not deepspeed.is_file():
        raise ConfigError(f"{path}: body.deepspeed: no such file {deepspeed}; name a file of DeepSpeed settings")
    return config


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping of a file and its bases; `above` are the files that it is a base of."""
    if not path.is_file():
        reader = f"{above[-1]}: base: " if above else ""
        raise ConfigError(f"{reader}{path}: no such run file; give {'one' if above else 'one with --config'}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Yaml) or {}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8; save it as UTF-8") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML; mend this place: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a run file is a mapping of sections; write `section:`, and its keys below")
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is the name of another run file; give one name")
    if path.resolve() in (one.resolve() for one in above):
        raise ConfigError(f"{path}: is its own base; remove one of the keys `base`")
    under = _read(path.parent / base, (*above, path))
    deepspeed = _section(under, "body").get("deepspeed")
    if isinstance(deepspeed, str) and ((path.parent / base).parent / deepspeed).is_file():
        # Beside the file that names it.
        under["body"]["deepspeed"] = str(((path.parent / base).parent / deepspeed).resolve())
    for section, values in tree.items():
        # A cut is one value, though it may look like a section.
        joins = section != "cut" and isinstance(values, dict)
        under[section] = {**_section(under, section), **values} if joins else values
    return under


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a tree that nobody has checked yet."""
    values = tree.get(name)
    return values if isinstance(values, dict) else {}


def parse_config(tree: dict[str, Any], origin: str) -> RunConfig:
    """Validate a mapping. Raises ConfigError: one line that begins with `origin`."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_explain(error)}") from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML. `load_config` reads an equal object back."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"{override}: an override has the form section.key=value; write it so")
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{override}: {parent} is not a section; write section.key=value")
    try:
        node[leaf] = text if _is_ipv6(text) else yaml.load(text, _Yaml)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{override}: not valid YAML; put quotes around the value") from error


_KINDS = {
    "tuple_type": "must be a list, [ONE, TWO]",
    "too_short": "must have at least one entry",
    "string_type": "must be a text, in quotes where YAML takes it for something else",
    "path_type": "must be a path, in quotes where YAML takes it for something else",
    "model_type": "is a section, with a `key: value` in each line below it",
}
"""What is expected, by the kind of pydantic's error, where its words are those of Python."""


def _shown(value: Any) -> str:
    text = "nothing" if value in (None, ()) or value == [] else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _explain(error: ValidationError) -> str:
    # A missing key is often a misspelt one, so an unknown key is named first.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"] if part not in ("LayersCut",)]
    name = ".".join(location)
    if first["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in location[:-1]:
            annotation = section.model_fields[part].annotation
            section = next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)
        near = difflib.get_close_matches(location[-1], section.model_fields, n=1, cutoff=0.5)
        hint = f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else "; remove it"
        if name in RENAMED:
            hint = f"; it is {RENAMED[name]} now"
        return f"{name} is not a key{hint}"
    if first["type"] in _KINDS:
        return f"{name}: {_KINDS[first['type']]}, not {_shown(first['input'])}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{name}: {message}" if name else message
