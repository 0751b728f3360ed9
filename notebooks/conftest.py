"""nbval compares what a notebook prints and nothing else, under the conditions it was built under.

Also here: a kernel that tries to reach the network fails the cell that tried, even where the code
catches the error (`scripts/offline/sitecustomize.py` refuses and writes it down).
"""

import os
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))

from notebook_execution import REFERENCE, without_widgets

NOT_COMPARED = ("application/vnd.plotly.v1+json", "image/png", "text/html", "stderr")
_folder = tempfile.TemporaryDirectory(prefix="lenslab-nbval-")  # removed when the process ends
ATTEMPTS = Path(_folder.name, "network_attempts.txt")


def pytest_collectstart(collector):
    if type(collector).__name__ == "IPyNbFile":
        collector.skip_compare += NOT_COMPARED


def pytest_itemcollected(item):
    """Progress bars are widgets, which nbval would miss or find according to the machine's
    speed."""
    if type(item).__name__ == "IPyNbCell":
        compare = item.compare_outputs
        item.compare_outputs = lambda test, ref, **options: compare(
            without_widgets(test), without_widgets(ref), **options
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """The environment of the kernel, which the first cell of a notebook starts."""
    if type(item).__name__ != "IPyNbCell":
        return (yield)
    blocker = str(REPOSITORY / "scripts" / "offline")
    path = os.pathsep.join(filter(None, [blocker, os.environ.get("PYTHONPATH")]))
    own = {
        "PYTHONPATH": path,
        "LENSLAB_OUTPUTS": _folder.name,
        "LENSLAB_NETWORK_LOG": str(ATTEMPTS),
        "LENSLAB_PNG": "",
    }
    before = {name: os.environ.get(name) for name in REFERENCE | own}
    os.environ.update(REFERENCE | own)
    for name in ("LENSLAB_MODEL", "LENSLAB_MODEL_TWIN"):
        before[name] = os.environ.pop(name, None)
    try:
        return (yield)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = ATTEMPTS.stat().st_size if ATTEMPTS.exists() else 0
    result = yield
    if ATTEMPTS.exists() and ATTEMPTS.stat().st_size > before:
        attempts = ATTEMPTS.read_text(encoding="utf-8")[before:].strip()
        pytest.fail(f"the cell tried to reach the network: {attempts}", pytrace=False)
    return result
