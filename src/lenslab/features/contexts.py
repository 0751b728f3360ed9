"""What features fire on: their strongest contexts, a sample over the whole range, and what they
write.

How `find_contexts` goes through any amount of text in bounded memory:
1. windows are encoded a few at a time, every real token once;
2. per feature the k strongest windows so far are kept, each at its strongest token, so that no two
   contexts come from neighbouring tokens; contexts that show the same tokens (repeated documents,
   overlapping windows) are kept once;
3. per feature a sample of the tokens on which it fires is kept: those with the largest of random
   numbers that depend on seed, window, position and feature alone. Its quantiles are the feature's
   own;
4. of each kept token only the tokens around it are stored, within its document, with the feature's
activation there. The size of the batches changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.features.activations import Index, Indices
from lenslab.files import atomic_write
from lenslab.runtime import derive_generator, progress_bar
from lenslab.sae.load import SparseAutoencoder, encode, input_transform, sae_hook
from lenslab.tokens import TokenBatch, token_string

CELLS = 1 << 24  # activations held dense at a time: 64 MB


SAME = 5  # tokens, beside the strongest, in which cut-off contexts must agree to be the same


MIX = (
    0xBF58476D1CE4E5B9,
    0x94D049BB133111EB,
)  # of splitmix64: spreads numbers that count up evenly


@dataclass(frozen=True, eq=False)
class Contexts:
    """Tokens on which features fire, by feature, strongest (or largest random number) first.

    Where a feature has fewer entries, `window` is -1. `ids` is -1 beyond the document or the
    window.
    """

    value: Float[np.ndarray, "feature entry"]
    window: Int[np.ndarray, "feature entry"]  # counted over all batches
    position: Int[np.ndarray, "feature entry"]
    ids: Int[np.ndarray, "feature entry place"]  # tokens around; the token itself is in the middle
    activation: Float[np.ndarray, "feature entry place"]


@dataclass(frozen=True, eq=False)
class TopContexts:
    """Top contexts and a sample, for some features of one SAE."""

    features: Int[np.ndarray, " feature"]
    fired: Int[np.ndarray, " feature"]  # tokens on which it fires
    tokens: int  # real tokens looked at
    strongest: Contexts
    sample: Contexts
    k: int
    tokenizer: Any = field(default=None, repr=False)

    def top(self, feature: Index) -> pd.DataFrame:
        """The strongest contexts: `activation`, `window`, `position`, `context`, `tokens`,
        `activations`.

        `context` has the token itself between double angle quotes; `tokens` and `activations` go
        together.
        """
        row = self._row(feature)
        shown = _distinct(self.strongest.ids[row], self.strongest.window[row] >= 0)[: self.k]
        return self._frame(self.strongest, row, shown)

    def quantiles(self, feature: Index, n: int = 5, per: int = 2) -> pd.DataFrame:
        """`per` contexts at random from each of `n` equal shares of the firings, strongest share
        first.

        Columns as `top`, and before them `quantile` (1 = the strongest), `low` and `high` of it.
        """
        row, frames = self._row(feature), []
        known = np.flatnonzero(self.sample.window[row] >= 0)
        by_value = known[np.argsort(-self.sample.value[row, known], kind="stable")]
        for share, places in enumerate(np.array_split(by_value, n), 1):
            places = np.sort(places)  # the order of the random numbers
            shown = places[
                _distinct(self.sample.ids[row, places], np.ones(len(places), dtype=bool))
            ][:per]
            values = self.sample.value[row, places]
            bounds = {
                "quantile": share,
                "low": values.min(initial=np.inf),
                "high": values.max(initial=-np.inf),
            }
            frames.append(self._frame(self.sample, row, shown).assign(**bounds))
        frame = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
        return frame[["quantile", "low", "high", *frame.columns[:-3]]]

    def save(self, path: str | os.PathLike) -> None:
        """A safetensors file; the tokenizer is not in it."""
        parts = {"strongest": self.strongest, "sample": self.sample}
        arrays = {
            f"{part}.{key}": value
            for part, held in parts.items()
            for key, value in vars(held).items()
        }
        arrays |= {"features": self.features, "fired": self.fired}
        with atomic_write(path) as temporary:
            header = {"tokens": json.dumps(self.tokens), "k": json.dumps(self.k)}
            save_file(
                {key: np.ascontiguousarray(value) for key, value in arrays.items()},
                temporary,
                header,
            )

    @classmethod
    def load(cls, path: str | os.PathLike, tokenizer: Any) -> TopContexts:
        """Read what `save` wrote; `tokenizer` is the model's. ValueError for another file or one
        cut off."""
        try:
            with safe_open(path, "np") as file:
                header, arrays = (
                    file.metadata() or {},
                    {key: file.get_tensor(key) for key in file.keys()},
                )
            keys = ("value", "window", "position", "ids", "activation")
            parts = [
                Contexts(*(arrays[f"{part}.{key}"] for key in keys))
                for part in ("strongest", "sample")
            ]
            tokens, k = json.loads(header["tokens"]), json.loads(header["k"])
            return cls(arrays["features"], arrays["fired"], tokens, *parts, k, tokenizer)
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{Path(path).name} holds no contexts, or is cut off ({error})."
            ) from error

    def _row(self, feature: Index) -> int:
        found = np.flatnonzero(self.features == feature)
        if not len(found):
            raise ValueError(
                f"Feature {feature} was not followed: find_contexts(..., features=[{feature}])."
            )
        return int(found[0])

    def _frame(self, held: Contexts, row: int, entries: np.ndarray) -> pd.DataFrame:
        middle, rows = held.ids.shape[2] // 2, []
        for i in entries:
            ids, places = held.ids[row, i], np.flatnonzero(held.ids[row, i] >= 0)
            strings = [token_string(self.tokenizer, int(ids[p])) for p in places]
            marked = "".join(
                f"«{s}»" if p == middle else s for s, p in zip(strings, places, strict=True)
            )
            marked = marked.replace("\n", "↵").replace("\t", "→")
            place = (
                float(held.value[row, i]),
                int(held.window[row, i]),
                int(held.position[row, i]),
            )
            rows.append((*place, marked, strings, held.activation[row, i, places].tolist()))
        return pd.DataFrame(
            rows, columns=["activation", "window", "position", "context", "tokens", "activations"]
        )


def find_contexts(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    batches: TokenBatch | Iterable[TokenBatch],
    *,
    k: int = 10,
    sample: int = 50,
    context: int = 10,
    features: Indices | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> TopContexts:
    """Top contexts and a sample of firings for all features at once, or for some.

    Args: batches: windows (`lenslab.tokens.pack`), in one batch or, for more text than memory,
        several. k: contexts kept per feature. sample: firings kept per feature. context: tokens
        shown on either side.

    Raises as `check_sae` and `harvest`; ValueError for features that the SAE has not, and k or
    sample below 1.
    """
    chosen = (
        np.arange(sae.cfg.d_sae) if features is None else np.array(sorted(set(map(int, features))))
    )
    if (
        min(k, sample) < 1
        or context < 0
        or not len(chosen)
        or chosen[0] < 0
        or chosen[-1] >= sae.cfg.d_sae
    ):
        raise ValueError(f"k and sample are at least 1, features lie in 0 to {sae.cfg.d_sae - 1}.")
    transform, hook = input_transform(sae, model), sae_hook(sae)
    strongest, sampled = (
        _Kept(len(chosen), 2 * k, context, True),
        _Kept(len(chosen), sample, context, False),
    )
    salt = int(torch.randint(2**62, (), generator=derive_generator(seed, "sample of firings")))
    fired, tokens, window, tokenizer = np.zeros(len(chosen), dtype=np.int64), 0, 0, None
    bar = progress_bar(unit="tok", desc="contexts", progress=progress)
    for batch in [batches] if isinstance(batches, TokenBatch) else batches:
        tokenizer = batch.tokenizer
        step = max(1, min(batch_size, CELLS // (batch.tokens.shape[1] * sae.cfg.d_sae)))
        for start in range(0, len(batch), step):
            part = batch[start : start + step]
            values = harvest(model, part, hook, batch_size=step, compute="float32", progress=False)[
                hook
            ]
            dense = torch.zeros(*part.tokens.shape, len(chosen))
            dense[part.real] = encode(sae, transform(values[part.real]))[
                :, torch.from_numpy(chosen)
            ]
            windows = _Windows(part, dense, window, context)
            fired += (dense > 0).sum((0, 1)).numpy()
            best = dense.max(1)
            row, column = (
                (best.values > 0) & (best.values > torch.from_numpy(strongest.floor))
            ).nonzero(as_tuple=True)
            strongest.add(
                windows,
                row,
                best.indices[row, column],
                column,
                best.values[row, column].double().numpy(),
            )
            row, position, column = (dense > 0).nonzero(as_tuple=True)
            key = _random_keys(salt, window + row.numpy(), position.numpy(), chosen[column.numpy()])
            few = torch.from_numpy(key > sampled.floor[column.numpy()])
            sampled.add(windows, row[few], position[few], column[few], key[few.numpy()])
            window, tokens = window + len(part), tokens + part.n_real
            bar.update(part.n_real)
    bar.close()
    if not tokens:
        raise ValueError("There are no windows: the list of batches is empty.")
    return TopContexts(
        chosen, fired, tokens, strongest.contexts(), sampled.contexts(), k, tokenizer
    )


class _Windows:
    """A few windows with the features' values, from which contexts are cut."""

    def __init__(
        self,
        batch: TokenBatch,
        dense: Float[Tensor, "window pos feature"],
        first: int,
        context: int,
    ):
        self.first, self.dense, self.offsets = first, dense, torch.arange(-context, context + 1)
        self.ids = batch.tokens.masked_fill(~batch.real, -1)
        self.document = (~batch.real).cumsum(1)  # BOS, EOS and padding part documents

    def around(
        self, row: Tensor, position: Tensor, column: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, activations) `[entry, place]` of the tokens around, within the document."""
        places = position[:, None] + self.offsets
        inside = (places >= 0) & (places < self.ids.shape[1])
        at = (row[:, None].expand_as(places), places.clamp(0, self.ids.shape[1] - 1))
        inside &= self.document[at] == self.document[row, position][:, None]
        ids = self.ids[at].where(inside, -1)
        values = self.dense[(*at, column[:, None].expand_as(places))].where(ids >= 0, 0)
        return ids.int().numpy(), values.numpy()


class _Kept:
    """The `size` entries with the largest keys of each feature, ties to the earlier; bounded
    whatever is added."""

    def __init__(self, n_features: int, size: int, context: int, distinct: bool):
        self.n, self.size, self.distinct, width = n_features, size, distinct, 2 * context + 1
        kinds = {
            "column": (np.int64, ()),
            "key": (np.float64, ()),
            "window": (np.int64, ()),
            "position": (np.int64, ()),
        }
        kinds |= {
            "value": (np.float32, ()),
            "ids": (np.int32, (width,)),
            "activation": (np.float32, (width,)),
        }
        self.entries = {
            name: np.zeros((0, *shape), dtype=kind) for name, (kind, shape) in kinds.items()
        }
        self.floor = np.full(n_features, -np.inf)  # what a key must exceed to be kept
        self.multipliers = np.array(
            [pow(MIX[0], i + 1, 2**64) | 1 for i in range(width)], dtype=np.uint64
        )

    def add(
        self, windows: _Windows, row: Tensor, position: Tensor, column: Tensor, key: np.ndarray
    ) -> None:
        if not len(row):
            return
        ids, activation = windows.around(row, position, column)
        value = windows.dense[row, position, column].numpy()
        new = {
            "column": column.numpy(),
            "key": key,
            "window": windows.first + row.numpy(),
            "ids": ids,
        }
        new |= {"position": position.numpy(), "value": value, "activation": activation}
        merged = {name: np.concatenate([self.entries[name], new[name]]) for name in self.entries}
        order = np.lexsort([merged["position"], merged["window"], -merged["key"], merged["column"]])
        if self.distinct:
            same = (merged["ids"].astype(np.uint64) * self.multipliers).sum(
                1, dtype=np.uint64
            )  # wraps around
            same = same * np.uint64(MIX[1]) + merged["column"].astype(np.uint64)
            order = order[np.sort(np.unique(same[order], return_index=True)[1])]
        columns = merged["column"][order]
        rank = np.arange(len(columns)) - np.searchsorted(columns, columns)
        order = order[rank < self.size]
        self.entries = {name: values[order] for name, values in merged.items()}
        last = np.flatnonzero(rank[rank < self.size] == self.size - 1)
        self.floor[self.entries["column"][last]] = self.entries["key"][last]

    def contexts(self) -> Contexts:
        columns = self.entries["column"]
        rank = np.arange(len(columns)) - np.searchsorted(columns, columns)

        def placed(name: str, empty: int) -> np.ndarray:
            values = self.entries[name]
            result = np.full((self.n, self.size, *values.shape[1:]), empty, dtype=values.dtype)
            result[columns, rank] = values
            return result

        empty = {"value": 0, "window": -1, "position": -1, "ids": -1, "activation": 0}
        return Contexts(**{name: placed(name, value) for name, value in empty.items()})


def _random_keys(salt: int, *parts: np.ndarray) -> Float[np.ndarray, " entry"]:
    """Uniform numbers in [0, 1) that depend on the salt and on these numbers alone (splitmix64 for
    each)."""
    x = np.full(len(parts[0]), salt, dtype=np.uint64)
    for part in parts:
        x = x + part.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX[0])
        x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX[1])
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) / 2.0**53


def _distinct(
    ids: Int[np.ndarray, "entry place"], known: Bool[np.ndarray, " entry"]
) -> Int[np.ndarray, " kept"]:
    """Entries without those that agree with an earlier one wherever both have tokens, cut off by a
    window's end."""
    kept: list[int] = []
    for i in np.flatnonzero(known):
        both = (ids[kept] >= 0) & (ids[i] >= 0)
        agree = ((ids[kept] == ids[i]) | ~both).all(axis=1) & (both.sum(axis=1) > SAME)
        identical = (ids[kept] == ids[i]).all(axis=1)
        if not (agree | identical).any():
            kept.append(int(i))
    return np.array(kept, dtype=np.int64)
