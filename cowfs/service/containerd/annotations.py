"""Limits that a container's annotations ask for, as Kubernetes gives them: containerd is asked for its record of the container.

Strategy: containerd's CRI plugin has no labels for a container's own snapshot, but the annotations that its configuration lets through
(``pod_annotations``, ``container_annotations``) are in the OCI spec of the container's record. When a snapshot is to be mounted for a task, the
record is there: it has the snapshot's name, and is in the snapshot's namespace (containerd, api/services/containers/v1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import grpc

from cowfs.errors import FailedPrecondition, InvalidArgument
from cowfs.service.containerd.messages import CONTAINERS, message

__all__ = ["INODES", "SIZE", "Annotations"]

SIZE, INODES = "cowfs.io/max-size", "cowfs.io/max-inodes"

_SECONDS = 10.0


class Annotations:
    """The containers of one containerd.

    Args:
        address: ``unix:///PATH`` of containerd's own socket.

    Raises:
        InvalidArgument: another address.

    Threads: any.
    """

    def __init__(self, address: str) -> None:
        path = address.removeprefix("unix://")
        if not path.startswith("/"):
            raise InvalidArgument(
                f"--containerd-address {address}: not the address of a unix socket",
                remedy="--containerd-address unix:///run/containerd/containerd.sock",
            )
        self._address = f"unix:{path}"
        self._channel = grpc.insecure_channel(self._address)
        self._get = self._channel.unary_unary(
            f"/{CONTAINERS}/Get",
            request_serializer=message("GetContainerRequest").SerializeToString,
            response_deserializer=message("GetContainerResponse").FromString,
        )

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def of(self, key: str) -> Mapping[str, str]:
        """The annotations of the container whose snapshot this is; {} where there is no such container.

        Args:
            key: of a snapshot, as containerd names it: NAMESPACE/NUMBER/NAME.

        Raises:
            FailedPrecondition: containerd does not answer, or its record cannot be read.
        """
        namespace, _, rest = key.partition("/")
        name = rest.partition("/")[2]
        if not name:
            return {}
        try:
            told = self._get(
                message("GetContainerRequest")(id=name),
                timeout=_SECONDS,
                metadata=(("containerd-namespace", namespace),),
                wait_for_ready=True,
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return {}
            raise FailedPrecondition(
                f"containerd at {self._address} does not tell the annotations of container {name}: {error.details()}"
            ) from None
        if told.container.snapshot_key != name:
            return {}
        try:
            found = (json.loads(told.container.spec.value or b"{}") or {}).get("annotations") or {}
            return {str(each): str(value) for each, value in found.items()}
        except (ValueError, AttributeError):
            raise FailedPrecondition(f"the OCI spec of container {name} is no JSON document") from None
