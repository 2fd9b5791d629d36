"""Progress bars: lively on a terminal, now and then in a log file."""

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
