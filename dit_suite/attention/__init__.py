"""Sparse attention: block partitions, selection, block-sparse kernels behind one function, and the plug-in."""

from dit_suite.attention.adaspa import AdaSpaConfig, estimate_speedup
from dit_suite.attention.block_sparse import block_sparse_attention
from dit_suite.attention.plugin import apply_adaspa, apply_vmoba, supported
from dit_suite.attention.vmoba import VMoBAConfig, vmoba_attention

__all__ = [
    "AdaSpaConfig",
    "VMoBAConfig",
    "apply_adaspa",
    "apply_vmoba",
    "block_sparse_attention",
    "estimate_speedup",
    "supported",
    "vmoba_attention",
]
