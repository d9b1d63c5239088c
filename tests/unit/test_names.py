from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.names import MAX_BYTES, MAX_CHARACTERS, device_id, device_ids, is_device_id
from deepfusion.records import Card
from deepfusion.sections import DeviceSpec

NASTY = [
    *(
        "模型一",
        "模型二",
        "my model (v1)",
        "my model [v1]",
        "my model",
        "...",
        ".hidden",
        "-x",
        "a.",
        "con",
        "nul.txt",
        " ",
        "",
    ),
    *("x" * 63 + "a", "x" * 63 + "b", "é", "e\u0301", "\u0301x", "a\u200bb", "字" * 80, "a/b", "a\\b"),
    *("\udcff", "\U0001f600", "1", "_"),
]
text = st.text(st.characters(), max_size=100) | st.sampled_from(NASTY)


@pytest.mark.parametrize(
    "name",
    [
        "clinic-1",
        "d00",
        "模型一",
        "клиника_2",
        "é",
        "मॉडल",
        "a.b-c",
        "x" * MAX_CHARACTERS,
        "字" * 63,
        "Lab-20240101",
    ],
)
def test_an_allowed_name_stays_itself(name: str) -> None:
    assert device_id(name) == name
    assert DeviceSpec(id=name, type="x").id == name


@pytest.mark.parametrize(
    "name", [*NASTY[2:13], "x" * 64, "𐍈" * 60, "a\u0301", "a b", "a\n", "²", ".", "..", "COM1"]
)
def test_a_bad_name_is_refused_by_config_and_card_alike(name: str) -> None:
    assert not is_device_id(name)
    for model in (DeviceSpec, Card):
        with pytest.raises(ValueError, match="not a name of a device"):
            model.model_validate({"id": name, "device": name, "type": "x"})


@given(text)
def test_any_text_becomes_a_valid_name(name: str) -> None:
    found = device_id(name)
    assert is_device_id(found)
    assert len(found) <= MAX_CHARACTERS
    assert len(found.encode()) <= MAX_BYTES
    assert device_id(found) == found


@given(st.lists(text, max_size=12))
def test_no_two_share_a_name_on_any_file_system(names: list[str]) -> None:
    found = device_ids(names)
    assert all(map(is_device_id, found))
    assert len({name.casefold() for name in found}) == len(names)


def test_nasty_names_are_all_kept_apart_and_readable() -> None:
    found = device_ids(NASTY)
    assert len({name.casefold() for name in found}) == len(NASTY)
    assert found[:2] == ["模型一", "模型二"]
    assert found[2].startswith("my-model-v1-")
    assert found[5].startswith("device-")


def test_what_looks_like_a_made_name_or_differs_in_case_only_is_kept_apart_too() -> None:
    made = device_id("my model")
    assert device_ids([made, "my model"])[0] == made
    upper, lower = device_ids(["Lab", "lab"])
    assert {upper.casefold()[:3], lower.casefold()[:3]} == {"lab"}
    assert upper.casefold() != lower.casefold()
    assert len(set(device_ids(["a", "a", "a"]))) == 3
