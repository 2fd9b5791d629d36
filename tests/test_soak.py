"""The soak script: its table, and running each case only once."""

import json
import signal

import pytest
from programs import launch

from launch.lab.soak import table
from launch.lab.soak_faults import cases
from launch.lab.soak_models import MODELS
from launch.lab.soak_processes import launched
from launch.lab.soak_world import World


def test_the_table_shows_passed_and_failed_cases():
    row = {"case": "a", "fault": "f", "date": "2026-01-02", "took": 1.0, "facts": {}}
    held = row | {"seen": "x | y", "seconds": 1.6, "same": True, "verdict": "held"}
    failed = row | {"seen": "z", "seconds": None, "same": False, "verdict": "FAILED"}
    skipped = {"case": "b", "fault": "g", "date": "2026-01-03", "seen": "no", "verdict": "skipped"}
    lines = table([held, failed, skipped], seed=3).splitlines()
    assert lines[2] == "| f | x \\| y | 2 s | equal, bit for bit | held |"
    assert lines[3] == "| f | z |  | **differ** | FAILED |"
    assert lines[4] == "| g | no |  |  | skipped |"
    assert "Seed 3, 2026-01-02 to 2026-01-03" in lines[-1]


def test_every_kind_of_fault_has_a_case():
    words = " ".join(words for words, _ in cases(27).values())
    for kind in (
        "kill -9, 27",
        "disk full",
        "truncated",
        "SIGHUP",
        "freezes",
        "NaN",
        "hub",
        "ZeRO",
    ):
        assert kind.lower() in words.lower(), kind


def test_runs_of_a_soak_in_the_background_receive_signals(tmp_path):
    """Children inherit the signals that `nohup` and a shell's `&` ignore: SIGHUP, SIGINT."""
    program = tmp_path / "program.py"
    program.write_text("import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = launched(
            World(tmp_path, MODELS["llamagen"], 0, 60), "a", [], by="process", program=program
        )
        run.end_with(0)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.text() == "True\n"


@pytest.mark.slow
def test_cases_are_run_once(tmp_path):
    for _ in range(2):
        more = ("--only", "damage_flip", "kills", "--kills", "3")
        launch("launch/lab/soak.py", "--out", str(tmp_path), *more)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["kills", "damage_flip"], "kills-two is not run"
    assert all(row["verdict"] == "held" and row["same"] is True for row in rows)
    assert rows[0]["facts"]["kills"] == 3 and "passed over" in rows[1]["seen"]
    assert "bit-flipped" in (tmp_path / "table.md").read_text()
