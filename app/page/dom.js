// Elements, the one way they are made here. Text is always text: nothing of a user's is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  play: "M8 5.5v13l11-6.5z",
  pause: "M7 5h3.5v14H7zM13.5 5H17v14h-3.5z",
  stop: "M6.5 6.5h11v11h-11z",
  around: "M4 5v14M20 5v14M9 8.5v7l6-3.5z",
  like: "M4 12h2M8 8v8M12 5v14M16 8v8M20 11v2",
  microphone: "M12 3a3 3 0 0 1 3 3v6a3 3 0 0 1-6 0V6a3 3 0 0 1 3-3zM5.5 11.5a6.5 6.5 0 0 0 13 0M12 18v3",
  search: "M10.5 4a6.5 6.5 0 1 1 0 13a6.5 6.5 0 0 1 0-13zM15.5 15.5L20 20",
  upload: "M12 16V5M7 9.5L12 4.5l5 5M5 19.5h14",
  close: "M6 6l12 12M18 6L6 18",
  key: "M8 8a4 4 0 1 1 0 8a4 4 0 0 1 0-8zM12 12h9M20.5 12v3.5M17 12v2.5",
  sun: "M12 8a4 4 0 1 1 0 8a4 4 0 0 1 0-8zM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4",
  moon: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10z",
  folder: "M3.5 6.5h6l2 2.5h9v10h-17z",
  file: "M6.5 3.5h7l4 4v13h-11zM13.5 3.5v4h4",
  trash: "M5 7h14M10 4h4M7 7l1 13h8l1-13",
  again: "M19 5v5h-5M19 10a7.5 7.5 0 1 0 .5 4",
  link: "M10 14l4-4M8.5 11.5l-2 2a3 3 0 0 0 4 4l2-2M15.5 12.5l2-2a3 3 0 0 0-4-4l-2 2",
};
const SOLID = new Set(["play", "pause", "stop"]);

/**
 * An element. Functions are listeners (`onclick`), `false`, null and undefined are no attribute at all, and
 * children that are none of an element's or a text's kind are left out.
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A drawing beside words, or in a button that has a label; nothing that is read aloud. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("aria-hidden", "true");
  drawing.setAttribute("class", SOLID.has(name) ? "icon solid" : "icon");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  drawing.append(path);
  return drawing;
}

/** Peaks as upright lines of a drawing that is as wide as there are peaks. */
export function bars(peaks) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", `0 0 ${peaks.length} 100`);
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  const loudest = Math.max(0.05, ...peaks); // somebody who spoke softly is seen as well
  const half = (peak) => Math.max(2, (46 * peak) / loudest);
  const line = (peak, at) => `M${at + 0.5} ${50 - half(peak)}V${50 + half(peak)}`;
  path.setAttribute("d", peaks.map(line).join(""));
  drawing.append(path);
  return drawing;
}

let saying;

/** Says it to those who hear the page. What comes in a burst is said once, as its last. */
export function announce(text) {
  clearTimeout(saying);
  saying = setTimeout(() => (document.querySelector("#announcer").textContent = text), 150);
}

/**
 * Shows a dialog until it is closed, then takes it away; focus goes back to where it was (the browser does that).
 * `onclose` is called with what it was closed with.
 */
export function show(dialog, onclose = () => {}) {
  dialog.addEventListener("close", () => {
    dialog.remove();
    onclose(dialog.returnValue);
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}
