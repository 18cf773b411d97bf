"""Distributing branches over ranks does not change results: four gloo processes against one."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bandsplit.config import loading
from bandsplit.config.schema import RunConfig
from bandsplit.data.feed import BatchFeed
from bandsplit.data.loader import Batch, open_data
from bandsplit.distributed.mesh import Mesh
from bandsplit.distributed.ranks import Ranks, joined
from bandsplit.distributed.traffic import branch_groups, possible_groups, step_traffic
from bandsplit.errors import ReportedElsewhere, UserError
from bandsplit.evaluation.evaluate import Accuracy, evaluate
from bandsplit.models import batch_norm
from bandsplit.models.costs import costs_of
from bandsplit.models.ensemble import Ensemble, parameters_of_branches
from bandsplit.models.precision import Precision
from bandsplit.training.learner import Learner
from tests.conftest import REPOSITORY, on_ranks

RANKS, BATCH, PARTS = 4, 4, 2  # BATCH images of a rank at once, in PARTS batches a step
Gradients = dict[str, Tensor]


def batches(groups: tuple[tuple[int, ...], ...], rank: int) -> list[Batch]:
    """Batches as from this rank's pipeline: inputs of all branches, in channels_last as from the operator."""
    generator = torch.Generator().manual_seed(rank)

    def inputs() -> list[Tensor]:
        sizes = [(BATCH, 3 * len(group), 16, 16) for group in groups]
        return [torch.randn(s, generator=generator).to(memory_format=torch.channels_last) for s in sizes]

    return [Batch(inputs(), torch.randint(0, 10, (BATCH,), generator=generator)) for _ in range(PARTS)]


def without_norms(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        without_norms(child)
    return module


def step_on_mesh(config: RunConfig, branch_groups: int, norms: bool) -> tuple[Gradients, Gradients]:
    """Gradients and buffers of this rank's branches, by branch and name, after one real step on the mesh."""
    with joined(60) as ranks:
        mesh = Mesh(ranks, len(config.split.groups), branch_groups)
        ensemble = Ensemble.of(config, mesh.own)
        at_once = BATCH * branch_groups
        bn_batch_size = batch_norm.bn_batch_size(config, at_once, mesh.replicas)
        for branch in ensemble.branches:
            batch_norm.fit(branch, bn_batch_size, at_once, mesh) if norms else without_norms(branch)
        ensemble = ensemble.double().to(memory_format=torch.channels_last)
        gradients: Gradients = {}
        feed = BatchFeed(itertools.cycle(batches(config.split.groups, ranks.rank)), mesh)
        parts = feed.take(PARTS, ahead=True)
        for i, branch in enumerate(ensemble.branches):
            learner = Learner(branch, config, Precision("fp32", ranks.device), mesh)

            def keep(*_: object, k: int = mesh.own[i], branch: nn.Module = branch) -> None:
                gradients.update({f"{k}.{name}": p.grad.clone() for name, p in branch.named_parameters()})

            learner.optimizer.register_step_pre_hook(keep)
            learner.step([part.inputs[i].double() for part in parts], [part.labels for part in parts], lr=0.1)
        with mesh.mean_buffers(ensemble):
            buffers = {
                f"{k}.{name}": buffer.clone()
                for k, branch in zip(mesh.own, ensemble.branches, strict=True)
                for name, buffer in branch.named_buffers()
            }
        return gradients, buffers


def step_alone(config: RunConfig, bn_batch_size: int | None) -> tuple[Gradients, Gradients]:
    """Gradients and buffers with plain autograd: torch's batch norm over `bn_batch_size` images at a time."""
    ensemble = Ensemble.of(config).double()
    of_rank = [batches(config.split.groups, rank) for rank in range(RANKS)]
    gradients, buffers = {}, {}
    for k, branch in enumerate(ensemble.branches):
        if bn_batch_size is None:
            without_norms(branch)
        for part in range(PARTS):
            x = torch.cat([each[part].inputs[k] for each in of_rank]).double()
            y = torch.cat([each[part].labels for each in of_rank])
            at_start = [buffer.clone() for buffer in branch.buffers()]
            moved = []
            pieces = list(zip(x.split(bn_batch_size or len(x)), y.split(bn_batch_size or len(y)), strict=True))
            for piece, labels in pieces:
                for buffer, before in zip(branch.buffers(), at_start, strict=True):
                    buffer.copy_(before)
                loss = nn.functional.cross_entropy(branch(piece), labels) / PARTS / len(pieces)
                loss.backward()
                moved.append([buffer.clone() for buffer in branch.buffers()])
            for buffer, *values in zip(branch.buffers(), *moved, strict=True):
                buffer.copy_(torch.stack(values).double().mean(dim=0))
        gradients |= {f"{k}.{name}": p.grad for name, p in branch.named_parameters()}
        buffers |= {f"{k}.{name}": buffer for name, buffer in branch.named_buffers()}
    return gradients, buffers


@pytest.mark.parametrize(
    "norms",
    [pytest.param("all", marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.long) for n in (8, 2)), "absent"],
)
def test_gradients_do_not_depend_on_the_number_of_branch_groups(config_file: Path, norms: str | int) -> None:
    """Batch norm over all 16 images; over 8, which for 1, 2 and 4 groups joins ranks, is a rank's batch, or part of it;
    over 2; and no batch norm.  In float64: only the order of additions differs."""
    keys = [f"train.batch_size={RANKS * BATCH * PARTS}", f"train.grad_accum_steps={PARTS}", "model.stem=small"]
    config = loading.load(config_file, [*keys, f"model.bn_batch_size={'all' if norms == 'absent' else norms}"])
    alone, alone_buffers = step_alone(config, {"all": 16, "absent": None}.get(norms, norms))  # type: ignore[call-overload]
    for groups in (1, 2, 4):
        results = on_ranks(RANKS, step_on_mesh, config, groups, norms != "absent")
        seen = set()
        for gradients, buffers in results:
            assert len({name.split(".")[0] for name in gradients}) == 4 // groups
            seen |= gradients.keys()
            for name, gradient in gradients.items():
                scale = alone[name].abs().max()
                torch.testing.assert_close(gradient, alone[name], rtol=0, atol=1e-9 * float(scale), msg=name)
            for name, buffer in buffers.items():
                torch.testing.assert_close(buffer, alone_buffers[name], rtol=1e-9, atol=1e-9, msg=name)
        assert seen == alone.keys()


def mean_in_a_context_that_fails() -> tuple[float, float]:
    """A running mean within the context and after an error in it; before, it is the rank."""
    with joined(60) as ranks:
        norm = nn.BatchNorm1d(1)
        assert norm.running_mean is not None
        norm.running_mean.fill_(ranks.rank)
        with suppress(KeyError), Mesh(ranks, 1).mean_buffers(norm):
            within = norm.running_mean.item()
            raise KeyError
        return within, norm.running_mean.item()


def test_each_rank_gets_its_own_buffers_back_after_an_error() -> None:
    assert on_ranks(2, mean_in_a_context_that_fails) == [(0.5, 0.0), (0.5, 1.0)]


def exchange_and_give_back(groups: tuple[tuple[int, ...], ...], half: bool) -> list[bool]:
    """Checks that every value arrives at its rank, in order and in channels_last, and that logits are returned."""
    with joined(60) as ranks:
        mesh = Mesh(ranks, len(groups), 2)
        sent = batches(groups, ranks.rank)
        if half:
            sent = [Batch([x.half() for x in batch.inputs], batch.labels) for batch in sent]
        right = []
        feed = BatchFeed(iter(sent), mesh)
        for n, batch in enumerate(feed):
            replica = [batches(groups, 2 * mesh.replica + i)[n] for i in range(2)]
            for x, k in zip(batch.inputs, mesh.own, strict=True):
                wanted = torch.cat([each.inputs[k] for each in replica])
                right.append(torch.equal(x, wanted.half() if half else wanted))
                right.append(x.is_contiguous(memory_format=torch.channels_last))
            right.append(torch.equal(batch.labels, torch.cat([each.labels for each in replica])))
            pooled = torch.stack([x.float().sum(dim=(1, 2, 3))[:, None] for x in batch.inputs])
            logits, labels = feed.of_own_images(pooled, batch.labels)
            right.append(torch.equal(labels, sent[n].labels))
            wanted = torch.stack([x.float().sum(dim=(1, 2, 3))[:, None] for x in sent[n].inputs])
            right.append(torch.allclose(logits, wanted, atol=1e-3))
        return [*right, n + 1 == PARTS]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "groups",
    [
        *(pytest.param(each, marks=pytest.mark.slow) for each in (((0,), (1,), (2,), (3,)), ((0,), (1, 2)))),
        ((0, 1, 2), (3,), (1,), (2, 3)),
    ],
)
def test_every_band_arrives_where_it_is_learnt(groups: tuple[tuple[int, ...], ...], half: bool) -> None:
    for right in on_ranks(RANKS, exchange_and_give_back, groups, half):
        assert all(right), right


def told_on_rank(roots: list[str], config: RunConfig) -> str:
    """The error of opening the data on a rank, when each rank has its own data folder."""
    with joined(60) as ranks:
        data = config.data.model_copy(update={"root": roots[ranks.rank]})
        try:
            train = open_data(config.model_copy(update={"data": data}), ranks)["train"]
        except (UserError, ReportedElsewhere) as error:
            return f"{type(error).__name__} {getattr(error, 'one_rank', '')} {error}"
        return f"{len(train)} images"


def test_data_that_is_missing_or_different_on_one_rank(config_file: Path, image_root: Path, tmp_path: Path) -> None:
    """Only the rank on which it happened reports it."""
    config, good = loading.load(config_file), str(image_root)
    fewer, renamed = (Path(shutil.copytree(image_root, tmp_path / name)) for name in ("fewer", "renamed"))
    next((fewer / "train").rglob("*.jpg")).unlink()
    file = next((renamed / "val").rglob("*.jpg"))
    file.rename(file.with_name("another.jpg"))
    assert on_ranks(3, told_on_rank, [good, good, good], config) == ["160 images"] * 3
    for wrong, message in (
        ("/nowhere", "data.root: /nowhere: no such folder"),
        (
            fewer,
            f"data.root: {fewer}: 159 images in train, which differ from the 160 of rank 0 in number, name, class",
        ),
        (renamed, "50 images in val, which differ from the 50 of rank 0 in number, name, class or size; every rank"),
    ):
        first, second, third = on_ranks(3, told_on_rank, [good, str(wrong), str(wrong)], config)
        assert re.search(f"UserError True rank 1 on .*: .*{message}", second)
        assert first.split() == third.split() == ["ReportedElsewhere"]
    first, second = on_ranks(2, told_on_rank, ["/nowhere", "/nowhere"], config)
    assert "UserError False data.root: /nowhere: no such folder" in first
    assert second.split() == ["ReportedElsewhere"]


def evaluate_on_mesh(config: RunConfig, branch_groups: int) -> Accuracy:
    with joined(60) as ranks:
        mesh = Mesh(ranks, len(config.split.groups), branch_groups)
        return evaluate(
            Ensemble.of(config, mesh.own), [*validation(config, ranks)], 25, mesh, Precision("fp32", ranks.device)
        )


def validation(config: RunConfig, ranks: Ranks) -> Iterator[Batch]:
    """25 images on any number of ranks, in batches padded without images."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(25, 3 * len(group), 16, 16, generator=generator) for group in config.split.groups]
    labels = torch.randint(0, 10, (25,), generator=generator)
    count = -(-25 // ranks.world_size // BATCH)
    for n in range(count):
        mine = [ranks.rank + ranks.world_size * (n * BATCH + i) for i in range(BATCH)]
        kept = torch.tensor([labels[i] if i < 25 else -1 for i in mine])
        yield Batch([x[[min(i, 24) for i in mine]] for x in inputs], kept)


def test_validation_counts_do_not_depend_on_the_number_of_branch_groups(config_file: Path) -> None:
    config = loading.load(config_file)
    (alone,) = on_ranks(1, evaluate_on_mesh, config, 1)
    for groups in (1, 2, 4):
        for accuracy in on_ranks(RANKS, evaluate_on_mesh, config, groups):
            assert accuracy.loss == pytest.approx(alone.loss, abs=1e-6)
            assert (accuracy.top1, accuracy.top5) == (alone.top1, alone.top5)
            assert (accuracy.branch_top1, accuracy.branch_top5) == (alone.branch_top1, alone.branch_top5)


SUB16 = REPOSITORY / "config/train/resnet34_sub16.toml"


def test_traffic_of_the_published_ensemble() -> None:
    """Sixteen ResNet-34, 2048 images of 224², eight ranks: computed by hand from the formula."""
    config = loading.load(SUB16, ["train.batch_size=2048"])
    parameters, _ = parameters_of_branches(config)
    plain, spread = (step_traffic(config, 8, g, parameters, half=True) for g in (1, 8))
    assert plain.bytes == pytest.approx(2 * 7 / 8 * 4 * sum(parameters))
    assert plain.bytes == pytest.approx(2.4e9, rel=0.02)
    assert spread.bytes == pytest.approx(256 * 224 * 224 * 3 * 2 * 7 / 8)
    assert plain.bytes / spread.bytes > 30
    assert spread.branches == 2
    assert branch_groups(config, 8, parameters, half=True) == 8


def test_frozen_weights_send_no_gradients() -> None:
    parts = "train.freeze=conv1,bn1,layer1,layer2,layer3"
    config = loading.load(SUB16, ["train.batch_size=2048", parts])
    parameters, trained = parameters_of_branches(config)
    assert parameters == [cost.parameters for cost in costs_of(config)]
    assert trained == [cost.trained for cost in costs_of(config)]
    last = 2 * 9 * 512 * 512 * 3 - 9 * 512 * 256 + 512 * 256 + 7 * 2 * 512  # the weights of layer4 and of its norms
    assert trained == [last + 512 * 1000 + 1000] * 16
    assert step_traffic(config, 8, 1, trained, half=True).bytes == pytest.approx(2 * 7 / 8 * 4 * sum(trained))


def test_auto_takes_the_least_traffic() -> None:
    """Plain data parallelism sends less if images are large and branches have few parameters."""
    config = loading.load(SUB16, ["train.batch_size=2048"])
    assert branch_groups(config, 1, [10] * 16, half=True) == 1
    assert branch_groups(config, 8, [10] * 16, half=True) == 1
    assert branch_groups(config, 8, [10**8] * 16, half=True) == 8
    assert possible_groups(config, 24) == [1, 2, 4, 8]


@pytest.mark.parametrize(("groups", "world_size"), [(3, 6), (8, 4), (5, 1)])
def test_groups_that_do_not_divide_are_refused(groups: int, world_size: int) -> None:
    config = loading.load(SUB16, [f"parallel.branch_groups={groups}"])
    with pytest.raises(
        UserError, match=rf"parallel.branch_groups: {groups} given, but it has to divide {world_size} r"
    ):
        branch_groups(config, world_size, [1] * 16, half=True)


def test_a_bn_batch_size_that_does_not_fit_is_refused(config_file: Path) -> None:
    config = loading.load(config_file, ["model.bn_batch_size=5"])
    with pytest.raises(
        UserError, match="5 given, but a forward pass has 12 images .* allowed: 1, 2, 3, 4, 6, 12, 'rank' or"
    ):
        batch_norm.bn_batch_size(config, at_once=12, replicas=1)
    with pytest.raises(UserError, match="model.bn_batch_size: 'some' given; allowed: 'rank', 'all' or an integer >= 1"):
        loading.load(config_file, ["model.bn_batch_size=some"])
