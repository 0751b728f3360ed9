"""Look at one feature, and at the features of a text that you type.

`explore_feature` shows what is known of a feature as one piece of HTML: statistics, its categories,
its strongest texts and some of the weaker ones (the strongest alone would flatter it).

`FeatureExplorer` is a widget of ipywidgets' own parts, for JupyterLab and VSCode:
1. a text is read when you leave the box: the model runs once, its features are encoded;
2. the list names the features strongest in it, one step up or down with the arrow keys; the number
   box goes anywhere. The list sets the number, and the page follows the number alone;
3. what is wrong with an input (no token, too long) is said in the widget, and it stays usable;
4. above the widget stands the same view as plain HTML, which pages without a kernel keep (GitHub,
   nbconvert, our own pages). The live widget hides it by a style rule, so that nobody sees it
   twice.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from itertools import count

import ipywidgets
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from transformer_lens.model_bridge import TransformerBridge

from lenslab.features.activations import FeatureActivations, Index, check_features, encode_features
from lenslab.features.ranking import category_profile
from lenslab.metrics import DENSE
from lenslab.sae.inputs import SparseAutoencoder
from lenslab.show.plots import Labels, Number
from lenslab.show.tokens import View, coloured, feature_strips, heading, highlight_batch
from lenslab.tokens import tokenize

EXAMPLE = "The dog saw the cat.\nfor i in range(10):\n    print(i ** 2)"
LISTED = 40  # strongest features of a text in the list
STRIPS = 5  # and in the static view

_numbers = count()  # of explorers in this kernel: each hides its own static view


def explore_feature(
    fa: FeatureActivations,
    feature: Index,
    *,
    categories: Labels | None = None,
    n: int = 8,
    spread: int = 4,
    scale: Number | None = None,
) -> View:
    """What is known of one feature, from the texts it was encoded on; a single colour scale
    throughout.

    Args:
        categories: one per text: adds the table of categories, and labels the texts.
        n: strongest texts shown.
        spread: further texts on which it fires, evenly over the ranks below those.
        scale: activation with the full colour; default the feature's largest on these texts.

    Raises ValueError for a feature that is not there and for categories of another number than
    texts.
    """
    values = fa.of(feature)  # [text, pos]
    real = fa.batch.real
    pooled = values.masked_fill(~real, -torch.inf).amax(1).numpy()  # [text]
    scale = scale or float(pooled.max())
    parts = [_facts(fa, feature, pooled, int((values[real] > 0).sum()))]
    labels = np.full(len(pooled), "") if categories is None else np.array(categories, dtype=str)
    if categories is not None:
        parts.append(_category_table(pooled, labels, scale))
    ranked = np.argsort(-pooled, kind="stable")[: (pooled > 0).sum()]
    strong, rest = ranked[:n], ranked[n:]
    shares = np.arange(min(spread, len(rest))) + 0.5  # the middles of equal shares of the ranks
    weak = rest[(shares * len(rest) / len(shares)).astype(int)] if len(rest) else rest
    strongest = f"Strongest texts: {len(strong)} of {len(ranked)}"
    weaker = f"Weaker texts: {len(weak)}, evenly over the other {len(rest)}"
    for title, rows in ((strongest, strong), (weaker, weak)):
        if len(rows):
            options = {"scale": scale, "title": title, "max_texts": len(rows)}
            view = highlight_batch(fa.batch, values, rows=rows, labels=labels[rows], **options)
            parts.append(view.body)
    return View("".join(parts), f"Feature {feature}")


def side_by_side(
    features: Sequence[tuple[FeatureActivations, Index]], *, categories: Labels | None = None
) -> View:
    """`explore_feature` of several features, one beside the other, such as two that `match` pairs;
    on narrow pages one below the other. Each keeps a scale of its own."""
    style = "display:flex;flex-wrap:wrap;gap:2em", "flex:1 1 24em;min-width:0"
    views = [explore_feature(fa, f, categories=categories, n=4, spread=0) for fa, f in features]
    inside = "".join(f'<div style="{style[1]}">{view.body}</div>' for view in views)
    title = " and ".join(f"{fa.name} {feature}" for fa, feature in features)
    return View(f'<div style="{style[0]}">{inside}</div>', title)


def linked_table(table: pd.DataFrame, fas: Mapping[str, FeatureActivations]) -> View:
    """A table with columns `sae` and `feature`, the features linked to their pages where their SAE
    has pages; everything else is escaped."""
    table = table.reset_index(drop=True)
    shown = table.astype(object).map(lambda v: f"{v:.3g}" if isinstance(v, float) else str(v))
    shown = shown.map(html.escape)
    for row, sae, feature in zip(table.index, table["sae"], table["feature"], strict=True):
        if sae in fas and (link := fas[sae].link(feature)):
            shown.loc[row, "feature"] = f'<a href="{html.escape(link)}">{feature}</a>'
    shown.columns = [html.escape(str(name)) for name in shown.columns]
    return View(f'<div class="lt">{shown.to_html(index=False, border=0, escape=False)}</div>')


def _facts(fa: FeatureActivations, feature: Index, pooled: np.ndarray, active: int) -> str:
    """Which feature of what, and its statistics on the texts, in three lines."""
    source = html.escape(f"{fa.name} of {fa.model} at {fa.hook}")
    if link := fa.link(feature):
        source += f' · <a href="{html.escape(link)}" target="_blank">Neuronpedia</a>'
    fired = pooled[pooled > 0]
    facts = f"never active in these {len(pooled):,} texts"
    if len(fired):
        tokens = fa.batch.n_real
        facts = (
            f"fires on {active:,} of {tokens:,} tokens ({active / tokens:.2%}) "
            f"and in {len(fired):,} of {len(pooled):,} texts; largest {fired.max():.3f}, "
            f"mean of maxima where it fires {fired.mean(dtype=float):.3f}"
        )
    return f'{heading(f"Feature {feature}")}<p class="k">{source}</p><p class="k">{facts}</p>'


def _category_table(pooled: np.ndarray, categories: np.ndarray, scale: float) -> str:
    """The feature in each category, highest mean first, coloured on the feature's scale."""
    profile = category_profile(pooled[:, None], categories, [0])
    profile = profile.sort_values(["mean", "fired"], ascending=False, kind="stable")
    columns = {"fired": "fires in", "texts": "of texts", "mean": "mean of maxima"}
    shown = profile[["category", *columns, "largest"]].rename(columns=columns)
    colour = dict.fromkeys(shown.columns[-2:], lambda v: coloured(f"{v:.3f}", v, scale))
    formats = {"category": html.escape, **colour}
    table = shown.to_html(index=False, border=0, escape=False, formatters=formats)
    return f'<div class="lt">{table}</div>'


class FeatureExplorer:
    """A widget: type a text, see what fires at which token, step through the features. Display it
    to use it.

    `box` is what is displayed, `here` the features of the text that was read, `static()` the same
    page as plain HTML.
    """

    def __init__(
        self,
        model: TransformerBridge,
        sae: SparseAutoencoder,
        fa: FeatureActivations,
        *,
        categories: Labels | None = None,
        text: str = EXAMPLE,
        feature: Index | None = None,
    ) -> None:
        """
        Args:
            fa: of the texts to show each feature on.
            categories: of these texts, one each.
            text: to begin with.
            feature: to begin with; default the strongest in `text`, of those that are not dense on
                the texts.

        Raises as `encode_features`, `tokenize` and `explore_feature` for what it begins with; later
        faults are said in the widget.
        """
        check_features([] if feature is None else [feature], sae.cfg.d_sae)
        if fa.n_features != sae.cfg.d_sae:
            raise ValueError(f"Texts with {fa.n_features} features, this SAE has {sae.cfg.d_sae}.")
        self.model, self.sae, self.fa = model, sae, fa
        self.options = {"categories": categories, "n": 4, "spread": 2}
        self.static_class = f"lenslab-static-{next(_numbers)}"
        # share of the other texts' tokens on which each feature fires
        self.rates = np.asarray((fa.matrix > 0).sum(0)).ravel() / max(fa.batch.n_real, 1)
        wide = ipywidgets.Layout(width="98%")
        self.text = ipywidgets.Textarea(text, rows=4, layout=wide, continuous_update=False)
        # takes the focus from the box, which sends its text
        read = ipywidgets.Button(description="Read the text", icon="play")
        self.strongest = ipywidgets.Select(description="Strongest", rows=8)
        self.number = ipywidgets.BoundedIntText(max=sae.cfg.d_sae - 1, description="Feature")
        self.problem = ipywidgets.HTML()
        self.output = ipywidgets.HTML()
        chooser = ipywidgets.HBox([self.strongest, self.number])
        self.box = ipywidgets.VBox([self.text, read, chooser, self.problem, self.output])
        self._encode()
        self.number.value = int(self.telling[0] if feature is None else feature)
        self._show()
        self.text.observe(lambda change: self._guarded(self._read), "value")
        self.number.observe(lambda change: self._guarded(self._show), "value")
        link = (self.strongest, "value"), (self.number, "value")
        ipywidgets.dlink(*link, lambda chosen: self.number.value if chosen is None else chosen)

    @property
    def telling(self) -> list[int]:
        """The text's features less those that fire on more than 10 % of the other texts' tokens, if
        any are left; feature 0 where none fires."""
        return [f for f in self.features if self.rates[f] <= DENSE] or self.features or [0]

    def view(self) -> View:
        """The page of the feature: the typed text, then the other texts, on one scale."""
        feature = self.number.value
        values = self.here.of(feature)
        scale = float(max(values.max(), self.fa.of(feature).max()))
        title = f"Feature {feature} in this text"
        typed = highlight_batch(self.here.batch, values, scale=scale, title=title)
        others = explore_feature(self.fa, feature, scale=scale, **self.options)
        return View(typed.body + others.body, title)

    def static(self) -> View:
        """What is left of the widget on a page without a kernel."""
        shown = self.telling[:STRIPS]
        values = [self.here.of(f)[0] for f in shown]
        names = [f"feature {f}" for f in shown]
        title = "The strongest features of this text, dense ones left out"
        strips = feature_strips(self.here.batch, 0, values, names, title=title)
        note = "Run this cell for the live explorer: type a text, step through its features."
        body = f'<p class="k">{note}</p>{strips.body}{self.view().body}'
        return View(f'<div class="{self.static_class}">{body}</div>', "Features")

    def _encode(self) -> None:
        """Run the model on the text in the box; list its features, strongest first."""
        batch = tokenize(self.model, self.text.value)
        self.here = encode_features(self.model, self.sae, batch, progress=False)
        pooled = self.here.pool("max").toarray()[0]  # [d_sae]
        strongest = np.argsort(-pooled, kind="stable")[:LISTED]
        self.features = [int(f) for f in strongest if pooled[f] > 0]
        names = [f"{f}: {pooled[f]:.3f} ({self.rates[f]:.1%} of tokens)" for f in self.features]
        listed = zip(names, self.features, strict=True)
        self.strongest.options = [("(not in the list)", None), *listed]

    def _read(self) -> None:
        """Read the text; stay at the feature if it still fires."""
        self._encode()
        if self.features and self.number.value not in self.features:
            self.number.value = self.telling[0]  # which shows it
        else:
            self._show()

    def _show(self) -> None:
        """Show the feature of the number box; the list follows."""
        body = self.view()
        feature = self.number.value
        self.strongest.value = feature if feature in self.features else None
        self.output.value = f"<style>.{self.static_class}{{display:none}}</style>{body}"

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run an action of the reader; what goes wrong is said in the widget, where a traceback
        would be lost."""
        self.problem.value = ""
        try:
            action()
        except Exception as error:  # whatever tokenizer, model or SAE raise on a text
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            message = html.escape(kind + str(error), quote=False)
            self.problem.value = f'<p role="alert"><b>{message}</b></p>'

    def _ipython_display_(self) -> None:
        """Two outputs, not one with two forms: tools that drop widgets must not drop the page with
        them."""
        display(self.static())
        # without its text, `VBox(children=...`, which a page without a kernel would show
        display(self.box._repr_mimebundle_() | {"text/plain": ""}, raw=True)
