"""ActivationStore: activations of real tokens on disk, in shards that a broken-off run can be
continued from.

How a store is filled:
1. what it is for (weights, hooks, tokens, dtype) is written to `manifest.json`; the folder is named
   after it;
2. texts are cut into runs of `texts_per_shard`; how many rows each shard has is therefore known
   beforehand;
3. shard after shard is computed, written beside, renamed, and entered in the manifest with its
   SHA-256;
4. a later run keeps every shard whose hash is right and computes the others, so what comes out is
   the same bytes as from a run that was never broken off;
5. at the end, count, mean, variance and mean norm are summed over the shards in order, in float64.

A shard is a `.safetensors` file: one `[row, d]` tensor per hook, and `text`, `position` and `token`
`[row]`.
"""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab.files import atomic_write, cache_path, content_key, sha256_file, write_json
from lenslab.hooks import check_hooks, vector_width
from lenslab.metrics import Moments
from lenslab.models import model_key, model_name

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


SHARD_BYTES = (
    64 << 20
)  # small enough to lose little when a run breaks off, large enough to read fast


NOT_YET = "not written yet"


IDENTITY = ("model_key", "hooks", "texts_key", "dtype", "texts_per_shard")


class StoreMismatch(ValueError):
    """A store that was made for another model, hook, text or dtype."""


class DamagedShard(ValueError):
    """A shard whose bytes are not those that were written; harvesting again redoes it."""


@runtime_checkable
class Tokens(Protocol):
    """What a store needs of a `lenslab.tokens.TokenBatch`."""

    tokens: Tensor  # [text, pos]
    real: Tensor  # [text, pos]
    key: str


@dataclass(frozen=True)
class StoreStatistics:
    """Over all real tokens of a store at one hook, summed in float64."""

    count: int
    mean: Float[Tensor, " d"]
    variance: Float[Tensor, " d"]  # divided by count
    mean_norm: float  # mean over tokens of the Euclidean norm


class ActivationStore:
    """The vectors of real tokens at one or more hooks, in one folder.

    `ActivationStore.open(model, batch, hooks)` begins or continues one, `harvest(..., store=store)`
    fills it, `ActivationStore(folder)` reads it, without any model. Rows are ordered by text, then
    position.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open what is in a folder. Raises FileNotFoundError without a manifest, ValueError for a
        broken one."""
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"No manifest.json in {self.folder.name}: fill a store with harvest(store=...)."
            )
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.hooks: tuple[str, ...] = tuple(self.manifest["hooks"])
            self.dtype: torch.dtype = DTYPES[self.manifest["dtype"]]
            self._ends = torch.tensor([s["rows"] for s in self.manifest["shards"]]).cumsum(0)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"manifest.json in {self.folder.name} is broken ({error!r}): delete the folder."
            ) from error
        self._verified: set[int] = set()

    @classmethod
    def open(
        cls,
        model: TransformerBridge,
        batch: Tokens,
        hooks: str | Sequence[str],
        *,
        folder: str | Path | None = None,
        dtype: torch.dtype = torch.float16,
        texts_per_shard: int | None = None,
    ) -> ActivationStore:
        """Begin a store, or continue the one that is there.

        Args: folder: default one below the cache, named by the content of weights, hooks, tokens
            and dtype. dtype: float16 (refuses values above 65,504), bfloat16 or float32.
            texts_per_shard: default as many as fill about 64 MB.

        Raises StoreMismatch when the folder holds a store for something else, UnknownHook,
        ValueError.
        """
        hooks = (hooks,) if isinstance(hooks, str) else tuple(dict.fromkeys(hooks))
        check_hooks(model, hooks)
        if dtype not in DTYPES.values():
            raise ValueError(f"A store is of {', '.join(DTYPES)}, not {dtype}.")
        widths = {hook: vector_width(model, hook) for hook in hooks}
        per_text = max(
            1, int(batch.real.sum()) * sum(widths.values()) * dtype.itemsize // len(batch.tokens)
        )
        identity = {
            "model": model_name(model),
            "model_key": model_key(model),
            "hooks": widths,
            "texts_key": batch.key,
            "dtype": str(dtype).removeprefix("torch."),
            "texts_per_shard": texts_per_shard or max(1, SHARD_BYTES // per_text),
        }
        key = content_key(*(identity[k] for k in IDENTITY))
        folder = cache_path("activations", key) if folder is None else Path(folder)
        if (folder / "manifest.json").is_file():
            store = cls(folder)
            asked = [k for k in IDENTITY if k != "texts_per_shard" or texts_per_shard is not None]
            wrong = [k for k in asked if store.manifest.get(k) != identity[k]]
            if wrong:
                raise StoreMismatch(
                    f"The store in {folder.name} was made for another "
                    + ", ".join(f"{k} ({store.manifest.get(k)}, not {identity[k]})" for k in wrong)
                    + ". Choose another folder, or leave folder out: it is then named by what it holds."
                )
            return store
        rows = [int(part.sum()) for part in batch.real.split(identity["texts_per_shard"])]
        shards = [
            {"file": f"shard-{i:05d}.safetensors", "rows": n, "sha256": None}
            for i, n in enumerate(rows)
        ]
        versions = {name: version(name) for name in ("torch", "transformers", "transformer-lens")}
        write_json(
            folder / "manifest.json",
            {
                "format": 1,
                **identity,
                "compute": None,
                "versions": versions,
                "shards": shards,
                "statistics": None,
            },
        )
        return cls(folder)

    def __len__(self) -> int:
        """Rows (real tokens), those of shards yet to be written included."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        done = sum(s["sha256"] is not None for s in self.manifest["shards"])
        return (
            f"ActivationStore({self.manifest['model']}, {', '.join(self.hooks)}: {len(self)} rows in "
            f"{self.manifest['dtype']}, {done} of {self.n_shards} shards written)"
        )

    @property
    def n_shards(self) -> int:
        return len(self.manifest["shards"])

    @property
    def complete(self) -> bool:
        """Whether every shard and the statistics were written."""
        return self.manifest["statistics"] is not None

    @property
    def compute(self) -> str | None:
        """The precision it was computed in ('float32' or 'bfloat16'); None before it is known."""
        return self.manifest["compute"]

    @property
    def d_in(self) -> int:
        """Width of the vectors of the only hook; ValueError when there are several (see
        `manifest["hooks"]`)."""
        return self.manifest["hooks"][self._hook(None)]

    def read(self, shard: int) -> dict[str, Tensor]:
        """One shard: `{hook: [row, d], "text": [row], "position": [row], "token": [row]}`.

        `text` and `position` index the batch that was harvested. Raises DamagedShard, IndexError.
        """
        self._verify(shard)
        return load_file(self._path(shard))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Shard by shard, as `read`."""
        return (self.read(shard) for shard in range(self.n_shards))

    def rows(self, indices: Int[Tensor, " row"] | Sequence[int], name: str | None = None) -> Tensor:
        """Some rows in the order asked for: `[row, d]` of a hook (default the only one), or `[row]`
        of `name` 'text', 'position' or 'token'. Raises IndexError, DamagedShard."""
        name = name if name in ("text", "position", "token") else self._hook(name)
        indices = torch.as_tensor(indices, dtype=torch.long)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(
                f"Row {int(indices.max())} (or one below 0) asked of a store of {len(self)} rows."
            )
        shards = torch.searchsorted(self._ends, indices, right=True)
        result: Tensor | None = None
        for shard in shards.unique().tolist() or [0]:
            self._verify(shard)
            with safe_open(
                self._path(shard), framework="pt"
            ) as file:  # memory-mapped: only these rows are read
                values = file.get_tensor(name)
            if result is None:
                result = torch.empty(len(indices), *values.shape[1:], dtype=values.dtype)
            where = shards == shard
            start = int(self._ends[shard]) - self.manifest["shards"][shard]["rows"]
            result[where] = values[indices[where] - start]
        return result

    def sample(self, n: int, generator: torch.Generator, name: str | None = None) -> Tensor:
        """n different rows in random order, `name` as in `rows`. Raises ValueError when there are
        fewer."""
        if not 0 <= n <= len(self):
            raise ValueError(f"{n} rows asked of a store of {len(self)}.")
        return self.rows(torch.randperm(len(self), generator=generator)[:n], name)

    def statistics(self, hook: str | None = None) -> StoreStatistics:
        """Count, mean, variance and mean norm at a hook (default the only one).

        Raises ValueError before the store is complete, DamagedShard when the file was changed.
        """
        hook, known = self._hook(hook), self.manifest["statistics"]
        if known is None:
            raise ValueError(
                "The store is not complete; harvest(model, batch, hooks, store=store) continues it."
            )
        path = self.folder / "statistics.safetensors"
        if not path.is_file() or sha256_file(path) != known["sha256"]:
            raise DamagedShard(
                f"{path.name} is missing or changed; harvest(..., store=store) makes it anew."
            )
        tensors = load_file(path)
        return StoreStatistics(
            known["count"],
            tensors[f"mean/{hook}"],
            tensors[f"variance/{hook}"],
            known["mean_norm"][hook],
        )

    def fill(
        self,
        model: TransformerBridge,
        batch: Tokens,
        hooks: Sequence[str],
        compute: str,
        vectors: Callable[[Any, torch.dtype, int], dict[str, Tensor]],
        advance: Callable[[int], Any],
    ) -> None:
        """Compute what is missing; `harvest` calls this. `vectors(part, dtype, first text)` runs
        the model, `advance(rows)` moves a progress bar. Raises StoreMismatch, OSError on a full
        disk."""
        asked = {
            "model_key": model_key(model),
            "hooks": sorted(hooks),
            "texts_key": batch.key,
            "compute": compute,
        }
        held = {
            k: sorted(v) if k == "hooks" else v or asked[k]
            for k, v in self.manifest.items()
            if k in asked
        }
        if wrong := [f"{k} ({held[k]}, not {asked[k]})" for k in asked if held[k] != asked[k]]:
            raise StoreMismatch(
                f"The store in {self.folder.name} was made for another {', '.join(wrong)}."
            )
        if edited := [name for name, point in model.hook_dict.items() if point.fwd_hooks]:
            raise ValueError(
                f"{edited[0]} has a hook, which may change activations; a store is named by weights and tokens alone. "
                "Fill it without hooks, or harvest into memory."
            )
        faults = {i: why for i in range(self.n_shards) if (why := self._fault(i))}
        if damaged := {i: why for i, why in faults.items() if why != NOT_YET}:
            listed = ", ".join(f"{i} ({why})" for i, why in damaged.items())
            warnings.warn(f"Shards to be redone: {listed}.", stacklevel=3)
        step = self.manifest["texts_per_shard"]
        self._check_space(faults)
        self.manifest["compute"] = compute
        for i, entry in enumerate(self.manifest["shards"]):
            if i in faults:
                part = batch[i * step : (i + 1) * step]
                text, position = part.real.nonzero().int().T
                beside = {
                    "text": text + i * step,
                    "position": position,
                    "token": part.tokens[part.real].int(),
                }
                self._write(
                    i,
                    vectors(part, self.dtype, i * step)
                    | {k: v.contiguous() for k, v in beside.items()},
                )
            else:
                advance(entry["rows"])
        if faults or not self._statistics_hold():
            self._summarize()

    def _write(self, shard: int, tensors: dict[str, Tensor]) -> None:
        entry = self.manifest["shards"][shard]
        self.manifest["statistics"] = None
        try:
            with atomic_write(self._path(shard)) as temporary:
                save_file(tensors, temporary)
                digest = sha256_file(temporary)
            entry["sha256"] = digest
            write_json(self.folder / "manifest.json", self.manifest)
        except (
            OSError,
            SafetensorError,
        ) as error:  # safetensors reports a full disk in its own way
            if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
                raise
            raise OSError(
                errno.ENOSPC,
                f"The disk is full at shard {shard} of {self.n_shards}. The shards already written are kept: free "
                "some space and harvest into the same store again",
            ) from error
        self._verified.add(shard)

    def _check_space(self, faults: dict[int, str]) -> None:
        rows = sum(self.manifest["shards"][i]["rows"] for i in faults)
        need = rows * (sum(self.manifest["hooks"].values()) * self.dtype.itemsize + 12)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OSError(
                errno.ENOSPC,
                f"The store needs {need / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB free",
            )

    def _summarize(self) -> None:
        """Step 5; then leftovers of runs that were killed go."""
        moments, norms = {hook: Moments() for hook in self.hooks}, dict.fromkeys(self.hooks, 0.0)
        for tensors in self:
            for hook in self.hooks:
                moments[hook].update(tensors[hook])
                norms[hook] += float(tensors[hook].double().norm(dim=1).sum())
        path = self.folder / "statistics.safetensors"
        with atomic_write(path) as temporary:
            save_file(
                {
                    f"{k}/{hook}": getattr(m, k)
                    for hook, m in moments.items()
                    for k in ("mean", "variance")
                },
                temporary,
            )
        self.manifest["statistics"] = {
            "count": len(self),
            "mean_norm": {hook: total / len(self) for hook, total in norms.items()},
            "sha256": sha256_file(path),
        }
        write_json(self.folder / "manifest.json", self.manifest)
        for leftover in self.folder.glob(".*-shard-*.safetensors"):
            leftover.unlink(missing_ok=True)

    def _statistics_hold(self) -> bool:
        known, path = self.manifest["statistics"], self.folder / "statistics.safetensors"
        return known is not None and path.is_file() and sha256_file(path) == known["sha256"]

    def _path(self, shard: int) -> Path:
        return self.folder / self.manifest["shards"][shard]["file"]

    def _fault(self, shard: int) -> str | None:
        """Why a shard cannot be used; None when its bytes are those that were written."""
        path, digest = self._path(shard), self.manifest["shards"][shard]["sha256"]
        if digest is None:
            return NOT_YET
        if not path.is_file():
            return "missing"
        return None if sha256_file(path) == digest else "half-written or changed: its hash differs"

    def _verify(self, shard: int) -> None:
        """Raise unless a shard is whole; the bytes are hashed the first time only."""
        if not 0 <= shard < self.n_shards:
            raise IndexError(f"Shard {shard} asked of {self.n_shards}.")
        if shard not in self._verified and (why := self._fault(shard)):
            raise DamagedShard(
                f"{self._path(shard).name} is {why}. harvest(model, batch, hooks, store=store) redoes it, and only it."
            )
        self._verified.add(shard)

    def _hook(self, hook: str | None) -> str:
        if hook is None and len(self.hooks) == 1:
            return self.hooks[0]
        if hook not in self.hooks:
            raise ValueError(
                f"Say which hook: this store holds {', '.join(self.hooks)}"
                + (f", not {hook}." if hook else ".")
            )
        return hook
