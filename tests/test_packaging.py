"""A build holds the files of the tree, and an installation works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from cowfs.driver import registry

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"cowfs": "cowfs", "cowfs_drivers": "drivers", "cowfs_benchmarks": "benchmarks"}
"""Top-level package -> its folder in the tree."""


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_registry_looks_into_our_own_distribution_first() -> None:
    """Its name is in two places; where they differ, every verb looks through all that is installed (40 ms)."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == registry.DISTRIBUTION


def tree_files() -> set[str]:
    """Paths that an installed cowfs has, by the tree: modules, schema, the client in C, the service's page and the mark that it is typed."""
    found = set()
    for package, folder in PACKAGES.items():
        for directory, names, files in os.walk(ROOT / folder):
            names[:] = [
                name for name in names if name != "__pycache__" and (Path(directory) / name / "__init__.py").exists()
            ]
            if (Path(directory) / "page" / "index.html").exists():
                found |= {f"cowfs/service/page/{each.name}" for each in (Path(directory) / "page").iterdir()}
            inside = Path(directory).relative_to(ROOT / folder)
            found |= {str(package / inside / name) for name in files if name.endswith((".py", ".c", ".sql", ".typed"))}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree (a build leaves files beside its sources)."""
    base = tmp_path_factory.mktemp("wheel")
    copy = base / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in [*PACKAGES.values()]:
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(base), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and ("No matching distribution" in done.stderr or "No module named pip" in done.stderr):
        pytest.skip("cannot build here: no package index, or no pip")
    assert done.returncode == 0, done.stderr
    (built,) = base.glob("cowfs_storage-*.whl")
    return built


def test_every_package_is_listed() -> None:
    """pyproject.toml names each folder with an __init__.py: what is left out would be dropped in silence."""
    tools = project()["tool"]
    listed = set(tools["setuptools"]["packages"])  # type: ignore[index]
    there = {str(Path(name).parent).replace("/", ".") for name in tree_files() if name.endswith("__init__.py")}
    assert listed == there


def test_wheel_holds_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.split("/")[0] in PACKAGES}
    assert names == tree_files()


def test_the_wheel_brings_the_man_pages(wheel: Path, tmp_path: Path) -> None:
    """Written from the parsers when it is built; installed, man(1) finds them."""
    from cowfs.cli.manual import pages

    with zipfile.ZipFile(wheel) as archive:
        found = {
            name.rpartition("/")[2]: archive.read(name).decode()
            for name in archive.namelist()
            if "/share/man/man1/" in name
        }
    assert found == pages()
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert (target / "share/man/man1/cowfs-mount.1").exists()
    if shutil.which("man"):
        env = {**os.environ, "MANPATH": str(target / "share/man"), "LC_ALL": "C.UTF-8", "MANPAGER": "cat"}
        done = subprocess.run(["man", "1", "cowfs-mount"], env=env, capture_output=True, text=True, check=False)
        assert "cowfs-mount - mount a stack" in done.stdout or "minimized" in done.stdout


def test_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """Installed apart from the tree: both commands start, the drivers are found, the package is typed."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    code = """
import importlib.metadata as m, importlib.resources as r, cowfs
print(cowfs.__file__)
print(sorted(e.name for e in m.entry_points(group="cowfs.drivers") if e.load()))
print((r.files("cowfs") / "py.typed").is_file())
"""
    environ = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    where, drivers, typed = done.stdout.splitlines()
    assert Path(where).is_relative_to(target)
    scripts = project()["project"]["entry-points"]["cowfs.drivers"]  # type: ignore[index]
    assert drivers == str(sorted(scripts))
    assert typed == "True"
    for program in ("cowfs", "cowfs-overlayfs"):
        done = subprocess.run(
            [target / "bin" / program, "--version"],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith(program)


def test_licence_and_version_are_in_the_wheel(wheel: Path) -> None:
    import cowfs

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert f"\nVersion: {cowfs.__version__}\n" in metadata
    assert any(name.endswith("LICENSE") for name in names)
    for dependency in ("fusepy", "xattr"):
        assert f"\nRequires-Dist: {dependency}" in metadata


def test_every_module_can_be_imported() -> None:
    """No module has a mistake that only its import shows, in any order; nothing prints."""
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in tree_files()
        if name.startswith("cowfs/") and name.endswith(".py") and not name.endswith("__main__.py")
    )
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tests_do_not_reach_outside_the_tree() -> None:
    """Neither code nor tests name the shared folder of the machine that they were written on."""
    place = "work" + "/shared"
    for directory in ("cowfs", "drivers", "tests", "benchmarks"):
        for path in (ROOT / directory).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert place not in text, path
            assert ".." + "/shared" not in text, path


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the source archive of what git tracks, below its top folder."""
    base = tmp_path_factory.mktemp("sdist")
    copy = base / "source"
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout: what belongs to the source is not known")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(base), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and "No matching distribution" in done.stderr + done.stdout:
        pytest.skip("cannot build here: no package index")
    assert done.returncode == 0, done.stderr
    (built,) = base.glob("cowfs_storage-*.tar.gz")
    with tarfile.open(built) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_the_source_archive_can_be_tested_and_documented(source_archive: set[str]) -> None:
    """It holds docs, tests with their data, both commands of the README, and what they need."""
    for name in ("test", "demo", ".ci/prepare", ".ci/run", "docs/README.md", "tests/conftest.py", "CONTRIBUTING.md"):
        assert name in source_archive
    for folder in ("docs", "tests", "benchmarks", ".ci"):
        there = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        left_out = {name for name in there - source_archive if "__pycache__" not in name}
        tracked = subprocess.run(["git", "-C", ROOT, "ls-files", folder], capture_output=True, text=True).stdout
        assert left_out & set(tracked.splitlines()) == set()


def test_links_of_the_readme_can_be_made_absolute() -> None:
    """For the index page: no link of the result is relative."""
    command = [sys.executable, str(ROOT / ".ci" / "index-readme"), "https://example.org/x"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    assert all(link.startswith(("http", "#")) for link in links)
    assert "(https://example.org/x/docs/mounts.md)" in text
