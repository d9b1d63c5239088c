"""The report of a run: one self-contained HTML page, and its main table for the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deepfusion.errors import InputError
from deepfusion.folders import write_whole
from deepfusion.report.artefacts import write_final_card
from deepfusion.report.page import is_report, render
from deepfusion.schema import Config


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Write `out`/report/index.html from the artefacts of the run folder `inputs["run"]`; it says what is missing.

    The config shown is the one in the run folder: the report tells what happened, not what is configured now.

    Raises:
        InputError: there is a `report` that is something else.
    """
    folder = inputs["run"]
    page = out / "report" / "index.html"
    if os.path.lexists(page.parent) and not is_report(page.parent):
        fix = "move it away"
        raise InputError("DeepFusion did not make this report", where=page.parent, fix=fix, code="not-ours")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, render(folder))
    if (folder / "moe" / "final").is_dir():
        write_final_card(
            config, folder, folder / "moe" / "final"
        )  # now the card can tell how the model measured
    return {"bytes": page.stat().st_size}
