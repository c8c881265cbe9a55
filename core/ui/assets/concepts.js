// The Concepts tab: lists what is active at a step or a point, and lays a concept's map on the picture.
(() => {
  "use strict";
  const page = window.idPage;
  const TAB = "Concepts";
  const FIRST_NUMBER = 0xa1; // as concept_reading.py writes them
  const FIRST_LEVEL = 0x3f;
  const N_LEVELS = 63;
  const SHOWN = 8;
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const set = (element, name, value) => { if (element && element[name] !== value) element[name] = value; };

  const query = page.query;
  let way = { block: query.get("block"), branch: query.get("branch") };
  let asked = query.get("concept") || null; // opened once the card's own script is there
  let point = null; // x and y from 0 to 1
  let looked = null; // the concept under the pointer or the focus
  let text = null;
  let data = null;
  let last = null;
  let drawn = "";
  let again = false; // whether the open card tells of another picture
  let opened = "";

  const panel = () => one(".id-thoughts:not(.empty)");
  const card = () => one("#id-concept .id-concept-card:not([hidden])");

  function read() {
    const found = one(".id-thoughts-data")?.dataset.codes ?? null;
    if (found === text) return;
    text = found;
    again = Boolean(found && card());
    data = found && JSON.parse(found);
    drawn = "";
  }

  function chosen(root) {
    const found = {};
    for (const field of all("fieldset[data-way]", root)) {
      const inputs = all("input", field);
      const input = inputs.find((other) => other.value === way[field.dataset.way]) ?? inputs.find((other) => other.defaultChecked);
      set(input, "checked", true);
      found[field.dataset.way] = input;
    }
    const key = `${found.block.value}|${found.branch.value}`;
    return data.ways[key] ? key : Object.keys(data.ways)[0];
  }

  const step = () => Math.min(page.state.step ?? data.steps - 1, data.steps - 1);

  // [positions] a concept's values at a step.
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

  function cellOf(codes) {
    const [height, width] = codes.grid;
    return Math.min(Math.floor(point.y * height), height - 1) * width + Math.min(Math.floor(point.x * width), width - 1);
  }

  // [[number, share]], strongest first.
  function strongest(codes, at) {
    const cells = codes.grid[0] * codes.grid[1];
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
    return Array.from(sums, ([number, sum]) => [number, sum / whole]).sort((a, b) => b[1] - a[1]);
  }

  function paint(canvas, codes, number, at, see = false) {
    const [height, width] = codes.grid;
    const found = values(codes, number, at);
    const top = Math.max(...found, 1e-9);
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    found.forEach((value, cell) => {
      const share = value / top;
      context.globalAlpha = see ? 0.62 + 0.38 * share : 1;
      context.fillStyle = data.colours[Math.round(share * (data.colours.length - 1))];
      context.fillRect(cell % width, Math.floor(cell / width), 1, 1);
    });
    return canvas;
  }

  const KINDS = { object: "a thing", place: "a place", style: "a style", "context-free": "a part of the frame", unlabelled: "no name" };
  const name = (codes, number) => codes.names[number]?.[0] || KINDS[codes.names[number]?.[1]] || "no name";

  function item(key, codes, number, share, at, top) {
    const row = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "id-concept-button id-thought";
    button.dataset.way = key;
    button.dataset.number = number;
    const bar = document.createElement("i");
    bar.style.setProperty("--share", share / top);
    const label = document.createElement("b");
    label.textContent = name(codes, number);
    const note = document.createElement("small");
    note.textContent = `feature ${number} · ${KINDS[codes.names[number][1]]}`;
    const figure = document.createElement("span");
    figure.className = "id-thought-share";
    figure.textContent = `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
    const words = document.createElement("span");
    words.className = "id-thought-words";
    words.append(label, note, bar);
    button.append(paint(document.createElement("canvas"), codes, number, at), words, figure);
    row.append(button);
    return row;
  }

  function show(root) {
    const key = chosen(root);
    const codes = data.ways[key];
    const at = step();
    const named = one(".id-thoughts-named input", root).checked;
    const where = point ? `at row ${Math.floor(cellOf(codes) / codes.grid[1]) + 1}, column ${(cellOf(codes) % codes.grid[1]) + 1}` : "in the whole picture";
    const state = `${key} ${at} ${named} ${point ? cellOf(codes) : ""}`;
    const stage = one(`button.id-frame[data-step="${at}"]`)?.dataset.stage;
    set(one(".id-thoughts-at", root), "textContent",
      `Strongest at step ${at + 1} of ${data.steps}${stage ? ` (${stage})` : ""}, ${where}${point ? " · click there again for the whole picture" : ""}`);
    set(one(".id-thoughts-way", root), "textContent",
      all("input[type=radio]:checked", root).map((input) => one("span", input.parentElement).textContent).join(", "));
    for (const bin of all("#id-concept .id-bin")) bin.classList.toggle("now", Number(bin.dataset.step) === at);
    if (state === drawn) return;
    drawn = state;
    const found = strongest(codes, at).filter(([number]) => !named || codes.names[number][0]).slice(0, SHOWN);
    const focused = document.activeElement?.closest?.(".id-thought")?.dataset.number;
    const list = one(".id-thoughts-list", root);
    if (found.length) list.replaceChildren(...found.map(([number, share]) => item(key, codes, number, share, at, found[0][1])));
    else list.replaceChildren(Object.assign(document.createElement("li"), { className: "id-empty", textContent: "Nothing with a name is active here." }));
    if (focused) one(`.id-thought[data-number="${focused}"]`, list)?.focus({ preventScroll: true });
  }

  function old(root) {
    const picture = one(".id-picture")?.src;
    if (last?.root !== root || last.text !== text) last = { root, text, picture };
    return last.picture !== picture;
  }

  page.watchers.push((tab) => {
    const root = panel();
    read();
    const key = way.block ? `${way.block}|${way.branch ?? "cond"}` : data && Object.keys(data.ways)[0];
    if (asked !== null && key && page.openConcept && one(".id-badge.ready")) {
      page.openConcept(key, asked);
      asked = null;
    } else if (again && card() && page.openConcept) {
      page.openConcept(card().dataset.way, card().dataset.number);
      again = false;
    }
    if (!root || !data || tab !== TAB) return;
    root.classList.toggle("old", old(root));
    show(root);
  });

  // What lies on the picture: the concept that is looked at, else the one whose card is open, else the strongest.
  function onPicture() {
    const shown = card();
    const key = chosen(panel());
    if (looked && data.ways[looked.way]) return looked;
    if (shown && data.ways[shown.dataset.way]) return { way: shown.dataset.way, number: Number(shown.dataset.number) };
    const first = one(".id-thought");
    return first ? { way: key, number: Number(first.dataset.number) } : null;
  }

  page.overlays[TAB] = () => {
    const root = panel();
    if (!root || !data || root.classList.contains("old")) return null;
    const what = onPicture();
    if (!what) return null;
    const codes = data.ways[what.way];
    const small = paint(document.createElement("canvas"), codes, what.number, step(), true);
    const large = Object.assign(document.createElement("canvas"), { width: 256, height: 256 });
    const context = large.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, 256, 256);
    return { src: large.toDataURL(), tag: `${name(codes, what.number)} · feature ${what.number}` };
  };

  page.clicks[TAB] = (x, y) => {
    const root = panel();
    if (!root || !data || x < 0 || y < 0 || x > 1 || y > 1) return;
    const codes = data.ways[chosen(root)];
    const before = point && cellOf(codes);
    point = { x, y };
    if (cellOf(codes) === before) point = null;
    page.apply();
  };

  page.parameters[TAB] = () => {
    const root = panel();
    const shown = card();
    if (!root || !data) return {};
    const [block, branch] = (shown?.dataset.way ?? chosen(root)).split("|");
    return { block, branch, ...(shown ? { concept: shown.dataset.number } : {}) };
  };

  const look = (event) => {
    const button = event.target.closest?.(".id-concept-button");
    const next = button ? { way: button.dataset.way, number: Number(button.dataset.number) } : null;
    if (next?.number === looked?.number && next?.way === looked?.way) return;
    looked = next;
    page.apply();
  };
  document.addEventListener("pointerover", look);
  document.addEventListener("focusin", look);

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".id-concept-button");
    const closed = one("#id-concept .id-concept-card[hidden]");
    if (event.target.closest?.(".id-concept-card-close")) {
      // Hidden, not removed: of a concept that is opened again the same HTML comes, and would not be shown anew.
      set(card(), "hidden", true);
      opened = "";
      page.apply();
      page.remember();
    } else if (button && closed?.dataset.way === button.dataset.way && closed.dataset.number === button.dataset.number) {
      closed.hidden = false;
      delete closed.dataset.seen;
      came();
    }
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && point && one("#id-main")?.dataset.tab === "concepts") {
      point = null;
      page.apply();
    }
  });

  document.addEventListener("input", (event) => {
    const field = event.target.closest?.(".id-thoughts fieldset[data-way]");
    if (field) way[field.dataset.way] = event.target.value;
    else if (!event.target.closest?.(".id-thoughts-named")) return;
    page.apply();
    page.remember();
  });

  // A card that came is shown and remembered.
  function came() {
    const shown = card();
    if (shown && !shown.dataset.seen) {
      shown.dataset.seen = "yes";
      page.apply();
      page.remember();
      const name = `${shown.dataset.way} ${shown.dataset.number}`;
      if (name !== opened) shown.scrollIntoView({ block: "nearest", behavior: "smooth" });
      opened = name;
    }
  }
  new MutationObserver(came).observe(document, { childList: true, subtree: true });
})();
