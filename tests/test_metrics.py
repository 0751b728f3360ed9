"""The metrics keep their definitions, obey `real`, and refuse what would be silently wrong."""

import itertools
import math

import jaxtyping
import numpy as np
import pytest
import sklearn.metrics
import torch

from lenslab import metrics
from lenslab.metrics import FeatureActivity, Moments, ReconstructionError
from lenslab.runtime import derive_generator


def normal(*shape, label="x", dtype=torch.float32):
    return torch.randn(*shape, generator=derive_generator(0, label)).to(dtype)


def reconstruction(name):
    """A measure of `ReconstructionError`, of data given at once."""
    return lambda x, x_hat, real=None: getattr(ReconstructionError().update(x, x_hat, real), name)


def cross_entropy(logits, tokens, real):
    """Mean of the losses: every real target weighs the same, whichever text it is in."""
    return float(metrics.in_float64(metrics.next_token_nats(logits, tokens, real)).mean())


def activity(name):
    """A measure of `FeatureActivity`, of data given at once."""
    return lambda features, real=None: getattr(FeatureActivity().update(features, real), name)


variance_explained = reconstruction("variance_explained")
fvu = reconstruction("fvu")
mse, l2_ratio = reconstruction("mse"), reconstruction("l2_ratio")
cosine_similarity = reconstruction("cosine_similarity")
l0, firing_rate = activity("l0"), activity("firing_rate")
RECONSTRUCTION = {
    "variance_explained": variance_explained,
    "fvu": fvu,
    "mse": mse,
    "cosine_similarity": cosine_similarity,
    "l2_ratio": l2_ratio,
}
FEATURES = {"l0": l0, "firing_rate": firing_rate}


@pytest.fixture
def unchecked():
    """What a user meets, who does not run with the shape checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def residual():
    """A residual stream as models have it: a large shared mean, unequal dimensions, a few tokens of
    huge norm."""
    x = 3 + normal(600, 12) * torch.linspace(0.2, 3, 12)
    x[::60] *= 6
    x_hat = 0.4 + 0.8 * x + normal(600, 12, label="error") * 1.2
    return x, x_hat


# Moments


@pytest.mark.parametrize("cuts", [[600], [1, 599], [7] * 85 + [5], [200, 300, 100]])
def test_moments_do_not_depend_on_how_the_data_is_split(cuts):
    x = 1000 + normal(600, 5, dtype=torch.float64)
    whole = Moments().update(x)
    pieces = Moments()
    for part in x.split(cuts):
        pieces.update(part)
    assert pieces.count == 600
    torch.testing.assert_close(pieces.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(pieces.variance, whole.variance, rtol=1e-12, atol=0)


def test_moments_of_more_tokens_than_one_block_equal_those_of_numpy(monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 64)
    x = normal(1000, 3) + 50
    moments = Moments().update(x)
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, x.double().numpy().var(0), rtol=1e-12)


def test_merging_is_the_same_in_either_order_and_with_nothing():
    a, b = normal(10, 4, label="a"), normal(90, 4, label="b") + 5
    one, other = (
        Moments().update(a).merge(Moments().update(b)),
        Moments().update(b).merge(Moments().update(a)),
    )
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.variance, other.variance, rtol=1e-12, atol=1e-12)
    alone = Moments().update(a)
    torch.testing.assert_close(
        Moments().merge(alone).merge(Moments()).variance, alone.variance, rtol=0, atol=0
    )


def test_merging_leaves_the_other_untouched():
    first = Moments().update(normal(10, 4))
    copy = Moments().merge(first)
    before = first.mean.clone()
    copy.update(normal(10, 4, label="more") + 9)
    assert first.count == 10 and torch.equal(first.mean, before)


def test_moments_survive_a_mean_that_would_swallow_float32():
    x = 1e6 + normal(500, 2, dtype=torch.float64)
    assert Moments().update(x).variance.sum() == pytest.approx(x.numpy().var(0).sum(), rel=1e-9)


# Variance explained


def test_perfect_reconstruction_scores_one_and_the_mean_scores_zero(residual):
    x, _ = residual
    assert variance_explained(x, x) == 1
    x = x.double()
    assert variance_explained(x, x.mean(0).expand_as(x)) == pytest.approx(0, abs=1e-12)
    assert variance_explained(x, 2 * x.mean(0) - x) == pytest.approx(
        -3
    )  # twice the deviation: worse than the mean


def test_variance_explained_equals_its_definition(residual):
    x, x_hat = (t.double().numpy() for t in residual)
    expected = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert variance_explained(*residual) == pytest.approx(expected, rel=1e-12)
    assert fvu(*residual) == pytest.approx(1 - expected, rel=1e-12)


def test_variance_explained_ignores_a_shift_a_scale_and_a_rotation(residual):
    x, x_hat = (t.double() for t in residual)
    expected = variance_explained(x, x_hat)
    rotation = torch.linalg.qr(normal(12, 12, label="q", dtype=torch.float64)).Q
    assert variance_explained(x + 7, x_hat + 7) == pytest.approx(expected, rel=1e-10)
    assert variance_explained(5 * x, 5 * x_hat) == pytest.approx(expected, rel=1e-10)
    assert variance_explained(x @ rotation, x_hat @ rotation) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("size", [1, 7, 599])
def test_splitting_the_batch_changes_no_metric(residual, size):
    x, x_hat = residual
    whole, pieces = ReconstructionError().update(x, x_hat), ReconstructionError()
    for part, part_hat in zip(x.split(size), x_hat.split(size), strict=True):
        pieces.update(part, part_hat)
    for name in ("variance_explained", "fvu", "mse", "cosine_similarity", "l2_ratio"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-12), name


def seven_public_formulas(x, x_hat, batch=50):
    """Variance explained as public code computes it, on the same tokens. Where each was seen:

    1 SAELens 6.54 `evals.ExplainedVarianceCalculator` (called, not rewritten) 2 SAELens 6.54
    `evals.py`, `explained_variance_legacy`: mean of per-token ratios, centred on each batch's mean
    3 scikit-learn's `r2_score`, uniform average over dimensions (called) 4 mean of per-token
    ratios, centred on the mean of all tokens: seen in public code 5 one minus
    openai/sparse_autoencoder's `normalized_mean_squared_error`: per-token ratios to ||x||^2, not
    centred 6 one minus FVU per batch, averaged: what a log of EleutherAI/sparsify's
    `ForwardOutput.fvu` averages to 7 saprmarks/dictionary_learning `evaluation.py`: 1 - var(x -
    x_hat) / var(x), blind to a constant error
    """
    from sae_lens.evals import ExplainedVarianceCalculator

    error = (x - x_hat).square().sum(1)
    saelens = ExplainedVarianceCalculator()
    legacy, batches = [], []
    for part, part_hat, part_error in zip(
        x.split(batch), x_hat.split(batch), error.split(batch), strict=True
    ):
        saelens.add_batch(sae_output=part_hat, hidden_acts=part)
        centred = (part - part.mean(0)).square().sum(1)
        legacy.append(1 - part_error / centred)
        batches.append(1 - part_error.sum() / centred.sum())
    return {
        "1 SAELens": saelens.compute(),
        "2 SAELens legacy": float(torch.cat(legacy).mean()),
        "3 scikit-learn r2": float(
            sklearn.metrics.r2_score(x, x_hat, multioutput="uniform_average")
        ),
        "4 per-token ratios": float((1 - error / (x - x.mean(0)).square().sum(1)).mean()),
        "5 about zero": float((1 - error / x.square().sum(1)).mean()),
        "6 mean over batches": float(torch.stack(batches).mean()),
        "7 residual variance": float(1 - (x - x_hat).var(0).sum() / x.var(0).sum()),
    }


def test_seven_public_formulas_disagree_and_ours_is_the_definition(residual, record_property):
    x, x_hat = (t.double() for t in residual)
    scores = seven_public_formulas(x, x_hat)
    ours = variance_explained(x, x_hat)
    definition = float(1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert ours == pytest.approx(definition, rel=1e-12)
    assert ours == pytest.approx(
        scores.pop("1 SAELens"), rel=1e-9
    )  # the one that agrees; it was mended in SAELens 6
    away = {name: score - ours for name, score in scores.items()}
    print(
        f"definition {ours:.3f}; "
        + "; ".join(f"{name} {score:.3f} ({away[name]:+.3f})" for name, score in scores.items())
    )
    for name, difference in away.items():
        record_property(name, difference)
        assert abs(difference) > 0.005, f"{name} agrees with the definition here: it tells nothing"
    values = sorted(scores.values())
    assert (
        values[-1] - values[0] > 0.25
    )  # one reconstruction, and papers would report very different numbers
    # no two of them are the same formula
    assert all(b - a > 1e-4 for a, b in itertools.pairwise(values))


def test_a_constant_error_costs_what_it_should_and_residual_variance_misses_it(residual):
    x, _ = (t.double() for t in residual)
    shifted = x + x.std()
    assert seven_public_formulas(x, shifted)["7 residual variance"] == pytest.approx(1)
    assert variance_explained(x, shifted) < 0.95


def test_saelens_agrees_on_real_float32_input(residual):
    from sae_lens.evals import ExplainedVarianceCalculator

    theirs = ExplainedVarianceCalculator()
    theirs.add_batch(sae_output=residual[1], hidden_acts=residual[0])
    assert variance_explained(*residual) == pytest.approx(theirs.compute(), rel=1e-5)


def test_other_reconstruction_metrics_equal_their_definitions(residual):
    x, x_hat = (t.double() for t in residual)
    assert mse(x, x_hat) == pytest.approx(float((x - x_hat).square().sum(1).mean()), rel=1e-12)
    cosine = torch.nn.functional.cosine_similarity(x, x_hat, dim=1).mean()
    assert cosine_similarity(x, x_hat) == pytest.approx(float(cosine), rel=1e-12)
    assert l2_ratio(x, x_hat) == pytest.approx(
        float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-12
    )


def test_direction_ignores_scale_and_length_measures_it():
    x = normal(50, 6)
    assert cosine_similarity(x, 0.3 * x) == pytest.approx(1)
    assert cosine_similarity(x, -x) == pytest.approx(-1)
    assert l2_ratio(x, 0.3 * x) == pytest.approx(0.3)


def test_zero_vectors_are_not_divided_by():
    x = normal(50, 6)
    with_zero = torch.cat([x, torch.zeros(1, 6)])
    assert l2_ratio(with_zero, 2 * with_zero) == pytest.approx(2)
    assert cosine_similarity(x, torch.zeros_like(x)) == 0
    with pytest.raises(ZeroDivisionError):
        l2_ratio(torch.zeros(4, 6), x[:4])


# Masked tokens must not count: in every metric that is over tokens


def real_mask():
    """BOS, then right padding of one text and left padding of another; one BOS between packed
    documents."""
    real = torch.ones(4, 9, dtype=torch.bool)
    real[:, 0] = False
    real[1, 6:] = False
    real[2, :4] = False
    real[3, 5] = False
    return real


@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
@pytest.mark.parametrize("metric", RECONSTRUCTION.values(), ids=RECONSTRUCTION)
def test_reconstruction_metrics_ignore_masked_tokens(metric, garbage):
    real, x, noise = real_mask(), normal(4, 9, 5), normal(4, 9, 5, label="noise")
    x_hat = x + noise
    expected = metric(x[real], x_hat[real])
    x[~real], x_hat[~real] = garbage, 1.5
    assert metric(x, x_hat, real) == expected
    if math.isfinite(garbage):
        assert metric(x, x_hat) != pytest.approx(
            expected, rel=1e-3
        )  # the mask is what keeps them out


@pytest.mark.parametrize("metric", FEATURES.values(), ids=FEATURES)
def test_feature_metrics_ignore_masked_tokens(metric):
    real, features = real_mask(), normal(4, 9, 5).relu()
    expected = metric(features[real])
    features[~real] = 1e4
    np.testing.assert_array_equal(metric(features, real), expected)
    assert not np.allclose(metric(features), expected, rtol=1e-3)
    features[~real] = float("nan")
    np.testing.assert_array_equal(metric(features, real), expected)


def test_moments_ignore_masked_tokens():
    real, x = real_mask(), normal(4, 9, 5)
    x[~real] = float("nan")
    assert torch.equal(Moments().update(x, real).variance, Moments().update(x[real]).variance)


@pytest.mark.parametrize("garbage", [50.0, float("nan")])
def test_losses_count_exactly_the_real_targets(garbage):
    real, logits, other = real_mask(), normal(4, 9, 11), normal(4, 9, 11, label="other")
    tokens = torch.randint(11, (4, 9), generator=derive_generator(0, "tokens"))
    nats, kl = [], []
    for text in range(4):
        for pos in range(1, 9):
            if real[text, pos]:  # the target, predicted one position earlier
                p, q = (
                    logits[text, pos - 1].double().log_softmax(-1),
                    other[text, pos - 1].double().log_softmax(-1),
                )
                nats.append(-float(p[tokens[text, pos]]))
                kl.append(float((p.exp() * (p - q)).sum()))
    spoiled = torch.zeros(4, 9, dtype=torch.bool)
    spoiled[:, :-1] = ~real[:, 1:]  # positions that predict no real token
    spoiled[:, -1] = True
    logits[spoiled], other[spoiled], tokens[~real] = garbage, -garbage, 3
    assert metrics.next_token_nats(logits, tokens, real).tolist() == pytest.approx(nats, rel=1e-5)
    assert cross_entropy(logits, tokens, real) == pytest.approx(np.mean(nats), rel=1e-6)
    assert metrics.kl_divergence(logits, other, real) == pytest.approx(np.mean(kl), rel=1e-5)


def test_masked_targets_would_change_the_losses():
    real, logits, other = real_mask(), normal(4, 9, 11), normal(4, 9, 11, label="other")
    tokens = torch.randint(11, (4, 9), generator=derive_generator(0, "tokens"))
    logits[:, :-1][~real[:, 1:]] *= 20  # confident nonsense where no real token follows
    everything = torch.ones_like(real)
    assert cross_entropy(logits, tokens, everything) != pytest.approx(
        cross_entropy(logits, tokens, real), rel=1e-3
    )
    assert metrics.kl_divergence(logits, other, everything) != pytest.approx(
        metrics.kl_divergence(logits, other, real), rel=1e-3
    )


def test_the_first_token_after_bos_is_scored_and_the_last_position_predicts_nothing():
    logits, tokens = normal(1, 3, 5), torch.tensor([[0, 1, 2]])
    real = torch.tensor([[False, True, True]])
    assert len(metrics.next_token_nats(logits, tokens, real)) == 2
    changed = logits.clone()
    changed[:, -1] = 99
    assert cross_entropy(changed, tokens, real) == cross_entropy(logits, tokens, real)


# Predictions


def test_cross_entropy_of_a_uniform_model_is_log_vocabulary():
    tokens, real = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
    assert cross_entropy(torch.zeros(2, 4, 17), tokens, real) == pytest.approx(
        math.log(17), rel=1e-6
    )


def test_cross_entropy_weighs_tokens_alike_not_texts():
    real = torch.tensor([[False, True, True, True], [False, True, False, False]])
    logits, tokens = normal(2, 4, 6), torch.zeros(2, 4, dtype=torch.long)
    per_text = [
        metrics.next_token_nats(logits[i : i + 1], tokens[i : i + 1], real[i : i + 1])
        for i in range(2)
    ]
    assert [len(nats) for nats in per_text] == [3, 1]
    assert cross_entropy(logits, tokens, real) == pytest.approx(
        float(torch.cat(per_text).mean()), rel=1e-6
    )


def test_cross_entropy_is_the_loss_of_hugging_face():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    ).eval()
    tokens = torch.randint(40, (3, 12), generator=derive_generator(0, "hf"))
    with torch.no_grad():
        out = model(tokens, labels=tokens)
    every = torch.ones_like(tokens, dtype=torch.bool)
    assert cross_entropy(out.logits, tokens, every) == pytest.approx(float(out.loss), rel=1e-5)


def test_kl_is_zero_for_equal_runs_positive_otherwise_and_not_symmetric():
    a, b = normal(2, 5, 9), 3 * normal(2, 5, 9, label="b")
    real = torch.ones(2, 5, dtype=torch.bool)
    assert metrics.kl_divergence(a, a, real) == 0
    # a constant on all logits says nothing
    assert metrics.kl_divergence(a, a + 4, real) == pytest.approx(0, abs=1e-6)
    forth, back = metrics.kl_divergence(a, b, real), metrics.kl_divergence(b, a, real)
    assert forth > 0 and forth != pytest.approx(back, rel=1e-2)


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_divergences_are_not_lost_in_rounding(size, dtype, monkeypatch):
    """Noise of this variance on the logits costs half of it in nats, however small it is."""
    monkeypatch.setattr(metrics, "LOGITS", 7000)  # two targets at a time
    clean = normal(2, 6, 3000, label="clean")
    other = clean + size**0.5 * normal(2, 6, 3000, label="noise")
    clean, other = clean.to(dtype), other.to(dtype)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[:, 0] = real[1, 4] = False
    exact = [x.double().numpy().astype(np.longdouble) for x in (clean, other)]
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in exact)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    expected = (p * np.log(p / q)).sum(-1)[:, :-1][real[:, 1:].numpy()].mean()
    found = metrics.kl_divergence(clean, other, real)
    assert found == pytest.approx(float(expected), rel=1e-5, abs=1e-18) and found >= 0
    if dtype == torch.float32:
        assert found == pytest.approx(size / 2, rel=0.2)


def test_kl_is_never_negative():
    real = torch.ones(2, 5, dtype=torch.bool)
    for seed in range(20):
        a = normal(2, 5, 300, label=f"logits {seed}")
        for shift in (0, 1, 4, 1e-3):
            assert metrics.kl_divergence(a, a + shift, real) >= 0


class OnAppleGPU(torch.Tensor):
    """A tensor that, as those on MPS, cannot be turned to float64 before it is on the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("mps")
        if function is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, cls) and result.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return result


def test_nothing_is_in_float64_on_a_device_that_has_none(residual):
    def measures(put):
        x, x_hat, logits = put(residual[0]), put(residual[1]), put(normal(4, 9, 11))
        real = real_mask()
        tokens = torch.arange(36).reshape(4, 9) % 11
        return [
            *(measure(x, x_hat) for measure in RECONSTRUCTION.values()),
            *(float(torch.as_tensor(measure(x.relu())).sum()) for measure in FEATURES.values()),
            cross_entropy(logits, put(tokens), put(real)),
            metrics.kl_divergence(logits, 2 * logits, put(real)),
        ]

    with pytest.raises(TypeError, match="float64"):
        normal(3).as_subclass(OnAppleGPU).double()
    assert measures(lambda x: x.as_subclass(OnAppleGPU)) == pytest.approx(measures(lambda x: x))


def test_recovered_fraction_runs_from_ablated_to_clean():
    assert metrics.recovered_fraction(2.0, 2.0, 6.0) == 1
    assert metrics.recovered_fraction(2.0, 6.0, 6.0) == 0
    assert metrics.recovered_fraction(2.0, 3.0, 6.0) == 0.75
    assert metrics.recovered_fraction(2.0, 7.0, 6.0) < 0
    assert metrics.recovered_fraction(2.0, 2.1, 1.9) is None


# Latents


def test_l0_counts_what_is_not_zero_even_when_negative():
    features = torch.tensor([[0.0, -1.0, 2.0], [0.0, 0.0, 3.0]])
    assert l0(features) == 1.5
    assert firing_rate(features).tolist() == [0, 0.5, 1]


def test_activity_in_pieces_equals_activity_at_once_and_l0_is_the_sum_of_rates():
    features = normal(100, 8).relu()
    whole, pieces = FeatureActivity().update(features), FeatureActivity()
    for part in features.split(9):
        pieces.update(part)
    assert torch.equal(whole.counts, pieces.counts) and whole.tokens == pieces.tokens == 100
    assert pieces.l0 == pytest.approx(float((features != 0).double().sum(1).mean()), rel=1e-12)
    assert float(whole.firing_rate.sum()) == pytest.approx(whole.l0, rel=1e-12)


def test_dead_is_never_and_dense_is_more_than_a_tenth():
    features = torch.zeros(100, 4)
    features[0, 1], features[:10, 2], features[:11, 3] = 1, 1, 1
    activity = FeatureActivity().update(features)
    assert activity.dead.tolist() == [True, False, False, False]
    assert activity.dense.tolist() == [False, False, False, True]


# Ranks


def test_auroc_equals_scikit_learn_with_ties_for_every_feature():
    scores = normal(60, 20).mul(2).round().relu()  # mostly zeros, as pooled latents are
    labels = torch.arange(60) % 3 == 0
    expected = [sklearn.metrics.roc_auc_score(labels, scores[:, f]) for f in range(20)]
    np.testing.assert_allclose(metrics.auroc(scores, labels), expected, rtol=1e-12)


def test_auroc_is_a_half_for_a_constant_one_for_a_perfect_feature_and_mirrors():
    labels = np.array([True, False, True, False])
    scores = np.stack([np.zeros(4), labels, -1.0 * labels], axis=1)
    assert metrics.auroc(scores, labels).tolist() == [0.5, 1.0, 0.0]
    assert metrics.auroc(scores[:, 1], labels) == 1  # one feature needs no axis
    noisy, half = normal(30, 4), torch.arange(30) < 10
    np.testing.assert_allclose(metrics.auroc(noisy, half), 1 - metrics.auroc(noisy, ~half))
    np.testing.assert_array_equal(  # ranks only
        metrics.auroc(noisy.exp(), half), metrics.auroc(noisy, half)
    )


def test_auroc_refuses_one_class_and_nan():
    with pytest.raises(ValueError, match="both classes"):
        metrics.auroc(torch.zeros(3, 1), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="nan"):
        metrics.auroc(torch.tensor([[float("nan")], [1.0]]), torch.tensor([True, False]))


# Refusals


@pytest.mark.parametrize("metric", RECONSTRUCTION.values(), ids=RECONSTRUCTION)
def test_reconstruction_metrics_refuse_nan_nothing_and_no_real_token(metric):
    x = normal(2, 4, 3)
    for bad in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[1, 2, 0] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            metric(spoiled, x)
        with pytest.raises(ValueError, match="NaN or Inf"):
            metric(x, spoiled)
    with pytest.raises(ValueError, match="no real token"):
        metric(x, x, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no real token"):
        metric(x[:0], x[:0])


def test_a_constant_has_no_variance_to_explain():
    constant = torch.full((100, 3), 0.1)
    with pytest.raises(ValueError, match="no variance"):
        variance_explained(constant, constant)
    assert mse(constant, constant) == 0


def test_empty_accumulators_give_no_number():
    for read in (
        lambda: Moments().variance,
        lambda: ReconstructionError().mse,
        lambda: FeatureActivity().firing_rate,
        lambda: FeatureActivity().dead,
        lambda: FeatureActivity().dense,
    ):
        with pytest.raises((TypeError, AttributeError, ZeroDivisionError)):
            read()


def test_accumulators_refuse_another_width_and_keep_what_they_had():
    error = ReconstructionError().update(normal(9, 3), normal(9, 3, label="hat"))
    before = error.fvu
    with pytest.raises(RuntimeError, match="size"):
        error.update(normal(9, 4), normal(9, 4))
    assert error.fvu == before and error.moments.count == 9
    fired = FeatureActivity().update(normal(9, 3))
    with pytest.raises(RuntimeError, match="size"):
        fired.update(normal(9, 4))
    assert fired.tokens == 9 and len(fired.counts) == 3


def test_shapes_that_differ_are_refused(unchecked):
    x, real = normal(2, 4, 3), torch.ones(2, 5, dtype=torch.bool)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    for call in (
        lambda: mse(x, x[:, :3]),
        lambda: mse(x, x, real),
        lambda: l0(x, real),
        lambda: l0(x[0, 0]),
        lambda: cross_entropy(x, tokens, real),
        lambda: cross_entropy(x, tokens[:, :4], real),
        lambda: metrics.kl_divergence(x, x[:, :3], real),
        lambda: metrics.auroc(x[0], real[0]),
    ):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            call()


def test_shapes_in_annotations_are_checked_in_tests():
    with pytest.raises(TypeError):
        mse(normal(2, 4, 3), normal(2, 3, 3))


def test_losses_refuse_no_target_and_nan():
    logits, tokens = normal(1, 3, 5), torch.tensor([[0, 1, 2]])
    only_first = torch.tensor([[True, False, False]])
    with pytest.raises(ValueError, match="nothing to predict"):
        cross_entropy(logits, tokens, only_first)
    logits[0, 1, 0] = float("nan")
    real = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="NaN"):
        cross_entropy(logits, tokens, real)
    assert math.isnan(metrics.kl_divergence(logits, logits, real))


# Marks given otherwise than as booleans

MARKS = [torch.long, torch.uint8, torch.float32, torch.bool]


@pytest.mark.parametrize("dtype", MARKS)
def test_marks_of_any_kind_mask_and_never_select_rows(dtype):
    x, logits = normal(4, 5, 12).relu(), normal(4, 5, 9, label="logits")
    tokens = torch.arange(20).reshape(4, 5) % 9
    real = torch.ones(4, 5, dtype=torch.bool)
    real[:, 0], real[0, 3:] = False, False
    for use in (
        lambda r: l0(x, r),
        lambda r: fvu(x, x / 2, r),
        lambda r: float(Moments().update(x, r).variance.sum()),
        lambda r: cross_entropy(logits, tokens, r),
        lambda r: metrics.kl_divergence(logits, 2 * logits, r),
        lambda r: metrics.auroc(x[..., 0].flatten().numpy(), r.flatten()).item(),
    ):
        assert use(real.to(dtype)) == use(real)
    assert l0(x, real.numpy()) == l0(x, real)


@pytest.mark.parametrize(
    "marks",
    [
        [-1, 1, 1, -1],
        [0, 2, 2, 0],
        [0, 1, 1, math.nan],
        [False, True, None, True],
        ["True", "False", "True", "False"],
    ],
)
def test_marks_that_are_neither_true_nor_false_are_refused(marks):
    with pytest.raises(ValueError, match="mask"):
        metrics.auroc(np.arange(4.0), np.array(marks))


def test_a_mask_of_another_shape_is_refused(unchecked):
    x = normal(4, 5, 12)
    for real in (torch.ones(5, 4), torch.ones(4), torch.ones(20)):
        with pytest.raises(ValueError, match="A mask"):
            l0(x, real.bool())
