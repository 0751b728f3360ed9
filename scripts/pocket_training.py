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
    only_writer,
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
    # leaves gradients; "loss" in nats is shown and kept
    backward: Callable[[Any, torch.Tensor], dict[str, float]]
    tokenizer: Path | None = None  # a folder to take the tokenizer from; None: train one
    adjust: Callable[[Any], None] = lambda config: None  # the config, before it is saved
    # (model, tokenizer, step, tokens, work) -> None, at steps 0, 16, 23, 34, ...; and at the end
    record: Callable[[Any, Any, int, int, Path], None] | None = None
    # (work, model folder, step): records up to then, beside
    collect: Callable[[Path, Path, int], None] | None = None
    # (model folder, work): and back, for --start
    restore: Callable[[Path, Path], None] | None = None


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


class Run:
    """One training: folders and plan, the model with its optimizers, and how far it has come."""

    def __init__(self, recipe: Recipe, arguments: argparse.Namespace):
        self.recipe, self.arguments = recipe, arguments
        self.out, self.work = folders(recipe, arguments)
        self.device = default_device()
        self.read_corpus()
        self.model = recipe.build(len(self.tokenizer), arguments.smoke).to(self.device).train()
        self.optimizers = recipe.optimizers(self.model)
        self.per_step = arguments.batch * corpus.CONTEXT
        self.steps = math.ceil(arguments.tokens / self.per_step)
        self.decay_steps = int(self.steps * arguments.decay)
        self.plan = {"steps": self.steps, "decay_from": self.steps - self.decay_steps}
        self.step = self.started_at = 0
        self.curve: list[dict] = []
        self.measured: list[dict[str, float]] = []  # since the curve's last point

    def read_corpus(self) -> None:
        """Texts, tokenizer and windows; where there are none, the script ends in a sentence."""
        tokenizer_folder = self.work / "tokenizer"
        try:
            texts, self.validation = corpus.load_documents(self.arguments.corpus)
            if source := self.arguments.start or self.recipe.tokenizer:
                copy_tokenizer(source, tokenizer_folder)
            self.tokenizer = corpus.train_tokenizer(texts, tokenizer_folder)
            streams = corpus.encode_streams(texts, self.tokenizer, self.work)
        except (corpus.NoCorpus, corpus.OtherCorpus) as error:
            sys.exit(str(error))
        self.key = corpus.corpus_key(texts)
        bos, vocabulary = self.tokenizer.bos_token_id, len(self.tokenizer)
        self.windows = corpus.Windows(streams, seed=0, bos=bos, vocabulary=vocabulary)

    def starting_state(self) -> tuple[dict | None, bool]:
        """(what to go on from, whether it is a checkpoint of --work)."""
        resumed = latest_checkpoint(self.work)
        if resumed is None and self.arguments.start is None:
            return None, False
        if resumed is None:
            state, same_plan = (
                start_from(self.arguments.start, self.model, self.arguments.batch),
                False,
            )
        else:
            state = resumed["state"]
            same_plan = {name: state.get(name) for name in self.plan} == self.plan
            if state["step"] > state.get("decay_from", self.steps) and not same_plan:
                # inside the decay of another plan: go on from before that decay
                state = load_checkpoint(self.work / "predecay.pt")
        self.refuse_other_runs(state, resumed is not None, same_plan)
        return state, resumed is not None

    def refuse_other_runs(self, state: dict, resumed: bool, same_plan: bool) -> None:
        # the oldest checkpoints do not say their batch
        if state.get("batch", self.arguments.batch) != self.arguments.batch:
            sys.exit(
                f"this was trained with --batch {state['batch']}: a step means other windows "
                "otherwise"
            )
        if resumed and state.get("corpus", self.key) != self.key:
            sys.exit(
                "the checkpoint was trained on other texts (or another Python's): give --work "
                "another folder."
            )
        if state["step"] > self.plan["decay_from"] and not same_plan:
            sys.exit(
                f"{state['step'] * self.per_step:,} tokens were already seen, and of "
                f"{self.steps * self.per_step:,} the last {self.decay_steps * self.per_step:,} "
                "are for the decay: ask for more with --tokens."
            )

    def take_up(self, state: dict | None, resumed: bool) -> None:
        """Go on from `state`; a checkpoint also holds weights and optimizers."""
        if state is None:
            return
        self.step, self.curve = state["step"], state["curve"]
        self.started_at = state.get("started", 0)
        if resumed:
            self.model.load_state_dict(state["model"])
            for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.measured = state.get("measured", [])
            print(f"resumed at step {self.step:,}", flush=True)
        elif self.recipe.restore is not None:
            self.recipe.restore(self.arguments.start, self.work)

    def snapshot(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "step": self.step,
            "curve": self.curve,
            "measured": self.measured,
            "started": self.started_at,
            "batch": self.arguments.batch,
            "corpus": self.key,
        } | self.plan

    def save_before_decay(self, state: dict) -> None:
        """The weights that a larger budget goes on from, beside the model's folder."""
        self.model.load_state_dict(state["model"])
        beside = self.out.with_name(f"{self.out.name}-before-decay")
        save_folder(self.model, self.work / "tokenizer", beside, self.recipe.adjust)
        if self.recipe.collect is not None:
            self.recipe.collect(self.work, beside, state["step"])
        training = {
            "training_tokens": state["step"] * self.per_step,
            "batch": self.arguments.batch,
            "curve": state["curve"],
        }
        write_json(beside / "training.json", training)

    def record(self) -> None:
        if self.recipe.record is not None and self.step in recorded_steps(self.steps):
            tokens = self.step * self.per_step
            self.recipe.record(self.model, self.tokenizer, self.step, tokens, self.work)

    def one_step(self) -> None:
        for optimizer, base in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = base * rate(self.step, self.steps, self.decay_steps, self.started_at)
        batch = self.arguments.batch
        rows = [torch.from_numpy(self.windows(self.step * batch + i)) for i in range(batch)]
        bf16 = compute_dtype() is torch.bfloat16
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=bf16):
            values = self.recipe.backward(self.model, torch.stack(rows).to(self.device))
        if not math.isfinite(values["loss"]):
            sys.exit(
                f"loss is {values['loss']} at step {self.step}: stopped; the last checkpoint is "
                "intact"
            )
        for optimizer, _ in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.measured.append(values)
        self.step += 1

    def log(self, first: int, started: float) -> None:
        """A point of the curve, and a line: means since the last one, speed, time left."""
        names, n = self.measured[-1], len(self.measured)
        means = {name: round(sum(v[name] for v in self.measured) / n, 4) for name in names}
        self.measured.clear()
        self.curve.append({"tokens": self.step * self.per_step, **means})
        speed = (self.step - first) * self.per_step / (time.monotonic() - started)
        left = (self.steps - self.step) * self.per_step / speed / 60
        shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(
            f"step {self.step:,}/{self.steps:,}  {shown}  {speed:,.0f} tokens/s  "
            f"{left:.0f} min left",
            flush=True,
        )

    def go(self) -> None:
        """The steps that are left, with checkpoints and records."""
        started = saved_at = time.monotonic()
        first = self.step
        while self.step < self.steps:
            self.record()
            if self.step == self.plan["decay_from"]:
                save_checkpoint(self.work, self.snapshot(), name="predecay.pt")
            self.one_step()
            last = self.step == self.steps
            if self.step % 50 == 0 or last:
                self.log(first, started)
            if time.monotonic() - saved_at > 60 * self.arguments.checkpoint_minutes or last:
                saved_at = time.monotonic()
                save_checkpoint(self.work, self.snapshot())
        self.record()

    def finish(self) -> dict:
        """Save the model and what was measured of it; returns the card."""
        from pocket_card import write_card

        save_folder(self.model, self.work / "tokenizer", self.out, self.recipe.adjust)
        if self.recipe.collect is not None:
            self.recipe.collect(self.work, self.out, self.steps)
        training = {
            "training_tokens": self.steps * self.per_step,
            "decay_share": self.arguments.decay,
            "curve": self.curve,
        }
        card = write_card(self.out, training, self.validation)
        if self.decay_steps:  # else the model is what a larger budget goes on from
            self.save_before_decay(load_checkpoint(self.work / "predecay.pt"))
        print(json.dumps({k: v for k, v in card.items() if k != "curve"}, indent=1))
        return card


def folders(recipe: Recipe, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """(where the model goes, where the work is kept); a smoke run has its own, and few tokens."""
    out = arguments.out or Path("data/models") / recipe.name
    work = arguments.work or Path("runs") / recipe.name
    if arguments.smoke:
        arguments.tokens, work = min(arguments.tokens, 4e5), Path(f"{work}-smoke")
        out = work / "model"
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        sys.exit(
            f"{out} holds something else than a model, which would be replaced as a whole: "
            "another --out."
        )
    return out, work


def train(recipe: Recipe, arguments: argparse.Namespace) -> dict:
    """Train, save, measure; returns the card. Raises NotWritten."""
    run = Run(recipe, arguments)
    with only_writer(run.work):
        return _train(run, arguments)


def _train(run: Run, arguments: argparse.Namespace) -> dict:
    state, resumed = run.starting_state()
    run.take_up(state, resumed)
    if arguments.export:
        if not resumed or run.step > run.plan["decay_from"]:
            sys.exit("--export needs a checkpoint from before the decay; there is none in --work.")
        run.save_before_decay(state)
        print(f"{run.step * run.per_step:,} tokens: weights exported")
        return {}
    # only now: what is refused, and --export, leave everything as it was
    checkpoint = f"step-{run.step:08d}.pt"
    if resumed and not (run.work / checkpoint).exists():
        # from before the decay: the newest from here on
        save_checkpoint(run.work, state, name=checkpoint)
    drop_later_checkpoints(run.work, run.step)
    drop_later_records(run.work, run.step)
    run.go()
    return run.finish()
