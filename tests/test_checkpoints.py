"""Checkpoints: the newest whole one is found, whatever was damaged, cut off or not written."""

import pytest
import torch

from lenslab.files import (
    drop_later_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def state(step):
    return {"step": step, "weights": torch.full((1000,), float(step))}


def test_the_newest_two_checkpoints_are_kept_and_the_newest_is_read(tmp_path):
    for step in (5, 50, 500):
        save_checkpoint(tmp_path, state(step))
    save_checkpoint(tmp_path, state(1), name="predecay.pt")
    assert {f.name for f in tmp_path.glob("*.pt")} == {
        "step-00000050.pt",
        "step-00000500.pt",
        "predecay.pt",
    }
    assert {f.stem for f in tmp_path.glob("*.sha256")} == {
        "step-00000050",
        "step-00000500",
        "predecay",
    }
    assert latest_checkpoint(tmp_path)["state"]["step"] == 500


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def lose_hash(file):
    file.with_suffix(".sha256").unlink()


@pytest.mark.parametrize("damage", [flip, cut, lose_hash])
def test_a_damaged_newest_checkpoint_is_refused_and_the_one_before_is_used(
    tmp_path, capsys, damage
):
    for step in (10, 20):
        save_checkpoint(tmp_path, state(step))
    damage(tmp_path / "step-00000020.pt")
    found = latest_checkpoint(tmp_path)
    assert found["state"]["step"] == 10 and torch.equal(
        found["state"]["weights"], state(10)["weights"]
    )
    assert "step-00000020.pt is missing or damaged" in capsys.readouterr().out
    damage(tmp_path / "step-00000010.pt")
    with pytest.raises(
        ValueError, match="All 2 checkpoints"
    ):  # starting over would look like resuming
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_failed_write_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch, error):
    for step in (10, 20):
        save_checkpoint(tmp_path, state(step))

    def full_disk(_, file):
        file.write_bytes(b"half")
        raise error("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    save_checkpoint(tmp_path, state(30))
    assert "not written" in capsys.readouterr().out
    steps = ("step-00000010", "step-00000020")
    assert {f.name for f in tmp_path.iterdir()} == {
        f"{step}{suffix}" for step in steps for suffix in (".pt", ".sha256")
    }
    assert latest_checkpoint(tmp_path)["state"]["step"] == 20


@pytest.mark.parametrize("place", ["Path.write_text", "os.replace"])
def test_a_disk_that_is_full_a_moment_later_leaves_an_overwritten_checkpoint_as_it_was(
    tmp_path, monkeypatch, place
):
    save_checkpoint(tmp_path, state(1), name="predecay.pt")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"lenslab.files.{place}", full_disk)
        save_checkpoint(tmp_path, state(2), name="predecay.pt")
    assert load_checkpoint(tmp_path / "predecay.pt")["step"] == 1
    assert {file.name for file in tmp_path.iterdir()} == {"predecay.pt", "predecay.sha256"}


def test_no_checkpoint_is_no_error(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None


def test_a_checkpoint_written_after_going_back_is_kept(tmp_path):
    for step in (190, 200):
        save_checkpoint(tmp_path, state(step))
    drop_later_checkpoints(tmp_path, 160)
    assert save_checkpoint(tmp_path, state(170)).exists()  # resumed from before the decay


def test_nothing_that_could_run_code_is_loaded(tmp_path):
    """A pickle with the right hash beside it is still refused."""
    file = save_checkpoint(tmp_path, {"step": 3, "harmless": pytest.approx})
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_checkpoint(file)


def test_what_is_in_a_checkpoint_comes_back_to_the_bit(tmp_path):
    written = {
        "step": 7,
        "w": torch.randn(5),
        "place": [0, 1, 2],
        "name": None,
        "moments": {0: torch.arange(3)},
    }
    read = load_checkpoint(save_checkpoint(tmp_path, written))
    assert torch.equal(read["w"], written["w"]) and torch.equal(read["moments"][0], torch.arange(3))
    assert read["place"] == [0, 1, 2] and read["name"] is None
