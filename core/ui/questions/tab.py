"""Further questions below the attribution: a word pair, a counterfactual word change, captions, likelihood."""

from dataclasses import dataclass

import gradio as gr

from core.ui.backend.fields import TextField, html
from core.ui.questions.answers import empty_html, progress_html

_TRIGGER = (
    "const questions = ['pair', 'counterfactual', 'captions', 'likelihood', 'stop'];"
    " window.idPage.ask = (question, data) => { if (questions.includes(question)) trigger(question, data ?? {}); };"
)
_PAIR = """
<div class="id-question" id="id-pair-ask">
  <h3>What do two words share?</h3>
  <p class="id-hint">Two words may overlap (<dfn>redundancy</dfn>), add something of their own (<dfn>unique</dfn>), or
  matter only as a pair (<dfn>synergy</dfn>). Hold Shift and click a second word above, or choose it here.</p>
  <p class="id-question-row"><b class="id-first"></b> and
  <select class="id-second" aria-label="Second word"></select>
  <select class="id-pair-given" aria-label="What is given">
    <option value="rest">on top of the other words</option>
    <option value="nothing">on their own</option>
  </select>
  <button type="button" class="id-button id-pair-go">Compare them</button>
  <span class="id-question-problem" role="status"></span></p>
</div>
"""
_COUNTERFACTUAL = """
<div class="id-question" id="id-counterfactual-ask">
  <h3>What if this word were not there?</h3>
  <p class="id-hint">The picture is traced back to the noise it came from and redrawn from that noise without the word:
  what changes is due to the word.</p>
  <p class="id-question-row"><button type="button" class="id-button id-counterfactual-go">Redraw it <span
  class="id-without">without</span> <b class="id-first"></b></button>
  <span class="id-question-problem" role="status"></span></p>
</div>
"""
_LIKELIHOOD = """
<div class="id-question" id="id-likelihood-ask">
  <h3>How likely is this picture to the model?</h3>
  <p class="id-hint">A model that predicts noise also assigns a probability to every picture; this measures it, with the
  prompt and without.</p>
  <p class="id-question-row"><button type="button" class="id-button id-likelihood-go">Measure it</button>
  <span class="id-question-problem" role="status"></span></p>
</div>
"""


@dataclass(frozen=True)
class Question:
    """One question's components."""

    name: str
    """`pair`, `counterfactual`, `captions` or `likelihood`: also the event of the trigger that asks it."""
    ticket: gr.Number
    """The job's ticket; it travels with the request that uses it."""
    query: gr.Textbox
    """What is asked, as JSON; it travels with the request, too."""
    status: gr.HTML
    """Progress of the answer."""
    panel: gr.HTML
    """The answer."""


@dataclass(frozen=True)
class Questions:
    """The components that `wire_questions` connects."""

    trigger: gr.HTML
    """Its events, named like the questions and `stop`, are raised by the page's script and carry what is asked."""
    pair: Question
    counterfactual: Question
    ranking: Question
    likelihood: Question
    replacement: gr.Textbox
    """The word to put in place of another; empty: the word is removed."""
    captions_fold: gr.Accordion
    captions: gr.Textbox
    """Captions to compare, one per line."""
    compare: gr.Button
    """Compares the captions."""

    @property
    def each(self) -> tuple[Question, ...]:
        """All questions, in the page's order."""
        return self.pair, self.counterfactual, self.ranking, self.likelihood


def build_questions() -> Questions:
    """Create the components inside the caller's `with` block."""
    trigger = html('<div class="id-question-trigger"></div>', js_on_load=_TRIGGER, elem_id="id-question-trigger")
    html(_PAIR)
    pair = _question("pair", "Four maps will appear here: what either word gives, what only one gives, what only both.")
    html(_COUNTERFACTUAL)
    replacement = TextField(
        label="Or replace it by another word",
        placeholder="leave empty to remove it",
        max_lines=1,
        elem_id="id-other-word",
    )
    counterfactual = _question(
        "counterfactual", "The picture with and without the word will appear here, and what changed."
    )
    with gr.Accordion("Which caption fits this picture?", open=False, elem_id="id-captions") as fold:
        captions = TextField(
            label="Captions, one per line",
            info="Ranks them by how well they fit the picture, with a certainty.",
            placeholder="a cat on the grass\na dog on the grass",
            lines=3,
            max_lines=12,
            elem_id="id-caption-lines",
        )
        compare = gr.Button("Compare", elem_id="id-compare", size="sm")
        ranking = _question("captions", "The captions will appear here, the best first.")
    html(_LIKELIHOOD)
    likelihood = _question(
        "likelihood", "The picture’s bits per dimension will appear here, with its prompt and without."
    )
    return Questions(trigger, pair, counterfactual, ranking, likelihood, replacement, fold, captions, compare)


def _question(name: str, answer: str) -> Question:
    return Question(
        name,
        gr.Number(visible=False, value=0),
        TextField(visible=False, value=""),
        html(progress_html(), elem_classes="id-question-status"),
        html(empty_html({"captions": "ranking"}.get(name, name), answer)),
    )
