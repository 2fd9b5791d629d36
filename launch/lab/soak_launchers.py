"""Faults of `soak.py`: signals, processes that die or freeze, and a silent hub."""

import os
import shutil
import signal
import socket
from pathlib import Path

from launch.lab.soak_processes import (
    Clock,
    Started,
    finish,
    launched,
    processes_of,
    reference,
    train,
    wait_for_step,
    wait_until,
)
from launch.lab.soak_world import (
    SAVE_EVERY,
    Outcome,
    World,
    fingerprint,
    fresh,
    newest_step,
    steps_logged,
)


def ended(
    world: World, run: Started, run_dir: Path, frozen: int | None = None
) -> tuple[float, bool]:
    """Seconds until the run and all its processes have ended, and whether they did in time.

    The process `frozen` is stopped again and again, since others on this machine may wake it up.
    """
    clock = Clock()
    alive: list[int] = []

    def gone() -> bool:
        alive[:] = processes_of(run_dir)
        if frozen is not None and frozen in alive:
            os.kill(frozen, signal.SIGSTOP)
        return not run.alive() and not alive

    in_time = wait_until(gone, world.patience, clock)
    for orphan in alive:
        os.kill(orphan, signal.SIGKILL)
    return clock.seconds, in_time


# -- requests to stop, and processes that die or freeze --------------------------------------------
def stopped(world: World, by: str, number: signal.Signals) -> Outcome:
    """A signal to the process, or to its launcher only."""
    name = f"{by}-{number.name}"
    run_dir, count = fresh(world, name), 1 if by == "process" else 2
    run = launched(world, name, world.words(name), by=by)
    wait_for_step(world, run, run_dir)
    os.kill(run.ids[0], number)
    seconds, gone = ended(world, run, run_dir)
    saved, logged = newest_step(run_dir), steps_logged(run_dir)
    said = "--resume" in run.text()
    held = gone and 0 < saved == logged and said
    seen = (
        f"saved at the step it was at ({saved})"
        if saved == logged
        else f"saved {saved} of {logged} steps"
    )
    seen += f", {'' if said else 'no '}resume command, {'' if gone else 'not '}all ended"
    return Outcome(seen, held, seconds, finish(world, name, count))


def one_of_two(world: World, by: str, rank: int, number: signal.Signals) -> Outcome:
    """One of two processes dies (SIGKILL) or freezes (SIGSTOP) under a launcher: the other ends."""
    name = f"{by}-rank{rank}-{number.name}"
    run_dir = fresh(world, name)
    run = launched(world, name, world.words(name), by=by)
    wait_for_step(world, run, run_dir, SAVE_EVERY + 1)
    (process,) = processes_of(run_dir, rank)
    os.kill(process, number)
    frozen = process if number == signal.SIGSTOP else None
    seconds, gone = ended(world, run, run_dir, frozen)
    words = run.last_line("has given no sign of life") or run.last_line(
        "exitcode", "exits with return code"
    )
    held = gone and seconds < 60 and newest_step(run_dir) >= SAVE_EVERY
    return Outcome(words or "ended", held, seconds, finish(world, name, 2))


def dead_encoder(world: World) -> Outcome:
    """One of two processes dies while data are encoded: the next run completes the store."""
    name, cache = "dead-encoder", world.folder / "cache-of-dead-encoder"
    run_dir = fresh(world, name)
    shutil.rmtree(cache, ignore_errors=True)
    slow = world.folder / "slow_encoding.py"
    slow.write_text(
        "import runpy, time\n"
        "from t2i.data import encoding\n"
        "from t2i.training import examples\n"
        "examples.IMAGES_PER_SHARD = 4\n"
        "load = encoding.load_sample\n"
        "encoding.load_sample = lambda *a, **o: (time.sleep(0.1), load(*a, **o))[1]\n"
        f"runpy.run_path({str(world.program)!r}, run_name='__main__')\n"
    )
    words = world.words(name, data_cache_dir=cache)
    run = launched(world, name, words, by="torchrun", program=slow)
    assert wait_until(lambda: any(cache.rglob("shard_*.safetensors")), world.most)
    (process,) = processes_of(run_dir, 1)
    os.kill(process, signal.SIGKILL)
    seconds, gone = ended(world, run, run_dir)
    begun = len(list(cache.rglob("shard_*.safetensors")))
    train(world, name, count=2, data_cache_dir=cache).end_with(0)
    same = fingerprint(run_dir) == reference(world, 2)
    return Outcome(f"ended; {begun} shards were kept", gone and seconds < 60, seconds, same)


def silent_hub(world: World) -> Outcome:
    """A hub that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}
        env |= {"HF_HOME": str(world.folder / "empty-hub"), "HF_HUB_OFFLINE": "0"}
        words = world.words("silent-hub", backbone_weights=world.model.on_hub)
        clock = Clock()
        run = launched(world, "silent-hub", words, by="process", env=env)
        codes = run.codes(clock)
    return Outcome(run.last_line("error:"), codes == [1], clock.seconds)
