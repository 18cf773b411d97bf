"""Fitted fusion: convex, at its optimum, what other optimizers find, and worth nothing on noise."""

from __future__ import annotations

import cvxpy
import numpy as np
import pytest
import scipy.optimize
import torch
from numpy.typing import NDArray

from bandsplit.models import fusion

Arrays = tuple[NDArray[np.float16], NDArray[np.int64]]

STRENGTHS = [(2.0, 1.0, 1.0, 0.0), (1.0,), (3.0, 3.0, 0.5), (20.0, 3.0, 1.0, 1.0)]
"""How far each branch lifts the right class above noise; the last separates all images."""


def drawn(strengths: tuple[float, ...], images: int = 300, classes: int = 7, seed: int = 0) -> Arrays:
    """Logits of branches that see the class through independent noise, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, len(strengths), classes))
    logits[np.arange(images), :, labels] += strengths
    return (2 * logits + rng.normal(size=(images, 1, 1))).astype(np.float16), labels


def torchs_loss(
    logits: NDArray[np.float16], labels: NDArray[np.int64], weights: object, smoothing: float = 0.0
) -> torch.Tensor:
    fused = torch.einsum("k,nkc->nc", torch.as_tensor(weights), torch.from_numpy(logits).double())
    return torch.nn.functional.cross_entropy(fused, torch.from_numpy(labels), label_smoothing=smoothing)


@pytest.mark.parametrize(("at_once", "smoothing"), [(1, 0.0), (500, 0.1), (2**22, 0.0), (2**22, 0.01)])
def test_loss_gradient_and_accuracy_are_torchs(monkeypatch: pytest.MonkeyPatch, at_once: int, smoothing: float) -> None:
    monkeypatch.setattr(fusion, "_AT_ONCE", at_once)
    logits, labels = drawn(STRENGTHS[0])
    weights = np.array([0.7, 0.2, 0.0, 1.5])
    given = torch.tensor(weights, requires_grad=True)
    smoothed = torchs_loss(logits, labels, given, smoothing)
    smoothed.backward()
    loss, gradient = fusion.loss_and_gradient(logits, labels, weights, smoothing)
    assert loss == pytest.approx(smoothed.item(), rel=1e-12)
    assert gradient == pytest.approx(np.asarray(given.grad), rel=1e-10)
    losses, top1 = fusion.scores(logits, labels, np.stack([weights, np.eye(4)[1]]))
    assert losses == pytest.approx(
        [float(torchs_loss(logits, labels, each)) for each in (weights, np.eye(4)[1])], rel=1e-12
    )
    fused = np.einsum("k,nkc->nc", weights, logits.astype(float))
    assert top1[0] == pytest.approx(100 * (fused.argmax(1) == labels).mean())
    assert top1[1] == pytest.approx(100 * (logits[:, 1].astype(float).argmax(1) == labels).mean())


@pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
def test_every_start_ends_at_the_same_optimum(strengths: tuple[float, ...]) -> None:
    """Ten starts; where the gradient is positive the weight is zero (Karush, Kuhn, Tucker)."""
    logits, labels = drawn(strengths)
    rng, count = np.random.default_rng(1), len(strengths)
    losses = []
    for start in rng.uniform(0, 3, (10, count)):
        weights = fusion.least_loss(logits, labels, np.eye(count), start)
        loss, gradient = fusion.loss_and_gradient(logits, labels, weights, fusion.smoothing(len(labels)))
        losses.append(loss)
        assert np.all(weights >= 0)
        assert np.abs(weights - np.maximum(weights - gradient, 0)).max() < 1e-6
    assert max(losses) - min(losses) < 1e-8


@pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
def test_other_optimizers_agree(strengths: tuple[float, ...]) -> None:
    logits, labels = drawn(strengths, images=120)
    count, rest = len(strengths), fusion.smoothing(120)
    ours = fusion.least_loss(logits, labels, np.eye(count))
    loss = float(torchs_loss(logits, labels, ours, rest))

    weights = cvxpy.Variable(count, nonneg=True)
    z = logits.astype(float)
    z -= z.mean(-1, keepdims=True)
    targets = (1 - rest) * np.eye(7)[labels] + rest / 7
    terms = [cvxpy.log_sum_exp(x.T @ weights) - (x @ target) @ weights for x, target in zip(z, targets, strict=True)]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(cvxpy.hstack(terms)) / len(labels)))
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-7, tol_gap_rel=1e-7, tol_feas=1e-7)
    assert problem.status == "optimal"
    assert float(problem.value) == pytest.approx(loss, abs=1e-6)
    assert weights.value == pytest.approx(ours, rel=0.01, abs=1e-3)

    theirs = scipy.optimize.minimize(
        lambda a: float(torchs_loss(logits, labels, a, rest)),
        np.ones(count),
        method="SLSQP",
        bounds=[(0, None)] * count,
    )
    assert loss <= theirs.fun + 1e-9
    assert theirs.fun == pytest.approx(loss, abs=1e-4)


def test_the_temperature_is_the_best_scale_of_the_mean() -> None:
    logits, labels = drawn((2.0, 1.0, 1.0, 0.0))
    fitted = fusion.fit(logits, labels)["temperature"]
    scale = scipy.optimize.minimize_scalar(
        lambda t: float(torchs_loss(logits, labels, np.full(4, t / 4), fusion.smoothing(300))),
        bounds=(0, 20),
        method="bounded",
    )
    assert fitted.weights == pytest.approx([scale.x / 4] * 4, rel=1e-3)
    assert fitted.loss == pytest.approx(float(torchs_loss(logits, labels, np.full(4, scale.x / 4))), abs=1e-6)


def test_rank_weights_are_the_published_ones() -> None:
    """p (1 - p)^r by accuracy, best first, p by the accuracy of the fused logits."""
    weights = fusion.rank_weights(np.array([50.0, 70.0, 60.0]), 0.25)
    published = np.array([0.25 * 0.75**2, 0.25, 0.25 * 0.75])
    assert weights == pytest.approx(published / published.sum())
    logits, labels = drawn((1.0, 2.0, 0.5))
    fitted = fusion.fit(logits, labels)["rank"]
    z = logits.astype(float)
    alone = np.array([100 * (z[:, k].argmax(1) == labels).mean() for k in range(3)])
    reached = {
        p: (np.einsum("k,nkc->nc", fusion.rank_weights(alone, p), z).argmax(1) == labels).mean() for p in fusion.P
    }
    assert fitted.p is not None
    assert fitted.weights == pytest.approx(fusion.rank_weights(alone, fitted.p))
    assert reached[fitted.p] == max(reached.values())
    assert fitted.top1 == pytest.approx(100 * max(reached.values()))


@pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
def test_learned_fusion_is_never_worse_on_the_images_that_it_was_fitted_on(strengths: tuple[float, ...]) -> None:
    logits, labels = drawn(strengths)
    fitted = fusion.fit(logits, labels)
    assert tuple(fitted) == fusion.FUSIONS
    others = [*np.eye(len(strengths)), *(np.array(each.weights) for each in fitted.values())]
    losses = [fusion.loss_and_gradient(logits, labels, each, fusion.smoothing(300))[0] for each in others]
    least = losses[len(strengths) + fusion.FUSIONS.index("learned")]
    assert least <= min(losses) + 1e-9


def test_a_fit_to_few_images_that_it_separates_is_not_certain() -> None:
    """Where no image is wrong, the least cross-entropy without smoothing lies at infinite weights."""
    logits, labels = drawn((3.0, 3.0, 2.0, 1.0), images=20_000)
    fitted = fusion.fit(logits[:100], labels[:100])
    assert fitted["learned"].top1 == 100
    losses, top1 = fusion.scores(
        logits[100:], labels[100:], np.array([fitted[name].weights for name in ("learned", "mean")])
    )
    assert top1[0] >= top1[1]
    assert losses[0] < losses[1] / 2


def test_branches_of_noise_get_no_weight_and_gain_nothing() -> None:
    """On images that were not fitted on, one good branch with three of noise is as good as alone, within chance."""
    logits, labels = drawn((2.5, 0.0, 0.0, 0.0), images=20_000)
    fitted = np.array(fusion.fit(logits[:10_000], labels[:10_000])["learned"].weights)
    assert fitted[1:].max() < 0.03 * fitted[0]
    fresh, truth = logits[10_000:], labels[10_000:]
    fused = np.einsum("k,nkc->nc", fitted, fresh.astype(float)).argmax(1) == truth
    alone = fresh[:, 0].astype(float).argmax(1) == truth
    better, worse = (fused & ~alone).sum(), (alone & ~fused).sum()
    assert better - worse <= 3 * np.sqrt(better + worse)


def test_noise_alone_gets_no_weight() -> None:
    logits, labels = drawn((0.0, 0.0, 0.0), images=20_000)
    fitted = fusion.fit(logits, labels)["learned"]
    assert max(fitted.weights) < 0.02
    assert fitted.loss == pytest.approx(np.log(7), abs=1e-3)


def test_drop_keeps_the_branches_that_help() -> None:
    """Not noise, and one of two that are equal; without any of the rest, the loss is higher by torch's arithmetic."""
    for seed in range(2):
        logits, labels = drawn((2.0, 1.5, 1.0, 0.0, 0.0, 0.0), images=4_000, seed=seed)
        logits = np.concatenate([logits, logits[:, :1]], axis=1)
        weights = np.array(fusion.fit(logits, labels)["drop"].weights)
        kept = np.flatnonzero(weights)
        assert len({0, 6} & set(kept)) == 1
        assert {1, 2} <= set(kept)
        assert weights[kept] == pytest.approx(fusion.least_loss(logits[:, kept], labels, np.eye(len(kept))), rel=1e-4)

        def losses(which: NDArray[np.int64], logits: NDArray[np.float16] = logits, labels: object = labels) -> object:
            a = fusion.least_loss(logits[:, which], labels, np.eye(len(which)))
            fused = torch.einsum("k,nkc->nc", torch.from_numpy(a), torch.from_numpy(logits[:, which]).double())
            return torch.nn.functional.cross_entropy(fused, torch.from_numpy(labels), reduction="none").numpy()

        for k in kept:
            difference = losses(kept[kept != k]) - losses(kept)
            assert difference.mean() > difference.std() / np.sqrt(len(labels))


def test_drop_loses_nothing_beyond_chance() -> None:
    logits, labels = drawn((2.0, 1.0, 0.3, 0.0, 0.0, 0.0), images=12_000)
    fitted = fusion.fit(logits[:2_000], labels[:2_000])
    fewer, learned = (np.array(fitted[name].weights) for name in ("drop", "learned"))
    assert np.count_nonzero(fewer) < np.count_nonzero(learned)
    fresh, truth = logits[2_000:].astype(float), labels[2_000:]
    right = [np.einsum("k,nkc->nc", a, fresh).argmax(1) == truth for a in (fewer, learned)]
    better, worse = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
    assert abs(better - worse) <= 3 * np.sqrt(better + worse)
