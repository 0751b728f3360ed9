"""Which features of two SAEs are the same feature, and how much of that means nothing.

1. `describe` keeps of an SAE what can be compared: where each latent writes (decoder), what it
   listens for (encoder), what it does to the next token (vocabulary) and at which tokens it fires;
   of an SAE with more than 4,096 latents those that fire most.
2. `similarity` compares every latent of one SAE with every latent of another: cosines of the
   first three, the correlation of firing for the last.
3. `match` pairs them one to one, so that the sum of similarities is the largest (Hungarian
   algorithm), and says how many others would have done nearly as well.
4. `compare` does the same with nulls in the place of the second SAE (`null_dictionaries`): SAEs of
   the same data resemble each other by the data's covariance alone. Reported is
   (value - null) / (1 - null), with the null that reaches most.
5. `children` are the features of a wider SAE that fire where a feature fires.

Two features are called shared at a similarity of .7, as in Paulo and Belrose (2025), beside the
share of a null's pairs that get there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.features.activations import ROWS, FeatureActivations
from lenslab.features.readings import direct_logits
from lenslab.hooks import UnknownHook
from lenslab.models import model_key, model_name
from lenslab.runtime import derive_generator
from lenslab.sae import inputs
from lenslab.sae.controls import NULLS, untrained_sae
from lenslab.sae.inputs import SAEMismatch, SparseAutoencoder, check_sae, encode
from lenslab.sae.load import bundled_saes, load_sae
from lenslab.sae.registry import COMMAND, NotAnSAE, SAENotHere, paths_of

KINDS = ("decoder", "encoder", "firing", "vocabulary")
SHARED = 0.7  # similarity from which two features are called one
NEAR = 0.05  # a latent that is as similar up to this might as well be the partner
LEAST = 10  # firings of a feature that is followed
MOST = 4096  # latents of an SAE that are compared, those that fire most: matching grows as a cube

# One name for what is compared of a published model: release by release, at LAYERS of its twelve
ON_HUB = {"gpt2": ("gpt2-small-res-jb", "gpt2-small-attn-out-v5-32k", "gpt2-small-mlp-out-v5-32k")}
LAYERS = (6, 8, 10, 11)
Name = str | tuple[str, str]  # bundled or a folder; or (release, id)


def comparable_saes(model: TransformerBridge) -> list[Name]:
    """The SAEs that a comparison of this model is about: the bundled ones; else those of the
    releases in `ON_HUB`, by (release, id), whether they are on this machine or not."""
    names: list[Name] = list(bundled_saes(model))
    for release in () if names else ON_HUB.get(model_name(model), ()):
        hooks = [next(i for i in paths_of(release) if f".{layer}." in i) for layer in LAYERS]
        names += [(release, hook) for hook in hooks]
    return names


def open_saes(
    model: TransformerBridge, names: Iterable[Name]
) -> tuple[dict[str, SparseAutoencoder], dict[str, str]]:
    """(SAEs by short name, why each of the others is left out: not here, with the command that
    fetches it; damaged; of another model). ValueError where none is left, with the reasons."""
    saes, missing = {}, {}
    for name in names:
        place = (name,) if isinstance(name, str) else name
        short = "/".join(place).removeprefix(f"{model_name(model)}-")
        try:
            sae = load_sae(*place)
            check_sae(sae, model)
            inputs.refuse_transcoder(sae)
            saes[short] = sae
        except (SAENotHere, NotAnSAE, SAEMismatch, UnknownHook, ValueError) as error:
            missing[short] = str(error).splitlines()[0]
            if not isinstance(name, str) and COMMAND not in missing[short]:  # cut off, or changed
                missing[short] += f" To fetch it anew: {COMMAND} download {' '.join(name)}"
    if not saes:
        raise ValueError(f"No SAE to compare: {missing or 'none is named'}.")
    return saes, missing


@dataclass(frozen=True, eq=False)
class Dictionary:
    """What of an SAE can be compared; rows of unit length, zero for a latent without direction."""

    name: str
    model: str  # key: directions in different models have nothing to do with each other
    decoder: Float[Tensor, "latent d_in"]
    encoder: Float[Tensor, "latent d_in"]
    vocabulary: Float[Tensor, "latent d_in"] | None  # its dot products are those of the logits
    fires: scipy.sparse.csc_array = field(repr=False)  # [token, latent] 0 or 1
    tokens: str  # key of the texts
    latents: Int[np.ndarray, " latent"]  # their numbers in the SAE

    @property
    def rate(self) -> Float[np.ndarray, " latent"]:
        """Share of the tokens at which each latent fires."""
        return self.fires.sum(axis=0, dtype=np.float64) / self.fires.shape[0]


@torch.inference_mode()
def describe(
    model: TransformerBridge, sae: SparseAutoencoder, fa: FeatureActivations
) -> Dictionary:
    """An SAE as `compare` takes it; `fa` are its activations. Of more than 4,096 latents those that
    fire at most tokens. Raises as `check_sae`; ValueError for a transcoder."""
    check_sae(sae, model)
    inputs.refuse_transcoder(sae)
    fires = scipy.sparse.csc_array((fa.matrix > 0).astype(np.float32))
    latents = np.sort(np.argsort(-fires.sum(axis=0), kind="stable")[:MOST])
    learned = hasattr(sae, "W_dec")
    decoder = (sae.W_dec if learned else sae.directions).detach()[latents].float().cpu()
    encoder = sae.W_enc.detach()[:, latents].float().cpu().T if learned else decoder
    vocabulary = None
    if inputs.RESIDUAL.search(inputs.sae_hook(sae)):
        effects = direct_logits(model, torch.eye(decoder.shape[1]).to(model.cfg.device)).cpu()
        values, axes = torch.linalg.eigh(effects.double() @ effects.double().T)
        vocabulary = _unit(decoder @ (axes * values.clamp_min(0).sqrt()).float())
    return Dictionary(
        name=fa.name,
        model=model_key(model),
        decoder=_unit(decoder),
        encoder=_unit(encoder),
        vocabulary=vocabulary,
        fires=fires[:, latents],
        tokens=fa.batch.key,
        latents=latents,
    )


def _unit(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    return torch.nn.functional.normalize(rows, dim=1)


def null_dictionaries(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    fa: FeatureActivations,
    x: Float[Tensor, "token d_in"],
    twin: Dictionary | None = None,
    seed: int = 0,
    kinds: Sequence[str] = ("random", "data"),
) -> dict[str, Dictionary]:
    """What stands in an SAE's place to see what similarity means nothing: isotropic random
    directions and centred data points (one of these with `kinds`), as many as it has latents and as
    many active at a token; an SAE of the random-weight `twin`, where there is one; and the SAE
    itself with its firings dealt out anew among the tokens, each latent's rate kept.

    `x` are the SAE's inputs at the real tokens of `fa`; ValueError where they are others, or fewer
    than the latents that are compared.
    """
    least = min(sae.cfg.d_sae, MOST)
    if not least <= len(x) == fa.matrix.shape[0]:
        wanted = f"{fa.matrix.shape[0]} real tokens, at least the {least} latents"
        raise ValueError(f"{len(x)} inputs for {wanted}: give those of all tokens, or more texts.")
    own, active = describe(model, sae, fa), max(1, round(fa.matrix.nnz / fa.matrix.shape[0]))
    nulls = {}
    for kind in kinds:
        name = NULLS[kind]
        null = untrained_sae(sae, x, active, seed, kind)
        parts = [scipy.sparse.csr_array(encode(null, rows).numpy()) for rows in x.split(ROWS)]
        encoded = scipy.sparse.csr_array(scipy.sparse.vstack(parts))
        nulls[name] = describe(model, null, replace(fa, matrix=encoded, name=name))
    if twin is not None:  # compared as if its directions were of this model: that is the null
        nulls["twin's SAE"] = replace(twin, name="twin's SAE", model=own.model)
    generator = derive_generator(seed, "shuffled firings")
    order = torch.randperm(own.fires.shape[0], generator=generator).numpy()
    nulls["shuffled firings"] = replace(own, fires=own.fires[order], tokens=own.tokens)
    return nulls


def similarity(a: Dictionary, b: Dictionary, kind: str) -> Float[np.ndarray, "latent_a latent_b"]:
    """Every latent of `a` with every latent of `b`, from -1 to 1: cosines, or for "firing" the
    correlation of the two (phi) over tokens, 0 for a silent latent.

    SAEMismatch for what has nothing to compare: directions of two models or widths, firings on
    other texts, effects on the vocabulary of what does not write into the stream.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}.")
    if kind not in comparable_kinds(a, b):
        what = "on other tokens" if kind == "firing" else "in another space"
        raise SAEMismatch(f"The {kind} of {a.name} and of {b.name} is {what}: nothing to compare.")
    if kind != "firing":
        return (getattr(a, kind) @ getattr(b, kind).T).numpy().astype(np.float64)
    joint = (a.fires.T @ b.fires).toarray() / a.fires.shape[0]
    p, q = a.rate[:, None], b.rate[None]
    scale = np.sqrt(p * (1 - p) * q * (1 - q))  # 0 where one is silent, or always fires
    return np.divide(joint - p * q, scale, where=scale > 0, out=np.zeros_like(scale))


def comparable_kinds(a: Dictionary, b: Dictionary) -> list[str]:
    """The kinds of similarity that two SAEs have."""
    one = a.model == b.model and a.decoder.shape[1] == b.decoder.shape[1]
    kinds = {"decoder": one, "encoder": one, "firing": a.tokens == b.tokens}
    kinds["vocabulary"] = one and a.vocabulary is not None and b.vocabulary is not None
    return [kind for kind in KINDS if kinds[kind]]


def match(values: Float[np.ndarray, "latent_a latent_b"]) -> pd.DataFrame:
    """One row per latent of the first: its `partner` among the second's, each taken once, so that
    the sum is the largest; their `similarity`; `near`, how many others come within .05 of it; -1,
    NaN and 0 for a latent that is left over."""
    rows, columns = linear_sum_assignment(values, maximize=True)
    table = pd.DataFrame({"partner": -1, "similarity": np.nan, "near": 0}, range(len(values)))
    paired = values[rows, columns]
    table.loc[rows, "partner"] = columns
    table.loc[rows, "similarity"] = paired
    table.loc[rows, "near"] = (values[rows] >= paired[:, None] - NEAR).sum(axis=1) - 1
    return table.rename_axis("latent").reset_index()


class Comparison(NamedTuple):
    """Two SAEs, latent by latent. Of each kind of similarity `summary` has the mean over matched
    latents (`value`), that of each null, `null`, the largest of them, `corrected`, (value - null) /
    (1 - null), and `shared` and `shared_null`, the shares with a similarity of .7 or more."""

    latents: pd.DataFrame  # kind, latent, partner, similarity, near, rate, null
    summary: pd.DataFrame  # a row per kind


def compare(
    a: Dictionary, b: Dictionary, nulls: Mapping[str, Dictionary], kinds: Sequence[str] = KINDS
) -> Comparison:
    """Match the latents of `a` that fire in the texts with those of `b`, and with each null in its
    place, by the `kinds` of similarity that the two have. ValueError without nulls; SAEMismatch
    where nothing can be compared."""
    if not nulls:
        raise ValueError("A similarity says nothing without nulls: see null_dictionaries.")
    alive = np.flatnonzero(a.rate > 0)
    tables, rows = [], []
    for kind in filter(kinds.__contains__, comparable_kinds(a, b)):
        found = match(similarity(a, b, kind)[alive])
        # firings that are dealt out anew leave directions as they are
        others = {n: d for n, d in nulls.items() if kind == "firing" or n != "shuffled firings"}
        values = {n: match(similarity(a, d, kind)[alive])["similarity"] for n, d in others.items()}
        means = {name: float(each.mean()) for name, each in values.items()}
        strictest = max(means, key=means.get)
        value, null = float(found["similarity"].mean()), means[strictest]
        row = {"kind": kind, "value": value, **means, "null": null}
        row |= {"corrected": (value - null) / (1 - null), "near": found["near"].mean()}
        row["shared"] = (found["similarity"] >= SHARED).mean()
        rows.append(row | {"shared_null": (values[strictest] >= SHARED).mean()})
        found["partner"] = found["partner"].map(lambda i: b.latents[i] if i >= 0 else -1)
        about = {"latent": a.latents[alive], "rate": a.rate[alive], "kind": kind}
        found = found.assign(null=values[strictest], **about)
        tables.append(found)
    if not rows:
        raise SAEMismatch(f"{a.name} and {b.name} share neither a model nor texts.")
    return Comparison(pd.concat(tables, ignore_index=True), pd.DataFrame(rows))


# Widths


def children(narrow: FeatureActivations, wide: FeatureActivations) -> pd.DataFrame:
    """Which features of a wider SAE fire, at most of their tokens, where one of a narrower fires.

    One row per pair: `parent`, `child`, `inside`, the share of the child's firings at the parent's
    tokens (more than half), `expected` of it by chance (the parent's rate), and `covers`, the share
    of the parent's firings that the child has. Features with fewer than ten firings are left out.
    SAEMismatch for other texts.
    """
    if narrow.batch.key != wide.batch.key:
        raise SAEMismatch(f"{narrow.name} and {wide.name} were encoded on other texts.")
    parents, kids = ((fa.matrix > 0).astype(np.float32).tocsc() for fa in (narrow, wide))
    joint = (parents.T @ kids).tocoo()
    counts, own = np.asarray(parents.sum(axis=0)), np.asarray(kids.sum(axis=0))
    table = pd.DataFrame({"parent": joint.row, "child": joint.col})
    table["inside"], table["covers"] = joint.data / own[joint.col], joint.data / counts[joint.row]
    table["expected"] = counts[joint.row] / parents.shape[0]
    enough = (counts[joint.row] >= LEAST) & (own[joint.col] >= LEAST)
    kept = table[enough & (table["inside"] > 0.5)]
    return kept.sort_values(["parent", "covers"], ascending=[True, False], ignore_index=True)
