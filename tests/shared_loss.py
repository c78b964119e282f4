"""Derivatives and smoothness of one loss, as JSON, from this process's share of the batch.

    torchrun --nproc-per-node 2 tests/shared_loss.py OUT

Without torchrun it has the whole batch. Process 0 writes OUT. ``test_parallel.py`` runs both.
"""

import json
import sys
from pathlib import Path

import torch

from gradclip import parallel
from gradclip.models.awd_lstm import AWDLSTM
from gradclip.models.lstm import LanguageModel
from gradclip.smoothness import directional_smoothness, hessian_norm, path_smoothness

WORDS, BATCH, TIME = 13, 6, 7


def measured(make, loss_of):
    """Everything that the experiments compute from a loss, for a model in float64."""
    model = make(WORDS, embedding=4, hidden=5, generator=torch.Generator().manual_seed(0)).double()
    params = list(model.parameters())
    parallel.average_gradients(params)
    text = torch.randint(WORDS, (TIME + 1, BATCH), generator=torch.Generator().manual_seed(1))
    masks = model.masks(BATCH, torch.Generator().manual_seed(2)) if hasattr(model, "masks") else None
    text = parallel.own(text, 1)

    def loss():
        return parallel.mean(loss_of(model, text, masks))

    def flat(tensors):
        return torch.cat([t.flatten() for t in tensors])

    draw = torch.Generator().manual_seed(3)
    step, other = (
        [0.1 * torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in params] for _ in range(2)
    )
    # float64 runs without oneDNN, whose LSTM has no second derivative.
    gradient = torch.autograd.grad(loss(), params, create_graph=True)
    product = torch.autograd.grad(gradient, params, step, create_graph=True)
    third = torch.autograd.grad(product, params, other)
    path = path_smoothness(loss, params, step)
    optimizer = torch.optim.SGD(params, lr=0.5)
    loss().backward()
    accumulated = flat([p.grad for p in params])
    optimizer.step()
    return {
        "loss": loss().item(),
        "gradient": flat(gradient).tolist(),
        "grad": accumulated.tolist(),
        "product": flat(product).tolist(),
        "third": flat(third).tolist(),
        "path": path.values,
        "directional": directional_smoothness(loss, params, step),
        "hessian_norm": hessian_norm(loss, params, tol=1e-3).value,
        "after": flat(params).tolist(),
    }


def plain(model, text, masks):
    return model.loss(text[:-1], text[1:], model.initial_state(text.shape[1]))[0]


def regularised(model, text, masks):
    own = masks.streams(parallel.rank() * text.shape[1], text.shape[1])
    return model.training_loss(text[:-1], text[1:], model.initial_state(text.shape[1]), own)[0]


def main(out):
    with parallel.joined("cpu"):
        rank, size = parallel.rank(), parallel.size()
        found = {"lstm": measured(LanguageModel, plain), "awd": measured(AWDLSTM, regularised)}
        # Of the first process what the others find is compared, bit for bit.
        found["same"] = len(set(everywhere(json.dumps(found)))) == 1
        batch = torch.arange(12.0).view(2, 6)
        found["own"] = parallel.own(batch, 1).tolist()
        found["round_trip"] = torch.equal(parallel.whole(parallel.own(batch, 1), 1), batch)
        found["from_first"] = parallel.from_first({"rank": rank})
        try:
            parallel.own(torch.zeros(3, 7), 1)
            found["error"] = None
        except parallel.ParallelError as error:
            found["error"] = str(error)
        found["size"] = size
        if rank == 0:
            Path(out).write_text(json.dumps(found))


def everywhere(value):
    """The values of all processes."""
    if parallel.size() == 1:
        return [value]
    values = [None] * parallel.size()
    torch.distributed.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    main(*sys.argv[1:])
