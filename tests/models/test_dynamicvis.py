"""DynamicVis against the authors' outputs, its router, its sizes and its checkpoints."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgekit.errors import ShapeError, WeightsError
from edgekit.models import create_model, fuse, load_weights, seed_weights
from edgekit.models.complexity import count_macs, count_parameters
from edgekit.models.dynamicvis import DynamicVis, SparseMixer, Stage, dynamicvis_base, dynamicvis_large
from edgekit.models.mamba import MambaBlock, MambaMixer

SIZES = [(32, 1), (48, 2), (64, 2), (96, 1)]
CASES = {"dynamicvis_tiny": (8, 4, 2, 1), "dynamicvis_tiny_noreduce": (1, 1, 1, 1)}


def tiny(ratios=(8, 4, 2, 1), img_size=64, **options):
    """The goldens' backbone, with weights that let every branch count."""
    stages = [Stage(dim, depth, ratio) for (dim, depth), ratio in zip(SIZES, ratios, strict=True)]
    stages[0] = Stage(32, 1, ratios[0], patch=7, stride=4)
    reduce = ratios != (1, 1, 1, 1)
    model = DynamicVis(stages, img_size=img_size, global_tokens=reduce, scale_all=reduce, **options).eval()
    seed_weights(model, 0)
    return model


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got, expected):
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def keys_and_shapes(model):
    return [(key, tuple(value.shape)) for key, value in model.state_dict().items()]


def routed(model, x):
    """The tokens that each mixer keeps, in the order of its scan."""
    kept = []

    def record(mixer, inputs):
        kept.append(mixer.route(inputs[0])[1])

    handles = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, SparseMixer)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("golden", CASES, indirect=True)
class TestGolden:
    def test_keys_are_the_originals_in_order(self, golden):
        assert keys_and_shapes(tiny(CASES[golden.case])) == list(golden.keys.items())

    def test_maps_before_and_after_fuse(self, golden):
        model = tiny(CASES[golden.case])
        model.load_state_dict(golden.state_dict(), strict=True)
        x = golden.images(64)
        with torch.no_grad():
            for candidate, tolerance in ((model, 1e-5), (fuse(model), 2e-5), (fuse(fuse(model)), 2e-5)):
                for index, got in enumerate(candidate(x)):
                    assert relative_error(got, golden.output(f"out{index}")) < tolerance

    def test_kept_tokens_in_the_order_of_the_scan(self, golden):
        model = tiny(CASES[golden.case])
        model.load_state_dict(golden.state_dict(), strict=True)
        kept = routed(model, golden.images(64))
        assert torch.equal(kept[0], golden.output("ids0"))
        assert torch.equal(kept[1], golden.output("ids1"))


@pytest.mark.parametrize("golden", ["dynamicvis_mambablock_64"], indirect=True)
def test_golden_mamba_block(golden):
    model = MambaBlock(64).eval()
    assert keys_and_shapes(model) == list(golden.keys.items())
    model.load_state_dict(golden.state_dict(), strict=True)
    x = golden.draw(f"input:{golden.case}", (2, 33, 64))
    with torch.no_grad():
        assert relative_error(model(x), golden.output("output")) < 1e-5
        fused = fuse(model)
        assert relative_error(fused(x), golden.output("output")) < 2e-5
    assert fused.mamba_layer.A_log is None
    assert model.mamba_layer.A is None


@pytest.mark.parametrize(
    ("factory", "parameters", "keys"),
    [
        pytest.param(dynamicvis_base, 36_745_536, 311, id="base"),
        pytest.param(dynamicvis_large, 91_242_240, 487, id="large"),
    ],
)
def test_size_of_the_authors_backbones(factory, parameters, keys):
    with torch.device("meta"):
        backbone, classifier = factory(features=True), factory()
    assert count_parameters(backbone) == parameters
    assert len(backbone.state_dict()) == keys
    ours = list(classifier.state_dict())
    assert ours[:-4] == [f"backbone.{key}" for key in backbone.state_dict()]
    assert ours[-4:] == [f"backbone.post_meanpool_norm.{w}" for w in ("weight", "bias")] + [
        "head.fc.weight",
        "head.fc.bias",
    ]


def test_macs_are_the_authors_less_what_both_directions_share():
    """The authors project each direction: 29.64 G for the base backbone, without the scan, which we count."""
    with torch.device("meta"):
        model = dynamicvis_base(features=True)
    shared, scans = 0, 0

    def count(mixer, inputs):
        nonlocal shared, scans
        _, length, dim = inputs[0].shape
        shared += length * 6 * dim * dim
        scans += 2 * length * 2 * dim * 16 * 2

    for module in model.modules():
        if isinstance(module, MambaMixer):
            module.register_forward_pre_hook(count)
    ours = count_macs(model, (1, 3, 512, 512))
    assert (ours - scans + shared) / 1e9 == pytest.approx(29.64, abs=0.005)


class TestRouter:
    def test_weights_sum_to_one_and_order_descends(self):
        mixer = SparseMixer(16, rows=3, keep_ratio=4, scale_all=True).eval()
        weights, ids = mixer.route(images(2, 21, 16))
        assert ids.shape == (2, 5)
        torch.testing.assert_close(weights.sum(1), torch.ones(2))
        kept = weights.gather(1, ids)
        assert (kept[:, :-1] >= kept[:, 1:]).all()
        assert torch.equal(kept, weights.sort(descending=True).values[:, :5])

    def test_the_first_of_equal_tokens_leads(self):
        mixer = SparseMixer(4, rows=0, keep_ratio=2, scale_all=True).eval()
        x = images(1, 1, 4).repeat(1, 200, 1)
        assert mixer.route(x)[1].tolist() == [list(range(100))]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_in_float32_whatever_the_input(self, dtype):
        mixer = SparseMixer(16, rows=0, keep_ratio=2, scale_all=True).eval().to(dtype)
        x = images(1, 64, 16).to(dtype)
        weights, ids = mixer.route(x)
        assert weights.dtype == torch.float32
        wide = mixer.float().route(x.float())
        assert torch.equal(weights, wide[0])
        assert torch.equal(ids, wide[1])

    def test_at_least_one_token_is_kept(self):
        mixer = SparseMixer(8, rows=1, keep_ratio=8, scale_all=True).eval()
        assert mixer.route(images(1, 3, 8))[1].shape == (1, 1)
        assert mixer(images(1, 3, 8)).shape == (1, 3, 8)

    def test_noise_is_for_training_and_seeded(self):
        mixer = SparseMixer(8, rows=0, keep_ratio=1, scale_all=True)
        x = images(2, 40, 8)
        still = mixer.route(x)[0]
        mixer.noise = 0.1
        noisy = []
        for _ in range(2):
            with torch.random.fork_rng():
                torch.manual_seed(3)
                noisy.append(mixer.route(x)[0])
        assert torch.equal(noisy[0], noisy[1])
        assert not torch.allclose(noisy[0], still)
        assert torch.equal(mixer.eval().route(x)[0], still)

    def test_noise_falls_with_the_epochs(self):
        model = tiny()
        seen = []
        for epoch in (0, 5, 10):
            model.set_progress(epoch, 10)
            seen.append({m.noise for m in model.modules() if isinstance(m, SparseMixer)})
        assert [value for (value,) in seen] == pytest.approx([0.1, 0.05005, 1e-4])


def plain_mixer(mixer, x):
    """One block for one image `[N, C]`, token by token, from the formulas."""
    weights = torch.softmax((x @ mixer.spatial_gate.weight[0]).float(), 0)
    kept = sorted(range(len(x)), key=lambda i: (-float(weights[i]), i))[: len(x) // mixer.keep_ratio]
    row = len(x) // max(1, mixer.rows)
    means = [x[i * row : (i + 1) * row].mean(0) for i in range(mixer.rows)]
    scanned = mixer.spatial_mamba_mixer(torch.stack([*means, *(x[i] for i in kept)])[None])[0, mixer.rows :]
    others = x * weights[:, None] if mixer.scale_all else torch.zeros_like(x)
    added = {i: weights[i] * scanned[place] for place, i in enumerate(kept)}
    return torch.stack([x[i] + added.get(i, others[i]) for i in range(len(x))])


@pytest.mark.parametrize("scale_all", [True, False], ids=["scale-all", "scale-kept"])
@pytest.mark.parametrize("keep_ratio", [3, 1], ids=lambda ratio: f"one-in-{ratio}")
@pytest.mark.parametrize("rows", [5, 0], ids=["rows", "no-rows"])
def test_block_against_its_formulas(rows, keep_ratio, scale_all):
    mixer = SparseMixer(16, rows=rows, keep_ratio=keep_ratio, scale_all=scale_all).eval()
    seed_weights(mixer, 1)
    x = images(3, 35, 16)
    with torch.no_grad():
        expected = torch.stack([plain_mixer(mixer, image) for image in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-6)


class TestSizes:
    def test_maps_of_a_wide_image(self):
        with torch.no_grad():
            maps = tiny(img_size=(64, 160))(images(2, 3, 64, 160))
        assert [tuple(m.shape) for m in maps] == [(2, 32, 16, 40), (2, 48, 8, 20), (2, 64, 4, 10), (2, 96, 2, 5)]

    def test_the_smallest_image(self):
        with torch.no_grad():
            assert tiny(img_size=32)(images(1, 3, 32, 32))[-1].shape == (1, 96, 1, 1)

    def test_other_than_square_images_have_rows_of_their_own_width(self):
        """The global tokens are means over rows: an image turned by 90 degrees is another input."""
        assert [m.rows for m in tiny(img_size=(64, 160)).modules() if isinstance(m, SparseMixer)] == [16, 8, 8, 4, 4, 2]

    @pytest.mark.parametrize(
        ("img_size", "words"),
        [
            pytest.param(500, "multiple of 32.* height of 500, the nearest that fit are 480 and 512", id="between"),
            pytest.param((64, 70), "width of 70, the nearest that fit are 64 and 96", id="width"),
            pytest.param(8, "height of 8, the smallest that fits is 32", id="too-small"),
            pytest.param(0, "height of 0", id="zero"),
            pytest.param(-64, "height of -64", id="negative"),
            pytest.param((64,), "a number of pixels or a pair", id="one-of-two"),
            pytest.param("64", "a number of pixels or a pair", id="text"),
            pytest.param(64.0, "a number of pixels or a pair", id="float"),
            pytest.param((True, 64), "a number of pixels or a pair", id="bool"),
            pytest.param(None, "a number of pixels or a pair", id="none"),
        ],
    )
    def test_image_size_that_does_not_fit(self, img_size, words):
        with pytest.raises(ShapeError, match=words):
            create_model("dynamicvis_base", img_size=img_size)

    @pytest.mark.parametrize("override", [{"num_classes": 0}, {"in_chans": -1}], ids=lambda o: next(iter(o)))
    def test_numbers_below_one(self, override):
        with pytest.raises(ShapeError, match=f"{next(iter(override))} must be at least 1"):
            create_model("dynamicvis_digits", weights="random", **override)

    def test_another_image_than_built_for(self):
        with pytest.raises(ShapeError, match=re.escape("images [B, 3, 64, 64]; got (1, 3, 96, 64); for another size")):
            tiny()(images(1, 3, 96, 64))
        with pytest.raises(ShapeError, match="unsqueeze"):
            tiny()(images(3, 64, 64))


def cubic(distance, a=-0.75):
    """The kernel of cubic convolution (Keys, 1981), with torch's a."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def resizing(size, wanted):
    """The matrix `[wanted, size]` of a bicubic resize with half-pixel centres; the edge is repeated."""
    matrix = np.zeros((wanted, size))
    for row in range(wanted):
        centre = (row + 0.5) * size / wanted - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[row, min(max(tap, 0), size - 1)] += cubic(centre - tap)
    return matrix


class TestCheckpoints:
    @pytest.mark.parametrize("img_size", [96, (32, 160), (160, 64)], ids=["larger", "wide", "tall"])
    def test_resized_position_embedding(self, img_size, tmp_path):
        given, model = tiny(), tiny(img_size=img_size)
        save_file(given.state_dict(), tmp_path / "w.safetensors")
        load_weights(model, tmp_path / "w.safetensors")
        square = given.pos_embed.detach().double().numpy()[0].reshape(16, 16, 32)
        rows, columns = (resizing(16, side) for side in model.grid)
        expected = np.einsum("ia,jb,abc->ijc", rows, columns, square).reshape(1, -1, 32)
        np.testing.assert_allclose(model.pos_embed.detach().numpy(), expected, atol=1e-6)
        assert torch.equal(model.layers[0][0].projection.weight, given.layers[0][0].projection.weight)

    def test_embedding_of_the_right_shape_stays(self):
        """Also where a square grid has as many tokens, as 16 x 16 has here: a model's own weights must load again."""
        tensors = tiny(img_size=(32, 128)).state_dict()
        assert tiny(img_size=(32, 128)).adapt_checkpoint(tensors)["pos_embed"] is tensors["pos_embed"]

    @pytest.mark.parametrize(
        "shape",
        [(1, 60, 32), (1, 64, 48), (64, 32), (2, 64, 32), (1, 0, 32), (1, 32, 8, 8)],
        ids=["not-square", "width", "rank", "batch", "empty", "map"],
    )
    def test_embedding_that_cannot_be_resized(self, shape):
        with pytest.raises(WeightsError, match=r"pos_embed.*\[1, side \* side, 32\].*16 x 16 tokens"):
            tiny().adapt_checkpoint({**tiny().state_dict(), "pos_embed": torch.zeros(shape)})

    def test_classifier_at_another_size(self, tmp_path):
        """Only the embedding and the number of global tokens change, and other sizes load as they are."""
        small = create_model("dynamicvis_digits", weights="random", seed=3)
        save_file(small.state_dict(), tmp_path / "w.safetensors")
        large = create_model("dynamicvis_digits", weights=tmp_path, img_size=[64, 48])
        assert large.backbone.pos_embed.shape == (1, 32 * 24, 32)
        with torch.no_grad():
            assert large(images(2, 1, 64, 48)).shape == (2, 10)

    def test_backbone_from_a_classifiers_checkpoint(self, tmp_path):
        whole = create_model("dynamicvis_digits", weights="random", seed=3)
        torch.save({"state_dict": whole.state_dict(), "meta": {"epoch": 1}}, tmp_path / "w.pth")
        backbone = create_model("dynamicvis_digits", weights=tmp_path / "w.pth", features=True)
        assert isinstance(backbone, DynamicVis)
        x = images(2, 1, 32, 32)
        with torch.no_grad():
            pooled = whole.backbone.post_meanpool_norm(backbone(x)[-1].mean((2, 3)))
            torch.testing.assert_close(whole.head(pooled), whole(x))

    def test_backbone_from_a_pooled_backbones_checkpoint(self, tmp_path):
        """Its norm behind the pooling is not wanted, with or without the prefix."""
        pooled = create_model("dynamicvis_digits", weights="random", seed=3).backbone
        save_file(pooled.state_dict(), tmp_path / "w.safetensors")
        backbone = create_model("dynamicvis_digits", weights=tmp_path, features=True)
        assert "post_meanpool_norm.weight" in pooled.state_dict()
        assert all(torch.equal(value, pooled.state_dict()[key]) for key, value in backbone.state_dict().items())

    def test_pretraining_gives_the_backbone_and_no_classifier(self, tmp_path):
        maps = create_model("dynamicvis_digits", weights="random", seed=3, features=True)
        tensors = {f"backbone.{key}": value for key, value in maps.state_dict().items()}
        for key in ("pre_neck.lateral_convs.0.conv.weight", "neck.weight", "head.category_embedding"):
            tensors[key] = torch.zeros(2, 2)
        torch.save({"state_dict": tensors}, tmp_path / "w.pth")
        backbone = create_model("dynamicvis_digits", weights=tmp_path / "w.pth", features=True)
        assert torch.equal(backbone.layers[2][2].weight, maps.layers[2][2].weight)
        with pytest.raises(WeightsError, match=r"got neck\.\*, pre_neck\.\* too\. Build with features=True"):
            create_model("dynamicvis_digits", weights=tmp_path / "w.pth")

    def test_classifier_from_a_backbone_alone(self, tmp_path):
        maps = create_model("dynamicvis_digits", weights="random", features=True)
        save_file(maps.state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(WeightsError, match=r"got layers\.\*, pos_embed\.\* too\. Build with features=True"):
            create_model("dynamicvis_digits", weights=tmp_path)

    def test_embedding_of_another_type_is_refused(self, tmp_path):
        tensors = create_model("dynamicvis_digits", weights="random").state_dict()
        for given in (torch.zeros(1, 64, 32, dtype=torch.int64), torch.zeros(1, 64, 32, dtype=torch.bool)):
            save_file({**tensors, "backbone.pos_embed": given}, tmp_path / "w.safetensors")
            with pytest.raises(WeightsError, match=f"of another type .*pos_embed: .* got {given.dtype}"):
                create_model("dynamicvis_digits", weights=tmp_path)

    @pytest.mark.parametrize("features", [False, True], ids=["classifier", "features"])
    def test_another_architecture_is_refused(self, features, tmp_path):
        save_file(create_model("shvit_digits").state_dict(), tmp_path / "shvit.safetensors")
        with pytest.raises(WeightsError, match=r"does not fit this DynamicVis.*missing.*unexpected"):
            create_model("dynamicvis_digits", weights=tmp_path, features=features)

    def test_the_other_size_is_refused(self, tmp_path):
        save_file(tiny().state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(WeightsError, match=r"width|\[1, side \* side, 96\]|missing"):
            create_model("dynamicvis_base", weights=tmp_path, features=True)


@pytest.mark.parametrize("name", ["dynamicvis_digits", "tiny", "noreduce"])
def test_images_of_a_batch_do_not_touch(name):
    if name == "dynamicvis_digits":
        model, x = create_model(name, weights="random"), images(4, 1, 32, 32)
    else:
        model, x = (
            tiny(CASES["dynamicvis_tiny" + ("_noreduce" if name == "noreduce" else "")], pooled=True),
            images(4, 3, 64, 64),
        )
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_pixel_that_is_no_number_spoils_its_image_alone(value):
    model, x = tiny(), images(2, 3, 64, 64)
    with torch.no_grad():
        clean = model(x)
        x[0, 1, 5, 9] = value
        spoilt = model(x)
    for before, after in zip(clean, spoilt, strict=True):
        assert after[0].isnan().all()
        torch.testing.assert_close(after[1], before[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph(backend):
    model, x = create_model("dynamicvis_digits").eval(), images(3, 1, 32, 32)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_without_token_selection_all_tokens_are_scanned():
    model = create_model("dynamicvis_digits", weights="random", token_selection=False)
    kept = routed(model, images(2, 1, 32, 32))
    assert [ids.shape[1] for ids in kept] == [256, 256, 64, 64, 16, 16]
    assert all(torch.equal(ids.sort().values, torch.arange(ids.shape[1]).expand(2, -1)) for ids in kept)
    with_selection = create_model("dynamicvis_digits", weights="random")
    assert model.state_dict().keys() == with_selection.state_dict().keys()
    assert [ids.shape[1] for ids in routed(with_selection, images(2, 1, 32, 32))] == [64, 64, 32, 32, 16, 16]


def test_gradients_reach_every_parameter():
    model = create_model("dynamicvis_digits", weights="random").train()
    model(images(2, 1, 32, 32)).square().sum().backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    assert all(isinstance(p, nn.Parameter) and p.grad.isfinite().all() for p in model.parameters())


def test_fused_classifier_has_no_affine_norm_left():
    model = create_model("dynamicvis_digits", weights="random")
    seed_weights(model, 0)
    fused = fuse(model)
    assert "backbone.post_meanpool_norm.weight" not in fused.state_dict()
    x = images(3, 1, 32, 32)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 2e-5
        assert relative_error(fuse(fused)(x), model(x)) < 2e-5
