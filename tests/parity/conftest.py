"""Comparisons with the libraries of the `parity` extra: collected only where they are installed."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_torch_*.py"]
