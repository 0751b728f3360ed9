"""Findings in words: the bold sentence after a result."""

from __future__ import annotations

from IPython import get_ipython
from IPython.display import display


def so(sentence: str) -> None:
    """Say what was found: bold in a notebook, and as a line of text that a test run compares.

    The sentence is computed from the numbers above it, names its control, and so is true of
    whatever model runs.
    """
    if get_ipython() is None:
        print(f"So: {sentence}")
    else:
        bundle = {"text/plain": f"So: {sentence}", "text/markdown": f"**So:** {sentence}"}
        display(bundle, raw=True)
