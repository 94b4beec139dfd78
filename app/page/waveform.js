// A recording drawn as its loudness over time, with the passages that were found, and where it plays.
// Time runs from left to right in every language, as on every player.

import { bars, make } from "./dom.js";
import { player } from "./player.js";
import { ask } from "./service.js";
import { clock, passage, say } from "./words.js";

const POINTS = 300;
const WHOLE_S = 75;
const AROUND_S = 60;
const STEP_S = 2;

const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    target.dispatchEvent(new Event("near"));
  }
}, { rootMargin: "300px" });

const movers = new WeakMap();
for (const name of ["move", "change"]) {
  player.addEventListener(name, () => {
    for (const element of document.querySelectorAll(".waveform")) movers.get(element)();
  });
}

/**
 * The element. A recording longer than WHOLE_S shows a minute around its first passage, and under it, small, its
 * whole, where every passage is a button, too. `play(from, until)` is called where the person points.
 */
export function waveform(recording, passages, play) {
  const whole = recording.duration_s ?? 0;
  const element = make("div", { class: "waveform", dir: "ltr" });
  let start = 0;
  let end = whole;
  if (whole > WHOLE_S) {
    const middle = passages.length ? (passages[0].start_s + passages[0].end_s) / 2 : 0;
    [start, end] = around(middle, whole);
  }

  function draw() {
    element.replaceChildren(strip(start, end, true));
    if (start > 0 || end < whole) element.append(strip(0, whole, false));
    moved();
  }

  function strip(from, to, large) {
    const drawn = make("div", { class: "drawn" });
    const head = make("div", { class: "head", hidden: true });
    const slider = make("div", {
      class: "slider", role: "slider", tabindex: "0", "aria-label": say(large ? "wave.seek" : "wave.overview"),
      "aria-valuemin": "0", "aria-valuemax": String(Math.round(whole)), "aria-valuenow": "0",
      onclick: (event) => {
        const box = slider.getBoundingClientRect();
        pointed(from + ((event.clientX - box.left) / box.width) * (to - from), large);
      },
      onkeydown: (event) => {
        const step = { ArrowLeft: -STEP_S, ArrowRight: STEP_S }[event.key];
        if (!step) return;
        event.preventDefault();
        const at = player.has(recording) ? player.at : from;
        play(Math.min(Math.max(0, at + step), whole), null);
      },
    });
    const marks = passages.filter((found) => found.end_s > from && found.start_s < to).map((found) => {
      const left = Math.max(from, found.start_s);
      const right = Math.min(to, found.end_s);
      const mark = make("button", {
        type: "button", class: found === passages[0] ? "mark best" : "mark",
        "aria-label": say("wave.play", { passage: passage(found) }), title: passage(found),
        onclick: () => {
          if (!large) move(found);
          play(found.start_s, found.end_s);
        },
      });
      mark.style.left = `${(100 * (left - from)) / (to - from)}%`;
      mark.style.width = `${(100 * (right - left)) / (to - from)}%`;
      return mark;
    });
    const box = make("div", { class: large ? "strip" : "strip overview" }, drawn, slider, marks, head);
    if (!large) {
      const shown = make("div", { class: "window" });
      shown.style.left = `${(100 * start) / whole}%`;
      shown.style.width = `${(100 * (end - start)) / whole}%`;
      box.append(shown);
    }
    box.from = from;
    box.to = to;
    box.addEventListener("near", () => fill(drawn, from, to));
    near.observe(box);
    return make("div", { class: "timed" }, box,
      large && make("div", { class: "ends", "aria-hidden": "true" }, make("span", {}, clock(from)), make("span", {}, clock(to))));
  }

  async function fill(drawn, from, to) {
    try {
      const { data } = await ask("GET", `audio/${encodeURIComponent(recording.id)}/waveform`, {
        parameters: { points: POINTS, start_s: from.toFixed(3), end_s: to.toFixed(3), collection: recording.collection },
      });
      if (data.peaks.length) drawn.replaceChildren(bars(data.peaks));
    } catch {
      drawn.classList.add("flat"); // an older version's recording: a line, on which everything else works
    }
  }

  function pointed(at, large) {
    if (!large) move({ start_s: at, end_s: at });
    play(at, null);
  }

  function move({ start_s, end_s }) {
    [start, end] = around((start_s + end_s) / 2, whole);
    draw();
  }

  function moved() {
    const mine = player.has(recording);
    for (const box of element.querySelectorAll(".strip")) {
      const head = box.querySelector(".head");
      const part = (player.at - box.from) / (box.to - box.from);
      head.hidden = !mine || part < 0 || part > 1;
      if (!head.hidden) head.style.left = `${100 * part}%`;
      const slider = box.querySelector(".slider");
      const second = mine ? Math.round(player.at) : Math.round(box.from);
      if (slider.getAttribute("aria-valuenow") !== String(second)) {
        slider.setAttribute("aria-valuenow", second);
        slider.setAttribute("aria-valuetext", clock(second));
      }
    }
    // what plays on beyond what is drawn is followed
    if (mine && player.playing && whole > WHOLE_S && (player.at > end || player.at < start)) {
      move({ start_s: player.at + AROUND_S / 2 - 2, end_s: player.at + AROUND_S / 2 - 2 });
    }
  }

  movers.set(element, moved);
  draw();
  return element;
}

function around(middle, whole) {
  const start = Math.max(0, Math.min(middle - AROUND_S / 2, whole - AROUND_S));
  return [start, Math.min(whole, start + AROUND_S)];
}
