"""Publishing a small collection to a hub on this computer, through the real client."""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import core
from core.artifacts import MANIFEST, read_manifest
from core.concepts.gallery import GalleryImage, write_gallery
from core.concepts.io import TABLE
from core.errors import ArtifactError
from core.sae.collection import write_index
from tests.core.concepts.test_table import IDS, NAMES, write_one
from tests.fakes.hub import TOKEN, Answer, Hub, environment, point_client_at
from training.common.report import ROOT, Table
from training.evaluate.run import EvalOptions, write_cards
from training.hub import publish as publishing
from training.hub.cards import write_sae_card
from training.hub.publish import Published, PublishError, publish
from training.hub.release import MARK, make_release

SAES, TABLES = "some-one/small-saes", "some-one/small-concepts"
RECIPE = {
    "model": "picturebook",
    "prompts": "grammar",
    "stream": {"batch_size": 4},
    "training": {"n_steps": 5, "gradient_accumulation_steps": 2, "architecture": "topk", "expansion": 2},
}
FIGURES = {"explained_variance": 0.8125, "explained_variance_low": 0.75, "explained_variance_high": 0.875}


def describe(root: Path) -> None:
    """What `evaluate sae --card` does, with other figures."""
    figures = {sae_id.path: {**FIGURES, "l0": 2.0, "dead_share": 0.125} for sae_id in IDS}
    write_sae_card(root, str(root), [Table("sae", "Measured", [{"what": 1.0}], details={"figures": figures})])


def make_collection(root: Path, seed: int = 0) -> Path:
    for number, sae_id in enumerate(IDS):
        write_one(root, sae_id, NAMES, seed + number)
    write_index(root, IDS, model="picturebook", recipe=RECIPE)
    images = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    write_gallery(root, images, [GalleryImage("a red sun", 1), GalleryImage("a blue whale", 2)], 16)
    describe(root)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_collection(tmp_path_factory.mktemp("collection"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "collection"))


def release(root: Path, *, private: bool = False) -> Published:
    return publish(make_release(root, SAES, TABLES), private=private)


def change(root: Path) -> None:
    """Another release of the same collection: one SAE is trained anew, and one is dropped."""
    write_one(root, IDS[1], NAMES, 99)
    shutil.rmtree(root / IDS[0].path)
    write_index(root, IDS[1:], model="picturebook", recipe=RECIPE)
    describe(root)


def test_what_is_published_is_what_is_loaded_in_one_commit_a_repository(root: Path, hub: Hub) -> None:
    done = release(root)
    assert done.changed == (TABLES, SAES)
    for repo in hub.repos.values():
        assert len(repo.commits) == 2  # the first makes the repository
    saes, tables = hub.model(SAES).files, hub.dataset(TABLES).files
    assert json.loads(saes["config.json"])["tables"] == f"{TABLES}@{done.tables}"
    last = json.loads(saes[MANIFEST].splitlines()[-1])
    assert last == {"path": "", "files": {"config.json": hashlib.sha256(saes["config.json"]).hexdigest()}}
    assert not [path for path in saes if path.endswith(("parquet", "webp", "counts.safetensors"))]
    assert not [path for path in tables if "sae_weights" in path or path.endswith("cfg.json")]
    for path, data in {**saes, **tables}.items():
        if path not in ("README.md", "config.json", MANIFEST):
            assert data == (root / path).read_bytes(), path
    for sae_id in IDS:
        assert torch.equal(core.load_sae(SAES, *sae_id).W_dec, core.load_sae(root, *sae_id).W_dec)
    table = core.load_concepts(SAES)
    assert table.frame.equals(core.load_concepts(root).frame)
    assert table[2].gallery[0].image.size == (16, 16)


def test_the_cards_have_figures_and_links(root: Path, hub: Hub) -> None:
    release(root)
    card = hub.model(SAES).files["README.md"].decode()
    assert MARK in card
    assert f"| `{IDS[1].path}` | 2 of 10 | 0.812 (0.750 to 0.875) | 2 | 12.5 % | 80.0 % |" in card
    assert f"datasets:\n- {TABLES}" in card
    assert "### Measured" in card
    card = hub.dataset(TABLES).files["README.md"].decode()
    assert (
        f"- config_name: mid_block.attentions.0-cond-tall\n  data_files: {IDS[1].path}/{TABLE}\n  default: true" in card
    )


def test_published_again_nothing_happens(root: Path, hub: Hub) -> None:
    first = release(root)
    hub.log.clear()
    again = release(root)
    assert (again.saes, again.tables, again.changed) == (first.saes, first.tables, ())
    assert not [one for one in hub.log if one.stage in ("create", "preupload", "upload", "commit")]


def test_a_new_release_sends_what_is_new_and_takes_away_what_was_dropped(root: Path, hub: Hub) -> None:
    release(root)
    hub.put("model", SAES, {"notes.txt": b"of somebody else", "README.md": b"---\nlicense: mit\n---\nmy own card"})
    hub.log.clear()
    change(root)
    release(root)
    assert len(hub.asked("upload")) == 2  # the weights; and the table, which names their hash
    files = hub.model(SAES).files
    assert files["notes.txt"] == b"of somebody else"
    assert files["README.md"].endswith(b"my own card")
    for repo in (hub.model(SAES), hub.dataset(TABLES)):
        assert not [path for path in repo.files if path.startswith(IDS[0].path)]
    with pytest.raises(ArtifactError, match="no SAE"):
        core.load_sae(SAES, *IDS[0])
    assert torch.equal(core.load_sae(SAES, *IDS[1]).W_dec, core.load_sae(root, *IDS[1]).W_dec)


def test_who_pinned_a_revision_keeps_it(root: Path, hub: Hub) -> None:
    first, old = release(root), core.load_sae(root, *IDS[1])
    hub.model(SAES).tags["v1"] = first.saes
    change(root)
    release(root)
    for revision in (first.saes, "v1"):
        assert torch.equal(core.load_sae(f"{SAES}@{revision}", *IDS[1]).W_dec, old.W_dec)
        assert core.load_concepts(f"{SAES}@{revision}", *IDS[1]).labels
    with pytest.raises(ArtifactError, match=r"some-one/small-saes@v2 .* the Hub has no revision 'v2' of it"):
        core.load_sae(f"{SAES}@v2", *IDS[1])


def slow(*values: Any) -> Any:
    """A fault that goes the way of another: of a stage that has one already, or of its neighbour."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "how", "on"),
    [
        ("info", 500, ""),
        slow("info", "drop", ""),
        slow("tree", 500, ""),
        ("resolve", 500, ""),
        ("preupload", 429, ""),
        slow("preupload", 500, "models/"),
        slow("batch", 500, ""),
        slow("upload", 500, ""),
        slow("upload", "drop", ""),
        ("upload", "corrupt", ""),
        ("verify", 500, ""),
        slow("validate", 500, ""),
        ("commit", 500, ""),
        slow("commit", 429, "models/"),
        ("commit", "drop", "models/"),
        slow("commit", "drop", "datasets/"),
    ],
)
def test_a_fault_at_any_stage_leaves_what_readers_see_and_the_next_run_succeeds(
    root: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, how: Answer, on: str
) -> None:
    release(root)
    old, heads = core.load_sae(root, *IDS[1]), hub.heads()
    change(root)
    hub.fail(stage, how, times=1000, on=on)
    with pytest.raises(PublishError, match="Run the same command again to continue"):
        release(root)
    hub.faults.clear()
    assert hub.heads()["model", SAES] == heads["model", SAES]
    if not on.startswith("models") or stage == "preupload":
        assert hub.heads() == heads
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another cache"))
    assert torch.equal(core.load_sae(SAES, *IDS[1]).W_dec, old.W_dec)
    assert core.load_concepts(SAES, *IDS[1]).labels
    release(root)
    assert torch.equal(core.load_sae(SAES, *IDS[1]).W_dec, core.load_sae(root, *IDS[1]).W_dec)
    assert {len(repo.commits) for repo in hub.repos.values()} == {3}


def test_an_answer_that_was_lost_is_noticed_by_the_next_run(root: Path, hub: Hub) -> None:
    hub.fail("commit", "lost", on="models/")
    with pytest.raises(PublishError):
        release(root)
    assert release(root).changed == ()
    assert len(hub.model(SAES).commits) == 2


@pytest.mark.parametrize(
    ("stage", "how"), [("preupload", 429), ("batch", 500), ("upload", 500), ("upload", "drop"), ("resolve", "drop")]
)
def test_a_temporary_fault_is_retried(root: Path, hub: Hub, stage: str, how: Answer) -> None:
    hub.fail(stage, how)
    assert release(root).changed == (TABLES, SAES)


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(
    root: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(root)
    change(root)
    upload = publishing._upload

    def meanwhile(*arguments: object) -> None:
        hub.put("dataset", TABLES, {"theirs.txt": b"theirs"})
        upload(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_upload", meanwhile)
        with pytest.raises(PublishError, match="412"):
            release(root)
    release(root)
    assert hub.dataset(TABLES).files["theirs.txt"] == b"theirs"


def test_what_the_hub_stores_wrongly_is_noticed(root: Path, hub: Hub) -> None:
    hub.fail("resolve", "corrupt", times=1000, on="sae_weights")
    with pytest.raises(PublishError, match=r"not the file that manifest\.jsonl lists"):
        release(root)


def test_private_is_private(root: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release(root, private=True)
    assert all(repo.private for repo in hub.repos.values())
    core.load_sae(SAES, *IDS[1])
    point_client_at(hub, tmp_path / "of a stranger", monkeypatch, token=None)
    with pytest.raises(ArtifactError, match="if it is private, sign in with `hf auth login`"):
        core.load_sae(SAES, *IDS[1])


def test_what_was_to_be_private_is_not_sent_to_a_public_repository(root: Path, hub: Hub) -> None:
    hub.put("dataset", TABLES, {"a.txt": b"a"})
    with pytest.raises(PublishError, match=f"{TABLES} is public"):
        release(root, private=True)
    assert hub.dataset(TABLES).files == {"a.txt": b"a"}
    assert not hub.asked("upload")


# --- what cannot be published -----------------------------------------------------------------------------------------

Damage = Callable[[Path], object]
MIDDLE = IDS[1].path


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def not_finite(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = root / MIDDLE / "sae_weights.safetensors"
    weights = load_file(path)
    weights["b_dec"][0] = torch.nan
    save_file(weights, path)
    describe(root)


def linked(root: Path) -> None:
    secret = root.parent / "secret.json"
    secret.write_text((root / MIDDLE / "cfg.json").read_text())
    (root / MIDDLE / "cfg.json").unlink()
    (root / MIDDLE / "cfg.json").symlink_to(secret)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / MIDDLE), rf"config\.json lists {MIDDLE}, which does not exist"),
        (lambda root: write_index(root, IDS[1:], model="m", recipe=RECIPE), f"{IDS[0].path} exists, but"),
        (lambda root: edit(root / "config.json", IDS[0].path, "../elsewhere/cond/tall"), "is not the folder of an SAE"),
        (lambda root: edit(root / "config.json", '"grammar"', '"/home/me/prompts.txt"'), "path of this computer"),
        (lambda root: (root / "config.json").unlink(), "lacks recipe or saes"),
        (lambda root: (root / "README.md").unlink(), r"evaluate sae --card"),
        (lambda root: (root / MANIFEST).write_text("{"), "is damaged"),
        (lambda root: write_one(root, IDS[1], NAMES, 98), r"not the file that manifest\.jsonl lists"),
        (not_finite, "b_dec has values that are not finite"),
        (linked, "link out of"),
        (lambda root: (root / MIDDLE / TABLE).unlink(), "out of date for mid_block"),
        (lambda root: (shutil.copy(root / IDS[2].path / TABLE, root / MIDDLE), describe(root)), "made for another SAE"),
        (lambda root: (root / "gallery" / "sheet-00.webp").unlink(), "out of date for gallery"),
        (lambda root: (edit(root / MIDDLE / "cfg.json", '"d_sae": 10', '"d_sae": 11'), describe(root)), "asks for"),
    ],
)
def test_what_is_damaged_is_refused_before_any_request(root: Path, hub: Hub, damage: Damage, message: str) -> None:
    damage(root)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        release(root)
    assert not hub.log


def test_all_problems_are_reported_at_once(root: Path) -> None:
    linked(root)
    (root / IDS[2].path / TABLE).unlink()
    with pytest.raises(ValueError, match=r"(?s)cannot be published:\n- .*link out of.*\n- .*up_blocks"):
        make_release(root, SAES, TABLES)


def test_the_evaluation_writes_what_publishing_asks_for(root: Path) -> None:
    for name in ("README.md", MANIFEST):
        (root / name).unlink()
    with pytest.raises(ValueError, match=rf"evaluate sae --card --saes {root}"):
        make_release(root, SAES, TABLES)
    figures = {sae_id.path: {**FIGURES, "l0": 2.0, "dead_share": 0.125} for sae_id in IDS}
    table = Table("sae", "Measured", [{"what": 1.0}], details={"figures": figures})
    asked = EvalOptions([], False, root, (root,))
    for name, other in (("layout", asked), ("sae", asked._replace(quick=True)), ("sae", asked._replace(parts=["a"]))):
        with pytest.raises(SystemExit, match="--card goes with all tables of the evaluation `sae`"):
            write_cards(name, other, [table])
    write_cards("sae", asked, [table])
    make_release(root, SAES, TABLES)


@pytest.mark.parametrize("name", ["no-owner", "a/b/c", "a/..", "a b/c"])
def test_a_name_that_is_no_repository_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)repo"):
        make_release(root, name, TABLES)


def test_a_collection_without_tables_needs_one_repository(root: Path, hub: Hub) -> None:
    shutil.rmtree(root / "gallery")
    for sae_id in IDS:
        for path in (root / sae_id.path).glob("*"):
            if path.name not in ("cfg.json", "sae_weights.safetensors"):
                path.unlink()
    describe(root)
    assert release(root).tables == ""
    assert [kind for kind, _ in hub.repos] == ["model"]
    assert "no table" in hub.model(SAES).files["README.md"].decode()
    core.load_sae(SAES, *IDS[1])
    with pytest.raises(ArtifactError, match="There is no concept table"):
        core.load_concepts(SAES)


def test_files_of_others_in_the_folder_stay_here(root: Path, hub: Hub) -> None:
    (root / "notes.txt").write_text(TOKEN)
    (root / MIDDLE / "optimizer.pt").write_bytes(b"\x80\x04.")
    release(root)
    for repo in hub.repos.values():
        assert not [path for path in repo.files if path.endswith((".txt", ".pt"))]


# --- the command ------------------------------------------------------------------------------------------------------


def command(*words: str) -> None:
    """`python -m training publish`."""
    parser = argparse.ArgumentParser()
    publishing.add_arguments(parser)
    publishing.main(parser.parse_args([SAES, "--tables", TABLES, *words]))


def test_a_dry_run_asks_nothing_and_shows_files_and_cards(
    root: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    command("--saes", str(root), "--dry-run")
    assert not hub.log
    shown, weights = capsys.readouterr().out, root / MIDDLE / "sae_weights.safetensors"
    assert f"{weights.stat().st_size:12,}  {MIDDLE}/{weights.name}\n" in shown
    assert f"model {SAES}: {2 * len(IDS) + 3} files" in shown
    assert f'core.load_sae("{SAES}"' in shown


def test_without_a_token_the_command_says_how_to_get_one(
    root: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_client_at(hub, tmp_path, monkeypatch, token=None)
    with pytest.raises(SystemExit, match="hf auth login"):
        command("--saes", str(root))
    assert not hub.log


@pytest.mark.usefixtures("hub")
def test_the_line_that_the_command_ends_with_loads_what_was_published(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("--saes", str(root))
    sae = eval(capsys.readouterr().out.splitlines()[-1], {"core": core})
    assert torch.equal(sae.W_dec, core.load_sae(root, *IDS[1]).W_dec)


TWICE = """
import sys
from training.__main__ import main
for _ in range(2):
    try:
        main()
        print("ended with 0")
    except SystemExit as stopped:
        print("ended with", stopped.code)
"""


def twice_in_its_own_process(hub: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command and the same command again, with everything that its libraries have to say."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_VERBOSITY": "debug", "HOME": str(home)}
    line = [sys.executable, "-c", TWICE, "publish", SAES, "--tables", TABLES, *words]
    environ |= environment(hub, home)
    return subprocess.run(line, env=environ, capture_output=True, text=True, timeout=200, check=True, cwd=ROOT)


def test_the_token_is_used_and_appears_nowhere(root: Path, hub: Hub, tmp_path: Path) -> None:
    hub.fail("upload", 500)
    hub.fail("commit", 500, on="models/")
    output = twice_in_its_own_process(hub, tmp_path, "--saes", str(root))
    assert re.findall(r"^ended with (\d)$", output.stdout, flags=re.MULTILINE) == ["2", "0"], output
    assert "Run the same command again to continue" in output.stderr
    assert SAES in output.stdout
    assert all(one.token for one in hub.log if one.stage in ("create", "preupload", "commit"))
    assert not any(one.token for one in hub.log if one.stage == "upload")  # goes to a store of files
    assert TOKEN not in output.stdout + output.stderr
    for repo in hub.repos.values():
        assert not [path for path, data in repo.files.items() if TOKEN.encode() in data]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 20
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_the_embedded_collection_is_fit_to_be_published() -> None:
    root = Path(core.__file__).parent / "picturebook" / "saes"
    made = make_release(root, SAES, TABLES)
    assert len(made.tables) == 3 * len(read_manifest(root / MANIFEST)[:-1]) + 5 + 2
