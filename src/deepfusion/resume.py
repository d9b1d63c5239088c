"""What a stage is, what its result depends on, and so what may be kept of an earlier run."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import yaml

from deepfusion import plugins, progress
from deepfusion.config import NAMED, known_keys, parse_config, rename_keys
from deepfusion.digests import Digests, checkpoint_digest, tree_digest
from deepfusion.errors import InputError
from deepfusion.families.bases import base_checkpoint
from deepfusion.folders import KEY, write_whole
from deepfusion.inputs import data_files, data_versions, device_types, private_sources, public_sources
from deepfusion.manifest import SCHEMA_VERSION, Key, Manifest
from deepfusion.models.presets import checkpoint_version, hub_name
from deepfusion.schema import Config, effective_handover
from deepfusion.sections import within

DEVICES = "devices"
"""Where uploads come from, unless they were given."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        run: `run(config, inputs, out) -> summary`; writes below `out` what `outputs` names.
        inputs: by name, what it reads of the run folder.
        outputs: what it adds to the run folder.
        keys: the config keys that its result depends on; a section stands for all in it.
        reads: what else it reads: `private` and test text, `public` text, the public checkpoints of devices
            (`types`) or of distillation (`base`).
        revision: raised when the same settings and inputs come to another result.
    """

    name: str
    run: Callable[[Config, dict[str, Path], Path], dict[str, Any]]
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    keys: tuple[str, ...]
    reads: tuple[Literal["private", "public", "types", "base"], ...] = ()
    revision: int = 1

    @property
    def source(self) -> str:
        """Where it takes its uploads from, for who looks at the manifest."""
        return self.inputs.get("given", DEVICES)


def stage_key(stage: Stage, config: Config, run: Path, digests: Digests) -> Key:
    """Everything that the result of a stage depends on.

    Args:
        run: the run folder.
    """
    inputs = {name: tree_digest(run / path, digests.sha256) for name, path in stage.inputs.items()}
    sources = private_sources(config) if "private" in stage.reads else []
    sources += public_sources(config) if "public" in stage.reads else []
    inputs |= {f"data {name}": found for name, found in data_versions(sources, digests.sha256).items()}
    if "types" in stage.reads:
        inputs |= {f"type {type}": checkpoint_version(type, digests.sha256) for type in device_types(config)}
    if "base" in stage.reads:
        base = config.distill.base or str(base_checkpoint(config))
        inputs["base"] = checkpoint_version(base, digests.sha256)
    settings = _settings(config, stage.keys)
    groups = {name: group for name, group in NAMED.items() if name in settings}
    inputs |= {name: plugins.version(plugins.load(group, settings[name])) for name, group in groups.items()}
    return Key(
        revision=stage.revision,
        function=plugins.qualified_name(stage.run),
        settings=settings,
        inputs=inputs,
    )


# What stages make of a value that adapts to others.
_EFFECTIVE: dict[str, Callable[[Config], Any]] = {"distill.handover": effective_handover}


def _settings(config: Config, keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of config keys and of all keys in sections; long ones as their digest."""
    found = {}
    for key in known_keys():
        if within(key, keys):
            value = attrgetter(key)(config)
            if key in _EFFECTIVE:
                value = _EFFECTIVE[key](config)
            if key == "devices" and isinstance(
                value, list
            ):  # a key that devices get later is no change of them
                value = [device.model_dump(mode="json", exclude_none=True) for device in value]
            long = len(repr(value)) > 200
            found[key] = f"sha256 {hashlib.sha256(repr(value).encode()).hexdigest()}" if long else value
    return found


def refuse_another_federation(
    manifest: Manifest, stage: Stage, run: Path, key: Key, first: str | None
) -> None:
    """Keep uploads that took devices hours from being thrown away for a slip of the hand.

    Args:
        stage: the one that brings the uploads; key: what is asked of it.
        first: the stage that the user wants redone.

    Raises:
        InputError: the run folder holds uploads that are not those asked for (`another-run`).
    """
    entry = manifest.stages.get(stage.name)
    if entry is None or first == stage.name:
        return
    lost = [name for name in entry.digests if not (run / name).exists()]
    if lost and entry.source == DEVICES and any(run.glob("uploads/*/card.json")):
        what, fix = (
            f"{', '.join(lost)} is missing beside the uploads",
            f"bring it back, or --from {stage.name}",
        )
        raise InputError(what, where=run, fix=f"{fix} to train the devices again", code="another-run")
    if not (differences := entry.differences(key)):
        return
    trained, given = entry.source == DEVICES, "given" in stage.inputs
    if not trained and given:
        progress.say(f"[{stage.name}] the uploads are not those of the last run: they are taken again")
        return  # copies of what lies elsewhere: nothing can be lost
    places = (run, run / ".work" / stage.name / "out")
    if not any(card for place in places for card in place.glob("uploads/*/card.json")):
        return  # nothing was trained yet that could be lost
    if trained and given:
        what = "the run folder holds uploads of devices of its own"
    elif trained:
        what = f"the devices of the run folder trained otherwise than is asked now: {'; '.join(differences)}"
    else:
        what = f"the run folder holds uploads that were taken from {entry.source}"
    fix = f"choose another --out, or --from {stage.name} to throw its uploads away"
    raise InputError(what, where=run, fix=fix, code="another-run")


# Run folders of release 0.1.0 ----------------------------------------------------------------------------------------

_SPLIT = (
    "seed", "devices",
    *(f"data.{key}" for key in ("private", "public", "public_fraction", "test", "limit", "partition")),
)  # fmt: skip
_TEXT = ("data.max_chars", "data.prompt_loss_weight", "precision")
_HANDED_ON = ("distill.sampled_ce", "distill.sampled_share", "distill.handover")
_KEYS_0: dict[str, tuple[str, ...]] = {
    "device": (*_SPLIT, *_TEXT, "device"),
    "given": ("seed", "precision", "device.encoder", "device.embedding_size"),
    "registry": ("devices", "device.types", "federation"),
    "cluster": ("seed", "experts", "clustering"),
    "proxy": ("clustering.average",),
    "distill": (*_SPLIT, *_TEXT, "data", "family", "experts", "distill", "merge.router"),
    "merge": ("seed", "family", "experts", "top_k", "merge", "distill.base"),
    "tune": ("seed", "experts", *_TEXT, *_HANDED_ON, "tune"),
    "evaluate": (*_SPLIT, "data.max_chars", "precision", "family", "distill.base", "evaluate"),
}


def take_over(manifest: Manifest, stages: Iterable[Stage], run: Path, digests: Digests) -> None:
    """Give what release 0.1.0 left in a run folder, its manifest without a schema, keys of today.

    That is done once, and only where its key still follows from the config in the folder and from what lies there.
    """
    if manifest.schema_version == SCHEMA_VERSION:
        return
    manifest.schema_version = SCHEMA_VERSION
    try:
        values = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
        renamed = copy.deepcopy(values)
        rename_keys(renamed, where=run / "config.yaml")
        config = parse_config(renamed)
        old_keys = {
            stage.name: _key_0(stage, values, config, manifest.version, run, digests) for stage in stages
        }
        new_keys = {stage.name: stage_key(stage, config, run, digests) for stage in stages}
    except (OSError, ValueError, yaml.YAMLError, InputError, KeyError, TypeError, AttributeError):
        return  # what cannot be read again has to be made again
    for name, entry in manifest.stages.items():
        if entry.key and entry.key == old_keys.get(name):
            entry.key = new_keys[name]
            work = run / ".work" / name / KEY
            if work.is_file() and work.read_text("utf-8") == old_keys[name]:
                write_whole(work, entry.key.digest)


def _key_0(
    stage: Stage, values: dict[str, Any], config: Config, version: str, run: Path, digests: Digests
) -> str:
    """The key of a stage as release 0.1.0 made it; `values` are those of its config.yaml."""

    def value(key: str) -> Any:
        return functools.reduce(lambda section, part: section[part], key.split("."), values)

    trains = stage.name != "device" or "private" in stage.reads
    keys = _KEYS_0.get(stage.name if trains else "given" if "given" in stage.inputs else "", ())
    chosen = json.dumps({key: value(key) for key in keys}, sort_keys=True)
    parts = [stage.name, version, hashlib.sha256(chosen.encode()).hexdigest() if keys else ""]
    if stage.name != "device":
        parts.append(stage.run.__module__.replace("deepfusion_bench.", "deepfusion."))
    parts += [f"{name}={tree_digest(run / path, digests.sha256)}" for name, path in stage.inputs.items()]
    if "data.private" in keys:
        parts += [f"{path}={digests.sha256(path)}" for path in data_files(config)]
    if stage.name in ("device", "registry", "proxy", "evaluate") and trains:
        types = [type for type in device_types(config) if not hub_name(type)]
        parts += [f"{type}={found}" for type in types if (found := checkpoint_version(type, digests.sha256))]
    if stage.name in ("distill", "merge", "evaluate"):
        base = base_checkpoint(config)
        parts.append(f"base={checkpoint_digest(base, digests.sha256)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
