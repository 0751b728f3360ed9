"""k-sparse probing on real labels: the data sets that the package sae-probes 0.4.2 carries.

None of their text is in this project. Fetch the wheel, which need not be installed, and name the
folder of its tables (`*.csv.zst` with the columns `prompt` and `target`):

    pip download --no-deps sae-probes==0.4.2
    unzip sae_probes-0.4.2-py3-none-any.whl -d FOLDER
    python benchmarks/real_probes.py FOLDER/sae_probes/data/cleaned_data
    python benchmarks/real_probes.py FOLDER/sae_probes/data/cleaned_data --only 96_spam_is

Texts that do not fit the model's context are left out, since what their label is about may stand in
the part that would be cut off.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
import pyarrow

sys.path.insert(0, str(Path(__file__).parent))
import sparse_probing

from lenslab.models import load_model
from lenslab.runtime import derive_generator
from lenslab.sae.load import load_sae
from lenslab.texts import LabelledTexts, label_texts
from lenslab.tokens import tokenize

SETS = ("96_spam_is", "92_glue_sst2", "161_agnews_0", "105_click_bait", "106_hate_hate")
SETS += ("129_arith_mc_A", "22_headline_isobama", "110_aimade_humangpt3")
CHARACTERS = 800  # at most, before it is known how many tokens they are


def read_set(file: Path, model, n: int, seed: int = 0) -> LabelledTexts:
    """`n` labelled texts of a table, as many of either label; ValueError for other columns or
    more than two labels."""
    table = pd.read_csv(pyarrow.input_stream(str(file), compression="zstd"))
    if not {"prompt", "target"} <= set(table.columns) or table["target"].nunique() != 2:
        raise ValueError(f"{file.name} has no columns `prompt` and `target` of two labels.")
    table = table.rename(columns={"prompt": "text", "target": "category"})
    table = table[table["text"].astype(str).str.len() <= CHARACTERS]
    lengths = table["text"].map(lambda text: len(model.tokenizer(str(text))["input_ids"]))
    table = table[lengths < model.cfg.n_ctx]
    state = derive_generator(seed, file.name).initial_seed() % 2**32
    table = table.sample(frac=1, random_state=state).groupby("category").head(n // 2)
    return label_texts(table.assign(category=table["category"].astype(str)), seed=seed)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="of the tables NAME.csv.zst")
    add("--only", nargs="+", default=SETS, help="names of data sets of two labels")
    add("--texts", type=int, default=300, help="of each data set, half of them held out")
    given = parser.parse_args(words)
    model = load_model("pocket-gpt")
    saes = {0: load_sae(sparse_probing.SAE)}
    for name in given.only:
        labels = read_set(given.folder / f"{name}.csv.zst", model, given.texts)
        batch = tokenize(model, list(labels.texts))
        labels = labels.with_lengths(batch.real.sum(1).numpy())
        rows = pd.DataFrame(sparse_probing.probing(model, saes, batch, labels))
        rows = rows[rows["kind"] == labels.categories[-1]]  # of two kinds the other says the same
        rows["way"] = rows["of"] + rows["part"].str.removeprefix("probing")
        table = rows.pivot_table(index="way", columns="k", values="value")
        print(f"\n{name}: {len(labels)} texts, held-out AUROC by k")
        print(table.round(3).to_string(na_rep=""), flush=True)


if __name__ == "__main__":
    main()
