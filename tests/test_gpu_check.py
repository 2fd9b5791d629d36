"""The GPU check, rehearsed on the CPU: rows of every kind, and how failures are reported."""

import json
import time

import pytest
import torch
from programs import program, refused, result_rows

from launch import gpu_check
from launch.lab import gpu_parity

CPU = torch.device("cpu")


def rows(part: str, wanted: dict) -> list[dict]:
    """The rows of a part of the check whose descriptions match `wanted`."""
    found = gpu_check.PARTS[part].rows(CPU, True)
    wanted_rows = []
    for about, work in found:
        if all(about.get(k) == v for k, v in wanted.items()):
            done = work()
            wanted_rows += [about | row for row in (done if isinstance(done, list) else [done])]
    return wanted_rows


@pytest.mark.parametrize("family", gpu_parity.FAMILIES)
def test_golden_cases_of_a_family_in_fp32(family, monkeypatch):
    monkeypatch.setattr(gpu_parity, "FAMILIES", {family: gpu_parity.FAMILIES[family]})
    found = rows("golden", {"dtype": "fp32"})
    assert found and all(row["ok"] and row["greedy_equal"] == 1 for row in found)


def test_other_weights_fail_the_golden_check():
    stored = next(iter(gpu_parity.golden(CPU, True)))[1]
    read, case = stored.args[:2]

    def changed(case):
        found = read(case)
        with torch.no_grad():
            found.backbone.gpt.norm.weight[0] += 0.01
        return found

    assert gpu_parity.compare(read, case, CPU, "fp32")["ok"]
    assert not gpu_parity.compare(changed, case, CPU, "fp32")["ok"]


def test_tokenizer_rows_pass():
    found = rows("tokenizers", {})
    assert found and all(row["ok"] for row in found)


@pytest.mark.parametrize("dtype", gpu_parity.DTYPES)
def test_slot_0_is_the_base_bit_for_bit(dtype):
    """RAR in bf16: different memory layouts used to change its bits."""
    (row,) = rows("identities", {"backbone": "rar", "dtype": dtype})
    assert row["ok"] and row["slot_0_equal"] == 1


def test_drawing_rows_have_times_and_a_floor():
    found = rows("sampling", {"shape": "tiny-janus"})
    names = [row["contender"] for row in found]
    assert names == ["base eager", "iclr2026 eager", "transformers"]
    assert all(row["ms_per_step"] > 0 for row in found) and found[0]["of_floor"] > 0


def test_kernel_times_add_up_to_at_most_the_step():
    step, *kernels = rows("kernels", {})
    assert step["ms_per_step"] > 0 and step["idle"] < 1
    assert 0 < sum(row["busy_ms"] for row in kernels) <= step["busy_ms"]
    assert 0 < sum(row["kernels"] for row in kernels) <= step["kernels"]
    assert {"aten::mm", "aten::bmm"} < {row["kernel"] for row in kernels}


def test_a_memory_row_draws_and_expects_room_for_decoding():
    (row,) = rows("memory", {})
    assert row["peak_gb"] == 0, "there is no GPU"
    assert 1.2 < row["estimate_gb"] < 1.6


def test_speculation_rows_compare_calls_of_equal_number():
    plain, speculative = rows("speculation", {})
    assert (plain["ahead"], speculative["ahead"]) == (0, 3)
    assert plain["calls"] == 4 * 6 and 6 <= speculative["calls"] <= 4 * 6, "of 6 batches of 2"
    assert plain["ms_per_call"] > 0 and speculative["ms_per_call"] > 0


def test_training_rows_have_times_and_a_memory_estimate():
    found = rows("training", {"shape": "tiny-rar"})
    assert all(row["s_per_step"] > 0 for row in found)
    own = next(row for row in found if row["contender"] == "iclr2026")
    assert 0 < own["estimate_gb"] < 0.1


def test_other_codes_fail_unless_rounding_explains_them(monkeypatch):
    (row,) = rows("same_codes", {})
    assert row["ok"] and row["k4_equal"] == 1
    plain, calls = gpu_parity.drawn, []

    def changed(*arguments):
        codes = plain(*arguments)
        calls.append(codes)
        if len(calls) % 3:
            codes[1, 5] = (codes[1, 5] + 1) % 48
        return codes

    monkeypatch.setattr(gpu_parity, "drawn", changed)
    (row,) = rows("same_codes", {})
    assert not row["ok"] and row["k1_gap"] > gpu_parity.GAP


def part(*work):
    return lambda device, tiny: iter([({"number": i}, w) for i, w in enumerate(work)])


def test_errors_and_spent_time_become_rows_and_other_parts_still_run(tmp_path, monkeypatch, capsys):
    def fails():
        raise RuntimeError("out of memory")

    def slow():
        time.sleep(0.02)
        return {"ok": True}

    parts = {
        "golden": gpu_check.CheckPart(part(fails, lambda: {"ok": True}), 60, "one"),
        "sampling": gpu_check.CheckPart(part(slow, slow), 0.01, "two"),
        "training": gpu_check.CheckPart(part(lambda: {"ms": 1.0}), 60, "three"),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    with pytest.raises(SystemExit) as stopped:
        program(gpu_check, "--out", tmp_path, "--tiny", "--parts", *parts)
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and "1 checks failed" in said
    assert "time was up: sampling not complete" in said  # it used to be in the report only
    golden, second, drawn, cut, trained = result_rows(tmp_path)
    assert golden["error"] == "RuntimeError: out of memory" and not golden["ok"]
    assert second["ok"] and drawn["ok"] and "used up" in cut["stopped"]
    assert trained["ms"] == 1 and trained["card"] == "CPU, a rehearsal"
    assert "| 0 | RuntimeError: out of memory | NO |" in (tmp_path / "report.md").read_text()
    program_ok = {"golden": gpu_check.CheckPart(part(lambda: {"ok": True}), 60, "one")}
    monkeypatch.setattr(gpu_check, "PARTS", program_ok)
    with pytest.raises(SystemExit) as stopped:
        program(gpu_check, "--out", tmp_path, "--tiny", "--parts", "golden")
    assert stopped.value.code == 0
    assert json.loads((tmp_path / "results.jsonl").read_text())["ok"]


def test_bad_options_are_refused(tmp_path, capsys):
    assert "sees no GPU" in refused(gpu_check, capsys, "--out", tmp_path)
    assert "unknown part 'speed'" in refused(
        gpu_check, capsys, "--out", tmp_path, "--tiny", "--parts", "speed"
    )
    given = ("--out", tmp_path, "--tiny")
    assert "parts is empty" in refused(gpu_check, capsys, *given, "--parts")  # "every check passed"
    assert "minutes=0.0 must be" in refused(gpu_check, capsys, *given, "--minutes", 0)
