"""Feature analysis: what features fire on, and whether that could be chance."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lenslab.activations import TokenBatch


def top_tokens(
    batch: TokenBatch, activation: Float[Tensor, "text pos"], *, n: int = 10, skip: Sequence[int] = (), context: int = 4
) -> pd.DataFrame:
    """The `n` real tokens where a feature is strongest, with the tokens around them.

    `skip` leaves texts out, such as the one a feature was chosen on. Columns `text` (row of the batch),
    `activation`, `context` (the token itself between double angle quotes). Tokens where it is zero are
    not listed, so fewer than `n` rows may come back.
    """
    value = activation.where(batch.real, 0).clone()
    value[list(skip)] = 0
    best = value.flatten().topk(min(n, int((value > 0).sum())))
    rows = []
    for strength, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        text, pos = divmod(place, value.shape[1])
        strings, real = batch.strings(text), batch.real[text]
        around = [i for i in range(max(pos - context, 0), min(pos + context + 1, len(strings))) if real[i]]
        shown = "".join(f"«{strings[i]}»" if i == pos else strings[i] for i in around)
        rows.append((text, strength, shown.replace("\n", "↵").replace("\t", "→")))
    return pd.DataFrame(rows, columns=["text", "activation", "context"])
