"""Fill in what the READMEs show of the results: tables, findings, pictures.

Nothing between the markers is typed: `make notebooks` and the benchmarks measure, this writes, and
a test compares. The first picture is a screenshot of `assets/feature.html`, which holds what a
notebook's cell shows: that page is compared, since no two machines draw the same bytes. The others
are the PNGs that stand beside the notebooks' figures.

    python scripts/readme_tables.py          # write
    python scripts/readme_tables.py --check  # exit 1 where a file differs from the results
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
import sys
from pathlib import Path

from choreographer import Browser

from lenslab.files import REPOSITORY, atomic_write, data_path
from lenslab.show.images import find_browser, page

RESULTS = REPOSITORY / "benchmarks" / "results"
PICTURE = {
    "notebook": "phase_2_feature_exploration",
    "heading": "Feature ",  # how the title of the cell's HTML begins
    "file": "feature",  # in assets/, .html and .png
    "alternative": "One feature of pocket-gpt's SAE on texts, drawn by phase 2",
    "width": 880,  # pixels, as the most of the height; the rest of the page is cut off
    "height": 616,
}
# Notebook, words of the section's heading, how its lines begin.
FINDING = ("phase_2_feature_exploration", "Does it take an SAE?", "So: ")
BESIDE = "how it is written"  # what those features fire on: the first line of that section
# Notebook, a figure's title, words of its section's heading, file in assets/
FIGURES = [
    (
        "phase_3_sae_comparison",
        "What SAEs share, and what the data makes alike",
        "Other widths, layers and streams",
        "phase_3_shared",
    ),
    (
        "phase_5_moe_routing",
        "What a slot says of the kind of text",
        "What are experts for?",
        "phase_5_specialisation",
    ),
]
TITLES = {
    "phase_1_loading": "Load a model, find its hook points, read its streams, encode with an SAE",
    "phase_2_feature_exploration": "Which features tell kinds of text apart, and does it take an "
    "SAE? Four controls and a ceiling",
    "phase_3_sae_comparison": "Do SAEs of other seeds, widths, layers and models tell the same "
    "story? Nulls beside every likeness",
    "phase_4_custom_sae": "Build and train an SAE. Did it work, beside floors, planted "
    "features and other decisions?",
    "phase_5_moe_routing": "Which experts does a token go to, by itself or by its context? What "
    "are they for, beyond chance?",
}
PARAMETERS = {  # a test counts them by transformers' own classes
    "pocket-gpt": 6_901_760,
    "GPT-2 small": 124_439_808,
    "SmolLM2-135M": 134_515_008,
    "Gemma 3 1B": 999_885_952,
    "OLMoE 7B": 6_919_161_856,
}
# Of the floors' table: names of columns; more is better; whole numbers; comparable at all
FLOORS = {
    "fvu": "FVU",
    "ce_difference": "CE difference",
    "kl": "KL",
    "l2_ratio": "L2 ratio",
    "dead": "dead",
    "dense": "dense",
    "best_feature": "best feature",
    "probe_5": "5 features",
    "probe_16": "16 features",
}
MORE = ("best_feature", "probe_5", "probe_16")
COUNTS = ("dead", "dense")
BETTER = ("fvu", "ce_difference", "kl", "dead", *MORE)
COUNTLESS = 1000  # beyond it a ratio is told by its order of magnitude


def notebooks_table() -> str:
    runs = json.loads((RESULTS / "notebook_runs.json").read_text())["notebooks"]
    rows = ["| notebook | what it asks | time | memory |", "|---|---|---|---|"]
    for run in runs:
        name, minutes = run["name"], max(1, math.ceil(run["seconds"] / 60))
        rows.append(
            f"| [{name}](notebooks/{name}.ipynb) | {TITLES[name]} | {minutes} min | "
            f"{run['peak_mb'] / 1000:.1f} GB |"
        )
    return "\n".join(rows)


def size(n_bytes: float) -> str:
    """1.5e9 -> '1.5 GB'; below a gigabyte in megabytes."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def memory_table() -> str:
    """What the weights of well-known models take: parameters times bytes."""
    head = "| model | parameters | float32 | bfloat16 | float32, with its random twin |"
    rows = [head, "|---|---|---|---|---|"]
    for model, n in PARAMETERS.items():
        rows.append(
            f"| {model} | {n / 1e6:,.0f} million | {size(4 * n)} | {size(2 * n)} | {size(8 * n)} |"
        )
    return "\n".join(rows)


def times(ratio: float) -> str:
    """A ratio to two digits after the point, or its order of magnitude."""
    if ratio < COUNTLESS:
        return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}"
    return f"about 10^{math.log10(ratio):.0f}"


def benchmarks_table() -> str:
    """One row per result with peers: its claim, ours (lowest and highest round), and how many times
    better than each peer. Above 1 ours is better: rates and scores are ours over the peer's, and
    where less is better (errors, memory) the peer's over ours."""
    rows = [
        "| result | claim | ours (its rounds) | better is | times better than each peer |",
        "|---|---|---|---|---|",
    ]
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if "ratios" not in result:
            continue
        more = result.get("more_is_better", result["unit"].endswith("/s"))
        ours = result["ours"] if isinstance(result["ours"], dict) else {"": result["ours"]}
        values = ", ".join(f"{name} {value:,}".strip() for name, value in ours.items())
        values += f" {result['unit']}"
        if len(rounds := result.get("rounds", {}).get("lenslab", ())) > 1:
            values += f" ({min(rounds):,} to {max(rounds):,})"
        better = ", ".join(
            f"{peer} {times(ratio if more else 1 / ratio)}"
            for peer, ratio in result["ratios"].items()
            if ratio is not None
        )
        rows.append(
            f"| [{file.stem.replace('_', ' ')}](results/{file.name}) | {result['claim']} | "
            f"{values} | {'more' if more else 'less'} | {better} |"
        )
    return "\n".join(rows)


def families_sentence() -> str:
    """How many families of models were compared and which are refused, from the table in
    data/README.md."""
    card = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    table = card.split("<!-- architectures -->")[1].split("<!-- end of architectures -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.split("\n")[3:-1]]
    refused = [family for family, result in rows if result == "refused"]
    return (
        f"Of {len(rows)} families compared, {len(rows) - len(refused)} load and {len(refused)} are "
        f"refused ({', '.join(refused)}): [the table](data/README.md#which-families-load)."
    )


def printed(cells: list[dict], heading: str, start: str) -> list[str]:
    """The lines, printed or displayed as text, that begin with `start` in the sections whose
    heading holds the words `heading`."""
    inside, lines = not heading, []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and (title := re.search(r"^#+ .*", source, re.M)):
            inside = heading in title[0]
        for output in cell.get("outputs", []) if inside else []:
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            lines += [line for line in text.splitlines() if line.startswith(start)]
    return lines


def notebook_cells(name: str) -> list[dict]:
    return json.loads((REPOSITORY / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def finding() -> str:
    """What phase 2 says as its answer, as a quotation. ValueError where it says nothing."""
    name, heading, start = FINDING
    if lines := printed(notebook_cells(name), heading, start):
        lines += printed(notebook_cells(name), BESIDE, start)[:1]
        return "\n>\n".join(f"> {line}" for line in lines)
    raise ValueError(f"No notebook prints a line as described in FINDING: {FINDING}")


def figures_lines() -> str:
    """Each figure under what its section says."""
    told = []
    for name, title, heading, file in FIGURES:
        if not (lines := printed(notebook_cells(name), heading, "So: ")):
            raise ValueError(f"{name} prints no finding in {heading!r}: see FIGURES.")
        told += [f"> {line}" for line in lines]
        told += ["", f"![{title}, drawn by {name}](assets/{file}.png)", ""]
    return "\n".join(told[:-1])


def figure_png(name: str, title: str) -> bytes:
    """The PNG beside a notebook's figure. ValueError where no cell holds it."""
    outputs = (output for cell in notebook_cells(name) for output in cell.get("outputs", []))
    for data in (output.get("data", {}) for output in outputs):
        figure = data.get("application/vnd.plotly.v1+json", {"layout": {}})
        if figure["layout"].get("title", {}).get("text") == title and "image/png" in data:
            return base64.b64decode("".join(data["image/png"]))
    raise ValueError(f"{name} has no figure {title!r} with a PNG: run `make notebooks`")


def feature_page() -> str:
    """The page of the first HTML in the notebook whose title begins as PICTURE says. ValueError
    where no cell holds it."""
    cells = notebook_cells(PICTURE["notebook"])
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        body = "".join(output.get("data", {}).get("text/html", ""))
        if f'<div class="lh"><b>{PICTURE["heading"]}' in body:
            return page(PICTURE["alternative"], body, "<style>body{margin:8px}</style>")
    raise ValueError(
        f"{PICTURE['notebook']} has no HTML titled {PICTURE['heading']!r}: run `make notebooks`"
    )


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


def picture_line() -> str:
    return f"![{PICTURE['alternative']}](assets/{PICTURE['file']}.png)"


def floors_table() -> str:
    """The bundled SAE and every floor at each L0; bold what is better than the SAE's."""
    saved = json.loads(data_path("results", "phase_4_floors.json").read_text(encoding="utf-8"))
    table, rows = saved["config"]["table"], []
    ours = {(row["site"], row["asked_l0"]): row for row in table if row["name"] == "SAE"}
    head = ["site", "L0", "", *FLOORS.values()]
    for row in sorted(table, key=lambda row: (row["site"], row["asked_l0"])):
        told = [row["site"], f"{row['l0']:.1f}", row["name"]]
        for metric in FLOORS:
            sae = ours[row["site"], row["asked_l0"]][metric]
            better = row[metric] > sae if metric in MORE else row[metric] < sae
            value = f"{row[metric]:.0f}" if metric in COUNTS else f"{row[metric]:.3f}"
            compared = metric in BETTER and (metric in MORE or "twin" not in row["name"])
            told.append(f"**{value}**" if better and compared else value)
        rows.append(told)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


MARKERS = {  # file -> marker -> what stands between it and its end
    "README.md": {
        "picture": picture_line,
        "finding": finding,
        "figures": figures_lines,
        "notebooks": notebooks_table,
        "families": families_sentence,
        "memory": memory_table,
    },
    "data/README.md": {"floors": floors_table},
    "benchmarks/README.md": {"benchmarks": benchmarks_table},
}


def filled(text: str, markers: dict) -> str:
    """`text` with what each marker's function returns between `<!-- marker -->` and its end."""
    for marker, made in markers.items():
        start, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{made()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    asset = REPOSITORY / "assets" / f"{PICTURE['file']}.html"
    wanted: dict[Path, bytes] = {asset: feature_page().encode()}
    for name, title, _, file in FIGURES:
        wanted[asset.with_name(f"{file}.png")] = figure_png(name, title)
    for name, markers in MARKERS.items():
        file = REPOSITORY / name
        wanted[file] = filled(file.read_text(encoding="utf-8"), markers).encode()
    drawing = asset.with_suffix(".png")
    if "--check" in sys.argv:
        stale = [f.name for f, new in wanted.items() if not f.exists() or f.read_bytes() != new]
        stale += [] if drawing.exists() else [drawing.name]
        sys.exit(f"{', '.join(stale)}: run scripts/readme_tables.py" if stale else 0)
    for file, content in wanted.items():
        with atomic_write(file) as temporary:
            temporary.write_bytes(content)
    png = asyncio.run(screenshot(asset, PICTURE["width"], PICTURE["height"]))
    with atomic_write(drawing) as temporary:
        temporary.write_bytes(png)


if __name__ == "__main__":
    main()
