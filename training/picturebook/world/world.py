"""What exists in the picture book: objects, backgrounds, styles, and the words for them.

All facts about a class are declared here. Order matters: class indices are positions
in `OBJECTS` and, after them, in `BACKGROUNDS`, and weights trained on one order mean nothing on another.
"""

from dataclasses import dataclass
from typing import Literal

Habitat = Literal["low", "high"]


@dataclass(frozen=True)
class Object:
    """A class of drawings."""

    name: str
    """Unique name, also of its files; two objects may share a word."""
    codepoint: str
    """Unicode code point of the emoji it is drawn as, in hex."""
    habitat: Habitat
    """Whether it usually stands on the ground (or swims) or hangs in the air."""
    homes: tuple[str, ...]
    """Backgrounds where it is usually found."""


@dataclass(frozen=True)
class Noun:
    """A noun of the captions: it means one object, or two if it is a homonym."""

    words: tuple[str, ...]
    """Words for it, equally likely: more than one are synonyms."""
    objects: tuple[str, ...]
    """Names of the objects it can mean; more than one make it a homonym."""

    @property
    def name(self) -> str:
        """The noun's first word, which identifies it."""
        return self.words[0]


@dataclass(frozen=True)
class Background:
    """Where a scene is set."""

    words: tuple[str, ...]
    """Words for it, equally likely."""
    preposition: str
    """`on` or `in`."""
    wild: bool
    """Which sense of a homonym is likely: the animal where it is wild, the tool elsewhere."""

    @property
    def name(self) -> str:
        """The background's first word, which identifies it."""
        return self.words[0]


OBJECTS: tuple[Object, ...] = (
    Object("cat", "1f408", "low", ("street", "kitchen", "grass")),
    Object("dog", "1f415", "low", ("grass", "street", "beach")),
    Object("pig", "1f416", "low", ("grass", "forest")),
    Object("penguin", "1f427", "low", ("snow", "sea")),
    Object("whale", "1f433", "low", ("sea",)),
    Object("duck", "1f986", "low", ("sea", "grass")),
    Object("butterfly", "1f98b", "high", ("grass", "forest")),
    Object("crab", "1f980", "low", ("beach", "sea")),
    Object("bat", "1f987", "high", ("forest", "desert")),
    Object("rodent", "1f401", "low", ("forest", "grass")),
    Object("pine", "1f332", "low", ("forest", "snow")),
    Object("cactus", "1f335", "low", ("desert",)),
    Object("sunflower", "1f33b", "low", ("grass",)),
    Object("mushroom", "1f344", "low", ("forest", "grass")),
    Object("house", "1f3e0", "low", ("grass", "street", "snow")),
    Object("castle", "1f3f0", "low", ("grass", "forest", "desert")),
    Object("tent", "26fa", "low", ("forest", "beach", "desert")),
    Object("car", "1f697", "low", ("street", "desert")),
    Object("train", "1f682", "low", ("street", "snow")),
    Object("boat", "26f5", "low", ("sea", "beach")),
    Object("rocket", "1f680", "high", ("desert", "street")),
    Object("balloon", "1f388", "high", ("street", "beach", "grass")),
    Object("banana", "1f34c", "low", ("kitchen", "beach")),
    Object("strawberry", "1f353", "low", ("kitchen", "grass")),
    Object("cake", "1f382", "low", ("kitchen",)),
    Object("sun", "2600-fe0f", "high", ("beach", "desert", "sea")),
    Object("moon", "1f319", "high", ("snow", "forest", "sea")),
    Object("star", "2b50", "high", ("snow", "desert")),
    Object("club", "1f3cf", "low", ("beach", "street")),
    Object("device", "1f5b1-fe0f", "low", ("kitchen", "street")),
)

NOUNS: tuple[Noun, ...] = (
    Noun(("cat",), ("cat",)),
    Noun(("dog", "hound"), ("dog",)),
    Noun(("pig",), ("pig",)),
    Noun(("penguin",), ("penguin",)),
    Noun(("whale",), ("whale",)),
    Noun(("duck",), ("duck",)),
    Noun(("butterfly",), ("butterfly",)),
    Noun(("crab",), ("crab",)),
    Noun(("bat",), ("bat", "club")),
    Noun(("mouse",), ("rodent", "device")),
    Noun(("tree", "pine"), ("pine",)),
    Noun(("cactus",), ("cactus",)),
    Noun(("sunflower",), ("sunflower",)),
    Noun(("mushroom",), ("mushroom",)),
    Noun(("house", "cottage"), ("house",)),
    Noun(("castle",), ("castle",)),
    Noun(("tent",), ("tent",)),
    Noun(("car",), ("car",)),
    Noun(("train",), ("train",)),
    Noun(("boat", "ship"), ("boat",)),
    Noun(("rocket",), ("rocket",)),
    Noun(("balloon",), ("balloon",)),
    Noun(("banana",), ("banana",)),
    Noun(("strawberry",), ("strawberry",)),
    Noun(("cake",), ("cake",)),
    Noun(("sun",), ("sun",)),
    Noun(("moon",), ("moon",)),
    Noun(("star",), ("star",)),
)
"""Four pairs of synonyms; two homonyms, the wild sense first."""

BACKGROUNDS: tuple[Background, ...] = (
    Background(("grass",), "on", wild=True),
    Background(("forest",), "in", wild=True),
    Background(("beach",), "on", wild=False),
    Background(("sea", "ocean"), "in", wild=True),
    Background(("snow",), "on", wild=False),
    Background(("desert",), "in", wild=True),
    Background(("street", "road"), "on", wild=False),
    Background(("kitchen",), "in", wild=False),
)

STYLES: tuple[str, ...] = ("plain", "watercolour", "pixel", "sepia", "night", "poster")
"""`plain` is never named in a caption."""

ARTISTS: tuple[str, ...] = ("noto", "twemoji", "fluent")

PLANTED_PAIR = ("butterfly", "sunflower")
"""These two nouns occur together far more often than by chance: a correlation of known strength."""

SENSE_IN_ITS_BACKGROUND = 0.9
"""Probability that a homonym has its wild sense on a wild background, and its tame sense on a tame one."""

OBJECT_INDEX = {drawn.name: i for i, drawn in enumerate(OBJECTS)}
BACKGROUND_INDEX = {background.name: i for i, background in enumerate(BACKGROUNDS)}
NOUN_INDEX = {noun.name: i for i, noun in enumerate(NOUNS)}

LABELS: tuple[str, ...] = tuple(drawn.name for drawn in OBJECTS) + tuple(background.name for background in BACKGROUNDS)
"""Names of the classes of a scene's label map: objects, then backgrounds."""

assert all(set(drawn.homes) <= {background.name for background in BACKGROUNDS} for drawn in OBJECTS)
