"""Texts: the probe texts that ship with the project, and text to train a small SAE on anywhere, offline."""

from __future__ import annotations

import ast
import json
import os
import sysconfig
from pathlib import Path

import pandas as pd
import torch

from lenslab.paths import data_path
from lenslab.runtime import derive_generator


def load_probes(name: str = "first_look") -> pd.DataFrame:
    """A set of probe texts from `data/probes/NAME.jsonl`: one row per text, at least `id`, `category`, `text`.

    All were written for this project. Raises FileNotFoundError with the sets that exist.
    """
    file = data_path("probes", f"{name}.jsonl")
    if not file.exists():
        sets = sorted(f.stem for f in data_path("probes").glob("*.jsonl"))
        raise FileNotFoundError(f"No probe set {name!r}; there are: {', '.join(sets)}.")
    return pd.DataFrame([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])


def load_texts(source: str | os.PathLike, *, column: str = "text", limit: int | None = None) -> list[str]:
    """Documents from a `.txt` (blank-line separated) or `.jsonl` file, or a folder of them.

    Raises FileNotFoundError for nothing there and ValueError where a line has no `column`.
    """
    path = Path(source)
    files = sorted(f for f in path.rglob("*") if f.suffix in {".txt", ".jsonl"}) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"No .txt or .jsonl file at {source}.")
    texts: list[str] = []
    for file in files:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            texts += [part.strip() for part in content.split("\n\n") if part.strip()]
            continue
        for number, line in enumerate(content.splitlines(), 1):
            row = json.loads(line) if line.strip() else {column: ""}
            if column not in row:
                raise ValueError(f"{file.name}, line {number}: no {column!r} (it has {', '.join(row)}).")
            texts.append(row[column])
    return [text for text in texts if text][:limit]


def offline_text(n_documents: int = 2000, seed: int = 0) -> list[str]:
    """English prose and code that every machine with Python has: docstrings and sources of its standard library.

    Half of the documents are docstrings of 200 characters or more, half pieces of source of about 2,000
    characters. For models that come without SAEs; a corpus of the user's own is better. The text differs a
    little between Python versions, so nothing trained on it is compared by digits.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    files = [f for f in sorted(stdlib.glob("**/*.py")) if not skipped & set(f.parts)]
    order = torch.randperm(len(files), generator=derive_generator(seed, "offline text")).tolist()
    each, prose, code = n_documents // 2, [], []
    for file in (files[i] for i in order):
        source = file.read_text(encoding="utf-8", errors="ignore")
        code += [source[i : i + 2000] for i in range(0, len(source) - 200, 2000)]
        try:
            nodes = ast.walk(ast.parse(source))
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
        prose += [text for text in found if text and len(text) >= 200]
        if min(len(prose), len(code)) >= each:
            break
    return prose[:each] + code[:each]
