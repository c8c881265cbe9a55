// @ts-check
// What the browser does without asking the server: the chosen word and step, the overlay, the address, downloads.
// The server renders plain HTML; this script finds its parts by class and keeps the choices over every re-rendering.
(() => {
  "use strict";
  const query = new URLSearchParams(location.search);
  /** @type {IdState} */
  const state = { word: query.get("word"), step: null, opacity: 72, common: false, curves: false, focus: null };
  /** @type {IdPage["one"]} */
  const one = (selector, root = document) => root.querySelector(selector);
  /** @type {IdPage["all"]} */
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  /** @type {IdPage["set"]} */
  const set = (element, name, value) => { if (element && element[name] !== value) element[name] = value; };
  /** @type {IdPage["target"]} */
  const target = (event) => /** @type {any} */ (event.target);
  // The tabs' own scripts extend this object; see types.d.ts.
  /** @type {IdPage} */
  const page = (window.idPage = {
    state, query, one, all, set, target, apply, remember, chooseStep, chooseWord, chosenWord,
    overlays: {}, clicks: {}, parameters: {}, addresses: {}, watchers: [],
  });
  let wantedTab = query.get("tab");
  /** @param {Element} element @param {string} name @param {string} value */
  const attribute = (element, name, value) => {
    if (element.getAttribute(name) !== value) element.setAttribute(name, value);
  };

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

  const WORDS = "Attribution";
  const tabs = () => all('#id-right [role="tab"]');
  const openTab = () => tabs().find((tab) => tab.getAttribute("aria-selected") === "true")?.textContent.trim() ?? WORDS;

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
    const bits = chips.map((chip) => Number(chip.dataset.bits));
    return chips[bits.indexOf(Math.max(...bits))]?.dataset.word ?? null;
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
    for (const part of all("[data-for]")) set(part, "hidden", part.dataset.for !== word);
    for (const fold of all(".id-curves")) set(fold, "open", state.curves);
    for (const row of all("[data-row]")) row.classList.toggle("chosen", row.dataset.row === word);
    attribute(one("#id-main"), "data-tab", openTab().toLowerCase());
    for (const watch of page.watchers) watch(openTab());
    applyViewer(word, stale);
    if (state.focus && document.activeElement === document.body) one(state.focus)?.focus({ preventScroll: true });
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
    applyStep(viewer, growing, other ? other.tag : layer && state.step === null ? `“${word}”` : "");
  }

  /** @param {HTMLElement} viewer @param {boolean} growing @param {string} about */
  function applyStep(viewer, growing, about) {
    const frames = all("button.id-frame", viewer);
    if (growing || !frames.length) state.step = null;
    const chosen = frames.find((frame) => Number(frame.dataset.step) === state.step);
    for (const frame of frames) attribute(frame, "aria-pressed", String(frame === chosen));
    for (const bin of all(".id-bin")) bin.classList.toggle("chosen", Number(bin.dataset.step) === state.step);
    const preview = one(".id-preview", viewer);
    if (preview) {
      const source = chosen ? one("img", chosen).src : "";
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
    remember();
  }

  // The address always restores what is shown, so that a reload or a copied address loses nothing.
  /** @returns {string | null} */
  function address() {
    const whole = page.addresses[openTab()]?.();
    const shown = whole ?? panel()?.dataset.query;
    if (!shown) return null;
    const parameters = new URLSearchParams(shown);
    const word = whole ? null : chosenWord();
    if (word) parameters.set("word", word);
    if (openTab() !== WORDS) parameters.set("tab", openTab().toLowerCase());
    for (const [name, value] of Object.entries(page.parameters[openTab()]?.() ?? {})) parameters.set(name, String(value));
    for (const [name, value] of new URLSearchParams(location.search)) if (name.startsWith("__")) parameters.set(name, value);
    return `${location.origin}${location.pathname}?${parameters}`;
  }

  function remember() {
    const url = address();
    if (url && url !== location.href) history.replaceState(null, "", url);
  }

  /** @param {string} word @param {string} other */
  function replaceWord(word, other) {
    const field = one("#id-prompt textarea, #id-prompt input");
    const escaped = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    const pattern = new RegExp(`(?<![\\p{L}\\p{N}])${escaped}(?![\\p{L}\\p{N}])`, "giu");
    const setter = Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), "value").set;
    setter.call(field, field.value.replace(pattern, other));
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.focus();
  }

  async function savePng() {
    const image = one(".id-image");
    if (!image) return;
    const side = 1024;
    const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    const preview = one(".id-preview:not([hidden])");
    context.drawImage(preview ?? image, 0, 0, side, side);
    const overlay = one(".id-overlay:not([hidden])");
    if (overlay) {
      context.globalAlpha = state.opacity / 100;
      context.drawImage(overlay, 0, 0, side, side);
    }
    const link = document.createElement("a");
    link.download = `${chosenWord() ?? "image"}.png`;
    link.href = canvas.toDataURL("image/png");
    link.click();
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
    else if (hit(".id-png")) savePng();
    else if (hit(".id-link")) copy(address() ?? location.href, hit(".id-link"));
    else if (hit(".id-copy")) copy(one("pre", hit(".id-code")).textContent, hit(".id-copy"));
    else if (hit(".id-canvas")) clickImage(event, hit(".id-canvas"));
    else if (hit('#id-right [role="tab"]')) {
      // Not when the address opens a tab: what the page shows then is not yet what the address asks for.
      setTimeout(() => { apply(); if (event.isTrusted) remember(); });
    }
  });

  /** @param {MouseEvent} event @param {HTMLElement} canvas */
  function clickImage(event, canvas) {
    const choose = page.clicks[openTab()];
    if (choose && one(".id-image", canvas)) {
      const box = canvas.getBoundingClientRect();
      choose((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    } else if (state.step !== null) chooseStep(state.step);
  }

  document.addEventListener("input", (event) => {
    if (target(event).matches?.(".id-opacity")) state.opacity = Number(target(event).value);
    else if (target(event).matches?.(".id-common")) state.common = target(event).checked;
    else return;
    apply();
  });

  // Each word has its own curves: they stay unfolded from word to word, and when a card is rendered anew.
  document.addEventListener("toggle", (event) => {
    if (target(event).matches?.(".id-curves") && target(event).closest("[data-for]:not([hidden])")) state.curves = target(event).open;
  }, true);

  // Arrow keys walk along the film strip and along the words.
  document.addEventListener("keydown", (event) => {
    const by = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    const here = target(event).closest?.("button.id-frame, .id-chip");
    if (!by || !here) return;
    const others = all(here.matches(".id-chip") ? ".id-chip" : "button.id-frame");
    const next = others[others.indexOf(here) + by];
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  });

  // Re-rendering takes the keyboard focus away; it is given back.
  document.addEventListener("focusin", (event) => {
    const focused = target(event).closest?.(".id-chip, button.id-frame");
    state.focus = !focused ? null
      : focused.dataset.word ? `.id-chip[data-word="${CSS.escape(focused.dataset.word)}"]`
      : `button.id-frame[data-step="${focused.dataset.step}"]`;
  });

  /** @type {string | undefined} */
  let shownQuery;
  let pending = false;
  new MutationObserver(() => {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => {
      pending = false;
      apply();
      const finished = panel()?.matches(".running") ? undefined : panel()?.dataset.query;
      if (finished && finished !== shownQuery) {
        // Not for what the page opens with: an address without parameters stays as it is.
        if (shownQuery !== undefined) remember();
        shownQuery = finished;
      }
    });
  }).observe(document, { childList: true, subtree: true });
})();
