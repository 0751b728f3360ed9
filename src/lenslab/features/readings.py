"""What a feature really fires on: classes of tokens, and form against content.

1. `token_classes`: how a feature's activation spreads over digits, brackets, word starts, foreign
   letters ..., beside how common each class is. A "mathematics feature" that fires on digits
   wherever they stand is a digit feature.
2. `form_and_concept`: on texts that say the same thing in several forms, how much of a feature's
   activation follows the form and how much the content (two-way analysis of variance, one text per
   cell), beside what shuffled labels give.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lenslab.features.activations import FeatureActivations, Indices, Matrix, check_matrix
from lenslab.files import Result
from lenslab.runtime import derive_generator
from lenslab.sae.load import RESIDUAL, SparseAutoencoder, check_sae, sae_hook
from lenslab.tokens import token_string

CLASSES = (
    "digits",
    "bracket or quote",
    "operator or punctuation",
    "line break or indent",
    "word start",
    "word piece",
    "letters beyond ASCII",
    "emoji or other symbol",
    "part of a character",
)


BRACKETS = frozenset("()[]{}<>\"'`“”‘’«»")


def token_class(string: str) -> str:
    """The class of one token, by the first character that is not a space: one of `CLASSES`."""
    text = string.lstrip(" ")
    if not text or text[0] in "\n\t\r":
        return "line break or indent"
    if text.startswith("<0x"):
        return "part of a character"
    first = text[0]
    if first.isdigit():
        return "digits"
    if first.isalpha():
        if not text.isascii():
            return "letters beyond ASCII"
        return "word start" if string != text else "word piece"
    if first in BRACKETS:
        return "bracket or quote"
    if first.isascii() or unicodedata.category(first).startswith("P"):
        return "operator or punctuation"
    return "emoji or other symbol"


def token_classes(fa: FeatureActivations, features: Sequence[int] | np.ndarray) -> pd.DataFrame:
    """Share of each feature's activation that falls on each class of tokens.

    One row per class; column `all tokens` is the control, how common the class is; then one column
    per feature. A last row, `one token`, has the largest share that a single token string holds.
    NaN for a feature that never fires.
    """
    batch = fa.batch
    strings = [batch.strings(row) for row in range(len(batch))]
    seen = [strings[t][p] for t, p in zip(fa.text.tolist(), fa.position.tolist(), strict=True)]
    kinds = np.array([CLASSES.index(token_class(string)) for string in seen])
    common = np.bincount(kinds, minlength=len(CLASSES)) / len(kinds)
    columns = {"all tokens": [*common, Counter(seen).most_common(1)[0][1] / len(seen)]}
    ids = np.unique(np.array(seen, dtype=object).astype(str), return_inverse=True)[1]
    for feature in features:
        value = np.asarray(fa.matrix[:, [feature]].todense(), dtype=np.float64).ravel()
        total = value.sum() if value.any() else np.nan
        columns[str(feature)] = [
            *(np.bincount(kinds, value, len(CLASSES)) / total),
            np.bincount(ids, value).max() / total,
        ]
    return pd.DataFrame(columns, index=pd.Index([*CLASSES, "one token"], name="class"))


@dataclass(frozen=True)
class FormAndConcept(Result):
    """Share of each feature's variance over texts that follows form, and content; 0 is what chance
    gives.

    form, concept: epsilon squared, which corrects for the number of levels, `[feature]`.
    form_p, concept_p: share of shuffles (within a concept, within a form) that reach it.
    """

    features: Int[np.ndarray, " feature"]
    form: Float[np.ndarray, " feature"]
    concept: Float[np.ndarray, " feature"]
    form_p: Float[np.ndarray, " feature"]
    concept_p: Float[np.ndarray, " feature"]
    n_forms: int
    n_concepts: int

    def to_frame(self) -> pd.DataFrame:
        names = ("form", "concept", "form_p", "concept_p")
        return pd.DataFrame(
            {"feature": self.features} | {name: getattr(self, name) for name in names}
        )


def form_and_concept(
    matrix: Matrix,
    form: Sequence | np.ndarray,
    concept: Sequence | np.ndarray,
    *,
    features: Sequence | np.ndarray | None = None,
    n: int = 200,
    seed: int = 0,
) -> FormAndConcept:
    """Does a feature follow how a thing is said, or what is said?

    Args: matrix: pooled activations `[text, feature]`, dense or sparse; every concept once in every
        form. features: which to look at; default those that fire on at least ten texts.

    Raises ValueError where a concept lacks a form or has one twice: the two shares would not be
    comparable.
    """
    matrix = check_matrix(matrix, form)
    if len(concept) != matrix.shape[0]:
        raise ValueError(
            f"{len(concept)} concepts for {matrix.shape[0]} texts: one each is needed."
        )
    forms, row = np.unique(np.asarray(form), return_inverse=True)
    concepts, column = np.unique(np.asarray(concept), return_inverse=True)
    cells = np.bincount(row * len(concepts) + column, minlength=len(forms) * len(concepts))
    if (cells != 1).any() or min(len(forms), len(concepts)) < 2:
        raise ValueError(
            f"Needs every concept exactly once in every form: {matrix.shape[0]} texts, {len(forms)} forms, "
            f"{len(concepts)} concepts, {int((cells != 1).sum())} cells without exactly one text."
        )
    if features is None:
        fired = np.asarray((matrix > 0).sum(axis=0)).ravel()
        features = np.flatnonzero(fired >= 10)
    features = np.asarray(features, dtype=np.int64)
    chosen = matrix[:, features]
    values = np.asarray(
        chosen.todense() if hasattr(chosen, "todense") else chosen, dtype=np.float64
    )
    table = np.empty((len(forms), len(concepts), len(features)))
    table[row, column] = values
    observed = _epsilon_squared(table)
    above, rng = (
        np.zeros((2, len(features))),
        np.random.default_rng(derive_generator(seed, "form and concept").initial_seed()),
    )
    for _ in tqdm(range(n), "shuffles", delay=3, leave=False):
        within_concept = rng.permuted(
            np.broadcast_to(np.arange(len(forms))[:, None], table.shape[:2]), axis=0
        )
        within_form = rng.permuted(
            np.broadcast_to(np.arange(len(concepts)), table.shape[:2]), axis=1
        )
        above[0] += (
            _epsilon_squared(table[within_concept, np.arange(len(concepts))])[0]
            >= observed[0] - 1e-12
        )
        above[1] += (
            _epsilon_squared(table[np.arange(len(forms))[:, None], within_form])[1]
            >= observed[1] - 1e-12
        )
    p = (1 + above) / (1 + n)
    return FormAndConcept(features, *observed, *p, n_forms=len(forms), n_concepts=len(concepts))


def _epsilon_squared(
    table: Float[np.ndarray, "form concept feature"],
) -> Float[np.ndarray, "2 feature"]:
    """(form, concept): sums of squares less what noise alone would give, over the total; NaN for a
    constant feature."""
    f, c, _ = table.shape
    grand = table.mean(axis=(0, 1))
    by_form, by_concept = table.mean(axis=1), table.mean(axis=0)
    ss_form, ss_concept = (
        c * ((by_form - grand) ** 2).sum(0),
        f * ((by_concept - grand) ** 2).sum(0),
    )
    ss_total = ((table - grand) ** 2).sum(axis=(0, 1))
    noise = (ss_total - ss_form - ss_concept) / ((f - 1) * (c - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([(ss_form - (f - 1) * noise), (ss_concept - (c - 1) * noise)]) / ss_total


@dataclass(frozen=True, eq=False)
class VocabularyEffects(Result):
    """Logits are per unit of activation, before the final norm's scale; each row is sorted, largest
    effect first."""

    features: Int[np.ndarray, " feature"]
    promoted: Float[np.ndarray, "feature n"]
    promoted_ids: Int[np.ndarray, "feature n"]
    promoted_tokens: tuple[tuple[str, ...], ...]
    suppressed: Float[np.ndarray, "feature n"]
    suppressed_ids: Int[np.ndarray, "feature n"]
    suppressed_tokens: tuple[tuple[str, ...], ...]
    control: Float[
        np.ndarray, " feature"
    ]  # largest logit of a random direction of the same norm, median of several

    def to_frame(self) -> pd.DataFrame:
        """One row per feature and token: `feature`, `effect`, `rank`, `token`, `logit`,
        `times_control`."""
        rows = []
        for effect, sign in (("promoted", 1), ("suppressed", -1)):
            logits, tokens = getattr(self, effect), getattr(self, f"{effect}_tokens")
            for i, feature in enumerate(self.features.tolist()):
                for rank, (token, logit) in enumerate(
                    zip(tokens[i], logits[i].tolist(), strict=True), 1
                ):
                    ratio = sign * logit / max(float(self.control[i]), 1e-30)
                    rows.append((feature, effect, rank, token, logit, ratio))
        frame = pd.DataFrame(
            rows, columns=["feature", "effect", "rank", "token", "logit", "times_control"]
        )
        return frame.sort_values(["feature", "effect", "rank"], ignore_index=True)


@torch.inference_mode()
def vocabulary_effects(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    features: Indices,
    *,
    n: int = 10,
    controls: int = 20,
    seed: int = 0,
) -> VocabularyEffects:
    """The `n` most promoted and most suppressed tokens of some features, and the scale of chance.

    Raises as `check_sae`; ValueError for features that the SAE has not, and for an SAE that does
    not write into the residual stream (`hook_z`, `mlp.hook_post`): its directions are no sums of
    token logits.
    """
    check_sae(sae, model)
    hook = getattr(sae.cfg.metadata, "hook_name_out", None) or sae_hook(sae)
    features = [int(feature) for feature in features]
    if not features or min(features) < 0 or max(features) >= sae.cfg.d_sae:
        raise ValueError(f"Features lie in 0 to {sae.cfg.d_sae - 1}, got {features[:10]}.")
    if not RESIDUAL.search(hook):
        raise ValueError(
            f"{hook} does not write into the residual stream: there is no direct path to the vocabulary."
        )
    direction = _directions(sae, features).to(model.cfg.device)
    logits = direct_logits(model, direction)
    drawn = torch.randn(
        controls, direction.shape[1], generator=derive_generator(seed, "random decoder directions")
    )
    largest = (
        direct_logits(model, (drawn / drawn.norm(dim=1, keepdim=True)).to(direction))
        .max(1)
        .values.median()
    )
    high, low = logits.topk(n), (-logits).topk(n)

    def strings(ids: Tensor) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(token_string(model.tokenizer, i) for i in row) for row in ids.tolist())

    return VocabularyEffects(
        np.array(features),
        high.values.cpu().numpy(),
        high.indices.cpu().numpy(),
        strings(high.indices),
        -low.values.cpu().numpy(),
        low.indices.cpu().numpy(),
        strings(low.indices),
        (direction.norm(dim=1) * largest).cpu().numpy(),
    )


def direct_logits(
    model: TransformerBridge, direction: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row vocab"]:
    """Directions of the residual stream -> centred logits by the direct path, before the final
    norm's scale."""
    weight, centred = final_norm(model)
    x = direction.float()
    x = (x - x.mean(-1, keepdim=True) if centred else x) * weight
    logits = x @ model.W_U.float()
    return logits - logits.mean(-1, keepdim=True)


def final_norm(model: TransformerBridge) -> tuple[Float[Tensor, " d_model"], bool]:
    """(the final norm's weight, whether it centres), measured on the norm itself: families store it
    differently.

    A vector of mean 0 and its negative go through; half their difference is the normalised vector
    times the weight.
    """
    width, norm = model.cfg.d_model, getattr(model, "ln_final", None)
    probe = torch.ones(width, device=model.cfg.device)
    probe[1::2] = -1
    if width % 2:
        probe[:3] = torch.tensor([2.0, -1.0, -1.0])
        probe[3::2], probe[4::2] = 1, -1
    if norm is None:
        return torch.ones_like(probe), False
    probe = probe * 1000  # large against the norm's epsilon

    def through(x: Tensor) -> Tensor:
        return norm(x[None, None].to(model.cfg.dtype))[0, 0].float()

    weight = (through(probe) - through(-probe)) / 2 * probe.square().mean().sqrt() / probe
    return weight, bool(torch.allclose(through(probe + 500), through(probe), rtol=1e-2, atol=1e-3))


def _directions(sae: SparseAutoencoder, features: list[int]) -> Float[Tensor, "row d_in"]:
    if hasattr(sae, "W_dec"):
        return sae.W_dec[features].float()
    one = torch.zeros(len(features), sae.cfg.d_sae)
    one[torch.arange(len(features)), features] = 1
    return (sae.decode(one) - sae.decode(torch.zeros_like(one))).float()
