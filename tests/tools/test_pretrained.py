"""Frozen networks: published layouts, what they compute, and how their files are checked."""

import hashlib
import importlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from equimini.presets import TokenizerTraining
from equimini.pretrained import published_weights as weights
from equimini.pretrained.lpips import Lpips, Vgg16
from equimini.pretrained.torchscript import FeatureDistance, ScriptTeacher, script_maps
from equimini.pretrained.vision_transformer import (DinoFeatures, DinoV2Teacher, VisionTransformer,
                                                    dino_vits16, dinov2_vitb14, imagenet_normalize,
                                                    resize)
from equimini.training.tokenizer_losses import make_distance, make_teacher
from equimini.utils.errors import UserError
from tests.conftest import randomize

VGG_CONVS = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256),
             14: (256, 256), 17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512),
             26: (512, 512), 28: (512, 512)}


def optional(name):
    """A package that only the comparison needs; the test is skipped where it does not work."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision raises RuntimeError beside another torch
        pytest.skip(f"{name}: {error}")


def vgg_layout():
    """The keys and shapes of vgg16-397923af.pth (the classifier's in small), random values."""
    state = {f"classifier.{i}.{name}": torch.zeros(2, 2) for i in (0, 3, 6)
             for name in ("weight", "bias")}
    for i, (c_out, c_in) in VGG_CONVS.items():
        state[f"features.{i}.weight"] = torch.randn(c_out, c_in, 3, 3) * (2 / 9 / c_in) ** 0.5
        state[f"features.{i}.bias"] = torch.randn(c_out) * 0.1
    return state


def lpips_layout():
    """Those of LPIPS v0.1's vgg.pth."""
    return {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1)
            for k, c in enumerate((64, 128, 256, 512, 512))}


def vit_layout(width, patch, positions, depth=12, scale=False):
    """Those of dino_deitsmall16_pretrain.pth, or (scale) of dinov2_vitb14_pretrain.pth."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, positions, width),
              "patch_embed.proj.weight": (width, 3, patch, patch),
              "patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
              **({"mask_token": (1, width)} if scale else {})}
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width),
               "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    block = {f"{name}.weight": shape for name, shape in linears.items()}
    block |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
    block |= dict.fromkeys(vectors + ("ls1.gamma", "ls2.gamma") * scale, (width,))
    shapes |= {f"blocks.{n}.{k}": v for n in range(depth) for k, v in block.items()}
    torch.manual_seed(0)
    return {k: torch.randn(s) / math.sqrt(max(1, math.prod(s[1:]))) for k, s in shapes.items()}


@pytest.fixture
def files(tmp_path):
    """Files of the published layout with random values, under names of the user's own."""
    torch.manual_seed(0)
    torch.save(vgg_layout(), tmp_path / "vgg.pt")
    torch.save(lpips_layout(), tmp_path / "lin.pt")
    torch.save(vit_layout(384, 16, 197), tmp_path / "dino.pt")
    return tmp_path


def test_published_layouts_are_accepted_and_hashes_reported(files, capsys):
    net = weights.load_lpips(f"{files}/vgg.pt,{files}/lin.pt")
    saved = torch.load(files / "vgg.pt", weights_only=True)
    assert torch.equal(net.vgg.features[28].weight, saved["features.28.weight"])
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    dino = weights.load_dino(str(files / "dino.pt"))
    assert torch.equal(dino.pos_embed, vit_layout(384, 16, 197)["pos_embed"])
    notes = capsys.readouterr().err
    for name in ("vgg.pt", "lin.pt", "dino.pt"):
        sha = hashlib.sha256((files / name).read_bytes()).hexdigest()
        assert f"{name}: SHA-256 {sha}, not verified" in notes


def test_dinov2_accepts_the_published_layout(tmp_path):
    torch.save(vit_layout(768, 14, 1370, scale=True), tmp_path / "b14.pt")
    vit = weights.load_dinov2(str(tmp_path / "b14.pt"))
    x = torch.rand(1, 3, 28, 42) * 2 - 1
    out = DinoV2Teacher(vit)(x, 2, 3)
    assert out.shape == (1, 768, 2, 3) and out.isfinite().all()
    assert vit.blocks[11].ls2.gamma.shape == (768,) and not vit.norm.weight.requires_grad


@pytest.mark.parametrize("change, text", (
    (lambda s: s.pop("features.28.bias"), "features.28.bias is missing"),
    (lambda s: s.update({"features.1.weight": torch.zeros(1)}), "features.1.weight is not known"),
    (lambda s: s.update({"features.0.bias": torch.zeros(3)}), r"\(3,\), not \(64,\)"),
    (lambda s: s["features.0.bias"].fill_(math.nan), "not finite")))
def test_other_layouts_are_refused(change, text):
    state = vgg_layout()
    change(state)
    with pytest.raises(UserError, match=text):
        weights.load_published(Vgg16(), state, "x.pth", "VGG16", ignored=("classifier.",))


def test_files_that_are_no_weights_are_refused(files):
    (files / "text.pt").write_text("no weights")
    torch.save({"student": {"a": torch.zeros(1)}}, files / "nested.pt")
    torch.save(vit_layout(384, 16, 197, depth=2), files / "shallow.pt")
    for spec, text in ((files / "text.pt", "text.pt"), (files / "nested.pt", "no file of weights"),
                       (files / "shallow.pt", "blocks.2.*missing.*more"),
                       (files / "none.pt", "there is no file.*dl.fbaipublicfiles")):
        with pytest.raises(UserError, match=text):
            weights.load_dino(str(spec))
    with pytest.raises(UserError, match="two files with a comma"):
        weights.load_lpips(str(files / "vgg.pt"))
    empty = files / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="vgg16-397923af.pth"):
        weights.load_lpips(str(empty))


def test_a_file_under_the_published_name_must_have_the_published_hash(files):
    (files / "vgg.pt").rename(files / "vgg16-397923af.pth")
    (files / "lin.pt").rename(files / "vgg.pth")
    with pytest.raises(UserError, match="SHA-256.*begins with 397923af"):
        weights.load_lpips(str(files))


def test_download_verifies_keeps_and_explains(tmp_path, files, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source = files / "dino.pt"
    sha = hashlib.sha256(source.read_bytes()).hexdigest()
    good = weights.Published(source.as_uri(), "dino_deitsmall16_pretrain.pth", sha[:8])
    monkeypatch.setattr(weights, "DINO", good)
    weights.load_dino("download")
    assert good.path.read_bytes() == source.read_bytes()
    source.unlink()
    weights.load_dino("download")  # from the kept copy, with no network
    good.path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="SHA-256"):
        weights.load_dino("download")
    good.path.unlink()
    with pytest.raises(UserError) as offline:
        weights.load_dino("download")
    for part in (good.url, str(good.path), "--dino-weights"):
        assert part in str(offline.value)
    (files / "lin.pt").rename(files / "other.pt")
    bad = weights.Published((files / "other.pt").as_uri(), "x.pth", "00000000")
    with pytest.raises(UserError, match="SHA-256.*expected 00000000"):
        weights.fetch(bad, "--dino-weights")
    assert not bad.path.exists()


def plain_lpips(x, y, vgg, lin):
    """LPIPS from its definition, with torch's functions."""
    def maps(image):
        h = (image - torch.tensor([-.030, -.088, -.188]).view(3, 1, 1)) / torch.tensor(
            [.458, .448, .450]).view(3, 1, 1)
        found = []
        for i in VGG_CONVS:
            if i in (5, 10, 17, 24):
                h = F.max_pool2d(h, 2)
            h = F.relu(F.conv2d(h, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"],
                                padding=1))
            if i in (2, 7, 14, 21, 28):
                found.append(h)
        return found
    total = 0
    for k, (a, b) in enumerate(zip(maps(x), maps(y))):
        a, b = (m / (m.square().sum(1, keepdim=True).sqrt() + 1e-10) for m in (a, b))
        total = total + F.conv2d((a - b) ** 2, lin[f"lin{k}.model.1.weight"]).mean((1, 2, 3))
    return total


def test_lpips_is_its_definition_and_its_gradient_reaches_the_second_image(files):
    net = weights.load_lpips(f"{files}/vgg.pt,{files}/lin.pt")
    vgg, lin = (torch.load(files / n, weights_only=True) for n in ("vgg.pt", "lin.pt"))
    x, y = torch.rand(2, 3, 35, 32) * 2 - 1, (torch.rand(2, 3, 35, 32) * 2 - 1).requires_grad_()
    torch.testing.assert_close(net(x, y), plain_lpips(x, y, vgg, lin), rtol=1e-4, atol=1e-6)
    fast, = torch.autograd.grad(net(x, y).sum(), y)
    slow, = torch.autograd.grad(plain_lpips(x, y, vgg, lin).sum(), y)
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-5 * slow.abs().max().item())
    assert net(x, x).abs().max() == 0
    a, b = net(x[:1], y[:1]), net(x, y)
    torch.testing.assert_close(a[0], b[0])  # one image's does not depend on the batch


def test_lpips_equals_the_package_lpips(files):
    optional("torchvision")
    package = optional("lpips")
    net = weights.load_lpips(f"{files}/vgg.pt,{files}/lin.pt")
    theirs = package.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    vgg, lin = (torch.load(files / n, weights_only=True) for n in ("vgg.pt", "lin.pt"))
    slices = [f"net.slice{n + 1}.{i}.{part}" for n, group in enumerate(
        ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))) for i in group
        for part in ("weight", "bias")]
    renamed = {name: vgg[f"features.{name.split('.', 2)[2]}"] for name in slices}
    missing, unknown = theirs.load_state_dict(renamed | lin, strict=False)
    assert not unknown and not [k for k in missing if k.startswith("net.")]
    for k, layer in enumerate(theirs.lins):  # the module list shares them
        assert torch.equal(layer.model[-1].weight, lin[f"lin{k}.model.1.weight"])
    x, y = torch.rand(2, 2, 3, 48, 64) * 2 - 1
    torch.testing.assert_close(net(x, y), theirs(x, y).flatten(), rtol=1e-4, atol=1e-6)


def plain_vit(x, state, heads, patch, tanh, after=()):
    """A ViT with torch's functions, at the grid of its position embedding."""
    def norm(h, name):
        return F.layer_norm(h, h.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(h, name):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    h = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], patch)
    h = torch.cat((state["cls_token"].repeat(len(x), 1, 1), h.flatten(2).transpose(1, 2)), 1)
    h = h + state["pos_embed"]
    found, n = [h], 0
    while f"blocks.{n}.norm1.weight" in state:
        b = f"blocks.{n}"
        q, k, v = linear(norm(h, f"{b}.norm1"), f"{b}.attn.qkv").chunk(3, -1)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        a = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1) @ v
        a = linear(a.transpose(1, 2).flatten(2), f"{b}.attn.proj")
        h = h + a * state.get(f"{b}.ls1.gamma", 1)
        m = F.gelu(linear(norm(h, f"{b}.norm2"), f"{b}.mlp.fc1"),
                   approximate="tanh" if tanh else "none")
        h = h + linear(m, f"{b}.mlp.fc2") * state.get(f"{b}.ls2.gamma", 1)
        if n in after:
            found.append(h)
        n += 1
    return norm(h, "norm"), found


@pytest.mark.parametrize("tanh, scale", ((True, False), (False, True)))
def test_vit_is_its_definition(tanh, scale):
    state = vit_layout(24, 4, 1 + 9, depth=4, scale=scale)
    vit = VisionTransformer(4, 24, 4, 3, grid=3, tanh_gelu=tanh, layer_scale=scale)
    weights.load_published(vit, state, "x", "ViT", ignored=("mask_token",))
    x = torch.randn(2, 3, 12, 12)
    out, features = plain_vit(x, state, 3, 4, tanh, after=(1, 3))
    torch.testing.assert_close(vit(x), out, rtol=1e-4, atol=1e-5)
    for a, b in zip(vit.intermediate(x, (1, 3)), features, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dino_features_are_patch_tokens_plus_the_class_token():
    state = vit_layout(24, 16, 197, depth=12)
    vit = VisionTransformer(16, 24, 12, 3, grid=14, tanh_gelu=True)
    weights.load_published(vit, state, "x", "ViT")
    x = torch.rand(2, 3, 224, 224) * 2 - 1
    _, features = plain_vit(imagenet_normalize(x), state, 3, 16, True, after=(2, 5, 8, 11))
    found = DinoFeatures(vit)(x, None)  # at 224 there is nothing to draw
    for a, b in zip(found, features, strict=True):
        torch.testing.assert_close(a, (b[:, 1:] + b[:, :1]).transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, make, side", (
    ("vit_small_patch16_224.dino", dino_vits16, (224, 224)),
    ("vit_small_patch16_224.dino", dino_vits16, (80, 160)),
    ("vit_base_patch14_dinov2", dinov2_vitb14, (224, 224)),
    ("vit_base_patch14_dinov2", dinov2_vitb14, (56, 84))))
def test_vits_equal_timms_with_interpolated_positions(name, make, side):
    optional("torchvision")
    timm = optional("timm")
    small = make is dino_vits16
    extra = {"act_layer": partial(torch.nn.GELU, approximate="tanh")} if small else {}
    theirs = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True,
                               **extra).eval()
    mine = make()
    state = vit_layout(mine.width, mine.patch, 1 + mine.grid ** 2, scale=not small)
    weights.load_published(mine, state, "x", name, ignored=("mask_token",))
    theirs.load_state_dict({k: v for k, v in state.items() if k != "mask_token"})
    x = torch.randn(1, 3, *side)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), theirs.forward_features(x), rtol=1e-3, atol=1e-4)


def test_resize_is_torchs_and_its_gradient_too():
    for size, target, mode in (((10, 14), (24, 20), "bicubic"), ((50, 41), (16, 24), "area"),
                               ((8, 30), (16, 16), "bicubic")):
        x = torch.randn(2, 3, *size, requires_grad=True)
        mine, theirs = resize(x, target, mode), F.interpolate(x, target, mode=mode)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        g = torch.randn_like(mine)
        a, = torch.autograd.grad(mine, x, g)
        b, = torch.autograd.grad(theirs, x, g)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_imagenet_normalization():
    x = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert imagenet_normalize(x).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("rows, columns", ((4, 4), (4, 12), (3, 5), (1, 2)))
def test_teachers_match_the_latent_map_for_any_image(maps_file, rows, columns):
    """As many values as the semantic map has, whatever the images' height and width."""
    images = torch.rand(2, 3, 8 * rows, 8 * columns) * 2 - 1
    teacher = ScriptTeacher(script_maps(maps_file), -1, images)
    target = teacher(images, rows, columns)
    assert target.shape == (2, 3, rows, columns) and teacher.channels == 3
    torch.testing.assert_close(target.mean(1), torch.zeros(2, rows, columns), atol=1e-5, rtol=0)
    vit = randomize(VisionTransformer(14, 24, 2, 3, grid=5, layer_scale=True))
    plain = DinoV2Teacher(vit)(images, rows, columns)
    assert plain.shape == (2, 24, rows, columns)
    # tokens are row-major: what is at the top right of the picture is at the top right of the map
    changed = images.clone()
    changed[:, :, :8, -8:] = 1
    difference = (DinoV2Teacher(vit)(changed, rows, columns) - plain).abs().sum(1)
    assert (difference[:, 0, -1] >= difference.flatten(1).amax(1)).all()


def test_one_file_is_one_network_and_runs_once_on_the_originals(maps_file):
    x, distance = torch.rand(2, 3, 8, 8), FeatureDistance(maps_file)
    teacher = ScriptTeacher(script_maps(maps_file), 1, x)
    assert distance.net is teacher.maps
    distance(x, x + 0.1)
    kept = distance.net.last[1]
    teacher(x, 4, 4)
    assert distance.net.last[1] is kept
    distance(x.clone(), x)  # another batch
    assert distance.net.last[1] is not kept


@pytest.mark.parametrize("make, settings, text", (
    (make_distance, dict(perceptual="required"),
     "--lpips-weights.*--perceptual-net.*--perceptual none"),
    (make_teacher, dict(align="required"), "--dinov2-weights.*--align-net.*--align none"),
    (make_distance, dict(perceptual="none", perceptual_net="maps.pt"), "without a use"),
    (make_distance, dict(lpips_weights="x", perceptual_net="maps.pt"), "not both"),
    (make_teacher, dict(align_net="maps.pt", align_map=5), "--align-map.*2 maps")))
def test_networks_are_asked_for_in_words(maps_file, tmp_path, monkeypatch, make, settings, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text):
        make(TokenizerTraining(**settings), torch.zeros(1, 3, 32, 32))


def test_networks_are_made_if_they_are_given(maps_file):
    x = torch.zeros(1, 3, 32, 32)
    for make in (make_distance, make_teacher):
        assert make(TokenizerTraining(), x) is None
    given = TokenizerTraining(perceptual_net=maps_file)
    assert isinstance(make_distance(given, x), FeatureDistance)


def test_pictures_too_small_for_vgg_are_an_error(files):
    cfg = TokenizerTraining(lpips_weights=f"{files}/vgg.pt,{files}/lin.pt")
    assert isinstance(make_distance(cfg, torch.zeros(1, 3, 16, 16)), Lpips)
    with pytest.raises(UserError, match="8x32"):
        make_distance(cfg, torch.zeros(1, 3, 8, 32))
