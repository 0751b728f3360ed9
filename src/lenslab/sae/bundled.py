"""The SAEs at hand for a model, and their cards: what each was trained on, and how good random directions are.

`card.json` beside the weights holds `trained_on`, `measured_on`, and `at_l0`: for every sparsity that was trained,
the metrics of `evaluate_sae` and those of its null. One of them ships; `sae` and `null` are its entries.
"""

from __future__ import annotations

import json
from contextlib import suppress

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lenslab.activations import pack
from lenslab.data import offline_text
from lenslab.models import stream_hook
from lenslab.paths import data_path
from lenslab.sae.pretrained import CARD, SAEMismatch, SparseAutoencoder, bundled_saes, check_sae, load_sae
from lenslab.sae.small import train_small_sae

SHOWN = ("l0", "variance_explained", "ce_difference", "ce_recovered_zero", "dead", "dense")


def read_card(name: str) -> dict:
    """The card of a bundled SAE. FileNotFoundError, with the names there are, where it has none."""
    file = data_path("saes", name, CARD)
    if not file.is_file():
        raise FileNotFoundError(f"No card for an SAE {name!r}; bundled: {', '.join(bundled_saes()) or 'none'}.")
    return json.loads(file.read_text(encoding="utf-8"))


def card_table(model: TransformerBridge | None = None) -> pd.DataFrame:
    """One row per bundled SAE (of `model`) and sparsity, on held-out documents; the null's variance explained beside.

    Columns `sae`, `ships`, those of `SHOWN`, and `null` (variance that random directions explain at the same L0).
    """
    rows = []
    for name in bundled_saes(model):
        card = read_card(name)
        levels = card.get("at_l0", {"": {"sae": card["sae"], "null": card["null"], "ships": True}})
        for level in levels.values():
            shown = {key: level["sae"][key] for key in SHOWN}
            rows.append({"sae": name, "ships": level["ships"]} | shown | {"null": level["null"]["variance_explained"]})
    return pd.DataFrame(rows, columns=["sae", "ships", *SHOWN, "null"])


def sae_for(
    model: TransformerBridge, name: str | None = None, *, documents: int = 160, steps: int = 300
) -> SparseAutoencoder:
    """The SAE called `name`; without a name a bundled one of the model's middle layer that fits, else one trained now.

    That one is small, trained on the residual stream after the middle block, on text that every Python brings along:
    enough to follow a notebook on any model, not to learn much about it. Raises as `load_sae`.
    """
    if name is not None:
        return load_sae(name)
    hook = stream_hook(model, model.cfg.n_layers // 2)
    for found in bundled_saes(model):
        if (sae := load_sae(found)).cfg.metadata.hook_name == hook:
            with suppress(SAEMismatch):  # other weights under the same name: random twins differ between processors
                check_sae(sae, model)
                return sae
    return train_small_sae(model, hook, pack(model, offline_text(documents)), steps=steps)
