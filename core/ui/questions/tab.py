"""Further questions about the picture, below the attribution: two words, a word left out, captions, all of it."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from core.ui.inputs import html
from core.ui.questions.answers import asking_html, empty_html

_ASK = (
    "const questions = ['pair', 'absence', 'captions', 'likelihood', 'stop'];"
    " window.idPage.ask = (question, data) => questions.includes(question) && trigger(question, data ?? {});"
)
_PAIR = """
<div class="id-question" id="id-pair-ask">
  <h3>What do two words tell together?</h3>
  <p class="id-hint">Some of what a word tells another tells as well (<dfn>redundancy</dfn>), some it alone
  (<dfn>unique</dfn>), and some only both together (<dfn>synergy</dfn>). Hold Shift and click a second word above, or
  choose it here.</p>
  <p class="id-question-row"><b class="id-first"></b> and
  <select class="id-second" aria-label="Second word"></select>
  <select class="id-pair-given" aria-label="What is given">
    <option value="rest">given the rest of the prompt</option>
    <option value="nothing">alone, without the rest</option>
  </select>
  <button type="button" class="id-button id-pair-go">Take them apart</button>
  <span class="id-question-problem" role="status"></span></p>
</div>
"""
_ABSENCE = """
<div class="id-question" id="id-absence-ask">
  <h3>What if this word were not there?</h3>
  <p class="id-hint">The picture is followed back to the noise that it came from, and drawn again from that noise
  without the word: what changes is the word’s doing.</p>
  <p class="id-question-row"><button type="button" class="id-button id-absence-go">Draw it <span
  class="id-without">without</span> <b class="id-first"></b></button>
  <span class="id-question-problem" role="status"></span></p>
</div>
"""
_LIKELIHOOD = """
<div class="id-question" id="id-likelihood-ask">
  <h3>How well does the model expect this picture?</h3>
  <p class="id-hint">A model that guesses noise well gives pictures a probability, too; this measures the picture’s,
  with its prompt and without it.</p>
  <p class="id-question-row"><button type="button" class="id-button id-likelihood-go">Measure it</button>
  <span class="id-question-problem" role="status"></span></p>
</div>
"""


@dataclass(frozen=True)
class Question:
    """One question's own components."""

    name: str
    """`pair`, `absence`, `captions` or `likelihood`: also the event of the asker that asks it."""
    ticket: Any
    """Number of the job; travels with the request that uses it."""
    asked: Any
    """What is asked, as JSON; travels likewise."""
    status: Any
    """HTML of how far the answer is."""
    panel: Any
    """HTML of the answer."""


@dataclass(frozen=True)
class Questions:
    """The components that `wire_questions` wires up."""

    asker: Any
    """Its events, the questions' names and `stop`, come from the page's script and carry what is asked."""
    pair: Question
    absence: Question
    ranking: Question
    likelihood: Question
    other: Any
    """What to put in the place of a word; empty: nothing."""
    fold: Any
    """The fold round the captions."""
    captions: Any
    """Captions to compare, one a line."""
    compare: Any
    """The button that compares them."""

    @property
    def each(self) -> tuple[Question, ...]:
        """All of them, in the page's order."""
        return self.pair, self.absence, self.ranking, self.likelihood


def build_questions() -> Questions:
    """Put the questions where the caller's `with` is."""
    asker = html('<div class="id-asker"></div>', js_on_load=_ASK, elem_id="id-asker")
    html(_PAIR)
    pair = _question("pair", "Four maps will appear here: what either word tells, what only one tells, what only both.")
    html(_ABSENCE)
    other = gr.Textbox(
        label="Or put another word in its place",
        placeholder="leave empty to take it out",
        max_lines=1,
        elem_id="id-other-word",
    )
    absence = _question("absence", "The picture with the word and without it will appear here, and where it changed.")
    with gr.Accordion("Which caption fits this picture?", open=False, elem_id="id-captions") as fold:
        captions = gr.Textbox(
            label="Captions, one a line",
            info="The picture is asked which of them tells it best, and how certain that is.",
            placeholder="a cat on the grass\na dog on the grass",
            lines=3,
            max_lines=12,
            elem_id="id-caption-lines",
        )
        compare = gr.Button("Compare", elem_id="id-compare", size="sm")
        ranking = _question("captions", "The captions will appear here, the best fitting first.")
    html(_LIKELIHOOD)
    likelihood = _question(
        "likelihood", "The picture’s bits a dimension will appear here, with its prompt and without."
    )
    return Questions(asker, pair, absence, ranking, likelihood, other, fold, captions, compare)


def _question(name: str, what: str) -> Question:
    return Question(
        name,
        gr.Number(visible=False, value=0),
        gr.Textbox(visible=False, value=""),
        html(asking_html(), elem_classes="id-asking-room"),
        html(empty_html({"captions": "ranking"}.get(name, name), what)),
    )
