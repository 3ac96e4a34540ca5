"""One module per noun of the API. Verbs take keywords only; nothing prints by itself."""

from __future__ import annotations
