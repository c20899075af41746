// Upload an adapter, apply it in JSON and in binary, and download a range of its file.
//
//     npm install
//     npm run client                        makes ./client of the running service's openapi.json
//     npm start -- FOLDER MODULE [URL]      FOLDER is a PEFT adapter, MODULE one of its modules
import { openAsBlob } from "node:fs";
import { client } from "./client/client.gen.ts";
import { applyAdapter, getAdapterModel, type UploadSetResponses } from "./client/index.ts";
import { decode, encode } from "./safetensors.ts";

const BINARY = "application/vnd.safetensors";
const [folder, module, baseUrl = "http://localhost:8000"] = process.argv.slice(2);
if (!folder || !module) throw new Error("usage: npm start -- FOLDER MODULE [URL]");
client.setConfig({ baseUrl, auth: process.env.BONSAI_LORA_TOKEN, throwOnError: true });

// Of a body that may be a form or JSON, the generated uploadSet knows JSON alone, which is for pulls.
const form = new FormData();
form.set("adapter_config", await openAsBlob(`${folder}/adapter_config.json`));
form.set("adapter_model", await openAsBlob(`${folder}/adapter_model.safetensors`));
const uploaded = await client.put<UploadSetResponses, unknown, true>({
  url: "/v1/sets/{set}",
  path: { set: "typescript" },
  body: form,
  bodySerializer: null,
  headers: { "Content-Type": null },
  throwOnError: true,
});
const info = uploaded.data.modules.find((one) => one.name === module);
if (!info) throw new Error(`the adapter has no module ${module}`);
console.log(`uploaded version ${uploaded.data.version}: ${uploaded.data.adapter_count} modules`);

const path = { set: "typescript", module };
const row = Array.from({ length: info.d_in }, (_, at) => Math.sin(at));
const json = await applyAdapter({ path, body: { inputs: [row] }, throwOnError: true });

const binary = await client.post<{ 200: ArrayBuffer }, unknown, true>({
  url: "/v1/sets/{set}/adapters/{module}/apply",
  path,
  body: encode("inputs", [1, info.d_in], Float32Array.from(row)),
  bodySerializer: null,
  headers: { "Content-Type": BINARY },
  parseAs: "arrayBuffer",
  throwOnError: true,
});
const { shape, values } = decode(binary.data, "outputs");
const numbers = json.data.outputs.flat();
const differs = numbers.some((value, at) => Math.fround(value) !== values[at]);
console.log(`applied: (${shape.join(", ")}), JSON and binary ${differs ? "differ" : "agree"}`);

const start = await getAdapterModel({
  path: { set: "typescript" },
  headers: { Range: "bytes=0-7" },
  parseAs: "arrayBuffer",
  throwOnError: true,
});
const header = new DataView(start.data as unknown as ArrayBuffer).getBigUint64(0, true);
console.log(`range: status ${start.response.status}, a header of ${header} bytes`);
