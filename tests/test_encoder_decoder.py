"""An encoder with its decoder, which decodes one step: names, ragged layers beside layers of one token, methods."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from outcomes import write_texts
from toys import ToyExamples, build_store, load

from sidebench.adapters._base import LiveMethod, trained
from sidebench.adapters._registry import find_method
from sidebench.bench.choice import refusal
from sidebench.bench.compare import compare
from sidebench.bench.outcome import Outcome, Request
from sidebench.bench.prepare import Inputs
from sidebench.cache.architecture import Architecture
from sidebench.cache.backbone import Backbone
from sidebench.cache.configs import config_backbone
from sidebench.cache.errors import SidebenchError
from sidebench.cache.form import Form
from sidebench.cache.load import load_backbone
from sidebench.cache.zarr_store import ZarrStore

ENCODER = ("embeddings", "blocks.0", "blocks.1", "blocks.2", "encoder_norm")
DECODER = ("decoder.embeddings", "decoder.blocks.0", "decoder.blocks.1", "norm")


def test_both_stacks_have_names(tiny_t5: Backbone) -> None:
    arch = tiny_t5.arch
    assert tiny_t5.layers == (*ENCODER, *DECODER)
    assert (arch.blocks, arch.decoder_blocks, arch.final_layer) == (3, 2, "norm")
    assert arch.states == ENCODER[:4]
    assert arch.decoder_states == DECODER[:3]
    assert tiny_t5.block_paths == [*(f"encoder.block.{i}" for i in range(3)), *(f"decoder.block.{i}" for i in range(2))]
    assert len(tiny_t5.encoder_blocks) == 3


def test_the_layers_are_those_of_transformers(tiny_t5: Backbone) -> None:
    """Its last hidden states are behind the final norms."""
    ids, mask = torch.tensor([[5, 6, 7, 3], [8, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)}
    with torch.no_grad():
        out = copy.deepcopy(tiny_t5.module)(**inputs, output_hidden_states=True, use_cache=False)
    found = tiny_t5.capture(inputs, tiny_t5.layers)
    for i, layer in enumerate(("embeddings", "blocks.0", "blocks.1")):
        assert torch.equal(found[layer], out.encoder_hidden_states[i])
    assert torch.equal(found["encoder_norm"], out.encoder_last_hidden_state)
    for i, layer in enumerate(("decoder.embeddings", "decoder.blocks.0")):
        assert torch.equal(found[layer], out.decoder_hidden_states[i])
    assert torch.equal(found["norm"], out.last_hidden_state)


def test_a_store_keeps_the_decoders_one_token_beside_texts_of_any_length(
    tiny_t5: Backbone, text_examples: ToyExamples, tmp_path: Path
) -> None:
    store = ZarrStore(build_store(tiny_t5, text_examples, tmp_path, dtype="float32").folder)
    assert store.architecture == tiny_t5.arch
    shapes = {spec.layer: spec.tokens for spec in store.manifest.specs}
    assert shapes == {**dict.fromkeys(ENCODER), **dict.fromkeys(DECODER, 1)}
    index = np.array([3, 0, 17])
    read = store.read(index, store.layers)
    inputs, mask = tiny_t5.preprocess.collate(tiny_t5.preprocess.prepare([text_examples.raw[i] for i in index]))
    live = tiny_t5.capture(inputs, store.layers)
    assert mask is not None
    assert not mask.all()
    assert torch.equal(read.mask, torch.ones(3, 1, dtype=torch.bool))
    for layer in ENCODER:
        assert torch.equal(read.mask_of(layer), mask)
        torch.testing.assert_close(read.layers[layer], live[layer] * mask[..., None], atol=1e-5, rtol=1e-5)
    for layer in DECODER:
        assert read.mask_of(layer).all()
        torch.testing.assert_close(read.layers[layer], live[layer], atol=1e-5, rtol=1e-5)


def test_a_network_of_one_stack_keeps_the_digest_it_had(
    tiny_bert: Backbone, tiny_t5: Backbone, text_examples: ToyExamples, tmp_path: Path
) -> None:
    """Facts that came later are said only where there are any."""
    first = {"name", "modality", "blocks", "width", "prefix_tokens", "final_layer", "heads", "mlp_width", "norm"}
    first |= {"activation", "norm_eps", "layer_scale", "causal"}
    later = {field.name for field in dataclasses.fields(Architecture)} - first
    for backbone, said in ((tiny_bert, set()), (tiny_t5, {"decoder_blocks", "t5_blocks", "biasless"})):
        store = ZarrStore(build_store(backbone, text_examples, tmp_path / backbone.arch.name).folder)
        assert later & set(store.manifest.facts()["architecture"]) == said
        assert store.architecture == backbone.arch


def test_lora_enters_self_and_cross_attention_of_both_stacks(tiny_t5: Backbone) -> None:
    method = find_method("lora").configured({"rank": "2"})
    assert isinstance(method, LiveMethod)
    names = {name.split(".lora_")[0] for name in trained(method.network(copy.deepcopy(tiny_t5)))}
    assert len(names) == 2 * (3 + 2 + 2)  # query and value: encoder, decoder, and what the decoder reads of the encoder
    assert {name.split(".")[1] for name in names} == {"encoder", "decoder"}


ONE_STACK = ("lora@last1", "partial", "dtl", "sherl", "vqt", "head2toe")
ONE_STACK += ("houlsby", "pfeiffer", "adaptformer", "prefix_tuning", "ssf", "vpt")


@pytest.mark.parametrize("name", ONE_STACK)
def test_a_method_made_for_one_stack_says_so(tiny_t5: Backbone, name: str) -> None:
    said = refusal(find_method(name).configured({}), tiny_t5.arch, Form())
    assert "it is made for one stack of blocks, T5Model has two" in str(said)


@pytest.mark.parametrize("name", ["bitfit", "bitfit@last1"])
def test_bitfit_is_refused_before_anything_runs(models: Path, tiny_t5: Backbone, name: str) -> None:
    for backbone in (tiny_t5, load(models / "t5"), config_backbone("t5-base")):
        assert backbone.arch.biasless
        assert refusal(find_method(name).configured({}), backbone.arch, Form()) is not None
    assert "depends on no bias" in str(refusal(find_method("bitfit").configured({}), tiny_t5.arch, Form()))


@pytest.fixture(scope="module")
def compared(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("t5")
    write_texts(folder / "reviews.jsonl", 60)
    inputs = Inputs(f"hf:{models / 't5'}?tower=both", f"jsonl:{folder / 'reviews.jsonl'}", device="cpu")
    request = Request(inputs, ("linear_probe", "unipt", "lst", "lora", "full"), {}, seeds=(0,), epochs=1)
    return compare(request, home=folder, cache_dir=folder / "caches", runs_dir=folder / "runs")


@pytest.mark.parametrize("name", ["linear_probe", "unipt", "lst", "lora", "full"])
def test_methods_run_on_both_stacks_and_are_predicted_to_the_byte(compared: Outcome, name: str) -> None:
    (record,) = compared.records[name]
    assert record.error is None
    assert record.measured is not None
    if name != "linear_probe":
        assert record.measured["predicted_peak_bytes"] == record.measured["peak_tracked_bytes"]


def test_the_encoder_alone_is_what_it_was(models: Path, tmp_path: Path) -> None:
    alone = load(models / "t5")
    assert alone.layers == (*ENCODER[:4], "norm")
    assert alone.arch.decoder_blocks == 0
    named = load_backbone(f"hf:{models / 't5'}?tower=encoder", home=tmp_path, device=torch.device("cpu"))
    assert named.arch == alone.arch


def test_a_tower_that_is_not_there_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(SidebenchError, match="it has encoder and both, and no tower 'decoder'"):
        load_backbone(f"hf:{models / 't5'}?tower=decoder", home=tmp_path, device=torch.device("cpu"))
    with pytest.raises(SidebenchError, match="it is one network, and no tower 'both'"):
        load_backbone(f"hf:{models / 'bert'}?tower=both", home=tmp_path, device=torch.device("cpu"))


def test_an_architecture_without_weights_has_both_stacks_too() -> None:
    arch = config_backbone("t5-base", tower="both").arch
    assert (arch.blocks, arch.decoder_blocks) == (12, 12)
