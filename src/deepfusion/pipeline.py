"""The stages in order: `run` does them one after another, and leaves alone what has not changed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepfusion import __version__, jobs, progress
from deepfusion.errors import InputError
from deepfusion.folders import LOCK, claim_run, is_locked
from deepfusion.inputs import local_inputs, private_sources, public_sources
from deepfusion.manifest import MANIFEST, Manifest, StageEntry
from deepfusion.plan import Plan
from deepfusion.resume import Stage, refuse_another_federation, take_over
from deepfusion.runfolder import opened
from deepfusion.schema import Config
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
from deepfusion.text.sources import require_sources
from deepfusion.uploads.intake import given_folders

_SPLIT_KEYS = (
    "seed", "devices",
    *(f"data.{key}" for key in ("private", "public", "public_fraction", "test", "limit", "partition")),
)  # fmt: skip
_TEXT_KEYS = ("data.max_chars", "data.prompt_loss_weight", "precision")

STAGES = (
    Stage(
        "device", device.run, {}, ("uploads", "transport.json"), (*_SPLIT_KEYS, *_TEXT_KEYS, "device"),
        ("private", "types"), device.REVISION,
    ),
    Stage(
        "registry", registry.run, {"uploads": "uploads"}, ("registry.json", "rejected.json"),
        ("devices", "device.types", "federation.max_upload_bytes"), ("types",),
    ),
    Stage(
        "cluster", cluster.run, {"registry": "registry.json"}, ("clusters.json",),
        ("seed", "experts", *(f"clustering.{key}" for key in ("assignment", "restarts", "proxies"))),
    ),
    Stage(
        "proxy", proxy.run,
        {"uploads": "uploads", "registry": "registry.json", "clusters": "clusters.json"}, ("proxies",),
        ("clustering.average",),
        ("types",),
    ),
    Stage(
        "distill", distill.run, {"proxies": "proxies"}, ("bases",),
        (*_SPLIT_KEYS, *_TEXT_KEYS, "data", "family", "experts", "distill", "merge.router"),
        ("private", "public", "base"),
    ),
    Stage(
        "merge", merge.run, {"bases": "bases"}, ("moe/merged", "moe/untaught"),
        ("seed", "family", "experts", "top_k", "merge", "tune.control"), ("base",),
    ),
    Stage(
        "tune", tune.run,
        {"merged": "moe/merged", "untaught": "moe/untaught", "bases": "bases", "proxies": "proxies"},
        ("moe/final", "moe/control"),
        ("seed", "experts", "data.prompt_loss_weight", "precision",
         *(f"distill.{key}" for key in ("sampled_ce", "sampled_share", "handover")), "tune"),
    ),
    Stage(
        "evaluate", evaluate.run,
        {"moe": "moe/final", "control": "moe/control", "uploads": "uploads", "registry": "registry.json",
         "clusters": "clusters.json", "proxies": "proxies", "bases": "bases"},
        ("evaluation.json",), (*_SPLIT_KEYS, "data.max_chars", "precision", "evaluate"),
        ("private", "types", "base"),
    ),
    Stage("report", report.run, {"evaluation": "evaluation.json"}, ("report",), ()),
)  # fmt: skip
NAMES = tuple(stage.name for stage in STAGES)


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
) -> Manifest:
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
    _check_bounds(first, last)
    replaced = {stage.name: stage for stage in instead}
    stages = [replaced.get(stage.name, stage) for stage in STAGES]
    given_paths = [Path(path) for stage in instead for path in stage.inputs.values() if os.path.isabs(path)]
    if "private" in stages[0].reads:
        require_sources([*private_sources(config), *public_sources(config)])
    shown, out = out, claim_run(out, [*local_inputs(config), *given_paths])
    plan = Plan(config, stages[0])
    with opened(out) as folder:
        take_over(folder.manifest, stages, out, folder.digests)
        refuse_another_federation(folder.manifest, stages[0], out, folder.key(stages[0], plan.config), first)
        plan.check(out)
        folder.begin(plan.config)
        progress.attach(out)
        progress.say(f"deepfusion {__version__}: recipe {config.recipe}, {plan.about}, run folder {shown}")
        plan.say()
        redo = False
        for stage in stages:
            if stage.name == "cluster":
                plan.settle(out)
                plan.check(out)
                folder.begin(plan.config)
                plan.say()
            redo = redo or stage.name == first
            folder.do(stage, plan.config, redo=redo, anew=stage.name == first)
            if stage.name == last:
                break
        jobs.close_pool()
        folder.leave(stages[NAMES.index(last) + 1 :] if last else [], plan.config)
        what = "all stages" if last in (None, NAMES[-1]) else f"the stages up to {last}"
        progress.say(f"{what} done in {progress.duration(time.time() - started)}")
    return folder.manifest


def status(out: Path) -> dict[str, Any]:
    """What `deepfusion status --json` prints: waiting, running, interrupted, failed, done, or outdated since a stage
    before was made anew.
    """
    waiting = (out / "federation").is_dir() and not (out / MANIFEST).is_file()
    stages = {} if waiting else Manifest.read(out).stages
    keep = {"status", "seconds", "peak_rss_bytes"}
    rows = [{"name": name, **stages.get(name, StageEntry()).model_dump(include=keep)} for name in NAMES]
    for row in rows:
        if row["status"] == "running" and not ((out / LOCK).is_file() and is_locked(out / LOCK)):
            row["status"] = "interrupted"
    return {"run": str(out), "stages": rows}


def _check_bounds(first: str | None, last: str | None) -> None:
    for name in filter(None, (first, last)):
        if name not in NAMES:
            raise InputError(f"there is no stage {name}", allowed=", ".join(NAMES), code="unknown-stage")
    if first and last and NAMES.index(first) > NAMES.index(last):
        raise InputError(
            f"--from {first} comes after --until {last}", allowed=" -> ".join(NAMES), code="unknown-stage"
        )
