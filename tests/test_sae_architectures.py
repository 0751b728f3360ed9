"""Seven architectures: equal to SAELens's own at equal weights, in every loss and gradient, and
equal after saving."""

import json
import sys

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput

from lenslab.files import REPOSITORY, data_path
from lenslab.runtime import derive_generator
from lenslab.sae.load import load_sae
from lenslab.sae.registry import NotAnSAE
from lenslab.sae.save import save_sae
from lenslab.sae.train import architectures
from lenslab.sae.train.architectures import (
    ARCHITECTURES,
    FOR,
    STARTING,
    TOPK_FAMILY,
    build_sae,
    starting_penalty,
)
from lenslab.sae.train.convert import to_saelens

sys.path.insert(0, str(REPOSITORY / "scripts"))

from notebook_execution import code_cells, read_source

WIDTH, LATENTS, K, BATCH, SPARSITY, NESTED = 16, 48, 4, 40, 0.7, (8, 2, 1)
NAMES = tuple(ARCHITECTURES)
NAN = float("nan")
METADATA = {"hook_name": "blocks.0.hook_resid_post", "model_name": "some-model"}
THEIRS = {
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig, dict(l1_coefficient=SPARSITY)),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, dict(k=K)),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, dict(k=K)),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        dict(k=K, matryoshka_widths=[LATENTS // n for n in NESTED]),
    ),
    "jumprelu": (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        dict(l0_coefficient=SPARSITY, jumprelu_bandwidth=0.3),
    ),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, dict(l1_coefficient=SPARSITY)),
    # SAELens trains no transcoder; one that writes what it reads is a batchtopk SAE that leaves
    # b_dec out
    "transcoder": (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        dict(k=K, apply_b_dec_to_input=False),
    ),
}


def drawn(*shape, label=""):
    return torch.randn(*shape, generator=derive_generator(1, f"{label} {shape}"))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Nested dictionaries and a bandwidth that tiny data feel, all in float32."""
    monkeypatch.setenv("LENSLAB_COMPUTE", "float32")
    monkeypatch.setattr(architectures, "NESTED", NESTED)
    monkeypatch.setattr(architectures, "BANDWIDTH", 0.3)


def built(name, **options):
    """One with weights that are no special case; decoder rows of norm 1 where the architecture
    keeps them so."""
    usual = dict(k=K, sparsity=SPARSITY)
    options = {
        "metadata": METADATA,
        **{key: value for key, value in usual.items() if name in FOR[key]},
        **options,
    }
    sae = build_sae(name, WIDTH, LATENTS, **options)
    with torch.no_grad():
        sae.W_enc.copy_(drawn(*sae.W_enc.shape, label="encoder") / 3)
        if not sae.config.tied:
            rows = drawn(*sae.W_dec.shape, label="decoder")
            length = (
                1.0
                if name in TOPK_FAMILY
                else 0.5 + torch.rand(LATENTS, 1, generator=derive_generator(0, "rows"))
            )
            sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True) * length)
        for bias in ("b_enc", "b_dec", "b_mag", "r_mag"):
            if hasattr(sae, bias):
                getattr(sae, bias).copy_(drawn(*getattr(sae, bias).shape, label=bias) / 5)
        if name == "jumprelu":
            sae.threshold.copy_(drawn(LATENTS, label="threshold").abs() / 3)
        elif hasattr(sae, "threshold"):
            sae.threshold.fill_(0.4)
    return sae


def theirs(name, sae):
    kind, config, options = THEIRS[name]
    other = kind(config(d_in=WIDTH, d_sae=LATENTS, device="cpu", **options))
    state = {key: value.detach().clone() for key, value in sae.named_parameters()}
    if name == "gated":
        state["b_gate"] = state.pop("b_enc")
    if "topk_threshold" in other.state_dict():
        state["topk_threshold"] = sae.threshold.double()
    other.load_state_dict(state)
    return other


def dead_latents(n):
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[torch.randperm(LATENTS, generator=derive_generator(0, "dead"))[:n]] = True
    return dead


@pytest.mark.parametrize(
    "n_dead", [0, 3, 20]
)  # 3 of them count for less than the 8 that AuxK would take
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_and_gradient_equals_saelens(name, n_dead):
    sae, x, dead, warm = (
        built(name, scale="none", centre=False),
        drawn(BATCH, WIDTH),
        dead_latents(n_dead),
        0.6,
    )
    other = theirs(name, sae)
    found = sae.loss(x, x, dead, warm)
    wanted = other.training_forward_pass(
        TrainStepInput(
            x,
            dict.fromkeys(("l0", "l1"), SPARSITY * warm),
            dead,
            n_training_steps=3,
            is_logging_step=False,
        )
    )
    terms = {key: float(value) for key, value in wanted.losses.items()}
    assert float(found.reconstruction) == pytest.approx(terms.pop("mse_loss"), rel=1e-4)
    assert float(found.auxiliary) == pytest.approx(
        terms.pop("auxiliary_reconstruction_loss", 0), rel=1e-4
    )
    assert float(found.sparsity) == pytest.approx(
        sum(terms.values()), rel=1e-4
    )  # l1, l0 or the inner ones
    assert float(found.total) == pytest.approx(float(wanted.loss), rel=1e-4)
    if name in TOPK_FAMILY:
        assert (float(found.auxiliary) > 0) == (n_dead > 0)
    else:
        assert float(found.sparsity) > 0
    assert torch.equal(found.fired, (wanted.feature_acts != 0).any(0))
    assert float(found.l0) == pytest.approx(
        float((wanted.feature_acts != 0).sum(1).float().mean()), abs=1e-5
    )
    assert torch.allclose(found.error, x - wanted.sae_out, atol=1e-5)

    found.total.backward()
    wanted.loss.backward()
    gradients = {key: value.grad for key, value in other.named_parameters()}
    if name == "gated":
        gradients["b_enc"] = gradients.pop("b_gate")
    for key, value in sae.named_parameters():
        largest = float(gradients[key].abs().max())
        assert largest > 1e-3 and torch.allclose(
            value.grad, gradients[key], rtol=1e-3, atol=1e-4 * largest
        ), key


@pytest.mark.parametrize("name", list(TOPK_FAMILY))
def test_one_of_the_largest_that_is_not_positive_is_not_active(name):
    sae, x = built(name, scale="none", centre=False), drawn(BATCH, WIDTH)
    with torch.no_grad():
        sae.b_enc.sub_(2.5)
    found, features = sae.loss(x, x), theirs(name, sae).encode(x)
    assert 0 < float(found.l0) < K - 0.5
    assert float(found.l0) == pytest.approx(float((features > 0).sum(1).float().mean()), abs=1e-5)
    assert torch.equal(found.fired, (features > 0).any(0))


@pytest.mark.parametrize("name", NAMES)
def test_bf16_changes_losses_by_little(name, monkeypatch):
    sae, x = built(name, scale="none", centre=False), drawn(400, WIDTH)
    exact = sae.loss(x, x, dead_latents(10))
    monkeypatch.setenv("LENSLAB_COMPUTE", "bfloat16")
    fast = sae.loss(x, x, dead_latents(10))
    assert float(fast.total) == pytest.approx(float(exact.total), rel=0.02)
    assert fast.total.dtype == fast.error.dtype == torch.float32


def test_a_tied_sae_is_one_whose_decoder_is_the_encoder_transposed():
    tied, x = built("relu", tied=True, scale="none", centre=False), drawn(BATCH, WIDTH)
    assert "W_dec" not in dict(tied.named_parameters())
    free = built("relu", scale="none", centre=False)
    with torch.no_grad():
        free.W_dec.copy_(tied.W_enc.T)
    one, two = tied.loss(x, x), free.loss(x, x)
    assert float(one.total) == pytest.approx(float(two.total), rel=1e-6)
    one.total.backward(), two.total.backward()
    assert torch.allclose(tied.W_enc.grad, free.W_enc.grad + free.W_dec.grad.T, atol=1e-4)


@pytest.mark.parametrize("enough", [0.0, 1.1], ids=["dense", "sparse"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_relu_sae_costs_what_float64_autograd_says(tied, enough, monkeypatch):
    """Biases and the penalty ride in the same products: none of them may leak into another."""
    sae, x = built("relu", tied=tied, scale="none", centre=False), drawn(BATCH, WIDTH)
    monkeypatch.setattr(architectures, "SPARSE_ENOUGH", enough)
    losses = sae.loss(x, x, warm=0.5)
    losses.total.backward()
    exact = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    W_dec = exact["W_enc"].T if tied else exact["W_dec"]
    values = torch.relu((x.double() - exact["b_dec"]) @ exact["W_enc"] + exact["b_enc"])
    distance = (x.double() - values @ W_dec - exact["b_dec"]).square().sum(1).mean()
    wanted = distance + 0.5 * SPARSITY * (values @ W_dec.norm(dim=1)).mean()
    wanted.backward()
    assert float(losses.total) == pytest.approx(float(wanted), rel=1e-5)
    assert float(losses.l0) == pytest.approx(float((values > 0).sum(1).double().mean()))
    assert torch.equal(losses.fired, (values > 0).any(0))
    for name, parameter in sae.named_parameters():
        assert torch.allclose(parameter.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("name", list(TOPK_FAMILY))
def test_decoder_rows_keep_length_one_and_are_only_turned(name):
    sae, x = built(name, scale="none", centre=False), drawn(BATCH, WIDTH)
    sae.loss(x, x).total.backward()
    plain = sae.W_dec.grad.clone()
    sae.before_step()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert float(along.abs().max()) < 1e-5 < 1e-2 < float((plain * sae.W_dec).sum(1).abs().max())
    assert torch.allclose(
        plain - sae.W_dec.grad, (plain * sae.W_dec).sum(1, keepdim=True) * sae.W_dec, atol=1e-5
    )
    with torch.no_grad():
        sae.W_dec.sub_(0.1 * sae.W_dec.grad)
    assert float(sae.W_dec.norm(dim=1).max()) > 1 + 1e-4
    sae.after_step()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(LATENTS), atol=1e-6)


def test_jumprelu_begins_with_few_active_latents_whatever_the_units():
    for units in (0.01, 1.0, 300.0):
        sae = build_sae("jumprelu", WIDTH, LATENTS)
        sae.fit(x := units * drawn(2000, WIDTH) + units)
        latents = sae.activate(sae.pre(sae.scaled(x)))
        assert float((latents > 0).sum(1).float().mean()) == pytest.approx(WIDTH / 8, rel=0.02)
        assert latents[latents > 0].min() > 0.3  # of pre-activations of about 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_rows_begin_at_length_one_jumprelus_short_but_in_floors(architecture):
    short = architectures.SHORT if architecture == "jumprelu" else 1.0
    for frozen, length in ((None, short), ("soft decoder", 1.0), ("decoder", 1.0)):
        rows = build_sae(architecture, WIDTH, LATENTS, frozen=frozen).W_dec
        assert torch.allclose(rows.norm(dim=1), torch.full((LATENTS,), length))


def test_a_threshold_never_falls_below_zero():
    sae = built("jumprelu")
    with torch.no_grad():
        sae.threshold[:3] = torch.tensor([-0.2, 0.0, 0.1])
    sae.after_step()
    assert sae.threshold[:3].tolist() == pytest.approx([0, 0, 0.1])


# scale, centre, saving

SCALES = [("mean", True), ("mean", False), ("none", True), ("none", False), ("unit", False)]


def data(n=300, d=WIDTH, label="data"):
    return 3 * drawn(n, d, label=label) + 4 * drawn(d, label=label)


@torch.no_grad()
def in_model_units(sae, x):
    """(features, reconstructions) by the definitions: z is scaled, and what comes out is scaled
    back."""
    rule = sae.activate
    if sae.config.architecture in ("batchtopk", "matryoshka", "transcoder"):
        rule = lambda pre: pre * (pre > sae.threshold)  # noqa: E731
    z = sae.scaled(x)
    pre = (z if sae.config.architecture == "transcoder" else z - sae.b_dec) @ sae.W_enc + sae.b_enc
    x_hat = (rule(pre) @ sae.decoder + sae.b_dec) / sae.scale_out + sae.centre_out
    if sae.config.scale == "unit":
        x_hat = x_hat * x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
    return rule(pre) * sae.decoder.norm(dim=1) / sae.scale_out, x_hat


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale, centre", SCALES)
@pytest.mark.parametrize("name", [*NAMES, "tied"])
def test_a_saved_and_loaded_sae_gives_the_same(name, scale, centre, stored, tmp_path):
    options = dict(scale=scale, centre=centre, **({"tied": True} if name == "tied" else {}))
    x, target = data(), None
    if name == "transcoder":
        if scale == "unit":
            return
        options |= dict(d_out=10, metadata=METADATA | {"hook_name_out": "blocks.0.hook_mlp_out"})
        target = 0.1 * data(d=10) + 7
    sae = built("relu" if name == "tied" else name, **options)
    encoder = sae.W_enc.detach().clone()
    sae.fit(x, target)
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
    if name == "relu":
        with torch.no_grad():
            sae.W_dec[3] = 0  # a penalty may shrink a row to nothing
    loaded = load_sae(save_sae(to_saelens(sae), tmp_path / "sae", dtype=stored), device="cpu")
    found = loaded.encode(x)
    x_hat = loaded.decode(found)
    features, wanted = in_model_units(sae, x)
    assert 0 < float((found > 0).float().mean()) < 1 and x_hat.shape == wanted.shape
    if stored is torch.bfloat16:
        assert float((x_hat - wanted).norm()) < 0.1 * float((wanted - wanted.mean(0)).norm())
        return
    size = float(wanted.abs().max())
    assert torch.allclose(found, features, rtol=1e-5, atol=1e-5 * size)
    assert torch.allclose(x_hat, wanted, rtol=1e-5, atol=1e-5 * size)
    rows = loaded.W_dec.norm(dim=1)
    assert torch.allclose(rows[rows > 0], torch.ones(int((rows > 0).sum())), atol=1e-5)
    assert loaded.cfg.metadata.trained_as == sae.config.architecture
    assert loaded.cfg.metadata.hook_name_out == options.get("metadata", {}).get("hook_name_out")


def test_heads_side_by_side_are_said_in_the_saved_sae():
    sae = build_sae(
        "topk",
        WIDTH,
        LATENTS,
        k=K,
        metadata={"hook_name": "blocks.0.attn.hook_z", "model_name": "m"},
    )
    assert to_saelens(sae).cfg.reshape_activations == "hook_z"


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(NotAnSAE, match="hook"):
        to_saelens(build_sae("topk", WIDTH, LATENTS, k=K))
    broken = built("relu")
    with torch.no_grad():
        broken.W_enc[0, 0] = float("nan")
    with pytest.raises(NotAnSAE, match="NaN"):
        to_saelens(broken)


@pytest.mark.parametrize("centre", [True, False])
def test_fit_gives_norm_and_centre_of_the_sample(centre):
    sae, x = built("topk", centre=centre), data()
    sae.fit(x)
    z = sae.scaled(x)
    assert float(z.norm(dim=1).mean()) == pytest.approx(WIDTH**0.5, rel=1e-5)
    assert (float(z.mean(0).abs().max()) < 1e-5) == centre
    unit = built("topk", scale="unit", centre=False)
    unit.fit(x)
    assert torch.allclose(unit.scaled(x).norm(dim=1), torch.full((300,), 4.0), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_wide_sae_begins_with_an_encoder_short_enough_to_reconstruct(tied):
    """With 64 latents a dimension, unfitted ones would reconstruct 32 times too much."""
    sae, x = build_sae("relu", WIDTH, 64 * WIDTH, tied=tied, sparsity=0.0), data()
    sae.fit(x)
    z = sae.scaled(x)
    assert float(sae.loss(z, z).reconstruction) < 0.2 * float(z.square().sum(1).mean())


@pytest.mark.parametrize("scale, centre", SCALES)
@pytest.mark.parametrize("what", ["constant", "nan"])
def test_fit_refuses_data_from_which_nothing_can_be_learned(what, scale, centre):
    x = drawn(WIDTH).expand(300, WIDTH).clone()
    if what == "nan":
        x = data()
        x[5, 2] = float("nan")
    with pytest.raises(ValueError, match="constant"):
        built("topk", scale=scale, centre=centre).fit(x)


# batchtopk


@pytest.mark.parametrize("guess", [0.0, 0.3, 1.0, 50.0])
def test_the_guess_changes_only_how_fast_the_largest_are_found(guess):
    sae, pre = built("batchtopk"), drawn(BATCH, LATENTS)
    sae.guess.fill_(guess)
    code = sae.select(pre)
    mask = torch.zeros(BATCH * LATENTS, dtype=torch.bool)
    mask[pre.flatten().topk(K * BATCH).indices] = True
    found = code.matrix(torch.ones(len(code.latents))).to_dense() > 0
    assert len(code.latents) == K * BATCH and torch.equal(found, mask.view(BATCH, LATENTS))
    assert int(found.sum(1).max()) > K > int(found.sum(1).min())  # k on average, not for each


def test_where_fewer_are_positive_those_are_taken():
    sae, pre = built("batchtopk"), drawn(BATCH, LATENTS) - 1.8
    assert 0 < int((pre > 0).sum()) < K * BATCH
    code = sae.select(pre)
    assert torch.equal(code.matrix(torch.ones(len(code.latents))).to_dense() > 0, pre > 0)
    assert not len(sae.select(-pre.abs()).latents)
    x = drawn(BATCH, WIDTH)
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    losses = sae.loss(x, x, dead_latents(20))
    losses.total.backward()
    assert float(losses.l0) == 0 and torch.isfinite(sae.W_enc.grad).all()


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_at_inference_about_k_are_active(name):
    sae = built(name, scale="none", centre=False)
    sae.threshold.zero_()
    for step in range(120):
        x = drawn(100, WIDTH, label=step)
        sae.loss(x, x)
    unseen = drawn(2000, WIDTH, label="unseen")
    assert float((to_saelens(sae).encode(unseen) > 0).sum(1).float().mean()) == pytest.approx(
        K, rel=0.1
    )


def test_the_threshold_follows_where_a_short_training_goes():
    """Weights that grow as in a training: an estimate that moves by a hundredth a batch would still
    be at the start."""
    sae = built("batchtopk", scale="none", centre=False)
    first = sae.W_enc.clone()
    for step in range(60):
        with torch.no_grad():
            sae.W_enc.copy_(first * (1 + min(step, 50) / 10))
        sae.loss(x := drawn(100, WIDTH, label=step), x)
    unseen = drawn(2000, WIDTH, label="unseen")
    assert float((to_saelens(sae).encode(unseen) > 0).sum(1).float().mean()) == pytest.approx(
        K, rel=0.15
    )


# Penalties


def test_penalties_of_an_l0_are_those_of_the_sweep():
    findings = json.loads(data_path("results", "phase_4_sweep.json").read_text())["values"][
        "findings"
    ]
    for name in ("relu", "gated", "jumprelu"):
        intercept, slope, _ = STARTING[name]
        found = findings["penalties"][name]
        assert (found["intercept"], found["slope"]) == pytest.approx((intercept, slope), abs=5e-3)
        for l0, penalty in found["penalty_at_l0"].items():
            assert starting_penalty(name, 256, float(l0)) == pytest.approx(penalty, rel=0.02)


def test_a_penalty_is_of_an_architecture_that_has_one():
    with pytest.raises(ValueError, match="relu, jumprelu, gated"):
        starting_penalty("topk", 256, 16)
    with pytest.raises(ValueError, match="l0 above 0"):
        starting_penalty("relu", 256, 0)


# build_sae


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("topk2", {}, "there are .*topk"),
        ("topk", dict(k=0), "k must lie"),
        ("batchtopk", dict(k=49), "k must lie"),
        ("topk", dict(tied=True), "tied is for relu"),
        ("relu", dict(k=K), "k is for topk"),
        ("batchtopk", dict(sparsity=9.0), "sparsity is for relu"),
        ("topk", dict(scale="norm"), "norm"),
        ("topk", dict(scale="unit"), "centre=True"),
        ("transcoder", dict(scale="unit", centre=False), "transcoder"),
        ("topk", dict(d_out=8), "d_out is for transcoder"),
        ("topk", dict(k=2.5), r"\bk\b"),
        ("batchtopk", dict(k=NAN), r"\bk\b"),
        ("topk", dict(auxiliary=NAN), "auxiliary"),
        ("topk", dict(auxiliary=-1.0), "auxiliary"),
        ("relu", dict(sparsity=NAN), "sparsity"),
        ("gated", dict(sparsity=-1.0), "sparsity"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(name, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_sae(name, WIDTH, LATENTS, **({"k": K} if name in FOR["k"] else {}) | options)


def test_a_seed_gives_the_same_weights():
    for seed in (1.5, NAN):
        with pytest.raises(TypeError):
            build_sae("relu", WIDTH, LATENTS, seed=seed)
    first, again, other = (build_sae("relu", WIDTH, LATENTS, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.W_enc, again.W_enc) and not torch.equal(first.W_enc, other.W_enc)
    assert torch.equal(first.W_enc, first.W_dec.T)
    assert build_sae("matryoshka", WIDTH, 5, k=2).loss(drawn(4, WIDTH), drawn(4, WIDTH)).total > 0


def test_a_matryoshka_of_one_width_is_a_batchtopk(monkeypatch):
    monkeypatch.setattr(architectures, "NESTED", (1,))
    one = build_sae("matryoshka", WIDTH, LATENTS, k=K)
    other, x = build_sae("batchtopk", WIDTH, LATENTS, k=K), drawn(BATCH, WIDTH)
    found, wanted = one.loss(x, x), other.loss(x, x)
    assert float(found.total) == pytest.approx(float(wanted.total)) and float(found.sparsity) == 0


def test_a_vector_of_zeros_has_no_norm_and_does_no_harm():
    sae = build_sae("topk", WIDTH, LATENTS, k=K, scale="unit", centre=False)
    x = drawn(BATCH, WIDTH)
    x[3] = 0
    sae.fit(x)
    losses = sae.loss(sae.scaled(x), sae.scaled(x))
    losses.total.backward()
    assert torch.isfinite(losses.total) and torch.isfinite(sae.W_enc.grad).all()


def test_a_transcoder_computes_what_its_definition_says():
    """Written out with full matrices: another target, another width, dead latents helping with what
    is left."""
    wide, n_dead, most = WIDTH + 3, 9, WIDTH // 2
    sae = build_sae("transcoder", WIDTH, LATENTS, k=K, d_out=wide, scale="none", centre=False)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "W_dec":
                parameter.add_(drawn(*parameter.shape, label=name) / 5)
    x, target, dead = drawn(BATCH, WIDTH), drawn(BATCH, wide, label="target"), dead_latents(n_dead)
    found = sae.loss(x, target, dead)
    found.total.backward()

    weights = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    pre = (
        x @ weights["W_enc"] + weights["b_enc"]
    )  # a transcoder's input is not shifted by its output's bias
    active = torch.relu(pre)
    active = active * (active >= active.flatten().topk(K * BATCH).values.min())
    guess = active @ weights["W_dec"] + weights["b_dec"]
    left = (target - guess).detach()
    few = pre.masked_fill(~dead, -torch.inf).topk(min(most, n_dead), dim=1)
    helped = torch.zeros_like(pre).scatter(1, few.indices, few.values) @ weights["W_dec"]
    reconstruction = (target - guess).square().sum(1).mean()
    auxiliary = min(n_dead / most, 1) * (helped - left).square().sum(1).mean()
    (reconstruction + auxiliary).backward()
    assert float(found.reconstruction) == pytest.approx(float(reconstruction), rel=1e-4)
    assert float(found.auxiliary) == pytest.approx(float(auxiliary), rel=1e-4)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-3, atol=1e-4)


def test_the_sae_that_phase_4_builds_is_the_packages():
    """The class in the notebook, loss and gradients, where rows are of length 1 as they start."""
    source = read_source(REPOSITORY / "notebooks" / "interactive" / "phase_4_custom_sae.py")
    (cell,) = [cell.source for cell in code_cells(source) if "class TopK" in cell.source]
    exec(cell, names := {"torch": torch})
    theirs = build_sae("topk", WIDTH, LATENTS, k=K, auxiliary=0.0)
    x = drawn(BATCH, WIDTH, label="phase 4")
    with torch.no_grad():
        theirs.b_enc.copy_(0.1 * drawn(LATENTS))
        theirs.b_dec.copy_(0.1 * drawn(WIDTH))
        theirs.W_enc.add_(0.1 * drawn(WIDTH, LATENTS))
    mine = names["TopK"](theirs.W_dec.detach(), K)
    mine.load_state_dict({name: getattr(theirs, name) for name, _ in mine.named_parameters()})
    assert torch.allclose(mine.encode(x), theirs.activate(theirs.pre(x)), atol=1e-6)
    loss = (x - mine.decode(mine.encode(x))).square().sum(-1).mean()
    loss.backward()
    losses = theirs.loss(x, x)
    losses.total.backward()
    assert losses.total.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in mine.named_parameters():
        gradient = getattr(theirs, name).grad
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
