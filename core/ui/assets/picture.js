// @ts-check
// The large picture: choosing a place on it by pointer or keys, comparing it with the original, saving it.
(() => {
  "use strict";
  const page = window.idPage;
  const { one, set, target, state } = page;

  /** @param {MouseEvent} event @param {HTMLElement} canvas */
  function clickImage(event, canvas) {
    const box = canvas.getBoundingClientRect();
    if (one(".id-image", canvas)) chooseAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }

  /** @param {number} x @param {number} y */
  function chooseAt(x, y) {
    const choose = page.clicks[page.openTab()];
    if (choose) choose(x, y);
    else if (state.step !== null) page.chooseStep(state.step);
  }

  // The original while a button or the B key is held.
  /** @param {boolean} before */
  function compare(before) {
    if (state.before === before) return;
    state.before = before;
    page.apply();
  }
  document.addEventListener("pointerdown", (event) => {
    if (target(event).closest?.(".id-before")) compare(true);
  });

  for (const end of ["pointerup", "pointercancel", "blur"]) window.addEventListener(end, () => compare(false));
  document.addEventListener("keydown", (event) => {
    const typing = target(event).closest?.("input, textarea, select");
    const button = target(event).matches?.(".id-before") && (event.key === "Enter" || event.key === " ");
    if (button || (event.key.toLowerCase() === "b" && !typing && !event.ctrlKey && !event.metaKey)) compare(true);
  });
  document.addEventListener("keyup", () => compare(false));

  // On the image, arrow keys move a cell-sized cursor and Enter or Space clicks there.
  const CELLS = 8;
  const cursor = { row: 3, column: 3 };
  document.addEventListener("keydown", (event) => {
    const canvas = target(event).matches?.(".id-canvas") ? target(event) : null;
    if (!canvas || !one(".id-image", canvas)) return;
    const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    const chosen = event.key === "Enter" || event.key === " ";
    if (!by && !chosen) return;
    event.preventDefault();
    if (by) {
      cursor.row = Math.min(Math.max(cursor.row + by[0], 0), CELLS - 1);
      cursor.column = Math.min(Math.max(cursor.column + by[1], 0), CELLS - 1);
    }
    const [x, y] = [(cursor.column + 0.5) / CELLS, (cursor.row + 0.5) / CELLS];
    const mark = one(".id-cursor", canvas);
    mark.hidden = false;
    mark.style.left = `${(100 * cursor.column) / CELLS}%`;
    mark.style.top = `${(100 * cursor.row) / CELLS}%`;
    if (chosen) chooseAt(x, y);
    const what = page.spoken[page.openTab()]?.(x, y);
    set(one(".id-spoken", canvas), "textContent", `row ${cursor.row + 1}, column ${cursor.column + 1}${what ? `: ${what}` : ""}`);
  });
  document.addEventListener("focusout", (event) => {
    if (target(event).matches?.(".id-canvas")) set(one(".id-cursor", target(event)), "hidden", true);
  });

  // A card: the picture with its map, what the map is, the prompt, and where to see more.
  function savePng() {
    const image = one(".id-image");
    if (!image) return;
    const side = 1024;
    const foot = 196;
    const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side + foot });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#fffdf9";
    context.fillRect(0, 0, side, side + foot);
    context.drawImage(one(".id-preview:not([hidden])") ?? image, 0, 0, side, side);
    const overlay = one(".id-overlay:not([hidden])");
    if (overlay) {
      context.globalAlpha = state.opacity / 100;
      context.drawImage(overlay, 0, 0, side, side);
      context.globalAlpha = 1;
    }
    const lead = page.openTab() === "Attribution" ? one(".id-card:not([hidden]) .id-lead")?.textContent : one(".id-tag")?.textContent;
    const legend = overlay && page.openTab() === "Attribution" ? one(".id-legend-top")?.textContent : "";
    /** @type {[string, string, string][]} */
    const lines = [
      ["600 34px system-ui, sans-serif", "#1f1926", lead || "Interpretable Diffusion"],
      ["26px system-ui, sans-serif", "#1f1926", one(".id-viewer")?.dataset.about ?? ""],
      ["22px system-ui, sans-serif", "#6a6075", [legend && `brightest: ${legend}`, `Interpretable Diffusion · ${location.host}`].filter(Boolean).join(" · ")],
    ];
    lines.forEach(([font, colour, text], i) => {
      context.font = font;
      context.fillStyle = colour;
      context.fillText(text, 32, side + 56 + 50 * i, side - 64);
    });
    const link = document.createElement("a");
    link.download = `${page.chosenWord() ?? "image"}.png`;
    link.href = canvas.toDataURL("image/png");
    link.click();
  }

  document.addEventListener("click", (event) => {
    if (target(event).closest?.(".id-png")) savePng();
    else if (target(event).closest?.(".id-canvas")) clickImage(event, target(event).closest(".id-canvas"));
  });
})();
