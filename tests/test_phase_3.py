"""Phase 3's computations on what is known beforehand, and the phase run whole where something is
missing: SAEs, seeds, layers, streams, a model that people know.

The cells are those of the notebook, run with what a test makes for them.
"""

import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from conftest import TEXTS
from safetensors.torch import save_file
from test_factorial import cells, run_cells
from test_sae_pretrained import fill_cache, hub, tiny_sae  # noqa: F401

from lenslab.compare import LAYERS, ON_HUB, children
from lenslab.features.activations import encode_features
from lenslab.features.ranking import matched_features
from lenslab.files import REPOSITORY, data_path
from lenslab.metrics import auroc
from lenslab.sae.find import find_sae
from lenslab.sae.registry import repository_of
from lenslab.sae.save import save_sae
from lenslab.show.words import so
from lenslab.stats import bootstrap_by_document
from lenslab.texts import sampled_text
from lenslab.tokens import tokenize

SOURCE = REPOSITORY / "notebooks" / "interactive" / "phase_3_sae_comparison.py"


# Which SAE stands for which question


def an_sae(hook, width=64, architecture="jumprelu"):
    metadata = SimpleNamespace(hook_name=hook)
    return SimpleNamespace(
        cfg=SimpleNamespace(d_sae=width, architecture=lambda: architecture, metadata=metadata)
    )


def grouped(saes, active):
    names = dict(saes=saes, active=active, input_transform=None, model_name=lambda model: "m")
    names["sae_hook"] = lambda sae: sae.cfg.metadata.hook_name
    names["model"] = SimpleNamespace(cfg=SimpleNamespace(n_layers=12))
    sites = next(cell for cell in cells() if "read most closely" in cell)
    exec(sites.replace("from lenslab.sae.inputs import input_transform, sae_hook", ""), names)
    return run_cells("seeds = [main]", **names)


def test_seeds_widths_and_places_are_told_apart():
    saes = {
        "r2": an_sae("blocks.2.hook_resid_post"),
        "r6": an_sae("blocks.6.hook_resid_post"),
        "r6 again": an_sae("blocks.6.hook_resid_post"),
        "r6 denser": an_sae("blocks.6.hook_resid_post"),
        "r6 topk": an_sae("blocks.6.hook_resid_post", architecture="topk"),
        "r6 wide": an_sae("blocks.6.hook_resid_post", 256),
        "r6 wide again": an_sae("blocks.6.hook_resid_post", 256),
        "r10": an_sae("blocks.10.hook_resid_post"),
        "a6": an_sae("blocks.6.hook_attn_out"),
        "e": an_sae("hook_embed"),
    }
    found = grouped(saes, dict.fromkeys(saes, 16.0) | {"r6 again": 17.0, "r6 denser": 40.0})
    assert found["main"] == "r6"
    assert found["seeds"] == ["r6", "r6 again"], "another sparsity or architecture is no other seed"
    assert found["widths"] == ["r6", "r6 wide"]
    assert found["places"] == ["a6", "e", "r2", "r6", "r10"], "layers as numbers: 2 before 10"
    only = grouped({"mlp": an_sae("blocks.3.hook_mlp_out")}, {"mlp": 0.0})
    assert only["seeds"] == only["widths"] == only["places"] == ["mlp"]


def test_missing_saes_are_named_with_what_fetches_them(model, tmp_path, capsys, hub):  # noqa: F811
    opening = next(cell for cell in cells() if "SAES = None" in cell)
    telling = next(cell for cell in cells() if "left_out = " in cell)
    for name in ("good", "half"):
        save_sae(tiny_sae(model), tmp_path / name)
    (tmp_path / "half" / "sae_weights.safetensors").unlink()
    release, sae_id = "gpt2-small-res-jb", "blocks.8.hook_resid_pre"
    good, half = str(tmp_path / "good"), str(tmp_path / "half")
    names = {"model": model}
    exec(opening.replace("SAES = None", f"SAES = {[good, half, (release, sae_id)]!r}"), names)
    exec(telling, names)
    printed = capsys.readouterr().out
    assert list(names["saes"]) == [good] and printed.startswith("1 SAEs; left out:")
    assert "half needs cfg.json and sae_weights.safetensors" in printed
    assert f"lenslab.sae.hub download {release} {sae_id}" in printed
    with pytest.raises(ValueError, match="No SAE to compare"):
        exec(opening.replace("SAES = None", f"SAES = {[half]!r}"), {"model": model})


def test_a_download_that_was_cut_off_is_named_with_the_command(model, hub):  # noqa: F811
    from lenslab.compare import open_saes

    release, sae_id = "gpt2-small-res-jb", "blocks.8.hook_resid_pre"
    published(hub, 32, release, sae_id)
    weights = max(hub.rglob("blobs/*"), key=lambda file: file.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match=rf"cut off.*hub download {release} {sae_id}"):
        open_saes(model, [(release, sae_id)])


# What is computed


def test_latents_are_grouped_by_how_often_they_fire():
    latents = pd.DataFrame({"kind": "decoder", "rate": [0.0005, 0.0008, 0.05, 0.5]})
    latents["similarity"], latents["null"] = [0.2, 0.4, 0.8, 0.9], [0.1, 0.3, 0.5, 0.6]
    latents["near"] = [3, 5, 1, 0]
    more = latents.assign(kind="firing", similarity=0.0)
    pair = SimpleNamespace(latents=pd.concat([latents, more]))
    bands = run_cells("edges = [0, 1e-3", seeds=["a", "b"], seed_pair=pair)["bands"]
    assert bands.index.tolist() == [1e-3, 1e-1, 1]
    assert bands["similarity"].tolist() == pytest.approx([0.3, 0.8, 0.9])
    assert bands["latents"].tolist() == [2, 1, 1] and bands["near"].tolist() == [4, 1, 0]


@pytest.fixture(scope="module")
def encoded(model):
    return encode_features(model, tiny_sae(model), tokenize(model, TEXTS * 8), progress=False)


def firings(fa, name, *columns):
    n = fa.matrix.shape[0]
    made = [np.isin(np.arange(n), list(tokens)) for tokens in columns]
    return replace(fa, name=name, matrix=scipy.sparse.csr_array(np.stack(made, 1).astype("f4")))


def test_a_feature_is_followed_into_each_wider_sae(encoded, capsys):
    """Feature 0 splits in two, its larger child in two again; others do not, or are not rare."""
    n = encoded.matrix.shape[0]
    assert n > 320
    often = range(100, n)
    narrow = firings(encoded, "narrow", range(6), often, range(20, 40))
    wider = firings(encoded, "wider", range(4), range(4, 6), often, range(20, 40))
    widest = firings(encoded, "widest", range(3), range(3, 4), range(4, 6), often)
    fas = {fa.name: fa for fa in (narrow, wider, widest)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lenslab.compare.LEAST", 1)
        families = {(a, b): children(fas[a], fas[b]) for a, b in pairwise(fas)}
    names = dict(widths=list(fas), fas=fas, families=families, pairwise=pairwise)
    run_cells("todo, tree = [], []", "import feature_names", **names)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("'")[0].rstrip() for line in lines] == [
        "narrow 0",
        "    wider 0",
        "        widest 0",
        "        widest 1",
        "    wider 1",
        "        widest 2",
    ]
    shares = [re.search(r"has (\d+)% of", line) for line in lines]
    assert [int(found[1]) for found in shares if found] == [67, 75, 25, 33, 100]


def alike(strong_by_form: bool):
    """Sixty concepts in four forms: the top features, and the vectors, follow the form or the
    concept."""
    rng = np.random.default_rng(0)
    form, concept = np.tile(["a", "b", "c", "d"], 60), np.repeat(np.arange(60), 4)
    follows = np.unique(form if strong_by_form else concept, return_inverse=True)[1]
    dense = rng.random((240, 3000)).astype(np.float32) * 0.1
    for row, number in enumerate(follows):
        dense[row, number * 20 : number * 20 + 10] = 1  # ten of its twenty strongest
    vectors = np.eye(60)[follows] + 0.1 * rng.normal(size=(240, 60))
    matched = pd.DataFrame({"form": form, "concept": concept})
    matched["split"] = np.where(concept % 2, "held_out", "discovery")
    values = torch.from_numpy(vectors)[:, None]  # one token a text
    real = torch.ones(240, 1, dtype=torch.bool)
    names = dict(matched=matched, hook={"m": "h"}, main="m", model=None)
    names |= dict(matched_pooled=scipy.sparse.csr_array(dense))
    names |= dict(matched_batch=SimpleNamespace(real=real))
    names |= dict(harvest=lambda model, batch, hook: {hook: values}, so=so)
    names["bootstrap_by_document"] = partial(bootstrap_by_document, n=200)
    return run_cells("np.put_along_axis(strong", "for name, table in alike.items()", **names)


@pytest.mark.parametrize(("by_form", "verdict"), [(True, "form leads"), (False, "content leads")])
def test_what_texts_share_is_told_by_form_and_by_concept(by_form, verdict, capsys):
    found = alike(by_form)["alike"]
    printed = capsys.readouterr().out
    assert printed.count(verdict) == 2 and "neither leads" not in printed
    winner, loser = ("same form", "same concept") if by_form else ("same concept", "same form")
    for table in found.values():
        assert table[winner].low > table[loser].high
        assert table[loser].estimate == pytest.approx(table["neither"].estimate, abs=0.05)
    # ten of twenty are shared by those that follow the same: 10 / 30
    assert found["Jaccard"][winner].estimate == pytest.approx(1 / 3, abs=0.03)


def test_ablations_are_averaged_over_the_right_texts():
    inside = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]], dtype=bool)
    rises = np.array([[0.004, 0.002, 0.0, 0.0, 0.003], [0.001, 0.0, 0.006, 0.006, 0.0]])
    own = pd.Series([3, 7], ["math", "web"])
    held = np.array([False, True, True, True, True, True])
    labels = SimpleNamespace(held_out=held, inside=np.vstack([[False, False], inside]))
    names = dict(main="m", own=own, labels=labels, model=None)
    names |= dict(saes={"m": None})

    class Rows:
        def __getitem__(self, rows):
            assert rows == [1, 2, 3, 4, 5]

    names["fas"] = {"m": Rows()}
    source = next(cell for cell in cells() if 'effects = pd.DataFrame({"own feature"' in cell)
    source = source.replace("from lenslab.circuits.interventions import ablate_features", "")
    names |= dict(ablate_features=lambda *given: rises, np=np, pd=pd)
    exec(source, names)
    effects = names["effects"]
    assert effects["own feature"].tolist() == pytest.approx([3, 4])
    assert effects["on other kinds"].tolist() == pytest.approx([1, 0.5])
    assert effects[names["CROSS"]].tolist() == pytest.approx([0.5, 1])


def test_the_sign_test_is_said_beside_its_chance(capsys):
    own, alike = np.array([2.0, 3, 1, 0, 5, 6, 7]), np.array([1.0, 1, 1, 0, 1, 1, 1])
    table = pd.DataFrame({"own feature": own, "matched feature": alike, "other": 0.5})
    relation = SimpleNamespace(estimate=0.42, low=-0.1, high=0.9)
    names = dict(asked={"first": None, "second": None}, rise_of=[table, table * 0], so=so)
    run_cells("from scipy.stats import binomtest", **names, CROSS="other", relations=[relation] * 2)
    first, second = capsys.readouterr().out.split("in second")
    assert "of other kinds by 0.5, matched ones by 0.9: more in 5 of 5 kinds" in first
    assert (
        "(by chance 2.5, p = 0.06); selectivity and effect correlate at 0.4 (-0.1 to 0.9)" in first
    )
    assert "more in 0 of 0 kinds (by chance 0.0, p = 1.00)" in second


def test_two_models_are_asked_the_same_with_the_same_controls(capsys):
    """Features 0 and 1 are chosen, 3 and 2 fire as they do; what they do is planted."""
    texts = np.array([[4.0, 0, 0, 4.1], [4, 0, 0, 4], [0, 6, 6, 0], [0, 5, 5.2, 0]])
    inside = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=bool)
    rises = {0: [4, 2, 1, 1], 1: [0, 1, 6, 8], 3: [1, 1, 0, 0], 2: [0, 0, 2, 1]}

    def ablate(model, sae, fa, features):
        assert list(features) == [0, 1, 3, 2]
        return np.array([rises[int(feature)] for feature in features]) / 1000

    class Rows:
        pool = staticmethod(lambda how: scipy.sparse.csr_array(texts))
        __getitem__ = lambda self, rows: self  # noqa: E731

    names = dict(asked={"m": (None, None, Rows(), np.array([0, 1]))}, half_rows=np.arange(4))
    names |= dict(of_kind=inside, labels=SimpleNamespace(categories=["a", "b"]), CROSS="other")
    names |= dict(ablate_features=ablate, matched_features=matched_features, auroc=auroc)
    found = run_cells("rise_of, pairs_of, kinds = ", **names)
    table = found["rise_of"][0]
    assert table["own feature"].tolist() == pytest.approx([3, 7])
    assert table["other"].tolist() == pytest.approx([0.5, 1])
    assert table["matched feature"].tolist() == pytest.approx([1, 1.5])
    pairs = np.array([[1, 3], [1, 7], [1, 1], [1, 1.5]])  # selectivity and effect
    assert found["pairs_of"][0][1] == pytest.approx(pairs)


def test_matched_features_fire_as_often_and_as_strongly_and_are_taken_once():
    values = np.zeros((6, 6))
    values[:3, 0] = [3, 3, 3]
    values[:3, 1] = [3, 3, 3]  # alike, chosen for the other kind
    values[:3, 2] = [3, 3, 3.3]
    values[:3, 3] = [3, 0, 3]
    values[3:, 4] = [3, 3, 3]  # alike, on other texts
    values[:3, 5] = [9, 9, 9]
    inside = np.array([[1, 0]] * 3 + [[0, 1]] * 3, dtype=bool)
    assert matched_features(values, inside, [0, 1], n=1).tolist() == [[2], [3]]
    assert matched_features(values, inside[:, :1], [0]).tolist() == [[1, 2]]
    assert matched_features(values / 1e4, inside, [0, 1], n=1).tolist() == [[2], [3]]
    with pytest.raises(ValueError, match="0 features are left to match 1"):
        matched_features(values, inside, [0, 1], n=4)
    with pytest.raises(ValueError, match="0 features are left to match 1"):
        matched_features(values, np.c_[inside[:, 0], np.zeros(6, bool)], [0, 1])


def test_cloze_scores_are_the_right_answer_less_the_mean_of_the_others_and_its_usual_score():
    trials = pd.DataFrame({"model": "m", "task": "t", "row": [0, 0, 0, 1, 1, 1]})
    trials["answer"], trials["option"] = ["a"] * 3 + ["b"] * 3, ["a", "b", "c"] * 2
    trials["score"], trials["fits"] = [-1.0, -2, -4, -5, -1, -3], True
    long = trials.assign(task="long", fits=[False] + [True] * 5)
    frequent = trials.assign(task="frequent", score=[-1.0, -9, -9] * 2)  # whatever the prompt
    names = dict(trials=pd.concat([trials, long, frequent]))
    found = run_cells("by_prompt = [", **names)["cloze_scores"]
    assert "long" not in set(found["task"]), "a task that does not fit is left out as a whole"
    margins = found.groupby("task")["margin"].apply(list)
    assert margins["t"] == [2.5, 1.25]  # of -1 + 3, -2 + 1.5, -4 + 3.5 and so on
    assert margins["frequent"] == [0, 0], "right in half of the prompts by frequency alone"


def test_activations_are_told_of_one_model_and_related_within_a_form():
    rng, n = np.random.default_rng(0), 60
    scores = pd.DataFrame({"model": ["m"] * n + ["other"] * n, "row": [*range(n)] * 2})
    scores["task"] = np.where(scores["row"] < n // 2, "sum, words", "sum, story")
    worse = scores["task"] == "sum, words"
    scores["margin"] = rng.normal(size=2 * n) - 9 * worse
    strength = rng.random(n) + 9 * worse[:n].to_numpy()  # apart by form, and by nothing else
    fa = SimpleNamespace(
        pool=lambda how: scipy.sparse.csr_array(np.stack([0 * strength, strength], 1))
    )
    cloze = pd.DataFrame({"prompt": ["x"] * n})
    names = dict(cloze_scores=scores, cloze=cloze, main="m", saes={"m": None}, model=None)
    names |= dict(tokenize=lambda *given, **options: None, own=pd.Series({"math": 1}))
    names |= dict(encode_saes=lambda *given: {"m": fa}, model_name=lambda model: "m")
    names |= dict(bootstrap_by_document=partial(bootstrap_by_document, n=200))
    names["rank"] = lambda rows: pd.DataFrame(rows).corr("spearman").iloc[0, 1]
    found = run_cells("math_feature = int", "activation and margin", **names)
    by_task = found["by_task"].set_index("model")["activation"]
    assert by_task["m"].notna().all() and by_task["other"].isna().all()
    assert found["r"].low < 0 < found["r"].high, "forms differ; within them nothing goes together"


def test_length_is_taken_away_and_nothing_else(capsys):
    from lenslab.metrics import auroc

    rng = np.random.default_rng(0)
    inside = np.arange(400) % 2 == 0
    lengths = np.where(inside, 20, 10) * np.exp(0.2 * rng.normal(size=400))
    kind = inside + 0.3 * rng.normal(size=400)
    columns = np.stack([np.log(lengths), kind], 1)
    held = np.arange(400) >= 200
    own = pd.DataFrame({"category": ["by length", "by kind"], "feature": [0, 1]})
    names = dict(own=own, lengths=lengths, pooled={"m": scipy.sparse.csr_array(columns)}, main="m")
    names |= dict(held=held, auroc=auroc, so=so)
    names["labels"] = SimpleNamespace(inside=np.stack([inside, inside], 1))
    rows = run_cells('"without length"), both', **names)["rows"]
    assert rows.loc["by length", "AUROC"] > 0.95
    assert rows.loc["by length", "without length"] == pytest.approx(0.5, abs=0.01)


# What another training finds again


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    import sae_stability

    return sae_stability


def stability_cells(key, capsys):
    names = dict(model=SimpleNamespace(cfg=SimpleNamespace(n_layers=6)), so=so)
    names["model_key"] = lambda model: key
    found = run_cells('"phase_3_stability"', "how much of an SAE another training", **names)
    return found, capsys.readouterr().out


def test_the_notebook_asks_for_what_the_script_measured_of_this_model_alone(script, capsys):
    config = json.loads(data_path("saes", "pocket-gpt-resid-3", "cfg.json").read_text())
    key = config["metadata"]["model_key"]
    found, printed = stability_cells(key, capsys)
    assert found["asked"] == json.loads(json.dumps(script.inputs_of(key, found["asked"]["site"])))
    table = found["stability"]
    assert len(table) == 2 * (len(script.LEVELS) + len(script.OTHERS) + 6 * 5)
    assert sorted(found["by_level"]["level"]) == list(script.LEVELS)
    assert "are shared by two seeds at L0" in printed
    other, printed = stability_cells("another", capsys)
    assert other["stability"] is None and "is not measured here" in printed


def test_stability_is_measured_of_every_pair(script, gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path))
    monkeypatch.setattr("lenslab.sae.train.trainer.SHARED", 0.5)  # short windows, much alike
    few = "--documents 40 --vectors 4e3 --batch 256 --d-sae 64 --texts 40 --keep"
    saved = json.loads(script.main(["--model", str(gpt2_folder), *few.split()]).read_text())
    table = pd.DataFrame(saved["config"]["table"])
    pairs = table.groupby(["architecture", "other", "level"]).size()
    assert (pairs == 2).all() and len(pairs) == 40
    seeds = table[(table["architecture"] == table["other"]) & (table["kind"] == "decoder")]
    assert sorted(seeds.query("architecture == 'batchtopk'")["level"]) == list(script.LEVELS)
    corrected = (table["value"] - table["null"]) / (1 - table["null"])
    assert np.allclose(corrected, table["corrected"], atol=2e-3)


# Whole runs


def published(cache, width, release, sae_id, d_sae=64, seed=0, model="gpt2-small"):
    """A release's SAE in small, in a cache of the hub, with the config fields that it has there."""
    repository, path = repository_of(release, sae_id)
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(W_enc=(width, d_sae), W_dec=(d_sae, width), b_enc=(d_sae,), b_dec=(width,))
    weights = {k: torch.randn(s, generator=generator) * 0.2 for k, s in sizes.items()}
    scratch = cache.parent / "scratch.safetensors"
    save_file(weights, scratch)
    config = dict(model_name=model, hook_name=sae_id, hook_point=sae_id, d_in=width, d_sae=d_sae)
    config |= dict(dtype="torch.float32", device="cpu", architecture="standard")
    files = {f"{path}/cfg.json": json.dumps(config).encode()}
    files[f"{path}/sae_weights.safetensors"] = scratch.read_bytes()
    root = cache / f"models--{repository.replace('/', '--')}"
    if root.exists():  # beside what is there
        kept = {
            str(f.relative_to(root / "snapshots" / ("a" * 40))): f.read_bytes()
            for f in root.glob("snapshots/**/*")
            if f.is_file()
        }
        shutil.rmtree(root)
        files = kept | files
    fill_cache(cache, repository, files)


@pytest.fixture
def run_whole(tmp_path, monkeypatch, capsys):
    """What the phase prints for a model, with some cells' text exchanged."""
    monkeypatch.setenv("LENSLAB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PLOTLY_RENDERER", "json")
    quick = partial(find_sae, documents=60, steps=20)
    monkeypatch.setattr("lenslab.sae.find.find_sae", quick)
    monkeypatch.setattr("lenslab.texts.sampled_text", lambda n, model: sampled_text(n // 10))
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda figure: None)

    def run(model: str, saes=None) -> str:
        monkeypatch.setenv("LENSLAB_MODEL", str(model))
        source = tmp_path / "phase.py"
        text = SOURCE.read_text(encoding="utf-8")
        assert text.count("SAES = None") == 1
        source.write_text(text.replace("SAES = None", f"SAES = {saes!r}"), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(source))
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_phase_runs_on_a_mixture_and_says_what_is_missing(run_whole):
    printed = run_whole("pocket-moe")
    assert "pocket-moe: mlp-3, router-3; read most closely: mlp-3" in printed
    for sentence in ("there is one seed", "there is one width", "not measured here"):
        assert sentence in printed
    assert "of pocket-moe mlp-3, of pocket-gpt mlp-3: the same site" in printed
    assert not re.search(r"\bnan\b|\binf\b", "\n".join(verdicts(printed)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "sentences"),
    [
        (["attn-3"], ["one SAE at hand", "there is one seed", "there is one place"]),
        (["resid-3", "resid-3-seed-1"], ["there is one width", "there is one place"]),
        (["resid-3", "resid-3-1024", "mlp-3"], ["one seed", "without a second seed it is open"]),
        (["resid-3", "resid-5", "pocket-moe-mlp-3", "no-such"], ["made for pocket-moe", "No bund"]),
    ],
    ids=["one SAE", "one place", "one seed and layer", "another model's"],
)
def test_the_phase_runs_on_few_saes_and_says_what_is_missing(run_whole, names, sentences):
    names = [n if "pocket" in n or n == "no-such" else f"pocket-gpt-{n}" for n in names]
    printed = run_whole("pocket-gpt", names)
    assert all(sentence in printed for sentence in sentences)
    assert not re.search(r"\bnan\b|\binf\b", "\n".join(verdicts(printed)))


def verdicts(printed: str) -> list[str]:
    found = [line for line in printed.splitlines() if line.startswith("So: ")]
    assert len(found) > 15
    return found


@pytest.mark.slow
def test_the_phase_runs_on_gpt2_with_its_releases_at_a_tiny_width(run_whole, shared, tmp_path, hub):  # noqa: F811
    """Twelve layers, tied, GPT-2's own tokenizer and config; of three releases the SAEs of layers
    6, 8, 10 and 11."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    AutoTokenizer.from_pretrained(shared / "fixtures" / "gpt2-tokenizer").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=4)
    assert (config.n_layer, config.vocab_size, config.n_positions) == (12, 50257, 1024)
    assert config.tie_word_embeddings
    GPT2LMHeadModel(config).save_pretrained(folder)
    streams = ("resid_pre", "attn_out", "mlp_out")
    for release, stream in zip(ON_HUB["gpt2"], streams, strict=True):
        for layer in LAYERS:
            published(hub, 32, release, f"blocks.{layer}.hook_{stream}", seed=layer)
    printed = run_whole(folder)
    assert "12 SAEs; left out: none" in printed
    assert "read most closely: small-res-jb/blocks.6.hook_resid_pre" in printed
    assert all(f"/blocks.11.hook_{stream}" in printed for stream in streams)
    verdicts(printed)


@pytest.mark.slow
def test_the_phase_runs_on_gemma_3_at_a_tiny_width(run_whole, tmp_path):
    """As many layers as Gemma 3 1B, with its pattern of windows; SAEs with the fields of Gemma
    Scope 2, JumpReLU at three streams."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    from lenslab.models import load_model

    folder = tmp_path / "gemma-3-1b-it"
    tokenizer = AutoTokenizer.from_pretrained(data_path("models", "pocket-gpt"))
    tokenizer.save_pretrained(folder)  # Gemma's own is not at hand
    n, names = len(tokenizer), ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    config = Gemma3TextConfig(
        vocab_size=n, hidden_size=32, intermediate_size=48, num_hidden_layers=26, head_dim=8,
        num_attention_heads=4, num_key_value_heads=1, sliding_window=64, **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    model, names = load_model(str(folder)), []
    for layer, stream in ((13, "resid_post"), (20, "resid_post"), (13, "mlp_out")):
        made = tiny_sae(
            model, hook=f"blocks.{layer}.hook_{stream}", architecture="jumprelu", seed=layer,
            context_size=1024, prepend_bos=True,
        )  # fmt: skip
        made.b_enc.zero_()
        made.threshold.fill_(0.3)  # few fire
        names.append(str(save_sae(made, tmp_path / f"layer_{layer}_{stream}")))
    printed = run_whole(folder, names)
    assert "3 SAEs; left out: none" in printed
    verdicts(printed)
