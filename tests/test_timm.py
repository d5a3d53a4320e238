"""timm's networks as backbones. timm needs torchvision, which does not import beside the CPU torch of constraints.txt,
so these tests run in an environment of their own (Python 3.11, x86-64, 6 GB):

    python -m venv .timm
    .timm/bin/pip install torch==2.14.1 torchvision==0.29.1
    .timm/bin/pip install --editable '.[dev,timm]'
    .timm/bin/pytest -m timm tests/test_timm.py
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import save_file

from sidebench.adapters.unipt import UniPT
from sidebench.bench.learner import CachedSource, Learner
from sidebench.cache.backbone import Backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cache.load import load_backbone
from sidebench.cache.zarr_store import ZarrStore

SIDE = 64


@pytest.fixture(scope="module")
def timm() -> Any:
    try:
        import timm
    except Exception as error:  # no timm, or a torchvision of another torch
        pytest.skip(f"timm does not import: {error}")
    return timm


def load(timm: Any, name: str, folder: Path, **options: Any) -> Backbone:
    """The network with random weights out of a file, as a machine without a hub would load it."""
    torch.manual_seed(0)
    weights = timm.create_model(name, pretrained=False, **options).state_dict()
    save_file(weights, folder / "weights.safetensors")
    uri = f"timm:{name}?checkpoint={folder / 'weights.safetensors'}"
    return load_backbone(uri, home=folder, device=torch.device("cpu"), image_size=SIDE)


@pytest.mark.timm
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "convnext_atto", "mobilenetv3_small_050"])
def test_the_stages_are_the_maps_that_timm_calls_features(timm: Any, name: str, tmp_path: Path) -> None:
    backbone = load(timm, name, tmp_path)
    theirs = timm.create_model(name, pretrained=False, features_only=True).eval()
    wanted = theirs(torch.zeros(1, 3, SIDE, SIDE))
    assert list(backbone.arch.stages) == [tuple(m.shape[2:]) for m in wanted]
    assert [width for _, width in backbone.shapes(backbone.layers).values()] == [m.shape[1] for m in wanted]
    pixels = torch.randn(2, 3, SIDE, SIDE)
    name_of_input = next(iter(backbone.dummy()))
    read = backbone.capture({name_of_input: pixels}, backbone.layers)
    plain = timm.create_model(name, pretrained=False, features_only=True).eval()
    state = backbone.module.state_dict()
    if set(plain.state_dict()) <= set(state):  # where features_only keeps the names
        plain.load_state_dict({key: state[key] for key in plain.state_dict()})
        for (layer, tokens), found in zip(read.items(), plain(pixels), strict=True):
            torch.testing.assert_close(tokens, found.flatten(2).mT, msg=layer)


@pytest.mark.timm
def test_unipt_trains_on_a_cache_of_a_timm_network(timm: Any, tmp_path: Path) -> None:
    backbone = load(timm, "resnet18", tmp_path)
    built = toys.build_store(backbone, toys.make_images(12, side=SIDE), tmp_path / "caches")
    store = ZarrStore(built.folder)
    method = UniPT()
    assert method.refusal(store.architecture) is None
    layers = method.layers(store.architecture)
    widths = {spec.layer: spec.width for spec in store.manifest.specs}
    learner = Learner(method.build(store.architecture, widths, lambda: pytest.fail("no weights")), 2, "mean", 0)
    source = CachedSource(store, layers, torch.device("cpu"), store.lengths())
    (batch,) = source.batches([torch.arange(12).numpy()])
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    targets, losses = torch.from_numpy(store.targets), []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(learner(batch), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.timm
def test_a_vit_of_timm_has_blocks_and_a_norm(timm: Any, tmp_path: Path) -> None:
    backbone = load(timm, "vit_tiny_patch16_224", tmp_path, img_size=SIDE)
    assert backbone.layers == ("embeddings", *(f"blocks.{i}" for i in range(12)), "norm")
    assert (backbone.arch.stages, backbone.arch.prefix_tokens, backbone.arch.width) == ((), 1, 192)


@pytest.mark.timm
@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("timm:resnet81", "no timm model 'resnet81'. Did you mean"),
        ("timm:resnet18?checkpoint=nowhere.pth", "cannot load timm:resnet18: "),
        ("timm:resnet18", "Without a hub, give the weights as a file: timm:resnet18?checkpoint=FILE"),
    ],
)
def test_what_timm_cannot_load_is_a_sentence(timm: Any, uri: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SidebenchError) as caught:
        load_backbone(uri, home=tmp_path, device=torch.device("cpu"))
    assert said in str(caught.value)


@pytest.mark.timm
def test_maps_with_channels_last_are_refused(timm: Any, tmp_path: Path) -> None:
    with pytest.raises(SidebenchError, match="channels last"):
        load(timm, "swin_tiny_patch4_window7_224", tmp_path, img_size=SIDE)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SidebenchError, match=r"need the extra sidebench\[timm\] and a torchvision made for this torch"):
        load_backbone("timm:resnet18", home=tmp_path, device=torch.device("cpu"))
