// The service: what is asked of it, what its errors say, and whether it can be reached.

/**
 * "unreachable" and "reachable", when that changes; "unauthorized", when an answer says that a key is needed;
 * "session", when it is known anew who asks.
 */
export const service = new EventTarget();

const GIVE_UP_AFTER = 5;
let unreachable = false;

/** An error in the service's own words, or that it could not be asked. */
export class Problem extends Error {
  constructor(status, body = {}, retryAfterS = null) {
    super(body.detail ?? "");
    this.status = status;
    this.code = body.code ?? (status ? "internal_error" : "unreachable");
    this.requestId = body.request_id;
    this.retryAfterS = retryAfterS;
  }

  static of(status, text, retryAfter) {
    let body;
    try {
      body = JSON.parse(text);
    } catch {
      body = {}; // a proxy's, say
    }
    return new Problem(status, body, retryAfter ? Number(retryAfter) || 5 : null);
  }
}

/** The path of a recording, or of something of it, in the collection where it was found. */
export function pathOf(recording, part = "") {
  const query = new URLSearchParams({ collection: recording.collection });
  return `audio/${encodeURIComponent(recording.id)}${part}?${query}`;
}

/**
 * What the service answers: `{data, headers}`, where `data` is the JSON, or null without one.
 *
 * Parameters without a value are left out. Reading is tried again where the service says when to. Throws Problem,
 * or the AbortError of `signal`.
 */
export async function ask(method, path, { parameters = {}, body, headers = {}, signal } = {}) {
  const given = Object.entries(parameters).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const query = new URLSearchParams(given).toString();
  const url = query ? `${path}?${query}` : path;
  const json = body !== undefined && !(body instanceof Blob);
  const options = { method, signal, headers: { ...headers } };
  if (body !== undefined) options.body = json ? JSON.stringify(body) : body;
  if (json) options.headers["Content-Type"] ??= "application/json";
  for (let tried = 1; ; tried += 1) {
    let answer;
    try {
      answer = await fetch(url, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      lost();
      throw new Problem(0);
    }
    found();
    if (answer.ok) {
      const isJson = (answer.headers.get("Content-Type") ?? "").split(";")[0].endsWith("json");
      return { data: isJson ? await answer.json() : null, headers: answer.headers };
    }
    const problem = Problem.of(answer.status, await answer.text(), answer.headers.get("Retry-After"));
    if (problem.status === 401) service.dispatchEvent(new Event("unauthorized"));
    if (method !== "GET" || problem.retryAfterS === null || problem.retryAfterS > 10 || tried === GIVE_UP_AFTER) throw problem;
    await new Promise((resolve) => setTimeout(resolve, 1000 * problem.retryAfterS));
  }
}

/** To be told by whoever meets it in another way. */
export function lost() {
  if (unreachable) return;
  unreachable = true;
  service.dispatchEvent(new Event("unreachable"));
  knock(1);
}

export function found() {
  if (!unreachable) return;
  unreachable = false;
  service.dispatchEvent(new Event("reachable"));
}

function knock(afterS) {
  setTimeout(async () => {
    try {
      await fetch("healthz", { cache: "no-store" });
      found();
    } catch {
      knock(Math.min(10, 1.5 * afterS));
    }
  }, 1000 * afterS);
}

/** Every line of a JSON Lines file. */
export async function lines(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Problem(answer.status);
  const text = await answer.text();
  return text.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
}
