"""How well a model does what the prompt pairs ask, beside its random-weight twin; and the tables of
the probes' card.

1. Leave out pairs that the model's tokenizer cannot use: an answer of several tokens, prompts of
   unequal length.
2. Run every prompt alone (no padding) and read the logits at its last position.
3. Right means that the prompt's own answer has the higher logit of the two. Counted on clean
   prompts, on corrupt ones and on both of a pair: a model that ignores what differs gives the same
   order twice and is never right on both.
4. The same for the twin: what it gets right was not learned.
5. Write competence-MODEL.json and fill the tables of data/probes/README.md.

    python scripts/measure_competence.py                # pocket-gpt, seconds
    python scripts/measure_competence.py --model gpt2
    python scripts/measure_competence.py --card         # the tables only
"""

from __future__ import annotations

import argparse
import json
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from tqdm.auto import tqdm

from lenslab.files import atomic_write, data_path, sha256_file, write_json
from lenslab.models import load_model, model_key, model_name, random_twin
from lenslab.stats import clopper_pearson
from lenslab.texts import load_probes
from lenslab.tokens import tokenize

SIDES = ("clean", "corrupt")
CARD = data_path("probes", "README.md")
ATTRACTORS = ("no attractor", "1 attractor", "2 attractors")
CUES = {  # a feature that knows only this finds these shares of the texts
    "line break": r"\n",
    "digit": r"\d",
    "question mark": r"\?",
    "apostrophe": "'",
    "double quote": '"',
    "= or <": "[=<]",
    "lower case at the start": r"^[a-z]",
    "full stop at the end": r"\.$",
    "beyond ASCII": r"[^\x00-\x7f]",
    "the word example": r"example",
}
UNIT = r"\w+|[^\w\s]"  # a word or a mark
CLASSIFIERS = {  # what a classifier of meanings is told of a context, and how it counts that
    "characters": (
        "before",
        TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True),
    ),
    "words": ("before", TfidfVectorizer(token_pattern=UNIT, ngram_range=(1, 2), sublinear_tf=True)),
    "last word": ("last", CountVectorizer(token_pattern=UNIT)),
    "style": ("style", CountVectorizer(token_pattern=UNIT)),
}


def next_id(tokenizer, prompt: str, answer: str) -> int | None:
    """The one token that an answer is where it stands, after its prompt; None where it is several,
    or joins it."""
    ids, whole = tokenizer([prompt, prompt + answer], add_special_tokens=False).input_ids
    return whole[-1] if whole[:-1] == ids else None


def misfit(tokenizer, pair: dict) -> str:
    """Why a tokenizer cannot use a pair; empty where it can."""
    prompts = [pair[f"prompt_{side}"] for side in SIDES]
    for prompt in prompts:
        for answer in (pair["answer_clean"], pair["answer_corrupt"]):
            if next_id(tokenizer, prompt, answer) is None:
                return f"{answer!r} is not one token after {prompt!r}"
    first, second = map(len, tokenizer(prompts, add_special_tokens=False).input_ids)
    return "" if first == second else f"{first} and {second} tokens: {prompts[0]!r}"


def logit_differences(model, pairs: pd.DataFrame) -> pd.DataFrame:
    """logit(own answer) - logit(the other prompt's answer) after each prompt: columns `clean`,
    `corrupt`."""
    prompts = [prompt for side in SIDES for prompt in pairs[f"prompt_{side}"]]
    own = [answer for side in SIDES for answer in pairs[f"answer_{side}"]]
    other = [answer for side in SIDES[::-1] for answer in pairs[f"answer_{side}"]]
    batch = tokenize(model, prompts)
    lengths = batch.attention.sum(1)
    found = torch.empty(len(prompts))
    with tqdm(total=len(prompts), desc=model_name(model), delay=2) as bar, torch.inference_mode():
        for length in lengths.unique().tolist():  # one length at a time: nothing is padded
            for rows in (lengths == length).nonzero().flatten().split(32):
                logits = (
                    model(batch.tokens[rows, :length].to(model.cfg.device))[:, -1].float().cpu()
                )
                for row, values in zip(rows.tolist(), logits, strict=True):
                    mine, theirs = (
                        next_id(model.tokenizer, prompts[row], a[row]) for a in (own, other)
                    )
                    found[row] = values[mine] - values[theirs]
                bar.update(len(rows))
    clean, corrupt = found.chunk(2)
    return pd.DataFrame({"clean": clean.tolist(), "corrupt": corrupt.tolist()}, index=pairs.index)


def competence(pairs: pd.DataFrame, differences: pd.DataFrame) -> list[dict]:
    """One row per task, per number of attractors and per template: shares with 95 % intervals, mean
    differences."""
    right = pd.DataFrame({side: differences[side] > 0 for side in SIDES})
    right["both"] = right["clean"] & right["corrupt"]
    groups = [(task, "all", rows) for task, rows in pairs.groupby("task", sort=False)]
    for column in ("n_attractors", "template"):
        for (task, value), rows in pairs.groupby(["task", column], sort=False):
            groups.append(
                (task, ATTRACTORS[int(value)] if column == "n_attractors" else value, rows)
            )
    found = []
    for task, group, rows in groups:
        row = {"task": task, "group": group, "pairs": len(rows)}
        for kind in right:
            interval = clopper_pearson(int(right.loc[rows.index, kind].sum()), len(rows))
            row[f"right_{kind}"] = [
                round(v, 4) for v in (interval.estimate, interval.low, interval.high)
            ]
        means = differences.loc[rows.index].mean()
        row |= {f"difference_{side}": round(float(means[side]), 4) for side in SIDES}
        found.append(row | {"difference": round(float(means.mean()), 4)})
    return found


def measure(model) -> dict:
    """Competence of a model and of its twin on the pairs its tokenizer can use, and what it was
    measured with."""
    pairs = load_probes("prompt_pairs")
    usable = pairs[[not misfit(model.tokenizer, pair) for pair in pairs.to_dict("records")]]
    if usable.empty:
        raise SystemExit(
            f"{model_name(model)}: its tokenizer can use no pair (answers of several tokens)."
        )
    twin = random_twin(model)
    return {
        "model": model_name(model),
        "model_key": model_key(model),
        "twin_key": model_key(twin),
        "pairs_sha256": sha256_file(data_path("probes", "prompt_pairs.jsonl")),
        "pairs_left_out": len(pairs) - len(usable),
        "model_rows": competence(usable, logit_differences(model, usable)),
        "twin_rows": competence(usable, logit_differences(twin, usable)),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "transformer-lens", "lenslab")
        },
    }


@cache
def probes(name: str) -> pd.DataFrame:
    """A set with its lengths: `tokens` in pocket-gpt's tokenizer, without BOS, and `characters`; of
    contexts also how many tokens stand `before` the one they are about."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        data_path("models", "pocket-gpt"), trust_remote_code=False
    )
    frame = load_probes(name)
    encoded = tokenizer(
        frame["text"].tolist(), add_special_tokens=False, return_offsets_mapping=True
    )
    ends = [[end for _, end in offsets] for offsets in encoded.offset_mapping]
    if "start" in frame:
        starts = zip(ends, frame["start"], strict=True)
        frame = frame.assign(before=[sum(e <= start for e in text) for text, start in starts])
    return frame.assign(tokens=[len(e) for e in ends], characters=frame["text"].str.len())


def markdown(rows: list[dict]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counts_table() -> str:
    rows = []
    for name, by, within in (
        ("categories", "category", "register"),
        ("matched", "form", "notation"),
    ):
        for value, part in probes(name).groupby(by, sort=False):
            parts = ", ".join(
                f"{k} {n}" for k, n in part.groupby(within, sort=False).size().items()
            )
            rows.append({"set": name, "part": value, "texts": len(part), "of which": parts})
            rows[-1] |= {
                half: int((part["split"] == half).sum()) for half in ("discovery", "held_out")
            }
    for task, part in load_probes("prompt_pairs").groupby("task", sort=False):
        parts = f"{part['template'].nunique()} templates"
        rows.append(
            {"set": "prompt_pairs", "part": task, "texts": f"{len(part)} pairs", "of which": parts}
        )
        rows[-1] |= {half: int((part["split"] == half).sum()) for half in ("discovery", "held_out")}
    contexts = load_probes("contextual")
    meanings = len(contexts.groupby(["token", "meaning"]))
    rows.append(
        {
            "set": "contextual",
            "part": f"{contexts['token'].nunique()} tokens",
            "texts": len(contexts),
            "of which": f"{meanings} meanings",
        }
    )
    rows[-1] |= contexts.groupby("split").size().to_dict()
    return markdown(rows)


def lengths_table() -> str:
    rows = []
    for name, by in (("categories", "category"), ("matched", "form")):
        frame = probes(name)
        for value, part in frame.groupby(by, sort=False):
            tokens = part["tokens"]
            row = {
                "set": name,
                "part": value,
                "mean tokens": f"{tokens.mean():.1f}",
                "sd": f"{tokens.std():.1f}",
            }
            row |= {"min": tokens.min(), "max": tokens.max()}
            for unit in ("tokens", "characters"):
                row[f"AUROC of {unit}"] = f"{roc_auc_score(frame[by] == value, frame[unit]):.2f}"
            rows.append(row)
    return markdown(rows)


def cues_table() -> str:
    rows = []
    for name, by in (("categories", "category"), ("matched", "form")):
        frame = probes(name)
        for value, part in frame.groupby(by, sort=False):
            shares = {cue: f"{part['text'].str.contains(p).mean():.0%}" for cue, p in CUES.items()}
            rows.append({"set": name, "part": value, **shares})
    return markdown(rows)


def templates_table() -> str:
    rows = []
    for (task, template), part in load_probes("prompt_pairs").groupby(
        ["task", "template"], sort=False
    ):
        shown = template.replace("\n", "⏎")
        rows.append(
            {"task": task, "template of the clean prompt": f"`{shown}`", "pairs": len(part)}
        )
    return markdown(rows)


def competence_table() -> str:
    """Tasks, attractors, templates of brackets. Learned: the model's interval for both lies above
    the twin's."""

    def percent(values: list[float]) -> str:
        return f"{values[0]:.0%} ({values[1]:.0%} to {values[2]:.0%})"

    rows = []
    for file in sorted(data_path("probes").glob("competence-*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        for ours, twin in zip(found["model_rows"], found["twin_rows"], strict=True):
            task, group = ours["task"], ours["group"]
            if group in ("all", *ATTRACTORS) or task == "brackets":
                shown = {"all": f"**{task}**"} | {name: f"{task}, {name}" for name in ATTRACTORS}
                row = {
                    "model": found["model"],
                    "task": shown.get(group, f"`{group}`"),
                    "pairs": ours["pairs"],
                }
                row |= {
                    f"right on {kind}": percent(ours[f"right_{kind}"]) for kind in (*SIDES, "both")
                }
                row |= {
                    "mean difference": f"{ours['difference']:+.2f}",
                    "twin: both": percent(twin["right_both"]),
                }
                row["twin: difference"] = f"{twin['difference']:+.2f}"
                rows.append(
                    row
                    | {"learned": "yes" if ours["right_both"][1] > twin["right_both"][2] else "no"}
                )
    return markdown(rows) if rows else "Not measured yet."


def blind_table() -> str:
    """What the second reader saw of each kind, how many named alike, and how often another kind was
    considered."""
    reading = json.loads(data_path("probes", "blind_reading.json").read_text(encoding="utf-8"))
    written = probes("categories").set_index("id")["category"]
    found = pd.DataFrame(reading["labels"]).assign(category=lambda f: written[f["id"]].to_numpy())
    found = found.assign(
        agrees=found["label"] == found["category"], hesitated=found["second"].notna()
    )
    rows = found.groupby("category", sort=False)[["agrees", "hesitated"]].agg(["size", "sum"])
    table = [
        {
            "category": name,
            "texts": int(row["agrees", "size"]),
            "named alike": int(row["agrees", "sum"]),
            "another kind considered": int(row["hesitated", "sum"]),
        }
        for name, row in rows.iterrows()
    ]
    agreed = clopper_pearson(int(found["agrees"].sum()), len(found))
    total = f"{int(found['agrees'].sum())} of {len(found)} (95 % interval from {agreed.low:.0%})"
    return f"{markdown(table)}\n\nAltogether {total}."


def blind_contexts() -> pd.DataFrame:
    """What the second reader saw of the contexts: each with its `label`, whether it `agrees` with
    the meaning, and whether the reader `hesitated`."""
    reading = json.loads(data_path("probes", "blind_reading.json").read_text(encoding="utf-8"))
    labels = pd.DataFrame(reading["contextual"]["labels"])
    read = load_probes("contextual").merge(labels, on="id", validate="1:1")
    return read.assign(agrees=read["label"] == read["meaning"], hesitated=read["second"].notna())


def contexts_table() -> str:
    """One row per token: its meanings, how long their contexts are, how the second reader named
    them."""
    read = blind_contexts()
    rows = []
    for token, part in probes("contextual").groupby("token", sort=False):
        meanings = part["meaning"].unique()
        means = part.groupby("meaning")[["tokens", "before"]].mean().loc[meanings]
        aurocs = [roc_auc_score(part["meaning"] == meaning, part["before"]) for meaning in meanings]
        seen = read[read["token"] == token].groupby("meaning")["agrees"].agg(["sum", "size"])
        seen = seen.reindex(meanings, fill_value=0)
        rows.append(
            {
                "token": shown_token(token),
                "meanings": ", ".join(meanings),
                "contexts of each": ", ".join(
                    str((part["meaning"] == meaning).sum()) for meaning in meanings
                ),
                "mean tokens": ", ".join(f"{mean:.0f}" for mean in means["tokens"]),
                "before the token": ", ".join(f"{mean:.0f}" for mean in means["before"]),
                "AUROC of those": ", ".join(f"{auroc:.2f}" for auroc in aurocs),
                "named alike": ", ".join(f"{k} of {n}" for k, n in seen.to_numpy()),
            }
        )
    agreed = clopper_pearson(int(read["agrees"].sum()), len(read))
    total = (
        f"Named alike {int(read['agrees'].sum())} of {len(read)} (95 % interval from "
        f"{agreed.low:.0%}); another meaning considered in {int(read['hesitated'].sum())}."
    )
    return f"{markdown(rows)}\n\n{total}"


def shown_token(token: str) -> str:
    """A token in a cell of a table, where a bar would end the cell."""
    return f"`{token}`".replace("|", "\\|")


def context_scores(contexts: pd.DataFrame) -> pd.DataFrame:
    """Whether logistic regressions, fitted per token on discovery, name each held-out context's
    meaning: held-out rows of `contexts`, a column of bool for each of CLASSIFIERS.

    They see the text before the token, as a causal model does; or its last word, or the style."""
    before = [text[:start] for text, start in zip(contexts["text"], contexts["start"], strict=True)]
    last = [re.findall(UNIT, text)[-1] for text in before]
    contexts = contexts.assign(before=before, last=last)
    scored = []
    for _, part in contexts.groupby("token", sort=False):
        fitted = part[part["split"] == "discovery"]
        held_out = part[part["split"] == "held_out"]
        right = held_out[["token"]].copy()
        for name, (column, counts) in CLASSIFIERS.items():
            classifier = make_pipeline(counts, LogisticRegression(max_iter=1000))
            classifier.fit(fitted[column], fitted["meaning"])
            right[name] = classifier.predict(held_out[column]) == held_out["meaning"]
        scored.append(right)
    return pd.concat(scored)


def n_grams_table() -> str:
    """Balanced accuracy per token (every meaning has as many held-out contexts), pooled with an
    interval, and what it means."""
    scores = context_scores(load_probes("contextual"))
    rows = []
    for token, part in scores.groupby("token", sort=False):
        rows.append({"token": shown_token(token), "held out": len(part)})
        rows[-1] |= {name: f"{part[name].mean():.0%}" for name in CLASSIFIERS}
    word = scores["token"].str.contains(r"\w")
    pooled = {"all words": scores[word], "all symbols": scores[~word], "all": scores}
    for name, part in pooled.items():
        row = {"token": f"**{name}**", "held out": len(part)}
        for classifier in CLASSIFIERS:
            share = clopper_pearson(int(part[classifier].sum()), len(part))
            row[classifier] = f"{share.estimate:.0%} ({share.low:.0%} to {share.high:.0%})"
        rows.append(row)
    best = max(CLASSIFIERS, key=lambda name: scores[name].mean())
    verdict = (
        f"**So:** from the text before the token, the best of these ({best}) names the meaning of "
        f"{scores[best].mean():.0%} of the held-out contexts. Guessing names {1 / 3:.0%}, and the "
        f"second reader named {blind_contexts()['agrees'].mean():.0%} of those read."
    )
    return f"{markdown(rows)}\n\n{verdict}"


TABLES = {
    "counts": counts_table,
    "lengths": lengths_table,
    "cues": cues_table,
    "templates": templates_table,
    "competence": competence_table,
    "blind reading": blind_table,
    "contexts": contexts_table,
    "n-grams": n_grams_table,
}


def filled(card: str) -> str:
    """The card with its tables made anew. Raises ValueError where a pair of markers is missing."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not pattern.search(card):
            raise ValueError(f"The card has no <!-- {name} --> ... <!-- end of {name} -->.")
        text = table()
        card = pattern.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", card)
    return card


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="pocket-gpt", help="bundled name, local folder or hub name"
    )
    parser.add_argument(
        "--out", type=Path, default=data_path("probes"), help="folder of competence-MODEL.json"
    )
    parser.add_argument(
        "--card", action="store_true", help="fill the tables of the card, measure nothing"
    )
    given = parser.parse_args(arguments)
    if not given.card:
        found = measure(load_model(given.model))
        write_json(given.out / f"competence-{found['model'].replace('/', '-')}.json", found)
        tasks = [row for row in found["model_rows"] if row["group"] == "all"]
        print(
            pd.DataFrame(tasks)[["task", "pairs", "right_both", "difference"]].to_string(
                index=False
            )
        )
    if given.out == data_path("probes"):  # elsewhere the card has nothing to show
        new = filled(CARD.read_text(encoding="utf-8"))
        with atomic_write(CARD) as temporary:
            temporary.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
