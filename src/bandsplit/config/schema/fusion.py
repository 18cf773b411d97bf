"""[fusion]: how the logits of the branches become one prediction."""

from __future__ import annotations

from typing import Literal

from bandsplit.config.schema.base import Table


class Fusion(Table):
    method: Literal["mean", "rank", "learned", "temperature", "drop"] = "mean"
    """The fusion that a trained run is evaluated with. All but `mean` are fitted on held-out images after training, by
    `bandsplit evaluate RUN --fit-fusion`. Does not affect training."""
