"""The trained weights that branches begin with (`model.init_from`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache

import torch
from loguru import logger

from bandsplit.config import loading
from bandsplit.config.schema import Data, Model, RunConfig
from bandsplit.data.store.manifest import read_manifest
from bandsplit.errors import UserError
from bandsplit.models import pretrained
from bandsplit.models.ensemble import Ensemble
from bandsplit.models.pretrained import FOR_ALL, Channels, Initial, Trained
from bandsplit.paths import expanded
from bandsplit.runs import checkpoint
from bandsplit.runs.directory import RunDirectory
from bandsplit.runs.restored import Restored
from bandsplit.spectral.view import View


def initial_weights(config: RunConfig, own: range, classes: Sequence[str]) -> dict[int, Initial]:
    """The weights of the branches with indices in `own` that begin with trained ones, by their number.

    Raises UserError if they cannot be read, or are those of other networks.
    """
    trained, view, found = lru_cache(_trained), View.of(config), {}
    with torch.device("meta"):
        branches = Ensemble.of(config, own).branches
    size = config.data.image_size // config.split.block
    for i, branch in zip(own, branches, strict=True):
        number, model = config.split.numbers[i], config.model_of(config.split.numbers[i])
        if model.init_from is None:
            continue
        choices = trained(model, size)
        one = choices.get(number, choices.get(FOR_ALL))
        if one is None:
            allowed = f"one with branch {number}, or with one branch for all"
            raise UserError(f"model.init_from: {model.init_from!r} has branches {list(choices)}; allowed: {allowed}")
        found[number] = pretrained.adapted(branch, one, Channels.of(view, config.split.groups[i]), classes)
    return found


def begin(initial: Mapping[int, Initial], numbers: Sequence[int], ensemble: Ensemble) -> None:
    """Loads them into the branches of this rank, which have these numbers, and logs what was done."""
    for number, branch in zip(numbers, ensemble.branches, strict=True):
        if number in initial:
            branch.load_state_dict(initial[number].state, strict=False)  # without the head, if that is new
    for words in described(initial):
        logger.info(f"begins with {words}")


def tell_what_has_seen_held_out(config: RunConfig, digest: str) -> None:
    """Warns of runs that weights or targets come from, and that were trained on images which this run holds out.

    Of packed images, those count that they were packed from. A run whose directory is gone is not known.

    `digest`: of the training images; "" if it is not known.
    """
    if config.data.holdout is None or not digest:
        return
    models = {config.model_of(number).init_from for number in config.split.numbers} - {None}
    sources = [(f"model.init_from: {place}", place, "best") for place in sorted(map(str, models))]
    if config.distillation is not None:
        given = config.distillation
        sources.append((f"distillation.teacher: {given.teacher}", given.teacher, str(given.checkpoint)))
    for where, place, which in sources:
        with suppress(UserError):
            directory = RunDirectory(expanded(place, "model.init_from"))
            if not directory.holds_run:
                continue
            began = loading.load(directory.config)
            run = checkpoint.read_run(checkpoint.find(directory.checkpoints, which))
            alike = (began.seed, began.data.holdout) == (config.seed, config.data.holdout)
            theirs = _with_packed(run["data"].get("train", ""), began.data)
            if not alike and theirs & _with_packed(digest, config.data):
                logger.warning(
                    "{}: this run was trained on the same images with another seed or data.holdout, so on images that "
                    "are held out here: fusion and cascades fitted on them are too sure of themselves",
                    where,
                )


def _with_packed(digest: str, data: Data) -> set[str]:
    """The digest of training images, and of those that they were packed from."""
    with suppress(UserError):
        return {digest, read_manifest(expanded(data.root, "data.root")).parts["train"].source_digest}
    return {digest}


def described(initial: Mapping[int, Initial]) -> list[str]:
    """What the branches begin with, those alike together."""
    alike: dict[str, dict[int, float]] = defaultdict(dict)
    for number, one in initial.items():
        alike[one.words][number] = one.share
    texts = []
    for words, shares in alike.items():
        each = ", ".join(f"{100 * share:.1f} % in branch {number}" for number, share in shares.items())
        texts.append(words + f"; of its squared weights {each}" * (min(shares.values()) < 0.9995))
    return texts


def _trained(model: Model, size: int) -> dict[int, Trained]:
    """Trained networks by the number of the branch that they are for; that of a run with one branch is FOR_ALL.

    `size`: side of the inputs in pixels.
    """
    assert model.init_from is not None
    if model.init_from == "torchvision":
        return {FOR_ALL: pretrained.of_torchvision(model, size)}
    if model.init_from == "timm":
        return {FOR_ALL: pretrained.of_timm(model, size)}
    path = expanded(model.init_from, "model.init_from")
    if not path.exists():
        allowed = "'torchvision', 'timm', a file of weights or a run directory"
        raise UserError(f"model.init_from: {model.init_from!r} given, but there is no such file; allowed: {allowed}")
    if path.is_file():
        return pretrained.of_file(path, model, size)
    try:
        restored = Restored.of(path, "best")
        alone = len(loading.load(RunDirectory(path).config).split.numbers) == 1
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from error
    split, view = restored.config.split, View.of(restored.config)
    return {
        FOR_ALL if alone else number: Trained(
            f"{restored.config.name}, step {restored.step}, {path}",
            branch.state_dict(),
            branch,
            Channels.of(view, bands),
            restored.classes,
        )
        for number, branch, bands in zip(split.numbers, restored.ensemble.branches, split.groups, strict=True)
    }
