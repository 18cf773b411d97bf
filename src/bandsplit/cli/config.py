"""List the configs that come with Bandsplit, explain their keys, and show what a config amounts to."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from typing import get_args

import tomli_w

from bandsplit.cli import options
from bandsplit.config import json_schema, loading, reference, shipped
from bandsplit.runs.directory import resolved

EXAMPLES = """
bandsplit config list
bandsplit config --keys                      every key: type, default, meaning
bandsplit config --keys optim                those of a table; or one key, such as optim.lr
bandsplit config show resnet34_sub16 --set optim.lr=0.02 > my.toml
bandsplit config schema train > train.schema.json
"""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = options.parser(prog, __doc__, EXAMPLES)
    parser.add_argument(
        "--keys", nargs="?", const="", metavar="TABLE", help="print every key of a config, or those of a table"
    )
    parser.add_argument("--markdown", action="store_true", help="with --keys: as Markdown, like doc/keys.md")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands.add_parser("list", help="list the configs that can be given by name").set_defaults(run=_list)
    show = commands.add_parser("show", help="print a config with all its keys, as TOML")
    options.add_config(show)
    show.set_defaults(run=_show)
    schema = commands.add_parser("schema", help="print the JSON schema of config files, for editors")
    schema.add_argument("kind", choices=get_args(shipped.Kind), help="of train configs, or of data configs")
    schema.set_defaults(run=_schema)
    given = parser.parse_args(arguments)
    if (given.keys is None) == (given.command is None):
        parser.error("expected either --keys or a command: list, show or schema")
    if given.markdown and given.keys is None:
        parser.error("--markdown needs --keys")
    if given.command:
        given.run(given)
    else:
        found = reference.tables(given.keys)
        print(reference.as_markdown(found) if given.markdown else reference.as_text(found, options.width()))


def _list(arguments: argparse.Namespace) -> None:
    for kind in get_args(shipped.Kind):
        files = shipped.files(kind)
        longest = max(len(file.stem) for file in files)
        print(f"{kind} configs, in {files[0].parent}")
        for file in files:
            about = textwrap.shorten(shipped.summary(file), max(20, options.width() - longest - 4), placeholder=" …")
            print(f"  {file.stem:<{longest}}  {about}")


def _show(arguments: argparse.Namespace) -> None:
    config = loading.load(arguments.config or options.DEMO, arguments.set, arguments.data)
    print(tomli_w.dumps(resolved(config)), end="")


def _schema(arguments: argparse.Namespace) -> None:
    json.dump(json_schema.json_schema(arguments.kind), sys.stdout, indent=1, ensure_ascii=False)
    print()
