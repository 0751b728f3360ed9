"""The card of a bundled model: what it was trained on and what was measured on the saved weights.

1. Bits per byte by category: the first 255 tokens of each validation document, after BOS.
2. Induction: loss on the first and second half of random sequences repeated once.
3. Head scores on the same sequences: attention to the previous token, to the same token one repeat
   earlier (duplicate), and to the token after that one (induction).
4. What more training would buy: a power law fitted to the learning curve before the decay.
5. Bits per byte on TinyStories beside tinystories-656k, where that model lies beside the checkout.
6. Of a mixture of experts: each expert's load as a multiple of its fair share.

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
from scipy.optimize import curve_fit
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenslab.circuits.streams import head_scores
from lenslab.files import REPOSITORY, sha256_file, write_json
from lenslab.models import load_model

FIXTURES = REPOSITORY.parent / "shared" / "fixtures"
LOAD_DOCUMENTS = 32  # of each category


@torch.inference_mode()
def next_token_losses(model, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each next token: [text, pos] -> [text, pos - 1]."""
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens[:, 1:], reduction="none"
    )


def bits_per_byte(
    model, tokenizer, texts: list[str], context: int = corpus.CONTEXT, batch: int = 16
) -> float:
    """Total bits over total bytes of the first `context - 1` tokens of each text.

    In a byte-level vocabulary each character of a token's own string is one byte, so bytes are
    exact even where a token ends inside a character.
    """
    rows = [tokenizer(text, add_special_tokens=False).input_ids[: context - 1] for text in texts]
    rows = sorted((row for row in rows if row), key=len)
    size = [len(s) for s in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    nats = n_bytes = 0.0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(map(len, part))
        tokens = torch.tensor(
            [
                [tokenizer.bos_token_id, *row] + [tokenizer.pad_token_id] * (width - len(row))
                for row in part
            ]
        )
        losses = next_token_losses(
            model, tokens
        )  # causal: padding on the right changes nothing before it
        for row, loss in zip(part, losses, strict=True):
            nats += loss[: len(row)].double().sum().item()
            n_bytes += sum(size[i] for i in row)
    return nats / math.log(2) / n_bytes


def induction_measures(folder: Path) -> dict:
    """Loss on the two copies of repeated random sequences, and each head's scores there,
    `[layer][head]`."""
    scores = head_scores(load_model(folder), n=32, length=100)
    kinds = ("previous_token", "duplicate_token", "induction")
    return {
        "repeat_loss_first": round(scores.loss_first, 3),
        "repeat_loss_second": round(scores.loss_second, 3),
        "head_scores": {
            kind: np.round(getattr(scores, kind).astype(float), 3).tolist() for kind in kinds
        },
    }


def power_law(curve: list[dict], stable_tokens: float, samples: int = 200) -> dict | None:
    """loss = floor + scale * (tokens / 10^6)^-exponent, fitted to the stable part of a learning
    curve.

    Left out: the first three tenths, where the loss falls from that of a guess and in a step when
    induction forms, and the decay, which lowers it at once. Neighbouring points err alike:
    intervals are the middle 95 % over resampled runs of a tenth of the points. `gain_2x` and
    `gain_4x` are nats per token that twice and four times `stable_tokens` at the same rate would
    save, if the law held beyond what was seen. Whether it does is tried on the past: `back_test` is
    the fall over the second half as a fit to the first half foretold it, and as it came. None where
    fewer than 20 points remain or too few of the fits converged.
    """
    last = stable_tokens / 1e6
    best, intervals = _fitted(curve, 0.3 * last, last, samples)
    if best is None or not intervals:
        return None
    gains = {f"gain_{k}x": (last, k * last) for k in (2, 4)}
    rounded = {key: round(float(value), 3) for key, value in zip(PARAMETERS, best, strict=True)}
    rounded |= {key: _fall(best, *ends) for key, ends in gains.items()}
    for i, key in enumerate(PARAMETERS):
        rounded[f"{key}_95"] = _middle([found[i] for found in intervals])
    for key, ends in gains.items():
        rounded[f"{key}_95"] = _middle([_fall(found, *ends) for found in intervals])
    earlier, resampled = _fitted(curve, 0.15 * last, last / 2, samples)
    seen = [
        np.mean([p["loss"] for p in curve if 0.95 * end <= p["tokens"] / 1e6 <= end])
        for end in (last / 2, last)
    ]
    back_test = {
        "foretold": None if earlier is None else _fall(earlier, last / 2, last),
        "foretold_95": _middle([_fall(found, last / 2, last) for found in resampled])
        if resampled
        else None,
        "seen": round(float(seen[0] - seen[1]), 3),
    }
    points = sum(0.3 * last <= p["tokens"] / 1e6 <= last for p in curve)
    return {"points": points, "up_to_tokens": int(stable_tokens), **rounded, "back_test": back_test}


PARAMETERS = ("floor", "scale", "exponent")


def _law(x, floor, scale, exponent):
    return floor + scale * x**-exponent


def _fall(found, begin: float, end: float) -> float:
    return round(float(_law(begin, *found) - _law(end, *found)), 3)


def _middle(values: list[float]) -> list[float]:
    return np.percentile(values, (2.5, 97.5)).round(3).tolist()


def _fitted(
    curve: list[dict], begin: float, end: float, samples: int
) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """(parameters, those of resampled runs of points) between two numbers of million tokens; None,
    [] for too few."""
    points = [(p["tokens"] / 1e6, p["loss"]) for p in curve if begin <= p["tokens"] / 1e6 <= end]
    if len(points) < 20:
        return None, []
    tokens, losses = np.array(points).T

    def fit(rows) -> np.ndarray | None:
        start = (0.7 * losses[rows].min(), np.ptp(losses[rows]) + 0.1, 0.3)
        try:
            return curve_fit(
                _law, tokens[rows], losses[rows], start, bounds=((0, 0, 0.01), (10, 50, 3))
            )[0]
        except RuntimeError:  # did not converge
            return None

    n, block, draws = len(losses), max(2, len(losses) // 10), np.random.default_rng(0)
    begins = draws.integers(0, n - block + 1, (samples, -(-n // block)))
    refits = [fit(np.sort((row[:, None] + np.arange(block)).ravel()[:n])) for row in begins]
    found = [refit for refit in refits if refit is not None]
    return fit(np.arange(n)), found if len(found) >= samples / 2 else []


def same_again(tokenizer, text: str) -> bool:
    return (
        tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).strip()
        == text.strip()
    )


def beside_tinystories(model, tokenizer, fixtures: Path = FIXTURES, characters: int = 600) -> dict:
    """Bits per byte on the beginnings of TinyStories stories that the hold-out rule keeps from
    training.

    Both models read the same whole text after BOS; stories with a character that either vocabulary
    lacks, and would leave out, are left out whole. How much of it tinystories-656k was trained on
    is not known; it reads nothing else.
    """
    folder, stories = (
        fixtures / "tinystories-656k",
        fixtures / "tinystories" / "tinystories_1000.json",
    )
    if not folder.is_dir() or not stories.is_file():
        return {
            "reason": "tinystories-656k is not beside this checkout",
            "documents": 0,
            "ours": None,
            "theirs": None,
        }
    texts = [
        text for text in json.loads(stories.read_text(encoding="utf-8")) if corpus.is_held_out(text)
    ]
    texts = [text[:characters].rsplit(" ", 1)[0] for text in texts]
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    pairs = (
        ("ours", model, tokenizer),
        ("theirs", theirs, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)),
    )
    texts = [text for text in texts if all(same_again(its, text) for _, _, its in pairs)]
    result = {"documents": len(texts)}
    for name, scored, its in pairs:
        nats = 0.0
        for text in texts:
            ids = its(text, add_special_tokens=False).input_ids
            nats += (
                next_token_losses(scored, torch.tensor([[its.bos_token_id, *ids]]))
                .double()
                .sum()
                .item()
            )
        result[name] = round(nats / math.log(2) / sum(len(text.encode()) for text in texts), 4)
    return result


def routers(model) -> list:
    """The routers of a mixture of experts, by layer; none in other models."""
    return [module for module in model.modules() if type(module).__name__.endswith("Router")]


@torch.inference_mode()
def expert_choices(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts, weights), each `[layer, text, pos, slot]`, as the routers give them for `[text,
    pos]` tokens."""
    caught: list[tuple] = []
    handles = [
        r.register_forward_hook(lambda _, inputs, output: caught.append(output))
        for r in routers(model)
    ]
    try:
        model.model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    experts, weights = (torch.stack([output[i] for output in caught]) for i in (2, 1))
    return experts.unflatten(1, tokens.shape), weights.unflatten(1, tokens.shape)


def expert_load(model, tokenizer, validation: dict[str, list[str]]) -> dict:
    """`[layer][expert]`: slots given to each expert over its fair share (1 is fair), BOS left
    out."""
    counts = torch.zeros(len(routers(model)), model.config.num_experts)
    for texts in validation.values():
        for text in texts[:LOAD_DOCUMENTS]:
            ids = tokenizer(text, add_special_tokens=False).input_ids[: corpus.CONTEXT - 1]
            if ids:
                experts, _ = expert_choices(model, torch.tensor([[tokenizer.bos_token_id, *ids]]))
                for layer, chosen in enumerate(experts[:, 0, 1:]):
                    counts[layer] += torch.bincount(chosen.flatten(), minlength=counts.shape[1])
    load = counts / counts.mean(1, keepdim=True)
    return {
        "expert_load": np.round(load.tolist(), 3).tolist(),
        "expert_load_min": round(float(load.min()), 3),
    }


def measure(folder: Path, validation: dict[str, list[str]]) -> dict:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    bits = {}
    for category in tqdm(sorted(validation), desc="bits per byte", delay=2):
        if validation[category]:
            bits[category] = round(bits_per_byte(model, tokenizer, validation[category]), 4)
    averaged = [
        v for c, v in bits.items() if c != "python"
    ]  # python is not part of the corpus's own measure
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": bits,
        "bits_per_byte_macro": round(sum(averaged) / max(len(averaged), 1), 4),
        "validation_documents": {c: len(texts) for c, texts in sorted(validation.items())},
        "tinystories_bits_per_byte": beside_tinystories(model, tokenizer),
        **(expert_load(model, tokenizer, validation) if routers(model) else {}),
        **induction_measures(folder),
    }


def write_card(folder: Path, training: dict, validation: dict[str, list[str]]) -> dict:
    stable = training.get("training_tokens", 0) * (1 - training.get("decay_share", 0))
    law = power_law(training.get("curve", []), stable)
    files = {"weights_sha256": "model.safetensors", "config_sha256": "config.json"}
    digest = {key: sha256_file(folder / file) for key, file in files.items()}  # others are refused
    write_json(
        folder / "card.json", {**training, **digest}
    )  # and a bundled folder without a card: `measure` loads it
    card = {**training, "power_law": law, **measure(folder, validation), **digest}
    write_json(folder / "card.json", card)
    return card


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
