// The page: which view the address names, and the key.

import { announce, failure, field, h } from "./dom.js";
import { key, setKey } from "./api.js";
import { showSets } from "./sets.js";
import { showSet } from "./one_set.js";
import { showCompare } from "./compare.js";
import { showService } from "./service.js";

const main = document.getElementById("main");
const keyButton = document.getElementById("key");

let leaving = new AbortController();

/** Return the parts of the address after `#/`, decoded, and its query. */
function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { parts: path.split("/").filter(Boolean).map(decodeURIComponent), query: new URLSearchParams(query) };
}

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const { parts, query } = place();
  const [view = "sets", name] = parts;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#/${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const content = h("div", { class: "view" }, h("p", { class: "loading" }, "Loading…"));
  main.replaceChildren(content);
  announce("");
  try {
    if (view === "compare") await showCompare(content, query, signal);
    else if (view === "service") await showService(content, signal);
    else if (name) await showSet(content, name, signal);
    else await showSets(content, query, signal);
  } catch (error) {
    if (signal.aborted) return;
    content.replaceChildren(h("h1", null, "Something went wrong"), failure(error));
  }
  const heading = content.querySelector("h1");
  document.title = heading ? `${heading.textContent} · Bonsai LoRA` : "Bonsai LoRA";
}

function showKey() {
  keyButton.textContent = key() ? "Key ✓" : "Key…";
}

/** Ask for the key, which is kept for this tab only. */
function askForKey() {
  if (document.querySelector("dialog[open]")) return;
  const input = h("input", { type: "password", autocomplete: "off", spellcheck: "false", autofocus: true });
  const close = (action) => () => {
    if (action === "use") setKey(input.value.trim());
    if (action === "forget") setKey("");
    dialog.close(action);
  };
  const dialog = h(
    "dialog",
    { "aria-label": "Key" },
    h(
      "form",
      { method: "dialog", onsubmit: close("use") },
      field("Key", input, "It is kept until this tab is closed, and sent to this service only."),
      h(
        "p",
        { class: "actions" },
        h("button", { type: "button", onclick: close("cancel") }, "Cancel"),
        key() && h("button", { type: "button", onclick: close("forget") }, "Forget the key"),
        h("button", { type: "submit", class: "primary" }, "Use this key"),
      ),
    ),
  );
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (dialog.returnValue === "cancel" || dialog.returnValue === "") return;
    showKey();
    show();
  });
  document.body.append(dialog);
  dialog.showModal();
}

keyButton.addEventListener("click", askForKey);
document.addEventListener("needs-key", askForKey);
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address after # names the view
  main.focus();
});
globalThis.addEventListener("hashchange", () => {
  show();
  main.focus({ preventScroll: false });
});
showKey();
show();
