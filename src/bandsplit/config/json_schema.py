"""JSON schemas of train and data configs, for editors of TOML files: pydantic's, loosened to what a file may hold.

A file may leave out every key that a file it `extends` may give, and `type` of a table too; "none" unsets an optional
key; `data` may name a file. Checks across keys are left to loading.
"""

from __future__ import annotations

from typing import Any

from bandsplit.config.schema import Data, RunConfig
from bandsplit.config.shipped import FOLDER, Kind

Node = dict[str, Any]

FILES = {kind: FOLDER / f"{kind}.schema.json" for kind in ("train", "data")}
"""The schema of the files in a folder of config/, beside this folder."""

_DROPPED = {"title", "required", "discriminator"}
_DRAFT_7 = {"oneOf": "anyOf", "prefixItems": "items"}  # without `type`, a table may be one of several types
_FILE = {"type": "string", "minLength": 1}


def json_schema(kind: Kind) -> Node:
    """The schema, draft 7, of a train config or of a data config."""
    if kind == "data":
        return _headed(_loosened(Data.model_json_schema()))
    schema = _loosened(RunConfig.model_json_schema())
    schema["$defs"]["Branch"]["required"] = ["bands"]  # a list of tables is not merged, but replaced
    keys = schema["properties"]
    keys["data"] = {
        "description": "A data config, relative to this file, or its keys in a table.",
        "anyOf": [_FILE, keys["data"]],
    }
    extends = {
        "description": "Train configs to start from, relative to this file; later ones override earlier ones.",
        "anyOf": [_FILE, {"type": "array", "items": _FILE}],
        "default": [],
    }
    return _headed({**schema, "properties": {"extends": extends, **keys}})


def _headed(schema: Node) -> Node:
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def _loosened(node: Any) -> Any:
    if isinstance(node, list):
        return [_loosened(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    if node == {"type": "null"}:
        return {"const": "none"}
    kept = {_DRAFT_7.get(key, key): _loosened(value) for key, value in node.items() if key not in _DROPPED}
    default = node.get("default", ...)
    if isinstance(default, dict):
        del kept["default"]  # that of a table is told by its keys
    elif default is None:
        kept["default"] = "none"
    return kept
