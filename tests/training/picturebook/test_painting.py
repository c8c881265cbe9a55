"""Scenes painted into memory maps: the right ones, once, whatever kills the run."""

from pathlib import Path

import numpy as np
import pytest

from training.picturebook.models import painting
from training.picturebook.models.painting import CHUNK, WORDINGS, PaintedScenes, painted_scenes, tokenize
from training.picturebook.world.captions import Split
from training.picturebook.world.dropout import WordDropout
from training.picturebook.world.scenes import caption_of, layout_of, make_scene, paint

DROPOUT = WordDropout()


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the chunks that are painted, each of whose scenes is a level of grey; chunk 2 fails once."""
    numbers: list[int] = []

    def paint_into(folder: Path, n: int, chunk: int, split: Split, dropout: WordDropout) -> None:
        del split, dropout
        numbers.append(chunk)
        if numbers == [0, 1, 2]:
            raise RuntimeError("out of paint")
        maps = painting._open(folder, n)
        maps["images"][chunk * CHUNK : (chunk + 1) * CHUNK] = chunk + 1
        maps["done"][chunk] = 1

    monkeypatch.setattr(painting, "_paint_into", paint_into)
    return numbers


def levels(scenes: PaintedScenes) -> list[int]:
    return [int(level) for level in scenes.images[::CHUNK, 0, 0, 0]]


def test_scenes_are_those_of_their_numbers(tmp_path: Path) -> None:
    with painted_scenes(tmp_path, 10, "test", DROPOUT, n_workers=0) as scenes:
        assert len(scenes) == CHUNK  # rounded up
        scenes.wait(len(scenes))
        for number in (0, 37):
            scene = make_scene(number, "test")
            assert np.array_equal(scenes.images[number], paint(scene).image)
            assert np.array_equal(scenes.layout[number], layout_of(scene))
            whole = [caption_of(scene, wording).text for wording in range(WORDINGS // 2)]
            assert np.array_equal(scenes.tokens[number, : WORDINGS // 2], tokenize(whole))
            assert (scenes.tokens[number, WORDINGS // 2 :] != scenes.tokens[number, : WORDINGS // 2]).any()


def test_a_killed_run_goes_on_with_the_chunks_that_are_missing(tmp_path: Path, painted: list[int]) -> None:
    with painted_scenes(tmp_path, 5 * CHUNK, "train", DROPOUT, n_workers=0) as scenes:
        scenes.wait(CHUNK)
        assert levels(scenes)[0] == 1
        with pytest.raises(RuntimeError, match="out of paint"):
            scenes.wait(5 * CHUNK)  # a painter's error is its reader's
    before = len(painted)
    with painted_scenes(tmp_path, 5 * CHUNK, "train", DROPOUT, n_workers=0) as scenes:
        scenes.wait(5 * CHUNK)
        assert levels(scenes) == [1, 2, 3, 4, 5]
    assert 2 in painted[before:]
    assert not {0, 1} & set(painted[before:])
    after = len(painted)
    with painted_scenes(tmp_path, 5 * CHUNK, "train", DROPOUT, n_workers=0) as scenes:
        scenes.wait(5 * CHUNK)  # nothing is painted twice
        assert len(painted) == after


def test_a_longer_run_keeps_what_there_is_and_other_texts_are_made_anew(tmp_path: Path, painted: list[int]) -> None:
    for n_chunks, dropout, expected in (
        (2, DROPOUT, [0, 1]),
        (4, DROPOUT, [2, 3]),
        (3, DROPOUT, []),
        (2, WordDropout(empty=0.33, any_words=0.0), [0, 1]),
        (2, DROPOUT, [0, 1]),
    ):
        painted[:] = [-1]  # so that none fails
        with painted_scenes(tmp_path, n_chunks * CHUNK, "train", dropout, n_workers=0) as scenes:
            scenes.wait(n_chunks * CHUNK)
            assert levels(scenes) == list(range(1, n_chunks + 1))
        assert painted[1:] == expected


@pytest.mark.slow
def test_processes_paint_what_a_thread_paints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painting, "CHUNKS_A_PROCESS", 1)
    images = []
    for n_workers in (0, 2):
        with painted_scenes(tmp_path / str(n_workers), 2 * CHUNK, "train", DROPOUT, n_workers) as scenes:
            scenes.wait(len(scenes))
            images.append(np.array(scenes.images))
    assert np.array_equal(*images)
