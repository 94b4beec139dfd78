// The recordings that come with the service: offered to an empty library, uploaded as anybody's would be.

import { icon, make } from "./dom.js";
import { to } from "./address.js";
import { ask, lines } from "./service.js";
import { uploads } from "./uploads.js";
import { languageName, say } from "./words.js";

const FOLDER = "page/samples/";

/** A button that fetches them and gives them to the queue. */
export function offer() {
  const wrong = make("p", { class: "wrong", role: "alert" });
  const button = make("button", { type: "button", class: "samples", onclick: fetchAll }, icon("like"), say("empty.samples.go"));

  async function fetchAll() {
    button.disabled = true;
    wrong.textContent = "";
    try {
      for (const sample of await lines(`${FOLDER}manifest.jsonl`)) {
        const answer = await fetch(FOLDER + sample.audio);
        if (!answer.ok) throw new Error();
        const name = sample.audio.split("/").pop();
        uploads.add([new File([await answer.blob()], name, { type: "audio/ogg" })], {
          lang: sample.lang,
          id: () => sample.id,
          metadata: () => ({ title: titled(sample.id), said: sample.text }),
        });
      }
    } catch {
      button.disabled = false;
      wrong.textContent = say("empty.samples.failed");
    }
  }

  return make("div", { class: "offer" }, make("p", { class: "quiet" }, say("empty.samples")), button, wrong);
}

/** What the id en-train-delay is about: Train delay. */
function titled(id) {
  const words = id.replace(/^[a-z]+-/, "").replaceAll("-", " ");
  return words[0].toUpperCase() + words.slice(1);
}

/** Questions that the samples answer, one in each language; null where they are not in the library. */
export async function questions() {
  try {
    const asked = await lines(`${FOLDER}questions.jsonl`);
    const filter = JSON.stringify({ id: { in: [...new Set(asked.map(({ expect }) => expect))] } });
    const { data } = await ask("GET", "audio", { parameters: { filter, status: "ready", limit: 100 } });
    const there = new Set(data.items.map(({ id }) => id));
    const langs = new Set();
    const chosen = asked.filter(({ lang, expect }) => there.has(expect) && !langs.has(lang) && langs.add(lang));
    return chosen.length ? chosen : null;
  } catch {
    return null; // a service without samples is none the worse
  }
}

/** Those questions as links. */
export function chips(asked) {
  return make("ul", { class: "chips", "aria-label": say("start.try") }, asked.map(({ q, lang }) =>
    make("li", {},
      make("a", { href: to({ q, lang }), "data-here": true, title: languageName(lang) },
        make("span", { class: "tag", lang: "", "aria-hidden": "true" }, lang),
        make("span", { dir: "auto", lang }, q)))));
}
