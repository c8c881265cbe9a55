"""Time to generate an image, compared with diffusers, and to attribute it, compared with the bare U-Net."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

import core
from core.activations.hooks import record
from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import read_pipeline
from core.hardware.graphs import N_EAGER
from core.information.measuring import BATCH_SIZE
from training.benchmark.benchmark import Benchmark
from training.benchmark.prompts import held_out
from training.common.report import Figure, Table, timed

IMAGE_TARGET, ATTRIBUTION_TARGET = 3.0, 10.0
"""Seconds."""
RECORDING_TARGET = 5.0
"""Percent."""
PROMPT = "a cat on the grass"
N_STEPS = 25
N_WORDS = 6
"""Distinct words in the prompts that are attributed."""


def generation(model: Diffuser, n: int) -> Table:
    """The same image by this project and by diffusers, `n` times in turn."""
    pipeline = _pipeline(model)
    guidance = model.spec.guidance_scale
    # The pipeline scales the initial noise by the scheduler's sigma, which is 1 for DDIM.
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(model.device)

    def ours(previews: bool) -> Any:
        return model.generate(PROMPT, seed=0, num_inference_steps=N_STEPS, previews=previews).image

    def recorded() -> Any:
        with record(model):
            return ours(False)

    def theirs() -> Any:
        size = {"height": model.image_size, "width": model.image_size}
        given = {"latents": noise.clone(), "num_inference_steps": N_STEPS, "guidance_scale": guidance}
        return pipeline(PROMPT, **size, **given).images[0]

    difference = np.abs(np.asarray(ours(True), np.int64) - np.asarray(theirs(), np.int64)).max()  # also warms both up
    with_previews, without, plain, watched = [], [], [], []
    for _ in range(n):
        with_previews += timed(lambda: ours(True), 1)
        without += timed(lambda: ours(False), 1)
        watched += timed(recorded, 1)
        plain += timed(theirs, 1)
    overhead = [100 * (b / a - 1) for a, b in zip(without, watched, strict=True)]
    calls = unet_seconds(model, 2, n * 5)
    peer = Figure("diffusers", plain).median
    floor = f"{N_STEPS} bare U-Net calls: {N_STEPS * Figure('call', calls).median:.2f} s"
    reference = f"median of {n} pairs in turn, all hookpoints, steps and branches"
    ratio = Figure("ours", without).median / peer
    figures = [
        Figure("image with a preview of every step, as on the page, s", with_previews, IMAGE_TARGET, floor),
        Figure("image, s", without, IMAGE_TARGET, f"StableDiffusionPipeline: {peer:.2f} s, ratio {ratio:.2f}"),
        Figure(
            "overhead of recording every residual update, %", [Figure("", overhead).median], RECORDING_TARGET, reference
        ),
        Figure("U-Net call of 2 latents (one guided step), ms", [1000 * s for s in calls]),
    ]
    notes = [
        f"{N_STEPS} steps, guidance {guidance:g}, {n} repeats in turn after a warm-up. The two images differ by at "
        f"most {difference} of 255 in any pixel."
    ]
    return Table("generation", "Generating an image", [figure.row() for figure in figures], notes)


def attribution(model: Diffuser, n: int) -> Table:
    """Attribution of every word of `n` held-out captions, on images generated from them."""
    results, seconds = [], []
    for seed, sample in enumerate(held_out(N_WORDS, n)):
        image = model.generate(sample.prompt, seed=seed, previews=False).image

        def measure(prompt: str = sample.prompt, image: Any = image) -> None:
            results.append(core.attribute(model, image, prompt))

        if not results:  # warm-up, measured again below
            measure()
            results.clear()
        seconds += timed(measure, 1)
    # Attribution fills its batches with whole noise samples, each with W + 1 prompts.
    rows = BATCH_SIZE // (N_WORDS + 1) * (N_WORDS + 1)
    pace = Figure("call", unet_seconds(model, rows, 5)).median / rows
    evals = [float(result.n_evals) for result in results]
    floor = f"as many latents through the bare U-Net: {pace * Figure('evals', evals).median:.1f} s"
    figures = [
        Figure(f"attribution of {N_WORDS} words, s", seconds, ATTRIBUTION_TARGET, floor),
        Figure("U-Net evaluations", evals, None, f"{1 / pace:.0f} a second, bare, {rows} at a time"),
        Figure("relative error", [result.rel_error for result in results]),
    ]
    stopped = ", ".join(f"{count} {why}" for why, count in Counter(result.stopped for result in results).items())
    notes = [
        f"{n} held-out captions of {N_WORDS} distinct words at the default error, with images generated from them. "
        f"Stopped by: {stopped}."
    ]
    details = {
        "runs": [
            {"prompt": r.prompt, "seconds": s, "n_evals": r.n_evals, "rel_error": r.rel_error, "stopped": r.stopped}
            for r, s in zip(results, seconds, strict=True)
        ]
    }
    return Table(
        "attribution", "Attributing an image to its words", [figure.row() for figure in figures], notes, details
    )


def unet_seconds(model: Diffuser, batch_size: int, n: int) -> list[float]:
    """Seconds of each of `n` U-Net calls, after a warm-up that leaves it as fast as it gets."""
    x = torch.randn(batch_size, *model.latent_shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    log_snr = torch.zeros(batch_size)
    conditions = model.encode_text([PROMPT] * batch_size)

    def call() -> None:
        model.predict_noise(x, log_snr, conditions).cpu()  # waits for the device

    for _ in range(N_EAGER + 2 if model.graphs.enabled else 1):  # a graph is recorded at the call after `N_EAGER`
        call()
    return timed(call, n)


def _pipeline(model: Diffuser) -> Any:
    """The model as a plain diffusers pipeline with the same sampler settings."""
    pipeline = read_pipeline(model.spec, model.dtype).to(model.device)
    settings = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


GENERATION = Benchmark(
    title="Generation",
    description="Time to generate an image of 25 steps, compared with diffusers' own pipeline on the same weights.",
    settings=7,
    quick=2,
    measure=lambda run, n: [generation(run.model, n)],
)
ATTRIBUTION = Benchmark(
    title="Attribution",
    description="Time to attribute an image to the six words of its prompt at the default error, compared with passing "
    "as many latents through the bare U-Net.",
    settings=7,
    quick=1,
    measure=lambda run, n: [attribution(run.model, n)],
)
