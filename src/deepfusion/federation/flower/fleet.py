"""Flower 1.41.0 below its public interface, all in one place: the device's side of the Fleet API, and running a
ServerApp here.

A stock SuperNode fetches an app bundle and runs it. A device must not run code of a server, so `Fleet` speaks the Fleet
API itself and hands each message to the ClientApp that is installed. A stock SuperExec starts the ServerApp with its
token in the arguments of a process, where every user of the machine can read it; `serve_app` keeps it in memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from cryptography.hazmat.primitives import serialization
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import context_from_proto, message_to_proto, run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import ServerApp
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.superexec_auth import SuperExecAuthHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from google.protobuf.message import Message as Proto

from deepfusion import progress
from deepfusion.federation.device.connection import Connection, Refused
from deepfusion.folders import write_whole

HEARTBEAT_SECONDS = 30  # the server takes a device for gone after twice as long
_ACTIVATION_FAILED = 412  # the SuperLink has a session of this key, or does not know it
_ACTIVATION_SECONDS = 90.0
_PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}

ResponseT = TypeVar("ResponseT", bound=Proto)


class Fleet:
    """A device's session with the server; a context manager, alive while training goes on.

    Args:
        connection: signed HTTPS to the gateway.
        node_file: where the number that the server gave this device is kept, to end the session of a killed process.
    """

    def __init__(self, connection: Connection, node_file: Path) -> None:
        self.connection, self.node_file = connection, node_file
        self.node = Node()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Fleet:
        self._activate()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with suppress(
            Exception
        ):  # a courtesy: else the server waits a minute before it takes the device for gone
            self._call(
                "deactivate-node",
                DeactivateNodeRequest(node_id=self.node.node_id),
                DeactivateNodeResponse,
                once=True,
            )

    def receive(self) -> Message | None:
        """The next message for this device, if there is one."""
        answer = self._call("pull-messages", PullMessagesRequest(node=self.node), PullMessagesResponse)
        if not answer.messages_list:
            return None
        metadata, tree = answer.messages_list[0].metadata, answer.message_object_trees[0]
        contents = {}
        for part in iterate_object_tree(tree):
            request = PullObjectRequest(node=self.node, run_id=metadata.run_id, object_id=part.object_id)
            found = self._call("pull-object", request, PullObjectResponse)
            if not found.object_available:
                return None  # of a run that has ended
            contents[part.object_id] = found.object_content
        message = cast(Message, inflate_object_from_contents(metadata.message_id, contents))
        message.metadata.__dict__["_message_id"] = metadata.message_id
        received = ConfirmMessageReceivedRequest(
            node=self.node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        self._call("confirm-message-received", received, ConfirmMessageReceivedResponse)
        return message

    def reply(self, reply: Message) -> None:
        """Answer a message. A run that has ended meanwhile does not hear it; its successor asks again."""
        run_id = reply.metadata.run_id
        try:
            with no_object_id_recompute():
                reply.metadata.__dict__["_message_id"] = reply.object_id
                objects = get_all_nested_objects(reply)
                request = PushMessagesRequest(
                    node=self.node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[0.0],
                )
                answer = self._call("push-messages", request, PushMessagesResponse)
                for name in answer.objects_to_push:
                    content = objects[name].deflate()
                    self._call(
                        "push-object",
                        PushObjectRequest(
                            node=self.node,
                            run_id=run_id,
                            object_id=name,
                            object_content=content,
                            session_id=answer.session_id,
                        ),
                        PushObjectResponse,
                    )
        except Refused as error:
            if error.code in ("not-enrolled", "revoked"):
                raise
            progress.say("[device] the server has begun anew and will ask again")

    def _activate(self) -> None:
        public = self.connection.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_SECONDS)
        until = time.monotonic() + _ACTIVATION_SECONDS
        while True:
            try:
                self.node = Node(node_id=self._call("activate-node", request, ActivateNodeResponse).node_id)
                break
            except Refused as error:
                if error.status != _ACTIVATION_FAILED or time.monotonic() > until:
                    raise
            if self.node_file.is_file():
                # The server still believes in the session of a process that was killed. It is ours to end.
                with suppress(Refused):
                    old = DeactivateNodeRequest(node_id=int(self.node_file.read_text()))
                    self._call("deactivate-node", old, DeactivateNodeResponse)
                self.node_file.unlink()
            else:
                time.sleep(1)  # enrolled this moment, and the SuperLink is yet to hear of it
        write_whole(self.node_file, str(self.node.node_id))

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS * 0.8):
            request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_SECONDS)
            try:
                alive = self._call(
                    "send-node-heartbeat", request, SendNodeHeartbeatResponse, once=True
                ).success
                if not alive:
                    self._activate()
            except Exception:
                continue

    def _call(self, name: str, request: Proto, response: type[ResponseT], once: bool = False) -> ResponseT:
        def attempt() -> ResponseT:
            answer = self.connection.call(
                "POST", f"/v1/fleet/{name}", content=request.SerializeToString(), headers=_PROTOBUF
            )
            result = response()
            result.ParseFromString(answer.content)
            return result

        return attempt() if once else self.connection.patiently(attempt)


def register_devices(superlink: str, ca: Path, wanted: dict[str, bytes]) -> None:
    """Make the devices that a SuperLink knows those that are `wanted`. Flower's own command line takes seconds for
    each.

    Args:
        wanted: public keys (PEM) by name.

    Raises:
        httpx.HTTPError: the SuperLink does not answer.
    """
    versions = RuntimeVersionHttpInterceptor(component_name="flwr-cli")
    with ControlHttpClient.from_server_address(
        superlink, False, ca.read_bytes(), interceptors=[versions]
    ) as control:
        known = [
            node
            for node in control.ListNodes(ListNodesRequest()).nodes_info
            if node.status != NodeStatus.UNREGISTERED
        ]
        for node in known:
            if wanted.get(node.name) != node.public_key:
                control.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
        there = {node.name for node in known if wanted.get(node.name) == node.public_key}
        for name in sorted(set(wanted) - there):
            control.RegisterNode(RegisterNodeRequest(public_key=wanted[name], name=name))


def serve_app(
    app: ServerApp,
    superlink: str,
    ca: Path,
    secret: bytes,
    run_config: dict[str, Any],
    idle: Callable[[], None],
) -> None:
    """Take the run that waits at the SuperLink and run `app` in it, in this process, until it ends or the run is lost.

    Args:
        superlink: HOST:PORT of the Runtime API.
        ca: what verifies it.
        secret: the SuperExec secret that the SuperLink was started with.
        run_config: what `context.run_config` shall hold.
        idle: called between looks for a run.
    """
    certificates = ca.read_bytes()
    finder = RuntimeHttpClient.from_server_address(
        superlink, False, certificates,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}),
        ],
        retry_invoker=make_simple_http_retry_invoker(),
    )  # fmt: skip
    with finder:
        while not (
            found := finder.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        ).token:
            idle()
    grid = HttpGrid(superlink, False, certificates, token=found.token)
    heart = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
    heart.start()
    details, status = "", "completed"
    try:
        given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
            given.task_id,
            given.run.run_id,
            given.context.node_id,
        )
        grid.set_run(run_from_proto(given.run))
        context = context_from_proto(given.context)
        context = Context(context.run_id, context.node_id, {}, RecordDict(), run_config)
        app(grid=grid, context=context)
    except Exception as error:
        details, status = str(error)[:500], "failed"
        raise
    finally:
        heart.stop()
        grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
