"""BAC: training-free reuse of sub-block outputs across sampling steps, from a calibrated schedule."""
