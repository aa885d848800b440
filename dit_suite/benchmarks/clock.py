"""Times of calls that run in turn, so that a busy machine slows all alike."""

import time
from collections.abc import Callable
from typing import Any

import torch


def interleaved(calls: list[Callable[[], Any]], rounds: int, device: str) -> list[list[tuple[float, float]]]:
    """(wall, CPU) seconds of every call in every round, after a warm-up; the order turns from round to round."""

    def timed(call: Callable[[], Any]) -> tuple[float, float]:
        if device != "cpu":
            torch.accelerator.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    times: list[list[tuple[float, float]]] = [[] for _ in calls]
    for call in calls:
        timed(call)
    for turn in range(rounds):
        for place in range(len(calls)):
            index = (place + turn) % len(calls)
            times[index].append(timed(calls[index]))
    return times
