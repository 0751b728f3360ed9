"""Splicing: the error term makes it exact, it agrees with SAELens's own, and it always lets go of
the model."""

import pytest
import torch
from test_sae_pretrained import HOOK, shaken_folder, tiny_sae  # noqa: F401  (a fixture)

from lenslab.circuits import interventions
from lenslab.circuits.interventions import ablate_features, splice, text_losses
from lenslab.features.activations import encode_features
from lenslab.hooks import UnknownHook
from lenslab.models import load_model
from lenslab.sae.inputs import SAEMismatch
from lenslab.tokens import tokenize

TEXTS = ["A cat sat on the mat.", "2 + 2", "Paris is a city on a river, they say."]
TOKENS = torch.tensor([[0, 40, 50, 60, 70, 80], [0, 41, 51, 61, 71, 81]])


@pytest.fixture(scope="module")
def bold(shaken_folder):  # noqa: F811
    """A model whose logits move when its stream does: a freshly initialised one hardly reacts."""
    return load_model(shaken_folder)


def difference(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize(
    "hook", [HOOK, "blocks.2.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.0.hook_resid_pre"]
)
def test_with_the_error_term_and_no_edit_nothing_changes_and_without_it_much_does(
    bold, hook, architecture
):
    sae, clean = tiny_sae(bold, hook=hook, architecture=architecture), bold(TOKENS)
    with splice(bold, sae):
        assert difference(bold(TOKENS), clean) < 1e-5
    with splice(bold, sae, error_term=False):
        assert difference(bold(TOKENS), clean) > 1e-2
    assert torch.equal(bold(TOKENS), clean)


@pytest.mark.parametrize("kwargs", [None, {"center_writing_weights": True}])
def test_the_error_term_is_exact_for_saes_that_normalise_and_for_centred_ones(bold, kwargs):
    sae = tiny_sae(bold, model_from_pretrained_kwargs=kwargs)
    sae.cfg.normalize_activations = "layer_norm"
    sae._setup_activation_normalization()
    clean = bold(TOKENS)
    with splice(bold, sae, edit=lambda features: features.clone()):
        assert difference(bold(TOKENS), clean) < 1e-5
    with splice(
        bold, sae, edit=lambda features: features.zero_()
    ):  # in place: the error term must not see it
        assert difference(bold(TOKENS), clean) > 1e-2


@pytest.fixture(scope="module")
def bridge(shaken_folder):  # noqa: F811
    """SAELens's own model class on the same weights, with the usual hook names switched on."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    theirs = SAETransformerBridge.boot_transformers(str(shaken_folder), device="cpu")
    theirs.enable_compatibility_mode(no_processing=True)
    return theirs


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_mlp_out"])
def test_the_splice_agrees_with_run_with_saes(bold, bridge, hook, architecture, error_term):
    sae = tiny_sae(bold, hook=hook, architecture=architecture)
    theirs = bridge.run_with_saes(TOKENS, saes=[sae], use_error_term=error_term)
    with splice(bold, sae, error_term=error_term):
        assert difference(bold(TOKENS), theirs) < 1e-5
    assert (difference(bold(TOKENS), theirs) < 1e-5) == error_term


@pytest.mark.parametrize("error_term", [True, False])
def test_an_edited_latent_agrees_with_a_hook_on_saelens_activations(bold, bridge, error_term):
    sae = tiny_sae(bold)

    def switch(features, hook=None):
        features = features.clone()
        features[..., 7] = 3.0
        return features

    with bridge.saes(saes=[sae], use_error_term=error_term):
        theirs = bridge.run_with_hooks(TOKENS, fwd_hooks=[(bridge.get_sae_hook_name(sae), switch)])
    with splice(bold, sae, error_term=error_term, edit=switch):
        assert difference(bold(TOKENS), theirs) < 1e-5


def test_a_centred_sae_is_spliced_as_in_the_processed_model(shaken_folder, bold):  # noqa: F811
    processed = load_model(shaken_folder)
    processed.enable_compatibility_mode()
    sae = tiny_sae(
        bold,
        hook="blocks.1.hook_resid_pre",
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )

    def replace(value, hook):
        return sae.decode(sae.encode(value))

    with processed.hooks([("blocks.1.hook_resid_pre", replace)]):
        theirs = processed(TOKENS).log_softmax(-1)  # centred unembedding: equal up to a constant
    with splice(bold, sae, error_term=False):
        ours = bold(TOKENS).log_softmax(-1)
    assert difference(ours, theirs) < 1e-4 and difference(ours, bold(TOKENS).log_softmax(-1)) > 1e-2


def test_only_positions_of_the_mask_are_replaced(bold):
    sae, seen = tiny_sae(bold), []
    batch = tokenize(bold, TEXTS)
    _, clean = bold.run_with_cache(
        batch.tokens, attention_mask=batch.attention.long(), names_filter=[HOOK]
    )
    with (
        splice(bold, sae, error_term=False, mask=batch.real),
        bold.hooks([(HOOK, lambda value, hook: seen.append(value))]),
    ):
        bold(batch.tokens, attention_mask=batch.attention.long())
    same = (seen[0] == clean[HOOK]).all(-1)
    assert torch.equal(same, ~batch.real)


def test_the_features_handed_to_edit_are_those_of_the_tokens_and_must_keep_their_shape(bold):
    sae, seen = tiny_sae(bold), []
    _, cache = bold.run_with_cache(TOKENS, names_filter=[HOOK])
    with splice(bold, sae, edit=lambda features: seen.append(features) or features):
        bold(TOKENS)
    assert difference(seen[0], sae.encode(cache[HOOK])) < 1e-6
    with (
        splice(bold, sae, edit=lambda features: features[..., :3]),
        pytest.raises(RuntimeError, match="shape"),
    ):
        bold(TOKENS)
    with (
        splice(bold, sae, edit=lambda features: features * float("nan")),
        pytest.raises(ValueError, match="NaN"),
    ):
        bold(TOKENS)


@pytest.mark.parametrize("cached", [True, False])
def test_during_generation_the_mask_holds_for_the_prompt_and_new_tokens_are_replaced(bold, cached):
    sae, prompt = tiny_sae(bold), TOKENS[:1]
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, 3] = True
    seen = {}

    def look(
        value, hook
    ):  # after the splice: which places in the whole text differ from a clean run
        seen[value.shape[1]] = value

    with splice(bold, sae, error_term=False, mask=mask), bold.hooks([(HOOK, look)]):
        out = bold.generate(
            prompt, max_new_tokens=4, do_sample=False, verbose=False, use_past_kv_cache=cached
        )
    # the same by hand: one growing text, no cache, the mask written out
    text = prompt
    for _ in range(4):
        whole = torch.cat([mask, torch.ones(1, text.shape[1] - 6, dtype=torch.bool)], 1)
        with splice(bold, sae, error_term=False, mask=whole):
            text = torch.cat([text, bold(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, text)
    assert set(seen) == ({6, 1} if cached else {6, 7, 8, 9})


def test_a_cached_continuation_gives_the_logits_of_the_whole_text(bold):
    sae, mask = tiny_sae(bold), torch.tensor([[False, True, True, False, True, False]])
    with splice(bold, sae, error_term=False, mask=mask):
        whole = bold(TOKENS[:1])
        hf = bold.original_model
        first = hf(TOKENS[:1, :3], use_cache=True)
        rest = hf(TOKENS[:1, 3:], past_key_values=first.past_key_values, use_cache=True)
    assert difference(torch.cat([first.logits, rest.logits], 1), whole) < 1e-4


def test_a_mask_for_another_number_of_texts_is_refused(bold):
    with (
        splice(bold, tiny_sae(bold), mask=torch.ones(3, 6, dtype=torch.bool)),
        pytest.raises(RuntimeError, match="size"),
    ):
        bold(TOKENS)


def hooks_left(model):
    points = {
        id(point): point for point in model.hook_dict.values()
    }.values()  # aliases name a point again
    return sum(len(point.fwd_hooks) for point in points) + len(
        model.original_model._forward_pre_hooks
    )


def test_no_hook_is_left_behind_also_after_an_exception(bold):
    before = hooks_left(bold)
    with splice(bold, tiny_sae(bold)):
        assert hooks_left(bold) == before + 2
    with pytest.raises(RuntimeError, match="stop"), splice(bold, tiny_sae(bold)):
        raise RuntimeError("stop")
    with (
        pytest.raises(ZeroDivisionError),
        splice(bold, tiny_sae(bold), edit=lambda features: 1 / 0),
    ):
        bold(TOKENS)
    assert hooks_left(bold) == before


def test_what_does_not_belong_together_is_not_spliced(bold):
    with pytest.raises(SAEMismatch), splice(bold, tiny_sae(bold, hook="blocks.1.mlp.hook_post")):
        pass
    with pytest.raises(UnknownHook), splice(bold, tiny_sae(bold, hook="blocks.7.hook_resid_post")):
        pass
    with (
        pytest.raises(ValueError, match="transcoder"),
        splice(bold, tiny_sae(bold, hook_name_out="blocks.1.hook_mlp_out")),
    ):
        pass


def test_gradients_flow_through_the_features_and_not_through_the_error(bold):
    sae, kept = tiny_sae(bold), {}

    def keep(name):
        def detach(value, hook=None):
            kept[name] = value.detach().requires_grad_(True)
            return kept[name]

        return detach

    with splice(bold, sae, edit=keep("features")):
        bold(TOKENS)[0, -1, 5].backward()
    assert kept["features"].grad.abs().max() > 0
    for width, arrives in (
        (1.0, True),
        (0.0, False),
    ):  # a decoder of zeros leaves nothing but the error
        sae.W_dec.mul_(width)
        with bold.hooks([("blocks.0.hook_resid_post", keep("before"))]), splice(bold, sae):
            bold(TOKENS)[0, -1, 5].backward()
        gradient = kept["before"].grad
        assert (gradient is not None and bool(gradient.abs().max() > 0)) == arrives


def test_a_feature_set_to_zero_changes_the_loss_of_the_texts_it_fires_on(bold, monkeypatch):
    sae = tiny_sae(bold)
    batch = tokenize(bold, TEXTS)
    fa = encode_features(bold, sae, batch, progress=False)
    fires = fa.pool("max").toarray() > 0
    often = int(fires.sum(0).argmax())
    by_hand = text_losses(bold, batch)

    def edit(latents):
        latents[..., often] = 0
        return latents

    with splice(bold, sae, edit=edit, mask=batch.real):
        by_hand = text_losses(bold, batch) - by_hand
    monkeypatch.setattr(interventions, "TEXTS", 2)
    found = ablate_features(bold, sae, fa, [often, often])
    assert found.shape == (2, len(TEXTS)) and (found[0] == found[1]).all()
    assert found[0] == pytest.approx(by_hand, abs=1e-6) and abs(by_hand).max() > 1e-4


def test_what_never_fires_has_no_effect_and_a_text_of_one_token_no_loss(bold):
    sae = tiny_sae(bold)
    with torch.no_grad():
        sae.W_enc[:, 3], sae.b_enc[3] = 0, -1
    batch = tokenize(bold, TEXTS)
    fa = encode_features(bold, sae, batch, progress=False)
    assert (ablate_features(bold, sae, fa, [3]) == 0).all()
    single = tokenize(bold, ["A"], bos=False)
    with pytest.raises(ValueError, match=r"single token|no real token follows"):
        text_losses(bold, single)


def test_losses_of_texts_are_those_of_each_alone(bold, monkeypatch):
    batch = tokenize(bold, TEXTS)
    monkeypatch.setattr(interventions, "TEXTS", 3)
    together = text_losses(bold, batch)
    alone = [text_losses(bold, tokenize(bold, [text]))[0] for text in TEXTS]
    assert together == pytest.approx(alone, abs=1e-4)
