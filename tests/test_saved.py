"""Saved results: given back where they were made from the same inputs, never silently wrong."""

import json
from dataclasses import dataclass
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch

from lenslab import files
from lenslab.files import Result, save_result, saved_result

SHIPPED, CACHED = "saved result that ships", "saved result of this machine"


@dataclass(frozen=True)
class Number(Result):
    value: float

    def to_frame(self):
        return pd.DataFrame([{"measure": "a", "value": self.value}])


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A bundled `data/` and a cache of our own."""
    monkeypatch.setenv("LENSLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "data_path", lambda *parts: tmp_path.joinpath("data", *parts))
    return tmp_path / "data"


def saved_value(inputs):
    table = saved_result("number", inputs)
    return table if table is None else (table["value"].item(), table.attrs["origin"])


def test_a_result_comes_back_for_the_same_inputs_only(data):
    assert saved_value(["model", 1]) is None
    save_result("number", Number(3.5), ["model", 1], ships=False)
    save_result("number", Number(4.5), ["model", 2], ships=False)
    assert saved_value(["model", 1]) == (3.5, CACHED)
    assert saved_value(["model", 2]) == (4.5, CACHED)
    assert saved_value(["model", 3]) is None
    assert not data.exists()


def test_what_ships_goes_before_the_cache_and_says_how_it_was_made(data):
    save_result("number", Number(1.0), "x", ships=False)
    path = save_result("number", Number(2.0), "x", ships=True)
    assert path == data / "results" / "number.json"
    assert saved_value("x") == (2.0, SHIPPED)
    content = json.loads(path.read_text())
    assert content["result"] == "Number" and content["values"] == {"value": 2.0}
    assert "lenslab" in content["versions"]


def test_a_result_that_ships_for_other_inputs_does_not_hide_the_cache(data):
    save_result("number", Number(1.0), "ours", ships=True)
    save_result("number", Number(2.0), "theirs", ships=False)
    assert saved_value("theirs") == (2.0, CACHED)


def test_the_result_that_ships_with_the_project_is_readable(monkeypatch):
    name = "phase_2_error_rate_and_power"
    content = json.loads(files.data_path("results", f"{name}.json").read_text())
    inputs, key = ["what it was made from"], files.content_key
    monkeypatch.setattr(
        files, "content_key", lambda x: content["config"]["key"] if x is inputs else key(x)
    )
    table = saved_result(name, inputs)
    assert table.attrs["origin"] == SHIPPED and table["holds"].all()
    assert table["estimate"].tolist() == [
        content["values"][measure]["estimate"] for measure in table["measure"]
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": {}}', '{"config": 3}'])
def test_a_damaged_file_counts_as_none(data, content):
    (data / "results").mkdir(parents=True)
    (data / "results" / "number.json").write_text(content)
    assert saved_value("x") is None
    save_result("number", Number(1.0), "x", ships=False)
    assert saved_value("x") == (1.0, CACHED)


def changed(text, random):
    """One character of the file, other than it was."""
    place = random.randrange(len(text))
    return text[:place] + random.choice("0123456789abcdefgh-.,: ") + text[place + 1 :]


def test_no_changed_file_is_read_with_other_values(data):
    """At random, and where it matters: value, name of a column, digits of a key."""
    path = save_result("number", Number(1234.5678), "x", ships=True)
    text, random = path.read_text(), Random(0)
    mutants = [changed(text, random) for _ in range(300)]
    for old, new in (("1234.5678", "1234.5679"), ('"value"', '"valve"'), ('"a"', '"b"')):
        mutants.append(text.replace(old, new))
    unsigned = json.loads(text)
    del unsigned["content_key"]
    mutants.append(json.dumps(unsigned))
    refused = 0
    for mutant in mutants:
        path.write_text(mutant)
        value = saved_value("x")
        assert value in (None, (1234.5678, SHIPPED))  # blanks and the like change nothing
        refused += value is None
    assert refused > 250 and value is None


def test_a_result_under_another_name_is_none_of_that_name(data):
    path = save_result("number", Number(1.0), "x", ships=False)
    path.rename(path.with_name(path.name.replace("number", "other")))
    assert saved_result("other", "x") is None


def test_a_saved_result_says_by_itself_whether_it_was_changed(tmp_path):
    Number(float("inf")).save(tmp_path / "result.json", seed=np.int64(3), sizes=(1, 2))
    content = files.verified(json.loads((tmp_path / "result.json").read_text()))
    assert content["values"] == {"value": None}
    assert content["config"] == {"seed": 3, "sizes": [1, 2]}


def test_every_kind_of_value_of_a_result_becomes_plain_json():
    @dataclass(frozen=True)
    class Mixed(Result):
        array: np.ndarray
        tensor: torch.Tensor
        table: pd.DataFrame
        inner: tuple
        by_number: dict

    mixed = Mixed(
        array=np.array([[1.5, np.nan], [-np.inf, 2.0]]),
        tensor=torch.tensor([True, False]),
        table=pd.DataFrame({"a": [1, 2]}, index=["x", "y"]),
        inner=(Number(float("inf")), np.float32(0.5), None),
        by_number={3: np.int64(4)},
    )
    plain = mixed.to_dict()
    assert plain["array"] == [[1.5, None], [None, 2.0]] and plain["tensor"] == [True, False]
    assert plain["table"]["index"] == ["x", "y"] and plain["table"]["data"] == [[1], [2]]
    assert plain["inner"] == [{"value": None}, 0.5, None] and plain["by_number"] == {"3": 4}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
