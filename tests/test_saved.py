"""Saved results: given back where they fit, computed where they do not, never silently wrong."""

import json
from dataclasses import dataclass

import pandas as pd
import pytest

from lenslab import files as saved
from lenslab.files import Result


@dataclass(frozen=True)
class Number(Result):
    value: float

    def to_frame(self):
        return pd.DataFrame([{"measure": "a", "value": self.value}])


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """`ask(inputs, value)`: (the value that comes back, how often it was computed)."""
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(saved, "data_path", lambda *parts: tmp_path.joinpath("data", *parts))
    calls = []

    def go(inputs, value):
        frame = saved.saved_result(
            "number", lambda: calls.append(1) or Number(value), inputs=inputs
        )
        assert frame.attrs["origin"] in (
            "computed now",
            "saved result that ships",
            "saved result of this machine",
        )
        return frame["value"].item(), len(calls)

    return go


def test_a_result_is_computed_once_for_the_same_inputs(ask):
    assert ask(["model", 1], 3.5) == (3.5, 1)
    assert ask(["model", 1], 4.5) == (3.5, 1)
    assert ask(["model", 2], 4.5) == (4.5, 2), "other inputs"
    assert ask(["model", 1], 5.5) == (3.5, 2), "the first is still there"


def test_full_computes_again_and_ships(ask, tmp_path, monkeypatch):
    ask("x", 1.0)
    monkeypatch.setenv("LENSLAB_FULL", "1")
    assert ask("x", 2.0) == (2.0, 2)
    monkeypatch.delenv("LENSLAB_FULL")
    assert ask("x", 3.0) == (2.0, 2), "what ships goes before the cache"
    content = json.loads((tmp_path / "data" / "results" / "number.json").read_text())
    assert content["values"] == {"value": 2.0} and "lenslab" in content["versions"]


def test_full_on_another_model_leaves_what_ships_alone(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("LENSLAB_FULL", "1")
    for name, value in (("LENSLAB_MODEL", "gpt2"), ("LENSLAB_MODEL_TWIN", "1")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert ask("x", 1.0)[0] == 1.0
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": {}}', '{"config": 3}'])
def test_a_damaged_file_is_computed_again(ask, tmp_path, content):
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "data" / "results" / "number.json").write_text(content)
    assert ask("x", 1.0) == (1.0, 1)
