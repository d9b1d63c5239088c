"""OFA-KD (Hao et al., NeurIPS 2023, arXiv 2310.19444): intermediate features are matched in logit space.

At the end of each block of the student's layers an exit turns its features into logits; these and the final logits are
compared with the teacher's final logits by a loss with an extra weight on the target class. Facts of the public
code: Hao840/OFAKD,
`distillers/ofa.py`. There an exit of a transformer is a few transformer blocks and a classifier. Here it is the
feed-forward half of such a block, position by position, and the student's own output layer: a vocabulary is no set
of 1000 classes.
Distributions of different tokenizers are compared as L_KL does it, over shared tokens and a bucket for all others.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepfusion.learning.align import SharedVocabulary
from deepfusion.learning.distillation import Distiller, Group, LossWeights, Teacher
from deepfusion.learning.losses import comparable_columns
from deepfusion.learning.vaa import block_ends
from deepfusion.schema import Config
from deepfusion.sections import Section, VAASection
from deepfusion_bench.baselines.shared import distill_with, in_blocks, teacher_output, weighed, weighted_mean


class OFAKDSettings(Section):
    """What the config has no key for; `distill.ce_weight` weighs their gt loss (1), `distill.beta` their kd loss
    (1)."""

    blocks: int = Field(
        4,
        ge=1,
        description="blocks of layers with an exit at the end (theirs); fewer in a student of fewer layers",
    )
    exponent: float = Field(
        1.5,
        gt=0,
        description="weight of the target class; 1 is the plain divergence, the default of their "
        "code, 1.5 their example",
    )
    exit_weight: float = Field(
        1.0, ge=0, description="weight of the sum over the exits, relative to the final logits (theirs)"
    )


DEFAULTS = OFAKDSettings()


def run(
    config: Config, inputs: dict[str, Path], out: Path, settings: OFAKDSettings = DEFAULTS
) -> dict[str, Any]:
    """`stages.distill.run` by OFA-KD."""
    return distill_with(partial(OFAKD, settings=settings), config, inputs, out)


def ofa_loss(student: Tensor, teacher: Tensor, target: Tensor, exponent: float) -> Tensor:
    """`-sum_c ((p_c + [c = target])^exponent - [c = target]) log s_c` for every row: their OFA loss.

    At exponent 1 it is the cross-entropy with the teacher. Above, the target weighs more, the more so the surer
    the teacher.

    Args:
        student: log-probabilities [n, C].
        teacher: log-probabilities [n, C].
        target: int64 [n], -1 where the target is none of the classes.

    Returns:
        float32 [n].
    """
    known, column = target >= 0, target.clamp_min(0)[:, None]
    log_p = teacher.gather(-1, column)
    powers = (exponent * teacher).exp()
    enhanced = torch.where(known[:, None], (log_p.exp() + 1) ** exponent - 1, (exponent * log_p).exp())
    return -(powers.scatter(-1, column, enhanced) * student).sum(-1)


def target_columns(vocabulary: SharedVocabulary, targets: Tensor, others: bool) -> Tensor:
    """Where the student's tokens `targets`, int64 [n], are among the compared columns: the bucket, or -1, if not
    shared.
    """
    shared = vocabulary.student_ids
    at = torch.searchsorted(shared, targets).clamp_max(max(len(shared) - 1, 0))
    found = shared[at] == targets if len(shared) else torch.zeros_like(targets, dtype=torch.bool)
    return torch.where(found, at, len(shared) if others else -1)


class Exit(nn.Module):
    """Features in the middle of the student -> features that its output layer understands, [..., width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.norm = nn.LayerNorm(width)
        for module in self.block:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(states + self.block(states))


class OFAKD(Distiller):
    """Student, teachers, exits and the OFA loss; made and called like `Distiller`, whose VAA and chunks take no part.

    Of what it returns `kl` is the OFA loss of the final logits plus the weighted one of the exits, which is also
    in `exits`.
    """

    def __init__(
        self, student: PreTrainedModel, weights: LossWeights, teachers: dict[int, Teacher],
        vaa: VAASection | None = None,
        seed: int = 0, settings: OFAKDSettings = DEFAULTS,
    ) -> None:  # fmt: skip
        super().__init__(student, replace(weights, alpha=0.0, chunk=0.0), teachers, None, seed)
        self.settings = settings
        layers = student.config.num_hidden_layers
        self.ends = block_ends(layers, min(settings.blocks, layers))
        torch.manual_seed(seed)
        # What the Distiller keeps here is trained along and thrown away, and makes it read the states of every layer.
        self.vaa["exits"] = nn.ModuleList(Exit(student.config.hidden_size) for _ in self.ends).to(
            student.device
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, groups: list[Group]) -> dict[str, Tensor]:
        """As `Distiller.forward`; `flops` includes the exits."""
        found = super().forward(input_ids, attention_mask, groups)
        head = self.student.get_output_embeddings().weight.numel()
        exits = sum(parameter.numel() for parameter in self.vaa.parameters()) + len(self.ends) * head
        return found | {"flops": found["flops"] + 6 * exits * found["tokens"]}

    def group_losses(
        self, group: Group, states: list[Tensor], input_ids: Tensor, head: Any
    ) -> dict[str, Tensor]:
        if group.teacher is None or not self.weights.beta:
            return super().group_losses(group, states, input_ids, head)
        device = input_ids.device
        rows, aligned = group.rows.to(device), group.aligned.to(device)
        teacher, temperature = self.teachers[group.teacher], self.weights.temperature
        asked, _, _ = teacher_output(teacher, group, device)
        weight, bias = head.weight, getattr(head, "bias", None)
        ours, theirs = comparable_columns(teacher.vocabulary, len(weight), len(asked.weight))
        exits = cast(nn.ModuleList, self.vaa["exits"])
        final, *middle = (states[end][rows].flatten(0, 1)[aligned.student_index] for end in (-1, *self.ends))
        features = torch.stack([exit_(x) for exit_, x in zip(exits, middle, strict=True)], 1)

        def block(final: Tensor, features: Tensor, targets: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            logits = F.linear(final, weight, bias).float()
            log_p = logits.log_softmax(-1)
            log_probs = log_p.gather(-1, targets[:, None]).squeeze(-1)
            right = (log_p.detach().argmax(-1) == targets).float()
            both = (positions >= 0).nonzero().squeeze(-1)
            with torch.no_grad():
                log_q = theirs.log_probs(asked.logits(positions[both]) / temperature)
            target = target_columns(teacher.vocabulary, targets[both], ours.others is not None)

            def compare(logits: Tensor) -> Tensor:
                picked = ours.pick((logits / temperature).log_softmax(-1))
                return log_probs.new_zeros(len(targets)).index_copy(
                    0, both, ofa_loss(picked, log_q, target, self.settings.exponent)
                )

            at_exits = [compare(F.linear(x, weight, bias).float()) for x in features[both].unbind(1)]
            return log_probs, right, compare(logits[both]), torch.stack(at_exits).sum(0)

        targets = input_ids[rows].flatten()[aligned.student_index + 1]
        width = (2 + len(self.ends)) * max(len(weight), len(asked.weight))
        log_probs, right, at_end, at_exits = in_blocks(
            block, width, final, features, targets, aligned.teacher_index
        )
        compared = aligned.weights * (aligned.teacher_index >= 0)
        at_exits = weighted_mean(at_exits, compared)
        found = {
            "ce": weighted_mean(-log_probs, aligned.weights),
            "kl": weighted_mean(at_end, compared) + self.settings.exit_weight * at_exits,
            "chunk": at_exits.new_zeros(()),
            "exits": at_exits,
            "accuracy": weighted_mean(right, aligned.weights),
        }
        return {"loss": weighed(found, self.coefficients(group)), **found}
