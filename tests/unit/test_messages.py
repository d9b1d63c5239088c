"""What server and device say to each other, and what they make of what others say."""

from __future__ import annotations

import contextlib

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from test_offer import make_upload

from deepfusion.errors import InputError
from deepfusion.federation.flower import messages
from deepfusion.federation.offer import read_offer


@pytest.fixture(autouse=True, scope="module")
def identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0


def test_a_task_arrives_as_it_was_sent():
    task = messages.read(messages.task(7, "clinic", "seed: 3\n")).task
    assert task == messages.Task("clinic", "seed: 3\n")


def test_a_task_whose_config_was_altered_is_refused():
    message = messages.task(7, "clinic", "seed: 3\n")
    message.content["deepfusion"]["config"] = "seed: 4\n"
    with pytest.raises(InputError, match="digest"):
        messages.read(message)


def test_offer_ticket_receipt_and_refusal_arrive(tmp_path):
    task = messages.task(7, "clinic", "")
    offer = read_offer(make_upload(tmp_path / "clinic"))
    assert messages.read(messages.reply_offer(task, offer)).offer == offer
    assert messages.read(messages.ticket(7, "abc")).ticket == "abc"
    receipt = {"device": "clinic", "digest": "0" * 64, "size": 3, "state": "done"}
    assert messages.read(messages.receipt_again(7, receipt)).receipt == receipt
    refusal = messages.read(
        messages.refusal(7, InputError("too big", where="x", allowed="1", fix="cut", code="too-large"))
    ).refusal
    assert str(refusal) == "x: too big; allowed: 1; fix: cut [too-large]"


def test_a_failing_device_tells_no_more_than_the_code():
    error = InputError(
        "the answer 'HIV positive' is no option",
        where="/home/alice/patients.jsonl:7",
        allowed="A",
        code="bad-answer",
    )
    reply = messages.reply_refusal(messages.task(7, "clinic", ""), error)
    assert "alice" not in str(reply.content) + str(messages.read(reply).refusal)
    assert "HIV" not in str(reply.content)
    assert messages.read(reply).refusal.code == "bad-answer"


@given(
    st.dictionaries(
        st.sampled_from(["config", "sha256", "offer", "ticket", "receipt", "code", "what", "x"]),
        st.text() | st.integers(0, 9),
    )
)
def test_whatever_a_stranger_says_is_read_or_refused(values):
    with contextlib.suppress(InputError):
        messages.read(Message(RecordDict({"deepfusion": ConfigRecord(values)}), 7, messages.TRAIN))


def test_other_records_are_refused():
    for content in (RecordDict(), RecordDict({"deepfusion": MetricRecord({"x": 1.0})})):
        with pytest.raises(InputError, match="another program"):
            messages.read(Message(content, 7, messages.TRAIN))
