"""Decoders from Hugging Face folders: whole and sharded weights, their types, options, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgekit.errors import InputError, WeightsError
from edgekit.models import seed_weights
from edgekit.models.boundaries import BoundaryPredictor
from edgekit.models.decoder_checkpoint import is_decoder_folder, load_decoder

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
}
IDS = torch.randint(0, 53, (2, 19), generator=torch.Generator().manual_seed(0))


def theirs(family):
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    seed_weights(model, 1)
    return model


@pytest.fixture
def folder(tmp_path):
    """A small Llama as transformers saves it."""
    theirs("llama").save_pretrained(tmp_path)
    return tmp_path


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, family, dtype):
    """Half precision is widened, which is exact."""
    model = theirs(family).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = load_decoder(tmp_path)
    assert not loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS), again(IDS).logits, atol=1e-5, rtol=1e-5)


def test_shards(tmp_path):
    model = theirs("gemma2")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(tmp_path)(IDS), model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_tied_matrix_may_be_saved_too(tmp_path):
    model = theirs("qwen2")
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": model.lm_head.weight.detach().clone()}))
    assert load_decoder(tmp_path).lm_head is None


def test_loaded_weights_do_not_hang_on_the_file(folder):
    model = load_decoder(folder)
    before = model.model.embed_tokens.weight.clone()
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_generation_config_names_the_ends_of_a_text(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[2, 7])
    config = load_decoder(folder, {"context": 48}).config
    assert (config.bos, config.eos, config.context) == (1, (2, 7), 48)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_predictor_from_a_file(folder, tmp_path, form):
    """Its hidden width is the file's, and the choice of what is read depends on it."""
    predictor = BoundaryPredictor(16, heads=4, hidden=24, window=4)
    seed_weights(predictor, 0)
    file = tmp_path / f"predictor.{form}"
    save = torch.save if form == "pt" else save_file
    save(predictor.state_dict(), file)
    options = {"attention": "dhsa", "budget": 24, "block_size": 8, "local": 8, "predictor_heads": 4}
    model = load_decoder(folder, {**options, "predictor": str(file)})
    assert model.config.attention.predictor_hidden == 24
    for key, value in predictor.state_dict().items():
        assert torch.equal(model.boundary_predictor.state_dict()[key], value)
    torch.save(model.state_dict(), tmp_path / "all.pt")
    save_file(model.state_dict(), folder / "model.safetensors")
    again = load_decoder(folder, {**options, "predictor_hidden": 24})
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))
    dense = load_decoder(folder)  # does not need what the folder has for another attention
    assert dense.boundary_predictor is None


def test_which_folders_are_decoders(folder, tmp_path):
    assert is_decoder_folder(folder)
    edit_json(folder / "config.json", model_type="vit")
    assert not is_decoder_folder(folder)
    assert not is_decoder_folder(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budgets": 1}, "does not take budgets; it takes attention, budget, block_size"),
        ({"attention": "sparse"}, "attention is one of dense, window, block, dhsa; got 'sparse'"),
        ({"attention": "block", "budget": "all"}, "budget is a whole number, such as 2048; got 'all'"),
        ({"attention": "block", "budget": 128}, "budget below 192"),
        ({"attention": "block", "share_masks": 1}, "share_masks is true or false; got 1"),
        ({"attention": "block", "boundary_threshold": "no"}, "boundary_threshold is a number, or null for none"),
        ({"budget": 4096}, "budget does nothing with attention 'dense'; add attention=dhsa, or leave it out"),
        ({"attention": "block", "predictor": "f.pt"}, "predictor does nothing with attention 'block'"),
        ({"attention": "dhsa", "predictor": 3}, "predictor is a file of weights; got 3"),
        ({"context": "long"}, "context is a number of tokens, such as 4096; got 'long'"),
    ],
)
def test_errors_of_options(folder, options, words):
    with pytest.raises(InputError, match=words):
        load_decoder(folder, options)


def test_dhsa_needs_a_predictor(folder):
    with pytest.raises(WeightsError, match=r"needs the weights of its boundary predictor.*pass predictor=FILE"):
        load_decoder(folder, {"attention": "dhsa"})


def test_a_file_without_a_predictor(folder):
    file = str(folder / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"holds no boundary predictor: expected the keys enc\.mha\.\*.*; got lm_head"
    ):
        load_decoder(folder, {"attention": "dhsa", "predictor": file})


def test_a_predictor_for_another_model(folder, tmp_path):
    torch.save(BoundaryPredictor(32, heads=4, hidden=8, window=4).state_dict(), tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"boundary_predictor\..* in .*other\.pt must be \[.*16.*\] of floats; got"):
        load_decoder(folder, {"attention": "dhsa", "predictor": str(tmp_path / "other.pt")})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json; expected a folder as Hugging Face's"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object; got a list"),
        (
            lambda folder: edit_json(folder / "config.json", model_type="mamba"),
            "config.json: the decoder reads model_type gemma2, llama, qwen2; got 'mamba'",
        ),
        (
            lambda folder: edit_json(folder / "config.json", rope_parameters={"rope_type": "yarn"}),
            "config.json: the decoder scales rotary positions as default or llama3; got rope type 'yarn'",
        ),
    ],
    ids=["no configuration", "damaged", "not an object", "another architecture", "another rope"],
)
def test_errors_of_configurations(folder, change, words):
    change(folder)
    with pytest.raises(InputError, match=words):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            r"does not fit its config.json: it lacks model\.norm\.weight$",
        ),
        (
            lambda tensors: [
                tensors.pop(f"model.layers.1.{name}_layernorm.weight") for name in ("input", "post_attention")
            ],
            r"lacks model\.layers\.1\.input_layernorm\.weight, model\.layers\.1\.post_attention_layernorm\.weight",
        ),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)}),
            r"it has, and the model does not, model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(33)}),
            r"model\.norm\.weight in .*model\.safetensors must be \[32\] of floats; got \[33\] of torch\.float32",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
            r"of floats; got \[32\] of torch\.int8",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.full((32,), torch.nan)}),
            r"model\.norm\.weight in .* holds NaN or infinite values",
        ),
    ],
    ids=["missing", "several missing", "too many", "another shape", "another type", "not finite"],
)
def test_errors_of_weights(folder, change, words):
    edit_weights(folder, change)
    with pytest.raises(WeightsError, match=words):
        load_decoder(folder)


def test_old_rotary_frequencies_are_left_out(folder):
    edit_weights(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    )
    load_decoder(folder)


def test_a_damaged_file(folder):
    (folder / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or not a safetensors file"):
        load_decoder(folder)


def test_weights_in_another_form(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        WeightsError, match=r"neither model\.safetensors nor .*found pytorch_model\.bin\. Save the model as"
    ):
        load_decoder(folder)


@pytest.fixture
def shards(tmp_path):
    theirs("llama").save_pretrained(tmp_path, max_shard_size="10KB")
    return tmp_path


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard(shards):
    gone = sorted(shards.glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(WeightsError, match=rf"lacks {gone.name}, which model\.safetensors\.index\.json names"):
        load_decoder(shards)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..\\b.safetensors", "..", ""]
)
def test_a_shard_outside_of_the_folder(shards, name):
    edit_index(shards, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(WeightsError, match="which is not a file of this folder; do not trust it"):
        load_decoder(shards)


def test_a_link_out_of_the_folder(shards, tmp_path_factory):
    """Hub caches hold links to the files; a link is followed, as in `open`, and must still be a file of tensors."""
    first = min(shards.glob("model-*"))
    away = tmp_path_factory.mktemp("blobs") / "blob"
    first.rename(away)
    first.symlink_to(away)
    load_decoder(shards)


def test_a_tensor_in_another_shard_than_the_index_says(shards):
    def move(index):
        files = index["weight_map"]
        files["model.norm.weight"] = next(name for name in files.values() if name != files["model.norm.weight"])

    edit_index(shards, move)
    with pytest.raises(WeightsError, match=r"lacks model\.norm\.weight, which model\.safetensors\.index\.json places"):
        load_decoder(shards)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": []}])
def test_a_damaged_index(shards, content):
    (shards / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="must map tensors to files under weight_map"):
        load_decoder(shards)
