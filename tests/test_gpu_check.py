"""The GPU check, rehearsed on the CPU: a row of each kind, and what becomes of failures."""

import json
import time
from functools import partial

import pytest
import torch
from programs import program, refused, result_rows

from launch import gpu_check
from launch.lab import gpu_parity, gpu_speed

CPU = torch.device("cpu")


def rows(part: str, wanted: dict) -> list[dict]:
    found = gpu_check.PARTS[part].rows(CPU, True)
    return [
        about | work()
        for about, work in found
        if all(about.get(k, v) == v for k, v in wanted.items())
    ]


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


def test_tokenizers():
    found = rows("tokenizers", {})
    assert found and all(row["ok"] for row in found)


@pytest.mark.parametrize("dtype", gpu_parity.DTYPES)
def test_slot_0_is_the_base_bit_for_bit(dtype):
    """RAR in bf16 is the case where memory layouts once made a difference."""
    (row,) = rows("identities", {"backbone": "rar", "dtype": dtype})
    assert row["ok"] and row["slot_0_equal"] == 1


def tiny_model(k):
    return gpu_speed.random_model(gpu_speed.TINY["llamagen class"], k, torch.bfloat16, CPU)


def test_the_floor_is_weights_and_cache_over_bandwidth():
    row = gpu_speed.time_sampling(partial(tiny_model, 1), 2, "eager", bandwidth=1e3)
    model = tiny_model(1)
    gpt, config = model.backbone.gpt, model.backbone.config
    tables = gpt.tok_embeddings.weight.numel() + gpt.cls_embedding.embedding_table.weight.numel()
    weights = sum(p.numel() for p in gpt.parameters()) - tables
    cache = 2 * config.n_layer * 4 * config.dim * (1 + 16 / 2)  # two rows for each of two images
    assert row["floor_ms"] == pytest.approx(2 * (weights + cache))
    assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms_per_step"])


def test_a_configuration_is_run_once_whole_before_it_is_timed(monkeypatch):
    passes = []
    plain = gpu_speed.sample_windows

    def slow_at_first(*arguments, speed):
        passes.append(speed)
        if len(passes) == 1:
            time.sleep(1)
        return plain(*arguments, speed=speed)

    monkeypatch.setattr(gpu_speed, "sample_windows", slow_at_first)
    row = gpu_speed.time_sampling(partial(tiny_model, 4), 1, "eager", bandwidth=1e3)
    assert passes == ["eager"] * 2 and row["first_s"] >= 1
    assert row["s_per_image"] == pytest.approx(row["ms_per_step"] * 16 / 1e3)
    assert row["s_per_image"] < row["first_s"]


def test_training_row():
    (row,) = rows("training", {"model": "janus", "k": 4, "batch": 2})[-1:]
    assert row["ms_per_step"] > 0 and row["estimate"].endswith("B")


def part(*work):
    return lambda device, tiny: iter([({"number": i}, w) for i, w in enumerate(work)])


def test_errors_and_spent_time_are_rows_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
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
    assert stopped.value.code == 1 and "1 checks failed" in capsys.readouterr().out
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


def test_refusals(tmp_path, capsys):
    assert "sees no GPU" in refused(gpu_check, capsys, "--out", tmp_path)
    assert "unknown part 'speed'" in refused(
        gpu_check, capsys, "--out", tmp_path, "--tiny", "--parts", "speed"
    )
