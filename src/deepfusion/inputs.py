"""What a config reads of this machine: files of data, and folders of checkpoints. Needs no model framework."""

from __future__ import annotations

import hashlib
from pathlib import Path

from deepfusion import __version__
from deepfusion.config import Config, config_digest
from deepfusion.digests import checkpoint_digest, sha256_file
from deepfusion.folders import local_path
from deepfusion.text.sources import local_files


def data_files(config: Config) -> list[Path]:
    """The local files of all sources of text, sorted and each once.

    Raises:
        InputError: a glob that matches nothing.
    """
    data = config.data
    own = (
        [device.data for device in config.devices if device.data] if isinstance(config.devices, list) else []
    )
    several = [data.private, *own, *([data.test] if isinstance(data.test, str) else [])]
    names = [name for one in several for name in ([one] if isinstance(one, str) else one)]
    names += [name for name in data.public if name not in ("in_domain", "generic", "sampled")]
    return local_files(names + (data.generic if "generic" in data.public else []))


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


def request(config: Config, start: Path, *more: str) -> str:
    """Digest of all that a training outside of the pipeline depends on, 64 hex digits.

    Args:
        start: folder of the checkpoint that it starts from.
        more: whatever else it depends on.
    """
    files = [f"{path}={sha256_file(path)}" for path in data_files(config)]
    parts = [__version__, config_digest(config), checkpoint_digest(start), *files, *more]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
