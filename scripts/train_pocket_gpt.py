"""Train pocket-gpt: a GPT-2 of 6 layers and 6.9 million parameters on a mixed corpus.

1. Read the corpus, train the tokenizer, encode (pocket_corpus.py; cached in --work).
2. Warm-up, then a stable rate; every few minutes a checkpoint, so a killed run resumes exactly.
3. The last part of the budget decays the rate linearly to zero. The state before the decay stays in --work, its
   weights in bf16 beside the model (`NAME-before-decay`): a larger budget goes on from there, on this machine
   with the optimizers' state, on another (`--start FOLDER`) with fresh ones and a warm-up.
4. Save a Hugging Face folder with bf16 weights and a card of what was measured (pocket_card.py).

Matrices inside the blocks are trained with Muon, everything else with AdamW.

    python scripts/train_pocket_gpt.py --corpus FOLDER --tokens 15e6
    python scripts/train_pocket_gpt.py --corpus FOLDER --smoke        # a toy in about two minutes
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import sys
import time
from pathlib import Path

import pocket_corpus as corpus
import torch
from checkpoints import drop_later_checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint
from muon import Muon
from transformers import GPT2Config, GPT2LMHeadModel

from lenslab.paths import write_json
from lenslab.runtime import compute_dtype, default_device

ADAM_LR, MUON_LR, WARMUP_STEPS = 3e-3, 0.02, 100


def build_model(vocabulary: int, smoke: bool) -> GPT2LMHeadModel:
    size = dict(n_layer=2, n_embd=64, n_head=4) if smoke else dict(n_layer=6, n_embd=256, n_head=8)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=corpus.CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel; saved under its usual name
        **size,
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def build_optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    return [
        Muon(matrices, lr=MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def backward(model: GPT2LMHeadModel, batch: torch.Tensor, chunk: int = 1024) -> float:
    """Gradients of the mean next-token loss, the unembedding done in chunks of positions.

    The full logits of a batch are 200 MB, written and read six times; a chunk's stay in the cache.
    """
    hidden = model.transformer(batch[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    targets, leaf, total = batch[:, 1:].flatten(), hidden.detach().requires_grad_(), 0.0
    for part, target in zip(leaf.split(chunk), targets.split(chunk), strict=True):
        logits = model.lm_head(part).float()
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum") / len(targets)
        loss.backward()
        total += loss.item()
    hidden.backward(leaf.grad.to(hidden.dtype))
    return total


def rate(step: int, steps: int, decay_steps: int, started: int = 0) -> float:
    """Warm-up from step `started`, stable, linear decay to zero (trapezoid)."""
    return min(1.0, (step - started + 1) / WARMUP_STEPS, (steps - step) / max(decay_steps, 1))


def save_folder(model: GPT2LMHeadModel, tokenizer_folder: Path, folder: Path) -> None:
    """A Hugging Face folder that any GPT-2 loader opens, weights in bf16, replaced as a whole."""
    temporary = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(temporary, ignore_errors=True)
    half = copy.deepcopy(model).cpu().to(torch.bfloat16)
    half.config.activation_function = "gelu_new"
    half.save_pretrained(temporary)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def start_from(folder: Path, model: GPT2LMHeadModel, per_step: int) -> dict:
    """Weights, tokens seen and curve of a `-before-decay` folder; the optimizers start fresh."""
    model.load_state_dict(GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).state_dict())
    training = json.loads((folder / "training.json").read_text())
    step = round(training["training_tokens"] / per_step)
    return {"step": step, "started": step, "curve": training["curve"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="corpus", help="folder CATEGORY/SOURCE.jsonl.gz, or 'hub'")
    parser.add_argument("--out", type=Path, default=Path("data/models/pocket-gpt"))
    parser.add_argument("--work", type=Path, default=Path("runs/pocket-gpt"), help="checkpoints and encoded text")
    parser.add_argument("--start", type=Path, help="a -before-decay folder to go on from, where --work holds nothing")
    parser.add_argument("--tokens", type=float, default=60e6, help="total budget, decay included")
    parser.add_argument("--decay", type=float, default=0.2, help="share of the budget spent decaying")
    parser.add_argument("--batch", type=int, default=24, help="windows of 256 tokens per step")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--smoke", action="store_true", help="a toy model on 0.4 million tokens")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.tokens, arguments.work = min(arguments.tokens, 4e5), Path(f"{arguments.work}-smoke")

    try:
        train, validation = corpus.load_documents(arguments.corpus)
    except corpus.NoCorpus as error:
        sys.exit(str(error))
    if arguments.start is not None and not (arguments.work / "tokenizer").exists():
        tokenizer_files = shutil.ignore_patterns(
            "*.safetensors", "config.json", "generation_config.json", "training.json"
        )
        shutil.copytree(arguments.start, arguments.work / "tokenizer", ignore=tokenizer_files)
    tokenizer = corpus.train_tokenizer(train, arguments.work / "tokenizer")
    streams = corpus.encode_streams(train, tokenizer, arguments.work)
    windows = corpus.Windows(streams, seed=0, bos=tokenizer.bos_token_id)

    device = default_device()
    model = build_model(len(tokenizer), arguments.smoke).to(device).train()
    optimizers = build_optimizers(model)
    per_step = arguments.batch * corpus.CONTEXT
    steps = math.ceil(arguments.tokens / per_step)
    decay_steps = int(steps * arguments.decay)
    plan = {"steps": steps, "decay_from": steps - decay_steps}
    curve: list[dict] = []
    step = started_at = 0
    if arguments.start is not None:
        known = start_from(arguments.start, model, per_step)
        step, started_at, curve = known["step"], known["started"], known["curve"]
    resumed = latest_checkpoint(arguments.work)
    if resumed is not None:
        state = resumed["state"]
        if state["step"] > state.get("decay_from", steps) and state["steps"] != steps:
            # the newest checkpoint lies inside the decay of another budget: go on from before that decay
            state = load_checkpoint(arguments.work / "predecay.pt")
            drop_later_checkpoints(arguments.work, state["step"])
        if state["step"] > steps:
            sys.exit(f"{state['step'] * per_step:,} tokens were already seen: ask for more with --tokens.")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, curve, started_at = state["step"], state["curve"], state.get("started", 0)
        print(f"resumed at step {step:,}", flush=True)

    def snapshot() -> dict:
        states = [optimizer.state_dict() for optimizer in optimizers]
        return {
            "model": model.state_dict(),
            "optimizers": states,
            "step": step,
            "curve": curve,
            "started": started_at,
        } | plan

    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=compute_dtype() is torch.bfloat16)
    started = saved_at = time.monotonic()
    first, losses = step, []
    while step < steps:
        if step == steps - decay_steps:
            save_checkpoint(arguments.work, snapshot(), name="predecay.pt")
        for optimizer, base in zip(optimizers, (MUON_LR, ADAM_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate(step, steps, decay_steps, started_at)
        rows = [torch.from_numpy(windows(step * arguments.batch + i)) for i in range(arguments.batch)]
        batch = torch.stack(rows).to(device)
        with autocast:
            loss = backward(model, batch)
        if not math.isfinite(loss):
            sys.exit(f"loss is {loss} at step {step}: stopped; the last checkpoint is intact")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        step += 1
        if step % 50 == 0 or step == steps:
            mean = sum(losses) / len(losses)
            losses.clear()
            curve.append({"tokens": step * per_step, "loss": round(mean, 4)})
            speed = (step - first) * per_step / (time.monotonic() - started)
            left = (steps - step) * per_step / speed / 60
            print(f"step {step:,}/{steps:,}  loss {mean:.3f}  {speed:,.0f} tokens/s  {left:.0f} min left", flush=True)
        if time.monotonic() - saved_at > 60 * arguments.checkpoint_minutes or step == steps:
            saved_at = time.monotonic()
            save_checkpoint(arguments.work, snapshot())

    from pocket_card import write_card

    out = arguments.work / "model" if arguments.smoke else arguments.out
    save_folder(model, arguments.work / "tokenizer", out)
    training = {"training_tokens": steps * per_step, "decay_share": arguments.decay, "curve": curve}
    card = write_card(out, training, validation)
    before = load_checkpoint(arguments.work / "predecay.pt")
    model.load_state_dict(before["model"])
    beside = out.with_name(f"{out.name}-before-decay")
    save_folder(model, arguments.work / "tokenizer", beside)
    write_json(beside / "training.json", {"training_tokens": before["step"] * per_step, "curve": before["curve"]})
    print(json.dumps({k: v for k, v in card.items() if k != "curve"}, indent=1))


if __name__ == "__main__":
    main()
