"""ActivationStore: what is on disk is what was computed, whatever happened on the way there."""

import errno
import fcntl
import inspect
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lenslab import capture
from lenslab import store as store_module
from lenslab.capture import BadActivations, harvest
from lenslab.files import REPOSITORY, NotWritten, only_writer, signed
from lenslab.hooks import UnknownHook, stream_hook
from lenslab.models import random_twin
from lenslab.store import ActivationStore, DamagedShard, StoreMismatch
from lenslab.tokens import tokenize

HOOK = "blocks.1.hook_resid_post"
TEXTS = [f"Text number {i}: " + "a cat sat on the mat. " * (i % 3) for i in range(11)]


@pytest.fixture(scope="module")
def batch(model):
    return tokenize(model, TEXTS, pad_side="left")


@pytest.fixture
def fill(model, batch, tmp_path):
    """Fill a store of four shards in a folder of tmp_path; returns it."""

    def run(name="store", hooks=HOOK, dtype=torch.float32, batch=batch, model=model, **opening):
        opening = {"compute": "float32", "texts_per_shard": 3} | opening
        store = ActivationStore.open(
            model, batch, hooks, folder=tmp_path / name, dtype=dtype, **opening
        )
        return harvest(model, batch, hooks, store=store, batch_size=2, progress=False)

    return run


def last_matrix(mlp):
    """Where a fault can be put that is in the weights' place: hooks are refused."""
    return [module for module in mlp.modules() if type(module).__name__ == "Conv1D"][-1]


def contents(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != ".lock"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_the_real_tokens_in_order_with_their_origin(model, batch, fill, dtype):
    store = fill(dtype=dtype)
    expected = harvest(model, batch, HOOK, compute="float32", dtype=dtype)[HOOK]
    assert len(store) == batch.n_real and len(store.digests) == 4 and store.complete
    assert store.manifest["hooks"] == {HOOK: 32}
    everything = torch.arange(len(store))
    text, position, token = (store.rows(everything, name) for name in ("text", "position", "token"))
    assert torch.equal(torch.stack([text, position], 1).long(), batch.real.nonzero())
    assert torch.equal(token.long(), batch.tokens[batch.real])
    rows = store.rows(everything, HOOK)
    assert rows.dtype == dtype
    torch.testing.assert_close(rows, expected[text.long(), position.long()], atol=1e-5, rtol=0.01)
    assert torch.equal(torch.cat([store.read(shard)[HOOK] for shard in range(4)]), rows)


def test_rows_come_in_the_order_asked_for(fill):
    store = fill()
    rows = store.rows(torch.arange(len(store)), HOOK)
    asked = torch.tensor([len(store) - 1, 0, 7, 7, 50])
    assert torch.equal(store.rows(asked, HOOK), rows[asked])
    assert store.rows([], HOOK).shape == (0, 32)
    mask = [True] + [False] * (len(store) - 1)  # as numbers, it would be rows 1 and 0
    for bad in ([len(store)], [-1], mask, torch.tensor(mask), [0.5], [1.0]):
        with pytest.raises(IndexError):
            inspect.unwrap(ActivationStore.rows)(store, bad, HOOK)  # without the tests' types
    with pytest.raises(IndexError):
        store.read(4)


def test_several_hooks_share_one_run_and_heads_lie_side_by_side(model, batch, fill):
    hooks = (stream_hook(model, 0, "mlp"), "blocks.1.attn.hook_z")
    store = fill(hooks=hooks)
    z = harvest(model, batch, hooks[1], compute="float32")[hooks[1]][batch.real].flatten(1)
    torch.testing.assert_close(store.rows(torch.arange(len(store)), hooks[1]), z, atol=1e-5, rtol=0)
    assert store.rows([0], hooks[0]).shape == (1, 32)


def test_a_store_reads_without_the_model(fill):
    store = ActivationStore(fill().folder)
    assert store.complete and store.read(0)[HOOK].shape[1] == 32


def test_a_shard_depends_on_no_file_that_another_is_written_to(fill, model, batch):
    """Several processes may write shards in any order, each its own files, and end with the same
    bytes."""
    whole = fill("whole")
    shards = [whole.read(shard) for shard in range(4)]
    opening = dict(folder=whole.folder.parent / "ranks", dtype=torch.float32, texts_per_shard=3)
    ranks = [
        ActivationStore.open(model, batch, HOOK, compute="float32", **opening) for _ in range(2)
    ]
    for shard in (3, 0, 2, 1):
        before = contents(ranks[0].folder)
        texts = batch[shard * 3 : shard * 3 + 3]
        ranks[shard % 2].write(shard, texts, {HOOK: shards[shard][HOOK]})
        after = contents(ranks[0].folder)
        assert before.items() <= after.items() and len(after) == len(before) + 1
        assert ranks[0].complete == (shard == 1)
    assert ranks[0].missing() == ranks[1].missing() == []
    assert contents(ranks[0].folder) == contents(whole.folder)
    assert ranks[0].digests == whole.digests


class Stop(Exception):
    pass


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_run_that_broke_off_and_was_continued_is_byte_for_byte_the_whole_run(
    fill, monkeypatch, done
):
    whole = contents(fill("whole").folder)
    written, write = [], ActivationStore.write

    def interrupted(self, shard, *given):
        if len(written) == done:
            raise Stop
        written.append(shard)
        write(self, shard, *given)

    monkeypatch.setattr(ActivationStore, "write", interrupted)
    with pytest.raises(Stop):
        fill("broken")
    monkeypatch.setattr(
        ActivationStore,
        "write",
        lambda self, i, *given: (written.append(i), write(self, i, *given)),
    )
    continued = fill("broken")
    assert written == [0, 1, 2, 3], "nothing was computed twice"
    assert contents(continued.folder) == whole


def test_a_process_killed_while_writing_loses_nothing_that_was_written(gpt2_folder, tmp_path, fill):
    """SIGKILL in the middle of writing the third shard: the first two are kept, the half one never
    counts."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(REPOSITORY / "src")!r})
import torch
from lenslab import store
from lenslab.capture import harvest
from lenslab.models import load_model
from lenslab.tokens import tokenize
save, written = store.save_file, []
def killed(tensors, path, **options):
    if len(written) == 2:
        path.write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    save(tensors, path, **options)
store.save_file = killed
model = load_model({str(gpt2_folder)!r}, device="cpu")
batch = tokenize(model, {TEXTS!r}, pad_side="left")
opening = dict(dtype=torch.float32, compute="float32", texts_per_shard=3)
folder = {str(tmp_path / "killed")!r}
opened = store.ActivationStore.open(model, batch, {HOOK!r}, folder=folder, **opening)
harvest(model, batch, {HOOK!r}, store=opened, batch_size=2, progress=False)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    left = ActivationStore(tmp_path / "killed")
    assert [digest is not None for digest in left.digests] == [True, True, False, False]
    assert left.read(1)[HOOK].shape[1] == 32 and not left.complete
    with pytest.raises(DamagedShard, match="not written yet"):
        left.read(2)
    before = contents(left.folder)
    continued, whole = fill("killed"), fill("whole")
    after = contents(continued.folder)
    visible = {name for name in after if not name.startswith(".")}
    assert visible == contents(whole.folder).keys(), "the half shard never counts"
    assert all(
        after[f"shard-0000{i}.safetensors"] == before[f"shard-0000{i}.safetensors"] for i in (0, 1)
    )
    everything = torch.arange(len(whole))  # two processes may round the last bit differently
    torch.testing.assert_close(
        continued.rows(everything, HOOK), whole.rows(everything, HOOK), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "of another run"])
def test_a_damaged_shard_is_refused_then_redone_and_said(fill, damage):
    store = fill()
    before, path = contents(store.folder), store.folder / "shard-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    damaged = {"truncated": bytes(raw[:-100]), "flipped": bytes(raw)}
    if damage == "missing":
        path.unlink()
    elif damage == "of another run":  # a whole shard with its own right hash, of other rows
        path.write_bytes(before["shard-00000.safetensors"])
    else:
        path.write_bytes(damaged[damage])
    fresh = ActivationStore(store.folder)
    with pytest.raises(DamagedShard, match="shard-00002"):
        fresh.read(2)
    with pytest.raises(DamagedShard):
        fresh.rows([0, sum(fresh.manifest["rows"][:2])], HOOK)
    assert fresh.rows([0], HOOK).shape == (1, 32), "the others can be read"
    if damage == "missing":
        fill()
    else:
        with pytest.warns(UserWarning, match="shard-00002"):
            fill()
    assert contents(store.folder) == before


def exchange(folder, name, change):
    """Write other tensors into a file of a store, with the key that is there."""
    path = folder / f"{name}.safetensors"
    tensors = {key: value.contiguous() for key, value in change(load_file(path)).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)


def test_a_shard_with_other_rows_than_the_manifest_says_is_not_written(fill, batch):
    store = fill()
    before, vectors = contents(store.folder), {HOOK: store.read(1)[HOOK]}
    for texts, given in (
        (batch[:2], vectors),
        (batch[3:6], {HOOK: vectors[HOOK][:-1]}),
        (batch[3:5], {HOOK: vectors[HOOK][: batch[3:5].n_real]}),
    ):
        with pytest.raises(ValueError, match="one row for each"):
            store.write(1, texts, given)
    assert contents(store.folder) == before


LAYOUTS = {
    "narrow": lambda t: t | {HOOK: t[HOOK][:, :7]},
    "wide": lambda t: t | {HOOK: t[HOOK].repeat(1, 2)},
    "one axis more": lambda t: t | {HOOK: t[HOOK][..., None]},
    "flat": lambda t: t | {HOOK: t[HOOK].flatten()},
    "another dtype": lambda t: t | {HOOK: t[HOOK].half()},
    "fewer rows": lambda t: t | {HOOK: t[HOOK][:-1]},
    "fewer positions": lambda t: t | {"position": t["position"][:-1]},
    "no vectors": lambda t: {key: t[key] for key in ("text", "position", "token")},
    "another hook": lambda t: t | {"blocks.0.hook_resid_post": t[HOOK].clone()},
    "one other value": lambda t: t | {HOOK: t[HOOK].index_fill(0, torch.tensor([1]), 0.5)},
    "rows in another order": lambda t: t | {HOOK: t[HOOK].flip(0)},
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_other_values_under_the_key_of_a_shard_are_refused(fill, change):
    folder = fill().folder
    before = contents(folder)
    exchange(folder, "shard-00001", change)
    store = ActivationStore(folder)
    with pytest.raises(DamagedShard, match="shard-00001"):
        store.read(1)
    with pytest.raises(DamagedShard, match="shard-00001"):
        store.rows([len(store) - 1, store.manifest["rows"][0]], HOOK)
    with pytest.warns(UserWarning, match="shard-00001"):
        fill()
    assert contents(folder) == before


def test_a_complete_store_is_not_computed_again(fill, monkeypatch):
    fill()
    monkeypatch.setattr(capture, "_run", lambda *_, **__: pytest.fail("the model was run"))
    assert fill().complete


def test_a_full_disk_leaves_what_was_written(fill, monkeypatch):
    whole, save, calls = contents(fill("whole").folder), store_module.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, **options)

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(NotWritten, match=r"shard-00002.*free some space") as caught:
        fill("full")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(store_module, "save_file", save)
    folder = fill("full").folder
    assert contents(folder) == whole


def test_nan_is_refused_by_the_number_of_its_text_and_earlier_shards_stay(
    fill, model, batch, monkeypatch
):
    runs, inside = [], last_matrix(model.blocks[0].mlp)
    forward = inside.forward

    def spoil(*inputs, **options):
        output = forward(*inputs, **options)
        runs.append(len(output))
        if sum(runs) > 6:  # the third shard begins at text 6
            output = output.clone()
            output[0] = float("nan")
        return output

    longest = 6 + int(batch.attention[6:9].sum(1).argmax())
    monkeypatch.setattr(inside, "forward", spoil)
    with pytest.raises(BadActivations, match=rf"text {longest}\."):
        fill("nan")
    monkeypatch.undo()
    assert contents(fill("nan").folder) == contents(fill("whole").folder)


def test_a_huge_bos_does_not_keep_the_real_tokens_out_of_float16(fill, model, batch, monkeypatch):
    """The first position reaches hundreds of times the rest (S0.26); it is not stored, so it need
    not fit."""

    def enlarge(*inputs, **options):
        output = forward(*inputs, **options).clone()
        output[torch.arange(len(output)), (output.shape[1] - lengths[: len(output)])] = 1e5
        return output

    lengths, inside = batch[:1].attention.sum(1), last_matrix(model.blocks[1].mlp)
    forward = inside.forward
    monkeypatch.setattr(inside, "forward", enlarge)
    with pytest.raises(BadActivations, match="float16"):
        harvest(model, batch[:1], "blocks.2.hook_resid_pre", dtype=torch.float16)
    assert fill(hooks="blocks.2.hook_resid_pre", dtype=torch.float16, batch=batch[:1]).complete


def test_a_model_with_hooks_does_not_fill_a_store_named_by_its_weights(fill, model):
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda t, hook: t * 0)]),
        pytest.raises(ValueError, match=r"mlp.*has a hook"),
    ):
        fill()


def test_a_store_of_something_else_is_refused(fill, model, batch, tmp_path):
    store = fill()
    twin = random_twin(model, seed=5)
    other = tokenize(model, TEXTS[:5])
    for match, options in {
        "model_key": {"model": twin},
        "texts_key": {"batch": other},
        "hooks": {"hooks": "blocks.0.hook_resid_post"},
        "dtype": {"dtype": torch.float16},
    }.items():
        with pytest.raises(StoreMismatch, match=match):
            fill(**options)
    for match, arguments in {
        "model_key": (twin, batch, HOOK),
        "texts_key": (model, other, HOOK),
        "hooks": (model, batch, "blocks.0.hook_resid_post"),
    }.items():
        with pytest.raises(StoreMismatch, match=match):
            harvest(*arguments, store=store)
    for call in (
        lambda: fill(compute="bfloat16"),
        lambda: harvest(model, batch, HOOK, compute="bfloat16", store=store),
    ):
        with pytest.raises(StoreMismatch, match="compute"):
            call()


def test_the_default_folder_is_named_by_content(model, batch, tmp_path, monkeypatch):
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path))
    names = {
        ActivationStore.open(model, b, hook, dtype=dtype, compute=compute).folder
        for b in (batch, batch[:3])
        for hook in (HOOK, "blocks.0.hook_resid_post")
        for dtype in (torch.float16, torch.float32)
        for compute in ("float32", "bfloat16")
    }
    assert len(names) == 16 and all(folder.is_relative_to(tmp_path) for folder in names)
    assert ActivationStore.open(model, batch, HOOK).folder in names, "opened again, not made anew"


def test_what_cannot_be_stored_is_refused(model, batch, tmp_path):
    for hook in ("blocks.0.attn.hook_pattern", "embed.hook_in"):
        with pytest.raises(ValueError, match="no vector per token"):
            ActivationStore.open(model, batch, hook, folder=tmp_path / "store")
    with pytest.raises(UnknownHook):
        ActivationStore.open(model, batch, "blocks.9.hook_resid_post", folder=tmp_path / "store")
    for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="cut the values off"):
            ActivationStore.open(model, batch, HOOK, folder=tmp_path / "store", dtype=dtype)
        with pytest.raises(ValueError, match="cut the values off"):
            harvest(model, batch, HOOK, dtype=dtype)
    assert not (tmp_path / "store").exists()


def test_a_folder_that_is_no_store_or_of_an_earlier_layout_says_so(tmp_path, fill):
    with pytest.raises(FileNotFoundError, match="manifest"):
        ActivationStore(tmp_path)
    folder = fill().folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(ValueError, match="earlier layout"):
        ActivationStore(folder)


# What is on disk is not trusted

FORGERIES = {
    "rows off by one": lambda m: m["rows"].__setitem__(slice(0, 2), [m["rows"][0] + 1, 0]),
    "negative rows": lambda m: m["rows"].__setitem__(1, -5),
    "huge rows": lambda m: m["rows"].__setitem__(0, 1 << 62),
    "rows as text": lambda m: m.update(rows="12"),
    "a shard less": lambda m: m["rows"].pop(),
    "another width": lambda m: m["hooks"].update({HOOK: 16}),
    "a hook like a path": lambda m: m.update(hooks={"../../x": 32}),
    "another hook": lambda m: m.update(hooks={"blocks.0.hook_resid_post": 32}),
    "other texts in a shard": lambda m: m.update(texts_per_shard=2),
    "no texts in a shard": lambda m: m.update(texts_per_shard=0),
    "another dtype": lambda m: m.update(dtype="float16"),
    "no dtype": lambda m: m.update(dtype="load"),
    "another precision": lambda m: m.update(compute="bfloat16"),
    "another model": lambda m: m.update(model_key="0" * 16),
    "files": lambda m: m.update(shards=[{"file": "../x", "sha256": None}]),
    "no rows": lambda m: m.pop("rows"),
    "no hooks": lambda m: m.pop("hooks"),
    "no key": lambda m: m.pop("content_key"),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_changed_manifest_is_refused_and_nothing_is_written(fill, forge, tmp_path):
    folder = fill().folder
    manifest = json.loads((folder / "manifest.json").read_text())
    forge(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="manifest"):
        ActivationStore(folder)
    with pytest.raises(ValueError, match="manifest"):
        fill()
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["rows off by one", "negative rows", "a shard less", "huge rows"])
def test_not_even_a_forged_key_makes_wrong_rows(fill, name):
    folder = fill().folder
    manifest = json.loads((folder / "manifest.json").read_text())
    FORGERIES[name](manifest)
    del manifest["content_key"]
    (folder / "manifest.json").write_text(json.dumps(signed(manifest)))
    with pytest.raises(ValueError, match=r"harvest|manifest"):
        ActivationStore(folder).read(0)
    with pytest.raises(StoreMismatch, match="rows"):
        fill()
    if name != "a shard less":
        with pytest.raises(DamagedShard):
            ActivationStore(folder).rows([0, 1], HOOK)
            ActivationStore(folder).read(1)


@pytest.mark.parametrize(
    "content", ["", "[]", "[1]", "null", "7", '{"format": 3}', '{"form', "\udcff"]
)
def test_what_is_no_manifest_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest|earlier layout"):
        ActivationStore(tmp_path)


def test_shards_of_equal_size_cannot_change_places_nor_come_from_another_store(fill, model):
    equal = tokenize(model, ["xyz", "yzx", "zxy"], pad_side="left")
    twin = random_twin(model, seed=5)
    store = fill("one", batch=equal, texts_per_shard=1)
    other = fill("two", batch=equal, texts_per_shard=1, model=twin)
    assert len(set(store.manifest["rows"])) == 1
    whole = contents(store.folder)
    first, second = "shard-00000.safetensors", "shard-00001.safetensors"
    (store.folder / first).write_bytes(whole[second])
    (store.folder / second).write_bytes((other.folder / second).read_bytes())
    for shard in (0, 1):
        with pytest.raises(DamagedShard, match=f"shard-0000{shard}"):
            ActivationStore(store.folder).read(shard)
    with pytest.warns(UserWarning, match="redone"):
        assert contents(fill("one", batch=equal, texts_per_shard=1).folder) == whole


@pytest.mark.parametrize("metadata", [None, {}, {"key": ""}, {"key": "0" * 16}])
def test_a_shard_without_its_key_is_redone(fill, metadata):
    store = fill()
    before, path = contents(store.folder), store.folder / "shard-00001.safetensors"
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(DamagedShard, match="changed"):
        ActivationStore(store.folder).read(1)
    with pytest.warns(UserWarning, match="redone"):
        assert contents(fill().folder) == before


# Two at once


def test_a_store_that_another_process_fills_is_refused_and_free_when_it_is_killed(fill, tmp_path):
    folder = fill().folder
    script = f"""
import fcntl, time
held = open({str(folder / ".lock")!r})
fcntl.flock(held, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(NotWritten, match="in use"):
            fill()
        assert ActivationStore(folder).read(0), "reading goes on"
        assert ActivationStore(folder).missing() == []
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert fill().complete
    with only_writer(folder), pytest.raises(NotWritten):
        fill()


def test_disks_without_locks_go_without(fill, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert fill().complete


def test_the_home_folder_is_known_by_its_sign(fill, monkeypatch, tmp_path, model, batch):
    monkeypatch.setenv("HOME", str(tmp_path))
    store = ActivationStore.open(model, batch, HOOK, folder="~/kept")
    assert store.folder == tmp_path / "kept" and ActivationStore("~/kept").manifest
