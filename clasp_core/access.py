"""API keys: who may do what, and with which collections.

A key is `clasp_<id>_<secret>` (12 and 64 hexadecimal digits: a form that scanners for leaked secrets can
find) and is shown once. What is kept is the SHA-256 of its secret: 256 random bits cannot be guessed
however quickly they are hashed, so a slow hash would only slow down every request.

A library without any key is open. It is not open again when its last key is revoked: whoever revokes a key
that leaked does not mean to let everybody in.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import sqlalchemy as sa

from clasp_core.catalog import Catalog
from clasp_core.database import API_KEYS, lock
from clasp_core.errors import InvalidInput
from clasp_core.library import check_name
from clasp_core.limits import NO_QUOTA, Held, Quota, Rate

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_FORM = re.compile(r"clasp_([0-9a-f]{12})_([0-9a-f]{64})")
_NO_KEY = "0" * 64
"""What the secret is compared with where there is no such key: the SHA-256 of nothing anybody knows."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What somebody may do: with all `collections` where that is None. `name` is that of the key, if any, and
    `key` its id, if it is one of the library's; only such have limits."""

    name: str | None
    scopes: frozenset[Scope]
    collections: frozenset[str] | None = None
    key: str | None = None
    rate: Rate | None = None
    quota: Quota = NO_QUOTA

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is kept, without its secret. Times are UTC; `collections` None means all."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    collections: tuple[str, ...] | None
    created_at: datetime
    revoked_at: datetime | None
    rate: Rate | None = None
    quota: Quota = NO_QUOTA


class Keys:
    """The keys of a library, and those (`fixed`) that settings give, which may do everything.

    Nothing is remembered between calls: what one process creates or revokes holds for all from the moment
    the call returns. Thread-safe.
    """

    def __init__(self, catalog: Catalog, fixed: Sequence[str] = ()) -> None:
        self._catalog = catalog
        self._database = catalog.database
        self._fixed = [_digest(key) for key in fixed]

    def create(
        self,
        name: str,
        scopes: Collection[Scope],
        collections: Collection[str] | None = None,
        *,
        rate: Rate | None = None,
        quota: Quota = NO_QUOTA,
    ) -> tuple[ApiKey, str]:
        """A new key and its text, which is kept nowhere. `collections` None means all.

        Raises InvalidField for a name that cannot be one; InvalidInput where the name is taken, be it by a
        revoked key, since logs tell keys by their names; and for `admin` with a limit to collections,
        since what an operator sees counts all.
        """
        check_name("the key's name", name)
        if not scopes:
            raise InvalidInput("A key needs a scope.")
        if collections is not None and "admin" in scopes:
            raise InvalidInput(
                "A key with the scope admin sees all collections; it cannot be limited to some."
            )
        limits = (
            None if collections is None else tuple(sorted({check_name("collection", c) for c in collections}))
        )
        secret = secrets.token_hex(32)
        key = ApiKey(
            id=secrets.token_hex(6),
            name=name,
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            collections=limits,
            created_at=_now(),
            revoked_at=None,
            rate=rate,
            quota=quota,
        )
        kept = ("id", "name", "scopes", "collections", "created_at")
        row = {field: getattr(key, field) for field in kept} | _limits(rate, quota)
        with self._database.writing() as db:
            lock(db, f"key called {name}")
            if db.execute(sa.select(API_KEYS.c.id).where(API_KEYS.c.name == name)).first() is not None:
                raise InvalidInput(f"There is a key called {name!r} already, or was; take another name.")
            db.execute(sa.insert(API_KEYS).values(**row, sha256=_digest(secret)))
        return key, f"clasp_{key.id}_{secret}"

    def list(self) -> list[ApiKey]:
        """All that were ever created, oldest first."""
        with self._database.reading() as db:
            rows = db.execute(sa.select(API_KEYS).order_by(API_KEYS.c.created_at, API_KEYS.c.name))
            return [_key(row) for row in rows]

    def held(self) -> dict[str, Held]:
        """What the library holds of each key's uploads, by the key's id; those without any are absent."""
        return self._catalog.held()

    def limit(self, name: str, change: Callable[[Rate | None, Quota], tuple[Rate | None, Quota]]) -> ApiKey:
        """Give a key other limits, made by `change` of those it has. They hold for requests that begin later.

        Raises InvalidInput where there is no such key, or it is revoked.
        """
        here = API_KEYS.c.name == name
        with self._database.writing() as db:
            row = db.execute(sa.select(API_KEYS).where(here).with_for_update()).one_or_none()
            if row is None or row.revoked_at is not None:
                raise InvalidInput(f"There is no key called {name!r}, or it is revoked.")
            old = _key(row)
            db.execute(sa.update(API_KEYS).where(here).values(_limits(*change(old.rate, old.quota))))
            return _key(db.execute(sa.select(API_KEYS).where(here)).one())

    def revoke(self, name: str) -> ApiKey:
        """Make a key worthless, for good; doing so again changes nothing. Raises InvalidInput."""
        here = API_KEYS.c.name == name
        with self._database.writing() as db:
            valid = here & API_KEYS.c.revoked_at.is_(None)
            db.execute(sa.update(API_KEYS).where(valid).values(revoked_at=_now()))
            row = db.execute(sa.select(API_KEYS).where(here)).one_or_none()
        if row is None:
            raise InvalidInput(f"There is no key called {name!r}.")
        return _key(row)

    def needed(self) -> bool:
        """Whether nobody is let in without a key: where settings give one, or one was ever created."""
        if self._fixed:
            return True
        with self._database.reading() as db:
            return _is_any(db)

    def authenticate_fixed(self, given: str) -> Grant | None:
        """As `authenticate`, by the settings' keys only, which asks no database."""
        digest = _digest(given)
        if any([hmac.compare_digest(digest, fixed) for fixed in self._fixed]):
            return Grant("CLASP_API_KEYS", frozenset(SCOPES))
        return None

    def authenticate(self, given: Sequence[str]) -> Sequence[Grant | None]:
        """What whoever presents each of these texts may do: None for nothing, everything where no key is
        needed. They are looked up together, since to look up many costs hardly more than one.

        Secrets are compared by their hashes and in constant time, also where there is no such key.
        """
        forms = [_FORM.fullmatch(text) for text in given]
        ids = {parts[1] for parts in forms if parts is not None}
        rows: dict[str, Any] = {}
        with self._database.reading() as db:
            if ids:
                rows = {row.id: row for row in db.execute(sa.select(API_KEYS).where(API_KEYS.c.id.in_(ids)))}
            is_open = not self._fixed and not rows and not _is_any(db)
        if is_open:
            return [Grant(None, frozenset(SCOPES))] * len(given)
        return [
            self.authenticate_fixed(text) or (None if parts is None else _granted(parts[1], parts[2], rows))
            for text, parts in zip(given, forms, strict=True)
        ]


def _granted(key_id: str, secret: str, rows: Mapping[str, Any]) -> Grant | None:
    row = rows.get(key_id)
    is_right = hmac.compare_digest(_digest(secret), _NO_KEY if row is None else row.sha256)
    if row is None or not is_right or row.revoked_at is not None:
        return None
    key = _key(row)
    limits = None if key.collections is None else frozenset(key.collections)
    return Grant(key.name, frozenset(key.scopes), limits, key.id, key.rate, key.quota)


def _is_any(db: sa.Connection) -> bool:
    """Whether a key was ever created."""
    return bool(db.execute(sa.select(sa.exists().select_from(API_KEYS))).scalar_one())


def _key(row: Any) -> ApiKey:  # noqa: ANN401 - SQLAlchemy rows are untyped
    return ApiKey(
        id=row.id,
        name=row.name,
        scopes=tuple(row.scopes),
        collections=None if row.collections is None else tuple(row.collections),
        created_at=row.created_at,
        revoked_at=row.revoked_at,
        rate=None if row.rate is None else Rate.parse(row.rate),
        quota=Quota(row.max_recordings, row.max_bytes, row.max_hours),
    )


def _limits(rate: Rate | None, quota: Quota) -> dict[str, object]:
    """As columns."""
    return {
        "rate": None if rate is None else str(rate),
        "max_recordings": quota.recordings,
        "max_bytes": quota.size_bytes,
        "max_hours": quota.hours,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
