// The search page: one script, no dependency. Everything that comes from the corpus or the server becomes a text node, never markup.
"use strict";
(() => {
  const MODES = {
    bm25: { label: "BM25", about: "Words that query and passage share, weighed by how rare they are." },
    dense: { label: "Dense", about: "Closeness in meaning, by the vectors of the trained retriever." },
    hybrid: { label: "Hybrid", about: "BM25 and dense fused into one list." },
    rerank: { label: "Re-ranked", about: "The best candidates, read closely by the cross-encoder. Slower." },
  };
  const STEP = 10; // results shown first, and added by each "Show more"
  const TYPING_MILLISECONDS = 140;
  const SLOW_TYPING_MILLISECONDS = 350; // the cross-encoder is not asked for half a word
  const SLOW_ANSWER_MILLISECONDS = 700; // then it is said that something is under way
  const SNIPPET = { characters: 340, before: 60 }; // before: shown before the first match
  const NARROW_SNIPPET = { characters: 200, before: 30 };
  const CARD_SNIPPET = { characters: 160, before: 14 };
  const CASES_AT_ONCE = 8;
  const LONGEST_WAIT_SECONDS = 30;
  const $ = (id) => document.getElementById(id);

  // --- state: what is asked (and stands in the address), what the server is, what is on the way

  const asked = { query: "", mode: "", compare: false, filters: new Map(), k: STEP, tab: "search" };
  let info = null;
  let answer = null; // the answer on view
  let running = null; // AbortController of the request on the way
  let typing = 0;
  let retry = null; // timer of the next attempt by itself
  let attempts = 0;
  let report = null;

  // --- elements

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === undefined || value === null || value === false) continue;
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function drawing(name, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  const unseen = (text) => element("span", { class: "unseen" }, text);
  const button = (text, onclick, style = "button") => element("button", { type: "button", class: style, onclick }, text);

  // --- numbers

  const count = (value) => Number(value).toLocaleString("en");
  const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

  function scoreText(value) {
    if (value === null || value === undefined) return "";
    return Math.abs(value) >= 100 ? value.toFixed(0) : Number(value).toPrecision(3);
  }

  function took(milliseconds) {
    if (milliseconds >= 999.5) return `${(milliseconds / 1000).toFixed(1)} s`;
    return milliseconds < 9.95 ? `${milliseconds.toFixed(1)} ms` : `${Math.round(milliseconds)} ms`;
  }

  // --- text with marked spans. Python counts characters, JavaScript half characters: they differ beyond the basic plane.

  function inUnits(text, spans) {
    if (!/[\ud800-\udfff]/.test(text)) return spans;
    const units = [0];
    for (const character of text) units.push(units[units.length - 1] + character.length);
    return spans.map(([start, end]) => [units[start] ?? text.length, units[end] ?? text.length]);
  }

  function marked(text, spans, from = 0, to = text.length) {
    const pieces = document.createDocumentFragment();
    let at = from;
    for (const [start, end] of spans) {
      if (start < at || end > to) continue;
      pieces.append(text.slice(at, start), element("mark", {}, text.slice(start, end)));
      at = end;
    }
    pieces.append(text.slice(at, to));
    return pieces;
  }

  // The stretch of a long text that holds most marks, from and to a blank.
  function snippet(text, spans, { characters, before }) {
    const marks = inUnits(text, spans);
    if (text.length <= characters) return marked(text, marks);
    let [first, most] = [0, 0];
    marks.forEach(([start], index) => {
      let held = index;
      while (held < marks.length && marks[held][1] <= start - before + characters) held += 1;
      if (held - index > most) [most, first] = [held - index, start];
    });
    let from = Math.max(0, first - before);
    if (from > 0) from = Math.min(first, text.indexOf(" ", from) + 1 || from);
    let to = Math.min(text.length, from + characters);
    if (to < text.length) to = Math.max(text.lastIndexOf(" ", to), from + characters / 2);
    const pieces = marked(text, marks, from, to);
    if (from > 0) pieces.prepend("… ");
    if (to < text.length) pieces.append(" …");
    return pieces;
  }

  const titleOf = (hit) => hit.title || hit.passage_id;

  // A long dotted name may be broken after its dots.
  function markedTitle(hit) {
    const pieces = hit.title ? marked(hit.title, inUnits(hit.title, hit.title_highlights)) : marked(hit.passage_id, []);
    for (const piece of [...pieces.childNodes]) {
      if (piece.nodeType !== Node.TEXT_NODE) continue;
      const parts = piece.data.split(/(?<=[._/:-])(?=\w)/).flatMap((part, index) => (index ? [element("wbr"), part] : [part]));
      piece.replaceWith(...parts);
    }
    return pieces;
  }

  // --- what the browser remembers; storage may be switched off

  function remembered(storage, key) {
    try {
      return window[storage].getItem(`simlm.${key}`);
    } catch {
      return null;
    }
  }

  function remember(storage, key, value) {
    try {
      window[storage].setItem(`simlm.${key}`, value);
    } catch {
      // Then it lasts as long as the page.
    }
  }

  let token = remembered("sessionStorage", "token");

  // --- colours

  const narrow = window.matchMedia("(max-width: 560px)");
  const darkSystem = window.matchMedia("(prefers-color-scheme: dark)");

  function showTheme() {
    const chosen = remembered("localStorage", "theme");
    const dark = chosen ? chosen === "dark" : darkSystem.matches;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    $("theme")?.setAttribute("aria-pressed", String(dark));
  }

  function toggleTheme() {
    remember("localStorage", "theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    showTheme();
  }

  showTheme(); // before the body is drawn, so that nothing flashes
  darkSystem.addEventListener("change", showTheme);

  // --- server

  class Failure extends Error {
    constructor(status, message, seconds = null) {
      super(message);
      this.status = status; // 0: no answer at all
      this.seconds = seconds; // when the server says to ask again
    }
  }

  async function ask(path, { body = null, signal = null } = {}) {
    const headers = { Accept: "application/json" };
    if (body) headers["Content-Type"] = "application/json";
    if (token) headers.Authorization = `Bearer ${token}`;
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure(0, "The server does not answer.");
    }
    let content = null;
    try {
      content = await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
    }
    if (response.ok && content !== null) return content;
    const message = content?.error?.message ?? `The server answered with status ${response.status}.`;
    throw new Failure(response.ok ? 0 : response.status, message, Number(response.headers.get("Retry-After")) || null);
  }

  // --- address

  function readAddress() {
    const found = new URLSearchParams(location.search);
    asked.query = found.get("q") ?? "";
    asked.mode = MODES[found.get("mode")] ? found.get("mode") : "";
    asked.compare = found.get("compare") === "1";
    asked.tab = found.get("tab") === "report" ? "report" : "search";
    asked.k = STEP;
    asked.filters = new Map();
    for (const [key, value] of found) {
      if (!key.startsWith("filter.")) continue;
      const field = key.slice("filter.".length);
      asked.filters.set(field, [...(asked.filters.get(field) ?? []), value]);
    }
  }

  function writeAddress({ keep = false } = {}) {
    const found = new URLSearchParams();
    if (asked.query.trim()) found.set("q", asked.query.trim());
    if (asked.mode && asked.mode !== info?.default_mode) found.set("mode", asked.mode);
    if (asked.compare) found.set("compare", "1");
    for (const [field, values] of asked.filters) for (const value of values) found.append(`filter.${field}`, value);
    if (asked.tab === "report") found.set("tab", "report");
    const text = found.toString();
    const address = text ? `?${text}` : location.pathname;
    if (address === (location.search || location.pathname)) return;
    history[keep ? "pushState" : "replaceState"](null, "", address);
    document.title = asked.query.trim() ? `${asked.query.trim().slice(0, 80)} – ${info?.name ?? "simlm"}` : `${info?.name ?? "simlm"} search`;
  }

  // An address may come from another corpus. Values are not looked up: only the most frequent ones are listed.
  function dropUnknownFields() {
    for (const field of [...asked.filters.keys()]) if (!info.filter_fields[field]) asked.filters.delete(field);
  }

  // --- asking

  function stop() {
    clearTimeout(typing);
    clearTimeout(retry);
    running?.abort();
    running = null;
    document.body.classList.remove("busy");
  }

  // After every change of what is asked; wait: for the next key.
  function changed({ wait = 0, keep = false, focus = null } = {}) {
    stop();
    writeAddress({ keep });
    const query = asked.query.trim();
    if (!info) return;
    const characters = [...query].length;
    if (!query) {
      hush();
      showEmpty();
    } else if (characters > info.max_query_characters) {
      hush();
      clear();
      say(`The query has ${count(characters)} characters; at most ${count(info.max_query_characters)} can be searched.`);
    } else if (wait) {
      typing = setTimeout(search, wait);
    } else {
      search({ focus });
    }
  }

  async function search({ focus = null } = {}) {
    clearTimeout(retry);
    running?.abort();
    const controller = new AbortController();
    running = controller;
    $("answer").classList.toggle("old", answer !== null);
    document.body.classList.add("busy");
    if (!answer) showGhosts();
    const slow = setTimeout(() => say("Searching …"), SLOW_ANSWER_MILLISECONDS);
    const body = { query: asked.query.trim(), k: asked.k, mode: asked.mode, compare: asked.compare };
    body.filters = Object.fromEntries([...asked.filters].map(([field, values]) => [field, values.length === 1 ? values[0] : values]));
    try {
      const found = await ask("/search", { body, signal: controller.signal });
      if (running !== controller) return;
      attempts = 0;
      hush();
      showAnswer(found, focus);
    } catch (error) {
      if (error.name === "AbortError" || running !== controller) return;
      if (!(error instanceof Failure)) throw error;
      fail(error, search);
    } finally {
      clearTimeout(slow);
      if (running === controller) {
        running = null;
        document.body.classList.remove("busy");
      }
    }
  }

  // --- messages

  const say = (text) => ($("status").textContent = text);

  function hush() {
    clearTimeout(retry);
    $("alert").hidden = true;
    $("alert").replaceChildren();
    document.body.classList.remove("failed");
  }

  function clear() {
    answer = null;
    $("answer").replaceChildren();
    say("");
  }

  // What went wrong, and another attempt where one can help: by itself where the server is busy or away, by a button always.
  function fail(failure, again) {
    if (failure.status === 401) {
      askToken(again);
      return;
    }
    const passing = [0, 429, 503].includes(failure.status);
    if (!passing) clear();
    else if (!answer) $("answer").replaceChildren();
    document.body.classList.toggle("failed", passing && answer !== null);
    say("");
    const words = element("p", {}, /[.!?]$/.test(failure.message) ? failure.message : `${failure.message}.`);
    const box = $("alert");
    box.className = passing ? "alert" : "alert bad";
    box.replaceChildren(words);
    box.hidden = false;
    if ([400, 413, 422].includes(failure.status)) return;
    box.append(button("Try again", () => again()));
    if (!passing) return;
    attempts += 1;
    const seconds = Math.min(failure.seconds ?? 2 ** attempts, LONGEST_WAIT_SECONDS);
    words.append(` Asking again in ${plural(seconds, "second")}.`);
    clearTimeout(retry);
    retry = setTimeout(again, seconds * 1000);
  }

  function askToken(again) {
    stop();
    hush();
    const wrong = token !== null;
    const field = element("input", { id: "token", type: "password", autocomplete: "off", required: true, "aria-describedby": "token-note" });
    const use = (event) => {
      event.preventDefault();
      token = field.value.trim();
      if (!token) return;
      remember("sessionStorage", "token", token);
      clear();
      again();
    };
    const note = wrong ? "That token was refused. Check it and try once more." : "This server asks for a token. It is kept until this tab is closed.";
    answer = null;
    say("");
    const form = element(
      "form",
      { class: "token", onsubmit: use },
      element("label", { for: "token" }, "Access token"),
      element("p", { id: "token-note", class: "lead", role: wrong ? "alert" : null }, note),
      element("div", { class: "row" }, field, element("button", { type: "submit", class: "button strong" }, "Use token")),
    );
    (asked.tab === "report" ? $("view-report") : $("answer")).replaceChildren(form);
    field.focus();
  }

  // --- the page around the results

  function showInfo() {
    $("run-name").textContent = info.name;
    $("run-size").textContent = plural(info.passages, "passage");
    document.title = `${info.name} search`;
    $("query").placeholder = `Search ${plural(info.passages, "passage")}`;
    $("tab-report").hidden = false;
    if (!info.modes.includes(asked.mode)) asked.mode = info.default_mode;
    dropUnknownFields();
    showControls();
  }

  function showControls() {
    const choose = (mode) => () => {
      asked.mode = mode;
      changed({ keep: true });
    };
    $("modes").replaceChildren(
      element("legend", { class: "unseen" }, "Ranking"),
      ...info.modes.map((mode) => {
        const radio = element("input", { type: "radio", name: "mode", value: mode, onchange: choose(mode) });
        radio.checked = mode === asked.mode;
        return element("label", { title: MODES[mode].about }, radio, MODES[mode].label);
      }),
    );
    $("compare-switch").hidden = info.modes.length < 2;
    $("compare").checked = asked.compare;
    $("query").value = asked.query;
    $("filters").replaceChildren(...Object.entries(info.filter_fields).map(([field, values]) => filterMenu(field, values)));
    showChips();
  }

  function filterMenu(field, values) {
    const options = values.map((value) => {
      const box = element("input", { type: "checkbox", onchange: () => toggleFilter(field, value) });
      box.checked = (asked.filters.get(field) ?? []).includes(value);
      return element("label", {}, box, element("span", { dir: "auto" }, value));
    });
    const active = asked.filters.has(field);
    const menu = element("div", { class: "menu", role: "group", "aria-label": `Filter by ${spoken(field)}` }, ...options);
    const made = element("details", { class: active ? "filter active" : "filter" }, element("summary", {}, spoken(field)), menu);
    made.dataset.field = field;
    made.addEventListener("toggle", () => {
      if (made.open) for (const other of document.querySelectorAll(".filter[open]")) if (other !== made) other.open = false;
    });
    return made;
  }

  const spoken = (name) => name.replaceAll("_", " ");

  function toggleFilter(field, value) {
    const values = asked.filters.get(field) ?? [];
    const rest = values.filter((other) => other !== value);
    if (rest.length === values.length) rest.push(value);
    if (rest.length) asked.filters.set(field, rest);
    else asked.filters.delete(field);
    asked.k = STEP;
    showFilters();
    changed({ keep: true });
  }

  // The menus stay as they are, so that an open one keeps its place and the focus.
  function showFilters() {
    for (const menu of document.querySelectorAll(".filter")) {
      const values = info.filter_fields[menu.dataset.field];
      const chosen = asked.filters.get(menu.dataset.field) ?? [];
      menu.classList.toggle("active", chosen.length > 0);
      menu.querySelectorAll("input").forEach((box, index) => (box.checked = chosen.includes(values[index])));
    }
    showChips();
  }

  function showChips() {
    const chips = [...asked.filters].flatMap(([field, values]) =>
      values.map((value) => {
        const text = [unseen("Remove the filter "), `${spoken(field)}: ${value}`, element("span", { class: "cross", "aria-hidden": "true" }, "×")];
        return element("button", { type: "button", class: "chip", onclick: () => dropFilter(field, value) }, ...text);
      }),
    );
    if (chips.length > 1) chips.push(button("Clear filters", dropFilters, "link"));
    $("chips").replaceChildren(...chips);
  }

  function dropFilter(field, value) {
    toggleFilter(field, value);
    ($("chips").querySelector("button") ?? $("query")).focus();
  }

  function dropFilters() {
    asked.filters.clear();
    showFilters();
    $("query").focus();
    changed({ keep: true });
  }

  // --- nothing asked yet, nothing found, nothing there yet

  function showEmpty() {
    clear();
    const example = info.example_query;
    const tryIt = () => {
      asked.query = example;
      $("query").value = example;
      $("query").focus();
      changed({ keep: true });
    };
    const ways = info.modes.flatMap((mode) => [element("dt", {}, MODES[mode].label), element("dd", {}, MODES[mode].about)]);
    $("answer").replaceChildren(
      element(
        "div",
        { class: "empty" },
        element("h2", {}, `Ask ${plural(info.passages, "passage")}`),
        element("p", {}, "Answers come as you type: a question, a sentence or a few words."),
        example
          ? element("button", { type: "button", class: "try", onclick: tryIt }, element("span", {}, "Try"), element("span", { dir: "auto" }, example))
          : null,
        element("dl", { class: "explain" }, ...ways),
      ),
    );
  }

  function showNothing() {
    const advice = asked.filters.size
      ? button("Search without filters", dropFilters)
      : asked.mode === "bm25" && info.modes.includes("dense")
        ? button("Search by meaning instead", () => {
            asked.mode = "dense";
            showControls();
            changed({ keep: true });
          })
        : null;
    const words = asked.filters.size ? "No passage with these filters fits the query." : "No passage fits the query. Other words may.";
    return element("div", { class: "empty" }, element("h2", {}, "Nothing found"), element("p", { class: "lead" }, words), element("p", {}, advice ?? ""));
  }

  function showGhosts() {
    const ghost = () => element("div", { class: "result" }, element("span"), element("div", {}, ...["short", "long", "long"].map((size) => element("div", { class: `ghost ${size}` }))));
    $("answer").replaceChildren(element("div", { class: "results", "aria-hidden": "true" }, ghost(), ghost(), ghost()));
  }

  // --- results

  function showAnswer(found, focus) {
    const within = $("answer").contains(document.activeElement);
    answer = found;
    const lists = found.lists ?? {};
    const hits = asked.compare ? Object.values(lists).flat() : found.hits;
    const number = asked.compare ? Math.max(0, ...Object.values(lists).map((list) => list.length)) : found.hits.length;
    const how = asked.compare ? "side by side" : MODES[found.mode].label;
    say(`${number ? plural(number, "result") : "No results"} · ${how} · ${took(found.took_milliseconds)}`);
    if (!hits.length) $("answer").replaceChildren(showNothing());
    else if (asked.compare) showColumns(lists);
    else showResults(found.hits);
    if (focus !== null || within) (stops()[focus ?? 0] ?? $("query")).focus({ preventScroll: true });
  }

  function showResults(hits) {
    const parts = [element("h2", { class: "unseen" }, "Results"), element("ol", { class: "results" }, ...hits.map(resultItem))];
    if (hits.length >= asked.k && asked.k < info.max_k) {
      const more = () => {
        const before = asked.k;
        asked.k = Math.min(asked.k + STEP, info.max_k);
        changed({ focus: before });
      };
      parts.push(button("Show more", more, "button more"));
    }
    $("answer").replaceChildren(...parts);
  }

  function resultItem(hit) {
    const title = element("button", { type: "button", class: "title", dir: "auto", "aria-haspopup": "dialog", onclick: () => open(hit) }, markedTitle(hit));
    title.dataset.stop = "";
    return element(
      "li",
      { class: "result" },
      element("span", { class: "rank" }, unseen("Rank "), String(hit.rank)),
      element(
        "div",
        {},
        element("h3", {}, title),
        element("p", { class: "snippet", dir: "auto" }, snippet(hit.text, hit.highlights, narrow.matches ? NARROW_SNIPPET : SNIPPET)),
        element("div", { class: "about" }, ...facts(hit)),
      ),
      standing(hit),
    );
  }

  function facts(hit) {
    const parts = Object.entries(hit.metadata).map(([field, value]) => {
      const text = `${spoken(field)}: ${value}`;
      const known = info.filter_fields[field]?.includes(String(value));
      return known
        ? element("button", { type: "button", class: "chip", title: `Filter by ${text}`, onclick: () => toggleFilter(field, String(value)) }, text)
        : element("span", { class: "chip" }, text);
    });
    if (hit.title && hit.title !== hit.passage_id) parts.push(element("bdi", { class: "mono" }, hit.passage_id));
    return parts;
  }

  // Lists that were made for the answer on view: the one asked for, and those that it is made from.
  function madeLists() {
    const hits = [answer.hits, ...Object.values(answer.lists ?? {})].flat();
    return info.modes.filter((mode) => mode === answer.mode || hits.some((hit) => (hit.ranks[mode] ?? null) !== null));
  }

  // Rank and score of a passage in each of them.
  function standing(hit) {
    const places = madeLists().map((mode) => {
      const rank = hit.ranks[mode] ?? null;
      const band = rank === null ? "none" : rank === 1 ? "first" : rank <= 3 ? "high" : rank <= 10 ? "low" : "";
      const shown = mode === answer.mode && !answer.lists;
      return element(
        "div",
        { class: shown ? `${band} shown` : band },
        element("dt", {}, MODES[mode].label),
        element("dd", { class: "place" }, ...(rank === null ? [element("span", { "aria-hidden": "true" }, "–"), unseen("not found")] : [unseen("rank "), count(rank)])),
        element("dd", { class: "score" }, ...(rank === null ? ["\u00a0"] : [unseen("score "), scoreText(hit.scores[mode])])),
      );
    });
    return element("dl", { class: "standing", "aria-label": "Rank and score in each list" }, ...places);
  }

  // --- side by side

  function showColumns(lists) {
    const line = element("p", { class: "standing-line", id: "standing-line" }, element("span", { class: "how" }, "Point at a passage to see where each list has it."));
    const columns = element("div", { class: "columns", role: "group", "aria-label": "Lists side by side" });
    const modes = info.modes.filter((mode) => lists[mode]);
    columns.append(drawing("svg", { class: "links", "aria-hidden": "true" }));
    for (const mode of modes) columns.append(column(mode, lists[mode], lists));
    $("answer").replaceChildren(element("h2", { class: "unseen" }, "Results side by side"), line, columns);
    drawLinks();
  }

  function column(mode, hits, lists) {
    const only = () => {
      asked.mode = mode;
      asked.compare = false;
      showControls();
      changed({ keep: true });
    };
    const heading = element("h3", {}, button(MODES[mode].label, only, "title"), element("small", {}, plural(hits.length, "result")));
    heading.firstChild.title = `Show only the list ${MODES[mode].label}`;
    const list = element("ol", { "aria-label": MODES[mode].label }, ...hits.map((hit) => element("li", {}, card(mode, hit, lists))));
    return element("section", { class: mode === asked.mode ? "column shown" : "column", "aria-label": MODES[mode].label }, heading, list);
  }

  // Where a passage stands in each list on view; the ranks that the server gives reach further down than those.
  function places(hit, lists) {
    return info.modes.filter((mode) => lists[mode]).map((mode) => {
      const there = lists[mode].find((other) => other.passage_id === hit.passage_id);
      return [mode, there?.rank ?? hit.ranks[mode] ?? null];
    });
  }

  function card(mode, hit, lists) {
    const told = places(hit, lists).map(([other, rank]) => `${MODES[other].label} ${rank === null ? "not found" : `rank ${rank}`}`);
    const made = element(
      "button",
      { type: "button", class: "card", "aria-haspopup": "dialog", "aria-label": `${titleOf(hit)}. ${told.join(", ")}`, onclick: () => open(hit) },
      element("span", { class: "at" }, String(hit.rank)),
      element("span", { class: "name", dir: "auto" }, markedTitle(hit)),
      element("span", { class: "text", dir: "auto" }, snippet(hit.text, hit.highlights, CARD_SNIPPET)),
      element("span", { class: "score" }, scoreText(hit.score)),
    );
    made.dataset.stop = "";
    made.dataset.passage = hit.passage_id;
    made.dataset.mode = mode;
    const point = () => pointAt(hit, lists);
    made.addEventListener("mouseenter", point);
    made.addEventListener("focus", point);
    return made;
  }

  function pointAt(hit, lists) {
    const columns = document.querySelector(".columns");
    if (!columns) return;
    columns.classList.add("pointing");
    for (const other of columns.querySelectorAll(".card, .links path")) other.classList.toggle("same", other.dataset.passage === hit.passage_id);
    const parts = places(hit, lists).map(([mode, rank]) => element("span", {}, `${MODES[mode].label} `, element("b", {}, rank === null ? "–" : `#${count(rank)}`)));
    $("standing-line").replaceChildren(element("strong", { dir: "auto" }, titleOf(hit)), ...parts);
  }

  // A line from each place of a passage to its place in the next list that has it, behind the lists between.
  function drawLinks() {
    const columns = document.querySelector(".columns");
    if (!columns) return;
    const frame = columns.getBoundingClientRect();
    const last = new Map(); // passage -> its card in the lists so far, and the number of that list
    const paths = [];
    [...columns.querySelectorAll(".column")].forEach((section, index) => {
      for (const card of section.querySelectorAll(".card")) {
        const before = last.get(card.dataset.passage);
        if (before) paths.push(link(before.card, card, frame, index - before.index > 1));
        last.set(card.dataset.passage, { card, index });
      }
    });
    columns.querySelector(".links").replaceChildren(...paths);
  }

  function link(from, to, frame, far) {
    const [a, b] = [from.getBoundingClientRect(), to.getBoundingClientRect()];
    const [x1, y1] = [a.right - frame.left, a.top + a.height / 2 - frame.top];
    const [x2, y2] = [b.left - frame.left, b.top + b.height / 2 - frame.top];
    const bend = (x2 - x1) / 2;
    const path = drawing("path", { class: far ? "far" : "", d: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}` });
    path.dataset.passage = from.dataset.passage;
    path.classList.toggle("same", from.classList.contains("same"));
    return path;
  }

  // --- one passage

  function open(hit) {
    const dialog = $("passage");
    const close = element("button", { type: "button", class: "icon", "aria-label": "Close", onclick: () => dialog.close() }, cross());
    const known = [["Passage id", hit.passage_id], ...Object.entries(hit.metadata).map(([field, value]) => [spoken(field), String(value)])];
    const body = element(
      "div",
      { class: "body" },
      standing(hit),
      element("p", { class: "text", dir: "auto" }, marked(hit.text, inUnits(hit.text, hit.highlights))),
      element("dl", { class: "pairs" }, ...known.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, element("bdi", {}, value))])),
    );
    const title = element("h2", { id: "passage-title", dir: "auto", tabindex: "-1" }, markedTitle(hit));
    dialog.replaceChildren(element("div", { class: "head" }, title, close), body);
    dialog.showModal();
    dialog.scrollTop = 0;
    title.focus({ preventScroll: true });
  }

  const cross = () => drawing("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, drawing("path", { d: "m6 6 12 12M18 6 6 18" }));

  // --- keyboard

  const stops = () => [...$("answer").querySelectorAll("[data-stop]")];

  function onKey(event) {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || $("passage").open) return;
    const typingNow = event.target.matches("input:not([type=checkbox]):not([type=radio]), textarea");
    if (event.key === "/" && !typingNow) {
      event.preventDefault();
      showTab("search", { keep: true });
      $("query").focus();
      $("query").select();
    } else if (event.key === "Escape") {
      escape(event);
    } else if (event.key.startsWith("Arrow") && (event.target === $("query") || $("answer").contains(event.target))) {
      move(event);
    }
  }

  function escape(event) {
    const menu = document.querySelector(".filter[open]");
    if (menu) {
      menu.open = false;
      menu.querySelector("summary").focus();
    } else if ($("answer").contains(event.target)) {
      $("query").focus();
    } else if (event.target === $("query") && asked.query) {
      // Browsers empty the field by themselves, without an event in some.
      event.preventDefault();
      setQuery("");
    }
  }

  function move(event) {
    const all = stops();
    const at = all.indexOf(document.activeElement);
    let to = null;
    if (event.key === "ArrowDown") to = event.target === $("query") ? all[0] : neighbour(all, at, 1);
    else if (event.key === "ArrowUp" && event.target !== $("query")) to = neighbour(all, at, -1) ?? $("query");
    else if (at >= 0 && asked.compare) to = across(all[at], event.key === "ArrowRight" ? 1 : -1);
    if (!to) return;
    event.preventDefault();
    to.focus();
    to.scrollIntoView({ block: "nearest" });
  }

  function neighbour(all, at, step) {
    const next = at < 0 ? all[0] : all[at + step];
    // Up from the top of a list leads to the search box, not into the list before it.
    return next && (at < 0 || next.dataset.mode === all[at].dataset.mode) ? next : null;
  }

  // The same passage in the next list, or what has its rank there.
  function across(from, step) {
    const sections = [...document.querySelectorAll(".column")];
    const section = sections[sections.indexOf(from.closest(".column")) + step];
    const cards = section ? [...section.querySelectorAll(".card")] : [];
    const own = [...from.closest("ol").children].indexOf(from.parentElement);
    return cards.find((other) => other.dataset.passage === from.dataset.passage) ?? cards[Math.min(own, cards.length - 1)];
  }

  // --- views

  function showTab(name, { keep = false, focus = false } = {}) {
    asked.tab = name;
    for (const tab of ["search", "report"]) {
      const selected = tab === name;
      $(`tab-${tab}`).setAttribute("aria-selected", String(selected));
      $(`tab-${tab}`).tabIndex = selected ? 0 : -1;
      $(`view-${tab}`).hidden = !selected;
    }
    $("page-title").textContent = name === "search" ? "Search" : "Report";
    writeAddress({ keep });
    if (focus) $(`tab-${name}`).focus();
    if (name === "report") loadReport();
    else drawLinks();
  }

  function onTabKey(event) {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    showTab(asked.tab === "search" ? "report" : "search", { keep: true, focus: true });
  }

  function setQuery(text, { wait = 0, keep = false } = {}) {
    asked.query = text;
    asked.k = STEP;
    if ($("query").value !== text) $("query").value = text;
    changed({ wait, keep });
  }

  // --- report of the run

  async function loadReport() {
    if (report || !info) return;
    const view = $("view-report");
    if (!info.has_report) {
      view.replaceChildren(element("div", { class: "empty" }, element("h2", {}, "No report"), element("p", {}, "This run has not measured anything yet: run its recipe to the end.")));
      return;
    }
    if (!view.children.length) view.replaceChildren(element("p", { class: "lead", role: "status" }, "Reading the report …"));
    try {
      report = await ask("/report");
      report.steps.sort((a, b) => (a.created < b.created ? -1 : a.created > b.created ? 1 : 0));
      attempts = 0;
      hush();
      showReport();
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      view.replaceChildren();
      fail(error, loadReport);
    }
  }

  function showReport() {
    const { metrics } = report;
    const parts = [reportHead(metrics), verdictList(report.verdicts)];
    if (metrics.rows.length) parts.push(...measures(metrics));
    parts.push(...cases(metrics), ...trainings(), ...stageTimes());
    if (report.hardware.length) parts.push(element("p", { class: "note" }, `Made on: ${report.hardware.join("; ")}.`));
    $("view-report").replaceChildren(...parts);
  }

  function reportHead(metrics) {
    const about = `${plural(metrics.num_queries, "judged query", "judged queries")} of the split ${metrics.split}, ${plural(metrics.num_passages, "passage")}, seed ${metrics.seed}`;
    const whole = report.html
      ? element("a", { class: "button", href: "/report.html", target: "_blank", rel: "noopener", onclick: token ? downloadReport : null }, "Full report", token ? null : unseen(" (new tab)"))
      : null;
    return element("div", { class: "heading" }, element("div", {}, element("h2", { dir: "auto" }, metrics.name), element("p", { class: "lead" }, about)), whole);
  }

  // A link cannot carry the token, so the file is fetched and saved.
  async function downloadReport(event) {
    event.preventDefault();
    const response = await fetch("/report.html", { headers: { Authorization: `Bearer ${token}` } }).catch(() => null);
    if (!response?.ok) {
      fail(new Failure(response?.status ?? 0, "The full report cannot be fetched."), () => downloadReport(event));
      return;
    }
    const address = URL.createObjectURL(await response.blob());
    element("a", { href: address, download: "report.html" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  }

  function verdictList(verdicts) {
    const signs = { good: "✓", plain: "·", warn: "!", bad: "✕" };
    const item = ({ tone, text }) => element("li", { class: tone }, element("b", { "aria-hidden": "true" }, signs[tone]), element("span", {}, text));
    return element("ul", { class: "verdicts" }, ...verdicts.map(item));
  }

  // --- measures

  function measures(metrics) {
    const best = Object.fromEntries(metrics.measures.map((name) => [name, Math.max(...metrics.rows.map((row) => row.measures[name]))]));
    const heads = ["System", ...metrics.measures, `${metrics.main} to BM25`, "p, Holm", "won / even / lost", "bytes a passage", "ms a query"];
    const rows = metrics.rows.map((row) =>
      element(
        "tr",
        { class: row.name === report.final?.name ? "final" : null },
        element("th", { scope: "row" }, row.label),
        ...metrics.measures.map((name) => element("td", { class: row.measures[name] === best[name] ? "best" : null }, row.measures[name].toFixed(3))),
        ...againstBm25(row),
        element("td", {}, row.bytes_per_passage === null ? "" : count(Math.round(row.bytes_per_passage))),
        element("td", {}, row.milliseconds_per_query === null ? "" : scoreText(row.milliseconds_per_query)),
      ),
    );
    const { test, threshold } = metrics.significance;
    const told = test === "randomization" ? "paired randomization test" : "paired t-test";
    return [
      element("h2", {}, "Measures"),
      table("Measures", heads, rows),
      element("p", { class: "note" }, `▲ better, ▼ worse than BM25 by ${metrics.main}: ${told}, p below ${threshold} after Holm's correction. Bold: the highest value of a column.`),
      ...metrics.notes.map((text) => element("p", { class: "note" }, text)),
      element("h3", {}, `${metrics.main} by stage`),
      element("div", { class: "panel" }, bars(metrics)),
    ];
  }

  function againstBm25(row) {
    if (row.difference_vs_bm25 === null) return ["", "", ""].map((text) => element("td", {}, text));
    const difference = row.difference_vs_bm25;
    const p = row.p_value_vs_bm25_holm;
    const sign = p !== null && p < report.metrics.significance.threshold && difference !== 0 ? (difference > 0 ? "up" : "down") : null;
    const told = sign && element("span", { class: sign }, sign === "up" ? " ▲" : " ▼");
    return [
      element("td", {}, `${difference < 0 ? "−" : "+"}${Math.abs(difference).toFixed(3)}`, told, sign && unseen(sign === "up" ? "significantly better" : "significantly worse")),
      element("td", {}, p === null ? "" : p < 0.001 ? "<0.001" : p.toFixed(3)),
      element("td", {}, `${count(row.wins)} / ${count(row.ties)} / ${count(row.losses)}`),
    ];
  }

  function table(name, heads, rows) {
    const head = element("thead", {}, element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text))));
    return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, element("table", {}, head, element("tbody", {}, ...rows)));
  }

  function bars(metrics) {
    const values = metrics.rows.map((row) => row.measures[metrics.main]);
    const highest = Math.max(1, ...values);
    const lines = metrics.rows.flatMap((row, index) => {
      const style = row.name === report.final?.name ? "final" : row.name === "bm25" ? "base" : "fill";
      return [element("span", {}, row.label), bar(values[index] / highest, style), element("span", {}, values[index].toFixed(3))];
    });
    return element("div", { class: "bars" }, ...lines);
  }

  function bar(fraction, style) {
    const width = String(100 * Math.min(1, Math.max(0, fraction)));
    return drawing(
      "svg",
      { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      drawing("rect", { class: "track", width: "100", height: "10" }),
      drawing("rect", { class: style, width, height: "10" }),
    );
  }

  // --- queries won and lost

  function cases(metrics) {
    if (report.wins === null) return [element("h2", {}, "Wins and losses"), element("p", { class: "note" }, "This report does not hold single queries; run the recipe's last step again to have them.")];
    if (!report.wins.length && !report.losses.length) return [];
    const final = metrics.rows.find((row) => row.name === report.final?.name);
    const line = `By ${metrics.main} against BM25, the ${report.final.label.toLowerCase()} wins ${count(final.wins)} queries, loses ${count(final.losses)} and is level on ${count(final.ties)}. Shown are the largest differences.`;
    const parts = [element("h2", {}, "Wins and losses"), element("p", { class: "lead" }, line)];
    for (const [name, list] of [["Wins", report.wins], ["Losses", report.losses]]) {
      if (list.length) parts.push(element("h3", {}, name), caseList(list));
    }
    return parts;
  }

  function caseList(list) {
    const made = element("div", { class: "cases" }, ...list.slice(0, CASES_AT_ONCE).map(oneCase));
    const rest = list.slice(CASES_AT_ONCE);
    const showRest = () => {
      const cases = rest.map(oneCase);
      made.lastChild.replaceWith(...cases);
      cases[0].firstChild.focus();
    };
    if (rest.length) made.append(element("div", {}, button(`Show ${count(rest.length)} more`, showRest)));
    return made;
  }

  function oneCase(example) {
    const rank = (value) => (value === null ? "not found" : `#${count(value)}`);
    const trySearch = () => {
      showTab("search", { keep: true });
      setQuery(example.query, { keep: true });
      $("query").focus();
    };
    return element(
      "details",
      { class: "case" },
      element("summary", {}, element("span", { class: "question", dir: "auto" }, example.query), element("span", { class: "moves" }, `BM25 ${rank(example.ranks.bm25)} → ${rank(example.ranks.final)}`)),
      element(
        "div",
        { class: "inside" },
        element(
          "div",
          { class: "trio" },
          shownPassage(example.positive, example.num_positives > 1 ? `Relevant, one of ${count(example.num_positives)}` : "Relevant"),
          shownPassage(example.tops.bm25, "First of BM25"),
          shownPassage(example.tops.final, `First of ${report.final.label}`),
        ),
        element("div", {}, button("Search this", trySearch)),
      ),
    );
  }

  function shownPassage(passage, heading) {
    if (!passage) return element("div", {}, element("h4", {}, heading), element("p", {}, "none"));
    const title = passage.title ? element("strong", { dir: "auto" }, passage.title) : null;
    return element("div", { class: passage.relevant ? "relevant" : null }, element("h4", {}, heading), title, element("p", { dir: "auto" }, passage.text));
  }

  // --- curves of training

  function trainings() {
    const panels = report.steps.flatMap((step) => {
      const charts = curvesOf(step.name);
      return charts.length ? [element("h3", {}, spoken(step.name)), element("div", { class: "panels" }, ...charts)] : [];
    });
    return panels.length ? [element("h2", {}, "Training"), element("p", { class: "lead" }, "By training step. Dots: measured on dev queries or passages held out."), ...panels] : [];
  }

  const isLoss = (name) => name.includes("loss") || ["kl", "rdrop", "listwise", "contrastive"].includes(name);

  // What a measure on passages held out is about; empty for measures of dev queries.
  function subject(name) {
    if (name.startsWith("probe_")) return "retrieval probe";
    if (name.startsWith("cls_")) return "spread of [CLS]";
    if (name.includes("accuracy_at_")) return "accuracy";
    return name.endsWith("_replaced") ? "share of tokens replaced" : "";
  }

  // Losses in one chart, then what was measured on dev queries or passages held out, like with like.
  function curvesOf(step) {
    const own = report.curves.filter((curve) => curve.step === step && curve.points.length);
    const losses = own.filter((curve) => isLoss(curve.measure)).sort((a, b) => (b.measure === "loss") - (a.measure === "loss"));
    const groups = new Map(losses.length ? [["loss", losses]] : []);
    for (const curve of own) {
      if (curve.kind !== "dev" || isLoss(curve.measure)) continue;
      const title = subject(curve.measure) || `dev ${spoken(curve.measure)}`;
      groups.set(title, [...(groups.get(title) ?? []), curve]);
    }
    return [...groups].map(([title, curves]) => chartPanel(title, curves.slice(0, 4)));
  }

  function chartPanel(title, curves) {
    const name = (curve) => `${curve.kind === "dev" && isLoss(curve.measure) ? "dev " : ""}${spoken(curve.measure)}`;
    const swatch = (index) => drawing("svg", { viewBox: "0 0 11 11", "aria-hidden": "true" }, drawing("circle", { class: `dot s${index}`, cx: "5.5", cy: "5.5", r: "5" }));
    const legend = curves.length > 1 ? element("ul", { class: "legend" }, ...curves.map((curve, index) => element("li", {}, swatch(index), name(curve)))) : null;
    const ends = curves.map(({ points, ...curve }) => `${name(curve)} from ${scoreText(points[0][1])} to ${scoreText(points[points.length - 1][1])}`);
    return element("div", { class: "panel" }, element("h4", {}, title), chart(curves, `${title} over training steps: ${ends.join("; ")}`), legend);
  }

  function chart(curves, label) {
    const [width, height, right, top, bottom] = [360, 180, 12, 10, 24];
    const points = curves.flatMap((curve) => curve.points);
    const last = Math.max(...points.map(([x]) => x)) || 1;
    const levels = ticks(Math.min(...points.map(([, y]) => y)), Math.max(...points.map(([, y]) => y)));
    const [low, high, step] = [levels[0], levels[levels.length - 1], levels[1] - levels[0]];
    const decimals = [0, 1, 2, 3, 4, 5].find((digits) => Math.abs(Number(step.toFixed(digits)) - step) < 1e-6 * step) ?? 6;
    const told = levels.map((level) => level.toFixed(decimals));
    const left = 14 + 7 * Math.max(...told.map((text) => text.length));
    const placeX = (x) => left + (x / last) * (width - left - right);
    const placeY = (y) => height - bottom - ((y - low) / (high - low)) * (height - top - bottom);
    const made = drawing("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    levels.forEach((level, index) => {
      const y = placeY(level).toFixed(1);
      made.append(drawing("line", { class: "rule", x1: left, x2: width - right, y1: y, y2: y }));
      made.append(drawing("text", { x: left - 7, y: Number(y) + 4, "text-anchor": "end" }, told[index]));
    });
    for (const [x, anchor] of [[0, "start"], [last, "end"]]) made.append(drawing("text", { x: placeX(x), y: height - 6, "text-anchor": anchor }, count(x)));
    curves.forEach((curve, index) => {
      const placed = curve.points.map(([x, y]) => [placeX(x).toFixed(1), placeY(y).toFixed(1)]);
      made.append(drawing("polyline", { class: `curve s${index}`, points: placed.map((point) => point.join(",")).join(" ") }));
      if (curve.kind === "dev" || placed.length === 1) for (const [x, y] of placed) made.append(drawing("circle", { class: `dot s${index}`, cx: x, cy: y, r: "3" }));
    });
    return made;
  }

  // Three to six round values that enclose low..high.
  function ticks(low, high) {
    const spread = high - low > 1e-12 * Math.max(1, Math.abs(high)) ? 0 : Math.abs(high) * 0.1 || 1;
    const raw = (high - low + 2 * spread) / 3;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((value) => value >= raw * (1 - 1e-9));
    const first = Math.floor((low - spread) / step + 1e-9);
    const end = Math.max(first + 1, Math.ceil((high + spread) / step - 1e-9));
    return Array.from({ length: end - first + 1 }, (_, index) => (first + index) * step);
  }

  // --- time and memory

  function stageTimes() {
    const longest = Math.max(0, ...report.steps.map((step) => step.seconds));
    const rows = report.steps.map((step) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, spoken(step.name)),
        element("td", {}, duration(step.seconds)),
        element("td", { class: "meter" }, bar(longest ? step.seconds / longest : 0, "fill")),
        element("td", {}, size(step.peak_memory_bytes)),
        element("td", {}, size(step.bytes)),
      ),
    );
    const sum = (of) => report.steps.reduce((total, step) => total + of(step), 0);
    const largest = Math.max(0, ...report.steps.map((step) => step.peak_memory_bytes));
    const total = [duration(sum((step) => step.seconds)), "", size(largest), size(sum((step) => step.bytes))];
    rows.push(element("tr", { class: "total" }, element("th", { scope: "row" }, "all"), ...total.map((text) => element("td", {}, text))));
    return [element("h2", {}, "Time and memory"), table("Time and memory", ["Step", "Time", "", "Peak memory", "On disk"], rows)];
  }

  function duration(seconds) {
    if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
    const whole = Math.round(seconds);
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
    const minutes = Math.round(whole / 60);
    return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
  }

  function size(bytes) {
    for (const [unit, scale] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
      if (bytes >= scale) return `${(bytes / scale).toFixed(bytes / scale >= 10 ? 0 : 1)} ${unit}`;
    }
    return `${bytes} B`;
  }

  // --- start

  async function boot() {
    hush();
    try {
      info = await ask("/info");
    } catch (error) {
      if (!(error instanceof Failure)) throw error;
      fail(error, boot);
      return;
    }
    attempts = 0;
    hush();
    showInfo();
    showTab(asked.tab);
    changed();
  }

  function start() {
    showTheme();
    readAddress();
    $("query").value = asked.query;
    $("form").addEventListener("submit", (event) => {
      event.preventDefault();
      changed({ keep: true });
    });
    $("query").addEventListener("input", () => {
      const slow = asked.compare || asked.mode === "rerank";
      setQuery($("query").value, { wait: slow ? SLOW_TYPING_MILLISECONDS : TYPING_MILLISECONDS });
    });
    $("compare").addEventListener("change", () => {
      asked.compare = $("compare").checked;
      changed({ keep: true });
    });
    $("theme").addEventListener("click", toggleTheme);
    for (const tab of ["search", "report"]) {
      $(`tab-${tab}`).addEventListener("click", () => showTab(tab, { keep: true }));
      $(`tab-${tab}`).addEventListener("keydown", onTabKey);
    }
    document.addEventListener("keydown", onKey);
    document.addEventListener("click", (event) => {
      for (const menu of document.querySelectorAll(".filter[open]")) if (!menu.contains(event.target)) menu.open = false;
    });
    $("passage").addEventListener("click", (event) => {
      if (event.target === $("passage")) $("passage").close();
    });
    window.addEventListener("popstate", () => {
      readAddress();
      if (!info) return;
      showInfo();
      showTab(asked.tab);
      changed();
    });
    window.addEventListener("resize", drawLinks);
    if (!asked.query && asked.tab === "search" && window.matchMedia("(hover: hover)").matches) $("query").focus();
    boot();
  }

  document.addEventListener("DOMContentLoaded", start);
})();
