"""Imports go down only, no stage imports another, and nothing dangerous is called."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))
# From the ground up: each may import what stands before it, and nothing else.
FLOOR = (
    *(
        "errors",
        "names",
        "plugins",
        "sections",
        "schema",
        "config",
        "progress",
        "digests",
        "folders",
        "manifest",
        "records",
    ),
    *("jobs", "tiny"),
)
ROOMS = (
    *("text", "inputs", "models", "uploads", "families", "learning", "report", "judge", "small"),
    *("resume", "runfolder", "plan", "stages", "pipeline", "api", "federation", "cli", "bench"),
)


def _room(module: str) -> str:
    package, *rest = module.split(".")
    return "bench" if package == "deepfusion_bench" else rest[0]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & ({_name(module) for module in MODULES} | {"deepfusion.tiny"})


def _name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_go_down(path: Path) -> None:
    own = _name(path)
    for other in _imports(path):
        if _room(own) == _room(other):
            assert _room(own) != "stages", f"{own} imports {other}: stages meet through folders"
        elif _room(other) not in FLOOR:
            assert _room(own) in ROOMS, f"{own} stands on the floor and imports {other}"
            assert ROOMS.index(_room(other)) < ROOMS.index(_room(own)), (
                f"{own} imports {other}, which lies above it"
            )


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_flower_is_known_in_one_place(path: Path) -> None:
    names = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
    }
    assert "flwr" not in names or _name(path).startswith("deepfusion.federation.flower.")


def test_the_first_level_has_ten_rooms_at_most_and_each_says_what_it_is_for() -> None:
    rooms = sorted(path.parent for path in (SOURCE / "deepfusion").glob("*/__init__.py"))
    assert len(rooms) <= 10
    for room in rooms:
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text("utf-8"))), (
            f"{room.name} does not say"
        )


def test_libraries_have_no_cycles() -> None:
    graph = {_name(path): _imports(path) for path in MODULES}

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, " -> ".join([*trail, node])
        for other in graph.get(node, ()):
            visit(other, (*trail, node))

    for node in graph:
        visit(node, ())


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_no_untrusted_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "pickle.load", "pickle.loads", "eval", "exec"}, (
                f"{path.name}: {called}"
            )
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


@pytest.mark.parametrize("module", ["server.start", "device.join", "server.gateway", "flower.coordinator"])
def test_moving_uploads_needs_no_model_framework(module: str) -> None:
    imported = f"deepfusion.cli.app, deepfusion.federation.{module}"
    check = f"import sys, {imported}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_families_are_named_in_their_own_files_only() -> None:
    """But for the default of the config and the makers of the tiny bases."""
    from deepfusion.families import base

    known = set(base.names())
    elsewhere = [p for p in MODULES if not {"families", "tiny"} & set(p.parts) and p.name != "schema.py"]
    found = [
        f"{path.name}: {node.value}"
        for path in elsewhere
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and node.value in known
    ]
    assert found == []
