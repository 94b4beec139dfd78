// What the page shows stands in its address, so that it can be sent, kept, and gone back to.

const listeners = [];

/** The address's parameters: `view`, `q`, `lang`, `collection`, ... */
export function here() {
  return Object.fromEntries(new URLSearchParams(location.search));
}

/** The address that shows these; parameters without a value are left out. */
export function to(parameters) {
  const given = Object.entries(parameters).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const query = new URLSearchParams(given).toString();
  return query ? `?${query}` : location.pathname;
}

export function go(parameters, { replace = false } = {}) {
  history[replace ? "replaceState" : "pushState"](null, "", to(parameters));
  changed();
}

export function onChange(listener) {
  listeners.push(listener);
}

export function changed() {
  for (const listener of listeners) listener(here());
}

addEventListener("popstate", changed);
addEventListener("click", (event) => {
  const link = event.target.closest?.("a[data-here]");
  if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
  event.preventDefault();
  history.pushState(null, "", link.href);
  changed();
});
