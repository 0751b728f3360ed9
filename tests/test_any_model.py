"""Any model: a Gemma 3 folder goes from text to a trained, saved, loaded, evaluated and spliced
SAE, as GPT-2 does."""

import contextlib
import io
import os

import pytest
import torch
from conftest import TEXTS, make_tokenizer

from lenslab.capture import harvest
from lenslab.circuits.interventions import splice
from lenslab.hooks import UnknownHook, stream_hook
from lenslab.models import load_model, model_key, model_name, summarize
from lenslab.sae.controls import evaluate_null
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.inputs import SAEMismatch, check_sae, sae_hook
from lenslab.sae.load import load_sae
from lenslab.sae.save import save_sae
from lenslab.sae.train.architectures import build_sae
from lenslab.sae.train.convert import from_saelens
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
    windows = [pack(gemma, part, length=32) for part in (documents[:45], documents[45:])]
    return *windows, documents


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
    unseen = text[1]
    x = harvest(gemma, unseen, hook)[hook][unseen.real]
    atol = 1e-4 * float(x.norm(dim=1).mean())
    assert torch.allclose(trained[hook].sae.encode(x), sae.encode(x), atol=atol)
    found = evaluate_sae(gemma, sae, unseen)
    null = evaluate_null(gemma, sae, unseen, found.l0)
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


# The whole of S2 (an SAE on the output of Gemma's down-projection), by one changed name

PIPELINE = """
import torch

from lenslab.circuits.interventions import splice
from lenslab.models import load_model
from lenslab.sae.evaluate import evaluate_sae
from lenslab.sae.load import load_sae
from lenslab.sae.save import save_sae
from lenslab.sae.train import ModelSource, TrainingConfig, build_sae, train
from lenslab.texts import load_texts
from lenslab.tokens import generate, pack

model, texts = load_model("gemma-3-1b-it"), load_texts("my-texts.txt")
hook = f"blocks.{model.cfg.n_layers // 2}.mlp.out.hook_out"  # what the down-projection gives
source = ModelSource(model, pack(model, texts[::2], length=128), hook)  # without BOS and padding
width, about = source.widths[hook], {"hook_name": hook}
options = dict(sparsity=0.1, scale="unit", centre=False, metadata=about)
config = TrainingConfig(3e6, batch=512, lr=3e-3, warm_up=0.1, floor=0.5)
new = {"down": build_sae("relu", width, 8 * width, **options)}
result = train(new, source, config, folder="runs/down", log_dir="runs/logs")["down"]
sae = load_sae(save_sae(result.sae, "runs/down-sae"))
scores = evaluate_sae(model, sae, pack(model, texts[1::2], length=128))
feature = torch.tensor([int(scores.firing_rate.argmax())])
edits = {
    "untouched": None,
    "ablated": lambda features: features.index_fill(-1, feature, 0),
    "amplified": lambda features: features.index_copy(-1, feature, 8 * features[..., feature]),
    "set": lambda features: features.index_fill(-1, feature, 3 * float(features.max())),
}
for name, edit in edits.items():
    with splice(model, sae, edit=edit):
        print(name, generate(model, "A cat", max_new_tokens=8))
"""


@pytest.fixture(scope="module")
def pipeline(gemma_folder, text, tmp_path_factory):
    """What the snippet leaves, run with the folder's name in the place of the hub's, on a text of
    one's own and for fewer vectors."""
    folder = tmp_path_factory.mktemp("pipeline")
    documents = [document.replace("\n", " ") for document in text[2]]
    (folder / "my-texts.txt").write_text("\n\n".join(documents))
    code = PIPELINE.replace("gemma-3-1b-it", str(gemma_folder)).replace("3e6", "30_000")
    code = code.replace("length=128", "length=32")  # of 64 that this model reads
    names, before, printed = {}, os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, names)
    finally:
        os.chdir(before)
    return names | {"printed": printed.getvalue(), "folder": folder}


def test_s2_runs_by_one_changed_name_and_learns(pipeline):
    model, sae, scores = pipeline["model"], pipeline["sae"], pipeline["scores"]
    assert sae_hook(sae) == SITES["down projection"][0] and scores.d_sae == 8 * WIDTH
    assert sae.cfg.normalize_activations == "constant_norm_rescale"
    history = pipeline["result"].history
    assert history["fvu"].iloc[-1] < 0.5 * history["fvu"].iloc[0]
    assert history["lr"].iloc[-1] == pytest.approx(0.5 * 3e-3, rel=0.02)  # the cosine's floor
    held_out = pipeline["texts"][1::2]
    null = evaluate_null(model, sae, pack(model, held_out, length=32), scores.l0)
    assert scores.fvu < 0.7 * null.fvu and 0 < scores.l0 < 8 * WIDTH / 2
    assert any((pipeline["folder"] / "runs/logs/down").iterdir())  # TensorBoard
    assert [line.split()[0] for line in pipeline["printed"].splitlines() if "A cat" in line] == [
        "untouched",
        "ablated",
        "amplified",
        "set",
    ]


def test_s2_edits_do_what_they_say_and_nothing_else(pipeline, text):
    """What is written to the hook differs from what stood there by the edited feature's own
    direction, times how much it was changed, times the norm that was taken away."""
    model, sae, batch = pipeline["model"], pipeline["sae"], text[1][:4]
    hook, feature = sae_hook(sae), int(pipeline["feature"])
    options, written = dict(attention_mask=batch.attention.long()), []
    value = harvest(model, batch, hook, compute="float32")[hook]
    active = sae.encode(value)[..., feature]  # [text, pos]
    largest = 3 * float(sae.encode(value).max())
    expected = {"untouched": active, "ablated": 0 * active, "amplified": 8 * active}
    expected["set"] = torch.full_like(active, largest)
    size = value.norm(dim=-1, keepdim=True) / WIDTH**0.5
    clean = model(batch.tokens, **options)
    assert active[batch.real].max() > 0
    for name, edit in pipeline["edits"].items():
        written.clear()
        keep = [(hook, lambda value, hook: written.append(value))]
        with torch.inference_mode(), splice(model, sae, edit=edit), model.hooks(fwd_hooks=keep):
            logits = model(batch.tokens, **options)
        moved = (expected[name] - active)[..., None] * sae.W_dec[feature] * size
        assert torch.allclose(written[0], value + moved, atol=1e-4 * float(written[0].norm()))
        assert ((logits - clean).abs().max() > 1e-3) == (name != "untouched")
    assert torch.equal(model(batch.tokens, **options), clean)  # the layer is the model's own again


def test_s2_saes_of_another_layer_or_model_are_refused_wherever_they_are_given(
    pipeline, gemma, gemma_folder, text, model, tmp_path
):
    batch, mine = text[1], pipeline["sae"]
    with pytest.raises(SAEMismatch, match="made for"):
        evaluate_sae(model, mine, batch)  # GPT-2
    with pytest.raises(SAEMismatch, match="made for"), splice(model, mine):
        pass
    beyond = load_sae(save_sae(mine, tmp_path / "sae"))
    beyond.cfg.metadata.hook_name = "blocks.7.mlp.out.hook_out"
    with pytest.raises(UnknownHook, match=r"blocks\.7"):
        evaluate_sae(gemma, beyond, batch)
    with pytest.raises(UnknownHook, match=r"blocks\.7"), splice(gemma, beyond):
        pass
    inner = load_sae(tmp_path / "sae")
    inner.cfg.metadata.hook_name = "blocks.1.mlp.out.hook_in"  # 48 wide
    with pytest.raises(SAEMismatch, match="width 32"):
        evaluate_sae(gemma, inner, batch)
    with pytest.raises(SAEMismatch, match="width 32"), splice(gemma, inner):
        pass
    start, config = from_saelens(mine, sparsity=0.1), TrainingConfig(256, batch=256)
    for source in (ModelSource(gemma, text[0], HOOKS[0]), ModelSource(model, batch, HOOKS[0])):
        with pytest.raises(ValueError, match=r"meant for model_|no hook_name"):
            train({"down": start}, source, config, progress=False)
