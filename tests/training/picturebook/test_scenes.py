from collections import Counter
from time import process_time

import numpy as np
import pytest
from PIL import Image

from training.picturebook.world.captions import RELATIONS
from training.picturebook.world.drawings import SIZE as DRAWING_SIZE
from training.picturebook.world.drawings import crop_to_square, drawing
from training.picturebook.world.scenes import CELL, Box, Scene, caption_of, make_scene, paint, relation_holds
from training.picturebook.world.styles import apply_style
from training.picturebook.world.world import (
    ARTISTS,
    BACKGROUND_INDEX,
    BACKGROUNDS,
    LABELS,
    OBJECT_INDEX,
    OBJECTS,
    STYLES,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed) for seed in range(4000)]


def test_a_seed_is_a_scene() -> None:
    assert make_scene(5) == make_scene(5) != make_scene(6)
    np.testing.assert_array_equal(paint(make_scene(5)).image, paint(make_scene(5)).image)
    assert caption_of(make_scene(5), 1) == caption_of(make_scene(5), 1)


def test_things_do_not_overlap_and_lie_on_the_grid_of_cells(scenes) -> None:
    for scene in scenes[:500]:
        cover = np.zeros((128, 128), int)
        for box in scene.boxes:
            assert box.x % CELL == box.y % CELL == 0
            cover[box.y : box.y + box.size, box.x : box.x + box.size] += 1
            assert 0 <= box.x <= 128 - box.size
            assert 0 <= box.y <= 128 - box.size
        assert cover.max() == 1


def test_labels_tell_what_each_pixel_shows(scenes) -> None:
    for scene in scenes[:200]:
        labels = paint(scene).labels
        background = len(OBJECTS) + BACKGROUND_INDEX[scene.story.background]
        assert set(np.unique(labels)) == {background} | {OBJECT_INDEX[box.object_name] for box in scene.boxes}
        for box in scene.boxes:
            rows, columns = np.nonzero(labels == OBJECT_INDEX[box.object_name])
            assert box.y <= rows.min()
            assert rows.max() < box.y + box.size
            assert box.x <= columns.min()
            assert columns.max() < box.x + box.size
    assert len(LABELS) == len(OBJECTS) + len(BACKGROUNDS)


def test_relations_are_true_and_balanced(scenes) -> None:
    related = [scene for scene in scenes if scene.story.relation]
    assert len(related) > 800
    for scene in related:
        assert relation_holds(scene.story.relation, *scene.boxes)
        assert [relation_holds(r, *scene.boxes) for r in RELATIONS].count(True) == 1
    cat, dog = Box("cat", 0, 0, 56), Box("dog", 64, 8, 56)
    assert relation_holds("left", cat, dog)
    assert relation_holds("right", dog, cat)
    assert not relation_holds("above", cat, dog)


def test_every_thing_is_met_in_every_quadrant_and_place(scenes) -> None:
    met = Counter()
    for seed in range(6000):
        scene = scenes[seed] if seed < len(scenes) else make_scene(seed)
        for box in scene.boxes:
            middle = box.size / 2
            met[box.object_name, "quadrant", box.x + middle > 64, box.y + middle > 64] += 1
            met[box.object_name, "background", scene.story.background] += 1
    for object_name in OBJECTS:
        for right in (False, True):
            for below in (False, True):
                assert met[object_name.name, "quadrant", right, below] > 0
        for background in BACKGROUNDS:
            assert met[object_name.name, "background", background.name] > 0


def test_homonyms_mean_what_their_place_says(scenes) -> None:
    seen = Counter()
    for seed in range(6000):
        scene = scenes[seed] if seed < len(scenes) else make_scene(seed)
        wild = BACKGROUNDS[BACKGROUND_INDEX[scene.story.background]].wild
        for box in scene.boxes:
            if box.object_name in ("bat", "club"):
                seen[wild, box.object_name] += 1
    assert seen[True, "bat"] / (seen[True, "bat"] + seen[True, "club"]) == pytest.approx(0.9, abs=0.04)
    assert seen[False, "club"] / (seen[False, "bat"] + seen[False, "club"]) == pytest.approx(0.9, abs=0.04)


def test_drawings_fill_their_square() -> None:
    for artist in ARTISTS:
        for object_name in OBJECTS:
            alpha = drawing(object_name.name, artist, DRAWING_SIZE)[..., 3] > 0.03
            rows, columns = np.nonzero(alpha)
            assert max(np.ptp(rows), np.ptp(columns)) >= DRAWING_SIZE - 3
    wide = Image.new("RGBA", (40, 30))
    wide.paste((255, 0, 0, 255), (10, 10, 30, 20))
    assert crop_to_square(wide, 64).getchannel("A").getbbox() == (0, 16, 64, 48)


def test_styles_change_the_picture_and_keep_its_size() -> None:
    image = paint(next(s for s in map(make_scene, range(100)) if s.story.style == "plain")).image
    results = [apply_style(style, image, np.random.default_rng(0)) for style in STYLES]
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert np.abs(one.astype(int) - other).mean() > 5


def test_scenes_are_painted_fast_enough_to_feed_training() -> None:
    def seconds_per_scene(first: int) -> float:
        started = process_time()
        for seed in range(first, first + 200):
            paint(make_scene(seed))
        return (process_time() - started) / 200

    image = np.random.default_rng(0).uniform(0, 1, (128, 128, 3)).astype(np.float32)

    def seconds_per_blend() -> float:
        started = process_time()
        for _ in range(200):
            (image * (1 - image) + image).clip(0, 1)
        return (process_time() - started) / 200

    seconds_per_scene(0)
    # A ratio in one run: at 300 scenes a second, and 23 microseconds a blend, a scene may take as long as 140 blends.
    assert seconds_per_scene(1000) < 140 * seconds_per_blend()
