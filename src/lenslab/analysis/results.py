"""What analyses share: matrices of pooled activations, checked and read in dense blocks, and results that are saved."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import torch

from lenslab.paths import write_json

Matrix = np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix  # [text, feature], pooled activations
Index = int | np.integer  # a feature, as Python or NumPy gives it
Indices = Sequence[int] | np.ndarray
FEATURES = 2048  # columns made dense at a time
VERSIONED = ("lenslab", "torch", "transformer-lens", "sae-lens", "transformers", "scipy", "scikit-learn")


class Result:
    """Base of the frozen dataclasses that analyses return: every field can be saved as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain numbers, strings, lists and dictionaries; NaN and infinities become None."""
        return _plain(self)

    def save(self, path: str | os.PathLike, **config: Any) -> None:
        """JSON: the values, versions, and whatever `config` says about how it was made (model, texts, seed)."""
        versions = {name: version(name) for name in VERSIONED}
        kind = type(self).__name__
        write_json(path, {"result": kind, "values": self.to_dict(), "config": _plain(config), "versions": versions})


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, pd.DataFrame):
        return [_plain(row) for row in value.to_dict("records")]
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_matrix(matrix: Matrix, labels: Sequence | np.ndarray | None = None) -> np.ndarray | scipy.sparse.csc_array:
    """The matrix, columns ready to be read. ValueError on NaN, Inf, no text, and labels of another number."""
    if matrix.ndim != 2 or not matrix.shape[0] or not matrix.shape[1]:
        raise ValueError(f"A pooled matrix is [text, feature] with at least one of each, got shape {matrix.shape}.")
    if labels is not None and len(labels) != matrix.shape[0]:
        raise ValueError(f"{matrix.shape[0]} texts but {len(labels)} labels: one per row of the matrix.")
    sparse = scipy.sparse.issparse(matrix)
    values = matrix.data if sparse else matrix
    if not np.isfinite(values).all():
        coordinates = matrix.tocoo() if sparse else None
        bad = np.argwhere(~np.isfinite(values))[0]
        row, column = (coordinates.row[bad[0]], coordinates.col[bad[0]]) if sparse else bad
        raise ValueError(f"NaN or Inf at text {row}, feature {column}: find what made it before measuring.")
    return scipy.sparse.csc_array(matrix) if sparse else np.asarray(matrix)


def blocks(matrix: np.ndarray | scipy.sparse.csc_array) -> Iterator[tuple[slice, np.ndarray]]:
    """(columns, those columns dense `[text, feature]`), as many at a time as stay small."""
    for start in range(0, matrix.shape[1], FEATURES):
        part = slice(start, min(start + FEATURES, matrix.shape[1]))
        block = matrix[:, part]
        yield part, block.toarray() if scipy.sparse.issparse(block) else block
