"""Checkpoints: the newest whole one is found, whatever was damaged, cut off or not written."""

import fcntl
import os
import signal
import sys
import threading

import pytest
import torch
from test_ground import in_a_child

from lenslab.files import (
    NotWritten,
    drop_later_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    only_writer,
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
    assert len(list(tmp_path.iterdir())) == 3
    assert latest_checkpoint(tmp_path)["state"]["step"] == 500


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def lose_hash(file):
    file.write_bytes(file.read_bytes()[:-32])


def empty(file):
    file.write_bytes(b"")


def spoil_hash(file):
    file.write_bytes(file.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize("damage", [flip, cut, lose_hash, empty, spoil_hash])
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
    assert "step-00000020.pt is passed over" in capsys.readouterr().out
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
    assert {f.name for f in tmp_path.iterdir()} == {"step-00000010.pt", "step-00000020.pt"}
    assert latest_checkpoint(tmp_path)["state"]["step"] == 20


def test_where_nothing_was_written_before_nothing_is_said_to_be_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    save_checkpoint(tmp_path, state(0))
    said = capsys.readouterr().out
    assert "none before" in said and "kept" not in said
    assert not list(tmp_path.iterdir()) and latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("after", [False, True])
def test_killed_while_a_checkpoint_is_written_over_itself_it_is_the_old_or_the_new(
    tmp_path, monkeypatch, after
):
    class Killed(BaseException):
        pass

    def replace(*paths, replace=os.replace):
        if after:
            replace(*paths)
        raise Killed

    save_checkpoint(tmp_path, {"step": 0, "weights": torch.zeros(9)})
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "replace", replace)
        save_checkpoint(tmp_path, {"step": 0, "weights": torch.ones(9)})
    assert float(latest_checkpoint(tmp_path)["state"]["weights"].sum()) == 9 * after


def test_a_disk_that_is_full_a_moment_later_leaves_an_overwritten_checkpoint_as_it_was(
    tmp_path, monkeypatch
):
    save_checkpoint(tmp_path, state(1), name="predecay.pt")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("lenslab.files.os.replace", full_disk)
        save_checkpoint(tmp_path, state(2), name="predecay.pt")
    assert load_checkpoint(tmp_path / "predecay.pt")["step"] == 1
    assert {file.name for file in tmp_path.iterdir()} == {"predecay.pt"}


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


# One writer a folder


def hold(folder):
    with only_writer(folder):
        pass


def test_a_second_writer_is_refused_and_told_who_holds_the_folder(tmp_path):
    with only_writer(tmp_path / "new" / "run"):
        with pytest.raises(NotWritten, match=str(os.getpid())):
            hold(tmp_path / "new" / "run")
        refused = []

        def elsewhere():
            try:
                hold(tmp_path / "new" / "run")
            except NotWritten as error:
                refused.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert in_a_child(elsewhere) == 0 and in_a_child(lambda: hold(tmp_path / "new" / "run"))
        assert len(refused) == 1
        hold(tmp_path / "another")
    hold(tmp_path / "new" / "run")


def test_an_error_and_a_kill_let_go_of_the_folder(tmp_path):
    with pytest.raises(KeyError), only_writer(tmp_path):
        raise KeyError

    def killed():
        with only_writer(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(killed) == -signal.SIGKILL
    hold(tmp_path)


@pytest.mark.parametrize("error", [OSError(37, "No locks"), OSError(95, "Not supported"), None])
def test_a_disk_or_a_system_without_locks_goes_without(tmp_path, monkeypatch, error):
    def no_locks(*_):
        raise error

    if error is None:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    with only_writer(tmp_path):
        hold(tmp_path)
        assert save_checkpoint(tmp_path, state(3)).exists()


def test_where_nothing_can_be_written_what_is_there_can_be_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritten, match="file"):
        hold(tmp_path / "file")
    run, new = tmp_path / "run", tmp_path / "new"
    new.mkdir()
    save_checkpoint(run, state(3))

    def read_only(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(NotWritten, match="Permission denied"):
        hold(new)
    hold(run)
