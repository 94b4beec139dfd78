// The microphone, lent for one recording at a time.

import { say } from "./words.js";

const KINDS = ["audio/webm;codecs=opus", "audio/mp4;codecs=opus", "audio/mp4", "audio/ogg;codecs=opus"];

/** Why nothing can be recorded, in words for people. */
export class NoMicrophone extends Error {}

/**
 * Begins to record. `onlevel` is told how loud it is, from 0 to 1, as often as the screen is drawn.
 *
 * Gives `{stop}`; `await stop()` gives `{sound, seconds, loudest}` and takes the microphone's light off.
 * Throws NoMicrophone.
 */
export async function record(onlevel) {
  if (!navigator.mediaDevices) throw new NoMicrophone(say(isSecureContext ? "microphone.none" : "microphone.insecure"));
  const type = globalThis.MediaRecorder && KINDS.find((kind) => MediaRecorder.isTypeSupported(kind));
  if (!type) throw new NoMicrophone(say("microphone.unable"));
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  } catch (error) {
    throw new NoMicrophone(say(error.name === "NotAllowedError" ? "microphone.refused" : "microphone.none"));
  }
  const pieces = [];
  const recorder = new MediaRecorder(stream, { mimeType: type, audioBitsPerSecond: 64000 });
  recorder.addEventListener("dataavailable", ({ data }) => data.size && pieces.push(data));
  const context = new AudioContext();
  const analyser = new AnalyserNode(context, { fftSize: 1024 });
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  let loudest = 0;
  let going = true;
  (function measure() {
    if (!going) return;
    analyser.getFloatTimeDomainData(samples);
    const power = samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length;
    const level = Math.max(0, Math.min(1, 1 + Math.log10(power + 1e-9) / 6)); // 60 dB
    loudest = Math.max(loudest, level);
    onlevel(level);
    requestAnimationFrame(measure);
  })();
  recorder.start();
  const began = performance.now();

  async function stop() {
    const seconds = (performance.now() - began) / 1000;
    going = false;
    await new Promise((resolve) => {
      recorder.addEventListener("stop", resolve);
      recorder.stop();
    });
    for (const track of stream.getTracks()) track.stop();
    await context.close();
    onlevel(0);
    return { sound: new Blob(pieces, { type: type.split(";")[0] }), seconds, loudest };
  }

  return { stop };
}
