"""The scripts that train the bundled models: same windows whatever was asked before, resumed runs equal whole ones."""

import functools
import gzip
import hashlib
import importlib
import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lenslab.paths import REPOSITORY
from lenslab.runtime import derive_generator

CONTEXT, BATCH, STEPS = 16, 2, 20
SENTENCES = [
    "The cat sat on the mat. ",
    "Ein Satz, der länger ist. ",
    "def f(x): return x + 1\n",
    "One, two, three, four. ",
]


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules; they import one another by their bare names, so their folder is on the path."""
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    try:
        names = ("pocket_corpus", "checkpoints", "muon", "pocket_card", "train_pocket_gpt")
        loaded = {name: importlib.import_module(name) for name in names}
        yield SimpleNamespace(
            corpus=loaded["pocket_corpus"],
            checkpoints=loaded["checkpoints"],
            muon=loaded["muon"],
            card=loaded["pocket_card"],
            train=loaded["train_pocket_gpt"],
        )
    finally:
        sys.path.remove(str(REPOSITORY / "scripts"))


def documents(n=40):
    return {c: [SENTENCES[(i + k) % 4] * (4 + i % 5) + str(i) for i in range(n)] for k, c in enumerate(("math", "web"))}


# Corpus


def write_corpus(folder, texts):
    for category, rows in texts.items():
        file = folder / category / "source.jsonl.gz"
        file.parent.mkdir(parents=True)
        with gzip.open(file, "wt", encoding="utf-8") as handle:
            handle.writelines(json.dumps({"text": text}) + "\n" for text in rows)


def test_a_document_is_held_out_by_its_content_alone(scripts):
    texts = [f"document number {i}" for i in range(5000)]
    held = [scripts.corpus.is_held_out(text) for text in texts]
    assert held == [int.from_bytes(hashlib.sha256(t.encode()).digest()[:4], "big") % 100 < 2 for t in texts]
    assert 0.014 < np.mean(held) < 0.026


def test_training_and_validation_share_nothing_and_lose_nothing(scripts, tmp_path, monkeypatch):
    texts = {"math": [f"sum {i}" for i in range(400)], "web": [f"page {i}" for i in range(300)]}
    write_corpus(tmp_path, texts)
    monkeypatch.setattr(scripts.corpus, "read_python", lambda: [f"def f{i}(): pass" for i in range(300)])
    train, validation = scripts.corpus.load_documents(str(tmp_path))
    assert set(train) == set(validation) == {"math", "web", "python"}
    for category in texts:
        assert not set(train[category]) & set(validation[category])
        assert sorted(train[category] + validation[category]) == sorted(texts[category])
    assert sum(map(len, validation.values())) > 0


def test_no_corpus_says_what_to_do_instead(scripts, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"CATEGORY/SOURCE\.jsonl\.gz.*--corpus hub"):
        scripts.corpus.load_documents(str(tmp_path))
    command = ["train_pocket_gpt.py", "--corpus", str(tmp_path / "absent"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="--corpus hub"):
        scripts.train.main()
    assert not (tmp_path / "work").exists()


def test_the_tokenizer_is_of_the_class_that_older_transformers_open_and_loses_no_byte(scripts, tmp_path):
    tokenizer = scripts.corpus.train_tokenizer(documents(), tmp_path / "tokenizer", vocabulary=300)
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    text = "naïve 中文 🙂\n\ttabs  and  spaces"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_every_document_ends_with_eos_once_and_the_encoding_is_cached(scripts, tmp_path):
    texts = documents(10)
    tokenizer = scripts.corpus.train_tokenizer(texts, tmp_path / "tokenizer", vocabulary=300)
    streams = scripts.corpus.encode_streams(texts, tokenizer, tmp_path)
    for category, rows in texts.items():
        parts = np.split(streams[category], np.flatnonzero(streams[category] == 1) + 1)
        assert len(parts.pop()) == 0  # nothing after the last EOS
        same = sorted(tokenizer.decode(part[:-1].tolist()) for part in parts) == sorted(rows)
        assert same, category
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}
    scripts.corpus.encode_streams(texts, tokenizer, tmp_path)
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")} and len(files) == 2


# Windows


@pytest.fixture
def streams():
    rng = np.random.default_rng(0)
    return {
        "math": rng.integers(3, 8192, 40_000).astype(np.uint16),
        "web": rng.integers(3, 8192, 9_000).astype(np.uint16),
    }


def test_a_window_depends_on_the_seed_and_its_number_and_not_on_what_was_asked_before(scripts, streams):
    def fresh(seed=0):
        return scripts.corpus.Windows(streams, seed=seed, bos=0)

    numbers = [0, 1, 7, 500, 65_535, 65_536, 70_000]
    expected = {g: fresh()(g) for g in numbers}
    forwards, backwards = fresh(), fresh()
    for g in numbers:
        np.testing.assert_array_equal(forwards(g), expected[g])
    for g in reversed(numbers):
        np.testing.assert_array_equal(backwards(g), expected[g])
        np.testing.assert_array_equal(backwards(g), expected[g])  # asked twice
    assert not all(np.array_equal(fresh(seed=1)(g), expected[g]) for g in numbers)


def test_windows_start_with_bos_and_read_each_epoch_whole_before_the_next(scripts, streams, monkeypatch):
    monkeypatch.setattr(scripts.corpus, "REPEAT_SHARE", 0.0)
    only = {"math": streams["math"]}
    windows = scripts.corpus.Windows(only, seed=0, bos=0)
    slots = len(only["math"]) // 256
    rows = np.stack([windows(g) for g in range(2 * slots)])
    assert (rows[:, 0] == 0).all()
    whole = {tuple(only["math"][i * 256 : (i + 1) * 256].tolist()) for i in range(slots)}
    first, second = ([tuple(row[1:].tolist()) for row in part] for part in (rows[:slots], rows[slots:]))
    same = set(first) == set(second) == whole  # a name: pytest would spend minutes on drawing the difference
    assert same and len(whole) == slots
    assert [row[0] for row in first] != [row[0] for row in second]  # another order


def test_categories_come_in_the_shares_of_the_mix(scripts, streams):
    windows = scripts.corpus.Windows(streams, seed=0, bos=0)
    windows._extend(1)
    expected = scripts.corpus.MIX["math"] / (scripts.corpus.MIX["math"] + scripts.corpus.MIX["web"])
    assert np.mean(windows.plan[:, 0] == 0) == pytest.approx(expected, abs=0.01)


def test_some_windows_repeat_a_span_of_themselves(scripts, streams):
    windows = scripts.corpus.Windows(streams, seed=0, bos=0)
    repeated = 0
    for g in range(400):
        body = windows(g)[1:]
        repeated += any(np.array_equal(body[length:], body[:-length]) for length in range(24, 120))
    assert repeated / 400 == pytest.approx(scripts.corpus.REPEAT_SHARE, abs=0.03) and repeated > 0


# Checkpoints


def state(step):
    return {"step": step, "weights": torch.full((1000,), float(step))}


def test_the_newest_two_checkpoints_are_kept_and_the_newest_is_read(scripts, tmp_path):
    for step in (5, 50, 500):
        scripts.checkpoints.save_checkpoint(tmp_path, state(step))
    scripts.checkpoints.save_checkpoint(tmp_path, state(1), name="predecay.pt")
    assert {f.name for f in tmp_path.glob("*.pt")} == {"step-00000050.pt", "step-00000500.pt", "predecay.pt"}
    assert {f.stem for f in tmp_path.glob("*.sha256")} == {"step-00000050", "step-00000500", "predecay"}
    assert scripts.checkpoints.latest_checkpoint(tmp_path)["state"]["step"] == 500


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def lose_hash(file):
    file.with_suffix(".sha256").unlink()


@pytest.mark.parametrize("damage", [flip, cut, lose_hash])
def test_a_damaged_newest_checkpoint_is_refused_and_the_one_before_is_used(scripts, tmp_path, capsys, damage):
    for step in (10, 20):
        scripts.checkpoints.save_checkpoint(tmp_path, state(step))
    damage(tmp_path / "step-00000020.pt")
    found = scripts.checkpoints.latest_checkpoint(tmp_path)
    assert found["state"]["step"] == 10 and torch.equal(found["state"]["weights"], state(10)["weights"])
    assert "step-00000020.pt is missing or damaged" in capsys.readouterr().out
    damage(tmp_path / "step-00000010.pt")
    with pytest.raises(ValueError, match="All 2 checkpoints"):  # starting over would look like resuming
        scripts.checkpoints.latest_checkpoint(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_failed_write_keeps_the_last_checkpoint(scripts, tmp_path, capsys, monkeypatch, error):
    for step in (10, 20):
        scripts.checkpoints.save_checkpoint(tmp_path, state(step))

    def full_disk(_, file):
        file.write_bytes(b"half")
        raise error("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    scripts.checkpoints.save_checkpoint(tmp_path, state(30))
    assert "not written" in capsys.readouterr().out
    assert {f.name for f in tmp_path.glob("*.*") if f.suffix != ".sha256"} == {"step-00000010.pt", "step-00000020.pt"}
    assert scripts.checkpoints.latest_checkpoint(tmp_path)["state"]["step"] == 20


def test_no_checkpoint_is_no_error(scripts, tmp_path):
    assert scripts.checkpoints.latest_checkpoint(tmp_path / "absent") is None


def test_a_checkpoint_written_after_going_back_is_kept(scripts, tmp_path):
    for step in (190, 200):
        scripts.checkpoints.save_checkpoint(tmp_path, state(step))
    scripts.checkpoints.drop_later_checkpoints(tmp_path, 160)
    assert scripts.checkpoints.save_checkpoint(tmp_path, state(170)).exists()  # resumed from before the decay


# Muon


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16)])
def test_orthogonalise_brings_singular_values_near_one_and_keeps_directions(scripts, shape):
    generator, rank = derive_generator(0, "muon"), min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator)).Q
    matrix = u @ torch.diag(torch.logspace(-1, 0, rank)) @ v.T  # from 0.1 to 1
    result = scripts.muon.orthogonalise(1e-4 * matrix)  # gradients are small
    values = torch.linalg.svdvals(result)
    assert result.shape == matrix.shape and result.dtype == matrix.dtype
    assert values.min() > 0.6 and values.max() < 1.3
    assert (result * (u @ v.T)).sum() / (result.norm() * (u @ v.T).norm()) > 0.97


def test_orthogonalise_of_zero_is_zero(scripts):
    assert torch.equal(scripts.muon.orthogonalise(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_query_key_and_value_are_orthogonalised_apart(scripts):
    weight = torch.nn.Parameter(torch.zeros(16, 48))
    scale = torch.tensor([1.0, 0.01, 1e-4]).repeat_interleave(16)  # one gradient must not drown another
    weight.grad = torch.linalg.qr(torch.randn(16, 16, generator=derive_generator(0, "qkv"))).Q.repeat(1, 3) * scale
    scripts.muon.Muon([weight], lr=1.0).step()
    for part in weight.detach().chunk(3, dim=1):
        values = torch.linalg.svdvals(part)
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_updates_grow_with_the_root_of_the_aspect_and_decay_weights(scripts):
    weight = torch.nn.Parameter(torch.ones(8, 32))
    weight.grad = torch.zeros(8, 32)
    scripts.muon.Muon([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((8, 32), 0.95))
    weight = torch.nn.Parameter(torch.zeros(8, 32))
    weight.grad = torch.linalg.qr(torch.randn(32, 8, generator=derive_generator(0, "wide"))).Q.T.contiguous()
    scripts.muon.Muon([weight], lr=1.0).step()
    assert torch.linalg.svdvals(weight.detach()).mean() == pytest.approx(2, rel=0.3)


# The training loop


@pytest.fixture
def run(scripts, tmp_path, monkeypatch):
    """`run(work, stop_before=None, **options)`: the script's own `main` on a toy; returns its newest checkpoint."""
    corpus, train = scripts.corpus, scripts.train
    monkeypatch.setattr(corpus, "CONTEXT", CONTEXT)
    monkeypatch.setattr(corpus, "VOCABULARY", 300)
    monkeypatch.setattr(corpus, "train_tokenizer", functools.partial(corpus.train_tokenizer, vocabulary=300))
    monkeypatch.setattr(corpus, "load_documents", lambda _: (documents(), {}))
    monkeypatch.setattr(scripts.card, "write_card", lambda folder, training, validation: training)
    backward = train.backward

    def go(work, stop_before=None, tokens=STEPS * BATCH * CONTEXT, loss=None, start=None):
        calls = 0

        def counted(model, batch):
            nonlocal calls
            calls += 1
            if calls == stop_before:
                raise KeyboardInterrupt
            value = backward(model, batch)
            return value if loss is None else loss

        monkeypatch.setattr(train, "backward", counted)
        command = f"train --smoke --work {tmp_path / work} --tokens {tokens} --batch {BATCH} --checkpoint-minutes 0"
        monkeypatch.setattr(sys, "argv", command.split() + (["--start", str(start)] if start else []))
        try:
            train.main()
        except KeyboardInterrupt:
            assert stop_before is not None
        return scripts.checkpoints.latest_checkpoint(tmp_path / f"{work}-smoke")["state"]

    return go


@pytest.mark.parametrize("stop_before", [7, 19], ids=["at the stable rate", "inside the decay"])
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one(run, capsys, stop_before):
    whole = run("whole")
    halted = run("halted", stop_before=stop_before)
    assert halted["step"] == stop_before - 1 < whole["step"] == STEPS
    capsys.readouterr()
    resumed = run("halted")
    assert f"resumed at step {stop_before - 1}" in capsys.readouterr().out
    assert resumed["step"] == STEPS
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    assert not all(torch.equal(w, halted["model"][n]) for n, w in whole["model"].items())  # it did train on


def test_the_finished_model_is_a_folder_that_hugging_face_opens(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = run("finished")
    folder = tmp_path / "finished-smoke" / "model"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.activation_function == "gelu_new" and len(tokenizer) == model.config.vocab_size
    wte = trained["model"]["transformer.wte.weight"]
    torch.testing.assert_close(model.transformer.wte.weight, wte.bfloat16().float(), rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(run):
    before = run("nan", stop_before=4)
    with pytest.raises(SystemExit, match="checkpoint is intact"):
        run("nan", loss=math.nan)
    assert before["step"] == 3 and run("nan", stop_before=1)["step"] == 3


def test_chunked_backward_equals_the_loss_of_hugging_face(scripts, monkeypatch):
    monkeypatch.setattr(scripts.corpus, "CONTEXT", CONTEXT)
    batch = torch.randint(40, (3, CONTEXT), generator=derive_generator(0, "batch"))
    model = scripts.train.build_model(40, smoke=True)
    loss = scripts.train.backward(model, batch, chunk=7)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    whole = model(batch, labels=batch).loss
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5)


def test_the_rate_warms_up_stays_and_decays_to_almost_nothing(scripts):
    rates = [scripts.train.rate(step, 1000, 200) for step in range(1000)]
    assert rates[0] == 0.01 and rates[100:800] == [1.0] * 700
    assert all(a > b for a, b in itertools.pairwise(rates[800:])) and rates[-1] == 1 / 200


def test_a_larger_budget_goes_on_from_before_the_decay(run, capsys):
    run("longer")
    capsys.readouterr()
    run("longer", tokens=2 * STEPS * BATCH * CONTEXT)
    assert f"resumed at step {STEPS - 4}" in capsys.readouterr().out


def test_training_goes_on_from_the_weights_before_the_decay_on_another_machine(run, tmp_path, scripts):
    """Without the checkpoints: the weights, the tokenizer, the step and the curve are all in the folder."""
    first = run("here")
    folder = tmp_path / "here-smoke" / "model-before-decay"
    before = scripts.checkpoints.load_checkpoint(tmp_path / "here-smoke" / "predecay.pt")
    assert first["decay_from"] == before["step"]
    run("there", start=folder, tokens=2 * STEPS * BATCH * CONTEXT, stop_before=2)
    there = scripts.checkpoints.latest_checkpoint(tmp_path / "there-smoke")["state"]
    assert there["step"] == before["step"] + 1 and there["started"] == before["step"]
    assert there["curve"][: len(before["curve"])] == before["curve"]
    for name, weight in before["model"].items():  # one step of a fresh warm-up away from bf16 of what they were
        torch.testing.assert_close(there["model"][name], weight, rtol=2e-2, atol=2e-2)
    same = (tmp_path / "here-smoke" / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "there-smoke" / "tokenizer" / "tokenizer.json").read_bytes() == same


def test_the_saved_folder_is_a_hugging_face_model_with_the_usual_activation(run, tmp_path):
    from transformers import AutoModelForCausalLM

    state = run("saved")["model"]
    folder = tmp_path / "saved-smoke" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.activation_function == "gelu_new"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name].bfloat16().float()), name


def test_at_least_the_tokens_asked_for_are_seen(run):
    asked = STEPS * BATCH * CONTEXT + 5
    assert run("budget", tokens=asked)["step"] * BATCH * CONTEXT >= asked


def test_every_position_of_the_context_is_trained(run, scripts):
    trained = run("positions")["model"]["transformer.wpe.weight"]
    moved = (trained - scripts.train.build_model(300, smoke=True).transformer.wpe.weight).norm(dim=1)
    assert (moved > 0).all()
