"""Sparse attention: block partitions, selection, block-sparse kernels behind one function, and the plug-in."""

from dit_suite.attention.adaspa import AdaSpaConfig
from dit_suite.attention.block_sparse import block_sparse_attention
from dit_suite.attention.plugin import apply_adaspa, apply_vmoba, supported
from dit_suite.attention.vmoba import VMoBAConfig, vmoba_attention

__all__ = [
    "AdaSpaConfig",
    "VMoBAConfig",
    "apply_adaspa",
    "apply_vmoba",
    "block_sparse_attention",
    "supported",
    "vmoba_attention",
]
