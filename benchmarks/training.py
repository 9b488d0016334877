"""An epoch and its validation against a plain implementation of the reference's steps, on Amazon Baby's interactions.

    python benchmarks/training.py --data FOLDER --image-dim 4096
    python benchmarks/training.py --data FOLDER --image-dim 512 --device cuda

FOLDER/baby holds train.json.gz, val.json.gz and test.json.gz, {user: [items]}. Features are random: speed does not
depend on them. The opponent does what the reference's description says, the obvious way: separate projections, slerp by
arccos, COO sparse products and a stack of layers, pairwise distances with a list of all pairs, negatives and hits in
Python, validation and test in each epoch. Both take their steps in turns of a few, so that what else the machine does
meets both alike; an epoch is the sum of its steps.
"""

import argparse
import gzip
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the workflow sets them
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional

from cm3.config import Model, Training
from cm3.evaluation.ranking import Validation
from cm3.model.graph import item_item_matrix
from cm3.model.model import build_model
from cm3.model.sampling import Sampler
from cm3.similarity.exact import knn
from cm3.training.checkpoint import NullCheckpoint
from cm3.training.loop import TrainingRun

BATCH, TURN, K = 2048, 3, 20


class Opponent(nn.Module):
    """CM3 with two modalities, as plainly as it can be written."""

    def __init__(self, features: list[Tensor], train: sp.csr_matrix, item_graph: sp.csr_matrix) -> None:
        super().__init__()
        self.features = features
        self.n_users, self.n_items = train.shape
        self.hidden = nn.ModuleList(nn.Linear(x.shape[1], 256) for x in features)
        self.output = nn.ModuleList(nn.Linear(256, 64, bias=False) for _ in features)
        self.points = nn.ModuleList(nn.Linear(x.shape[1], 64) for x in features)
        self.users = nn.Parameter(torch.randn(self.n_users, 3, 64) * 0.01)
        self.logits = nn.Parameter(torch.randn(self.n_users, 3, 1) * 0.01)
        both = sp.bmat([[None, train], [train.T, None]]).tocoo()
        degree = np.maximum(np.asarray(both.sum(1)).ravel(), 1e-7) ** -0.5
        values = degree[both.row] * degree[both.col]
        self.adjacency = _coo(both.row, both.col, values, both.shape, features[0].device)
        graph = item_graph.tocoo()
        self.item_graph = _coo(graph.row, graph.col, graph.data, graph.shape, features[0].device)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return users, items and fused points."""
        streams, points = [], []
        for x, hidden, output, point in zip(self.features, self.hidden, self.output, self.points, strict=True):
            streams.append(functional.normalize(output(functional.leaky_relu(hidden(x))), dim=1))
            points.append(functional.normalize(point(x), dim=1))
        angle = torch.arccos((points[0] * points[1]).sum(1).clamp(-1 + 1e-7, 1 - 1e-7))
        fused = (
            torch.sin((1 - t) * angle)[:, None] * points[0] + torch.sin(t * angle)[:, None] * points[1]
        ) / torch.sin(angle)[:, None]
        users = functional.normalize(self.users, dim=2).flatten(1)
        layer = torch.cat([users, torch.cat([*streams, fused], 1)])
        layers = [layer]
        for _ in range(3):
            layer = torch.sparse.mm(self.adjacency, layer)
            layers.append(layer)
        users, items = torch.stack(layers, 1).sum(1).split([self.n_users, self.n_items])
        users = (users.unflatten(1, (3, 64)) * self.logits.softmax(1)).flatten(1)
        return users, items + torch.sparse.mm(self.item_graph, items), fused

    def loss(self, t: Tensor, users: Tensor, items: Tensor, negatives: Tensor) -> Tensor:
        """Return the loss of a batch."""
        every_user, every_item, fused = self(t)
        u, i = functional.normalize(every_user[users], dim=1), functional.normalize(every_item[items], dim=1)
        n, f = functional.normalize(every_item[negatives], dim=1), functional.normalize(fused[negatives], dim=1)
        pairs = torch.triu_indices(len(n), len(n), 1, device=n.device)
        similarity = (f @ f.T).clamp(0, 1)[pairs[0], pairs[1]]
        user_uniformity = _distances(u).pow(2).mul(-2).exp().mean().log()
        item_uniformity = (_distances(n).pow(2) - 2 + 2 * similarity).mul(-2).exp().mean().log()
        return (u - i).pow(2).sum(1).mean() + 0.9 * (user_uniformity + item_uniformity) / 2


def _distances(x: Tensor) -> Tensor:
    return torch.pdist(x, p=2)


def _coo(
    row: np.ndarray, column: np.ndarray, values: np.ndarray, shape: tuple[int, int], device: torch.device
) -> Tensor:
    indices = torch.from_numpy(np.stack([row, column]).astype(np.int64))
    return torch.sparse_coo_tensor(
        indices, torch.from_numpy(values.astype(np.float32)), shape, device=device
    ).coalesce()


def recall_in_python(users: Tensor, items: Tensor, seen: dict[int, list[int]], truth: dict[int, list[int]]) -> float:
    """Return Recall@20 with hits counted in Python, 4096 users at a time."""
    chosen, total = list(truth), 0.0
    for start in range(0, len(chosen), 4096):
        part = chosen[start : start + 4096]
        scores = users[part] @ items.T
        for row, user in enumerate(part):
            scores[row, seen.get(user, [])] = -1e10
        best = scores.topk(K, dim=1).indices.cpu().tolist()
        for row, user in enumerate(part):
            total += sum(item in truth[user] for item in best[row]) / len(truth[user])
    return total / len(chosen)


def read(folder: Path) -> dict[str, dict[int, list[int]]]:
    """Return the items of each user by split."""
    found = {}
    for split in ("train", "val", "test"):
        raw = json.loads(gzip.decompress((folder / f"baby/{split}.json.gz").read_bytes()))
        found[split] = {int(user): items for user, items in raw.items() if items}
    return found


def matrix(items_of: dict[int, list[int]], shape: tuple[int, int]) -> sp.csr_matrix:
    """Return the (U, I) matrix of a split."""
    rows = np.repeat(list(items_of), [len(items) for items in items_of.values()])
    columns = np.concatenate([np.asarray(items) for items in items_of.values()])
    return sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)


def main() -> None:
    """Print seconds per epoch and validation of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--image-dim", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", help="of our products of features: float32 or bfloat16")
    parser.add_argument("--steps", type=int, default=21, help="steps of each that are timed; an epoch is extrapolated")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    splits = read(arguments.data)
    n_users = 1 + max(max(part) for part in splits.values())
    n_items = 1 + max(max(items) for part in splits.values() for items in part.values())
    train = matrix(splits["train"], (n_users, n_items))
    torch.manual_seed(0)
    features = [torch.randn(n_items, 384), torch.randn(n_items, arguments.image_dim)]
    neighbours = []
    for x in features:
        found, _ = knn(x, 10)
        neighbours.append((np.repeat(np.arange(n_items), 10), found.numpy().ravel()))
    graph = item_item_matrix(neighbours, [0.9, 0.1], n_items)
    settings, training = Model(), Training(batch_size=BATCH)
    ours = build_model([x.numpy() for x in features], train, graph, settings, 0, arguments.precision).to(device)
    theirs = Opponent([x.to(device) for x in features], train, graph).to(device)
    users, items = (torch.from_numpy(x.astype(np.int64)).to(device) for x in train.nonzero())
    sampler = Sampler(users, items, n_items, batch_size=BATCH, negative_sampling="negative", dedup_pairs=True, seed=0)
    valid = matrix(splits["val"], (n_users, n_items))
    ranking = Validation(valid, train, "recall@20", device)
    run = TrainingRun(ours, sampler, ranking, training, NullCheckpoint(), None)
    optimiser = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    batches, seen = sampler.epoch(1), {user: set(mine) for user, mine in splits["train"].items()}
    pairs = [(user, item) for user, mine in splits["train"].items() for item in mine]
    random.Random(0).shuffle(pairs)

    def our_step() -> None:
        run.step([next(batches)])
        run.state.step += 1

    def their_step() -> None:
        some = [pairs[random.randrange(len(pairs))] for _ in range(BATCH)]
        negatives = []
        for user, _ in some:
            item = random.randrange(n_items)
            while item in seen[user]:
                item = random.randrange(n_items)
            negatives.append(item)
        t = torch.distributions.Beta(0.5, 0.5).sample((n_items,)).to(device)
        optimiser.zero_grad()
        batch = [torch.tensor(x, device=device) for x in ([u for u, _ in some], [i for _, i in some], negatives)]
        theirs.loss(t, *batch).backward()
        optimiser.step()

    def timed(work: Callable[[], None], times: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - clock

    our_step()
    their_step()
    seconds = [0.0, 0.0]
    for _ in range(arguments.steps // TURN):
        for which, step in enumerate((our_step, their_step)):
            seconds[which] += timed(step, TURN)
    epoch = [value / (arguments.steps // TURN * TURN) * sampler.n_batches for value in seconds]

    def our_validation() -> None:
        found = ours.embed()
        ranking.score(found.users.detach(), found.items.detach())

    def their_validation() -> None:
        with torch.no_grad():
            every_user, every_item, _ = theirs(torch.full((n_items,), 0.5, device=device))
            for split in ("val", "test"):
                recall_in_python(every_user, every_item, splits["train"], splits[split])

    validation = [min(timed(work, 1) for _ in range(2)) for work in (our_validation, their_validation)]
    print(
        f"{n_users} users, {n_items} items, {len(users)} training pairs, image vectors of {arguments.image_dim}, {device}, {arguments.precision}"
    )
    print("\n| | epoch, s | validation, s | both, s |\n|---|---|---|---|")
    for name, a, b in zip(("ours", "opponent"), epoch, validation, strict=True):
        print(f"| {name} | {a:.2f} | {b:.2f} | {a + b:.2f} |")
    ratios = [
        epoch[1] / epoch[0],
        validation[1] / validation[0],
        (epoch[1] + validation[1]) / (epoch[0] + validation[0]),
    ]
    print("| times faster | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
