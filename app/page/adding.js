// How recordings come onto the page: dropped anywhere, chosen, or spoken into the microphone.

import { announce, icon, make, show } from "./dom.js";
import { NoMicrophone, record } from "./microphone.js";
import { choose } from "./parts.js";
import { service } from "./service.js";
import { may, session } from "./session.js";
import { uploads } from "./uploads.js";
import { clock, LANGUAGES, languageName, say, when } from "./words.js";

const KEEP = "batch";
const AUDIBLE = /\.(aac|aif|aiff|amr|caf|flac|m4a|m4b|mka|mkv|mov|mp3|mp4|mpga|oga|ogg|opus|wav|wave|weba|webm|wma)$/i;

/** What is said of all recordings that are added, until it is changed. */
const batch = { lang: "", collection: "", ...JSON.parse(sessionStorage.getItem(KEEP) ?? "{}") };
let known = [];

/** The collections that are offered. */
export function offerCollections(names) {
  known = names;
}

/** Buttons to choose files, choose a folder, or record. */
export function adders() {
  const files = make("input", { type: "file", multiple: true, hidden: true, accept: "audio/*,video/*,.opus,.flac,.mka", onchange: () => chosen(files) });
  const folder = make("input", { type: "file", webkitdirectory: true, hidden: true, onchange: () => chosen(folder, true) });
  return make("div", { class: "buttons adders" },
    make("button", { type: "button", class: "primary", onclick: () => files.click() }, icon("file"), say("add.files")),
    make("button", { type: "button", onclick: () => folder.click() }, icon("folder"), say("add.folder")),
    recorder(), files, folder);
}

/** The dialog with all ways to add, and what is said of what is added. */
export function openAdding() {
  if (!may("write") || document.querySelector("#adding")) return;
  const lang = make("select", { id: "batch-lang", onchange: remember });
  const named = [...LANGUAGES].sort((one, other) => languageName(one).localeCompare(languageName(other), document.documentElement.lang));
  choose(lang, batch.lang, [["", say("add.lang.none")], ...named.map((one) => [one, languageName(one)])]);
  const limited = session.collections;
  const collection = limited
    ? make("select", { id: "batch-collection", onchange: remember })
    : make("input", { id: "batch-collection", list: "collections", dir: "auto", placeholder: say("add.collection.default"), onchange: remember });
  if (limited) choose(collection, batch.collection || limited[0], limited.map((one) => [one, one]));
  else collection.value = batch.collection;
  if (limited) remember();

  function remember() {
    Object.assign(batch, { lang: lang.value, collection: collection.value.trim() });
    sessionStorage.setItem(KEEP, JSON.stringify(batch));
  }

  const dialog = show(
    make("dialog", { id: "adding", "aria-labelledby": "adding-title" },
      make("header", {}, make("h2", { id: "adding-title" }, say("add.title")),
        make("button", { type: "button", class: "round", "aria-label": say("close"), onclick: () => dialog.close() }, icon("close"))),
      make("div", { class: "target" }, icon("upload"), make("p", {}, say("add.drop"))),
      adders(),
      make("div", { class: "pair" },
        make("div", {}, make("label", { for: "batch-lang" }, say("add.lang")), lang),
        make("div", {}, make("label", { for: "batch-collection" }, say("add.collection")), collection,
          make("datalist", { id: "collections" }, known.map((name) => make("option", { value: name }))))),
      make("p", { class: "quiet" }, say("add.lang.why"))));
}

/** Files given by hand, or those of a folder that seem to be recordings. */
export function give(files, ofFolder = false) {
  const heard = ofFolder ? files.filter(isAudible) : files;
  const skipped = files.length - heard.length;
  if (heard.length) {
    const collection = batch.collection || (session.collections?.length ? session.collections[0] : "");
    uploads.add(heard, { lang: batch.lang, collection });
    document.querySelector("#adding")?.close();
  }
  const note = !heard.length ? say("uploads.nothing") : skipped ? say("uploads.skipped", { n: skipped }) : "";
  document.querySelector("#uploads .note").textContent = note;
  document.querySelector("#uploads").hidden = false;
  if (note) announce(note);
}

function chosen(input, ofFolder = false) {
  if (input.files.length) give([...input.files], ofFolder);
  input.value = "";
}

function isAudible({ name, type, size }) {
  return size > 0 && !name.startsWith(".") && (/^(audio|video)\//.test(type) || AUDIBLE.test(name));
}

function recorder() {
  const words = make("span", {}, say("add.record"));
  const wrong = make("span", { class: "wrong", role: "alert" });
  const button = make("button", { type: "button", class: "recorder", onclick: toggle }, icon("microphone"), words);
  let going = null;

  async function toggle() {
    if (going) {
      const { stop, ticking } = going;
      going = null;
      clearInterval(ticking);
      button.classList.remove("on");
      words.textContent = say("add.record");
      const { sound, seconds } = await stop();
      const now = new Date();
      const ending = sound.type.endsWith("mp4") ? "m4a" : sound.type.split("/")[1];
      const stamp = new Date(now - 60_000 * now.getTimezoneOffset()).toISOString().slice(0, 19).replaceAll(":", ".");
      const title = say("add.recorded", { when: when(now) });
      uploads.add([new File([sound], `${stamp}.${ending}`, { type: sound.type })], { ...batch, metadata: () => ({ title, recorded_s: Math.round(seconds) }) });
      document.querySelector("#uploads").hidden = false;
      document.querySelector("#adding")?.close();
      return;
    }
    wrong.textContent = "";
    try {
      const { stop } = await record((level) => button.style.setProperty("--level", level.toFixed(2)));
      const began = Date.now();
      const tick = () => {
        if (!button.isConnected) toggle(); // closed, or another view: what was said is kept
        else words.textContent = `${say("add.record.stop")} · ${clock((Date.now() - began) / 1000)}`;
      };
      going = { stop, ticking: setInterval(tick, 500) };
      button.classList.add("on");
      tick();
      announce(say("add.recording", { at: clock(0) }));
    } catch (error) {
      if (!(error instanceof NoMicrophone)) throw error;
      wrong.textContent = error.message;
    }
  }

  return make("span", { class: "recording" }, button, wrong);
}

// --- dropped anywhere

const overlay = document.querySelector("#drop");
let inside = 0;

function carriesFiles(event) {
  return event.dataTransfer?.types.includes("Files");
}

addEventListener("dragenter", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  inside += 1;
  overlay.textContent = !may("write") ? say("drop.not") : batch.collection ? say("drop.into", { collection: batch.collection }) : say("drop.here");
  // a dialog lies above everything, so the overlay goes into it
  (document.querySelector("dialog[open]") ?? document.body).append(overlay);
  overlay.hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!carriesFiles(event)) return;
  inside -= 1;
  if (inside <= 0) overlay.hidden = true;
});
addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
addEventListener("drop", async (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  inside = 0;
  overlay.hidden = true;
  document.body.append(overlay);
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const given = [...event.dataTransfer.files]; // both are gone once this event is over
  if (!session.known) await new Promise((resolve) => service.addEventListener("session", resolve, { once: true }));
  if (!may("write")) return announce(say("drop.not"));
  const folders = entries.filter((entry) => entry.isDirectory);
  const single = entries.filter((entry) => entry.isFile);
  const files = single.length || folders.length ? await Promise.all(single.map(fileOf)) : given;
  if (files.length) give(files);
  if (folders.length) give((await Promise.all(folders.map(below))).flat(), true);
});

function fileOf(entry) {
  return new Promise((resolve, reject) => entry.file(resolve, reject));
}

/** All files of a folder, at any depth. */
async function below(folder) {
  const reader = folder.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // a hundred at most
    if (!some.length) break;
    for (const entry of some) found.push(...(entry.isDirectory ? await below(entry) : [await fileOf(entry)]));
  }
  return found;
}
