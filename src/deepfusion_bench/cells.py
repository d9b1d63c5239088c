"""One cell of a table: a method on a case, with so many devices and one seed. Cells run side by side, and only once."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from deepfusion import __version__, pipeline, progress
from deepfusion.config import CONFIGS, config_digest, current_name, load_config
from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.families.bases import base_checkpoint
from deepfusion.folders import locked, place, write_whole
from deepfusion.inputs import request
from deepfusion.jobs import default_workers, run_jobs
from deepfusion.manifest import Manifest
from deepfusion.models.architecture import read_config
from deepfusion.models.loading import resolve_precision
from deepfusion.records import Transport
from deepfusion.runfolder import provenance
from deepfusion.schema import Config
from deepfusion.stages.evaluate import capped, measure
from deepfusion.text.splits import make_splits
from deepfusion_bench.methods import METHODS, Task

CASES = {"medical": "medical multiple choice, Qwen-MoE", "finance": "financial open answers, DeepSeek-MoE"}
METRICS = ("log_perplexity", "bits_per_byte", "token_accuracy")
WORK = ("steps", "tokens", "flops")
_OWN = re.compile(r"cells|devices|results|results\.md|results-\w+\.svg|costs\.json|\..*\.part")
TRANSPORT = ("total_up_bytes", "total_down_bytes")


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        case: a key of `CASES`.
        devices: N.
        method: a key of `methods.METHODS`.
        variant: name of what is changed, in an ablation.
        shared: overrides (`key=value`) that the devices feel too, such as their model types.
        own: overrides for the server's work alone, so that variants share the uploads.
    """

    case: str
    devices: int
    seed: int
    method: str
    variant: str = ""
    shared: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its file name, without the ending."""
        return "-".join(
            filter(None, (self.case, str(self.devices), f"seed{self.seed}", self.method, self.variant))
        )

    @property
    def file(self) -> Path:
        """The config of its case."""
        return CONFIGS / "bench" / f"{self.case}.yaml"

    def config(self, *overrides: str) -> Config:
        """What the devices see, with `overrides` for the server.

        The optimizer steps of all devices together stay as with the case's own number of them.
        """
        stated = load_config(self.file, self.shared, for_many=True)
        assert isinstance(stated.devices, int)
        steps = max(1, round(stated.device.steps * stated.devices / self.devices))
        fixed = (f"seed={self.seed}", f"devices={self.devices}", f"device.steps={steps}", "jobs=1")
        return load_config(self.file, [*self.shared, *fixed, *overrides], for_many=True)


def run_cells(
    cells: Sequence[Cell], runs: Path, results: Path, workers: int | None = None
) -> list[dict[str, Any]]:
    """Run the cells that have no result yet, side by side; results in order. A cell that fails does not stop the
    others.

    Args:
        runs: folder of the run folders, from which a killed cell continues.
        results: folder with one JSON file per finished cell.

    Raises:
        InputError: a stored result of that name belongs to another config, or, after all others have run, cells
            have failed.
    """
    claim_bench(runs)
    results = place(results)
    for path in results.glob("*.json"):
        read_cell(path)  # the page of all results could not be written in the end
    open_ = [cell for cell in cells if stored(cell, results) is None]
    if len(open_) < len(cells):
        progress.say(f"[bench] {len(cells) - len(open_)} of {len(cells)} cells have their result already")
    blocks: dict[Path, list[Cell]] = {}
    for cell in open_:
        blocks.setdefault(_uploads(cell, runs), []).append(cell)
    tasks = [
        {"cell": cell, "devices_only": only, "runs": runs, "results": results}
        for cell, only in _ahead([*blocks.values()])
    ]
    failed = sorted(
        {name for name in run_jobs(_task, tasks, workers or default_workers()) if name is not None}
    )
    if failed:
        what = f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}"
        fix = "mend what is said above of each; the same command runs them alone"
        raise InputError(what, where=runs, fix=fix, code="cell-failed")
    return [found for cell in cells if (found := stored(cell, results)) is not None]


def claim_bench(runs: Path) -> Path:
    """A folder for a bench to work in: a new or empty one, or one of a bench; nothing else in it is touched.

    Raises:
        InputError: as `folders.place`, or other things lie there and nothing of a bench (`not-ours`).
    """
    found = place(runs)
    names = sorted(path.name for path in found.iterdir()) if found.is_dir() else []
    odd = next((name for name in names if not _OWN.fullmatch(name)), None)
    if odd and not {"cells", "devices"} & set(names):
        what = f"the folder holds {odd} and is no bench"
        raise InputError(what, where=runs, fix="choose another --out", code="not-ours")
    return found


def read_cell(path: Path) -> dict[str, Any]:
    """The result of a finished cell.

    Raises:
        InputError: something else (`not-a-cell`).
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        found = None
    if (
        not isinstance(found, dict)
        or not {"case", "devices", "seed", "method", "overrides", "case_digest"} <= found.keys()
    ):
        raise InputError(
            "not a result of the bench", where=path, fix="choose another --results", code="not-a-cell"
        )
    return found


def stored(cell: Cell, results: Path) -> dict[str, Any] | None:
    """The result of a cell, None where it has none.

    Raises:
        InputError: it was measured with other settings.
    """
    path = results / f"{cell.name}.json"
    if not path.is_file():
        return None
    found = read_cell(path)
    changes = (change.partition("=") for change in found["overrides"])
    measured = [f"{current_name(key)}={value}" for key, _, value in changes]
    asked = [*cell.shared, *cell.own]
    if measured != asked or found["case_digest"] != sha256_file(cell.file):
        what = measured if measured != asked else f"another {cell.file.name}"
        raise InputError(
            f"the stored result was measured with {what or 'no --set'}", where=path, allowed=f"{asked or 'no --set'}",
            fix="choose another --results, or delete the file", code="another-cell",
        )  # fmt: skip
    return found


def _ahead(blocks: list[list[Cell]]) -> Iterator[tuple[Cell, bool]]:
    """Cells, and before them their devices alone, two blocks ahead, so that no worker waits for devices to be
    trained.
    """
    need = [next((cell for cell in block if not METHODS[cell.method].alone), None) for block in blocks]
    yield from ((cell, True) for cell in need[:2] if cell)
    for number, block in enumerate(blocks):
        yield from ((cell, True) for cell in need[number + 2 : number + 3] if cell)
        yield from ((cell, False) for cell in block)


def _uploads(cell: Cell, runs: Path) -> Path:
    """The run folder whose devices a cell uses; cells with equal devices share it."""
    digest = config_digest(cell.config(), *pipeline.STAGES[0].keys)[:8]
    return runs / "devices" / f"{cell.case}-{cell.devices}-seed{cell.seed}-{digest}"


def _task(cell: Cell, devices_only: bool, runs: Path, results: Path) -> str | None:
    """Run a cell and store its result; its name if it failed."""
    try:
        _run(cell, devices_only, runs, results)
    except InputError as error:
        progress.attach(None)
        if not devices_only:  # the cells of these devices will say so
            progress.say(f"[bench] {cell.name} failed: {error}")
        return cell.name
    return None


def _run(cell: Cell, devices_only: bool, runs: Path, results: Path) -> None:
    started = time.time()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        progress.unheard(),
    ):  # their lines are in each run's log.txt
        uploads = _uploads(cell, runs)
        if not METHODS[cell.method].alone:
            uploads.parent.mkdir(parents=True, exist_ok=True)
            with locked(uploads.with_name(f".{uploads.name}.lock")):  # until no other cell works there
                pipeline.run(cell.config(), uploads, last="device")
        if devices_only:
            return
        found = _measured(cell, uploads, runs / "cells" / f"{cell.name}-{_request(cell)[:8]}")
    found["seconds_of_last_call"] = round(time.time() - started, 1)
    results.mkdir(parents=True, exist_ok=True)
    write_whole(results / f"{cell.name}.json", json.dumps(found, indent=1) + "\n")
    numbers = found["validation"][
        "mean_over_domains"
    ]  # who looks at a bench while it runs should not choose by test text
    shown = f"{numbers['log_perplexity']:.4f} nats per token, {numbers['bits_per_byte']:.4f} bits per byte"
    progress.attach(None)
    progress.say(
        f"[bench] {cell.name}: on validation text {shown}, took {progress.duration(found['seconds_of_last_call'])}"
    )


def _request(cell: Cell) -> str:
    """Digest of all that a cell is made of, so that what another one has measured is never taken for it."""
    config = cell.config(*cell.own)
    return request(config, base_checkpoint(config), __version__, cell.method, *cell.shared, *cell.own)


def _measured(cell: Cell, uploads: Path, out: Path) -> dict[str, Any]:
    config = cell.config()
    made = METHODS[cell.method].run(Task(lambda *overrides: cell.config(*overrides, *cell.own), uploads, out))
    splits = make_splits(config)
    limit = config.evaluate.max_documents
    texts = {
        "test": capped(splits.test, limit, config.seed),
        "validation": capped([e for held in splits.held_out.values() for e in held], limit, config.seed),
    }
    common = {"batch_size": config.evaluate.batch_size, "max_chars": config.data.max_chars}
    models = {
        name: {
            text: measure(
                f"{name}, {text} text", out / "measured" / f"{place}-{text}.json", folder, documents, **common,
                precision=config.precision, routers=False, choices=text == "test" and config.evaluate.choices,
            ).metrics.model_dump()
            for text, documents in texts.items()
        }
        for place, (name, folder) in enumerate(made.models.items())
    }  # fmt: skip
    if made.pick == "mean":
        found = {
            text: {"mean_over_domains": _mean([m[text]["mean_over_domains"] for m in models.values()])}
            for text in texts
        }
    else:
        found = models[
            min(models, key=lambda name: models[name]["validation"]["mean_over_domains"]["bits_per_byte"])
        ]
    device_work: dict[str, float] = dict.fromkeys(WORK, 0)
    transport, device_seconds = made.transport or dict.fromkeys(TRANSPORT, 0), 0.0
    if made.transport:
        device_work = _work(out, "fedjets")
    elif not METHODS[cell.method].alone:
        device_work, transport = _work(uploads, "device"), _transport(uploads)
        device_seconds = Manifest.read(uploads).stages["device"].seconds or 0.0
    server_work = {stage: work for stage in ("distill", "tune") if (work := _work(out, stage))["steps"]}
    return {
        "case": cell.case,
        "devices": cell.devices,
        "seed": cell.seed,
        "method": cell.method,
        "variant": cell.variant,
        "overrides": [*cell.shared, *cell.own],
        "case_digest": sha256_file(cell.file),
        **found,
        "models": {name: m["test"]["mean_over_domains"] for name, m in models.items()},
        "budget": {"device": device_work, "server": server_work},
        "transport": transport,
        "facts": made.facts,
        "config": made.config.model_dump(mode="json"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "precision": sorted(
            {resolve_precision(config.precision, read_config(folder)) for folder in made.models.values()}
        ),
        "device_seconds": device_seconds,
        **provenance(),
    }


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: mean(row[key] for row in rows) for key in METRICS}


def _work(run: Path, stage: str) -> dict[str, float]:
    """Optimizer steps, tokens and FLOPs that a run folder, or those in it, have logged for a stage."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(run.rglob("metrics.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            if row["stage"] == stage:
                rows[row["unit"], row["step"]] = row  # a resumed training logs some steps twice
    last: dict[str, int] = {}
    for unit, step in rows:
        last[unit] = max(last.get(unit, 0), step)
    tokens, flops = (sum(row.get(key, 0) for row in rows.values()) for key in ("tokens", "flops"))
    return dict(zip(WORK, (sum(last.values()), round(tokens), flops), strict=True))


def _transport(uploads: Path) -> dict[str, int]:
    found = Transport.read(uploads / "transport.json")
    return {"total_up_bytes": found.total_up_bytes, "total_down_bytes": found.total_down_bytes}
