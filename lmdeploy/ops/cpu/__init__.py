"""Fast CPU implementations; importing this package registers them in the op table."""

from lmdeploy.ops.cpu import activation, hadamard, logits, norm, paged_attention, sample, write_kv

__all__ = ['activation', 'hadamard', 'logits', 'norm', 'paged_attention', 'sample', 'write_kv']
