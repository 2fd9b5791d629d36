"""Progress bars (redrawn rarely in log files), and readable times and sizes."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

_LOG_SECONDS = 30.0


def progress_bar(iterable: Iterable | None = None, **options) -> tqdm:
    """A tqdm bar on stderr, with tqdm's options.

    A file keeps every redraw, so there a bar is redrawn at most every 30 seconds and on closing.
    """
    # A notebook's stderr is not a terminal either, but shows only the newest line.
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        # maxinterval, too: tqdm's monitor thread redraws a bar after this time.
        options |= {"mininterval": _LOG_SECONDS, "maxinterval": _LOG_SECONDS}
    return tqdm(iterable, **options)


def readable_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def readable_size(count: float) -> str:
    """A number of bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
