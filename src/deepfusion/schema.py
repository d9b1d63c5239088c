"""A whole config: what it consists of, and what does not go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from deepfusion.errors import InputError
from deepfusion.sections import (
    MOST_DEVICES,
    MOST_EXPERTS,
    MOST_SEED,
    MOST_WORKERS,
    ClusteringSection,
    DataSection,
    DeviceSection,
    DeviceSpec,
    DistillSection,
    EvaluateSection,
    FederationSection,
    MergeSection,
    Named,
    PartitionSection,
    Section,
    TuneSection,
    within,
)


class Config(Section):
    """A whole run. Values come from the defaults, then the recipe, then the file, then `--set`."""

    seed: int = Field(0, ge=0, le=MOST_SEED, description="seed of every random choice")
    recipe: Literal["paper", "fused"] = Field(
        "fused", description="paper: faithful to the source; fused: ours"
    )
    family: Annotated[str, AfterValidator(Named("families"))] = Field(
        "qwen3_moe", description="architecture of the resulting MoE; by default that of a base chosen by fuse"
    )
    top_k: int = Field(
        2, ge=1, le=MOST_EXPERTS, description="experts used per token; default: 2, or 1 where experts is 1"
    )
    experts: int = Field(
        default_factory=lambda before: default_experts(before.get("top_k", 0)),
        ge=1,
        le=MOST_EXPERTS,
        description="K, number of knowledge domains, bases and experts; default: 4, or top_k where that is more; fuse "
        "by default: one per sound model, up to 8",
    )
    devices: int | list[DeviceSpec] | None = Field(
        None, description="number of devices, or a list of them; default: one per file of data.private"
    )
    jobs: int | None = Field(
        None,
        ge=1,
        le=MOST_WORKERS,
        description="trainings side by side, one thread each on CPU; default: the cores",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where it is faster, so not for narrow models on a CPU"
    )
    checkpoint_seconds: float = Field(
        20.0, gt=0, le=10**6, description="least time between two checkpoints of a training"
    )
    data: DataSection = DataSection()
    device: DeviceSection = DeviceSection()
    clustering: ClusteringSection = ClusteringSection()
    distill: DistillSection = DistillSection()
    merge: MergeSection = MergeSection()
    tune: TuneSection = TuneSection()
    evaluate: EvaluateSection = EvaluateSection()
    federation: FederationSection = FederationSection()

    @model_validator(mode="before")
    @classmethod
    def _default_top_k(cls, values: Any) -> Any:
        if isinstance(values, dict) and "top_k" not in values and values.get("experts") == 1:
            return values | {"top_k": 1}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for contradiction in _contradictions(self):
            raise contradiction
        return self


def default_experts(top_k: int) -> int:
    """How many experts there are where nobody says so: 4, or as many as a token uses."""
    return max(4, top_k)


def effective_handover(config: Config) -> float:
    """Share of the peak rates at which distillation hands over to tune: 0 where one of them has no steps, for then
    there is nothing to hand over, or nobody to take it.
    """
    return config.distill.handover if config.distill.steps and config.tune.steps else 0.0


def _contradictions(config: Config) -> Iterator[PydanticCustomError]:
    """What does not go together, the first first. A value that is the default is nobody's wish: it says nothing."""
    yield from _contradictions_of_numbers(config)
    distill, tune = config.distill, config.tune
    if distill.handover not in (0, DistillSection().handover) and not (distill.steps and tune.steps):
        idle = "tune.steps" if distill.steps else "distill.steps"
        yield _contradiction(
            f"distill.handover={distill.handover:g} makes one schedule of distillation and tune, but {idle} is 0",
            ("distill.handover", idle), fix="--set distill.handover=0", code="contradiction",
        )  # fmt: skip
    proxies, one_trunk = (
        config.clustering.proxies,
        distill.trunk_share == 1 and config.merge.router == "random",
    )
    if proxies is not None and proxies > config.experts and not one_trunk:
        yield _contradiction(
            f"clustering.proxies={proxies} is more than experts={config.experts}, but each base has one proxy where "
            f"distill.trunk_share is {distill.trunk_share:g} and merge.router {config.merge.router}",
            ("clustering.proxies", "experts", "recipe", "distill.trunk_share", "merge.router"),
            allowed="more with distill.trunk_share=1, as in recipe fused, and merge.router=random",
            fix="--set clustering.proxies=null", code="contradiction",
        )  # fmt: skip
    for name in ("ce_weight", "beta", "chunk_weight", "temperature"):
        value, usual = getattr(tune, name), getattr(TuneSection(), name)
        if value != usual and not tune.teachers:
            yield _contradiction(
                f"tune.{name}={value:g} is for learning from teachers, but tune.teachers is false",
                (f"tune.{name}", "recipe", "tune.teachers"), allowed="the default, or tune.teachers=true",
                fix=f"--set tune.{name}={usual:g}", code="contradiction",
            )  # fmt: skip
    scheme = config.data.partition.scheme
    named = isinstance(config.devices, list) and all(device.data for device in config.devices)
    alone = config.devices is None and bool(config.data.private)
    if scheme != PartitionSection().scheme and (named or alone):
        yield _contradiction(
            f"data.partition.scheme={scheme} shares data.private out among devices, but "
            + ("every device names its own data" if named else "without devices each file is one"),
            ("data.partition.scheme", "devices", "data.private"), allowed="devices as a number, or some without data",
            fix=f"--set data.partition.scheme={PartitionSection().scheme}", code="contradiction",
        )  # fmt: skip


def _contradictions_of_numbers(config: Config) -> Iterator[PydanticCustomError]:
    devices, vaa = config.devices, config.distill.vaa
    if config.top_k > config.experts:
        yield _contradiction(
            f"top_k={config.top_k} is more than experts={config.experts}", ("top_k", "experts")
        )
    if config.experts > 1 and config.top_k * config.merge.split == 1 and config.tune.steps > 0:
        yield _contradiction(
            "top_k=1 gives the router no gradient (its weights are normalised to 1); use top_k of 2 or more",
            ("top_k", "experts", "merge.split", "tune.steps"),
        )
    if isinstance(devices, int) and not 1 <= devices <= MOST_DEVICES:
        yield _contradiction(f"devices={devices} must be 1 to {MOST_DEVICES}", ("devices",))
    if isinstance(devices, list):
        if not devices:
            yield _contradiction("devices is an empty list", ("devices",))
        names = [device.id for device in devices if device.id]
        for name in (name for name in names if names.count(name) > 1):
            yield _contradiction(f"devices: the id {name} stands twice", ("devices",))
    if config.device.upload != "weights" and _methods(config) != {"full"}:
        yield _contradiction(
            f"device.upload={config.device.upload} is for method full; adapters are small as they are",
            ("device.upload", "device.method", "devices"),
        )
    if vaa.patches % vaa.blocks:
        yield _contradiction(
            "distill.vaa.patches must be a multiple of distill.vaa.blocks",
            ("distill.vaa.patches", "distill.vaa.blocks"),
        )
    if vaa.width % vaa.heads:
        yield _contradiction(
            "distill.vaa.width must be a multiple of distill.vaa.heads",
            ("distill.vaa.width", "distill.vaa.heads"),
        )
    if config.clustering.proxies is not None and config.clustering.proxies < config.experts:
        yield _contradiction(
            f"clustering.proxies={config.clustering.proxies} is fewer than experts={config.experts}, "
            "each of which has a proxy",
            ("clustering.proxies", "experts"), allowed=f"{config.experts} or more, or null", code="contradiction",
        )  # fmt: skip
    distill = config.distill
    each = distill.steps - round(distill.steps * distill.trunk_share)
    if distill.trunk_share < 1 and 0 < each < config.experts:
        yield _contradiction(
            f"distill.steps={distill.steps} leaves {each} steps for experts={config.experts} bases, so none for each",
            ("distill.steps", "distill.trunk_share", "experts", "recipe"),
            allowed="as many steps as bases, or 0, or distill.trunk_share=1", code="contradiction",
        )  # fmt: skip
    if isinstance(config.data.test, float) and not 0 < config.data.test < 1:
        yield _contradiction("data.test as a share must lie between 0 and 1", ("data.test",))


def without_effect(config: Config, key: str) -> str | None:
    """Why nothing reads a key in a config like this; None where something does."""
    for keys, idle, why in _IDLE:
        if within(key, keys) and idle(config):
            return why
    return None


def _methods(config: Config) -> set[str]:
    """Those by which the devices of a config train."""
    listed = config.devices if isinstance(config.devices, list) else []
    return {device.method or config.device.method for device in listed} or {config.device.method}


def _unread(source: str) -> Callable[[Config], bool]:
    return lambda config: source not in config.data.public


# Keys and sections, when nothing reads them, and why.
_IDLE: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (
        ("tune.batch_size", "tune.learning_rate", "tune.train_experts", "tune.teachers", "tune.balance_weight",
         "tune.ce_weight", "tune.beta", "tune.chunk_weight", "tune.temperature"),
        lambda config: not config.tune.steps, "tune.steps is 0",
    ),
    (
        ("distill.batch_size", "distill.learning_rate", "distill.method", "distill.ce_weight", "distill.alpha",
         "distill.beta", "distill.chunk_weight", "distill.temperature", "distill.vaa", "distill.train",
         "distill.trunk_share"),
        lambda config: not config.distill.steps, "distill.steps is 0",
    ),
    (
        ("distill.train",), lambda config: config.distill.trunk_share == 1,
        "distill.trunk_share is 1, as in recipe fused: there is a trunk alone, and all of it is trained",
    ),
    (("distill.vaa",), lambda config: not config.distill.alpha, "distill.alpha is 0"),
    (
        ("distill.temperature",), lambda config: not (config.distill.beta or config.distill.chunk_weight),
        "distill.beta and distill.chunk_weight are 0",
    ),
    (
        ("data.sampled_documents",), _unread("sampled"), "data.public does not name sampled",
    ),
    (("data.generic", "data.generic_documents"), _unread("generic"), "data.public does not name generic"),
    (("data.public_fraction",), _unread("in_domain"), "data.public does not name in_domain"),
    (("device.lora_rank",), lambda config: _methods(config) == {"full"}, "every device trains all its weights"),
    (("device.types",), lambda config: isinstance(config.devices, list), "each of the devices has a type"),
    (
        ("device.method",),
        lambda config: isinstance(config.devices, list) and all(device.method for device in config.devices),
        "each of the devices has a method",
    ),
    (
        ("clustering.restarts",), lambda config: config.clustering.assignment != "kmeans",
        "clustering.assignment is not kmeans",
    ),
    (("federation.s3",), lambda config: config.federation.sink != "s3", "federation.sink is not s3"),
)  # fmt: skip


def _contradiction(
    what: str, keys: tuple[str, ...], *, allowed: str | None = None, fix: str | None = None, code: str = "bad-value"
) -> PydanticCustomError:  # fmt: skip
    """What `_explain_error` makes one line of.

    Args:
        keys: those that do not go together, or, with `recipe`, what has set them.
    """
    return PydanticCustomError(
        "contradiction", "{what}", {"what": what, "keys": keys, "allowed": allowed, "fix": fix, "code": code}
    )


def effective_proxies(config: Config, experts: int, devices: int) -> int:
    """How many clusters, and so proxies, there are: one per expert, or more where the config wants more and there are
    devices for them.
    """
    return max(experts, min(config.clustering.proxies or experts, devices))


def cluster_count(config: Config, devices: int, types: int) -> int:
    """`effective_proxies` of the config's own number of experts, for so many devices of so many model types.

    Raises:
        InputError: fewer devices than experts, or more types than clusters.
    """
    experts = config.experts
    if devices < experts:
        raise InputError(
            f"{devices} devices are fewer than experts={experts}", where="experts", allowed=f"1 to {devices}",
            fix=f"--set experts={devices}", code="fewer-devices-than-experts",
        )  # fmt: skip
    count = effective_proxies(config, experts, devices)
    if types > count:
        raise InputError(
            f"{types} model types need at least one cluster each, there are {count}", where="experts",
            allowed=f"{types} to {devices}", fix=f"--set experts={types}", code="more-types-than-experts",
        )  # fmt: skip
    return count
