"""Classes of tokens, and form against content, on data whose answers are known by hand."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from conftest import TEXTS, save_random

from lenslab.capture import harvest
from lenslab.features.activations import FeatureActivations
from lenslab.features.readings import (
    CLASSES,
    direct_logits,
    explained_by_token,
    feature_names,
    final_norm,
    firing_summary,
    form_and_concept,
    token_class,
    token_classes,
)
from lenslab.features.specialists import discriminate
from lenslab.models import load_model
from lenslab.texts import label_texts
from lenslab.tokens import tokenize

FORMS, CONCEPTS = 4, 12


@pytest.mark.parametrize(
    "string, expected",
    [
        (" 12", "digits"),
        (" (", "bracket or quote"),
        ("“", "bracket or quote"),
        ("+=", "operator or punctuation"),
        ("…", "operator or punctuation"),
        ("\n\n", "line break or indent"),
        ("    ", "line break or indent"),
        (" house", "word start"),
        ("ing", "word piece"),
        (" größ", "letters beyond ASCII"),
        ("привет", "letters beyond ASCII"),
        ("🚨", "emoji or other symbol"),
        ("<0xF0><0x9F>", "part of a character"),
        ("<", "bracket or quote"),
    ],
)
def test_token_class(string, expected):
    assert token_class(string) == expected and expected in CLASSES


def planted(batch, columns):
    """FeatureActivations set by hand, one `[text, pos]` map per feature."""
    real = batch.real.numpy()
    matrix = np.stack([column[real] for column in columns], axis=1).astype(np.float32)
    return FeatureActivations(
        scipy.sparse.csr_array(matrix), batch, "planted", "model", "hook", "key"
    )


def test_activation_is_shared_out_over_classes(model):
    batch = tokenize(model, ["2 + 2 = 4", "(7)"])
    digit = (
        np.array([[token_class(s) == "digits" for s in batch.strings(row)] for row in range(2)])
        & batch.real.numpy()
    )
    plus = (
        np.array([["+" in s for s in batch.strings(row)] for row in range(2)]) & batch.real.numpy()
    )
    table = token_classes(
        planted(batch, [digit * 3.0, digit * 1.0 + plus * 4.0, digit * 0.0]), [0, 1, 2]
    )
    assert table["0"]["digits"] == 1 and table["0"].iloc[:-1].sum() == 1
    assert table["0"]["one token"] == 0.25, "four digits, four different tokens"
    assert table["1"]["digits"] == 0.5 and table["1"]["operator or punctuation"] == 0.5
    assert table["2"].isna().all(), "a feature that never fires has no shares"
    assert table["all tokens"]["digits"] == pytest.approx(digit.sum() / batch.n_real)
    assert table["all tokens"].iloc[:-1].sum() == pytest.approx(1)


def test_features_are_named_by_the_token_they_fire_on_most(model):
    batch = tokenize(model, ["(7)", "2 (7"])
    seven, bracket = (np.zeros(batch.real.shape) for _ in range(2))
    for row, position in batch.real.nonzero().tolist():
        string = batch.strings(row)[position].strip()
        seven[row, position], bracket[row, position] = string == "7", string == "("
    fa = planted(batch, [2 * seven + bracket, seven + 2 * bracket, 0 * seven])
    first, second, silent = feature_names(fa, np.array([0, 1, 2]))
    assert first == "0 '7'" and second.startswith("1 ") and "(" in second
    assert silent == "2 (silent)"


def test_the_main_class_is_named_and_the_score_is_told_without_it(model):
    """Feature 0 tells digits apart by commas alone, 1 by its digits; 2 never fires."""
    rows = [(kind, f"{kind} {i}{i + 1}" + ", " * (kind == "a")) for i in range(6) for kind in "ab"]
    table = pd.DataFrame(rows, columns=["category", "text"]).assign(
        split=["discovery"] * 6 + ["held_out"] * 6
    )
    labels = label_texts(table)
    batch = tokenize(model, list(labels.texts))
    strings = [batch.strings(row) for row in range(len(batch))]
    comma = np.array([["," in s for s in row] for row in strings]) & batch.real.numpy()
    digit = np.array([[token_class(s) == "digits" for s in row] for row in strings])
    digit &= batch.real.numpy()
    inside = labels.inside[:, [0]]
    fires = [comma * 9.0 + digit * 0.25, digit * (1.0 + inside) + comma * 0.5, digit * 0.0]
    fa = planted(batch, fires)
    found = firing_summary(fa, [0, 0], labels).loc[0]
    assert found["category"] == "a" and found["fires_on"] == "operator or punctuation"
    held = labels.held_out
    commas, digits = comma[held].sum() * 9.0, digit[held].sum() * 0.25
    assert found["share"] == pytest.approx(commas / (commas + digits)) == found["token_share"]
    assert found["token"].strip() == ","
    assert found["auroc"] == 1 and found["auroc_without"] == 0.5
    assert feature_names(fa[labels.held_out], [0])[0] == f"0 {found['token']!r}"
    found = firing_summary(fa, [1, 2], labels)
    assert found.loc[0, ["fires_on", "auroc", "auroc_without"]].tolist() == ["digits", 1, 1]
    assert found["fires_on"][1] == "nothing" and found["share"][1] == 0
    assert found["auroc"][1] == found["auroc_without"][1] == 0.5
    with pytest.raises(ValueError, match="encode labels"):
        firing_summary(fa[:7], [0, 1], labels)
    with pytest.raises(ValueError, match="Negative"):
        firing_summary(planted(batch, [digit * -1.0]), [0, 0], labels)


def test_the_summary_is_of_the_held_out_half(model):
    """Shares as `token_classes` of it, and the score that `discriminate` gives."""
    rows = [(kind, f"{kind * (i + 1)} {i}+{i}, ({i})") for i in range(6) for kind in "ab"]
    labels = label_texts(pd.DataFrame(rows, columns=["category", "text"]))
    batch = tokenize(model, list(labels.texts))
    random = np.random.default_rng(0)
    fa = planted(batch, [random.random(batch.real.shape) * batch.real.numpy() for _ in range(3)])
    found = discriminate({"x": fa.pool("max")}, labels, n=5)
    summary = firing_summary(fa, found["feature"].tolist(), labels)
    assert np.allclose(summary["auroc"], found["auroc"])
    shares = token_classes(fa[np.flatnonzero(labels.held_out)], summary["feature"].tolist())
    for row in summary.itertuples():
        of_classes = shares[str(row.feature)].iloc[:-1]
        assert row.fires_on == of_classes.idxmax() and row.share == of_classes.max()
        assert row.token_share == shares[str(row.feature)]["one token"]


def grid():
    form = np.repeat([f"form {i}" for i in range(FORMS)], CONCEPTS)
    concept = np.tile([f"concept {i}" for i in range(CONCEPTS)], FORMS)
    return form, concept


def test_form_concept_and_noise_are_told_apart():
    form, concept = grid()
    random = np.random.default_rng(0)
    by_form = np.unique(form, return_inverse=True)[1].astype(float)
    by_concept = np.unique(concept, return_inverse=True)[1].astype(float)
    noise = random.normal(size=(len(form), 200))
    matrix = np.column_stack(
        [by_form, by_concept, by_form / by_form.std() + by_concept / by_concept.std(), noise]
    )
    found = form_and_concept(matrix, form, concept, n=99)
    assert len(found) == 203
    assert found.form[:3].tolist() == pytest.approx([1, 0, 0.5])
    assert found.concept[:3].tolist() == pytest.approx([0, 1, 0.5])
    assert abs(found.form[3:].mean()) < 0.02 and abs(found.concept[3:].mean()) < 0.04, (
        "noise gives nothing on average"
    )
    assert found.form_p[0] == found.concept_p[1] == 0.01
    for p in (found.form_p[3:], found.concept_p[3:]):
        assert 0.01 <= np.mean(p <= 0.05) <= 0.11, "p-values of noise are uniform"


def test_order_and_sparsity_change_nothing():
    form, concept = grid()
    random = np.random.default_rng(1)
    matrix = random.random((len(form), 5)) * (random.random((len(form), 5)) < 0.7)
    order = random.permutation(len(form))
    one = form_and_concept(matrix, form, concept, n=20)
    two = form_and_concept(scipy.sparse.csr_array(matrix[order]), form[order], concept[order], n=20)
    assert np.allclose(one.form, two.form) and np.allclose(one.concept, two.concept)
    assert one["feature"].tolist() == [0, 1, 2, 3, 4]


def test_a_concept_without_a_form_is_refused():
    form, concept = grid()
    values = np.ones((len(form) - 1, 3))
    with pytest.raises(ValueError, match="exactly once"):
        form_and_concept(values, form[1:], concept[1:])
    with pytest.raises(ValueError, match="labels"):
        form_and_concept(values, form, concept)
    with pytest.raises(ValueError):
        form_and_concept(values, form[1:], concept)


@pytest.mark.parametrize("value", [1.0, 0.1, 3.3e7])
def test_a_feature_that_does_not_vary_is_left_out(value):
    """It has no variance to share out: its shares were NaN, or rounding over rounding."""
    form, concept = grid()
    rounding = 1 + 1e-7 * np.random.default_rng(0).random(len(form))
    varies = np.random.default_rng(1).random(len(form))
    constant = np.full(len(form), value)
    matrix = np.column_stack([constant, varies, constant * rounding])
    found = form_and_concept(matrix.astype(np.float32), form, concept, n=5)
    assert found["feature"].tolist() == [1] and found.notna().all(axis=None)
    alone = form_and_concept(matrix[:, 1:2], form, concept, n=5)
    assert np.allclose(found.drop(columns="feature"), alone.drop(columns="feature"), atol=1e-6)
    none = form_and_concept(matrix[:, :1], form, concept, n=5)
    assert none.empty and list(none.columns) == list(found.columns)


def test_two_forms_and_two_contents_are_needed():
    with pytest.raises(ValueError, match="two of each"):
        form_and_concept(np.ones((12, 1)), ["a"] * 12, np.arange(12))


FAMILIES = {
    "Llama": {},
    "Granite": {"logits_scaling": 8.0},
    "Gemma2": {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_direct_logits_are_the_models_own_before_a_cap(tmp_path, kind):
    """The last residual stream through the direct path, over the norm's scale."""
    model = load_model(save_random(tmp_path / f"tiny-{kind.lower()}", kind, **FAMILIES[kind]))
    batch = tokenize(model, TEXTS[:2])
    hook = "blocks.1.hook_resid_post"
    x = harvest(model, batch, hook)[hook][batch.real]  # [token, d_model]
    logits = model(batch.tokens, attention_mask=batch.attention.long())[batch.real].detach()
    if cap := FAMILIES[kind].get("final_logit_softcapping"):
        logits = cap * (logits / cap).atanh()
    if final_norm(model)[1]:
        x = x - x.mean(-1, keepdim=True)
    direct = direct_logits(model, x) / (x.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    expected = logits - logits.mean(-1, keepdim=True)
    assert float((direct - expected).norm() / expected.norm()) < 1e-3


def test_what_the_token_foretells_is_told_from_what_the_place_does(model):
    texts = ["7 cats, 8 dogs", "8 dogs, 7 cats", "7 dogs", "8, cats"] * 6
    batch = tokenize(model, texts)
    strings = [batch.strings(row) for row in range(len(batch))]
    shape = batch.real.shape
    seven, digit, noise = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for row, position in batch.real.nonzero().tolist():
        seven[row, position] = strings[row][position].strip() == "7"
        digit[row, position] = token_class(strings[row][position]) == "digits"
    noise[:] = np.random.default_rng(0).random(shape)
    fa = planted(batch, [seven, digit, noise, 0 * noise])
    found = explained_by_token(fa, [0, 1, 2, 3], np.arange(len(batch)) >= 12)
    assert found["by_string"].iloc[:2].tolist() == pytest.approx([1, 1])
    assert found["by_class"][1] == pytest.approx(1) and 0.1 < found["by_class"][0] < 0.9
    assert found.iloc[2, 1:].max() < 0.3 and found.iloc[3, 1:].isna().all()
    # a string that the other texts do not hold is foretold by its class: 7 as 8
    other = tokenize(model, ["8 dogs"] * 6 + ["7 dogs"] * 6)
    first = [[s.strip() in ("7", "8") for s in other.strings(row)] for row in range(12)]
    half = planted(other, [np.array(first)])
    new = explained_by_token(half, [0], np.arange(12) >= 6)
    assert new["by_string"][0] == pytest.approx(1)
    with pytest.raises(ValueError, match="texts but 3 marks"):
        explained_by_token(fa, [0], np.ones(3))
