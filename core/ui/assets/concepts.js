// @ts-check
// The Concepts tab: lists what is active at a step or a point, and shows a concept's map on the image.
(() => {
  "use strict";
  const page = window.idPage;
  const { one, all, set, target, query } = page;
  const TAB = "Concepts";
  const FIRST_NUMBER = 0xa1; // as concepts/results.py writes them
  const FIRST_LEVEL = 0x3f;
  const N_LEVELS = 63;
  const SHOWN = 8;

  /** @type {Record<string, string | null>} */
  const wanted = { block: query.get("block"), branch: query.get("branch") };
  let linked = query.get("concept") || null; // opened once the card's own script is there
  /** @type {{ x: number, y: number } | null} */
  let point = null; // x and y from 0 to 1
  /** @type {ConceptRef | null} */
  let hovered = null; // the concept under the pointer or the focus
  /** @type {string | null} */
  let text = null;
  /** @type {ConceptData | null} */
  let data = null;
  /** @type {{ root: HTMLElement, text: string | null, image: string } | null} */
  let last = null;
  let rendered = "";
  let outdated = false; // whether the open card is about another image
  let opened = ""; // the site and number of the open card
  let chosenByHand = false; // whether a click asked for the next card, rather than the address
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  const panel = () => one(".id-active:not(.empty)");
  const card = () => one("#id-concept .id-concept-card:not([hidden])");

  function read() {
    const found = one(".id-active-data")?.dataset.codes ?? null;
    if (found === text) return;
    text = found;
    outdated = Boolean(found && card());
    data = found && JSON.parse(found);
    rendered = "";
  }

  /** @param {HTMLElement} root */
  function chosen(root) {
    /** @type {Record<string, HTMLInputElement>} */
    const found = {};
    for (const field of all("fieldset[data-option]", root)) {
      const inputs = all("input", field);
      const input = inputs.find((other) => other.value === wanted[field.dataset.option]) ?? inputs.find((other) => other.defaultChecked);
      set(input, "checked", true);
      found[field.dataset.option] = input;
    }
    const key = `${found.block.value}|${found.branch.value}`;
    return data.sites[key] ? key : Object.keys(data.sites)[0];
  }

  const step = () => Math.min(page.state.step ?? data.steps - 1, data.steps - 1);

  // [positions] a concept's values at a step.
  /** @param {SiteCodes} codes @param {number} number @param {number} at */
  function values(codes, number, at) {
    const cells = codes.grid[0] * codes.grid[1];
    const found = new Float32Array(cells);
    const scale = codes.names[number]?.[3] / N_LEVELS;
    for (let cell = 0; cell < cells; cell += 1) {
      for (let j = 0, i = (at * cells + cell) * codes.each; j < codes.each; j += 1, i += 1) {
        if (codes.numbers.charCodeAt(i) - FIRST_NUMBER === number) found[cell] += (codes.levels.charCodeAt(i) - FIRST_LEVEL) * scale;
      }
    }
    return found;
  }

  /** @param {SiteCodes} codes */
  function cellOf(codes) {
    const [height, width] = codes.grid;
    return Math.min(Math.floor(point.y * height), height - 1) * width + Math.min(Math.floor(point.x * width), width - 1);
  }

  // What is more active than usual, by how much that says of this picture: share · log2(share / usual share). Concepts with
  // one label are one item, which shows the first of them; labels that fit badly come last.
  /** @param {SiteCodes} codes @param {number} at @param {boolean} named @returns {ActiveItem[]} */
  function strongest(codes, at, named) {
    const cells = codes.grid[0] * codes.grid[1];
    /** @type {Map<number, number>} */
    const sums = new Map();
    let whole = 0;
    const [from, to] = point ? [cellOf(codes), cellOf(codes) + 1] : [0, cells];
    for (let i = (at * cells + from) * codes.each; i < (at * cells + to) * codes.each; i += 1) {
      const level = codes.levels.charCodeAt(i) - FIRST_LEVEL;
      if (!level) continue;
      const number = codes.numbers.charCodeAt(i) - FIRST_NUMBER;
      const value = (level * codes.names[number][3]) / N_LEVELS;
      sums.set(number, (sums.get(number) ?? 0) + value);
      whole += value;
    }
    /** @type {Map<string, ActiveItem>} */
    const found = new Map();
    const items = Array.from(sums, ([number, sum]) => {
      const share = sum / whole;
      const times = share / Math.max(codes.names[number][4], 1e-6);
      return { number, share, times, excess: share * Math.log2(times), members: 1 };
    }).sort((a, b) => b.excess - a.excess);
    for (const item of items) {
      const label = codes.names[item.number][0];
      if (named && !label) continue;
      const same = found.get(label);
      if (label && same) same.members += 1;
      else found.set(label || `#${item.number}`, item);
    }
    /** @param {ActiveItem} item */
    const weak = (item) => Number(Boolean(codes.names[item.number][0]) && !codes.names[item.number][5]);
    return Array.from(found.values()).sort((a, b) => weak(a) - weak(b) || b.excess - a.excess);
  }

  /** @param {HTMLCanvasElement} canvas @param {SiteCodes} codes @param {number} number @param {number} at */
  function paint(canvas, codes, number, at, translucent = false) {
    const [height, width] = codes.grid;
    const found = values(codes, number, at);
    const top = Math.max(...found, 1e-9);
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    found.forEach((value, cell) => {
      const share = value / top;
      context.globalAlpha = translucent ? 0.62 + 0.38 * share : 1;
      context.fillStyle = data.colours[Math.round(share * (data.colours.length - 1))];
      context.fillRect(cell % width, Math.floor(cell / width), 1, 1);
    });
    return canvas;
  }

  /** @type {Record<string, string>} */
  const KINDS = { object: "object", background: "background", style: "style", "context-free": "fixed position", unlabelled: "unnamed" };
  /** @param {SiteCodes} codes @param {number} number */
  const name = (codes, number) => codes.names[number]?.[0] || KINDS[codes.names[number]?.[1]] || "unnamed";

  /** @param {string} key @param {SiteCodes} codes @param {ActiveItem} found @param {number} at @param {number} top */
  function item(key, codes, found, at, top) {
    const [label, kind, , , , fits] = codes.names[found.number];
    const row = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "id-concept-button id-active-item";
    button.classList.toggle("weak", Boolean(label) && !fits);
    button.dataset.site = key;
    button.dataset.number = String(found.number);
    const bar = document.createElement("i");
    bar.style.setProperty("--share", String(Math.max(found.excess, 0) / top));
    const title = document.createElement("b");
    title.textContent = name(codes, found.number);
    const note = document.createElement("small");
    note.textContent = [`feature ${found.number}`, found.members > 1 ? `the first of ${found.members}` : KINDS[kind],
      label && !fits ? "name fits badly" : ""].filter(Boolean).join(" · ");
    const figure = document.createElement("span");
    figure.className = "id-active-item-share";
    figure.textContent = `${found.times >= 9.95 ? found.times.toFixed(0) : found.times.toFixed(1)} ×`;
    figure.title = `${(100 * found.share).toFixed(1)} % of all activation here, ${found.times.toFixed(1)} times as much as in most pictures`;
    const words = document.createElement("span");
    words.className = "id-active-item-words";
    words.append(title, note, bar);
    button.append(paint(document.createElement("canvas"), codes, found.number, at), words, figure);
    row.append(button);
    return row;
  }

  /** @param {HTMLElement} root */
  function show(root) {
    const key = chosen(root);
    const codes = data.sites[key];
    const at = step();
    const named = one(".id-active-named input", root).checked;
    const where = point ? `at row ${Math.floor(cellOf(codes) / codes.grid[1]) + 1}, column ${(cellOf(codes) % codes.grid[1]) + 1}` : "in the whole picture";
    const state = `${key} ${at} ${named} ${point ? cellOf(codes) : ""}`;
    const stage = one(`button.id-frame[data-step="${at}"]`)?.dataset.stage;
    set(one(".id-active-at", root), "textContent",
      `Most unusual at step ${at + 1} of ${data.steps}${stage ? ` (${stage})` : ""}, ${where}${point ? " · click there again for the whole picture" : ""}`);
    set(one(".id-active-site", root), "textContent",
      all("input[type=radio]:checked", root).map((input) => one("span", input.parentElement).textContent).join(", "));
    for (const bin of all("#id-concept .id-bin")) bin.classList.toggle("now", Number(bin.dataset.step) === at);
    if (state === rendered) return;
    rendered = state;
    const found = strongest(codes, at, named).slice(0, SHOWN);
    const top = Math.max(...found.map((one) => one.excess), 1e-9);
    const focused = /** @type {Found | null} */ (document.activeElement)?.closest?.(".id-active-item")?.dataset.number;
    const list = one(".id-active-list", root);
    if (found.length) list.replaceChildren(...found.map((one) => item(key, codes, one, at, top)));
    else list.replaceChildren(Object.assign(document.createElement("li"), { className: "id-empty", textContent: "Nothing named is active here." }));
    if (focused) one(`.id-active-item[data-number="${focused}"]`, list)?.focus({ preventScroll: true });
  }

  /** @param {HTMLElement} root */
  function old(root) {
    const image = one(".id-image")?.src;
    if (last?.root !== root || last.text !== text) last = { root, text, image };
    return last.image !== image;
  }

  page.watchers.push((tab) => {
    const root = panel();
    read();
    const key = wanted.block ? `${wanted.block}|${wanted.branch ?? "cond"}` : data && Object.keys(data.sites)[0];
    if (linked !== null && key && page.openConcept && one(".id-badge.ready")) {
      page.openConcept(key, linked);
      linked = null;
    } else if (outdated && card() && page.openConcept) {
      page.openConcept(card().dataset.site, card().dataset.number);
      outdated = false;
    }
    if (!root || !data || tab !== TAB) return;
    root.classList.toggle("old", old(root));
    show(root);
  });

  // The concept shown on the image: the hovered one, else the one whose card is open, else the strongest.
  /** @returns {ConceptRef | null} */
  function onImage() {
    const shown = card();
    const key = chosen(panel());
    if (hovered && data.sites[hovered.site]) return hovered;
    if (shown && data.sites[shown.dataset.site]) return { site: shown.dataset.site, number: Number(shown.dataset.number) };
    const first = one(".id-active-item");
    return first ? { site: key, number: Number(first.dataset.number) } : null;
  }

  page.overlays[TAB] = () => {
    const root = panel();
    if (!root || !data || root.classList.contains("old")) return null;
    const shown = onImage();
    if (!shown) return null;
    const codes = data.sites[shown.site];
    const small = paint(document.createElement("canvas"), codes, shown.number, step(), true);
    const large = Object.assign(document.createElement("canvas"), { width: 256, height: 256 });
    const context = large.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, 256, 256);
    const preview = hovered && card() && card().dataset.number !== String(shown.number) ? " · preview" : "";
    return { src: large.toDataURL(), tag: `${name(codes, shown.number)} · feature ${shown.number}${preview}` };
  };

  page.clicks[TAB] = (x, y) => {
    const root = panel();
    if (!root || !data || x < 0 || y < 0 || x > 1 || y > 1) return;
    const codes = data.sites[chosen(root)];
    const before = point && cellOf(codes);
    point = { x, y };
    if (cellOf(codes) === before) point = null;
    page.apply();
  };

  page.spoken[TAB] = () => {
    const first = one(".id-active-item");
    return first ? one("b", first).textContent : "";
  };

  page.parameters[TAB] = () => {
    const root = panel();
    const shown = card();
    if (!root || !data) return {};
    const [block, branch] = (shown?.dataset.site ?? chosen(root)).split("|");
    return { block, branch, ...(shown ? { concept: shown.dataset.number } : {}) };
  };

  // Scrolling, too, brings other buttons under the pointer: only one that moves previews a concept.
  let pointer = "";
  /** @param {Event} event */
  const hover = (event) => {
    if (event instanceof PointerEvent) {
      const now = `${event.screenX} ${event.screenY}`;
      if (now === pointer) return;
      pointer = now;
    }
    const button = target(event).closest?.(".id-concept-button");
    const next = button ? { site: button.dataset.site, number: Number(button.dataset.number) } : null;
    if (next?.number === hovered?.number && next?.site === hovered?.site) return;
    hovered = next;
    page.apply();
  };
  document.addEventListener("pointermove", hover);
  document.addEventListener("focusin", hover);

  document.addEventListener("click", (event) => {
    const button = target(event).closest?.(".id-concept-button");
    const closed = one("#id-concept .id-concept-card[hidden]");
    const steer = target(event).closest?.(".id-steer");
    const same = target(event).closest?.(".id-same");
    if (same) {
      const search = one("#id-concept-query textarea, #id-concept-query input");
      page.type(search, same.dataset.label);
      search.scrollIntoView({ block: "start" });
    }
    if (steer) {
      all('#id-right [role="tab"]').find((tab) => tab.textContent.trim() === "Interventions")?.click();
      page.steer?.(steer.dataset.site, steer.dataset.number);
    } else if (target(event).closest?.(".id-random")) {
      const sites = Object.keys(data?.sites ?? {});
      const numbers = sites.length ? Object.keys(data.sites[sites[0]].names).filter((number) => data.sites[sites[0]].names[number][5]) : [];
      if (!numbers.length) return;
      chosenByHand = true;
      page.openConcept?.(sites[0], numbers[Math.floor(Math.random() * numbers.length)]);
    } else if (target(event).closest?.(".id-concept-card-close")) {
      // Hidden, not removed: opening the same concept again yields the same HTML, which Gradio would not render anew.
      set(card(), "hidden", true);
      cardChanged();
    } else if (button) {
      chosenByHand = true;
      if (closed?.dataset.site === button.dataset.site && closed.dataset.number === button.dataset.number) closed.hidden = false;
      cardChanged();
    }
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && point && one("#id-main")?.dataset.tab === "concepts") {
      point = null;
      page.apply();
    }
  });

  document.addEventListener("input", (event) => {
    const field = target(event).closest?.(".id-active fieldset[data-option]");
    if (field) wanted[field.dataset.option] = target(event).value;
    else if (!target(event).closest?.(".id-active-named")) return;
    page.apply();
    page.remember();
  });

  // A card that was not open before is scrolled into view from its start, and the address remembers it.
  function cardChanged() {
    const shown = card();
    const now = shown ? `${shown.dataset.site} ${shown.dataset.number}` : "";
    if (now === opened) return;
    opened = now;
    hovered = null; // the pointer did not move: another button came to lie under it
    page.apply();
    page.remember();
    if (!shown) return;
    if (chosenByHand) one("h3", shown)?.focus({ preventScroll: true });
    chosenByHand = false;
    shown.scrollIntoView({ block: "start", behavior: still.matches ? "auto" : "smooth" });
  }
  page.changes.push(cardChanged);
})();
