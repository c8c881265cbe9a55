"""The embedded model's card: what it is made of, how good it is, what it cannot do. Every figure in it was measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from core.diffusion.diffuser import Diffuser
from core.files import write_text
from training.common.report import Table
from training.evaluate.common.judges import draw
from training.evaluate.picturebook import held_out_scenes
from training.picturebook.world.captions import vocabulary
from training.picturebook.world.scenes import caption_of
from training.picturebook.world.world import ARTISTS, BACKGROUNDS, NOUNS, OBJECTS, STYLES

GRID = "samples.webp"
"""File of the grid beside the card."""
N_SAMPLES = 40
COLUMNS = 10
HISTORY = Path(__file__).parents[1] / "picturebook" / "data" / "history.md"
"""How the weights in the package came about, where the recipe alone does not tell."""


class Point(NamedTuple):
    """What was measured of the denoiser on the way."""

    samples: int
    """Seen so far."""
    loss: float
    """On held-out scenes."""
    told_apart: float
    """Share of held-out relations that it tells from their opposite."""


_CURVE = "| samples seen, last stretch | held-out loss | relations told apart |\n|---|---|---|\n"
_FRONT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, interpretability]
---
"""


def write_card(model: Diffuser, package: Path, tables: Sequence[Table], curve: Sequence[Point], by_eye: str) -> None:
    """Write `README.md` and the grid of samples into the model's folder.

    curve: how the denoiser came along; empty where that is not known.
    by_eye: what a person counted in drawn pictures; Markdown, may be empty.
    """
    captions = [caption_of(scene).text for scene in held_out_scenes(N_SAMPLES)]
    sheet(list(draw(model, captions, range(N_SAMPLES)))).save(package / "model" / GRID, quality=85)
    numbered = "\n".join(f"{i + 1}. {caption}" for i, caption in enumerate(captions))
    training = json.loads((package / "training.json").read_text(encoding="utf-8"))
    rows = "".join(f"| {p.samples:,} | {p.loss:.4f} | {100 * p.told_apart:.0f} % |\n" for p in curve)
    shown = f"{_CURVE}{rows}\n" if rows else ""
    text_loop, loop = training["text_loop"], training["denoiser_loop"]
    text = f"""{_FRONT}
# picturebook

A Stable Diffusion pipeline in miniature: {len(OBJECTS)} kinds of things, {len(BACKGROUNDS)} places and {len(STYLES)} styles,
pictures of {model.image_size} x {model.image_size} pixels. It is made to be looked into: everything that its captions
say, and everything that its training scenes hold, is known exactly, so that each claim about what a word or a concept
does can be checked against the truth. It runs on two cores of any computer.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("core/picturebook/model")
image = pipeline("a penguin and a tree on the snow", num_inference_steps=25, guidance_scale=4.0).images[0]
```

Forty held-out captions, one picture of each, in order, none chosen:

![Forty drawn pictures]({GRID})

{numbered}

## Data

Scenes are composed by a program, without end: one to three things, each drawn by one of {len(ARTISTS)} artists (Noto
Emoji by Google, Apache-2.0; Twemoji by Twitter and contributors, CC-BY-4.0; Fluent Emoji 3D by Microsoft, MIT; credits
in `training/picturebook/data/CREDITS.md`), on a painted place, in a style. A grammar tells them in
{len(vocabulary())} words ({len(NOUNS)} nouns, some with synonyms, two with two meanings). One in ten combinations of
things, place and style is never met in training; all figures below are about those.

## Training

All weights were trained from scratch on CPUs by `python -m training picturebook`, with the settings in
`training.json` beside this folder: the autoencoder on {training["autoencoder_loop"]["n_steps"]:,} batches of
{training["autoencoder_loop"]["batch_size"]} crops; the text encoder on {text_loop["n_steps"]:,} batches of
{text_loop["batch_size"]} captions, from which a small reader, thrown away afterwards, tells what stands where; then the
denoiser, the text encoder along with it, on {loop["n_steps"]:,} batches of {loop["batch_size"]} from
{training["n_scenes"]:,} scenes with 16 texts each, by noise prediction with weights min(snr, 5) / snr. Half of the
texts lack words, most of them where there is little noise: what can be seen need not be told.

{HISTORY.read_text(encoding="utf-8") if HISTORY.exists() else ""}
{shown}Told apart: held-out scenes whose noise is predicted better with their caption than with its relation turned
round (chance 50 %).

## How good it is

{chr(10).join(table.markdown().replace("## ", "### ", 1) for table in tables)}
{by_eye}
## What it cannot do

It knows no word outside its vocabulary and no thing outside its {len(OBJECTS)}. It draws flat scenes of emoji: nothing
that was measured on it is thereby true of a model of photographs. Two of the same thing often appear where the caption
names one, and three things in a caption are more than it keeps apart. Words tell true scenes more bits than they could
(the table above): without a word, the model knows less of a picture than a perfect one would. Its bits compare words
and places; they are no absolute truth. Its own pictures are drawn with guidance and are no samples of the distribution
that it learned, which adds to that.
"""
    write_text(package / "model" / "README.md", text)


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in rows."""
    side = images[0].width
    grid = Image.new("RGB", (COLUMNS * side, -(-len(images) // COLUMNS) * side))
    for i, image in enumerate(images):
        grid.paste(image, (i % COLUMNS * side, i // COLUMNS * side))
    return grid


def read_curve(folder: Path) -> list[Point]:
    """The measurements in the denoiser's log; none where the weights were not trained here."""
    log = folder / "denoiser" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    points = [
        Point(line["samples"], line["held_out_loss"], line["relations_told_apart"])
        for line in lines
        if "held_out_loss" in line
    ]
    # A run that was taken up again may have measured a step twice: the last time counts.
    return [point for _, point in sorted({point.samples: point for point in points}.items())]
