# Added to the end of tests/conftest.py in the copy that all.py works in, with its FOLDER.

import json
import os
from pathlib import Path

OWN = "tests/FOLDER/"


def pytest_collection_modifyitems(items):
    """Run the folder's own tests first, and of these and the others the fast ones first."""
    stats = Path("mutmut-stats.json")
    seconds = json.loads(stats.read_text())["duration_by_test"] if stats.is_file() else {}
    items.sort(key=lambda item: (not item.nodeid.startswith(OWN), seconds.get(item.nodeid, 0)))


def pytest_exception_interact(call):
    """End a run in which a test took too long with the status that mutmut counts as a timeout."""
    if "Timeout (>" in str(call.excinfo.value):
        os._exit(36)
