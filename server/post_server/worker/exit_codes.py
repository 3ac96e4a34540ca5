"""Exit statuses by which a job's process reports to its supervisor."""

from __future__ import annotations

ENDED, STORAGE_AWAY, DATABASE_AWAY, INTERRUPTED, LOST = 0, 73, 74, 75, 76
"""The row shows how it ended; no store; no database; checkpoint saved after SIGTERM; the lease was lost."""
PASSING = {STORAGE_AWAY: "the store can't be reached", DATABASE_AWAY: "the database can't be reached"}
"""Faults that aren't the job's: it is tried again a little later, and that doesn't count as an attempt."""
