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
# Lines that begin with *So:* say what was found, computed from the numbers above them. What took
# hours is saved results of `pocket-gpt` (section 5, most of 6, the end of 7): with another model
# those cells say that it was not measured. A training ends a little differently on every machine:
# its exact numbers stand in tables and pictures, the lines give bounds.

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
from lenslab.models import load_model, model_name
from lenslab.show.images import set_up_figures
from lenslab.show.words import so

# %% [markdown]
# A model, and a hook of it: another one will do, such as an MLP's output.

# %%
set_up_figures()
model = load_model()
HOOK = stream_hook(model, model.cfg.n_layers // 2)
print(f"{model_name(model)}, {HOOK}")

# %% [markdown]
# The text ships with the project: sampled from the model itself where that was done, else from
# `pocket-gpt`. Your own comes from files by `load_texts`, from the hub by `hub_texts`. Some
# documents are held out: nothing is trained or chosen on them. Positions without a token of text
# (BOS, padding, separators) take no part.

# %%
from lenslab.sae.train import ModelSource
from lenslab.texts import sampled_text
from lenslab.tokens import pack

written = sampled_text(736, model_name(model))
share = len(written) // 46  # between both parts lies a gap: neighbours are of one document
texts = list(dict.fromkeys(written[: 40 * share]))
text, held_out = pack(model, texts), pack(model, written[-share:])
source, unseen = (ModelSource(model, part, HOOK) for part in (text, held_out))
there, shared = unseen.documents(), len(unseen.documents() & source.documents())
print(f"{text.n_real:,} tokens to train on, {held_out.n_real:,} held out")
print(f"of {len(there)} held-out pieces of documents {shared} also stand in the training text")

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
# **Control**: the package's `topk` is the same thing, computed with sparse products. Before it
# starts it takes from a sample what makes one rate fit every hook (`fit`): vectors are centred and
# scaled to a mean length of the square root of their dimensions, and the encoder is shortened so
# that the first reconstruction has the right length. From the same weights, do both give the same
# latents? (`pool` is the part of the vectors that is in memory at a time, shuffled.)

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

# %% [markdown]
# How large is the largest difference of an activation?

# %%
so(
    f"of {D_SAE:,} latents {K} are active, for the first 1,024 of {len(vectors):,} vectors "
    f"{'the same up to .0001' if gap < 1e-4 else 'not the same'} in both."
)

# %% [markdown]
# ## 3. Train it
# The loop, written out: Adam on random batches, decoder rows kept at length 1. *FVU* is the share
# of the vectors' variance that is left unexplained; 1 is what the mean vector gives.

# %%
optimizer = torch.optim.Adam(mine.parameters(), lr=4e-3)
variance = (scaled - scaled.mean(0)).square().sum(-1).mean()
generator = torch.Generator().manual_seed(0)
fvu = []

# %% [markdown]
# Forty steps, a thousand vectors each:

# %%
for _ in range(40):
    x = scaled[torch.randint(len(scaled), (1024,), generator=generator)]
    loss = (x - mine.decode(mine.encode(x))).square().sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    mine.W_dec.data /= mine.W_dec.data.norm(dim=1, keepdim=True)
    fvu.append(loss.item() / variance.item())
so(f"forty steps take the FVU from {fvu[0]:.1f} to less than {math.ceil(10 * fvu[-1]) / 10:.1f}.")

# %% [markdown]
# `train` does the same with what a real training needs: a rate that warms up and falls, latents
# revived that have not fired for `dead_after` vectors, checkpoints, held-out scores, several SAEs
# on the same batches, the text again and again until all `vectors` are seen. **Control**: a
# *floor*, the same SAE with its random decoder frozen; only the encoder learns. The curves draw
# themselves while it runs.

# %%
from lenslab.sae.train import TrainingConfig, train
from lenslab.show.report import live_curves

new = {
    "my SAE": build_sae("topk", source.widths[HOOK], D_SAE, k=K),
    "frozen decoder": build_sae("topk", source.widths[HOOK], D_SAE, k=K, frozen="decoder"),
}
config = TrainingConfig(vectors=400_000, batch=2048, dead_after=100_000)
trained = train(new, source, config, held_out=unseen, watch=live_curves(config), progress=False)

# %% [markdown]
# Measured on held-out text, which no step saw:

# %%
fvus = {name: each.held_out["fvu"] for name, each in trained.items()}
so(
    f"on held-out text my SAE leaves less than {math.ceil(20 * fvus['my SAE']) / 20:.2f} of the "
    "variance; the one whose decoder stayed as it was leaves more than "
    f"{math.floor(20 * fvus['frozen decoder']) / 20:.2f}."
)

# %% [markdown]
# ## 4. Did it work?
# The same held-out text for everybody; a model wrote it, as it did what mine was trained on, while
# one that ships learned from other text. Beside my SAE stand the one that ships for the middle of
# the residual stream (where there is none, a small one is trained), the frozen decoder, and floors
# that learned nothing at all: random directions, principal axes, the hook's own coordinates, the
# last two in both signs, each with as many active.

# %%
from lenslab.sae.controls import KINDS, untrained_sae
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.find import find_sae
from lenslab.sae.inputs import sae_hook

sae = trained["my SAE"].sae
ships, ships_name, origin = find_sae(model)
everybody = {"my SAE": sae, ships_name: ships, "frozen decoder": trained["frozen decoder"].sae}
sample = vectors[:16_384]  # floors take their mean, axes and length from it
everybody |= {name: untrained_sae(sae, sample, K, kind=kind) for kind, name in KINDS.items()}
scores = [evaluate_sae(model, each, held_out, name) for name, each in everybody.items()]
print(f"beside mine: {ships_name} ({origin}), {sae_hook(ships)}")

# %% [markdown]
# `ce_difference`: nats of loss a token that it costs to put the reconstruction in the vector's
# place; `kl`: how far that moves the prediction; `relative_bias`: below 1 reconstructions are too
# short (*shrinkage*); `dead`, `dense`: latents, of `d_sae`, that fire nowhere in this text, or on
# more than a tenth of it.

# %%
columns = ["d_sae", "l0", "fvu", "ce_difference", "kl", "relative_bias", "dead", "dense"]
table = pd.concat([each.to_frame() for each in scores]).set_index("sae")[columns]
winner = table.drop(ships_name)[["fvu", "ce_difference", "kl"]].idxmin()
least_error = "; ".join(f"{who} by {', '.join(by.index)}" for who, by in winner.groupby(winner))
better = [m for m in winner.index if table.loc[ships_name, m] < table.loc["my SAE", m]]
learned = table.loc["random directions", "fvu"] - table.loc["frozen decoder", "fvu"]
so(
    f"of my SAE and the floors the least error is that of {least_error}. {ships_name} does better "
    f"than mine by {', '.join(better) or 'none'} of these. The encoder that was trained on random "
    f"directions leaves {'less' if learned > 0.02 else 'hardly less'} variance than random "
    "directions whose encoder was not."
)
HTML(table.to_html(float_format="{:.3f}".format))

# %% [markdown]
# ## 5. Where do floors come near?
# The same comparison for the SAE that ships, with floors that were trained for as long as it was: a
# decoder that stays as it was drawn, one that stays near (*soft*: cosine at least .8), an encoder
# that stays. All were trained with 16 active; 8 and 32 are the same ones with another threshold.
# FVU on held-out documents. It took hours and is a saved result of `pocket-gpt`
# (`scripts/sae_floors.py`). The SAE of the random twin reads other vectors, those of a model with
# random weights.

# %%
from lenslab.files import saved_result
from lenslab.models import model_key

key, layer = model_key(model), model.cfg.n_layers // 2
asked = {"sites": [f"resid-{layer}"], "levels": [8, 16, 32], "model_key": key}
floors = saved_result("phase_4_floors", asked)
if floors is None:
    print("not measured for this model; the whole section is about pocket-gpt")
else:
    by_l0 = floors.pivot(index="name", columns="asked_l0", values="fvu").sort_values(16)
    print(by_l0.rename_axis(columns="L0").round(2).to_string())

# %% [markdown]
# Reconstruction is one thing, telling kinds of text apart another: held-out AUROC with which the
# best feature, or probes of the best five or sixteen, tell the seven kinds of probe texts apart
# (mean over kinds).

# %%
tells = ["best_feature", "probe_5", "probe_16"]
if floors is not None:
    named = floors[floors["asked_l0"] == 16].set_index("name")
    print(named[["fvu", "ce_difference", *tells]].round(2).to_string())
    seeds = named[named.index.str.match("SAE(, seed|$)")]
    twin = named.loc["SAE of the random twin"]
    beside = named.drop([*seeds.index, twin.name])
    ahead = [f"{(seeds[m] < beside[m].max()).sum()} by {m}" for m in tells]

# %% [markdown]
# Which floor comes nearest, and is a low FVU a sign of something learned?

# %%
if floors is not None:
    so(
        f"at L0 16 the SAE leaves {seeds['fvu'].max():.2f} of the variance, the best floor "
        f"({beside['fvu'].idxmin()}) {beside['fvu'].min():.2f}. In telling kinds apart a floor is "
        f"ahead of {', '.join(ahead)} of {len(seeds)} SAEs that differ in their seeds. An SAE of "
        f"the random twin leaves {twin['fvu']:.2f} of its own vectors, and its best feature has an "
        f"AUROC of {twin['best_feature']:.2f}: a low FVU alone says nothing about the model."
    )

# %% [markdown]
# ## 6. What does each decision cost?
# **Architecture and sparsity**: seven ways to keep few latents active.
#
# | name | which latents are active |
# |---|---|
# | relu | those above 0; a penalty on their sum (L1) keeps them few |
# | topk, batchtopk | the *k* largest of each vector, or *k* a vector on average over a batch |
# | matryoshka | as batchtopk; its first latents must reconstruct by themselves, too |
# | jumprelu | those above a threshold that each learns; a penalty on their number |
# | gated | those that a gate opens; a penalty on the gate |
# | transcoder | as batchtopk, but it reads what goes into an MLP and writes what comes out |
#
# All (but the transcoder) at one hook, 1.5 million vectors each, every one at the rate that was
# best of those tried: by FVU, or by loss where a penalty decides how many are active. All rates
# fell along a cosine, with Adam's usual momentum (`hold=0.0, momentum=0.9`), and jumprelu's decoder
# rows began at full length. A saved result of `pocket-gpt`, too (`scripts/sae_sweep.py`).

# %%
inputs = {"layer": layer, "d_sae": 2048, "vectors": 1_500_000, "model_key": key}
sweep = saved_result("phase_4_sweep", inputs)
ladder = saved_result("phase_4_rates", inputs)
measures = {m: (m, "mean") for m in ("l0", "fvu", "ce_difference")}
measures |= {"low": ("fvu", "min"), "high": ("fvu", "max")}
at = [8, 16, 32]
if sweep is not None:
    groups = sweep.dropna(subset="fvu").groupby(["architecture", "level"])
    runs = groups.agg(**measures)
    curves = {name: rows.droplevel(0).sort_values("l0") for name, rows in runs.groupby(level=0)}

# %% [markdown]
# Read off at three L0:

# %%
if sweep is None:
    print("not measured for this model; up to the live trainings below this is about pocket-gpt")
else:
    read = {  # [architecture][measure] at each L0
        name: {
            m: np.interp(np.log(at), np.log(rows["l0"]), rows[m], np.nan, np.nan) for m in measures
        }
        for name, rows in curves.items()
    }
    fvu_at = pd.DataFrame({name: found["fvu"] for name, found in read.items()}, at).T
    print(fvu_at.sort_values(16).round(3).to_string())

# %% [markdown]
# **Control**: other seeds, five of the architectures that leave the least. How far apart can two of
# them be, and how far apart are architectures?

# %%
from lenslab.stats import smallest_difference

if sweep is not None:
    near = [rows["fvu"] for _, rows in groups if len(rows) > 2 and 12 < rows["l0"].mean() < 20]
    least = max(smallest_difference(each.to_numpy()) for each in near)
    order = fvu_at.drop("transcoder")[16].dropna().sort_values()
    level = order.index[order <= order.iloc[0] + least]
    so(
        f"at L0 16 {', '.join(level)} leave the least ({order.iloc[0]:.3f}), apart by no more than "
        f"seeds can be ({least:.3f}, the most of {len(near)} with five); {order.index[-1]} leaves "
        f"{order.iloc[-1]:.3f}."
    )

# %% [markdown]
# Drawn, both axes logarithmic; lower left is better. Grey are floors of section 5: random
# directions, and two that were trained on nearly seven times as many vectors.

# %%
from lenslab.show.plots import lines

axes = {"x_title": "L0: latents active at a token", "log_x": True, "log_y": True}
if sweep is not None and floors is not None:
    fvu_of, l0_of = ({n: rows[m] for n, rows in curves.items()} for m in ("fvu", "l0"))
    spread = {name: (rows["low"], rows["high"]) for name, rows in curves.items()}
    for name in ("frozen decoder", "frozen encoder", "random directions"):
        rows = floors[floors["name"] == name].sort_values("l0")
        fvu_of[name], l0_of[name] = rows["fvu"], rows["l0"]
    titles = {"y_title": "variance left", "title": "What sparsity costs, by architecture"}
    lines(fvu_of, l0_of, spread=spread, **axes, **titles).show()

# %% [markdown]
# What does the model lose? The same runs, by the nats of loss a token that are added when the
# reconstruction takes the vector's place.

# %%
if sweep is not None:
    losses = pd.Series({n: f["ce_difference"][1] for n, f in read.items()}).dropna().sort_values()
    same = losses.index.tolist() == order.index.intersection(losses.index).tolist()
    so(
        f"at L0 16 {losses.index[0]} adds {losses.iloc[0]:.2f} nats, {losses.index[-1]} "
        f"{losses.iloc[-1]:.2f}; by loss the architectures come in {'' if same else 'not quite '}"
        "the order that they have by FVU."
    )
    costs = {n: curves[n].dropna(subset="ce_difference") for n in losses.index}
    nats, l0_of = ({n: c[m] for n, c in costs.items()} for m in ("ce_difference", "l0"))
    titles = {"y_title": "nats of loss added", "title": "What sparsity costs the model"}
    lines(nats, l0_of, **axes, **titles).show()

# %% [markdown]
# **Rate, width, length**: the peak rate of Adam with which trainings ended best, where *k* fixes
# the sparsity, so that FVU can be compared; for TopK at other widths and at a shorter length, too.
# These runs were made on another machine than the sweep, where FVUs are some .005 lower: compare
# them with each other.

# %%
if ladder is not None:
    penalised = ladder["architecture"].isin(["relu", "jumprelu", "gated"])
    ladder = ladder[~penalised].dropna(subset="fvu")
    keys = ["architecture", "d_sae", "vectors"]
    best = ladder.loc[ladder.groupby(keys)["fvu"].idxmin(), [*keys, "lr", "fvu"]]
    print(best.round(3).to_string(index=False))
    usual = ladder.query("d_sae == 2048 and vectors == 1_500_000").sort_values("lr")
    by = {name: rows.set_index("lr")["fvu"] for name, rows in usual.groupby("architecture")}
    highest = (best["lr"].to_numpy() == ladder.groupby(keys)["lr"].max().to_numpy()).sum()

# %% [markdown]
# Is that an optimum, and how does it compare with the choice of architecture? Drawn: FVU at each
# rate over the least.

# %%
if ladder is not None and sweep is not None:
    over = {name: rows / rows.min() for name, rows in by.items()}
    slow = [rows.iloc[0] for rows in over.values() if rows.index[0] == usual["lr"].min()]
    so(
        f"in {highest} of {len(best)} settings the best rate is the highest that was tried: a "
        f"higher one may be better still. At the lowest {min(slow):.1f} to {max(slow):.1f} times "
        "as much variance is left; between architectures, at L0 16, up to "
        f"{order.iloc[-1] / order.iloc[0]:.1f} times."
    )
    axes = {"x_title": "peak rate", "y_title": "FVU over the least", "log_x": True}
    rates_of = {name: rows.index for name, rows in by.items()}
    lines(over, rates_of, title="What the rate costs", **axes).show()

# %% [markdown]
# **Penalty**: where no *k* fixes how many latents are active, a penalty does, and which one leads
# to an L0 depends on the data. `starting_penalty` suggests one from the sweep. **Check**: the L0
# that these would have led to in the sweep itself, read off between its runs.

# %%
from lenslab.sae.train import starting_penalty

rows = []
for kind in ("relu", "jumprelu", "gated") if sweep is not None else ():
    penalty = [starting_penalty(kind, source.widths[HOOK], l0) for l0 in at]
    seen = curves[kind].sort_index()["l0"]
    led_to = np.exp(np.interp(np.log(penalty), np.log(list(seen.index)), np.log(seen)))
    rows += [(kind, *row) for row in zip(at, penalty, led_to, strict=True)]
penalties = pd.DataFrame(rows, columns=["architecture", "for L0", "penalty", "led to L0"])
print(penalties.round(1).to_string(index=False))

# %% [markdown]
# How far off is the worst of them?

# %%
if len(penalties):
    off = np.exp(np.abs(np.log(penalties["led to L0"] / penalties["for L0"]))).max()
    so(f"in the sweep, to which they were fitted, each leads to its L0 within {off:.1f} times.")

# %% [markdown]
# **Everything else**, one decision at a time, here and now: small SAEs, trained on the same batches
# for few steps. FVU in the model's own units, on held-out text.

# %%
small = dict(d_in=source.widths[HOOK], d_sae=512, k=16)
decisions = {
    "as it is": {},
    "another seed": {"seed": 1},
    "half as wide": {"d_sae": 256},
    "twice as wide": {"d_sae": 1024},
    "k = 32": {"k": 32},
    "not centred": {"centre": False},
    "nor of their own length": {"centre": False, "scale": "unit"},
}

# %% [markdown]
# All are trained in one pass.

# %%
tries = {name: build_sae("topk", **(small | changed)) for name, changed in decisions.items()}
quick = TrainingConfig(vectors=120_000, batch=2048)
tried = train(tries, source, quick, progress=False)

# %% [markdown]
# **Control**: another seed; what moves the FVU no further than that says nothing.

# %%
from lenslab.show.plots import bars

x = unseen.pool(0, 0)[HOOK]
total = (x - x.mean(0)).square().sum()
left = {}
with torch.inference_mode():
    for name, each in tried.items():
        left[name] = float((x - each.sae.decode(each.sae.encode(x))).square().sum() / total)
by_chance = max(0.05, 3 * abs(left["another seed"] / left["as it is"] - 1))
lower = [name for name in left if left[name] < (1 - by_chance) * left["as it is"]]
higher = [name for name in left if left[name] > (1 + by_chance) * left["as it is"]]
own_length = abs(left["nor of their own length"] / left["not centred"] - 1) > by_chance

# %% [markdown]
# Twice as many active are no gain by themselves: they cost sparsity.

# %%
so(
    f"after {quick.steps} steps, by more than 5 % and three times what another seed changes, the "
    "FVU is lower with: "
    f"{', '.join(lower) or 'nothing'}; higher with: {', '.join(higher) or 'nothing'}. To take each "
    f"vector's length away as well {'matters' if own_length else 'makes no difference'} beside not "
    "centring."
)
control = [name in ("as it is", "another seed") for name in left]
changed = np.where(control, np.nan, list(left.values()))
shown = {"one decision changed": changed, "control": np.where(control, list(left.values()), np.nan)}
axes = {"x_title": "decision", "y_title": "FVU on held-out text", "overlay": True}
bars(shown, list(left), title="One decision at a time", **axes).update_xaxes(tickangle=-30).show()

# %% [markdown]
# Why this notebook decides as it does. Measured above: **TopK**, at the front of the sweep, needs
# no penalty to be found; **8 x wide**, because width lowers the FVU slowly and costs time in
# proportion; **centred**; **a high rate**. Measured elsewhere: a rate that **stays at its peak and
# falls in the last fifth** leaves less variance than one that falls from the start, and **Adam's
# momentum of .8** less than .9, at 32 and at 256 steps (`benchmarks/results/time_to_quality.json`).
# Taken from the literature: **warm-up**, **dead latents revived** (a latent that never fires is
# width wasted), **BOS left out** (in many models its vector is many times as long as others).

# %% [markdown]
# ## 7. Does an SAE find what is there?
# In a language model nobody knows the true features. In a planted world they are known: 256 random
# directions in 64 dimensions, each on with a probability of its own, about seven at a time
# (SAELens's synthetic models). *MCC*: mean cosine between true and found directions, matched one to
# one; *F1*: whether a latent fires when its feature is on; *uniqueness*: whether each finds another
# one. A saved result (`benchmarks/ground_truth.py`): five seeds, at the true L0, by lenslab (ours)
# and by SAELens's own training. **Control**: a dictionary that learned nothing.

# %%
from lenslab.sae.inputs import sae_key
from lenslab.sae.load import load_sae

reference = load_sae("pocket-gpt-resid-3")
pocket = reference.cfg.metadata.model_key
truth = saved_result("phase_4_truth", [pocket, sae_key(reference)])
planted = truth[truth["part"] == "recovery"].groupby(["of", "measure"])["value"].mean()
recovered = planted.unstack()[["mcc", "f1", "uniqueness"]].sort_values("mcc")
print(recovered.round(2).to_string())
ours, theirs = (
    recovered.filter(like=who, axis=0).rename(lambda name: name.split()[1])
    for who in ("lenslab", "saelens")
)
theirs = theirs.loc[ours.index]
behind = {m: ours.index[ours[m] < theirs[m] - 0.01].tolist() for m in ("mcc", "f1")}

# %% [markdown]
# Who is ahead, and is the order the same as by FVU in the sweep?

# %%
in_sweep = ""
if sweep is not None:
    ranks = ours["mcc"].corr(order, method="spearman")
    more = "no more" if ranks > -0.3 else "more"
    in_sweep = f" Those that leave less variance in the sweep find {more} here (rank {ranks:.1f})."
so(
    f"ours find the planted directions with an MCC of {ours['mcc'].min():.2f} "
    f"({ours['mcc'].idxmin()}) to {ours['mcc'].max():.2f} ({ours['mcc'].idxmax()}), where one that "
    f"learned nothing has {recovered.loc['untrained', 'mcc']:.2f}. SAELens's training is ahead for "
    f"{', '.join(behind['mcc']) or 'none'} by MCC, for {', '.join(behind['f1']) or 'none'} by F1."
    f"{in_sweep}"
)

# %% [markdown]
# **Absorption**: where one feature implies another (every poodle is a dog), a latent for dogs may
# learn to be silent on poodles, and the poodle's latent says both. `absorbed`: share of the vectors
# with parent and child on which this happens; `silent`, `silent_alone`: how often the parent's
# latent is silent when a child is there, and when none is.

# %%
parents = truth[truth["part"] == "absorption"]
absorbed = parents.groupby(["of", "measure"])["value"].mean().unstack()
print(absorbed[["absorbed", "silent", "silent_alone", "mcc", "f1"]].round(2).to_string())
worst = absorbed.filter(like="lenslab", axis=0)["absorbed"]
so(
    f"parents are absorbed in {worst.min():.0%} ({worst.idxmin()}, MCC "
    f"{absorbed.loc[worst.idxmin(), 'mcc']:.2f}) to {worst.max():.0%} ({worst.idxmax()}, "
    f"{absorbed.loc[worst.idxmax(), 'mcc']:.2f}) of such vectors. A dictionary that learned "
    f"nothing absorbs {absorbed.loc['untrained', 'absorbed']:.0%}: little absorption is no merit "
    "by itself."
)

# %% [markdown]
# **Kinds of text**: *k* features of the bundled SAE that labels select, against as many coordinates
# of the same vectors, as many principal axes, and logistic regression on all coordinates, all as
# means over a text. **Control**: shuffled labels (of features as maxima). Held-out AUROC, mean over
# seven kinds and four SAEs that differ in their seeds.

# %%
probes = truth[truth["part"].eq("probing, mean") | truth["of"].str.contains("shuffled")]
means = probes.astype({"k": int}).groupby(["of", "k"])["value"].mean().unstack()
fewer = means.columns[:-1]
lead = (means.loc["SAE", fewer] - means.loc["coordinates", fewer]).astype(float)
if key != pocket:
    print("not measured for this model; what is left of this section is about pocket-gpt")
else:
    print(means.round(2).to_string(na_rep=""))
    so(
        "with as many features as coordinates the SAE's AUROC is higher by "
        f"{lead.min():.3f} to {lead.max():.3f} (below 0: lower); all coordinates together reach "
        f"{means.loc['logistic regression'].max():.2f}."
    )

# %% [markdown]
# **What can these measures tell?** The smallest difference between two trainings that is more than
# another seed would make, from SAEs that differ in nothing else.

# %%
told = truth[truth["part"] == "smallest difference"].set_index(["measure", "of", "k"])["value"]
by_seed = probes[probes["of"] == "SAE"].astype({"k": int}).groupby(["k", "seed"])["value"].mean()
by_seed = by_seed.unstack().loc[fewer]  # [k, seed]; a mean of n seeds varies sqrt(2 n) times less
limit = by_seed.apply(smallest_difference, axis=1, raw=True) / np.sqrt(2 * by_seed.shape[1])
can = bool((lead.abs() > limit).any())
if key == pocket:
    print(told.round(3).reset_index().to_string(index=False, na_rep=""))
    so(
        f"the SAE's lead over coordinates is {'more' if can else 'no more'} than its seeds can "
        f"make (up to {limit.max():.3f}); two trainings like the bundled one's whose FVUs differ "
        f"by less than {told['fvu'].max():.3f} may differ in their seeds alone."
    )

# %% [markdown]
# ## 8. What do the new features fire on?
# The 420 probe texts of phase 2, seven kinds. **Control** in the pictures: as many random
# directions, as many of them active, all made longer or shorter by one factor, so that they
# reconstruct best. How strong does each feature get?

# %%
from lenslab.features.activations import encode_features
from lenslab.texts import label_texts, load_probes
from lenslab.tokens import tokenize

labels = label_texts(load_probes("categories"))
batch = tokenize(model, list(labels.texts), truncate=True)
labels = labels.with_lengths(batch.real.sum(1).numpy())
names = ["my SAE", "random directions"]
fas = {name: encode_features(model, everybody[name], batch, name=name) for name in names}
pooled = {name: fa.pool("max") for name, fa in fas.items()}  # [text, feature]

# %% [markdown]
# Sorted, the strongest first:

# %%
strength = {name: np.sort(each.max(axis=0).toarray())[::-1] for name, each in pooled.items()}
axes = {"x_title": "rank", "y_title": "largest activation", "log_y": True}
fired = {name: values[values > 0] for name, values in strength.items()}
top, median = ({n: v[int(share * len(v))] for n, v in fired.items()} for share in (0.01, 0.5))
uneven = {name: top[name] / median[name] for name in names}
so(
    "from the strongest hundredth of features that fire to the middle one strength falls "
    f"{'more' if uneven['my SAE'] > 1.2 * uneven['random directions'] else 'no more'} than among "
    "random directions."
)
lines(strength, range(1, 1 + len(strength["my SAE"])), title="Features by strength", **axes).show()

# %% [markdown]
# And how often does each fire? Those that never do (*dead*, in these texts) are in the legend; the
# spikes on the left are those that fire once or twice.

# %%
from lenslab.show.feature_plots import firing_density

rates = {name: (fa.matrix > 0).mean(axis=0) for name, fa in fas.items()}
rare = {name: np.mean(rate < 1e-3) for name, rate in rates.items()}
gap = rare["my SAE"] - rare["random directions"]
how = "about as" if abs(gap) < 0.1 else "less" if gap < 0 else "more"
so(
    f"features that hardly fire (on less than one token in a thousand) are {how} common in my SAE "
    f"{'as' if how == 'about as' else 'than'} among random directions."
)
firing_density(rates, title="How often the features fire").show()

# %% [markdown]
# All features in one picture: a column each, under the kind of text where it is strongest, as a
# share of its own largest. Each is strongest somewhere; what counts is how pale its other rows are,
# beside the control.

# %%
from lenslab.show.feature_plots import strength_bars, strength_map

kind_means = {
    name: np.stack([each[labels.category == kind].mean(axis=0) for kind in labels.categories])
    for name, each in pooled.items()
}
second = {}  # how near the second kind comes to the first, median over features
for name, means in kind_means.items():
    ordered = np.sort(means[:, means.max(0) > 0], axis=0)
    second[name] = np.median(ordered[-2] / ordered[-1])

# %% [markdown]
# Columns are features.

# %%
gap = second["random directions"] - second["my SAE"]
so(
    "the median feature of my SAE is "
    f"{'much more' if gap > 0.1 else 'hardly more' if gap > -0.1 else 'less'} of one kind of text "
    "than the median random direction: in its second kind it reaches "
    f"{'far less' if gap > 0.1 else 'about as much' if gap > -0.1 else 'more'}, as a share of its "
    "first."
)
strength_map(kind_means, labels.categories, title="Where each feature is strongest").show()

# %% [markdown]
# The strongest of them, in three dimensions: turn it, since bars in front hide others.

# %%
strength_bars(kind_means, labels.categories, title="The strongest features, by kind").show()

# %% [markdown]
# Which feature tells each kind apart, chosen on half of the texts, scored on the others (phase 2,
# section 5)? **Control**: the same search among the frozen decoder's features, and among principal
# axes.

# %%
from lenslab.features.specialists import discriminate
from lenslab.sae.controls import pca_axes

frozen_fa = encode_features(model, everybody["frozen decoder"], batch, name="frozen decoder")
searched = {"my SAE": pooled["my SAE"], "frozen decoder": frozen_fa.pool("max")}
searched |= {"PCA axes": pca_axes(model, sae, batch)}
found = {n: discriminate({n: m}, labels).set_index("category") for n, m in searched.items()}
aurocs = pd.DataFrame({name: each["auroc"] for name, each in found.items()})

# %% [markdown]
# In how many kinds is it ahead?

# %%
counts = {name: each["discriminating"].sum() for name, each in found.items()}
counts |= {f"ahead of {n}": (aurocs["my SAE"] > aurocs[n]).sum() for n in aurocs.columns[1:]}
told = {key: "most" if n > len(aurocs) / 2 else "few" for key, n in counts.items()}
so(
    f"{told['my SAE']} of the {len(aurocs)} kinds have a feature that tells them apart (q <= .05), "
    f"{told['frozen decoder']} one of the frozen decoder's, {told['PCA axes']} a principal axis. "
    f"Mine is ahead of the frozen decoder's in {told['ahead of frozen decoder']}, and of the best "
    f"principal axis in {told['ahead of PCA axes']}."
)
HTML(aurocs.assign(feature=found["my SAE"]["feature"]).to_html(float_format="{:.2f}".format))

# %% [markdown]
# Where does the best of them fire in running text that it was not trained on? The token itself
# stands between double angle quotes.

# %%
from lenslab.features.contexts import find_contexts

best_kind = found["my SAE"]["auroc_discovery"].idxmax()
best_feature = int(found["my SAE"].loc[best_kind, "feature"])
contexts = find_contexts(model, sae, held_out, features=[best_feature], progress=False)
top = contexts.top(best_feature)[["activation", "context"]].head(8)
HTML(top.to_html(float_format="{:.2f}".format, index=False))

# %% [markdown]
# **Control**: is it about the kind, or about one class of tokens? Its AUROC without those tokens
# (phase 2, section 10).

# %%
from lenslab.features.readings import firing_summary

fires = firing_summary(fas["my SAE"], found["my SAE"]["feature"].tolist(), labels)
narrow = fires[fires["share"] > 0.8]
HTML(fires.to_html(float_format="{:.2f}".format, index=False))

# %% [markdown]
# In the table `share` is how much of the activation falls on that class.

# %%
share = len(narrow) / len(fires)
many = "hardly any" if share < 0.2 else "nearly all" if share > 0.8 else "some, not all,"
so(
    f"{many} of the chosen features put more than 80 % of their activation on one class of tokens; "
    "what is left of such a one without that class stands in the table's last column."
)

# %% [markdown]
# ## 9. Save it, open it, go on
# In SAELens's format, whole or not at all. A training can go on from any saved SAE: until its first
# step it computes what the saved one did, and its rate is a small one (1e-4), since that of new
# weights would undo what it learned. **Control**: as many steps from a random start.

# %%
from lenslab.files import outputs_path
from lenslab.sae.save import save_sae
from lenslab.sae.train import from_saelens

opened = load_sae(save_sae(sae, outputs_path("saes") / "my-sae"))
with torch.inference_mode():
    same = torch.equal(opened.encode(vectors[:512]), sae.encode(vectors[:512]))
again = {"from the saved": from_saelens(opened)}
again["from a random start"] = build_sae("topk", opened.cfg.d_in, opened.cfg.d_sae, k=K)
short = TrainingConfig(vectors=60_000, batch=2048)
went_on = train(again, source, short, held_out=unseen, progress=False)

# %% [markdown]
# Did it help?

# %%
fvus = {name: each.held_out["fvu"] for name, each in went_on.items()}
before = trained["my SAE"].held_out["fvu"]
print(f"saved and opened again, it encodes the same: {same}")
so(
    f"{short.steps} more steps {'lower' if fvus['from the saved'] < before else 'do not lower'} "
    "the FVU of the saved SAE; as many steps from a random start leave more than "
    f"{math.floor(10 * fvus['from a random start'] / before) / 10:.1f} times as much."
)

# %% [markdown]
# ## 10. A report to keep
# Curves, scores beside the floors, and the features that tell kinds apart: a page, and a PDF where
# a browser is there to print it.

# %%
from lenslab.show.report import feature_page, save_report, training_curves

history = {name: each.history for name, each in trained.items()}
sections = {"Training": [training_curves(history)], "Scores beside floors": [table]}
for kind, feature in found["my SAE"]["feature"].head(3).items():
    about = feature_page(model, sae, fas["my SAE"], feature, categories=list(labels.category))
    sections[f"Feature {feature}, chosen for {kind}"] = about
report = save_report("phase_4_my_sae", f"An SAE of {model_name(model)}, {HOOK}", sections)
so(f"the report {report.stem} has {len(sections)} sections and lies in outputs/.")

# %% [markdown]
# ## 11. Another site, another text
# The same in one cell for any hook of any model: here what the MLP adds after its down-projection,
# each vector scaled to one length, a ReLU with the penalty that is suggested. For Gemma 3 set
# `LENSLAB_MODEL=google/gemma-3-1b-it`; for WikiText,
# `hub_texts("Salesforce/wikitext", "wikitext-103-raw-v1", limit=20_000)`.

# %%
site = f"blocks.{model.cfg.n_layers // 2}.hook_mlp_out"
mlp = ModelSource(model, text, site)
unit = dict(scale="unit", centre=False, sparsity=starting_penalty("relu", mlp.widths[site], 32))
other = {"MLP": build_sae("relu", mlp.widths[site], 512, **unit)}
relu = train(other, mlp, quick, progress=False)["MLP"].sae
measured = evaluate_sae(model, relu, held_out)

# %% [markdown]
# **Control**: random directions, as many of them active.

# %%
from lenslab.sae.controls import evaluate_null

null = evaluate_null(model, relu, held_out, measured.l0)
share = measured.fvu / null.fvu
so(
    f"after {quick.steps} steps a ReLU SAE of {site} leaves more than "
    f"{math.floor(10 * share - 0.5) / 10:.1f} times the variance that random directions as sparse "
    f"leave{': it has only begun' if share > 0.5 else ''}; it has "
    f"{'about' if measured.l0 < 48 else 'more than'} the L0 that was asked for (32)."
)

# %% [markdown]
# ## What was found, and what was not
# **Found**: what the lines that begin with *So:* say. An SAE that fits on a screen trains in
# seconds; whether it worked is said by floors (sections 4 and 5), not by its own loss; what it cost
# to decide otherwise, by a sweep and its seeds (section 6); whether such SAEs find true features,
# where they are known (section 7).
#
# **Not shown**: that planted worlds are like language models; that the model uses these features;
# that a lower FVU makes features more useful: a decoder that hardly moved (section 5) and as many
# coordinates (section 7) tell kinds of text apart about as well, though floors that learned less do
# worse, and an SAE of the random twin has as low an FVU. One small
# model, one hook, text that a model wrote, some thousand held-out tokens and one seed of my SAE:
# another rate (the best was not found), width or penalty may be best elsewhere.
#
# **Exercises**
# 1. Train on the output of the attention instead (`HOOK`). Is its FVU lower? Is that hook easier?
# 2. Freeze the encoder instead of the decoder in section 3. Which side matters more?
# 3. Go on from the SAE that ships instead of from mine in section 9.
#
# <details><summary>Solutions</summary>
#
# 1. `HOOK = f"blocks.{model.cfg.n_layers // 2}.hook_attn_out"` in section 1, then sections 2 to 4,
#    there with `find_sae(model, "pocket-gpt-attn-3")`. FVUs of two hooks are shares of different
#    variances: compare each with its own floors.
# 2. `frozen="encoder"` in section 3. Section 5 has both, trained for longer: compare their FVUs.
# 3. `from_saelens(ships, k=16)` for a BatchTopK SAE such as `pocket-gpt-resid-3`.
#
# </details>
