"""The messages of containerd's snapshots service, made from one table through protobuf's descriptor pool.

Strategy: field numbers and types are public facts (containerd, api/services/snapshots/v1/snapshots.proto and
api/types/mount.proto); the repository has no copied or generated file, and needs no compiler. Protobuf skips the
additions of a newer containerd as unknown fields.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["CONTAINERS", "METHODS", "SERVICE", "message"]

SERVICE = "containerd.services.snapshots.v1.Snapshots"
CONTAINERS = "containerd.services.containers.v1.Containers"
"""Of this one, which containerd itself offers, Get alone is used."""

# name -> fields as "name=number:type"; a type with * is repeated, "labels" is a map of strings, others are messages.
_TABLE = {
    "Empty": "",
    "Timestamp": "seconds=1:int64 nanos=2:int32",
    "FieldMask": "paths=1:string*",
    "Mount": "type=1:string source=2:string target=3:string options=4:string*",
    "PrepareSnapshotRequest": "snapshotter=1:string key=2:string parent=3:string labels=4:labels",
    "PrepareSnapshotResponse": "mounts=1:Mount*",
    "ViewSnapshotRequest": "snapshotter=1:string key=2:string parent=3:string labels=4:labels",
    "ViewSnapshotResponse": "mounts=1:Mount*",
    "MountsRequest": "snapshotter=1:string key=2:string",
    "MountsResponse": "mounts=1:Mount*",
    "RemoveSnapshotRequest": "snapshotter=1:string key=2:string",
    "CommitSnapshotRequest": "snapshotter=1:string name=2:string key=3:string labels=4:labels parent=5:string",
    "StatSnapshotRequest": "snapshotter=1:string key=2:string",
    "Info": "name=1:string parent=2:string kind=3:int32 created_at=4:Timestamp updated_at=5:Timestamp labels=6:labels",
    "StatSnapshotResponse": "info=1:Info",
    "UpdateSnapshotRequest": "snapshotter=1:string info=2:Info update_mask=3:FieldMask",
    "UpdateSnapshotResponse": "info=1:Info",
    "ListSnapshotsRequest": "snapshotter=1:string filters=2:string*",
    "ListSnapshotsResponse": "info=1:Info*",
    "UsageRequest": "snapshotter=1:string key=2:string",
    "UsageResponse": "size=1:int64 inodes=2:int64",
    "CleanupRequest": "snapshotter=1:string",
    "Any": "type_url=1:string value=2:bytes",
    "Container": "id=1:string spec=5:Any snapshotter=6:string snapshot_key=7:string",
    "GetContainerRequest": "id=1:string",
    "GetContainerResponse": "container=1:Container",
}

METHODS = {
    "Prepare": ("PrepareSnapshotRequest", "PrepareSnapshotResponse"),
    "View": ("ViewSnapshotRequest", "ViewSnapshotResponse"),
    "Mounts": ("MountsRequest", "MountsResponse"),
    "Commit": ("CommitSnapshotRequest", "Empty"),
    "Remove": ("RemoveSnapshotRequest", "Empty"),
    "Stat": ("StatSnapshotRequest", "StatSnapshotResponse"),
    "Update": ("UpdateSnapshotRequest", "UpdateSnapshotResponse"),
    "List": ("ListSnapshotsRequest", "ListSnapshotsResponse"),
    "Usage": ("UsageRequest", "UsageResponse"),
    "Cleanup": ("CleanupRequest", "Empty"),
}
"""Method -> (request, answer); the answers of List are a stream."""

_PACKAGE = "cowfs.containerd"
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
}


def _add_field(made: Any, text: str) -> None:
    name, _, rest = text.partition("=")
    number, _, kind = rest.partition(":")
    label = _Field.LABEL_REPEATED if kind.endswith("*") or kind == "labels" else _Field.LABEL_OPTIONAL
    field = made.field.add(name=name, number=int(number), label=label)
    kind = kind.rstrip("*")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
        return
    field.type = _Field.TYPE_MESSAGE
    if kind != "labels":
        field.type_name = f".{_PACKAGE}.{kind}"
        return
    entry = made.nested_type.add(name="LabelsEntry")
    entry.options.map_entry = True
    _add_field(entry, "key=1:string")
    _add_field(entry, "value=2:string")
    field.type_name = f".{_PACKAGE}.{made.name}.LabelsEntry"


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="cowfs/containerd.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _TABLE.items():
        made = file.message_type.add(name=name)
        for text in fields.split():
            _add_field(made, text)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    found = {name: pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in _TABLE}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


_CLASSES = _build()


def message(name: str) -> Any:
    """The class of a message of the table."""
    return _CLASSES[name]
