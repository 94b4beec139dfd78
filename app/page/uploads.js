// Recordings on their way: sent a few at a time, and followed until they can be found.
//
// An upload that the service has acknowledged goes on without this page; one that it has not needs the file again
// after a reload. Both are remembered in sessionStorage, so that nothing is lost without a word.

import { may } from "./session.js";
import { ask, found, lost, Problem, service } from "./service.js";
import { say } from "./words.js";

const AT_ONCE = 2;
const BREAKS = 4;
const LOOK_S = [0.7, 3];
const LOOKED_AT = 100;
const KEEP = "uploads";

/** Bytes of these are still here and nowhere else. */
export const TRAVELLING = new Set(["waiting", "sending", "pausing", "lost"]);
const ARRIVED = new Set(["pending", "processing"]);
const REMEMBERED = ["key", "name", "size", "state", "lang", "collection", "given", "metadata", "id", "error", "where"];

/** "change", whenever one or several uploads do; "ready", when a recording has become searchable. */
class Uploads extends EventTarget {
  /** In the order in which they were given. */
  all = [];
  #sending = 0;
  #looking = null;
  #files = new WeakMap();
  #requests = new WeakMap();

  constructor() {
    super();
    addEventListener("beforeunload", (event) => {
      if (this.all.some((upload) => TRAVELLING.has(upload.state))) event.preventDefault();
    });
    addEventListener("pagehide", () => this.#remember());
  }

  /** What the page knew before it was loaded anew. */
  recall() {
    for (const upload of JSON.parse(sessionStorage.getItem(KEEP) ?? "[]")) {
      if (TRAVELLING.has(upload.state)) upload.state = "interrupted";
      this.all.push({ ...upload, sent: 0 });
    }
    this.#told();
    this.#look();
  }

  /**
   * Files to be uploaded. Of `options`, `lang` and `collection` are for all of them (empty: not said, the
   * service's default); `metadata(file)` and `id(file)` may say more of each. A file that was interrupted goes on as
   * the upload that it was: if the service had it after all, it says so.
   */
  add(files, { lang = "", collection = "", metadata = (file) => ({ title: file.name }), id = () => "" } = {}) {
    for (const file of files) {
      const before = this.all.find((one) => one.state === "interrupted" && one.name === file.name && one.size === file.size);
      const upload = before ?? {
        key: randomName(), name: file.name, size: file.size, lang, collection, given: id(file), metadata: metadata(file),
      };
      Object.assign(upload, { state: "waiting", sent: 0 });
      this.#files.set(upload, file);
      if (!before) this.all.push(upload);
    }
    this.#told();
    this.#send();
  }

  canRetry(upload) {
    return upload.state === "failed" && this.#files.has(upload);
  }

  /** Once more, as another upload: where the record says that it failed, it makes room first. */
  async retry(upload) {
    if (upload.id) {
      await ask("DELETE", `audio/${encodeURIComponent(upload.id)}`, { parameters: { collection: upload.where } }).catch(() => {});
    }
    Object.assign(upload, { key: randomName(), state: "waiting", sent: 0, id: undefined, error: undefined });
    this.#told();
    this.#send();
  }

  /** Off the list. One that travels is stopped; what the service has, it keeps. */
  forget(upload) {
    this.all = this.all.filter((other) => other !== upload);
    this.#requests.get(upload)?.abort();
    this.#told();
  }

  clear() {
    this.all = this.all.filter(({ state }) => !["ready", "duplicate", "accepted", "failed"].includes(state));
    this.#told();
  }

  // --- sending

  #send() {
    while (this.#sending < AT_ONCE) {
      const upload = this.all.find(({ state, taken }) => state === "waiting" && !taken);
      if (!upload) return;
      this.#sending += 1;
      upload.taken = true;
      this.#carry(upload).finally(() => {
        upload.taken = false;
        this.#sending -= 1;
        this.#send();
      });
    }
  }

  async #carry(upload) {
    let breaks = 0;
    while (this.all.includes(upload)) {
      this.#set(upload, { state: "sending", sent: 0 });
      const answer = await this.#post(upload);
      if (!this.all.includes(upload)) return;
      if (answer.status >= 200 && answer.status < 300) {
        this.#acknowledged(upload, JSON.parse(answer.text), answer.status);
        return;
      }
      if (answer.status === 0) {
        breaks += 1;
        this.#set(upload, { state: "lost" });
        const there = await isThere();
        if (there && breaks >= BREAKS) {
          this.#set(upload, { state: "failed", error: { detail: say("upload.unreadable") } });
          return;
        }
        if (there) await seconds(breaks);
        else await event("reachable");
        continue;
      }
      const problem = Problem.of(answer.status, answer.text, answer.retryAfter);
      if (problem.status === 401) {
        this.#set(upload, { state: "waiting" });
        service.dispatchEvent(new Event("unauthorized"));
        await event("session");
      } else if (problem.retryAfterS !== null) {
        for (let left = Math.ceil(problem.retryAfterS); left > 0 && this.all.includes(upload); left -= 1) {
          this.#set(upload, { state: "pausing", left });
          await seconds(1);
        }
      } else {
        this.#set(upload, { state: "failed", error: { detail: problem.message || say("error.unknown"), requestId: problem.requestId } });
        return;
      }
    }
  }

  /** XMLHttpRequest, since fetch does not tell how much has been sent. */
  #post(upload) {
    const form = new FormData();
    const fields = { id: upload.given, lang: upload.lang, collection: upload.collection, metadata: JSON.stringify(upload.metadata) };
    for (const [name, value] of Object.entries(fields)) if (value) form.set(name, value);
    form.set("file", this.#files.get(upload));
    return new Promise((resolve) => {
      const request = new XMLHttpRequest();
      this.#requests.set(upload, request);
      request.open("POST", "audio");
      request.setRequestHeader("Idempotency-Key", upload.key);
      request.upload.addEventListener("progress", ({ loaded, total }) => this.#set(upload, { sent: total ? loaded / total : 0 }));
      request.addEventListener("loadend", () => {
        const retryAfter = request.status ? request.getResponseHeader("Retry-After") : null;
        resolve({ status: request.status, text: request.responseText, retryAfter });
      });
      request.send(form);
    });
  }

  #acknowledged(upload, record, status) {
    const before = record.duplicate && status === 200;
    const state = { ready: before ? "duplicate" : "ready", failed: "failed" }[record.status] ?? record.status;
    this.#set(upload, { id: record.id, where: record.collection, error: record.error ?? undefined, sent: 1 });
    this.#set(upload, { state: may("read") ? state : "accepted" });
    if (state === "ready" || state === "duplicate") this.dispatchEvent(new Event("ready"));
    this.#look();
  }

  // --- following

  async #look() {
    if (this.#looking) return;
    this.#looking = true;
    let wait_s = LOOK_S[0];
    try {
      for (;;) {
        const followed = this.all.filter(({ state }) => ARRIVED.has(state)).slice(0, LOOKED_AT);
        if (!followed.length) break;
        try {
          const anew = await this.#states(followed);
          wait_s = anew ? LOOK_S[0] : Math.min(LOOK_S[1], 1.3 * wait_s);
        } catch (problem) {
          if (problem.status === 401 || problem.status === 403) await event("session");
          wait_s = LOOK_S[1];
        }
        await seconds(wait_s);
      }
    } finally {
      this.#looking = false;
    }
  }

  /** Brings these up to date; whether anything was new. */
  async #states(followed) {
    const filter = JSON.stringify({ id: { in: [...new Set(followed.map(({ id }) => id))] } });
    const { data } = await ask("GET", "audio", { parameters: { filter, limit: 1000 } });
    let anew = false;
    let ready = false;
    for (const upload of followed) {
      const record = data.items.find(({ id, collection }) => id === upload.id && collection === upload.where);
      const state = record?.status ?? "failed";
      if (state === upload.state) continue;
      anew = true;
      ready ||= state === "ready";
      this.#set(upload, { state, error: record ? (record.error ?? undefined) : { detail: say("record.gone") } });
    }
    if (ready) this.dispatchEvent(new Event("ready"));
    return anew;
  }

  // --- telling

  #set(upload, changes) {
    const isNews = changes.state !== undefined && changes.state !== upload.state;
    Object.assign(upload, changes);
    this.#told(isNews);
  }

  #told(isNews = true) {
    if (isNews) this.#remember();
    this.dispatchEvent(new Event("change"));
  }

  #remember() {
    const kept = this.all.map((upload) => Object.fromEntries(REMEMBERED.map((name) => [name, upload[name]])));
    try {
      sessionStorage.setItem(KEEP, JSON.stringify(kept));
    } catch {
      // there is no room for so many names: then they are not remembered, and sent all the same
    }
  }
}

/** Letters that nobody else has. (randomUUID is for secure contexts only, and services in a local network have none.) */
function randomName() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function seconds(count) {
  return new Promise((resolve) => setTimeout(resolve, 1000 * count));
}

function event(name) {
  return new Promise((resolve) => service.addEventListener(name, resolve, { once: true }));
}

async function isThere() {
  try {
    await fetch("healthz", { cache: "no-store" });
    found();
    return true;
  } catch {
    lost();
    return false;
  }
}

export const uploads = new Uploads();
