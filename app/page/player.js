// One voice at a time: whatever plays, plays here.

import { pathOf } from "./service.js";

const KEEP = "play-on";

/**
 * Tells "change" when it begins, pauses or ends, "move" while it plays (as often as the screen is drawn), and
 * "fail" where the browser cannot play the recording. Times are seconds from the recording's beginning.
 */
class Player extends EventTarget {
  #sound = new Audio();
  #until = null;
  #wished = null;
  recording = null;

  constructor() {
    super();
    this.#sound.preload = "auto";
    for (const name of ["play", "pause", "ended"]) this.#sound.addEventListener(name, () => this.#tell("change"));
    this.#sound.addEventListener("play", () => this.#follow());
    this.#sound.addEventListener("seeked", () => this.#tell("move"));
    this.#sound.addEventListener("loadedmetadata", () => this.#arrive());
    this.#sound.addEventListener("error", () => this.recording && this.#tell("fail"));
  }

  get playing() {
    return !this.#sound.paused && !this.#sound.ended;
  }

  get at() {
    return this.#wished ?? this.#sound.currentTime;
  }

  /** Whether playing goes on beyond the passage that was asked for; remembered. */
  get playsOn() {
    return localStorage.getItem(KEEP) === "yes";
  }

  set playsOn(value) {
    localStorage.setItem(KEEP, value ? "yes" : "no");
    if (value) this.#until = null;
  }

  has(recording) {
    return this.recording?.id === recording.id && this.recording?.collection === recording.collection;
  }

  /** From a second on, up to another one, or to the end. */
  play(recording, from = 0, until = null) {
    this.#until = until;
    if (!this.has(recording)) {
      this.recording = recording;
      this.#sound.src = pathOf(recording, "/content");
    }
    this.seek(from);
    this.#sound.play().catch(() => {}); // "error" tells, or it was stopped before it began
  }

  seek(at) {
    this.#wished = Math.max(0, at);
    if (this.#sound.readyState > 0) this.#arrive();
    this.#tell("move");
  }

  /** The same place again, or silence. */
  toggle() {
    if (this.playing) this.#sound.pause();
    else if (this.recording) this.#sound.play().catch(() => {});
  }

  pause() {
    this.#sound.pause();
  }

  stop() {
    if (!this.recording) return;
    this.#sound.pause();
    this.recording = this.#wished = null;
    this.#sound.removeAttribute("src");
    this.#sound.load();
    this.#tell("change");
  }

  #arrive() {
    if (this.#wished === null) return;
    this.#sound.currentTime = this.#wished;
    this.#wished = null;
  }

  #follow() {
    if (!this.playing) return;
    if (this.#until !== null && this.#wished === null && this.#sound.currentTime >= this.#until) {
      this.#sound.pause();
      this.#until = null;
    }
    this.#tell("move");
    requestAnimationFrame(() => this.#follow());
  }

  #tell(what) {
    this.dispatchEvent(new Event(what));
  }
}

export const player = new Player();
