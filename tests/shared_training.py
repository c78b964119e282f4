"""Train on two processes, once in one go and once stopped and resumed; say whether the records are the same.

    torchrun --nproc-per-node 2 tests/shared_training.py FOLDER

``test_parallel.py`` runs it.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import torch

from gradclip import parallel
from gradclip.data import text
from gradclip.experiments import language_model
from gradclip.experiments._shell import numerical_settings

SMOKE = language_model.Config.profile("smoke")
CONFIG = dataclasses.replace(SMOKE, settings=(SMOKE.settings[0], SMOKE.settings[-1]), seeds=(0,))
STOP = SMOKE.steps + 7  # in the second run, which has masks and a validation behind it


def main(folder):
    folder = Path(folder)
    with parallel.joined("cpu"):
        first = parallel.rank() == 0
        whole = language_model.run(CONFIG, folder / "whole")

        original, step = language_model.train, language_model._Training.step
        done = []

        def counted(self, iteration):
            if len(done) == STOP:
                raise KeyboardInterrupt
            done.append(iteration)
            return step(self, iteration)

        language_model.train = functools.partial(original, interval=0.0)
        language_model._Training.step = counted
        try:
            language_model.run(CONFIG, folder / "stopped")
            stopped = False
        except KeyboardInterrupt:
            stopped = True
        language_model._Training.step = step
        [partial] = (folder / "stopped" / "language-model").iterdir()
        files = sorted(path.name for path in partial.iterdir())
        done.clear()
        language_model._Training.step = lambda self, k: done.append(k) or step(self, k)
        again = language_model.run(CONFIG, folder / "stopped")
        language_model._Training.step, language_model.train = step, original

        # The state of a run is that of the whole batch: one process reads what two have written.
        with numerical_settings(1):
            training = language_model._Training(CONFIG, text.reference_manual(), CONFIG.settings[0], 0)
            for k in range(3):
                training.step(k)
        state = training.state_dict()
        if first:
            torch.save(state, folder / "state.pt")
            result = {
                "stopped": stopped,
                "files": files,
                "resumed_from": done[0],
                "same": all(whole.series[k].tobytes() == again.series[k].tobytes() for k in whole.series),
                "streams": [part.shape[1] for pair in state["probed"]["carried"] for part in pair],
            }
            (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
