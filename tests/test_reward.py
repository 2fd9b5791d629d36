"""Reward fine-tuning: the images drawn are the ones scored and trained on; bad rewards are
noticed.
"""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import open_gates, tiny_janus, tiny_llamagen, tiny_open_magvit2, tiny_prepared
from PIL import Image
from reward_functions import brightness
from runs import assert_same_weights

import geneval
from geneval.detector import Detections
from geneval.prompts import color_attr, counting, official_prompts, position, two_object
from t2i.errors import UserError
from t2i.lora import add_lora
from t2i.reward import policy
from t2i.reward.panel import Panel, RewardError
from t2i.reward.policy import (
    DrawnBatch,
    PolicyLoss,
    Start,
    advantages,
    code_distributions,
    score_codes,
)
from t2i.reward.reward_options import RewardOptions
from t2i.reward.reward_prompts import benchmark_hashes, prompt_hash, training_prompts
from t2i.reward.reward_run import RewardRun
from t2i.reward.reward_watch import diversity
from t2i.reward.rewards import DPGReward, load_rewards, own_function, soft_credit
from t2i.rng import make_keys
from t2i.sampling import SamplingConfig
from t2i.shapes.scenes import Scene, SceneObject, render
from t2i.shapes.shapes_detector import ShapesDetector
from t2i.shapes.shapes_prompts import all_prompts, benchmark_prompts
from t2i.shapes.shapes_questions import ShapesJudge, shapes_questions
from t2i.tensorar import sampler
from t2i.tensorar.method import TensorARConfig
from t2i.tensorar.model import TensorAR
from t2i.tuning import LoRAConfig

CPU = torch.device("cpu")
BRIGHT = "reward_functions:brightness"


# -- what is drawn is what is scored ---------------------------------------------------------------
def drawn_and_logged(model: TensorAR, prepared: dict, sampling: SamplingConfig, monkeypatch):
    """Windows, and the log-probabilities [B, N, s] of their final codes under the logits they were
    sampled from.
    """
    plain_pick, steps, subs = sampler.pick, [], len(model.backbone.spec.subvocabs)

    def pick(logits, keys, rule):
        codes = plain_pick(logits, keys, rule)
        log_p = (logits / rule.temperature).log_softmax(-1)
        steps.append(log_p.gather(-1, codes[..., None])[..., 0][:, : sampling.stride])
        return codes

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "pick", pick)
        windows = sampler.sample_windows(model, prepared, make_keys(3, torch.arange(4)), sampling)
    log_p = torch.stack(steps).unflatten(0, (-1, subs)).sum(1).transpose(0, 1)
    valid = sampler.drawn_windows(model, sampling).valid()
    return windows, log_p * valid[:, : sampling.stride]


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(3.0, temperature=0.8)])
@pytest.mark.parametrize(("k", "stride"), [(1, 1), (3, 1), (4, 3)])
@pytest.mark.parametrize("make", [lambda: tiny_llamagen("text"), tiny_janus, tiny_open_magvit2])
def test_the_ratio_is_1_at_the_first_update(make, k, stride, sampling, monkeypatch):
    """Log-probabilities from the sampler (step by step, cached) equal the teacher-forced ones: with
    guidance, drafts, strides that do not divide the image, and several sub-tokens.
    """
    model = open_gates(TensorAR(make(), TensorARConfig(k=k))).eval()
    sampling = replace(sampling, stride=stride)
    prepared = tiny_prepared(model.backbone, 4)
    windows, drawn = drawn_and_logged(model, prepared, sampling, monkeypatch)
    scored = score_codes(model, prepared, windows, sampling)
    ratio = (scored.log_p - drawn).exp()
    assert (ratio - 1).abs().max() < 1e-4
    assert scored.log_p.grad_fn is not None and not scored.entropy.requires_grad
    assert drawn.std() > 0.1, "otherwise everything would be equal"
    other = score_codes(model, prepared, windows, SamplingConfig(2.0, stride=stride))
    assert ((other.log_p - drawn).exp() - 1).abs().max() > 0.01, "other settings would be noticed"


def test_chunking_the_logits_changes_nothing(monkeypatch):
    model = TensorAR(tiny_llamagen("text"), TensorARConfig(k=1)).eval()
    prepared = tiny_prepared(model.backbone, 4)
    windows = sampler.sample_windows(
        model, prepared, make_keys(0, torch.arange(4)), SamplingConfig()
    )
    whole = score_codes(model, prepared, windows, SamplingConfig(2.0))
    monkeypatch.setattr(TensorAR, "windows_at_once", lambda self, slots: 5)
    parts = score_codes(model, prepared, windows, SamplingConfig(2.0))
    torch.testing.assert_close(parts.log_p, whole.log_p)
    torch.testing.assert_close(parts.entropy, whole.entropy)


# -- the loss --------------------------------------------------------------------------------------
def test_advantages():
    rewards = torch.tensor(
        [[0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0.1]], dtype=torch.float64
    )
    found, kept = advantages(rewards, by_spread=True)
    assert kept.tolist() == [True, False, True]
    assert found[0].tolist() == [-1, -1, 1, 1] and found[1].tolist() == [0] * 4
    assert found[2, 3] == pytest.approx(3**0.5), "a small spread counts as much as a large one"
    alike, _ = advantages(rewards, by_spread=False)
    assert alike[2, 3] == pytest.approx(alike[0, 3] * 0.075 / 0.5)
    nothing, kept = advantages(rewards[1:2], by_spread=False)
    assert not kept.any() and nothing.tolist() == [[0] * 4]


def batch_of(model: TensorAR, **changes) -> DrawnBatch:
    sampling = SamplingConfig()
    prepared = tiny_prepared(model.backbone, 4)
    windows = sampler.sample_windows(model, prepared, make_keys(0, torch.arange(4)), sampling)
    with torch.no_grad():
        start = score_codes(model, prepared, windows, sampling).log_p
    gain, share = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([0.5, 0.25, 0.25, 0.0])
    return replace(DrawnBatch(windows, prepared, gain, share, start), **changes)


def test_the_loss_is_the_policy_gradient():
    """That of advantage times log-probability, over the images that are kept; at the start the pull
    adds nothing.
    """
    model = TensorAR(tiny_llamagen("text"), TensorARConfig(k=1)).eval()
    batch = batch_of(model)
    loss, sums = PolicyLoss(model, SamplingConfig(), clip=0.2, kl=0.5)(batch)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    log_p = score_codes(model, batch.prepared, batch.windows, SamplingConfig()).log_p
    (-(log_p.mean((1, 2)) * batch.advantage * batch.share).sum()).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, msg=name)
    found = dict(zip(policy.SUMS, (sums / sums[-1]).tolist(), strict=True))
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["clipped"] == 0
    assert 0 < found["entropy"] < np.log(48) and sums[-1] == 3 * 16, "one image has no weight"


def test_a_step_makes_the_better_images_likelier():
    model = TensorAR(tiny_llamagen("text"), TensorARConfig(k=1)).eval()
    batch, sampling = batch_of(model), SamplingConfig()
    loss, _ = PolicyLoss(model, sampling, clip=0.2, kl=0.0)(batch)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(1e-2 * p.grad)
        moved = score_codes(model, batch.prepared, batch.windows, sampling).log_p - batch.start
    better = moved.mean((1, 2))
    assert better[0] > 0 > better[1] and better[2] > 0


def test_clipping_and_the_pull():
    """A ratio outside the clip range gains nothing more; away from the start the pull has a
    gradient.
    """
    model = TensorAR(tiny_llamagen("text"), TensorARConfig(k=1)).eval()
    batch = batch_of(model)
    far = replace(batch, before=batch.start - 1.0, advantage=torch.ones(4), share=torch.ones(4) / 4)
    loss, sums = PolicyLoss(model, SamplingConfig(), clip=0.2, kl=0.0)(far)
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
    found = dict(zip(policy.SUMS, (sums / sums[-1]).tolist(), strict=True))
    assert found["clipped"] == 1 and found["ratio_off"] == pytest.approx(np.e - 1, rel=1e-4)
    pulled = replace(batch, start=batch.start - 0.5, advantage=torch.zeros(4))
    loss, sums = PolicyLoss(model, SamplingConfig(), clip=0.2, kl=1.0)(pulled)
    loss.backward()
    found = dict(zip(policy.SUMS, (sums / sums[-1]).tolist(), strict=True))
    assert found["kl"] == pytest.approx(np.exp(-0.5) - 0.5, rel=1e-4)
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("make", [lambda: tiny_llamagen("text"), tiny_open_magvit2])
def test_a_guided_start_pulls_by_whole_distributions(make):
    """The pull is the mean, over what the start would draw guided, of how much likelier the start
    makes it. It falls along its gradient, and is 0 if the run draws as the start does.
    """
    model = open_gates(TensorAR(make(), TensorARConfig(k=3))).eval()
    batch, guided = batch_of(model), SamplingConfig(3.0, temperature=0.8)
    of = (model, batch.prepared, batch.windows)
    others = code_distributions(*of, guided)
    picked = [
        every.gather(-1, batch.windows[:, :, :1, sub, None])[..., 0]
        for sub, every in enumerate(others)
    ]
    log_q = score_codes(*of, guided)
    torch.testing.assert_close(sum(picked) * log_q.valid, log_q.log_p)
    own = code_distributions(*of, SamplingConfig())
    expected = sum((q.exp() * (q - p)).sum(-1) for p, q in zip(own, others, strict=True))
    batch = replace(batch, start=others, advantage=torch.zeros(4))
    loss, sums = PolicyLoss(model, SamplingConfig(), clip=0.2, kl=0.5)(batch)
    loss.backward()
    per_image = expected.mean((1, 2))
    assert loss.item() == pytest.approx(0.5 * float((per_image * batch.share).sum()), rel=1e-4)
    found = dict(zip(policy.SUMS, (sums / sums[-1]).tolist(), strict=True))
    assert found["kl"] == pytest.approx(float(per_image[:3].mean()), rel=1e-4)
    assert found["kl"] > 0.01
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(1e-3 * p.grad / p.grad.norm().clamp(min=1e-9))
    nearer, _ = PolicyLoss(model, SamplingConfig(), clip=0.2, kl=0.5)(batch)
    assert nearer < loss
    level = replace(batch, start=code_distributions(*of, SamplingConfig()))
    assert abs(PolicyLoss(model, SamplingConfig(), clip=0.2, kl=0.5)(level)[0]) < 1e-6


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_start_is_what_the_run_began_with(tuning):
    """Also with adapters and a fully trained codec; afterwards the model has its own weights
    again.
    """
    backbone = tiny_janus()
    if tuning == "lora":
        add_lora(backbone, LoRAConfig(rank=2))
    model = open_gates(TensorAR(backbone, TensorARConfig(k=2))).eval()
    batch, start = batch_of(model), Start(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    now = {name: p.clone() for name, p in model.state_dict().items()}
    of = (batch.prepared, batch.windows, SamplingConfig())
    moved, revision = score_codes(model, *of).log_p, backbone.revision
    with start.applied(), torch.no_grad():
        assert torch.equal(score_codes(model, *of).log_p, batch.start)
    assert (moved - batch.start).abs().max() > 0.1
    assert_same_weights(model.state_dict(), now)
    assert torch.equal(score_codes(model, *of).log_p, moved) and backbone.revision == revision


# -- rewards ---------------------------------------------------------------------------------------
def seen(*objects) -> tuple:
    """Detections and colours, from (name, centre x, centre y, colour)."""
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
        ("nan", r"nan gave nan; prompt 'a photo of a circle left"),
        ("one_too_few", r"one_too_few gave 1 numbers for 2 images; prompt"),
        ("column", r"column gave array\(\[\[1\.\], \[1\.\]\]\) instead of a number per image"),
        ("words", r"words gave \['good', 'good'\] instead of a number per image"),
    ],
)
def test_a_bad_reward_is_named_with_a_prompt(function, words):
    panel = panel_of(function, seconds=0.2 if function == "hangs" else 30.0)
    with pytest.raises(RewardError, match=words):
        panel.judge_all([RIGHT, WRONG], [position("circle", "left of", "square")] * 2)


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
        panel.look({name: values}, ["a", "b"])
    with pytest.raises(RewardError, match="constant gave 0 to every image of the last 3 batches"):
        panel.look({name: [0, 0]}, ["a", "b"])


@pytest.mark.slow
def test_judges_in_separate_processes():
    """Two processes give the same numbers as one, in the order of the images; errors inside are
    reported.
    """
    names = ("geneval-soft", BRIGHT, "reward_functions:raises", "reward_functions:dies")
    rewards = load_rewards(names, RewardOptions(), CPU)
    panel = Panel(rewards, dict.fromkeys(names[:2], 1.0), seconds=120, constant=3)
    entries = [position("circle", "left of", "square"), two_object("circle", "star")]
    of = ([RIGHT, WRONG, RIGHT], [*entries, entries[0]])
    alone = panel.judge_all(*of)
    panel.share(2, RewardOptions())
    assert panel.judge_all(*of) == alone and len(set(alone["geneval-soft"])) == 2
    with pytest.raises(RewardError, match="raised ConnectionError: no server on port 18085"):
        panel.judge("reward_functions:raises", *of)
    with pytest.raises(
        RewardError, match=r"dies raised RuntimeError: a judging process .*exit code 9"
    ):
        panel.judge("reward_functions:dies", *of)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "no_such_module:f cannot be imported"),
        ("reward_functions:no_such", "has no attribute 'no_such'"),
        ("reward_functions:NO_FUNCTION", "is 3, which is not a function"),
    ],
)
def test_a_missing_reward_function(name, words):
    with pytest.raises(UserError, match=words):
        own_function(name)


def test_missing_weights_are_reported_before_drawing(tmp_path, monkeypatch):
    options = RewardOptions(prompts="official", detector_weights=tmp_path)
    with pytest.raises(UserError, match="mask2former"):
        load_rewards(("geneval",), options, CPU)


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


def test_diversity():
    a, b = torch.zeros(4, 1), torch.tensor([[0.0], [0], [1], [1]])
    found = diversity({0: [a, b, a], 1: [b, b, b]})
    assert found["watch/distinct"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["watch/diversity"] == pytest.approx((0.5 + 0 + 0.5) / 6)
