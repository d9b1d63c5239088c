"""The JSON files that stages, processes and people hand to each other: one typed model a file, read and written alike.

A file without `schema_version`, as release 0.1.0 wrote them, is of version 1, and so are the rows of corpus.jsonl. A
file that is a list or a table by name cannot say its own: each entry of registry.json does, rejected.json goes with the
registry.json beside it, refused.json with the card that it stands for.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    field_validator,
    model_validator,
)

from deepfusion.errors import InputError
from deepfusion.folders import write_whole
from deepfusion.names import DeviceId
from deepfusion.sections import Encoder, Encoding, Method

REDO = "redo the stage that writes it: --from STAGE"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A part of a record; keys that it does not know are left out, and no number is infinite or NaN."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class Stored(Part):
    """What is a JSON file by itself."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """What lies in a file.

        Raises:
            InputError: there is none (`record-missing`), or it is no JSON of this schema; names the key
                (`record-invalid`).
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise InputError("there is no such file", where=path, fix=REDO, code="record-missing") from None
        except ValidationError as error:
            raise invalid(error, path, code="record-invalid", fix=REDO) from None

    @classmethod
    def find(cls, path: Path | None) -> Self | None:
        """What lies in a file; None where there is none.

        Raises:
            InputError: it is no JSON of this schema (`record-invalid`).
        """
        return cls.read(path) if path is not None and path.is_file() else None

    def write(self, path: Path) -> None:
        """Write the file so that it is always the old one or the new one; what is no text in it becomes `?`."""
        text = json.dumps(self.model_dump(), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(path, text.encode("utf-8", "replace") + b"\n")


class Record(Stored):
    """A JSON object that says of which version it is."""

    schema_version: Literal[1] = 1


def invalid(error: ValidationError, where: object, *, code: str, fix: str | None = None) -> InputError:
    """The first thing that is wrong with a record, as one line that names its key."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part)[:60] for part in first["loc"])
    message = first["msg"][:200]
    return InputError(f"{key}: {message}" if key else message, where=where, fix=fix, code=code)


# Uploads --------------------------------------------------------------------------------------------------------------


class UploadFacts(Record):
    """What an upload says about itself; nothing in it is text of the device or names its domain.

    `loss_before` and `loss_after` are nats per token on the device's own held-out text; an adopted checkpoint has none
    and says 0 tokens. `signature` is `models.type_signature`. `encoding` says how the weights are written,
    `encoding_error` by how much one of them differs at most for that reason.
    """

    device: DeviceId
    type: str = Field(max_length=200)
    model_class: str = Field(pattern=r"^\w{1,100}$")
    signature: Digest
    base: str = Field(max_length=1000)
    base_digest: str = Field(pattern=r"^([0-9a-f]{64})?$")
    method: Method
    encoding: Encoding = "weights"
    encoding_error: float = Field(0.0, ge=0)
    embedding: list[float] = Field(min_length=2, max_length=1024)
    encoder: Encoder
    tokens: int = Field(ge=0, le=10**15)
    documents: int = Field(ge=0, le=10**12)
    loss_before: float | None = Field(ge=0)
    loss_after: float | None = Field(ge=0)
    steps: int = Field(ge=0)
    seed: int = Field(ge=0)
    deepfusion_version: str = Field(max_length=50)

    @field_validator("embedding")
    @classmethod
    def _unit(cls, embedding: list[float]) -> list[float]:
        if not abs(math.hypot(*embedding) - 1) < 1e-3:
            raise ValueError("not of length 1")
        return embedding

    @model_validator(mode="after")
    def _encoded_once(self) -> Self:
        if self.encoding != "weights" and self.method != "full":
            raise ValueError(f"an adapter is not written as {self.encoding}")
        return self


class Card(UploadFacts):
    """card.json of an upload; `files` maps every other file to its SHA-256."""

    model_config = ConfigDict(extra="forbid")

    files: dict[str, str] = Field(default_factory=dict, max_length=10_000)


class RegistryEntry(UploadFacts):
    """A sound upload: its card without the files, `bytes` of its folder, and the digest of its weights."""

    bytes: Count
    digest: Digest


class Registry(Stored, RootModel[list[RegistryEntry]]):
    """registry.json: the sound uploads, by name."""

    @property
    def by_device(self) -> dict[str, RegistryEntry]:
        return {entry.device: entry for entry in self.root}


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse an upload: a stable kebab-case code, a sentence, and the file."""

    code: str
    message: str
    file: str


class Refusal(Stored, RootModel[Problem]):
    """refused.json in place of an upload: why there is none."""


class Rejected(Stored, RootModel[dict[str, Annotated[list[Problem], Field(min_length=1)]]]):
    """rejected.json: what is wrong with each upload that was set aside, by the name of its folder."""


def _absent(value: object) -> bool:
    return value is None


class Traffic(Part):
    """Bytes that a device sent and received; through a server also those of its upload alone, and apart from all
    uploads the messages of the control plane.
    """

    up_bytes: Count
    down_bytes: Count
    upload_bytes: Count | None = Field(None, exclude_if=_absent)
    control_up_bytes: Count | None = Field(None, exclude_if=_absent)
    control_down_bytes: Count | None = Field(None, exclude_if=_absent)


class Transport(Record):
    """transport.json: what each device moved [DF eq. 5]."""

    devices: dict[DeviceId, Traffic]
    total_up_bytes: Count
    total_down_bytes: Count

    @classmethod
    def of(cls, devices: dict[str, Traffic]) -> Transport:
        """The traffic of some devices and its sums."""
        up, down = (sum(getattr(t, key) for t in devices.values()) for key in ("up_bytes", "down_bytes"))
        return cls(devices=devices, total_up_bytes=up, total_down_bytes=down)


# Clusters and proxies -------------------------------------------------------------------------------------------------


class TypeShare(Part):
    """How many devices a model type has, and how many clusters it got."""

    signature: Digest
    type: str
    devices: Count
    share: Count


class Cluster(Part):
    """Devices of one model type that become one proxy, with their private tokens together."""

    id: Count
    type: str
    signature: Digest
    devices: list[DeviceId] = Field(min_length=1)
    tokens: Count


class Similarity(Part):
    """Cosines of the embeddings of all devices: `matrix` [devices, devices]."""

    devices: list[DeviceId]
    matrix: list[list[float]]

    @model_validator(mode="after")
    def _square(self) -> Self:
        if {len(self.matrix), *map(len, self.matrix)} != {len(self.devices)}:
            raise ValueError("the matrix is not devices by devices")
        return self


class Clusters(Record):
    """clusters.json: who is with whom [DF eq. 6]; `assignment` maps each device to the id of its cluster."""

    experts: Count
    types: list[TypeShare]
    clusters: list[Cluster]
    assignment: dict[DeviceId, Count]
    similarity: Similarity


class Lineage(Record):
    """proxy.json: of which uploads a proxy is the mean, as device -> digest of its weights."""

    cluster: Count
    type: str
    signature: Digest
    devices: dict[DeviceId, Digest]


# Public text ----------------------------------------------------------------------------------------------------------


class Message(Part):
    """One turn of a conversation; `weight` 0 marks what the assistant says and nobody learns to say."""

    role: str
    content: str
    weight: Literal[0] | None = None


class CorpusRow(Record):
    """A line of bases/corpus.jsonl: `prompt` and `completion`, or `messages`; keys without a value are left out.

    `teacher` is the number of a proxy, `source` says where the text is from.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None
    domain: str
    teacher: Count | None = None
    source: str

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        plain = self.prompt is not None and self.completion is not None
        if plain == (self.messages is not None):
            raise ValueError("either prompt and completion or messages")
        if self.messages is not None and not any(
            message.role == "assistant" and message.weight is None for message in self.messages
        ):
            raise ValueError("there is no message to learn")
        return self


# Measures -------------------------------------------------------------------------------------------------------------


class Scores(Part):
    """How well a model predicts some text (docs/metrics.md): nats per counted token, shares of 1."""

    log_perplexity: float
    perplexity: float
    bits_per_byte: float
    token_accuracy: float
    choice_accuracy: float | None = None
    acc: float | None = None
    acc_norm: float | None = None
    tokens: Count
    examples: Count


class Means(Part):
    """Plain means over domains; accuracies of choices over those that have questions with options."""

    log_perplexity: float
    bits_per_byte: float
    token_accuracy: float
    choice_accuracy: float | None = None
    acc: float | None = None
    acc_norm: float | None = None


class Measured(Scores):
    """Over all tokens, as means over the domains, which is the headline, and by domain."""

    mean_over_domains: Means
    by_domain: dict[str, Scores] = Field(min_length=1)


def _even(layers: list[list[float]]) -> list[list[float]]:
    if len({len(layer) for layer in layers}) != 1 or not layers[0]:
        raise ValueError("not the same number of experts in each layer")
    return layers


Shares = dict[str, Annotated[list[list[float]], AfterValidator(_even)]]
"""Domain -> layer -> the share of each expert in the choices of the router."""


class Measurement(Record):
    """units/**/measured.json: one model measured, and the use of its experts where it was asked for."""

    metrics: Measured
    expert_use: Shares | None = None


class BestDevice(Scores):
    """The device at home in a domain that predicts it best."""

    device: DeviceId
    type: str


class MeasuredProxy(Measured):
    """A proxy on the domains of its members; `domain` is the cluster's own."""

    type: str
    devices: list[DeviceId]
    domain: str

    @model_validator(mode="after")
    def _domain_is_measured(self) -> Self:
        if self.domain not in self.by_domain:
            raise ValueError("its own domain is not measured")
        return self


class References(Part):
    """What the MoE is compared with: the untouched public base, the same tuning without distillation, the best device
    of each domain, and the proxies by their numbers.
    """

    base: Measured | None
    no_distillation: Measured | None
    devices: dict[str, BestDevice] | None
    proxies: dict[str, MeasuredProxy] | None


class AgainstMembers(Part):
    """A proxy and its best member in nats per token on the domain of their cluster."""

    cluster: Count
    domain: str
    proxy: float
    best_member: float
    difference: float


class Comparison(Part):
    """The MoE minus a reference in the means over domains, and its bits per byte over those of the proxies."""

    moe_minus_no_distillation: Means | None
    moe_minus_base: Means | None
    bits_per_byte_ratio_to_proxies: float | None


class Evaluation(Record):
    """evaluation.json; what was not measured is null."""

    moe: Measured | None
    references: References
    proxy_against_members: list[AgainstMembers] | None
    expert_use: Shares | None
    comparison: Comparison


SCHEMAS: dict[str, type[BaseModel]] = {
    "card.json": Card,
    "refused.json": Refusal,
    "registry.json": Registry,
    "rejected.json": Rejected,
    "transport.json": Transport,
    "clusters.json": Clusters,
    "proxy.json": Lineage,
    "corpus.jsonl": CorpusRow,
    "measured.json": Measurement,
    "evaluation.json": Evaluation,
}
"""The model of each file by its name; `SCHEMAS[name].model_json_schema()` describes it."""
