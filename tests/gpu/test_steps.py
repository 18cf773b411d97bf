"""Steps replayed as CUDA graphs on several streams, against steps taken in turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.data.loader import Batch
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks
from bandsplit.models.precision import Precision
from bandsplit.training import optimizers
from bandsplit.training.learner import Learner, learners_of
from bandsplit.training.steps import Graphs, InTurn, steps_of
from tests.training.test_learner import OPTIMIZERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

LARGE = ["data.image_size=64", "data.resize_size=64", "train.batch_size=12"]


def prepared(config_file: Path, keys: list[str], graphs: bool) -> tuple[InTurn, list[Learner], RunConfig]:
    config = loading.load(config_file, [*LARGE, *keys, f"train.cuda_graphs={str(graphs).lower()}"]).with_classes(10)
    device = torch.device("cuda", 0)
    mesh = Mesh(Ranks(0, 1, 0, 1, device), len(config.split.groups))
    precision = Precision(config.train.precision, device)
    precision.apply()
    torch.backends.cudnn.deterministic = True
    _, learners = learners_of(config, 12, precision, mesh)
    return steps_of(learners, config, mesh, lambda i, step: torch.manual_seed(100 * i + step)), learners, config


def batch_of(config: RunConfig, step: int, size: int = 32, parts: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)

    def one() -> Batch:
        shapes = [(12 // parts, 3 * len(group), size, size) for group in config.split.groups]
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        labels = torch.randint(10, (12 // parts,), generator=generator)
        return Batch([x.cuda().to(memory_format=torch.channels_last) for x in inputs], labels.cuda())

    return [one() for _ in range(parts)]


@torch.no_grad()  # a gradient function of a weight that lives on keeps its stream, and a graph cannot be captured
def state(learners: list[Learner]) -> list[Tensor]:
    modules = [learner.validated for learner in learners]
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    return [*tensors, *(x for learner in learners for x in optimizers.state_of(learner.optimizer).values())]


@pytest.mark.parametrize(
    "keys",
    [
        *(OPTIMIZERS[name] for name in ("sgd", "nesterov", "plain", "adam", "adamw")),
        ["train.ema_decay=0.9", "train.on_nonfinite=skip"],
        ["train.precision=fp16"],
        ["optim.layer_decay=0.7", "train.freeze=conv1,bn1", "optim.decay_norm_and_bias=false"],
        ["train.clip_norm=1.0", "train.branches_at_once=1"],
        ["train.branches_at_once=16", "split.block=4"],
        ["loss.smoothing=0.1", "train.grad_accum_steps=2"],
        ["model.arch=alexnet", "model.width=1", "data.image_size=224", "data.resize_size=224"],
    ],
    ids=str,
)
def test_graphs_do_what_steps_in_turn_do(config_file: Path, keys: list[str]) -> None:
    """Over changing learning rates. AlexNet has dropout."""
    found, losses, taken = [], [], []
    keys = ["train.precision=fp32", *keys]
    for graphs in (False, True):
        take, learners, config = prepared(config_file, keys, graphs)
        assert isinstance(take, Graphs) == graphs
        size = config.data.image_size // config.split.block
        for step in range(7):
            parts = batch_of(config, step, size, config.grad_accum_steps)
            outcomes = take(range(len(learners)), parts, step, lr=0.01 * (1 + step % 3))
            losses.append(torch.stack([outcomes[i].loss for i in range(len(learners))]).tolist())
            taken.append([bool(outcomes[i].taken) for i in range(len(learners))])
        found.append(state(learners))
        assert all(isinstance(group["lr"], float) for x in learners for group in x.optimizer.param_groups)
    assert taken[:7] == taken[7:]
    assert all(taken[6])
    torch.testing.assert_close(torch.tensor(losses[:7]), torch.tensor(losses[7:]), rtol=1e-3, atol=1e-3)
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_branches_take_turns_where_one_of_them_has_dropout(config_file: Path) -> None:
    """Also the first alone: its dropout is that of its own seed in every step."""
    tables = [f"[[branch]]\nbands = [{k}]\n" for k in range(4)]
    tables[0] += 'arch = "mobilenet_v3_small"\n'
    config_file.write_text("\n".join([config_file.read_text(), *tables]))
    losses, found = [], []
    for graphs in (False, True):
        take, learners, config = prepared(config_file, ["train.precision=fp32"], graphs)
        for step in range(7):
            outcomes = take(range(4), batch_of(config, step), step, lr=0.01)
            losses.append(torch.stack([outcomes[i].loss for i in range(4)]).tolist())
        found.append(state(learners))
    assert isinstance(take, Graphs)
    assert len({graph.stream for graph in take._graphs}) == 1
    torch.testing.assert_close(torch.tensor(losses[:7]), torch.tensor(losses[7:]), rtol=1e-3, atol=1e-3)
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_other_branches_and_other_sizes_are_captured_again(config_file: Path) -> None:
    (turn, theirs, config), (graphs, ours, _) = (
        prepared(config_file, ["train.precision=fp32"], g) for g in (False, True)
    )
    for step in range(16):
        branches = [0, 1, 2, 3] if step < 5 else [0, 2]
        parts = batch_of(config, step, 32 if step < 10 else 16)
        for take in (turn, graphs):
            assert sorted(take(branches, parts, step, lr=0.01)) == branches
    for expected, got in zip(state(theirs), state(ours), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_gradients_that_are_not_finite_change_nothing(config_file: Path) -> None:
    take, learners, config = prepared(config_file, ["train.on_nonfinite=skip"], graphs=True)
    for step in range(6):
        parts = batch_of(config, step)
        before = [x.detach().clone() for x in state(learners)]
        if step == 4:
            parts[0].inputs[1].fill_(float("inf"))
        outcomes = take(range(4), parts, step, lr=0.01)
        assert [bool(outcomes[i].taken) for i in range(4)] == [True, step != 4, True, True]
    assert all(bool(learner.finite()) for learner in learners)
    assert any(not torch.equal(a, b) for a, b in zip(before, state(learners), strict=True))


def test_the_host_does_not_wait(config_file: Path) -> None:
    take, _, config = prepared(config_file, [], graphs=True)
    for step in range(5):
        parts = batch_of(config, step)
        torch.cuda.set_sync_debug_mode("error" if step > Graphs.WARM_UP else "default")
        try:
            take(range(4), parts, step, lr=0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", [False, True])
def test_the_host_is_at_most_one_step_ahead(config_file: Path, graphs: bool) -> None:
    take, _, config = prepared(config_file, [], graphs)
    batches = [batch_of(config, step) for step in range(10)]  # their copies to the device make the host wait
    ends, ahead = [], 0
    for step, parts in enumerate(batches):
        torch.cuda._sleep(10**8)  # a device that is slower than the host
        take(range(4), parts, step, lr=0.01)
        ends.append(torch.cuda.Event())
        ends[-1].record()
        assert all(end.query() for end in ends[:-2])
        ahead += not ends[-1].query()
    assert ahead  # the device was slower indeed


@pytest.mark.parametrize(
    "key", ["train.on_nonfinite=lower_lr", "train.activation_checkpointing=true", "optim.type=rmsprop"]
)
def test_what_cannot_be_captured_is_taken_in_turn(config_file: Path, key: str) -> None:
    assert not isinstance(prepared(config_file, [key], graphs=True)[0], Graphs)
