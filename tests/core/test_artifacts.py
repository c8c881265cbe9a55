import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from core import artifacts
from core.artifacts import find_model, is_local
from core.errors import ModelError
from core.spec import BUILT_IN


def test_a_hub_id_may_name_its_revision() -> None:
    spec = find_model("some-one/a.model@refs_pr1")
    assert (spec.source, spec.revision) == ("some-one/a.model", "refs_pr1")
    assert find_model("some-one/a.model").revision is None
    assert find_model("sd-v1-4").revision == "133a221b8aa7292a167afc5127cb63fb5005638b"
    assert not is_local(spec)


def test_a_folder_is_found_and_named_after_itself(model_folder: Path) -> None:
    spec = find_model(model_folder)
    assert spec.name == "small"
    assert is_local(spec)


@pytest.mark.parametrize("name", ["picturbook", "no such thing", "./nowhere", "/nowhere/at/all"])
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(ModelError, match="picturebook, sd-v1-4"):
        find_model(name)


def test_a_near_miss_is_offered() -> None:
    with pytest.raises(ModelError, match="Did you mean 'picturebook'"):
        find_model("picturbook")


def test_the_embedded_model_that_is_not_made_yet_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(BUILT_IN["picturebook"], source=str(tmp_path / "model"))
    monkeypatch.setitem(artifacts.BUILT_IN, "picturebook", spec)
    with pytest.raises(ModelError, match="python -m training picturebook"):
        find_model("picturebook")


def test_pickles_are_refused_with_the_remedy(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder, folder)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"a pickle.*safe_serialization=True"):
        find_model(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights"):
        find_model(folder)


def test_a_broken_folder_says_what_is_missing(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelError, match=r"'vae'.*save_pretrained"):
        find_model(folder)
    (folder / "model_index.json").write_text(json.dumps(index)[:20])
    with pytest.raises(ModelError, match="not JSON"):
        find_model(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"not a StableDiffusionPipeline folder.*model_index\.json"):
        find_model(folder)
