"""Routing as every family decides it: ids, weights and experts give the layer's output by formulas
written out here, whatever the batch and the padding; what is not known is refused by name."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import TEXTS, make_tokenizer
from torch.nn import functional

from lenslab.files import NotAModel, data_path
from lenslab.models import load_model
from lenslab.moe import experts as experts_of
from lenslab.moe import routing as moe
from lenslab.texts import load_probes
from lenslab.tokens import pack, tokenize

SMALL = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, max_position_embeddings=64)
SMALL |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
LOCAL = SMALL | dict(num_local_experts=6, num_experts_per_tok=3)
MIXED = SMALL | dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=8)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
ROUTED = SMALL | dict(n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
ROUTED |= dict(n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
DEEPSEEK = ROUTED | LATENT | dict(num_key_value_heads=4)
FULL = dict(layer_types=["full_attention"] * 3)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_expand=2)
SWITCH = dict(d_model=32, d_kv=8, d_ff=24, num_layers=4, num_decoder_layers=4, num_heads=4)
SWITCH |= dict(num_experts=6, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2)
SWITCH |= dict(pad_token_id=2, eos_token_id=1, decoder_start_token_id=2, expert_capacity=5)
LLM, SEQ = "ForCausalLM", "ForConditionalGeneration"
FAMILIES = {  # name -> (class, config, the config's class where it is another, what is odd)
    "olmoe": ("Olmoe" + LLM, SMALL | dict(num_experts=6, num_experts_per_tok=3)),
    "olmoe, normed": ("Olmoe" + LLM, MIXED | dict(norm_topk_prob=True)),
    "qwen2_moe": ("Qwen2Moe" + LLM, MIXED | dict(mlp_only_layers=[0])),
    "qwen3_moe": ("Qwen3Moe" + LLM, MIXED | dict(norm_topk_prob=True, mlp_only_layers=[1])),
    "deepseek_v2": ("DeepseekV2" + LLM, DEEPSEEK | dict(routed_scaling_factor=2.0)),
    "mixtral": ("Mixtral" + LLM, LOCAL),
    "gpt_oss": ("GptOss" + LLM, LOCAL | dict(head_dim=8, sliding_window=8)),
    "granite": ("GraniteMoe" + LLM, LOCAL),
    "granite 4": (
        "GraniteMoeHybrid" + LLM,
        LOCAL | MAMBA | dict(layer_types=["attention"] * 3, position_embedding_type="rope"),
    ),
    "gemma 4": (
        "Gemma4" + LLM,
        MIXED
        | dict(enable_moe_block=True, top_k_experts=3, global_head_dim=8, sliding_window=8)
        | dict(num_global_key_value_heads=2, hidden_size_per_layer_input=0),
        "Gemma4TextConfig",
    ),
    "qwen3.5": ("Qwen3_5Moe" + LLM, MIXED | FULL | dict(shared_expert_intermediate_size=16)),
    "lfm2": ("Lfm2Moe" + LLM, MIXED | FULL | dict(num_dense_layers=1)),
    "glm 4": ("Glm4Moe" + LLM, ROUTED | dict(head_dim=8)),
    "glm 4, lite": (
        "Glm4MoeLite" + LLM,
        DEEPSEEK | dict(mlp_layer_types=["dense", "sparse", "sparse"]),
    ),
    "moonlight": ("DeepseekV3" + LLM, DEEPSEEK),
    "nemotron": (
        "NemotronH" + LLM,
        ROUTED | dict(layers_block_type=["attention", "moe", "attention"], head_dim=8),
    ),
    "ernie": (
        "Ernie4_5_Moe" + LLM,
        SMALL | dict(moe_num_experts=6, moe_k=3, moe_intermediate_size=24),
    ),
    "switch encoder": ("SwitchTransformers" + SEQ, SWITCH),
    "switch decoder": ("SwitchTransformers" + SEQ, SWITCH),
}
NAMED = ("olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "mixtral", "gpt_oss")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """(model, stack) of a family: random, with matrices large enough that experts matter."""
    made = {}

    def make(name: str):
        kind, config, *other = FAMILIES[name]
        key = "switch" if "switch" in name else name
        if key not in made:
            made[key] = save_and_load(tmp_path_factory.mktemp("family"), kind, config, *other)
        return made[key], name.split()[1] if key == "switch" else ""

    return make


@torch.no_grad()
def save_and_load(folder, kind, config, config_class=None):
    make_tokenizer(folder)
    whole = getattr(transformers, kind)
    config_class = getattr(transformers, config_class) if config_class else whole.config_class
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    model = whole(config_class(vocab_size=vocabulary, **config))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=0.15)
        if "per_expert_scale" in name:
            parameter.uniform_(0.5, 2)
    for name, buffer in model.named_buffers():
        if "bias" in name:  # of the choice, in families that choose by more than the logits
            buffer.normal_(std=0.2)
    model.save_pretrained(folder)
    return load_model(str(folder))


def by_hand(experts, expert, x):
    """What one expert makes of `[token, d]`, as its family writes it."""
    kind = type(experts).__name__
    if kind == "SwitchTransformersExperts":
        dense = experts[f"expert_{expert}"]
        return dense.wo.weight @ dense.act(dense.wi.weight @ x.T)
    if kind == "NemotronHExperts":
        return experts.down_proj[expert] @ experts.act_fn(experts.up_proj[expert] @ x.T)
    if kind == "GptOssExperts":
        both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = (
            both[:, ::2].clamp(max=experts.limit),
            both[:, 1::2].clamp(-experts.limit, experts.limit),
        )
        hidden = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
        return (hidden @ experts.down_proj[expert] + experts.down_proj_bias[expert]).T
    gate, up = (experts.gate_up_proj[expert] @ x.T).chunk(2)
    return experts.down_proj[expert] @ (experts.act_fn(gate) * up)


def experts_run(model, experts, batch, stack):
    """(what the experts read, what they write) at real tokens, in Hugging Face's forward pass."""
    caught = []
    handle = experts.register_forward_hook(lambda _, args, output: caught.extend((args[0], output)))
    tokens = dict(input_ids=batch.tokens, attention_mask=batch.attention.long())
    both = {f"decoder_{key}": value for key, value in tokens.items()} if stack else {}
    model.original_model(**tokens, **both, use_cache=False)
    handle.remove()
    return [value[batch.real.flatten()] for value in caught]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_ids_and_weights_recombine_to_what_the_experts_write(family, name):
    model, stack = family(name)
    batch = tokenize(model, TEXTS)
    found = moe.capture_routing(model, batch, stack=stack, inputs=True)
    for index, (number, layer) in enumerate(moe.sparse_layers(model, stack).items()):
        x, written = experts_run(model, layer.experts, batch, stack)
        ids, weights = (
            torch.tensor(found.ids[:, index]).long(),
            torch.tensor(found.weights[:, index]),
        )
        whole = torch.zeros_like(written)
        for expert in range(found.n_experts):
            gate = (weights * (ids == expert)).sum(1, keepdim=True)
            whole += gate * by_hand(layer.experts, expert, x).T
        assert torch.allclose(whole, written, atol=1e-5), (name, number)
        assert written.abs().max() > 1e-3
        parts = experts_of.expert_contributions(model, batch, number, stack)
        assert torch.allclose(parts.sum(1), written, atol=1e-5)
        first = ids[:, 0] >= 0
        apart = [
            by_hand(layer.experts, e, x[[t]])[:, 0] * weights[t, 0]
            for t, e in enumerate(ids[:, 0].tolist())
            if e >= 0
        ]
        assert torch.allclose(parts[first, 0], torch.stack(apart), atol=1e-5)
        logits = torch.tensor(found.logits[:, index])
        if "gemma" not in name:
            weight = layer.projection.weight
            bias = getattr(layer.projection, "bias", None)
            read = torch.tensor(found.inputs[:, index])
            assert torch.allclose(functional.linear(read, weight, bias), logits, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_logits_and_rank_k_is_the_k_th_largest_weight(family, name):
    model, stack = family(name)
    found = moe.capture_routing(model, tokenize(model, TEXTS), stack=stack)
    logits, ids = torch.tensor(found.logits), torch.tensor(found.ids).long()
    assert (np.diff(found.weights, axis=2) <= 0).all()
    assert float(logits.min()) < 0 and float((logits.sum(-1) - 1).abs().min()) > 1e-4
    p = (
        logits.softmax(-1)
        if moe.SCORES[
            moe.FAMILY.fullmatch(
                type(next(iter(moe.sparse_layers(model, stack).values())).router).__name__
            )[1]
        ]
        is torch.exp
        else logits.sigmoid()
    )
    p = p.gather(-1, ids.clamp(min=0))
    if name in ("olmoe", "qwen2_moe", "switch encoder", "switch decoder"):
        expected = p.where(ids >= 0, 0)
    elif name == "deepseek_v2":
        expected = 2 * p
    elif name == "lfm2":
        expected = p / (p.sum(-1, keepdim=True) + 1e-6)
    elif name == "gemma 4":
        scale = torch.stack(
            [layer.router.per_expert_scale for layer in moe.sparse_layers(model).values()]
        )
        expected = p / p.sum(-1, keepdim=True) * scale[torch.arange(len(scale))[:, None], ids]
    else:
        config = model.original_model.config
        expected = p / p.sum(-1, keepdim=True) * getattr(config, "routed_scaling_factor", 1)
    assert torch.allclose(expected.detach(), torch.tensor(found.weights), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_neither_the_other_texts_nor_padding_change_a_routing(family, name):
    model, stack = family(name)
    texts = [*TEXTS, TEXTS[0]]
    whole = moe.capture_routing(model, tokenize(model, texts), stack=stack)
    left = moe.capture_routing(model, tokenize(model, texts, pad_side="left"), stack=stack)
    for field in ("ids", "position", "token", "text"):
        assert np.array_equal(getattr(whole, field), getattr(left, field))
    assert np.allclose(whole.weights, left.weights, atol=1e-5)
    for number, text in enumerate(texts):
        alone = moe.capture_routing(model, tokenize(model, [text]), stack=stack)
        assert np.array_equal(alone.ids, whole.ids[whole.text == number])
        assert np.allclose(alone.logits, whole.logits[whole.text == number], atol=1e-4)


SHARED = {"qwen2_moe": "shared_expert", "deepseek_v2": "shared_experts"}


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "mixtral", "gpt_oss", *SHARED])
@torch.no_grad()
def test_with_shared_experts_contributions_sum_to_the_layers_output(family, name):
    model, _ = family(name)
    batch, caught = tokenize(model, TEXTS), {}
    number = max(moe.sparse_layers(model))
    block = f"model.layers.{number}.mlp"
    for where, module in model.original_model.named_modules():
        plain = where.replace("._original_component", "")
        if plain in (block, f"{block}.shared_expert", f"{block}.shared_experts"):
            hook = lambda m, args, out, plain=plain: caught.update({plain: (args, out)})  # noqa: E731
            module.register_forward_hook(hook)
        if plain == f"{block}.shared_expert_gate":
            hook = lambda m, args, out: caught.update({"gate": out.sigmoid()})  # noqa: E731
            module.register_forward_hook(hook)
    model.original_model(batch.tokens, attention_mask=batch.attention.long(), use_cache=False)
    for module in model.original_model.modules():
        for key in [k for k, h in module._forward_hooks.items() if h.__module__ == __name__]:
            del module._forward_hooks[key]
    output = caught[block][1]
    output = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)
    if name in SHARED:
        output = output - (caught[f"{block}.{SHARED[name]}"][1] * caught.get("gate", 1)).reshape(
            output.shape
        )
    parts = experts_of.expert_contributions(model, batch, number)
    assert torch.allclose(parts.sum(1), output[batch.real.flatten()], atol=1e-5)


def test_an_expert_of_switch_that_is_full_takes_nobody(family):
    model, _ = family("switch encoder")
    batch = tokenize(model, TEXTS)
    found = moe.capture_routing(model, batch, stack="encoder")
    full = found.ids[:, :, 0] < 0
    assert 0 < full.mean() < 0.5 and (found.weights[:, :, 0][full] == 0).all()
    parts = experts_of.expert_contributions(model, batch, found.layers[0], "encoder")
    assert (parts[full[:, 0]] == 0).all()
    assert found.layers == (1, 3)
    for stack in ("", "both"):
        with pytest.raises(ValueError, match=r"one of \('encoder', 'decoder'\)"):
            moe.capture_routing(model, batch, stack=stack)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron", "switch decoder"])
@torch.no_grad()
def test_neurons_of_an_expert_give_its_contribution(family, name):
    model, stack = family(name)
    batch = tokenize(model, TEXTS)
    found = moe.capture_routing(model, batch, stack=stack, logits=False)
    assert found.logits is None
    number = found.layers[0]
    experts = moe.sparse_layers(model, stack)[number].experts
    parts = experts_of.expert_contributions(model, batch, number, stack)
    for expert in np.unique(found.ids[:, 0][found.ids[:, 0] >= 0])[:2].tolist():
        neurons = experts_of.expert_neurons(model, batch, number, expert, stack)
        sent = (found.ids[:, 0] == expert).any(1)
        assert (neurons[~sent] == 0).all() and sent.any()
        if name == "gpt_oss":
            out = neurons @ experts.down_proj[expert] + experts.down_proj_bias[expert]
        elif stack:
            out = experts[f"expert_{expert}"].wo(neurons)
        else:
            out = neurons @ experts.down_proj[expert].T
        token, rank = (found.ids[:, 0] == expert).nonzero()
        weights = torch.tensor(found.weights[token, 0, rank])[:, None]
        assert torch.allclose(out[token] * weights, parts[token, rank], atol=1e-5)
    with pytest.raises(ValueError, match="Expert 6 is out of range: 0 to 5"):
        experts_of.expert_neurons(model, batch, number, 6, stack)
    with pytest.raises(moe.NoRouting, match="Layer 9 has no router"):
        experts_of.expert_contributions(model, batch, 9, stack)


@pytest.fixture(scope="module")
def olmoe(family):
    return family("olmoe")[0]


@pytest.fixture(scope="module")
def found(olmoe):
    return moe.capture_routing(olmoe, tokenize(olmoe, TEXTS), inputs=True)


# What is refused


def test_a_dense_model_is_refused_by_name(model):
    with pytest.raises(moe.NoRouting, match=r"GPT2LMHeadModel\) is dense: it has no layer with"):
        moe.capture_routing(model, tokenize(model, TEXTS))


def test_an_unknown_router_is_refused_with_what_was_found(olmoe, monkeypatch):
    monkeypatch.delitem(moe.SCORES, "Olmoe")
    with pytest.raises(
        moe.NoRouting, match="OlmoeExperts and, as router, OlmoeTopKRouter: unknown"
    ):
        moe.capture_routing(olmoe, tokenize(olmoe, TEXTS))


def test_probabilities_in_the_place_of_logits_and_other_weights_are_refused(olmoe, monkeypatch):
    batch = tokenize(olmoe, TEXTS)
    router = moe.sparse_layers(olmoe)[0].router
    forward = router.forward

    def probabilities(x):
        logits, weights, ids = forward(x)
        return logits.softmax(-1), weights, ids

    monkeypatch.setattr(router, "forward", probabilities)
    with pytest.raises(moe.NoRouting, match="gives probabilities where it says logits"):
        moe.capture_routing(olmoe, batch)
    monkeypatch.setattr(
        router, "forward", lambda x: (forward(x)[0], forward(x)[1].sqrt(), forward(x)[2])
    )
    with pytest.raises(moe.NoRouting, match="weights do not follow from its logits"):
        moe.capture_routing(olmoe, batch)


def test_granite_4_without_rotary_positions_is_refused_by_name(tmp_path):
    """TransformerLens cannot run it: `load_model` says so before anything is read of it."""
    kind, config = FAMILIES["granite 4"]
    with pytest.raises(NotAModel, match="no adapter for GraniteMoeHybridForCausalLM"):
        save_and_load(tmp_path, kind, config | dict(position_embedding_type=None))


def test_a_model_in_train_mode_or_with_a_hook_is_refused(olmoe):
    batch = tokenize(olmoe, TEXTS)
    olmoe.train()
    with pytest.raises(ValueError, match="train mode"):
        moe.capture_routing(olmoe, batch)
    olmoe.eval()
    handle = moe.sparse_layers(olmoe)[0].router.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has a hook"):
        moe.capture_routing(olmoe, batch)
    handle.remove()
    moe.capture_routing(olmoe, batch)


def test_experts_out_of_range_and_no_token_are_refused(found):
    with pytest.raises(ValueError, match="Expert 6 is out of range: 0 to 5"):
        replace(found, ids=np.where(found.ids == 0, 6, found.ids))
    with pytest.raises(ValueError, match="Expert -2 is out of range"):
        replace(found, ids=np.where(found.ids == 0, -2, found.ids))
    with pytest.raises(ValueError, match="of one token or more"):
        found[found.token < 0]


def test_a_row_of_padding_alone_never_becomes_a_batch(olmoe):
    batch = tokenize(olmoe, TEXTS)
    real = batch.real.clone()
    real[2] = False
    with pytest.raises(ValueError, match=r"Nothing but BOS and padding in text \[2\]"):
        replace(batch, real=real)


# Tables and files


def test_tables_hold_every_token_layer_and_rank(olmoe, found):
    table, batch = found.to_frame(), tokenize(olmoe, TEXTS)
    assert len(table) == batch.n_real * 3 * 3
    assert table.iloc[4].tolist() == pytest.approx(
        [0, 1, int(batch.tokens[0, 1]), 1, 2, found.ids[0, 1, 1], found.weights[0, 1, 1]]
    )
    words = pd.crosstab([table["layer"], table["token"]], table["expert"], normalize="index")
    token = int(found.token[0])
    own = found[found.token == token]
    slots = (own.ids[:, 2] == 4).sum()
    assert words.loc[2, token][4] == pytest.approx(slots / (3 * len(own.token)))
    assert len(words) == 3 * len(np.unique(found.token))


@pytest.mark.parametrize("pad_side", ["right", "left"])
def test_predictions_are_those_of_each_text_alone(olmoe, found, pad_side):
    batch = tokenize(olmoe, TEXTS, pad_side=pad_side)
    table = moe.predictions(olmoe, batch)
    assert table["token"].tolist() == found.token.tolist()
    assert table["text"].tolist() == found.text.tolist()
    alone = tokenize(olmoe, TEXTS[2])
    with torch.no_grad():
        log_p = olmoe(alone.tokens)[0].log_softmax(-1)
    rows = table[table["text"] == 2]
    assert rows["predicted"].tolist() == log_p.argmax(-1)[1:].tolist()
    assert rows["probability"].to_numpy() == pytest.approx(
        log_p.max(-1).values[1:].exp().numpy(), abs=1e-5
    )
    loss = -log_p[1:-1].gather(1, alone.tokens[0, 2:, None])[:, 0].numpy()
    assert rows["loss"][:-1].to_numpy() == pytest.approx(loss, abs=1e-5)
    assert np.isnan(rows["loss"].iloc[-1])


def test_the_loss_of_a_documents_last_token_is_not_that_of_the_next_document(olmoe):
    windows = pack(olmoe, TEXTS * 3, length=24)
    found = moe.predictions(olmoe, windows)
    row = 0
    for text, real in enumerate(windows.real):
        logits = olmoe(windows.tokens[[text]])[0].log_softmax(-1)
        for pos in real.nonzero()[:, 0].tolist():
            follows = pos + 1 < len(real) and bool(real[pos + 1])
            loss = -float(logits[pos, windows.tokens[text, pos + 1]]) if follows else np.nan
            assert found["loss"][row] == pytest.approx(loss, abs=1e-3, nan_ok=True)
            row += 1
    assert row == len(found) and found["loss"].isna().sum() > len(windows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_holds_everything_and_states_what_its_dtype_costs(found, tmp_path, dtype):
    error = found.save(tmp_path / "routing.safetensors", dtype)
    back = moe.load_routing(tmp_path / "routing.safetensors")
    for name in ("ids", "text", "position", "token", "layers", "n_experts", "model"):
        assert np.array_equal(getattr(back, name), getattr(found, name)), name
    for name in moe.FLOATS:
        assert np.abs(getattr(back, name) - getattr(found, name)).max() == pytest.approx(
            error[name]
        )
    assert (error["logits"] == 0) == (dtype == torch.float32)
    large = replace(found, logits=found.logits * 1e6)
    if dtype == torch.float16:
        with pytest.raises(ValueError, match=r"logits are too large for torch.float16"):
            large.save(tmp_path / "large.safetensors", dtype)


def test_a_parquet_file_holds_what_was_captured_exactly(found, tmp_path):
    found.to_frame().to_parquet(tmp_path / "routing.parquet")
    table = pd.read_parquet(tmp_path / "routing.parquet")
    assert table["weight"].dtype == np.float32
    assert np.array_equal(table["weight"], found.weights.ravel())
    assert np.array_equal(table["expert"], found.ids.ravel())


def test_the_routing_of_checkpoints_ends_in_that_of_the_model_and_is_of_its_texts_only():
    model = load_model("pocket-moe")
    texts = load_probes("first_look")["text"].tolist()
    batch = tokenize(model, texts, max_length=256, truncate=True)
    path = data_path("models", "pocket-moe", "routing.parquet")
    steps = moe.training_routing(path, batch)
    last, now = steps[max(steps)], moe.capture_routing(model, batch)
    assert len(steps) == 17 and last.layers == now.layers
    assert np.array_equal(last.token, now.token) and np.array_equal(last.position, now.position)
    assert (
        last.ids == now.ids
    ).mean() > 0.99  # it was recorded before the weights were rounded to bfloat16
    assert np.abs(last.weights - now.weights).mean() < 0.001
    assert (steps[0].ids[..., 0] == now.ids[..., 0]).mean() < 0.5
    for other in (batch[:20], tokenize(model, [*texts[:-1], "Another text."])):
        with pytest.raises(ValueError, match="is a trace of other texts"):
            moe.training_routing(path, other)
