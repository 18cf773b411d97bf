"""`train.precision` on a device: dtype, autocast, loss scaling."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """`train.precision` on a device. "auto" is bf16 on a GPU and fp32 on a CPU."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of autocast; float32 means no autocast."""
        auto = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        types = {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16}
        return types.get(self.name, torch.float32)

    @property
    def half_bands(self) -> bool:
        """Whether bands are float16 when DALI writes them and ranks exchange them: on a GPU with 16-bit autocast."""
        return self.device.type == "cuda" and self.dtype != torch.float32

    def apply(self) -> None:
        """TF32 on a GPU: nowhere for "fp32", everywhere for "tf32", otherwise in convolutions alone, as torch does.

        In matrix products, 16-bit autocast needs none, and the split in plain torch would lose its small bands.
        """
        torch.backends.cudnn.allow_tf32 = self.name != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = self.name == "tf32"

    def autocast(self) -> torch.autocast:
        """The autocast context for the forward pass and the loss."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling in fp16 (Micikevicius et al., ICLR 2018); disabled otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
