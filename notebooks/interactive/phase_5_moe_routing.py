# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Phase 5: watch a mixture of experts route
#
# **What you will learn**: how to read, at any layer with a router, which experts a token is sent to
# and what they add; whether the route follows the token or what it means in its context; how it
# came about in training; what experts are *for*, beyond what random routers on the same inputs
# show; whether there are paths through the layers; and what foretells a route.
#
# **Runs on** the bundled `pocket-moe` (6 layers of 16 experts, two for each token), offline; the
# README says how long it takes and how much memory. For another mixture of experts set
# `LENSLAB_MODEL`, to `olmoe`, a name on the hub or a folder. Sections that need what a model has
# not (a record of its training, two experts a token) say so and go on.
#
# **How to read it**: one question per section, then code, a printed check, the control, a picture.
# Lines that begin with *So:* say what was found, whatever model you run. The number of an expert is
# an arbitrary name: expert 3 of one layer has nothing to do with expert 3 of the next.

# %% [markdown]
# ## 1. What one text does
# A model with two layers of experts or more. With another the notebook goes on with the one that
# ships; of an encoder-decoder `capture_routing` and `analyze_texts` read a `stack`.

# %%
import os

import numpy as np
import pandas as pd
from IPython.display import HTML

from lenslab.models import load_model, model_name, random_twin
from lenslab.moe.routing import capture_routing, sparse_layers
from lenslab.show.images import set_up_figures
from lenslab.show.words import so
from lenslab.texts import load_probes
from lenslab.tokens import token_string, tokenize

# %% [markdown]
# Which layers have a router, and of which family it is:

# %%
set_up_figures()
model = load_model(os.environ.get("LENSLAB_MODEL") or "pocket-moe")
try:
    routers = sparse_layers(model)
    if len(routers) < 2:
        raise ValueError("It has one layer with experts, and a path takes two.")
except ValueError as reason:  # dense, or an encoder-decoder
    print(f"{reason} Instead of {model_name(model)}:")
    model = load_model("pocket-moe")
    routers = sparse_layers(model)
families = ", ".join(sorted({layer.family for layer in routers.values()}))
print(f"{model_name(model)}: layers {list(routers)} have experts ({families})")

# %% [markdown]
# Some texts of seven kinds. Every real token has, at every such layer, the experts it is sent to,
# sorted by weight, and the weights they are used with. On every pass the weights are checked to
# follow from the logits; positions without a token of text (BOS, padding) take no part.

# %%
look = load_probes("first_look")
seen = tokenize(model, look["text"].tolist(), truncate=True)
routing = capture_routing(model, seen)
shape = dict(zip(("token", "layer", "rank"), routing.ids.shape, strict=True))
print(f"{shape}, {routing.n_experts} experts in each layer")
print(f"weights of the ranks, mean: {np.round(routing.weights.mean((0, 1)).tolist(), 2)}")

# %% [markdown]
# As a table, one row for each token, layer and rank: what a data frame or R can read.

# %%
table = routing.to_frame()
first = table[(table["text"] == table["text"].iloc[0]) & (table["layer"] == routing.layers[0])]
first = first.assign(token=[token_string(model.tokenizer, t) for t in first["token"]])
print(f"{len(table):,} rows; the first ones:")
print(first[["position", "token", "rank", "expert", "weight"]].head(6).round(2).to_string())

# %% [markdown]
# **Check**: what the experts of all ranks add, together, is what stands at the hook behind them.
# Where a model also has shared experts, which read every token, the rest is theirs. **Control**:
# the same sum with the experts of another token.

# %%
from lenslab.capture import harvest
from lenslab.moe.experts import expert_contributions

LAYER = routing.layers[len(routing.layers) // 2]
behind = [f"blocks.{LAYER}.hook_{name}" for name in ("mlp_out", "mixer_out", "out")]
SITE = next(hook for hook in behind if hook in model.hook_dict)
whole = harvest(model, seen, SITE)[SITE][seen.real]  # [token, d_model]
added = expert_contributions(model, seen, LAYER)  # [token, rank, d_model]
parts = added.sum(1)
apart = [float((whole - part).norm() / whole.norm()) for part in (parts, parts.roll(1, 0))]
print(f"{SITE}: relative difference {apart[0]:.3f}, with other tokens' {apart[1]:.1f}")

# %% [markdown]
# What the model says next, token by token, belongs to the same rows: so routes can be held against
# probability and loss.

# %%
from scipy.stats import spearmanr

from lenslab.moe.routing import predictions

said = predictions(model, seen)
known = said["loss"].notna()
sure = routing.weights[known, routing.layers.index(LAYER), 0]
told, null = spearmanr(sure, said["loss"][known]).statistic, 1.96 / known.sum() ** 0.5
print(f"loss {said['loss'].mean():.1f} nats a token; its rank correlation with the weight of the")
print(f"first expert at layer {LAYER}: {told:z.1f} (shuffled tokens: within {null:.1f})")

# %% [markdown]
# One call draws what a mixture does with any texts: `analyze_texts(texts, model, layer, expert)`;
# with `sae=` also what is below about an SAE.
#
# **Which layer, which expert?** By default the middle layer and the expert that most of these
# tokens go to. Section 2 says at which layers the context counts. Take an expert that section 6
# finds specialised beyond chance; one that is merely busy may be busy with everything.

# %%
from lenslab.show.routing import analyze_texts

figures = analyze_texts(seen.texts[:2], model)
print(list(figures))
figures["gates"].show()

# %% [markdown]
# The first expert of every layer, by number, its weight as colour:

# %%
figures["first experts"].show()

# %% [markdown]
# How the logits of each expert are spread over these tokens:

# %%
few = routing[routing.text < 2]
spread = few.logits[:, routing.layers.index(LAYER)].std(0)
print(f"layer {LAYER}: logits spread by {spread.min():.1f} to {spread.max():.1f}")
figures["logits"].show()

# %% [markdown]
# What the expert of each rank adds, as its length:

# %%
length = added.norm(dim=-1).median(0).values.tolist()
print("median length by rank:", [round(value, 1) for value in length])
figures["contributions"].show()

# %% [markdown]
# The neurons of one expert, at the tokens that are sent to it; elsewhere they do not exist.

# %%
figures["neurons"].show()

# %% [markdown]
# ### An SAE on what the experts write
# Sparse features of the same sum. The SAE that ships, where there is one for these weights; else a
# small one is trained now.

# %%
from lenslab.compare import open_saes
from lenslab.features.activations import encode_features
from lenslab.sae.find import bundled_saes, small_sae
from lenslab.sae.inputs import sae_hook
from lenslab.texts import sampled_text
from lenslab.tokens import pack

# %% [markdown]
# It reads the hook behind the experts.

# %%
opened = {}
try:
    opened, _ = open_saes(model, bundled_saes(model))
except ValueError as reason:
    print(str(reason)[:60], "...")
sae = next((sae for sae in opened.values() if sae_hook(sae) == SITE), None)
if sae is None:
    sae = small_sae(model, SITE, pack(model, sampled_text(200, model_name(model))), 100)
fa = encode_features(model, sae, seen)
print(f"{SITE}: {fa.matrix.nnz / len(fa.text):.0f} latents active at a token")

# %% [markdown]
# How important is a feature? By size: its mean over texts. By effect: the rise of the loss when it
# is set to zero, the SAE's error kept, in millinats a token. **Control**: as many features, drawn
# among the forty that fire on about as many texts.

# %%
from lenslab.circuits.interventions import ablate_features

size = np.asarray(fa.pool("mean").mean(0)).ravel()
fires = np.asarray((fa.pool("max") > 0).sum(0)).ravel()
top = np.argsort(-size, kind="stable")[:8]
near = np.argsort(np.abs(fires - np.median(fires[top])), kind="stable")
drawn = np.random.default_rng(0).choice(near[~np.isin(near, top)][:40], 8, replace=False)
effect = 1000 * ablate_features(model, sae, fa, [*top, *drawn]).mean(1)
print(f"millinats: largest {effect[:8].mean():.1f}, drawn {effect[8:].mean():.1f}")

# %% [markdown]
# In words (rank-sum test of the two eights), and one by one:

# %%
from scipy.stats import mannwhitneyu

from lenslab.show.plots import bars

p = mannwhitneyu(effect[:8], effect[8:], alternative="greater").pvalue
so(
    f"set to zero, the eight largest features raise the loss by {effect[:8].mean():.1f} millinats "
    f"each, eight others that fire on as many texts by {effect[8:].mean():z.1f}: that the largest "
    f"matter more is {'shown' if p < 0.05 else 'not shown'} (p {p:.2f})."
)

found = {"largest": np.sort(effect[:8])[::-1], "random": np.sort(effect[8:])[::-1]}
titles = {"x_title": "features, sorted", "y_title": "loss rises by, millinats a token"}
bars(found, title="Features of what experts write, set to zero", **titles).show()

# %% [markdown]
# Where the largest fire that do not fire everywhere, by kind of text:

# %%
from lenslab.show.feature_plots import text_feature_heatmap

some = np.flatnonzero((fires >= 4) & (fires <= len(seen) / 2))
partly = some[np.argsort(-size[some], kind="stable")][:8] if len(some) > 1 else top
print(f"{len(partly)} features, on {fires[partly].min()} to {fires[partly].max()} texts")
text_feature_heatmap(fa.pool("max")[:, partly], partly, look["category"]).show()

# %% [markdown]
# And which fire together, against firings shuffled between texts:

# %%
from lenslab.features.together import coactivation as feature_pairs

pairs = feature_pairs(fa.pool("max"), partly)
found = pairs.to_frame()
beyond = found[found["q"] < 0.05]
print(f"{len(beyond)} of {len(found)} pairs fire together beyond chance")
told = beyond[["feature", "other", "pmi"]].head(3).round(1)  # pmi: in nats
print(told.to_string(index=False) if len(told) else "so none is named")

# %% [markdown]
# ## 2. Context or token?
# 16 words and 8 symbols with three meanings each, twelve contexts for each meaning, in the same
# styles for every meaning of a word. The route of the word itself is read: what tells its meaning
# stands before it.

# %%
contexts = load_probes("contextual")
ends = contexts["start"] + contexts["target"].str.len()
upto = [text[:end] for text, end in zip(contexts["text"], ends, strict=True)]
reads = tokenize(model, upto)  # not cut: a cut text ends elsewhere
routes = capture_routing(model, reads)
last = np.flatnonzero(np.diff(routes.text, append=-1))  # of each text
print(f"{len(routes.ids):,} tokens; {len(last)} contexts that end in their word")

# %% [markdown]
# A word is dropped where it is no single token here, or where too few contexts are left of it.

# %%
spelled = [token_string(model.tokenizer, token) for token in routes.token[last].tolist()]
contexts["kept"] = spelled == contexts["token"]
number = contexts.groupby(["token", "meaning", "split"])["kept"].sum().groupby("token").min()
kept = (contexts["kept"] & contexts["token"].map(number >= 2)).to_numpy()
here, its = routes[last[kept]], contexts[kept].reset_index(drop=True)
print(f"{kept.sum()} of {len(kept)} contexts end in their word as one token")
print(f"{its['token'].nunique()} words, {its.groupby('token')['meaning'].nunique().sum()} meanings")

# %% [markdown]
# How far are the experts of one meaning from those of the word's other meanings (Jensen-Shannon
# divergence in bits; known as ICS)? Few contexts make every divergence too large, so chance is the
# same number with the meanings shuffled among a word's contexts; a little too high a chance, since
# the meanings share their styles and shuffled ones do not. **Control**: the random-weight twin,
# whose routers also see the context.

# %%
from lenslab.moe.statistics import contrast

word, meaning = its["token"].to_numpy(), its["meaning"].to_numpy()
ics = contrast(here, meaning, word, average=True)
twin = random_twin(model, label="random twin")
twin_routes = capture_routing(twin, reads)
twins = contrast(twin_routes[last[kept]], meaning, word, average=True)
print((ics.groupby("layer")[["value", "chance", "excess"]].mean().round(2) + 0.0).to_string())

# %% [markdown]
# The same divergence between a word and all other tokens of these texts (known as TIS), and the
# share of a word's slots that its one and its four most used experts have (`coverage`; with k
# experts a token, one has at most 1/k of them). Chance: other tokens of the same texts.

# %%
from lenslab.moe.statistics import token_statistics

ids = pd.unique(here.token)
tis = token_statistics(routes, ids)
of_twin = token_statistics(twin_routes, ids)
cover = tis.query("statistic != 'TIS'").groupby(["statistic", "token"])
cover = cover[["value", "chance", "excess"]].mean()
share = cover.groupby("statistic").mean()
share["half interval"] = 1.96 * cover["excess"].groupby("statistic").sem()  # over words
print(share.round(2).to_string())

# %% [markdown]
# Side by side, with the interval over words:

# %%
ICS, TIS, TWIN = "meaning", "token", ", random twin"
parts = {TIS: tis, TIS + TWIN: of_twin, ICS: ics, ICS + TWIN: twins}
for name in (TIS, TIS + TWIN):
    parts[name] = parts[name].query("statistic == 'TIS'").rename(columns={"token": "stratum"})
by_word = {n: t.pivot(index="stratum", columns="layer", values="excess") for n, t in parts.items()}
mean = {name: values.mean() for name, values in by_word.items()}
half = {name: 1.96 * values.sem() for name, values in by_word.items()}
spread = {name: (mean[name] - half[name], mean[name] + half[name]) for name in half}
print((pd.DataFrame(mean).round(2) + 0.0).to_string())
print("half intervals:", {name: round(float(each.max()), 2) for name, each in half.items()})

# %% [markdown]
# As a picture:

# %%
from lenslab.show.plots import heatmap, lines

titles = {"x_title": "layer", "y_title": "bits beyond chance"}
lines(mean, routing.layers, spread=spread, title="Token and meaning", **titles).show()

# %% [markdown]
# In words:

# %%
ours, theirs = mean[ICS], mean[ICS + TWIN]
beyond = (ics.groupby("stratum")["p"].min() < 0.05).sum()
apart = (ours - half[ICS] > theirs + half[ICS + TWIN]).sum()
so(
    f"routes differ more between tokens than between meanings at {(mean[TIS] > ours).sum()} of "
    f"{len(ours)} layers: by {mean[TIS].min():.1f} to {mean[TIS].max():.1f} bits beyond chance "
    f"(random twin {mean[TIS + TWIN].min():.1f} to {mean[TIS + TWIN].max():.1f}) against "
    f"{ours.max():z.2f} at most (random twin {theirs.max():z.2f}). At {apart} layers meaning moves "
    f"them more than in the twin, intervals over words apart; for {beyond} of {len(ids)} words it "
    "does so somewhere with p < .05, corrected."
)

# %% [markdown]
# ### One word
# The word whose meanings part most on the discovery half, seen on the held-out half, where nothing
# was chosen. A band is the contexts of one meaning that go from one expert to another.

# %%
from lenslab.show.routing import flows

discovery = (its["split"] == "discovery").to_numpy()
chosen = contrast(here[discovery], meaning[discovery], word[discovery], average=True)
chosen = chosen.groupby("stratum")["excess"].mean().idxmax()
rows = np.flatnonzero(~discovery & (word == chosen))
rows = rows[np.argsort(meaning[rows], kind="stable")]
one = contrast(here[rows], meaning[rows], average=True)
print(f"{chosen!r}, {len(rows)} held-out contexts; beyond chance by layer:")
print(one.set_index("layer")[["value", "chance", "p"]].round(2).T.to_string())

# %% [markdown]
# Its routes:

# %%
flows(here[rows], meaning[rows], f"Routes of {chosen!r} by its meaning").show()

# %% [markdown]
# The same without numbers of experts: in how many layers two contexts go to the same first expert.

# %%
experts, names = here[rows].ids[..., 0], meaning[rows]
alike = (experts[:, None] == experts[None]).mean(-1)  # [context, context]
same, other = names[:, None] == names[None], ~np.eye(len(rows), dtype=bool)
within, across = alike[same & other].mean(), alike[~same].mean()
print(f"first experts shared: {within:.2f} within a meaning, {across:.2f} across")

# %% [markdown]
# **Control**: meanings shuffled among the contexts of a style.

# %%
order, null = np.random.default_rng(0), []
by_style = pd.Series(names).groupby(its["style"].to_numpy()[rows])
for _ in range(200):
    mixed = by_style.transform(order.permutation).to_numpy()
    mixed = mixed[:, None] == mixed[None]
    null.append(alike[mixed & other].mean() - alike[~mixed].mean())
p = (1 + sum(gap >= within - across for gap in null)) / 201

# %% [markdown]
# In words, and as a picture:

# %%
so(
    f"held-out contexts of {chosen!r} share their first expert in {within:.0%} of the layers "
    f"within a meaning and in {across:.0%} across (p {p:.3f} with the meanings shuffled among "
    "contexts of a style)."
)
titles = {"x_title": "context, in the same order", "y_title": "context, by meaning"}
heatmap(alike, range(len(names)), names, title=f"Shared experts of {chosen!r}", **titles).show()

# %% [markdown]
# ## 3. Weight by rank and by position
# How a token's weight is shared, by layer: each rank's part of what its chosen experts have
# together. Ranks are sorted, so the first has more than an even share even where a router says
# nothing. **Control**: the random twin.

# %%
by_rank = {}
for name, its_routing in ((model_name(model), routing), ("twin", capture_routing(twin, seen))):
    together = its_routing.weights.sum(-1, keepdims=True).clip(1e-9)
    share = (its_routing.weights / together).mean(0)  # [layer, rank]
    ranks = [f"rank {rank + 1}" for rank in range(share.shape[1])]
    by_rank[name] = pd.DataFrame(share, routing.layers, ranks)
print(f"even shares: {1 / len(ranks):.2f}")
print(pd.concat(by_rank, axis=1).round(2).to_string())

# %% [markdown]
# Is a router surer late in a text than at its beginning? The first rank's weight after the tenth
# position, less its mean up to there, text by text; the interval is wide enough for all layers
# together.

# %%
from scipy.stats import norm

late = routing.position > 10
weight = pd.DataFrame(routing.weights[..., 0], columns=routing.layers)
by_text = weight.groupby([late, routing.text]).mean()
gap, wide = (by_text.loc[True] - by_text.loc[False]).dropna(), norm.ppf(1 - 0.025 / weight.shape[1])
early = weight[~late].mean()
late = pd.DataFrame({"later less early": gap.mean(), "half interval": wide * gap.sem()})
late["up to the tenth"] = early
print((late.round(2) + 0.0).to_string())

# %% [markdown]
# In words:

# %%
sure = late.index[late["later less early"].abs() > late["half interval"]].tolist()
most, least = (table["rank 1"] for table in by_rank.values())
shared = (
    f"of what a token's experts have together the first has {most.min():.0%} to {most.max():.0%} "
    f"(random twin {least.min():.0%} to {least.max():.0%}); along a text its weight changes at "
)
shared = shared if len(ranks) > 1 else "a token has one expert; along a text its weight changes at "
so(shared + f"{len(sure)} of {len(late)} layers by more than chance (interval without 0).")

# %% [markdown]
# By position, in fives; from 30 on together:

# %%
curve = weight.groupby(np.minimum(routing.position // 5 * 5, 30)).mean()
drawn = {f"layer {n}": curve[n] for n in (routing.layers[0], LAYER, routing.layers[-1])}
titles = {"x_title": "position in the text, from", "y_title": "weight of the first expert"}
lines(drawn, curve.index, title="Weight of the first expert, by position", **titles).show()

# %% [markdown]
# ## 4. How routing came about in training
# Where a record of it ships: the experts of the texts of section 1 at some steps of the training.

# %%
from lenslab.files import data_path
from lenslab.moe.routing import training_routing

steps, trace = {}, data_path("models", model_name(model), "routing.parquet")
if trace.is_file():
    steps = training_routing(trace, seen)
    ends = steps[max(steps)]
    shared = (ends.ids[..., 0] == routing.ids[..., 0]).mean()
    print(f"{len(steps)} checkpoints; the last has {shared:.0%} of this model's first experts")
    steps = steps if shared > 0.9 else {}  # else of other weights
if not steps:
    print("No record of the training of these weights is at hand.")

# %% [markdown]
# Of two checkpoints: the share of tokens with the same first expert. **Chance**: the same loads,
# independent.

# %%
agreement = {}
for step, then in steps.items():
    for name, other in (("the first", steps[min(steps)]), ("the last", steps[max(steps)])):
        same = (then.ids[..., 0] == other.ids[..., 0]).mean(0)
        loads = [np.eye(then.n_experts)[r.ids[..., 0]].mean(0) for r in (then, other)]
        agreement[step, f"like {name}"] = same.mean()
        agreement[step, f"like {name}, chance control"] = (loads[0] * loads[1]).sum(-1).mean()
agreement = pd.Series(agreement, dtype=float)
agreement = agreement.unstack() if steps else pd.DataFrame()
print(agreement.iloc[:: max(len(steps) // 6, 1)].round(2).to_string() if steps else "none")

# %% [markdown]
# When was a route settled? At the first checkpoint from which on nine tenths of its agreement with
# the last one, beyond chance, are there.

# %%
if steps:
    now, chance = (agreement[f"like the last{part}"] for part in ("", ", chance control"))
    saturated = ((now - chance) / (1 - chance)).ge(0.9)
    step = next(s for s in agreement.index if saturated[agreement.index >= s].all())
    settled = f"nine tenths of the final routes are there from step {step} on"
    if step == max(steps):
        settled = f"no record before the last has nine tenths of its routes (step {step})"
    so(
        f"at the last record {agreement['like the first'].iloc[-1]:.0%} of first experts are those "
        f"of the first record (chance {agreement['like the first, chance control'].iloc[-1]:.0%}); "
        f"{settled}."
    )
else:
    so("of this model's training there is no record, so when its routes settled cannot be told.")

# %% [markdown]
# As curves:

# %%
if steps:
    titles = {"x_title": "step, and one", "y_title": "share of first experts that are the same"}
    options = {"log_x": True, "title": "Routes in training"} | titles
    lines(dict(agreement.items()), agreement.index + 1, **options).show()

# %% [markdown]
# And the experts of the token that occurs most often, at one layer; each row is an expert.

# %%
if steps:
    frequent, at = np.bincount(routing.token).argmax(), routing.layers.index(LAYER)
    mine = {s: r.ids[r.token == frequent, at].ravel() for s, r in steps.items()}
    parts = [np.bincount(e, minlength=routing.n_experts) for e in mine.values()]
    parts = [counts * routing.ids.shape[2] / counts.sum() for counts in parts]
    name = token_string(model.tokenizer, int(frequent))
    print(f"{name!r}: sent to its commonest expert {max(parts[0]):.0%} of the time, then ", end="")
    print(f"{max(parts[-1]):.0%}")
    titles = {"title": f"Experts of {name!r}, layer {LAYER}", "x_title": "step"}
    shares = np.array(parts).T  # [expert, step]
    heatmap(shares, list(mine), range(routing.n_experts), y_title="expert", **titles).show()

# %% [markdown]
# ## 5. Load, and who fires with whom
# From here on 420 texts of seven kinds. Load: a multiple of the fair share; as divergence from even
# loads in bits, chance being as many slots drawn evenly. `excess` is value less chance, `low` to
# `high` its 95 % interval over texts, here and in the tables below.

# %%
from lenslab.moe.routing import router_weights
from lenslab.moe.statistics import balance, coactivation, load, router_geometry

probes = load_probes("categories")
batch = tokenize(model, probes["text"].tolist(), truncate=True)
full = capture_routing(model, batch, inputs=True)
kinds = probes["category"].to_numpy()[full.text]
loads, even = load(full), balance(full)
columns = ["value", "chance", "excess", "low", "high"]
shown = even.query("statistic == 'divergence'").set_index("layer")[columns]
print(f"{len(full.ids):,} tokens; loads {loads['value'].min():.1f} to {loads['value'].max():.1f}")
print(shown.round(2).to_string())

# %% [markdown]
# Pairs of experts: the smaller of the two conditional probabilities, which is 1 for a pair that is
# never apart, whatever its ranks. Chance: experts drawn with the same loads, as many a token.
# **Control**: the random twin, whose routers read inputs that are alike, too.

# %%
together = pd.DataFrame({"q": [], "excess": []})
if full.ids.shape[2] > 1:
    together, control = coactivation(full), coactivation(capture_routing(twin, batch))
    best = together.loc[together["excess"].idxmax()]
    print(f"layer {best['layer']:.0f}: {best['expert']:.0f} and {best['other']:.0f} ", end="")
    print(f"together {best['value']:.2f}, by chance {best['chance']:.2f} (q {best['q']:.2f})")
else:
    print("A token has one expert: none fires together with another.")

# %% [markdown]
# And the routers' rows: how far from right angles, beside rows of normal numbers.

# %%
angles = router_geometry(router_weights(model)).assign(layer=full.layers).set_index("layer")
print(angles[columns].round(1).to_string())

# %% [markdown]
# In words:

# %%
uneven = (shown["low"] > 0).sum()
tables = (together, control) if len(together) else ()
paired = [f"{((t['q'] < 0.05) & (t['excess'] > 0)).mean():.0%}" for t in tables]
paired = (
    f"{paired[0]} of pairs (random twin {paired[1]})"
    if paired
    else "no pairs, where a token has one,"
)
so(
    f"loads are less even than drawn slots at {uneven} of {len(shown)} layers, by up to "
    f"{shown['excess'].max():.2f} bits; {paired} of experts fire together more than their loads "
    f"make them (q < .05); routers are off right angles beyond normal rows "
    f"at {(angles['p'] < 0.05).sum()} of {len(angles)} layers."
)

# %% [markdown]
# Loads by layer:

# %%
grid = loads.pivot(index="layer", columns="expert", values="value")
titles = {"x_title": "expert", "y_title": "layer", "title": "Load (1: fair share)"}
heatmap(grid.to_numpy(), grid.columns, grid.index, **titles).show()

# %% [markdown]
# ## 6. What are experts for?
# **Routing signatures**: how far the experts of one kind of text are from those of the other kinds.
# Chance: kinds shuffled among texts, so loads are the same.

# %%
signature = contrast(full, kinds)
wide = signature.pivot(index="label", columns="layer", values="excess")
print(wide.round(2).to_string())

# %% [markdown]
# **Specialisation**, in bits: what an expert's slots say of the kind. A linear router with random
# weights also tells kinds apart, since what it reads does. So chance is 200 random linear routers
# on the same inputs, their biases tuned to the same loads; `p` is of these draws, corrected for all
# layers and experts. On every third token.

# %%
from lenslab.moe.experts import specialisation

some = np.arange(0, len(full.ids), 3)
special = specialisation(full[some], {"kind": kinds[some]})
layers_, each = (special[special["expert"].lt(0) == whole] for whole in (True, False))
shown = layers_.set_index("layer")[[*columns, "p"]]
print(shown.round(2).to_string())

# %% [markdown]
# The experts that stand out:

# %%
usual = pd.Series(kinds).value_counts(normalize=True)
out = each[each["p"] < 0.02].nlargest(6, "excess").sort_values(["layer", "expert"])
for _, row in out.iterrows():
    slots = (full.ids[:, full.layers.index(row["layer"])] == row["expert"]).any(1)
    parts = pd.Series(kinds[slots]).value_counts(normalize=True)
    print(f"layer {row['layer']:.0f} expert {row['expert']:.0f}: {parts.index[0]} ", end="")
    print(f"{parts.iloc[0]:.0%} of its tokens, of all {usual[parts.index[0]]:.0%}")
print(f"of {(each['p'] < 0.02).sum()} of {len(each)} that have p < .02")

# %% [markdown]
# In words:

# %%
surely = (layers_["p"] < 0.02).sum()
strong = (signature["p"] < 0.05).sum()
so(
    f"{strong} of {len(signature)} pairs of kind and layer have a routing signature beyond "
    f"shuffled kinds; but beyond random linear routers with the same loads {surely} of "
    f"{len(layers_)} layers and {(each['p'] < 0.02).sum()} of {len(each)} experts are specialised "
    f"(p < .02, corrected); random ones reach "
    f"{layers_['chance'].mean() / layers_['value'].mean():.0%} of the bits."
)

# %% [markdown]
# Layer by layer, beside the random routers:

# %%
drawn = {"routers": layers_["value"], "random routers": layers_["chance"]}
titles = {"x_title": "layer", "y_title": "bits about the kind, per slot"}
bars(drawn, list(full.layers), title="What a slot says of the kind of text", **titles).show()

# %% [markdown]
# ## 7. Paths through the layers
# A path is the first expert of one layer after the other. How many are there, and do a few carry
# most tokens? `paths`, and how many of them cover most tokens, for each token; `top`: the share of
# tokens on the commonest. Chance: each layer's experts shuffled among tokens.

# %%
from dataclasses import replace

from lenslab.moe.paths import continuity, path_clusters, path_coverage, paths_as_experts

cover = path_coverage(full)
through = cover[cover["layer"] == full.layers[-1]].set_index("statistic")[columns]
through.iloc[:3] /= len(full.ids)  # of paths: how many for each token
print(through.round(2).to_string())

# %% [markdown]
# Tokens that keep an expert's number in the next layer (known as EC). Numbers are arbitrary, so it
# says something only in a model whose layers share a router. **Control**: the experts of each layer
# numbered anew, twenty times.

# %%
stays, draw = continuity(full).set_index("layer")[["value"]], []
random = np.random.default_rng(0)
for _ in range(20):
    names = [np.append(random.permutation(full.n_experts), -1) for _ in full.layers]  # -1: none
    ids = np.stack([n[full.ids[:, i]] for i, n in enumerate(names)], 1)
    draw.append(continuity(replace(full, ids=ids))["value"])
stays["anew, least"], stays["anew, most"] = np.min(draw, 0), np.max(draw, 0)
print(stays.round(2).to_string())

# %% [markdown]
# What neighbouring layers tell of each other, whatever the numbers: mutual information of their
# first experts, in bits. **Controls**: tokens shuffled, and shuffled among those with the same id:
# what the token decides in both layers is left in there. Only tokens that occur ten times or more
# are read: shuffled among few, a token would keep its experts.

# %%
from itertools import pairwise

from sklearn.metrics import mutual_info_score

tops, random, rows = full.ids[..., 0].T, np.random.default_rng(0), []
often = np.isin(full.token, np.flatnonzero(np.bincount(full.token) >= 10))
for a, b in pairwise(tops[:, often]):
    same = pd.Series(b).groupby(full.token[often]).transform(random.permutation)
    others = {"bits": b, "same token": same, "shuffled": random.permutation(b)}
    rows.append({name: mutual_info_score(a, one) / np.log(2) for name, one in others.items()})
bits = pd.DataFrame(rows, [f"{a} to {b}" for a, b in pairwise(full.layers)])
print(bits.round(2).to_string())

# %% [markdown]
# The transitions of the middle layer, as shares of all tokens:

# %%
at = full.layers.index(LAYER)
counts = np.histogram2d(*tops[at - 1 : at + 1], bins=np.arange(full.n_experts + 1))[0]
names, titles = range(full.n_experts), {"y_title": f"expert of layer {full.layers[at - 1]}"}
titles |= {"x_title": f"expert of layer {LAYER}", "title": "From layer to layer: share of tokens"}
heatmap(counts / counts.sum(), names, names, **titles).show()

# %% [markdown]
# Common paths through three layers, as if each were an expert: which tokens take them, and which
# kinds?

# %%
window = full.layers[-3:]
as_experts, paths = paths_as_experts(full, window, 5)
for number in range(min(4, len(paths))):
    on = np.flatnonzero(as_experts.ids[:, 0, 0] == number)
    text = pd.Series([token_string(model.tokenizer, t) for t in full.token[on].tolist()])
    kind = pd.Series(kinds[on]).value_counts(normalize=True)
    common = sorted(text.value_counts().index[:3])
    print(f"{'-'.join(map(str, paths[number]))}: {len(on) / len(kinds):.1%} of tokens, ", end="")
    print(f"{kind.iloc[0]:.0%} of them {kind.index[0]}; {common}")

# %% [markdown]
# Are kinds, and languages, told apart by these paths, beyond shuffled labels? Their tokens differ,
# too: that is not taken away here.

# %%
language = probes["language"].to_numpy()[full.text]
foreign = np.isin(kinds, ["non_english"])
by_kind = contrast(as_experts, kinds).set_index("label")
by_language = contrast(as_experts[foreign], language[foreign]).set_index("label")
both = pd.concat({"kind": by_kind, "language": by_language})
both["beyond chance"] = both["p"] < 0.05
print(both[["value", "chance", "low", "high", "beyond chance"]].round(2).to_string())

# %% [markdown]
# Clusters of whole paths, by the share of layers in which they differ (HDBSCAN). Chance: the same
# on shuffled layers, whose clusters are accidents.

# %%
clustered, centres, found = path_clusters(full)
found = found.iloc[0]
print(f"clusters have {found['value']:.1f} of the tokens, by chance {found['chance']:.1f}")
rows = []
for number in range(min(6, len(centres))):
    for on in np.flatnonzero(clustered.ids[:, 0, 0] == number)[:4]:
        text, end = int(clustered.text[on]), int(clustered.position[on]) + 1
        context = "".join(batch.strings(text)[max(end - 8, 0) : end - 1])
        token = token_string(model.tokenizer, int(clustered.token[on]))
        rows.append({"cluster": number, "before": context, "token": token})
HTML(pd.DataFrame(rows).to_html(index=False))

# %% [markdown]
# In words:

# %%
so(
    f"there are {through.loc['paths', 'value']:.2f} paths for each token where independent layers "
    f"would give {through.loc['paths', 'chance']:.2f}; the ten commonest carry "
    f"{through.loc['top 10', 'value']:.1%} ({through.loc['top 10', 'chance']:.1%}); neighbouring "
    f"layers share {bits['bits'].mean():.1f} bits, {bits['same token'].mean():.1f} of them by the "
    f"token alone ({bits['shuffled'].mean():.1f} shuffled); "
    f"{(by_kind['p'] < 0.05).sum()} of {len(by_kind)} kinds and {(by_language['p'] < 0.05).sum()} "
    f"of {len(by_language)} languages differ in their common paths; clusters "
    + ("hold more" if found["low"] > 0 and found["p"] < 0.2 else "do not surely hold more")
    + " tokens than in each of five shuffles."
)

# %% [markdown]
# A picture of paths (t-SNE of the same distances): for the eye only, nothing is measured on it.

# %%
from sklearn.manifold import TSNE

from lenslab.show.plots import scatter

few = np.arange(0, len(full.ids), max(len(full.ids) // 300, 1))
layout = TSNE(metric="hamming", init="random", random_state=0).fit_transform(tops.T[few])
marked = signature.groupby("label")["excess"].mean().idxmax()
options = {"marked": kinds[few] == marked, "marked_name": marked}
titles = {"x_title": "t-SNE 1", "y_title": "t-SNE 2", "title": "Paths that are alike lie together"}
print(f"{len(few):,} tokens, {marked} marked: the kind whose routes are farthest from the others'")
scatter(*layout.T, **options, **titles).show()

# %% [markdown]
# ## 8. What foretells a route?
# The first expert, foretold from one thing at a time. Fitted on half of the texts, scored on the
# other half; chance is always naming the expert that was most frequent. Below, the lead over chance
# and its interval, means over layers.

# %%
from lenslab.moe.paths import predict_experts, predict_from_dimensions

told = predict_experts(full, kinds)
by_predictor = told.pivot(index="layer", columns="predictor", values="value")
by_predictor["chance"] = told.groupby("layer")["chance"].first()
print(by_predictor.round(2).to_string())
print(told.groupby("predictor")[["excess", "low", "high"]].mean().round(2).to_string())

# %% [markdown]
# And from what the router reads: a logistic regression on some of its dimensions, the largest or
# as many random ones. All these are lower bounds: a token that the fitted half does not have is
# guessed, and the regression is fitted on few tokens, while a router's scores are linear in what it
# reads (in some families with a bias or groups).

# %%
few = full[np.arange(0, len(full.ids), 4)]
probe = predict_from_dimensions(few, shares=(0.02, 0.1, 1.0))
by_share = probe.groupby(["dimensions", "share"])[columns].mean()
print(by_share.round(2).to_string())

# %% [markdown]
# How far the largest are ahead of random ones:

# %%
largest, drawn = (probe[probe["dimensions"] == name] for name in ("largest", "random"))
ahead = (largest["value"].to_numpy() - drawn["value"].to_numpy()).reshape(-1, 3)
ahead = pd.DataFrame(ahead, full.layers, [f"{share:.0%}" for share in (0.02, 0.1, 1.0)])
print((ahead.round(1) + 0.0).to_string())

# %% [markdown]
# In words:

# %%
means_ = by_predictor.mean()
gain = told.query("predictor == 'bigram'").set_index("layer")["value"] - by_predictor["token"]
so(
    f"on held-out texts the token alone foretells {means_['token']:.0%} of first experts (chance "
    f"{means_['chance']:.0%}), with the token before it {100 * gain.mean():+z.0f} points, the "
    f"kind of text {means_['kind']:.0%}, the position {means_['position']:.0%}; what the router "
    f"reads {by_share.loc[('largest', 1.0), 'value']:.0%}, a tenth of it "
    f"{by_share.loc[('largest', 0.1), 'value']:.0%} (the largest dimensions) and "
    f"{by_share.loc[('random', 0.1), 'value']:.0%} (random ones)."
)

# %% [markdown]
# Predictor by predictor:

# %%
drawn = {name: by_predictor[name] for name in ("token", "kind", "position")}
drawn["chance (control)"] = by_predictor["chance"]
titles = {"x_title": "layer", "y_title": "share foretold on held-out texts"}
lines(drawn, full.layers, title="What foretells the first expert", **titles).show()

# %% [markdown]
# ## 9. Keep it
# As safetensors, in half the bytes, with the error that makes, and as Parquet for any program.

# %%
import torch

from lenslab.files import outputs_path
from lenslab.moe.routing import load_routing

file = outputs_path("results", "phase_5_routing.safetensors")
error = full.save(file, torch.bfloat16)
again = load_routing(file)
same = np.array_equal(again.ids, full.ids)
file.with_suffix(".parquet").parent.mkdir(parents=True, exist_ok=True)
full.to_frame().to_parquet(file.with_suffix(".parquet"), index=False)
worst = {name: f"{value / np.abs(getattr(full, name)).max():.1%}" for name, value in error.items()}
so(
    f"ids come back {'the same' if same else 'CHANGED'}; the largest error of bfloat16, of the "
    f"largest value: {worst}."
)

# %% [markdown]
# ## What was found, and what was not
# **Found**: what the lines that begin with *So:* say. Section 2 says whether a word is routed by
# what it means there; section 6, how much of what looks like specialisation random routers have
# too; section 7, whether there are paths; section 8, how much of a route the token alone decides.
#
# **Not shown**: that an expert *causes* anything: what happens without it is another question
# (phase 6). The meanings are those of 24 words, in contexts that were written for this; a word's
# contexts share a style, not all else. A router may split a kind of text by something that
# correlates with it. Random routers are linear, as these routers are, and see the same inputs, but
# those inputs were made by layers that routed. That kinds or languages are routed apart by more
# than their tokens is not shown. Where a token goes to several experts, paths and predictors follow
# the first. Clusters and paths of few tokens are not shown, which does not mean that there are
# none.
#
# **Exercises**
# 1. Draw `analyze_texts` for an expert that section 6 names. Do its neurons agree with its kind?
# 2. Are the meanings of symbols told apart at other layers than those of words?
# 3. Foretell the *second* expert. Is it easier or harder than the first?
#
# <details><summary>Solutions</summary>
#
# 1. `some = probes.query("category == 'python'")["text"].tolist()`, or another kind, then
#    `analyze_texts(some, model, layer, expert)["neurons"].show()` with the numbers printed there,
#    beside the same for texts of another kind.
# 2. `ics[ics["stratum"].str.strip().str.isalpha()].groupby("layer")["excess"].mean()`, then with
#    `~`: nearly all of it is symbols.
# 3. `predict_experts(replace(full, ids=full.ids[..., 1:], weights=full.weights[..., 1:]))`: harder.
#    It takes a model with two experts a token.
# </details>
