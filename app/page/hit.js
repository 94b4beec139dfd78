// One hit: what it is, where it says it, how sure that is, and everything to hear it by.

import { here, to } from "./address.js";
import { icon, make } from "./dom.js";
import { player } from "./player.js";
import { pathOf } from "./service.js";
import { waveform } from "./waveform.js";
import { clock, cosine, languageName, passage, probability, say, titleOf } from "./words.js";

const AROUND_S = 5;
const SHORT_S = 20;
const LEVELS = [[0.9, "best"], [0.7, "good"], [0.4, "fair"], [0, "poor"]];

/** The list item of a hit of an answer. */
export function hitCard(hit) {
  const [best] = hit.segments;
  const title = titleOf(hit);
  const name = `hit-${hit.rank}`;
  const play = playButton(hit, best.start_s, best.end_s);
  const around = make("button", {
    type: "button",
    onclick: () => player.play(hit, Math.max(0, best.start_s - AROUND_S), best.end_s + AROUND_S),
  }, icon("around"), say("hit.around", { n: AROUND_S }));
  return make("li", {},
    make("article", { class: "card hit", "data-row": true, tabindex: "-1", "aria-labelledby": name },
      make("header", {},
        make("h2", { id: name, dir: "auto" }, make("a", { class: "open", href: recordAddress(hit), "data-here": true }, title)),
        score(hit)),
      facts(hit),
      waveform(hit, hit.segments, (from, until) => player.play(hit, from, player.playsOn ? null : until)),
      words(hit),
      make("div", { class: "buttons" },
        play, around,
        make("a", {
          class: "button like", "data-here": true,
          href: to({ like: hit.id, at_s: ((best.start_s + best.end_s) / 2).toFixed(2), in: hit.collection }),
        }, icon("like"), say("hit.like"))),
      unplayable(hit)));
}

/** Plays from a second, and shows whether it does. */
export function playButton(recording, from, until, { small = false } = {}) {
  const button = make("button", {
    type: "button", class: small ? "play round" : "play primary",
    onclick: () => {
      if (player.has(recording) && player.playing) player.pause();
      else player.play(recording, paused(recording, from, until) ? player.at : from, player.playsOn ? null : until);
    },
  });
  states.set(button, () => {
    const playing = player.has(recording) && player.playing;
    const words = playing ? say("hit.pause")
      : until === null ? say("hit.play") : say("hit.play.passage", { passage: passage({ start_s: from, end_s: until }) });
    if (button.dataset.playing === String(playing)) return;
    button.dataset.playing = playing;
    if (small) button.setAttribute("aria-label", `${words}: ${titleOf(recording)}`);
    button.replaceChildren(icon(playing ? "pause" : "play"), ...(small ? [] : [make("span", {}, words)]));
  });
  states.get(button)();
  return button;
}

/** Whether it was stopped on the way, and goes on from there. */
function paused(recording, from, until) {
  return player.has(recording) && player.at > from && player.at < (until ?? recording.duration_s ?? 0) - 0.3;
}

/** Where a record stands, over the view that is shown. */
export function recordAddress(recording) {
  return to({ ...here(), record: recording.id, of: recording.collection });
}

/** Shown where the browser cannot play the recording. */
export function unplayable(recording) {
  const words = make("p", { class: "wrong", hidden: true },
    say("hit.unplayable"), " ", make("a", { href: pathOf(recording, "/content"), download: titleOf(recording) }, say("hit.download")));
  states.set(words, (failed) => {
    if (player.has(recording)) words.hidden = !failed;
  });
  words.classList.add("unplayable");
  return words;
}

const states = new WeakMap();
for (const name of ["change", "fail"]) {
  player.addEventListener(name, () => {
    for (const element of document.querySelectorAll(".play, .unplayable")) states.get(element)?.(name === "fail");
  });
}

function facts(hit) {
  return make("ul", { class: "facts" },
    hit.lang && make("li", {}, languageName(hit.lang)),
    hit.duration_s !== null && make("li", {}, clock(hit.duration_s)),
    make("li", {}, make("bdi", {}, hit.collection)),
    hit.segments.length > 1 && make("li", {}, say("hit.passages", { n: hit.segments.length })));
}

/** What is said there: as the model heard it, else, of a short recording, as whoever uploaded it says. */
function words(hit) {
  const { said } = hit.metadata;
  const heard = [...hit.segments].filter(({ transcript }) => transcript).sort((one, other) => one.start_s - other.start_s);
  if (heard.length) {
    return make("blockquote", { class: "said", dir: "auto", lang: hit.lang, title: say("hit.heard") },
      heard.flatMap((segment) => [make(segment === hit.segments[0] ? "mark" : "span", {}, segment.transcript), " "]));
  }
  return typeof said === "string" && hit.duration_s <= SHORT_S && make("blockquote", { class: "said", dir: "auto", lang: hit.lang, title: say("hit.said") }, said);
}

function score(hit) {
  const known = hit.confidence !== undefined;
  const level = known ? LEVELS.find(([least]) => hit.confidence >= least)[1] : "unknown";
  const figure = cosine(hit.score);
  const summary = make("summary", {}, say(`score.${level}`, { cosine: figure }), known && make("span", { class: "percent" }, probability(hit.confidence)));
  const means = known
    ? [make("p", {}, say("score.means", { share: probability(hit.confidence) })), make("p", {}, say("score.cosine", { cosine: figure }))]
    : [make("p", {}, say("score.unmeasured"))];
  const details = make("details", { class: `score ${level}` }, summary, make("div", { class: "means" }, means));
  details.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !details.open) return;
    event.stopPropagation();
    details.open = false;
    summary.focus();
  });
  details.addEventListener("focusout", ({ relatedTarget }) => {
    if (!details.contains(relatedTarget)) details.open = false;
  });
  return details;
}
