"""containerd's filter language: what matches, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

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
    "kind==active,parent==sha256:abc", "kind == active, labels.team == storage", '"name"=="default/12/web"', "labels.missing~=^$", "name~=",
][:-1]  # fmt: skip

NOT_MATCHING = [
    "kind==committed", "name==web", "labels.missing", "labels.missing==\"\"", "nofield", "nofield==x", "labels", "labels!=\"\"", "name~=^web",
    "name~=(", "kind==active,labels.missing", "labels.team!=storage", "labels.TEAM", "Kind==active",
]  # fmt: skip

WRONG = [
    "name=", "name=x", "name===x", "==x", "name==", "name==x y", "name==x,", ",name", "name,,kind", ".name", "name.", "name@=x", "name!x",
    'name=="x', 'name=="\\q"', "name==/x/", "name==|x|", "/name/==x", "name~=/x", 'name=="x"y', "na me==x", "name==x\0", "é==x", 'name=="\\x1"', "name<x",
    "name~=",
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
