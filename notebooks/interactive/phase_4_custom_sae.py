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

documents = list(dict.fromkeys(sampled_text(640, model_name(model))))
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
ships, ships_name, origin = find_sae(model)
everybody = {"my SAE": sae, ships_name: ships, "frozen decoder": trained["frozen decoder"].sae}
kinds = {"random directions": "random", "PCA axes": "PCA", "raw coordinates": "neurons"}
everybody |= {name: untrained_sae(sae, vectors, K, kind=kind) for name, kind in kinds.items()}
scores = [evaluate_sae(model, each, held_out, name) for name, each in everybody.items()]
print(f"{ships_name}: {origin}")

# %% [markdown]
# `ce_difference`: nats of loss a token that the reconstruction costs when it takes the vector's
# place; `kl`: how far it moves the prediction; `bias`: length of what is reconstructed, over the
# length that would fit best, below 1 is *shrinkage*; `dead`, `dense`: latents that never fire in
# this text, or on more than a tenth of it.

# %%
columns = ["l0", "fvu", "ce_difference", "kl", "reconstruction_bias", "dead", "dense"]
table = pd.concat([each.to_frame() for each in scores]).set_index("sae")[columns]
less = table[["fvu", "ce_difference", "kl"]].drop([ships_name])
ahead = {
    metric: [name for name in less.index if less[metric][name] < less[metric]["my SAE"]]
    for metric in less
}
HTML(table.to_html(float_format="{:.3f}".format))

# %% [markdown]
# Where a floor is ahead, it says so. The SAE that ships was trained elsewhere, for longer.

# %%
so(
    "of my SAE and the floors, the least error is "
    + ", ".join(f"by {metric} that of {less[metric].idxmin()}" for metric in less)
    + f". The one that ships leaves {'less' if table['fvu'][ships_name] < table['fvu']['my SAE'] else 'more'} of the variance than mine, with about "
    f"{table['l0'][ships_name]:.0f} latents active, mine with {K}."
)

# %% [markdown]
# ## 5. Where do floors come near?
# The same comparison for the SAE that ships with `pocket-gpt`, at three sparsities, with every
# floor trained for as long as it was: a decoder that stays as it was drawn, one that stays near
# (cosine .8), an encoder that stays. Measured once (`scripts/sae_floors.py`), on held-out documents
# of people; `best_feature`, `probe_5`, `probe_16`: held-out AUROC with which one feature, or five,
# or sixteen, tell the seven kinds of probe texts apart, mean over kinds.

# %%
from lenslab.files import saved_result

pocket = model_key(load_model("pocket-gpt"))
inputs = {"sites": ["resid-3"], "levels": [8, 16, 32], "model_key": pocket}
floors = saved_result("phase_4_floors", inputs)
by_name = floors.pivot(index="name", columns="asked_l0", values="fvu").sort_values(16)
print(by_name.round(2).to_string())

# %% [markdown]
# Reconstruction is one thing, telling kinds of text apart another.

# %%
columns = ["fvu", "ce_difference", "dead", "best_feature", "probe_5", "probe_16"]
at_16 = floors[floors["asked_l0"] == 16].set_index("name")[columns]
print(at_16.round(2).to_string())

# %% [markdown]
# ## 6. What does each decision cost?
# **Architecture and sparsity**: all seven at one hook of `pocket-gpt`, 1.5 million vectors each,
# every one at the best of its learning rates (`scripts/sae_sweep.py`, a saved result). FVU at three
# L0, read off between runs; a transcoder writes another stream than it reads. **Control**: the two
# best from five seeds each.

# %%
inputs = {"layer": 3, "d_sae": 2048, "vectors": 1_500_000, "model_key": pocket}
sweep = saved_result("phase_4_sweep", inputs).dropna(subset="fvu")
runs = sweep.groupby(["architecture", "level"])[["l0", "fvu"]].agg(["mean", "min", "max"])
curves = {
    name: runs.loc[name].sort_values(("l0", "mean")) for name in sweep["architecture"].unique()
}
at = np.array([8, 16, 32])
read = {
    name: np.interp(np.log(at), np.log(curve["l0", "mean"]), curve["fvu", "mean"], np.nan, np.nan)
    for name, curve in curves.items()
}
fvu_at = pd.DataFrame(read, index=at).T.sort_values(16)
print(fvu_at.round(2).to_string())

# %% [markdown]
# How far apart are seeds of one architecture, and how far apart are architectures?

# %%
seeds = sweep.groupby(["architecture", "level"])["fvu"].agg(["std", "count"]).query("count > 1")
others = fvu_at.drop("transcoder")[16]
so(
    f"at L0 16 {others.index[0]} leaves {others.iloc[0]:.2f} of the variance, {others.index[1]} "
    f"{others.iloc[1]:.2f}, the last ({others.index[-1]}) {others.iloc[-1]:.2f}; five seeds of one differ by a standard deviation of "
    f"at most {seeds['std'].max():.3f}. Which is best hardly depends on the L0."
)

# %% [markdown]
# Drawn, both axes logarithmic; lower left is better. Grey are the floors of section 5, which were
# trained for longer.

# %%
fvu_of = {name: curve["fvu", "mean"] for name, curve in curves.items()}
l0_of = {name: curve["l0", "mean"] for name, curve in curves.items()}
spread = {name: (curve["fvu", "min"], curve["fvu", "max"]) for name, curve in curves.items()}
for name in ("frozen decoder", "frozen encoder", "random directions"):
    rows = floors[floors["name"] == name].sort_values("l0")
    fvu_of[name], l0_of[name] = rows["fvu"], rows["l0"]
axes = {"x_title": "L0: latents active at a token", "y_title": "FVU: variance left unexplained"}
axes |= {"log_x": True, "log_y": True, "spread": spread}
lines(fvu_of, l0_of, title="What sparsity costs, by architecture", **axes).show()

# %% [markdown]
# **Rate, width, length**: the peak rate of Adam with which each training ended best.

# %%
ladder = saved_result("phase_4_rates", inputs).dropna(subset="loss")
keys = ["architecture", "d_sae", "vectors"]
best = ladder.loc[ladder.groupby(keys)["fvu"].idxmin(), [*keys, "lr", "fvu"]]
print(best.round(4).to_string(index=False))
usual = ladder.query("d_sae == 2048 and vectors == 1_500_000")
by = {name: rows.sort_values("lr") for name, rows in usual.groupby("architecture")}
low = {name: rows["fvu"].iloc[0] / rows["fvu"].min() for name, rows in by.items()}
so(
    f"the best rates lie between {best['lr'].min():g} and {best['lr'].max():g}, whatever the architecture, the width and the "
    f"length; at the lowest tried up to {max(low.values()):.1f} times as much variance is left."
)

# %% [markdown]
# The same, drawn: too low a rate costs, too high a rate breaks.

# %%
axes = {"x_title": "peak rate", "y_title": "FVU over the least", "log_x": True, "log_y": True}
over = {name: rows["fvu"] / rows["fvu"].min() for name, rows in by.items()}
lines(
    over, {name: rows["lr"] for name, rows in by.items()}, title="What the rate costs", **axes
).show()

# %% [markdown]
# **Penalty**: where nothing else fixes how many latents are active, a penalty does, and nobody
# knows which. `starting_penalty` suggests one from the sweep, for vectors of any width.

# %%
from lenslab.sae.train import starting_penalty

penalties = pd.DataFrame(
    {
        kind: [starting_penalty(kind, 256, l0) for l0 in at]
        for kind in ("relu", "jumprelu", "gated")
    },
    index=pd.Index(at, name="for L0"),
)
print(penalties.round(2).to_string())

# %% [markdown]
# **Everything else**, one decision at a time, here and now: small SAEs, trained on the same batches
# for a few steps. **Control**: another seed; what differs less than that says nothing.

# %%
small = dict(d_in=source.widths[HOOK], d_sae=512, k=16)
decisions = {
    "as it is": {},
    "another seed": {"seed": 1},
    "half as wide": {"d_sae": 256},
    "twice as wide": {"d_sae": 1024},
    "vectors not centred": {"centre": False},
    "each vector to one length": {"centre": False, "scale": "unit"},
    "dead latents not revived": {"auxiliary": 0.0},
    "k = 32": {"k": 32},
}
tries = {name: build_sae("topk", **(small | changed)) for name, changed in decisions.items()}
quick = TrainingConfig(vectors=200_000, batch=2048, dead_after=50_000)
tried = train(tries, source, quick, progress=False)

# %% [markdown]
# FVU in the model's own units, on held-out text.

# %%
x = unseen.pool(0, 0)[HOOK]
total = (x - x.mean(0)).square().sum()
with torch.inference_mode():
    left = {
        name: float((x - each.sae.decode(each.sae.encode(x))).square().sum() / total)
        for name, each in tried.items()
    }
seed = abs(left["another seed"] - left["as it is"])
matter = [name for name in left if abs(left[name] - left["as it is"]) > 3 * seed]

# %% [markdown]
# ## 7. Does an SAE find what is there?
# In a language model nobody knows the true features. In a planted world they are known.

# %% [markdown]
# ## 8. What do the new features fire on?
# The 420 probe texts of phase 2, seven kinds. **Control** in everything that follows: as many
# random directions, as many of them active. How strong is the strongest activation of each feature?

# %%
from lenslab.features.activations import encode_features
from lenslab.show.plots import lines
from lenslab.texts import label_texts, load_probes
from lenslab.tokens import tokenize

labels = label_texts(load_probes("categories"))
batch = tokenize(model, list(labels.texts), truncate=True)
labels = labels.with_lengths(batch.real.sum(1).numpy())
names = ["my SAE", "random directions"]
fas = {name: encode_features(model, everybody[name], batch, name=name) for name in names}
pooled = {name: fa.pool("max") for name, fa in fas.items()}  # [text, feature]
strength = {name: np.sort(each.max(axis=0).toarray())[::-1] for name, each in pooled.items()}
lines(
    strength,
    log_y=True,
    title="Every feature's largest activation, sorted",
    x_title="rank",
    y_title="largest activation",
).show()

# %% [markdown]
# And on what share of the tokens does each fire? Features that never do are in the legend.

# %%
from lenslab.show.feature_plots import firing_density

rates = {name: (fa.matrix > 0).mean(axis=0) for name, fa in fas.items()}
firing_density(rates, title="How often the features fire").show()
rarely = {name: np.mean(rate < 0.001) for name, rate in rates.items()}
ratio = {name: each[len(each) // 100] / np.median(each) for name, each in strength.items()}
so(f"features of my SAE differ more than random directions do: {rarely['my SAE']:.0%}")

# %% [markdown]
# All features in one picture: a column each, under the kind of text where it is strongest. Each
# feature is strongest somewhere; what counts is how dark its other rows are, beside the control.

# %%
from lenslab.show.feature_plots import strength_bars, strength_map

kind_means = {
    name: np.stack([each[labels.category == kind].mean(axis=0) for kind in labels.categories])
    for name, each in pooled.items()
}
strength_map(kind_means, labels.categories, title="What each feature is strongest on").show()

# %% [markdown]
# The strongest of them, in three dimensions.

# %%
strength_bars(kind_means, labels.categories, title="The strongest features, by kind").show()

# %% [markdown]
# Which feature tells each kind apart, chosen on half of the texts, scored on the others (phase 2,
# section 5)? **Control**: the frozen decoder's features, searched in the same way.

# %%
from lenslab.features.specialists import discriminate

frozen_fa = encode_features(model, everybody["frozen decoder"], batch, name="frozen decoder")
searched = pooled | {"frozen decoder": frozen_fa.pool("max")}
found = {
    name: discriminate({name: each}, labels).set_index("category")
    for name, each in searched.items()
}
aurocs = pd.DataFrame({name: each["auroc"] for name, each in found.items()})
so(
    f"one feature of my SAE tells a kind apart with a held-out AUROC of {aurocs['my SAE'].mean():.1f} on average"
)
HTML(aurocs.assign(feature=found["my SAE"]["feature"]).to_html(float_format="{:.2f}".format))

# %% [markdown]
# Where the best of them fires in running text that it was not trained on.

# %%
from lenslab.features.contexts import find_contexts

best = int(found["my SAE"].sort_values("auroc_discovery")["feature"].iloc[-1])
contexts = find_contexts(model, sae, held_out, features=[best], progress=False)
HTML(contexts.top(best)[["activation", "context"]].head(8).to_html(float_format="{:.2f}".format))

# %% [markdown]
# ## 9. Save it, open it, go on
# In SAELens's format, whole or not at all. A training can go on from any saved SAE: its first
# steps then compute what the saved one did. **Control**: as many steps from a random start.

# %%
from lenslab.files import outputs_path
from lenslab.sae.load import load_sae
from lenslab.sae.save import save_sae
from lenslab.sae.train.convert import from_saelens

folder = save_sae(sae, outputs_path("saes") / "my-sae")
opened = load_sae(folder)
with torch.inference_mode():
    same = torch.equal(opened.encode(vectors[:512]), sae.encode(vectors[:512]))
print(f"saved and opened again, it encodes the same: {same}")

# %%
again = {"from the saved": from_saelens(opened)}
again["from a random start"] = build_sae("topk", opened.cfg.d_in, opened.cfg.d_sae, k=K)
short = TrainingConfig(vectors=60_000, batch=2048, lr=1e-3, log_every=5)
went_on = train(again, source, short, held_out=unseen, progress=False)
begins = {name: each.history["fvu"].iloc[0] for name, each in went_on.items()}
ends = {name: each.held_out["fvu"] for name, each in went_on.items()}

# %% [markdown]
# ## 10. A report to keep
# Curves, scores beside the floors and the features that tell kinds apart, as one page and as PDF.

# %%
from lenslab.show.report import feature_page, save_report, training_curves

history = {name: each.history for name, each in trained.items()}
sections = {"Training": [training_curves(history)], "Scores beside floors": [table]}
for kind, feature in found["my SAE"]["feature"].head(3).items():
    sections[f"Feature {feature}, chosen for {kind}"] = feature_page(
        model, sae, fas["my SAE"], feature, categories=labels.category
    )
report = save_report("phase_4_my_sae", f"An SAE of {model_name(model)}, {HOOK}", sections)
print(f"outputs/.../{report.name}: {len(sections)} sections")

# %% [markdown]
# ## What was found, and what was not
