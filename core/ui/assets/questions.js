// @ts-check
// Further questions: which words they are about, what an answer shows on the image, what the address remembers.
(() => {
  "use strict";
  const page = window.idPage;
  const { one, all, set, target, query } = page;
  const TAB = "Attribution";
  const ANSWERS = ["pair", "counterfactual", "ranking", "likelihood"]; // in the page's order

  const asked = new URLSearchParams(["pair", "pair_given", "without", "instead", "captions", "likelihood"].flatMap((name) =>
    query.has(name) ? [[name, query.get(name)]] : []));
  /** @type {string | null} */
  let part = null; // which of the four maps is shown on the image
  /** @type {string | null} */
  let second = null;
  /** @type {WeakMap<HTMLElement, string | undefined>} */
  const images = new WeakMap(); // the image that each answer was about

  /** @param {string} name */
  const answer = (name) => one(`.id-${name}.id-answer:not(.empty)`);
  const words = () => Array.from(new Set(all(".id-chip").map((chip) => chip.dataset.word)));
  /** @param {HTMLElement} [progress] */
  const busy = (progress) => Boolean(progress && one(".id-bar i", progress));

  /** @param {string} question @param {Record<string, string>} [data] */
  const ask = (question, data) => page.ask?.(question, data);

  /** @param {string} first @param {string} other @param {string} [given] */
  function askPair(first, other, given) {
    second = other;
    part = null;
    if (given) one(".id-pair-given").value = given;
    page.chooseWord(first);
    ask("pair", { first, second: other, given: one(".id-pair-given").value });
  }

  // Whether an answer is about the image that is shown: by its description, and, for uploaded images with the same
  // caption, by the image that was there when the answer came.
  /** @param {HTMLElement} root */
  function fresh(root) {
    const image = one(".id-image")?.src;
    if (!images.has(root)) images.set(root, image);
    return root.dataset.about === one(".id-viewer")?.dataset.about && images.get(root) === image;
  }

  /** @param {HTMLElement | null} root @param {HTMLElement} progress */
  function mark(root, progress) {
    if (!root) return;
    const isNew = fresh(root);
    const asking = busy(progress) && !root.classList.contains("running");
    root.classList.toggle("old", !isNew || asking);
    set(one(".id-old", root), "textContent", isNew ? "previous result" : "previous picture");
  }

  function controls() {
    const chosen = page.chosenWord();
    const others = words().filter((word) => word !== chosen);
    const select = one(".id-second");
    if (!select) return;
    if (!others.includes(second)) second = others[others.length - 1] ?? null;
    if (all("option", select).map((option) => option.value).join("\n") !== others.join("\n")) {
      select.replaceChildren(...others.map((word) => Object.assign(document.createElement("option"), { value: word, textContent: `“${word}”` })));
    }
    if (second !== null) set(select, "value", second);
    for (const name of all(".id-question .id-first")) set(name, "textContent", chosen ? `“${chosen}”` : "a word");
    const none = chosen ? "" : "Generate a picture first, or choose an example.";
    set(one("#id-pair-ask .id-question-problem"), "textContent",
      none || (others.length ? "" : "This prompt has only one word; two different ones are needed."));
    set(one("#id-counterfactual-ask .id-question-problem"), "textContent",
      none || (others.length ? "" : "It is the whole prompt; without it nothing is left."));
    const other = one("#id-other-word input, #id-other-word textarea")?.value.trim();
    set(one(".id-without"), "textContent", other ? `with “${other}” for` : "without");
    set(one(".id-pair-go"), "disabled", !others.length);
    set(one(".id-counterfactual-go"), "disabled", !chosen);
    set(one("#id-likelihood-ask .id-question-problem"), "textContent", none);
    set(one(".id-likelihood-go"), "disabled", !chosen);
    set(select, "disabled", !others.length);
  }

  function restore() {
    if (!asked.size || !page.ask || !one(".id-badge.ready") || !one(".id-panel:not(.empty):not(.running)")) return;
    if (one(".id-status .id-bar i")) return;
    const wanted = new URLSearchParams(asked);
    for (const name of Array.from(asked.keys())) asked.delete(name); // first: what follows comes back here
    const pair = wanted.get("pair")?.split(",");
    if (pair?.length === 2) askPair(pair[0], pair[1], wanted.get("pair_given") === "nothing" ? "nothing" : "rest");
    if (wanted.get("without")) ask("counterfactual", { word: wanted.get("without"), to: wanted.get("instead") ?? "" });
    if (wanted.get("captions")) ask("captions", { captions: wanted.get("captions") });
    if (wanted.get("likelihood")) ask("likelihood");
  }

  page.watchers.push(() => {
    controls();
    restore();
    const progress = all(".id-question-progress");
    ANSWERS.forEach((name, i) => {
      mark(answer(name), progress[i]);
      // The space for an answer is reserved when it is asked for, not when it comes.
      one(`.id-${name}.empty`)?.classList.toggle("asked", busy(progress[i]));
    });
    const pair = answer("pair");
    for (const button of all("button.id-part")) {
      page.attribute(button, "aria-pressed", String(button.dataset.part === part));
    }
    const about = pair && !pair.classList.contains("old") && page.chosenWord() === pair.dataset.first ? pair.dataset.second : null;
    for (const chip of all(".id-chip")) chip.classList.toggle("second", chip.dataset.word === about);
  });

  page.overlays[TAB] = () => {
    const pair = answer("pair");
    const button = pair && part && !pair.classList.contains("old") ? one(`button.id-part[data-part="${part}"]`, pair) : null;
    return button ? { src: one("img", button).src, tag: button.dataset.title, scale: { top: pair.dataset.top } } : null;
  };

  page.parameters[TAB] = () => {
    /** @type {Record<string, string>} */
    const found = {};
    const [pair, counterfactual, ranking, likelihood] = ANSWERS.map((name) => {
      const root = answer(name);
      return root && !root.classList.contains("old") ? root.dataset : null;
    });
    if (pair) found.pair = `${pair.first},${pair.second}`;
    if (pair?.given === "nothing") found.pair_given = "nothing";
    if (counterfactual) found.without = counterfactual.word;
    if (counterfactual?.to) found.instead = counterfactual.to;
    if (ranking) found.captions = ranking.captions;
    if (likelihood) found.likelihood = "1";
    return found;
  };

  document.addEventListener("click", (event) => {
    /** @param {string} selector */
    const hit = (selector) => target(event).closest?.(selector);
    const chip = hit(".id-chip");
    const map = hit("button.id-part");
    if (chip && event.shiftKey) {
      event.stopImmediatePropagation();
      const first = page.chosenWord();
      if (first && chip.dataset.word !== first) askPair(first, chip.dataset.word);
    } else if (chip) part = null;
    else if (map) {
      part = part === map.dataset.part ? null : map.dataset.part;
      page.state.step = null;
      page.apply();
    } else if (hit(".id-pair-go") && second) askPair(page.chosenWord(), second);
    else if (hit(".id-counterfactual-go")) ask("counterfactual", { word: page.chosenWord() });
    else if (hit(".id-likelihood-go")) ask("likelihood");
    else if (hit(".id-stop")) ask("stop");
    else if (hit(".id-answer-png")) savePng(hit(".id-answer"));
  }, true);

  document.addEventListener("input", (event) => {
    if (target(event).matches?.(".id-second")) second = target(event).value;
    else if (target(event).closest?.("#id-other-word")) controls();
  });

  // The figures of an answer side by side, each above its title.
  /** @param {HTMLElement} root */
  async function savePng(root) {
    const figures = all("figure", root).filter((figure) => one("img", figure));
    const side = 384;
    const line = 26;
    const canvas = Object.assign(document.createElement("canvas"), { width: side * figures.length, height: side + 3 * line });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fffdf9";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const small = Object.assign(new Image(), { src: root.style.getPropertyValue("--id-small").replace(/^url\(["']?|["']?\)$/g, "") });
    await small.decode();
    figures.forEach((figure, i) => {
      context.imageSmoothingQuality = "high";
      context.drawImage(small, i * side, 0, side, side);
      context.drawImage(one("img", figure), i * side, 0, side, side);
      context.fillStyle = "#1f1926";
      context.font = "600 19px system-ui, sans-serif";
      context.fillText(one("b", figure).textContent, i * side + 8, side + line, side - 16);
      context.font = "17px system-ui, sans-serif";
      context.fillText(one("figcaption > span", figure).textContent, i * side + 8, side + 2 * line, side - 16);
    });
    const link = document.createElement("a");
    link.download = `${root.classList.contains("id-pair") ? `${root.dataset.first}-${root.dataset.second}` : `without-${root.dataset.word}`}.png`;
    link.href = canvas.toDataURL("image/png");
    link.click();
  }

  // The address remembers each finished answer.
  let last = "";
  page.changes.push(() => {
    const now = ANSWERS.map((name) => {
      const root = answer(name);
      return root && !root.classList.contains("running") ? JSON.stringify({ ...root.dataset }) : "";
    }).join("|");
    if (now === last) return;
    last = now;
    page.apply();
    page.remember();
  });
})();
