"""Shared set-up: makes the helper modules beside the tests importable under importlib mode."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
