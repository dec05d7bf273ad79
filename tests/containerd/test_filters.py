"""containerd's filter language: what matches, and what is refused."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st
from support.containerd import Containerd

from cowfs.errors import InvalidArgument
from cowfs.model import Info, Kind
from cowfs.service.containerd.filters import parse_all

INFO = Info(
    name="default/12/web",
    kind=Kind.ACTIVE,
    parent="sha256:abc",
    labels={"team": "storage", "containerd.io/gc.root": "2026", "empty": "", "odd key": 'a"b', "a.b": "dots"},
)

MATCHING = [
    "", "name", "name.x", "parent", "kind", "kind==active", "name==default/12/web", "name!=x", "parent~=^sha256", "labels.team",
    "labels.team==storage", 'labels."team"==storage', 'labels."containerd.io/gc.root"==2026', "labels.a.b==dots", "labels.empty",
    "labels.empty==\"\"", "labels.missing!=x", "nofield!=x", 'labels.missing!="x"', "name~=web$", "name~=/^default/", "name~=|12/w|",
    r"name~=/default\/12/", 'labels."odd key"=="a\\"b"', r'labels.team=="\x73torage"', r'labels.team=="\163torage"', r'labels.team=="\u0073torage"',
    "name!=\x7fweb", "name!=\u200b", "name!=\ue000", "name!=\u2003x", "name!=-", "name~=^[^\\n]+$",
    "kind==active,parent==sha256:abc", "kind == active, labels.team == storage", '"name"=="default/12/web"', "labels.missing~=^$", "name~=",
][:-1]  # fmt: skip

NOT_MATCHING = [
    "kind==committed", "name==web", "labels.missing", "labels.missing==\"\"", "nofield", "nofield==x", "labels", "labels!=\"\"", "name~=^web",
    "name~=(", r"name~=\u0077|web", r"name~=\Z|web", "name~=/(?=web)|web/", r"name~=(w)\1|web", "name==\x7f", "kind==active,labels.missing", "labels.team!=storage", "labels.TEAM", "Kind==active",
]  # fmt: skip

WRONG = [
    "name=", "name=x", "name===x", "==x", "name==", "name==x y", "name==x,", ",name", "name,,kind", ".name", "name.", "name@=x", "name!x",
    'name=="x', 'name=="\\q"', "name==/x/", "name==|x|", "/name/==x", "name~=/x", 'name=="x"y', "na me==x", "name==x\0", "é==x", 'name=="\\x1"', "name<x",
    "name~=", "na-me", "labels.a-b", "web-1", "name==\0x", "name==a\x7f", "name==a\u200b", "name\x1c==x", "name==\ufffd", 'name=="\ufffd"', "name==a\u2003b",
]  # fmt: skip


@pytest.mark.parametrize("text", MATCHING)
def test_matches(text: str) -> None:
    assert parse_all([text])(INFO)


@pytest.mark.parametrize("text", NOT_MATCHING)
def test_does_not_match(text: str) -> None:
    assert not parse_all([text])(INFO)


@pytest.mark.parametrize("text", WRONG)
def test_cannot_be_read(text: str) -> None:
    with pytest.raises(InvalidArgument, match="filter"):
        parse_all([text])


def test_of_several_one_must_match_and_none_is_everything() -> None:
    assert parse_all([])(INFO)
    assert parse_all(["kind==view", "kind==active"])(INFO)
    assert not parse_all(["kind==view", "kind==committed"])(INFO)


def test_a_snapshot_without_a_parent_has_the_field_all_the_same() -> None:
    root = Info(name="base", kind=Kind.COMMITTED)
    assert parse_all(["parent"])(root)
    assert parse_all(['parent==""'])(root)


@given(st.text(max_size=30), st.text(alphabet='name=!~,."/|\\x ', max_size=20))
def test_any_text_is_read_or_refused(one: str, other: str) -> None:
    for text in (one, other):
        try:
            parse_all([text])(INFO)
        except InvalidArgument:
            continue


@given(st.text(max_size=40))
def test_a_quoted_value_is_what_it_was(value: str) -> None:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\0", "\\x00")
    info = Info(name=value, kind=Kind.VIEW)
    if value.isprintable() or "\n" in value or "\0" in value:
        assert parse_all([f'name=="{escaped}"'])(info)


_TOKENS = [
    "id", "labels", "team", "a", "b", "v", "odd key", '"team"', '"a.b"', '"odd key"', ".", ",", "==", "!=", "~=", "=", "!", "~", "storage", "dots", "web-1",
    "12", "é", "/", "|", '"', "\\", '\\"', "\\x41", "\\101", "\\u00e9", "\\U00000041", "\\q", "/^web/", "|we|", '"web-1"', '"storage"', "/a,b/", " ", "\t",
    "\n", "\r", "\0", "^", "$", ".*", "(", "[a-z]+", "\u00a0", "\u200b", "\u3000", "\x7f", "\u0301", "\U0001f600", "-", "_", "\\/", "\\|", "\ufffd", "'", "`",
    "<", "+", "&", "\x85", "\ue000", "\u00ad", "\x1c",
]  # fmt: skip
_STARTS = ["id", "labels.team", 'labels."a.b"', 'labels."odd key"', "labels.v"]


def _field(number: int, data: str | bytes) -> bytes:
    """A field of a message in protobuf's encoding; less than 16 KiB."""
    raw = data.encode() if isinstance(data, str) else data
    return bytes([number << 3 | 2, len(raw) & 127 | 128, len(raw) >> 7]) + raw


def _leases(containerd: Containerd, id: str, labels: dict[str, str]) -> Callable[[str], bool | None]:
    """Make a lease (containerd.services.leases.v1); the function returned asks whether a filter finds it, None for a refusal."""
    import grpc

    channel = grpc.insecure_channel(f"unix:{containerd.base}/c.sock")

    def call(name: str, body: bytes) -> bytes:
        method = channel.unary_unary(f"/containerd.services.leases.v1.Leases/{name}")
        return bytes(method(body, metadata=(("containerd-namespace", "default"),), timeout=60, wait_for_ready=True))

    call("Create", _field(1, id) + b"".join(_field(3, _field(1, key) + _field(2, labels[key])) for key in labels))

    def finds(text: str) -> bool | None:
        try:
            return bool(call("List", _field(1, text)))
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
            return None

    return finds


def test_random_filters_mean_what_they_mean_to_containerd(containerd: Containerd) -> None:
    """containerd lists its own leases by the same language: its answer is ours, for filters of random tokens."""
    labels = {"team": "storage", "a.b": "dots", "odd key": 'a"b', "n": "12", "u": "é", "v": "a,b"}
    info = Info(name="web-1", kind=Kind.ACTIVE, labels=labels)
    finds, rng = _leases(containerd, "web-1", labels), random.Random(1)
    for _ in range(1500):
        text = "".join(rng.choices(_TOKENS, k=rng.randrange(1, 9)))
        if rng.random() < 0.6:
            text = rng.choice(_STARTS) + rng.choice(["==", "!=", "~="]) + text
        try:
            ours = parse_all([re.sub(r"(?<!\w)id(?!\w)", "name", text, flags=re.ASCII)])(info)
        except InvalidArgument:
            ours = None
        assert ours is finds(text), repr(text)
