"""Rewards as judges of images: built-in, the user's own, panels of processes; and the prompts."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reward_functions
import torch
from PIL import Image
from reward_functions import brightness

import geneval
from geneval.detector import Detections
from geneval.prompts import color_attr, counting, official_prompts, position, two_object
from t2i.errors import UserError
from t2i.reward.panel import Panel, RewardError
from t2i.reward.reward_options import RewardOptions
from t2i.reward.reward_prompts import benchmark_hashes, prompt_hash, training_prompts
from t2i.reward.reward_run import RewardRun
from t2i.reward.reward_watch import benchmark_of, diversity
from t2i.reward.rewards import (
    ClipReward,
    DPGReward,
    GenEvalReward,
    load_rewards,
    own_function,
    soft_credit,
)
from t2i.sampling import SamplingConfig
from t2i.shapes.scenes import Scene, SceneObject, render
from t2i.shapes.shapes_detector import ShapesDetector
from t2i.shapes.shapes_prompts import all_prompts, benchmark_prompts
from t2i.shapes.shapes_questions import ShapesJudge, shapes_questions

CPU = torch.device("cpu")
BRIGHT = "reward_functions:brightness"


# -- rewards ---------------------------------------------------------------------------------------
def seen(*objects) -> tuple:
    """Detections and colors, from (name, centre x, centre y, color)."""
    found: dict[str, list] = {}
    for name, x, y, color in objects:
        found.setdefault(name, []).append(([x - 5, y - 5, x + 5, y + 5], color))
    detections = {
        name: Detections(
            np.array([b for b, _ in of], np.float32), np.full(len(of), 0.99, np.float32)
        )
        for name, of in found.items()
    }
    return detections, lambda name, indices: [found[name][i][1] for i in indices]


CAT, DOG = ("cat", 10, 50, "red"), ("dog", 90, 50, "blue")
LEFT, SWAPPED = position("cat", "left of", "dog"), position("dog", "left of", "cat")
THREE, COLORED = counting("cat", 3), color_attr("cat", "red", "dog", "blue")
TWO_AND_DOG = two_object("cat", "dog")
TWO_AND_DOG = TWO_AND_DOG | {
    "include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 1}]
}
TWO_RED_AND_DOG = TWO_AND_DOG | {
    "include": [{"class": "cat", "count": 2, "color": "red"}, {"class": "dog", "count": 1}]
}
CATS = [("cat", 20 * i, 50, "red") for i in range(1, 5)]


@pytest.mark.parametrize(
    ("entry", "objects", "credit"),
    [
        (LEFT, [CAT, DOG], 1),
        (LEFT, [CAT], 0.25),
        (SWAPPED, [CAT, DOG], 0.5),  # half of two_object; the position adds nothing
        (two_object("cat", "dog"), [CAT, DOG], 1),
        (two_object("cat", "dog"), [DOG], 0.25),
        (two_object("cat", "bus"), [], 0),
        (THREE, CATS[:3], 1),
        (THREE, CATS[:2], 0),
        (THREE, CATS, 0),
        (TWO_RED_AND_DOG, CATS[:2], 0.25),
        (TWO_RED_AND_DOG, CATS[:3], 0),
        (TWO_AND_DOG, CATS[:2], 0.25),
        (TWO_AND_DOG, CATS[:3], 0),  # the benchmark's rule alone would let a third pass
        (COLORED, [CAT, DOG], 1),
        (COLORED, [CAT, ("dog", 90, 50, "red")], 0.375),
        (COLORED, [("cat", 10, 50, "blue"), ("dog", 90, 50, "red")], 0.25),
    ],
)
def test_soft_credit_never_pays_for_a_wrong_relation_or_number(entry, objects, credit):
    assert soft_credit(entry, *seen(*objects)) == pytest.approx(credit)


def picture(*objects):
    return render(Scene(tuple(SceneObject(*o) for o in objects), "", "", {}), 64)


RIGHT = picture(("circle", "red", 16, 32, 20), ("square", "blue", 48, 32, 20))
WRONG = picture(("circle", "red", 48, 32, 20), ("square", "blue", 16, 32, 20))


def test_rewards_of_pictures():
    """All built-in rewards of the shapes world, and a user's own; the verdict is GenEval's."""
    entry = position("circle", "left of", "square")
    names = ("geneval", "geneval-soft", "dpg", BRIGHT)
    rewards = load_rewards(names, RewardOptions(), CPU)
    found = {name: list(rewards[name]([RIGHT, WRONG], [entry] * 2)) for name in names}
    assert found["geneval"] == [1, 0] and found["geneval-soft"] == [1, 0.5]
    assert found["dpg"] == [1, pytest.approx(4 / 5)], "of five questions, the relation fails"
    assert found[BRIGHT] == list(brightness([RIGHT, WRONG], [entry] * 2))
    verdicts = geneval.score([RIGHT, WRONG], [entry] * 2, ShapesDetector()).verdicts
    assert found["geneval"] == [float(v.correct) for v in verdicts]


def test_clips_reward_is_a_cosine():
    """Of vectors that CLIP normalizes only if asked to."""

    def encoded(rows, normalize=False):
        found = torch.tensor([[3.0, 4.0]]).repeat(len(rows), 1)
        return found / 5 if normalize else found

    class Clip(torch.nn.Module):
        encode_image = encode_text = staticmethod(encoded)

    reward = ClipReward(Clip(), lambda texts: torch.zeros(len(texts), 77), CPU)
    assert reward([RIGHT, WRONG], [{"prompt": "a"}] * 2) == pytest.approx([1, 1])


def test_questions_of_a_users_file():
    ask = DPGReward(ShapesJudge(), own=False)
    questions = [
        {"tuple": "entity - whole (circle)", "question": "Is there a circle?"},
        {"tuple": "entity - whole (star)", "question": "Is there a star?"},
        {"tuple": "attribute - color (circle, red)", "question": "Is it red?", "parents": [2]},
    ]
    assert ask([RIGHT], [{"prompt": "x", "questions": questions}]) == [pytest.approx(1 / 3)]
    assert len(ask._questions(two_object("circle", "star"))) == 2, (
        "no question about the background"
    )
    with pytest.raises(UserError, match="questions of 'x' do not have the form that dpg needs"):
        ask([RIGHT], [{"prompt": "x", "questions": [{"text": "?"}]}])
    with pytest.raises(UserError, match='neither "questions" nor'):
        ask.check([{"prompt": "x"}])
    own = [questions[0] | {"parents": [0]}, *questions[1:]]  # DPG-Bench's way to write "none"
    assert ask([RIGHT], [{"prompt": "x", "questions": own}]) == [pytest.approx(1 / 3)]
    for wrong, message in (
        ([], "no question to ask about 'x'"),
        ([questions[0] | {"parents": [7]}], "cannot be scored.*depends on 7, which"),
        ([questions[0] | {"parents": [1]}], "cannot be scored.*depends on itself"),
        ([questions[0] | {"parents": ["1"]}], "are not numbers"),
        ([questions[0] | {"question": " "}], "question 1 has an empty text"),
    ):
        with pytest.raises(UserError, match=message):
            ask.check([{"prompt": "x", "questions": wrong}])


def panel_of(function: str, **changes) -> Panel:
    name = f"reward_functions:{function}"
    options = {"seconds": 30.0, "constant": 3} | changes
    return Panel({name: own_function(name)}, {name: 1.0}, **options)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", r"raises raised ConnectionError: no server on port 18085; prompt 'a photo of a"),
        ("hangs", r"hangs did not answer within 0\.2 seconds .* 2 images; prompt 'a photo"),
        ("as_bad_as_can_be", r"gave -1\.7e\+308, but may give up to 1e\+30; prompt 'a photo of"),
        ("nan", r"nan gave nan; prompt 'a photo of a circle left"),
        ("one_too_few", r"one_too_few gave 1 numbers for 2 images; prompt"),
        ("pairs", r"pairs gave array\(\[\[1\., 1\.\], \[1\., 1\.\]\]\) instead of a number"),
        ("words", r"words gave \['good', 'good'\] instead of a number per image"),
    ],
)
def test_a_bad_reward_is_named_with_a_prompt(function, words):
    panel = panel_of(function, seconds=0.2 if function == "hangs" else 30.0)
    with pytest.raises(RewardError, match=words):
        panel.judge_all([RIGHT, WRONG], [position("circle", "left of", "square")] * 2)


@pytest.mark.parametrize("column", [np.ones((2, 1)), torch.ones(2, 1), [np.float32(1)] * 2])
def test_arrays_of_one_element_are_numbers(column):
    """Whether they were depended on the library that made them, and on its version."""
    panel = Panel({"column": lambda *_: column}, {"column": 1.0}, seconds=30.0, constant=3)
    assert panel.judge("column", [Image.new("RGB", (8, 8))] * 2, [{"prompt": "x"}] * 2) == [1.0] * 2


@pytest.mark.parametrize("given", [{0: 1.0, 1: 2.0}, {1.0, 2.0}, "12"])
def test_answers_whose_order_is_not_the_images_are_refused(given):
    """The keys of a dict were taken for rewards."""
    panel = Panel({"answers": lambda *_: given}, {"answers": 1.0}, seconds=30.0, constant=3)
    with pytest.raises(RewardError, match=r"a number per image .*the images' order"):
        panel.judge("answers", [Image.new("RGB", (8, 8))] * 2, [{"prompt": "x"}] * 2)


def test_a_reward_that_changes_what_it_is_given():
    """Sheets showed the thumbnails, the next reward judged them; without prompts: a traceback."""

    def changes(images, metadata):
        for image, entry in zip(images, metadata, strict=True):
            image.thumbnail((2, 2))
            entry.pop("prompt")
        return [0.5] * len([metadata.pop() for _ in images])

    panel = Panel({"changes": changes}, {"changes": 1.0}, seconds=30.0, constant=3)
    image, entries = Image.new("RGB", (8, 8)), [{"prompt": "x"}]
    assert panel.judge_all([image], entries) == {"changes": [0.5]}
    assert image.size == (8, 8) and entries == [{"prompt": "x"}]


def test_no_images_need_no_reward():
    """A process may have no share of a watched benchmark, and CLIP cannot stack nothing."""
    stacks = {"stacks": lambda images, _: np.stack(images).mean((1, 2, 3))}
    assert Panel(stacks, {"stacks": 1.0}, seconds=30.0, constant=3).judge("stacks", [], []) == []


def test_a_reward_leaves_defaults_alone(tmp_path, monkeypatch):
    """Gradients switched off in a scoring script ended training in an assertion of DeepSpeed's; a
    default type changed its bits; another working directory parted a run with a relative path.
    """

    def defaults():
        device = torch.empty(0).device
        return torch.is_grad_enabled(), torch.get_default_dtype(), device, Path.cwd()

    changes = Path(reward_functions.__file__).read_text() + "\nchanges_defaults([], [])\n"
    (tmp_path / "scoring_script.py").write_text(changes)
    monkeypatch.syspath_prepend(tmp_path)
    before = defaults()
    name = "scoring_script:changes_defaults"
    panel = Panel({name: own_function(name)}, {name: 1.0}, seconds=30.0, constant=3)
    assert panel.judge_all([RIGHT], [position("circle", "left of", "square")]) == {name: [0.5]}
    assert defaults() == before


def test_rewards_keep_no_gradients():
    """They run in a thread, where gradients are on by default."""
    asks = {"asks": lambda images, _: [float(torch.is_grad_enabled())]}
    panel = Panel(asks, {"asks": 1.0}, seconds=30.0, constant=3)
    assert panel.judge_all([RIGHT], [position("circle", "left of", "square")]) == {"asks": [0.0]}


def test_a_soft_reward_counts_once_by_its_benchmark():
    """Even if both are watched."""
    options = RewardOptions(functions=("geneval-soft",), watch=("geneval", "geneval-soft"))
    run = SimpleNamespace(config=SimpleNamespace(reward=options))
    metrics = {"watch/geneval": 0.5, "watch/geneval-soft": 0.75}
    assert RewardRun.judged_by(run, metrics) == -0.5


def test_a_constant_reward_stops_after_some_batches():
    panel, name = panel_of("constant"), "reward_functions:constant"
    for values in ([0, 0], [0, 0], [0, 1], [0, 0], [1, 1]):
        panel.check_variation({name: values}, ["a", "b"])
    with pytest.raises(RewardError, match="constant gave 0 to every image of the last 3 batches"):
        panel.check_variation({name: [0, 0]}, ["a", "b"])


@pytest.mark.slow
def test_judges_in_separate_processes():
    """Two processes give the same numbers as one, in the order of the images; errors inside are
    reported.
    """
    names = ("geneval-soft", BRIGHT, "reward_functions:raises", "reward_functions:dies")
    names += ("reward_functions:keyed",)
    rewards = load_rewards(names, RewardOptions(), CPU)
    panel = Panel(rewards, dict.fromkeys(names[:2], 1.0), seconds=120, constant=3)
    entries = [position("circle", "left of", "square"), two_object("circle", "star")]
    of = ([RIGHT, WRONG, RIGHT], [*entries, entries[0]])
    alone = panel.judge_all(*of)
    panel.share(2, RewardOptions())
    assert panel.judge_all(*of) == alone and len(set(alone["geneval-soft"])) == 2
    with pytest.raises(RewardError, match="raised ConnectionError: no server on port 18085"):
        panel.judge("reward_functions:raises", *of)
    with pytest.raises(RewardError, match="keyed raised TypeError: neither a dict nor a set"):
        panel.judge("reward_functions:keyed", *of)
    with pytest.raises(
        RewardError, match=r"dies raised RuntimeError: a judging process .*exit code 9"
    ):
        panel.judge("reward_functions:dies", *of)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "no_such_module:f cannot be imported"),
        ("reward_functions:no_such", r"there is no no_such in .*reward_functions\.py"),
        ("reward_functions:NO_FUNCTION", "is 3, which is not a function"),
        # As other trainers call theirs: seen only when a batch was drawn.
        ("reward_functions:of_flow_grpo", "called with a list of images .*argument: 'metadata'$"),
        ("reward_functions:of_trl", "called with a list of images .*: too many positional"),
        ("reward_functions:waits", "called with a list of images .*: it is async"),
        ("reward_functions:Scorer", "called with a list of images .*: it is a class: name an obj"),
    ],
)
def test_a_missing_reward_function(name, words):
    with pytest.raises(UserError, match=words):
        own_function(name)
    assert callable(own_function("reward_functions:scorer"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def f(images, metadata:\n", r"SyntaxError: .* was never closed \(faulty_1.py, line 1\)$"),
        ("\nx = undefined", r"NameError: .* is not defined \(.*faulty_2.py, line 2\)$"),
        ("import not_installed", r"No module named 'not_installed' \(.*faulty_3.py, line 1\)$"),
        ("import sys\nsys.exit(0)", r"SystemExit: 0 \(.*faulty_4.py, line 2\)$"),  # ended the run
    ],
)
def test_errors_while_a_reward_is_imported_name_their_place(tmp_path, monkeypatch, code, words):
    """They were tracebacks, or blamed Python's path."""
    name = re.search(r"faulty_\d|$", words)[0] or "faulty"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"{name}:f cannot be imported: .*{words}"):
        own_function(f"{name}:f")


def test_missing_weights_are_reported_before_drawing(tmp_path, monkeypatch):
    options = RewardOptions(prompts="official", detector_weights=tmp_path)
    with pytest.raises(UserError, match="mask2former"):
        load_rewards(("geneval",), options, CPU)


def test_prompts_that_geneval_cannot_judge_are_refused_before_drawing():
    check = GenEvalReward(ShapesDetector()).check
    check([position("circle", "left of", "square")])
    with pytest.raises(UserError, match="does not know 'cat'"):
        check([position("cat", "left of", "square")])


# -- prompts ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("words", ["shapes", "official"])
def test_training_prompts_are_not_those_of_a_benchmark(words):
    pool = training_prompts(RewardOptions(prompts=words), 0)
    asked = {entry["prompt"] for entry in pool.every()}
    benchmarks = [*official_prompts(), *benchmark_prompts(), *benchmark_prompts(seed=7)]
    held_out = {m["prompt"] for m in benchmarks if m["tag"] in ("position", "color_attr")}
    assert not asked & {m["prompt"] for m in [*official_prompts(), *benchmark_prompts()]}
    assert not asked & held_out and not asked & set(shapes_questions().prompts.values())
    assert pool.left_out > 100 and len(asked) > 1000
    assert all(e["tag"] == task for task, entries in pool.tasks.items() for e in entries)
    if words == "shapes":
        assert len(pool.tasks["counting"]) == 4, "24 less the benchmark's 20"


def test_the_order_of_prompts():
    pool = training_prompts(RewardOptions(tasks=("counting", "position")), 0)
    drawn = [entry for step in range(4) for entry in pool.at(step, 4)]
    assert [entry["tag"] for entry in drawn] == ["counting", "position"] * 8
    counted = [entry["prompt"] for entry in drawn[::2]]
    assert len(set(counted[:4])) == len(set(counted[4:])) == 4, "each once before any repeats"
    assert drawn == [entry for step in range(2) for entry in pool.at(step, 8)]
    assert drawn != [e for s in range(4) for e in replace(pool, seed=1).at(s, 4)]


def test_a_users_prompts(tmp_path):
    path, known = tmp_path / "own.jsonl", official_prompts()[200]["prompt"]
    lines = [{"prompt": "a red fox", "style": 1}, {"prompt": f"  {known.upper()} "}]
    path.write_text("\n".join(map(json.dumps, lines)))
    pool = training_prompts(RewardOptions(prompts=str(path)), 0)
    assert pool.every() == lines[:1] and pool.left_out == 1
    assert prompt_hash(known) in benchmark_hashes()
    path.write_text(json.dumps(lines[1]))
    with pytest.raises(UserError, match=r"all 1 prompts of own\.jsonl belong to a benchmark"):
        training_prompts(RewardOptions(prompts=str(path)), 0)
    path.write_text("\n")
    with pytest.raises(UserError, match=r"own\.jsonl holds no prompt"):
        training_prompts(RewardOptions(prompts=str(path)), 0)
    with pytest.raises(UserError, match="is not a file; give shapes, official, or"):
        training_prompts(RewardOptions(prompts="nowhere"), 0)
    with pytest.raises(UserError, match="single_object belong to a benchmark"):
        training_prompts(RewardOptions(tasks=("single_object",)), 0)
    with pytest.raises(UserError, match="unknown 'size'"):
        training_prompts(RewardOptions(tasks=("size",)), 0)
    assert len(all_prompts("single_object")) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"functions": ()}, "functions is empty"),
        ({"weights": (0.0,)}, "all its weights are 0, so nothing"),
        ({"functions": ("genval",)}, "'genval' is none of geneval"),
        ({"functions": ("mine.py:f",)}, "'mine.py:f' is none of .*rewards:function, with PYTHON"),
        ({"functions": ("dpg", "dpg")}, "has the same function twice"),
        ({"weights": (1.0, 2.0)}, "one weight for each of the functions"),
        ({"group": 1}, "group=1 must be at least 2"),
        ({"clip": 0.0}, "clip=0.0 must be above 0"),
        ({"seconds": 1e300}, "seconds=1e\\+300 must be above 0 .from"),
        ({"workers": 10**9}, "at most 1,000,000"),
        ({"workers": 1000}, "workers=1000 must be at most 256: each is a process"),
        ({"weights": (math.inf,)}, "must be numbers from -1,000,000"),
        ({"cfg_scale": 0.5}, "cfg_scale=0.5 must be at least 1"),
        ({"start_cfg_scale": 0.5}, "cfg_scale=0.5 must be at least 1"),
        ({"start_temperature": 0.0}, "start_temperature=0.0 must be above 0"),
        ({"kl": -1.0}, "kl=-1.0 must be at least 0"),
        (
            {"functions": ()},
            "reward.functions is empty, or all its weights are 0, so nothing would be learned",
        ),
        ({"functions": (), "start_cfg_scale": 3.0, "kl": 0.0}, "reward.functions is empty"),
        ({"watch": ("own",)}, "watch: 'own' is none of"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(UserError, match=words):
        RewardOptions(**options)


def test_a_start_draws_as_the_run_where_nothing_else_is_said():
    run = RewardOptions(cfg_scale=2.0, temperature=0.7)
    assert run.teacher is None
    guided, cooler = replace(run, start_cfg_scale=3.0), replace(run, start_temperature=0.5)
    assert guided.teacher == SamplingConfig(3.0, temperature=0.7)
    assert cooler.teacher == SamplingConfig(2.0, temperature=0.5)
    assert run.sampling == guided.sampling == SamplingConfig(2.0, temperature=0.7)


@pytest.mark.parametrize("name", ["geneval", "dpg"])
def test_watched_prompts_are_the_benchmarks(name):
    """More per task than the benchmark has used to bring in prompts that training draws."""
    few, every, most = (benchmark_of(name, "shapes", count) for count in (2, 0, 50))
    assert 0 < len(few) < len(every) and most == every
    assert all(prompt_hash(entry["prompt"]) in benchmark_hashes() for entry in every)


def test_diversity():
    a, b = torch.zeros(4, 1), torch.tensor([[0.0], [0], [1], [1]])
    found = diversity({0: [a, b, a], 1: [b, b, b]})
    assert found["watch/distinct"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["watch/diversity"] == pytest.approx((0.5 + 0 + 0.5) / 6)
