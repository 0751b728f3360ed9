"""Train sparse autoencoders: build one, choose a source of vectors, train."""

from lenslab.sae.train.architectures import build_sae, starting_penalty
from lenslab.sae.train.sources import ModelSource, StoreSource, TensorSource
from lenslab.sae.train.trainer import TrainingConfig, train

__all__ = ["ModelSource", "StoreSource", "TensorSource", "TrainingConfig", "build_sae", "train"]
__all__ += ["starting_penalty"]
