"""Data sets: builders that write a folder, and readers that turn a folder into training batches."""
