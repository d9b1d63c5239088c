"""The ledger of a run: tickets, receipts, bytes counted by several processes, and the audit log."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_offer import make_upload

from deepfusion.federation.offer import Offer, read_offer
from deepfusion.federation.server.ledger import Ledger, Row, State, Ticket

RECEIPT = {"device": "clinic", "digest": "d" * 64, "files": 4}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def ledger(run: Path) -> Ledger:
    return Ledger(run)


@pytest.fixture(scope="module")
def offers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Offer]:
    """An offer of each of two devices."""
    folder = tmp_path_factory.mktemp("uploads")
    return {device: read_offer(make_upload(folder / device)) for device in ("bank", "clinic")}


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Offer:
    """Another offer of the device clinic."""
    return read_offer(
        make_upload(tmp_path_factory.mktemp("second") / "clinic", {"model.safetensors": b"other weights"})
    )


def row(ledger: Ledger, device: str = "clinic") -> Row:
    found = ledger.device(device)
    assert found is not None
    return found


def start(run: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process, which says ready, and works with a ledger of its own and `arguments` once it is told to."""
    script = (
        "import sys; from pathlib import Path; from deepfusion.federation.server.ledger import Ledger\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"arguments, ledger = sys.argv[2:], Ledger(Path(sys.argv[1]))\n{code}"
    )
    command = [sys.executable, "-c", script, str(run), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(processes: list[subprocess.Popen[str]]) -> None:
    """Lets all begin at the same time."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


# Tickets


def test_ticket_is_for_one_offer_of_one_device(ledger: Ledger, offers: dict[str, Offer]) -> None:
    tickets = {device: ledger.issue(offer) for device, offer in offers.items()}
    for device, ticket in tickets.items():
        assert ledger.ticket(ticket) == Ticket(device, offers[device].digest, spent=False)
    assert len(set(tickets.values())) == 2


@given(st.text())
def test_what_was_never_issued_is_no_ticket(
    tmp_path_factory: pytest.TempPathFactory, offers: dict[str, Offer], text: str
) -> None:
    ledger = Ledger(tmp_path_factory.getbasetemp() / "tickets")
    ticket = ledger.issue(offers["clinic"])
    assert ledger.ticket(text) is None
    assert ledger.ticket(ticket + text if text else ticket[:-1]) is None
    assert ledger.ticket(ticket.swapcase()) is None


def test_new_ticket_makes_the_old_one_worthless(
    ledger: Ledger, offers: dict[str, Offer], second: Offer
) -> None:
    first, other = ledger.issue(offers["clinic"]), ledger.issue(offers["bank"])
    new = ledger.issue(second)
    assert ledger.ticket(first) == Ticket("clinic", offers["clinic"].digest, spent=True)
    assert ledger.ticket(new) == Ticket("clinic", second.digest, spent=False)
    assert ledger.ticket(other) == Ticket("bank", offers["bank"].digest, spent=False)


def test_ticket_is_spent_by_the_receipt(ledger: Ledger, offers: dict[str, Offer]) -> None:
    tickets = {device: ledger.issue(offer) for device, offer in offers.items()}
    ledger.finish("clinic", RECEIPT)
    spent = {device: found.spent for device, ticket in tickets.items() if (found := ledger.ticket(ticket))}
    assert spent == {"clinic": True, "bank": False}


def test_tickets_stand_in_no_file(ledger: Ledger, offers: dict[str, Offer], second: Offer) -> None:
    tickets = [ledger.issue(offer) for offer in [*offers.values(), second]]
    ledger.finish("clinic", RECEIPT)
    ledger.audit("granted", device="clinic", peer="127.0.0.1")
    files = [path.read_bytes() for path in ledger.path.parent.iterdir()]
    assert any(
        offers["bank"].digest.encode() in content for content in files
    )  # this search finds what is there
    assert [ticket for ticket in tickets if any(ticket.encode() in content for content in files)] == []


def test_offer_comes_back_as_it_was(run: Path, ledger: Ledger, offers: dict[str, Offer]) -> None:
    ledger.issue(offers["clinic"])
    kept = row(Ledger(run))
    assert kept.offer == offers["clinic"]
    assert (kept.size, kept.received) == (offers["clinic"].size, 0)


# How far a device is


def test_device_appears_with_its_first_news(ledger: Ledger) -> None:
    assert ledger.devices() == {}
    assert ledger.device("clinic") is None
    before = time.time()
    ledger.set_state("clinic", "training", "step 3")
    ledger.count("bank", control_up=10)
    found = row(ledger)
    assert (found.state, found.detail, found.seen, found.offer, found.receipt) == (
        "training",
        "step 3",
        None,
        None,
        None,
    )
    assert before <= found.changed <= time.time()
    assert list(ledger.devices()) == ["bank", "clinic"]
    assert row(ledger, "bank").state == "enrolled"
    assert before <= (row(ledger, "bank").seen or 0) <= time.time()


def test_same_news_again_are_no_change(ledger: Ledger) -> None:
    ledger.set_state("clinic", "training", "step 3")
    before = row(ledger)
    ledger.set_state("clinic", "training", "step 3")
    assert row(ledger) == before
    ledger.set_state("clinic", "training", "step 4")
    assert row(ledger).changed > before.changed


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("news", ["connected", "training", "uploading", "rejected"])
def test_what_has_handed_in_stays_so(
    ledger: Ledger, offers: dict[str, Offer], closed: bool, news: State
) -> None:
    ledger.issue(offers["clinic"])
    if closed:
        ledger.close()
    ledger.finish("clinic", RECEIPT)
    ledger.set_state("clinic", news, "news that came late")
    assert (row(ledger).state, row(ledger).detail) == ("late" if closed else "done", "")


def test_rejected_device_may_try_again(ledger: Ledger) -> None:
    ledger.set_state("clinic", "rejected", "too large")
    ledger.set_state("clinic", "training")
    assert (row(ledger).state, row(ledger).detail) == ("training", "")


# Receipts


def test_receipt_is_given_once_and_again(ledger: Ledger, offers: dict[str, Offer]) -> None:
    ledger.issue(offers["clinic"])
    first = ledger.finish("clinic", RECEIPT)
    assert first == {**RECEIPT, "state": "done"}
    ledger.close()
    assert (
        ledger.finish("clinic", {**RECEIPT, "files": 5}) == first
    )  # also where the answer was lost, and the run has begun
    assert row(ledger).receipt == first
    assert row(ledger).received == row(ledger).size == offers["clinic"].size


def test_receipt_after_close_says_late(run: Path, ledger: Ledger, offers: dict[str, Offer]) -> None:
    for offer in offers.values():
        ledger.issue(offer)
    ledger.finish("bank", RECEIPT)
    assert not ledger.closed
    ledger.close()
    assert Ledger(run).closed
    assert ledger.finish("clinic", RECEIPT)["state"] == "late"
    assert {name: found.state for name, found in ledger.devices().items()} == {
        "bank": "done",
        "clinic": "late",
    }


def test_first_value_of_a_fact_stays(ledger: Ledger) -> None:
    assert ledger.recall("began") is None
    ledger.remember("began", "1")
    ledger.remember("began", "2")
    assert ledger.recall("began") == "1"


def test_receipts_at_the_moment_of_closing_agree_with_the_ledger(
    run: Path, ledger: Ledger, offers: dict[str, Offer]
) -> None:
    """Whoever was told done is among the done when the run closes: no upload falls between the two."""
    ledger.issue(offers["clinic"])
    ledger.issue(offers["bank"])
    finish = "ledger.finish(arguments[0], {}); print('finished', flush=True)"
    close = "ledger.close(); print(*[name for name, row in ledger.devices().items() if row.state == 'done'])"
    processes = [start(run, finish, "clinic"), start(run, close), start(run, finish, "bank")]
    go(processes)
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    receipts = {device: row(ledger, device).receipt or {} for device in offers}
    assert sorted(outputs[1].split()) == [
        device for device, receipt in receipts.items() if receipt["state"] == "done"
    ]


# Several processes


def test_bytes_of_several_processes_add_up(run: Path) -> None:
    """The ledger is new to all of them: the first access makes the file."""
    code = (
        "for number in range(25):\n"
        "    ledger.count('clinic', up=number, down=1, control_up=2, control_down=3)\n"
        "    ledger.count('d' + arguments[0], up=1)\n"
        "    ledger.audit('counted', device='clinic', peer='é' * 2000, writer=arguments[0], number=number)"
    )
    processes = [start(run, code, str(number)) for number in range(3)]
    go(processes)
    assert [(process.communicate(timeout=60)[0], process.returncode) for process in processes] == [
        ("", 0)
    ] * 3
    ledger = Ledger(run)
    found = row(ledger)
    assert (found.up, found.down, found.control_up, found.control_down) == (3 * sum(range(25)), 75, 150, 225)
    assert {name: other.up for name, other in ledger.devices().items() if name != "clinic"} == {
        f"d{i}": 25 for i in range(3)
    }
    lines = [json.loads(line) for line in ledger.audit_path.read_text("utf-8").splitlines()]
    assert sorted((line["writer"], line["number"]) for line in lines) == sorted(
        (str(w), n) for w in range(3) for n in range(25)
    )


def test_killed_process_leaves_whole_entries(run: Path, ledger: Ledger, offers: dict[str, Offer]) -> None:
    """Both counts are of one access, so a kill between them would show."""
    ticket, generator, up = ledger.issue(offers["clinic"]), random.Random(0), 0
    for _ in range(2):
        with start(run, "while True: ledger.count('clinic', up=1, down=1)") as process:
            go([process])
            for _ in range(generator.randrange(1, 40)):
                while (now := row(ledger).up) == up:
                    assert process.poll() is None
                up = now
            process.kill()
        found = row(ledger)
        assert found.up == found.down >= up
        up = found.up
    assert ledger.ticket(ticket) == Ticket("clinic", offers["clinic"].digest, spent=False)


# The audit log


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(),
    st.none() | st.text(),
    st.none() | st.text(),
    st.dictionaries(st.sampled_from(["code", "key"]), st.text()),
)
def test_audit_line_is_one_json_object(
    ledger: Ledger, event: str, device: str | None, peer: str | None, facts: dict[str, str]
) -> None:
    before = len(ledger.audit_path.read_bytes().splitlines()) if ledger.audit_path.exists() else 0
    ledger.audit(event, device=device, peer=peer, **facts)
    lines = ledger.audit_path.read_bytes().splitlines()
    assert len(lines) == before + 1
    entry = json.loads(lines[-1])
    assert abs(entry.pop("time") - time.time()) < 60
    assert entry == {"event": event, "device": device, "peer": peer, **facts}
