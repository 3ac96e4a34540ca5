"""``python -m post_server.serve``: as ``post serve``, with the settings of the environment."""

from __future__ import annotations

import sys

from post_server.serve import main
from post_server.settings import get_settings

sys.exit(main(get_settings()))
