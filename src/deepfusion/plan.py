"""What a run is going to make, as far as it is known: base, experts and teachers, and whether the machine can do it."""

from __future__ import annotations

import shutil
from operator import attrgetter
from pathlib import Path

import torch

from deepfusion import plugins, progress
from deepfusion.errors import InputError
from deepfusion.families import bases
from deepfusion.families.base import check_family
from deepfusion.families.bases import base_checkpoint
from deepfusion.learning.memory import estimate_training_bytes, require_memory
from deepfusion.learning.vaa import block_ends
from deepfusion.models.architecture import parameter_total, read_config
from deepfusion.resume import Stage
from deepfusion.schema import Config
from deepfusion.uploads.intake import survey


class Plan:
    """The config of a run as it becomes complete.

    Attributes:
        config: with base and experts, as far as they are known before any work; `settle` makes them final.

    Args:
        asked: the config as the user gave it.
        source: the stage that brings the uploads.

    Raises:
        InputError: given models that cannot be read, or a base or number of experts that does not fit them.
    """

    def __init__(self, asked: Config, source: Stage) -> None:
        self._asked, self._found, self._told, self._if_sound = asked, None, set[str](), ""
        self._teachers: list[bases.Teacher] = []
        if "given" in source.inputs:
            late = source.inputs.get("late")
            self._word, self._if_sound = "models", "if all are sound: "
            self._found = survey(Path(source.inputs["given"]), Path(late) if late is not None else None)
            self._teachers = bases.teachers_of_survey(self._found)
            fitting = bases.with_experts(asked, len(self._found.models), 1)
            self.config = bases.with_base(fitting, self._teachers)
        elif "private" in source.reads:
            self._word = "devices" if isinstance(asked.devices, list) else "types of devices"
            self._teachers = bases.teachers_of_config(asked)
            self.config = bases.with_base(asked, self._teachers)
        else:  # they came from elsewhere, and the registry will tell
            self._word, self.config = "uploads", asked

    @property
    def about(self) -> str:
        """What is known for certain before any work."""
        if self._found is not None:
            return f"{len(self._found.models)} models given"
        return f"{self.config.experts} experts of {self.config.family}"

    def settle(self, run: Path) -> None:
        """Make the config final once the registry of a run folder has checked every model.

        Raises:
            InputError: too few sound models, or a base that is too small for them.
        """
        self.config, self._teachers = bases.settled(self._asked, run, self._found)
        self._if_sound = ""

    def say(self) -> None:
        """Tell what was not told before."""
        lines = bases.describe(self.config, self._teachers, self._word)
        for line in (f"{self._if_sound}{line}" for line in lines):
            if line not in self._told:
                progress.say(line)
                self._told.add(line)

    def check(self, run: Path) -> None:
        """Refuse a run that cannot end well, for its base or for lack of disk or memory, before any work is lost."""
        config = self.config
        bases.check(config)
        base = read_config(base_checkpoint(config))
        for group, key in plugins.KEYS.items():
            plugins.load(group, attrgetter(key)(config))
        moe = check_family(bases.layout(config), base)
        if config.distill.steps and config.distill.alpha:
            depths = [known.num_hidden_layers for known in (base, *(t.config for t in self._teachers))]
            block_ends(min(depths), config.distill.vaa.blocks)
        weights = 4 * parameter_total(base)
        # K bases, a trunk, the merged MoE, its control and the tuned two, and the checkpoints of a training (weights,
        # two moments).
        disk = (config.experts + 1) * weights + 4 * config.experts * weights + 6 * config.experts * weights
        free = shutil.disk_usage(run).free
        if disk > free:
            what = f"the run needs about {disk / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free"
            raise InputError(what, where=run, code="too-little-disk")
        if torch.cuda.is_available():
            return
        tokens = config.data.max_chars // 3
        needed = estimate_training_bytes(base, "full", config.distill.batch_size, tokens)
        fix = "a smaller base, distill.batch_size or data.max_chars"
        require_memory(needed, "distilling one base", where="distill.base", fix=fix)
        if config.tune.steps and config.tune.train_experts:
            needed = estimate_training_bytes(moe, "full", config.tune.batch_size, tokens)
            fix = "fewer experts, a smaller distill.base, tune.batch_size or data.max_chars"
            require_memory(needed, "tuning the MoE", where="tune", fix=fix)
