// @ts-check
// The Interventions tab: objects are chosen, dragged and painted over on the large picture, which then shows the edited one.
(() => {
  "use strict";
  const page = window.idPage;
  const { one, all, set, target, state } = page;
  const TAB = "Interventions";
  const GRID = 32; // cells on a side of a painted region, as interventions/request.py writes them
  const DRAGGED = 8; // pixels that the pointer moves before it drags

  /** @type {{ query: string, image: string } | null} */
  let last = null; // the query of the panel and the image that it was made for
  let remembered = "";
  let brushing = false; // whether the pointer paints, rather than drags

  const panel = () => one(".id-iv:not(.empty, .running)");
  const open = () => page.openTab() === TAB;

  // A panel belongs to the image that was there when it came.
  /** @param {HTMLElement} root */
  function old(root) {
    const image = one(".id-image")?.src;
    if (last?.query !== root.dataset.query) last = { query: root.dataset.query, image };
    return last.image !== image;
  }

  page.watchers.push((tab) => {
    const stale = (one(".id-status")?.dataset.stale ?? "").includes("edits");
    const main = one("#id-main").classList;
    main.toggle("id-stale-edits", stale);
    main.toggle("id-painted", open() && painted());
    main.toggle("id-painting", painting());
    page.attribute(one(".id-iv-paint"), "aria-pressed", String(brushing));
    showCells();
    const root = panel();
    if (!root) return;
    const before = old(root);
    root.classList.toggle("old", before);
    if (tab === TAB && !before && remembered !== root.dataset.query) {
      remembered = root.dataset.query;
      brushing = false; // what came of it is to be seen
      page.remember();
    }
  });

  const chosen = () => one('.id-iv-choose[aria-pressed="true"]') ?? panel();
  const fresh = () => Boolean(panel() && !panel().classList.contains("old") && !one("#id-main").classList.contains("id-stale-edits"));

  page.bases[TAB] = () => (fresh() && !painting() && !start ? { src: chosen().dataset.edited, tag: "edited" } : null);

  page.overlays[TAB] = () => (fresh() && state.changes ? { src: chosen().dataset.change, tag: "what changed" } : null);

  page.clicks[TAB] = (x, y) => {
    if (!painting() && x >= 0 && y >= 0 && x <= 1 && y <= 1) page.point?.(x, y, state.step);
  };

  page.addresses[TAB] = () => {
    const root = panel();
    return root && !root.classList.contains("old") ? root.dataset.query : null;
  };

  document.addEventListener("click", (event) => {
    const button = target(event).closest?.(".id-iv-choose");
    if (button) {
      for (const other of all(".id-iv-choose")) other.setAttribute("aria-pressed", String(other === button));
      page.apply();
    } else if (target(event).closest?.(".id-iv-clear")) {
      cells.fill(0);
      brushing = true;
      writeCells();
      page.apply();
    } else if (target(event).closest?.(".id-iv-paint")) {
      brushing = !brushing;
      page.apply();
    }
  });
  document.addEventListener("input", (event) => {
    if (!target(event).closest?.("#id-iv-where")) return;
    brushing = target(event).value === "painted";
    setTimeout(page.apply);
  });

  // --- painting: one bit per cell, which travels with the request as hexadecimal digits in a hidden field

  const cells = new Uint8Array(GRID * GRID);
  let written = "";
  const field = () => one("#id-iv-cells textarea, #id-iv-cells input");
  const painted = () => one("#id-iv-where input:checked")?.value === "painted";
  const painting = () => open() && brushing && painted();

  function readCells() {
    const text = field()?.value ?? "";
    if (text === written) return;
    written = text;
    for (let i = 0; i < cells.length; i += 1) {
      const byte = parseInt(text.slice(2 * (i >> 3), 2 * (i >> 3) + 2), 16) || 0;
      cells[i] = (byte >> (7 - (i & 7))) & 1;
    }
  }

  function writeCells() {
    let text = "";
    for (let i = 0; i < cells.length; i += 8) {
      let byte = 0;
      for (let j = 0; j < 8; j += 1) byte = 2 * byte + cells[i + j];
      text += byte.toString(16).padStart(2, "0");
    }
    written = cells.includes(1) ? text : "";
    if (field()) page.type(field(), written);
    showCells();
  }

  function showCells() {
    readCells();
    const paint = one(".id-paint");
    if (!paint) return;
    set(paint, "hidden", !(painting() || (open() && painted() && !fresh())));
    if (paint.hidden || (paint.dataset.cells === written && !brush)) return;
    paint.dataset.cells = written;
    const context = paint.getContext("2d");
    context.clearRect(0, 0, GRID, GRID);
    context.fillStyle = "#f0b08e";
    cells.forEach((cell, i) => { if (cell) context.fillRect(i % GRID, Math.floor(i / GRID), 1, 1); });
  }

  /** @param {number} x @param {number} y */
  function dab(x, y) {
    const radius = Number(one(".id-iv-size")?.value ?? 3);
    const value = Number(!one(".id-iv-erase")?.checked);
    for (let row = 0; row < GRID; row += 1) {
      for (let column = 0; column < GRID; column += 1) {
        if (Math.hypot(column + 0.5 - x * GRID, row + 0.5 - y * GRID) <= radius) cells[row * GRID + column] = value;
      }
    }
  }

  // --- the pointer on the picture: it paints, or drags an object to where it should go

  /** @type {{ x: number, y: number } | null} */
  let brush = null; // where the brush was last
  /** @type {{ x: number, y: number, clientX: number, clientY: number, moved: boolean } | null} */
  let start = null; // where the pointer went down
  let dragged = false; // whether the click that follows ended a drag

  /** @param {PointerEvent} event */
  function place(event) {
    const box = one(".id-canvas").getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  document.addEventListener("pointerdown", (event) => {
    const canvas = target(event).closest?.(".id-canvas");
    dragged = false;
    if (!canvas || !open() || event.button !== 0 || !one(".id-image", canvas)) return;
    canvas.setPointerCapture(event.pointerId);
    const at = place(event);
    if (painting()) {
      readCells();
      brush = at;
      dab(at.x, at.y);
      showCells();
    } else start = { ...at, clientX: event.clientX, clientY: event.clientY, moved: false };
  });

  document.addEventListener("pointermove", (event) => {
    const at = brush || start ? place(event) : null;
    if (brush) {
      // Between two events a quick hand moves over many cells.
      const steps = Math.ceil(Math.hypot(at.x - brush.x, at.y - brush.y) * GRID) || 1;
      for (let i = 1; i <= steps; i += 1) dab(brush.x + ((at.x - brush.x) * i) / steps, brush.y + ((at.y - brush.y) * i) / steps);
      brush = at;
      showCells();
    } else if (start) {
      if (!start.moved && Math.hypot(event.clientX - start.clientX, event.clientY - start.clientY) > DRAGGED) {
        start.moved = true;
        page.apply(); // back to the original, on which the drag began
      }
      if (start.moved) arrow(start, at);
    }
  });

  /** @param {boolean} finished @param {PointerEvent} event */
  function end(finished, event) {
    if (brush) {
      brush = null;
      writeCells();
    } else if (start?.moved) {
      const [from, to] = [start, place(event)];
      start = null;
      dragged = true;
      arrow(null, null);
      page.apply();
      const inside = Math.min(to.x, to.y) >= 0 && Math.max(to.x, to.y) <= 1;
      if (finished && inside) page.drag?.(from.x, from.y, to.x, to.y);
    }
    start = null;
  }
  document.addEventListener("pointerup", (event) => end(true, event));
  document.addEventListener("pointercancel", (event) => end(false, event));
  document.addEventListener("click", (event) => {
    if (dragged && target(event).closest?.(".id-canvas")) event.stopImmediatePropagation();
    dragged = false;
  }, true);

  /** @param {{ x: number, y: number } | null} from @param {{ x: number, y: number } | null} to */
  function arrow(from, to) {
    const line = one(".id-arrow");
    if (!line) return;
    line.toggleAttribute("hidden", !from);
    if (!from) return;
    const mark = one("line", line);
    for (const [name, value] of Object.entries({ x1: from.x, y1: from.y, x2: to.x, y2: to.y })) mark.setAttribute(name, String(100 * value));
  }
})();
