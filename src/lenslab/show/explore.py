"""Look at one feature, and at the features of a text that you type.

`explore_feature` shows what is known of a feature as one piece of HTML: statistics, its categories,
its strongest texts and some of the weaker ones (the strongest alone would flatter it), what it does
to the vocabulary.

`feature_explorer` is a widget of ipywidgets' own parts, for JupyterLab and VSCode:
1. a text is read when you leave the box or press the button: the model runs once, its features are
   encoded;
2. the list names the features strongest in it; the buttons step through them, the number box goes
   anywhere;
3. what is wrong with an input (no token, too long, no such feature) is said in the widget, and it
   stays usable;
4. above the widget stands the same view as plain HTML, which pages without a kernel keep (GitHub,
   nbconvert, our own pages). The live widget hides it by a style rule, so that nobody sees it
   twice.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
from transformer_lens.model_bridge import TransformerBridge

from lenslab.features.activations import FeatureActivations, encode_features
from lenslab.features.contexts import TopContexts
from lenslab.features.ranking import FeatureSummary, category_profile, summarize_features
from lenslab.features.readings import VocabularyEffects
from lenslab.sae.load import SparseAutoencoder
from lenslab.show.plots import Labels, Number
from lenslab.show.tokens import View, feature_strips, highlight, highlight_batch, swatch, visible
from lenslab.tokens import tokenize

EXAMPLE = "The dog saw the cat.\nfor i in range(10):\n    print(i ** 2)"


LISTED, STRIPS = 40, 5  # features of a text: in the list, and in the static view


DENSE = 0.1  # of tokens: such features are strong in every text


_numbers = count()  # of explorers in this kernel: each hides its own static view


def explore_feature(
    fa: FeatureActivations,
    feature: int | np.integer,
    *,
    categories: Labels | None = None,
    n: int = 8,
    spread: int = 4,
    contexts: TopContexts | None = None,
    effects: VocabularyEffects | None = None,
    scale: Number | None = None,
    window: int = 40,
) -> View:
    """What is known of one feature, from the texts it was encoded on; a single colour scale
    throughout.

    Args:
        categories: one per text: adds the table of categories, and labels the texts.
        n: strongest texts shown.
        spread: further texts on which it fires, evenly over the ranks below those.
        contexts: of `find_contexts`: adds its strongest contexts in a corpus.
        effects: of `vocabulary_effects`: adds which next tokens it makes likelier and less likely.
        scale: activation with the full colour; default the feature's largest on these texts.
        window: tokens shown on either side of a text's strongest.

    Raises ValueError for a feature that is not there and for categories of another number than
    texts.
    """
    if categories is not None and len(categories) != fa.n_texts:
        raise ValueError(
            f"{len(categories)} categories for {fa.n_texts} texts: one each is needed."
        )
    categories = (
        None if categories is None else list(categories)
    )  # by place, whatever index a table has
    feature = int(feature)
    values = fa.of(feature)  # refuses a feature that is not there
    pooled = fa.pool("max")[:, [feature]]
    summary = summarize_features(pooled)
    fired = int(summary.fired[0])
    found = None if contexts is None else contexts.top(feature)[:n]
    full = (
        scale
        or max([float(summary.largest[0]), *([] if found is None else found["activation"])])
        or None
    )
    parts = [_facts(fa, feature, summary, int((values[fa.batch.real] > 0).sum()))]
    if categories is not None:
        parts.append(_category_table(category_profile(pooled, categories, [0]), full or 1.0))
    if fired:
        ranked = [int(row) for row in np.argsort(-pooled.toarray()[:, 0], kind="stable")[:fired]]
        strong, rest = ranked[:n], ranked[n:]
        weak = (
            [rest[int((i + 0.5) * len(rest) / spread)] for i in range(spread)]
            if len(rest) > spread
            else rest
        )
        weaker = f"Weaker texts: {len(weak)}, evenly over the other {len(rest)}"
        for title, rows in ((f"Strongest texts: {len(strong)} of {fired}", strong), (weaker, weak)):
            if rows:
                labels = None if categories is None else [str(categories[row]) for row in rows]
                options = {"scale": full, "window": window, "max_texts": len(rows), "title": title}
                parts.append(
                    highlight_batch(fa.batch, values, rows=rows, labels=labels, **options).body
                )
    if found is not None and len(found):
        title = f"Strongest contexts in {contexts.tokens:,} tokens of a corpus"
        options = {"scale": full, "title": title, "max_texts": n, "breaks": False}
        parts.append(highlight(list(found["tokens"]), list(found["activations"]), **options).body)
    elif found is not None:
        parts.append(f'<p class="k">Never active in {contexts.tokens:,} tokens of the corpus.</p>')
    if effects is not None:
        parts.append(_effects(effects, feature))
    return View("".join(parts), f"Feature {feature}")


def feature_explorer(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    texts: Sequence[str] | FeatureActivations | None = None,
    *,
    categories: Labels | None = None,
    text: str = EXAMPLE,
    feature: int | np.integer | None = None,
    n: int = 4,
) -> FeatureExplorer:
    """A widget: type a text, see what fires at which token, step through the features. Display it
    to use it.

    Args: texts: to show each feature on, as texts or already encoded; without them only the typed
        text is shown. categories: of these texts, one each. text: to begin with. feature: to begin
        with; default the strongest in `text`, of those that are not dense on `texts`. n: texts
        shown of each feature.

    Raises as `encode_features` and `tokenize` for what it begins with; later faults are said in the
    widget.
    """
    if texts is not None and not isinstance(texts, FeatureActivations):
        texts = encode_features(model, sae, tokenize(model, texts))
    if texts is not None and texts.n_features != sae.cfg.d_sae:
        raise ValueError(
            f"The texts were encoded with {texts.n_features} features, this SAE has {sae.cfg.d_sae}."
        )
    return FeatureExplorer(model, sae, texts, categories, text, feature, n)


class FeatureExplorer:
    """The widget of `feature_explorer`: `box` is what is displayed, `static` the same as plain
    HTML."""

    def __init__(
        self,
        model: TransformerBridge,
        sae: SparseAutoencoder,
        fa: FeatureActivations | None,
        categories: Labels | None,
        text: str,
        feature: int | np.integer | None,
        n: int,
    ) -> None:
        import ipywidgets as widgets

        self.model, self.sae, self.fa, self.categories, self.n = model, sae, fa, categories, n
        self._id, self._setting = f"lenslab-static-{next(_numbers)}", False
        self.rates = (
            None
            if fa is None
            else np.asarray((fa.matrix > 0).sum(0)).ravel() / max(fa.batch.n_real, 1)
        )
        wide = widgets.Layout(width="98%")
        self.text = widgets.Textarea(
            value=text, rows=4, layout=wide, continuous_update=False, placeholder="A text"
        )
        self.read = widgets.Button(
            description="Read the text", tooltip="Run the model on it", icon="play"
        )
        self.strongest = widgets.Dropdown(
            description="Strongest", layout=widgets.Layout(width="26em")
        )
        narrow = widgets.Layout(width="13em")
        self.number = widgets.BoundedIntText(
            min=0, max=sae.cfg.d_sae - 1, description="Feature", layout=narrow
        )
        self.previous = widgets.Button(
            description="Previous", tooltip="The next stronger in this text"
        )
        self.next = widgets.Button(description="Next", tooltip="The next weaker in this text")
        self.output, self.problem = widgets.HTML(), widgets.HTML()
        chooser = widgets.HBox(
            [self.previous, self.next, self.strongest, self.number],
            layout=widgets.Layout(flex_flow="row wrap"),
        )
        self.box = widgets.VBox([self.text, self.read, chooser, self.problem, self.output])
        self._encode(text)
        self.show(self.telling[0] if feature is None and self.features else int(feature or 0))
        self.static = self._static()
        self.text.observe(lambda change: self._guarded(self.read_text), "value")
        self.read.on_click(lambda button: self._guarded(self.read_text))
        self.strongest.observe(lambda change: self._chosen(change["new"]), "value")
        self.number.observe(lambda change: self._chosen(change["new"]), "value")
        self.previous.on_click(lambda button: self._guarded(self.step, -1))
        self.next.on_click(lambda button: self._guarded(self.step, 1))

    def read_text(self) -> None:
        """Run the model on the text in the box, unless it was read already; stay at the feature if
        it still fires."""
        if self.text.value != self._read:
            self._encode(self.text.value)
            kept = self.feature in self.features or not self.features
            self.show(self.feature if kept else self.telling[0])

    def step(self, by: int) -> None:
        """Go `by` places down the list of the text's features, strongest first."""
        if not self.features:
            raise ValueError("No feature is active in this text.")
        at = (
            self.features.index(self.feature)
            if self.feature in self.features
            else -1
            if by > 0
            else 0
        )
        self.show(self.features[(at + by) % len(self.features)])

    def show(self, feature: int) -> None:
        """Show one feature, on the typed text and on the others. ValueError for one that is not
        there."""
        body = self.view(feature)
        self.feature, self._setting = (
            feature,
            True,
        )  # the two controls below follow, and would call us again
        try:
            self.number.value = feature
            self.strongest.value = feature if feature in self.features else None
        finally:
            self._setting = False
        hide = f"<style>.{self._id}{{display:none}}</style>"
        self.output.value, self.problem.value = hide + str(body), ""

    def view(self, feature: int) -> View:
        """The page of one feature: the typed text, then the other texts, on one scale."""
        values = self.here.of(feature)
        known = 0.0 if self.fa is None else float(self.fa.of(feature).max())
        full = max(known, float(values.max())) or None
        title = f"Feature {feature} in this text"
        typed = highlight_batch(self.here.batch, values, scale=full, title=title)
        if self.fa is None:
            return typed
        options = {"categories": self.categories, "n": self.n, "spread": self.n // 2, "scale": full}
        return View(typed.body + explore_feature(self.fa, feature, **options).body, title)

    @property
    def telling(self) -> list[int]:
        """The text's features less those that fire on more than 10 % of the other texts' tokens, if
        any are left."""
        sparse = [f for f in self.features if self.rates is None or self.rates[f] <= DENSE]
        return sparse or self.features

    def _encode(self, text: str) -> None:
        batch = tokenize(self.model, text)
        self.here = encode_features(self.model, self.sae, batch, progress=False)
        self._read = text
        pooled = self.here.pool("max").toarray()[0]
        self.features = [
            int(f) for f in np.argsort(-pooled, kind="stable")[:LISTED] if pooled[f] > 0
        ]
        rate = [
            f", fires on {self.rates[f]:.1%} of tokens" if self.rates is not None else ""
            for f in self.features
        ]
        options = [
            (f"{f}: {pooled[f]:.3f}{r}", f) for f, r in zip(self.features, rate, strict=True)
        ]
        self._setting = True
        try:
            self.strongest.options = [("(not in the list)", None), *options]
        finally:
            self._setting = False

    def _chosen(self, feature: int | None) -> None:
        if not self._setting and feature is not None:
            self._guarded(self.show, int(feature))

    def _guarded(self, action: Any, *arguments: Any) -> None:
        """Run an action of the reader; what goes wrong is said in the widget, where a traceback
        would be lost."""
        self.read.disabled = True
        try:
            action(*arguments)
            self.problem.value = ""
        except Exception as error:  # whatever tokenizer, model or SAE raise on a text
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self.problem.value = (
                f'<p role="alert"><b>{html.escape(kind + str(error), quote=False)}</b></p>'
            )
        finally:
            self.read.disabled = False

    def _static(self) -> View:
        features = self.telling[:STRIPS]
        batch = self.here.batch
        note = '<p class="k">Run this cell for the live explorer: type a text, step through its features.</p>'
        strips = View("")
        if features:
            values = [self.here.of(f)[0] for f in features]
            names = [f"feature {f}" for f in features]
            title = "The strongest features of this text" + (
                "" if self.rates is None else ", dense ones left out"
            )
            strips = feature_strips(
                batch.strings(0),
                values,
                names,
                counted=batch.real[0],
                ids=batch.tokens[0],
                title=title,
            )
        return View(
            f'<div class="{self._id}">{note}{strips.body}{self.view(self.feature).body}</div>',
            "Features",
        )

    def _ipython_display_(self) -> None:
        """Two outputs, not one with two forms: tools that drop widgets must not drop the page with
        them."""
        from IPython.display import display

        display(self.static)
        display(self.box)


def _facts(fa: FeatureActivations, feature: int, summary: FeatureSummary, active: int) -> str:
    """Which feature of what, and its statistics on the texts, in three lines."""
    link, fired, tokens = fa.link(feature), int(summary.fired[0]), fa.batch.n_real
    page = (
        f' · <a href="{html.escape(link)}" target="_blank" rel="noopener">Neuronpedia</a>'
        if link
        else ""
    )
    facts = (
        f"fires on {active:,} of {tokens:,} tokens ({active / tokens:.2%}) and in {fired:,} of {fa.n_texts:,} texts; "
        f"largest {summary.largest[0]:.3f}, mean of maxima where it fires {summary.mean_when_active[0]:.3f}"
    )
    return (
        f'<div class="lh"><b>Feature {feature}</b></div>'
        f'<p class="k">{html.escape(fa.name)} of {html.escape(fa.model)} at {html.escape(fa.hook)}{page}</p>'
        f'<p class="k">{facts if fired else f"never active in these {fa.n_texts:,} texts"}</p>'
    )


def _category_table(profile: Any, full: float) -> str:
    """Rows of `category_profile` for one feature, by mean, coloured on the feature's scale."""
    rows = [
        f"<tr><td>{html.escape(str(row.category))}</td><td>{row.fired} of {row.texts}</td>"
        f"<td>{swatch(row.mean, full)}</td><td>{swatch(row.largest, full)}</td></tr>"
        for row in profile.sort_values(
            ["mean", "fired"], ascending=False, kind="stable"
        ).itertuples()
    ]
    head = "<tr><th>category</th><th>fires in</th><th>mean of maxima</th><th>largest</th></tr>"
    return f'<div class="lt"><table>{head}{"".join(rows)}</table></div>'


def _effects(effects: VocabularyEffects, feature: int) -> str:
    """Promoted and suppressed tokens, in units of what a random direction reaches: grey where that
    is no more."""
    frame = effects.to_frame()
    frame = frame[frame["feature"] == feature]
    if not len(frame):
        raise ValueError(
            f"Feature {feature} is not among the effects: vocabulary_effects(..., [{feature}])."
        )
    lines = []
    for effect, rows in frame.groupby("effect", sort=False):
        tokens = [
            f"<{tag}>«{html.escape(visible(token, breaks=False)[0])}» {ratio:.2f}</{tag.split()[0]}>"
            for token, ratio in zip(rows["token"], rows["times_control"], strict=True)
            for tag in (["span"] if ratio > 1 else ['i class="x"'])
        ]
        lines.append(
            f'<p class="k"><b>{html.escape(str(effect))}</b>: {" &nbsp; ".join(tokens)}</p>'
        )
    note = (
        "By the direct path, as a multiple of the largest logit of a random direction of equal norm: up to 1, in grey, "
        "chance does as much."
    )
    return f'<div class="lt"><div class="lh"><b>Next tokens</b></div>{"".join(lines)}<p class="k">{note}</p></div>'
