"""Where training vectors come from: a tensor, an activation store, or the model as it goes.

1. A source deals its vectors out in *pools*, by epoch: `sizes(epoch)` says how many vectors each
   holds, `pool(epoch, i)` makes one. Both depend on nothing but the seed, the epoch and the number:
   a run that was killed asks for the pool it was in and goes on, to the bit.
2. Mixing: before each epoch the texts (of tensors and stores: runs of 256 rows) are put in random
   order; a pool is the next `pool` vectors' worth of them, shuffled row by row. So two vectors of
   one text fall into one pool, anywhere in it, with vectors of every part of the data. Memory holds
   one pool (two while it is made), whatever the number of tokens.
3. What does not fill a batch at a pool's end is left out in that epoch.
4. A few models have massive vectors at some real tokens, hundreds of times as long as the others
   (where a window begins within a word, say): one would outweigh the rest of its batch. Vectors
   longer than ten times the pool's median (as in dictionary-learning; zeros do not count) give
   their place to others.

`documents()` are hashes of what the vectors come from, document by document, so that held-out data
can be checked to be other data; `lenslab.sae.train.trainer` compares them. They are Python's own,
equal within one process only.
"""

from __future__ import annotations

import itertools
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.files import content_key
from lenslab.hooks import check_hooks, vector_width
from lenslab.models import model_key, model_name
from lenslab.runtime import compute_dtype, derive_generator
from lenslab.store import ActivationStore
from lenslab.tokens import TokenBatch

POOL = 1 << 17  # vectors; 134 MB a hook at width 256
MASSIVE = 10.0  # times the median norm
TEXTS = 32  # texts that the model runs at a time
RUN = 256  # rows of a tensor or a store that stay together as pools are dealt out


class VectorSource(ABC):  # noqa: B024 (others that deal vectors out are registered)
    """What `train` reads: units (texts, runs of rows) with sizes, dealt out by epoch.

    A subclass gives `_vectors(units)`, by hook, and `documents()`, a set of hashes. `widths` are by
    hook; `metadata` is what the SAE will say that it was made for; `identity` is of the content: a
    run is only resumed on the same data.
    """

    def __init__(self, units: list[int], pool: int, seed: int, widths: dict[str, int], *identity):
        self.units, self.pool_size, self.seed, self.widths = units, pool, seed, widths
        self.metadata: dict[str, Any] = {}
        self.key = content_key(widths, pool, seed, *identity)

    def groups(self, epoch: int) -> list[list[int]]:
        """Units in random order, cut where a pool is full."""
        generator = derive_generator(self.seed, f"epoch {epoch}")
        groups: list[list[int]] = [[]]
        filled = 0
        for unit in torch.randperm(len(self.units), generator=generator).tolist():
            if filled and filled + self.units[unit] > self.pool_size:
                groups.append([])
                filled = 0
            groups[-1].append(unit)
            filled += self.units[unit]
        return groups

    def sizes(self, epoch: int) -> list[int]:
        return [sum(self.units[i] for i in group) for group in self.groups(epoch)]

    def pool(self, epoch: int, number: int, enough: int | None = None) -> dict[str, Tensor]:
        """Vectors `[vector, d_in]` by hook, float32, in an order that the seed decides; with
        `enough`, only as many units as hold that many vectors, for a training that ends within the
        pool."""
        units = self.groups(epoch)[number]
        if enough is not None:
            before = itertools.accumulate((self.units[i] for i in units), initial=0)
            units = [i for i, rows in zip(units, before, strict=False) if rows < enough]
        vectors = self._vectors(units)
        generator = derive_generator(self.seed, f"pool {epoch} {number}")
        order = torch.randperm(len(next(iter(vectors.values()))), generator=generator)
        norms = [value.norm(dim=1) for value in vectors.values()]  # [vector] of each hook
        # where most are zero (what a rarely chosen expert gives), no other would be left
        massive = [norm > MASSIVE * norm[norm > 0].median() for norm in norms]
        massive = torch.stack(massive).any(0).cpu()
        if massive.any() and not massive.all():
            others = (~massive).nonzero().flatten()
            drawn = torch.randint(len(others), (int(massive.sum()),), generator=generator)
            order[massive[order]] = others[drawn]
        return {hook: value[order] for hook, value in vectors.items()}


def _runs(n: int) -> list[int]:
    """Sizes of runs of neighbours, of rows that can be read in any order."""
    return [min(RUN, n - start) for start in range(0, n, RUN)]


def _rows(runs: list[int], n: int) -> Int[Tensor, " row"]:
    return torch.cat([torch.arange(i * RUN, min(n, (i + 1) * RUN)) for i in sorted(runs)])


class TensorSource(VectorSource):
    """Vectors in memory: one tensor `[vector, d_in]`, or one per hook, of one length."""

    def __init__(self, vectors: Tensor | Mapping[str, Tensor], *, pool: int = POOL, seed: int = 0):
        by_hook = {"vectors": vectors} if isinstance(vectors, Tensor) else vectors
        self.vectors = {name: value.detach() for name, value in by_hook.items()}
        self.n = len(next(iter(self.vectors.values())))
        content = []
        for hook, value in self.vectors.items():
            if value.ndim != 2 or not value.is_floating_point() or len(value) != self.n:
                shape = list(value.shape)
                raise ValueError(f"No {self.n} vectors of floats at {hook}: {value.dtype} {shape}.")
            for part in value.split(1 << 14):
                part = part.cpu().float()  # [vector, d_in]
                if not torch.isfinite(part).all():
                    raise ValueError(f"NaN or Inf at {hook}, or numbers too large for float32.")
                content.append(content_key(part.numpy().tobytes()))
        widths = {name: value.shape[1] for name, value in self.vectors.items()}
        super().__init__(_runs(self.n), pool, seed, widths, content)

    def documents(self) -> set[int]:
        """Hashes of the rows."""
        rows = itertools.chain(*(value.cpu().float().numpy() for value in self.vectors.values()))
        return {hash(row.tobytes()) for row in rows}

    def _vectors(self, units: list[int]) -> dict[str, Tensor]:
        rows = _rows(units, self.n)
        return {hook: value[rows].float() for hook, value in self.vectors.items()}


def _hashes(text: Tensor, position: Tensor, token: Tensor) -> set[int]:
    """Hashes of runs of real tokens, `[token]` like where they stand: what windows hold of each
    document, cut where a separator stood; and, for documents that are packed otherwise, the same
    joined where a window goes on with the document of the one before."""
    window = text.diff() != 0
    separator = (position.diff() != 1) & ~window
    opened = window & (position[1:] > position.min())  # BOS, then a separator
    hashes: set[int] = set()
    for cuts in (window | separator, opened | separator):
        runs = token.int().cpu().tensor_split(cuts.nonzero().flatten().cpu() + 1)
        hashes |= {hash(run.numpy().tobytes()) for run in runs}
    return hashes


def _about(name: str, key: str, position: Int[Tensor, " token"]) -> dict[str, Any]:
    """What an SAE says that it was made for, from where in its text each token stands."""
    return {
        "model_name": name,
        "model_key": key,
        "prepend_bos": bool(position.min() > 0),
        "context_size": 1 + int(position.max()),
        "distinct_training_vectors": len(position),
    }


class ModelSource(VectorSource):
    """The model run as vectors are needed, over the real tokens of a batch (usually from `pack`),
    in bfloat16 where this machine computes it fast."""

    def __init__(
        self,
        model: TransformerBridge,
        batch: TokenBatch,
        hooks: str | Sequence[str],
        *,
        batch_size: int = TEXTS,
        pool: int = POOL,
        seed: int = 0,
        progress: bool = False,
    ):
        widths = {hook: vector_width(model, hook) for hook in check_hooks(model, hooks)}
        options = {"compute": str(compute_dtype()).removeprefix("torch."), "batch_size": batch_size}
        identity = (model_key(model), batch.key, options)
        super().__init__(batch.real.sum(1).tolist(), pool, seed, widths, *identity)
        self.model, self.batch, self.options = model, batch, {"progress": progress, **options}
        position = batch.attention.cumsum(1)[batch.real] - 1  # padding is not counted
        self.metadata = _about(model_name(model), model_key(model), position)

    def documents(self) -> set[int]:
        text, position = self.batch.real.nonzero(as_tuple=True)
        return _hashes(text, position, self.batch.tokens[self.batch.real])

    def _vectors(self, units: list[int]) -> dict[str, Tensor]:
        return self._computed(units) if len(units) < len(self.units) else self._whole

    def pool(self, epoch: int, number: int, enough: int | None = None) -> dict[str, Tensor]:
        again = epoch > 0 and len(self.sizes(epoch)) == 1
        return super().pool(epoch, number, None if again else enough)

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """Where everything fits one pool, the model is run once."""
        return self._computed(list(range(len(self.units))))

    def _computed(self, units: list[int]) -> dict[str, Tensor]:
        if model_key(self.model) != self.metadata["model_key"]:
            raise ValueError("The model was changed after this source was made: make a new one.")
        batch = self.batch[units]
        given = {"device": self.model.cfg.device, **self.options}
        vectors = harvest(self.model, batch, list(self.widths), **given)
        return {hook: value[batch.real].flatten(1).float() for hook, value in vectors.items()}


class StoreSource(VectorSource):
    """Vectors that were harvested before; see `lenslab.store`. ValueError for a store that is not
    complete, DamagedShard."""

    def __init__(self, store: ActivationStore, *, pool: int = POOL, seed: int = 0):
        if not store.complete:
            raise ValueError("The store is not complete: harvest(..., store=store) continues it.")
        manifest = store.manifest
        identity = [manifest[key] for key in ("model_key", "texts_key", "dtype")]
        super().__init__(_runs(len(store)), pool, seed, manifest["hooks"], identity, store.digests)
        self.store = store
        position = self._column("position")
        self.metadata = _about(manifest["model"], manifest["model_key"], position)

    def documents(self) -> set[int]:
        return _hashes(*(self._column(name) for name in ("text", "position", "token")))

    def _column(self, name: str) -> Int[Tensor, " row"]:
        return self.store.rows(torch.arange(len(self.store)), name)

    def _vectors(self, units: list[int]) -> dict[str, Tensor]:
        rows = _rows(units, len(self.store))
        return {hook: self.store.rows(rows, hook).float() for hook in self.widths}


def batches(
    source: VectorSource, batch: int, step: int, steps: int, opening: dict[str, Tensor] | None
) -> Iterator[dict[str, Float[Tensor, "batch d_in"]]]:
    """Vectors by hook, a batch for each of the steps from `step` on.

    `opening` is the very first pool, where it is at hand; of the last one only what is needed is
    made.
    """
    done = 0  # steps that the pools before this one are for
    for epoch in itertools.count():
        for number, size in enumerate(source.sizes(epoch)):
            begin, end = max(0, step - done), min(size // batch, steps - done)
            if begin < end:
                vectors = opening or source.pool(epoch, number, (steps - done) * batch)
                for i in range(begin, end):
                    rows = slice(i * batch, (i + 1) * batch)
                    yield {hook: value[rows] for hook, value in vectors.items()}
            done += size // batch
            vectors = opening = None  # or two pools would be in memory while the next is made
        if done >= steps:
            return
