"""The probe texts keep what their card promises: balance, lengths, no duplicates, answers that are
right."""

import hashlib
import importlib
import json
import re
import sys
import unicodedata

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import roc_auc_score

from lenslab.files import REPOSITORY, data_path, sha256_file
from lenslab.models import load_model, model_key, random_twin
from lenslab.texts import load_probes

TEXTS = ("first_look", "categories", "matched", "contextual")
SETS = (*TEXTS, "prompt_pairs")
HALVES = {"discovery", "held_out"}
LANGUAGES = {"de", "es", "fr", "it", "pt", "ru"}
FORMS = {"symbolic", "plain", "formal", "other_language"}
MOJIBAKE = re.compile(r"Ã[\x80-\xbf]|Â[\x80-\xbf]|â€|ï»¿|Ð[\x80-\xbf]|\ufffd|\\u[0-9a-f]{4}")
CLOSERS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'"}


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    try:
        yield importlib.import_module("measure_competence")
    finally:
        sys.path.remove(str(REPOSITORY / "scripts"))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_path("models", "pocket-gpt"))


@pytest.fixture(scope="module")
def categories(script):
    return script.probes("categories")


@pytest.fixture(scope="module")
def matched(script):
    return script.probes("matched")


@pytest.fixture(scope="module")
def pairs():
    return load_probes("prompt_pairs")


@pytest.fixture(scope="module")
def contexts(script):
    return script.probes("contextual")


def overlap(texts: list[str]) -> np.ndarray:
    """Jaccard similarity of the sets of five-character sequences, `[text, text]`; case and spaces
    do not count."""
    plain = [" ".join(text.lower().split()) for text in texts]
    grams = CountVectorizer(
        analyzer="char", ngram_range=(5, 5), lowercase=False, binary=True
    ).fit_transform(plain)
    both, size = (grams @ grams.T).toarray(), np.asarray(grams.sum(axis=1)).ravel()
    return both / (size[:, None] + size[None] - both)


def length_auroc(frame: pd.DataFrame, by: str) -> dict[str, float]:
    """How well length alone finds each part, in either direction."""
    return {
        value: roc_auc_score(frame[by] == value, frame["tokens"]) for value in frame[by].unique()
    }


@pytest.mark.parametrize("name", SETS)
def test_files_are_clean_unicode_with_unique_ids_and_texts(name):
    raw = data_path("probes", f"{name}.jsonl").read_bytes()
    content = raw.decode("utf-8")  # strict
    assert content.endswith("}\n") and "\r" not in content and not raw.startswith(b"\xef\xbb\xbf")
    rows = [json.loads(line) for line in content.splitlines()]
    assert len({tuple(row) for row in rows}) == 1, "rows differ in their fields"
    assert len({row["id"] for row in rows}) == len(rows)
    fields = [k for k in rows[0] if k == "text" or k.startswith("prompt")]
    texts = [row[field] for row in rows for field in fields]
    assert len({" ".join(text.lower().split()) for text in texts}) == len(texts)
    for text in texts:
        assert text == text.strip() and unicodedata.is_normalized("NFC", text), text
        assert not MOJIBAKE.search(text), text
        kinds = {unicodedata.category(c) for c in text if c != "\n"}
        assert not kinds & {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}, text


def test_mojibake_would_be_seen():
    assert MOJIBAKE.search("fährt".encode().decode("latin-1")) and MOJIBAKE.search(
        "Поезд".encode().decode("latin-1")
    )
    assert not MOJIBAKE.search("Ã são João fährt à l'œil № Поезд ⭐")


def test_no_text_is_nearly_another_within_or_across_sets(pairs):
    texts = [(row.id, row.text) for name in TEXTS for row in load_probes(name).itertuples()]
    prompts = [
        (row.id, row.prompt_clean) for row in pairs.itertuples()
    ]  # alike among themselves: from templates
    similar = overlap([text for _, text in texts + prompts])[: len(texts)]
    np.fill_diagonal(similar, 0)
    names = [name for name, _ in texts + prompts]
    assert not [
        (names[i], names[j], round(similar[i, j], 2))
        for i, j in np.argwhere(similar > 0.35)
        if i < j
    ]
    one = overlap(
        [
            "The dog ate my homework again.",
            "the dog  ate my homework AGAIN!",
            "Nothing of the sort happened.",
        ]
    )
    assert one[0, 1] > 0.9 and one[0, 2] < 0.05 and one[0, 0] == 1


def test_categories_are_balanced(categories):
    assert len(categories) == 420 and set(categories["split"]) == HALVES
    assert (categories.groupby("category").size() == 60).all() and categories[
        "category"
    ].nunique() == 7
    registers = categories.groupby(["category", "register", "split"]).size()
    assert len(registers) == 42 and (registers == 10).all()
    topics = pd.crosstab(categories["topic"], categories["category"])
    assert topics.shape == (30, 7) and (topics == 2).all(
        axis=None
    )  # what a text is about says nothing of its kind
    foreign = categories[categories["category"] == "non_english"]
    assert (categories.drop(foreign.index)["language"] == "en").all()
    languages = foreign.groupby(["language", "split"]).size()
    assert set(foreign["language"]) == LANGUAGES and (languages == 5).all() and len(languages) == 12


def test_matched_concepts_have_four_forms_in_one_half(matched):
    assert len(matched) == 240
    for _, concept in matched.groupby("concept"):
        assert set(concept["form"]) == FORMS and len(concept) == 4
        assert concept["split"].nunique() == concept["topic"].nunique() == 1
    topics = pd.crosstab(matched["topic"], [matched["form"], matched["split"]])
    assert topics.shape == (15, 8) and (topics == 2).all(axis=None)
    other = matched[matched["form"] == "other_language"]
    assert (other.groupby(["language", "split"]).size() == 5).all() and set(
        other["language"]
    ) == LANGUAGES
    assert (matched.drop(other.index)["language"] == "en").all()
    symbolic = matched["form"] == "symbolic"
    assert (matched[symbolic].groupby("notation").size() == 15).all() and matched[symbolic][
        "notation"
    ].nunique() == 4
    assert matched[symbolic].groupby(["notation", "split"]).size().between(7, 8).all()
    assert (matched[~symbolic]["notation"] == "prose").all()


def test_russian_is_cyrillic_and_nothing_else_is(categories, matched):
    texts = pd.concat([categories, matched])
    cyrillic = texts["text"].str.contains("[А-Яа-яЁё]")
    assert (cyrillic == (texts["language"] == "ru")).all()


def test_numbers_of_a_concept_are_the_same_in_its_forms(matched):
    def numbers(text: str) -> set[float]:
        text = re.sub(r"(?<=\d)(,|\\,| )(?=\d{3}\b)", "", text)  # thousands
        return {float(n.replace(",", ".")) for n in re.findall(r"\d+(?:[.,]\d+)?", text)}

    for concept, rows in matched.groupby("concept"):
        texts = rows.set_index("form")["text"]
        known = numbers(texts["symbolic"])
        for form in FORMS - {"symbolic"}:
            extra = {n for n in numbers(texts[form]) if n not in known}
            extra -= (
                {5.0} if concept in ("opening hours", "people per square kilometre") else set()
            )  # 17:00, 5 million
            assert not extra, (concept, form, extra)


@pytest.mark.parametrize(
    ("name", "by", "spread", "mean"),
    [("categories", "category", 0.1, 2.5), ("matched", "form", 0.25, 3)],
)
def test_length_does_not_tell_the_parts(script, name, by, spread, mean):
    frame = script.probes(name)
    assert frame["tokens"].between(15, 60).all()
    means = frame.groupby(by)["tokens"].mean()
    assert means.max() - means.min() < mean
    for found in (
        length_auroc(frame, by),
        *(length_auroc(half, by) for _, half in frame.groupby("split")),
    ):
        assert all(abs(auroc - 0.5) < spread for auroc in found.values()), found


def test_bands_of_length_hold_ten_texts_of_every_category(categories):
    bands = pd.crosstab(
        categories["category"], pd.cut(categories["tokens"], [14, 21, 28, 35, 42, 50, 60])
    )
    assert bands.shape == (7, 6) and (bands == 10).all(axis=None)


def test_no_word_gives_half_of_a_category_away(categories):
    # beside what a kind is made of: marks, and the commonest words of each language
    words = categories["text"].str.lower().map(lambda text: set(re.findall(r"[^\W\d_]{3,}", text)))
    for category, own in words.groupby(categories["category"]):
        elsewhere = words.drop(own.index)
        for word in set().union(*own):
            share, other = (
                own.map(lambda w, x=word: x in w).mean(),
                elsewhere.map(lambda w, x=word: x in w).mean(),
            )
            assert share - other < 0.5 or word == "https", (category, word, share, other)


def test_contexts_are_balanced_and_style_tells_no_meaning(contexts):
    cells = contexts.groupby(["token", "meaning", "split"]).size()
    assert len(contexts) == 864 and (cells == 6).all() and set(contexts["split"]) == HALVES
    assert contexts["token"].nunique() == 24
    assert (contexts.groupby("token")["meaning"].nunique() == 3).all()
    for (token, half), part in contexts.groupby(["token", "split"]):
        styles = pd.crosstab(part["style"], part["meaning"])
        assert (styles.nunique(axis=1) == 1).all(), (token, half)
    styles = contexts.groupby(["token", "meaning", "style"]).size()
    assert styles.max() <= 6 and styles.groupby(["token", "meaning"]).size().min() >= 3
    order = contexts[["token", "meaning", "split"]].apply(tuple, axis=1)
    assert (order != order.shift()).sum() == len(cells)  # what belongs together stands together


def test_the_token_is_one_token_where_it_starts(tokenizer, contexts):
    encoded = tokenizer(
        contexts["text"].tolist(), add_special_tokens=False, return_offsets_mapping=True
    )
    for row, ids, offsets in zip(
        contexts.itertuples(), encoded.input_ids, encoded.offset_mapping, strict=True
    ):
        end = row.start + len(row.target)
        (own,) = tokenizer(row.token, add_special_tokens=False).input_ids
        assert row.token.strip() == row.target == row.text[row.start : end], row.id
        places = [i for i, (_, stop) in enumerate(offsets) if stop == end]
        assert [ids[i] for i in places] == [own], row.id
        assert row.text[end - len(row.token) : end] == row.token, row.id
        assert ids.count(own) == 1 or not row.target.isalpha(), row.id
        assert 30 <= len(ids) <= 80 and places[0] == row.before >= 15, row.id


def test_no_five_words_in_a_row_stand_in_more_than_two_contexts(contexts):
    runs = CountVectorizer(ngram_range=(5, 5), token_pattern=r"\w+", binary=True)
    shared = np.asarray(runs.fit_transform(contexts["text"]).sum(axis=0)).ravel()
    assert not runs.get_feature_names_out()[shared > 2].tolist()


def test_neither_length_nor_position_tells_meanings(script):
    for token, part in script.probes("contextual").groupby("token"):
        means = part.groupby("meaning")[["tokens", "before"]].mean()
        assert (means.max() - means.min() < [4, 7]).all(), (token, means)
        aurocs = length_auroc(part, "meaning")  # one against the others: 12 against 24
        assert all(abs(auroc - 0.5) < 0.25 for auroc in aurocs.values()), (token, aurocs)
    across = script.probes("contextual").groupby(["token", "meaning"])["before"].mean()
    assert across.groupby("token").agg(np.ptp).mean() < 4


def test_meanings_are_told_by_what_stands_before_the_token_and_nothing_after(script):
    rows = [
        {
            "token": token,
            "meaning": meaning,
            "style": style,
            "split": half,
            "start": len(f"{meaning if token == 'told' else 'same'} words "),
            "text": f"{meaning if token == 'told' else 'same'} words x {meaning}",
        }
        for token in ("told", "untold")
        for meaning in ("wood", "river", "stone")
        for style in ("story", "letter")
        for half in ("discovery", "held_out")
    ]
    scores = script.context_scores(pd.DataFrame(rows)).groupby("token").mean()
    told = {"characters": 1, "words": 1, "last word": 1 / 3, "style": 1 / 3}
    assert scores.loc["told"].to_dict() == pytest.approx(told)
    assert scores.loc["untold"].to_dict() == pytest.approx(dict.fromkeys(told, 1 / 3))
    assert script.shown_token(" |") == r"` \|`"


def test_pairs_are_balanced(pairs):
    assert (pairs.groupby("task").size() >= 60).all() and pairs["task"].nunique() == 4
    halves = pd.crosstab(pairs["task"], pairs["split"])
    assert set(halves) == HALVES and (halves["discovery"] == halves["held_out"]).all()
    agreement = pairs[pairs["task"] == "agreement"]
    assert agreement.groupby(["n_attractors", "split"]).size().tolist() == [12] * 6
    assert pairs.drop(agreement.index)["n_attractors"].isna().all()
    plural = agreement["answer_clean"].isin([" are", " were", " have"])
    assert plural.groupby(agreement["n_attractors"]).mean().tolist() == [0.5] * 3
    for _, task in pairs[pairs["task"].isin(["induction", "indirect_object"])].groupby(
        "task"
    ):  # no filler in both halves
        halves = [
            set(half["answer_clean"]) | set(half["answer_corrupt"])
            for _, half in task.groupby("split")
        ]
        assert not halves[0] & halves[1]


def test_every_pair_can_be_used_and_follows_its_template(script, tokenizer, pairs):
    for pair in pairs.to_dict("records"):
        assert script.misfit(tokenizer, pair) == "", pair["id"]
        assert (
            pair["answer_clean"] != pair["answer_corrupt"]
            and pair["prompt_clean"] != pair["prompt_corrupt"]
        )
        pattern = re.sub(r"\\\{\w+\\\}", ".+?", re.escape(pair["template"]))
        for side in ("clean", "corrupt"):
            assert re.fullmatch(pattern, pair[f"prompt_{side}"]), pair["id"]


def test_gpt2_can_use_the_pairs_that_say_so(script, shared, pairs):
    from transformers import AutoTokenizer

    folder = shared / "fixtures" / "gpt2-tokenizer"
    if not folder.is_dir():
        pytest.skip("GPT-2's tokenizer is not among the shared fixtures")
    gpt2 = AutoTokenizer.from_pretrained(folder)
    assert [not script.misfit(gpt2, pair) for pair in pairs.to_dict("records")] == pairs[
        "gpt2"
    ].tolist()


def still_open(prompt: str) -> str:
    """The closer of what is open at the end: a stack, and quotes that open where none is open."""
    stack: list[str] = []
    for c in prompt:
        if stack and c == stack[-1]:
            stack.pop()
        elif c in CLOSERS:
            stack.append(CLOSERS[c])
    return stack[-1]


def test_answers_of_pairs_are_right(pairs):
    for pair in pairs.itertuples():
        sides = (
            (pair.prompt_clean, pair.answer_clean, pair.answer_corrupt),
            (pair.prompt_corrupt, pair.answer_corrupt, pair.answer_clean),
        )
        for prompt, right, wrong in sides:
            words = re.findall(r"\w+", prompt)
            if pair.task == "brackets":
                assert still_open(prompt) == right
            elif pair.task == "indirect_object":  # the giver is named twice, who receives once
                assert words.count(right.strip()) == 1 and words.count(wrong.strip()) == 2
            elif (
                pair.task == "induction"
            ):  # the last word (or run of three) stood earlier, before the answer
                cue = words[-1:] if not pair.template.startswith("Again") else words[-3:]
                found = [
                    words[i + len(cue)]
                    for i in range(len(words) - len(cue))
                    if words[i : i + len(cue)] == cue
                ]
                assert found == [right.strip()] and wrong.strip() in words
            else:
                nouns = [
                    w for w in words if re.fullmatch(r"(?!As|knows|seems)\w+s|children|women", w)
                ]
                subject_is_plural = right in (" are", " were", " have")
                subject = re.match(pair.template.split("{noun}")[0] + r"(\w+)", prompt)[1]
                assert (subject in nouns) == subject_is_plural
                others = [w for w in nouns if w != subject]
                clean = prompt == pair.prompt_clean
                assert len(others) == (pair.n_attractors if subject_is_plural != clean else 0)


def test_answers_that_are_several_tokens_or_join_the_prompt_are_refused(script, tokenizer):
    assert (
        script.next_id(tokenizer, "The old", " dog")
        == tokenizer(" dog", add_special_tokens=False).input_ids[0]
    )
    assert script.next_id(tokenizer, "The old", " xylophonist") is None
    assert script.next_id(tokenizer, "He is walk", "ing") is None
    pair = dict(
        prompt_clean="The dog", prompt_corrupt="The dogs", answer_clean=" is", answer_corrupt=" are"
    )
    assert script.misfit(tokenizer, pair) == ""
    assert "tokens" in script.misfit(tokenizer, pair | {"prompt_corrupt": "The two dogs"})
    assert "xylophonist" in script.misfit(tokenizer, pair | {"answer_corrupt": " xylophonist"})


def test_differences_are_those_of_each_prompt_run_alone(script, model):
    rows = [
        ("(a", ")", "[a", "]"),
        ("they say (on a", ")", "they say {on a", "}"),
        ("[b", "]", "{b", "}"),
    ]
    pairs = pd.DataFrame(
        rows,
        columns=["prompt_clean", "answer_clean", "prompt_corrupt", "answer_corrupt"],
        index=[5, 2, 9],
    )
    found = script.logit_differences(model, pairs)
    assert found.index.tolist() == [5, 2, 9]
    for i, (clean, right, corrupt, wrong) in zip(pairs.index, rows, strict=True):
        for side, prompt, sign in (("clean", clean, 1), ("corrupt", corrupt, -1)):
            with torch.inference_mode():
                logits = model(
                    torch.tensor(
                        [[0, *model.tokenizer(prompt, add_special_tokens=False).input_ids]]
                    )
                )[0, -1]
            a, b = (
                model.tokenizer(answer, add_special_tokens=False).input_ids[0]
                for answer in (right, wrong)
            )
            assert found.loc[i, side] == pytest.approx(
                float(sign * (logits[a] - logits[b])), abs=1e-5
            )


def test_competence_counts_pairs_and_cancels_a_liking_for_one_answer(script):
    pairs = pd.DataFrame(
        {
            "task": ["a"] * 4 + ["agreement"] * 2,
            "n_attractors": [np.nan] * 4 + [0, 1],
            "template": ["x"] * 4 + ["y"] * 2,
        }
    )
    differences = pd.DataFrame(
        {"clean": [2.0, 2.0, 2.0, -1.0, 1.0, -3.0], "corrupt": [-2.0, -2.0, 1.0, -1.0, 1.0, 1.0]}
    )
    rows = {(row["task"], row["group"]): row for row in script.competence(pairs, differences)}
    groups = {"a": {"all", "x"}, "agreement": {"all", "no attractor", "1 attractor", "y"}}
    assert set(rows) == {(task, group) for task in groups for group in groups[task]}
    row = rows["a", "all"]
    assert [row[f"right_{kind}"][0] for kind in ("clean", "corrupt", "both")] == [0.75, 0.25, 0.25]
    assert row["right_both"][1:] == [0.0063, 0.8059]  # Clopper-Pearson of 1 in 4, from tables
    assert row["difference"] == pytest.approx((5 / 4 - 4 / 4) / 2) and row["pairs"] == 4
    assert rows["agreement", "1 attractor"]["difference_clean"] == -3.0


def test_measuring_writes_model_and_twin_and_leaves_the_card_alone(
    script, gpt2_folder, tmp_path, monkeypatch, capsys
):
    few = load_probes("prompt_pairs").groupby("template").head(2)
    monkeypatch.setattr(script, "load_probes", lambda name: few)
    before = script.CARD.read_bytes()
    script.main(["--model", str(gpt2_folder), "--out", str(tmp_path)])
    found = json.loads((tmp_path / f"competence-{gpt2_folder.name}.json").read_text())
    assert script.CARD.read_bytes() == before and "brackets" in capsys.readouterr().out
    assert (
        found["pairs_left_out"] > 0 and found["model_rows"] != found["twin_rows"]
    )  # its tokenizer splits names
    assert {row["task"] for row in found["model_rows"]} >= {"brackets"} and found["versions"][
        "torch"
    ]


def test_tables_of_the_card_are_fresh(script):
    card = script.CARD.read_text(encoding="utf-8")
    assert script.filled(card) == card, "run python scripts/measure_competence.py --card"
    with pytest.raises(ValueError, match="lengths"):
        script.filled(card.replace("<!-- lengths -->", ""))


def test_bundled_competence_is_of_the_bundled_model_and_pairs():
    found = json.loads(
        data_path("probes", "competence-pocket-gpt.json").read_text(encoding="utf-8")
    )
    again = "run python scripts/measure_competence.py"
    assert found["pairs_sha256"] == sha256_file(data_path("probes", "prompt_pairs.jsonl")), again
    model = load_model("pocket-gpt")
    assert (found["model_key"], found["twin_key"]) == (
        model_key(model),
        model_key(random_twin(model)),
    ), again
    assert found["pairs_left_out"] == 0


def test_the_blind_reading_covers_every_register_and_language_on_the_texts_as_they_are():
    texts = load_probes("categories").set_index("id")
    labels = json.loads(data_path("probes", "blind_reading.json").read_text(encoding="utf-8"))[
        "labels"
    ]
    read = texts.loc[[entry["id"] for entry in labels]]
    assert len(read) >= 60 and read.index.is_unique
    registers = texts.groupby(["category", "register"]).size().index
    assert read.groupby(["category", "register"]).size().reindex(registers, fill_value=0).min() >= 2
    assert set(read["language"]) == set(texts["language"])
    for entry, text in zip(labels, read["text"], strict=True):
        assert hashlib.sha256(text.encode()).hexdigest().startswith(entry["sha256"]), (
            f"{entry['id']} was edited since"
        )


def test_the_blind_reading_covers_every_token_on_the_contexts_as_they_are(contexts):
    reading = json.loads(data_path("probes", "blind_reading.json").read_text(encoding="utf-8"))
    labels = reading["contextual"]["labels"]
    read = contexts.set_index("id").loc[[entry["id"] for entry in labels]]
    assert read.index.is_unique and set(read["token"]) == set(contexts["token"])
    assert read.groupby("token").size().min() >= 5
    meanings = contexts.groupby("token")["meaning"].unique()
    for entry, row in zip(labels, read.itertuples(), strict=True):
        assert {entry["label"], entry["second"]} <= {*meanings[row.token], None}, row.Index
        assert hashlib.sha256(row.text.encode()).hexdigest().startswith(entry["sha256"]), (
            f"{row.Index} was edited since"
        )
