"""What Python programs import: light and typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deepfusion
from deepfusion.cli.app import app
from deepfusion.config import load_config
from deepfusion.errors import InputError

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "peft",
    "sklearn",
    "scipy",
    "numpy",
    "pandas",
    "matplotlib",
    "flwr",
)


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program of its own, as of a user of the library."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_public_names_are_what_they_stand_for() -> None:
    from deepfusion import InputError as Error
    from deepfusion import api, fuse, run

    assert (Error, fuse, run, deepfusion.load_config) == (InputError, api.fuse, api.run, load_config)
    assert set(deepfusion.__all__) <= set(dir(deepfusion))
    namespace: dict[str, Any] = {}
    exec("from deepfusion import *", namespace)
    assert set(deepfusion.__all__) <= set(namespace)


def test_other_names_are_not_there() -> None:
    assert not hasattr(deepfusion, "fuze")
    with pytest.raises(ImportError, match="cannot import name 'fuze'"):
        from deepfusion import fuze  # type: ignore[attr-defined]  # noqa: F401


def test_types_are_published() -> None:
    assert (Path(deepfusion.__file__).parent / "py.typed").is_file()


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import deepfusion; import json; {}; print(json.dumps(found))"
    )
    loaded = "found = sorted({m.split('.')[0] for m in set(sys.modules) - before})"
    assert "pydantic" not in json.loads(python(code.format(loaded)).stdout)
    tops = json.loads(python(code.format(f"deepfusion.load_config; deepfusion.InputError; {loaded}")).stdout)
    assert "pydantic" in tops
    assert set(tops) & set(HEAVY) == set()


def test_the_command_line_says_its_help_without_any_framework() -> None:
    code = f"import sys; from deepfusion.cli.app import app; print({set(HEAVY)!r} & set(sys.modules))"
    assert python(code).stdout == "set()\n"
    assert app is not None


def test_fuse_refuses_what_it_would_ignore(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overrides"):
        deepfusion.fuse(tmp_path, tmp_path / "run", config=load_config(), overrides=["experts=2"])
    with pytest.raises(InputError, match="experts"):
        deepfusion.fuse(tmp_path, tmp_path / "run", overrides=["experts=0"])
    with pytest.raises(InputError, match="unknown-stage"):
        deepfusion.run(load_config(), tmp_path / "run", last="nothing")
    assert list(tmp_path.iterdir()) == []


def test_one_override_that_is_no_list_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="overrides is a list of texts"):
        load_config(None, "experts=2")  # type: ignore[arg-type]


def test_run_takes_the_file_of_a_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no-config"):
        deepfusion.run(tmp_path / "missing.yaml", tmp_path / "run")


@pytest.mark.parametrize(
    "override", ["device.steps=3", "devices=3", "federation.wait_for=2", "device.types=[x]"]
)
def test_fuse_refuses_what_only_devices_read(tmp_path: Path, override: str) -> None:
    with pytest.raises(InputError, match="contradiction"):
        deepfusion.fuse(tmp_path, tmp_path / "run", overrides=[override])
