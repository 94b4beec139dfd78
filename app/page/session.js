// Who asks: the key that the browser keeps in a cookie that no script can read, and what it may do.

import { announce, icon, make, show } from "./dom.js";
import { ask, service } from "./service.js";
import { say } from "./words.js";

/** `scopes` is empty until the service has said. `known` is whether it has. */
export const session = { name: null, scopes: [], collections: null, anonymous: true, known: false };
let entering = null;

export function may(scope) {
  return session.scopes.includes(scope) || session.scopes.includes("admin");
}

/** Asks who we are, which "session" of `service` tells; without a key where one is needed, the person is asked for it. */
export async function begin() {
  try {
    const { data } = await ask("GET", "session");
    Object.assign(session, data, { known: true });
  } catch (problem) {
    if (problem.status !== 401) throw problem;
    Object.assign(session, { name: null, scopes: [], collections: null, anonymous: false, known: true });
  }
  service.dispatchEvent(new Event("session"));
}

service.addEventListener("unauthorized", () => {
  if (!session.anonymous && session.scopes.length) {
    Object.assign(session, { name: null, scopes: [] });
    service.dispatchEvent(new Event("session"));
  }
  enter();
});

/** The dialog where a key is given, changed or forgotten. */
export function enter() {
  if (entering) return;
  const key = make("input", {
    id: "key", type: "password", autocomplete: "current-password", spellcheck: "false", required: true, dir: "ltr",
  });
  const remember = make("input", { id: "remember", type: "checkbox" });
  const wrong = make("p", { class: "wrong", role: "alert" });
  const known = !session.anonymous && session.scopes.length > 0;

  async function submit(event) {
    event.preventDefault();
    wrong.textContent = "";
    try {
      await ask("POST", "session", { body: { key: key.value.trim(), remember: remember.checked } });
    } catch (problem) {
      wrong.textContent = problem.status === 401 ? say("key.wrong") : problem.message || say("unreachable");
      key.select();
      return;
    }
    key.value = "";
    dialog.close(); // unless somebody has meanwhile
    announce(say("key.taken"));
    await begin();
  }

  async function forget() {
    await ask("DELETE", "session");
    dialog.close();
    location.assign(location.pathname); // nothing that the key could see stays on the page
  }

  const dialog = (entering = show(
    make("dialog", { class: "small", "aria-labelledby": "key-title" },
      make("form", { onsubmit: submit },
        make("h2", { id: "key-title" }, icon("key"), say("key.title")),
        known && make("p", {}, say("key.known", { name: session.name ?? "", scopes: session.scopes.join(", ") })),
        isSecureContext
          ? make("p", { class: "quiet" }, say("key.why"))
          : make("p", { class: "wrong" }, say("key.insecure")), // docs/security.md, "Keys in browsers"
        make("label", { for: "key" }, say("key.label")), key,
        make("label", { class: "check" }, remember, say("key.remember")),
        wrong,
        make("div", { class: "buttons" },
          known && make("button", { type: "button", class: "danger", onclick: forget }, say("key.forget")),
          make("button", { type: "button", onclick: () => dialog.close() }, say("cancel")),
          make("button", { class: "primary" }, say("key.use"))))),
    () => (entering = null)));
}
