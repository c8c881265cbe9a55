// The Layout tab: walks through the steps, paints the foretold map of each, and lays it on the picture.
(() => {
  "use strict";
  const page = window.idPage;
  const TAB = "Layout";
  const NONE = 0x40; // the character of a cell without a class, as layout_reading.py writes it
  const FILM = 160; // milliseconds a step
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const set = (element, name, value) => { if (element && element[name] !== value) element[name] = value; };

  const query = page.query;
  const asked = query.get("tab")?.toLowerCase() === TAB.toLowerCase() ? Number(query.get("step")) || 0 : 0;
  let at = Math.max(asked - 1, 0);
  let wanted = asked > 0;
  let way = { block: query.get("block"), branch: query.get("branch"), told: query.get("told") };
  let playing = null;
  let text = null;
  let data = null;
  let last = null; // the panel and the picture that it was made for
  let painted = "";
  let source = "";

  const panel = () => one(".id-layout:not(.empty)");

  function read() {
    const found = one(".id-layout-data")?.dataset.layout ?? null;
    if (found === text) return;
    text = found;
    data = found && JSON.parse(found);
  }

  // A choice that this picture cannot be read with falls back to what the server has chosen.
  function chosen(root) {
    const found = {};
    for (const field of all("fieldset[data-way]", root)) {
      const name = field.dataset.way;
      const inputs = all("input", field);
      const input = inputs.find((other) => other.value === way[name]) ?? inputs.find((other) => other.defaultChecked);
      set(input, "checked", true);
      found[name] = input;
    }
    const key = `${found.block.value}|${found.branch.value}|${found.told.value}`;
    return { key: data.ways[key] ? key : Object.keys(data.ways)[0], inputs: Object.values(found) };
  }

  const label = (map, cell) => map.cells.charCodeAt(map.size * at + cell) - NONE - 1;

  function paint(canvas, map, key) {
    if (painted === key && canvas.width === map.grid[1]) return;
    const [height, width] = map.grid;
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    for (let cell = 0; cell < map.size; cell += 1) {
      const number = label(map, cell);
      if (number < 0) continue;
      context.fillStyle = data.colours[number];
      context.fillRect(cell % width, Math.floor(cell / width), 1, 1);
    }
    const large = Object.assign(document.createElement("canvas"), { width: 512, height: 512 });
    const enlarged = large.getContext("2d");
    enlarged.imageSmoothingEnabled = false;
    enlarged.drawImage(canvas, 0, 0, 512, 512);
    source = large.toDataURL();
    painted = key;
  }

  // All labels that occur at any step, so that the legend stays in its place; those of this step stand out.
  function legend(root, map, key) {
    const list = one(".id-layout-legend", root);
    if (list.dataset.key !== key) {
      const counts = new Map();
      for (const character of map.cells) {
        const number = character.charCodeAt(0) - NONE - 1;
        counts.set(number, (counts.get(number) ?? 0) + 1);
      }
      const named = (number) => data.things.includes(data.classes[number]);
      const numbers = Array.from(counts.keys()).filter((number) => number >= 0);
      for (const name of data.things) if (!counts.has(data.classes.indexOf(name))) numbers.push(data.classes.indexOf(name));
      numbers.sort((a, b) => named(b) - named(a) || (counts.get(b) ?? 0) - (counts.get(a) ?? 0));
      list.replaceChildren(...numbers.map((number) => {
        const item = document.createElement("li");
        const colour = document.createElement("i");
        colour.style.background = data.colours[number];
        item.dataset.label = number;
        item.classList.toggle("named", named(number));
        item.append(colour, data.classes[number]);
        return item;
      }));
      list.dataset.key = key;
    }
    const there = new Set();
    for (let cell = 0; cell < map.size; cell += 1) there.add(label(map, cell));
    for (const item of all("li", list)) item.classList.toggle("away", !there.has(Number(item.dataset.label)));
  }

  function show(root) {
    const { key, inputs } = chosen(root);
    const map = data.ways[key];
    map.size = map.grid[0] * map.grid[1];
    const steps = map.cells.length / map.size;
    at = Math.min(Math.max(at, 0), steps - 1);
    const frames = all("button.id-frame");
    const frame = frames.length === steps ? frames[at] : null;
    const stage = frame?.dataset.stage ?? one(`.id-bin[data-step="${at}"] title`, root)?.textContent.split(", ")[1];
    const canvas = one(".id-layout-map", root);
    paint(canvas, map, `${text.length} ${key} ${at}`);
    canvas.setAttribute("aria-label", `Foretold map at step ${at + 1}`);
    legend(root, map, key);
    const preview = frame ? one("img", frame).src : one(".id-picture")?.src;
    if (preview && !root.classList.contains("old")) set(one(".id-layout-preview", root), "src", preview);
    const slider = one(".id-layout-slider", root);
    set(slider, "value", String(at + 1));
    slider.setAttribute("aria-valuetext", `step ${at + 1} of ${steps}${stage ? `, ${stage}` : ""}`);
    set(one(".id-layout-at", root), "textContent", `step ${at + 1} of ${steps}${stage ? ` · ${stage}` : ""}`);
    set(one(".id-layout-way", root), "textContent", inputs.map((input) => one("span", input.parentElement).firstChild.textContent.trim()).join(", "));
    for (const part of all("[data-choice]", root)) part.toggleAttribute("hidden", part.dataset.choice !== key);
    for (const bin of all(".id-bin", root)) bin.classList.toggle("now", Number(bin.dataset.step) === at);
    const button = one(".id-layout-play", root);
    const film = still.matches ? "Next step" : playing ? "Pause" : "Play";
    set(button, "textContent", film);
  }

  // A panel belongs to the picture that was there when it came.
  function old(root) {
    const picture = one(".id-picture")?.src;
    if (last?.root !== root || last.text !== text) last = { root, text, picture };
    return last.picture !== picture;
  }

  page.watchers.push((tab) => {
    const root = panel();
    read();
    if (!root || !data) return stop();
    if (tab !== TAB) stop();
    if (wanted && tab === TAB && one("button.id-frame")) {
      wanted = false;
      page.state.step = at;
    } else if (tab === TAB && page.state.step !== null) at = page.state.step;
    root.classList.toggle("old", old(root));
    show(root);
  });

  page.overlays[TAB] = () => {
    const root = panel();
    return root && data && source && !root.classList.contains("old") ? { src: source, tag: `map foretold at step ${at + 1}` } : null;
  };

  page.parameters[TAB] = () => (panel() ? {
    step: at + 1,
    ...Object.fromEntries(all(".id-layout input:checked").map((input) => [input.name.replace("id-layout-", ""), input.value])),
  } : {});

  function go(step) {
    at = step;
    page.state.step = step; // put back to null where there is no film strip
    page.apply();
  }

  function stop() {
    if (playing) clearInterval(playing);
    playing = null;
  }

  function play() {
    const steps = () => Number(panel()?.dataset.steps ?? 1);
    if (still.matches) return go((at + 1) % steps());
    if (playing) {
      stop();
      return page.apply();
    }
    if (at + 1 >= steps()) at = -1;
    playing = setInterval(() => {
      if (at + 1 >= steps()) {
        stop();
        page.apply();
        page.remember();
      } else go(at + 1);
    }, FILM);
    go(at + 1);
  }

  document.addEventListener("click", (event) => {
    if (event.target.closest?.(".id-layout-play")) play();
    else if (event.target.closest?.("button.id-frame, .id-bin")) {
      stop();
      page.apply();
      if (one("#id-main")?.dataset.tab === TAB.toLowerCase()) page.remember();
    }
  });

  document.addEventListener("input", (event) => {
    const field = event.target.closest?.(".id-layout fieldset[data-way]");
    if (field) {
      way[field.dataset.way] = event.target.value;
      page.apply();
    } else if (event.target.matches?.(".id-layout-slider")) {
      stop();
      go(Number(event.target.value) - 1);
    }
  });

  document.addEventListener("change", (event) => {
    if (event.target.closest?.(".id-layout")) page.remember();
  });

  // What a colour stands for, where the pointer is.
  document.addEventListener("pointermove", (event) => {
    const canvas = event.target.closest?.(".id-layout-map");
    if (!canvas || !data) return;
    const map = data.ways[chosen(panel()).key];
    const box = canvas.getBoundingClientRect();
    const [height, width] = map.grid;
    const row = Math.min(Math.floor(((event.clientY - box.top) / box.height) * height), height - 1);
    const column = Math.min(Math.floor(((event.clientX - box.left) / box.width) * width), width - 1);
    canvas.title = data.classes[label(map, Math.max(row, 0) * width + Math.max(column, 0))] ?? "none";
  });
})();
