"""Allocator, precision, seeds, bars and interrupts: what every run on this machine shares. Threads
are torch's own.

Two facts about CPU runs are worth more than any code of ours. glibc returns every large tensor to
the kernel and faults it in again at the next step, which costs a factor of 1.2 to 4;
`tune_allocator` stops that. And bf16 matrix products pay only where the processor has bf16
instructions; `compute_dtype` asks.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from tqdm.auto import tqdm
from tqdm.std import tqdm as Bar  # what the bars of terminals and of Jupyter both are

_MALLOPT = {"M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_MMAP_THRESHOLD": (-3, 1 << 30)}


def tune_allocator() -> bool:
    """Keep freed tensors in the process instead of handing them back to the kernel.

    Returns True where it took effect (Linux with glibc), False elsewhere; never fails.
    `LENSLAB_ALLOCATOR=default` leaves the allocator alone, for measurements.
    """
    if platform.system() != "Linux" or os.environ.get("LENSLAB_ALLOCATOR") == "default":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return all(libc.mallopt(*setting) == 1 for setting in _MALLOPT.values())
    except (OSError, AttributeError):  # musl, or a libc without mallopt
        return False


def derive_generator(seed: int, label: str) -> torch.Generator:
    """A generator that depends on the seed and on what it is for, and on nothing drawn before.

    Adding one random draw somewhere must not change every later one, hence no global state.
    """
    digest = hashlib.sha256(f"{seed}:{label}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def progress_bar(iterable: Iterable | None = None, *, progress: bool = True, **options: Any) -> Bar:
    """A tqdm bar for a terminal, a log or Jupyter, that shows after two seconds; `options` go to
    tqdm.

    `progress=False` silences it, and so does `TQDM_DISABLE=1`, which tqdm's own notebook bar does
    not read.
    """
    off = os.environ.get("TQDM_DISABLE", "").strip().lower() not in ("", "0", "false")
    return tqdm(iterable, disable=off or not progress, **{"delay": 2, **options})


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C and Jupyter's stop button take effect at the end of the block, so that what it does is
    done whole.

    Signals arrive in the main thread alone: elsewhere, and where they are ignored, the block runs
    as it is.
    """
    asked: list[tuple] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *given: asked.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        before(*asked[0])  # Python's own raises KeyboardInterrupt


def has_fast_bf16() -> bool:
    """True where bf16 matrix products are faster than float32: a GPU, or a CPU with bf16
    instructions.

    `LENSLAB_COMPUTE=float32` or `bfloat16` answers for the machine, where results must equal those
    of another one or its processor is not recognised. Raises ValueError for another value.
    """
    asked = os.environ.get("LENSLAB_COMPUTE")
    if asked and asked not in ("float32", "bfloat16"):
        raise ValueError(
            f"LENSLAB_COMPUTE is float32 or bfloat16, or not set at all; it is {asked!r}."
        )
    return asked == "bfloat16" if asked else _computes_bf16_fast()


@lru_cache(maxsize=1)
def _computes_bf16_fast() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as handle:
            flags = next((line for line in handle if line.startswith("flags")), "")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def compute_dtype() -> torch.dtype:
    """bfloat16 where this machine computes it fast, else float32."""
    return torch.bfloat16 if has_fast_bf16() else torch.float32


def default_device() -> str:
    """'cuda' where a GPU is at hand, else 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine_summary() -> dict[str, str | int | bool]:
    """What a measurement needs to say about where it was taken (no names, no paths)."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as handle:
            model = next(
                (line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")),
                model,
            )
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "fast_bf16": has_fast_bf16(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


if __name__ == "__main__":  # what a bug report should hold
    from importlib.metadata import version

    packages = ("torch", "transformers", "transformer-lens", "sae-lens", "lenslab")
    for name, value in {
        **machine_summary(),
        **{package: version(package) for package in packages},
    }.items():
        print(f"{name:17s} {value}")
