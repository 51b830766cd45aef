"""The stage on an accelerator: pieces of large tensors are copied there, computed, copied back."""
