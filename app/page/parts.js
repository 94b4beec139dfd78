// Small parts that several views have.

import { icon, make } from "./dom.js";
import { say, told } from "./words.js";

/** Gives a choice its options, `[value, words]`, and keeps a value that is none of them as one more. */
export function choose(select, value = "", options) {
  const known = options.some(([one]) => one === value);
  const all = known ? options : [...options, [value, value]];
  select.replaceChildren(...all.map(([one, words]) => make("option", { value: one }, words)));
  select.value = value;
}

/** An error, in the service's words, under which number its log knows it, and what can be done. */
export function trouble(problem, again = null) {
  return make("div", { class: "trouble", role: "alert" },
    make("p", { dir: "auto" }, told(problem)),
    problem.requestId && make("p", { class: "quiet" }, say("error.id", { id: problem.requestId })),
    again && make("button", { type: "button", onclick: again }, icon("again"), say("retry")));
}
