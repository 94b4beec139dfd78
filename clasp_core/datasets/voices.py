"""Voices that read text aloud: four synthesisers behind one method.

A voice is named ENGINE:VOICE, with options at its end:

    espeak-ng:en-us+f3:speed=170:pitch=40   formants, 130 languages, 100 variants; 100 times real time
    flite:slt:stretch=1.1                   diphones and statistics, English; 60 times
    piper:/path/en_US-joe-medium.onnx       neural (VITS), a .onnx with its .onnx.json; 4 times
    kokoro:/path/af_heart                   neural (StyleTTS 2), the folder of the model and its voices; 1

Speeds are of one core. The neural engines run on one thread, since who wants speed starts processes.
espeak-ng, Piper and the phonemes of Kokoro are GPL programs: optional, and called, never shipped. Piper
draws noise from its own generator, so its speech differs a little each time; the others repeat exactly.
"""

import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import soundfile as sf

from clasp_core.errors import InvalidField, InvalidLanguage, ProcessingFailed, VoiceUnavailable
from clasp_core.language import canonical_tag
from clasp_core.types import Seconds, Waveform

_PATIENCE_S: Seconds = 120  # for one sentence from a program that takes a tenth of a second

_QUIETEST = 0.02
"""A peak below this is no speech: flite hums at 0.003 over letters it does not know, and voices reach 0.3."""


class Voice(Protocol):
    """Someone who reads aloud. One process's; not for two threads at once."""

    @property
    def name(self) -> str:
        """What manifests call the speaker: as it was opened, less the folders of this machine."""

    @property
    def lang(self) -> str | None:
        """Canonical BCP 47 tag of the language it speaks, where that is known."""

    @property
    def licence(self) -> str:
        """Under which terms the voice comes, for the data set's card."""

    def speak(self, text: str) -> tuple[Waveform, int]:
        """The text as mono samples and their rate in Hz. Raises ProcessingFailed where nothing is said."""


def open_voice(text: str) -> Voice:
    """The voice of this name, ready to speak.

    Raises InvalidField for a name of another form or an option outside its range; VoiceUnavailable, which
    says what to install, where the engine or the voice is not on this machine.
    """
    engine, _, rest = text.partition(":")
    if engine not in _ENGINES or not rest:
        known = ", ".join(f"{name}:VOICE" for name in _ENGINES)
        raise InvalidField(f"A voice is named {known}; {text!r} is none.")
    voice, *settings = rest.split(":")
    while settings and "=" not in settings[0]:
        voice += f":{settings.pop(0)}"
    opened, limits = _ENGINES[engine]
    return opened(voice, _options(text, settings, limits))  # type: ignore[no-any-return]


_Range = tuple[float, float]


def _options(text: str, settings: list[str], limits: Mapping[str, _Range]) -> dict[str, float]:
    options = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in limits:
            raise InvalidField(
                f"In the voice {text!r}, {name!r} is no option; there are {', '.join(limits)}."
            )
        least, most = limits[name]
        try:
            options[name] = float(value)
        except ValueError:
            options[name] = float("nan")
        if not least <= options[name] <= most:
            raise InvalidField(f"In the voice {text!r}, {name} goes from {least:g} to {most:g}.")
    return options


def _named(engine: str, voice: str, options: Mapping[str, float]) -> str:
    return ":".join([engine, voice, *(f"{name}={value:g}" for name, value in options.items())])


def _heard(samples: Waveform, rate: int, voice: str, text: str) -> tuple[Waveform, int]:
    """Samples that hold something, on which alone the builders of data sets rely."""
    if not len(samples) or not np.isfinite(samples).all() or np.abs(samples).max() < _QUIETEST:
        raise ProcessingFailed(f"The voice {voice} says nothing where it should read {text[:60]!r}.")
    return samples, rate


def _language(tag: str) -> str | None:
    try:
        return canonical_tag(tag.replace("_", "-"))
    except InvalidLanguage:
        return None


# --- programs


class _Espeak:
    """espeak-ng, a process for each text: 30 ms to start."""

    licence = "espeak-ng, GPL-3.0-or-later (the program; not what it says)"

    def __init__(self, voice: str, options: Mapping[str, float]) -> None:
        self._program = _program("espeak-ng", "apt install espeak-ng")
        self.name = _named("espeak-ng", voice, options)
        self.lang = _language(voice.partition("+")[0])
        speed, pitch = options.get("speed", 160), options.get("pitch", 50)
        self._arguments = ["-v", voice, "-s", f"{speed:.0f}", "-p", f"{pitch:.0f}", "-b", "1"]
        base, _, variant = voice.partition("+")
        # Where it lacks a voice it takes the next best ("no-such" is Norwegian), and ignores a wrong variant.
        known = base.lower() in self._listed("--voices")
        if not (known and (not variant or variant.lower() in self._listed("--voices=variant"))):
            raise VoiceUnavailable(
                f"espeak-ng has no voice {voice!r}; `espeak-ng --voices` lists them, and"
                " `espeak-ng --voices=variant` what may follow a '+'."
            )

    def _listed(self, question: str) -> set[str]:
        """The codes and files in its table: `5  cmn  --/M  Chinese  sit/cmn  (zh-cmn 5)(zh 5)`."""
        table = _run([self._program, question], "").stdout.decode(errors="replace")
        names: set[str] = set()
        for line in table.lower().splitlines()[1:]:
            _, code, _, _, file, *others = line.split()
            names |= {code, file.rpartition("/")[2], *re.findall(r"\(([\w-]+)", " ".join(others))}
        return names

    def speak(self, text: str) -> tuple[Waveform, int]:
        answer = _run([self._program, *self._arguments, "--stdout", "--stdin"], text)
        if answer.returncode or not answer.stdout:
            raise ProcessingFailed(f"espeak-ng failed: {_complaint(answer)}")
        return _heard(*_wav(answer.stdout), self.name, text)


class _Flite:
    """flite, a process for each text, through files: it can write nowhere else."""

    licence = "flite (Carnegie Mellon University), BSD-like"
    lang = "en-US"

    def __init__(self, voice: str, options: Mapping[str, float]) -> None:
        self._program = _program("flite", "apt install flite")
        listed = _run([self._program, "-lv"], "").stdout.decode(errors="replace")
        # Never what is not listed: flite takes other names for files and addresses to load, or ignores them.
        voices = [name for name in listed.partition(":")[2].split() if name != "awb_time"]  # a clock's
        if voice not in voices:
            raise VoiceUnavailable(f"flite has no voice {voice!r}, but {', '.join(voices)}.")
        self.name = _named("flite", voice, options)
        self._arguments = ["-voice", voice]
        for option, feature in (("stretch", "duration_stretch"), ("pitch", "int_f0_target_mean")):
            if option in options:
                self._arguments += ["--setf", f"{feature}={options[option]:g}"]

    def speak(self, text: str) -> tuple[Waveform, int]:
        with tempfile.TemporaryDirectory() as folder:
            said, sound = Path(folder, "text"), Path(folder, "sound.wav")
            said.write_text(text + "\n", encoding="utf-8")
            answer = _run([self._program, *self._arguments, "-f", str(said), "-o", str(sound)], "")
            if answer.returncode or not sound.is_file():
                raise ProcessingFailed(f"flite failed: {_complaint(answer)}")
            return _heard(*_wav(sound.read_bytes()), self.name, text)


def _program(name: str, advice: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise VoiceUnavailable(f"The program {name} is not on this machine; install it ({advice}).")
    return path


def _run(command: list[str], text: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(  # noqa: S603 - a program found by name, arguments checked, text on stdin
            command, input=text.encode(), capture_output=True, timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ProcessingFailed(f"{Path(command[0]).name} took too long over {text[:60]!r}.") from error


def _complaint(answer: subprocess.CompletedProcess[bytes]) -> str:
    said = answer.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"exit status {answer.returncode}"


def _wav(content: bytes) -> tuple[Waveform, int]:
    try:
        samples, rate = sf.read(io.BytesIO(content), dtype="float32")
    except sf.SoundFileError as error:
        raise ProcessingFailed("The synthesiser wrote no sound file.") from error
    return samples, int(rate)


# --- neural engines


class _Piper:
    """A Piper voice, one thread."""

    def __init__(self, voice: str, options: Mapping[str, float]) -> None:
        model = Path(voice)
        settings = Path(f"{voice}.json")
        try:
            import onnxruntime
            from piper import PiperConfig, PiperVoice, SynthesisConfig
        except ImportError as error:
            raise VoiceUnavailable(
                "Piper is not on this machine; install it (pip install 'clasp-search[piper]')."
            ) from error
        if not (model.is_file() and settings.is_file()):
            raise VoiceUnavailable(
                f"A Piper voice is a file .onnx with its .onnx.json beside it; {voice} is none."
                " Voices are published as rhasspy/piper-voices."
            )
        import json

        self._config = PiperConfig.from_dict(json.loads(settings.read_text(encoding="utf-8")))
        session = _session(onnxruntime, model)
        self._voice = PiperVoice(session=session, config=self._config)
        self._manner = SynthesisConfig(
            speaker_id=int(options["speaker"]) if "speaker" in options else None,
            length_scale=options.get("length"),
            noise_scale=options.get("noise"),
        )
        if not options.get("speaker", 0) < self._config.num_speakers:
            raise InvalidField(f"The voice {model.stem} has {self._config.num_speakers} speakers, from 0 on.")
        self.name = _named("piper", model.stem, options)
        self.lang = _language(model.stem.partition("-")[0])
        card = model.with_name("MODEL_CARD")
        licences = (
            [line for line in card.read_text(encoding="utf-8").splitlines() if "icen" in line]
            if card.is_file()
            else []
        )
        self.licence = "Piper, GPL-3.0-or-later (the program); voice: " + (
            "; ".join(line.strip(" *#") for line in licences) or "see its model card"
        )

    def speak(self, text: str) -> tuple[Waveform, int]:
        said = [chunk.audio_float_array for chunk in self._voice.synthesize(text, self._manner)]
        samples = np.concatenate(said) if said else np.empty(0, np.float32)
        return _heard(samples.astype(np.float32), int(self._config.sample_rate), self.name, text)


_KOKORO_LANGUAGES = {
    "a": ("en-us", "en-US"), "b": ("en-gb", "en-GB"), "e": ("es", "es"), "f": ("fr-fr", "fr-FR"),
    "h": ("hi", "hi"), "i": ("it", "it"), "j": ("ja", "ja"), "p": ("pt-br", "pt-BR"), "z": ("cmn", "zh"),
}  # fmt: skip
"""By a voice's first letter: what its phonemizer calls the language, and its tag."""

_KOKORO_STYLE = (510, 1, 256)  # a style for each number of phonemes


class _Kokoro:
    """A Kokoro-82M voice, one thread.

    Its folder holds the model, the one .onnx there, and the voices: VOICE.bin or voices/VOICE.bin (raw
    float32, as the package kokoro-js has them) or voices-v1.0.bin (all of them, as kokoro-onnx does).
    """

    licence = "Kokoro-82M, Apache-2.0 (model and voices); phonemes by espeak-ng, GPL-3.0-or-later"

    def __init__(self, voice: str, options: Mapping[str, float]) -> None:
        try:
            import kokoro_onnx
            import onnxruntime
        except ImportError as error:
            raise VoiceUnavailable(
                "Kokoro is not on this machine; install it (pip install 'clasp-search[kokoro]')."
            ) from error
        folder, name = Path(voice).parent, Path(voice).name
        models = sorted(folder.glob("*.onnx"))
        if len(models) != 1 or name[:1] not in _KOKORO_LANGUAGES:
            raise VoiceUnavailable(
                f"A Kokoro voice is FOLDER/VOICE, such as kokoro/af_heart, with one model (.onnx) in the"
                f" folder; {voice} is none. Models are published as onnx-community/Kokoro-82M-v1.0-ONNX."
            )
        self._style = _kokoro_style(folder, name)
        with tempfile.NamedTemporaryFile(suffix=".npz") as voices:  # it insists on a file of voices
            np.savez(voices, **cast(Any, {name: self._style}))
            voices.flush()
            session = _session(onnxruntime, models[0])
            self._kokoro = kokoro_onnx.Kokoro.from_session(session, voices.name)
        self._speed = options.get("speed", 1.0)
        self._phonemes, self.lang = _KOKORO_LANGUAGES[name[0]]
        self.name = _named("kokoro", name, options)

    def speak(self, text: str) -> tuple[Waveform, int]:
        samples, rate = self._kokoro.create(text, self._style, speed=self._speed, lang=self._phonemes)
        return _heard(np.asarray(samples, np.float32), int(rate), self.name, text)


def _kokoro_style(folder: Path, name: str) -> Waveform:
    for raw in (folder / f"{name}.bin", folder / "voices" / f"{name}.bin"):
        if raw.is_file():
            style = np.fromfile(raw, "<f4")
            if style.size != np.prod(_KOKORO_STYLE) or not np.isfinite(style).all():
                raise VoiceUnavailable(
                    f"{raw} is not a voice of Kokoro-82M: it should hold 510 x 256 numbers."
                )
            return style.reshape(_KOKORO_STYLE).astype(np.float32)
    for together in sorted(folder.glob("voices*.bin")):
        with np.load(together) as voices:  # refuses pickles
            if name in voices:
                return np.asarray(voices[name], np.float32).reshape(_KOKORO_STYLE)
    raise VoiceUnavailable(
        f"There is no voice {name} in {folder}: neither {name}.bin nor in voices-v1.0.bin."
    )


def _session(onnxruntime: Any, model: Path) -> Any:  # noqa: ANN401 - an optional package's own type
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


_ENGINES: dict[str, tuple[Any, Mapping[str, _Range]]] = {
    "espeak-ng": (_Espeak, {"speed": (80, 450), "pitch": (0, 99)}),
    "flite": (_Flite, {"stretch": (0.5, 2.0), "pitch": (50, 400)}),
    "piper": (_Piper, {"speaker": (0, 10_000), "length": (0.5, 2.0), "noise": (0.0, 2.0)}),
    "kokoro": (_Kokoro, {"speed": (0.5, 2.0)}),
}
