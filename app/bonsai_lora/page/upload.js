// Upload an adapter: a PEFT or MLX folder, or a GGUF LoRA, dropped or chosen.

import { announce, ask, field, h, run, table, row } from "./dom.js";
import { get, send, setPath, upload } from "./api.js";
import { bytes, count, short } from "./format.js";
import { curl, python, snippets } from "./snippets.js";

const PARTS = {
  "adapter_config.json": "adapter_config",
  "adapter_model.safetensors": "adapter_model",
  "adapters.safetensors": "adapter_model",
};

/** Return the files of a drop, those of folders included, as `{path, file}`. */
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (entries.length === 0) return [...transfer.files].map((file) => ({ path: file.name, file }));
  const found = [];
  for (const entry of entries) found.push(...(await filesBelow(entry)));
  return found;
}

async function filesBelow(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ path: entry.fullPath.replace(/^\//, ""), file }];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) return found;
    for (const one of some.filter((child) => child.isFile)) found.push(...(await filesBelow(one)));
  }
}

/** Return the parts of an upload, and a name for it; throws an error that says what is missing. */
function partsOf(files) {
  const gguf = files.find(({ file }) => file.name.endsWith(".gguf"));
  if (gguf) return { parts: { adapter_gguf: gguf.file }, name: named(gguf.file.name.replace(/\.gguf$/, "")) };
  const parts = {};
  let name = "";
  for (const { path, file } of files) {
    const part = PARTS[file.name];
    if (!part) continue;
    if (parts[part]) throw new Error(`There are two files for ${part}; drop the folder of one adapter.`);
    parts[part] = file;
    name ||= named(path.split("/").at(-2) ?? "");
  }
  const missing = ["adapter_config", "adapter_model"].filter((part) => !parts[part]);
  if (missing.length === 0) return { parts, name };
  throw new Error(
    `${missing.join(" and ")} is missing; drop a folder with adapter_config.json and ` +
      "adapter_model.safetensors (PEFT) or adapters.safetensors (MLX), or one .gguf file.",
  );
}

/** Return `text` as the name of a set. */
function named(text) {
  return text.replaceAll(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 96);
}

/** Return the form; `uploaded` is called when there is a new set or version. */
export function uploadForm(uploaded) {
  const name = h("input", { required: true, maxlength: 96, autocomplete: "off", pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*" });
  const chosen = h("p", { class: "chosen" }, "Nothing is chosen yet.");
  const send = h("button", { type: "submit", class: "primary", disabled: true }, "Upload");
  const result = h("div", { class: "result" });
  let parts = null;

  const choose = (files) => {
    result.replaceChildren();
    const found = partsOf(files);
    parts = found.parts;
    name.value ||= found.name;
    const listed = Object.values(parts).map((file) => `${file.name} (${bytes(file.size)})`);
    chosen.textContent = `Chosen: ${listed.sort().join(", ")}`;
    send.disabled = false;
  };
  const take = (files) => run(send, result, async () => choose(await files)).then(() => (send.disabled = !parts));
  const listed = (input) => [...input.files].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
  const folder = h("input", { type: "file", webkitdirectory: true, onchange: (event) => take(listed(event.target)) });
  const files = h("input", { type: "file", multiple: true, onchange: (event) => take(listed(event.target)) });

  const drop = h(
    "div",
    {
      class: "drop",
      ondragover: (event) => event.preventDefault(),
      ondrop: (event) => {
        event.preventDefault();
        take(droppedFiles(event.dataTransfer));
      },
    },
    h("p", null, "Drop the folder of an adapter here, or choose"),
    field("a folder", folder),
    field("or files", files),
    chosen,
  );
  return h(
    "section",
    { "aria-labelledby": "upload" },
    h("h2", { id: "upload" }, "Upload"),
    h(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          run(send, result, () => uploadSet(name.value, parts, result, uploaded));
        },
      },
      drop,
      field("Name of the set", name),
      send,
    ),
    result,
    snippets(
      "Upload a folder",
      curl("PUT", "v1/sets/NAME", ["-F", "adapter_config=@adapter_config.json", "-F", "adapter_model=@adapter_model.safetensors"]),
      python('print(client.upload_set("NAME", "folder"))'),
    ),
  );
}

/** Upload the parts after a question if the set exists; return the report. */
async function uploadSet(name, parts, result, uploaded) {
  const [present] = (await get("v1/sets", { prefix: name, limit: 1 })).sets;
  let condition = { "If-None-Match": "*" };
  if (present?.name === name) {
    const question = `${name} exists in version ${present.version}. Replace it?`;
    if (!(await ask(question, "Replace"))) return undefined;
    condition = { "If-Match": (await send("HEAD", setPath(name))).headers.get("ETag") };
  }
  const form = new FormData();
  for (const [part, file] of Object.entries(parts)) form.append(part, file);
  const bar = h("progress", { max: 1, value: 0, "aria-label": `Upload of ${name}` });
  result.replaceChildren(bar);
  const report = await upload(setPath(name), form, condition, (loaded, total) => {
    bar.value = loaded / total;
  });
  announce(`${name} is uploaded as version ${report.version}`);
  await uploaded();
  return reportOf(report);
}

function reportOf(report) {
  const notes = [...report.warnings, ...report.ignored_keys.map((key) => `ignored, by design: ${key}`)];
  const heads = ["Module", "Inputs", "Outputs", "Rank", "Scaling", "Norm of the delta"];
  const rows = report.modules.slice(0, 500).map((one) =>
    row(heads, [one.name, count(one.d_in), count(one.d_out), count(one.rank), short(one.scaling), short(one.delta_norm)]),
  );
  return h(
    "div",
    { class: "report" },
    h(
      "p",
      null,
      "Uploaded ",
      h("a", { href: `#/sets/${encodeURIComponent(report.name)}` }, report.name),
      `, version ${report.version}: ${count(report.adapter_count)} modules, ${count(report.total_trainable_params)} parameters.`,
    ),
    notes.length > 0 && h("ul", { class: "warnings" }, notes.map((note) => h("li", null, note))),
    table(`Modules of ${report.name}`, heads, rows),
  );
}
