"""Who sees which documents: test, public, and each device's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.names import device_ids
from deepfusion.schema import Config
from deepfusion.sections import DeviceSpec
from deepfusion.text.partition import partition
from deepfusion.text.rows import Document
from deepfusion.text.sources import choose, expand_source, load_source, shuffled, unique
from deepfusion.text.windows import say_cut

HELD_OUT = 0.1  # share of a device's documents that it keeps to measure its own losses
LEAST = 2  # documents of a device: one to train on, one held out
LEAST_SHARED = 8  # documents that the partition gives every device where there are enough


@dataclass(frozen=True)
class Splits:
    """Who sees which documents. No test document stands anywhere else; no device shares a document with another.

    Attributes:
        private: device id -> the documents it trains on.
        held_out: device id -> its own documents kept for its losses before and after training.
        public: in-domain documents and files that the server may use.
        generic: public documents that have nothing to do with the devices.
        test: documents that only evaluation sees.
        devices: every device with its id and type, in the order of `private`.
    """

    private: dict[str, list[Document]]
    held_out: dict[str, list[Document]]
    public: list[Document]
    generic: list[Document]
    test: list[Document]
    devices: list[DeviceSpec]


def make_splits(config: Config) -> Splits:
    """Split all documents; a pure function of the config and of the contents of its sources.

    Each source (a file of a glob counts as one) gives its share to test and, where `data.public` names in_domain, to
    public. A document that two sources hold belongs to the first.

    Without any private source there are no devices, only what the server has.

    Raises:
        InputError: a bad source, or too few documents for the devices.
    """
    data, seed = config.data, config.seed
    common = _expand([data.private] if isinstance(data.private, str) else data.private)
    devices, own = _resolve_devices(config, common)
    if not common and not any(own.values()):
        devices = []  # a server knows no private data: the uploads come from elsewhere
    test = load_source(data.test) if isinstance(data.test, str) else []
    taken = {document.id for document in test}
    public: list[Document] = []
    kept: dict[str, list[Document]] = {}
    for source in dict.fromkeys([*common, *(part for parts in own.values() for part in parts)]):
        given = load_source(source, data.limit, seed)
        found = unique(given, without=taken)
        if len(found) < len(given):
            what = (
                f"{len(given) - len(found)} of {len(given)} documents are left out: in the test "
                "text or in an earlier source"
            )
            progress.say_once(f"[data] {source}: {what}")
        taken |= {document.id for document in found}
        counts = _split_counts(len({document.id for document in found}), config)
        texts = [*_alike(found, seed)]
        if len(texts) < sum(counts) + 1:
            raise InputError(
                f"{len(found)} new documents are too few to split", where=source, code="too-few-documents"
            )
        test += chain(*texts[: counts[0]])
        public += chain(*texts[counts[0] : sum(counts)])
        kept[source] = [*chain(*texts[sum(counts) :])]
    parts = _deal(devices, own, common, kept, config)
    private, held_out = {}, {}
    for device, documents in parts.items():
        count = max(1, round(HELD_OUT * len(documents)))
        order = shuffled(documents, seed, "held_out")
        held_out[device], private[device] = order[:count], order[count:]
    say_cut([*test, *public, *chain(*parts.values())], data.max_chars)
    return Splits(private, held_out, *_server_text(config, public, test), test, devices)


def _alike(documents: list[Document], seed: int) -> Iterable[list[Document]]:
    """In an order by seed the examples of each id, which differ in case and white space alone: they stay on one side
    of a split.
    """
    groups: dict[str, list[Document]] = {}
    for document in shuffled(documents, seed, "split"):
        groups.setdefault(document.id, []).append(document)
    return groups.values()


def _expand(sources: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(part for source in sources for part in expand_source(source)))


def _split_counts(documents: int, config: Config) -> tuple[int, int]:
    """Numbers of test and of public documents of a source."""
    share = config.data.test
    test = max(1, round(share * documents)) if isinstance(share, float) else 0
    public = (
        max(1, round(config.data.public_fraction * documents)) if "in_domain" in config.data.public else 0
    )
    return test, public


def _server_text(
    config: Config, in_domain: list[Document], test: list[Document]
) -> tuple[list[Document], list[Document]]:
    """Public and generic text without the test documents."""
    data, test_ids = config.data, {document.id for document in test}
    named = [source for source in data.public if source not in ("in_domain", "generic", "sampled")]
    files = [document for source in named for document in load_source(source, data.limit, config.seed)]
    generic: list[Document] = []
    if "generic" in data.public:
        generic = unique(
            (document for source in data.generic for document in load_source(source)), without=test_ids
        )
        generic = choose(generic, data.generic_documents, config.seed, "generic")
    return unique([*in_domain, *files], without=test_ids), generic


def _resolve_devices(config: Config, common: list[str]) -> tuple[list[DeviceSpec], dict[str, list[str]]]:
    """Devices with id and type, and the sources of those that name their own."""
    if isinstance(config.devices, list):
        used = {device.id for device in config.devices}
        free = (name for name in _numbered(2 * len(config.devices)) if name not in used)
        devices = [
            device if device.id else device.model_copy(update={"id": next(free)}) for device in config.devices
        ]
        named = {
            str(device.id): [device.data] if isinstance(device.data, str) else device.data
            for device in devices
        }
        return devices, {name: _expand(data) for name, data in named.items() if data}
    count = len(common) if config.devices is None else config.devices
    types = np.random.default_rng(config.seed).choice(config.device.types, size=count).tolist()
    if config.devices is not None:
        return [
            DeviceSpec(id=name, type=kind) for name, kind in zip(_numbered(count), types, strict=True)
        ], {}
    rows = list(zip(device_ids([Path(source).stem for source in common]), types, common, strict=True))
    devices = [DeviceSpec(id=name, type=kind, data=source) for name, kind, source in rows]
    return devices, {name: [source] for name, _, source in rows}


def _numbered(count: int) -> list[str]:
    return [f"d{index:02d}" for index in range(count)]


def _deal(
    devices: list[DeviceSpec],
    own: dict[str, list[str]],
    common: list[str],
    kept: dict[str, list[Document]],
    config: Config,
) -> dict[str, list[Document]]:
    """The private documents of every device."""
    parts: dict[str, list[Document]] = {str(device.id): [] for device in devices}
    users = defaultdict(list)
    for name, sources in own.items():
        for source in sources:
            users[source].append(name)
    scheme, alpha = config.data.partition.scheme, config.data.partition.alpha
    for number, (source, names) in enumerate(users.items()):
        if len(names) > 1 and len(kept[source]) < LEAST_SHARED * len(names):
            raise InputError(
                f"{len(kept[source])} private documents of {source} for {len(names)} devices",
                where=f"device {names[-1]}",
                allowed=f"at least {LEAST_SHARED} documents a device",
                code="too-few-documents",
            )
        shares = partition(
            kept[source], len(names), "random_uneven", alpha, config.seed + number, least=LEAST_SHARED
        )
        for name, share in zip(names, shares, strict=True):
            parts[name] += share
    others = [name for name in parts if name not in own]
    pool = [document for source in common if source not in users for document in kept[source]]
    if pool and not others:
        raise InputError(
            f"nobody would get its {len(pool)} private documents, for every device names its own data",
            where="data.private", fix="leave data.private out, or a device's data", code="contradiction",
        )  # fmt: skip
    if others:
        if len(pool) < LEAST * len(others):
            raise InputError(
                f"{len(pool)} private documents of data.private for {len(others)} devices",
                where=f"device {others[-1]}",
                allowed=f"at least {LEAST} documents a device",
                fix="more documents or fewer devices",
                code="too-few-documents",
            )
        shares = partition(pool, len(others), scheme, alpha, config.seed, least=LEAST_SHARED)
        parts |= zip(others, shares, strict=True)
    for name, documents in parts.items():
        if len(documents) < LEAST:
            what = f"{len(documents)} private documents"
            raise InputError(
                what, where=f"device {name}", allowed=f"at least {LEAST}", code="too-few-documents"
            )
    return parts
