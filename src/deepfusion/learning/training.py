"""The one training entry, on transformers' Trainer: progress, metrics, checkpoints, and exact resumption."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.folders import write_whole

WEIGHTS = "trained.safetensors"
FILES = "files.json"
"""Of a checkpoint: how long each of its files is; written last."""
COUNTS = ("tokens", "flops")
"""What a module returns of these is added up between two logged rows; of everything else the mean is logged."""


def train(
    module: nn.Module,
    batches: Sequence[Any],
    collate: Callable[[Any], dict[str, Any]],
    *,
    stage: str,
    unit: str,
    work: Path,
    learning_rate: float,
    precision: str,
    seed: int,
    checkpoint_seconds: float,
    end_share: float = 0.0,
) -> list[dict[str, float]]:
    """Train the parameters of `module` that require gradients, one optimizer step per batch.

    Args:
        module: `module(**collate(batch))` returns a dict of scalars with the key `loss`; `tokens` counts the
            tokens read, `flops` the floating-point operations of the step. Parameters that require no gradient are
            neither trained nor stored in checkpoints.
        batches: what each step reads, in order; its length is the number of steps.
        collate: makes the keyword arguments of a step.
        stage, unit: who trains, for progress and metrics.
        work: folder of the checkpoints; a training that finds one there continues from it, and ends with the same
            weights.
        learning_rate: peak of the cosine schedule, after a warm-up of a twentieth of the steps.
        precision: fp32, or bf16 for autocast.
        checkpoint_seconds: least time between two checkpoints.
        end_share: of the peak, where the cosine ends.

    Returns:
        The logged means (of `COUNTS` the sums), oldest first: step, loss and whatever else the module returned.
    """
    steps = len(batches)
    if steps == 0:
        return []
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of the dataset is a whole batch
        train_sampling_strategy="sequential",
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": end_share},
        warmup_steps=steps // 20,
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=precision == "bf16",
        logging_steps=max(1, steps // 50),
        save_strategy="no",  # checkpoints are taken by the clock, see _Clock
        save_total_limit=2,
        report_to=[],
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    lines = _Lines(stage, unit, steps)
    callbacks: list[TrainerCallback] = [lines, _Clock(checkpoint_seconds)]
    folder = progress.attached()
    if folder is not None:
        callbacks.append(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard" / stage / unit))))
    trainer = _Trainer(
        model=module,
        args=arguments,
        train_dataset=_Batches(batches),
        data_collator=lambda items: collate(items[0]),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to --json
    trainer.train(resume_from_checkpoint=_last_checkpoint(work))
    return lines.history


class _Batches(Dataset):
    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


class _Trainer(Trainer):
    """Trainer for modules that compute their own loss and are only partly trained."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums: dict[str, float] = defaultdict(float)
        self._count = 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *_: Any, **__: Any
    ) -> Any:
        values = model(**inputs)
        if not isinstance(values, dict) or "loss" not in values:
            what = f"{type(model).__name__} returns {type(values).__name__}, not scalars by name with a loss among them"
            raise InputError(what, where="distill.method", code="plugin-broken")
        for key, value in values.items():
            self._sums[key] += float(value.detach()) if isinstance(value, torch.Tensor) else float(value)
        self._count += 1
        return (values["loss"], values) if return_outputs else values["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._count:
            logs |= {
                key: total if key in COUNTS else total / self._count for key, total in self._sums.items()
            }
            self._sums.clear()
            self._count = 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_trained(self.model), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        with torch.no_grad():
            for name, parameter in _trained(self.model).items():
                parameter.copy_(stored[name])


def _trained(module: nn.Module | None) -> dict[str, torch.Tensor]:
    return (
        {name: p.data for name, p in module.named_parameters() if p.requires_grad}
        if module is not None
        else {}
    )


class _Clock(TrainerCallback):
    """Asks for a checkpoint when the last is `seconds` old, and never spends more than a twentieth of the time on
    them.
    """

    def __init__(self, seconds: float) -> None:
        self.least = seconds
        self.wait = seconds
        self.last = time.monotonic()
        self.asked = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        now = time.monotonic()
        if now - self.last >= self.wait and state.global_step < state.max_steps:
            control.should_save = True
            self.asked = now

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        write_whole(folder / FILES, json.dumps(sizes))
        self.last = time.monotonic()
        self.wait = max(self.least, 20 * (self.last - self.asked))


class _Lines(TrainerCallback):
    """The step line: percentage, loss, tokens per second, memory and the time that is left."""

    def __init__(self, stage: str, unit: str, steps: int) -> None:
        self.stage, self.unit, self.steps = stage, unit, steps
        self.history: list[dict[str, float]] = []
        self.start = self.last_line = time.monotonic()
        self.first_step = 0
        self.tokens = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.first_step = state.global_step
        if state.global_step:
            progress.say(f"[{self.stage} {self.unit}] continues at step {state.global_step} of {self.steps}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= self.steps:
            control.should_log = True  # or the steps since the last logged one would be in no figure

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "learning_rate" not in logs:
            return
        values = {key: float(value) for key, value in logs.items() if key not in ("epoch", "grad_norm")}
        if not math.isfinite(values["loss"]):
            what = f"the loss at step {state.global_step} of {self.steps} is {values['loss']}: training has diverged"
            fix = f"a lower {self.stage}.learning_rate; with an own distill.method or base, look at those"
            raise InputError(what, where=f"{self.stage} {self.unit}", fix=fix, code="diverged")
        self.tokens += float(logs.get("tokens", 0))
        now = time.monotonic()
        values["tokens_per_second"] = round(self.tokens / (now - self.start), 1)
        self.history.append({"step": state.global_step, **values})
        progress.record(self.stage, self.unit, state.global_step, self.steps, values)
        done = state.global_step >= self.steps
        if now - self.last_line < 5 and not done:
            return
        self.last_line = now
        elapsed = now - self.start
        speed = (state.global_step - self.first_step) / elapsed
        left = progress.duration((self.steps - state.global_step) / speed) if speed else "?"
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else progress.resident_bytes()
        progress.say(
            f"[{self.stage} {self.unit}] {state.global_step}/{self.steps} {state.global_step / self.steps:4.0%}"
            f"  loss {values['loss']:.3f}  {self.tokens / elapsed:,.0f} tok/s  {memory / 2**30:.2f} GiB"
            + (f"  took {progress.duration(elapsed)}" if done else f"  eta {left}")
        )


def _last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that is as it was written: with all of its files, each as long as it was."""
    for folder in sorted(
        work.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True
    ):
        try:
            json.loads((folder / "trainer_state.json").read_text("utf-8"))
            sizes = json.loads((folder / FILES).read_text("utf-8"))
            whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError, AttributeError):
            continue
        if whole:
            return os.fspath(folder)
    return None
