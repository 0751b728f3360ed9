"""Long computations behind results that ship with the project.

1. A result is kept under its name in `data/results/`, with a key of what went in: model, SAE, texts, settings.
2. `saved_result` gives it back where the key fits. Otherwise (another model, other texts) the user's cache is asked,
   and only then is it computed, and kept in that cache.
3. With `LENSLAB_FULL=1` (`make run FULL=1`) it is computed whatever is there; that of the bundled model is written to
   `data/results/`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from lenslab.analysis.results import Result
from lenslab.loading import DEFAULT
from lenslab.paths import cache_path, content_key, data_path


def saved_result(name: str, compute: Callable[[], Result], *, inputs: Any) -> pd.DataFrame:
    """The table (`to_frame`) of a result: the saved one where it was made from the same `inputs`, else computed now.

    `inputs` identify what went in, for instance content keys of model, SAE and texts, and settings. Where the table
    comes from is in its `attrs["origin"]`.
    """
    key = content_key(inputs)
    shipped, cached = data_path("results", f"{name}.json"), cache_path("results", f"{name}-{key}.json")
    full = os.environ.get("LENSLAB_FULL") == "1"
    kept = {"saved result that ships": shipped, "saved result of this machine": cached}
    for origin, file in () if full else kept.items():
        if (frame := _read(file, key)) is not None:
            return _said(frame, origin)
    result = compute()
    theirs = os.environ.get("LENSLAB_MODEL", "") not in ("", DEFAULT) or os.environ.get("LENSLAB_MODEL_TWIN") == "1"
    result.save(shipped if full and not theirs else cached, key=key, table=result.to_frame())
    return _said(result.to_frame(), "computed now")


def _said(frame: pd.DataFrame, origin: str) -> pd.DataFrame:
    frame.attrs["origin"] = origin
    return frame


def _read(file: Path, key: str) -> pd.DataFrame | None:
    """The table in a file, or None where there is none, it was made from something else, or it is damaged."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["config"]
        return pd.DataFrame(config["table"]) if config["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
