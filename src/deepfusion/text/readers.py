"""The rows of a data file, whatever it is called: JSON lines, JSON, CSV, Parquet and Arrow, plain or packed, UTF-8 or
UTF-16.

A file is known by what it holds. Python's own readers and pyarrow do the work: `datasets` would keep a copy of
private text in a cache, guess types by column and read "NA" as nothing.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from deepfusion.errors import InputError
from deepfusion.text.rows import FORMATS

KEYS = (
    "text",
    "prompt",
    "completion",
    "question",
    "messages",
    "conversations",
    "instruction",
)  # one of them is in every row
_BESIDE = (
    "options",
    "choices",
    "answer",
    "answer_idx",
    "domain",
    "input",
    "output",
)  # what stands beside them
PACKED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# What datasets and checkpoints keep beside their data.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}
_TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or an Office document",
    b"\xd0\xcf\x11\xe0": "an Office document",
    b"%PDF": "a PDF document",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"\x04\x22\x4d\x18": "packed with lz4",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x80\x02": "a pickle, which can run code",
    b"\x80\x03": "a pickle, which can run code",
    b"\x80\x04": "a pickle, which can run code",
    b"\x80\x05": "a pickle, which can run code",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"{\\rtf": "an RTF document",
    b"<": "XML or HTML",
}
_READS = "JSON lines, JSON, CSV, TSV, Parquet or Arrow, plain or as .gz, .bz2, .xz"


def suffix(path: Path) -> str:
    """The lower-case ending that says what a file is, without that of packing: `.jsonl` of `a.JSONL.gz`."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


def is_data(path: Path) -> bool:
    """Whether a file in a folder of data is meant as data: by its name, or else by what it holds."""
    if path.name.startswith("._"):  # what macOS leaves beside files
        return False
    if suffix(path) in SUFFIXES and path.name.lower() not in _ABOUT:
        return True
    try:
        with open(path, "rb") as file:
            if file.read(16).startswith(_TABLES):
                return True
        _, row = next(read_rows(path))
    except (InputError, OSError, StopIteration):
        return False
    return isinstance(row, Mapping) and not {str(key) for key in row}.isdisjoint(KEYS)


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Every row of a file with its place: `file:line`, or `file, row n` (from 1) where a file has no lines.

    Raises:
        InputError: no such file, not a data file (says what it looks like), or a part that cannot be read.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "there is no such data file"
        raise InputError(what, where=path, fix="give an existing data file", code="no-data")
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
        if head.startswith(_TABLES):
            yield from _table_rows(path, head)
            return
        unpack = next((PACKED[ending] for magic, ending in _MAGIC.items() if head.startswith(magic)), open)
        with unpack(path, "rb") as file:
            yield from _text_rows(path, file)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"the packed file is damaged ({error})", where=path, code="bad-file") from None
    except OSError as error:
        raise InputError(f"the file cannot be read ({error})", where=path, code="bad-file") from None


def _table_rows(path: Path, head: bytes) -> Iterator[tuple[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        if head.startswith(b"PAR1"):
            batches = pq.ParquetFile(path).iter_batches()
        elif head.startswith(b"ARROW1"):
            opened = pa.ipc.open_file(str(path))
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(pa.OSFile(str(path))))
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a readable table ({str(error)[:200]})", where=path, code="bad-file") from None


def _text_rows(path: Path, file: IO[bytes]) -> Iterator[tuple[str, object]]:
    head = file.read(4096)
    file.seek(0)
    for magic, what in _FOREIGN.items():
        if head.lstrip().startswith(magic):
            raise InputError(f"the file looks like {what}", where=path, allowed=_READS, code="bad-file")
    lines = _lines(path, file, _encoding(head))
    number, line = next(((number, line) for number, line in lines if line.strip()), (0, ""))
    if not line:
        return
    if line.lstrip()[0] in "[{":
        yield from _json_rows(path, number, line, lines)
    else:
        yield from _csv_rows(path, number, line, lines)


def _encoding(head: bytes) -> str:
    for mark, name in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"),
                       (codecs.BOM_UTF16_BE, "utf-16")):  # fmt: skip
        if head.startswith(mark):
            return name
    if head[1:2] == b"\0" and head[:1] != b"\0":
        return "utf-16-le"
    return "utf-16-be" if head[:1] == b"\0" and head[1:2] != b"\0" else "utf-8"


def _lines(path: Path, file: IO[bytes], encoding: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1; only line feeds end them. UTF-8 is decoded line by line, so that an error
    names its line.
    """
    number = 0
    try:
        if encoding in ("utf-8", "utf-8-sig"):
            for raw in file:
                number += 1
                yield number, raw.decode(encoding if number == 1 else "utf-8")
        else:
            for line in io.TextIOWrapper(file, encoding, newline="\n"):
                number += 1
                yield number, line
    except UnicodeDecodeError as error:
        place, fix = f"{path}:{max(number, 1)}", "save it as UTF-8"
        raise InputError(
            f"not {encoding.upper()} text: {error.reason}", where=place, fix=fix, code="bad-text-encoding"
        ) from None


def _json_rows(
    path: Path, number: int, line: str, lines: Iterator[tuple[int, str]]
) -> Iterator[tuple[str, object]]:
    """JSON lines; else values that run over lines, of which one alone may be a list of the rows, or an object that
    holds it.
    """
    if line.lstrip()[0] == "{":
        with suppress(ValueError, RecursionError):
            first = json.loads(line)
            if not _wrapped(first):
                yield f"{path}:{number}", first
                for place, later in lines:
                    if later.strip():
                        yield f"{path}:{place}", _json(later, f"{path}:{place}")
                return
    text = line + "".join(later for _, later in lines)
    values = list(_json_values(path, number, text))
    rows = _wrapped(values[0][1]) if len(values) == 1 else None
    yield from (
        values if rows is None else ((f"{path}, row {index}", row) for index, row in enumerate(rows, 1))
    )


def _wrapped(value: object) -> list[object] | None:
    """The rows in a list, or in the one list of objects in an object that is no row itself."""
    if isinstance(value, Mapping) and not {str(key) for key in value}.isdisjoint(KEYS):
        return None
    if isinstance(value, Mapping):
        lists = [
            part
            for part in value.values()
            if isinstance(part, list) and part and isinstance(part[0], Mapping)
        ]
        return lists[0] if len(lists) == 1 else None
    return value if isinstance(value, list) else None


def _json(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"malformed JSON: {error}", where=place, code="bad-json") from None


def _json_values(path: Path, number: int, text: str) -> Iterator[tuple[str, object]]:
    decoder, at, line = json.JSONDecoder(), 0, number
    while rest := text[at : at + 4096]:
        if rest.isspace():
            line, at = line + rest.count("\n"), at + len(rest)
            continue
        begin = at + len(rest) - len(rest.lstrip())
        line += text.count("\n", at, begin)
        try:
            value, at = decoder.raw_decode(text, begin)
        except json.JSONDecodeError as error:
            place = f"{path}:{line + text.count(chr(10), begin, error.pos)}"
            raise InputError(f"malformed JSON: {error.msg}", where=place, code="bad-json") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"malformed JSON: {error}", where=f"{path}:{line}", code="bad-json") from None
        yield f"{path}:{line}", value
        line += text.count("\n", begin, at)


def _csv_rows(
    path: Path, number: int, line: str, lines: Iterator[tuple[int, str]]
) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    for delimiter in ",\t;|":
        with suppress(csv.Error):
            columns = [
                name.strip() for name in next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])
            ]
            columns = [name.lower() if name.lower() in (*KEYS, *_BESIDE) else name for name in columns]
            if not set(columns).isdisjoint(KEYS):
                break
    else:
        if suffix(path) in (".csv", ".tsv"):
            what, code = f"no known column in {line.strip()[:200]!r}", "unknown-format"
        else:
            what, code = "the file looks like plain text", "bad-file"
        raise InputError(
            what, where=f"{path}:{number}", allowed=FORMATS, fix=f"one document a row, as {_READS}", code=code
        )
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise InputError(f"the column {twice[0]} stands twice", where=f"{path}:{number}", code="bad-csv")
    reader = csv.reader((later for _, later in lines), delimiter=delimiter, strict=True)
    start = number + 1
    while True:
        place = f"{path}:{start}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"malformed CSV: {error}", where=place, code="bad-csv") from None
        start = number + 1 + reader.line_num
        if len(cells) > len(columns):
            raise InputError(f"{len(cells)} cells under {len(columns)} columns", where=place, code="bad-csv")
        if cells:
            yield place, _csv_row(dict(zip(columns, cells, strict=False)), place)


def _csv_row(cells: dict[str, str], place: str) -> dict[str, Any]:
    """Cells as the values that JSON would have: empty ones are absent, lists and objects are parsed."""
    row: dict[str, Any] = {key: value for key, value in cells.items() if value.strip()}
    if set(row).isdisjoint(KEYS):
        row = dict(cells)  # so that what is empty is called so
    for key in ("options", "choices", "messages", "conversations"):
        if str(row.get(key, "")).lstrip().startswith(("[", "{")):
            row[key] = _json(row[key], place)
    return row
