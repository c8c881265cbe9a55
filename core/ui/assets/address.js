// @ts-check
// The page's address: what is shown, or being drawn, so that a reload or a copied address loses nothing.
(() => {
  "use strict";
  const page = window.idPage;
  const { one } = page;

  /** @type {string | null} */
  let asked = null; // the query of the image that is being drawn
  let undone = false; // whether the last image that was asked for was never drawn

  // The address always restores what is shown, or what is being drawn, so that a reload or a copied address loses nothing.
  page.address = () => {
    const whole = asked ?? page.addresses[page.openTab()]?.();
    const shown = whole ?? one(".id-panel:not(.empty)")?.dataset.query;
    if (!shown) return null;
    const parameters = new URLSearchParams(shown);
    const word = whole ? null : page.chosenWord();
    if (word) parameters.set("word", word);
    if (page.openTab() !== "Attribution") parameters.set("tab", page.openTab().toLowerCase());
    const more = asked ? {} : page.parameters[page.openTab()]?.() ?? {};
    for (const [name, value] of Object.entries(more)) parameters.set(name, String(value));
    for (const [name, value] of new URLSearchParams(location.search)) if (name.startsWith("__")) parameters.set(name, value);
    return `${location.origin}${location.pathname}?${parameters}`;
  };

  // Which image an address is about.
  /** @param {string} url */
  function imageOf(url) {
    const parameters = new URL(url).searchParams;
    return ["prompt", "seed", "steps", "guidance"].map((name) => parameters.get(name)).join("\n");
  }

  // Another image is another entry of the browser's history, so that Back returns to the one before.
  page.remember = () => {
    const url = page.address();
    if (!url || url === location.href) return;
    const other = imageOf(url) !== imageOf(location.href) && !undone;
    undone = false;
    if (other) history.pushState(null, "", url);
    else history.replaceState(null, "", url);
  };

  page.changes.push(() => {
    const status = one(".id-status");
    const next = status?.dataset.asked || (one(".id-bar i", status ?? document) ? asked : null);
    if (next === asked) return;
    undone = Boolean(asked && !next && !(one(".id-panel:not(.empty)")?.dataset.query ?? "").startsWith(asked));
    asked = next;
    page.remember();
  });
  window.addEventListener("popstate", () => location.reload());
})();
