"""Give tensors on the CPU what CUDA would do to memory: attention kernels, dropout masks, autocast's list, AdamW.

Fake tensors on a CUDA device need a CUDA build. So the step runs on fake CPU tensors, and what CUDA does otherwise is
put in here, one level above the operations. Nothing in this file has a value in mind: only which tensors are born and
which are saved for backward. Calls inside torch's own Python functions are not seen, so `nn.MultiheadAttention` keeps
the CPU's kernels; transformers' models call the functions that are.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..cache.errors import SidebenchError, unknown

Attention = Literal["auto", "efficient", "flash", "math"]
_ALIGNMENT = 8  # elements: the memory-efficient kernel wants its bias so, flash its head width

# torch/include/ATen/autocast_mode.h, AT_FORALL_FP32: inputs of lower precision are cast to float32 first.
_FP32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ softplus
    layer_norm native_layer_norm rms_norm group_norm frobenius_norm nuclear_norm norm renorm logsumexp interpolate
    cosine_similarity dist pdist cdist poisson_nll_loss cosine_embedding_loss nll_loss hinge_embedding_loss kl_div
    l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits
"""
# AT_FORALL_FP32_SET_OPT_DTYPE: computed and returned in float32 unless the call names a dtype.
_FP32_RESULT = "prod softmax log_softmax cumprod cumsum sum"
# AT_FORALL_LOWER_PRECISION_FP, without what the CPU's autocast lowers as well.
_LOWERED = "einsum mv addmv addr prelu chain_matmul"
_LOWER = (torch.bfloat16, torch.float16)


class CudaSemantics(TorchFunctionMode):
    """A context in which CPU operations make and save what CUDA's would.

    `attention` "auto": what PyTorch prefers there, flash for bfloat16 without a mask, else the memory-efficient kernel.
    Raises SidebenchError for an unknown kernel, and where flash is asked for what it cannot do.
    """

    def __init__(self, attention: str = "auto") -> None:
        super().__init__()
        if attention not in get_args(Attention):
            raise unknown("attention kernel", attention, get_args(Attention))
        self._attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace the calls that differ; all others pass."""
        given = dict(kwargs or {})
        if func is Tensor.backward and not any(given.values()):
            with self:  # a call suspends the mode, and backward may run forward again (checkpoints)
                return _backward(*args)
        if func is functional.scaled_dot_product_attention:
            return _attend(self._attention, *args, **given)
        if func is functional.dropout:
            return _dropout(*args, **given)
        if torch.is_autocast_enabled("cpu"):
            if func in _CAST_UP:
                return func(*_cast(args, torch.float32), **_cast(given, torch.float32))
            if func in _FLOAT_RESULT and "dtype" not in given and args and _is_lower(args[0]):
                return func(*args, **given, dtype=torch.float32)
            if func in _CAST_DOWN:
                lower = torch.get_autocast_dtype("cpu")
                return func(*_cast(args, lower), **_cast(given, lower))
        return func(*args, **given)


def use_foreach(optimizer: torch.optim.Optimizer) -> None:
    """Step all parameters at once, as torch's optimisers do by default on CUDA and not on a CPU: it takes memory."""
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = True


def _named(names: str) -> frozenset[Callable[..., Any]]:
    places = (torch, torch.Tensor, functional, torch._C._nn)
    found = (getattr(place, name, None) for place in places for name in names.split())
    return frozenset(f for f in found if f is not None)


_CAST_UP, _FLOAT_RESULT, _CAST_DOWN = _named(_FP32), _named(_FP32_RESULT), _named(_LOWERED)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """The same arguments with every floating tensor in `dtype`, lists of tensors included; float64 is left alone."""
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() and values.dtype is not torch.float64 else values
    if isinstance(values, tuple | list):
        return type(values)(_cast(value, dtype) for value in values) if type(values) in (tuple, list) else values
    return {key: _cast(value, dtype) for key, value in values.items()} if isinstance(values, dict) else values


def _is_lower(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _LOWER


def _backward(loss: Tensor) -> Any:
    """What `loss.backward()` comes down to, below the check for modes."""
    ones = torch.ones_like(loss)
    return _engine_run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's fused kernel saves a mask of one byte per element; the CPU's path saves floats."""
    if not training or p == 0:
        return functional.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attend(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What aten/src/ATen/native/transformers/attention.cpp does on a CUDA device once a kernel is chosen."""
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
        query, key, value = (_cast(t, lower) for t in (query, key, value))
        attn_mask = attn_mask.to(lower) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if kernel == "auto":
        kernel = "flash" if query.dtype in _LOWER and attn_mask is None else "efficient"
    mask = attn_mask
    if kernel == "math":
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout_p, is_causal, scale=scale
        )[0]
    if mask is not None and mask.dtype is torch.bool:  # convert_boolean_attn_mask: a float mask in the query's dtype
        mask = torch.where(mask, 0.0, torch.scalar_tensor(float("-inf"), dtype=query.dtype))
    if kernel == "flash":
        return _flash(query, key, value, attn_mask, dropout_p, is_causal, scale)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    bias = None if mask is None else _aligned(mask).expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
    )[0]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None
) -> Tensor:
    if mask is not None or query.dtype not in _LOWER:
        found = "an attention mask (padded text)" if mask is not None else str(query.dtype).removeprefix("torch.")
        raise SidebenchError(
            f"the flash kernel takes bfloat16 without a mask; found {found}. Use --attention efficient, or "
            "--precision bf16 on images."
        )
    width = query.shape[-1]
    if short := -width % _ALIGNMENT:
        query, key, value = (functional.pad(t, (0, short)) for t in (query, key, value))
        scale = width**-0.5 if scale is None else scale
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, p, causal, False, scale=scale)[0]
    return out[..., :width]


def _aligned(mask: Tensor) -> Tensor:
    """The mask with rows padded to a multiple of 8 where they are not (preprocess_mask, pad_bias)."""
    short = -mask.shape[-1] % _ALIGNMENT
    return functional.pad(mask, (0, short))[..., : mask.shape[-1]] if short else mask
