"""Recipe `fused` against recipe `paper` on the quickstart: `python benchmarks/recipes.py [--seeds 0 1 2] [--jobs N]`.

Both recipes get the same uploads, public text, steps and batch sizes; only the recipe differs. One JSON per cell in
benchmarks/results, from which benchmarks/recipes.md is generated. A cell that has its JSON is not run again; a
killed cell goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from deepfusion import pipeline, progress
from deepfusion.config import RECIPES, load_config

HERE = Path(__file__).parent


def cell(seed: int, recipe: str, runs: Path, jobs: int | None) -> dict[str, Any]:
    """Run one cell, or take its stored result."""
    result = HERE / "results" / f"recipes-{recipe}-seed{seed}.json"
    if result.is_file():
        return json.loads(result.read_text("utf-8"))
    out = runs / f"{recipe}-seed{seed}"
    other = next(
        (
            runs / f"{name}-seed{seed}"
            for name in RECIPES
            if (runs / f"{name}-seed{seed}" / "uploads").is_dir()
        ),
        None,
    )
    if other is not None and not out.exists():
        shutil.copytree(other, out)  # the same uploads: the devices do not know the recipe
    manifest = pipeline.run(
        load_config(None, [f"seed={seed}", f"recipe={recipe}", f"jobs={jobs or 'null'}"]), out
    )
    evaluation = json.loads((out / "evaluation.json").read_text("utf-8"))
    found = {
        "seed": seed,
        "recipe": recipe,
        "moe": evaluation["moe"],
        "references": {name: evaluation["references"][name] for name in ("base", "no_distillation")},
        "comparison": evaluation["comparison"],
        "proxy_against_members": evaluation["proxy_against_members"],
        "stages": {
            name: {"seconds": stage.seconds, "peak_rss_bytes": stage.peak_rss_bytes}
            for name, stage in manifest.stages.items()
        },
        **manifest.model_dump(include={"version", "git", "packages", "hardware", "config_digest"}),
    }
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(found, indent=1), "utf-8")
    return found


def table(cells: list[dict[str, Any]]) -> str:
    """The comparison as Markdown, means over domains."""
    lines = ["| model | log-perplexity (nats/token) | bits per byte | runs |", "|---|---|---|---|"]

    def row(name: str, measured: list[dict[str, Any]]) -> str:
        columns = [
            [m["mean_over_domains"][key] for m in measured] for key in ("log_perplexity", "bits_per_byte")
        ]
        spread = [f"{mean(values):.4f} ± {stdev(values) if len(values) > 1 else 0:.4f}" for values in columns]
        return f"| {name} | {' | '.join(spread)} | {len(measured)} |"

    for recipe in RECIPES:
        lines.append(row(f"MoE, recipe {recipe}", [c["moe"] for c in cells if c["recipe"] == recipe]))
    first = [c for c in cells if c["recipe"] == "fused"]
    lines.append(
        row("no distillation (public text alone)", [c["references"]["no_distillation"] for c in first])
    )
    lines.append(row("public base, untouched", [c["references"]["base"] for c in first]))
    by = {(c["recipe"], c["seed"]): c["moe"]["mean_over_domains"]["log_perplexity"] for c in cells}
    paired = [by["paper", seed] - by["fused", seed] for (recipe, seed) in by if recipe == "fused"]
    lines.append(
        f"\nPaired over seeds, `fused` is better than `paper` by {mean(paired):.4f} nats/token "
        f"({', '.join(f'{value:+.4f}' for value in paired)})."
    )
    return "\n".join(lines)


def main() -> None:
    """Run every cell and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument(
        "--jobs", type=int, help="trainings side by side; 1 where several of these commands share a machine"
    )
    arguments = parser.parse_args()
    cells = [
        cell(seed, recipe, arguments.out, arguments.jobs)
        for seed in arguments.seeds
        for recipe in ("fused", "paper")
    ]
    machine = cells[0]["hardware"]
    text = (
        "# Recipes `fused` and `paper` on the quickstart\n\n"
        f"Seeds {arguments.seeds}; equal uploads, public text and optimizer steps; held-out text, "
        "means over the four domains; "
        f"mean ± standard deviation over seeds. {machine['cores']} cores, GPU: "
        f"{machine['gpu'] or 'none'}.\n\n{table(cells)}\n\n"
        "Made by `python benchmarks/recipes.py` from benchmarks/results/recipes-*.json.\n"
    )
    (HERE / "recipes.md").write_text(text, "utf-8")


if __name__ == "__main__":
    progress.to_terminal()
    main()
