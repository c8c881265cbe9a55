"""`python -m training picturebook`: train the embedded model and install it in the package."""

import argparse
import json
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedModel

import core
from core.diffusion.diffuser import Diffuser
from core.files import write_text
from core.folders import cache_folder
from core.information.surprisal import TABLE
from core.sae.io import WEIGHTS
from core.sae.trained import files_digest
from core.segmentation.semantic import load_segmenter
from core.spec import BUILT_IN, ModelSpec
from training.common.allocator import keep_freed_memory
from training.common.run_lock import locked
from training.labels.command import label_collection
from training.labels.labeller import LabelRun
from training.picturebook.models.autoencoder import AutoencoderTask, build_autoencoder
from training.picturebook.models.denoiser import DenoiserLoss, DenoiserTask, TextTask
from training.picturebook.models.judges import JudgesLoss, JudgesTask, make_scenes
from training.picturebook.models.latents import Latents, compute_latents, load_latents
from training.picturebook.models.loop import LoopConfig, Task, train
from training.picturebook.models.painting import PaintedScenes, painted_scenes
from training.picturebook.world.captions import Split
from training.picturebook.world.surprisal import write_surprisals
from training.picturebook.world.wordlist import WORDLIST, write_wordlist
from training.pipeline.export import (
    SHEET_CAPTIONS,
    assemble,
    diffuser_of,
    draw_sheet,
    entries_under,
    save,
    set_json,
    standardise,
    strip_paths,
)
from training.pipeline.recipe import RECIPE, PicturebookConfig, read_config
from training.prompts.sources import GRAMMAR, open_prompts
from training.sae.command import train_collection
from training.sae.trainer import SaeRun

PACKAGE = Path(core.__file__).parent / "picturebook"
BY_EYE = Path(__file__).parents[1] / "picturebook" / "data" / "by_eye.md"
"""Counts by a person looking at generated images, for the card."""
JUDGES = ("segmenter", "second_segmenter", "style_classifier")
"""Folders of the judges in the package, and their names in `JudgesLoss`."""

SPLITS: dict[Split, str] = {"train": "n_scenes", "test": "n_held_out"}
"""Splits of the scenes, and the settings that say how many each has."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PicturebookRun:
    """The stages of training, with their folders."""

    config: PicturebookConfig
    folder: Path
    """Folder of checkpoints and latents."""
    package: Path
    """Folder of the finished model."""
    n_workers: int
    """Processes that paint scenes."""
    checkpoint_interval_s: float
    """Seconds between checkpoints."""
    warm_start: bool
    """Whether training starts from the weights in the package."""

    @property
    def device(self) -> torch.device:
        """Device of inference; accelerate places training."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # --- stages -------------------------------------------------------------------------------------------------------

    def train_autoencoder(self) -> None:
        """Train the autoencoder and standardise its latents."""
        with self._scenes("train", self.config.n_scenes) as scenes:
            torch.manual_seed(self.config.seed)
            task = AutoencoderTask(self.config.autoencoder, scenes, self.device)
            if self.warm_start:
                _load(task.model, self.package / "model", {"autoencoder.": "vae"})
            self._train(task, self.config.autoencoder_loop)
        autoencoder = build_autoencoder(self.config.autoencoder)
        weights = load_file(self.folder / task.name / "ema.safetensors")
        autoencoder.load_state_dict(entries_under(weights, "autoencoder."))
        autoencoder.to(self.device).eval()
        with torch.no_grad():
            images = [make_scenes(number, 64)["pixels"].to(self.device) for number in range(4)]
            standardise(autoencoder, torch.cat([autoencoder.encode(pixels).latent_dist.mode() for pixels in images]))
        autoencoder.save_pretrained(self.folder / "vae")

    def encode_scenes(self) -> None:
        """Paint and encode the scenes the denoiser is trained on, and some held-out ones."""
        autoencoder = self._autoencoder().to(self.device, memory_format=torch.channels_last)
        for split, n in SPLITS.items():
            with self._scenes(split, getattr(self.config, n)) as scenes:
                compute_latents(autoencoder, scenes, self.folder / "latents", split)

    def train_text(self) -> None:
        """Train the text encoder to represent where the objects of a caption are."""
        data, held_out = (load_latents(self.folder / "latents", split, self.device) for split in SPLITS)
        torch.manual_seed(self.config.seed)
        task = TextTask(self.config.denoiser, data, held_out)
        if self.warm_start:
            _load(task.model, self.package / "model", {"text_encoder.": "text_encoder"})
        self._train(task, self.config.text_loop)

    def train_denoiser(self) -> None:
        """Train the U-Net together with the text encoder."""
        data, held_out = (load_latents(self.folder / "latents", split, self.device) for split in SPLITS)
        factor = _scaling_factor(data)
        scaled, scaled_held_out = (part._replace(latents=part.latents * factor) for part in (data, held_out))

        def draw(model: DenoiserLoss) -> Image.Image:
            pipeline = assemble(self._autoencoder().to(self.device), model.unet, model.text_encoder, factor)
            return draw_sheet(diffuser_of(pipeline), SHEET_CAPTIONS[: self.config.n_drawn])

        torch.manual_seed(self.config.seed)
        task = DenoiserTask(self.config.denoiser, scaled, scaled_held_out, draw)
        if self.warm_start:
            _load(task.model, self.package / "model", {"unet.": "unet", "text_encoder.": "text_encoder"})
        pretrained = self.folder / "text" / "ema.safetensors"
        if pretrained.exists():
            task.model.load_state_dict({**task.model.state_dict(), **load_file(pretrained)})
        self._train(task, self.config.denoiser_loop)

    def train_judges(self) -> None:
        """Train the segmenters and the style classifier."""
        torch.manual_seed(self.config.seed + 1)
        task = JudgesTask(self.config.judges, self.config.n_held_out)
        if self.warm_start:
            _load(task.model, self.package, {f"{name}.": name for name in JUDGES})
        self._train(task, self.config.judges_loop)

    def export(self) -> None:
        """Export what has been trained to the package, in fp16; judges that were not trained stay unchanged."""
        data = load_latents(self.folder / "latents", "train")
        model = DenoiserLoss(self.config.denoiser, data.latents.shape[1], data.latents.shape[-1])
        model.load_state_dict(load_file(self.folder / "denoiser" / "ema.safetensors"))
        pipeline = assemble(self._autoencoder(), model.unet, model.text_encoder, _scaling_factor(data))
        save(pipeline, self.package / "model")
        trained = self.folder / "judges" / "ema.safetensors"
        if trained.exists():
            judges = JudgesLoss(self.config.judges)
            judges.load_state_dict(load_file(trained))
            for name in JUDGES:
                judge = judges.get_submodule(name)
                assert isinstance(judge, PreTrainedModel)
                judge.half().save_pretrained(self.package / name)
                set_json(self.package / name / "config.json", dtype="float32")
                strip_paths(self.package / name)
        write_surprisals(self.package / TABLE)
        write_wordlist(self.package / WORDLIST)
        write_text(self.package / "training.json", json.dumps(asdict(self.config), indent=2) + "\n")
        logger.info("exported to %s", self.package)

    def train_saes(self) -> None:
        """Train sparse autoencoders on the finished model."""
        # One folder per model: SAEs of another model are neither resumed nor overwritten.
        run = SaeRun(self.folder / "saes" / self._digest("model"), checkpoint_interval_s=self.checkpoint_interval_s)
        train_collection(self.config.saes, self._spec, run, self.package / "saes")

    def label_concepts(self) -> None:
        """Label the latents of the sparse autoencoders."""
        model = self._finished()
        segmenter = load_segmenter(self.package / "segmenter", device=self.device)
        run = LabelRun(
            self.folder / "labels" / self._digest("model", "saes", "segmenter"),
            checkpoint_interval_s=self.checkpoint_interval_s,
        )
        prompts = open_prompts(GRAMMAR, model.check_prompt)
        label_collection(self.config.labels, self.package / "saes", model, segmenter, prompts, run)

    def build_examples(self) -> None:
        """Rebuild the app's stored examples."""
        from training.pipeline.examples import build

        build(self._finished(), self.package / "examples")

    def write_card(self) -> None:
        """Evaluate what is in the package, and write the cards and what its bits exceed; results may be cached."""
        from training.evaluate.information.excess import write_tables
        from training.evaluate.run import EVALUATIONS, EvalOptions, evaluate
        from training.hub.cards import write_sae_card
        from training.pipeline.card import read_curve, write_card

        model = self._finished()
        write_tables(model, self.package)
        options = EvalOptions(saes=(self.package / "saes",), package=self.package)
        tables = evaluate(EVALUATIONS["picturebook"], model, options)
        by_eye = BY_EYE.read_text(encoding="utf-8") if BY_EYE.exists() else ""
        write_card(model, self.package, tables, read_curve(self.folder), by_eye)
        of_saes = evaluate(EVALUATIONS["sae"], model, options) + evaluate(EVALUATIONS["concepts"], model, options)
        of_saes += evaluate(EVALUATIONS["layout"], model, options._replace(parts=["differences"]))
        write_sae_card(self.package / "saes", "picturebook", of_saes)

    def _scenes(self, split: Split, n: int) -> AbstractContextManager[PaintedScenes]:
        """The painted scenes of a split; what is missing is painted during the block."""
        return painted_scenes(self.folder / "scenes" / split, n, split, self.config.dropout, self.n_workers)

    def _train(self, task: Task, loop: LoopConfig) -> None:
        interval = self.checkpoint_interval_s
        train(task, loop, self.folder, n_workers=self.n_workers, checkpoint_interval_s=interval)

    def _digest(self, *names: str) -> str:
        """Hash of the weights in some folders of the package."""
        found = [path for name in names for path in (self.package / name).rglob("*.safetensors")]
        # The statistics beside an SAE's weights do not count.
        return str(files_digest(path for path in found if "saes" not in path.parts or path.name == WEIGHTS))

    @property
    def _spec(self) -> ModelSpec:
        """The embedded model's spec, for the copy in the package."""
        return replace(BUILT_IN["picturebook"], source=str(self.package / "model"), assets=self.package)

    def _finished(self) -> Diffuser:
        """Load the model from the package."""
        return core.load_model(self._spec, device=self.device)

    def _autoencoder(self) -> AutoencoderKL:
        autoencoder: AutoencoderKL = AutoencoderKL.from_pretrained(self.folder / "vae", local_files_only=True)
        return autoencoder.eval()


STAGES: dict[str, Callable[[PicturebookRun], None]] = {
    "autoencoder": PicturebookRun.train_autoencoder,
    "latents": PicturebookRun.encode_scenes,
    "text": PicturebookRun.train_text,
    "denoiser": PicturebookRun.train_denoiser,
    "judges": PicturebookRun.train_judges,
    "export": PicturebookRun.export,
    "saes": PicturebookRun.train_saes,
    "labels": PicturebookRun.label_concepts,
    "examples": PicturebookRun.build_examples,
    "card": PicturebookRun.write_card,
}
"""In the order they run; each needs those before it, except `judges`, which needs none."""


def _scaling_factor(data: Latents) -> float:
    """Reciprocal of the standard deviation of the latents."""
    return 1 / float(data.latents.double().std())


def _load(model: torch.nn.Module, folder: Path, parts: dict[str, str]) -> None:
    """Load exported components into the entries of a training module with the given prefixes; other entries stay."""
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(tuple(parts))}
    for prefix, component in parts.items():
        path = next((folder / component).glob("*.safetensors"))
        state |= {prefix + name: value.float() for name, value in load_file(path).items()}
    model.load_state_dict(state)
    logger.info("starting from the weights in %s", folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run, in this order"
    )
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="JSON file of the recipe")
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=cache_folder("picturebook"),
        help="folder of checkpoints, from which a run resumes",
    )
    parser.add_argument("--out", type=Path, default=PACKAGE, help="folder of the finished model")
    parser.add_argument(
        "--workers", type=int, default=_default_workers(), help="processes that paint scenes; 0 for a thread"
    )
    parser.add_argument("--checkpoint-interval-s", type=float, default=300, help="seconds between checkpoints")
    parser.add_argument("--warm-start", action="store_true", help="start from the weights in --out")


def _default_workers() -> int:
    """All cores but one where a GPU trains; a CPU that trains has none to spare."""
    return max((os.cpu_count() or 1) - 1, 0) if torch.cuda.is_available() else 0


def main(arguments: argparse.Namespace) -> None:
    """Run the requested stages in their order."""
    keep_freed_memory()
    run = PicturebookRun(
        config=read_config(arguments.recipe),
        folder=arguments.run_dir,
        package=arguments.out,
        n_workers=arguments.workers,
        checkpoint_interval_s=arguments.checkpoint_interval_s,
        warm_start=arguments.warm_start,
    )
    with locked(arguments.run_dir):
        for name, stage in STAGES.items():
            if name in arguments.stages:
                logger.info("stage %s", name)
                stage(run)
    PartialState().destroy_process_group()
