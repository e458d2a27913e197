"""What the parts of the benchmark share: how a figure is printed, and workers that have a core each."""

import os
import shutil
import statistics

from cluster import Workers


def row(name: str, values: list[float], target: float, at_most: bool = False) -> None:
    middle = statistics.median(values)
    reached = middle <= target if at_most else middle >= target
    wanted = f"{'<=' if at_most else '>='} {target:g}"
    print(f"{name:66} {middle:7.2f}  ({min(values):.2f} to {max(values):.2f}, {len(values)} rounds)  wanted {wanted:8} {'ok' if reached else 'MISSED'}", flush=True)


def core(number: int) -> list[str]:
    """What a command starts with that is to stay on one core, where that can be asked for."""
    return ["taskset", "-c", str(number % os.cpu_count())] if shutil.which("taskset") else []


class PinnedWorkers(Workers):
    """Workers with a core each, so that two of them have twice what one has."""

    def start(self, name, *args):
        return super().start(name, *args, prefix=core(int(name.removeprefix("worker"))) if name.startswith("worker") else [])
