import pytest

from core.spec import BUILT_IN, HookpointRange, ModelSpec, default_hookpoint


@pytest.mark.parametrize(
    ("hookpoints", "default"), [((), ""), (("mid",), "mid"), (("down", "mid"), "mid"), (("down", "mid", "up"), "mid")]
)
def test_the_default_hookpoint_is_the_bottlenecks(hookpoints: tuple[str, ...], default: str) -> None:
    assert default_hookpoint(hookpoints) == default
    assert ModelSpec("some", "some/model", hookpoints=hookpoints).default_hookpoint == default


@pytest.mark.parametrize("spec", BUILT_IN.values(), ids=BUILT_IN)
def test_the_built_in_models_have_their_bottleneck_second(spec: ModelSpec) -> None:
    assert spec.default_hookpoint.startswith("mid_block.")
    assert sum(name.startswith("mid_block.") for name in spec.hookpoints) == 1


@pytest.mark.parametrize(
    ("which", "names"),
    [("bottleneck", ("mid",)), ("from bottleneck", ("mid", "up")), ("all", ("down", "mid", "up"))],
)
def test_hookpoints_of_edits(which: HookpointRange, names: tuple[str, ...]) -> None:
    assert ModelSpec("some", "some/model", hookpoints=("down", "mid", "up")).edit_hookpoints(which) == names
    assert ModelSpec("some", "some/model", hookpoints=("mid",)).edit_hookpoints(which) == ("mid",)
    assert ModelSpec("some", "some/model").edit_hookpoints(which) == ()


def test_what_comes_with_a_model() -> None:
    assets = BUILT_IN["picturebook"].assets
    assert assets is not None
    assert {"saes", "segmenter", "second_segmenter", "examples"} <= {path.name for path in assets.iterdir()}
    assert BUILT_IN["sd-v1-4"].assets is None
