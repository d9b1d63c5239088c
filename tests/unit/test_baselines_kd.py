"""FedKMT and OFA-KD: their maths against plain references, their steps, and phase II by each of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from conftest import sentences, small_settings
from deepfusion.learning.align import SharedVocabulary, shared_vocabulary
from deepfusion.learning.corpus import Window
from deepfusion.learning.distillation import Collator, Distiller, LossWeights, Teacher
from deepfusion.models.loading import load_model, load_tokenizer
from deepfusion.schema import Config
from deepfusion.sections import VAASection
from deepfusion.text.encoding import encode
from deepfusion.text.rows import Document
from deepfusion_bench.baselines import fedkmt, ofakd
from deepfusion_bench.baselines.fedkmt import FedKMT, FedKMTSettings, MinED
from deepfusion_bench.baselines.ofakd import OFAKD, OFAKDSettings

CPU = torch.device("cpu")
METHODS = pytest.mark.parametrize("method", [FedKMT, OFAKD])
NONE_SHARED = SharedVocabulary(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
words = st.text("abé ", max_size=6)


def documents(*teachers: int | None) -> list[Window]:
    rows = [row["text"] for domain in ("finance", "cooking") for row in sentences(domain, 3)]
    return [
        Window(Document(row[:9], row[9:60], "d"), "public", teacher)
        for row, teacher in zip(rows, teachers, strict=False)
    ]


def made(
    method: type[Distiller], student: Path, teachers: dict[int, Path], weights: LossWeights, **options: Any
) -> tuple[Any, Collator]:
    tokenizer = load_tokenizer(student)
    guides = {number: Teacher(folder, tokenizer, "fp32", CPU) for number, folder in teachers.items()}
    module = method(load_model(student), weights, guides, None, 0, **options).eval()
    return module, Collator(tokenizer, guides, 0.5, 128)


def distance(a: str, b: str) -> int:
    """Levenshtein, by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


# -------------------------------------------------------------------------------------------------------------------
# MinED


@effort(deadline=None, max_examples=50)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_edit_distances_are_levenshteins(pairs):
    found = fedkmt.edit_distances(*zip(*pairs, strict=True))
    assert found.tolist() == [distance(a, b) for a, b in pairs]


@effort(deadline=None, max_examples=30)
@given(
    st.lists(words, min_size=1, max_size=8, unique=True), st.lists(words, min_size=1, max_size=8, unique=True)
)
def test_vocabulary_map_finds_the_nearest_token(student, teacher):
    found = fedkmt.vocabulary_map(student, teacher, NONE_SHARED)
    known = [token for token in student if token]
    for token, id_ in zip(teacher, found, strict=True):
        if token and known:
            assert distance(token, student[id_]) == min(distance(token, other) for other in known)
        else:
            assert id_ == -1


def test_few_candidates_still_find_a_close_token():
    student = [f"word{i}" for i in range(500)] + [" transplant"]
    found = fedkmt.vocabulary_map(student, [" transplants", "word77x"], NONE_SHARED, candidates=5)
    assert [student[i] for i in found] == [" transplant", "word77"]


@effort(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_alignment_is_monotone_and_its_partners_are_single(rows, columns, random):
    costs = np.array([[random.randint(0, 5) for _ in range(columns)] for _ in range(rows)])
    found = fedkmt.align_tokens(costs)
    matched = found[found >= 0]
    assert len(found) == rows
    assert (np.diff(matched) >= 0).all()
    assert (matched < columns).all()


def test_alignment_by_hand():
    """The middle one of three tokens stands for two of the other side; then both sides are exchanged."""
    costs = np.array([[0, 9, 9, 9], [9, 1, 1, 9], [9, 9, 9, 0]])
    assert fedkmt.align_tokens(costs).tolist() == [0, -1, 3]
    assert fedkmt.align_tokens(costs.T).tolist() == [0, 1, 1, 2]


def test_identical_tokenizers_align_as_they_are(zoo):
    tokenizer = load_tokenizer(zoo["qwen3_moe"])
    mined = MinED(tokenizer, Teacher(zoo["deepseek"], tokenizer, "fp32", CPU), 400)
    assert mined.to_student[: len(tokenizer)].tolist() == list(range(len(tokenizer)))
    assert (mined.to_student[len(tokenizer) :] == -1).all()
    assert mined(np.array([5, 6, 7]), np.array([5, 6])).tolist() == [0, 1, -1]


@pytest.mark.parametrize("name", ["mini-gpt2", "mini-llama"])
def test_different_tokenizers_match_the_same_words(zoo, name):
    """Every match is of mapped tokens in text order, and most are of tokens that look alike: here they are often
    letters.
    """
    tokenizer = load_tokenizer(zoo["qwen3_moe"])
    teacher = Teacher(zoo[name], tokenizer, "fp32", CPU)
    mined = MinED(tokenizer, teacher, len(teacher.tokenizer))
    shared = shared_vocabulary(tokenizer, teacher.tokenizer)
    assert torch.equal(mined.to_student[shared.teacher_ids], shared.student_ids)
    for document in documents(0, 0, 0):
        own, theirs = (encode(t, document.document).input_ids for t in (tokenizer, teacher.tokenizer))
        found = mined(own, theirs)
        assert (np.diff(found[found >= 0]) >= 0).all()
        assert all(int(mined.to_student[theirs[j]]) == own[i] for i, j in enumerate(found) if j >= 0)
        same = {
            (tokenizer.decode([own[i]]).strip(), teacher.tokenizer.decode([theirs[j]]).strip())
            for i, j in enumerate(found)
            if j > 0
        }
        assert sum(a == b for a, b in same) > 0.5 * len(same) > 2


# ------------------------------------------------------------------------------------------------------------
# FedKMT's loss


def test_top_knowledge_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 9.0, 8.0, 7.0]])
    to_student = torch.tensor([4, 4, 2, -1])
    ids, shares = fedkmt.top_knowledge(logits, to_student, 3)
    dense = torch.zeros(2, 5).scatter_add(1, ids, shares)
    # Row 0: 3 and 2 both fall on token 4, the higher counts. Row 1: the lowest of three has no counterpart.
    torch.testing.assert_close(dense[0], torch.tensor([0, 0, 1 / (1 + math.e**2), 0, 1 / (1 + math.e**-2)]))
    torch.testing.assert_close(dense[1], torch.tensor([0, 0, 1 / (1 + math.e), 0, 1 / (1 + math.e**-1)]))
    nothing = fedkmt.top_knowledge(logits, torch.full((4,), -1), 3)[1]
    assert torch.equal(nothing, torch.zeros(2, 3))


@torch.no_grad()
def reference_fedkmt(
    module: FedKMT, collator: Collator, document: Window, top_k: int
) -> tuple[float, float, bool]:
    """CE and KD loss of one text as loops over its tokens, and whether the teacher is better; same tokenizer or not."""
    teacher = module.teachers[0]
    encoded = encode(collator.tokenizer, document.document, 0.5)
    own, theirs = encoded.input_ids, encode(teacher.tokenizer, document.document).input_ids
    log_p = module.student(torch.tensor(own)[None]).logits[0].log_softmax(-1)
    logits = teacher.model(torch.tensor(theirs)[None]).logits[0]
    log_q = logits.log_softmax(-1)
    partner = module.mined[0](own, theirs)
    ce = kd = total = 0.0
    for t in range(len(own) - 1):
        weight = float(encoded.weights[t + 1])
        surprise = -log_p[t, own[t + 1]].item()
        here = surprise
        if partner[t] >= 0:
            best: dict[int, float] = {}
            for value, id_ in sorted(
                zip(logits[partner[t]].tolist(), range(logits.shape[1]), strict=True), reverse=True
            )[:top_k]:
                best.setdefault(int(module.mined[0].to_student[id_]), value)
            best.pop(-1, None)
            norm = sum(math.exp(value) for value in best.values())
            here = -sum(math.exp(value) / norm * log_p[t, id_].item() for id_, value in best.items())
        ce, kd, total = ce + weight * surprise, kd + weight * here, total + weight
    own_nats = -sum(float(log_p[t, own[t + 1]]) for t in range(len(own) - 1))
    their_nats = -sum(float(log_q[t, theirs[t + 1]]) for t in range(len(theirs) - 1))
    return ce / total, kd / total, their_nats < own_nats


@pytest.mark.parametrize("name", ["mini-gpt2", "mini-llama", "deepseek"])
def test_fedkmt_is_its_reference(zoo, name):
    """Random models: the one with the smaller vocabulary finds the text less surprising, here mostly the teacher."""
    module, collator = made(
        FedKMT,
        zoo["qwen3_moe"],
        {0: zoo[name]},
        LossWeights(0.9, 9.0, 0.1, 9.0),
        settings=FedKMTSettings(top_k=5),
    )
    for document in documents(0, 0, 0):
        found = module(**collator([document]))
        ce, kd, better = reference_fedkmt(module, collator, document, 5)
        assert found["ce"].item() == pytest.approx(ce, rel=1e-4)
        assert float(found["taught"]) == better
        assert found["kl"].item() == pytest.approx(kd if better else 0.0, rel=1e-4)
        torch.testing.assert_close(found["loss"], 0.9 * found["ce"] + 0.1 * found["kl"])


def test_fedkmt_takes_nothing_from_a_worse_teacher(zoo, tmp_path):
    """A teacher whose output layer is turned around is the more surprised the more it was sure before."""
    student = zoo["qwen3_moe"]
    worse = load_model(student)
    worse.get_output_embeddings().weight.data *= -30
    worse.save_pretrained(tmp_path / "worse")
    better = load_model(student)
    better.get_output_embeddings().weight.data *= 0
    better.save_pretrained(tmp_path / "even")
    load_tokenizer(student).save_pretrained(tmp_path / "worse")
    load_tokenizer(student).save_pretrained(tmp_path / "even")
    module, collator = made(
        FedKMT, student, {0: tmp_path / "worse", 1: tmp_path / "even"}, LossWeights(beta=1.0)
    )
    assert float(module(**collator(documents(0, 0)))["taught"]) == 0
    nothing = module(**collator(documents(0, 0)))
    torch.testing.assert_close(nothing["loss"], nothing["ce"])
    module.student.get_output_embeddings().weight.data *= -30
    assert float(module(**collator(documents(1, 1)))["taught"]) == 1


# ------------------------------------------------------------------------------------------------------------
# OFA-KD's loss


def log_distributions(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(6, 9).log_softmax(-1).requires_grad_(), torch.randn(6, 9).log_softmax(-1)


@given(st.integers(0, 99), st.floats(0.5, 3))
def test_ofa_loss_is_the_formula(seed, exponent):
    student, teacher = log_distributions(seed)
    target = torch.arange(6) - 1
    mask = torch.zeros(6, 9)
    mask[range(1, 6), target[1:]] = 1
    wanted = -(((teacher.exp() + mask) ** exponent - mask) * student).sum(-1)
    torch.testing.assert_close(ofakd.ofa_loss(student, teacher, target, exponent), wanted)


def test_ofa_loss_at_exponent_one_has_the_gradient_of_the_divergence():
    student, teacher = log_distributions(0)
    ours = torch.autograd.grad(ofakd.ofa_loss(student, teacher, torch.arange(6), 1.0).sum(), student)[0]
    divergence = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="sum")
    torch.testing.assert_close(ours, torch.autograd.grad(divergence, student)[0])


def test_ofa_loss_weighs_the_target_the_more_the_surer_the_teacher():
    teacher = torch.tensor([[0.2, 0.8], [0.8, 0.2]]).log()
    weight = [
        float(ofakd.ofa_loss(torch.tensor([[-1.0, 0.0]]), row[None], torch.tensor([0]), 1.5)[0])
        for row in teacher
    ]
    plain = [
        float(ofakd.ofa_loss(torch.tensor([[-1.0, 0.0]]), row[None], torch.tensor([-1]), 1.5)[0])
        for row in teacher
    ]
    assert weight[1] - plain[1] > weight[0] - plain[0] > 0


def test_target_columns():
    vocabulary = SharedVocabulary(torch.tensor([2, 5, 7]), torch.tensor([0, 3, 1]))
    targets = torch.tensor([5, 6, 2, 9])
    assert ofakd.target_columns(vocabulary, targets, others=True).tolist() == [1, 3, 0, 3]
    assert ofakd.target_columns(vocabulary, targets, others=False).tolist() == [1, -1, 0, -1]
    assert ofakd.target_columns(NONE_SHARED, targets, others=True).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["mini-gpt2", "mini-llama", "deepseek"])
def test_ofakd_compares_what_the_divergence_compares(zoo, name):
    """At exponent 1 and without exits the gradient of the student is that of L_CE + L_KL, whatever the tokenizers."""
    weights = LossWeights(0.7, beta=1.3)
    plain, collator = made(Distiller, zoo["qwen3_moe"], {0: zoo[name]}, weights)
    ours, _ = made(
        OFAKD,
        zoo["qwen3_moe"],
        {0: zoo[name]},
        weights,
        settings=OFAKDSettings(exponent=1.0, exit_weight=0.0),
    )
    batch = collator(documents(0, 0, None))
    for module in (plain, ours):
        module(**batch)["loss"].backward()
    for (key, wanted), found in zip(plain.student.named_parameters(), ours.student.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, msg=key, atol=1e-6, rtol=1e-3)


def test_ofakd_has_an_exit_per_stage(zoo):
    for blocks, exits in ((1, 1), (4, 2)):  # the student has two layers
        weights = LossWeights(beta=1.0)
        module, collator = made(
            OFAKD, zoo["qwen3_moe"], {0: zoo["mini-llama"]}, weights, settings=OFAKDSettings(blocks=blocks)
        )
        assert len(module.vaa["exits"]) == exits
        found = module(**collator(documents(0, 0)))
        assert 0 < found["exits"] < found["kl"]


# -------------------------------------------------------------------------------------------------------------------
# steps


@METHODS
def test_mixed_batch_is_the_mean_of_its_groups(zoo, method):
    module, collator = made(
        method, zoo["qwen3_moe"], {0: zoo["mini-gpt2"], 1: zoo["mini-llama"]}, LossWeights(beta=1.0)
    )
    batch = documents(0, 1, None, 1, 0, 0)
    mean, total = 0.0, 0.0
    for wanted in (0, 1, None):
        part = [document for document in batch if document.teacher == wanted]
        weight = sum(float(encode(collator.tokenizer, d.document, 0.5).weights[1:].sum()) for d in part)
        mean, total = mean + weight * module(**collator(part))["loss"].item(), total + weight
    assert module(**collator(batch))["loss"].item() == pytest.approx(mean / total, rel=1e-4)


@METHODS
def test_many_blocks_give_what_one_gives(zoo, method, monkeypatch):
    module, collator = made(method, zoo["qwen3_moe"], {0: zoo["mini-llama"]}, LossWeights(beta=1.0))
    batch, found = collator(documents(0, 0, 0)), []
    for elements in (2**23, 4000):
        monkeypatch.setattr("deepfusion_bench.baselines.shared.BLOCK_ELEMENTS", elements)
        loss = module(**batch)["loss"]
        gradients = torch.autograd.grad(loss, list(module.student.parameters()))
        found.append((loss, *gradients))
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, atol=1e-6, rtol=1e-4)


@METHODS
def test_mixed_precision_gives_about_the_same(zoo, method):
    module, collator = made(method, zoo["qwen3_moe"], {0: zoo["mini-llama"]}, LossWeights(beta=1.0))
    batch = collator(documents(0, 0))
    exact = module(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(**batch)
    assert found["loss"].dtype == torch.float32
    for key in ("ce", "kl"):
        torch.testing.assert_close(found[key], exact[key], atol=0.02, rtol=0.02)


@METHODS
def test_only_student_and_exits_learn_and_features_take_no_part(zoo, method):
    tokenizer = load_tokenizer(zoo["qwen3_moe"])
    guide = {0: Teacher(zoo["mini-gpt2"], tokenizer, "fp32", CPU)}
    weights = LossWeights(alpha=1.0, beta=1.0, chunk=1.0)
    module = method(load_model(zoo["qwen3_moe"]), weights, guide, VAASection(patches=8, width=8, heads=2), 0)
    found = module(**Collator(tokenizer, guide, 0.5, 128)(documents(0, 0)))
    found["loss"].backward()
    torch.testing.assert_close(found["loss"], found["ce"] + found["kl"])
    assert all(parameter.grad is None for parameter in guide[0].model.parameters())
    lost = [
        name
        for name, p in module.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert lost == []


@METHODS
@pytest.mark.parametrize("name", ["mini-llama", "deepseek"])
def test_loss_falls(zoo, method, name):
    module, collator = made(method, zoo["qwen3_moe"], {0: zoo[name]}, LossWeights(beta=1.0))
    batch = collator(documents(0, 0, 0, 0))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        found = module(**batch)
        losses.append(float(found["ce"]) + float(found.get("exits", 0)))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# --------------------------------------------------------------------------------------------------------------- the
# stage


@pytest.mark.parametrize("baseline", [fedkmt, ofakd], ids=["fedkmt", "ofakd"])
@pytest.mark.parametrize("trunk_share", [0, 1])
def test_stage_writes_a_base_per_proxy(zoo, tmp_path, baseline, trunk_share):
    """Proxy 0 has a tokenizer of its own, proxy 1 the student's."""
    values = small_settings(zoo, tmp_path)
    values["distill"] |= {"trunk_share": trunk_share, "steps": 4}
    config = Config.model_validate(values)
    for number, name in enumerate(("mini-llama", "deepseek")):
        (tmp_path / "proxies").mkdir(exist_ok=True)
        (tmp_path / "proxies" / str(number)).symlink_to(zoo[name])
    summary = baseline.run(config, {"proxies": tmp_path / "proxies"}, tmp_path / "out")
    assert summary["trunk_steps"] == 4 * trunk_share
    start = load_model(zoo["qwen3_moe"]).state_dict()
    bases = [load_model(tmp_path / "out" / "bases" / str(number)).state_dict() for number in (0, 1)]
    for base in bases:
        assert base.keys() == start.keys()
        assert all(tensor.isfinite().all() for tensor in base.values())
        assert not all(torch.equal(tensor, start[key]) for key, tensor in base.items())
    assert all(torch.equal(bases[0][key], bases[1][key]) for key in start) == bool(trunk_share)
