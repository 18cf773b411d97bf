"""Configuration: precedence, and one clear message for every mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomli
import tomli_w

from bandsplit import schema
from bandsplit.errors import UserError
from bandsplit.runlog import resolved
from tests.conftest import REPOSITORY

SHIPPED = sorted((REPOSITORY / "config/train").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_being_written_out(path: Path, tmp_path: Path) -> None:
    config = schema.load(path)
    assert config.name == path.stem
    written = tmp_path / "resolved.toml"
    written.write_text(tomli_w.dumps(resolved(config)))
    assert schema.load(written) == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_typo_in_any_key_of_a_shipped_config_is_refused(path: Path, tmp_path: Path) -> None:
    table = tomli.loads(path.read_text())
    table["data"] = str(path.parent / table["data"])
    for section, values in table.items():
        for key in values if isinstance(values, dict) else [None]:
            broken = {**table, section: {**values, f"{key}x": 1}} if key else {**table, f"{section}x": values}
            wrong = tmp_path / "broken.toml"
            wrong.write_text(tomli_w.dumps(broken))
            with pytest.raises(UserError, match=f"{key or section}x: unknown key; did you mean"):
                schema.load(wrong)


def test_precedence_is_defaults_then_file_then_set(config_file: Path) -> None:
    assert schema.load(config_file).optim.momentum == 0.9
    assert schema.load(config_file).optim.lr == 0.05
    config = schema.load(config_file, ["optim.lr=0.2", "data.mean=[1, 2, 3]", "model.arch=resnet34"])
    assert (config.optim.lr, config.data.mean, config.model.arch) == (0.2, (1, 2, 3), "resnet34")


def test_another_data_config_replaces_the_named_one(config_file: Path) -> None:
    other = config_file.with_name("other.toml")
    other.write_text('root = "elsewhere"\nclasses = 3\n')
    assert schema.load(config_file, data=other).data == schema.Data(name="other", root="elsewhere", classes=3)


def test_configs_are_frozen(config_file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        schema.load(config_file).optim.lr = 1  # type: ignore[misc]


def test_groups_follow_the_branches_key() -> None:
    assert schema.Split(block=2).groups == ((0,), (1,), (2,), (3,))
    assert schema.Split(block=2, branches="all").groups == ((0, 1, 2, 3),)
    assert schema.Split(block=2, branches=((0,), (0, 3))).groups == ((0,), (0, 3))
    assert schema.Split().groups == ((0,),)


MISTAKES = {
    "optim.lrr=1": r"--set optim.lrr=1: optim.lrr: unknown key; did you mean optim.lr\?",
    "batch_size=3": r"batch_size: unknown key; did you mean train.batch_size\?",
    "optim.lr=fast": r"optim.lr: 'fast' given; it should be a valid number",
    "optim.lr=-1": r"optim.lr: -1 given; it should be greater than 0",
    "train.epochs=2.5": r"train.epochs: 2.5 given; it should be a valid integer",
    "train.epochs=true": r"train.epochs: True given; it should be a valid integer",
    "model.arch=resnet35": r"model.arch: 'resnet35' given; it should be 'resnet18', 'resnet34'",
    "split.block=3": r"split.block: 3 given; allowed: a divisor of data.image_size = 32: 1, 2, 4, 8, 16, 32",
    "split.branches=[[0], [4]]": r"split.branches: \[4\] given; allowed: bands 0 to 3, since block = 2",
    "split.branches=[[1, 1]]": r"split.branches: \[1, 1\] given; allowed: each band once",
    "split.branches=some": r"""split.branches: 'some' given; allowed: "each", "all" or lists""",
    "data.image_size=64": r"data.image_size: 64 given; allowed: at most data.resize_size = 40",
    "data.mean=[1, 2]": r"--set data.mean=\[1, 2\]: data.mean: \[1, 2\] given; expected 3 numbers",
    "data.mean=[1, 2, 3, 4]": r"data.mean: \[1, 2, 3, 4\] given; expected 3 numbers",
    "optim=3": r"--set optim=3: optim: 3 given; expected a table \[optim\]",
    "foo.bar=1": r"--set foo.bar=1: foo: unknown key; allowed in the top level: name, seed",
    'data.mean=[1, 2, "x"]': r"data.mean: \[1, 2, 'x'\] given; expected 3 numbers",
    "data.std=[1, 0, 1]": r"data.std: \[1.0, 0.0, 1.0\] given; allowed: positive numbers",
    "data.random_area=[0.5, 0.1]": r"data.random_area: \[0.5, 0.1\] given; allowed: 0 < smallest",
    "schedule.warmup_epochs=2": r"schedule.warmup_epochs: 2.* given; allowed: less than train.epochs = 2",
    "schedule.lr_min=1": r"schedule.lr_min: 1.* given; allowed: at most optim.lr = 0.05",
    "train.accumulation=5": r"train.batch_size: 12 given; allowed: a multiple of train.accumulation = 5",
    "optim.momentum=0 optim.nesterov=true": r"optim.momentum: 0.* given; allowed: above 0 with optim.nesterov",
    'split.transform="hadamard" split.block=6 data.image_size=36': r"split.block: 6 given; allowed: a power of two",
    "optim": r"--set optim: expected key=value",
    "optim.lr.x=1": r"optim.lr is a value, not a table",
}


@pytest.mark.parametrize(("overrides", "message"), MISTAKES.items())
def test_each_mistake_names_key_value_and_what_is_allowed(config_file: Path, overrides: str, message: str) -> None:
    parts = [overrides] if "[" in overrides else overrides.split(" ")
    with pytest.raises(UserError, match=message):
        schema.load(config_file, parts)


def test_mistakes_in_files_name_the_file(config_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.toml"
    data.write_text(data.read_text() + "mirorr = 1\n")
    with pytest.raises(UserError, match=rf"{data}: data.mirorr: unknown key; did you mean data.mirror\?"):
        schema.load(config_file)
    config_file.write_text("[optim\n")
    with pytest.raises(UserError, match=f"{config_file}: not valid TOML"):
        schema.load(config_file)
    with pytest.raises(UserError, match=rf"tinny.toml: no such config file; did you mean {config_file}\?"):
        schema.load(tmp_path / "tinny.toml")
    config_file.write_text('data = "data.toml"\n')
    with pytest.raises(UserError, match=r"tiny.toml: model: missing; expected: a table \[model\]"):
        schema.load(config_file)


def test_a_batch_has_to_fit_the_ranks(config_file: Path) -> None:
    config = schema.load(config_file, ["train.accumulation=2"])
    assert config.rank_batch_size(world_size=3) == 2
    with pytest.raises(UserError, match="12 given, but 4 ranks .* need a multiple of 8, for example 8 or 16"):
        config.rank_batch_size(world_size=4)


def test_heavy_imports_stay_out() -> None:
    code = (
        "import sys; from bandsplit import schema, runlog, dataset; print({'torch', 'nvidia.dali'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
