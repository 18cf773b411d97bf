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
"""src/train.py, with images that are damaged after given steps, and a process that ends at one."""

import json
import os
import signal
from pathlib import Path


def main():
    from bandsplit.cli import entry, train
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
        self._config, self._script = config, folder / "damaging.py"
        self._script.write_text(SCRIPT)
        files = images_of(self.root)
        self._damage = {step: [(str(files[i]), how) for i, how in hits] for step, hits in damage.items()}

    def run(self, *keys: str, ranks: int = 2, kill: int | None = None) -> Done:
        """To the end, or to the step at which every rank is killed; resumes what is there."""
        sets = [part for key in (*SETS, f"data.root={self.root}", *keys) for part in ("--set", key)]
        arguments = (self._config, "--run-dir", self.run_dir, "--resume", *sets)
        events = json.dumps({"damage": self._damage, "kill": kill})
        return Launch(str(self._script), *arguments, ranks=ranks, env={"EVENTS": events}).wait()

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
        for record in state["replaced"]:
            for key in ("file", "replacement_file"):
                record[key] = record[key].rpartition("/data/")[2]
    return states
