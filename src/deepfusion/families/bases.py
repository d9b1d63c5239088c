"""What a run distils into: the dense base, chosen where nobody named one, against the models that teach it; and its
experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from deepfusion.errors import InputError
from deepfusion.families import base as families
from deepfusion.families.base import MoELayout, check_base, moe_config, parameter_count
from deepfusion.models import formats
from deepfusion.models.architecture import parameter_total, read_config
from deepfusion.models.checkpoints import TensorReader
from deepfusion.models.presets import PRESETS, is_hub_name, model_config, require_plain, resolve
from deepfusion.records import Registry, Rejected
from deepfusion.schema import Config, cluster_count, effective_proxies
from deepfusion.uploads.intake import Survey

MOST_EXPERTS = 8
"""Where nobody says how many experts: one per model, up to so many."""


@dataclass(frozen=True)
class Teacher:
    """A model that will teach, or a type that devices will train.

    Attributes:
        name: of the model or type.
        type: models of one type are shown together.
        config: its architecture.
        weights: how many it has.
        folder: where it can be read as a base; None where it is no candidate.
    """

    name: str
    type: str
    config: PretrainedConfig
    weights: int
    folder: Path | None = None


def layout(config: Config) -> MoELayout:
    """How the MoE of a run is built.

    Raises:
        InputError: the numbers do not fit each other or the family.
    """
    return MoELayout(
        family=config.family,
        experts=config.experts,
        top_k=config.top_k,
        split=config.merge.split,
        shared=config.merge.shared_expert,
        dense_layers=tuple(sorted(set(config.merge.dense_layers))),
    )


def base_checkpoint(config: Config) -> Path:
    """Folder of the public dense base that distillation starts from; by default the tiny base of the family.

    Raises:
        InputError: there is none, or it is not stored as plain weights of its class.
    """
    name = config.distill.base or families.get(config.family).tiny_base
    if name is None:
        fix = "--set distill.base=FOLDER_OR_HUB_NAME"
        what = f"no base comes with the package for {config.family}"
        raise InputError(what, where="distill.base", fix=fix, code="no-base")
    folder = Path(resolve(name))
    require_plain(folder, named_whole=True)
    return folder


def teachers_of_config(config: Config) -> list[Teacher]:
    """The types that the devices of a config train; none where a type is on no disk and no hub answers."""
    specified = (
        [device.type for device in config.devices]
        if isinstance(config.devices, list)
        else config.device.types
    )
    found = {}
    for type in dict.fromkeys(specified):
        if (known := _known(type)) is not None:
            name = Path(type).name if Path(type).exists() else type
            found[type] = Teacher(name, name, known, parameter_total(known))
    return [found[type] for type in specified if type in found]


def teachers_of_survey(found: Survey) -> list[Teacher]:
    """What is known of given models before any is read: the plain checkpoints and adapters, which are the user's
    own."""
    teachers = []
    for model in found.models:
        folder = model.base or model.folder
        if model.kind == "upload":
            continue
        try:
            config = read_config(folder)
            formats.check_form(folder, config)
            teachers.append(Teacher(model.id, config.model_type, config, parameter_total(config), folder))
        except InputError:
            continue  # it will be set aside with its reason when its turn comes
    return teachers


def settled(asked: Config, run: Path, found: Survey | None) -> tuple[Config, list[Teacher]]:
    """What is only known after the registry of a run has checked every model: its teachers, and the config made for
    them.

    Args:
        asked: the config as the user gave it.
        found: the models that were given; None where devices have trained.

    Raises:
        InputError: too few sound models, or a base that is too small for them.
    """
    entries = Registry.read(run / "registry.json").root
    aside = Rejected.read(run / "rejected.json").root
    own = {model.id for model in found.models if model.kind != "upload"} if found is not None else set()
    kinds: dict[str, tuple[PretrainedConfig, int]] = {}
    teachers = []
    for entry in entries:
        folder = run / "uploads" / entry.device
        if entry.signature not in kinds:
            known = read_config(folder)
            kinds[entry.signature] = known, parameter_total(known)
        place = folder if entry.device in own else None
        teachers.append(Teacher(entry.device, entry.type, *kinds[entry.signature], place))
    named = found is None or "experts" in asked.model_fields_set
    if named and len(entries) < asked.experts and aside:
        reasons = "; ".join(
            f"{name}: {problems[0].message} [{problems[0].code}]" for name, problems in aside.items()
        )
        raise InputError(
            f"{len(entries)} sound models are fewer than experts={asked.experts}; set aside: "
            f"{reasons[:2000]}", where="experts",
            fix=f"mend those, or --set experts={len(entries)}", code="fewer-devices-than-experts",
        )  # fmt: skip
    config = asked if found is None else with_experts(asked, len(entries), len(kinds))
    return with_base(config, teachers), teachers


def with_base(config: Config, teachers: Sequence[Teacher]) -> Config:
    """The config with a base for these teachers, and the family that it can become.

    A base that the config names stays. Else it is the largest teacher that can be one (the first by name of equal
    ones), of the family of the config where that is named. Else it is the tiny base of the family.

    Raises:
        InputError: the base that nobody asked for has less than half as many weights as the largest teacher.
    """
    if config.distill.base is not None or not teachers:
        return config
    named = "family" in config.model_fields_set
    found = [
        (-teacher.weights, teacher.name, family, teacher.folder)
        for teacher in teachers if teacher.folder is not None
        if (family := _family(config, teacher.config, (config.family,) if named else families.names())) is not None
    ]  # fmt: skip
    if found:
        _, _, family, folder = min(found)
        distill = config.distill.model_copy(update={"base": str(folder.resolve())})
        config = config.model_copy(update={"family": family, "distill": distill})
    base = base_checkpoint(config)
    weights, largest = parameter_total(read_config(base)), max(teachers, key=lambda teacher: teacher.weights)
    if 2 * weights < largest.weights:
        chosen = [config.family] if named else families.names()
        allowed = "; ".join(f"for {name} {families.get(name).bases}" for name in chosen)
        raise InputError(
            f"the base {base.name} has {amount(weights)} weights, {largest.name} that it learns from "
            f"{amount(largest.weights)}",
            where="distill.base", allowed=f"at least half as many, unless asked for; {allowed}",
            fix="--set distill.base=FOLDER_OR_HUB_NAME of a public model, with the family that it "
                "becomes (--set family=...)",
            code="base-too-small",
        )  # fmt: skip
    return config


def with_experts(config: Config, count: int, types: int) -> Config:
    """The config with a number of experts for so many models of so many types, where it names none.

    Raises:
        InputError: the number that it names does not fit.
    """
    if "experts" not in config.model_fields_set:
        experts = min(count, MOST_EXPERTS)
        if types > effective_proxies(config, experts, count):
            experts = types  # each type needs a cluster
        top_k = config.top_k if "top_k" in config.model_fields_set else min(config.top_k, experts)
        config = config.model_copy(update={"experts": experts, "top_k": top_k})
    cluster_count(config, count, types)
    return config


def check(config: Config) -> None:
    """Refuses a base whose weights are not sound, before any work.

    Raises:
        InputError: it cannot become an MoE of the family, is not stored as plain weights, or holds NaN or infinite
            values.
    """
    base = base_checkpoint(config)
    check_base(config.family, read_config(base))
    with TensorReader(base) as reader:
        formats.check_finite(((name, reader.get(name)) for name in reader.names()), base)


def describe(config: Config, teachers: Sequence[Teacher], word: str) -> list[str]:
    """What a person should know before hours of work: base, teachers and the size of what will come out.

    Args:
        word: what the teachers are, such as "devices".
    """
    folder = base_checkpoint(config)
    base = read_config(folder)
    size = parameter_count(moe_config(base, layout(config)))
    name = (
        config.distill.base if config.distill.base and not Path(config.distill.base).exists() else folder.name
    )
    moe = f"{amount(size['total'])} weights, {amount(size['active'])} active per token, {config.family}"
    lines = [f"base {name}: {amount(parameter_total(base))} weights; MoE of {config.experts} experts: {moe}"]
    kinds = Counter((teacher.type, teacher.weights) for teacher in teachers)
    if kinds:
        parts = ", ".join(
            f"{count} {type} ({amount(weights)} weights each)"
            for (type, weights), count in sorted(kinds.items())
        )
        lines.append(f"{word}: {parts}")
    return lines


def amount(weights: int) -> str:
    """A number of weights as people write it: 850, 12K, 1.1M, 7.2B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if weights >= size:
            return f"{weights / size:.3g}{unit}" if weights < 100 * size else f"{weights / size:.0f}{unit}"
    return str(weights)


def _family(config: Config, base: PretrainedConfig, allowed: Iterable[str]) -> str | None:
    """The family that a model can be the base of, in the layout of the config."""
    for family in allowed:
        try:
            moe_config(base, layout(config.model_copy(update={"family": family})))
        except InputError:
            continue
        return family
    return None


def _known(type: str) -> PretrainedConfig | None:
    try:
        config = model_config(type)
        if type not in PRESETS and not is_hub_name(type):
            formats.check_form(resolve(type), config)
        return config
    except InputError as error:
        if error.code != "no-model" or not is_hub_name(type):
            raise
        return None
