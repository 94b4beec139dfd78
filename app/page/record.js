// One recording's record, over whatever view is shown: to hear, read, change and delete.

import { go, here, to } from "./address.js";
import { announce, icon, make, show } from "./dom.js";
import { playButton, unplayable } from "./hit.js";
import { trouble } from "./parts.js";
import { player } from "./player.js";
import { ask, pathOf, service } from "./service.js";
import { may, session } from "./session.js";
import { waveform } from "./waveform.js";
import { clock, languageName, LANGUAGES, number, say, size, titleOf, told, when } from "./words.js";

let dialog = null;
let shown = "";

/** Opens and closes as the address says. */
export function showRecord() {
  if (!session.known) return; // what it may be used for is not known either
  const { record: id, of: collection } = here();
  const wanted = id ? JSON.stringify([id, collection]) : "";
  if (wanted === shown && dialog) return;
  shown = wanted;
  if (dialog) {
    dialog.close();
    dialog = null;
  }
  if (id) open(id, collection);
}

async function open(id, collection) {
  const inside = make("div", { class: "inside", "aria-busy": "true" }, make("div", { class: "skeleton" }, make("div"), make("div"), make("div")));
  const mine = show(
    make("dialog", { class: "record", "aria-labelledby": "record-title" },
      make("header", {}, make("h2", { id: "record-title", dir: "auto" }, id),
        make("button", { type: "button", class: "round", "aria-label": say("close"), onclick: () => mine.close() }, icon("close"))),
      inside),
    () => {
      if (dialog !== mine) return; // the address had changed before
      dialog = null;
      shown = "";
      player.stop();
      go({ ...here(), record: "", of: "" });
    });
  dialog = mine;
  await fill(mine, inside, id, collection);
}

async function fill(mine, inside, id, collection, note = "") {
  try {
    const { data, headers } = await ask("GET", `audio/${encodeURIComponent(id)}`, { parameters: { collection } });
    mine.querySelector("#record-title").textContent = titleOf(data);
    inside.replaceChildren(...parts(mine, inside, data, headers.get("ETag"), note));
  } catch (problem) {
    const gone = problem.code === "recording_not_found";
    inside.replaceChildren(gone ? make("p", { role: "alert" }, say("record.gone")) : trouble(problem, () => fill(mine, inside, id, collection)));
  }
  inside.removeAttribute("aria-busy");
}

function parts(mine, inside, record, etag, note) {
  const facts = [
    ["record.status", say(`status.${record.status}`)],
    ["record.collection", make("bdi", {}, record.collection)],
    record.lang && ["record.lang", languageName(record.lang)],
    record.duration_s !== null && ["record.duration", clock(record.duration_s)],
    record.segments !== null && ["record.segments", number(record.segments)],
    ["record.size", size(record.size_bytes)],
    record.media_type && ["record.type", make("bdi", {}, record.media_type)],
    ["record.created", when(record.created_at)],
    ["record.id", make("code", {}, record.id)],
    ["record.sha256", make("code", {}, record.sha256)],
  ].filter(Boolean);
  const others = Object.fromEntries(Object.entries(record.metadata).filter(([name]) => name !== "title"));
  return [
    record.error && make("p", { class: "trouble", dir: "auto" }, record.error.detail),
    record.status === "ready" && waveform(record, [], (from, until) => player.play(record, from, until)),
    make("div", { class: "buttons" }, playButton(record, 0, null),
      make("a", { class: "button like", href: to({ like: record.id, in: record.collection }), "data-here": true, hidden: record.status !== "ready" }, icon("like"), say("hit.like")),
      make("a", { class: "button", href: pathOf(record, "/content"), download: titleOf(record) }, say("hit.download")),
      make("a", { class: "button", href: pathOf(record), target: "_blank", rel: "noopener" }, icon("link"), say("record.json"))),
    unplayable(record),
    may("write") && editor(mine, inside, record, etag, note),
    make("dl", {}, facts.map(([name, value]) => make("div", {}, make("dt", {}, say(name)), make("dd", {}, value)))),
    Object.keys(others).length > 0 && make("details", {}, make("summary", {}, say("record.metadata")),
      make("pre", { dir: "auto", tabindex: "0" }, JSON.stringify(others, null, 2))),
    may("write") && make("div", { class: "buttons end" },
      make("button", { type: "button", class: "danger", onclick: () => confirmDeletion(mine, record) }, icon("trash"), say("record.delete"))),
  ].filter(Boolean);
}

function editor(mine, inside, record, etag, note) {
  const title = make("input", { id: "edit-title", dir: "auto", value: typeof record.metadata.title === "string" ? record.metadata.title : "" });
  const lang = make("input", { id: "edit-lang", dir: "ltr", list: "langs", value: record.lang ?? "", autocomplete: "off", spellcheck: "false" });
  const told_ = make("p", { class: "quiet", role: "status" }, note);

  async function save(event) {
    event.preventDefault();
    const body = { lang: lang.value.trim() || null, metadata: { title: title.value.trim() || null } };
    try {
      await ask("PATCH", `audio/${encodeURIComponent(record.id)}`, {
        parameters: { collection: record.collection }, body,
        headers: { "Content-Type": "application/merge-patch+json", "If-Match": etag },
      });
      service.dispatchEvent(new Event("changed"));
      await fill(mine, inside, record.id, record.collection, say("record.saved"));
    } catch (problem) {
      if (problem.code === "precondition_failed") {
        await fill(mine, inside, record.id, record.collection, say("record.changed"));
        return;
      }
      told_.textContent = told(problem);
      told_.classList.add("wrong");
    }
  }

  return make("form", { class: "edit", onsubmit: save },
    make("div", { class: "pair" },
      make("div", {}, make("label", { for: "edit-title" }, say("record.title")), title),
      make("div", {}, make("label", { for: "edit-lang" }, say("record.lang")), lang,
        make("datalist", { id: "langs" }, LANGUAGES.map((one) => make("option", { value: one }, languageName(one)))),
        make("p", { class: "quiet hint" }, say("record.lang.hint")))),
    make("div", { class: "buttons" }, make("button", { class: "primary" }, say("record.save")), told_));
}

function confirmDeletion(mine, record) {
  const wrong = make("p", { class: "wrong", role: "alert" });
  const asking = show(
    make("dialog", { class: "small", "aria-labelledby": "delete-title" },
      make("form", { onsubmit: remove },
        make("h2", { id: "delete-title" }, say("delete.title", { title: titleOf(record) })),
        make("p", { class: "quiet" }, say("delete.why")), wrong,
        make("div", { class: "buttons" },
          make("button", { type: "button", autofocus: true, onclick: () => asking.close() }, say("cancel")),
          make("button", { class: "danger" }, say("delete.go"))))));

  async function remove(event) {
    event.preventDefault();
    try {
      await ask("DELETE", `audio/${encodeURIComponent(record.id)}`, { parameters: { collection: record.collection } });
    } catch (problem) {
      if (problem.code !== "recording_not_found") {
        wrong.textContent = told(problem);
        return;
      }
    }
    asking.close();
    mine.close();
    announce(say("delete.done"));
    service.dispatchEvent(new Event("deleted"));
  }
}
