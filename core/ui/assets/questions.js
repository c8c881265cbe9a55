// Further questions about the picture: which two are asked about, what an answer lays on the picture, what the address keeps.
(() => {
  "use strict";
  const page = window.idPage;
  const TAB = "Attribution";
  const ANSWERS = ["pair", "absence", "ranking", "likelihood"]; // in the page's order
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const set = (element, name, value) => { if (element && element[name] !== value) element[name] = value; };

  const query = page.query;
  const asked = new URLSearchParams(["pair", "pairgiven", "without", "instead", "captions", "expected"].flatMap((name) =>
    query.has(name) ? [[name, query.get(name)]] : []));
  let part = null; // which of the four maps lies on the picture
  let second = null;
  const pictures = new WeakMap(); // what picture an answer was about, by its element

  const answer = (name) => one(`.id-${name}.id-answer:not(.empty)`);
  const words = () => Array.from(new Set(all(".id-chip").map((chip) => chip.dataset.word)));
  const busy = (room) => Boolean(room && one(".id-bar i", room));

  const ask = (question, data) => page.ask?.(question, data);

  function askPair(first, other, given) {
    second = other;
    part = null;
    if (given) one(".id-pair-given").value = given;
    page.chooseWord(first);
    ask("pair", { first, second: other, given: one(".id-pair-given").value });
  }

  // A result is about the picture that it names. Of two that somebody brought with one caption: that was there when it came.
  function fresh(root) {
    const picture = one(".id-picture")?.src;
    if (!pictures.has(root)) pictures.set(root, picture);
    return root.dataset.about === one(".id-stage")?.dataset.about && pictures.get(root) === picture;
  }

  function mark(root, room) {
    if (!root) return;
    const isNew = fresh(root);
    const asking = busy(room) && !root.classList.contains("running");
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
    set(one("#id-absence-ask .id-question-problem"), "textContent",
      none || (others.length ? "" : "It is the whole prompt: without it there is none."));
    const other = one("#id-other-word input, #id-other-word textarea")?.value.trim();
    set(one(".id-without"), "textContent", other ? `with “${other}” for` : "without");
    set(one(".id-pair-go"), "disabled", !others.length);
    set(one(".id-absence-go"), "disabled", !chosen);
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
    if (pair?.length === 2) askPair(...pair, wanted.get("pairgiven") === "nothing" ? "nothing" : "rest");
    if (wanted.get("without")) ask("absence", { word: wanted.get("without"), to: wanted.get("instead") ?? "" });
    if (wanted.get("captions")) ask("captions", { captions: wanted.get("captions") });
    if (wanted.get("expected")) ask("likelihood");
  }

  page.watchers.push(() => {
    controls();
    restore();
    const rooms = all(".id-asking");
    ANSWERS.forEach((name, i) => {
      mark(answer(name), rooms[i]);
      // The room that an answer will take is made when it is asked for, not when it comes.
      one(`.id-${name}.empty`)?.classList.toggle("asked", busy(rooms[i]));
    });
    const pair = answer("pair");
    for (const button of all("button.id-part")) {
      button.setAttribute("aria-pressed", String(button.dataset.part === part));
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
    const found = {};
    const [pair, absence, ranking, likelihood] = ANSWERS.map((name) => {
      const root = answer(name);
      return root && !root.classList.contains("old") ? root.dataset : null;
    });
    if (pair) found.pair = `${pair.first},${pair.second}`;
    if (pair?.given === "nothing") found.pairgiven = "nothing";
    if (absence) found.without = absence.word;
    if (absence?.to) found.instead = absence.to;
    if (ranking) found.captions = ranking.captions;
    if (likelihood) found.expected = "1";
    return found;
  };

  document.addEventListener("click", (event) => {
    const hit = (selector) => event.target.closest?.(selector);
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
    else if (hit(".id-absence-go")) ask("absence", { word: page.chosenWord() });
    else if (hit(".id-likelihood-go")) ask("likelihood");
    else if (hit(".id-stop")) ask("stop");
    else if (hit(".id-answer-png")) savePng(hit(".id-answer"));
  }, true);

  document.addEventListener("input", (event) => {
    if (event.target.matches?.(".id-second")) second = event.target.value;
    else if (event.target.closest?.("#id-other-word")) controls();
  });

  // The figures of an answer side by side, each over its title.
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

  // An answer that came is remembered by the address.
  let last = "";
  new MutationObserver(() => {
    const now = ANSWERS.map((name) => {
      const root = answer(name);
      return root && !root.classList.contains("running") ? JSON.stringify({ ...root.dataset }) : "";
    }).join("|");
    if (now === last) return;
    last = now;
    requestAnimationFrame(() => { page.apply(); page.remember(); });
  }).observe(document, { childList: true, subtree: true });
})();
