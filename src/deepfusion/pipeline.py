"""The stages in order, the run folder, the manifest, and resumption."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from deepfusion import __version__, jobs, progress
from deepfusion.config import Config, config_digest, save_config
from deepfusion.digests import checkpoint_digest, sha256_file
from deepfusion.errors import InputError
from deepfusion.families import bases
from deepfusion.families.base import moe_config
from deepfusion.families.bases import base_checkpoint
from deepfusion.folders import (
    LOCK,
    claim_run,
    is_run,
    locked,
    make,
    open_work,
    remove,
    standing,
    sync,
    write_whole,
)
from deepfusion.inputs import data_files, device_types, local_inputs
from deepfusion.learning.memory import estimate_training_bytes, require_memory
from deepfusion.models.architecture import parameter_total, read_config
from deepfusion.models.presets import local_digest
from deepfusion.report.page import is_report
from deepfusion.stages import (
    cluster,
    device,
    distill,
    evaluate,
    merge,
    proxy,
    receive,
    registry,
    report,
    tune,
)
from deepfusion.uploads.intake import Survey, given_folders, survey

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "scikit-learn",
    "numpy",
)


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        run: `run(config, inputs, out) -> summary`; writes below `out` what `outputs` names.
        inputs: by name, what it reads of the run folder.
        outputs: what it adds to the run folder.
        keys: the config keys that its result depends on.
        checkpoints: which public checkpoints it reads: `types` of devices, `base` of distillation.
    """

    name: str
    run: Callable[[Config, dict[str, Path], Path], dict[str, Any]]
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    keys: tuple[str, ...]
    checkpoints: tuple[str, ...] = ()


_SPLIT_KEYS = (
    "seed", "devices",
    *(f"data.{key}" for key in ("private", "public", "public_fraction", "test", "limit", "partition")),
)  # fmt: skip
_TEXT_KEYS = ("data.max_chars", "data.prompt_loss_weight", "precision")

STAGES = (
    Stage("device", device.run, {}, ("uploads", "transport.json"), (*_SPLIT_KEYS, *_TEXT_KEYS, "device"), ("types",)),
    Stage(
        "registry", registry.run, {"uploads": "uploads"}, ("registry.json", "rejected.json"),
        ("devices", "device.types", "federation"), ("types",),
    ),
    Stage("cluster", cluster.run, {"registry": "registry.json"}, ("clusters.json",), ("seed", "experts", "clustering")),
    Stage(
        "proxy", proxy.run,
        {"uploads": "uploads", "registry": "registry.json", "clusters": "clusters.json"}, ("proxies",),
        ("clustering.average",),
        ("types",),
    ),
    Stage(
        "distill", distill.run, {"proxies": "proxies"}, ("bases",),
        (*_SPLIT_KEYS, *_TEXT_KEYS, "data", "family", "experts", "distill", "merge.router"), ("base",),
    ),
    Stage(
        "merge", merge.run, {"bases": "bases"}, ("moe/merged", "moe/untaught"),
        ("seed", "family", "experts", "top_k", "merge", "distill.base"), ("base",),
    ),
    Stage(
        "tune", tune.run,
        {"merged": "moe/merged", "untaught": "moe/untaught", "bases": "bases", "proxies": "proxies"},
        ("moe/final", "moe/control"),
        ("seed", "experts", *_TEXT_KEYS, "distill.sampled_ce", "distill.sampled_share", "distill.handover", "tune"),
    ),
    Stage(
        "evaluate", evaluate.run,
        {"moe": "moe/final", "control": "moe/control", "uploads": "uploads", "registry": "registry.json",
         "clusters": "clusters.json", "proxies": "proxies", "bases": "bases"},
        ("evaluation.json",), (*_SPLIT_KEYS, "data.max_chars", "precision", "family", "distill.base", "evaluate"),
        ("types", "base"),
    ),
    Stage("report", report.run, {"evaluation": "evaluation.json"}, ("report",), ()),
)  # fmt: skip
NAMES = tuple(stage.name for stage in STAGES)
_DEVICES = "devices"  # where uploads come from, unless they were given
_REDONE = ("report",)  # cheap, and it shows the seconds of all others


def given(uploads: Path) -> Stage:
    """In place of the device stage: take these uploads or plain checkpoints, or all uploads of another run, late ones
    too.
    """
    folder, late = given_folders(Path(os.path.abspath(uploads)))
    inputs = {"given": str(folder), **({"late": str(late)} if late is not None else {})}
    keys = ("seed", "precision", "device.encoder", "device.embedding_size")
    return Stage("device", receive.run, inputs, STAGES[0].outputs, keys)


def run(
    config: Config,
    out: Path,
    *,
    instead: Sequence[Stage] = (),
    first: str | None = None,
    last: str | None = None,
) -> dict[str, Any]:
    """Run the pipeline in the folder `out`, or continue it there, or redo what a changed config touches.

    Args:
        instead: stages that take the place of those of the same name, such as `given(uploads)` of the device stage.
        first: redo this stage and what follows, even if nothing changed.
        last: stop after this stage.

    Returns:
        The manifest.

    Raises:
        InputError: whatever a user can mend.
    """
    started = time.time()
    replaced = {stage.name: stage for stage in instead}
    stages = [replaced.get(stage.name, stage) for stage in STAGES]
    for name in filter(None, (first, last)):
        if name not in NAMES:
            raise InputError(f"there is no stage {name}", allowed=", ".join(NAMES), code="unknown-stage")
    if first and last and NAMES.index(first) > NAMES.index(last):
        raise InputError(
            f"--from {first} comes after --until {last}", allowed=" -> ".join(NAMES), code="unknown-stage"
        )
    given_paths = [Path(path) for stage in instead for path in stage.inputs.values() if os.path.isabs(path)]
    shown, out = out, claim_run(out, [*local_inputs(config), *given_paths])
    asked, found = config, _given_models(stages[0])
    config, teachers, word = _prepared(asked, stages[0], found)
    _check_feasible(config, out)  # before anything is made: what is refused leaves nothing behind
    make(out)
    busy = InputError(
        "another process works in this run folder", where=out, fix="wait for it", code="run-busy"
    )
    with locked(out / LOCK, busy):
        manifest = _open_manifest(out, config)
        _refuse_another_federation(manifest, stages[0], config, out, first)
        _write_manifest(out, manifest)  # from here on the folder is ours
        save_config(config, out / "config.yaml")
        progress.attach(out)
        about = f"recipe {config.recipe}" + (f", {len(found.models)} models given" if found else "")
        progress.say(f"deepfusion {__version__}: {about}, run folder {shown}")
        plan = bases.describe(config, teachers, word)
        told = _say([f"if all are sound: {line}" for line in plan] if found else plan, ())
        redo = False
        for stage in stages:
            if stage.name == "cluster":
                config, teachers = bases.settled(asked, out, found)
                _check_feasible(config, out)
                save_config(config, out / "config.yaml")
                manifest["config_digest"] = config_digest(config)
                told = _say(bases.describe(config, teachers, word), told)
            redo = redo or stage.name == first
            key = _stage_key(stage, config, out)
            entry = manifest["stages"].get(stage.name, {})
            fresh = entry.get("status") == "done" and entry.get("key") == key and not redo
            if (
                fresh
                and stage.name not in _REDONE
                and all((out / path).exists() for path in entry["digests"])
            ):
                remove(out / ".work" / stage.name)  # of a run that was killed while it cleaned up
                progress.say(
                    f"[{stage.name}] unchanged, done in {progress.duration(entry['seconds'])} before"
                )
            else:
                _run_stage(stage, config, out, key, manifest, redo=stage.name == first)
            if stage.name == last:
                break
        jobs.close_pool()
        progress.say(f"all stages done in {progress.duration(time.time() - started)}")
    return manifest


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        InputError: `out` is no run folder.
    """
    path = out / "manifest.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError:
        fix = "deepfusion run --out RUN makes one"
        raise InputError("not a run folder (no manifest.json)", where=out, fix=fix, code="no-run") from None
    except ValueError as error:
        raise InputError(f"not valid JSON ({error})", where=path, code="no-run") from None
    if not is_run(out):
        raise InputError(
            "not the manifest of a run", where=path, fix="deepfusion run --out RUN makes one", code="no-run"
        )
    return found


def status(out: Path) -> dict[str, Any]:
    """What `deepfusion status --json` prints."""
    waiting = (out / "federation").is_dir() and not (out / "manifest.json").is_file()
    stages = {} if waiting else read_manifest(out)["stages"]
    keep = ("status", "seconds", "peak_rss_bytes")
    rows = [{"name": n, **{k: stages.get(n, {"status": "waiting"}).get(k) for k in keep}} for n in NAMES]
    return {"run": str(out), "stages": rows}


def _run_stage(
    stage: Stage, config: Config, out: Path, key: str, manifest: dict[str, Any], redo: bool
) -> None:
    work = out / ".work" / stage.name
    if open_work(work, key, anew=redo):
        progress.say(f"[{stage.name}] continues")
    before = manifest["stages"].get(stage.name, {})
    # What stands here is what we made: whatever is otherwise at its place was changed, and is nothing to remove.
    known: list[dict[str, str]] = [
        *before.get("known", []),
        *([before["digests"]] if before.get("digests") else []),
    ]
    entry: dict[str, Any] = {
        "status": "running",
        "key": key,
        "seconds": None,
        "peak_rss_bytes": None,
        "known": known,
    }
    entry["source"] = _source(stage)
    manifest["stages"][stage.name] = entry
    _write_manifest(out, manifest)
    inputs = {name: out / path for name, path in stage.inputs.items()}
    inputs |= {"run": out, "base": base_checkpoint(config)}
    finished = work / "finished.json"
    if not finished.is_file():
        spent = float((work / "seconds").read_text("utf-8")) if (work / "seconds").is_file() else 0.0
        try:
            with _Watch(work / "seconds", spent) as watch:
                (work / "out").mkdir(exist_ok=True)
                summary = stage.run(config, inputs, work / "out")
        except (InputError, OSError):
            entry["status"] = "failed"
            with suppress(OSError):  # a full disk is said by the error that comes
                _write_manifest(out, manifest)
            raise
        _sync(work / "out")
        # From here on a killed run only has to move the outputs.
        made = [path for path in stage.outputs if (work / "out" / path).exists()]
        digests = {path: _digest(work / "out" / path) for path in made}
        facts = {
            "digests": digests,
            "summary": summary,
            "seconds": watch.seconds,
            "peak_rss_bytes": watch.peak,
        }
        write_whole(finished, json.dumps(facts))
    found = json.loads(finished.read_text("utf-8"))
    known.append(found["digests"])  # a run that is killed among the lines below leaves some of these behind
    _write_manifest(out, manifest)
    for path in stage.outputs:
        if (work / "out" / path).exists() or path not in found[
            "digests"
        ]:  # what an earlier config made goes too
            _retire(out, path, work, known)
        if (work / "out" / path).exists():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            os.rename(work / "out" / path, out / path)
    del entry["known"]
    entry |= found | {"status": "done"}
    _write_manifest(out, manifest)
    remove(work)
    memory = f"{entry['peak_rss_bytes'] / 2**30:.1f} GiB"
    progress.say(f"[{stage.name}] done in {progress.duration(entry['seconds'])}, peak memory {memory}")


def _stage_key(stage: Stage, config: Config, out: Path) -> str:
    """Digest of everything that the result of a stage depends on."""
    parts = [stage.name, __version__, config_digest(config, *stage.keys) if stage.keys else ""]
    if stage.name != "device":  # whose sources are told apart by their inputs and keys
        parts.append(stage.run.__module__)
    parts += [f"{name}={_digest(out / path)}" for name, path in stage.inputs.items()]
    if "data.private" in stage.keys:
        parts += [f"{path}={sha256_file(path)}" for path in data_files(config)]
    if "types" in stage.checkpoints:
        parts += [f"{type}={digest}" for type in device_types(config) if (digest := local_digest(type))]
    if "base" in stage.checkpoints:
        parts.append(f"base={checkpoint_digest(base_checkpoint(config))}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _source(stage: Stage) -> str:
    """Where the stage takes its uploads from, for who looks at the manifest."""
    return stage.inputs.get("given", _DEVICES)


def _retire(out: Path, name: str, work: Path, known: list[dict[str, str]]) -> None:
    """Takes an earlier output out of the way: to be removed with the work folder where it is as we made it, else to
    be kept.
    """
    old = out / name
    if not os.path.lexists(old):
        return
    if not old.is_symlink() and (_digest(old) in [made.get(name) for made in known] or is_report(old)):
        aside = work / "old" / name
        aside.parent.mkdir(parents=True, exist_ok=True)
    else:
        number = next(n for n in count(1) if not os.path.lexists(old.with_name(f"{old.name}.kept-{n}")))
        aside = old.with_name(f"{old.name}.kept-{number}")
        progress.say(f"{old} was changed since it was made here: it is kept as {aside.name}")
    os.rename(old, aside)


def _digest(path: Path) -> str:
    """Digest of a file, or of the names and contents of a folder; model cards only tell about what is beside them."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _is_model_card(p))
    lines = "".join(f"{p.relative_to(path)} {sha256_file(p)}\n" for p in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _is_model_card(path: Path) -> bool:
    return path.name == "README.md" and (path.parent / "config.json").is_file()


def _open_manifest(out: Path, config: Config) -> dict[str, Any]:
    manifest = read_manifest(out) if (out / "manifest.json").is_file() else {"stages": {}}
    return (
        manifest
        | provenance()
        | {"seed": config.seed, "argv": sys.argv, "config_digest": config_digest(config)}
    )


def _refuse_another_federation(
    manifest: dict[str, Any], stage: Stage, config: Config, out: Path, first: str | None
) -> None:
    entry = manifest["stages"].get(stage.name)
    if entry is None or first == stage.name or entry["key"] == _stage_key(stage, config, out):
        return
    trained = entry.get("source", _DEVICES) == _DEVICES
    if not trained and "given" in stage.inputs:
        progress.say(f"[{stage.name}] the uploads are not those of the last run: they are taken again")
        return  # copies of what lies elsewhere: nothing can be lost
    if not any(
        card
        for work in (out, out / ".work" / stage.name / "out")
        for card in work.glob("uploads/*/card.json")
    ):
        return  # nothing was trained yet that could be lost
    if trained and "given" in stage.inputs:
        what = "the run folder holds uploads of devices of its own"
    elif trained:
        what = "the run folder belongs to devices that trained on other data, seeds, settings, checkpoints or versions"
    else:
        what = f"the run folder holds uploads that were taken from {entry['source']}"
    fix = f"choose another --out, or --from {stage.name} to throw its uploads away"
    raise InputError(what, where=out, fix=fix, code="another-run")


def _given_models(source: Stage) -> Survey | None:
    """The models that take the place of devices; None where devices train."""
    if source.run is not receive.run:
        return None
    return survey(
        Path(source.inputs["given"]), Path(source.inputs["late"]) if "late" in source.inputs else None
    )


def _prepared(asked: Config, source: Stage, found: Survey | None) -> tuple[Config, list[bases.Teacher], str]:
    """What is known before any work: the config with base and experts, the teachers, and what to call them."""
    if found is not None:
        teachers = bases.teachers_of_survey(found)
        return bases.with_base(bases.with_experts(asked, len(found.models), 1), teachers), teachers, "models"
    if "devices" not in source.keys:
        return asked, [], "uploads"  # they came from elsewhere, and the registry will tell
    teachers = bases.teachers_of_config(asked)
    return (
        bases.with_base(asked, teachers),
        teachers,
        "devices" if isinstance(asked.devices, list) else "types of devices",
    )


def _say(lines: Sequence[str], before: Sequence[str]) -> Sequence[str]:
    """Tells what was not told before."""
    for line in lines:
        if line not in before:
            progress.say(line)
    return lines


def _check_feasible(config: Config, out: Path) -> None:
    """Refuse a run that cannot end well, for its base or for lack of disk or memory, before any work is lost."""
    bases.check(config)
    base = read_config(base_checkpoint(config))
    moe = moe_config(base, bases.layout(config))
    weights = 4 * parameter_total(base)
    # K bases, a trunk, the merged MoE, its control and the tuned two, and the checkpoints of a training (weights, two
    # moments).
    disk = (config.experts + 1) * weights + 4 * config.experts * weights + 6 * config.experts * weights
    free = shutil.disk_usage(standing(out)).free
    if disk > free:
        what = f"the run needs about {disk / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free"
        raise InputError(what, where=out, code="too-little-disk")
    if torch.cuda.is_available():
        return
    tokens = config.data.max_chars // 3
    needed = estimate_training_bytes(base, "full", config.distill.batch_size, tokens)
    fix = "a smaller base, distill.batch_size or data.max_chars"
    require_memory(needed, "distilling one base", where="distill.base", fix=fix)
    if config.tune.steps and config.tune.train_experts:
        needed = estimate_training_bytes(moe, "full", config.tune.batch_size, tokens)
        fix = "fewer experts, a smaller distill.base, tune.batch_size or data.max_chars"
        require_memory(needed, "tuning the MoE", where="tune", fix=fix)


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


def _write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    write_whole(out / "manifest.json", json.dumps(manifest, indent=1))


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
