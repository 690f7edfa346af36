/**
 * @param {Record<string, number>} counts block type to number of blocks
 * @returns {import("../../nodes/web/block_overrides.js").Block[]} named as the server names them
 */
export function blocksOf(counts) {
  const single = Object.keys(counts).length === 1;
  return Object.entries(counts).flatMap(([type, count]) =>
    Array.from({ length: count }, (_, index) => ({ name: single ? String(index) : `${type}.${index}`, type, index })),
  );
}
