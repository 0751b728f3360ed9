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
from sklearn.metrics import roc_auc_score
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
    """A set with its lengths: `tokens` in pocket-gpt's tokenizer, without BOS, and `characters`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        data_path("models", "pocket-gpt"), trust_remote_code=False
    )
    frame = load_probes(name)
    ids = tokenizer(frame["text"].tolist(), add_special_tokens=False).input_ids
    return frame.assign(tokens=[len(i) for i in ids], characters=frame["text"].str.len())


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


TABLES = {
    "counts": counts_table,
    "lengths": lengths_table,
    "cues": cues_table,
    "templates": templates_table,
    "competence": competence_table,
    "blind reading": blind_table,
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
