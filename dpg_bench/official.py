"""The official question file: given by path, or fetched once and proven by its git blob hash."""

from __future__ import annotations

import http.client
import os
import urllib.request
from pathlib import Path

from dpg_bench import questions

OFFICIAL_URL = (
    "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/"
    "3c228f1dc6c4d3cad0a47493816151a419f14db3/dpg_bench/dpg_bench.csv"
)


def official_questions(path: str | Path | None = None) -> questions.QuestionGraph:
    """The questions at `path`, or the official ones from the cache, fetched there on first use.

    The cache is `$T2I_CACHE/dpg_bench` (default ~/.cache/t2i/dpg_bench).

    Raises:
        ValueError: see `dpg_bench.questions.read_questions`; the file cannot be fetched (the
            message says what to do offline), or what came is not the official file.
    """
    if path is not None:
        return questions.read_questions(path)
    cache = Path(os.environ.get("T2I_CACHE") or Path.home() / ".cache" / "t2i") / "dpg_bench"
    cached = cache / "dpg_bench.csv"
    if not cached.is_file():
        content = _download()
        cache.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.tmp")
        partial.write_bytes(content)
        partial.replace(cached)
    if (blob := questions.git_blob_sha1(cached.read_bytes())) != questions.OFFICIAL_BLOB:
        raise ValueError(
            f"{cached} is not the official question file (git blob {blob}, not {questions.OFFICIAL_BLOB}); "
            "delete it to fetch it again, or give another file with --questions PATH"
        )
    return questions.read_questions(cached)


def _download() -> bytes:
    advice = (
        f"Offline, fetch {OFFICIAL_URL} elsewhere and give it with --questions PATH, or use the "
        "shapes world's questions, which are shipped"
    )
    try:
        with urllib.request.urlopen(OFFICIAL_URL, timeout=60) as reply:
            content = reply.read()
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"DPG-Bench's questions cannot be fetched ({error}). {advice}.") from error
    if (blob := questions.git_blob_sha1(content)) != questions.OFFICIAL_BLOB:
        raise ValueError(
            f"{OFFICIAL_URL} gave {len(content)} bytes that are not the official question file "
            f"(git blob {blob}, not {questions.OFFICIAL_BLOB}). {advice}."
        )
    return content
