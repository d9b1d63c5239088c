"""What a stage reads of the config is what its key holds: a missing key would be a wrong "unchanged"."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import overlay, run_settings
from deepfusion import pipeline
from deepfusion.config import known_keys
from deepfusion.resume import Stage
from deepfusion.schema import Config
from deepfusion.sections import Section

# Read by a stage that does not declare it, and why its result does not depend on it.
NO_RESULT = {
    "jobs": "how many trainings run side by side",
    "checkpoint_seconds": "how often a training is stored",
    "evaluate.batch_size": "how many texts are scored at once",
}
OF_THE_TEXT = {
    "data.generic": "public text is loaded with the rest, and not used here",
    "data.generic_documents": "public text is loaded with the rest, and not used here",
    "device.types": "types are dealt to devices with the text, which does not depend on them",
}
OF_THE_CARD = {
    key: "stands on the model card alone, which the report stage writes again"
    for key in ("recipe", "family", "top_k", "distill.base", "data.public")
} | {"distill.steps": "on the card, and in the effective distill.handover"}
UNDECLARED = {
    "device": {
        **OF_THE_TEXT,
        "experts": "refuses too few devices before they train",
        "clustering.proxies": "refuses too few devices before they train",
    },
    "distill": {
        **OF_THE_TEXT,
        "tune.steps": "whether there are any, which the effective distill.handover says",
    },
    "evaluate": OF_THE_TEXT,
    "tune": OF_THE_CARD,
}
# Declared by a stage that this test does not see reading it, and where it is read.
UNSEEN = {
    "device": {"device.types": "only where devices is a number"},
    "distill": {
        f"distill.vaa.{key}": "handed to the module as one dict"
        for key in ("mode", "width", "heads", "causal", "normalize")
    },
}


def sections(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[type[Section], str]]:
    yield section, prefix
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation, f"{prefix}{name}.")


PREFIXES = dict(sections())


def recording(stage: Stage, reads: dict[str, set[str]]) -> Stage:
    """The same stage, which notes the config keys that it reads."""
    found = reads.setdefault(stage.name, set())

    def noting(self: Section, name: str) -> Any:
        value = object.__getattribute__(self, name)
        prefix = PREFIXES.get(type(self))
        if prefix is not None and f"{prefix}{name}" in KEYS:
            found.add(f"{prefix}{name}")
        return value

    @functools.wraps(stage.run)
    def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Section, "__getattribute__", noting)
            return stage.run(config, inputs, out)

    return replace(stage, run=run)


KEYS = set(known_keys())


def declared(stage: Stage) -> set[str]:
    return {key for key in KEYS if any(key == one or key.startswith(f"{one}.") for one in stage.keys)}


def reads_of(values: dict[str, Any], out: Path, stages: list[Stage]) -> dict[str, set[str]]:
    """The config keys that each stage of a run reads; the report tells what happened, whatever was configured."""
    reads: dict[str, set[str]] = {}
    run_settings(values, out, instead=[recording(stage, reads) for stage in stages if stage.name != "report"])
    return reads


def check_declared(stages: list[Stage], reads: dict[str, set[str]]) -> None:
    for stage in stages:
        allowed = declared(stage) | NO_RESULT.keys() | UNDECLARED.get(stage.name, {}).keys()
        assert reads.get(stage.name, set()) <= allowed, stage.name


@pytest.fixture
def everything(settings) -> dict[str, Any]:
    """LoRA, a trunk, samples and generic text, prototypes, teachers of the MoE."""
    lora = settings["devices"][0] | {"method": "lora"}
    generic = settings["devices"][2]["data"]
    return overlay(
        settings,
        devices=[lora, *settings["devices"][1:]],
        data={"public": ["in_domain", "generic", "sampled"], "generic": [generic], "generic_documents": 4},
        distill={"trunk_share": 0.5, "alpha": 0.1},
        merge={"router": "prototype"},
        tune={"teachers": True},
    )


def test_a_stage_reads_the_keys_that_it_declares_and_no_others(everything, tmp_path):
    reads = reads_of(everything, tmp_path / "run", list(pipeline.STAGES))
    check_declared(list(pipeline.STAGES), reads)
    for stage in pipeline.STAGES:
        if stage.name != "report":
            assert declared(stage) - reads[stage.name] == set(UNSEEN.get(stage.name, {})), stage.name


@pytest.mark.slow
def test_devices_by_number_and_recipe_paper_read_no_others(settings, tmp_path):
    sources = sorted({device["data"] for device in settings["devices"]})
    values = overlay(
        settings,
        recipe="paper",
        devices=4,
        data={"private": sources},
        device={"types": [settings["devices"][0]["type"]], "upload": "delta8"},
        clustering={"assignment": "random"},
        merge={"split": 2},
    )
    check_declared(list(pipeline.STAGES), reads_of(values, tmp_path / "run", list(pipeline.STAGES)))


@pytest.mark.slow
def test_given_checkpoints_read_no_others(settings, zoo, tmp_path):
    (tmp_path / "models").mkdir()
    for name in ("mini-gpt2", "mini-llama"):
        (tmp_path / "models" / name).symlink_to(zoo[name])
    values = {key: value for key, value in settings.items() if key != "devices"}
    values = overlay(values, data={"public": ["sampled"]})
    stages = [pipeline.given(tmp_path / "models"), *pipeline.STAGES[1:]]
    check_declared(stages, reads_of(values, tmp_path / "run", stages))
