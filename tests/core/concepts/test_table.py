import json
import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import core
from core.concepts.gallery import GalleryImage, write_gallery
from core.concepts.io import (
    COUNTS,
    EXAMPLES,
    TABLE,
    Candidate,
    Counts,
    Examples,
    Kind,
    LabelledLatent,
    Scores,
    TableInfo,
    save_table,
    save_tensors,
    weights_sha256,
)
from core.concepts.table import ConceptTable, activation_map, evolution
from core.diffusion.diffuser import Diffuser
from core.errors import ArtifactError
from core.sae.autoencoder import Code, SaeConfig, SaeId, SparseAutoencoder
from core.sae.collection import write_index
from core.sae.io import save_sae

DOWN, MIDDLE, UP = "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0"
IDS = (SaeId(DOWN, "cond", "all"), SaeId(MIDDLE, "cond", "all"), SaeId(UP, "cond", "all"), SaeId(MIDDLE, "cond", 1.0))
MIDDLE_ID = IDS[1]
CLASSES = ("whale", "sun", "sunflower", "ship", "grass", "teddy bear")
NAMES: tuple[tuple[str, Kind, float], ...] = (
    ("whale", "object", 0.3),
    ("", "unlabelled", 0.1),
    ("whale", "object", 0.6),
    ("sun", "object", 0.4),
    ("sunflower", "object", 0.5),
    ("ship", "object", 0.2),
    ("grass", "background", 0.7),
    ("night", "style", 0.05),
    ("", "context-free", 0.2),
    ("teddy bear", "object", 0.3),
)


def named(label: str, kind: Kind, held_out_iou: float) -> LabelledLatent:
    figures = dict.fromkeys([name for name in Scores._fields if name not in ("best_class", "style", "runner_ups")], 0.5)
    runner_ups = (Candidate("sun", 0.25, 0.125),) if label == "whale" else ()
    scores = Scores(best_class=label or "sun", style="night", runner_ups=runner_ups, **figures)
    return LabelledLatent(label, kind, scores._replace(held_out_iou=held_out_iou, style_auroc=0.9))


def write_one(root: Path, sae_id: SaeId, names: Any = NAMES, seed: int = 0) -> None:
    folder, n = root / sae_id.path, len(names)
    sae = SparseAutoencoder(SaeConfig(8, n, 2), generator=torch.Generator().manual_seed(seed))
    save_sae(sae, folder)
    words = {"ship": ("boat", "ship")}
    info = TableInfo(weights_sha256(folder), CLASSES, words, {"n_images": 4})
    save_table(folder, [named(*name) for name in names], info)
    counts = Counts(
        torch.ones(n, len(CLASSES)), torch.full((n,), 9.0), torch.full((len(CLASSES),), 7.0), torch.tensor(64.0)
    )
    save_tensors(folder / COUNTS, counts)
    images = torch.full((n, 8), -1, dtype=torch.int16)
    images[2, :2] = torch.tensor([1, 0])
    maps, peaks = torch.zeros(n, 8, 2, 2, dtype=torch.uint8), torch.zeros(n, 8)
    maps[2, 0, 1, 0], peaks[2, :2] = 255, torch.tensor([4.0, 2.0])
    save_tensors(folder / EXAMPLES, Examples(images, maps, peaks))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A collection of four SAEs with tables."""
    for seed, sae_id in enumerate(IDS):
        write_one(tmp_path, sae_id, NAMES if sae_id.t == "all" else NAMES[::-1], seed)
    write_index(tmp_path, IDS)
    images = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    write_gallery(tmp_path, images, [GalleryImage("a red sun", 1), GalleryImage("a blue whale", 2)], 16)
    return tmp_path


@pytest.fixture
def table(root: Path) -> ConceptTable:
    return core.load_concepts(root)


def test_the_default_table_is_that_of_the_bottleneck(root: Path) -> None:
    assert core.load_concepts(root).sae_id == SaeId(MIDDLE, "cond", "all")
    assert core.load_concepts(root, UP).sae_id == SaeId(UP, "cond", "all")
    early = core.load_concepts(str(root), hookpoint=MIDDLE, branch="cond", t=1)
    assert early.frame["label"].tolist() == [name for name, *_ in NAMES[::-1]]


def test_a_concept_has_its_scores_and_its_gallery(table: ConceptTable) -> None:
    concept = table[2]
    assert concept[:3] == (2, "whale", "object")
    assert concept.scores == named(*NAMES[2]).scores._replace(
        held_out_iou=pytest.approx(0.6), style_auroc=pytest.approx(0.9)
    )
    assert isinstance(concept.scores.iou, float)
    first, second = concept.gallery
    assert (first.gallery_index, second.gallery_index) == (1, 0)
    assert first.map.tolist() == [[0, 0], [4, 0]]
    assert first.entry == ("a blue whale", 2)
    assert np.asarray(first.image, dtype=int)[8, 8].argmax() == 2
    assert table[0].gallery == ()
    assert len(list(table)) == len(table) == 10


@pytest.mark.parametrize("number", [10, -1, 99999])
def test_a_number_out_of_range_is_answered_with_the_range(table: ConceptTable, number: int) -> None:
    for ask in (table.__getitem__, table.neighbours, lambda n: table.counterparts(n, table)):
        with pytest.raises(IndexError, match=f"no concept {number}: {MIDDLE}/cond/tall has the numbers 0 to 9"):
            ask(number)


def test_counts_and_classes(table: ConceptTable) -> None:
    assert table.class_names == CLASSES
    assert table.counts.intersections.shape == (10, 6)
    assert float(table.counts.n_cells) == 64
    assert table.info.made_with == {"n_images": 4}
    assert table.labels == ("grass", "night", "ship", "sun", "sunflower", "teddy bear", "whale")


def test_the_effects_of_words(table: ConceptTable, root: Path) -> None:
    assert table.effect("night") is None
    folder, effects = root / MIDDLE_ID.path, torch.arange(20.0).view(2, 10)
    info = replace(table.info, effect_words=("night", "sepia"))
    save_table(folder, [named(*name) for name in NAMES], info, effects)
    again = core.load_concepts(root, *MIDDLE_ID)
    assert again.effect("sepia") == pytest.approx(effects[1].numpy())
    assert again.effect("cubist") is None
    assert again[3].scores == table[3].scores


def numbers(found: Any) -> list[int]:
    return [hit.number for hit in found]


def test_the_description_of_the_files_names_all_that_is_in_them(root: Path) -> None:
    folder = root / MIDDLE_ID.path
    text = (Path(core.__file__).parent / "sae" / "FORMAT.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    columns = pq.read_schema(folder / TABLE).names
    assert len(columns) > 15
    assert named >= {*columns, *Counts._fields, *Examples._fields, *(f.name for f in fields(TableInfo))}
    assert named >= {*json.loads((folder / "cfg.json").read_text(encoding="utf-8")), "W_enc", "b_enc", "W_dec", "b_dec"}


def test_search_by_word(table: ConceptTable) -> None:
    assert numbers(table.search("whale")) == [2, 0]  # the better score first
    assert numbers(table.search("  Whale ")) == [2, 0]
    assert numbers(table.search("whale", limit=1)) == [2]
    assert numbers(table.search("sun")) == [3]  # not the sunflower, whose name only begins like that
    assert numbers(table.search("sunf")) == [4]
    assert numbers(table.search("bear")) == [9]
    assert numbers(table.search("boat")) == [5]  # another word for it
    (night,) = table.search("night")
    assert (night.kind, night.score) == ("style", pytest.approx(0.9))
    assert table.search("whale").nearest == ()


def test_a_search_without_a_hit_offers_labels(table: ConceptTable) -> None:
    found = table.search("whales")
    assert len(found) == 0
    assert found.nearest[0] == "whale"
    assert len(table.search("xyz").nearest) == 5
    with pytest.raises(ValueError, match="The search is blank"):
        table.search("  ")


class Encoder:
    """A text encoder that knows some words: synonyms lie side by side."""

    KNOWN = ("whale", "dolphin", "grass", "meadow", "sun", "ship", "gravity")
    DIRECTION = torch.eye(7)

    def check_prompt(self, text: str) -> None:
        if text not in self.KNOWN:
            raise core.PromptError(text)

    def text_embeddings(self, texts: list[str]) -> torch.Tensor:
        rows = []
        for text in texts:
            row = torch.full((8,), 3.0)  # what every text has in common
            if text:
                at = self.KNOWN.index(text)
                pair = {"dolphin": 0, "meadow": 2}.get(text, at)
                row[:7] += self.DIRECTION[pair] + 0.1 * self.DIRECTION[at]
                row[7] += 2.0  # and every word
            rows.append(row)
        return torch.stack(rows)[:, None]


def test_search_by_similarity(table: ConceptTable) -> None:
    encoder: Any = Encoder()
    found = table.search("dolphin", encoder)
    assert numbers(found) == [2, 0]
    assert 0.9 < found.hits[0].similarity < 1
    assert numbers(table.search("meadow", encoder)) == [6]
    assert table.search("meadow").hits == ()
    assert numbers(table.search("whale", encoder)) == [2, 0]
    nothing = table.search("gravity", encoder)
    assert not nothing.hits
    assert set(nothing.nearest) <= {"whale", "grass", "sun", "ship"}
    assert numbers(table.search("boat", encoder)) == [5]  # a word that the model does not know is searched as a word


def test_a_real_encoder_finds_a_label_by_itself_alone(root: Path, model: Diffuser) -> None:
    found = core.load_concepts(root).search("grass", model)
    assert numbers(found)[0] == 6
    assert found.hits[0].similarity == 1


def test_a_search_through_a_large_dictionary_takes_no_time(tmp_path: Path) -> None:
    names = [(f"thing {i % 997}", "object", 0.5) for i in range(20_000)]
    write_one(tmp_path, IDS[1], names)
    table = core.load_concepts(tmp_path)
    for query in ("thing 7", "thing 9", "nothing"):
        start = time.process_time()
        table.search(query)
        assert time.process_time() - start < 0.1


def test_neighbours_are_those_of_the_nearest_decoder_rows(table: ConceptTable, root: Path) -> None:
    rows = core.load_sae(root, *IDS[1]).W_dec
    near = table.neighbours(2, limit=9)
    assert 2 not in numbers(near)
    cosines = [one.cosine for one in near]
    assert cosines == sorted(cosines, reverse=True)
    expected = torch.nn.functional.cosine_similarity(rows, rows[2:3])
    assert [one.cosine for one in near] == pytest.approx([float(expected[one.number]) for one in near], abs=1e-5)


def test_counterparts_share_the_label(table: ConceptTable, root: Path) -> None:
    early = core.load_concepts(root, MIDDLE, t=1.0)
    assert numbers(table.counterparts(0, early)) == [7, 9]
    assert [early[n].label for n in (7, 9)] == ["whale", "whale"]
    assert table.counterparts(1, early) == ()  # what has no label has no counterpart


def code(rows: list[list[tuple[int, float]]]) -> Code:
    return Code(*(torch.tensor([[entry[part] for entry in row] for row in rows]) for part in (0, 1)))


def test_evolution_and_maps_by_hand() -> None:
    codes = {
        12: code([[(3, 2.0), (1, 1.0)], [(3, 0.0), (2, 1.0)], [(1, 1.0), (3, 4.0)], [(2, 1.0), (-1, 0.0)]]),
        0: code([[(1, 2.0)], [(1, 0.5)], [(2, 3.0)], [(1, 0.5)]]),
    }
    curve = evolution(codes, 3)
    assert curve.steps == (0, 12)
    assert curve.mean.tolist() == [0, 1.5]
    assert curve.peak.tolist() == [0, 4]
    assert curve.share.tolist() == [0, 0.5]
    assert activation_map(codes[12], 3, 2, 2).tolist() == [[2, 0], [4, 0]]


def test_a_table_of_another_sae_is_refused(root: Path) -> None:
    other = SparseAutoencoder(SaeConfig(8, 10, 2), generator=torch.Generator().manual_seed(99))
    save_sae(other, root / IDS[1].path)
    with pytest.raises(ArtifactError, match=r"made for another SAE.*python -m training labels"):
        core.load_concepts(root)
    core.load_concepts(root, UP)


def test_missing_and_damaged_files_are_reported(root: Path) -> None:
    with pytest.raises(ArtifactError, match="Did you mean 'picturebook'"):
        core.load_concepts("picturebok")
    with pytest.raises(ArtifactError, match=r"has no SAE mid_block\.attentions\.0/uncond/tall"):
        core.load_concepts(root, branch="uncond")
    path = root / IDS[1].path / "concepts.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="is damaged"):
        core.load_concepts(root)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"There is no concept table .*python -m training labels"):
        core.load_concepts(root)
    (root / IDS[2].path / EXAMPLES).unlink()
    table = core.load_concepts(root, UP)  # without its gallery it still answers
    assert numbers(table.search("ship")) == [5]
    with pytest.raises(ArtifactError, match=r"There is no .*examples"):
        table[5]


def test_importing_core_imports_neither_arrow_nor_pandas() -> None:
    check = "import sys, core; assert not {'torch', 'pyarrow', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


# --- files of other hands ---------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Any) -> None:
    """Replace a Parquet table by what `change` makes of it."""
    pq.write_table(change(pq.read_table(path)), path)


def with_info(**values: Any) -> Any:
    def change(table: Any) -> Any:
        stored = {**json.loads(table.schema.metadata[b"concepts"]), **values}
        return table.replace_schema_metadata({b"concepts": json.dumps(stored)})

    return change


def with_column(name: str, values: Any) -> Any:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, pa.array(values))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.replace_schema_metadata({b"concepts": b"[1]"}),
        lambda table: table.replace_schema_metadata({b"concepts": b"{"}),
        lambda table: table.replace_schema_metadata({b"concepts": b"[" * 50_000}),
        with_info(class_names=[1, 2]),
        with_info(class_names=3),
        with_info(words={"ship": [1]}),
        with_info(words=[1]),
        with_info(weights_sha256=None),
        with_column("label", [["a"]] * len(NAMES)),
        with_column("label", [None] * len(NAMES)),
        with_column("kind", ["thing"] * len(NAMES)),
        with_column("iou", ["much"] * len(NAMES)),
    ],
)
def test_a_table_with_other_values_is_refused_in_a_sentence(root: Path, change: Any) -> None:
    rewrite(root / MIDDLE_ID.path / TABLE, change)
    with pytest.raises(ArtifactError, match=r"concepts\.parquet .*python -m training labels"):
        core.load_concepts(root)


@pytest.mark.parametrize(
    "listed",
    [
        {"side": "large", "images": []},
        {"side": 0, "images": []},
        {"side": 10**9, "images": []},
        {"side": 16, "images": [{"prompt": "a", "seed": "x"}]},
        {"side": 16, "images": [{"prompt": "a", "seed": 1e400}]},
        {"side": 16, "images": {"prompt": 1}},
        {"side": 64, "images": [{"prompt": "a", "seed": 1}] * 2},  # larger than the sheet
    ],
)
def test_a_gallery_with_other_values_is_refused_in_a_sentence(root: Path, table: ConceptTable, listed: Any) -> None:
    (root / "gallery" / "images.json").write_text(json.dumps(listed))
    with pytest.raises(ArtifactError, match=r"images\.json|sheet-00\.webp"):
        table.gallery.image(0)


def test_sheets_are_read_as_webp_alone(root: Path, table: ConceptTable) -> None:
    Image.new("RGB", (128, 16)).save(root / "gallery" / "sheet-00.webp", format="PNG")
    with pytest.raises(ArtifactError, match="cannot be read"):
        table.gallery.image(0)


@pytest.mark.parametrize("name", ["images", "maps", "peaks"])
def test_examples_that_do_not_fit_are_refused_in_a_sentence(root: Path, table: ConceptTable, name: str) -> None:
    path = root / MIDDLE_ID.path / EXAMPLES
    examples = load_file(path)
    examples[name] = {
        "images": examples["images"] + 7,  # beyond the gallery
        "maps": examples["maps"][:, :3].contiguous(),
        "peaks": torch.full_like(examples["peaks"], float("nan")),
    }[name]
    save_file(examples, path)
    with pytest.raises(ArtifactError, match="belongs to another table or gallery"):
        _ = table[2].gallery


def test_counts_that_do_not_fit_are_refused_in_a_sentence(root: Path) -> None:
    path = root / MIDDLE_ID.path / COUNTS
    whole = load_file(path)
    for name, value in (("active", whole["active"][:3].clone()), ("cells", whole["cells"] * float("nan"))):
        save_file({**whole, name: value}, path)
        with pytest.raises(ArtifactError, match=f"{name} is .*or not finite"):
            _ = core.load_concepts(root).counts
