"""Smoothness estimators against their peers: products, time in gradients, error, memory.

    python benchmarks/smoothness.py [--out results] [--threads 2] [--quick]

Times are multiples of the time of one gradient (forward and backward pass in training mode, with the kernels
that training uses), measured directly before and after what they divide: only ratios mean something on a
machine that does other work as well. Methods take turns in random order, in several rounds.

**A. Spectral norm of the Hessian, to 1 %.** Two models, ``resnet`` (ResNet-20, 64 images of 32x32) and
``lstm`` (the language model of the experiments, embedding 200, hidden 512, 10 streams of 35 words), each at
three points of training: other seeds, 12, 24 and 48 steps. The images are synthetic, smooth class patterns
that are shifted, mixed and noisy; the text is the Penn Treebank if ``GRADCLIP_DATA_DIR`` is set, and the
Python reference manual otherwise. ``config`` says which.

==========================  ==================================================================================
METHOD                      what is run
==========================  ==================================================================================
``ours``                    ``hessian_norm`` with its default tolerance, 1e-2
``ours_confident``          the same with ``confidence=0.95``
``pyhessian``               power iteration, stops when two estimates differ by less than 1e-2
``pyhessian_tight``         the same with 1e-3, its default
``eigenthings``             Lanczos of hessian-eigenthings, k=1 and all defaults: two products
``eigenthings_k10``         the same with k=10, its default: 20 products
``eigenthings_told``        k=1, with the fewest steps that reach 1 %, which were found by trying
``curvlinops``              ``eigsh(HessianLinearOperator, k=1, which="LM", tol=1e-2)``
``curvlinops_small``        the same with ncv=6, so that it looks at the result after 6 products, not 20
``floor``                   plain Lanczos on a retained graph from a random start, told the reference: it ends
                            as soon as its error is below 1 %, which no real method can know
==========================  ==================================================================================

All have the same loss, data, dtype (float32), number of threads, and start from other random vectors in every
round. The peers get a copy of the model whose batch norm has no running statistics: it uses those of the
batch even in evaluation mode, which PyHessian switches on, and can be called by torch.func. The fused kernels
of the LSTM are off for all, as they have no second derivative. The reference is ``eigsh`` on products in
float64 by double backward of torch itself, with the residual below 1e-3: far less in the value.

**B. Path estimator**, with the LSTM and its update (lr 30, norm clipped at 0.25), against the scheme of the
released code of Zhang et al. (2020): the summed gradient over the first tenth of the text, cut into segments
of random lengths around 70 drawn anew at each call, at the old weights and at the midpoint, with deep copies
of the model. It is written here from its description, with 4 streams instead of 256 and without the penalties
on activations (alpha, beta), which makes it a little cheaper. ``path_smoothness`` measures on one training
batch, 4 streams of 70 words.

Scalars, with MODEL ``resnet`` or ``lstm``; times and products are medians over points and rounds:

========================================  ====================================================================
key                                       meaning
========================================  ====================================================================
``MODEL.METHOD.gradients``                time, in gradients; behind it ``_low`` and ``_high``: the quartiles
``MODEL.METHOD.hvps``                     Hessian-vector products; ``hvps_most``: the largest number
``MODEL.METHOD.error``                    worst relative error of the norm over points and rounds
``MODEL.METHOD.converged``                share of the runs that claim to have converged
``MODEL.METHOD.memory_mb``                peak of the resident memory during the run over that before, once
                                          freed memory has gone back to the system, MB; NaN if not on Linux
``MODEL.METHOD.runs``                     number of runs: one per point and round, one per point if that took
                                          over 60 gradients; ``eigenthings_k10`` and ``curvlinops``, slow and
                                          right to many digits, run once, at the first point
``MODEL.gradient.gradients``              time of one gradient in gradients: 1, and how noisy the machine is
``MODEL.gradient.memory_mb``              its memory
``MODEL.gradient_plain.gradients``        time of a gradient of the peers' copy: without fused LSTM kernels
``MODEL.parameters``                      number of parameters
``path.ours.gradients``                   time of ``path_smoothness`` with one fraction and the gradient given
``path.ours_five.gradients``              the same with five fractions
``path.ours.gradients_per_fraction``      that divided by five
``path.ours_resnet.gradients``, ...       the same three for the ResNet
``path.ours.deviation_1``, ``_01``,       largest |L(a)/s - 1| over the points for a = 1, 0.1, 0.01, 0.001,
``_001``, ``_0001``                       where s is ``directional_smoothness``
``path.authors.gradients``                time of one measured point in gradients of a batch
``path.authors.segments``                 segments per evaluation, mean
``path.authors.floor_1``, ``_01``,        what two calls at the same weights differ by, as a share of the
``_001``, ``_0001``                       estimate (with equal segments) for a step shortened to the fraction
                                          1, 0.1, 0.01, 0.001 of the update: median over points and pairs
``path.authors.floor_most_1``, ...        its largest value
========================================  ====================================================================

Series: one row per (model, seed, steps, round, method) with ``gradients``, ``hvps``, ``value``,
``reference``, ``error`` (signed), ``converged`` and ``memory_mb``. Part B's rows have the model ``path``, and
NaN where a column does not apply.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import gc
import importlib.metadata
import math
import os
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from curvlinops import HessianLinearOperator
from hessian_eigenthings import HessianOperator, lanczos, supervised_loss
from pyhessian import hessian as PyHessian
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from gradclip import records, total_norm
from gradclip.data import text
from gradclip.models.lstm import LanguageModel
from gradclip.models.resnet import ResNet
from gradclip.optim import ClippedSGD
from gradclip.smoothness import directional_smoothness, hessian_norm, path_smoothness

PEERS = ("PyHessian", "hessian-eigenthings", "curvlinops-for-pytorch", "scipy")
TOLERANCE = 1e-2
STEPS = (12, 24, 48)
SLOW = 60  # gradients
ONCE = ("eigenthings_k10", "curvlinops", "curvlinops_small")
LR, MAX_NORM = 30.0, 0.25
STREAMS, BPTT, ROWS = 4, 70, 3631  # as many rows as the Penn Treebank has in 256 streams
SCALES = {"1": 1.0, "01": 0.1, "001": 0.01, "0001": 0.001}
CALLS = 6


class Words(nn.Module):
    """The language model as a network from words (time, batch) to one row of logits per word."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.fused = True

    def forward(self, words: Tensor) -> Tensor:
        with contextlib.nullcontext() if self.fused else torch.backends.mkldnn.flags(enabled=False):
            return self.model(words, self.model.initial_state(words.shape[1]))[0].flatten(0, 1)


@dataclasses.dataclass(eq=False)
class Point:
    """A trained network and a batch: the objective is the mean cross entropy of net(x) and y."""

    model: str
    seed: int
    steps: int
    net: nn.Module
    x: Tensor
    y: Tensor
    norm: float = math.nan  # of the Hessian, the reference
    fewest: int = 0  # products after which plain Lanczos is right

    @property
    def params(self) -> list[Tensor]:
        return list(self.net.parameters())

    def loss(self) -> Tensor:
        return cross_entropy(self.net(self.x), self.y)

    def gradient(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(), self.params)

    def for_peers(self) -> "Point":
        net = copy.deepcopy(self.net)
        net.fused = False
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = module.running_var = module.num_batches_tracked = None
        return dataclasses.replace(self, net=net)


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Smooth patterns of ten classes: shifted, mixed with another class, with noise."""
    patterns = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    patterns = interpolate(patterns, size=(32, 32), mode="bicubic")
    y, other = torch.randint(10, (2, count), generator=generator)
    x = patterns[y] + 0.7 * patterns[other] + 0.7 * torch.randn(count, 3, 32, 32, generator=generator)
    shifts = torch.randint(-4, 5, (count, 2), generator=generator).tolist()
    return torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(x, shifts, strict=True)]), y


def trained_resnet(seed: int, steps: int, quick: bool) -> Point:
    generator = torch.Generator().manual_seed(seed)
    net = ResNet(generator=generator, **({"blocks": 1, "width": 8} if quick else {}))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        x, y = images(64, generator)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    return Point("resnet", seed, steps, net, *images(64, generator))


def trained_lstm(seed: int, steps: int, quick: bool, corpus: text.Corpus) -> Point:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"embedding": 32, "hidden": 64} if quick else {}
    model = LanguageModel(len(corpus.vocabulary), generator=generator, **sizes)
    optimizer = ClippedSGD(model.parameters(), lr=LR, max_norm=MAX_NORM)
    *batches, last = text.segments(text.batchify(corpus.train, 10), 35)[: steps + 1]
    state = model.initial_state(10)
    for words, targets in batches:
        optimizer.zero_grad()
        loss, state = model.loss(words, targets, state)
        loss.backward()
        optimizer.step()
    return Point("lstm", seed, steps, Words(model), last[0], last[1].flatten())


# A. The methods take a point and a seed. They return the norm, how many products they took, and whether they
# claim to have converged.

Answer = tuple[float, int, bool]


def ours(point: Point, seed: int, **options: float) -> Answer:
    generator = torch.Generator().manual_seed(seed)
    result = hessian_norm(point.loss, point.params, tol=TOLERANCE, generator=generator, **options)
    return result.value, result.hvps, result.converged


def pyhessian(point: Point, seed: int, tol: float = TOLERANCE) -> Answer:
    module = sys.modules["pyhessian.hessian"]
    name = "hessian_vector_product"
    torch.manual_seed(seed)
    with mock.patch.object(module, name, wraps=getattr(module, name)) as product:
        values, _ = PyHessian(point.net, cross_entropy, (point.x, point.y), cuda=False).eigenvalues(tol=tol)
    point.net.zero_grad()  # its gradients hold the graph
    return abs(values[0]), product.call_count, product.call_count < 100


def eigenthings(point: Point, seed: int, k: int = 1, **options: float) -> Answer:
    operator = HessianOperator(point.net, [(point.x, point.y)], supervised_loss(cross_entropy))
    result = lanczos(operator, k=k, seed=seed, **options)
    return abs(result.eigenvalues[0].item()), result.iterations, bool(result.converged[0])


def eigenthings_told(point: Point, seed: int) -> Answer:
    return eigenthings(point, seed, max_iter=point.fewest, tol=TOLERANCE)


def curvlinops(point: Point, seed: int, ncv: int | None = None) -> Answer:
    operator = HessianLinearOperator(
        point.net,
        nn.CrossEntropyLoss(),
        point.params,
        [(point.x, point.y)],
        check_deterministic=False,  # one pass less
        num_data=len(point.x),
    ).to_scipy()
    return arpack(operator.matvec, operator.shape[0], operator.dtype, seed, tol=TOLERANCE, ncv=ncv)


def floor(point: Point, seed: int) -> Answer:
    product, v = products(point)
    v.normal_(generator=torch.Generator().manual_seed(seed))  # the start of hessian-eigenthings
    basis, alphas, betas, value = [v / v.norm()], [], [], 0.0
    while abs(value - point.norm) > TOLERANCE * point.norm:
        w = product(basis[-1])
        alphas.append((w @ basis[-1]).item())
        value = np.abs(np.linalg.eigvalsh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))).max()
        for v in basis:
            w -= (w @ v) * v
        betas.append(w.norm().item())
        basis.append(w / betas[-1])
    return float(value), len(alphas), True


METHODS: dict[str, Callable[[Point, int], Answer]] = {
    "floor": floor,  # runs first, because it finds what `eigenthings_told` is told
    "ours": ours,
    "ours_confident": partial(ours, confidence=0.95),
    "pyhessian": pyhessian,
    "pyhessian_tight": partial(pyhessian, tol=1e-3),
    "eigenthings": eigenthings,
    "eigenthings_k10": partial(eigenthings, k=10, tol=TOLERANCE),
    "eigenthings_told": eigenthings_told,
    "curvlinops": curvlinops,
    "curvlinops_small": partial(curvlinops, ncv=6),
}


def products(point: Point) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Hessian-vector products by double backward on a retained graph, and an empty vector."""
    params = point.params
    gradient = torch.autograd.grad(point.loss(), params, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in params])
        pieces = [piece.view(p.shape) for piece, p in zip(pieces, params, strict=True)]
        found = torch.autograd.grad(gradient, params, pieces, retain_graph=True)
        return torch.cat([h.flatten() for h in found])

    return product, torch.empty(sum(p.numel() for p in params), dtype=params[0].dtype)


def arpack(product: Callable, size: int, dtype: np.dtype, seed: int, **options: float | None) -> Answer:
    counted = mock.Mock(wraps=product)
    v0 = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    operator = LinearOperator((size, size), matvec=counted, dtype=dtype)
    try:
        values = eigsh(operator, 1, which="LM", v0=v0, maxiter=50, return_eigenvectors=False, **options)
    except ArpackNoConvergence:
        return math.nan, counted.call_count, False
    return abs(float(values[0])), counted.call_count, True


def reference(point: Point) -> float:
    peer = point.for_peers()
    peer.net.double()
    peer.x = peer.x.double() if peer.x.is_floating_point() else peer.x
    product, v = products(peer)
    numpy_product = lambda v: product(torch.from_numpy(v.ravel())).numpy()  # noqa: E731
    return arpack(numpy_product, len(v), np.float64, 10**6, tol=1e-3, ncv=12)[0]


def hessian_rows(points: list[Point], rounds: int) -> list[dict]:
    rows, slow, order = [], set(), random.Random(0)
    peers = []
    for point in points:
        point.norm = reference(point)
        if not point.norm > 0:
            raise RuntimeError(f"eigsh found no reference for {point.model} after {point.steps} steps")
        peers.append(point.for_peers())
        progress(f"{point.model}, {point.steps} steps: loss {point.loss():.2f}, norm {point.norm:.4g}")
    for number in range(rounds):
        for point, peer in zip(points, peers, strict=True):
            for name in ["floor", *order.sample(list(METHODS)[1:], len(METHODS) - 1)]:
                if (name, point) in slow or (name in ONCE and point.seed > 0):
                    continue
                run = partial(
                    METHODS[name], point if name.startswith("ours") else peer, 100 * point.seed + number
                )
                (value, hvps, converged), cost = measured(run, point.gradient)
                rows.append(row(point, number, name, cost, hvps, value, converged))
                progress(" {model} {seed} {round} {method}: {gradients:.1f} {error:+.1e}".format(**rows[-1]))
                if name == "floor":
                    peer.fewest = hvps
                if cost["gradients"] > SLOW:
                    slow.add((name, point))
            for name, run in (("gradient", point.gradient), ("gradient_plain", peer.gradient)):
                rows.append(row(point, number, name, measured(run, point.gradient)[1]))
    return rows


def row(
    point: Point, number: int, method: str, cost: dict, hvps=math.nan, value=math.nan, converged=math.nan
) -> dict:
    where = {"model": point.model, "seed": point.seed, "steps": point.steps, "round": number}
    found = {"hvps": float(hvps), "value": value, "reference": point.norm, "error": value / point.norm - 1}
    return {**where, "method": method, **cost, **found, "converged": float(converged)}


def measured(run: Callable, gradient: Callable) -> tuple:
    """The result of ``run``, its time in gradients, and its peak memory over that before a gradient."""
    gc.collect()
    if sys.platform == "linux":  # freed memory goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    unit = [seconds(gradient) for _ in range(3)][1:]
    if sys.platform == "linux":  # the peak until now is forgotten
        Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    result = run()
    duration = time.perf_counter() - begin
    memory = (resident("VmHWM") - before) / 2**10
    unit += [seconds(gradient) for _ in range(3)][1:]
    return result, {"gradients": duration / statistics.median(unit), "memory_mb": memory}


def seconds(run: Callable) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def resident(key: str) -> float:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM), in kB."""
    if sys.platform != "linux":
        return math.nan
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(key)))


# B. The path estimator.

Segment = tuple[Tensor, Tensor]


def cut(streams: Tensor, rng: random.Random) -> list[Segment]:
    """The first tenth of the rows in segments of random lengths, as the authors' code cuts it."""
    segments, row = [], 0
    while row < len(streams) / 10:
        length = max(5, int(rng.gauss(BPTT if rng.random() < 0.95 else BPTT / 2, 5)))
        segments.append((streams[row : row + length], streams[row + 1 : row + length + 1]))
        row += length
    return segments


def summed_gradient(model: LanguageModel, segments: list[Segment]) -> list[Tensor]:
    model.zero_grad()
    state = model.initial_state(STREAMS)
    for words, targets in segments:
        loss, state = model.loss(words, targets, state)
        loss.backward()
    return [p.grad for p in model.parameters()]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return total_norm([x - y for x, y in zip(a, b, strict=True)]).item()


def moved(model: LanguageModel, step: list[Tensor], fraction: float) -> LanguageModel:
    model = copy.deepcopy(model)
    for p, d in zip(model.parameters(), step, strict=True):
        p.data.add_(d, alpha=fraction)
    return model


def authors(model: LanguageModel, step: list[Tensor], streams: Tensor, rng: random.Random) -> float:
    old = copy.deepcopy(model)  # theirs is made before the training step
    at_start = summed_gradient(old, cut(streams, rng))
    middle = summed_gradient(moved(old, step, 0.5), cut(streams, rng))
    return difference(middle, at_start) / (total_norm(step).item() / 2)


def path_rows(points: list[Point], rounds: int, corpus: text.Corpus) -> tuple[list[dict], dict]:
    rng = random.Random(0)
    streams = text.batchify(corpus.train, len(corpus.train) // ROWS)[:, :STREAMS].contiguous()
    rows, segments = [], []
    deviations, floors = {key: [] for key in SCALES}, {key: [] for key in SCALES}
    for point in points:
        if point.model == "lstm":
            point = dataclasses.replace(point, x=streams[:BPTT], y=streams[1 : BPTT + 1].flatten())
        gradient = point.gradient()
        factor = LR * min(1.0, MAX_NORM / total_norm(gradient).item())
        step = [-factor * g for g in gradient]
        one = partial(path_smoothness, point.loss, point.params, step, fractions=(0.5,), grad=gradient)
        five = partial(path_smoothness, point.loss, point.params, step, grad=gradient)
        if point.model == "lstm":
            theirs = partial(authors, point.net.model, step, streams, rng)
            runs = {"ours": one, "ours_five": five, "authors": theirs}
        else:
            runs = {"ours_resnet": one, "ours_resnet_five": five}
        for number in range(rounds):
            for name, run in rng.sample(list(runs.items()), len(runs)):
                _, cost = measured(run, point.gradient)
                rows.append(row(dataclasses.replace(point, model="path"), number, name, cost))
        if point.model != "lstm":
            continue

        limit = directional_smoothness(point.loss, point.params, step)
        path = path_smoothness(point.loss, point.params, step, fractions=tuple(SCALES.values()))
        model = point.net.model
        cuts = [cut(streams, rng) for _ in range(CALLS)]
        segments += map(len, cuts)
        calls = [[g.clone() for g in summed_gradient(model, segments)] for segments in cuts]
        noise = [difference(a, b) for i, a in enumerate(calls) for b in calls[:i]]
        for (key, scale), value in zip(SCALES.items(), path.values, strict=True):
            deviations[key].append(abs(value / limit - 1))
            change = difference(summed_gradient(moved(model, step, scale / 2), cuts[0]), calls[0])
            floors[key] += [n / change for n in noise]
    scalars = {"path.authors.segments": statistics.mean(segments)}
    for key in SCALES:
        scalars[f"path.ours.deviation_{key}"] = max(deviations[key])
        scalars[f"path.authors.floor_{key}"] = statistics.median(floors[key])
        scalars[f"path.authors.floor_most_{key}"] = max(floors[key])
    return rows, scalars


def summary(rows: list[dict]) -> dict[str, float]:
    scalars = {}
    order = [
        *METHODS,
        "gradient",
        "gradient_plain",
        "ours_five",
        "ours_resnet",
        "ours_resnet_five",
        "authors",
    ]
    found = dict.fromkeys((r["model"], r["method"]) for r in rows)
    for model, method in sorted(found, key=lambda key: (key[0], order.index(key[1]))):
        runs = [r for r in rows if (r["model"], r["method"]) == (model, method)]
        column = {key: np.array([r[key] for r in runs]) for key in runs[0] if key not in ("model", "method")}
        low, median, high = np.quantile(column["gradients"], (0.25, 0.5, 0.75))
        key = f"{model}.{method}"
        scalars |= {f"{key}.gradients": median, f"{key}.gradients_low": low, f"{key}.gradients_high": high}
        scalars |= {f"{key}.memory_mb": np.median(column["memory_mb"]), f"{key}.runs": len(runs)}
        if not np.isnan(column["hvps"]).any():
            scalars |= {f"{key}.hvps": np.median(column["hvps"]), f"{key}.hvps_most": column["hvps"].max()}
            scalars |= {f"{key}.error": np.abs(column["error"]).max()}
            scalars |= {f"{key}.converged": column["converged"].mean()}
    return {key: value if isinstance(value, int) else float(value) for key, value in scalars.items()}


def table(scalars: dict) -> str:
    lines = [
        f"{'':25}{'gradients':>10}{'quartiles':>15}{'products':>9}{'most':>5}{'error':>9}{'claims':>7}{'MB':>7}{'runs':>5}"
    ]
    for key in [key.removesuffix(".gradients") for key in scalars if key.endswith(".gradients")]:
        get = lambda name: scalars.get(f"{key}.{name}", math.nan)  # noqa: B023, E731
        quartiles = f"{get('gradients_low'):.1f}-{get('gradients_high'):.1f}"
        lines.append(
            f"{key:25}{get('gradients'):10.1f}{quartiles:>15}{get('hvps'):9.0f}{get('hvps_most'):5.0f}"
            f"{get('error'):9.1e}{get('converged'):7.2f}{get('memory_mb'):7.0f}{get('runs'):5.0f}"
        )
    return "\n".join(lines)


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Smoothness estimators against their peers.")
    parser.add_argument("--out", default="results", help="folder of all records")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small models, one round: whether it works")
    options = parser.parse_args()
    begin = time.monotonic()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")  # PyHessian
    warnings.filterwarnings("ignore", "TF32 acceleration")

    rounds, points = (1, STEPS[:1]) if options.quick else (2, STEPS)
    corpus = text.penn_treebank() if os.environ.get("GRADCLIP_DATA_DIR") else text.reference_manual()
    provenance = records.provenance("cpu", data_sha256=corpus.sha256, wall_time=0.0)
    resnets = [trained_resnet(i, steps, options.quick) for i, steps in enumerate(points)]
    lstms = [trained_lstm(i, steps, options.quick, corpus) for i, steps in enumerate(points)]
    rows = hessian_rows([*resnets, *lstms], rounds)
    path, scalars = path_rows([*lstms, resnets[0]], rounds, corpus)
    rows += path
    scalars |= summary(rows)
    for name in ("ours", "ours_resnet"):
        scalars[f"path.{name}.gradients_per_fraction"] = scalars[f"path.{name}_five.gradients"] / 5
    for point in (resnets[0], lstms[0]):
        scalars[f"{point.model}.parameters"] = sum(p.numel() for p in point.params)
    config = {
        "quick": options.quick,
        "rounds": rounds,
        "tolerance": TOLERANCE,
        "steps": list(points),
        "images": "synthetic",
        "text": corpus.name,
        "lr": LR,
        "max_norm": MAX_NORM,
        "versions": {name: importlib.metadata.version(name) for name in PEERS},
    }
    provenance["wall_time_s"] = time.monotonic() - begin
    series = {key: [r[key] for r in rows] for key in rows[0]}
    profile = "smoke" if options.quick else "cpu"
    record = records.Record("benchmark-smoothness", profile, config, scalars, series, provenance)
    print(table(scalars))
    for key in sorted(key for key in scalars if re.match(r"path.*(floor|deviation|_per_)", key)):
        print(f"{key:45}{scalars[key]:10.3g}")
    print(f"{provenance['wall_time_s']:.0f} s; record in {records.save(record, options.out)}")


if __name__ == "__main__":
    main()
