"""What features fire on in running text: their strongest contexts, and a sample of all firings.

How `find_contexts` goes through any amount of text in bounded memory:
1. windows are encoded a few at a time, every real token once;
2. per feature the k strongest windows so far are kept, each at its strongest token, so that no two
   contexts come from neighbouring tokens; contexts with the same tokens around the strongest
   (repeated documents) are kept once;
3. per feature a sample of the tokens on which it fires is kept: those with the largest random
   numbers, drawn for every place of a window from the seed and the window's number;
4. of each kept token only the tokens around it are stored, within its document, with the feature's
   activation there. The size of the batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.features.activations import Index, Indices, check_features, marked_context
from lenslab.runtime import derive_generator, progress_bar
from lenslab.sae.inputs import SparseAutoencoder, encode, input_transform, sae_hook
from lenslab.tokens import TokenBatch, token_string

CELLS = 1 << 23  # activations held dense at a time: 32 MB
SAME = 5  # tokens on either side of the strongest in which contexts must agree to be the same


@dataclass(frozen=True, eq=False)
class TopContexts:
    """Top contexts and a sample, for some features of one SAE.

    Both tables have one row per context: `feature`, `activation`, `window` (counted over all
    batches), `position`, and around it `ids` and `activations`, -1 and 0 beyond the document.
    """

    features: Int[np.ndarray, " feature"]
    fired: Int[np.ndarray, " feature"]  # tokens on which it fires
    tokens: int  # real tokens looked at
    strongest: pd.DataFrame  # by feature, strongest first
    sample: pd.DataFrame  # by feature, in random order
    tokenizer: Any = field(default=None, repr=False)

    def top(self, feature: Index) -> pd.DataFrame:
        """The strongest contexts: `activation`, `window`, `position`, `context`, `tokens`,
        `activations`.

        `context` has the token itself between double angle quotes; `tokens` and `activations` go
        together.
        """
        return self._readable(self._of(self.strongest, feature))

    def quantiles(self, feature: Index, n: int = 5, per: int = 2) -> pd.DataFrame:
        """`per` contexts at random from each of `n` equal shares of the firings, strongest share
        first.

        Columns as `top`, and before them `quantile` (1 = the strongest), `low` and `high` of it.
        """
        rows = self._of(self.sample, feature)
        rows = rows.sort_values("activation", ascending=False, kind="stable")
        rows = rows.assign(quantile=1 + np.arange(len(rows)) * n // max(len(rows), 1))
        share = rows.groupby("quantile")["activation"]
        rows = rows.assign(low=share.transform("min"), high=share.transform("max")).sort_index()
        rows = rows[~rows.assign(ids=rows["ids"].map(bytes)).duplicated(["quantile", "ids"])]
        rows = rows.groupby("quantile").head(per).sort_values("quantile", kind="stable")
        rows = rows.reset_index(drop=True)
        return pd.concat([rows[["quantile", "low", "high"]], self._readable(rows)], axis=1)

    def _of(self, table: pd.DataFrame, feature: Index) -> pd.DataFrame:
        if feature not in self.features:
            raise ValueError(f"Feature {feature} was not followed: name it in `features`.")
        return table[table["feature"] == feature].reset_index(drop=True)

    def _readable(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Columns `activation` to `activations` of `top`."""
        text = []
        for ids, activations in zip(rows["ids"], rows["activations"], strict=True):
            inside = ids >= 0
            tokens = [token_string(self.tokenizer, token) for token in ids[inside].tolist()]
            before = int(inside[: len(ids) // 2].sum())
            text.append((marked_context(tokens, before), tokens, activations[inside].tolist()))
        columns = ["context", "tokens", "activations"]
        readable = pd.DataFrame(text, columns=columns, index=rows.index, dtype=object)
        return pd.concat([rows[["activation", "window", "position"]], readable], axis=1)


def find_contexts(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    batches: TokenBatch | Iterable[TokenBatch],
    *,
    k: int = 10,
    sample: int = 50,
    context: int = 10,
    features: Indices | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TopContexts:
    """Top contexts and a sample of firings for all features at once, or for some.

    Args:
        batches: windows (`lenslab.tokens.pack`), in one batch or, for more text than memory,
            several.
        k: contexts kept per feature.
        sample: firings kept per feature.
        context: tokens shown on either side.

    Raises as `check_sae` and `harvest`; ValueError for features that the SAE has not.
    """
    d_sae = sae.cfg.d_sae
    features = np.arange(d_sae) if features is None else np.unique(features)
    check_features(features, d_sae)
    followed = torch.from_numpy(np.isin(np.arange(d_sae), features))
    hook = sae_hook(sae)
    strongest = sampled = None
    fired = np.zeros(d_sae, dtype=np.int64)
    first = tokens = 0  # windows and tokens before these
    bar = progress_bar(unit="tok", desc="contexts", progress=progress)
    for batch in [batches] if isinstance(batches, TokenBatch) else batches:
        transform = input_transform(sae, model, batch)
        step = max(1, CELLS // (batch.tokens.shape[1] * d_sae))
        for start in range(0, len(batch), step):
            # 1. Encode
            part = batch[start : start + step]
            captured = harvest(model, part, hook, compute="float32", progress=False)[hook]
            latents = torch.zeros(*part.tokens.shape, d_sae)  # [window, pos, feature]
            latents[part.real] = encode(sae, transform(captured[part.real])) * followed
            fired += (latents > 0).sum((0, 1)).numpy()
            windows = _Windows(part, latents, first)
            # 2. Each window's strongest token
            best = latents.max(1)  # [window, feature]
            window, feature = (best.values > 0).nonzero(as_tuple=True)
            rows = windows.rows(window, best.indices[window, feature], feature)
            same = [ids.tobytes() for ids in windows.cut(rows, SAME)["ids"]]
            rows = rows.assign(key=rows["activation"], same=same)
            strongest = _keep(strongest, rows, k, windows, context)
            # 3. A random number for every firing
            labels = [f"firings of window {first + i}" for i in range(len(part))]
            generators = [derive_generator(seed, label) for label in labels]
            keys = torch.stack([torch.rand(latents.shape[1:], generator=g) for g in generators])
            window, position, feature = (latents > 0).nonzero(as_tuple=True)
            rows = windows.rows(window, position, feature)
            rows = rows.assign(key=keys[window, position, feature].numpy())
            sampled = _keep(sampled, rows, sample, windows, context)
            first, tokens = first + len(part), tokens + part.n_real
            bar.update(part.n_real)
    bar.close()
    if not tokens:
        raise ValueError("There are no windows: the list of batches is empty.")
    order = {"by": ["feature", "key"], "ascending": [True, False], "kind": "stable"}
    tables = [table.sort_values(**order) for table in (strongest, sampled)]
    return TopContexts(features, fired[features], tokens, *tables, batch.tokenizer)


def _keep(
    kept: pd.DataFrame | None, new: pd.DataFrame, size: int, windows: _Windows, context: int
) -> pd.DataFrame:
    """The `size` rows of each feature with the largest keys, ties to the earlier; of the `same`
    ones the first. Contexts are cut for the new ones among them."""
    rows = pd.concat([kept, new]).sort_values("key", ascending=False, kind="stable")
    if "same" in rows:
        rows = rows.drop_duplicates(["feature", "same"])
    rows = rows.groupby("feature").head(size)
    is_new = rows["window"] >= windows.first
    return pd.concat([rows[~is_new], windows.cut(rows[is_new], context)])


@dataclass(frozen=True, eq=False)
class _Windows:
    """A few windows with the features' values, from which contexts are cut."""

    batch: TokenBatch
    latents: Float[Tensor, "window pos feature"]
    first: int  # number of the first window

    def rows(self, window: Tensor, position: Tensor, feature: Tensor) -> pd.DataFrame:
        """One row per token and feature."""
        values = {
            "feature": feature.numpy(),
            "activation": self.latents[window, position, feature].double().numpy(),
            "window": self.first + window.numpy(),
            "position": position.numpy(),
        }
        return pd.DataFrame(values)

    def cut(self, rows: pd.DataFrame, context: int) -> pd.DataFrame:
        """The rows with the `ids` around their token and the feature's `activations` there."""
        window = torch.tensor(rows["window"].to_numpy() - self.first)[:, None]
        position = torch.tensor(rows["position"].to_numpy())[:, None]
        feature = torch.tensor(rows["feature"].to_numpy())[:, None]
        around = position + torch.arange(-context, context + 1)  # [row, place]
        places = around.clamp(0, self.batch.tokens.shape[1] - 1)
        real = self.batch.real
        document = (~real).cumsum(1)  # BOS, EOS and padding part documents
        same = document[window, places] == document[window, position]
        inside = same & (places == around) & real[window, places]
        ids = self.batch.tokens[window, places].where(inside, -1)
        activations = self.latents[window, places, feature].where(inside, 0)
        return rows.assign(ids=list(ids.numpy()), activations=list(activations.numpy()))
