"""Every key of a config with its type, default and meaning, from the JSON schema: as text, or as Markdown."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bandsplit.config.json_schema import Node, json_schema
from bandsplit.errors import UserError

_WORDS = {"number": "number", "integer": "integer", "string": "text", "boolean": "true or false"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

_TITLE = """# Keys of a config

This page is generated from the schema by `bandsplit config --keys --markdown`; `bandsplit config --keys optim` prints
one table. [config.md](config.md) explains how files are combined."""


@dataclass(frozen=True)
class Key:
    name: str
    kind: str
    """Its type in words, with bounds: `number > 0`."""
    default: str
    """As in a config file, or in words."""
    about: str


@dataclass(frozen=True)
class Table:
    path: str
    """`augment.auto`; empty for the top level."""
    header: str
    """`[augment.auto]`, for one of its types `[augment.auto] type = "rand_augment"`."""
    about: str
    keys: tuple[Key, ...]


def tables(path: str = "") -> list[Table]:
    """All tables, in the order of the schema; with `path`, that table and those in it, or the one key of that path.

    Raises UserError if there is none.
    """
    schema = json_schema("train")
    every = list(_table("", "Top level", _resolved(schema, schema["$defs"])))
    found = [table for table in every if not path or f"{table.path}.".startswith(f"{path}.")]
    if not found:
        above, _, name = path.rpartition(".")
        ones = [(table, key) for table in every if table.path == above for key in table.keys if key.name == name]
        found = [replace(table, about="", keys=(key,)) for table, key in ones]
    if not found:
        names = list(dict.fromkeys(table.path for table in every if table.path))
        keys = [f"{table.path}.{key.name}".lstrip(".") for table in every for key in table.keys]
        near = difflib.get_close_matches(path, names + keys, n=1)
        hint = f"did you mean {near[0]}?" if near else f"tables: {', '.join(names)}"
        raise UserError(f"{path}: no such table or key; {hint}")
    return found


def as_text(found: Sequence[Table], width: int) -> str:
    return "\n\n".join("\n".join(_lines(table, width)) for table in found)


def as_markdown(found: Sequence[Table]) -> str:
    return "\n\n".join([_TITLE, *("\n".join(_rows(table)) for table in found)])


def _lines(table: Table, width: int) -> Iterator[str]:
    yield table.header
    yield from _wrapped(table.about, width, "  ")
    for key in table.keys:
        default = key.default if key.default == "required" else f"default: {key.default}"
        yield from _wrapped(f"{key.name}: {key.kind} ({default})", width, "  ")
        yield from _wrapped(key.about, width, "      ")


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _rows(table: Table) -> Iterator[str]:
    yield f"## {table.header}"
    if table.about:
        yield f"\n{table.about}"
    if table.keys:
        yield "\n| key | type | default | meaning |\n|---|---|---|---|"
    for key in table.keys:
        cells = " | ".join(cell.replace("|", "\\|") for cell in (f"`{key.name}`", key.kind, key.default, key.about))
        yield f"| {cells} |"


def _resolved(node: Any, definitions: Node) -> Any:
    """The schema with every `$ref` replaced by what it refers to; what stands beside it has precedence."""
    if isinstance(node, list):
        return [_resolved(entry, definitions) for entry in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = _resolved(definitions[node["$ref"].rpartition("/")[2]], definitions)
        return {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    return {key: _resolved(value, definitions) for key, value in node.items() if key != "$defs"}


def _table(path: str, header: str, node: Node) -> Iterator[Table]:
    """A table, unless all that it holds are tables, and these."""
    options = {name: _options(value) for name, value in node["properties"].items()}
    keys = tuple(_key(name, value) for name, value in node["properties"].items() if not options[name])
    if keys or not options:
        yield Table(path, header, _text(node), keys)
    for name, found in options.items():
        if found:
            yield from _with_types(f"{path}.{name}".lstrip("."), node["properties"][name], found)


def _with_types(path: str, node: Node, options: list[Node]) -> Iterator[Table]:
    """The table of a key; of one with a `type`, what all types share, and then what each type has."""
    header = f"[[{path}]]" if node.get("type") == "array" else f"[{path}]"
    about = [_text(node), "Off unless it is given." if node.get("default") == "none" else ""]
    if len(options) == 1:
        about = list(dict.fromkeys((_text(options[0]), *about)))
        yield from _table(path, header, {**options[0], "description": " ".join(filter(None, about))})
        return
    first, *others = (table["properties"] for table in options)
    shared = {name: key for name, key in first.items() if all(key == table.get(name) for table in others)}
    keys = tuple(_key(name, key) for name, key in shared.items())
    yield Table(path, f"{header} of every type", " ".join(filter(None, about)), keys)
    for table in options:
        own = {name: key for name, key in table["properties"].items() if name not in {"type", *shared}}
        kind = _toml(table["properties"]["type"]["const"])
        yield from _table(path, f"{header} type = {kind}", {**table, "properties": own})


def _options(node: Node) -> list[Node]:
    """The tables that a key may hold: one, or one for each type; none for a plain value."""
    if "properties" in node:
        return [node]
    below = [*node.get("anyOf", ()), *([node["items"]] if isinstance(node.get("items"), dict) else [])]
    return [table for option in below for table in _options(option)]


def _key(name: str, node: Node) -> Key:
    otherwise = "the file's name" if name == "name" else "required"
    return Key(name, _kind(node), _toml(node["default"]) if "default" in node else otherwise, _text(node))


def _kind(node: Node) -> str:
    if "anyOf" in node:
        return " or ".join(map(_kind, node["anyOf"]))
    if "const" in node:
        return _toml(node["const"])
    if "enum" in node:
        return ", ".join(map(_toml, node["enum"]))
    if node["type"] == "array":
        entries = node["items"]
        return f"{len(entries)} {_many(entries[0])}" if isinstance(entries, list) else f"list of {_many(entries)}"
    word = _WORDS[node["type"]]
    if {"minimum", "maximum"} <= node.keys():
        return f"{word} from {node['minimum']} to {node['maximum']}"
    return " ".join([word, " and ".join(f"{sign} {node[key]}" for key, sign in _BOUNDS.items() if key in node)]).strip()


def _many(node: Node) -> str:
    kind = _kind(node)
    word = kind.partition(" ")[0]
    return kind if word.startswith('"') else kind.replace(word, f"{word}s", 1)


def _toml(value: object) -> str:
    """A value as in a TOML file, which for plain values and lists is as in JSON."""
    return json.dumps(value, ensure_ascii=False)


def _text(node: Node) -> str:
    return " ".join(str(node.get("description", "")).split())
