"""Learning rate and momentum as functions of the step."""

from __future__ import annotations

import math

from bandsplit.config import schema


def lr_at(step: int, steps_per_epoch: int, config: schema.RunConfig) -> float:
    """Learning rate of a step, counted from 0: linear warm-up to the peak, then the schedule."""
    peak, warmup = config.peak_lr, _warmup_steps(steps_per_epoch, config)
    if step < warmup:
        return peak * (step + 1) / warmup
    done, total = step - warmup, _scheduled_steps(steps_per_epoch, config)
    match config.schedule:
        case schema.Cosine() as cosine:
            period = total if cosine.period_epochs is None else max(1, cosine.period_epochs * steps_per_epoch)
            at = done % period if cosine.after == "restart" else done
            return _between(cosine.lr_min, peak, at / period)
        case schema.Step() as steps:
            return peak * math.pow(steps.gamma, _steps_down(step, steps_per_epoch, steps))
        case schema.OneCycle() as cycle:
            start, end = peak * cycle.start_factor, peak * cycle.end_factor
            return _one_cycle(done, total, cycle.peak_at, start, peak, end)
        case schema.Linear() as line:
            return peak + (line.lr_min - peak) * done / total
        case schema.Constant():
            return peak


def momentum_at(step: int, steps_per_epoch: int, config: schema.RunConfig) -> float | None:
    """Momentum (Adam's beta1) of a step, counted from 0. None if the schedule does not change it."""
    cycle, warmup = config.schedule, _warmup_steps(steps_per_epoch, config)
    if not isinstance(cycle, schema.OneCycle) or cycle.momentum is None:
        return None
    low, high = cycle.momentum
    total = _scheduled_steps(steps_per_epoch, config)
    return high if step < warmup else _one_cycle(step - warmup, total, cycle.peak_at, high, low, high)


def _warmup_steps(steps_per_epoch: int, config: schema.RunConfig) -> int:
    return round(config.schedule.warmup_epochs * steps_per_epoch)


def _scheduled_steps(steps_per_epoch: int, config: schema.RunConfig) -> int:
    """Steps after the warm-up; 1 where it rounds up to all steps, so that the step after them has a value too."""
    return max(1, config.train.epochs * steps_per_epoch - _warmup_steps(steps_per_epoch, config))


def _between(low: float, high: float, progress: float) -> float:
    """Half a cosine from `high` (progress 0) to `low` (1), periodic: Loshchilov and Hutter, SGDR (2017), equation 5."""
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def _steps_down(step: int, steps_per_epoch: int, steps: schema.Step) -> float:
    """How many times the learning rate has been multiplied by gamma."""
    if steps.every_epochs is not None:
        return step // (steps.every_epochs * steps_per_epoch)
    return sum(step >= milestone * steps_per_epoch for milestone in steps.milestones)


def _one_cycle(step: int, total: int, peak_at: float, start: float, peak: float, end: float) -> float:
    """Cosine from `start` up to `peak` and down to `end`, as in torch's OneCycleLR; `peak` where that divides by 0."""
    top = peak_at * total - 1
    if step <= top:
        return _between(peak, start, step / top) if top else peak
    return _between(end, peak, (step - top) / (total - 1 - top))
