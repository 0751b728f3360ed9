"""The ground floor: seeds that depend on nothing drawn before, writes that lose nothing, keys that
notice changes."""

import hashlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import make_dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import lenslab
from lenslab import files, runtime
from lenslab.files import NotWritten
from lenslab.models import load_model
from lenslab.runtime import derive_generator
from lenslab.sae.load import bundled_saes, load_sae


def draw(seed, label):
    return torch.rand(8, generator=derive_generator(seed, label))


def in_a_child(act):
    """Run it in a child of this process; how that ended (minus the signal that killed it)."""
    child = os.fork()
    if not child:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Seeds


def test_a_generator_depends_on_its_seed_and_label_only():
    expected = draw(0, "shuffle")
    torch.manual_seed(99)
    torch.rand(5)
    derive_generator(0, "another").manual_seed(3)
    assert torch.equal(draw(0, "shuffle"), expected)
    assert not torch.equal(draw(1, "shuffle"), expected)
    assert not torch.equal(draw(0, "shuffle "), expected)


def test_seed_and_label_do_not_run_together():
    assert not torch.equal(draw(1, "1:x"), draw(11, ":x"))
    assert not torch.equal(draw(1, "2"), draw(12, ""))


def test_deriving_a_generator_leaves_the_global_one_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw(0, "anything")
    assert torch.equal(torch.rand(3), expected)


def in_another_process(code):
    """What a fresh Python with another hash seed prints."""
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "1",
        "PYTHONPATH": str(Path(lenslab.__file__).parents[1]),
    }
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return other.stdout.strip()


def test_a_generator_is_the_same_in_another_process():
    code = (
        "import torch; from lenslab.runtime import derive_generator as derive; "
        "print(int(torch.randint(2**62, (1,), generator=derive(7, 'ü'))))"
    )
    ours = int(torch.randint(2**62, (1,), generator=derive_generator(7, "ü")))
    assert int(in_another_process(code)) == ours


def test_the_ground_floor_does_not_wait_for_transformer_lens():
    """Importing it takes seconds: who only asks for a path or a seed need not."""
    code = "import lenslab, lenslab.files, lenslab.runtime, lenslab.stats, sys; print(*sys.modules)"
    modules = in_another_process(code).split()
    assert "lenslab.files" in modules
    assert not {"transformer_lens", "sae_lens", "transformers"} & set(modules)


@pytest.mark.parametrize("seed", [1.0, 1.5, float("nan"), "1", None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(TypeError):
        draw(seed, "a")
    assert torch.equal(draw(True, "a"), draw(1, "a"))


# Machine


def test_the_compute_dtype_follows_the_processor():
    assert runtime.compute_dtype() is (torch.bfloat16 if runtime.has_fast_bf16() else torch.float32)
    assert runtime.default_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    assert runtime.default_device("cpu") == runtime.default_device(torch.device("cpu")) == "cpu"


def test_apples_gpu_is_refused_in_words_wherever_a_device_is_given(gpt2_folder):
    loads = (
        lambda device: load_model(gpt2_folder, device=device),
        lambda device: load_sae(bundled_saes()[0], device=device),
    )
    for load in loads:
        for device in ("mps", "mps:0"):
            with pytest.raises(ValueError, match="float64"):
                load(device)


def test_the_compute_dtype_can_be_asked_for(monkeypatch):
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        monkeypatch.setenv("LENSLAB_COMPUTE", name)
        assert runtime.compute_dtype() is dtype and runtime.machine_summary()["fast_bf16"] == (
            name == "bfloat16"
        )
    monkeypatch.setenv("LENSLAB_COMPUTE", "bf16")
    with pytest.raises(ValueError, match="not 'bf16'"):
        runtime.compute_dtype()


def test_an_interrupt_waits_in_the_main_thread_and_a_block_elsewhere_runs_as_it_is():
    done, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), runtime.interrupts_wait():
        signal.raise_signal(signal.SIGINT)
        done.append("whole")
    with (
        pytest.raises(OSError, match="gone"),
        runtime.interrupts_wait(),
    ):  # what fails inside is not hidden by it
        raise OSError("gone")
    assert signal.getsignal(signal.SIGINT) is before
    for handler in (
        signal.SIG_IGN,
        lambda number, frame: done.append("own"),
    ):  # as they are outside of the block
        try:
            signal.signal(signal.SIGINT, handler)
            with runtime.interrupts_wait():
                signal.raise_signal(signal.SIGINT)
                done.append("inside")
        finally:
            signal.signal(signal.SIGINT, before)

    def elsewhere():
        with runtime.interrupts_wait():
            done.append("thread")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == ["whole", "inside", "inside", "own", "thread"]


@pytest.mark.parametrize("kind", ["tqdm.std", "tqdm.notebook"])
def test_bars_show_unless_silenced_by_either_way(monkeypatch, kind):
    """tqdm's `disable=None` hides bars in logs, `disable=False` overrides TQDM_DISABLE, its
    notebook bar ignores it."""
    bar_class = importlib.import_module(kind).tqdm
    monkeypatch.setattr(runtime, "tqdm", bar_class)
    for value, progress, disabled in (
        ("", True, False),
        ("0", True, False),
        ("1", True, True),
        ("", False, True),
    ):
        monkeypatch.setenv("TQDM_DISABLE", value)
        with runtime.progress_bar(total=3, progress=progress) as bar:
            assert bool(bar.disable) is disabled, (value, progress)
    assert list(runtime.progress_bar(range(3))) == [0, 1, 2]


def test_the_allocator_is_left_alone_when_told_and_elsewhere(monkeypatch):
    monkeypatch.setenv("LENSLAB_ALLOCATOR", "default")
    assert runtime.tune_allocator() is False
    monkeypatch.delenv("LENSLAB_ALLOCATOR")
    monkeypatch.setattr(runtime.platform, "system", lambda: "Darwin")
    assert runtime.tune_allocator() is False


def test_a_libc_without_mallopt_is_no_error(monkeypatch):
    monkeypatch.delenv("LENSLAB_ALLOCATOR", raising=False)
    monkeypatch.setattr(runtime.platform, "system", lambda: "Linux")

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
    assert runtime.tune_allocator() is False


def test_the_machine_summary_names_the_machine_but_no_host_and_no_path():
    summary = runtime.machine_summary()
    assert {"cpu", "cores", "threads", "capability", "fast_bf16", "gpu"} == set(summary)
    text = json.dumps(summary)
    assert os.uname().nodename not in text and str(Path.home()) not in text


# Paths


def test_paths_do_not_depend_on_the_working_directory(monkeypatch, tmp_path):
    for name in ("LENSLAB_CACHE", "LENSLAB_OUTPUTS"):
        monkeypatch.delenv(name, raising=False)
    before = [files.data_path("models"), files.outputs_path("a", "b"), files.cache_path("c")]
    monkeypatch.chdir(tmp_path)
    assert before == [
        files.data_path("models"),
        files.outputs_path("a", "b"),
        files.cache_path("c"),
    ]
    assert all(path.is_absolute() for path in before)
    assert (files.REPOSITORY / "src" / "lenslab" / "files.py").is_file()


def test_cache_and_outputs_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LENSLAB_OUTPUTS", str(tmp_path / "out"))
    assert files.cache_path("x") == tmp_path / "cache" / "x"
    assert files.outputs_path("y", "z") == tmp_path / "out" / "y" / "z"


# Writes


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "new" / "folder" / "result.json"
    for text in ("first", "second"):
        with files.atomic_write(target) as temporary:
            assert (
                temporary.parent == target.parent and temporary.suffix == ".json"
            )  # same disk; savers that append .npy
            temporary.write_text(text)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, OSError, SafetensorError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file_and_raises(tmp_path, error):
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")
    raised = KeyboardInterrupt if error is KeyboardInterrupt else NotWritten
    with pytest.raises(raised), files.atomic_write(target) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error("no space left")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_write_that_wrote_nothing_is_an_error_not_an_empty_file(tmp_path):
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")
    with pytest.raises(NotWritten, match="No such file"), files.atomic_write(target):
        pass
    assert target.read_bytes() == b"old"


def text(path):
    path.write_text("x" * 100_000)


def zipped(path):
    torch.save(torch.zeros(100_000), path)


def tensors(path):
    save_file({"x": torch.zeros(100_000)}, path)


def array(path):
    np.save(path, np.zeros(100_000))


@pytest.mark.parametrize("write", [text, zipped, tensors, array])
def test_what_each_library_says_of_a_full_disk_is_one_sentence(tmp_path, write):
    """A limit on the size of files stands in for the disk: errors are the libraries' own."""
    target = tmp_path / "values.npy"
    target.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        said = pytest.raises(NotWritten, match=r"values\.npy was not written .*free some space")
        with said, files.atomic_write(target) as temporary:
            write(temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_a_file_is_said_in_the_same_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritten, match="was not written"):
        files.write_json(tmp_path / "file" / "x.json", {})


def test_what_a_killed_process_left_goes_with_the_next_write_and_what_another_writes_stays(
    tmp_path,
):

    def killed_within():
        with files.atomic_write(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(killed_within) == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    with files.atomic_write(tmp_path / "b.json") as ours:  # of another name
        ours.write_text("b")
        assert list(tmp_path.iterdir()) == [ours]
        files.write_json(tmp_path / "a.json", {})
        assert ours.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}


def test_threads_and_machines_may_write_one_file(tmp_path, monkeypatch):
    target, failed = tmp_path / "t.json", []

    def write(i):
        try:
            for _ in range(40):
                files.write_json(target, [i] * 500)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not failed and len(set(json.loads(target.read_text()))) == 1
    with files.atomic_write(target) as one:
        monkeypatch.setattr(files.platform, "node", lambda: "another")
        with files.atomic_write(target) as two:
            assert one != two
            two.write_text("[2]")
        one.write_text("[1]")
    assert target.read_text() == "[1]"


def test_long_names_and_the_home_folder_can_be_written(tmp_path, monkeypatch):
    files.write_json(tmp_path / f"{'ü' * 120}.json", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LENSLAB_CACHE", "~/cache")
    monkeypatch.setenv("LENSLAB_OUTPUTS", "~/out")
    monkeypatch.chdir(tmp_path)
    assert files.cache_path("x") == tmp_path / "cache" / "x"
    assert files.outputs_path("x") == tmp_path / "out" / "x"
    files.write_json("~/home.json", {})
    assert (tmp_path / "home.json").exists() and not (tmp_path / "~").exists()


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    target = tmp_path / "card.json"
    files.write_json(target, {"b": 1, "a": "é"})
    assert json.loads(target.read_text(encoding="utf-8")) == {"b": 1, "a": "é"}
    assert list(json.loads(target.read_text(encoding="utf-8"))) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(target, {"loss": float("nan")})
    assert json.loads(target.read_text(encoding="utf-8"))["b"] == 1
    assert list(tmp_path.iterdir()) == [target]


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(b"\x00\x01" * 100_000)
    assert files.sha256_file(file) == hashlib.sha256(b"\x00\x01" * 100_000).hexdigest()
    file.write_bytes(b"\x00\x01" * 99_999 + b"\x00\x02")
    assert files.sha256_file(file) != hashlib.sha256(b"\x00\x01" * 100_000).hexdigest()


# Keys


def test_a_content_key_changes_with_every_part_and_with_nothing_else():
    key = files.content_key("model", {"a": 1, "b": [2, 3]}, b"bytes")
    assert key == files.content_key("model", {"b": [2, 3], "a": 1}, b"bytes")
    assert len(key) == 16 and set(key) <= set("0123456789abcdef")
    others = [
        files.content_key("model", {"a": 1, "b": [2, 3]}, b"byteS"),
        files.content_key("model", {"a": 1, "b": [3, 2]}, b"bytes"),
        files.content_key("model", {"a": 1, "b": [2, 3]}),
        files.content_key({"a": 1, "b": [2, 3]}, "model", b"bytes"),
        files.content_key("model", {"a": 1.5, "b": [2, 3]}, b"bytes"),
    ]
    assert len({key, *others}) == 6
    assert files.content_key("ab", "c") != files.content_key("a", "bc")
    assert files.content_key(b"ab", b"c") != files.content_key(b"a", b"bc")


def test_a_content_key_is_of_all_values():
    long = torch.zeros(5000)
    other = long.clone()
    other[2500] = 1  # their text is the same
    made = make_dataclass("Made", ["values"], frozen=True)
    tables = [pd.DataFrame({"x": values.numpy()}) for values in (long, other)]
    for a, b in (
        (long, other),
        (long.numpy(), other.numpy()),
        tables,
        (made(long), made(other)),
        (made(tables[0]), made(tables[1])),
    ):
        assert str(a) == str(b) and files.content_key({"x": a}) != files.content_key({"x": b})
    assert files.content_key(np.int64(3)) == files.content_key(3)
    named, numbered = pd.DataFrame({"x": [1]}, index=["a"]), pd.DataFrame({"x": [1]})
    assert files.content_key(named) != files.content_key(numbered)
    assert files.content_key(tables[0]) == files.content_key(tables[0].copy())


def test_the_key_of_a_dataclass_is_of_its_fields_alone():
    class Made(make_dataclass("Fields", ["values"])):
        @cached_property
        def total(self):
            return sum(self.values)

    made = Made([1, 2])
    before = files.content_key(made)
    assert made.total == 3 and files.content_key(made) == before != files.content_key(Made([2, 1]))


def test_what_is_signed_is_known_again_and_any_change_is_not(tmp_path):
    content = {"a": 0.1, "b": (1, 2), "c": {"d": None, 10: "ä", 9: ""}, "e": 1e300}
    files.write_json(tmp_path / "x.json", files.signed(content))
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    read = files.verified(json.loads(text))
    assert read == {"a": 0.1, "b": [1, 2], "c": {"d": None, "10": "ä", "9": ""}, "e": 1e300}
    for old, new in (("0.1", "0.2"), ("null", "0"), ("ä", "a"), ('"a"', '"A"'), ("content_", "")):
        with pytest.raises(ValueError, match="changed"):
            files.verified(json.loads(text.replace(old, new, 1)))
    with pytest.raises(ValueError, match="JSON"):
        files.signed({"a": float("nan")})
