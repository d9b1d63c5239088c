"""What happens on a device: train the on-device model on private text, and pack what leaves the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel

from deepfusion import __version__, progress
from deepfusion.errors import InputError
from deepfusion.folders import LOCK, local_path, locked, open_work, put, remove, whole_folder, work_key
from deepfusion.inputs import request
from deepfusion.jobs import run_jobs
from deepfusion.learning.corpus import Window
from deepfusion.learning.distillation import Collator, Distiller, LossWeights
from deepfusion.learning.memory import estimate_training_bytes, parse_memory, plan_training
from deepfusion.learning.metrics import evaluate_model
from deepfusion.learning.order import reading_order, training_steps
from deepfusion.learning.training import train
from deepfusion.models.architecture import read_config, stored_dtype
from deepfusion.models.checkpoints import WholeModel
from deepfusion.models.compact import open_base, write_delta
from deepfusion.models.loading import (
    compute_device,
    context_limit,
    load_model,
    load_tokenizer,
    resolve_precision,
)
from deepfusion.models.presets import LORA_TARGETS, PRESETS, base_digest, model_config, require_plain, resolve
from deepfusion.models.signature import type_signature
from deepfusion.names import check_device_id, device_id
from deepfusion.records import Card
from deepfusion.report.artefacts import write_transport
from deepfusion.schema import Config, cluster_count
from deepfusion.sections import DeviceSection, DeviceSpec, Encoding
from deepfusion.text.embedding import embed
from deepfusion.text.rows import Document
from deepfusion.text.sources import load_source, local_files, shuffled
from deepfusion.text.splits import make_splits
from deepfusion.text.windows import cut_windows, say_cut
from deepfusion.uploads.card import CARD, check_made, claim_upload, note_made, read_card, write_card

REVISION = 1
"""Raised when the same settings and data come to another upload."""

_READ = ("data.max_chars", "data.prompt_loss_weight")  # of the section data, by `train_device`
_TRAINING = tuple(key for key in DeviceSection.model_fields if key != "types")


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Train every device of a simulated federation; writes `out`/uploads/<device>/ and `out`/transport.json.

    Raises:
        InputError: there is no private data, or the devices do not fit `experts`.
    """
    jobs = [
        {
            **device,
            "upload": out / "uploads" / str(device["device"].id),
            "work": out / "work" / str(device["device"].id),
        }
        for device in simulated_devices(config)
    ]
    cards = run_jobs(train_device, jobs, config.jobs)
    write_transport(out / "uploads", out / "transport.json")
    return {
        "devices": len(cards),
        "loss_before": sum(card["loss_before"] for card in cards) / len(cards),
        "loss_after": sum(card["loss_after"] for card in cards) / len(cards),
    }


def simulated_devices(config: Config) -> list[dict[str, Any]]:
    """The devices of a simulation, each with its `config`, `device`, `private` and `held_out` documents for
    `train_device`.

    Raises:
        InputError: there is no private data, or the devices do not fit `experts`.
    """
    splits = make_splits(config)
    if not splits.devices:
        fix = "--set data.private=FILE.jsonl"
        raise InputError("there is no private data", where="data.private", fix=fix, code="no-private-data")
    # Better said now than after all devices have trained.
    cluster_count(config, len(splits.devices), len({device.type for device in splits.devices}))
    return [
        {"config": config, "device": device, "private": splits.private[device.id],
        "held_out": splits.held_out[device.id]}
        for device in splits.devices if device.id is not None
    ]  # fmt: skip


def train_alone(
    config: Config, data: Path, upload: Path, type: str | None, memory: str | None, name: str | None
) -> dict[str, Any]:
    """Train one real device from its own file; what `deepfusion device train` runs.

    Args:
        type: model type; None takes the largest of `device.types` that fits `memory`, or their first without a budget.
        memory: budget of the training process.
        name: of the device; default the name of the upload folder, made one that devices can have.

    An upload that the same request has made is left as it is; an unfinished training of the same request goes on.

    Raises:
        InputError: a bad name or bad data, nothing fits, or `upload` is somebody else's or of another request
            (`not-ours`, `another-upload`).
    """
    types = [local_path(name) for name in ([type] if type else config.device.types) if name not in PRESETS]
    name = device_id(upload.resolve().name) if name is None else check_device_id(name)
    upload = claim_upload(
        upload, [data, *local_files([str(data)]), *(folder for folder in types if folder.is_dir())]
    )
    documents = load_source(str(data))
    say_cut(documents, config.data.max_chars)
    if len(documents) < 2:
        raise InputError("one document is not enough: one is held out", where=data, code="too-few-documents")
    if type is None:
        type = config.device.types[0] if memory is None else _largest(config, memory, documents)
    order = shuffled(documents, config.seed, "held_out")
    count = max(1, len(order) // 10)
    device = DeviceSpec(id=name, type=type, method=None, data=None, memory=memory)
    key = _request(config, data, device)
    if (upload / CARD).is_file():
        check_made(upload, key)
        progress.say(f"[device {name}] {upload} was finished before by the same request, nothing to do")
        return _losses(upload)
    work = upload.with_name(f".{upload.name}.work")
    other = work_key(work)
    if open_work(work, key):
        progress.say(f"[device {name}] continues")
    elif other is not None:
        progress.say(
            f"[device {name}] the unfinished training of another request is given up: this one begins anew"
        )
    with locked(
        work / LOCK,
        InputError("another process trains this upload", where=upload, fix="wait for it", code="run-busy"),
    ):
        losses = train_device(
            config, device, order[count:], order[:count], work / "upload", work / "training"
        )
        note_made(upload, key, work / "upload")
        put(work / "upload", upload)
    remove(work)
    return losses


def _request(config: Config, data: Path, device: DeviceSpec) -> str:
    """Digest of all that the upload of a device depends on, 64 hex digits; of its data and base not where they lie."""
    more = (f"revision {REVISION}", Path(device.type).name, str(device.id))
    keys = ("seed", "precision", *_READ, *(f"device.{key}" for key in _TRAINING))
    return request(config, Path(resolve(device.type)), *more, keys=keys, files=local_files([str(data)]))


def _largest(config: Config, memory: str, documents: list[Document]) -> str:
    plan = plan_training(
        parse_memory(memory), config.device.types, (config.device.method,), config.device.batch_size,
        min(max(len(d.text) for d in documents), config.data.max_chars), config.precision,
        config.device.lora_rank,
    )  # fmt: skip
    if plan["chosen"] is None:
        raise InputError(
            f"no type of device.types can be trained with {memory}", allowed="deepfusion device plan lists what fits",
            code="too-little-memory",
        )  # fmt: skip
    return str(plan["chosen"]["type"])


def train_device(
    config: Config,
    device: DeviceSpec,
    private: list[Document],
    held_out: list[Document],
    upload: Path,
    work: Path,
) -> dict[str, Any]:
    """Train one device and write its upload folder; a finished upload is left alone, an unfinished training goes on.

    Args:
        config: `device`, `data.max_chars`, `data.prompt_loss_weight`, `precision` and `seed` are read.
        device: its id, type and method.
        private: documents to train on; only weights and an embedding of them leave this function.
        held_out: private documents that show how much was learned.
        upload: the folder to write.
        work: folder of the checkpoints.

    Returns:
        The losses before and after, in nats per completion token.
    """
    name, method, encoding = str(device.id), device.method or config.device.method, config.device.upload
    if (upload / CARD).is_file():
        return _losses(upload)
    if device.memory is not None:
        _check_memory(config, device, method)
    base = resolve(device.type)
    precision = resolve_precision(config.precision, read_config(base))
    # Whatever is wrong with the public checkpoint, which others will read tensor by tensor, is said before the
    # training.
    if method != "full":
        require_plain(base)
    public = None if encoding == "weights" else open_base(device.type)
    tokenizer = load_tokenizer(base)
    student = _load_student(base, method, precision, name)
    if method != "qlora":
        torch.nn.Module.to(student, compute_device())
    before = _loss(student, tokenizer, held_out, config)
    adapter = None if method == "full" else _with_lora(student, config)
    steps = _learn(student, tokenizer, private, config, f"{name} {Path(device.type).name}", precision, work)
    student.eval()
    after = _loss(student, tokenizer, held_out, config)
    with whole_folder(upload) as part:
        if public is None:
            error = 0.0
            _save_weights(student, adapter, base, part, device.type)
        else:
            error = _save_change(student, public, encoding, part)
        tokenizer.save_pretrained(part)
        facts = {"encoding_error": error, "loss_before": before, "loss_after": after, "steps": steps}
        card = _card(part, config, device, student, tokenizer, private, facts)
        write_card(part, card)
    remove(work)
    progress.say(f"[device {name}] held-out loss {before:.3f} -> {after:.3f} nats/token")
    return {"loss_before": before, "loss_after": after}


def _with_lora(student: PreTrainedModel, config: Config) -> Any:
    """Put LoRA layers into a model: from here on they alone are trained."""
    torch.manual_seed(config.seed)
    rank = config.device.lora_rank
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(student, settings)


def _learn(
    student: PreTrainedModel, tokenizer: Any, private: list[Document], config: Config, unit: str, precision: str,
    work: Path,
) -> int:  # fmt: skip
    """Train on the windows of private text; the number of steps."""
    windows = [
        Window(piece, "private")
        for document in private
        for piece in cut_windows(document, config.data.max_chars)
    ]
    steps = training_steps(config.device.steps, config.device.epochs, len(windows), config.device.batch_size)
    lengths = [len(d.document.text) for d in windows]
    order = reading_order(lengths, steps, config.device.batch_size, config.seed)
    train(
        Distiller(student, LossWeights()),
        [[windows[i] for i in batch] for batch in order],
        Collator(tokenizer, {}, config.data.prompt_loss_weight, context_limit(student), precision=precision),
        stage="device",
        unit=unit,
        work=work,
        learning_rate=config.device.learning_rate,
        precision=precision,
        seed=config.seed,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    return steps


def _card(
    folder: Path, config: Config, device: DeviceSpec, student: PreTrainedModel, tokenizer: Any,
    private: list[Document], facts: dict[str, Any],
) -> Card:  # fmt: skip
    """What the upload in `folder` says about itself; `facts` are those of the training."""
    method = device.method or config.device.method
    # A path may name the device's owner, and all weights need no place on the server.
    named = Path(device.type).name if Path(device.type).exists() else device.type
    whole = method == "full" and config.device.upload == "weights"
    texts = [document.text for document in private]
    read = (tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts)
    return Card(
        device=str(device.id),
        type=named,
        model_class=type(student).__name__,
        signature=type_signature(folder, base_digest(device.type)),
        base=named if whole else device.type,
        base_digest=base_digest(device.type),
        method=method,
        encoding=config.device.upload,
        embedding=embed(texts, config.device.encoder, config.device.embedding_size).tolist(),
        encoder=config.device.encoder,
        tokens=sum(map(len, read)),
        documents=len(private),
        seed=config.seed,
        deepfusion_version=__version__,
        **facts,
    )


def _losses(upload: Path) -> dict[str, Any]:
    card = read_card(upload)
    return {"loss_before": card.loss_before, "loss_after": card.loss_after}


def _save_weights(student: PreTrainedModel, adapter: Any, base: str, folder: Path, name: str) -> None:
    if adapter is None:
        torch.nn.Module.to(student, stored_dtype(base))
        student.save_pretrained(folder)
        return
    settings = adapter.peft_config["default"]
    settings.base_model_name_or_path = name  # not where it lies on this device
    settings.target_modules = sorted(
        settings.target_modules or ()
    )  # a set, whose order differs between processes
    adapter.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card names local paths
    read_config(base).save_pretrained(folder)  # the student's own may speak of quantisation


def _save_change(student: PreTrainedModel, public: WholeModel, encoding: Encoding, folder: Path) -> float:
    """What training changed of the public checkpoint; the largest error of a weight."""
    error = write_delta(folder, student.state_dict(), public, encoding)
    read_config(public.folder).save_pretrained(folder)
    if student.generation_config is not None:
        student.generation_config.save_pretrained(folder)
    return error


def _load_student(base: str, method: str, precision: str, name: str) -> PreTrainedModel:
    if method != "qlora":
        return load_model(base, "fp32" if method == "full" else precision)
    try:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        )  # fmt: skip
        model = load_model(base, precision, quantization)
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(
            f"NF4 quantisation does not run here ({str(error).splitlines()[0]})",
            where=f"device {name}", allowed="full or lora", fix="pip install deepfusion[qlora] on supported hardware",
            code="no-qlora",
        ) from None  # fmt: skip
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _loss(model: PreTrainedModel, tokenizer: Any, held_out: list[Document], config: Config) -> float:
    measured = evaluate_model(
        model,
        tokenizer,
        held_out,
        batch_size=config.evaluate.batch_size,
        max_chars=config.data.max_chars,
        choices=False,
    )
    return float(measured["log_perplexity"])


def _check_memory(config: Config, device: DeviceSpec, method: str) -> None:
    budget = parse_memory(device.memory or "")
    needed = estimate_training_bytes(
        model_config(device.type), method, config.device.batch_size, config.data.max_chars // 3,
        config.precision, config.device.lora_rank,
    )  # fmt: skip
    if needed > budget:
        raise InputError(
            f"training {device.type} ({method}) takes about {needed / 2**30:.1f} GiB",
            where=f"device {device.id}",
            allowed=f"{device.memory}",
            fix=f"deepfusion device plan --memory {device.memory} lists what fits",
            code="too-little-memory",
        )
