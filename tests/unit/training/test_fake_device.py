"""Steps, validations and neighbour searches on a fake GPU: tensors on one device, no wait for it, few kernel launches."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from baseline_shop import SMALL
from fake_device import Launches, WaitsError, fake_device, moved
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError

from cm3.baselines.base import NetworkBaseline, parse_baseline
from cm3.baselines.inputs import Inputs
from cm3.common.distributed import ProcessShard
from cm3.common.topk import top_k_and_ties
from cm3.config import Model, Training
from cm3.evaluation.ranking import Ranking, Validation
from cm3.evaluation.scores import embedding_scores
from cm3.model.fused_slerp import fused_slerp
from cm3.model.fusion import lerp, reference_slerp, slerp, spherical_bezier
from cm3.model.losses import alignment
from cm3.model.model import build_model
from cm3.model.network import Network
from cm3.model.pair_potential import BLOCK_ENTRIES, default_block_rows, tiled_calibrated_uniformity, tiled_uniformity
from cm3.model.sampling import Batch, Sampler
from cm3.model_registry import spec_classes
from cm3.similarity.exact import UnitRows, scan
from cm3.training.checkpoint import NullCheckpoint
from cm3.training.loop import TrainingRun

USERS, ITEMS, D = 40, 30, 8
NETWORKS = [name for name, spec in spec_classes().items() if issubclass(spec, NetworkBaseline)]
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "fused slerp": ({"slerp": "fused"}, {"clip_norm": 1.0}),
    "reference slerp": ({"slerp": "reference", "dedup_pairs": False}, {}),
    "linear": ({"fusion": "linear", "n_mm_layers": 0}, {}),
    "mean": ({"fusion": "mean", "item_graph": False}, {}),
    "concat": ({"fusion": "concat", "n_ui_layers": 0}, {}),
    "plain uniformity": ({"calibration": False, "uniformity_items": "positive"}, {}),
    "detached": ({"detach_similarity": True}, {"batches_per_step": 2, "weight_decay": 1e-4}),
    "tf32": ({}, {"precision": "tf32"}),
    "bfloat16": ({}, {"precision": "bfloat16", "schedule": "cosine"}),
}


def some(shape: tuple[int, int], share: float = 0.2) -> sp.csr_matrix:
    return sp.csr_matrix((np.random.default_rng(0).random(shape) < share).astype(np.float32))


def vectors(n_modalities: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((ITEMS, 6 + m)).astype(np.float32) for m in range(n_modalities)]


def cm3(n_modalities: int = 2, precision: str = "float32", **settings: Any) -> Network:
    model = Model(embedding_dim=D, **settings)
    return build_model(vectors(n_modalities), some((USERS, ITEMS)), some((ITEMS, ITEMS)), model, 0, precision)


def baseline(name: str) -> Network:
    spec = parse_baseline({"name": name, "embedding_dim": D} | SMALL.get(name, {}))
    assert isinstance(spec, NetworkBaseline)
    graph = some((ITEMS, ITEMS)).tocoo()
    neighbours = (graph.row.astype(np.int64), graph.col.astype(np.int64), graph.data)
    names = ("text", "image") if spec.reads_features else ()
    return spec.network(
        Inputs(
            some((USERS, ITEMS)),
            dict(zip(names, vectors(2), strict=False)),
            dict.fromkeys(names, neighbours),
            dict.fromkeys(names, 0.5),
        )
    )


def sampler(sampling: str, dedup: bool) -> Sampler:
    users, items = (torch.from_numpy(ids.astype(np.int64)) for ids in some((USERS, ITEMS)).nonzero())
    return Sampler(
        users,
        items,
        ITEMS,
        batch_size=64,
        negative_sampling=sampling,
        dedup_pairs=dedup,
        seed=0,  # type: ignore[arg-type]
    )


def a_step(model: Network, sampling: Sampler, device: str, **training: Any) -> Launches:
    """Take two steps, the second one counted, on `meta`; or one forward pass, loss and scoring pass on `cuda`."""
    settings = Training(**training)
    batches = list(sampling.epoch(1))[: settings.batches_per_step]
    model.begin_epoch(0)
    with fake_device():
        model, batches = moved(model, device), moved(batches, device)
        if device == "cuda":
            with Launches(device) as launches, torch.no_grad():
                embeddings = model.training_embeddings(0)
                losses = [model.loss(embeddings, batch).total for batch in batches]
                assert {x.device.type for x in (*losses, *vars(model.embed()).values())} == {device}
            return launches
        sampling.users, sampling.items = moved([sampling.users, sampling.items], device)
        run = TrainingRun(model, sampling, None, settings, NullCheckpoint(), None)  # type: ignore[arg-type]
        for _ in range(2):  # the first one makes the optimiser's moments
            with Launches(device) as launches:
                run.step(batches)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and {x.device.type for x in gradients} == {device}
        return launches


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_of_cm3(name, device):
    settings, training = VARIANTS[name]
    model = cm3(3, training.get("precision", "float32"), **settings)
    kind = settings.get("uniformity_items", "negative")
    assert a_step(model, sampler(kind, settings.get("dedup_pairs", True)), device, **training).total


@pytest.mark.parametrize("rank", [0, 3])  # the first of four processes has none of three streams
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_of_one_of_several_processes(rank, precision, monkeypatch):
    reduced = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op=None: reduced.append(x.device.type))
    monkeypatch.setattr(ProcessShard, "check_equal", lambda *_: None)
    model = cm3(2, precision)
    model.split(ProcessShard(rank, 4))
    assert model.users.shape[1] == (rank > 0)
    assert a_step(model, sampler("negative", True), "meta").total
    assert set(reduced) == {"meta"}, "a collective whose tensor is elsewhere would wait for ever"


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_a_baseline(name, device):
    model = baseline(name)
    assert a_step(model, sampler(model.negative_sampling, False), device).total


@pytest.mark.parametrize(("n_modalities", "most"), [(1, 288), (2, 460), (3, 632), (4, 804)])
def test_kernel_launches_of_a_step(n_modalities, most):
    """Forward and backward pass without the optimiser; a launch takes some 5 microseconds, whatever it computes."""
    model, batch = cm3(n_modalities), next(sampler("negative", True).epoch(1))
    with fake_device():
        model, batch = moved(model, "meta"), moved(batch, "meta")
        with Launches("meta") as launches:
            model.backward([batch], 0)
    assert launches.total <= most, launches.counts


@pytest.mark.parametrize("n", [1, 65, 8192])
def test_kernel_launches_of_a_loss_do_not_depend_on_the_batch(n):
    with fake_device(), Launches("meta") as launches:
        tiled_uniformity(torch.empty(n, D, device="meta", requires_grad=True)).backward()
    assert launches.total <= 50, launches.counts


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("n", [1, 8192, 65_536, 10**6])
def test_blocks_of_pairs_are_bounded(n, processes):
    assert 1 <= default_block_rows(n, "cuda", processes) * n <= BLOCK_ENTRIES
    assert default_block_rows(8192, "cuda") == 8192, "one block"
    if n == 65_536 and processes == 1:
        with fake_device(), Launches("cuda") as launches:
            x, counts = torch.empty(n, 4, device="cuda"), torch.empty(n, dtype=torch.int64, device="cuda")
            tiled_calibrated_uniformity(x, x, (0, 1), counts=counts)
        assert launches.largest <= BLOCK_ENTRIES, "entries of the largest table"


@pytest.mark.parametrize("interpolate", [slerp, fused_slerp, reference_slerp, lerp])
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_fusion(interpolate, device):
    with fake_device(), Launches(device):
        points = torch.empty(4, 9, D, device=device, requires_grad=device == "meta")
        fused = spherical_bezier(points, torch.empty(9, device=device), interpolate)
        assert fused.device.type == device and fused.shape == (9, D)
        if device == "meta":
            fused.sum().backward()


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("counted", [True, False])
def test_losses(device, counted):
    with fake_device(), Launches(device):
        x, points = (torch.empty(9, D, device=device, requires_grad=device == "meta") for _ in range(2))
        counts = torch.empty(9, dtype=torch.int64, device=device) if counted else None
        plain = tiled_uniformity(x, counts=counts, block_rows=2)
        calibrated = tiled_calibrated_uniformity(x, points, (0, 1), counts=counts, block_rows=4)
        total = alignment(x, points) + plain + calibrated
        assert total.device.type == device
        if device == "meta":
            total.backward()


@pytest.mark.parametrize("include", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [0, 13])
def test_neighbours(include, dtype, bits, monkeypatch):
    monkeypatch.setattr("cm3.similarity.exact.CHUNK_COLUMNS", 16)  # several chunks
    monkeypatch.setattr("cm3.similarity.exact._of_moderate_size", lambda x: x)  # once per search
    with fake_device(), Launches("cuda"):
        unit_rows = UnitRows(torch.empty(70, D, dtype=dtype, device="cuda"))
        among = None if include is None else torch.arange(include, device="cuda")
        indices, scores, unsure = scan(unit_rows, torch.arange(70, device="cuda"), 3, among, bits, margin=16)
        assert {x.device.type for x in (indices, scores, unsure)} == {"cuda"} and scores.dtype == dtype


@pytest.fixture
def validation() -> Validation:
    """It ranks in blocks of 16 users."""
    found = Validation(some((USERS, ITEMS), 0.1), some((USERS, ITEMS)), "ndcg@5", "meta")
    found.ranking.block = 16
    return found


def on(device: str, validation: Validation) -> Ranking:
    ranking = validation.ranking
    validation.known, validation.gains = moved([validation.known, validation.gains], device)
    ranking.users, ranking.counts, ranking.columns = moved([ranking.users, ranking.counts, ranking.columns], device)
    return ranking


def test_a_validation_gives_one_number(validation):
    with fake_device(), Launches("cuda"):
        ranking = on("cuda", validation)
        users, items = torch.empty(USERS, D, device="cuda"), torch.empty(ITEMS, D, device="cuda")
        lists = ranking.on_device(lambda rows: users[rows] @ items.T, 5)
        value = validation.mean(lists)
        assert value.device.type == "cuda" and value.shape == () and lists.tied.shape == (len(lists.spans),)
        with pytest.raises(DataDependentOutputException):
            value.item()


@pytest.mark.parametrize("name", ["dot", "cosine"])
def test_a_block_of_an_evaluation(validation, name):
    with fake_device(), Launches("cuda"):
        ranking = on("cuda", validation)
        users, items = torch.empty(USERS, D, device="cuda"), torch.empty(ITEMS, D, device="cuda")
        lists = ranking.on_device(embedding_scores(users, items)[name], 20)
        assert {lists.items.device.type, lists.scores.device.type} == {"cuda"} and lists.items.shape[1] == 20


def test_the_largest_of_many_columns():
    with fake_device(), Launches("cuda"):
        indices, values, tied = top_k_and_ties(torch.empty(4, 1000, device="cuda"), 5)
        assert {x.device.type for x in (indices, values, tied)} == {"cuda"} and values.shape == (4, 5)


def broken(model: Network, change: Callable[[torch.Tensor], torch.Tensor]) -> Network:
    """The model with a loss that is changed."""
    plain = model.loss

    def loss(embeddings: Any, batch: Batch) -> Any:
        found = plain(embeddings, batch)
        return type(found)(change(found.total), found.components)

    model.loss = loss  # type: ignore[method-assign]
    return model


FAULTS: dict[str, tuple[Callable[[torch.Tensor], Any], type[BaseException]]] = {
    "item": (lambda total: total * total.item(), DataDependentOutputException),
    "if": (lambda total: total if total > 0 else -total, DataDependentOutputException),
    "cpu": (lambda total: total.cpu().to(total.device), WaitsError),
    "numpy": (lambda total: total.detach().cpu().numpy(), WaitsError),
    "nonzero": (lambda total: torch.nonzero(total[None])[0].sum(), Exception),
    "mask": (lambda total: total[None][total[None] > 0].sum(), Exception),
    "other device": (lambda total: (total[None] + torch.ones(3)).sum(), FakeTensorDeviceMismatchError),
    "from the host": (lambda total: total * torch.ones(3).to(total.device).sum(), WaitsError),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_faults_are_found(fault, device):
    change, error = FAULTS[fault]
    model = broken(baseline("bpr-mf"), change)
    with pytest.raises(error):
        a_step(model, sampler("negative", False), device)


def test_a_buffer_that_stays_on_the_cpu_is_found():
    model, batch = cm3(), next(sampler("negative", True).epoch(1))
    with fake_device():
        model, batch = moved(model, "cuda"), moved(batch, "cuda")
        model.modalities[1].features = torch.empty(ITEMS, 7)  # type: ignore[index, union-attr, assignment]
        with pytest.raises(FakeTensorDeviceMismatchError), torch.no_grad():
            model.training_embeddings(0)
