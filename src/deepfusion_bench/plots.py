"""Plots of the results, as SVG files that are equal whenever the results are."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from deepfusion.folders import claim_file
from deepfusion.report.charts import COLOURS
from deepfusion_bench.cells import CASES
from deepfusion_bench.methods import METHODS
from deepfusion_bench.tables import OTHER_TOKENIZER, ROWS, read_results, row_name, with_best_bound

_AXIS = "log-perplexity, nats per token"
_STYLES = {"ours": "-", "baseline": "--", "control": ":", "bound": "-."}


def claim_page(page: Path) -> Path:
    """Where a page of results goes, its plots beside it: new files, or those of an earlier page.

    Raises:
        InputError: as `folders.claim_file`.
    """
    for case in CASES:
        claim_file(page.parent / f"results-{case}.svg", lambda text: "<svg" in text and _AXIS in text)
    return claim_file(page, lambda text: text.startswith("# Results\n"))


def write_plots(results: Path, folder: Path) -> list[Path]:
    """Log-perplexity over N, one file per case, `results-CASE.svg`; returns the files."""
    rows = [row for row in with_best_bound(read_results(results)) if row_name(row) in ROWS]
    written = []
    for case in CASES:
        own = [row for row in rows if row["case"] == case]
        if own:
            written.append(_plot(case, own, folder / f"results-{case}.svg"))
    return written


def _plot(case: str, rows: list[dict[str, Any]], path: Path) -> Path:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(name for name in ROWS if name not in OTHER_TOKENIZER):
        values = {
            count: [
                r["test"]["mean_over_domains"]["log_perplexity"]
                for r in rows
                if (row_name(r), r["devices"]) == (name, count)
            ]
            for count in sorted({r["devices"] for r in rows if row_name(r) == name})
        }
        if values:
            axes.errorbar(
                list(values), [mean(v) for v in values.values()],
                yerr=[stdev(v) if len(v) > 1 else 0 for v in values.values()],
                label=ROWS[name], color=COLOURS[index % len(COLOURS)],
                linestyle=_STYLES[METHODS[name.split("/")[0]].role],
                marker="o", markersize=4, capsize=3,
            )  # fmt: skip
    counts = sorted({row["devices"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("devices")
    axes.set_ylabel(_AXIS)
    axes.set_title(CASES[case])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with matplotlib.rc_context({"svg.hashsalt": "deepfusion", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path
