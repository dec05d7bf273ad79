// The page of cowfs. Rules:
// 1. Names come from whoever makes images, containers and labels: they become text nodes and attributes, never markup.
// 2. The document is changed in place, so that focus, selection and a screen reader's place stay.
// 3. Nothing is asked for while the page is hidden.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const PERIOD = 2000, ROUNDS = 150, EVENTS = 300;

function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  let value = bytes, unit = 0;
  while (value >= 1024 && unit < 5) { value /= 1024; unit++; }
  return (unit && value < 10 ? value.toFixed(1) : Math.round(value)) + " " + ["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit];
}

const count = (number) => (number === null || number === undefined ? "–" : number.toLocaleString("en"));
const percent = (number) => (number === null || number === undefined ? "–" : number.toFixed(1) + " %");
const plural = (number, word) => count(number) + " " + word + (number === 1 ? "" : "s");

async function read(path) {
  const answer = await fetch(path, { cache: "no-store", credentials: "same-origin" });
  if (!answer.ok) throw new Error("status " + answer.status);
  return answer.json();
}

// -- overview ---------------------------------------------------------------------------------------------------

function pairs(list, entries) {
  const known = new Map([...list.querySelectorAll("dt")].map((term) => [term.textContent, term.nextElementSibling]));
  for (const [name, value] of entries) {
    let place = known.get(name);
    if (!place) {
      place = el("dd");
      list.append(el("dt", {}, name), place);
    }
    put(place, value);
    known.delete(name);
  }
  for (const place of known.values()) { place.previousElementSibling.remove(); place.remove(); }
}

function overview(data) {
  const { host, store } = data;
  put($("host-name"), "on " + host.name);
  document.title = "cowfs on " + host.name;
  pairs($("host"), [
    ["Kernel", host.kernel + " " + host.machine],
    ["Processors", count(host.processors) + ", load " + host.load.join(" ")],
    ["Memory", size(host.memory - host.memory_available) + " of " + size(host.memory) + " in use"],
    ["Disk of the store", size(store.host_free) + " of " + size(store.host_bytes) + " free"],
  ]);
  const kinds = store.snapshots;
  pairs($("store"), [
    ["Place", store.root],
    ["Driver", store.driver + (store.row ? ", redirects blocks of " + size(store.row) : "")],
    ["Layers hold", size(store.committed_bytes) + ", of which " + size(store.reclaimable_bytes) + " could be had back"],
    ["Snapshots", ["committed", "active", "view"].filter((kind) => kinds[kind]).map((kind) => count(kinds[kind]) + " " + kind).join(", ") || "none"],
  ]);
  const drivers = $("drivers");
  if (!drivers.firstChild) {
    for (const driver of data.drivers) {
      drivers.append(el("li", {}, el("b", {}, driver.name),
        (driver.usable ? "can run here" : "cannot run here") + (driver.used ? ", in use" : ""), " ",
        el("small", {}, driver.reasons.join("; "))));
    }
  }
  const sum = (key) => data.containers.reduce((total, each) => total + (each[key] || 0), 0);
  pairs($("cow-row"), [
    ["This store", store.row ? "redirects on write, in blocks of " + size(store.row) : "copies on write"],
    ["Copied up (COW)", plural(sum("copied_files"), "file") + ", " + size(sum("copied_bytes"))],
    ["Redirected (ROW)", plural(sum("redirected_files"), "file") + ", " + plural(sum("redirected_blocks"), "block")],
  ]);
}

// -- containers -------------------------------------------------------------------------------------------------

const rows = new Map();      // id -> row
const history = new Map();   // id -> [[time, bytes], ...]
let containers = [], actions = false, lastRound = 0;

function remember(data) {
  if (data.round < lastRound) { history.clear(); lastRound = 0; }
  for (const round of data.rounds) {
    if (round.round <= lastRound) continue;
    lastRound = round.round;
    for (const [id, bytes] of Object.entries(round.used)) {
      if (!history.has(id)) history.set(id, []);
      const points = history.get(id);
      points.push([round.time, bytes]);
      if (points.length > ROUNDS) points.shift();
    }
  }
}

function path(points, bound, width, height) {
  const first = points[0][0], last = Math.max(points[points.length - 1][0], first + 20);
  const top = Math.max(bound || 0, ...points.map((point) => point[1])) * 1.05 || 1;
  const x = (time) => ((time - first) / (last - first) * width).toFixed(1);
  const y = (bytes) => (height - bytes / top * height).toFixed(1);
  const line = points.map((point) => x(point[0]) + "," + y(point[1])).join(" ");
  return { line, area: x(first) + "," + height + " " + line + " " + x(points[points.length - 1][0]) + "," + height, bound: bound ? y(bound) : null };
}

function graph(className, width, height) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", className);
  svg.setAttribute("viewBox", "0 0 " + width + " " + height);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");   // the text beside it says the same
  const [area, line, bound] = ["polygon", "polyline", "line"].map((kind) => svg.appendChild(document.createElementNS(SVG, kind)));
  area.setAttribute("class", "area"); line.setAttribute("class", "line"); bound.setAttribute("class", "bound");
  bound.setAttribute("x1", 0); bound.setAttribute("x2", width);
  return { svg, draw(points, limit) {
    svg.toggleAttribute("hidden", !points || points.length < 2);
    if (!points || points.length < 2) { line.setAttribute("points", ""); area.setAttribute("points", ""); bound.setAttribute("visibility", "hidden"); return; }
    const made = path(points, limit, width, height);
    line.setAttribute("points", made.line);
    area.setAttribute("points", made.area);
    bound.setAttribute("visibility", made.bound === null ? "hidden" : "visible");
    if (made.bound !== null) { bound.setAttribute("y1", made.bound); bound.setAttribute("y2", made.bound); }
  } };
}

const alive = (each) => Number(each.state === "running" || each.state === "paused");
const share = (each) => (each.limit_bytes && each.bytes !== null && each.bytes !== undefined ? each.bytes / each.limit_bytes : null);

function cell(className, label, ...children) {
  return el("td", { class: className, role: "cell", "data-label": label }, ...children);
}

class Row {
  constructor(id) {
    this.id = id;
    this.toggle = el("button", { type: "button", "aria-expanded": "false", onclick: () => this.expand() });
    this.image = el("small");
    this.state = el("span", { class: "state" });
    this.text = el("span", { class: "text" });
    this.fill = el("i");
    this.bar = el("span", { class: "bar", "aria-hidden": "true" }, this.fill);
    this.spark = graph("spark", 90, 28);
    this.use = el("div", { class: "use" }, this.text, this.bar, this.spark.svg);
    this.cells = [["cpu", "CPU"], ["memory", "Memory"], ["pids", "PIDs"], ["io", "Block I/O"], ["requests", "Requests"]]
      .map(([name, label]) => [name, cell("number", label)]);
    this.node = el("tr", { role: "row" }, cell("name", "Name", this.toggle, this.image), cell("", "State", this.state), cell("wide", "Use", this.use), ...this.cells.map((pair) => pair[1]));
    this.more = null;
  }

  update(each) {
    this.each = each;
    const said = JSON.stringify(each);
    if (said === this.said && !alive(each)) return;  // nothing of it moves: hundreds of such rows cost nothing
    this.said = said;
    this.node.className = alive(each) ? "" : "idle";
    put(this.toggle, each.name);
    put(this.image, each.image);
    put(this.state, each.state);
    this.state.className = "state " + each.state;
    this.state.title = each.status;
    const part = share(each);
    put(this.text, each.bytes === undefined ? (each.state === "running" ? "being counted" : "not running")
      : size(each.bytes) + (each.limit_bytes ? " of " + size(each.limit_bytes) + " (" + Math.round(part * 100) + " %)" : ", no limit"));
    this.bar.hidden = part === null;
    if (part !== null) {
      this.fill.style.width = Math.min(100, part * 100).toFixed(1) + "%";
      this.bar.className = "bar" + (part > 0.95 ? " full" : part > 0.8 ? " near" : "");
    }
    this.spark.draw(history.get(this.id), each.limit_bytes);
    const values = { cpu: percent(each.cpu), memory: each.memory_limit ? size(each.memory) + " / " + size(each.memory_limit) : size(each.memory), pids: count(each.pids),
      io: each.read === undefined ? "–" : size(each.read) + " / " + size(each.written), requests: count(each.requests) };
    for (const [name, place] of this.cells) put(place, values[name]);
    if (this.more) this.fillMore();
  }

  expand() {
    const open = !this.more;
    this.toggle.setAttribute("aria-expanded", String(open));
    if (!open) { this.more.remove(); this.more = null; return; }
    this.chart = graph("chart", 600, 130);
    this.caption = el("figcaption");
    this.facts = el("dl");
    this.buttons = el("div", { class: "actions" });
    this.more = el("tr", { role: "row", class: "more" }, el("td", { role: "cell", colspan: 8 },
      el("figure", {}, this.chart.svg, this.caption), this.facts, this.buttons));
    this.node.after(this.more);
    this.fillMore();
  }

  fillMore() {
    const each = this.each, points = history.get(this.id) || [];
    this.chart.draw(points, each.limit_bytes);
    if (points.length > 1) {
      const minutes = (points[points.length - 1][0] - points[0][0]) / 60;
      put(this.caption, "Bytes used in the last " + (minutes < 1.5 ? Math.round(minutes * 60) + " seconds" : Math.round(minutes) + " minutes") + ": from " + size(points[0][1])
        + " to " + size(points[points.length - 1][1]) + ", most " + size(Math.max(...points.map((point) => point[1]))) + (each.limit_bytes ? "; dashed: the limit, " + size(each.limit_bytes) : "") + ".");
    } else put(this.caption, "There are no figures over time yet.");
    const labels = Object.entries(each.labels || {}).map(([key, value]) => key + "=" + value).join("\n");
    pairs(this.facts, [
      ["Id", each.id], ["Command", each.command], ["Status", each.status], ["Snapshot", each.snapshot],
      ...(each.inodes === undefined ? [] : [["Inodes", count(each.inodes) + (each.limit_inodes ? " of " + count(each.limit_inodes) : ", no limit")]]),
      ...(each.copied_files === undefined ? [] : [["Copied up", plural(each.copied_files, "file") + ", " + size(each.copied_bytes)],
        ["Redirected", plural(each.redirected_files, "file") + ", " + plural(each.redirected_blocks, "block")]]),
      ...(labels ? [["Labels", labels]] : []),
    ]);
    this.offer();
  }

  offer() {
    const wanted = !actions ? [] : this.each.state === "running" ? ["Stop", "Restart", "Pause", "Set limit", "Remove"]
      : this.each.state === "paused" ? ["Unpause", "Set limit", "Remove"] : ["Start", "Set limit", "Remove"];
    const shown = [...this.buttons.children].map((button) => button.textContent);
    if (shown.join() === wanted.join()) return;
    this.buttons.replaceChildren(...wanted.map((name) => el("button", { type: "button", class: name === "Remove" ? "danger" : null, onclick: () => act(name, this.each) }, name)));
  }
}

function listContainers() {
  const find = $("find").value.trim().toLowerCase(), show = $("show").value, order = $("order").value;
  const fits = (each) => (!find || (each.name + " " + each.image + " " + each.id).toLowerCase().includes(find))
    && (!show || (show === "near" ? share(each) > 0.8 : alive(each) === Number(show === "running")));
  const shown = containers.filter(fits);
  if (order === "name") shown.sort((a, b) => a.name.localeCompare(b.name));
  else if (order === "running") shown.sort((a, b) => alive(b) - alive(a));
  else if (order !== "created") {
    const value = (each) => (order === "share" ? share(each) : each[order]) ?? -1;
    shown.sort((a, b) => value(b) - value(a));
  }
  const body = $("containers-rows"), there = new Set();
  let at = body.firstElementChild;
  for (const each of shown) {
    there.add(each.id);
    let row = rows.get(each.id);
    if (!row) rows.set(each.id, row = new Row(each.id));
    row.update(each);
    if (at === row.node) { at = at.nextElementSibling; } else { body.insertBefore(row.node, at); }
    if (row.more) {
      if (at === row.more) at = at.nextElementSibling; else body.insertBefore(row.more, at);
    }
  }
  for (const [id, row] of rows) {
    if (!there.has(id)) { row.node.remove(); if (row.more) row.more.remove(); rows.delete(id); }
  }
  for (const id of history.keys()) if (!containers.some((each) => each.id === id)) history.delete(id);
  const running = containers.filter((each) => each.state === "running").length;
  put($("containers-count"), plural(containers.length, "container") + ", " + count(running) + " running" + (shown.length < containers.length ? ", " + count(shown.length) + " shown" : ""));
  const none = $("containers-none");
  none.hidden = shown.length > 0;
  put(none, containers.length ? "No container fits." : "There is no container yet: docker run makes one.");
}

// -- actions (--ui-actions) -------------------------------------------------------------------------------------

function confirmed(title, text, yes, label, value) {
  const dialog = $("ask");
  put($("ask-title"), title); put($("ask-text"), text); put($("ask-yes"), yes);
  $("ask-field").hidden = !label;
  put($("ask-label"), label || "");
  $("ask-value").value = value || "";
  return new Promise((resolve) => {
    $("ask-yes").onclick = () => dialog.close("yes");
    $("ask-no").onclick = () => dialog.close("");
    $("ask-value").onkeydown = (event) => { if (event.key === "Enter") { event.preventDefault(); dialog.close("yes"); } };
    dialog.returnValue = "";
    dialog.onclose = () => resolve(dialog.returnValue === "yes" ? (label ? $("ask-value").value.trim() : true) : null);
    dialog.showModal();
  });
}

async function act(name, each) {
  const base = "/containers/" + encodeURIComponent(each.id);
  let method = "POST", target = base + "/" + name.toLowerCase();
  if (name === "Remove") {
    if (!await confirmed("Remove " + each.name + "?", "The container and everything that it wrote are gone for good.", "Remove")) return;
    method = "DELETE"; target = base + "?force=1";
  } else if (name === "Set limit") {
    const text = await confirmed("Limit of " + each.name, "Bytes that it may hold: 512M, 4G, or none.", "Set", "Limit", each.limit_bytes ? String(each.limit_bytes) : "");
    if (!text) return;
    target = base + "/limit?size=" + encodeURIComponent(text);
  }
  say(name + " " + each.name + " …");
  try {
    const answer = await fetch(target, { method });
    const told = answer.ok ? "" : (await answer.json()).message;
    say(told ? name + " " + each.name + ": " + told : name + " " + each.name + ": done", Boolean(told));
  } catch (error) { say(name + " " + each.name + ": " + error.message, true); }
  refresh();
}

// -- images -----------------------------------------------------------------------------------------------------

const imageRows = new Map();

function listImages(images) {
  const most = Math.max(1, ...images.map((each) => each.bytes)), list = $("images-list"), there = new Set();
  put($("images-count"), plural(images.length, "image"));
  for (const each of images) {
    there.add(each.id);
    let row = imageRows.get(each.id);
    if (!row) {
      row = { title: el("strong"), facts: el("small"), own: el("i"), shared: el("i", { class: "shared" }), rows: el("tbody"), summary: el("span") };
      row.node = el("li", {}, row.title, " ", row.facts, el("span", { class: "bar", "aria-hidden": "true" }, row.own, row.shared),
        el("details", {}, el("summary", {}, row.summary),
          el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Layer, topmost first"), el("th", { scope: "col", class: "number" }, "Size"), el("th", { scope: "col" }, "Used by"))), row.rows)));
      imageRows.set(each.id, row);
    }
    put(row.title, each.names.join(", ") || "without a name");
    put(row.facts, each.id + " · " + size(each.bytes) + ", of which " + size(each.shared_bytes) + " shared and " + size(each.bytes - each.shared_bytes) + " of its own · " + plural(each.containers, "container"));
    row.own.style.width = (each.bytes - each.shared_bytes) / most * 100 + "%";
    row.shared.style.width = each.shared_bytes / most * 100 + "%";
    put(row.summary, plural(each.layers.length, "layer"));
    row.rows.replaceChildren(...each.layers.map((layer) => el("tr", {}, el("td", {}, el("code", {}, layer.name)), el("td", { class: "number" }, size(layer.bytes)),
      el("td", {}, layer.images > 1 ? "shared by " + plural(layer.images, "image") : "this image alone"))));
    list.append(row.node);
  }
  for (const [id, row] of imageRows) if (!there.has(id)) { row.node.remove(); imageRows.delete(id); }
}

// -- snapshots --------------------------------------------------------------------------------------------------

const open = new Map();   // name of an open snapshot -> its list

async function branch(name, list, skip) {
  const data = await read("data/snapshots?of=" + encodeURIComponent(name) + "&skip=" + (skip || 0));
  if (!skip && name === "" && !data.total) { list.replaceChildren(el("li", { class: "hint" }, "There is no snapshot yet: docker load, docker pull or cowfs import brings some.")); return; }
  const old = new Map([...list.children].filter((item) => item.dataset.name !== undefined).map((item) => [item.dataset.name, item]));
  const items = data.snapshots.map((each) => twig(each, old.get(each.name)));
  const rest = data.total - (skip || 0) - items.length;
  if (rest > 0) {
    const more = el("li", { class: "leaf" }, el("button", { type: "button", onclick: async () => { more.remove(); await branch(name, list, (skip || 0) + items.length); } }, "Show more of " + count(rest)));
    items.push(more);
  }
  if (skip) list.append(...items);
  else if (items.length !== list.children.length || items.some((item, at) => item !== list.children[at])) list.replaceChildren(...items);
}

function twig(each, old) {
  const container = containers.find((one) => one.snapshot === each.name);
  const facts = (container ? "of " + container.name + " " : "") + (each.bytes === null ? "" : size(each.bytes)) + (each.children ? (each.bytes === null ? "" : ", ") + plural(each.children, "snapshot") + " on it" : "");
  if (old && old.dataset.parent === String(each.children > 0)) {
    put(old.querySelector("small"), facts);
    const kind = old.querySelector(".kind");
    put(kind, each.kind); kind.className = "kind " + each.kind;
    return old;
  }
  const line = [el("span", { class: "kind " + each.kind }, each.kind), el("code", {}, each.name), " ", el("small", {}, facts)];
  const item = el("li", { class: each.children ? null : "leaf" });
  item.dataset.name = each.name;
  item.dataset.parent = String(each.children > 0);
  if (!each.children) { item.append(...line); return item; }
  const list = el("ul"), details = el("details", {}, el("summary", {}, ...line), list);
  details.addEventListener("toggle", () => {
    if (details.open) { open.set(each.name, list); branch(each.name, list).catch(failed); } else { open.delete(each.name); list.replaceChildren(); }
  });
  item.append(details);
  return item;
}

async function refreshTree() {
  await branch("", $("tree"));
  for (const [name, list] of open) {
    if (!list.isConnected) open.delete(name);
    else await branch(name, list).catch(() => open.delete(name));
  }
}

// -- events -----------------------------------------------------------------------------------------------------

let paused = false, lastNano = 0, held = [];

function showEvent(event) {
  if (paused) { held.push(event); if (held.length > EVENTS) held.shift(); return; }
  const list = $("events-list"), type = $("events-type").value;
  const at = new Date(event.time * 1000);
  const told = Object.entries(event.Actor.Attributes).map(([key, value]) => key + "=" + value).join(", ");
  const item = el("li", {}, el("time", { datetime: at.toISOString() }, at.toLocaleTimeString("en-GB")), event.Type + " " + event.Action + " ", el("bdi", {}, event.Actor.ID.slice(0, 80)), " ", el("small", {}, told.slice(0, 400)));
  item.dataset.type = event.Type;
  item.hidden = Boolean(type) && event.Type !== type;
  list.prepend(item);
  while (list.children.length > EVENTS) list.lastElementChild.remove();
}

async function follow() {
  for (;;) {
    try {
      const since = lastNano ? (BigInt(lastNano) + 1n).toString().padStart(19, "0") : String(Math.floor(Date.now() / 1000) - 600) + "000000000";
      const answer = await fetch("/events?since=" + since.slice(0, -9) + "." + since.slice(-9), { cache: "no-store" });
      if (!answer.ok) throw new Error("status " + answer.status);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) {
          if (!line.trim()) continue;
          const nano = /"timeNano":(\d+)/.exec(line);   // more digits than a number has
          const event = JSON.parse(line);
          if (nano) lastNano = nano[1];
          showEvent(event);
        }
      }
    } catch (error) { /* the line about the connection says it */ }
    await new Promise((resolve) => setTimeout(resolve, PERIOD));
  }
}

// -- the clock --------------------------------------------------------------------------------------------------

let seenEvent = -1, busy = false, saidUntil = 0;

function say(text, bad) {
  put($("connection"), text);
  $("connection").className = bad ? "lost" : "";
  saidUntil = Date.now() + 6000;
}

function failed(error) {
  say("No answer from the daemon (" + error.message + ")", true);
  saidUntil = 0;
}

async function refresh() {
  if (busy || document.hidden) return;
  busy = true;
  try {
    const data = await read("data/overview?after=" + lastRound);
    actions = data.actions;
    containers = data.containers;
    remember(data);
    overview(data);
    listContainers();
    if (data.last_event !== seenEvent) {
      listImages(await read("data/images"));
      await refreshTree();
      seenEvent = data.last_event;
      put($("snapshots-count"), count(Object.values(data.store.snapshots).reduce((sum, each) => sum + each, 0)) + " in all");
    }
    if (Date.now() > saidUntil) { put($("connection"), actions ? "Connected" : "Connected, read-only"); $("connection").className = ""; }
    document.documentElement.dataset.ready = "yes";
  } catch (error) { failed(error); }
  busy = false;
}

for (const id of ["find", "show", "order"]) $(id).addEventListener("input", listContainers);
for (const id of ["containers-tools", "events-tools"]) $(id).addEventListener("submit", (event) => event.preventDefault());
$("events-type").addEventListener("input", () => {
  for (const item of $("events-list").children) item.hidden = Boolean($("events-type").value) && item.dataset.type !== $("events-type").value;
});
$("events-pause").addEventListener("click", () => {
  paused = !paused;
  $("events-pause").setAttribute("aria-pressed", String(paused));
  if (!paused) { const late = held; held = []; late.forEach(showEvent); }
});
document.addEventListener("visibilitychange", refresh);
setInterval(refresh, PERIOD);
refresh();
follow();
