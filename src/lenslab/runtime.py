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
import operator
import os
import platform
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from tqdm.std import tqdm as Bar  # what the bars of terminals and of Jupyter both are


def tune_allocator() -> bool:
    """Keep freed tensors in the process instead of handing them back to the kernel.

    Returns True where it took effect (Linux with glibc), False elsewhere; never fails.
    `LENSLAB_ALLOCATOR=default` leaves the allocator alone, for measurements.
    """
    if platform.system() != "Linux" or os.environ.get("LENSLAB_ALLOCATOR") == "default":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl, or a libc without mallopt
        return False
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    return mallopt(trim_threshold, 2**31 - 1) == 1 and mallopt(mmap_threshold, 1 << 30) == 1


def derive_generator(seed: int, label: str) -> torch.Generator:
    """A generator that depends on the seed and on what it is for, and on nothing drawn before.

    Adding one random draw somewhere must not change every later one, hence no global state.
    Raises TypeError for a seed that is no integer.
    """
    seed = operator.index(seed)  # 1 and 1.0 would be two seeds, 1.5 one that no log shows
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
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    arrived: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *interrupt: arrived.append(interrupt))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        before(*arrived[0])  # Python's own raises KeyboardInterrupt


def has_fast_bf16() -> bool:
    """True where bf16 matrix products are faster than float32: a GPU, or a CPU with bf16
    instructions.

    `LENSLAB_COMPUTE=float32` or `bfloat16` answers for the machine, where results must equal those
    of another one or its processor is not recognised. Raises ValueError for another value.
    """
    wanted = os.environ.get("LENSLAB_COMPUTE", "")
    if wanted not in ("", "float32", "bfloat16"):
        raise ValueError(f"LENSLAB_COMPUTE is float32, bfloat16 or not set at all, not {wanted!r}.")
    if wanted:
        return wanted == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return any(name in _processor("flags") for name in ("avx512_bf16", "amx_bf16"))


@lru_cache
def _processor(field: str) -> str:
    """What /proc/cpuinfo says of the first processor under `field`; nothing where it does not."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    lines = (line for line in text.splitlines() if line.startswith(field))
    return next(lines, "").partition(":")[2].strip()


def compute_dtype() -> torch.dtype:
    """bfloat16 where this machine computes it fast, else float32."""
    return torch.bfloat16 if has_fast_bf16() else torch.float32


def default_device(device: str | torch.device | None = None) -> str:
    """The device asked for, else 'cuda' where a GPU is at hand, else 'cpu'. ValueError for Apple's
    'mps', which has no float64: sums of squares could not be kept exact."""
    if str(device).startswith("mps"):
        raise ValueError("MPS has no float64, which measures are kept in: leave out `device`.")
    return str(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def machine_summary() -> dict[str, str | int | bool]:
    """What a measurement needs to say about where it was taken (no names, no paths)."""
    return {
        "cpu": _processor("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "fast_bf16": has_fast_bf16(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


if __name__ == "__main__":  # what a bug report should hold
    from lenslab.files import versions

    for name, value in (machine_summary() | versions()).items():
        print(f"{name:17s} {value}")
