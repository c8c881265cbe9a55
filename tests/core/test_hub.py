"""What is fetched from the Hub, through the real client from a hub on this computer."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import core
from core.artifacts import MANIFEST, READ, Files, Source, check_name, find_source, read_manifest
from core.errors import ArtifactError
from core.sae.autoencoder import SaeId
from core.sae.collection import find_collection, write_index
from core.sae.io import read_sae
from tests.core.concepts.test_table import DOWN, IDS, MIDDLE, NAMES, UP, write_one
from tests.fakes.hub import Hub
from training.hub.cards import manifest_lines, manifest_text

SAES, TABLES = "some-one/saes", "some-one/concepts"


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four SAEs with their tables."""
    root = tmp_path / "collection"
    for seed, sae_id in enumerate(IDS):
        write_one(root, sae_id, NAMES, seed)
        edit_json(root / sae_id.path / "cfg.json", metadata={"k": 2, "n_samples": 1, "seed": seed})
    write_index(root, IDS, model="picturebook", tables=TABLES)
    (root / MANIFEST).write_text(manifest_text(manifest_lines(root, IDS, {})))
    return root


@pytest.fixture
def published(hub: Hub, folder: Path) -> Hub:
    """The same on the hub, in two repositories; without a gallery."""
    files = contents(folder)
    is_table = ("concepts.parquet", "counts.safetensors", "examples.safetensors")
    hub.put("model", SAES, {path: data for path, data in files.items() if not path.endswith(is_table)})
    hub.put("dataset", TABLES, {path: files[path] for path in files if path.endswith((*is_table, MANIFEST))})
    return hub


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def fetched(hub: Hub) -> list[str]:
    return [path.partition("/resolve/")[2].partition("/")[2] for path in hub.asked("resolve", "GET")]


def test_one_sae_does_not_download_the_others(published: Hub) -> None:
    core.load_sae(SAES, *IDS[1])
    files = [f"{IDS[1].path}/{name}" for name in ("cfg.json", "sae_weights.safetensors")]
    assert fetched(published) == ["config.json", MANIFEST, *files]


def test_a_table_downloads_only_the_files_that_are_used(published: Hub) -> None:
    table = core.load_concepts(SAES, UP)
    assert [hit.number for hit in table.search("whale")] == [2, 0]
    of_table = [path for path in published.asked("resolve", "GET") if path.startswith("/datasets/")]
    assert [path.rpartition("/")[2] for path in of_table] == ["concepts.parquet", MANIFEST]
    assert {path.split("/")[0] for path in fetched(published)} == {UP, "config.json", MANIFEST}
    assert table.counts.intersections.shape == (10, 6)
    assert fetched(published)[-1] == f"{UP}/cond/tall/counts.safetensors"


def test_all_files_are_of_one_commit_though_the_branch_moves(published: Hub, folder: Path) -> None:
    collection = find_collection(SAES)
    assert collection.ids == list(IDS)
    old = core.load_sae(folder, *IDS[1]).W_dec
    write_one(folder, IDS[1], NAMES, 77)
    published.put("model", SAES, contents(folder))
    assert torch.equal(core.load_sae(collection, *IDS[1]).W_dec, old)
    assert not torch.equal(read_sae(folder / IDS[1].path).W_dec, old)


def test_what_was_fetched_is_not_fetched_again_and_serves_offline(
    published: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, table = core.load_sae(SAES, *IDS[1]), core.load_concepts(SAES)
    n = len(published.asked("resolve", "GET"))
    core.load_concepts(SAES)
    assert len(published.asked("resolve", "GET")) == n
    published.log.clear()
    published.fail("resolve", "drop", times=1000)  # the network is gone
    assert torch.equal(core.load_sae(SAES, *IDS[1]).W_dec, sae.W_dec)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    published.log.clear()
    assert torch.equal(core.load_sae(SAES, *IDS[1]).W_dec, sae.W_dec)
    assert core.load_concepts(SAES).frame.equals(table.frame)
    assert not published.log
    with pytest.raises(ArtifactError, match=rf"{UP}/cond/tall/cfg\.json of {SAES} is not in this computer's cache"):
        core.load_sae(SAES, UP, "cond")


def test_a_download_that_breaks_off_goes_on_where_it_was(published: Hub, folder: Path) -> None:
    published.fail("resolve", "drop", on="sae_weights")  # of the question how large it is
    published.fail("resolve", "drop", times=2, on="sae_weights")  # and in the middle of it
    assert torch.equal(core.load_sae(SAES, *IDS[1]).W_dec, core.load_sae(folder, *IDS[1]).W_dec)
    assert not [fault for fault in published.faults if fault["left"]]


def test_too_many_requests_are_retried(published: Hub) -> None:
    published.fail("resolve", 429, times=2)
    core.load_sae(SAES, *IDS[1])


@pytest.mark.parametrize("how", [500, "drop"])
@pytest.mark.parametrize("name", ["config.json", MANIFEST, "cfg.json", "sae_weights"])
def test_failed_downloads_are_reported(published: Hub, how: int, name: str) -> None:
    published.fail("resolve", how, times=1000, on=name)
    with pytest.raises(ArtifactError, match=f"{name}.* could not be fetched from"):
        core.load_sae(SAES, *IDS[1])
    published.faults.clear()
    core.load_sae(SAES, *IDS[1])


def test_a_file_with_another_hash_is_refused_and_fetched_anew_once_it_is_right(published: Hub, folder: Path) -> None:
    published.fail("resolve", "corrupt", times=1000, on="sae_weights")
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"sae_weights.safetensors of some-one/saes is not the file that"):
            core.load_sae(SAES, *IDS[1])
    published.faults.clear()
    assert torch.equal(core.load_sae(SAES, *IDS[1]).W_dec, core.load_sae(folder, *IDS[1]).W_dec)
    published.fail("resolve", "corrupt", times=1000, on="concepts.parquet")
    with pytest.raises(ArtifactError, match=r"concepts.parquet of some-one/concepts is not the file that"):
        core.load_concepts(SAES)


def test_a_folder_is_checked_against_its_manifest_too(folder: Path) -> None:
    edit_json(folder / "config.json", tables=None)
    core.load_concepts(folder)
    shutil.copy(folder / IDS[2].path / "concepts.parquet", folder / IDS[1].path)
    with pytest.raises(ArtifactError, match=r"concepts.parquet of .*collection is not the file that manifest"):
        core.load_concepts(folder)


def test_a_folder_of_saes_alone_takes_its_tables_from_the_hub(published: Hub, folder: Path) -> None:
    for path in folder.rglob("*.parquet"):
        path.unlink()
    assert core.load_concepts(folder).labels
    assert all(path.startswith(f"/datasets/{TABLES}/") for path in published.asked("resolve"))


def test_a_repository_without_index_and_manifest_is_read_offline_too(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = contents(folder / IDS[1].path)
    hub.put("model", "other/saes", {f"{IDS[1].path}/{name}": data for name, data in files.items()})
    for offline in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
            assert torch.equal(core.load_sae("other/saes", *IDS[1]).W_dec, core.load_sae(folder, *IDS[1]).W_dec)
    with pytest.raises(ArtifactError, match=rf"other/saes has no SAE {IDS[0].path}. Did you mean {IDS[1].path}"):
        core.load_sae("other/saes", *IDS[0])
    with pytest.raises(ArtifactError, match=r"from no/where on the Hub.*\(404\).*hf auth login"):
        core.load_sae("no/where", *IDS[0])


@pytest.mark.usefixtures("published")
def test_an_sae_that_is_not_there_is_answered_with_what_is() -> None:
    with pytest.raises(ArtifactError, match=rf"no SAE {MIDDLE}/uncond/tall. Did you mean {MIDDLE}/cond/tall"):
        core.load_sae(SAES, MIDDLE, "uncond")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret.json", "a/../../secret.json", "/etc/secret.json", "a//b.json", "./a.json", "a\\..\\b.json", ""]
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "in" / "a").mkdir(parents=True)
    for source in (Source("here", tmp_path / "in"), Source("x/y", None, "x/y")):
        with pytest.raises(ArtifactError, match=r"outside the artifact's folder"):
            Files(source).find(name)


def test_an_sae_outside_of_its_collection_is_refused(folder: Path) -> None:
    inner = folder / "inner"
    write_index(inner, [SaeId("..", "cond", "all")])
    assert find_collection(inner).ids == []
    shutil.copytree(folder / IDS[1].path, folder / "cond" / "tall")
    with pytest.raises(ArtifactError, match="outside the artifact's folder"):
        core.load_sae(inner, "..", "cond")


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST).unlink()
    weights = folder / IDS[1].path / "sae_weights.safetensors"
    (folder / "large").mkdir()
    weights.rename(folder / "large" / "weights")
    weights.symlink_to(folder / "large" / "weights")
    core.load_sae(folder, *IDS[1])
    core.load_sae(tmp_path / folder.name, *IDS[1])
    shutil.move(folder / "large", tmp_path / "elsewhere")
    weights.unlink()
    weights.symlink_to(tmp_path / "elsewhere" / "weights")
    with pytest.raises(ArtifactError, match="it is a link out of"):
        core.load_sae(folder, *IDS[1])


@pytest.mark.usefixtures("published")
def test_a_snapshot_of_the_hubs_cache_is_a_folder_like_any_other() -> None:
    path = find_collection(SAES).files.fetch("config.json")
    core.load_sae(SAES, *IDS[1])
    assert path.is_symlink()
    assert core.load_sae(path.parent, *IDS[1]).cfg.d_in == 8


@pytest.mark.parametrize("tables", ["../concepts", "/tmp", "concepts", 7, ["a/b"], "a/b@../c"])
def test_an_index_that_names_no_dataset_as_tables_is_refused(published: Hub, tables: object) -> None:
    index = {**json.loads(published.model(SAES).files["config.json"]), "tables": tables}
    published.put("model", SAES, {"config.json": json.dumps(index).encode()})
    core.load_sae(SAES, *IDS[1])
    with pytest.raises(ArtifactError, match="no dataset on the Hub"):
        core.load_concepts(SAES)


def test_pickles_are_refused_wherever_they_are(published: Hub, folder: Path) -> None:
    for name in ("model.pt", "sae.bin", "weights.pkl", "a/code.py", "weights.safetensors.pth"):
        with pytest.raises(ArtifactError, match="never a pickle"):
            check_name(name)
    assert all(check_name(f"a/b{ending}") is None for ending in READ)
    (folder / MANIFEST).unlink()
    weights = folder / IDS[1].path / "sae_weights.safetensors"
    weights.rename(weights.with_suffix(".pt"))
    with pytest.raises(ArtifactError, match=r"only .*sae_weights\.pt, a pickle, which is never loaded"):
        core.load_sae(folder, *IDS[1])
    published.put("model", "a/pickle", {f"{IDS[1].path}/cfg.json": b"{}", f"{IDS[1].path}/sae.pt": b"\x80\x04."})
    with pytest.raises(ArtifactError, match=r"has no sae\.safetensors .* a pickle"):
        core.load_sae("a/pickle", *IDS[1])
    assert not [path for path in published.asked("resolve") if path.endswith(".pt")]


def test_a_pickle_under_another_name_is_not_unpickled(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST).unlink()
    trace = tmp_path / "it ran"
    code = f"cbuiltins\nexec\n(V__import__('pathlib').Path({str(trace)!r}).touch()\ntR.".encode()
    (folder / IDS[1].path / "sae_weights.safetensors").write_bytes(code)
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        core.load_sae(folder, *IDS[1])
    assert not trace.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {}}', '{"path": 3}', '{"path": "a", "files": []}'])
def test_a_damaged_manifest_is_reported(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(f"{text}\n")
    with pytest.raises(ArtifactError, match=r"manifest\.jsonl is damaged"):
        core.load_sae(folder, *IDS[1])
    with pytest.raises(ArtifactError, match="damaged"):
        read_manifest(folder / MANIFEST)


def test_names_of_repositories() -> None:
    assert find_source("a-b/c.d") == ("a-b/c.d", None, "a-b/c.d", None)
    assert find_source("a/b@refs/pr/1") == ("a/b@refs/pr/1", None, "a/b", "refs/pr/1")
    for name in ("a", "a/b/c", "../b", "./b", "~/b", "a/..", "a/b@../c", "a/b@c/../d", "a/b@/c", "/a/b"):
        assert find_source(name) is None, name


def test_sparsify_folders_come_from_the_hub_too(hub: Hub, folder: Path, tmp_path: Path) -> None:
    sae, there = core.load_sae(folder, DOWN, "cond"), tmp_path / "sae.safetensors"
    save_file({name: value.clone() for name, value in sae.state_dict().items()}, there)
    cfg = json.dumps({"activation": "topk", "num_latents": 10, "expansion_factor": 1, "k": 2, "d_in": 8}).encode()
    path = IDS[0].path
    hub.put("model", "x/y", {f"{path}/cfg.json": cfg, f"{path}/sae.safetensors": there.read_bytes()})
    assert torch.equal(core.load_sae("x/y", *IDS[0]).W_dec, sae.W_dec)


@pytest.mark.usefixtures("published")
def test_an_index_that_was_damaged_in_a_download_is_fetched_again() -> None:
    core.load_sae(SAES, *IDS[1])
    path = find_collection(SAES).files.fetch("config.json")
    path.write_bytes(b"{")  # in the cache; no manifest of an earlier version lists it
    assert torch.equal(core.load_sae(SAES, *IDS[1]).W_dec, core.load_sae(SAES, *IDS[1]).W_dec)
    assert json.loads(path.read_bytes())["model"] == "picturebook"


def test_an_index_that_the_manifest_lists_is_checked(hub: Hub, folder: Path) -> None:
    files = {path: data for path, data in contents(folder).items() if not path.endswith("parquet")}
    digest = hashlib.sha256(files["config.json"]).hexdigest()
    files[MANIFEST] += json.dumps({"path": "", "files": {"config.json": digest}}).encode() + b"\n"
    hub.put("model", SAES, files)
    core.load_sae(SAES, *IDS[1])
    hub.put("model", SAES, {"config.json": files["config.json"].replace(b"picturebook", b"picturebrook")})
    with pytest.raises(ArtifactError, match=r"config\.json of some-one/saes is not the file"):
        core.load_sae(SAES, *IDS[1])
