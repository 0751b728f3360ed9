"""Train pocket-gpt: a GPT-2 of 6 layers and 6.9 million parameters on a mixed corpus.

1. The loop, its checkpoints and its decay are those of pocket_training.py.
2. Matrices inside the blocks are trained with Muon, everything else with AdamW.

    python scripts/train_pocket_gpt.py --corpus FOLDER --tokens 15e6
    python scripts/train_pocket_gpt.py --corpus FOLDER --smoke        # a toy in about two minutes
"""

from __future__ import annotations

from typing import Any

import pocket_corpus as corpus
import torch
from muon import Muon
from pocket_training import Optimizers, Recipe, chunked_unembedding, parser, train
from transformers import GPT2Config, GPT2LMHeadModel

NAME, ADAM_LR, MUON_LR = "pocket-gpt", 3e-3, 0.02


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
        # gelu_new in one kernel; saved under its usual name
        activation_function="gelu_pytorch_tanh",
        **size,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    model.set_attn_implementation(
        "eager"
    )  # at 256 positions a tenth faster on a CPU than the fused kernel
    return model


def usual_activation(config: Any) -> None:
    config.activation_function = "gelu_new"


def build_optimizers(model: GPT2LMHeadModel) -> Optimizers:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    return [
        (Muon(matrices, lr=MUON_LR, weight_decay=0.01), MUON_LR),
        (
            torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
            ADAM_LR,
        ),
    ]


def backward(model: GPT2LMHeadModel, batch: torch.Tensor) -> dict[str, float]:
    """Gradients of the mean next-token loss of `batch` `[window, position + 1]`; returns the
    loss."""
    hidden = model.transformer(batch[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    loss, gradient = chunked_unembedding(model, hidden, batch[:, 1:].flatten())
    hidden.backward(gradient)
    return {"loss": loss}


def main() -> None:
    train(
        Recipe(NAME, build_model, build_optimizers, backward, adjust=usual_activation),
        parser(__doc__, NAME).parse_args(),
    )


if __name__ == "__main__":
    main()
