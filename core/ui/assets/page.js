// @ts-check
// What the browser does without asking the server: the chosen word and step, and the overlay on the picture.
// The server renders plain HTML; this script finds its parts by class and keeps the choices over every re-rendering.
(() => {
  "use strict";
  const query = new URLSearchParams(location.search);
  /** @type {IdState} */
  const state = { word: query.get("word"), step: null, opacity: 85, common: false, changes: false, before: false, curves: false, focus: null };
  /** @type {IdPage["one"]} */
  const one = (selector, root = document) => root.querySelector(selector);
  /** @type {IdPage["all"]} */
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  /** @type {IdPage["set"]} */
  const set = (element, name, value) => { if (element && element[name] !== value) element[name] = value; };
  /** @type {IdPage["attribute"]} */
  const attribute = (element, name, value) => {
    if (element && element.getAttribute(name) !== value) element.setAttribute(name, value);
  };
  /** @type {IdPage["target"]} */
  const target = (event) => /** @type {any} */ (event.target);
  const WORDS = "Attribution";
  const tabs = () => all('#id-right [role="tab"]');
  const openTab = () => tabs().find((tab) => tab.getAttribute("aria-selected") === "true")?.textContent.trim() ?? WORDS;

  // The other scripts extend this object; see types.d.ts.
  /** @type {IdPage} */
  const page = (window.idPage = {
    state, query, one, all, set, target, apply, chooseStep, chooseWord, chosenWord, openTab, type,
    attribute, address: () => null, remember: () => undefined, overlays: {}, bases: {}, clicks: {}, spoken: {}, parameters: {}, addresses: {}, watchers: [], changes: [],
  });
  let wantedTab = query.get("tab");

  /** @type {string | null} */
  let layersText = null;
  /** @type {Record<string, { own: string, same: string, ownTop: string, sameTop: string }>} */
  let layers = {};
  const panel = () => one(".id-panel:not(.empty)");

  function readLayers() {
    const text = one(".id-panel .id-layers")?.dataset.layers ?? "{}";
    if (text !== layersText) {
      layersText = text;
      layers = JSON.parse(text);
    }
  }

  function openWantedTab() {
    if (!wantedTab || !tabs().length) return;
    const tab = tabs().find((one) => one.textContent.trim().toLowerCase() === wantedTab.toLowerCase());
    wantedTab = null;
    tab?.click();
  }

  // The chosen word if it is in this prompt, else the one with the most bits.
  /** @returns {string | null} */
  function chosenWord() {
    const chips = all(".id-chip");
    if (chips.some((chip) => chip.dataset.word === state.word)) return state.word;
    // Of words that are nearly as strong as the strongest, the first, which is what the prompt is about.
    const bits = chips.map((chip) => Number(chip.dataset.bits));
    return chips[bits.findIndex((value) => value >= 0.9 * Math.max(...bits))]?.dataset.word ?? null;
  }

  function apply() {
    readLayers();
    openWantedTab();
    const word = chosenWord();
    const stale = (one(".id-status")?.dataset.stale ?? "").split(" ");
    // On a part of the page, not on its root: Gradio confines the style sheet to what is inside its container.
    const marks = one("#id-main")?.classList;
    if (!marks) return;
    marks.toggle("id-stale-image", stale.includes("image"));
    marks.toggle("id-stale-words", stale.includes("words"));
    marks.toggle("id-busy", Boolean(one(".id-status .id-bar i")));
    marks.toggle("id-common-scale", state.common);
    // With nothing to report, the line says what is shown.
    const line = one(".id-status > span");
    if (line && (!line.textContent || line.classList.contains("about"))) {
      line.classList.add("about");
      set(line, "textContent", one(".id-viewer")?.dataset.about ?? "");
    }
    for (const chip of all(".id-chip")) attribute(chip, "aria-pressed", String(chip.dataset.word === word));
    oneTabStop(all(".id-chip"), one('.id-chip[aria-pressed="true"]'));
    for (const part of all("[data-for]")) set(part, "hidden", part.dataset.for !== word);
    for (const fold of all(".id-curves")) set(fold, "open", state.curves);
    for (const row of all("[data-row]")) row.classList.toggle("chosen", row.dataset.row === word);
    attribute(one("#id-main"), "data-tab", openTab().toLowerCase());
    for (const watch of page.watchers) watch(openTab());
    applyViewer(word, stale);
    if (state.focus && document.activeElement === document.body) one(state.focus)?.focus({ preventScroll: true });
  }

  // A row of buttons is one stop of the Tab key; arrow keys walk along it.
  /** @param {Found[]} buttons @param {Found | null | undefined} chosen */
  function oneTabStop(buttons, chosen) {
    const here = buttons.find((button) => button === document.activeElement) ?? chosen ?? buttons[0];
    for (const button of buttons) set(button, "tabIndex", button === here ? 0 : -1);
  }

  /** @param {string | null} word @param {string[]} stale */
  function applyViewer(word, stale) {
    const viewer = one(".id-viewer");
    if (!viewer) return;
    const growing = viewer.classList.contains("growing");
    const overlay = one(".id-overlay", viewer);
    const words = openTab() === WORDS;
    const layer = growing || !words || stale.includes("words") ? null : layers[word];
    const other = growing ? null : page.overlays[openTab()]?.() ?? null;
    const source = other ? other.src : layer ? layer[state.common ? "same" : "own"] : "";
    if (overlay) {
      if (source && overlay.src !== source) overlay.src = source;
      // A word's map is about the whole image; the other tabs look at one step.
      set(overlay, "hidden", !source || (words && state.step !== null));
      overlay.style.opacity = String(state.opacity / 100);
    }
    const legend = one(".id-legend", viewer);
    if (legend) {
      const scale = other?.scale;
      const top = scale ? scale.top : layer?.[state.common ? "sameTop" : "ownTop"];
      set(legend.firstElementChild, "textContent", scale ? `−${scale.top}` : "0");
      set(one(".id-legend-top", legend), "textContent", top ? `${top} bits per cell` : "bits per cell");
      one("i", legend).style.background = scale ? "var(--id-signed)" : "var(--id-scale)";
    }
    const slider = one(".id-opacity", viewer);
    if (slider && document.activeElement !== slider) slider.value = String(state.opacity);
    const common = one(".id-common", viewer);
    if (common) set(common, "checked", state.common);
    const base = growing ? null : page.bases[openTab()]?.() ?? null;
    set(one(".id-changes", viewer), "checked", state.changes);
    set(one(".id-before", viewer), "hidden", !base);
    const about = other ? other.tag : layer && state.step === null ? `“${word}”` : "";
    const named = base ? (state.before ? "original" : base.tag) : "";
    applyStep(viewer, growing, [named, about].filter(Boolean).join(" · "), base && !state.before ? base.src : "");
  }

  /** @param {HTMLElement} viewer @param {boolean} growing @param {string} about @param {string} base */
  function applyStep(viewer, growing, about, base) {
    const frames = all("button.id-frame", viewer);
    if (growing || !frames.length) state.step = null;
    const chosen = frames.find((frame) => Number(frame.dataset.step) === state.step);
    for (const frame of frames) attribute(frame, "aria-pressed", String(frame === chosen));
    oneTabStop(frames, chosen);
    for (const bin of all(".id-bin")) bin.classList.toggle("chosen", Number(bin.dataset.step) === state.step);
    const preview = one(".id-preview", viewer);
    if (preview) {
      const source = chosen ? one("img", chosen).src : base;
      if (source && preview.src !== source) preview.src = source;
      set(preview, "hidden", !source);
    }
    const tag = one(".id-tag", viewer);
    const again = page.clicks[openTab()] ? about : "click again for the picture";
    const label = chosen ? [`step ${state.step + 1}`, chosen.dataset.stage, again].filter(Boolean).join(" · ") : about;
    if (tag) set(tag, "textContent", label);
  }

  /** @param {number} step */
  function chooseStep(step) {
    state.step = state.step === step ? null : step;
    apply();
  }

  /** @param {string} word */
  function chooseWord(word) {
    state.word = word;
    state.step = null;
    apply();
    page.remember();
  }

  /** @param {HTMLInputElement} field @param {string} value */
  function type(field, value) {
    Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), "value").set.call(field, value);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }

  /** @param {string} word @param {string} other */
  function replaceWord(word, other) {
    const field = one("#id-prompt textarea, #id-prompt input");
    const escaped = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    const pattern = new RegExp(`(?<![\\p{L}\\p{N}])${escaped}(?![\\p{L}\\p{N}])`, "giu");
    type(field, field.value.replace(pattern, other));
    field.focus();
  }

  /** @param {string} text @param {HTMLElement} button */
  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const before = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = before; }, 1500);
  }

  document.addEventListener("click", (event) => {
    /** @param {string} selector */
    const hit = (selector) => target(event).closest?.(selector);
    const chip = hit(".id-chip");
    const step = hit("button.id-frame, .id-bin");
    const suggestion = hit(".id-suggest");
    if (chip) chooseWord(chip.dataset.word);
    else if (step) chooseStep(Number(step.dataset.step));
    else if (suggestion) replaceWord(suggestion.dataset.word, suggestion.dataset.with);
    else if (hit(".id-link")) copy(page.address() ?? location.href, hit(".id-link"));
    else if (hit(".id-copy")) copy(one("pre", hit(".id-code")).textContent, hit(".id-copy"));
    else if (hit('#id-right [role="tab"]')) {
      // Not when the address opens a tab: what the page shows then is not yet what the address asks for.
      setTimeout(() => { apply(); if (event.isTrusted) page.remember(); });
    }
  });

  document.addEventListener("input", (event) => {
    if (target(event).matches?.(".id-opacity")) state.opacity = Number(target(event).value);
    else if (target(event).matches?.(".id-common")) state.common = target(event).checked;
    else if (target(event).matches?.(".id-changes")) state.changes = target(event).checked;
    else return;
    apply();
  });

  // Each word has its own curves: they stay unfolded from word to word, and when a card is rendered anew.
  document.addEventListener("toggle", (event) => {
    if (target(event).matches?.(".id-curves") && target(event).closest("[data-for]:not([hidden])")) state.curves = target(event).open;
  }, true);

  // Arrow keys, Home and End walk along the film strip and along the words.
  document.addEventListener("keydown", (event) => {
    const here = target(event).closest?.("button.id-frame, .id-chip");
    if (!here) return;
    const others = all(here.matches(".id-chip") ? ".id-chip" : "button.id-frame");
    const at = others.indexOf(here);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: others.length - 1 }[event.key];
    const next = others[to ?? -1];
    if (!next) return;
    event.preventDefault();
    next.focus();
    if (to !== at) next.click();
  });

  // Re-rendering takes the keyboard focus away; it is given back.
  document.addEventListener("focusin", (event) => {
    const focused = target(event).closest?.(".id-chip, button.id-frame");
    state.focus = !focused ? null
      : focused.dataset.word ? `.id-chip[data-word="${CSS.escape(focused.dataset.word)}"]`
      : `button.id-frame[data-step="${focused.dataset.step}"]`;
  });

  // Gradio either replaces an element or, where the structure stays the same, patches its attributes and texts in place.
  const WATCHED = ["class", "hidden", "aria-pressed", "aria-selected", "src", "data-stale", "data-about", "data-query", "data-layers",
    "data-codes", "data-layout", "data-given", "data-first", "data-second", "data-word", "data-to", "data-captions", "data-site",
    "data-number", "data-change", "data-example"];

  /** @type {string | undefined} */
  let shownQuery;
  page.changes.push(() => {
    const finished = panel()?.matches(".running") ? undefined : panel()?.dataset.query;
    if (!finished || finished === shownQuery) return;
    // Not for what the page opens with: an address without parameters stays as it is.
    if (shownQuery !== undefined) page.remember();
    shownQuery = finished;
  });

  let pending = false;
  new MutationObserver(() => {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => {
      pending = false;
      apply();
      for (const changed of page.changes) changed();
    });
  }).observe(document, { childList: true, subtree: true, characterData: true, attributes: true, attributeFilter: WATCHED });
})();
