// The view of what is there: newest first, filtered, a page at a time; and its collections.

import { go, here, to } from "./address.js";
import { announce, make, show } from "./dom.js";
import { playButton, recordAddress, unplayable } from "./hit.js";
import { adders } from "./adding.js";
import { choose, trouble } from "./parts.js";
import { offer } from "./samples.js";
import { ask, service } from "./service.js";
import { may, session } from "./session.js";
import { clock, LANGUAGES, languageName, length, say, titleOf, told, when } from "./words.js";

const PAGE = 50;
const STATUSES = ["ready", "pending", "processing", "failed"];

const view = document.querySelector("#library");
const form = view.querySelector("form");
const list = view.querySelector("#records");
const totals = view.querySelector("#collections-list");
let asking = null;
let collections = [];

/** What the address chooses. */
export async function showLibrary(known = collections) {
  collections = known;
  const wanted = here();
  const { status, collection, lang, title } = form.elements;
  choose(status, wanted.status, [["", say("library.all")], ...STATUSES.map((one) => [one, say(`status.${one}`)])]);
  const named = [...LANGUAGES].sort((one, other) => languageName(one).localeCompare(languageName(other), document.documentElement.lang));
  choose(lang, wanted.lang, [["", say("library.lang.any")], ...named.map((one) => [one, languageName(one)])]);
  choose(collection, wanted.collection, [["", say("search.collection.all")], ...collections.map(({ name }) => [name, name])]);
  title.value = wanted.title ?? "";
  view.querySelector(".delete-many").hidden = !may("write");
  if (!session.known) return;
  showTotals(wanted);
  if (may("read")) await firstPage(wanted);
  else list.replaceChildren(make("div", { class: "empty" }, make("p", {}, may("write") ? say("key.reading") : say("key.needed"))));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  apply();
});
form.addEventListener("change", apply);

function apply() {
  const { status, collection, lang, title } = form.elements;
  go({ view: "library", status: status.value, collection: collection.value, lang: lang.value, title: title.value.trim() });
}

function showTotals(wanted) {
  totals.hidden = collections.length === 0;
  totals.replaceChildren(...collections.map((one) => {
    const on = wanted.collection === one.name;
    return make("li", {},
      make("a", { href: to({ ...wanted, record: "", of: "", collection: on ? "" : one.name }), "data-here": true, class: on ? "on" : "", "aria-current": on && "true" },
        make("bdi", { class: "name" }, one.name),
        make("span", { class: "quiet" }, `${say("collection.counts", { n: one.recordings })} · ${length(one.duration_s ?? 0)}`),
        one.failed > 0 && make("span", { class: "bad" }, say("collection.failed", { n: one.failed }))));
  }));
}

/** The API's filter for what the address chooses; null where it chooses nothing by it. */
function filterOf({ lang, title }) {
  const filter = { ...(lang && { lang }), ...(title && { metadata: { title } }) };
  return Object.keys(filter).length ? filter : null;
}

async function page(wanted, cursor, signal) {
  const filter = filterOf(wanted);
  const { data } = await ask("GET", "audio", {
    parameters: { status: wanted.status, collection: wanted.collection, filter: filter && JSON.stringify(filter), limit: PAGE, cursor },
    signal,
  });
  return data;
}

async function firstPage(wanted) {
  if (list.querySelector(".recorder.on")) return; // somebody speaks: not under their hand
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  list.setAttribute("aria-busy", "true");
  try {
    const data = await page(wanted, null, signal);
    if (!data.items.length) return empty(wanted);
    const rows = make("ol", { class: "rows" }, data.items.map(row));
    const focused = list.contains(document.activeElement) && document.activeElement.closest("[data-row]")?.getAttribute("aria-labelledby");
    list.replaceChildren(rows, more(wanted, data.next_cursor, rows));
    rows.querySelector("[data-row]").tabIndex = 0;
    if (focused) rows.querySelector(`[aria-labelledby="${CSS.escape(focused)}"]`)?.focus();
    announce(say("library.listed", { n: data.items.length }));
  } catch (problem) {
    if (problem.name === "AbortError") return;
    list.replaceChildren(trouble(problem, () => firstPage(wanted)));
    announce(told(problem));
  } finally {
    if (!signal.aborted) list.removeAttribute("aria-busy");
  }
}

function more(wanted, cursor, rows) {
  if (!cursor) return "";
  const button = make("button", { type: "button", class: "more", onclick: async () => {
    button.disabled = true;
    try {
      const data = await page(wanted, cursor);
      const added = data.items.map(row);
      rows.append(...added);
      button.replaceWith(more(wanted, data.next_cursor, rows));
      added[0]?.querySelector("[data-row]").focus();
      announce(say("library.listed", { n: rows.children.length }));
    } catch (problem) {
      button.replaceWith(trouble(problem, () => firstPage(wanted)));
    }
  } }, say("library.more"));
  return button;
}

function empty(wanted) {
  const filtered = wanted.status || wanted.collection || wanted.lang || wanted.title;
  const inside = filtered
    ? [make("p", {}, say("library.none")), make("button", { type: "button", onclick: () => go({ view: "library" }) }, say("library.unfilter"))]
    : may("write")
      ? [make("h2", {}, say("empty.title")), make("p", {}, say("empty.lead")), adders(), offer()]
      : [make("p", {}, say("empty.reading"))];
  list.replaceChildren(make("div", { class: "empty" }, inside));
}

function row(record) {
  const name = `record-${record.id}-${record.collection}`;
  const facts = [
    record.lang && languageName(record.lang),
    record.duration_s !== null && clock(record.duration_s),
    when(record.created_at),
  ].filter(Boolean);
  return make("li", {},
    make("article", { class: "row", "data-row": true, tabindex: "-1", "aria-labelledby": name },
      playButton(record, 0, null, { small: true }),
      make("div", { class: "what" },
        make("h2", { id: name, dir: "auto" }, make("a", { class: "open", href: recordAddress(record), "data-here": true }, titleOf(record))),
        make("ul", { class: "facts" }, facts.map((fact) => make("li", {}, fact)), make("li", {}, make("bdi", {}, record.collection))),
        record.error && make("p", { class: "why", dir: "auto" }, record.error.detail),
        unplayable(record)),
      record.status !== "ready" && make("span", { class: `status ${record.status}` }, say(`status.${record.status}`)),
      make("a", { class: "button", href: recordAddress(record), "data-here": true, tabindex: "-1", "aria-hidden": "true" }, say("hit.details"))));
}

// --- deleting all that are chosen

view.querySelector(".delete-many").addEventListener("click", async () => {
  const wanted = here();
  const filter = filterOf(wanted);
  const all = !filter && !wanted.status;
  const body = {
    ...(wanted.collection && { collection: wanted.collection }),
    ...(wanted.status && { status: wanted.status }),
    ...(filter && { filter }),
    ...(all && { all }),
  };
  try {
    const { data } = await ask("POST", "audio/delete", { body: { ...body, dry_run: true } });
    confirmMany(data.matched, body, all && !wanted.collection);
  } catch (problem) {
    list.prepend(trouble(problem));
  }
});

function confirmMany(n, body, everything) {
  const wrong = make("p", { class: "wrong", role: "status" });
  const typed = make("input", { id: "count", inputmode: "numeric", autocomplete: "off", dir: "ltr", oninput: () => (yes.disabled = typed.value.trim() !== String(n)) });
  const yes = make("button", { type: "submit", class: "danger", disabled: n > 0 && everything }, say("delete.go"));

  async function remove(event) {
    event.preventDefault();
    yes.disabled = true;
    let deleted = 0;
    try {
      for (let more = true; more; ) {
        const { data } = await ask("POST", "audio/delete", { body: { ...body, limit: 200 } });
        deleted += data.deleted;
        more = data.more && data.deleted > 0;
        wrong.textContent = say("delete.many.at", { n: deleted });
      }
    } catch (problem) {
      wrong.textContent = `${say("delete.many.at", { n: deleted })} ${told(problem)}`;
      yes.disabled = false;
      return;
    }
    dialog.close();
    announce(say("delete.many.done", { n: deleted }));
    service.dispatchEvent(new Event("deleted"));
  }

  const dialog = show(
    make("dialog", { class: "small", "aria-labelledby": "many-title" },
      make("form", { onsubmit: remove },
        make("h2", { id: "many-title" }, n ? say("delete.many.title", { n }) : say("delete.many.none")),
        n > 0 && make("p", {}, everything ? say("delete.many.all") : say("delete.many.filter")),
        n > 0 && make("p", { class: "quiet" }, say("delete.why")),
        n > 0 && everything && [make("label", { for: "count" }, say("delete.many.type", { n: String(n) })), typed],
        wrong,
        make("div", { class: "buttons" },
          make("button", { type: "button", autofocus: true, onclick: () => dialog.close() }, n ? say("cancel") : say("close")),
          n > 0 && yes))));
}

service.addEventListener("reachable", () => list.querySelector(".trouble") && showLibrary());
