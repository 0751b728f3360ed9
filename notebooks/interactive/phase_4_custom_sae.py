# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Phase 4: train an SAE of one's own
#
# **What you will learn**: how a sparse autoencoder (SAE) is built and trained, in code that fits on
# a screen; how to tell whether it worked, beside floors that learn less and beside the SAE that
# ships; what each decision costs (architecture, sparsity, rate, width, penalty); whether SAEs find
# what is really there, where that is known; and what the new features fire on.
#
# **Runs on** the bundled `pocket-gpt` and text that ships with the project, offline; the README
# says how long it takes and how much memory. For another model set `LENSLAB_MODEL` before you start
# Jupyter: to `smollm2`, a name on the hub (`gpt2`, `google/gemma-3-1b-it`) or a local folder.
#
# **How to read it**: one question per section, then code, a printed check, the control, a picture.
# Lines that begin with *So:* say what was found, computed from the numbers above them on whatever
# model you run; read alone, they are a summary. A training ends a little differently on every
# machine: its exact numbers stand in tables and pictures, the lines give bounds.

# %% [markdown]
# ## 1. What it learns from
# Vectors at one hook, one for each token of running text.

# %%
import math

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML

from lenslab.hooks import stream_hook
from lenslab.models import load_model, model_key, model_name
from lenslab.show.images import set_up_figures
from lenslab.show.words import so

set_up_figures()
model = load_model()
HOOK = stream_hook(model, model.cfg.n_layers // 2)  # or another, such as an MLP's output
print(f"{model_name(model)}, {HOOK}")

# %% [markdown]
# The text ships with the project: sampled from the model itself where that was done, else from
# `pocket-gpt`. Your own comes from files by `load_texts`, from the hub by `hub_texts`. The first
# documents are held out: nothing is trained or chosen on them. Positions without a token of text
# (BOS, padding, separators) take no part.

# %%
from lenslab.sae.train import ModelSource
from lenslab.texts import sampled_text
from lenslab.tokens import pack

documents = sampled_text(640, model_name(model))
held_out, text = pack(model, documents[:40]), pack(model, documents[40:])
source, unseen = (ModelSource(model, part, HOOK) for part in (text, held_out))
shared = len(source.documents() & unseen.documents())
print(f"{text.n_real:,} tokens to train on, {held_out.n_real:,} held out; shared: {shared}")

# %% [markdown]
# ## 2. Build it
# A TopK SAE in full. The encoder gives a number for each latent, the *k* largest stay, the decoder
# adds up their directions. Encoder and decoder start as each other's transpose, from random
# directions of length 1; what is learned makes the squared distance of the two ends small.


# %%
class TopK(torch.nn.Module):
    def __init__(self, decoder, k):  # decoder [latent, d_in], rows of length 1
        super().__init__()
        self.k = k
        self.W_dec = torch.nn.Parameter(decoder.clone())
        self.W_enc = torch.nn.Parameter(decoder.T.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(len(decoder)))
        self.b_dec = torch.nn.Parameter(torch.zeros(decoder.shape[1]))

    def encode(self, x):  # [token, d_in] -> [token, latent]
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, torch.relu(top.values))

    def decode(self, latents):  # and back
        return latents @ self.W_dec + self.b_dec


# %% [markdown]
# **Control**: the package's `topk` is the same thing, computed with sparse products. Vectors are
# centred, and scaled to a mean length of the square root of their dimensions, so that one rate fits
# every hook. From the same first weights, do both give the same latents?

# %%
from lenslab.sae.train import build_sae

D_SAE, K = 8 * source.widths[HOOK], 16
theirs = build_sae("topk", source.widths[HOOK], D_SAE, k=K)
vectors = source.pool(0, 0)[HOOK]
theirs.fit(vectors)
scaled = theirs.scaled(vectors)
mine = TopK(theirs.W_dec.detach(), K)
mine.load_state_dict({name: getattr(theirs, name) for name, _ in mine.named_parameters()})
with torch.inference_mode():
    gap = (mine.encode(scaled[:1024]) - theirs.activate(theirs.pre(scaled[:1024]))).abs().max()
print(f"{len(vectors):,} vectors; {D_SAE:,} latents, {K} active; the same: {bool(gap < 1e-4)}")

# %% [markdown]
# ## 3. Train it
# The loop, written out: Adam on random batches, decoder rows kept at length 1. *FVU* is the share
# of the vectors' variance that is left unexplained; 1 is what the mean vector gives.

# %%
optimizer = torch.optim.Adam(mine.parameters(), lr=4e-3)
variance = (scaled - scaled.mean(0)).square().sum(-1).mean()
generator = torch.Generator().manual_seed(0)
fvu = []
for _ in range(40):
    x = scaled[torch.randint(len(scaled), (1024,), generator=generator)]
    loss = (x - mine.decode(mine.encode(x))).square().sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    mine.W_dec.data /= mine.W_dec.data.norm(dim=1, keepdim=True)
    fvu.append(float(loss / variance))
so(f"forty steps take the FVU from {fvu[0]:.1f} to less than {math.ceil(10 * fvu[-1]) / 10:.1f}.")

# %% [markdown]
# `train` does the same with what a real training needs: a rate that warms up and falls, latents
# that died revived, checkpoints, held-out scores, several SAEs on the same batches. **Control**: a
# *floor*, the same SAE with its random decoder frozen; only the encoder learns. The curves draw
# themselves while it runs.

# %%
from lenslab.sae.train import TrainingConfig, train
from lenslab.show.report import live_curves

new = {
    "my SAE": build_sae("topk", source.widths[HOOK], D_SAE, k=K),
    "frozen decoder": build_sae("topk", source.widths[HOOK], D_SAE, k=K, frozen="decoder"),
}
config = TrainingConfig(vectors=600_000, batch=2048, dead_after=100_000)
trained = train(new, source, config, held_out=unseen, watch=live_curves(config), progress=False)
least = {name: math.ceil(20 * each.held_out["fvu"]) / 20 for name, each in trained.items()}
so(
    f"on held-out text my SAE leaves less than {least['my SAE']:.2f} of the variance, the one "
    f"whose decoder learned nothing less than {least['frozen decoder']:.2f}."
)

# %% [markdown]
# ## 4. Did it work?
# The same held-out text for everybody. Beside my SAE stand the one that ships for this hook (where
# there is one, else a small one), the frozen decoder, and floors that learned nothing at all:
# random directions, principal axes, the hook's own coordinates, each with as many active.

# %%
from lenslab.sae.controls import untrained_sae
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.find import find_sae

sae = trained["my SAE"].sae
everybody = {name: each.sae for name, each in trained.items()}
other, other_name, origin = find_sae(model)
everybody[f"{other_name} ({origin})"] = other
kinds = {"random directions": "random", "PCA axes": "PCA", "raw coordinates": "neurons"}
everybody |= {name: untrained_sae(sae, vectors, K, kind=kind) for name, kind in kinds.items()}
scores = {name: evaluate_sae(model, each, held_out, name) for name, each in everybody.items()}
columns = ["l0", "fvu", "ce_difference", "kl", "l2_ratio", "dead", "dense"]
table = pd.concat([each.to_frame() for each in scores.values()]).set_index("sae")[columns]
HTML(table.to_html(float_format="{:.3f}".format))
