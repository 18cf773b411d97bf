"""Configuration: precedence, and one clear message for every mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli
import tomli_w

from bandsplit.config import loading, schema
from bandsplit.config.messages import REMOVED, RENAMED
from bandsplit.errors import UserError
from bandsplit.runs.directory import resolved
from tests.conftest import REPOSITORY

SHIPPED = sorted((REPOSITORY / "config/train").glob("*.toml"))


CONFIGS = [path for path in SHIPPED if not path.name.startswith("recipe_")]  # the others are fragments


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_being_written_out(path: Path, tmp_path: Path) -> None:
    config = loading.load(path)
    assert config.name == path.stem
    written = tmp_path / "resolved.toml"
    written.write_text(tomli_w.dumps(resolved(config)))
    assert loading.load(written) == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_typo_in_any_key_of_a_shipped_config_is_refused(path: Path, tmp_path: Path) -> None:
    table = tomli.loads(path.read_text())
    for key in ("data", "extends"):
        match table.get(key):
            case str(name):
                table[key] = str(path.parent / name)
            case list(names):
                table[key] = [str(path.parent / name) for name in names]
    for section, values in table.items():
        for key in values if isinstance(values, dict) else [None]:
            broken = {**table, section: {**values, f"{key}x": 1}} if key else {**table, f"{section}x": values}
            wrong = tmp_path / "broken.toml"
            wrong.write_text(tomli_w.dumps(broken))
            with pytest.raises(UserError, match=f"{key or section}x: unknown key; (did you mean|allowed in)"):
                loading.load(wrong)


def test_precedence_is_defaults_then_file_then_set(config_file: Path) -> None:
    assert loading.load(config_file).optim.momentum == 0.9
    assert loading.load(config_file).optim.lr == 0.05
    config = loading.load(config_file, ["optim.lr=0.2", "data.mean=[1, 2, 3]", "model.arch=resnet34"])
    assert (config.optim.lr, config.data.mean, config.model.arch) == (0.2, (1, 2, 3), "resnet34")


def test_another_data_config_replaces_the_named_one(config_file: Path) -> None:
    other = config_file.with_name("other.toml")
    other.write_text('root = "elsewhere"\nclasses = 3\n')
    assert loading.load(config_file, data=other).data == schema.Data(name="other", root="elsewhere", classes=3)


def test_configs_are_frozen(config_file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        loading.load(config_file).optim.lr = 1  # type: ignore[misc]


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
    "data.scale=[0.5, 0.1]": r"data.scale: \[0.5, 0.1\] given; allowed: 0 < smallest",
    "schedule.warmup_epochs=2": r"schedule.warmup_epochs: 2.* given; allowed: less than train.epochs = 2",
    "schedule.lr_min=1": r"schedule.lr_min: 1.* given; allowed: at most optim.lr = 0.05",
    "train.grad_accum_steps=5": r"train.batch_size: 12 given; allowed: a multiple of train.grad_accum_steps = 5",
    "optim.momentum=0 optim.nesterov=true": r"optim.momentum: 0.* given; allowed: above 0 with optim.nesterov",
    'split.transform="hadamard" split.block=6 data.image_size=36': r"split.block: 6 given; allowed: a power of two",
    "optim": r"--set optim: expected key=value",
    "data.val_image_size=42": r"data.val_image_size: 42.* given; allowed: at most data.resize_size = 40",
    "data.val_image_size=39": r"split.block: 2.* given; allowed: a divisor of data.val_image_size = 39: 1, 3, 13",
    "model.arch=vgg16 model.width=1.0 data.val_image_size=38": r"data.val_image_size: 38.* given; allowed: unset for",
    "optim.type=sdg": r"--set optim.type=sdg: optim.type: 'sdg' given; allowed: 'sgd', .*; did you mean 'sgd'\?",
    "optim.type=adam optim.momentum=1": r"optim.momentum: unknown key; allowed in \[optim\]: lr, .*, betas, eps",
    "optim.type=adam optim.betas=[0.9]": r"optim.betas: \[0.9\] given; expected 2 numbers",
    "optim.type=adam optim.betas=[0.9,1.5]": r"optim.betas: \[0.9, 1.5\] given; 1.5 should be less than 1",
    "schedule.type=step": r"schedule.milestones: \[\] given; allowed: either milestones or schedule.every_epochs",
    "schedule.type=one_cycle schedule.peek_at=0.2": r"unknown key; did you mean schedule.peak_at\?",
    "loss.type=bce loss.target_threshold=2": r"loss.target_threshold: 2.* given; it should be less than 1",
    "train.precision=fp16 train.on_nonfinite=lower_lr": r"train.on_nonfinite: 'lower_lr' given; allowed: 'stop'",
    "augment.progressive.min_size=16": r"augment.progressive.ramp_end: missing; expected: int",
    "augment.progressive={min_size=16,ramp_start=1,ramp_end=1}": r"ramp_start: 1 given; allowed: less than .*_end = 1",
    "augment.progressive={min_size=16,ramp_end=2}": r"ramp_end: 2 given; allowed: less than train.epochs = 2",
    "augment.progressive={min_size=32,ramp_end=1}": r"min_size: 32 given; allowed: less than data.image_size = 32",
    "augment.progressive={min_size=15,ramp_end=1}": r"min_size: 15 given; allowed: a multiple of split.block = 2",
    "augment.progressive={min_size=16,ramp_end=1,multiple=3}": r"multiple: 3 given; allowed: a multiple of split.block",
    "model.arch=vgg16 model.width=1.0 augment.progressive={min_size=16,ramp_end=1}": r"min_size: 16 given; .*unset",
    "optim.lr.x=1": r"optim.lr is a value, not a table",
    "optim.lr=.1": r"optim.lr: '.1' given; it should be a valid number; write 0.1$",
    'train.epochs="64"': r"train.epochs: '64' given; it should be a valid integer; write 64$",
    "optim.lr=inf": r"optim.lr: inf given; it should be a finite number",
    "optim.nesterov=True": r"optim.nesterov: 'True' given; expected true or false, in lower case and without quotes$",
    "optim.nesterov=1": r"optim.nesterov: 1 given; expected true or false$",
    "optim.momentum=none": r"optim.momentum: 'none' given; it should be a valid number$",
    "train.clip_norm=off": r"""train.clip_norm: 'off' given; it should be a valid number or "none"$""",
    "data.decoder.crop_only=off": r"""crop_only: 'off' given; expected true or false or "none"$""",
    "schedule.type=step schedule.milestones=x": r"milestones: 'x' given; expected a list of numbers, such as \[30, 60,",
    "log.trackers=wandb": r"log.trackers: 'wandb' given; expected a list with any of 'tensorboard', 'wandb', such as",
    'log.trackers=["mlflow"]': r"log.trackers: \['mlflow'\] given; expected a list with any of 'tensorboard', 'wandb'",
    "schedule.type=step schedule.milestones=1,x": r"milestones: \[1, 'x'\] given; expected a list of numbers, such as",
    "schedule.type=step schedule.milestones=[1, nan]": r"milestones: \[1, nan\] given; nan should be a finite number$",
    "schedule.type=one_cycle schedule.momentum=1": r"""momentum: 1 given; expected 2 .* \[0.85, 0.95\] or "none"$""",
    "schedule.type=one_cycle schedule.momentum=0,2": r"momentum: \[0, 2\] given; 2 should be less than or equal to 1$",
}


@pytest.mark.parametrize(("overrides", "message"), MISTAKES.items())
def test_each_mistake_names_key_value_and_what_is_allowed(config_file: Path, overrides: str, message: str) -> None:
    parts = re.split(r" (?=[a-z_]+\.[a-z_.]+=)", overrides)
    with pytest.raises(UserError, match=message):
        loading.load(config_file, parts)


def test_mistakes_in_files_name_the_file(config_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.toml"
    data.write_text(data.read_text() + "hflp = 1\n")
    with pytest.raises(UserError, match=rf"{data}: data.hflp: unknown key; did you mean data.hflip\?"):
        loading.load(config_file)
    config_file.write_text("[optim\n")
    with pytest.raises(UserError, match=f"{config_file}: not valid TOML"):
        loading.load(config_file)
    with pytest.raises(UserError, match=rf"tinny.toml: no such config file; did you mean {config_file}\?"):
        loading.load(tmp_path / "tinny.toml")
    config_file.write_text('data = "data.toml"\n')
    with pytest.raises(UserError, match=r"tiny.toml: model: missing; expected: a table \[model\]"):
        loading.load(config_file)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_former_name_of_a_key_is_answered_with_its_new_one(config_file: Path, old: str, new: str) -> None:
    with pytest.raises(UserError, match=rf"--set {old}=1: {old}: unknown key; renamed to {new}$"):
        loading.load(config_file, [f"{old}=1"])
    with pytest.raises(UserError) as raised:  # the new name is a key: 'x' is wrong as its value, not as a key
        loading.load(config_file, [f"{new}=x"])
    assert "unknown key" not in str(raised.value)


@pytest.mark.parametrize(("old", "reason"), REMOVED.items())
def test_a_removed_key_is_answered_with_the_reason(config_file: Path, old: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"--set {old}=1: {old}: unknown key; removed: {reason}$"):
        loading.load(config_file, [f"{old}=1"])


def test_image_sizes_grow_as_in_ffcvs_recipe(config_file: Path) -> None:
    keys = ["data.image_size=192", "data.resize_size=192", "train.epochs=88"]
    for low, start, end, multiple in ((160, 65, 76, 32), (96, 10, 70, 16)):
        table = f"{{min_size={low}, ramp_start={start}, ramp_end={end}, multiple={multiple}}}"
        config = loading.load(config_file, [*keys, f"augment.progressive={table}"])
        sizes = [config.image_size_at(epoch) for epoch in range(88)]
        assert sizes == [round(np.interp(e, [start, end], [low, 192]) / multiple) * multiple for e in range(88)]
    assert {loading.load(config_file, keys).image_size_at(epoch) for epoch in range(88)} == {192}


def test_a_batch_has_to_fit_the_ranks(config_file: Path) -> None:
    config = loading.load(config_file, ["train.grad_accum_steps=2"])
    assert config.rank_batch_size(world_size=3) == 2
    with pytest.raises(UserError, match="12 given, but 4 ranks .* need a multiple of 8, for example 8 or 16"):
        config.rank_batch_size(world_size=4)


def test_heavy_imports_stay_out() -> None:
    code = (
        "import sys; from bandsplit.config import loading; from bandsplit.data import images; "
        "from bandsplit.runs import directory, metrics; "
        "print({'torch', 'nvidia.dali'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_config_extends_another_key_by_key(config_file: Path, tmp_path: Path) -> None:
    base = loading.load(config_file)
    write(tmp_path, "sub/child.toml", 'extends = "../tiny.toml"\n[optim]\nlr = 0.5\n[train]\nepochs = 7\n')
    grandchild = write(tmp_path, "sub/grandchild.toml", 'extends = "child.toml"\n[optim]\nmomentum = 0.5\n')
    config = loading.load(grandchild)
    assert config.name == "grandchild"
    assert (config.optim.lr, config.optim.momentum, config.train.epochs) == (0.5, 0.5, 7)
    assert (config.data, config.model, config.split) == (base.data, base.model, base.split)


def test_a_config_extends_a_list_in_order(config_file: Path, tmp_path: Path) -> None:
    """Later ones override earlier ones, including what those extend; the config's own keys override all of them."""
    write(tmp_path, "wide.toml", "[model]\nwidth = 0.5\n[optim]\nlr = 0.1\nmomentum = 0.7\n[train]\nepochs = 5\n")
    write(tmp_path, "sub/long.toml", 'extends = "../longest.toml"\n[optim]\nlr = 0.2\nmomentum = 0.6\n')
    write(tmp_path, "longest.toml", "[train]\nepochs = 9\nclip_norm = 1.0\n[optim]\nlr = 0.3\n")
    names = 'extends = ["tiny.toml", "wide.toml", "sub/long.toml"]\n'
    config = loading.load(write(tmp_path, "child.toml", names + "[optim]\nmomentum = 0.5\n"))
    assert (config.model.arch, config.model.width) == ("resnet18", 0.5)
    assert (config.optim.lr, config.optim.momentum) == (0.2, 0.5)
    assert (config.train.epochs, config.train.clip_norm, config.train.batch_size) == (9, 1.0, 12)
    turned = loading.load(write(tmp_path, "turned.toml", 'extends = ["sub/long.toml", "wide.toml", "tiny.toml"]\n'))
    assert (turned.model.width, turned.optim.lr, turned.train.epochs, turned.train.clip_norm) == (0.125, 0.05, 2, 1.0)
    one = loading.load(write(tmp_path, "one.toml", 'extends = ["tiny.toml"]\n'))
    assert one.model_copy(update={"name": "tiny"}) == loading.load(config_file)


def test_a_config_may_be_extended_twice_but_not_by_itself(config_file: Path, tmp_path: Path) -> None:
    for name in ("left", "right"):
        write(tmp_path, f"{name}.toml", f'extends = "tiny.toml"\nseed = {len(name)}\n')
    both = loading.load(write(tmp_path, "both.toml", 'extends = ["left.toml", "right.toml"]\n'))
    assert both.seed == 5
    write(tmp_path, "left.toml", 'extends = ["tiny.toml", "both.toml"]\n')
    with pytest.raises(UserError, match="both.toml: extends itself via both.toml and left.toml"):
        loading.load(tmp_path / "both.toml")


def test_a_table_with_a_type_replaces_the_whole_table(config_file: Path, tmp_path: Path) -> None:
    """Also if the type is the same: otherwise a cosine that extends a bouncing cosine would bounce too."""
    text = config_file.read_text().replace("lr = 0.05", "lr = 0.05\nmomentum = 0.8")
    write(tmp_path, "base.toml", text.replace("[schedule]", '[schedule]\ntype = "cosine"\nperiod_epochs = 1'))
    child = write(tmp_path, "child.toml", 'extends = "base.toml"\n[optim]\ntype = "adam"\nlr = 0.001\n')
    assert loading.load(child).optim == schema.Adam(lr=0.001)
    single = write(tmp_path, "single.toml", 'extends = "base.toml"\n[optim]\nnesterov = true\n')
    assert loading.load(single).optim == schema.SGD(lr=0.05, momentum=0.8, nesterov=True)
    assert loading.load(single).schedule == schema.Cosine(period_epochs=1, warmup_epochs=0.5)
    write(tmp_path, "recipe.toml", '[schedule]\ntype = "cosine"\nlr_min = 0.01\n')
    for names in ('["base.toml", "recipe.toml"]', '["single.toml", "recipe.toml"]'):
        config = loading.load(write(tmp_path, "listed.toml", f"extends = {names}\n"))
        assert config.schedule == schema.Cosine(lr_min=0.01)


def test_mistakes_name_the_file_they_are_in(config_file: Path, tmp_path: Path) -> None:
    write(tmp_path, "base.toml", config_file.read_text().replace("lr = 0.05", "lrr = 0.05"))
    child = write(tmp_path, "child.toml", 'extends = "base.toml"\n[train]\nepoch = 7\n')
    with pytest.raises(UserError) as raised:
        loading.load(child)
    lines = str(raised.value).splitlines()
    assert f"{child}: train.epoch: unknown key; did you mean train.epochs?" in lines
    assert f"{tmp_path / 'base.toml'}: optim.lrr: unknown key; did you mean optim.lr?" in lines
    recipe = write(tmp_path, "recipe.toml", '[schedule]\ntype = "sine"\n[train]\nepohcs = 3\n[data]\nhflip = 2\n')
    last = write(tmp_path, "last.toml", 'extends = ["child.toml", "recipe.toml"]\n[train]\nepochs = 1.5\n')
    with pytest.raises(UserError) as raised:
        loading.load(last, data=tmp_path / "data.toml")
    lines = str(raised.value).splitlines()
    assert [line.partition(": ")[0] for line in lines if "optim.lrr" in line] == [str(tmp_path / "base.toml")]
    assert [line.partition(": ")[0] for line in lines if "train.epoch:" in line] == [str(child)]
    assert [line.partition(": ")[0] for line in lines if "epohcs" in line] == [str(recipe)]
    assert [line.partition(": ")[0] for line in lines if "schedule.type" in line] == [str(recipe)]
    assert [line.partition(": ")[0] for line in lines if "train.epochs: 1.5" in line] == [str(last)]
    assert not [line for line in lines if "hflip" in line]  # the whole table came from another file
    with pytest.raises(UserError, match=r"last.toml: model: missing"):
        loading.load(write(tmp_path, "last.toml", 'extends = ["recipe.toml"]\n'))
    for text, message in (
        ('extends = "none.toml"', "none.toml: no such config"),
        ('extends = ["tiny.toml", "none.toml"]', "none.toml: no such config"),
        ("extends = 3", "bad.toml: extends: 3 given; expected the name of a config file, or a list of names"),
        ('extends = ["tiny.toml", 3]', r"extends: \['tiny.toml', 3\] given; expected the name"),
    ):
        with pytest.raises(UserError, match=message):
            loading.load(write(tmp_path, "bad.toml", text))
    write(tmp_path, "a.toml", 'extends = "b.toml"')
    with pytest.raises(UserError, match="extends itself via a.toml and b.toml"):
        loading.load(write(tmp_path, "b.toml", 'extends = "a.toml"').with_name("a.toml"))
