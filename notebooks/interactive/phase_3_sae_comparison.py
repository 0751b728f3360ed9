# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Phase 3: do two SAEs tell the same story?
#
# **What you will learn**: how SAEs of several layers, streams, widths and seeds compare on the same
# texts; how far apart two numbers must lie before they mean anything; which features two SAEs
# share, beyond what the data alone makes alike; where a well-known trend over layers may come from;
# whether a feature for a kind of text follows its syntax or its topic; whether a selective feature
# matters to the model; and what a second model says to the same questions.
#
# **Runs on** the bundled `pocket-gpt` and its SAEs, offline; the README says how long it takes and
# how much memory. For another model set `LENSLAB_MODEL`. Sections that need what a model has not
# (more seeds, layers, a second model) say so and go on.
#
# **How to read it**: one question per section, then code, a printed check, the control, a picture.
# Lines that begin with *So:* say what was found, whatever model you run.

# %% [markdown]
# ## 1. The instrument
# The model, and 420 texts of seven kinds, half of them held out, as in phase 2.

# %%
import numpy as np
import pandas as pd
import torch

from lenslab.models import load_model, model_name, random_twin
from lenslab.show.images import set_up_figures
from lenslab.show.words import so
from lenslab.texts import label_texts, load_probes
from lenslab.tokens import tokenize

# %% [markdown]
# It is loaded; the texts become tokens.

# %%
set_up_figures()
model = load_model()
labels = label_texts(load_probes("categories"))
batch = tokenize(model, list(labels.texts), truncate=True)
labels = labels.with_lengths(batch.real.sum(1).numpy())
print(f"{len(batch)} texts of {len(labels.categories)} kinds, {batch.n_real} real tokens")

# %% [markdown]
# Several SAEs by name. One that is missing, damaged or of another model is named with the reason
# and, where it can be fetched, the command for that; the comparison goes on with the rest.

# %%
from lenslab.compare import comparable_saes, open_saes
from lenslab.sae.find import find_sae

SAES = None  # or a list of bundled names, folders, or (release, id) of the hub
try:
    saes, missing = open_saes(model, SAES or comparable_saes(model))
except ValueError as reason:
    if SAES:
        raise
    found = find_sae(model)  # of the middle layer, trained now where there is none
    saes, missing = {found.name: found.sae}, {}
    print(f"{reason} Instead: {found.origin}.")

# %% [markdown]
# What was left out:

# %%
left_out = [f"{name}: {reason}" for name, reason in missing.items()]
print(f"{len(saes)} SAEs; left out:", "\n".join(left_out) or "none")

# %% [markdown]
# Each reads one stream of one layer. Read most closely is the one of the residual stream after the
# middle block.

# %%
import re

from lenslab.sae.inputs import input_transform, sae_hook

hook = {name: sae_hook(sae) for name, sae in saes.items()}
site = {n: re.match(r"(?:blocks\.(\d+)\.)?(.*)", where) for n, where in hook.items()}
layer = {name: int(found[1] or 0) for name, found in site.items()}
stream = {name: found[2].removeprefix("hook_") for name, found in site.items()}
near = [name for name in saes if layer[name] == model.cfg.n_layers // 2]
main = next((name for name in near if "resid" in stream[name]), [*near, *saes][0])
whole = f"{model_name(model)}-{main}"  # its name among those that ship
print(f"{model_name(model)}: {', '.join(saes)}; read most closely: {main}")

# %% [markdown]
# The model runs once; every SAE encodes every real token.

# %%
from lenslab.capture import harvest
from lenslab.features.activations import encode_saes

fas = encode_saes(model, saes, batch)
pooled = {name: fa.pool("max") for name, fa in fas.items()}
values = harvest(model, batch, sorted(set(hook.values())))
inputs = {n: input_transform(sae, model)(values[hook[n]][batch.real]) for n, sae in saes.items()}
active = {name: round(fa.matrix.nnz / len(fa.text), 1) for name, fa in fas.items()}
print(f"at {len(values)} hooks; active latents per token:", active)

# %% [markdown]
# Which of them stand in for which question. Of one site, architecture and width, and as sparse:
# they differ by their seed. Of one site and architecture: by their width. And one for each site.

# %%
width, made = {n: s.cfg.d_sae for n, s in saes.items()}, {}
made |= {n: s.cfg.architecture() for n, s in saes.items()}
same = [n for n in saes if (hook[n], made[n]) == (hook[main], made[main])]
gap = {name: abs(active[name] - active[main]) / max(active[main], 0.1) for name in same}
seeds = [main] + [n for n in same if width[n] == width[main] and gap[n] < 0.2 and n != main]
by_width = {width[n]: n for n in reversed(same)} | {width[main]: main}
widths = [by_width[number] for number in sorted(by_width)]
first = {hook[name]: name for name in reversed(saes)} | {hook[main]: main}
places = sorted(first.values(), key=lambda name: (stream[name], layer[name]))
print(f"seeds: {seeds}\nwidths: {widths}\nplaces: {places}")

# %% [markdown]
# ## 2. Side by side, and the smallest difference that counts
# From the cards where there are any, else from these texts. `l0`: active latents per token; `fvu`:
# fraction of variance unexplained; `null`: the variance that random directions *explain*;
# `ce_difference`: nats per token that the model's loss rises by with the reconstruction in place;
# `dead`: latents that never fire; `dense`: those that fire at more than 10 % of tokens.

# %%
from lenslab.models import model_key
from lenslab.sae.find import card_table

cards = card_table(model)
cards["sae"] = cards["sae"].str.removeprefix(f"{model_name(model)}-")
cards = cards[cards["ships"].astype(bool)].set_index("sae")
theirs = {sae.cfg.metadata.model_key for sae in saes.values()}
if theirs == {model_key(model)} and set(saes) <= set(cards.index):
    cards, measured = cards.loc[list(saes)], "on held-out documents, from their cards"
else:
    cards, measured = pd.DataFrame(), "on every twentieth of these texts"

# %% [markdown]
# Cards are of the weights that an SAE was trained on; with others it is measured now.

# %%
from lenslab.sae.controls import evaluate_null
from lenslab.sae.evaluate import evaluate_sae

if cards.empty:
    few = batch[::20]
    rows = [evaluate_sae(model, sae, few, name).to_frame() for name, sae in saes.items()]
    cards = pd.concat(rows).set_index("sae")
    null = {n: evaluate_null(model, saes[n], few, cards.loc[n, "l0"]) for n in places}
    cards["null"] = pd.Series({name: each.variance_explained for name, each in null.items()})
cards["fvu"] = 1 - cards["variance_explained"]
print(measured)
print(cards[["l0", "fvu", "null", "ce_difference", "dead", "dense"]].round(2).to_string())

# %% [markdown]
# **Control**: SAEs that differ by nothing but their seed. Two trainings must lie further apart than
# the 95 % prediction interval of the difference of two such, or reseeding is explanation enough.

# %%
from lenslab.stats import smallest_difference

by_place = {}
for metric in ("l0", "fvu", "ce_difference"):
    least = smallest_difference(cards.loc[seeds, metric].to_numpy())
    by_place[metric] = least, np.ptp(cards.loc[places, metric])
    known = f"tells apart {least:.3f}" if len(seeds) > 1 else "one seed"
    differ = f"{len(places)} places differ by {by_place[metric][1]:.3f}"
    print(f"{metric:14s} {known}; {differ if len(places) > 1 else 'one place'}")

# %% [markdown]
# In words:

# %%
so(
    f"a difference in FVU of more than {by_place['fvu'][0]:.3f} is more than reseeding gives "
    f"({len(seeds)} seeds at one site); places, which hold other things to rebuild, differ by up "
    f"to {by_place['fvu'][1]:.2f}."
    if len(seeds) > 1
    else "there is one seed, so how much two SAEs differ by chance cannot be told."
)

# %% [markdown]
# Reconstruction at each place.

# %%
from lenslab.show.plots import bars

drawn = {"FVU": cards.loc[places, "fvu"]}
drawn["FVU of random directions"] = 1 - cards.loc[places, "null"]
titles = {"x_title": "SAE", "y_title": "FVU (lower is better)"}
bars(drawn, places, title="What each SAE leaves unexplained", **titles).show()

# %% [markdown]
# ## 3. A feature for each kind: does depth, or the stream, make a difference?
# Per SAE and kind of text the feature with the best AUROC on the discovery half, scored on the
# held-out half, corrected over all SAEs and kinds together. `ceiling`: logistic regression on the
# same activations. Beside it the older rule, texts strong inside minus texts strong outside at a
# threshold of 5.0, and as `half` with half of a feature's own largest value.

# %%
from lenslab.features.ceiling import supervised_directions
from lenslab.features.ranking import count_specialists_null
from lenslab.features.specialists import discriminate
from lenslab.metrics import auroc

best = discriminate({name: pooled[name] for name in dict.fromkeys(places + seeds)}, labels)
aurocs = best.pivot(index="sae", columns="category", values="auroc")

# %% [markdown]
# Per place: the mean over kinds, the ceiling, and the older rule at both thresholds.

# %%
rows, held, text = [], labels.held_out, fas[main].text
for name in places:
    vectors = np.stack([inputs[name][text == i].mean(0).numpy() for i in range(len(batch))])
    fitted = supervised_directions(vectors, labels)["logistic regression"][held]
    top = [auroc(fitted[:, c], labels.inside[held, c]) for c in range(fitted.shape[1])]
    sums = best[best["sae"] == name].agg({"auroc": "mean", "discriminating": "sum"})
    rows.append({"sae": name, "feature": sums["auroc"], "ceiling": np.mean(top)} | dict(sums[1:]))
    for key, cut in (("at 5.0", 5.0), ("half", "half")):
        null = count_specialists_null(pooled[name], labels.category, cut, n=10)
        rows[-1] |= {f"{key}": null.observed, f"{key} shuffled": null.mean_null}
by_sae = pd.DataFrame(rows).set_index("sae").astype({"discriminating": int})
print(by_sae.round(2).to_string())

# %% [markdown]
# Is a difference between places more than one between seeds? The largest of several differences is
# large by chance more often than one: the level is divided by how many there are.

# %%
reseeds = best[best["sae"].isin(seeds)].groupby("sae")["auroc"].mean()
least = smallest_difference(reseeds.to_numpy())
print(f"over seeds of {main}:", reseeds.round(3).tolist())

# %% [markdown]
# Against that:

# %%
along = [n for n in places if stream[n] == stream[main]]
groups = {"all places": by_sae["feature"]}
groups |= {f"the layers at {stream[main]}": by_sae.loc[along, "feature"]}
told = []
for where, means in ((w, m) for w, m in groups.items() if len(m) > 1):
    pairs, gap = len(means) * (len(means) - 1) // 2, np.ptp(means)
    limit = smallest_difference(reseeds.to_numpy(), 1 - 0.05 / pairs)
    little = f"too little to tell with {len(seeds)} seeds ({limit:.2f})"
    against = f"more than reseeding can give ({limit:.2f})" if gap > limit else little
    against = against if len(seeds) > 1 else "which one seed cannot judge"
    told.append(f"between {where} it differs by up to {gap:.3f}, {against}")

# %% [markdown]
# In words:

# %%
reseeded = f"and over seeds of {main} {reseeds.min():.2f} to {reseeds.max():.2f}"
reseeded = reseeded if len(seeds) > 1 else f"and {main} has one seed"
so(
    f"by the older rule {by_sae['at 5.0'].min():.0f} to {by_sae['at 5.0'].max():.0f} of "
    f"{len(labels.categories)} kinds have a specialist, and under shuffled labels "
    f"{by_sae['at 5.0 shuffled'].min():.1f} to {by_sae['at 5.0 shuffled'].max():.1f}. Held out, "
    f"the best features' mean AUROC is {by_sae['feature'].min():.2f} "
    f"({by_sae['feature'].idxmin()}) to {by_sae['feature'].max():.2f} "
    f"({by_sae['feature'].idxmax()}), {reseeded}: {'; '.join(told) or 'there is one place'}. "
    f"The ceiling is {by_sae['ceiling'].min():.2f} to {by_sae['ceiling'].max():.2f}."
)

# %% [markdown]
# Over the layers, a line for each stream; the bar is from the least to the most of several seeds,
# the dotted line is chance.

# %%
from lenslab.show.plots import heatmap, lines

curves, at, spread = {}, {}, {}
for line in dict.fromkeys(stream[name] for name in places):
    sites = [name for name in places if stream[name] == line]
    curves[line] = by_sae.loc[sites, "feature"].to_numpy()
    at[line] = [layer[name] for name in sites]
    ends = [reseeds if name == main else curves[line][[i]] for i, name in enumerate(sites)]
    spread[line] = [e.min() for e in ends], [e.max() for e in ends]
titles = {"x_title": "layer", "y_title": "mean held-out AUROC over kinds", "reference": 0.5}
figure = lines(curves, at, spread=spread, title="Best features by layer and stream", **titles)
figure.update_xaxes(dtick=1).show()

# %% [markdown]
# By kind: a kind is told apart *always*, *sometimes* or *never* over the places; and for every SAE
# the kind that it tells best, with how many other kinds come within .01 of that.

# %%
told = best[best["sae"].isin(places)].pivot(
    index="category", columns="sae", values="discriminating"
)
for word, which in (("always", told.all(axis=1)), ("never", ~told.any(axis=1))):
    print(f"{word}: {', '.join(told.index[which]) or 'none'}")

# %% [markdown]
# **Control**: as many kinds may be told apart without a trained model. An SAE on the random-weight
# twin:

# %%
twin = random_twin(model)
twin_sae = find_sae(twin).sae
twin_fa = encode_saes(twin, {"twin": twin_sae}, batch)["twin"]
by_twin = discriminate(twin_fa.pool("max"), labels, n=200)["discriminating"].sum()
print(f"the random twin's SAE tells {by_twin} of {len(told)} kinds apart")

# %% [markdown]
# Sometimes, and the kind that each SAE tells best:

# %%
some = told.any(axis=1) & ~told.all(axis=1)
print("sometimes:", ", ".join(f"{k} ({told.loc[k].sum()}/{len(places)})" for k in told.index[some]))
here = aurocs.loc[places]
for name in places:
    near = int((here.loc[name] >= here.loc[name].max() - 0.01).sum()) - 1
    print(f"{name:10s} best {here.loc[name].idxmax()} {here.loc[name].max():.2f}, {near} as good")
so(
    f"{told.all(axis=1).sum()} of {len(told)} kinds are told apart at every place, "
    f"{(~told.any(axis=1)).sum()} at none; the random twin's SAE tells {by_twin} apart."
)

# %% [markdown]
# Every kind at every place.

# %%
axes = {"x_title": "kind of text", "y_title": "SAE"}
title = "Held-out AUROC of the best feature"
heatmap(here.to_numpy(), list(here.columns), list(here.index), title=title, **axes).show()

# %% [markdown]
# ## 4. Coverage, peaks, and how unequal they are
# Features of different layers have different scales: a peak is also given in mean norms of the
# vectors that the SAE reads, less their mean. `peak/top 5`: the largest peak as a share of the five
# largest together, .2 where all are equal. `coverage`: share of texts on which the most frequent
# feature fires; `by chance`: if it fired as often, but anywhere. *Gini* of the five largest peaks:
# 0 where all are equal.

# %%
rows, lengths = [], batch.real.sum(1).numpy()
for name in dict.fromkeys(places + seeds):
    largest = np.sort(pooled[name].max(axis=0).toarray().ravel())[-5:]
    norm = float((inputs[name] - inputs[name].mean(0)).norm(dim=1).mean())
    frequency = np.asarray((pooled[name] > 0).mean(axis=0)).ravel()
    rate = (fas[name].matrix[:, [frequency.argmax()]] > 0).mean()
    top = largest.sum() or np.nan  # of a silent SAE
    row = {"sae": name, "peak": float(largest[-1]), "norm": norm, "peak/norm": largest[-1] / norm}
    row |= {"gini": 2 * (np.arange(1, 6) * largest).sum() / (5 * top) - 6 / 5}
    row |= {"peak/top 5": largest[-1] / top, "coverage": frequency.max()}
    row["by chance"] = (1 - (1 - rate) ** lengths).mean()
    rows.append(row | {"on half of the texts": (frequency > 0.5).sum()})

# %% [markdown]
# As a table; and the smallest difference that is more than reseeding gives.

# %%
sizes = pd.DataFrame(rows).set_index("sae").astype(float)
told_apart = {c: round(smallest_difference(sizes.loc[seeds, c].to_numpy()), 2) for c in sizes}
sizes = sizes.loc[places]
print(sizes.round(2).to_string())
print("tells apart:", told_apart if len(seeds) > 1 else "one seed cannot say")
fires = sizes[sizes["peak"] > 0]
so(
    f"peaks differ {fires['peak'].max() / fires['peak'].min():.1f}-fold between the SAEs, in units "
    f"of the norm {fires['peak/norm'].max() / fires['peak/norm'].min():.1f}-fold; the most "
    f"frequent feature covers {sizes['coverage'].min():.0%} to {sizes['coverage'].max():.0%} of "
    f"the texts, by chance {sizes['by chance'].min():.0%} to {sizes['by chance'].max():.0%}."
)

# %% [markdown]
# Coverage, drawn:

# %%
drawn = {"most frequent feature": sizes["coverage"], "null: by chance": sizes["by chance"]}
titles = {"x_title": "SAE", "y_title": "share of texts"}
bars(drawn, places, title="Texts on which the most frequent feature fires", **titles).show()

# %% [markdown]
# The five largest values by kind: peaks, never stacked, in units of the norm.

# %%
peaks = {}
for kind, inside in zip(labels.categories, labels.inside.T, strict=True):
    tops = [np.sort(pooled[n][inside].max(axis=0).toarray().ravel())[-5:].mean() for n in places]
    peaks[kind] = np.array(tops) / sizes["norm"]
titles = {"x_title": "SAE", "y_title": "mean of the five peaks, in norms"}
bars(peaks, places, title="Largest activations by kind, scale removed", **titles).show()

# %% [markdown]
# ## 5. Are two seeds the same dictionary?
# Latents are matched one to one (Hungarian algorithm) by where they write (`decoder`), what they
# listen for (`encoder`), when they fire (correlation over tokens), and what they do to the next
# token (`vocabulary`). **First a check** on a pair with a known answer: half of the latents of this
# SAE, turned a little and put in another order, among as many data points.

# %%
from lenslab.compare import SHARED, comparable_kinds, compare, describe, match, null_dictionaries
from lenslab.runtime import derive_generator

dictionaries = {name: describe(model, saes[name], fas[name]) for name in saes}
own, generator = dictionaries[main].decoder, derive_generator(0, "planted pair")
n, d = own.shape
order = torch.randperm(n, generator=generator)
planted = own + 0.6 * torch.randn(n, d, generator=generator) / d**0.5
centred = inputs[main] - inputs[main].mean(0)
planted[n // 2 :] = centred[torch.randperm(len(centred), generator=generator)[: n - n // 2]]

# %% [markdown]
# Matched, and compared with what was planted.

# %%
planted = torch.nn.functional.normalize(planted, dim=1)[order]
pairs = match((own @ planted.T).numpy())
claimed, right = pairs["similarity"] >= SHARED, order[pairs["partner"]].numpy() == np.arange(n)
precision, recall = right[claimed].mean(), (right & claimed)[: n // 2].mean()
so(f"of planted pairs the matching finds {recall:.1%}; of what it calls shared {precision:.1%} is.")

# %% [markdown]
# **Nulls** in the place of the second SAE: isotropic random directions; data points, centred;
# an SAE of the random-weight twin; firings dealt out anew with each latent's rate. `corrected`:
# (value - null) / (1 - null), with the null that reaches most.

# %%
twin_dictionary = describe(twin, twin_sae, twin_fa)
as_wide = twin_sae.cfg.d_in == saes[main].cfg.d_in
known = twin_dictionary if as_wide else None
nulls = null_dictionaries(model, saes[main], fas[main], inputs[main], known)
if len(seeds) > 1:
    seed_pair = compare(dictionaries[main], dictionaries[seeds[1]], nulls)
    print(seed_pair.summary.round(2).drop(columns="near").to_string(index=False))
    near = seed_pair.summary.set_index("kind")["near"]
    print("latents within .05 of the partner:", near.round(1).to_dict())

# %% [markdown]
# In words; and how much the pairs of seeds differ among themselves.

# %%
if len(seeds) > 1:
    table = seed_pair.summary.set_index("kind")
    strictest = table[[name for name in nulls if name in table]].astype(float).idxmax(axis=1)
    pairs = [(a, b) for i, a in enumerate(seeds) for b in seeds[i + 1 :]]
    cosines = [dictionaries[a].decoder @ dictionaries[b].decoder.T for a, b in pairs]
    means = np.array([match(values.numpy())["similarity"].mean() for values in cosines])
    partners = seed_pair.latents.pivot(index="latent", columns="kind", values="partner")
    agree = (partners["decoder"] == partners["encoder"]).mean()
    print(f"decoder, all {len(pairs)} pairs of seeds: {means.min():.3f} to {means.max():.3f}")

# %% [markdown]
# Said together:

# %%
so(
    f"matched decoder rows of two seeds have a cosine of {table.loc['decoder', 'value']:.2f}, "
    f"{strictest['decoder']} {table.loc['decoder', 'null']:.2f}, the strictest null: corrected "
    f"{table.loc['decoder', 'corrected']:.2f} "
    f"(firing {table.loc['firing', 'corrected']:.2f}). {table.loc['decoder', 'shared']:.0%} of the "
    f"latents are shared (null {table.loc['decoder', 'shared_null']:.0%}), and {agree:.0%} have "
    "the same partner by decoder and by encoder."
    if len(seeds) > 1
    else "this model has one seed of this SAE, so there is nothing to match it with."
)

# %% [markdown]
# Is what fires often learned by every seed? By how often a latent fires:

# %%
if len(seeds) > 1:
    latents = seed_pair.latents.query("kind == 'decoder'")
    edges = [0, 1e-3, 1e-2, 1e-1, 1]
    groups = latents.groupby(pd.cut(latents["rate"], edges, labels=edges[1:]), observed=True)
    bands = groups[["similarity", "null", "near"]].mean().assign(latents=groups.size())
    print(bands.round(2).to_string())

# %% [markdown]
# Drawn, beside the strictest null:

# %%
if len(seeds) > 1:
    curves = {"second seed": bands["similarity"], f"null: {strictest['decoder']}": bands["null"]}
    titles = {"x_title": "fires on up to this share of tokens", "y_title": "cosine of the match"}
    title = "What two seeds share, by how often a latent fires"
    lines(curves, bands.index.astype(float).tolist(), log_x=True, title=title, **titles).show()

# %% [markdown]
# ## 6. Other widths, layers and streams
# The same for SAEs that differ by more than a seed, by decoder and by firing, each against data
# points of its own site and as many as it has latents. Of other widths at one site only the
# narrowest is matched: the time grows as a cube.

# %%
resized = [n for n in saes if hook[n] == hook[main] and n not in seeds]
others = seeds[1:2] + sorted(resized, key=width.get)[:1]  # the widest take as long as all others
others += [n for n in places if n != main and stream[n] == stream[main]]
others += [n for n in places if n not in [main, *others] and layer[n] == layer[main]]
print("compared with:", ", ".join(others) or "no other SAE")

# %% [markdown]
# Each against its nulls:

# %%
rows = [seed_pair.summary.assign(other=name) for name in seeds[1:2]]  # of section 5
for name in others[len(rows) :]:
    own_nulls = null_dictionaries(model, saes[name], fas[name], inputs[name], kinds=["data"])
    own_nulls.pop("shuffled firings")  # data points keep more: they read the same vectors
    pair = compare(dictionaries[main], dictionaries[name], own_nulls, ("decoder", "firing"))
    rows.append(pair.summary.assign(other=name))
shown = ["other", "kind", "value", "null", "corrected", "shared", "shared_null"]
likeness = pd.concat(rows) if rows else pd.DataFrame(columns=shown)
likeness = likeness[likeness["kind"].isin(["decoder", "firing"])]
print(
    likeness[shown].round(2).replace(0, 0.0).to_string(index=False)
    if rows
    else "nothing to compare"
)

# %% [markdown]
# In words:

# %%
fixed = likeness[likeness["kind"] == "firing"].set_index("other")
last = {layer[n]: fixed.loc[n] for n in fixed.index if stream[n] == stream[main]}
last = {number: row for number, row in last.items() if number != layer[main]}
persist = [
    f"{r['shared']:.0%} fire like one of layer {n} (null {r['shared_null']:.0%})"
    for n, r in last.items()
]
persist = ", ".join(persist) or "none can be compared: there is no other layer of this stream"
fixed = fixed["corrected"].astype(float).round(2) + 0.0  # no "-0.00"

# %% [markdown]
# Said together:

# %%
so(
    f"corrected for the data, firing agrees least with {fixed.idxmin()} ({fixed.min():.2f}) and "
    f"most with {fixed.idxmax()} ({fixed.max():.2f}). Of layer {layer[main]}'s latents "
    f"{persist}."
    if len(fixed)
    else "there is one SAE at hand: a comparison needs a second."
)

# %% [markdown]
# Drawn, with the null:

# %%
if len(fixed):
    wide = likeness.pivot(index="other", columns="kind", values=["value", "null"]).loc[others]
    kinds = likeness["kind"].unique()  # no decoder where widths differ
    drawn = {kind: wide["value", kind] for kind in kinds}
    drawn |= {f"null: {kind}": wide["null", kind] for kind in kinds}
    titles = {"x_title": f"compared with {main}", "y_title": "mean similarity of matched latents"}
    bars(drawn, others, title="What SAEs share, and what the data makes alike", **titles).show()

# %% [markdown]
# ## 7. What of an SAE does another training find again?
# By sparsity and by architecture: small SAEs (1,024 latents, 400,000 vectors), each from two seeds
# on the same vectors; rates fell along a cosine. It took minutes and is a saved result of
# `pocket-gpt` (`scripts/sae_stability.py`).

# %%
from lenslab.files import saved_result

asked = {"model_key": model_key(model), "site": f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"}
asked["levels"] = [4, 8, 16, 32, 64]
asked["architectures"] = ["batchtopk", "topk", "matryoshka", "jumprelu", "gated", "relu"]
stability = saved_result("phase_3_stability", asked)
if stability is None:
    print("not measured for this model; the section is about pocket-gpt")
else:
    two_seeds = stability[stability["architecture"] == stability["other"]]
    by_level = two_seeds.query("architecture == 'batchtopk' and kind == 'decoder'").set_index("l0")
    print(by_level[["fvu", "value", "null", "corrected", "shared", "shared_null"]].round(2))

# %% [markdown]
# Between architectures: the first seed of one with the second of another, on the diagonal its own.

# %%
if stability is not None:
    level = stability[(stability["level"] == 16) & (stability["kind"] == "decoder")]
    across = level.pivot(index="architecture", columns="other", values="corrected")
    l0 = level.groupby("architecture")["l0"].first()
    print((across.join(l0).round(2) + 0.0).to_string())
    own_seed = np.diag(across)
    other_seed = across.to_numpy()[~np.eye(len(across), dtype=bool)]

# %% [markdown]
# In words:

# %%
if stability is None:
    so("how much of an SAE another training finds again, by sparsity, is not measured here.")
else:
    few, many = by_level.iloc[[0, -1]].itertuples()
    so(
        f"of the latents {few.shared:.0%} are shared by two seeds at L0 {few.Index:.0f} (null "
        f"{few.shared_null:.0%}), {many.shared:.0%} at L0 {many.Index:.0f} (null "
        f"{many.shared_null:.0%}). At L0 {l0.min():.0f} to {l0.max():.0f} the corrected decoder "
        f"cosine of two seeds of one architecture is {own_seed.min():.2f} to "
        f"{own_seed.max():.2f}, of two architectures "
        f"{other_seed.min():.2f} to {other_seed.max():.2f}."
    )

# %% [markdown]
# Drawn:

# %%
if stability is not None:
    drawn = {"two seeds": by_level["shared"], "null: data points": by_level["shared_null"]}
    titles = {"x_title": "L0: latents active at a token", "y_title": "share of latents shared"}
    title = "What two seeds share, by sparsity"
    lines(drawn, list(by_level.index), log_x=True, title=title, **titles).show()

# %% [markdown]
# And the architectures:

# %%
if stability is not None:
    titles = {"x_title": "second seed of", "y_title": "first seed of"}
    title = "Corrected cosine of matched latents"
    names = list(across.index)
    heatmap(across.to_numpy(), list(across.columns), names, title=title, **titles).show()

# %% [markdown]
# ## 8. Where does a feature go in a wider SAE?
# A *child* fires, on more than half of its own tokens, where its parent fires. **Control**: an SAE
# of the same width and another seed also has some.

# %%
from itertools import pairwise

from lenslab.compare import children

steps = [*pairwise(widths), *[(main, other) for other in seeds[1:2]]]
splits, families = {}, {}
for narrow, wide in steps:
    families[narrow, wide] = children(fas[narrow], fas[wide])
    family = families[narrow, wide].groupby("parent").size()
    alive = int((np.diff(fas[narrow].matrix.tocsc().indptr) >= 10).sum())
    splits[narrow, wide] = (family >= 2).sum() / max(alive, 1)
    print(f"{narrow} -> {wide}: {splits[narrow, wide]:.0%} of {alive} features have two or more")

# %% [markdown]
# In words:

# %%
told = ", ".join(f"{share:.0%} from {a} to {b}" for (a, b), share in splits.items())
wider = min((share for (_, wide), share in splits.items() if wide not in seeds[1:]), default=0)
chance = "without a second seed it is open how much of that is splitting"
if len(seeds) > 1 and wider > splits[main, seeds[1]]:
    chance = "more than the pair of equal width: some is splitting, some only that there are more "
    chance += "latents to choose from"
elif len(seeds) > 1:
    chance = "not every step more than the pair of equal width: no splitting is shown"

# %% [markdown]
# Said together:

# %%
so(
    f"of the features {told} have two children or more: {chance}."
    if len(widths) > 1
    else "there is one width, so no splitting can be seen."
)

# %% [markdown]
# One family: of the narrowest SAE the feature with most children, among those that fire on less
# than 2 %, followed into each wider SAE; named with the token that each fires on most.

# %%
todo, tree = [], []
if len(widths) > 1:
    family = families[widths[0], widths[1]]
    rare = family[family["expected"] < 0.02].groupby("parent").size()
    todo = [(0, parent, "") for parent in rare.index[rare == rare.max()][:1]]
    print(f"{len(rare)} of {widths[0]} that fire on less than 2 % have children")

# %% [markdown]
# Followed from one to the next, the three that have most of its firings:

# %%
while todo:
    tree.append(todo.pop())
    depth, feature, _ = tree[-1]
    for step in pairwise(widths[depth : depth + 2]):
        kids = families[step].query("parent == @feature").head(3)[::-1]
        covers = [f": has {share:.0%} of its parent's firings" for share in kids["covers"]]
        todo += zip([depth + 1] * len(kids), kids["child"], covers, strict=True)

# %% [markdown]
# As a tree:

# %%
from lenslab.features.readings import feature_names

named = {}
for depth, name in enumerate(widths):
    level = [feature for at, feature, _ in tree if at == depth]
    if level:
        named |= zip([(depth, f) for f in level], feature_names(fas[name], level), strict=True)
for depth, feature, told in tree:
    print(f"{'    ' * depth}{widths[depth]} {named[depth, feature]}{told}")

# %% [markdown]
# ## 9. Where a famous trend may come from
# A comparison of GPT-2's layers counted specialists in 5, 6, 7 and 7 of seven kinds. It averaged
# each text's tokens before encoding, called 5.0 strong at every layer, and met BOS and padding on
# the way. **Planted** here: seventy texts of seven kinds, of 10 to 20 tokens after BOS, padded. A
# plant shows that the rule can make the trend, not that it did in GPT-2.

# %%
generator = derive_generator(0, "planted layers")
n_kinds, n_texts, longest, bias = 7, 70, 20, 12.0
d_in = n_kinds + n_texts + 3  # and the common feature, what padding holds, and the sink at BOS
kinds = np.repeat([f"kind {number}" for number in range(1, n_kinds + 1)], n_texts // n_kinds)
n_tokens = torch.randint(10, longest + 1, (n_texts, 1), generator=generator)
attention = torch.arange(longest + 1) < 1 + n_tokens
real = attention.clone()
real[:, 0] = False

# %% [markdown]
# Every kind has a feature that fires on every other token of its texts, some kinds strongly, some
# weakly; so has every single text, whatever its kind; and one feature is everywhere.

# %%
strength, rows = torch.zeros(n_texts, d_in), torch.arange(n_texts)
strength[:, -3] = 12.0
strength[rows, rows * n_kinds // n_texts] = torch.linspace(16, 28, n_kinds).repeat_interleave(10)
strength[rows, n_kinds + rows] = torch.linspace(8, 22, n_texts)[rows * 29 % n_texts]
phase = torch.randint(2, (n_texts, 1, d_in), generator=generator)
fires = (torch.arange(longest + 1)[:, None] + phase) % 2 == 0  # [text, pos, feature]
contents = fires * (strength[:, None] + bias * (strength[:, None] > 0))
contents[~attention] = 20 * torch.eye(d_in)[-2]

# %% [markdown]
# Four layers hold this *same*, only stronger from one to the next, with a huge vector at BOS. The
# SAE knows the features; like a trained one it has a bias that a feature must exceed to fire.

# %%
turned = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0]
sink = 1 + torch.rand(d_in, generator=generator)  # every feature sees it
layers = {}
for number, scale in enumerate((1, 1.15, 1.35, 2), 1):
    x = contents * scale
    x[:, 0] = 3000 * sink / sink.norm()
    encode = lambda given, scale=scale: torch.relu(given @ turned.T - bias * scale)  # noqa: E731
    layers[f"layer {number}"] = x @ turned, encode

# %% [markdown]
# A text's value under three choices, crossed: BOS in or out, padding in or out, and tokens encoded
# before they are averaged or after.

# %%
from itertools import product

ORDERS = ("encode, then pool", "pool, then encode")


def pooled_ways(encode, x, real, attention) -> dict:
    """Mean over a text's tokens `[text, feature]` under (BOS in, padding in, order); `x` [text,
    pos, d_in] everywhere, `attention` [text, pos] False at padding, `real` at padding and BOS."""
    sums, ways = {}, {}
    for bos, padding in product((False, True), repeat=2):
        mask = real | (attention & bos) | (~attention & padding)
        average = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # [text, d_in]
        ways[bos, padding, ORDERS[1]] = encode(average).float().numpy()
        sums[bos, padding, ORDERS[0]] = mask, []
    for text in range(len(x)):  # all places of all texts at once would not fit
        features = encode(x[text])  # [pos, feature]
        for mask, rows in sums.values():
            rows.append(features[mask[text]].mean(0).float().numpy())
    return {way: np.stack(rows) for way, (_, rows) in sums.items()} | ways


# %% [markdown]
# What does the older rule count under each, and with shuffled labels?

# %%
FACTORS = ["BOS", "padding", "order"]
rows = []
for name, (x, encode) in layers.items():
    for way, matrix in pooled_ways(encode, x, real, attention).items():
        matrix = matrix.round(3)  # a planted 5.0 stays one, whatever float32 makes of it
        for threshold in (5.0, "half"):
            null = count_specialists_null(matrix, kinds, threshold, n=20)
            row = dict(zip(FACTORS, way, strict=True)) | {"layer": name, "threshold": threshold}
            row["coverage"] = (matrix > 0).mean(0).max()
            rows.append(row | {"specialists": null.observed, "shuffled": null.mean_null})
trend = pd.DataFrame(rows)
at_5 = trend[trend["threshold"] == 5.0]
print(at_5.pivot(index=FACTORS, columns="layer", values="specialists").to_string())

# %% [markdown]
# Without BOS and padding, at both thresholds. **Control**: the same count under shuffled labels.

# %%
clean = trend[~trend["BOS"].astype(bool) & ~trend["padding"].astype(bool)]
by_layer = clean.pivot(index=["order", "threshold"], columns="layer")
for count in ("specialists", "shuffled"):
    print(count, by_layer[count].round(2).to_string(header=False), sep="\n")

# %% [markdown]
# With the threshold of 5.0, in both orders:

# %%
old, mended = (by_layer["specialists"].loc[(o, 5.0)].to_numpy() for o in ORDERS[::-1])
shuffled, still = (by_layer["shuffled"].loc[(o, 5.0)].to_numpy() for o in ORDERS[::-1])
made = "makes a trend" if old[-1] - old[0] > np.ptp(mended) else "makes no trend"
near = "near" if still.min() > 0.8 * mended.min() else "above"
span = f"{mended.min():.0f} to {mended.max():.0f}" if np.ptp(mended) else f"always {mended[0]:.0f}"

# %% [markdown]
# In words:

# %%
so(
    f"on layers that hold the same, pooled first the rule counts {old[0]:.0f} to {old[-1]:.0f} of "
    f"7 (shuffled labels {shuffled[0]:.2f} to {shuffled[-1]:.2f}), encoded first {span} (shuffled "
    f"labels {still.min():.2f} to {still.max():.2f}): pooling first {made}; encoded first "
    f"the count is still {near} that of shuffled labels."
)

# %% [markdown]
# Drawn:

# %%
counts = {"pooled first": old, "encoded first": mended}
counts |= {"null: pooled first, shuffled": shuffled, "null: encoded first, shuffled": still}
titles = {"x_title": "planted layer", "y_title": "kinds with a specialist, of 7"}
bars(counts, list(layers), title="A trend over layers that hold the same", **titles).show()

# %% [markdown]
# The same three choices on this model: has each anything to act on? The model runs once more on
# every other text, for the values at BOS and padding.

# %%
some = batch[::2]
parts = {name: [] for name in along}
for start in range(0, len(some), 30):
    few = some[start : start + 30]
    options = {"attention_mask": few.attention.long(), "names_filter": [hook[n] for n in along]}
    with torch.inference_mode():
        cache = model.run_with_cache(few.tokens, **options)[1]
    for name in along:
        parts[name].append(input_transform(saes[name], model)(cache[hook[name]]))
everywhere = {name: torch.cat(values) for name, values in parts.items()}  # [text, pos, d_in]

# %% [markdown]
# How long is the vector at BOS against the others, and how much padding is there?

# %%
start, norms = some.attention & ~some.real, {n: x.norm(dim=2) for n, x in everywhere.items()}
size = {n: float(norm[start].mean() / norm[some.real].mean()) for n, norm in norms.items()}
largest = max(size.values()) if start.any() else 0
print("; ".join(f"{n}: BOS is {ratio:.1f} times as long" for n, ratio in size.items()))
print(f"padding is {1 - some.attention.float().mean():.0%} of the places")

# %% [markdown]
# What each choice changes, mean over the others and over the layers:

# %%
rows = []
for name, x in everywhere.items():
    with torch.inference_mode():
        ways = pooled_ways(saes[name].encode, x, some.real, some.attention)
    for way, matrix in ways.items():
        null = count_specialists_null(matrix, labels.category[::2], 5.0, n=3)
        row = dict(zip(FACTORS, way, strict=True)) | {"coverage": (matrix > 0).mean(0).max()}
        rows.append(row | {"specialists": null.observed, "shuffled": null.mean_null})
crossed = pd.DataFrame(rows)

# %% [markdown]
# Put in, or pooled first, against the other:

# %%
changes = {}
for factor in FACTORS:
    columns = ["specialists", "shuffled", "coverage"]
    means = crossed.groupby(factor)[columns].mean()
    changes[factor] = means.iloc[-1] - means.iloc[0]
print(pd.DataFrame(changes).T.round(2).to_string())

# %% [markdown]
# In words:

# %%
strongest = max(FACTORS, key=lambda factor: abs(changes[factor]["specialists"]))
most = changes[strongest]
small = "less than" if abs(most["specialists"]) < 1 else "at least"
there = f"BOS is at most {largest:.1f} times as long as the rest" if largest else "there is no BOS"
so(
    f"in {model_name(model)}, where {there}, "
    + (
        f"the choice that changes the count most is {strongest} ({most['specialists']:+.1f} of "
        f"{len(labels.categories)}, {small} one kind; under shuffled labels "
        f"{most['shuffled']:+.1f})."
        if most["specialists"]
        else "none of the choices changes the count on average."
    )
)

# %% [markdown]
# ## 10. Controls: does it take this SAE?
# The search of section 3 among other candidates on the same texts. An SAE on the random-weight
# twin; PCA axes; the model's own neurons; counts of character sequences. A *specialist* is a
# feature that tells a kind apart, with a precision of at least one half, and beats each of these
# (95 % interval of the difference of held-out AUROCs).

# %%
from lenslab.features.specialists import find_specialists
from lenslab.sae.controls import control_matrices
from lenslab.sae.load import bundled_saes, load_sae

controls = control_matrices(model, saes[main], batch)
controls["random-twin SAE"] = twin_fa.pool("max")
own = best[best["sae"] == main]
found = find_specialists(pooled[main], labels, controls, name=main, discrimination=own, n=200)
reached = found.comparisons.pivot(index="control", columns="category", values="control_auroc")
print("specialists:", ", ".join(found.table.query("specialist")["category"]) or "none")

# %% [markdown]
# Further candidates: an SAE whose decoder was frozen while the rest was trained, where one ships;
# the length of the text. And the *ceiling*, two directions fitted to the labels.

# %%
more = {"text length": lengths[:, None].astype(np.float32)}
frozen = f"{whole}-frozen-decoder"
if frozen in bundled_saes() and theirs == {model_key(model)}:
    floor = encode_saes(model, {frozen: load_sae(frozen)}, batch)[frozen]
    more["frozen decoder"] = floor.pool("max")
further = discriminate(more, labels, n=1).pivot(index="sae", columns="category", values="auroc")
vectors = np.stack([inputs[main][text == i].mean(0).numpy() for i in range(len(batch))])
ceilings = {
    f"ceiling: {way}": [auroc(v[held, c], labels.inside[held, c]) for c in range(v.shape[1])]
    for way, v in supervised_directions(vectors, labels).items()
}
ceilings = pd.DataFrame(ceilings, list(labels.categories)).T.astype(float)
print(ceilings.round(2).to_string())

# %% [markdown]
# All together, by kind:

# %%
table = pd.concat([aurocs.loc[[main]].rename({main: "this SAE"}), reached, further, ceilings])
table = table[list(labels.categories)].astype(float)
table["mean"] = table.mean(axis=1)
print(table.round(2).to_string())
older = by_sae.loc[main]

# %% [markdown]
# In words:

# %%
rest = table["mean"].drop(["this SAE", *ceilings.index])
lead = table.loc["this SAE", "mean"] - rest.max()
little = f"too little to tell with {len(seeds)} seeds ({least:.3f})"
against = f"more than reseeding gives ({least:.3f})" if lead > least else little
over = f" (over its seeds {reseeds.min():.2f} to {reseeds.max():.2f})" if len(seeds) > 1 else ""
so(
    f"mean held-out AUROC of the best candidate is {table.loc['this SAE', 'mean']:.2f} for this "
    f"SAE{over}; the best control is {rest.idxmax()} ({rest.max():.2f}), and the least "
    f"{rest.idxmin()} ({rest.min():.2f}). The lead over the best is {lead:.3f}, "
    f"{against if len(seeds) > 1 else 'which one seed cannot judge'}. "
    f"{found.table['specialist'].sum()} of {len(labels.categories)} kinds have a specialist; by "
    f"the older rule {older['at 5.0']:.0f}, with shuffled labels {older['at 5.0 shuffled']:.1f}. "
    f"Directions fitted to the labels reach {ceilings.mean(axis=1).max():.2f}."
)

# %% [markdown]
# Is it the length of the text? The part of a feature's value that a line in the logarithm of the
# length foretells (fitted on the discovery half) is taken away.

# %%
own, rows, log_length = own.set_index("category")["feature"], {}, np.log(lengths)
for c, (kind, feature) in enumerate(own.items()):
    value = pooled[main][:, [feature]].toarray()[:, 0]
    line = np.polyfit(log_length[~held], value[~held], 1)
    rest = value - np.polyval(line, log_length)
    both = [auroc(each[held], labels.inside[held, c]) for each in (value, rest)]
    rows[kind] = dict(zip(("AUROC", "without length"), both, strict=True))
rows = pd.DataFrame(rows).T.astype(float)
print(rows.round(2).to_string())
moved = (rows["AUROC"] - rows["without length"]).abs().max()
so(f"without what the length foretells, AUROCs change by at most {moved:.2f}.")

# %% [markdown]
# ## 11. Syntax or topic?
# How much of a feature's activation does the token alone foretell: its class (digits, brackets,
# word starts ...), or its string? From the discovery half to the held-out half; 0 is no better than
# the mean. **Control**: as many features taken at random.

# %%
from lenslab.features.readings import explained_by_token

fires = np.asarray((pooled[main] > 0).sum(axis=0)).ravel()
rng, drawn = np.random.default_rng(0), []
for feature in own:  # as often up to a tenth, else the nearest
    apart = np.abs(fires - fires[feature]) / max(fires[feature], 1)
    apart[[*own, *drawn]] = np.inf
    drawn.append(int(rng.choice(np.flatnonzero(apart <= max(0.1, apart.min())))))
print("fire on texts:", fires[own].tolist(), "and the random ones:", fires[drawn].tolist())

# %% [markdown]
# Chosen ones, and random ones that fire on as many texts.

# %%
tables = {}
for name, features in (("chosen", own.to_numpy()), ("random", np.array(drawn))):
    tables[name] = explained_by_token(fas[main], features, labels.held_out)
print(tables["chosen"].assign(kind=own.index).round(2).to_string(index=False))

# %% [markdown]
# In words:

# %%
so(
    f"of the activation of the features chosen for a kind the token's string foretells "
    f"{tables['chosen']['by_string'].median():.0%} of the variance, its class "
    f"{tables['chosen']['by_class'].median():.0%} (medians); of random features "
    f"as frequent {tables['random']['by_string'].median():.0%} and "
    f"{tables['random']['by_class'].median():.0%}."
)

# %% [markdown]
# The matched set says sixty things in four forms each. Means of the chosen features by form, with
# intervals over concepts; the features were chosen on other texts.

# %%
from lenslab.stats import bootstrap_by_document

matched = load_probes("matched")
matched_batch = tokenize(model, matched["text"].tolist(), truncate=True)
matched_fa = encode_saes(model, {main: saes[main]}, matched_batch)[main]
matched_pooled = matched_fa.pool("max")
print(f"{len(matched)} texts, {matched_pooled.nnz / len(matched):.0f} features fire in one")

# %% [markdown]
# By form:

# %%
values = pd.DataFrame(matched_pooled[:, own.to_numpy()].toarray(), columns=own.index)
forms, concepts = list(matched["form"].unique()), matched["concept"].to_numpy()
means = {form: [] for form in forms}
for form in forms:
    rows = (matched["form"] == form).to_numpy()
    for kind in values:
        of_form = values.loc[rows, kind].to_numpy()
        draw = derive_generator(0, f"{form} {kind}")
        means[form].append(bootstrap_by_document(of_form, concepts[rows], draw, n=300))
by_form = pd.DataFrame({f: [i.estimate for i in means[f]] for f in forms}, index=own.index)
print(by_form.round(2).to_string())

# %% [markdown]
# Drawn; a dot is a mean over sixty concepts, the line its 95 % interval.

# %%
from lenslab.show.plots import intervals

strength = np.maximum(by_form.max(axis=1).to_numpy(), 1e-9)
series = {}
for form in forms:
    ends = np.array([(i.estimate, i.low, i.high) for i in means[form]]).T / strength
    series[form] = tuple(ends)
axes = {"x_title": "mean activation, share of the largest form", "y_title": "feature chosen for"}
intervals(series, list(own.index), title="The same things said in four forms", **axes).show()

# %% [markdown]
# Does the feature for mathematics fire on code that computes, and the one for Python on formulas?
# The symbolic texts of the matched set are code, formulas, markup and tables.

# %%
notation = matched["notation"].where(matched["form"] == "symbolic", matched["form"])
crossed_kinds = [kind for kind in ("math", "python") if kind in own.index]
across = values[crossed_kinds].groupby(notation.to_numpy()).mean()
fraction = (values[crossed_kinds] > 0).groupby(notation.to_numpy()).mean()
print(across.join(fraction.add_suffix(": fires on")).astype(float).round(2).to_string())

# %% [markdown]
# In words; beside it how often the feature fires where its kind is not.

# %%
fired = {k: (pooled[main][:, [own[k]]] > 0).toarray()[:, 0] for k in crossed_kinds}
elsewhere = {k: f[labels.category != k].mean() for k, f in fired.items()}
so(
    "; ".join(
        f"the feature chosen for {kind} fires on {fraction.loc['code', kind]:.0%} of code, "
        f"{fraction.loc['formula', kind]:.0%} of formulas and {fraction.loc['plain', kind]:.0%} of "
        f"plain English (on {elsewhere[kind]:.0%} of texts of other kinds in section 1)"
        for kind in crossed_kinds
    )
    + "."
)

# %% [markdown]
# Do texts that say the same share their top features, or do texts of the same form? *Jaccard*
# overlap of the twenty strongest features of two texts, and the cosine of the texts' mean vectors,
# centred by the mean of the discovery half; both on held-out concepts. **Null**: pairs that share
# neither. Intervals are over concepts.

# %%
new = (matched["split"] == "held_out").to_numpy()
dense = matched_pooled.toarray()
top = np.argsort(-dense, axis=1, kind="stable")[:, :20]
strong = np.zeros(dense.shape, dtype=np.float32)
np.put_along_axis(strong, top, 1, axis=1)
both = strong[new] @ strong[new].T
vectors = harvest(model, matched_batch, hook[main])[hook[main]]
means = np.stack([v[r].mean(0).numpy() for v, r in zip(vectors, matched_batch.real, strict=True)])
means = means - means[~new].mean(0)
unit = means[new] / np.linalg.norm(means[new], axis=1, keepdims=True)

# %% [markdown]
# Compared by what two texts share:

# %%
form, concept = (matched.loc[new, column].to_numpy() for column in ("form", "concept"))
one_form, one_concept = form[:, None] == form, concept[:, None] == concept
sorts = {"same concept": one_concept & ~one_form, "same form": one_form & ~one_concept}
sorts["neither"] = ~one_form & ~one_concept
alike = {"Jaccard": {}, "cosine": {}}
for name, similarity in (("Jaccard", both / (40 - both)), ("cosine", unit @ unit.T)):
    for pair, which in sorts.items():
        sums, draw = np.where(which, similarity, 0).sum(1), derive_generator(0, pair)
        sums = np.stack([sums, which.sum(1)], 1)  # by text: similarities, pairs
        alike[name][pair] = bootstrap_by_document(
            sums, concept, draw, lambda s: s[:, 0].sum() / s[:, 1].sum()
        )

# %% [markdown]
# In words:

# %%
for name, table in alike.items():
    said, form, neither = table.values()
    more = "content leads" if said.low > form.high else "neither leads beyond its interval"
    so(
        f"{name}: texts that say the same in two forms {said.estimate:.2f} ({said.low:.2f} to "
        f"{said.high:.2f}), texts of one form that say different things {form.estimate:.2f} "
        f"({form.low:.2f} to {form.high:.2f}), texts that share neither {neither.estimate:.2f}: "
        f"{'form leads' if form.low > said.high else more}."
    )

# %% [markdown]
# ## 12. Does a selective feature matter to the model?
# Each kind's feature is set to zero at every real token of the held-out texts, the SAE's error
# kept, and the loss is compared. **Controls**: its effect on the other kinds; the features of the
# other kinds; and two features that fire on as many texts of the kind and about as strongly.

# %%
from lenslab.circuits.interventions import ablate_features

CROSS, held_rows = "other kinds' features", np.flatnonzero(labels.held_out)
held_fa, inside = fas[main][held_rows.tolist()], labels.inside[held_rows]
rises = 1000 * ablate_features(model, saes[main], held_fa, own.to_numpy())  # [feature, text]
by_kind = rises @ inside / inside.sum(0)  # [feature, kind]
effects = pd.DataFrame({"own feature": np.diag(by_kind)}, own.index)
effects["on other kinds"] = (rises.sum(1) - (rises * inside.T).sum(1)) / (~inside).sum(0)
effects[CROSS] = (by_kind.sum(0) - np.diag(by_kind)) / (len(own) - 1)

# %% [markdown]
# The two nearest by share of the kind's texts and by mean activation there, none of them twice:

# %%
from lenslab.features.ranking import matched_features

dense_held = held_fa.pool("max").toarray()
alike = matched_features(dense_held, inside, own.to_numpy())  # [kind, 2]
alike = dict(zip(own.index, alike.tolist(), strict=True))
print(pd.Series(alike).to_string())

# %% [markdown]
# Set to zero, one after the other, on the texts of the kind:

# %%
tested = []
for c, (kind, feature) in enumerate(own.items()):
    few = held_fa[np.flatnonzero(inside[:, c]).tolist()]
    rise = 1000 * ablate_features(model, saes[main], few, alike[kind]).mean(1)
    scores = auroc(dense_held[:, [feature, *alike[kind]]], inside[:, c])
    rise = [by_kind[c, c], *rise]
    names = [feature, *alike[kind]]
    tested += zip([kind] * 3, names, [True, False, False], rise, scores, strict=True)
tested = pd.DataFrame(tested, columns=["kind", "feature", "chosen", "own", "selectivity"])
means = tested.groupby(["kind", "chosen"], sort=False)[["own", "selectivity"]].mean().unstack()
effects["matched features"] = means["own"][False]
print(tested[["own", "selectivity"]].describe().loc[["min", "50%", "max"]].round(1).to_string())

# %% [markdown]
# Rise of the loss in millinats per token.

# %%
selectivity = means["selectivity"].rename(columns={True: "AUROC", False: "AUROC, matched"})
print(effects.join(selectivity).round(2).to_string())

# %% [markdown]
# Are selective features the ones that matter? The rank correlation over all tested features, with
# its interval over features.

# %%
from scipy.stats import spearmanr

pairs, draw = tested[["selectivity", "own"]].to_numpy(), derive_generator(0, "selectivity")
rank = lambda rows: spearmanr(rows[:, 0], rows[:, 1]).statistic  # noqa: E731
relation = bootstrap_by_document(pairs, tested["feature"].to_numpy(), draw, rank)
chosen = tested["chosen"]
lead = (effects["own feature"] - effects["matched features"]).to_numpy()
draw = derive_generator(0, "chosen against matched")
gain = bootstrap_by_document(lead, np.arange(len(lead)), draw)

# %% [markdown]
# In words:

# %%
shown = {True: "shown", False: "not shown"}
needed, related = shown[gain.low > 0], shown[relation.low > 0 or relation.high < 0]
so(
    f"the chosen features raise the loss of their kind by {effects['own feature'].mean():.1f} "
    f"millinats, of the other kinds by {effects['on other kinds'].mean():.1f}; other kinds' "
    f"features raise it by {effects[CROSS].mean():.1f}, matched features by "
    f"{effects['matched features'].mean():.1f}: a lead of {gain.estimate:.1f} "
    f"({gain.low:.1f} to {gain.high:.1f} over kinds): that they are needed more is {needed}. "
    f"Selectivity and effect have a rank correlation of {relation.estimate:.2f} "
    f"({relation.low:.2f} to {relation.high:.2f}, {tested['feature'].nunique()} features): that "
    f"they go together is {related}."
)

# %% [markdown]
# Drawn: every point is a feature; named are those of the three chosen ones that raise most.

# %%
from lenslab.show.plots import scatter

marks = {"marked": chosen.to_numpy(), "marked_name": "chosen for the kind"}
named = tested["kind"].where(tested.index.isin(tested[chosen].nlargest(3, "own").index), "")
axes = {"x_title": "selectivity (held-out AUROC)", "y_title": "rise of the kind's loss, millinats"}
title = "Selective, and needed?"
figure = scatter(tested["selectivity"], tested["own"], names=named, title=title, **marks, **axes)
figure.update_traces(name="matched features", selector={"name": "others"}).show()

# %% [markdown]
# ## 13. The same questions asked of a second model
# By default a mixture of experts, which reads the same tokens. Directions of two models have
# nothing in common; firing can be compared. Of the first model stands beside it the SAE of the same
# site, where there is one.

# %%
SECOND = None  # or "smollm2", or any other model that has SAEs
second = load_model(SECOND or ("pocket-gpt" if model_name(model) == "pocket-moe" else "pocket-moe"))
theirs = open_saes(second, comparable_saes(second))[0]
middle = f"blocks.{second.cfg.n_layers // 2}."
near = [name for name, sae in theirs.items() if sae_hook(sae).startswith(middle)]
near = [name for name in near if "resid" in sae_hook(theirs[name])] or near or list(theirs)
second_name = next((n for n, sae in theirs.items() if sae_hook(sae) == hook[main]), near[0])
second_sae, there = theirs[second_name], model_name(second)
print(f"{there}: {second_name}, {second_sae.cfg.d_sae} latents")

# %% [markdown]
# Its best features, beside those of the first model:

# %%
beside = next((name for name in places if hook[name] == sae_hook(second_sae)), main)
same_site = "the same site" if hook[beside] == sae_hook(second_sae) else "another site"
second_batch = tokenize(second, list(labels.texts), truncate=True)
second_fa = encode_saes(second, {second_name: second_sae}, second_batch)[second_name]
second_best = discriminate(second_fa.pool("max"), labels, n=200)
both = second_best.set_index("category")[["auroc"]].rename(columns={"auroc": there})
both[model_name(model)] = aurocs.loc[beside]
print(f"of {model_name(model)} {beside}, of {there} {second_name}: {same_site}")
print(both.round(2).to_string())

# %% [markdown]
# Where the two read the same tokens, features are matched by when they fire; a corrected value of
# .02 or less is called no more than the null.

# %%
second_dictionary, at = describe(second, second_sae, second_fa), sae_hook(second_sae)
fire = [bool(each.rate.any()) for each in (dictionaries[beside], second_dictionary)]
if all(fire) and comparable_kinds(dictionaries[beside], second_dictionary):
    x = harvest(second, second_batch, at)[at][second_batch.real]
    x = input_transform(second_sae, second)(x)
    second_nulls = null_dictionaries(second, second_sae, second_fa, x, kinds=["data"])
    row = compare(dictionaries[beside], second_dictionary, second_nulls).summary.iloc[0]
    so(
        f"matched by firing, latents of {beside} of {model_name(model)} and of {second_name} of "
        f"{there} ({same_site}) correlate at {row['value']:.2f}, the strictest null at "
        f"{row['null']:.2f}: corrected {row['corrected']:.2f}, "
        f"{'more' if row['corrected'] > 0.02 else 'no more'} than the texts alone make alike."
    )
else:
    why = "have two tokenizers" if all(fire) else "have a silent SAE among them"
    so(f"{model_name(model)} and {there} {why}: their firings do not compare.")

# %% [markdown]
# The ablation of section 12 on both, with its controls: the chosen features, the features of the
# other kinds, and one that fires as often and as strongly; on every other held-out text, which
# halves the time.

# %%
half_rows = held_rows[::2]
of_kind = labels.inside[half_rows]
ours = best[best["sae"] == beside]["feature"].to_numpy()
asked = {
    model_name(model): (model, saes[beside], fas[beside], ours),
    there: (second, second_sae, second_fa, second_best["feature"].to_numpy()),
}

# %% [markdown]
# Millinats that the loss of each kind rises by when a feature is set to zero:

# %%
rise_of, pairs_of, kinds = [], [], list(labels.categories)
for one, its_sae, its_fa, its_features in asked.values():
    few = its_fa[half_rows.tolist()]
    texts = few.pool("max").toarray()
    tested = [*its_features, *matched_features(texts, of_kind, its_features, 1)[:, 0]]
    rises = 1000 * ablate_features(one, its_sae, few, tested)  # [feature, text]
    by_kind, of_matched = np.split(rises @ of_kind / of_kind.sum(0), 2)  # [feature, kind]
    table = pd.DataFrame({"own feature": np.diag(by_kind)}, kinds)
    table[CROSS] = (by_kind.sum(0) - np.diag(by_kind)) / (len(kinds) - 1)
    rise_of.append(table.assign(**{"matched feature": np.diag(of_matched)}))
    scores = [auroc(texts[:, [f]], of_kind[:, i % len(kinds)])[0] for i, f in enumerate(tested)]
    pairs_of.append((tested, np.c_[scores, [*np.diag(by_kind), *np.diag(of_matched)]]))

# %% [markdown]
# As a table, and the rank correlation of selectivity and effect in each model:

# %%
relations = []
for tested, pairs in pairs_of:
    draw = derive_generator(0, "selectivity of another model")
    relations.append(bootstrap_by_document(pairs, np.array(tested), draw, rank))
print((pd.concat(dict(zip(asked, rise_of, strict=True))).round(1) + 0).to_string())  # no -0.0

# %% [markdown]
# In how many kinds does its own feature raise the loss more than the matched one? By chance in half
# of those where the two differ (sign test). And do selectivity and effect go together?

# %%
from scipy.stats import binomtest

said = []
for name, table, relation in zip(asked, rise_of, relations, strict=True):
    mine, alike = table["own feature"], table["matched feature"]
    differ, wins = int((mine != alike).sum()), int((mine > alike).sum())
    p = binomtest(wins, differ).pvalue if differ else 1.0
    said.append(
        f"in {name} a kind's own feature raises its loss by {mine.mean():.1f} millinats, features "
        f"of other kinds by {table[CROSS].mean():.1f}, matched ones by {alike.mean():.1f}: more in "
        f"{wins} of {differ} kinds (by chance {differ / 2:.1f}, p = {p:.2f}); selectivity and "
        f"effect correlate at {relation.estimate:.1f} ({relation.low:.1f} to {relation.high:.1f})"
    )
so("; ".join(said) + ".")

# %% [markdown]
# ## 14. Cloze: is what a feature marks also what a model can do?
# Sums in three forms, and for comparison brackets and agreement. Scored is the log-probability of
# the right answer over the mean of the other answers of its task, in nats; at 0 a prompt makes its
# right answer no likelier than the others. **Control**: an answer's mean over all prompts of its
# task is taken away; what is merely frequent gains nothing.

# %%
words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
sums = [(a, b) for a in range(1, 8) for b in range(1, 9 - a) if a != b]
tasks = [("sum, symbols", f"1 + 1 = 2\n3 + 2 = 5\n{a} + {b} =", f" {a + b}") for a, b in sums]
for a, b in sums:
    said = f"One plus one is two. Three plus two is five. {words[a].title()} plus {words[b]} is"
    told = f"Ann has {words[a]} apples and gets {words[b]} more. The number of her apples is"
    tasks += [("sum, words", said, f" {words[a + b]}"), ("sum, story", told, f" {words[a + b]}")]
print(f"{len(tasks)} sums, such as {tasks[-1][1]!r}")

# %% [markdown]
# For comparison:

# %%
given = load_probes("prompt_pairs")
for task in ("brackets", "agreement"):
    few = given[given["task"] == task].head(24)
    tasks += list(zip([task] * len(few), few["prompt_clean"], few["answer_clean"], strict=True))
cloze = pd.DataFrame(tasks, columns=["task", "prompt", "answer"])
print(cloze.groupby("task")["answer"].agg(["size", "nunique"]).to_string())

# %% [markdown]
# Both models read each prompt with every answer of its task; the log-probability is summed over the
# answer's tokens. A task that is longer than a model's context is left out.

# %%
answers = cloze.groupby("task")["answer"].unique()
trials = cloze.assign(row=range(len(cloze)), option=cloze["task"].map(answers)).explode("option")
scored = []
for each in (model, second):
    prompts = tokenize(each, trials["prompt"].tolist(), truncate=True).real.sum(1)
    full = tokenize(each, (trials["prompt"] + trials["option"]).tolist(), truncate=True)
    score, fits = [], (full.real.sum(1) + 1 < each.cfg.n_ctx).numpy()
    for start in range(0, len(full), 32):
        few, more = full[start : start + 32], prompts[start : start + 32]
        with torch.inference_mode():
            logits = each(few.tokens, attention_mask=few.attention.long())[:, :-1].log_softmax(-1)
        seen = logits.gather(2, few.tokens[:, 1:, None])[..., 0]  # [text, pos - 1]
        ends = [row.nonzero()[n:, 0] - 1 for row, n in zip(few.real, more, strict=True)]
        score += [float(row[end].sum()) for row, end in zip(seen, ends, strict=True)]
    scored.append(trials.assign(model=model_name(each), score=score, fits=fits))
trials = pd.concat(scored)
print(f"{len(trials)} pairs of prompt and answer, {trials['fits'].mean():.0%} of them fit")

# %% [markdown]
# Right against the mean of the others, each less what it has over all prompts.

# %%
trials = trials[trials.groupby(["model", "task"])["fits"].transform("all")]
usual = trials.groupby(["model", "task", "option"])["score"].transform("mean")
trials = trials.assign(score=trials["score"] - usual)
right = trials["option"] == trials["answer"]
by_prompt = ["model", "task", "row"]
others_mean = trials[~right].groupby(by_prompt)["score"].mean()
cloze_scores = (trials[right].set_index(by_prompt)["score"] - others_mean).rename("margin")
cloze_scores = cloze_scores.reset_index()

# %% [markdown]
# And the largest value of the feature for mathematics in the prompt, of this model alone.

# %%
prompts = tokenize(model, cloze["prompt"].tolist(), truncate=True)
asked_fa = encode_saes(model, {main: saes[main]}, prompts)[main]
math_feature = int(own.get("math", own.iloc[0]))
strength = asked_fa.pool("max")[:, [math_feature]].toarray()[:, 0]
of_this = cloze_scores["model"] == model_name(model)
cloze_scores["activation"] = np.where(of_this, strength[cloze_scores["row"]], np.nan)
print(f"feature {math_feature} of {main} fires in {(strength > 0).sum()} of {len(cloze)} prompts")

# %% [markdown]
# By task, with intervals over prompts.

# %%
rows = []
for (name, task), group in cloze_scores.groupby(["model", "task"]):
    draw, numbers = derive_generator(0, task), np.arange(len(group))
    mean = bootstrap_by_document(group["margin"].to_numpy(), numbers, draw)
    row = {"model": name, "task": task, "margin": mean.estimate, "low": mean.low}
    rows.append(row | {"high": mean.high, "activation": float(group["activation"].mean())})
by_task = pd.DataFrame(rows, columns=["model", "task", "margin", "low", "high", "activation"])
print(by_task.round(2).to_string(index=False, na_rep=""))

# %% [markdown]
# Does the feature fire where the model does better, among prompts of one form? The median of each
# form is taken away from both.

# %%
of_this = by_task[by_task["model"] == model_name(model)].set_index("task")
is_sum = of_this.index.str.startswith("sum")
sums = cloze_scores[cloze_scores["model"] == model_name(model)]
sums = sums[sums["task"].str.startswith("sum")]
medians = sums.groupby("task")[["activation", "margin"]].transform("median")
pairs = (sums[["activation", "margin"]] - medians).to_numpy(dtype=float)
related = "it fires on all sums of a form alike, or on none"
if len(pairs) and np.ptp(pairs[:, 0]) > 0:
    draw = derive_generator(0, "activation and margin")
    r = bootstrap_by_document(pairs, np.arange(len(pairs)), draw, rank)
    bounds = f"{r.estimate:.2f} ({r.low:.2f} to {r.high:.2f})"
    related = f"activation and score have a rank correlation of {bounds}"

# %% [markdown]
# In words:

# %%
able = by_task[by_task["low"] > 0].groupby("model")["task"].agg("; ".join)
for name in (model_name(model), there):
    judged = (by_task["model"] == name).sum()
    tasks_named = able.get(name, "none")
    so(
        f"{name} finds the right answer likelier, beyond how likely it always is, in {tasks_named} "
        f"(of {judged} tasks judged)."
    )
if is_sum.any() and not is_sum.all():
    so(
        "the feature for mathematics fires at "
        + ", ".join(f"{row.activation:.1f} on '{row.Index}'" for row in of_this.itertuples())
        + f" (means); among sums of one form: {related}."
    )

# %% [markdown]
# ## 15. Models side by side
# Of the SAEs that ship: those of other models, and of this one the SAE read most closely; the
# sentence is about all. Columns are those of section 2. Numbers of two models compare only roughly:
# vectors, widths and training texts differ.

# %%
every = card_table()
every = every[every["ships"].astype(bool)].drop(columns="ships").set_index("sae")
every["fvu"] = 1 - every["variance_explained"]
every["ce_difference"] = every["ce_difference"].round(2) + 0.0  # no "-0.00"
elsewhere = [name for name in every.index if not name.startswith(f"{model_name(model)}-")]
shown = every.loc[[*elsewhere, *every.index[every.index == whole]]]
print(shown[["l0", "fvu", "ce_difference", "dead", "dense"]].round(2).to_string())
so(
    f"over the {len(every)} SAEs that ship, floors among them, FVU goes from "
    f"{every['fvu'].min():.3f} to {every['fvu'].max():.2f}, with "
    f"{every['l0'].min():.0f} to {every['l0'].max():.0f} latents active at a token."
)

# %% [markdown]
# Drawn: FVU beside that of random directions, with L0 and the number of latents that never fire.

# %%
drawn = {"FVU": (shown["fvu"], None, None)}
drawn["FVU of random directions"] = (1 - shown["null"], None, None)
axes = {"x_title": "FVU (left is better)", "y_title": "SAE: L0, dead latents"}
named = [f"{n}: {row.l0:.0f}, {row.dead:.0f}" for n, row in shown.iterrows()]
intervals(drawn, named, title="SAEs of several models", **axes).show()

# %% [markdown]
# ## 16. Look at two features that match
# The best-matching pair of two SAEs among the features chosen for a kind, side by side, each on its
# own scale. They are called one from the similarity of section 5 on.

# %%
from lenslab.show.explore import linked_table, side_by_side

latents = pd.DataFrame()
if others:
    kind = comparable_kinds(dictionaries[main], dictionaries[others[0]])[0]
    compared = dictionaries[main], dictionaries[others[0]], nulls, (kind,)
    pair = seed_pair if others[0] in seeds else compare(*compared)  # that of section 5
    latents = pair.latents.query("kind == @kind and latent in @own").sort_values("similarity")

# %% [markdown]
# The nearest and the farthest:

# %%
if len(latents):
    far, near = latents.iloc[0], latents.iloc[-1]
    ours, theirs = int(near["latent"]), int(near["partner"])
    verdict = "are called one" if near["similarity"] >= SHARED else "are too unlike to be one"
    so(
        f"of the features chosen for a kind, {ours} of {main} has the nearest partner in "
        f"{others[0]}, {theirs}, with a {kind} similarity of {near['similarity']:.2f}: "
        f"they {verdict} (from {SHARED}); the farthest has {far['similarity']:.2f}."
    )
else:
    others, ours, theirs = [], int(own.iloc[0]), int(own.iloc[0])
    so("there is no second SAE with a partner, so a feature is shown beside itself.")

# %% [markdown]
# Side by side:

# %%
partner = others[0] if others else main
view = side_by_side([(fas[main], ours), (fas[partner], theirs)], categories=list(labels.category))
view

# %% [markdown]
# All texts on which one feature fires, its tokens marked, those of its kind first; ten here, all on
# the page below.

# %%
from lenslab.show.tokens import highlight_batch

kind, shown_feature = next((k, f) for k, f in own.items() if f == ours or not others)
strength = pooled[main][:, [shown_feature]].toarray()[:, 0]
fired = np.flatnonzero(strength)
order = fired[np.lexsort([-strength[fired], labels.category[fired] != kind])]
print(
    f"{shown_feature} fires on {len(order)} texts, {(labels.category[order] == kind).sum()} {kind}"
)

# %% [markdown]
# Ten of them:

# %%
options = {"rows": order, "labels": labels.category[order]}
options["title"] = f"{main} {shown_feature}, chosen for {kind}: its kind's texts first"
marked, activation = fas[main].batch, fas[main].of(shown_feature)
everything = highlight_batch(marked, activation, max_texts=max(len(order), 1), **options)
highlight_batch(marked, activation, max_texts=10, **options)

# %% [markdown]
# The whole comparison as one page: the best feature of every kind in every SAE, linked where it has
# a page of its own, the pair above, and all texts of the feature.

# %%
from lenslab.show.report import save_report

columns = ["sae", "category", "feature", "auroc", "discriminating"]
table = linked_table(best.loc[best["sae"].isin(places), columns], fas)
sections = {"Side by side": [by_sae.round(3), sizes.round(3)], "Best features": [table]}
sections["Two features that match best"] = [view]
sections["All texts of one feature"] = [everything]
page = save_report("sae_comparison", f"SAEs of {model_name(model)}, compared", sections)
print(f"written: {page.with_suffix('.html').name}")

# %% [markdown]
# ## What was found, and what was not
# **Found**: what the lines that begin with *So:* say. Section 2 says which differences are more
# than reseeding gives; sections 5 to 7, how many latents two trainings share beyond what the data
# makes alike; section 9, that a trend over layers can come out of a rule alone; section 11, whether
# features follow form or content; section 12, whether selective features are needed.
#
# **Not shown**: that what holds for a small model holds for a large one. The SAEs of section 7 are
# small, trained for a twenty-fifth as long as those that ship, on the same vectors from both seeds:
# longer trainings may agree more. Of SAEs with more than 4,096 latents only those that fire most
# are matched. A feature without a partner may have been split or spread over several. The ablated
# features were chosen by kind, with two matched ones each: a small effect can be missed. Zero
# ablation takes a feature to a value that it often has, but not in such a context.
#
# **Exercises**
# 1. Match two seeds by firing instead of by decoder. Which latents have another partner?
# 2. Call features shared from .9 instead of .7. What is left, and what of the null?
# 3. Plant a fifth layer with half the strength of the first. What does the older rule say of it?
#
# <details><summary>Solutions</summary>
#
# 1. `seed_pair.latents.pivot(index="latent", columns="kind", values="partner")`, then compare the
#    columns; look at the rows with a small `rate` first.
# 2. `(seed_pair.latents.query("kind == 'decoder'")[["similarity", "null"]] >= 0.9).mean()`.
# 3. Put .5 before the scales in section 9, and run it from there on; look at both thresholds.
# </details>
