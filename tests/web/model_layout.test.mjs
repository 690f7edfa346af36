/** From a node up the graph to the loader of its model. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { fetchLayout, findModelFile } from "../../nodes/web/model_layout.js";

/** A graph of nodes {id, type?, widgets?, inputs?: {name: [origin, type?]}}; returns the last one. */
function graphOf(...nodes) {
  const graph = { links: {}, getNodeById: (id) => nodes.find((node) => node.id === id) };
  for (const node of nodes) {
    node.graph = graph;
    node.inputs = Object.entries(node.inputs ?? {}).map(([name, [origin, type = "MODEL"]]) => {
      const link = Object.keys(graph.links).length + 1;
      graph.links[link] = { origin_id: origin, origin_slot: 0 };
      return { name, type, link };
    });
  }
  return nodes.at(-1);
}

const UNET_LOADER = { widgets: [{ name: "unet_name", value: "wan.safetensors" }] };

test("through nodes that pass a model on, and reroutes", () => {
  const node = graphOf(
    { id: 1, ...UNET_LOADER },
    { id: 2, type: "LoraLoader", widgets: [{ name: "lora_name", value: "x" }], inputs: { clip: [9, "CLIP"], model: [1] } },
    { id: 3, type: "Reroute", inputs: { "": [2, "*"] } },
    { id: 4, inputs: { model: [3] } },
  );
  assert.equal(findModelFile(node), "wan.safetensors");
});

test("a checkpoint loader", () => {
  const loader = { id: 1, widgets: [{ name: "ckpt_name", value: "folder/sdxl.safetensors" }] };
  assert.equal(findModelFile(graphOf(loader, { id: 2, inputs: { model: [1] } })), "folder/sdxl.safetensors");
});

test("a loader behind the output of a subgraph", () => {
  const [inner] = [graphOf({ id: 7, ...UNET_LOADER })];
  const subgraph = { id: 1, isSubgraphNode: () => true, resolveSubgraphOutputLink: () => ({ outputNode: inner }) };
  assert.equal(findModelFile(graphOf(subgraph, { id: 2, inputs: { model: [1] } })), "wan.safetensors");
});

test("null where the file can't be seen", () => {
  assert.equal(findModelFile(graphOf({ id: 1 })), null, "nothing connected");
  assert.equal(findModelFile(graphOf({ id: 1 }, { id: 2, inputs: { model: [1] } })), null, "a node that makes models");
  const linked = graphOf({ id: 1, ...UNET_LOADER, inputs: { unet_name: [5, "COMBO"] } }, { id: 2, inputs: { model: [1] } });
  linked.graph.getNodeById(1).inputs[0].widget = { name: "unet_name" };
  assert.equal(findModelFile(linked), null, "the name comes from another node");
});

test("a circle ends", () => {
  assert.equal(findModelFile(graphOf({ id: 1, inputs: { model: [2] } }, { id: 2, inputs: { model: [1] } })), null);
});

test("the file's name is quoted, and a server that is gone is an error, not an exception", async () => {
  const paths = [];
  const fetchApi = async (path) => {
    paths.push(path);
    return { json: async () => ({ family: "Wan", blocks: [] }) };
  };
  assert.deepEqual(await fetchLayout(fetchApi, "a b/ü&.safetensors"), { family: "Wan", blocks: [] });
  assert.deepEqual(paths, ["/sage3/layout?model=a%20b%2F%C3%BC%26.safetensors"]);
  const gone = await fetchLayout(() => Promise.reject(new Error("offline")), "x");
  assert.match(gone.error, /offline/);
});
