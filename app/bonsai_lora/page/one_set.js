// One set: its modules by layer, their spectra, what it merges into, and a form that applies it.

import { field, h, row, run, select, table } from "./dom.js";
import { download, get, send, setPath } from "./api.js";
import { age, bytes, count, percent, short } from "./format.js";
import { heatTable, lineChart } from "./charts.js";
import { curl, python, snippets } from "./snippets.js";
import { deleteSet } from "./sets.js";

const LAYER = /^(.*?\b(?:layers|blk|h|blocks)\.)(\d+)\.(.+)$/;
const METRICS = {
  delta_norm: "Norm of the delta",
  effective_rank: "Effective rank",
  rank: "Rank",
  param_count: "Parameters",
};
const MOST_CURVES = 12;
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];

export async function showSet(content, name, signal) {
  const [info, stats, found] = await Promise.all([
    get(setPath(name), {}, signal),
    get(setPath(name, "/stats"), {}, signal),
    get("v1/bases", {}, signal),
  ]);
  const modules = new Map(stats.modules.map((one) => [one.name, one]));
  const spectrum = spectrumSection(name, [...modules.keys()], signal);
  content.replaceChildren(
    h("h1", null, name),
    facts(info),
    actions(name),
    mapSection(stats.modules, spectrum.add),
    spectrum.section,
    mergeSection(info, found.bases.map((one) => one.name), signal),
    applySection(name, info.modules, signal),
  );
  const strongest = [...modules.values()].sort((a, b) => b.delta_norm - a.delta_norm)[0];
  if (strongest) await spectrum.add(strongest.name);
}

function facts(info) {
  const items = {
    "Base model": info.base_model_name || "not named",
    Modules: count(info.adapter_count),
    Parameters: count(info.total_trainable_params),
    "Size as float32": bytes(info.total_memory_bytes),
    Rank: `${info.config.rank}, alpha ${short(info.config.alpha)}`,
    Origin: info.origin,
    Version: count(info.version),
    Changed: h("time", { datetime: info.updated_at, title: info.updated_at }, `${age(info.updated_at)} ago`),
  };
  return h("dl", { class: "facts" }, Object.entries(items).map(([term, text]) => h("div", null, h("dt", null, term), h("dd", null, text))));
}

function actions(name) {
  const result = h("div", { class: "result" });
  const save = (text, rest, fileName) => {
    const button = h("button", { type: "button" }, text);
    button.addEventListener("click", () => run(button, result, () => download(setPath(name, rest), {}, fileName)));
    return button;
  };
  const remove = h("button", { type: "button", class: "danger" }, "Delete…");
  remove.addEventListener("click", () => run(remove, result, () => deleteSet(name)));
  return h(
    "div",
    null,
    h(
      "div",
      { class: "bar", role: "group", "aria-label": "Download and delete" },
      save("adapter_config.json", "/adapter_config.json", "adapter_config.json"),
      save("adapter_model.safetensors", "/adapter_model.safetensors", "adapter_model.safetensors"),
      save("GGUF for llama.cpp", "/adapter.gguf", `${name}.gguf`),
      remove,
    ),
    result,
    snippets(
      `Download ${name}`,
      curl("GET", setPath(name, "/adapter_model.safetensors"), ["-O"]),
      python(`tensors = client.get_adapter_tensors(${JSON.stringify(name)})`),
    ),
    snippets(
      `Delete ${name}`,
      curl("DELETE", setPath(name)),
      python(`client.delete_set(${JSON.stringify(name)})`),
    ),
  );
}

/** Return modules as `{layers, kinds, at(layer, kind), others}`. */
function byLayer(modules) {
  const cells = new Map();
  const layers = new Set();
  const kinds = new Set();
  const others = [];
  for (const one of modules) {
    const match = LAYER.exec(one.name);
    if (!match) {
      others.push(one);
      continue;
    }
    const layer = Number(match[2]);
    layers.add(layer);
    kinds.add(match[3]);
    cells.set(`${layer} ${match[3]}`, one);
  }
  return { layers: [...layers].sort((a, b) => a - b), kinds: [...kinds], at: (layer, kind) => cells.get(`${layer} ${kind}`), others };
}

function mapSection(modules, choose) {
  const { layers, kinds, at, others } = byLayer(modules);
  const place = h("div");
  const metric = select(Object.entries(METRICS), { onchange: () => draw() });
  const draw = () => {
    const text = METRICS[metric.value];
    const values = modules.map((one) => one[metric.value]);
    const [low, high] = [0, Math.max(0, ...values)];
    const map = heatTable(
      `${text} by layer`,
      layers,
      kinds,
      (layer, kind) => at(layer, kind)?.[metric.value] ?? null,
      { low, high, corner: "Layer", choose: (layer, kind) => choose(at(layer, kind).name) },
    );
    const heads = ["Module", text];
    const rest = others.map((one) => row(heads, [one.name, short(one[metric.value])]));
    place.replaceChildren(...(layers.length ? [map] : []), ...(rest.length ? [table("Modules outside of layers", heads, rest)] : []));
  };
  draw();
  const empty = modules.length === 0 && h("p", null, "The set has no modules yet.");
  return h("section", null, h("h2", null, "Modules"), empty || field("Show", metric), place);
}

function spectrumSection(name, modules, signal) {
  const chosen = new Map();
  const chart = h("div");
  const numbers = h("div");
  const note = h("p", { hidden: true }, "All singular values are zero: the deltas change nothing yet.");
  const result = h("div", { class: "result" });
  const module = select(modules);
  const heads = ["Module", "Rank", "Frobenius norm", "Largest value", "Stable rank", "Effective rank", "90 % of the energy", "99 %"];
  let lines = null;

  const draw = () => {
    lines ??= lineChart(chart, `Singular values of modules of ${name}, which the table below sums up`, {
      xLabel: "number of the singular value",
      steps: WHOLE,
      logarithmic: true,
    });
    const longest = Math.max(...[...chosen.values()].map((one) => one.singular_values.length));
    const x = Array.from({ length: longest }, (_, at) => at + 1);
    const largest = Math.max(...[...chosen.values()].map((one) => one.spectral_norm));
    // Values far below the largest are rounding errors, and would fill the logarithmic scale.
    const shown = (value) => (value > largest * 1e-9 ? value : null);
    note.hidden = largest > 0;
    chart.hidden = largest === 0;
    lines(x, [...chosen.values()].map((one) => ({ label: one.name, values: x.map((_, at) => shown(one.singular_values[at] ?? 0)) })));
    const rows = [...chosen.values()].map((one) =>
      row(heads, [one.name, count(one.rank), short(one.frobenius_norm), short(one.spectral_norm), short(one.stable_rank), short(one.effective_rank), count(one.energy_rank_90), count(one.energy_rank_99)]),
    );
    numbers.replaceChildren(table("Spectra", heads, rows));
  };
  const add = async (one) => {
    const found = await get(setPath(name, "/spectrum"), { module: one }, signal);
    for (const spectrum of found.modules) chosen.set(spectrum.name, spectrum);
    while (chosen.size > MOST_CURVES) chosen.delete(chosen.keys().next().value);
    draw();
  };
  const button = h("button", { type: "button", onclick: () => run(button, result, () => add(module.value)) }, "Add");
  const clear = h("button", { type: "button", onclick: () => { const last = [...chosen].at(-1); chosen.clear(); if (last) chosen.set(...last); if (last) draw(); } }, "Keep the last");
  const section = h(
    "section",
    null,
    h("h2", null, "Spectra"),
    h("p", null, "Singular values of each delta. Choose a module, or a cell of the map above."),
    modules.length > 0 && h("div", { class: "bar" }, field("Module", module), button, clear),
    result,
    note,
    chart,
    numbers,
    snippets("Get the spectra", curl("GET", setPath(name, "/spectrum")), python(`print(client.get_spectrum(${JSON.stringify(name)}))`)),
  );
  return { section, add };
}

function mergeSection(info, bases, signal) {
  const name = info.name;
  if (bases.length === 0) {
    return h("section", null, h("h2", null, "Merged models"), h("p", null, "The service knows no bases; start it with --bases."));
  }
  const base = select(bases);
  const own = info.base_model_name.split("/").at(-1);
  if (bases.includes(own)) base.value = own;
  const dtype = select(["BF16", "F16", "Q8_0", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0"]);
  const result = h("div", { class: "result" });
  const path = (kind) => `v1/bases/${encodeURIComponent(base.value)}/${kind}/${encodeURIComponent(name)}`;
  const check = h("button", { type: "button" }, "Show the files");
  check.addEventListener("click", () => run(check, result, async () => mergedFiles(await get(path("merged"), {}, signal), path("merged"), base.value, name)));
  const estimate = h("button", { type: "button" }, "Estimate what survives");
  estimate.addEventListener("click", () => run(estimate, result, async () => survival(await get(path("survival"), { dtype: dtype.value }, signal))));
  return h(
    "section",
    null,
    h("h2", null, "Merged models"),
    h("div", { class: "bar" }, field("Base", base), check, field("Stored as", dtype), estimate),
    result,
    snippets("List the merged files", curl("GET", path("merged")), python(`print(client.list_merged_files(${JSON.stringify(base.value)}, ${JSON.stringify(name)}))`)),
  );
}

function mergedFiles({ files }, path, base, name) {
  const heads = ["File", "Size", "Actions"];
  const rows = files.map((one) => {
    const place = h("span");
    const save = h("button", { type: "button", "aria-label": `Download ${one.name}` }, "Download");
    const below = one.name.split("/").map(encodeURIComponent).join("/");
    save.addEventListener("click", () => run(save, place, () => download(`${path}/${below}`, {}, one.name.split("/").at(-1))));
    return row(heads, [one.name, bytes(one.size_bytes), h("span", null, save, place)]);
  });
  return h("div", null, h("p", null, `The set merges into ${base}.`), table(`Files of the model merged into ${base}`, heads, rows), snippets(
    "Download the merged model",
    files.map((one) => curl("GET", `${path}/${one.name}`, ["-O"])).join("\n"),
    python(`print(client.pull(${JSON.stringify(`${base}/${name}`)}, "merged"))`),
  ));
}

function survival(found) {
  const heads = ["Tensor", "Unchanged entries", "Gain", "Relative error"];
  const cells = (one) => [percent(one.unchanged), short(one.gain), percent(one.relative_error)];
  const rows = [...found.modules].sort((a, b) => a.gain - b.gain).map((one) => row(heads, [one.name, ...cells(one)]));
  const meter = h("meter", { min: 0, max: 1, low: 0.5, high: 0.9, optimum: 1, value: found.gain, "aria-label": "Gain" });
  return h(
    "div",
    null,
    h("p", null, `Stored as ${found.dtype}: ${percent(found.gain)} of the deltas survive, `, meter, ` with a relative error of ${percent(found.relative_error)}; ${percent(found.unchanged)} of the weights stay as they are.`),
    found.skipped.length > 0 && h("p", null, `Not followed: ${found.skipped.join(", ")}.`),
    table("Tensors, the least surviving first", heads, rows),
  );
}

const FILLS = {
  ones: (size) => Array(size).fill(1),
  random: (size) => Array.from({ length: size }, () => Number((Math.random() * 2 - 1).toFixed(4))),
  "unit vector": (size) => [1, ...Array(size - 1).fill(0)],
};

function applySection(name, modules, signal) {
  const linear = modules.filter((one) => one.experts === null || one.experts === undefined);
  if (linear.length === 0) return h("section", null);
  const module = select(linear.map((one) => one.name));
  const vectors = h("textarea", { rows: 4, spellcheck: "false" });
  const result = h("div", { class: "result", "aria-live": "polite" });
  const shown = h("div");
  const size = () => linear.find((one) => one.name === module.value).d_in;
  const fill = (kind) => { vectors.value = JSON.stringify([FILLS[kind](size())]); };
  const path = () => setPath(name, `/adapters/${encodeURIComponent(module.value)}/apply`);
  const refresh = () => {
    fill("ones");
    const python_ = `x = np.ones((1, ${size()}), np.float32)`;
    shown.replaceChildren(snippets(
      "Apply",
      curl("POST", path(), ["-H", "Content-Type: application/json", "-d", `{"inputs": ${size() > 16 ? "[[…]]" : vectors.value}}`]),
      python("import numpy as np", python_, `print(client.apply(${JSON.stringify(name)}, ${JSON.stringify(module.value)}, x))`),
    ));
  };
  module.addEventListener("change", refresh);
  refresh();
  const button = h("button", { type: "submit", class: "primary" }, "Apply");
  const apply = async () => {
    let inputs;
    try {
      inputs = JSON.parse(vectors.value);
    } catch (error) {
      throw new Error(`The vectors are not JSON (${error.message}); write a list of lists of numbers.`);
    }
    const answer = await send("POST", path(), { json: { inputs }, signal });
    return outputs(await answer.json());
  };
  return h(
    "section",
    null,
    h("h2", null, "Apply"),
    h(
      "form",
      { onsubmit: (event) => { event.preventDefault(); run(button, result, apply); } },
      field("Module", module),
      field("Vectors, as a list of lists", vectors),
      h("div", { class: "bar", role: "group", "aria-label": "Fill the vectors" }, Object.keys(FILLS).map((kind) => h("button", { type: "button", onclick: () => fill(kind) }, kind)), button),
    ),
    result,
    shown,
  );
}

function outputs(answer) {
  const rows = Array.isArray(answer.outputs[0]) ? answer.outputs : [answer.outputs];
  const heads = ["Vector", "Norm", "Numbers"];
  return table(
    `Outputs of ${answer.module}, version ${answer.version}`,
    heads,
    rows.map((one, at) => {
      const first = one.slice(0, 64).map(short).join(" ");
      return row(heads, [String(at + 1), short(Math.hypot(...one)), `${first}${one.length > 64 ? ` … (${one.length} in all)` : ""}`]);
    }),
  );
}
