"""`deepfusion bench` on cells of a few steps: every method, tables from their JSON, and what a second call does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepfusion_bench.methods import METHODS
from deepfusion_bench.tables import ROWS

pytestmark = pytest.mark.slow

SMALL = [
    f"--set={setting}"
    for setting in (
        "device.steps=3", "distill.steps=8", "tune.steps=4", "data.limit=150", "data.sampled_documents=4",
        "evaluate.max_documents=4", "data.max_chars=200",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any]) -> Path:
    out = tmp_path_factory.mktemp("bench")
    done = command(
        "bench", "paper", "--case", "finance", "--devices", "8", "--seeds", "1", "--out", out, *SMALL
    )
    assert done.returncode == 0, done.stderr
    return out


def test_every_method_has_a_cell_with_all_that_makes_it_comparable(bench: Path) -> None:
    cells = {path.stem: json.loads(path.read_text("utf-8")) for path in (bench / "results").glob("*.json")}
    assert set(cells) == {f"finance-8-seed0-{row.replace('/', '-')}" for row in ROWS}
    for cell in cells.values():
        assert cell["test"]["mean_over_domains"]["bits_per_byte"] > 0
        assert cell["validation"]["mean_over_domains"]["log_perplexity"] > 0
        assert {
            "seed",
            "config",
            "version",
            "packages",
            "hardware",
            "precision",
            "date",
            "budget",
            "transport",
        } <= set(cell)
    fused, paper, fedjets = (cells[f"finance-8-seed0-{name}"] for name in ("fused", "paper", "fedjets"))
    assert fused["transport"]["total_down_bytes"] == 0
    assert fedjets["transport"]["total_down_bytes"] > 0
    assert sum(work["steps"] for work in fused["budget"]["server"].values()) == 12
    more = cells["finance-8-seed0-fused-proxies-16"]
    assert {key: work["steps"] for key, work in more["budget"]["server"].items()} == {
        key: work["steps"] for key, work in fused["budget"]["server"].items()
    }
    assert more["test"] != fused["test"]
    assert sum(work["steps"] for work in paper["budget"]["server"].values()) == 12
    assert fedjets["budget"]["device"]["steps"] == fused["budget"]["device"]["steps"]


def test_tables_come_from_the_json_alone_and_bit_for_bit(
    bench: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    pages = []
    for name in ("one", "two"):
        page = tmp_path / name / "results.md"
        page.parent.mkdir()
        done = command(
            "bench", "page", "--results", bench / "results", "--costs", tmp_path / "none", "--out", page
        )
        assert done.returncode == 0, done.stderr
        pages.append({path.name: path.read_bytes() for path in page.parent.iterdir()})
    assert pages[0] == pages[1]
    assert set(pages[0]) == {"results.md", "results-finance.svg"}
    text = pages[0]["results.md"].decode()
    assert all(f"| {title} |" in text for title in ROWS.values())


def test_a_second_call_runs_nothing_again_and_refuses_other_settings(
    bench: Path, command: Callable[..., Any]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (bench / "results").iterdir()}
    call = [
        "bench",
        "paper",
        "--case",
        "finance",
        "--devices",
        "8",
        "--seeds",
        "1",
        "--methods",
        "base,fused",
        "--out",
        bench,
    ]
    assert command(*call, *SMALL).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (bench / "results").iterdir()}
    refused = command(*call, *SMALL, "--set=tune.steps=5")
    assert refused.returncode == 2
    assert "measured with" in refused.stderr


def test_methods_that_use_no_uploads_give_the_same_without_them(
    bench: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    alone = [name for name, method in METHODS.items() if method.alone]
    call = ["bench", "paper", "--case", "finance", "--devices", "8", "--seeds", "1", "--methods"]
    done = command(*call, ",".join(alone), "--out", tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "devices").exists()
    for name in alone:
        ours, among_all = (
            json.loads((out / "results" / f"finance-8-seed0-{name}.json").read_text("utf-8"))
            for out in (tmp_path, bench)
        )
        assert ours["test"] == among_all["test"]
        assert ours["budget"] == among_all["budget"]
