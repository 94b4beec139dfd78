"""Settings: read from one place, handed on whole, described where people look."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings
from tests.service import clasp

ODD = {
    "model": "/models/my model",
    "models_dir": Path("/weights, old"),
    "hub_endpoint": "http://mirror:8080/hf",
    "data_dir": Path("data dir/ü"),
    "database_url": "postgresql://u:p%40ss@host/db?x=1#y",
    "audio_store": "s3://bucket/some/prefix",
    "s3_endpoint": "http://[::1]:9000",
    "vector_store": "milvus:http://u:p%40ss@host:19530",
    "vector_store_token": "root:p,a=s's",
    "vector_store_half": True,
    "vector_index": "ivf",
    "flat_up_to": 5,
    "half_up_to": 6,
    "recall_floor": 0.5,
    "index_mmap": True,
    "device": "cpu",
    "threads": 3,
    "workers": 0,
    "host": "::1",
    "port": 0,
    "api_keys": ("first", "second=,'\"".replace(",", "")),
    "allow_anonymous": True,
    "max_upload_bytes": 123,
    "max_duration_s": 0.5,
    "url_hosts": ("example.org", "*.example.org:8443"),
    "url_timeout_s": 1.5,
    "max_pending": 0,
    "min_free_bytes": 1,
    "max_connections": 2,
    "request_timeout_s": 0.25,
    "upload_idle_s": 1.5,
    "log_level": "debug",
    "log_questions": True,
    "drain_s": 2.5,
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    import os

    for name in os.environ:
        if name.startswith("CLASP_"):
            monkeypatch.delenv(name)


def test_defaults_are_the_contract_s() -> None:
    """What runs without any setting is what the README shows."""
    settings = Settings()
    assert settings.model == "mini"
    assert settings.data_dir == Path("index_data")
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.vector_store == "faiss"
    assert settings.device == "auto"
    assert settings.api_keys == ()
    assert settings.url_hosts == ()
    assert settings.database_url is None


@pytest.mark.parametrize("values", [{}, ODD], ids=["defaults", "odd"])
def test_another_process_reads_the_same(monkeypatch: pytest.MonkeyPatch, values: dict[str, object]) -> None:
    """Workers get their settings by the environment; one that came over changed would index elsewhere."""
    settings = Settings(**values)
    for name, value in settings.as_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_every_setting_is_handed_on() -> None:
    """A setting that is added later may not be forgotten on the way to the workers."""
    full = Settings(**ODD)
    assert full.as_environment().keys() == {f"CLASP_{name.upper()}" for name in Settings.model_fields}


def test_a_file_beside_the_data_is_read_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`.env` is for what stays, the environment for what is tried once."""
    (tmp_path / ".env").write_text("CLASP_PORT=9000\nCLASP_HOST=0.0.0.0\nCLASP_API_KEYS=a, b\nOTHER=1\n")
    assert (Settings().port, Settings().host, Settings().api_keys) == (9000, "0.0.0.0", ("a", "b"))
    monkeypatch.setenv("CLASP_PORT", "9001")
    assert (Settings().port, Settings().host) == (9001, "0.0.0.0")


def test_the_hub_s_own_setting_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever uses a mirror has set HF_ENDPOINT already; ours is for who wants another one here."""
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert Settings().hub_endpoint == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")
    assert Settings().hub_endpoint == "http://mirror"
    monkeypatch.setenv("CLASP_HUB_ENDPOINT", "http://ours")
    assert Settings().hub_endpoint == "http://ours"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("port", "http"),
        ("threads", "-1"),
        ("workers", "-1"),
        ("max_upload_bytes", "0"),
        ("max_duration_s", "0"),
        ("audio_store", "s3://B/prefix"),
        ("audio_store", "/mnt/audio"),
        ("s3_endpoint", "https://key:secret@host"),
        ("url_hosts", "https://example.org"),
        ("url_hosts", "127.0.0.1"),
        ("url_timeout_s", "0"),
        ("max_pending", "-1"),
        ("request_timeout_s", "inf"),
        ("device", "tpu"),
        ("log_level", "loud"),
        ("vector_store", "redis"),
        ("vector_store", "milvus:secret@host"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """At the start, rather than by odd behaviour later."""
    monkeypatch.setenv(f"CLASP_{name.upper()}", value)
    with pytest.raises(ValidationError, match=name):
        Settings()


def test_a_wrong_setting_is_one_line_that_names_it(tmp_path: Path) -> None:
    """The operator reads this in a container's log; a traceback would bury it."""
    done = clasp("serve", cwd=tmp_path, port="http")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("clasp: setting CLASP_PORT: ")


def test_keys_are_not_shown() -> None:
    """Settings end up in error messages and debuggers."""
    assert "secret" not in repr(Settings(api_keys=("secret",)))


def test_help_lists_every_setting(tmp_path: Path) -> None:
    """`clasp serve --help` is the one list that cannot fall behind the code."""
    shown = clasp("serve", "--help", cwd=tmp_path).stdout
    for name, field in Settings.model_fields.items():
        assert f"CLASP_{name.upper()} " in shown
        assert field.description, f"{name} has no description"
