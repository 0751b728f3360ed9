"""The findings of phase 1: measured right where the answer is known."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import save_random

from lenslab.capture import harvest
from lenslab.circuits import streams
from lenslab.circuits.streams import (
    context_similarity,
    head_scores,
    repeated_tokens,
    stream_profile,
    token_bits,
)
from lenslab.features.activations import top_tokens
from lenslab.hooks import UnknownHook, stream_hook
from lenslab.models import load_model
from lenslab.texts import load_probes, load_texts
from lenslab.tokens import generate, tokenize

TEXTS = ["A cat sat on the mat.", "The mat is on the cat.", "2 + 2 = 4"]


def test_streams_add_up_and_the_control_fails(model):
    profile = stream_profile(model, tokenize(model, TEXTS))
    assert profile.sum_error.max() < 1e-6 < 1e-2 < profile.sum_error_without_mlp.min()
    assert profile.index.tolist() == list(range(model.cfg.n_layers))


def test_first_position_is_read_where_the_text_starts(model):
    """BOS, on either side of the padding; the rest never includes it."""
    right, left = (
        stream_profile(model, tokenize(model, TEXTS, pad_side=side)) for side in ("right", "left")
    )
    assert np.allclose(right.first_position, left.first_position, rtol=1e-4)
    assert np.allclose(right.residual, left.residual, rtol=1e-4)
    name = "blocks.0.hook_resid_post"
    alone = harvest(model, tokenize(model, TEXTS[0]), name)[name][0]
    one = stream_profile(model, tokenize(model, TEXTS[0]))
    assert np.isclose(one.first_position[0], alone[0].norm(), rtol=1e-4)
    assert np.isclose(one.residual[0], alone[1:].norm(dim=-1).mean(), rtol=1e-4)
    assert not np.isclose(one.first_position[0], one.residual[0], rtol=1e-4)


def test_two_largest_share_of_a_planted_vector(model, monkeypatch):
    """A huge value planted in two dimensions of every BOS must show as a share near one there,
    nowhere else."""

    def planted(*args, **options):
        values = harvest(*args, **options)
        if "blocks.2.hook_resid_post" in values:
            values["blocks.2.hook_resid_post"][:, 0, :2] = 1e4
        return values

    monkeypatch.setattr(streams, "harvest", planted)
    profile = stream_profile(model, tokenize(model, TEXTS))
    assert profile.two_largest_first[2] > 0.99 and profile.two_largest_rest[2] < 0.9
    assert profile.two_largest_first[1] < 0.9


def test_context_similarity_is_one_where_context_is_ignored(model, monkeypatch):
    batch = tokenize(model, TEXTS)
    plain = context_similarity(model, batch, 1)
    constant = torch.randn(
        model.cfg.d_vocab, model.cfg.d_model, generator=torch.Generator().manual_seed(0)
    )

    def ignoring(model, batch, hooks, **options):
        return harvest(model, batch, hooks, **options) | {
            "blocks.1.hook_mlp_out": constant[batch.tokens]
        }

    monkeypatch.setattr(streams, "harvest", ignoring)
    planted = context_similarity(model, batch, 1)
    assert planted.loc["mlp", "same token"] == pytest.approx(1, abs=1e-5)
    assert abs(planted.loc["mlp", "other token"]) < 0.5
    assert plain.loc["mlp", "same token"] < 0.999
    with pytest.raises(ValueError, match="two texts"):
        context_similarity(model, tokenize(model, ["A cat"]), 1)


def test_context_similarity_is_a_mean_over_pairs_of_tokens_in_different_texts(model):
    batch = tokenize(model, TEXTS)
    name = "blocks.1.hook_mlp_out"
    x = harvest(model, batch, name)[name].double()
    unit = torch.nn.functional.normalize(x - x[batch.real].mean(0), dim=-1)
    real = batch.real.nonzero().tolist()
    same, other = {}, []
    for i, p in real:
        for j, q in real:
            cosine, token = float(unit[i, p] @ unit[j, q]), int(batch.tokens[i, p])
            if i != j and token == batch.tokens[j, q]:
                same.setdefault(token, []).append(cosine)
            elif i != j:
                other.append(cosine)
    row = context_similarity(model, batch, 1).loc["mlp"]
    assert row["same token"] == pytest.approx(np.mean([np.mean(c) for c in same.values()]))
    assert row["other token"] == pytest.approx(np.mean(other)) and row["tokens"] == len(same)


@pytest.mark.parametrize(
    "run",
    [
        head_scores,
        lambda model: token_bits(model, tokenize(model, TEXTS[:1])),
        lambda model: generate(model, "A cat", max_new_tokens=2),
        lambda model: stream_profile(model, tokenize(model, TEXTS[:1])),
    ],
    ids=["head_scores", "token_bits", "generate", "stream_profile"],
)
def test_a_model_in_train_mode_is_refused(model, run):
    model.train()
    try:
        with pytest.raises(ValueError, match="train mode"):
            run(model)
    finally:
        model.eval()


def test_repeated_tokens_repeat_and_hold_no_special_token(model):
    tokens = repeated_tokens(model, n=3, length=10)
    assert tokens.shape == (3, 21)
    assert torch.equal(tokens[:, 1:11], tokens[:, 11:])
    assert (tokens[:, 0] == model.tokenizer.bos_token_id).all()
    assert not torch.isin(tokens[:, 1:], torch.tensor(model.tokenizer.all_special_ids)).any()
    assert repeated_tokens(model, n=2, length=1000).shape[1] <= model.cfg.n_ctx


def test_head_scores_tell_planted_heads_apart_by_what_they_do(gpt2_folder):
    """Heads of layer 1 made to look at what defines their kind, whatever its distance: 0 at the
    token before, 1 at earlier places of the same token, 2 at what followed it there, 3 at BOS."""
    model = load_model(gpt2_folder)
    seen = []
    model.hook_dict["embed.hook_in"].add_hook(lambda tokens, hook: seen.append(tokens))

    def plant(pattern, hook):
        tokens = seen[-1]  # [text, pos]
        alike = (tokens[:, :, None] == tokens[:, None]).tril(-1).float()  # [text, query, key]
        pattern[:, 0] = torch.diag(torch.ones(tokens.shape[1] - 1), diagonal=-1)
        pattern[:, 1] = alike
        pattern[:, 2] = alike.roll(1, dims=-1)
        pattern[:, 3] = 0
        pattern[:, 3, :, 0] = 1
        return pattern / pattern.sum(-1, keepdim=True).clamp(min=1)

    model.blocks[1].attn.hook_pattern.add_hook(plant)
    scores = head_scores(model, n=4, length=12)
    assert len(seen[-1]) == 4 and torch.equal(seen[-1][:, 1:13], seen[-1][:, 13:])
    kinds = ("previous_token", "duplicate_token", "induction", "first_position")
    for head, kind in enumerate(kinds):
        layer, best, weight = scores.best(kind)
        assert (layer, best) == (1, head) and weight > 0.9
        others = [getattr(scores, other)[1, head] for other in kinds if other != kind]
        assert max(others) < 0.1
        assert getattr(scores, kind)[0].max() < 0.5


@pytest.mark.parametrize("side", ["right", "left"])
def test_heads_that_look_back_in_text_only_are_found_on_text(gpt2_folder, side, monkeypatch):
    """Head 0 of layer 1 looks at the token before where the two stand together in the texts."""
    model = load_model(gpt2_folder)
    batch = tokenize(model, TEXTS, pad_side=side)
    plain = head_scores(model, batch, n=4, length=12)
    pairs = {
        (int(a), int(b))
        for row, there in zip(batch.tokens, batch.attention, strict=True)
        for a, b in zip(row[there][:-1], row[there][1:], strict=True)
    }
    seen = []
    model.hook_dict["embed.hook_in"].add_hook(lambda tokens, hook: seen.append(tokens))

    def plant(pattern, hook):
        pattern[:, :2] = 0
        for row, tokens in enumerate(seen[-1].tolist()):
            for query in range(1, len(tokens)):
                if (tokens[query - 1], tokens[query]) in pairs:
                    pattern[row, 0, query, query - 1] = 1
        return pattern

    model.blocks[1].attn.hook_pattern.add_hook(plant, is_permanent=True)
    monkeypatch.setattr(streams, "harvest", partial(harvest, edited=True))
    scores = head_scores(model, batch, n=4, length=12)
    assert scores.best("previous_token_on_text") == (1, 0, 1.0)
    assert scores.previous_token[1, 0] < 0.2
    alone = head_scores(load_model(gpt2_folder), n=4, length=12)
    assert np.array_equal(alone.induction, plain.induction)
    assert alone.previous_token_on_text is None


def test_scores_on_text_are_means_over_real_tokens(model):
    batch = tokenize(model, TEXTS)
    scores = head_scores(model, batch, n=2, length=10)
    weights = []
    for text in TEXTS:
        tokens = tokenize(model, text).tokens
        with torch.inference_mode():
            pattern = model.run_with_cache(tokens)[1]["blocks.2.attn.hook_pattern"][0, 3]
        weights += pattern.diagonal(-1)[1:].tolist()  # from the second token after BOS on
    assert scores.previous_token_on_text[2, 3] == pytest.approx(np.mean(weights), rel=1e-4)


def test_losses_of_the_two_copies_leave_out_what_nothing_announces(model):
    scores, tokens = head_scores(model, n=3, length=12), repeated_tokens(model, n=3, length=12)
    with torch.inference_mode():
        logs = model(tokens).log_softmax(-1)
    nats = [-logs[range(3), p - 1, tokens[:, p]].mean().item() for p in range(1, 25)]
    assert scores.loss_first == pytest.approx(np.mean(nats[:11]), rel=1e-5)
    assert scores.loss_second == pytest.approx(np.mean(nats[13:]), rel=1e-5)


def test_token_bits_equal_the_models_own_loss(model):
    batch = tokenize(model, TEXTS)
    bits = token_bits(model, batch)
    for row, text in enumerate(TEXTS):
        tokens = tokenize(model, text).tokens
        with torch.inference_mode():
            expected = model(tokens, return_type="loss").item() / np.log(2)
        assert bits[row] == pytest.approx(expected, rel=1e-4)


def test_shuffled_bits_are_those_of_the_same_tokens_in_another_order(model):
    batch = tokenize(model, TEXTS)
    shuffled = token_bits(model, batch, shuffle=True)
    assert not np.allclose(shuffled, token_bits(model, batch), rtol=1e-5)
    assert np.array_equal(shuffled, token_bits(model, batch, shuffle=True))
    one = tokenize(model, "A")  # one token has one order
    assert one.tokens.shape == (1, 2) and np.array_equal(
        token_bits(model, one, shuffle=True), token_bits(model, one)
    )


def test_top_tokens_rank_and_never_show_padding(model):
    batch = tokenize(model, TEXTS)
    value = torch.zeros(batch.tokens.shape)
    value[0, 3], value[1, 2], value[2, -1], value[:, 0] = (
        2.0,
        5.0,
        9.0,
        99.0,
    )  # BOS everywhere; the end of the shortest is padding
    assert not batch.real[2, -1]
    found = top_tokens(batch, value)
    assert found["activation"].tolist() == [5.0, 2.0] and found["text"].tolist() == [1, 0]
    assert f"«{batch.strings(1)[2]}»" in found["context"][0]
    assert top_tokens(batch, value, skip=[1])["text"].tolist() == [0]


def test_probes_are_found_and_a_missing_set_names_those_that_exist():
    probes = load_probes()
    assert (probes.groupby("category").size() == 4).all() and probes["text"].is_unique
    with pytest.raises(FileNotFoundError, match="first_look"):
        load_probes("nonesuch")


def test_texts_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": ""}\n')
    assert load_texts(tmp_path) == ["one", "two", "three"] and load_texts(tmp_path, limit=1) == [
        "one"
    ]
    (tmp_path / "c.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl"):
        load_texts(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_texts(tmp_path / "missing")


PARALLEL = {"Phi"}  # attention and MLP read the same stream
FAMILIES = {
    "Phi": {},
    "Gemma2": {"head_dim": 8, "sliding_window": 16},  # norms after attention and MLP
    "Olmo2": {},  # likewise
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_streams_add_up_in_every_family_and_what_is_not_there_is_refused(tmp_path, kind):
    model = load_model(save_random(tmp_path / f"tiny-{kind.lower()}", kind, **FAMILIES[kind]))
    batch = tokenize(model, TEXTS)
    profile = stream_profile(model, batch)
    assert profile.sum_error.max() < 1e-5 < 1e-4 < profile.sum_error_without_mlp.min()
    assert np.isfinite(context_similarity(model, batch, 1)).all(axis=None)
    scores = head_scores(model, n=2, length=10)
    assert scores.induction.shape == (2, 4) and np.isfinite(scores.loss_second)
    if kind in PARALLEL:
        with pytest.raises(UnknownHook, match="hook_resid_mid"):
            stream_hook(model, 0, "residual_mid")


def test_texts_of_one_token_have_no_previous_one(model):
    with pytest.raises(ValueError, match="long enough"):
        head_scores(model, tokenize(model, ["a", "b"]), n=2, length=10)
