"""The Concepts tab."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.ui.inputs import html
from core.ui.runtime import Runtime
from core.ui.scene import Scene

if TYPE_CHECKING:
    from core.trace import Trace


@dataclass(frozen=True)
class ConceptsTab:
    """The tab's components that the page wires up."""

    panel: Any
    """HTML of what was read of the current picture."""


def build_concepts_tab(runtime: Runtime) -> ConceptsTab:
    """Put the tab's components where the caller's `with` is."""
    html("<h2>What is the model thinking of here?</h2>")
    return ConceptsTab(html(concepts_html(runtime, None, None), elem_id="id-concepts"))


def concepts_html(runtime: Runtime, scene: Scene | None, trace: "Trace | None") -> str:
    """The panel of a picture and its codes; without them, the room that it will take, or why it stays empty."""
    del runtime, scene, trace
    return ""
