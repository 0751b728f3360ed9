"""Metrics of an SAE: exact where the answer is known, the same however the texts are cut, and
beside their null."""

import dataclasses
import json
import math

import pytest
import torch
from test_sae_pretrained import HOOK, shaken_folder, tiny_sae  # noqa: F401  (a fixture)

from lenslab.capture import TooLargeForMemory, harvest
from lenslab.circuits.interventions import splice
from lenslab.metrics import next_token_nats
from lenslab.models import load_model, random_twin
from lenslab.sae import evaluate
from lenslab.sae.controls import evaluate_null, untrained_sae
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.find import small_sae
from lenslab.sae.inputs import SAEMismatch, sae_key
from lenslab.sae.load import load_sae
from lenslab.show.feature_plots import firing_density
from lenslab.texts import sampled_text
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
    assert close(m.variance_explained, 1) and close(m.cosine, 1) and close(m.l2_ratio, 1)
    assert close(m.ce_difference, 0) and close(m.kl, 0) and close(m.l0, 32)
    assert (m.n_tokens, m.d_sae, m.hook) == (batch.n_real, 64, HOOK)


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


def test_neither_batch_size_nor_padding_changes_a_metric(bold, batch, monkeypatch):
    sae = tiny_sae(bold, architecture="topk")
    whole = evaluate_sae(bold, sae, batch)
    monkeypatch.setattr(evaluate, "TEXTS", 1)
    for other in (batch, tokenize(bold, TEXTS, pad_side="left")):
        cut = evaluate_sae(bold, sae, other)
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
        logits = bold(batch.tokens, **attention)
        clean = next_token_nats(logits, batch.tokens, batch.real).mean().item()
        with splice(bold, sae, error_term=False, mask=batch.real):
            logits = bold(batch.tokens, **attention)
            spliced = next_token_nats(logits, batch.tokens, batch.real).mean().item()
    assert (
        close(m.ce_clean, clean)
        and close(m.ce_spliced, spliced)
        and close(m.ce_difference, spliced - clean)
    )


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
    assert close(m.l0, float((f != 0).sum(1).double().mean()))
    assert close(m.cosine, float(torch.cosine_similarity(x, y).mean()))
    assert close(m.l2_ratio, float((y.norm(dim=1) / x.norm(dim=1)).mean()), 1e-4)
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
    null = untrained_sae(sae, x, 6, seed=1)
    assert null.encode(x).shape == (len(x), 48) and int((null.encode(x) != 0).sum(1).max()) <= 6
    assert torch.equal(null.directions, untrained_sae(sae, x, 6, seed=1).directions)
    best = float((null.decode(null.encode(x)) - x).square().sum())
    for factor in (0.9, 1.1):
        other = untrained_sae(sae, x, 6, seed=1)
        other.scale *= factor
        assert float((other.decode(other.encode(x)) - x).square().sum()) > best
    m = evaluate_null(bold, sae, batch, 6.3)
    assert 0 < m.l0 <= 6 and m.variance_explained > 0 and m.sae.startswith("random")


def test_a_trained_sae_beats_its_random_null_on_trained_weights(shared, tmp_path, monkeypatch):
    model = load_model(shared / "fixtures" / "tinystories-656k")
    stories = json.loads(
        (shared / "fixtures" / "tinystories" / "tinystories_1000.json").read_text()
    )
    texts = [story if isinstance(story, str) else story["text"] for story in stories]
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path))
    sae = small_sae(model, "blocks.0.hook_resid_post", pack(model, texts[:60], length=128), 60)
    held_out = pack(model, texts[900:906], length=128)
    m = evaluate_sae(model, sae, held_out)
    null = evaluate_null(model, sae, held_out, m.l0)
    assert m.variance_explained > null.variance_explained + 0.1
    assert m.ce_difference < null.ce_difference
    assert m.ce_clean < m.ce_spliced < m.ce_zero and m.ce_recovered_zero > null.ce_recovered_zero


def test_a_transcoder_is_not_measured_against_its_own_input(bold, batch):
    with pytest.raises(ValueError, match="transcoder"):
        evaluate_sae(bold, tiny_sae(bold, hook_name_out="blocks.1.hook_mlp_out"), batch)


@pytest.mark.parametrize("hook", [HOOK, "blocks.2.hook_resid_post"])
def test_a_forgotten_hook_is_not_measured_as_the_saes(bold, batch, hook):
    bold.add_hook(hook, lambda value, hook: value * 0)
    try:
        with pytest.raises(ValueError, match="reset_hooks"):
            evaluate_sae(bold, tiny_sae(bold), batch)
    finally:
        bold.reset_hooks()
    assert evaluate_sae(bold, tiny_sae(bold), batch).n_tokens == batch.n_real


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
    whole = evaluate_sae(bold, sae, batch)
    monkeypatch.setattr(evaluate, "CELLS", cells)
    pieces = evaluate_sae(bold, sae, batch)
    assert without_tensors(pieces) == pytest.approx(without_tensors(whole), rel=1e-4, abs=1e-5)


def test_what_does_not_fit_is_refused_before_the_run(bold, batch, monkeypatch):
    monkeypatch.setattr("lenslab.capture.free_memory", lambda: 1000)
    monkeypatch.setattr(evaluate, "forward", lambda *given: 1 / 0)
    with pytest.raises(TooLargeForMemory, match="free"):
        evaluate_sae(bold, tiny_sae(bold), batch)


def test_a_text_of_one_token_counts_among_others_and_alone_is_refused(bold, batch, monkeypatch):
    """Without BOS it predicts nothing: whichever texts share its pass."""
    rows = (batch.tokens[:, 1:].clone(), batch.real[:, 1:].clone(), batch.attention[:, 1:].clone())
    rows[1][0, 1:] = rows[2][0, 1:] = False
    short = TokenBatch(*rows, batch.texts)
    whole = evaluate_sae(bold, tiny_sae(bold), short)
    monkeypatch.setattr(evaluate, "TEXTS", 1)
    single = evaluate_sae(bold, tiny_sae(bold), short)
    assert without_tensors(single) == pytest.approx(without_tensors(whole), rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluate_sae(bold, tiny_sae(bold), short[:1])


# Oracles: what each metric says of an SAE or of logits that were planted


def rescaled(bold, factor):
    """A perfect SAE whose output is multiplied."""
    sae = known_sae(bold, "perfect")
    sae.W_dec.mul_(factor)
    return sae


@pytest.mark.parametrize("factor", [0.5, 0.9, 2.0])
def test_an_sae_that_halves_everything_has_a_shrinkage_of_a_half(bold, batch, factor):
    m, x = evaluate_sae(bold, rescaled(bold, factor), batch), values(bold, batch).double()
    assert close(m.relative_bias, factor) and close(m.l2_ratio, factor) and close(m.cosine, 1)
    spread = float((x - x.mean(0)).square().sum())
    assert close(m.fvu, (1 - factor) ** 2 * float(x.square().sum()) / spread)


def test_a_projection_is_short_but_not_shrunk_and_where_nothing_is_said_there_is_no_factor(
    bold, batch
):
    """A factor of 1: no other length would come nearer, although half of x is missing."""
    sae = known_sae(bold, "perfect")
    sae.W_dec[:, 16:] = 0
    m = evaluate_sae(bold, sae, batch)
    assert close(m.relative_bias, 1) and m.l2_ratio < 0.9
    assert evaluate_sae(bold, known_sae(bold, "zero"), batch).relative_bias is None
    assert evaluate_sae(bold, rescaled(bold, -1.0), batch).relative_bias is None
    mean = evaluate_sae(bold, known_sae(bold, "mean", values(bold, batch).mean(0)), batch)
    assert close(mean.relative_bias, 1)


def test_firing_rates_are_those_that_were_planted_and_can_be_drawn_without_another_pass(
    bold, batch, monkeypatch
):
    x = values(bold, batch)
    levels = x[:, 0].sort().values
    sae, n = known_sae(bold, "zero"), len(x)
    sae.W_enc[0, 2:] = 1
    sae.b_enc[0], sae.b_enc[1] = -1, 1  # never, always
    counts = [1, 2, n // 2, n - 1]
    for latent, count in enumerate(counts, start=2):  # above the middle between two neighbours
        sae.b_enc[latent] = -(levels[n - count - 1] + levels[n - count]) / 2
    sae.b_enc[6:] = -1e6
    expected = torch.tensor([0, n, *counts, *[0] * 58]).double() / n
    for step in (16, 1):
        monkeypatch.setattr(evaluate, "TEXTS", step)
        m = evaluate_sae(bold, sae, batch)
        assert torch.equal(m.firing_rate, expected)
        assert (m.dead, m.dense) == (59, int((expected > 0.1).sum()))
        assert close(m.l0, float(expected.sum()))
    monkeypatch.setattr(evaluate, "forward", lambda *given: 1 / 0)
    figure = firing_density({"SAE": m.firing_rate})
    assert "59 of 64 never" in figure.data[0].name and sum(figure.data[0].y) == 5


def test_firing_rates_are_not_in_tables_and_cards(bold, batch, tmp_path):
    m = evaluate_sae(bold, tiny_sae(bold), batch)
    m.save(tmp_path / "metrics.json")
    values = json.loads((tmp_path / "metrics.json").read_text())["values"]
    assert "firing_rate" not in {*values, *m.to_dict(), *m.to_frame().columns}
    assert "firing_rate" not in repr(m) and m == dataclasses.replace(m)
    assert values["relative_bias"] == m.relative_bias


def test_losses_and_divergence_are_those_of_logits_that_were_planted(bold, batch, monkeypatch):
    """The right token has probability 1/2 in the clean run, 1/4 in the spliced one, 1/8 with the
    mean and 1/16 with zero; all others share the rest evenly."""
    x, real = values(bold, batch), batch.real
    others = bold.cfg.d_vocab - 1

    def planted(model, hook, part, replace=None):
        value = torch.zeros(*part.tokens.shape, 32)
        value[part.real] = x[: int(part.real.sum())]
        new = value if replace is None else replace(value)
        kinds = {1 / 2: value, 1 / 4: value / 2, 1 / 16: value * 0}
        share = next((p for p, kind in kinds.items() if torch.allclose(new, kind)), 1 / 8)
        p = torch.full((*part.tokens.shape, others + 1), (1 - share) / others, dtype=torch.float64)
        p[:, :-1].scatter_(-1, part.tokens[:, 1:, None], share)
        p[~part.attention] = float("nan")  # what stands at padding never counts
        return p.log(), value

    monkeypatch.setattr(evaluate, "forward", planted)
    m = evaluate_sae(bold, rescaled(bold, 0.5), batch)
    ln2 = math.log(2)
    assert close(m.ce_clean, ln2, 1e-6) and close(m.ce_spliced, 2 * ln2, 1e-6)
    assert close(m.ce_mean, 3 * ln2, 1e-6) and close(m.ce_zero, 4 * ln2, 1e-6)
    assert close(m.ce_difference, ln2, 1e-6) and m.n_tokens == int(real.sum())
    assert close(m.ce_recovered_zero, 2 / 3, 1e-6) and close(m.ce_recovered_mean, 1 / 2, 1e-6)
    assert close(m.kl, 0.5 * math.log(2) + 0.5 * math.log((1 / 2) / (3 / 4)), 1e-12)


# SAELens's own evaluation


@pytest.fixture(scope="module")
def both():
    """`evaluate_sae` and SAELens's `run_evals` of a bundled SAE on the same 16 windows, in two
    batches, and what both are made of."""
    from datasets import Dataset
    from sae_lens import evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    model, sae = load_model("pocket-gpt"), load_sae("pocket-gpt-resid-3", device="cpu")
    batch = pack(model, sampled_text(60), length=48)
    batch = batch[batch.attention.all(1).nonzero().flatten().tolist()][:16]
    dataset = Dataset.from_dict({"tokens": batch.tokens.tolist()})
    store = ActivationsStore.from_sae(
        model, sae, dataset, None, 48, False, 8, n_batches_in_buffer=4, total_tokens=768
    )
    config = evals.get_eval_everything_config(8, 2, 2)
    groups, by_latent = evals.run_evals(sae, store, model, ActivationScaler(), config)
    theirs = {name: value for group in groups.values() for name, value in group.items()}
    store.reset_input_dataset()
    read = [store.get_batch_tokens(8) for _ in range(2)]
    assert torch.equal(torch.cat(read), batch.tokens)  # else nothing below compares anything
    hook = sae.cfg.metadata.hook_name
    x = harvest(model, batch, hook, compute="float32", progress=False)[hook]
    return model, sae, batch, evaluate_sae(model, sae, batch), theirs, by_latent, x


def test_where_saelens_means_the_same_it_says_the_same(both):
    """Reconstruction and sparsity: both leave special tokens out."""
    _, _, batch, ours, theirs, by_latent, x = both
    assert not batch.real.all(1).any() and batch.n_real < batch.tokens.numel() - len(batch)
    assert close(ours.variance_explained, theirs["explained_variance"])
    assert close(ours.l0, theirs["l0"]) and close(ours.cosine, theirs["cossim"])
    assert close(ours.l2_ratio, theirs["l2_ratio"])
    spread = x[batch.real].double().var(0, correction=0).sum()
    assert close(ours.fvu * float(spread), theirs["mse"])
    density = torch.tensor(by_latent["feature_density"]).double()
    torch.testing.assert_close(ours.firing_rate, density, rtol=1e-6, atol=1e-8)


def test_what_saelens_averages_over_batches_or_tokens_differs_by_that_alone(both):
    _, sae, batch, ours, theirs, _, x = both
    bias, explained = [], []
    for rows in (slice(0, 8), slice(8, 16)):
        value = x[rows][batch.real[rows]].double()  # [token, d_in]
        x_hat = sae.decode(sae.encode(value.float())).double()
        bias.append(float(x_hat.square().sum() / (value * x_hat).sum()))
        distance = (value - value.mean(0)).square().sum(1)
        explained.append(1 - (value - x_hat).square().sum(1) / distance)
    assert close(sum(bias) / 2, theirs["relative_reconstruction_bias"])
    assert bias[0] != bias[1] and min(bias) < ours.relative_bias < max(bias)  # of all tokens
    legacy = float(torch.cat(explained).mean())
    assert close(legacy, theirs["explained_variance_legacy"], 1e-4)
    assert abs(legacy - ours.variance_explained) > 1e-3  # a mean of ratios is no ratio of means


def test_losses_differ_by_which_positions_count_and_by_what_is_ablated_alone(both):
    """Ours are of positions whose *target* is a real token, the first one after BOS among them.
    SAELens's are of positions whose own token is real, whatever is to be predicted, for KL the last
    one too; its ablation takes BOS and separators along."""
    model, sae, batch, ours, theirs, _, _ = both
    hook, tokens, real = sae.cfg.metadata.hook_name, batch.tokens, batch.real
    zero = [(hook, lambda value, hook: value * 0)]
    with torch.inference_mode():
        clean = model(tokens).double().log_softmax(-1)  # [text, pos, vocabulary]
        with splice(model, sae, error_term=False, mask=real):
            spliced = model(tokens).double().log_softmax(-1)
        ablated = model.run_with_hooks(tokens, fwd_hooks=zero).double().log_softmax(-1)
    kl = (clean.exp() * (clean - spliced)).sum(-1)  # [text, pos]

    def nats(log_p):
        return -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]

    of_target, of_own = real[:, 1:], real[:, :-1]
    assert close(ours.ce_clean, float(nats(clean)[of_target].mean()))
    assert close(ours.ce_spliced, float(nats(spliced)[of_target].mean()))
    assert close(ours.kl, float(kl[:, :-1][of_target].mean()))
    assert close(theirs["ce_loss_without_sae"], float(nats(clean)[of_own].mean()), 1e-4)
    assert close(theirs["ce_loss_with_sae"], float(nats(spliced)[of_own].mean()), 1e-4)
    assert close(theirs["ce_loss_with_ablation"], float(nats(ablated)[of_own].mean()), 1e-4)
    assert close(theirs["kl_div_with_sae"], float(kl[real].mean()), 1e-4)
    for name, value in (("ce_loss_without_sae", ours.ce_clean), ("kl_div_with_sae", ours.kl)):
        assert abs(theirs[name] - value) > 1e-3  # else nothing is explained here
    assert abs(theirs["ce_loss_with_ablation"] - ours.ce_zero) > 1
