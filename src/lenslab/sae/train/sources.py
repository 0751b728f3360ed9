"""Where training vectors come from: a tensor, an activation store, or the model as it goes.

1. A source deals its vectors out in *pools*, by epoch: `sizes(epoch)` says how many vectors each
   holds, `pool(epoch, i)` makes one. Both depend on nothing but the seed, the epoch and the number:
   a run that was killed asks for the pool it was in and goes on, to the bit.
2. Mixing: before each epoch the texts (of tensors and stores: runs of 256 rows) are put in random
   order; a pool is the next `pool` vectors' worth of them, shuffled row by row. So two vectors of
   one text fall into one pool, anywhere in it, with vectors of every part of the data. Memory holds
   one pool (two while it is made), whatever the number of tokens.
3. What does not fill a batch at a pool's end is left out in that epoch.

`texts()` are fingerprints of what the vectors come from, document by document, so that held-out
data can be checked to be other data; `lenslab.sae.train.trainer` compares them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.capture import harvest
from lenslab.files import content_key
from lenslab.hooks import check_hooks, vector_width
from lenslab.models import model_key, model_name
from lenslab.runtime import compute_dtype, derive_generator
from lenslab.sae.train.base import TrainingFailed
from lenslab.store import ActivationStore
from lenslab.tokens import TokenBatch

POOL = 1 << 17  # vectors; 134 MB a hook at width 256


RUN = 256  # rows of a tensor or a store that stay together as pools are dealt out


WINDOW = 32  # tokens that are fingerprinted together


KEPT = 16  # one fingerprint in so many is kept, chosen by its own bits: the same ones wherever the text occurs


ROWS = 1 << 20  # of a store that are looked at together


@runtime_checkable
class VectorSource(Protocol):
    """What `train` reads."""

    key: str  # of the content: a run is only resumed on the same data
    widths: dict[str, int]  # by hook
    metadata: dict[str, Any]  # what the SAE will say that it was made for
    known_by: str  # what `texts` are fingerprints of, 'tokens' or 'vectors': only like is compared with like

    def sizes(self, epoch: int) -> list[int]: ...

    def pool(
        self, epoch: int, number: int, enough: int | None = None
    ) -> dict[str, Float[Tensor, "vector d_in"]]: ...

    def texts(self) -> Int[Tensor, " fingerprint"]: ...


def _shuffled(
    vectors: Mapping[str, Tensor], seed: int, epoch: int, number: int
) -> dict[str, Tensor]:
    """The same new order for all hooks."""
    n = len(next(iter(vectors.values())))
    order = torch.randperm(n, generator=derive_generator(seed, f"pool {epoch} {number}"))
    return {hook: value[order] for hook, value in vectors.items()}


def _groups(sizes: Sequence[int], pool: int, seed: int, epoch: int) -> list[list[int]]:
    """Units (texts, shards, runs of rows) in random order, cut where a pool is full."""
    groups: list[list[int]] = [[]]
    held = 0
    for unit in torch.randperm(
        len(sizes), generator=derive_generator(seed, f"epoch {epoch}")
    ).tolist():
        if held and held + sizes[unit] > pool:
            groups.append([])
            held = 0
        groups[-1].append(unit)
        held += sizes[unit]
    return groups


class _Pooled:
    """Units with sizes, dealt out by epoch; subclasses give the vectors of some units."""

    def __init__(self, units: Sequence[int], pool: int, seed: int):
        self.units, self.pool_size, self.seed = list(units), pool, seed
        self._dealt: tuple[int, list[list[int]]] | None = None

    def groups(self, epoch: int) -> list[list[int]]:
        if self._dealt is None or self._dealt[0] != epoch:
            self._dealt = (epoch, _groups(self.units, self.pool_size, self.seed, epoch))
        return self._dealt[1]

    def sizes(self, epoch: int) -> list[int]:
        return [sum(self.units[i] for i in group) for group in self.groups(epoch)]

    def pool(self, epoch: int, number: int, enough: int | None = None) -> dict[str, Tensor]:
        """Vectors `[vector, d_in]` by hook, float32, in an order that the seed decides; with
        `enough`, only as many units as hold that many vectors, for a training that ends within the
        pool."""
        units = self.groups(epoch)[number]
        if enough is not None:
            before = itertools.accumulate((self.units[i] for i in units), initial=0)
            units = [i for i, held in zip(units, before, strict=False) if held < enough]
        return _shuffled(self._vectors(units), self.seed, epoch, number)

    def _vectors(self, units: list[int]) -> dict[str, Tensor]:
        raise NotImplementedError


class _Rows(_Pooled):
    """Rows that can be read in any order, dealt out in runs of neighbours."""

    def __init__(self, n: int, pool: int, seed: int):
        super().__init__([min(RUN, n - start) for start in range(0, n, RUN)], pool, seed)

    def _rows(self, units: list[int]) -> Tensor:
        return torch.cat([torch.arange(u * RUN, u * RUN + self.units[u]) for u in sorted(units)])


class TensorSource(_Rows):
    """Vectors in memory: one tensor `[vector, d_in]`, or one per hook."""

    known_by = "vectors"

    def __init__(
        self,
        vectors: Tensor | Mapping[str, Tensor],
        *,
        hook: str = "vectors",
        pool: int = POOL,
        seed: int = 0,
    ):
        self.vectors = {hook: vectors} if isinstance(vectors, Tensor) else dict(vectors)
        lengths = {len(value) for value in self.vectors.values()}
        if (
            len(lengths) != 1
            or not min(lengths)
            or any(value.ndim != 2 for value in self.vectors.values())
        ):
            raise ValueError(
                "Needs tensors [vector, d_in] of one length for all hooks, with at least one vector."
            )
        super().__init__(lengths.pop(), pool, seed)
        self.widths = {name: value.shape[1] for name, value in self.vectors.items()}
        self.metadata: dict[str, Any] = {}
        self._prints = [_fingerprints(value) for value in self.vectors.values()]
        self.key = content_key(
            self.widths, *(p.numpy().tobytes() for p in self._prints), pool, seed
        )

    def texts(self) -> Int[Tensor, " fingerprint"]:
        """Fingerprints of the rows."""
        return torch.cat(self._prints).unique()

    def _vectors(self, units: list[int]) -> dict[str, Tensor]:
        rows = self._rows(units)
        return {hook: value[rows].detach().float() for hook, value in self.vectors.items()}


def _factors(n: int) -> Int[Tensor, " n"]:
    return torch.randint(-(2**62), 2**62, (n,), generator=derive_generator(0, "fingerprints")) | 1


def _fingerprints(vectors: Float[Tensor, "row d"]) -> Int[Tensor, " row"]:
    """One number a row, from all its bits."""
    factors = _factors(vectors.shape[1])
    parts = (
        part.detach().cpu().float().contiguous().view(torch.int32).long()
        for part in vectors.split(1 << 14)
    )
    return torch.cat([(part * factors).sum(1) for part in parts])


def _windows(texts: Iterable[Int[Tensor, " _"]]) -> Int[Tensor, " fingerprint"]:
    """Fingerprints of runs of WINDOW tokens wherever they begin, thinned: a document is known again
    if it is cut or packed otherwise. The first run of every document is kept, and all of one that
    is shorter.

    The length of a text has no name in the annotation: it differs from text to text, and a checker
    that looks at one text on the way in and at another on the way out would refuse that.
    """
    found, factors = [torch.empty(0, dtype=torch.long)], _factors(WINDOW)
    for ids in texts:
        ids = ids.detach().cpu().long() + 1
        if len(ids) < WINDOW:
            found.append((ids * factors[: len(ids)]).sum().reshape(1))
        else:
            prints = (ids.unfold(0, WINDOW, 1) * factors).sum(1)
            found += [prints[:1], prints[(prints >> 40) % KEPT == 0]]
    return torch.cat(found).unique()


def _documents(
    text: Int[Tensor, " token"], position: Int[Tensor, " token"], token: Int[Tensor, " token"]
) -> tuple[Tensor, ...]:
    """Real tokens, cut where another text begins and where a separator stood: packed documents come
    apart."""
    return token.tensor_split(((text.diff() != 0) | (position.diff() != 1)).nonzero().flatten() + 1)


class ModelSource(_Pooled):
    """The model run as vectors are needed, over the real tokens of a batch (usually from `pack`).

    `compute` is as in `harvest` into a store: 'auto' means bfloat16 where this machine computes it
    fast.
    """

    known_by = "tokens"

    def __init__(
        self,
        model: TransformerBridge,
        batch: TokenBatch,
        hooks: str | Sequence[str],
        *,
        compute: str = "auto",
        batch_size: int = 32,
        pool: int = POOL,
        seed: int = 0,
    ):
        if not isinstance(batch, TokenBatch):
            raise TypeError(
                f"Needs a TokenBatch, got {type(batch).__name__}: `pack(model, texts)` makes one of texts."
            )
        hooks = (hooks,) if isinstance(hooks, str) else tuple(dict.fromkeys(hooks))
        check_hooks(model, hooks)
        compute = str(compute_dtype()).removeprefix("torch.") if compute == "auto" else compute
        self.model, self.batch, self.hooks, self.compute, self.batch_size = (
            model,
            batch,
            hooks,
            compute,
            batch_size,
        )
        super().__init__(batch.real.sum(1).tolist(), pool, seed)
        self.widths = {hook: vector_width(model, hook) for hook in hooks}
        self.metadata = {
            "model_name": model_name(model),
            "model_key": model_key(model),
            "context_size": int(batch.tokens.shape[1]),
            "distinct_training_vectors": batch.n_real,
        }
        self.key = content_key(
            model_key(model), batch.key, list(hooks), compute, batch_size, pool, seed
        )
        self._whole: dict[str, Tensor] | None = None

    def texts(self) -> Int[Tensor, " fingerprint"]:
        text, position = self.batch.real.nonzero(as_tuple=True)
        return _windows(_documents(text, position, self.batch.tokens[self.batch.real]))

    def _vectors(self, units: list[int]) -> dict[str, Tensor]:
        part = self.batch[units]
        options = dict(compute=self.compute, batch_size=self.batch_size, progress=False)
        found = harvest(self.model, part, self.hooks, **options)
        return {hook: value[part.real].flatten(1).float() for hook, value in found.items()}

    def pool(self, epoch: int, number: int, enough: int | None = None) -> dict[str, Tensor]:
        if len(self.groups(epoch)) > 1 or (enough is not None and epoch == 0):
            return super().pool(epoch, number, enough)
        if self._whole is None:  # everything fits one pool: the model is run once
            self._whole = self._vectors(sorted(self.groups(epoch)[0]))
        return _shuffled(self._whole, self.seed, epoch, number)


class StoreSource(_Rows):
    """Vectors that were harvested before; see `lenslab.store`. `model`: refuse a store of other
    weights.

    Raises ValueError for an incomplete store or another model, DamagedShard.
    """

    known_by = "tokens"

    def __init__(
        self,
        store: ActivationStore,
        *,
        model: TransformerBridge | None = None,
        pool: int = POOL,
        seed: int = 0,
    ):
        if not store.complete:
            raise ValueError(
                "The store is not complete; harvest(model, batch, hooks, store=store) continues it."
            )
        if model is not None and store.manifest["model_key"] != model_key(model):
            raise ValueError(
                f"The store holds activations of {store.manifest['model']} with other weights than {model_name(model)}."
            )
        self.store = store
        super().__init__(len(store), pool, seed)
        self.widths = dict(store.manifest["hooks"])
        self.metadata = {
            "model_name": store.manifest["model"],
            "model_key": store.manifest["model_key"],
            "context_size": 1 + max(int(part.max()) for part in self._columns("position")),
            "distinct_training_vectors": len(store),
        }
        digests = store.digests
        self.key = content_key(
            *(store.manifest[k] for k in ("model_key", "texts_key", "dtype")), digests, pool, seed
        )

    def texts(self) -> Int[Tensor, " fingerprint"]:
        columns = zip(*(self._columns(name) for name in ("text", "position", "token")), strict=True)
        return torch.cat([_windows(_documents(*part)) for part in columns]).unique()

    def _columns(self, name: str) -> Iterator[Int[Tensor, " row"]]:
        """A column of the whole store, some rows at a time: memory does not grow with it."""
        for start in range(0, len(self.store), ROWS):
            yield self.store.rows(torch.arange(start, min(start + ROWS, len(self.store))), name)

    def _vectors(self, units: list[int]) -> dict[str, Tensor]:
        rows = self._rows(units)
        return {hook: self.store.rows(rows, hook).float() for hook in self.widths}


def pool_of(source: VectorSource, epoch: int, pool: int, needed: int) -> dict[str, Tensor]:
    """A pool, or what of it a training still needs: the model is not run for vectors that no step
    would see."""
    return source.pool(epoch, pool, needed if needed < source.sizes(epoch)[pool] else None)


def batches(
    source: VectorSource,
    batch: int,
    steps: int,
    place: tuple[int, ...],
    opening: dict[str, Tensor] | None,
) -> Iterator[tuple[tuple[int, int, int], dict[str, Tensor]]]:
    """(place of the next batch, vectors by hook) for so many steps, from a place: epoch, pool,
    batch within the pool.

    `opening` is the very first pool, where it is at hand. TrainingFailed on NaN or Inf among the
    vectors.
    """
    epoch, first_pool, first = place
    while True:
        for pool, size in enumerate(source.sizes(epoch)):
            given, opening = (
                opening,
                None,
            )  # a first pool that fills no batch is passed over like any other
            if pool < first_pool or size // batch <= (begin := first if pool == first_pool else 0):
                continue
            vectors = given or pool_of(source, epoch, pool, (begin + steps) * batch)
            for hook, value in vectors.items():
                spoilt = not torch.isfinite(
                    value.sum()
                )  # or the sum is too large: looked at closely, a pool in parts
                if spoilt and not all(torch.isfinite(part).all() for part in value.split(batch)):
                    raise TrainingFailed(
                        f"NaN or Inf among the vectors at {hook} (epoch {epoch}, pool {pool})."
                    )
            end = min(size // batch, begin + steps)
            steps -= end - begin
            for number in range(begin, end):
                part = slice(number * batch, (number + 1) * batch)
                yield (
                    (epoch, pool, number + 1),
                    {hook: value[part] for hook, value in vectors.items()},
                )
            del given, vectors, value  # or two pools would be in memory while the next is made
            if not steps:
                return
        epoch, first_pool, first = epoch + 1, 0, 0
