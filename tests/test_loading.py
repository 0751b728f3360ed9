"""What must not load in silence: weights that are not the config's, modules that compute something
else, tokens without an embedding; and keys that follow what a model computes."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import SMALL, make_tokenizer, save_random
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from lenslab.capture import harvest
from lenslab.files import BUNDLED, REPOSITORY, data_path
from lenslab.hooks import by_token, check_hooks, hook_names, vector_width
from lenslab.models import (
    NotAModel,
    check_ids,
    load_model,
    model_key,
    random_twin,
    summarize,
    weights_key,
)
from lenslab.tokens import tokenize


def changed(folder, target, edit=lambda weights: weights, **config):
    """A copy of a folder with other weights or another config."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    file = target / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    told = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(told))
    return target


def renamed(prefix):
    return lambda weights: {prefix + name: value for name, value in weights.items()}


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def as_type(dtype):
    return lambda weights: {name: (100 * value).to(dtype) for name, value in weights.items()}


def one_letter(weights):
    value = weights.pop("transformer.h.1.mlp.c_fc.weight")
    return weights | {"transformer.h.1.mlp.c_fb.weight": value}


def twice(name):
    return lambda weights: weights | {name: 2 * weights["transformer.h.1.mlp.c_fc.weight"]}


def own_head(rows):
    return lambda weights: weights | {"lm_head.weight": torch.randn(rows, 32)}


@pytest.mark.parametrize(
    ("edit", "config", "told"),
    [
        (renamed("_orig_mod."), {}, r"missing in the file.*unknown to the config \(_orig_mod"),
        (renamed("module."), {}, r"unknown to the config \(module"),
        (without(".h.1."), {}, r"missing in the file \(transformer\.h\.1"),
        (without("h.2.ln_1.bias"), {}, r"1 missing in the file \(transformer\.h\.2\.ln_1\.bias"),
        (dict, {"n_layer": 4}, r"missing in the file \(transformer\.h\.3"),
        (dict, {"n_layer": 2}, r"unknown to the config \(transformer\.h\.2"),
        (dict, {"n_inner": 64}, r"of another shape \(transformer\.h\.0\.mlp"),
        (dict, {"tie_word_embeddings": False}, r"missing in the file \(lm_head"),
        (one_letter, {}, r"missing in the file.*c_fb"),
        (twice("h.1.mlp.c_fc.weight"), {}, r"there twice.*h\.1\.mlp\.c_fc\.weight"),
        (twice("transformer.transformer.h.1.mlp.c_fc.weight"), {}, "there twice"),
        (own_head(301), {}, "could not be loaded|another shape"),
        (as_type(torch.int8), {}, "type I8"),
        (as_type(torch.int32), {}, "type I32"),
        (as_type(torch.float8_e4m3fn), {}, "type F8"),
        (lambda weights: {}, {}, "missing in the file"),
        (lambda w: {n: v * torch.nan for n, v in w.items()}, {}, "NaN"),
        (dict, {"scale_attn_weights": False}, "otherwise than Hugging Face"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(
    gpt2_folder, tmp_path, edit, config, told
):
    with pytest.raises(NotAModel, match=told):
        load_model(changed(gpt2_folder, tmp_path, edit, **config))


def test_masks_that_old_files_hold_are_no_fault(gpt2_folder, tmp_path):
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8)}
    same = load_model(changed(gpt2_folder, tmp_path, lambda weights: weights | mask))
    assert model_key(same) == model_key(load_model(gpt2_folder))


def test_an_index_that_names_a_pickle_is_refused(gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    index = {"weight_map": {"transformer.wte.weight": "pytorch_model-00001.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NotAModel, match=r"00001\.bin, a pickle"):
        load_model(tmp_path)


def test_an_adapter_beside_weights_is_refused(gpt2_folder, tmp_path):
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(NotAModel, match="merge_and_unload"):
        load_model(tmp_path)


def test_a_file_is_no_folder(gpt2_folder):
    with pytest.raises(NotAModel, match="give the folder"):
        load_model(gpt2_folder / "config.json")
    with pytest.raises(NotAModel, match="give the folder"):
        load_model(os.path.relpath(gpt2_folder / "config.json"))


def test_the_hub_is_asked_once_where_there_is_no_network():
    code = "import time\nfrom lenslab.models import load_model\nbegun = time.time()\n"
    code += "try:\n    load_model('no-such/model')\n"
    code += "except ValueError as error:\n    print(time.time() - begun, error)"
    kept = {name: v for name, v in os.environ.items() if not name.endswith("_OFFLINE")}
    command, nowhere = [sys.executable, "-c", code], {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, env=kept | nowhere, capture_output=True, text=True)
    seconds, message = done.stdout.split(" ", 1)
    assert float(seconds) < 5 and "no-such/model could not be loaded" in message
    assert "Retry" not in done.stderr and "thrown" not in done.stderr


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "config.json"])
def test_a_damaged_list_of_files_is_no_model(gpt2_folder, tmp_path, file):
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes(b'{"weight_map": \xff')
    with pytest.raises(NotAModel, match="could not be loaded"):
        load_model(tmp_path)


def test_a_model_of_a_short_context_loads(tmp_path):
    make_tokenizer(tmp_path)
    config = GPT2Config(vocab_size=300, n_positions=4, n_embd=32, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert load_model(tmp_path).cfg.n_ctx == 4


def test_a_head_that_the_config_ties_is_used_and_told(gpt2_folder, tmp_path):
    rows = load_model(gpt2_folder).cfg.d_vocab
    with pytest.warns(UserWarning, match="its config ties"):
        model = load_model(changed(gpt2_folder, tmp_path, own_head(rows)))
    assert not summarize(model).tied_embeddings


def test_cohere_is_refused_in_every_precision(tmp_path):
    folder = save_random(tmp_path, "Cohere", initializer_range=0.3)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(NotAModel, match="otherwise than Hugging Face"):
            load_model(folder, dtype=dtype)


def test_half_precision_is_near_enough(gpt2_folder):
    for dtype in (torch.bfloat16, torch.float16):
        assert summarize(random_twin(load_model(gpt2_folder, dtype=dtype))).dtype in str(dtype)


def test_any_error_of_transformer_lens_is_not_a_model(gpt2_folder, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    def fail(*arguments, **options):
        raise KeyError("h.9")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", fail)
    with pytest.raises(NotAModel, match=r"one that fails .*h\.9"):
        load_model(gpt2_folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_never_run(gpt2_folder, tmp_path, file, monkeypatch):
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    told = json.loads((tmp_path / file).read_text())
    told["auto_map"] = {
        "AutoConfig": "own.Config",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": [None, "own.Tokenizer"],
    }
    told |= {"model_type": "unheard-of"} if file == "config.json" else {"tokenizer_class": "Own"}
    (tmp_path / file).write_text(json.dumps(told))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    try:
        load_model(tmp_path)
    except NotAModel as error:
        assert "could not be loaded" in str(error)
    assert not ran.exists()


def halved(model):
    next(model.original_model.parameters()).data.mul_(0.5)


def swapped_rows(model):
    weight = next(model.original_model.parameters()).data
    weight[[0, 1]] = weight[[1, 0]].clone()


def replaced(model):
    parameter = next(model.original_model.parameters())
    parameter.data = parameter.data + 1


def one_bias(model):
    biases = [p for n, p in model.original_model.named_parameters() if n.endswith("bias")]
    biases[-1].data[3] += 1e-3


@pytest.mark.parametrize(
    "edit", [halved, swapped_rows, replaced, one_bias, lambda model: model.to(torch.bfloat16)]
)
def test_keys_notice_edits_past_the_version_counter(gpt2_folder, edit):
    model = load_model(gpt2_folder)
    before = model_key(model), weights_key(model)
    edit(model)
    after = model_key(model), weights_key(model)
    assert before[0] != after[0] and before[1] != after[1]


def test_the_key_follows_modules_that_were_exchanged_or_set_otherwise(gpt2_folder, llama_folder):
    model = load_model(gpt2_folder)
    key, block = model_key(model), model.original_model.transformer.h[0]
    model.run_with_cache(torch.zeros(1, 3, dtype=torch.long))
    assert model_key(model) == key == model_key(load_model(gpt2_folder))
    block.mlp.act = torch.nn.ReLU()
    assert model_key(model) != key and weights_key(model) == key.split("-")[0]
    model = load_model(llama_folder)
    key = model_key(model)
    model.original_model.model.layers[0].input_layernorm._original_component.variance_epsilon = 1.0
    assert model_key(model) != key


def test_the_key_follows_rotary_frequencies(llama_folder):
    model = load_model(llama_folder)
    before = model_key(model), weights_key(model)
    rotary = next(m for m in model.original_model.modules() if hasattr(m, "inv_freq"))
    rotary.inv_freq.data[1] *= 2
    assert model_key(model) != before[0] and weights_key(model) == before[1]
    rotary.inv_freq.data[1] /= 2
    assert model_key(model) == before[0] == model_key(load_model(llama_folder))


def test_the_key_covers_the_buffers_of_the_file(tmp_path):
    """A router's corrections choose the experts, and are no parameter."""
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    options = experts | dict(n_group=1, topk_group=1, first_k_dense_replace=1)
    folder = save_random(tmp_path / "plain", "Glm4Moe", **options)

    def corrected(weights):
        name = next(name for name in weights if "e_score_correction_bias" in name)
        return weights | {name: weights[name] + torch.tensor([0.0, 0.5, 0.0, 0.0])}

    plain, other = (load_model(f) for f in (folder, changed(folder, tmp_path / "new", corrected)))
    assert weights_key(plain) == weights_key(other) and model_key(plain) != model_key(other)
    assert model_key(plain) == model_key(load_model(folder))


def test_a_bridge_that_the_user_made_has_a_key_that_follows_weights_and_buffers(llama_folder):
    def booted():
        weights = AutoModelForCausalLM.from_pretrained(llama_folder)
        tokenizer = AutoTokenizer.from_pretrained(llama_folder)
        options = dict(hf_model=weights, tokenizer=tokenizer, device="cpu")
        return TransformerBridge.boot_transformers("tiny", **options)

    model = booted()
    key = model_key(model)
    assert key == model_key(booted()) and weights_key(model) == weights_key(
        load_model(llama_folder)
    )
    next(model.original_model.buffers()).mul_(2)
    assert model_key(model) != key and weights_key(model) == weights_key(booted())
    next(model.original_model.parameters()).data.mul_(2)
    assert weights_key(model) != weights_key(booted())


@pytest.mark.parametrize(
    "config", [{"layer_norm_epsilon": 1.0}, {"n_head": 2}, {"activation_function": "relu"}]
)
def test_keys_cover_the_config(gpt2_folder, tmp_path, config):
    plain, other = (load_model(f) for f in (gpt2_folder, changed(gpt2_folder, tmp_path, **config)))
    assert weights_key(plain) == weights_key(other) and model_key(plain) != model_key(other)


def test_bundled_models_keep_the_keys_that_their_results_were_saved_under():
    for name in BUNDLED:
        model = load_model(name)
        assert model_key(model) == weights_key(model)
    for cfg in data_path("saes").glob("pocket-gpt-resid-?/cfg.json"):
        recorded = json.loads(cfg.read_text())["metadata"]["model_key"]
        assert recorded == model_key(load_model("pocket-gpt"))


def test_a_bundled_config_that_is_not_its_cards_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "models" / "pocket-gpt"
    changed(data_path("models", "pocket-gpt"), copy, layer_norm_epsilon=1.0)
    shutil.copy(data_path("models", "pocket-gpt", "model.safetensors"), copy)
    for module in ("loading", "opening"):
        place = f"lenslab.{module}.data_path"
        monkeypatch.setattr(place, lambda *parts: tmp_path.joinpath(*parts))
    with pytest.raises(NotAModel, match="git checkout"):
        load_model("pocket-gpt")


@pytest.mark.parametrize("name", ["pocket-gtp", "pocket_gpt", "Pocket-MoE", "pocketswitch"])
def test_a_misspelt_bundled_name_is_answered_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("lenslab.opening.open_weights", None)
    with pytest.raises(NotAModel, match="Did you mean 'pocket-"):
        load_model(name)


def test_a_tilde_is_the_home_folder(gpt2_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(gpt2_folder, tmp_path / "mine")
    assert load_model("~/mine").cfg.model_name == "mine"
    for name in ("~/none", "~no-such-user/none"):
        with pytest.raises(NotAModel, match="no folder"):
            load_model(name)


def test_hooks_that_are_switched_on_later_are_found(gpt2_folder):
    model = load_model(gpt2_folder)
    assert "blocks.0.attn.hook_result" not in hook_names(model)
    model.set_use_attn_result(True)
    check_hooks(model, ["blocks.0.attn.hook_result"])


def test_two_heads_are_not_taken_for_two_tokens(tmp_path):
    """`[text, head, pos, d_head]` after the norms of queries and keys, of two heads."""
    model = load_model(save_random(tmp_path, "Qwen3", head_dim=8))
    hook, whole = "blocks.1.attn.k_norm.hook_out", "blocks.1.attn.k.hook_out"
    assert hook_names(model)[hook] == (1, 2, 2, 8)
    assert not by_token(model, hook) and by_token(model, whole)
    assert vector_width(model, whole) == 16
    with pytest.raises(ValueError, match="no vector per token"):
        vector_width(model, hook)
    texts = ["A cat sat on the mat.", "A cat"]
    batch = tokenize(model, texts)
    values = harvest(model, batch, hook)[hook]
    for i, text in enumerate(texts):
        alone = tokenize(model, text)
        expected = harvest(model, alone, hook)[hook][0]  # [head, pos, d_head]
        assert torch.allclose(values[i][:, batch.attention[i]], expected, atol=1e-5)
        assert (values[i][:, ~batch.attention[i]] == 0).all()


def test_a_model_loaded_inside_inference_mode_can_be_used_and_edited(gpt2_folder):
    with torch.inference_mode():
        model, twin = load_model(gpt2_folder), random_twin(load_model(gpt2_folder))
    for one in (model, twin):
        one(one.to_tokens("A cat")).sum().backward()
        with torch.no_grad():
            next(one.original_model.parameters()).add_(1.0)
        assert len(model_key(one)) > 16


def gpt2_with(folder, rows):
    """A GPT-2 with so many rows of its embedding, beside the tokenizer in the folder."""
    config = GPT2Config(vocab_size=rows, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    make_tokenizer(tmp_path)
    with pytest.raises(NotAModel, match=r"of 200\), from '.*', id 200"):
        load_model(gpt2_with(tmp_path, 200))


def test_an_added_token_without_embedding_is_told_and_its_id_refused(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"'<image>', id {rows}"):
        model = load_model(gpt2_with(tmp_path, rows))
    check_ids(model, model.to_tokens("A cat"))
    with pytest.raises(ValueError, match=f"'<image>', id {rows}"):
        check_ids(model, torch.tensor([[0, rows]]))


@pytest.mark.parametrize("padding", [0, 44])
def test_no_token_is_made_up_at_load(tmp_path, padding):
    """A tokenizer without BOS, EOS and PAD; with padding, TransformerLens would take an unused
    row for its made-up end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_model(gpt2_with(tmp_path, 256 + padding))
    assert len(model.tokenizer) == 256 and model.tokenizer.bos_token is None
    assert model.cfg.d_vocab == 256 + padding
    assert model.to_tokens("A cat").max() < 256


@pytest.mark.parametrize(
    ("kind", "config", "facts"),
    [
        ("Bloom", dict(n_layer=2, n_head=4), dict(activation="BloomGelu")),
        ("Falcon", {}, dict(activation="gelu")),
        ("Mpt", dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=48), dict(context=48)),
        ("Ernie4_5_Moe", dict(moe_num_experts=4, moe_k=2), dict(experts=4, experts_per_token=2)),
        ("Glm4Moe", dict(n_routed_experts=4), dict(experts=4)),
        ("Mixtral", dict(num_local_experts=4), dict(experts=4, experts_per_token=2)),
    ],
)
def test_facts_are_those_of_the_loaded_model(tmp_path, kind, config, facts):
    if kind == "Glm4Moe":
        config |= dict(num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1)
    summary = summarize(load_model(save_random(tmp_path, kind, **config)))
    assert {name: getattr(summary, name) for name in facts} == facts
    assert summary.embedding_parameters >= summary.vocabulary * SMALL["hidden_size"]
    assert summary.activation != "relu"


def test_the_table_of_architectures_is_that_of_its_script(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import architecture_table as script

    card = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    shown = card.split(script.BEGIN)[1].split(script.END)[0]
    assert [line.split("|")[1].strip() for line in shown.strip().splitlines()[2:]] == [
        family.split("For")[0].removesuffix("LMHeadModel") for family in script.FAMILIES
    ]
    assert script.row("Cohere")[1] == "refused"
    switch = script.row("SwitchTransformersForConditionalGeneration")
    assert switch[1::2] == ["loaded", "4 / 4", ""]
    assert script.row("Qwen3Moe")[1::2] == ["loaded", "3 / 1", "2"]
