"""What Python programs call: a whole run, or the fusion of models that exist; the command line calls the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import current_process
from pathlib import Path

from transformers.utils import logging

from deepfusion import pipeline
from deepfusion.config import CONFIGS, load_config
from deepfusion.errors import InputError
from deepfusion.schema import Config
from deepfusion.sections import within

_OF_DEVICES = (
    "devices", "data.partition", "federation.wait_for", "federation.deadline",
    *(f"device.{key}" for key in ("types", "method", "lora_rank", "upload", "steps", "epochs", "batch_size",
                                  "learning_rate")),
)  # fmt: skip
"""What only the training of devices reads."""


def run(
    config: Config | str | Path, out: str | Path, *, first: str | None = None, last: str | None = None
) -> Path:
    """Simulate the whole federation: devices, clusters, proxies, bases, MoE, evaluation, report.

    Call it below `if __name__ == "__main__":`, for trainings side by side run in processes that import the program.

    Args:
        config: what `load_config` gives, or a config's file.
        out: the run folder, made where it is missing. A run in it goes on, or is redone as far as `config` has changed.
        first: redo this stage and what follows, even if nothing changed: device, registry, cluster, proxy, distill,
            merge, tune, evaluate or report.
        last: stop after this stage.

    Returns:
        The run folder. `moe/final` in it is the model, a Hugging Face checkpoint with tokenizer and model card;
        `evaluation.json` holds its figures beside those of its references, `report/index.html` the page of the run.

    Raises:
        InputError: whatever a user can mend, in one line.
    """
    _end_a_copy()
    settings = config if isinstance(config, Config) else load_config(config)
    with _quiet():
        pipeline.run(settings, Path(out), first=first, last=last)
    return Path(out)


def fuse(
    folder: str | Path,
    out: str | Path,
    *,
    config: str | Path | Config | None = None,
    overrides: Sequence[str] = (),
    first: str | None = None,
    last: str | None = None,
) -> Path:
    """Make one MoE of models that exist already, without any text of their owners.

    Args:
        folder: uploads, or plain Hugging Face checkpoints and adapters, a folder each; or another run folder.
        out: the run folder, as in `run`.
        config: a config or its file; None: data-free fusion, which learns from what the models sample themselves.
        overrides: `key=value`, as of `load_config`; not with a `Config`, which is complete.
        first: as in `run`.
        last: as in `run`.

    Returns:
        The run folder, as `run` returns it.

    Raises:
        InputError: whatever a user can mend, in one line.
    """
    _end_a_copy()
    if isinstance(config, Config) and overrides:
        raise ValueError("overrides are for load_config, where the config is made")
    for override in overrides:
        key = override.partition("=")[0].strip()
        if within(key, _OF_DEVICES):
            raise InputError(
                f"{key} has no effect: the models that are given were trained by others", where=f"--set {override}",
                fix=f"leave out --set {key}", code="contradiction",
            )  # fmt: skip
    settings = (
        config if isinstance(config, Config) else load_config(config or CONFIGS / "fuse.yaml", overrides)
    )
    with _quiet():
        pipeline.run(settings, Path(out), instead=[pipeline.given(Path(folder))], first=first, last=last)
    return Path(out)


def _end_a_copy() -> None:
    """A worker process that runs a whole program again, for want of `if __name__ == "__main__":` in it, only ends: what
    is wrong is said where the worker is waited for.
    """
    if getattr(current_process(), "_inheriting", False):
        raise SystemExit(1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars by which libraries show their own steps, here and in worker processes, which inherit the
    environment.
    """
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    said, shown = os.environ.get(name), logging.is_progress_bar_enabled()
    os.environ.setdefault(name, "1")
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if said is None:
            os.environ.pop(name, None)
        if shown:
            logging.enable_progress_bar()
