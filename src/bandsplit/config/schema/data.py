"""[data]: where the images are and how they become a batch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from bandsplit.config.schema.base import Channels3, Fraction, Range, Table, mistake

_Holdout = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None


def _holdout(value: object) -> object:
    """Accepts a count or a fraction, with one message for everything else."""
    if value is None or (type(value) is int and value >= 1) or (type(value) is float and 0 < value < 1):
        return value
    raise mistake("data.holdout", value, "a number of images per class, at least 1, or a fraction between 0 and 1")


class Generate(Table):
    """Images that the project draws if the data folder does not exist."""

    seed: int = Field(0, ge=0)
    """Chooses the images; not `seed` of a run."""
    train_per_class: int = Field(200, ge=1)
    """Training images of each class."""
    val_per_class: int = Field(50, ge=1)
    """Validation images of each class."""
    side: int = Field(72, ge=16)
    """Pixels of the shorter side of the smallest images. Resized to it, their textures need the full resolution."""


class Decoder(Table):
    """How JPEG files are read and decoded."""

    crop_only: bool | None = None
    """Training: decode only the random crop. Unset: yes on a CPU, no on a GPU, where DALI's cropping decoder has been
    reported to crash (H100)."""
    hw_load: Fraction = 0.65
    """Fraction of a batch for the GPU's hardware JPEG decoder; ignored on GPUs without one, such as the A40."""
    fancy_upsampling: bool = False
    """GPU: upsample chroma smoothly, as the CPU decoder does."""
    device_padding_mib: int = Field(16, ge=0)
    """GPU: device memory in MiB reserved per image, so that larger images need no allocation during training."""
    host_padding_mib: int = Field(8, ge=0)
    """GPU: pinned host memory in MiB reserved per image."""


class Data(Table):
    """Where the images are and how they become a batch (config/data/*.toml)."""

    name: str = Field(min_length=1)
    """What the data is called in logs and reports."""
    kind: Literal["images", "bands"] = "images"
    """`images`: files that DALI decodes; `bands`: a band store that `bandsplit data pack` has written."""
    root: str = Field(min_length=1)
    """Folder of the data set or band store; `~` and `$VARIABLES` are expanded."""
    layout: Literal["folders", "list"] = "folders"
    """Class folders, or lists of paths and labels."""
    train: str = "train"
    """Below `root`: a folder with one folder per class, or a list: CSV or text with one path and label per line."""
    val: str = "val"
    """The same for validation images."""
    labels: Literal["names", "numbers"] = "names"
    """Only for evaluation: whether class folders, or the labels of a list, are class names or class indices (0: the
    first class in alphabetical order). An index that is the name of a class is a name."""
    classes: int | None = Field(None, ge=2)
    """Unset: as many as the training images have."""
    class_names: str | None = Field(None, min_length=1)
    """Readable names of the classes: a file below `root`, or "timm" for those of ImageNet; unset: class_names.txt, if
    it is there."""
    check: Literal["decode", "headers", "off"] = "decode"
    """How a file that is new or has changed is examined before training: decoded, its header read, or not at all."""
    on_bad: Literal["replace", "error"] = "replace"
    """An image that cannot be read or decoded: `replace`: leave it out before training, use another one of its class
    during training; `error`: end the run."""
    max_bad: int = Field(100, ge=0)
    """More bad images than these end the run."""
    holdout: Annotated[int | float | None, BeforeValidator(_holdout, json_schema_input_type=_Holdout)] = None
    """Training images that are not trained on, to fit fusion: a number per class, or a fraction of each class."""
    image_size: int = Field(224, ge=1)
    """Side in pixels of the square images before the split."""
    val_image_size: int | None = Field(None, ge=1)
    """`image_size` for validation; unset: as in training."""
    resize_size: int = Field(256, ge=1)
    """Validation: length in pixels of the shorter side before the center crop."""
    scale: Range = (0.08, 1.0)
    """Training: range of the fraction of the image area that the random crop covers."""
    ratio: Range = (3 / 4, 4 / 3)
    """Training: range of the aspect ratio (width / height) of the random crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter for resizing training crops and validation images, antialiased when downscaling, as in Pillow."""
    hflip: Fraction = 0.5
    """Training: probability of a horizontal flip."""
    mean: Channels3 = (123.675, 116.28, 103.53)
    """RGB mean, on the scale 0 to 255."""
    std: Channels3 = (58.395, 57.12, 57.375)
    """RGB standard deviation, on the scale 0 to 255."""
    threads: int | None = Field(None, ge=1)
    """DALI threads per rank; unset: the CPUs allotted on this node, divided by its ranks."""
    prefetch: int = Field(2, ge=1)
    """Batches that are prepared ahead."""
    in_memory: bool = False
    """Band store: read the bands into memory before the first step, shared by all ranks of a node."""
    decoder: Decoder = Decoder()
    generate: Generate | None = None

    @property
    def val_size(self) -> int:
        """Side in pixels of the validation images."""
        return self.val_image_size or self.image_size

    @model_validator(mode="before")
    @classmethod
    def _no_resized_crops_of_bands(cls, given: Any) -> Any:
        """The defaults of `scale` and `ratio` are those of images; crops of bands keep scale and aspect ratio."""
        if isinstance(given, dict) and given.get("kind") == "bands":
            return {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], **given}
        return given

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.val_size > self.resize_size:
            key = "data.image_size" if self.val_image_size is None else "data.val_image_size"
            raise mistake(key, self.val_size, f"at most data.resize_size = {self.resize_size}")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise mistake("data.scale", list(self.scale), "0 < smallest <= largest <= 1")
        low, high = self.ratio
        if not 0 < low <= high:
            raise mistake("data.ratio", list(self.ratio), "0 < smallest <= largest")
        if min(self.std) <= 0:
            raise mistake("data.std", list(self.std), "positive numbers")
        if self.in_memory and self.kind != "bands":
            raise mistake("data.in_memory", True, "false, unless data.kind = 'bands'")
        return self
