"""Records: what is saved comes back to the last bit, pickles stay closed, two are compared as
the module says."""

import errno
import gzip
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import save_random

import lenslab.records
from lenslab.capture import harvest
from lenslab.hooks import UnknownHook
from lenslab.models import load_model, model_key
from lenslab.records import ActivationRecord, NotARecord, extract_batch, load_record, save_record
from lenslab.tokens import tokenize

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["Paris is a city on a river, they say.", "A cat sat €", "2 + 2 = 4"]
FORMATS = ["safetensors", "npz", "json", "json.gz", "pt"]


@pytest.fixture(scope="module")
def records(model):
    return extract_batch(model, TEXTS, [HOOK, "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_z"])


@pytest.fixture
def record(records):
    return records[0]


def test_a_record_holds_text_tokens_and_what_harvest_gives(model, record):
    batch = tokenize(model, TEXTS[0])
    assert record.prompt == TEXTS[0] and record.token_ids == tuple(batch.tokens[0].tolist())
    assert (
        record.tokens[0] == "<|bos|>"
        and "".join(record.tokens[1:]) == TEXTS[0]
        and record.real[:2] == (False, True)
    )
    torch.testing.assert_close(
        record.activations[HOOK], harvest(model, batch, HOOK, compute="float32")[HOOK][0]
    )
    assert record.metadata["model_key"] == model_key(model)
    assert record.metadata["versions"]["torch"] == torch.__version__
    assert not any(
        "/" in str(value) for value in (record.metadata["model"], record.metadata["versions"])
    )


def test_a_batch_of_records_is_the_records_one_by_one(model, records):
    """W1.9: batch extraction passed `prompt=` to a parameter called `text` and crashed."""
    for text, together in zip(TEXTS, records, strict=True):
        alone = extract_batch(model, [text], list(together.activations))[0]
        assert alone.tokens == together.tokens and alone.real == together.real
        for hook, value in alone.activations.items():
            torch.testing.assert_close(
                together.activations[hook], value, atol=1e-5, rtol=0, msg=hook
            )


def test_to_dict_is_json_with_every_value(record):
    """W1.9: `to_dict` returned nothing, which JSON writes as null; S1.45: json kept shapes only."""
    back = json.loads(json.dumps(record.to_dict()))
    assert back["prompt"] == record.prompt and tuple(back["tokens"]) == record.tokens
    assert torch.equal(torch.tensor(back["activations"][HOOK]), record.activations[HOOK])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_saved_comes_back_to_the_last_bit(tmp_path, record, suffix, dtype):
    values = {hook: value.to(dtype) for hook, value in record.activations.items()}
    limits = torch.finfo(dtype)
    values["scalar"] = torch.tensor(1 / 3, dtype=dtype)
    values["extremes"] = torch.tensor([[0.0, -0.0, limits.tiny, limits.max, 1 / 3]], dtype=dtype)
    whole = ActivationRecord(
        record.prompt, record.tokens, record.token_ids, record.real, values, record.metadata
    )
    back = load_record(save_record(whole, tmp_path / f"record.{suffix}"))
    assert back == whole and whole == back
    for hook, value in values.items():
        assert torch.equal(back.activations[hook].signbit(), value.signbit())
    changed = dict(values) | {HOOK: values[HOOK] * 2}
    assert back != ActivationRecord(
        record.prompt, record.tokens, record.token_ids, record.real, changed, back.metadata
    )
    assert [f.name for f in tmp_path.iterdir()] == [f"record.{suffix}"], "nothing left beside it"


@pytest.mark.parametrize("suffix", FORMATS)
def test_several_records_go_into_one_file(tmp_path, records, suffix):
    back = load_record(save_record(records, tmp_path / f"records.{suffix}"))
    assert isinstance(back, list) and back == records
    assert load_record(save_record(records[:1], tmp_path / f"one.{suffix}")) == records[:1], (
        "a list stays a list"
    )


def test_compressed_json_is_json_and_the_same_bytes_every_time(tmp_path, record):
    a, b = (save_record(record, tmp_path / f"{name}.json.gz").read_bytes() for name in "ab")
    assert a == b and gzip.decompress(a) == save_record(record, tmp_path / "c.json").read_bytes()


@pytest.mark.parametrize("name", ["record.pkl", "record.pickle", "RECORD.PKL"])
def test_pickles_are_neither_written_nor_read(tmp_path, record, name):
    with pytest.raises(NotARecord, match=r"pickle.*\.safetensors"):
        save_record(record, tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(NotARecord, match=r"pickle.*\.safetensors"):
        load_record(tmp_path / name)


class Trap:
    opened = False

    def __reduce__(self):
        return (setattr, (Trap, "opened", True))


@pytest.mark.parametrize("disguise", ["bare pickle", "torch.save", "old torch.save", "npz"])
def test_a_pickle_in_disguise_is_refused_and_never_run(tmp_path, disguise):
    path = tmp_path / ("record.npz" if disguise == "npz" else "record.pt")
    if disguise == "bare pickle":
        path.write_bytes(pickle.dumps(Trap()))
    elif disguise == "npz":
        np.savez(path, header=np.array([Trap()], dtype=object))
    else:
        torch.save(
            {"header": Trap()}, path, _use_new_zipfile_serialization=disguise == "torch.save"
        )
    with pytest.raises(NotARecord):
        load_record(path)
    assert not Trap.opened


@pytest.mark.parametrize("suffix", FORMATS)
def test_cut_off_and_foreign_files_say_so(tmp_path, record, suffix):
    path = save_record(record, tmp_path / f"record.{suffix}")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"{}", b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(NotARecord, match=r"record\."):
            load_record(path)
    with pytest.raises(FileNotFoundError):
        load_record(tmp_path / f"absent.{suffix}")
    with pytest.raises(NotARecord, match="suffix"):
        load_record(tmp_path / "record.csv")


def test_a_failed_save_keeps_the_old_file(tmp_path, record):
    path = save_record(record, tmp_path / "record.json")
    before = path.read_bytes()
    spoiled = {HOOK: record.activations[HOOK] * float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        save_record(ActivationRecord("a", ("a",), (1,), (True,), spoiled), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_hooks_that_do_not_exist_are_refused(model, record):
    with pytest.raises(UnknownHook):
        extract_batch(model, ["a"], "6")


def _record(*rows, real=None):
    value = torch.tensor(rows)
    tokens = tuple("abcdefgh"[: len(rows)])
    return ActivationRecord(
        "x", tokens, tuple(range(len(rows))), real or (True,) * len(rows), {"h": value}
    )


def test_two_are_compared_as_the_module_says():
    """W1.7, W4.5: averages that took in BOS, a hundred times larger than the rest."""
    names = {"torch": torch, "hook": "h"}
    for name, rows in {"a": ([1.0, 2.0], [3.0, -4.0]), "b": ([0.0, 2.0], [4.0, 3.0])}.items():
        names[name] = _record([3000.0, 4000.0], *rows, real=(False, True, True))
    said = re.findall("`([^`]+)`", lenslab.records.__doc__.partition("|")[0])
    alike, without_bos = (eval(code.replace("\n", " "), names) for code in said)
    assert float(alike) == pytest.approx(0) and without_bos.tolist() == [[1.0, 2.0], [3.0, -4.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_with_a_gradient_and_of_any_precision_are_read(recwarn, tmp_path, dtype):
    value = torch.tensor([[1.0, 2.0], [3.0, -6.0]], dtype=dtype)
    plain = ActivationRecord("", ("a", "b"), (0, 1), (True, True), {"h": value})
    grown = replace(plain, activations={"h": value.clone().requires_grad_()})
    assert load_record(save_record(grown, tmp_path / "a.safetensors")) == plain
    assert not recwarn.list


# What is on disk is not trusted


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_changed_byte_gives_other_values(tmp_path, records, suffix):
    small = [
        ActivationRecord(
            r.prompt, r.tokens, r.token_ids, r.real, {HOOK: r.activations[HOOK][:, :2]}
        )
        for r in records[:2]
    ]
    path = save_record(small, tmp_path / f"record.{suffix}")
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    for place in generator.integers(len(whole), size=150):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(bytes(changed))
        try:
            back = load_record(path)
        except NotARecord:
            continue
        assert back == small, place  # a byte that says nothing: padding, a time


EDITS = {
    "prompt": lambda header: header["records"][0].update(prompt="another"),
    "token": lambda header: header["records"][0]["tokens"].__setitem__(1, "x"),
    "id": lambda header: header["records"][0]["token_ids"].__setitem__(1, 7),
    "real": lambda header: header["records"][0]["real"].__setitem__(0, True),
    "model": lambda header: header["records"][0]["metadata"].update(model_key="0"),
    "dtype": lambda header: header["records"][0]["dtypes"].update({HOOK: "float64"}),
    "a hook less": lambda header: header["records"][0]["dtypes"].pop(HOOK),
    "order": lambda header: header["records"].reverse(),
    "a record less": lambda header: header["records"].pop(),
    "one": lambda header: header.update(one=True),
    "no key": lambda header: header.pop("key"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_header_is_refused(tmp_path, records, edit):
    path = save_record(records, tmp_path / "record.json")
    content = json.loads(path.read_text())
    edit(content["header"])
    path.write_text(json.dumps(content))
    with pytest.raises(NotARecord, match="changed"):
        load_record(path)


def test_hooks_cannot_change_places(tmp_path, record):
    path = save_record(record, tmp_path / "record.json")
    content = json.loads(path.read_text())
    other = "blocks.2.hook_resid_post"
    content[f"0/{other}"] = content.pop(f"0/{HOOK}")
    dtypes = content["header"]["records"][0]["dtypes"]
    dtypes[other] = dtypes.pop(HOOK)
    path.write_text(json.dumps(content))
    with pytest.raises(NotARecord, match="changed"):
        load_record(path)


# Paths and disks


@pytest.mark.parametrize("name", ["record.json", "./new/record.npz", "~/record.pt", "RECORD.JSON"])
def test_paths_are_strings_too(tmp_path, monkeypatch, record, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    path = save_record(record, name)
    assert path.is_file() and load_record(name) == record and load_record(str(path)) == record
    assert not (tmp_path / "~").exists()


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(tmp_path, record, monkeypatch):
    path = save_record(record, tmp_path / "record.safetensors")

    def full(tensors, temporary, **_):
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lenslab.records.save_file", full)
    with pytest.raises(OSError, match="space"):
        save_record(record, path)
    monkeypatch.undo()
    assert load_record(path) == record and [f.name for f in tmp_path.iterdir()] == [path.name]


def test_heads_with_a_norm_of_their_own_are_cut_along_positions(tmp_path):
    """Queries after their norm are `[head, pos, d_head]`: longer than d_head, or shorter."""
    model = load_model(str(save_random(tmp_path, "Qwen3", head_dim=8)), device="cpu")
    hook, texts = "blocks.0.attn.hook_q_normed", ["a", "a cat sat on the mat, they say"]
    for text, record in zip(texts, extract_batch(model, texts, hook), strict=True):
        alone = harvest(model, tokenize(model, text), hook)[hook][0]
        torch.testing.assert_close(record.activations[hook], alone, atol=1e-5, rtol=0)
