"""Configs: recipes, YAML, overrides, digests, and explanations of every key."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from deepfusion import plugins, progress
from deepfusion.errors import InputError
from deepfusion.folders import write_whole
from deepfusion.schema import Config, effective_handover, without_effect
from deepfusion.sections import DeviceSpec, within

CONFIGS = Path(__file__).parent / "configs"

RENAMED: dict[str, str] = {"distill.vaa.stages": "distill.vaa.blocks"}
"""Keys or sections by their old names, and what they are called now: accepted with a warning for one minor version, see
RELEASE.md."""


# What a recipe sets; a file or --set may still say otherwise.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "clustering": {"average": "uniform"},
        "distill": {"trunk_share": 0.0, "train": "all"},
        "tune": {"teachers": False, "train_experts": False},
    },
    "fused": {
        "clustering": {"average": "tokens"},
        "distill": {
            "trunk_share": 1.0,
            "train": "ffn",
            "alpha": 1.0,
            "sampled_ce": 0.0,
            "sampled_share": 0.5,
        },
        "tune": {"teachers": True, "train_experts": True},
    },
}


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    renamed: Mapping[str, str] = RENAMED,
    for_many: bool = False,
) -> Config:
    """Read a config file (None: the quickstart) and apply `key=value` overrides, whose values are YAML.

    Args:
        renamed: old names of keys and sections, and their new ones; whoever uses an old one is warned.
        for_many: the overrides are meant for several configs, and not each has to read all of them.

    Raises:
        InputError: missing or malformed file, unknown key (with the nearest valid one), wrong type or value, or
            values that contradict each other.
    """
    if isinstance(overrides, str):
        raise TypeError(f"overrides is a list of texts, such as [{overrides!r}]")
    path = CONFIGS / "quickstart.yaml" if path is None else Path(path)
    values = _read_yaml(path)
    for old, new in rename_keys(values, renamed, where=path).items():
        _tell(old, new, path)
    packaged = path.is_relative_to(CONFIGS)
    given = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise InputError(
                f"--set {override} is not of the form key=value",
                allowed="--set tune.steps=100",
                code="bad-override",
            )
        key = key.strip()
        if (part := _renamed_part(key, renamed)) is not None:
            _tell(part, renamed[part], f"--set {override}")
        key = current_name(key, renamed)
        given.append(f"{key}={value}")
        _set(values, key.split("."), _parse_value(value, override))
    recipe = values.get("recipe", "fused")
    layered = _overlay(RECIPES[recipe], values) if isinstance(recipe, str) and recipe in RECIPES else values
    if (
        packaged
        and not _blamed(["clustering.proxies"], given)
        and "clustering.proxies" in _conflicting(layered)
    ):
        del layered["clustering"]["proxies"]  # fuse.yaml has as many as fit: it gives way to what a user sets
    config = parse_config(layered, path, given)
    defaults = {key: default for key, _, default, _ in explain()} if given else {}
    for override in [] if for_many else given:
        key, _, value = override.partition("=")
        wish, usual = _parse_value(value, override), defaults.get(key)
        by_recipe = _has(RECIPES.get(config.recipe, {}), key)
        # What switches something off, or says what is so anyway, changes nothing and is in nobody's way.
        if wish and (wish != usual or by_recipe) and (why := without_effect(config, key)) is not None:
            what, fix = f"{key} has no effect: {why}", f"leave out --set {key}, or change the other key"
            raise InputError(what, where=f"--set {override}", fix=fix, code="contradiction")
    return config


def parse_config(values: dict[str, Any], where: object = "config", overrides: Sequence[str] = ()) -> Config:
    """Validate plain values; the error names the override or else the file, the key and what is allowed."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain_error(error, where, overrides) from None


def _conflicting(values: dict[str, Any]) -> set[str]:
    """The keys that do not go together, of the first contradiction."""
    try:
        Config.model_validate(values)
    except ValidationError as error:
        return {key for one in error.errors() if one["type"] == "contradiction" for key in one["ctx"]["keys"]}
    return set()


def save_config(config: Config, path: Path) -> None:
    """Write the complete resolved config as YAML."""
    write_whole(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def config_digest(config: Config, *keys: str) -> str:
    """A digest of the whole config or of the given dotted keys, of what takes effect: of `effective_handover`."""
    values = config.model_dump(mode="json")
    values["distill"]["handover"] = effective_handover(config)
    chosen = {key: _get(values, key) for key in keys} if keys else values
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def explain(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Every key as (dotted key, type, default, meaning)."""
    defaults: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from explain(kind, f"{key}.")
        else:
            if not field.is_required():
                defaults[name] = field.get_default(call_default_factory=True, validated_data=defaults)
            shown = " | ".join(plugins.names(NAMED[key])) if key in NAMED else _type_name(kind)
            yield key, shown, defaults.get(name), field.description or ""


NAMED = {key: group for group, key in plugins.KEYS.items()}
"""The keys that name something of `plugins`, with its group."""


def known_keys() -> list[str]:
    """Every dotted key that `--set` takes."""
    return [key for key, *_ in explain()]


def nearest_key(key: str) -> str | None:
    """The section or key that someone who wrote `key` probably meant."""
    known = [*known_keys(), *(f"devices.{name}" for name in DeviceSpec.model_fields)]
    sections = {section: section for name in known if (section := name.rpartition(".")[0])}
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    near = difflib.get_close_matches(plain, [*sections, *known], n=1, cutoff=0.7)
    near = near or [last[name] for name in difflib.get_close_matches(plain.rpartition(".")[2], last, n=1)]
    return near[0] if near else None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        fix = "deepfusion config show prints a complete one"
        raise InputError("there is no such config file", where=path, fix=fix, code="no-config")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not valid YAML: {error}", where=path, code="bad-yaml") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError("a config is a mapping of keys", where=path, code="bad-yaml")
    return values


def _parse_value(text: str, override: str) -> Any:
    """The value of an override: YAML where it is quoted, a list, an object, a number, true, false or null; else the
    text itself.

    A file may be called `a #1.jsonl`, `*.jsonl` or `notes: ward.jsonl`, of which YAML would make a comment, an
    alias or an object.
    """
    text = text.strip()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        if text.startswith(("[", "{", '"', "'")):
            fix = "in a list, quote text with signs in it, as in '[\"a #1.jsonl\"]'"
            what = f"--set {override}: the value is not valid YAML"
            raise InputError(what, fix=fix, code="bad-override") from None
        return text
    if text.startswith(("[", "{", '"', "'")):
        return value
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text.
        try:
            return float(text)
        except ValueError:
            return text
    if value is None:
        return None if text.lower() in ("", "~", "null") else text
    return value if isinstance(value, bool | int | float) else text


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        nested = values.setdefault(key, {})
        if not isinstance(nested, dict):
            raise InputError(
                f"{key} is a value, not a section", where=f"--set {'.'.join(keys)}", code="bad-override"
            )
        values = nested
    values[keys[-1]] = value


def current_name(key: str, renamed: Mapping[str, str] = RENAMED) -> str:
    """What a dotted key, which may have been renamed or be in a section that was, is called now."""
    old = _renamed_part(key, renamed)
    return renamed[old] + key[len(old) :] if old else key


def _renamed_part(key: str, renamed: Mapping[str, str]) -> str | None:
    return next((old for old in renamed if within(key, [old])), None)


def rename_keys(
    values: dict[str, Any], renamed: Mapping[str, str] = RENAMED, *, where: object
) -> dict[str, str]:
    """Move what nested `values` say under old names to the new ones.

    Returns:
        The old names that were found, and their new ones.

    Raises:
        InputError: both names of a key are there (`contradiction`).
    """
    found = {}
    for old in renamed:
        *sections, last = old.split(".")
        holder: Any = values
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or last not in holder:
            continue
        new = found[old] = renamed[old]
        if _has(values, new):
            what = f"{old} and {new} are one key, which was renamed"
            raise InputError(what, where=where, fix=f"remove {old}", code="contradiction")
        _set(values, new.split("."), holder.pop(last))
    return found


def _tell(old: str, new: str, where: object) -> None:
    progress.warn(
        f"{where}: {old} is now called {new}; the old name is accepted until the next minor version"
    )


def _has(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _get(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _explain_error(error: ValidationError, where: object, overrides: Sequence[str]) -> InputError:
    errors = error.errors()
    # A value of several allowed types fails once for each; the error that lies deepest is the one that was meant. A
    # wrong key often makes the right one missing, and says more.
    related = (e for e in errors if e["loc"][:1] == errors[0]["loc"][:1])
    first = max(related, key=lambda e: (len(e["loc"]), e["type"] == "extra_forbidden"))
    key = ".".join(
        str(part) for part in first["loc"] if part not in ("list[DeviceSpec]", "list[str]", "str", "int")
    )
    if first["type"] == "contradiction":
        found = first["ctx"]
        blamed = _blamed(found["keys"], overrides)
        fix = found["fix"] or f"deepfusion config explain {found['keys'][0]}"
        return InputError(
            found["what"],
            where=" ".join(blamed) or where,
            allowed=found["allowed"],
            fix=fix,
            code=found["code"],
        )
    where = [where, *_blamed([key], overrides)][-1]
    if first["type"] == "extra_forbidden":
        near = nearest_key(key)
        hint = f"did you mean {near}?" if near else "deepfusion config explain lists every key"
        return InputError(f"unknown key {key}", where=where, fix=hint, code="unknown-key")
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
    what = f"{key}: {message}{got}" if key else message
    return InputError(
        what[:400], where=where, fix=f"deepfusion config explain {key}".rstrip(), code="bad-value"
    )


def _blamed(keys: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The overrides that set one of the keys or a part of the config that holds it, as `--set key=value`."""
    return [
        f"--set {override}"
        for override in overrides
        if any(f"{key}.".startswith(f"{override.partition('=')[0].strip()}.") for key in keys)
    ]


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    return str(kind).replace("typing.", "").replace("deepfusion.sections.", "").replace("NoneType", "None")
