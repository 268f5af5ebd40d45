"""Lets the tests here import their helper and `training_toys` by bare names, which importlib mode does not."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "training")]
