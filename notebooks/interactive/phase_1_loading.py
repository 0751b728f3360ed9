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
# **What you will learn**: what a language model is made of and where one can look inside (*hook points*); what the
# three streams carry; why the first position and padding must be kept out of every average; and what a *sparse
# autoencoder* (SAE) turns an activation into. Each finding is shown beside a control that could have refuted it.
#
# **Runs on** the bundled `pocket-gpt`, offline, in about a minute on two cores and within 2 GB. For another model
# set `LENSLAB_MODEL` to a name on the hub (`gpt2`) or a local Hugging Face folder before you start Jupyter.
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
print(f"{model_name(model)}: {summarize(model).parameters:,} parameters, the twin {summarize(twin).parameters:,}")

# %% [markdown]
# The summary is read from the loaded model, not from a model card.

# %%
summary = summarize(model)
print(f"{summary.layers} layers of width {summary.d_model}, {summary.heads} heads, context {summary.context} tokens")
print(f"MLP {summary.d_mlp} wide with {summary.activation}; {summary.vocabulary:,} tokens in the vocabulary")
summary.to_frame()

# %% [markdown]
# Most parameters sit in the blocks; the embedding has one row per token of the vocabulary.

# %%
table = parameter_table(model)
blocks, embeddings = (n / summary.parameters for n in (summary.block_parameters, summary.embedding_parameters))
print(f"in blocks {blocks:.1%}, in embeddings {embeddings:.1%}")
print(f"{len(table)} tensors, {len(parameter_table(model, layer=0))} of them in block 0")
parameter_table(model, layer=0)

# %% [markdown]
# ## 2. Where can one look?
# A *hook point* is a named place in the forward pass where a value can be read or changed.

# %%
from lenslab.models import UnknownHook, check_hooks, hook_table, stream_hook

hooks = hook_table(model)
print(f"{len(hooks)} hook points, {len(hook_table(model, layer=0))} of them in block 0; the first ten of block 0:")
print(hook_table(model, layer=0).head(10).to_string(index=False))

# %% [markdown]
# Three streams matter most. The *residual stream* runs through the whole model; in every block the attention adds
# its output to it, then the MLP adds its own.

# %%
middle = model.cfg.n_layers // 2
STREAMS = ["residual_pre", "attention", "residual_mid", "mlp", "residual"]
for stream in STREAMS:
    print(f"{stream:13s} {stream_hook(model, middle, stream)}")

# %% [markdown]
# A hook name with a slip in it is refused. (TransformerLens's bridge itself ignores it and returns nothing.)

# %%
try:
    check_hooks(model, [f"blocks.{middle}.hook_residpost"])
except UnknownHook as error:
    print(str(error).split(". It has")[0])

# %% [markdown]
# ## 3. Which tokens count?
# Twenty-eight short texts of seven kinds, written for this project, become one batch. `real` marks the tokens that
# belong to a text: not the beginning-of-sequence token (BOS), not padding.

# %%
from lenslab.activations import harvest, tokenize
from lenslab.data import load_probes

probes = load_probes("first_look")
batch = tokenize(model, probes["text"].tolist())
lengths = batch.real.sum(dim=1)
print(f"{len(batch)} texts, {batch.n_real} real tokens of {batch.tokens.numel()} places")
print("kinds:", ", ".join(probes["category"].unique()), f"| lengths {lengths.min()} to {lengths.max()}")

# %% [markdown]
# A text must give the same activations alone and in a batch, padded on either side. Reading the last token by
# counting ids that differ from the padding id goes wrong where BOS and padding are the same token, as in GPT-2:
# the mask comes from lengths instead.

# %%
hook = stream_hook(model, middle)
left = tokenize(model, probes["text"].tolist(), pad_side="left")
right = harvest(model, batch, hook)[hook]
for name, other in (
    ("padded left", harvest(model, left, hook)[hook][left.real]),
    ("alone", torch.cat([harvest(model, tokenize(model, t), hook)[hook][0, 1:] for t in batch.texts])),
):
    print(f"{name:12s} equal within 1e-3: {bool((other - right[batch.real]).abs().max() < 1e-3)}")

# %% [markdown]
# **Control**: the check can fail. Without the mask, left padding shifts what every token sees.

# %%
with torch.inference_mode():
    careless = model.run_with_cache(left.tokens, names_filter=[hook])[1][hook]
error = (careless[left.real] - right[batch.real]).norm() / right[batch.real].norm()
print(f"left padding without a mask: relative error {float(error):.1f}, so equal: {bool(error < 1e-3)}")

# %% [markdown]
# ## 4. The streams
# If the residual stream is a sum, then before + attention + MLP = after, in every block. **Control**: with the MLP
# left out the sum must fail.

# %%
from lenslab.analysis.streams import stream_profile

profile, twin_profile = stream_profile(model, batch), stream_profile(twin, batch)
print(
    f"before + attention + MLP = after in all {len(profile.sum_error)} blocks: {bool((profile.sum_error < 1e-5).all())}"
)
print(f"control, the MLP left out: relative error {profile.sum_error_without_mlp.min():.2f} or more")

# %% [markdown]
# How much does each block write, against what is already there?

# %%
from lenslab.show.plots import lines

print(profile.to_frame()[["residual", "attention", "mlp"]].round(1).to_string())
print("random twin, residual:", twin_profile.residual.round(1).tolist())
lines(
    {
        "residual": profile.residual,
        "attention": profile.attention,
        "mlp": profile.mlp,
        "residual, twin": twin_profile.residual,
    },
    title="What each stream carries",
    x_title="layer",
    y_title="mean norm at real tokens",
    log_y=True,
)

# %% [markdown]
# | stream | moves information between positions? | what it computes from |
# |---|---|---|
# | attention output | yes, and nothing else does | the residual stream at this and all earlier positions |
# | MLP output | no, one position at a time | the residual stream there, which already holds what attention brought |
# | residual stream | it is the sum | the embedding and every attention and MLP output so far |
#
# So an MLP's output depends on context too. That can be measured: how alike is a stream at two occurrences of one
# token in different texts? One would mean that context is ignored; the level of other tokens (the **control**),
# that the token does not matter.

# %%
from lenslab.analysis.streams import context_similarity

similarity = context_similarity(model, batch, middle)
print(f"mean cosine at layer {middle}, over {similarity['tokens'].iloc[0]:.0f} tokens that occur in several texts:")
print(similarity[["same token", "other token"]].round(2).to_string())
twin_similarity = context_similarity(twin, batch, middle)
print("random twin, same token:", twin_similarity["same token"].round(2).to_dict())

# %% [markdown]
# ## 5. Is the first position odd?
# Nothing comes before BOS, and many models (GPT-2 among them) park a huge vector there, so that an average which
# includes it is about BOS. Does this one?

# %%
ratio, twin_ratio = (p.first_position / p.residual for p in (profile, twin_profile))
print("norm at BOS over norm elsewhere, by layer:", ratio.round(1).tolist())
print("random twin:", twin_ratio.round(1).tolist())
print(f"largest: {ratio.max():.1f}; a huge vector (above 3 somewhere): {bool(ratio.max() > 3)}")
lines(
    {"BOS": profile.first_position, "real tokens": profile.residual, "BOS, twin": twin_profile.first_position},
    title="The first position",
    x_title="layer",
    y_title="mean norm of the residual stream",
    log_y=True,
)

# %% [markdown]
# A norm can hide in a few dimensions (*massive activations*, two of them in GPT-2). The share of the squared norm that
# the two largest dimensions hold, at BOS, at real tokens (the **control**), and at the twin's BOS:

# %%
share = profile.to_frame()[["two_largest_first", "two_largest_rest"]].assign(twin_first=twin_profile.two_largest_first)
print(share.round(2).to_string())
residual = harvest(model, batch, hook)[hook]
print(f"largest dimensions at BOS, layer {middle}:", sorted(residual[0, 0].abs().topk(2).indices.tolist()))

# %% [markdown]
# ## 6. Activations of the texts
# One vector per text: the residual stream at its last real token.

# %%
last = batch.real.long().cumsum(1).argmax(1)
vectors = residual[torch.arange(len(batch)), last]
vectors = vectors.double().numpy()
frame = probes[["id"]].assign(mean=vectors.mean(1), std=vectors.std(1), norm=np.linalg.norm(vectors, axis=1))
print(f"{tuple(vectors.shape)} at {hook}")
print(frame.iloc[::4].round(1).to_string(index=False))

# %% [markdown]
# ## 7. Attention maps
# In a random sequence that is repeated once, only looking back helps. Which heads do? **Control**: the twin's best.

# %%
from lenslab.analysis.streams import head_scores

heads, twin_heads = head_scores(model), head_scores(twin)
for kind in ("previous_token", "duplicate_token", "induction", "first_position"):
    layer, head, score = heads.best(kind)
    print(f"{kind:16s} head {layer}.{head}: mean weight {score:.2f}, the twin's best {twin_heads.best(kind)[2]:.2f}")
print(f"loss on the first copy {heads.loss_first:.1f} nats, on the second {heads.loss_second:.1f}")

# %% [markdown]
# One head on one text: a row says where a token looks, and sums to one.

# %%
from lenslab.show.plots import attention_map

layer, head, _ = heads.best("previous_token")
sample = tokenize(model, "The dog saw the cat, and the cat saw the dog.")
pattern_hook = f"blocks.{layer}.attn.hook_pattern"
pattern = harvest(model, sample, pattern_hook)[pattern_hook][0, head]
print(
    f"rows sum to one: {bool(((pattern.sum(-1) - 1).abs() < 1e-4).all())}; looks ahead: {bool(pattern.triu(1).any())}"
)
print(f"{sample.strings(0)[5]!r} looks most at {sample.strings(0)[int(pattern[5].argmax())]!r}")
attention_map(pattern.numpy(), sample.strings(0), title=f"Head {layer}.{head}")

# %% [markdown]
# ## 8. What does it say, and what does it know?
# Greedy continuation takes the most likely token every time; sampling draws from the distribution, with a seed.

# %%
from lenslab.models import generate

for prompt in ("The capital of France is", "def mean(values):\n    return", "Once upon a time"):
    print(repr(generate(model, prompt, max_new_tokens=10)))
print("sampled:", repr(generate(model, "Once upon a time", max_new_tokens=10, temperature=0.7, seed=42)))
print("random twin:", repr(generate(twin, "Once upon a time", max_new_tokens=6)))

# %% [markdown]
# How much it knows shows in its loss, in bits per token: against the twin and against a uniform guess.

# %%
from lenslab.analysis.streams import token_bits

bits = probes[["category"]].assign(model=token_bits(model, batch), twin=token_bits(twin, batch))
print(bits.groupby("category").mean().round(1).to_string())
print(f"a uniform guess over the vocabulary: {np.log2(summary.vocabulary):.1f}")

# %% [markdown]
# ## 9. From dense to sparse
# A *sparse autoencoder* writes an activation as a sum of a few *features* out of many. It was trained at one hook of
# one model, and is refused anywhere else. A model without SAEs gets a small one here, trained in about a minute.

# %%
from lenslab.activations import pack
from lenslab.data import offline_text
from lenslab.sae.pretrained import bundled_saes, load_sae, sae_hook
from lenslab.sae.small import train_small_sae

found = bundled_saes(model)
sae = load_sae(found[0]) if found else train_small_sae(model, hook, pack(model, offline_text(160)), steps=300)
print("bundled SAE:" if found else "no bundled SAE for this model: a small one was trained for", sae_hook(sae))
print(f"{sae.cfg.d_in} dimensions -> {sae.cfg.d_sae} features")

# %% [markdown]
# The activations are taken from the SAE's own hook. On another model, width or hook it is an error, not a number:
# here the random twin is refused.

# %%
from lenslab.sae.pretrained import SAEMismatch, check_sae

check_sae(sae, model)
try:
    check_sae(sae, twin)
except SAEMismatch as error:
    print("refused:", str(error).split(":")[0])
activations = harvest(model, batch, sae_hook(sae))[sae_hook(sae)]
with torch.inference_mode():
    features = sae.encode(activations)
print("features [text, position, feature]:", tuple(features.shape))

# %% [markdown]
# Dense against sparse, at one token: nearly every dimension of the activation is in use, few features are.

# %%
from lenslab.show.plots import bars

x, f = activations[0, last[0]], features[0, last[0]]
active = (features[batch.real] > 0).sum(-1).float()
print(f"activation: {int((x == 0).sum())} exact zeros, {(x.abs() > 0.01).float().mean():.0%} of dimensions above 0.01")
print(f"features active per token (L0): mean {active.mean():.1f} of {sae.cfg.d_sae}")
print(f"sparsity {1 - active.mean() / sae.cfg.d_sae:.2%}")
title = "The first 100 dimensions and the first 100 features"
bars({"activation": x[:100], "features": f[:100]}, title=title, x_title="index", y_title="value", overlay=True)

# %% [markdown]
# The ten strongest features at that token. Numbers mean nothing by themselves; published SAEs link to Neuronpedia.

# %%
from lenslab.sae.pretrained import neuronpedia_link

top = f.topk(10)
links = [neuronpedia_link(sae, i) or "no page" for i in top.indices.tolist()]
strongest = pd.DataFrame({"feature": top.indices.tolist(), "activation": top.values.tolist(), "Neuronpedia": links})
print(f"at {batch.strings(0)[last[0]]!r}, the end of {probes['id'][0]}:")
print(strongest.round(1).to_string(index=False))

# %% [markdown]
# Feature numbers carry no meaning, so the active ones should spread evenly over the range. **Null**: as many numbers
# drawn at random; the chi-square p value says whether the difference shows.

# %%
from scipy.stats import chisquare

ever = (features[batch.real] > 0).any(0)
counts = torch.stack([part.sum() for part in ever.chunk(16)]).numpy()
print(f"{int(ever.sum())} features fired somewhere; in 16 equal bins {counts.min()} to {counts.max()}")
print(f"evenly spread (p > 0.01): {bool(chisquare(counts).pvalue > 0.01)}")
bars(
    {"active features": counts},
    title="Where the active features lie",
    x_title="bin of feature numbers",
    y_title="features",
)

# %% [markdown]
# ## 10. Is the SAE any good?
# *FVU* is the share of variance that the reconstruction misses; *CE* is the model's loss when the reconstruction takes
# the activation's place. **Null**: an SAE of the same shape and sparsity with random directions.

# %%
from lenslab.sae.evaluation import evaluate_null, evaluate_sae

scores = evaluate_sae(model, sae, batch)
null = evaluate_null(model, sae, batch, scores.l0)
shown = [
    "l0",
    "fvu",
    "cosine",
    "ce_clean",
    "ce_spliced",
    "ce_zero",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "dead",
    "dense",
]
both = pd.DataFrame({"SAE": scores.to_dict(), "random directions": null.to_dict()})
print(both.loc[shown].astype(float).round(2).to_string())

# %% [markdown]
# ## 11. One feature, many texts
# Take the feature that is strongest on one text and read it on all others: where does it fire, and on what tokens?

# %%
from lenslab.analysis.features import top_tokens

feature = int(features[0][batch.real[0]].amax(0).argmax())
print(f"feature {feature}, chosen on {probes['id'][0]} and read on the {len(batch) - 1} other texts:")
print(top_tokens(batch, features[..., feature], skip=[0], n=8).round(1).to_string(index=False))

# %% [markdown]
# **Control**: does it tell the kind of text it was chosen on from the others, better than the same texts with their
# labels shuffled? (Phase 2 asks this properly, with enough texts.)

# %%
from lenslab.runtime import derive_generator
from lenslab.stats import auroc_permutations

strength = features.where(batch.real[..., None], 0).amax(1)[1:, [feature]].numpy()  # the text of the choice left out
labels = (probes["category"] == probes["category"][0]).to_numpy()[1:]
test = auroc_permutations(strength, labels, derive_generator(0, "one feature"))
print(f"it fires on {int((strength > 0).sum())} of the {len(labels)} other texts")
print(f"telling {probes['category'][0]} from the rest: AUROC {test.observed[0]:.2f}")
print(f"shuffled labels do as well with p = {test.p[0]:.3f}")

# %% [markdown]
# ## 12. Keep what was measured
# Activations with their tokens and hooks go into a file and come back equal. Pickles can run code when opened, so
# they are neither written nor read.

# %%
from lenslab.paths import outputs_path
from lenslab.records import extract, load_record, save_record

record = extract(model, batch.texts[0], [hook])
for suffix in ("safetensors", "npz", "json"):
    file = save_record(record, outputs_path("results", f"phase_1_record.{suffix}"))
    print(
        f"{suffix:12s} comes back equal: {torch.equal(load_record(file).activations[hook], record.activations[hook])}"
    )

# %% [markdown]
# A pickle is refused, with the format to use instead.

# %%
try:
    save_record(record, outputs_path("results", "phase_1_record.pkl"))
except ValueError as error:
    print(error)

# %% [markdown]
# ## What was found, and what was not
# **Found**, each against its control above: the residual stream is the sum of what the blocks write; an MLP's output
# depends on context; some heads look where the twin's heads do not; section 5 says how far the first position differs
# in this model; the SAE writes an activation with few features and loses less than random directions do.
#
# **Not shown**: that the features mean anything (phase 2 asks, with held-out texts), that these streams matter for
# what the model says (that takes interventions), or that any of it holds for other models. Twenty-eight texts give
# impressions, not rates.
#
# **Exercises**
# 1. Which layer's residual stream has the largest norm at BOS, and does it fall at the last layer?
# 2. Read the attention map of the strongest induction head on a text with a repetition.
# 3. Run this notebook on another model: `make run MODEL=gpt2 NOTEBOOKS=phase_1_loading`.
#
# <details><summary>Solutions</summary>
#
# 1. `profile.first_position.argmax()`, then `profile.first_position[-1]` beside it.
# 2. `layer, head, _ = heads.best("induction")`, then the cell of section 7 with a text such as "one two three one two".
# 3. The SAE is then the first published one that is in the cache, or a small one trained on the spot.
#
# </details>
