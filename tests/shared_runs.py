"""Share runs between processes, stop them and go on, with and without workers; say what was found.

    torchrun --nproc-per-node 2 tests/shared_runs.py FOLDER
    torchrun --nproc-per-node 2 tests/shared_runs.py FOLDER fail

``test_parallel.py`` runs it.
"""

import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from gradclip import parallel
from gradclip.experiments import image_classifier
from gradclip.experiments._shell import run_tasks
from gradclip.experiments.image_classifier import Cell

SMOKE = image_classifier.Config.profile("smoke")


CELLS = [Cell("momentum", True, math.inf), Cell("clipped", False, SMOKE.sharpness)]  # of twelve
STOP = SMOKE.steps + 2  # in the middle of the second training of each process


def wrong():
    """A task that fails."""
    raise ArithmeticError("this task fails")


def work(i):
    """What a task sees, of the five in all."""
    x = torch.ones(4, requires_grad=True)
    parallel.average_gradients([x])
    seen = [parallel.size(), parallel.rank(), len(parallel.own(x, 0)), len(parallel.gathered(i))]
    return {
        "task": i,
        "seen": [*seen, parallel.from_first(i) == i, bool(x._backward_hooks)],
        "pid": os.getpid(),
    }


def main(folder):
    folder = Path(folder)
    image_classifier.Config.cells = property(lambda config: CELLS)
    with parallel.joined("cpu"):
        step, original, done = image_classifier._Training.step, image_classifier.train, []

        def counted(self, iteration):
            if len(done) == STOP:
                raise KeyboardInterrupt
            done.append(iteration)
            return step(self, iteration)

        image_classifier.train = functools.partial(original, interval=0.0)
        image_classifier._Training.step = counted
        try:
            image_classifier.run(SMOKE, folder / "stopped")
            stopped = False
        except KeyboardInterrupt:
            stopped = True
        parallel.gathered(None)  # both have written
        [partial] = (folder / "stopped" / "image-classifier").iterdir()
        files = sorted(path.name for path in partial.iterdir())
        again = []
        image_classifier._Training.step = lambda self, k: again.append(k) or step(self, k)
        image_classifier.run(SMOKE, folder / "stopped")

        tasks = [functools.partial(work, i) for i in range(5)]
        options = {"identity": {}, "label": "tasks"}
        result = {
            "stopped": parallel.gathered(stopped),
            "files": files,
            "again": parallel.gathered(again),
            "pids": parallel.gathered(os.getpid()),
            "alone": run_tasks(tasks, checkpoint=folder / "alone.pt", **options)[0],
            "workers": run_tasks(tasks[:3], checkpoint=folder / "workers.pt", workers=2, **options)[0],
            "single": parallel.gathered(run_tasks(tasks[:1], checkpoint=folder / "single.pt", **options)[0]),
            "size": parallel.size(),
        }
        if parallel.rank() == 0:
            (folder / "result.json").write_text(json.dumps(result))


def fail(folder):
    """A worker of the second process fails at once; the other workers would work for minutes."""
    long = functools.partial(time.sleep, 200)
    with parallel.joined("cpu"):
        run_tasks(
            [long, wrong, long, long],
            checkpoint=Path(folder) / "tasks.pt",
            identity={},
            label="tasks",
            workers=1 if parallel.rank() == 0 else 2,
        )


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else fail(sys.argv[1])
