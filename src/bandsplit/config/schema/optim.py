"""[optim]: optimizers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from bandsplit.config.schema.base import Table, default_type, mistake


class _Optimizer(Table):
    """Keys that all optimizers share; every branch has its own optimizer."""

    lr: float = Field(gt=0)
    """Peak learning rate for the global batch, or with `base_batch` for a batch of that size."""
    base_batch: int | None = Field(None, ge=1)
    """Batch size that `lr` refers to; lr is scaled to train.batch_size."""
    scaling: Literal["linear", "sqrt"] = "linear"
    """With `base_batch`: scale lr linearly or with the square root of the batch size."""
    weight_decay: float = Field(1e-4, ge=0)
    """λ of L2 regularization, or of decoupled weight decay with `adamw` and `lamb`."""
    decay_norm_and_bias: bool = True
    """Whether weight decay also applies to norm parameters and biases (all one-dimensional parameters)."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor from the lr of a layer to that of the layer before it (Bao et al., BEiT, 2022): the head has the whole lr,
    the stem the smallest. Layers are the stem, residual blocks and the head, or single convolutions; 1: one lr."""


class SGD(_Optimizer):
    type: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum; 0: none."""
    nesterov: bool = False
    """Nesterov's momentum, as in torch."""

    @model_validator(mode="after")
    def _check(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise mistake("optim.momentum", self.momentum, "above 0 with optim.nesterov")
        return self


Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)]


class Adam(_Optimizer):
    """Adam with L2 regularization: weight decay is added to the gradient."""

    type: Literal["adam"] = "adam"
    betas: Betas = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to what the mean gradient is divided by."""


class AdamW(_Optimizer):
    """Adam with decoupled weight decay."""

    type: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to what the mean gradient is divided by."""


class RMSprop(_Optimizer):
    type: Literal["rmsprop"] = "rmsprop"
    alpha: float = Field(0.9, gt=0, lt=1)
    """Decay of the mean of squared gradients."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum; 0: none."""
    eps: float = Field(1e-8, gt=0)
    """Added to what the gradient is divided by."""
    centered: bool = False
    """Divides by the standard deviation of the gradient instead of its root mean square."""


class Lamb(_Optimizer):
    """timm's LAMB; needs pip install -e .[timm]."""

    type: Literal["lamb"] = "lamb"
    betas: Betas = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = Field(1e-6, gt=0)
    """Added to what the mean gradient is divided by."""


Optim = Annotated[SGD | Adam | AdamW | RMSprop | Lamb, Field(discriminator="type"), default_type("sgd")]
