// Read Prometheus's text format, and what happened between two scrapes.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/** Routes that this page calls by itself, every two seconds. */
const OWN = new Set(["/metrics", "/v1/stats", "/v1/jobs", "/readyz"]);

/** Return the samples of a scrape by metric, as `{labels, value}`. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = LINE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\[n"\\]/g, (one) => ESCAPES[one]);
    }
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: Number(match[3]) });
  }
  return found;
}

/** Return sums of a metric's samples by the value of `key(labels)`; a null key leaves one out. */
export function sums(scrape, metric, key) {
  const found = new Map();
  for (const { labels, value } of scrape.get(metric) ?? []) {
    const name = key(labels);
    if (name !== null) found.set(name, (found.get(name) ?? 0) + value);
  }
  return found;
}

/** Return by how much each sum has grown; counters that began again count from zero. */
function growth(before, now) {
  const found = new Map();
  for (const [name, value] of now) {
    const was = before.get(name) ?? 0;
    found.set(name, value >= was ? value - was : value);
  }
  return found;
}

const byRoute = (labels) => (OWN.has(labels.route) || labels.route === "/page/{path:path}" ? null : labels.route);

/** Return requests, and latencies by route, between two scrapes `seconds` apart. */
export function between(before, now, seconds) {
  const bucket = (labels) => (byRoute(labels) === null ? null : `${labels.le} ${labels.route}`);
  const metric = "bonsai_lora_request_seconds_bucket";
  const buckets = growth(sums(before, metric, bucket), sums(now, metric, bucket));
  const all = new Map();
  const routes = new Map();
  for (const [name, number] of buckets) {
    const [le, ...route] = name.split(" ");
    all.set(le, (all.get(le) ?? 0) + number);
    const own = routes.get(route.join(" ")) ?? new Map();
    routes.set(route.join(" "), own.set(le, number));
  }
  const requests = growth(sums(before, "bonsai_lora_requests_total", byRoute), sums(now, "bonsai_lora_requests_total", byRoute));
  return {
    rate: [...requests.values()].reduce((a, b) => a + b, 0) / seconds,
    p50: quantile(all, 0.5),
    p99: quantile(all, 0.99),
    routes: [...requests].map(([route, number]) => ({
      route,
      rate: number / seconds,
      p50: quantile(routes.get(route) ?? new Map(), 0.5),
      p99: quantile(routes.get(route) ?? new Map(), 0.99),
    })),
  };
}

/** Return a quantile of a cumulative histogram, interpolated in its bucket; null if it is empty. */
export function quantile(buckets, share) {
  const steps = [...buckets].map(([le, number]) => [le === "+Inf" ? Infinity : Number(le), number]).sort((a, b) => a[0] - b[0]);
  const total = steps.at(-1)?.[1] ?? 0;
  if (total === 0) return null;
  let [start, below] = [0, 0];
  for (const [end, number] of steps) {
    if (number >= share * total) {
      if (end === Infinity) return start;
      return start + ((end - start) * (share * total - below)) / Math.max(number - below, 1e-12);
    }
    [start, below] = [end, number];
  }
  return start;
}
