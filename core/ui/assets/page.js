// What the browser does without asking the server: the chosen word, the chosen step, the overlay, what is kept.
// The server renders plain HTML; this script finds its parts by class and keeps the choices over every re-rendering.
(() => {
  "use strict";
  const query = new URLSearchParams(location.search);
  const state = { word: query.get("word"), step: null, opacity: 72, common: false, curves: false, focus: null };
  // What the tabs' own scripts hang their parts into, by the tab's name: what lies on the picture ({ src, tag } or null),
  // what a click on the picture means (x and y from 0 to 1), what the address remembers (parameters beside those of the
  // words, or all of them), and what follows every change.
  const page = (window.idPage = { state, query, overlays: {}, clicks: {}, parameters: {}, addresses: {}, watchers: [] });
  let wantedTab = query.get("tab");
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const one = (selector, root = document) => root.querySelector(selector);
  const set = (element, name, value) => { if (element[name] !== value) element[name] = value; };
  const attribute = (element, name, value) => {
    if (element.getAttribute(name) !== value) element.setAttribute(name, value);
  };

  let layersText = null;
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

  // The word that told most, unless a word was chosen that this prompt has as well.
  function chosenWord() {
    const chips = all(".id-chip");
    if (chips.some((chip) => chip.dataset.word === state.word)) return state.word;
    const loudest = chips.reduce((best, chip) =>
      !best || Number(chip.dataset.bits) > Number(best.dataset.bits) ? chip : best, null);
    return loudest ? loudest.dataset.word : null;
  }

  function apply() {
    readLayers();
    openWantedTab();
    const word = chosenWord();
    const stale = (one(".id-status")?.dataset.stale ?? "").split(" ");
    // On a part of the page, not on its root: Gradio confines the style sheet to what is inside its container.
    const marks = one("#id-main")?.classList;
    if (!marks) return;
    marks.toggle("id-stale-picture", stale.includes("picture"));
    marks.toggle("id-stale-words", stale.includes("words"));
    marks.toggle("id-busy", Boolean(one(".id-status .id-bar i")));
    marks.toggle("id-common-scale", state.common);
    // With nothing to report, the line tells what is shown.
    const line = one(".id-status > span");
    if (line && (!line.textContent || line.classList.contains("about"))) {
      line.classList.add("about");
      set(line, "textContent", one(".id-stage")?.dataset.about ?? "");
    }
    for (const chip of all(".id-chip")) attribute(chip, "aria-pressed", String(chip.dataset.word === word));
    for (const part of all("[data-for]")) set(part, "hidden", part.dataset.for !== word);
    for (const fold of all(".id-curves")) set(fold, "open", state.curves);
    for (const row of all("[data-row]")) row.classList.toggle("chosen", row.dataset.row === word);
    attribute(one("#id-main"), "data-tab", openTab().toLowerCase());
    for (const watch of page.watchers) watch(openTab());
    applyStage(word, stale);
    if (state.focus && document.activeElement === document.body) one(state.focus)?.focus({ preventScroll: true });
  }

  function applyStage(word, stale) {
    const stage = one(".id-stage");
    if (!stage) return;
    const growing = stage.classList.contains("growing");
    const overlay = one(".id-overlay", stage);
    const words = openTab() === WORDS;
    const layer = growing || !words || stale.includes("words") ? null : layers[word];
    const other = growing ? null : page.overlays[openTab()]?.() ?? null;
    const source = other ? other.src : layer ? layer[state.common ? "same" : "own"] : "";
    if (overlay) {
      if (source && overlay.src !== source) overlay.src = source;
      // What a word told it told to the whole picture; the other tabs look at one step.
      set(overlay, "hidden", !source || (words && state.step !== null));
      overlay.style.opacity = state.opacity / 100;
    }
    const legend = one(".id-legend", stage);
    if (legend) {
      const scale = other?.scale;
      const top = scale ? scale.top : layer?.[state.common ? "sameTop" : "ownTop"];
      set(legend.firstElementChild, "textContent", scale ? `−${scale.top}` : "0");
      set(one(".id-legend-top", legend), "textContent", top ? `${top} bits a cell` : "bits a cell");
      one("i", legend).style.background = scale ? "var(--id-signed)" : "var(--id-scale)";
    }
    const slider = one(".id-opacity", stage);
    if (slider && document.activeElement !== slider) slider.value = state.opacity;
    const common = one(".id-common", stage);
    if (common) set(common, "checked", state.common);
    applyStep(stage, growing, other ? other.tag : layer && state.step === null ? `“${word}”` : "");
  }

  function applyStep(stage, growing, about) {
    const frames = all("button.id-frame", stage);
    if (growing || !frames.length) state.step = null;
    const chosen = frames.find((frame) => Number(frame.dataset.step) === state.step);
    for (const frame of frames) attribute(frame, "aria-pressed", String(frame === chosen));
    for (const bin of all(".id-bin")) bin.classList.toggle("chosen", Number(bin.dataset.step) === state.step);
    const preview = one(".id-preview", stage);
    if (preview) {
      const source = chosen ? one("img", chosen).src : "";
      if (source && preview.src !== source) preview.src = source;
      set(preview, "hidden", !source);
    }
    const tag = one(".id-tag", stage);
    const again = page.clicks[openTab()] ? about : "click again for the picture";
    const said = chosen ? [`step ${state.step + 1}`, chosen.dataset.stage, again].filter(Boolean).join(" · ") : about;
    if (tag) set(tag, "textContent", said);
  }

  function chooseStep(step) {
    state.step = state.step === step ? null : step;
    apply();
  }

  function chooseWord(word) {
    state.word = word;
    state.step = null;
    apply();
    remember();
  }

  // The address always restores what is shown, so that a reload or a copied address loses nothing.
  function address() {
    const whole = page.addresses[openTab()]?.();
    const kept = whole ?? panel()?.dataset.query;
    if (!kept) return null;
    const parameters = new URLSearchParams(kept);
    const word = whole ? null : chosenWord();
    if (word) parameters.set("word", word);
    if (openTab() !== WORDS) parameters.set("tab", openTab().toLowerCase());
    for (const [name, value] of Object.entries(page.parameters[openTab()]?.() ?? {})) parameters.set(name, value);
    for (const [name, value] of new URLSearchParams(location.search)) if (name.startsWith("__")) parameters.set(name, value);
    return `${location.origin}${location.pathname}?${parameters}`;
  }

  function remember() {
    const url = address();
    if (url && url !== location.href) history.replaceState(null, "", url);
  }

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
    const picture = one(".id-picture");
    if (!picture) return;
    const side = 1024;
    const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    const preview = one(".id-preview:not([hidden])");
    context.drawImage(preview ?? picture, 0, 0, side, side);
    const overlay = one(".id-overlay:not([hidden])");
    if (overlay) {
      context.globalAlpha = state.opacity / 100;
      context.drawImage(overlay, 0, 0, side, side);
    }
    const link = document.createElement("a");
    link.download = `${chosenWord() ?? "picture"}.png`;
    link.href = canvas.toDataURL("image/png");
    link.click();
  }

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
    const hit = (selector) => event.target.closest?.(selector);
    const chip = hit(".id-chip");
    const step = hit("button.id-frame, .id-bin");
    const suggestion = hit(".id-suggest");
    if (chip) chooseWord(chip.dataset.word);
    else if (step) chooseStep(Number(step.dataset.step));
    else if (suggestion) replaceWord(suggestion.dataset.word, suggestion.dataset.with);
    else if (hit(".id-png")) savePng();
    else if (hit(".id-link")) copy(address() ?? location.href, hit(".id-link"));
    else if (hit(".id-copy")) copy(one("pre", hit(".id-code")).textContent, hit(".id-copy"));
    else if (hit(".id-canvas")) clickPicture(event, hit(".id-canvas"));
    else if (hit('#id-right [role="tab"]')) {
      // A tab that the address opens is no choice of a person's: what the page shows then is not yet what was asked for.
      setTimeout(() => { apply(); if (event.isTrusted) remember(); });
    }
  });

  function clickPicture(event, canvas) {
    const choose = page.clicks[openTab()];
    if (choose && one(".id-picture", canvas)) {
      const box = canvas.getBoundingClientRect();
      choose((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    } else if (state.step !== null) chooseStep(state.step);
  }

  document.addEventListener("input", (event) => {
    if (event.target.matches?.(".id-opacity")) state.opacity = Number(event.target.value);
    else if (event.target.matches?.(".id-common")) state.common = event.target.checked;
    else return;
    apply();
  });

  // Each word has its own curves: they stay unfolded from word to word, and when a card is made anew.
  document.addEventListener("toggle", (event) => {
    if (event.target.matches?.(".id-curves") && event.target.closest("[data-for]:not([hidden])")) state.curves = event.target.open;
  }, true);

  // Arrow keys walk along the film strip and along the words.
  document.addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const here = event.target.closest?.("button.id-frame, .id-chip");
    if (!way || !here) return;
    const others = all(here.matches(".id-chip") ? ".id-chip" : "button.id-frame");
    const next = others[others.indexOf(here) + way];
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.click();
  });

  // A re-rendered part takes the focus away from whoever works with the keyboard; it is given back.
  document.addEventListener("focusin", (event) => {
    const kept = event.target.closest?.(".id-chip, button.id-frame");
    state.focus = !kept ? null
      : kept.dataset.word ? `.id-chip[data-word="${CSS.escape(kept.dataset.word)}"]`
      : `button.id-frame[data-step="${kept.dataset.step}"]`;
  });

  Object.assign(page, { apply, remember, chooseStep, chooseWord, chosenWord });

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
        // Not for what the page opens with: an address that says nothing stays as it is.
        if (shownQuery !== undefined) remember();
        shownQuery = finished;
      }
    });
  }).observe(document, { childList: true, subtree: true });
})();
