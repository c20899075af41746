// Show this service's own OpenAPI document. URLs are relative to /docs, so that a path prefix works.
SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href,
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null, // the default sends the document's address to swagger.io
});
