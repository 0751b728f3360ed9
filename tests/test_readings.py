"""Classes of tokens, and form against content, on data whose answers are known by hand."""

import numpy as np
import pytest
import scipy.sparse
from conftest import TEXTS, save_random

from lenslab.capture import harvest
from lenslab.features.activations import FeatureActivations
from lenslab.features.readings import (
    CLASSES,
    direct_logits,
    final_norm,
    form_and_concept,
    token_class,
    token_classes,
)
from lenslab.models import load_model
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


def test_a_constant_feature_has_no_shares():
    form, concept = grid()
    found = form_and_concept(np.ones((len(form), 1)), form, concept, n=5)
    assert np.isnan(found.form[0]) and np.isnan(found.concept[0])


def test_a_constant_feature_is_no_evidence_for_form_or_content():
    """NaN is never at or above NaN: its p was the smallest there is."""
    form, concept = np.repeat(["a", "b"], 6), np.tile(np.arange(6), 2)
    table = form_and_concept(np.ones((12, 1)), form, concept, n=20)
    assert table["form"].isna().all() and (table[["form_p", "concept_p"]] == 1).all(axis=None)
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
