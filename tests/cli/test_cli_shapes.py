"""The output of the listing verbs: columns, one JSON shape, templates, short digests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import environment, run_module

from cowfs.store import Store

Cowfs = Callable[..., "subprocess.CompletedProcess[str]"]
DIGESTS = [f"sha256:{digit * 64}" for digit in "ab"] + ["sha256:" + "a" * 20 + "c" * 44]


@pytest.fixture
def cowfs(space: Path) -> Cowfs:
    with Store.open(space / "store", driver="overlay", fsync=False) as store:
        for digest in DIGESTS:
            store.prepare("k")
            store.commit("k", digest)
        store.tag("app:1", DIGESTS[0])
        store.tag("app", DIGESTS[0])
        store.prepare("work", DIGESTS[0], size="2G", labels={"team": "web"})

    def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = run_module(
            "cowfs", *arguments, env={**environment(), "COWFS_ROOT": str(space / "store"), "COWFS_FSYNC": "0"}
        )
        assert done.returncode == status, done.stderr
        return done

    return run


def test_ls_shows_tags_use_limit_age_and_what_it_is_based_on(cowfs: Cowfs) -> None:
    lines = cowfs("ls").stdout.splitlines()
    head = ["KIND", "AGE", "USED", "LIMIT", "NAME", "TAGS", "BASED ON", "MOUNTED AT"]
    starts = [lines[0].index(word) for word in head]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines[1:]]
    assert cells[0][:1] + cells[0][3:] == ["committed", "-", "sha256:aaaaaaaaaaaa", "app, app:1", "-", "-"]
    assert cells[3][:1] + cells[3][2:] == ["active", "-", "2 GiB", "work", "-", "sha256:aaaaaaaaaaaa", "-"]
    assert DIGESTS[0] in cowfs("ls", "--no-trunc").stdout
    assert cowfs("ls", "-q").stdout.splitlines() == [*DIGESTS, "work"]


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse")
@pytest.mark.parametrize("how", ["fuse", "kernel"])
def test_ls_shows_where_a_key_is_mounted(cowfs: Cowfs, space: Path, how: str) -> None:
    (space / "mnt").mkdir()
    with Store.open(space / "store", fsync=False) as store:
        store.prepare("free", DIGESTS[0])
        with store.mount("free", space / "mnt", mount_type=how):
            told = {one["name"]: one["mountpoint"] for one in json.loads(cowfs("ls", "--json").stdout)}
            assert told["free"] == str(space / "mnt")
            assert told["work"] is None
        assert json.loads(cowfs("ls", "name==free", "--json").stdout)[0]["mountpoint"] is None


def test_a_list_is_an_array_or_lines_of_the_same_objects(cowfs: Cowfs) -> None:
    for verb in (["ls"], ["images"], ["log", "work"], ["tree"], ["mounts"], ["diff", "app", "work"]):
        array = json.loads(cowfs(*verb, "--json").stdout)
        assert isinstance(array, list)
        assert [json.loads(line) for line in cowfs(*verb, "--jsonl").stdout.splitlines()] == array
    one = json.loads(cowfs("stat", "work", "--json").stdout)
    assert [json.loads(cowfs("stat", "work", "--jsonl").stdout)] == one
    keys = {"name", "kind", "parent", "labels", "created", "updated", "id", "tags", "usage", "limit", "mountpoint"}
    assert set(json.loads(cowfs("ls", "--json").stdout)[0]) == keys


def test_templates(cowfs: Cowfs) -> None:
    assert cowfs(
        "ls", "name==work", "--format", r"{name}\t{limit.bytes:size}\t{labels.team}|{usage.bytes}|{parent:.9}"
    ).stdout == ("work\t2 GiB\tweb|-|sha256:aa\n")
    assert cowfs("images", "--format", "{tag:>6}{layers}").stdout == "   app1\n app:11\n"
    assert cowfs("ls", "kind==committed", "--format", "{tags}").stdout == "app,app:1\n\n\n"
    assert cowfs("stat", "work", "--format", "{{{kind}}}").stdout == "{active}\n"
    for template, word in (
        ("{nope}", "no field 'nope'"),
        ("{name", "not a template"),
        ("{name:size}", "no number"),
        ("{created:q}", "not a template"),
        ("{}", "no field"),
    ):
        done = cowfs("ls", "--format", template, status=2)
        assert word in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_digest_may_be_abbreviated_where_it_is_the_only_one(cowfs: Cowfs) -> None:
    assert cowfs("stat", "sha256:bbbb", "--format", "{name}").stdout.strip() == DIGESTS[1]
    assert cowfs("stat", "sha256:" + "a" * 20 + "c", "--format", "{name}").stdout.strip() == DIGESTS[2]
    assert "several" in cowfs("stat", "sha256:aaaaaaaaaaaa", status=2).stderr
    for none in ("sha256:bbb", "sha256:dddd", "sha256:", "bbbb"):
        cowfs("stat", none, status=3)
    cowfs("rm", "sha256:bbbb", status=3)  # what removes takes whole names
    cowfs("prepare", "more", "sha256:bbbb")
    assert cowfs("stat", "more", "--format", "{parent}").stdout.strip() == DIGESTS[1]
