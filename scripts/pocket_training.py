"""The training loop that the pocket models share: what differs between them is a `Recipe`.

1. Read the corpus, train or copy the tokenizer, encode (pocket_corpus.py; cached in --work).
2. Warm-up, then a stable rate; every few minutes a checkpoint, so a killed run resumes exactly.
3. The last part of the budget decays the rate linearly to zero. The state before the decay stays in
   --work, its weights in bf16 beside the model (`NAME-before-decay`): a larger budget goes on from
   there, on this machine with the optimizers' state, on another (`--start FOLDER`) with fresh ones
   and a warm-up.
4. Save a Hugging Face folder with bf16 weights and a card of what was measured (pocket_card.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pocket_corpus as corpus
import torch

from lenslab.files import (
    drop_later_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_json,
)
from lenslab.runtime import compute_dtype, default_device

WARMUP_STEPS = 100
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
Optimizers = list[tuple[torch.optim.Optimizer, float]]  # with the rate of each at the stable part


@dataclass(frozen=True)
class Recipe:
    """What a pocket model adds to the loop."""

    name: str  # of the folders below data/models and runs
    build: Callable[[int, bool], Any]  # (size of the vocabulary, smoke) -> model
    optimizers: Callable[[Any], Optimizers]
    backward: Callable[
        [Any, torch.Tensor], dict[str, float]
    ]  # leaves gradients; "loss" in nats is shown and kept
    tokenizer: Path | None = None  # a folder to take the tokenizer from; None: train one
    adjust: Callable[[Any], None] = lambda config: None  # the config, before it is saved
    # (model, tokenizer, step, tokens, work) -> None, at steps 0, 16, 23, 34, ...; and at the end
    record: Callable[[Any, Any, int, int, Path], None] | None = None
    collect: Callable[[Path, Path, int], None] | None = (
        None  # (work, model folder, step): records up to then, beside
    )
    restore: Callable[[Path, Path], None] | None = (
        None  # (model folder, work): and back, for --start
    )


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options of every training script; None for --out and --work means folders of the recipe's
    name."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--corpus", default="corpus", help="folder CATEGORY/SOURCE.jsonl.gz, or 'hub'"
    )
    options.add_argument("--out", type=Path, help=f"default data/models/{name}")
    options.add_argument(
        "--work", type=Path, help=f"checkpoints and encoded text, default runs/{name}"
    )
    options.add_argument(
        "--start", type=Path, help="a -before-decay folder to go on from, if --work holds nothing"
    )
    options.add_argument("--tokens", type=float, default=60e6, help="total budget, decay included")
    options.add_argument(
        "--decay", type=float, default=0.2, help="share of the budget spent decaying"
    )
    options.add_argument("--batch", type=int, default=24, help="windows of 256 tokens per step")
    options.add_argument("--checkpoint-minutes", type=float, default=5.0)
    options.add_argument(
        "--export",
        action="store_true",
        help="write OUT-before-decay from the newest checkpoint; stop",
    )
    options.add_argument(
        "--smoke",
        action="store_true",
        help="a toy model on 0.4 million tokens, in WORK-smoke/model",
    )
    return options


def rate(step: int, steps: int, decay_steps: int, started: int = 0) -> float:
    """Warm-up from step `started`, stable, linear decay to zero (trapezoid)."""
    return min(1.0, (step - started + 1) / WARMUP_STEPS, (steps - step) / max(decay_steps, 1))


def recorded_steps(steps: int, first: int = 16, ratio: float = 1.45) -> set[int]:
    """Steps at which routing is recorded: geometric, and none depends on the budget, so that a
    larger one goes on."""
    grid = {0, steps}
    step = float(first)
    while step < steps:
        grid.add(round(step))
        step *= ratio
    return grid


def chunked_unembedding(
    model: Any, hidden: torch.Tensor, targets: torch.Tensor, chunk: int = 1024
) -> tuple[float, torch.Tensor]:
    """(mean next-token loss, its gradient by `hidden` `[token, d]`); leaves the gradients of the
    unembedding.

    The full logits of a batch are 200 MB, written and read six times; a chunk's stay in the cache.
    """
    leaf, total = hidden.detach().requires_grad_(), 0.0
    for part, target in zip(leaf.split(chunk), targets.split(chunk), strict=True):
        logits = model.lm_head(part).float()
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum") / len(targets)
        loss.backward()
        total += loss.item()
    return total, leaf.grad.to(hidden.dtype)


def save_folder(
    model: Any, tokenizer_folder: Path, folder: Path, adjust: Callable[[Any], None]
) -> None:
    """A Hugging Face folder, weights in bf16, replaced as a whole."""
    temporary = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(temporary, ignore_errors=True)
    half = copy.deepcopy(model).cpu().to(torch.bfloat16)
    adjust(half.config)
    half.save_pretrained(temporary)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_folder / name, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer of a finished model, unless it is there already. Raises OtherCorpus where
    another one is."""
    if not (target / "tokenizer.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            shutil.copy(source / name, target)
    elif (target / "tokenizer.json").read_bytes() != (source / "tokenizer.json").read_bytes():
        raise corpus.OtherCorpus(
            f"{target} holds another tokenizer than {source}: give --work another folder."
        )


def start_from(folder: Path, model: Any, batch: int) -> dict:
    """Weights, tokens seen and curve of a `-before-decay` folder; the optimizers start fresh."""
    model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())
    training = json.loads((folder / "training.json").read_text())
    step = round(training["training_tokens"] / (batch * corpus.CONTEXT))
    return {
        "step": step,
        "started": step,
        "curve": training["curve"],
        "batch": training.get("batch", batch),
    }


def drop_later_records(work: Path, step: int) -> None:
    """Forget what was recorded after `step`: the run goes on from there, perhaps towards another
    budget."""
    for file in (work / "records").glob("step-*"):
        if int(file.stem.split("-")[1]) > step:
            file.unlink()


def train(recipe: Recipe, arguments: argparse.Namespace) -> dict:
    """Train, save, measure; returns the card."""
    out = arguments.out or Path("data/models") / recipe.name
    work = arguments.work or Path("runs") / recipe.name
    if arguments.smoke:
        arguments.tokens, work = min(arguments.tokens, 4e5), Path(f"{work}-smoke")
        out = work / "model"
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        sys.exit(
            f"{out} holds something else than a model, which would be replaced as a whole: another --out."
        )
    try:
        texts, validation = corpus.load_documents(arguments.corpus)
        if source := arguments.start or recipe.tokenizer:
            copy_tokenizer(source, work / "tokenizer")
        tokenizer = corpus.train_tokenizer(texts, work / "tokenizer")
        streams = corpus.encode_streams(texts, tokenizer, work)
        windows = corpus.Windows(
            streams, seed=0, bos=tokenizer.bos_token_id, vocabulary=len(tokenizer)
        )
    except (corpus.NoCorpus, corpus.OtherCorpus) as error:
        sys.exit(str(error))

    device = default_device()
    model = recipe.build(len(tokenizer), arguments.smoke).to(device).train()
    optimizers = recipe.optimizers(model)
    per_step = arguments.batch * corpus.CONTEXT
    steps = math.ceil(arguments.tokens / per_step)
    decay_steps = int(steps * arguments.decay)
    plan, key = {"steps": steps, "decay_from": steps - decay_steps}, corpus.corpus_key(texts)
    curve: list[dict] = []
    measured: list[dict[str, float]] = []  # since the curve's last point
    step = started_at = 0
    resumed = latest_checkpoint(work)
    state: dict | None = None
    if resumed is not None:
        state = resumed["state"]
        same_plan = {name: state.get(name) for name in plan} == plan
        if state["step"] > state.get("decay_from", steps) and not same_plan:
            # the newest checkpoint lies inside the decay of another plan: go on from before that
            # decay
            state = load_checkpoint(work / "predecay.pt")
            same_plan = False
    elif arguments.start is not None:
        state, same_plan = start_from(arguments.start, model, arguments.batch), False
    if state is not None:
        if (
            state.get("batch", arguments.batch) != arguments.batch
        ):  # the oldest checkpoints do not say it
            sys.exit(
                f"this was trained with --batch {state['batch']}: a step means other windows otherwise"
            )
        if resumed is not None and state.get("corpus", key) != key:
            sys.exit(
                "the checkpoint was trained on other texts (or another Python's): give --work another folder."
            )
        if state["step"] > plan["decay_from"] and not same_plan:
            sys.exit(
                f"{state['step'] * per_step:,} tokens were already seen, and of {steps * per_step:,} the last "
                f"{decay_steps * per_step:,} are for the decay: ask for more with --tokens."
            )
        step, curve, started_at = state["step"], state["curve"], state.get("started", 0)
    if resumed is not None:
        model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        measured = state.get("measured", [])
        print(f"resumed at step {step:,}", flush=True)
    elif state is not None and recipe.restore is not None:
        recipe.restore(arguments.start, work)

    def save_before_decay(state: dict) -> None:
        model.load_state_dict(state["model"])
        beside = out.with_name(f"{out.name}-before-decay")
        save_folder(model, work / "tokenizer", beside, recipe.adjust)
        if recipe.collect is not None:
            recipe.collect(work, beside, state["step"])
        training = {
            "training_tokens": state["step"] * per_step,
            "batch": arguments.batch,
            "curve": state["curve"],
        }
        write_json(beside / "training.json", training)

    if arguments.export:
        if resumed is None or step > plan["decay_from"]:
            sys.exit("--export needs a checkpoint from before the decay; there is none in --work.")
        save_before_decay(state)
        print(f"{step * per_step:,} tokens: weights exported")
        return {}

    # only now: what is refused, and --export, leave everything as it was
    if resumed is not None and not (work / f"step-{step:08d}.pt").exists():
        save_checkpoint(
            work, state, name=f"step-{step:08d}.pt"
        )  # from before the decay: the newest from here on
    drop_later_checkpoints(work, step)
    drop_later_records(work, step)

    def snapshot() -> dict:
        states = [optimizer.state_dict() for optimizer, _ in optimizers]
        held = {"model": model.state_dict(), "optimizers": states, "step": step, "curve": curve}
        held |= {
            "measured": measured,
            "started": started_at,
            "batch": arguments.batch,
            "corpus": key,
        }
        return held | plan

    def record() -> None:
        if recipe.record is not None and step in recorded_steps(steps):
            recipe.record(model, tokenizer, step, step * per_step, work)

    autocast = torch.autocast(
        device, dtype=torch.bfloat16, enabled=compute_dtype() is torch.bfloat16
    )
    started = saved_at = time.monotonic()
    first = step
    while step < steps:
        record()
        if step == plan["decay_from"]:
            save_checkpoint(work, snapshot(), name="predecay.pt")
        for optimizer, base in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = base * rate(step, steps, decay_steps, started_at)
        rows = [
            torch.from_numpy(windows(step * arguments.batch + i)) for i in range(arguments.batch)
        ]
        with autocast:
            values = recipe.backward(model, torch.stack(rows).to(device))
        if not math.isfinite(values["loss"]):
            sys.exit(
                f"loss is {values['loss']} at step {step}: stopped; the last checkpoint is intact"
            )
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        measured.append(values)
        step += 1
        if step % 50 == 0 or step == steps:
            means = {key: round(sum(v[key] for v in measured) / len(measured), 4) for key in values}
            measured.clear()
            curve.append({"tokens": step * per_step, **means})
            speed = (step - first) * per_step / (time.monotonic() - started)
            left = (steps - step) * per_step / speed / 60
            shown = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
            print(
                f"step {step:,}/{steps:,}  {shown}  {speed:,.0f} tokens/s  {left:.0f} min left",
                flush=True,
            )
        if time.monotonic() - saved_at > 60 * arguments.checkpoint_minutes or step == steps:
            saved_at = time.monotonic()
            save_checkpoint(work, snapshot())
    record()

    from pocket_card import write_card

    save_folder(model, work / "tokenizer", out, recipe.adjust)
    if recipe.collect is not None:
        recipe.collect(work, out, steps)
    training = {"training_tokens": steps * per_step, "decay_share": arguments.decay, "curve": curve}
    card = write_card(out, training, validation)
    if decay_steps:  # else the model is what a larger budget goes on from
        save_before_decay(load_checkpoint(work / "predecay.pt"))
    print(json.dumps({k: v for k, v in card.items() if k != "curve"}, indent=1))
    return card
