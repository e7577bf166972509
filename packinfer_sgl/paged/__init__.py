"""The FlashInfer-compatible wrappers: attention over page tables."""
