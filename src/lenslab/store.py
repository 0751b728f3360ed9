"""ActivationStore: activations of real tokens on disk, memory-mapped, in shards that a broken-off
run can be continued from.

How a store is filled:
1. what it is for (weights, hooks, tokens, dtype, precision) names the folder and stands in
   `manifest.json`, which is written once, with a key of all that it says;
2. texts are cut into runs of `texts_per_shard`; how many rows each shard has is therefore known
   beforehand;
3. shard after shard is computed, written beside and renamed. In it stands the key of its values,
   its name and the manifest. No shard shares a file with another: several processes may each write
   some;
4. a later run keeps every shard whose key is right and computes the others, so what comes out is
   the same bytes as from a run that was never broken off.

`shard-00003.safetensors` holds one `[row, d]` tensor per hook, and `text`, `position` and `token`
`[row]`; its metadata holds the key.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslab import files, runtime
from lenslab.hooks import check_hooks, vector_width
from lenslab.models import model_key, model_name
from lenslab.tokens import TokenBatch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHARD_BYTES = 64 << 20  # little is lost when a run breaks off, and it still reads fast


class StoreMismatch(ValueError):
    """A store that was made for another model, hook, text, dtype or precision."""


class DamagedShard(ValueError):
    """A shard whose bytes are not those that were written; harvesting again redoes it."""


class ActivationStore:
    """The vectors of real tokens at one or more hooks, in one folder.

    `ActivationStore.open(model, batch, hooks)` begins or continues one, `harvest(..., store=store)`
    fills it, `ActivationStore(folder)` reads it, without any model. Rows are ordered by text, then
    position. `manifest` says what it is for: 'model' and 'model_key', 'hooks' (with their widths),
    'texts_key', 'dtype', 'compute', 'texts_per_shard' and 'rows' (by shard).
    """

    def __init__(self, folder: str | Path) -> None:
        """Open what is in a folder. Raises FileNotFoundError without a manifest, ValueError for one
        of an earlier layout or that was changed."""
        self.folder = Path(folder).expanduser()
        file = self.folder / "manifest.json"
        try:
            self.manifest = files.verified(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            message = f"{self.folder.name}: its manifest was changed or is of an earlier layout"
            raise ValueError(f"{message}: delete the store.") from error
        self.dtype: torch.dtype = getattr(torch, self.manifest["dtype"])
        rows = self.manifest["rows"]
        self.shards = [f"shard-{number:05d}" for number in range(len(rows))]
        self._ends = torch.tensor(rows).cumsum(0)  # [shard]
        self._verified: set[str] = set()

    @classmethod
    def open(
        cls,
        model: TransformerBridge,
        batch: TokenBatch,
        hooks: str | Sequence[str],
        *,
        folder: str | Path | None = None,
        dtype: torch.dtype = torch.float16,
        compute: str = "auto",
        texts_per_shard: int | None = None,
    ) -> ActivationStore:
        """Begin a store, or continue the one that is there.

        Args:
            folder: default one below the cache, named by what is asked for.
            dtype: float16 (refuses values above 65,504), bfloat16, float32 or float64.
            compute: 'float32', 'bfloat16' or 'auto': bfloat16 where this machine computes it fast.
            texts_per_shard: where one begins; default as many as fill about 64 MB with padding.

        Raises StoreMismatch when the folder holds a store for something else, UnknownHook,
        ValueError for a hook without a vector per token, no hook at all, and as `check_dtype`.
        """
        hooks = check_hooks(model, hooks)
        check_dtype(dtype)
        if compute == "auto":
            compute = str(runtime.compute_dtype()).removeprefix("torch.")
        identity = {
            "model_key": model_key(model),
            "hooks": {hook: vector_width(model, hook) for hook in hooks},
            "texts_key": batch.key,
            "dtype": str(dtype).removeprefix("torch."),
            "compute": compute,
        }
        usual = files.cache_path("activations", files.content_key(identity))
        folder = Path(folder or usual).expanduser()
        store = cls(folder) if (folder / "manifest.json").is_file() else None
        per_text = batch.tokens.shape[1] * sum(identity["hooks"].values()) * dtype.itemsize
        step = texts_per_shard or max(1, SHARD_BYTES // per_text)
        step = store.manifest["texts_per_shard"] if store else step
        identity["rows"] = [int(real.sum()) for real in batch.real.split(step)]
        if store:
            if other := [name for name in identity if store.manifest[name] != identity[name]]:
                pair = f"{store.manifest[other[0]]}, not {identity[other[0]]}"
                raise StoreMismatch(f"{folder.name} was made for another {other[0]} ({pair}).")
            return store
        manifest = {"model": model_name(model), "texts_per_shard": step}
        files.write_json(folder / "manifest.json", files.signed(manifest | identity))
        return cls(folder)

    def __len__(self) -> int:
        """Rows (real tokens), those of shards yet to be written included."""
        return sum(self.manifest["rows"])

    @property
    def complete(self) -> bool:
        """Whether every shard was written."""
        return all(self._file(name).is_file() for name in self.shards)

    @property
    def digests(self) -> list[str | None]:
        """Keys of the shards in order; None where one is not written yet."""
        return [self._digest(name) for name in self.shards]

    def read(self, shard: int) -> dict[str, Tensor]:
        """One shard: `{hook: [row, d], "text": [row], "position": [row], "token": [row]}`.

        `text` and `position` index the batch that was harvested. Raises DamagedShard, IndexError.
        """
        return load_file(self._path(self.shards[shard]))

    def rows(self, indices: Int[Tensor, " row"] | Sequence[int], name: str) -> Tensor:
        """Some rows in the order asked for: `[row, d]` of a hook, or `[row]` of `name` 'text',
        'position' or 'token'. Raises IndexError (for a mask and fractions, too), DamagedShard."""
        indices = torch.as_tensor(indices)
        whole = not (indices.dtype is torch.bool or indices.is_floating_point())
        if len(indices) and not (whole and bool((indices >= 0).all())):
            raise IndexError(f"Rows are whole numbers from 0, not {indices.tolist()[:5]}.")
        indices = indices.long()
        shards = torch.searchsorted(self._ends, indices, right=True)  # [row]
        result: Tensor | None = None
        for shard in shards.unique().tolist() or [0]:
            values = self._column(shard, name)
            if result is None:
                result = torch.empty(len(indices), *values.shape[1:], dtype=values.dtype)
            inside = shards == shard
            result[inside] = values[indices[inside] - (int(self._ends[shard]) - len(values))]
        return result

    def missing(self) -> list[int]:
        """Shards to be written: those not yet there and, with a warning, those damaged."""
        missing = [shard for shard, name in enumerate(self.shards) if not self._whole(name)]
        for name in (self.shards[shard] for shard in missing):
            if self._file(name).exists():
                warnings.warn(f"{name} is half-written or changed: redone.", stacklevel=4)
        return missing

    def write(self, shard: int, texts: TokenBatch, vectors: dict[str, Tensor]) -> None:
        """One shard: `{hook: [row, d]}` of the real tokens of its texts. Raises NotWritten,
        ValueError for another number of rows than the manifest says."""
        text, position = texts.real.nonzero().int().T.contiguous()
        text = text + shard * self.manifest["texts_per_shard"]
        origin = {"text": text, "position": position, "token": texts.tokens[texts.real].int()}
        name, tensors = self.shards[shard], vectors | origin
        if {len(value) for value in tensors.values()} != {self.manifest["rows"][shard]}:
            raise ValueError(f"{name} is to hold one row for each real token of its own texts.")
        with files.atomic_write(self._file(name)) as temporary:
            save_file(tensors, temporary, metadata={"key": self._key(name, tensors)})
        self._verified.add(name)

    def _key(self, name: str, tensors: dict[str, Tensor]) -> str:
        """Of the values of a shard, and of which shard of which store it is."""
        return files.content_key(self.manifest, name, tensors_key(tensors))

    def _digest(self, name: str) -> str | None:
        """The key in a shard; None where there is none that can be opened."""
        with suppress(OSError, SafetensorError), safe_open(self._file(name), "pt") as file:
            return (file.metadata() or {}).get("key")

    def _whole(self, name: str) -> bool:
        """Whether the values of a shard are those that were written, for this store."""
        digest = self._digest(name)
        return digest is not None and digest == self._key(name, load_file(self._file(name)))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _column(self, shard: int, name: str) -> Tensor:
        """One tensor of a shard, memory-mapped: only the rows that are looked at are read."""
        with safe_open(self._path(self.shards[shard]), framework="pt") as file:
            return file.get_tensor(name)

    def _path(self, name: str) -> Path:
        """Where a whole shard lies, else DamagedShard; its bytes are hashed the first time only."""
        if name not in self._verified and not self._whole(name):
            state = "half-written or changed" if self._file(name).exists() else "not written yet"
            raise DamagedShard(f"{name} is {state}: harvest(..., store=store) makes it anew.")
        self._verified.add(name)
        return self._file(name)


def check_dtype(dtype: Any) -> None:
    """Raise ValueError for a dtype in which activations lose their values: integers, 8 bits."""
    if dtype not in DTYPES:
        raise ValueError(f"{dtype} would cut the values off: take floating-point, 16 bits or more.")


def tensors_key(tensors: Mapping[str, Tensor]) -> str:
    """The key of named tensors: names, types, shapes and every bit of the values."""
    parts = []
    for name, value in sorted(tensors.items()):
        parts += [[name, str(value.dtype), list(value.shape)], files.as_bytes(value)]
    return files.content_key(*parts)
