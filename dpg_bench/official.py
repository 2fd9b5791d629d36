"""The official question file: given by path, or fetched once and proven by its git blob hash."""

from pathlib import Path

from dpg_bench import questions
from t2i.published import PublishedFile

OFFICIAL = PublishedFile(
    title="question file of DPG-Bench",
    url="https://raw.githubusercontent.com/TencentQQGYLab/ELLA/"
    "3c228f1dc6c4d3cad0a47493816151a419f14db3/dpg_bench/dpg_bench.csv",
    names=("dpg_bench.csv",),
    hashes=(questions.OFFICIAL_BLOB,),
    cache="dpg_bench",
    advice="give it with --questions PATH, or use the shapes world's questions, which are shipped",
    digest=lambda path: questions.git_blob_sha1(path.read_bytes()),
)


def official_questions(path: str | Path | None = None) -> questions.QuestionGraph:
    """The questions at `path`, or the official ones from the cache, fetched there on first use.

    Raises:
        UserError: see `dpg_bench.questions.read_questions`; the file cannot be fetched (the
            message says what to do offline), or what is there is not the official file.
    """
    return questions.read_questions(OFFICIAL.find().path if path is None else path)
