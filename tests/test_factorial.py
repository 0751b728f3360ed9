"""The three choices of an older rule on planted layers that hold the same: the trend that it
reports is its own."""

from functools import cache

import jupytext
import numpy as np
import pandas as pd
import pytest
import torch

from lenslab.features.ranking import count_specialists_null
from lenslab.files import REPOSITORY
from lenslab.runtime import derive_generator

FIRST, LATER = "encode, then pool", "pool, then encode"


@cache
def cells() -> list[str]:
    """The code cells of phase 3."""
    source = REPOSITORY / "notebooks" / "interactive" / "phase_3_sae_comparison.py"
    return [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]


def run_cells(first: str, last: str | None = None, **names):
    """What is defined after the cells from that which holds `first` to that which holds `last`, run
    with `names`."""
    numbers = [
        [i for i, cell in enumerate(cells()) if text in cell] for text in (first, last or first)
    ]
    assert [len(found) for found in numbers] == [1, 1], "each text stands in one cell"
    names |= {"np": np, "pd": pd, "torch": torch, "derive_generator": derive_generator}
    for cell in cells()[numbers[0][0] : numbers[1][0] + 1]:
        exec(cell, names)
    return names


@pytest.fixture(scope="module")
def planted():
    """What the cells define that plant the layers and make a text's value in eight ways."""
    return run_cells('"planted layers"', "def pooled_ways")


def count_by_way(planted, ways, threshold=5.0, n=10):
    rows = []
    for way, matrix in ways.items():
        null = count_specialists_null(matrix.round(3), planted["kinds"], threshold, n=n)
        row = dict(zip(("BOS", "padding", "order"), way, strict=True))
        coverage = (matrix > 0).mean(0).max()
        counts = {"specialists": null.observed, "shuffled": null.mean_null, "coverage": coverage}
        rows.append(row | counts)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def tables(planted):
    """threshold -> specialists (way x layer), and the same of shuffled labels and of coverage."""
    found = {}
    for threshold in (5.0, "half"):
        parts = []
        for name, (x, encode) in planted["layers"].items():
            ways = planted["pooled_ways"](encode, x, planted["real"], planted["attention"])
            parts.append(count_by_way(planted, ways, threshold).assign(layer=name))
        wide = pd.concat(parts).pivot(index=["BOS", "padding", "order"], columns="layer")
        found[threshold] = {c: wide[c] for c in ("specialists", "shuffled", "coverage")}
    return found


def test_the_old_trend_appears_where_tokens_are_averaged_first_and_with_shuffled_labels(tables):
    found = tables[5.0]
    counts = found["specialists"].loc[False, False, LATER].to_numpy()
    assert counts[0] < 6 and counts[-1] == 7 and (np.diff(counts) >= 0).all()
    shuffled = found["shuffled"].loc[False, False, LATER].to_numpy()
    assert shuffled[0] < 4 < 6 < shuffled[-1], "the same trend where labels mean nothing"


def test_the_trend_vanishes_by_either_mend(tables):
    assert (tables[5.0]["specialists"].loc[False, False, FIRST] == 7).all()
    assert (tables["half"]["specialists"].loc[False, False] == 7).all(axis=None)


def test_a_huge_bos_hides_all_specialists_and_covers_every_text(tables):
    found = tables[5.0]
    assert (found["specialists"].loc[True, False, FIRST] == 0).all()
    assert found["specialists"].loc[True, False, LATER].iloc[0] == 0
    assert (found["coverage"].loc[True, False] == 1).all(axis=None)
    assert found["coverage"].loc[False, False, LATER].max() < 0.6


def test_without_a_huge_bos_bos_changes_little(planted):
    x, encode = planted["layers"]["layer 1"]
    x = x.clone()
    x[:, 0] = 0
    ways = planted["pooled_ways"](encode, x, planted["real"], planted["attention"])
    table = count_by_way(planted, ways)
    means = {f: table.groupby(f)["specialists"].mean() for f in ("BOS", "order")}
    assert abs(means["BOS"][True] - means["BOS"][False]) < 1
    assert means["order"][LATER] < means["order"][FIRST] - 0.5


def test_ways_are_means_over_what_is_counted(planted):
    x = torch.tensor([[[9.0], [1.0], [3.0], [100.0]]])
    real = torch.tensor([[False, True, True, False]])
    attention = torch.tensor([[True, True, True, False]])
    ways = planted["pooled_ways"](lambda v: torch.relu(v - 2), x, real, attention)
    assert {way: float(matrix[0, 0]) for way, matrix in ways.items()} == pytest.approx(
        {
            (False, False, FIRST): 0.5,
            (False, False, LATER): 0.0,
            (True, False, FIRST): 8 / 3,
            (True, False, LATER): 13 / 3 - 2,
            (False, True, FIRST): 99 / 3,
            (False, True, LATER): 104 / 3 - 2,
            (True, True, FIRST): 106 / 4,
            (True, True, LATER): 113 / 4 - 2,
        }
    )
