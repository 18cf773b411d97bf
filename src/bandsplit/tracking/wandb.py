"""A run of Weights & Biases, online or offline as WANDB_MODE says; its files are in the folder `wandb` of the run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import tomli
import wandb
from PIL import Image

from bandsplit.errors import UserError
from bandsplit.reporting.events import KINDS, Event
from bandsplit.reporting.settings import read_settings
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.files import make_folder, read_text, replace_text
from bandsplit.tracking.tracker import Figures, branch_numbers, scalars

PROJECT = "bandsplit"


class WandB:
    """Hands over each event once: Weights & Biases takes no step again, so of steps that are repeated the first counts.

    It has surely taken what it was given when it has finished: that is noted in `wandb/sent.json`, and another process
    goes on there. If one was killed before, the events since then are handed over again, but for those that the server
    has. A step that the server has takes nothing more in another process, so the events of the last step wait for a
    later one, or the end of the run: a validation may still follow. Nothing is opened before there is something to hand
    over. Raises UserError if the server cannot be reached or refuses.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory, self._noted = directory, directory.path / "wandb" / "sent.json"
        self._numbers = branch_numbers(directory)
        self._id, self._sent = secrets.token_hex(4), (-1, 0)
        with suppress(ValueError, KeyError, TypeError):
            noted = json.loads(read_text(self._noted) or "")
            self._id = noted["id"]
            self._sent = noted["step"], KINDS.index(noted["event"])  # none before the first time that it has finished
        self._run: wandb.Run | None = None
        self._waiting: list[Event] = []
        """Events of the last step."""

    def restart(self) -> None:
        """`log` passes over what was handed over, and is given again what was not."""
        self._waiting = []

    def log(self, event: Event) -> None:
        if _position(event) <= self._sent:
            return
        if event["event"] == "end" or any(event["step"] > each["step"] for each in self._waiting):
            for each in self._waiting:
                self._hand_over(each)
            self._waiting = []
        if event["event"] == "end":
            self._hand_over(event)
        else:
            self._waiting.append(event)

    def _hand_over(self, event: Event) -> None:
        self._run = self._run or self._opened()
        values = dict(scalars(event, self._numbers))
        if event["event"] == "end":
            self._run.summary.update(values)
        elif event["step"] >= self._run.starting_step:
            self._run.log(values, step=event["step"])
        self._sent = _position(event)

    def flush(self) -> None:
        """Nothing: what was not taken is handed over again."""

    def finish(self, figures: Figures) -> str:
        waiting = "; the last step waits for the next one, or for the end of the run" * bool(self._waiting)
        if self._run is None:
            return f"{self._directory.path}: nothing new to hand to wandb{waiting}"
        step, kind = self._sent
        images = {name: wandb.Image(Image.open(io.BytesIO(png))) for name, png in figures().items()}
        if images:
            named = {f"figures/{name}": image for name, image in images.items()}
            self._run.log(named, step=max(step, self._run.starting_step))
        folder, told = self._run.dir.removesuffix("/files"), f"handed to wandb: {self._run.url}"
        if self._run.offline:
            told = f"{folder}: written; wandb sync {folder} sends it"
        try:
            self._run.finish()
        except wandb.Error as error:
            raise _refused(error) from error
        replace_text(self._noted, json.dumps({"id": self._id, "step": step, "event": KINDS[kind]}) + "\n")
        return told + waiting

    def _opened(self) -> wandb.Run:
        settings, *_ = read_settings(self._directory.config)
        make_folder(self._noted.parent)
        if not self._noted.exists():
            replace_text(self._noted, json.dumps({"id": self._id}) + "\n")
        try:
            return wandb.init(
                dir=self._directory.path,
                id=self._id,
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                group=os.environ.get("WANDB_RUN_GROUP", group(settings)),
                name=os.environ.get("WANDB_NAME", self._directory.path.absolute().name),
                config=_config(self._directory),
                # its output and the load of its machine are not the training's
                settings=wandb.Settings(console="off", x_disable_stats=True, disable_git=True, disable_code=True),
            )
        except (wandb.Error, OSError) as error:
            raise _refused(error) from error


def _position(event: Event) -> tuple[int, int]:
    """The order in which events are handed over."""
    return event["step"], KINDS.index(event["event"])


def group(settings: Mapping[str, str]) -> str:
    """The same for runs that differ in nothing but their seed, what they measured, and keys without effect."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{settings['name']}-{digest[:8]}"


def _config(directory: RunDirectory) -> dict[str, Any]:
    return tomli.loads(directory.config.read_text(encoding="utf-8"))


def _refused(error: Exception) -> UserError:
    return UserError(f"wandb: {' '.join(str(error).split())}")
