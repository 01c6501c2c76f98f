"""Shared set-up: helper modules beside the tests are importable under importlib mode; hypothesis has no clock."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("house", deadline=None)  # no timed asserts: the machine may be busy
settings.load_profile("house")
