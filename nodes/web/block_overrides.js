/**
 * Which blocks run in FP16, as text: the twin of sage_kernels/block_overrides.py, message for message.
 *
 *     0-2: 1, 17: 0.5                      blocks 0 to 2 always, block 17 for the first half of the steps
 *     double.3: 1, single.0-5: 0.25 low    by block type; the last quarter of the steps
 *
 * A bare number counts through all blocks of the layout. tests/block_override_cases.json holds both to one table.
 *
 * @typedef {"high" | "low"} NoiseEnd which end of the noise schedule; high is the start of the sampling
 * @typedef {{first: number, last: number, share: number, end: NoiseEnd, type: string | null}} BlockOverride
 * @typedef {{name: string, type: string, index: number}} Block as the server describes it
 */

const SPACE = "[ \\t\\r\\f\\v]"; // Python's \s in ASCII; JavaScript's takes no-break spaces as well
const STRIPPED = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]"; // Python's str.strip()
const TYPE = "[A-Za-z_]\\w*";
const ENTRY = new RegExp(
  `^(?:(?<type>${TYPE})${SPACE}*\\.${SPACE}*)?(?<first>[0-9]{1,6})(?:${SPACE}*-${SPACE}*(?<last>[0-9]{1,6}))?` +
    `${SPACE}*:${SPACE}*(?<share>[-+]?[0-9]*\\.?[0-9]+(?:[eE][-+]?[0-9]+)?)(?:${SPACE}+(?<end>[A-Za-z]+))?$`,
);
const STRIP = new RegExp(`^${STRIPPED}+|${STRIPPED}+$`, "g");
const ENDS = ["high", "low"];

/** An override that can't be read, or that names blocks which the model hasn't; the message is one line. */
export class BlockOverrideError extends Error {}

/**
 * Read overrides such as "0-2: 1, double.17: 0.5 low", separated by commas or new lines; "" gives none.
 *
 * @param {string} text
 * @returns {BlockOverride[]}
 * @throws {BlockOverrideError} with the number and text of the entry at fault, and what is allowed
 */
export function parseBlockOverrides(text) {
  const entries = text.split(/[,\n]/).map((entry) => entry.replace(STRIP, ""));
  return entries.filter(Boolean).map((entry, position) => {
    const where = `block override ${position + 1}, ${pythonRepr(entry)}`;
    const match = ENTRY.exec(entry);
    if (match === null) {
      throw new BlockOverrideError(
        `${where}, is not understood; ` +
          "write BLOCKS: SHARE, such as '0-2: 1', 'double.3: 0.5' or '17: 0.25 low', separated by commas",
      );
    }
    const { type = null, first, last = first, share, end = "high" } = match.groups;
    const override = { first: Number(first), last: Number(last), share: Number(share), end, type };
    const problems = problemsOf(override);
    if (problems.length) throw new BlockOverrideError(`${where}: ${problems.join("; ")}`);
    return override;
  });
}

/**
 * The canonical text; parseBlockOverrides() reads it back.
 *
 * @param {BlockOverride[]} overrides
 * @returns {string}
 */
export function formatBlockOverrides(overrides) {
  return overrides.map(formatOverride).join(", ");
}

/**
 * What the overrides say about each block of a model.
 *
 * @param {BlockOverride[]} overrides
 * @param {Block[]} blocks all blocks of the model, in the order of the bare numbers
 * @returns {Map<Block, {share: number, end: NoiseEnd}>}
 * @throws {BlockOverrideError} a block or type that the model hasn't (says which exist), or a block named twice
 */
export function resolveBlockOverrides(overrides, blocks) {
  const shares = new Map();
  const namedBy = new Map();
  for (const override of overrides) {
    const candidates = override.type === null ? blocks : blocks.filter((block) => block.type === override.type);
    if (override.last >= candidates.length) {
      throw new BlockOverrideError(missingBlocks(override, candidates.length, blocks));
    }
    for (const block of candidates.slice(override.first, override.last + 1)) {
      if (namedBy.has(block)) {
        throw new BlockOverrideError(
          `block ${block.name} is named twice, by '${formatOverride(namedBy.get(block))}' and by ` +
            `'${formatOverride(override)}'; name each block once`,
        );
      }
      namedBy.set(block, override);
      shares.set(block, { share: override.share, end: override.end });
    }
  }
  return shares;
}

/**
 * @param {number} first
 * @param {number} last
 * @returns {string} "3" or "3-5"
 */
export function formatRange(first, last) {
  return first === last ? String(first) : `${first}-${last}`;
}

function formatOverride({ first, last, share, end, type }) {
  const prefix = type === null ? "" : `${type}.`;
  return `${prefix}${formatRange(first, last)}: ${formatShare(share)}${end === "low" ? " low" : ""}`;
}

function problemsOf({ first, last, share, end }) {
  const problems = [];
  if (last < first) {
    problems.push(`the range ${first}-${last} runs backwards (write ${last}-${first})`);
  }
  if (!(share >= 0 && share <= 1)) {
    problems.push(`the share ${sixDigits(share)} is outside 0 to 1 (it is a share of the sampling steps)`);
  }
  if (!ENDS.includes(end)) {
    problems.push(`${pythonRepr(end)} is no end of the noise schedule (allowed: high, low)`);
  }
  return problems;
}

function missingBlocks(override, count, blocks) {
  const where = `block override '${formatOverride(override)}':`;
  const layout = formatLayout(blocks);
  if (override.type !== null && count === 0) {
    return `${where} the model has no blocks of type ${pythonRepr(override.type)}; it has ${layout}`;
  }
  if (override.type !== null) {
    return `${where} the model's ${override.type} blocks are ${override.type}.${formatRange(0, count - 1)}`;
  }
  const severalTypes = new Set(blocks.map((block) => block.type)).size > 1;
  const numbered = count ? formatRange(0, count - 1) + (severalTypes ? ` (${layout})` : "") : "none";
  return `${where} the model has no block ${override.last}; its blocks are ${numbered}`;
}

function formatLayout(blocks) {
  const counts = new Map();
  for (const { type } of blocks) counts.set(type, (counts.get(type) ?? 0) + 1);
  if (counts.size === 1) return formatRange(0, blocks.length - 1);
  return [...counts].map(([type, count]) => `${type}.${formatRange(0, count - 1)}`).join(", ") || "none";
}

/** As Python's repr() of a float of 0 to 1, but for the ends, which have no point. */
function formatShare(share) {
  return share !== 0 && share < 1e-4 ? pythonExponent(share.toExponential()) : String(share);
}

/** As Python's format(value, "g"). */
function sixDigits(value) {
  if (!Number.isFinite(value)) return value < 0 ? "-inf" : "inf";
  const [mantissa, exponent] = value.toExponential(5).split("e");
  if (exponent >= -4 && exponent < 6) return String(Number(value.toPrecision(6)));
  return pythonExponent(`${Number(mantissa)}e${exponent}`);
}

/** "1e-7" to "1e-07". */
function pythonExponent(text) {
  return text.replace(/e([-+])(\d)$/, "e$10$2");
}

/** As Python's repr() of a string. */
function pythonRepr(text) {
  const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
  const escapes = { "\\": "\\\\", "\t": "\\t", "\r": "\\r", "\n": "\\n", [quote]: `\\${quote}` };
  const escaped = text.replace(/[^]/gu, (character) => {
    if (character in escapes) return escapes[character];
    if (character === " " || !/[\p{C}\p{Z}]/u.test(character)) return character;
    const code = character.codePointAt(0);
    if (code < 0x100) return `\\x${code.toString(16).padStart(2, "0")}`;
    return code < 0x10000 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\U${code.toString(16).padStart(8, "0")}`;
  });
  return quote + escaped + quote;
}
