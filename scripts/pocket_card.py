"""The card of a bundled model: what it was trained on and what was measured on the saved weights.

1. Bits per byte by category: the first 255 tokens of each validation document, after BOS.
2. Induction: loss on the first and second half of random sequences repeated once.
3. Head scores on the same sequences: attention to the previous token, to the same token one repeat
   earlier (duplicate), and to the token after that one (induction).

    python scripts/pocket_card.py data/models/pocket-gpt --corpus FOLDER     # measure again
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pocket_corpus as corpus
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenslab.analysis.streams import head_scores
from lenslab.models import load_model
from lenslab.paths import write_json


@torch.inference_mode()
def next_token_losses(model, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each next token: [text, pos] -> [text, pos - 1]."""
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def bits_per_byte(model, tokenizer, texts: list[str], context: int = corpus.CONTEXT, batch: int = 16) -> float:
    """Total bits over total bytes of the first `context - 1` tokens of each text.

    In a byte-level vocabulary each character of a token's own string is one byte, so bytes are exact even
    where a token ends inside a character.
    """
    rows = [tokenizer(text, add_special_tokens=False).input_ids[: context - 1] for text in texts]
    rows = sorted((row for row in rows if row), key=len)
    size = [len(s) for s in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    nats = n_bytes = 0.0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(map(len, part))
        tokens = torch.tensor(
            [[tokenizer.bos_token_id, *row] + [tokenizer.pad_token_id] * (width - len(row)) for row in part]
        )
        losses = next_token_losses(model, tokens)  # causal: padding on the right changes nothing before it
        for row, loss in zip(part, losses, strict=True):
            nats += loss[: len(row)].double().sum().item()
            n_bytes += sum(size[i] for i in row)
    return nats / math.log(2) / n_bytes


def induction_measures(folder: Path) -> dict:
    """Loss on the two copies of repeated random sequences, and each head's scores there, `[layer][head]`."""
    scores = head_scores(load_model(folder), n=32, length=100)
    kinds = ("previous_token", "duplicate_token", "induction")
    return {
        "repeat_loss_first": round(scores.loss_first, 3),
        "repeat_loss_second": round(scores.loss_second, 3),
        "head_scores": {kind: np.round(getattr(scores, kind).astype(float), 3).tolist() for kind in kinds},
    }


def measure(folder: Path, validation: dict[str, list[str]]) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bits = {}
    for category in tqdm(sorted(validation), desc="bits per byte", delay=2):
        if validation[category]:
            bits[category] = round(bits_per_byte(model, tokenizer, validation[category]), 4)
    averaged = [v for c, v in bits.items() if c != "python"]  # python is not part of the corpus's own measure
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": bits,
        "bits_per_byte_macro": round(sum(averaged) / max(len(averaged), 1), 4),
        "validation_documents": {c: len(texts) for c, texts in sorted(validation.items())},
        **induction_measures(folder),
    }


def write_card(folder: Path, training: dict, validation: dict[str, list[str]]) -> dict:
    card = {**training, **measure(folder, validation)}
    write_json(folder / "card.json", card)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", default="corpus")
    arguments = parser.parse_args()
    file = arguments.folder / "card.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    training = {k: known[k] for k in ("training_tokens", "decay_share", "curve") if k in known}
    card = write_card(arguments.folder, training, corpus.load_documents(arguments.corpus)[1])
    print(json.dumps({k: v for k, v in card.items() if k != "curve"}, indent=1))


if __name__ == "__main__":
    main()
