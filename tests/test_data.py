"""Text from anywhere: every kind of file gives the same documents, and what cannot be read is
named."""

import gzip
import json
import socket
from pathlib import Path

import pandas as pd
import pytest

from lenslab.files import REPOSITORY, data_path, verified
from lenslab.texts import TextsNotHere, hub_texts, load_probes, load_texts, sampled_text

TEXTS = ["  one\ntwo", "drei, vierzehn: ж 数", "def f():\n    return 1"]


def rows(texts=TEXTS, column="text"):
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))


def write(folder, name, content: bytes):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_documents_as_they_are(tmp_path, name):
    file = tmp_path / name
    if name.endswith("parquet"):
        pd.DataFrame({"id": [0, 1, 2, 3], "text": [*TEXTS, None]}).to_parquet(file)
    else:
        content = (rows() + "\n" + rows([" \n", None])).encode()
        file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    # empty and missing texts are no documents
    assert load_texts(file) == load_texts(tmp_path) == TEXTS
    assert load_texts(file, limit=2) == TEXTS[:2]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["txt", "txt.gz"])
def test_documents_of_a_txt_file_end_at_a_blank_line(tmp_path, pack):
    name = "a.txt" if pack is bytes else "a.txt.gz"
    file = write(tmp_path, name, pack(b"\n\none\ntwo\n \t\nthree\n\n\n"))
    assert load_texts(file) == ["one\ntwo", "three"]
    assert load_texts(write(tmp_path, name, pack(b""))) == []


@pytest.fixture
def no_network(monkeypatch):
    """A machine that thinks it is online, where every attempt to reach a server fails the test."""

    def refuse(*given, **options):
        pytest.fail("a server was asked")

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "txt"])
@pytest.mark.parametrize("name", ["texts[1]", "texts*", "te?ts", "d[1]/a", "te{x,y}ts", "a::b"])
def test_a_name_that_looks_like_a_pattern_is_a_name_and_no_server_is_asked(
    tmp_path, no_network, name, ending
):
    meant = name
    for pattern, other in (("[1]", "1"), ("*", "9"), ("?", "x"), ("{x,y}", "x")):
        meant = meant.replace(pattern, other)
    for stem, text in ((meant, "not mine"), (name, "mine")):
        file = tmp_path / f"{stem}.{ending}"
        file.parent.mkdir(exist_ok=True)
        frame = pd.DataFrame({"text": [text]})
        if ending == "parquet":
            with file.open("wb") as out:
                frame.to_parquet(out)
        else:
            file.write_text(text if ending == "txt" else json.dumps({"text": text}))
    assert load_texts(file) == ["mine"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, pack):
    mark, end = b"\xef\xbb\xbf", ".gz" if pack is gzip.compress else ""
    assert load_texts(write(tmp_path, f"a.txt{end}", pack(mark + b"one\r\n\r\ntwo"))) == [
        "one",
        "two",
    ]
    assert load_texts(write(tmp_path, f"a.jsonl{end}", pack(mark + rows().encode()))) == TEXTS
    assert load_texts(write(tmp_path, f"b.txt{end}", pack(mark))) == []
    inside = "one\ufefftwo"
    assert load_texts(write(tmp_path, f"c.txt{end}", pack(inside.encode()))) == [inside]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine", "a.txt", b"one")
    for source in ("~/mine", "~/mine/a.txt", Path("~/mine/a.txt")):
        assert load_texts(source) == ["one"]
    assert hub_texts("~/mine") == ["one"]
    assert not (tmp_path / "~").exists()


def test_rows_without_text_are_left_out_on_request(tmp_path):
    lines = '{"text": "a"}\n{"other": 1}\n{"text": null}\n{"text": 3}\n["x"]\n{"text": "b"}\n'
    file = write(tmp_path, "a.jsonl", lines.encode())
    assert load_texts(file, skip_empty=True) == ["a", "b"]
    assert load_texts(file, skip_empty=True, limit=1) == ["a"]
    with pytest.raises(ValueError, match="row 1"):
        load_texts(file)
    with pytest.raises(ValueError, match="txet"):  # a misspelt column leaves nothing out
        load_texts(file, column="txet", skip_empty=True)


def test_a_folder_is_read_in_order_of_path_and_other_files_in_it_are_left_alone(tmp_path):
    write(tmp_path / "b", "x.jsonl.gz", gzip.compress(rows(["third"]).encode()))
    write(tmp_path / "a", "y.txt", b"first\n\nsecond")
    write(tmp_path / "a", "README.md", b"# not a document")
    assert load_texts(tmp_path) == ["first", "second", "third"]


def test_a_limit_reads_no_further_than_it_needs(tmp_path):
    write(tmp_path, "a.jsonl", (rows(["first"]) + "this is no JSON\n").encode())
    write(tmp_path, "b.jsonl.gz", b"nor is this gzip")
    assert load_texts(tmp_path, limit=1) == ["first"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", rows(column="body").encode(), r"row 0: no text under 'text'.*body"),
        ("a.jsonl", rows(["x"]).encode() + b'{"text": 3}', "row 1: no text under 'text'.*3"),
        ("a.jsonl", rows(["x"]).encode() + b"{'text'", "line 1"),
        ("a.jsonl", b'["text"]', "row 0"),
        ("a.jsonl", b"null", "row 0"),
        ("a.jsonl", b'{"text": "\xff\xfe"}', "UTF-8"),
        ("a.jsonl.gz", gzip.compress(rows().encode() * 50)[:-12], "cut off"),
        ("a.txt.gz", b"plain text under a false name", "damaged"),
        ("a.parquet", b"PAR1 but nothing after it", "damaged"),
        ("a.csv", b"text\nx", r"\.txt, \.jsonl, \.parquet.*read_csv\(file\)\[.column.\]\.tolist"),
        ("a.md", b"# x", r"\.txt, \.jsonl, \.parquet.*read_csv"),
        ("a.txt", "text".encode("utf-16-le"), "NUL"),
        ("a.txt", b"text\n\n\x00\x01", "NUL"),
        ("a.txt", "text".encode("utf-16"), "UTF-8"),
    ],
)
def test_what_cannot_be_read_says_where_and_why(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_texts(write(tmp_path, name, content))
    assert name in str(raised.value)


def test_a_parquet_file_without_the_column_shows_what_it_has(tmp_path):
    pd.DataFrame({"id": [0], "body": ["x"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 0.*body"):
        load_texts(tmp_path)
    assert load_texts(tmp_path, column="body") == ["x"]


@pytest.mark.parametrize(
    "content", [b'{"id": "a"}\n{"id": \n', b'{"id": "caf\xe9"}\n'], ids=["json", "utf-8"]
)
def test_a_damaged_probe_file_is_named(tmp_path, monkeypatch, content):
    (tmp_path / "mine.jsonl").write_bytes(content)
    monkeypatch.setattr("lenslab.texts.data_path", lambda *parts: tmp_path / parts[-1])
    with pytest.raises(ValueError, match=r"mine\.jsonl"):
        load_probes("mine")


def test_probes_are_found_and_a_missing_set_names_those_that_exist():
    probes = load_probes()
    assert (probes.groupby("category").size() == 4).all() and probes["text"].is_unique
    with pytest.raises(FileNotFoundError, match="first_look"):
        load_probes("nonesuch")


def test_sampled_text_holds_every_kind_from_the_beginning_and_whole_it_is_a_million_tokens():
    frame = pd.read_parquet(data_path("corpus", "sampled.parquet"))
    assert 0.95e6 <= frame["tokens"].sum() <= 1.05e6 and frame["id"].is_unique
    some, every = sampled_text(90), sampled_text()
    assert some == every[:90] and len(every) == len(frame)
    assert (
        frame.set_index("text").loc[some, "category"].nunique() == frame["category"].nunique() == 9
    )
    assert all(
        text.startswith(prompt) for text, prompt in zip(frame["text"], frame["prompt"], strict=True)
    )


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\.jsonl"):
        load_texts(tmp_path)  # a folder without any
    with pytest.raises(FileNotFoundError):
        load_texts(tmp_path / "missing.txt")


@pytest.fixture
def twin(tmp_path):
    """What a data set of the hub looks like when its files lie on this machine."""
    pd.DataFrame({"text": ["", *TEXTS]}).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    pd.DataFrame({"text": ["held out"]}).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    return str(tmp_path)


def test_a_data_set_is_streamed_from_the_split_that_was_named(twin):
    assert hub_texts(twin) == TEXTS
    assert hub_texts(twin, split="test") == ["held out"]
    # the empty first row does not count
    assert hub_texts(twin, limit=1) == TEXTS[:1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "test"),
        ({"config": "raw"}, "default"),
        ({"column": "story"}, "row 0: no text under 'story'.*text"),
    ],
)
def test_a_split_a_configuration_or_a_column_that_is_not_there_names_those_that_are(
    twin, options, message
):
    with pytest.raises(ValueError, match=message):
        hub_texts(twin, **options)


def test_a_hub_that_cannot_be_reached_says_what_to_do():
    with pytest.raises(TextsNotHere) as raised:
        hub_texts("Salesforce/wikitext", "wikitext-103-raw-v1", limit=1)
    for part in ("Salesforce/wikitext", "HF_DATASETS_OFFLINE", "HF_TOKEN", "load_texts"):
        assert part in str(raised.value)


def test_a_gated_data_set_says_what_to_do(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def refuse(*given, **options):
        raise DatasetNotFoundError(
            "Dataset 'x/gated' is a gated dataset on the Hub.\nVisit the page"
        )

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        TextsNotHere,
        match=r"gated dataset on the Hub\. .*accept its terms on its page and set HF_TOKEN",
    ):
        hub_texts("x/gated")


def test_the_choice_of_the_final_saes_stands_in_its_results():
    """The numbers in data/README.md, and what the shipped cards say."""
    read = data_path("results", "phase_4_candidates.json").read_text(encoding="utf-8")
    found = verified(json.loads(read))
    mean = pd.DataFrame(found["rows"]).groupby("architecture")["fvu"].mean()
    assert mean.to_dict() == pytest.approx(found["mean_fvu"])
    said = " ".join((REPOSITORY / "data" / "README.md").read_text(encoding="utf-8").split())
    named = {"topk": "TopK", "matryoshka": "Matryoshka", "batchtopk": "sparsities"}
    assert all(f"{named[name]} {value:.3f}" in said for name, value in mean.items())
    assert mean.idxmin() == "batchtopk"
    for row in found["rows"]:
        if row["architecture"] == "batchtopk":
            card = json.loads(data_path("saes", row["sae"], "card.json").read_text())
            assert card["at_l0"][str(row["asked_l0"])]["sae"]["fvu"] == row["fvu"]
