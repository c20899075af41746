// Call the service that this page came from. The key stays in this tab's session storage.

const KEY = "bonsai-lora-key";

export const base = new URL(".", document.baseURI);

export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail ?? problem.error ?? `the service answered with status ${status}`);
    this.status = status;
    this.code = problem.code;
    this.requestId = problem.request_id;
  }
}

export function key() {
  return sessionStorage.getItem(KEY);
}

export function setKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}

export function authorization() {
  return key() ? { Authorization: `Bearer ${key()}` } : {};
}

/** Return the address of a path such as `v1/sets`; query values may be lists, empty ones are left out. */
export function address(path, query = {}) {
  const url = new URL(path, base);
  for (const [name, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") url.searchParams.append(name, one);
    }
  }
  return url;
}

/** Return the address of a set, or of something below it. */
export function setPath(name, rest = "") {
  return `v1/sets/${encodeURIComponent(name)}${rest}`;
}

/** Send a request and return the response; throws ApiError for a refusal. */
export async function send(method, path, { query, json, headers, signal } = {}) {
  const response = await fetch(address(path, query), {
    method,
    signal,
    cache: "no-store",
    headers: {
      ...authorization(),
      ...(json === undefined ? {} : { "Content-Type": "application/json" }),
      ...headers,
    },
    body: json === undefined ? undefined : JSON.stringify(json),
  });
  if (!response.ok) throw await refusal(response.status, await response.text());
  return response;
}

export async function get(path, query, signal) {
  return (await send("GET", path, { query, signal })).json();
}

/** Return the error of a refused request; ask for a key if that is what was missing. */
export function refusal(status, text) {
  let problem = {};
  try {
    problem = JSON.parse(text);
  } catch {
    // not from the service itself, but from a proxy before it
  }
  if (status === 401) document.dispatchEvent(new CustomEvent("needs-key"));
  return new ApiError(status, problem);
}

/** Upload a form with progress, which fetch does not report. */
export function upload(path, form, headers, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", address(path));
    for (const [name, value] of Object.entries({ ...authorization(), ...headers })) {
      request.setRequestHeader(name, value);
    }
    request.upload.addEventListener("progress", (event) => progress(event.loaded, event.total));
    request.addEventListener("error", () => reject(new Error("the connection was lost; try again")));
    request.addEventListener("load", () => {
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(refusal(request.status, request.responseText));
    });
    request.send(form);
  });
}

/** Save a file. With a key, which a link cannot carry, the file is fetched into memory first. */
export async function download(path, query, fileName) {
  const link = document.createElement("a");
  link.download = fileName;
  if (!key()) {
    link.href = address(path, query);
    link.click();
    return;
  }
  const blob = await (await send("GET", path, { query })).blob();
  link.href = URL.createObjectURL(blob);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

let description = null;

/** Return the OpenAPI document, fetched once. */
export async function openapi() {
  description ??= get("openapi.json");
  return description;
}
