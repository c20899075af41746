// Build elements. All text goes through text nodes: names of sets are anybody's text.

const SHOWN_MILLISECONDS = 8000;

let forgetting = 0;

/** Return a new element. Properties that start with "on" are listeners, null ones are left out. */
export function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Return a labelled form field. */
export function field(label, input, hint) {
  return h("label", { class: "field" }, h("span", null, label), input, hint && h("small", null, hint));
}

export function select(options, properties) {
  return h(
    "select",
    properties,
    options.map((option) => {
      const [value, text] = Array.isArray(option) ? option : [option, option];
      return h("option", { value }, text);
    }),
  );
}

/** Return a table in a region of its own, which the keyboard scrolls. */
export function table(caption, heads, rows, properties) {
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h(
      "table",
      properties,
      h("caption", null, caption),
      h("thead", null, h("tr", null, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", null, rows),
    ),
  );
}

/** Return a table row whose first cell names it; labels name the cells on narrow screens. */
export function row(heads, cells) {
  return h(
    "tr",
    null,
    cells.map((cell, at) =>
      at === 0
        ? h("th", { scope: "row" }, cell)
        : h("td", { "data-label": heads[at], class: cell instanceof Node ? null : "value" }, cell),
    ),
  );
}

/** Tell screen readers, and everybody else, what has happened. */
export function announce(text) {
  const status = document.getElementById("status");
  status.textContent = text;
  clearTimeout(forgetting);
  forgetting = setTimeout(() => { status.textContent = ""; }, SHOWN_MILLISECONDS);
}

/** Show what went wrong in place of a result. */
export function failure(error) {
  const id = error.requestId ? ` (request ${error.requestId})` : "";
  return h("p", { class: "failure", role: "alert" }, `${error.message}${id}`);
}

/** Run an action of a button, which is off meanwhile; show its result or error in `place`. */
export async function run(button, place, action) {
  button.disabled = true;
  place.setAttribute("aria-busy", "true");
  try {
    const made = await action();
    if (made !== undefined) place.replaceChildren(made);
  } catch (error) {
    if (error.name !== "AbortError") place.replaceChildren(failure(error));
  } finally {
    button.disabled = false;
    place.removeAttribute("aria-busy");
  }
}

/** Ask a question in a dialog; return whether the answer was `yes`. */
export function ask(question, yes) {
  return new Promise((resolve) => {
    const no = h("button", { type: "button", autofocus: true, onclick: () => dialog.close("no") }, "Cancel");
    const confirm = h("button", { type: "button", class: "danger", onclick: () => dialog.close("yes") }, yes);
    const dialog = h("dialog", { "aria-label": question }, h("p", null, question), h("p", { class: "actions" }, no, confirm));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
