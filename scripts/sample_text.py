"""Sample a corpus from a model: text that may ship with the project, for what needs more text than
the probes.

1. For every category there are a few neutral openings. A batch is one opening, many times: all rows
   have one length.
2. Tokens are drawn at temperature 1, nothing cut off (BOS and padding apart, which are no text),
   with keys and values cached, until EOS, another special token or `--length`; in bf16 where the
   machine computes that fast.
3. Batch i depends on the model, on the seed and on i alone. Each is kept in --work as it is made,
   so a killed run goes on where it stopped.
4. All batches, in order, become `sampled.parquet` (id, category, prompt, text, tokens), and a
   README beside it says what it is and what it cannot show.

    python scripts/sample_text.py --tokens 1e6
    python scripts/sample_text.py --model smollm2 --tokens 1e5 --batch 32
    python scripts/sample_text.py --tokens 2e4 --batch 16 --out FOLDER      # a look
"""

from __future__ import annotations

import argparse
from itertools import takewhile
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenslab.files import (
    BUNDLED,
    DEFAULT,
    FETCHED,
    atomic_write,
    content_key,
    data_path,
    sha256_file,
)
from lenslab.runtime import compute_dtype, default_device, derive_generator, progress_bar
from lenslab.smollm2 import smollm2_folder

OPENINGS = {
    "narrative": [
        "Once there was",
        "In the evening",
        "She opened the door",
        "The old man",
        "It had rained all day",
    ],
    "expository": [
        "The history of",
        "In biology, a",
        "There are several kinds of",
        "A volcano is",
        "The first",
    ],
    "formal": [
        "The parties agree",
        "Section 1.",
        "The committee",
        "Any person who",
        "In accordance with",
    ],
    "conversational": [
        "Hello, how are",
        "What did you",
        "Yes, but",
        "I was going to ask",
        "Do you remember",
    ],
    "social": ["Just got home", "Does anyone know", "So happy", "I can't believe", "Today I"],
    "math": ["Let x be", "If there are 12", "Suppose that", "The sum of", "Solve the equation"],
    "non_english": ["Es war einmal", "El hombre", "La ville", "Il giorno", "В начале"],
    "web": ["Welcome to", "How to make", "In this post", "The best way to", "Click here"],
    "python": ["def ", "import ", "class ", "    for i in", "# Return the"],
}
CARD = """# Sampled text

`sampled.parquet`: {documents:,} texts, {tokens:,} tokens, sampled from `{model}` (weights {key}) by
`scripts/sample_text.py` with seed {seed} at temperature 1, after {openings} short openings written for this project.

| column | what it is |
|---|---|
| `id` | category, batch and row |
| `category` | the kind of text that the opening is typical of; the model may have gone on with another kind |
| `prompt` | the opening |
| `text` | the opening and what the model wrote after it; a character cut in two by the end of the context is U+FFFD |
| `tokens` | number of tokens of `text` as sampled, without BOS and EOS |

{table}

What it is for: text in a quantity that may ship with the project, from the distribution that the model itself has
learned, for training and trying things out where no other corpus is at hand.

What it cannot show:
- how the model or an SAE does on text by people: on its own samples a model's loss is that of its own uncertainty,
  and features that real text would need may never fire;
- facts, good style or working code: a small model, trained briefly, wrote it, and nobody has corrected it;
- what kinds of text are like: a category is that of the opening, not a judgement of the text after it;
- independence from the training texts: nothing keeps the model from repeating short passages, and the attitudes, of
  what it read.
"""  # noqa: E501


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token of each row of logits `[row, vocabulary]` at temperature 1 -> `[row, 1]`, by the
    inverse of the cumulated shares: a tenth of the time that torch.multinomial takes."""
    share = logits.softmax(-1).cumsum(-1)
    at = torch.rand(len(share), 1, generator=generator) * share[:, -1:]
    return torch.searchsorted(share, at, right=True).clamp_max(share.shape[1] - 1)


@torch.inference_mode()
def sample_batch(
    model, tokenizer, prompt: list[int], rows: int, generator: torch.Generator, length: int
) -> list[list[int]]:
    """`rows` continuations of one prompt of ids (BOS first), each up to a special token or
    `length` tokens; prompt kept."""
    device, special = next(model.parameters()).device, set(tokenizer.added_tokens_decoder)
    banned = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    ends = torch.tensor(sorted(special - banned), device=device)
    tokens = torch.tensor([prompt] * rows, device=device)
    cache, new, ended = None, tokens, torch.zeros(rows, dtype=torch.bool, device=device)
    while tokens.shape[1] < length and not bool(ended.all()):
        output = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        logits[:, sorted(banned)] = -torch.inf
        new = draw(logits.cpu(), generator).to(device)
        tokens = torch.cat([tokens, new], dim=1)
        ended |= torch.isin(new[:, 0], ends)
    ends = set(ends.tolist())
    ids = [row.tolist() for row in tokens.cpu()]
    return [row[:1] + list(takewhile(lambda i: i not in ends, row[1:])) for row in ids]


def batch_frame(model, tokenizer, number: int, rows: int, seed: int, length: int) -> pd.DataFrame:
    """Batch `number`: category by category in turn, each time with its next opening."""
    categories = list(OPENINGS)
    category = categories[number % len(categories)]
    openings = OPENINGS[category]
    opening = openings[number // len(categories) % len(openings)]
    prompt = [tokenizer.bos_token_id, *tokenizer(opening, add_special_tokens=False).input_ids]
    generator = derive_generator(seed, f"sampled text {number}")
    ids = sample_batch(model, tokenizer, prompt, rows, generator, length)
    texts = [row[1:] for row in ids]
    return pd.DataFrame(
        {
            "id": [f"{category}-{number:05d}-{row:03d}" for row in range(len(texts))],
            "category": category,
            "prompt": opening,
            "text": tokenizer.batch_decode(texts),
            "tokens": pd.array([len(ids) for ids in texts], dtype="int32"),
        }
    )


def sample(
    folder: Path,
    out: Path,
    work: Path,
    tokens: int,
    rows: int,
    seed: int,
    length: int = 256,
    progress: bool = True,
) -> Path:
    """Batches until `tokens` are there, then the file and its card; returns the file."""
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype(), trust_remote_code=False)
        .to(default_device())
        .eval()
    )
    model.set_attn_implementation(
        "eager"
    )  # for one new token a step faster on a CPU than the fused kernel
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    length = min(length, model.config.max_position_embeddings)
    key = sha256_file(folder / "model.safetensors")[:16]
    parts = work / content_key(key, rows, seed, length, str(compute_dtype()), OPENINGS)
    frames, done, number = [], 0, 0
    with progress_bar(total=tokens, desc="sample", unit="tok", progress=progress) as bar:
        while done < tokens:
            file = parts / f"batch-{number:05d}.parquet"
            if not file.exists():
                with atomic_write(file) as temporary:
                    frame = batch_frame(model, tokenizer, number, rows, seed, length)
                    frame.to_parquet(temporary, index=False)
            frames.append(pd.read_parquet(file))
            new = int(frames[-1]["tokens"].sum())
            done, number = done + new, number + 1
            bar.update(new)
    frame = pd.concat(frames, ignore_index=True)
    frame = frame[frame["tokens"].cumsum() - frame["tokens"] < tokens]
    with atomic_write(out / "sampled.parquet") as temporary:
        frame.to_parquet(temporary, compression="zstd", index=False)
    by_category = frame.groupby("category", sort=False)["tokens"].agg(["size", "sum"])
    rows_of_table = [
        f"| {name} | {size:,} | {total:,} |" for name, size, total in by_category.itertuples()
    ]
    card = CARD.format(
        documents=len(frame),
        tokens=int(frame["tokens"].sum()),
        model=folder.name,
        key=key,
        seed=seed,
        openings=sum(map(len, OPENINGS.values())),
        table="\n".join(["| category | texts | tokens |", "|---|---|---|", *rows_of_table]),
    )
    with atomic_write(out / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    return out / "sampled.parquet"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pocket-gpt", help="bundled, `smollm2`, or a folder")
    parser.add_argument("--out", type=Path, help="default: where that model's text ships")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/sampled-text"), help="batches as they are made"
    )
    parser.add_argument("--tokens", type=float, default=1e6)
    parser.add_argument(
        "--batch", type=int, default=128, help="texts per batch, all after one opening"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=256, help="tokens of a text, with BOS")
    given = parser.parse_args()
    folder = data_path("models", given.model) if given.model in BUNDLED else Path(given.model)
    if given.model in FETCHED:
        folder = smollm2_folder()
    out = given.out or data_path("corpus", "" if given.model == DEFAULT else folder.name)
    file = sample(folder, out, given.work, int(given.tokens), given.batch, given.seed, given.length)
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
