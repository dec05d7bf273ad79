"""A containerd snapshotter on a store: the gRPC service ``containerd.services.snapshots.v1.Snapshots``.

:mod:`messages` has the wire, :mod:`filters` the filter language, :mod:`held` the mounts that the service holds for containerd to
bind, :mod:`snapshots` the verbs, :mod:`server` the door. Only ``messages`` and ``server`` need grpcio and protobuf
(the extra ``cowfs-storage[containerd]``).
"""
