"""Fill in what the README shows: the table of notebooks from their last build, and the picture: a
feature shown on text, as a notebook's cell shows it.

Nothing in the README's tables is typed: `make notebooks` measures, this writes, and a test
compares. The picture is a screenshot of `assets/feature.html`, which holds what the cell shows:
that page is compared, since no two machines draw the same bytes.

    python scripts/readme_tables.py          # write
    python scripts/readme_tables.py --check  # exit 1 where the README differs from the results
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import sys
from pathlib import Path

from choreographer import Browser

from lenslab.files import REPOSITORY, atomic_write
from lenslab.show.images import find_browser, page

PICTURE = {
    "notebook": "phase_2_feature_exploration",
    "heading": "Feature ",  # how the title of the cell's HTML begins
    "file": "feature",  # in assets/, .html and .png
    "alternative": "One feature of pocket-gpt's SAE on texts, drawn by phase 2",
    "width": 880,  # pixels, as the most of the height; the rest of the page is cut off
    "height": 616,
}
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


def feature_page() -> str:
    """The page of the first HTML in the notebook whose title begins as PICTURE says. ValueError
    where no cell holds it."""
    file = REPOSITORY / f"notebooks/{PICTURE['notebook']}.ipynb"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        body = "".join(output.get("data", {}).get("text/html", ""))
        if f'<div class="lh"><b>{PICTURE["heading"]}' in body:
            return page(PICTURE["alternative"], body, "<style>body{margin:8px}</style>")
    raise ValueError(f"{file.name} has no HTML titled {PICTURE['heading']!r}: run `make notebooks`")


async def screenshot(file: Path, width: int, height: int) -> bytes:
    """The top of a page as PNG, in pixels, twice as fine; no higher than the page is."""
    async with Browser(path=find_browser()) as browser:
        tab = await browser.create_tab()
        screen = {"width": width, "height": 1, "deviceScaleFactor": 2, "mobile": False}
        await tab.send_command("Emulation.setDeviceMetricsOverride", screen)
        await tab.send_command("Emulation.setScrollbarsHidden", {"hidden": True})
        await tab.send_command("Page.enable")
        loaded = tab.subscribe_once("Page.loadEventFired")
        await tab.send_command("Page.navigate", {"url": file.as_uri()})
        await loaded
        metrics = await tab.send_command("Page.getLayoutMetrics")
        size = metrics["result"]["cssContentSize"]
        clip = size | {"height": min(size["height"], height), "scale": 1}
        options = {"clip": clip, "captureBeyondViewport": True}
        picture = await tab.send_command("Page.captureScreenshot", options)
    return base64.b64decode(picture["result"]["data"])


def filled(readme: str) -> str:
    picture = f"![{PICTURE['alternative']}](assets/{PICTURE['file']}.png)"
    shown = {"notebooks": notebooks_table(), "benchmarks": benchmarks_table()}
    for marker, text in {**shown, "picture": picture}.items():
        start, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
        before, rest = readme.split(start, 1)
        after = rest.split(end, 1)[1] if end in rest else rest
        readme = f"{before}{start}\n{text}\n{end}{after}"
    return readme


def main() -> None:
    file: Path = REPOSITORY / "README.md"
    now = file.read_text(encoding="utf-8")
    new = filled(now)
    asset, drawn = REPOSITORY / "assets" / f"{PICTURE['file']}.html", feature_page()
    if "--check" in sys.argv:
        there = asset.exists() and asset.with_suffix(".png").exists()
        same = new == now and there and asset.read_text(encoding="utf-8") == drawn
        sys.exit(
            0
            if same
            else "README.md or its picture differs from the results: run scripts/readme_tables.py"
        )
    for place, text in ((file, new), (asset, drawn)):
        with atomic_write(place) as temporary:
            temporary.write_text(text, encoding="utf-8")
    png = asyncio.run(screenshot(asset, PICTURE["width"], PICTURE["height"]))
    with atomic_write(asset.with_suffix(".png")) as temporary:
        temporary.write_bytes(png)


if __name__ == "__main__":
    main()
