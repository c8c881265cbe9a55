"""The embedded autoencoders go to a hub on this computer and come back: cards, snippets, and the app on what came."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from gradio_client import Client

from core.sae.collection import EMBEDDED, find_collection
from core.ui.backend.runtime import Runtime
from tests.fakes.hub import Hub, environment, point_client_at, serve
from training.common.report import Table
from training.hub.cards import write_sae_card
from training.hub.publish import publish
from training.hub.release import make_release

REPO, TABLES = "some-one/picturebook-saes", "some-one/picturebook-concepts"
FIGURES = {"explained_variance": 0.5, "explained_variance_low": 0.5, "explained_variance_high": 0.5}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub on which the embedded collection was published, under figures that nobody measured."""
    root = Path(shutil.copytree(EMBEDDED["picturebook"], tmp_path_factory.mktemp("release") / "saes"))
    (root / "manifest.jsonl").unlink()
    figures = {i.path: {**FIGURES, "l0": 1.0, "dead_share": 0.0} for i in find_collection(root).ids}
    write_sae_card(root, str(root), [Table("sae", "Measured", [{"what": 1.0}], details={"figures": figures})])
    with serve() as running, pytest.MonkeyPatch.context() as patch:
        point_client_at(running, tmp_path_factory.mktemp("cache"), patch)
        publish(make_release(root, REPO, TABLES))
        yield running


def program(*words: str, hub: Hub, home: Path) -> subprocess.Popen[str]:
    """Python, as somebody who has an empty cache and no token."""
    told = {**os.environ, "OMP_NUM_THREADS": "1", **environment(hub, home, token=None)}
    told.pop("HF_TOKEN", None)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], env=told, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def stranger(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub as this process sees it with an empty cache and no token."""
    point_client_at(hub, tmp_path / "cache", monkeypatch, token=None)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    hub.log.clear()
    return hub


def test_the_cards_snippets_run_as_they_stand(stranger: Hub) -> None:
    hub = stranger
    cards = [hub.model(REPO).files["README.md"].decode(), hub.dataset(TABLES).files["README.md"].decode()]
    blocks = [block for card in cards for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)]
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    sae, code, x = names["sae"], names["code"], names["x"]
    assert (sae.cfg.d_in, len(names["table"])) == (192, 768)
    assert float((sae.decode(code) - x).square().sum() / x.square().sum()) < 0.3
    weights = {path for path in hub.asked("resolve") if path.endswith("sae_weights.safetensors")}
    assert [path.split("/")[-4:-1] for path in weights] == [["mid_block.attentions.0", "cond", "tall"]]


def test_the_page_finds_the_concepts_that_came_down(stranger: Hub) -> None:
    runtime = Runtime("picturebook", device="cpu", saes=REPO)
    runtime._load()
    assert runtime.error is None
    dictionary = runtime.dictionary
    assert dictionary is not None
    assert dictionary.source == REPO
    table = next(iter(dictionary.tables.values()))
    assert "penguin" in table[table.numbers("penguin")[0]].gallery[0].entry.prompt
    for name in ("sae_weights.safetensors", "concepts.parquet"):
        assert len([path for path in stranger.asked("resolve", "GET") if path.endswith(name)]) == 8


@pytest.mark.slow
def test_the_app_runs_on_what_came_down(hub: Hub, tmp_path: Path) -> None:
    hub.log.clear()
    run = program("app.py", "--saes", REPO, hub=hub, home=tmp_path)
    try:
        assert run.stdout is not None
        told = ""
        while "is ready after" not in told:
            line = run.stdout.readline()
            assert line, told  # at the end it has given up
            told += line
        address = re.search(r"The page is at (\S+)", told)
        assert address, told
        client = Client(address[1], verbose=False)
        (best, *_) = client.predict("penguin", api_name="/concepts")["hits"]
        concept = client.predict(best["hookpoint"], best["branch"], best["number"], api_name="/concept")
        assert concept["label"] == "penguin"
        assert "penguin" in concept["gallery"][0]["prompt"]
        found = client.predict("a penguin on the snow", 0, 4, 4.0, 1, "", "cond", "readout", api_name="/layout")
        assert "penguin" in found["classes"]
    finally:
        run.terminate()
        run.wait(60)
    assert len([path for path in hub.asked("resolve", "GET") if path.endswith("sae_weights.safetensors")]) == 8
    assert len([path for path in hub.asked("resolve", "GET") if path.endswith("concepts.parquet")]) == 8
