// The table of sets: a page at a time, found by the start of a name and by base.

import { announce, ask, field, h, row, run, table } from "./dom.js";
import { get, send, setPath } from "./api.js";
import { age, bytes, count } from "./format.js";
import { curl, python, snippets } from "./snippets.js";
import { uploadForm } from "./upload.js";

const PAGE = 50;
const HEADS = ["Name", "Base model", "Modules", "Parameters", "Size", "Rank", "Origin", "Version", "Changed", "Actions"];

/** Sets that are marked for a comparison; they stay marked on other pages of the table. */
const marked = new Set();

export async function showSets(content, query, signal) {
  const prefix = query.get("prefix") ?? "";
  const baseModel = query.get("base") ?? "";
  const cursors = query.getAll("cursor");
  const wanted = { prefix, base_model_name: baseModel, cursor: cursors.at(-1), limit: PAGE };
  const place = h("div");
  const refresh = async () => {
    const page = await get("v1/sets", wanted, signal);
    place.replaceChildren(
      // Of a bucket, the list may be older than the sets.
      page.as_of ? h("p", null, `The list is from ${page.as_of}.`) : "",
      page.sets.length ? setTable(page.sets) : h("p", null, nothing(prefix, baseModel)),
      pager(query, cursors, page.next_cursor),
    );
  };
  await refresh();
  content.replaceChildren(
    h("h1", null, "Sets"),
    filterForm(prefix, baseModel),
    place,
    uploadForm(refresh),
    snippets(
      "List sets",
      curl("GET", `v1/sets?prefix=${encodeURIComponent(prefix)}`),
      python(`for one in client.list_sets(prefix=${JSON.stringify(prefix)}):`, "    print(one)"),
    ),
  );
}

function nothing(prefix, baseModel) {
  if (!prefix && !baseModel) return "There are no sets yet. Upload an adapter below.";
  return "No set matches the filter.";
}

function filterForm(prefix, baseModel) {
  const name = h("input", { type: "search", value: prefix, maxlength: 96, autocomplete: "off" });
  const base = h("input", { type: "search", value: baseModel, autocomplete: "off" });
  const apply = (event) => {
    event.preventDefault();
    const query = new URLSearchParams();
    if (name.value) query.set("prefix", name.value);
    if (base.value) query.set("base", base.value);
    location.hash = `#/sets?${query}`;
  };
  return h(
    "form",
    { class: "bar", role: "search", "aria-label": "Filter sets", onsubmit: apply },
    field("Name begins with", name),
    field("Base model is", base),
    h("button", { type: "submit" }, "Filter"),
  );
}

function setTable(sets) {
  const compare = h("a", { class: "button" });
  const update = () => {
    compare.textContent = `Compare ${marked.size} marked`;
    compare.hidden = marked.size < 2;
    compare.href = `#/compare?${[...marked].map((name) => `set=${encodeURIComponent(name)}`).join("&")}`;
  };
  update();
  const rows = sets.map((one) => setRow(one, update));
  return h("div", null, table("Sets by name", ["Compare", ...HEADS], rows, { class: "sets" }), compare);
}

function setRow(one, update) {
  const mark = h("input", { type: "checkbox", "aria-label": `Mark ${one.name}` });
  mark.checked = marked.has(one.name);
  mark.addEventListener("change", () => {
    marked[mark.checked ? "add" : "delete"](one.name);
    update();
  });
  const remove = h("button", { type: "button", class: "danger", "aria-label": `Delete ${one.name}` }, "Delete");
  const place = h("span");
  remove.addEventListener("click", () => run(remove, place, () => deleteSet(one.name)));
  const cells = row(HEADS, [
    h("a", { href: `#/sets/${encodeURIComponent(one.name)}` }, one.name),
    one.base_model_name,
    count(one.adapter_count),
    count(one.total_trainable_params),
    bytes(one.total_memory_bytes),
    count(one.rank),
    one.origin,
    count(one.version),
    h("time", { datetime: one.updated_at, title: one.updated_at }, `${age(one.updated_at)} ago`),
    h("span", null, remove, place),
  ]);
  cells.prepend(h("td", { "data-label": "Compare" }, mark));
  return cells;
}

/** Delete a set after a question, as it was when the question was asked. */
export async function deleteSet(name) {
  const response = await send("GET", setPath(name));
  const { version, adapter_count: modules } = await response.json();
  const question = `Delete ${name}, version ${version} with ${modules} modules? This cannot be undone.`;
  if (!(await ask(question, "Delete"))) return;
  await send("DELETE", setPath(name), { headers: { "If-Match": response.headers.get("ETag") } });
  marked.delete(name);
  if (location.hash.startsWith("#/sets/")) location.hash = "#/sets";
  else globalThis.dispatchEvent(new HashChangeEvent("hashchange"));
  setTimeout(() => announce(`${name} is deleted`), 300);
}

function pager(query, cursors, next) {
  const link = (text, list) => {
    const changed = new URLSearchParams(query);
    changed.delete("cursor");
    for (const one of list) changed.append("cursor", one);
    return h("a", { class: "button", href: `#/sets?${changed}` }, text);
  };
  return h(
    "nav",
    { class: "bar", "aria-label": "Pages of the table" },
    cursors.length > 0 && link("Previous page", cursors.slice(0, -1)),
    next && link("Next page", [...cursors, next]),
  );
}

