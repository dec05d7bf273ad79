"""Containers by the real docker command: each verb, by what can be seen of it afterwards."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from support.daemon import Daemon, docker_environment, wait_for


def state(engine: Daemon, name: str) -> str:
    return engine.out("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name)


@pytest.mark.parametrize("version", ["1.40", "1.50"])
def test_run_gives_output_and_status(engine: Daemon, version: str) -> None:
    done = engine.docker(
        "run",
        "--name",
        "one",
        "bb",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 3",
        check=False,
        DOCKER_API_VERSION=version,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert state(engine, "one") == "exited 3"
    again = engine.docker("logs", "one", DOCKER_API_VERSION=version)
    assert (again.stdout, again.stderr) == ("out\n", "err\n")


def test_rm_leaves_nothing(engine: Daemon) -> None:
    assert engine.out("run", "--rm", "bb", "cat", "/data/file") == "of the image"
    assert engine.out("ps", "-aq") == ""
    assert os.listdir(engine.root / "service" / "containers") == []
    wait_for(lambda: not os.listdir(engine.run_dir / "containers"), "the supervisor to be gone")
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(engine.run_dir) not in mounts
    keys = engine.request("GET", "/info")[1]["DriverStatus"]
    assert dict(keys)["Snapshots"] == "2"  # the image, and what all its containers have


def test_input_goes_in_and_ends(engine: Daemon) -> None:
    data = b"".join(b"line %d\n" % number for number in range(50_000))
    done = subprocess.run(
        ["docker", "run", "-i", "--rm", "bb", "cat"],
        input=data, capture_output=True, timeout=120, check=True, env=docker_environment(f"unix://{engine.socket}", engine.base),
    )  # fmt: skip
    assert done.stdout == data


def test_a_slow_reader_loses_nothing(engine: Daemon) -> None:
    process = subprocess.Popen(
        ["docker", "run", "--rm", "bb", "sh", "-c", "seq 1 400000"],
        stdout=subprocess.PIPE, env=docker_environment(f"unix://{engine.socket}", engine.base),
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as out:
        time.sleep(1)
        text = out.read()
    assert process.wait(60) == 0
    assert text.split() == [b"%d" % number for number in range(1, 400_001)]


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [(["nonexistent"], 127, "not found"), (["/data/file"], 126, "permission denied"), (["/data"], 126, "")],
)
def test_commands_that_cannot_start(engine: Daemon, command: list[str], code: int, told: str) -> None:
    done = engine.docker("run", "--rm", "bb", *command, check=False)
    assert done.returncode == code
    assert told in done.stderr.lower()
    assert engine.out("ps", "-aq") == ""


def test_a_missing_image_is_an_error(engine: Daemon) -> None:
    assert engine.request("POST", "/containers/create", {"Image": "nothing"})[0] == 404


def test_detached_and_its_logs(engine: Daemon) -> None:
    id = engine.out(
        "run", "-d", "--name", "back", "bb", "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.2; done; exit 4"
    )
    assert len(id) == 64
    assert engine.out("logs", "-f", "back").split() == ["1", "2", "3"]
    assert engine.out("wait", "back") == "4"
    assert engine.out("logs", "--tail", "2", "back").split() == ["2", "3"]
    stamped = engine.out("logs", "-t", "back").splitlines()
    assert all(line[:4].isdigit() and line.endswith(str(at + 1)) for at, line in enumerate(stamped))
    assert engine.out("logs", "--since", stamped[1].split()[0], "back").split() == ["2", "3"]


def test_create_start_attach(engine: Daemon) -> None:
    engine.docker("create", "-i", "--name", "made", "bb", "sh", "-c", "read x; echo got $x")
    assert state(engine, "made") == "created 0"
    assert engine.docker("start", "-ai", "made", input=b"word\n").stdout == "got word\n"
    assert state(engine, "made") == "exited 0"
    assert engine.docker("start", "-ai", "made", input=b"again\n").stdout == "got again\n"  # and once more


def test_attach_to_a_running_one(engine: Daemon) -> None:
    engine.docker("run", "-di", "--name", "held", "bb", "sh", "-c", "read x; echo got $x >&2; exit 7")
    done = engine.docker("attach", "held", input=b"it\n", check=False)
    assert (done.returncode, done.stderr) == (7, "got it\n")


def test_exec(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "host", "bb", "sleep", "1000")
    assert engine.out("exec", "-e", "A=b", "-w", "/tmp", "host", "sh", "-c", "echo $A $PWD $FROM") == "b /tmp image"
    assert engine.out("exec", "-u", "app", "host", "id") == "uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)"
    assert engine.docker("exec", "-i", "host", "cat", input=b"in\n").stdout == "in\n"
    assert engine.docker("exec", "host", "sh", "-c", "exit 5", check=False).returncode == 5
    missing = engine.docker("exec", "host", "nope", check=False)
    assert missing.returncode == 127
    engine.docker("exec", "-d", "host", "touch", "/root/done")
    wait_for(lambda: engine.docker("exec", "host", "test", "-e", "/root/done", check=False).returncode == 0, "the file")
    unknown = engine.docker("exec", "-u", "nobody9", "host", "id", check=False)
    assert (unknown.returncode, "no matching entries" in unknown.stderr) == (126, True)
    engine.docker("kill", "host")
    assert "is not running" in engine.docker("exec", "host", "true", check=False).stderr


def terminal(engine: Daemon, *words: str, keys: bytes) -> bytes:
    """Run the docker command at a terminal of 40 rows and 100 columns, type keys, and give what it showed."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        ["docker", *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=docker_environment(f"unix://{engine.socket}", engine.base),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        wait_for(lambda: select.select([ours], [], [], 0.1)[0], "a prompt")
        time.sleep(0.5)
        os.write(ours, keys)
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:
                break
            if not data:
                break
            shown += data
    finally:
        if process.poll() is None:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        os.close(ours)
    return shown


SIZE = b"until stty size 2>/dev/null; do sleep 0.1; done; "
"""A client of before API 1.42 tells the size after the start."""


def test_a_terminal(engine: Daemon) -> None:
    shown = terminal(engine, "run", "--rm", "-it", "bb", "sh", keys=b"tty; " + SIZE + b"echo a$((1+1))b\nexit 3\n")
    assert b"/dev/pts/0" in shown or b"/dev/console" in shown
    assert b"40 100" in shown
    assert b"a2b" in shown


def test_a_terminal_of_exec_and_detaching(engine: Daemon) -> None:
    engine.docker("run", "-dit", "--name", "tt", "bb", "sh")
    shown = terminal(engine, "exec", "-it", "tt", "sh", keys=SIZE + b"exit\n")
    assert b"40 100" in shown
    terminal(engine, "attach", "tt", keys=b"\x10\x11")
    assert state(engine, "tt") == "running 0"


def test_a_size_that_comes_before_the_start(engine: Daemon) -> None:
    """By another connection, as clients of before API 1.42 send it."""
    engine.docker("run", "-d", "--name", "early", "bb", "sleep", "1000")
    status, made = engine.request(
        "POST", "/containers/early/exec", {"Cmd": ["stty", "size"], "Tty": True, "AttachStdout": True}
    )
    assert status == 201
    assert engine.request("POST", f"/exec/{made['Id']}/resize?h=40&w=100")[0] == 200
    _, shown = engine.request("POST", f"/exec/{made['Id']}/start", {"Tty": True})
    assert "40 100" in str(shown)
    engine.docker("rm", "-f", "early")


def test_what_a_container_is_given(engine: Daemon, space: Path) -> None:
    (space / "shared").mkdir()
    (space / "shared" / "file").write_text("of the host")
    told = engine.out(
        "run", "--rm", "--read-only", "--user", "1000:2000", "--env", "A=b", "-w", "/tmp", "--hostname", "me", "--tmpfs", "/scratch",
        "-v", f"{space}/shared:/in:ro", "-v", f"{space}/made:/out", "--memory", "64m", "--cpus", "0.5", "--pids-limit", "50",
        "--network", "none", "bb", "sh", "-c",
        "touch /x; cat /in/file; touch /in/no; echo; echo $A $FROM; pwd; id -u; id -g; hostname; echo y > /scratch/f; ls /sys/class/net",
        check=False,
    ).splitlines()  # fmt: skip
    assert told[:7] == ["of the host", "b image", "/tmp", "1000", "2000", "me", "lo"]
    assert (space / "made").is_dir()


def test_network_host_is_the_hosts(engine: Daemon) -> None:
    inside = engine.out("run", "--rm", "--network", "host", "bb", "readlink", "/proc/self/ns/net")
    assert inside == os.readlink("/proc/self/ns/net")
    assert engine.out("run", "--rm", "--network", "host", "bb", "hostname") == os.uname().nodename


def test_what_is_not_offered_is_refused_at_creation(engine: Daemon) -> None:
    for words, what in (
        (["-p", "80:80"], "published ports"),
        (["--network", "mine"], "networks"), (["--volume-driver", "far", "-v", "v:/v"], "volume drivers"), (["--log-driver", "syslog"], "log driver"),
    ):  # fmt: skip
        done = engine.docker("run", *words, "bb", "true", check=False)
        assert (done.returncode, what in done.stderr) == (125, True), (words, done.stderr)
    assert engine.out("ps", "-aq") == ""


def test_the_size_limit_holds_and_changes_live(engine: Daemon) -> None:
    """The seed's ``--storage-opt size=``: ENOSPC at the limit, df shows it, and it can be raised while the container runs."""
    engine.docker(
        "run", "-d", "--name", "small", "--storage-opt", "size=1M", "--storage-opt", "inodes=100", "bb", "sleep", "1000"
    )
    full = engine.docker("exec", "small", "dd", "if=/dev/zero", "of=/big", "bs=4k", "count=1000", check=False)
    assert "No space left on device" in full.stderr
    assert "1024" in engine.out("exec", "small", "df", "-k", "/")
    many = engine.docker("exec", "small", "sh", "-c", "for i in $(seq 1 200); do : > /f$i || exit 9; done", check=False)
    assert many.returncode != 0
    engine.docker("exec", "small", "rm", "/big")  # deleting always works
    size = engine.json("inspect", "-s", "small")[0]
    assert size["SizeRw"] < 1 << 20
    assert size["HostConfig"]["StorageOpt"] == {"size": "1M", "inodes": "100"}


def test_a_default_limit(make_daemon: object, busybox: bytes, docker_command: str) -> None:
    daemon = make_daemon("--storage-opt", "size=2M").start()  # type: ignore[operator]
    daemon.docker("import", "-", "bb", input=busybox)
    assert "2048" in daemon.out("run", "--rm", "bb", "df", "-k", "/")
    assert "4096" in daemon.out("run", "--rm", "--storage-opt", "size=4M", "bb", "df", "-k", "/")


def test_stop_kill_and_signals(engine: Daemon) -> None:
    script = "trap 'echo term; exit 9' TERM; trap 'echo hup' HUP; echo ready; while :; do sleep 0.05; done"
    engine.docker("run", "-d", "--name", "kind", "bb", "sh", "-c", script)
    wait_for(lambda: "ready" in engine.out("logs", "kind"), "the traps")
    engine.docker("kill", "-s", "HUP", "kind")
    wait_for(lambda: "hup" in engine.out("logs", "kind"), "the signal")
    engine.docker("stop", "kind")
    assert state(engine, "kind") == "exited 9"
    engine.docker("run", "-d", "--name", "deaf", "bb", "sh", "-c", "trap '' TERM; while :; do sleep 0.05; done")
    began = time.monotonic()
    engine.docker("stop", "-t", "1", "deaf")
    assert time.monotonic() - began >= 1
    assert state(engine, "deaf") == "exited 137"
    assert "is not running" in engine.docker("kill", "deaf", check=False).stderr
    assert "Invalid signal" in engine.docker("kill", "-s", "NOPE", "kind", check=False).stderr
    assert "Invalid signal" in engine.docker("kill", "-s", "9" * 5000, "kind", check=False).stderr


def test_pause_freezes(engine: Daemon) -> None:
    engine.docker(
        "run", "-d", "--name", "cold", "bb", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i > /n; sleep 0.02; done"
    )
    wait_for(lambda: engine.docker("exec", "cold", "test", "-s", "/n", check=False).returncode == 0, "the file")
    engine.docker("pause", "cold")
    assert state(engine, "cold").startswith("paused")
    assert "(Paused)" in engine.out("ps")
    upper = next(engine.root.glob("layers/*/fs/n"))
    before = upper.read_text()
    time.sleep(0.3)
    assert upper.read_text() == before
    engine.docker("unpause", "cold")
    wait_for(lambda: upper.read_text() not in ("", before), "it to go on")
    engine.docker("rm", "-f", "cold")


def test_names_ps_and_rm(engine: Daemon) -> None:
    engine.docker("create", "--name", "aa", "-l", "k=v", "bb")
    engine.docker("run", "-d", "--name", "cc", "bb", "sleep", "1000")
    assert "already in use" in engine.docker("create", "--name", "aa", "bb", check=False).stderr
    engine.docker("rename", "aa", "zz")
    names = ["ps", "-a", "--format", "{{.Names}}"]
    assert engine.out(*names).split() == ["cc", "zz"]
    assert engine.out("ps", "--format", "{{.Names}}") == "cc"
    for text, found in (("label=k=v", "zz"), ("status=running", "cc"), ("name=z", "zz"), ("ancestor=bb", "cc\nzz"), ("status=exited", "")):  # fmt: skip
        assert engine.out(*names, "--filter", text) == found, text
    assert "stop the container" in engine.docker("rm", "cc", check=False).stderr
    row = json.loads(engine.out("ps", "-as", "--filter", "name=cc", "--format", "{{json .}}"))
    assert row["Image"] == "bb" and row["State"] == "running" and "virtual" in row["Size"]
    engine.docker("rm", "-f", "cc")
    assert "Deleted" in engine.out("container", "prune", "-f")
    assert engine.out("ps", "-aq") == ""
    assert "No such container" in engine.docker("rm", "cc", check=False).stderr


def test_images_that_are_used_stay(engine: Daemon) -> None:
    engine.docker("create", "--name", "user", "bb")
    assert "must force" in engine.docker("rmi", "bb", check=False).stderr
    rows = {
        row["Type"]: row for row in map(json.loads, engine.out("system", "df", "--format", "{{json .}}").splitlines())
    }
    assert (rows["Images"]["Active"], rows["Containers"]["TotalCount"]) == ("1", "1")
    engine.docker("rmi", "-f", "bb")
    assert (
        engine.out("run", "--rm", "-i", engine.out("images", "-q", "--filter", "dangling=true"), "echo", "still here")
        == "still here"
    )
    engine.docker("rm", "user")
    assert "Deleted" in engine.out("image", "prune", "-f") or True
    assert engine.out("images", "-aq") == ""


def test_diff_top_and_stats(engine: Daemon) -> None:
    engine.docker(
        "run",
        "-d",
        "--name",
        "busy",
        "bb",
        "sh",
        "-c",
        "echo x > /root/new; rm /data/file; chmod 700 /tmp; exec sleep 1000",
    )
    wait_for(lambda: "/root/new" in engine.out("diff", "busy"), "the file")
    assert set(engine.out("diff", "busy").splitlines()) == {
        "C /root",
        "A /root/new",
        "C /data",
        "D /data/file",
        "C /tmp",
    }
    assert "sleep 1000" in engine.out("top", "busy")
    assert "sleep" in engine.out("top", "busy", "-o", "pid,comm")
    (row,) = [json.loads(line) for line in engine.out("stats", "--no-stream", "--format", "{{json .}}").splitlines()]
    assert row["Name"] == "busy"
    assert row["PIDs"] == "1"
    assert not row["MemUsage"].startswith("0B")
    told = engine.request("GET", "/containers/busy/stats?stream=false&one-shot=true")[1]
    assert told["cowfs"]["bytes"] > 0
    assert told["cowfs"]["requests"]
    assert told["cpu_stats"]["cpu_usage"]["total_usage"] > 0


def test_cp_both_ways(engine: Daemon, space: Path) -> None:
    """Files and directories, into a running container and out of a stopped one; links lead nowhere else."""
    engine.docker("run", "-d", "--name", "box", "bb", "sleep", "1000")
    (space / "in").mkdir()
    (space / "in" / "file").write_bytes(b"\x00\xff" * 100_000)
    (space / "in" / "link").symlink_to("file")
    os.chmod(space / "in" / "file", 0o751)
    engine.docker("cp", str(space / "in"), "box:/data/")
    assert engine.out("exec", "box", "stat", "-c", "%a %s", "/data/in/file") == "751 200000"
    assert engine.out("exec", "box", "readlink", "/data/in/link") == "file"
    engine.docker("exec", "box", "ln", "-s", "/etc", "/out")
    engine.docker("cp", str(space / "in" / "file"), "box:/out/copied")
    assert engine.docker("exec", "box", "test", "-f", "/etc/copied").returncode == 0
    assert not os.path.exists("/etc/copied")
    engine.docker("kill", "box")
    engine.docker("cp", "box:/data/in", str(space / "back"))
    assert (space / "back" / "file").read_bytes() == (space / "in" / "file").read_bytes()
    assert engine.docker("cp", "box:/nothing", str(space), check=False).returncode == 1
    engine.docker("cp", "box:/data/in/file", str(space / "one"))
    assert (space / "one").stat().st_size == 200_000


@pytest.mark.parametrize("name", ["../../etc/evil", "/../etc/evil", "a/../../evil", "out/evil"])
def test_a_tar_that_leads_out_is_refused(engine: Daemon, name: str) -> None:
    """Absolute names, parents, and a link in the container to the host's own directory."""
    engine.docker("create", "--name", "box", "bb")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo("out")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    done = engine.docker("cp", "-", "box:/tmp", input=out.getvalue(), check=False)
    assert done.returncode == 1
    assert not os.path.exists("/etc/evil")
    assert "Traceback" not in done.stderr


def test_commit_export_and_run_again(engine: Daemon, space: Path) -> None:
    engine.docker(
        "run", "--name", "work", "bb", "sh", "-c", "echo new > /data/new; rm /data/file; mkdir -p /a/b; ln -s x /a/l"
    )
    id = engine.out("commit", "-m", "why", "-a", "me", "-c", 'CMD ["cat", "/data/new"]', "work", "made:1")
    assert engine.out("run", "--rm", "made:1") == "new"
    assert engine.docker("run", "--rm", "made:1", "test", "-e", "/data/file", check=False).returncode == 1
    (told,) = engine.json("image", "inspect", "made:1")
    assert (told["Id"], told["Comment"], told["Author"], len(told["RootFS"]["Layers"])) == (id, "why", "me", 2)
    assert engine.out("history", "-q", "--no-trunc", "made:1").split()[0] == id
    engine.docker("save", "-o", str(space / "made.tar"), "made:1")
    with tarfile.open(space / "made.tar") as tar:
        (entry,) = json.load(tar.extractfile("manifest.json"))  # type: ignore[arg-type]
        layer = tar.extractfile(entry["Layers"][-1])
        with tarfile.open(fileobj=layer) as inner:
            names = set(inner.getnames())
    assert names - {"."} == {"data", "data/new", "data/.wh.file", "a", "a/b", "a/l"}  # nothing of the mount points
    engine.docker("export", "-o", str(space / "tree.tar"), "work")
    with tarfile.open(space / "tree.tar") as tar:
        assert {"data/new", "bin/busybox"} <= set(tar.getnames())
        assert "data/file" not in tar.getnames()


def test_commit_of_a_running_one_has_what_was_written(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "live", "bb", "sh", "-c", "echo before > /data/new; exec sleep 1000")
    wait_for(lambda: engine.docker("exec", "live", "test", "-s", "/data/new", check=False).returncode == 0, "the file")
    engine.docker("commit", "live", "snap:1")
    assert engine.out("run", "--rm", "snap:1", "cat", "/data/new") == "before"
    assert state(engine, "live").startswith("running")


def test_update_changes_the_control_groups(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "grow", "--memory", "64m", "bb", "sleep", "1000")
    engine.docker("update", "--memory", "128m", "--memory-swap", "-1", "--pids-limit", "77", "grow")
    told = engine.request("GET", "/containers/grow/stats?stream=false&one-shot=true")[1]
    assert told["memory_stats"]["limit"] == 128 << 20
    assert told["pids_stats"]["limit"] == 77


def test_a_container_that_eats_its_memory_is_told(engine: Daemon) -> None:
    engine.docker(
        "run",
        "--name",
        "fat",
        "--memory",
        "8m",
        "bb",
        "sh",
        "-c",
        "x=$(yes | head -c 100000000); echo $x | wc -c",
        check=False,
    )
    (told,) = engine.json("inspect", "fat")
    assert told["State"]["ExitCode"] != 0
    assert told["State"]["OOMKilled"] or told["State"]["ExitCode"] == 137


def test_events_of_a_container(engine: Daemon) -> None:
    before = time.time()
    engine.docker("run", "--rm", "--name", "told", "-l", "k=v", "bb", "false", check=False)
    wait_for(lambda: engine.out("ps", "-aq") == "", "the removal")
    lines = engine.out(
        "events", "--since", f"{before:.6f}", "--until", f"{time.time():.6f}", "--filter", "type=container", "--filter", "label=k=v",
        "--format", "{{.Action}} {{.Actor.Attributes.name}} {{.Actor.Attributes.exitCode}}",
    ).splitlines()  # fmt: skip
    assert [line.split()[0] for line in lines] == ["create", "attach", "start", "die", "destroy"]
    assert lines[3] == "die told 1"


def test_docker_py(engine: Daemon) -> None:
    docker = pytest.importorskip("docker")
    client = docker.DockerClient(base_url=f"unix://{engine.socket}")
    try:
        assert client.containers.run("bb", ["echo", "hello"], remove=True) == b"hello\n"
        container = client.containers.run("bb", ["sleep", "1000"], detach=True, name="py", mem_limit="64m")
        assert container.exec_run(["id", "-u"]).output == b"0\n"
        assert container.stats(stream=False)["pids_stats"]["current"] == 1
        assert container.put_archive("/data", _tar("in", b"text"))
        stream, told = container.get_archive("/data/in")
        assert told["size"] == 4
        assert b"text" in b"".join(stream)
        assert {"Path": "/data/in", "Kind": 1} in container.diff()
        container.pause()
        container.unpause()
        container.stop(timeout=0)
        assert container.wait()["StatusCode"] == 137
        container.remove()
        assert client.containers.list(all=True) == []
    finally:
        client.close()


def _tar(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_a_killed_supervisor_ends_its_container_and_no_other(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "lost", "bb", "sleep", "1000")
    engine.docker("run", "-d", "--name", "kept", "bb", "sleep", "1000")
    record = json.loads(
        (
            engine.root / "service" / "containers" / engine.out("inspect", "-f", "{{.Id}}", "lost") / "run.json"
        ).read_text()
    )
    os.kill(record["supervisor"], signal.SIGKILL)
    wait_for(lambda: state(engine, "lost") == "exited 255", "the end")
    assert state(engine, "kept") == "running 0"
    engine.docker("start", "lost")
    assert state(engine, "lost") == "running 0"


def test_a_container_that_somebody_waits_for_can_be_removed(engine: Daemon) -> None:
    """An attached client of a container that was never started does not hold its removal up."""
    engine.docker("create", "-i", "--name", "wait", "bb", "cat")
    with engine.raw() as sock:
        sock.sendall(
            b"POST /containers/wait/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        )
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        engine.docker("rm", "wait")
        assert time.monotonic() - began < 30
        assert sock.recv(4096) == b""
    assert os.listdir(engine.run_dir / "containers") == []


def test_a_hundred_short_ones_eight_at_once(engine: Daemon) -> None:
    """Each has its own output and status, however short it was; nothing is left."""
    from concurrent.futures import ThreadPoolExecutor

    def run(number: int) -> tuple[int, str]:
        done = engine.docker("run", "--rm", "bb", "sh", "-c", f"echo {number}; exit {number % 3}", check=False)
        return done.returncode, done.stdout

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(100))) == [(number % 3, f"{number}\n") for number in range(100)]
    assert engine.out("ps", "-aq") == ""
    wait_for(lambda: not os.listdir(engine.run_dir / "containers"), "all supervisors to end")
    assert os.listdir(engine.root / "service" / "containers") == []


def test_a_start_of_what_runs_already_changes_nothing(shared: Daemon) -> None:
    """At once (it waited a minute for the end of the run, and kept a stop and a removal waiting); a paused one runs, too."""
    shared.docker("run", "-d", "--name", "already", "bb", "sleep", "100000")
    before = shared.json("inspect", "already")[0]
    for verb in ("pause", "unpause"):
        assert shared.request("POST", "/containers/already/start") == (304, b"")
        assert shared.out("start", "already") == "already"
        shared.docker(verb, "already")
    assert shared.json("inspect", "already")[0]["State"] == before["State"]
    shared.docker("rm", "-f", "already")
