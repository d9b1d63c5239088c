"""The report: complete on a whole run, honest about missing artefacts, safe against names that came with uploads."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from device_models import entry, grouped
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from deepfusion import progress
from deepfusion.config import parse_config, save_config
from deepfusion.records import Evaluation, Problem, Registry, Rejected
from deepfusion.report.charts import grouped_bars, heat_map, line_chart
from deepfusion.report.page import compared, render, summary_table
from deepfusion.stages import report

DOMAINS = ("fiqa", "medmcqa", "medqa", "pubmedqa")
HOSTILE = "<script>alert('x')</script>&\"d07\""
ARTEFACTS = (
    *("evaluation.json", "registry.json", "rejected.json", "clusters.json"),
    *("manifest.json", "metrics.jsonl", "config.yaml", "transport.json"),
)


def _metrics(bits: dict[str, float]) -> dict[str, Any]:
    by_domain = {
        domain: {
            "log_perplexity": value * 2.1,
            "perplexity": math.exp(value * 2.1),
            "bits_per_byte": value,
            "token_accuracy": 0.6 - value / 10,
            "choice_accuracy": 0.31 if domain.startswith("med") else None,
            "tokens": 4200,
            "examples": 60,
        }
        for domain, value in bits.items()
    }
    means = {
        key: sum(values[key] for values in by_domain.values()) / len(by_domain)
        for key in ("log_perplexity", "bits_per_byte", "token_accuracy")
    }
    return {
        **next(iter(by_domain.values())),
        "tokens": 16800,
        "examples": 240,
        "mean_over_domains": means,
        "by_domain": by_domain,
    }


def _evaluation(devices: list[str]) -> dict[str, Any]:
    def spread(start: float) -> dict[str, float]:
        return {domain: start + i / 5 for i, domain in enumerate(DOMAINS)}

    moe, control, base = _metrics(spread(1.71)), _metrics(spread(1.93)), _metrics(spread(2.42))
    own = _metrics(spread(1.75))["by_domain"]
    best = {
        domain: {"device": devices[i], "type": "tiny-gpt2", **own[domain]} for i, domain in enumerate(DOMAINS)
    }
    proxies = {
        str(i): {
            "type": "tiny-gpt2",
            "devices": devices[i::4],
            "domain": domain,
            **_metrics({domain: 1.68 + i / 5}),
        }
        for i, domain in enumerate(DOMAINS)
    }
    differences = {
        key: moe["mean_over_domains"][key] - control["mean_over_domains"][key]
        for key in moe["mean_over_domains"]
    }
    return {
        "moe": moe,
        "references": {"base": base, "no_distillation": control, "devices": best, "proxies": proxies},
        "proxy_against_members": [
            {"cluster": 0, "domain": "fiqa", "proxy": 3.52, "best_member": 3.55, "difference": -0.03}
        ],
        "expert_use": {domain: [[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.3, 0.2]] for domain in DOMAINS},
        "comparison": {
            "moe_minus_no_distillation": differences,
            "moe_minus_base": differences,
            "bits_per_byte_ratio_to_proxies": 1.017,
        },
    }


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with every artefact the report reads; all text of strangers in it is hostile."""
    devices = [f"d{i:02d}" for i in range(8)]
    run = tmp_path / "a-run"
    run.mkdir()
    _write(run / "evaluation.json", _evaluation(devices))
    facts = {"documents": 210, "tokens": 18_200, "loss_before": 5.1, "loss_after": 3.4, "bytes": 3_412_000}
    Registry([entry(device, type=HOSTILE, **facts) for device in devices]).write(run / "registry.json")
    Rejected(
        {HOSTILE: [Problem("digest", "sha256 differs", "model.safetensors"), Problem("x", HOSTILE, HOSTILE)]}
    ).write(run / "rejected.json")
    grouped(*(devices[i::4] for i in range(4)), types=(HOSTILE,) * 4).write(run / "clusters.json")
    _write(
        run / "manifest.json",
        {
            "version": "0.1.0",
            "git_sha": "0123abc",
            "argv": ["deepfusion", "run", "--set", "seed=3"],
            "packages": {"torch": "2.13.0"},
            "stages": {
                "device": {"status": "done", "seconds": 93.2, "peak_rss_bytes": 812_000_000},
                "distill": {
                    "status": "done",
                    "seconds": 4000.0,
                    "peak_rss_bytes": 912_000_000,
                    "digests": {"bases": "ab" * 32},
                },
                "tune": {"status": "running", "seconds": None, "peak_rss_bytes": None},
            },
        },
    )
    _write(
        run / "transport.json",
        {
            "devices": {device: {"up_bytes": 3_412_000, "down_bytes": 2_100} for device in devices},
            "total_up_bytes": 27_296_000,
            "total_down_bytes": 16_800,
        },
    )
    save_config(parse_config({"seed": 3}), run / "config.yaml")
    before = progress.attached()
    progress.attach(run)
    for stage, units in (
        ("device", [*devices[:7], HOSTILE]),
        ("distill", ["trunk", "0", "1", "2", "3"]),
        ("tune", ["moe"]),
    ):
        for unit in units:
            for step in range(10, 310, 10):
                noise = 0.05 * math.sin(step + ord(unit[-1]))
                progress.record(stage, unit, step, 300, {"loss": 3 + 3 * math.exp(-step / 90) + noise})
    progress.attach(before)
    return run


class _Page(HTMLParser):
    """The tags and the visible text of a page; checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def test_report_of_a_whole_run_has_every_section(folder: Path, tmp_path: Path) -> None:
    summary = report.run(parse_config({}), {"run": folder}, tmp_path / "out")
    html = (tmp_path / "out" / "report" / "index.html").read_text("utf-8")
    page = _Page(html)
    assert page.open == []
    assert summary["bytes"] == len(html.encode())
    assert "Not there" not in page.text
    for shown in (
        "2.420",
        "1.02×",
        "27.3 MB",
        "1 h 06 min",
        "912.0 MB",
        "sha256 differs",
        "layer 1",
        "seed 3",
        "ab" * 8,
    ):
        assert shown in page.text
    # bars, similarity, 4 maps of experts, 3 stages
    assert sum(tag == "svg" for tag, _ in page.tags) == 9


def test_page_asks_for_nothing_outside_itself(folder: Path) -> None:
    html = render(folder)
    page = _Page(html)
    assert not {"script", "link", "img", "iframe", "image"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if {"src", "href", "srcset"} & set(attrs)]
    assert not re.search(r"url\(|@import|https?://", html)


def test_names_from_uploads_are_escaped(folder: Path) -> None:
    html = render(folder)
    page = _Page(html)
    assert page.text.count(HOSTILE) >= len(DOMAINS) + 8 + 3  # of clusters, of devices, of what was set aside
    assert "<script" not in html


@pytest.mark.parametrize("missing", ARTEFACTS)
def test_missing_artefact_is_said_to_be_missing(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    page = _Page(render(folder))
    assert page.open == []
    assert f"{missing}" in page.text
    assert "Not there" in page.text


def test_empty_run_folder_still_makes_a_page(tmp_path: Path) -> None:
    page = _Page(render(tmp_path))
    assert page.open == []
    assert page.text.count("Not there") >= len(ARTEFACTS)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_half_written_files_do_not_stop_the_report(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    assert _Page(render(folder)).open == []


def test_evaluation_with_absent_sections(folder: Path) -> None:
    evaluation = _evaluation([f"d{i:02d}" for i in range(8)])
    evaluation["references"] = {"base": None, "no_distillation": None, "devices": None, "proxies": None}
    evaluation["proxy_against_members"] = evaluation["expert_use"] = None
    evaluation["comparison"] = {
        "moe_minus_no_distillation": None,
        "moe_minus_base": None,
        "bits_per_byte_ratio_to_proxies": None,
    }
    _write(folder / "evaluation.json", evaluation)
    page = _Page(render(folder))
    assert "DeepFusion MoE" in page.text
    assert "Untouched base" not in page.text
    _write(folder / "evaluation.json", dict.fromkeys(evaluation))
    assert "Not there" in _Page(render(folder)).text


def test_models_with_other_tokenizers_stand_in_comparable_metrics_only(folder: Path) -> None:
    models = compared(Evaluation.read(folder / "evaluation.json"))
    names = [model.name for model in models]
    assert names[0] == "DeepFusion MoE"
    assert len(names) == 5
    for model in models:
        assert model.value("bits_per_byte", "fiqa") is not None
        assert (model.value("log_perplexity", "fiqa") is not None) == (model.same_tokenizer is True)
    assert models[0].mean("bits_per_byte", list(DOMAINS)) == pytest.approx(1.71 + 0.3)
    assert models[4].mean("bits_per_byte", [*DOMAINS, "law"]) is None


def test_summary_table_for_the_terminal(folder: Path, tmp_path: Path) -> None:
    console = Console(width=160, record=True)
    console.print(summary_table(folder))
    shown = console.export_text()
    for piece in (
        *DOMAINS,
        "DeepFusion MoE",
        "No distillation",
        "Untouched base",
        "Best device",
        "1.710",
        "2.420",
    ):
        assert piece in shown
    assert summary_table(tmp_path / "nowhere").startswith("not evaluated")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=1, max_size=30),
    st.text(max_size=30).filter(lambda text: all(c.isprintable() for c in text)),
)
def test_charts_are_well_formed_for_any_numbers_and_names(matrix: list[list[float]], name: str) -> None:
    rows = [name] * len(matrix)
    for chart in (
        heat_map(matrix, rows, [name, "b", "c"], name, ".2f", breaks=[1]),
        line_chart({name: [(i, row[0]) for i, row in enumerate(matrix)]}, name, "step", "loss"),
        grouped_bars(
            rows,
            {name: [abs(row[0]) or None for row in matrix] + [1.0], "b": [1.0] * len(matrix)},
            name,
            ".2f",
        ),
    ):
        root = ElementTree.fromstring(f"<div>{chart}</div>")
        assert root.find("svg") is not None
        assert "nan" not in str(chart)
