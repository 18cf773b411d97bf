"""What `train.precision` means on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
        """Whether bands are float16 from DALI on, also between ranks: where a GPU computes in 16 bits."""
        return self.device.type == "cuda" and self.dtype != torch.float32

    def apply(self) -> None:
        """Allows or forbids TF32 in a GPU's float32 products; torch's default is to allow it in convolutions."""
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.name != "fp32"

    def autocast(self) -> torch.autocast:
        """A context for the forward pass and the loss."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16 (Micikevicius et al., ICLR 2018); does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
