"""Multi-head attention whose four projections are modules of their own.

``nn.MultiheadAttention`` holds its input projections as one bare parameter and computes with
``out_proj.weight`` directly, so layering its submodules would change nothing. Unfused, it is the
same function with the same masks, and ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are
ordinary linear modules that can be layered.

Shapes: ``N`` batch, ``L`` target length, ``S`` source length, ``E`` embedding, ``H`` heads,
``D = E / H``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UnfusedAttention", "disable_fast_paths", "why_not_unfused"]


def why_not_unfused(attention: nn.MultiheadAttention) -> str | None:
    """The reason why ``attention`` stays as it is, or None."""
    if attention.bias_k is not None or attention.add_zero_attn:
        return "attention with add_bias_kv or add_zero_attn is not supported"
    if "forward" in vars(attention):
        return "its forward was replaced, and may compute with the weights themselves"
    return None


def disable_fast_paths(model: nn.Module) -> None:
    """Let torch's transformer modules call their submodules instead of reading their weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # what the fast path asks for first
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


class UnfusedAttention(nn.Module):
    """``nn.MultiheadAttention`` with projections that are modules; same arguments and results."""

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear

    @classmethod
    def from_float(cls, attention: nn.Module) -> "UnfusedAttention":
        """Turn ``attention``, an ``nn.MultiheadAttention``, into an unfused one in place."""
        assert isinstance(attention, nn.MultiheadAttention)
        fused, bias = attention.in_proj_weight, attention.in_proj_bias
        weights = (
            [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
            if fused is None
            else fused.chunk(3)
        )
        biases = [None] * 3 if bias is None else bias.chunk(3)
        projections = [_linear(w, b) for w, b in zip(weights, biases, strict=True)]
        out_proj: nn.Module = attention.out_proj
        out_proj.__class__ = nn.Linear  # torch's NonDynamicallyQuantizableLinear, same function
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            delattr(attention, name)
        attention.register_parameter("in_proj_bias", None)  # nn.TransformerEncoderLayer reads it
        unfused: nn.Module = attention
        unfused.__class__ = cls
        assert isinstance(unfused, cls)
        unfused.q_proj, unfused.k_proj, unfused.v_proj = projections
        return unfused

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention.forward``; ``is_causal`` is the hint that it is there."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        is_batched = query.dim() == 3
        batch_dim = 0 if self.batch_first or not is_batched else 1
        if not is_batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = (
            self._split(projection(x).movedim(batch_dim, 0))
            for projection, x in (
                (self.q_proj, query),
                (self.k_proj, key),
                (self.v_proj, value),
            )
        )
        mask = self._merged_mask(attn_mask, key_padding_mask, query.dtype)
        attended, weights = self._attend(q, k, v, mask, need_weights)
        # (N, H, L, D) -> (N, L, E)
        outputs: Tensor = self.out_proj(attended.transpose(1, 2).flatten(start_dim=2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return outputs[0], None if weights is None else weights[0]
        return outputs.movedim(0, batch_dim), weights

    def _split(self, projected: Tensor) -> Tensor:
        """``(N, L, E)`` to ``(N, H, L, D)``."""
        return torch.unflatten(projected, -1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
        return weights @ v, weights

    def _merged_mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks as one that is added to the scores and broadcasts to ``(N, H, L, S)``."""
        merged = None
        if attn_mask is not None:
            merged = _additive(attn_mask, dtype)
            if merged.dim() == 3:  # (N * H, L, S)
                merged = merged.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, dtype)[:, None, None, :]
            merged = padding if merged is None else merged + padding
        return merged

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True is left out) as what is added to scores; a float one as it is."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
