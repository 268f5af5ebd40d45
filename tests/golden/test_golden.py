"""One test per golden file. The topic modules imported here register themselves."""

import importlib
from pathlib import Path

import pytest
from golden_harness import TOPICS, pending

for module in sorted(Path(__file__).parent.glob("golden_*_*.py")):
    importlib.import_module(module.stem)


def test_golden(golden):
    if golden.topic not in TOPICS:
        if golden.topic in pending():
            return  # listed in pending.txt; its line in the summary says so
        pytest.fail(f"no test for topic {golden.topic}; write one or list it in tests/golden/pending.txt")
    TOPICS[golden.topic](golden)
    golden.finish()


def test_pending_topics_have_no_test():
    stale = sorted(set(pending()) & set(TOPICS))
    assert not stale, f"covered topics still listed in pending.txt: {stale}"
