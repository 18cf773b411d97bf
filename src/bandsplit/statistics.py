"""Statistics that follow from counts, in plain Python: the same in an evaluation and in a report on its file."""

from __future__ import annotations

import math
from collections.abc import Sequence

BINS = 15
"""Of the confidence, equally wide, for the expected calibration error."""


def calibration_error(bins: Sequence[Sequence[float]]) -> float:
    """Expected calibration error in percent: |accuracy - confidence| of each bin, weighted by its images.

    Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, equation 3.

    Args:
        bins: (BINS, 3): images, correct ones and sum of confidences.
    """
    images = sum(count for count, _, _ in bins)
    return 100 * sum(abs(correct - confidence) for _, correct, confidence in bins) / images


def gain_interval(weights: Sequence[float], better: float, worse: float, images: int) -> tuple[float, float]:
    """95 % interval in percent of the top-1 of a fusion above that of the mean.

    0 to 0 for equal weights, which predict what the mean does; see `paired_interval` for the others.
    """
    if len({*weights}) == 1 and weights[0] > 0 and better == worse == 0:
        return 0.0, 0.0
    return paired_interval(better, worse, images)


def paired_interval(better: float, worse: float, images: int) -> tuple[float, float]:
    """95 % interval in percent of the difference of two accuracies on the same images.

    The adjusted Wald interval of Bonett and Price (*Adjusted Wald Confidence Interval for a Difference of Binomial
    Proportions Based on Paired Data*, J. Educ. Behav. Stat. 37, 2012): one image more on either side, so that few
    images on which the two disagree do not look like certainty. The images on which both agree cancel.

    Args:
        better, worse: images that only the one, and only the other, classifies correctly.
    """
    b, c, n = better + 1, worse + 1, images + 2
    difference = (b - c) / n
    deviation = math.sqrt(((b + c) / n - difference**2) / n)
    return 100 * max(-1.0, difference - 1.96 * deviation), 100 * min(1.0, difference + 1.96 * deviation)
