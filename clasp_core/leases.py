"""Leases: rows of a table as jobs, each in the hands of one worker at a time, that nobody's death keeps."""

import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from clasp_core.errors import ProcessingFailed
from clasp_core.types import Seconds

MAX_ATTEMPTS = 5
"""A recording that was being processed when its worker died this many times is not tried again."""


class Leases:
    """Leases on rows of one table. Each function runs inside a writing transaction; `lease` passes over rows
    that others are changing."""

    def __init__(self, table: sa.Table, key: "sa.Column[int]", scope: sa.ColumnElement[bool]) -> None:
        self.scope = scope
        self._table = table
        self._key = key

    def lease(
        self, db: sa.Connection, owner: str, limit: int, lease_s: Seconds, suspects: bool = True
    ) -> list[int]:
        """Keys of what is `owner`'s from now on; without `suspects` only of what was never tried."""
        now, job = time.time(), self._table.c
        expired = (job.status == "processing") & (job.lease_until < now)
        db.execute(
            sa.update(self._table)
            .where(self.scope & self._key.in_(self._unclaimed(expired & (job.attempts >= MAX_ATTEMPTS))))
            .values(
                status="failed",
                error_code=ProcessingFailed.code,
                error_detail=f"Processing was cut short {MAX_ATTEMPTS} times; upload it again to retry.",
                lease_owner=None,
                lease_until=None,
            )
        )
        free = (job.status == "pending") | expired
        if not suspects:
            free &= job.attempts == 0
        query = self._unclaimed(free).add_columns(job.attempts).order_by(job.attempts, self._key)
        taken = _without_suspects(db.execute(query.limit(limit)).all())
        db.execute(
            sa.update(self._table)
            .where(self.scope & self._key.in_(taken))
            .values(
                status="processing",
                lease_owner=owner,
                lease_until=now + lease_s,
                attempts=job.attempts + 1,
            )
        )
        return taken

    def extend(self, db: sa.Connection, owner: str, lease_s: Seconds) -> None:
        db.execute(sa.update(self._table).where(self._held(owner)).values(lease_until=time.time() + lease_s))

    def release(self, db: sa.Connection, owner: str | None, died: bool) -> None:
        db.execute(
            sa.update(self._table)
            .where(self._held(owner))
            .values(
                # an expired lease rather than `pending`: `lease` then applies the limit of attempts
                lease_until=0.0 if died else None,
                status="processing" if died else "pending",
                lease_owner=None,
                attempts=self._table.c.attempts - (0 if died else 1),
            )
        )

    def finish(self, db: sa.Connection, key: int, owner: str, **values: object) -> bool:
        """Whether `owner` held it; if so it is what `values` say."""
        done = db.execute(
            sa.update(self._table)
            .where(self._held(owner) & (self._key == key))
            .values(**values, lease_owner=None, lease_until=None)
        )
        return done.rowcount == 1

    def _unclaimed(self, condition: sa.ColumnElement[bool]) -> "sa.Select[Any]":
        """Keys of such rows that nobody else is changing, which nobody else can change from now on."""
        query = sa.select(self._key.label("key")).where(self.scope & condition)
        return query.with_for_update(skip_locked=True, of=self._table)

    def _held(self, owner: str | None) -> sa.ColumnElement[bool]:
        """What is leased by `owner`, or by anybody."""
        job = self._table.c
        theirs = job.lease_owner.is_not(None) if owner is None else job.lease_owner == owner
        return self.scope & theirs & (job.status == "processing")


def _without_suspects(candidates: Sequence[Any]) -> list[int]:
    """Keys to lease together: the first alone if it has failed before, else all that never have."""
    if candidates and candidates[0].attempts:
        return [candidates[0].key]
    return [candidate.key for candidate in candidates if not candidate.attempts]
