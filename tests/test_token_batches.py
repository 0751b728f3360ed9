"""TokenBatch: what counts as a token, whatever the tokenizer's special ids and the side of the
padding."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save_random

from lenslab.circuits.streams import repeated_tokens
from lenslab.models import load_model, random_twin
from lenslab.tokens import (
    NoRealToken,
    TextTooLong,
    TokenBatch,
    generate,
    pack,
    token_string,
    tokenize,
)

TEXTS = ["A cat sat on the mat.", "def add(a, b):", "Paris", "2 + 2 = 4, they say, and so it is."]


@pytest.fixture(
    scope="module", params=["gpt2_folder", "gpt2_shared_end_folder", "llama_folder", "olmoe_folder"]
)
def any_model(request):
    return load_model(request.getfixturevalue(request.param))


def ids_of(model, text):
    return model.tokenizer(text, add_special_tokens=False).input_ids


# What counts as a token


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_masks_come_from_lengths_even_where_bos_is_id_0_or_the_padding(any_model, pad_side):
    """W4.3: counting ids that differ from EOS read the second-to-last token, because BOS has that
    id too."""
    batch = tokenize(any_model, TEXTS, pad_side=pad_side)
    lengths = [len(ids_of(any_model, text)) for text in TEXTS]
    assert any_model.tokenizer.bos_token_id == 0
    assert batch.real.sum(1).tolist() == lengths
    assert batch.attention.sum(1).tolist() == [n + 1 for n in lengths]
    assert batch.n_real == sum(lengths) and len(batch) == 4 and batch.pad_side == pad_side
    for row, text in enumerate(TEXTS):
        assert batch.tokens[row][batch.real[row]].tolist() == ids_of(any_model, text)
        first = int(batch.attention[row].nonzero()[0])
        assert batch.tokens[row, first] == 0 and not batch.real[row, first]
        side = 0 if pad_side == "left" else -1
        assert bool(batch.attention[row, side]) == (lengths[row] == max(lengths))
    assert (batch.tokens[~batch.attention] == any_model.tokenizer.pad_token_id).all()


def test_a_tokenizer_from_which_bos_is_taken_gets_none(gpt2_folder):
    other = load_model(gpt2_folder)
    for name in ("bos_token", "eos_token"):
        setattr(other.tokenizer, name, None)
        batch = tokenize(other, "Paris")
        assert batch.real.all() and "".join(batch.strings(0)) == "Paris"
        assert pack(other, TEXTS, length=8).real[0, 0]
        assert generate(other, "Paris", max_new_tokens=2).startswith("Paris")


def test_a_text_that_begins_with_bos_gets_no_second_one(model):
    assert torch.equal(tokenize(model, "<|bos|>Paris").tokens, tokenize(model, "Paris").tokens)


# Where BOS comes from: one policy for every way of giving texts to a model


BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
OWN = dict(bos_token=BOS, eos_token=EOS, pad_token=PAD)
TOKENIZERS = {  # architecture, names of special tokens, what the post-processor makes, BOS
    "own": ("Llama", OWN, "$A", [0]),
    "put by the post-processor": ("Llama", OWN, "<|bos|> $A", [0]),
    "EOS put as well": ("Llama", OWN, "<|bos|> $A <|eos|>", [0]),
    "one for all": ("Llama", dict.fromkeys(OWN, BOS), "$A", [0]),
    "of a family that TransformerLens gives none": ("Qwen2", OWN, "$A", [0]),
    "none": ("Llama", dict(eos_token=EOS), "$A", []),
    "null": ("Qwen2", dict(eos_token=EOS, pad_token=PAD), "$A", []),
}


@pytest.fixture(scope="module", params=TOKENIZERS.values(), ids=TOKENIZERS)
def policy(request, tmp_path_factory):
    """A model whose tokenizer's files name these special tokens, and the BOS that it should get."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    kind, names, template, start = request.param
    folder = save_random(tmp_path_factory.mktemp(f"tokens-of-{kind.lower()}"), kind)
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(BOS, 0), (EOS, 1)]
    pieces.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    PreTrainedTokenizerFast(tokenizer_object=pieces, **names).save_pretrained(folder)
    if "bos_token" not in names:
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": None}))
    return load_model(folder), start


def row_of(batch, row=0):
    return batch.tokens[row][batch.attention[row]].tolist()


def read_by(model, prompt, **options):
    """The tokens that `generate` gives the model, prompt by prompt."""
    seen = []
    with model.hooks([("embed.hook_in", lambda value, hook: seen.extend(value.tolist()))]):
        generate(model, prompt, max_new_tokens=1, **options)
    return seen


def test_bos_is_the_tokenizers_own_or_none_and_generate_reads_what_tokenize_gives(policy):
    model, start = policy
    cat = ids_of(model, "A cat")
    texts = ["A cat", f"\n{BOS}A", f"{EOS}A", f"A{EOS}B", f"{BOS}{BOS}A", "سلام 😀\r\n"]
    for text in texts:
        batch = tokenize(model, text)
        assert [row_of(batch)] == read_by(model, text)
        assert batch.real.sum() + len(start) == batch.attention.sum()
    left = tokenize(model, texts, pad_side="left")
    assert [row_of(left, i) for i in range(len(texts))] == read_by(model, texts)
    assert row_of(tokenize(model, "A cat")) == start + cat
    if start:  # a text that begins with it gets it once
        assert read_by(model, [f"{BOS}A cat", "A cat"]) == [[0, *cat]] * 2
        assert row_of(tokenize(model, f"{BOS}A cat")) == [0, *cat]
    assert row_of(tokenize(random_twin(model), "A cat")) == start + cat
    assert repeated_tokens(model, n=1, length=5).shape[1] == len(start) + 10
    assert pack(model, TEXTS, length=8).real[:, 0].any() == (not start)


def test_bos_can_be_left_out_or_asked_for(policy):
    model, start = policy
    cat = ids_of(model, "A cat")
    without = tokenize(model, "A cat", bos=False)
    assert [row_of(without)] == [cat] == read_by(model, "A cat", bos=False)
    assert without.real.all() and pack(model, TEXTS, length=8, bos=False).real[0, 0]
    assert row_of(tokenize(model, f"{BOS}A cat", bos=False)) == [0, *cat]  # it was spelt out
    for make in (tokenize, pack, read_by):
        if start:
            make(model, "A cat", bos=True)
        else:
            with pytest.raises(ValueError, match="no BOS"):
                make(model, "A cat", bos=True)
    if start:
        assert [row_of(tokenize(model, "A cat", bos=True))] == read_by(model, "A cat", bos=True)
        assert not pack(model, TEXTS, length=8, bos=True).real[:, 0].any()


def test_padding_id_inside_a_text_stays_real(model):
    batch = tokenize(model, ["a<|pad|>b", "a longer text than that"])
    assert batch.real[0].sum() == 3 and bool((batch.tokens[0][batch.real[0]] == 2).any())


# What is refused


@pytest.mark.parametrize("make", [tokenize, pack])
def test_texts_without_a_token_are_refused_by_number(model, make):
    for texts, number in ((["fine", "", "fine too"], 1), ("", 0), (["fine"] * 1001 + [""], 1001)):
        with pytest.raises(NoRealToken, match=rf"Text {number} "):
            make(model, texts)
    with pytest.raises(ValueError, match="list is empty"):
        make(model, [])


def test_a_batch_with_a_text_that_is_all_padding_is_refused(model):
    zeros = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(NoRealToken, match=r"text \[0, 1\]"):
        TokenBatch(zeros.long(), zeros, zeros, ("a", "b"))
    with pytest.raises(NoRealToken):
        tokenize(model, TEXTS)[4:]
    with pytest.raises(ValueError, match="real and padding"):
        TokenBatch(zeros.long(), ~zeros, zeros, ("a", "b"))


@pytest.mark.parametrize("make", [tokenize, pack, generate])
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"text": ["A"], "label": ["b"]}, "dict"),
        (pd.DataFrame({"text": ["A"], "label": ["b"]}), "DataFrame"),
        ({"A", "B"}, "set"),
        (b"A", "Text 0 is no string but int"),
        (["A", None, "B", None], r"Text 1 is no string but NoneType \(2"),
        (["A", float("nan")], "Text 1"),
        (["A", b"B"], "Text 1"),
        ([["A", "B"]], "Text 0"),
        ([{"text": "A"}], "Text 0"),
    ],
)
def test_what_is_no_text_is_refused_by_number(model, make, texts, message):
    with pytest.raises(TypeError, match=message):
        make(model, texts)


@pytest.mark.parametrize("make", [tokenize, pack, generate])
def test_what_is_no_model_is_said(model, make):
    """In a user's process the types are not checked: the wrapped functions."""
    unchecked = inspect.unwrap(make)
    for first, second in ((TEXTS, model), (TEXTS[0], model), ("pocket-gpt", TEXTS)):
        with pytest.raises(TypeError, match=r"First load_model\(name\), then the texts"):
            unchecked(first, second)


def test_texts_may_be_a_column_an_array_or_a_generator(model):
    frame = pd.DataFrame({"text": ["A", "B"]}, index=[7, 3])
    for texts in (frame["text"], frame["text"].to_numpy(), (text for text in "AB"), ("A", "B")):
        assert tokenize(model, texts).texts == ("A", "B")


@pytest.mark.parametrize("make", [tokenize, pack, generate])
def test_texts_that_the_tokenizer_makes_nothing_of_are_refused(model, make):
    with pytest.raises(NoRealToken, match="Text 1 "):
        make(model, ["fine", "<|bos|>"])
    with pytest.raises(ValueError, match="empty"):
        make(model, [])


def test_a_window_has_room_for_a_token_beside_the_end_of_a_document(model):
    for length in (0, 1, 2):
        with pytest.raises(ValueError, match="within 3 and"):
            pack(model, TEXTS, length=length)
    for options in ({"length": 3}, {"length": 2, "bos": False}):
        assert pack(model, TEXTS, **options).n_real == tokenize(model, TEXTS).n_real


def test_windows_of_a_long_context_stay_short_unless_told(model, monkeypatch):
    monkeypatch.setattr(model.cfg, "n_ctx", 131_072)
    long = "word " * 2000
    assert pack(model, long).tokens.shape[1] == 1024
    assert pack(model, long, length=2048).tokens.shape[1] == 2048
    assert tokenize(model, long).tokens.shape[1] > 2000


def test_over_long_texts_are_refused_unless_told_and_then_said(model):
    long = "word " * 200
    with pytest.raises(TextTooLong, match=r"text 1 .*truncate=True"):
        tokenize(model, ["short", long])
    with pytest.warns(UserWarning, match=r"Cut 1 of 2 texts to 64 tokens; \d+ tokens left out"):
        batch = tokenize(model, ["short", long], truncate=True)
    assert batch.tokens.shape == (2, 64) and batch.real[1].sum() == 63
    with pytest.warns(UserWarning, match=f"; {len(ids_of(model, long)) - 7} tokens left out"):
        assert tokenize(model, long, max_length=8, truncate=True).tokens.shape == (1, 8)
    for length in (1, 65, -3):
        with pytest.raises(ValueError, match="context"):
            tokenize(model, "a", max_length=length)
        with pytest.raises(ValueError, match="context"):
            pack(model, "a", length=length)


def test_a_text_that_just_fits_is_kept_whole(model):
    ids = ids_of(model, "word " * 200)
    cuts = (model.tokenizer.decode(ids[:n]) for n in range(90, 0, -1))
    text = next(text for text in cuts if len(ids_of(model, text)) == 63)
    assert tokenize(model, text).tokens.shape == (1, 64)
    with pytest.raises(TextTooLong):
        tokenize(model, text + "?")


@pytest.mark.parametrize("make", [tokenize, pack])
def test_half_a_surrogate_pair_is_refused_by_number(model, make):
    with pytest.raises(ValueError, match="Text 1001 is not valid Unicode"):
        make(model, ["fine"] * 1001 + ["ab\ud83d"])


# Strings


def test_strings_are_readable_and_safe(model):
    batch = tokenize(model, ["A cat sat €", "Paris is a city on a river"])
    strings = batch.strings(0)
    assert strings[0] == "<|bos|>" and len(strings) == batch.tokens.shape[1]
    text = "".join(s for s, real in zip(strings, batch.real[0], strict=True) if real)
    assert text == "A cat sat <0xE2><0x82><0xAC>"
    shorter = int(batch.attention.sum(1).argmin())
    assert not batch.attention[shorter, -1] and batch.strings(shorter)[-1] == ""
    pieces = [token_string(model.tokenizer, i) for i in range(len(model.tokenizer))]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(tokenize(model, "<0xE2>").strings(0)[1:]) == "<0xE2>"  # no byte: spelt out


def test_sentencepiece_spaces_survive():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "▁Once": 1, "▁upon": 2, "<0xE2>": 3}
    pieces = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>")
    assert [token_string(tokenizer, i) for i in range(4)] == ["<s>", " Once", " upon", "<0xE2>"]


def test_bytes_of_sentencepiece_go_by_their_own_names():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: i for i, piece in enumerate(["<s>", *names, "▁A"])}
    bpe = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<s>")
    pieces = Tokenizer(bpe)
    pieces.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>")
    euro = tokenizer("€").input_ids
    assert [token_string(tokenizer, i) for i in euro] == ["<0xE2>", "<0x82>", "<0xAC>"]
    assert [token_string(tokenizer, i + 1) for i in range(128, 256)] == names[128:]
    assert token_string(tokenizer, 1 + ord("\n")) == "\n"  # a whole character


def test_an_id_without_a_piece_is_shown_as_that(model):
    strings = [token_string(model.tokenizer, i) for i in range(len(model.tokenizer) + 3)]
    assert strings[-1] == f"<id {len(model.tokenizer) + 2}>" and "None" not in strings


# Packed documents, and parts of a batch


def test_packing_loses_nothing_and_marks_bos_and_separators_unreal(model):
    batch = pack(model, TEXTS, length=10)
    assert batch.tokens.shape[1] == 10
    assert (batch.tokens[:, 0] == 0).all() and not batch.real[:, 0].any()
    assert batch.tokens[batch.real].tolist() == [i for t in TEXTS for i in ids_of(model, t)]
    separators = batch.attention & ~batch.real
    separators[:, 0] = False
    assert separators.sum() == len(TEXTS) - 1 and (batch.tokens[separators] == 1).all()
    assert len(batch) == len(batch.texts) and batch.attention[:-1].all()


def test_every_token_knows_its_document(model):
    for batch in (
        pack(model, TEXTS, length=10),
        tokenize(model, TEXTS),
        tokenize(model, TEXTS, pad_side="left"),
    ):
        assert torch.equal(batch.document >= 0, batch.real)
        assert (batch.document[~batch.real] == -1).all()
        for number, text in enumerate(TEXTS):
            assert batch.tokens[batch.document == number].tolist() == ids_of(model, text)
        assert torch.equal(batch[[len(batch) - 1]].document, batch.document[-1:])
        plain = TokenBatch(batch.tokens, batch.real, batch.attention, batch.texts, batch.pad_side)
        assert plain.key == batch.key and plain.document is None and plain[:1].document is None


def test_documents_are_numbered_through_however_many_there_are(model):
    for batch in (pack(model, ["a"] * 1001), tokenize(model, ["a"] * 1001)):
        assert batch.document[batch.real].tolist() == list(range(1001))


def test_a_slice_or_a_list_of_rows_is_a_batch(model):
    batch = tokenize(model, TEXTS, pad_side="left")
    chosen = batch[[3, 0]]
    assert batch[1:3].texts == tuple(TEXTS[1:3]) and chosen.texts == (TEXTS[3], TEXTS[0])
    assert torch.equal(chosen.tokens, batch.tokens[[3, 0]]) and chosen.pad_side == "left"
    assert torch.equal(chosen.real, batch.real[[3, 0]])
    assert batch[:2].key != batch[2:].key
    assert batch[:2].key == tokenize(model, TEXTS, pad_side="left")[:2].key


def test_a_mask_selects_as_a_mask(model):
    batch = tokenize(model, TEXTS)
    mask = [False, True, False, True]
    numbered = pd.Series(mask, index=[9, 8, 7, 6])
    for rows in (mask, np.array(mask), torch.tensor(mask), numbered, [1, 3], torch.tensor([1, 3])):
        assert batch[rows].texts == (TEXTS[1], TEXTS[3])
    assert batch[[True, False, True, True]].texts == (TEXTS[0], *TEXTS[2:])
    assert batch[[-1]].texts == batch[np.array([3], dtype=np.uint8)].texts == (TEXTS[3],)
    for wrong in ([True, False], [True] * 5, [7], np.array([0.0, 1.0])):
        with pytest.raises(IndexError):
            batch[wrong]
    for none in ([False] * 4, []):
        with pytest.raises(NoRealToken):
            batch[none]


# Continuations


def test_generation_is_greedy_or_seeded(model):
    assert generate(model, "A cat", max_new_tokens=6) == generate(
        model, "A cat", max_new_tokens=6, seed=5
    )
    warm = [generate(model, "A cat", max_new_tokens=12, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert warm[0] == warm[1] != warm[2]
    state = torch.random.get_rng_state()
    texts = generate(model, ["A cat", "2 + 2"], max_new_tokens=3, temperature=1.0)
    assert [t.startswith(p) for t, p in zip(texts, ["A cat", "2 + 2"], strict=True)] == [True, True]
    assert torch.equal(state, torch.random.get_rng_state())  # global randomness is left alone


def test_generation_refuses_what_does_not_fit(model):
    for prompt, new in (("A cat", 100), ("word " * 200, 1)):
        with pytest.raises(ValueError, match="context"):
            generate(model, prompt, max_new_tokens=new)
    for prompt in ("", ["A cat", ""]):
        with pytest.raises(NoRealToken, match="no token"):
            generate(model, prompt)
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            generate(model, "A cat", temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", ["lm_head", "wpe"])
def test_broken_weights_continue_nothing(gpt2_folder, weight, value, temperature):
    broken = load_model(gpt2_folder)
    parameters = broken.original_model.named_parameters(remove_duplicate=False)
    chosen = next(p for name, p in parameters if weight in name and name.endswith("weight"))
    with torch.no_grad():
        chosen[0, 5] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        generate(broken, "A cat", temperature=temperature)


def test_masks_of_zeros_and_ones_are_masks(model):
    batch = tokenize(model, TEXTS)
    same = replace(batch, real=batch.real.long(), attention=batch.attention.to(torch.uint8))
    assert torch.equal(same.real, batch.real) and same.key == batch.key
    with pytest.raises(ValueError, match="mask"):
        replace(batch, real=2 * batch.real.long())


def test_a_batch_has_a_row_for_each_text_and_masks_of_its_shape(model):
    batch = tokenize(model, TEXTS)
    for texts in (batch.texts[:2], (*batch.texts, "one more")):
        with pytest.raises(ValueError, match="one row for each text"):
            replace(batch, texts=texts)


@pytest.mark.parametrize(("side", "said"), [("left", "right"), ("right", "left")])
def test_padding_on_another_side_than_the_batch_says_is_refused(model, side, said):
    batch = tokenize(model, TEXTS, pad_side=side)
    with pytest.raises(ValueError, match=f"elsewhere than at the {said}"):
        replace(batch, pad_side=said)
    hole = batch.attention.clone()
    hole[int(hole.sum(1).argmax()), 2] = False
    with pytest.raises(ValueError, match="Padding stands elsewhere"):
        replace(batch, attention=hole, real=batch.real & hole)
