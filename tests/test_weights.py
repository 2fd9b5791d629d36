"""Weight files of every layout load; a damaged or foreign file is refused with one ValueError."""

import argparse
import errno
from pathlib import Path

import pytest
import torch
from helpers import tiny_config, tiny_llamagen, tiny_vq
from safetensors.torch import save_file

import t2i.files
import t2i.weights
from t2i.errors import UserError
from t2i.files import file_sha256, write_json
from t2i.models.base import LoadOptions
from t2i.models.llamagen.llamagen_model import LlamaGen
from t2i.models.tokenizers.vq import VQTokenizer
from t2i.weights import copy_weights, read_folder, read_state_dict, state_dict_sha256, weight_files

CONFIG = tiny_config("text")


@pytest.fixture(scope="module")
def weights():
    return tiny_llamagen("text").gpt.state_dict()


LAYOUTS = {
    "ddp": lambda sd: {"model": sd},
    "raw_fsdp": lambda sd: sd,
    "deepspeed": lambda sd: {"module": sd},
    "lightning": lambda sd: {"state_dict": sd},
    "self_trained": lambda sd: {
        "model": sd,
        "optimizer": {"state": {}, "param_groups": []},
        "steps": 3,
        "args": argparse.Namespace(lr=1e-4, data=None),
    },
    "compiled": lambda sd: {"model": {f"_orig_mod.{k}": v for k, v in sd.items()}},
    "wrapped": lambda sd: {"model": {f"module.{k}": v for k, v in sd.items()}},
    "wrapped_and_compiled": lambda sd: {
        "model": {
            f"module._orig_mod.{k.replace('layers.0', 'layers.0._orig_mod')}": sd[k] for k in sd
        }
    },
    "fsdp": lambda sd: {
        f"_fsdp_wrapped_module.{k.replace('s.0', 's.0._checkpoint_wrapped_module')}": sd[k]
        for k in sd
    },
    "nested_the_other_way": lambda sd: {"state_dict": {"model": {"module": sd}}},
    "another_key": lambda sd: {"model_state_dict": sd, "epoch": 3, "optimizer": {"a": {}}},
    "averages_alone": lambda sd: {"ema": sd, "steps": 3},
    "averages_too": lambda sd: {"ema": {k: v + 1 for k, v in sd.items()}, "model": sd},
    "averaged_model_of_ddp": lambda sd: {
        "n_averaged": torch.tensor(3),
        **{f"module.module.{k}": v for k, v in sd.items()},
    },
    "after_sampling": lambda sd: {
        "model": {
            **sd,
            "freqs_cis": torch.zeros(2),
            "layers.0.attention.kv_cache.k_cache": torch.zeros(1),
        }
    },
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "safetensors"])
def test_layouts_load(tmp_path, weights, layout):
    path = tmp_path / ("gpt.safetensors" if layout == "safetensors" else "gpt.pt")
    if layout == "safetensors":
        save_file(weights, path)
    else:
        torch.save(LAYOUTS[layout](weights), path)
    backbone = LlamaGen.load(path, LoadOptions(CONFIG))
    assert not any(module.training for module in backbone.modules())
    loaded = backbone.gpt.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[k], weights[k]) for k in weights)


@pytest.mark.parametrize("shapes_only", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_computed_tables_in_a_file_are_ignored(tmp_path, name, shapes_only):
    """Some files of every family contain masks and tables that the model computes."""
    computed = (
        "transformer.freqs_cis",  # Open-MAGVIT2
        "transformer.causal_mask",
        "transformer.factorized_blocks.0.attention.kv_cache.v_cache",
        "attn_mask",  # RAR
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",  # Janus
    )
    weights = {key: torch.ones(2) for key in (*computed, "norm.weight")}
    (torch.save if name.endswith("bin") else save_file)(weights, tmp_path / name)
    assert list(read_folder(tmp_path, shapes_only=shapes_only)) == ["norm.weight"]


def test_shards_have_an_order_and_no_key_in_common(tmp_path):
    """Their order enters the hash of a base, which must be the same in every process."""
    names = [f"model-{i}.safetensors" for i in range(20)]
    for name in names:
        save_file({name: torch.ones(2)}, tmp_path / name)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {n: n for n in names}})
    assert [path.name for path in weight_files(tmp_path)] == sorted(names)
    save_file({names[0]: torch.zeros(2)}, tmp_path / names[1])
    with pytest.raises(UserError, match=r"another shard has, too: model-0.safetensors"):
        read_folder(tmp_path)


def test_old_pickles_load(tmp_path, weights):
    """Files written before torch 1.6 are not zip archives and cannot be memory-mapped."""
    torch.save({"model": weights}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    loaded = read_state_dict(tmp_path / "x.pt")
    assert all(torch.equal(loaded[k], weights[k]) for k in weights)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_weights_are_memory_mapped(name, tmp_path):
    """If they were read, they would be in memory twice while they are copied into a model."""
    weights = {"a": torch.ones(64 << 18)}  # 64 MiB
    (torch.save if name == "x.pt" else save_file)(weights, tmp_path / name)
    status = Path("/proc/self/status")
    before = own_memory(status.read_text())
    loaded = read_state_dict(tmp_path / name)
    assert loaded["a"].sum() == 64 << 18
    assert own_memory(status.read_text()) - before < 32 << 10


def own_memory(status: str) -> int:
    """KiB of the process's memory that are not backed by a file."""
    return int(status.partition("RssAnon:")[2].split()[0])


class Payload:
    """Creates a file if it is unpickled unsafely."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def _damaged(kind: str, folder: Path, weights) -> Path:
    path = folder / "gpt.pt"
    if kind == "unsafe":
        torch.save({"model": weights, "extra": Payload(folder / "marker")}, path)
        return path
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=kind != "truncated_old")
    good = path.read_bytes()
    content = {
        "truncated": good[: len(good) // 2],
        "truncated_old": good[: len(good) // 2],
        "empty": b"",
        "html": b"<!doctype html><title>404</title>",
        "pickle_stack": b"\x80\x02.",
    }[kind]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "kind", ["truncated", "truncated_old", "empty", "html", "pickle_stack", "unsafe"]
)
def test_damaged_files_are_refused(tmp_path, weights, kind):
    """No code in the file is executed, and torch's advice to allow it is not repeated."""
    path = _damaged(kind, tmp_path, weights)
    with pytest.raises(ValueError, match=r"gpt\.pt cannot be read") as refused:
        read_state_dict(path)
    for advice in ("weights_only", "safe_globals", "Re-running", "()"):
        assert advice not in str(refused.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["gpt.pt", "model.safetensors"])
def test_a_git_lfs_pointer_is_refused_as_such(tmp_path, name):
    """`git clone` leaves it in place of a large file if Git LFS is not installed."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(ValueError, match="Git LFS pointer, not the file: run `git lfs pull`"):
        read_state_dict(tmp_path / name)


def test_truncated_safetensors_are_refused(tmp_path, weights):
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        read_state_dict(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_folder(tmp_path, shapes_only=True)


@pytest.mark.parametrize(
    "content",
    [
        {"a": 1},
        {},
        {3: torch.zeros(1)},
        torch.zeros(2),
        {"generator": {"a": torch.zeros(1)}, "discriminator": {"b": torch.zeros(1)}},
    ],
)
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize("nest", [lambda weights: weights, lambda weights: {"model": weights}])
def test_an_entry_that_is_not_a_weight_is_named(tmp_path, weights, nest):
    torch.save(nest({**weights, "epoch": 3, "version": "1.0"}), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"not weights: 'epoch', 'version'; save the weights"):
        read_state_dict(tmp_path / "x.pt")


def test_tensors_without_all_their_numbers_are_no_weights(tmp_path, weights):
    """Copying them into the model used to end in a RuntimeError."""
    other = {"a": torch.eye(3).to_sparse(), "b": torch.zeros(2, device="meta")}
    torch.save(weights | other, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"not weights: 'a', 'b'; save the weights"):
        read_state_dict(tmp_path / "x.pt")


def test_a_weight_whose_dimensions_give_no_shape(tmp_path):
    """It used to be an IndexError."""
    torch.save(tiny_vq().state_dict() | {"encoder.conv_in.weight": torch.ones(())}, tmp_path / "x")
    with pytest.raises(UserError, match=r"not a VQ tokenizer .* too few dimensions"):
        VQTokenizer.load(tmp_path / "x")


def test_safetensors_load_under_any_file_name(tmp_path, weights):
    """In the hub's cache they are named by their hash."""
    save_file(weights, tmp_path / "c2i")
    assert read_state_dict(tmp_path / "c2i").keys() == weights.keys()


def test_a_weight_under_two_names_is_refused(tmp_path, weights):
    path = tmp_path / "gpt.pt"
    torch.save({**weights, "module.norm.weight": weights["norm.weight"] + 1}, path)
    with pytest.raises(UserError, match=r"norm\.weight twice, once as module\.norm\.weight"):
        LlamaGen.load(path, LoadOptions(CONFIG))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.pt does not exist"):
        read_state_dict(tmp_path / "nowhere.pt")


def test_files_of_another_model_are_refused(tmp_path, weights):
    vq, gpt, other = (tmp_path / name for name in ("vq.pt", "gpt.pt", "other.pt"))
    torch.save({"model": tiny_vq().state_dict()}, vq)
    torch.save({"model": weights}, gpt)
    # The tokenizer of another family shares these names.
    shared = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight")
    torch.save({name: torch.zeros(4, 4) for name in shared}, other)
    with pytest.raises(ValueError, match=r"vq\.pt: not a LlamaGen GPT.*tok_embeddings\.weight"):
        LlamaGen.load(vq)
    with pytest.raises(ValueError, match=r"missing .*tok_embeddings\.weight[\s\S]*unexpected"):
        LlamaGen.load(vq, LoadOptions(CONFIG))
    with pytest.raises(ValueError, match=r"gpt\.pt: not a VQ tokenizer.*encoder\.conv_in\.weight"):
        VQTokenizer.load(gpt)
    with pytest.raises(ValueError, match=r"not a VQ tokenizer.*encoder\.conv_blocks\.0"):
        VQTokenizer.load(other)


def test_every_key_that_does_not_fit_is_named(tmp_path, weights):
    bad = dict(weights)
    for key in ("norm.weight", "layers.1.attention.wo.weight"):
        del bad[key]
    bad["layers.2.attention.wo.weight"] = bad["surprise"] = torch.zeros(1)
    bad["output.weight"] = torch.zeros(7, 32)
    torch.save(bad, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as caught:
        LlamaGen.load(tmp_path / "bad.pt", LoadOptions(CONFIG))
    lines = str(caught.value).splitlines()
    assert "bad.pt does not fit GPT" in lines[0]
    assert "missing (2): layers.1.attention.wo.weight, norm.weight" in lines[1]
    assert "unexpected (2): layers.2.attention.wo.weight, surprise" in lines[2]
    assert "mis-shaped (1): output.weight (file (7, 32), model (48, 32))" in lines[3]


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(tmp_path, weights, number):
    """Used to load: images came out as noise, and training blamed the learning rates."""
    bad = dict(weights)
    bad["output.weight"] = bad["output.weight"].clone()
    bad["output.weight"][3, 2] = number
    torch.save(bad, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad.pt holds numbers.* not finite \(output.weight\)"):
        LlamaGen.load(tmp_path / "bad.pt", LoadOptions(CONFIG))
    # The way of adapters and image layers:
    with pytest.raises(UserError, match=r"bad.pt holds numbers.* not finite \(output.weight\)"):
        copy_weights({k: v.clone() for k, v in weights.items()}, bad, "bad.pt")


def test_unpublished_shape_needs_a_config(tmp_path, weights):
    torch.save({"model": weights}, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match=r"width 32 with 2 layers.*give a folder .* config.json"):
        LlamaGen.load(tmp_path / "gpt.pt")


def test_a_given_grid_replaces_the_configs(tmp_path, weights):
    torch.save(weights, tmp_path / "gpt.pt")
    backbone = LlamaGen.load(tmp_path / "gpt.pt", LoadOptions(CONFIG, grid=(2, 8)))
    assert backbone.spec.grid == (2, 8) and backbone.spec.num_tokens == 16


def test_json_is_written_whole_and_files_are_hashed(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"caption": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "caption": "é"\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_a_file_without_read_permission_is_refused_as_such(tmp_path, monkeypatch, weights):
    """Used to be reported as damaged weights; hashing it used to end in a traceback."""

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    torch.save(weights, tmp_path / "a.pt")
    for module, read in ((t2i.weights, read_state_dict), (t2i.files, file_sha256)):
        with monkeypatch.context() as patch:  # not chmod: root may read everything
            patch.setattr(module, "open", refuse, raising=False)
            with pytest.raises(UserError, match=r"a.pt cannot be read: Permission denied"):
                read(tmp_path / "a.pt")


def test_a_folder_given_as_a_weight_file_is_refused_as_such(tmp_path):
    """Used to be reported as a file that does not exist."""
    with pytest.raises(UserError, match="is a folder or a special file"):
        read_state_dict(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize("large", [16, 1 << 30])
def test_the_hash_of_weights_covers_all_of_them(monkeypatch, large):
    monkeypatch.setattr(t2i.weights, "_LARGE", large)
    weights = {"b": torch.arange(8.0), "a": torch.ones(2), "none": torch.zeros(0)}
    digest = state_dict_sha256(weights)
    assert state_dict_sha256(dict(reversed(weights.items()))) == digest
    others = [
        {**weights, "b": torch.arange(8.0) + (torch.arange(8) == 7)},
        {**weights, "b": torch.arange(8.0).view(2, 4)},
        {**weights, "b": torch.arange(8.0).bfloat16()},
        {**weights, "a": torch.tensor([1.0, 1.1])},
        {"c": weights["b"], "a": weights["a"], "none": weights["none"]},
    ]
    assert len({state_dict_sha256(other) for other in others} | {digest}) == 6


def test_the_hash_of_small_weights_has_not_changed():
    """Caches of codes are found by their tokenizer's."""
    digest = state_dict_sha256({"a": torch.arange(3), "b": torch.ones(2).bfloat16()})
    assert digest == "b7c766349bd384aae60a62a7c47ef029a30a6a10961558e370de906c38ef21c1"
