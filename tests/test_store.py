"""ActivationStore: what is on disk is what was computed, whatever happened on the way there."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from lenslab import store as store_module
from lenslab.capture import BadActivations, harvest
from lenslab.files import REPOSITORY
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


def contents(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


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
    for bad in ([len(store)], [-1]):
        with pytest.raises(IndexError):
            store.rows(bad, HOOK)
    with pytest.raises(IndexError):
        store.read(4)


def test_statistics_are_those_of_all_rows(fill):
    store = fill()
    rows = store.rows(torch.arange(len(store)), HOOK).double()
    statistics = store.statistics(HOOK)
    torch.testing.assert_close(statistics["mean"], rows.mean(0))
    torch.testing.assert_close(statistics["variance"], rows.var(0, correction=0))
    assert float(statistics["mean_norm"]) == pytest.approx(float(rows.norm(dim=1).mean()))


def test_several_hooks_share_one_run_and_heads_lie_side_by_side(model, batch, fill):
    hooks = (stream_hook(model, 0, "mlp"), "blocks.1.attn.hook_z")
    store = fill(hooks=hooks)
    z = harvest(model, batch, hooks[1], compute="float32")[hooks[1]][batch.real].flatten(1)
    torch.testing.assert_close(store.rows(torch.arange(len(store)), hooks[1]), z, atol=1e-5, rtol=0)
    assert store.statistics(hooks[0])["mean"].shape == (32,)


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
        assert before.items() <= after.items() and len(after) == len(before) + 2
    assert ranks[0].missing() == ranks[1].missing() == [] and not ranks[0].complete
    ranks[1].summarize()
    assert ranks[0].complete and contents(ranks[0].folder) == contents(whole.folder)
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
def killed(tensors, path):
    if len(written) == 2:
        path.write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    save(tensors, path)
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
    with pytest.raises(DamagedShard, match="not written yet"):
        left.statistics(HOOK)
    before = contents(left.folder)
    continued, whole = fill("killed"), fill("whole")
    after = contents(continued.folder)
    assert after.keys() == contents(whole.folder).keys(), "the half shard is cleared away"
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
        for suffix in (".safetensors", ".json"):
            path.with_suffix(suffix).write_bytes(before[f"shard-00000{suffix}"])
    else:
        path.write_bytes(damaged[damage])
    fresh = ActivationStore(store.folder)
    with pytest.raises(DamagedShard, match="shard-00002"):
        fresh.read(2)
    with pytest.raises(DamagedShard):
        fresh.rows([0, sum(fresh.manifest["rows"][:2])], HOOK)
    assert fresh.rows([0], HOOK).shape == (1, 32), "the others can be read"
    with pytest.warns(UserWarning, match="shard-00002"):
        fill()
    assert contents(store.folder) == before


def test_lost_statistics_are_made_anew(fill):
    store = fill()
    before = contents(store.folder)
    (store.folder / "statistics.safetensors").write_bytes(b"")
    with pytest.raises(DamagedShard, match=r"statistics"):
        ActivationStore(store.folder).statistics(HOOK)
    fill()
    assert contents(store.folder) == before


def test_a_complete_store_is_not_computed_again(fill, model):
    fill()
    handle = model.blocks[0].register_forward_hook(lambda *_: pytest.fail("the model was run"))
    assert fill().complete
    handle.remove()


def test_a_full_disk_leaves_what_was_written(fill, monkeypatch):
    whole, save, calls = contents(fill("whole").folder), store_module.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(OSError, match=r"shard-00002.*kept") as caught:
        fill("full")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(store_module, "save_file", save)
    folder = fill("full").folder
    assert contents(folder) == whole


def test_nan_is_refused_by_the_number_of_its_text_and_earlier_shards_stay(fill, model, batch):
    runs = []

    def spoil(module, inputs, output):
        runs.append(len(output))
        if sum(runs) > 6:  # the third shard begins at text 6
            output = output.clone()
            output[0] = float("nan")
        return output

    longest = 6 + int(batch.attention[6:9].sum(1).argmax())
    handle = model.blocks[0].mlp.register_forward_hook(spoil)
    with pytest.raises(BadActivations, match=rf"text {longest}\."):
        fill("nan")
    handle.remove()
    assert contents(fill("nan").folder) == contents(fill("whole").folder)


def test_a_huge_bos_does_not_keep_the_real_tokens_out_of_float16(fill, model, batch):
    """The first position reaches hundreds of times the rest (S0.26); it is not stored, so it need
    not fit."""

    def enlarge(module, inputs, output):
        output = output.clone()
        output[torch.arange(len(output)), (output.shape[1] - lengths[: len(output)])] = 1e5
        return output

    lengths = batch[:1].attention.sum(1)
    handle = model.blocks[1].register_forward_hook(lambda m, i, o: enlarge(m, i, o))
    try:
        with pytest.raises(BadActivations, match="float16"):
            harvest(model, batch[:1], "blocks.2.hook_resid_pre", dtype=torch.float16)
        assert fill(hooks="blocks.2.hook_resid_pre", dtype=torch.float16, batch=batch[:1]).complete
    finally:
        handle.remove()


def test_a_model_with_hooks_does_not_fill_a_store_named_by_its_weights(fill, model):
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda t, hook: t * 0)]),
        pytest.raises(ValueError, match=r"hook_(mlp_)?out has a hook"),
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
    assert not (tmp_path / "store").exists()


def test_a_folder_that_is_no_store_or_of_an_earlier_layout_says_so(tmp_path, fill):
    with pytest.raises(FileNotFoundError, match="manifest"):
        ActivationStore(tmp_path)
    folder = fill().folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(ValueError, match="earlier layout"):
        ActivationStore(folder)
