"""Cascades: what they do with each image, what they may lose, and that they make nothing of noise."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from bandsplit.errors import UserError
from bandsplit.models import cascade, fusion
from bandsplit.models.cascade import Cascade
from tests.models.test_fusion import Arrays, drawn


def fitted(arrays: Arrays, loss: float) -> Cascade:
    logits, labels = arrays
    return cascade.fit(logits, labels, np.array(fusion.fit(logits, labels)["learned"].weights), loss)


def test_each_image_leaves_at_the_first_stage_that_is_certain() -> None:
    """Image by image and stage by stage, in float64."""
    logits, labels = drawn((2.0, 1.5, 0.0, 1.0), images=600)
    chain = fitted((logits, labels), 2.0)
    applied = cascade.apply(chain, logits)
    for image, (z, stage, predicted) in enumerate(zip(logits, applied.stages, applied.predicted, strict=True)):
        fused = np.zeros(7)
        for n, (k, weight, scale) in enumerate(zip(chain.order, chain.weights, chain.scales, strict=True)):
            fused += weight * z[k].astype(float)
            p = np.exp(scale * fused) / np.exp(scale * fused).sum()
            if p.max() > chain.threshold or n + 1 == len(chain.order):
                break
        assert (n, fused.argmax()) == (stage, predicted), image
    learned = np.array(fusion.fit(logits, labels)["learned"].weights)
    full = np.einsum("k,nkc->nc", learned, logits.astype(float)).argmax(1)
    assert np.mean(full == applied.full) > 0.998
    assert len(set(applied.stages)) > 1


def test_stages_add_the_branch_that_helps_most_and_are_calibrated() -> None:
    logits, labels = drawn((0.5, 2.0, 1.0, 1.5), images=4_000)
    chain = fitted((logits, labels), 1.0)
    assert chain.order == [1, 3, 2, 0]
    learned = np.array(fusion.fit(logits, labels)["learned"].weights)
    assert chain.weights == learned[chain.order].tolist()
    assert chain.scales[-1] == pytest.approx(1, abs=1e-3)
    for n, scale in enumerate(chain.scales, 1):
        basis = np.where(np.isin(np.arange(4), chain.order[:n]), learned, 0)[:, None]
        assert basis[:, 0] * scale == pytest.approx(fusion.least_loss(logits, labels, basis), rel=1e-3)


@pytest.mark.parametrize(("images", "loss"), [(598, 0.5), (600, 2.0), (20_000, 0.5), (149, 2.0), (1_000, 10.0)])
def test_the_images_that_may_be_lost_are_those_of_the_exact_interval(images: int, loss: float) -> None:
    """Clopper and Pearson's, one-sided with 95 %, from scipy."""
    most = cascade.most_lost(images, loss)
    bounds = [scipy.stats.binomtest(lost, images).proportion_ci(0.90, method="exact").high for lost in (most, most + 1)]
    assert bounds[0] <= loss / 100 < bounds[1]


def test_too_few_images_for_a_loss() -> None:
    with pytest.raises(UserError, match=r"597 held-out images cannot .* 0.51 or more; 0.5 needs 598 held-out images"):
        cascade.most_lost(597, 0.5)
    cascade.most_lost(597, 0.51)


def test_not_more_is_lost_than_stated_on_other_images() -> None:
    """In 95 of 100 draws of the held-out images; the accuracy falls by less still."""
    logits, labels = drawn((2.0, 1.5, 1.0), images=29_000)
    fresh, truth = logits[-5_000:], labels[-5_000:]
    exceeded, loss = 0, 3.0
    for first in range(0, 24_000, 600):
        some = slice(first, first + 600)
        applied = cascade.apply(fitted((logits[some], labels[some]), loss), fresh)
        full, staged = applied.full == truth, applied.predicted == truth
        exceeded += 100 * np.mean(full & ~staged) > loss
        assert 100 * (full.mean() - staged.mean()) <= loss
        assert applied.stages.mean() < 1.9
    assert exceeded <= scipy.stats.binom.ppf(0.999, 40, cascade.RISK)


def test_branches_of_noise_come_last_and_gain_nothing() -> None:
    logits, labels = drawn((0.0, 2.5, 0.0, 0.0), images=12_000)
    chain = fitted((logits[:2_000], labels[:2_000]), 1.0)
    assert chain.order[0] == 1
    fresh, truth = logits[2_000:], labels[2_000:]
    right = cascade.apply(chain, fresh).predicted == truth
    alone = fresh[:, 1].argmax(1) == truth
    better, worse = (right & ~alone).sum(), (alone & ~right).sum()
    assert better - worse <= 3 * np.sqrt(better + worse)


def test_noise_alone_stays_at_chance() -> None:
    logits, labels = drawn((0.0, 0.0, 0.0), images=12_000)
    applied = cascade.apply(fitted((logits[:2_000], labels[:2_000]), 1.0), logits[2_000:])
    assert np.mean(applied.predicted == labels[2_000:]) == pytest.approx(1 / 7, abs=0.012)


def test_one_confident_branch_is_enough() -> None:
    """Where no image is lost, none waits for a second branch."""
    logits, labels = drawn((20.0, 1.0), images=600)
    chain = fitted((logits, labels), 2.0)
    assert chain.threshold == 0
    assert not cascade.apply(chain, logits).stages.any()
