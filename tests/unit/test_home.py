"""The server's home: secrets on disk, and who may take part, as seen by several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import example, given
from hypothesis import strategies as st

from deepfusion.errors import InputError
from deepfusion.federation import identity
from deepfusion.federation.server.home import Enrolled, Home
from deepfusion.names import is_device_id

KEYS = [ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(3)]
HEAD = "home, arguments = Home(Path(sys.argv[1])), sys.argv[2:]\n"
LINES = [identity.public_line(key) for key in KEYS]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def start(code: str, home: Home, *arguments: str) -> subprocess.Popen[str]:
    """Another process of the same operator, which works with `home` and `arguments`."""
    script = f"import sys; from pathlib import Path; from deepfusion.federation.server.home import Home\n{HEAD}{code}"
    command = [sys.executable, "-c", script, str(home.folder), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def refused(home: Home, device: str, line: str) -> str:
    before = dict(home.devices)
    with pytest.raises(InputError) as caught:
        home.enroll(device, line)
    assert home.devices == before
    return caught.value.code


# The folder


def test_nobody_else_can_look_inside(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        home = Home(tmp_path / "some" / "home")
        home.prepare(["fusion.example.org"])
        home.enroll("clinic", LINES[0])
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [home.folder, *home.folder.iterdir()]}
    assert modes["home"] == 0o700
    secret = {"ca.key", "server.key", "superexec.secret", "devices.json"}
    assert {name: modes[name] for name in secret} == dict.fromkeys(secret, 0o600)


def test_folder_that_is_open_to_others_is_closed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    Home(tmp_path / "home").prepare([])
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700


def test_prepare_again_changes_nothing(home: Home) -> None:
    home.prepare(["fusion.example.org"])
    before = {path.name: path.read_bytes() for path in home.folder.iterdir()}
    Home(home.folder).prepare(["fusion.example.org"])
    assert {path.name: path.read_bytes() for path in home.folder.iterdir()} == before
    assert len(home.superexec_secret.read_bytes()) >= 32


def test_two_homes_share_no_secret(tmp_path: Path) -> None:
    homes = [Home(tmp_path / name) for name in "ab"]
    for home in homes:
        home.prepare([])
    for kind in ("superexec_secret", "certificate_key", "ca", "certificate"):
        assert len({getattr(home, kind).read_bytes() for home in homes}) == 2


def test_tilde_is_the_home_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Home(Path("~/server")).folder == tmp_path.resolve() / "server"


# Enrolment


def test_nobody_is_enrolled_at_first(home: Home) -> None:
    assert home.devices == {}
    assert home.who(KEYS[0]) is None


def test_enrolled_devices_are_known_by_their_keys(home: Home) -> None:
    home.enroll("clinic", f"{LINES[0]} owner@laptop")
    home.enroll("Bank-2.north_1", LINES[1])
    assert home.who(KEYS[0]) == Enrolled("clinic", LINES[0])
    assert home.who(KEYS[1]) == Enrolled("Bank-2.north_1", LINES[1])
    assert home.who(KEYS[2]) is None
    assert list(Home(home.folder).devices) == ["clinic", "Bank-2.north_1"]


def test_enrolling_twice_is_no_error(home: Home) -> None:
    home.enroll("clinic", LINES[0])
    home.enroll("clinic", LINES[0])
    assert home.devices == {"clinic": Enrolled("clinic", LINES[0])}


def test_one_name_one_key(home: Home) -> None:
    home.enroll("clinic", LINES[0])
    assert refused(home, "clinic", LINES[1]) == "already-enrolled"
    assert refused(home, "bank", LINES[0]) == "already-enrolled"


def test_revoked_device_is_known_as_such(home: Home) -> None:
    home.enroll("clinic", LINES[0])
    home.enroll("bank", LINES[1])
    home.revoke("clinic")
    assert home.who(KEYS[0]) == Enrolled("clinic", LINES[0], revoked=True)
    assert home.who(KEYS[1]) == Enrolled("bank", LINES[1])
    home.revoke("clinic")
    assert home.devices["clinic"].revoked


def test_revoked_key_stays_out_under_any_name(home: Home) -> None:
    home.enroll("clinic", LINES[0])
    home.revoke("clinic")
    assert refused(home, "clinic", LINES[0]) == "revoked"
    assert refused(home, "other", LINES[0]) == "revoked"


def test_revoked_device_comes_back_with_a_new_key(home: Home) -> None:
    home.enroll("clinic", LINES[0])
    home.revoke("clinic")
    home.enroll("clinic", LINES[1])
    assert home.who(KEYS[1]) == Enrolled("clinic", LINES[1])
    assert (home.who(KEYS[0]) or Enrolled("clinic", LINES[0], revoked=True)).revoked  # never the device again


def test_only_what_is_enrolled_can_be_revoked(home: Home) -> None:
    with pytest.raises(InputError, match="none yet"):
        home.revoke("clinic")
    home.enroll("clinic", LINES[0])
    with pytest.raises(InputError, match="allowed: clinic") as caught:
        home.revoke("clinc")
    assert caught.value.code == "not-enrolled"


@pytest.mark.parametrize("line", ["", "clinic", LINES[0][:60], LINES[0].split()[1]])
def test_what_is_no_key_is_refused(home: Home, line: str) -> None:
    assert refused(home, "clinic", line) == "bad-key"


@given(st.text().filter(lambda name: not is_device_id(name)))
@example("../clinic")
@example("clinic\n")
@example("a" * 64)
@example(".hidden")
@example("-rf")
def test_what_is_no_name_is_refused(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    home = Home(tmp_path_factory.getbasetemp() / "never-made")
    assert refused(home, name, LINES[0]) == "bad-device-name"
    assert not home.folder.exists()


# Several processes


def test_changes_of_another_process_are_seen_at_once(home: Home) -> None:
    home.enroll("clinic", LINES[0])
    assert home.who(KEYS[0]) is not None
    with start("home.revoke('clinic'); home.enroll('bank', arguments[0])", home, LINES[1]) as operator:
        assert operator.wait(60) == 0
    assert home.who(KEYS[0]) == Enrolled("clinic", LINES[0], revoked=True)
    assert home.who(KEYS[1]) == Enrolled("bank", LINES[1])


def test_change_after_change_is_seen(home: Home) -> None:
    """However close they follow each other, within one tick of the file system's clock."""
    gateway = Home(home.folder)
    for number in range(50):
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
        home.enroll(f"d{number}", identity.public_line(key))
        assert gateway.who(key) is not None
        home.revoke(f"d{number}")
        assert gateway.devices[f"d{number}"].revoked


def test_no_change_is_lost_when_operators_work_side_by_side(home: Home) -> None:
    keys = [
        [identity.public_line(ec.generate_private_key(ec.SECP256R1()).public_key()) for _ in range(20)]
        for _ in range(2)
    ]
    code = (
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for number, line in enumerate(arguments[1:]): home.enroll(arguments[0] + str(number), line)"
    )
    operators = [start(code, home, name, *lines) for name, lines in zip("ab", keys, strict=True)]
    for operator in operators:
        assert operator.stdout is not None
        assert operator.stdout.readline() == "ready\n"
    for operator in operators:
        assert operator.stdin is not None
        operator.stdin.write("go\n")
        operator.stdin.flush()
    assert [(operator.communicate(timeout=60)[0], operator.returncode) for operator in operators] == [
        ("", 0)
    ] * 2
    expected = {
        f"{name}{i}": line for name, lines in zip("ab", keys, strict=True) for i, line in enumerate(lines)
    }
    assert {name: device.key for name, device in home.devices.items()} == expected


def test_killed_operator_leaves_a_whole_list_and_no_lock(home: Home) -> None:
    home.enroll("clinic", LINES[0])
    code = "print('ready', flush=True)\nwhile True: home.enroll('bank', arguments[0])"
    for _ in range(2):
        with start(code, home, LINES[1]) as operator:
            assert operator.stdout is not None
            assert operator.stdout.readline() == "ready\n"
            while "bank" not in home.devices:
                assert operator.poll() is None
            operator.kill()
        assert set(Home(home.folder).devices) >= {"clinic", "bank"}
        home.enroll("late", LINES[2])
        assert home.who(KEYS[2]) == Enrolled("late", LINES[2])
