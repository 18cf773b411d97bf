"""Images that go bad while they are used: another one takes their place, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bandsplit.config import loading, schema
from bandsplit.data import check
from bandsplit.data.images import ImageFiles
from bandsplit.data.loader import LEFT_OUT, PADDING, Batch, TrainingLoader, ValidationLoader
from bandsplit.data.pipeline import Shard, training_order
from bandsplit.data.recovery import BadImage, Position, RecoveringPipeline, TooManyBadImages, UndecodableImage

COUNT, CLASSES = 24, 3


def share(rank: int = 0, world_size: int = 1, batch_size: int = 4) -> Shard:
    return Shard(rank, world_size, batch_size, threads=1, device_id=None)


@pytest.fixture
def config(config_file: Path) -> schema.RunConfig:
    # whole images, so that a truncated one fails wherever the crop lies
    return loading.load(config_file, ["data.scale=[1, 1]", "data.ratio=[1, 1]", "split.block=1"])


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """24 images of 3 classes."""
    paths = []
    for n in range(COUNT):
        path = tmp_path / f"{n:02d}.jpg"
        noise = np.random.default_rng(n).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64)).save(path, quality=90)
        paths.append(str(path))
    return ImageFiles(paths, [n % CLASSES for n in range(COUNT)], ["a", "b", "c"])


def vanish(path: str) -> None:
    Path(path).unlink()


def empty(path: str) -> None:
    Path(path).write_bytes(b"")


def text(path: str) -> None:
    Path(path).write_bytes(b"not an image")


def truncate(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def become_folder(path: str) -> None:
    Path(path).unlink()
    Path(path).mkdir()


DAMAGES: list[Callable[[str], None]] = [vanish, empty, text, truncate, become_folder]


def assert_same(batches: Sequence[Batch], others: Sequence[Batch]) -> None:
    for a, b in zip(batches, others, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))


def take(loader: TrainingLoader, count: int) -> list[Batch]:
    """The next batches, copied."""
    return [
        Batch([x.clone() for x in batch.inputs], batch.labels.clone())
        for _, batch in zip(range(count), loader, strict=False)
    ]


def with_replaced(files: ImageFiles, bad: Sequence[BadImage]) -> ImageFiles:
    paths = list(files.paths)
    for each in bad:
        paths[each["index"]] = each["replacement_file"]
    return replace(files, paths=paths)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_another_image_of_its_class_takes_its_place(
    config: schema.RunConfig, files: ImageFiles, damage: Callable[[str], None]
) -> None:
    """All else stays as it is: the stream is the one over a list in which the other image stands in its place."""
    damage(files.paths[7])
    loader = TrainingLoader(config, files, [share()])
    batches = take(loader, 18)  # three passes
    ((stream, record),) = loader.bad()
    batch = next(n for n in range(18) if 7 in training_order(config, files, share()).batch(n))
    assert (stream, record["batch"], record["index"], record["file"]) == (0, batch, 7, files.paths[7])
    assert record["replacement_file"] in files.paths[1::CLASSES]
    assert record["replacement_file"] != files.paths[7]
    assert record["reason"]
    undamaged = TrainingLoader(config, with_replaced(files, [record]), [share()])
    assert_same(batches, take(undamaged, 18))


@pytest.mark.slow
def test_several_at_once_and_images_that_replace_others(config: schema.RunConfig, files: ImageFiles) -> None:
    """Five of the eight images of a class, some in the same batch; then those that took their places, one by one."""
    bad, left = [1, 4, 7, 10, 13], [16, 19, 22]
    for i in bad:
        text(files.paths[i])
    loader = TrainingLoader(config, files, [share(batch_size=8)])
    take(loader, 3)
    assert [record["index"] for _, record in loader.bad()] == bad
    for i in left[:2]:
        vanish(files.paths[i])
        take(loader, 6)
        assert [record["index"] for _, record in loader.bad()] == sorted([*bad, *left[: left.index(i) + 1]])
    vanish(files.paths[left[2]])
    with pytest.raises(TooManyBadImages, match="all other images of class b are bad too"):
        take(loader, 6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_what_takes_a_place_does_not_depend_on_when_it_was_found(
    config: schema.RunConfig, files: ImageFiles, tmp_path: Path, size: int
) -> None:
    """Found before it is needed, when the image that would take its place was good, which went bad until then."""
    indices = training_order(config, files, share()).batch(4)[:size].tolist()
    for i in indices:
        text(files.paths[i])
    first = TrainingLoader(config, files, [share()])
    take(first, 5)
    place_takers = [record["replacement_file"] for _, record in first.bad()]
    early = TrainingLoader(config, files, [share()])
    early._pipelines[0].examine(4, 1)
    for path in place_takers:
        if Path(path).exists():
            vanish(path)
    late = TrainingLoader(config, files, [share()])
    assert_same(take(early, 18), take(late, 18))
    assert early.states() == late.states()
    assert [record["replacement_file"] for _, record in late.bad() if record["index"] in indices] != place_takers


@pytest.mark.slow
def test_a_stream_goes_on_from_its_state(config: schema.RunConfig, files: ImageFiles) -> None:
    """With what was replaced, also where the file is whole again, and with what is found later."""
    order = training_order(config, files, share())
    early, late = order.batch(1)[2], order.batch(4)[3]
    whole = Path(files.paths[early]).read_bytes()
    text(files.paths[early])
    text(files.paths[late])
    loader = TrainingLoader(config, files, [share()])
    take(loader, 3)
    states = loader.states()
    assert [record["index"] for record in states[0]["bad"]] == [early]
    rest = take(loader, 12)
    Path(files.paths[early]).write_bytes(whole)
    again = TrainingLoader(config, files, [share()], states)
    assert_same(take(again, 12), rest)
    assert again.bad() == loader.bad()
    assert again.states() == loader.states()


@pytest.mark.slow
def test_every_stream_finds_what_is_bad_among_its_images(config: schema.RunConfig, files: ImageFiles) -> None:
    """Images move from stream to stream; on one rank or two, each stream replaces the same ones at the same time."""
    shares = [share(rank, 2) for rank in range(2)]
    text(files.paths[5])
    apart = [TrainingLoader(config, files, [each]) for each in shares]
    together = TrainingLoader(config, files, shares)
    for _ in range(18):
        for loader in apart:
            assert_same(take(together, 1), take(loader, 1))
    assert together.bad() == [record for loader in apart for record in loader.bad()]
    found = together.bad()
    assert [(stream, record["index"]) for stream, record in found] == [(0, 5), (1, 5)]
    assert found[0][1]["replacement_file"] == found[1][1]["replacement_file"]


@pytest.mark.slow
def test_the_image_that_takes_a_place_follows_from_the_seed(config: schema.RunConfig, files: ImageFiles) -> None:
    vanish(files.paths[5])

    def replacement(seed: int) -> str:
        loader = TrainingLoader(config.model_copy(update={"seed": seed}), files, [share(batch_size=24)])
        next(loader)
        return loader.bad()[0][1]["replacement_file"]

    chosen = [replacement(seed) for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1


def test_with_error_it_is_named_and_ends_the_stream(config_file: Path, files: ImageFiles) -> None:
    config = loading.load(config_file, ["data.on_bad=error"])
    vanish(files.paths[7])
    expected = f"{files.paths[7]}: this image cannot be read or decoded .no such file or directory.; repair or remove"
    with pytest.raises(UndecodableImage, match=expected):
        take(TrainingLoader(config, files, [share()]), 6)
    with pytest.raises(UndecodableImage, match=expected):
        list(ValidationLoader(config, files, share()))


@pytest.mark.parametrize("loader", [TrainingLoader, ValidationLoader])
def test_more_than_max_bad_end_it_with_their_names(config_file: Path, files: ImageFiles, loader: Any) -> None:
    config = loading.load(config_file, ["data.max_bad=2"])
    for i in (3, 8, 14):
        vanish(files.paths[i])
    batches = loader(config, files, [share()] if loader is TrainingLoader else share())
    with pytest.raises(
        TooManyBadImages, match="3 images cannot be read or decoded any more, and data.max_bad = 2"
    ) as e:
        list(zip(range(6), batches, strict=False))
    assert sorted(e.value.bad) == [(files.paths[i], "no such file or directory") for i in (3, 8, 14)]
    assert all(files.paths[i] in str(e.value) for i in (3, 8, 14))


def test_a_file_system_that_was_away_for_a_moment(
    config: schema.RunConfig, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is missing when the pipeline reads it, and there when it is examined: the batch is tried again."""
    expected = take(TrainingLoader(config, files, [share()]), 6)
    away = Path(files.paths[7] + ".away")
    Path(files.paths[7]).rename(away)
    examine = check.examine

    def back(*arguments: Any) -> Iterator[check.Verdict]:
        if away.exists():
            away.rename(files.paths[7])
        return examine(*arguments)

    monkeypatch.setattr(check, "examine", back)
    loader = TrainingLoader(config, files, [share()])
    assert_same(take(loader, 6), expected)
    assert loader.bad() == []


@pytest.mark.parametrize(("error", "attempts"), [("out of memory", 1), ("Error in operator `fn.decoders.image`", 2)])
def test_what_the_files_do_not_explain_is_passed_on(
    config: schema.RunConfig, files: ImageFiles, error: str, attempts: int
) -> None:
    built = []

    class Failing:
        def run(self, stream: Any) -> Any:
            raise RuntimeError(error)

    def build(*_: Any) -> Any:
        built.append(Failing())
        return built[-1]

    order = training_order(config, files, share())
    with pytest.raises(RuntimeError, match=error):
        RecoveringPipeline(build, order.batch, config, files, 1, training=True).run()
    assert len(built) == attempts


# ---------------------------------------------------------------------- after a crash


def test_the_position_outlives_only_a_crash(config: schema.RunConfig, files: ImageFiles, tmp_path: Path) -> None:
    loader = TrainingLoader(config, files, [share(1, 2)], positions=tmp_path)
    take(loader, 3)
    noted = Position(tmp_path / ".position_01")
    assert noted.left_at == 2
    loader.close()
    assert not list(tmp_path.glob(".position*"))


def test_after_a_crash_the_images_that_may_have_caused_it_come_first(
    config: schema.RunConfig, files: ImageFiles, tmp_path: Path
) -> None:
    """Bad images of the batch that was under way and of those behind it are replaced before they are decoded."""
    order = training_order(config, files, share())
    now, ahead, later = order.batch(3)[0], order.batch(5)[0], order.batch(2)[0]
    loader = TrainingLoader(config, files, [share()], positions=tmp_path)
    expected = take(loader, 3)
    states = loader.states()
    expected += take(loader, 1)  # number 3, with which the process ends
    for i in (now, ahead):
        text(files.paths[i])
    again = TrainingLoader(config, files, [share()], states, positions=tmp_path)
    assert [record["index"] for record in again.states()[0]["bad"]] == sorted([now, ahead])
    rest = take(again, 9)
    assert {(record["batch"], record["index"]) for _, record in again.bad()} == {(3, now), (5, ahead)}
    undamaged = TrainingLoader(config, with_replaced(files, again.states()[0]["bad"]), [share()], states)
    assert_same(rest, take(undamaged, 9))
    assert later not in [record["index"] for _, record in again.bad()]


# ---------------------------------------------------------------------- validation


def validated(loaders: Sequence[ValidationLoader]) -> list[int]:
    return [label for loader in loaders for batch in loader for label in batch.labels.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 5), (2, 5), pytest.param(26, 4, marks=pytest.mark.long)])
def test_validation_leaves_out_what_is_bad_and_counts_the_rest_once(
    config: schema.RunConfig, files: ImageFiles, world_size: int, batch_size: int
) -> None:
    """Also a whole batch, the first image, which fills batches up, and in a later pass."""
    numbered = replace(files, labels=list(range(COUNT)))
    bad = [0, 5, 6, 7, 8, 9, 23]
    for n, i in enumerate(bad):
        DAMAGES[n % len(DAMAGES)](files.paths[i])
    loaders = [ValidationLoader(config, numbered, share(rank, world_size, batch_size)) for rank in range(world_size)]
    for _ in range(2):
        seen = validated(loaders)
        assert sorted(label for label in seen if label >= 0) == [i for i in range(COUNT) if i not in bad]
        assert seen.count(LEFT_OUT) == len(bad)
        assert len(seen) - seen.count(PADDING) == COUNT
    vanish(files.paths[12])
    for _ in range(3):  # some batches were prepared before it vanished
        seen = validated(loaders)
    assert seen.count(LEFT_OUT) == len(bad) + 1
    assert 12 not in seen
    named = {record["file"] for loader in loaders for record in loader.left_out}
    assert named >= {files.paths[i] for i in [*bad, 12]}
