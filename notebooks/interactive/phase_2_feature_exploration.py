# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Phase 2: what do features fire on?
#
# **What you will learn**: how to read the features of a sparse autoencoder (SAE) on many texts;
# which are strong, frequent, selective; whether a feature tells one kind of text from the others,
# *on texts that it was not chosen on*; whether it does so better than cheaper candidates do; and
# whether it takes an SAE at all, when labels can be had. Every claim stands beside a control or a
# null; rankings, examples and heatmaps are descriptions.
#
# **Runs on** the bundled `pocket-gpt` and its SAEs, offline; the README says how long it takes and
# how much memory. For another model set `LENSLAB_MODEL` to `smollm2`, a name on the hub (`gpt2`) or
# a local Hugging Face folder before you start Jupyter.
#
# **How to read it**: one question per section, then code, a printed check, the control, a picture.
# Lines that begin with *So:* say what was found, computed from the numbers above them on whatever
# model you run; read alone, they are a summary.

# %% [markdown]
# ## 1. The instrument
# The model that is read; its SAEs come in section 2.

# %%
import numpy as np
import pandas as pd
import torch

from lenslab.models import load_model, model_name, random_twin
from lenslab.sae.find import card_table, find_sae
from lenslab.show.images import set_up_figures
from lenslab.show.words import so

set_up_figures()
model = load_model()
print(f"{model_name(model)}: {model.cfg.n_layers} layers of width {model.cfg.d_model}")

# %% [markdown]
# 420 short texts of seven kinds, written for this project, each kind in three *registers* (of
# Python: library, script, session or test). What a text is about varies independently of its kind:
# thirty topics, each twice in every kind. Half of the texts are for discovery, half are held out.

# %%
from lenslab.texts import label_texts, load_probes
from lenslab.tokens import tokenize

labels = label_texts(load_probes("categories"))
batch = tokenize(model, list(labels.texts), truncate=True)  # says so where it cuts
labels = labels.with_lengths(batch.real.sum(1).numpy())
print(f"{len(batch)} texts, {batch.n_real} real tokens; left out: {len(labels.skipped)}")
half = np.where(labels.held_out, "held out", "discovery")
print(pd.crosstab(labels.category, half, colnames=[""], rownames=[""]))

# %% [markdown]
# **Control**: length alone must not give the kind away. *AUROC* is the chance that a text of the
# kind has a higher value than another text; 0.5 is guessing.

# %%
from sklearn.metrics import roc_auc_score

lengths = batch.real.sum(1).numpy().astype(float)
by_length = {c: roc_auc_score(labels.category == c, lengths) for c in labels.categories}
for category, auroc in by_length.items():
    mean = lengths[labels.category == category].mean()
    print(f"{category:15s} {mean:5.1f} tokens on average, AUROC {auroc:.2f}")

# %% [markdown]
# Where it does, does it still among texts of similar length? Section 5 shuffles labels only among
# such.

# %%
from lenslab.features.specialists import discriminate

told = [c for c, auroc in by_length.items() if abs(auroc - 0.5) > 0.1]
alone = discriminate({"length": np.column_stack([lengths, -lengths])}, labels)
alone = alone.set_index("category").loc[told]
trust = "of a kind beyond .4 to .6 the p of section 5 could not be trusted"
if told:
    trust = f"among texts of similar length none of them: smallest q {alone['q'].min():.2f}"
if still := ", ".join(alone.index[alone["discriminating"]]):
    trust = f"the p of section 5 cannot be trusted for {still}"
so(
    f"length tells {', '.join(told) or 'no kind'} apart (AUROC {min(by_length.values()):.2f} to "
    f"{max(by_length.values()):.2f}; {trust})."
)

# %% [markdown]
# ## 2. The SAEs
# Numbers from their cards, on held-out documents. *L0* is the number of active features per token;
# `ce_difference`: nats of loss that the splice adds; `ce_recovered_zero`: share of the loss
# recovered, against zeroing the stream; `dead`, `dense`: numbers of features. **Null**: the
# variance that random directions with the same L0 explain.

# %%
cards = card_table(model)
ship = cards[cards["ships"].astype(bool)].drop(columns="ships")
print(ship.round(2).to_string(index=False) if len(ship) else "no bundled SAE for this model")
explained, null = ship["variance_explained"], ship["null"]
if len(ship) > 1:
    so(
        f"{len(ship)} SAEs ship for this model. The least of them explains {explained.min():.0%} "
        f"of its stream's variance, the best {explained.max():.0%}; random directions as sparse "
        f"explain {null.min():.0%} to {null.max():.0%}."
    )
elif len(ship):
    so(
        f"one SAE ships for this model. It explains {explained.min():.0%} of its stream's "
        f"variance; random directions as sparse explain {null.min():.0%}."
    )
else:
    so("no SAE ships for this model, so none can be compared with random directions.")

# %% [markdown]
# One name selects the SAE that this notebook reads; without one it is a bundled SAE of the middle
# layer, else a published one that was downloaded before, else a small one that is trained now. The
# SAE brings its hook with it; a model or hook that it was not trained on is refused. Some SAEs read
# activations without their mean: `prepare` gives what this one was trained on.

# %%
from lenslab.sae.inputs import input_transform, sae_hook

CHOSEN = None  # or a bundled name, such as "pocket-gpt-resid-1", or the absolute path of a folder
sae, SAE, origin = find_sae(model, CHOSEN)
prepare, middle = input_transform(sae, model), sae_hook(sae)
print(f"{SAE} ({origin}): {sae.cfg.d_in} dimensions -> {sae.cfg.d_sae} features at {middle}")

# %% [markdown]
# ## 3. Encode per token, pool after
# Every real token is encoded by itself; a text's value is then the `max`, the `mean` or the
# `fraction` of tokens over 0.

# %%
from lenslab.features.activations import encode_features
from lenslab.features.ranking import summarize_features

fa = encode_features(model, sae, batch, name=SAE)
pooled = {how: fa.pool(how) for how in ("max", "mean", "fraction")}
active = fa.matrix.nnz / fa.matrix.shape[0]  # features per token
print(f"{fa.matrix.shape[0]} tokens x {fa.n_features} features, {active:.1f} active per token")
seen_in_text = pooled["max"].nnz / len(batch)
print(f"pooled {pooled['max'].shape}: in a text {seen_in_text:.0f} features fire, on average")
for how, matrix in pooled.items():
    mean = f"mean over texts and features {matrix.mean():.3f}"
    print(f"{how:9s} largest value {matrix.max():6.1f}, {mean}")

# %% [markdown]
# **Control**: what does averaging *before* encoding do? It takes the values at every place, also at
# BOS and padding, which `harvest` would leave out; ten texts at a time and no layer after the
# SAE's, because a score for every word of the vocabulary at every place would fill the memory.

# %%
values = []  # of each part [text, pos, d_model]
options = {"names_filter": [middle], "stop_at_layer": int(middle.split(".")[1]) + 1}
for first in range(0, len(batch), 10):
    part = batch[first : first + 10]
    options["attention_mask"] = part.attention.long()
    with torch.inference_mode():
        _, cache = model.run_with_cache(part.tokens, **options)
    values.append(cache[middle])
values = torch.cat(values)

# %% [markdown]
# The *average* activation of a text is a vector that never occurs. How many of the features that it
# is encoded to fire at any token of the text at all, how many that do are missed, and is it worse
# where BOS and padding are averaged in?

# %%
seen = torch.tensor(pooled["max"].toarray()) > 0
masks = {"real": batch.real, "+ BOS": batch.attention, "+ padding": batch.real | ~batch.attention}
masks["+ both"] = torch.ones_like(batch.real)
overlap = {}
for name, mask in masks.items():
    average = (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    with torch.inference_mode():
        found = sae.encode(prepare(average)) > 0
    both = (found & seen).sum()
    overlap[name] = fire, missed = both / found.sum(), 1 - both / seen.sum()
    print(f"average of {name:9s}: {fire:.0%} of its features fire at a token, {missed:.0%} missed")

# %% [markdown]
# **Control**: how many of a text's features would be missed by looking at one token alone?

# %%
fire, missed = overlap["real"]
one_token = 1 - active / seen_in_text
so(
    f"encoding the average of a text misses {missed:.0%} of the features that fire in it, "
    f"{'no less' if missed >= one_token else 'less'} than one token alone does "
    f"({one_token:.0%}); of what it finds {fire:.0%} fires somewhere in the text. Features are "
    "encoded per token here, and pooled after."
)

# %% [markdown]
# ## 4. Strong, frequent, selective
# Five rankings of features over all texts; nothing is tested. `fired`: texts it fires on; `mean`:
# over all texts; `strong`: texts above half of its own largest value; *selective* is strong on the
# fewest texts, the strongest first; *frequency x mean*: share of texts it fires on, times its mean;
# *general*: ranked by the kind in which it fires least often; `tied`: features that share that
# place.

# %%
summary = summarize_features(pooled["max"], labels.category)
digits = "{:.3g}".format  # three of them, whatever the scale
for name, table in (
    ("strongest", summary.strongest(3)),
    ("frequent", summary.frequent(3)),
    ("selective", summary.selective(3)),
    ("frequency x mean", summary.most_composite(3)),
    ("general", summary.general(3)),
):
    shown = table[["fired", "largest", "mean", "strong", "tied"]]
    print(f"{name}:\n{shown.to_string(float_format=digits)}")

# %% [markdown]
# On how many texts do the first of three rankings fire?

# %%
first = (summary.strongest(1), summary.frequent(1), summary.selective(1))
strongest, frequent, selective = leading = [int(table.index[0]) for table in first]
so(
    f"the strongest feature ({strongest}) fires on {summary.frequency[strongest]:.0%} of the "
    f"texts, the most frequent ({frequent}) on {summary.frequency[frequent]:.0%}, the most "
    f"selective ({selective}) on {summary.frequency[selective]:.0%}. What they are about, no "
    "ranking says."
)

# %% [markdown]
# **Control**: random directions, as many of them active per token as SAE features. What both curves
# show is not the SAE's own.

# %%
from lenslab.capture import harvest
from lenslab.sae.controls import untrained_sae
from lenslab.show.feature_plots import firing_density

values = prepare(harvest(model, batch, middle)[middle])[batch.real]
null = untrained_sae(sae, values, round(active))
null_fa = encode_features(model, null, batch, name="random")
both = {"SAE": fa, "random directions": null_fa}
firing = {name: (each.matrix > 0).mean(axis=0) for name, each in both.items()}

# %% [markdown]
# The shares of tokens on which features fire (on a logarithmic axis: each step is tenfold).

# %%
dense = {name: int((rate > 0.1).sum()) for name, rate in firing.items()}
never = {name: int((rate == 0).sum()) for name, rate in firing.items()}
so(
    f"features fire at very different rates: {dense['SAE']} of {fa.n_features} on more than 10 % "
    f"of the tokens and {never['SAE']} on none; of random directions {dense['random directions']} "
    f"and {never['random directions']}."
)
firing_density(firing, title="How often features fire").show()

# %% [markdown]
# A simpler and common way counts: a value is *strong* above 5.0, whatever the feature's scale, and
# ties go to the lowest number. How many features share first place?

# %%
from lenslab.features.ranking import count_leaders

leaders = count_leaders(pooled["max"])
for row in leaders.itertuples():
    place = f"feature {row.feature}: {row.value:.3g} (tied with {row.tied - 1} others)"
    print(f"{row.leader:15s} {place if row.tied else 'none'}")
so(
    f"first place is shared by up to {leaders['tied'].max()} features by counting, and by "
    f"{first[2]['tied'].iloc[0]} for the most selective above: such a name is the lowest number "
    "among equals."
)

# %% [markdown]
# ## 5. A feature for each kind of text
# The feature with the best AUROC on the discovery half, scored once on the held-out half. `p`:
# held-out labels shuffled among texts of similar length; `q`: `p` corrected for looking at seven
# kinds. Registers lie within one kind and cannot be held fixed; `worst_register` is the lowest
# AUROC of one register's texts against the rest, where 0.5 is chance. *Discriminating*: `q` is at
# most .05.

# %%
found = discriminate({SAE: pooled["max"]}, labels)
shown = ["category", "feature", "auroc_discovery", "auroc", "worst_register", "q", "discriminating"]
print(found[shown].round(3).to_string(index=False))
so(
    f"{found['discriminating'].sum()} of {len(found)} kinds have a feature that tells them apart "
    f"on texts it was not chosen on: AUROC {found['auroc'].min():.2f} to "
    f"{found['auroc'].max():.2f}, where shuffled labels give .50 (largest q "
    f"{found['q'].max():.3f})."
)

# %% [markdown]
# ## 6. Better than cheaper candidates?
# The *same search* among candidates without this SAE: directions of largest variance (PCA, both
# signs) and single neurons of the model; counts of character sequences, read by no model; and an
# SAE trained on the random twin. The character counts are a weak reading of spelling: a rule made
# by hand, such as *has an emoji*, can do better.

# %%
from lenslab.features.specialists import find_specialists
from lenslab.sae.controls import control_matrices

twin = random_twin(model)
twin_sae, twin_name, twin_origin = find_sae(twin)
print(f"{twin_name} ({twin_origin}): {twin_sae.cfg.d_sae} features")
twin_fa = encode_features(twin, twin_sae, batch, name="random-twin SAE")
controls = control_matrices(model, sae, batch) | {"random-twin SAE": twin_fa.pool("max")}
special = find_specialists(pooled["max"], labels, controls, name=SAE, discrimination=found)
print("candidates:", special.candidates)
compared = special.comparisons.pivot(index="category", columns="control", values="control_auroc")
print("held-out AUROC of each search's winner:")
print(compared.assign(SAE=found.set_index("category")["auroc"]).round(2).to_string())

# %% [markdown]
# A *specialist* (1) is discriminating; (2) beats every control on held-out texts (95 % interval of
# the difference above 0), both with all candidates, which the figure shows, and with both sides cut
# to equally many; (3) is right on at least half of the texts it picks. `not_beaten`: controls that
# it does not beat in both ways. For non-English texts each language is left out of the search in
# turn, so that spelling one language does not win.

# %%
from lenslab.show.plots import intervals

table = special.table[["category", "auroc", "precision", "specialist", "not_beaten"]]
print(table.round(2).to_string(index=False))
special_kinds = table.loc[table["specialist"], "category"]
worse = special.comparisons.loc[special.comparisons["high"] < 0, "category"].unique()
so(
    f"{len(special_kinds)} of {len(table)} kinds have a specialist: "
    f"{', '.join(special_kinds) or 'none'}. For the others not every control is beaten, or the "
    f"feature picks more wrong texts than right ones; a control is surely better for "
    f"{', '.join(worse) or 'none'}."
)

# %% [markdown]
# Every difference with its interval: left of the line the control does better.

# %%
rows = {
    name: tuple(compared[["difference", "low", "high"]].to_numpy().T)
    for name, compared in special.comparisons.groupby("control", sort=False)
}
title = "The SAE's feature against each control's"
axes = {"x_title": "difference of held-out AUROC (right: the SAE's is better)", "y_title": "kind"}
intervals(rows, labels.categories, title=title, reference=0, controls=[], **axes).show()

# %% [markdown]
# Which languages does a lead over the controls come from, each scored where it was left out?

# %%
left_out = special.left_out.drop(columns="category")
print(left_out.round(2).to_string(index=False))
lead = left_out["auroc"] - left_out[list(controls)].max(axis=1)
clear = left_out.loc[lead > 0.05, "language"]
so(
    f"the feature leads every control by more than .05 in {', '.join(clear) or 'no language'}, of "
    f"{len(left_out)} languages that took no part in the search, ten texts each; elsewhere a "
    "control comes near."
)

# %% [markdown]
# The counting way stands beside it: texts of a kind above a threshold less other texts above it,
# best of five features; the threshold is 5.0 for every feature, or half of the feature's own
# largest value. **Null**: how many kinds have a positive score when the labels are shuffled? A
# count can fail in two ways: by false alarms, and by missing what section 5 finds.

# %%
columns = ["count_score_5.0", "count_score_half", "specialist"]
scores = special.table.set_index("category")[columns]
print(scores.to_string())
best = {threshold: special.best_by_count(threshold) for threshold in ("half", 5.0)}
print(f"features that ever reach 5.0: {(summary.largest > 5).mean():.0%}; best by count: {best}")
half, fixed = special.count_nulls
so(
    f"counting gives {half.observed} of {len(scores)} kinds a positive score, or {fixed.observed} "
    f"with a threshold of 5.0 (shuffled labels {half.mean_null:.1f} and {fixed.mean_null:.1f}), "
    f"where section 5 finds a discriminating feature for {found['discriminating'].sum()}."
)

# %% [markdown]
# ## 7. Does it take an SAE?
# Where labels can be had, a direction can be fitted to them, on the texts' mean activations at the
# same hook: by the *difference of means*, and by *logistic regression*. That is the ceiling beside
# which a single feature, chosen by the labels but not fitted to them, has to be seen. Between the
# two stand probes of the 5 and 16 features that labels select. **Controls**: the same two
# directions on character n-grams, which show how much of the ceiling is spelling, and on the
# random twin. All are fitted on the discovery half and scored on the other.

# %%
from lenslab.features.ceiling import ceiling
from lenslab.sae.controls import mean_activations, ngram_features

vectors = mean_activations(model, sae, batch)
nulls = {"n-grams": ngram_features(batch.texts, sae.cfg.d_sae)}
nulls["random twin"] = mean_activations(twin, twin_sae, batch)
ways = ceiling(pooled["max"], found, vectors, labels, nulls)
aurocs = ways.pivot(index="way", columns="category", values="auroc").loc[ways["way"].unique()]
print(aurocs.round(2).to_string())

# %% [markdown]
# Is that more than luck? The lead of logistic regression over the feature, and that of the same
# regression on n-grams, each with an interval that holds for all kinds together. A kind that
# everything tells apart, the n-grams too, is too easy to say anything about SAEs.

# %%
by_labels, by_spelling = "logistic regression", "n-grams: logistic regression"
leads = {way: rows.set_index("category").round(3) for way, rows in ways.groupby("way")}
fitted, spelled = leads[by_labels], leads[by_spelling]
columns = ["difference", "low", "high"]
print(fitted[columns].join(spelled[columns], rsuffix=" (n-grams)").round(2).to_string())
so(
    f"logistic regression on the activations reaches {aurocs.loc[by_labels].min():.2f} to "
    f"{aurocs.loc[by_labels].max():.2f}, the best single feature "
    f"{aurocs.loc['best feature'].min():.2f} to {aurocs.loc['best feature'].max():.2f}, logistic "
    f"regression on n-grams {aurocs.loc[by_spelling].min():.2f} to "
    f"{aurocs.loc[by_spelling].max():.2f}."
)

# %% [markdown]
# The same by kind, where an interval leaves no doubt:

# %%
surely = fitted["low"] > 0, fitted["high"] < 0, spelled["high"] < 0  # by kind
worse, better, beyond_spelling = (", ".join(s.index[s]) or "no kind" for s in surely)
so(
    f"where labels can be had it takes an SAE for {better}. The fitted direction is surely better "
    f"than the feature for {worse}; the feature is surely better than spelling for "
    f"{beyond_spelling}. What it gives is a direction that was found without labels."
)

# %% [markdown]
# The same scores, drawn; grey are the controls.

# %%
drawn = ["best feature", "16 features", "difference of means", by_labels, by_spelling]
drawn.append("random twin: logistic regression")
rows = {way: (aurocs.loc[way, list(labels.categories)], None, None) for way in drawn}
axes = {"x_title": "held-out AUROC (right is better)", "y_title": "kind"}
intervals(
    rows, labels.categories, title="One feature, and what labels fit", reference=0.5, **axes
).show()

# %% [markdown]
# ## 8. How often is this method wrong?
# `error_rate`: any kind called discriminating under shuffled labels. `power`: a planted feature
# with a true AUROC of 0.9 found. `specialist_*`: the same for specialists, without leaving
# languages out. `asked` is asked of the estimate. The controls know nothing of shuffled labels, so
# `specialist_power` is an upper end: where a control does well by itself, fewer are found. The
# result ships with the project; `make run FULL=1` computes it again.

# %%
from lenslab.files import saved_result

columns = [list(map(str, column)) for column in (labels.category, labels.held_out, labels.stratum)]
inputs = [fa.key, twin_fa.key, columns, special.candidates]
rates = saved_result("phase_2_error_rate_and_power", inputs)
if rates is None:
    print("not measured here: `.venv/bin/python benchmarks/error_rate_and_power.py` takes minutes;")
    print("set LENSLAB_MODEL for it as for this notebook")
else:
    print(rates.attrs["origin"])
    print(rates.round(3).to_string(index=False))

# %% [markdown]
# In words, where it was measured:

# %%
if rates is not None:
    rate = rates.set_index("measure")["estimate"].map("{:.0%}".format)
    so(
        f"under shuffled labels section 5 finds something in {rate['error_rate']} of cases, "
        f"section 6 in {rate['specialist_error']}; of planted features with an AUROC of .9 they "
        f"find {rate['power']} and {rate['specialist_power']}."
    )

# %% [markdown]
# ## 9. One feature, closely
# The feature of the kind that is told apart best on the discovery half: where it fires on held-out
# texts. An excerpt is the start of the text; the marked tokens below it show where it fires.

# %%
from lenslab.show.explore import explore_feature

best = found.loc[found["auroc_discovery"].idxmax()]
kind, feature = best["category"], int(best["feature"])
held = np.flatnonzero(labels.held_out).tolist()
held_fa = fa[held]
print(f"feature {feature}, chosen for {kind}; on held-out texts:")
print(held_fa.top_texts(feature, n=5).to_string(index=False, float_format=digits))

# %% [markdown]
# Does it fire on other kinds, too? The text below can be stepped through where a kernel runs.

# %%
fires = held_fa.pool("max")[:, [feature]].toarray()[:, 0] > 0
own = labels.category[held] == kind
so(
    f"feature {feature} fires on {fires[own].mean():.0%} of the held-out texts of its kind, "
    f"{kind}, and on {fires[~own].mean():.0%} of the others."
)
explore_feature(held_fa, feature, categories=list(labels.category[held]))

# %% [markdown]
# What it fires on in running text: a sample from each fifth of its firings, 1 the strongest. The
# text ships with the project: sampled from the model itself where that was done (`pocket-gpt`,
# `smollm2`), else from `pocket-gpt`. It is text as a model would write it, not as people do.

# %%
from lenslab.features.contexts import find_contexts
from lenslab.texts import sampled_text
from lenslab.tokens import pack

windows = pack(model, sampled_text(450, model_name(model)))
contexts = find_contexts(model, sae, windows, features=[feature], progress=False)
rate_there = contexts.fired[0] / contexts.tokens
so(
    f"in running text feature {feature} fires on {rate_there:.1%} of the tokens, in the probes on "
    f"{firing['SAE'][feature]:.1%}; the table shows at which."
)
contexts.quantiles(feature, n=5, per=2)[["quantile", "activation", "context"]].round(2)

# %% [markdown]
# What it does to the next token along the direct path, later layers skipped: its decoder direction
# read through the unembedding. **Control**: `times_control` is the effect over the largest of
# random directions of the same length; values near 1 say nothing.

# %%
from lenslab.features.readings import vocabulary_effects

table = vocabulary_effects(model, sae, [feature], n=5)
print(table.assign(token=table["token"].map(repr)).round(2).to_string(index=False))
beyond = table.loc[table["times_control"] > 1.5, "token"].map(repr)
so(
    f"along the direct path feature {feature} moves {len(beyond)} of {len(table)} shown tokens by "
    f"more than 1.5 times the largest effect of a random direction: {', '.join(beyond) or 'none'}."
)

# %% [markdown]
# ## 10. Is it what the text says, or how it is written?
# What each kind's feature fires on, by class of token. **Control**: how common each class is among
# all tokens. The last row is the share that falls on the feature's single most frequent token; even
# a feature of one token can carry a whole text where attention brings the text there.

# %%
from lenslab.features.readings import feature_names, firing_summary, form_and_concept, token_classes

chosen = found["feature"].tolist()
classes = token_classes(held_fa, chosen)
kind_names = {f: f"{f} {kind}" for kind, f in zip(labels.categories, chosen, strict=True)}
print(classes.rename(columns=kind_names).round(2).to_string())

# %% [markdown]
# Most of it on punctuation, or on one token? Then that is what the feature is called, and its score
# without those tokens shows what it knows beside.

# %%
readings = firing_summary(fa, chosen, labels)
print(readings.round(2).to_string(index=False))
without = [
    f"{row.feature} ({row.category}): {row.share:.0%} on {row.fires_on}, "
    f"{row.token_share:.0%} on {row.token!r} alone: AUROC {row.auroc:.2f}, without those tokens "
    f"{row.auroc_without:.2f}"
    for row in readings[readings["share"] > 0.8].itertuples()
]
so(
    f"{len(without)} of {len(readings)} chosen features put more than 80 % of their activation on "
    f"one class of tokens{': ' if without else ''}{'; '.join(without)}."
)

# %% [markdown]
# The matched set says sixty things in four forms each: code or formula, plain, formal, another
# language. How much of a feature's variance follows the form, how much the content? **Null**:
# shuffled forms, shuffled contents. Lengths differ a little between the forms (see the card of the
# probes), and a maximum grows with length.

# %%
matched = load_probes("matched")
matched_batch = tokenize(model, matched["text"].tolist(), truncate=True)
matched_fa = encode_features(model, sae, matched_batch, name=SAE)
split = form_and_concept(matched_fa.pool("max"), matched["form"], matched["concept"])
print(f"{len(split)} features fire on ten texts or more")
for name, column in (("form", "form"), ("content", "concept")):
    low_p = f"p <= .05 for {np.mean(split[f'{column}_p'] <= 0.05):.0%} (chance 5%)"
    print(f"{name:8s} median share of variance {np.median(split[column]):.2f}; {low_p}")

# %% [markdown]
# Every point is a feature. Those in the upper left follow content, those in the lower right form.
# (Shares are freed of what chance gives, and so can fall below 0.)

# %%
from lenslab.show.plots import scatter

by_form, by_content = split["form_p"] <= 0.05, split["concept_p"] <= 0.05
so(
    f"of {len(split)} features {np.mean(by_form & ~by_content):.0%} depend detectably on the form "
    f"alone, {np.mean(by_content & ~by_form):.0%} on the content alone, "
    f"{np.mean(by_form & by_content):.0%} on both (by chance 5 %, 5 % and 0 %), but weakly: median "
    f"shares of variance {np.median(split['form']):.2f} and {np.median(split['concept']):.2f}."
)
marked = np.isin(split["feature"], chosen)
print(split[marked].round(3).to_string(index=False))

# %% [markdown]
# Drawn, the features chosen for a kind in colour:

# %%
points = {
    "names": [kind_names.get(f, f) for f in split["feature"]],
    "marked": marked,
    "marked_name": "chosen for a kind",
}
axes = {"x_title": "share of variance: form", "y_title": "share of variance: content"}
scatter(
    split["form"], split["concept"], title="Form and content", diagonal=True, **points, **axes
).show()

# %% [markdown]
# ## 11. Pictures of many features
# The features chosen for each kind, as means over the held-out texts of every kind: does a feature
# also fire where another kind looks alike, a mathematical one on Python, say? By chance one of
# seven is largest in its own kind.

# %%
from lenslab.features.ranking import category_profile

profile = category_profile(held_fa.pool("max"), labels.category[held], list(kind_names))
means = profile.pivot(index="category", columns="feature", values="mean")
means = means.loc[list(labels.categories), list(kind_names)]
pairs = list(zip(labels.categories, chosen, strict=True))
own = sum(means[f].idxmax() == kind for kind, f in pairs)
second = [means[f].drop(kind).max() / means[f].max() for kind, f in pairs]
so(
    f"{own} of {len(chosen)} chosen features are strongest in the kind they were chosen for (by "
    f"chance 1); in the next kind they reach {min(second):.0%} to {max(second):.0%} of that."
)

# %% [markdown]
# A column is a feature, with the kind that it was chosen for; colours are shares of its largest
# mean.

# %%
from lenslab.show.feature_plots import category_feature_heatmap, text_feature_heatmap

title = "What each kind's feature does in every kind (held-out texts)"
category_feature_heatmap(means, labels.categories, list(kind_names.values()), title=title).show()

# %% [markdown]
# The same features and the leaders of section 4, a row each, on every held-out text.

# %%
for why, leader in zip(("strongest", "frequent", "selective"), leading, strict=True):
    kind_names[leader] = f"{kind_names.get(leader, leader)}, {why}"
drawn = held_fa.pool("max")[:, list(kind_names)]
fires = held_fa.pool("max")[:, chosen].toarray() > 0  # [text, kind]
own = labels.inside[held]
so(
    f"a kind's feature fires on {fires[own].mean():.0%} of the held-out texts of its kind and on "
    f"{fires[~own].mean():.0%} of the others; the strongest of all features on "
    f"{np.mean(drawn[:, [list(kind_names).index(strongest)]].toarray() > 0):.0%}."
)
title = "Each kind's feature and the leaders on held-out texts"
text_feature_heatmap(drawn, list(kind_names.values()), labels.category[held], title=title).show()

# %% [markdown]
# ## 12. Which features fire together?
# First by kind: the features that fire on most of its texts. **Control**: the share of all texts on
# which they do.

# %%
from lenslab.features.ranking import features_per_category

common = features_per_category(pooled["max"], labels.category, top=2)
common["share"] = common["texts"] / common["of"]
common["overall"] = summary.frequency[common["feature"].to_numpy()]
print(common.round(2).to_string(index=False))
everywhere = (common["overall"] > 0.9).sum()
so(
    f"{everywhere} of the {len(common)} most frequent features by kind fire on more than 90 % of "
    "all texts: being frequent in a kind is not being about it."
)

# %% [markdown]
# *PMI* is the log of how often two features fire together over what independence gives, over all
# texts. **Null**: `expected` and `q` come from firings shuffled among texts of one kind, so that
# what the kind explains does not count: compare `joint` with `expected`. Taken are the most
# frequent of the features that are on at most half of the texts, each named by the token that it
# fires on most.

# %%
from lenslab.features.together import coactivation

often = np.argsort(-np.where(summary.frequency <= 0.5, summary.frequency, 0), kind="stable")[:10]
names = feature_names(fa, often)
together = coactivation(pooled["max"], often, strata=labels.category)
pairs = together.to_frame()
columns = ["feature", "other", "p_other_given_feature", "joint", "expected", "pmi", "q"]
print(pairs.head(5)[columns].round(3).to_string(index=False))
so(
    f"{(pairs['q'] <= 0.05).sum()} of {len(pairs)} pairs fire together more than within-kind "
    "chance (q <= .05; by chance none)."
)

# %% [markdown]
# Red: more often together than independence gives; blue: less.

# %%
from lenslab.show.feature_plots import coactivation_heatmap

coactivation_heatmap(together.pmi, names, title="Which features fire together").show()

# %% [markdown]
# ## 13. Look for a concept
# The discovery texts about one topic, in any form, against the others: which features separate
# them? `family_p`: how often the best of *all* features does as well under shuffled labels; a large
# one means that nothing was found. The best one is then scored on the held-out half, where 0.5 is
# chance. Python is the positive control.

# %%
from lenslab.features.together import concept_features

about = (load_probes("categories")["topic"] == "music").to_numpy()[labels.row]
matrix, half = pooled["max"], labels.held_out
verdicts = []
for name, inside in (("music", about), ("Python", labels.category == "python")):
    search = concept_features(matrix[inside & ~half], matrix[~inside & ~half]).head(3)
    values = matrix[:, [search["feature"][0]]].toarray()[half, 0]
    columns = ["feature", "auroc", "mean_concept", "mean_background", "family_p"]
    print(f"{name}:\n{search[columns].round(3).to_string(index=False)}")
    was = "found" if search["family_p"][0] <= 0.05 else "not found"
    texts = f"{int(inside[half].sum())} held-out texts about it"
    print(f"the first on {texts} and the others: AUROC {roc_auc_score(inside[half], values):.2f}")
    verdicts.append(f"{name} is {was} (family p = {search['family_p'][0]:.3f})")
so(f"{', '.join(verdicts)}.")

# %% [markdown]
# ## 14. Explore
# Type a text, see what fires at which token, step through the features. Without a running kernel
# the same is shown as it stands.

# %%
from lenslab.show.explore import FeatureExplorer

explorer = FeatureExplorer(model, sae, fa, categories=list(labels.category), feature=feature)
fired = explorer.here.pool("max").nnz
so(
    f"{fired} of {fa.n_features} features fire in the example text; in an average probe "
    f"{seen_in_text:.0f} do."
)
explorer

# %% [markdown]
# ## What was found, and what was not
# **Found**: what the lines that begin with *So:* say. Section 5 shows for which kinds one feature
# tells the kind apart on texts that it was not chosen on; section 6, for which of them the same
# search among directions, neurons and bare characters finds nothing as good; section 7, that this
# is not the same as needing an SAE, for labels find directions of their own; section 10, what such
# features fire on.
#
# **Not shown**: that the model uses these features (that takes interventions), that they mean what
# the kind's name says, or that it holds for other models or SAEs. Seven kinds and 420 texts by one
# group of writers are a small instrument, and one pooling (`max`) was fixed beforehand: others may
# give other specialists.
#
# **Exercises**
# 1. Read the SAE after the first block instead. Which specialists are left?
# 2. Pool by `mean` instead of `max` in section 5. Does the feature chosen for any kind change?
# 3. Write ten texts of an eighth kind, and search for its feature with `concept_features`.
#
# <details><summary>Solutions</summary>
#
# 1. Set `CHOSEN = "pocket-gpt-resid-1"` in section 2 and run sections 2, 3, 5 and 6 again, in
#    section 6 without the twin's SAE (`controls = control_matrices(model, sae, batch)`), which is
#    one of the middle layer. Then run `token_classes` on the winners before saying why.
# 2. `discriminate({SAE: pooled["mean"]}, labels)["feature"]`, beside `found["feature"]`.
# 3. `mine = encode_features(model, sae, tokenize(model, [...])).pool("max")` with your texts in the
#    list, then `concept_features(mine, pooled["max"]).head(10)`; look at `family_p` before the
#    AUROC.
# </details>
