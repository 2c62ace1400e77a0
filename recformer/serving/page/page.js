"use strict";
// Everything shown is set as text, never as markup: titles come from anywhere.

const SHOWN = 10;
const LOOKED_AT = 100; // for the place of what really came next
const EXPLAINED = 5; // items of the history in an explanation
const KEY = "recformer-key";
const byId = (id) => document.getElementById(id);

const state = { facts: null, history: [], target: null, added: [], places: {}, asked: 0 };

async function call(method, path, body) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers["X-API-Key"] = key;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  if (answer.status === 401) {
    sessionStorage.removeItem(KEY);
    byId("key-form").hidden = false;
    byId("key").focus();
  }
  const read = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(read.detail || `the service answered ${answer.status}`);
  return read;
}

function guarded(work) {
  return async (...values) => {
    try {
      await work(...values);
      byId("problem").hidden = true;
    } catch (error) {
      byId("problem").textContent = error.message;
      byId("problem").hidden = false;
    }
  };
}

function made(name, text, className) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function button(text, label, work) {
  const element = made("button", text, "quiet");
  element.type = "button";
  element.setAttribute("aria-label", label);
  element.addEventListener("click", work);
  return element;
}

function detailsOf(item) {
  return Object.entries(item.attributes)
    .filter(([name]) => name !== state.facts.title)
    .map(([, value]) => (Array.isArray(value) ? value.join(", ") : String(value)))
    .filter((text) => text)
    .join(" · ");
}

const number = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(3));
const signed = (value) => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(3);

// --- the history ------------------------------------------------------------------------------

function add(item) {
  state.history.push(item);
  historyChanged();
}

function historyChanged() {
  const list = byId("history");
  list.replaceChildren(
    ...state.history.map((item, place) => {
      const row = made("li");
      const title = made("span", item.title);
      title.title = item.title;
      row.append(
        title,
        button("Remove", `Remove ${item.title}`, () => {
          state.history.splice(place, 1);
          historyChanged();
          const left = list.querySelectorAll("button");
          (left[Math.min(place, left.length - 1)] || byId("search")).focus();
        }),
      );
      return row;
    }),
  );
  byId("history-empty").hidden = state.history.length > 0;
  byId("clear").disabled = state.history.length === 0;
  recommend();
}

let typing = null;
byId("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(search, 120);
});

const search = guarded(async () => {
  const query = byId("search").value.trim();
  const found = query ? await call("GET", `v1/search?k=20&q=${encodeURIComponent(query)}`) : null;
  if (query !== byId("search").value.trim()) return; // typed on meanwhile
  const rows = (found ? found.items : []).map((item) => {
    const choose = made("button");
    choose.type = "button";
    choose.append(made("span", item.title), made("span", "  " + detailsOf(item), "faint"));
    choose.addEventListener("click", () => {
      add(item);
      byId("search").value = "";
      byId("found").replaceChildren();
      byId("search").focus();
    });
    const row = made("li");
    row.append(choose);
    return row;
  });
  if (found && !rows.length) rows.push(made("li", "no product has these words", "faint"));
  byId("found").replaceChildren(...rows);
});

// Arrows walk from the search field through what was found, Escape leaves.
function walk(event) {
  const stops = [byId("search"), ...byId("found").querySelectorAll("button")];
  const place = stops.indexOf(document.activeElement);
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && place >= 0 && stops[place + step]) {
    stops[place + step].focus();
    event.preventDefault();
  } else if (event.key === "Enter" && place === 0 && stops.length > 1) {
    stops[1].click();
    event.preventDefault();
  } else if (event.key === "Escape") {
    byId("search").value = "";
    byId("found").replaceChildren();
    byId("search").focus();
  }
}
byId("search").addEventListener("keydown", walk);
byId("found").addEventListener("keydown", walk);

byId("clear").addEventListener("click", () => {
  state.history = [];
  state.target = null;
  byId("next").replaceChildren();
  historyChanged();
  byId("search").focus();
});

const takeUser = guarded(async (which) => {
  const user = await call("GET", `v1/test_users/${which}`);
  byId("user").value = which;
  state.history = user.history;
  state.target = user.target;
  historyChanged();
});

byId("user-form").addEventListener("submit", (event) => {
  event.preventDefault();
  takeUser(Number(byId("user").value));
});
byId("another").addEventListener("click", () => {
  takeUser(Math.floor(Math.random() * state.facts.test_users));
});

// --- recommendations --------------------------------------------------------------------------

byId("seen").addEventListener("change", () => recommend());

const entries = () => state.history.map((item) => item.item);

const recommend = guarded(async () => {
  const asked = ++state.asked;
  const answers = await Promise.all(
    state.facts.models.map((model) =>
      call("POST", "v1/recommend", {
        history: entries(),
        k: Math.min(state.target ? LOOKED_AT : SHOWN, state.facts.most),
        filter_seen: byId("seen").checked,
        model: model.name,
      }),
    ),
  );
  if (asked !== state.asked) return; // the history has moved on
  answers.forEach((answer) => show(answer));
  say(answers);
  showTarget(answers);
  if (!answers[0].fallback) {
    await Promise.all(answers.map((answer) => showReasons(answer, asked)));
  }
});

function say(answers) {
  const texts = [];
  if (answers[0].fallback === "popular") texts.push("What most people buy: the history is empty.");
  if (answers[0].fallback === "newest") texts.push("The newest products: the history is empty.");
  if (answers.length === 2) {
    const [left, right] = answers.map((answer) => answer.items.slice(0, SHOWN));
    const names = new Set(left.map((item) => item.item));
    const both = right.filter((item) => names.has(item.item)).length;
    texts.push(`${both} of ${Math.max(left.length, right.length)} in both lists.`);
  }
  byId("status").textContent = texts.join(" ");
}

function show(answer) {
  const list = byId(`items-${answer.model}`);
  const before = state.places[answer.model] || new Map();
  const tops = new Map();
  for (const row of list.children) tops.set(row.dataset.item, row.getBoundingClientRect().top);
  const items = answer.items.slice(0, SHOWN);
  const highest = Math.max(...items.map((item) => item.score), 1e-9);
  const rows = items.map((item, place) => itemRow(answer, item, place, highest, before));
  list.replaceChildren(...rows);
  state.places[answer.model] = new Map(items.map((item, place) => [item.item, place]));
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const row of rows) {
    const top = tops.get(row.dataset.item);
    const way = top === undefined ? 0 : top - row.getBoundingClientRect().top;
    const from = top === undefined ? { opacity: 0 } : { transform: `translateY(${way}px)` };
    if (tops.size) row.animate([from, {}], { duration: 300, easing: "ease-out" });
  }
}

function itemRow(answer, item, place, highest, before) {
  const row = byId("item-template").content.firstElementChild.cloneNode(true);
  const part = (name) => row.querySelector(name);
  row.dataset.item = item.item;
  row.classList.toggle("target", Boolean(state.target && state.target.item === item.item));
  row.classList.toggle("new", state.added.some((each) => each.item === item.item));
  part(".place").textContent = place + 1;
  part(".title").textContent = item.title;
  part(".title").title = item.title;
  part(".details").textContent = detailsOf(item);
  part(".score").textContent = number(item.score);
  part(".bar div").style.width = `${Math.max(0, (100 * item.score) / highest)}%`;
  const moved = part(".moved");
  if (before.size && !before.has(item.item)) {
    moved.textContent = "new";
    moved.classList.add("up");
  } else if (before.size && before.get(item.item) !== place) {
    const way = before.get(item.item) - place;
    moved.textContent = way > 0 ? `▲ ${way}` : `▼ ${-way}`;
    moved.classList.add(way > 0 ? "up" : "down");
    moved.setAttribute("aria-label", `${Math.abs(way)} places ${way > 0 ? "up" : "down"}`);
  }
  part(".take").setAttribute("aria-label", `Add ${item.title} to the history`);
  part(".take").addEventListener("click", () => add(item));
  const why = part(".why");
  why.setAttribute("aria-label", `Why ${item.title}?`);
  why.hidden = Boolean(answer.fallback);
  why.addEventListener(
    "click",
    guarded(async () => {
      const open = why.getAttribute("aria-expanded") === "true";
      why.setAttribute("aria-expanded", String(!open));
      part(".explanation").hidden = open;
      if (!open) await explain(part(".explanation"), item, answer.model);
    }),
  );
  return row;
}

async function explain(place, item, model) {
  const asked = { history: entries(), item: item.item, model };
  const found = await call("POST", "v1/explain", asked);
  const table = made("table");
  const line = (text, value) => {
    const row = made("tr");
    row.append(made("td", text), made("td", signed(value)));
    table.append(row);
  };
  const parts = [...found.history].sort((a, b) => Math.abs(b.carries) - Math.abs(a.carries));
  for (const part of parts.slice(0, EXPLAINED)) line(part.title, part.carries);
  const rest = parts.slice(EXPLAINED).reduce((sum, part) => sum + part.carries, 0);
  if (parts.length > EXPLAINED) line(`${parts.length - EXPLAINED} more of the history`, rest);
  line("the history jointly", found.history_remainder);
  for (const part of found.attributes) line(`its ${part.attribute}`, part.carries);
  place.replaceChildren(made("p", found.sentence), table);
}

async function showReasons(answer, asked) {
  const items = answer.items.slice(0, SHOWN).map((item) => item.item);
  if (!items.length) return;
  const body = { history: entries(), items, model: answer.model };
  const found = await call("POST", "v1/reasons", body);
  if (asked !== state.asked) return;
  const reasons = new Map(found.reasons.map((reason) => [reason.item, reason]));
  for (const row of byId(`items-${answer.model}`).children) {
    const reason = reasons.get(row.dataset.item);
    const place = row.querySelector(".reason");
    if (!reason || !reason.because) continue;
    place.textContent = `${signed(reason.carries)} from “${reason.because}”`;
    place.title = place.textContent;
  }
}

function showTarget(answers) {
  const place = byId("next");
  if (!state.target) return place.replaceChildren();
  const places = answers.map((answer) => {
    const rank = answer.items.findIndex((item) => item.item === state.target.item) + 1;
    const name = answers.length > 1 ? `${state.facts.models.find((m) => m.name === answer.model).folder}: ` : "";
    return name + (rank ? `place ${rank}` : `not among the first ${answer.items.length}`);
  });
  place.replaceChildren(
    made("span", "What really came next: "),
    made("strong", state.target.title),
    made("span", ` (${places.join("; ")})`),
  );
}

// --- new products -----------------------------------------------------------------------------

byId("add-form").addEventListener(
  "submit",
  guarded(async (event) => {
    event.preventDefault();
    const title = byId("add-title").value.trim();
    if (!title) return;
    const name = `page-${Date.now().toString(36)}${Math.floor(Math.random() * 1e6).toString(36)}`;
    const labels = {};
    for (const field of byId("add-more").querySelectorAll("input")) {
      if (field.value.trim()) labels[field.name] = field.value.trim();
    }
    const start = performance.now();
    await call("POST", "api/item", { ItemId: name, Comment: title, Labels: labels });
    const milliseconds = Math.round(performance.now() - start);
    const item = { item: name, title, attributes: { [state.facts.title]: title, ...labels } };
    state.added.push(item);
    byId("add-form").reset();
    byId("added-note").textContent = `“${title}” is in the catalogue after ${milliseconds} ms.`;
    showAdded();
    await loadFacts();
    await recommend();
  }),
);

function showAdded() {
  byId("added").replaceChildren(
    ...state.added.map((item) => {
      const row = made("li");
      row.append(
        made("span", item.title),
        button("Add to history", `Add ${item.title} to the history`, () => add(item)),
        button(
          "Delete",
          `Delete ${item.title} from the catalogue`,
          guarded(async () => {
            await call("DELETE", `api/item/${encodeURIComponent(item.item)}`);
            state.added = state.added.filter((each) => each !== item);
            state.history = state.history.filter((each) => each.item !== item.item);
            byId("added-note").textContent = `“${item.title}” is gone.`;
            showAdded();
            await loadFacts();
            historyChanged();
          }),
        ),
      );
      return row;
    }),
  );
}

// --- the start --------------------------------------------------------------------------------

async function loadFacts() {
  state.facts = await call("GET", "v1/facts");
  byId("facts").textContent = state.facts.models
    .map((model) => `${model.folder}: ${model.items.toLocaleString("en")} products`)
    .join(" · ");
}

const start = guarded(async () => {
  await loadFacts();
  byId("key-form").hidden = true;
  byId("user-form").hidden = !state.facts.test_users;
  byId("user").max = state.facts.test_users - 1;
  const others = state.facts.attributes.filter((name) => name !== state.facts.title).slice(0, 2);
  byId("add-more").replaceChildren(
    ...others.map((name) => {
      const label = made("label", name);
      const field = made("input");
      field.name = name;
      field.maxLength = 500;
      field.autocomplete = "off";
      label.append(field);
      return label;
    }),
  );
  byId("models").replaceChildren(
    ...state.facts.models.map((model) => {
      const column = byId("model-template").content.firstElementChild.cloneNode(true);
      column.querySelector("h3").textContent = `${model.folder} (method ${model.method})`;
      column.querySelector("ol").id = `items-${model.name}`;
      return column;
    }),
  );
  byId("controls").disabled = false; // what they do needs the facts
  await recommend();
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value);
  start();
});

start();
