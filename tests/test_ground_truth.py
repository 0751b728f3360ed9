"""Recovery, absorption and probing where the answer is known."""

import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from test_specialists import noisy, table

from lenslab.files import REPOSITORY
from lenslab.texts import label_texts


@pytest.fixture(scope="module")
def scripts():
    """The benchmark files, which are scripts beside each other and no package."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    yield {name: import_module(name) for name in ("ground_truth", "sparse_probing", "real_probes")}
    sys.path.remove(str(REPOSITORY / "benchmarks"))


@pytest.fixture(scope="module")
def truth(scripts):
    return scripts["ground_truth"]


@pytest.fixture(scope="module")
def sizes(truth):
    return replace(truth.SMOKE, samples=1 << 11, batch=128)


class Linear:
    """The least that is measured: relu(x @ W_enc) and a decoder."""

    def __init__(self, encoder, decoder):
        self.W_enc, self.W_dec = encoder, decoder

    def eval(self):
        return self

    def encode(self, x):
        return torch.relu(x @ self.W_enc)

    def decode(self, latents):
        return latents @ self.W_dec


@pytest.fixture(scope="module")
def orthogonal(truth):
    """Features that do not overlap, without a bias: their latents can be read off exactly."""
    from sae_lens import synthetic

    def make(children, n=16):
        vectors = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))[0]
        features = synthetic.FeatureDictionary(n, n, bias=False, initializer=None)
        features.feature_vectors.data = vectors
        config = synthetic.SyntheticModelConfig(n, n, bias=False, std_firing_magnitudes=0.1)
        on = torch.full((n,), 0.3)

        def implied(strengths):
            for parent, those in children.items():
                strengths[:, those] *= (strengths[:, [parent]] > 0).to(strengths)
            return strengths

        generator = synthetic.ActivationGenerator(n, on, 0.1, 1.0, modify_activations=implied)
        model = synthetic.SyntheticModel(config, features, generator)
        return truth.Planted(model, torch.empty(0), 1.0, 4.8, 0, children)

    return make


def test_an_sae_that_is_the_planted_dictionary_recovers_all_of_it(truth, orthogonal):
    data = orthogonal({})
    vectors = data.model.feature_dict.feature_vectors
    # a small bias of the threshold keeps rounding from counting as active
    perfect = Linear(vectors.T, vectors)
    perfect.encode = lambda x: torch.relu(x @ vectors.T - 1e-3)
    found = truth.recovery(perfect, data, 4000)
    scores = ("mcc", "f1", "precision", "recall", "uniqueness")
    assert [found[name] for name in scores] == pytest.approx([1] * len(scores), abs=0.01)
    assert found["dead"] == 0 and found["variance_explained"] > 0.99


def test_random_directions_give_the_floor(truth, sizes):
    data = truth.planted(0, False, sizes)
    found = truth.recovery(truth.untrained(data, sizes, 0), data, 2000)
    random = torch.nn.functional.normalize(torch.randn(20, sizes.features, sizes.d_in), dim=2)
    features = data.model.feature_dict.feature_vectors.detach()
    from sae_lens.synthetic import mean_correlation_coefficient

    null = [mean_correlation_coefficient(directions, features) for directions in random]
    assert abs(found["mcc"] - np.mean(null)) < 0.1 and found["f1"] < 0.5
    assert found["l0"] == pytest.approx(data.k, abs=0.5)


def absorbing(data, absorbed):
    """Latents of `absorbed` children also say their parent, whose own latent is silent then."""
    features = data.model.feature_dict.feature_vectors
    encoder, decoder = features.T.clone(), features.clone()
    for parent, children in data.children.items():
        for child in set(children) & set(absorbed):
            encoder[:, parent] -= 10 * features[child]
            decoder[child] += features[parent]
    return Linear(encoder, decoder)


def test_perfect_latents_absorb_nothing_and_a_made_rate_is_measured(truth, orthogonal):
    data = orthogonal({0: [1, 2], 3: [4, 5]})
    none = truth.absorption(absorbing(data, []), data, 20_000)
    assert none == {"absorbed": 0.0, "silent": 0.0, "silent_alone": 0.0}
    everything = truth.absorption(absorbing(data, [1, 2, 4, 5]), data, 20_000)
    assert everything["absorbed"] > 0.99 and everything["silent_alone"] == 0
    # child 1 is on in .3 of the cases where its parent is, one of both in 1 - .7 ** 2
    one = truth.absorption(absorbing(data, [1]), data, 20_000)
    assert one["absorbed"] == pytest.approx(0.5 * 0.3 / (1 - 0.7**2), abs=0.02)
    assert one["silent"] == pytest.approx(one["absorbed"], abs=0.01)


def test_a_latent_that_is_silent_without_a_child_does_not_count_as_absorbed(truth, orthogonal):
    data = orthogonal({0: [1, 2]})
    sae = absorbing(data, [])
    sae.W_enc[:, 0] = 0
    found = truth.absorption(sae, data, 5000)
    assert found == {"absorbed": 0.0, "silent": 1.0, "silent_alone": 1.0}
    with pytest.raises(ValueError, match="no hierarchy"):
        truth.absorption(sae, replace(data, children={}), 100)


def test_children_of_the_planted_hierarchy_imply_their_parents(truth, sizes):
    data = truth.planted(0, True, sizes)
    on = data.model.activation_generator.sample(4000) > 0
    for parent, children in data.children.items():
        assert len(children) == sizes.children and on[:, children].any()
        assert on[:, parent][on[:, children].any(1)].all()
    assert on.sum(1).float().mean() == pytest.approx(data.true_l0, abs=0.3)


def test_measures_are_read_off_at_the_target_over_log_l0(truth):
    points = [{"l1": 1.0, "l0": 4.0, "mcc": 0.5}, {"l1": 0.5, "l0": 16.0, "mcc": 0.7}]
    assert truth.read_off(points, 8) == pytest.approx({"l0": 8.0, "mcc": 0.6})
    assert truth.read_off(points, 32) is None
    assert truth.read_off(points, 15.5) == {"l0": 16.0, "mcc": 0.7}


@pytest.mark.parametrize("power", [-0.3, -1.0, -3.0])
def test_the_penalty_is_found_whatever_l0_owes_to_it(truth, power):
    """Also where a strong one silences everything, as it does in a training."""
    tried = []

    def measure(penalty):
        tried.append(penalty)
        l0 = 20 * penalty**power
        return {"l0": l0 if l0 > 3 else 0.0, "mcc": 1.0}

    found = truth.read_off(truth.search(measure, 7, 2.0), 7)
    assert found["l0"] == pytest.approx(7, rel=0.05) and len(tried) <= truth.SEARCH


def test_scores_are_compared_by_their_paired_difference(truth):
    theirs = [0.8, 0.9, 0.7, 0.85, 0.75]
    found = truth.paired([0.82, 0.92, 0.73, 0.87, 0.76], theirs)
    assert found["difference"] == pytest.approx(0.02) and found["no_worse"]
    noisy = truth.paired([0.9, 0.8, 0.7, 0.85, 0.75], theirs)
    assert noisy["difference"] == pytest.approx(0) and not noisy["no_worse"]
    with pytest.raises(ValueError, match="at least 5"):
        truth.paired(theirs[:4], theirs[:4])


def test_smoke_runs_and_what_is_done_is_not_done_again(truth, sizes, tmp_path, monkeypatch):
    for name in ("LENSLAB_COMPUTE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, {"LENSLAB_COMPUTE": "float32"}.get(name, "1"))
    monkeypatch.setattr(truth, "SMOKE", sizes)
    monkeypatch.setattr(truth.entries, "CACHE", tmp_path)
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
    given = ["--only", "batchtopk", "--smoke", "--work", str(tmp_path)]
    truth.main(["recovery", "absorption", "collect", *given])
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    monkeypatch.setattr(truth, "planted", None)  # nothing is made or trained again
    truth.main(["recovery", "absorption", *given])
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines
    bench = truth.Bench(tmp_path, sizes)
    rows, rates = truth.recovery_table(bench, ["batchtopk"])
    assert (
        set(rows["of"]) == {"lenslab batchtopk", "saelens batchtopk", "untrained"}
        and len(rates) == 2
    )
    verdict = truth.judge(rows, ["batchtopk"])
    assert set(verdict["batchtopk mcc"]) == {"difference", "low", "high", "no_worse"}
    assert "not_compared" in truth.judge(rows, ["relu"])["relu mcc"]


def test_probes_find_what_labels_say_and_nothing_under_shuffled_ones(scripts):
    labels = label_texts(table(n=40))
    values = noisy(labels, good=1)
    rows = scripts["sparse_probing"].held_out_aurocs(values, labels, (1, 5, None))
    assert {row["k"] for row in rows} == {1, 5, values.shape[1]}
    assert {row["kind"] for row in rows} == set(labels.categories)
    real = np.mean([row["value"] for row in rows])
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = replace(labels, category=labels.category[order])
    null = scripts["sparse_probing"].held_out_aurocs(values, shuffled, (1, 5))
    assert real > 0.6 and abs(np.mean([row["value"] for row in null]) - 0.5) < 0.1


def test_differences_of_two_reseeds_stay_under_the_smallest_difference_in_95_percent(truth):
    """Of simulated reseeds with a known spread: what is measured on a few of them holds for the
    next two."""
    values = np.random.default_rng(0).normal(0.7, 0.02, (5000, 7))
    known, following = values[:, :5], values[:, 5:]
    bounds = np.array([truth.smallest_difference(row) for row in known])
    within = np.abs(following[:, 0] - following[:, 1]) < bounds
    assert within.mean() == pytest.approx(0.95, abs=0.015)
    many = np.random.default_rng(1).normal(0.7, 0.02, 5000)
    assert truth.smallest_difference(many) == pytest.approx(1.96 * 2**0.5 * 0.02, rel=0.05)
    assert truth.smallest_difference(np.ones(3)) == 0


@pytest.mark.parametrize("values", [[0.5, 0.6], [0.5, 0.6, np.nan]])
def test_the_spread_of_too_few_reseeds_is_refused(values, truth):
    with pytest.raises(ValueError, match="three reseeds"):
        truth.smallest_difference(np.array(values))
