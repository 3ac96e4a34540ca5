"""``post demo``: the whole method on one machine, over HTTP, with a real model and real text.

settings.py has every number. fetch.py downloads the model and the texts, and texts.py turns them into data sets.
tiny.py makes the stand-ins for ``--fast``. provider.py runs the provider as child processes, owner.py is the data
owner, and journey.py calls both in order. display.py shows progress; results.py saves and prints the results.
"""

from __future__ import annotations
