"""Schedulers that diffusers lacks, and the step context that every pipeline publishes."""
