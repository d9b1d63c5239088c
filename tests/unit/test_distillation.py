"""One training step against its parts: each text with its own teacher, gradients where they belong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config

from conftest import sentences
from deepfusion import progress
from deepfusion.config import parse_config
from deepfusion.errors import InputError
from deepfusion.learning.corpus import Window
from deepfusion.learning.distillation import BF16_TOKENS, Collator, Distiller, LossWeights, Teacher
from deepfusion.models.loading import load_model, load_tokenizer
from deepfusion.sections import VAASection
from deepfusion.stages import distill
from deepfusion.text.encoding import encode
from deepfusion.text.rows import Document, Turn, conversation

CPU = torch.device("cpu")
VAA = VAASection(patches=8, width=8, heads=2)


def documents(*teachers: int | None) -> list[Window]:
    """Texts of different lengths, some with a prompt."""
    rows = [row["text"] for domain in ("finance", "cooking") for row in sentences(domain, 3)]
    documents = [
        Document(row[:cut], row[cut : cut + 50], "d")
        for row, cut in zip(rows, (0, 10, 0, 25, 3, 0), strict=True)
    ]
    return [
        Window(document, "public", teacher) for document, teacher in zip(documents, teachers, strict=False)
    ]


@pytest.fixture(scope="module")
def student_folder(zoo) -> Path:
    return zoo["qwen3_moe"]


def distiller(
    folder: Path, teachers: dict[int, Path], weights: LossWeights, vaa: VAASection | None = None
) -> tuple[Distiller, Collator]:
    tokenizer = load_tokenizer(folder)
    guides = {number: Teacher(path, tokenizer, "fp32", CPU) for number, path in teachers.items()}
    module = Distiller(load_model(folder), weights, guides, vaa).eval()
    return module, Collator(tokenizer, guides, 0.5, 128, vaa)


def step(module: Distiller, collator: Collator, batch: list[Window]) -> dict[str, Any]:
    return module(**collator(batch))


def test_cross_entropy_alone_is_the_weighted_mean_over_tokens(student_folder):
    module, collator = distiller(student_folder, {}, LossWeights())
    batch = documents(None, None, None, None)
    found = step(module, collator, batch)
    total, weight = torch.tensor(0.0), 0.0
    for document in batch:
        encoded = encode(collator.tokenizer, document.document, 0.5)
        ids = torch.tensor(encoded.input_ids)[None]
        losses = F.cross_entropy(module.student(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        target_weights = torch.tensor(encoded.weights[1:])
        total, weight = total + (losses * target_weights).sum(), weight + float(target_weights.sum())
    torch.testing.assert_close(found["loss"], total / weight)
    torch.testing.assert_close(found["ce"], found["loss"])
    assert int(found["tokens"]) == sum(len(encode(collator.tokenizer, d.document).input_ids) for d in batch)


@pytest.mark.parametrize("limit", [None, 128, 40])
def test_batches_of_bf16_have_few_lengths_and_padding_changes_no_loss(student_folder, zoo, limit):
    vaa = VAASection(blocks=1, patches=4, width=8, heads=2)
    weights = LossWeights(alpha=1.0, beta=1.0, chunk=1.0)
    module, plain = distiller(student_folder, {0: zoo["mini-llama"]}, weights, vaa)
    plain.max_tokens = limit
    padded = Collator(plain.tokenizer, plain.teachers, 0.5, limit, vaa, "bf16")
    batch = documents(0, 0, None)
    length, multiple = (collate(batch)["input_ids"].shape[1] for collate in (plain, padded))
    assert multiple == min(-(-length // BF16_TOKENS) * BF16_TOKENS, limit or 10**6)
    assert padded(batch)["groups"][0].teacher_ids.shape[1] % BF16_TOKENS == 0
    expected, found = step(module, plain, batch), step(module, padded, batch)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


def test_a_teacher_equal_to_the_student_leaves_no_divergence(student_folder):
    module, collator = distiller(student_folder, {0: student_folder}, LossWeights(beta=1.0, chunk=1.0))
    found = step(module, collator, documents(0, 0, 0))
    assert found["kl"].abs() < 1e-5
    torch.testing.assert_close(found["loss"], found["ce"], atol=1e-4, rtol=0)


CHAT = (
    "{% for m in messages %}{{ eos_token + m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
)


def chats(*teachers: int | None) -> list[Window]:
    pairs = [
        ("Why?", "The bank sold a ten year bond."),
        ("And the cook?", "Salted ripe tomatoes with olive oil."),
    ]
    turns = [turn for asked, said in pairs for turn in (Turn("user", asked), Turn("assistant", said, True))]
    return [
        Window(conversation(turns[:end], "d"), "public", teacher)
        for end, teacher in zip((4, 2, 4), teachers, strict=False)
    ]


def test_conversations_are_read_by_student_and_teacher_each_in_its_own_template(
    zoo, student_folder, tmp_path
):
    def chatty(name: str, template: str | None = CHAT) -> Path:
        folder = tmp_path / f"{name}-{template is not None}"
        tokenizer = load_tokenizer(zoo[name])
        tokenizer.chat_template = template
        load_model(zoo[name]).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    weights = LossWeights(beta=1.0, chunk=1.0, alpha=0.1)
    own = chatty("qwen3_moe")
    module, collator = distiller(
        own, {0: own, 1: chatty("mini-gpt2"), 2: zoo["mini-llama"], 3: student_folder}, weights, VAA
    )
    same = step(module, collator, chats(0, 0))
    assert same["kl"].abs() < 1e-5  # one template: the same reading, so nothing differs
    plain = step(module, collator, chats(3, 3))
    assert plain["kl"] > 1e-4  # the same weights and tokens, but the teacher reads plain words
    mixed = step(module, collator, chats(1, 2, None))
    mixed["loss"].backward()
    assert all(mixed[key] > 0 for key in ("ce", "kl", "chunk", "feature"))
    assert all(p.grad.isfinite().all() for p in module.student.parameters() if p.grad is not None)


def test_loss_is_the_weighted_sum_of_its_parts(zoo, student_folder):
    weights = LossWeights(ce=0.5, alpha=0.2, beta=2.0, chunk=0.3, temperature=2.0)
    module, collator = distiller(student_folder, {0: zoo["mini-gpt2"], 1: zoo["mini-llama"]}, weights, VAA)
    found = step(module, collator, documents(0, 1, 0, 1))
    parts = 0.5 * found["ce"] + 0.2 * found["feature"] + 2 * found["kl"] + 0.3 * found["chunk"]
    torch.testing.assert_close(found["loss"], parts)
    assert found["kl"] > 0
    assert found["feature"] > 0


def test_a_sample_of_a_proxy_is_learned_from_its_teacher_alone(zoo, student_folder):
    weights = LossWeights(ce=2.0, beta=1.0, sampled_ce=0.25)
    module, collator = distiller(student_folder, {0: zoo["mini-gpt2"]}, weights)
    public = documents(0, 0)
    sampled = [replace(document, source="sampled") for document in public]
    found, plain = step(module, collator, sampled), step(module, collator, public)
    torch.testing.assert_close(plain["loss"], 2 * plain["ce"] + plain["kl"])
    torch.testing.assert_close(found["loss"], 0.5 * found["ce"] + found["kl"])
    torch.testing.assert_close(found["ce"], plain["ce"])
    untaught = [replace(document, teacher=None) for document in sampled]
    alone = step(module, collator, untaught)
    torch.testing.assert_close(alone["loss"], 2 * alone["ce"])


def test_flops_count_the_weights_that_work_on_a_token(zoo, student_folder):
    module, collator = distiller(student_folder, {0: zoo["mini-gpt2"]}, LossWeights(beta=1.0))
    batch = collator(documents(0, None, 0))
    taught = next(group for group in batch["groups"] if group.teacher == 0)
    sizes = [
        sum(p.numel() for p in model.parameters()) for model in (module.student, module.teachers[0].model)
    ]
    lookups = [
        0 if m.config.tie_word_embeddings else m.get_input_embeddings().weight.numel()
        for m in (module.student,)
    ]
    expected = 6 * (sizes[0] - lookups[0]) * int(batch["attention_mask"].sum()) + 2 * sizes[1] * int(
        taught.teacher_mask.sum()
    )
    assert float(module(**batch)["flops"]) == expected
    module.weights = LossWeights()
    assert float(module(**batch)["flops"]) == 6 * (sizes[0] - lookups[0]) * int(batch["attention_mask"].sum())


@pytest.mark.parametrize("vaa", [None, VAA], ids=["logits", "logits and features"])
def test_mixed_batch_is_the_mean_of_its_groups(zoo, student_folder, vaa):
    """Every text is compared with its own teacher, whatever else the batch holds; a text without a teacher with
    none."""
    weights = LossWeights(beta=1.0, chunk=0.1, alpha=0.1 if vaa else 0.0)
    module, collator = distiller(student_folder, {0: zoo["mini-gpt2"], 1: zoo["mini-llama"]}, weights, vaa)
    batch = documents(0, 1, None, 1, 0, 7)
    whole = step(module, collator, batch)
    mean: dict[str, torch.Tensor] = {}
    shares = 0.0
    for wanted in ([0], [1], [None, 7]):
        part = [document for document in batch if document.teacher in wanted]
        share = float(sum(encode(collator.tokenizer, d.document, 0.5).weights[1:].sum() for d in part))
        shares += share
        for key, value in step(module, collator, part).items():
            mean[key] = mean.get(key, torch.tensor(0.0)) + share * value
    for key in ("loss", "ce", "kl", "chunk", *(["feature"] if vaa else [])):
        torch.testing.assert_close(whole[key], mean[key] / shares, atol=1e-4, rtol=1e-4)


def test_only_student_and_attention_are_trained(zoo, student_folder):
    module, collator = distiller(student_folder, {0: zoo["mini-gpt2"]}, LossWeights(alpha=1.0, beta=1.0), VAA)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] for name in names} == {"student", "vaa"}
    step(module, collator, documents(0, 0))["loss"].backward()
    assert all(p.grad is None for p in module.teachers[0].model.parameters())
    lost = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert lost == []


def test_distillation_moves_the_student_towards_its_teacher(zoo, student_folder):
    module, collator = distiller(student_folder, {0: zoo["mini-bloom"]}, LossWeights(ce=0.0, beta=1.0))
    batch = collator(documents(0, 0, 0, 0))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    divergences = []
    for _ in range(15):
        loss = module(**batch)["loss"]
        divergences.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert divergences[-1] < 0.5 * divergences[0]


def test_seed_decides_how_attention_starts(zoo, student_folder):
    tokenizer = load_tokenizer(student_folder)
    teacher = {0: Teacher(zoo["mini-gpt2"], tokenizer, "fp32", CPU)}
    starts = [
        Distiller(load_model(student_folder), LossWeights(), teacher, VAA, seed).vaa.state_dict()
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert any(not torch.equal(starts[0][name], starts[2][name]) for name in starts[0])


def test_contexts_limit_what_is_read(zoo, student_folder):
    """A text longer than the contexts of both models is cut, not refused."""
    module, collator = distiller(
        student_folder, {0: zoo["mini-gpt2"], 1: student_folder}, LossWeights(beta=1.0, alpha=0.1), VAA
    )
    long = " ".join(row["text"] for row in sentences("cooking", 40))
    for teacher in (0, 1):
        found = step(
            module, collator, [Window(Document("", long, "d"), "public", teacher), *documents(teacher)]
        )
        assert found["loss"].isfinite()
        assert int(found["tokens"]) <= 256


def test_padding_changes_nothing(zoo, student_folder):
    module, collator = distiller(student_folder, {0: zoo["mini-llama"]}, LossWeights(beta=1.0, chunk=0.1))
    short, other = documents(0, 0)
    alone = [step(module, collator, [document]) for document in (short, other)]
    weights = [float(encode(collator.tokenizer, d.document, 0.5).weights[1:].sum()) for d in (short, other)]
    both = step(module, collator, [short, other])
    torch.testing.assert_close(
        both["ce"], (alone[0]["ce"] * weights[0] + alone[1]["ce"] * weights[1]) / sum(weights)
    )


def test_teachers_that_do_not_fit_beside_the_trunk_are_refused_before_any_work(zoo, tmp_path):
    for number in range(3):
        (tmp_path / "proxies" / str(number)).mkdir(parents=True)
        GPT2Config(n_embd=2**17, n_layer=1, n_head=8).save_pretrained(
            tmp_path / "proxies" / str(number)
        )  # 0.8 TiB in fp32
    config = parse_config(
        {"family": "qwen3_moe", "experts": 2, "precision": "fp32", "clustering": {"proxies": 3}}
        | {"distill": {"base": str(zoo["qwen3_moe"]), "trunk_share": 1}}
    )
    with pytest.raises(
        InputError,
        match=r"3 teachers at once takes about 2[34]\d\d\.\d GiB.*allowed: 2 \(one per expert\).*too-little-memory",
    ):
        distill.run(config, {"proxies": tmp_path / "proxies"}, tmp_path)
    assert not (tmp_path / "bases" / "corpus.jsonl").exists()


def test_text_beyond_the_context_is_not_lost_without_a_word(zoo, student_folder, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_said", set())
    module, _ = distiller(student_folder, {}, LossWeights())
    tokenizer = load_tokenizer(student_folder)
    long = Window(Document("", " ".join(row["text"] for row in sentences("finance", 9)), "d"), "private")
    step(module, Collator(tokenizer, {}, 0.5, 128), documents(None))
    assert "lose their end" not in capsys.readouterr().err
    for _ in range(2):
        step(module, Collator(tokenizer, {}, 0.5, 128), [long])
    assert capsys.readouterr().err.count("lose their end in training; a lower data.max_chars") == 1
