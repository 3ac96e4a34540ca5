"""``python -m post_server.worker``: like ``post worker``, with the settings from the environment."""

from __future__ import annotations

import sys

from post_server.settings import get_settings
from post_server.worker import main

sys.exit(main(get_settings()))
