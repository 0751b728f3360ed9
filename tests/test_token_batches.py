"""TokenBatch: what counts as a token, whatever the tokenizer's special ids and the side of the
padding."""

import pytest
import torch

from lenslab.models import load_model
from lenslab.tokens import NoRealToken, TextTooLong, TokenBatch, pack, token_string, tokenize

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


def test_a_tokenizer_without_bos_falls_back_to_eos_and_then_to_none(gpt2_folder):
    other = load_model(gpt2_folder)
    other.tokenizer.bos_token = None
    batch = tokenize(other, "Paris")
    assert batch.tokens[0, 0] == other.tokenizer.eos_token_id == 1 and not batch.real[0, 0]
    other.tokenizer.eos_token = None
    batch = tokenize(other, "Paris")
    assert batch.real.all() and "".join(batch.strings(0)) == "Paris"
    assert pack(other, TEXTS, length=8).real[:, 0].all()


def test_a_text_that_begins_with_bos_gets_no_second_one(model):
    assert torch.equal(tokenize(model, "<|bos|>Paris").tokens, tokenize(model, "Paris").tokens)


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


def test_sentencepiece_spaces_survive():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "▁Once": 1, "▁upon": 2, "<0xE2>": 3}
    pieces = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>")
    assert [token_string(tokenizer, i) for i in range(4)] == ["<s>", " Once", " upon", "<0xE2>"]


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
