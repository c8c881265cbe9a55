// @ts-check
// The last pictures of this browser, to return to: an address and a small copy of each.
(() => {
  "use strict";
  const page = window.idPage;
  const { one, target } = page;
  const KEPT = 8;
  const SIDE = 64;

  /** @returns {{ query: string, prompt: string, image: string }[]} */
  function read() {
    try {
      return JSON.parse(localStorage.getItem("id-pictures") ?? "[]");
    } catch { // not allowed, as in a frame of another site
      return [];
    }
  }

  function show() {
    const row = one(".id-pictures");
    const pictures = read();
    if (!row || row.dataset.shown === JSON.stringify(pictures.map((one) => one.query))) return;
    row.dataset.shown = JSON.stringify(pictures.map((one) => one.query));
    row.hidden = !pictures.length;
    row.replaceChildren(Object.assign(document.createElement("span"), { textContent: "Your pictures" }), ...pictures.map((picture) => {
      const link = Object.assign(document.createElement("a"), { href: `?${picture.query}`, title: picture.prompt, className: "id-picture" });
      link.append(Object.assign(new Image(), { src: picture.image, alt: picture.prompt }));
      return link;
    }));
  }

  function keep() {
    const panel = one(".id-panel:not(.empty, .running)");
    const image = one(".id-image");
    const query = panel?.dataset.query;
    if (!query || !image?.complete || !image.naturalWidth || one("#id-main").classList.contains("id-stale-image")) return;
    const parameters = new URLSearchParams(query);
    const about = one(".id-viewer")?.dataset.about ?? "";
    if (!about.startsWith(`“${parameters.get("prompt")}” · seed ${parameters.get("seed")} `)) return; // words of another picture
    parameters.delete("given");
    const key = parameters.toString();
    const example = Array.from(document.querySelectorAll(".id-example")).some((one) => one.getAttribute("title") === parameters.get("prompt"));
    const pictures = read();
    if (example || pictures[0]?.query === key) return;
    const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
    canvas.getContext("2d").drawImage(image, 0, 0, SIDE, SIDE);
    const picture = { query: key, prompt: parameters.get("prompt"), image: canvas.toDataURL("image/webp", 0.8) };
    try {
      localStorage.setItem("id-pictures", JSON.stringify([picture, ...pictures.filter((one) => one.query !== key)].slice(0, KEPT)));
    } catch { /* not allowed, or full */ }
  }

  page.changes.push(() => {
    keep();
    show();
  });
  document.addEventListener("click", (event) => {
    // A plain click stays on the page's own address, so that Back returns to the picture before.
    const link = target(event).closest?.(".id-picture");
    if (link) link.setAttribute("aria-busy", "true");
  });
})();
