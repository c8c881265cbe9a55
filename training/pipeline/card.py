"""The embedded model's card: training data, training, results and limitations. Every figure in it was measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from core.diffusion.diffuser import Diffuser
from core.files import write_text
from training.common.report import Table
from training.evaluate.common.judges import draw
from training.evaluate.common.scenes import held_out_scenes
from training.picturebook.world.captions import vocabulary
from training.picturebook.world.scenes import caption_of
from training.picturebook.world.world import ARTISTS, BACKGROUNDS, NOUNS, OBJECTS, STYLES

GRID = "samples.webp"
"""File name of the image grid beside the card."""
N_SAMPLES = 40
COLUMNS = 10
HISTORY = Path(__file__).parents[1] / "picturebook" / "data" / "history.md"
"""How the weights in the package were trained, beyond what the recipe says."""


class Point(NamedTuple):
    """A measurement of the denoiser during training."""

    samples: int
    """Training samples seen."""
    loss: float
    """Loss on held-out scenes."""
    relation_accuracy: float
    """Share of held-out scenes whose noise is predicted better with their caption than with its relation inverted."""


_CURVE = "| samples seen, last phase | held-out loss | relation accuracy |\n|---|---|---|\n"
_FRONT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, interpretability]
---
"""


def write_card(model: Diffuser, package: Path, tables: Sequence[Table], curve: Sequence[Point], by_eye: str) -> None:
    """Write `README.md` and the grid of samples into the model's folder.

    Args:
        model: The model the card describes.
        package: Folder of the model and of its recipe.
        tables: Results of its evaluation.
        curve: Measurements during training of the denoiser; empty if unknown.
        by_eye: Counts by a person looking at generated images, as Markdown; may be empty.
    """
    captions = [caption_of(scene).text for scene in held_out_scenes(N_SAMPLES)]
    sheet(list(draw(model, captions, range(N_SAMPLES)))).save(package / "model" / GRID, quality=85)
    numbered = "\n".join(f"{i + 1}. {caption}" for i, caption in enumerate(captions))
    training = json.loads((package / "training.json").read_text(encoding="utf-8"))
    rows = "".join(f"| {p.samples:,} | {p.loss:.4f} | {100 * p.relation_accuracy:.0f} % |\n" for p in curve)
    shown = f"{_CURVE}{rows}\n" if rows else ""
    text_loop, loop = training["text_loop"], training["denoiser_loop"]
    text = f"""{_FRONT}
# picturebook

A miniature Stable Diffusion pipeline for interpretability research: {len(OBJECTS)} objects, {len(BACKGROUNDS)}
backgrounds and {len(STYLES)} styles, images of {model.image_size} x {model.image_size} pixels. The content of its
captions and training scenes is known exactly, so that every claim about what a word or a concept does can be checked
against ground truth. It runs on two CPU cores.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("core/picturebook/model")
image = pipeline("a penguin and a tree on the snow", num_inference_steps=25, guidance_scale=4.0).images[0]
```

Forty held-out captions, one image of each, not cherry-picked:

![Forty generated images]({GRID})

{numbered}

## Data

Scenes are composed by a program: one to three objects, each drawn by one of {len(ARTISTS)} artists (Noto Emoji by
Google, Apache-2.0; Twemoji by Twitter and contributors, CC-BY-4.0; Fluent Emoji 3D by Microsoft, MIT; credits in
`training/picturebook/data/CREDITS.md`), on a painted background, in a style. A grammar describes them in
{len(vocabulary())} words ({len(NOUNS)} nouns, some with synonyms, two with two meanings). One in ten combinations of
objects, background and style is held out from training; all figures below are measured on those.

## Training

All weights were trained from scratch on CPUs by `python -m training picturebook`, with the settings in `training.json`
beside this folder: the autoencoder on {training["autoencoder_loop"]["n_steps"]:,} batches of
{training["autoencoder_loop"]["batch_size"]} crops; the text encoder on {text_loop["n_steps"]:,} batches of
{text_loop["batch_size"]} captions, from which a small auxiliary head, discarded afterwards, predicts the layout; then
the denoiser and the text encoder together on {loop["n_steps"]:,} batches of {loop["batch_size"]} from
{training["n_scenes"]:,} scenes with 16 captions each, by noise prediction with weights min(snr, 5) / snr. Half of the
captions lack words, most of them at low noise levels.

{HISTORY.read_text(encoding="utf-8") if HISTORY.exists() else ""}
{shown}Relation accuracy: share of held-out scenes whose noise is predicted better with their caption than with its
relation inverted (chance 50 %).

## Results

{chr(10).join(table.markdown().replace("## ", "### ", 1) for table in tables)}
{by_eye}
## Limitations

It knows no word outside its vocabulary and no object but its {len(OBJECTS)}. It generates flat scenes of emoji: results
measured on it need not hold for models of photographs. It often draws an object twice that the caption names once, and
rarely gets all of three objects right. Words carry more bits about painted scenes than they can under the grammar (see
the table above), because without a word the model predicts an image worse than a perfect model would. Its bits compare
words and positions; they are not absolute. Its own images are sampled with guidance and so do not follow the
distribution it learned, which adds to that.
"""
    write_text(package / "model" / "README.md", text)


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size in a grid."""
    side = images[0].width
    grid = Image.new("RGB", (COLUMNS * side, -(-len(images) // COLUMNS) * side))
    for i, image in enumerate(images):
        grid.paste(image, (i % COLUMNS * side, i // COLUMNS * side))
    return grid


def read_curve(folder: Path) -> list[Point]:
    """The measurements in the denoiser's log; empty if the weights were not trained in this folder."""
    log = folder / "denoiser" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    points = [
        Point(line["samples"], line["held_out_loss"], line["relations_told_apart"])
        for line in lines
        if "held_out_loss" in line
    ]
    # A resumed run may have measured a step twice: the last measurement counts.
    return [point for _, point in sorted({point.samples: point for point in points}.items())]
