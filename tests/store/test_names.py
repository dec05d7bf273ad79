"""Any text as a key, a name, a tag or a label is kept exactly, or refused; it never becomes a path, and is never cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from cowfs.errors import AlreadyExists, InvalidArgument
from cowfs.store import Store
from cowfs.store.names import check_labels, check_name, new_id

HOSTILE = ["", ".", "..", "../x", "/etc/passwd", "a/../b", "a\0b", "a\nb", "x" * 255, "x" * 256, "x" * 4096, "\U0001f980" * 255,
           " a", "a ", "-rf", "--help", "new-x", "rm-x", "sha256:../x", "'; DROP TABLE snapshots; --", "\u202eevil", "\ud800", "a\x1b[2J"]  # fmt: skip
ANY = st.text(max_size=300) | st.sampled_from(HOSTILE)


@given(ANY, ANY)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("../x", "ok")
@example("ns/1/extract-123 sha256:abc", "k8s.io/2/sha256:def")
def test_every_verb_keeps_a_name_or_refuses_it(space: Path, key: str, name: str) -> None:
    root = space / "store"
    with Store.open(root, driver="overlay", fsync=False) as store:
        made = []
        try:
            store.prepare(key, labels={"was": "key"})
            made.append(key)
            assert store.stat(key).name == key
            store.commit(key, name)
            made[:] = [name]
            assert store.stat(name).name == name
            store.tag(key, name)
            made.insert(0, key)
            store.view("look", key)
            assert store.stat("look").parent == name
            store.remove("look")
        except InvalidArgument as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 300
        except AlreadyExists:
            assert key == name or "look" in (key, name)
        for each in made:
            store.remove(each)
        for info in store.walk():
            store.remove(info.name)
        assert store.check().problems == []
    assert sorted(os.listdir(space)) == ["store"]
    assert os.listdir(root / "layers") == []


@pytest.mark.parametrize("name", HOSTILE)
def test_verbs_that_look_for_a_hostile_name_find_nothing(space: Path, name: str) -> None:
    from cowfs.errors import CowfsError

    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        for verb in (store.stat, store.remove, store.mounts, store.usage, store.untag, lambda each: store.commit(each, "x"),
                     lambda each: store.prepare("k", each), lambda each: store.diff(each), lambda each: store.update(each, {})):  # fmt: skip
            with pytest.raises(CowfsError):
                verb(name)
        assert list(store.walk()) == []


@given(st.text(max_size=300))
def test_what_is_accepted_prints_on_one_line(name: str) -> None:
    try:
        check_name(name)
    except InvalidArgument:
        return
    assert name == name.strip()
    assert name.isprintable()
    assert 0 < len(name) <= 255
    assert len(name.splitlines()) == 1
    name.encode()


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=50), max_size=4))
def test_labels_are_kept_exactly_or_refused(labels: dict[str, str]) -> None:
    try:
        check_labels(labels)
    except InvalidArgument:
        return
    for key, value in labels.items():
        assert key
        assert "\0" not in key
        (key + value).encode()


def test_ids_are_short_distinct_and_safe_in_paths() -> None:
    ids = {new_id() for _ in range(2000)}
    assert len(ids) == 2000
    assert all((len(one) == 10 and one.isalnum() and one.islower()) or one.isdigit() for one in ids)
