"""Whose weights and whose code are loaded: pickles, checkpoints of something else, and models that bring code."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers
import torch
from fixtures_extractors import no_room_on_the_device, shape
from safetensors.torch import load_file, save_file

import extractors
from cm3.common.errors import UserError

IMAGE = shape("circle", "blue", 64)
TEXTS = ["red shoe", "blue bag for women"]


class Code:
    """What a pickle may hold: a call, made when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_transformers.save_text("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def sentence(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of the same weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    folder = tmp_path_factory.mktemp("sentence")
    body = Transformer(str(bert))
    SentenceTransformer(modules=[body, Pooling(32)], device="cpu").save(str(folder))
    return folder


def load(backend: str, weights: Path, **more: Any) -> Any:
    modality = "text" if backend in ("sentence-transformers", "transformers-text") else "image"
    return extractors.load({"modality": modality, "backend": backend, "weights": str(weights), "device": "cpu"} | more)


def pickled(source: Path, folder: Path, name: str, extra: Any = None) -> Path:
    """Copy a model folder, its weights as a pickle, with something more in it."""
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    weights: dict[str, Any] = load_file(file)
    file.unlink()
    torch.save(weights if extra is None else weights | {"extra": extra}, folder / name)
    return folder


def assert_same_model(found: Any, expected: Any, inputs: list[Any]) -> None:
    """Compare the weights of two extractors bit by bit, and their vectors within rounding.

    Weights from safetensors stay in the mapped file, whose header decides their alignment in memory; those from a pickle
    are aligned to 64 bytes. CPU kernels sum in another order where memory is not aligned, so the last digit may differ.
    """
    weights, others = found.model.state_dict(), expected.model.state_dict()
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    np.testing.assert_allclose(found.run(inputs).embedding, expected.run(inputs).embedding, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["transformers-text", "sentence-transformers"])
def test_a_pickle_of_tensors_loads_and_one_with_more_is_refused_unread(
    request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    source = request.getfixturevalue("bert" if backend == "transformers-text" else "sentence")
    tensors = load(backend, pickled(source, tmp_path / "tensors", "pytorch_model.bin"))
    assert_same_model(tensors, load(backend, source), TEXTS)
    mark = tmp_path / "mark"
    bad = pickled(source, tmp_path / "code", "pytorch_model.bin", Code(mark))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: a pickle with more than tensors"):
        load(backend, bad)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_image_weights_may_be_pickles_of_tensors_too(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    weights = timm.create_model("test_efficientnet", num_classes=7).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pth")
    torch.save(weights | {"more": Code(tmp_path / "mark")}, tmp_path / "bad.pth")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(weights))
    knobs = {"model": "test_efficientnet", "input_size": 64}
    expected = load("timm", tmp_path / "w.safetensors", **knobs)
    assert_same_model(load("timm", tmp_path / "w.pth", **knobs), expected, [IMAGE])
    for bad in ("bad.pth", "plain.pt"):
        with pytest.raises(UserError, match="a pickle with more than tensors"):
            load("timm", tmp_path / bad, **knobs)
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(UserError, match=r"weights must be a \.safetensors file or a pickle of tensors"):
        load("timm", tmp_path / "w.h5", **knobs)
    assert not (tmp_path / "mark").exists()


def test_pickled_vision_weights_of_transformers_and_open_clip(tmp_path: Path) -> None:
    import open_clip

    vit = tiny_transformers.save_vision("vit", tmp_path / "vit")
    tensors = load("transformers-vision", pickled(vit, tmp_path / "vit-bin", "pytorch_model.bin"))
    assert_same_model(tensors, load("transformers-vision", vit), [IMAGE])

    clip = tmp_path / "clip"
    clip.mkdir()
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1},
    }
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**config).state_dict(), clip / "open_clip_model.safetensors")
    tensors = load("open_clip", pickled(clip, tmp_path / "clip-bin", "open_clip_pytorch_model.bin"))
    assert_same_model(tensors, load("open_clip", clip), [IMAGE])
    bad = pickled(clip, tmp_path / "clip-bad", "open_clip_pytorch_model.bin", Code(tmp_path / "mark"))
    with pytest.raises(UserError, match="a pickle with more than tensors"):
        load("open_clip", bad)
    (clip / "open_clip_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="not weights of an open_clip model"):
        load("open_clip", clip)
    assert not (tmp_path / "mark").exists()


def test_pickles_that_are_loaded_are_part_of_the_identity_and_others_are_not(bert: Path, tmp_path: Path) -> None:
    data = {"modality": "text", "backend": "transformers-text"}

    def identity(folder: Path) -> dict[str, Any]:
        return extractors.parse_extractor("m", data | {"weights": str(folder)}, "m").identity()

    folder = pickled(bert, tmp_path / "bin", "pytorch_model.bin")
    before = identity(folder)
    torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")
    after = identity(folder)
    assert after != before
    (folder / "training_args.bin").write_bytes(b"anything")
    assert identity(folder) == after
    shutil.copytree(bert, tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"never read, for safetensors are next to it")
    assert identity(tmp_path / "both") == identity(bert)
    assert load("transformers-text", tmp_path / "both").dim == 32
    # open_clip reads its own pickle even where the weights of transformers are next to it.
    torch.save({}, tmp_path / "both" / "open_clip_pytorch_model.bin")
    assert identity(tmp_path / "both") != identity(bert)


@pytest.mark.parametrize("backend", ["transformers-text", "sentence-transformers"])
def test_random_weights_are_never_used(request: pytest.FixtureRequest, tmp_path: Path, backend: str) -> None:
    source = request.getfixturevalue("bert" if backend == "transformers-text" else "sentence")
    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    kept = {name: tensor for name, tensor in weights.items() if name != lost}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors of BertModel, .*layer\.1\.output\.dense\.weight is not in the"):
        load(backend, folder)
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(UserError, match="that can be loaded safely"):
        load(backend, folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_of_another_shape_are_refused_through_another_library(
    sentence: Path, tmp_path: Path, suffix: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(sentence, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name] = weights[name][:, :32].clone()
    if suffix == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} has the shape \[32, 32\] in the checkpoint instead of \[32, 64\]"):
        load("sentence-transformers", folder)


def test_an_unused_pooler_may_be_missing_and_more_tensors_are_logged(
    sentence: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(sentence, folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "pooler." not in name}
    save_file(weights | {"cls.bias": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    expected = load("sentence-transformers", sentence).run(TEXTS).embedding
    with caplog.at_level("INFO"):
        found = load("sentence-transformers", folder)
    np.testing.assert_allclose(found.run(TEXTS).embedding, expected, rtol=1e-5, atol=1e-6)
    assert f"{folder}: 1 tensors are not used by BertModel, such as cls.bias" in caplog.text


def test_checkpoints_that_transformers_converts_are_whole(sentence: Path, tmp_path: Path) -> None:
    """Names that only transformers itself can match: those of a base model in another, and of old norms."""
    folder = tmp_path / "m"
    shutil.copytree(sentence, folder)
    weights = load_file(folder / "model.safetensors")
    old = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in weights.items()
    }
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_model(load("sentence-transformers", folder), load("sentence-transformers", sentence), TEXTS)


def test_transformers_is_left_as_it_was(bert: Path) -> None:
    from transformers import PreTrainedModel

    before = PreTrainedModel.__dict__["from_pretrained"]
    load("transformers-text", bert)
    assert PreTrainedModel.__dict__["from_pretrained"] is before


@pytest.mark.parametrize("backend", ["transformers-text", "transformers-vision"])
def test_memory_that_runs_out_while_a_model_loads_is_reported(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    folder = bert if backend == "transformers-text" else tiny_transformers.save_vision("vit", tmp_path / "vit")
    no_room_on_the_device(monkeypatch)
    with pytest.raises(UserError, match="memory ran out while the model was loaded"):
        load(backend, folder)


MODEL = """
from pathlib import Path
import torch
from transformers import PreTrainedModel, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

Path(MARK).touch()

class ToyConfig(PreTrainedConfig):
    model_type = "toy-with-code"

class Toy(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(32, 8)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **_):
        return BaseModelOutput(last_hidden_state=self.words(input_ids))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose folder holds the code that it needs; running it leaves a mark."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "toy.py").write_text(MODEL.replace("MARK", repr(str(tmp_path / "mark"))))
    config = {
        "model_type": "toy-with-code",
        "hidden_size": 8,
        "auto_map": {"AutoConfig": "toy.ToyConfig", "AutoModel": "toy.Toy"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"words.weight": torch.randn(32, 8)}, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_transformers.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", ["transformers-text", "sentence-transformers"])
def test_code_that_a_model_brings_runs_only_where_the_config_says_so(toy: Path, backend: str) -> None:
    mark = toy.parent / "mark"
    with pytest.raises(UserError, match=r"includes its own code \(toy\.Toy, toy\.ToyConfig\).*trust_remote_code: true"):
        load(backend, toy)
    assert not mark.exists()
    trusted = load(backend, toy, trust_remote_code=True)
    assert mark.exists() and trusted.run(TEXTS).embedding.shape == (2, 8)


def test_a_model_that_hides_its_loading_info_is_checked_too(toy: Path) -> None:
    own = """
    @classmethod
    def from_pretrained(cls, *arguments, **options):
        found = super().from_pretrained(*arguments, **options)
        return found[0] if isinstance(found, tuple) else found
"""
    (toy / "toy.py").write_text((toy / "toy.py").read_text() + own)
    assert load("transformers-text", toy, trust_remote_code=True).dim == 8
    save_file({"other.weight": torch.randn(32, 8)}, toy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors of Toy, .* words\.weight is not in the checkpoint"):
        load("transformers-text", toy, trust_remote_code=True)


def test_modules_of_sentence_transformers_are_code_too(sentence: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(sentence, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "own_pooling.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "own_pooling.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    with pytest.raises(UserError, match=r"includes its own code \(own_pooling\.Pooling\)"):
        load("sentence-transformers", folder)
    assert not (tmp_path / "mark").exists()


def test_trusted_code_is_part_of_the_identity_and_comes_from_one_place(toy: Path) -> None:
    data = {"modality": "text", "backend": "transformers-text", "weights": str(toy)}

    def identity(**more: Any) -> dict[str, Any]:
        return extractors.parse_extractor("m", data | more, "m").identity()

    before = identity(), identity(trust_remote_code=True)
    (toy / "toy.py").write_text((toy / "toy.py").read_text() + "# other\n")
    assert identity() == before[0] and identity(trust_remote_code=True) != before[1]
    config = json.loads((toy / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "somebody/else--toy.Toy"
    (toy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its code toy\.Toy comes from the repository somebody/else, whose revision"):
        load("transformers-text", toy, trust_remote_code=True)
    assert not (toy.parent / "mark").exists()
