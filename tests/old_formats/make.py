"""Keep the catalogue's newest format for tests to come: python -m tests.old_formats.make

Whoever adds a migration runs this and commits the file that it writes, once; an older file is never made
anew, since what older versions wrote is a fact.
"""

import sqlite3
import tempfile
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import alembic.command
import alembic.config
import alembic.script

import clasp_core
from clasp_core.database import create_engine
from tests.core.doubles import DIM, MODEL, random_vectors

FOLDER = Path(__file__).parent
READY = ["one", "two", "three"]
WAITING = "waiting"
FAILED = "failed"


def config() -> alembic.config.Config:
    made = alembic.config.Config()
    made.set_main_option("script_location", str(Path(clasp_core.__file__).parent / "migrations"))
    return made


def revisions() -> list[str]:
    """All there are, oldest first."""
    scripts = alembic.script.ScriptDirectory.from_config(config())
    return [script.revision for script in scripts.walk_revisions()][::-1]


def waveform(key: int) -> bytes:
    """What is kept of two seconds of sound."""
    return bytes(range(key, key + 40))


def dump(revision: str) -> str:
    """The SQL of a small library at that revision: three ready recordings, one waiting, one failed, and the
    traces of one that was deleted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalog.sqlite3"
        engine = create_engine(f"sqlite:///{path}", migrating=True)
        with engine.connect().execution_options(clasp_write=True) as db, db.begin():
            migrating = config()
            migrating.attributes["connection"] = db
            alembic.command.upgrade(migrating, revision)
        engine.dispose()
        with closing(sqlite3.connect(path)) as raw:
            tables = {row[0] for row in raw.execute("SELECT name FROM sqlite_master")}
            columns = {row[1] for row in raw.execute("PRAGMA table_info(segments)")}
            if "model" in columns:
                raw.execute(
                    "INSERT INTO models (fingerprint, name, dim, state) VALUES (?, 'spectral', ?, 'active')",
                    (MODEL, DIM),
                )
            for key, name in enumerate([*READY, WAITING, FAILED], 1):
                is_ready = name in READY
                raw.execute(
                    "INSERT INTO recordings (key, id, collection, sha256, size_bytes, media_type, lang,"
                    " metadata, created_at, status, duration_s, segments, model, error_code, error_detail,"
                    " attempts)"
                    " VALUES (?, ?, 'default', ?, ?, 'audio/wav', 'fa', ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        key,
                        name,
                        sha256(name.encode()).hexdigest(),
                        len(name),
                        f'{{"name": "{name}", "\\u0646\\u0627\\u0645": {key}}}',
                        f"2026-01-0{key} 00:00:00.000000",
                        "ready" if is_ready else "pending" if name == WAITING else "failed",
                        2.0 if is_ready else None,
                        2 if is_ready else None,
                        MODEL if is_ready else None,
                        "silent_audio" if name == FAILED else None,
                        "Nothing can be heard." if name == FAILED else None,
                        int(name != WAITING),
                    ),
                )
                if is_ready:
                    for ordinal, vector in enumerate(random_vectors(key, 2)):
                        row = {
                            "recording": key,
                            "ordinal": ordinal,
                            "start_s": float(ordinal),
                            "end_s": ordinal + 1.0,
                            "vector": vector.astype("<f4").tobytes(),
                        } | ({"model": MODEL} if "model" in columns else {})
                        names, marks = ", ".join(row), ", ".join("?" * len(row))
                        raw.execute(f"INSERT INTO segments ({names}) VALUES ({marks})", list(row.values()))
                    if "waveforms" in tables:
                        raw.execute(
                            "INSERT INTO waveforms (recording, step_s, levels) VALUES (?, 0.05, ?)",
                            (key, waveform(key)),
                        )
                    raw.execute("INSERT INTO changes (recording, token) VALUES (?, ?)", (key, f"{key:016x}"))
            raw.execute("INSERT INTO changes (recording, token) VALUES (9, '0000000000000009')")
            raw.execute("UPDATE sqlite_sequence SET seq = 9 WHERE name = 'recordings'")
            raw.commit()
            return "\n".join(raw.iterdump()) + "\n"


def main() -> None:
    newest = revisions()[-1]
    if not (FOLDER / f"{newest}.sql").exists():
        (FOLDER / f"{newest}.sql").write_text(dump(newest))


if __name__ == "__main__":
    main()
