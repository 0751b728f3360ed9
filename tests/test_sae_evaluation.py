"""Metrics of an SAE: exact where the answer is known, the same however the texts are cut, and
beside their null."""

import dataclasses
import json

import pytest
import torch
from test_sae_pretrained import HOOK, shaken_folder, tiny_sae  # noqa: F401  (a fixture)

from lenslab.capture import TooLargeForMemory, harvest
from lenslab.circuits.interventions import splice
from lenslab.metrics import cross_entropy
from lenslab.models import load_model, random_twin
from lenslab.sae import evaluate
from lenslab.sae.controls import evaluate_null, random_sae
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.find import train_small_sae
from lenslab.sae.load import SAEMismatch, sae_key
from lenslab.tokens import TokenBatch, pack, tokenize

TEXTS = [
    "A cat sat on the mat.",
    "def add(a, b):\n    return a + b",
    "Paris is a city on a river, they say.",
    "2 + 2 = 4",
]


@pytest.fixture(scope="module")
def bold(shaken_folder):  # noqa: F811
    return load_model(shaken_folder)


@pytest.fixture(scope="module")
def batch(bold):
    return tokenize(bold, TEXTS)


def values(bold, batch):
    return harvest(bold, batch, HOOK, compute="float32", progress=False)[HOOK][batch.real]


def known_sae(bold, kind, mean=None):
    """SAEs whose scores are known beforehand: one that is perfect, one that says the mean, one that
    says zero."""
    sae = tiny_sae(bold, d_sae=64)
    for parameter in sae.parameters():
        parameter.zero_()
    if kind == "perfect":
        eye = torch.eye(32)
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
    if kind == "mean":
        sae.b_dec.copy_(mean)
    return sae


def close(a, b, tolerance=1e-5):
    return a == pytest.approx(b, abs=tolerance, rel=tolerance)


def test_a_perfect_sae_changes_nothing(bold, batch):
    m = evaluate_sae(bold, known_sae(bold, "perfect"), batch)
    assert (
        close(m.variance_explained, 1)
        and close(m.cosine, 1)
        and close(m.l2_ratio, 1)
        and close(m.mse, 0)
    )
    assert (
        close(m.reconstruction_bias, 1)
        and close(m.ce_difference, 0)
        and close(m.kl, 0)
        and close(m.l0, 32)
    )
    assert (m.n_tokens, m.n_texts, m.d_in, m.d_sae, m.hook) == (batch.n_real, 4, 32, 64, HOOK)


def test_saying_the_mean_explains_nothing_and_is_the_mean_ablation(bold, batch):
    m = evaluate_sae(bold, known_sae(bold, "mean", values(bold, batch).mean(0)), batch)
    assert (
        close(m.variance_explained, 0)
        and close(m.ce_spliced, m.ce_mean)
        and m.l0 == 0
        and m.dead == 64
    )
    assert abs(m.ce_zero - m.ce_mean) > 1e-3  # else the two ablations were one
    if m.ce_recovered_mean is not None:
        assert close(
            m.ce_recovered_mean, 0, 1e-3
        )  # rounding of the losses over a difference of 0.008


def test_saying_zero_is_the_zero_ablation(bold, batch):
    m = evaluate_sae(bold, known_sae(bold, "zero"), batch)
    assert (
        close(m.ce_spliced, m.ce_zero)
        and m.l2_ratio == 0
        and m.cosine == 0
        and m.variance_explained < 0
    )
    x = values(bold, batch).double()
    assert close(m.fvu, float(x.square().sum() / (x - x.mean(0)).square().sum()))


def without_tensors(metrics):
    return {
        key: value for key, value in metrics.to_dict().items() if isinstance(value, (int, float))
    }


def test_neither_batch_size_nor_padding_changes_a_metric(bold, batch):
    sae = tiny_sae(bold, architecture="topk")
    whole = evaluate_sae(bold, sae, batch, batch_size=4)
    for other in (batch, tokenize(bold, TEXTS, pad_side="left")):
        cut = evaluate_sae(bold, sae, other, batch_size=1)
        assert without_tensors(cut) == pytest.approx(without_tensors(whole), rel=1e-4, abs=1e-5)
        assert cut.dead == whole.dead


def test_what_is_at_bos_and_padding_never_counts(bold, batch):
    sae = tiny_sae(bold)
    clean = evaluate_sae(bold, sae, batch)
    tokens = torch.where(batch.attention, batch.tokens, 77)  # another padding token
    other = evaluate_sae(bold, sae, dataclasses.replace(batch, tokens=tokens))
    assert without_tensors(other) == pytest.approx(without_tensors(clean), rel=1e-5, abs=1e-6)
    fewer = batch.real.clone()
    fewer[:, 1:3] = False
    few = dataclasses.replace(batch, real=fewer, document=None)
    assert evaluate_sae(bold, sae, few).n_tokens == clean.n_tokens - 8


def test_losses_are_those_of_the_splice_at_real_tokens(bold, batch):
    sae = tiny_sae(bold)
    m = evaluate_sae(bold, sae, batch)
    attention = dict(attention_mask=batch.attention.long())
    with torch.inference_mode():
        clean = cross_entropy(bold(batch.tokens, **attention), batch.tokens, batch.real)
        with splice(bold, sae, error_term=False, mask=batch.real):
            spliced = cross_entropy(bold(batch.tokens, **attention), batch.tokens, batch.real)
    assert (
        close(m.ce_clean, clean)
        and close(m.ce_spliced, spliced)
        and close(m.ce_difference, spliced - clean)
    )
    assert m.n_predicted == int(batch.real[:, 1:].sum())


def test_losses_and_divergence_agree_with_saelens(bold):
    """With texts of one length and BOS left alone both count the same positions."""
    from sae_lens.evals import get_recons_loss
    from sae_lens.training.activation_scaler import ActivationScaler

    tokens = torch.randint(3, 290, (4, 20), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[:, 0] = False
    batch = TokenBatch(tokens, real, torch.ones_like(real), ("",) * 4)
    sae = tiny_sae(bold)
    m = evaluate_sae(bold, sae, batch)
    theirs = get_recons_loss(
        sae,
        bold,
        ActivationScaler(),
        tokens,
        compute_kl=True,
        compute_ce_loss=True,
        ignore_tokens=[0],
    )
    assert close(m.ce_clean, float(theirs["ce_loss_without_sae"].mean()), 1e-4)
    assert close(m.ce_spliced, float(theirs["ce_loss_with_sae"].mean()), 1e-4)
    assert close(
        m.kl, float(theirs["kl_div_with_sae"][:, :-1].mean()), 1e-4
    )  # the last position predicts no token here


def test_sparsity_and_reconstruction_agree_with_formulas_written_out(bold, batch):
    sae = tiny_sae(bold, architecture="topk")
    m, x = evaluate_sae(bold, sae, batch), values(bold, batch).double()
    f = sae.encode(x.float())
    y = sae.decode(f).double()
    assert close(m.l0, float((f != 0).sum(1).double().mean())) and close(
        m.l1, float(f.abs().sum(1).mean()), 1e-4
    )
    assert close(m.mse, float((x - y).square().sum(1).mean()), 1e-4)
    assert close(m.cosine, float(torch.cosine_similarity(x, y).mean()))
    assert close(m.reconstruction_bias, float(y.square().sum() / (x * y).sum()), 1e-4)
    rate = (f != 0).double().mean(0)
    assert m.dead == int((rate == 0).sum()) and m.dense == int((rate > 0.1).sum())


def test_saved_metrics_hold_values_versions_and_config(bold, batch, tmp_path):
    m = evaluate_sae(bold, tiny_sae(bold), batch, name="tiny")
    m.save(tmp_path / "metrics.json", texts="four lines")
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["values"] == m.to_dict() and saved["values"]["l0"] == m.l0
    assert saved["config"] == {"texts": "four lines"} and "sae-lens" in saved["versions"]
    frame = m.to_frame()
    assert len(frame) == 1 and frame.loc[0, "sae"] == "tiny"
    with pytest.raises(dataclasses.FrozenInstanceError):
        m.l0 = 1.0


def test_recovered_fractions_are_none_where_ablation_does_not_hurt(bold, batch):
    twin = random_twin(bold)
    sae = tiny_sae(twin)
    m = evaluate_sae(twin, sae, batch)
    for ablated, recovered in ((m.ce_zero, m.ce_recovered_zero), (m.ce_mean, m.ce_recovered_mean)):
        assert (recovered is None) == (ablated <= m.ce_clean)


def test_an_sae_of_another_model_is_not_evaluated(bold, batch):
    with pytest.raises(SAEMismatch):
        evaluate_sae(random_twin(bold), tiny_sae(bold), batch)


def test_nan_in_the_model_is_refused(shaken_folder, batch):  # noqa: F811
    sick = load_model(shaken_folder)
    sick.original_model.state_dict()  # the weights themselves, edited in place
    with torch.no_grad():
        next(p for n, p in sick.original_model.named_parameters() if "wpe" in n)[2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        evaluate_sae(sick, tiny_sae(sick), batch)


def test_the_random_null_has_the_shape_and_l0_asked_for_and_its_scale_is_the_best(bold, batch):
    sae, x = tiny_sae(bold), values(bold, batch)
    null = random_sae(sae, x, 6, seed=1)
    assert null.encode(x).shape == (len(x), 48) and int((null.encode(x) != 0).sum(1).max()) <= 6
    assert torch.equal(null.directions, random_sae(sae, x, 6, seed=1).directions)
    best = float((null.decode(null.encode(x)) - x).square().sum())
    for factor in (0.9, 1.1):
        other = random_sae(sae, x, 6, seed=1)
        other.scale *= factor
        assert float((other.decode(other.encode(x)) - x).square().sum()) > best
    m = evaluate_null(bold, sae, batch, 6.3)
    assert 0 < m.l0 <= 6 and m.variance_explained > 0 and m.sae.startswith("random")


def test_a_trained_sae_beats_its_random_null_on_trained_weights(shared):
    model = load_model(shared / "fixtures" / "tinystories-656k")
    stories = json.loads(
        (shared / "fixtures" / "tinystories" / "tinystories_1000.json").read_text()
    )
    texts = [story if isinstance(story, str) else story["text"] for story in stories]
    sae = train_small_sae(
        model,
        "blocks.0.hook_resid_post",
        pack(model, texts[:60], length=128),
        d_sae=256,
        k=12,
        steps=60,
    )
    held_out = pack(model, texts[900:906], length=128)
    m = evaluate_sae(model, sae, held_out, progress=False)
    null = evaluate_null(model, sae, held_out, m.l0, progress=False)
    assert m.variance_explained > null.variance_explained + 0.1
    assert m.ce_difference < null.ce_difference
    assert m.ce_clean < m.ce_spliced < m.ce_zero and m.ce_recovered_zero > null.ce_recovered_zero


def test_a_transcoder_is_not_measured_against_its_own_input(bold, batch):
    with pytest.raises(ValueError, match="transcoder"):
        evaluate_sae(bold, tiny_sae(bold, hook_name_out="blocks.1.hook_mlp_out"), batch)


@pytest.mark.parametrize("k", [0, -3, 49, 2.5])
def test_a_random_sae_uses_as_many_directions_as_there_are(bold, k):
    with pytest.raises((ValueError, TypeError), match=r"from 1 to 48|int"):
        random_sae(tiny_sae(bold), torch.randn(9, 32), k)


@pytest.mark.parametrize("hook", [HOOK, "blocks.2.hook_resid_post"])
def test_a_forgotten_hook_is_not_measured_as_the_saes(bold, batch, hook):
    bold.add_hook(hook, lambda value, hook: value * 0)
    try:
        with pytest.raises(ValueError, match="reset_hooks"):
            evaluate_sae(bold, tiny_sae(bold), batch)
    finally:
        bold.reset_hooks()
    assert evaluate_sae(bold, tiny_sae(bold), batch).n_texts == 4


def test_a_hook_left_on_the_sae_is_not_measured_as_the_saes(bold, batch):
    sae = tiny_sae(bold)
    sae.add_hook("hook_sae_acts_post", lambda value, hook: value * 0)
    with pytest.raises(ValueError, match="hook_sae_acts_post has a hook"):
        evaluate_sae(bold, sae, batch)
    with pytest.raises(ValueError, match="hook_sae_acts_post has a hook"):
        sae_key(sae)


@pytest.mark.parametrize("window", [5, 6, 7, None])
def test_texts_longer_than_the_windows_of_the_training_are_told(bold, recwarn, window):
    batch = tokenize(bold, ["A cat sat.", "2 + 2 = 4"])
    longest = int(batch.attention.sum(1).max())
    window = window and longest + window - 6
    evaluate_sae(bold, tiny_sae(bold, context_size=window), batch)
    told = [str(each.message) for each in recwarn if "windows of" in str(each.message)]
    assert len(told) == (window == longest - 1)
    assert all(f"windows of {window} tokens" in each and str(longest) in each for each in told)


@pytest.mark.parametrize("cells", [1, 900, 20_000])
def test_logits_reduced_in_pieces_give_the_same_metrics(bold, batch, cells, monkeypatch):
    sae = tiny_sae(bold, architecture="topk")
    whole = evaluate_sae(bold, sae, batch, batch_size=4)
    monkeypatch.setattr(evaluate, "CELLS", cells)
    pieces = evaluate_sae(bold, sae, batch)
    assert without_tensors(pieces) == pytest.approx(without_tensors(whole), rel=1e-4, abs=1e-5)


def test_what_does_not_fit_is_refused_before_the_run(bold, batch, monkeypatch):
    monkeypatch.setattr("lenslab.capture.free_memory", lambda: 1000)
    monkeypatch.setattr(evaluate, "forward", lambda *given: 1 / 0)
    with pytest.raises(TooLargeForMemory, match="free"):
        evaluate_sae(bold, tiny_sae(bold), batch)


def test_a_text_of_one_token_counts_among_others_and_alone_is_refused(bold, batch):
    """Without BOS it predicts nothing: whichever texts share its pass."""
    rows = (batch.tokens[:, 1:].clone(), batch.real[:, 1:].clone(), batch.attention[:, 1:].clone())
    rows[1][0, 1:] = rows[2][0, 1:] = False
    short = TokenBatch(*rows, batch.texts)
    whole, single = (evaluate_sae(bold, tiny_sae(bold), short, batch_size=n) for n in (4, 1))
    assert without_tensors(single) == pytest.approx(without_tensors(whole), rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluate_sae(bold, tiny_sae(bold), short[:1])
