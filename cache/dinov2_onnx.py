"""Read the DINOv2 backbone out of an ONNX file, without the onnx package: only the message fields needed.

An exported graph keeps the names of biases, norms and the patch projection (`backbone.<key>`), but folds each Linear
weight into an anonymous, transposed MatMul constant; the MatMul NODE still carries the module's path. The position
table is folded into two constants, for the cls token and for the patches. The mask token is unused, so absent.

Field numbers are those of onnx.proto: ModelProto.graph 7; GraphProto.node 1, initializer 5; NodeProto.input 1, name 3,
op_type 4; TensorProto.dims 1, data_type 2, name 8, raw_data 9.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import SidebenchError

Array = NDArray[np.float32]
_FLOAT32 = 1
_MAX_AXES = 8
_LINEAR_NODE = re.compile(r"/backbone/(encoder/layer\.\d+/[\w./]+)/MatMul", re.A)


@dataclass(frozen=True)
class Architecture:
    """The sizes of a DINOv2 backbone."""

    width: int = 384
    layers: int = 12
    heads: int = 6
    mlp_ratio: int = 4
    patch: int = 14
    image_size: int = 518

    @property
    def patches(self) -> int:
        """Number of patches in the position table."""
        return (self.image_size // self.patch) ** 2


SMALL = Architecture()


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    kind: int
    raw: memoryview


def config(architecture: Architecture) -> dict[str, object]:
    """Facts for config.json of a transformers folder."""
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "mlp_ratio": architecture.mlp_ratio,
        "patch_size": architecture.patch,
        "image_size": architecture.image_size,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layerscale_value": 1.0,
        "layer_norm_eps": 1e-6,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": False,
        "dtype": "float32",
    }


def preprocessor() -> dict[str, object]:
    """Facts for preprocessor_config.json: shortest edge 256 bicubic, centre crop 224, ImageNet mean and deviation."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def read_state_dict(onnx: bytes, architecture: Architecture = SMALL) -> dict[str, Array]:
    """Weights under the checkpoint names of transformers' Dinov2Model, which loads them whatever it calls them inside.

    Every array is checked against the shape the architecture asks for; most are views into `onnx`.
    """
    tensors, linear = _graph(memoryview(onnx))
    width, shapes = architecture.width, _shapes(architecture)
    anonymous = {name: tensor for name, tensor in tensors.items() if not name.startswith(("backbone.", "decoder."))}
    cls = _only_of_shape(anonymous, (1, 1, width))
    patches = _only_of_shape(anonymous, (1, architecture.patches, width))
    state: dict[str, Array] = {
        "embeddings.position_embeddings": np.concatenate([cls, patches], axis=1),  # (1, 1 + patches, D)
        "embeddings.mask_token": np.zeros((1, width), np.float32),
    }
    for key, shape in shapes.items():
        if key in linear:
            state[key] = _array(key, tensors[linear[key]], shape[::-1]).T  # (in, out) -> (out, in)
        elif f"backbone.{key}" in tensors:
            state[key] = _array(key, tensors[f"backbone.{key}"], shape)
        else:
            raise SidebenchError(f"the ONNX file holds no {key!r}; it is not a DINOv2 of {architecture.layers} layers.")
    return state


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Checkpoint name and shape of everything but the position table and the mask token."""
    width, hidden, patch = architecture.width, architecture.width * architecture.mlp_ratio, architecture.patch
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    linear = {f"attention.attention.{part}": (width, width) for part in ("query", "key", "value")}
    linear |= {"attention.output.dense": (width, width), "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for layer in range(architecture.layers):
        prefix = f"encoder.layer.{layer}."
        for name, (out, into) in linear.items():
            shapes |= {f"{prefix}{name}.weight": (out, into), f"{prefix}{name}.bias": (out,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{prefix}{norm}.weight": (width,), f"{prefix}{norm}.bias": (width,)}
        shapes |= {f"{prefix}layer_scale{half}.lambda1": (width,) for half in (1, 2)}
    return shapes


def _only_of_shape(tensors: dict[str, _Tensor], shape: tuple[int, ...]) -> Array:
    found = [name for name, tensor in tensors.items() if tensor.shape == shape]
    if len(found) != 1:
        raise SidebenchError(f"the ONNX file holds {len(found)} unnamed constants of shape {shape}; wanted one.")
    return _array(found[0], tensors[found[0]], shape)


def _array(name: str, tensor: _Tensor, shape: tuple[int, ...]) -> Array:
    if tensor.kind != _FLOAT32:
        raise SidebenchError(f"{name!r} in the ONNX file has data type {tensor.kind}; wanted {_FLOAT32} (float32).")
    if tensor.shape != shape:
        raise SidebenchError(f"{name!r} in the ONNX file has shape {tensor.shape}; wanted {shape}.")
    if len(tensor.raw) != 4 * math.prod(shape):
        raise SidebenchError(f"{name!r} in the ONNX file has {len(tensor.raw)} bytes; wanted {4 * math.prod(shape)}.")
    return np.frombuffer(tensor.raw, dtype="<f4").reshape(shape)


def _graph(model: memoryview) -> tuple[dict[str, _Tensor], dict[str, str]]:
    """Initializers by name, and for each Linear weight of the backbone the name of its initializer."""
    graphs = [value for number, value in _fields(model) if number == 7]
    if len(graphs) != 1:
        raise SidebenchError(f"the ONNX file holds {len(graphs)} graphs; wanted one.")
    tensors: dict[str, _Tensor] = {}
    nodes: list[tuple[str, str]] = []
    for number, value in _fields(_message(graphs[0])):
        if number == 5:
            name, tensor = _tensor(_message(value))
            tensors[name] = tensor
        elif number == 1:
            nodes += _linear_node(_message(value))
    return tensors, {key: constant for key, constant in nodes if constant in tensors}


def _linear_node(node: memoryview) -> list[tuple[str, str]]:
    """[(weight key, name of the second input)] of a MatMul whose path lies in the encoder, else []."""
    inputs: list[str] = []
    name = kind = ""
    for number, value in _fields(node):
        if number == 1:
            inputs.append(_text(value))
        elif number == 3:
            name = _text(value)
        elif number == 4:
            kind = _text(value)
    match = _LINEAR_NODE.fullmatch(name)
    if kind != "MatMul" or match is None or len(inputs) != 2:
        return []
    return [(match[1].replace("/", ".") + ".weight", inputs[1])]


def _tensor(message: memoryview) -> tuple[str, _Tensor]:
    shape: list[int] = []
    name, kind, raw = "", 0, memoryview(b"")
    for number, value in _fields(message):
        if number == 1:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = _message(value)
        if len(shape) > _MAX_AXES:
            raise SidebenchError(f"a tensor of the ONNX file has more than {_MAX_AXES} axes.")
    return name, _Tensor(tuple(shape), kind, raw)


def _packed(value: memoryview) -> list[int]:
    numbers: list[int] = []
    position = 0
    while position < len(value) and len(numbers) <= _MAX_AXES:
        number, position = _varint(value, position)
        numbers.append(number)
    return numbers


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise SidebenchError("the ONNX file is damaged: a number stands where a message should be.")
    return value


def _text(value: int | memoryview) -> str:
    try:
        return str(_message(value), "utf-8")
    except UnicodeDecodeError as error:
        raise SidebenchError("the ONNX file is damaged: a name in it is not UTF-8.") from error


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of one protobuf message; values are numbers or views, nothing is copied."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire = tag & 7
        if wire == 0:
            number, position = _varint(message, position)
            yield tag >> 3, number
            continue
        if wire == 2:
            length, position = _varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise SidebenchError(f"the ONNX file is damaged: wire type {wire} does not occur in it.")
        if length > len(message) - position:
            raise SidebenchError("the ONNX file is cut short: a field reaches past its end.")
        yield tag >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    number = 0
    for step in range(10):  # 64 bits in groups of seven
        if position >= len(message):
            raise SidebenchError("the ONNX file is cut short: a number reaches past its end.")
        byte = message[position]
        position += 1
        number |= (byte & 127) << (7 * step)
        if byte < 128:
            return number, position
    raise SidebenchError("the ONNX file is damaged: a number has more than ten bytes.")
