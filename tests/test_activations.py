"""TokenBatch and harvest: what counts as a token, and that what is harvested is what the model
computed."""

import inspect
import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_tokenizer

from lenslab import capture
from lenslab.capture import BadActivations, TooLargeForMemory, harvest, texts_per_pass
from lenslab.hooks import UnknownHook, check_unhooked, hook_names, stream_hook
from lenslab.models import load_model
from lenslab.store import ActivationStore
from lenslab.tokens import TokenBatch, pack, tokenize

TEXTS = ["A cat sat on the mat.", "def add(a, b):", "Paris", "2 + 2 = 4, they say, and so it is."]


@pytest.fixture(scope="module")
def llama(llama_folder):
    return load_model(str(llama_folder), device="cpu")


@pytest.fixture(scope="module")
def olmoe(olmoe_folder):
    return load_model(str(olmoe_folder), device="cpu")


@pytest.fixture(scope="module")
def one_end(gpt2_shared_end_folder):
    return load_model(str(gpt2_shared_end_folder), device="cpu")


@pytest.fixture(params=["gpt2", "gpt2 with one special token", "llama", "olmoe"])
def any_model(request, model, one_end, llama, olmoe):
    return {"gpt2": model, "gpt2 with one special token": one_end, "llama": llama, "olmoe": olmoe}[
        request.param
    ]


# Harvest: the values


def test_every_hook_gives_what_run_with_cache_gives(any_model):
    """W1.1: names that say pre and post. The names filter, the early stop and the batch change no
    value."""
    batch = tokenize(any_model, TEXTS[:1])
    with torch.inference_mode():
        _, cache = any_model.run_with_cache(batch.tokens)
    for hook, shape in hook_names(any_model).items():
        if hook.startswith("rotary"):
            continue  # cosines and sines: no activations
        value = harvest(any_model, batch, hook, compute="float32")[hook]
        expected = cache[hook].float()
        if shape[0] == 2:
            expected = expected.unflatten(0, batch.tokens.shape)
        torch.testing.assert_close(
            value, expected, atol=1e-5, rtol=1e-4, msg=lambda m, h=hook: f"{h}: {m}"
        )


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_batched_equals_single_at_every_real_token(any_model, pad_side):
    """W4.3: the same text gave 56.7 in a batch and 4.7 alone."""
    hooks = [
        stream_hook(any_model, 1),
        "blocks.1.hook_resid_pre",
        "blocks.0.hook_attn_out",
        "blocks.1.attn.hook_z",
    ]
    batch = tokenize(any_model, TEXTS, pad_side=pad_side)
    together = harvest(any_model, batch, hooks, compute="float32", batch_size=3)
    for row, text in enumerate(TEXTS):
        alone = harvest(any_model, tokenize(any_model, text), hooks, compute="float32")
        for hook in hooks:
            torch.testing.assert_close(
                together[hook][row][batch.attention[row]],
                alone[hook][0],
                atol=1e-5,
                rtol=0,
                msg=hook,
            )
            assert not together[hook][row][~batch.attention[row]].any(), "padding is zero"


def test_batch_size_and_company_change_nothing(model):
    hook = stream_hook(model, 2)
    batch = tokenize(model, TEXTS)
    whole = harvest(model, batch, hook, compute="float32", batch_size=16)[hook]
    for size in (1, 2, 3):
        torch.testing.assert_close(
            harvest(model, batch, hook, compute="float32", batch_size=size)[hook], whole
        )
    torch.testing.assert_close(
        harvest(model, batch[1:3], hook, compute="float32")[hook], whole[1:3]
    )


def test_the_input_of_a_block_is_the_output_of_the_one_before(any_model):
    """W1.1: hidden_states[k] is the input of block k; here the names say so."""
    batch = tokenize(any_model, TEXTS)
    found = harvest(
        any_model, batch, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"], compute="float32"
    )
    assert torch.equal(found["blocks.0.hook_resid_post"], found["blocks.1.hook_resid_pre"])
    parts = [
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_resid_post",
    ]
    pre, attention, mlp, post = harvest(any_model, batch, parts, compute="float32").values()
    torch.testing.assert_close(pre + attention + mlp, post, atol=1e-5, rtol=1e-5)


def test_the_last_residual_is_not_yet_normalised(any_model):
    """W1.2: the last entry was normalised already and was normalised again."""
    last = any_model.cfg.n_layers - 1
    hooks = [stream_hook(any_model, last), "ln_final.hook_out", "unembed.hook_out"]
    batch = tokenize(any_model, TEXTS[:2])
    post, normed, logits = harvest(any_model, batch, hooks, compute="float32").values()
    assert not torch.allclose(post, normed, atol=1e-3)
    with torch.inference_mode():
        true = any_model(
            batch.tokens[:, : batch.tokens.shape[1]], attention_mask=batch.attention.long()
        )
        again = any_model.unembed(any_model.ln_final(post))
    real = batch.real
    torch.testing.assert_close(again[real], true[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[real], true[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stream", ["residual_pre", "residual", "attention", "mlp"])
def test_a_value_patched_into_where_it_came_from_changes_nothing(any_model, stream):
    """W1.1: a 'clean' patch into itself was no identity, because the sites were off by one."""
    hook = stream_hook(any_model, 1, stream)
    batch = tokenize(any_model, TEXTS[0])
    value = harvest(any_model, batch, hook, compute="float32")[hook]
    other = harvest(any_model, batch, stream_hook(any_model, 0, stream), compute="float32")
    with torch.inference_mode():
        clean = any_model(batch.tokens)
        patched = any_model.run_with_hooks(batch.tokens, fwd_hooks=[(hook, lambda t, hook: value)])
        wrong = any_model.run_with_hooks(
            batch.tokens, fwd_hooks=[(hook, lambda t, hook: next(iter(other.values())))]
        )
    torch.testing.assert_close(patched, clean, atol=1e-5, rtol=0)
    assert (wrong - clean).abs().max() > 1e-4, "the test can fail"


def test_edits_in_force_are_seen(model):
    hook = stream_hook(model, 1)
    batch = tokenize(model, TEXTS)
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda t, hook: t * 0)]):
        edited = harvest(model, batch, hook, compute="float32", edited=True)[hook]
    assert not torch.allclose(
        edited, harvest(model, batch, hook, compute="float32")[hook], atol=1e-3
    )


def test_patterns_are_text_head_query_key_and_sum_to_one(any_model):
    hook = "blocks.1.attn.hook_pattern"
    batch = tokenize(any_model, TEXTS)
    pattern = harvest(
        any_model, batch, [hook, stream_hook(any_model, 0)], compute="float32", batch_size=3
    )[hook]
    length = batch.tokens.shape[1]
    assert pattern.shape == (4, any_model.cfg.n_heads, length, length)
    rows = pattern.transpose(1, 2)[batch.real]
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), atol=1e-5, rtol=0)


def test_a_pattern_of_as_many_heads_as_positions_is_not_taken_for_one_value_a_token(model):
    hook, heads = "blocks.1.attn.hook_pattern", model.cfg.n_heads
    words = next(n for n in range(1, 9) if len(tokenize(model, "a" * n).tokens[0]) == heads)
    batch = tokenize(model, ["a" * words, "a"])
    assert batch.tokens.shape[1] == heads and not batch.attention.all()
    alone = harvest(model, batch[1:], hook, compute="float32")[hook][0]
    short = int(batch.attention[1].sum())
    together = harvest(model, batch, hook, compute="float32")[hook][1]
    torch.testing.assert_close(
        together[:, :short, :short], alone[:, :short, :short], atol=1e-5, rtol=0
    )


def test_routers_come_back_by_text(olmoe):
    hook = "blocks.0.mlp.gate.hook_out"
    batch = tokenize(olmoe, TEXTS)
    assert harvest(olmoe, batch, hook)[hook].shape == (*batch.tokens.shape, 4)


def test_the_run_stops_after_the_last_block_needed(model):
    """A harvest from the middle must not pay for the rest: later blocks and the logits never
    run."""
    batch, ran = tokenize(model, TEXTS), []
    watch = [(f"blocks.{k}.hook_in", lambda t, hook, k=k: ran.append(k)) for k in range(3)]
    watch += [
        (f"blocks.{k}.hook_attn_out", lambda t, hook, k=k: ran.append(f"attention {k}"))
        for k in range(3)
    ]
    watch += [("unembed.hook_in", lambda t, hook: ran.append("unembed"))]
    expected = {
        "hook_embed": [0],
        "blocks.0.hook_resid_post": [0, "attention 0"],
        "blocks.1.hook_resid_pre": [0, "attention 0", 1],
        "blocks.1.hook_in": [0, "attention 0", 1],
        "blocks.1.attn.hook_z": [0, "attention 0", 1, "attention 1"],
        "ln_final.hook_in": [0, "attention 0", 1, "attention 1", 2, "attention 2", "unembed"],
    }
    for hook, seen in expected.items():
        ran.clear()
        with model.hooks(fwd_hooks=watch):
            harvest(model, batch, hook, edited=True)
        assert ran == seen, hook


def test_harvest_leaves_no_trace_on_the_model(model):
    batch = tokenize(model, TEXTS)
    with torch.inference_mode():
        before = model(batch.tokens)
    result = harvest(model, batch, [stream_hook(model, 1), "blocks.1.attn.hook_z"])
    with torch.inference_mode():
        assert torch.equal(model(batch.tokens), before)
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    weight = torch.ones(32, requires_grad=True)
    (
        result[stream_hook(model, 1)] @ weight
    ).sum().backward()  # an inference tensor could not be trained on
    assert weight.grad is not None and not torch.is_inference_mode_enabled()


def test_bfloat16_is_close_and_comes_in_the_dtype_asked_for(model):
    hook, batch = stream_hook(model, 2), tokenize(model, TEXTS)
    exact = harvest(model, batch, hook, compute="float32")[hook]
    fast = harvest(model, batch, hook, compute="bfloat16", dtype=torch.float16)[hook]
    assert fast.dtype == torch.float16 and not torch.equal(fast.float(), exact)
    error = (fast.float() - exact)[batch.real].norm() / exact[batch.real].norm()
    assert error < 0.03


# Harvest: the refusals


def test_unknown_hooks_are_refused_with_the_nearest_name(model):
    """W1.3: the README's own layer name "6" silently became layer 0."""
    batch = tokenize(model, TEXTS)
    with pytest.raises(UnknownHook, match=r"blocks\.1\.hook_resid_post"):
        harvest(model, batch, "blocks.1.hook_resid_pots")
    for name in ("6", "blocks.-1.hook_resid_post", "blocks.3.hook_resid_post"):
        with pytest.raises(UnknownHook):
            harvest(model, batch, ["blocks.0.hook_resid_post", name])


def test_a_model_in_train_mode_is_refused(model):
    batch = tokenize(model, TEXTS)
    model.train()
    try:
        with pytest.raises(ValueError, match="train mode"):
            harvest(model, batch, stream_hook(model, 0))
    finally:
        model.eval()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_by_hook_and_text(model, value):
    def spoil(tensor, hook):
        tensor = tensor.clone()
        tensor[tokens_of_row == tensor.shape[1]] = value
        return tensor

    batch = tokenize(model, TEXTS)
    tokens_of_row = (
        batch.attention.sum(1).sort(descending=True).values
    )  # harvest runs the longest first
    longest = int(batch.attention.sum(1).argmax())
    refused = pytest.raises(
        BadActivations, match=rf"blocks\.0\.hook_resid_post of text {longest}\."
    )
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", spoil)]), refused:
        harvest(model, batch, stream_hook(model, 0), edited=True)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_values_too_large_for_float16_are_refused(model):
    batch = tokenize(model, TEXTS)
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda t, hook: t * 0 + 1e5)]):
        with pytest.raises(BadActivations, match="float16"):
            harvest(model, batch, stream_hook(model, 0), dtype=torch.float16, edited=True)
        large = harvest(model, batch, stream_hook(model, 0), edited=True)
        assert large[stream_hook(model, 0)].max() > 65_504


# Harvest: memory


def long_model(tmp_path, *, positions=8192, vocabulary=300):
    """A model of a long context or a large vocabulary, with few weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    make_tokenizer(tmp_path)
    sizes = dict(n_positions=positions, vocab_size=vocabulary, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=1, **sizes)).save_pretrained(tmp_path)
    return load_model(str(tmp_path), device="cpu")


def never(*args, **kwargs):
    pytest.fail("the model was run")


def test_more_than_the_memory_is_refused_before_the_run(model, monkeypatch):
    batch, hook = tokenize(model, TEXTS), stream_hook(model, 0)
    held = batch.tokens.numel() * 32 * 4
    monkeypatch.setattr(capture, "free_memory", lambda *device: 2 * held - 2)
    with pytest.raises(TooLargeForMemory, match=r"store=ActivationStore\.open"):
        harvest(model, batch, hook)
    with pytest.raises(TooLargeForMemory, match="shorter windows"):  # a pass needs something, too
        monkeypatch.setattr(capture, "free_memory", lambda *device: 2 * held + 2)
        harvest(model, batch, hook)
    monkeypatch.setattr(capture, "free_memory", lambda *device: 20 * held)
    harvest(model, batch, hook)


def test_a_shard_too_large_for_the_memory_is_refused_before_the_run(model, monkeypatch, tmp_path):
    batch, hook = tokenize(model, TEXTS), stream_hook(model, 0)
    store = ActivationStore.open(model, batch, hook, folder=tmp_path, texts_per_shard=4)
    monkeypatch.setattr(capture, "free_memory", lambda *device: batch.tokens.numel() * 32 * 2)
    with pytest.raises(TooLargeForMemory, match="texts_per_shard"):
        harvest(model, batch, hook, store=store)


@pytest.mark.parametrize("stored", [False, True])
def test_attention_of_one_long_text_is_refused_before_the_run(tmp_path, monkeypatch, stored):
    """W: 61,067 tokens in one window; the process was killed."""
    long = long_model(tmp_path / "model")
    batch = pack(long, "ab" * 3000, length=6001)
    hook = stream_hook(long, 0)
    store = ActivationStore.open(long, batch, hook, folder=tmp_path / "s") if stored else None
    monkeypatch.setattr(capture, "free_memory", lambda *device: 1 << 30)
    monkeypatch.setattr(capture, "_run", never)
    with pytest.raises(TooLargeForMemory, match="shorter windows"):
        harvest(long, batch, hook, store=store)


def test_passes_are_smaller_where_attention_or_logits_are_large(tmp_path, monkeypatch):
    long, wide = (
        long_model(tmp_path / "long"),
        long_model(tmp_path / "wide", positions=64, vocabulary=200_000),
    )
    hook = "blocks.0.hook_resid_post"
    batch = pack(long, "ab" * 4000, length=400)
    few = batch[: len(batch)]
    monkeypatch.setattr(capture, "free_memory", lambda *device: 1 << 40)
    scores = 4 * 4 * 2 * 400**2  # copies, bytes, heads, positions squared
    monkeypatch.setattr(capture, "PASS_BYTES", 3.5 * scores)
    assert texts_per_pass(long, few, [hook]) == texts_per_pass(long, few, limit=3) == 3
    ran = []
    with long.hooks(fwd_hooks=[("hook_embed", lambda t, hook: ran.append(len(t)))]):
        harvest(long, few, hook, edited=True)
    assert max(ran) == 3 and sum(ran) == len(few)
    sixty = tokenize(wide, ["ab" * 25] * 4)
    monkeypatch.setattr(capture, "PASS_BYTES", 2.5 * 4 * 4 * 200_000 * sixty.tokens.shape[1])
    assert texts_per_pass(wide, sixty) == 2, "logits"
    assert texts_per_pass(wide, sixty, [hook]) == 16, "the run stops before the logits"
    assert texts_per_pass(wide, sixty, ["ln_final.hook_out"]) < 3


def test_windows_are_of_1024_tokens_where_the_context_is_longer(tmp_path):
    long = long_model(tmp_path)
    assert pack(long, "ab" * 3000).tokens.shape[1] == 1024
    assert pack(long, "ab" * 3000, length=2000).tokens.shape[1] == 2000


def test_free_memory_is_read_from_this_machine():
    assert 1 << 20 < capture.free_memory() < 1 << 50


def test_wrong_settings_are_refused(model):
    batch = tokenize(model, TEXTS)
    with pytest.raises(ValueError, match="compute"):
        harvest(model, batch, stream_hook(model, 0), compute="float16")
    with pytest.raises(RuntimeError, match="left or right"):  # torch says it
        tokenize(model, TEXTS, pad_side="both")


# Harvest: hooks of others


def forget_hook(model):
    model.add_hook("blocks.0.hook_mlp_out", lambda value, hook: value * 0)


def forget_permanent_hook(model):
    model.add_hook("blocks.0.hook_mlp_out", lambda value, hook: value * 0, is_permanent=True)


def forget_watching_hook(model):
    model.add_hook("blocks.0.mlp.hook_out", partial(lambda seen, value, hook: None, []))


def forget_torch_hook(model):
    return model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output * 0)


def forget_torch_hook_inside(model):
    inside = model.original_model.get_submodule("transformer.h.0.mlp.c_fc")
    return inside.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,))


@pytest.mark.parametrize(
    "forget",
    [
        forget_hook,
        forget_permanent_hook,
        forget_watching_hook,
        forget_torch_hook,
        forget_torch_hook_inside,
    ],
)
def test_a_forgotten_hook_is_named_unless_the_caller_says_so(model, forget, tmp_path):
    batch, hook = tokenize(model, TEXTS), stream_hook(model, 1)
    harvest(model, batch, hook)  # the libraries' own hooks are there from the first run on
    store = ActivationStore.open(model, batch, hook, folder=tmp_path)
    handle = forget(model)
    try:
        for options in ({}, {"store": store}, {"store": store, "edited": True}):
            with pytest.raises(ValueError, match=r"blocks\.0\.(hook_)?mlp.* has a hook"):
                harvest(model, batch, hook, **options)
        harvest(model, batch, hook, edited=True)
    finally:
        model.reset_hooks(including_permanent=True)
        if handle:
            handle.remove()
    harvest(model, batch, hook)


def test_hooks_of_the_libraries_and_backward_hooks_are_none(any_model):
    batch = tokenize(any_model, TEXTS)
    with torch.inference_mode():
        any_model(batch.tokens)
    check_unhooked(any_model)
    handle = any_model.blocks[0].register_full_backward_hook(lambda *_: None)
    check_unhooked(any_model)
    handle.remove()


def test_hooks_are_gone_after_an_error_inside(model):
    with (
        pytest.raises(ZeroDivisionError),
        model.hooks(fwd_hooks=[("hook_embed", lambda t, hook: 1 / 0)]),
    ):
        harvest(model, tokenize(model, TEXTS), stream_hook(model, 0), edited=True)
    check_unhooked(model)


# Harvest: batches that are not of this model, and quiet misuse


def test_a_batch_of_another_tokenizer_is_refused_before_the_run(model, llama_folder, tmp_path):
    hook, batch = stream_hook(model, 0), tokenize(model, TEXTS)
    beyond, negative = batch.tokens.clone(), batch.tokens.clone()
    beyond[1, 2], negative[1, 2] = model.cfg.d_vocab, -1
    for tokens in (beyond, negative):
        with pytest.raises(ValueError, match="embedding"):
            harvest(model, replace(batch, tokens=tokens), hook)
    shutil.copytree(llama_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    other = tokenize(load_model(str(tmp_path), device="cpu"), TEXTS)
    with pytest.raises(ValueError, match="another tokenizer"):
        harvest(model, other, hook)
    same = tokenize(load_model(str(llama_folder), device="cpu"), TEXTS)
    assert same.tokenizer is not model.tokenizer
    harvest(model, same, hook)
    harvest(model, replace(batch, tokenizer=None), hook)


def test_texts_beyond_the_context_are_refused(llama):
    """Rotary positions would go on in silence."""
    tokens = torch.full((1, 65), 5)
    real = torch.ones(1, 65, dtype=torch.bool)
    batch = TokenBatch(tokens=tokens, real=real, attention=real, texts=("a",))
    with pytest.raises(ValueError, match="context 64"):
        harvest(llama, batch, stream_hook(llama, 0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_cut_values_off_are_refused(model, dtype, tmp_path):
    batch, hook = tokenize(model, TEXTS), stream_hook(model, 0)
    with pytest.raises(ValueError, match="floating-point"):
        harvest(model, batch, hook, dtype=dtype)
    with pytest.raises(ValueError, match="floating-point"):
        ActivationStore.open(model, batch, hook, dtype=dtype, folder=tmp_path)


@pytest.mark.parametrize("hooks", [[], (), {}])
def test_no_hook_at_all_is_refused(model, hooks, tmp_path):
    batch = tokenize(model, TEXTS)
    with pytest.raises(ValueError, match="hook"):
        harvest(model, batch, tuple(hooks))
    with pytest.raises(ValueError, match="hook"):
        ActivationStore.open(model, batch, tuple(hooks), folder=tmp_path)


def test_swapped_arguments_say_what_comes_where(model):
    batch, unchecked = tokenize(model, TEXTS), inspect.unwrap(harvest)  # without the tests' types
    hook = stream_hook(model, 0)
    for arguments in ((batch, model, hook), (model, TEXTS, hook), (model, hook, batch)):
        with pytest.raises(TypeError, match="TokenBatch"):
            unchecked(*arguments)


# Harvest: padding and NaN of attention


@pytest.mark.parametrize("pad_side", ["left", "right"])
@pytest.mark.parametrize("hook", ["hook_pattern", "hook_attn_scores"])
def test_attention_at_padding_is_zero(any_model, hook, pad_side):
    hook, batch = f"blocks.1.attn.{hook}", tokenize(any_model, TEXTS, pad_side=pad_side)
    value = harvest(any_model, batch, hook)[hook]
    assert not value.transpose(1, 2)[~batch.attention].any()


@pytest.mark.parametrize("hook", ["hook_pattern", "hook_attn_scores"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_attention_is_refused(model, hook, value):
    hook, batch = f"blocks.1.attn.{hook}", tokenize(model, TEXTS[:1])
    spoil = [(hook, lambda t, hook: t.index_fill(2, torch.tensor([2]), value))]
    with model.hooks(fwd_hooks=spoil), pytest.raises(BadActivations, match="attn"):
        harvest(model, batch, hook, edited=True)


def test_a_text_padded_on_the_left_has_its_values_in_bfloat16(model):
    """Padding before it sees no key at all, and its NaN would reach the text."""
    hook, texts = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", ["a", "A cat sat on the mat."]
    left, right = (tokenize(model, texts, pad_side=side) for side in ("left", "right"))
    values = harvest(model, left, hook, compute="bfloat16")[hook][left.real]
    exact = harvest(model, right, hook)[hook][right.real]
    assert (values - exact).norm() < 0.03 * exact.norm()
