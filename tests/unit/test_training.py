"""Training: it learns, its logs count, and one that is interrupted ends with the weights of one that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.learning.training import train

STEPS = 30


class Interrupted(Exception):
    """Stands for a killed process: nothing is cleaned up after it."""


class Net(nn.Module):
    """Fits y = 2x; one frozen parameter, and dropout so that the state of the random numbers matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.free = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        loss = F.mse_loss(self.free(self.dropout(x)) + 0 * self.frozen(x), 2 * x)
        return {"loss": loss, "double": 2 * loss, "tokens": torch.tensor(x.shape[0])}


def batches(count: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, generator=generator) for _ in range(count)]


def collate(batch: Tensor) -> dict[str, Any]:
    return {"x": batch}


def stop_at(step: int) -> Any:
    calls = iter(range(10**6))

    def broken(batch: Tensor) -> dict[str, Any]:
        if next(calls) == step:
            raise Interrupted
        return {"x": batch}

    return broken


def fit(
    net: Net,
    work: Path,
    items: Sequence[Tensor],
    make: Any = collate,
    seconds: float = 1e-6,
    end_share: float = 0.0,
) -> list[dict[str, float]]:
    return train(
        net, items, make, stage="test", unit="net", work=work, learning_rate=0.05, precision="fp32", seed=3,
        checkpoint_seconds=seconds, end_share=end_share,
    )  # fmt: skip


def weights(net: Net) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Tensor]:
    net = Net()
    fit(net, tmp_path_factory.mktemp("undisturbed"), batches())
    return weights(net)


def test_learns_and_reports_means(tmp_path):
    net, start = Net(), weights(Net())
    history = fit(net, tmp_path, batches())
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    assert all(row["double"] == pytest.approx(2 * row["loss"]) for row in history)
    assert [row["tokens"] for row in history] == [len(batch) for batch in batches()]
    assert sum(row["loss"] for row in history[-5:]) < 0.5 * sum(row["loss"] for row in history[:5])
    assert torch.equal(net.frozen.weight, start["frozen.weight"])
    assert max(row["learning_rate"] for row in history) == pytest.approx(0.05)
    assert history[-1]["learning_rate"] < 0.001


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_learning_rate_may_end_at_a_share_of_its_peak(tmp_path, share):
    rates = [row["learning_rate"] for row in fit(Net(), tmp_path, batches(), end_share=share)]
    assert max(rates) == pytest.approx(0.05)
    assert rates[-1] == min(rates[STEPS // 20 :]) == pytest.approx(share * 0.05, rel=0.02)


def test_no_steps_is_no_training(tmp_path):
    net = Net()
    assert fit(net, tmp_path, []) == []
    assert same(weights(net), weights(Net()))


class Diverging(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        return found | {"loss": found["loss"] * torch.inf}


def test_a_loss_that_is_no_number_ends_a_training(tmp_path):
    with pytest.raises(
        InputError, match=r"^test net: the loss at step 1 of 30 is (inf|nan).*learning_rate.*diverged"
    ):
        fit(Diverging(), tmp_path, batches())


@pytest.mark.parametrize("returned", [{"kl": torch.zeros(())}, torch.zeros(())])
def test_a_method_without_a_loss_is_refused(tmp_path, returned):
    class Silent(Net):
        def forward(self, x: Tensor) -> Any:
            return returned

    with pytest.raises(InputError, match="plugin-broken"):
        fit(Silent(), tmp_path, batches())


def test_same_seed_same_weights(tmp_path, undisturbed):
    net = Net()
    torch.manual_seed(99)  # what happened in this process before does not matter
    fit(net, tmp_path, batches(), seconds=1e6)
    assert same(weights(net), undisturbed)
    assert not list(tmp_path.glob("checkpoint-*"))


@settings(max_examples=4, deadline=None)
@given(first=st.integers(2, STEPS - 1), second=st.integers(1, STEPS - 1))
def test_interrupted_twice_ends_with_equal_weights(tmp_path_factory, undisturbed, first, second):
    work = tmp_path_factory.mktemp("work")
    for step in (first, second):
        try:
            fit(Net(), work, batches(), stop_at(step))
        except Interrupted:
            continue
    net = Net()
    fit(net, work, batches())
    assert same(weights(net), undisturbed)


def test_continues_instead_of_starting_again(tmp_path, undisturbed, capsys):
    with pytest.raises(Interrupted):
        fit(Net(), tmp_path, batches(), stop_at(20))
    taken = max(int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*"))
    assert 1 <= taken <= 20
    net = Net()
    history = fit(net, tmp_path, batches())
    assert history[0]["step"] == taken + 1
    assert f"continues at step {taken} of {STEPS}" in capsys.readouterr().err
    assert same(weights(net), undisturbed)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trained.safetensors"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, undisturbed, name, cut, capsys):
    with pytest.raises(Interrupted):
        fit(Net(), tmp_path, batches(), stop_at(20))
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    file = Path(shutil.copytree(newest, tmp_path / "checkpoint-25")) / name
    if cut:
        file.write_bytes(file.read_bytes()[:-8])
    else:
        file.unlink()
    net = Net()
    fit(net, tmp_path, batches())
    assert same(weights(net), undisturbed)
    assert f"continues at step {newest.name.split('-')[1]} of" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["no state", "half a state", "no weights yet"])
def test_half_written_checkpoint_is_ignored(tmp_path, undisturbed, damage):
    with pytest.raises(Interrupted):
        fit(Net(), tmp_path, batches(), stop_at(20))
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    torn = tmp_path / "checkpoint-25"
    if damage == "no weights yet":
        torn.mkdir()
    else:
        shutil.copytree(newest, torn)
        state = torn / "trainer_state.json"
        text = state.read_text("utf-8")
        state.unlink()
        if damage == "half a state":
            state.write_text(text[: len(text) // 2], "utf-8")
    net = Net()
    fit(net, tmp_path, batches())
    assert same(weights(net), undisturbed)


def test_checkpoints_hold_trained_weights_only(tmp_path):
    with pytest.raises(Interrupted):
        fit(Net(), tmp_path, batches(), stop_at(20))
    folder = next(iter(tmp_path.glob("checkpoint-*")))
    size = (folder / "trained.safetensors").stat().st_size
    assert 4 * 20 <= size < 4 * 20 + 300
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2


def test_metrics_are_recorded(tmp_path):
    progress.attach(tmp_path / "run")
    try:
        fit(Net(), tmp_path / "work", batches(120), seconds=1e6)
    finally:
        progress.attach(None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 121, 2))
    assert {row["total_steps"] for row in rows} == {120}
    assert {(row["stage"], row["unit"]) for row in rows} == {("test", "net")}
    assert list((tmp_path / "run" / "tensorboard" / "test" / "net").glob("events*"))
