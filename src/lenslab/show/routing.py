"""Figures of a mixture of experts at work. In the look of `show.plots`.

The number of an expert is an arbitrary name: it stands beside a cell, a box or a node, and is never
a height or a colour.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lenslab.circuits.interventions import ablate_features
from lenslab.features.activations import columns_of, encode_features
from lenslab.moe.experts import expert_contributions, expert_neurons
from lenslab.moe.routing import Model, Routing, capture_routing
from lenslab.sae.inputs import SparseAutoencoder
from lenslab.show import plots
from lenslab.show.plots import Labels, label, styled
from lenslab.tokens import token_string, tokenize

MOST_TOKENS = 24  # of a figure
NEURONS = 12  # of an expert


def flows(routing: Routing, groups: Labels, title: str) -> go.Figure:
    """First experts from layer to layer as a Sankey diagram: a band is the tokens of one group that
    go from one expert to another. `groups` has a label for each token."""
    several = routing.n_experts + 1  # the first is that of no expert
    experts = routing.ids[..., 0] + 1 + np.arange(len(routing.layers)) * several
    pairs = zip(experts.T[:-1], experts.T[1:], strict=True)
    groups = [str(group) for group in groups]
    table = pd.concat([pd.DataFrame({"a": a, "b": b, "group": groups}) for a, b in pairs])
    bands = table.value_counts().reset_index().sort_values(["group", "a", "b"])
    nodes = np.unique(experts)
    layer, expert = np.divmod(nodes, several)
    colour = plots.colours(np.unique(groups).tolist())
    names = zip(layer, expert, strict=True)
    names = [f"{routing.layers[i]}: {e - 1 if e else 'none'}" for i, e in names]
    link = {key: np.searchsorted(nodes, bands[n]) for key, n in (("source", "a"), ("target", "b"))}
    link |= {"value": bands["count"], "label": bands["group"]}
    link["color"] = bands["group"].map(colour) + "88"  # half transparent: bands cross
    node = {"label": names, "color": plots.CONTROL, "pad": 6, "thickness": 10}
    told = [f"<span style='color:{c}'>{label(name)}</span>" for name, c in colour.items()]
    title = {"text": f"{title}<br><sup>layer: expert; {', '.join(told)}</sup>", "x": 0.01}
    layout = {"title": title, "height": 380, "width": 760, "template": "plotly_white"}
    return go.Figure(go.Sankey(link=link, node=node), layout)


def analyze_texts(
    texts: Sequence[str],
    model: Model,
    layer: int | None = None,
    expert: int | None = None,
    stack: str = "",
    sae: SparseAutoencoder | None = None,
) -> dict[str, go.Figure]:
    """What a mixture of experts does with some texts, as figures by name: "gates" (the weights as
    they are used), "first experts" (by number, in every layer), "logits" (their spread),
    "contributions" (how long is what the expert of each rank adds) and "neurons" (of one expert,
    those that are most active). By default of the middle layer that has experts, and of the expert
    that is sent most of these tokens. `MOST_TOKENS` tokens are drawn; texts are cut to the context.
    Of an SAE, such as one of what the experts write, also "features" (the largest by their mean),
    "importance" (what the loss rises by when each is set to zero) and "correlation" over tokens.

    Raises as `capture_routing` and `expert_neurons`; ValueError for a layer without experts.
    """
    batch = tokenize(model, texts, truncate=True)
    routing = capture_routing(model, batch, stack=stack)
    layer = routing.layers[len(routing.layers) // 2] if layer is None else layer
    added = expert_contributions(model, batch, layer, stack).norm(dim=-1)  # [token, rank]
    index, experts = routing.layers.index(layer), range(routing.n_experts)
    chosen = routing.ids[:, index].astype(int)  # [token, rank]
    expert = int(np.bincount(chosen[chosen >= 0]).argmax()) if expert is None else expert
    neurons = expert_neurons(model, batch, layer, expert, stack)  # [token, neuron]
    sent = np.flatnonzero((chosen == expert).any(1))[:MOST_TOKENS]
    most = neurons[sent].abs().mean(0).argsort(descending=True)[:NEURONS].tolist()
    names = [token_string(model.tokenizer, token) for token in routing.token.tolist()]
    at_expert, few, n = [names[i] for i in sent], routing[:MOST_TOKENS], len(names)
    names = names[:MOST_TOKENS]
    gates = np.full((len(names), routing.n_experts + 1), np.nan)  # the last is -1: none
    np.put_along_axis(gates, chosen[:MOST_TOKENS], few.weights[:, index], 1)
    by_rank = {f"rank {rank + 1}": each for rank, each in enumerate(added[:MOST_TOKENS].T)}
    logits = routing.logits[:, index].T.round(3)  # [expert, token]
    box = go.Box(x=np.repeat(experts, logits.shape[1]), y=logits.ravel(), boxpoints=False)
    x, where = {"x_title": f"the first {len(names)} of {n} tokens"}, f"layer {layer}"
    wide = {"title": f"Gates, {where}", "y_title": "expert"} | x
    first = {"title": "The first expert of each layer", "y_title": "layer"} | x
    adds = {"title": f"What experts add, {where}", "y_title": "length"} | x
    spread = {"title": f"Logits of all {n} tokens, {where}", "x_title": "expert"}
    spread["y_title"] = "router logit"
    inside = {"title": f"Expert {expert}, {where}", "y_title": "neuron", "centre": True}
    inside["x_title"] = "tokens that are sent there"
    drawn = {
        "gates": plots.heatmap(gates[:, :-1].T, names, experts, **wide),
        "first experts": plots.heatmap(few.weights[..., 0].T, names, few.layers, **first),
        "logits": styled(go.Figure(box.update(marker_color=plots.ACCENT)), **spread),
        "contributions": plots.bars(by_rank, names, **adds),
        "neurons": plots.heatmap(neurons[sent][:, most].T, at_expert, most, **inside),
    }
    drawn["gates"].update_traces(colorbar_title_text="weight", hoverongaps=False, zmin=0)
    drawn["first experts"].update_traces(text=few.ids[..., 0].T, texttemplate="%{text}", zmin=0)
    drawn["first experts"].update_traces(colorbar_title_text="its weight")
    if sae is not None:
        fa = encode_features(model, sae, batch, progress=False)
        top = np.argsort(-np.asarray(fa.matrix.mean(0)).ravel(), kind="stable")[:NEURONS]
        values = columns_of(fa.matrix, top)  # [token, feature]
        rise, features = 1000 * ablate_features(model, sae, fa, top).mean(1), [*map(str, top)]
        fire = {"title": "The SAE's features", "y_title": "feature"} | x
        need = {"title": "What features are needed for", "x_title": "feature"}
        need["y_title"] = "loss rises by, millinats a token"
        alike = {"title": "Features that go together", "y_title": "feature", "centre": True}
        with np.errstate(invalid="ignore"):  # of one that never fires
            pairs = np.corrcoef(values.T)
        drawn["features"] = plots.heatmap(values[:MOST_TOKENS].T, names, features, **fire)
        drawn["importance"] = plots.bars({"": rise}, features, **need)
        drawn["correlation"] = plots.heatmap(pairs, features, features, x_title="feature", **alike)
    return drawn
