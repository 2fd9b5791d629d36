"""Model folders of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from t2i.errors import UserError

_HTTP_LIBRARIES = ("httpx", "httpx2", "requests")


def fetch_folder(hub_id: str, patterns: Sequence[str] | None = None, *, advice: str) -> Path:
    """The local copy of what is not a folder here, fetched if it is not in the hub's cache.

    Args:
        patterns: of the files to fetch; all of them if None.
        advice: what the error's message says to do.

    Raises:
        UserError: the hub does not have it, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:
        if not is_hub_error(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{hub_id} is neither a folder here nor a model that the hub could give ({reason}). {advice}"
        ) from error


def is_hub_error(error: Exception) -> bool:
    """Whether the hub refused, or did not answer, or the name is none that it could have: not a bug
    of ours.
    """
    from huggingface_hub.errors import HFValidationError

    # The hub's client has changed its HTTP library twice; its errors come through as they are.
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | HFValidationError) or library in _HTTP_LIBRARIES
