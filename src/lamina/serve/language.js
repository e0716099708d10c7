
/* -- a language model: the prompt, and its completion as it comes -- */

function asking(text) {
  const name = by("title").textContent;
  const most = Number(by("most").value);
  const box = by("as-chat");
  const chat = box !== null && box.checked;
  const body = { model: name, stream: true, stream_options: { include_usage: true }, max_tokens: most };
  if (chat) body.messages = [{ role: "user", content: text }]; else body.prompt = text;
  return { path: chat ? "v1/chat/completions" : "v1/completions", body };
}

/* Yields the parts of a stream of server-sent events. */
async function* parts(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done: ended } = await reader.read();
    if (ended) throw new Error("the completion was broken off: the connection ended early");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
    }
  }
}

async function write(entry, request, signal) {
  const headers = { "Content-Type": "application/json" };
  if (token !== null) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(request.path, { method: "POST", headers, body: JSON.stringify(request.body), signal,
    cache: "no-store", credentials: "omit" });
  if (!response.ok) {
    let message = `the server responded with status ${response.status}`;
    try { message = (await response.json()).error.message; } catch { /* the status says enough */ }
    throw Object.assign(new Error(message), { status: response.status });
  }
  const written = make("p", { class: "written", "aria-live": "polite" }), note = make("p", { class: "said" }, "…");
  entry.said.replaceChildren(written, note);
  let text = "", reason = null, tokens = null;
  for await (const part of parts(response)) {
    if (part.error) throw new Error(part.error.message);
    for (const choice of part.choices) {
      text += choice.delta ? choice.delta.content ?? "" : choice.text;
      reason = choice.finish_reason ?? reason;
    }
    written.textContent = text.trimStart();
    if (part.usage) tokens = part.usage.completion_tokens;
  }
  const ended = reason === "length" ? `cut off after ${plural(tokens, "token")}` : plural(tokens, "token");
  note.textContent = `${ended}, version ${response.headers.get("X-Model-Version")}`;
  notice(Number(response.headers.get("X-Model-Version")));
}

function listenForPrompts() {
  let stop = null;
  const submit = async () => {
    const text = by("text").value;
    if (!text.trim() || stop !== null) return;
    const entry = add(text.length > 300 ? `${text.slice(0, 300)} …` : text, null);
    stop = new AbortController();
    by("stop").hidden = false;
    asked += 1;
    progress();
    try {
      await write(entry, asking(text), stop.signal);
    } catch (error) {
      if (error.status === 401) login(error.message);
      const message = error.name === "AbortError" ? "stopped" : error.message;
      entry.said.append(make("p", { class: "wrong", role: "alert" }, message));
    } finally {
      stop = null;
      by("stop").hidden = true;
      done += 1;
      progress();
    }
  };
  by("stop").addEventListener("click", () => stop?.abort());
  by("text-form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  by("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); submit(); }
  });
}

function curlForPrompts(auth) {
  const chat = by("as-chat") !== null, name = by("title").textContent;
  const asked = chat ? { messages: [{ role: "user", content: "..." }] } : { prompt: "..." };
  const body = JSON.stringify({ model: name, ...asked }).replaceAll("'", "'\\''");
  const path = chat ? "v1/chat/completions" : "v1/completions";
  return `curl${auth} --json '${body}' \\\n  ${new URL(path, location.href).href}`;
}
