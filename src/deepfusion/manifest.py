"""The manifest of a run folder: what was run, with what and on what; of each stage how it went and what it depends on.

Needs no model framework.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from deepfusion.config import current_name, explain
from deepfusion.errors import InputError
from deepfusion.folders import is_run, write_whole

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
UNKNOWN = ""
"""Version of an input that could not be known, such as a model of the hub that was not in the cache yet."""


class Key(BaseModel):
    """Everything that the result of a stage depends on: equal keys, equal results.

    Attributes:
        revision: of the stage, raised when the same settings and inputs come to another result.
        function: qualified name of what runs.
        settings: by dotted config key, the values that the stage reads; long ones stand as their digest.
        inputs: by name, digests or versions of what the stage reads; `UNKNOWN` where there was no telling.
    """

    model_config = ConfigDict(frozen=True)

    revision: int
    function: str
    settings: dict[str, JsonValue]
    inputs: dict[str, str]

    @property
    def digest(self) -> str:
        """64 hex digits."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def differences(self, asked: Key) -> list[str]:
        """What is asked otherwise than it was here, in words; none where the result still holds.

        A config key that came later had its default before. What could not be known is not compared.
        """
        found = []
        if self.revision != asked.revision:
            found.append(f"revision {asked.revision} of the stage (it was {self.revision})")
        if self.function != asked.function:
            found.append(f"another method: {asked.function} (it was {self.function})")
        known = {key: default for key, _, default, _ in explain()}
        known |= {current_name(key): value for key, value in self.settings.items()}
        settings = {
            key: _change(known.get(key), value)
            for key, value in asked.settings.items()
            if known.get(key) != value
        }
        if "seed" in settings:
            found.append(f"another seed{settings.pop('seed')}")
        if settings:
            found.append("settings " + ", ".join(f"{key}{change}" for key, change in settings.items()))
        return [*found, *_other_inputs(self.inputs, asked.inputs)]

    def completed(self, now: Key) -> Key:
        """With what could not be known when this key was made and can be now."""
        known = {name: value or now.inputs.get(name, UNKNOWN) for name, value in self.inputs.items()}
        return self.model_copy(update={"inputs": known})


def _change(before: JsonValue, now: JsonValue) -> str:
    """Two values for people, where both are short."""
    old, new = json.dumps(before, ensure_ascii=False), json.dumps(now, ensure_ascii=False)
    return f" {new} (it was {old})" if max(len(old), len(new)) <= 60 else ""


def _other_inputs(before: Mapping[str, str], asked: Mapping[str, str]) -> list[str]:
    """Names are `data SOURCE`, `type NAME`, `base`, or what a stage calls a part of the run folder."""
    names = [
        name
        for name in sorted(before.keys() | asked.keys())
        if name not in before
        or name not in asked
        or (before[name] != asked[name] and UNKNOWN not in (before[name], asked[name]))
    ]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind, _, which = name.partition(" ")
        kinds.setdefault(kind if which else "", []).append(which or kind)
    words = {"type": "checkpoints ", "data": "data ", "": ""}
    return [f"other {words[kind]}{', '.join(which)}" for kind, which in kinds.items()]


class Outcome(BaseModel):
    """What a stage leaves when it is done.

    Attributes:
        digests: of each output, by its place in the run folder.
        summary: what the stage says of its result.
        seconds: of work, those before a kill too.
        peak_rss_bytes: of the process and its workers together.
    """

    digests: dict[str, str] = {}
    summary: dict[str, JsonValue] | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None


class StageEntry(Outcome):
    """How a stage went.

    Attributes:
        status: outdated where a stage before it was made anew since and this one was not.
        key: what its result depends on; the digest of it where a version before schema 1 made it.
        source: where the stage takes its uploads from, `devices` where they train.
        known: while it runs, digests of what may stand at the place of its outputs and is ours.
    """

    status: Literal["waiting", "running", "failed", "done", "outdated"] = "waiting"
    key: Key | str = ""
    source: str = "devices"
    known: list[dict[str, str]] = []

    def differences(self, asked: Key) -> list[str]:
        """As `Key.differences`."""
        if isinstance(self.key, Key):
            return self.key.differences(asked)
        return ["other data, seeds, settings or checkpoints than those in its config.yaml"]


class Manifest(BaseModel):
    """The file manifest.json of a run folder.

    Attributes:
        schema_version: of the file, `SCHEMA_VERSION`; 0 where release 0.1.0 wrote it.
        version: of the program that wrote it last; git: its revision, if it ran from a clone.
        stages: by name, in order.
    """

    schema_version: int = Field(SCHEMA_VERSION, ge=0)
    version: str = ""
    git: str | None = None
    packages: dict[str, str] = {}
    python: str = ""
    hardware: dict[str, JsonValue] = {}
    seed: int | None = None
    argv: list[str] = []
    config_digest: str = ""
    stages: dict[str, StageEntry] = {}

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a run folder.

        Raises:
            InputError: `folder` is no run folder, or its manifest is damaged or of a later version (`no-run`).
        """
        path, fix = folder / MANIFEST, "deepfusion run --out RUN makes one"
        try:
            values = json.loads(path.read_bytes())
            if not is_run(folder):
                raise InputError("not the manifest of a run", where=path, fix=fix, code="no-run")
            found = cls.model_validate({"schema_version": 0, **values})
        except OSError:
            what = f"not a run folder (no {MANIFEST})"
            raise InputError(what, where=folder, fix=fix, code="no-run") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part)[:60] for part in first["loc"])
            raise InputError(f"{place}: {first['msg'][:200]}", where=path, code="no-run") from None
        except ValueError as error:
            raise InputError(f"not valid JSON ({error})", where=path, code="no-run") from None
        if found.schema_version > SCHEMA_VERSION:
            what = f"written by a later version of DeepFusion, {found.version}"
            raise InputError(what, where=path, fix="upgrade this one", code="no-run")
        return found

    def write(self, folder: Path) -> None:
        """Write it to a run folder, the old one or the new one whenever the process is killed."""
        write_whole(folder / MANIFEST, json.dumps(self.model_dump(), indent=1))
