import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EPS = 2.0**-52


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes found, each on its own: see two_processes.py."""
    folder = tmp_path_factory.mktemp("store")
    script = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder / "store"), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out) for out, _ in outputs]


NAMES = ["plain", "momentum", "tensor", "unit", "mixed", "percentile", "z-score", "adamw"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_step_like_one(both, kind, name):
    for results in both:
        found = results[f"{kind} {name}"]
        # The mean over eight rows is taken in two halves, and norms over two shards: some twenty roundings a
        # step, of parameters below 1. AdamW divides by a root of squares, which triples them.
        assert found["difference"] <= 3 * 200 * EPS
        assert found["moved"] > 1e-3
        alone, together = found["norms"]
        assert together == pytest.approx(alone, rel=1e-12)


def test_a_nan_on_one_rank_is_skipped_by_both(both):
    for results in both:
        assert results["fsdp skip"] == {"skipped": 1, "finite": True}
