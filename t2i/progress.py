"""Progress bars, lively on a terminal, now and then in a log file; times and sizes for people."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

_LOG_SECONDS = 30.0


def progress_bar(iterable: Iterable | None = None, **options) -> tqdm:
    """A tqdm bar on stderr, with tqdm's options.

    In a file every redraw stays; there a bar is redrawn every 30 seconds at most, and when it
    closes.
    """
    # A notebook's stderr is no terminal either, but it shows the newest line only.
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        # maxinterval, too: tqdm's monitor thread redraws a bar that has been quiet for so long.
        options |= {"mininterval": _LOG_SECONDS, "maxinterval": _LOG_SECONDS}
    return tqdm(iterable, **options)


def readable_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def readable_size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
