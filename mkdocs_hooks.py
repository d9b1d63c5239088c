"""What mkdocs does beyond Markdown: pages that come from the code, and links to files beside docs/.

The documents are read in the repository too, so their links are paths of files. In the site a link to a module leads
to its page of the Python API, and any other file that is linked becomes part of the site.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from deepfusion.cli.app import app
from deepfusion.config import explain

ROOT = Path(__file__).parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "deepfusion"
API = "reference/python"
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the Python API into the navigation."""
    assert config.nav is not None
    api = [f"{API}/index.md", *({room: f"{API}/{room}.md"} for room in _rooms())]
    for section in config.nav:
        if "Reference" in section:
            section["Reference"].append({"Python API": api})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, README as the first page, and all files of the repository that a page links to."""
    pages = {
        "reference/keys.md": _keys(),
        "reference/commands.md": _commands(),
        "reference/schemas.md": _schemas(),
        f"{API}/index.md": _api_index(),
        **{f"{API}/{room}.md": f"::: deepfusion.{room}\n" for room in _rooms()},
    }
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    known, open_pages = set(), [ROOT / "README.md", *DOCS.rglob("*.md")]
    while open_pages:
        path = open_pages.pop()
        if path in known:
            continue
        known.add(path)
        if files.get_file_from_path(_uri(path)) is None:
            inclusion = InclusionLevel.INCLUDED if _uri(path) == "index.md" else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, _uri(path), abs_src_path=str(path), inclusion=inclusion))
        if path.suffix == ".md":
            open_pages += [target for target in _targets(path) if _module(target) is None]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links to files beside docs/ links of the site."""
    if page.file.abs_src_path is None:
        return markdown
    here = Path(page.file.abs_src_path)

    def in_site(link: re.Match[str]) -> str:
        label, path, anchor = link.groups("")
        target = _resolve(here, path)
        if not target.is_file():  # code that looks like a link; of a broken link mkdocs itself complains
            return link.group(0)
        if (module := _module(target)) is not None:
            return f"[{label}][{module}]"
        return f"[{label}]({os.path.relpath(_uri(target), Path(page.file.src_uri).parent)}{anchor})"

    return LINK.sub(in_site, markdown)


def _resolve(page: Path, path: str) -> Path:
    return Path(os.path.normpath(page.parent / path))


def _targets(page: Path) -> Iterable[Path]:
    found = (_resolve(page, path) for _, path, _ in LINK.findall(page.read_text("utf-8")))
    return [target for target in found if target.is_file()]  # mkdocs complains about the others


def _uri(path: Path) -> str:
    """Where a file of the repository is in the sources of the site."""
    if path == ROOT / "README.md":
        return "index.md"
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def _module(path: Path) -> str | None:
    """The dotted name of a module that has a place in the Python API."""
    if path.suffix != ".py" or not path.is_relative_to(PACKAGE):
        return None
    room, *inner = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["deepfusion", room, *inner]).removesuffix(".__init__") if room in _rooms() else None


def _rooms() -> list[str]:
    """The packages and modules on the first level; the command line has a page of its own."""
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"cli", "tiny"}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    return sorted(packages | modules)


def _api_index() -> str:
    lines = [
        "# Python API",
        "",
        "::: deepfusion",
        "    options: {heading_level: 2, show_submodules: false}",
        "",
        "## Modules",
        "",
    ]
    for room in _rooms():
        source = PACKAGE / room / "__init__.py" if (PACKAGE / room).is_dir() else PACKAGE / f"{room}.py"
        said = ast.get_docstring(ast.parse(source.read_text("utf-8"))) or ""
        lines.append(f"- [{room}]({room}.md): {' '.join(said.partition(chr(10) * 2)[0].split())}")
    return "\n".join(lines) + "\n"


def _keys() -> str:
    """Every key of the config, a table for each section."""
    parts = [
        "# Keys\n\nWhat `deepfusion config explain` prints. [Configuration](configuration.md) says how to set them."
    ]
    for section, rows in groupby(
        explain(), key=lambda row: row[0].partition(".")[0] if "." in row[0] else ""
    ):
        lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, kind, default, meaning in rows:
            shown = json.dumps(default, default=str)
            lines.append(f"| `{key}` | `{kind}` | `{shown}` | {meaning.replace('|', chr(92) + '|')} |")
        parts.append(f"## {section or 'Top level'}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    """Every command with its arguments and options."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=command.make_context("deepfusion", [], resilient_parsing=True), name="deepfusion"
    )
    intro = (
        "A command exits with 0 (done), 2 (bad input, [one line](errors.md) says what and how to mend it) or 1 (a "
        "defect of the program). With `--json` it prints one JSON object on stdout and nothing else."
    )
    return f"# Commands\n\n{intro}\n\n" + re.sub(r"^#", "##", text, flags=re.MULTILINE)


def _schemas() -> str:
    """The JSON schema of every file that is exchanged."""
    parts = [
        "# JSON schemas\n\nWhat the files of uploads and run folders hold, as [JSON Schema](https://json-schema.org)."
    ]
    for name, model in sorted(_models().items()):
        schema = json.dumps(model.model_json_schema(), indent=2)
        parts.append(f"## {name}\n\n```json\n{schema}\n```")
    return "\n\n".join(parts) + "\n"


def _models() -> dict[str, type[BaseModel]]:
    from deepfusion.records import SCHEMAS

    return SCHEMAS
