"""Harvesting activations: ours against SAELens's ActivationsStore and a bare Hugging Face forward.

The same job for all: the residual stream after block 3 of pocket-gpt for the same 256 windows of
256 tokens, 16 windows a pass, no gradients. Once with every contestant in float32, what `harvest`
computes in by default when it returns activations; once, where the machine computes bf16 fast, with
every contestant under bf16 autocast, what it computes in for a store. What comes out is float32
each time.

    python benchmarks/harvest.py            # writes results/harvest_float32.json and
    harvest_bfloat16.json
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from compare import Contestant, compare, timed

HOOK, LAYER, WINDOWS, BATCH = "blocks.3.hook_resid_post", 3, 256, 16
PRECISION = "LENSLAB_COMPUTE"  # the parent sets it for all; lenslab itself obeys it too
MODEL = Path(__file__).parents[1] / "data" / "models" / "pocket-gpt"


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 8192, (WINDOWS, 256), generator=generator)
    ids[:, 0] = 0  # BOS
    return ids


def in_bf16() -> bool:
    """Read here and not from lenslab: importing that would tune the allocator of "as shipped"
    contestants."""
    return os.environ[PRECISION] == "bfloat16"


def ours():
    """lenslab.capture.harvest, results in memory."""
    from lenslab.capture import harvest
    from lenslab.models import load_model
    from lenslab.tokens import TokenBatch

    model, ids = load_model("pocket-gpt"), tokens()
    real = torch.ones_like(ids, dtype=torch.bool)
    real[:, 0] = False
    batch = TokenBatch(ids, real, torch.ones_like(real), ("",) * len(ids))

    def run() -> int:
        harvest(model, batch, HOOK, batch_size=BATCH, compute=os.environ[PRECISION], progress=False)
        return ids.numel()

    return run


def _saelens_store():
    from datasets import Dataset
    from sae_lens import ActivationsStore
    from transformer_lens.model_bridge import TransformerBridge

    return ActivationsStore(
        model=TransformerBridge.boot_transformers(str(MODEL), device="cpu").eval(),
        dataset=Dataset.from_dict({"tokens": tokens().repeat(4, 1).tolist()}),
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=256,
        d_in=256,
        n_batches_in_buffer=64,
        total_training_tokens=10**9,
        store_batch_size_prompts=BATCH,
        train_batch_size_tokens=4096,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        autocast_lm=in_bf16(),
    )


def saelens():
    """SAELens's store, its pass of the model alone: no mixing buffer, which ours has not either."""
    store = _saelens_store()

    @torch.no_grad()
    def run() -> int:
        return sum(len(store.get_raw_llm_batch()[0]) for _ in range(WINDOWS // BATCH))

    return run


def saelens_as_shipped():
    """SAELens's store as its trainer reads it: through the mixing buffer, with the system's
    allocator."""
    store = _saelens_store()

    @torch.no_grad()
    def run() -> int:
        return sum(len(store.next_batch()) for _ in range(WINDOWS * 256 // 4096))

    return run


def hugging_face():
    """A forward hook and an exception that stops the run: the least that any library can do."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, trust_remote_code=False
    ).eval()  # with its own default attention
    ids, autocast, kept = tokens(), in_bf16(), []

    class Stop(Exception):
        pass

    def hook(module, inputs, output):
        kept.append((output[0] if isinstance(output, tuple) else output).float())
        raise Stop

    model.transformer.h[LAYER].register_forward_hook(hook)

    @torch.inference_mode()
    def run() -> int:
        kept.clear()
        for start in range(0, WINDOWS, BATCH):
            try:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    model(ids[start : start + BATCH], use_cache=False)
            except Stop:
                pass
        return torch.cat(kept).shape[:2].numel()

    return run


CONTESTANTS = {
    "lenslab": Contestant(ours),
    "saelens": Contestant(saelens),
    "saelens-as-shipped": Contestant(saelens_as_shipped, tuned=False),
    "hugging-face": Contestant(hugging_face),
}


def main() -> None:
    global WINDOWS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help="fewer for a trial; a claim needs them all"
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), action="append", help="default both"
    )
    parser.add_argument("--contestant", choices=sorted(CONTESTANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    WINDOWS = arguments.windows
    if arguments.contestant:
        timed(CONTESTANTS[arguments.contestant].prepare)
        return
    from lenslab.runtime import has_fast_bf16

    for precision in arguments.precision or ("float32", *(["bfloat16"] if has_fast_bf16() else [])):
        os.environ[PRECISION] = precision
        compare(
            __file__,
            claim="harvest is faster than SAELens's ActivationsStore (goal 1.5x) and within 0.9x "
            "of a bare forward "
            f"pass, all in {precision}",
            unit="tokens/s",
            ours="lenslab",
            contestants=CONTESTANTS,
            stem=f"harvest_{precision}",
            rounds=arguments.rounds,
            extra=("--windows", str(WINDOWS)),
        )


if __name__ == "__main__":
    main()
