"""Evaluation: from samples (a folder, an npz, or a pipeline) to distances, intervals and a verdict.

`sources` reads samples, `extractors` turns them into features, `statistics` adds those up and keeps them in files,
`distances` holds the metrics as pure functions, `resampling` the intervals and verdicts, `runner` puts them together.
"""
