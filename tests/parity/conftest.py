"""Comparisons with the libraries of the `parity` extra: collected only where they are installed, and never online.

Lets the tests here import `exchange` by its bare name; pytest's importlib mode puts no folder on the path.
"""

import importlib.util
import os
import sys
from pathlib import Path

NEEDS = {"test_torch_*.py": ["torch"], "test_diffusers_*.py": ["torch", "diffusers", "transformers", "peft"]}

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # before those libraries are imported
collect_ignore_glob = [
    pattern for pattern, names in NEEDS.items() if not all(importlib.util.find_spec(name) for name in names)
]
