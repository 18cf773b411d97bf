"""Optimizers, schedules, losses, mixing and precision as plain functions of the config and the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax, one_hot
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from bandsplit import schema, seeds
from bandsplit.errors import UserError

# ---------------------------------------------------------------------------------------------------- optimizers


def optimizer(branch: nn.Module, config: schema.RunConfig) -> torch.optim.Optimizer:
    """The optimizer of one branch, with torch's fused kernel where there is one.

    Without `optim.decay_norm_and_bias` there are two groups: weights, and what has one dimension at most, which is not
    decayed.  Raises UserError where LAMB is asked for and timm is not installed.
    """
    optim = config.optim
    parameters = [p for p in branch.parameters() if p.requires_grad]
    groups: Any = parameters
    if not optim.decay_norm_and_bias:
        weights, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        groups = [{"params": weights}, {"params": rest, "weight_decay": 0.0}]
    shared: dict[str, Any] = {"lr": config.peak_lr, "weight_decay": optim.weight_decay}
    match optim:
        case schema.SGD():
            sgd = torch.optim.SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov, fused=True, **shared)
            if optim.momentum:
                # torch makes these in the first step, and leaves what was in memory there if loss scaling skips it
                for p in parameters:
                    sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
            return sgd
        case schema.Adam():
            return torch.optim.Adam(groups, betas=optim.betas, eps=optim.eps, fused=True, **shared)
        case schema.AdamW():
            return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True, **shared)
        case schema.RMSprop():
            return torch.optim.RMSprop(
                groups, alpha=optim.alpha, momentum=optim.momentum, eps=optim.eps, centered=optim.centered, **shared
            )
        case schema.Lamb():
            try:
                from timm.optim import Lamb
            except ImportError as error:
                raise UserError("optim.type: 'lamb' needs timm: pip install bandsplit[timm]") from error
            lamb: torch.optim.Optimizer = Lamb(groups, betas=optim.betas, eps=optim.eps, **shared)
            return lamb


def running_mean(branch: nn.Module, config: schema.RunConfig) -> AveragedModel | None:
    """A copy of a branch that becomes the running mean of its weights and buffers, where `train.ema_decay` is set."""
    if config.train.ema_decay is None:
        return None
    average = get_ema_multi_avg_fn(config.train.ema_decay)  # type: ignore[no-untyped-call]
    return AveragedModel(branch, multi_avg_fn=average, use_buffers=True)


# ----------------------------------------------------------------------------------------------------- schedules


def lr_at(step: int, steps_per_epoch: int, config: schema.RunConfig) -> float:
    """Learning rate of step 0, 1, …: linear warm-up to the peak, then the schedule over the steps that are left."""
    peak, warmup = config.peak_lr, _warmup_steps(steps_per_epoch, config)
    if step < warmup:
        return peak * (step + 1) / warmup
    done, total = step - warmup, config.train.epochs * steps_per_epoch - warmup
    match config.schedule:
        case schema.Cosine() as cosine:
            period = total if cosine.period_epochs is None else cosine.period_epochs * steps_per_epoch
            at = done % period if cosine.after == "restart" else done
            return _between(cosine.lr_min, peak, at / period)
        case schema.Step() as steps:
            return peak * steps.gamma ** _steps_down(step, steps_per_epoch, steps)
        case schema.OneCycle() as cycle:
            start, end = peak * cycle.start_factor, peak * cycle.end_factor
            return _one_cycle(done, total, cycle.peak_at, start, peak, end)
        case schema.Linear() as line:
            return peak + (line.lr_min - peak) * done / total
        case schema.Constant():
            return peak


def momentum_at(step: int, steps_per_epoch: int, config: schema.RunConfig) -> float | None:
    """Momentum (Adam's first beta) of a step where the schedule moves it; None: as the optimizer has it."""
    cycle, warmup = config.schedule, _warmup_steps(steps_per_epoch, config)
    if not isinstance(cycle, schema.OneCycle) or cycle.momentum is None:
        return None
    low, high = cycle.momentum
    total = config.train.epochs * steps_per_epoch - warmup
    return high if step < warmup else _one_cycle(step - warmup, total, cycle.peak_at, high, low, high)


def _warmup_steps(steps_per_epoch: int, config: schema.RunConfig) -> int:
    return round(config.schedule.warmup_epochs * steps_per_epoch)


def _between(low: float, high: float, progress: float) -> float:
    """Half a cosine from `high` (progress 0) to `low` (1), and on: Loshchilov and Hutter, SGDR (2017), equation 5."""
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def _steps_down(step: int, steps_per_epoch: int, steps: schema.Step) -> int:
    if steps.every_epochs is not None:
        return int(step // (steps.every_epochs * steps_per_epoch))
    return sum(step >= milestone * steps_per_epoch for milestone in steps.milestones)


def _one_cycle(step: int, total: int, peak_at: float, start: float, peak: float, end: float) -> float:
    """Half a cosine up and half a cosine down, with the ends where torch's OneCycleLR has them."""
    top = peak_at * total - 1
    if step <= top:
        return _between(peak, start, step / top)
    return _between(end, peak, (step - top) / (total - 1 - top))


# -------------------------------------------------------------------------------------------------------- losses


def loss(logits: Tensor, target: Tensor, config: schema.Loss) -> Tensor:
    """Mean loss, a scalar.  Logits (B, classes); target: classes (B,), or shares (B, classes) of mixed pictures."""
    match config:
        case schema.CrossEntropy():
            return cross_entropy(logits, target, label_smoothing=config.smoothing)
        case schema.BinaryCrossEntropy():
            classes = logits.shape[-1]
            shares = one_hot(target, classes) if target.ndim == 1 else target
            shares = shares.to(logits.dtype) * (1 - config.smoothing) + config.smoothing / classes
            if config.target_threshold is not None:
                shares = (shares > config.target_threshold).to(logits.dtype)
            return binary_cross_entropy_with_logits(logits, shares)


def distilled(logits: Tensor, taught: Tensor, label_loss: Tensor, config: schema.Distillation) -> Tensor:
    """The loss of the labels, a scalar, with what a teacher's logits add to it; both logits (B, classes).

    Hinton, Vinyals and Dean (2015), section 2: T² keeps the gradients' size whatever the temperature T is.
    """
    own, teachers = (log_softmax(x.float() / config.temperature, dim=-1) for x in (logits, taught))
    divergence = kl_div(own, teachers, reduction="batchmean", log_target=True)
    return config.label_weight * label_loss + config.weight * config.temperature**2 * divergence


# -------------------------------------------------------------------------------------------------------- mixing


def mix(
    inputs: Sequence[Tensor], labels: Tensor, config: schema.RunConfig, batch: int, stream: int
) -> tuple[list[Tensor], Tensor]:
    """Mixup or CutMix of one batch, alike in all inputs, (B, channels, h, w) each, where h = w may differ; labels (B,).

    The split is linear and acts on each block alone, so mixing bands is mixing pictures, with boxes in whole blocks.
    Chance comes from the seed, the stream of pictures and the number of the batch in it.
    Returns inputs and labels (B, classes), float32, or all as it was where the config mixes nothing.
    """
    alphas = config.mix.mixup, config.mix.cutmix
    if not any(alphas):
        return list(inputs), labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derived(config.seed, f"mixing batch {batch}", stream))
        if torch.rand(()) >= config.mix.probability:
            return list(inputs), one_hot(labels, config.data.classes).float()
        cut = alphas[1] > 0 and (not alphas[0] or bool(torch.rand(()) < 0.5))
        transform = (v2.CutMix if cut else v2.MixUp)(alpha=alphas[cut], num_classes=config.data.classes)
        grid = math.gcd(*(x.shape[-1] for x in inputs))  # a box in this grid is a box in each of them
        drawn = transform.make_params([torch.empty(1, 1, grid, grid)])
    drawn |= {"labels": labels, "batch_size": len(labels)}
    mixed = []
    for x in inputs:
        box = {"box": [edge * (x.shape[-1] // grid) for edge in drawn["box"]]} if cut else {}
        mixed.append(transform.transform(x, drawn | box).contiguous(memory_format=torch.channels_last))
    return mixed, transform.transform(labels, drawn)


# ----------------------------------------------------------------------------------------------------- precision


@dataclass(frozen=True)
class Precision:
    """What `train.precision` means on a device: `auto` is bf16 on a GPU and fp32 on a CPU."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        auto = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        types = {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16}
        return types.get(self.name, torch.float32)

    @property
    def half_bands(self) -> bool:
        """Whether bands leave DALI as float16: where a GPU computes in 16 bits anyway."""
        return self.device.type == "cuda" and self.dtype != torch.float32

    def apply(self) -> None:
        """Lets a GPU round the factors of float32 products to TF32, or not; torch would do so in convolutions."""
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.name != "fp32"

    def autocast(self) -> torch.autocast:
        """A context for the forward pass and the loss."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16 (Micikevicius et al., ICLR 2018); does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
