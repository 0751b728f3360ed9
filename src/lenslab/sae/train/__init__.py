"""Train sparse autoencoders: build one or go on from a saved one, choose vectors, train."""

from lenslab.sae.train.architectures import build_sae, starting_penalty
from lenslab.sae.train.convert import from_saelens
from lenslab.sae.train.sources import ModelSource, StoreSource, TensorSource
from lenslab.sae.train.trainer import TrainingConfig, train

__all__ = ["ModelSource", "StoreSource", "TensorSource", "TrainingConfig", "build_sae"]
__all__ += ["from_saelens", "starting_penalty", "train"]
