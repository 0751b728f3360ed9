"""Training: what it learns, that a stopped or killed run goes on to the bit, and what it refuses.

Runs are stopped by real signals: SIGINT out of an SAE's own loss or a source's pool, SIGKILL in a
process of their own.
"""

import math
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TEXTS

from lenslab import __version__
from lenslab.capture import harvest
from lenslab.files import NotWritten, latest_checkpoint, save_checkpoint
from lenslab.models import model_key, model_name, random_twin
from lenslab.runtime import derive_generator, progress_bar
from lenslab.sae.inputs import SAEMismatch, input_transform
from lenslab.sae.load import load_sae
from lenslab.sae.save import save_sae
from lenslab.sae.train import (
    ModelSource,
    StoreSource,
    TensorSource,
    TrainingConfig,
    build_sae,
    sources,
    train,
    trainer,
)
from lenslab.sae.train.architectures import ARCHITECTURES, FOR
from lenslab.sae.train.base import TrainingFailed
from lenslab.sae.train.member import Member
from lenslab.store import ActivationStore
from lenslab.tokens import pack, tokenize

D_IN, D_SAE, K = 16, 64, 3
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
CONFIG = TrainingConfig(256 * 120, batch=256, lr=3e-3, dead_after=256 * 20, log_every=10)
SHORT = replace(CONFIG, vectors=256 * 40, dead_after=256 * 8)  # two epochs of 6,000 vectors
ALWAYS = replace(SHORT, checkpoint_minutes=0.0)
SPARSITY = {"relu": 0.2, "gated": 0.2, "jumprelu": 0.02}


def planted(n, label="train"):
    """Sums of three of 48 directions, away from the origin: what an SAE can find."""
    directions = torch.nn.functional.normalize(
        torch.randn(48, D_IN, generator=derive_generator(0, "truth")), dim=1
    )
    generator = derive_generator(1, label)
    which = torch.randint(48, (n, 3), generator=generator)
    strength = 1 + torch.rand(n, 3, generator=generator)
    return 4 * torch.einsum("nk,nkd->nd", strength, directions[which]) + 2


@pytest.fixture(scope="module")
def vectors():
    return planted(6000)


def new(architecture="topk", **options):
    metadata = {"hook_name": "vectors", "model_name": "tiny"} | options.pop("metadata", {})
    if architecture == "transcoder":
        metadata.setdefault("hook_name_out", "vectors")
    usual = {"k": K, "sparsity": SPARSITY.get(architecture)}
    options = {key: usual[key] for key in usual if architecture in FOR[key]} | options
    return build_sae(architecture, D_IN, options.pop("d_sae", D_SAE), metadata=metadata, **options)


def run(sae, vectors, config=CONFIG, **options):
    source = vectors if hasattr(vectors, "pool") else TensorSource(vectors, pool=2000)
    return train({"sae": sae}, source, config, progress=False, **options)["sae"]


def equal(one, two):
    one, two = one.trained.state_dict(), two.trained.state_dict()
    return all(torch.equal(value, two[key]) for key, value in one.items())


def at_loss(sae, number, act):
    """The SAE, whose loss does something at its call of this number, and then goes on."""
    loss, calls = sae.loss, []

    def watched(*given):
        calls.append(1)
        if len(calls) == number:
            act()
        return loss(*given)

    sae.loss = watched
    return sae


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def interrupted(sae, at, *given, **options):
    """A run that Ctrl-C reaches in the middle of a step, the `at`-th from where it begins."""
    with pytest.raises(KeyboardInterrupt):
        run(at_loss(sae, at, ctrl_c), *given, **options)


# What it learns


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns_and_is_saved_as_it_is(architecture, vectors, tmp_path):
    held_out = planted(1000, "held out")
    result = run(new(architecture), vectors, held_out=TensorSource(held_out))
    losses = result.history.fvu
    assert losses.iloc[-1] < 0.8 * losses.iloc[0] and result.held_out["fvu"] < 0.6
    loaded = load_sae(save_sae(result.sae, tmp_path / "sae"))
    x_hat = loaded.decode(loaded.encode(held_out))
    fvu = (held_out - x_hat).square().sum() / (held_out - held_out.mean(0)).square().sum()
    fired = loaded.encode(held_out) > 0
    assert float(fvu) == pytest.approx(result.held_out["fvu"], rel=1e-4)
    assert float(fired.sum(1).float().mean()) == pytest.approx(result.held_out["l0"], rel=1e-3)
    assert result.held_out["dead"] == int((~fired.any(0)).sum())
    assert result.held_out["vectors"] == 1000


def packed(model, n, words=40):
    vocabulary = " ".join(TEXTS).split()
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(len(vocabulary), (words,), generator=generator) for _ in range(n))
    return pack(model, [" ".join(vocabulary[i] for i in row) for row in drawn], length=32)


def members():
    metadata = {"hook_name": HOOKS[0], "hook_name_out": HOOKS[1]}
    return {
        "first": build_sae("topk", 32, 64, k=4, metadata={"hook_name": HOOKS[0]}),
        "second": build_sae("batchtopk", 32, 64, k=4, metadata={"hook_name": HOOKS[1]}),
        "third": build_sae("relu", 32, 64, metadata={"hook_name": HOOKS[0]}),
        "fourth": build_sae("transcoder", 32, 64, k=4, metadata=metadata),
    }


def stored(model, batch, folder):
    store = ActivationStore.open(
        model,
        batch,
        HOOKS,
        folder=folder,
        dtype=torch.float32,
        compute="float32",
        texts_per_shard=9,
    )
    return harvest(model, batch, HOOKS, store=store, progress=False)


def test_several_saes_at_several_hooks_come_from_one_pass_and_equal_those_trained_alone(model):
    batch, passes = packed(model, 30), []
    source = ModelSource(model, batch, HOOKS)
    forward = model.forward
    model.forward = lambda *given, **options: passes.append(1) or forward(*given, **options)
    config = TrainingConfig(64 * 20, batch=64, log_every=5)
    try:
        together = train(members(), source, config, progress=False)
    finally:
        del model.forward
    assert len(passes) <= -(-len(batch) // 32)  # all of it once
    for name in ("second", "fourth"):
        one = {name: members()[name]}
        alone = train(one, ModelSource(model, batch, HOOKS), config, progress=False)
        assert equal(alone[name], together[name])


def test_what_the_saved_sae_says(model, tmp_path):
    batch = packed(model, 30)
    config = TrainingConfig(64 * 10, batch=64, seed=3)
    sae = train(members(), ModelSource(model, batch, HOOKS), config, progress=False)["first"].sae
    metadata = load_sae(save_sae(sae, tmp_path / "sae")).cfg.metadata
    expected = {
        "hook_name": HOOKS[0],
        "model_name": model_name(model),
        "model_key": model_key(model),
        "prepend_bos": True,
        "context_size": 32,
        "training_vectors": 640,
        "distinct_training_vectors": batch.n_real,
        "seed": 0,
        "trained_as": "topk",
        "lenslab_version": __version__,
    }
    assert {key: metadata[key] for key in expected} == expected


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", ["store", "model"])
def test_a_saved_sae_says_whether_its_texts_began_with_bos(kind, bos, model, tmp_path, monkeypatch):
    monkeypatch.setenv("LENSLAB_COMPUTE", "float32")
    batch = tokenize(model, TEXTS, bos=bos, pad_side="left")
    source = ModelSource(model, batch, HOOKS)
    if kind == "store":
        source = StoreSource(stored(model, batch, tmp_path / "store"))
    config, told = TrainingConfig(16, batch=16), {"hook_name": HOOKS[0], "prepend_bos": not bos}
    sae = train(members(), source, config, progress=False)["first"].sae
    loaded = load_sae(save_sae(sae, tmp_path / "sae"))
    assert loaded.cfg.metadata.prepend_bos is bos
    assert loaded.cfg.metadata.context_size == batch.tokens.shape[1]
    input_transform(loaded, model, batch)
    if not bos:
        with pytest.raises(SAEMismatch, match="without BOS"):
            input_transform(loaded, model, tokenize(model, TEXTS))
    with pytest.raises(ValueError, match="prepend_bos"):
        run(build_sae("topk", 32, 64, k=4, metadata=told), source, config)


def test_of_vectors_alone_nobody_knows_whether_there_was_a_bos(vectors, tmp_path):
    sae = run(new(), vectors, replace(CONFIG, vectors=512)).sae
    assert load_sae(save_sae(sae, tmp_path / "sae")).cfg.metadata.prepend_bos is None


# Dead latents


def silenced(architecture, **options):
    """Three quarters of the latents begin so short that they never fire."""
    few = torch.arange(D_SAE) % 4 > 0
    sae = new(architecture, **options)
    sae.W_enc.data[:, few] *= 0.01
    sae.b_enc.data[few] = -0.2
    return sae


@pytest.mark.parametrize(
    ("architecture", "options"), [("topk", {}), ("relu", {}), ("relu", {"tied": True})]
)
def test_dead_latents_are_revived_by_auxk_and_by_resampling(architecture, options, vectors):
    dead = run(silenced(architecture, **options), vectors).history.dead
    assert dead.max() >= 40 and dead.iloc[-1] < 24


def test_without_revival_they_stay_dead(vectors):
    dead = run(silenced("topk", auxiliary=0.0), vectors).history.dead
    assert dead.iloc[-1] >= 40


def silence(sae, latents):
    """From now on they never fire."""
    jumps = sae.config.architecture == "jumprelu"
    (sae.threshold if jumps else sae.b_enc).data[latents] = 50.0 if jumps else -50.0


@pytest.mark.parametrize("architecture", ["jumprelu", "gated", "relu"])
def test_latents_that_could_never_fire_fire_again(architecture, vectors):
    def fired(dead_after):
        sae = new(architecture, sparsity=0.1)
        at_loss(sae, 1, lambda: silence(sae, slice(12)))  # after the first sample was fitted
        trained = run(sae, vectors, replace(CONFIG, dead_after=dead_after)).sae
        return int((trained.encode(vectors)[:, :12] > 0).any(0).sum())

    assert fired(256 * 1000) == 0 and fired(256 * 20) >= 10


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_a_resampled_latent_begins_anew_in_every_way_and_no_other_is_touched(architecture, vectors):
    """Weights at the end of a step and at the next one's beginning, latents resampled between."""
    sae, seen = new(architecture), {}
    at_loss(sae, 1, lambda: silence(sae, slice(8)))
    loss, after_step, calls = sae.loss, sae.after_step, []

    def one_is_bad(*given):
        calls.append(1)
        if len(calls) == 10:  # the ninth step has resampled
            raise OSError("looked at")
        losses = loss(*given)
        seen["x"] = given[0][7]
        error = torch.zeros_like(losses.error)
        error[7] = 1.0  # the only vector that is reconstructed badly
        return losses._replace(error=error)

    def copying():
        after_step()
        seen["before"] = {key: p.detach().clone() for key, p in sae.named_parameters()}

    sae.loss, sae.after_step = one_is_bad, copying
    with pytest.raises(OSError, match="looked at"):
        run(sae, vectors, replace(CONFIG, dead_after=256 * 8))
    before, now = seen["before"], {key: p.detach() for key, p in sae.named_parameters()}
    direction = torch.nn.functional.normalize(seen["x"] - before["b_dec"], dim=0)
    length = 0.2 * before["W_enc"][:, 8:].norm(dim=0).mean()
    assert torch.equal(before["b_dec"], now["b_dec"])
    assert torch.allclose(now["W_dec"][:8], direction.expand(8, -1), atol=1e-6)
    assert torch.allclose(now["W_enc"].T[:8], length * direction.expand(8, -1), atol=1e-6)
    half = float(length * (seen["x"] - before["b_dec"]).norm() / 2)  # it fires from a cosine of .5
    first = {"threshold": half} if architecture == "jumprelu" else {"b_enc": -half}
    for key in before.keys() - {"b_dec"}:
        old, fresh = (part.T if key == "W_enc" else part for part in (before[key], now[key]))
        assert torch.equal(old[8:], fresh[8:])
        if fresh.ndim == 1:
            assert fresh[:8].tolist() == pytest.approx([first.get(key, 0.0)] * 8, rel=1e-5)


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu"])
def test_most_latents_resampled_at_once_do_not_undo_the_training(architecture, vectors):
    sae = new(architecture, d_sae=512)
    config = replace(CONFIG, dead_after=256 * 10, log_every=1)
    at_loss(sae, 5, lambda: silence(sae, slice(4, None)))
    assert run(sae, vectors, config).history.fvu.iloc[10:].max() < 1.5


def test_silence_is_counted_in_vectors(vectors):
    config = TrainingConfig(256 * 6, batch=256, lr=1e-9, dead_after=3 * 256 - 100, log_every=1)
    sae = new("relu")
    sae.b_enc.data[:5] = -1e4
    assert run(sae, vectors, config).history.dead.tolist() == [0, 0, 5, 5, 5, 5]  # 768 >= 668


# Rates and logs


def test_the_rate_rises_and_falls_to_its_floor():
    shares = dict(warm_up=0.1, hold=0.0, floor=0.2, sparsity_warm_up=0.5)
    config = TrainingConfig(100 * 10, batch=10, **shares)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.2 + 0.8 * 0.5)
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert config.warm(0) == 0.02 and config.warm(24) == 0.5 and config.warm(60) == 1.0


def test_between_rise_and_fall_the_rate_stays():
    config = TrainingConfig(100 * 10, batch=10)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] < 1 and set(rates[5:81]) == {1.0} and rates[90] == pytest.approx(0.55)
    assert all(after < before for before, after in pairwise(rates[80:]))
    assert replace(config, hold=1.0).rate(99) == 1.0
    ended = replace(config, decay=0.5)  # it falls from step 40 on
    assert ended.rate(40) == 1.0 and ended.rate(45) == pytest.approx(0.55)
    assert ended.rate(50) == ended.rate(99) == pytest.approx(0.1)


def test_the_floor_may_be_reached_before_the_end():
    """Warm-up, a cosine to half of the rate, then constant."""
    config = TrainingConfig(1000 * 10, batch=10, warm_up=0.1, hold=0.0, floor=0.5, decay=0.6)
    rates = [config.rate(step) for step in range(config.steps)]
    assert max(rates) == 1 and rates[99] == 1 and rates[350] == pytest.approx(0.75, abs=0.01)
    assert set(rates[600:]) == {0.5} and rates[590] > 0.5
    with pytest.raises(ValueError, match="shares"):
        replace(config, warm_up=500.0)  # steps


def test_wide_vectors_and_long_trainings_have_a_lower_rate_unless_told():
    """2 / sqrt(d_in * steps), whatever the number of latents, and never more than .008, at which no
    architecture diverged."""

    def peak(d_in, steps, d_sae=64, lr=None):
        sae = build_sae("topk", d_in, d_sae, k=4, metadata={"hook_name": "vectors"})
        return Member("sae", sae, TrainingConfig(8 * steps, batch=8, lr=lr), sae.config).lr

    rate = 2 / math.sqrt(256 * 600)
    assert peak(256, 600) == peak(256, 600, d_sae=128) == pytest.approx(rate)
    assert peak(1024, 600) == peak(256, 2400) == pytest.approx(rate / 2)
    assert peak(64, 600) == peak(256, 1) == peak(256, 0) == 0.008
    assert peak(256, 600, lr=0.02) == 0.02


def test_a_short_training_has_a_history_too(vectors):
    """Rows are means since the row before: with one row for all of it, the last would not say where
    it ended."""
    rows = {n: TrainingConfig(n * 256, batch=256).row for n in (6, 29, 400, 5000)}
    assert rows == {6: 10, 29: 10, 400: 20, 5000: 50} and replace(CONFIG, log_every=7).row == 7
    history = run(new(), vectors, TrainingConfig(29 * 256, batch=256)).history
    assert history.step.tolist() == [10, 20, 29]
    every = run(new(), vectors, TrainingConfig(29 * 256, batch=256, log_every=1)).history
    for key in ("loss", "fvu", "mse", "auxiliary", "l0"):
        assert history[key].iloc[-1] == pytest.approx(every[key].iloc[20:].mean(), rel=1e-6)


def test_tensorboard_and_the_bar_show_loss_fvu_l0_and_dead(vectors, tmp_path, capsys, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TQDM_DISABLE", "0")
    at_once = {"delay": 0, "mininterval": 0}
    monkeypatch.setattr(trainer, "progress_bar", lambda **o: progress_bar(**o | at_once))
    result = train({"a": new()}, TensorSource(vectors), SHORT, log_dir=tmp_path)["a"]
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    assert set(result.history) - {"step"} <= set(events.Tags()["scalars"])
    logged = events.Scalars("fvu")
    assert [event.step for event in logged] == result.history.step.tolist()
    assert [event.value for event in logged] == pytest.approx(result.history.fvu.tolist(), rel=1e-5)
    last = result.history.iloc[-1]
    variance = float(vectors.var(0, correction=0).mean()) * float(result.trained.scale) ** 2
    assert last.mse == pytest.approx(last.fvu * variance, rel=0.05)
    shown = capsys.readouterr().err
    assert all(f"{key}=" in shown for key in ("loss", "fvu", "l0", "dead"))


def test_a_run_that_goes_on_strikes_out_what_was_logged_after_its_checkpoint(vectors, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainingConfig(256 * 20, batch=256, log_every=1, checkpoint_minutes=0.0)
    options = dict(folder=tmp_path / "run", log_dir=tmp_path / "log")
    interrupted(new(), 12, vectors, config, **options)
    newest = sorted((tmp_path / "run").glob("step-*.pt"))[-1]
    newest.write_bytes(b"cut off")  # so it goes on from step 11, though 12 was logged
    result = run(new(), vectors, config, **options)
    events = EventAccumulator(str(tmp_path / "log" / "sae"))
    events.Reload()
    steps = [event.step for event in events.Scalars("loss")]
    assert steps == list(range(1, 21)) == result.history.step.tolist()
    shorter = replace(config, vectors=256 * 7)  # another run in the same place
    run(new(), vectors, shorter, log_dir=tmp_path / "log")
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 8))
    assert sorted(int(file.stem[5:]) for file in (tmp_path / "run").glob("step-*.pt")) == [19, 20]


@pytest.mark.parametrize("what", ["a file in the way", "a place where nothing can be written"])
def test_a_tensorboard_folder_that_cannot_be_written_is_told_before_training(
    what, vectors, tmp_path, monkeypatch
):
    sae, log_dir = new(), tmp_path / "log"
    if what == "a file in the way":
        log_dir.write_text("notes")
    else:

        def refused(**_):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(trainer.tempfile, "TemporaryFile", refused)
    with pytest.raises(NotWritten, match=r"log.sae was not written"):
        run(sae, vectors, SHORT, log_dir=log_dir, folder=tmp_path / "run")
    assert not list((tmp_path / "run").glob("step-*"))
    run(sae, vectors, SHORT)  # nothing was begun


# Going on


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stopped_at_any_step_it_goes_on_to_the_bit(architecture, vectors, tmp_path):
    whole = run(new(architecture), vectors, SHORT)
    for more in (3, 18, 1, 15):  # within pools, between them, around an epoch's end
        interrupted(new(architecture), more, vectors, SHORT, folder=tmp_path)
    resumed = run(new(architecture), vectors, SHORT, folder=tmp_path)
    assert equal(whole, resumed)
    pd.testing.assert_frame_equal(whole.history, resumed.history)


@pytest.mark.parametrize("kind", ["store", "model"])
def test_a_model_and_a_store_are_gone_on_with_to_the_bit(kind, model, tmp_path):
    batch = packed(model, 25)
    if kind == "store":
        source = StoreSource(stored(model, batch, tmp_path / "store"), pool=400)
    else:
        source = ModelSource(model, batch, HOOKS, pool=400)
    config = TrainingConfig(64 * 30, batch=64, dead_after=640)
    assert len(source.sizes(0)) > 2 and config.vectors > batch.n_real
    whole = train(members(), source, config, progress=False)
    for more in (5, 23):
        saes = members()
        at_loss(saes["second"], more, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            train(saes, source, config, folder=tmp_path / "run", progress=False)
    resumed = train(members(), source, config, folder=tmp_path / "run", progress=False)
    assert all(equal(whole[name], resumed[name]) for name in whole)


def test_a_second_training_in_one_folder_is_refused_and_the_first_is_as_if_alone(vectors, tmp_path):
    refused = []

    def second():
        with pytest.raises(NotWritten, match="in use"):
            run(new(), vectors, ALWAYS, folder=tmp_path)
        refused.append(1)

    first = run(at_loss(new(), 9, second), vectors, ALWAYS, folder=tmp_path)
    assert refused and equal(first, run(new(), vectors, ALWAYS))
    run(new(), vectors, ALWAYS, folder=tmp_path)  # the folder is free again
    with pytest.raises(ValueError, match="another run"):
        run(new(seed=3), vectors, ALWAYS, folder=tmp_path)
    run(new(), vectors, ALWAYS, folder=tmp_path)


def test_another_version_or_machine_is_said_when_a_run_goes_on(
    vectors, tmp_path, capsys, monkeypatch
):
    interrupted(new(), 9, vectors, ALWAYS, folder=tmp_path)
    with monkeypatch.context() as patched:
        there = trainer.files.versions() | {"torch": "99.1"}
        patched.setattr(trainer.files, "versions", lambda: there)
        interrupted(new(), 9, vectors, ALWAYS, folder=tmp_path)
    assert "perhaps not to the bit: torch was" in capsys.readouterr().out
    monkeypatch.setenv("LENSLAB_COMPUTE", "bfloat16")
    other = "float32" if trainer.machine_summary()["fast_bf16"] else "bfloat16"
    monkeypatch.setenv("LENSLAB_COMPUTE", other)
    run(new(), vectors, ALWAYS, folder=tmp_path)
    said = capsys.readouterr().out
    assert "torch was 99.1" in said and "fast_bf16" in said and "scipy" not in said


EVERY_RENAME = """
import os, sys
from pathlib import Path
import torch
from lenslab.sae.train import TensorSource, TrainingConfig, build_sae, train

torch.set_num_threads(1)
vectors = torch.randn(1500, 16, generator=torch.Generator().manual_seed(0))
config = TrainingConfig(64 * 3, batch=64, checkpoint_minutes=0.0)
replace, unlink = os.replace, Path.unlink

def training(folder=None):
    saes = {"topk": build_sae("topk", 16, 64, k=3)}
    results = train(saes, TensorSource(vectors), config, folder=folder, progress=False)
    return [value for r in results.values() for value in r.trained.state_dict().values()]

def deadly(act, at, calls=[]):
    def one(*given, **options):
        calls.append(1)
        if len(calls) == at[0] and not at[1]:
            os._exit(9)
        act(*given, **options)
        if len(calls) == at[0] and at[1]:
            os._exit(9)
    return one

whole = training()
for name, number, moments in (("replace", 4, (False, True)), ("unlink", 6, (False,))):
    for at in [(n, after) for n in range(1, number + 1) for after in moments]:
        folder = Path(sys.argv[1], f"{name}-{at[0]}-{at[1]}")
        child = os.fork()
        if not child:
            if name == "replace":
                os.replace = deadly(replace, at)
            else:
                Path.unlink = deadly(unlink, at)
            training(folder)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, (name, at)
        resumed = training(folder)
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed)), (name, at)
        left = sorted(file.name for file in folder.iterdir())
        assert left[0] == ".lock" and left[-1] == "step-00000003.pt", (name, at, left)
        assert len(left) <= 4 and all(n.startswith("step-") for n in left[1:]), (name, at, left)
"""


def test_killed_before_or_after_any_rename_or_removal_it_goes_on_to_the_bit(tmp_path):
    command = [sys.executable, "-c", EVERY_RENAME, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from lenslab.sae.train import TensorSource, TrainingConfig, build_sae, train

torch.set_num_threads(1)
folder, draw = Path(sys.argv[1]), random.Random(0)
vectors = torch.randn(6000, 16, generator=torch.Generator().manual_seed(0))
config = TrainingConfig(256 * 40, batch=256, lr=3e-3, dead_after=2048, checkpoint_minutes=0.0)

def training(folder=None):
    saes = {name: build_sae(name, 16, 64, k=3) for name in ("topk", "batchtopk")}
    saes["gated"] = build_sae("gated", 16, 64, sparsity=0.2)
    results = train(saes, TensorSource(vectors, pool=2000), config, folder=folder, progress=False)
    return {name: result.trained.state_dict() for name, result in results.items()}

def step():
    return max([int(file.stem[5:]) for file in folder.glob("step-*.pt")], default=0)

for kills in range(3):
    start = step()
    child = os.fork()
    if not child:
        torch.save(training(folder), folder / "result.pt")
        os._exit(0)
    while kills < 2 and step() < start + 8:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit("it ended before it was killed")
        time.sleep(0.001)
    if kills < 2:
        time.sleep(draw.random() * 0.02)  # in the middle of whatever comes next
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
resumed = torch.load(folder / "result.pt", weights_only=True)
for name, state in training().items():
    assert all(torch.equal(value, resumed[name][key]) for key, value in state.items()), name
"""


def test_killed_at_random_steps_and_resumed_it_ends_with_the_same_bits(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("goes on at step") == 2


def test_a_finished_run_is_read_and_not_trained_again(vectors, tmp_path, monkeypatch):
    first = run(new(), vectors, SHORT, folder=tmp_path)
    monkeypatch.setattr(trainer, "__version__", "99.0")  # nor after an update
    again = new()
    again.loss = None
    again = run(again, vectors, SHORT, folder=tmp_path)
    assert equal(first, again) and again.trained.config.metadata["lenslab_version"] == "99.0"
    pd.testing.assert_frame_equal(again.history, first.history)


def test_what_fails_before_its_first_checkpoint_begins_again_from_the_start(vectors, tmp_path):
    """The same objects are given again, as a notebook's cell does: their half-trained weights are
    not a beginning."""
    whole, sae = run(new(), vectors, SHORT), new()

    def gone():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        run(at_loss(sae, 30, gone), vectors, SHORT, folder=tmp_path)
    assert not torch.equal(sae.W_dec, new().W_dec)
    assert latest_checkpoint(tmp_path)["state"]["step"] == 0
    again = run(sae, vectors, SHORT, folder=tmp_path)
    assert equal(again, whole)
    pd.testing.assert_frame_equal(again.history, whole.history)


def test_an_interrupt_waits_for_the_step_to_end_and_leaves_a_checkpoint(vectors, tmp_path, capsys):
    source = TensorSource(vectors, pool=2000)
    whole = train({"a": new(), "b": new("relu")}, source, SHORT, progress=False)
    saes = {"a": at_loss(new(), 30, ctrl_c), "b": new("relu")}
    with pytest.raises(KeyboardInterrupt):
        train(saes, source, SHORT, folder=tmp_path, progress=False)
    assert "stopped at step 30" in capsys.readouterr().out
    state = latest_checkpoint(tmp_path)["state"]
    assert state["step"] == 30 and len(state["members"]["b"]["history"]) == 3
    resumed = train(saes, source, SHORT, folder=tmp_path, progress=False)
    assert "goes on at step 30 of 40" in capsys.readouterr().out
    assert all(equal(whole[name], resumed[name]) for name in whole)


def test_an_interrupt_before_the_first_step_loses_nothing(vectors, tmp_path):
    """While documents are hashed, the first vectors made, and an SAE is fitted."""

    class Stopped(TensorSource):
        def documents(self):
            ctrl_c()

        def pool(self, epoch, number, enough=None):
            ctrl_c()

    held_out, saes = TensorSource(planted(300, "h")), {"a": new(), "b": new("relu")}
    whole = train({"a": new(), "b": new("relu")}, TensorSource(vectors), SHORT, progress=False)
    for options in ({"held_out": held_out}, {"folder": tmp_path}):
        with pytest.raises(KeyboardInterrupt):
            train(saes, Stopped(vectors), SHORT, progress=False, **options)
    fit = saes["a"].fit
    saes["a"].fit = lambda *given: (ctrl_c(), fit(*given))
    with pytest.raises(KeyboardInterrupt):
        train(saes, TensorSource(vectors), SHORT, folder=tmp_path, progress=False)
    resumed = train(saes, TensorSource(vectors), SHORT, folder=tmp_path, progress=False)
    assert all(equal(whole[name], resumed[name]) for name in whole)


def test_an_interrupt_while_vectors_are_made_leaves_a_checkpoint_too(vectors, tmp_path):
    class Stopped(TensorSource):
        def pool(self, epoch, number, enough=None):
            if number == 1:
                ctrl_c()
            return super().pool(epoch, number, enough)

    with pytest.raises(KeyboardInterrupt):
        run(new(), Stopped(vectors, pool=2000), SHORT, folder=tmp_path)
    assert latest_checkpoint(tmp_path)["state"]["step"] == 2000 // 256
    assert equal(run(new(), vectors, SHORT, folder=tmp_path), run(new(), vectors, SHORT))


def test_a_damaged_checkpoint_is_passed_over_and_all_damaged_is_said(vectors, tmp_path, capsys):
    whole = run(new(), vectors, ALWAYS, folder=tmp_path)
    files = sorted(tmp_path.glob("step-*.pt"))
    assert len(files) == 2  # no more are kept
    files[1].write_bytes(files[1].read_bytes()[:-100])
    assert equal(whole, run(new(), vectors, ALWAYS, folder=tmp_path))
    assert "damaged" in capsys.readouterr().out
    for file in tmp_path.glob("step-*.pt"):
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        run(new(), vectors, ALWAYS, folder=tmp_path)


def test_a_damaged_checkpoint_does_not_stay_the_newest(vectors, tmp_path):
    interrupted(new(), 12, vectors, ALWAYS, folder=tmp_path)
    before, newest = sorted(tmp_path.glob("step-*.pt"))
    newest.write_bytes(b"cut off")

    def gone():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):  # before it has saved anything
        run(at_loss(new(), 1, gone), vectors, ALWAYS, folder=tmp_path)
    assert list(tmp_path.glob("step-*")) == [before]


def test_a_full_disk_is_said_and_leaves_the_checkpoint_before(
    vectors, tmp_path, capsys, monkeypatch
):
    save, calls = torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) > 31:  # the first is from before the first step
            file.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    result = run(new(), vectors, ALWAYS, folder=tmp_path)
    assert "No space left" in capsys.readouterr().out and len(result.history) == 4
    assert latest_checkpoint(tmp_path)["state"]["step"] == 30
    monkeypatch.setattr(torch, "save", save)
    assert equal(run(new(), vectors, ALWAYS, folder=tmp_path), result)


def test_a_disk_that_is_full_from_the_start_says_so_and_claims_nothing(
    vectors, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
        result = run(new(), vectors, ALWAYS, folder=tmp_path)
    said = capsys.readouterr().out
    assert "No space" in said and "none before" in said and "kept" not in said
    assert equal(result, run(new(), vectors, ALWAYS, folder=tmp_path))


def test_a_folder_that_is_a_file_is_said_before_the_first_step(vectors, tmp_path):
    (tmp_path / "file").write_text("")
    sae = new()
    sae.loss = None
    with pytest.raises(NotWritten, match="file"):
        run(sae, vectors, folder=tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "config", "named"),
    [
        ({}, {"lr": 1e-2}, r"config\.lr 0.003 .*0.01"),
        ({}, {"vectors": 256 * 50}, r"config\.vectors"),
        ({"seed": 5}, {}, r"sae\.seed 0 .*5"),
        ({"d_sae": 128}, {}, r"sae\.d_sae 64 .*128"),
    ],
)
def test_another_run_is_refused_by_what_differs(options, config, named, vectors, tmp_path):
    run(new(), vectors, SHORT, folder=tmp_path)
    with pytest.raises(ValueError, match=named):
        run(new(**options), vectors, replace(SHORT, **config), folder=tmp_path)


def test_other_data_and_checkpoints_of_something_else_are_refused(vectors, tmp_path):
    metadata = {"corpus": Path("some/where"), "widths": (1, 2)}  # of any kind
    first = run(new(metadata=metadata), vectors, SHORT, folder=tmp_path)
    assert equal(first, run(new(metadata=metadata), vectors, SHORT, folder=tmp_path))
    with pytest.raises(ValueError, match="data"):
        run(new(metadata=metadata), vectors + 1, SHORT, folder=tmp_path)
    earlier = {"config": {}, "source": "", "saes": {}}
    for name, state in (("model", {"model": {}}), ("earlier", {"identity": earlier})):
        save_checkpoint(tmp_path / name, {"step": 3} | state)
        with pytest.raises(ValueError, match="another run: format"):
            run(new(), vectors, folder=tmp_path / name)


def test_a_checkpoint_from_before_momentum_could_be_chosen_goes_on_with_that_of_then(
    vectors, tmp_path
):
    then = replace(SHORT, momentum=0.9)
    straight = run(new(), vectors, then)
    interrupted(new(), 25, vectors, then, folder=tmp_path)
    state = latest_checkpoint(tmp_path)["state"]
    del state["identity"]["config.momentum"]
    save_checkpoint(tmp_path, state)
    with pytest.raises(ValueError, match=r"momentum 0\.9 there, 0\.8 here"):
        run(new(), vectors, SHORT, folder=tmp_path)
    assert equal(straight, run(new(), vectors, then, folder=tmp_path))


# What it refuses


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("batch", (0, -256, 2.5, NAN)),
        ("dead_after", (0, -1, NAN)),
        ("log_every", (0, -3, 2.5, NAN)),
        ("floor", (-1.0, 5.0, NAN)),
        ("decay", (-0.1, NAN)),
        ("warm_up", (NAN,)),
        ("momentum", (-0.1, 1.0, NAN)),
        ("lr", (0.0, -1e-3, NAN, float("inf"))),
        ("checkpoint_minutes", (-1.0, NAN)),
        ("seed", (1.5, NAN, "1")),
        ("vectors", (NAN, -5)),
    ],
)
def test_settings_that_would_train_wrongly_in_silence_are_refused(field, values, vectors):
    for value in values:
        with pytest.raises((ValueError, TypeError), match=field):
            run(new(), vectors, replace(CONFIG, **{field: value}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_refused(dtype, vectors):
    sae = new().to(dtype)
    with pytest.raises(ValueError, match="float32"):
        run(sae, vectors)
    run(sae.float(), vectors, replace(CONFIG, vectors=512))


def test_an_sae_that_was_trained_before_is_refused_and_left_as_it_was(vectors, tmp_path):
    sae, config = new(), replace(CONFIG, vectors=256 * 4)
    run(sae, vectors, config, folder=tmp_path / "a")
    before = sae.config
    for options in ({}, {"folder": tmp_path / "b"}):
        with pytest.raises(ValueError, match="trained before"):
            run(sae, vectors + 1, CONFIG, **options)
    assert sae.config == before
    read = new()
    run(read, vectors, config, folder=tmp_path / "a")  # nothing to do but to load
    with pytest.raises(ValueError, match="trained before"):
        run(read, vectors)
    twice = new()
    with pytest.raises(ValueError, match="trained before"):
        train({"a": twice, "b": twice}, TensorSource(vectors), CONFIG)


def test_widths_hooks_and_models_must_fit(model, vectors, tmp_path):
    with pytest.raises(ValueError, match="width 8"):
        run(build_sae("topk", 8, 64, k=3, metadata={"hook_name": "vectors"}), vectors)
    source = TensorSource({"vectors": vectors, "other": vectors + 1})
    with pytest.raises(ValueError, match=r"blocks\.3\.hook_mlp_out"):
        run(new(metadata={"hook_name": "blocks.3.hook_mlp_out"}), source)
    with pytest.raises(ValueError, match="only a transcoder"):
        run(new(metadata={"hook_name_out": "other"}), source)
    with pytest.raises(ValueError, match="hook_name None"):
        run(new("transcoder", metadata={"hook_name_out": None}), source)
    with pytest.raises(ValueError, match="Held-out"):
        run(new(), vectors, held_out=TensorSource(planted(300, "h")[:, :8]))
    for few in (0, 1):  # said before the training, not after it
        with pytest.raises(ValueError, match="two vectors"):
            run(new(), vectors, held_out=TensorSource(planted(few, "h")))
    store = StoreSource(stored(model, packed(model, 30), tmp_path / "store"))
    metadata = {"hook_name": HOOKS[0], "model_key": "0123456789abcdef"}
    with pytest.raises(ValueError, match="model_key 0123456789abcdef"):
        run(build_sae("topk", 32, 64, k=4, metadata=metadata), store)


def test_fewer_vectors_than_a_batch_are_refused(vectors):
    for source, config in (
        (TensorSource(vectors[:200]), CONFIG),  # too few at all
        (TensorSource(vectors[:2000], pool=256), replace(CONFIG, batch=300)),  # in every pool
        (TensorSource(vectors), replace(CONFIG, vectors=255)),  # asked for
    ):
        with pytest.raises(ValueError, match=r"batch of (256|300) vectors"):
            run(new(), source, config)


def test_constant_and_broken_vectors_are_refused(vectors):
    with pytest.raises(ValueError, match="constant"):
        run(new(), torch.full((600, D_IN), 2.0))
    broken = vectors.clone()
    broken[5555, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        TensorSource(broken)


def test_divergence_stops_the_run_and_keeps_the_checkpoint_before(vectors, tmp_path):
    sae = new()

    def spoilt():
        sae.W_dec.data[0, 0] = float("inf")

    with pytest.raises(TrainingFailed, match=r"sae: .*step 20"):
        run(at_loss(sae, 21, spoilt), vectors, ALWAYS, folder=tmp_path)
    state = latest_checkpoint(tmp_path)["state"]
    assert state["step"] == 20 and torch.isfinite(state["members"]["sae"]["sae"]["W_dec"]).all()
    with pytest.raises(TrainingFailed, match="Lower lr"):
        run(new("relu"), vectors, replace(CONFIG, lr=30.0))


def test_weights_that_a_step_has_spoilt_are_not_saved(vectors, tmp_path):
    sae, after = new(), []

    def spoiling():
        after.append(1)
        if len(after) == 20:
            sae.W_dec.data[0, 0] = float("nan")

    sae.after_step = spoiling
    with pytest.raises(TrainingFailed, match="NaN"):
        run(sae, vectors, ALWAYS, folder=tmp_path)
    assert latest_checkpoint(tmp_path)["state"]["step"] == 19


def test_a_loss_that_runs_away_slowly_stops_the_run_too(vectors):
    sae, after = new(), []

    def worse_and_worse():
        after.append(1)
        if len(after) > 20:
            sae.b_dec.data += 0.5

    sae.after_step = worse_and_worse
    with pytest.raises(TrainingFailed, match=r"FVU .* step \d+: diverged"):
        run(sae, vectors)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_vectors_far_from_the_origin_are_no_divergence_and_one_of_theirs_is_told(
    architecture, vectors
):
    """Not centred: at the start the error is the mean itself, thousands of times the variance."""
    far = vectors + 1000
    rows = run(new(architecture, centre=False), far).history.fvu
    assert rows.iloc[0] > 100 and rows.iloc[-1] < 0.2 * rows.iloc[0]
    with pytest.raises(TrainingFailed, match="Lower lr"):
        run(new(architecture, centre=False), far, replace(CONFIG, lr=30.0))


@pytest.mark.parametrize(("log_every", "moved"), [(1000, 100.0), (1, 3.0)])
def test_far_vectors_diverge_in_one_step_or_in_a_row(log_every, moved, vectors):
    sae, after = new(centre=False), []

    def worse():
        after.append(1)
        sae.b_dec.data += moved * (len(after) == 60)

    sae.after_step = worse
    with pytest.raises(TrainingFailed, match=r"step 6\d: diverged"):
        run(sae, vectors + 1000, replace(CONFIG, log_every=log_every))


@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_a_penalty_that_silences_every_latent_is_no_divergence(architecture, vectors):
    config = replace(CONFIG, lr=1e-2)
    history = run(new(architecture, sparsity=50.0), vectors, config).history
    assert len(history) == 12 and history.l0.iloc[-1] < 0.5
    assert history.fvu.iloc[-1] == pytest.approx(1, abs=0.1)


def test_held_out_documents_that_were_trained_on_are_refused(model, vectors, tmp_path):
    batch = packed(model, 30)
    config = TrainingConfig(640, batch=64)
    trained_on = (
        ModelSource(model, batch, HOOKS),
        StoreSource(stored(model, batch, tmp_path / "store")),
    )
    texts = packed(model, 34)
    for source in trained_on:
        for held_out in (batch[3:5], texts[20:]):
            with pytest.raises(ValueError, match="trained on"):
                train(members(), source, config, held_out=ModelSource(model, held_out, HOOKS))
    sae = new()
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    for rows in (vectors[1000:3000].flip(0), vectors[1000:1020]):  # few are known like many
        with pytest.raises(ValueError, match="trained on"):
            run(sae, vectors, held_out=TensorSource(rows))
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())
    assert sae.config == new().config  # it can be trained yet
    run(sae, vectors, SHORT, held_out=TensorSource(planted(300, "h")))


def test_documents_are_known_in_another_packing(model, tmp_path):
    generator = derive_generator(0, "short documents")
    words = sorted(set(" ".join(TEXTS).split()))
    drawn = (torch.randint(len(words), (6,), generator=generator) for _ in range(60))
    texts = [" ".join(words[i] for i in row) for row in drawn]
    batch, config = pack(model, texts, length=64), TrainingConfig(640, batch=64)
    again = ModelSource(model, pack(model, texts[50:20:-1], length=50), HOOKS)
    for source in (
        ModelSource(model, batch, HOOKS),
        StoreSource(stored(model, batch, tmp_path / "store")),
    ):
        with pytest.raises(ValueError, match="trained on"):
            train(members(), source, config, held_out=again)


@pytest.mark.parametrize("kind", ["store", "model"])
def test_a_hook_of_equal_width_that_the_data_are_not_of_is_refused(kind, model, tmp_path):
    batch, metadata = packed(model, 30), {"hook_name": "blocks.1.hook_resid_post"}
    source = ModelSource(model, batch, HOOKS)
    if kind == "store":
        source = StoreSource(stored(model, batch, tmp_path / "store"))
    with pytest.raises(ValueError, match=r"no hook_name blocks\.1\.hook_resid_post"):
        run(build_sae("topk", 32, 64, k=4, metadata=metadata), source)


def test_held_out_vectors_of_another_model_or_without_tokens_are_refused(model):
    batch = packed(model, 30)
    source, config = ModelSource(model, batch[:20], HOOKS), TrainingConfig(640, batch=64)
    values = harvest(model, batch[20:], HOOKS, progress=False)
    tensors = {hook: value[batch[20:].real] for hook, value in values.items()}
    twin = random_twin(model, label=model_name(model))
    for held_out in (TensorSource(tensors), ModelSource(twin, batch[20:], HOOKS)):
        with pytest.raises(ValueError, match="model_key"):
            train(members(), source, config, held_out=held_out)


# Vectors and memory


def test_a_first_pool_that_fills_no_batch_is_passed_over(vectors, tmp_path):
    """A run that begins again gets the same vectors."""
    source = TensorSource(vectors[:3000], pool=1024, seed=1)
    assert source.sizes(0)[0] < 1024 == source.sizes(0)[1]
    config = replace(ALWAYS, vectors=1024 * 6, batch=1024)
    whole = run(new(), source, config)
    interrupted(new(), 2, source, config, folder=tmp_path)
    assert equal(whole, run(new(), source, config, folder=tmp_path))


def test_vectors_that_want_gradients_are_read_like_others(vectors):
    config = replace(CONFIG, vectors=256 * 4)
    wanting = vectors.clone().requires_grad_()
    assert equal(run(new(), vectors, config), run(new(), wanting, config))


def test_no_vector_is_made_that_no_step_needs_and_a_resumed_run_makes_the_same(
    vectors, tmp_path, monkeypatch
):
    """Seven steps of 100 vectors over pools of 300: of the third pool a third, the first once."""
    monkeypatch.setattr(sources, "RUN", 50)
    config, made = TrainingConfig(700, batch=100, checkpoint_minutes=0.0), []

    class Counted(TensorSource):
        def _vectors(self, units):
            made.append(sum(self.units[i] for i in units))
            return super()._vectors(units)

    whole = run(new(), Counted(vectors, pool=300), config)
    assert made == [300, 300, 100]
    interrupted(new(), 6, Counted(vectors, pool=300), config, folder=tmp_path)
    again = run(new(), Counted(vectors, pool=300), config, folder=tmp_path)
    assert made[3:] == [300, 300, 100] and equal(again, whole)


def test_nothing_kept_grows_with_the_number_of_steps(vectors, tmp_path):
    """What a checkpoint holds is what the run holds; beside weights there is one row of history per
    log."""
    sizes = []
    for steps in (20, 100):
        folder = tmp_path / str(steps)
        config = TrainingConfig(256 * steps, batch=256, log_every=1000)
        run(new(), vectors, config, folder=folder)
        assert len(latest_checkpoint(folder)["state"]["members"]["sae"]["history"]) == 1
        sizes.append((folder / f"step-{steps:08d}.pt").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 0.02 * sizes[0]


def test_who_watches_gets_every_row_and_after_a_stop_those_of_before(vectors, tmp_path):
    seen = []
    sae = {"a": build_sae("topk", D_IN, D_SAE, k=K)}
    config = replace(CONFIG, vectors=256 * 20, log_every=5)
    source = TensorSource(vectors)
    options = {"folder": tmp_path, "progress": False}
    result = train(sae, source, config, watch=lambda *row: seen.append(row), **options)["a"]
    assert seen == [("a", row) for row in result.history.to_dict("records")]
    again = []
    sae = {"a": build_sae("topk", D_IN, D_SAE, k=K)}
    train(sae, source, config, watch=lambda *row: again.append(row), **options)
    assert again == seen
