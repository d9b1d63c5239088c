"""The methods of the tables: ours, the paper's baselines, controls and the upper bound, each as it differs from the
product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from deepfusion import pipeline, progress
from deepfusion.families.bases import base_checkpoint
from deepfusion.families.deepseek import DEEPSEEK
from deepfusion.folders import whole_folder
from deepfusion.models.checkpoints import numbered
from deepfusion.pipeline import Stage
from deepfusion.schema import Config
from deepfusion.stages import merge
from deepfusion.uploads.card import read_card
from deepfusion_bench.baselines import centralized, fedjets, fedkmt, homogeneous, ofakd

Role = Literal["ours", "baseline", "control", "bound", "reference"]


@dataclass(frozen=True)
class Task:
    """What a method starts from.

    Attributes:
        config: the config of the cell with more overrides.
        uploads: run folder with the devices' uploads.
        out: where to work; a killed method continues there.
    """

    config: Callable[..., Config]
    uploads: Path
    out: Path


@dataclass(frozen=True)
class Made:
    """What a method leaves.

    Attributes:
        config: the settings it used.
        models: checkpoints to measure, by name.
        pick: where there are several, `best` on validation text stands for the method, or the `mean` of all.
        transport: total bytes up and down, where the method has devices of its own, whose work is logged in `Task.out`.
        facts: whatever else is worth keeping.
    """

    config: Config
    models: dict[str, Path]
    pick: Literal["best", "mean"] = "best"
    transport: dict[str, int] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A row of the tables; `alone`: it uses no uploads, so no device is trained for it."""

    title: str
    role: Role
    run: Callable[[Task], Made]
    alone: bool = False


def _pipeline(*overrides: str, instead: tuple[Stage, ...] = ()) -> Callable[[Task], Made]:
    """The product's own pipeline on the uploads, with other settings or another stage."""

    def run(task: Task) -> Made:
        config = task.config("tune.control=false", *overrides)
        pipeline.run(config, task.out, instead=[pipeline.given(task.uploads), *instead], last="tune")
        return Made(config, {"moe": task.out / "moe" / "final"})

    return run


def _in_place_of(name: str, run: Callable[..., dict[str, Any]]) -> Stage:
    stage = next(stage for stage in pipeline.STAGES if stage.name == name)
    return replace(stage, run=run)


# Cross-entropy on public text alone, for as many steps of trunk and MoE as `fused` makes with teachers.
_PUBLIC_ONLY = (
    "recipe=fused", "distill.alpha=0", "distill.beta=0", "distill.chunk_weight=0", "tune.teachers=false",
    "data.public=[in_domain]",
)  # fmt: skip


# At most, and no more than `device.epochs` passes. The tables take the best of this and the ablation group
# `centralized`.
_CONVERGED = ("tune.steps=2400", "tune.batch_size=8")


def _base(task: Task) -> Made:
    config = task.config()
    return Made(config, {"base": base_checkpoint(config)})


def _public(task: Task) -> Made:
    """Also for a quarter and a sixteenth of the steps: on little text more of them only overfit."""
    config = task.config(*_PUBLIC_ONLY)
    found = {}
    for part in (1, 4, 16):
        steps = f"distill.steps={config.distill.steps // part}", f"tune.steps={config.tune.steps // part}"
        made = _pipeline(*_PUBLIC_ONLY, *steps)(replace(task, out=task.out / f"part-{part}"))
        found[f"1/{part} of the steps"] = made.models["moe"]
    return Made(config, found)


def _proxies(task: Task) -> Made:
    config = task.config("recipe=fused")
    pipeline.run(config, task.out, instead=[pipeline.given(task.uploads)], last="proxy")
    return Made(config, _proxy_models(task), pick="mean")


def _average(task: Task) -> Made:
    """One model per type: the mean of all its devices, by tokens."""
    types = {read_card(folder).signature for folder in _upload_folders(task)}
    config = task.config("recipe=fused", f"experts={len(types)}", f"top_k={min(2, len(types))}")
    pipeline.run(config, task.out, instead=[pipeline.given(task.uploads)], last="proxy")
    return Made(config, _proxy_models(task))


def _homogeneous(task: Task) -> Made:
    """An MoE of the Llama-class devices alone, nothing trained: what mergekit-moe makes of them."""
    chosen = task.out / "llama"
    chosen.mkdir(parents=True, exist_ok=True)
    folders = [folder for folder in _upload_folders(task) if read_card(folder).type == "tiny-llama"]
    for folder in folders:
        link = chosen / folder.name
        if not link.exists():
            link.symlink_to(folder)
    experts = min(task.config().experts, len(folders))
    config = task.config(
        "recipe=fused", f"family={DEEPSEEK.name}", "distill.base=tiny-llama",
        f"experts={experts}", f"top_k={min(2, experts)}",
        "merge.split=1", "merge.shared_expert=none", "merge.dense_layers=[]", "merge.router=prototype",
        "tune.steps=0", "tune.teachers=false", "tune.control=false",
    )  # fmt: skip
    stage = _in_place_of("distill", homogeneous.run)
    pipeline.run(config, task.out / "run", instead=[pipeline.given(chosen), stage], last="tune")
    return Made(config, {"moe": task.out / "run" / "moe" / "final"})


def _centralized(task: Task) -> Made:
    config = task.config("recipe=fused", "tune.teachers=false", *_CONVERGED)
    progress.attach(task.out)
    facts = centralized.run(config, {"start": _untaught(config, task.out)}, task.out)
    return Made(config, {"moe": task.out / "moe" / "final"}, facts=facts)


def _fedjets(public_first: bool) -> Callable[[Task], Made]:
    def run(task: Task) -> Made:
        config = task.config()
        start = _untaught(config, task.out)
        if public_first:
            start = _pipeline(*_PUBLIC_ONLY)(replace(task, out=task.out / "public")).models["moe"]
        progress.attach(task.out)
        settings = fedjets.FedJETS(learning_rate=config.device.learning_rate)
        found = fedjets.run(config, {"start": start}, task.out, settings)
        totals = {key: found[key] for key in ("total_up_bytes", "total_down_bytes")}
        facts = {"rounds": found["rounds"], "losses": found["losses"]}
        return Made(config, {"moe": task.out / "moe" / "final"}, transport=totals, facts=facts)

    return run


def _untaught(config: Config, out: Path) -> Path:
    """The MoE of untouched bases that whoever trains an MoE directly starts from."""
    folder = out / "untaught"
    if not (folder / "config.json").is_file():
        base = base_checkpoint(config)
        with whole_folder(folder) as part:
            merge.write_moe(config, [base] * config.experts, False, part)
    return folder


def _proxy_models(task: Task) -> dict[str, Path]:
    return {folder.name: folder for folder in numbered(task.out / "proxies")}


def _upload_folders(task: Task) -> list[Path]:
    return sorted(card.parent for card in (task.uploads / "uploads").glob("*/card.json"))


METHODS: dict[str, Method] = {
    "fused": Method("DeepFusion, recipe fused", "ours", _pipeline("recipe=fused")),
    "paper": Method("DeepFusion, recipe paper", "ours", _pipeline("recipe=paper")),
    "fedjets": Method("FedJETS", "baseline", _fedjets(public_first=False), alone=True),
    "fedkmt": Method(
        "FedKMT", "baseline", _pipeline("recipe=paper", instead=(_in_place_of("distill", fedkmt.run),))
    ),
    "ofakd": Method(
        "OFA-KD", "baseline", _pipeline("recipe=paper", instead=(_in_place_of("distill", ofakd.run),))
    ),
    "base": Method("public base, untouched", "control", _base, alone=True),
    "public": Method("public text alone, best number of steps", "control", _public),
    "fedjets-public": Method("FedJETS after public text", "control", _fedjets(public_first=True)),
    "average": Method("mean of the devices of a type, best type", "control", _average),
    "homogeneous": Method("MoE of the Llama-class devices (as mergekit-moe)", "control", _homogeneous),
    "proxies": Method("proxies, mean", "reference", _proxies),
    "centralized": Method(
        "centralized, all private text, best number of steps", "bound", _centralized, alone=True
    ),
}
