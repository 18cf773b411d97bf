"""Loading a config from files and --set: encodings, short forms of values, a change of type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bandsplit.config import loading, schema
from bandsplit.errors import UserError
from tests.conftest import REPOSITORY, Done

# --set ---------------------------------------------------------------------------------------------------------------


def test_lists_without_brackets(config_file: Path) -> None:
    keys = ["schedule.type=step", "schedule.milestones=30,60, 80", "model.tweaks=d,c", "data.mean=1,2.5,3"]
    config = loading.load(config_file, [*keys, "split.branches=[0],[1,2]", "name=a,b", "data.root=/data/a,b"])
    assert (config.schedule.milestones, config.model.tweaks, config.data.mean) == (
        (30, 60, 80),
        ("c", "d"),
        (1, 2.5, 3),
    )
    assert (config.split.branches, config.name, config.data.root) == (((0,), (1, 2)), "a,b", "/data/a,b")


def test_set_of_another_type_drops_the_keys_that_only_the_old_type_has(config_file: Path) -> None:
    text = config_file.read_text().replace(
        "lr = 0.05", "lr = 0.05\nmomentum = 0.8\nnesterov = true\nweight_decay = 0.3"
    )
    config_file.write_text(text)
    adamw = ["optim.type=adamw"]
    assert loading.load(config_file, adamw).optim == schema.AdamW(lr=0.05, weight_decay=0.3)
    assert loading.load(config_file, ["optim.lr=0.1", *adamw]).optim == schema.AdamW(lr=0.1, weight_decay=0.3)
    rmsprop = schema.RMSprop(lr=0.05, weight_decay=0.3, momentum=0.8)
    assert loading.load(config_file, ["optim.type=rmsprop"]).optim == rmsprop
    assert loading.load(config_file, ["optim.type=sgd"]) == loading.load(config_file)
    assert loading.load(config_file, ["schedule.type=constant"]).schedule == schema.Constant(warmup_epochs=0.5)
    for overrides in (["optim.momentum=0.5", *adamw], [*adamw, "optim.momentum=0.5"]):
        with pytest.raises(UserError, match="--set optim.momentum=0.5: optim.momentum: unknown key"):
            loading.load(config_file, overrides)
    config_file.write_text(text.replace("nesterov", "nestrov"))
    with pytest.raises(UserError, match=f"{config_file}: optim.nestrov: unknown key"):
        loading.load(config_file, adamw)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_read(config_file: Path) -> None:
    config, data_file = loading.load(config_file), config_file.with_name("data.toml")
    for path in (config_file, data_file):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert loading.load(config_file) == config
    config_file.write_bytes(config_file.read_text(encoding="utf-8-sig").encode("utf-16"))
    with pytest.raises(UserError, match=f"{config_file}: not UTF-8 .*; save it as UTF-8"):
        loading.load(config_file)


def test_a_line_that_is_not_toml_is_shown(config_file: Path) -> None:
    config_file.write_text("[optim]\nlr = 0.1\n  nesterov = True\n")
    with pytest.raises(UserError, match=r"tiny.toml: not valid TOML: .* line 3, column 14\): nesterov = True$"):
        loading.load(config_file)


def test_a_config_that_cannot_be_read_is_one_message(config_file: Path, unprivileged: Callable[..., Done]) -> None:
    config_file.chmod(0)
    done = unprivileged(REPOSITORY / "src/train.py", config_file, "--dry-run")
    assert done.returncode == 2
    assert done.stderr == f"error: {config_file}: cannot be read: Permission denied\n"
