"""Fill in what the README shows: the table of notebooks from their last build, and the picture from
a figure.

Nothing in the README's tables is typed: `make notebooks` measures, this writes, and a test
compares.

    python scripts/readme_tables.py          # write
    python scripts/readme_tables.py --check  # exit 1 where the README differs from the results
"""

from __future__ import annotations

import base64
import json
import math
import sys
from pathlib import Path

from lenslab.files import REPOSITORY, atomic_write

PICTURE = (
    "phase_1_loading",
    "Head ",
    "attention.png",
    "Attention of one head of pocket-gpt, drawn by phase 1",
)
TITLES = {
    "phase_1_loading": "Load a model, find its hook points, read its streams, encode with an SAE",
    "phase_2_feature_exploration": "Which features tell kinds of text apart, and does it take an "
    "SAE? Four "
    "controls",
}


def notebooks_table() -> str:
    runs = json.loads((REPOSITORY / "benchmarks/results/notebook_runs.json").read_text())[
        "notebooks"
    ]
    rows = ["| notebook | what it asks | time | memory |", "|---|---|---|---|"]
    for run in runs:
        name, minutes = run["name"], max(1, math.ceil(run["seconds"] / 60))
        rows.append(
            f"| [{name}](notebooks/{name}.ipynb) | {TITLES[name]} | {minutes} min | "
            f"{run['peak_mb'] / 1000:.1f} GB |"
        )
    return "\n".join(rows)


def benchmarks_table() -> str:
    """One row per result with peers: its claim, ours (lowest and highest round), and how many times
    each peer's value that is."""
    rows = ["| result | claim | ours (its rounds) | ours over each peer |", "|---|---|---|---|"]
    for file in sorted((REPOSITORY / "benchmarks/results").glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if "ratios" not in result:
            continue
        ours = result["ours"] if isinstance(result["ours"], dict) else {"": result["ours"]}
        ours = (
            ", ".join(f"{name} {value:,}".strip() for name, value in ours.items())
            + f" {result['unit']}"
        )
        if len(rounds := result.get("rounds", {}).get("lenslab", ())) > 1:
            ours += f" ({min(rounds):,} to {max(rounds):,})"
        known = {peer: ratio for peer, ratio in result["ratios"].items() if ratio is not None}
        ratios = ", ".join(
            f"{peer} {ratio:,.0f}" if ratio >= 100 else f"{peer} {ratio:.2f}"
            for peer, ratio in known.items()
        )
        name = file.stem.replace("_", " ")
        rows.append(
            f"| [{name}](benchmarks/results/{file.name}) | {result['claim']} | {ours} | {ratios} |"
        )
    return "\n".join(rows)


def picture() -> bytes:
    """The PNG of the figure whose title starts as PICTURE says. ValueError where no notebook cell
    holds it."""
    notebook, title, *_ = PICTURE
    cells = json.loads((REPOSITORY / f"notebooks/{notebook}.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        layout = data.get("application/vnd.plotly.v1+json", {}).get("layout", {})
        if (layout.get("title") or {}).get("text", "").startswith(title) and "image/png" in data:
            return base64.b64decode(data["image/png"])
    raise ValueError(
        f"{notebook}.ipynb has no figure {title!r} with a PNG: run `make notebooks` with Chromium"
    )


def filled(readme: str) -> str:
    *_, name, alternative = PICTURE
    shown = {"notebooks": notebooks_table(), "benchmarks": benchmarks_table()}
    for marker, text in {**shown, "picture": f"![{alternative}](assets/{name})"}.items():
        start, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
        before, rest = readme.split(start, 1)
        after = rest.split(end, 1)[1] if end in rest else rest
        readme = f"{before}{start}\n{text}\n{end}{after}"
    return readme


def main() -> None:
    file: Path = REPOSITORY / "README.md"
    now = file.read_text(encoding="utf-8")
    new = filled(now)
    asset, png = REPOSITORY / "assets" / PICTURE[2], picture()
    if "--check" in sys.argv:
        same = new == now and asset.exists() and asset.read_bytes() == png
        sys.exit(
            0
            if same
            else "README.md or its picture differs from the results: run scripts/readme_tables.py"
        )
    for place, content in ((file, new.encode()), (asset, png)):
        with atomic_write(place) as temporary:
            temporary.write_bytes(content)


if __name__ == "__main__":
    main()
