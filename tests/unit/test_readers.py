"""Every form of a data file, known by what it holds; what is none says what it looks like; what a folder leaves out
is said.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.text.rows import Document
from deepfusion.text.sources import load_rows, load_source, local_files, read_documents

ROWS = [
    {"text": "Eins und zwei, »drei«.", "domain": "de"},
    {"prompt": "q\n", "completion": ' a, "b"\nc'},
    {"question": "Which?", "options": ["red", "green"], "answer": 1},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"instruction": "Do.", "input": "This", "output": "Done."},
]
COLUMNS = sorted({key for row in ROWS for key in row})


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows: list[dict], delimiter: str) -> str:
    import csv

    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(COLUMNS)
    cells = [[row.get(key, "") for key in COLUMNS] for row in rows]
    writer.writerows(
        [[json.dumps(cell) if isinstance(cell, list) else cell for cell in row] for row in cells]
    )
    return file.getvalue()


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{key: row.get(key) for key in COLUMNS} for row in ROWS]), path)


def arrow(path: Path) -> None:
    made = pa.Table.from_pylist([{key: row.get(key) for key in COLUMNS} for row in ROWS])
    with pa.ipc.new_file(str(path), made.schema) as writer:
        writer.write_table(made)


def stream(path: Path) -> None:
    made = pa.Table.from_pylist([{key: row.get(key) for key in COLUMNS} for row in ROWS])
    with pa.ipc.new_stream(str(path), made.schema) as writer:
        writer.write_table(made)


def text(content: str, encoding: str = "utf-8") -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content.encode(encoding))  # type: ignore[return-value]


FORMS: dict[str, Callable[[Path], object]] = {
    "ward.jsonl": text(lines(ROWS)),
    "ward.JSONL": text(lines(ROWS)),
    "ward.ndjson": text(lines(ROWS).replace("\n", "\r\n")),
    "bom.jsonl": text(lines(ROWS), "utf-8-sig"),
    "utf16.jsonl": text(lines(ROWS), "utf-16"),
    "utf16le.jsonl": text(lines(ROWS), "utf-16-le"),
    "utf16be.jsonl": text(lines(ROWS), "utf-16-be"),
    "utf32.jsonl": text(lines(ROWS), "utf-32"),
    "array.json": text(json.dumps(ROWS)),
    "pretty.json": text(json.dumps(ROWS, indent=2)),
    "wrapped.json": text(json.dumps({"version": 1, "data": ROWS})),
    "pretty-wrapped.json": text(json.dumps({"version": 1, "data": ROWS}, indent=1)),
    "jq.json": text("\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "one-line.jsonl": text("[" + json.dumps(ROWS)[1:]),
    "lines called.json": text(lines(ROWS)),
    "nameless": text(lines(ROWS)),
    "table.csv": text(table(ROWS, ",")),
    "excel.csv": text(table(ROWS, ";"), "utf-8-sig"),
    "excel-unicode.txt": text(table(ROWS, "\t"), "utf-16"),
    "table.tsv": text(table(ROWS, "\t")),
    "ward.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS).encode())),
    "ward.csv.bz2": lambda path: path.write_bytes(bz2.compress(table(ROWS, ",").encode())),
    "ward.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode("utf-16"))),
    "packed but not called so.jsonl": lambda path: path.write_bytes(gzip.compress(lines(ROWS).encode())),
    "ward.parquet": parquet,
    "parquet but not called so": parquet,
    "ward.arrow": arrow,
    "stream.arrow": stream,
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    path = tmp_path_factory.mktemp("plain") / "x.jsonl"
    path.write_text(lines(ROWS), "utf-8")
    return read_documents(path, "d")


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_documents(name: str, tmp_path: Path, expected: list[Document]) -> None:
    FORMS[name](tmp_path / name)
    assert read_documents(tmp_path / name, "d") == expected
    assert load_rows(str(tmp_path)) == load_rows(
        str(tmp_path / name)
    )  # in a folder too, whatever it is called


def test_a_folder_reads_every_data_file_and_says_what_it_leaves_out(
    tmp_path: Path,
    expected: list[Document],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_said", set())
    for name, make in FORMS.items():
        make(tmp_path / name)
    (tmp_path / "._ward.jsonl").write_bytes(b"\0\5\26\7 Mac OS X")
    (tmp_path / "README.md").write_text("# Notes, about: text\n")
    (tmp_path / "scan.pdf").write_bytes(b"%PDF-1.7 ...")
    (tmp_path / "more").mkdir()
    assert len(load_rows(str(tmp_path))) == len(FORMS) * len(ROWS)
    said = capsys.readouterr().err
    assert "28 data files are read" in said
    assert "left out as no data: ._ward.jsonl, README.md, more/, scan.pdf (4)" in said
    globbed = load_rows(str(tmp_path / "*.jsonl"))
    assert len(globbed) == sum(name.endswith(".jsonl") for name in FORMS) * len(ROWS)


def test_a_broken_data_file_in_a_folder_is_an_error_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text(lines(ROWS), "utf-8")
    (tmp_path / "bad.JSON").write_text('{"text": ')
    with pytest.raises(InputError, match=r"bad\.JSON:1: malformed JSON"):
        load_rows(str(tmp_path))


def test_what_is_not_read_of_a_row_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_said", set())
    rows = [
        {"question": "q", "answer": "a", "context": "c", "id": 7},
        {"instruction": "i", "output": "o", "history": [["a", "b"]], "empty": ""},
        {"conversations": [{"from": "gpt", "value": "x", "thinking": "hm"}], "system": "be kind"},
        {"text": "t", "domain": "d", "meta": {"url": "u"}},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text(lines(rows), "utf-8")
    assert len(read_documents(path)) == 4
    told = capsys.readouterr().err
    assert "nothing is made of context, conversations.thinking, history, meta, system (5)" in told
    read_documents(FORMS["ward.jsonl"](tmp_path / "y.jsonl") and tmp_path / "y.jsonl")
    assert not capsys.readouterr().err


def test_every_way_to_give_choices(tmp_path: Path) -> None:
    rows = [
        {"question": "Which?", "options": ["red", "green"], "answer": "B"},
        {"question": "Which?", "choices": ["red", "green"], "answer": 1},
        {"question": "Which?", "choices": {"A": "red", "B": "green"}, "answer": "B"},
        {"question": "Which?", "choices": {"text": ["red", "green"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "Which?", "A": "red", "B": "green", "answer": "B"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text(lines(rows), "utf-8")
    table_ = tmp_path / "x.csv"
    table_.write_text("Question,A,B,Answer\nWhich?,red,green,B\n")
    assert {(e.prompt, e.options, e.answer) for e in [*read_documents(path), *read_documents(table_)]} == {
        ("Question: Which?\nA. red\nB. green\nAnswer:", (" A. red", " B. green"), 1)
    }


@pytest.mark.parametrize(
    ("options", "right"),
    [(["red", "green"], 1), (["1", "2"], 0), (["A. 1", "B. 2"], 0)],
)
def test_an_index_as_text_is_read_alike_in_rows_and_tables(
    options: list[str], right: int, tmp_path: Path
) -> None:
    row = {"question": "Which?", "options": options, "answer": "1"}
    (tmp_path / "x.jsonl").write_text(lines([row]), "utf-8")
    (tmp_path / "x.csv").write_text(table([row], ","), "utf-8")
    for name in ("x.jsonl", "x.csv"):
        assert [document.answer for document in read_documents(tmp_path / name)] == [right], name


def test_copies_are_counted_and_variants_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_said", set())
    path = tmp_path / "code.jsonl"
    path.write_text(
        lines([{"text": "if x:\n    y"}, {"text": "if x:\ny"}, {"text": "IF X:\nY"}, {"text": "if x:\ny"}]),
        "utf-8",
    )
    assert len(load_source(str(path))) == 3
    assert "1 of 4 documents are exact copies" in capsys.readouterr().err
    assert len(load_rows(str(path))) == 4


def test_datasets_saved_to_disk(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "dev": made.select([0])}).save_to_disk(str(tmp_path / "several"))
    assert [e.text for e in load_source(str(tmp_path / "one"))] == ["a", "b"]
    assert [e.text for e in load_source(str(tmp_path / "several"))] == ["a", "b"]
    assert [e.text for e in load_source(f"{tmp_path / 'several'}:dev")] == ["a"]


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", lines(ROWS))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped(), "looks like a zip archive"),
        (b"%PDF-1.7\n", "looks like a PDF document"),
        (b"\x28\xb5\x2f\xfd1234", "packed with zstd"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"\x80\x04\x95abc", "a pickle"),
        (b"<html></html>", "XML or HTML"),
        (b"One fine day.\nAnother.\n", "looks like plain text"),
        (gzip.compress(lines(ROWS).encode())[:-20], "packed file is damaged"),
        (gzip.compress(b"x" * 999)[:60] + b"abc", "packed file is damaged"),
        (gzip.compress(lines(ROWS * 9).encode())[:40] + b"\xff" * 40, "packed file is damaged"),
        (b"PAR1 and then nothing", "not a readable table"),
        (b"ARROW1\0\0 and then nothing", "not a readable table"),
        ("text\ncafé\n".encode("latin-1"), "save it as UTF-8"),
        (b"text,text\na,b\n", "column text stands twice"),
        (b"text,n\n,3\n", '"text" is empty'),
        (lines(ROWS).encode("utf-16")[:-1], "not UTF-16 text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",  # packed files hold the time
)
def test_other_files_say_what_they_look_like_in_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_documents(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_csv_without_a_known_column_lists_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("body,label\nx,y\n")
    with pytest.raises(InputError, match=r"x\.csv:1: no known column in 'body,label'") as error:
        read_documents(path)
    assert error.value.code == "unknown-format"


def test_a_csv_row_names_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(
        'question,options,answer\nQ,"[""a"", ""b""]",A\n"Q\n2","[""a"", ""b""]",B\nQ3,"[""a"", ""b""]",7\n'
    )
    with pytest.raises(InputError, match=r"x\.csv:5: .*none of the options"):
        read_documents(path)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_file_is_documents_or_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "x"
    path.write_bytes(content)
    try:
        said = "" if read_documents(path) else "nothing"
    except InputError as error:
        said = str(error)
    assert not said or (said.startswith(str(path)) and "\n" not in said)


@pytest.mark.parametrize(
    "name", ["a:b.jsonl", "notes: ward.jsonl", "C:data", "a #1.jsonl", "[x].jsonl", "~x.jsonl", "x*.jsonl"]
)
def test_a_path_is_a_path_whatever_it_holds(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(lines(ROWS), "utf-8")
    assert len(load_source(str(tmp_path / name))) == len(ROWS)
    assert local_files([str(tmp_path / name)]) == [tmp_path / name]
    monkeypatch.chdir(tmp_path)
    assert len(load_source(name)) == len(ROWS)
    assert local_files([name]) == [Path(name)]
    folder = tmp_path / "a:folder"
    folder.mkdir()
    (folder / name).write_text(lines(ROWS), "utf-8")
    assert local_files([str(folder)]) == [folder / name]
    assert len(load_source(str(folder))) == len(ROWS)


def test_a_file_whose_name_is_no_text_is_read(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    path.write_text('{"text": "a"}\n')
    assert read_documents(path) == [Document("", "a", "caf\ufffd")]
