// @ts-check
// The Layout tab: steps through the denoising, paints the predicted map of each step, and shows it on the image.
(() => {
  "use strict";
  const page = window.idPage;
  const { one, all, set, target, query } = page;
  const TAB = "Layout";
  const NONE = 0x40; // the character of a cell without a class, as layout/results.py writes it
  const FRAME = 160; // milliseconds per step
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  const linked = query.get("tab")?.toLowerCase() === TAB.toLowerCase() ? Number(query.get("step")) || 0 : 0;
  let at = Math.max(linked - 1, 0);
  let pending = linked > 0;
  /** @type {Record<string, string | null>} */
  const wanted = { block: query.get("block"), branch: query.get("branch"), classes: query.get("classes") };
  /** @type {number | null} */
  let playing = null;
  /** @type {string | null} */
  let text = null;
  /** @type {LayoutData | null} */
  let data = null;
  /** @type {{ root: HTMLElement, text: string | null, image: string } | null} */
  let last = null; // the panel and the image that it was made for
  let painted = "";
  let source = "";

  const panel = () => one(".id-layout:not(.empty)");

  function read() {
    const found = one(".id-layout-data")?.dataset.layout ?? null;
    if (found === text) return;
    text = found;
    data = found && JSON.parse(found);
  }

  // A choice that this image does not offer falls back to the server's default.
  /** @param {HTMLElement} root */
  function chosen(root) {
    /** @type {Record<string, HTMLInputElement>} */
    const found = {};
    for (const field of all("fieldset[data-option]", root)) {
      const name = field.dataset.option;
      const inputs = all("input", field);
      const input = inputs.find((other) => other.value === wanted[name]) ?? inputs.find((other) => other.defaultChecked);
      set(input, "checked", true);
      found[name] = input;
    }
    const key = `${found.block.value}|${found.branch.value}|${found.classes.value}`;
    return { key: data.readouts[key] ? key : Object.keys(data.readouts)[0], inputs: Object.values(found) };
  }

  /** @param {LayoutMap} map @param {number} cell */
  const label = (map, cell) => map.cells.charCodeAt(map.size * at + cell) - NONE - 1;

  /** @param {HTMLCanvasElement} canvas @param {LayoutMap} map @param {string} key */
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

  // All labels of all steps, so that the legend does not jump; labels absent at this step are faded.
  /** @param {HTMLElement} root @param {LayoutMap} map @param {string} key */
  function legend(root, map, key) {
    const list = one(".id-layout-legend", root);
    if (list.dataset.key !== key) {
      /** @type {Map<number, number>} */
      const counts = new Map();
      for (const character of map.cells) {
        const number = character.charCodeAt(0) - NONE - 1;
        counts.set(number, (counts.get(number) ?? 0) + 1);
      }
      /** @param {number} number */
      const named = (number) => data.objects.includes(data.classes[number]);
      const numbers = Array.from(counts.keys()).filter((number) => number >= 0);
      for (const name of data.objects) if (!counts.has(data.classes.indexOf(name))) numbers.push(data.classes.indexOf(name));
      numbers.sort((a, b) => Number(named(b)) - Number(named(a)) || (counts.get(b) ?? 0) - (counts.get(a) ?? 0));
      list.replaceChildren(...numbers.map((number) => {
        const item = document.createElement("li");
        const colour = document.createElement("i");
        colour.style.background = data.colours[number];
        item.dataset.label = String(number);
        item.classList.toggle("named", named(number));
        item.append(colour, data.classes[number]);
        return item;
      }));
      list.dataset.key = key;
    }
    const present = new Set();
    for (let cell = 0; cell < map.size; cell += 1) present.add(label(map, cell));
    for (const item of all("li", list)) item.classList.toggle("away", !present.has(Number(item.dataset.label)));
  }

  /** @param {HTMLElement} root */
  function show(root) {
    const { key, inputs } = chosen(root);
    const map = data.readouts[key];
    map.size = map.grid[0] * map.grid[1];
    const steps = map.cells.length / map.size;
    at = Math.min(Math.max(at, 0), steps - 1);
    const frames = all("button.id-frame");
    const frame = frames.length === steps ? frames[at] : null;
    const stage = frame?.dataset.stage ?? one(`.id-bin[data-step="${at}"] title`, root)?.textContent.split(", ")[1];
    const canvas = one(".id-layout-map", root);
    paint(canvas, map, `${text.length} ${key} ${at}`);
    canvas.setAttribute("aria-label", `Predicted map at step ${at + 1}`);
    legend(root, map, key);
    const preview = frame ? one("img", frame).src : one(".id-image")?.src;
    if (preview && !root.classList.contains("old")) set(one(".id-layout-preview", root), "src", preview);
    const slider = one(".id-layout-slider", root);
    set(slider, "value", String(at + 1));
    slider.setAttribute("aria-valuetext", `step ${at + 1} of ${steps}${stage ? `, ${stage}` : ""}`);
    set(one(".id-layout-at", root), "textContent", `step ${at + 1} of ${steps}${stage ? ` · ${stage}` : ""}`);
    set(one(".id-layout-option", root), "textContent", inputs.map((input) => one("span", input.parentElement).firstChild.textContent.trim()).join(", "));
    for (const part of all("[data-choice]", root)) part.toggleAttribute("hidden", part.dataset.choice !== key);
    for (const number of all(".id-layout-code-step", root)) set(number, "textContent", String(at));
    for (const bin of all(".id-bin", root)) bin.classList.toggle("now", Number(bin.dataset.step) === at);
    const button = one(".id-layout-play", root);
    const action = still.matches ? "Next step" : playing ? "Pause" : "Play";
    set(button, "textContent", action);
  }

  // A panel belongs to the image that was there when it came.
  /** @param {HTMLElement} root */
  function old(root) {
    const image = one(".id-image")?.src;
    if (last?.root !== root || last.text !== text) last = { root, text, image };
    return last.image !== image;
  }

  page.watchers.push((tab) => {
    const root = panel();
    read();
    if (!root || !data) return stop();
    if (tab !== TAB) stop();
    if (pending && tab === TAB && one("button.id-frame")) {
      pending = false;
      page.state.step = at;
    } else if (tab === TAB && page.state.step !== null) at = page.state.step;
    root.classList.toggle("old", old(root));
    show(root);
  });

  page.overlays[TAB] = () => {
    const root = panel();
    return root && data && source && !root.classList.contains("old") ? { src: source, tag: `map predicted at step ${at + 1}` } : null;
  };

  page.parameters[TAB] = () => (panel() ? {
    step: at + 1,
    ...Object.fromEntries(all(".id-layout input:checked").map((input) => [input.name.replace("id-layout-", ""), input.value])),
  } : {});

  /** @param {number} step */
  function go(step) {
    at = step;
    page.state.step = step; // reset to null if there is no film strip
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
    playing = window.setInterval(() => {
      if (at + 1 >= steps()) {
        stop();
        page.apply();
        page.remember();
      } else go(at + 1);
    }, FRAME);
    go(at + 1);
  }

  document.addEventListener("click", (event) => {
    if (target(event).closest?.(".id-layout-play")) play();
    else if (target(event).closest?.("button.id-frame, .id-bin")) {
      stop();
      page.apply();
      if (one("#id-main")?.dataset.tab === TAB.toLowerCase()) page.remember();
    }
  });

  document.addEventListener("input", (event) => {
    const field = target(event).closest?.(".id-layout fieldset[data-option]");
    if (field) {
      wanted[field.dataset.option] = target(event).value;
      page.apply();
    } else if (target(event).matches?.(".id-layout-slider")) {
      stop();
      go(Number(target(event).value) - 1);
    }
  });

  document.addEventListener("change", (event) => {
    if (target(event).closest?.(".id-layout")) page.remember();
  });

  // The label under the pointer.
  document.addEventListener("pointermove", (event) => {
    const canvas = target(event).closest?.(".id-layout-map");
    if (!canvas || !data) return;
    const map = data.readouts[chosen(panel()).key];
    const box = canvas.getBoundingClientRect();
    const [height, width] = map.grid;
    const row = Math.min(Math.floor(((event.clientY - box.top) / box.height) * height), height - 1);
    const column = Math.min(Math.floor(((event.clientX - box.left) / box.width) * width), width - 1);
    canvas.title = data.classes[label(map, Math.max(row, 0) * width + Math.max(column, 0))] ?? "none";
  });
})();
