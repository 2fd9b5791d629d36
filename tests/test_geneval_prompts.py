"""GenEval's prompts against the SHA-256 of the official files, for other seeds, too."""

import hashlib
import json
from collections import Counter

import pytest
from helpers import golden_folder

from geneval.prompts import draw_prompts, metadata_line, official_prompts

ROOT = golden_folder("geneval_prompts")
OFFICIAL = json.loads((ROOT / "prompts.json").read_text())
OTHERS = json.loads((ROOT / "other_seeds.json").read_text())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files_of(entries: list[dict]) -> tuple[bytes, bytes]:
    """GenEval's two files: evaluation_metadata.jsonl and generation_prompts.txt."""
    lines = [(metadata_line(entry), entry["prompt"]) for entry in entries]
    return tuple(
        "".join(f"{line}\n" for line in file).encode() for file in zip(*lines, strict=True)
    )


def test_official_files_byte_for_byte():
    entries = official_prompts()
    assert len(entries) == OFFICIAL["number_of_prompts"]
    assert Counter(e["tag"] for e in entries) == OFFICIAL["counts_per_tag"]
    metadata, prompts = files_of(entries)
    assert sha256(metadata) == OFFICIAL["evaluation_metadata_jsonl_sha256"]
    assert sha256(prompts) == OFFICIAL["generation_prompts_txt_sha256"]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: f"seed{case['seed']}")
def test_other_seeds(case):
    entries = draw_prompts(case["seed"], case["num_prompts_per_task"])
    assert len(entries) == case["prompts"]
    assert Counter(e["tag"] for e in entries) == case["counts_per_tag"]
    metadata, prompts = files_of(entries)
    assert sha256(metadata) == case["evaluation_metadata_sha256"]
    assert sha256(prompts) == case["generation_prompts_sha256"]


def test_changes_by_a_caller_do_not_reach_others():
    official_prompts()[0]["include"][0]["count"] = 9
    assert official_prompts()[0]["include"][0]["count"] == 1
