"use strict";
const SVG = "http://www.w3.org/2000/svg";
const POLL = 3000, TOP = 5, PARALLEL = 4, KEPT = 60, CLASSES = 60, COLOURS = 6;
const MARKERS = ["M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "M-3-3h6v6h-6z", "M0-4.2L4.2 3.2h-8.4z", "M0-4.6L4.6 0L0 4.6L-4.6 0z",
  "M0 4.2L4.2-3.2h-8.4z", "M-1.3-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "13 4"];
const EVENTS = { created: "made", learnt: "learnt", refused: "the gate refused", "rolled back": "rolled back to",
  configured: "settings changed", "opened a run": "made from a run:", "deleted kept examples": "kept examples deleted" };
const kind = document.body.dataset.kind;
const by = (id) => document.getElementById(id);
let token = null, version = null, refused = null, lost = false, waiting = [], running = 0, done = 0, asked = 0;

/* Every text goes in as text: names of classes, tasks and files are never read as HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "colour") element.style.setProperty("--c", value); else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
const percent = (share) => share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)} %`;
const chance = (share) => share > 0 && share < 0.001 ? "< 0.1 %" : share < 1 && share > 0.999 ? "> 99.9 %" : percent(share);
const scaled = (count) => count >= 1e6 ? `${(count / 1e6).toFixed(1)} M` : count >= 1e3 ? `${(count / 1e3).toFixed(1)} k` : `${count}`;
const moment = (text) => text ? text.slice(0, 16).replace("T", " ") : "–";
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : word.endsWith("s") ? "es" : "s"}`;

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (token !== null) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  let content = {};
  try { content = await response.json(); } catch { /* the status says enough */ }
  if (!response.ok) {
    const error = new Error(content.error?.message || content.error || `the server responded with status ${response.status}`);
    error.status = response.status;
    throw error;
  }
  return content;
}

/* -- predictions -- */

function show(entry, content) {
  const best = content.predictions[0];
  const bars = best.top.slice(0, TOP).map((guess) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${(100 * guess.probability).toFixed(1)}%`;
    return make("li", {}, make("span", { class: "of", title: `${guess.class}, learnt in ${guess.task}` }, guess.class),
      make("span", { class: "share" }, chance(guess.probability)), make("span", { class: "groove", "aria-hidden": "true" }, bar));
  });
  entry.said.replaceChildren(make("p", { class: "best" }, best.class),
    make("p", { class: "said" }, `${chance(best.probability)}, learnt in task ${best.task}`),
    make("ul", { class: "bars", "aria-label": "Best classes" }, ...bars));
  notice(content.version);
}

function add(name, picture) {
  const said = make("div", {}, make("p", { class: "said" }, "…"));
  const item = make("li", picture ? {} : { class: "text" });
  if (picture) {
    const image = make("img", { alt: "", src: picture });
    image.addEventListener("error", () => { image.replaceWith(make("div", { class: "blank" })); });
    item.append(image);
  }
  item.append(make("div", {}, said, make("p", { class: "said file" }, name)));
  item.picture = picture;
  const list = by("results");
  list.prepend(item);
  while (list.children.length > KEPT) drop(list.lastElementChild);
  return { said };
}

function drop(item) {
  if (item.picture) URL.revokeObjectURL(item.picture);
  item.remove();
}

function put(name, picture, body, headers) {
  waiting.push({ entry: add(name, picture), body, headers });
  asked += 1;
  work();
}

function work() {
  while (running < PARALLEL && waiting.length) {
    const job = waiting.shift();
    running += 1;
    call(`predict?top=${TOP}`, { method: "POST", body: job.body, headers: job.headers })
      .then((content) => show(job.entry, content))
      .catch((error) => {
        if (error.status === 401) login(error.message);
        job.entry.said.replaceChildren(make("p", { class: "wrong", role: "alert" }, error.message));
      })
      .finally(() => { running -= 1; done += 1; progress(); work(); });
  }
  progress();
}

function progress() {
  by("tools").hidden = !by("results").children.length;
  const [input, predicted] = kind === "language" ? ["prompt", "completed"] : ["input", "predicted"];
  by("progress").textContent = done < asked ? `${done} of ${asked} ${predicted}` : `${plural(asked, input)} ${predicted}`;
}

function take(files) {
  const chosen = [...files].slice(0, KEPT);
  for (const file of chosen.reverse()) {
    const form = new FormData();
    form.append("file", file, file.name);
    put(file.name, URL.createObjectURL(file), form, {});
  }
  if (files.length > KEPT) by("notice").textContent = `The first ${KEPT} of ${files.length} files were taken.`;
}

function listen() {
  by("clear").addEventListener("click", () => {
    waiting = []; done = 0; asked = running;
    for (const item of [...by("results").children]) drop(item);
    progress();
  });
  by("login-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = by("token").value.trim();
    start();
  });
  if (kind === "language") {
    listenForPrompts();
  } else if (kind === "image") {
    const input = by("files"), area = by("drop");
    input.addEventListener("change", () => { take(input.files); input.value = ""; });
    for (const name of ["dragenter", "dragover"]) {
      document.addEventListener(name, (event) => { event.preventDefault(); area.classList.add("over"); });
    }
    document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) area.classList.remove("over"); });
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      area.classList.remove("over");
      if (!by("content").hidden) take(event.dataTransfer.files);
    });
  } else {
    const submit = () => {
      const text = by("text").value;
      if (text.trim()) put(text.length > 300 ? `${text.slice(0, 300)} …` : text, null, JSON.stringify({ texts: [text] }),
        { "Content-Type": "application/json" });
    };
    by("text-form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
    by("text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); submit(); }
    });
  }
}

/* -- the model -- */

function chart(tasks) {
  const lines = tasks.map((task, k) => ({ name: task.name, start: k, values: task.accuracy.map((point) => point.accuracy) }))
    .filter((line) => line.values.length);
  const place = new Map(tasks.map((task, k) => [task.name, k]));
  tasks.forEach((task) => task.accuracy.forEach((point) => { point.x = place.get(point.after) ?? 0; }));
  if (tasks.length < 2 || !lines.length) {
    by("chart").replaceChildren();
    by("chart-note").textContent = "The curves begin with the second task.";
    return;
  }
  const all = lines.flatMap((line) => line.values);
  const low = Math.max(0, Math.min(0.9, Math.floor(10 * Math.min(...all)) / 10 - 0.1));
  const left = 40, right = 388, top = 24, bottom = 196;
  const x = (k) => left + (right - left) * k / Math.max(1, tasks.length - 1);
  const y = (value) => bottom - (bottom - top) * (value - low) / (1 - low);
  const svg = draw("svg", { class: "chart", viewBox: "0 0 400 236", role: "img",
    "aria-label": "Accuracy of every task after each later task. The table has the same figures." });
  const step = 1 - low > 0.5 ? 0.2 : 0.1;
  for (let value = 1; value >= low - 1e-9; value -= step) {
    svg.append(draw("path", { class: "g", d: `M${left} ${y(value).toFixed(1)}H${right}` }),
      draw("text", { class: "t e", x: left - 6, y: (y(value) + 4).toFixed(1) }, `${Math.round(100 * value)}`));
  }
  const every = Math.ceil(tasks.length / 10);
  tasks.forEach((_, k) => {
    if (k % every === 0) svg.append(draw("text", { class: "t c", x: x(k).toFixed(1), y: bottom + 17 }, `${k + 1}`));
  });
  svg.append(draw("text", { class: "a", x: 2, y: 12 }, "%"), draw("text", { class: "a c", x: (left + right) / 2, y: 232 }, "after task"));
  const few = lines.length <= COLOURS;
  lines.forEach((line, k) => {
    const points = tasks[line.start].accuracy.map((point) => [x(point.x), y(point.accuracy), point]);
    const colour = few ? `var(--s${k})` : "var(--soft)";
    const path = points.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
    svg.append(draw("path", { class: few ? "l" : "l thin", d: path, "stroke-dasharray": few ? DASHES[k] : "", colour }));
    for (const [px, py, point] of few ? points : []) {
      const title = draw("title", {}, `${line.name}: ${percent(point.accuracy)} after ${point.after} (${plural(point.examples, "example")})`);
      svg.append(draw("path", { class: "m", d: MARKERS[k], transform: `translate(${px.toFixed(1)} ${py.toFixed(1)})`, colour }, title));
    }
  });
  const parts = [];
  if (few) {
    parts.push(make("ul", { class: "legend" }, ...lines.map((line, k) => {
      const colour = `var(--s${k})`;
      return make("li", {}, draw("svg", { width: 34, height: 14, "aria-hidden": "true" },
        draw("path", { class: "l", d: "M1 7H33", "stroke-dasharray": DASHES[k], colour }),
        draw("path", { class: "m", d: MARKERS[k], transform: "translate(17 7)", colour })), line.name);
    })));
  } else {
    const means = tasks.map((_, k) => {
      const values = tasks.flatMap((task) => task.accuracy.filter((point) => point.x === k).map((point) => point.accuracy));
      return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
    });
    const path = means.map((value, k) => value === null ? "" : `L${x(k).toFixed(1)} ${y(value).toFixed(1)}`).join("").replace("L", "M");
    svg.append(draw("path", { class: "l", d: path, colour: "var(--accent)" }));
  }
  by("chart").replaceChildren(...parts, svg);
  by("chart-note").textContent = (few ? "" : "Thick: the mean over the tasks so far; thin: each task. ")
    + "Measured on the probes that the model keeps of a task, the newest task on its held-out examples.";
}

function tell(model, about) {
  const known = kind === "language" ? "" : `${plural(model.classes, "class")} from `;
  by("summary").textContent = `Version ${model.version} knows ${known}${plural(model.tasks, "task")}.`;
  chart(about.tasks);
  by("tasks").replaceChildren(...about.tasks.map((task, k) => {
    const newest = task.accuracy.length ? task.accuracy[task.accuracy.length - 1].accuracy : null;
    const first = task.accuracy.length ? task.accuracy[0].accuracy : task.accuracy_when_learnt;
    const name = make("th", { scope: "row", class: "name" }, task.name, make("span", { class: "def" }, task.classes.slice(0, 6).join(", ")
      + (task.classes.length > 6 ? ` and ${task.classes.length - 6} more` : "")));
    return make("tr", {}, make("td", { class: "num" }, `${k + 1}`), name,
      make("td", { class: "num" }, `${task.examples.train ?? "–"}`), make("td", { class: "num" }, `${percent(first).replace(" %", "")} → ${percent(newest ?? first)}`));
  }));
  classes(about.classes, about.classes.length > CLASSES);
  by("history").replaceChildren(...[...about.history].reverse().map((event) => {
    const words = [EVENTS[event.event] ?? event.event];
    if (event.event === "rolled back" && !event.task) words.push("before the first task");
    if (event.task) words.push(event.task);
    if (event.tasks) words.push(event.tasks.join(", "));
    let text = words.join(" ") + (event.forced ? ", though the gate refused it" : "");
    if (event.version && event.event !== "refused") text += ` (version ${event.version})`;
    if (event.problems) text += `: ${event.problems.join("; ")}`;
    return make("li", {}, make("time", {}, moment(event.time)), make("span", {}, text));
  }));
  const gate = model.gate === null ? "nothing to compare with" : model.gate.accepted ? "accepted" : "refused, and forced";
  const rows = { Version: `${model.version}, learnt ${moment(model.created)} with task ${model.task}`, Check: model.checked, Gate: gate,
    Forgetting: model.forgetting === null ? "–" : `${(100 * model.forgetting).toFixed(1)} points`,
    Backbone: `${model.base.name}, ${scaled(model.base.parameters)} parameters`,
    Licence: model.base.licence ?? "not stated", Method: model.method, Precision: model.precision };
  by("model").replaceChildren(...Object.entries(rows).map(([name, value]) =>
    make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, `${value}`))));
}

function classes(names, folded) {
  by("classes").replaceChildren(...(folded ? names.slice(0, CLASSES) : names).map((name) => make("li", {}, name)));
  by("more").hidden = !folded;
  by("more").textContent = `Show all ${names.length} classes`;
  by("more").onclick = () => classes(names, false);
}

function curl() {
  const auth = document.body.dataset.token === "yes" ? " -H \"Authorization: Bearer $TOKEN\"" : "";
  if (kind === "language") {
    by("curl").textContent = curlForPrompts(auth);
    return;
  }
  const input = kind === "image" ? "-F file=@photo.jpg" : "--json '{\"texts\": [\"...\"]}'";
  by("curl").textContent = `curl${auth} ${input} ${new URL("predict", location.href).href}`;
}

/* -- versions -- */

function notice(number) {
  if (version !== null && number > version) refresh();
}

async function refresh() {
  const [model, about] = await Promise.all([call("model"), call("tasks")]);
  if (version !== null && model.version > version) {
    by("notice").textContent = `Version ${model.version} is served now; it was version ${version}. Newest task: ${model.task}.`;
  }
  version = Math.max(version ?? 0, model.version);
  tell(model, about);
}

async function explain(number) {
  const model = await call("model");
  refused = number;
  if (model.refused) by("notice").textContent = `A newer version is not served: ${model.refused.reason}`;
}

async function poll() {
  try {
    const ready = await call("ready");
    if (lost) {
      lost = false;
      if (!by("login").hidden) by("summary").textContent = ""; else start();
    }
    if (ready.refused && ready.refused.version !== refused && version !== null) await explain(ready.refused.version);
    if (!ready.refused) refused = null;
    notice(ready.version);
  } catch { lost = true; by("summary").textContent = "The server does not respond."; }
  setTimeout(poll, POLL);
}

function login(message) {
  by("login").hidden = false;
  by("content").hidden = true;
  by("summary").textContent = "";
  by("login-error").textContent = token === null ? "" : message;
  token = null;
  by("token").value = "";
  by("token").focus();
}

async function start() {
  try {
    await refresh();
    by("login").hidden = true;
    by("content").hidden = false;
    by("token").value = "";
  } catch (error) {
    if (error.status === 401) login("The token is wrong."); else by("summary").textContent = error.message;
  }
}

listen();
curl();
start();
setTimeout(poll, POLL);
