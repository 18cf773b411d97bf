"""Images that vanish, are cut or overwritten while a run trains on them: it goes on, and names every one of them."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bandsplit.data import demo
from bandsplit.data.order import TrainingOrder
from bandsplit.runs import checkpoint
from tests.compare import assert_equal, assert_same_run, metrics
from tests.conftest import Done, Launch

pytestmark = pytest.mark.slow


SCRIPT = '''
"""src/train.py, with images that are damaged after given steps, some of which crash any decoder, and a last step."""

import json
import os
import signal
from pathlib import Path

from bandsplit.data import check

CRASHES = b"-- crashes --"


def trapped(decoder, graph, contents, run=check._Decoder._run):
    if any(content.endswith(CRASHES) for content in contents):
        os.kill(os.getpid(), signal.SIGSEGV)
    return run(decoder, graph, contents)


check._Decoder._run = trapped  # also in the processes that examine images


def crashing(attempt):
    def crash_or_attempt(pipe, stream):
        paths = [pipe._files.paths[i] for i in pipe._indices(pipe.batches).tolist()]
        if any(Path(path).exists() and Path(path).read_bytes().endswith(CRASHES) for path in paths):
            os.kill(os.getpid(), signal.SIGSEGV)
        return attempt(pipe, stream)

    return crash_or_attempt


def main():
    from bandsplit.cli import entry, train
    from bandsplit.data.recovery import RecoveringPipeline
    from bandsplit.training.meter import Progress

    events = json.loads(os.environ["EVENTS"])
    advance = Progress.advance

    def damaging(progress, *arguments):
        advance(progress, *arguments)
        if os.environ["RANK"] == "0":
            for path, content in events["damage"].get(str(progress.step), []):
                Path(path).unlink(missing_ok=True)
                if content is not None:
                    Path(path).write_bytes(bytes.fromhex(content))
        if progress.step == events["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.advance = damaging
    RecoveringPipeline._attempt = crashing(RecoveringPipeline._attempt)
    entry.run(train.main)


if __name__ == "__main__":
    main()
'''

BATCH, EPOCHS, PER_CLASS = 40, 5, 52
COUNT = 10 * PER_CLASS  # 13 steps an epoch
STEPS = 13 * EPOCHS
SETS = (f"train.batch_size={BATCH}", f"train.epochs={EPOCHS}")


def images_of(root: Path, part: str = "train") -> list[Path]:
    return sorted((root / part).rglob("*.jpg"))


def broken(path: Path, chance: random.Random) -> str | None:
    """What becomes of the content of a file, as hexadecimal digits; None: it is removed."""
    kinds = [None, b"", b"not an image", bytes(2000), path.read_bytes()[:300]]
    content = chance.choice(kinds)
    return None if content is None else content.hex()


class Damaged:
    """A copy of the data whose images are damaged at given steps, and a run on it."""

    def __init__(self, folder: Path, config: Path, data: Path, damage: dict[int, list[tuple[int, str | None]]]) -> None:
        self.root = Path(shutil.copytree(data, folder / "data"))
        self.run_dir = folder / "run"
        self._config, self.script = config, folder / "damaging.py"
        folder.mkdir(exist_ok=True)
        self.script.write_text(SCRIPT)
        files = images_of(self.root)
        self._damage = {step: [(str(files[i]), how) for i, how in hits] for step, hits in damage.items()}

    def events(self, kill: int | None) -> str:
        return json.dumps({"damage": self._damage, "kill": kill})

    def run(self, *keys: str, ranks: int = 2, kill: int | None = None, events: str | None = None) -> Done:
        """To the end, or to the step at which every rank is killed; resumes what is there."""
        sets = [part for key in (*SETS, f"data.root={self.root}", *keys) for part in ("--set", key)]
        arguments = (self._config, "--run-dir", self.run_dir, "--resume", *sets)
        env = {"EVENTS": events or self.events(kill)}
        return Launch(str(self.script), *arguments, ranks=ranks, env=env).wait()

    def replaced(self) -> list[dict[str, Any]]:
        return [line for line in metrics(self.run_dir) if line["event"] == "replaced"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "images"
    demo.generate(root, seed=1, train_per_class=PER_CLASS, val_per_class=3)
    return root


def uses(streams: int) -> list[list[int]]:
    """The steps in which each image is used."""
    orders = [TrainingOrder(COUNT, BATCH // streams, 0, stream, streams) for stream in range(streams)]
    steps: list[list[int]] = [[] for _ in range(COUNT)]
    for step in range(1, STEPS + 1):
        for order in orders:
            for i in order.batch(step - 1).tolist():
                steps[i].append(step)
    return steps


def schedule(count: int, kills: Sequence[int], chance: random.Random, data: Path) -> dict[int, list[tuple[int, Any]]]:
    """So many images that are damaged at random moments, none of which lies just before a kill.

    A kill repeats up to 3 steps, and DALI prepares 2 batches ahead: no image is damaged just before or after a use of
    it, so that the repeated steps see what the first ones saw.
    """
    used, files = uses(2), images_of(data)
    moments = [s for s in range(2, STEPS - 16) if not any(kill - 6 <= s <= kill for kill in kills)]
    left = dict.fromkeys(range(10), 5)  # of every class
    damage: dict[int, list[tuple[int, Any]]] = {}
    for i in chance.sample(range(COUNT), COUNT):
        fitting = [s for s in moments if not any(s - 6 <= use <= s + 4 for use in used[i]) and used[i][-1] > s]
        if fitting and left[i // PER_CLASS]:
            left[i // PER_CLASS] -= 1
            damage.setdefault(chance.choice(fitting), []).append((i, broken(files[i], chance)))
    assert sum(map(len, damage.values())) == count
    return damage


@pytest.mark.long
def test_fifty_images_go_bad_and_the_run_is_killed_in_between(config_file: Path, data: Path, tmp_path: Path) -> None:
    """It ends, names all fifty, and equals the run with the same damage that nothing has killed, bit for bit."""
    chance, kills = random.Random(0), [16, 41]
    damage = schedule(50, kills, chance, data)
    files = images_of(data)
    victims = {str(files[i].relative_to(data)) for hits in damage.values() for i, _ in hits}
    undisturbed, killed = (Damaged(tmp_path / name, config_file, data, damage) for name in ("undisturbed", "killed"))
    done = undisturbed.run()
    assert done.returncode == 0, done.stderr
    told = undisturbed.replaced()
    assert {line["file"] for line in told} == victims
    assert len(told) == 50
    for line in told:
        assert Path(line["file"]).parent == Path(line["replacement"]).parent  # of the same class
        assert f"{line['file']}: {line['reason']}" in done.stderr
    with (undisturbed.run_dir / "bad_images.csv").open() as file:
        assert [row["file"] for row in csv.DictReader(file)] == [line["file"] for line in told]
    assert not list(undisturbed.run_dir.glob(".position*"))

    for kill in kills:
        assert killed.run(kill=kill).returncode != 0
    done = killed.run()
    assert done.returncode == 0, done.stderr
    assert "were prepared ahead are examined first" in done.stderr
    assert_same_run(killed.run_dir, undisturbed.run_dir)
    assert_equal(*(streams(each.run_dir) for each in (killed, undisturbed)))
    lists = [(each.run_dir / "bad_images.csv").read_text() for each in (killed, undisturbed)]
    assert lists[0] == lists[1]


def streams(run_dir: Path) -> list[Any]:
    """Positions and replaced images of all streams in the last checkpoint; files relative to the data."""
    states = [checkpoint.read(run_dir / "checkpoints/last", checkpoint.stream_file(s))["loader"] for s in range(2)]
    for state in states:
        for record in state["bad"]:
            for key in ("file", "replacement_file"):
                record[key] = record[key].rpartition("/data/")[2]
    return states


def test_a_decoder_that_crashes_the_process_costs_a_restart_and_one_image(
    config_file: Path, data: Path, tmp_path: Path
) -> None:
    """Started again, as by torchrun; the image is found in another process before it is decoded in this one."""
    victim = next(i for i, steps in enumerate(uses(2)) if 18 < steps[1] < 24 and steps[0] < 10)
    content = images_of(data)[victim].read_bytes() + b"-- crashes --"
    crashed = Damaged(tmp_path, config_file, data, {15: [(victim, content.hex())]})
    ended = crashed.run("train.epochs=2")
    assert ended.returncode != 0
    assert not crashed.replaced()
    again = crashed.run("train.epochs=2")
    assert again.returncode == 0, again.stderr
    (told,) = crashed.replaced()
    assert told["reason"] == "the decoder crashed (SIGSEGV)"
    assert told["step"] == uses(2)[victim][1]
    logs = "".join(path.read_text() for path in crashed.run_dir.glob("logs/rank*.log"))
    assert "ended without notice at batch" in logs
    assert metrics(crashed.run_dir)[-1]["event"] == "end"


def test_more_than_max_bad_end_the_run_and_lose_nothing(config_file: Path, data: Path, tmp_path: Path) -> None:
    """With the list; once more are allowed, the run goes on from its last checkpoint."""
    used = uses(1)
    victims = [i for i, steps in enumerate(used) if steps[0] < 8 and 15 < steps[1] < 26][:6]
    damage = {11: [(i, None) for i in victims]}
    run = Damaged(tmp_path, config_file, data, damage)
    done = run.run("data.max_bad=5", "train.epochs=2", ranks=1)
    assert done.returncode == 2
    assert "error: 6 images cannot be read or decoded any more, and data.max_bad = 5; " in done.stderr
    assert "Traceback" not in done.stderr
    with (run.run_dir / "bad_images.csv").open() as file:
        named = {row["file"] for row in csv.DictReader(file)}
    assert named == {str(images_of(data)[i].relative_to(data)) for i in victims}
    assert all(name in done.stderr for name in named)
    kept = checkpoint.latest(run.run_dir / "checkpoints")
    assert kept is not None
    done = run.run("data.max_bad=6", "train.epochs=2", ranks=1)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {checkpoint.step_of(kept)} " in done.stderr
    assert {line["file"] for line in run.replaced()} == named


def test_validation_images_that_go_bad_do_not_count(config_file: Path, data: Path, tmp_path: Path) -> None:
    """They are named and numbered in the validation line, in the log, and by evaluate.py."""
    run = Damaged(tmp_path, config_file, data, {})
    lost = images_of(run.root, "val")[4:6]
    events = {"damage": {"3": [[str(lost[0]), None], [str(lost[1]), "00"]]}, "kill": None}
    done = run.run("train.epochs=1", events=json.dumps(events))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in metrics(run.run_dir) if line["event"] == "validation"]
    assert (line["val_images"], line["left_out"]) == (28, 2)
    assert "2 validation images cannot be decoded and do not count:" in done.stderr
    assert all(f"{path}: " in done.stderr for path in lost)
    assert run.replaced() == []
