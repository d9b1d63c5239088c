"""The bench: cells, ablations, and pages that come from committed results alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepfusion.config import RECIPES
from deepfusion.errors import InputError
from deepfusion.models.presets import model_config
from deepfusion_bench.ablations import ABLATIONS, Variant, ablation_cells, row_cell
from deepfusion_bench.cells import CASES, Cell, run_cells, stored
from deepfusion_bench.plots import write_plots
from deepfusion_bench.tables import page, row_name

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "bench"


@pytest.mark.parametrize("case", CASES)
def test_more_devices_share_the_same_number_of_steps(case: str) -> None:
    few, many = Cell(case, 16, 0, "fused").config(), Cell(case, 128, 2, "fused").config()
    assert (few.devices, many.devices, many.seed) == (16, 128, 2)
    assert 16 * few.device.steps == pytest.approx(128 * many.device.steps, rel=0.05)
    assert few.distill == many.distill


def test_overrides_reach_every_cell() -> None:
    cell = Cell("finance", 32, 0, "fused", shared=("device.steps=10", "tune.steps=7"))
    assert cell.config().device.steps == 5
    assert cell.config("tune.steps=8").tune.steps == 8
    assert cell.config().tune.steps == 7


VARIANTS = [variant for variants in ABLATIONS.values() for variant in variants]


def test_variants_do_not_share_a_result() -> None:
    names = [(variant.method, variant.name) for variant in VARIANTS]
    assert len(names) == len(set(names))
    assert {v.method for v in ABLATIONS["vaa"] if v.name == "plain-features"} == {"paper", "fused"}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.method}-{v.name}")
def test_every_variant_changes_a_config_that_is_valid(variant: Variant) -> None:
    cells = [variant.cell(case, 16, 0) for case in CASES]
    named = {(v.method, v.name): v for v in VARIANTS}
    against = named[variant.method, variant.against] if variant.against else Variant(variant.method, "")
    plain = [against.cell(case, 16, 0) for case in CASES]
    recipe = [f"recipe={variant.method}"] if variant.method in RECIPES else []
    changed = [cell.config(*recipe, *cell.own) for cell in cells]
    assert changed != [cell.config(*recipe, *against.own) for cell in plain]
    for config in changed:
        assert config.distill.vaa.blocks <= min(
            model_config(name).num_hidden_layers for name in config.device.types
        )


def test_an_ablation_brings_the_unchanged_cells_with_it() -> None:
    cells = ablation_cells(["devices"], "medical", 16, range(2))
    assert {(cell.method, cell.variant, cell.seed) for cell in cells if not cell.variant} == {
        (method, "", seed) for method in ("fused", "paper") for seed in (0, 1)
    }
    assert len(cells) == len({cell.name for cell in cells}) == 2 * (2 + len(ABLATIONS["devices"]))


def test_an_ablation_can_be_cut_to_some_variants_and_what_they_are_compared_with() -> None:
    cells = ablation_cells(
        ["vaa", "losses", "schedule"], "medical", 16, range(1), only=["causal", "beta-3", "two-schedules"]
    )
    asked = {(method, "causal") for method in ("paper", "fused")} | {
        (m, "beta-3") for m in ("paper", "fused", "fedkmt", "ofakd")
    }
    two = {(method, "two-schedules") for method in ("fused", "paper", "fedkmt", "ofakd", "public")}
    assert {(cell.method, cell.variant) for cell in cells} == asked | two | {
        (method, "") for method, _ in two
    }
    assert len(cells) == len({cell.name for cell in cells})
    assert {cell.own for cell in cells if cell.variant == "two-schedules"} == {("distill.handover=0",)}
    with pytest.raises(InputError, match=r"there is no variant K-3x.*random-clusters.*unknown-ablation"):
        ablation_cells(["clusters"], "medical", 16, range(1), only=["random-clusters", "K-3x"])


def test_ablations_are_listed(invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    listed = json.loads(invoke("bench", "ablation", "--json").out)["ablations"]
    assert {row["group"] for row in listed} == set(ABLATIONS)
    assert {
        "group": "vaa",
        "method": "fused",
        "variant": "no-features",
        "change": "distill.alpha=0",
    } in listed
    monkeypatch.setenv("COLUMNS", "150")
    assert "distill.handover=0 distill.trunk_share=0.5" in invoke("bench", "ablation").out


def test_a_stored_result_is_not_measured_again_unless_it_is_another_s(tmp_path: Path) -> None:
    source = RESULTS / "medical-16-seed0-base.json"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    cell = Cell("medical", 16, 0, "base")
    assert run_cells([cell], tmp_path / "runs", tmp_path) == [json.loads(source.read_text("utf-8"))]
    with pytest.raises(InputError, match="another-cell"):
        run_cells([Cell("medical", 16, 0, "base", shared=("data.limit=99",))], tmp_path / "runs", tmp_path)


def test_every_committed_result_is_the_one_its_cell_asks_for() -> None:
    for path in RESULTS.glob("*.json"):
        row = json.loads(path.read_text("utf-8"))
        cell = row_cell(row_name(row), row["case"], row["devices"], row["seed"])
        assert cell.name == path.stem
        assert stored(cell, RESULTS) == row


def test_a_cell_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [Cell(case, 16, 0, "base", shared=("data.limit=10",)) for case in CASES]
    with pytest.raises(InputError, match="2 of 2 cells failed: finance-16-seed0-base, medical-16-seed0-base"):
        run_cells(cells, tmp_path / "runs", tmp_path / "results", workers=1)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in told if "failed" in line] == [
        f"[bench] {case}-16-seed0-base failed" for case in CASES
    ]


def test_no_device_is_trained_for_a_method_that_needs_none(tmp_path: Path) -> None:
    small = ("data.limit=150", "data.max_chars=200", "evaluate.max_documents=2")
    [found] = run_cells(
        [Cell("finance", 16, 0, "base", shared=small)], tmp_path / "runs", tmp_path / "results"
    )
    assert not (tmp_path / "runs" / "devices").exists()
    assert found["test"]["mean_over_domains"]["log_perplexity"] > 0
    assert not any(
        [*found["budget"]["device"].values(), *found["transport"].values(), found["device_seconds"]]
    )


def test_the_page_of_results_comes_from_the_committed_json_bit_for_bit(tmp_path: Path) -> None:
    assert page(RESULTS, ROOT / "benchmarks" / "results" / "costs.json") == (
        ROOT / "benchmarks" / "results.md"
    ).read_text("utf-8")
    for plot in write_plots(RESULTS, tmp_path):
        assert plot.read_bytes() == (ROOT / "benchmarks" / plot.name).read_bytes()


def test_the_bound_is_the_centralized_run_that_is_best_on_held_out_text(tmp_path: Path) -> None:
    plain = json.loads((RESULTS / "finance-16-seed0-centralized.json").read_text("utf-8"))
    for variant, validation, test in (
        ("", 3.0, 3.5),
        ("half", 3.2, 3.7),
        ("twice", 3.1, 3.3),
    ):  # not by the test
        plain["variant"] = variant
        plain["validation"]["mean_over_domains"]["log_perplexity"] = validation
        plain["test"]["mean_over_domains"]["log_perplexity"] = test
        (tmp_path / f"finance-16-seed0-centralized{variant}.json").write_text(json.dumps(plain), "utf-8")
    bound = next(line for line in page(tmp_path).splitlines() if line.startswith("| centralized"))
    assert "3.5000" in bound
    assert "[" not in bound


def test_the_page_says_first_whom_fused_is_ahead_of_and_whom_not(tmp_path: Path) -> None:
    losses = {
        "fused": (3.0, 3.2),
        "paper": (3.5, 3.6),
        "fedkmt": (3.1, 3.2),
        "public": (2.9, 3.1),
        "average": (9.0, 9.0),
    }
    losses["fused-proxies-16"] = (2.8, 3.1)
    for method, values in losses.items():
        for seed, loss in enumerate(values):
            name = f"finance-16-seed{seed}-{method}"
            row = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
            row["test"]["mean_over_domains"] = {
                "log_perplexity": loss,
                "bits_per_byte": loss / 2,
                "token_accuracy": 0.2,
            }
            (tmp_path / f"{name}.json").write_text(json.dumps(row), "utf-8")
    short = page(tmp_path).split("## ")[1]
    rows = [line.split(" | ") for line in short.splitlines() if line.startswith("| finance")]
    assert [row[1:3] for row in rows] == [
        [m, p] for m in ("loss", "token accuracy, %") for p in ("one per expert", "16")
    ]
    loss, more, accuracy, _ = (row[3:] for row in rows)
    assert loss[:2] == [
        "3 of 4",
        "2",
    ]  # paper and, in bits per byte, average; FedKMT +0.05 is less than the spread of 0.07
    assert "FedKMT +0.0500 ± 0.0707" in loss[2]
    assert "public text alone, best number of steps -0.1000 ± 0.0000" in loss[2]
    assert "recipe paper" not in loss[2]
    assert more[:2] == ["4 of 4", "3"]
    assert "public text alone, best number of steps +0.0500 ± 0.0707" in more[2]
    assert accuracy[:2] == ["0 of 3", "0"]  # equal is not ahead, and tokens of another tokenizer do not count
