"""Training: what it learns, that a killed run goes on to the bit, and what it refuses.

Runs are killed by SIGKILL in processes of their own: one interpreter imports the package once and
forks a child for every life of a run.
"""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TEXTS

from lenslab import __version__
from lenslab.capture import harvest
from lenslab.files import latest_checkpoint
from lenslab.models import model_key, model_name, random_twin
from lenslab.runtime import derive_generator, progress_bar
from lenslab.sae.load import load_sae, save_sae
from lenslab.sae.train import sources
from lenslab.sae.train import trainer as checks
from lenslab.sae.train import trainer as training
from lenslab.sae.train.architectures import ARCHITECTURES, FOR, build_sae
from lenslab.sae.train.base import TrainingFailed
from lenslab.sae.train.sources import ModelSource, StoreSource, TensorSource
from lenslab.sae.train.trainer import TrainingConfig, train
from lenslab.store import ActivationStore
from lenslab.tokens import pack

D_IN, D_SAE, K = 16, 64, 3
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
CONFIG = TrainingConfig(256 * 120, batch=256, lr=3e-3, dead_after=256 * 20, log_every=10)


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
    options |= {"k": K} if architecture in FOR["k"] else {}
    return build_sae(architecture, D_IN, options.pop("d_sae", D_SAE), metadata=metadata, **options)


def run(sae, vectors, config=CONFIG, **options):
    source = vectors if hasattr(vectors, "pool") else TensorSource(vectors, pool=2000)
    return train({"sae": sae}, source, config, progress=False, **options)["sae"]


# What it learns


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns_and_is_saved_as_it_is(architecture, vectors, tmp_path):
    options = {
        "relu": {"sparsity": 0.2},
        "gated": {"sparsity": 0.2},
        "jumprelu": {"sparsity": 0.02},
    }
    metadata = {"hook_name_out": "vectors"} if architecture == "transcoder" else {}
    sae = new(architecture, metadata=metadata, **options.get(architecture, {}))
    held_out = planted(1000, "held out")
    result = run(sae, vectors, held_out=TensorSource(held_out))
    losses = result.history.fvu
    assert losses.iloc[-1] < 0.8 * losses.iloc[0] and result.held_out["fvu"] < 0.6
    assert result.held_out["vectors"] == 1000
    loaded = load_sae(save_sae(result.sae, tmp_path / "sae"))
    x_hat = loaded.decode(loaded.encode(held_out))
    fvu = (held_out - x_hat).square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert float(fvu) == pytest.approx(result.held_out["fvu"], rel=1e-4)
    l0 = (loaded.encode(held_out) > 0).sum(1).float().mean()
    assert float(l0) == pytest.approx(result.held_out["l0"], rel=1e-3)


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
    assert len(passes) <= -(-len(batch) // source.batch_size)  # all of it once
    alone = train(
        {"second": members()["second"]}, ModelSource(model, batch, HOOKS), config, progress=False
    )
    for key, value in alone["second"].trained.state_dict().items():
        assert torch.equal(value, together["second"].trained.state_dict()[key]), key


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


def test_dead_latents_are_revived_by_auxk_and_by_resampling(vectors, monkeypatch):
    """Three quarters of the latents begin so short that they never fire; without revival they stay
    there."""
    few = (torch.arange(D_SAE) % 4).nonzero().flatten()
    config = replace(CONFIG, vectors=256 * 200)

    def dead_after(architecture, **options):
        sae = new(architecture, **options)
        sae.W_enc.data[:, few] *= 0.01
        sae.b_enc.data[few] = -0.2
        return run(sae, vectors, config).history.dead.iloc[-1]

    assert dead_after("topk", auxiliary=0.0) >= len(few)
    assert dead_after("topk") < len(few) / 2
    assert dead_after("relu", sparsity=0.2) < len(few) / 2
    monkeypatch.setattr(training._Member, "resample", lambda *given: None)
    assert dead_after("relu", sparsity=0.2) >= len(few)


def test_dead_is_defined_by_the_window(vectors):
    sae = new(auxiliary=0.0)
    sae.b_enc.data[:5] = -1e4
    history = run(sae, vectors, replace(CONFIG, dead_after=256 * 25)).history
    assert (history.dead[history.vectors < 256 * 25] == 0).all()
    assert (history.dead[history.vectors >= 256 * 25] >= 5).all()


def test_the_rate_rises_and_falls_to_its_floor():
    config = TrainingConfig(100 * 10, batch=10, warm_up=0.1, floor=0.2, sparsity_warm_up=0.5)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert (
        rates[10] == 1
        and rates[55] == pytest.approx(0.2 + 0.8 * 0.5)
        and rates[-1] == pytest.approx(0.2, abs=1e-3)
    )
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert config.warm(0) == 0.02 and config.warm(24) == 0.5 and config.warm(60) == 1.0


def test_the_floor_may_be_reached_before_the_end():
    """S2.15: warm-up, a cosine to half of the rate, then constant."""
    config = TrainingConfig(1000 * 10, batch=10, warm_up=0.1, floor=0.5, decay=0.6)
    rates = [config.rate(step) for step in range(config.steps)]
    assert max(rates) == 1 and rates[99] == 1 and rates[350] == pytest.approx(0.75, abs=0.01)
    assert set(rates[600:]) == {0.5} and rates[590] > 0.5


def test_wider_saes_learn_at_a_lower_rate_unless_told(vectors):
    config = TrainingConfig(256 * 4, batch=256, warm_up=0.0, log_every=1)
    peaks = {d: run(new(d_sae=d), vectors, config).history.lr.max() for d in (64, 256)}
    assert peaks[64] == pytest.approx(2 * peaks[256]) and peaks[64] == pytest.approx(1e-3 * 8)


def test_tensorboard_and_the_bar_show_loss_fvu_l0_and_dead(vectors, tmp_path, capsys, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.setattr(
        training,
        "progress_bar",
        lambda **options: progress_bar(**options | {"delay": 0, "mininterval": 0}),
    )
    held_out = TensorSource(planted(1000, "held out"))
    result = train(
        {"a": new()}, TensorSource(vectors), CONFIG, log_dir=tmp_path, held_out=held_out
    )["a"]
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    assert {"loss", "fvu", "mse", "sparsity", "auxiliary", "l0", "dead", "lr"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Scalars("held_out/fvu")[0].value == pytest.approx(result.held_out["fvu"])
    density = events.Histograms("held_out/log10 firing rate")[0].histogram_value
    assert density.num == D_SAE - result.held_out["dead"] and density.max <= 0
    last = result.history.iloc[-1]
    scale = float(result.trained.scale)
    assert last.mse / scale**2 == pytest.approx(
        last.fvu * float(vectors.var(0, correction=0).mean()), rel=0.05
    )
    logged = pd.DataFrame(
        [(event.step, event.value) for event in events.Scalars("fvu")], columns=["step", "fvu"]
    )
    assert logged.step.tolist() == result.history.step.tolist()
    assert logged.fvu.tolist() == pytest.approx(result.history.fvu.tolist(), rel=1e-5)
    shown = capsys.readouterr().err
    assert all(f"{key}=" in shown for key in ("loss", "fvu", "l0", "dead"))


# Going on


def test_a_finished_run_is_read_and_not_trained_again(vectors, tmp_path, monkeypatch):
    first = run(new(), vectors, folder=tmp_path)
    monkeypatch.setattr(training._Member, "step", None)
    again = run(new(), vectors, folder=tmp_path)
    assert torch.equal(again.trained.W_dec, first.trained.W_dec)
    pd.testing.assert_frame_equal(again.history, first.history)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stopped_at_any_step_it_goes_on_to_the_bit(architecture, vectors, tmp_path, monkeypatch):
    config = replace(CONFIG, vectors=256 * 60, checkpoint_minutes=0.0)
    metadata = {"hook_name_out": "vectors"} if architecture == "transcoder" else {}
    whole = run(new(architecture, metadata=metadata), vectors, config)
    step = training._Member.step

    def stops(at):
        def stopping(self, number, given):
            if number == at:
                raise KeyboardInterrupt
            return step(self, number, given)

        return stopping

    for at in (3, 22, 23, 41):  # within pools, between pools, around an epoch's end
        monkeypatch.setattr(training._Member, "step", stops(at))
        with pytest.raises(KeyboardInterrupt):
            run(new(architecture, metadata=metadata), vectors, config, folder=tmp_path)
    monkeypatch.setattr(training._Member, "step", step)
    resumed = run(new(architecture, metadata=metadata), vectors, config, folder=tmp_path)
    for key, value in whole.trained.state_dict().items():
        assert torch.equal(value, resumed.trained.state_dict()[key]), key
    pd.testing.assert_frame_equal(whole.history, resumed.history)


def stopped_at(number, monkeypatch, how):
    """Member `sae`'s (or the second's) step of this number ends in `how()`, after the others have
    made theirs."""
    step = training._Member.step

    def stopping(self, at, given):
        step(self, at, given)
        if at == number and self.name != "first":
            how()

    monkeypatch.setattr(training._Member, "step", stopping)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def test_what_is_interrupted_before_its_first_checkpoint_begins_again_from_the_start(
    vectors, tmp_path, monkeypatch
):
    """The same objects are given again, as a notebook's cell does: their half-trained weights are
    not a beginning."""
    whole, sae = run(new(), vectors), new()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="gone"):
        stopped_at(30, patched, lambda: (_ for _ in ()).throw(OSError("gone")))
        run(sae, vectors, folder=tmp_path)
    assert (
        not torch.equal(sae.W_dec, new().W_dec)
        and latest_checkpoint(tmp_path)["state"]["step"] == 0
    )
    again = run(sae, vectors, folder=tmp_path)
    assert torch.equal(again.trained.W_dec, whole.trained.W_dec)
    pd.testing.assert_frame_equal(again.history, whole.history)


def test_an_interrupt_waits_for_the_step_to_end_and_leaves_a_checkpoint(
    vectors, tmp_path, monkeypatch, capsys
):
    saes = {"first": new(), "second": new("relu")}
    whole = train(
        {"first": new(), "second": new("relu")},
        TensorSource(vectors, pool=2000),
        CONFIG,
        progress=False,
    )
    source = TensorSource(vectors, pool=2000)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stopped_at(29, patched, ctrl_c)  # step 30, which is logged too
        train(saes, source, CONFIG, folder=tmp_path, progress=False)
    assert "stopped and saved at step 30: the same call goes on" in capsys.readouterr().out
    state = latest_checkpoint(tmp_path)["state"]
    assert state["step"] == 30 and len(state["members"]["second"]["history"]) == 3
    resumed = train(saes, source, CONFIG, folder=tmp_path, progress=False)
    assert "goes on at step 30 of 120" in capsys.readouterr().out
    for name, result in whole.items():
        assert torch.equal(result.trained.W_enc, resumed[name].trained.W_enc)
        pd.testing.assert_frame_equal(result.history, resumed[name].history)


def test_an_interrupt_while_vectors_are_made_leaves_a_checkpoint_too(vectors, tmp_path):
    class Stopped(TensorSource):
        def pool(self, epoch, number, enough=None):
            if number == 1:
                ctrl_c()
            return super().pool(epoch, number, enough)

    with pytest.raises(KeyboardInterrupt):
        run(new(), Stopped(vectors, pool=2000), folder=tmp_path)
    assert latest_checkpoint(tmp_path)["state"]["step"] == 2000 // 256
    resumed, whole = run(new(), vectors, folder=tmp_path), run(new(), vectors)
    assert torch.equal(resumed.trained.W_enc, whole.trained.W_enc)


def test_an_sae_that_was_trained_before_is_refused(vectors, tmp_path):
    sae = new()
    run(sae, vectors, replace(CONFIG, vectors=256 * 4), folder=tmp_path / "a")
    for options in ({}, {"folder": tmp_path / "b"}):
        with pytest.raises(
            ValueError,
            match=r"sae has been given to a training before\. Build a new one, or give the folder",
        ):
            run(sae, vectors, replace(CONFIG, vectors=256 * 4), **options)
    read = new()
    run(
        read, vectors, replace(CONFIG, vectors=256 * 4), folder=tmp_path / "a"
    )  # nothing to do but to load
    with pytest.raises(ValueError, match="given to a training before"):
        run(read, vectors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: (new(), replace(CONFIG, lr=1e-2)), "config.lr: 0.003 there, 0.01 here"),
        (lambda: (new(), replace(CONFIG, vectors=256 * 200)), "config.vectors"),
        (lambda: (new(seed=5), CONFIG), "sae.seed"),
        (lambda: (new(d_sae=128), CONFIG), "sae.d_sae: 64 there, 128 here"),
    ],
)
def test_another_configuration_is_refused_by_name(change, message, vectors, tmp_path):
    run(new(), vectors, folder=tmp_path)
    sae, config = change()
    with pytest.raises(ValueError, match=message):
        run(sae, vectors, config, folder=tmp_path)


def test_other_data_are_refused(vectors, tmp_path):
    run(new(), vectors, folder=tmp_path)
    with pytest.raises(ValueError, match="the data"):
        run(new(), vectors + 1, folder=tmp_path)


def test_a_damaged_checkpoint_is_passed_over_and_all_damaged_is_said(vectors, tmp_path, capsys):
    config = replace(CONFIG, checkpoint_minutes=0.0)
    whole = run(new(), vectors, config, folder=tmp_path)
    files = sorted(tmp_path.glob("step-*.pt"))
    assert len(files) == 2  # no more are kept
    files[1].write_bytes(files[1].read_bytes()[:-100])
    resumed = run(new(), vectors, config, folder=tmp_path)
    assert "damaged" in capsys.readouterr().out
    assert torch.equal(whole.trained.W_enc, resumed.trained.W_enc)
    for file in tmp_path.glob("step-*.pt"):
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        run(new(), vectors, config, folder=tmp_path)


def test_a_full_disk_is_said_and_leaves_the_checkpoint_before(
    vectors, tmp_path, capsys, monkeypatch
):
    config, save, calls = replace(CONFIG, checkpoint_minutes=0.0), torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) > 31:  # the first is from before the first step
            file.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    result = run(new(), vectors, config, folder=tmp_path)
    assert "No space left" in capsys.readouterr().out
    assert len(result.history) == 12  # it trained on
    assert latest_checkpoint(tmp_path)["state"]["step"] == 30
    monkeypatch.setattr(torch, "save", save)
    assert torch.equal(
        run(new(), vectors, config, folder=tmp_path).trained.W_dec, result.trained.W_dec
    )


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from lenslab.models import load_model
from lenslab.store import ActivationStore
from lenslab.sae.sources import ModelSource, StoreSource
from lenslab.sae.training import train
from test_sae_training import HOOKS, KILL_CONFIG, members, packed

work, draw = Path({work!r}), random.Random({seed})

def life(kind, folder):
    if kind == "store":
        source = StoreSource(ActivationStore(work / "store"), pool=400)
    else:
        model = load_model({model!r})
        source = ModelSource(model, packed(model, 40), HOOKS, compute="float32", pool=400)
    results = train(members(), source, KILL_CONFIG, folder=folder, progress=False)
    torch.save({{name: result.trained.state_dict() for name, result in results.items()}}, folder / "result.pt")

for kind in ("store", "model"):
    folder, deaths = work / kind, []
    for number in range({kills} + 1):
        child = os.fork()
        if not child:
            try:
                life(kind, folder)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if number < {kills}:
            after = max(deaths, default=0) + draw.randint(1, 12)  # steps
            while (done := max([int(file.stem[5:]) for file in folder.glob("step-*.pt")], default=0)) < after:
                if os.waitpid(child, os.WNOHANG)[0]:
                    raise SystemExit(f"{{kind}} ended before it was killed {kills} times: {{deaths}}")
                time.sleep(0.002)
            time.sleep(draw.random() * 0.02)  # in the middle of whatever comes next
            os.kill(child, signal.SIGKILL)
            deaths.append(done)
        _, status = os.waitpid(child, 0)
    assert status == 0
    print(json.dumps({{kind: deaths}}))
"""

KILL_CONFIG = TrainingConfig(64 * 70, batch=64, lr=3e-3, dead_after=640, checkpoint_minutes=0.0)


def packed(model, n):
    words = " ".join(TEXTS).split()
    generator = torch.Generator().manual_seed(0)
    return pack(
        model,
        [
            " ".join(words[i] for i in torch.randint(len(words), (40,), generator=generator))
            for _ in range(n)
        ],
        length=32,
    )


def members():
    return {
        "first": build_sae("topk", 32, 64, k=4, metadata={"hook_name": HOOKS[0]}),
        "second": build_sae("batchtopk", 32, 64, k=4, metadata={"hook_name": HOOKS[1]}),
        "third": build_sae("relu", 32, 64, metadata={"hook_name": HOOKS[0]}),
        "fourth": build_sae("jumprelu", 32, 64, sparsity=0.1, metadata={"hook_name": HOOKS[1]}),
        "fifth": build_sae("gated", 32, 64, sparsity=0.1, metadata={"hook_name": HOOKS[0]}),
        "sixth": build_sae("matryoshka", 32, 64, k=4, metadata={"hook_name": HOOKS[1]}),
        "seventh": build_sae(
            "transcoder", 32, 64, k=4, metadata={"hook_name": HOOKS[0], "hook_name_out": HOOKS[1]}
        ),
    }


@pytest.mark.parametrize("kind", ["store", "model"])
def test_killed_at_random_steps_and_resumed_it_ends_with_the_same_bits(kind, killed, model):
    """All seven architectures at two hooks, several pools and epochs, some latents dead."""
    folder, deaths = killed
    assert len(deaths[kind]) == KILLS and max(deaths[kind]) < KILL_CONFIG.steps
    batch = packed(model, 40)
    source = (
        StoreSource(ActivationStore(folder / "store"), pool=400)
        if kind == "store"
        else ModelSource(model, batch, HOOKS, compute="float32", pool=400)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train(members(), source, KILL_CONFIG, progress=False)
    finally:
        torch.set_num_threads(threads)
    assert len(source.sizes(0)) > 2 and KILL_CONFIG.vectors > batch.n_real
    resumed = torch.load(folder / kind / "result.pt", weights_only=True)
    for name, result in whole.items():
        for key, value in result.trained.state_dict().items():
            assert torch.equal(value, resumed[name][key]), (name, key)


# What it refuses


def test_widths_and_hooks_must_fit(vectors):
    with pytest.raises(ValueError, match="16 wide, the SAE expects 8"):
        train(
            {"a": build_sae("topk", 8, 64, k=3, metadata={"hook_name": "vectors"})},
            TensorSource(vectors),
            CONFIG,
        )
    with pytest.raises(ValueError, match="the data hold vectors"):
        run(new(metadata={"hook_name": "blocks.3.hook_mlp_out"}), vectors)
    with pytest.raises(ValueError, match="held-out"):
        run(new(), vectors, held_out=TensorSource(planted(300, "h")[:, :8]))


def test_a_store_of_another_model_is_refused(model, tmp_path):
    store = stored(model, packed(model, 30), tmp_path / "store")
    sae = build_sae(
        "topk", 32, 64, k=4, metadata={"hook_name": HOOKS[0], "model_key": "0123456789abcdef"}
    )
    with pytest.raises(ValueError, match="is meant for model_key"):
        train({"a": sae}, StoreSource(store), TrainingConfig(640, batch=64))


def test_fewer_vectors_than_a_batch_are_refused(vectors):
    for source, config in (
        (TensorSource(vectors[:200]), CONFIG),  # too few at all
        (TensorSource(vectors[:2000], pool=256), replace(CONFIG, batch=300)),  # in every pool
    ):
        with pytest.raises(ValueError, match=r"a step needs (256|300) vectors"):
            run(new(), source, config)
    with pytest.raises(
        ValueError, match=r"1 SAEs to train on 255 vectors, 256 at a step.*Raise `vectors`"
    ):
        run(new(), TensorSource(vectors), replace(CONFIG, vectors=255))
    with pytest.raises(ValueError, match=r"0 SAEs .*there must be an SAE"):
        train({}, TensorSource(vectors), CONFIG)


def test_a_short_training_has_a_history_too(vectors):
    """Rows are means since the row before: with one row for all of it, the last would not say where
    it ended."""
    rows = {n: TrainingConfig(n * 256, batch=256).row for n in (6, 29, 400, 5000)}
    assert rows == {6: 10, 29: 10, 400: 20, 5000: 50} and replace(CONFIG, log_every=7).row == 7
    assert run(new(), vectors, TrainingConfig(29 * 256, batch=256)).history["step"].tolist() == [
        10,
        20,
        29,
    ]


def test_constant_and_broken_vectors_are_refused(vectors, tmp_path):
    with pytest.raises(ValueError, match="constant"):
        run(new(), torch.full((600, D_IN), 2.0))
    broken = vectors.clone()
    broken[5555, 3] = float("nan")
    source = TensorSource(broken, pool=1024)
    pool = next(i for i in range(1, 6) if not torch.isfinite(source.pool(0, i)["vectors"]).all())
    with pytest.raises(
        TrainingFailed, match=f"NaN or Inf among the vectors at vectors .epoch 0, pool {pool}"
    ):
        run(new(), source, replace(CONFIG, checkpoint_minutes=0.0), folder=tmp_path)
    state = latest_checkpoint(tmp_path)["state"]
    assert state["step"] == sum(n // 256 for n in source.sizes(0)[:pool])
    assert torch.isfinite(state["members"]["sae"]["sae"]["W_enc"]).all()


def test_divergence_stops_the_run_and_keeps_the_checkpoint_before(vectors, tmp_path, monkeypatch):
    config, step = replace(CONFIG, checkpoint_minutes=0.0), training._Member.step

    def spoilt(self, number, given):
        step(self, number, given)
        if number == 20:
            self.sae.W_dec.data[0, 0] = float("inf")

    monkeypatch.setattr(training._Member, "step", spoilt)
    with pytest.raises(TrainingFailed, match=r"sae: .*step 21"):
        run(new(), vectors, config, folder=tmp_path)
    state = latest_checkpoint(tmp_path)["state"]
    assert state["step"] == 20 and torch.isfinite(state["members"]["sae"]["sae"]["W_dec"]).all()
    monkeypatch.undo()
    with pytest.raises(TrainingFailed, match=r"diverged\. Lower lr"):
        run(new("relu"), vectors, replace(CONFIG, lr=30.0))


def test_held_out_text_that_was_trained_on_is_refused(model, vectors):
    batch = packed(model, 30)
    config, source = TrainingConfig(640, batch=64), ModelSource(model, batch, HOOKS)
    for held_out in (batch[3:5], packed(model, 34)[20:]):
        with pytest.raises(ValueError, match="occur in the training text"):
            train(
                members(),
                source,
                config,
                held_out=ModelSource(model, held_out, HOOKS),
                progress=False,
            )
    with pytest.raises(ValueError, match="occur in the training text"):
        run(new(), vectors, held_out=TensorSource(vectors[1000:3000].flip(0)))


def test_short_documents_that_were_trained_on_are_known_in_another_packing(model, tmp_path):
    """Documents shorter than the 32 tokens that are fingerprinted together stand in no window
    alone."""
    generator = derive_generator(0, "short documents")
    words = sorted(set(" ".join(TEXTS).split()))
    texts = [
        " ".join(words[i] for i in torch.randint(len(words), (6,), generator=generator))
        for _ in range(60)
    ]
    source, config = (
        ModelSource(model, pack(model, texts, length=64), HOOKS),
        TrainingConfig(640, batch=64),
    )
    again = ModelSource(model, pack(model, texts[50:20:-1], length=50), HOOKS)
    with pytest.raises(ValueError, match="occur in the training text"):
        train(members(), source, config, held_out=again, progress=False)
    kept = StoreSource(stored(model, pack(model, texts, length=64), tmp_path / "store"))
    with pytest.raises(ValueError, match="occur in the training text"):
        train(members(), kept, config, held_out=again, progress=False)


def test_held_out_data_that_cannot_be_compared_are_refused(model):
    batch = packed(model, 30)
    source, config = ModelSource(model, batch[:20], HOOKS), TrainingConfig(640, batch=64)
    values = harvest(model, batch[20:], HOOKS, progress=False)
    tensors = {hook: value[batch[20:].real] for hook, value in values.items()}
    with pytest.raises(
        ValueError, match="known by their tokens, the held-out data by their vectors"
    ):
        train(members(), source, config, held_out=TensorSource(tensors), progress=False)
    twin = random_twin(model, label=model_name(model))
    with pytest.raises(ValueError, match="The training vectors are of model_key"):
        train(
            members(), source, config, held_out=ModelSource(twin, batch[20:], HOOKS), progress=False
        )


def test_a_loss_that_runs_away_slowly_stops_the_run_too(vectors, tmp_path, monkeypatch):
    config, step = replace(CONFIG, checkpoint_minutes=0.0), training._Member.step

    def worse_and_worse(self, number, given):
        step(self, number, given)
        if number >= 60:
            self.sae.b_dec.data += 0.5

    monkeypatch.setattr(training._Member, "step", worse_and_worse)
    with pytest.raises(
        TrainingFailed, match=r"sae: FVU .* around step \d+, after 0\.\d+: it diverges\. Lower lr"
    ):
        run(new(), vectors, config, folder=tmp_path)


@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_a_penalty_that_silences_every_latent_is_no_divergence(architecture, vectors):
    with pytest.warns(UserWarning, match=r"sae: hardly any latent is active\. Lower sparsity"):
        history = run(new(architecture, sparsity=50.0), vectors, replace(CONFIG, lr=1e-2)).history
    assert (
        len(history) == 12
        and history.l0.iloc[-1] < 0.5
        and history.fvu.iloc[-1] == pytest.approx(1, abs=0.1)
    )


def test_a_first_pool_that_fills_no_batch_is_passed_over(vectors, tmp_path):
    """Its vectors are not dealt out as those of the next; a run that begins again gets the same
    ones."""
    source = TensorSource(vectors[:3000], pool=1024, seed=1)
    assert source.sizes(0)[0] < 1024 == source.sizes(0)[1]
    config, seen = replace(CONFIG, vectors=1024 * 6, batch=1024), []
    given = sources.batches(source, 1024, 6, (0, 0, 0), source.pool(0, 0))
    seen = [(place, vectors["vectors"]) for place, vectors in given]
    again = list(sources.batches(source, 1024, 6, (0, 0, 0), None))
    assert [place for place, _ in seen] == [place for place, _ in again]
    assert all(
        len(one) == 1024 and torch.equal(one, two["vectors"])
        for (_, one), (_, two) in zip(seen, again, strict=True)
    )
    whole = run(new(), source, config)
    assert torch.isfinite(whole.trained.W_enc).all()


def test_a_refused_training_leaves_the_sae_as_it_was(vectors):
    sae = new()
    weights, config = {key: value.clone() for key, value in sae.state_dict().items()}, sae.config
    with pytest.raises(ValueError, match="occur in the training text"):
        run(
            sae, vectors, held_out=TensorSource(vectors[1000:1020])
        )  # few, but all of them were trained on
    assert sae.config == config and all(
        torch.equal(value, weights[key]) for key, value in sae.state_dict().items()
    )
    run(sae, vectors)


def test_what_else_is_no_training(vectors):
    sae = new()
    with pytest.raises(ValueError, match="under two names"):
        train({"a": sae, "b": sae}, TensorSource(vectors), CONFIG)
    with pytest.raises(
        ValueError, match=r"sae holds torch\.float64: weights are trained in float32"
    ):
        run(new().double(), vectors)
    with pytest.raises(ValueError, match="sae at vectors: The activations are constant"):
        run(new(), torch.ones(600, D_IN))


def test_vectors_that_want_gradients_are_read_like_others(vectors):
    config = replace(CONFIG, vectors=256 * 4)
    one, two = (
        run(new(), given, config).trained for given in (vectors, vectors.clone().requires_grad_())
    )
    assert torch.equal(one.W_enc, two.W_enc)


def test_a_finished_training_survives_held_out_vectors_that_cannot_be_measured(vectors, tmp_path):
    broken = planted(300, "held out")
    broken[7] = float("nan")
    config = replace(CONFIG, vectors=256 * 4)
    with pytest.warns(UserWarning, match="sae could not be measured on the held-out vectors"):
        assert run(new(), vectors, config, held_out=TensorSource(broken)).held_out is None
    silent = new("relu")
    silent.b_enc.data[:] = -1e4
    with pytest.warns(UserWarning, match="hardly any"):
        result = run(
            silent, vectors, config, held_out=TensorSource(planted(300, "h")), log_dir=tmp_path
        )
    assert result.held_out["l0"] == 0 and result.held_out["dead"] == D_SAE


def test_a_run_may_go_on_after_an_update(vectors, tmp_path, monkeypatch):
    first = run(new(), vectors, folder=tmp_path)
    monkeypatch.setattr(checks, "__version__", "99.0")
    again = run(new(), vectors, folder=tmp_path)
    assert torch.equal(first.trained.W_enc, again.trained.W_enc)
    assert again.trained.config.metadata["lenslab_version"] == "99.0"


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"dead_after": 0},
        {"vectors": 0},
        {"log_every": 0},
        {"warm_up": 1.5},
        {"floor": -0.1},
        {"lr": 0.0},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=f"got .*{next(iter(wrong))}"):
        replace(CONFIG, **wrong)


# Memory


def test_nothing_kept_grows_with_the_number_of_steps(vectors, tmp_path):
    """What a checkpoint holds is what the run holds; beside weights there is one row of history per
    log."""
    sizes = []
    for steps in (20, 200):
        folder = tmp_path / str(steps)
        run(new(), vectors, TrainingConfig(256 * steps, batch=256, log_every=1000), folder=folder)
        state = latest_checkpoint(folder)["state"]["members"]["sae"]
        assert len(state["history"]) == 1
        sizes.append(sum(file.stat().st_size for file in folder.glob("*.pt")))
    assert abs(sizes[1] - sizes[0]) < 0.02 * sizes[0]


# Fixtures for the killed runs


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


KILLS = 4


@pytest.fixture(scope="module")
def killed(model, gpt2_folder, tmp_path_factory):
    """(folder, {kind: steps at which it was killed})"""
    work = tmp_path_factory.mktemp("killed")
    stored(model, packed(model, 40), work / "store")
    script = KILLED.format(
        tests=str(Path(__file__).parent),
        work=str(work),
        model=str(gpt2_folder),
        seed=0,
        kills=KILLS,
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    deaths = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return work, deaths[0] | deaths[1]


# Resampling, logs and folders in detail


def at_work(architecture, vectors, config, **options):
    """A member after one step, its first eight latents made dead."""
    sae = new(architecture, **options)
    member = training._Member("a", sae, config, sae.config)
    member.hook = member.hook_out = "vectors"
    member.fit({"vectors": vectors})
    member.step(0, {"vectors": vectors[:256]})
    member.silent[:8] = config.dead_after
    return member


@pytest.mark.parametrize("architecture", ["relu", "tied", "jumprelu", "gated"])
def test_a_resampled_latent_begins_anew_in_every_way_and_no_other_is_touched(architecture, vectors):
    tied = {"tied": True} if architecture == "tied" else {}
    member = at_work("relu" if tied else architecture, vectors, CONFIG, **tied)
    before = {name: value.detach().clone() for name, value in member.sae.named_parameters()}
    x = member.sae.scaled(vectors[:256])
    error = torch.zeros_like(x)
    error[7] = 1.0  # the only vector that is reconstructed badly
    member.resample(40, x, error)
    direction = torch.nn.functional.normalize(x[7] - member.sae.b_dec.detach(), dim=0)
    for name, value in member.sae.named_parameters():
        moments = member.optimizer.state[value]
        rows, kept = (value.T, before[name].T) if name == "W_enc" else (value, before[name])
        if name == "b_dec":
            assert torch.equal(rows, kept)
            continue
        assert torch.equal(rows[8:], kept[8:]) and not torch.equal(rows[:8], kept[:8])
        if name == "W_dec":
            assert torch.allclose(rows[:8], direction.expand(8, -1), atol=1e-6)
        elif name == "W_enc":
            length = 0.2 * float(before[name][:, 8:].norm(dim=0).mean())
            assert torch.allclose(rows[:8], length * direction.expand(8, -1), atol=1e-6)
        else:
            assert rows[:8].tolist() == pytest.approx([0.01 if name == "threshold" else 0.0] * 8)
        for key in ("exp_avg", "exp_avg_sq"):
            moment = moments[key].T if name == "W_enc" else moments[key]
            assert not moment[:8].any() and moment[8:].any()
    assert not member.silent[:8].any()


@pytest.mark.parametrize(
    ("architecture", "parameter", "value"),
    [("jumprelu", "threshold", 50.0), ("gated", "b_enc", -50.0), ("relu", "b_enc", -50.0)],
)
def test_latents_that_could_never_fire_fire_again(architecture, parameter, value, vectors):
    def fired(dead_after):
        sae = new(architecture, sparsity=0.1)
        getattr(sae, parameter).data[:12] = value
        trained = run(sae, vectors, replace(CONFIG, dead_after=dead_after)).trained
        return int((trained.encode(vectors)[:, :12] > 0).any(0).sum())

    assert fired(256 * 1000) == 0 and fired(256 * 20) >= 10


def test_silence_is_counted_in_vectors(vectors):
    config = TrainingConfig(256 * 6, batch=256, lr=1e-9, dead_after=3 * 256 - 100, log_every=1)
    sae = new("relu")
    sae.b_enc.data[:5] = -1e4
    assert run(sae, vectors, config).history.dead.tolist() == [
        0,
        0,
        5,
        5,
        5,
        5,
    ]  # 768 >= 668 after the third


def interrupted(monkeypatch, at):
    step = training._Member.step

    def stopping(self, number, given):
        if number == at:
            raise KeyboardInterrupt
        return step(self, number, given)

    monkeypatch.setattr(training._Member, "step", stopping)


def test_a_run_that_goes_on_strikes_out_what_was_logged_after_its_checkpoint(
    vectors, tmp_path, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainingConfig(256 * 20, batch=256, log_every=1, checkpoint_minutes=0.0)
    options = dict(folder=tmp_path / "run", log_dir=tmp_path / "log")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted(patched, 12)
        run(new(), vectors, config, **options)
    newest = sorted((tmp_path / "run").glob("step-*.pt"))[-1]
    newest.write_bytes(b"cut off")  # so it goes on from step 11, though 12 was logged
    result = run(new(), vectors, config, **options)
    events = EventAccumulator(str(tmp_path / "log" / "sae"))
    events.Reload()
    assert (
        [event.step for event in events.Scalars("loss")]
        == list(range(1, 21))
        == result.history.step.tolist()
    )
    assert sorted(int(file.stem[5:]) for file in (tmp_path / "run").glob("step-*.pt")) == [19, 20]


def test_a_damaged_checkpoint_does_not_stay_the_newest(vectors, tmp_path, monkeypatch):
    config = TrainingConfig(256 * 20, batch=256, checkpoint_minutes=0.0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted(patched, 12)
        run(new(), vectors, config, folder=tmp_path)
    sorted(tmp_path.glob("step-*.pt"))[-1].write_bytes(b"cut off")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted(patched, 11)  # goes on from 11, and is stopped before it has saved anything
        run(new(), vectors, config, folder=tmp_path)
    assert [file.name for file in sorted(tmp_path.glob("step-*"))] == [
        "step-00000011.pt",
        "step-00000011.sha256",
    ]


def test_checkpoints_of_something_else_are_refused(vectors, tmp_path):
    from lenslab.files import save_checkpoint

    save_checkpoint(tmp_path, {"step": 3, "model": {}})
    with pytest.raises(ValueError, match="of something else"):
        run(new(), vectors, folder=tmp_path)


def test_metadata_of_any_kind_do_not_spoil_a_checkpoint(vectors, tmp_path):
    metadata = {"corpus": Path("some/where"), "widths": (1, 2)}
    first = run(new(metadata=metadata), vectors, folder=tmp_path)
    again = run(new(metadata=metadata), vectors, folder=tmp_path)
    assert torch.equal(first.trained.W_dec, again.trained.W_dec)


def test_only_a_transcoder_writes_another_hook_and_it_must_say_which(vectors):
    source = TensorSource({"vectors": vectors, "other": vectors + 1})
    with pytest.raises(ValueError, match="only a transcoder writes another hook"):
        run(new(metadata={"hook_name_out": "other"}), source)
    with pytest.raises(ValueError, match="hook_name_out is None"):
        run(new("transcoder"), source)
    with pytest.raises(ValueError, match="hook_name is 'nowhere'"):
        run(new(metadata={"hook_name": "nowhere"}), source)


def test_the_first_pool_is_made_once(vectors):
    source, made = TensorSource(vectors, pool=2000), []
    pool = source.pool
    source.pool = lambda *place: made.append(place[:2]) or pool(*place)
    run(new(), source, TrainingConfig(256 * 20, batch=256))
    assert made == [(0, 0), (0, 1), (0, 2)]


def test_no_vector_is_made_that_no_step_needs_and_a_resumed_run_makes_the_same(
    vectors, tmp_path, monkeypatch
):
    """Seven steps of 100 vectors over pools of 300: of the third pool a third."""
    monkeypatch.setattr(sources, "RUN", 50)
    config, asked, step = (
        TrainingConfig(700, batch=100, checkpoint_minutes=0.0),
        [],
        training._Member.step,
    )

    class Counted(TensorSource):
        def _vectors(self, units):
            asked.append(sum(self.units[i] for i in units))
            return super()._vectors(units)

    def until(member, number, batch):
        if number == 6:
            raise KeyboardInterrupt
        step(member, number, batch)

    whole = run(new(), Counted(vectors, pool=300), config).sae
    assert asked == [300, 300, 100]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training._Member, "step", until)
        run(new(), Counted(vectors, pool=300), config, folder=tmp_path)
    again = run(new(), Counted(vectors, pool=300), config, folder=tmp_path).sae
    assert asked[3:] == [300, 300, 100, 100]
    assert all(
        torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items()
    )


def test_a_refused_sae_is_left_as_it_was(vectors):
    """Its metadata must not say that it was trained on data that it never saw."""
    used = run(new(), vectors).trained
    before = used.config
    with pytest.raises(ValueError, match="given to a training before"):
        run(used, TensorSource(vectors + 1, hook="vectors"), TrainingConfig(256 * 40, batch=256))
    assert (
        used.config == before
        and used.cfg.metadata.training_vectors == before.metadata["training_vectors"]
    )


def test_wrong_types_are_answered_in_words():
    """In a process of its own: in the tests, types are checked before our own checks are
    reached."""
    code = """
import torch
from lenslab.sae.architectures import build_sae
from lenslab.sae.pretrained import save_sae
from lenslab.sae.sources import ModelSource, TensorSource
from lenslab.sae.training import TrainingConfig, train

sae, source, config = build_sae("topk", 4, 8, k=2), TensorSource(torch.randn(64, 4)), TrainingConfig(64, batch=32)
done = train({"a": sae}, source, config, progress=False)["a"].sae
for call in (
    lambda: build_sae("topk", 4, 8, k=1.5),
    lambda: build_sae("topk", 4, 8.0, k=2),
    lambda: train(sae, source, config),
    lambda: train({"a": done}, source, config),
    lambda: ModelSource(None, ["a text"], "hook"),
    lambda: save_sae(sae, "nowhere"),
):
    try:
        call()
    except TypeError as error:
        print(error)
"""
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said == [
        "Whole numbers are needed, got {'k': 1.5}.",
        "Whole numbers are needed, got {'d_sae': 8.0}.",
        "`saes` are SAEs by name, {'mine': sae}; got TopK.",
        "a is a TopKSAE: only what `build_sae` makes can be trained, not a saved SAE.",
        "Needs a TokenBatch, got list: `pack(model, texts)` makes one of texts.",
        "A TopK is no SAE to be saved: give the `.sae` of what `train` returns.",
    ]
