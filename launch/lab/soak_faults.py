"""The faults of `soak.py`. Each case finishes its run and compares it with an undisturbed one."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from launch.lab.soak_launchers import dead_encoder, one_of_two, silent_hub, stopped
from launch.lab.soak_processes import (
    Clock,
    Started,
    finish,
    fork,
    launched,
    reference,
    train,
    wait_for_step,
    wait_until,
)
from launch.lab.soak_ways import chain, grid
from launch.lab.soak_world import (
    ROOT,
    SAVE_EVERY,
    Outcome,
    World,
    fingerprint,
    fresh,
    newest_step,
    small_disk,
    steps_logged,
)
from t2i.checkpoint_folders import newest_healthy, run_checkpoints
from t2i.files import PARTIAL

GENEVAL = ROOT / "geneval" / "run.py"
_NO_ROOM = "no space is left on the disk"
SAMPLE_IMAGENET = ROOT / "launch" / "sample_imagenet.py"

Case = Callable[[World], Outcome]


# -- kills -----------------------------------------------------------------------------------------
def kills(world: World, count: int, processes: int) -> Outcome:
    """SIGKILL the run `count` times at random moments, a third of them during a save."""
    name = f"killed-{processes}"
    expected, run_dir = reference(world, processes), fresh(world, name)
    moments, facts, same = world.moments(name), {"in a save": 0, "before step 1": 0}, []
    done = lost = 0
    while done < count:
        newest, begin = newest_step(run_dir), time.time()
        run = train(world, name, resume=(run_dir / "config.json").exists(), count=processes)
        if done % 3 == 2:
            _wait(world, run, partial(_saving, run_dir, begin))
            time.sleep(moments.random() * 0.03)
        else:
            if moments.random() > 0.3:  # otherwise during the start
                _wait(world, run, partial(_stepped, run_dir, steps_logged(run_dir)))
            time.sleep(moments.random() * 1.5)
        saving, alive = _saving(run_dir, begin), run.alive()
        run.kill()
        if not alive:  # the run had finished before it could be killed
            assert run_dir.exists() and newest_step(run_dir) > 0, run.text()[-2000:]
            same.append(fingerprint(run_dir) == expected)
            fresh(world, name)
            continue
        done += 1
        facts["in a save"] += saving
        facts["before step 1"] += steps_logged(run_dir) == 0
        healthy = newest_healthy(run_dir)
        at = int(healthy.name.removeprefix("step_")) if healthy else 0
        assert at == newest_step(run_dir) >= newest, "a saved step is lost or damaged"
        lost = max(lost, steps_logged(run_dir) - at)
    same.append(finish(world, name, processes) if run_dir.exists() else True)
    facts |= {"kills": done, "finished runs": len(same), "most steps lost": lost}
    seen = f"{done} kills, {facts['in a save']} in a save; at most {lost} steps to do again"
    return Outcome(seen, lost <= SAVE_EVERY, same=all(same), facts=facts)


def _wait(world: World, run: Started, condition: Callable[[], bool]) -> None:
    wait_until(lambda: condition() or not run.alive(), world.patience)


def _saving(run_dir: Path, begin: float) -> bool:
    """Whether a checkpoint is being written; partial folders from before `begin` do not count."""
    for place in (run_dir, run_dir / "checkpoints"):  # rglob fails where the run removes folders
        for unfinished in place.glob(f"*{PARTIAL}"):
            with suppress(FileNotFoundError):
                if unfinished.stat().st_mtime > begin:
                    return True
    return False


def _stepped(run_dir: Path, before: int) -> bool:
    return steps_logged(run_dir) != before


# -- full disks ------------------------------------------------------------------------------------
def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def full_save(world: World, count: int) -> Outcome:
    """The disk fills up while one process, or two under `torchrun`, write a checkpoint."""
    expected = reference(world, count)
    one = _bytes(run_checkpoints(world.run_dir(f"undisturbed-{count}"))[-1])
    with small_disk(world, int(2.5 * one)) as grow:
        name, run_dir = f"full-save-{count}", world.folder / "disk" / "run"
        words = world.words(name, run_dir=run_dir, log_keep_best=False)
        run = launched(world, name, words, by="process" if count == 1 else "torchrun")
        ended, said, before = run.codes() == [1], run.last_line(_NO_ROOM), newest_step(run_dir)
        healthy = newest_healthy(run_dir) is not None and not any(run_dir.rglob(f"*{PARTIAL}"))
        grow(20 * one)
        train(world, name, resume=True, count=count, run_dir=run_dir).end_with(0)
        mine = fingerprint(run_dir)
        same = all(mine[k] == v for k, v in expected.items() if not k.startswith("best/"))
        held = ended and bool(said) and healthy and before >= SAVE_EVERY
        return Outcome(said, held, same=same, facts={"newest then": before})


def full_cache(world: World) -> Outcome:
    """The disk fills up while a shard of codes is written."""
    with small_disk(world, 4096 * 4) as grow:
        name, cache = "full-cache", world.folder / "disk" / "cache"
        fresh(world, name)
        run = train(world, name, data_cache_dir=cache)
        ended, said = run.codes() == [1], run.last_line(_NO_ROOM)
        torn = list(cache.rglob("*.tmp*"))
        grow(64 << 20)
        train(world, name, data_cache_dir=cache).end_with(0)
        same = fingerprint(world.run_dir(name)) == reference(world, 1)
        return Outcome(said, ended and bool(said) and not torn, same=same)


def full_evaluation(world: World) -> Outcome:
    """The disk fills up while images are drawn (and judged, if the model draws captions)."""
    reference(world, 1)
    words = ["--ckpt", str(world.run_dir("undisturbed-1"))]
    if world.model.classes:
        program, place, result = SAMPLE_IMAGENET, "images.npz", "images.npz"
        words += ["--count", "200", "--batch-size", "40"]
    else:
        program, place, result = GENEVAL, "geneval", "geneval/results.jsonl"
        words += ["--prompts", "shapes", "--limit", "12", "--samples", "2", "--batch-size", "4"]

    def draw(name: str, folder: Path) -> Started:
        return fork(world, name, [*words, "--out", str(folder / place)], program=program)

    roomy, disk = world.folder / "roomy", world.folder / "disk"
    shutil.rmtree(roomy, ignore_errors=True)
    draw("roomy-evaluation", roomy).end_with(0)
    with small_disk(world, 4096 * 24) as grow:
        run = draw("full-evaluation", disk)
        ended, said, kept = (
            run.codes() == [1],
            run.last_line(_NO_ROOM),
            len(list(disk.rglob("*.png"))),
        )
        grow(64 << 20)
        draw("full-evaluation-2", disk).end_with(0)
        same = (disk / result).read_bytes() == (roomy / result).read_bytes()
        return Outcome(said, ended and bool(said), same=same, facts={"images kept": kept})


# -- damage ----------------------------------------------------------------------------------------
def _truncate(folder: Path) -> None:
    path = next((folder / "training_state").glob("*.safetensors"))
    os.truncate(path, path.stat().st_size // 2)


def _flip(folder: Path) -> None:
    path = folder / "codec.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damaged(world: World, how: Callable[[Path], None]) -> Outcome:
    """The newest checkpoint is damaged: the run resumes from the one before, and says so."""
    expected, name = reference(world, 1), f"damaged{how.__name__}"
    run_dir = fresh(world, name)
    shutil.copytree(world.run_dir("undisturbed-1"), run_dir)
    before, newest = run_checkpoints(run_dir)[-2:]
    how(newest)
    run = train(world, name, resume=True)
    run.end_with(0)
    said = str(newest) in run.text() and f"going back to {before}" in run.text()
    return Outcome(run.last_line("passed over"), said, same=fingerprint(run_dir) == expected)


# -- values that are not finite --------------------------------------------------------------------
def not_finite(world: World, what: str, value: float) -> Outcome:
    """Put the non-finite `value` into one step's caption features (into its loss if the model takes
    no captions) or into the optimizer's moments.
    """
    name, bad_step = f"{what}-{value}", 2 * SAVE_EVERY
    run_dir = fresh(world, name)

    def inject() -> None:
        from t2i.training.batches import Batch, TrainingData
        from t2i.training.engine import TrainingLoss
        from t2i.training.run_state import Checkpoints

        batches, save = TrainingData.micro_batches, Checkpoints.save
        forward, spoilt = TrainingLoss.forward, [1.0]

        def spoilt_batches(data: TrainingData, step: int) -> Iterator:
            for batch in batches(data, step):
                if step + 1 == bad_step:
                    if "features" in batch.prepared:
                        batch.prepared["features"] = batch.prepared["features"] * value
                    else:
                        spoilt[0] = value
                yield batch

        def spoilt_loss(module: TrainingLoss, batch: Batch) -> tuple:
            loss, sums, counts = forward(module, batch)
            return loss * spoilt[0], sums * spoilt[0], counts

        def spoilt_save(checkpoints: Checkpoints, step: int) -> Path:
            if step == bad_step:
                state = checkpoints.engine.optimizer.optimizer.state
                next(iter(state.values()))["exp_avg_sq"][0] = value
            return save(checkpoints, step)

        if what == "loss":
            mock.patch.object(TrainingData, "micro_batches", spoilt_batches).start()
            mock.patch.object(TrainingLoss, "forward", spoilt_loss).start()
        else:
            mock.patch.object(Checkpoints, "save", spoilt_save).start()

    run = train(world, name, inject=inject)
    run.end_with(1)
    said = run.last_line("not finite")
    named = f"step {bad_step}" in said and ".png" in said if what == "loss" else bool(said)
    held = named and newest_step(run_dir) == bad_step - SAVE_EVERY
    return Outcome(said, held, same=finish(world, name))


# -- others ----------------------------------------------------------------------------------------
def second_run(world: World) -> Outcome:
    """A second run, new or resumed, is refused at once while another uses its folder."""
    name = "in-use"
    run_dir = fresh(world, name)
    first = train(world, name)
    wait_for_step(world, first, run_dir)
    words, clock, refused = world.words(name), Clock(), True
    for more in ([], ["--resume"]):
        other = fork(world, f"{name}-other", [*words, *more])
        refused &= other.codes(clock) == [1] and "in use" in other.last_line("error:")
    first.end_with(0)
    same = fingerprint(run_dir) == reference(world, 1)
    return Outcome(other.last_line("error:"), refused, clock.seconds / 2, same)


def cases(kill_count: int) -> dict[str, tuple[str, Case]]:
    """By name, each case's description and the function that runs it."""
    signals = {
        f"{by}-{number.name}": (f"{number.name} to {who}", partial(stopped, by=by, number=number))
        for by, who in (
            ("process", "the process"),
            ("torchrun", "`torchrun`"),
            ("deepspeed", "`deepspeed`"),
        )
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    of_two = {
        f"{by}-rank{rank}-{verb}": (
            f"the {('first', 'second')[rank]} of two processes {verb} (`{by}`)",
            partial(one_of_two, by=by, rank=rank, number=number),
        )
        for by, rank, number, verb in (
            ("torchrun", 1, signal.SIGKILL, "dies"),
            ("torchrun", 1, signal.SIGSTOP, "freezes"),
            ("torchrun", 0, signal.SIGSTOP, "freezes"),
            ("deepspeed", 1, signal.SIGKILL, "dies"),
            ("deepspeed", 1, signal.SIGSTOP, "freezes"),
        )
    }
    bad_loss = "a loss that is not finite"
    nan, inf = float("nan"), float("inf")
    return {
        "kills": (
            f"kill -9, {kill_count} times, a third of them in a save",
            partial(kills, count=kill_count, processes=1),
        ),
        "kills-two": (
            "kill -9 of both of two processes, 6 times",
            partial(kills, count=6, processes=2),
        ),
        "damage_truncate": ("newest checkpoint truncated", partial(damaged, how=_truncate)),
        "damage_flip": ("newest checkpoint bit-flipped", partial(damaged, how=_flip)),
        "damage-manifest": (
            "newest checkpoint without manifest",
            partial(damaged, how=_no_manifest),
        ),
        "loss-nan": (f"{bad_loss} (nan)", partial(not_finite, what="loss", value=nan)),
        "loss-inf": (f"{bad_loss} (inf)", partial(not_finite, what="loss", value=inf)),
        "moments": (
            "optimizer moments not finite",
            partial(not_finite, what="moments", value=inf),
        ),
        "second-run": ("a second run in the folder", second_run),
        "full-save": ("disk full during a save", partial(full_save, count=1)),
        "full-save-two": (
            "disk full during a save of two processes (`torchrun`)",
            partial(full_save, count=2),
        ),
        "full-cache": ("disk full during a cache shard", full_cache),
        "full-evaluation": ("disk full during an evaluation", full_evaluation),
        **signals,
        **of_two,
        "dead-encoder": ("one of two processes dies while data are encoded", dead_encoder),
        "grid": ("ZeRO stages, processes, micro-batches, offloading, precisions", grid),
        "chain": ("the number of processes and the stage change four times", chain),
        "silent-hub": ("a hub that does not answer", silent_hub),
    }


def import_for_forks() -> None:
    """Import once what all forked programs need."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import t2i.evaluation.draw
    import t2i.evaluation.runner
    import t2i.training.loop  # noqa: F401

    sys.stdout.flush()
