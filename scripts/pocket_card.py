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

import pocket_corpus as corpus
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenslab.paths import write_json
from lenslab.runtime import derive_generator


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


def repeated_sequences(n: int, length: int, vocabulary: int, bos: int = 0, seed: int = 0) -> torch.Tensor:
    """[n, 1 + 2 * length]: BOS, a random sequence, and the same sequence again."""
    generator = derive_generator(seed, "repeated sequences")
    half = torch.randint(3, vocabulary, (n, length), generator=generator)
    return torch.cat([torch.full((n, 1), bos), half, half], dim=1)


def induction_measures(model, n: int = 32, length: int = 100) -> dict:
    tokens = repeated_sequences(n, length, model.config.vocab_size)
    losses = next_token_losses(model, tokens)
    with torch.inference_mode():
        patterns = model(tokens[:16], output_attentions=True, use_cache=False).attentions  # layer x [text, head, q, k]
    query = torch.arange(1 + length, 2 * length + 1)  # positions of the second copy
    scores = {}
    for name, offset in (("previous_token", 1), ("duplicate_token", length), ("induction", length - 1)):
        rows = [layer[:, :, query, query - offset].mean(dim=(0, 2)) for layer in patterns]
        scores[name] = [[round(v, 3) for v in row.tolist()] for row in rows]
    return {
        # the last token of the first copy predicts the first of the second, which nothing announces
        "repeat_loss_first": round(losses[:, : length - 1].mean().item(), 3),
        "repeat_loss_second": round(losses[:, length + 1 :].mean().item(), 3),
        "head_scores": scores,
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
        **induction_measures(model),
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
