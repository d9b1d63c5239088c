"""Phase times, speed and peak memory of a run: `python benchmarks/quickstart.py RUN > benchmarks/quickstart.md`.

`make demo` leaves such a run in runs/quickstart. Seconds are wall clock; memory is that of the main process and
its workers.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from deepfusion.manifest import Manifest


def speeds(run: Path) -> dict[str, tuple[int, float]]:
    """Per stage: number of trainings, and the median over trainings of their last tokens per second."""
    last: dict[tuple[str, str], float] = {}
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        last[row["stage"], row["unit"]] = row["tokens_per_second"]
    by_stage = defaultdict(list)
    for (stage, _), speed in last.items():
        by_stage[stage].append(speed)
    return {stage: (len(values), median(values)) for stage, values in by_stage.items()}


def main(run: Path) -> None:
    """Print the table."""
    manifest = Manifest.read(run)
    measured = speeds(run)
    machine = manifest.hardware
    print("# Quickstart: time, speed and memory\n")
    print(
        f"{machine['cores']} cores ({machine['machine']}), {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"GPU: {machine['gpu'] or 'none'}; torch {manifest.packages['torch']}, "
        f"transformers {manifest.packages['transformers']}; seed {manifest.seed}, "
        f"revision {(manifest.git or 'unknown')[:12]}.\n"
    )
    print("| stage | seconds | peak memory (GiB) | trainings | tok/s a training |\n|---|---|---|---|---|")
    for name, stage in manifest.stages.items():
        count, speed = measured.get(name, (0, 0.0))
        memory, shown = (stage.peak_rss_bytes or 0) / 2**30, f"{speed:,.0f}" if count else ""
        print(f"| {name} | {stage.seconds or 0:.1f} | {memory:.2f} | {count or ''} | {shown} |")
    print(f"| **all** | **{sum(stage.seconds or 0 for stage in manifest.stages.values()):.1f}** | | | |")
    print(
        "\nMade by `make demo && python benchmarks/quickstart.py runs/quickstart > benchmarks/quickstart.md`."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
