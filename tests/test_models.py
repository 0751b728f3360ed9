"""Loading: what is loaded computes what Hugging Face computes, and what cannot be loaded says
why."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_tokenizer

from lenslab.capture import harvest
from lenslab.circuits.streams import head_scores, token_bits
from lenslab.files import BUNDLED, data_path
from lenslab.hooks import UnknownHook, check_hooks, hook_names, hook_table, stream_hook
from lenslab.models import (
    NotAModel,
    load_model,
    model_key,
    model_name,
    parameter_table,
    random_twin,
    summarize,
)
from lenslab.tokens import generate, tokenize

TEXTS = ["The river froze early that year.", "def add(a, b):\n    return a + b", "Yes."]


def reference_logits(folder, row):
    """Hugging Face alone, one text, no padding: [pos, vocabulary]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([row])).logits[0]


@pytest.mark.parametrize("which", ["gpt2", "llama", "olmoe", "switch", *BUNDLED])
@pytest.mark.parametrize("pad_side", ["single", "right", "left"])
def test_logits_equal_hugging_face(which, pad_side, request):
    if which in BUNDLED:
        folder, model = data_path("models", which), load_model(which)
    else:
        folder = request.getfixturevalue(f"{which}_folder")
        model = load_model(folder)
    rows = [
        [model.tokenizer.bos_token_id, *model.tokenizer(t, add_special_tokens=False).input_ids]
        for t in TEXTS
    ]
    width, pad = max(map(len, rows)), model.tokenizer.pad_token_id
    with torch.inference_mode():
        if pad_side == "single":
            ours = [model(torch.tensor([row]))[0] for row in rows]
        else:
            left = [width - len(row) if pad_side == "left" else 0 for row in rows]
            tokens, mask = (
                torch.full((len(rows), width), pad),
                torch.zeros(len(rows), width, dtype=torch.long),
            )
            for i, row in enumerate(rows):
                tokens[i, left[i] : left[i] + len(row)] = torch.tensor(row)
                mask[i, left[i] : left[i] + len(row)] = 1
            logits = model(tokens, attention_mask=mask)
            ours = [logits[i, left[i] : left[i] + len(row)] for i, row in enumerate(rows)]
    for row, value in zip(rows, ours, strict=True):
        expected = reference_logits(folder, row)
        assert (value - expected).abs().max() < 1e-4
        assert expected.std() > 0.01  # a constant would agree with anything


def test_loaded_model_is_in_eval_mode_with_patterns_that_sum_to_one(model):
    assert not model.training
    tokens = model.to_tokens("A cat sat")
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens)
    pattern = cache["blocks.1.attn.hook_pattern"]
    assert torch.allclose(pattern.sum(-1), torch.ones_like(pattern.sum(-1)), atol=1e-5)
    assert pattern.triu(1).abs().max() == 0  # causal


def test_summary_counts_what_is_there(model, gpt2_folder):
    config = json.loads((gpt2_folder / "config.json").read_text())
    summary = summarize(model)
    d, layers, vocabulary = config["n_embd"], config["n_layer"], config["vocab_size"]
    block = 12 * d * d + 13 * d  # attention 4 d^2 + 4 d, MLP 8 d^2 + 5 d, two LayerNorms 4 d
    assert summary.block_parameters == layers * block
    assert summary.embedding_parameters == (vocabulary + config["n_positions"]) * d
    assert summary.parameters == summary.block_parameters + summary.embedding_parameters + 2 * d
    assert summary.parameters == parameter_table(model)["count"].sum()
    assert (summary.layers, summary.heads, summary.tied_embeddings) == (
        layers,
        config["n_head"],
        True,
    )
    assert "layers" in summary.to_frame().index


def test_parameter_table_of_one_layer_holds_that_layer_only(model):
    table = parameter_table(model, layer=1)
    assert len(table) == 12 and table["parameter"].str.contains(".1.", regex=False).all()
    assert not table["parameter"].str.contains("_original_component").any()


def test_random_twin_has_the_shape_but_not_the_weights(model):
    twin, again, other = random_twin(model), random_twin(model), random_twin(model, seed=1)
    assert summarize(twin).parameters == summarize(model).parameters
    assert model_key(twin) == model_key(again) != model_key(other)
    assert model_key(twin) != model_key(model)
    assert "twin" in model_name(twin)


def test_a_twin_has_the_spread_of_an_untrained_model_and_the_same_bits_on_other_instructions(
    gpt2_folder, model
):
    twin = random_twin(model)
    fresh = type(model.original_model)(model.original_model.config).state_dict()
    weights = {
        n.replace("._original_component", ""): p for n, p in twin.original_model.named_parameters()
    }
    both = fresh.keys() & weights.keys()
    assert len(both) > 20
    for name in both:
        begins, weight = fresh[name], weights[name]
        torch.testing.assert_close(weight.std(), begins.std(), rtol=0.06, atol=0.0)
        torch.testing.assert_close(weight.mean(), begins.mean(), rtol=0, atol=0.005)
    code = "import sys; from lenslab.models import *\n"
    code += "print(model_key(random_twin(load_model(sys.argv[1]))))"
    plain = os.environ | {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", code, str(gpt2_folder)]
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.stdout.strip() == model_key(twin), done.stderr[-1000:]


def test_twin_for_whole_notebooks_is_chosen_by_the_environment(gpt2_folder, model, monkeypatch):
    monkeypatch.setenv("LENSLAB_MODEL_TWIN", "1")
    twin = load_model(gpt2_folder)
    assert model_key(twin) == model_key(random_twin(model))
    assert model_name(twin) == model_name(model)  # an SAE made for the model must still be accepted


def test_model_key_follows_the_weights(gpt2_folder):
    model = load_model(gpt2_folder)
    before = model_key(model)
    assert before == model_key(load_model(gpt2_folder))
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert model_key(model) != before


def test_weights_in_bfloat16_are_called_so_and_so_are_the_twins(gpt2_folder):
    model = load_model(gpt2_folder, dtype=torch.bfloat16)
    for one in (model, random_twin(model)):
        assert summarize(one).dtype == "bfloat16" and one.cfg.dtype == torch.bfloat16
        assert {p.dtype for p in one.original_model.parameters()} == {torch.bfloat16}


def test_a_model_goes_by_the_name_it_was_loaded_by_whatever_transformer_lens_calls_it(
    gpt2_folder, tmp_path
):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2-small")
    assert model_name(load_model(folder)) == "gpt2-small"


def test_model_from_the_environment(gpt2_folder, monkeypatch):
    monkeypatch.setenv("LENSLAB_MODEL", str(gpt2_folder))
    assert model_name(load_model()) == gpt2_folder.name


def test_every_listed_hook_can_be_captured(model):
    names = hook_names(model)
    assert {
        "blocks.0.hook_resid_pre",
        "blocks.2.hook_resid_post",
        "blocks.1.attn.hook_pattern",
    } <= set(names)
    assert names["blocks.1.hook_resid_post"] == (1, 2, model.cfg.d_model)
    seen = []
    model.run_with_hooks(
        model.to_tokens("A"), fwd_hooks=[(n, lambda v, hook: seen.append(hook.name)) for n in names]
    )
    assert len(seen) >= len(names)
    assert len(hook_table(model, layer=1)) < len(hook_table(model))


def test_unknown_hook_is_refused_with_the_nearest(model):
    with pytest.raises(UnknownHook, match=r"blocks\.1\.hook_resid_post"):
        check_hooks(model, ["blocks.1.hook_residpost"])
    with pytest.raises(UnknownHook, match="3 layers"):
        check_hooks(model, ["blocks.7.hook_resid_post"])


def test_who_asks_for_the_router_is_told_where_it_is(olmoe_folder):
    moe = load_model(olmoe_folder)
    for asked in ("blocks.1.mlp.hook_router", "router_logits", "blocks.0.hook_experts"):
        with pytest.raises(UnknownHook, match=r"Nearest: blocks\.0\.mlp\.gate\.hook_out\."):
            check_hooks(moe, [asked])


@pytest.mark.parametrize("layer", [-1, np.int64(-1), 3, True])
def test_layers_outside_the_model_are_refused(model, layer):
    """W1.3: a layer given as "6" silently became layer 0."""
    with pytest.raises(UnknownHook, match="3 layers, from 0"):
        stream_hook(model, layer)
    assert stream_hook(model, np.int64(1)) == stream_hook(model, 1)


def test_streams_add_up(model):
    """What the residual stream is: each block adds its attention and its MLP (W1.1: pre is not
    post)."""
    with torch.inference_mode():
        _, cache = model.run_with_cache(model.to_tokens("A cat sat on the mat."))
    for layer in range(model.cfg.n_layers):
        pre, attention, mid, mlp, post = (
            cache[stream_hook(model, layer, s)]
            for s in ("residual_pre", "attention", "residual_mid", "mlp", "residual")
        )
        assert torch.allclose(pre + attention, mid, atol=1e-5) and torch.allclose(
            mid + mlp, post, atol=1e-5
        )
        assert not torch.allclose(pre, post, atol=1e-3)


@pytest.fixture(scope="module")
def encoder_decoder_folder(tmp_path_factory):
    """A random Switch as published: an encoder of three blocks, a decoder of two, four experts in
    some of them."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    folder = tmp_path_factory.mktemp("switch-base")
    make_tokenizer(folder)
    config = SwitchTransformersConfig(
        vocab_size=300,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=3,
        num_decoder_layers=2,
        num_experts=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=1,
        decoder_start_token_id=2,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(3)
    SwitchTransformersForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_an_encoder_decoder_computes_what_hugging_face_computes(encoder_decoder_folder):
    from transformers import AutoModelForSeq2SeqLM

    model = load_model(encoder_decoder_folder)
    read, written = model.to_tokens(TEXTS[0]), model.to_tokens(TEXTS[1])
    reference = AutoModelForSeq2SeqLM.from_pretrained(encoder_decoder_folder).eval()
    options = dict(output_hidden_states=True, output_router_logits=True)
    with torch.inference_mode():
        expected = reference(read, decoder_input_ids=written, **options)
        logits, cache = model.run_with_cache(read, decoder_input=written)
    assert logits.shape[1] == written.shape[1] != read.shape[1]
    assert torch.allclose(logits, expected.logits, atol=1e-5) and expected.logits.std() > 0.01
    for stack, layer in (("encoder", 1), ("decoder", 1)):
        stream = cache[f"{stack}_blocks.{layer}.hook_resid_pre"]
        assert torch.allclose(stream, expected[f"{stack}_hidden_states"][layer], atol=1e-5)
    gates = [name for name in hook_names(model) if name.endswith("mlp.gate.hook_out")]
    assert {name.split("_")[0] for name in gates} == {"encoder", "decoder"}
    for name in gates:
        assert cache[name].shape[1:] == ((read if "enc" in name else written).shape[1], 4)
        assert (cache[name].sum(-1) == 1).all()  # the expert that was chosen
    summary = summarize(model)
    assert (summary.experts, summary.d_mlp) == (4, 48)
    assert summary.parameters == sum(p.numel() for p in reference.parameters())
    assert model_key(random_twin(model)) == model_key(random_twin(model)) != model_key(model)


def test_what_needs_a_decoder_only_refuses_an_encoder_decoder(encoder_decoder_folder):
    """TransformerLens would shift the text and give it to the decoder, one token late."""
    model = load_model(encoder_decoder_folder)
    batch = tokenize(model, TEXTS)
    for measure in (
        lambda: generate(model, "A cat"),
        lambda: harvest(model, batch, "decoder_blocks.1.hook_resid_post"),
        lambda: head_scores(model),
        lambda: token_bits(model, batch),
        lambda: stream_hook(model, 1),
    ):
        with pytest.raises(ValueError, match="is an encoder-decoder"):
            measure()


@pytest.mark.parametrize("stack", ["encoder_blocks", "decoder_blocks"])
def test_both_parts_of_an_encoder_decoder_are_held_against_hugging_face(
    encoder_decoder_folder, monkeypatch, stack
):
    from lenslab import loading

    computed = loading._computed

    def wrong(*arguments):
        values = computed(*arguments)
        name = f"{stack}.1.hook_resid_pre"
        return values | {name: values[name] + 1}

    monkeypatch.setattr(loading, "_computed", wrong)
    with pytest.raises(NotAModel, match=f"{stack}.*otherwise than Hugging Face"):
        load_model(encoder_decoder_folder)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(NotAModel, match=r"config\.json"):
        load_model(tmp_path)
    with pytest.raises(NotAModel, match="no folder"):
        load_model(tmp_path / "missing")


def test_a_folder_without_weights_or_with_a_pickle(gpt2_folder, tmp_path):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(gpt2_folder / file, tmp_path)
    with pytest.raises(NotAModel, match="no weights"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(NotAModel, match="pickle"):
        load_model(tmp_path)


def test_a_cut_off_download(gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(NotAModel, match="cut-off"):
        load_model(tmp_path / "cut")


def test_a_hub_name_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotAModel, match=r"HF_HUB_OFFLINE.*hf download nobody/no-such-model"):
        load_model("nobody/no-such-model")
    with pytest.raises(NotAModel, match="Did you mean 'pocket-gpt'"):
        load_model("pocket-gtp")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_how_to_get_at_it(monkeypatch, status):
    import httpx
    from huggingface_hub.errors import GatedRepoError

    def gated(url, **options):
        response = httpx.Response(status, request=httpx.Request("HEAD", url))
        raise GatedRepoError("Cannot access", response=response)

    monkeypatch.setattr("lenslab.opening.get_hf_file_metadata", gated)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    licence = r"licence on https://huggingface\.co/google/gemma-3-1b-pt .* as HF_TOKEN\."
    with pytest.raises(NotAModel, match=licence) as refused:
        load_model("gemma-3-1b")
    assert "hf_none" not in str(refused.value)


def test_a_folder_without_tokenizer(gpt2_folder, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(gpt2_folder / file, tmp_path)
    with pytest.raises(NotAModel, match="tokenizer"):
        load_model(tmp_path)


def test_tinystories_tells_a_story(shared):
    """A trained model of another architecture, from a local folder."""
    model = load_model(shared / "fixtures" / "tinystories-656k")
    text = generate(model, "Once upon a time, there was a little", max_new_tokens=30)
    assert (
        len(text.split()) > 20
        and generate(random_twin(model), "Once upon a time", max_new_tokens=5) != text
    )


def test_bundled_weights_that_are_not_those_of_their_card_are_refused(tmp_path, monkeypatch):
    for name in BUNDLED:
        shutil.copytree(data_path("models", name), tmp_path / "models" / name)
    for module in ("loading", "opening"):
        place = f"lenslab.{module}.data_path"
        monkeypatch.setattr(place, lambda *parts: tmp_path.joinpath(*parts))
    load_model("pocket-gpt")
    weights = tmp_path / "models" / "pocket-gpt" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(NotAModel, match="git checkout -- data/models/pocket-gpt"):
        load_model("pocket-gpt")


def test_an_architecture_that_transformer_lens_does_not_know_is_refused(tmp_path):
    from transformers import CTRLConfig, CTRLLMHeadModel

    make_tokenizer(tmp_path)
    config = CTRLConfig(vocab_size=300, n_positions=64, n_embd=32, dff=64, n_layer=2, n_head=4)
    CTRLLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(NotAModel, match="TransformerLens has no adapter for CTRL"):
        load_model(tmp_path)
