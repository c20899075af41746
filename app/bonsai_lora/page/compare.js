// Compare sets by their deltas, and combine them.

import { announce, field, h, row, run, select, table } from "./dom.js";
import { get, openapi, send } from "./api.js";
import { count, percent, short } from "./format.js";
import { heatTable } from "./charts.js";
import { curl, python, snippets } from "./snippets.js";

const OPTIONS = ["rank", "energy", "density", "gamma", "epsilon", "seed"];
const MOST_MODULES = 200;

export async function showCompare(content, query, signal) {
  const names = query.getAll("set");
  const parts = [h("h1", null, "Compare"), chooser(names)];
  if (names.length >= 2) {
    const [found, document_] = await Promise.all([get("v1/compare", { set: names }, signal), openapi()]);
    parts.push(...comparison(found), combineForm(names, document_.components.schemas.CombineSets.properties.method.enum));
  }
  content.replaceChildren(...parts);
}

function chooser(names) {
  const input = h("input", { value: names.join(" "), required: true, autocomplete: "off", spellcheck: "false" });
  return h(
    "form",
    {
      class: "bar",
      onsubmit: (event) => {
        event.preventDefault();
        const chosen = input.value.split(/[\s,]+/).filter(Boolean);
        location.hash = `#/compare?${chosen.map((name) => `set=${encodeURIComponent(name)}`).join("&")}`;
      },
    },
    field("Sets", input, "Two or more names, or mark them in the table of sets."),
    h("button", { type: "submit", class: "primary" }, "Compare"),
  );
}

function comparison(found) {
  const at = new Map(found.sets.map((name, index) => [name, index]));
  const matrix = heatTable(
    "Cosine of the deltas",
    found.sets,
    found.sets,
    (one, other) => found.cosine[at.get(one)][at.get(other)],
    { low: 0, high: 1, corner: "Set" },
  );
  const heads = ["Module", ...found.sets.map((name) => `Norm of ${name}`), "Interference", "Overlap of the subspaces"];
  const modules = [...found.modules].sort((a, b) => Math.max(...b.norms) - Math.max(...a.norms));
  const rows = modules.slice(0, MOST_MODULES).map((one) =>
    row(heads, [one.name, ...one.norms.map(short), short(one.interference), short(one.subspace_similarity)]),
  );
  const more = modules.length > MOST_MODULES ? `, the largest ${MOST_MODULES} of ${modules.length}` : "";
  return [
    h("p", null, `Interference: ${short(found.interference)}. It is 0 if all deltas point one way, and near 1 if they cancel. Norms: ${found.sets.map((name, index) => `${name} ${short(found.norms[index])}`).join(", ")}.`),
    matrix,
    h("section", null, h("h2", null, "Modules"), table(`Modules by norm${more}`, heads, rows)),
    snippets("Compare", curl("GET", `v1/compare?${found.sets.map((name) => `set=${name}`).join("&")}`), python(`print(client.compare(${JSON.stringify(found.sets)}))`)),
  ];
}

function combineForm(names, methods) {
  const name = h("input", { required: true, maxlength: 96, value: "combined", autocomplete: "off" });
  const method = select(methods);
  const weights = names.map((one) => h("input", { type: "number", step: "any", value: 1, "data-set": one, required: true }));
  const options = OPTIONS.map((one) => h("input", { type: "number", step: "any", "data-option": one }));
  const sign = select([["", "default"], "total", "frequency"]);
  const result = h("div", { class: "result" });
  const shown = h("div");

  const body = () => {
    const made = {
      name: name.value,
      method: method.value,
      sets: weights.map((input) => ({ set: input.dataset.set, weight: Number(input.value) })),
    };
    for (const input of options) if (input.value !== "") made[input.dataset.option] = Number(input.value);
    if (sign.value) made.sign = sign.value;
    return made;
  };
  const combine = (dry) => async () => {
    const sent = body();
    shown.replaceChildren(combineSnippets(sent));
    const answer = await (await send("POST", "v1/combine", { json: sent, query: dry ? { dry_run: true } : {} })).json();
    if (!dry) announce(`${answer.name} is made`);
    return dry ? report(answer, h("p", null, "Dry run: nothing is stored.")) : report(answer.report, made(answer));
  };
  const dry = h("button", { type: "button" }, "Dry run");
  const make = h("button", { type: "submit", class: "primary" }, "Combine");
  const form = h(
    "form",
    { onsubmit: (event) => { event.preventDefault(); run(make, result, combine(false)); } },
    h("div", { class: "bar" }, field("Name of the new set", name), field("Method", method)),
    h("fieldset", { class: "bar" }, h("legend", null, "Weights"), weights.map((input) => field(input.dataset.set, input))),
    h("fieldset", { class: "bar" }, h("legend", null, "Options, where the method takes them"), options.map((input) => field(input.dataset.option, input)), field("sign", sign)),
    h("div", { class: "bar" }, dry, make),
  );
  dry.addEventListener("click", () => form.reportValidity() && run(dry, result, combine(true)));
  return h("section", null, h("h2", null, "Combine"), form, result, shown);
}

function made(set) {
  return h("p", null, "Made ", h("a", { href: `#/sets/${encodeURIComponent(set.name)}` }, set.name), `: ${count(set.adapter_count)} modules, ${count(set.total_trainable_params)} parameters.`);
}

function report(found, first) {
  const heads = ["Module", "Rank", "Energy kept", "Relative error"];
  const rows = found.modules.slice(0, MOST_MODULES).map((one) => row(heads, [one.name, count(one.rank), percent(one.energy_kept), percent(one.relative_error)]));
  return h(
    "div",
    { class: "report" },
    first,
    h("p", null, `Method ${found.method}: rank up to ${found.rank}, ${percent(found.energy_kept)} of the energy kept, relative error ${percent(found.relative_error)}.`),
    found.warnings.length > 0 && h("ul", { class: "warnings" }, found.warnings.map((one) => h("li", null, one))),
    table("Modules of the combination", heads, rows),
  );
}

function combineSnippets(sent) {
  const { name, sets, ...options } = sent;
  const weights = Object.fromEntries(sets.map((one) => [one.set, one.weight]));
  const words = Object.entries(options).map(([option, value]) => `${option}=${JSON.stringify(value)}`);
  return snippets(
    "Combine",
    curl("POST", "v1/combine", ["-H", "Content-Type: application/json", "-d", JSON.stringify(sent)]),
    python(`print(client.combine(${[JSON.stringify(name), JSON.stringify(weights), ...words].join(", ")}))`),
  );
}
