"""Grafting: exchanging operators of a trained diffusion transformer and repairing it by distillation."""
