"""What a device sends and what its training takes: ours against FedJETS, computed at the paper's sizes, measured at
smaller.

FedJETS (arXiv 2306.08586) as the paper describes it: a device downloads an MoE pruned to a few experts, trains and
uploads it, round after round. Ours uploads an on-device model once. Counted are the bytes of tensors; a tokenizer,
a config and headers come on top of both. Memory at the paper's sizes is `models.estimate_training_bytes`, which
`measure` holds against real processes.
"""

from __future__ import annotations

import copy
import math
import platform
import re
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from jinja2 import Environment, PackageLoader
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig

from deepfusion import __version__
from deepfusion.config import load_config
from deepfusion.errors import InputError
from deepfusion.families.base import is_expert_name, moe_config, of, parameter_count
from deepfusion.families.bases import base_checkpoint, layout
from deepfusion.families.qwen import QWEN2_MOE
from deepfusion.learning.corpus import Window
from deepfusion.learning.distillation import Collator, Distiller, LossWeights
from deepfusion.learning.memory import RUNTIME_BYTES, estimate_training_bytes, require_memory
from deepfusion.learning.training import train
from deepfusion.models import compact
from deepfusion.models.architecture import architecture, parameter_total, read_config
from deepfusion.models.loading import load_tokenizer
from deepfusion.models.presets import LORA_TARGETS, METHODS, model_config
from deepfusion.runfolder import hardware
from deepfusion.sections import Encoding
from deepfusion.text.rows import Document

ROUNDS = 4
"""Rounds of FedJETS where nothing else is said. Our choice: the paper gives no number."""
DEVICES = (16, 32, 64, 128)
LORA_RANK = 16
BATCHES = (1, 8)
"""Documents a step; 8 is what a config starts with. The paper gives neither these nor lengths."""
TOKENS = 341
"""Tokens of a document: 1,024 characters, what a config starts with, at three a token."""

COMPARED = (("full", "full"), ("lora", "lora"), ("qlora", "qlora"), ("qlora", "lora"))
"""How a device of ours trains, and how one of FedJETS: NF4 quantises linear layers, and the fused experts of an MoE
are none.
"""

_QWEN: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "tie_word_embeddings": False,
}  # fmt: skip
# Two shared experts of 1,408 are one of 2,816. Qwen2Moe without qkv bias is DeepSeek-MoE v1, see `families`.
_DEEPSEEK: dict[str, Any] = _QWEN | {
    "vocab_size": 102400, "intermediate_size": 10944, "num_hidden_layers": 28, "num_experts": 64,
    "num_experts_per_tok": 6,
    "shared_expert_intermediate_size": 2816, "mlp_only_layers": [0], "qkv_bias": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A case study of the paper: its global MoE, its on-device models, and what it reads off its own charts for N =
    128.

    Attributes:
        source: where the dimensions of the MoE stand.
        ours_bytes, fedjets_bytes: total communication.
        memory_bytes: of the training of each type.
    """

    title: str
    source: str
    dimensions: dict[str, Any]
    types: tuple[str, ...]
    ours_bytes: int
    fedjets_bytes: int
    memory_bytes: tuple[int, ...]

    @property
    def moe(self) -> PretrainedConfig:
        """The global MoE."""
        return QWEN2_MOE.config_class(**self.dimensions)


GB = 10**9
PAPER_FEDJETS_MEMORY = 24 * GB
CASES = {
    "medical": Case(
        "Qwen1.5-MoE-A2.7B", "config.json of Qwen/Qwen1.5-MoE-A2.7B", _QWEN, ("gpt2", "gpt2-medium", "tinyllama"),
        90 * GB, 300 * GB, (26 * GB // 10, 36 * GB // 10, 72 * GB // 10),
    ),
    "finance": Case(
        "DeepSeek-MoE-16B", "config.json of "
                            "deepseek-ai/deepseek-moe-16b-base", _DEEPSEEK, ("tinyllama", "olmo-1b", "bloom-1b1"),
        130 * GB, 245 * GB, (72 * GB // 10, 55 * GB // 10, 48 * GB // 10),
    ),
}  # fmt: skip


# Bytes that cross the network.


def moe_tensors(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of an MoE; those that only the class that computes it has are left out."""
    family = of(config)
    tensors = architecture(config).tensors
    return {name: shape for name, shape in tensors.items() if family is None or not family.pinned(name)}


def pruned(config: PretrainedConfig, experts: int) -> PretrainedConfig:
    """The MoE that a device of FedJETS holds: so many routed experts a layer, and all the rest."""
    small = copy.deepcopy(config)
    small.num_experts = experts
    small.num_experts_per_tok = min(experts, small.num_experts_per_tok)
    return small


def travelling_bytes(config: PretrainedConfig) -> dict[str, int]:
    """bf16 bytes of a pruned MoE: `all` of it, and its `experts` with the gate."""
    sizes = {name: 2 * math.prod(shape) for name, shape in moe_tensors(config).items()}
    specific = [
        size for name, size in sizes.items() if is_expert_name(name) or name.endswith(".mlp.gate.weight")
    ]
    return {"all": sum(sizes.values()), "experts": sum(specific)}


def upload_bytes(config: PretrainedConfig) -> dict[str, int]:
    """What one upload of an on-device model takes, by its kind, where training changed every tensor.

    Full weights are as precise as the public checkpoint, so both precisions stand here; LoRA matrices are float32.
    """
    known = architecture(config)
    trained = {name: shape for name, shape in known.tensors.items() if name not in known.buffers}
    with (
        torch.device("meta"),
        warnings.catch_warnings(action="ignore"),
    ):  # PEFT's, on GPT-2's transposed weights
        model = AutoModelForCausalLM.from_config(config)
        adapter = get_peft_model(
            model, LoraConfig(r=LORA_RANK, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
        )
    total = sum(math.prod(shape) for shape in known.tensors.values())
    found = {"weights, fp32": 4 * total, "weights, bf16": 2 * total}
    for encoding in get_args(Encoding)[1:]:
        stored = [
            part
            for name, shape in trained.items()
            for part in compact.stored_tensors(name, shape, encoding).values()
        ]
        found[encoding] = sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored)
    return found | {
        f"LoRA, rank {LORA_RANK}": 4 * sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    }


def communication(rounds: int = ROUNDS) -> dict[str, Any]:
    """Bytes of N devices with the types in equal shares, at the paper's sizes.

    Args:
        rounds: of FedJETS.

    Raises:
        InputError: less than one round.
    """
    if rounds < 1:
        raise InputError(f"{rounds} rounds", where="rounds", allowed="1 or more", code="bad-rounds")
    return {
        "kind": "computed",
        "rounds": rounds,
        "cases": {name: _case_communication(case, rounds) for name, case in CASES.items()},
    }


def _case_communication(case: Case, rounds: int) -> dict[str, Any]:
    kept = case.moe.num_experts_per_tok
    size = travelling_bytes(pruned(case.moe, kept))
    rest = size["all"] - size["experts"]
    counts = parameter_count(case.moe)
    absent = counts["total"] - sum(map(math.prod, moe_tensors(case.moe).values()))
    fedjets = {
        f"all of it down and up, {rounds} rounds": 2 * rounds * size["all"],
        f"experts and gate down and up, {rounds} rounds; the rest down once": 2 * rounds * size["experts"]
        + rest,
        "all of it down and up, 1 round": 2 * size["all"],
        "experts and gate down and up, 1 round; the rest down once": 2 * size["experts"] + rest,
        "experts and gate up, 1 round; downloads not counted": size["experts"],
    }
    ours = {type: upload_bytes(model_config(type)) for type in case.types}
    means = {kind: sum(sizes[kind] for sizes in ours.values()) / len(ours) for kind in ours[case.types[0]]}
    return {
        "moe": {"name": case.title, "source": case.source, "experts_kept": kept, "bf16": size}
        | {count: number - absent for count, number in counts.items() if count != "computing"},
        "ours": {"by_type": ours, "total": {kind: {str(n): round(n * mean) for n in DEVICES} for kind,
        mean in means.items()}},
        "fedjets": {
            "by_device": fedjets,
            "total": {name: {str(n): n * each for n in DEVICES} for name, each in fedjets.items()},
        },
        "saving": {kind: {name: 1 - mean / each for name, each in fedjets.items()} for kind, mean in means.items()},
        "paper": {"ours": case.ours_bytes, "fedjets": case.fedjets_bytes,
        "saving": 1 - case.ours_bytes / case.fedjets_bytes},
    }  # fmt: skip


# Memory of a device.


def memory() -> dict[str, Any]:
    """Estimated peak bytes of a training process, of every on-device type and of FedJETS' pruned MoE, at the paper's
    sizes.

    FedJETS trains as many experts a layer as a token consults, or twice as many; with lora and qlora each of them
    gets matrices of its own, and qlora has them in 4 bits too, which no library at hand does: that is in favour of
    FedJETS.
    """
    return {
        "kind": "computed",
        "tokens": TOKENS,
        "cases": {name: _case_memory(case) for name, case in CASES.items()},
    }


def _case_memory(case: Case) -> dict[str, Any]:
    kept = case.moe.num_experts_per_tok
    ours: dict[str, PretrainedConfig] = {type: model_config(type) for type in case.types}
    theirs = {f"{experts} experts": pruned(case.moe, experts) for experts in (kept, 2 * kept)}
    settings = [
        (method, precision, batch)
        for method in METHODS
        for precision in ("bf16", "fp32")
        for batch in BATCHES
    ]
    rows: list[dict[str, Any]] = []
    for method, precision, batch in settings:
        sizes = {
            name: estimate_training_bytes(config, method, batch, TOKENS, precision, LORA_RANK)
            for name, config in (ours | theirs).items()
        }
        rows.append({"method": method, "precision": precision, "batch": batch, "bytes": sizes})
    comparisons = [
        {
            "ours": mine["method"],
            "fedjets": its["method"],
            "precision": mine["precision"],
            "batch": mine["batch"],
        }
        | {
            "ratio": {
                experts: {type: its["bytes"][experts] / mine["bytes"][type] for type in ours}
                for experts in theirs
            }
        }
        for mine in rows
        for its in rows
        if (mine["method"], its["method"]) in COMPARED
        and (mine["precision"], mine["batch"]) == (its["precision"], its["batch"])
    ]
    return {
        "moe": case.title,
        "parameters": {name: parameter_total(config) for name, config in (ours | theirs).items()},
        "experts_kept": list(theirs),
        "rows": rows,
        "comparisons": comparisons,
        "paper": {
            "fedjets": PAPER_FEDJETS_MEMORY,
            "ours": dict(zip(case.types, case.memory_bytes, strict=True)),
        },
    }


# Real processes.

_HALVED = re.compile(
    r"(n_embd|n_layer|n_head|num_hidden_layers|hidden_size|\w*intermediate_size|num_attention_heads|num_key_value_heads)"
)
_QUARTERED = re.compile(r"(vocab_size|n_positions)")


def eighth(config: PretrainedConfig) -> PretrainedConfig:
    """Half as wide and half as deep, with a quarter of the vocabulary: an eighth of the weights in every part of the
    model.
    """
    small = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if isinstance(value, int) and (_HALVED.fullmatch(key) or _QUARTERED.fullmatch(key)):
            setattr(small, key, value // (2 if _HALVED.fullmatch(key) else 4))
        elif key.endswith("_token_id"):
            setattr(small, key, None)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: small.num_hidden_layers]
    return small


def measure(out: Path, batch: int = 1, tokens: int = 128, steps: int = 2) -> dict[str, Any]:
    """Peak memory of real trainings of all weights in fp32, each in a process of its own, one after the other.

    Trained are eighths of the on-device types and of the pruned MoEs, then tiny models, whose runtime outweighs
    their weights. On the CPU the peak is the resident memory of the process, on a GPU that of the allocator, which
    has no runtime in it.

    Args:
        out: folder for what the trainings write, removed afterwards.
        batch, tokens: documents a step, tokens a document.
        steps: of the optimizer; from the second on, its moments are there too.

    Raises:
        InputError: the largest training needs more memory than is free.
    """
    eighths = {type: eighth(model_config(type)) for case in CASES.values() for type in case.types}
    moes = {name: eighth(pruned(case.moe, case.moe.num_experts_per_tok)) for name, case in CASES.items()}
    tiny = {type: model_config(type) for type in ("tiny-gpt2", "tiny-llama")}
    quickstart = load_config()
    tiny_moe = pruned(
        moe_config(read_config(base_checkpoint(quickstart)), layout(quickstart)), quickstart.top_k
    )
    jobs = (
        eighths
        | {f"FedJETS, {CASES[name].title}": moe for name, moe in moes.items()}
        | tiny
        | {"FedJETS, tiny": tiny_moe}
    )
    estimates = {
        name: estimate_training_bytes(config, "full", batch, tokens) for name, config in jobs.items()
    }
    peaks = trained_peaks(jobs, out, batch, tokens, steps)
    pairs = {f"FedJETS, {case.title}": case.types for case in CASES.values()} | {"FedJETS, tiny": tuple(tiny)}
    return {
        "kind": "measured", "method": "full", "precision": "fp32", "batch": batch, "tokens": tokens, "steps": steps,
        "runtime": 0 if torch.cuda.is_available() else RUNTIME_BYTES,
        "models": {
            name: {"parameters": parameter_total(config), "estimate": estimates[name], "peak": peaks[name]}
            for name, config in jobs.items()
        },
        "ratio": {moe: {type: peaks[moe] / peaks[type] for type in types} for moe, types in pairs.items()},
        "hardware": hardware(),
        "versions": {"deepfusion": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "peft")},
    }  # fmt: skip


def trained_peaks(
    configs: dict[str, PretrainedConfig], out: Path, batch: int, tokens: int, steps: int
) -> dict[str, int]:
    """Peak bytes of a training of each config, one process after the other, which write below `out` and leave nothing
    there.

    Raises:
        InputError: the largest needs more memory than is free.
    """
    needed = max(estimate_training_bytes(config, "full", batch, tokens) for config in configs.values())
    require_memory(needed, "the largest training", where="bench costs", fix="leave out --measure")
    # A fresh process for each: what the C library has once taken it does not give back.
    with (
        tempfile.TemporaryDirectory(dir=out, prefix=".costs-") as work,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        return {
            name: pool.submit(_peak, config, batch, tokens, steps, Path(work)).result()
            for name, config in configs.items()
        }


def _peak(config: PretrainedConfig, batch: int, tokens: int, steps: int, work: Path) -> int:
    """Peak bytes of this process after a few steps of the product's own training, with random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    document = Window(Document("", " ".join(map(str, range(tokens))), "costs"), "private")
    collator = Collator(load_tokenizer("tiny-gpt2"), {}, 0.0, tokens)
    train(
        Distiller(model, LossWeights()), [[document] * batch] * steps, collator,
        stage="bench", unit="costs", work=work, learning_rate=1e-4, precision="fp32", seed=0,
        checkpoint_seconds=math.inf,
    )  # fmt: skip
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss: that one remembers the process which started this one.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert found is not None
    return 1024 * int(found[1])


# The tables.


def tables(costs: dict[str, Any]) -> str:
    """Markdown of `communication` and `memory`, and of `measure` where it was run, under these keys (the last:
    `measured`).
    """
    environment = Environment(
        loader=PackageLoader("deepfusion_bench", "."), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"gb": _gb, "row": lambda cells: f"| {' | '.join(map(str, cells))} |"}
    return environment.get_template("costs.md.j2").render(costs).strip() + "\n"


def _gb(size: float) -> str:
    """In 10^9 bytes, three digits."""
    return f"{size / GB:,.0f}" if size >= 100 * GB else f"{size / GB:#.3g}".rstrip(".")
