# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Phase 1: load a language model and open it up
#
# **What you will learn**: what a language model is made of and where one can look inside (*hook
# points*); what the three streams carry; why the first position and padding must be kept out of
# every average; and what a *sparse autoencoder* (SAE) turns an activation into. Each finding is
# shown beside a control that could have refuted it.
#
# **Runs on** the bundled `pocket-gpt`, offline; the README says how long it takes and how much
# memory. For another model set `LENSLAB_MODEL` to a name on the hub (`gpt2`) or a local Hugging
# Face folder before you start Jupyter.
#
# **How to read it**: one question per section, then code, a printed check, the control, a picture.

# %% [markdown]
# ## 1. What is it made of?
# Load the model, and beside it its *random twin*: the same architecture with untrained weights.

# %%
import numpy as np
import pandas as pd
import torch

from lenslab.models import load_model, model_name, parameter_table, random_twin, summarize
from lenslab.show.images import set_up_figures

set_up_figures()
model = load_model()
twin = random_twin(model)
size, twin_size = summarize(model).parameters, summarize(twin).parameters
print(f"{model_name(model)}: {size:,} parameters, the twin {twin_size:,}")

# %% [markdown]
# The summary is read from the loaded model, not from a model card. (In a mixture of experts a
# router sends each token to a few of many small MLPs, the experts; together they are what is called
# MLP below.)

# %%
summary = summarize(model)
shape = f"{summary.layers} layers of width {summary.d_model}, {summary.heads} heads"
print(f"{shape}, context {summary.context} tokens")
mlp = f"MLP {summary.d_mlp} wide"
if summary.experts:
    used = f"{summary.experts_per_token} of them for a token,"
    mlp = f"{summary.experts} experts {summary.d_mlp} wide, {used}"
print(f"{mlp} with {summary.activation}; {summary.vocabulary:,} tokens in the vocabulary")
summary.to_frame()

# %% [markdown]
# Most parameters sit in the blocks; the embedding has one row per token of the vocabulary.

# %%
table = parameter_table(model)
blocks = summary.block_parameters / summary.parameters
embeddings = summary.embedding_parameters / summary.parameters
print(f"in blocks {blocks:.1%}, in embeddings {embeddings:.1%}")
print(f"{len(table)} tensors, {len(parameter_table(model, layer=0))} of them in block 0")
parameter_table(model, layer=0)

# %% [markdown]
# ## 2. Where can one look?
# A *hook point* is a named place in the forward pass where a value can be read or changed.

# %%
from lenslab.hooks import UnknownHook, check_hooks, hook_table, stream_hook

hooks = hook_table(model)
of_block = hook_table(model, layer=0)
print(f"{len(hooks)} hook points, {len(of_block)} of them in block 0; the first ten of block 0:")
print(of_block.head(10).to_string(index=False))

# %% [markdown]
# Three streams matter most: *attention*, *MLP* and *residual*. The residual stream runs through the
# whole model; in every block the attention adds its output to it, then the MLP adds its own. It can
# be read before, between and after. (In *parallel* blocks, as Pythia's, both read the stream as it
# comes in: there is no between.)

# %%
middle = model.cfg.n_layers // 2
for stream in ("residual_pre", "attention", "residual_mid", "mlp", "residual"):
    try:
        print(f"{stream:13s} {stream_hook(model, middle, stream)}")
    except UnknownHook:
        print(f"{stream:13s} is not there: this model's blocks are parallel")

# %% [markdown]
# A hook name with a slip in it is refused. (TransformerLens's bridge itself ignores it and returns
# nothing.)

# %%
try:
    check_hooks(model, [f"blocks.{middle}.hook_residpost"])
except UnknownHook as error:
    print(str(error).split(". It has")[0])

# %% [markdown]
# ## 3. Which tokens count?
# Twenty-eight short texts of seven kinds, written for this project, become one batch. `real` marks
# the tokens that
# belong to a text: not the beginning-of-sequence token (BOS), not padding.

# %%
from lenslab.capture import harvest
from lenslab.texts import load_probes
from lenslab.tokens import tokenize

probes = load_probes("first_look")
batch = tokenize(model, probes["text"].tolist(), truncate=True)  # says so where it cuts
lengths = batch.real.sum(dim=1)
print(f"{len(batch)} texts, {batch.n_real} real tokens of {batch.tokens.numel()} places")
print(f"lengths {lengths.min()} to {lengths.max()}; the first of each kind:")
for row in probes.groupby("category", sort=False).head(1).itertuples():
    print(f"{row.category:15s} {row.text[:70]!r}")

# %% [markdown]
# A text must give the same activations alone and in a batch, padded on either side.

# %%
hook = stream_hook(model, middle)
right = harvest(model, batch, hook)[hook]
left = tokenize(model, batch.texts, truncate=True, pad_side="left")
others = {"padded left": harvest(model, left, hook)[hook][left.real]}
alone = [tokenize(model, text, truncate=True) for text in batch.texts]
others["alone"] = torch.cat([harvest(model, one, hook)[hook][one.real] for one in alone])
for name, other in others.items():
    largest = (other - right[batch.real]).abs().max()
    print(f"{name:12s} equal within 1e-3: {bool(largest < 1e-3)}")

# %% [markdown]
# **Control**: the check can fail. Without the mask, left padding shifts every position and is
# attended to as if it were text. (Two unrelated vectors of equal norm would differ by the square
# root of 2.)

# %%
with torch.inference_mode():
    careless = model.run_with_cache(left.tokens, names_filter=[hook])[1][hook]
error = (careless[left.real] - right[batch.real]).norm() / right[batch.real].norm()
equal = bool(error < 1e-3)
print(f"left padding without a mask: relative error {float(error):.1f}, so equal: {equal}")

# %% [markdown]
# ## 4. The streams
# If the residual stream is a sum, then before + attention + MLP = after, in every block.
# **Control**: with the MLP left out the sum must fail.

# %%
from lenslab.circuits.streams import stream_profile

profile, twin_profile = stream_profile(model, batch), stream_profile(twin, batch)
holds = bool((profile.sum_error < 1e-5).all())
without_mlp = profile.sum_error_without_mlp.min()
print(f"before + attention + MLP = after in all {len(profile)} blocks: {holds}")
print(f"control, the MLP left out: relative error {without_mlp:.2f} or more")

# %% [markdown]
# How much does each block write? `residual` is the stream after the block, the other two are what
# the block added.

# %%
from lenslab.show.plots import attention_map, bars, heatmap, lines

norms = profile[["residual", "attention", "mlp"]]
print(norms.round(1).to_string())
print("random twin, residual:", twin_profile.residual.round(1).tolist())
curves = {**norms, "residual, twin": twin_profile.residual}
by_layer = {"x_title": "layer", "log_y": True}
lines(curves, title="What each stream carries", y_title="mean norm at real tokens", **by_layer)

# %% [markdown]
# | stream | moves information between positions? | what it computes from |
# |---|---|---|
# | attention output | yes, and nothing else does | the residual stream here and before |
# | MLP output | no, one position at a time | the residual stream with what attention brought |
# | residual stream | it is the sum | the embedding and every attention and MLP output so far |
#
# So an MLP's output depends on context too. That can be measured: how alike is a stream at two
# occurrences of one token in different texts? One would mean that context is ignored; the level of
# other tokens (the **control**), that the token does not matter.

# %%
from lenslab.circuits.streams import context_similarity

shown = ["same token", "other token"]
similarity = context_similarity(model, batch, middle)
over = f"{similarity['tokens'].iloc[0]:.0f} tokens that occur in several texts"
print(f"mean cosine at layer {middle}, over {over}:")
print(similarity[shown].round(2).to_string())
print("random twin:")
print(context_similarity(twin, batch, middle)[shown].round(2).to_string())

# %% [markdown]
# Where the same token is below 1, context (its position included) reaches the stream. Where the
# twin shows as much, that is the architecture's doing and was not learned.

# %% [markdown]
# ## 5. Is the first position odd?
# Nothing comes before BOS, and many models (GPT-2 among them) park a huge vector there, so that an
# average which includes it is about BOS. Does this one?

# %%
if batch.real[:, 0].all():
    print("this tokenizer has no BOS: what is called so here is the first token of a text")
ratio, twin_ratio = (p.first_position / p.residual for p in (profile, twin_profile))
print("norm at BOS over norm elsewhere, by layer:", ratio.round(1).tolist())
print("random twin:", twin_ratio.round(1).tolist())
print(f"largest: {ratio.max():.1f}; a huge vector (above 3 somewhere): {bool(ratio.max() > 3)}")
curves = {"BOS": profile.first_position, "real tokens": profile.residual}
curves["BOS, twin"] = twin_profile.first_position
lines(curves, title="The first position", y_title="mean norm of the residual stream", **by_layer)

# %% [markdown]
# A norm can hide in a few dimensions (*massive activations*, two of them in GPT-2). The share of
# the squared norm that the two largest dimensions hold, at BOS, at real tokens (the **control**),
# and at the twin's BOS. Which they are is asked in the layer where BOS is longest compared with the
# others (the ratio above):

# %%
share = profile[["two_largest_first", "two_largest_rest"]]
print(share.assign(twin_first=twin_profile.two_largest_first).round(2).to_string())
peak_layer = int(ratio.argmax())
peak_hook = stream_hook(model, peak_layer)
largest = harvest(model, batch[:1], peak_hook)[peak_hook][0, 0].abs().topk(2).indices
held, elsewhere = profile.two_largest_first[peak_layer], profile.two_largest_rest[peak_layer]
print(f"at layer {peak_layer} dimensions {sorted(largest.tolist())} hold {held:.0%} of it")
print(f"at real tokens each token's own two largest hold {elsewhere:.0%}")
residual = harvest(model, batch, hook)[hook]

# %% [markdown]
# ## 6. Activations of the texts
# One vector per text: the residual stream at its last real token.

# %%
last = batch.real.long().cumsum(1).argmax(1)
vectors = residual[torch.arange(len(batch)), last].double().numpy()
frame = probes[["id"]].assign(mean=vectors.mean(1).round(1) + 0, std=vectors.std(1))
frame["norm"] = np.linalg.norm(vectors, axis=1)
print(f"{tuple(vectors.shape)} at {hook}")
print(frame.iloc[::4].round(1).to_string(index=False))

# %% [markdown]
# One of them as it is: hundreds of values, none with a meaning of its own. Is it spread evenly over
# the dimensions? What share of the sum of squares lies in the largest tenth of them. **Controls**:
# the same text in the twin, and as many random normal numbers.

# %%
from lenslab.runtime import derive_generator

twin_vector = harvest(twin, batch[:1], hook)[hook][0, last[0]].double().numpy()
noise = torch.randn(len(twin_vector), generator=derive_generator(0, "normal numbers"))
values = {"model": vectors[0], "random twin": twin_vector, "normal numbers": noise.double().numpy()}
for name, v in values.items():
    squares = np.sort(v**2)[::-1]
    share = squares[: len(v) // 10].sum() / squares.sum()
    print(f"{name:14s} share of the largest tenth {share:.2f}")
units = {name: values[name] / values[name].std() for name in ("model", "random twin")}
title = "One activation, in units of its spread"
bars(units, title=title, x_title="dimension", y_title="value", overlay=True)

# %% [markdown]
# The same token in every layer: how much of it is still there after the next block? The cosine of
# each layer's vector with the next one's. **Control**: with the next one's at the end of another
# text.

# %%
through = [stream_hook(model, layer) for layer in range(model.cfg.n_layers)]
found = harvest(model, batch[:2], through)
ends = torch.stack([found[name][[0, 1], last[:2]] for name in through])  # [layer, text, d_model]
unit = torch.nn.functional.normalize(ends, dim=-1)
for name, other in (("the same text", 0), ("another text", 1)):
    print(f"{name:14s}", (unit[:-1, 0] * unit[1:, other]).sum(-1).numpy().round(1) + 0)
values = (ends[:, 0] / ends[:, 0].std(-1, keepdim=True)).clamp(-4, 4)
layers, dimensions = (list(range(size)) for size in values.shape)
title = "One token through the layers, in units of each layer's spread"
axes = {"x_title": "dimension", "y_title": "layer"}
heatmap(values, dimensions, layers, title=title, centre=True, **axes)

# %% [markdown]
# ## 7. Attention maps
# In a random sequence that is repeated once, only looking back helps. Which heads do?
# `previous_token`: weight on the token before; `duplicate_token`: on the same token, one copy
# earlier; `induction`: on the token after that one. Head 2.3 is head 3 of layer 2. The loss is in
# *nats*, minus the natural logarithm of the probability of what came. **Control**: the twin's best.

# %%
from lenslab.circuits.streams import head_scores

heads, twin_heads = head_scores(model), head_scores(twin)
for kind in ("previous_token", "duplicate_token", "induction", "first_position"):
    layer, head, score = heads.best(kind)
    best = f"head {layer}.{head}: mean weight {score:.2f}"
    print(f"{kind:16s} {best}, the twin's best {twin_heads.best(kind)[2]:.2f}")
first, second = heads.loss_first, heads.loss_second
chance = np.log(summary.vocabulary)
losses = f"{first:.1f} nats, on the second {second:.1f}, by chance {chance:.1f}"
print(f"loss on the first copy {losses}")
print(f"the second copy is predicted at least 1 nat better than chance: {second < chance - 1}")

# %% [markdown]
# A weight near one would be a head with one job; a small one, a tendency. *Induction*, copying what
# followed last time, shows as a second copy that is predicted well. Where the last line says False,
# this model has not learned it.

# %% [markdown]
# One head on one text, the strongest on the previous token: a row says where a token looks, and
# sums to one.

# %%
layer, head, _ = heads.best("previous_token")
sample = tokenize(model, "The dog saw the cat, and the cat saw the dog.")
pattern_hook = f"blocks.{layer}.attn.hook_pattern"
pattern = harvest(model, sample, pattern_hook)[pattern_hook][0, head]
whole = bool(((pattern.sum(-1) - 1).abs() < 1e-4).all())
ahead = bool(pattern.triu(1).any())
print(f"rows sum to one: {whole}; looks ahead: {ahead}")
to_previous = int((pattern[2:].argmax(-1) == torch.arange(1, len(pattern) - 1)).sum())
print(f"in this text {to_previous} of {len(pattern) - 2} tokens look most at the one before them")
attention_map(pattern.numpy(), sample.strings(0), title=f"Head {layer}.{head}")

# %% [markdown]
# ## 8. What does it say, and what does it know?
# Greedy continuation takes the most likely token every time; sampling draws from the distribution,
# with a seed.

# %%
from lenslab.tokens import generate

for prompt in ("The capital of France is", "def mean(values):\n    return", "Once upon a time"):
    print(repr(generate(model, prompt, max_new_tokens=10)))
sampled = generate(model, prompt, max_new_tokens=10, temperature=0.7, seed=42)
print("sampled:", repr(sampled))
print("random twin:", repr(generate(twin, prompt, max_new_tokens=6)))

# %% [markdown]
# How much it knows shows in its loss, in bits per token. **Controls**: the same tokens in random
# order, where only their frequency helps; the twin; and a uniform guess.

# %%
from lenslab.circuits.streams import token_bits

bits = probes[["category"]].assign(model=token_bits(model, batch))
bits["shuffled"] = token_bits(model, batch, shuffle=True)
bits["twin"] = token_bits(twin, batch)
print(bits.groupby("category").mean().round(1).to_string())
print(f"a uniform guess over the vocabulary: {np.log2(summary.vocabulary):.1f}")

# %% [markdown]
# ## 9. From dense to sparse
# A *sparse autoencoder* (SAE) writes an activation as a sum of a few *features* out of many:
# *encode* gives each feature a strength of zero or more, *decode* adds up strength times the
# feature's direction, plus a bias, and that is the *reconstruction*. It was trained at one hook of
# one model, and is refused anywhere else. For a model without SAEs a published one is used that was
# downloaded before, or a small one is trained while you wait.

# %%
from lenslab.sae.find import find_sae
from lenslab.sae.load import sae_hook

sae, name, origin = find_sae(model)  # of the middle layer
print(f"{name} ({origin}) reads {sae_hook(sae)}")
print(f"{sae.cfg.d_in} dimensions -> {sae.cfg.d_sae} features")

# %% [markdown]
# Encoding the activations of another model or hook would give numbers that mean nothing.
# `input_transform` refuses another model, width or hook (here the random twin), and gives what the
# SAE was trained on: some published SAEs read activations without their mean.

# %%
from lenslab.sae.load import SAEMismatch, input_transform

prepare = input_transform(sae, model)
try:
    input_transform(sae, twin)
except SAEMismatch as error:
    print("refused:", str(error).split(":")[0])
activations = harvest(model, batch, sae_hook(sae))[sae_hook(sae)]
with torch.inference_mode():
    features = sae.encode(prepare(activations))
print("features [text, position, feature]:", tuple(features.shape))

# %% [markdown]
# What might an SAE find in each of the streams of section 4? A hypothesis, to be tested where SAEs
# of several streams
# are compared: in the attention output what is fetched from elsewhere (the subject of a verb, an
# open bracket, what followed last time); in the MLP output what one place makes of it (a word's
# sense, a known phrase); in the residual stream both. For GPT-2 small there are published SAEs of
# all three: `.venv/bin/python -m lenslab.sae.hub list --model gpt2-small`. `hook_attn_out` is what
# all heads write together; what each head writes is `hook_result`, computed only after
# `model.set_use_attn_result(True)`.
#
# Dense against sparse, at one token: nearly every dimension of the activation is in use, few
# features are. (A *TopK* SAE keeps a fixed number of features at every token: its L0 was chosen and
# is no finding.) Dimension and feature numbers have nothing to do with each other; they only share
# the axis.

# %%
x, f = activations[0, last[0]], features[0, last[0]]
active = (features[batch.real] > 0).sum(-1).float()
in_use = (x.abs() > 0.01).float().mean()
print(f"activation: {(x == 0).sum()} exact zeros, {in_use:.0%} of dimensions above 0.01")
print(f"features active per token (L0): mean {active.mean():.1f} of {sae.cfg.d_sae}")
print(f"sparsity {1 - active.mean() / sae.cfg.d_sae:.2%}")
title = "The first 100 dimensions and the first 100 features"
both = {"activation": x[:100], "features": f[:100]}
bars(both, title=title, x_title="index", y_title="value", overlay=True)

# %% [markdown]
# The ten strongest features at that token. Numbers mean nothing by themselves; published SAEs link
# to Neuronpedia.

# %%
from lenslab.sae.load import neuronpedia_link

top = f.topk(10)
links = [neuronpedia_link(sae, i) or "no page" for i in top.indices.tolist()]
strongest = pd.DataFrame({"feature": top.indices, "activation": top.values, "Neuronpedia": links})
print(f"at {batch.strings(0)[last[0]]!r}, the end of {probes['id'][0]}:")
print(strongest.round(1).to_string(index=False))

# %% [markdown]
# Feature numbers carry no meaning, so the active ones should lie evenly over the range. **Null**:
# the same number of features drawn at random, 500 times, and how uneven those are. (Where nearly
# all features fired somewhere, neither can be uneven, and nothing is tested.)

# %%
ever = (features[batch.real] > 0).any(0).numpy()
counts = ever.reshape(16, -1).sum(1)
shuffle = np.random.default_rng(0)
null = [np.ptp(shuffle.permutation(ever).reshape(16, -1).sum(1)) for _ in range(500)]
as_uneven = np.mean(np.array(null) >= np.ptp(counts))
print(f"{ever.sum()} features fired somewhere; in 16 equal bins {counts.min()} to {counts.max()}")
print(f"random draws are at least as uneven in {as_uneven:.0%} of cases")
axes = {"x_title": "bin of feature numbers", "y_title": "features"}
bars({"active features": counts}, title="Where the active features lie", **axes)

# %% [markdown]
# ## 10. Is the SAE any good?
# *FVU* is the share of variance that the reconstruction misses; *CE*, cross-entropy, is the model's
# loss in nats as it is (clean), with the reconstruction in the activation's place (spliced), and
# with zeros there; *recovered* is how much of that damage the reconstruction undoes (`none` where
# there was no damage). **Null**: an SAE of the same shape and sparsity with random directions. It
# recovers a good deal too, which is why a high recovered share alone says little. *Dead* counts
# features that never fired on these few texts; the SAE's card has the numbers for held-out
# documents.

# %%
from lenslab.sae.controls import evaluate_null
from lenslab.sae.evaluate import evaluate_sae

scores = evaluate_sae(model, sae, batch)
null = evaluate_null(model, sae, batch, scores.l0)
shown = "l0 fvu cosine ce_clean ce_spliced ce_zero ce_recovered_zero ce_recovered_mean dead dense"
both = pd.DataFrame({"SAE": scores.to_dict(), "random directions": null.to_dict()})
print(both.loc[shown.split()].astype(float).round(2).to_string(na_rep="none"))

# %% [markdown]
# ## 11. One feature, many texts
# Choose a feature on one text and read it on all others: where does it fire, and on what tokens?
# The strongest feature of all is often a *dense* one that fires everywhere; the choice is made
# among those that are active on at most 10 % of tokens.

# %%
from lenslab.features.activations import top_tokens

rate = (features[batch.real] > 0).float().mean(0)
peak = features[0][batch.real[0]].amax(0)
first = int(peak.argmax())
feature = int(peak.where(rate <= 0.1, 0).argmax())
active = f"active on {rate[first]:.0%} of all tokens"
print(f"strongest on {probes['id'][0]}: feature {first}, {active}")
others = f"on the {len(batch) - 1} other texts"
print(f"strongest of those that are not dense: feature {feature}, {others}:")
print(top_tokens(batch, features[..., feature], skip=[0], n=8).round(1).to_string(index=False))

# %% [markdown]
# **Control**: does it tell the kind of text it was chosen on from the others, better than the same
# texts with their labels shuffled? *AUROC* is the chance that a text of the kind has a higher value
# than another text; 0.5 is guessing. (Phase 2 asks this properly, with enough texts.)

# %%
from lenslab.stats import auroc_permutations

values = features[..., [feature]].where(batch.real[..., None], 0)
strength = values.amax(1)[1:].numpy()  # the text of the choice left out
kind = probes["category"][0]
labels = (probes["category"] == kind).to_numpy()[1:]
test = auroc_permutations(strength, labels, derive_generator(0, "one feature"))
print(f"it fires on {int((strength > 0).sum())} of the {len(labels)} other texts")
print(f"telling {kind} from the rest: AUROC {test.observed[0]:.2f}")
few = f"{labels.sum()} texts of the kind are too few for a verdict"
print(f"shuffled labels do as well with p = {test.p[0]:.3f}; {few}")

# %% [markdown]
# ## 12. Keep what was measured
# Activations with their tokens and hooks go into a file and come back equal. Pickles can run code
# when opened, so they are neither written nor read.

# %%
from lenslab.files import outputs_path
from lenslab.records import extract_batch, load_record, save_record

beginnings = [text[:40] for text in batch.texts[:4]]
records = extract_batch(model, beginnings, [hook])
for suffix in ("safetensors", "npz", "json"):
    file = save_record(records, outputs_path("results", f"phase_1_records.{suffix}"))
    pairs = zip(load_record(file), records, strict=True)
    same = all(torch.equal(a.activations[hook], b.activations[hook]) for a, b in pairs)
    print(f"{suffix:12s} {len(records)} records come back equal: {same}")

# %% [markdown]
# A pickle is refused, with the format to use instead.

# %%
try:
    save_record(records, outputs_path("results", "phase_1_records.pkl"))
except ValueError as error:
    print(error)

# %% [markdown]
# ## What was found, and what was not
# **Found**, each against its control above: the residual stream is the sum of what the blocks
# write; an MLP's output depends on context, in the untrained twin as well; some heads look where
# the twin's heads do not; the model predicts text better than the same tokens out of order; the SAE
# loses less than random directions do at the same sparsity. What sections 5 and 7 ask (a huge
# vector at BOS, induction) is answered by what they print, and may be no.
#
# **Not shown**: that the features mean anything (phase 2 asks, with held-out texts), that these
# streams matter for what the model says (that takes interventions), or that any of it holds for
# other models. Twenty-eight texts give impressions, not rates.
#
# **Exercises**
# 1. Which layer's residual stream has the largest norm at BOS, and does it fall at the last layer?
# 2. Draw the attention map of the head that looks most at the first position. What could such a
#    head be for?
# 3. Run this notebook on another model: `make run MODEL=gpt2 NOTEBOOKS=phase_1_loading`.
#
# <details><summary>Solutions</summary>
#
# 1. `profile.first_position.argmax()`, then `profile.first_position[-1]` beside it.
# 2. In the last cell of section 7 put `"first_position"` for `"previous_token"`; leave its line on
#    the token before aside. A head must attend somewhere, its weights sum to one; BOS is where it
#    does no harm.
# 3. The SAE is then a published one that was downloaded before (see the README), or a small one
#    trained on the spot.
#
# </details>
