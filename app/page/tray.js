// What the page shows of uploads: a tray at the foot of every view.

import { recordAddress } from "./hit.js";
import { announce, icon, make } from "./dom.js";
import { TRAVELLING, uploads } from "./uploads.js";
import { onSpeak, percent, say, size } from "./words.js";

const ROWS = 60;
const FIRST = ["sending", "pausing", "lost", "interrupted", "failed", "processing", "pending", "waiting"];
const FINISHED = new Set(["ready", "duplicate", "accepted"]);

const tray = document.querySelector("#uploads");
const list = tray.querySelector("ul");
const summary = tray.querySelector("summary .words");
const bar = tray.querySelector("progress");
const clear = tray.querySelector(".clear");
const rows = new WeakMap();
let drawing = null;
let last = "";
const details = tray.querySelector("details");
const moving = { settled: true };

uploads.addEventListener("change", () => (drawing ??= requestAnimationFrame(draw)));
onSpeak(draw);
clear.addEventListener("click", () => {
  tray.querySelector(".note").textContent = "";
  uploads.clear();
});

function draw() {
  drawing = null;
  const all = uploads.all;
  const note = tray.querySelector(".note").textContent;
  tray.hidden = !all.length && !note;
  document.body.classList.toggle("has-tray", !tray.hidden);
  const count = (wanted) => all.filter(({ state }) => wanted.has(state)).length;
  const done = count(FINISHED);
  const failed = count(new Set(["failed"]));
  const interrupted = count(new Set(["interrupted"]));
  summary.textContent = [
    say("uploads.summary", { done, n: all.length }),
    failed && say("uploads.failed", { n: failed }),
    interrupted && say("uploads.interrupted", { n: interrupted }),
  ].filter(Boolean).join(" · ");
  bar.max = all.length || 1;
  bar.value = all.reduce((sum, upload) => sum + share(upload), 0);
  bar.hidden = done + failed + interrupted === all.length;
  clear.hidden = !(done + failed || note);
  // those that need somebody, and those that move, come first
  const order = (upload) => (FIRST.indexOf(upload.state) + 1 || FIRST.length + 1);
  const shown = [...all].sort((one, other) => order(one) - order(other)).slice(0, ROWS);
  const wanted = (all.length <= ROWS ? all : shown).map(row);
  if (wanted.length !== list.children.length || wanted.some((one, at) => list.children[at] !== one)) list.replaceChildren(...wanted);
  const more = tray.querySelector(".rest");
  more.textContent = all.length > ROWS ? say("uploads.more", { n: all.length - ROWS }) : "";
  const settled = bar.hidden && all.length > 0;
  const told = `${done}/${failed}/${interrupted}`;
  if (settled && told !== last) announce(`${say("uploads.title")}: ${summary.textContent}`);
  if (settled) last = told;
  // done without a fault: out of the way, until there is more
  if (settled && !moving.settled && !failed && !interrupted && !note) details.open = false;
  if (!settled && moving.settled) details.open = true;
  moving.settled = settled;
}

/** How much of its way an upload has behind it, from 0 to 1. */
function share(upload) {
  if (TRAVELLING.has(upload.state)) return 0.6 * (upload.sent ?? 0);
  return { pending: 0.6, processing: 0.8 }[upload.state] ?? 1;
}

function row(upload) {
  const speaks = document.documentElement.lang;
  const kept = rows.get(upload);
  const looks = `${upload.state}/${upload.left ?? ""}/${speaks}`;
  if (kept && kept.looks === looks) {
    if (upload.state === "sending") progressed(kept.element, upload);
    return kept.element;
  }
  const bad = ["failed", "interrupted"].includes(upload.state);
  const element = make("li", { class: `upload ${upload.state}` },
    make("div", { class: "what" },
      upload.id && upload.where && upload.state !== "failed"
        ? make("a", { class: "name", dir: "auto", href: recordAddress({ id: upload.id, collection: upload.where }), "data-here": true }, upload.metadata?.title ?? upload.name)
        : make("span", { class: "name", dir: "auto" }, upload.metadata?.title ?? upload.name),
      make("span", { class: "quiet" }, size(upload.size))),
    make("div", { class: "how" }, make("span", { class: "state" }, words(upload)),
      bad && upload.error?.detail && make("span", { class: "why", dir: "auto" }, upload.error.detail),
      bad && upload.error?.requestId && make("span", { class: "why" }, say("error.id", { id: upload.error.requestId }))),
    uploads.canRetry(upload) && make("button", { type: "button", class: "retry", onclick: () => uploads.retry(upload) }, icon("again"), say("retry")),
    make("button", { type: "button", class: "round", "aria-label": say("upload.forget", { name: upload.name }), onclick: () => uploads.forget(upload) }, icon("close")),
    upload.state === "sending" && make("progress", { max: "1", "aria-label": upload.name }));
  if (upload.state === "sending") progressed(element, upload);
  rows.set(upload, { element, looks });
  return element;
}

function words(upload) {
  if (upload.state === "sending") return say("upload.sending", { percent: percent(upload.sent ?? 0) });
  if (upload.state === "pausing") return say("upload.pausing", { n: upload.left });
  return say(`upload.${upload.state}`);
}

function progressed(element, upload) {
  element.querySelector(".state").textContent = words(upload);
  element.querySelector("progress").value = upload.sent ?? 0;
}
