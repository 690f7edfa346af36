/** Which model a node gets, found by walking up the graph, and which blocks that model's file has. */

const FILE_WIDGETS = ["unet_name", "ckpt_name"]; // of the loaders
const MAX_NODES = 200;

/**
 * The file of the loader that a node's MODEL comes from.
 *
 * @param {object} node a LiteGraph node with the input "model"
 * @returns {string | null} as the loader names it; null where it can't be seen from the graph
 */
export function findModelFile(node) {
  const input = node.inputs?.find(({ name }) => name === "model");
  let current = origin(node.graph, input?.link);
  for (let visited = 0; current && visited < MAX_NODES; visited++) {
    const { widgets, inputs } = current.node;
    const file = widgets?.find(({ name }) => FILE_WIDGETS.includes(name));
    if (file) return isConnected(inputs, file.name) ? null : String(file.value);
    const next = inputs?.find(({ type, link }) => type === "MODEL" && link != null) ?? rerouteInput(current.node);
    current = origin(current.node.graph, next?.link);
  }
  return null;
}

/**
 * Ask the server for the blocks of a model file.
 *
 * @param {(path: string) => Promise<Response>} fetchApi
 * @param {string} file
 * @returns {Promise<{family: string, blocks: import("./block_overrides.js").Block[]} | {error: string}>}
 */
export async function fetchLayout(fetchApi, file) {
  try {
    const response = await fetchApi(`/sage3/layout?model=${encodeURIComponent(file)}`);
    return await response.json();
  } catch (error) {
    return { error: `the server gave no answer about ${file} (${error.message})` };
  }
}

/**
 * @param {object[] | undefined} inputs of a node
 * @param {string} name of a widget
 * @returns {boolean} whether the widget's value comes from another node
 */
export function isConnected(inputs, name) {
  return Boolean(inputs?.some((input) => input.widget?.name === name && input.link != null));
}

function origin(graph, linkId) {
  const link = linkId == null ? null : (graph?.getLink?.(linkId) ?? graph?.links?.[linkId]);
  if (!link) return null;
  const node = graph.getNodeById(link.origin_id);
  if (!node?.isSubgraphNode?.()) return node ? { node } : null;
  const inner = node.resolveSubgraphOutputLink?.(link.origin_slot)?.outputNode;
  return inner ? { node: inner } : null;
}

function rerouteInput(node) {
  return node.type === "Reroute" ? node.inputs?.[0] : undefined;
}
