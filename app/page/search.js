// The view where people ask, in words, by voice, or with a recording that is there.

import { go, here } from "./address.js";
import { announce, icon, make } from "./dom.js";
import { hitCard } from "./hit.js";
import { NoMicrophone, record } from "./microphone.js";
import { player } from "./player.js";
import { chips, offer, questions } from "./samples.js";
import { ask, service } from "./service.js";
import { may, session } from "./session.js";
import { LANGUAGES, languageName, say, titleOf, told } from "./words.js";
import { choose, trouble } from "./parts.js";
import { adders } from "./adding.js";

const LIMIT = 10;
const MOST = 100;
const SOON_MS = 150;
const HELD_MS = 400;
const SHORTEST_S = 0.6;
const LONGEST_S = 30;
const SILENCE = 0.25;

const view = document.querySelector("#search");
const form = view.querySelector("form");
const box = form.elements.q;
const microphone = view.querySelector("#ask-by-voice");
const answer = view.querySelector("#answer");
let asking = null;
let sound = null;
let shown = null;
let settled = null;
let collections = [];

/** What the address asks; `totals` are the collections. */
export async function showSearch(totals = collections) {
  collections = totals;
  const wanted = here();
  fields(wanted);
  if (!session.known) return;
  if (sound && wanted.by !== "voice") sound = null;
  if (wanted.q || wanted.like || sound) await find(wanted);
  else start();
}

/** There are others by now; hits that are being read stay as they are. */
export function counted(totals) {
  collections = totals;
  answer.querySelector(".note")?.replaceWith(waitingNote());
}

/** To the search box, with all of its text chosen. */
export function toBox() {
  box.focus();
  box.select();
}

function fields({ ...wanted }) {
  const { lang, collection, probable } = form.elements;
  if (settled === location.search) {
    // shown anew, not asked anew: what somebody is typing stays
    Object.assign(wanted, { q: box.value, lang: lang.value, collection: collection.value, probable: probable.checked ? "1" : "" });
  }
  settled = location.search;
  box.value = wanted.q ?? "";
  const named = [...LANGUAGES].sort((one, other) => languageName(one).localeCompare(languageName(other), document.documentElement.lang));
  choose(lang, wanted.lang, [["", say("search.lang.auto")], ...named.map((lang) => [lang, languageName(lang)])]);
  choose(collection, wanted.collection, [["", say("search.collection.all")], ...collections.map(({ name }) => [name, name])]);
  collection.closest("label").hidden = collections.length < 2 && !wanted.collection;
  probable.checked = wanted.probable === "1";
  view.querySelector("[name=play-on]").checked = player.playsOn;
}

function asked() {
  return {
    lang: form.elements.lang.value,
    collection: form.elements.collection.value,
    probable: form.elements.probable.checked ? "1" : "",
  };
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const q = box.value.trim();
  sound = null;
  if (matchMedia("(pointer: coarse)").matches) box.blur(); // its keyboard covers what was found
  go(q ? { q, ...asked() } : asked());
});
form.addEventListener("change", ({ target }) => {
  if (target.name === "play-on") {
    player.playsOn = target.checked;
    return;
  }
  if (target === box) return;
  const { q, like, at_s, in: within, by } = here();
  go({ q: like || by ? q : box.value.trim(), like, at_s, in: within, by, ...asked() }, { replace: true });
});
box.addEventListener("search", () => box.value || go(asked())); // the box's own cross

// --- an answer

async function find(wanted) {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  player.stop();
  const question = what(wanted);
  const soon = setTimeout(() => waiting(question), SOON_MS);
  answer.setAttribute("aria-busy", "true");
  try {
    const limit = Math.min(MOST, Number(wanted.limit) || LIMIT);
    const common = { lang: wanted.lang, collection: wanted.collection, limit, min_score: wanted.probable === "1" ? "auto" : "" };
    const { data } = sound
      ? await ask("POST", "search/audio", { parameters: common, body: sound, headers: { "Content-Type": sound.type }, signal })
      : wanted.like
        ? await ask("GET", "search", { parameters: { ...common, like: wanted.like, at_s: wanted.at_s, like_collection: wanted.in }, signal })
        : await ask("GET", "search", { parameters: { ...common, q: wanted.q }, signal });
    clearTimeout(soon);
    hits(data, wanted, limit);
  } catch (problem) {
    if (problem.name === "AbortError") return;
    clearTimeout(soon);
    if (problem.code === "not_calibrated") {
      const toggle = form.elements.probable;
      Object.assign(toggle, { checked: false, disabled: true });
      toggle.closest("label").title = say("search.probable.not");
      announce(say("search.probable.not"));
      go({ ...wanted, probable: "" }, { replace: true });
      return;
    }
    answer.replaceChildren(...question, trouble(problem, () => find(wanted)));
    announce(told(problem));
  } finally {
    clearTimeout(soon);
    if (!signal.aborted) answer.removeAttribute("aria-busy");
  }
}

/** What was asked, where it does not stand in the box. */
function what(wanted) {
  if (!wanted.like && !sound) return [];
  const title = make("bdi", {}, wanted.like);
  const words = sound ? say("search.sound") : say("search.like", { title: "\u0000" });
  const [before, after] = words.split("\u0000");
  if (wanted.like) {
    ask("GET", `audio/${encodeURIComponent(wanted.like)}`, { parameters: { collection: wanted.in } })
      .then(({ data }) => (title.textContent = titleOf(data)), () => {});
  }
  return [make("p", { class: "asked" }, icon(sound ? "microphone" : "like"),
    make("span", {}, before, wanted.like && title, after),
    make("button", { type: "button", class: "plain", onclick: () => { sound = null; go(asked()); toBox(); } }, say("search.clear")))];
}

function waiting(question) {
  const card = () => make("li", {}, make("div", { class: "card skeleton" }, make("div"), make("div"), make("div")));
  answer.replaceChildren(...question, make("p", { class: "quiet" }, say("search.searching")), make("ol", { class: "hits", "aria-hidden": "true" }, card(), card(), card()));
}

function hits(data, wanted, limit) {
  const n = data.hits.length;
  const question = what(wanted);
  if (!n) {
    const [words, label, change] =
      wanted.probable === "1" ? [say("search.none.probable"), say("search.none.probable.more"), { probable: "" }]
      : wanted.collection ? [`${say("search.none")} ${say("search.none.collection", { collection: wanted.collection })}`, say("search.none.collection.more"), { collection: "" }]
      : collections.some(({ ready }) => ready) ? [say("search.none")] : [say("search.none.empty")];
    answer.replaceChildren(...question, make("div", { class: "empty" },
      make("p", {}, words), label && make("button", { type: "button", onclick: () => go({ ...wanted, ...change }) }, label)));
    announce(words);
    return;
  }
  const ms = Math.round(data.took_ms.total);
  answer.replaceChildren(...question,
    make("p", { class: "quiet count" }, say("search.hits", { n, ms })), waitingNote(),
    make("ol", { class: "hits" }, data.hits.map(hitCard)),
    n === limit && limit < MOST && make("button", {
      type: "button", class: "more", onclick: () => go({ ...wanted, limit: Math.min(MOST, limit + 2 * LIMIT) }, { replace: true }),
    }, say("search.more")) || "");
  answer.querySelector("[data-row]").tabIndex = 0;
  announce(say("search.spoken", { n, title: titleOf(data.hits[0]) }));
}

function waitingNote() {
  const n = collections.reduce((sum, one) => sum + one.recordings - one.ready - one.failed, 0);
  return n > 0 ? make("p", { class: "note" }, say("search.waiting", { n })) : document.createTextNode("");
}

// --- before anything is asked

async function start() {
  asking?.abort();
  answer.removeAttribute("aria-busy");
  if (answer.querySelector(".recorder.on")) return; // somebody speaks: not under their hand
  if (!may("read")) {
    answer.replaceChildren(make("div", { class: "empty" }, make("p", {}, may("write") ? say("key.reading") : say("key.needed"))));
    return;
  }
  const n = collections.reduce((sum, one) => sum + one.recordings, 0);
  if (!n) {
    answer.replaceChildren(make("div", { class: "empty" },
      make("h2", {}, say("empty.title")),
      ...(may("write") ? [make("p", {}, say("empty.lead")), adders(), offer()] : [make("p", {}, say("empty.reading"))])));
    return;
  }
  const found = await questions();
  // drawn anew only where it differs, since uploads that become ready ask for it while somebody reads
  const looks = JSON.stringify([document.documentElement.lang, waitingNote().textContent, found?.length]);
  if (shown?.isConnected && shown.looks === looks) return;
  if (here().q || here().like || here().by || here().view) return; // meanwhile
  shown = make("div", { class: "empty" }, make("h2", {}, say("start.title")), make("p", {}, say("start.lead")), waitingNote());
  shown.looks = looks;
  if (found) shown.append(make("p", { class: "quiet" }, say("start.try")), chips(found));
  answer.replaceChildren(shown);
}

// --- by voice

let listening = null;
let pressed = 0;

async function listen() {
  listening = { stop: async () => null };
  player.stop();
  try {
    const recorder = await record((level) => microphone.style.setProperty("--level", level.toFixed(2)));
    if (!listening) {
      await recorder.stop();
      return;
    }
    listening = recorder;
    listening.limit = setTimeout(finish, 1000 * LONGEST_S);
    microphone.classList.add("on");
    microphone.setAttribute("aria-pressed", "true");
    voiceSays(say("search.listening"));
  } catch (error) {
    listening = null;
    if (!(error instanceof NoMicrophone)) throw error;
    voiceSays(error.message, true);
  }
}

async function finish() {
  const recorder = listening;
  listening = null;
  if (!recorder) return;
  clearTimeout(recorder.limit);
  microphone.classList.remove("on");
  microphone.setAttribute("aria-pressed", "false");
  const recorded = await recorder.stop();
  if (!recorded) return;
  if (recorded.seconds < SHORTEST_S) return voiceSays(say("microphone.short"), true);
  if (recorded.loudest < SILENCE) return voiceSays(say("microphone.silent"), true);
  voiceSays("");
  sound = recorded.sound;
  go({ by: "voice", ...asked() });
}

function voiceSays(words, wrong = false) {
  const line = view.querySelector("#voice");
  line.textContent = words;
  line.classList.toggle("wrong", wrong);
  announce(words);
}

// Held, it listens until it is let go; pressed shortly, until it is pressed again.
microphone.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  event.preventDefault();
  microphone.focus();
  if (listening) return void finish();
  pressed = performance.now();
  listen();
});
addEventListener("pointerup", () => {
  if (pressed && performance.now() - pressed > HELD_MS && listening) finish();
  pressed = 0;
});
microphone.addEventListener("click", (event) => {
  if (event.detail) return; // of a pointer, which was heard above
  if (listening) finish();
  else listen();
});
service.addEventListener("reachable", () => answer.querySelector(".trouble") && showSearch());
