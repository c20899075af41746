// The service, live: what it does, what it holds, what it refuses, and its jobs.

import { failure, h, row, run, table } from "./dom.js";
import { get, openapi, send } from "./api.js";
import { bytes, count, percent, seconds, short } from "./format.js";
import { lineChart } from "./charts.js";
import { between, parse, sums } from "./metrics.js";
import { curl, python, snippets } from "./snippets.js";

const PERIOD = 2000;
const KEPT = 300;

export async function showService(content, signal) {
  const place = { totals: h("div"), traffic: h("div"), load: h("div"), jobs: h("div"), problem: h("div") };
  const chart = { rate: h("div"), latency: h("div") };
  content.replaceChildren(
    h("h1", null, "Service"),
    place.problem,
    place.totals,
    h("section", null, h("h2", null, "Requests per second"), chart.rate),
    h("section", null, h("h2", null, "Latency"), chart.latency),
    place.traffic,
    place.load,
    place.jobs,
    snippets("Read the figures", curl("GET", "v1/stats"), python("print(client.get_stats())")),
  );
  const live = new Live(place, chart, "/v1/jobs" in (await openapi()).paths, signal);
  await live.update();
  const timer = setInterval(() => document.hidden || live.update(), PERIOD);
  signal.addEventListener("abort", () => clearInterval(timer));
}

class Live {
  constructor(place, chart, hasJobs, signal) {
    Object.assign(this, { place, hasJobs, signal, points: [], before: null, mayScrape: true, isBusy: false });
    this.drawRate = lineChart(chart.rate, "Requests per second of the last ten minutes; the table below has the current ones", { xLabel: "time" });
    this.drawLatency = lineChart(chart.latency, "Median and 99th percentile of the latency of the last ten minutes", { xLabel: "time", format: seconds, least: 1e-3 });
  }

  async update() {
    if (this.isBusy) return;
    this.isBusy = true;
    try {
      const [ready, stats] = await Promise.all([get("readyz", {}, this.signal), get("v1/stats", {}, this.signal)]);
      this.place.totals.replaceChildren(totals(ready, stats));
      if (this.hasJobs) this.showJobs((await get("v1/jobs", { limit: 50 }, this.signal)).jobs);
      if (this.mayScrape) await this.scrape();
      this.place.problem.replaceChildren();
    } catch (error) {
      if (!this.signal.aborted) this.place.problem.replaceChildren(failure(error));
    } finally {
      this.isBusy = false;
    }
  }

  async scrape() {
    let text;
    try {
      text = await (await send("GET", "metrics", { signal: this.signal })).text();
    } catch (error) {
      if (error.status !== 403) throw error;
      this.mayScrape = false;
      this.place.traffic.replaceChildren(h("p", null, "Requests, latencies and errors need a key with the scope admin."));
      return;
    }
    const now = { at: Date.now() / 1000, scrape: parse(text) };
    this.place.load.replaceChildren(load(now.scrape), errors(now.scrape));
    if (this.before) this.addPoint(between(this.before.scrape, now.scrape, now.at - this.before.at), now.at);
    this.before = now;
  }

  addPoint(found, at) {
    this.points.push({ at, ...found });
    if (this.points.length > KEPT) this.points.shift();
    const x = this.points.map((one) => one.at);
    const values = (name) => this.points.map((one) => one[name]);
    this.drawRate(x, [{ label: "requests per second, without this page's", values: values("rate") }]);
    this.drawLatency(x, [{ label: "median", values: values("p50") }, { label: "99th percentile", values: values("p99") }]);
    const heads = ["Route", "Per second", "Median", "99th percentile"];
    const busy = found.routes.filter((one) => one.rate > 0).sort((a, b) => b.rate - a.rate).slice(0, 12);
    const rows = [
      row(heads, ["all", short(found.rate), seconds(found.p50), seconds(found.p99)]),
      ...busy.map((one) => row(heads, [one.route, short(one.rate), seconds(one.p50), seconds(one.p99)])),
    ];
    this.place.traffic.replaceChildren(table("Requests of the last two seconds", heads, rows));
  }

  showJobs(jobs) {
    const heads = ["Job", "Kind", "State", "Progress", "Left", "Actions"];
    const rows = jobs.map((job) => {
      const result = h("span");
      const cancel = h("button", { type: "button", "aria-label": `Cancel ${job.id}` }, "Cancel");
      cancel.addEventListener("click", () => run(cancel, result, async () => { await send("DELETE", `v1/jobs/${encodeURIComponent(job.id)}`); }));
      const runs = job.state === "queued" || job.state === "running";
      const state = job.error ? `${job.state}: ${job.error.detail}` : job.state;
      const bar = h("progress", { max: 1, value: job.progress, "aria-label": `Progress of ${job.id}` });
      return row(heads, [job.id, job.kind, state, bar, seconds(job.eta_seconds), h("span", null, runs && cancel, result)]);
    });
    if (this.place.jobs.contains(document.activeElement)) return; // a button that has the focus stays
    const list = rows.length ? table("Jobs", heads, rows) : h("p", null, "There are no jobs.");
    this.place.jobs.replaceChildren(h("section", null, h("h2", null, "Jobs"), list));
  }
}

function totals(ready, stats) {
  const items = {
    Sets: count(stats.set_count),
    Modules: count(stats.adapter_count),
    Parameters: count(stats.total_trainable_params),
    "Size of the sets": meter(stats.total_memory_bytes, stats.memory_budget_bytes, "Size of the sets"),
    "In memory": bytes(stats.resident_bytes),
    Running: seconds(stats.uptime_seconds),
    Store: ready.store_writable ? "can be written" : "is read-only",
    "Bad files": count(ready.bad_file_count),
  };
  return h("dl", { class: "facts" }, Object.entries(items).map(([term, value]) => h("div", null, h("dt", null, term), h("dd", null, value))));
}

function meter(value, most, label) {
  const share = most > 0 ? value / most : 0;
  return h("span", null, h("meter", { min: 0, max: 1, high: 0.9, value: share, "aria-label": label }), ` ${bytes(value)} of ${bytes(most)} (${percent(share)})`);
}

function load(scrape) {
  const flying = sums(scrape, "bonsai_lora_requests_in_flight", (labels) => labels.lane);
  const queued = sums(scrape, "bonsai_lora_queued_work", (labels) => labels.lane);
  const heads = ["Lane", "Requests in flight", "Work that runs or waits"];
  const lanes = [...flying].sort().map(([lane, number]) => row(heads, [lane, count(number), count(queued.get(lane) ?? 0)]));
  const most = sums(scrape, "bonsai_lora_budget_bytes", (labels) => labels.resource);
  const reserved = sums(scrape, "bonsai_lora_reserved_bytes", (labels) => labels.resource);
  const resources = ["Reserved for requests", "Of the budget"];
  const budgets = [...most].sort().map(([name, total]) => row(resources, [name, meter(reserved.get(name) ?? 0, total, name)]));
  return h("section", null, h("h2", null, "Load"), table("Lanes", heads, lanes), table("Memory and disk", resources, budgets));
}

function errors(scrape) {
  const codes = [...sums(scrape, "bonsai_lora_refusals_total", (labels) => labels.code)].sort((a, b) => b[1] - a[1]);
  const heads = ["Code", "Requests refused since the start"];
  const rows = codes.map(([code, number]) => row(heads, [code, count(number)]));
  return h("section", null, h("h2", null, "Errors"), rows.length ? table("Errors by code", heads, rows) : h("p", null, "No request has been refused."));
}
