"""``post demo``: the whole journey on one machine, over HTTP, on a real model and real text.

settings.py holds every number; fetch.py gets the model and the texts; texts.py makes data sets of them; tiny.py makes
the stand-ins of ``--fast``; provider.py is the provider's side as child processes; owner.py the data owner's work;
journey.py the order of it all; display.py and report.py what you see and keep.
"""

from __future__ import annotations
