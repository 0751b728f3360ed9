"""The scripts that train the bundled models: same windows whatever was asked before, resumed runs
equal whole ones."""

import functools
import gzip
import hashlib
import importlib
import itertools
import json
import math
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lenslab.files import REPOSITORY, latest_checkpoint, load_checkpoint, save_checkpoint
from lenslab.runtime import derive_generator
from lenslab.sae.train import build_sae
from lenslab.texts import load_probes
from lenslab.tokens import pack

CONTEXT, BATCH, STEPS = 16, 2, 20
SENTENCES = [
    "The cat sat on the mat. ",
    "Ein Satz, der länger ist. ",
    "def f(x): return x + 1\n",
    "One, two, three, four. ",
]


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules; they import one another by their bare names, so their folder is on
    the path."""
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    try:
        names = ("pocket_corpus", "muon", "pocket_card", "pocket_training", "train_pocket_gpt")
        loaded = {name: importlib.import_module(name) for name in names}
        yield SimpleNamespace(
            corpus=loaded["pocket_corpus"],
            muon=loaded["muon"],
            card=loaded["pocket_card"],
            training=loaded["pocket_training"],
            train=loaded["train_pocket_gpt"],
        )
    finally:
        sys.path.remove(str(REPOSITORY / "scripts"))


def documents(n=40):
    return {
        c: [SENTENCES[(i + k) % 4] * (4 + i % 5) + str(i) for i in range(n)]
        for k, c in enumerate(("math", "web"))
    }


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
    assert held == [
        int.from_bytes(hashlib.sha256(t.encode()).digest()[:4], "big") % 100 < 2 for t in texts
    ]
    assert 0.014 < np.mean(held) < 0.026


def test_training_and_validation_share_nothing_and_lose_nothing(scripts, tmp_path, monkeypatch):
    texts = {"math": [f"sum {i}" for i in range(400)], "web": [f"page {i}" for i in range(300)]}
    write_corpus(tmp_path, texts)
    monkeypatch.setattr(
        scripts.corpus, "read_python", lambda: [f"def f{i}(): pass" for i in range(300)]
    )
    train, validation = scripts.corpus.load_documents(str(tmp_path))
    assert set(train) == set(validation) == {"math", "web", "python"}
    for category in texts:
        assert not set(train[category]) & set(validation[category])
        assert sorted(train[category] + validation[category]) == sorted(texts[category])
    assert sum(map(len, validation.values())) > 0


def test_no_corpus_says_what_to_do_instead(scripts, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"CATEGORY/SOURCE\.jsonl\.gz.*--corpus hub"):
        scripts.corpus.load_documents(str(tmp_path))
    command = [
        "train_pocket_gpt.py",
        "--corpus",
        str(tmp_path / "absent"),
        "--work",
        str(tmp_path / "work"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="--corpus hub"):
        scripts.train.main()
    assert not (tmp_path / "work").exists()


def test_the_tokenizer_is_of_the_class_that_older_transformers_open_and_loses_no_byte(
    scripts, tmp_path
):
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
    assert (
        files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}
        and len(files) == 2
    )


def test_texts_of_the_same_number_and_size_are_encoded_anew(scripts, tmp_path):
    texts = documents(10)
    tokenizer = scripts.corpus.train_tokenizer(texts, tmp_path / "tokenizer", vocabulary=300)
    before = scripts.corpus.encode_streams(texts, tokenizer, tmp_path)["math"].tolist()
    other = {**texts, "math": [text.replace("cat", "dog") for text in texts["math"]]}
    after = scripts.corpus.encode_streams(other, tokenizer, tmp_path)["math"]
    assert "dog" in tokenizer.decode(after.tolist()) and "dog" not in tokenizer.decode(before)
    assert scripts.corpus.corpus_key(texts) == scripts.corpus.corpus_key(documents(10))
    moved = {"math": [*texts["math"], texts["web"][0]], "web": texts["web"][1:]}
    assert scripts.corpus.corpus_key(texts) != scripts.corpus.corpus_key(moved)


def test_a_tokenizer_of_other_texts_is_refused_and_a_copied_one_is_used(scripts, tmp_path):
    texts, other = documents(10), documents(11)
    scripts.corpus.train_tokenizer(texts, tmp_path / "tokenizer", vocabulary=300)
    scripts.corpus.train_tokenizer(texts, tmp_path / "tokenizer", vocabulary=300)
    with pytest.raises(scripts.corpus.OtherCorpus, match="--work another folder"):
        scripts.corpus.train_tokenizer(other, tmp_path / "tokenizer", vocabulary=300)
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "copied")  # as `--start` does
    copied = scripts.corpus.train_tokenizer(other, tmp_path / "copied", vocabulary=300)
    assert len(copied) == 300
    assert {f.name for f in (tmp_path / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_category_without_documents_is_left_out(scripts, tmp_path):
    texts = documents(10) | {"social": []}
    tokenizer = scripts.corpus.train_tokenizer(texts, tmp_path / "tokenizer", vocabulary=300)
    streams = scripts.corpus.encode_streams(texts, tokenizer, tmp_path)
    assert (
        set(streams) == {"math", "web"}
        and scripts.corpus.Windows(streams, seed=0, bos=0)(0)[0] == 0
    )
    with pytest.raises(scripts.corpus.NoCorpus, match="256 tokens"):
        scripts.corpus.Windows({"math": streams["math"][:200]}, seed=0, bos=0)


# Windows


@pytest.fixture
def streams():
    rng = np.random.default_rng(0)
    return {
        "math": rng.integers(3, 8192, 40_000).astype(np.uint16),
        "web": rng.integers(3, 8192, 9_000).astype(np.uint16),
    }


def test_a_window_depends_on_the_seed_and_its_number_and_not_on_what_was_asked_before(
    scripts, streams
):
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


def test_windows_start_with_bos_and_read_each_epoch_whole_before_the_next(
    scripts, streams, monkeypatch
):
    monkeypatch.setattr(scripts.corpus, "REPEAT_SHARE", 0.0)
    only = {"math": streams["math"]}
    windows = scripts.corpus.Windows(only, seed=0, bos=0)
    slots = len(only["math"]) // 256
    rows = np.stack([windows(g) for g in range(2 * slots)])
    assert (rows[:, 0] == 0).all()
    whole = {tuple(only["math"][i * 256 : (i + 1) * 256].tolist()) for i in range(slots)}
    first, second = (
        [tuple(row[1:].tolist()) for row in part] for part in (rows[:slots], rows[slots:])
    )
    same = (
        set(first) == set(second) == whole
    )  # a name: pytest would spend minutes on drawing the difference
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


def test_random_spans_are_of_the_tokenizers_own_vocabulary(scripts, streams, monkeypatch):
    monkeypatch.setattr(scripts.corpus, "REPEAT_SHARE", 1.0)
    zeros = {"math": np.zeros_like(streams["math"])}
    drawn = np.concatenate(
        [scripts.corpus.Windows(zeros, seed=0, bos=0, vocabulary=300)(g) for g in range(200)]
    )
    assert 290 < drawn.max() < 300 and drawn[drawn > 0].min() == 3


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
    scale = torch.tensor([1.0, 0.01, 1e-4]).repeat_interleave(
        16
    )  # one gradient must not drown another
    weight.grad = (
        torch.linalg.qr(torch.randn(16, 16, generator=derive_generator(0, "qkv"))).Q.repeat(1, 3)
        * scale
    )
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
    weight.grad = torch.linalg.qr(
        torch.randn(32, 8, generator=derive_generator(0, "wide"))
    ).Q.T.contiguous()
    scripts.muon.Muon([weight], lr=1.0).step()
    assert torch.linalg.svdvals(weight.detach()).mean() == pytest.approx(2, rel=0.3)


# The training loop


@pytest.fixture
def run(scripts, tmp_path, monkeypatch):
    """`run(work, stop_before=None, **options)`: the script's own `main` on a toy; returns its
    newest checkpoint.

    The toy's tokenizer has 300 ids: windows drawn from more would not be in its model's vocabulary.
    """
    corpus, train = scripts.corpus, scripts.train
    monkeypatch.setattr(corpus, "CONTEXT", CONTEXT)
    monkeypatch.setattr(
        corpus, "train_tokenizer", functools.partial(corpus.train_tokenizer, vocabulary=300)
    )
    monkeypatch.setattr(corpus, "load_documents", lambda _: (documents(), {}))
    monkeypatch.setattr(scripts.card, "write_card", lambda folder, training, validation: training)
    backward = train.backward

    def go(
        work, stop_before=None, tokens=STEPS * BATCH * CONTEXT, loss=None, start=None, options=()
    ):
        calls = 0

        def counted(model, batch):
            nonlocal calls
            calls += 1
            if calls == stop_before:
                raise KeyboardInterrupt
            value = backward(model, batch)
            return value if loss is None else {"loss": loss}

        monkeypatch.setattr(train, "backward", counted)
        command = f"train --smoke --work {tmp_path / work} --tokens {tokens} --batch {BATCH}"
        command += " --checkpoint-minutes 0"
        monkeypatch.setattr(
            sys,
            "argv",
            command.split() + (["--start", str(start)] if start else []) + list(options),
        )
        try:
            train.main()
        except KeyboardInterrupt:
            assert stop_before is not None
        return latest_checkpoint(tmp_path / f"{work}-smoke")["state"]

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
    assert not all(
        torch.equal(w, halted["model"][n]) for n, w in whole["model"].items()
    )  # it did train on
    assert (
        resumed["curve"] == whole["curve"] and whole["curve"]
    )  # its point is a mean over steps of both lives


def test_the_finished_model_is_a_folder_that_hugging_face_opens_with_the_usual_activation(
    run, tmp_path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = run("finished")["model"]
    folder = tmp_path / "finished-smoke" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        model.config.activation_function == "gelu_new"
        and len(tokenizer) == model.config.vocab_size == 300
    )
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name].bfloat16().float()), name


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(run):
    before = run("nan", stop_before=4)
    with pytest.raises(SystemExit, match="checkpoint is intact"):
        run("nan", loss=math.nan)
    assert before["step"] == 3 and run("nan", stop_before=1)["step"] == 3


def test_chunked_backward_equals_the_loss_of_hugging_face(scripts, monkeypatch):
    monkeypatch.setattr(scripts.corpus, "CONTEXT", CONTEXT)
    batch = torch.randint(40, (3, CONTEXT), generator=derive_generator(0, "batch"))
    model = scripts.train.build_model(40, smoke=True)
    chunked = functools.partial(scripts.training.chunked_unembedding, chunk=7)
    monkeypatch.setattr(scripts.train, "chunked_unembedding", chunked)
    loss = scripts.train.backward(model, batch)["loss"]
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    whole = model(batch, labels=batch).loss
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5)


def test_the_rate_warms_up_stays_and_decays_to_almost_nothing(scripts):
    rates = [scripts.training.rate(step, 1000, 200) for step in range(1000)]
    assert rates[0] == 0.01 and rates[100:800] == [1.0] * 700
    assert all(a > b for a, b in itertools.pairwise(rates[800:])) and rates[-1] == 1 / 200


def test_a_larger_budget_goes_on_from_before_the_decay(run, tmp_path, capsys):
    larger = 2 * STEPS * BATCH * CONTEXT
    run("longer")
    files = sorted((tmp_path / "longer-smoke").glob("step-*.pt"))
    with pytest.raises(SystemExit, match=f"--batch {BATCH}"):
        run("longer", options=["--batch", str(BATCH + 1)])
    run("longer", tokens=larger, options=["--export"])
    assert (
        sorted((tmp_path / "longer-smoke").glob("step-*.pt")) == files
    )  # neither took anything away
    capsys.readouterr()
    halted = run("longer", tokens=larger, stop_before=3)
    assert f"resumed at step {STEPS - 4}" in capsys.readouterr().out
    assert halted["step"] == STEPS - 2  # the newest: what the smaller budget saved later is gone


def test_an_extended_run_that_is_killed_at_once_loses_nothing(run, capsys):
    """Going on from before the decay drops the later checkpoints: the state it goes on from must be
    the newest then."""
    larger = dict(tokens=2 * STEPS * BATCH * CONTEXT, options=["--checkpoint-minutes", "5"])
    run("extended")
    assert run("extended", stop_before=3, **larger)["step"] == STEPS - 4
    capsys.readouterr()
    assert run("extended", **larger)["step"] == 2 * STEPS
    assert f"resumed at step {STEPS - 4}" in capsys.readouterr().out


def test_another_share_of_decay_goes_on_from_before_the_old_one(run, capsys):
    run("share", stop_before=19)  # inside the decay of the last 4 of 20 steps
    capsys.readouterr()
    assert run("share", options=["--decay", "0.1"])["decay_from"] == STEPS - 2
    assert f"resumed at step {STEPS - 4}" in capsys.readouterr().out


def test_a_smaller_budget_whose_decay_has_passed_is_refused(run):
    before = run("smaller", tokens=2 * STEPS * BATCH * CONTEXT, stop_before=28)
    for steps in (30, 20):  # its decay would have begun; it would have ended
        with pytest.raises(
            SystemExit, match=r"tokens were already seen, and of .* are for the decay: ask for more"
        ):
            run("smaller", tokens=steps * BATCH * CONTEXT)
    assert (
        run("smaller", tokens=2 * STEPS * BATCH * CONTEXT, stop_before=1)["step"] == before["step"]
    )


def test_a_start_that_has_seen_the_whole_budget_leaves_the_model_as_it_was(run, tmp_path):
    run("here")
    folder = tmp_path / "here-smoke" / "model-before-decay"
    with pytest.raises(SystemExit, match="ask for more with --tokens"):
        run("there", start=folder, tokens=10 * BATCH * CONTEXT)
    assert not (tmp_path / "there-smoke" / "model").exists()
    with pytest.raises(SystemExit, match=f"was trained with --batch {BATCH}"):
        run(
            "there",
            start=folder,
            tokens=2 * STEPS * BATCH * CONTEXT,
            options=["--batch", str(BATCH + 1)],
        )


def test_without_a_decay_the_model_itself_is_what_goes_on(run, tmp_path, capsys):
    run("level", options=["--decay", "0"])
    assert (tmp_path / "level-smoke" / "model" / "config.json").exists()
    assert not (tmp_path / "level-smoke" / "model-before-decay").exists()
    capsys.readouterr()
    run("level", tokens=2 * STEPS * BATCH * CONTEXT)
    assert f"resumed at step {STEPS}" in capsys.readouterr().out


def test_a_folder_that_is_no_model_is_not_replaced(run, tmp_path):
    (tmp_path / "kept-smoke" / "model" / "pocket-gpt").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds something else than a model"):
        run("kept")
    assert (tmp_path / "kept-smoke" / "model" / "pocket-gpt").is_dir()


def test_another_tokenizer_than_the_starts_is_refused(run, scripts, tmp_path):
    run("here")
    (tmp_path / "there-smoke" / "tokenizer").mkdir(parents=True)
    (tmp_path / "there-smoke" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds another tokenizer than"):
        run(
            "there",
            start=tmp_path / "here-smoke" / "model-before-decay",
            tokens=2 * STEPS * BATCH * CONTEXT,
        )


def test_training_goes_on_from_the_weights_before_the_decay_on_another_machine(
    run, tmp_path, scripts
):
    """Without the checkpoints: the weights, the tokenizer, the step and the curve are all in the
    folder."""
    first = run("here")
    folder = tmp_path / "here-smoke" / "model-before-decay"
    before = load_checkpoint(tmp_path / "here-smoke" / "predecay.pt")
    assert first["decay_from"] == before["step"]
    run("there", start=folder, tokens=2 * STEPS * BATCH * CONTEXT, stop_before=2)
    there = latest_checkpoint(tmp_path / "there-smoke")["state"]
    assert there["step"] == before["step"] + 1 and there["started"] == before["step"]
    assert there["curve"][: len(before["curve"])] == before["curve"]
    for name, weight in before[
        "model"
    ].items():  # one step of a fresh warm-up away from bf16 of what they were
        torch.testing.assert_close(there["model"][name], weight, rtol=2e-2, atol=2e-2)
    same = (tmp_path / "here-smoke" / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "there-smoke" / "tokenizer" / "tokenizer.json").read_bytes() == same


def test_at_least_the_tokens_asked_for_are_seen(run):
    asked = STEPS * BATCH * CONTEXT + 5
    assert run("budget", tokens=asked)["step"] * BATCH * CONTEXT >= asked


def test_every_position_of_the_context_is_trained(run, scripts):
    trained = run("positions")["model"]["transformer.wpe.weight"]
    moved = (trained - scripts.train.build_model(300, smoke=True).transformer.wpe.weight).norm(
        dim=1
    )
    assert (moved > 0).all()


def test_weights_between_stretches_are_exported_and_another_batch_is_refused(run, tmp_path):
    from safetensors.torch import load_file

    run("stretch", stop_before=7)
    before = run("stretch", options=["--export"])
    folder = tmp_path / "stretch-smoke" / "model-before-decay"
    stored = load_file(folder / "model.safetensors")["transformer.wpe.weight"]
    assert torch.equal(stored, before["model"]["transformer.wpe.weight"].bfloat16())
    assert (
        json.loads((folder / "training.json").read_text())["training_tokens"] == 6 * BATCH * CONTEXT
    )
    assert not (tmp_path / "stretch-smoke" / "model").exists() and before["batch"] == BATCH
    with pytest.raises(SystemExit, match=f"--batch {BATCH}"):
        run("stretch", options=["--batch", str(BATCH + 1)])


def test_a_checkpoint_that_does_not_say_its_batch_goes_on_with_the_given_one(run, tmp_path, capsys):
    state = run("old", stop_before=7)
    del state["batch"]
    save_checkpoint(tmp_path / "old-smoke", state)
    capsys.readouterr()
    assert run("old")["step"] == STEPS and "resumed at step 6" in capsys.readouterr().out


def test_a_work_folder_of_another_corpus_is_refused(run, tmp_path):
    run("moved", stop_before=2)
    (tmp_path / "moved-smoke" / "tokenizer.corpus").write_text("0123456789abcdef")
    with pytest.raises(SystemExit, match="--work another folder"):
        run("moved")


# SAEs


@pytest.fixture
def tokens_file(model, tmp_path, monkeypatch):
    """Windows to train on and held-out ones, as `--write-tokens` keeps them."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import train_pocket_saes

    batches = {}
    for name, first in (("train", 0), ("held_out", 5000)):
        words = derive_generator(first, "words")
        numbers = torch.randint(first, first + 5000, (400, 12), generator=words).tolist()
        texts = [f"The cat sat on mat {row}, and again. " for row in numbers]
        batches[name] = pack(model, texts)
    train_pocket_saes.write_tokens(tmp_path / "tokens.npz", model, batches)
    return SimpleNamespace(script=train_pocket_saes, file=tmp_path / "tokens.npz", **batches)


def test_windows_are_as_long_as_they_are_asked_to_be(tokens_file, model):
    texts = {"math": ["two and two are four, and four and four are eight. " * 9] * 20}
    for length in (16, 24):
        assert tokens_file.script.windows(model, texts, 200, 0, length).tokens.shape[1] == length
    with pytest.raises(SystemExit):
        tokens_file.script.parse(["--tokens", str(tokens_file.file), "--window", "16"])


def test_what_measures_reads_the_corpus_as_what_trains_does(tokens_file, model, monkeypatch):
    words = {"math": ["two and two are four, and four and four are eight. " * 9] * 20}
    corpus = tokens_file.script.corpus
    monkeypatch.setattr(corpus, "load_documents", lambda folder: (words, words))
    import sae_sweep

    given = sae_sweep.parse(["rates", "--corpus", "anywhere", "--smoke"])
    windows, held_out = tokens_file.script.texts(given, model)
    assert windows.n_real > 4000 > held_out.n_real > 190


def test_windows_kept_in_a_file_come_back_and_another_tokenizer_is_refused(
    tokens_file, model, monkeypatch
):
    whole = tokens_file.train.attention.all(1)
    read = functools.partial(tokens_file.script.read_tokens, tokens_file.file, model, "train")
    everything = read(10**9)
    assert torch.equal(everything.tokens, tokens_file.train.tokens[whole])
    assert torch.equal(everything.real, tokens_file.train.real[whole])
    part = read(200)
    assert 200 <= part.n_real < 200 + 64 and torch.equal(
        part.tokens, everything.tokens[: len(part)]
    )
    monkeypatch.setattr(tokens_file.script, "_tokenizer_key", lambda _: "another")
    with pytest.raises(ValueError, match="made with another tokenizer"):
        read(200)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_another_l0_takes_no_training(tokens_file, architecture):
    x = torch.randn(300, 16, generator=derive_generator(0, "x"))
    metadata = {"hook_name": "blocks.1.hook_resid_post"}
    sae = build_sae(architecture, 16, 64, k=8, metadata=metadata)
    sae.fit(x)
    for l0 in (2, 4):
        active = (tokens_file.script.at_l0(sae, x, l0).encode(x) != 0).sum() / len(x)
        assert float(active) == pytest.approx(l0, rel=0.02)
    assert sae.config.k == 8


def test_floors_stand_beside_the_sae_and_nothing_is_measured_twice(
    tokens_file, gpt2_folder, tmp_path, monkeypatch
):
    import sae_floors

    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
    few = load_probes("categories").groupby("category").head(12)
    monkeypatch.setattr(sae_floors, "load_probes", lambda name: few)
    monkeypatch.setattr(sae_floors, "LEVELS", (4, 8))
    monkeypatch.setattr("lenslab.sae.train.trainer.SHARED", 0.2)  # short texts, much alike
    usual = f"--tokens {tokens_file.file} --model {gpt2_folder} --sites resid-1"
    usual += f" --work {tmp_path / 'work'}"
    training = f"{usual} --smoke --architecture batchtopk --out {tmp_path / 'saes'}".split()
    tokens_file.script.main(training)
    floors = tokens_file.script.main([*training, "--frozen", "decoder", "soft decoder"])
    assert [folder.name.partition("resid-1")[2] for folder in floors] == [
        "-frozen-decoder",
        "-frozen-soft-decoder",
    ]
    measuring = f"{usual} --saes {tmp_path / 'saes'} --validation 500".split()
    found = json.loads(sae_floors.main(measuring).read_text())
    rows = pd.DataFrame(found["config"]["table"])
    names = ["SAE", "frozen decoder", "frozen soft decoder"]
    names += ["random directions", "PCA axes", "raw coordinates"]
    assert rows["name"].tolist() == [name for name in names for _ in (4, 8)]
    assert (rows[["fvu", "best_feature", "probe_5", "probe_16"]] > 0).all().all()
    card = json.loads((floors[0] / "card.json").read_text())
    first = rows.query("name == 'frozen decoder' and asked_l0 == 4").iloc[0]
    assert first["fvu"] == pytest.approx(card["at_l0"]["4"]["sae"]["fvu"], rel=1e-4)
    better = rows.query("asked_l0 == 8").set_index("name")["fvu"]
    ahead = [line for line in found["values"]["ahead"] if "L0 8, fvu" in line]
    assert len(ahead) == (better < better["SAE"]).sum()
    file = tmp_path / "work" / "rows.jsonl"
    file.write_text(file.read_text() + '\n{"site": "resid-1", "na')  # killed while it wrote
    monkeypatch.setattr(sae_floors.Bench, "measure", None)
    assert json.loads(sae_floors.main(measuring).read_text())["config"] == found["config"]
    with pytest.raises(TypeError):  # of other held-out texts every row is measured anew
        sae_floors.main([*measuring[:-1], "300"])


def test_a_sweep_repeats_nothing_and_a_rate_that_is_too_high_stops_no_other(
    tokens_file, gpt2_folder, tmp_path, monkeypatch
):
    import sae_sweep

    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sae_sweep, "RATES", (1e-3, 1e4))
    monkeypatch.setattr(sae_sweep, "LEVELS", (2, 4, 8))
    monkeypatch.setattr(sae_sweep, "MIDDLE", 4)
    monkeypatch.setattr(sae_sweep, "PENALTIES", {"relu": [0.5, 1.0, 2.0, 4.0]})
    monkeypatch.setattr(sae_sweep, "SEEDS", (1,))
    options = f"rates sweep seeds --only topk relu --layer 1 --smoke --work {tmp_path / 'work'}"
    options += f" --tokens {tokens_file.file} --model {gpt2_folder}"
    rates, sweep = (sae_sweep.json.loads(f.read_text()) for f in sae_sweep.main(options.split()))
    failed = {(run["architecture"], run["lr"]) for run in rates["config"]["table"] if run["failed"]}
    assert failed and {lr for _, lr in failed} == {1e4}
    runs = sweep["config"]["table"]
    assert [run["level"] for run in runs if run["architecture"] == "topk"] == [2, 2, 4, 4, 8, 8]
    assert all(run["lr"] == 1e-3 and 0 < run["fvu"] < 2 and run["ce_difference"] for run in runs)
    assert "topk" in sweep["values"]["findings"]["best"]
    before = (tmp_path / "work" / "runs.jsonl").read_text()
    monkeypatch.setattr(sae_sweep, "train", None)
    sae_sweep.main(options.split())
    assert (tmp_path / "work" / "runs.jsonl").read_text() == before


def test_the_best_rate_is_by_fvu_where_k_fixes_l0_and_by_loss_where_a_penalty_does(tokens_file):
    import sae_sweep

    rows = [
        {"architecture": name, "asked_by": "rates", "lr": lr, "fvu": fvu, "loss": loss, "d_sae": 8}
        for name in ("transcoder", "gated")
        for lr, fvu, loss in ((0.001, 0.4, 1.0), (0.004, 0.3, 2.0), (0.008, np.nan, np.nan))
    ]
    done = sae_sweep.pd.DataFrame(rows)
    assert sae_sweep.best_rate(done, "transcoder", {"d_sae": 8}) == 0.004
    assert sae_sweep.best_rate(done, "gated", {"d_sae": 8}) == 0.001
    with pytest.raises(ValueError, match="run `rates` first"):
        sae_sweep.best_rate(done, "gated", {"d_sae": 16})


def test_what_never_came_near_a_level_has_no_value_there_and_is_not_the_best(tokens_file):
    import sae_sweep

    l0 = {"topk": sae_sweep.LEVELS, "gated": sae_sweep.LEVELS, "relu": (40, 50, 70)}
    rows = [
        {"architecture": name, "seed": 0, "l0": level, "fvu": (name != "relu") / level}
        for name, levels in l0.items()
        for level in levels
    ]
    runs = sae_sweep.pd.DataFrame(rows)
    assert sorted(sae_sweep.two_best(runs)) == ["gated", "topk"]
    far = sae_sweep.at_levels(runs[runs["architecture"] == "relu"], "fvu")
    assert np.isnan(far[:4]).all() and far[4] == 0


def test_new_runs_join_those_that_ship_and_take_the_place_of_old_ones(tokens_file):
    import sae_sweep

    def runs(machine, *names):
        rows = [dict(sae_sweep.run_of(n, 8.0, 0.004, d_sae=64, vectors=4096)) for n in names]
        return sae_sweep.pd.DataFrame([row | {"machine": machine} for row in rows])

    def machines(old, new, anew=()):
        table = sae_sweep.merged(old, new, list(anew))
        return dict(zip(table["architecture"], table["machine"], strict=True))

    old, new = runs("old", "topk", "relu", "jumprelu"), runs("new", "relu")
    assert machines(old, new) == {"jumprelu": "old", "relu": "new", "topk": "old"}
    assert machines(old, new, ["jumprelu"]) == {"jumprelu": "old", "relu": "new", "topk": "old"}
    assert machines(None, new) == {"relu": "new"}


def test_a_sweep_of_nothing_says_what_to_run(tokens_file, tmp_path, gpt2_folder):
    import sae_sweep

    options = f"--only relu --layer 1 --smoke --work {tmp_path / 'none'}"
    options += f" --tokens {tokens_file.file} --model {gpt2_folder}"
    for do, message in {
        "collect": "No run is finished",
        "sweep": "run `rates` first",
        "seeds": "No sweep to train",
    }.items():
        with pytest.raises(ValueError, match=message):
            sae_sweep.main([do, *options.split()])


def test_a_half_written_line_spoils_no_other(tokens_file, tmp_path):
    import sae_sweep

    file = tmp_path / "runs.jsonl"
    sae_sweep.write(file, [{"architecture": "topk", "lr": 1.0}])
    with open(file, "a", encoding="utf-8") as handle:
        handle.write('\n{"architecture": "re')  # killed while it wrote
    sae_sweep.write(file, [{"architecture": "gated", "lr": 2.0}])
    assert sae_sweep.finished(file)["architecture"].tolist() == ["topk", "gated"]


def test_a_sweep_that_is_stopped_in_a_training_or_between_two_goes_on(
    tokens_file, gpt2_folder, tmp_path, monkeypatch, capsys
):
    import sae_sweep

    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sae_sweep, "RATES", (1e-3, 2e-3))
    monkeypatch.setattr(sae_sweep, "MIDDLE", 4)
    options = f"rates --only batchtopk --layer 1 --smoke --tokens {tokens_file.file}"
    options = [*options.split(), "--model", str(gpt2_folder), "--work"]
    step, calls = sae_sweep.TrainableSAE.after_step, []

    def stopping(sae):
        step(sae)
        calls.append(1)
        if len(calls) == 6:  # four steps a run: within the second
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sae_sweep.TrainableSAE, "after_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        sae_sweep.main([*options, str(tmp_path / "stopped")])
    assert len(sae_sweep.finished(tmp_path / "stopped" / "runs.jsonl")) == 1
    capsys.readouterr()
    sae_sweep.main([*options, str(tmp_path / "stopped")])
    assert "goes on at step" in capsys.readouterr().out
    sae_sweep.main([*options, str(tmp_path / "whole")])
    one, two = (
        sae_sweep.finished(tmp_path / name / "runs.jsonl")[["lr", "loss", "fvu"]]
        for name in ("stopped", "whole")
    )
    sae_sweep.pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize("script", ["sae_sweep", "train_pocket_saes"])
def test_evaluation_texts_among_the_training_texts_are_refused(
    script, tokens_file, model, gpt2_folder, tmp_path
):
    file = tmp_path / "same.npz"
    both = {"train": tokens_file.train, "held_out": tokens_file.train}
    tokens_file.script.write_tokens(file, model, both)
    options = f"--smoke --tokens {file} --model {gpt2_folder} --work {tmp_path / 'work'} "
    own = {
        "sae_sweep": "rates --only topk --layer 1",
        "train_pocket_saes": f"--sites resid-1 --out {tmp_path}",
    }
    with pytest.raises(ValueError, match="held-out documents were trained on"):
        importlib.import_module(script).main((options + own[script]).split())
