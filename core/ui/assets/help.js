// @ts-check
// Keys for the whole page, and a sheet that lists them.
(() => {
  "use strict";
  const page = window.idPage;
  const { one, all, target } = page;

  const KEYS = [
    ["/", "write a prompt"],
    ["1 to 4", "open a tab"],
    ["← →, Home, End", "walk along the words or the steps"],
    ["Tab to the picture, then arrows and Enter", "choose a place on it"],
    ["B, held", "see the original of an edited picture"],
    ["Shift and a click on a word", "compare it with the chosen word"],
    ["Escape", "close what is open"],
    ["?", "this list"],
  ];
  /** @type {HTMLDialogElement | null} */
  let sheet = null;

  function help() {
    if (!sheet) {
      sheet = document.createElement("dialog");
      sheet.className = "id-help";
      const list = document.createElement("dl");
      for (const [key, text] of KEYS) {
        list.append(Object.assign(document.createElement("dt"), { textContent: key }), Object.assign(document.createElement("dd"), { textContent: text }));
      }
      const close = Object.assign(document.createElement("button"), { type: "button", className: "id-button", textContent: "Close" });
      close.addEventListener("click", () => sheet.close());
      sheet.append(Object.assign(document.createElement("h2"), { textContent: "Keys" }), list, close);
      sheet.setAttribute("aria-label", "Keys");
      one(".gradio-container").append(sheet);
    }
    sheet.showModal();
  }

  document.addEventListener("click", (event) => {
    if (target(event).closest?.(".id-keys")) help();
  });

  document.addEventListener("keydown", (event) => {
    if (target(event).closest?.("input, textarea, select, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
    const tab = all('#id-right [role="tab"]')[Number(event.key) - 1];
    if (event.key === "?") help();
    else if (event.key === "/") one("#id-prompt textarea, #id-prompt input")?.focus();
    else if (tab) tab.click();
    else return;
    event.preventDefault();
  });
})();
