"""The benchmarks' harness on toy sizes: what it counts, compares, resumes and leaves out. Never how
long it takes."""

import json
import math
import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from lenslab.files import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
SCHEMA = {"claim", "ours", "peers", "ratios", "unit", "machine", "versions"}
RESULTS = sorted((BENCHMARKS / "results").glob("sae_*.json"))
TIMES = BENCHMARKS / "results" / "time_to_quality.json"  # before it is timed: the curves alone
RESULTS += [TIMES] if TIMES.exists() and "claim" in json.loads(TIMES.read_text()) else []


@pytest.fixture(scope="module")
def modules():
    """The benchmark files, which are scripts beside each other and no package."""
    sys.path.insert(0, str(BENCHMARKS))
    yield {
        name: import_module(name)
        for name in ("compare", "sae_contestants", "sae_training", "sae_quality", "time_to_quality")
    }
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def compare(modules, monkeypatch, tmp_path):
    """The harness with its results and its memory in a folder of the test's own."""
    monkeypatch.setattr(modules["compare"], "RESULTS", tmp_path / "results")
    monkeypatch.setattr(modules["compare"], "CACHE", tmp_path / "cache")
    return modules["compare"]


@pytest.fixture(scope="module")
def entries(modules):
    return modules["sae_contestants"]


@pytest.fixture(scope="module")
def quality(modules):
    return modules["sae_quality"]


# --------------------------------------------------------------------------------------------------
# the harness


def test_a_result_names_the_versions_of_peers_that_have_an_environment_of_their_own(compare):
    found = compare.versions(["lenslab", "dictionary-learning", "saelens-as-shipped"])
    pinned = (compare.PEERS / "dictionary-learning.txt").read_text()
    assert f"dictionary-learning=={found['dictionary-learning']}" in pinned.splitlines()
    assert set(found) == {*compare.VERSIONED, "dictionary-learning"}


def test_a_contestant_is_warmed_up_once_and_checked_after_the_clock_has_stopped(compare, capsys):
    calls = []

    def run():
        calls.append("run")
        return 7, lambda: calls.append("check") or {"fvu": 0.25}

    compare.timed(lambda: (lambda: calls.append("warm up"), run))
    line = json.loads(capsys.readouterr().out)
    assert calls == ["warm up", "run", "check"]
    assert line.pop("seconds") >= 0 and line == {"units": 7, "fvu": 0.25}


def play(compare, monkeypatch, seconds):
    """Contestants that take as long as `seconds` says, round by round; a list of who was run."""
    order = []

    def run(file, name, contestant, extra=()):
        taken = seconds[name][order.count(name)]
        order.append(name)
        if isinstance(taken, str):
            raise compare.PeerFailed(taken)
        return {"units": 12, "seconds": taken, "fvu": 0.5}

    monkeypatch.setattr(compare, "run_contestant", run)
    return order


def contestants(compare, names):
    return {name: compare.Contestant(dict) for name in names}


def test_rounds_are_interleaved_and_ratios_are_the_median_of_the_rounds_own(compare, monkeypatch):
    order = play(compare, monkeypatch, {"ours": [1, 2, 4], "peer": [3, 4, 4]})
    result = compare.compare(
        "x.py",
        "a claim",
        "u/s",
        "ours",
        contestants(compare, ["ours", "peer"]),
        rounds=3,
        more=lambda taken: {"n": 1},
    )
    assert order == ["ours", "peer"] * 3
    assert (result["ours"], result["peers"]["peer"]) == (6, 3)  # medians of 12, 6, 3 and of 4, 3, 3
    assert (
        result["ratios"]["peer"] == 2
    )  # of 3, 2 and 1: not the ratio of the medians' rounds by chance
    written = json.loads((compare.RESULTS / "x.json").read_text())
    assert written == result and set(result) >= SCHEMA and result["n"] == 1
    assert result["rounds"] == {"ours": [12, 6, 3], "peer": [4, 3, 3]}


def test_a_peer_that_fails_is_left_out_and_the_result_says_why(compare, monkeypatch):
    play(
        compare,
        monkeypatch,
        {"ours": [1, 1], "good": [2, 2], "bad": ["could not be installed: no wheel"]},
    )
    result = compare.compare(
        "x.py", "c", "u", "ours", contestants(compare, ["ours", "good", "bad"]), rounds=2
    )
    assert result["left_out"] == {"bad": "could not be installed: no wheel"}
    assert set(result["ratios"]) == {"good"}


def test_our_own_failure_is_an_error_and_the_next_run_goes_on_where_it_stopped(
    compare, monkeypatch
):
    names = ["ours", "peer"]
    play(compare, monkeypatch, {"ours": [1, "killed"], "peer": [2]})
    with pytest.raises(compare.PeerFailed, match="killed"):
        compare.compare("x.py", "c", "u", "ours", contestants(compare, names), rounds=2)
    assert not (compare.RESULTS / "x.json").exists()
    order = play(compare, monkeypatch, {"ours": [1], "peer": [4]})
    result = compare.compare("x.py", "c", "u", "ours", contestants(compare, names), rounds=2)
    assert order == names  # the second round alone
    assert result["rounds"] == {"ours": [12, 12], "peer": [6, 3]}
    assert not list((compare.CACHE / "benchmarks").iterdir())


def test_measurements_of_another_job_are_not_taken_over(compare, monkeypatch):
    compare.Kept("x", "--job", "a").get("ours 0", lambda: {"units": 1, "seconds": 1})
    assert compare.Kept("x", "--job", "a").taken and not compare.Kept("x", "--job", "b").taken


def test_a_contestant_runs_in_a_process_with_the_settings_it_was_promised(compare, tmp_path):
    file = tmp_path / "bench.py"
    file.write_text(
        "import json, os, sys\n"
        "if sys.argv[2] == 'broken': raise ValueError('in ' + "
        "os.path.dirname(os.path.abspath(__file__)))\n"
        "print('chatter'); print(json.dumps({'units': 1, 'seconds': 1, 'env': dict(os.environ), "
        "'argv': sys.argv[1:]}))"
    )
    tuned = compare.run_contestant(str(file), "one", compare.Contestant(dict), ["--job", "x"])
    shipped = compare.run_contestant(str(file), "one", compare.Contestant(dict, tuned=False))
    assert tuned["argv"] == ["--contestant", "one", "--job", "x"]
    assert set(compare.ALLOCATOR) <= set(tuned["env"]) and not set(compare.ALLOCATOR) & set(
        shipped["env"]
    )
    assert tuned["env"]["OMP_NUM_THREADS"] == shipped["env"]["OMP_NUM_THREADS"] == compare.THREADS
    assert (
        tuned["env"]["HF_HUB_OFFLINE"] == "1" and shipped["env"]["LENSLAB_ALLOCATOR"] == "default"
    )
    with pytest.raises(compare.PeerFailed, match="failed: ValueError"):
        compare.run_contestant(str(file), "broken", compare.Contestant(dict))


def test_reasons_hold_no_path_of_this_machine(compare):
    said = compare._last_line(
        f"Traceback\n  at {Path.home() / 'x.py'}\nOSError: {BENCHMARKS / 'y'}\n\n"
    )
    assert said == f"OSError: ./{BENCHMARKS.name}/y"


@pytest.fixture
def installs(compare, monkeypatch):
    """What would be run to make an environment; nothing is installed."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if command[1:3] == ["-m", "venv"]:
            Path(command[-1]).mkdir(parents=True, exist_ok=True)
        failed = "nonesuch==1" in command
        return type(
            "Done",
            (),
            {"returncode": int(failed), "stderr": "ERROR: No matching distribution", "stdout": ""},
        )

    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare, "PEERS", compare.CACHE)
    compare.CACHE.mkdir()
    return commands


def test_a_peers_environment_is_made_once_torch_first_and_made_again_when_its_pins_change(
    compare, installs
):
    pins = compare.CACHE / "peer.txt"
    pins.write_text("# why\n# remove: extra\nother==2\ntorch==1\n")
    python = compare.environment("peer")
    assert python == str(compare.CACHE / "peers" / "peer" / "bin" / "python")
    assert [command[-1] for command in installs[1:]] == ["torch==1", "torch==1", "extra"]
    assert installs[2][-2:] == ["other==2", "torch==1"]
    compare.environment("peer")
    assert len(installs) == 4
    pins.write_text("torch==2\n")
    compare.environment("peer")
    assert len(installs) > 4


def test_no_peer_means_our_own_python_and_a_variable_names_another(compare, monkeypatch):
    assert compare.environment(None) == sys.executable
    monkeypatch.setenv("LENSLAB_PEER_SOME_PEER", "elsewhere")
    assert compare.environment("some-peer") == "elsewhere"


def test_a_peer_that_cannot_be_installed_says_so(compare, installs):
    (compare.CACHE / "peer.txt").write_text("nonesuch==1\n")
    with pytest.raises(compare.PeerFailed, match="could not be installed: ERROR: No matching"):
        compare.environment("peer")
    assert not (compare.CACHE / "peers" / "peer" / ".ready").exists()


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "peers").glob("*.txt")), ids=lambda f: f.stem)
def test_peers_are_pinned(file):
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


# ---------------------------------------------------------------------------------------------- SAE
# contestants


class Projection:
    """Keeps the first `k` of the entries: what it misses is known."""

    def __init__(self, k):
        self.k = k

    def encode(self, x):
        return x[:, : self.k]

    def decode(self, latents):
        return torch.cat([latents, torch.zeros(len(latents), 4 - self.k)], 1)


def test_held_out_error_is_a_share_of_the_variance_and_l0_a_count(entries):
    x = torch.eye(4).repeat(1000, 1) * 2.0
    assert entries.held_out(Projection(4), x) == {"fvu": 0.0, "l0": 1.0}
    # missing one axis of four: 4 of every 4 vectors' squares 4, against 4 x (4 - 1) around the mean
    # 0.5
    found = entries.held_out(Projection(3), x)
    assert math.isclose(found["fvu"], 4 / (4 * 3)) and math.isclose(found["l0"], 0.75)
    constant = type(
        "Mean", (), {"encode": lambda self, x: x, "decode": lambda self, z: torch.full_like(z, 0.5)}
    )()
    assert math.isclose(entries.held_out(constant, x)["fvu"], 1.0)


def test_a_contestant_that_learned_nothing_is_refused(entries):
    assert entries.checked({"fvu": 0.5, "l0": 3.0}) == {"fvu": 0.5, "l0": 3.0}
    for fvu in (0.95, math.nan):
        with pytest.raises(RuntimeError, match="did not train"):
            entries.checked({"fvu": fvu, "l0": 3.0})


def test_every_contestant_reads_the_vectors_in_the_same_order_and_no_held_out_one(
    entries, tmp_path
):
    x = np.arange((10 + entries.HELD_OUT) * 2, dtype=np.float32).reshape(-1, 2)
    np.save(tmp_path / "x.npy", x)
    vectors, unseen = entries.load_vectors(tmp_path / "x.npy")
    assert len(vectors) == 10 and len(unseen) == entries.HELD_OUT
    steps = entries.batches(vectors, entries.Job(batch=4))
    first = [next(steps) for _ in range(3)]
    assert torch.equal(torch.cat(first[:2]), vectors[:8]) and torch.equal(first[2], first[0])


@pytest.fixture(scope="module")
def planted():
    """Sums of 3 of 24 directions in 16 dimensions, of a mean norm of 4: an SAE can learn them in
    seconds."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)
    chosen = torch.rand(6000, 24, generator=generator).topk(3, dim=1).indices
    weights = torch.zeros(6000, 24).scatter_(
        1, chosen, 1 + torch.rand(6000, 3, generator=generator)
    )
    x = weights @ directions + 0.3
    return x * 4 / x.norm(dim=1).mean()


@pytest.fixture(scope="module")
def toy(entries):
    return entries.Job(d_sae=64, k=3, l1=0.05, batch=128, steps=120, lr=3e-3)


@pytest.mark.parametrize("architecture", ["topk", "relu", "batchtopk", "jumprelu", "gated"])
@pytest.mark.parametrize("library", ["lenslab", "saelens"])
def test_both_libraries_train_in_this_environment(entries, planted, toy, library, architecture):
    train = getattr(entries, library)
    job = replace(toy, architecture=architecture)
    found = []
    for steps in (2, 120):
        sae = train(replace(job, steps=steps), planted[:5000])
        if architecture == "batchtopk":
            entries.set_mean_l0(sae, planted[:5000], job.k)
        found.append(entries.held_out(sae, planted[5000:]))
    before, after = found
    # a penalty trades error for fewer latents
    fewer = architecture in entries.PENALISED and after["l0"] < 0.8 * before["l0"]
    assert after["fvu"] < 0.5 and (after["fvu"] < 0.8 * before["fvu"] or fewer)
    if architecture not in entries.PENALISED:
        assert after["l0"] <= toy.k + 0.5


def test_matrix_products_are_counted_dense_ones_whole_and_sparse_ones_by_their_entries(modules):
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    sparse = torch.tensor([[0.0, 2, 0, 0], [1, 0, 0, 3]]).to_sparse_csr()
    with modules["sae_training"].Products() as seen:
        a @ b
        torch.addmm(torch.zeros(5), a, b)
        sparse @ b
        torch.sparse.sampled_addmm(sparse, torch.randn(2, 6), torch.randn(6, 4))
    assert (seen.dense, seen.sparse) == (2 * 2 * 3 * 4 * 5, 2 * 3 * 5 + 2 * 3 * 6)


def test_the_speed_result_says_what_was_learned_and_how_much_of_the_machine_was_used(
    modules, compare, monkeypatch
):
    """With processes that answer at once: 4,096 vectors a second, products of 1 + 0.5 GFLOP a
    vector, peak 12,288."""
    training, played = modules["sae_training"], []
    answers = {
        "matrix-peak": {"units": 1, "seconds": 1, "peak_gflops": 12_288.0, "float32": 100.0},
        "profile": {
            "dense_gflop_per_vector": 1.0,
            "sparse_gflop_per_vector": 0.5,
            "where_the_time_goes": {"top": []},
        },
    }

    def run(file, name, contestant, extra=()):
        played.append(name)
        return answers.get(name, {"units": 4096, "seconds": 1, "fvu": 0.2, "l0": 32.0})

    for module in (compare, training):
        monkeypatch.setattr(module, "run_contestant", run)
    job = training.JOBS["topk"]
    result = compare.compare(
        "x.py", "c", "vectors/s", "lenslab", contestants(compare, ["lenslab", "saelens"]), rounds=1,
        more=training.more("topk", job, "vectors.npy", []),
    )  # fmt: skip
    assert played == ["lenslab", "saelens", *["matrix-peak"] * 3, "profile"]
    assert result["matrix_products"]["share_of_peak"] == 0.5
    assert result["held_out_after"]["vectors"] == job.samples
    assert result["held_out_after"]["saelens"] == {"fvu": 0.2, "l0": 32.0}


def test_memory_is_compared_between_two_lengths_of_the_same_training(modules, compare, monkeypatch):
    training, peaks = modules["sae_training"], {"1000": 500.0, "8000": 560.0}
    monkeypatch.setattr(
        training,
        "run_contestant",
        lambda file, name, contestant, extra: {"peak_mb": peaks[extra[-1]]},
    )
    result = training.memory(training.Job(), (1000, 8000), write=True)
    assert result["ratios"] == {"lenslab, 1,000 vectors": 1.12} and not result["holds"]
    assert json.loads((compare.RESULTS / "sae_training_memory.json").read_text()) == result


# --------------------------------------------------------------------------------------------------
# quality


@pytest.mark.parametrize("first", [0.05, 4.0, 300.0])
def test_the_search_for_a_penalty_encloses_the_l0_asked_for(quality, first):
    """L0 = 400 / l1^1.5 and FVU = 2 / L0: wherever the search starts, the FVU at L0 = 32 is read
    off exactly."""
    points = quality.search_l1(
        lambda l1: {"l0": 400 / l1**1.5, "fvu": l1**1.5 / 200}, target=32, first=first
    )
    assert len(points) <= quality.SEARCH and math.isclose(
        quality.fvu_at(points, 32), 2 / 32, rel_tol=1e-9
    )


def test_the_search_comes_back_from_a_penalty_that_silences_every_latent(quality):
    def measure(l1):
        return {"l0": 0.0 if l1 > 8 else 400 / l1**1.5, "fvu": l1**1.5 / 200}

    points = quality.search_l1(measure, target=32, first=12.0)
    assert any(p["l0"] == 0 for p in points) and math.isclose(
        quality.fvu_at(points, 32), 2 / 32, rel_tol=1e-9
    )


def test_an_fvu_is_interpolated_between_the_nearest_points_and_never_beyond_them(quality):
    points = [{"l0": 64, "fvu": 0.1}, {"l0": 16, "fvu": 0.4}, {"l0": 300, "fvu": 0.09}]
    assert math.isclose(quality.fvu_at(points, 32), 0.2)  # half way in logarithms
    assert quality.fvu_at([{"l0": 64, "fvu": 0.1}, {"l0": 128, "fvu": 0.05}], 32) is None
    assert quality.fvu_at([{"l0": 0, "fvu": 1.0}, {"l0": 128, "fvu": 0.05}], 32) is None


def test_an_l0_that_no_penalty_reaches_is_not_compared(quality):
    points = quality.search_l1(lambda l1: {"l0": 117.0, "fvu": 0.5}, target=16, first=4.0)
    assert len(points) == quality.SEARCH and quality.fvu_at(points, 16) is None
    run = {name: {"fvu": 0.1 if name != "relu" else None} for name in quality.ARCHITECTURES}
    other = {name: {"fvu": 0.2} for name in quality.ARCHITECTURES}
    verdict = quality.judge(
        {"lenslab": [dict(run)] * 5, **{peer: [dict(other)] * 5 for peer in quality.PEERS}}
    )
    assert "not_compared" in verdict["saelens relu"] and verdict["saelens centred topk"]["better"]
    assert quality.average([0.1, None]) is None


def test_batch_topk_is_compared_at_the_same_mean_l0(entries, planted, toy):
    sae = entries.saelens(replace(toy, architecture="batchtopk"), planted[:5000])
    for k in (2, 3):
        entries.set_mean_l0(sae, planted[:5000], k)
        assert abs(entries.held_out(sae, planted[:5000])["l0"] - k) < 0.05


def test_the_orders_of_two_seeds_differ_and_that_of_one_seed_does_not(quality, planted):
    a, b, again = (quality.shuffled(planted[:100], seed) for seed in (0, 1, 0))
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert torch.equal(a.sort(0).values, b.sort(0).values)


def test_the_verdict_is_the_rule_of_the_definitions(quality):
    def runs(fvu):
        return [
            {name: {"fvu": fvu[name] * (1 + 0.001 * seed)} for name in fvu} for seed in range(5)
        ]

    ours = runs({"topk": 0.09, "batchtopk": 0.1005, "relu": 0.11})
    theirs = {
        peer: runs(dict.fromkeys(quality.ARCHITECTURES, level))
        for peer, level in zip(quality.PEERS, (0.1, 0.2), strict=True)
    }
    verdict = quality.judge({"lenslab": ours, **theirs})
    first = [verdict[f"{quality.PEERS[0]} {name}"] for name in quality.ARCHITECTURES]
    assert [one["no_worse"] for one in first] == [True, True, False]
    assert [one["better"] for one in first] == [True, False, False]
    assert first[0]["estimate"] == 0.9 and all(
        verdict[f"saelens centred {name}"]["better"] for name in quality.ARCHITECTURES
    )


def test_errors_are_compared_as_ratios_paired_over_seeds(quality):
    peer, factors = [0.20, 0.25, 0.22, 0.21, 0.24], [0.9, 1.1, 0.95, 1.0, 1.02]
    ours = [error * factor for error, factor in zip(peer, factors, strict=True)]
    ratio, logs = quality.paired_seeds(ours, peer), np.log(factors)
    half = 2.776445 * logs.std(ddof=1) / math.sqrt(5)  # Student's t for four degrees of freedom
    expected = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
    assert list(ratio.values()) == pytest.approx(expected, rel=1e-5)


def test_too_few_or_mixed_seeds_are_not_compared(quality):
    with pytest.raises(ValueError, match="at least 5"):
        quality.paired_seeds([1.0] * 4, [1.0] * 4)
    with pytest.raises(ValueError, match="shape"):
        quality.paired_seeds([1.0] * 5, [1.0] * 6)
    with pytest.raises(ValueError, match="positive"):
        quality.paired_seeds([0.0] * 5, [1.0] * 5)
    unknown = quality.paired_seeds([1.0] * 4 + [math.nan], [1.0] * 5)
    assert not unknown["high"] < 1.01


def test_vectors_without_their_mean_train_the_same_sae_moved_by_it(entries, planted, toy):
    """Folding the mean back is exact: what was trained on x - mean says the same of x."""
    vectors, mean = planted[:5000], planted[:5000].mean(0)
    for architecture in ("topk", "relu"):
        job = replace(toy, architecture=architecture)
        centred, moved = entries.saelens(job, vectors - mean), entries.saelens_centred(job, vectors)
        torch.testing.assert_close(
            moved.encode(vectors), centred.encode(vectors - mean), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            moved.decode(moved.encode(vectors)),
            centred.decode(centred.encode(vectors - mean)) + mean,
            atol=1e-4,
            rtol=1e-4,
        )


# --------------------------------------------------------------------------------------------------
# time to quality


@pytest.fixture
def racing(modules, compare):
    return modules["time_to_quality"]


def played_curve(rates, steps, best=0.004):
    """FVU = 1.6 / sqrt(steps) at the best rate, more at others; rates of .03 and more fail."""
    return [played_point(lr, steps, best) for lr in rates]


def played_point(lr, steps, best):
    if lr >= 0.03:
        return {"lr": lr, "steps": steps, "failed": "diverged"}
    worse = 1 + 0.1 * math.log2(lr / best) ** 2
    return {"lr": lr, "steps": steps, "fvu": worse * 1.6 / math.sqrt(steps), "l0": 32.0}


@pytest.mark.parametrize("best", [0.0005, 0.004, 0.016])
def test_the_curve_finds_the_best_rate_also_beyond_those_tried_first(racing, best):
    def measure(rates, steps):
        return played_curve(rates, steps, best)

    points = racing.curve(measure, target=0.15, rates=racing.RATES, own=3e-4)
    assert {point["steps"] for point in points} == {16, 32, 64, 128}
    assert 3e-4 in {point["lr"] for point in points if point["steps"] == 16}
    found = racing.needed(points, 0.15)
    assert found["steps"] == pytest.approx((1.6 / 0.15) ** 2, rel=0.06)
    assert abs(math.log2(found["lr"] / best)) <= 0.5  # the grid doubles
    tried = sorted({point["lr"] for point in points if point["steps"] == 128})
    assert tried[0] < best < tried[-1]  # no outermost rate is the best


def test_a_target_that_no_rate_reaches_needs_no_number_of_steps(racing):
    points = racing.curve(played_curve, target=0.01, rates=racing.RATES, longest=32)
    assert racing.needed(points, 0.01) is None
    broken = racing.curve(lambda rates, n: played_curve([1.0], n), target=0.01, rates=(1.0,))
    assert racing.least(broken) is None and racing.needed(broken, 0.01) is None


def test_the_time_of_every_contestant_is_that_of_its_own_steps(racing, compare, monkeypatch):
    """Curves by rule, times by rule: 1,000 vectors a second, the peer's twice that, at three times
    the steps; a second run reads the curves and trains only what is timed."""
    asked = []

    def run(file, name, one, extra=()):
        job = json.loads(extra[1])[name]
        if isinstance(job, list):
            return {"points": [{k: play(name, j)[k] for k in ("fvu", "l0")} for j in job]}
        asked.append((job["architecture"], name, job["steps"]))
        return play(name, job)

    def play(name, job):
        point = {"fvu": 1.6 / math.sqrt(job["steps"] / (3 if name == "saelens" else 1))}
        if job["architecture"] in racing.PENALISED:
            point = {"fvu": 0.2, "l0": 400 / job["l1"] ** 1.5}
        samples = job["steps"] * job["batch"]
        seconds = samples / (2000 if name == "saelens" else 1000)
        return {"units": samples, "seconds": seconds, "l0": 32.0, **point}

    for module in (compare, racing):
        monkeypatch.setattr(module, "run_contestant", run)
    monkeypatch.setattr(racing.entries, "vectors_file", lambda n: "vectors.npy")
    monkeypatch.setattr(racing, "TARGETS", dict.fromkeys(racing.TARGETS, 0.16))
    words = ["--only", "topk", "jumprelu", "--contestants", "lenslab", "lenslab-default", "saelens"]
    racing.main([*words, "--choose"])
    curves = json.loads((compare.RESULTS / "time_to_quality.json").read_text())
    assert set(curves) == {"curves"} and None in {
        point["lr"] for point in curves["curves"]["topk"]["lenslab-default"]
    }
    asked.clear()
    result = racing.main([*words, "--rounds", "2"])
    steps = {name: n for kind, name, n in asked if kind == "topk"}
    assert len(asked) == 2 * 5 and steps["lenslab"] == steps["lenslab-default"] == 100
    assert steps["saelens"] == pytest.approx(300, abs=2)
    assert result["ours"]["topk"] == 100 * 4096
    assert result["ratios"]["saelens topk"] == pytest.approx(2 / 3, abs=0.01)
    assert result["ratios"]["saelens jumprelu"] == 2 and not result["holds"]["saelens jumprelu"]
    assert "lenslab-default topk" not in result["holds"]
    assert result["trained"]["saelens topk"]["fvu"] == pytest.approx(0.16, abs=1e-3)
    l0 = result["trained"]["lenslab jumprelu"]["l0"]
    assert 32 / 1.5 < l0 < 32 * 1.5 and set(result) >= SCHEMA
    assert json.loads((compare.RESULTS / "time_to_quality.json").read_text()) == result


# ---------------------------------------------------------------------------------------------- the
# results we keep


@pytest.mark.parametrize("file", RESULTS, ids=lambda f: f.stem)
def test_a_kept_result_says_what_it_claims_and_where_it_was_measured(file):
    result = json.loads(file.read_text())
    assert set(result) >= SCHEMA and set(result["ratios"]) == set(result["peers"])
    assert result["machine"]["cores"] >= 1 and result["machine"]["threads"] >= 1
    assert result["precision"] in {"bf16 autocast", "float32: this CPU has no bf16 instructions"}
