"""What the exit status of a job's process tells its supervisor."""

from __future__ import annotations

ENDED, STORAGE_AWAY, DATABASE_AWAY, INTERRUPTED, LOST = 0, 73, 74, 75, 76
"""The row says how it ended; no store; no database; a checkpoint was kept after SIGTERM; not our job any more."""
PASSING = {STORAGE_AWAY: "the store can't be reached", DATABASE_AWAY: "the database can't be reached"}
"""What says nothing about the job: it is tried again a little later, and that doesn't count as an attempt."""
