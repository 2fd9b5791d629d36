"""Model folders of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from t2i.errors import UserError


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
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{hub_id} is neither a folder here nor a model that the hub could give ({reason}). {advice}"
        ) from error
