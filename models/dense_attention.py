"""Dense causal attention over whole sequences, without a cache: what a decoder trains with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from edgekit.models.decoder_attention import LayerAttention


class DenseAttention:
    """The attention of all layers for one forward pass; layers of one window share their mask.

    Padding on the right needs no mask: no valid token sees it.

    Args:
        layers: what each layer's attention does.
        count: N, tokens per row.
        position_ids: int64 `[B, N]` or `[1, N]`, in which windows count; None for 0..N-1.
        device: of the masks.
    """

    def __init__(
        self, layers: Sequence[LayerAttention], count: int, position_ids: torch.Tensor | None, device: torch.device
    ) -> None:
        self.layers, self.count, self.position_ids, self.device = layers, count, position_ids, device
        self._masks: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q `[B, Hq, N, D]`, k and v `[B, Hkv, N, D]` to `[B, Hq, N, D]`."""
        attention = self.layers[layer]
        if attention.softcap:
            return self._capped(attention, q, k, v)
        mask = self._mask(attention.window) if self._slides(attention.window) else None
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=attention.scale, enable_gqa=grouped
        )

    def _capped(self, attention: LayerAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Query heads of one key head one below the other, so that keys are not repeated.
        groups, count = q.shape[1] // k.shape[1], q.shape[2]
        stacked = torch.unflatten(q * attention.scale, 1, (-1, groups)).flatten(2, 3)
        scores = attention.softcap * torch.tanh(stacked @ k.transpose(-1, -2) / attention.softcap)
        window = attention.window if self._slides(attention.window) else 0
        hidden = ~self._mask(window).unsqueeze(1)
        weights = torch.unflatten(scores, 2, (groups, count)).masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.unflatten(weights.flatten(2, 3) @ v, 2, (groups, count)).flatten(1, 2)

    def _slides(self, window: int) -> bool:
        """Whether the window may hide anything. In an exported program N is not known, and it always may."""
        return window > 0 and (torch.compiler.is_exporting() or self.position_ids is not None or self.count > window)

    def _mask(self, window: int) -> torch.Tensor:
        """bool `[B or 1, 1, N, N]`: which key a query sees."""
        if window not in self._masks:
            slots = torch.arange(self.count, device=self.device)
            seen = (slots.unsqueeze(1) >= slots).unsqueeze(0)
            if window:
                positions = slots.unsqueeze(0) if self.position_ids is None else self.position_ids
                seen = seen & (positions.unsqueeze(2) - positions.unsqueeze(1) < window)
            self._masks[window] = seen.unsqueeze(1)
        return self._masks[window]
