"""Time one clipped step against torch's best way to clip and step, on three lists of parameters.

    python benchmarks/optim_step.py                    # about five minutes; writes the record to results/
    python benchmarks/optim_step.py --lists resnet20 --seconds 1 --out _build/records

torch's ways are ``clip_grad_norm_`` (foreach or not) followed by ``SGD`` (fused, foreach or plain); its best
is the one with the least median. All methods take turns in one process, in an order that changes from round
to round, so that what else the machine does hits all of them alike. A ratio is ours over torch's best within
a round; the table gives the median over rounds and the quartiles.

The floor is what the ratio would be if a step cost only the bytes that it must move: with momentum, reading
the gradient for the norm (4 bytes a number), then reading gradient, parameter and momentum and writing the
latter two (20); torch's clipping also reads and writes the gradient (8). That is 24 against 32, and without
momentum 16 against 24.

*Without numba* is the same step by torch's operations: the accurate norm, and torch's fused kernel with the
factor folded into it.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable

import numpy as np
import torch

from gradclip import norms, optim, records
from gradclip.models.lstm import LanguageModel
from gradclip.optim import ClippedSGD

NAME = "benchmark-optim-step"


def resnet20() -> list[tuple[int, ...]]:
    """Shapes of the CIFAR-10 ResNet-20 with parameter-free shortcuts."""
    shapes, inputs = [(16, 3, 3, 3), (16,), (16,)], 16
    for width in (16, 32, 64):
        for _ in range(3):
            shapes += [(width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            inputs = width
    return [*shapes, (10, 64), (10,)]


def lstm() -> list[tuple[int, ...]]:
    """Shapes of the language model of the 2020 paper's code: two layers, 200/512, 10,000 words."""
    return [tuple(p.shape) for p in LanguageModel(10_000).parameters()]


def gpt2() -> list[tuple[int, ...]]:
    """Shapes of GPT-2 small, 148 tensors with 124,439,808 numbers."""
    block = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *(12 * block), (768,), (768,)]


LISTS = {"resnet20": resnet20, "lstm": lstm, "gpt2": gpt2}
# Largest ratio that the project set itself before the first run, with and without momentum.
TARGETS = {"resnet20": (0.50, 0.50), "lstm": (0.60, 0.72), "gpt2": (0.80, 0.75)}
FLOORS = (24 / 32, 16 / 24)


def methods(params: list[torch.Tensor], momentum: float) -> dict[str, Callable[[], None]]:
    """Name to a function that takes one step; all share parameters and gradients."""
    lr = 1e-9  # so small that nothing drifts over thousands of steps
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in params]))).item()
    ours = [ClippedSGD(params, lr, max_norm=norm / 2, momentum=momentum) for _ in range(2)]
    steps = {"gradclip": ours[0].step, "without numba": without_numba(ours[1].step)}
    for kind in ("fused", "foreach", "plain"):
        options = {"fused": True} if kind == "fused" else {"foreach": kind == "foreach"}
        optimizer = torch.optim.SGD(params, lr, momentum=momentum, **options)
        for foreach in (True, False):

            def step(optimizer=optimizer, foreach=foreach):
                # A threshold that is not reached costs the same: torch multiplies by 1.
                torch.nn.utils.clip_grad_norm_(params, 2 * norm, foreach=foreach)
                optimizer.step()

            steps[f"clip {'foreach' if foreach else 'plain'}, sgd {kind}"] = step
    return steps


def without_numba(step: Callable[[], None]) -> Callable[[], None]:
    """The step as it is where numba is missing."""
    found = norms.compiled

    def wrapped() -> None:
        norms.compiled = optim.compiled = lambda: None
        try:
            step()
        finally:
            norms.compiled = optim.compiled = found

    return wrapped


def measure(shapes: list, momentum: float, seconds: float, device: str) -> dict[str, np.ndarray]:
    """Seconds of each method in each round."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = (0.02 * torch.randn(shape, generator=generator)).to(device).requires_grad_()
        p.grad = torch.randn(shape, generator=generator).to(device)
        params.append(p)
    steps, order = methods(params, momentum), random.Random(0)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _, step in itertools.product(range(2), steps.values()):
        step()
    times = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["gradclip"]) < 5:
        for name in order.sample(list(steps), len(steps)):
            wait()
            start = time.perf_counter()
            steps[name]()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: np.asarray(values) for name, values in times.items()}


def compare(times: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """torch's best method, and quartiles of the ratio of ours to it."""
    best = min((name for name in times if name.startswith("clip ")), key=lambda name: np.median(times[name]))
    return best, np.quantile(times["gradclip"] / times[best], [0.25, 0.5, 0.75])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row of the table")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", default="results", help="folder of the records")
    options = parser.parse_args()

    begin, before = time.monotonic(), torch.get_num_threads()
    here = records.provenance(options.device, data_sha256=None, wall_time=0.0)
    series = {key: [] for key in ("list", "threads", "momentum", "method", "rounds", "q25", "median", "q75")}
    scalars = {}
    print(f"{here['device_name']}, torch {here['torch']}; milliseconds are medians")
    print(
        f"{'list':9} {'momentum':>8} {'threads':>7} {'ours':>9} {'torch':>9}  ratio (quartiles)    "
        f"{'no numba':>8} {'floor':>5} {'target':>6}  torch's best"
    )
    for name, momentum, threads in itertools.product(options.lists, (0.9, 0.0), options.threads):
        torch.set_num_threads(threads)
        times = measure(LISTS[name](), momentum, options.seconds, options.device)
        best, (low, ratio, high) = compare(times)
        row = int(not momentum)
        for method, values in times.items():
            q25, median, q75 = np.quantile(values, [0.25, 0.5, 0.75])
            cells = (name, threads, momentum, method, len(values), q25, median, q75)
            for column, cell in zip(series.values(), cells, strict=True):
                column.append(cell)
        ours, theirs = (1e3 * float(np.median(times[method])) for method in ("gradclip", best))
        key = f"{name}.{'momentum' if momentum else 'plain'}.{threads}"
        scalars |= {
            f"{key}.ratio": float(ratio),
            f"{key}.ratio_low": float(low),
            f"{key}.ratio_high": float(high),
            f"{key}.ours_ms": ours,
            f"{key}.torch_ms": theirs,
            f"{key}.torch_best": best,
            f"{key}.without_numba": float(np.median(times["without numba"] / times[best])),
            f"{key}.floor": FLOORS[row],
            f"{key}.target": TARGETS[name][row],
            f"{key}.met": bool(ratio <= TARGETS[name][row]),
        }
        print(
            f"{name:9} {momentum:8} {threads:7} {ours:9.3f} {theirs:9.3f}  "
            f"{ratio:.3f} ({low:.3f}, {high:.3f})  {scalars[f'{key}.without_numba']:8.2f} "
            f"{FLOORS[row]:5.2f} {TARGETS[name][row]:6.2f}  {best}",
            flush=True,
        )
    torch.set_num_threads(before)
    made = {**here, "wall_time_s": time.monotonic() - begin}
    config = {key: value for key, value in vars(options).items() if key != "out"}
    record = records.Record(
        NAME, "cpu" if options.device == "cpu" else "paper", config, scalars, series, made
    )
    print(records.save(record, options.out))


if __name__ == "__main__":
    main()
