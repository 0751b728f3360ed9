"""From a trained SAE to the SAE that SAELens loads, scale, centre and decoder norms folded into the
weights, and back, to train on (`from_saelens`).

With z = (x - centre) * scale, an SAE on z equals one on x whose weights are changed so:
1. a latent's activation is multiplied by `unit`, the length of its decoder row over the scale of
   the output, which makes decoder rows 1 long in the model's own units; encoder, biases and
   thresholds are multiplied alike;
2. b_dec is divided by the scale and moved by the centre. Which latents are the largest k does not
change: a topk SAE's decoder rows are of equal length.

Back: the saved weights are those of scale 1 and centre 0; once `fit` has taken both from data, it
changes the weights so that nothing else changes.
"""

from __future__ import annotations

from typing import Any

import torch

from lenslab.sae.inputs import SparseAutoencoder, recorded_key, sae_key
from lenslab.sae.load import finish
from lenslab.sae.train.architectures import TOPK_FAMILY, build_sae
from lenslab.sae.train.base import TrainableSAE

# ours -> SAELens's; the others become jumprelu: batchtopk and its kin with the threshold that was
# estimated in training
KINDS = {"relu": "standard", "topk": "topk", "gated": "gated", "transcoder": "jumprelu_transcoder"}
OURS = {"standard": "relu", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu"}
SCALES = {"none": "mean", "constant_norm_rescale": "unit"}  # SAELens's -> ours
# what `train` compares with its data, and the processing of the model that it cannot have
KEPT = ("hook_name", "model_name", "prepend_bos", "model_from_pretrained_kwargs")


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


@torch.no_grad()
def from_saelens(sae: SparseAutoencoder, **options: Any) -> TrainableSAE:
    """A loaded SAE to train on. Until the first step it computes what the loaded one does, on
    whatever vectors; the optimizer and the counts of dead latents begin anew. Its rate is
    1e-4 unless one is given: that of new weights would undo what it learned.

    `options` are those of `build_sae`. What kept the SAE sparse has to be said, `k` or `sparsity`:
    only TopK is saved with it. Hook, model and BOS stay those of the loaded SAE, and `train`
    refuses other data; for a fine-tune of the model set `sae.cfg.metadata.model_name` and
    `model_key` to None before. `began_from` in the metadata is the `sae_key` of the loaded one.

    Raises ValueError for what cannot be trained on without a change: transcoders, floors, others,
    another scaling, decoder rows of other lengths where a training keeps them at 1, several
    thresholds where it has one; and as `build_sae`.
    """
    about, kind, scaling = sae.cfg.metadata, sae.cfg.architecture(), sae.cfg.normalize_activations
    if kind not in OURS or scaling not in SCALES or about.frozen:
        raise ValueError(f"No training goes on from a {kind}, {scaling!r}, frozen: {about.frozen}.")
    architecture = about.trained_as or OURS[kind]
    options = {"scale": SCALES[scaling], "centre": scaling == "none"} | options
    if kind == "topk":
        options = {"k": sae.cfg.k} | options
    if (scaling == "none") == (options["scale"] == "unit") or options.keys() & {"tied", "frozen"}:
        raise ValueError(f"This SAE has scaling {scaling!r}, not tied or frozen: that stays so.")
    needed = "k" if architecture in TOPK_FAMILY else "sparsity"
    if needed not in options:
        raise ValueError(f"Say {needed}: a saved {architecture} SAE does not hold its own.")
    state = {name.replace("b_gate", "b_enc"): value for name, value in sae.state_dict().items()}
    if not sae.cfg.apply_b_dec_to_input:
        shift = state["b_dec"] @ state["W_enc"]  # [d_sae]
        state["b_enc"] = state["b_enc"] + shift
        if kind == "gated":
            state["b_mag"] = state["b_mag"] + shift * state["r_mag"].exp()
    threshold = state.get("threshold", torch.zeros(1)).clamp_min(0)  # as SAELens, by a ReLU before
    if architecture in TOPK_FAMILY:
        norms = state["W_dec"].norm(dim=1)
        if (norms - 1).abs().max() > 0.01 or threshold.std(correction=0) > 0.01 * threshold.mean():
            raise ValueError(f"A {architecture} SAE has rows of length 1, and one threshold.")
        threshold = threshold.mean()  # rounding, in bf16 too, makes no other SAE
    if "threshold" in state:
        state["threshold"] = threshold
    told = {key: about[key] for key in KEPT} | {"model_key": recorded_key(sae)}
    metadata = {key: value for key, value in told.items() if value is not None}
    metadata["began_from"] = sae_key(sae)
    new = build_sae(architecture, sae.cfg.d_in, sae.cfg.d_sae, metadata=metadata, **options)
    new.to(sae.W_enc.device).load_state_dict(new.state_dict() | state)
    new.saved = True
    return new
