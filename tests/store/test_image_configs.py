"""The configuration of an image belongs to its tag: what is exported is what was imported, whoever shares its layers."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.archives import directory, member, tar
from support.command import one_line, run_module
from support.images import FULL_NAME, REF_NAME, Layout, config, digest, docker

from cowfs.archive import ApplyOptions
from cowfs.errors import AlreadyExists, InvalidArgument, LimitExceeded
from cowfs.images import open_image
from cowfs.store import Store
from cowfs.store.sandboxes import _config

DATA = Path(__file__).parent.parent / "data"
ONE, TWO, THREE = tar(directory("./"), member("a", b"1")), tar(member("b", b"2")), tar(member("c", b"3"))


def image(tag: str, layers: list[bytes] | None = None, **fields: Any) -> io.BytesIO:
    layers = [ONE, TWO] if layers is None else layers
    return io.BytesIO(Layout().add(layers, tag, config(layers, **fields)).tar())


def exported(store: Store, name: str, format: str = "oci", pick: str | None = None) -> dict[str, Any]:
    out = io.BytesIO()
    store.export(name, out, format=format)
    out.seek(0)
    with open_image(out) as source:
        found: dict[str, Any] = json.loads(source.pick(pick).config)
    return found


def image_id(store: Store, name: str, format: str) -> str:
    out = io.BytesIO()
    store.export(name, out, format=format)
    out.seek(0)
    with open_image(out) as source:
        return source.pick().config_digest


@pytest.mark.parametrize("format", ["oci", "docker"])
@pytest.mark.parametrize("driver", ["overlay", "row", "vfs"])
def test_two_images_on_the_same_layers_keep_their_own(space: Path, driver: str, format: str) -> None:
    with Store.open(space / "store", driver=driver, fsync=False) as store:
        for name in ("prod", "debug", "zero"):
            store.import_image(image(name, config={"Cmd": [name]}))
        for name in ("prod", "debug", "zero"):
            assert exported(store, name, format)["config"] == {"Cmd": [name]}
            assert image_id(store, name, format) == digest(config([ONE, TWO], config={"Cmd": [name]}))


def test_a_snapshots_own_name_is_all_the_images_that_it_is(store: Store) -> None:
    for name in ("prod", "debug"):
        top = store.import_image(image(name, config={"Cmd": [name]}))
    for name in ("prod", "debug"):
        assert exported(store, top, pick=name)["config"] == {"Cmd": [name]}


def test_an_import_after_a_change_takes_the_new_one(store: Store) -> None:
    store.import_image(image("app", config={"Env": ["A=1"]}), "app")
    store.import_image(image("app", config={"Env": ["A=2"]}), "app")
    assert exported(store, "app")["config"] == {"Env": ["A=2"]}


def test_a_child_keeps_its_own_parents(store: Store) -> None:
    for name in ("prod", "debug"):
        store.import_image(image(name, config={"Cmd": [name]}))
    store.prepare("w", "prod")
    store.commit("w", "child")
    store.prepare("w", "child")
    store.commit("w", "grandchild")
    store.tag("named", "grandchild")
    store.import_image(image("prod", config={"Cmd": ["later"]}), "prod")
    store.remove("prod")
    for name in ("child", "grandchild", "named"):
        assert exported(store, name)["config"] == {"Cmd": ["prod"]}
    assert json.loads(store.config("grandchild"))["config"] == {"Cmd": ["prod"]}
    assert store.gc() is not None
    assert exported(store, "named")["config"] == {"Cmd": ["prod"]}


def test_another_tag_of_an_image_has_its_configuration(store: Store) -> None:
    for name in ("prod", "debug"):
        store.import_image(image(name, config={"Cmd": [name]}))
    store.tag("again", "prod")
    assert exported(store, "again")["config"] == {"Cmd": ["prod"]}


@pytest.mark.parametrize("driver", ["overlay", "row"])
@pytest.mark.parametrize("format", ["oci", "docker"])
def test_what_was_squashed_is_exported(space: Path, driver: str, format: str) -> None:
    layers = [ONE, TWO, THREE]
    history = [{"created_by": f"step {number}"} for number in range(3)]
    with Store.open(space / "store", driver=driver, fsync=False) as store:
        store.import_image(image("app", layers, history=history, config={"Cmd": ["x"]}))
        bottom = store.chain("app")[-1].name
        store.squash(bottom)
        found = exported(store, "app", format)
        assert [step["created_by"] for step in found["history"]] == ["step 0", "step 1", "step 2"]
        assert [bool(step.get("empty_layer")) for step in found["history"]] == [True, False, False]
        assert len(found["rootfs"]["diff_ids"]) == 2
        assert found["config"] == {"Cmd": ["x"]}
        store.prepare("w", "app")
        store.commit("w", "child")
        found = exported(store, "child", format)
        assert [bool(step.get("empty_layer")) for step in found["history"]] == [True, False, False, False]


@pytest.mark.parametrize(
    ("history", "steps"),
    [
        ([{"created_by": "x"}] * 3, [True, True, False, False]),
        ([], [False, False]),
        (None, None),
        ("nonsense", [False, False]),
        ([5, {"created_by": "y"}], [False, False]),
        ([{"created_by": "x"}, {"empty_layer": True}], [False, True, False]),
    ],
)
def test_history_is_for_people(store: Store, history: Any, steps: list[bool] | None) -> None:
    fields = {} if history is None else {"history": history}
    store.import_image(image("app", [ONE], **fields))
    assert image_id(store, "app", "oci") == digest(config([ONE], **fields))  # as it came, whatever it says
    store.prepare("w", "app")
    store.commit("w", "child")
    found = exported(store, "child").get("history")
    assert (None if found is None else [bool(step.get("empty_layer")) for step in found]) == steps


def test_an_image_without_layers_stays_one(store: Store) -> None:
    for format in ("oci", "docker"):
        store.import_image(image("scratch", [], config={"Cmd": ["x"]}), "scratch")
        assert image_id(store, "scratch", format) == digest(config([], config={"Cmd": ["x"]}))
    store.prepare("w", "scratch")
    store.apply("w", io.BytesIO(ONE))
    store.commit("w", "child")
    found = exported(store, "child")
    assert found["rootfs"]["diff_ids"] == [digest(ONE)]
    assert found["config"] == {"Cmd": ["x"]}


# Names ---------------------------------------------------------------------------------------------


def named(full: str | None, ref: str | None, **fields: Any) -> io.BytesIO:
    notes = {key: value for key, value in ((FULL_NAME, full), (REF_NAME, ref)) if value is not None}
    return io.BytesIO(Layout().add([ONE], None, config([ONE], **fields), annotations=notes).tar())


def test_archives_of_buildx_and_ctr_have_their_full_names(store: Store) -> None:
    """They say ``docker.io/library/one:latest``, and beside it only ``latest``."""
    for name in ("one", "two"):
        store.import_image(named(f"docker.io/library/{name}:latest", "latest", config={"Cmd": [name]}))
    assert [tag.name for tag in store.tags()] == ["docker.io/library/one:latest", "docker.io/library/two:latest"]
    for name in ("one", "two"):
        assert exported(store, f"docker.io/library/{name}:latest")["config"] == {"Cmd": [name]}


@pytest.mark.parametrize("ask", ["docker.io/library/one:1.0", "1.0", "one:1.0"])
def test_either_name_picks(store: Store, ask: str) -> None:
    store.import_image(named("docker.io/library/one:1.0", "1.0"), "x", tag=ask)


def test_a_tag_that_moves_away_from_another_image_is_told(store: Store) -> None:
    lines: list[str] = []
    store.import_image(named(None, "latest", config={"Cmd": ["one"]}), told=lines.append)
    store.import_image(named(None, "latest", config={"Cmd": ["one"]}), told=lines.append)
    assert lines == []
    store.import_image(named(None, "latest", config={"Cmd": ["two"]}), told=lines.append)
    assert len(lines) == 1
    assert "'latest'" in lines[0]
    assert exported(store, "latest")["config"] == {"Cmd": ["two"]}
    with pytest.warns(UserWarning, match="latest"):
        store.import_image(named(None, "latest", config={"Cmd": ["three"]}))
    store.import_image(named(None, "latest", config={"Cmd": ["four"]}), "latest", told=lines.append)  # as asked
    assert len(lines) == 1


def test_a_name_that_cannot_be_a_tag_is_told(store: Store) -> None:
    lines: list[str] = []
    top = store.import_image(named(None, "/abs"), told=lines.append)
    assert store.tags() == []
    assert len(lines) == 1
    assert "'/abs'" in lines[0]
    store.tag("fine", top)
    surrogate = Layout().add([ONE], "\ud83d")
    store.import_image(io.BytesIO(surrogate.tar()), told=lines.append)
    assert len(lines) == 2
    lines[1].encode()


def test_a_name_that_a_snapshot_has_is_refused_before_anything_is_unpacked(store: Store) -> None:
    store.prepare("w")
    store.commit("w", "app:1")
    with pytest.raises(AlreadyExists):
        store.import_image(image("app:1"))
    assert [info.name for info in store.walk()] == ["app:1"]


def test_the_command_tells_on_standard_error(space: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_module("cowfs", *arguments, "--root", space / "store", check=True)

    for name in ("one", "two"):
        (space / f"{name}.tar").write_bytes(docker(([ONE], ["app:1"], config([ONE], config={"Cmd": [name]}))))
    assert run("import", str(space / "one.tar"), "--progress", "none").stderr == ""
    assert "app:1" in run("import", str(space / "two.tar")).stderr


# Stores of before ----------------------------------------------------------------------------------


@pytest.mark.root
def test_a_store_of_format_1_opens_with_all_that_it_has(space: Path) -> None:
    """Made by the version of 2026-11-27: two images on the same layers, a child, an active snapshot and a view."""
    subprocess.run(
        ["tar", "--xattrs", "--xattrs-include=*", "-xzf", DATA / "store-format-1.tar.gz", "-C", space], check=True
    )
    with Store.open(space / "store", fsync=False) as store:
        assert {tag.name for tag in store.tags()} == {"app:prod", "app:debug"}
        assert exported(store, "app:prod")["config"] == {"Cmd": ["serve"], "User": "1000"}
        assert exported(store, "app:debug")["config"] == {"Cmd": ["sh"], "User": "0"}
        assert len(exported(store, "made")["rootfs"]["diff_ids"]) == 3
        assert store.check(content=True).problems == []
        store.commit("active", "later")
        store.prepare("w", "app:prod")
        store.commit("w", "child")
        assert exported(store, "child")["config"] == {"Cmd": ["serve"], "User": "1000"}
        out = io.BytesIO()
        store.export("later", out, format="tar")
        out.seek(0)
        with tarfile.open(fileobj=out) as tree:
            names = [name.removeprefix("./") for name in tree.getnames()]
        assert {"etc/one", "etc/two", "made"} <= set(names)
        assert "gone" not in names


@pytest.mark.root
def test_a_store_of_format_1_is_read_where_nothing_can_be_written(space: Path, can_mount: None) -> None:
    made, where = space / "made", space / "ro"
    made.mkdir()
    where.mkdir()
    subprocess.run(
        ["tar", "--xattrs", "--xattrs-include=*", "-xzf", DATA / "store-format-1.tar.gz", "-C", made], check=True
    )
    subprocess.run(["mkfs.ext4", "-q", "-d", made, space / "image", "8M"], check=True)
    subprocess.run(["mount", "-o", "loop,ro", space / "image", where], check=True)
    try:
        with Store.open(where / "store", fsync=False) as store:
            assert exported(store, "app:prod")["config"] == {"Cmd": ["serve"], "User": "1000"}
            assert exported(store, "made")["config"]
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("driver", ["overlay", "row"])
def test_an_image_whose_layers_were_squashed_is_whole_again_when_it_is_imported_anew(space: Path, driver: str) -> None:
    """And so is one that is made of it: neither is taken for what was squashed."""
    layers = [ONE, TWO, THREE, tar(member("d", b"4"))]
    with Store.open(space / "store", driver=driver, fsync=False) as store:
        store.import_image(image("app", layers[:3]))
        store.tag("squashed", "app")
        store.squash(store.chain("app")[-1].name)
        store.import_image(image("child", layers), "child")
        store.import_image(image("app", layers[:3]), "app")
        for name, count in (("app", 3), ("child", 4)):
            assert image_id(store, name, "docker") == digest(config(layers[:count]))
        assert len(exported(store, "squashed")["rootfs"]["diff_ids"]) == 2
        before = len(list(store.walk()))
        store.import_image(image("child", layers), "child")
        assert len(list(store.walk())) == before
        assert store.check(content=True).problems == []


def test_a_name_that_looks_like_a_layers_is_not_taken_for_it(store: Store) -> None:
    store.prepare("w")
    store.commit("w", digest(ONE))
    store.import_image(image("app", [ONE, TWO]))
    assert image_id(store, "app", "oci") == digest(config([ONE, TWO]))


@pytest.mark.root
@pytest.mark.parametrize(
    "fields",
    [{"Cmd": "sh -c x"}, {"Cmd": {"x": 1}}, {"Entrypoint": [5]}, {"Env": 5}, {"Env": ["A=\ud83d"]}, {"Cmd": ["a\0b"]},
     {"WorkingDir": ["/"]}, {"Env": ["no equals"]}, {"Env": ["=x"]}],
    ids=str,
)  # fmt: skip
def test_run_refuses_a_configuration_that_no_command_can_be_given(space: Path, fields: dict[str, Any]) -> None:
    (space / "image.tar").write_bytes(Layout().add([ONE], "app", config([ONE], config=fields)).tar())
    root = ("--root", space / "store")
    assert run_module("cowfs", "import", space / "image.tar", *root).returncode == 0
    done = run_module("cowfs", "run", *root, "app")
    assert done.returncode != 0
    one_line(done)
    assert run_module("cowfs", "ls", *root).stdout.count("run-") == 0


@pytest.mark.root
def test_run_takes_the_configuration_of_the_image_that_a_snapshot_was_made_from(space: Path) -> None:
    root = ("--root", space / "store")
    for name in ("prod", "debug"):
        (space / "image.tar").write_bytes(
            Layout().add([ONE], name, config([ONE], config={"Env": [f"A={name}"], "Cmd": ["x"]})).tar()
        )
        run_module("cowfs", "import", space / "image.tar", *root, check=True)
    run_module("cowfs", "prepare", "w", "prod", *root, check=True)
    run_module("cowfs", "commit", "w", "child", *root, check=True)
    with Store.open(space / "store") as store:
        assert _config(store.config("child"), "child")["Env"] == ["A=prod"]


def test_the_layers_of_an_image_count_together(store: Store, space: Path) -> None:
    layers = [tar(member(f"f{number}", bytes([number]) * 40_000)) for number in range(5)]
    source = space / "image.tar"
    source.write_bytes(image("app", layers).getvalue())
    with pytest.raises(LimitExceeded, match="max-size"):
        store.import_image(source, options=ApplyOptions(max_bytes=150_000))
    store.import_image(source, options=ApplyOptions(max_bytes=300_000))
    store.import_image(source, options=ApplyOptions(max_bytes=1))  # nothing of it is unpacked


@pytest.mark.root
@pytest.mark.parametrize("driver", ["overlay", "row", "vfs"])
def test_a_whole_tree_may_have_names_that_delete_in_a_layer(space: Path, driver: str) -> None:
    names = {".wh.x", ".wh..wh..opq", "d", "d/.wh.deep", ".wh.dir", ".wh.dir/f"}
    tree = space / "tree"
    for name in sorted(names):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name in ("d", ".wh.dir") else path.write_bytes(name.encode())
    subprocess.run(["tar", "-cf", space / "tree.tar", "-C", tree, "."], check=True)
    with Store.open(space / "store", driver=driver, fsync=False) as store:
        with pytest.raises(InvalidArgument, match=r"\.wh\."):
            store.import_image(tree)
        tops = [store.import_image(source, form="rootfs") for source in (tree, space / "tree.tar", space / "tree.tar")]
        assert tops[1] == tops[2]
        for top in tops:
            out = io.BytesIO()
            store.export(top, out, format="tar")
            out.seek(0)
            with tarfile.open(fileobj=out) as found:
                assert {name.removeprefix("./") for name in found.getnames()} - {".", ""} == names
            with pytest.raises(InvalidArgument, match=r"\.wh\."):
                store.export(top, io.BytesIO())
        out.seek(0)
        store.import_image(io.BytesIO(out.getvalue()), "again", form="rootfs")
        with pytest.raises(InvalidArgument):
            store.import_image(space / "tree.tar", form="layer")
        layer = space / "layer.tar"
        layer.write_bytes(tar(directory("./"), member("a", b"1"), member(".wh.b")))
        as_layer, as_tree = store.import_image(layer, form="layer"), store.import_image(layer, form="rootfs")
        assert as_layer == store.import_image(layer) != as_tree
        assert {entry.path for entry in store.diff(as_layer)} == {b"a"}
        assert {entry.path for entry in store.diff(as_tree)} == {b"a", b".wh.b"}
        assert store.check(content=True).problems == []
