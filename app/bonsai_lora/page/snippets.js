// The same action as a command and in Python, to copy.

import { announce, h } from "./dom.js";
import { base, key } from "./api.js";

const url = base.href.replace(/\/$/, "");

/** Return what one can type in a shell for `text`: quoted unless it is plain. */
function quoted(text) {
  return /^[\w./:=?&%+-]+$/.test(text) && !text.includes("&") && !text.includes("?")
    ? text
    : `'${text.replaceAll("'", String.raw`'\''`)}'`;
}

/** Return a curl command. `options` are further words, which are quoted as needed. */
export function curl(method, path, options = []) {
  const words = ["curl", "-sf"];
  if (method !== "GET") words.push("-X", method);
  if (key()) words.push("-H", '"Authorization: Bearer $BONSAI_LORA_TOKEN"');
  return [...words, ...options.map(quoted), quoted(`${url}/${path}`)].join(" ");
}

/** Return a Python program of lines that use `client`. */
export function python(...lines) {
  const token = key() ? "  # the key is in BONSAI_LORA_TOKEN" : "";
  return [
    "from bonsai_lora import Client",
    "",
    `with Client(${JSON.stringify(url)}) as client:${token}`,
    ...lines.map((line) => `    ${line}`),
  ].join("\n");
}

function copyable(title, text) {
  const copy = h("button", { type: "button", "aria-label": `Copy ${title}` }, "Copy");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    announce(`${title} is copied`);
  });
  return h("div", { class: "snippet" }, h("p", null, title, copy), h("pre", { tabindex: 0 }, text));
}

/** Return a closed element with the commands for an action. */
export function snippets(action, curlText, pythonText) {
  return h(
    "details",
    { class: "snippets" },
    h("summary", null, `${action} with curl or Python`),
    copyable(`curl: ${action}`, curlText),
    copyable(`Python: ${action}`, pythonText),
  );
}
