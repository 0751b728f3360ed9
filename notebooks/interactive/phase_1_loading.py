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
# memory. For another model set `LENSLAB_MODEL` before you start Jupyter: to `smollm2` (fetched
# once), a name on the hub (`gpt2`) or a local Hugging Face folder.
#
# **How to read it**: one question per section, then code, a printed check, the control, a picture.
# Lines that begin with *So:* say what was found, computed from the numbers above them on whatever
# model you run; read alone, they are a summary.

# %% [markdown]
# ## 1. What is it made of?
# Load the model, and beside it its *random twin*: the same architecture with untrained weights.

# %%
import numpy as np
import torch

from lenslab.models import load_model, model_name, parameter_table, random_twin, summarize
from lenslab.show.images import set_up_figures
from lenslab.show.words import so

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
so(f"{len(hooks)} places can be read, and a name that is none of them is refused.")

# %% [markdown]
# ## 3. Which tokens count?
# Twenty-eight short texts of seven kinds, written for this project, become one batch. `real` marks
# the tokens that belong to a text: not the beginning-of-sequence token (BOS), not padding.

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
# attended to as if it were text. (Two unrelated vectors of equal norm would differ by 1.4 times
# their length; more means that some vectors became far longer.)

# %%
with torch.inference_mode():
    careless = model.run_with_cache(left.tokens, names_filter=[hook])[1][hook]
error = (careless[left.real] - right[batch.real]).norm() / right[batch.real].norm()
equal = bool(error < 1e-3)
print(f"left padding without a mask: relative error {float(error):.1f}, so equal: {equal}")
largest = max(float((other - right[batch.real]).abs().max()) for other in others.values())
same = "the same" if largest < 1e-3 else "not the same"
so(
    f"with the mask a text gives {same} activations alone and in a batch; "
    f"without it they are off by {float(error):.0%} of their length."
)

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
sums = "is" if holds else "is not"
so(
    f"the residual stream {sums} the sum of what the blocks write: its error is "
    f"{'below' if holds else 'above'} 0.001 %, and with the MLP left out {without_mlp:.0%} or more."
)

# %% [markdown]
# How much does each block write? `residual` is the stream after the block, the other two are what
# the block added.

# %%
from lenslab.show.plots import attention_map, bars, lines

norms = profile[["residual", "attention", "mlp"]]
digits = "{:.3g}".format  # three of them, whatever the scale
print(norms.to_string(float_format=digits))
print("random twin, residual:", twin_profile.residual.round(1).tolist())
curves = {**norms, "residual, twin": twin_profile.residual}
axes = {"x_title": "layer", "y_title": "mean norm at real tokens", "log_y": True}
lines(curves, title="How long each stream is, layer by layer", **axes).show()

# %% [markdown]
# How long is what a block adds, beside the stream that comes out of it? **Control**: the twin's.

# %%
written, twin_written = (
    p[["attention", "mlp"]].max(axis=1)[1:] / p.residual[1:] for p in (profile, twin_profile)
)
so(
    f"after block 0 the longer of the two outputs is {written.min():.0%} to {written.max():.0%} of "
    f"the length of the stream that comes out (in the untrained twin {twin_written.min():.0%} to "
    f"{twin_written.max():.0%})."
)

# %% [markdown]
# | stream | moves information between positions? | what it computes from |
# |---|---|---|
# | attention output | yes, and nothing else does | the residual stream here and before |
# | MLP output | no, one position at a time | the residual stream with what attention brought |
# | residual stream | it is the sum | the embedding and every attention and MLP output so far |
#
# So an MLP's output depends on context too. That can be measured: how alike is a stream at two
# occurrences of one token in different texts? A cosine of 1 means that the stream ignores context.
# **Control**: pairs of other tokens; a cosine as high as theirs means that the token does not
# matter. (All cosines of this notebook are taken after the mean over tokens is removed: section 5
# shows why.)

# %%
from lenslab.circuits.streams import context_similarity

shown = ["same token", "other token"]
similarity = context_similarity(model, batch, middle)
twin_similarity = context_similarity(twin, batch, middle)
over = f"{similarity['tokens'].iloc[0]:.0f} tokens that occur in several texts"
print(f"mean cosine at layer {middle}, over {over}:")
print(similarity[shown].round(2).to_string())
print(f"random twin:\n{twin_similarity[shown].round(2).to_string()}")

# %% [markdown]
# Where the same token is below 1, context (its position included) reaches the stream. Where the
# twin shows as much, that is the architecture's doing and was not learned.

# %%
alike, twin_alike = similarity["same token"], twin_similarity["same token"]
reached, least = int((alike < 0.95).sum()), alike.idxmin()
as_much = int((twin_alike < alike + 0.05).sum())
so(
    f"context reaches {reached} of {len(alike)} streams, the {least} stream most: there one token "
    f"has a cosine of {alike[least]:.2f} with itself in another text, and of "
    f"{round(similarity['other token'][least], 1) + 0} with other tokens. In {as_much} of "
    f"{len(alike)} streams the untrained twin shows as much: there it was not learned."
)

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
huge = "a huge vector" if ratio.max() > 3 else "no huge vector"
so(
    f"there is {huge} at BOS (a norm above 3 times the others'): at most {ratio.max():.1f} times, "
    f"in the untrained twin {twin_ratio.max():.1f} times."
)
axes = {"x_title": "layer", "y_title": "norm at BOS / norm elsewhere"}
curves = {"model": ratio, "random twin": twin_ratio}
lines(curves, title="How odd BOS is", reference=1, **axes).show()

# %% [markdown]
# Norms can hide in a few dimensions (*massive activations*; GPT-2 has two of them, at BOS). Which
# dimension of the residual stream is largest here, at BOS and at real tokens? **Control**: the
# twin's largest. One that is large at every token makes any two vectors look alike.

# %%
residual = harvest(model, batch, hook)[hook]
twin_residual = harvest(twin, batch, hook)[hook]
squares, twin_squares = (x[batch.real].pow(2).mean(0) for x in (residual, twin_residual))
dimension, share = int(squares.argmax()), float(squares.max() / squares.sum())
starts = residual[:, 0].pow(2).mean(0)  # [d_model], BOS where the tokenizer has one
print(
    f"layer {middle}: dimension {dimension} holds {share:.0%} of the squared norm of real tokens,"
)
print(f"at BOS {starts[dimension] / starts.sum():.0%}; the twin's largest")
print(f"{twin_squares.max() / twin_squares.sum():.0%}, an even share is {1 / len(squares):.1%}")

# %% [markdown]
# What does such a dimension do to cosines? The mean cosine of two tokens as it is, and with the
# dimension left out. (With the mean over tokens removed it is 0 by construction: then only what
# tells a pair from other pairs is left.) **Control**: the twin's.


# %%
def mean_cosine(x):  # [token, d_model], over all pairs of tokens
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return float((unit.sum(0).norm() ** 2 - len(x)) / (len(x) * (len(x) - 1)))


x, twin_x = residual[batch.real], twin_residual[batch.real]
others = x[:, torch.arange(x.shape[1]) != dimension]
raw, without, twin_raw = mean_cosine(x), mean_cosine(others), mean_cosine(twin_x)
so(
    f"dimension {dimension} alone holds {share:.0%} of the squared norm (the twin's largest "
    f"{twin_squares.max() / twin_squares.sum():.0%}). Two tokens have a mean cosine of {raw:.2f}, "
    f"without it {without:.2f} (the twin {twin_raw:.2f}): what tokens share has to be removed "
    "before a cosine says anything about a pair of them."
)

# %% [markdown]
# ## 6. Activations of the texts
# One vector per text: the residual stream at its last real token.

# %%
last = batch.real.long().cumsum(1).argmax(1)
vectors = residual[torch.arange(len(batch)), last].double().numpy()
frame = probes[["id"]].assign(mean=vectors.mean(1).round(1) + 0, std=vectors.std(1))
frame["norm"] = np.linalg.norm(vectors, axis=1)
print(f"{tuple(vectors.shape)} at {hook}")
print(frame.iloc[::4].to_string(index=False, float_format=digits))

# %% [markdown]
# One of them as it is: hundreds of values, none with a meaning of its own. What share of the sum of
# squares lies in the largest tenth of the dimensions? **Controls**: the same text in the twin, and
# as many random normal numbers.

# %%
from lenslab.runtime import derive_generator

twin_vector = twin_residual[0, last[0]].double().numpy()
noise = torch.randn(len(twin_vector), generator=derive_generator(0, "normal numbers"))
values = {"model": vectors[0], "random twin": twin_vector, "normal numbers": noise.double().numpy()}
tenth = {name: np.sort(v**2)[-(len(v) // 10) :].sum() / (v**2).sum() for name, v in values.items()}
so(
    f"at one token the largest tenth of the dimensions holds {tenth['model']:.0%} of the squared "
    "norm "
    f"(the twin {tenth['random twin']:.0%}, random numbers {tenth['normal numbers']:.0%})."
)

# %% [markdown]
# The same, drawn: a bar that stands out is one dimension with a large value.

# %%
units = {name: values[name] / values[name].std() for name in ("model", "random twin")}
axes = {"x_title": "dimension", "y_title": "value, in units of its spread"}
bars(units, title="One activation, dimension by dimension", overlay=True, **axes).show()

# %% [markdown]
# The last token of a text in every layer: how much of it is still there after the next block? The
# cosine of each layer's vector with the next one's. **Control**: with the next one's at the end of
# another text.

# %%
through = [stream_hook(model, layer) for layer in range(model.cfg.n_layers)]
found = harvest(model, batch, through, progress=False)
rows = torch.arange(len(batch))
ends = [found[name][rows, last] - found[name][batch.real].mean(0) for name in through]
unit = torch.nn.functional.normalize(torch.stack(ends), dim=-1)  # [layer, text, d_model]
same_text = (unit[:-1] * unit[1:]).sum(-1).mean(1)
other_text = (unit[:-1] * unit[1:].roll(1, dims=1)).sum(-1).mean(1)
print("same text ", [round(float(cosine), 1) + 0 for cosine in same_text])
print("other text", [round(float(cosine), 1) + 0 for cosine in other_text])
so(
    f"from one layer to the next a token's vector keeps a cosine of {same_text.min():.1f} or "
    f"more, with another text's at most {other_text.max():.1f}."
)

# %% [markdown]
# The cosines by layer, drawn:

# %%
curves = {"the same text": same_text, "another text (control)": other_text}
axes = {"x_title": "from layer", "y_title": "mean cosine with the next layer"}
layers = [str(layer) for layer in range(len(same_text))]
lines(curves, layers, title="How much of a token's vector is there one layer later", **axes).show()

# %% [markdown]
# ## 7. Attention maps
# Where do heads look? In a random sequence that is repeated once, only looking back helps.
# `previous_token`: weight on the token before; `duplicate_token`: on the same token, one copy
# earlier; `induction`: on the token after that one. Head 2.3 is head 3 of layer 2. Some heads do
# their job in text only: `on text` is the same score there. **Control**: the twin's best.

# %%
from lenslab.circuits.streams import head_scores, token_bits

heads, twin_heads = head_scores(model, batch), head_scores(twin)
for kind in ("previous_token", "duplicate_token", "induction", "first_position"):
    layer, head, score = heads.best(kind)
    best = f"head {layer}.{head}: mean weight {score:.2f}"
    print(f"{kind:16s} {best}, the twin's best {twin_heads.best(kind)[2]:.2f}")
layer, head, score = heads.best("previous_token_on_text")
print(f"on text, the previous token: head {layer}.{head}: {score:.2f}")

# %% [markdown]
# A weight near one is a head with one job; a small one, a tendency. Does the model *use* the
# repeat? Its loss, in *nats* (minus the natural logarithm of the probability of what came), on the
# first copy and on the second. (On the first it can be worse than chance: random tokens are not the
# text that the model expects.) **Controls**: chance, and the twin.

# %%
layer, head, score = heads.best("induction")
twin_score = twin_heads.best("induction")[2]
first, second, chance = heads.loss_first, heads.loss_second, np.log(summary.vocabulary)
print(f"loss on the first copy {first:.1f}, on the second {second:.1f}, by chance {chance:.1f};")
print(f"twin {twin_heads.loss_first:.1f} and {twin_heads.loss_second:.1f}")
copies = "copies what came before" if second < chance - 1 else "does not copy what came before"
so(
    f"the model {copies}: the first copy costs {first:.1f} nats a token, the second {second:.1f} "
    f"(the twin {twin_heads.loss_second:.1f}). Its best induction head, {layer}.{head}, puts "
    f"{score:.2f} of its weight on what followed last time, the twin's best {twin_score:.2f}."
)

# %% [markdown]
# Two heads on one text that says everything twice: the strongest on the previous token, and the
# strongest at induction. A row says where a token looks, and sums to one.

# %%
sample = tokenize(model, "The old grey dog saw a cat. The old grey dog saw a cat.")
pair = {kind: heads.best(kind)[:2] for kind in ("previous_token", "induction")}
hooks_of = {kind: f"blocks.{layer}.attn.hook_pattern" for kind, (layer, _) in pair.items()}
patterns = harvest(model, sample, list(hooks_of.values()))
maps = {
    f"{kind.replace('_', ' ')}: head {layer}.{head}": patterns[hooks_of[kind]][0, head]
    for kind, (layer, head) in pair.items()
}
whole = all(bool(((map_.sum(-1) - 1).abs() < 1e-4).all()) for map_ in maps.values())
print(f"rows sum to one: {whole}; looks ahead: {any(bool(m.triu(1).any()) for m in maps.values())}")
attention_map(maps, sample.strings(0), title="The token before, and what followed last time").show()

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
# How much it knows shows in its loss, in *bits* per token (each bit halves the choice).
# **Controls**: the same tokens in random order, where only their frequency helps; the twin; and a
# uniform guess.

# %%
bits = probes[["category"]].assign(model=token_bits(model, batch))
bits["shuffled"] = token_bits(model, batch, shuffle=True)
bits["twin"] = token_bits(twin, batch)
kinds, uniform = bits.groupby("category").mean(), np.log2(summary.vocabulary)
print(kinds.round(1).to_string())
mean, kinds = kinds.mean(), kinds["model"]
so(
    f"the model needs {mean['model']:.1f} bits a token, with the tokens out of order "
    f"{mean['shuffled']:.1f}, its untrained twin {mean['twin']:.1f}, a blind guess {uniform:.1f}; "
    f"best is {kinds.idxmin()} ({kinds.min():.1f}), worst {kinds.idxmax()} ({kinds.max():.1f})."
)

# %% [markdown]
# ## 9. From dense to sparse
# A *sparse autoencoder* (SAE) writes an activation as a sum of a few *features* out of many:
# *encode* gives each feature a strength of zero or more, *decode* adds up strength times the
# feature's direction, plus a bias, and that is the *reconstruction*. It was trained at one hook of
# one model, and is refused anywhere else. For a model without SAEs a published one is used that was
# downloaded before, or a small one is trained while you wait.

# %%
from lenslab.sae.find import find_sae
from lenslab.sae.inputs import sae_hook

sae, name, origin = find_sae(model)  # of the middle layer
print(f"{name} ({origin}) reads {sae_hook(sae)}")
print(f"{sae.cfg.d_in} dimensions -> {sae.cfg.d_sae} features")

# %% [markdown]
# Encoding the activations of another model or hook would give numbers that mean nothing.
# `input_transform` refuses another model, width or hook (here the random twin), and gives what the
# SAE was trained on: some published SAEs read activations without their mean.

# %%
from lenslab.sae.inputs import SAEMismatch, input_transform

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
# Dense against sparse, at real tokens: nearly every dimension of an activation is in use, few
# features are. (How many is no finding for SAEs of the *TopK* family: it was chosen for the
# training.)

# %%
x, f = activations[batch.real], features[batch.real]
active = (f > 0).sum(-1).float().mean()
in_use = (x.abs() > 0.01 * x.std()).float().mean()
so(
    f"at a token the SAE uses {active:.1f} of its {sae.cfg.d_sae} features (L0), "
    f"{active / sae.cfg.d_sae:.1%}; the model uses {in_use:.0%} of its {x.shape[1]} dimensions "
    "(above a hundredth of their spread)."
)

# %% [markdown]
# What might an SAE find in each of the streams of section 4? A hypothesis, to be tested where SAEs
# of several streams are compared: in the attention output what is fetched from elsewhere (the
# subject of a verb, an open bracket, what followed last time); in the MLP output what one place
# makes of it (a word's sense, a known phrase); in the residual stream both. For GPT-2 small there
# are published SAEs of all three: `.venv/bin/python -m lenslab.sae.hub list --model gpt2-small`.
# `hook_attn_out` is what all heads write together; what each head writes is `hook_result`, computed
# only after `model.set_use_attn_result(True)`.

# %% [markdown]
# The strongest features at one token. A feature's number means nothing by itself; published SAEs
# link to Neuronpedia, where others have looked at theirs.

# %%
import pandas as pd

from lenslab.sae.inputs import neuronpedia_link

top = features[0, last[0]].topk(6)
rate = (f > 0).float().mean(0)
columns = {"feature": top.indices, "activation": top.values, "active on tokens": rate[top.indices]}
strongest = pd.DataFrame(columns)
if neuronpedia_link(sae, 0):
    strongest["Neuronpedia"] = [neuronpedia_link(sae, i) for i in top.indices.tolist()]
print(f"at {batch.strings(0)[last[0]]!r}, the end of {probes['id'][0]}:")
print(strongest.to_string(index=False, float_format=digits))

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
# What does the model lose when it reads through the SAE, and what through random directions?

# %%
costs = [m.ce_spliced - m.ce_clean for m in (scores, null)]
better = "less" if scores.fvu < null.fvu and costs[0] < costs[1] else "no less"
so(
    f"the SAE loses {better} than random directions do: it misses {scores.fvu:.0%} of the "
    f"variance (they {null.fvu:.0%}), and reading through it costs the model {costs[0]:.1f} nats "
    f"a token (they {costs[1]:.1f})."
)

# %% [markdown]
# ## 11. One feature, many texts
# Choose a feature on one text and read it on all others: where does it fire, and on what tokens?
# The strongest feature of all is often a *dense* one that fires everywhere, or one that fires
# nowhere else; the choice is made among those that are active on at most 10 % of tokens and on
# three other texts or more.

# %%
from lenslab.features.activations import top_tokens

peak = features[0][batch.real[0]].amax(0)
first = int(peak.argmax())
elsewhere = ((features > 0) & batch.real[..., None]).any(1)[1:].sum(0)  # texts, by feature
feature = int(peak.where((rate <= 0.1) & (elsewhere >= 3), 0).argmax())
print(f"strongest on {probes['id'][0]}: feature {first}, on {elsewhere[first]} other texts")
print(f"strongest by this choice: feature {feature}, on {elsewhere[feature]} other texts:")
where = top_tokens(batch, features[..., feature], skip=[0], n=8)
print(where.to_string(index=False, float_format=digits))

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
so(
    f"feature {feature} tells {kind} from other texts with an AUROC of {test.observed[0]:.2f} "
    f"(shuffled labels do as well with p = {test.p[0]:.3f}), on {labels.sum()} texts of the kind: "
    "too few for a verdict."
)

# %% [markdown]
# ## 12. Keep what was measured
# Activations with their tokens and hooks go into a file and come back equal. A pickle can run code
# when it is opened, so no record is written as one, and none is read. (A training's checkpoints are
# PyTorch files; they are opened with `weights_only=True`, which runs nothing.)

# %%
from lenslab.files import outputs_path
from lenslab.records import extract_batch, load_record, save_record

beginnings = [text[:40] for text in batch.texts[:4]]
records = extract_batch(model, beginnings, [hook])
equal = {}
for suffix in ("safetensors", "npz", "json"):
    file = save_record(records, outputs_path("results", f"phase_1_records.{suffix}"))
    pairs = zip(load_record(file), records, strict=True)
    equal[suffix] = all(torch.equal(a.activations[hook], b.activations[hook]) for a, b in pairs)
kinds = " and ".join(name for name, same in equal.items() if same)
so(f"{len(records)} records come back with equal values from {kinds or 'no format'}.")

# %% [markdown]
# A pickle is refused, with the format to use instead.

# %%
try:
    save_record(records, outputs_path("results", "phase_1_records.pkl"))
except ValueError as error:
    print(error)

# %% [markdown]
# ## What was found, and what was not
# **Found**: what the lines that begin with *So:* say, each beside its control. On any model the
# stream is the sum of what the blocks write, and an SAE that is worth its name loses less than
# random directions at the same sparsity. What sections 5 and 7 ask (a huge vector at BOS, copying)
# is answered by what they print, and may be no.
#
# **Not shown**: that the features mean anything (phase 2 asks, with held-out texts), that these
# streams matter for what the model says (that takes interventions), or that any of it holds for
# other models. Twenty-eight texts give impressions, not rates.
#
# **Exercises**
# 1. At which layer is the stream at BOS longest, and at which is it longest beside the others?
# 2. Draw the map of the best `duplicate_token` head beside the induction head. Where does it look
#    in the first copy, where there is no duplicate?
# 3. Run this notebook on a model that people know: `make run MODEL=smollm2
#    NOTEBOOKS=phase_1_loading`. Which of the lines that begin with *So:* change?
#
# <details><summary>Solutions</summary>
#
# 1. `profile.first_position.idxmax()`, and `ratio.idxmax()`.
# 2. In the last cell of section 7 put `"duplicate_token"` for `"previous_token"`. Its weights have
#    to sum to one, so where it finds nothing they go somewhere harmless, often to BOS.
# 3. Sections 5 and 7 above all: it does park a huge vector at BOS, and its induction heads sit in
#    the middle layers. The SAE of its middle layer ships with this project.
#
# </details>
