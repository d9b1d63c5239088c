"""The public text that the server distils and tunes on: in-domain, generic, sampled from the proxies, or files.

Every document knows its teacher: the proxy it was sampled from, else the proxy that finds it least surprising.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.folders import write_whole
from deepfusion.jobs import run_jobs
from deepfusion.learning.metrics import bits_per_byte_of_each
from deepfusion.models.loading import compute_device, context_limit, load_model, load_tokenizer
from deepfusion.records import REDO, CorpusRow, invalid
from deepfusion.schema import Config
from deepfusion.text.overlap import overlap
from deepfusion.text.rows import Document, from_row, to_row
from deepfusion.text.splits import Splits
from deepfusion.text.windows import cut_windows

SAMPLE_BATCH = 64


@dataclass(frozen=True)
class Window:
    """One window of text to learn from; `teacher` is the number of a proxy, `source` says where the text is from."""

    document: Document
    source: str
    teacher: int | None = None


def build_corpus(config: Config, splits: Splits, proxies: list[Path], work: Path) -> list[Window]:
    """Gather, cut and assign the public text of a run; `work` keeps what was sampled, for a run that is taken up again.

    Raises:
        InputError: nothing is left of the public text that the config asks for.
    """
    windows: list[Window] = []
    for source, documents in (("public", splits.public), ("generic", splits.generic)):
        windows += [
            Window(piece, source)
            for document in documents
            for piece in cut_windows(document, config.data.max_chars)
        ]
    windows = assign_teachers(windows, proxies, config)
    if "sampled" in config.data.public:
        taught = [
            sum(d.source == "public" and d.teacher == number for d in windows)
            for number in range(len(proxies))
        ]
        windows += _sampled(config, proxies, sample_counts(config.data.sampled_documents, taught), work)
    if not windows:
        fix = "name a file, generic or sampled"
        raise InputError("there is no public text", where="data.public", fix=fix, code="no-public-text")
    counts = Counter((d.source, d.teacher) for d in windows)
    for (source, teacher), count in sorted(counts.items(), key=str):
        progress.say(f"[distill corpus] {count} windows of {source} text for proxy {teacher}")
    private = [document for own in splits.private.values() for document in own]
    for source in sorted({d.source for d in windows} if private else ()):
        share = overlap((d.document for d in windows if d.source == source), private)
        progress.say(
            f"[distill corpus] {share:.2%} of the 13-word runs of {source} text stand verbatim in private text"
        )
    return windows


def sample_counts(each: int, taught: list[int]) -> list[int]:
    """How many texts each proxy is asked for: `each` on average, but none of those that next to no public text needs.

    A proxy that teaches less than a quarter of its fair share of the public text is a weaker copy of others, as
    happens where devices of several types hold alike text; the others are asked for its part. Where no public text
    can tell, all are asked for `each`.

    Args:
        taught: public documents that each proxy knows best.
    """
    useful = [4 * len(taught) * count >= sum(taught) for count in taught]
    share = round(each * len(taught) / sum(useful))
    return [share if wanted else 0 for wanted in useful]


def assign_teachers(windows: list[Window], proxies: list[Path], config: Config) -> list[Window]:
    """Give every document that has no teacher the proxy with the fewest bits per byte on it."""
    open_ = [Document("", d.document.text, d.document.domain) for d in windows if d.teacher is None]
    if not open_:
        return windows
    common = {"documents": open_, "precision": config.precision, "batch_size": config.evaluate.batch_size}
    jobs = [{"folder": proxy, **common} for proxy in proxies]
    scores = torch.tensor(run_jobs(_score, jobs, config.jobs))  # [proxies, documents]
    best = iter(scores.argmin(0).tolist())
    return [d if d.teacher is not None else Window(d.document, d.source, next(best)) for d in windows]


def reading_periods(windows: list[Window], sampled_share: float) -> list[int]:
    """In every how many-th epoch each document is read (`data.reading_order`).

    Samples are read so seldom that they are at most `sampled_share` of what is read, all other text in every epoch.
    Where there is no other text, so are samples.
    """
    sampled = sum(d.source == "sampled" for d in windows)
    real = len(windows) - sampled
    period = max(1, math.ceil(sampled * (1 - sampled_share) / (sampled_share * real))) if real else 1
    return [period if d.source == "sampled" else 1 for d in windows]


def write_corpus(windows: list[Window], path: Path) -> None:
    """JSONL, one window a line: the data format of the project, without options, plus `teacher` and `source`."""
    rows = [
        {key: value for key, value in to_row(d.document).items() if key not in ("options", "answer")}
        | {"teacher": d.teacher, "source": d.source}
        for d in windows
    ]
    for row in rows:
        CorpusRow.model_validate(row)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_corpus(path: Path) -> list[Window]:
    """What `write_corpus` wrote.

    Raises:
        InputError: a line that is no such row (`record-invalid`).
    """
    windows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line:
            try:
                row = CorpusRow.model_validate_json(line)
            except ValidationError as error:
                raise invalid(error, f"{path}:{number}", code="record-invalid", fix=REDO) from None
            windows.append(Window(from_row(row.model_dump(exclude_none=True)), row.source, row.teacher))
    return windows


def sample_texts(folder: Path, count: int, max_chars: int, seed: int, precision: str, who: str) -> list[str]:
    """Texts drawn from a model at temperature 1, from the start-of-text token to its end token or the length limit.

    Args:
        who: what the person who waits knows the model as, such as "device ward"; its folder may be called anything.
    """
    model, tokenizer = load_model(folder, precision).eval(), load_tokenizer(folder)
    torch.nn.Module.to(model, compute_device())
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    limit = min((context_limit(model) or max_chars) - 1, max(16, max_chars // 3))
    torch.manual_seed(seed)
    texts: list[str] = []
    for first in range(0, count, SAMPLE_BATCH):
        prompt = torch.full((min(SAMPLE_BATCH, count - first), 1), start, device=model.device)
        with torch.inference_mode():
            ids = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=limit, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        texts += tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)
        progress.say(f"[{who}] sampled {len(texts)}/{count} texts")
    return [text for text in (t.strip() for t in texts) if len(text) > 16]


def _sampled(config: Config, proxies: list[Path], counts: list[int], work: Path) -> list[Window]:
    asked = [number for number, count in enumerate(counts) if count]
    jobs = [
        {"folder": proxies[number], "count": counts[number], "max_chars": config.data.max_chars,
         "seed": config.seed * 1000 + number, "precision": config.precision, "who": f"proxy {number}",
         "cache": work / f"sampled-{number}.json"}
        for number in asked
    ]  # fmt: skip
    windows = []
    for number, texts in zip(asked, run_jobs(_sample_once, jobs, config.jobs), strict=True):
        for text in texts:
            pieces = cut_windows(Document("", text, "sampled"), config.data.max_chars)
            windows += [Window(piece, "sampled", number) for piece in pieces]
    return windows


def _sample_once(cache: Path, **arguments: Any) -> list[str]:
    if cache.is_file():
        return json.loads(cache.read_text("utf-8"))
    texts = sample_texts(**arguments)
    write_whole(cache, json.dumps(texts))
    return texts


def _score(folder: Path, documents: list[Document], precision: str, batch_size: int) -> list[float]:
    model, tokenizer = load_model(folder, precision).eval(), load_tokenizer(folder)
    return bits_per_byte_of_each(model, tokenizer, documents, batch_size=batch_size)
