"""A run folder at work: who works there, how outputs come to their place, what time and memory a stage took."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from deepfusion import __version__, progress
from deepfusion.config import config_digest, save_config
from deepfusion.digests import MEMORY, Digests, tree_digest
from deepfusion.errors import InputError
from deepfusion.families.bases import base_checkpoint
from deepfusion.folders import (
    LOCK,
    clear_parts,
    clear_work,
    is_run,
    locked,
    make,
    open_work,
    remove,
    sync,
    write_whole,
)
from deepfusion.manifest import MANIFEST, Key, Manifest, Outcome, StageEntry
from deepfusion.report.page import is_report
from deepfusion.resume import Stage, stage_key
from deepfusion.schema import Config

PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "datasets"),
    *("safetensors", "tokenizers", "scikit-learn", "numpy"),
)
_UPLOADS = ("device",)  # the registry looks at each; training devices again is no way to mend one
_REDONE = ("report",)  # cheap, and it shows the seconds of all others


@contextmanager
def opened(path: Path) -> Iterator[RunFolder]:
    """A run folder to work in alone; one that was made for a command which is then refused is gone again.

    Raises:
        InputError: another process works there (`run-busy`), or it cannot be made (`bad-out`).
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    make(path)
    what = "another process works in this run folder"
    with locked(path / LOCK, InputError(what, where=path, fix="wait for it", code="run-busy")):
        try:
            if is_run(path):
                clear_parts(path)
            yield RunFolder(path)
        except BaseException:
            if not is_run(path):
                with suppress(OSError):  # not every system lets go of a file that is open
                    (path / LOCK).unlink()
                    for folder in made:
                        folder.rmdir()
            raise


class RunFolder:
    """What one process, alone, does in a run folder.

    Attributes:
        manifest: as it was found; `begin` makes the folder ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.read(path) if (path / MANIFEST).is_file() else Manifest()
        self.digests = Digests(path / MEMORY)

    def begin(self, config: Config) -> None:
        """Write down what is run, by what, and where."""
        about = provenance() | {"seed": config.seed, "argv": sys.argv, "config_digest": config_digest(config)}
        self.manifest = self.manifest.model_copy(update=about)
        self.write()
        save_config(config, self.path / "config.yaml")

    def write(self) -> None:
        """Write the manifest, and what is known of files."""
        self.manifest.write(self.path)
        self.digests.save()

    def key(self, stage: Stage, config: Config) -> Key:
        """What the result of a stage depends on."""
        return stage_key(stage, config, self.path, self.digests)

    def do(self, stage: Stage, config: Config, redo: bool, anew: bool) -> None:
        """Run a stage, go on with it, or leave it as it is.

        Args:
            redo: also where nothing changed.
            anew: do not go on with what was begun.
        """
        asked, entry = self.key(stage, config), self.manifest.stages.get(stage.name, StageEntry())
        changed = entry.differences(asked)
        if not changed and isinstance(entry.key, Key):
            asked = entry.key  # what could not be known then may be known now
        made = entry.status in ("done", "outdated")
        kept = made and not changed and not redo and stage.name not in _REDONE
        if kept and (otherwise := self._otherwise(entry)):
            if stage.name in _UPLOADS and all((self.path / path).exists() for path in entry.digests):
                progress.say(f"[{stage.name}] {'; '.join(otherwise)}: the registry looks at each upload")
            else:
                changed, kept = otherwise, False
        if kept:
            entry.status = "done"
            remove(self._work(stage))  # of a run that was killed while it cleaned up
            progress.say(f"[{stage.name}] unchanged, done in {progress.duration(entry.seconds or 0)} before")
            return
        if changed and entry.status != "waiting" and stage.name not in _REDONE:
            progress.say(f"[{stage.name}] begins anew: {'; '.join(changed)}")
        if open_work(self._work(stage), asked.digest, anew=anew):
            progress.say(f"[{stage.name}] continues")
        entry = self._started(stage, asked, entry)
        if not (self._work(stage) / "finished.json").is_file():
            self._make(stage, config, entry)
        self._put(stage, entry)
        entry.key = asked if all(asked.inputs.values()) else asked.completed(self.key(stage, config))
        entry.status, entry.known = "done", []
        self.write()
        remove(self._work(stage))
        memory = f"{(entry.peak_rss_bytes or 0) / 2**30:.1f} GiB"
        progress.say(f"[{stage.name}] done in {progress.duration(entry.seconds or 0)}, peak memory {memory}")

    def leave(self, stages: Sequence[Stage], config: Config) -> None:
        """What is said of stages that are not run this time: whether what they made before still holds."""
        for stage in stages:
            entry = self.manifest.stages.get(stage.name)
            if entry is not None and entry.status in ("done", "outdated"):
                outdated = entry.differences(self.key(stage, config)) or any(
                    self._status(name) not in ("", "done") for name in stage.inputs.values()
                )
                entry.status = "outdated" if outdated else "done"
        self.write()

    def _otherwise(self, entry: StageEntry) -> list[str]:
        """What is said of outputs that are not there as the stage made them."""
        found = []
        for name, digest in entry.digests.items():
            if not (self.path / name).exists():
                found.append(f"{name} is missing")
            elif tree_digest(self.path / name, self.digests.sha256) != digest:
                found.append(f"{name} was changed since")
        return found

    def _status(self, output: str) -> str:
        """Of the stage that makes this output."""
        entries = self.manifest.stages.values()
        return next((entry.status for entry in entries if output in entry.digests), "")

    def _work(self, stage: Stage) -> Path:
        return self.path / ".work" / stage.name

    def _started(self, stage: Stage, key: Key, before: StageEntry) -> StageEntry:
        # What stands here is what we made: whatever is otherwise at its place was changed, and is nothing to remove.
        known = [*before.known, *([before.digests] if before.digests else [])]
        entry = StageEntry(status="running", key=key, source=stage.source, known=known)
        self.manifest.stages[stage.name] = entry
        self.write()
        return entry

    def _make(self, stage: Stage, config: Config, entry: StageEntry) -> None:
        """Run a stage in its work folder and note there that it has finished."""
        work = self._work(stage)
        inputs = {name: self.path / path for name, path in stage.inputs.items()}
        inputs |= {"run": self.path, "base": base_checkpoint(config)}
        spent = _seconds(work / "seconds")
        out = work / "out"
        try:
            with _Watch(work / "seconds", spent) as watch:
                out.mkdir(exist_ok=True)
                summary = stage.run(config, inputs, out)
        except (InputError, OSError):
            entry.status = "failed"
            with suppress(OSError):  # a full disk is said by the error that comes
                self.write()
            raise
        clear_work(out)
        for path in out.rglob("*"):
            if path.is_file():
                sync(path)
        made = [path for path in stage.outputs if (out / path).exists()]
        facts = {
            "digests": {path: tree_digest(out / path, self.digests.sha256) for path in made},
            "summary": summary,
            "seconds": watch.seconds,
            "peak_rss_bytes": watch.peak,
        }
        # From here on a killed run only has to move the outputs.
        write_whole(work / "finished.json", json.dumps(facts))

    def _put(self, stage: Stage, entry: StageEntry) -> None:
        """Move the outputs of a finished stage to their places."""
        work = self._work(stage)
        found = Outcome.model_validate_json((work / "finished.json").read_bytes())
        entry.known.append(found.digests)  # a run that is killed below leaves some of these behind
        self.write()
        for path in stage.outputs:
            new = work / "out" / path
            if new.exists() or path not in found.digests:  # what an earlier config made goes too
                self._retire(path, work, entry.known)
            if new.exists():
                make((self.path / path).parent)
                os.rename(new, self.path / path)
                self.digests.moved(new, self.path / path)
        for name in Outcome.model_fields:
            setattr(entry, name, getattr(found, name))

    def _retire(self, name: str, work: Path, known: list[dict[str, str]]) -> None:
        """Takes an earlier output out of the way: to be removed with the work folder where it is as we made it, else
        to be kept.
        """
        old = self.path / name
        if not os.path.lexists(old):
            return
        if not old.is_symlink() and (
            tree_digest(old) in [made.get(name) for made in known] or is_report(old)
        ):
            aside = work / "old" / name
            aside.parent.mkdir(parents=True, exist_ok=True)
        else:
            number = next(n for n in count(1) if not os.path.lexists(old.with_name(f"{old.name}.kept-{n}")))
            aside = old.with_name(f"{old.name}.kept-{number}")
            progress.say(f"{old} was changed since it was made here: it is kept as {aside.name}")
        os.rename(old, aside)


def _seconds(file: Path) -> float:
    try:
        return float(file.read_text("utf-8"))
    except (OSError, ValueError):
        return 0.0


class _Watch:
    """Seconds and peak resident memory of this process and its workers; the seconds survive a kill."""

    def __init__(self, file: Path, spent: float) -> None:
        self.file, self.spent = file, spent
        self.peak = 0
        self.begin = time.monotonic()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seconds(self) -> float:
        return round(self.spent + time.monotonic() - self.begin, 2)

    def __enter__(self) -> _Watch:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            total = 0
            for member in (process, *process.children(recursive=True)):
                try:
                    total += member.memory_info().rss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)
            write_whole(self.file, str(self.seconds))
            if self.stop.wait(0.5):
                return


# What made a figure --------------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """What made a figure: versions of the program, of what it builds on, and the machine."""
    return {
        "version": __version__,
        "git": _git_revision(),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """What a figure of this run was measured on."""
    return {
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
