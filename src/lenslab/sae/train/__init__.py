"""Train sparse autoencoders: build one, choose a source of vectors, train."""

from lenslab.sae.train.architectures import build_sae
from lenslab.sae.train.base import TrainableSAE, TrainingFailed
from lenslab.sae.train.convert import to_saelens
from lenslab.sae.train.sources import ModelSource, StoreSource, TensorSource
from lenslab.sae.train.trainer import TrainingConfig, TrainingResult, train

__all__ = [
    "ModelSource",
    "StoreSource",
    "TensorSource",
    "TrainableSAE",
    "TrainingConfig",
    "TrainingFailed",
    "TrainingResult",
    "build_sae",
    "to_saelens",
    "train",
]
