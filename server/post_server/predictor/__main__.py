"""``python -m post_server.predictor``: like ``post predictor``, with the settings from the environment."""

from __future__ import annotations

import sys

from post_server.predictor import main
from post_server.settings import get_settings

sys.exit(main(get_settings()))
