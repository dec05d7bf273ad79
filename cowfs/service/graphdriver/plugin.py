"""The door for dockerd: requests of its graph driver plugins, HTTP with JSON at a unix socket.

Strategy: one table from path to handler; a handler translates between a document and
:class:`~cowfs.service.graphdriver.layers.Layers`. An error is told in the field ``Err`` of an answer, and where an archive was asked for by status 500.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, cast

from cowfs.errors import CowfsError, InvalidArgument
from cowfs.mounting.request import IdMap
from cowfs.service.graphdriver.layers import Layers
from cowfs.service.http import Exchange, Reply, json_reply
from cowfs.service.logs import exchange_id, log
from cowfs.service.streaming import written

__all__ = ["Plugin"]

Answer = Mapping[str, Any] | Reply

_TYPE = "application/vnd.docker.plugins.v1.2+json"


class Plugin:
    """Answers requests.

    Threads: any.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._table: dict[str, Callable[[Exchange], Answer]] = {
            "/Plugin.Activate": lambda _: {"Implements": ["GraphDriver"]},
            "/GraphDriver.Init": self._init,
            "/GraphDriver.Capabilities": lambda _: {"Capabilities": {"ReproducesExactDiffs": True}},
            "/GraphDriver.Create": self._create,
            "/GraphDriver.CreateReadWrite": self._create_read_write,
            "/GraphDriver.Remove": self._remove,
            "/GraphDriver.Get": self._get,
            "/GraphDriver.Put": self._put,
            "/GraphDriver.Exists": self._exists,
            "/GraphDriver.Status": lambda _: {"Status": [list(pair) for pair in layers.status()]},
            "/GraphDriver.GetMetadata": self._metadata,
            "/GraphDriver.Cleanup": self._cleanup,
            "/GraphDriver.Diff": self._diff,
            "/GraphDriver.Changes": self._changes,
            "/GraphDriver.ApplyDiff": self._apply,
            "/GraphDriver.DiffSize": self._size,
        }

    def handle(self, exchange: Exchange) -> Reply:
        """Answer a request; every error becomes an answer here."""
        token = exchange_id.set(exchange.id)
        try:
            act = self._table.get(exchange.path)
            if act is None or exchange.method != "POST":
                return _error(f"{exchange.method} {exchange.path}: no request of a graph driver plugin", 404)
            try:
                answer = act(exchange)
            except CowfsError as error:
                told = str(error)
            except ConnectionError:
                raise
            except OSError as error:
                told = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
            except Exception:  # noqa: BLE001  a fault of ours costs this request, and its traceback goes to the log alone
                log.exception("%s failed", exchange.path)
                told = f"an internal error; the log of cowfs serve tells more about exchange {exchange.id}"
            else:
                log.debug("%s: done", exchange.path)
                return answer if isinstance(answer, Reply) else _document({"Err": "", **answer})
            log.warning("%s: %s", exchange.path, told)
            return _error(told, 500 if exchange.path == "/GraphDriver.Diff" else 200)
        finally:
            exchange_id.reset(token)

    # -- requests ---------------------------------------------------------------------------------------------------------

    def _init(self, exchange: Exchange) -> Answer:
        asked = exchange.document()
        maps = [_map(asked, name) for name in ("UIDMaps", "GIDMaps")]
        self._layers.init(_text(asked, "Home"), _texts(asked, "Opts"), *maps)
        return {}

    def _create(self, exchange: Exchange) -> Answer:
        return self._made(self._layers.create, exchange)

    def _create_read_write(self, exchange: Exchange) -> Answer:
        return self._made(self._layers.create_read_write, exchange)

    @staticmethod
    def _made(make: Callable[[str, str, Mapping[str, str], str], None], exchange: Exchange) -> Answer:
        asked = exchange.document()
        options = asked.get("StorageOpt") or {}
        if not isinstance(options, dict) or not all(isinstance(value, str) for value in options.values()):
            raise InvalidArgument("StorageOpt is no object of strings")
        make(_text(asked, "ID"), _text(asked, "Parent"), options, _text(asked, "MountLabel"))
        return {}

    def _remove(self, exchange: Exchange) -> Answer:
        self._layers.remove(_text(exchange.document(), "ID"))
        return {}

    def _get(self, exchange: Exchange) -> Answer:
        asked = exchange.document()
        return {"Dir": self._layers.get(_text(asked, "ID"), _text(asked, "MountLabel"))}

    def _put(self, exchange: Exchange) -> Answer:
        self._layers.put(_text(exchange.document(), "ID"))
        return {}

    def _exists(self, exchange: Exchange) -> Answer:
        return {"Exists": self._layers.exists(_text(exchange.document(), "ID"))}

    def _metadata(self, exchange: Exchange) -> Answer:
        return {"Metadata": self._layers.metadata(_text(exchange.document(), "ID"))}

    def _cleanup(self, exchange: Exchange) -> Answer:
        self._layers.cleanup()
        return {}

    def _diff(self, exchange: Exchange) -> Answer:
        asked = exchange.document()
        id, parent = _text(asked, "ID"), _text(asked, "Parent")
        parts = written(lambda out: self._layers.diff(id, parent, out))
        first = next(parts, b"")  # an error before it is an answer with a status

        def stream() -> Any:
            yield first
            yield from parts

        return Reply(type="application/x-tar", body=stream())

    def _changes(self, exchange: Exchange) -> Answer:
        asked = exchange.document()
        found = self._layers.changes(_text(asked, "ID"), _text(asked, "Parent"))
        return {"Changes": [{"Path": path, "Kind": kind} for path, kind in found]}

    def _apply(self, exchange: Exchange) -> Answer:
        query = exchange.query
        stream = cast("BinaryIO", exchange.body)
        return {"Size": self._layers.apply(query.get("id", ""), query.get("parent", ""), stream)}

    def _size(self, exchange: Exchange) -> Answer:
        asked = exchange.document()
        return {"Size": self._layers.size(_text(asked, "ID"), _text(asked, "Parent"))}


def _document(value: Mapping[str, Any], status: int = 200) -> Reply:
    reply = json_reply(value, status)
    reply.type = _TYPE
    return reply


def _error(told: str, status: int) -> Reply:
    return _document({"Err": told}, status)


def _text(asked: Mapping[str, Any], name: str) -> str:
    """A field of a request that is text; "" where it is missing."""
    value = asked.get(name) or ""
    if not isinstance(value, str):
        raise InvalidArgument(f"{name} is no text: {value!r}")
    return value


def _texts(asked: Mapping[str, Any], name: str) -> list[str]:
    value = asked.get(name) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidArgument(f"{name} is no list of texts: {value!r}")
    return value


def _map(asked: Mapping[str, Any], name: str) -> IdMap:
    """A map of users or groups: (id in the layers, id of the host, count)."""
    try:
        return tuple(
            (int(each["container_id"]), int(each["host_id"]), int(each["size"])) for each in asked.get(name) or ()
        )
    except (KeyError, TypeError, ValueError):
        raise InvalidArgument(f"{name} is no list of maps: {asked.get(name)!r}") from None
