// The calls of README.md, typed by what openapi-typescript writes for openapi.json. They are type-checked, not
// run: `make check-openapi`.
import createClient from "openapi-fetch";
import type { components, paths } from "./bonsai-lora.js";

const client = createClient<paths, "application/json" | "application/problem+json">({ baseUrl: "http://localhost:8000" });
const module = "q_proj";

const made = await client.POST("/v1/sets", { body: { name: "first" } });
const version: number | undefined = made.data?.version;

const put = await client.PUT("/v1/sets/{set}/adapters/{module}", {
  params: { path: { set: "first", module }, header: { "If-Match": made.response.headers.get("ETag") ?? "*" } },
  body: { alpha: 2, lora_A: [[1, 0, 0, 0], [0, 1, 0, 0]], lora_B: [[1, 0], [0, 0.5], [1, 1]] },
});
const rank: number | undefined = put.data?.rank;

const applied = await client.POST("/v1/sets/{set}/adapters/{module}/apply", {
  params: { path: { set: "first", module }, query: { scale: 0.5 } },
  body: { inputs: [[1, 2, 3, 4], [0.5, 0, 0, 0]] },
});
const rows: number[] | number[][] | undefined = applied.data?.outputs;
if (applied.error?.code === "shape_mismatch") throw new Error(applied.error.detail);

const mixed = await client.POST("/v1/apply", {
  body: { module, sets: ["first", null, [{ set: "first", weight: 0.5 }]], inputs: [[1, 2, 3, 4], [0, 0, 0, 1], [1, 1, 1, 1]] },
});
const versions: Record<string, number> | undefined = mixed.data?.versions;

const merged = await client.POST("/v1/sets/{set}/adapters/{module}/merge", {
  params: { path: { set: "first", module } },
  body: { weights: [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]] },
});
const weights: number[][] | undefined = merged.data?.weights;

const inferred = await client.POST("/v2/models/{model}/infer", {
  params: { path: { model: "first" } },
  body: { inputs: [{ name: "q_proj", shape: [1, 4], datatype: "FP32", data: [1, 2, 3, 4] }] },
});
const outputs: string[] | undefined = inferred.data?.outputs.map((one) => one.name);

const form = new FormData();
const answer = await fetch("http://localhost:8000/v1/sets/demo", { method: "PUT", body: form });
const report = (await answer.json()) as components["schemas"]["ImportReport"];
const warnings: string[] = report.warnings;

const config: components["schemas"]["CreateSet"] = { name: "ready-made", model: "qwen3-0.6b", config: { rank: 4 } };

export { config, outputs, rank, rows, version, versions, warnings, weights };
