"""Case 4: launchers. The variables of srun and mpirun are understood, and stopping or killing a
launcher loses no step.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from forks import free_port
from programs import ROOT
from runs import metrics, plain_options

from launch import analyze, export, fid, generate, review
from launch.lab.soak_processes import processes_of
from t2i import checkpoint_folders, launcher
from t2i.errors import UserError
from t2i.processes import ALONE, join_processes

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def adopted(monkeypatch):
    """The torchrun variables that are set in a process that has these variables of another
    launcher.
    """

    def adopt(**variables: object) -> dict[str, str]:
        with monkeypatch.context() as patch:
            for name in list(os.environ):
                if name in TORCHRUN or name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_", "MV2_")):
                    patch.delenv(name)
            before = dict(os.environ)
            for name, value in variables.items():
                patch.setenv(name, str(value))
            try:
                launcher.adopt_launcher()
                return {name: os.environ[name] for name in TORCHRUN if name in os.environ}
            finally:
                os.environ.clear()
                os.environ.update(before)

    return adopt


def test_srun_tasks_are_one_launch(adopted):
    step = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 1, "SLURM_STEP_NUM_TASKS": 4, "SLURM_PROCID": 3}
    alone = {"SLURM_LOCALID": 3, "SLURM_STEP_NUM_NODES": 1, "SLURM_STEP_NODELIST": "n1"}
    assert adopted(**step, **alone) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "20008",
    }
    several = {"SLURM_LOCALID": 1, "SLURM_STEP_NUM_NODES": 2, "SLURM_STEP_NODELIST": "n[07-09],x"}
    got = adopted(**step, **several)
    assert (got["LOCAL_RANK"], got["MASTER_ADDR"]) == ("1", "n07")
    assert adopted(**step, **several, MASTER_ADDR="n3", MASTER_PORT=1)["MASTER_ADDR"] == "n3"
    assert adopted(SLURM_PROCID=1, SLURM_NTASKS=2)["WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[1,3]", "n1"),
        ("n[001-4]-ib,z", "n001-ib"),
        ("r1-n[5]", "r1-n5"),
    ],
)
def test_the_first_machine_of_a_slurm_list(hosts, first):
    assert launcher._first_host(hosts) == first


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 4},  # a shell under salloc
        {"SLURM_PROCID": 0, "SLURM_NTASKS": 4, "ENVIRONMENT": "BATCH"},  # a batch script's shell
        {"SLURM_PROCID": 0, "SLURM_NTASKS": 4, "SLURM_STEP_NUM_TASKS": 1},  # srun --pty bash
        {"SLURM_PROCID": 0},
        {"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 1},
    ],
    ids=str,
)
def test_a_single_process_stays_alone(adopted, variables):
    assert adopted(**variables) == {}


@pytest.mark.parametrize(
    "variables",
    [
        {
            "OMPI_COMM_WORLD_RANK": 1,
            "OMPI_COMM_WORLD_SIZE": 2,
            "OMPI_COMM_WORLD_LOCAL_RANK": 1,
            "OMPI_COMM_WORLD_LOCAL_SIZE": 2,
        },
        {"PMI_RANK": 1, "PMI_SIZE": 2, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2},
        {"MV2_COMM_WORLD_RANK": 1, "MV2_COMM_WORLD_SIZE": 2},
        {
            "OMPI_COMM_WORLD_RANK": 1,
            "OMPI_COMM_WORLD_SIZE": 2,
            "SLURM_PROCID": 0,
            "SLURM_NTASKS": 1,
        },
    ],
    ids=lambda v: next(iter(v)),
)
def test_mpirun_processes_are_one_launch(adopted, variables):
    got = adopted(**variables)
    assert (got["RANK"], got["WORLD_SIZE"], got["LOCAL_RANK"]) == ("1", "2", "1")
    assert got["MASTER_ADDR"] == "127.0.0.1"


def test_a_launch_that_cannot_be_understood_is_refused(adopted):
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_SIZE is not.*torchrun"):
        adopted(OMPI_COMM_WORLD_RANK=1)
    with pytest.raises(UserError, match=r"SLURM_NTASKS is not.*torchrun"):
        adopted(SLURM_PROCID=1)
    several = {"PMI_RANK": 1, "PMI_SIZE": 4, "MPI_LOCALNRANKS": 2}
    with pytest.raises(UserError, match=r"several machines.*MASTER_ADDR=HOST"):
        adopted(**several)
    assert adopted(**several, MASTER_ADDR="n1")["RANK"] == "1"
    assert adopted(RANK=0, OMPI_COMM_WORLD_RANK=1) == {"RANK": "0"}, "torchrun's win"


def test_the_command_that_resumes(monkeypatch):
    """The launcher's command, quoted for a shell, with --resume once."""
    monkeypatch.setattr(launcher, "_command", ["torchrun", "train.py", "--log.prompts", "a b"])
    assert launcher.resume_command() == "torchrun train.py --log.prompts 'a b' --resume"
    monkeypatch.setattr(launcher, "_command", ["train.py", "--resume"])
    assert launcher.resume_command() == "train.py --resume"
    monkeypatch.setattr(launcher, "_command", [])
    assert "python" in launcher.resume_command().split()[0], "this process's own"


def test_work_on_the_main_process_reaches_all():
    def wrong() -> None:
        raise UserError("wrong")

    assert ALONE.on_main(lambda: 3) == 3 and ALONE.gather(1) == [1] and not ALONE.any(False)
    with pytest.raises(UserError, match="wrong"):
        ALONE.on_main(wrong)


# -- real processes --------------------------------------------------------------------------------
def environment(**more: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    return plain | own | {"PYTHONPATH": str(ROOT)} | more


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_stopped_deepspeed_launcher_lets_the_run_save(tiny_world, plain):
    """SIGTERM to `deepspeed` ends only that process; its ranks notice, save and end."""
    run_dir = tiny_world / "runs" / "deepspeed-stopped"
    port = str(23000 + os.getpid() % 5000)
    endless = ("--log.tracker", "none", "--steps", "100000")
    options = [*plain_options(tiny_world, run_dir.name), *endless]
    command = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    command.append(str(ROOT / "launch" / "train_llamagen.py"))
    process = subprocess.Popen(
        [sys.executable, *command, *options],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = run_dir / "metrics.jsonl"
    wait_for(lambda: process.poll() is not None or (log.exists() and log.stat().st_size > 0))
    assert process.poll() is None and len(processes_of(run_dir)) == 4, "runner, launch, two ranks"
    process.send_signal(signal.SIGTERM)
    process.wait()
    wait_for(lambda: not processes_of(run_dir), 60)
    (saved,) = checkpoint_folders.run_checkpoints(run_dir)
    assert int(saved.name[5:]) == metrics(tiny_world, run_dir.name)[-1]["step"]
    checkpoint_folders.read_config(saved, with_state=True, contents=True)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [1, 0])
def test_a_frozen_process_ends_the_others(frozen):
    """The message names the frozen process. Rank 0 is special: it holds the server that the signs
    of life go to.
    """
    code = f"""if True:
        import os, signal, time
        import torch
        from t2i import cli
        from t2i.processes import join_processes
        from t2i.training import watch
        watch._SECONDS = 0.1
        def main():
            here = join_processes(torch.device("cpu"))
            with watch.PeerWatch(here) as peers, peers.step():
                time.sleep(1)
                while here.rank == {frozen}:  # also if something wakes it up
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(60)
        cli.run(main)"""
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment(**job, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, err = ranks[1 - frozen].communicate(timeout=300)
    finally:
        ranks[frozen].kill()
    assert ranks[1 - frozen].returncode == 1, err
    assert f"process {frozen} has given no sign of life for 2 seconds" in err


def test_a_port_that_another_run_uses():
    """The second `deepspeed` on a machine used to end with a traceback."""
    code = """if True:
        import os, pytest, socket, torch
        from t2i.errors import UserError
        from t2i.processes import join_processes
        from t2i.training.engine import start_processes
        with socket.create_server(("127.0.0.1", 0)) as taken:
            os.environ["MASTER_PORT"] = str(taken.getsockname()[1])
            for join in (join_processes, lambda _: start_processes()):
                with pytest.raises(UserError, match=r"cannot meet at 127.*in use.*--master_port"):
                    join(torch.device("cpu"))
        os.environ["MASTER_PORT"] = "abc"
        with pytest.raises(UserError, match=r"no process of a group.*MASTER_PORT=abc"):
            start_processes()"""
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**job),
        timeout=240,
        check=True,
    )


def test_a_process_that_waits_for_others_can_be_stopped():
    """Torch waits where no handler of Python's runs: only kill -9 used to end it."""
    code = """if True:
        import os, signal, socket, time, torch
        from forks import exit_codes, fork, free_port
        from t2i import cli
        from t2i.processes import join_processes
        from t2i.training.engine import start_processes
        def ended_by(number, join):
            port = free_port()
            job = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
            limited = lambda: (signal.alarm(60), cli.run(join))
            waiting = fork(limited, job | {"MASTER_PORT": port})
            while socket.socket().connect_ex(("127.0.0.1", port)):
                time.sleep(0.1)
            os.kill(waiting, number)
            return exit_codes([waiting]) == [-number]
        assert ended_by(signal.SIGTERM, lambda: join_processes(torch.device("cpu")))
        assert ended_by(signal.SIGINT, start_processes)"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    alone = environment() | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=alone, timeout=240, check=True)


def test_srun_tasks_join(tmp_path):
    """Two processes that have only Slurm's variables join: one is the main process, and both learn
    of its mistakes.
    """
    code = """if True:
        import os, torch
        from forks import exit_codes, fork
        from t2i import cli
        from t2i.errors import UserError
        from t2i.processes import join_processes
        def wrong():
            raise UserError("wrong")
        def main():
            here = join_processes(torch.device("cpu"))
            print(here.gather(here.rank), here.any(here.rank == 1), here.on_main(lambda: here.rank))
            print(cli.is_main_process(), flush=True)
            here.on_main(wrong)
        def task():
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(name + os.environ["SLURM_PROCID"], os.O_CREAT | os.O_WRONLY), number)
            cli.run(main)
        ranks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in range(2)]
        assert exit_codes([fork(task, rank) for rank in ranks]) == [1, 1]"""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**job) | {"PYTHONPATH": path},
        cwd=tmp_path,
        timeout=120,
        check=True,
    )
    for rank, main in enumerate(("True", "False")):
        err = (tmp_path / f"err{rank}").read_text()
        out = (tmp_path / f"out{rank}").read_text().splitlines()
        out = [line for line in out if not line.startswith("[Gloo]")]  # older versions of torch
        assert out == ["[0, 1] True 0", main], err
        assert err.endswith("error: wrong\n")


@pytest.mark.parametrize(
    "kept",
    [
        {"RANK": "0"},
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2"},
    ],
)
def test_variables_that_describe_no_process_are_named(monkeypatch, kept):
    """Variables left over in a shell used to give tracebacks from PyTorch and DeepSpeed."""
    monkeypatch.setattr(os, "environ", dict(kept))
    for begin in (launcher.settle_group, launcher.world_size):  # of training; of all others
        with pytest.raises(UserError, match=rf"RANK={kept['RANK']}, .*MASTER_ADDR=.* unset RANK"):
            begin()


def test_a_size_without_a_rank_means_one_process(monkeypatch):
    """As training takes it; drawing ended in a traceback."""
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "8"})
    assert join_processes(torch.device("cpu")).world_size == 1


@pytest.mark.parametrize("rank", ["1", "x", ""])
def test_a_rank_without_a_size_silences_nothing(monkeypatch, rank):
    """Programs of one process used to draw and judge without a message."""
    monkeypatch.setattr(os, "environ", {"RANK": rank})
    assert launcher.is_main_process()
    os.environ["WORLD_SIZE"] = "2"
    assert not launcher.is_main_process()


@pytest.mark.parametrize("program", [analyze, export, fid, generate, review])
def test_a_program_of_one_process_says_that_it_is(monkeypatch, program):
    """The second process said that the first one's folder was in use, and torchrun ended both."""
    given = {
        analyze: "--ckpt shapes",
        export: "--ckpt shapes --out x",
        fid: "--samples x.npz --reference x.npz",
        generate: "--ckpt shapes --prompt x",
        review: "--ckpt shapes --prompt x",
    }[program]
    monkeypatch.setattr(sys, "argv", [program.__file__, *given.split()])
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match=r"works as one process, .* WORLD_SIZE=2, .* RANK=1"):
        program.main()
    os.environ["RANK"] = "0"
    launcher.refuse_several()
