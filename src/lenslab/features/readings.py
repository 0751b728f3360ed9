"""What a feature really fires on: classes of tokens, and form against content.

1. `token_classes`: how a feature's activation spreads over digits, brackets, word starts, foreign
   letters ..., beside how common each class is. A "mathematics feature" that fires on digits
   wherever they stand is a digit feature; `firing_summary` says what each chosen feature mainly
   fires on, and what its score is without those tokens.
2. `form_and_concept`: on texts that say the same thing in several forms, how much of a feature's
   activation follows the form and how much the content (two-way analysis of variance, one text per
   cell), beside what shuffled labels give.
3. `explained_by_token`: how much of an activation the token alone would foretell.
4. `vocabulary_effects`: which next tokens a feature's decoder direction makes likelier, read
   through the final norm and the unembedding, later layers skipped.
"""

from __future__ import annotations

import unicodedata

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.features.activations import (
    FeatureActivations,
    Indices,
    Labels,
    Matrix,
    check_features,
    check_matrix,
    columns_of,
)
from lenslab.metrics import as_mask, auroc
from lenslab.runtime import derive_generator
from lenslab.sae.inputs import RESIDUAL, SparseAutoencoder, check_sae, sae_hook
from lenslab.texts import LabelledTexts
from lenslab.tokens import token_string

CLASSES = ("digits", "bracket or quote", "operator or punctuation", "line break or indent")
CLASSES += ("word start", "word piece", "letters beyond ASCII", "emoji or other symbol")
CLASSES += ("part of a character",)
BRACKETS = frozenset("()[]{}<>\"'`“”‘’«»")
CONTROLS = 20  # random directions
SEEN = 5  # times that a token must have been seen for its mean to say something
ROUNDING = 1e-6  # of float32 activations, relative: what varies by less does not vary


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


def _token_table(fa: FeatureActivations) -> pd.DataFrame:
    """`text`, `token` (its string) and `class` of every real token. ValueError for negative
    activations."""
    if (fa.matrix.data < 0).any():
        raise ValueError("Negative activations have no shares: take an SAE without such.")
    strings = [fa.batch.strings(row) for row in range(len(fa.batch))]
    seen = [strings[text][position] for text, position in fa.batch.real.nonzero().tolist()]
    classes = pd.Categorical([token_class(string) for string in seen], CLASSES)
    return pd.DataFrame({"text": fa.text, "token": seen, "class": classes})


def _shares(tokens: pd.DataFrame, by: str, values: np.ndarray) -> pd.DataFrame:
    """How `values [token, feature]` spread over the classes or the strings of tokens: [group,
    feature], NaN for a feature that never fires."""
    sums = pd.DataFrame(values, dtype=np.float64).groupby(tokens[by], observed=False).sum()
    return sums / sums.sum().replace(0, np.nan)


def token_classes(fa: FeatureActivations, features: Indices) -> pd.DataFrame:
    """Share of each feature's activation that falls on each class of tokens.

    One row per class; column `all tokens` is the control, how common the class is; then one column
    per feature. A last row, `one token`, has the largest share that a single token string holds.
    NaN for a feature that never fires. ValueError for negative activations.
    """
    tokens = _token_table(fa)
    values = np.column_stack([np.ones(len(tokens)), columns_of(fa.matrix, features)])
    table = _shares(tokens, "class", values)
    table.loc["one token"] = _shares(tokens, "token", values).max()
    return table.set_axis(["all tokens", *map(str, features)], axis=1)


def feature_names(fa: FeatureActivations, features: Indices) -> list[str]:
    """Each feature's number and the token that holds most of its activation, for pictures and
    tables; "(silent)" where it never fires. ValueError for negative activations."""
    by_token = _shares(_token_table(fa), "token", columns_of(fa.matrix, features)).fillna(0)
    best = zip(features, by_token.idxmax(), by_token.max() > 0, strict=True)
    return [f"{f} {token!r}" if fires else f"{f} (silent)" for f, token, fires in best]


def firing_summary(
    fa: FeatureActivations, features: Indices, labels: LabelledTexts
) -> pd.DataFrame:
    """What the feature chosen for each category (`features`, in the order of `labels.categories`)
    mainly fires on, and how well it tells the category apart without that.

    All from the held-out half: `fires_on`, the class of tokens that holds the largest `share` of
    the activation ("nothing" for a silent feature); `token`, the string that does, and its
    `token_share`; `auroc` of the largest value in a text, and `auroc_without` where tokens of that
    class do not count. ValueError for negative activations and for other texts than the labels'.
    """
    if len(fa.batch) != len(labels):
        raise ValueError(f"{len(fa.batch)} texts but {len(labels)} labels: encode labels.texts.")
    held_out = as_mask(labels.held_out)
    fa, inside = fa[np.flatnonzero(held_out)], labels.inside[held_out]  # [text, category]
    tokens, values = _token_table(fa), columns_of(fa.matrix, features)  # [token, category]
    by_class, by_token = (_shares(tokens, by, values).fillna(0) for by in ("class", "token"))
    main = by_class.idxmax().astype(str)
    kept = values * (tokens["class"].to_numpy()[:, None] != main.to_numpy())
    table = {
        "category": labels.categories,
        "feature": np.asarray(features),
        "fires_on": main.where(by_class.max() > 0, "nothing"),
        "share": by_class.max(),
        "token": by_token.idxmax().where(by_token.max() > 0, ""),
        "token_share": by_token.max(),
    }
    for name, used in {"auroc": values, "auroc_without": kept}.items():
        pooled = pd.DataFrame(used).groupby(tokens["text"]).max().to_numpy()  # [text, category]
        table[name] = [float(auroc(*pair)) for pair in zip(pooled.T, inside.T, strict=True)]
    return pd.DataFrame(table)


def form_and_concept(
    matrix: Matrix, form: Labels, concept: Labels, *, n: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Does a feature follow how a thing is said, or what is said? Pooled activations, every concept
    once in every form; one row per feature that fires on ten texts or more and is not the same on
    all texts, up to rounding: what does not vary has no variance to share out.

    Columns: `feature`; `form` and `concept`, shares of its variance over texts (epsilon squared:
    corrected for the number of levels, so that chance gives 0); `form_p` and `concept_p`, the share
    of `n` shuffles (within a concept, within a form) that reach them.

    Raises ValueError where a concept lacks a form or has one twice: the two shares would not be
    comparable; and for a single form or concept.
    """
    matrix = check_matrix(matrix, form)
    cells = pd.crosstab(np.asarray(form), np.asarray(concept))
    if (cells != 1).any(axis=None) or min(cells.shape) < 2:
        raise ValueError("Needed is every concept exactly once in every form, and two of each.")
    features = np.flatnonzero(np.asarray((matrix > 0).sum(axis=0)).ravel() >= 10)
    values = columns_of(matrix, features).astype(np.float64)[np.lexsort([concept, form])]
    varies = np.ptp(values, axis=0) > ROUNDING * np.abs(values).max(axis=0)
    features, values = features[varies], values[:, varies]
    table = values.reshape(*cells.shape, len(features))  # [form, concept, feature]
    observed = _epsilon_squared(table)
    above = np.zeros_like(observed)
    rng = np.random.default_rng(derive_generator(seed, "form and concept").initial_seed())
    rows, columns = np.indices(cells.shape)
    for _ in range(n):
        within_concept = table[rng.permuted(rows, axis=0), columns]
        within_form = table[rows, rng.permuted(columns, axis=1)]
        above[0] += _epsilon_squared(within_concept)[0] >= observed[0] - 1e-12
        above[1] += _epsilon_squared(within_form)[1] >= observed[1] - 1e-12
    p = (1 + above) / (1 + n)
    table = pd.DataFrame({"feature": features, "form": observed[0], "concept": observed[1]})
    return table.assign(form_p=p[0], concept_p=p[1])


def _epsilon_squared(table: np.ndarray) -> np.ndarray:
    """Of `[form, concept, feature]`, (form, concept) `[2, feature]`: sums of squares less what
    noise alone would give, over the total."""
    f, c, _ = table.shape
    grand = table.mean(axis=(0, 1))
    ss_form = c * ((table.mean(axis=1) - grand) ** 2).sum(axis=0)
    ss_concept = f * ((table.mean(axis=0) - grand) ** 2).sum(axis=0)
    ss_total = ((table - grand) ** 2).sum(axis=(0, 1))
    noise = (ss_total - ss_form - ss_concept) / ((f - 1) * (c - 1))
    return np.stack([ss_form - (f - 1) * noise, ss_concept - (c - 1) * noise]) / ss_total


def explained_by_token(
    fa: FeatureActivations, features: Indices, held_out: Shaped[np.ndarray, " text"]
) -> pd.DataFrame:
    """Share of the variance of each feature's activation at the tokens of held-out texts that is
    foretold by its mean, in the other texts, at tokens of the same class (`by_class`) and of the
    same string (`by_string`; of a string that is new or stands there fewer than five times, by its
    class).

    0 is no better than the mean of all tokens; NaN where a feature does not vary. ValueError for
    negative activations and another number of texts.
    """
    if len(fa.batch) != len(held_out):
        raise ValueError(f"{len(fa.batch)} texts but {len(held_out)} marks: one each is needed.")
    tokens, new = _token_table(fa), as_mask(np.asarray(held_out))[fa.text]
    table = pd.DataFrame({"feature": np.asarray(features)})
    values = pd.DataFrame(columns_of(fa.matrix, features), dtype=np.float64)  # [token, feature]
    guess = pd.DataFrame(0.0, values.index[new], values.columns) + values[~new].mean()
    spread = ((values[new] - guess) ** 2).sum().replace(0, np.nan)
    for name, by in (("by_class", "class"), ("by_string", "token")):
        groups = values[~new].groupby(tokens.loc[~new, by], observed=True)
        means = groups.mean()[groups.size() >= SEEN]
        own = means.reindex(tokens.loc[new, by].astype(str))
        guess = own.set_axis(guess.index).fillna(guess)
        table[name] = (1 - ((values[new] - guess) ** 2).sum() / spread).to_numpy()
    return table


@torch.inference_mode()
def vocabulary_effects(
    model: TransformerBridge, sae: SparseAutoencoder, features: Indices, *, n: int = 10
) -> pd.DataFrame:
    """The `n` tokens that each feature most promotes and most suppresses by the direct path, and
    the scale of chance: the largest logit of a random direction of equal norm, median of
    twenty.

    One row per feature and token, largest effect first: `feature`, `effect` ("promoted",
    "suppressed"), `rank`, `token`, `logit` (per unit of activation, before the final norm's scale)
    and `times_control` (over the scale of chance).

    Raises as `check_sae`; ValueError for features that the SAE has not, and for an SAE that does
    not write into the residual stream (`hook_z`, `mlp.hook_post`): its directions are no sums of
    token logits.
    """
    check_sae(sae, model)
    check_features(features, sae.cfg.d_sae)
    hook = getattr(sae.cfg.metadata, "hook_name_out", None) or sae_hook(sae)
    if not RESIDUAL.search(hook):
        raise ValueError(f"{hook} does not write into the residual stream.")
    # 1. What the features write: [feature, d_model]
    features = torch.as_tensor(np.asarray(features))
    if hasattr(sae, "W_dec"):
        direction = sae.W_dec[features].float().to(model.cfg.device)
    else:
        one = torch.nn.functional.one_hot(features, sae.cfg.d_sae).float()
        direction = (sae.decode(one) - sae.decode(0 * one)).float().to(model.cfg.device)
    # 2. The same for random directions of the same norm
    generator = derive_generator(0, "random decoder directions")
    drawn = torch.randn(CONTROLS, direction.shape[1], generator=generator)
    drawn = (drawn / drawn.norm(dim=1, keepdim=True)).to(direction)
    chance = direct_logits(model, drawn).amax(1).median() * direction.norm(dim=1).clamp_min(1e-30)
    # 3. The ends of the vocabulary
    logits = direct_logits(model, direction)[:, : len(model.tokenizer)]  # padding has no tokens
    frames = []
    for effect, sign in (("promoted", 1), ("suppressed", -1)):
        best = (sign * logits).topk(n)  # [feature, n]
        size = best.values.cpu().double().numpy()
        tokens = [token_string(model.tokenizer, token) for token in best.indices.flatten().tolist()]
        frame = pd.DataFrame({"feature": np.repeat(features.numpy(), n), "effect": effect})
        frame["rank"] = np.tile(np.arange(1, n + 1), len(features))
        frame["token"] = tokens
        frame["logit"] = sign * size.ravel()
        frame["times_control"] = (size / chance.cpu().double().numpy()[:, None]).ravel()
        frames.append(frame)
    return pd.concat(frames).sort_values(["feature", "effect", "rank"], ignore_index=True)


def direct_logits(
    model: TransformerBridge, direction: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row vocab"]:
    """Directions of the residual stream -> centred logits by the direct path.

    Exact up to two things: the final norm divides by a scale of its own at every token, and where a
    model caps its logits (Gemma 2), these are the uncapped ones, in the same order.
    """
    weight, centred = final_norm(model)
    x = direction.float() * logit_scale(model)
    x = (x - x.mean(-1, keepdim=True) if centred else x) * weight
    logits = x @ model.W_U.float()
    return logits - logits.mean(-1, keepdim=True)


@torch.inference_mode()
def logit_scale(model: TransformerBridge) -> float:
    """What the model multiplies its logits by after the unembedding (Cohere, Granite), measured at
    one token on the nine smallest, where a soft cap changes nothing."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device)
    logits, cache = model.run_with_cache(token, names_filter=["unembed.hook_out"])
    before, after = (x.cpu().double().flatten() for x in (cache["unembed.hook_out"], logits))
    before, after = before[before != 0], after[before != 0]
    smallest = before.abs().argsort()[:9]
    return float((after[smallest] / before[smallest]).median())


def final_norm(model: TransformerBridge) -> tuple[Float[Tensor, " d_model"], bool]:
    """(the final norm's weight, whether it centres), measured on the norm itself: families store it
    differently.

    A vector of mean 0 and its negative go through; half their difference is the normalised vector
    times the weight.
    """
    norm = getattr(model, "ln_final", None)
    if norm is None:
        return torch.ones(model.cfg.d_model, device=model.cfg.device), False
    probe = 1.0 - 2 * (torch.arange(model.cfg.d_model, device=model.cfg.device) % 2)
    probe = 1000 * (probe - probe.mean())  # large against the norm's epsilon

    def through(x: Tensor) -> Tensor:
        return norm(x[None, None].to(model.cfg.dtype))[0, 0].float()

    weight = (through(probe) - through(-probe)) / 2 * probe.square().mean().sqrt() / probe
    return weight, bool(torch.allclose(through(probe + 500), through(probe), rtol=1e-2, atol=1e-3))
