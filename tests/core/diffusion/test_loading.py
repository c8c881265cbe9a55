"""Which files are read, in which precision, where to; and what is said where that cannot be done."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from core.artifacts import find_model
from core.diffusion import loading
from core.diffusion.loading import load_model, needs_offload
from core.errors import ModelError
from core.information.attribution import attribute
from core.pipeline_folder import choose_variants
from core.spec import BUILT_IN
from tests.conftest import make_pipeline

PROMPT = "a cat on the grass"
NAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PLAIN = [f"{part}/{name}.safetensors" for part, name in NAMES.items()]
HALF = [f"{part}/{name}.fp16.safetensors" for part, name in NAMES.items()]
SHARDS = [f"{part}/{name}.fp16-0000{i}-of-00002.safetensors" for part, name in NAMES.items() for i in (1, 2)]
OTHERS = ["safety_checker/model.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/model.bin"]


@pytest.mark.parametrize(
    ("files", "prefer_half", "expected"),
    [
        ([*PLAIN, *HALF, *OTHERS], True, ("fp16",) * 3),
        ([*PLAIN, *HALF, *OTHERS], False, (None,) * 3),
        ([*PLAIN, *SHARDS], True, ("fp16",) * 3),
        ([*PLAIN, *HALF[:2]], True, ("fp16", "fp16", None)),  # each component by itself, as diffusers does
        ([HALF[0], *PLAIN[1:]], False, ("fp16", None, None)),
        (HALF, False, ("fp16",) * 3),  # there is nothing else
        ([OTHERS[1], *PLAIN[1:]], True, ("non_ema", None, None)),
        ([OTHERS[1], HALF[0], *PLAIN[1:]], False, ("non_ema", None, None)),
        (["vae/diffusion_pytorch_model-00001-of-00002.bf16.safetensors", "vae/lora.safetensors"], False, ("bf16",)),
        ([], True, ()),
    ],
)
def test_each_component_has_the_weights_that_fit_best(
    files: Sequence[str], prefer_half: bool, expected: tuple[str | None, ...]
) -> None:
    found = choose_variants(files, prefer_half=prefer_half)
    assert tuple(found[part] for part in (*NAMES,) if part in found) == expected


@dataclass
class Listed:
    """A file as a dry run lists it."""

    filename: str
    will_download: bool
    file_size: int = 10**9


class Hub:
    """Replaces `snapshot_download`: a repository with both kinds of weights, and a cache."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.cache, self.online, self.asked = source, cache, True, 0

    def __call__(
        self,
        repo_id: str,
        *,
        revision: str | None,
        dry_run: bool = False,
        local_files_only: bool = False,
        allow_patterns: Sequence[str] = (),
    ) -> Any:
        assert repo_id == "some/model"
        del revision
        if not local_files_only:
            self.asked += 1
            if not self.online:
                raise OSError("no network")
        files = [path.relative_to(self.source).as_posix() for path in self.source.rglob("*") if path.is_file()]
        if dry_run:
            return [Listed(name, not (self.cache / name).exists()) for name in files]
        for name in files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns) and not (self.cache / name).exists():
                if local_files_only:
                    raise FileNotFoundError(name)
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.source / name, self.cache / name)
        return str(self.cache)

    @property
    def cached(self) -> list[str]:
        return sorted(p.relative_to(self.cache).as_posix() for p in self.cache.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in full and in half precision, with a safety checker's weights."""
    folder = tmp_path_factory.mktemp("models") / "both"
    make_pipeline().save_pretrained(folder, safe_serialization=True)
    make_pipeline().to(torch.float16).save_pretrained(folder, safe_serialization=True, variant="fp16")
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / PLAIN[0], folder / name)
    return folder


@pytest.fixture
def hub(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(both, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


@pytest.mark.parametrize(("dtype", "expected"), [("float32", PLAIN), ("float16", HALF), ("bfloat16", HALF)])
def test_only_what_is_read_is_fetched(hub: Hub, dtype: str, expected: list[str]) -> None:
    model = load_model("some/model", device="cpu", dtype=dtype)
    assert hub.cached == sorted(expected)
    assert model.dtype == model.text_embeddings([PROMPT]).dtype == getattr(torch, dtype)


def test_a_commit_that_is_cached_is_loaded_without_asking(hub: Hub) -> None:
    load_model(f"some/model@{'0' * 40}", device="cpu", dtype="float16")
    assert hub.asked == 3  # for the list, for what kind of model it is, and for the weights
    assert load_model(f"some/model@{'0' * 40}", device="cpu").dtype == torch.float32  # from the files that are there
    assert hub.asked == 3
    load_model("some/model@main", device="cpu")  # which may have moved
    assert hub.asked == 6


def test_without_a_network_the_cache_will_do(hub: Hub) -> None:
    load_model("some/model", device="cpu")
    hub.online = False
    load_model("some/model", device="cpu", dtype="bfloat16")
    shutil.rmtree(hub.cache / "vae")
    with pytest.raises(ModelError, match="no network"):
        load_model("some/model", device="cpu")


def test_the_error_about_missing_weights_has_their_size_and_source(hub: Hub) -> None:
    hub.online = False
    with pytest.raises(ModelError, match=r"(?s)'sd'.*2\.1 GB in half.*4\.3.*co/some/model at revision x: .*no network"):
        load_model(replace(BUILT_IN["sd-v1-4"], name="sd", source="some/model", revision="x"), device="cpu")
    with pytest.raises(ModelError, match=r"(?s)could not be fetched from.*'picturebook' needs no download"):
        load_model("some/model", device="cpu")


def test_the_size_in_messages_is_that_of_the_published_configuration() -> None:
    from training.benchmark.full_size import components

    with torch.device("meta"):
        modules = components()
    n_weights = sum(weight.numel() for module in modules.values() for weight in module.parameters())
    assert BUILT_IN["sd-v1-4"].gigabytes == pytest.approx(4 * n_weights / 1e9, abs=0.05)


def test_hookpoints_can_be_given_and_are_checked(model_folder: Path) -> None:
    given = load_model(model_folder, hookpoints=["mid_block.attentions.0"])
    assert given.hookpoints == ("mid_block.attentions.0",)
    with pytest.raises(ModelError, match=r"down_blocks\.1.*Its blocks are: down_blocks\.0\.attentions\.0, mid_block"):
        load_model(model_folder, hookpoints=["down_blocks.1.attentions.0"])


def test_half_precision_files_are_computed_in_full(tmp_path: Path) -> None:
    make_pipeline().to(torch.float16).save_pretrained(tmp_path / "half", safe_serialization=True)
    model = load_model(tmp_path / "half", device="cpu")
    assert model.dtype == torch.float32
    assert model.text_embeddings([PROMPT]).dtype == torch.float32


def test_what_cannot_be_computed_in_is_refused(model_folder: Path) -> None:
    with pytest.raises(ModelError, match="float32, bfloat16, float16, not in 'float8'"):
        load_model(model_folder, dtype="float8")


def test_the_text_encoder_can_be_kept_apart(model_folder: Path) -> None:
    narrow = load_model(model_folder, device="cpu", dtype="bfloat16")
    apart = load_model(model_folder, device="cpu", dtype="bfloat16", text_device="cpu")
    assert narrow.text_embeddings([PROMPT]).dtype == torch.bfloat16
    assert apart.text_embeddings([PROMPT]).dtype == torch.float32
    assert apart.generate(PROMPT, num_inference_steps=1).latents.isfinite().all()
    moved = load_model(model_folder, device="meta", dtype="bfloat16", text_device="cpu")
    assert (moved.unet.device.type, moved.text_embeddings([PROMPT]).device.type) == ("meta", "cpu")


# --- little memory ----------------------------------------------------------------------------------------------------


def free(n_bytes: int) -> Callable[..., tuple[int, int]]:
    return lambda *_: (n_bytes, 2**40)


def test_parts_take_turns_where_a_gpu_has_too_little_memory_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    modules, cuda = [torch.nn.Linear(1000, 1000, bias=False, dtype=torch.float16)], torch.device("cuda")
    enough = 2 * 10**6 + loading.WORKING_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", free(enough))
    assert not needs_offload(modules, cuda)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free(enough - 1))
    assert needs_offload(modules, cuda)
    assert not needs_offload(modules, torch.device("cpu"))


def test_loading_reads_the_free_memory(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", free(10**6))
    monkeypatch.setattr(loading, "_offload", lambda _pipeline, _spec, device: taken.append(device))
    model = load_model(model_folder, device="cuda")
    assert taken == [torch.device("cuda")]
    assert (model.device.type, model.unet.device.type, model.dtype) == ("cuda", "cpu", torch.float16)


def test_parts_that_take_turns_compute_the_same(model_folder: Path) -> None:
    pytest.importorskip("accelerate")
    whole, turns = (load_model(model_folder, device="cpu", offload=offload) for offload in (False, True))
    hooks = [module._hf_hook for module in (turns.text_encoder._module, turns.unet, turns.codec._vae)]  # type: ignore[attr-defined]
    entered = dict.fromkeys(hooks, 0)
    for hook in hooks:
        before = hook.pre_forward

        def counted(*args: Any, hook: Any = hook, before: Any = before, **kwargs: Any) -> Any:
            entered[hook] += 1
            return before(*args, **kwargs)

        hook.pre_forward = counted
    a, b = (model.generate(PROMPT, seed=1, num_inference_steps=2) for model in (whole, turns))
    assert torch.equal(a.latents, b.latents)
    assert a.image.tobytes() == b.image.tobytes()
    assert list(entered.values()) == [2, 2, 3]  # two texts, two steps, two previews and the picture
    maps = [attribute(model, a.image, PROMPT, words=["cat"], max_evals=128).maps for model in (whole, turns)]
    assert (maps[0] == maps[1]).all()


def test_without_accelerate_the_error_has_the_remedy(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines import pipeline_utils

    monkeypatch.setattr(pipeline_utils, "is_accelerate_available", lambda: False)
    with pytest.raises(ModelError, match="pip install accelerate"):
        load_model(model_folder, device="cpu", offload=True)


def test_only_large_models_are_narrow_on_a_gpu(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "needs_offload", lambda *_: True)
    monkeypatch.setattr(loading, "_offload", lambda *_: None)
    spec = replace(find_model(model_folder), half=False)
    assert load_model(spec, device="cuda").dtype == torch.float32
    assert not BUILT_IN["picturebook"].half
    assert BUILT_IN["sd-v1-4"].half
