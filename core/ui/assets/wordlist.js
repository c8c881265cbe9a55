// @ts-check
// The words that the model knows: clicking them writes a prompt, a dice writes one by chance, and each object can be swapped.
(() => {
  "use strict";
  const page = window.idPage;
  const { one, all, target } = page;

  /** @type {Wordlist | null} */
  let words = null;
  let text = "";
  function read() {
    const found = one(".id-wordlist")?.dataset.words ?? "";
    if (found !== text) words = found ? JSON.parse(text = found) : null;
    return words;
  }

  const field = () => one("#id-prompt textarea, #id-prompt input");

  // "a cat and a tree on the snow, night style": objects, background, style. Anything else is begun anew.
  const SENTENCE = /^(a [a-z]+(?:(?:,| and) a [a-z]+)*)?\s*((?:on|in) the [a-z]+)?(, [a-z]+ style)?$/;

  /** @param {string} kind @param {string} word */
  function write(kind, word) {
    const parts = SENTENCE.exec(field().value.trim()) ?? [];
    let objects = (parts[1] ?? "").split(/, | and /).filter(Boolean);
    let place = parts[2] ?? "";
    let style = parts[3] ?? "";
    if (kind === "object") objects = [...objects.filter((one) => one !== `a ${word}`).slice(-2), `a ${word}`];
    if (kind === "background") {
      const chosen = words.backgrounds.find((one) => one.words.includes(word));
      place = `${chosen.preposition} the ${word}`;
    }
    if (kind === "style") style = `, ${word} style`;
    const listed = objects.length > 2 ? `${objects[0]}, ${objects[1]} and ${objects[2]}` : objects.join(" and ");
    page.type(field(), `${[listed, place].filter(Boolean).join(" ")}${style}`.replace(/^, /, ""));
  }

  /** @template T @param {T[]} items @returns {T} */
  const any = (items) => items[Math.floor(Math.random() * items.length)];

  function surprise() {
    const first = any(words.objects);
    const second = any(words.objects.filter((other) => other !== first));
    const pair = Math.random() < 0.5 ? ` ${any(["left of", "right of", "above", "below"])} a ${any(second.words)}` : "";
    const place = any(words.backgrounds);
    const style = Math.random() < 0.3 ? `, ${any(words.styles)} style` : "";
    page.type(field(), `a ${any(first.words)}${pair} ${place.preposition} the ${any(place.words)}${style}`);
    page.type(one("#id-seed input"), String(Math.floor(Math.random() * 10000)));
    // The fields pass their values on before the click is served.
    setTimeout(() => one("#id-generate").click(), 100);
  }

  // What to do with the chosen word: each action of its card is one click.
  /** @param {string} action @param {string} word @param {string} [other] */
  function act(action, word, other) {
    if (action === "out" || action === "swap") {
      page.ask?.("counterfactual", { word, ...(other ? { to: other } : {}) });
      one("#id-counterfactual-ask")?.scrollIntoView({ block: "start" });
    } else if (action === "pair") {
      one("#id-pair-ask")?.scrollIntoView({ block: "start" });
      one(".id-second")?.focus({ preventScroll: true });
    } else if (action === "concepts") {
      all('#id-right [role="tab"]').find((tab) => tab.textContent.trim() === "Concepts")?.click();
      setTimeout(() => {
        const search = one("#id-concept-query textarea, #id-concept-query input");
        if (!search) return;
        page.type(search, word);
        search.scrollIntoView({ block: "center" });
      }, 100);
    }
  }

  page.watchers.push(() => {
    if (!read()) return;
    for (const row of all(".id-swaps:empty")) {
      const object = words.objects.find((one) => one.words.includes(row.dataset.word));
      if (!object) continue;
      row.append("swap for ", ...object.swaps.map((swap) => Object.assign(document.createElement("button"),
        { type: "button", className: "id-button id-swap", textContent: swap })));
    }
  });

  document.addEventListener("click", (event) => {
    /** @param {string} selector */
    const hit = (selector) => target(event).closest?.(selector);
    const writing = hit(".id-write");
    const action = hit(".id-act");
    const swap = hit(".id-swap");
    if (writing && read()) write(writing.dataset.kind, writing.dataset.word);
    else if (hit(".id-dice") && read()) surprise();
    else if (action) act(action.dataset.act, action.closest(".id-actions").dataset.word);
    else if (swap) act("swap", swap.closest(".id-actions").dataset.word, swap.textContent);
    // A menu closes when something else is clicked.
    for (const menu of all(".id-menu[open]")) if (hit(".id-menu") !== menu) menu.open = false;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") for (const menu of all(".id-menu[open]")) menu.open = false;
  });
})();
