// @ts-check
// What outlives a reload, and whether the server still answers.
(() => {
  "use strict";
  const page = window.idPage;
  const { one, target, query } = page;

  // What was typed outlives a reload, and a restart of the server, after which Gradio reloads the page.
  /** @type {Record<string, string>} */
  const FIELDS = { prompt: "#id-prompt textarea, #id-prompt input", seed: "#id-seed input", steps: "#id-steps input", guidance: "#id-guidance input" };
  /** @returns {Record<string, string>} */
  function stored() {
    try {
      return JSON.parse(sessionStorage.getItem("id-typed") ?? "{}");
    } catch { // not allowed, as in a frame of another site
      return {};
    }
  }
  const typed = query.has("prompt") ? {} : stored();
  document.addEventListener("input", (event) => {
    const name = Object.keys(FIELDS).find((key) => target(event).matches?.(FIELDS[key]));
    if (!name) return;
    delete typed[name];
    try {
      sessionStorage.setItem("id-typed", JSON.stringify({ ...stored(), [name]: target(event).value }));
    } catch { /* not allowed */ }
  });
  page.changes.push(() => {
    for (const [name, value] of Object.entries(typed)) {
      const field = one(FIELDS[name]);
      if (!field || !field.value || !one(".id-badge")) continue; // not set up yet
      delete typed[name];
      if (field.value !== value) page.type(field, value);
    }
  });

  // The server's heartbeat: where it does not answer, the badge says so instead of "ready".
  let alive = true;
  setInterval(async () => {
    if (document.hidden) return;
    let answers = false;
    try {
      answers = (await fetch("gradio_api/app_id", { cache: "no-store" })).ok;
    } catch { /* not connected */ }
    if (answers !== alive) document.body.classList.toggle("id-offline", !answers);
    alive = answers;
  }, 5000);
})();
