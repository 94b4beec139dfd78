// What belongs together: views and addresses, the header, and news that concern more than one of them.

import { changed, here, onChange, to } from "./address.js";
import { offerCollections, openAdding } from "./adding.js";
import { announce, icon } from "./dom.js";
import { openHelp } from "./keys.js";
import { showLibrary } from "./library.js";
import { player } from "./player.js";
import { trouble } from "./parts.js";
import { showRecord } from "./record.js";
import { counted, showSearch } from "./search.js";
import { ask, service } from "./service.js";
import { begin, enter, may, session } from "./session.js";
import { uploads } from "./uploads.js";
import "./tray.js";
import { onSpeak, say, speak, tongue, WORDS, written } from "./words.js";

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const header = document.querySelector("body > header");
const banner = document.querySelector("#banner");
let collections = [];
let view = null;
let last = null;

for (const place of document.querySelectorAll("[data-icon]")) place.prepend(icon(place.dataset.icon));

// --- views

function showView() {
  const wanted = here();
  const key = to({ ...wanted, record: "", of: "" });
  if (key !== last) player.stop();
  last = key;
  if (key !== view) {
    const library = wanted.view === "library";
    document.querySelector("#search").hidden = library;
    document.querySelector("#library").hidden = !library;
    for (const link of header.querySelectorAll("nav a")) {
      const on = (link.dataset.view === "library") === library;
      if (on) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    view = key;
    if (library) showLibrary(collections);
    else showSearch(collections);
  }
  showRecord();
}

/** Everything anew: other words, another key, a service that is back. */
function again() {
  view = null;
  showView();
}

async function count() {
  if (!may("read")) {
    collections = [];
    return;
  }
  const { data } = await ask("GET", "collections");
  collections = data.items;
  offerCollections(collections.map(({ name }) => name));
}

/** Counts anew and shows it, where the view is one of counts; hits that are being read stay as they are. */
async function recount() {
  await count().catch(() => {});
  const { q, like, by } = here();
  if (q || like || by) counted(collections);
  else again();
}

onChange(showView);
onSpeak(again);
service.addEventListener("session", async () => {
  header.querySelector(".add").hidden = !may("write");
  header.querySelector(".key").hidden = session.anonymous;
  header.querySelector(".key").classList.toggle("on", Boolean(session.name));
  await count().catch(() => {});
  again();
});
service.addEventListener("deleted", async () => {
  await count().catch(() => {});
  again();
});
service.addEventListener("changed", again);
let counting = null;
uploads.addEventListener("ready", () => {
  counting ??= setTimeout(() => {
    counting = null;
    recount();
  }, 800);
});

// --- the header

header.querySelector(".add").addEventListener("click", openAdding);
header.querySelector(".key").addEventListener("click", enter);
header.querySelector(".help").addEventListener("click", openHelp);

const words = header.querySelector(".words");
for (const [lang, { language }] of Object.entries(WORDS)) words.add(new Option(language, lang));
words.value = tongue;
words.addEventListener("change", () => speak(words.value));

const theme = header.querySelector(".theme");
function themed() {
  const isDark = (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  theme.setAttribute("aria-pressed", isDark);
  theme.replaceChildren(icon(isDark ? "sun" : "moon"));
}
theme.addEventListener("click", () => {
  const next = theme.getAttribute("aria-pressed") === "true" ? "light" : "dark";
  root.dataset.theme = next;
  localStorage.setItem("theme", next);
  themed();
});
dark.addEventListener("change", themed);

// --- whether the service is there

service.addEventListener("unreachable", () => {
  banner.hidden = false;
  banner.textContent = say("unreachable.trying");
});
service.addEventListener("reachable", async () => {
  banner.hidden = true;
  announce(say("reachable"));
  if (!session.known) await start();
});

async function start() {
  try {
    await begin();
  } catch (problem) {
    document.querySelector("#answer").replaceChildren(trouble(problem, start));
  }
}

written();
themed();
changed();
uploads.recall();
start();
