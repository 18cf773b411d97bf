"""Optimizers, schedules and precision as plain functions of the config and the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bandsplit import schema


def optimizer(parameters: Iterable[torch.nn.Parameter], config: schema.Optim) -> torch.optim.Optimizer:
    """SGD for one branch, with torch's fused kernel."""
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def lr_at(step: int, steps_per_epoch: int, config: schema.RunConfig) -> float:
    """Learning rate of step 0, 1, …: linear warm-up to `optim.lr`, then half a cosine down to `lr_min`.

    Loshchilov and Hutter, SGDR (ICLR 2017), equation 5, without restarts and per step instead of per epoch.
    """
    peak, low = config.optim.lr, config.schedule.lr_min
    warmup = round(config.schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (config.train.epochs * steps_per_epoch - warmup)
    return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Precision:
    """What `train.precision` means on a device: `auto` is bf16 on a GPU and fp32 on a CPU."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        auto = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return {"auto": auto, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    @property
    def half_bands(self) -> bool:
        """Whether bands leave DALI as float16: where a GPU computes in 16 bits anyway."""
        return self.device.type == "cuda" and self.dtype != torch.float32

    def autocast(self) -> torch.autocast:
        """A context for the forward pass and the loss."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16 (Micikevicius et al., ICLR 2018); does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
