// @ts-check
// The Interventions tab: selects concepts by a click on the image, shows the map of the change on it, marks old results.
(() => {
  "use strict";
  const page = window.idPage;
  const { one, all, target } = page;
  const TAB = "Interventions";

  /** @type {{ query: string, image: string } | null} */
  let last = null; // the query of the panel and the image that it was made for
  let remembered = "";

  const panel = () => one(".id-iv:not(.empty, .running)");

  // A panel belongs to the image that was there when it came.
  /** @param {HTMLElement} root */
  function old(root) {
    const image = one(".id-image")?.src;
    if (last?.query !== root.dataset.query) last = { query: root.dataset.query, image };
    return last.image !== image;
  }

  page.watchers.push((tab) => {
    const stale = (one(".id-status")?.dataset.stale ?? "").includes("edits");
    one("#id-main").classList.toggle("id-stale-edits", stale);
    const root = panel();
    if (!root) return;
    const before = old(root);
    root.classList.toggle("old", before);
    one("#id-iv-result")?.classList.toggle("old", before);
    if (tab === TAB && !before && remembered !== root.dataset.query) {
      remembered = root.dataset.query;
      page.remember();
    }
  });

  const chosen = () => one('.id-iv-choose[aria-pressed="true"]') ?? panel();

  page.overlays[TAB] = () => {
    const root = panel();
    if (!root || root.classList.contains("old") || one("#id-main").classList.contains("id-stale-edits")) return null;
    return { src: chosen().dataset.change, tag: "what the edit changed" };
  };

  page.clicks[TAB] = (x, y) => {
    if (x >= 0 && y >= 0 && x <= 1 && y <= 1) page.point?.(x, y, page.state.step);
  };

  page.addresses[TAB] = () => {
    const root = panel();
    return root && !root.classList.contains("old") ? root.dataset.query : null;
  };

  document.addEventListener("click", (event) => {
    const button = target(event).closest?.(".id-iv-choose");
    if (!button) return;
    for (const other of all(".id-iv-choose")) other.setAttribute("aria-pressed", String(other === button));
    page.apply();
  });
})();
