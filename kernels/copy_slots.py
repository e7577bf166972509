"""Copy the KV of some slots to consecutive slots, in all layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

WORD = 4  # bytes that a thread moves as one value; neighbours are joined to vectors of 16


class SlotCopier:
    """Copies between the slots of one pool on a GPU."""

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        """
        Args:
            buffers: keys and values of all layers, each [slots, kv_heads, head_dim] with equal strides, of any dtype,
                aligned to 16 bytes; a slot is in one piece of whole words.

        Raises:
            ValueError: the buffers are not as they must be.
        """
        first = buffers[0]
        self._slot_words, odd = divmod(first[0].nbytes, WORD)
        same = all((b.shape, b.stride(), b.dtype) == (first.shape, first.stride(), first.dtype) for b in buffers)
        if odd or not same or not first[0].is_contiguous():
            raise ValueError("the KV buffers differ in layout, or their slots are not whole words in one piece")
        self._stride_words = first.stride(0) * first.element_size() // WORD
        self._addresses = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64, device=first.device)
        self.copy(torch.zeros(1, dtype=torch.int32, device=first.device), 0)  # compiled now, not in a request

    def copy(self, slots: torch.Tensor, to: int) -> None:
        """Copy ``slots`` ([n] int32, on the device) to slots ``to`` to ``to + n - 1``, which are others."""
        grid = (triton.cdiv(len(slots), 16), len(self._addresses))
        copy_slots_kernel[grid](
            self._addresses, slots, to, len(slots), self._slot_words, self._stride_words, TOKENS=16, BLOCK=256
        )


@triton.jit(do_not_specialize=["to", "n"], do_not_specialize_on_alignment=["slots_ptr"])
def copy_slots_kernel(
    addresses_ptr, slots_ptr, to, n, slot_words, stride_words, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (i, b): TOKENS slots of buffer ``b``, word by word."""
    buffer = tl.load(addresses_ptr + tl.program_id(1)).to(tl.pointer_type(tl.int32))
    buffer = tl.multiple_of(buffer, 16)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < n
    source = tl.load(slots_ptr + token, mask=live, other=0).to(tl.int64) * stride_words
    target = (to + token).to(tl.int64) * stride_words
    for begin in tl.range(0, slot_words, BLOCK):
        word = begin + tl.arange(0, BLOCK)
        mask = live[:, None] & (word < slot_words)[None, :]
        kv = tl.load(buffer + source[:, None] + word[None, :], mask=mask)
        tl.store(buffer + target[:, None] + word[None, :], kv, mask=mask)
