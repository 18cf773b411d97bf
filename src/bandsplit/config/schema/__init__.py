"""Schema of the TOML files: frozen pydantic models, one file per subject.  `config.loading.load` fills them."""

from bandsplit.config.schema.augment import (
    Augment,
    AutoAugment,
    Color,
    Erasing,
    Progressive,
    RandAugment,
    TrivialAugment,
)
from bandsplit.config.schema.base import Channels3, Fraction, Range
from bandsplit.config.schema.data import Data, Decoder, Generate
from bandsplit.config.schema.fusion import Fusion
from bandsplit.config.schema.loss import BinaryCrossEntropy, CrossEntropy, Distillation, Loss, Mix
from bandsplit.config.schema.model import Branch, Model, Stem
from bandsplit.config.schema.optim import SGD, Adam, AdamW, Betas, Lamb, Optim, RMSprop
from bandsplit.config.schema.run import RunConfig
from bandsplit.config.schema.schedule import Constant, Cosine, Linear, OneCycle, Schedule, Step
from bandsplit.config.schema.split import Split
from bandsplit.config.schema.train import Checkpoint, Parallel, Train, Validation
