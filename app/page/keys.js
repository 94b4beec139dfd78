// The page without a mouse.

import { make, icon, show } from "./dom.js";
import { player } from "./player.js";
import { toBox } from "./search.js";
import { go, here } from "./address.js";
import { say } from "./words.js";

const HELP = [
  [["/"], "keys.search"], [["↓", "j"], "keys.next"], [["↑", "k"], "keys.next"], [["Space"], "keys.play"],
  [["Enter"], "keys.open"], [["m"], "keys.like"], [["←", "→"], "keys.seek"], [["Esc"], "keys.escape"], [["?"], "keys.help"],
];

export function openHelp() {
  if (document.querySelector("#keys")) return;
  const help = HELP.filter(([, name], at) => at === 0 || HELP[at - 1][1] !== name).map(([keys, name]) => [
    name === "keys.next" ? ["↓", "j", "↑", "k"] : keys, name,
  ]);
  const dialog = show(
    make("dialog", { id: "keys", class: "small", "aria-labelledby": "keys-title" },
      make("header", {}, make("h2", { id: "keys-title" }, say("keys.title")),
        make("button", { type: "button", class: "round", "aria-label": say("close"), onclick: () => dialog.close() }, icon("close"))),
      make("dl", { class: "keys" }, help.map(([keys, name]) =>
        make("div", {}, make("dt", {}, keys.map((key) => make("kbd", {}, key))), make("dd", {}, say(name)))))));
}

function rows() {
  return [...document.querySelectorAll("main [data-row]")].filter((row) => row.offsetParent);
}

/** Moves the focus among hits or records; one of them at a time can be reached by Tab. */
function step(by) {
  const all = rows();
  if (!all.length) return false;
  const at = all.indexOf(document.activeElement.closest("[data-row]"));
  const next = all[at < 0 ? 0 : at + by];
  if (!next) {
    if (by < 0 && at === 0) toBox();
    return true;
  }
  for (const row of all) row.tabIndex = row === next ? 0 : -1;
  next.focus();
  next.scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  return true;
}

addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  const { target, key } = event;
  if (document.querySelector("dialog[open]")) return;
  const typing = target.matches("input:not([type=checkbox]), textarea, select");
  const row = target.closest?.("[data-row]");
  if (typing && !(target.type === "search" && (key === "ArrowDown" || key === "Escape"))) return;
  const actions = {
    "/": () => (here().view ? go({}) : undefined, toBox(), true),
    "?": () => (openHelp(), true),
    j: () => step(1),
    k: () => step(-1),
    ArrowDown: () => step(1),
    ArrowUp: () => Boolean(row) && step(-1),
    m: () => row && (row.querySelector(".like")?.click(), true),
    Enter: () => row === target && (row.querySelector(".open").click(), true),
    " ": () => {
      if (row === target) row.querySelector(".play").click();
      else if (target === document.body && player.recording) player.toggle();
      else return false;
      return true;
    },
    Escape: () => {
      if (player.playing) player.pause();
      else if (typing) target.blur();
      else if (row) toBox();
      else return false;
      return true;
    },
  };
  if (actions[key]?.()) event.preventDefault();
});
