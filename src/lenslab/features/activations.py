"""Feature activations: every real token of some texts encoded by an SAE, and pooled per text.

1. `encode_features` runs the model, takes the SAE's input at every real token and keeps what it
   encodes, sparse. A mean of activations is never encoded: it is a vector that the model never
   computed.
2. `FeatureActivations.pool` makes `[text, feature]` of it: the largest value in a text, the mean
   over its real tokens, or the fraction of them on which the feature fires.
3. Every analysis takes such a matrix, dense or SciPy sparse, so that any cached one can be
   analysed: rankings (`lenslab.features.ranking`), features that fire together or mark a concept
   (`together`), features that tell a kind of text from the others (`specialists`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.files import atomic_write, content_key
from lenslab.models import model_key, model_name
from lenslab.runtime import progress_bar
from lenslab.sae.inputs import SparseAutoencoder, encode, input_transform, neuronpedia_link, sae_key
from lenslab.tokens import TokenBatch

Matrix = np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix  # [text, feature], pooled


Index = int | np.integer  # a feature, as Python or NumPy gives it


Indices = Sequence[Index] | np.ndarray | Tensor


Labels = Sequence | np.ndarray | pd.Series  # one a text


AROUND = 4  # tokens shown on either side of a strong one
TEXTS, ROWS = 64, 2048  # texts harvested and tokens encoded at a time: what is dense stays small


def dense(matrix: Matrix) -> Shaped[np.ndarray, "text feature"]:
    """A matrix as NumPy's, whatever it was."""
    return matrix.toarray() if scipy.sparse.issparse(matrix) else np.asarray(matrix)


def check_matrix(matrix: Matrix, labels: Labels | None = None) -> Matrix:
    """The matrix, NumPy's or a `csc_array`, columns ready to be read, as floats: small integers
    would wrap around. ValueError on NaN, Inf, no text, labels of another number, and a label that
    is missing."""
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        raise ValueError(f"Pooled activations are [text, feature], not empty: {matrix.shape}.")
    if labels is not None and len(labels) != matrix.shape[0]:
        raise ValueError(f"{matrix.shape[0]} texts but {len(labels)} labels: one each is needed.")
    if labels is not None and pd.isna(np.asarray(labels, dtype=object)).any():
        raise ValueError("A label is None or NaN: leave such texts out, or name what they are.")
    sparse = scipy.sparse.issparse(matrix)
    matrix = scipy.sparse.csc_array(matrix) if sparse else np.asarray(matrix)
    matrix = matrix.astype(np.result_type(matrix.dtype, np.float32), copy=False)
    if not np.isfinite(matrix.data if sparse else matrix).all():
        text, feature = np.argwhere(~np.isfinite(dense(matrix)))[0]
        raise ValueError(f"NaN or Inf at text {text}, feature {feature}: find what made it.")
    return matrix


def check_features(features: Indices, n_features: int) -> None:
    """Raise ValueError for a feature that is not there: NumPy would read -1 as the last, 2.9 as 2,
    True as 1."""
    numbers = np.asarray(features)
    if numbers.size and numbers.dtype.kind not in "iu":
        raise ValueError(f"Features are whole numbers, not {numbers.flat[0]}.")
    if beyond := numbers[(numbers < 0) | (numbers >= n_features)].tolist():
        raise ValueError(f"Feature {beyond[0]} is not one of 0 to {n_features - 1}.")


def columns_of(matrix: Matrix, features: Indices) -> Shaped[np.ndarray, "text chosen"]:
    """Some features of a matrix, dense and in the order given. ValueError for one that it has
    not."""
    check_features(features, matrix.shape[1])
    return dense(matrix[:, np.asarray(features, dtype=np.int64)])


@dataclass(frozen=True, eq=False)
class FeatureActivations:
    """What an SAE's features do at every real token of some texts, sparse."""

    matrix: scipy.sparse.csr_array  # [token, feature], real tokens in order of text and position
    batch: TokenBatch = field(repr=False)
    name: str  # of the SAE, for tables
    model: str
    hook: str
    key: str  # content key: model, SAE, hook and tokens
    neuronpedia: str | None = None  # page of latent 0, where the SAE has pages

    @property
    def n_features(self) -> int:
        return self.matrix.shape[1]

    @cached_property
    def text(self) -> Int[np.ndarray, " token"]:
        """The row of the batch that each token is from."""
        return self.batch.real.nonzero()[:, 0].numpy()

    def pool(self, how: str = "max") -> scipy.sparse.csr_array:
        """`[text, feature]` over the real tokens of each text: 'max', 'mean' or 'fraction' (share
        of tokens > 0)."""
        tokens = np.bincount(self.text)
        if how == "max":
            starts = np.concatenate([[0], np.cumsum(tokens)])
            rows = [self.matrix[first:last].max(axis=0) for first, last in pairwise(starts)]
            pooled = scipy.sparse.csr_array(scipy.sparse.vstack(rows))
        elif how in ("mean", "fraction"):
            share = (1 / tokens[self.text]).astype(np.float32)
            average = scipy.sparse.csr_array((share, (self.text, np.arange(len(share)))))
            fires = (self.matrix > 0).astype(np.float32)
            pooled = average @ (self.matrix if how == "mean" else fires)
        else:
            raise ValueError(f"Pooling is one of max, mean, fraction, not {how!r}.")
        pooled.eliminate_zeros()
        return pooled

    def of(self, feature: Index) -> Float[Tensor, "text pos"]:
        """One feature at every place of the batch, zero at BOS and padding: for showing it in the
        text."""
        values = torch.zeros(self.batch.tokens.shape)
        values[self.batch.real] = torch.from_numpy(columns_of(self.matrix, [feature])[:, 0])
        return values

    def __getitem__(self, rows: slice | Indices) -> FeatureActivations:
        """The activations of some texts, in the order given. ValueError for none."""
        rows = rows if isinstance(rows, slice) else list(rows)
        # NumPy takes [] for numbers with commas
        chosen = np.arange(len(self.batch))[rows or slice(0)]
        if not len(chosen):
            raise ValueError("No text is chosen, so there are no activations.")
        tokens = np.concatenate([np.flatnonzero(self.text == row) for row in chosen])
        return replace(
            self,
            matrix=self.matrix[tokens],
            batch=self.batch[chosen.tolist()],
            key=content_key(self.key, chosen.tolist()),
        )

    def top_texts(self, feature: Index, n: int = 10) -> pd.DataFrame:
        """The `n` texts where a feature is strongest: `text` (row), `activation`, `active`,
        `excerpt`."""
        value = columns_of(self.pool("max"), [feature])[:, 0]
        order = np.argsort(-value, kind="stable")[:n]
        table = pd.DataFrame({"text": order, "activation": value[order]})
        excerpts = [" ".join(self.batch.texts[row].split())[:70] for row in order]
        return table.assign(active=table["activation"] > 0, excerpt=excerpts)

    def link(self, feature: Index) -> str | None:
        """The feature's page on Neuronpedia, where the SAE has pages."""
        return self.neuronpedia and f"{self.neuronpedia.rsplit('/', 1)[0]}/{feature}"


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
        folder: keep the matrix there, named by its content, and read it back the next time.

    Raises as `check_sae` and `harvest`; ValueError where the SAE gives NaN or Inf. A file in
    `folder` that is damaged, of something else, or that cannot be written is warned about: the
    result is the same.
    """
    name = name or f"{type(sae).__name__} {sae.cfg.metadata.hook_name}"
    options = {"batch_size": batch_size, "folder": folder, "progress": progress}
    return encode_saes(model, {name: sae}, batch, **options)[name]


def encode_saes(
    model: TransformerBridge,
    saes: Mapping[str, SparseAutoencoder],
    batch: TokenBatch,
    *,
    batch_size: int = 16,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, FeatureActivations]:
    """`encode_features` of several SAEs, by name, for one run of the model."""
    transforms = {name: input_transform(sae, model, batch) for name, sae in saes.items()}
    hooks = {name: sae.cfg.metadata.hook_name for name, sae in saes.items()}
    model_is, keys = model_key(model), {}
    for name, sae in saes.items():
        keys[name] = content_key(model_is, sae_key(sae), hooks[name], batch.key)
    files = {name: folder and Path(folder).expanduser() / f"{keys[name]}.npz" for name in saes}
    kept = {name: _kept_matrix(files[name], keys[name]) for name in saes}
    parts = {name: [] for name, matrix in kept.items() if matrix is None}
    options = {"batch_size": batch_size, "compute": "float32", "progress": False}
    starts = range(0, len(batch) if parts else 0, TEXTS)
    for start in progress_bar(starts, unit="batch", desc="encode", progress=progress):
        few = batch[start : start + TEXTS]
        values = harvest(model, few, [hooks[name] for name in parts], **options)
        for name, encoded in parts.items():
            for x in values[hooks[name]][few.real].split(ROWS):  # [token, *width]
                features = encode(saes[name], transforms[name](x)).numpy()
                encoded.append(scipy.sparse.csr_array(features))
    for name, encoded in parts.items():
        kept[name] = scipy.sparse.csr_array(scipy.sparse.vstack(encoded, format="csr"))
        if files[name] is not None:
            _keep_matrix(files[name], keys[name], kept[name])
    result = {}
    for name, sae in saes.items():
        facts = dict(name=name, model=model_name(model), hook=hooks[name], key=keys[name])
        page = neuronpedia_link(sae, 0)
        result[name] = FeatureActivations(matrix=kept[name], batch=batch, neuronpedia=page, **facts)
    return result


def _seal(key: str, matrix: scipy.sparse.csr_array) -> str:
    """Of what a kept matrix is and all that is in it."""
    parts = [matrix.data, matrix.indices, matrix.indptr]
    kinds = [str(part.dtype) for part in parts]
    return content_key(key, list(matrix.shape), kinds, *[part.tobytes() for part in parts])


def _keep_matrix(file: Path, key: str, matrix: scipy.sparse.csr_array) -> None:
    """Write a matrix for `_kept_matrix`; where it cannot be written, warn: the work is done."""
    parts = {name: getattr(matrix, name) for name in ("data", "indices", "indptr", "shape")}
    try:
        with atomic_write(file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **parts, seal=_seal(key, matrix))
    except OSError as error:
        warnings.warn(f"The features are not kept in {file.parent}: {error}.", stacklevel=3)


def _kept_matrix(file: Path | None, key: str) -> scipy.sparse.csr_array | None:
    """The matrix kept under `key`; None where there is none, and for a file that is not what was
    written under that key, with a warning."""
    if file is None or not file.is_file():
        return None
    # a damaged file makes zipfile and NumPy raise almost anything
    with suppress(Exception), np.load(file) as parts:
        rows = (parts["data"], parts["indices"], parts["indptr"])
        matrix = scipy.sparse.csr_array(rows, shape=tuple(parts["shape"]))
        if str(parts["seal"]) == _seal(key, matrix):
            return matrix
    warnings.warn(f"{file.name} is damaged or of something else: encoding again.", stacklevel=3)
    return None


def marked_context(strings: Sequence[str], middle: int) -> str:
    """Tokens in one line, the one in question between double angle quotes."""
    text = "".join(f"«{s}»" if i == middle else s for i, s in enumerate(strings))
    return text.replace("\n", "↵").replace("\t", "→")


def top_tokens(
    batch: TokenBatch, activation: Float[Tensor, "text pos"], *, n: int = 10, skip: Indices = ()
) -> pd.DataFrame:
    """The `n` real tokens where a feature is strongest, with four tokens on either side.

    `skip` leaves texts out, such as the one a feature was chosen on. Columns `text` (row of the
    batch), `activation`, `context` (the token itself between double angle quotes). Tokens where it
    is zero are not listed, so fewer than `n` rows may come back.
    """
    value = activation.where(batch.real, 0).clone()
    value[list(skip)] = 0
    best = value.flatten().topk(min(n, int((value > 0).sum())))
    rows = []
    for strength, cell in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        text, position = divmod(cell, value.shape[1])
        strings = batch.strings(text)
        places = range(max(position - AROUND, 0), min(position + AROUND + 1, len(strings)))
        shown = [place for place in places if batch.real[text, place]]
        marked = marked_context([strings[place] for place in shown], shown.index(position))
        rows.append((text, strength, marked))
    return pd.DataFrame(rows, columns=["text", "activation", "context"])
