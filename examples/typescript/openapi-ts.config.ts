import { defineConfig } from "@hey-api/openapi-ts";

export default defineConfig({
  input: process.env.OPENAPI ?? "http://localhost:8000/openapi.json",
  output: { path: "client", module: { extension: ".ts" } },
});
