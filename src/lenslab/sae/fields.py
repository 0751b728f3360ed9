"""Fields of an SAE's config: honoured, or refused by name.

SAELens leaves out the fields that it does not know, makes up those that it misses, and leaves some
scaling of inputs to whoever trains. Each of these changes what the SAE computes without a word:
1. `checked_reader` is one of SAELens's readers that looks at the config before it is cut to
   what SAELens knows;
2. `check_scaling` refuses an SAE whose inputs must be scaled by numbers that it does not hold;
3. `remember_norms` is for the two kinds of scaling that depend on the token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor

from lenslab.files import content_key
from lenslab.sae.registry import NotAnSAE

# Values of `normalize_activations` by which each token is scaled by its own norm, and what is added
# to that: SAELens's, and where it adds nothing enough to leave padding at zero
BY_TOKEN = {"constant_norm_rescale": 1e-12, "layer_norm": 1e-5}

# Fields that cfg.json may hold beside those of SAELens's classes
BESIDE = {"architecture", "metadata", "activation_fn", "activation_fn_str"}
BESIDE |= {"finetuning_scaling_factor", "sae_lens_version"}


def config_key(config: dict) -> str:
    """Of all that a cfg.json says, in whatever layout, but for this key itself."""
    metadata = {k: v for k, v in config.get("metadata", {}).items() if k != "config_key"}
    return content_key(config | {"metadata": metadata})


def checked_reader(release: str | None) -> Callable:
    """SAELens's reader of a release, or of folders: `(config, weights, ..)`. It raises NotAnSAE for
    a field of the config that SAELens would leave out or make up."""
    from sae_lens.loading import pretrained_sae_loaders as readers
    from sae_lens.registry import get_sae_class

    reader = readers.sae_lens_disk_loader
    if release is not None:
        reader = readers.NAMED_PRETRAINED_SAE_LOADERS[readers.get_conversion_loader_name(release)]

    def read(*place: Any, **options: Any) -> tuple:
        written, *rest = reader(*place, **options)
        config = readers.handle_config_defaulting(written)  # another where older than version 6
        kind = config["architecture"]
        activation = written.get("activation_fn", written.get("activation_fn_str"))
        if activation not in (None, "relu", kind):
            raise NotAnSAE(f"activation_fn {activation!r} is not what {kind!r} computes.")
        unknown = written.keys() - {f.name for f in fields(get_sae_class(kind)[1])} - BESIDE
        if unknown and config is written:  # older ones hold the options of their training too
            raise NotAnSAE(f"It has fields that would be ignored: {', '.join(sorted(unknown))}.")
        k = config.get("k")
        if "topk" in kind and not (type(k) is int and 1 <= k <= config["d_sae"]):
            raise NotAnSAE(f"k is {k}: a {kind} SAE needs one from 1 to its width.")
        for f in fields(get_sae_class(kind)[1]):  # "false" would count as true
            if f.type is bool and type(config.get(f.name, False)) is not bool:
                raise NotAnSAE(f"{f.name} is {config[f.name]!r}, not true or false.")
        return written, *rest

    return read


def check_scaling(config: Any) -> None:
    """Raise NotAnSAE where inputs are to be scaled by numbers that the SAE does not hold."""
    scaling = getattr(config, "normalize_activations", "none")
    if scaling not in {"none", *BY_TOKEN}:
        raise NotAnSAE(
            f"normalize_activations is {scaling}, by numbers that are not in the SAE. Open it with "
            "SAELens, sae.fold_activation_norm_scaling_factor(sqrt(d_in) / mean norm), save_sae."
        )


class _NormsRemembered:
    """What SAELens's `encode` takes away from each token, its `decode` gives back, as often as it
    is called. Features that were edited are other tensors: of the tokens that were encoded last."""

    def encode(self, x: Tensor) -> Tensor:
        features = super().encode(x)
        features.norms = self.latest
        return features

    def decode(self, features: Tensor) -> Tensor:
        self.latest = getattr(features, "norms", self.latest)
        return super().decode(features)

    def run_time_activation_norm_fn_in(self, x: Tensor) -> Tensor:
        mean, scale = 0, x.norm(dim=-1, keepdim=True) / self.cfg.d_in**0.5
        if self.cfg.normalize_activations == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            scale = (x - mean).std(-1, keepdim=True)
        self.latest = mean, scale
        return (x - mean) / (scale + BY_TOKEN[self.cfg.normalize_activations])

    def run_time_activation_norm_fn_out(self, x: Tensor) -> Tensor:
        mean, scale = self.latest
        if scale.shape[:-1] != x.shape[:-1]:
            raise ValueError("These features are not of the tokens that were encoded last.")
        return x * scale + mean


def remember_norms(sae: Any) -> None:
    """Where tokens are scaled by their own norms: SAELens forgets these at the first `decode`,
    takes those of the last tokens for any features, and divides by a norm of 0."""
    if sae.cfg.normalize_activations in BY_TOKEN:
        kind = type(sae)
        del sae.run_time_activation_norm_fn_in, sae.run_time_activation_norm_fn_out
        sae.__class__ = type(kind.__name__, (_NormsRemembered, kind), {})
        sae.latest = None
