"""From a trained SAE to the SAE that SAELens loads: scale, centre and decoder norms folded into the
weights.

With z = (x - centre) * scale, an SAE on z equals one on x whose weights are changed so:
1. a latent's activation is multiplied by `unit`, the length of its decoder row over the scale of
   the output, which makes decoder rows 1 long in the model's own units; encoder, biases and
   thresholds are multiplied alike;
2. b_dec is divided by the scale and moved by the centre. Which latents are the largest k does not
change: a topk SAE's decoder rows are of equal length.
"""

from __future__ import annotations

import torch

from lenslab.sae.load import SparseAutoencoder, finish
from lenslab.sae.train.base import TrainableSAE

# ours -> SAELens's; the others become jumprelu: batchtopk and its kin with the threshold that was
# estimated in training
KINDS = {"relu": "standard", "topk": "topk", "gated": "gated", "transcoder": "jumprelu_transcoder"}


@torch.no_grad()
def to_saelens(sae: TrainableSAE) -> SparseAutoencoder:
    """The SAE as SAELens builds it: equal outputs, ready for `save_sae`, `evaluate_sae` and
    `splice`.

    Its features are in the model's units: activation times a decoder row of length 1. Raises
    NotAnSAE without a hook and for NaN.
    """
    from sae_lens import SAE

    config = sae.config
    # a row that a penalty has shrunk to nothing still has a direction of zeros
    norms = sae.decoder.norm(dim=1).clamp_min(1e-12)
    unit = norms / sae.scale_out
    bias = sae.b_enc
    if sae.shift is None:  # a transcoder: the centre of what it reads goes into the encoder's bias
        bias = bias - (sae.centre * sae.scale) @ sae.W_enc
    state = {
        "W_enc": sae.W_enc * (unit * sae.scale),
        "W_dec": sae.decoder / norms[:, None],
        "b_enc": bias * unit,
        "b_dec": sae.b_dec / sae.scale_out + sae.centre_out,
    }
    architecture = KINDS.get(config.architecture, "jumprelu")
    heads = str(config.metadata.get("hook_name", "")).endswith("hook_z")
    written = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "device": str(sae.W_enc.device),
        "apply_b_dec_to_input": sae.shift is not None,
        "normalize_activations": "constant_norm_rescale" if config.scale == "unit" else "none",
        "reshape_activations": "hook_z" if heads else "none",
        "metadata": config.metadata | {"trained_as": config.architecture},
    }
    if config.frozen:  # a floor is never taken for an SAE that learned
        written["metadata"]["frozen"] = config.frozen
    if architecture == "topk":
        written |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if architecture == "jumprelu_transcoder":
        written["d_out"] = len(sae.b_dec)
    if architecture.startswith("jumprelu"):
        state["threshold"] = (sae.threshold * unit).expand(config.d_sae)
    if architecture == "gated":
        state["b_gate"] = state.pop("b_enc")
        state |= {"r_mag": sae.r_mag, "b_mag": sae.b_mag * unit}
    loaded = SAE.from_dict(written)
    loaded.load_state_dict({key: value.clone().contiguous() for key, value in state.items()})
    return finish(loaded, config.architecture)
