"""Any model: a Gemma 3 folder goes from text to a trained, saved, loaded, evaluated and spliced
SAE, as GPT-2 does."""

import pytest
import torch
from conftest import TEXTS, make_tokenizer

from lenslab.capture import harvest
from lenslab.circuits.interventions import splice
from lenslab.hooks import stream_hook
from lenslab.models import load_model, model_key, model_name, summarize
from lenslab.sae.controls import evaluate_null
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.load import SAEMismatch, check_sae, load_sae, sae_hook
from lenslab.sae.save import save_sae
from lenslab.sae.train.architectures import build_sae
from lenslab.sae.train.sources import ModelSource
from lenslab.sae.train.trainer import TrainingConfig, train
from lenslab.tokens import pack, tokenize

LAYER, WIDTH = 1, 32
SITES = {  # what an SAE may read, and the module of Hugging Face's model whose output that is
    "residual": ("blocks.1.hook_resid_post", "model.layers.1"),
    "attention": ("blocks.1.hook_attn_out", "model.layers.1.post_attention_layernorm"),
    "mlp": ("blocks.1.hook_mlp_out", "model.layers.1.post_feedforward_layernorm"),
    "down projection": ("blocks.1.mlp.out.hook_out", "model.layers.1.mlp.down_proj"),
}
HOOKS = [hook for hook, _ in SITES.values()]


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory):
    """A random Gemma 3 (text): two layers, one with a sliding window, grouped queries, norms after
    each sublayer."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("gemma-3-twin")
    make_tokenizer(folder)
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = Gemma3ForCausalLM(config)
    with (
        torch.no_grad()
    ):  # as initialised, norms hide how little the MLP says: weights of a trained size
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(6)
    model.save_pretrained(folder)
    return folder


def test_a_model_that_takes_images_too_is_loaded_without_installing_or_fetching_anything(
    tmp_path, monkeypatch
):
    import subprocess

    from transformers import AutoProcessor, Gemma3Config, Gemma3ForConditionalGeneration

    make_tokenizer(tmp_path)
    text = dict(vocab_size=310, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=8)
    text |= dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    vision |= dict(num_attention_heads=2, image_size=16, patch_size=8)
    marks = dict(image_token_index=305, boi_token_index=303, eoi_token_index=304)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **marks)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    calls = []

    def refuse(*arguments, **options):  # as where there is no torchvision and no network
        calls.append(arguments)
        raise OSError("not here")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    for name in ("check_call", "run", "Popen"):
        monkeypatch.setattr(subprocess, name, refuse)
    summary = summarize(load_model(tmp_path))
    assert (summary.layers, summary.context, summary.d_mlp) == (2, 64, 48)  # of the part for text
    assert summary.activation == "gelu_pytorch_tanh"
    assert not calls


@pytest.fixture(scope="module")
def gemma(gemma_folder):
    return load_model(gemma_folder)


@pytest.fixture(scope="module")
def batch(gemma):
    return tokenize(gemma, TEXTS)


def reference(folder, module, row):
    """What Hugging Face's own model computes at a module for one text without padding: [pos,
    width]."""
    from transformers import AutoModelForCausalLM

    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []

    def keep(_, inputs, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    model.get_submodule(module).register_forward_hook(keep)
    with torch.inference_mode():
        model(torch.tensor([row]))
    return seen[0][0]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("pad_side", ["right", "left"])
def test_a_hook_holds_what_hugging_face_computes_there_whatever_the_padding(
    gemma, gemma_folder, site, pad_side
):
    """S2.2: MLP down-projection outputs are not what the MLP adds: Gemma 3 puts a norm between the
    two."""
    hook, module = SITES[site]
    batch = tokenize(gemma, TEXTS, pad_side=pad_side)
    values = harvest(gemma, batch, hook, compute="float32")[hook]
    for i in range(len(TEXTS)):
        expected = reference(gemma_folder, module, batch.tokens[i][batch.attention[i]].tolist())
        assert torch.allclose(values[i][batch.attention[i]], expected, atol=1e-4)
        assert expected.std() > 1e-3  # zeros would agree with anything


def test_the_streams_have_names_and_the_down_projection_is_none_of_them(gemma, batch):
    names = ("residual", "attention", "mlp")
    assert [stream_hook(gemma, LAYER, name) for name in names] == HOOKS[:3]
    values = harvest(gemma, batch, [SITES["mlp"][0], SITES["down projection"][0]])
    added, projected = (values[SITES[site][0]][batch.real] for site in ("mlp", "down projection"))
    assert (added - projected).norm() > 0.1 * added.norm()


@pytest.mark.parametrize("pad_side", ["right", "left"])
def test_padding_beyond_the_sliding_window_is_harmless_in_bf16(gemma, pad_side):
    batch = tokenize(gemma, ["A", "A cat sat on the mat, they say. " * 2], pad_side=pad_side)
    values = harvest(gemma, batch, HOOKS[0], compute="bfloat16")[HOOKS[0]][batch.real]
    expected = harvest(gemma, batch, HOOKS[0], compute="float32")[HOOKS[0]][batch.real]
    assert (values - expected).norm() < 0.05 * expected.norm()


def test_bos_and_padding_are_dropped_and_every_other_token_is_kept(gemma, batch):
    """S2.7, S2.9: each vector belongs to a known token; none to BOS or padding."""
    lengths = [len(ids) for ids in gemma.tokenizer(list(TEXTS), add_special_tokens=False).input_ids]
    assert batch.n_real == sum(lengths) < batch.tokens.numel() - len(TEXTS)
    hook = HOOKS[0]
    values = harvest(gemma, batch, hook)[hook][batch.real]
    alone = [tokenize(gemma, text) for text in TEXTS]
    rows = [harvest(gemma, one, hook)[hook][0, 1:] for one in alone]
    assert [len(row) for row in rows] == lengths
    assert torch.allclose(values, torch.cat(rows), atol=1e-4)


# --------------------------------------------------------------------------- from text to a spliced
# SAE of one's own


@pytest.fixture(scope="module")
def text(gemma):
    """Windows to train on, and others that are not trained on."""
    words = " ".join(TEXTS).split()
    generator = torch.Generator().manual_seed(0)
    documents = [
        " ".join(words[i] for i in torch.randint(len(words), (40,), generator=generator))
        for _ in range(60)
    ]
    return pack(gemma, documents[:45], length=32), pack(gemma, documents[45:], length=32)


def untrained(gemma, hook, seed=0):
    metadata = {"hook_name": hook, "model_name": model_name(gemma), "model_key": model_key(gemma)}
    return build_sae("topk", WIDTH, 64, k=4, seed=seed, metadata=metadata)


@pytest.fixture(scope="module")
def trained(gemma, text):
    """Four SAEs, one a site, trained together on one pass of the model."""
    config = TrainingConfig(40_000, batch=256, lr=3e-3)
    return train(
        {hook: untrained(gemma, hook) for hook in HOOKS},
        ModelSource(gemma, text[0], HOOKS),
        config,
        progress=False,
    )


@pytest.mark.parametrize("hook", HOOKS, ids=SITES)
def test_an_sae_of_ones_own_is_saved_loaded_and_better_than_random_directions(
    gemma, text, trained, hook, tmp_path
):
    sae = load_sae(save_sae(trained[hook].sae, tmp_path / "sae"))
    assert sae_hook(sae) == hook
    check_sae(sae, gemma)
    _, unseen = text
    x = harvest(gemma, unseen, hook)[hook][unseen.real]
    atol = 1e-4 * float(x.norm(dim=1).mean())
    assert torch.allclose(trained[hook].sae.encode(x), sae.encode(x), atol=atol)
    found = evaluate_sae(gemma, sae, unseen, progress=False)
    null = evaluate_null(gemma, sae, unseen, found.l0, progress=False)
    assert found.n_tokens == unseen.n_real and found.l0 <= 4
    assert found.fvu < 0.7 * null.fvu
    assert found.kl < null.kl


@pytest.mark.parametrize("hook", HOOKS, ids=SITES)
def test_it_can_be_spliced_and_its_edits_reach_the_logits(gemma, text, trained, hook):
    sae, batch = trained[hook].sae, text[1][:4]
    options = dict(attention_mask=batch.attention.long())
    with torch.inference_mode():
        clean = gemma(batch.tokens, **options)
        with splice(gemma, sae, mask=batch.real):
            assert (gemma(batch.tokens, **options) - clean).abs().max() < 1e-4
        with splice(gemma, sae, mask=batch.real, edit=lambda features: features * 0):
            assert (gemma(batch.tokens, **options) - clean).abs().max() > 1e-2


def test_the_trainer_sees_real_tokens_and_nothing_else(gemma, text, trained):
    """A vector of BOS among the training vectors would be by far the longest, and pull the mean
    towards itself."""
    hook, batch = HOOKS[0], text[0]
    x = harvest(gemma, batch, hook)[hook]
    real, every = x[batch.real], x[batch.attention]
    centre = trained[hook].trained.centre
    assert (real.mean(0) - every.mean(0)).norm() > 0.02 * real.norm(dim=1).mean()
    assert torch.allclose(centre, real.mean(0), atol=0.01 * float(real.norm(dim=1).mean()))


def test_an_sae_of_the_down_projection_does_not_pass_for_one_of_the_mlp_stream(
    gemma, trained, model
):
    sae = trained[SITES["down projection"][0]].sae
    with pytest.raises(SAEMismatch):
        check_sae(sae, model)  # GPT-2
    assert sae_hook(sae) != stream_hook(gemma, LAYER, "mlp")
