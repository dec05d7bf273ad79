"""The verbs of the service: serve, tls, events."""

from __future__ import annotations

import os

from cowfs._typed import TYPE_CHECKING
from cowfs.cli.common import Command
from cowfs.cli.output import print_items, print_json
from cowfs.cli.store.args import add_json, add_store, open_store
from cowfs.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    import argparse

    from cowfs.model import Event


def _needs_daemon() -> None:
    try:
        import h11  # noqa: F401  only to name a missing package
    except ImportError:
        raise Unsupported("the service needs the package h11", remedy="pip install 'cowfs-storage[daemon]'") from None


def _configure_serve(parser: argparse.ArgumentParser) -> None:
    from cowfs.service.options import add_arguments

    add_arguments(parser)
    add = parser.add_argument
    add("--print-config", action="store_true", help="print a TOML file with all options as they are now, and end")
    add("--install", action="store_true", help="write systemd units for a service with socket activation, and end")
    add(
        "--user",
        action="store_true",
        help="of --install: units of this user's own service manager (as an ordinary user the default)",
    )
    add("--force", action="store_true", help="of --install: overwrite units that are there")
    add(
        "--mounts",
        nargs="?",
        const="",
        metavar="SOCKET",
        help="be this user's mount service instead: cowfs-overlayfs, of podman and buildah, hands its work to it",
    )


def _serve(args: argparse.Namespace) -> int:
    if args.mounts is not None and not args.install:
        from cowfs.cli import standby

        standby.start(args.mounts)
    _needs_daemon()
    from cowfs.service.daemon import main_service

    return main_service(args)


def _configure_tls(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", choices=("init",), help="init: make an authority and certificates for a server and a client")
    add("directory", metavar="DIR", help="where; it gets ca.pem, server-cert.pem, server-key.pem, cert.pem, key.pem")
    add("--name", action="append", default=[], metavar="HOST", help="name or address of the server; repeated")
    add("--days", type=int, default=365, metavar="N", help="how long the certificates are valid (default: 365)")
    add_json(parser)


def _tls(args: argparse.Namespace) -> int:
    import socket

    from cowfs.service.certificates import make_certificates

    if args.days < 1:
        raise InvalidArgument("--days is below 1")
    names = args.name or list(dict.fromkeys([socket.gethostname(), "localhost", "127.0.0.1", "::1"]))
    where = os.path.abspath(args.directory)
    make_certificates(where, names, days=args.days)
    if args.json:
        files = {name: f"{where}/{name}.pem" for name in ("ca", "server-cert", "server-key", "cert", "key")}
        print_json({"directory": where, "names": names, **files}, args.json)
        return 0
    print(f"cowfs serve -H tcp://0.0.0.0:2376 --tlsverify --tlscacert={where}/ca.pem \\")
    print(f"    --tlscert={where}/server-cert.pem --tlskey={where}/server-key.pem")
    print(f"DOCKER_CERT_PATH={where} docker -H tcp://{names[0]}:2376 --tlsverify version")
    return 0


def _configure_events(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--since", metavar="TIME", help="from a time on: seconds since 1970, a date and time, or 10m, 2h, 3d ago")
    add("--until", metavar="TIME", help="up to a time")
    add("--filter", action="append", default=[], metavar="K=V", help="type=, event=, actor=; repeated")
    add("-f", "--follow", action="store_true", help="go on with what happens from now on (the default without --since)")
    add_store(parser)


def _events(args: argparse.Namespace) -> int:
    wanted: dict[str, list[str]] = {}
    for pair in args.filter:
        key, equals, value = pair.partition("=")
        if not equals or key not in ("type", "event", "actor"):
            raise InvalidArgument(f"not a filter: {pair!r}", remedy="type=, event= or actor=")
        wanted.setdefault(key, []).append(value)
    since, until = _time(args.since), _time(args.until)
    follow = args.follow or args.since is None
    with open_store(args, create=False) as store:
        found = (event for event in store.events(since=since, until=until, follow=follow) if _is_wanted(event, wanted))
        if args.json:
            from dataclasses import asdict

            print_items(map(asdict, found), "lines" if args.json == "array" and follow else args.json, flush=follow)
        else:
            for event in found:
                print(_line(event), flush=True)
    return 0


def _is_wanted(event: Event, wanted: dict[str, list[str]]) -> bool:
    told = {"type": event.type, "event": event.action, "actor": event.actor}
    return event.type == "log" or all(told[key] in values for key, values in wanted.items())


def _time(text: str | None) -> int | None:
    """Nanoseconds since 1970."""
    import datetime
    import re
    import time

    if text is None:
        return None
    ago = re.fullmatch(r"(\d+)([smhd])", text)
    if ago:
        return time.time_ns() - int(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[ago[2]] * 1_000_000_000
    try:
        return int(float(text) * 1e9)
    except ValueError:
        pass
    try:
        return int(datetime.datetime.fromisoformat(text).timestamp() * 1e9)
    except ValueError:
        raise InvalidArgument(
            f"not a time: {text!r}", remedy="seconds since 1970, 2026-01-31T12:00:00, or 10m"
        ) from None


def _line(event: Event) -> str:
    import datetime

    from cowfs.cli.output import shown

    stamp = datetime.datetime.fromtimestamp(event.time // 10**9).astimezone()
    told = ", ".join(f"{key}={value}" for key, value in event.attributes.items())
    zone = stamp.strftime("%z")
    when = f"{stamp:%Y-%m-%dT%H:%M:%S}.{event.time % 10**9:09d}{zone[:3]}:{zone[3:]}"
    return shown(f"{when} {event.type} {event.action} {event.actor}".rstrip() + (f" ({told})" if told else ""))


COMMANDS = {
    "serve": Command(
        _configure_serve,
        _serve,
        "Serve the store to Docker's clients, in the foreground: images, containers, events, statistics. Options also come from"
        " COWFS_SERVE_NAME in the environment and from a TOML file. SIGHUP reloads, SIGUSR1 writes threads and state to the log,"
        " SIGUSR2 turns debug mode on and off.",
        (
            "cowfs serve",
            "cowfs serve -H unix:///run/cowfs/docker.sock -H tcp://127.0.0.1:2375 -D",
            "cowfs serve --storage-driver row --storage-opt size=10G",
            "docker -H unix:///run/cowfs/docker.sock info",
        ),
    ),
    "tls": Command(
        _configure_tls,
        _tls,
        "Make an authority, and certificates for a server and a client, to try the TLS door with.",
        ("cowfs tls init certs", "cowfs tls init certs --name build.example.org"),
    ),
    "events": Command(
        _configure_events,
        _events,
        "Tell what happens to the store, its mounts and containers, whoever does it; no daemon is needed.",
        ("cowfs events", "cowfs events --since 10m --filter type=image", "cowfs events --since 0 --json"),
    ),
}
