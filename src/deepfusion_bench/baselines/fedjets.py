"""FedJETs: devices train compact MoEs pruned from the global one, over several rounds, and the server averages them.

Dun, Hipolito Garcia, Zheng, Awadallah, Sim, Kyrillidis, Dimitriadis (2023), "FedJETs: Efficient Just-In-Time
Personalization with Federated Mixture of Experts", arXiv 2306.08586; as [DF] compares with it: in each round a device
downloads the gate and a few experts with all that is not a routed expert, trains that on its private text and
uploads it; the server averages expert by expert.

What is from the source: the gate chooses the experts of a device by the device's own text; *anchor* devices, one
for each expert, keep training theirs whatever the gate says, or a young gate sends everybody to the same few. What
is ours:

- An expert of the source is a whole network beside a frozen common one. Here it is a base, `merge.split` routed
  experts of each layer, and a choice is made layer by layer; the public weights in the start play the part of the
  common expert.
- The source takes anchors of known, distinct data. A server knows no such thing: a draft on the untrained gate
  finds them, and spreads the experts evenly in the first round.
- The learning-rate schedule, one over all rounds, which does better than one in each. Every round warms up to its
  part of it.
- The source adds a loss that draws the gate of an anchor to its expert. Here a load balance is all there is beside
  L_CE.
- Choosing needs the global gate at all layers. What that costs a device in downloads and computing is not counted.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from deepfusion import __version__, progress
from deepfusion.errors import InputError
from deepfusion.families.base import (
    expert_parameters,
    names,
    of,
    pinned_parameters,
    router_logits_by_layer,
    scores_of,
)
from deepfusion.folders import bind, remove, whole_folder, write_whole
from deepfusion.inputs import request
from deepfusion.learning.corpus import Window
from deepfusion.learning.distillation import Collator, Distiller, LossWeights
from deepfusion.learning.losses import router_shares
from deepfusion.learning.order import reading_order, training_steps
from deepfusion.learning.training import train
from deepfusion.models.architecture import stored_dtype
from deepfusion.models.checkpoints import WEIGHTS
from deepfusion.models.loading import (
    compute_device,
    context_limit,
    load_model,
    load_tokenizer,
    resolve_precision,
)
from deepfusion.report.artefacts import write_model_card
from deepfusion.schema import Config
from deepfusion.sections import Section
from deepfusion.text.splits import make_splits
from deepfusion.text.windows import cut_windows

SEEN = 16  # documents of a device that the gate looks at
_PER_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.(?:experts\.\w+|gate\.\w+)")

Kept = dict[int, Tensor]
"""The routed experts of a compact MoE: layer -> int64 indices into those of the global one, ascending."""


class FedJETS(Section):
    """Settings of the baseline; steps and batches of a device are those of the section `device`."""

    rounds: int = Field(4, ge=1, description="rounds that the steps of a device are shared out to")
    experts_per_device: int = Field(
        2, ge=1, description="experts of a compact MoE, in bases: times merge.split routed experts"
    )
    learning_rate: float = Field(
        2e-3, gt=0, description="peak of the one learning-rate schedule (cosine) over all rounds"
    )
    balance_weight: float = Field(
        0.01, ge=0, description="weight of the load balance, computed layer by layer"
    )


@dataclass(frozen=True)
class Member:
    """A device: its private text, what it reads in each round, and its private tokens, the weight of its uploads."""

    name: str
    windows: list[Window]
    rounds: list[list[list[int]]]
    tokens: int


def run(config: Config, inputs: dict[str, Path], out: Path, settings: FedJETS = FedJETS()) -> dict[str, Any]:  # noqa: B008 - frozen
    """Trains `inputs["start"]`, a global MoE as the merge stage writes it, on the devices; writes `out`/moe/final.

    A run that was killed continues after the last device that finished, and ends with the same weights.

    Returns:
        {"devices": {id: {"up_bytes", "down_bytes"}} over all rounds, "total_up_bytes", "total_down_bytes", "rounds",
        "steps": {id: number}, "losses": mean training L_CE of each round in nats per counted token}; also in
            `out`/fedjets.json.

    Raises:
        InputError: no private data, or a start that cannot be pruned (`fedjets-family`).
    """
    done, work = out / "fedjets.json", out / "work"
    asked = request(config, inputs["start"], __version__, __name__, settings.model_dump_json())
    bind(out, asked, done, work, out / "moe")
    if not done.is_file():
        with _short_trainings():
            summary = _all_rounds(config, inputs["start"], out, settings)
        write_whole(done, json.dumps(summary, indent=2) + "\n")
    remove(work)
    return json.loads(done.read_text())


# The compact MoE -----------------------------------------------------------------------------------------------------


def compact_model(moe: PreTrainedModel, bases: int, kept: int) -> PreTrainedModel:
    """A model of the same class with the experts of `kept` of `bases` bases in each layer, for `load_compact` to fill.

    Where the weights of the chosen experts add up to 1 in the global MoE they do so in this one.

    Raises:
        InputError: the architecture has no routed experts, or groups of them that pruning would break.
    """
    config = copy.deepcopy(moe.config)
    count, routed = _routed_experts(moe)
    if not routed or routed % bases:
        raise _unfit(f"{routed} routed experts", f"a multiple of experts={bases} ({', '.join(names())})")
    size = routed // bases * kept
    changes: dict[str, Any] = {count: size, "num_experts_per_tok": min(config.num_experts_per_tok, size)}
    family = of(config)
    if family is None:
        raise _unfit(f"a model of type {config.model_type}", ", ".join(names()))
    if size < family.least_routed:
        allowed = f"fedjets.experts_per_device of {family.least_routed} or more"
        raise _unfit(f"a {family.name} of {size} routed expert", allowed)
    changes |= family.pruned(config, bases, kept)
    config.update(changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(moe.device).eval()


def load_compact(compact: PreTrainedModel, moe: PreTrainedModel, kept: Kept) -> None:
    """Copies the weights of the global MoE into the compact one, of the routed experts and gate rows those in
    `kept`."""
    source = tensors_of(moe)
    with torch.no_grad():
        for name, tensor in tensors_of(compact).items():
            rows = _rows(name, kept)
            tensor.copy_(source[name] if rows is None else source[name][rows.to(tensor.device)])


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What makes up a checkpoint: parameters, tied ones once, and stored buffers; they share memory with the model."""
    stored = model.state_dict().keys()
    return {name: p.data for name, p in model.named_parameters()} | {
        n: b for n, b in model.named_buffers() if n in stored
    }


def wire_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of all tensors of a model in `dtype`."""
    return sum(tensor.numel() for tensor in tensors_of(model).values()) * dtype.itemsize


def aggregate(
    moe: PreTrainedModel, uploads: Iterable[tuple[dict[str, Tensor], Kept, float]], dtype: torch.dtype
) -> None:
    """Averages compact MoEs into the global one: every expert and gate row over those that had it.

    It sums fp32 differences to the global weights, so what comes back unchanged changes no bit. One upload is held
    at a time.

    Args:
        uploads: tensors by name, the experts they are of, and the weight of the device in all means.
        dtype: the new weights are rounded to it, as devices will get them.
    """
    own = tensors_of(moe)
    shift = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in own.items()}
    # Of each row of an expert tensor, else of the whole tensor.
    total = {
        name: t.new_zeros(len(t) if _PER_EXPERT.fullmatch(name) else 1, dtype=torch.float32)
        for name, t in own.items()
    }
    for tensors, kept, weight in uploads:
        for name, tensor in tensors.items():
            rows = _rows(name, kept)
            where = slice(None) if rows is None else rows.to(own[name].device)
            shift[name][where] += (tensor.to(own[name].device).float() - own[name][where]) * weight
            total[name][where] += weight
    for name, tensor in own.items():
        weights = total[name].view(-1, *[1] * (tensor.dim() - 1))
        mean = tensor + torch.where(weights > 0, shift[name] / weights, 0.0)
        tensor.copy_(mean.to(dtype))


def _routed_experts(model: PreTrainedModel) -> tuple[str, int]:
    """The setting of a config that counts the routed experts of a layer, and their number; 0 in a dense model."""
    count = "n_routed_experts" if hasattr(model.config, "n_routed_experts") else "num_experts"
    return count, getattr(model.config, count) if expert_parameters(model) else 0


def _rows(name: str, kept: Kept) -> Tensor | None:
    """The rows of a global tensor that a compact MoE has; None for all of it."""
    found = _PER_EXPERT.fullmatch(name)
    return kept[int(found[1])] if found else None


def _unfit(what: str, allowed: str) -> InputError:
    return InputError(what, where="start", allowed=allowed, code="fedjets-family")


# The choice of experts -----------------------------------------------------------------------------------------------


def preferences(
    moe: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: list[Window], bases: int
) -> dict[int, Tensor]:
    """What the gate makes of some documents: layer -> fp64 [bases], the mean probability of each base's experts, sum
    1.
    """
    batch = Collator(tokenizer, {}, 0.0, context_limit(moe))(windows)
    mask = batch["attention_mask"].to(moe.device)
    with torch.no_grad(), router_logits_by_layer(moe) as logits:
        moe.base_model(input_ids=batch["input_ids"].to(moe.device), attention_mask=mask, use_cache=False)
    found = {}
    for layer, scores in logits.items():
        read = scores[mask.flatten().bool()].double().cpu()
        shares = router_shares(read, scores_of(moe.config))
        found[layer] = shares.mean(0).view(bases, -1).sum(-1)
    return found


def draft(scores: Tensor, kept: int) -> tuple[list[list[int]], dict[int, int]]:
    """Spreads bases over devices: the bases with the fewest devices draft those that lean towards them most.

    Args:
        scores: [devices, bases]; only how a device differs from the mean of all counts, an untrained gate favours
            some bases.
        kept: bases of each device.

    Returns:
        The bases of each device, and the anchors: device -> the base that drafted it first of all.
    """
    devices, bases = scores.shape
    lean = (scores - scores.mean(0)).tolist()
    held: list[list[int]] = [[] for _ in range(devices)]
    used = [0] * bases
    anchors: dict[int, int] = {}
    for _ in range(devices * kept):
        free = [
            (d, b) for d in range(devices) if len(held[d]) < kept for b in range(bases) if b not in held[d]
        ]
        device, base = min(
            free, key=lambda pair: (len(held[pair[0]]), used[pair[1]], -lean[pair[0]][pair[1]])
        )
        if not held[device] and not used[base]:
            anchors[device] = base
        held[device].append(base)
        used[base] += 1
    while max(used) - min(used) > 1:  # the last devices had little choice left
        most, least = used.index(max(used)), used.index(min(used))
        able = [
            d for d in range(devices) if most in held[d] and least not in held[d] and anchors.get(d) != most
        ]
        device = max(able, key=lambda d: lean[d][least] - lean[d][most])
        held[device][held[device].index(most)] = least
        used[most] -= 1
        used[least] += 1
    return held, anchors


def _most_likely(shares: Tensor, kept: int, anchor: int | None) -> list[int]:
    """The bases of a device in one layer: its anchor's, then those that the gate finds most likely."""
    order = shares.argsort(descending=True, stable=True).tolist()
    first = [] if anchor is None else [anchor]
    return (first + [base for base in order if base not in first])[:kept]


def _experts(bases: list[int], split: int) -> Tensor:
    return torch.tensor([base * split + part for base in sorted(bases) for part in range(split)])


# The rounds ----------------------------------------------------------------------------------------------------------


def _all_rounds(config: Config, start: Path, out: Path, settings: FedJETS) -> dict[str, Any]:
    """All rounds from the last that is stored below `out`/work; writes the result."""
    work, dtype = out / "work", stored_dtype(start)
    tokenizer, moe = load_tokenizer(start), load_model(start, "fp32")
    nn.Module.to(moe, compute_device())
    kept = min(settings.experts_per_device, config.experts)
    compact = compact_model(moe, config.experts, kept)
    split = _routed_experts(moe)[1] // config.experts
    members = _members(config, tokenizer, settings.rounds)
    rounds = len(members[0].rounds)
    at_start = _all_preferences(config, moe, tokenizer, members)
    drafted, anchors = draft(torch.stack([torch.stack(list(own.values())).mean(0) for own in at_start]), kept)
    losses = _restore(work, moe)
    for number in range(len(losses), rounds):
        if number == 0:
            chosen = [dict.fromkeys(own, bases) for own, bases in zip(at_start, drafted, strict=True)]
        else:
            liked = enumerate(_all_preferences(config, moe, tokenizer, members))
            chosen = [{x: _most_likely(p, kept, anchors.get(i)) for x, p in own.items()} for i, own in liked]
        choices = [{layer: _experts(bases, split) for layer, bases in own.items()} for own in chosen]
        uploads = work / f"uploads-{number}"
        found = []
        for member, own in zip(members, choices, strict=True):
            if not (uploads / member.name).is_dir():
                load_compact(compact, moe, own)
                loss = _train(config, settings, compact, tokenizer, member, number, work / "training")
                _store(uploads / member.name, tensors_of(compact), dtype, [loss])
            found.append(_stored_losses(uploads / member.name)[0])
        received = (load_file(uploads / member.name / WEIGHTS) for member in members)
        aggregate(moe, zip(received, choices, [float(m.tokens) for m in members], strict=True), dtype)
        losses.append(sum(found) / len(found))
        _store(work / f"round-{number}", tensors_of(moe), dtype, losses)
        remove(uploads)
        remove(work / f"round-{number - 1}")
        used = [
            sum(any(base in bases for bases in own.values()) for own in chosen)
            for base in range(config.experts)
        ]
        progress.say(
            f"[fedjets] round {number + 1}/{rounds}  loss {losses[-1]:.3f}  devices on base: "
            + ", ".join(f"{base} {count}" for base, count in enumerate(used))
        )
    nn.Module.to(moe, dtype)
    _write_final(moe, tokenizer, config, rounds, out / "moe" / "final")
    moved = wire_bytes(compact, dtype) * rounds
    return {
        "devices": {member.name: {"up_bytes": moved, "down_bytes": moved} for member in members},
        "total_up_bytes": moved * len(members),
        "total_down_bytes": moved * len(members),
        "rounds": rounds,
        "steps": {member.name: sum(map(len, member.rounds)) for member in members},
        "losses": losses,
    }


def _members(config: Config, tokenizer: PreTrainedTokenizerBase, rounds: int) -> list[Member]:
    """The devices; each reads the documents of one long order, cut into rounds of equal steps, at least one a round."""
    private = make_splits(config).private
    if not private:
        fix = "--set data.private=FILE.jsonl"
        raise InputError("there is no private data", where="data.private", fix=fix, code="no-private-data")
    rounds = min(rounds, config.device.steps)
    members = []
    for number, (name, documents) in enumerate(private.items()):
        windows = [
            Window(piece, "private")
            for document in documents
            for piece in cut_windows(document, config.data.max_chars)
        ]
        lengths = [len(document.document.text) for document in windows]
        batch_size = config.device.batch_size
        steps = max(
            rounds, training_steps(config.device.steps, config.device.epochs, len(windows), batch_size)
        )
        order = reading_order(lengths, steps, batch_size, config.seed + number)
        ends = [steps * part // rounds for part in range(rounds + 1)]
        parts = [order[begin:end] for begin, end in pairwise(ends)]
        tokens = sum(
            len(tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids)
            for document in documents
        )
        members.append(Member(name, windows, parts, tokens))
    return members


def _all_preferences(
    config: Config, moe: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, members: list[Member]
) -> list[dict[int, Tensor]]:
    moe.eval()
    return [preferences(moe, tokenizer, member.windows[:SEEN], config.experts) for member in members]


def _train(
    config: Config, settings: FedJETS, compact: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, member: Member,
    number: int, work: Path,
) -> float:  # fmt: skip
    """Trains the compact MoE on one device; the mean L_CE of its steps."""
    pinned = set(pinned_parameters(compact))
    for name, parameter in compact.named_parameters():
        parameter.requires_grad_(name not in pinned)
    begin_share, end_share = (_rate_share(done / len(member.rounds)) for done in (number, number + 1))
    history = train(
        Distiller(compact, LossWeights(balance=settings.balance_weight)),
        [[member.windows[index] for index in batch] for batch in member.rounds[number]],
        Collator(tokenizer, {}, config.data.prompt_loss_weight, context_limit(compact)),
        stage="fedjets",
        unit=f"{member.name} round {number + 1}",
        work=work,
        learning_rate=settings.learning_rate * begin_share,
        end_share=end_share / begin_share,
        precision=resolve_precision(config.precision, compact.config),
        seed=config.seed,
        checkpoint_seconds=math.inf,  # a device is soon trained again, and its mean loss is that of all its steps
    )
    ends = [0.0, *(row["step"] for row in history)]
    return (
        sum(row["ce"] * (end - begin) for row, (begin, end) in zip(history, pairwise(ends), strict=True))
        / ends[-1]
    )


def _rate_share(done: float) -> float:
    """Share of the peak rate that a cosine is at when so much of its training is done."""
    return (1 + math.cos(math.pi * done)) / 2


def _store(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype, losses: list[float]) -> None:
    """Tensors as they cross the wire, with the losses they come from; whole or not at all."""
    with whole_folder(folder) as part:
        rounded = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
        save_file(rounded, part / WEIGHTS, metadata={"losses": json.dumps(losses)})


def _stored_losses(folder: Path) -> list[float]:
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        return json.loads(file.metadata()["losses"])


def _restore(work: Path, moe: PreTrainedModel) -> list[float]:
    """Puts the weights after the last finished round into the global MoE; the losses of the rounds so far."""
    finished = sorted(work.glob("round-*"), key=lambda path: int(path.name.split("-")[1]))
    if not finished:
        return []
    stored = load_file(finished[-1] / WEIGHTS)
    for name, tensor in tensors_of(moe).items():
        tensor.copy_(stored[name])
    return _stored_losses(finished[-1])


def _write_final(
    moe: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, rounds: int, final: Path
) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.is_dir():  # killed between this and the summary
        return
    with whole_folder(final) as part:
        moe.save_pretrained(part)
        tokenizer.save_pretrained(part)
        text = "A baseline: a Mixture-of-Experts model whose experts devices trained over several rounds (FedJETs)."
        facts = {
            "family": config.family,
            "rounds": rounds,
            "steps of a device, at most": config.device.steps,
            "seed": config.seed,
        }
        write_model_card(part, "FedJETs", text, facts)


@contextmanager
def _short_trainings() -> Iterator[None]:
    """What hundreds of trainings of small models want: one thread, on which results then do not depend, and quick
    clean-ups.
    """
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    gc.freeze()  # every training ends with a full garbage collection, which need not look at all that was imported
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
