"""How much memory a run needs: the estimate beside what is really allocated, and the bounds that
keep large models on small cards.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import tiny_run
from test_recipes import ALL

from t2i import generation
from t2i.generation import generate
from t2i.models import base
from t2i.tensorar import codec, room, sampler
from t2i.tensorar.room import cache_bytes, images_that_fit
from t2i.training import memory
from t2i.training.memory import _condition, estimate, sheet_images
from t2i.training.size_report import _fits
from t2i.training.start import build_model
from t2i.training.training_run import Run


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_activations_match_what_autograd_keeps(tiny_world, tuning, monkeypatch):
    monkeypatch.setattr(codec, "_attend_shared", codec._attend)  # as on a GPU
    config = tiny_run(tiny_world, "-", tuning=tuning)
    counted = estimate(build_model(config, device="meta"), config, world_size=1)
    model = build_model(config).train()
    batch, spec, kept = config.engine.micro_batch, model.backbone.spec, {}
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    codes = torch.zeros(batch, spec.num_tokens, 1, dtype=torch.long)
    prefix = torch.zeros(batch, spec.prefix_tokens, spec.dim, requires_grad=True)
    condition = replace(
        _condition(build_model(config, device="meta").backbone, batch),
        prefix=prefix,
        mask=torch.ones(batch, spec.prefix_tokens, dtype=torch.bool),
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(codes, condition, model.windows.gather(codes))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert counted.kept == pytest.approx(real, rel=0.1)


def test_a_step_of_all_weights_at_real_size():
    """Measured on a CPU beyond an empty process, in a step with optimizer moments: RAR-B, full,
    ZeRO-2, bf16, micro-batch 1: 7.2 GB; LlamaGen-L with its frozen parts in fp32: 11.3 and 12.3 GB.
    """
    config = ALL["rar-b"]
    engine, data = replace(config.engine, micro_batch=1), replace(config.data, views="flip")
    log = replace(config.log, sample_every=0)
    config = replace(config, engine=engine, data=data, log=log, batch_size=1)
    model = build_model(config, device="meta")
    cost = estimate(model, config, world_size=1, samples=4, gpu=False)
    assert cost.total / 1.1 == pytest.approx(7.2e9, rel=0.15)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_trains_a_copy_of_fp32_weights_too(tiny_world, stage):
    """The estimate for fp32 used to leave it out: 0.36 GB for Janus-Pro-1B with LoRA, 3.1 GB for XL
    with all weights.
    """
    config = tiny_run(tiny_world, f"copy-{stage}", engine__zero_stage=stage)
    run = Run(config)
    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    updated = [p for group in run.engine.optimizer.param_groups for p in group["params"]]
    copied = sum(p.numel() for p in updated if p.untyped_storage().data_ptr() not in own)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert copied == pytest.approx(trained if stage else 0, rel=1e-3), "up to padding for alignment"
    counted = estimate(build_model(config, device="meta"), config, world_size=1).state
    total = sum(p.numel() for p in run.model.parameters())
    assert counted == pytest.approx(4 * total + (4 + 8) * trained + 4 * copied, rel=1e-3)


def test_zero_gathers_gradients(tiny_world):
    def bucket(gpu: bool, **changes) -> float:
        config = tiny_run(tiny_world, "-", **changes)
        return estimate(build_model(config, device="meta"), config, world_size=1, gpu=gpu).bucket

    small = bucket(True)
    assert 0 < small < 4e6 and small % 4 == 0
    for gpu in (True, False):
        assert bucket(gpu, engine__zero_stage=2) == small, "a bucket is no larger than needed"
    for stage in (1, 2):  # in bf16, and in ZeRO-1's fp32
        assert bucket(False, engine__zero_stage=stage, engine__precision="bf16") == small
    assert bucket(False, engine__zero_stage=3) == 3 * small, (
        "gradients, and weights that it keeps gathered"
    )


def test_settings_that_change_memory(tiny_world):
    def cost(**changes):
        config = tiny_run(tiny_world, "-", **changes)
        return estimate(build_model(config, device="meta"), config, world_size=1)

    plain = cost()
    assert cost(engine__gradient_checkpointing=True).kept < plain.kept
    assert cost(engine__gradient_checkpointing=True).flops > plain.flops
    assert cost(engine__codec_checkpointing=True).kept < 0.9 * plain.kept
    assert cost(engine__compile=True) == plain
    assert cost(engine__micro_batch=8).kept == pytest.approx(2 * plain.kept, rel=0.05)
    assert cost(method__k=8).passing > 2 * plain.passing
    assert cost(method__own_drafts=1.0).flops == pytest.approx(4 / 3 * plain.flops)
    assert cost(tuning="lora").state < plain.state


def test_work_counts_gradients_of_trained_weights_alone(tiny_world):
    """A backward pass has one product for the inputs' gradients and one for the weights'."""
    config = tiny_run(tiny_world, "-", tuning="lora")
    model = build_model(config, device="meta")
    frozen, trained = (
        estimate(model, replace(config, tuning=tuning), world_size=1).flops
        for tuning in ("lora", "full")
    )
    assert frozen == pytest.approx(2 / 3 * trained)


# -- image tokenizers, buckets and sheets ----------------------------------------------------------
def test_a_tokenizer_gets_few_images_at_once(backbone, monkeypatch):
    """32 images of 384 px took 10 GB, more than the training of Janus-Pro-1B with LoRA."""
    spec = backbone.spec
    codes = torch.stack([make_codes(spec, i) for i in range(5)])
    together, sizes = backbone.decode_images(codes), []
    decode = type(backbone).decode_pixels
    monkeypatch.setattr(
        type(backbone), "decode_pixels", lambda b, part: sizes.append(len(part)) or decode(b, part)
    )
    height, width = backbone.image_size
    monkeypatch.setattr(base, "PIXELS_AT_ONCE", 3 * height * width)
    apart = backbone.decode_images(codes)
    assert sizes == [3, 3], "parts of one shape, whatever is left for the last one"
    assert (apart.int() - together.int()).abs().max() <= 1
    monkeypatch.setattr(base, "PIXELS_AT_ONCE", 1)
    assert backbone.images_at_once == 1


def make_codes(spec, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(v, (spec.num_tokens,), generator=generator) for v in spec.subvocabs]
    return torch.stack(columns, dim=-1)


def test_data_are_encoded_in_parts(tiny_world, tmp_path, monkeypatch):
    def codes(name, pixels):
        monkeypatch.setattr(base, "PIXELS_AT_ONCE", pixels)
        run = Run(tiny_run(tiny_world, name, data__cache_dir=tmp_path / name))
        return run.data.store.codes(range(20))

    seen = []
    encode = base.Backbone.encode_images
    monkeypatch.setattr(
        base.Backbone, "encode_images", lambda b, x: seen.append(len(x)) or encode(b, x)
    )
    assert torch.equal(codes("whole", base.PIXELS_AT_ONCE), codes("apart", 1))
    assert seen[0] > 1 and seen[-1] == 1


@pytest.mark.parametrize(
    "name, most", [("t2i-xl-256", 8), ("janus-pro-1b", 8), ("janus-pro-7b", 24)]
)
def test_small_data_recipes_fit_small_cards(name, most):
    config = ALL[f"{name}-small-data"]
    cost = estimate(build_model(config, device="meta"), config, world_size=1, gpu=True)
    assert cost.total < most * 1e9


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bucket_holds_all_gradients_and_no_more(tiny_world, stage):
    """DeepSpeed allocates whole buckets, of up to 2 GB by default, for however few gradients."""
    run = Run(tiny_run(tiny_world, f"bucket-{stage}", engine__zero_stage=stage))
    sizes = [getattr(p, "ds_numel", p.numel()) for p in run.model.parameters() if p.requires_grad]
    assert run.engine.optimizer.reduce_bucket_size == sum(sizes)


def test_a_cache_is_as_large_as_estimated(tiny_world):
    model = build_model(tiny_run(tiny_world, "-")).eval()
    prepared = model.backbone.prepare(["a red circle"] * 3)
    for scale, rows in ((1.0, 3), (2.0, 6)):
        config = replace(model.sampling, cfg_scale=scale)
        scales = sampler.guidance_table(model, config)
        condition = sampler.encode_rows(model.backbone, prepared, guided=scales is not None)
        state = sampler.new_state(model, condition, scales, model.windows)
        own = sum(t.nbytes for t in (*state.cache.keys, *state.cache.values))
        assert len(state.cache.keys[0]) == rows
        assert cache_bytes(model, config, 3) == own


@pytest.mark.parametrize(
    ("name", "memory", "images"),
    [
        ("janus-pro-1b-small-data", 8, 9),
        ("janus-pro-1b-small-data", 16, 36),
        ("janus-pro-7b-small-data", 16, 1),
        ("janus-pro-7b-small-data", 24, 9),
        ("janus-pro-7b-small-data", 80, 83),
    ],
)
def test_how_many_images_fit_a_card(name, memory, images):
    """0.28 (1B) or 0.69 GB (7B) each, beside weights of 3.1 or 13.5 GB and the decoder's maps."""
    model = build_model(ALL[name], device="meta").bfloat16()
    assert images_that_fit(model, model.sampling, memory << 30) == images


def test_a_small_gpu_draws_fewer_images_at_once(tiny_world, monkeypatch, caplog):
    caplog.set_level("INFO")
    model = build_model(tiny_run(tiny_world, "-")).eval()
    sizes, sample = [], generation.sample_windows
    monkeypatch.setattr(
        generation,
        "sample_windows",
        lambda m, p, keys, *a: sizes.append(len(keys)) or sample(m, p, keys, *a),
    )
    prompts = ["a red circle"] * 20

    def draw(memory: int | None, **options) -> list[bytes]:
        sizes.clear()
        monkeypatch.setattr(generation, "gpu_bytes", lambda device: memory)
        return [image.tobytes() for image in generate(model, prompts, progress=False, **options)]

    usual = draw(None)
    assert sizes == [16, 16]
    assert draw(80 << 30) == usual and sizes == [16, 16]
    monkeypatch.setattr(room, "tokenizer_bytes", lambda *_, gpu: 0)
    weights, one = room._weight_bytes(model), cache_bytes(model, model.sampling, 1)
    assert weights > sum(p.nbytes for p in model.parameters()), "and the tokenizer's"
    small = draw(int((weights + 7.5 * one) / room._SHARE))
    assert sizes == [7, 7, 7] and "drawing 7 images at once: the GPU has too little" in caplog.text
    assert small == draw(None, batch_size=7)
    draw(1)
    assert sizes == [1] * 20
    assert draw(1, batch_size=16) == usual and sizes == [16, 16]


def test_sheets_are_drawn_in_parts_if_their_cache_is_large(tiny_world, monkeypatch):
    """For 8 images at once, Janus-Pro-7B needs 5.5 GB of cache, beside weights and optimizer."""
    run = Run(tiny_run(tiny_world, "sheet"))
    one, prompts = cache_bytes(run.model, run.model.sampling, 1), len(run.prompts)
    assert sheet_images(run.model, prompts) == 2 * prompts
    run.draw_sheet()
    whole = run.sheet_path().read_bytes()
    monkeypatch.setattr(memory, "_SHEET_CACHE", 3.5 * one)
    assert sheet_images(run.model, prompts) == 3
    run.draw_sheet()
    assert run.sheet_path().read_bytes() == whole
    monkeypatch.setattr(memory, "_SHEET_CACHE", 0.5 * one)
    assert sheet_images(run.model, prompts) == 1


def test_sheets_are_part_of_the_estimate(tiny_world, monkeypatch):
    def cost(**changes):
        config = tiny_run(tiny_world, "-", **changes)
        return estimate(build_model(config, device="meta"), config, world_size=1)

    assert cost(log__sample_every=0).drawing == 0 < cost(log__sample_every=1).drawing
    drawn = replace(cost(), drawing=1e12)
    assert drawn.total > 1.1e12
    card = SimpleNamespace(name="a card", total_memory=1e12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert "draw no sample sheets (--log.sample-every 0: " in _fits(drawn)[1][0]
    assert "sheets" not in _fits(replace(drawn, kept=1e12))[1][0], "that would not be enough"
    monkeypatch.undo()
    whole = cost(log__sample_every=1, engine__zero_stage=3)  # a second model
    assert whole.drawing > cost(log__sample_every=1).drawing + 1e5
