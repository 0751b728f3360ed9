"""Where bundled data, caches and outputs live, and how files are written: beside, then renamed.

Notebooks run from any working directory, so every path starts from the package, never from
`os.getcwd()`. What is cached is known by a key of everything that went into it. A file carries the
hash of its content within itself: there is no moment at which one is there without the other, and
whoever reads opens one file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd
import torch
from safetensors import SafetensorError

REPOSITORY = Path(__file__).resolve().parents[2]  # the package is installed editable

# Trained by this project, in data/models/NAME: of GPT-2's architecture, of OLMoE's with two of 16
# experts per token, and the same with one of 8 (Switch routing)
BUNDLED = ("pocket-gpt", "pocket-moe", "pocket-switch")
DEFAULT = "pocket-gpt"
HUB = {  # short names for models people ask for; any other hub name works as it is
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "gemma-3-1b-it": "google/gemma-3-1b-it",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
}
# From the package index: name -> what it is shown as, which is no name of the hub; in four bits its
# results and SAEs are its own
FETCHED = {"smollm2": "smollm2-135m-q4"}
VERSIONED = ("lenslab", "torch", "transformer-lens", "sae-lens", "transformers")
VERSIONED += ("scipy", "scikit-learn")
SHIPPED, CACHED = "saved result that ships", "saved result of this machine"
DIGEST = 32  # bytes of the SHA-256 at the end of a checkpoint


def data_path(*parts: str) -> Path:
    """A path below the bundled `data/`."""
    return REPOSITORY.joinpath("data", *parts)


def cache_path(*parts: str) -> Path:
    """A path below the user's cache: `$LENSLAB_CACHE`, else `~/.cache/lenslab`."""
    root = os.environ.get("LENSLAB_CACHE") or Path.home() / ".cache" / "lenslab"
    return Path(root).expanduser().joinpath(*parts)


def outputs_path(*parts: str) -> Path:
    """A path below `$LENSLAB_OUTPUTS`, else the repository's `outputs/`."""
    root = os.environ.get("LENSLAB_OUTPUTS") or REPOSITORY / "outputs"
    return Path(root).expanduser().joinpath(*parts)


class NotAModel(ValueError):
    """What was named cannot be loaded as a language model; the message says why and what can."""


class NotWritten(OSError):
    """A file or folder that could not be written; what stood there before is as it was."""


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """NotWritten, one sentence, for what each library says of a full disk or a locked folder."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError is torch's
        reason = getattr(error, "strerror", None) or error
        message = f"{path} was not written ({reason}): free some space, or choose another place"
        raise NotWritten(getattr(error, "errno", None) or errno.EIO, message) from error


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` on success, remove it on error.

    A reader therefore sees the old file or the new one, never half of one; of several writers, in
    threads or on other machines, the last one's. Raises NotWritten.
    """
    path = Path(path).expanduser()
    machine = content_key(platform.node())
    own = f".{machine}-{os.getpid()}-{uuid4().hex}"
    temporary = path.with_name(f"{own}-{path.name[-40:]}")  # writers append to other suffixes
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{machine}-*") if os.name == "posix" else ():
            with suppress(PermissionError):  # another user's process, which runs
                try:
                    os.kill(int(left.name.split("-")[1]), 0)
                except ProcessLookupError:
                    left.unlink(missing_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def sha256_file(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON atomically, keys in the order given; raises ValueError on NaN, which JSON has
    not."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def content_key(*parts: Any) -> str:
    """16 hexadecimal digits that change when any part does: bytes as they are, the rest as
    canonical JSON, arrays with all their values."""
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, bytes | memoryview):
            part = json.dumps(part, sort_keys=True, default=_in_full).encode()
        digest.update(len(part).to_bytes(8, "big") + part)  # ("ab", "c") is not ("a", "bc")
    return digest.hexdigest()[:16]


def _in_full(value: Any) -> Any:
    """Of an array or a table its values: their text leaves out those in the middle."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, pd.DataFrame):
        return value.to_dict("tight")
    return value.tolist() if hasattr(value, "tolist") else str(value)


def signed(content: dict[str, Any]) -> dict[str, Any]:
    """The content as JSON gives it back, with the key of all of it, for `verified`. ValueError for
    NaN."""
    content = json.loads(json.dumps(content, allow_nan=False))
    return content | {"content_key": content_key(content)}


def verified(content: dict[str, Any]) -> dict[str, Any]:
    """What was `signed`; ValueError where anything was changed or taken away since."""
    content = dict(content)
    if content.pop("content_key", None) != content_key(content):
        raise ValueError("The file was changed after it was written: its hash does not match.")
    return content


def versions() -> dict[str, str]:
    """Versions of this package and of those that its numbers depend on."""
    return {name: version(name) for name in VERSIONED}


# Checkpoints: FOLDER/step-00000100.pt, whose last bytes are the SHA-256 of those before. A `.pt` is
# a pickle inside; read with `weights_only=True` it gives tensors and plain values and runs no code


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder of checkpoints or shards; the system lets go of it when the process ends,
    however it ends. Disks and systems without locks go without.

    Raises NotWritten while another process or thread holds it. Where nothing can be written, what
    is there can be read.
    """
    file = folder / ".lock"
    with ExitStack() as stack:
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(file, "ab", buffering=0))
            import fcntl  # of Unix alone

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}".encode())
        except NotWritten:
            if not any(folder.glob("*")):
                raise
        except BlockingIOError:
            message = f"{folder} is in use by {file.read_text()}: wait, or give another folder"
            raise NotWritten(errno.EBUSY, message) from None
        except (OSError, ImportError):  # a disk or a system without locks, or a full disk
            pass
        yield


def save_checkpoint(folder: Path, state: dict, name: str | None = None) -> Path:
    """Write `state`; without a name, also drop all but the newest two. A failed write leaves the
    old ones, and says so."""
    file = folder / (name or f"step-{state['step']:08d}.pt")
    try:
        with atomic_write(file) as temporary:
            torch.save(state, temporary)
            digest = bytes.fromhex(sha256_file(temporary))
            with open(temporary, "ab") as handle:
                handle.write(digest)
    except NotWritten as error:
        kept = "the one before it is kept" if any(folder.glob("*.pt")) else "there is none before"
        print(f"checkpoint {error.strerror}; {kept}", flush=True)
        return file
    if name is None:
        for old in sorted(folder.glob("step-*.pt"))[:-2]:
            old.unlink()
    return file


def load_checkpoint(file: Path) -> dict:
    """A checkpoint whose hash matches. Raises ValueError where the file is damaged."""
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        if hashlib.sha256(memoryview(raw)[:-DIGEST]).digest() != raw[-DIGEST:]:
            raise ValueError(f"checkpoint {file.name} is damaged: its hash does not match")
        return torch.load(handle, weights_only=True, map_location="cpu")


def latest_checkpoint(folder: Path) -> dict | None:
    """{'file', 'state'} of the newest checkpoint whose hash matches, or None where there is none.

    Raises ValueError when there are checkpoints and all are damaged: starting over would look like
    resuming.
    """
    files = sorted(folder.glob("step-*.pt"), reverse=True)
    for file in files:
        try:
            return {"file": file, "state": load_checkpoint(file)}
        except ValueError as error:
            print(f"{file.name} is passed over: {error}", flush=True)
    if files:
        raise ValueError(f"All {len(files)} checkpoints in {folder.name} are damaged: move them.")
    return None


def drop_later_checkpoints(folder: Path, step: int) -> None:
    """Forget what was saved after `step`: the run goes on from there, and would else take them for
    its newest."""
    for file in folder.glob("step-*.pt"):
        if int(file.stem.split("-")[1]) > step:
            file.unlink()


# Results


class Result:
    """Base of the frozen dataclasses that analyses return: every field can be saved as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain numbers, strings, lists and dictionaries; NaN and infinities become
        None."""
        return _plain(self)

    def save(self, path: str | os.PathLike, **config: Any) -> None:
        """JSON: the values, versions, whatever `config` says about how it was made (model, texts,
        seed), and the key of all that (`verified` checks it)."""
        content = {"result": type(self).__name__, "values": self.to_dict()}
        content |= {"config": _plain(config), "versions": versions()}
        write_json(path, signed(content))


def _plain(value: Any) -> Any:
    """As JSON gives it back; it has no NaN and no infinity."""
    return json.loads(json.dumps(value, default=_in_full), parse_constant=lambda _: None)


def saved_result(name: str, inputs: Any) -> pd.DataFrame | None:
    """The table of a long computation that was made from the same `inputs`, or None.

    `inputs` identify what went in: content keys of model, SAE and texts, and settings. What ships
    goes before what `save_result` left on this machine; `attrs["origin"]` says which it is. A
    damaged file counts as none.
    """
    for origin, file in _result_files(name, inputs).items():
        with suppress(OSError, ValueError, KeyError, TypeError):
            config = verified(json.loads(file.read_text(encoding="utf-8")))["config"]
            if (config["name"], config["key"]) == (name, content_key(inputs)):
                table = pd.DataFrame(config["table"])
                table.attrs["origin"] = origin
                return table
    return None


def save_result(name: str, result: Result, inputs: Any, *, ships: bool) -> Path:
    """Keep a result with its `to_frame()` for `saved_result`: with the project where it `ships`,
    else in this user's cache."""
    path = _result_files(name, inputs)[SHIPPED if ships else CACHED]
    table = result.to_frame().to_dict("records")
    result.save(path, name=name, key=content_key(inputs), table=table)
    return path


def _result_files(name: str, inputs: Any) -> dict[str, Path]:
    cached = cache_path("results", f"{name}-{content_key(inputs)}.json")
    return {SHIPPED: data_path("results", f"{name}.json"), CACHED: cached}


def as_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a tensor of any type and device."""
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
