"""Feature activations: encode every token, pool per text, then ask which features are strong,
frequent, selective.

1. `encode_features` runs the model, takes the SAE's input at every real token and keeps what it
   encodes, sparse. A mean of activations is never encoded: it is a vector that the model never
   computed.
2. `FeatureActivations.pool` makes `[text, feature]` of it: the largest value in a text, the mean
   over its real tokens, or the fraction of them on which the feature fires.
3. Everything below takes such a matrix, dense or SciPy sparse, so that any cached one can be
   analysed: `summarize_features` (strongest, frequent, selective, composite, general) and
   `category_profile`. Rankings say how many features share a place; ties go to the stronger, then
   to the lower id.

Which features fire together or mark a concept is asked in `lenslab.features.together`, whether one
tells a kind of text from the others in `lenslab.features.specialists`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.files import atomic_write, content_key
from lenslab.models import model_key, model_name
from lenslab.runtime import progress_bar
from lenslab.sae.load import (
    SparseAutoencoder,
    encode,
    input_transform,
    neuronpedia_link,
    sae_hook,
    sae_key,
)
from lenslab.tokens import TokenBatch

Matrix = (
    np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix
)  # [text, feature], pooled activations


Index = int | np.integer  # a feature, as Python or NumPy gives it


Indices = Sequence[int] | np.ndarray


FEATURES = 2048  # columns made dense at a time


def check_matrix(
    matrix: Matrix, labels: Sequence | np.ndarray | None = None
) -> np.ndarray | scipy.sparse.csc_array:
    """The matrix, columns ready to be read. ValueError on NaN, Inf, no text, and labels of another
    number."""
    if matrix.ndim != 2 or not matrix.shape[0] or not matrix.shape[1]:
        raise ValueError(
            f"A pooled matrix is [text, feature] with at least one of each, got shape {matrix.shape}."
        )
    if labels is not None and len(labels) != matrix.shape[0]:
        raise ValueError(
            f"{matrix.shape[0]} texts but {len(labels)} labels: one per row of the matrix."
        )
    sparse = scipy.sparse.issparse(matrix)
    values = matrix.data if sparse else matrix
    if not np.isfinite(values).all():
        coordinates = matrix.tocoo() if sparse else None
        bad = np.argwhere(~np.isfinite(values))[0]
        row, column = (coordinates.row[bad[0]], coordinates.col[bad[0]]) if sparse else bad
        raise ValueError(
            f"NaN or Inf at text {row}, feature {column}: find what made it before measuring."
        )
    return scipy.sparse.csc_array(matrix) if sparse else np.asarray(matrix)


def blocks(matrix: np.ndarray | scipy.sparse.csc_array) -> Iterator[tuple[slice, np.ndarray]]:
    """(columns, those columns dense `[text, feature]`), as many at a time as stay small."""
    for start in range(0, matrix.shape[1], FEATURES):
        part = slice(start, min(start + FEATURES, matrix.shape[1]))
        block = matrix[:, part]
        yield part, block.toarray() if scipy.sparse.issparse(block) else block


TEXTS, ROWS = 64, 2048  # texts harvested and tokens encoded at a time: what is dense stays small


POOLS = ("max", "mean", "fraction")


@dataclass(frozen=True, eq=False)
class FeatureActivations:
    """What an SAE's features do at every real token of some texts, sparse."""

    matrix: scipy.sparse.csr_array  # [token, feature], real tokens in order of text and position
    text: Int[np.ndarray, " token"]  # row of the batch
    position: Int[np.ndarray, " token"]
    batch: TokenBatch = field(repr=False)
    name: str  # of the SAE, for tables
    model: str
    hook: str
    key: str  # content key: model, SAE, hook and tokens
    neuronpedia: str | None = None  # page of latent 0, where the SAE has pages

    @property
    def n_features(self) -> int:
        return self.matrix.shape[1]

    @property
    def n_texts(self) -> int:
        return len(self.batch)

    def pool(self, how: str = "max") -> scipy.sparse.csr_array:
        """`[text, feature]` over the real tokens of each text: 'max', 'mean' or 'fraction' (share
        of tokens > 0)."""
        if how not in POOLS:
            raise ValueError(f"Pooling is one of {', '.join(POOLS)}, not {how!r}.")
        tokens, shape = (
            np.bincount(self.text, minlength=self.n_texts),
            (self.n_texts, self.n_features),
        )
        if how == "max":
            entries = self.matrix.tocoo()
            place = self.text[entries.row].astype(np.int64) * shape[1] + entries.col
            order = np.argsort(place, kind="stable")
            place, starts, count = np.unique(place[order], return_index=True, return_counts=True)
            best = np.maximum.reduceat(entries.data[order], starts) if len(starts) else entries.data
            zero = count < tokens[place // shape[1]]  # a token without an entry holds a zero
            best = np.where(zero, np.maximum(best, 0), best)
            pooled = scipy.sparse.csr_array(
                (best, (place // shape[1], place % shape[1])), shape=shape
            )
        else:
            share = (1 / tokens[self.text]).astype(np.float32)
            mean = scipy.sparse.csr_array(
                (share, (self.text, np.arange(len(self.text)))), (shape[0], len(self.text))
            )
            pooled = mean @ (self.matrix if how == "mean" else (self.matrix > 0).astype(np.float32))
        pooled.eliminate_zeros()
        return pooled

    def of(self, feature: Index) -> Float[Tensor, "text pos"]:
        """One feature at every place of the batch, zero at BOS and padding: for showing it in the
        text."""
        _check_feature(feature, self.n_features)
        values = torch.zeros(self.batch.tokens.shape)
        column = self.matrix[:, [feature]].toarray()[:, 0]
        values[torch.from_numpy(self.text), torch.from_numpy(self.position)] = torch.from_numpy(
            column
        )
        return values

    def __getitem__(self, rows: slice | Indices) -> FeatureActivations:
        """The activations of some texts, in the order given."""
        chosen = np.arange(self.n_texts)[rows if isinstance(rows, slice) else list(rows)]
        tokens = [np.flatnonzero(self.text == row) for row in chosen]
        keep = np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int64)
        return FeatureActivations(
            self.matrix[keep],
            np.repeat(np.arange(len(chosen)), [len(t) for t in tokens]),
            self.position[keep],
            self.batch[chosen.tolist()],
            self.name,
            self.model,
            self.hook,
            content_key(self.key, chosen.tolist()),
            self.neuronpedia,
        )

    def top_texts(self, feature: Index, n: int = 10, how: str = "max") -> pd.DataFrame:
        """The `n` texts where a feature is strongest: `text` (row), `activation`, `active`,
        `excerpt`."""
        _check_feature(feature, self.n_features)
        value = self.pool(how)[:, [feature]].toarray()[:, 0]
        order = np.argsort(-value, kind="stable")[:n]
        excerpts = [" ".join(self.batch.texts[i].split())[:70] for i in order]
        columns = {
            "text": order,
            "activation": value[order],
            "active": value[order] > 0,
            "excerpt": excerpts,
        }
        return pd.DataFrame(columns)

    def link(self, feature: Index) -> str | None:
        """The feature's page on Neuronpedia, where the SAE has pages."""
        _check_feature(feature, self.n_features)
        return self.neuronpedia and f"{self.neuronpedia.rsplit('/', 1)[0]}/{feature}"

    def save(self, path: str | os.PathLike) -> None:
        """A safetensors file with the content key; the texts are not in it."""
        arrays = {
            "data": self.matrix.data,
            "indices": self.matrix.indices,
            "indptr": self.matrix.indptr,
        }
        arrays |= {
            "text": self.text,
            "position": self.position,
            "shape": np.array(self.matrix.shape),
        }
        header = {"name": self.name, "model": self.model, "hook": self.hook, "key": self.key}
        header |= {"batch": self.batch.key, "neuronpedia": self.neuronpedia or ""}
        with atomic_write(path) as temporary:
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, header)

    @classmethod
    def load(cls, path: str | os.PathLike, batch: TokenBatch) -> FeatureActivations:
        """Read what `save` wrote, with the batch it was made from. ValueError for another batch or
        a broken file."""
        try:
            with safe_open(path, "np") as file:
                header = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}
            csr = (arrays["data"], arrays["indices"], arrays["indptr"])
            matrix = scipy.sparse.csr_array(csr, shape=tuple(arrays["shape"].tolist()))
            made_for, names = (
                header["batch"],
                [header[key] for key in ("name", "model", "hook", "key")],
            )
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{Path(path).name} holds no feature activations, or is cut off ({error})."
            ) from error
        if made_for != batch.key:
            raise ValueError(
                f"{Path(path).name} was made from other tokens than this batch: encode it again."
            )
        return cls(
            matrix,
            arrays["text"],
            arrays["position"],
            batch,
            *names,
            header.get("neuronpedia") or None,
        )


def encode_features(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    batch: TokenBatch,
    *,
    name: str | None = None,
    batch_size: int = 16,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> FeatureActivations:
    """Encode every real token of a batch; hook and weight processing are the SAE's, computing is in
    float32.

    Args:
        name: what to call the SAE in tables; default its class and hook.
        folder: keep the result there, named by its content, and read it back the next time.

    Raises as `check_sae` and `harvest`; ValueError where the SAE gives NaN or Inf.
    """
    transform, hook = input_transform(sae, model), sae_hook(sae)
    key = content_key(model_key(model), sae_key(sae), hook, batch.key)
    path = None if folder is None else Path(folder) / f"{key}.safetensors"
    if path is not None and path.is_file():
        return FeatureActivations.load(path, batch)
    parts = []
    with progress_bar(total=batch.n_real, unit="tok", desc="encode", progress=progress) as bar:
        for start in range(0, len(batch), TEXTS):
            part = batch[start : start + TEXTS]
            values = harvest(
                model, part, hook, batch_size=batch_size, compute="float32", progress=False
            )[hook]
            for x in values[part.real].split(ROWS):
                parts.append(scipy.sparse.csr_array(encode(sae, transform(x)).numpy()))
                bar.update(len(x))
    text, position = (axis.numpy() for axis in batch.real.nonzero(as_tuple=True))
    found = FeatureActivations(
        scipy.sparse.csr_array(scipy.sparse.vstack(parts, format="csr")),
        text,
        position,
        batch,
        name or f"{type(sae).__name__} {hook}",
        model_name(model),
        hook,
        key,
        neuronpedia_link(sae, 0) if getattr(sae.cfg.metadata, "neuronpedia_id", None) else None,
    )
    if path is not None:
        found.save(path)
    return found


def _check_feature(feature: Index, n: int) -> None:
    if not 0 <= feature < n:
        raise ValueError(f"Feature {feature} is not one of 0 to {n - 1}.")


def columns_of(matrix: Matrix, features: Indices) -> Float[np.ndarray, "text chosen"]:
    """Some features of a matrix, dense and in the order given. ValueError for one that it has
    not."""
    features = [int(feature) for feature in features]
    for feature in features:
        _check_feature(feature, matrix.shape[1])
    chosen = matrix[:, features]
    return chosen.toarray() if scipy.sparse.issparse(chosen) else np.asarray(chosen)


def top_tokens(
    batch: TokenBatch,
    activation: Float[Tensor, "text pos"],
    *,
    n: int = 10,
    skip: Sequence[int] = (),
    context: int = 4,
) -> pd.DataFrame:
    """The `n` real tokens where a feature is strongest, with the tokens around them.

    `skip` leaves texts out, such as the one a feature was chosen on. Columns `text` (row of the
    batch), `activation`, `context` (the token itself between double angle quotes). Tokens where it
    is zero are not listed, so fewer than `n` rows may come back.
    """
    value = activation.where(batch.real, 0).clone()
    value[list(skip)] = 0
    best = value.flatten().topk(min(n, int((value > 0).sum())))
    rows = []
    for strength, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        text, pos = divmod(place, value.shape[1])
        strings, real = batch.strings(text), batch.real[text]
        around = [
            i for i in range(max(pos - context, 0), min(pos + context + 1, len(strings))) if real[i]
        ]
        shown = "".join(f"«{strings[i]}»" if i == pos else strings[i] for i in around)
        rows.append((text, strength, shown.replace("\n", "↵").replace("\t", "→")))
    return pd.DataFrame(rows, columns=["text", "activation", "context"])
