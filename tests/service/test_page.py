"""The page at /ui/, as a real browser shows it, and what it is protected from."""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.browser import Browser
from support.daemon import Daemon, busybox_tar, clean_up, wait_for

EVIL = "<img src=x onerror=\"document.documentElement.dataset.owned='yes'\"><script>document.documentElement.dataset.owned='yes'</script>"
LOOP = "while :; do head -c 100000 /dev/zero >> /f; sleep 0.2; done"


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that anybody here may reach, with containers, among them one with hostile names."""
    pytest.importorskip("h11", reason="the extra cowfs[daemon] is not installed")
    for name in ("docker", "runc"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} here")
    made = Daemon(tmp_path_factory.mktemp("p") / "d", "-D", "-H", "tcp://127.0.0.1:0", "--ui-actions").start()
    try:
        made.docker("import", "-c", 'CMD ["sh"]', "-", "bb", input=busybox_tar())
        made.docker("run", "--name", "mk", "bb", "sh", "-c", "head -c 300000 /dev/zero > /x")
        made.docker("commit", "-m", EVIL, "mk", "app:1")
        made.docker("rm", "mk")
        made.docker("run", "-d", "--name", "web", "--storage-opt", "size=64M", "bb", "sh", "-c", LOOP)
        document = {"Image": "bb", "Labels": {EVIL: EVIL, "__proto__": "x"}, "Env": [EVIL], "Cmd": ["sh", "-c", EVIL]}
        assert made.request("POST", "/containers/create?name=evil", document)[0] == 201
        key = f"{EVIL}</script>'\"`${{1}}"
        made.cowfs("prepare", key)
        yield made
    finally:
        clean_up(made)
        assert "Traceback" not in made.log, made.log


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("b") / "profile")
    yield made
    made.close()


@pytest.fixture
def page(looked_at: Daemon, browser: Browser) -> Browser:
    browser.events.clear()
    browser.size(1280, 900)
    browser.go(f"http://{looked_at.tcp()}/ui/")
    browser.until("document.documentElement?.dataset.ready")
    return browser


def ask(daemon: Daemon, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One request at the TCP door: (status, headers, body)."""
    connection = http.client.HTTPConnection(daemon.tcp(), timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=names)
    answer = connection.getresponse()
    told = {name.lower(): value for name, value in answer.getheaders()}
    body = answer.read()
    connection.close()
    return answer.status, told, body


# -- what it shows ------------------------------------------------------------------------------------------------


def test_it_shows_host_drivers_containers_images_snapshots_and_events(page: Browser, looked_at: Daemon) -> None:
    text = page.js("document.body.innerText")
    assert str(looked_at.root) in text
    assert "overlay" in page.js("document.getElementById('drivers').innerText")
    row = "[...document.querySelectorAll('#containers-rows tr')].find(row => row.innerText.includes('web')).innerText"
    page.until(f"/MiB of 64 MiB/.test({row})")
    images = page.js("document.getElementById('images').textContent")
    assert "app:1" in images and "shared by 2 images" in images and "this image alone" in images
    page.until("document.querySelectorAll('#events-list li').length > 3")
    looked_at.docker("tag", "bb", "seen:1")
    page.until("document.getElementById('events-list').innerText.includes('seen:1')")
    page.until("document.getElementById('images').innerText.includes('seen:1')")


def test_use_against_the_limit_over_time(page: Browser) -> None:
    """A line that rises, its bound, and the same in words."""
    page.js("[...document.querySelectorAll('.name button')].find(each => each.textContent == 'web').click()")
    points = (
        "(document.querySelector('.chart .line').getAttribute('points') || '').split(' ').map(p => +p.split(',')[1])"
    )
    page.until(f"{points}.length > 2 && {points}.at(-1) < {points}[0]")  # up is less
    assert page.js("document.querySelector('.chart .bound').getAttribute('visibility')") == "visible"
    assert "the limit, 64 MiB" in page.js("document.querySelector('figcaption').textContent")


def test_what_was_copied_up_is_counted(page: Browser, looked_at: Daemon) -> None:
    looked_at.docker("exec", "web", "sh", "-c", "echo more >> /data/file")
    page.until("/Copied up \\(COW\\)[^0-9]*[1-9][0-9]* file/.test(document.getElementById('cow-row').textContent)")


def test_the_tree_opens_by_keyboard(page: Browser) -> None:
    page.js("document.querySelector('#tree summary').focus()")
    page.press("Enter", number=13, text="\r")
    page.until("document.querySelectorAll('#tree ul li').length > 0")
    for _ in range(3):
        page.js("for (const each of document.querySelectorAll('#tree details')) each.open = true")
        page.until(
            "[...document.querySelectorAll('#tree details')].every(each => each.querySelector('ul').children.length)"
        )
    assert "of web" in page.js("document.getElementById('tree').innerText")


def test_a_screen_reader_finds_its_way(page: Browser) -> None:
    """Landmarks, headings in order, a table with headers, names for every control, and every control reached by Tab."""
    nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
    told = [
        (each["role"]["value"], each.get("name", {}).get("value", ""))
        for each in nodes
        if not each.get("ignored") and "role" in each
    ]
    roles = [role for role, _ in told]
    for wanted in ("banner", "navigation", "main", "table", "log", "status", "columnheader"):
        assert wanted in roles, wanted
    nameless = [
        each for each in told if each[0] in ("button", "combobox", "searchbox", "link", "table", "log") and not each[1]
    ]
    assert nameless == []
    levels = page.js(
        "[...document.querySelectorAll('main h1, header h1, main h2, main h3')].map(each => +each.tagName[1])"
    )
    assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))
    page.js("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        page.press("Tab", number=9)
        reached.add(page.js("document.activeElement.id || document.activeElement.textContent"))
    assert {"find", "show", "order", "web", "evil", "Containers"} <= reached


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(page: Browser, dark: bool) -> None:
    """Text stands out from its ground by at least 4.5 to 1 (WCAG 2.1, 1.4.3), in both colour schemes."""
    page.size(1280, 900, dark=dark)
    found = page.js(
        """(() => {
          const part = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
          const light = (c) => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number); return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b); };
          const ground = (n) => { for (; n; n = n.parentElement) { const c = getComputedStyle(n).backgroundColor; if (!/, 0\\)$/.test(c) && c !== 'transparent') return c; } return 'rgb(255,255,255)'; };
          const worst = [];
          for (const n of document.querySelectorAll('body *')) {
            if (![...n.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim()) || !n.checkVisibility() || n.tagName === 'OPTION') continue;
            const [a, b] = [light(getComputedStyle(n).color), light(ground(n))].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5) worst.push([n.tagName, n.className, n.textContent.slice(0, 30), (a + 0.05) / (b + 0.05)]);
          }
          return worst; })()"""
    )
    assert found == []


def test_a_narrow_screen_needs_no_scrolling_sideways(page: Browser) -> None:
    for width in (320, 390, 640, 800, 960, 1000, 1280):
        page.size(width, 800)
        assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width


def test_nothing_is_asked_elsewhere_and_nothing_goes_wrong(page: Browser, looked_at: Daemon) -> None:
    page.js("new Promise(done => setTimeout(done, 2500))")
    assert all(each.startswith(f"http://{looked_at.tcp()}/") for each in page.requested())
    assert page.complaints() == []


# -- what it withstands -------------------------------------------------------------------------------------------


def test_names_are_never_markup(page: Browser) -> None:
    """Labels, commands, comments, keys and variables that are markup are shown as they are, and do nothing."""
    page.js("[...document.querySelectorAll('.name button')].find(each => each.textContent == 'evil').click()")
    page.js("for (const each of document.querySelectorAll('details')) each.open = true")
    page.until("document.getElementById('tree').textContent.includes('onerror')")
    page.until("document.querySelector('.more').textContent.includes('onerror')")
    page.until("document.getElementById('events-list').textContent.includes('onerror')")
    assert page.js("document.querySelectorAll('img, iframe, main script').length") == 0
    assert page.js("document.documentElement.dataset.owned") is None
    assert page.complaints() == []


def test_the_policy_stops_markup_that_got_in(page: Browser) -> None:
    """Even a line of ours that wrote markup would fail: the browser refuses inline code and strings as markup."""
    assert "TypeError" in page.js(
        "(() => { try { document.body.innerHTML = '<p>x'; } catch (error) { return error.name; } })()"
    )
    page.js(
        """(() => { const one = document.createElement('div');
            try { one.setAttribute('onclick', "document.documentElement.dataset.owned='yes'"); } catch { return; }
            document.body.append(one); one.click(); one.remove(); })()"""
    )
    assert page.js("document.documentElement.dataset.owned") is None
    refused = page.js("fetch('https://example.org/').then(() => 'sent', error => error.name)")
    assert refused == "TypeError"


def test_headers(looked_at: Daemon) -> None:
    for path in ("/ui/", "/ui/page.js", "/ui/page.css", "/ui/icon.svg"):
        status, headers, body = ask(looked_at, "GET", path)
        assert status == 200 and body
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"] and "*" not in headers["content-security-policy"]
    for path in ("/ui/", "/info", "/metrics", "/nothing"):
        _, headers, _ = ask(looked_at, "GET", path)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not any(name.startswith("access-control-") for name in headers)
    assert ask(looked_at, "GET", "/")[1]["location"] == "/ui/"
    for name in ("../api/page.py", "%2e%2e/daemon.py", "nothing", "page.js/x", ""):
        assert ask(looked_at, "GET", f"/ui/{name}x")[0] == 404


@pytest.mark.parametrize("path", ["/ui/", "/ui/data/overview", "/info", "/metrics", "/containers/json"])
def test_a_name_that_was_rebound_is_refused(looked_at: Daemon, path: str) -> None:
    """DNS rebinding: over plain HTTP a browser sends neither Origin nor Sec-Fetch with a GET to "its own" server."""
    port = looked_at.tcp().rpartition(":")[2]
    assert ask(looked_at, "GET", path, Host=f"evil.example:{port}")[0] == 403
    assert ask(looked_at, "GET", path, Host="localhost.evil.example")[0] == 403
    assert ask(looked_at, "GET", path, Host=f"evil.example:{port}", Origin=f"http://evil.example:{port}")[0] == 403
    for own in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert ask(looked_at, "GET", path, Host=own)[0] == 200


def test_a_page_elsewhere_cannot_act(looked_at: Daemon, browser: Browser, tmp_path: Path) -> None:
    """A real page of another origin: forms, fetches, images and frames reach nothing; the container goes on."""
    door = looked_at.tcp()
    (tmp_path / "evil.html").write_text(
        f"""<form id=f method=post action="http://{door}/containers/web/stop" enctype="text/plain" target=t></form><iframe name=t></iframe>
        <iframe id=u src="http://{door}/ui/"></iframe>
        <script>
        document.getElementById('f').submit();
        Promise.allSettled([
          fetch('http://{door}/containers/web/kill', {{method: 'POST', mode: 'no-cors'}}),
          fetch('http://{door}/containers/web?force=1', {{method: 'DELETE'}}),
          fetch('http://{door}/containers/json').then(a => a.text()),
        ]).then(all => document.title = JSON.stringify(all.map(each => each.value && String(each.value))));
        </script>"""
    )
    browser.go(f"file://{tmp_path}/evil.html")
    browser.until("document.title.startsWith('[')")
    assert "Names" not in browser.js("document.title")
    wait_for(lambda: looked_at.log.count("-> 403") >= 2, "the refusals")
    assert looked_at.out("inspect", "-f", "{{.State.Status}}", "web") == "running"


def test_a_browser_can_only_look_without_ui_actions(looked_at: Daemon, make_daemon: Callable[..., Daemon]) -> None:
    """Not the buttons alone are missing: whatever a browser sends is refused; other clients do as ever."""
    quiet = make_daemon("-H", "tcp://127.0.0.1:0").start()
    door = quiet.tcp()
    for headers in ({"Origin": f"http://{door}"}, {"Sec_Fetch_Site": "same-origin"}):
        for method, path in (
            ("POST", "/containers/prune"),
            ("DELETE", "/containers/x"),
            ("PUT", "/containers/x/archive"),
        ):
            status, _, body = ask(quiet, method, path, **headers)
            assert status == 403 and b"--ui-actions" in body
        assert ask(quiet, "GET", "/ui/", **headers)[0] == 200
        assert (
            ask(looked_at, "POST", "/containers/prune", **{**headers, "Origin": f"http://{looked_at.tcp()}"})[0] == 200
        )
    assert ask(quiet, "POST", "/containers/prune")[0] == 200
    assert json.loads(ask(quiet, "GET", "/ui/data/overview")[2])["actions"] is False


def test_the_page_can_be_off_and_names_can_be_allowed(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--no-ui", "-H", "tcp://127.0.0.1:0", "--allow-host", "build.example.org").start()
    for path in ("/", "/ui/", "/ui/page.js", "/ui/data/overview", "/ui/data/images", "/ui/data/snapshots"):
        assert ask(daemon, "GET", path)[0] == 404
    assert ask(daemon, "GET", "/info", Host="build.example.org:1")[0] == 200


def test_figures_go_on_while_containers_come_and_go(looked_at: Daemon) -> None:
    """A look while containers are made and removed always gets an answer, and new rounds."""
    stop, wrong = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            for path in (
                "/ui/data/overview",
                "/metrics",
                "/system/df",
                "/ui/data/images",
                "/containers/json?all=1&size=1",
            ):
                status, _, body = ask(looked_at, "GET", path)
                if status != 200:
                    wrong.append((path, status, body))

    other = threading.Thread(target=look)
    other.start()
    try:
        for _ in range(5):
            looked_at.docker("run", "--rm", "--storage-opt", "size=4M", "bb", "sh", "-c", "echo x > /x")
    finally:
        stop.set()
        other.join()
    assert wrong == []
    before = json.loads(ask(looked_at, "GET", "/ui/data/overview")[2])["round"]
    wait_for(lambda: json.loads(ask(looked_at, "GET", "/ui/data/overview")[2])["round"] > before, "another round")


def test_three_hundred_containers(page: Browser, looked_at: Daemon) -> None:
    """All are listed and found; a round touches no row in which nothing changed, and keeps the focus; no width needs scrolling sideways."""
    ids = [
        looked_at.request("POST", f"/containers/create?name=many-{number}", {"Image": "bb", "Cmd": ["true"]})[1]["Id"]
        for number in range(300)
    ]
    try:
        many = "[...document.querySelectorAll('#containers-rows .name button')].filter(each => each.textContent.startsWith('many-'))"
        page.until(f"{many}.length === 300", 240)
        page.js(f"{many}[150].focus()")
        focused = page.js("document.activeElement.textContent")
        rounds = "performance.getEntriesByType('resource').filter(each => each.name.includes('data/overview')).length"
        page.js(
            f"""(() => {{ performance.setResourceTimingBufferSize(100000); window.touched = new Set();
            new MutationObserver(seen => {{ for (const each of seen) {{
              const row = (each.target.closest ? each.target : each.target.parentElement)?.closest('tr');
              if (row) window.touched.add(row.textContent); }} }})
            .observe(document.getElementById('containers-rows'), {{subtree: true, childList: true, characterData: true, attributes: true}});
            window.begin = {rounds}; }})()"""
        )
        page.until(f"{rounds} >= window.begin + 2", 240)
        assert page.js("[...window.touched].filter(each => each.includes('many-')).length") == 0
        assert page.js("document.activeElement.textContent") == focused
        for width in (390, 1280):
            page.size(width, 800)
            assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width
        page.js(
            "document.getElementById('find').value = 'many-29'; document.getElementById('find').dispatchEvent(new Event('input'))"
        )
        page.until(f"{many}.length === 11")
    finally:
        for id in ids:
            looked_at.request("DELETE", f"/containers/{id}")


# -- acting (--ui-actions) ----------------------------------------------------------------------------------------


def test_a_limit_is_set_and_a_container_started_and_removed(page: Browser, looked_at: Daemon) -> None:
    looked_at.docker("create", "--name", "toy", "--storage-opt", "size=8M", "bb", "sleep", "1000")

    def press(name: str) -> None:
        page.until(f"[...document.querySelectorAll('.actions button')].some(each => each.textContent == '{name}')")
        page.js(f"[...document.querySelectorAll('.actions button')].find(each => each.textContent == '{name}').click()")

    page.js(
        "document.getElementById('find').value = 'toy'; document.getElementById('find').dispatchEvent(new Event('input'))"
    )
    page.until("[...document.querySelectorAll('.name button')].some(each => each.textContent == 'toy')")
    page.js("[...document.querySelectorAll('.name button')].find(each => each.textContent == 'toy').click()")
    press("Start")
    wait_for(lambda: looked_at.out("inspect", "-f", "{{.State.Status}}", "toy") == "running", "the start")
    press("Set limit")
    page.until("document.getElementById('ask').open")
    page.js("document.getElementById('ask-value').value = '16M'; document.getElementById('ask-yes').click()")
    wait_for(lambda: "16.0M" in looked_at.out("exec", "toy", "df", "-h", "/"), "the limit")
    press("Remove")
    page.until("document.getElementById('ask').open")
    page.press("Escape", number=27)
    page.until("!document.getElementById('ask').open")
    assert looked_at.out("ps", "-q", "--filter", "name=toy")
    press("Remove")
    page.js("document.getElementById('ask-yes').click()")
    wait_for(lambda: not looked_at.out("ps", "-aq", "--filter", "name=toy"), "the removal")
