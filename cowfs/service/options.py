"""The options of a daemon: one table behind flags, environment, TOML file and ``--print-config``.

Rule: a flag beats the environment (``COWFS_SERVE_NAME``), that the file, that the default. A list is taken whole from the
first place that has it. Options marked ``live`` can change by SIGHUP.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from cowfs.errors import InvalidArgument, NotFound
from cowfs.sys import host as this_host

__all__ = ["Options", "add_arguments", "as_toml", "read"]

ROOTS_FILE = "/etc/cowfs/serve.toml"
PREFIX = "COWFS_SERVE_"

PLUGIN = "unix:///run/docker/plugins/cowfs.sock"
"""Where dockerd looks for the plugin that it calls cowfs."""


def default_file() -> str:
    """The file that is read when none is named: root's is the host's, an ordinary user's is below ``~/.config``."""
    if this_host.outer_uid() == 0:
        return ROOTS_FILE
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(home, "cowfs", "serve.toml")


def _option(
    default: Any, help: str, *, flags: Sequence[str] = (), live: bool = False, metavar: str = "", alone: str = ""
) -> Any:
    """A field. ``alone``: the value of a flag that is given without one."""
    told = {"help": help, "flags": tuple(flags), "live": live, "metavar": metavar, "alone": alone}
    if isinstance(default, tuple):
        return field(default=default, metadata=told)
    return field(default=default, metadata=told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """All options of a daemon. Names are those of the TOML file; a flag has dashes."""

    root: str = _option(
        "", "the store (default: $COWFS_ROOT, else /var/lib/cowfs as root, else ~/.local/share/cowfs)", metavar="DIR"
    )
    run_dir: str = _option(
        "", "sockets and mounts of containers (default: /run/cowfs as root, else $XDG_RUNTIME_DIR/cowfs)", metavar="DIR"
    )
    host: tuple[str, ...] = _option(
        (), "a door: unix:///PATH, tcp://ADDR:PORT or fd://; repeated", flags=("-H",), metavar="DOOR"
    )
    group: str = _option("", "group that may use the unix socket (default: nobody but its owner)", metavar="GROUP")
    storage_driver: str = _option("auto", "backend of a new store", flags=("-s",), metavar="NAME")
    storage_opt: tuple[str, ...] = _option(
        (),
        "size=S or inodes=N: the default limit of a container; else an option of the driver; repeated",
        metavar="K=V",
    )
    tls: bool = _option(False, "speak TLS at tcp doors without asking clients for certificates")
    tlsverify: bool = _option(False, "speak TLS at tcp doors and verify the certificates of clients")
    tlscacert: str = _option("", "authority that signed the clients' certificates", metavar="FILE")
    tlscert: str = _option("", "certificate of this server", metavar="FILE")
    tlskey: str = _option("", "its key", metavar="FILE")
    insecure: bool = _option(
        False, "allow a tcp door beyond this machine without --tlsverify: anybody there is root here"
    )
    debug: bool = _option(False, "tell every request in the log", flags=("-D",), live=True)
    log_level: str = _option("info", "debug, info, warning or error", flags=("-l",), live=True, metavar="LEVEL")
    log_format: str = _option("text", "text or json", live=True, metavar="FORMAT")
    runtime: str = _option("auto", "OCI runtime: a program, or auto: runc, else crun", metavar="PROGRAM")
    registry_mirror: tuple[str, ...] = _option((), "asked before docker.io; repeated", live=True, metavar="URL")
    insecure_registry: tuple[str, ...] = _option(
        (), "registry that is spoken to without TLS, or without verifying it; repeated", live=True, metavar="HOST"
    )
    containerd: str = _option(
        "",
        "be a snapshotter of containerd at unix:///PATH (needs cowfs-storage[containerd]); without -H there is no other door",
        metavar="DOOR",
    )
    containerd_address: str = _option(
        "",
        "containerd's own socket, unix:///PATH: ask there for the annotations of containers, which may have a limit"
        " (cowfs.io/max-size, cowfs.io/max-inodes)",
        metavar="DOOR",
    )
    docker_plugin: str = _option(
        "",
        f"be a graph driver plugin of dockerd 20.10 to 27 at unix:///PATH (default: {PLUGIN}); without -H there is no other door",
        metavar="DOOR",
        alone=PLUGIN,
    )
    label: tuple[str, ...] = _option((), "shown by info; repeated", live=True, metavar="K=V")
    max_connections: int = _option(2048, "connections at once, of all doors", metavar="N")
    pidfile: str = _option("", "file that gets the process id", flags=("-p",), metavar="FILE")
    metrics: bool = _option(True, "figures for Prometheus at /metrics")
    ui: bool = _option(True, "the page for browsers at /ui/", live=True)
    ui_actions: bool = _option(
        False,
        "let the page start, stop and remove containers and change limits; without, a browser can only look",
        live=True,
    )
    allow_host: tuple[str, ...] = _option(
        (),
        "a name that clients call a plain tcp door by, beside localhost, this host's name and addresses; repeated",
        live=True,
        metavar="NAME",
    )

    def changed_live(self, new: Options) -> tuple[Options, list[str]]:
        """These options with the live ones taken from others; and the names of the other options that differ."""
        from dataclasses import replace

        live, fixed = {}, []
        for each in fields(self):
            value = getattr(new, each.name)
            if value == getattr(self, each.name):
                continue
            if each.metadata["live"]:
                live[each.name] = value
            else:
                fixed.append(each.name)
        return replace(self, **live), fixed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option, and ``--config``."""
    kinds = get_type_hints(Options)
    for each in fields(Options):
        names = [*each.metadata["flags"], "--" + each.name.replace("_", "-")]
        help_text, metavar = each.metadata["help"], each.metadata["metavar"]
        if kinds[each.name] is bool:
            parser.add_argument(
                *names, action=argparse.BooleanOptionalAction if each.default else "store_true", default=None,
                dest=each.name, help=help_text,
            )  # fmt: skip
        elif kinds[each.name] is int:
            parser.add_argument(*names, type=int, default=None, dest=each.name, metavar=metavar, help=help_text)
        elif each.metadata["alone"]:
            parser.add_argument(
                *names,
                nargs="?",
                const=each.metadata["alone"],
                default=None,
                dest=each.name,
                metavar=metavar,
                help=help_text,
            )
        elif kinds[each.name] is str:
            parser.add_argument(*names, default=None, dest=each.name, metavar=metavar, help=help_text)
        else:
            parser.add_argument(*names, action="append", default=None, dest=each.name, metavar=metavar, help=help_text)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"TOML file with these options (default: {ROOTS_FILE} as root, else ~/.config/cowfs/serve.toml, if there)",
    )


def read(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Options:
    """The options of flags, environment and file.

    Raises:
        NotFound: the file named by ``--config`` is not there.
        InvalidArgument: an unknown option, or a value of the wrong type; the message names the place.
    """
    found: dict[str, Any] = {}
    kinds = get_type_hints(Options)
    path = arguments.config or environ.get(PREFIX + "CONFIG")
    if not path and os.path.exists(default_file()):
        path = default_file()
    for name, value in (_read_file(path) if path else {}).items():
        found[name] = _typed(value, kinds.get(name), f"{path}: {name}")
    for each in fields(Options):
        text = environ.get(PREFIX + each.name.upper())
        if text is not None:
            found[each.name] = _from_text(text, kinds[each.name], PREFIX + each.name.upper())
        value = getattr(arguments, each.name, None)
        if value is not None:
            found[each.name] = tuple(value) if isinstance(value, list) else value
    options = Options(**found)
    _check(options)
    return options


def _read_file(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise NotFound(f"no such file: {path}", remedy="cowfs serve --print-config shows what it may hold") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{path}: {error}") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path} is no text in UTF-8") from None


def _typed(value: Any, kind: Any, where: str) -> Any:
    if kind is None:
        raise InvalidArgument(f"{where}: no such option", remedy="cowfs serve --print-config lists them")
    if kind in (bool, int, str):
        if type(value) is not kind:
            raise InvalidArgument(f"{where}: not {_KINDS[kind]}: {value!r}")
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidArgument(f"{where}: not a list of strings: {value!r}")
    return tuple(value)


_KINDS = {bool: "true or false", int: "a number", str: "a string"}


def _from_text(text: str, kind: Any, where: str) -> Any:
    if kind is bool:
        if text.lower() not in ("0", "1", "true", "false", "yes", "no"):
            raise InvalidArgument(f"{where}: not true or false: {text!r}")
        return text.lower() in ("1", "true", "yes")
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise InvalidArgument(f"{where}: not a number: {text!r}") from None
    return text if kind is str else tuple(text.split(","))


def _check(options: Options) -> None:
    from cowfs.service.logs import LEVELS

    if options.log_level not in LEVELS:
        raise InvalidArgument(f"no log level {options.log_level!r}", remedy=", ".join(LEVELS))
    if options.log_format not in ("text", "json"):
        raise InvalidArgument(f"no log format {options.log_format!r}", remedy="text or json")
    if options.max_connections < 8:
        raise InvalidArgument("max_connections is below 8")
    for pair in (*options.storage_opt, *options.label):
        if "=" not in pair:
            raise InvalidArgument(f"not KEY=VALUE: {pair!r}")


def as_toml(options: Options) -> str:
    """The text of a file with these options, with a comment on each."""
    lines = ["# cowfs serve --config FILE: each option with the value that it has now."]
    for each in fields(options):
        value = getattr(options, each.name)
        lines += ["", f"# {each.metadata['help']}" + (" (SIGHUP)" if each.metadata["live"] else "")]
        lines.append(f"{each.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        import json

        return json.dumps(value)
    return "[" + ", ".join(_toml(item) for item in value) + "]"
