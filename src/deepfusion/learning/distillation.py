"""One training step, from texts to the loss: `L_CE + alpha L_FM + beta L_KL` [DF eq. 11], with any number of teachers.

The device stage uses it without a teacher, the distil stage with one proxy or all of them, the tune stage with an
MoE as the student. A batch may hold texts of several teachers: each text is compared with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepfusion import progress
from deepfusion.families.base import expert_parameters, parameter_count, router_logits_by_layer, scores_of
from deepfusion.learning.align import (
    AlignedBatch,
    Alignment,
    SharedVocabulary,
    align_offsets,
    collate,
    identity_alignment,
    shared_vocabulary,
)
from deepfusion.learning.corpus import Window
from deepfusion.learning.losses import Coefficients, Projection, distillation_losses, load_balance
from deepfusion.learning.vaa import ViewAlignedAttention, block_ends, span_pooling
from deepfusion.models.loading import context_limit, load_model, load_tokenizer
from deepfusion.sections import VAASection
from deepfusion.text.encoding import Encoded, encode
from deepfusion.text.rows import Document

BF16_TOKENS = 32


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of the loss; `alpha` and `beta` as in [DF eq. 11], the others are ours.

    `sampled_ce` is what remains of `ce` on a text that a proxy wrote, where its teacher says more than the text.
    """

    ce: float = 1.0
    alpha: float = 0.0
    beta: float = 0.0
    chunk: float = 0.0
    balance: float = 0.0
    temperature: float = 1.0
    sampled_ce: float = 1.0


class Teacher:
    """A frozen proxy with its tokenizer, and what its vocabulary shares with the student's."""

    def __init__(
        self, folder: Path, student_tokenizer: PreTrainedTokenizerBase, precision: str, device: torch.device
    ) -> None:
        self.model = load_model(folder, precision).eval().requires_grad_(False)
        nn.Module.to(self.model, device)
        self.tokenizer = load_tokenizer(folder)
        self.computing = parameter_count(self.model.config)["computing"]
        self.vocabulary: SharedVocabulary = shared_vocabulary(student_tokenizer, self.tokenizer).to(device)


@dataclass
class Group:
    """The rows of a batch that share a teacher (None where nobody teaches) and whether a proxy wrote them."""

    teacher: int | None
    sampled: bool
    rows: Tensor
    aligned: AlignedBatch
    teacher_ids: Tensor | None = None
    teacher_mask: Tensor | None = None
    student_pool: Tensor | None = None
    teacher_pool: Tensor | None = None


class Collator:
    """Turns documents into the tensors of a step.

    Args:
        tokenizer: the student's.
        teachers: by proxy number; a document whose teacher is not among them is learned by cross-entropy alone.
        prompt_weight: weight of prompt tokens in the losses.
        max_tokens: context of the student; a teacher's own context limits what it reads.
        vaa: None without feature matching.
        precision: of the computation. In bf16 batches are padded to a multiple of `BF16_TOKENS` tokens, since on a CPU
            memory is kept for every new shape of a product.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teachers: dict[int, Teacher],
        prompt_weight: float,
        max_tokens: int | None,
        vaa: VAASection | None = None,
        precision: str = "fp32",
    ) -> None:
        self.tokenizer, self.teachers, self.vaa = tokenizer, teachers, vaa
        self.multiple = BF16_TOKENS if precision == "bf16" else 1
        self.prompt_weight, self.max_tokens = prompt_weight, max_tokens

    def __call__(self, windows: Sequence[Window]) -> dict[str, Any]:
        encoded = [encode(self.tokenizer, d.document, self.prompt_weight, self.max_tokens) for d in windows]
        if any(len(one.input_ids) == self.max_tokens for one in encoded):
            cut = (
                f"texts of more than {self.max_tokens} tokens, all that the model reads at once, "
                "lose their end in training"
            )
            progress.say_once(f"[data] {cut}; a lower data.max_chars cuts them into several")
        input_ids, mask = _pad([e.input_ids for e in encoded], self.tokenizer, self.multiple, self.max_tokens)
        rows_of: dict[tuple[int | None, bool], list[int]] = {}
        for row, document in enumerate(windows):
            teacher = document.teacher if document.teacher in self.teachers else None
            rows_of.setdefault((teacher, document.source == "sampled"), []).append(row)
        groups = [
            self._group(*key, rows, windows, encoded, input_ids.shape[1]) for key, rows in rows_of.items()
        ]
        return {"input_ids": input_ids, "attention_mask": mask, "groups": groups}

    def _group(
        self,
        teacher: int | None,
        sampled: bool,
        rows: list[int],
        windows: Sequence[Window],
        encoded: list[Encoded],
        length: int,
    ) -> Group:
        own = [encoded[row] for row in rows]
        weights = [e.weights for e in own]
        index = torch.tensor(rows)
        if teacher is None:
            alignments = [identity_alignment(len(e.input_ids)) for e in own]
            return Group(None, sampled, index, collate(alignments, weights, length, length))
        guide = self.teachers[teacher]
        limit = context_limit(guide.model)
        documents = [windows[row].document for row in rows]
        theirs = [encode(guide.tokenizer, document, 0.0, limit) for document in documents]
        alignments = [_alignment(guide, *read) for read in zip(documents, own, theirs, strict=True)]
        teacher_ids, teacher_mask = _pad([t.input_ids for t in theirs], guide.tokenizer, self.multiple, limit)
        group = Group(
            teacher,
            sampled,
            index,
            collate(alignments, weights, length, teacher_ids.shape[1]),
            teacher_ids,
            teacher_mask,
        )
        if self.vaa is not None:
            spans = self.vaa.patches // self.vaa.blocks
            covered = [min(_end(e), _end(t)) for e, t in zip(own, theirs, strict=True)]
            group.student_pool = span_pooling(
                [e.offsets for e in own], covered, spans * self.vaa.kernel, length
            )
            group.teacher_pool = span_pooling(
                [t.offsets for t in theirs], covered, spans, teacher_ids.shape[1]
            )
        return group


class Distiller(nn.Module):
    """Student, teachers and losses as one module; only the student and View-Aligned Attention hold its parameters."""

    def __init__(
        self,
        student: PreTrainedModel,
        weights: LossWeights,
        teachers: dict[int, Teacher] | None = None,
        vaa: VAASection | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student, self.weights = student, weights
        self.teachers = teachers or {}
        self.moe = bool(expert_parameters(student))
        self.computing = parameter_count(student.config)["computing"]
        self.blocks = vaa.blocks if vaa is not None else 0
        self.vaa = nn.ModuleDict()
        if vaa is not None:
            torch.manual_seed(seed)
            options = vaa.model_dump()
            for number, teacher in self.teachers.items():
                widths = student.config.hidden_size, teacher.model.config.hidden_size
                self.vaa[str(number)] = ViewAlignedAttention(*widths, **options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, groups: list[Group]) -> dict[str, Tensor]:
        """Scalars: `loss`, its parts `ce`, `kl`, `chunk`, `feature`, `balance`, the token `accuracy`, `tokens` read,
        and `flops`.

        `flops` is the usual estimate: 6 for every weight that works on a token of the student, 2 for one of a
        teacher. It leaves out attention scores, View-Aligned Attention and what frozen weights save.
        """
        # Records nothing in a dense student.
        with router_logits_by_layer(self.student) as router_logits:
            states = _decode(self.student, input_ids, attention_mask, bool(self.vaa))
        head = self.student.get_output_embeddings()
        totals: dict[str, Tensor] = {}
        loss = torch.zeros((), device=input_ids.device)
        counted = torch.stack([group.aligned.weights.sum() for group in groups])
        for group, share in zip(groups, (counted / counted.sum().clamp_min(1e-9)).tolist(), strict=True):
            found = self.group_losses(group, states, input_ids, head)
            loss = loss + share * found.pop("loss")
            for key, value in found.items():
                totals[key] = totals.get(key, value.new_zeros(())) + share * value.detach()
        w = self.weights
        if self.moe and w.balance:
            config = self.student.config
            totals["balance"] = load_balance(
                list(router_logits.values()), config.num_experts_per_tok, attention_mask,
                scores_of(config),
            )  # fmt: skip
            loss = loss + w.balance * totals["balance"]
        tokens = attention_mask.sum()
        flops = 6 * self.computing * tokens.double()
        for group in groups:
            if self._taught(group) and group.teacher is not None and group.teacher_mask is not None:
                flops += 2 * self.teachers[group.teacher].computing * group.teacher_mask.sum()
        return {"loss": loss, **totals, "tokens": tokens, "flops": flops}

    def _taught(self, group: Group) -> bool:
        """Whether anything is asked of a teacher."""
        return group.teacher is not None and bool(
            self.weights.beta or self.weights.chunk or self.weights.alpha
        )

    def coefficients(self, group: Group) -> Coefficients:
        """The weights of the parts of the loss on the texts of a group."""
        w = self.weights
        hard = w.sampled_ce if group.sampled and group.teacher is not None else 1.0
        return Coefficients(w.ce * hard, w.beta, w.chunk)

    def group_losses(
        self, group: Group, states: list[Tensor], input_ids: Tensor, head: Any
    ) -> dict[str, Tensor]:
        """Scalars of one group: `loss`, which is minimised, and for the log its parts `ce`, `kl`, `chunk`, `feature`
        and the token `accuracy`; another method of distillation overrides it and may add others.

        Args:
            states: hidden states of the whole batch, [B, T, D], of every layer where `vaa` holds modules, else the
                last one.
            input_ids: int64 [B, T].
            head: the student's output layer.
        """
        device = input_ids.device
        rows, aligned = group.rows.to(device), group.aligned.to(device)
        student = Projection(states[-1][rows], head.weight, getattr(head, "bias", None))
        if not self._taught(group):
            return distillation_losses(aligned, student, input_ids[rows], self.coefficients(group))._asdict()
        assert group.teacher is not None
        teacher = self.teachers[group.teacher]
        assert group.teacher_ids is not None
        assert group.teacher_mask is not None
        ids = group.teacher_ids.to(device)
        with torch.no_grad():
            teacher_states = _decode(teacher.model, ids, group.teacher_mask.to(device), bool(self.vaa))
        output = teacher.model.get_output_embeddings()
        losses = distillation_losses(
            aligned,
            student,
            input_ids[rows],
            self.coefficients(group),
            teacher=Projection(teacher_states[-1], output.weight, getattr(output, "bias", None)),
            teacher_ids=ids,
            vocabulary=teacher.vocabulary,
            temperature=self.weights.temperature,
        )._asdict()
        if self.vaa:
            assert group.student_pool is not None
            assert group.teacher_pool is not None
            losses["feature"] = self.vaa[str(group.teacher)](
                [states[end][rows] for end in block_ends(len(states) - 1, self.blocks)],
                group.student_pool.to(device),
                [teacher_states[end] for end in block_ends(len(teacher_states) - 1, self.blocks)],
                group.teacher_pool.to(device),
            )
            losses["loss"] = losses["loss"] + self.weights.alpha * losses["feature"]
        return losses


def _decode(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, every_layer: bool) -> list[Tensor]:
    """Hidden states [B, T, D]: of every layer, embeddings first, or the last one alone."""
    output = model.base_model(
        input_ids=input_ids,
        attention_mask=mask,
        use_cache=False,
        output_hidden_states=every_layer,
        return_dict=True,
    )
    return (
        [*output.hidden_states[:-1], output.last_hidden_state] if every_layer else [output.last_hidden_state]
    )


def _alignment(teacher: Teacher, document: Document, own: Encoded, theirs: Encoded) -> Alignment:
    """A document as the student has read it with the same as the teacher has; a conversation in the words of two chat
    templates.
    """
    if own.template != theirs.template:
        return align_offsets(own.offsets, theirs.offsets, [start - 1 for start, _ in document.contents])
    if teacher.vocabulary.identical:
        return identity_alignment(min(len(own.input_ids), len(theirs.input_ids)))
    return align_offsets(own.offsets, theirs.offsets)


def _end(encoded: Encoded) -> int:
    return int(encoded.offsets[:, 1].max(initial=0))


def _pad(
    sequences: list[np.ndarray], tokenizer: PreTrainedTokenizerBase, multiple: int, limit: int | None
) -> tuple[Tensor, Tensor]:
    """int64 ids [B, T] and mask [B, T], padded on the right to a `multiple` of tokens, if not beyond the `limit` of the
    model; what the padding holds is masked out.
    """
    longest = max(len(sequence) for sequence in sequences)
    length = -(-longest // multiple) * multiple
    length = length if limit is None else max(min(length, limit), longest)
    ids = torch.full((len(sequences), length), tokenizer.eos_token_id or 0)
    mask = torch.zeros((len(sequences), length), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask
