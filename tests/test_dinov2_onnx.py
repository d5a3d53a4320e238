"""The ONNX reader: a small file written here by hand is read back whole; hostile bytes give a sentence, not a crash."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sidebench.cache.dinov2_onnx import SMALL, Architecture, _shapes, config, preprocessor, read_state_dict
from sidebench.cache.errors import SidebenchError
from sidebench.cache.home import home
from sidebench.cache.samples import fetch

TINY = Architecture(width=4, layers=2, heads=1, mlp_ratio=2, patch=2, image_size=6)
Array = NDArray[np.float32]


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _tensor(name: str, array: Array, *, packed: bool = False, kind: int = 1, raw: bytes | None = None) -> bytes:
    if packed:
        dims = _bytes(1, b"".join(map(_varint, array.shape)))
    else:
        dims = b"".join(_number(1, size) for size in array.shape)
    return _bytes(5, dims + _number(2, kind) + _bytes(8, name.encode()) + _bytes(9, raw or array.tobytes()))


def _node(kind: str, name: str, inputs: list[str]) -> bytes:
    return _bytes(
        1, b"".join(_bytes(1, i.encode()) for i in inputs) + _bytes(3, name.encode()) + _bytes(4, kind.encode())
    )


def _state(seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    shapes = _shapes(TINY) | {"embeddings.position_embeddings": (1, 10, 4)}
    return {key: generator.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def _onnx(state: dict[str, Array], **tensor_options: bool) -> bytes:
    """The file an exporter would write: Linear weights transposed and anonymous, the position table in two pieces."""
    positions = state["embeddings.position_embeddings"]
    graph = _tensor("onnx::Concat_1", positions[:, :1]) + _tensor("onnx::Reshape_2", positions[:, 1:])
    graph += _tensor("decoder.weight", positions[:, :1])  # of the same shape as the cls part, but not of the backbone
    # The attention itself is a MatMul too, of two activations.
    graph += _node("MatMul", "/backbone/encoder/layer.0/attention/attention/MatMul", ["a", "b"])
    for i, (key, array) in enumerate(state.items()):
        module = key.removesuffix(".weight")
        if key.startswith("encoder") and key.endswith(".weight") and array.ndim == 2:
            graph += _node(
                "MatMul", f"/backbone/{module.replace('.', '/').replace('layer/', 'layer.')}/MatMul", ["x", f"c{i}"]
            )
            graph += _tensor(f"c{i}", np.ascontiguousarray(array.T), **tensor_options)
        elif key != "embeddings.position_embeddings":
            graph += _tensor(f"backbone.{key}", array, **tensor_options)
    return _number(1, 7) + _bytes(2, b"test") + _bytes(7, graph) + _bytes(8, _number(2, 14))


@pytest.mark.parametrize("packed", [False, True])
def test_every_weight_comes_back_under_its_checkpoint_name(packed: bool) -> None:
    state = _state()
    found = read_state_dict(_onnx(state, packed=packed), TINY)
    assert set(found) == {*state, "embeddings.mask_token"}
    for key, array in state.items():
        np.testing.assert_array_equal(found[key], array)
    assert not found["embeddings.mask_token"].any()


def test_a_cut_file_is_refused_wherever_it_is_cut() -> None:
    whole = _onnx(_state())
    for end in range(0, len(whole) - 5, 97):
        with pytest.raises(SidebenchError):
            read_state_dict(whole[:end], TINY)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("encoder.layer.1.mlp.fc1.weight"), r"holds no 'encoder\.layer\.1\.mlp\.fc1\.weight'"),
        (lambda s: s.pop("layernorm.bias"), r"holds no 'layernorm\.bias'; it is not a DINOv2 of 2 layers"),
        (lambda s: s.update({"layernorm.bias": np.zeros(5, np.float32)}), r"has shape \(5,\); wanted \(4,\)"),
        (lambda s: s.update({"embeddings.position_embeddings": np.zeros((1, 9, 4), np.float32)}), "holds 0 unnamed"),
    ],
)
def test_a_file_of_another_model_is_refused(change: Callable[[dict[str, Array]], object], words: str) -> None:
    state = _state()
    change(state)
    with pytest.raises(SidebenchError, match=words):
        read_state_dict(_onnx(state), TINY)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (_tensor("backbone.layernorm.bias", np.zeros(4, np.float32), kind=10), "has data type 10"),
        (_tensor("backbone.layernorm.bias", np.zeros(4, np.float32), raw=b"12"), "has 2 bytes; wanted 16"),
        (_tensor("x", np.zeros((1,) * 9, np.float32)), "more than 8 axes"),
        (_tensor("x", np.zeros((1,) * 9, np.float32), packed=True), "more than 8 axes"),
        (_bytes(5, _bytes(8, b"\xff")), "not UTF-8"),
        (_number(5, 3), "a number stands where"),
        (_varint(5 << 3 | 3), "wire type 3"),
        (_varint(5 << 3 | 2) + _varint(1 << 60), "reaches past its end"),
        (b"\xff" * 11, "more than ten bytes"),
    ],
)
def test_a_damaged_field_is_refused_in_words(tensor: bytes, words: str) -> None:
    state = _state()
    state.pop("layernorm.bias")
    whole = _onnx(state)
    graph = whole[whole.index(b"test") + 4 :]
    with pytest.raises(SidebenchError, match=words):
        read_state_dict(_bytes(7, _inside(graph) + tensor), TINY)


def test_two_graphs_are_refused() -> None:
    with pytest.raises(SidebenchError, match="holds 2 graphs"):
        read_state_dict(_onnx(_state()) * 2, TINY)


def _inside(field: bytes) -> bytes:
    """Content of the length-delimited field that `field` begins with."""
    length = shift = 0
    for position, byte in enumerate(field[1:], start=1):
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return field[position + 1 : position + 1 + length]
    raise AssertionError


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_the_one_error(junk: bytes) -> None:
    with pytest.raises(SidebenchError):
        read_state_dict(junk, TINY)
    with pytest.raises(SidebenchError):
        read_state_dict(_bytes(7, junk), TINY)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_a_changed_byte_gives_an_answer_of_the_right_shapes_or_the_one_error(data: st.DataObject) -> None:
    whole = bytearray(_onnx(_state()))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    tracemalloc.start()
    try:
        found = read_state_dict(bytes(whole), TINY)
    except SidebenchError:
        pass
    else:
        assert {key: array.shape for key, array in found.items()} == {
            key: array.shape for key, array in _state().items()
        } | {"embeddings.mask_token": (1, 4)}
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4_000_000  # the file has 6 kB; its lengths and axes may claim anything


@pytest.mark.samples
def test_the_real_backbone_loads_with_no_missing_and_no_unexpected_key() -> None:
    from transformers import AutoImageProcessor, AutoModel

    folder = fetch("dinov2-small", home(), print)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_576
    assert type(model).__name__ == "Dinov2Model"
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.size["shortest_edge"] == 256
    assert processor.crop_size["height"] == 224


def test_the_written_config_says_what_the_weights_are() -> None:
    facts = config(SMALL)
    assert (facts["hidden_size"], facts["num_hidden_layers"], SMALL.patches) == (384, 12, 1369)
    assert preprocessor()["resample"] == 3
    assert len(_shapes(SMALL)) == 5 + 12 * 18


@pytest.mark.samples
def test_the_real_text_backbone_loads_with_no_missing_key() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder: Path = fetch("minilm-l6", home(), print)
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(folder)("two words")["input_ids"] == [101, 2048, 2616, 102]
