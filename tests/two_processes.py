"""Train one model on two processes and on one, and print how far the parameters are apart, as JSON.

    python tests/two_processes.py STORE RANK

``STORE`` is a file that the two processes find each other by. ``test_distributed.py`` runs both.
"""

import json
import math
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradclip.norms import clip_grad_
from gradclip.optim import ClippedSGD, MixedClippedSGD
from gradclip.thresholds import Percentile, ZScore

STEPS = 3
OPTIMIZERS = {
    "plain": lambda p: ClippedSGD(p, 0.1, max_norm=0.05),
    "momentum": lambda p: ClippedSGD(
        p, 0.1, max_norm=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, nonfinite="skip"
    ),
    "tensor": lambda p: ClippedSGD(p, 0.1, max_norm=0.02, scope="tensor", momentum=0.9),
    "unit": lambda p: ClippedSGD(p, 0.1, max_norm=0.01, scope="unit", momentum=0.9),
    "mixed": lambda p: MixedClippedSGD(p, 0.1, max_norm=0.05, momentum=0.9, mix=0.7),
    "percentile": lambda p: ClippedSGD(p, 0.1, max_norm=Percentile(20.0)),
    "z-score": lambda p: ClippedSGD(p, 0.1, max_norm=ZScore(0.5, warmup=1)),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


def model():
    torch.manual_seed(0)
    # Seven and three rows: the shards of two ranks differ in size, and one bias is too short for both.
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def train(net, name, batches, spoil=False):
    """Parameters after a few steps, the norm of the last gradient and the number of skipped steps."""
    optimizer = OPTIMIZERS[name](net.parameters())
    for step, batch in enumerate(batches):
        net.zero_grad()
        loss = net(batch).sub(1.0).square().mean() * (1 + 2 * step)  # so that norms grow, and policies clip
        (loss * math.nan if spoil and step == 1 else loss).backward()
        norm = clip_grad_(net.parameters(), 0.05) if name == "adamw" else None
        optimizer.step()
    norm = norm if norm is not None else optimizer.last_norm
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    skipped = optimizer.skipped_steps.item() if name != "adamw" else 0
    return torch.cat([p.detach().reshape(-1) for p in parameters]), norm.item(), skipped


def main(store, rank):
    rank = int(rank)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    batches = torch.randn(STEPS, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = batches[:, 4 * rank : 4 * rank + 4]
    results = {}
    for name in OPTIMIZERS:
        alone = train(model(), name, batches)
        start = torch.cat([p.detach().reshape(-1) for p in model().parameters()])
        for kind in ("ddp", "fsdp"):
            net = model()
            if kind == "ddp":
                net = DistributedDataParallel(net)
            else:
                for layer in net:
                    if isinstance(layer, nn.Linear):
                        fully_shard(layer, mesh=mesh)
                fully_shard(net, mesh=mesh)
            together = train(net, name, own)
            results[f"{kind} {name}"] = {
                "difference": (together[0] - alone[0]).abs().max().item(),
                "moved": (alone[0] - start).norm().item(),
                "norms": [alone[1], together[1]],
            }
    # One rank alone has a gradient that is not finite: both skip, and stay together.
    net = model()
    fully_shard(net, mesh=mesh)
    spoiled, _, skipped = train(net, "momentum", own, spoil=rank == 1)
    results["fsdp skip"] = {"skipped": skipped, "finite": spoiled.isfinite().all().item()}
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
